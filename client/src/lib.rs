//! Understudy's Rust client: reconnect, retry by sequence, flow control.
//!
//! ```no_run
//! # async fn example() -> Result<(), understudy_client::ClientError> {
//! use understudy_client::{Client, ClientConfig};
//!
//! let client = Client::connect(ClientConfig::new("http://127.0.0.1:7400")).await?;
//! let volume = client.volume("data").await?;
//! let stream = volume.write_stream();
//! let first = stream.write(0, vec![1; 4096].into()).await?;
//! let second = stream.write(4096, vec![2; 4096].into()).await?;
//! println!("durable at {:?}", first.await?.position);
//! second.await?;
//! stream.finish().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Invariants:
//! - A write is applied at most once, however often the connection breaks: each carries the client's id and a sequence,
//!   and is repeated with the same ones.
//! - The writes of one [`WriteStream`] take effect in the order in which they were submitted.
//! - Only what cannot change the outcome is repeated (see [`Client`]).
//! - Data is covered by a CRC32C from [`VolumeHandle::write`] on, and checked on every read.
//! - What is in flight is bounded by bytes and by count.
//!
//! Deliberately absent: a cache, a choice between several primaries, and retries of a write that the server refused.

mod backoff;
mod client;
mod config;
mod error;
mod read;
mod sequence;
mod services;
mod stream;
mod volume;

pub use client::Client;
pub use config::{ClientConfig, TlsFiles};
pub use error::ClientError;
pub use read::{Chunk, Content, ReadStream};
pub use services::{BackupClient, EventStream, ReplicationClient, VerifyStream, VolumeClient};
pub use stream::{PendingWrite, WriteStream, WriteStreamConfig};
pub use volume::{VolumeHandle, Written};

/// The protocol's own types.
pub use understudy_proto::v1 as proto;

/// CRC32C (Castagnoli) of `data`.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "the algorithm has 32 bits")]
pub fn crc32c(data: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, data) as u32
}
