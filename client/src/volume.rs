//! The blocks of one volume.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use understudy_proto::v1::{
    DiscardRequest, Durability, FlushRequest, FlushResponse, Mode, Position, ReadBlockRequest, Volume,
    WriteBlockRequest, WriteBlockResponse, WriteZeroesRequest,
};

use crate::client::{Client, Repeat};
use crate::error::ClientError;
use crate::read::{Content, ReadStream, check_crc};
use crate::stream::{WriteStream, WriteStreamConfig};

/// Reads above this size go over a stream of chunks, so that neither side holds more than a chunk of it at once.
const UNARY_READ_BYTES_MAX: u64 = 1 << 20;

/// How a write was acknowledged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Written {
    /// Where the write stands in the history of its group.
    pub position: Position,
    /// The group's mode at that moment.
    pub mode: Mode,
    /// Where it was durable at that moment.
    pub durability: Durability,
    /// An earlier sending of the same write had been applied; this one changed nothing.
    pub duplicate: bool,
}

impl From<WriteBlockResponse> for Written {
    fn from(response: WriteBlockResponse) -> Self {
        Self {
            position: response.position.unwrap_or_default(),
            mode: response.mode(),
            durability: response.durability(),
            duplicate: response.duplicate,
        }
    }
}

/// Access to one volume. Cheap to clone. Offsets and lengths are bytes; partial blocks are allowed.
#[derive(Debug, Clone)]
pub struct VolumeHandle {
    client: Client,
    volume: Volume,
}

impl VolumeHandle {
    pub(crate) fn new(client: Client, volume: Volume) -> Self {
        Self { client, volume }
    }

    /// The volume as it was when the handle was made.
    #[must_use]
    pub fn volume(&self) -> &Volume {
        &self.volume
    }

    /// Writes one range and waits until it is durable by the volume's rule. Repeated safely while the server is away.
    ///
    /// # Errors
    /// What the server refused, [`ClientError::TooLarge`], or the loss of the server: the outcome is then unknown.
    pub async fn write(&self, offset_bytes: u64, data: Bytes) -> Result<Written, ClientError> {
        let limit = self.client.config().payload_bytes_max();
        if data.len() > limit {
            let (length_bytes, limit_bytes) = (data.len() as u64, limit as u64);
            return Err(ClientError::TooLarge { length_bytes, limit_bytes, setting: "message_bytes_max" });
        }
        let sequence = self.client.sequences().next().await;
        let message = WriteBlockRequest {
            volume_id: self.volume.id,
            volume: String::new(),
            offset_bytes,
            crc32c: Some(crate::crc32c(&data)),
            data,
            client_id: self.client.config().client_id.clone(),
            sequence: sequence.number,
        };
        let send = |request| {
            let mut blocks = self.client.blocks();
            async move { blocks.write_block(request).await }
        };
        self.client.call("WriteBlock", Repeat::Safe, message, send).await.map(Into::into)
    }

    /// Reads one range whole; checked against the checksums it came with. The caller's memory is the only bound.
    ///
    /// # Errors
    /// What the server refused, a bad checksum, or the loss of the server.
    pub async fn read(&self, offset_bytes: u64, length_bytes: u64) -> Result<Bytes, ClientError> {
        if length_bytes > UNARY_READ_BYTES_MAX {
            return self.read_collected(offset_bytes, length_bytes).await;
        }
        let message = ReadBlockRequest { volume_id: self.volume.id, volume: String::new(), offset_bytes, length_bytes };
        let send = |request| {
            let mut blocks = self.client.blocks();
            async move { blocks.read_block(request).await }
        };
        let response = self.client.call("ReadBlock", Repeat::Safe, message, send).await?;
        if response.data.len() as u64 != length_bytes {
            let reason = format!("{} bytes instead of {length_bytes}", response.data.len());
            return Err(ClientError::Protocol { operation: "ReadBlock", reason });
        }
        check_crc(offset_bytes, &response.data, response.crc32c)?;
        Ok(response.data)
    }

