//! What the services need of the node: a seam, so that they are tested over a loopback socket without a disk.
//!
//! The node judges sessions, ship numbers and positions; the services only carry frames to it in their order.

use std::{collections::BTreeMap, future::Future};

use bytes::Bytes;
use understudy_common::{
    delta::BlockSet,
    process::Failure,
    types::{Lsn, Position, Uid, VolumeId},
};
use understudy_proto::v1;

pub use understudy_proto::convert::EventStream;

pub use crate::{clones::CloneWrite, error::NodeError, run_receiver::When};

/// How a request names a volume.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum VolumeKey {
    /// By its number.
    Id(VolumeId),
    /// By its name.
    Name(String),
}

impl VolumeKey {
    /// As the fields of a request say.
    ///
    /// # Errors
    /// They name none.
    pub fn of(volume_id: u64, volume: String) -> Result<Self, NodeError> {
        match (volume_id, volume.is_empty()) {
            (0, true) => {
                Err(NodeError::Invalid { field: "volume", why: "names no volume; set volume_id or volume".into() })
            }
            (0, false) => Ok(Self::Name(volume)),
            (id, _) => Ok(Self::Id(VolumeId(id))),
        }
    }
}

impl std::fmt::Display for VolumeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// A consistent image that is open for reading: its volume as it was at one position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Name of the volume.
    pub volume: String,
    /// Its size at that position.
    pub size_bytes: u64,
    /// The position.
    pub position: Position,
}

/// Data, or nothing written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PieceContent {
    /// At most as long as was asked for, and never empty.
    Data {
        /// The bytes.
        data: Bytes,
        /// Their checksum.
        crc32c: u32,
    },
    /// So many bytes of zeros, never written or discarded; at least one, maybe more than was asked for.
    Zeros(u64),
}

