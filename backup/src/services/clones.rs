//! `BlockService` and `VolumeService` on a backup: of its clones, and of nothing else.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};
use understudy_common::types::{Position, VolumeId};
use understudy_proto::{
    convert::client_from_wire,
    together::next_together,
    v1::{
        self, block_service_server::BlockService, read_blocks_response::Content, volume_service_server::VolumeService,
        write_result::Outcome,
    },
};

use super::{
    Shared,
    pieces::{Pieces, Source, pieces},
    within,
};
use crate::{
    api::{NodeError, PieceContent, ReplicaNode, VolumeKey},
    clones::{CloneChange, CloneWrite},
};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) struct CloneBlocks<N>(pub Shared<N>);

pub(super) struct CloneVolumes<N>(pub Shared<N>);

fn not_empty(field: &'static str, length: u64) -> Result<(), NodeError> {
    if length > 0 {
        return Ok(());
    }
    Err(NodeError::Invalid { field, why: "is empty; name at least one byte".into() })
}

fn write_request(request: v1::WriteBlockRequest, limit: usize) -> Result<CloneWrite, NodeError> {
    let v1::WriteBlockRequest { volume_id, volume, offset_bytes, data, crc32c, client_id, sequence } = request;
    let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
    not_empty("data", length)?;
    within(length, limit)?;
    Ok(CloneWrite {
        volume: VolumeKey::of(volume_id, volume)?,
        offset_bytes,
        change: CloneChange::Data(data, crc32c),
        client: client_from_wire(client_id, sequence)?,
    })
}

#[tonic::async_trait]
impl<N: ReplicaNode> BlockService for CloneBlocks<N> {
    type WriteBlocksStream = Answers<v1::WriteBlocksResponse>;
    type ReadBlocksStream = Answers<v1::ReadBlocksResponse>;

    async fn write_block(
        &self,
        request: Request<v1::WriteBlockRequest>,
    ) -> Result<Response<v1::WriteBlockResponse>, Status> {
        let request = write_request(request.into_inner(), self.0.message_bytes)?;
        Ok(Response::new(self.0.node.write_clone(request).await?))
    }

    async fn write_blocks(
        &self,
        request: Request<Streaming<v1::WriteBlocksRequest>>,
    ) -> Result<Response<Self::WriteBlocksStream>, Status> {
        Ok(Response::new(Box::pin(write_blocks(self.0.clone(), request.into_inner()))))
    }

    async fn read_block(
        &self,
        request: Request<v1::ReadBlockRequest>,
    ) -> Result<Response<v1::ReadBlockResponse>, Status> {
        let v1::ReadBlockRequest { volume_id, volume, offset_bytes, length_bytes } = request.into_inner();
        not_empty("length_bytes", length_bytes)?;
        within(length_bytes, self.0.message_bytes)?;
        let volume = VolumeKey::of(volume_id, volume)?;
        let (data, crc32c) = self.0.node.read_clone(&volume, offset_bytes, length_bytes).await?;
        Ok(Response::new(v1::ReadBlockResponse { data, crc32c }))
    }

    async fn read_blocks(
        &self,
        request: Request<v1::ReadBlocksRequest>,
    ) -> Result<Response<Self::ReadBlocksStream>, Status> {
        let v1::ReadBlocksRequest { volume_id, volume, offset_bytes, length_bytes, chunk_bytes, snapshot } =
            request.into_inner();
        within(chunk_bytes.into(), self.0.message_bytes)?;
        let clone = self.0.node.clone_volume(&VolumeKey::of(volume_id, volume)?)?;
        if !snapshot.is_empty() {
            return Err(NodeError::NoSnapshot { volume: clone.name, snapshot }.into());
        }
        let range = Pieces::of(&clone.name, clone.size_bytes, offset_bytes, length_bytes, chunk_bytes, &self.0)?;
        let source = CloneSource(VolumeKey::Id(VolumeId(clone.id)));
        Ok(Response::new(Box::pin(pieces(self.0.clone(), source, range))))
    }

