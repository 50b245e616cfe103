//! A status as JSON, with the stable names of `understudy --json status`.

use serde_json::{Value, json};

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
            "since": link.since_unix_ms,
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
        "time": point.time_unix_ms,
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

    #[test]
    fn names_are_those_of_the_contract() {
        let wire = v1::Status {
            role: "primary".into(),
            volumes: vec![v1::VolumeStatus {
                mode: v1::Mode::Continuous.into(),
                phase: v1::Phase::FinalRound.into(),
                position: Some(v1::VolumePosition {
                    acked: Some(v1::Position { generation: 1, lsn: 9 }),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            ..Default::default()
        };
        let json = status(&wire);
        assert_eq!(json["volumes"][0]["mode"], "continuous");
        assert_eq!(json["volumes"][0]["phase"], "final_round");
        assert_eq!(json["volumes"][0]["position"]["acked"], json!({"generation": 1, "lsn": 9}));
        assert_eq!(json["link"], Value::Null);
        let fields = ["dirty_blocks", "redundancy", "last_run", "run"];
        assert!(fields.iter().all(|field| json["volumes"][0].get(field).is_some()));
    }
}
