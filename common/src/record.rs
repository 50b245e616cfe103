//! The record: every durable change of state, as the journal and the stream carry it.
//!
//! A record is a small *head* and, for writes whose bytes lie in the journal, the *data*. Data is covered by the CRC32C
//! of each of its blocks: they are computed at the client's edge and stay with the block down to the disk of the
//! backup. The head, which holds them, is covered by the journal's own checksum. Layout: `docs/formats.md`, "Record".

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use thiserror::Error;

use crate::{
    checksum::crc32c,
    types::{
        AckRule, AwayRule, BlockRange, BlockSize, GroupId, LayerId, Lsn, Position, SegmentId, VolumeId, VolumeSpec,
    },
};

/// Longest client id in bytes.
pub const CLIENT_ID_BYTES_MAX: usize = 64;

/// A client's name and the number of its request: the same pair is applied at most once.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ClientSequence {
    /// 1 to [`CLIENT_ID_BYTES_MAX`] bytes.
    pub client: String,
    /// From 1.
    pub sequence: u64,
}

/// Where the bytes of a write are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteData {
    /// In the record.
    Inline(Bytes),
    /// In fresh segments of this node's pool, written and synced before the record was. The bytes may still be in
    /// memory.
    Segments(Vec<SegmentId>, Option<Bytes>),
}

/// What a record changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// After-images of whole blocks.
    Write {
        /// The volume.
        volume: VolumeId,
        /// First block.
        first_block: u64,
        /// Size of a block.
        block_size: BlockSize,
        /// CRC32C of each block.
        crcs: SmallVec<[u32; 2]>,
        /// The blocks.
        data: WriteData,
    },
    /// The blocks read as zeros and give their space back.
    Zero(BlockRange),
    /// Changes of the catalogue.
    Control(Control),
}

/// Changes of the catalogue: rare, so they are JSON in the head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Control {
    /// A new volume.
    CreateVolume {
        /// All of it.
        spec: VolumeSpec,
    },
    /// A larger size.
    ResizeVolume {
        /// The volume.
        volume: VolumeId,
        /// New size.
        size_bytes: u64,
    },
    /// The volume and its snapshots are gone; the id is never used again.
    DeleteVolume {
        /// The volume.
        volume: VolumeId,
    },
    /// When writes are acknowledged from here on.
    SetAckRule {
        /// The volume.
        volume: VolumeId,
        /// The rule.
        ack: AckRule,
        /// While the backup is away.
        away: AwayRule,
    },
    /// A snapshot of each volume of the group, internal to this node.
    CreateSnapshot {
        /// The layers to make.
        layers: Vec<(VolumeId, LayerId)>,
    },
    /// The snapshots are gone.
    DeleteSnapshot {
        /// Their layers.
        layers: Vec<LayerId>,
    },
    /// The heads go back to these newest snapshots.
    RollBack {
        /// The layers to go back to.
        layers: Vec<(VolumeId, LayerId)>,
    },
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its place in the primary's history; on the primary the LSN is the journal's own.
    pub position: Position,
    /// LSN of the record of the same group and lane before this one; 0 for the first.
    pub previous: Lsn,
    /// The group it belongs to.
    pub group: GroupId,
    /// The client priority it travels in.
    pub lane: u8,
    /// The primary's time, Unix milliseconds.
    pub time_unix_ms: i64,
    /// Whose request it was.
    pub client: Option<ClientSequence>,
    /// What it changes.
    pub op: Op,
}

/// A head that this version cannot read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Shorter than its fields.
    #[error("record head ends early: {0} bytes")]
    Short(usize),
    /// Not a kind this version knows.
    #[error("record kind {0} is unknown: was this journal written by a newer version?")]
    Kind(u8),
    /// A field holds a value that cannot be.
    #[error("record field {0} is invalid")]
    Field(&'static str),
    /// The data does not match the head.
    #[error("block {block} of the record has checksum {found:08x}, its head says {expected:08x}")]
    Checksum {
        /// Index in the record.
        block: usize,
        /// In the head.
        expected: u32,
        /// Of the bytes.
        found: u32,
    },
}

const KIND_WRITE: u8 = 1;
const KIND_WRITE_SEGMENTS: u8 = 2;
const KIND_ZERO: u8 = 3;
const KIND_CONTROL: u8 = 4;
const FLAG_CLIENT: u8 = 1;
const PREFIX_BYTES: usize = 48;

