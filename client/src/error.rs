//! What can go wrong, and what is known about the outcome when it does.

use std::error::Error as _;
use std::time::Duration;

use tonic::{Code, Status};

/// Why an operation of the client failed. Cheap to clone: one loss of the server can answer many writes.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The URL or a setting cannot be used.
    #[error("{setting} \"{value}\" cannot be used: {reason}")]
    Config {
        /// Name of the setting.
        setting: &'static str,
        /// What was given.
        value: String,
        /// Why not, and what would do.
        reason: String,
    },
    /// No connection within the time allowed.
    #[error(
        "cannot reach {url} (tried for {waited:.1?}): {reason}; check that the service runs and the address is right"
    )]
    Unreachable {
        /// Where to.
        url: String,
        /// How long was tried.
        waited: Duration,
        /// The last attempt's error.
        reason: String,
    },
    /// The server refused a request, or its answer was lost.
    #[error("{operation} failed: {}", describe(status))]
    Rpc {
        /// Name of the RPC.
        operation: &'static str,
        /// The server's answer or the transport's error.
        status: Box<Status>,
    },
    /// The server refused one write of a stream. The stream goes on.
    #[error("write {sequence} of {length_bytes} bytes at {offset_bytes} was refused: {message} ({code:?})")]
    Refused {
        /// Sequence of the write.
        sequence: u64,
        /// Its offset.
        offset_bytes: u64,
        /// Its length.
        length_bytes: u64,
        /// Canonical gRPC code. `Unavailable` leaves the outcome open.
        code: Code,
        /// The server's words.
        message: String,
    },
    /// The write was sent and no answer came: it may or may not have been applied.
    #[error(
        "write {sequence} of {length_bytes} bytes at {offset_bytes} has an unknown outcome: {reason}; read the range \
         back, or write it again, before relying on it"
    )]
    OutcomeUnknown {
        /// Sequence of the write.
        sequence: u64,
        /// Its offset.
        offset_bytes: u64,
        /// Its length.
        length_bytes: u64,
        /// Why no answer came.
        reason: String,
    },
    /// The write never left this process: it was not applied.
    #[error("write {sequence} of {length_bytes} bytes at {offset_bytes} was not sent: {reason}")]
    NotSent {
        /// Sequence of the write.
        sequence: u64,
        /// Its offset.
        offset_bytes: u64,
        /// Its length.
        length_bytes: u64,
        /// What stopped the stream.
        reason: String,
    },
    /// A write stream ended without an answer to all its writes.
    #[error(
        "the write stream gave up: {reason}; {unknown} writes from sequence {first} on may or may not have been \
         applied, {not_sent} were not sent; read back what they cover, then open a new stream"
    )]
    GaveUp {
        /// Sequence of the oldest write without an answer; 0 if there is none.
        first: u64,
        /// How many have an unknown outcome; their sequences follow each other from `first` on.
        unknown: u64,
        /// How many behind those never left this process.
        not_sent: u64,
        /// What ended the stream.
        reason: String,
    },
    /// A write is larger than a message or than the stream's bound of bytes.
    #[error("a write of {length_bytes} bytes is above the limit of {limit_bytes}; split it, or raise {setting}")]
    TooLarge {
        /// Size of the write.
        length_bytes: u64,
        /// The bound.
        limit_bytes: u64,
        /// The setting behind it.
        setting: &'static str,
    },
    /// Data arrived with another checksum than it was sent with.
    #[error(
        "data read at {offset_bytes} has CRC32C {found:08x} instead of {expected:08x}; read it again, and check \
         memory and network if it repeats"
    )]
    Checksum {
        /// Where.
        offset_bytes: u64,
        /// What came with the data.
        expected: u32,
        /// What the data has.
        found: u32,
    },
    /// The server's answer breaks the protocol.
    #[error("{operation} got an answer outside the protocol: {reason}; client and server may be of different versions")]
    Protocol {
        /// Name of the RPC.
        operation: &'static str,
        /// What was wrong.
        reason: String,
    },
}

impl ClientError {
    /// The canonical code, where a server or the transport gave one.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Rpc { status, .. } => Some(status.code()),
            Self::Refused { code, .. } => Some(*code),
            Self::Unreachable { .. } => Some(Code::Unavailable),
            _ => None,
        }
    }

    pub(crate) fn rpc(operation: &'static str, status: Status) -> Self {
        Self::Rpc { operation, status: Box::new(status) }
    }
}

/// The request did not reach a server: repeating it is safe, whatever it is.
pub(crate) fn was_not_sent(status: &Status) -> bool {
    causes(status).any(|cause| cause.is::<tonic::ConnectError>())
}

/// The server is away or the connection broke. The request may have been carried out.
///
/// A status with a source was made on this side by the transport; one from the server has none.
pub(crate) fn is_loss(status: &Status) -> bool {
    status.code() == Code::Unavailable || status.source().is_some()
}

/// The server's words; for an error of the transport, whose own message says little, the innermost cause too.
pub(crate) fn describe(status: &Status) -> String {
    let message = if status.message().is_empty() { status.code().description() } else { status.message() };
    match causes(status).last() {
        Some(cause) if cause.to_string() != message => format!("{message}: {cause}"),
        Some(_) => message.to_owned(),
        None => format!("{message} ({:?})", status.code()),
    }
}

fn causes(status: &Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(status.source(), |cause| (*cause).source())
}
