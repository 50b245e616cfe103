//! Everything the node refuses, and the one map of it to canonical gRPC codes.

use thiserror::Error;
use tonic::{Code, Status};
use understudy_common::types::Uid;
use understudy_proto::{
    convert::{self, InvalidField},
    pool::PoolRefusal,
};

use crate::{receiver::AttachRefusal, run_receiver::RunRefusal};

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
    /// A part of a run that is not open any more.
    #[error("{why}; begin the run again, or another one")]
    Run {
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
    /// No such group.
    #[error("group {group} is not known on the backup, nor a volume of that name; GetStatus shows those that are")]
    NoGroup {
        /// As it was asked for.
        group: String,
    },
    /// No such snapshot.
    #[error("the backup holds no snapshot {snapshot} of volume {volume}; ListSnapshots shows those it holds")]
    NoSnapshot {
        /// Name of the volume.
        volume: String,
        /// Name of the snapshot.
        snapshot: String,
    },
    /// Only clones are written, and read by this service.
    #[error(
        "this is a backup, and volume {volume} is its copy of the primary's, which nobody else writes: write to the \
         primary, make a clone of it (`understudy clone create`), or read the image with BackupService"
    )]
    NotAClone {
        /// As it was asked for.
        volume: String,
    },
    /// No such clone.
    #[error("this is a backup, and has no clone {name}; ListClones shows those it has")]
    NoClone {
        /// As it was asked for.
        name: String,
    },
    /// The name is taken.
    #[error("the backup has a volume or a clone {name} already; choose another name")]
    CloneExists {
        /// The name.
        name: String,
    },
    /// There is no room for what is written to a clone.
    #[error("a clone gives way: {why}")]
    CloneSpace {
        /// With the numbers, and what to do.
        why: String,
    },
    /// A clone has become useless.
    #[error("clone {name}: {why}; discard it and make another one")]
    Clone {
        /// Its name.
        name: String,
        /// What has happened.
        why: String,
    },
    /// Not on a backup.
    #[error("this is a backup, which follows its primary: ask the primary, or promote this side")]
    IsBackup,
    /// Larger than the server takes.
    #[error("{bytes} bytes are more than the limit of {limit_bytes} (limits.message); ask for less or raise the limit")]
    TooLarge {
        /// Of the request.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// A promotion while the primary is there, or may be.
    #[error(
        "{why}; {bytes_at_risk} bytes that it acknowledged are not here as of {heard_seconds} s ago and would be lost: \
         stop it first, or hand over with `understudy switchover`, or force the promotion"
    )]
    PrimaryServes {
        /// What says so.
        why: String,
        /// As of the last heartbeat.
        bytes_at_risk: u64,
        /// The age of that.
        heard_seconds: u64,
    },
    /// A change of the pool, or a question about it, was refused.
    #[error("{why}")]
    Pool {
        /// The canonical code.
        code: Code,
        /// What happened and what to do.
        why: String,
    },
    /// The role cannot change so.
    #[error("{0}")]
    Role(String),
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

impl From<PoolRefusal> for NodeError {
    fn from(PoolRefusal { code, why }: PoolRefusal) -> Self {
        Self::Pool { code, why }
    }
}

impl From<RunRefusal> for NodeError {
    fn from(refusal: RunRefusal) -> Self {
        match refusal {
            RunRefusal::OldSession(session) => Self::OldSession { session },
            RunRefusal::Invalid(error) => error.into(),
            RunRefusal::Gap { .. } | RunRefusal::Unsealed | RunRefusal::Damaged { .. } => {
                Self::Frame { why: refusal.to_string() }
            }
            RunRefusal::NotOpen { .. } | RunRefusal::Cannot(_) => Self::Run { why: refusal.to_string() },
            RunRefusal::Busy(_) => Self::Busy { why: refusal.to_string() },
            RunRefusal::Store(error) => Self::Storage { message: error.to_string() },
            RunRefusal::Unreadable(message) => Self::Storage { message },
        }
    }
}

impl NodeError {
    /// The canonical code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Pool { code, .. } => *code,
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::Attach(_)
            | Self::PrimaryServes { .. }
            | Self::Role(_)
            | Self::NotAClone { .. }
            | Self::Clone { .. }
            | Self::IsBackup => Code::FailedPrecondition,
            Self::OldSession { .. } | Self::Frame { .. } | Self::Run { .. } => Code::Aborted,
            Self::OutOfRange { .. } => Code::OutOfRange,
            Self::NoVolume { .. } | Self::NoGroup { .. } | Self::NoSnapshot { .. } | Self::NoClone { .. } => {
                Code::NotFound
            }
            Self::CloneExists { .. } => Code::AlreadyExists,
            Self::TooLarge { .. } | Self::CloneSpace { .. } => Code::ResourceExhausted,
            Self::Busy { .. } | Self::Draining => Code::Unavailable,
            Self::Damaged { .. } => Code::DataLoss,
            Self::Storage { .. } => Code::Internal,
        }
    }
}

impl From<NodeError> for Status {
    fn from(error: NodeError) -> Self {
        let details = match &error {
            NodeError::Attach(AttachRefusal::OldGeneration { history, .. }) => {
                convert::attach_refused("superseded", history)
            }
            NodeError::Attach(AttachRefusal::Fork { history, .. }) => convert::attach_refused("split_brain", history),
            NodeError::Attach(AttachRefusal::Ahead { history, .. } | AttachRefusal::Copy { history, .. }) => {
                convert::attach_refused(convert::OLD_COPY, history)
            }
            _ => Default::default(),
        };
        Self::with_details(error.code(), error.to_string(), details)
    }
}
