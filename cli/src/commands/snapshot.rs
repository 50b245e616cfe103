//! `snapshot`: back in time.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use understudy_client::proto::{
    CloneSnapshotRequest, CopyProgress, DeleteSnapshotRequest, GetChangedBlocksRequest, ListSnapshotsRequest,
    RestoreSnapshotRequest, SnapshotInfo, SnapshotRequest,
};

use crate::args::{Global, Named, SnapshotCommand};
use crate::convert;
use crate::output::{print_json, print_line, progress, size, table, time};

pub(crate) async fn run(global: &Global, command: SnapshotCommand) -> Result<()> {
    match command {
        SnapshotCommand::Create { snapshot, freeze, before, after } => {
            let taken = create(global, snapshot, freeze.as_deref(), before.as_deref(), after.as_deref()).await?;
            if global.json {
                return print_json(&snapshot_json(&taken));
            }
            print_line(&snapshot_table(&[taken]))
        }
        SnapshotCommand::List { group, from_backup } => {
            let request = ListSnapshotsRequest { group: group.unwrap_or_default() };
            let all = if from_backup {
                global.backup_client()?.backup().snapshots(request).await?.snapshots
            } else {
                global.primary_client()?.volumes().snapshots(request).await?.snapshots
            };
            if global.json {
                return print_json(&Value::Array(all.iter().map(snapshot_json).collect()));
            }
            print_line(&snapshot_table(&all))
        }
        SnapshotCommand::Delete { snapshot: Named { target, snapshot } } => {
            let request = DeleteSnapshotRequest { group: target.clone(), snapshot: snapshot.clone() };
            global.primary_client()?.volumes().delete_snapshot(request).await?;
            if global.json {
                return print_json(&json!({"deleted": snapshot, "group": target}));
            }
            print_line(&format!("deleted {target}@{snapshot}"))
        }
        SnapshotCommand::Restore { snapshot: Named { target, snapshot }, group } => {
            let name = format!("{target}@{snapshot}");
            let (volume, group) = if group { (String::new(), target) } else { (target, String::new()) };
            let request = RestoreSnapshotRequest { volume, group, snapshot };
            let copy = global.primary_client()?.volumes().restore_snapshot(request).await?;
            let done = follow(global, copy).await?;
            if global.json {
                return print_json(&json!({"restored": name, "bytes": done.done_bytes}));
            }
            print_line(&format!("restored {name}: {} written", size(done.done_bytes)))
        }
        SnapshotCommand::Clone { snapshot: Named { target, snapshot }, name, group } => {
            let request = CloneSnapshotRequest { volume: target, snapshot, name: name.clone(), group };
            let copy = global.primary_client()?.volumes().clone_snapshot(request).await?;
            let done = follow(global, copy).await?;
            if global.json {
                return print_json(&json!({"volumes": done.volumes.iter().map(convert::volume).collect::<Vec<_>>()}));
            }
            print_line(&format!("made {name}, {}", size(done.total_bytes)))
        }
        SnapshotCommand::Diff { base: Named { target: volume, snapshot }, target } => {
            diff(global, volume, snapshot, target.unwrap_or_default()).await
        }
    }
}

async fn create(
    global: &Global,
    Named { target, snapshot }: Named,
    freeze: Option<&Path>,
    before: Option<&str>,
    after: Option<&str>,
) -> Result<SnapshotInfo> {
    let volumes = global.primary_client()?.volumes();
    if let Some(command) = before {
        shell(command).context("--before has failed, no snapshot was taken")?;
    }
    let taken = async {
        let thaw = freeze.map(Frozen::freeze).transpose()?;
        let taken = volumes.snapshot(SnapshotRequest { group: target, name: snapshot }).await?;
        drop(thaw);
        anyhow::Ok(taken)
    }
    .await;
    if let Some(command) = after {
        shell(command).context("--after has failed")?;
    }
    taken
}

