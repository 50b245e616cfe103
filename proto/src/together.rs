//! Takes from a stream what has come by now, so that it is handled in one step.

use std::{future::poll_fn, pin::Pin, task::Poll};

use tonic::{Status, Streaming, codegen::tokio_stream::Stream as _};

/// Messages taken in one step, at most.
const MESSAGES_MAX: usize = 64;
/// Payload after which no further message is taken: other tasks of the thread have their turn.
const BYTES_MAX: usize = 256 << 10;

/// Waits for a message; returns it with those that have come behind it. `None` at the end. `weigh` is the payload of a
/// message. Cancel-safe.
pub async fn next_together<T>(
    stream: &mut Streaming<T>,
    weigh: impl Fn(&T) -> usize,
) -> Option<Vec<Result<T, Status>>> {
    poll_fn(|context| {
        let (mut messages, mut bytes) = (Vec::new(), 0);
        while messages.len() < MESSAGES_MAX && bytes < BYTES_MAX {
            match Pin::new(&mut *stream).poll_next(context) {
                Poll::Ready(Some(message)) => {
                    bytes += message.as_ref().map_or(0, &weigh);
                    messages.push(message);
                }
                Poll::Ready(None) if messages.is_empty() => return Poll::Ready(None),
                Poll::Pending if messages.is_empty() => return Poll::Pending,
                // The end is found again by the next call.
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(messages))
    })
    .await
}