impl Record {
    /// The head and the data, as the journal stores them.
    #[must_use]
    pub fn encode(&self) -> (Bytes, Bytes) {
        let mut head = BytesMut::with_capacity(PREFIX_BYTES + 40);
        let kind = match &self.op {
            Op::Write { data: WriteData::Inline(_), .. } => KIND_WRITE,
            Op::Write { data: WriteData::Segments(..), .. } => KIND_WRITE_SEGMENTS,
            Op::Zero(_) => KIND_ZERO,
            Op::Control(_) => KIND_CONTROL,
        };
        head.put_u8(kind);
        head.put_u8(if self.client.is_some() { FLAG_CLIENT } else { 0 });
        head.put_u8(self.lane);
        head.put_bytes(0, 5);
        head.put_u64_le(self.position.generation);
        head.put_u64_le(self.position.lsn.0);
        head.put_u64_le(self.previous.0);
        head.put_u64_le(self.group.0);
        head.put_i64_le(self.time_unix_ms);
        if let Some(client) = &self.client {
            head.put_u64_le(client.sequence);
            head.put_u8(u8::try_from(client.client.len()).expect("checked at admission"));
            head.put_slice(client.client.as_bytes());
        }
        let data = match &self.op {
            Op::Write { volume, first_block, block_size, crcs, data } => {
                head.put_u64_le(volume.0);
                head.put_u64_le(*first_block);
                head.put_u32_le(block_size.bytes());
                head.put_u32_le(u32::try_from(crcs.len()).expect("a message is far smaller than 2^32 blocks"));
                for crc in crcs {
                    head.put_u32_le(*crc);
                }
                match data {
                    WriteData::Inline(data) => data.clone(),
                    WriteData::Segments(segments, _) => {
                        for segment in segments {
                            head.put_u64_le(segment.0);
                        }
                        Bytes::new()
                    }
                }
            }
            Op::Zero(range) => {
                head.put_u64_le(range.volume.0);
                head.put_u64_le(range.first);
                head.put_u64_le(range.count);
                Bytes::new()
            }
            Op::Control(control) => {
                head.put_slice(&serde_json::to_vec(control).expect("plain data"));
                Bytes::new()
            }
        };
        (head.freeze(), data)
    }

    /// The record of a head and its data. Checks the data against the head.
    ///
    /// # Errors
    /// If the bytes are not those of a record.
    pub fn decode(head: &[u8], data: &Bytes) -> Result<Self, DecodeError> {
        let mut buf = head;
        let need = |buf: &[u8], n: usize| if buf.len() < n { Err(DecodeError::Short(head.len())) } else { Ok(()) };
        need(buf, PREFIX_BYTES)?;
        let (kind, flags, lane) = (buf.get_u8(), buf.get_u8(), buf.get_u8());
        buf.advance(5);
        let position = Position { generation: buf.get_u64_le(), lsn: Lsn(buf.get_u64_le()) };
        let previous = Lsn(buf.get_u64_le());
        let group = GroupId(buf.get_u64_le());
        let time_unix_ms = buf.get_i64_le();
        let client = if flags & FLAG_CLIENT != 0 {
            need(buf, 9)?;
            let sequence = buf.get_u64_le();
            let len = usize::from(buf.get_u8());
            need(buf, len)?;
            let name = std::str::from_utf8(&buf[..len]).map_err(|_| DecodeError::Field("client"))?.to_owned();
            buf.advance(len);
            Some(ClientSequence { client: name, sequence })
        } else {
            None
        };
        let op = match kind {
            KIND_WRITE | KIND_WRITE_SEGMENTS => {
                need(buf, 24)?;
                let volume = VolumeId(buf.get_u64_le());
                let first_block = buf.get_u64_le();
                let block_size = BlockSize::new(buf.get_u32_le()).ok_or(DecodeError::Field("block size"))?;
                let count = buf.get_u32_le() as usize;
                need(buf, count.saturating_mul(4))?;
                let crcs = (0..count).map(|_| buf.get_u32_le()).collect();
                let data = if kind == KIND_WRITE {
                    check_blocks(data, block_size, &crcs)?;
                    WriteData::Inline(data.clone())
                } else {
                    if !buf.len().is_multiple_of(8) {
                        return Err(DecodeError::Field("segments"));
                    }
                    WriteData::Segments((0..buf.len() / 8).map(|_| SegmentId(buf.get_u64_le())).collect(), None)
                };
                Op::Write { volume, first_block, block_size, crcs, data }
            }
            KIND_ZERO => {
                need(buf, 24)?;
                Op::Zero(BlockRange {
                    volume: VolumeId(buf.get_u64_le()),
                    first: buf.get_u64_le(),
                    count: buf.get_u64_le(),
                })
            }
            KIND_CONTROL => Op::Control(serde_json::from_slice(buf).map_err(|_| DecodeError::Field("control"))?),
            other => return Err(DecodeError::Kind(other)),
        };
        Ok(Self { position, previous, group, lane, time_unix_ms, client, op })
    }

