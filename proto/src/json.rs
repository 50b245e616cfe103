//! A status as JSON, with the stable names of `understudy --json status`.

use serde_json::{Value, json};
use understudy_common::units::time_text;

use crate::v1;

/// All of `status`. Absent messages are `null`.
#[must_use]
pub fn status(status: &v1::Status) -> Value {
    json!({
        "role": status.role,
        "pair_id": status.pair_id,
        "instance_id": status.instance_id,
        "generation": status.generation,
        "version": status.version,
        "recovery_seconds": status.recovery_seconds,
        "recovery_records": status.recovery_records,
        "fenced_by": status.fenced_by,
        "lease_remaining_seconds": status.lease_remaining_seconds,
        "link": status.link.as_ref().map(|link| json!({
            "state": link.state,
            "rtt_ms": link.rtt_ms,
            "since": time_text(link.since_unix_ms),
            "reason": link.reason,
            "peer": link.peer,
        })),
        "staging": status.staging.as_ref().map(|staging| json!({
            "span_bytes": staging.span_bytes,
            "capacity_bytes": staging.capacity_bytes,
            "fill_ratio": staging.fill_ratio,
            "usage_bytes_per_s": staging.usage_bytes_per_s,
            "flush_bytes_per_s": staging.flush_bytes_per_s,
            "retained_bytes": staging.retained_bytes,
        })),
        "volumes": status.volumes.iter().map(volume).collect::<Vec<_>>(),
        "clones": status.clones.iter().map(clone).collect::<Vec<_>>(),
    })
}

/// A writable clone of the backup's image, or of a snapshot.
#[must_use]
pub fn clone(clone: &v1::CloneInfo) -> Value {
    json!({
        "name": clone.name,
        "volume": clone.volume,
        "snapshot": clone.snapshot,
        "position": position(clone.position.as_ref()),
        "time_unix_ms": clone.time_unix_ms,
        "size_bytes": clone.size_bytes,
        "block_bytes": clone.block_bytes,
        "written_bytes": clone.written_bytes,
        "made_unix_ms": clone.made_unix_ms,
    })
}

fn volume(volume: &v1::VolumeStatus) -> Value {
    json!({
        "id": volume.id,
        "name": volume.name,
        "group": volume.group,
        "size_bytes": volume.size_bytes,
        "block_bytes": volume.block_bytes,
        "mode": word(volume.mode().as_str_name(), "MODE_"),
        "cause": volume.cause,
        "phase": word(volume.phase().as_str_name(), "PHASE_"),
        "position": volume.position.as_ref().map(|at| json!({
            "next": position(at.next.as_ref()),
            "durable": position(at.durable.as_ref()),
            "sent": position(at.sent.as_ref()),
            "acked": position(at.acked.as_ref()),
            "applied": position(at.applied.as_ref()),
        })),
        "dirty_blocks": volume.dirty_blocks,
        "bytes_at_risk": volume.bytes_at_risk,
        "redundancy": volume.redundancy.as_ref().map(redundancy),
        "last_run": volume.last_run.as_ref().map(last_run),
        "run": volume.run.as_ref().map(run_progress),
        "recovery_point": volume.recovery_point.as_ref().map(recovery_point),
        "lanes": volume.lanes.iter().map(lane).collect::<Vec<_>>(),
        "consistent": volume.consistent,
        "diverged": volume.diverged,
        "ack": word(volume.ack().as_str_name(), "ACK_RULE_"),
        "away": word(volume.away().as_str_name(), "AWAY_RULE_"),
    })
}

fn recovery_point(point: &v1::RecoveryPoint) -> Value {
    json!({
        "position": position(point.position.as_ref()),
        "time": time_text(point.time_unix_ms),
        "age_seconds": point.age_seconds,
    })
}

fn lane(lane: &v1::LaneStatus) -> Value {
    json!({
        "lane": lane.lane,
        "name": lane.name,
        "class": lane.class,
        "recovery_point": lane.recovery_point.as_ref().map(recovery_point),
        "retained_bytes": lane.retained_bytes,
    })
}

/// `{cr_bytes,dr_bytes,ratio}`; the ratio is `null` where nothing is retained.
#[must_use]
pub fn redundancy(redundancy: &v1::Redundancy) -> Value {
    json!({"cr_bytes": redundancy.cr_bytes, "dr_bytes": redundancy.dr_bytes, "ratio": redundancy.ratio})
}

/// `{kind,result,bytes,seconds,ended_unix_ms,reason}`.
#[must_use]
pub fn last_run(run: &v1::LastRun) -> Value {
    json!({
        "kind": run.kind,
        "result": run.result,
        "bytes": run.bytes,
        "seconds": run.seconds,
        "ended_unix_ms": run.ended_unix_ms,
        "reason": run.reason,
    })
}

/// `{kind,done_bytes,total_bytes,eta_seconds,started_unix_ms}`; the eta is `null` where it is not known.
#[must_use]
pub fn run_progress(run: &v1::RunProgress) -> Value {
    json!({
        "kind": run.kind,
        "done_bytes": run.done_bytes,
        "total_bytes": run.total_bytes,
        "eta_seconds": run.eta_seconds,
        "started_unix_ms": run.started_unix_ms,
    })
}

/// A decision with its reasons.
#[must_use]
pub fn decision(decision: &v1::Decision) -> Value {
    let reason = |reason: &v1::Reason| {
        json!({
            "rule": reason.rule,
            "value": reason.value,
            "threshold": reason.threshold,
            "unit": reason.unit,
            "verdict": reason.verdict,
        })
    };
    json!({
        "time_unix_ms": decision.time_unix_ms,
        "action": decision.action,
        "cause": decision.cause,
        "run_kind": decision.run_kind,
        "holds": decision.holds,
        "because": decision.because.iter().map(reason).collect::<Vec<_>>(),
        "alternative": decision.alternative,
    })
}

fn position(position: Option<&v1::Position>) -> Value {
    position.map_or(Value::Null, |at| json!({"generation": at.generation, "lsn": at.lsn}))
}

/// `continuous` of `MODE_CONTINUOUS`.
fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use v1::{LinkStatus, Mode, Phase, Position, RecoveryPoint, StagingStatus, Status, VolumePosition, VolumeStatus};

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
            "/clones",
        ] {
            assert!(status.pointer(pointer).is_some(), "{pointer} is missing");
        }
        assert_eq!(status["volumes"][0]["mode"], "continuous");
        assert_eq!(status["volumes"][0]["phase"], "streaming");
        assert_eq!(status["volumes"][0]["position"]["acked"], json!({"generation": 1, "lsn": 7}));
        // What is not there is null, and what is not known empty.
        assert_eq!(status["volumes"][0]["run"], Value::Null);
        assert_eq!(status["link"]["since"], "");
    }
}
