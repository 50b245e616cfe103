//! `BackupService`: how the copy is doing, and reads of the consistent image.

use std::pin::Pin;

use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use understudy_common::types::VolumeId;
use understudy_proto::v1::{self, backup_service_server::BackupService, read_image_response::Content};

use super::Shared;
use crate::api::{ImageInfo, NodeError, PieceContent, ReplicaNode, VolumeKey};

/// Payload of one answer where the reader leaves it to us.
const CHUNK_BYTES: u64 = 1 << 20;

pub(super) struct BackupFrontend<N>(pub Shared<N>);

#[tonic::async_trait]
impl<N: ReplicaNode> BackupService for BackupFrontend<N> {
    type WatchEventsStream = Pin<Box<dyn Stream<Item = Result<v1::Event, Status>> + Send>>;
    type ReadBlocksStream = Pin<Box<dyn Stream<Item = Result<v1::ReadImageResponse, Status>> + Send>>;

    async fn get_status(&self, _: Request<v1::GetStatusRequest>) -> Result<Response<v1::Status>, Status> {
        Ok(Response::new(self.0.node.status()))
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let events = self.0.node.subscribe(request.into_inner().after);
        let state = (Some(events), self.0.shutdown.clone());
        let answers = futures_util::stream::unfold(state, |(events, shutdown)| async move {
            let mut events = events?;
            match shutdown.run_until_cancelled(events.next()).await {
                Some(event) => Some((Ok(event?), (Some(events), shutdown))),
                None => Some((Err(NodeError::Draining.into()), (None, shutdown))),
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn read_blocks(
        &self,
        request: Request<v1::ReadImageRequest>,
    ) -> Result<Response<Self::ReadBlocksStream>, Status> {
        let v1::ReadImageRequest { volume_id, volume, offset_bytes, length_bytes, chunk_bytes } = request.into_inner();
        let limit_bytes = u64::try_from(self.0.message_bytes).unwrap_or(u64::MAX);
        let bytes = u64::from(chunk_bytes);
        if bytes > limit_bytes {
            return Err(NodeError::TooLarge { bytes, limit_bytes }.into());
        }
        let image = self.0.node.open_image(&key(volume_id, volume)?).await?;
        let info = self.0.node.image_info(&image);
        let length_bytes = match (info.size_bytes.checked_sub(offset_bytes), length_bytes) {
            (Some(rest), 0) => rest,
            (Some(rest), length) if length <= rest => length,
            _ => {
                let ImageInfo { volume, size_bytes, .. } = info;
                return Err(NodeError::OutOfRange { volume, offset_bytes, length_bytes, size_bytes }.into());
            }
        };
        let read = Read {
            image,
            info,
            next: offset_bytes,
            end: offset_bytes + length_bytes,
            chunk_bytes: if bytes == 0 { CHUNK_BYTES.min(limit_bytes) } else { bytes },
        };
        Ok(Response::new(Box::pin(read_pieces(self.0.clone(), read))))
    }
}

fn key(volume_id: u64, volume: String) -> Result<VolumeKey, NodeError> {
    match (volume_id, volume.is_empty()) {
        (0, true) => {
            Err(NodeError::Invalid { field: "volume", why: "names no volume; set volume_id or volume".into() })
        }
        (0, false) => Ok(VolumeKey::Name(volume)),
        (id, _) => Ok(VolumeKey::Id(VolumeId(id))),
    }
}

struct Read<I> {
    image: I,
    info: ImageInfo,
    next: u64,
    end: u64,
    chunk_bytes: u64,
}

/// The pieces of a range in ascending order, all of one position, up to the first error.
fn read_pieces<N: ReplicaNode>(
    shared: Shared<N>,
    read: Read<N::Image>,
) -> impl Stream<Item = Result<v1::ReadImageResponse, Status>> + Send {
    futures_util::stream::try_unfold((shared, read), |(shared, mut read)| async move {
        if read.next >= read.end {
            return Ok(None);
        }
        if shared.shutdown.is_cancelled() {
            return Err(NodeError::Draining.into());
        }
        let rest = read.end - read.next;
        let (content, crc32c, bytes) =
            match shared.node.read_piece(&read.image, read.next, rest.min(read.chunk_bytes)).await? {
                PieceContent::Data { data, crc32c } => {
                    let bytes = u64::try_from(data.len()).unwrap_or(u64::MAX);
                    (Content::Data(data), crc32c, bytes)
                }
                PieceContent::Zeros(bytes) => (Content::ZeroBytes(bytes.min(rest)), 0, bytes.min(rest)),
            };
        assert!(bytes > 0 && bytes <= rest, "a piece of {bytes} bytes for a rest of {rest}");
        let answer = v1::ReadImageResponse {
            offset_bytes: read.next,
            content: Some(content),
            crc32c,
            position: Some(read.info.position.into()),
            volume_size_bytes: read.info.size_bytes,
        };
        read.next += bytes;
        Ok(Some((answer, (shared, read))))
    })
}
