//! `promote`, `demote`, `switchover` and `resolve`: changes of role.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use understudy_client::proto::{
    DemoteRequest, GetUnshippedRequest, GroupPosition, PromoteRequest, PromoteResponse, PromotedGroup,
    ResolveSplitBrainRequest, Status, Unshipped,
};
use understudy_common::process::DirectoryLock;
use understudy_common::storage::RealStorage;
use understudy_common::store;

use crate::args::{DemoteArgs, Global, Loser, PromoteArgs, ResolveArgs, SwitchoverArgs};
use crate::convert;
use crate::output::{print_json, print_line, size, table};

/// How long a service may take to start in its new role.
const RESTART: Duration = Duration::from_secs(60);
/// How often that is looked for.
const LOOK: Duration = Duration::from_millis(20);

pub(crate) async fn promote(global: &Global, args: PromoteArgs) -> Result<()> {
    let request = PromoteRequest {
        expected_generation: args.generation,
        force: args.force,
        at_snapshot: args.at.clone().unwrap_or_default(),
        validate_only: args.dry_run,
        ..PromoteRequest::default()
    };
    let client = global.backup_client()?;
    if let Some(snapshot) = args.at.as_deref().filter(|_| !args.dry_run) {
        // What is given up is said before it is.
        let plan = PromoteRequest { validate_only: true, ..request.clone() };
        let plan = client.backup().promote(plan).await?;
        for group in &plan.groups {
            if let Some(text) = given_up(group) {
                eprintln!("{}: goes back to {snapshot}: {text}", group.group);
            }
        }
    }
    let promoted = client.backup().promote(request).await?;
    if global.json {
        return print_json(&promoted_json(&promoted));
    }
    if args.dry_run {
        print_line(&format!(
            "nothing was changed: this side is still the backup of generation {}",
            promoted.generation
        ))?;
    } else {
        print_line(&format!(
            "generation {}: this side is the primary; the service ends and must be started as understudy-primary \
             (`understudy node` does so)",
            promoted.generation
        ))?;
    }
    if promoted.bytes_at_risk > 0 {
        let lost = size(promoted.bytes_at_risk);
        print_line(&format!("lost: {lost} that the old primary had acknowledged alone, as of its last heartbeat"))?;
    }
    let rows = promoted.groups.iter().map(|g| {
        let mut notes = Vec::new();
        if g.dropped {
            notes.push("gone: it had no image".to_owned());
        }
        if g.rolled_back {
            notes.push("an unfinished run was taken back".to_owned());
        }
        notes.extend(given_up(g));
        [g.group.clone(), convert::position_text(g.position), format!("{:.1}s", g.age_seconds), notes.join("; ")]
    });
    print_line(&table(["GROUP", "IMAGE", "AGE AT MOST", ""], rows))
}

/// What a group loses beside what its image lacks, because it goes back to a snapshot.
fn given_up(group: &PromotedGroup) -> Option<String> {
    let back = group.back.as_ref()?;
    let position = convert::position_text(back.position);
    let behind = Duration::from_millis(u64::try_from(group.time_unix_ms - back.time_unix_ms).unwrap_or_default());
    let mut text = match back.position == group.position {
        true => format!("the snapshot at {position} is the image"),
        false => format!(
            "the snapshot at {position}; what the image has gained in {:.1}s since is lost",
            behind.as_secs_f64()
        ),
    };
    if !back.volumes_kept.is_empty() {
        text.push_str(&format!("; not in the snapshot, and left as they are: {}", back.volumes_kept.join(", ")));
    }
    Some(text)
}

fn promoted_json(promoted: &PromoteResponse) -> Value {
    let group = |g: &PromotedGroup| {
        let back = g.back.as_ref().map(|back| {
            json!({
                "position": convert::position(back.position),
                "time": back.time_unix_ms,
                "volumes_kept": back.volumes_kept,
            })
        });
        json!({
            "group": g.group,
            "position": convert::position(g.position),
            "time": g.time_unix_ms,
            "age_seconds": g.age_seconds,
            "rolled_back": g.rolled_back,
            "dropped": g.dropped,
            "back": back,
        })
    };
    json!({
        "generation": promoted.generation,
        "bytes_at_risk": promoted.bytes_at_risk,
        "groups": promoted.groups.iter().map(group).collect::<Vec<_>>(),
    })
}

