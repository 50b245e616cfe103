//! `BlockService`: reads and writes.

use std::pin::Pin;

use tokio::time::Instant;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};
use understudy_proto::{
    convert::client_from_wire,
    v1::{self, block_service_server::BlockService, read_blocks_response::Content},
};

use super::{Shared, key, length, stream, within};
use crate::api::{BlockEngine, EngineError, PieceContent, VolumeKey, WriteAck, WriteKind, WriteRequest};

/// Payload of one answer of a long read where the client leaves it to us.
const CHUNK_BYTES: u64 = 1 << 20;

pub(super) struct BlockFrontend<E>(pub Shared<E>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl<E: BlockEngine> BlockService for BlockFrontend<E> {
    type WriteBlocksStream = Answers<v1::WriteBlocksResponse>;
    type ReadBlocksStream = Answers<v1::ReadBlocksResponse>;

    async fn write_block(
        &self,
        request: Request<v1::WriteBlockRequest>,
    ) -> Result<Response<v1::WriteBlockResponse>, Status> {
        let request = write_request(request.into_inner(), self.0.message_bytes)?;
        Ok(Response::new(self.write(request).await?))
    }

    async fn write_blocks(
        &self,
        request: Request<Streaming<v1::WriteBlocksRequest>>,
    ) -> Result<Response<Self::WriteBlocksStream>, Status> {
        Ok(Response::new(Box::pin(stream::write_blocks(self.0.clone(), request.into_inner()))))
    }

    async fn read_block(
        &self,
        request: Request<v1::ReadBlockRequest>,
    ) -> Result<Response<v1::ReadBlockResponse>, Status> {
        let v1::ReadBlockRequest { volume_id, volume, offset_bytes, length_bytes } = request.into_inner();
        let volume = key(volume_id, volume)?;
        not_empty("length_bytes", length_bytes)?;
        within(length_bytes, self.0.message_bytes)?;
        let (data, crc32c) = self.0.engine.read(&volume, offset_bytes, length_bytes).await?;
        Ok(Response::new(v1::ReadBlockResponse { data, crc32c }))
    }

    async fn read_blocks(
        &self,
        request: Request<v1::ReadBlocksRequest>,
    ) -> Result<Response<Self::ReadBlocksStream>, Status> {
        let v1::ReadBlocksRequest { volume_id, volume, offset_bytes, length_bytes, chunk_bytes, snapshot } =
            request.into_inner();
        let volume = key(volume_id, volume)?;
        within(chunk_bytes.into(), self.0.message_bytes)?;
        let snapshot = (!snapshot.is_empty()).then_some(snapshot);
        let spec = match &snapshot {
            Some(snapshot) => self.0.engine.snapshot_spec(&volume, snapshot)?,
            None => self.0.engine.volume(&volume)?,
        };
        let rest = spec.size_bytes.checked_sub(offset_bytes);
        let length_bytes = match (rest, length_bytes) {
            (Some(rest), 0) => rest,
            (Some(rest), length) if length <= rest => length,
            _ => {
                let size_bytes = spec.size_bytes;
                return Err(
                    EngineError::OutOfRange { volume: spec.name, offset_bytes, length_bytes, size_bytes }.into()
                );
            }
        };
        let chunk_bytes = match chunk_bytes {
            0 => CHUNK_BYTES.min(u64::try_from(self.0.message_bytes).unwrap_or(CHUNK_BYTES)),
            chunk => chunk.into(),
        };
        // The name could be another volume's in the middle of the read; the number never is.
        let volume = VolumeKey::Id(spec.id);
        let read = Read { volume, snapshot, next: offset_bytes, end: offset_bytes + length_bytes, chunk_bytes };
        Ok(Response::new(Box::pin(read_pieces(self.0.clone(), read))))
    }

    async fn flush(&self, request: Request<v1::FlushRequest>) -> Result<Response<v1::FlushResponse>, Status> {
        let v1::FlushRequest { volume_id, volume } = request.into_inner();
        let ack = self.0.engine.flush(&key(volume_id, volume)?).await?;
        Ok(Response::new(v1::FlushResponse {
            position: Some(ack.position.into()),
            durability: durability(&ack).into(),
        }))
    }

    async fn discard(&self, request: Request<v1::DiscardRequest>) -> Result<Response<v1::WriteBlockResponse>, Status> {
        let v1::DiscardRequest { volume_id, volume, offset_bytes, length_bytes, client_id, sequence } =
            request.into_inner();
        not_empty("length_bytes", length_bytes)?;
        let request = WriteRequest {
            volume: key(volume_id, volume)?,
            offset_bytes,
            kind: WriteKind::Discard { length_bytes },
            crc32c: None,
            client: client_from_wire(client_id, sequence).map_err(EngineError::from)?,
        };
        Ok(Response::new(self.write(request).await?))
    }

    async fn write_zeroes(
        &self,
        request: Request<v1::WriteZeroesRequest>,
    ) -> Result<Response<v1::WriteBlockResponse>, Status> {
        let v1::WriteZeroesRequest { volume_id, volume, offset_bytes, length_bytes, client_id, sequence } =
            request.into_inner();
        not_empty("length_bytes", length_bytes)?;
        let request = WriteRequest {
            volume: key(volume_id, volume)?,
            offset_bytes,
            kind: WriteKind::Zeroes { length_bytes },
            crc32c: None,
            client: client_from_wire(client_id, sequence).map_err(EngineError::from)?,
        };
        Ok(Response::new(self.write(request).await?))
    }
}

impl<E: BlockEngine> BlockFrontend<E> {
    async fn write(&self, request: WriteRequest) -> Result<v1::WriteBlockResponse, EngineError> {
        let started = Instant::now();
        let (payload, counted) = (request.payload_bytes(), range_bytes(&request));
        let permit = self.0.engine.admit(payload).await?;
        let ticket = self.0.engine.submit(permit, request).await?;
        let ack = self.0.engine.wait(ticket).await?;
        self.0.acknowledged(&ack, counted, started);
        Ok(write_response(&ack))
    }
}

impl<E> Shared<E> {
    /// Counts a write.
    pub(super) fn acknowledged(&self, ack: &WriteAck, bytes: u64, started: Instant) {
        self.metrics.writes.inc();
        self.metrics.write_bytes.inc_by(bytes);
        self.ack_seconds[usize::from(ack.delta)].observe(started.elapsed().as_secs_f64());
    }
}

/// Bytes of the volume that a request changes.
pub(super) fn range_bytes(request: &WriteRequest) -> u64 {
    match &request.kind {
        WriteKind::Data(data) => length(data),
        WriteKind::Zeroes { length_bytes } | WriteKind::Discard { length_bytes } => *length_bytes,
    }
}

pub(super) fn write_request(request: v1::WriteBlockRequest, message_bytes: usize) -> Result<WriteRequest, EngineError> {
    let v1::WriteBlockRequest { volume_id, volume, offset_bytes, data, crc32c, client_id, sequence } = request;
    not_empty("data", length(&data))?;
    within(length(&data), message_bytes)?;
    Ok(WriteRequest {
        volume: key(volume_id, volume)?,
        offset_bytes,
        kind: WriteKind::Data(data),
        crc32c,
        client: client_from_wire(client_id, sequence)?,
    })
}

pub(super) fn write_response(ack: &WriteAck) -> v1::WriteBlockResponse {
    v1::WriteBlockResponse {
        position: Some(ack.position.into()),
        mode: if ack.delta { v1::Mode::Delta } else { v1::Mode::Continuous }.into(),
        durability: durability(ack).into(),
        duplicate: ack.duplicate,
    }
}

fn durability(ack: &WriteAck) -> v1::Durability {
    if ack.both { v1::Durability::Both } else { v1::Durability::Local }
}

fn not_empty(field: &'static str, length: u64) -> Result<(), EngineError> {
    if length > 0 {
        return Ok(());
    }
    Err(EngineError::Invalid { field, why: "is empty; name at least one byte".into() })
}

struct Read {
    volume: VolumeKey,
    /// The head, if it is `None`.
    snapshot: Option<String>,
    next: u64,
    end: u64,
    chunk_bytes: u64,
}

/// The pieces of a range in ascending order, up to the first error.
fn read_pieces<E: BlockEngine>(
    shared: Shared<E>,
    read: Read,
) -> impl Stream<Item = Result<v1::ReadBlocksResponse, Status>> + Send {
    futures_util::stream::try_unfold((shared, read), |(shared, mut read)| async move {
        if read.next >= read.end {
            return Ok(None);
        }
        if shared.shutdown.is_cancelled() {
            return Err(EngineError::Draining.into());
        }
        let rest = read.end - read.next;
        let bytes = rest.min(read.chunk_bytes);
        let piece = match &read.snapshot {
            Some(snapshot) => shared.engine.read_snapshot(&read.volume, snapshot, read.next, bytes).await?,
            None => shared.engine.read_piece(&read.volume, read.next, bytes).await?,
        };
        let (content, bytes) = match piece.content {
            PieceContent::Data(data) => {
                let bytes = length(&data);
                (Content::Data(data), bytes)
            }
            PieceContent::Zeros(bytes) => (Content::ZeroBytes(bytes.min(rest)), bytes.min(rest)),
        };
        assert!(bytes > 0 && bytes <= rest, "a piece of {bytes} bytes for a rest of {rest}");
        let answer = v1::ReadBlocksResponse {
            offset_bytes: read.next,
            content: Some(content),
            crc32c: piece.crc32c,
            position: Some(piece.position.into()),
        };
        read.next += bytes;
        Ok(Some((answer, (shared, read))))
    })
}
