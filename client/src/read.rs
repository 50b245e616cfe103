//! Long reads: chunks in ascending order, checked for gaps and checksums.

use std::ops::Range;

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Status, Streaming};
use understudy_proto::v1::{
    Position, ReadBlocksRequest, ReadBlocksResponse, ReadImageRequest, ReadImageResponse, read_blocks_response,
    read_image_response,
};

use crate::backoff::Backoff;
use crate::client::{Client, Repeat};
use crate::error::{ClientError, is_loss};

/// What a range holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Bytes, their checksum already checked.
    Data(Bytes),
    /// So many bytes of zeros that were never written or were discarded.
    Zeros(u64),
}

/// A piece of a long read.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// Where it starts.
    pub offset_bytes: u64,
    /// What it holds.
    pub content: Content,
    /// The position of the image it was read from.
    pub position: Position,
    /// Size of the volume in that image; known for reads of a backup only.
    pub volume_size_bytes: Option<u64>,
}

impl Content {
    /// How many bytes of the volume it covers.
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeros(count) => *count,
        }
    }
}

/// Chunks of a range in ascending order without gaps. Ends after the last byte of the range.
///
/// A read of the primary's head goes on after a broken connection. A read of a backup's image does not: all of it is of
/// one position, which a second call may not have.
#[derive(Debug)]
pub struct ReadStream {
    client: Client,
    source: Source,
    next: u64,
    /// `None`: to the end of the volume, known from the first chunk of an image.
    end: Option<u64>,
    answers: Option<Answers>,
    done: bool,
}

#[derive(Debug)]
enum Source {
    Head {
        volume_id: u64,
    },
    /// A snapshot on the primary: as the head, it can be read on after a loss.
    Snapshot {
        volume: String,
        snapshot: String,
    },
    Image {
        volume: String,
        snapshot: String,
    },
}

#[derive(Debug)]
enum Answers {
    Head(Streaming<ReadBlocksResponse>),
    Image(Streaming<ReadImageResponse>),
}

impl ReadStream {
    pub(crate) fn of_head(client: Client, volume_id: u64, range: Range<u64>) -> Self {
        let done = range.is_empty();
        Self {
            client,
            source: Source::Head { volume_id },
            next: range.start,
            end: Some(range.end),
            answers: None,
            done,
        }
    }

    pub(crate) fn of_snapshot(client: Client, volume: String, snapshot: String, range: Range<u64>) -> Self {
        let (done, next, end) = (range.is_empty(), range.start, Some(range.end));
        Self { client, source: Source::Snapshot { volume, snapshot }, next, end, answers: None, done }
    }

    pub(crate) fn of_image(client: Client, volume: String, snapshot: String, range: Range<u64>) -> Self {
        let end = (!range.is_empty()).then_some(range.end);
        Self { client, source: Source::Image { volume, snapshot }, next: range.start, end, answers: None, done: false }
    }

    /// The next chunk; `None` after the last byte of the range.
    ///
    /// # Errors
    /// What the server refused, a bad checksum, a gap, or the loss of the server.
    pub async fn next(&mut self) -> Result<Option<Chunk>, ClientError> {
        let config = self.client.config().clone();
        let mut backoff = Backoff::new(config.backoff_min, config.backoff_max);
        let start = Instant::now();
        while !self.done {
            let status = match self.receive().await? {
                Ok(Some(chunk)) => return self.accept(chunk).map(Some),
                Ok(None) => return self.ended().map(|()| None),
                Err(status) => status,
            };
            self.answers = None;
            let pause = backoff.next();
            let resumable = matches!(self.source, Source::Head { .. } | Source::Snapshot { .. });
            if !resumable || !is_loss(&status) || start.elapsed() + pause > config.retry_for {
                self.done = true;
                return Err(ClientError::rpc("ReadBlocks", status));
            }
            sleep(pause).await;
        }
        Ok(None)
    }

    async fn receive(&mut self) -> Result<Result<Option<Chunk>, Status>, ClientError> {
        if self.answers.is_none() {
            self.answers = Some(self.open().await?);
        }
        let silence_max = self.client.config().request_timeout;
        let message = async {
            match &mut self.answers {
                Some(Answers::Head(stream)) => Ok(stream.message().await?.map(chunk_of_head)),
                Some(Answers::Image(stream)) => Ok(stream.message().await?.map(chunk_of_image)),
                None => Ok(None),
            }
        };
        let answer = match timeout(silence_max, message).await {
            Ok(answer) => answer,
            Err(_) => Err(Status::unavailable(format!("no data for {silence_max:.1?}"))),
        };
        match answer {
            Ok(Some((chunk, crc))) => {
                if let Content::Data(data) = &chunk.content {
                    check_crc(chunk.offset_bytes, data, crc)?;
                }
                Ok(Ok(Some(chunk)))
            }
            Ok(None) => Ok(Ok(None)),
            Err(status) => Ok(Err(status)),
        }
    }