    /// Payload bytes: of whole blocks for writes, 0 otherwise.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        match &self.op {
            Op::Write { block_size, crcs, .. } => u64::from(block_size.bytes()) * crcs.len() as u64,
            Op::Zero(_) | Op::Control(_) => 0,
        }
    }

    /// True for data records, which a mode switch may turn into marks; false for control records.
    #[must_use]
    pub fn is_data(&self) -> bool {
        !matches!(self.op, Op::Control(_))
    }
}

/// Compares each block of `data` with its checksum.
///
/// # Errors
/// The first block that differs, or a length that is not that of the blocks.
pub fn check_blocks(data: &[u8], block_size: BlockSize, crcs: &SmallVec<[u32; 2]>) -> Result<(), DecodeError> {
    let size = block_size.bytes() as usize;
    if data.len() != size * crcs.len() {
        return Err(DecodeError::Field("data length"));
    }
    for (block, (bytes, expected)) in data.chunks_exact(size).zip(crcs).enumerate() {
        let found = crc32c(bytes);
        if found != *expected {
            return Err(DecodeError::Checksum { block, expected: *expected, found });
        }
    }
    Ok(())
}

/// The checksum of each block of `data`, whose length is a multiple of the block size.
#[must_use]
pub fn block_crcs(data: &[u8], block_size: BlockSize) -> SmallVec<[u32; 2]> {
    data.chunks_exact(block_size.bytes() as usize).map(crc32c).collect()
}

/// What the journal asks of its records: is this data the one the head describes?
#[must_use]
pub fn verify(head: &[u8], data: &[u8]) -> bool {
    match head.first() {
        Some(&KIND_WRITE) => Record::decode(head, &Bytes::copy_from_slice(data)).is_ok(),
        _ => data.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block_size() -> BlockSize {
        BlockSize::new(512).unwrap()
    }

    fn sample(op: Op, client: Option<ClientSequence>) -> Record {
        Record {
            position: Position { generation: 3, lsn: Lsn(9) },
            previous: Lsn(7),
            group: GroupId(2),
            lane: 1,
            time_unix_ms: -5,
            client,
            op,
        }
    }

    fn write(data: Vec<u8>) -> Op {
        let data = Bytes::from(data);
        Op::Write {
            volume: VolumeId(4),
            first_block: 8,
            block_size: block_size(),
            crcs: block_crcs(&data, block_size()),
            data: WriteData::Inline(data),
        }
    }

    #[test]
    fn golden_bytes_of_a_zero_record() {
        let record = sample(Op::Zero(BlockRange { volume: VolumeId(1), first: 2, count: 3 }), None);
        let (head, data) = record.encode();
        let hex: String = head.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "030001000000000003000000000000000900000000000000070000000000000002000000000000\
             00fbffffffffffffff010000000000000002000000000000000300000000000000"
        );
        assert!(data.is_empty());
    }

    #[test]
    fn a_flipped_payload_byte_is_found() {
        let (head, data) = sample(write(vec![7; 1024]), None).encode();
        let mut bad = data.to_vec();
        bad[600] ^= 1;
        assert!(matches!(Record::decode(&head, &bad.into()), Err(DecodeError::Checksum { block: 1, .. })));
        assert!(verify(&head, &data));
    }

    proptest! {
        #[test]
        fn decode_gives_back_what_was_encoded(
            blocks in 0usize..4, fill: u8, client in proptest::option::of("[a-z]{1,64}"), sequence: u64,
            segments in proptest::collection::vec(any::<u64>(), 0..4), which in 0..4,
        ) {
            let op = match which {
                0 => write(vec![fill; blocks * 512]),
                1 => Op::Write {
                    volume: VolumeId(4), first_block: 8, block_size: block_size(),
                    crcs: std::iter::repeat_n(9, blocks).collect(),
                    data: WriteData::Segments(segments.into_iter().map(SegmentId).collect(), None),
                },
                2 => Op::Zero(BlockRange { volume: VolumeId(1), first: sequence, count: 3 }),
                _ => Op::Control(Control::DeleteSnapshot { layers: vec![LayerId(sequence)] }),
            };
            let record = sample(op, client.map(|client| ClientSequence { client, sequence }));
            let (head, data) = record.encode();
            prop_assert_eq!(Record::decode(&head, &data), Ok(record));
        }

        #[test]
        fn decode_never_panics(head in proptest::collection::vec(any::<u8>(), 0..200), data in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Record::decode(&head, &data.into());
        }
    }
}
