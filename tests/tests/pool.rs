//! Devices of a pool come and go under load, with a SIGKILL in the middle; levels; where segments lie on both sides.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tonic::{Code, transport::Channel};
use understudy_proto::v1::{
    self, AckRule, AwayRule, DeviceState, backup_service_client::BackupServiceClient,
    replication_service_client::ReplicationServiceClient, volume_service_client::VolumeServiceClient,
};
use understudy_tests::process::{
    PATIENCE, Role,
    alone::Alone,
    load::{BLOCK_BYTES, BLOCKS_PER_WRITER, Load},
    pair::Pair,
};

const WRITERS: usize = 4;
const POLL: Duration = Duration::from_millis(20);
/// Blocks of a volume that nobody writes: they are what a drain has to move.
const STILL_BLOCKS: u64 = 16 * 96;

#[tokio::test]
async fn devices_are_added_and_drained_under_load_and_sigkill() -> Result<()> {
    let mut pair = Pair::start_with(&["--pool-drain-rate", "2MiB", "--checkpoint-bytes", "1MiB"]).await?;
    pair.create_volume("busy", (WRITERS * BLOCKS_PER_WRITER) as u64, AckRule::Staged, AwayRule::Degrade).await?;
    pair.create_volume("still", STILL_BLOCKS, AckRule::Both, AwayRule::Degrade).await?;
    fill(pair.node(Role::Primary)?.channel()?, "still").await?;
    let mut load = Load::start(7, &["busy"], WRITERS);
    load.serve(Some(pair.node(Role::Primary)?.channel()?));
    load.progress(50, Duration::from_secs(5)).await?;

    let mut primary = VolumeServiceClient::new(pair.node(Role::Primary)?.channel()?);
    let first = primary.get_pool(v1::GetPoolRequest {}).await?.into_inner().devices[0].path.clone();
    let added = pair.data_dir(Role::Primary).join("second").display().to_string();
    let device = primary.add_device(add(&added)).await?.into_inner();
    ensure!(device.state() == DeviceState::Serving && device.size_bytes > 0, "{device:?}");
    let refused = primary.add_device(add(&added)).await.err().context("it was added twice")?;
    ensure!(refused.code() == Code::AlreadyExists, "{refused}");
    load.progress(50, Duration::from_secs(5)).await?;

    let drained = primary.drain_device(drain(&first)).await?.into_inner();
    ensure!(drained.state() == DeviceState::Draining, "{drained:?}");
    // In the middle: something has been moved, and something has not.
    loop {
        let device = primary.get_pool(v1::GetPoolRequest {}).await?.into_inner().devices.swap_remove(0);
        ensure!(device.state() == DeviceState::Draining, "it was too fast to be killed in the middle: {device:?}");
        if device.live_bytes + (1 << 20) < drained.live_bytes {
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    load.serve(None);
    pair.kill(Role::Primary);
    pair.restart(Role::Primary).await?;
    load.serve(Some(pair.node(Role::Primary)?.channel()?));
    let mut primary = VolumeServiceClient::new(pair.node(Role::Primary)?.channel()?);
    let devices = primary.get_pool(v1::GetPoolRequest {}).await?.into_inner().devices;
    ensure!(devices[0].state() == DeviceState::Draining && devices[1].path == added, "{devices:?}");
    load.progress(50, Duration::from_secs(5)).await?;

    // The backup's too, whose file has another place and size.
    let mut backup = BackupServiceClient::new(pair.node(Role::Backup)?.channel()?);
    let first_of_backup = backup.get_pool(v1::GetPoolRequest {}).await?.into_inner().devices[0].path.clone();
    let added = pair.data_dir(Role::Backup).join("other").display().to_string();
    backup.add_device(v1::AddDeviceRequest { path: added, size_bytes: 64 << 20 }).await?;
    // Two, among which segments are dealt out in turns: so they lie elsewhere than on the primary.
    let third = pair.data_dir(Role::Backup).join("third").display().to_string();
    backup.add_device(v1::AddDeviceRequest { path: third, size_bytes: 16 << 20 }).await?;
    backup.drain_device(drain(&first_of_backup)).await?;
    loop {
        let of_primary = primary.get_pool(v1::GetPoolRequest {}).await?.into_inner().devices.swap_remove(0);
        let of_backup = backup.get_pool(v1::GetPoolRequest {}).await?.into_inner().devices.swap_remove(0);
        if of_primary.state() == DeviceState::Removed && of_backup.state() == DeviceState::Removed {
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    for (role, name) in [(Role::Primary, &first), (Role::Backup, &first_of_backup)] {
        let path = pair.data_dir(role).join(name);
        ensure!(std::fs::read(&path)?[..4096].iter().all(|byte| *byte == 0), "{name} has a superblock");
        std::fs::remove_file(&path)?;
    }
    let last = primary.drain_device(drain(&devices[1].path)).await.err().context("the last device was drained")?;
    ensure!(last.code() == Code::FailedPrecondition, "{last}");

    load.progress(50, Duration::from_secs(5)).await?;
    load.serve(None);
    pair.kill(Role::Primary);
    pair.restart(Role::Primary).await?;
    load.serve(Some(pair.node(Role::Primary)?.channel()?));
    load.progress(50, Duration::from_secs(5)).await?;
    let expected = load.finish().await?;
    pair.wait_caught_up().await?;
    let image = pair.read_image(Role::Primary, "busy").await?;
    ensure!(image == pair.read_image(Role::Backup, "busy").await?, "the images differ");
    for (block, (content, cell)) in image.chunks(BLOCK_BYTES).zip(&expected[0]).enumerate() {
        cell.check(0, block, content)?;
    }
    let still = pair.read_image(Role::Primary, "still").await?;
    ensure!(still == pair.read_image(Role::Backup, "still").await?, "the images differ");
    for (block, content) in (0..).zip(still.chunks(BLOCK_BYTES)) {
        ensure!(content == still_block(block), "block {block} was moved wrongly");
    }

    // One segment of a volume, the same on both sides, lies at another place on each.
    let mut primary = VolumeServiceClient::new(pair.node(Role::Primary)?.channel()?);
    let request = || v1::ListSegmentsRequest { volume: "still".into(), page_token: String::new() };
    let here = places(primary.list_segments(request()).await?.into_inner());
    let there = places(backup.list_segments(request()).await?.into_inner());
    ensure!(here.len() == 96 && here.keys().eq(there.keys()), "{} and {} segments", here.len(), there.len());
    ensure!(here.iter().any(|(segment, place)| there[segment] != *place), "every segment lies at one place");
    Ok(())
}

fn add(path: &str) -> v1::AddDeviceRequest {
    v1::AddDeviceRequest { path: path.to_owned(), size_bytes: 0 }
}

fn drain(path: &str) -> v1::DrainDeviceRequest {
    v1::DrainDeviceRequest { path: path.to_owned(), cancel: false }
}

/// By virtual segment: its device and number.
fn places(answer: v1::ListSegmentsResponse) -> BTreeMap<u64, (u32, u64)> {
    answer.segments.iter().filter(|s| s.of_head).map(|s| (s.virtual_segment, (s.device, s.segment))).collect()
}

fn still_block(block: u64) -> Vec<u8> {
    block.to_le_bytes().repeat(BLOCK_BYTES / 8).iter().map(|byte| byte ^ 0x5a).collect()
}

async fn fill(channel: Channel, volume: &str) -> Result<()> {
    let mut blocks = v1::block_service_client::BlockServiceClient::new(channel);
    for first in (0..STILL_BLOCKS).step_by(16) {
        let data: Vec<u8> = (first..first + 16).flat_map(still_block).collect();
        let request = v1::WriteBlockRequest {
            volume: volume.to_owned(),
            offset_bytes: first * BLOCK_BYTES as u64,
            data: data.into(),
            ..Default::default()
        };
        blocks.write_block(request).await?;
    }
    Ok(())
}

/// The kinds of the events up to the next one of this kind.
async fn until(events: &mut tonic::Streaming<v1::Event>, kind: &str) -> Result<Vec<String>> {
    let mut told = Vec::new();
    while told.last().is_none_or(|last| last != kind) {
        let event = tokio::time::timeout(PATIENCE, events.message()).await;
        let event = event.with_context(|| format!("no {kind} behind {told:?}"))??;
        told.push(event.context("the stream of events ended")?.kind);
    }
    Ok(told)
}

#[tokio::test]
async fn beyond_the_stop_level_new_space_is_refused_and_overwrites_go_on() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let device = format!("{}=8MiB", directory.path().join("device").display());
    let args = ["--pool-devices", &device, "--pool-stop-at", "0.5", "--pool-warn-at", "0.25"];
    let args = [&args[..], &["--limits-queue-wait", "300ms"]].concat();
    let alone = Alone::reopen(directory.path(), "node", &args).await?;
    alone.create_volume(16 << 20).await?;
    // A block of each segment.
    let mut taken = 0;
    let refused = loop {
        match alone.write(taken * 16, 1).await {
            Ok(()) => taken += 1,
            Err(refused) => break refused,
        }
    };
    let status = refused.downcast_ref::<tonic::Status>().context("a refusal of the service")?;
    ensure!(status.code() == Code::ResourceExhausted && status.message().contains("pool.stop_at"), "{status}");
    let mut volumes = VolumeServiceClient::new(alone.node.channel()?);
    let pool = volumes.get_pool(v1::GetPoolRequest {}).await?.into_inner();
    ensure!(pool.used_bytes <= pool.total_bytes / 2 && pool.free_bytes > pool.total_bytes / 3, "{pool:?}");
    ensure!(pool.promised_bytes == 16 << 20, "{pool:?}");
    for segment in 0..taken {
        alone.write(segment * 16, 2).await?;
    }
    // The operator is told when it runs short, once, and when it has space again.
    let mut replication = ReplicationServiceClient::new(alone.node.channel()?);
    let mut events = replication.watch_events(v1::WatchEventsRequest { after: 1 }).await?.into_inner();
    until(&mut events, "pool.low").await?;
    let more = format!("{}-2", directory.path().join("device").display());
    volumes.add_device(v1::AddDeviceRequest { path: more, size_bytes: 16 << 20 }).await?;
    alone.write(taken * 16, 3).await?;

    let relieved = until(&mut events, "pool.relieved").await?;
    ensure!(!relieved.contains(&"pool.low".to_owned()), "it was told twice: {relieved:?}");
    Ok(())
}
