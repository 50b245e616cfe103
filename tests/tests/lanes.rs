//! Clients with different priorities on a real pair: an immediate client overtakes the backlog of a paced one, writes to
//! the same blocks keep their order, and a lane that holds its share is refused.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tonic::{Code, transport::Channel};
use understudy_common::proxy::Link;
use understudy_proto::v1::{
    self, backup_service_client::BackupServiceClient, block_service_client::BlockServiceClient,
    replication_service_client::ReplicationServiceClient,
};
use understudy_tests::process::{
    PATIENCE, Role,
    load::{self, BLOCK_BYTES},
    pair::Pair,
};

const VOLUME: &str = "volume";

/// One volume of 1024 blocks, and a primary with these settings beside those of a lane `batch` for `job-*`.
async fn pair(batch: &str, args: &[&str]) -> Result<Pair> {
    let classes = format!("urgent=immediate,batch={batch}");
    let mut all = vec!["--staging-capacity", "64MiB", "--lanes-classes", &classes, "--lanes-clients", "job-*=batch"];
    all.extend(args);
    let pair = Pair::start_with(&all).await?;
    pair.wait_attached(true).await?;
    pair.create_volume(VOLUME, 1024, v1::AckRule::Staged, v1::AwayRule::Degrade).await?;
    pair.wait_caught_up().await?;
    Ok(pair)
}

fn write(client: &str, sequence: u64, block: usize, blocks: usize) -> v1::WriteBlockRequest {
    let data: Vec<u8> = (block..block + blocks).flat_map(|b| load::fill(0, b, stamp(client, sequence))).collect();
    v1::WriteBlockRequest {
        volume: VOLUME.into(),
        offset_bytes: (block * BLOCK_BYTES) as u64,
        data: data.into(),
        client_id: client.into(),
        sequence,
        ..Default::default()
    }
}

fn stamp(client: &str, sequence: u64) -> u64 {
    sequence << 8 | client.len() as u64
}

/// The lanes of the volume, as a side tells.
async fn lanes(pair: &Pair, role: Role) -> Result<Vec<v1::LaneStatus>> {
    let channel = pair.node(role)?.channel()?;
    let request = v1::GetStatusRequest {};
    let status = match role {
        Role::Primary => ReplicationServiceClient::new(channel).get_status(request).await?,
        Role::Backup => BackupServiceClient::new(channel).get_status(request).await?,
    };
    Ok(status.into_inner().volumes.into_iter().next().context("the volume")?.lanes)
}

fn lsn(lane: Option<&v1::LaneStatus>) -> u64 {
    lane.and_then(|lane| lane.recovery_point).and_then(|point| point.position).map_or(0, |position| position.lsn)
}

/// Waits until the backup holds `lane` up to `at`.
async fn wait_held(pair: &Pair, lane: usize, at: u64) -> Result<Vec<v1::LaneStatus>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let held = lanes(pair, Role::Backup).await?;
        if lsn(held.get(lane)) >= at {
            return Ok(held);
        }
        ensure!(Instant::now() < deadline, "lane {lane} did not come to {at}: {held:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn send(client: &mut BlockServiceClient<Channel>, request: v1::WriteBlockRequest) -> Result<u64> {
    Ok(client.write_block(request).await?.into_inner().position.context("a position")?.lsn)
}

fn block(image: &[u8], block: usize) -> &[u8] {
    &image[block * BLOCK_BYTES..][..BLOCK_BYTES]
}

