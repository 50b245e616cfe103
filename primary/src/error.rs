//! Everything the engine refuses, and the one map of it to canonical gRPC codes.

use thiserror::Error;
use tonic::{Code, Status};
use understudy_common::store::OverLevel;
use understudy_proto::{convert::InvalidField, pool::PoolRefusal};

/// Why a request was not carried out. Each message names the value, the limit and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EngineError {
    /// A field makes no sense.
    #[error("{field}: {why}")]
    Invalid {
        /// Its name in the `.proto` file.
        field: &'static str,
        /// What is wrong and what is allowed.
        why: String,
    },
    /// The data is not what the client says it sent.
    #[error(
        "crc32c: the data has {found:#010x}, the request says {expected:#010x}; nothing was written, send it again"
    )]
    Checksum {
        /// Of the request.
        expected: u32,
        /// Of its data.
        found: u32,
    },
    /// The range ends behind the volume.
    #[error(
        "range [{offset_bytes}, +{length_bytes}) is outside of volume {volume} of {size_bytes} bytes; stay inside or \
         resize it"
    )]
    OutOfRange {
        /// Name of the volume.
        volume: String,
        /// Of the request.
        offset_bytes: u64,
        /// Of the request.
        length_bytes: u64,
        /// Of the volume.
        size_bytes: u64,
    },
    /// No such volume.
    #[error("volume {volume} does not exist; ListVolumes shows those that do")]
    NoVolume {
        /// Name or id, as it was asked for.
        volume: String,
    },
    /// No such group.
    #[error("group {group} does not exist, nor does a volume of that name; ListGroups shows those that do")]
    NoGroup {
        /// As it was asked for.
        group: String,
    },
    /// The mode of a group, or a run, does not allow it now.
    #[error("group {group} is in phase {phase}: {why}")]
    WrongPhase {
        /// Its name.
        group: String,
        /// Its phase.
        phase: &'static str,
        /// What does not go, and what to do.
        why: String,
    },
    /// No such snapshot.
    #[error("{group} has no snapshot {snapshot}; ListSnapshots shows those there are")]
    NoSnapshot {
        /// Its group or volume.
        group: String,
        /// Name or id.
        snapshot: String,
    },
    /// The name of a snapshot is taken.
    #[error("group {group} has a snapshot {snapshot}; choose another name or delete it first")]
    SnapshotExists {
        /// Its group.
        group: String,
        /// Its name.
        snapshot: String,
    },
    /// A snapshot cannot be taken, deleted or used now.
    #[error("{group}: {why}")]
    Snapshot {
        /// Its group or volume.
        group: String,
        /// What does not go, and what to do.
        why: String,
    },
    /// The volume is being filled.
    #[error("volume {volume} is being filled from a snapshot; try again when that is done")]
    Restoring {
        /// Its name.
        volume: String,
    },
    /// The name is taken.
    #[error("volume {volume} exists; choose another name or delete it first")]
    VolumeExists {
        /// Its name.
        volume: String,
    },
    /// Larger than the server takes.
    #[error(
        "{bytes} bytes are more than the limit of {limit_bytes} (limits.message); split the request or raise the limit"
    )]
    TooLarge {
        /// Of the request.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The pool has no room for the write.
    #[error(
        "the pool has {free_bytes} bytes free and {needed_bytes} are needed; discard or delete volumes, or add a device \
         with `understudy pool add`"
    )]
    NoSpace {
        /// Worst case of the request.
        needed_bytes: u64,
        /// Not allocated and not reserved.
        free_bytes: u64,
    },
    /// More of the pool is in use than clients may take.
    #[error(transparent)]
    Level(#[from] OverLevel),
    /// A change of the pool, or a question about it, was refused.
    #[error("{why}")]
    Pool {
        /// The canonical code.
        code: Code,
        /// What happened and what to do.
        why: String,
    },
    /// No permit of bytes became free in time.
    #[error(
        "{in_flight_bytes} bytes are in flight and {bytes} more found no room (limits.in_flight) within {waited_ms} ms \
         (limits.queue_wait); try again later"
    )]
    Busy {
        /// Of the request.
        bytes: u64,
        /// Of all clients.
        in_flight_bytes: u64,
        /// How long it waited.
        waited_ms: u64,
    },
    /// The journal is full of records that the backup has not taken.
    #[error(
        "the journal holds {span_bytes} of {capacity_bytes} bytes (staging.capacity) and found no room within \
         {waited_ms} ms; the backup is away or slow: see the link in GetStatus"
    )]
    StagingFull {
        /// From the oldest retained record to the head.
        span_bytes: u64,
        /// The bound.
        capacity_bytes: u64,
        /// How long it waited.
        waited_ms: u64,
    },
    /// The lane of the write holds its share of the journal.
    #[error(
        "lane {lane} holds {held_bytes} bytes that the backup has not taken, of {share_bytes} that are its share of \
         staging.capacity, and found no room within {waited_ms} ms; wait for its pace, or raise the pace or the share in \
         lanes.classes"
    )]
    LaneFull {
        /// Its name.
        lane: String,
        /// What it retains.
        held_bytes: u64,
        /// What it may.
        share_bytes: u64,
        /// How long the write waited.
        waited_ms: u64,
    },
    /// A client's number is older than what is remembered of it.
    #[error(
        "sequence {sequence} of client {client} is {window} or more behind {newest}, its newest; whether it was applied \
         is not known any more"
    )]
    SequenceTooOld {
        /// The client.
        client: String,
        /// Of the request.
        sequence: u64,
        /// The newest of the client.
        newest: u64,
        /// How many are remembered.
        window: u64,
    },
    /// A client's number was used for another write.
    #[error("sequence {sequence} of client {client} was used for another write; take a new one for each write")]
    SequenceReused {
        /// The client.
        client: String,
        /// Of the request.
        sequence: u64,
    },
    /// A volume is not made smaller.
    #[error("volume {volume} is not made smaller: {why}")]
    Shrink {
        /// Its name.
        volume: String,
        /// What is in the way, and what to do.
        why: String,
    },
    /// The node is not, or no longer, the primary.
    #[error("{why}; send the request to the primary of generation {generation}")]
    Fenced {
        /// What it is instead.
        why: String,
        /// The newest generation it knows.
        generation: u64,
    },
    /// No lease holds: the other side may serve.
    #[error(
        "the lease of this primary is over or was never granted ([lease] mode = required): whoever decides which side \
         serves renews it with RenewLease; the outcome of a write that waited is unknown"
    )]
    NoLease,
    /// A change of role, or of the lease, that does not fit.
    #[error("{why}")]
    Role {
        /// What is in the way, and what to do.
        why: String,
    },
    /// A `both` volume that blocks while the backup is away.
    #[error(
        "volume {volume} acknowledges on both sides and the backup is away ({link}); wait for it, or let it go on alone \
         with the away rule DEGRADE"
    )]
    BackupAway {
        /// Its name.
        volume: String,
        /// Why the link is down.
        link: String,
    },
    /// What needs both sides finds one.
    #[error("the backup is away ({link}); wait until it is attached, see the link in GetStatus")]
    NoBackup {
        /// Why the link is down.
        link: String,
    },
    /// Journaled here, not confirmed there before the deadline.
    #[error(
        "the write has LSN {lsn} here, and the backup did not confirm it within {waited_ms} ms: its outcome is unknown; \
         repeat it with the same client_id and sequence"
    )]
    Unconfirmed {
        /// Of the record.
        lsn: u64,
        /// How long it waited.
        waited_ms: u64,
    },
    /// The service ends.
    #[error("draining; connect again in a moment")]
    Draining,
    /// The volume or the group was deleted, or its session was replaced, while the request waited.
    #[error("{why} while the request waited; look at the volume and try again")]
    Superseded {
        /// What happened.
        why: String,
    },
    /// A block cannot be read back as it was written.
    #[error(
        "block {block} of volume {volume} is damaged; it is repaired within seconds if the backup is attached and holds \
         the same version, otherwise write it anew or restore it"
    )]
    Damaged {
        /// Its name.
        volume: String,
        /// Number of the block.
        block: u64,
    },
    /// The disk failed; the node refuses work until it is started again.
    #[error("storage failed: {message}; the node stops, start it again after the disk was checked")]
    Storage {
        /// What failed.
        message: String,
    },
}

