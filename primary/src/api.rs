//! What the services need of the engine: a seam, so that they are tested over a loopback socket without a disk.
//!
//! A write passes three steps in this order: [`BlockEngine::admit`] reserves its bytes, [`BlockEngine::submit`] gives it
//! its place (calls made one after the other get ascending places), [`BlockEngine::wait`] answers when it is durable by
//! the rule of its volume.

use std::{future::Future, pin::Pin};

use bytes::Bytes;
use tokio_stream::Stream;
use understudy_common::{
    process::Failure,
    types::{AckRule, AwayRule, Position, VolumeId, VolumeSpec},
};
use understudy_proto::v1;

pub use understudy_common::record::ClientSequence;

pub use crate::error::EngineError;

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

/// A change of a range of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteRequest {
    /// Which volume.
    pub volume: VolumeKey,
    /// First byte.
    pub offset_bytes: u64,
    /// What to do with the range.
    pub kind: WriteKind,
    /// Of the data, as the client computed it; checked before anything is staged.
    pub crc32c: Option<u32>,
    /// At most once.
    pub client: Option<ClientSequence>,
}

/// What happens to a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteKind {
    /// It becomes this; never empty.
    Data(Bytes),
    /// It reads as zeros, to the byte.
    Zeroes {
        /// Never 0.
        length_bytes: u64,
    },
    /// The whole blocks inside are given back and read as zeros.
    Discard {
        /// Never 0.
        length_bytes: u64,
    },
}

/// A durable write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteAck {
    /// Its place.
    pub position: Position,
    /// Durable on both sides; otherwise on this one.
    pub both: bool,
    /// It repeated one that had been applied.
    pub duplicate: bool,
}

/// A piece of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadPiece {
    /// Where it starts.
    pub offset_bytes: u64,
    /// Never empty.
    pub content: PieceContent,
    /// CRC32C of the data; 0 for zeros.
    pub crc32c: u32,
    /// Of the newest record that it can hold.
    pub position: Position,
}

/// Data, or nothing written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PieceContent {
    /// At most as long as was asked for.
    Data(Bytes),
    /// So many bytes of zeros, never written or discarded; at least one, maybe more than was asked for.
    Zeros(u64),
}

/// A volume that is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVolume {
    /// 1 to 63 of a-z, 0-9, '-', '_' and '.', starting with a letter or digit.
    pub name: String,
    /// A multiple of the block size.
    pub size_bytes: u64,
    /// 0: 4096.
    pub block_bytes: u32,
    /// `None`: a group of its own.
    pub group: Option<String>,
    /// When writes are acknowledged.
    pub ack: AckRule,
    /// What happens to them while the backup is away.
    pub away: AwayRule,
}

/// The pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolInfo {
    /// Unit of allocation.
    pub segment_bytes: u32,
    /// Of all devices, with what a growing one may still take.
    pub total_bytes: u64,
    /// Not allocated.
    pub free_bytes: u64,
    /// Promised to acknowledged writes that are not in their place yet.
    pub reserved_bytes: u64,
    /// Its devices.
    pub devices: Vec<DeviceInfo>,
}

/// A device of the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number.
    pub id: u32,
    /// Where it is.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// Not allocated.
    pub free_bytes: u64,
}

/// Events of a subscription, in ascending numbers.
pub type EventStream = Pin<Box<dyn Stream<Item = v1::Event> + Send>>;

/// The engine. Clones are handles of one engine. A dropped future of any call but `submit` has no effect; one of
/// `submit` may have submitted.
pub trait BlockEngine: Clone + Send + Sync + 'static {
    /// Bytes that were reserved.
    type Permit: Send + 'static;
    /// A submitted write. Dropping it does not take the write back.
    type Ticket: Send + Sync + 'static;

    /// Reserves `bytes`; waits for up to `limits.queue_wait`.
    fn admit(&self, bytes: u64) -> impl Future<Output = Result<Self::Permit, EngineError>> + Send;
    /// Gives the write its place; usually at once.
    fn submit(
        &self,
        permit: Self::Permit,
        request: WriteRequest,
    ) -> impl Future<Output = Result<Self::Ticket, EngineError>> + Send;
    /// Answers when the write is durable by the rule of its volume.
    fn wait(&self, ticket: Self::Ticket) -> impl Future<Output = Result<WriteAck, EngineError>> + Send;
    /// The answer if it is there already.
    fn poll_settled(&self, ticket: &Self::Ticket) -> Option<Result<WriteAck, EngineError>>;
    /// The bytes of a range and their CRC32C.
    fn read(
        &self,
        volume: &VolumeKey,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> impl Future<Output = Result<(Bytes, u32), EngineError>> + Send;
    /// The next piece from `offset_bytes` on, inside of the volume.
    fn read_piece(
        &self,
        volume: &VolumeKey,
        offset_bytes: u64,
        max_bytes: u64,
    ) -> impl Future<Output = Result<ReadPiece, EngineError>> + Send;
    /// Answers when everything acknowledged before is durable by the rule of the volume's group.
    fn flush(&self, volume: &VolumeKey) -> impl Future<Output = Result<WriteAck, EngineError>> + Send;
    /// Makes a volume.
    fn create_volume(&self, volume: NewVolume) -> impl Future<Output = Result<VolumeSpec, EngineError>> + Send;
    /// Grows a volume.
    fn resize_volume(
        &self,
        volume: &VolumeKey,
        size_bytes: u64,
    ) -> impl Future<Output = Result<VolumeSpec, EngineError>> + Send;
    /// Deletes a volume.
    fn delete_volume(&self, volume: &VolumeKey) -> impl Future<Output = Result<(), EngineError>> + Send;
    /// Changes when writes are acknowledged; `None` leaves the away rule as it is.
    fn set_ack_rule(
        &self,
        volume: &VolumeKey,
        ack: AckRule,
        away: Option<AwayRule>,
    ) -> impl Future<Output = Result<VolumeSpec, EngineError>> + Send;
    /// One volume.
    fn volume(&self, volume: &VolumeKey) -> Result<VolumeSpec, EngineError>;
    /// All volumes, by id.
    fn volumes(&self) -> Vec<VolumeSpec>;
    /// The pool.
    fn pool(&self) -> PoolInfo;
    /// The state of everything.
    fn status(&self) -> v1::Status;
    /// For `after` 0 the present state as one event `state`, then each event with a larger number.
    fn subscribe(&self, after: u64) -> EventStream;
    /// Sets gauges that are read, not counted.
    fn refresh_metrics(&self);
    /// Resolves when the engine cannot go on, with the exit code of the process.
    fn failed(&self) -> impl Future<Output = Failure> + Send;
    /// Ends the engine: what was submitted becomes durable, the journal is closed.
    fn close(&self) -> impl Future<Output = Result<(), Failure>> + Send;
}
