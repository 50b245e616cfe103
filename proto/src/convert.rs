//! Wire to domain and back. Bytes of a peer become valid types here, or an error that names the field.

use bytes::Bytes;
use understudy_common::{
    record::{Control, Op, Record, WriteData},
    types::{AckRule, AwayRule, BlockRange, BlockSize, GroupId, Lsn, Position, Uid, VolumeId, VolumeSpec},
};

use crate::v1;

/// A message whose fields do not make sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidField {
    /// Its name in the `.proto` file.
    pub field: &'static str,
    /// What is wrong with it.
    pub why: String,
}

impl std::fmt::Display for InvalidField {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "field {}: {}", self.field, self.why)
    }
}

impl std::error::Error for InvalidField {}

fn invalid(field: &'static str, why: impl Into<String>) -> InvalidField {
    InvalidField { field, why: why.into() }
}

impl From<Position> for v1::Position {
    fn from(p: Position) -> Self {
        Self { generation: p.generation, lsn: p.lsn.0 }
    }
}

impl From<v1::Position> for Position {
    fn from(p: v1::Position) -> Self {
        Self { generation: p.generation, lsn: Lsn(p.lsn) }
    }
}

impl From<AckRule> for v1::AckRule {
    fn from(rule: AckRule) -> Self {
        match rule {
            AckRule::Staged => Self::Staged,
            AckRule::Primary => Self::Primary,
            AckRule::Both => Self::Both,
        }
    }
}

impl From<AwayRule> for v1::AwayRule {
    fn from(rule: AwayRule) -> Self {
        match rule {
            AwayRule::Degrade => Self::Degrade,
            AwayRule::Block => Self::Block,
        }
    }
}

/// The rule of a message; `None` where it was left unspecified.
///
/// # Errors
/// For a number that is no rule.
pub fn ack_rule(value: i32) -> Result<Option<AckRule>, InvalidField> {
    match v1::AckRule::try_from(value) {
        Ok(v1::AckRule::Unspecified) => Ok(None),
        Ok(v1::AckRule::Staged) => Ok(Some(AckRule::Staged)),
        Ok(v1::AckRule::Primary) => Ok(Some(AckRule::Primary)),
        Ok(v1::AckRule::Both) => Ok(Some(AckRule::Both)),
        Err(_) => Err(invalid("ack", format!("{value} is no ack rule; use STAGED, PRIMARY or BOTH"))),
    }
}

/// The rule of a message; `None` where it was left unspecified.
///
/// # Errors
/// For a number that is no rule.
pub fn away_rule(value: i32) -> Result<Option<AwayRule>, InvalidField> {
    match v1::AwayRule::try_from(value) {
        Ok(v1::AwayRule::Unspecified) => Ok(None),
        Ok(v1::AwayRule::Degrade) => Ok(Some(AwayRule::Degrade)),
        Ok(v1::AwayRule::Block) => Ok(Some(AwayRule::Block)),
        Err(_) => Err(invalid("away", format!("{value} is no away rule; use DEGRADE or BLOCK"))),
    }
}

/// 16 bytes.
///
/// # Errors
/// For any other length.
pub fn uid(field: &'static str, bytes: &[u8]) -> Result<Uid, InvalidField> {
    Uid::from_slice(bytes).ok_or_else(|| invalid(field, format!("{} bytes where 16 are needed", bytes.len())))
}

/// A volume on the wire; `allocated_bytes` is for answers to clients.
#[must_use]
pub fn volume_to_wire(spec: &VolumeSpec, allocated_bytes: u64) -> v1::Volume {
    v1::Volume {
        id: spec.id.0,
        name: spec.name.clone(),
        group: spec.group_name.clone(),
        group_id: spec.group.0,
        size_bytes: spec.size_bytes,
        block_bytes: spec.block_size.bytes(),
        segment_bytes: spec.segment_bytes,
        ack: v1::AckRule::from(spec.ack).into(),
        away: v1::AwayRule::from(spec.away).into(),
        allocated_bytes,
    }
}

/// A volume from the wire.
///
/// # Errors
/// If a field is out of range.
pub fn volume_from_wire(volume: v1::Volume) -> Result<VolumeSpec, InvalidField> {
    let block_size = BlockSize::new(volume.block_bytes).ok_or_else(|| {
        invalid("block_bytes", format!("{} is not a power of two from 512 to 65536", volume.block_bytes))
    })?;
    if volume.size_bytes == 0 || !volume.size_bytes.is_multiple_of(u64::from(volume.block_bytes)) {
        return Err(invalid("size_bytes", "must be a positive multiple of block_bytes"));
    }
    if !volume.segment_bytes.is_power_of_two() || volume.segment_bytes < volume.block_bytes {
        return Err(invalid("segment_bytes", "must be a power of two and hold a block"));
    }
    Ok(VolumeSpec {
        id: VolumeId(volume.id),
        name: volume.name,
        group: GroupId(volume.group_id),
        group_name: volume.group,
        size_bytes: volume.size_bytes,
        block_size,
        segment_bytes: volume.segment_bytes,
        ack: ack_rule(volume.ack)?.ok_or_else(|| invalid("ack", "missing"))?,
        away: away_rule(volume.away)?.ok_or_else(|| invalid("away", "missing"))?,
    })
}