/// The node. Clones are handles of one node.
pub trait ReplicaNode: Clone + Send + Sync + 'static {
    /// An open image; closed when it is dropped.
    type Image: Send + Sync + 'static;

    /// Compares both sides and opens a session, which ends the one before.
    fn attach(&self, request: v1::AttachRequest) -> impl Future<Output = Result<v1::AttachResponse, NodeError>> + Send;
    /// Takes the next records of a session, in their order. Returns when all are taken; that they are durable is said
    /// by [`ReplicaNode::acknowledged`].
    fn receive(&self, records: Vec<v1::StagedRecord>) -> impl Future<Output = Result<(), NodeError>> + Send;
    /// Waits until more than `after` (a ship number) is durable, or a refusal is to be told. Cancel-safe: what was not
    /// returned comes with the next call.
    fn acknowledged(&self, session: Uid, after: u64) -> impl Future<Output = Result<v1::StagedAck, NodeError>> + Send;
    /// Answers a heartbeat.
    fn heartbeat(
        &self,
        request: v1::HeartbeatRequest,
    ) -> impl Future<Output = Result<v1::HeartbeatResponse, NodeError>> + Send;
    /// Begins a run, or goes on with it. Returns when that is durable.
    fn begin_run(
        &self,
        request: v1::BeginRunRequest,
    ) -> impl Future<Output = Result<v1::BeginRunResponse, NodeError>> + Send;
    /// Takes a batch of a run, when there is room. Its answer may be given when this node is [durable](Self::durable).
    fn take_batch(
        &self,
        request: v1::DeltaBatchRequest,
    ) -> impl Future<Output = Result<When<v1::DeltaBatchResponse>, NodeError>> + Send;
    /// Waits until this node's journal is durable up to `lsn`.
    fn durable(&self, lsn: Lsn) -> impl Future<Output = Result<(), NodeError>> + Send;
    /// Compares pieces with what a run has here.
    fn digest(&self, request: v1::DigestRequest) -> impl Future<Output = Result<v1::DigestResponse, NodeError>> + Send;
    /// Commits a run. Returns when that is durable.
    fn commit_run(
        &self,
        request: v1::CommitDeltaRequest,
    ) -> impl Future<Output = Result<v1::CommitDeltaResponse, NodeError>> + Send;
    /// Gives a run up. Returns when that is durable.
    fn abort_run(
        &self,
        request: v1::AbortDeltaRequest,
    ) -> impl Future<Output = Result<v1::AbortDeltaResponse, NodeError>> + Send;
    /// The snapshots of a comparison go.
    fn end_verify(
        &self,
        request: v1::EndVerifyRequest,
    ) -> impl Future<Output = Result<v1::EndVerifyResponse, NodeError>> + Send;
    /// Begins a scrub, or tells how it is doing and what is damaged.
    fn scrub(
        &self,
        request: v1::ReplicaScrubRequest,
    ) -> impl Future<Output = Result<v1::ReplicaScrubResponse, NodeError>> + Send;
    /// Mends a version of a block that only snapshots see.
    fn mend_block(
        &self,
        request: v1::MendBlockRequest,
    ) -> impl Future<Output = Result<v1::MendBlockResponse, NodeError>> + Send;
    /// A block of the head or of a snapshot.
    fn fetch_block(
        &self,
        request: v1::FetchBlockRequest,
    ) -> impl Future<Output = Result<v1::FetchBlockResponse, NodeError>> + Send;
    /// Where a diverged group differs from what the backup of its time as a primary had acknowledged.
    fn divergence(
        &self,
        request: v1::GetDivergenceRequest,
    ) -> impl Future<Output = Result<BTreeMap<VolumeId, BlockSet>, NodeError>> + Send;
    /// Makes this directory that of the primary of the next generation; [`ReplicaNode::failed`] resolves then.
    fn promote(
        &self,
        request: v1::PromoteRequest,
    ) -> impl Future<Output = Result<v1::PromoteResponse, NodeError>> + Send;
    /// Gives up the changes of this side after a split; [`ReplicaNode::failed`] resolves then.
    fn resolve(&self) -> impl Future<Output = Result<v1::ResolveSplitBrainResponse, NodeError>> + Send;
    /// Opens the newest consistent image of a volume.
    fn open_image(
        &self,
        volume: &VolumeKey,
        snapshot: Option<&str>,
    ) -> impl Future<Output = Result<Self::Image, NodeError>> + Send;
    /// The snapshots of a group, or of every group.
    fn snapshots(&self, group: Option<&str>) -> impl Future<Output = Result<Vec<v1::SnapshotInfo>, NodeError>> + Send;
    /// The pool.
    fn pool(&self) -> v1::Pool;
    /// Adds a device to it. Returns when it is durably part of it.
    fn add_device(
        &self,
        request: v1::AddDeviceRequest,
    ) -> impl Future<Output = Result<v1::PoolDevice, NodeError>> + Send;
    /// Begins to drain a device, or ends that. Returns when that is durable.
    fn drain_device(
        &self,
        request: v1::DrainDeviceRequest,
    ) -> impl Future<Output = Result<v1::PoolDevice, NodeError>> + Send;
    /// Where segments lie, a part at a time.
    fn list_segments(&self, request: v1::ListSegmentsRequest) -> Result<v1::ListSegmentsResponse, NodeError>;
    /// What was opened.
    fn image_info(&self, image: &Self::Image) -> ImageInfo;
    /// The next piece of an image from `offset_bytes` on, inside of it.
    fn read_piece(
        &self,
        image: &Self::Image,
        offset_bytes: u64,
        max_bytes: u64,
    ) -> impl Future<Output = Result<PieceContent, NodeError>> + Send;
    /// Makes a writable clone of an image or a snapshot. Copies nothing.
    fn make_clone(
        &self,
        request: v1::CloneImageRequest,
    ) -> impl Future<Output = Result<v1::CloneInfo, NodeError>> + Send;
    /// The clones, by name.
    fn clones(&self) -> Vec<v1::CloneInfo>;
    /// Discards a clone.
    fn delete_clone(&self, name: &str) -> impl Future<Output = Result<(), NodeError>> + Send;
    /// What the clones are served as, by name.
    fn clone_volumes(&self) -> Vec<v1::Volume>;
    /// What one clone is served as.
    fn clone_volume(&self, volume: &VolumeKey) -> Result<v1::Volume, NodeError>;
    /// Writes to a clone: seen by the next read, durable never.
    fn write_clone(
        &self,
        request: CloneWrite,
    ) -> impl Future<Output = Result<v1::WriteBlockResponse, NodeError>> + Send;
    /// Reads bytes of a clone, with their CRC32C.
    fn read_clone(
        &self,
        volume: &VolumeKey,
        offset: u64,
        length: u64,
    ) -> impl Future<Output = Result<(Bytes, u32), NodeError>> + Send;
    /// The next piece of a clone from `offset` on, and the position of its base.
    fn read_clone_piece(
        &self,
        volume: &VolumeKey,
        offset: u64,
        max_bytes: u64,
    ) -> impl Future<Output = Result<(PieceContent, Position), NodeError>> + Send;
    /// The state of everything.
    fn status(&self) -> v1::Status;
    /// For `after` 0 the present state as one event `state`, then each event with a larger number.
    fn subscribe(&self, after: u64) -> EventStream;
    /// Sets gauges that are read, not counted.
    fn refresh_metrics(&self);
    /// Resolves when the node cannot go on, with the exit code of the process.
    fn failed(&self) -> impl Future<Output = Failure> + Send;
    /// Ends the node: what was received becomes durable, the journal is closed.
    fn close(&self) -> impl Future<Output = Result<(), Failure>> + Send;
}
