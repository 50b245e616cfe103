//! `ReplicationService`: how the pair is doing, and what an operator may say about it.

use std::{collections::BTreeMap, pin::Pin};

use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use understudy_proto::v1::{self, replication_service_server::ReplicationService};

use super::{Shared, key};
use crate::api::{BlockEngine, EngineError, PolicyInForce, UnshippedVolume, VolumeKey};

/// Decisions of a group where nothing is said.
const DECISIONS: usize = 20;
/// Decisions of a group at most.
const DECISIONS_MAX: usize = 1000;
/// Bytes of one answer of `GetUnshipped`.
const UNSHIPPED_BYTES: u64 = 1 << 20;
/// Parts of the policy that the link is built with.
const READ_AT_START: [&str; 2] = ["link.timeout", "link.throttle"];

pub(super) struct ReplicationFrontend<E>(pub Shared<E>);

#[tonic::async_trait]
impl<E: BlockEngine> ReplicationService for ReplicationFrontend<E> {
    type WatchEventsStream = Pin<Box<dyn Stream<Item = Result<v1::Event, Status>> + Send>>;

    async fn get_status(&self, _: Request<v1::GetStatusRequest>) -> Result<Response<v1::Status>, Status> {
        Ok(Response::new(self.0.engine.status()))
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let events = self.0.engine.subscribe(request.into_inner().after);
        let state = (Some(events), self.0.shutdown.clone());
        let answers = futures_util::stream::unfold(state, |(events, shutdown)| async move {
            let mut events = events?;
            match shutdown.run_until_cancelled(events.next()).await {
                Some(event) => Some((Ok(event?), (Some(events), shutdown))),
                None => Some((Err(EngineError::Draining.into()), (None, shutdown))),
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn start_delta(
        &self,
        request: Request<v1::StartDeltaRequest>,
    ) -> Result<Response<v1::StartDeltaResponse>, Status> {
        let group = named(request.into_inner().group)?;
        Ok(Response::new(self.0.engine.start_delta(&group).await?))
    }

    async fn abort_delta(
        &self,
        request: Request<v1::AbortRunRequest>,
    ) -> Result<Response<v1::AbortRunResponse>, Status> {
        let group = named(request.into_inner().group)?;
        Ok(Response::new(self.0.engine.abort_delta(&group).await?))
    }

    async fn set_mode(&self, request: Request<v1::SetModeRequest>) -> Result<Response<v1::SetModeResponse>, Status> {
        let v1::SetModeRequest { group, mode } = request.into_inner();
        let group = named(group)?;
        let invalid = |why: &str| EngineError::Invalid { field: "mode", why: why.into() };
        let forced = match v1::Mode::try_from(mode) {
            Ok(v1::Mode::Delta) => true,
            Ok(v1::Mode::Unspecified) => false,
            Ok(v1::Mode::Continuous) => {
                return Err(
                    invalid("continuous mode cannot be forced; release the group and its policy returns it").into()
                );
            }
            Err(_) => return Err(invalid("is no mode; use DELTA to force it, UNSPECIFIED to release").into()),
        };
        Ok(Response::new(self.0.engine.force_delta(&group, forced).await?))
    }

    async fn set_policy(&self, request: Request<v1::SetPolicyRequest>) -> Result<Response<v1::Policy>, Status> {
        let v1::SetPolicyRequest { settings, validate_only } = request.into_inner();
        let invalid = |why: String| EngineError::Invalid { field: "settings", why };
        if settings.is_empty() {
            return Err(invalid("is empty; name at least one setting of the policy".into()).into());
        }
        if let Some(name) = READ_AT_START.iter().find(|name| settings.contains_key(**name)) {
            let why = format!("{name} is read at start; change the configuration and start the service again");
            return Err(invalid(why).into());
        }
        let PolicyInForce { policy, configured } = self.0.engine.policy();
        let settings: BTreeMap<String, String> = settings.into_iter().collect();
        let policy = policy.with(&settings).map_err(|problems| invalid(problems.to_string()))?;
        if !validate_only {
            self.0.engine.set_policy(policy.clone());
        }
        Ok(Response::new(wire(&PolicyInForce { policy, configured })))
    }

    async fn get_policy(&self, _: Request<v1::GetPolicyRequest>) -> Result<Response<v1::Policy>, Status> {
        Ok(Response::new(wire(&self.0.engine.policy())))
    }

    async fn demote(&self, request: Request<v1::DemoteRequest>) -> Result<Response<v1::DemoteResponse>, Status> {
        Ok(Response::new(self.0.engine.demote(request.into_inner()).await?))
    }

    async fn renew_lease(
        &self,
        request: Request<v1::RenewLeaseRequest>,
    ) -> Result<Response<v1::RenewLeaseResponse>, Status> {
        Ok(Response::new(self.0.engine.renew_lease(request.into_inner().generation)?))
    }

    async fn resolve_split_brain(
        &self,
        _: Request<v1::ResolveSplitBrainRequest>,
    ) -> Result<Response<v1::ResolveSplitBrainResponse>, Status> {
        Ok(Response::new(self.0.engine.resolve()?))
    }

    type GetUnshippedStream = Pin<Box<dyn Stream<Item = Result<v1::Unshipped, Status>> + Send>>;

    async fn get_unshipped(
        &self,
        request: Request<v1::GetUnshippedRequest>,
    ) -> Result<Response<Self::GetUnshippedStream>, Status> {
        let v1::GetUnshippedRequest { volume, data } = request.into_inner();
        let volumes = self.0.engine.unshipped((!volume.is_empty()).then_some(&volume))?;
        let max = if data { UNSHIPPED_BYTES } else { u64::MAX };
        let ranges = volumes.into_iter().flat_map(move |UnshippedVolume { spec, blocks }| {
            let block_bytes = u64::from(spec.block_size.bytes());
            let mut next = 0;
            std::iter::from_fn(move || {
                let (first, count) = blocks.next_run(next, (max / block_bytes).max(1))?;
                next = first + count;
                Some((spec.clone(), first, count))
            })
        });
        let engine = self.0.engine.clone();
        let answers = tokio_stream::iter(ranges).then(move |(spec, first, count)| {
            let engine = engine.clone();
            async move {
                let block_bytes = u64::from(spec.block_size.bytes());
                let data = if data { engine.read_unshipped(&spec, first, count).await? } else { Default::default() };
                let (offset_bytes, length_bytes) = (first * block_bytes, count * block_bytes);
                Ok(v1::Unshipped { volume: spec.name, offset_bytes, length_bytes, data })
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        let v1::ExplainRequest { group, limit } = request.into_inner();
        let group = (!group.is_empty()).then_some(group);
        let limit = match usize::try_from(limit).unwrap_or(DECISIONS_MAX) {
            0 => DECISIONS,
            limit => limit.min(DECISIONS_MAX),
        };
        Ok(Response::new(v1::ExplainResponse { groups: self.0.engine.explain(group.as_deref(), limit)? }))
    }

    type VerifyStream = Pin<Box<dyn Stream<Item = Result<v1::VerifyProgress, Status>> + Send>>;

    async fn verify(&self, request: Request<v1::VerifyRequest>) -> Result<Response<Self::VerifyStream>, Status> {
        let v1::VerifyRequest { volume_id, volume, repair } = request.into_inner();
        let progress = self.0.engine.verify(key_or_all(volume_id, volume)?, repair)?;
        Ok(Response::new(Box::pin(progress.map(|told| told.map_err(Status::from)))))
    }

    async fn scrub(&self, request: Request<v1::ScrubRequest>) -> Result<Response<v1::ScrubResponse>, Status> {
        let v1::ScrubRequest { start, volume_id, volume } = request.into_inner();
        Ok(Response::new(self.0.engine.scrub(key_or_all(volume_id, volume)?, start).await?))
    }
}

/// `None`, which is every volume, where none is named.
fn key_or_all(volume_id: u64, volume: String) -> Result<Option<VolumeKey>, EngineError> {
    let all = volume_id == 0 && volume.is_empty();
    (!all).then(|| key(volume_id, volume)).transpose()
}

fn named(group: String) -> Result<String, EngineError> {
    if group.is_empty() {
        return Err(EngineError::Invalid {
            field: "group",
            why: "names no group; set it to one or to a volume".into(),
        });
    }
    Ok(group)
}

fn wire(PolicyInForce { policy, configured }: &PolicyInForce) -> v1::Policy {
    let (settings, before) = (policy.texts(), configured.texts());
    let changed = settings.iter().filter(|(name, text)| before.get(*name) != Some(*text));
    v1::Policy { changed: changed.map(|(name, _)| name.clone()).collect(), settings: settings.into_iter().collect() }
}
