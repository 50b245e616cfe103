//! `status`.

use anyhow::Result;
use understudy_client::proto::{Position, Status, VolumeStatus};

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
            Ok(status) if global.json => print_json(&convert::status(&status))?,
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
        ["VOLUME", "SIZE", "ACK", "MODE", "PHASE", "DURABLE", "SENT", "ACKED", "AT RISK", "AGE", "CONSISTENT"],
        status.volumes.iter().map(row),
    ));
    lines.join("\n")
}

fn row(v: &VolumeStatus) -> [String; 11] {
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
        lsn(position.durable),
        lsn(position.sent),
        lsn(position.acked),
        size(v.bytes_at_risk),
        v.recovery_point.map_or_else(|| "-".to_owned(), |r| format!("{:.1}s", r.age_seconds)),
        if v.consistent { "yes" } else { "no" }.to_owned(),
    ]
}

fn lsn(position: Option<Position>) -> String {
    position.map_or_else(|| "-".to_owned(), |p| format!("{}:{}", p.generation, p.lsn))
}