fn shell(command: &str) -> Result<()> {
    // Standard output is the command's own answer.
    let status = Command::new("sh").args(["-c", command]).stdout(std::io::stderr()).status();
    let status = status.context("cannot start sh")?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

/// A frozen file system; thawed when it is dropped.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn freeze(mountpoint: &'a Path) -> Result<Self> {
        let status = Command::new("fsfreeze").arg("--freeze").arg(mountpoint).status();
        let status = status.context("cannot start fsfreeze, which is part of util-linux")?;
        if !status.success() {
            bail!("{} could not be frozen ({status}); no snapshot was taken", mountpoint.display());
        }
        Ok(Self(mountpoint))
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let status = Command::new("fsfreeze").arg("--unfreeze").arg(self.0).status();
        if !status.is_ok_and(|status| status.success()) {
            let path = self.0.display();
            eprintln!("warning: {path} is still frozen; run: fsfreeze --unfreeze {path}");
        }
    }
}

/// Shows the progress of a copy up to its end.
async fn follow(global: &Global, mut copy: tonic::Streaming<CopyProgress>) -> Result<CopyProgress> {
    let bar = progress(0, global.json);
    let mut last = CopyProgress::default();
    loop {
        match copy.message().await {
            Ok(Some(now)) => {
                bar.set_length(now.total_bytes);
                bar.set_position(now.done_bytes);
                last = now;
            }
            Ok(None) => break,
            Err(status) => {
                bar.abandon();
                bail!(
                    "{}; the copy goes on where the primary does, `volume show` tells when it is done",
                    status.message()
                );
            }
        }
    }
    bar.finish_and_clear();
    if !last.finished {
        bail!("the primary ended before the copy did; it goes on when the primary is started again");
    }
    Ok(last)
}

async fn diff(global: &Global, volume: String, base: String, target: String) -> Result<()> {
    let request = GetChangedBlocksRequest {
        volume,
        base_snapshot: base,
        target_snapshot: target,
        starting_offset: 0,
        max_results: 0,
    };
    let mut answers = global.primary_client()?.volumes().changed_blocks(request).await?;
    let (mut ranges, mut bytes, mut capacity) = (Vec::new(), 0, 0);
    while let Some(answer) = answers.message().await.map_err(|status| anyhow::anyhow!("{}", status.message()))? {
        capacity = answer.volume_capacity_bytes;
        for block in answer.block_metadata {
            bytes += block.size_bytes;
            ranges.push((block.byte_offset, block.size_bytes));
        }
    }
    if global.json {
        let ranges: Vec<Value> =
            ranges.iter().map(|(at, length)| json!({"byte_offset": at, "size_bytes": length})).collect();
        return print_json(&json!({"volume_capacity_bytes": capacity, "changed_bytes": bytes, "ranges": ranges}));
    }
    let count = ranges.len();
    if count > 0 {
        let row = |(at, length): &(u64, u64)| [at.to_string(), length.to_string()];
        print_line(&table(["OFFSET", "BYTES"], ranges.iter().map(row)))?;
    }
    print_line(&format!("{} in {count} range{} differ", size(bytes), if count == 1 { "" } else { "s" }))
}

fn snapshot_json(snapshot: &SnapshotInfo) -> Value {
    let volumes: Vec<Value> = snapshot
        .volumes
        .iter()
        .map(|volume| json!({"id": volume.id, "name": volume.name, "size_bytes": volume.size_bytes}))
        .collect();
    json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "group": snapshot.group,
        "volumes": volumes,
        "position": convert::position(snapshot.position),
        "time_unix_ms": snapshot.time_unix_ms,
        "mirrored": snapshot.mirrored,
        "held_bytes": snapshot.held_bytes,
    })
}

fn snapshot_table(all: &[SnapshotInfo]) -> String {
    let row = |s: &SnapshotInfo| {
        [
            format!("{}@{}", s.group, s.name),
            time(s.time_unix_ms),
            size(s.volumes.iter().map(|v| v.size_bytes).sum()),
            size(s.held_bytes),
            if s.mirrored { "both" } else { "primary" }.to_owned(),
        ]
    };
    table(["SNAPSHOT", "TAKEN", "SIZE", "HELD", "ON"], all.iter().map(row))
}