pub(crate) async fn demote(global: &Global, args: DemoteArgs) -> Result<()> {
    let (generation, unshipped) = match &args.dir {
        Some(dir) => (demote_stopped(dir)?, None),
        None => {
            let demoted = ask_demote(global, args.drain, args.timeout).await?;
            (demoted.generation, Some(demoted.unshipped_bytes))
        }
    };
    if global.json {
        return print_json(&json!({"generation": generation, "unshipped_bytes": unshipped}));
    }
    let kept = match unshipped {
        Some(0) => "; the backup holds everything".to_owned(),
        Some(bytes) => format!("; {} of changes are not on the other side and will be overwritten", size(bytes)),
        None => String::new(),
    };
    print_line(&format!(
        "the primary of generation {generation} is a backup from now on{kept}; start understudy-backup"
    ))
}

async fn ask_demote(
    global: &Global,
    drain: bool,
    timeout: Duration,
) -> Result<understudy_client::proto::DemoteResponse> {
    let timeout_ms = u64::try_from(timeout.as_millis())?;
    Ok(global.primary_client()?.replication().demote(DemoteRequest { drain, timeout_ms }).await?)
}

fn demote_stopped(dir: &Path) -> Result<u64> {
    ensure!(dir.is_dir(), "{} is no directory; name that of a stopped primary", dir.display());
    let _lock = DirectoryLock::acquire(dir)?;
    let storage = RealStorage::new(dir).context("cannot open the directory")?;
    store::demote_stopped(&storage).with_context(|| format!("cannot change {}", dir.display()))
}

/// What one side says it is.
async fn ask_primary(global: &Global) -> Option<Status> {
    let client = global.primary_client().ok()?;
    client.replication().status().await.ok()
}

/// Planned and repeatable: demote with nothing left to ship, then promote with exactly that.
pub(crate) async fn switchover(global: &Global, args: SwitchoverArgs) -> Result<()> {
    let mut quick = global.clone();
    quick.retry_for = Duration::from_millis(200);
    let backup = global.backup_client()?.backup().status().await.context("the backup")?;
    let before = ask_primary(&quick).await;
    let start = Instant::now();
    let handed_over = match &before {
        Some(primary) => {
            ensure!(
                primary.generation == backup.generation && primary.pair_id == backup.pair_id,
                "the primary is of generation {} and the backup of {}: they are no pair now; see `understudy status`",
                primary.generation,
                backup.generation
            );
            ensure!(!primary.volumes.is_empty(), "the pair has no volumes, so there is nothing to hand over");
            ask_demote(global, true, args.timeout).await.context("the primary goes on as before")?.positions
        }
        // A switchover that stopped half-way: the old primary has been demoted.
        None => demoted_positions(&quick, backup.generation).await?,
    };
    let request = PromoteRequest { expected_generation: backup.generation, handed_over, ..PromoteRequest::default() };
    let again = "the old primary is demoted and nobody serves; run the same command again, or `understudy promote`";
    let promoted = global.backup_client()?.backup().promote(request).await.context(again)?;
    let serving = wait_for(|| async {
        let status = global.client(global.backup_url()).ok()?.replication().status().await.ok()?;
        (status.generation == promoted.generation).then_some(())
    });
    serving.await.context("the new primary does not serve yet; is it run by `understudy node`?")?;
    let pause = start.elapsed();
    if global.json {
        return print_json(&json!({"generation": promoted.generation, "pause_seconds": pause.as_secs_f64()}));
    }
    print_line(&format!(
        "generation {}: {} is the primary, {} becomes its backup; writes paused for {:.2}s",
        promoted.generation,
        global.backup_url(),
        global.primary,
        pause.as_secs_f64()
    ))
}

