//! What the services need of the engine: a seam, so that they are tested over a loopback socket without a disk.
//!
//! A write passes three steps in this order: [`BlockEngine::admit`] reserves its bytes, [`BlockEngine::submit`] gives it
//! its place (calls made one after the other get ascending places), [`BlockEngine::wait`] answers when it is durable by
//! the rule of its volume.

use std::{collections::VecDeque, future::Future};

use bytes::Bytes;
use tokio_stream::wrappers::ReceiverStream;
use understudy_common::{
    delta::BlockSet,
    policy::PolicyConfig,
    process::Failure,
    types::{AckRule, AwayRule, Position, VolumeId, VolumeSpec},
};
use understudy_proto::v1;

pub use understudy_common::record::ClientSequence;
pub use understudy_proto::convert::EventStream;

pub use crate::{
    engine::{Changed, Copy},
    error::EngineError,
};

/// How a comparison goes on.
pub type VerifyStream = ReceiverStream<Result<v1::VerifyProgress, EngineError>>;

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

impl WriteRequest {
    /// Bytes that it holds in memory.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        match &self.kind {
            WriteKind::Data(data) => data.len() as u64,
            WriteKind::Zeroes { .. } | WriteKind::Discard { .. } => 0,
        }
    }
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
    /// Its group is in delta mode.
    pub delta: bool,
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

/// The mode policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyInForce {
    /// What groups are weighed with.
    pub policy: PolicyConfig,
    /// What the configuration of the service says.
    pub configured: PolicyConfig,
}

/// Blocks of a volume that the backup never had.
#[derive(Debug, Clone)]
pub struct UnshippedVolume {
    /// The volume.
    pub spec: VolumeSpec,
    /// The blocks.
    pub blocks: BlockSet,
}

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
    /// Does both for requests from the front of `requests`, which leave it, as far as none has to wait or is refused.
    /// Returns their tickets, in order; none is a valid answer.
    fn submit_now(&self, requests: &mut VecDeque<WriteRequest>) -> Vec<Self::Ticket>;
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
    fn pool(&self) -> v1::Pool;
    /// Adds a device to it. Returns when it is durably part of it.
    fn add_device(
        &self,
        request: v1::AddDeviceRequest,
    ) -> impl Future<Output = Result<v1::PoolDevice, EngineError>> + Send;
    /// Begins to drain a device, or ends that. Returns when that is durable.
    fn drain_device(
        &self,
        request: v1::DrainDeviceRequest,
    ) -> impl Future<Output = Result<v1::PoolDevice, EngineError>> + Send;
    /// Where segments lie, a part at a time.
    fn list_segments(&self, request: v1::ListSegmentsRequest) -> Result<v1::ListSegmentsResponse, EngineError>;
    /// Takes a snapshot of a group. A group is named by itself or by one of its volumes.
    fn take_snapshot(
        &self,
        group: &str,
        name: &str,
    ) -> impl Future<Output = Result<v1::SnapshotInfo, EngineError>> + Send;
    /// The snapshots of a group, or of every group.
    fn snapshots(&self, group: Option<&str>)
    -> impl Future<Output = Result<Vec<v1::SnapshotInfo>, EngineError>> + Send;
    /// Names and times of the snapshots of a group, Unix milliseconds.
    ///
    /// # Errors
    /// See [`EngineError`].
    fn snapshot_times(&self, group: &str) -> Result<Vec<(String, i64)>, EngineError>;
    /// Deletes a snapshot.
    fn delete_snapshot(&self, group: &str, name: &str) -> impl Future<Output = Result<(), EngineError>> + Send;
    /// Makes the volumes of a group, or only `volume`, what they were in a snapshot.
    fn restore_snapshot(
        &self,
        group: &str,
        volume: Option<&str>,
        snapshot: &str,
    ) -> impl Future<Output = Result<Copy, EngineError>> + Send;
    /// Makes a volume with the content of a snapshot.
    fn clone_snapshot(
        &self,
        volume: &VolumeKey,
        snapshot: &str,
        name: String,
        group: Option<String>,
    ) -> impl Future<Output = Result<Copy, EngineError>> + Send;
    /// Ranges that differ between a snapshot and a newer one, or the head, from `offset_bytes` on.
    fn changed_blocks(
        &self,
        volume: &VolumeKey,
        base: &str,
        target: Option<&str>,
        offset_bytes: u64,
    ) -> impl Future<Output = Result<Changed, EngineError>> + Send;
    /// The volume as it was in a snapshot.
    fn snapshot_spec(&self, volume: &VolumeKey, snapshot: &str) -> Result<VolumeSpec, EngineError>;
    /// As [`BlockEngine::read_piece`], of a snapshot.
    fn read_snapshot(
        &self,
        volume: &VolumeKey,
        snapshot: &str,
        offset_bytes: u64,
        max_bytes: u64,
    ) -> impl Future<Output = Result<ReadPiece, EngineError>> + Send;
    /// Begins a run of a group in delta mode. A group is named by itself or by one of its volumes.
    fn start_delta(&self, group: &str) -> impl Future<Output = Result<v1::StartDeltaResponse, EngineError>> + Send;
    /// Aborts the open run of a group.
    fn abort_delta(&self, group: &str) -> impl Future<Output = Result<v1::AbortRunResponse, EngineError>> + Send;
    /// Forces a group into delta mode, or leaves its mode to the policy again.
    fn force_delta(
        &self,
        group: &str,
        forced: bool,
    ) -> impl Future<Output = Result<v1::SetModeResponse, EngineError>> + Send;
    /// The mode policy.
    fn policy(&self) -> PolicyInForce;
    /// Puts a policy in force, free of contradictions, from the next weighing on.
    fn set_policy(&self, policy: PolicyConfig);
    /// The last weighing of a group, or of every group, and up to `limit` decisions that changed something.
    fn explain(&self, group: Option<&str>, limit: usize) -> Result<Vec<v1::GroupExplanation>, EngineError>;
    /// Begins a scrub on both sides, of a volume or of everything, or tells how it is doing.
    fn scrub(
        &self,
        volume: Option<VolumeKey>,
        start: bool,
    ) -> impl Future<Output = Result<v1::ScrubResponse, EngineError>> + Send;
    /// Compares both sides, of a volume or of everything; the first error ends it.
    fn verify(&self, volume: Option<VolumeKey>, repair: bool) -> Result<VerifyStream, EngineError>;
    /// Another primary wants to attach: what it is to be told. If its generation follows this one's, this one is over.
    fn refuse_primary(&self, request: v1::AttachRequest) -> impl Future<Output = tonic::Status> + Send;
    /// Makes this directory that of a backup; [`BlockEngine::failed`] resolves then.
    fn demote(
        &self,
        request: v1::DemoteRequest,
    ) -> impl Future<Output = Result<v1::DemoteResponse, EngineError>> + Send;
    /// Gives up the changes of this side after a split; [`BlockEngine::failed`] resolves then.
    fn resolve(&self) -> Result<v1::ResolveSplitBrainResponse, EngineError>;
    /// Extends the lease of this generation.
    fn renew_lease(&self, generation: u64) -> Result<v1::RenewLeaseResponse, EngineError>;
    /// What is acknowledged here and not on the backup, of one volume or of all; also when nothing is served any more.
    fn unshipped(&self, volume: Option<&str>) -> Result<Vec<UnshippedVolume>, EngineError>;
    /// Reads whole blocks of that.
    fn read_unshipped(
        &self,
        spec: &VolumeSpec,
        first_block: u64,
        count: u64,
    ) -> impl Future<Output = Result<Bytes, EngineError>> + Send;
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
