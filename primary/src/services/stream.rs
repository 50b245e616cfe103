//! `WriteBlocks`: many writes in flight on one stream.
//!
//! One task reads messages and submits them in their order; the tickets go through a queue to the answering side, which
//! sends results in the same order and puts everything that has settled into one message. What waits in the queue holds
//! its permit of bytes inside the engine, so its memory is bounded by `limits.in_flight`, its length by [`QUEUE`]. A
//! refused write is a result like others. At shutdown reading stops, what was submitted is answered, and the stream ends
//! with UNAVAILABLE.

use std::collections::VecDeque;

use tokio::{sync::mpsc, time::Instant};
use tokio_stream::Stream;
use tonic::{Status, Streaming};
use understudy_proto::{
    together::next_together,
    v1::{self, write_result::Outcome},
};

use super::{
    Shared,
    block::{range_bytes, write_request, write_response},
};
use crate::api::{BlockEngine, EngineError, WriteAck, WriteRequest};

/// Writes of one stream that wait for their answer.
const QUEUE: usize = 4096;
/// Results in one message.
const BATCH: usize = 256;

/// A write on its way to its result.
struct Pending<T> {
    tag: u64,
    bytes: u64,
    started: Instant,
    /// The ticket, or why there is none.
    ticket: Result<T, EngineError>,
}

enum Entry<T> {
    Write(Pending<T>),
    /// The stream ends here with this status.
    End(Status),
}

/// The results of the writes of `requests`.
pub(super) fn write_blocks<E: BlockEngine>(
    shared: Shared<E>,
    requests: Streaming<v1::WriteBlocksRequest>,
) -> impl Stream<Item = Result<v1::WriteBlocksResponse, Status>> + Send {
    let (queue, entries) = mpsc::channel(QUEUE);
    tokio::spawn(submit_all(shared.clone(), requests, queue));
    let answers = Answers { shared, entries, settled: VecDeque::new(), waiting: None, end: None };
    futures_util::stream::unfold(answers, |mut answers| async move {
        let answer = answers.next().await?;
        Some((answer, answers))
    })
}

/// Reads and submits in order until the client, the answering side or the service ends. What has come together is
/// submitted together.
async fn submit_all<E: BlockEngine>(
    shared: Shared<E>,
    mut requests: Streaming<v1::WriteBlocksRequest>,
    queue: mpsc::Sender<Entry<E::Ticket>>,
) {
    let weigh = |message: &v1::WriteBlocksRequest| message.write.as_ref().map_or(0, |write| write.data.len());
    let mut parts = VecDeque::new();
    let mut writes = VecDeque::new();
    loop {
        let messages = tokio::select! {
            biased;
            () = shared.shutdown.cancelled() => vec![Err(EngineError::Draining.into())],
            // Nobody would hear of the results.
            () = queue.closed() => return,
            messages = next_together(&mut requests, weigh) => match messages {
                Some(messages) => messages,
                None => return,
            },
        };
        let started = Instant::now();
        for message in messages {
            let part = match message {
                Err(status) => Part::End(status),
                Ok(v1::WriteBlocksRequest { tag, write }) => {
                    let request = write
                        .ok_or_else(|| EngineError::Invalid { field: "write", why: "is missing".into() })
                        .and_then(|write| write_request(write, shared.message_bytes));
                    match request {
                        Ok(request) => {
                            let bytes = range_bytes(&request);
                            writes.push_back(request);
                            Part::Write { tag, bytes }
                        }
                        Err(error) => Part::Refused { tag, error },
                    }
                }
            };
            parts.push_back(part);
        }
        while !parts.is_empty() {
            let tickets = shared.engine.submit_now(&mut writes);
            let mut tickets: VecDeque<Result<E::Ticket, EngineError>> = tickets.into_iter().map(Ok).collect();
            if tickets.is_empty()
                && let Some(write) = writes.pop_front()
            {
                tickets.push_back(submit(&shared.engine, write).await);
            }
            // Up to the first write that has not been submitted.
            while let Some(part) = parts.pop_front() {
                let entry = match part {
                    Part::Write { tag, bytes } => match tickets.pop_front() {
                        Some(ticket) => Entry::Write(Pending { tag, bytes, started, ticket }),
                        None => {
                            parts.push_front(Part::Write { tag, bytes });
                            break;
                        }
                    },
                    Part::Refused { tag, error } => {
                        Entry::Write(Pending { tag, bytes: 0, started, ticket: Err(error) })
                    }
                    Part::End(status) => Entry::End(status),
                };
                let last = matches!(entry, Entry::End(_));
                if queue.send(entry).await.is_err() || last {
                    return;
                }
            }
        }
    }
}

/// A message, with its write put aside.
enum Part {
    Write { tag: u64, bytes: u64 },
    Refused { tag: u64, error: EngineError },
    End(Status),
}

async fn submit<E: BlockEngine>(engine: &E, request: WriteRequest) -> Result<E::Ticket, EngineError> {
    let permit = engine.admit(request.payload_bytes()).await?;
    engine.submit(permit, request).await
}

/// The answering side of a stream.
struct Answers<E: BlockEngine> {
    shared: Shared<E>,
    entries: mpsc::Receiver<Entry<E::Ticket>>,
    settled: VecDeque<v1::WriteResult>,
    /// The oldest write without an answer.
    waiting: Option<Pending<E::Ticket>>,
    /// What the stream ends with after the settled results.
    end: Option<Status>,
}

impl<E: BlockEngine> Answers<E> {
    /// Everything that has settled, at least one result; `None` after the last.
    async fn next(&mut self) -> Option<Result<v1::WriteBlocksResponse, Status>> {
        if self.waiting.is_none() && self.end.is_none() {
            match self.entries.recv().await? {
                Entry::Write(pending) => self.waiting = Some(pending),
                Entry::End(status) => self.end = Some(status),
            }
        }
        if let Some(Pending { tag, bytes, started, ticket }) = self.waiting.take() {
            let outcome = match ticket {
                Ok(ticket) => self.shared.engine.wait(ticket).await,
                Err(error) => Err(error),
            };
            self.settle(tag, bytes, started, outcome);
        }
        self.drain();
        if self.settled.is_empty() {
            return self.end.take().map(Err);
        }
        Some(Ok(v1::WriteBlocksResponse { results: self.settled.drain(..).collect() }))
    }

    /// Takes what has settled without waiting, up to a full batch or the first that has not.
    fn drain(&mut self) {
        while self.settled.len() < BATCH && self.end.is_none() {
            let pending = match self.entries.try_recv() {
                Ok(Entry::Write(pending)) => pending,
                Ok(Entry::End(status)) => {
                    self.end = Some(status);
                    return;
                }
                Err(_) => return,
            };
            let outcome = match &pending.ticket {
                Ok(ticket) => self.shared.engine.poll_settled(ticket),
                Err(error) => Some(Err(error.clone())),
            };
            match outcome {
                Some(outcome) => self.settle(pending.tag, pending.bytes, pending.started, outcome),
                None => {
                    self.waiting = Some(pending);
                    return;
                }
            }
        }
    }

    fn settle(&mut self, tag: u64, bytes: u64, started: Instant, outcome: Result<WriteAck, EngineError>) {
        let outcome = match outcome {
            Ok(ack) => {
                self.shared.acknowledged(&ack, bytes, started);
                Outcome::Written(write_response(&ack))
            }
            Err(error) => Outcome::Error(v1::WriteError { code: error.code().into(), message: error.to_string() }),
        };
        self.settled.push_back(v1::WriteResult { tag, outcome: Some(outcome) });
    }
}
