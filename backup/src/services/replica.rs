//! `ReplicaService`: the primary's session.

use std::pin::Pin;

use tokio::sync::{mpsc, oneshot};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use understudy_common::types::Uid;
use understudy_proto::{
    convert,
    together::next_together,
    v1::{self, replica_service_server::ReplicaService},
};

use super::Shared;
use crate::api::{NodeError, ReplicaNode, When};

/// Batches of a run that are taken and not answered.
const BATCHES: usize = 64;
/// Ranges in one message.
const RANGES: usize = 16 * 1024;

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

    async fn snapshot(&self, request: Request<v1::BeginRunRequest>) -> Result<Response<v1::BeginRunResponse>, Status> {
        Ok(Response::new(self.0.node.begin_run(request.into_inner()).await?))
    }

    type DeltaBatchStream = Pin<Box<dyn Stream<Item = Result<v1::DeltaBatchResponse, Status>> + Send>>;

    async fn delta_batch(
        &self,
        request: Request<Streaming<v1::DeltaBatchRequest>>,
    ) -> Result<Response<Self::DeltaBatchStream>, Status> {
        let (taken, answers) = mpsc::channel(BATCHES);
        tokio::spawn(take_batches(self.0.clone(), request.into_inner(), taken));
        let node = self.0.node.clone();
        let answers = ReceiverStream::new(answers).then(move |taken: Result<When<_>, Status>| {
            let node = node.clone();
            async move {
                let When { at, answer } = taken?;
                node.durable(at).await?;
                Ok(answer)
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn digest(&self, request: Request<v1::DigestRequest>) -> Result<Response<v1::DigestResponse>, Status> {
        Ok(Response::new(self.0.node.digest(request.into_inner()).await?))
    }

    type GetDivergenceStream = Pin<Box<dyn Stream<Item = Result<v1::DivergedRanges, Status>> + Send>>;

    async fn get_divergence(
        &self,
        request: Request<v1::GetDivergenceRequest>,
    ) -> Result<Response<Self::GetDivergenceStream>, Status> {
        let volumes = self.0.node.divergence(request.into_inner()).await?;
        let messages = volumes.into_iter().flat_map(|(volume, blocks)| {
            let mut next = 0;
            std::iter::from_fn(move || {
                let mut ranges = Vec::new();
                while ranges.len() < 2 * RANGES
                    && let Some((first, count)) = blocks.next_run(next, u64::MAX)
                {
                    ranges.extend([first, count]);
                    next = first + count;
                }
                (!ranges.is_empty()).then(|| Ok(v1::DivergedRanges { volume_id: volume.0, ranges }))
            })
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn commit_delta(
        &self,
        request: Request<v1::CommitDeltaRequest>,
    ) -> Result<Response<v1::CommitDeltaResponse>, Status> {
        Ok(Response::new(self.0.node.commit_run(request.into_inner()).await?))
    }

    async fn abort_delta(
        &self,
        request: Request<v1::AbortDeltaRequest>,
    ) -> Result<Response<v1::AbortDeltaResponse>, Status> {
        Ok(Response::new(self.0.node.abort_run(request.into_inner()).await?))
    }

    async fn end_verify(
        &self,
        request: Request<v1::EndVerifyRequest>,
    ) -> Result<Response<v1::EndVerifyResponse>, Status> {
        Ok(Response::new(self.0.node.end_verify(request.into_inner()).await?))
    }

    async fn scrub(
        &self,
        request: Request<v1::ReplicaScrubRequest>,
    ) -> Result<Response<v1::ReplicaScrubResponse>, Status> {
        Ok(Response::new(self.0.node.scrub(request.into_inner()).await?))
    }

    async fn fetch_block(
        &self,
        request: Request<v1::FetchBlockRequest>,
    ) -> Result<Response<v1::FetchBlockResponse>, Status> {
        Ok(Response::new(self.0.node.fetch_block(request.into_inner()).await?))
    }

    async fn mend_block(
        &self,
        request: Request<v1::MendBlockRequest>,
    ) -> Result<Response<v1::MendBlockResponse>, Status> {
        Ok(Response::new(self.0.node.mend_block(request.into_inner()).await?))
    }
}

/// Batches go to the node in their order, at most [`BATCHES`] ahead of their answers.
async fn take_batches<N: ReplicaNode>(
    shared: Shared<N>,
    mut batches: Streaming<v1::DeltaBatchRequest>,
    taken: mpsc::Sender<Result<When<v1::DeltaBatchResponse>, Status>>,
) {
    loop {
        let batch = tokio::select! {
            biased;
            () = shared.shutdown.cancelled() => break drop(taken.send(Err(NodeError::Draining.into())).await),
            () = taken.closed() => return,
            batch = batches.next() => batch,
        };
        let answer = match batch {
            None => return,
            Some(Err(status)) => Err(status),
            Some(Ok(batch)) => shared.node.take_batch(batch).await.map_err(Status::from),
        };
        let over = answer.is_err();
        // A failed send says that the primary is gone.
        if taken.send(answer).await.is_err() || over {
            return;
        }
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
    let weigh = |record: &v1::StagedRecord| match &record.op {
        Some(v1::staged_record::Op::Write(write)) => write.data.len(),
        _ => 0,
    };
    let ended = loop {
        let messages = tokio::select! {
            biased;
            () = shared.shutdown.cancelled() => break Err(NodeError::Draining.into()),
            // The primary is gone: nobody would hear of acknowledgements.
            () = end.closed() => return,
            messages = next_together(&mut records, weigh) => messages,
        };
        let Some(messages) = messages else { break Ok(last) };
        // A status ends the stream behind what came before it.
        let mut failed = None;
        let mut together = Vec::with_capacity(messages.len());
        for message in messages {
            match message {
                Ok(record) => together.push(record),
                Err(status) => failed = Some(status),
            }
        }
        if let Some(first) = together.first()
            && let Some(name_session) = name_session.take()
        {
            match convert::uid("session", &first.session) {
                // A failed send says that the other half is gone, which the next round notices.
                Ok(session) => drop(name_session.send(session)),
                Err(error) => break Err(NodeError::from(error).into()),
            }
        }
        last = together.last().map_or(last, |record| record.ship);
        if !together.is_empty()
            && let Err(error) = shared.node.receive(together).await
        {
            break Err(error.into());
        }
        if let Some(status) = failed {
            break Err(status);
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