#[tokio::test]
async fn an_immediate_client_overtakes_a_backlog_and_not_what_it_overwrites() -> Result<()> {
    // Three at once, and then an hour: the rest is a backlog until something pulls it.
    let pair = pair("3/1h", &[]).await?;
    let mut client = BlockServiceClient::new(pair.node(Role::Primary)?.channel()?);
    let mut backlog = Vec::new();
    for n in 0..20 {
        backlog.push(send(&mut client, write("job-1", n + 1, usize::try_from(n)?, 1)).await?);
    }
    let overtaking = send(&mut client, write("db", 1, 500, 1)).await?;
    let held = wait_held(&pair, 0, overtaking).await?;
    let reached = lsn(held.get(1));
    ensure!(reached < backlog[3], "the paced lane has sent more than three: {held:?}");
    let image = pair.read_image(Role::Backup, VOLUME).await?;
    assert!(block(&image, 500) == load::fill(0, 500, stamp("db", 1)), "the record that overtook is not there");
    assert!(block(&image, 19).iter().all(|byte| *byte == 0), "the backlog is there");

    // The answers may be on their way.
    let deadline = Instant::now() + PATIENCE;
    let told = loop {
        let told = lanes(&pair, Role::Primary).await?;
        if told.iter().map(|lane| lane.retained_bytes).sum::<u64>() <= 17 * BLOCK_BYTES as u64 {
            break told;
        }
        ensure!(Instant::now() < deadline, "{told:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let [urgent, batch] = &told[..] else { anyhow::bail!("{told:?}") };
    assert_eq!((urgent.name.as_str(), batch.name.as_str(), batch.class.as_str()), ("urgent", "batch", "3/1h"));
    assert_eq!((urgent.retained_bytes, batch.retained_bytes), (0, 17 * BLOCK_BYTES as u64));
    let age = |lane: &v1::LaneStatus| lane.recovery_point.map_or(0.0, |point| point.age_seconds);
    assert!(age(urgent) == 0.0 && age(batch) > 0.0, "{told:?}");
    assert_eq!(lsn(Some(batch)), backlog[2], "{told:?}");

    // It writes what the tenth of the backlog has written: that goes first, with the nine before it, and no more.
    let over = send(&mut client, write("db", 2, 9, 1)).await?;
    let held = wait_held(&pair, 0, over).await?;
    assert_eq!(lsn(held.get(1)), backlog[9], "{held:?}");
    let image = pair.read_image(Role::Backup, VOLUME).await?;
    assert!(block(&image, 9) == load::fill(0, 9, stamp("db", 2)), "the older write came last");
    assert!(block(&image, 8) == load::fill(0, 8, stamp("job-1", 9)));
    assert!(block(&image, 10).iter().all(|byte| *byte == 0));

    // All of it, by a write over everything; then both sides are equal.
    send(&mut client, write("db", 3, 0, 20)).await?;
    pair.wait_caught_up().await?;
    let (primary, backup) =
        (pair.read_image(Role::Primary, VOLUME).await?, pair.read_image(Role::Backup, VOLUME).await?);
    assert!(primary == backup, "the images differ");
    assert!(block(&backup, 15) == load::fill(0, 15, stamp("db", 3)));
    Ok(())
}

#[tokio::test]
async fn a_backlog_survives_a_restart_in_its_lane_and_goes_on_at_its_pace() -> Result<()> {
    let mut pair = pair("4/500ms", &[]).await?;
    let mut client = BlockServiceClient::new(pair.node(Role::Primary)?.channel()?);
    for n in 0..40 {
        send(&mut client, write("job-1", n + 1, usize::try_from(n)?, 1)).await?;
    }
    pair.kill(Role::Primary);
    pair.restart(Role::Primary).await?;
    pair.wait_attached(true).await?;
    let mut client = BlockServiceClient::new(pair.node(Role::Primary)?.channel()?);
    let over = send(&mut client, write("db", 1, 2, 1)).await?;
    wait_held(&pair, 0, over).await?;
    let image = pair.read_image(Role::Backup, VOLUME).await?;
    assert!(block(&image, 2) == load::fill(0, 2, stamp("db", 1)), "the older write came last");
    pair.wait_caught_up().await?;
    let (primary, backup) =
        (pair.read_image(Role::Primary, VOLUME).await?, pair.read_image(Role::Backup, VOLUME).await?);
    assert!(primary == backup, "the images differ");
    assert!(block(&backup, 39) == load::fill(0, 39, stamp("job-1", 40)));
    Ok(())
}

#[tokio::test]
async fn a_lane_that_holds_its_share_is_refused_and_the_others_go_on() -> Result<()> {
    let pair = pair("1/1h@5", &["--limits-queue-wait", "300ms", "--policy-criteria", "none"]).await?;
    let mut client = BlockServiceClient::new(pair.node(Role::Primary)?.channel()?);
    // A backup that takes nothing makes no room.
    pair.link.set(Link::Cut);
    let mut refused = None;
    for n in 0..200 {
        match client.write_block(write("job-1", n + 1, 0, 16)).await {
            Ok(_) => {}
            Err(status) => {
                refused = Some(status);
                break;
            }
        }
    }
    let refused = refused.context("12 MiB fit into 5 percent of 64 MiB")?;
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    for part in ["lane batch holds", "staging.capacity", "lanes.classes"] {
        assert!(refused.message().contains(part), "no {part:?}: {refused}");
    }
    send(&mut client, write("db", 1, 100, 16)).await.context("another lane")?;
    pair.link.set(Link::Open);
    // What is left below the share waits for its turn, or for somebody who overwrites it.
    send(&mut client, write("db", 2, 0, 16)).await?;
    pair.wait_caught_up().await?;
    let (primary, backup) =
        (pair.read_image(Role::Primary, VOLUME).await?, pair.read_image(Role::Backup, VOLUME).await?);
    assert!(primary == backup, "the images differ");
    Ok(())
}
