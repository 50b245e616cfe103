//! The record: every durable change of state, as the journal and the stream carry it.
//!
//! A record is a small *head* and, for writes whose bytes lie in the journal, the *data*. Data is covered by the CRC32C
//! of each of its blocks: they are computed at the client's edge and stay with the block down to the disk of the
//! backup. The head, which holds them, is covered by the journal's own checksum. Layout: `docs/formats.md`, "Record".

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use thiserror::Error;

use crate::{
    checksum::crc32c,
    lane::LANES_MAX,
    types::{
        AckRule, AwayRule, BlockRange, BlockSize, GroupId, LayerId, Lsn, Position, SegmentId, SnapshotId, Uid,
        VolumeId, VolumeSpec,
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
        /// Primary: it is filled from this snapshot, from that volume of it, and not served until that is done. It does
        /// not travel.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fill: Option<(SnapshotId, VolumeId)>,
    },
    /// Another size. What a smaller one cuts off read as zeros.
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
    /// A snapshot that sees what another one sees.
    PinSnapshot {
        /// The volume.
        volume: VolumeId,
        /// The snapshot to make.
        layer: LayerId,
        /// The one that is there.
        of: LayerId,
    },
    /// Nothing: its sync shows how long one takes.
    Probe,
    /// Primary: the group leaves continuous mode (Figs. 4, 8, 10). Every retained record becomes a mark.
    Switch {
        /// The group.
        group: GroupId,
        /// Why.
        cause: String,
        /// Time of the oldest change that the backup does not have, Unix milliseconds; `None` if it has all.
        since_unix_ms: Option<i64>,
        /// Every block of its volumes is marked: the backup holds nothing that can be built upon.
        all: bool,
        /// Snapshots whose records the backup does not get.
        #[serde(default)]
        unmirrored: Vec<SnapshotId>,
    },
    /// Primary: a run begins (842). The snapshot is taken and the delta table frozen.
    Cut {
        /// The group.
        group: GroupId,
        /// What for.
        #[serde(rename = "run")]
        kind: RunKind,
        /// The snapshots to make.
        layers: Vec<(VolumeId, LayerId)>,
    },
    /// Primary: records that were retained since the cut of a final round become marks; the run goes on as a round.
    Demote {
        /// The group.
        group: GroupId,
    },
    /// Primary: the backup has committed the run. The frozen set and the snapshot go; after a final round the group is
    /// in continuous mode.
    Clear {
        /// The group.
        group: GroupId,
        /// The snapshots of the run.
        layers: Vec<LayerId>,
        /// Snapshots for users that this backup does not hold: it is another one, or an older copy.
        unmirrored: Vec<SnapshotId>,
    },
    /// Primary: the run has ended without a commit. The frozen set is marked again.
    AbortRun {
        /// The group.
        group: GroupId,
        /// The snapshots of the run.
        layers: Vec<LayerId>,
    },
    /// Primary: from now on the delta tables are against this backup.
    Bind {
        /// Its data directory.
        instance: Uid,
    },
    /// Backup: a run begins (840). The snapshots are taken, and the group's head is marked as in a run.
    BeginRun {
        /// All of it.
        run: Box<BeginRun>,
    },
    /// Backup: the primary has given the run up. The group stays in it until another one supersedes it.
    CancelRun {
        /// The group.
        group: GroupId,
    },
    /// Backup: the group is the image and the catalogue of the cut.
    CommitRun {
        /// The group.
        group: GroupId,
        /// Volumes that the cut does not have.
        delete: Vec<VolumeId>,
        /// The snapshots of the run.
        layers: Vec<LayerId>,
    },
    /// A snapshot of each volume of the group on both sides at this record, internal to each, to compare them. The layers
    /// are those of the node whose journal it is in.
    VerifySnapshot {
        /// For this session: in a later one nobody waits for it, and the backup takes none.
        session: Uid,
        /// The layers to make.
        layers: Vec<(VolumeId, LayerId)>,
    },
    /// A snapshot for users, of every volume of the group.
    TakeSnapshot {
        /// Never reused.
        id: SnapshotId,
        /// The group.
        group: GroupId,
        /// Unique in the group.
        name: String,
        /// The record is one of the group's chain: the backup takes it at the same position.
        mirrored: bool,
        /// The layers to make, of this node.
        layers: Vec<(VolumeId, LayerId)>,
    },
    /// A snapshot for users is gone. Nothing, where it is not known.
    DropSnapshot {
        /// The snapshot.
        id: SnapshotId,
        /// Its layers, of this node.
        layers: Vec<LayerId>,
    },
    /// Primary: volumes are filled from a snapshot, and not served until that is done.
    BeginRestore {
        /// The snapshot.
        snapshot: SnapshotId,
        /// Volumes to fill, each with the volume of the snapshot it is filled from.
        volumes: Vec<(VolumeId, VolumeId)>,
    },
    /// Primary: the volumes are filled.
    EndRestore {
        /// The volumes.
        volumes: Vec<VolumeId>,
    },
    /// The backup that this directory was is a primary from here on: each group is its image from before an unfinished
    /// run, at this record, in delta mode with nothing marked.
    Promote {
        /// The new generation.
        generation: u64,
        /// Ids given from now on are above this one: two sides of a split do not give the same.
        ids_above: u64,
        /// The primary before: the only backup that the empty tables fit. Nil: none does.
        former: Uid,
        /// The snapshots of unfinished runs, to go back to.
        layers: Vec<(VolumeId, LayerId)>,
        /// Volumes that unfinished runs had made and nobody has seen.
        delete: Vec<VolumeId>,
        /// Groups without an image.
        drop: Vec<GroupId>,
    },
    /// The primary that this directory was is a backup from here on: each group is diverged, and its table says where.
    StepDown {
        /// What the backup before had acknowledged of each group.
        acked: Vec<(GroupId, Lsn)>,
        /// The tables do not say it: everything may differ.
        unknown: bool,
    },
}

