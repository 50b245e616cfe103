//! The calls of a run: each request of a [`crate::runner::Runner`] to the backup, and the answers in their order.

use std::{future::Future, pin::Pin};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesOrdered};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};
use understudy_common::types::GroupId;
use understudy_proto::v1::{self, replica_service_client::ReplicaServiceClient};

use crate::runner::{RunAnswer, RunRequest};

/// Batches handed to the transport and not taken by it.
const BATCHES: usize = 16;
/// Calls under way, at most.
const CALLS: usize = 16;

/// An open session.
#[derive(Clone)]
pub struct Attached {
    /// Carried by every request.
    pub session: Bytes,
    /// The connection.
    pub client: ReplicaServiceClient<Channel>,
}

/// Why a call gave no answer.
pub(super) enum Ended {
    /// It may be tried again.
    Again(String),
    /// The run is over on the backup.
    Over(String),
}

/// An answer, or none.
pub(super) type Heard = Result<RunAnswer, Ended>;

type Calling = Pin<Box<dyn Future<Output = Heard> + Send>>;
type Opening = Pin<Box<dyn Future<Output = Result<Streaming<v1::DeltaBatchResponse>, Status>> + Send>>;

/// The stream of batches.
enum Batches {
    Closed,
    Opening(mpsc::Sender<v1::DeltaBatchRequest>, Opening),
    Open(mpsc::Sender<v1::DeltaBatchRequest>, Box<Streaming<v1::DeltaBatchResponse>>),
}

/// See the module.
pub(super) struct Calls {
    calling: FuturesOrdered<Calling>,
    batches: Batches,
}

impl Default for Calls {
    fn default() -> Self {
        Self { calling: FuturesOrdered::new(), batches: Batches::Closed }
    }
}

impl Calls {
    /// Forgets everything under way: answers that come are of no use.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// True while an answer may come.
    pub fn expects(&self) -> bool {
        !self.calling.is_empty() || !matches!(self.batches, Batches::Closed)
    }

    /// True if another request may be made.
    pub fn has_room(&self) -> bool {
        let room = match &self.batches {
            Batches::Closed => true,
            Batches::Opening(sender, _) | Batches::Open(sender, _) => sender.capacity() > 0,
        };
        room && self.calling.len() < CALLS
    }

    /// Makes a request.
    pub fn ask(&mut self, attached: &Attached, request: RunRequest) {
        let mut client = attached.client.clone();
        let calling: Calling = match request {
            RunRequest::Batch(batch) => return self.batch(attached, batch),
            RunRequest::Begin(request) => Box::pin(async move {
                let answer = client.snapshot(request).await.map_err(|status| ended("Snapshot", &status))?;
                Ok(RunAnswer::Begin(answer.into_inner()))
            }),
            RunRequest::Digest(request) => Box::pin(async move {
                let answer = client.digest(request).await.map_err(|status| ended("Digest", &status))?;
                Ok(RunAnswer::Digest(answer.into_inner()))
            }),
            RunRequest::Commit(request) => Box::pin(async move {
                let answer = client.commit_delta(request).await.map_err(|status| ended("CommitDelta", &status))?;
                Ok(RunAnswer::Commit(answer.into_inner()))
            }),
        };
        self.calling.push_back(calling);
    }

    fn batch(&mut self, attached: &Attached, batch: v1::DeltaBatchRequest) {
        if let Batches::Closed = self.batches {
            let (sender, queue) = mpsc::channel(BATCHES);
            let mut client = attached.client.clone();
            let opening = Box::pin(async move {
                client.delta_batch(ReceiverStream::new(queue)).await.map(tonic::Response::into_inner)
            });
            self.batches = Batches::Opening(sender, opening);
        }
        let (Batches::Opening(sender, _) | Batches::Open(sender, _)) = &self.batches else { return };
        // There is room: it was asked for. A stream that is closed says so by its answers.
        let _ = sender.try_send(batch);
    }

    /// Gives a run up; nobody waits for the answer.
    pub fn abort(&self, attached: &Attached, group: GroupId, run: u64) {
        let (mut client, session) = (attached.client.clone(), attached.session.clone());
        tokio::spawn(async move {
            // If it does not arrive, the next run supersedes this one.
            let _ = client.abort_delta(v1::AbortDeltaRequest { session, group_id: group.0, run }).await;
        });
    }

    /// The next answer. Cancel-safe.
    pub async fn next(&mut self) -> Heard {
        let Self { calling, batches } = self;
        tokio::select! {
            Some(heard) = calling.next(), if !calling.is_empty() => heard,
            heard = next_batch(batches), if !matches!(batches, Batches::Closed) => heard,
            else => std::future::pending().await,
        }
    }
}

async fn next_batch(batches: &mut Batches) -> Heard {
    if let Batches::Opening(_, opening) = batches {
        let opened = opening.await;
        match (std::mem::replace(batches, Batches::Closed), opened) {
            (Batches::Opening(sender, _), Ok(answers)) => *batches = Batches::Open(sender, Box::new(answers)),
            (_, Err(status)) => return Err(ended("DeltaBatch", &status)),
            (_, Ok(_)) => {}
        }
    }
    let Batches::Open(_, answers) = batches else { return std::future::pending().await };
    let answer = answers.message().await;
    match answer {
        Ok(Some(answer)) => Ok(RunAnswer::Batch(answer)),
        Ok(None) => {
            *batches = Batches::Closed;
            Err(Ended::Again("the backup ended the stream of batches".into()))
        }
        Err(status) => {
            *batches = Batches::Closed;
            Err(ended("DeltaBatch", &status))
        }
    }
}

fn ended(what: &str, status: &Status) -> Ended {
    let why = format!("{what}: {}", status.message());
    match status.code() {
        Code::Aborted | Code::FailedPrecondition | Code::InvalidArgument | Code::Unimplemented => Ended::Over(why),
        _ => Ended::Again(why),
    }
}