    async fn open(&self) -> Result<Answers, ClientError> {
        let offset_bytes = self.next;
        let length_bytes = self.end.map_or(0, |end| end - self.next);
        let (volume_id, volume, snapshot) = match &self.source {
            Source::Head { volume_id } => (*volume_id, String::new(), String::new()),
            Source::Snapshot { volume, snapshot } | Source::Image { volume, snapshot } => {
                (0, volume.clone(), snapshot.clone())
            }
        };
        // A long read outlives the bound of one request; silence is watched chunk by chunk.
        if let Source::Image { .. } = self.source {
            let message = ReadImageRequest { volume_id, volume, offset_bytes, length_bytes, chunk_bytes: 0, snapshot };
            let send = |mut request: tonic::Request<_>| {
                request.metadata_mut().remove("grpc-timeout");
                let mut backup = self.client.backup().service();
                async move { backup.read_blocks(request).await }
            };
            return self.client.call("ReadBlocks", Repeat::Safe, message, send).await.map(Answers::Image);
        }
        let message = ReadBlocksRequest { volume_id, volume, offset_bytes, length_bytes, chunk_bytes: 0, snapshot };
        let send = |mut request: tonic::Request<_>| {
            request.metadata_mut().remove("grpc-timeout");
            let mut blocks = self.client.blocks();
            async move { blocks.read_blocks(request).await }
        };
        self.client.call("ReadBlocks", Repeat::Safe, message, send).await.map(Answers::Head)
    }

    fn accept(&mut self, chunk: Chunk) -> Result<Chunk, ClientError> {
        if self.end.is_none() {
            self.end = chunk.volume_size_bytes;
        }
        let end = chunk.offset_bytes.checked_add(chunk.content.length_bytes());
        let in_range = end.is_some_and(|end| self.end.is_none_or(|limit| end <= limit));
        if chunk.offset_bytes != self.next || !in_range || chunk.content.length_bytes() == 0 {
            self.done = true;
            let (from, length) = (chunk.offset_bytes, chunk.content.length_bytes());
            return Err(protocol(format!("{length} bytes at {from} where {} was next", self.next)));
        }
        self.next = end.unwrap_or(self.next);
        self.done = self.end == Some(self.next);
        Ok(chunk)
    }

    fn ended(&mut self) -> Result<(), ClientError> {
        self.done = true;
        match self.end {
            Some(end) if end != self.next => Err(protocol(format!("it ended at {} instead of {end}", self.next))),
            _ => Ok(()),
        }
    }
}

fn protocol(reason: String) -> ClientError {
    ClientError::Protocol { operation: "ReadBlocks", reason }
}

fn chunk_of_head(response: ReadBlocksResponse) -> (Chunk, u32) {
    let content = match response.content {
        Some(read_blocks_response::Content::Data(data)) => Content::Data(data),
        Some(read_blocks_response::Content::ZeroBytes(count)) => Content::Zeros(count),
        None => Content::Zeros(0),
    };
    let position = response.position.unwrap_or_default();
    let offset_bytes = response.offset_bytes;
    (Chunk { offset_bytes, content, position, volume_size_bytes: None }, response.crc32c)
}

fn chunk_of_image(response: ReadImageResponse) -> (Chunk, u32) {
    let content = match response.content {
        Some(read_image_response::Content::Data(data)) => Content::Data(data),
        Some(read_image_response::Content::ZeroBytes(count)) => Content::Zeros(count),
        None => Content::Zeros(0),
    };
    let position = response.position.unwrap_or_default();
    let (offset_bytes, size) = (response.offset_bytes, response.volume_size_bytes);
    (Chunk { offset_bytes, content, position, volume_size_bytes: (size > 0).then_some(size) }, response.crc32c)
}

pub(crate) fn check_crc(offset_bytes: u64, data: &[u8], expected: u32) -> Result<(), ClientError> {
    let found = crate::crc32c(data);
    if found == expected { Ok(()) } else { Err(ClientError::Checksum { offset_bytes, expected, found }) }
}
