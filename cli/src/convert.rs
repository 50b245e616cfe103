//! Wire types as JSON and as words. The names are those of the documentation of `--json`.

use serde_json::{Value, json};
use understudy_client::proto::{
    AckRule, AwayRule, DeviceState, Durability, Event, LaneStatus, LinkStatus, Mode, Phase, Pool, PoolDevice, Position,
    RecoveryPoint, StagingStatus, Status, Volume, VolumePosition, VolumeStatus,
};
use understudy_proto::json as wire;

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

pub(crate) fn status(s: &Status) -> Value {
    json!({
        "role": s.role,
        "pair_id": s.pair_id,
        "instance_id": s.instance_id,
        "generation": s.generation,
        "version": s.version,
        "link": s.link.as_ref().map(link),
        "staging": s.staging.as_ref().map(staging),
        "recovery_seconds": s.recovery_seconds,
        "recovery_records": s.recovery_records,
        "volumes": s.volumes.iter().map(volume_status).collect::<Vec<_>>(),
    })
}

fn link(l: &LinkStatus) -> Value {
    json!({"state": l.state, "rtt_ms": l.rtt_ms, "since": time(l.since_unix_ms), "reason": l.reason, "peer": l.peer})
}

fn staging(s: &StagingStatus) -> Value {
    json!({
        "span_bytes": s.span_bytes,
        "capacity_bytes": s.capacity_bytes,
        "fill_ratio": s.fill_ratio,
        "usage_bytes_per_s": s.usage_bytes_per_s,
        "flush_bytes_per_s": s.flush_bytes_per_s,
        "retained_bytes": s.retained_bytes,
    })
}

fn volume_status(v: &VolumeStatus) -> Value {
    json!({
        "id": v.id,
        "name": v.name,
        "group": v.group,
        "size_bytes": v.size_bytes,
        "block_bytes": v.block_bytes,
        "ack": ack(v.ack()),
        "away": away(v.away()),
        "mode": mode(v.mode()),
        "cause": v.cause,
        "phase": phase(v.phase()),
        "position": v.position.as_ref().map(volume_position),
        "dirty_blocks": v.dirty_blocks,
        "bytes_at_risk": v.bytes_at_risk,
        "redundancy": v.redundancy.as_ref().map(wire::redundancy),
        "last_run": v.last_run.as_ref().map(wire::last_run),
        "run": v.run.as_ref().map(wire::run_progress),
        "recovery_point": v.recovery_point.as_ref().map(recovery_point),
        "lanes": v.lanes.iter().map(lane).collect::<Vec<_>>(),
        "consistent": v.consistent,
    })
}

fn volume_position(p: &VolumePosition) -> Value {
    json!({
        "next": position(p.next),
        "durable": position(p.durable),
        "sent": position(p.sent),
        "acked": position(p.acked),
        "applied": position(p.applied),
    })
}

fn lane(l: &LaneStatus) -> Value {
    json!({
        "lane": l.lane,
        "name": l.name,
        "class": l.class,
        "recovery_point": l.recovery_point.as_ref().map(recovery_point),
        "retained_bytes": l.retained_bytes,
    })
}

fn recovery_point(r: &RecoveryPoint) -> Value {
    json!({"position": position(r.position), "time": time(r.time_unix_ms), "age_seconds": r.age_seconds})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_has_the_documented_names() {
        let status = status(&Status {
            role: "primary".to_owned(),
            link: Some(LinkStatus { state: "attached".to_owned(), ..LinkStatus::default() }),
            staging: Some(StagingStatus::default()),
            volumes: vec![VolumeStatus {
                name: "v".to_owned(),
                mode: Mode::Continuous.into(),
                phase: Phase::Streaming.into(),
                position: Some(VolumePosition {
                    acked: Some(Position { generation: 1, lsn: 7 }),
                    ..VolumePosition::default()
                }),
                recovery_point: Some(RecoveryPoint::default()),
                ..VolumeStatus::default()
            }],
            ..Status::default()
        });
        for pointer in [
            "/role",
            "/pair_id",
            "/generation",
            "/link/state",
            "/link/rtt_ms",
            "/link/since",
            "/staging/span_bytes",
            "/staging/capacity_bytes",
            "/staging/fill_ratio",
            "/staging/usage_bytes_per_s",
            "/staging/flush_bytes_per_s",
            "/volumes/0/id",
            "/volumes/0/group",
            "/volumes/0/size_bytes",
            "/volumes/0/block_bytes",
            "/volumes/0/cause",
            "/volumes/0/position/next",
            "/volumes/0/dirty_blocks",
            "/volumes/0/bytes_at_risk",
            "/volumes/0/redundancy",
            "/volumes/0/last_run",
            "/volumes/0/run",
            "/volumes/0/recovery_point/age_seconds",
            "/volumes/0/lanes",
            "/volumes/0/consistent",
        ] {
            assert!(status.pointer(pointer).is_some(), "{pointer} is missing");
        }
        assert_eq!(status["volumes"][0]["mode"], "continuous");
        assert_eq!(status["volumes"][0]["phase"], "streaming");
        assert_eq!(status["volumes"][0]["position"]["acked"]["lsn"], 7);
    }
}
