//! `scrub`: every stored block is read back and compared with its checksum, on both sides.

use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use understudy_client::proto::{DamagedBlock, ScrubRequest, ScrubResponse, ScrubStatus};

use crate::args::{Global, ScrubArgs};
use crate::output::{print_json, print_line, progress, size, table, time};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(300);
/// Looks behind the end of a scrub while blocks wait for their repair.
const REPAIR_LOOKS: u32 = 30;

pub(crate) async fn run(global: &Global, args: ScrubArgs) -> Result<()> {
    let replication = global.primary_client()?.replication();
    let ask = |start| ScrubRequest { start, volume_id: 0, volume: args.volume.clone().unwrap_or_default() };
    let mut found = replication.scrub(ask(!args.status)).await?;
    let bar = progress(0, global.json || args.status);
    while !args.status && sides(&found).iter().any(|(_, status, _)| status.running) {
        let sum = |of: fn(&ScrubStatus) -> u64| sides(&found).iter().map(|(_, status, _)| of(status)).sum::<u64>();
        let done = sum(|status| status.done_bytes);
        bar.set_length(sum(|status| status.total_bytes).max(done));
        bar.set_position(done);
        tokio::time::sleep(LOOK).await;
        found = replication.scrub(ask(false)).await?;
    }
    bar.finish_and_clear();
    // What can be repaired is, within seconds.
    let heads = |found: &ScrubResponse| sides(found).iter().any(|(_, _, d)| d.iter().any(|b| !b.snapshot_only));
    for _ in 0..REPAIR_LOOKS {
        if args.status || found.backup.is_none() || !heads(&found) {
            break;
        }
        tokio::time::sleep(LOOK).await;
        found = replication.scrub(ask(false)).await?;
    }
    if global.json {
        print_json(&to_json(&found))?
    } else {
        print(&found)?
    }
    let left = found.primary_damaged.len() + found.backup_damaged.len();
    if left > 0 {
        bail!(
            "{left} blocks are damaged and not repaired yet: a block of a head is repaired while the other side is \
             attached and holds the same version (see `events`); otherwise write it anew, or restore it from the other side"
        );
    }
    Ok(())
}

fn sides(found: &ScrubResponse) -> Vec<(&'static str, &ScrubStatus, &[DamagedBlock])> {
    let primary = found.primary.iter().map(|status| ("primary", status, &found.primary_damaged[..]));
    primary.chain(found.backup.iter().map(|status| ("backup", status, &found.backup_damaged[..]))).collect()
}

fn print(found: &ScrubResponse) -> Result<()> {
    let rows = sides(found).into_iter().map(|(side, status, damaged)| {
        let state = if status.running { "running" } else { "idle" };
        [
            side.to_owned(),
            state.to_owned(),
            size(status.done_bytes),
            status.damaged_blocks.to_string(),
            damaged.len().to_string(),
            time(status.completed_unix_ms),
        ]
    });
    print_line(&table(["SIDE", "STATE", "READ", "FOUND", "DAMAGED NOW", "LAST COMPLETED"], rows))?;
    for (side, _, damaged) in sides(found) {
        for block in damaged {
            let seen_by = if block.snapshot_only { "snapshots only" } else { "the head" };
            print_line(&format!("{side}: block {} of volume {}, seen by {seen_by}", block.block, block.volume_id))?;
        }
    }
    if found.backup.is_none() {
        print_line(&format!("the backup was not asked: {}", found.backup_reason))?;
    }
    Ok(())
}

fn to_json(found: &ScrubResponse) -> Value {
    let side = |status: &ScrubStatus, damaged: &[DamagedBlock]| {
        let block = |block: &DamagedBlock| json!({"volume_id": block.volume_id, "block": block.block, "snapshot_only": block.snapshot_only});
        json!({
            "running": status.running,
            "volume_id": status.volume_id,
            "done_bytes": status.done_bytes,
            "total_bytes": status.total_bytes,
            "damaged_blocks": status.damaged_blocks,
            "started_unix_ms": status.started_unix_ms,
            "completed_unix_ms": status.completed_unix_ms,
            "damaged": damaged.iter().map(block).collect::<Vec<_>>(),
        })
    };
    json!({
        "primary": found.primary.as_ref().map(|status| side(status, &found.primary_damaged)),
        "backup": found.backup.as_ref().map(|status| side(status, &found.backup_damaged)),
        "backup_reason": found.backup_reason,
    })
}
