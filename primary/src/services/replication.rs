//! `ReplicationService`: how the pair is doing.

use std::pin::Pin;

use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use understudy_proto::v1::{self, replication_service_server::ReplicationService};

use super::Shared;
use crate::api::{BlockEngine, EngineError};

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
}
