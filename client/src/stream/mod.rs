//! Many writes in flight, in order, at most once, across broken connections.
//!
//! [`WriteStream::write`] takes permits (one of count, some of bytes), gives the write its sequence and hands it to the
//! driver; the driver (`driver.rs`) owns the connection; which write is sent when, and what an answer completes, is
//! decided by a plain queue (`queue.rs`). Permits go back with the answer, so everything is bounded by them.

mod driver;
mod queue;

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use understudy_proto::v1::WriteBlockRequest;

use crate::client::Client;
use crate::error::ClientError;
use crate::sequence::WINDOW;
use crate::volume::Written;
use queue::Entry;

/// Bounds of a [`WriteStream`].
#[derive(Debug, Clone)]
pub struct WriteStreamConfig {
    /// Most writes without an answer: 1 to 1024, as far back as the server remembers sequences. Default 256.
    pub in_flight_max: usize,
    /// Most bytes without an answer; also the largest single write. Default 32 MiB.
    pub in_flight_bytes_max: usize,
    /// How long writes may wait without any answer, connected or not, before the stream gives up. Default 60 s.
    pub deadline: Duration,
}

impl Default for WriteStreamConfig {
    fn default() -> Self {
        Self { in_flight_max: 256, in_flight_bytes_max: 32 << 20, deadline: Duration::from_secs(60) }
    }
}

/// An ordered stream of writes to one volume.
///
/// Writes take effect in the order in which [`Self::write`] accepted them, each at most once. When the connection
/// breaks, those without an answer are sent again, in order, with the same sequences. A write that the server refuses
/// is answered with [`ClientError::Refused`] and not repeated by itself: later writes may already have taken effect.
/// (If the connection breaks before that answer arrives, the refused write is sent again like the others.)
///
/// Dropping the stream lets the driver finish what was accepted, as long as the runtime lives; [`Self::finish`] waits
/// for it and reports.
#[derive(Debug)]
pub struct WriteStream {
    volume_id: u64,
    client_id: String,
    payload_bytes_max: usize,
    bytes_max: usize,
    count: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    /// The last sequence, and the way to the driver: assigned and queued in one step, so that the order is one.
    submit: Mutex<(u64, mpsc::Sender<Entry>)>,
    failure: Arc<OnceLock<ClientError>>,
    driver: JoinHandle<()>,
}

impl WriteStream {
    pub(crate) fn start(client: Client, volume_id: u64, config: WriteStreamConfig) -> Self {
        let window = usize::try_from(WINDOW).unwrap_or(usize::MAX);
        let in_flight_max = config.in_flight_max.clamp(1, window);
        let bytes_max = config.in_flight_bytes_max.clamp(1, u32::MAX as usize);
        // As long as the permits: a write that holds one always finds room.
        let (sender, receiver) = mpsc::channel(in_flight_max);
        let (count, bytes) = (Arc::new(Semaphore::new(in_flight_max)), Arc::new(Semaphore::new(bytes_max)));
        let failure = Arc::new(OnceLock::new());
        let client_id = client.stream_id();
        let payload_bytes_max = client.config().payload_bytes_max();
        let closing = driver::Closing { count: count.clone(), bytes: bytes.clone(), failure: failure.clone() };
        let driver = tokio::spawn(driver::run(client, receiver, config.deadline, closing));
        let submit = Mutex::new((0, sender));
        Self { volume_id, client_id, payload_bytes_max, bytes_max, count, bytes, submit, failure, driver }
    }

    /// Accepts a write once the bounds allow it. The answer comes with the returned handle; answers come in order.
    ///
    /// # Errors
    /// [`ClientError::TooLarge`], or what ended the stream.
    pub async fn write(&self, offset_bytes: u64, data: Bytes) -> Result<PendingWrite, ClientError> {
        for (limit, setting) in [(self.payload_bytes_max, "message_bytes_max"), (self.bytes_max, "in_flight_bytes_max")]
        {
            if data.len() > limit {
                let (length_bytes, limit_bytes) = (data.len() as u64, limit as u64);
                return Err(ClientError::TooLarge { length_bytes, limit_bytes, setting });
            }
        }
        // Below `bytes_max`, which fits.
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let closed = |_| self.ended();
        let count = self.count.clone().acquire_owned().await.map_err(closed)?;
        let bytes = self.bytes.clone().acquire_many_owned(length).await.map_err(closed)?;
        let crc32c = Some(crate::crc32c(&data));
        let (answer, receiver) = oneshot::channel();

        let mut submit = self.submit.lock().unwrap_or_else(PoisonError::into_inner);
        let sequence = submit.0 + 1;
        let request = WriteBlockRequest {
            volume_id: self.volume_id,
            volume: String::new(),
            offset_bytes,
            data,
            crc32c,
            client_id: self.client_id.clone(),
            sequence,
        };
        let entry = Entry { request, answer, _permits: (count, bytes) };
        submit.1.try_send(entry).map_err(|_| self.ended())?;
        submit.0 = sequence;
        Ok(PendingWrite { sequence, offset_bytes, length_bytes: u64::from(length), receiver })
    }

    /// Waits until every accepted write has its answer.
    ///
    /// # Errors
    /// [`ClientError::GaveUp`] if the stream ended before. Single refusals are told by their own handles only.
    pub async fn finish(self) -> Result<(), ClientError> {
        let Self { submit, failure, driver, .. } = self;
        drop(submit);
        if let Err(error) = driver.await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
        failure.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    fn ended(&self) -> ClientError {
        self.failure.get().cloned().unwrap_or_else(|| ClientError::GaveUp {
            first: 0,
            unknown: 0,
            not_sent: 0,
            reason: "the runtime of the stream ended".to_owned(),
        })
    }
}

/// An accepted write: a future of its answer. Dropping it does not take the write back.
#[derive(Debug)]
#[must_use = "a write is not durable before its answer"]
pub struct PendingWrite {
    sequence: u64,
    offset_bytes: u64,
    length_bytes: u64,
    receiver: oneshot::Receiver<Result<Written, ClientError>>,
}

impl PendingWrite {
    /// Its number in the stream, from 1.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Where it writes.
    #[must_use]
    pub fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    /// How much it writes.
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }
}

impl Future for PendingWrite {
    type Output = Result<Written, ClientError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.receiver).poll(cx).map(|answer| {
            answer.unwrap_or_else(|_| {
                Err(ClientError::OutcomeUnknown {
                    sequence: self.sequence,
                    offset_bytes: self.offset_bytes,
                    length_bytes: self.length_bytes,
                    reason: "the runtime of the stream ended".to_owned(),
                })
            })
        })
    }
}
