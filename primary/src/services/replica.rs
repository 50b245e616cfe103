//! `ReplicaService` on a primary: it takes nothing, and says why. Whoever attaches here is a primary as well, so one of
//! the two is over, or the pair has split; this is where both hear of it.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};
use understudy_proto::v1::{self, replica_service_server::ReplicaService};

use super::Shared;
use crate::api::BlockEngine;

pub(super) struct ReplicaFrontend<E>(pub Shared<E>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn refused<T>() -> Result<Response<T>, Status> {
    Err(Status::failed_precondition("this node is a primary, not a backup: attach says more"))
}

#[tonic::async_trait]
impl<E: BlockEngine> ReplicaService for ReplicaFrontend<E> {
    type WriteBlockStream = Answers<v1::StagedAck>;
    type DeltaBatchStream = Answers<v1::DeltaBatchResponse>;
    type GetDivergenceStream = Answers<v1::DivergedRanges>;

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Result<Response<v1::AttachResponse>, Status> {
        Err(self.0.engine.refuse_primary(request.into_inner()).await)
    }

    async fn write_block(
        &self,
        _: Request<Streaming<v1::StagedRecord>>,
    ) -> Result<Response<Self::WriteBlockStream>, Status> {
        refused()
    }

    async fn heartbeat(&self, _: Request<v1::HeartbeatRequest>) -> Result<Response<v1::HeartbeatResponse>, Status> {
        refused()
    }

    async fn snapshot(&self, _: Request<v1::BeginRunRequest>) -> Result<Response<v1::BeginRunResponse>, Status> {
        refused()
    }

    async fn delta_batch(
        &self,
        _: Request<Streaming<v1::DeltaBatchRequest>>,
    ) -> Result<Response<Self::DeltaBatchStream>, Status> {
        refused()
    }

    async fn digest(&self, _: Request<v1::DigestRequest>) -> Result<Response<v1::DigestResponse>, Status> {
        refused()
    }

    async fn commit_delta(
        &self,
        _: Request<v1::CommitDeltaRequest>,
    ) -> Result<Response<v1::CommitDeltaResponse>, Status> {
        refused()
    }

    async fn abort_delta(&self, _: Request<v1::AbortDeltaRequest>) -> Result<Response<v1::AbortDeltaResponse>, Status> {
        refused()
    }

    async fn scrub(&self, _: Request<v1::ReplicaScrubRequest>) -> Result<Response<v1::ReplicaScrubResponse>, Status> {
        refused()
    }

    async fn fetch_block(&self, _: Request<v1::FetchBlockRequest>) -> Result<Response<v1::FetchBlockResponse>, Status> {
        refused()
    }

    async fn mend_block(&self, _: Request<v1::MendBlockRequest>) -> Result<Response<v1::MendBlockResponse>, Status> {
        refused()
    }

    async fn end_verify(&self, _: Request<v1::EndVerifyRequest>) -> Result<Response<v1::EndVerifyResponse>, Status> {
        refused()
    }

    async fn get_divergence(
        &self,
        _: Request<v1::GetDivergenceRequest>,
    ) -> Result<Response<Self::GetDivergenceStream>, Status> {
        refused()
    }
}
