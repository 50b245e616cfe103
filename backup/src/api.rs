//! What the services need of the node: a seam, so that they are tested over a loopback socket without a disk.
//!
//! The node judges sessions, ship numbers and positions; the services only carry frames to it in their order.

use std::{future::Future, pin::Pin};

use bytes::Bytes;
use tokio_stream::Stream;
use understudy_common::{
    process::Failure,
    types::{Position, Uid, VolumeId},
};
use understudy_proto::v1;

pub use crate::error::NodeError;

/// How a request names a volume.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum VolumeKey {
    /// By its number.
    Id(VolumeId),
    /// By its name.
    Name(String),
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

/// Events of a subscription, in ascending numbers.
pub type EventStream = Pin<Box<dyn Stream<Item = v1::Event> + Send>>;

/// The node. Clones are handles of one node.
pub trait ReplicaNode: Clone + Send + Sync + 'static {
    /// An open image; closed when it is dropped.
    type Image: Send + Sync + 'static;

    /// Compares both sides and opens a session, which ends the one before.
    fn attach(&self, request: v1::AttachRequest) -> impl Future<Output = Result<v1::AttachResponse, NodeError>> + Send;
    /// Takes the next record of a session. Returns when there is room for another; that it is durable is said by
    /// [`ReplicaNode::acknowledged`].
    fn receive(&self, record: v1::StagedRecord) -> impl Future<Output = Result<(), NodeError>> + Send;
    /// Waits until more than `after` (a ship number) is durable, or a refusal is to be told. Cancel-safe: what was not
    /// returned comes with the next call.
    fn acknowledged(&self, session: Uid, after: u64) -> impl Future<Output = Result<v1::StagedAck, NodeError>> + Send;
    /// Answers a heartbeat.
    fn heartbeat(
        &self,
        request: v1::HeartbeatRequest,
    ) -> impl Future<Output = Result<v1::HeartbeatResponse, NodeError>> + Send;
    /// Opens the newest consistent image of a volume.
    fn open_image(&self, volume: &VolumeKey) -> impl Future<Output = Result<Self::Image, NodeError>> + Send;
    /// What was opened.
    fn image_info(&self, image: &Self::Image) -> ImageInfo;
    /// The next piece of an image from `offset_bytes` on, inside of it.
    fn read_piece(
        &self,
        image: &Self::Image,
        offset_bytes: u64,
        max_bytes: u64,
    ) -> impl Future<Output = Result<PieceContent, NodeError>> + Send;
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
