//! Everything the node refuses, and the one map of it to canonical gRPC codes.

use thiserror::Error;
use tonic::{Code, Status};
use understudy_common::types::Uid;
use understudy_proto::convert::InvalidField;

use crate::receiver::AttachRefusal;

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
    /// The primary may not open a session.
    #[error("{0}")]
    Attach(#[from] AttachRefusal),
    /// A frame of a session that another has replaced.
    #[error("session {session} is over; attach again")]
    OldSession {
        /// Of the frame.
        session: Uid,
    },
    /// A frame was not taken: one before it is missing, or it is damaged.
    #[error("{why}; attach again")]
    Frame {
        /// What is wrong with it.
        why: String,
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
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::Attach(_) => Code::FailedPrecondition,
            Self::OldSession { .. } | Self::Frame { .. } => Code::Aborted,
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