/// The positions of a primary that was demoted and serves as a backup by now.
async fn demoted_positions(global: &Global, generation: u64) -> Result<Vec<GroupPosition>> {
    let status = wait_for(|| async { global.primary_client().ok()?.backup().status().await.ok() });
    let status = status.await.context("neither a primary nor a demoted one answers at --primary")?;
    ensure!(
        status.generation == generation,
        "the node at --primary is a backup of generation {}, the one at --backup of {generation}: see `understudy status`",
        status.generation
    );
    ensure!(
        status.volumes.iter().all(|volume| volume.diverged),
        "both nodes are backups, and the one at --primary was not demoted: exchange the two, or use `understudy promote`"
    );
    ensure!(
        !status.volumes.is_empty(),
        "the demoted node has no volumes, so it cannot be told from another: use `understudy promote`"
    );
    let place = |v: &understudy_client::proto::VolumeStatus| GroupPosition {
        group_id: v.group_id,
        lane: 0,
        position: v.position.and_then(|at| at.next),
    };
    Ok(status.volumes.iter().map(place).collect())
}

async fn wait_for<T, F: Future<Output = Option<T>>>(look: impl Fn() -> F) -> Option<T> {
    let start = Instant::now();
    while start.elapsed() < RESTART {
        if let Some(found) = look().await {
            return Some(found);
        }
        tokio::time::sleep(LOOK).await;
    }
    None
}

pub(crate) async fn resolve(global: &Global, args: ResolveArgs) -> Result<()> {
    if let Some(side) = args.discard {
        let request = ResolveSplitBrainRequest {};
        let resolved = match side {
            Loser::Primary => global.primary_client()?.replication().resolve_split_brain(request).await?,
            Loser::Backup => global.backup_client()?.backup().resolve_split_brain(request).await?,
        };
        if global.json {
            return print_json(&json!({"generation": resolved.generation}));
        }
        return print_line(&format!(
            "the side of generation {} gives up its changes: start understudy-backup on its directory, and the other side \
             fills it",
            resolved.generation
        ));
    }
    let volume = args.volume.clone().unwrap_or_default();
    let file = args.export.as_deref().map(|path| {
        File::create(path).map(|file| (path, file)).with_context(|| format!("cannot write {}", path.display()))
    });
    let file = file.transpose()?;
    let request = GetUnshippedRequest { volume, data: file.is_some() };
    let mut ranges = global.primary_client()?.replication().unshipped(request).await?;
    let (mut listed, mut bytes) = (Vec::new(), 0);
    let lost = |status: tonic::Status| anyhow::anyhow!("the primary ended the list: {}", status.message());
    while let Some(Unshipped { volume, offset_bytes, length_bytes, data }) = ranges.message().await.map_err(lost)? {
        bytes += length_bytes;
        match &file {
            Some((path, file)) => {
                let written = file.write_all_at(&data, offset_bytes);
                written.with_context(|| format!("cannot write {}", path.display()))?;
            }
            None => listed.push((volume, offset_bytes, length_bytes)),
        }
    }
    if let Some((path, file)) = file {
        file.sync_all().with_context(|| format!("cannot write {}", path.display()))?;
        let json = json!({"bytes": bytes, "file": path});
        let text = format!("{} written to {}, each range at its offset", size(bytes), path.display());
        return if global.json { print_json(&json) } else { print_line(&text) };
    }
    if global.json {
        let range = |(volume, offset, length): &(String, u64, u64)| json!({"volume": volume, "offset_bytes": offset, "length_bytes": length});
        return print_json(&json!({"bytes": bytes, "ranges": listed.iter().map(range).collect::<Vec<_>>()}));
    }
    let rows = listed.into_iter().map(|(volume, offset, length)| [volume, offset.to_string(), size(length)]);
    print_line(&table(["VOLUME", "OFFSET", "LENGTH"], rows))?;
    print_line(&format!("{} acknowledged here and not on the backup", size(bytes)))
}
