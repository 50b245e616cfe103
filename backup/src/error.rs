//! Everything the node refuses, and the one map of it to canonical gRPC codes.

use thiserror::Error;
use tonic::{Code, Status};
use understudy_common::types::Uid;
use understudy_proto::convert::InvalidField;

/// Why a request was not carried out. Each message names the value, the limit and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NodeError {
    /// A field makes no sense.
    #[error("{field}: {why}")]
    Invalid {
        /// Its name in the `.proto` file.
        field: &'static str,
        /// What is wrong and what is allowed.
        why: String,
    },
    /// The two sides speak different versions of the protocol.
    #[error("protocol {found} is not spoken here, {supported} is; run the same version on both sides")]
    Protocol {
        /// The primary's.
        found: u32,
        /// Ours.
        supported: u32,
    },
    /// The directory belongs to another pair.
    #[error(
        "this backup belongs to pair {own}, the primary to pair {found}; give it an empty data_dir or the right backup.url"
    )]
    ForeignPair {
        /// Ours.
        own: Uid,
        /// The primary's.
        found: Uid,
    },
    /// The primary was superseded.
    #[error("generation {found} is over, {newest} began; the old primary must not write any more")]
    OldGeneration {
        /// The primary's.
        found: u64,
        /// The newest known here.
        newest: u64,
    },
    /// The backup holds what the primary does not.
    #[error(
        "the backup holds LSN {held} and the primary has {durable}: it lost acknowledged records or was restored from an \
         old copy; choose one of both sides"
    )]
    Ahead {
        /// The newest here.
        held: u64,
        /// The newest durable there.
        durable: u64,
    },
    /// The primary cannot ship what comes next here.
    #[error("the next record here is LSN {needed} and the primary keeps those from {oldest} on; start the backup anew")]
    Behind {
        /// Needed next.
        needed: u64,
        /// The oldest there.
        oldest: u64,
    },
    /// A frame of a session that another has replaced.
    #[error("session {session} is over; attach again")]
    OldSession {
        /// Of the frame.
        session: Uid,
    },
    /// A frame is missing or came twice.
    #[error("{what} {found} came where {expected} was next; attach again")]
    Gap {
        /// Ship number or previous LSN.
        what: &'static str,
        /// That came.
        found: u64,
        /// That had to come.
        expected: u64,
    },
    /// The data is not what the primary journaled.
    #[error("block {block} of LSN {lsn} has CRC32C {found:#010x} instead of {expected:#010x}; nothing was stored")]
    Checksum {
        /// Of the record.
        lsn: u64,
        /// Number of the block.
        block: u64,
        /// That the record names.
        expected: u32,
        /// Of its data.
        found: u32,
    },
    /// The range ends behind the volume.
    #[error("range [{offset_bytes}, +{length_bytes}) is outside of volume {volume} of {size_bytes} bytes; stay inside")]
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
    #[error("volume {volume} is not known on the backup; GetStatus shows those that are")]
    NoVolume {
        /// Name or id, as it was asked for.
        volume: String,
    },
    /// Larger than the server takes.
    #[error("{bytes} bytes are more than the limit of {limit_bytes} (limits.message); ask for less or raise the limit")]
    TooLarge {
        /// Of the request.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The session before has not drained, or too many readers are open.
    #[error("{why}; try again in a moment")]
    Busy {
        /// What is in the way.
        why: String,
    },
    /// The service ends.
    #[error("draining; connect again in a moment")]
    Draining,
    /// A block cannot be read back as it was written.
    #[error("block {block} of volume {volume} is damaged on the backup and no good copy was found")]
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

impl From<InvalidField> for NodeError {
    fn from(error: InvalidField) -> Self {
        Self::Invalid { field: error.field, why: error.why }
    }
}

impl NodeError {
    /// The canonical code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } | Self::Checksum { .. } => Code::InvalidArgument,
            Self::Protocol { .. }
            | Self::ForeignPair { .. }
            | Self::OldGeneration { .. }
            | Self::Ahead { .. }
            | Self::Behind { .. }
            | Self::Gap { .. } => Code::FailedPrecondition,
            Self::OldSession { .. } => Code::Aborted,
            Self::OutOfRange { .. } => Code::OutOfRange,
            Self::NoVolume { .. } => Code::NotFound,
            Self::TooLarge { .. } => Code::ResourceExhausted,
            Self::Busy { .. } | Self::Draining => Code::Unavailable,
            Self::Damaged { .. } => Code::DataLoss,
            Self::Storage { .. } => Code::Internal,
        }
    }
}

impl From<NodeError> for Status {
    fn from(error: NodeError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