    async fn flush(&self, request: Request<v1::FlushRequest>) -> Result<Response<v1::FlushResponse>, Status> {
        let v1::FlushRequest { volume_id, volume } = request.into_inner();
        let key = VolumeKey::of(volume_id, volume)?;
        // There is nothing to wait for: what was written is seen, and is never durable.
        self.0.node.clone_volume(&key)?;
        Ok(Response::new(v1::FlushResponse::default()))
    }

    async fn discard(&self, request: Request<v1::DiscardRequest>) -> Result<Response<v1::WriteBlockResponse>, Status> {
        let v1::DiscardRequest { volume_id, volume, offset_bytes, length_bytes, client_id, sequence } =
            request.into_inner();
        not_empty("length_bytes", length_bytes)?;
        let request = CloneWrite {
            volume: VolumeKey::of(volume_id, volume)?,
            offset_bytes,
            change: CloneChange::Discard(length_bytes),
            client: client_from_wire(client_id, sequence).map_err(NodeError::from)?,
        };
        Ok(Response::new(self.0.node.write_clone(request).await?))
    }

    async fn write_zeroes(
        &self,
        request: Request<v1::WriteZeroesRequest>,
    ) -> Result<Response<v1::WriteBlockResponse>, Status> {
        let v1::WriteZeroesRequest { volume_id, volume, offset_bytes, length_bytes, client_id, sequence } =
            request.into_inner();
        not_empty("length_bytes", length_bytes)?;
        let request = CloneWrite {
            volume: VolumeKey::of(volume_id, volume)?,
            offset_bytes,
            change: CloneChange::Zeroes(length_bytes),
            client: client_from_wire(client_id, sequence).map_err(NodeError::from)?,
        };
        Ok(Response::new(self.0.node.write_clone(request).await?))
    }
}

/// One message of results for the writes that came together, in their order. What is read ahead is no more than that.
fn write_blocks<N: ReplicaNode>(
    shared: Shared<N>,
    requests: Streaming<v1::WriteBlocksRequest>,
) -> impl Stream<Item = Result<v1::WriteBlocksResponse, Status>> + Send {
    futures_util::stream::unfold(Some((shared, requests, None)), |state| async move {
        let (shared, mut requests, end) = state?;
        if let Some(end) = end {
            return Some((Err(end), None));
        }
        let weigh = |message: &v1::WriteBlocksRequest| message.write.as_ref().map_or(0, |write| write.data.len());
        let messages = tokio::select! {
            biased;
            () = shared.shutdown.cancelled() => return Some((Err(NodeError::Draining.into()), None)),
            messages = next_together(&mut requests, weigh) => messages?,
        };
        let (mut results, mut end) = (Vec::with_capacity(messages.len()), None);
        for message in messages {
            let v1::WriteBlocksRequest { tag, write } = match message {
                Ok(message) => message,
                Err(status) => {
                    end = Some(status);
                    break;
                }
            };
            let request = write
                .ok_or_else(|| NodeError::Invalid { field: "write", why: "is missing".into() })
                .and_then(|write| write_request(write, shared.message_bytes));
            let done = match request {
                Ok(request) => shared.node.write_clone(request).await,
                Err(error) => Err(error),
            };
            let outcome = match done {
                Ok(written) => Outcome::Written(written),
                Err(error) => Outcome::Error(v1::WriteError { code: error.code().into(), message: error.to_string() }),
            };
            results.push(v1::WriteResult { tag, outcome: Some(outcome) });
        }
        match (results.is_empty(), end) {
            (true, Some(end)) => Some((Err(end), None)),
            (_, end) => Some((Ok(v1::WriteBlocksResponse { results }), Some((shared, requests, end)))),
        }
    })
}

/// A clone, by number: another one may get its name in the middle of a read.
struct CloneSource(VolumeKey);

impl<N: ReplicaNode> Source<N> for CloneSource {
    type Answer = v1::ReadBlocksResponse;

    async fn read(&self, node: &N, at: u64, max: u64) -> Result<(PieceContent, Position), NodeError> {
        node.read_clone_piece(&self.0, at, max).await
    }

