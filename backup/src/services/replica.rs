//! `ReplicaService`: the primary's session.

use std::pin::Pin;

use tokio::sync::oneshot;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use understudy_common::types::Uid;
use understudy_proto::{
    convert,
    v1::{self, replica_service_server::ReplicaService},
};

use super::Shared;
use crate::api::{NodeError, ReplicaNode};

pub(super) struct ReplicaFrontend<N>(pub Shared<N>);

#[tonic::async_trait]
impl<N: ReplicaNode> ReplicaService for ReplicaFrontend<N> {
    type WriteBlockStream = Pin<Box<dyn Stream<Item = Result<v1::StagedAck, Status>> + Send>>;

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Result<Response<v1::AttachResponse>, Status> {
        Ok(Response::new(self.0.node.attach(request.into_inner()).await?))
    }

    async fn write_block(
        &self,
        request: Request<Streaming<v1::StagedRecord>>,
    ) -> Result<Response<Self::WriteBlockStream>, Status> {
        Ok(Response::new(Box::pin(exchange(self.0.clone(), request.into_inner()))))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        Ok(Response::new(self.0.node.heartbeat(request.into_inner()).await?))
    }
}

/// Records go to the node in their order by a task of their own; acknowledgements come back as they arise. The first
/// record names the session. The stream ends with the first record that is refused, when the primary ends it (after the
/// acknowledgement of everything received), or at shutdown.
fn exchange<N: ReplicaNode>(
    shared: Shared<N>,
    records: Streaming<v1::StagedRecord>,
) -> impl Stream<Item = Result<v1::StagedAck, Status>> + Send {
    let (name_session, session) = oneshot::channel();
    let (end, ended) = oneshot::channel();
    let node = shared.node.clone();
    tokio::spawn(receive_all(shared, records, name_session, end));
    let acks = Acks { node, session: Session::Awaited(session), ended: Some(ended), acked: 0, last: None };
    futures_util::stream::unfold(Some(acks), |acks| async move {
        let mut acks = acks?;
        match acks.next().await? {
            Ok(ack) => Some((Ok(ack), Some(acks))),
            Err(error) => Some((Err(error), None)),
        }
    })
}

/// How receiving ended: after which ship number, or why.
type Ended = Result<u64, Status>;

async fn receive_all<N: ReplicaNode>(
    shared: Shared<N>,
    mut records: Streaming<v1::StagedRecord>,
    name_session: oneshot::Sender<Uid>,
    mut end: oneshot::Sender<Ended>,
) {
    let mut name_session = Some(name_session);
    let mut last = 0;
    let ended = loop {
        let record = tokio::select! {
            biased;
            () = shared.shutdown.cancelled() => break Err(NodeError::Draining.into()),
            // The primary is gone: nobody would hear of acknowledgements.
            () = end.closed() => return,
            record = records.next() => record,
        };
        let record = match record {
            None => break Ok(last),
            Some(Err(status)) => break Err(status),
            Some(Ok(record)) => record,
        };
        if let Some(name_session) = name_session.take() {
            match convert::uid("session", &record.session) {
                // A failed send says that the other half is gone, which the next round notices.
                Ok(session) => drop(name_session.send(session)),
                Err(error) => break Err(NodeError::from(error).into()),
            }
        }
        last = record.ship;
        if let Err(error) = shared.node.receive(record).await {
            break Err(error.into());
        }
    };
    // As above.
    let _ = end.send(ended);
}

enum Session {
    Awaited(oneshot::Receiver<Uid>),
    Named(Uid),
}

/// The acknowledging side of a stream.
struct Acks<N> {
    node: N,
    session: Session,
    ended: Option<oneshot::Receiver<Ended>>,
    /// Ship number of the newest acknowledgement.
    acked: u64,
    /// Set when receiving ended well: nothing follows the acknowledgement of this one.
    last: Option<u64>,
}

impl<N: ReplicaNode> Acks<N> {
    /// The next acknowledgement; `None` after the last.
    async fn next(&mut self) -> Option<Result<v1::StagedAck, Status>> {
        loop {
            if self.last.is_some_and(|last| self.acked >= last) {
                return None;
            }
            let node = &self.node;
            let (session, acked) = (&mut self.session, self.acked);
            let acknowledged = async move {
                let named = match session {
                    Session::Named(session) => *session,
                    Session::Awaited(awaited) => match awaited.await {
                        Ok(named) => named,
                        // No first record: how it ended is told by the other half.
                        Err(_) => std::future::pending().await,
                    },
                };
                *session = Session::Named(named);
                node.acknowledged(named, acked).await
            };
            let Some(ended) = &mut self.ended else {
                let answer = acknowledged.await;
                return Some(self.take(answer));
            };
            tokio::select! {
                biased;
                answer = acknowledged => return Some(self.take(answer)),
                end = ended => {
                    self.ended = None;
                    match end {
                        Ok(Ok(last)) => self.last = Some(last),
                        Ok(Err(status)) => return Some(Err(status)),
                        // Only a panic drops it unsent.
                        Err(_) => return Some(Err(Status::internal("receiving ended without a word"))),
                    }
                }
            }
        }
    }

    #[allow(clippy::result_large_err, reason = "tonic's streams carry it")]
    fn take(&mut self, answer: Result<v1::StagedAck, NodeError>) -> Result<v1::StagedAck, Status> {
        let ack = answer?;
        self.acked = self.acked.max(ack.ship);
        Ok(ack)
    }
}