    async fn read_collected(&self, offset_bytes: u64, length_bytes: u64) -> Result<Bytes, ClientError> {
        let Some(end) = offset_bytes.checked_add(length_bytes) else {
            let reason = "offset and length together are above 2^64; read inside the volume".to_owned();
            return Err(ClientError::Config {
                setting: "range",
                value: format!("{offset_bytes}+{length_bytes}"),
                reason,
            });
        };
        let mut stream = self.read_stream(offset_bytes..end);
        let mut whole = BytesMut::new();
        while let Some(chunk) = stream.next().await? {
            match chunk.content {
                Content::Data(data) => whole.extend_from_slice(&data),
                Content::Zeros(count) => {
                    let count = usize::try_from(count).map_err(|_| ClientError::TooLarge {
                        length_bytes,
                        limit_bytes: usize::MAX as u64,
                        setting: "the address space",
                    })?;
                    whole.resize(whole.len() + count, 0);
                }
            }
        }
        Ok(whole.freeze())
    }

    /// Reads a long range in ascending chunks; an empty range at 0 (`0..0`) reads the whole volume. After a broken
    /// connection it goes on where it was. Writes made meanwhile may or may not be seen.
    #[must_use]
    pub fn read_stream(&self, range: Range<u64>) -> ReadStream {
        let range = if range == (0..0) { 0..self.volume.size_bytes } else { range };
        ReadStream::of_head(self.client.clone(), self.volume.id, range)
    }

    /// Returns when everything acknowledged before is durable by the rule of the volume's group.
    ///
    /// # Errors
    /// What the server refused, or its loss.
    pub async fn flush(&self) -> Result<FlushResponse, ClientError> {
        let message = FlushRequest { volume_id: self.volume.id, volume: String::new() };
        let send = |request| {
            let mut blocks = self.client.blocks();
            async move { blocks.flush(request).await }
        };
        self.client.call("Flush", Repeat::Safe, message, send).await
    }

    /// Gives back the whole blocks inside the range; they read as zeros. Parts of blocks at its edges are left.
    ///
    /// # Errors
    /// What the server refused, or its loss: the outcome is then unknown.
    pub async fn discard(&self, offset_bytes: u64, length_bytes: u64) -> Result<Written, ClientError> {
        let sequence = self.client.sequences().next().await;
        let message = DiscardRequest {
            volume_id: self.volume.id,
            volume: String::new(),
            offset_bytes,
            length_bytes,
            client_id: self.client.config().client_id.clone(),
            sequence: sequence.number,
        };
        let send = |request| {
            let mut blocks = self.client.blocks();
            async move { blocks.discard(request).await }
        };
        self.client.call("Discard", Repeat::Safe, message, send).await.map(Into::into)
    }

    /// Makes the range read as zeros, to the byte.
    ///
    /// # Errors
    /// What the server refused, or its loss: the outcome is then unknown.
    pub async fn write_zeroes(&self, offset_bytes: u64, length_bytes: u64) -> Result<Written, ClientError> {
        let sequence = self.client.sequences().next().await;
        let message = WriteZeroesRequest {
            volume_id: self.volume.id,
            volume: String::new(),
            offset_bytes,
            length_bytes,
            client_id: self.client.config().client_id.clone(),
            sequence: sequence.number,
        };
        let send = |request| {
            let mut blocks = self.client.blocks();
            async move { blocks.write_zeroes(request).await }
        };
        self.client.call("WriteZeroes", Repeat::Safe, message, send).await.map(Into::into)
    }

    /// A stream for many writes in flight, with the default bounds.
    #[must_use]
    pub fn write_stream(&self) -> WriteStream {
        self.write_stream_with(WriteStreamConfig::default())
    }

    /// A stream for many writes in flight. Must be called inside a tokio runtime.
    #[must_use]
    pub fn write_stream_with(&self, config: WriteStreamConfig) -> WriteStream {
        WriteStream::start(self.client.clone(), self.volume.id, config)
    }
}
