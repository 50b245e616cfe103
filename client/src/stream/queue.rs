//! Writes without an answer, in order: which is sent next, and what an answer completes. No I/O, no clock.

use std::collections::VecDeque;

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tonic::Code;
use understudy_proto::v1::{WriteBlockRequest, WriteBlocksRequest, WriteResult, write_result};

use crate::error::ClientError;
use crate::volume::Written;

/// A write and the way back of its answer. The permits go back when it is dropped.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) request: WriteBlockRequest,
    pub(super) answer: oneshot::Sender<Result<Written, ClientError>>,
    pub(super) _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

/// Entries `..sent` are on the present connection; entries `..ever_sent` were on some connection.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: VecDeque<Entry>,
    sent: usize,
    ever_sent: usize,
}

impl Queue {
    pub(super) fn push(&mut self, entry: Entry) {
        self.entries.push_back(entry);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The next message of this connection. Its tag is the write's sequence.
    pub(super) fn next_message(&self) -> Option<WriteBlocksRequest> {
        let request = &self.entries.get(self.sent)?.request;
        Some(WriteBlocksRequest { tag: request.sequence, write: Some(request.clone()) })
    }

    pub(super) fn on_sent(&mut self) {
        self.sent += 1;
        self.ever_sent = self.ever_sent.max(self.sent);
    }

    /// The connection is gone: everything without an answer goes again, from the oldest on.
    pub(super) fn on_disconnected(&mut self) {
        self.sent = 0;
    }

    /// Completes the oldest write. `Err` says how the answer breaks the protocol: answers come in the order sent.
    pub(super) fn on_result(&mut self, result: WriteResult) -> Result<(), String> {
        let oldest = self.entries.front().filter(|_| self.sent > 0).map(|entry| entry.request.sequence);
        if oldest != Some(result.tag) {
            return Err(format!("a result for write {} where {oldest:?} was next", result.tag));
        }
        let Some(outcome) = result.outcome else {
            return Err(format!("a result without an outcome for write {}", result.tag));
        };
        let Some(entry) = self.entries.pop_front() else { return Ok(()) };
        self.sent -= 1;
        self.ever_sent -= 1;
        let answer = match outcome {
            write_result::Outcome::Written(written) => Ok(written.into()),
            write_result::Outcome::Error(error) => Err(ClientError::Refused {
                sequence: entry.request.sequence,
                offset_bytes: entry.request.offset_bytes,
                length_bytes: entry.request.data.len() as u64,
                code: Code::from_i32(error.code),
                message: error.message,
            }),
        };
        // Nobody may be waiting for it any more.
        let _ = entry.answer.send(answer);
        Ok(())
    }

    /// Ends every write and says what is known of them.
    pub(super) fn fail(&mut self, reason: &str) -> ClientError {
        let ever_sent = std::mem::take(&mut self.ever_sent);
        self.sent = 0;
        let first = self.entries.front().map_or(0, |entry| entry.request.sequence);
        let not_sent = (self.entries.len() - ever_sent) as u64;
        for (index, Entry { request, answer, .. }) in self.entries.drain(..).enumerate() {
            let (sequence, offset_bytes) = (request.sequence, request.offset_bytes);
            let (length_bytes, reason) = (request.data.len() as u64, reason.to_owned());
            let _ = answer.send(Err(if index < ever_sent {
                ClientError::OutcomeUnknown { sequence, offset_bytes, length_bytes, reason }
            } else {
                ClientError::NotSent { sequence, offset_bytes, length_bytes, reason }
            }));
        }
        ClientError::GaveUp { first, unknown: ever_sent as u64, not_sent, reason: reason.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::sync::Semaphore;
    use understudy_proto::v1::WriteBlockResponse;

    type Answer = oneshot::Receiver<Result<Written, ClientError>>;

    fn filled(count: u64) -> (Queue, Vec<Answer>, Arc<Semaphore>) {
        let permits = Arc::new(Semaphore::new(16));
        let mut queue = Queue::default();
        let mut answers = Vec::new();
        for sequence in 1..=count {
            let permit = || permits.clone().try_acquire_owned().unwrap();
            let (answer, receiver) = oneshot::channel();
            let request = WriteBlockRequest { sequence, ..Default::default() };
            queue.push(Entry { request, answer, _permits: (permit(), permit()) });
            answers.push(receiver);
        }
        (queue, answers, permits)
    }

    fn send(queue: &mut Queue) -> Option<u64> {
        let tag = queue.next_message()?.tag;
        queue.on_sent();
        Some(tag)
    }

    fn written(tag: u64) -> WriteResult {
        WriteResult { tag, outcome: Some(write_result::Outcome::Written(WriteBlockResponse::default())) }
    }

    #[test]
    fn after_a_loss_unanswered_writes_go_again_in_order() {
        let (mut queue, mut answers, permits) = filled(4);
        assert_eq!([send(&mut queue), send(&mut queue), send(&mut queue)], [Some(1), Some(2), Some(3)]);
        queue.on_result(written(1)).unwrap();
        assert!(answers[0].try_recv().unwrap().is_ok());
        assert_eq!(permits.available_permits(), 10, "the permits of the answered write came back");
        queue.on_disconnected();
        assert_eq!([send(&mut queue), send(&mut queue), send(&mut queue)], [Some(2), Some(3), Some(4)]);
        assert_eq!(send(&mut queue), None);
    }

    #[test]
    fn an_answer_out_of_order_breaks_the_protocol() {
        let (mut queue, _answers, _) = filled(2);
        assert!(queue.on_result(written(1)).is_err(), "nothing was sent yet");
        send(&mut queue);
        send(&mut queue);
        assert!(queue.on_result(written(2)).is_err());
        assert!(queue.on_result(WriteResult { tag: 1, outcome: None }).is_err());
        assert!(queue.on_result(written(1)).is_ok());
    }

    #[test]
    fn giving_up_tells_sent_from_unsent() {
        let (mut queue, mut answers, permits) = filled(3);
        send(&mut queue);
        send(&mut queue);
        queue.on_disconnected();
        let error = queue.fail("gone");
        assert!(matches!(error, ClientError::GaveUp { first: 1, unknown: 2, not_sent: 1, .. }), "{error}");
        assert!(matches!(answers[1].try_recv().unwrap(), Err(ClientError::OutcomeUnknown { sequence: 2, .. })));
        assert!(matches!(answers[2].try_recv().unwrap(), Err(ClientError::NotSent { sequence: 3, .. })));
        assert_eq!(permits.available_permits(), 16);
    }
}