    fn answer(&self, offset_bytes: u64, piece: PieceContent, position: Position) -> Self::Answer {
        let (content, crc32c) = match piece {
            PieceContent::Data { data, crc32c } => (Content::Data(data), crc32c),
            PieceContent::Zeros(bytes) => (Content::ZeroBytes(bytes), 0),
        };
        v1::ReadBlocksResponse { offset_bytes, content: Some(content), crc32c, position: Some(position.into()) }
    }
}

/// What only a primary does.
#[allow(clippy::result_large_err, reason = "as the service's methods")]
fn is_backup<T>() -> Result<Response<T>, Status> {
    Err(NodeError::IsBackup.into())
}

#[tonic::async_trait]
impl<N: ReplicaNode> VolumeService for CloneVolumes<N> {
    type RestoreSnapshotStream = Answers<v1::CopyProgress>;
    type CloneSnapshotStream = Answers<v1::CopyProgress>;
    type GetChangedBlocksStream = Answers<v1::ChangedBlocks>;

    async fn get_volume(&self, request: Request<v1::GetVolumeRequest>) -> Result<Response<v1::Volume>, Status> {
        let v1::GetVolumeRequest { volume_id, volume } = request.into_inner();
        Ok(Response::new(self.0.node.clone_volume(&VolumeKey::of(volume_id, volume)?)?))
    }

    async fn list_volumes(
        &self,
        _: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        Ok(Response::new(v1::ListVolumesResponse { volumes: self.0.node.clone_volumes() }))
    }

    async fn create_volume(&self, _: Request<v1::CreateVolumeRequest>) -> Result<Response<v1::Volume>, Status> {
        is_backup()
    }

    async fn resize_volume(&self, _: Request<v1::ResizeVolumeRequest>) -> Result<Response<v1::Volume>, Status> {
        is_backup()
    }

    async fn delete_volume(
        &self,
        _: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        is_backup()
    }

    async fn set_ack_rule(&self, _: Request<v1::SetAckRuleRequest>) -> Result<Response<v1::Volume>, Status> {
        is_backup()
    }

    async fn list_groups(&self, _: Request<v1::ListGroupsRequest>) -> Result<Response<v1::ListGroupsResponse>, Status> {
        is_backup()
    }

    async fn get_pool(&self, _: Request<v1::GetPoolRequest>) -> Result<Response<v1::Pool>, Status> {
        is_backup()
    }

    async fn add_device(&self, _: Request<v1::AddDeviceRequest>) -> Result<Response<v1::PoolDevice>, Status> {
        is_backup()
    }

    async fn drain_device(&self, _: Request<v1::DrainDeviceRequest>) -> Result<Response<v1::PoolDevice>, Status> {
        is_backup()
    }

    async fn list_segments(
        &self,
        _: Request<v1::ListSegmentsRequest>,
    ) -> Result<Response<v1::ListSegmentsResponse>, Status> {
        is_backup()
    }

    async fn snapshot(&self, _: Request<v1::SnapshotRequest>) -> Result<Response<v1::SnapshotInfo>, Status> {
        is_backup()
    }

    async fn list_snapshots(
        &self,
        _: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        is_backup()
    }

    async fn delete_snapshot(
        &self,
        _: Request<v1::DeleteSnapshotRequest>,
    ) -> Result<Response<v1::DeleteSnapshotResponse>, Status> {
        is_backup()
    }

    async fn restore_snapshot(
        &self,
        _: Request<v1::RestoreSnapshotRequest>,
    ) -> Result<Response<Self::RestoreSnapshotStream>, Status> {
        is_backup()
    }

    async fn clone_snapshot(
        &self,
        _: Request<v1::CloneSnapshotRequest>,
    ) -> Result<Response<Self::CloneSnapshotStream>, Status> {
        is_backup()
    }

    async fn get_changed_blocks(
        &self,
        _: Request<v1::GetChangedBlocksRequest>,
    ) -> Result<Response<Self::GetChangedBlocksStream>, Status> {
        is_backup()
    }
}