/// What a run is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunKind {
    /// An ordinary round: writes go on marking.
    Round,
    /// The last one before continuous mode: records are retained from the cut on.
    Final,
    /// As `Final`, of the blocks of the redundancy ledger (Fig. 11).
    Redundancy,
    /// Everything, compared by digests.
    Full,
}

impl fmt::Display for RunKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl RunKind {
    /// Records are retained from its cut on, and shipped after its commit.
    #[must_use]
    pub fn retains(self) -> bool {
        matches!(self, Self::Final | Self::Redundancy)
    }

    /// As it is written, and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Round => "round",
            Self::Final => "final",
            Self::Redundancy => "redundancy",
            Self::Full => "full",
        }
    }
}

/// The start of a run on the backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeginRun {
    /// The group.
    pub group: GroupId,
    /// Its name.
    pub group_name: String,
    /// The run: the LSN of its cut on the primary.
    pub id: u64,
    /// What the group's position is when the run is committed.
    pub cut: Position,
    /// The primary's time of the cut, Unix milliseconds.
    pub time_unix_ms: i64,
    /// The group's volumes at the cut.
    pub specs: Vec<VolumeSpec>,
    /// Snapshots to make; none if an earlier run's are still there.
    pub layers: Vec<(VolumeId, LayerId)>,
    /// Volumes to make in the pool.
    pub create: Vec<VolumeSpec>,
    /// Volumes to make larger in the pool: new size in bytes.
    pub grow: Vec<(VolumeId, u64)>,
    /// Volumes that an earlier run had made and that nobody has seen.
    pub delete: Vec<VolumeId>,
    /// The group's snapshots on the primary: any other goes with the commit.
    #[serde(default)]
    pub snapshots: Vec<SnapshotId>,
    /// Volumes of a diverged group that are larger here than at the cut: what lies behind is given back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shrink: Vec<(VolumeId, u64)>,
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
    /// Backup: it belongs to the group's run and not to its stream; the position is that of the cut.
    pub in_run: bool,
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
const FLAG_RUN: u8 = 2;
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
        let flags = if self.client.is_some() { FLAG_CLIENT } else { 0 };
        head.put_u8(flags | if self.in_run { FLAG_RUN } else { 0 });
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
        let mut record = Self::decode_head(head)?;
        if let Op::Write { block_size, crcs, data: WriteData::Inline(bytes), .. } = &mut record.op {
            check_blocks(data, *block_size, crcs)?;
            *bytes = data.clone();
        }
        Ok(record)
    }

    /// The lane of the record of a head; `None` for one that is cut short.
    #[must_use]
    pub fn lane_of(head: &[u8]) -> Option<u8> {
        head.get(2).copied()
    }

    /// The record of a head; the data of an inline write is left empty.
    fn decode_head(head: &[u8]) -> Result<Self, DecodeError> {
        let mut buf = head;
        let need = |buf: &[u8], n: usize| if buf.len() < n { Err(DecodeError::Short(head.len())) } else { Ok(()) };
        need(buf, PREFIX_BYTES)?;
        let (kind, flags, lane) = (buf.get_u8(), buf.get_u8(), buf.get_u8());
        if usize::from(lane) >= LANES_MAX {
            return Err(DecodeError::Field("lane"));
        }
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
                    WriteData::Inline(Bytes::new())
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
        Ok(Self { position, previous, group, lane, time_unix_ms, client, in_run: flags & FLAG_RUN != 0, op })
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

    /// The blocks it changes; `None` for control records.
    #[must_use]
    pub fn range(&self) -> Option<BlockRange> {
        match &self.op {
            Op::Write { volume, first_block, crcs, .. } => {
                Some(BlockRange { volume: *volume, first: *first_block, count: crcs.len() as u64 })
            }
            Op::Zero(range) => Some(*range),
            Op::Control(_) => None,
        }
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
        Some(&KIND_WRITE) => match Record::decode_head(head) {
            Ok(Record { op: Op::Write { block_size, crcs, .. }, .. }) => check_blocks(data, block_size, &crcs).is_ok(),
            _ => false,
        },
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
            in_run: false,
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