/// A record as it travels. `data` are the bytes of a write, also where they lie in segments on this side; control
/// records that are internal to a node do not travel: `None`.
#[must_use]
pub fn record_to_wire(session: &Bytes, ship: u64, record: &Record, data: Bytes) -> Option<v1::StagedRecord> {
    use v1::staged_record::Op as Wire;
    let op = match &record.op {
        Op::Write { volume, first_block, block_size, crcs, .. } => Wire::Write(v1::WriteOp {
            volume_id: volume.0,
            first_block: *first_block,
            block_bytes: block_size.bytes(),
            block_crc32c: crcs.to_vec(),
            data,
        }),
        Op::Zero(range) => {
            Wire::Zero(v1::ZeroOp { volume_id: range.volume.0, first_block: range.first, block_count: range.count })
        }
        Op::Control(Control::CreateVolume { spec }) => {
            Wire::Create(v1::CreateOp { volume: Some(volume_to_wire(spec, 0)) })
        }
        Op::Control(Control::ResizeVolume { volume, size_bytes }) => {
            Wire::Resize(v1::ResizeOp { volume_id: volume.0, size_bytes: *size_bytes })
        }
        Op::Control(Control::DeleteVolume { volume }) => Wire::Delete(v1::DeleteOp { volume_id: volume.0 }),
        Op::Control(Control::SetAckRule { volume, ack, away }) => Wire::AckRule(v1::AckRuleOp {
            volume_id: volume.0,
            ack: v1::AckRule::from(*ack).into(),
            away: v1::AwayRule::from(*away).into(),
        }),
        Op::Control(Control::CreateSnapshot { .. } | Control::DeleteSnapshot { .. } | Control::RollBack { .. }) => {
            return None;
        }
    };
    Some(v1::StagedRecord {
        session: session.clone(),
        ship,
        position: Some(record.position.into()),
        previous_lsn: record.previous.0,
        group_id: record.group.0,
        lane: u32::from(record.lane),
        time_unix_ms: record.time_unix_ms,
        op: Some(op),
    })
}

/// A record from the wire. The data is not compared with its checksums here.
///
/// # Errors
/// If a field is missing or out of range.
pub fn record_from_wire(wire: v1::StagedRecord) -> Result<Record, InvalidField> {
    use v1::staged_record::Op as Wire;
    let op = match wire.op.ok_or_else(|| invalid("op", "missing"))? {
        Wire::Write(write) => Op::Write {
            volume: VolumeId(write.volume_id),
            first_block: write.first_block,
            block_size: BlockSize::new(write.block_bytes)
                .ok_or_else(|| invalid("block_bytes", "not a power of two from 512 to 65536"))?,
            crcs: write.block_crc32c.into(),
            data: WriteData::Inline(write.data),
        },
        Wire::Zero(zero) => {
            Op::Zero(BlockRange { volume: VolumeId(zero.volume_id), first: zero.first_block, count: zero.block_count })
        }
        Wire::Create(create) => Op::Control(Control::CreateVolume {
            spec: volume_from_wire(create.volume.ok_or_else(|| invalid("volume", "missing"))?)?,
        }),
        Wire::Resize(resize) => {
            Op::Control(Control::ResizeVolume { volume: VolumeId(resize.volume_id), size_bytes: resize.size_bytes })
        }
        Wire::Delete(delete) => Op::Control(Control::DeleteVolume { volume: VolumeId(delete.volume_id) }),
        Wire::AckRule(rule) => Op::Control(Control::SetAckRule {
            volume: VolumeId(rule.volume_id),
            ack: ack_rule(rule.ack)?.ok_or_else(|| invalid("ack", "missing"))?,
            away: away_rule(rule.away)?.ok_or_else(|| invalid("away", "missing"))?,
        }),
    };
    Ok(Record {
        position: wire.position.ok_or_else(|| invalid("position", "missing"))?.into(),
        previous: Lsn(wire.previous_lsn),
        group: GroupId(wire.group_id),
        lane: u8::try_from(wire.lane).map_err(|_| invalid("lane", "larger than 255"))?,
        time_unix_ms: wire.time_unix_ms,
        client: None,
        op,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_the_wire() {
        let record = Record {
            position: Position { generation: 1, lsn: Lsn(5) },
            previous: Lsn(4),
            group: GroupId(2),
            lane: 0,
            time_unix_ms: 77,
            client: None,
            op: Op::Control(Control::CreateVolume {
                spec: VolumeSpec {
                    id: VolumeId(1),
                    name: "v".into(),
                    group: GroupId(2),
                    group_name: "g".into(),
                    size_bytes: 8192,
                    block_size: BlockSize::new(4096).unwrap(),
                    segment_bytes: 65536,
                    ack: AckRule::Both,
                    away: AwayRule::Block,
                },
            }),
        };
        let wire = record_to_wire(&Bytes::from_static(&[1; 16]), 1, &record, Bytes::new()).unwrap();
        assert_eq!(record_from_wire(wire).unwrap(), record);
    }
}
