//! Wire to domain and back. Bytes of a peer become valid types here, or an error that names the field.

use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use understudy_common::{
    events::{Event, EventLog},
    history::{Generation, History},
    lane::LANES_MAX,
    lives::{Life, Lives},
    pool::Owner,
    record::{CLIENT_ID_BYTES_MAX, ClientSequence, Control, Op, Record, WriteData},
    scrub::ScrubStatus,
    state::Snapshot,
    store::{Store, Suspect},
    types::{AckRule, AwayRule, BlockRange, BlockSize, GroupId, Lsn, Position, SnapshotId, Uid, VolumeId, VolumeSpec},
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

/// The sequence of a client's write; `None` without one, which only says who it is.
///
/// # Errors
/// The id is too long, or missing beside a sequence.
pub fn client_from_wire(client: String, sequence: u64) -> Result<Option<ClientSequence>, InvalidField> {
    match (client.len(), sequence) {
        (0..=CLIENT_ID_BYTES_MAX, 0) => Ok(None),
        (0, _) => Err(invalid("client_id", "is empty although a sequence is set; set both or none")),
        (1..=CLIENT_ID_BYTES_MAX, _) => Ok(Some(ClientSequence { client, sequence })),
        (long, _) => Err(invalid("client_id", format!("has {long} bytes and may have {CLIENT_ID_BYTES_MAX}"))),
    }
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

/// Generations on the wire.
#[must_use]
pub fn history_to_wire(history: &History) -> Vec<v1::Generation> {
    let place = |(group, position): (&GroupId, &Position)| v1::GroupPosition {
        group_id: group.0,
        lane: 0,
        position: Some((*position).into()),
    };
    let generation = |g: &Generation| v1::Generation {
        number: g.number,
        id: g.id.0.to_vec().into(),
        primary_instance: g.primary.0.to_vec().into(),
        fork: g.fork.iter().map(place).collect(),
        met: g.met.0.to_vec().into(),
    };
    history.generations().iter().map(generation).collect()
}

/// Generations from the wire.
///
/// # Errors
/// If they are not a history.
pub fn history_from_wire(generations: Vec<v1::Generation>) -> Result<History, InvalidField> {
    let generation = |g: v1::Generation| {
        let fork = g.fork.into_iter().map(|p| (GroupId(p.group_id), p.position.unwrap_or_default().into()));
        Ok(Generation {
            number: g.number,
            id: uid("id", &g.id)?,
            primary: uid("primary_instance", &g.primary_instance)?,
            fork: fork.collect(),
            met: if g.met.is_empty() { Uid::default() } else { uid("met", &g.met)? },
        })
    };
    let generations = generations.into_iter().map(generation).collect::<Result<_, InvalidField>>()?;
    History::new(generations).map_err(|why| invalid("history", why))
}

/// The lives of a primary on the wire.
#[must_use]
pub fn lives_to_wire(lives: &Lives) -> Vec<v1::Life> {
    let life = |life: &Life| v1::Life { id: life.id.0.to_vec().into(), end_lsn: life.end.map(|end| end.0) };
    lives.lives().iter().map(life).collect()
}

/// The lives of a primary from the wire.
///
/// # Errors
/// If they cannot be such.
pub fn lives_from_wire(lives: Vec<v1::Life>) -> Result<Lives, InvalidField> {
    let life = |life: v1::Life| Ok(Life { id: uid("id", &life.id)?, end: life.end_lsn.map(Lsn) });
    let lives = lives.into_iter().map(life).collect::<Result<_, InvalidField>>()?;
    Lives::new(lives).map_err(|why| invalid("lives", why))
}

/// Why an `Attach` is refused: what the backup holds is not from the primary's directory.
pub const OLD_COPY: &str = "old_copy";

/// The details of a refused `Attach`: why ("superseded", "split_brain", [`OLD_COPY`]), and the generations of who refuses.
#[must_use]
pub fn attach_refused(reason: &str, history: &History) -> Bytes {
    use prost::Message as _;
    v1::AttachRefused { reason: reason.into(), history: history_to_wire(history) }.encode_to_vec().into()
}

/// Reads what [`attach_refused`] made; `None` for details of anything else.
#[must_use]
pub fn attach_refused_from(details: &[u8]) -> Option<(String, History)> {
    use prost::Message as _;
    let refused = v1::AttachRefused::decode(details).ok().filter(|refused| !refused.reason.is_empty())?;
    Some((refused.reason, history_from_wire(refused.history).ok()?))
}

/// An event on the wire.
#[must_use]
pub fn event_to_wire(event: Event) -> v1::Event {
    let Event { number, time_unix_ms, kind, message, fields } = event;
    v1::Event { number, time_unix_ms, kind, message, fields: fields.into_iter().collect() }
}

/// Events on the wire.
pub type EventStream = Pin<Box<dyn Stream<Item = v1::Event> + Send>>;

/// The events of `log` with a larger number than `after`, as they come. 0 asks for the present state: it comes first,
/// under the number of the newest event, and then what follows.
pub fn watch_events(log: &EventLog, after: u64, now_unix_ms: i64, state: impl FnOnce() -> v1::Status) -> EventStream {
    if after > 0 {
        return Box::pin(log.follow(after, None).map(event_to_wire));
    }
    // The number is taken first: what happens meanwhile comes again behind the state.
    let number = log.newest();
    let state = state();
    let first = Event {
        number,
        time_unix_ms: now_unix_ms,
        kind: "state".into(),
        message: format!("{}, {} volumes", state.role, state.volumes.len()),
        fields: state.link.map(|link| ("link".to_owned(), link.state)).into_iter().collect(),
    };
    Box::pin(log.follow(number, Some(first)).map(event_to_wire))
}

/// A scrub on the wire.
#[must_use]
pub fn scrub_to_wire(status: &ScrubStatus) -> v1::ScrubStatus {
    v1::ScrubStatus {
        running: status.running,
        volume_id: status.volume.map_or(0, |volume| volume.0),
        done_bytes: status.done_bytes,
        total_bytes: status.total_bytes,
        damaged_blocks: status.damaged_blocks,
        started_unix_ms: status.started_unix_ms,
        completed_unix_ms: status.completed_unix_ms,
    }
}

/// What a store knows to be damaged, on the wire: at most 256 blocks.
#[must_use]
pub fn damaged_to_wire(store: &Store) -> Vec<v1::DamagedBlock> {
    let damaged = store.damaged().into_iter().take(256);
    let block = |(suspect, owner): (Suspect, Owner)| {
        let snapshot_only = owner == Owner::Snapshot;
        // A segment map that cannot be read is told by whoever comes upon it next.
        let sight = if snapshot_only { store.mirrored_sight(suspect).ok().flatten() } else { None };
        let (volume_id, snapshot_id) = (suspect.volume.0, sight.map_or(0, |id| id.0));
        v1::DamagedBlock { volume_id, block: suspect.block, snapshot_only, snapshot_id }
    };
    damaged.map(block).collect()
}

/// A volume on the wire.
#[must_use]
pub fn volume_to_wire(spec: &VolumeSpec) -> v1::Volume {
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

/// A snapshot on the wire.
#[must_use]
pub fn snapshot_to_wire(snapshot: &Snapshot, group: &str, held_bytes: u64) -> v1::SnapshotInfo {
    let volume = |(id, _): &(VolumeId, _)| {
        let (spec, _) = snapshot.volume(*id)?;
        Some(v1::SnapshotVolume { id: id.0, name: spec.name.clone(), size_bytes: spec.size_bytes })
    };
    v1::SnapshotInfo {
        id: snapshot.id.0,
        name: snapshot.name.clone(),
        group: group.to_owned(),
        volumes: snapshot.layers.iter().filter_map(volume).collect(),
        position: Some(snapshot.position.into()),
        time_unix_ms: snapshot.time_unix_ms,
        mirrored: snapshot.mirrored,
        held_bytes,
    }
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
        Op::Control(Control::CreateVolume { spec, .. }) => {
            Wire::Create(v1::CreateOp { volume: Some(volume_to_wire(spec)) })
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
        Op::Control(Control::VerifySnapshot { session, .. }) => {
            Wire::VerifySnapshot(v1::VerifySnapshotOp { session: session.0.to_vec().into() })
        }
        Op::Control(Control::TakeSnapshot { id, name, .. }) => {
            Wire::Snapshot(v1::SnapshotOp { snapshot_id: id.0, name: name.clone() })
        }
        Op::Control(Control::DropSnapshot { id, .. }) => Wire::DropSnapshot(v1::DropSnapshotOp { snapshot_id: id.0 }),
        Op::Control(_) => return None,
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
            fill: None,
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
        Wire::VerifySnapshot(snapshot) => {
            let session = uid("session", &snapshot.session)?;
            Op::Control(Control::VerifySnapshot { session, layers: Vec::new() })
        }
        // The layers are each node's own.
        Wire::Snapshot(snapshot) => Op::Control(Control::TakeSnapshot {
            id: SnapshotId(snapshot.snapshot_id),
            group: GroupId(wire.group_id),
            name: snapshot.name,
            mirrored: true,
            layers: Vec::new(),
        }),
        Wire::DropSnapshot(drop) => {
            Op::Control(Control::DropSnapshot { id: SnapshotId(drop.snapshot_id), layers: Vec::new() })
        }
    };
    Ok(Record {
        position: wire.position.ok_or_else(|| invalid("position", "missing"))?.into(),
        previous: Lsn(wire.previous_lsn),
        group: GroupId(wire.group_id),
        lane: u8::try_from(wire.lane)
            .ok()
            .filter(|lane| usize::from(*lane) < LANES_MAX)
            .ok_or_else(|| invalid("lane", format!("{} is not below {LANES_MAX}", wire.lane)))?,
        time_unix_ms: wire.time_unix_ms,
        client: None,
        in_run: false,
        op,
    })
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn watching_begins_with_the_state_and_misses_nothing_that_happens_meanwhile() {
        let log = EventLog::default();
        log.record(1, "a", "", []);
        let mut events = watch_events(&log, 0, 9, || {
            log.record(2, "meanwhile", "", []);
            v1::Status { role: "primary".into(), ..Default::default() }
        });
        let mut next = || events.next().now_or_never().flatten();
        let state = next().unwrap();
        assert_eq!((state.number, state.kind.as_str(), state.message.as_str()), (1, "state", "primary, 0 volumes"));
        let meanwhile = next().unwrap();
        assert_eq!((meanwhile.number, meanwhile.kind.as_str()), (2, "meanwhile"));
        assert_eq!(next(), None);
    }

    #[test]
    fn a_record_survives_the_wire() {
        let record = Record {
            position: Position { generation: 1, lsn: Lsn(5) },
            previous: Lsn(4),
            group: GroupId(2),
            lane: 0,
            time_unix_ms: 77,
            client: None,
            in_run: false,
            op: Op::Control(Control::CreateVolume {
                fill: None,
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
