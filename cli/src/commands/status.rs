//! `status`.

use std::collections::BTreeSet;

use anyhow::Result;
use understudy_client::proto::{CloneInfo, LaneStatus, Status, VolumeStatus};
use understudy_proto::json;

use crate::args::{Global, StatusArgs};
use crate::convert;
use crate::output::{ago, print_json, print_line, rate, size, table};

pub(crate) async fn run(global: &Global, args: StatusArgs) -> Result<()> {
    loop {
        let status = if args.from_backup {
            global.backup_client()?.backup().status().await
        } else {
            global.primary_client()?.replication().status().await
        };
        match status {
            Ok(status) if global.json => print_json(&json::status(&status))?,
            Ok(status) => print_line(&text(&status))?,
            // A watcher outlives a restart of what it watches.
            Err(error) if args.watch => eprintln!("error: {}", crate::output::one_line(&error.to_string())),
            Err(error) => return Err(error.into()),
        }
        if !args.watch {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(args.interval) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

fn text(status: &Status) -> String {
    let mut lines =
        vec![format!("{} {} generation {} of pair {}", status.role, status.version, status.generation, status.pair_id)];
    if status.fenced_by > 0 {
        lines.push(format!(
            "superseded by generation {}: it serves nobody; `understudy demote` makes it the backup",
            status.fenced_by
        ));
    }
    if let Some(rest) = status.lease_remaining_seconds {
        lines.push(format!("lease for another {rest:.1}s"));
    }
    if let Some(link) = &status.link {
        let mut line = format!("link {}", link.state);
        if link.since_unix_ms > 0 {
            line += &format!(" for {}s", ago(link.since_unix_ms).as_secs());
        }
        if link.rtt_ms > 0.0 {
            line += &format!(", round trip {:.2} ms", link.rtt_ms);
        }
        for (name, value) in [(", peer ", &link.peer), (": ", &link.reason)] {
            if !value.is_empty() {
                line += &format!("{name}{value}");
            }
        }
        lines.push(line);
    }
    if let Some(staging) = &status.staging {
        lines.push(format!(
            "staging {} of {} ({:.1} %), {} not acknowledged, in {}/s, out {}/s",
            size(staging.span_bytes),
            size(staging.capacity_bytes),
            staging.fill_ratio * 100.0,
            size(staging.retained_bytes),
            rate(staging.usage_bytes_per_s),
            rate(staging.flush_bytes_per_s)
        ));
    }
    lines.push(table(
        ["VOLUME", "SIZE", "ACK", "MODE", "PHASE", "DURABLE", "SENT", "ACKED", "DIRTY", "AT RISK", "AGE", "CONSISTENT"],
        status.volumes.iter().map(row),
    ));
    // Once for a group, whose volumes all say the same.
    let mut told = BTreeSet::new();
    for volume in status.volumes.iter().filter(|v| told.insert(&v.group)) {
        lines.extend(runs(volume));
        lines.extend(lanes(volume));
    }
    lines.extend(status.clones.iter().map(clone));
    lines.join("\n")
}

/// What a group's runs and its ledger say, where they say anything.
fn runs(v: &VolumeStatus) -> Option<String> {
    let mut parts = Vec::new();
    if let Some(run) = &v.run {
        let percent = run.done_bytes.saturating_mul(100).checked_div(run.total_bytes).unwrap_or(100);
        let eta = run.eta_seconds.map_or_else(String::new, |eta| format!(", {eta:.0}s left"));
        let (done, total) = (size(run.done_bytes), size(run.total_bytes));
        parts.push(format!("{} run at {percent} % ({done} of {total}{eta})", run.kind));
    }
    if let Some(last) = &v.last_run {
        let reason = if last.reason.is_empty() { String::new() } else { format!(": {}", last.reason) };
        let when = ago(last.ended_unix_ms).as_secs();
        let bytes = size(last.bytes);
        parts.push(format!(
            "last run {} {} {when}s ago, {bytes} in {:.1}s{reason}",
            last.kind, last.result, last.seconds
        ));
    }
    if let Some((redundancy, ratio)) = v.redundancy.as_ref().and_then(|r| r.ratio.map(|ratio| (r, ratio))) {
        let (cr, dr) = (size(redundancy.cr_bytes), size(redundancy.dr_bytes));
        parts.push(format!("redundancy {ratio:.2} ({cr} one by one, {dr} in a run)"));
    }
    (!parts.is_empty()).then(|| format!("{}: {}", v.group, parts.join("; ")))
}

/// The lanes of a group, where there are several.
fn lanes(v: &VolumeStatus) -> Option<String> {
    let lane = |l: &LaneStatus| {
        let point = l.recovery_point.unwrap_or_default();
        let class = if l.class.is_empty() { String::new() } else { format!(" ({})", l.class) };
        let (at, age, retained) = (convert::position_text(point.position), point.age_seconds, size(l.retained_bytes));
        format!("{}{class} at {at}, {age:.1}s old, {retained} not acknowledged", l.name)
    };
    let lanes: Vec<String> = v.lanes.iter().map(lane).collect();
    (!lanes.is_empty()).then(|| format!("{} lanes: {}", v.group, lanes.join("; ")))
}

fn clone(clone: &CloneInfo) -> String {
    let (of, written) = (super::clone::base(clone), size(clone.written_bytes));
    format!("clone {} of {of}, {written} written, made {}s ago", clone.name, ago(clone.made_unix_ms).as_secs())
}

fn row(v: &VolumeStatus) -> [String; 12] {
    let position = v.position.unwrap_or_default();
    let mode = if v.cause.is_empty() {
        convert::mode(v.mode()).to_owned()
    } else {
        format!("{} ({})", convert::mode(v.mode()), v.cause)
    };
    [
        v.name.clone(),
        size(v.size_bytes),
        convert::ack(v.ack()).to_owned(),
        mode,
        convert::phase(v.phase()).to_owned(),
        convert::position_text(position.durable),
        convert::position_text(position.sent),
        convert::position_text(position.acked),
        size(v.dirty_blocks.saturating_mul(v.block_bytes.into())),
        size(v.bytes_at_risk),
        v.recovery_point.map_or_else(|| "-".to_owned(), |r| format!("{:.1}s", r.age_seconds)),
        if v.consistent { "yes" } else { "no" }.to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_client::proto::{LastRun, Position, RecoveryPoint, Redundancy, RunProgress};

    #[test]
    fn a_group_tells_of_its_runs_once() {
        let volume = |name: &str| VolumeStatus {
            name: name.to_owned(),
            group: "g".to_owned(),
            block_bytes: 4096,
            dirty_blocks: 512,
            run: Some(RunProgress {
                kind: "round".to_owned(),
                done_bytes: 1 << 20,
                total_bytes: 4 << 20,
                eta_seconds: Some(2.7),
                started_unix_ms: 1,
            }),
            last_run: Some(LastRun {
                kind: "full".to_owned(),
                result: "refused".to_owned(),
                reason: "no space".to_owned(),
                ..LastRun::default()
            }),
            redundancy: Some(Redundancy { cr_bytes: 9000, dr_bytes: 3000, ratio: Some(3.0) }),
            ..VolumeStatus::default()
        };
        let text = text(&Status { volumes: vec![volume("a"), volume("b")], ..Status::default() });
        for part in ["2.0 MiB", "g: round run at 25 % (1.0 MiB of 4.0 MiB, 3s left)", "redundancy 3.00 (8.8 KiB one"] {
            assert_eq!(text.matches(part).count(), if part == "2.0 MiB" { 2 } else { 1 }, "{part} in {text}");
        }
        assert!(text.contains("last run full refused") && text.contains("no space"), "{text}");
    }

    #[test]
    fn several_lanes_have_a_line() {
        let lane = |name: &str, class: &str, lsn| LaneStatus {
            name: name.into(),
            class: class.into(),
            recovery_point: Some(RecoveryPoint {
                position: Some(Position { generation: 1, lsn }),
                age_seconds: 0.25,
                ..RecoveryPoint::default()
            }),
            retained_bytes: 4096,
            ..LaneStatus::default()
        };
        let lanes = vec![lane("urgent", "immediate", 9), lane("1", "", 4)];
        let volume = VolumeStatus { group: "g".into(), lanes, ..VolumeStatus::default() };
        let text = text(&Status { volumes: vec![volume], ..Status::default() });
        let expected = "g lanes: urgent (immediate) at 1:9, 0.2s old, 4.0 KiB not acknowledged; 1 at 1:4, 0.2s old";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn what_serves_nobody_and_what_is_tried_out_are_told() {
        let clone = CloneInfo {
            name: "try".into(),
            volume: "data".into(),
            snapshot: "monday".into(),
            written_bytes: 8192,
            ..CloneInfo::default()
        };
        let status =
            Status { fenced_by: 3, lease_remaining_seconds: Some(1.5), clones: vec![clone], ..Status::default() };
        let text = text(&status);
        for part in
            ["superseded by generation 3", "lease for another 1.5s", "clone try of data@monday, 8.0 KiB written"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn a_group_without_runs_has_no_line() {
        assert_eq!(runs(&VolumeStatus { redundancy: Some(Redundancy::default()), ..VolumeStatus::default() }), None);
    }
}
