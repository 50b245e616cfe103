//! `BackupService`: how the copy is doing, and reads of the consistent image.

use std::pin::Pin;

use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use understudy_common::types::Position;
use understudy_proto::v1::{self, backup_service_server::BackupService, read_image_response::Content};

use super::{
    Shared,
    pieces::{Pieces, Source, pieces},
    within,
};
use crate::api::{ImageInfo, NodeError, PieceContent, ReplicaNode, VolumeKey};

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

    async fn promote(&self, request: Request<v1::PromoteRequest>) -> Result<Response<v1::PromoteResponse>, Status> {
        Ok(Response::new(self.0.node.promote(request.into_inner()).await?))
    }

    async fn resolve_split_brain(
        &self,
        _: Request<v1::ResolveSplitBrainRequest>,
    ) -> Result<Response<v1::ResolveSplitBrainResponse>, Status> {
        Ok(Response::new(self.0.node.resolve().await?))
    }

    async fn get_pool(&self, _: Request<v1::GetPoolRequest>) -> Result<Response<v1::Pool>, Status> {
        Ok(Response::new(self.0.node.pool()))
    }

    async fn add_device(&self, request: Request<v1::AddDeviceRequest>) -> Result<Response<v1::PoolDevice>, Status> {
        Ok(Response::new(self.0.node.add_device(request.into_inner()).await?))
    }

    async fn drain_device(&self, request: Request<v1::DrainDeviceRequest>) -> Result<Response<v1::PoolDevice>, Status> {
        Ok(Response::new(self.0.node.drain_device(request.into_inner()).await?))
    }

    async fn list_segments(
        &self,
        request: Request<v1::ListSegmentsRequest>,
    ) -> Result<Response<v1::ListSegmentsResponse>, Status> {
        Ok(Response::new(self.0.node.list_segments(request.into_inner())?))
    }

    async fn read_blocks(
        &self,
        request: Request<v1::ReadImageRequest>,
    ) -> Result<Response<Self::ReadBlocksStream>, Status> {
        let v1::ReadImageRequest { volume_id, volume, offset_bytes, length_bytes, chunk_bytes, snapshot } =
            request.into_inner();
        within(chunk_bytes.into(), self.0.message_bytes)?;
        let snapshot = (!snapshot.is_empty()).then_some(snapshot);
        let image = self.0.node.open_image(&VolumeKey::of(volume_id, volume)?, snapshot.as_deref()).await?;
        let info = self.0.node.image_info(&image);
        let range = Pieces::of(&info.volume, info.size_bytes, offset_bytes, length_bytes, chunk_bytes, &self.0)?;
        Ok(Response::new(Box::pin(pieces(self.0.clone(), ImageSource { image, info }, range))))
    }

    async fn clone_snapshot(&self, request: Request<v1::CloneImageRequest>) -> Result<Response<v1::CloneInfo>, Status> {
        Ok(Response::new(self.0.node.make_clone(request.into_inner()).await?))
    }

    async fn delete_clone(
        &self,
        request: Request<v1::DeleteCloneRequest>,
    ) -> Result<Response<v1::DeleteCloneResponse>, Status> {
        self.0.node.delete_clone(&request.into_inner().name).await?;
        Ok(Response::new(v1::DeleteCloneResponse {}))
    }

    async fn list_clones(&self, _: Request<v1::ListClonesRequest>) -> Result<Response<v1::ListClonesResponse>, Status> {
        Ok(Response::new(v1::ListClonesResponse { clones: self.0.node.clones() }))
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        let group = request.into_inner().group;
        let snapshots = self.0.node.snapshots((!group.is_empty()).then_some(&group)).await?;
        Ok(Response::new(v1::ListSnapshotsResponse { snapshots }))
    }
}

/// An open image, all of one position.
struct ImageSource<I> {
    image: I,
    info: ImageInfo,
}

impl<N: ReplicaNode> Source<N> for ImageSource<N::Image> {
    type Answer = v1::ReadImageResponse;

    async fn read(&self, node: &N, at: u64, max: u64) -> Result<(PieceContent, Position), NodeError> {
        Ok((node.read_piece(&self.image, at, max).await?, self.info.position))
    }

    fn answer(&self, offset_bytes: u64, piece: PieceContent, position: Position) -> Self::Answer {
        let (content, crc32c) = match piece {
            PieceContent::Data { data, crc32c } => (Content::Data(data), crc32c),
            PieceContent::Zeros(bytes) => (Content::ZeroBytes(bytes), 0),
        };
        v1::ReadImageResponse {
            offset_bytes,
            content: Some(content),
            crc32c,
            position: Some(position.into()),
            volume_size_bytes: self.info.size_bytes,
        }
    }
}