impl From<InvalidField> for EngineError {
    fn from(error: InvalidField) -> Self {
        Self::Invalid { field: error.field, why: error.why }
    }
}

impl From<PoolRefusal> for EngineError {
    fn from(PoolRefusal { code, why }: PoolRefusal) -> Self {
        Self::Pool { code, why }
    }
}

impl EngineError {
    /// The canonical code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } | Self::Checksum { .. } => Code::InvalidArgument,
            Self::OutOfRange { .. } => Code::OutOfRange,
            Self::NoVolume { .. } | Self::NoGroup { .. } | Self::NoSnapshot { .. } => Code::NotFound,
            Self::VolumeExists { .. } | Self::SnapshotExists { .. } => Code::AlreadyExists,
            Self::TooLarge { .. }
            | Self::NoSpace { .. }
            | Self::Level(_)
            | Self::Busy { .. }
            | Self::StagingFull { .. }
            | Self::LaneFull { .. } => Code::ResourceExhausted,
            Self::SequenceTooOld { .. }
            | Self::SequenceReused { .. }
            | Self::Shrink { .. }
            | Self::Fenced { .. }
            | Self::Snapshot { .. }
            | Self::Restoring { .. }
            | Self::NoLease
            | Self::Role { .. }
            | Self::WrongPhase { .. } => Code::FailedPrecondition,
            Self::BackupAway { .. } | Self::NoBackup { .. } | Self::Unconfirmed { .. } | Self::Draining => {
                Code::Unavailable
            }
            Self::Pool { code, .. } => *code,
            Self::Superseded { .. } => Code::Aborted,
            Self::Damaged { .. } => Code::DataLoss,
            Self::Storage { .. } => Code::Internal,
        }
    }
}

impl From<EngineError> for Status {
    fn from(error: EngineError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
