//! The connection of a write stream: opens it, feeds it from the queue, takes the answers, opens it again.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use understudy_proto::v1::{WriteBlocksRequest, WriteBlocksResponse};

use super::queue::{Entry, Queue};
use crate::backoff::Backoff;
use crate::client::Client;
use crate::error::{ClientError, describe, is_loss};

/// Messages handed to the transport ahead of what it has taken. Enough for it to fill its buffer at 4 KiB a message.
const OUTBOUND_MESSAGES: usize = 64;

/// What tells the callers that the stream has ended.
pub(super) struct Closing {
    pub(super) count: Arc<Semaphore>,
    pub(super) bytes: Arc<Semaphore>,
    pub(super) failure: Arc<OnceLock<ClientError>>,
}

/// Why a connection ended.
enum End {
    /// Every write is answered and no more will come.
    Finished,
    /// Worth another connection.
    Lost(String),
    /// No connection will do better.
    Fatal(String),
}

pub(super) async fn run(client: Client, submitted: mpsc::Receiver<Entry>, deadline: Duration, closing: Closing) {
    let mut driver = Driver { client, submitted, deadline, queue: Queue::default(), progress: Instant::now() };
    if let Err(reason) = driver.serve().await {
        // First no one can add, then all that were accepted are told.
        driver.submitted.close();
        while let Ok(entry) = driver.submitted.try_recv() {
            driver.queue.push(entry);
        }
        let _ = closing.failure.set(driver.queue.fail(&reason));
    }
    closing.count.close();
    closing.bytes.close();
}

struct Driver {
    client: Client,
    submitted: mpsc::Receiver<Entry>,
    deadline: Duration,
    queue: Queue,
    /// When the last answer came, or the queue last had nothing to wait for.
    progress: Instant,
}

impl Driver {
    /// Runs until every write is answered and no more come. `Err` is the reason for giving up.
    async fn serve(&mut self) -> Result<(), String> {
        let config = self.client.config();
        let mut backoff = Backoff::new(config.backoff_min, config.backoff_max);
        loop {
            // An idle stream holds no connection open.
            if self.queue.is_empty() {
                let Some(entry) = self.submitted.recv().await else { return Ok(()) };
                self.queue.push(entry);
                self.progress = Instant::now();
            }
            let before = self.progress;
            let reason = match self.connection().await {
                End::Finished => return Ok(()),
                End::Lost(reason) => reason,
                End::Fatal(reason) => return Err(reason),
            };
            self.queue.on_disconnected();
            if self.progress != before {
                backoff.reset();
            }
            let again = Instant::now() + backoff.next();
            if !self.queue.is_empty() && again > self.progress + self.deadline {
                return Err(format!("no answer for {:.1?}, last: {reason}", self.deadline));
            }
            tracing::debug!(reason, "write stream lost its connection");
            sleep_until(again).await;
        }
    }

    /// One connection, from opening to its end.
    async fn connection(&mut self) -> End {
        let (outbound, messages) = mpsc::channel(OUTBOUND_MESSAGES);
        // Fed before it is opened: a server may answer the opening with its first result only.
        self.feed(&outbound);
        let mut blocks = self.client.blocks();
        let open_by = Instant::now() + self.client.config().request_timeout.min(self.deadline);
        let opening = blocks.write_blocks(ReceiverStream::new(messages));
        let mut answers = match timeout_at(open_by, opening).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return end_of(&status),
            Err(_) => return End::Lost("the server did not open the stream in time".to_owned()),
        };
        self.exchange(outbound, &mut answers).await
    }

    async fn exchange(
        &mut self,
        outbound: mpsc::Sender<WriteBlocksRequest>,
        answers: &mut Streaming<WriteBlocksResponse>,
    ) -> End {
        let mut open = true;
        loop {
            self.take_submitted();
            self.feed(&outbound);
            if self.queue.is_empty() && !open {
                return End::Finished;
            }
            let give_up = self.progress + self.deadline;
            // Every arm is safe to cancel: it yields a value or has done nothing.
            tokio::select! {
                biased;
                answer = answers.message() => match answer {
                    Ok(Some(response)) => {
                        self.progress = Instant::now();
                        for result in response.results {
                            if let Err(reason) = self.queue.on_result(result) {
                                return End::Fatal(format!("the server broke the protocol: {reason}"));
                            }
                        }
                    }
                    Ok(None) => return End::Lost("the server ended the stream".to_owned()),
                    Err(status) => return end_of(&status),
                },
                permit = outbound.reserve(), if self.queue.next_message().is_some() => match (permit, self.queue.next_message()) {
                    (Ok(permit), Some(message)) => {
                        permit.send(message);
                        self.queue.on_sent();
                    }
                    // The transport has dropped its end; the answers tell why.
                    _ => return self.last_words(answers).await,
                },
                entry = self.submitted.recv(), if open && self.queue.next_message().is_none() => match entry {
                    Some(entry) => {
                        if self.queue.is_empty() {
                            self.progress = Instant::now();
                        }
                        self.queue.push(entry);
                    }
                    None => open = false,
                },
                () = sleep_until(give_up), if !self.queue.is_empty() => {
                    return End::Lost("the server does not answer".to_owned());
                }
            }
        }
    }

    /// Takes what was submitted without waiting.
    fn take_submitted(&mut self) {
        while let Ok(entry) = self.submitted.try_recv() {
            if self.queue.is_empty() {
                self.progress = Instant::now();
            }
            self.queue.push(entry);
        }
    }

    /// Hands to the transport what it takes without waiting.
    fn feed(&mut self, outbound: &mpsc::Sender<WriteBlocksRequest>) {
        while let Some(message) = self.queue.next_message() {
            match outbound.try_send(message) {
                Ok(()) => self.queue.on_sent(),
                Err(TrySendError::Full(_) | TrySendError::Closed(_)) => return,
            }
        }
    }

    async fn last_words(&mut self, answers: &mut Streaming<WriteBlocksResponse>) -> End {
        let by = Instant::now() + self.client.config().connect_timeout;
        loop {
            match timeout_at(by, answers.message()).await {
                Ok(Ok(Some(response))) => {
                    for result in response.results {
                        if let Err(reason) = self.queue.on_result(result) {
                            return End::Fatal(format!("the server broke the protocol: {reason}"));
                        }
                    }
                    self.progress = Instant::now();
                }
                Ok(Err(status)) => return end_of(&status),
                Ok(Ok(None)) | Err(_) => return End::Lost("the connection was closed".to_owned()),
            }
        }
    }
}

/// A server that is away, overloaded or draining may serve the next connection; one that refuses the stream will not.
fn end_of(status: &Status) -> End {
    let passing =
        matches!(status.code(), Code::Cancelled | Code::Aborted | Code::ResourceExhausted | Code::DeadlineExceeded);
    if is_loss(status) || passing { End::Lost(describe(status)) } else { End::Fatal(describe(status)) }
}
