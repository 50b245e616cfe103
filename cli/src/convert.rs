//! Wire types as JSON and as words. The names are those of the documentation of `--json`.

use serde_json::{Value, json};
use understudy_client::proto::{
    AckRule, AwayRule, DeviceState, Durability, Event, Mode, Phase, Pool, PoolDevice, Position, Volume,
};

use crate::args::{Ack, Away};
use crate::output::time;

impl From<Ack> for AckRule {
    fn from(ack: Ack) -> Self {
        match ack {
            Ack::Staged => Self::Staged,
            Ack::Primary => Self::Primary,
            Ack::Both => Self::Both,
        }
    }
}

impl From<Away> for AwayRule {
    fn from(away: Away) -> Self {
        match away {
            Away::Degrade => Self::Degrade,
            Away::Block => Self::Block,
        }
    }
}

pub(crate) fn ack(ack: AckRule) -> &'static str {
    match ack {
        AckRule::Unspecified => "unspecified",
        AckRule::Staged => "staged",
        AckRule::Primary => "primary",
        AckRule::Both => "both",
    }
}

pub(crate) fn away(away: AwayRule) -> &'static str {
    match away {
        AwayRule::Unspecified => "unspecified",
        AwayRule::Degrade => "degrade",
        AwayRule::Block => "block",
    }
}

pub(crate) fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Unspecified => "unspecified",
        Mode::Continuous => "continuous",
        Mode::Delta => "delta",
    }
}

pub(crate) fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Unspecified => "unspecified",
        Phase::Streaming => "streaming",
        Phase::Tracking => "tracking",
        Phase::Round => "round",
        Phase::FinalRound => "final_round",
        Phase::FullRun => "full_run",
    }
}

pub(crate) fn durability(durability: Durability) -> &'static str {
    match durability {
        Durability::Unspecified => "unspecified",
        Durability::Local => "local",
        Durability::Both => "both",
    }
}

pub(crate) fn position(position: Option<Position>) -> Value {
    position.map_or(Value::Null, |p| json!({"generation": p.generation, "lsn": p.lsn}))
}

/// As `1:42`; a dash where there is none.
pub(crate) fn position_text(position: Option<Position>) -> String {
    position.map_or_else(|| "-".to_owned(), |p| format!("{}:{}", p.generation, p.lsn))
}

pub(crate) fn volume(v: &Volume) -> Value {
    json!({
        "id": v.id,
        "name": v.name,
        "group": v.group,
        "group_id": v.group_id,
        "size_bytes": v.size_bytes,
        "block_bytes": v.block_bytes,
        "segment_bytes": v.segment_bytes,
        "ack": ack(v.ack()),
        "away": away(v.away()),
    })
}

pub(crate) fn pool(p: &Pool) -> Value {
    json!({
        "segment_bytes": p.segment_bytes,
        "total_bytes": p.total_bytes,
        "free_bytes": p.free_bytes,
        "reserved_bytes": p.reserved_bytes,
        "used_bytes": p.used_bytes,
        "promised_bytes": p.promised_bytes,
        "promised_ratio": share(p.promised_bytes, p.total_bytes),
        "warn_at": p.warn_at,
        "stop_at": p.stop_at,
        "drain_lacks_room": p.drain_lacks_room,
        "devices": p.devices.iter().map(pool_device).collect::<Vec<_>>(),
    })
}

pub(crate) fn pool_device(d: &PoolDevice) -> Value {
    json!({
        "id": d.id,
        "path": d.path,
        "size_bytes": d.size_bytes,
        "free_bytes": d.free_bytes,
        "live_bytes": d.live_bytes,
        "waiting_bytes": d.waiting_bytes,
        "state": device_state(d.state()),
    })
}

pub(crate) fn device_state(state: DeviceState) -> &'static str {
    match state {
        DeviceState::Unspecified => "unknown",
        DeviceState::Joining => "joining",
        DeviceState::Serving => "serving",
        DeviceState::Draining => "draining",
        DeviceState::Removing => "removing",
        DeviceState::Removed => "removed",
    }
}

/// How many times the second is in the first.
#[allow(clippy::cast_precision_loss, reason = "shown with two digits")]
pub(crate) fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

pub(crate) fn event(e: &Event) -> Value {
    let fields: std::collections::BTreeMap<_, _> = e.fields.iter().collect();
    json!({"number": e.number, "time": time(e.time_unix_ms), "kind": e.kind, "message": e.message, "fields": fields})
}
