//! Failover and failback of real processes: promotion, demotion, fencing, split brain, switchover, lease.
//!
//! `UNDERSTUDY_BIN_DIR` names the binaries to test, `UNDERSTUDY_SEED` replays a run of the rounds, `UNDERSTUDY_ROUNDS`
//! makes it longer. Times and bytes are printed, not asserted, but where a bound is a promise.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rand::{Rng as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use tonic::Code;
use understudy_common::proxy::Link;
use understudy_proto::v1::{self, AckRule, AwayRule};
use understudy_tests::process::{
    PATIENCE, Role, bin_dir,
    duo::Duo,
    load::{self, BLOCK_BYTES, BLOCKS_PER_WRITER, Load},
    seed,
};

const VOLUME: &str = "data";
/// Rounds of each, switchover and failover; CI asks for more with `UNDERSTUDY_ROUNDS`.
const ROUNDS: u32 = 2;
const WRITERS: usize = 2;

fn forced() -> v1::PromoteRequest {
    v1::PromoteRequest { force: true, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledged_write_of_both_survives_promotion_and_the_wrong_binary_is_refused() -> Result<()> {
    let mut duo = Duo::start().await?;
    duo.create_volume(0, VOLUME, 64, AckRule::Both, AwayRule::Block).await?;
    duo.until_joined(0).await?;
    for block in 0..64 {
        let ack = duo.write(0, VOLUME, block, block + 1).await?;
        ensure!(ack.durability() == v1::Durability::Both, "{ack:?}");
    }
    // Beside a primary that serves, and with another generation than the one there is: refused, and nothing is changed.
    let refused = duo.backup(1)?.promote(v1::PromoteRequest::default()).await.unwrap_err();
    ensure!(refused.code() == Code::FailedPrecondition && refused.message().contains("attached"), "{refused:?}");
    let stale = v1::PromoteRequest { expected_generation: 7, force: true, ..Default::default() };
    let refused = duo.backup(1)?.promote(stale).await.unwrap_err();
    ensure!(refused.message().contains("generation 7 was expected and 1 is current"), "{refused:?}");
    duo.until_joined(0).await?;
    // A heartbeat says that nothing is missing.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let refused = duo.backup(1)?.promote(v1::PromoteRequest::default()).await.err();
        if refused.as_ref().is_some_and(|refused| refused.message().contains("; 0 bytes ")) {
            break;
        }
        ensure!(Instant::now() < deadline, "{refused:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    duo.kill(0);
    let expected = v1::PromoteRequest { expected_generation: 1, ..Default::default() };
    let start = Instant::now();
    let promoted = duo.promote(1, expected).await?;
    let asked = Instant::now();
    ensure!(promoted.generation == 2 && promoted.bytes_at_risk == 0, "{promoted:?}");
    duo.again(1, Role::Primary).await?;
    for block in 0..64 {
        ensure!(
            duo.read(1, VOLUME, block).await? == load::fill(0, usize::try_from(block)?, block + 1),
            "block {block}"
        );
        if block == 0 {
            let (all, answer) = (start.elapsed(), asked.elapsed());
            println!(
                "promote to first served read: {answer:.3?} behind the answer, {all:.3?} behind the first request"
            );
        }
    }
    // Twice: it is a primary by now.
    let twice = duo.backup(1)?.promote(v1::PromoteRequest { expected_generation: 1, ..Default::default() }).await;
    ensure!(twice.is_err_and(|status| status.code() == Code::Unimplemented), "promoted twice");
    duo.kill(1);
    duo.refuses(1, Role::Backup, "belongs to a primary").await?;
    duo.run(1, Role::Primary).await?;
    ensure!(duo.read(1, VOLUME, 5).await? == load::fill(0, 5, 6), "behind a restart");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn promotion_within_a_run_gives_the_image_from_before_it() -> Result<()> {
    let mut duo = Duo::start().await?;
    duo.create_volume(0, VOLUME, 4096, AckRule::Staged, AwayRule::Degrade).await?;
    for block in 0..256 {
        duo.write(0, VOLUME, block, 1).await?;
    }
    duo.until_joined(0).await?;
    let before = duo.image(1, Role::Backup, VOLUME).await?;
    duo.doors[1].set(Link::Cut);
    duo.until(0, "delta mode", |s| s.volumes.iter().all(|v| v.mode() == v1::Mode::Delta)).await?;
    for block in 0..2048 {
        duo.write(0, VOLUME, block, 2).await?;
    }
    duo.doors[1].set(Link::Slow(256 << 10));
    let started = Instant::now();
    loop {
        let status = duo.backup(1)?.get_status(v1::GetStatusRequest {}).await?.into_inner();
        let busy = status.staging.as_ref().is_some_and(|s| s.span_bytes > 512 << 10);
        if status.volumes.iter().any(|v| v.phase() == v1::Phase::Round) && busy {
            break;
        }
        ensure!(started.elapsed() < Duration::from_secs(30), "no run came to the backup: {status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    duo.kill(0);
    let promoted = duo.promote(1, v1::PromoteRequest::default()).await?;
    ensure!(promoted.groups.iter().all(|group| group.rolled_back), "{promoted:?}");
    ensure!(promoted.bytes_at_risk > 0, "what is lost is not said: {promoted:?}");
    duo.again(1, Role::Primary).await?;
    ensure!(duo.image(1, Role::Primary, VOLUME).await? == before, "not the image from before the run");
    Ok(())
}

/// Reads a volume of a primary once it is served again.
async fn until_served(duo: &Duo, node: usize, volume: &str) -> Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match duo.read(node, volume, 0).await {
            Ok(_) => return duo.image(node, Role::Primary, volume).await,
            Err(error) => {
                let status = error.downcast_ref::<tonic::Status>().context("a status")?;
                ensure!(status.code() == Code::FailedPrecondition, "{status}");
                ensure!(Instant::now() < deadline, "{volume} is not served within {PATIENCE:?}: {status}");
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_to_a_snapshot_serves_nothing_else_and_fails_back() -> Result<()> {
    let mut duo = Duo::start().await?;
    duo.create_volume(0, VOLUME, 4096, AckRule::Staged, AwayRule::Degrade).await?;
    duo.create_volume(0, "other", 64, AckRule::Staged, AwayRule::Degrade).await?;
    for block in 0..1024 {
        duo.write(0, VOLUME, block, 1).await?;
    }
    duo.write(0, "other", 1, 1).await?;
    duo.until_joined(0).await?;
    let mut volumes = understudy_proto::v1::volume_service_client::VolumeServiceClient::new(duo.node(0)?.channel()?);
    let mut take = async |group: &str, name: &str| {
        volumes.snapshot(v1::SnapshotRequest { group: group.into(), name: name.into() }).await
    };
    take(VOLUME, "clean").await?;
    let clean = duo.image(0, Role::Primary, VOLUME).await?;
    for block in 512..2048 {
        duo.write(0, VOLUME, block, 2).await?;
    }
    duo.until_joined(0).await?;
    let at = |force, validate_only| v1::PromoteRequest {
        at_snapshot: "clean".into(),
        force,
        validate_only,
        ..Default::default()
    };
    // A group without it: refused by name, forced or not, and nothing has changed.
    for force in [false, true] {
        let refused = duo.backup(1)?.promote(at(force, true)).await.unwrap_err();
        ensure!(refused.code() == Code::FailedPrecondition, "{refused:?}");
        ensure!(refused.message().contains("other has no snapshot \"clean\""), "{refused:?}");
    }
    let refused = duo.backup(1)?.promote(at(true, false)).await.unwrap_err();
    ensure!(refused.message().contains("other has no snapshot \"clean\""), "{refused:?}");
    duo.until_joined(0).await?;
    take("other", "clean").await?;
    duo.write(0, "other", 1, 2).await?;
    take(VOLUME, "later").await?;
    duo.until_joined(0).await?;
    // What would be lost, said beside a primary that serves.
    let plan = duo.backup(1)?.promote(at(false, true)).await?.into_inner();
    ensure!(plan.generation == 1 && plan.groups.len() == 2, "{plan:?}");
    for group in &plan.groups {
        let back = group.back.as_ref().context("back")?;
        let (image, snapshot) = (group.position.context("position")?, back.position.context("position")?);
        ensure!(snapshot.lsn < image.lsn && back.time_unix_ms <= group.time_unix_ms, "{group:?}");
    }
    duo.until_joined(0).await?;

    duo.kill(0);
    let promoted = duo.promote(1, at(false, false)).await?;
    ensure!(promoted.generation == 2 && promoted.groups.iter().all(|g| g.back.is_some()), "{promoted:?}");
    duo.again(1, Role::Primary).await?;
    // It dies at once: whatever it has restored by then, it goes on.
    duo.kill(1);
    duo.run(1, Role::Primary).await?;
    ensure!(until_served(&duo, 1, VOLUME).await? == clean, "not the snapshot");
    until_served(&duo, 1, "other").await?;
    ensure!(duo.read(1, "other", 1).await? == load::fill(0, 1, 1), "not the snapshot of the other group");
    // The newer one is still there.
    let list = volumes_of(&duo, 1)?.list_snapshots(v1::ListSnapshotsRequest::default()).await?.into_inner();
    let names: Vec<&str> = list.snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
    ensure!(names == ["clean", "later", "clean"], "{names:?}");
    duo.write(1, VOLUME, 7, 7).await?;

    // The old primary comes back as the backup; what it has and the snapshot has not goes.
    duo.doors[0].set(Link::Open);
    duo.run(0, Role::Primary).await?;
    duo.until_fenced(0, VOLUME, 0, 9).await?;
    duo.replication(0)?.demote(v1::DemoteRequest::default()).await?;
    duo.again(0, Role::Backup).await?;
    duo.until_joined(1).await?;
    let image = duo.identical(1, VOLUME).await?;
    ensure!(image[7 * BLOCK_BYTES..][..BLOCK_BYTES] == load::fill(0, 7, 7), "the new primary's write");
    ensure!(image[8 * BLOCK_BYTES..] == clean[8 * BLOCK_BYTES..], "not the snapshot");
    duo.identical(1, "other").await?;
    Ok(())
}

fn volumes_of(
    duo: &Duo,
    node: usize,
) -> Result<understudy_proto::v1::volume_service_client::VolumeServiceClient<tonic::transport::Channel>> {
    Ok(understudy_proto::v1::volume_service_client::VolumeServiceClient::new(duo.node(node)?.channel()?))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_without_an_image_is_not_promoted_forced_or_not() -> Result<()> {
    let mut duo = Duo::start().await?;
    duo.create_volume(0, VOLUME, 4096, AckRule::Staged, AwayRule::Degrade).await?;
    for block in 0..2048 {
        duo.write(0, VOLUME, block, 1).await?;
    }
    duo.until_joined(0).await?;
    // Another, empty one in its place.
    duo.kill(1);
    std::fs::remove_dir_all(duo.data_dir(1))?;
    duo.doors[1].set(Link::Slow(128 << 10));
    duo.run(1, Role::Backup).await?;
    let started = Instant::now();
    loop {
        let refused = duo.backup(1)?.promote(forced()).await;
        match refused {
            Err(status) if status.message().contains("no group has a complete image") => {
                ensure!(status.code() == Code::FailedPrecondition, "{status:?}");
                break;
            }
            Ok(_) => anyhow::bail!("an empty backup was promoted"),
            Err(_) => ensure!(started.elapsed() < Duration::from_secs(30), "{refused:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Cuts the link, lets the old primary go on alone, and promotes the backup beside it.
async fn split_link_and_promote(duo: &mut Duo, alone: std::ops::Range<u64>) -> Result<()> {
    duo.doors.iter().for_each(|door| door.set(Link::Cut));
    duo.until(0, "link lost", |s| s.link.as_ref().is_some_and(|link| link.state != "attached")).await?;
    for block in alone {
        duo.write(0, VOLUME, block, 1000 + block).await?;
    }
    duo.promote(1, v1::PromoteRequest::default()).await?;
    duo.again(1, Role::Primary).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_primary_acknowledges_nothing_and_fails_back_exactly() -> Result<()> {
    let mut duo = Duo::start().await?;
    duo.create_volume(0, VOLUME, 16384, AckRule::Staged, AwayRule::Degrade).await?;
    for block in 0..2048 {
        duo.write(0, VOLUME, block, 1).await?;
    }
    duo.until_joined(0).await?;
    // Changes of both sides, some of them of the same blocks.
    split_link_and_promote(&mut duo, 100..600).await?;
    for block in 500..900 {
        duo.write(1, VOLUME, block, 5000 + block).await?;
    }
    // Either side tells it: here the new primary calls.
    duo.doors[0].set(Link::Open);
    let refused = duo.until_fenced(0, VOLUME, 100, 1100).await?;
    ensure!(refused.message().contains("generation 2") && refused.message().contains("demote"), "{refused:?}");
    ensure!(duo.read(0, VOLUME, 1).await.is_err(), "a superseded primary serves reads");
    duo.kill(0);
    duo.doors[0].set(Link::Cut);
    duo.run(0, Role::Primary).await?;
    let refused = duo.write(0, VOLUME, 0, 9).await.unwrap_err();
    ensure!(refused.code() == Code::FailedPrecondition, "behind a restart: {refused:?}");

    // What it had acknowledged alone can still be seen, with its bytes.
    let request = v1::GetUnshippedRequest { volume: VOLUME.into(), data: true };
    let mut unshipped = duo.replication(0)?.get_unshipped(request).await?.into_inner();
    let mut blocks = 0;
    while let Some(v1::Unshipped { offset_bytes, data, .. }) = unshipped.message().await? {
        for (at, bytes) in (usize::try_from(offset_bytes)? / BLOCK_BYTES..).zip(data.chunks(BLOCK_BYTES)) {
            ensure!(
                (100..600).contains(&at) && bytes == load::fill(0, at, 1000 + at as u64),
                "block {at} was not unshipped"
            );
            blocks += 1;
        }
    }
    ensure!(blocks == 500, "{blocks} blocks are unshipped, not 500");

    let demoted = duo.replication(0)?.demote(v1::DemoteRequest::default()).await?.into_inner();
    ensure!(demoted.unshipped_bytes == 500 * BLOCK_BYTES as u64, "{demoted:?}");
    duo.again(0, Role::Backup).await?;
    let status = duo.backup(0)?.get_status(v1::GetStatusRequest {}).await?.into_inner();
    ensure!(status.volumes[0].diverged, "{status:?}");
    duo.doors[0].set(Link::Open);
    duo.until_joined(1).await?;
    let image = duo.identical(1, VOLUME).await?;
    ensure!(image[550 * BLOCK_BYTES..][..BLOCK_BYTES] == load::fill(0, 550, 5550), "the new primary's write");
    ensure!(image[150 * BLOCK_BYTES..][..BLOCK_BYTES] == load::fill(0, 150, 1), "a write of the old primary came back");
    let sent: u64 = run_bytes(&duo, 1).await?;
    let differing = 800 * BLOCK_BYTES as u64;
    println!("failback: {sent} bytes in whole blocks for {differing} that differ");
    ensure!(sent >= differing && sent <= differing + differing / 20, "{sent} bytes for {differing} that differ");
    Ok(())
}

/// What committed runs of a primary moved: sent before compression, and zeros.
async fn run_bytes(duo: &Duo, primary: usize) -> Result<u64> {
    let mut bytes = 0;
    for event in duo.events(primary, Role::Primary).await?.iter().filter(|event| event.kind == "run.committed") {
        let field = |name: &str| event.fields.get(name).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
        bytes += field("done_bytes");
    }
    Ok(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_old_primary_comes_back_and_volumes_that_only_one_side_has_follow() -> Result<()> {
    let mut duo = Duo::start().await?;
    duo.create_volume(0, VOLUME, 256, AckRule::Staged, AwayRule::Degrade).await?;
    duo.create_volume(0, "gone", 64, AckRule::Staged, AwayRule::Degrade).await?;
    duo.write(0, VOLUME, 3, 3).await?;
    duo.until_joined(0).await?;
    duo.doors[1].set(Link::Cut);
    duo.until(0, "link lost", |s| s.link.as_ref().is_some_and(|link| link.state != "attached")).await?;
    // The old primary alone: a volume made, one deleted, one grown, and written behind its old end.
    duo.create_volume(0, "alone", 64, AckRule::Staged, AwayRule::Degrade).await?;
    duo.write(0, "alone", 1, 1).await?;
    let mut volumes = understudy_proto::v1::volume_service_client::VolumeServiceClient::new(duo.node(0)?.channel()?);
    volumes.delete_volume(v1::DeleteVolumeRequest { volume: "gone".into(), ..Default::default() }).await?;
    let size_bytes = 512 * BLOCK_BYTES as u64;
    volumes.resize_volume(v1::ResizeVolumeRequest { volume: VOLUME.into(), size_bytes, ..Default::default() }).await?;
    duo.write(0, VOLUME, 400, 4).await?;
    duo.kill(0);
    duo.promote(1, v1::PromoteRequest::default()).await?;
    duo.again(1, Role::Primary).await?;
    // The new one: the same name again, and a write to what the other had deleted.
    duo.create_volume(1, "alone", 32, AckRule::Staged, AwayRule::Degrade).await?;
    duo.write(1, "alone", 2, 2).await?;
    duo.write(1, "gone", 7, 7).await?;

    let dir = duo.data_dir(0);
    let storage = understudy_common::storage::RealStorage::new(&dir)?;
    ensure!(understudy_common::store::demote_stopped(&storage)? == 1, "the generation of the old primary");
    drop(storage);
    duo.refuses(0, Role::Primary, "belongs to a backup").await?;
    duo.run(0, Role::Backup).await?;
    duo.doors[0].set(Link::Open);
    duo.until_joined(1).await?;
    for volume in [VOLUME, "gone", "alone"] {
        duo.identical(1, volume).await?;
    }
    // What the new primary makes room for later is zeros on both sides.
    let mut volumes = understudy_proto::v1::volume_service_client::VolumeServiceClient::new(duo.node(1)?.channel()?);
    volumes.resize_volume(v1::ResizeVolumeRequest { volume: VOLUME.into(), size_bytes, ..Default::default() }).await?;
    duo.until_joined(1).await?;
    let image = duo.identical(1, VOLUME).await?;
    ensure!(
        image[400 * BLOCK_BYTES..][..BLOCK_BYTES].iter().all(|byte| *byte == 0),
        "what lay behind the end came back"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_promotions_split_the_pair_until_one_side_gives_up() -> Result<()> {
    let mut duo = Duo::start().await?;
    duo.create_volume(0, VOLUME, 256, AckRule::Staged, AwayRule::Degrade).await?;
    for block in 0..32 {
        duo.write(0, VOLUME, block, 1).await?;
    }
    duo.until_joined(0).await?;
    split_link_and_promote(&mut duo, 10..20).await?;
    // The old primary is demoted and promoted again, without having heard of the other.
    duo.replication(0)?.demote(v1::DemoteRequest::default()).await?;
    duo.again(0, Role::Backup).await?;
    let refused = duo.backup(0)?.promote(v1::PromoteRequest::default()).await.unwrap_err();
    ensure!(refused.message().contains("splits the pair"), "{refused:?}");
    duo.promote(0, forced()).await?;
    duo.again(0, Role::Primary).await?;
    duo.write(0, VOLUME, 15, 77).await?;
    duo.write(1, VOLUME, 16, 88).await?;
    duo.doors.iter().for_each(|door| door.set(Link::Open));
    for node in 0..2 {
        let refused =
            |s: &v1::Status| s.link.as_ref().is_some_and(|l| l.state == "refused" && l.reason.contains("split brain"));
        duo.until(node, "split brain", refused).await?;
        let events = duo.events(node, Role::Primary).await?;
        ensure!(events.iter().any(|event| event.kind == "split_brain.detected"), "node {node}: {events:?}");
        // Neither is stopped: which of the two is right only an operator knows.
        duo.write(node, VOLUME, 30, 30 + node as u64).await?;
    }
    duo.replication(0)?.resolve_split_brain(v1::ResolveSplitBrainRequest {}).await?;
    duo.again(0, Role::Backup).await?;
    duo.until_joined(1).await?;
    let image = duo.identical(1, VOLUME).await?;
    ensure!(image[15 * BLOCK_BYTES..][..BLOCK_BYTES] == load::fill(0, 15, 1), "the loser's write is there");
    ensure!(image[16 * BLOCK_BYTES..][..BLOCK_BYTES] == load::fill(0, 16, 88), "the winner's write is not");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_without_its_lease_serves_nobody() -> Result<()> {
    let duo = Duo::start_with(&["--lease-mode", "required", "--lease-ttl", "700ms"]).await?;
    let refused = duo.write(0, VOLUME, 0, 1).await.unwrap_err();
    ensure!(refused.code() == Code::FailedPrecondition && refused.message().contains("lease"), "{refused:?}");
    let renew = async || -> Result<_> {
        Ok(duo.replication(0)?.renew_lease(v1::RenewLeaseRequest { generation: 1 }).await?.into_inner().remaining_ms)
    };
    ensure!(renew().await? == 700, "the ttl");
    duo.create_volume(0, VOLUME, 64, AckRule::Staged, AwayRule::Degrade).await?;
    duo.write(0, VOLUME, 0, 1).await?;
    // While it holds, the other side is not promoted, also when the link is lost.
    renew().await?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    duo.doors[1].set(Link::Cut);
    let refused = duo.backup(1)?.promote(v1::PromoteRequest::default()).await.unwrap_err();
    ensure!(refused.message().contains("attached") || refused.message().contains("lease holds"), "{refused:?}");
    tokio::time::sleep(Duration::from_millis(1000)).await;
    let refused = duo.write(0, VOLUME, 0, 2).await.unwrap_err();
    ensure!(refused.message().contains("lease"), "{refused:?}");
    ensure!(duo.read(0, VOLUME, 0).await.is_err(), "a read behind the lease");
    duo.promote(1, v1::PromoteRequest::default()).await?;
    Ok(())
}

fn rounds() -> u32 {
    std::env::var("UNDERSTUDY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS)
}

/// A to B to A and so on, planned and forced, under writers that know what was acknowledged on both sides.
#[tokio::test(flavor = "multi_thread")]
async fn rounds_of_switchover_and_failover_lose_nothing_acknowledged_on_both_sides() -> Result<()> {
    let seed = seed(1);
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let mut duo = Duo::start().await?;
    duo.create_volume(0, VOLUME, (WRITERS * BLOCKS_PER_WRITER) as u64, AckRule::Both, AwayRule::Block).await?;
    duo.create_volume(0, "staged", 64, AckRule::Staged, AwayRule::Degrade).await?;
    duo.until_joined(0).await?;
    let mut load = Load::start(seed, &[VOLUME], WRITERS);
    let mut primary = 0;
    load.serve(Some(duo.node(primary)?.channel()?));
    let (mut pauses, mut stamp) = (Vec::new(), 1);
    let (mut planned, mut forced) = (rounds(), rounds());
    for round in 0..2 * rounds() {
        let context = || format!("seed {seed}, round {round}, primary {primary}");
        load.progress(rng.random_range(20..200), Duration::from_secs(5)).await.with_context(context)?;
        for _ in 0..rng.random_range(0..20) {
            stamp += 1;
            duo.write(primary, "staged", rng.random_range(0..64), stamp).await.with_context(context)?;
        }
        let other = 1 - primary;
        if forced == 0 || planned > 0 && rng.random() {
            planned -= 1;
            pauses.push(switchover(&mut duo, &mut load, primary).await.with_context(context)?);
        } else {
            forced -= 1;
            failover(&mut duo, &mut load, primary, &mut rng).await.with_context(context)?;
        }
        primary = other;
        duo.until_joined(primary).await.with_context(|| format!("seed {seed}, behind round {round}"))?;
    }
    load.progress(50, Duration::from_secs(5)).await?;
    let acks = load.acks();
    let expected = load.finish().await.with_context(|| format!("seed {seed}"))?;
    duo.until_joined(primary).await?;
    let image = duo.identical(primary, VOLUME).await.with_context(|| format!("seed {seed}"))?;
    duo.identical(primary, "staged").await.with_context(|| format!("seed {seed}"))?;
    for (block, (content, cell)) in image.chunks(BLOCK_BYTES).zip(&expected[0]).enumerate() {
        cell.check(0, block, content).with_context(|| format!("seed {seed}"))?;
    }
    println!("{} rounds of each, {acks} acknowledged writes; write pauses of switchovers: {pauses:.3?}", rounds());
    Ok(())
}

/// How long writes paused.
async fn switchover(duo: &mut Duo, load: &mut Load, primary: usize) -> Result<Duration> {
    let other = 1 - primary;
    let start = Instant::now();
    let demoted =
        duo.replication(primary)?.demote(v1::DemoteRequest { drain: true, timeout_ms: 10_000 }).await?.into_inner();
    load.serve(None);
    ensure!(demoted.unshipped_bytes == 0, "{demoted:?}");
    let request = v1::PromoteRequest {
        expected_generation: demoted.generation,
        handed_over: demoted.positions,
        ..Default::default()
    };
    duo.backup(other)?.promote(request).await?;
    duo.again(other, Role::Primary).await?;
    load.serve(Some(duo.node(other)?.channel()?));
    let pause = start.elapsed();
    duo.again(primary, Role::Backup).await?;
    Ok(pause)
}

/// The primary dies, or is cut off and goes on; the other is promoted, and the old one comes back as its backup.
async fn failover(duo: &mut Duo, load: &mut Load, primary: usize, rng: &mut Pcg64Mcg) -> Result<()> {
    let other = 1 - primary;
    let dies = rng.random();
    if dies {
        load.serve(None);
        duo.kill(primary);
    } else {
        duo.doors.iter().for_each(|door| door.set(Link::Cut));
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..300))).await;
        load.serve(None);
    }
    duo.promote(other, v1::PromoteRequest::default()).await?;
    duo.again(other, Role::Primary).await?;
    load.serve(Some(duo.node(other)?.channel()?));
    duo.doors.iter().for_each(|door| door.set(Link::Open));
    if dies {
        duo.run(primary, Role::Primary).await?;
    }
    duo.until_fenced(primary, "staged", 0, 1).await?;
    duo.replication(primary)?.demote(v1::DemoteRequest::default()).await?;
    duo.again(primary, Role::Backup).await
}

/// A node under `understudy node`; its service ends with it.
struct Supervised {
    child: std::process::Child,
    url: String,
}

impl Supervised {
    fn start(dir: &std::path::Path, role: &str, port: u16, peer: u16) -> Result<Self> {
        let log = std::fs::File::create(dir.with_extension("log"))?;
        let url = |port| format!("http://127.0.0.1:{port}");
        let mut command = std::process::Command::new(bin_dir().join("understudy"));
        command.args(["node", "--role", role, "--peer", &url(peer), "--data-dir"]).arg(dir).arg("--");
        command.args(["--listen", &format!("127.0.0.1:{port}"), "--admin-listen", "127.0.0.1:0"]);
        command.args(["--link-heartbeat", "50ms", "--link-timeout", "400ms", "--link-reconnect-max", "300ms"]);
        let child = command.stdout(log.try_clone()?).stderr(log).spawn()?;
        Ok(Self { child, url: url(port) })
    }

    /// SIGTERM, which goes on to the service.
    async fn stop(&mut self) -> Result<Option<i32>> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            ensure!(Instant::now() < deadline, "a node does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        // Errors only mean that it ended before. SIGTERM, so that its service ends as well.
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

async fn understudy(args: &[&str]) -> Result<serde_json::Value> {
    let mut command = std::process::Command::new(bin_dir().join("understudy"));
    command.args(["--json", "--retry-for", "20s"]).args(args);
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn supervised_nodes_exchange_their_roles_and_end_in_order() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let free = || Ok::<u16, std::io::Error>(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port());
    let (a, b) = (free()?, free()?);
    let mut first = Supervised::start(&directory.path().join("a"), "primary", a, b)?;
    let mut second = Supervised::start(&directory.path().join("b"), "backup", b, a)?;
    understudy(&["--primary", &first.url, "volume", "create", VOLUME, "--size", "1MiB"]).await?;
    let (mut primary, mut backup) = (first.url.clone(), second.url.clone());
    for round in 0..2_u64 {
        let joined = Instant::now();
        loop {
            let status = understudy(&["--primary", &primary, "status"]).await?;
            if status["link"]["state"] == "attached" && status["volumes"][0]["mode"] == "continuous" {
                break;
            }
            ensure!(joined.elapsed() < PATIENCE, "not joined: {status}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let switched = understudy(&["--primary", &primary, "--backup", &backup, "switchover"]).await?;
        ensure!(switched["generation"] == round + 2, "{switched}");
        println!("switchover by the command: writes paused for {} s", switched["pause_seconds"]);
        std::mem::swap(&mut primary, &mut backup);
        let status = understudy(&["--primary", &primary, "status"]).await?;
        ensure!(status["role"] == "primary" && status["generation"] == round + 2, "{status}");
    }
    ensure!(first.stop().await? == Some(0) && second.stop().await? == Some(0), "not ended in order");
    Ok(())
}
