//! `VolumeService`: the life cycle of volumes.

use std::{collections::BTreeMap, future::Future, pin::Pin, time::Duration};

use futures_util::StreamExt as _;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use understudy_common::types::{AckRule, AwayRule, VolumeSpec};
use understudy_proto::{
    convert::{ack_rule, away_rule, volume_to_wire},
    v1::{self, volume_service_server::VolumeService},
};

use super::{Shared, key};
use crate::api::{BlockEngine, Changed, Copy, EngineError, NewVolume, VolumeKey};

pub(super) struct VolumeFrontend<E>(pub Shared<E>);

#[tonic::async_trait]
impl<E: BlockEngine> VolumeService for VolumeFrontend<E> {
    async fn create_volume(&self, request: Request<v1::CreateVolumeRequest>) -> Result<Response<v1::Volume>, Status> {
        let v1::CreateVolumeRequest { name, size_bytes, block_bytes, group, ack, away } = request.into_inner();
        let volume = NewVolume {
            name,
            size_bytes,
            block_bytes,
            group: (!group.is_empty()).then_some(group),
            ack: ack_rule(ack).map_err(EngineError::from)?.unwrap_or(AckRule::Staged),
            away: away_rule(away).map_err(EngineError::from)?.unwrap_or(AwayRule::Degrade),
        };
        answer(&self.0.engine.create_volume(volume).await?)
    }

    async fn get_volume(&self, request: Request<v1::GetVolumeRequest>) -> Result<Response<v1::Volume>, Status> {
        let v1::GetVolumeRequest { volume_id, volume } = request.into_inner();
        answer(&self.0.engine.volume(&key(volume_id, volume)?)?)
    }

    async fn list_volumes(
        &self,
        _: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let volumes = self.0.engine.volumes().iter().map(wire).collect();
        Ok(Response::new(v1::ListVolumesResponse { volumes }))
    }

    async fn resize_volume(&self, request: Request<v1::ResizeVolumeRequest>) -> Result<Response<v1::Volume>, Status> {
        let v1::ResizeVolumeRequest { volume_id, volume, size_bytes } = request.into_inner();
        answer(&self.0.engine.resize_volume(&key(volume_id, volume)?, size_bytes).await?)
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        let v1::DeleteVolumeRequest { volume_id, volume } = request.into_inner();
        self.0.engine.delete_volume(&key(volume_id, volume)?).await?;
        Ok(Response::new(v1::DeleteVolumeResponse {}))
    }

    async fn set_ack_rule(&self, request: Request<v1::SetAckRuleRequest>) -> Result<Response<v1::Volume>, Status> {
        let v1::SetAckRuleRequest { volume_id, volume, ack, away } = request.into_inner();
        let volume = key(volume_id, volume)?;
        let ack = ack_rule(ack).map_err(EngineError::from)?.ok_or_else(|| EngineError::Invalid {
            field: "ack",
            why: "is not set; use STAGED, PRIMARY or BOTH".into(),
        })?;
        let away = away_rule(away).map_err(EngineError::from)?;
        answer(&self.0.engine.set_ack_rule(&volume, ack, away).await?)
    }

    async fn list_groups(&self, _: Request<v1::ListGroupsRequest>) -> Result<Response<v1::ListGroupsResponse>, Status> {
        let mut groups = BTreeMap::new();
        for spec in self.0.engine.volumes() {
            let empty = || v1::Group { id: spec.group.0, name: spec.group_name, volumes: Vec::new() };
            groups.entry(spec.group).or_insert_with(empty).volumes.push(spec.name);
        }
        Ok(Response::new(v1::ListGroupsResponse { groups: groups.into_values().collect() }))
    }

    async fn get_pool(&self, _: Request<v1::GetPoolRequest>) -> Result<Response<v1::Pool>, Status> {
        Ok(Response::new(self.0.engine.pool()))
    }

