//! Long reads, of an image or of a clone, as streams of pieces.

use tokio_stream::Stream;
use tonic::Status;
use understudy_common::types::Position;

use super::Shared;
use crate::api::{NodeError, PieceContent, ReplicaNode};

/// Payload of one answer where the reader leaves it to us.
const CHUNK_BYTES: u64 = 1 << 20;

/// What is read, and how it is told.
pub(super) trait Source<N>: Send + Sync + 'static {
    /// A message of the stream.
    type Answer;
    /// At most `max` bytes from `at` on; zeros may be more. And the position that they are of.
    fn read(
        &self,
        node: &N,
        at: u64,
        max: u64,
    ) -> impl Future<Output = Result<(PieceContent, Position), NodeError>> + Send;
    /// A piece as a message.
    fn answer(&self, offset_bytes: u64, piece: PieceContent, position: Position) -> Self::Answer;
}

/// What of it is to be read, in bytes.
pub(super) struct Pieces {
    next: u64,
    end: u64,
    chunk_bytes: u64,
}

impl Pieces {
    /// A range as it was asked for, of a volume of `size_bytes`. A length of 0 is the rest, a chunk of 0 is ours to choose.
    pub fn of<N>(
        volume: &str,
        size_bytes: u64,
        offset_bytes: u64,
        length_bytes: u64,
        chunk_bytes: u32,
        shared: &Shared<N>,
    ) -> Result<Self, NodeError> {
        let length_bytes = match (size_bytes.checked_sub(offset_bytes), length_bytes) {
            (Some(rest), 0) => rest,
            (Some(rest), length) if length <= rest => length,
            _ => {
                let volume = volume.to_owned();
                return Err(NodeError::OutOfRange { volume, offset_bytes, length_bytes, size_bytes });
            }
        };
        let limit = u64::try_from(shared.message_bytes).unwrap_or(CHUNK_BYTES);
        let chunk_bytes = if chunk_bytes == 0 { CHUNK_BYTES.min(limit) } else { chunk_bytes.into() };
        Ok(Self { next: offset_bytes, end: offset_bytes + length_bytes, chunk_bytes })
    }
}

/// The pieces of a range in ascending order, up to the first error.
pub(super) fn pieces<N: ReplicaNode, S: Source<N>>(
    shared: Shared<N>,
    source: S,
    range: Pieces,
) -> impl Stream<Item = Result<S::Answer, Status>> + Send {
    futures_util::stream::try_unfold((shared, source, range), |(shared, source, mut range)| async move {
        if range.next >= range.end {
            return Ok(None);
        }
        if shared.shutdown.is_cancelled() {
            return Err(NodeError::Draining.into());
        }
        let rest = range.end - range.next;
        let (piece, position) = source.read(&shared.node, range.next, rest.min(range.chunk_bytes)).await?;
        let (piece, bytes) = match piece {
            PieceContent::Data { data, crc32c } => {
                let bytes = u64::try_from(data.len()).unwrap_or(u64::MAX);
                (PieceContent::Data { data, crc32c }, bytes)
            }
            PieceContent::Zeros(bytes) => (PieceContent::Zeros(bytes.min(rest)), bytes.min(rest)),
        };
        assert!(bytes > 0 && bytes <= rest, "a piece of {bytes} bytes for a rest of {rest}");
        let answer = source.answer(range.next, piece, position);
        range.next += bytes;
        Ok(Some((answer, (shared, source, range))))
    })
}