    async fn add_device(&self, request: Request<v1::AddDeviceRequest>) -> Result<Response<v1::PoolDevice>, Status> {
        Ok(Response::new(self.0.engine.add_device(request.into_inner()).await?))
    }

    async fn drain_device(&self, request: Request<v1::DrainDeviceRequest>) -> Result<Response<v1::PoolDevice>, Status> {
        Ok(Response::new(self.0.engine.drain_device(request.into_inner()).await?))
    }

    async fn list_segments(
        &self,
        request: Request<v1::ListSegmentsRequest>,
    ) -> Result<Response<v1::ListSegmentsResponse>, Status> {
        Ok(Response::new(self.0.engine.list_segments(request.into_inner())?))
    }

    async fn snapshot(&self, request: Request<v1::SnapshotRequest>) -> Result<Response<v1::SnapshotInfo>, Status> {
        let v1::SnapshotRequest { group, name } = request.into_inner();
        Ok(Response::new(self.0.engine.take_snapshot(&named("group", group)?, &name).await?))
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        let group = request.into_inner().group;
        let snapshots = self.0.engine.snapshots((!group.is_empty()).then_some(&group)).await?;
        Ok(Response::new(v1::ListSnapshotsResponse { snapshots }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<v1::DeleteSnapshotRequest>,
    ) -> Result<Response<v1::DeleteSnapshotResponse>, Status> {
        let v1::DeleteSnapshotRequest { group, snapshot } = request.into_inner();
        self.0.engine.delete_snapshot(&named("group", group)?, &named("snapshot", snapshot)?).await?;
        Ok(Response::new(v1::DeleteSnapshotResponse {}))
    }

    type RestoreSnapshotStream = Answers<v1::CopyProgress>;

    async fn restore_snapshot(
        &self,
        request: Request<v1::RestoreSnapshotRequest>,
    ) -> Result<Response<Self::RestoreSnapshotStream>, Status> {
        let v1::RestoreSnapshotRequest { volume, group, snapshot } = request.into_inner();
        let snapshot = named("snapshot", snapshot)?;
        let copy = if volume.is_empty() {
            self.0.engine.restore_snapshot(&named("group", group)?, None, &snapshot).await?
        } else {
            self.0.engine.restore_snapshot(&volume, Some(&volume), &snapshot).await?
        };
        Ok(Response::new(progress(copy, self.0.shutdown.clone())))
    }

    type CloneSnapshotStream = Answers<v1::CopyProgress>;

    async fn clone_snapshot(
        &self,
        request: Request<v1::CloneSnapshotRequest>,
    ) -> Result<Response<Self::CloneSnapshotStream>, Status> {
        let v1::CloneSnapshotRequest { volume, snapshot, name, group } = request.into_inner();
        let (volume, group) = (key(0, volume)?, (!group.is_empty()).then_some(group));
        let copy = self.0.engine.clone_snapshot(&volume, &named("snapshot", snapshot)?, name, group).await?;
        Ok(Response::new(progress(copy, self.0.shutdown.clone())))
    }

    type GetChangedBlocksStream = Answers<v1::ChangedBlocks>;

    async fn get_changed_blocks(
        &self,
        request: Request<v1::GetChangedBlocksRequest>,
    ) -> Result<Response<Self::GetChangedBlocksStream>, Status> {
        let v1::GetChangedBlocksRequest { volume, base_snapshot, target_snapshot, starting_offset, max_results } =
            request.into_inner();
        let (engine, shutdown) = (self.0.engine.clone(), self.0.shutdown.clone());
        let volume = VolumeKey::Id(engine.volume(&key(0, volume)?)?.id);
        let base = named("base_snapshot", base_snapshot)?;
        let target = (!target_snapshot.is_empty()).then_some(target_snapshot);
        // Asked here once, so that what is wrong with the request is the answer of the call.
        let first = engine.changed_blocks(&volume, &base, target.as_deref(), starting_offset).await?;
        let at_once = match usize::try_from(max_results).unwrap_or(RANGES_MAX) {
            0 => RANGES_MAX,
            some => some.min(RANGES_MAX),
        };
        let answers = pages(first, move |offset| {
            let (engine, volume, base, target) = (engine.clone(), volume.clone(), base.clone(), target.clone());
            async move { engine.changed_blocks(&volume, &base, target.as_deref(), offset).await }
        });
        let answers = answers.flat_map(move |changed| futures_util::stream::iter(in_answers(changed, at_once)));
        Ok(Response::new(Box::pin(answers.take_until(async move { shutdown.cancelled().await }))))
    }
}

/// Ranges in one answer.
const RANGES_MAX: usize = 4096;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// `first`, and what `ask` gives for where each one says to go on.
fn pages<F: Future<Output = Result<Changed, EngineError>> + Send>(
    first: Changed,
    ask: impl Fn(u64) -> F + Send,
) -> impl Stream<Item = Result<Changed, EngineError>> + Send {
    futures_util::stream::try_unfold((Some(first), None, ask), |(first, next, ask)| async move {
        let changed = match (first, next) {
            (Some(first), _) => first,
            (None, Some(offset)) => ask(offset).await?,
            (None, None) => return Ok(None),
        };
        let next = changed.next;
        Ok(Some((changed, (None, next, ask))))
    })
}

fn in_answers(changed: Result<Changed, EngineError>, at_once: usize) -> Vec<Result<v1::ChangedBlocks, Status>> {
    let changed = match changed {
        Ok(changed) => changed,
        Err(error) => return vec![Err(error.into())],
    };
    let answer = |ranges: &[(u64, u64)]| {
        let range = |(byte_offset, size_bytes): &(u64, u64)| v1::BlockMetadata {
            byte_offset: *byte_offset,
            size_bytes: *size_bytes,
        };
        Ok(v1::ChangedBlocks {
            volume_capacity_bytes: changed.volume_bytes,
            block_metadata: ranges.iter().map(range).collect(),
        })
    };
    changed.ranges.chunks(at_once).map(answer).collect()
}

/// How far a copy has come, now and then, up to its end.
fn progress(copy: Copy, shutdown: CancellationToken) -> Answers<v1::CopyProgress> {
    let answers = futures_util::stream::unfold((Some(copy), shutdown), |(copy, shutdown)| async move {
        let mut copy = copy?;
        // Whether it ended first or not is looked at behind the pause.
        let ended = copy.progress.wait_for(|copying| copying.ended.is_some());
        let _ = tokio::time::timeout(PROGRESS, shutdown.run_until_cancelled(ended)).await;
        let now = copy.progress.borrow().clone();
        let finished = now.ended.is_some();
        let answer = match now.ended {
            Some(Err(error)) => Err(error.into()),
            None if shutdown.is_cancelled() => Err(EngineError::Draining.into()),
            ended => Ok(v1::CopyProgress {
                done_bytes: now.done_bytes,
                total_bytes: now.total_bytes,
                finished: ended.is_some(),
                volumes: copy.volumes.iter().map(wire).collect(),
            }),
        };
        let goes_on = !finished && answer.is_ok();
        Some((answer, (goes_on.then_some(copy), shutdown)))
    });
    Box::pin(answers)
}

/// Between two answers about a copy.
const PROGRESS: Duration = Duration::from_millis(200);

fn named(field: &'static str, name: String) -> Result<String, EngineError> {
    if name.is_empty() {
        return Err(EngineError::Invalid { field, why: "is empty; name one".into() });
    }
    Ok(name)
}

fn wire(volume: &VolumeSpec) -> v1::Volume {
    volume_to_wire(volume)
}

#[allow(clippy::unnecessary_wraps, clippy::result_large_err, reason = "every method ends with it")]
fn answer(volume: &VolumeSpec) -> Result<Response<v1::Volume>, Status> {
    Ok(Response::new(wire(volume)))
}
