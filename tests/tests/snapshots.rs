//! Snapshots of a real pair: on both sides at one position, in both modes, restored, cloned and compared, also across a
//! SIGKILL in the middle of a restore.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tonic::{Code, Status};
use understudy_common::proxy::Link;
use understudy_proto::v1::{
    self, AckRule, AwayRule, backup_service_client::BackupServiceClient, block_service_client::BlockServiceClient,
    read_blocks_response, read_image_response, replication_service_client::ReplicationServiceClient,
    volume_service_client::VolumeServiceClient,
};
use understudy_tests::process::{PATIENCE, Role, pair::Pair};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 2048;

/// The volume "data" of a pair, as the test knows it.
struct World {
    pair: Pair,
    image: Vec<u8>,
}

impl World {
    async fn start() -> Result<Self> {
        Self::of(Pair::start().await?).await
    }

    async fn of(pair: Pair) -> Result<Self> {
        pair.create_volume("data", BLOCKS, AckRule::Staged, AwayRule::Degrade).await?;
        let image = vec![0; usize::try_from(BLOCKS * BLOCK)?];
        Ok(Self { pair, image })
    }

    fn volumes(&self) -> Result<VolumeServiceClient<tonic::transport::Channel>> {
        Ok(VolumeServiceClient::new(self.pair.node(Role::Primary)?.channel()?))
    }

    /// Every `step`th block from `first` becomes `byte`.
    async fn write(&mut self, first: u64, step: u64, byte: u8) -> Result<()> {
        let mut blocks = BlockServiceClient::new(self.pair.node(Role::Primary)?.channel()?);
        for block in (first..BLOCKS).step_by(usize::try_from(step)?) {
            let at = usize::try_from(block * BLOCK)?;
            self.image[at..at + 4096].fill(byte);
            let request = v1::WriteBlockRequest {
                volume: "data".into(),
                offset_bytes: block * BLOCK,
                data: vec![byte; 4096].into(),
                ..Default::default()
            };
            blocks.write_block(request).await?;
        }
        Ok(())
    }

    async fn take(&self, name: &str) -> Result<v1::SnapshotInfo> {
        let request = v1::SnapshotRequest { group: "data".into(), name: name.into() };
        Ok(self.volumes()?.snapshot(request).await?.into_inner())
    }

    async fn delete(&self, name: &str) -> Result<(), Status> {
        let request = v1::DeleteSnapshotRequest { group: "data".into(), snapshot: name.into() };
        self.volumes().expect("it runs").delete_snapshot(request).await.map(drop)
    }

    async fn restore(&self, name: &str) -> Result<tonic::Streaming<v1::CopyProgress>, Status> {
        let request = v1::RestoreSnapshotRequest { volume: "data".into(), snapshot: name.into(), ..Default::default() };
        Ok(self.volumes().expect("it runs").restore_snapshot(request).await?.into_inner())
    }

    async fn read_primary(&self, volume: &str, snapshot: &str) -> Result<Vec<u8>> {
        let request = v1::ReadBlocksRequest { volume: volume.into(), snapshot: snapshot.into(), ..Default::default() };
        let mut pieces =
            BlockServiceClient::new(self.pair.node(Role::Primary)?.channel()?).read_blocks(request).await?.into_inner();
        let mut image = Vec::new();
        while let Some(piece) = pieces.message().await? {
            match piece.content.context("content")? {
                read_blocks_response::Content::Data(data) => image.extend_from_slice(&data),
                read_blocks_response::Content::ZeroBytes(n) => image.resize(image.len() + usize::try_from(n)?, 0),
            }
        }
        Ok(image)
    }

    async fn read_backup(&self, snapshot: &str) -> Result<Vec<u8>, Status> {
        let request = v1::ReadImageRequest { volume: "data".into(), snapshot: snapshot.into(), ..Default::default() };
        let channel = self.pair.node(Role::Backup).expect("it runs").channel().expect("an address");
        let mut pieces = BackupServiceClient::new(channel).read_blocks(request).await?.into_inner();
        let mut image = Vec::new();
        while let Some(piece) = pieces.message().await? {
            match piece.content.expect("content") {
                read_image_response::Content::Data(data) => image.extend_from_slice(&data),
                read_image_response::Content::ZeroBytes(n) => {
                    image.resize(image.len() + usize::try_from(n).expect("small"), 0)
                }
            }
        }
        Ok(image)
    }

    async fn on_backup(&self) -> Result<Vec<String>> {
        let mut backup = BackupServiceClient::new(self.pair.node(Role::Backup)?.channel()?);
        let list = backup.list_snapshots(v1::ListSnapshotsRequest::default()).await?.into_inner().snapshots;
        Ok(list.into_iter().map(|snapshot| snapshot.name).collect())
    }

    async fn changed(&self, base: &str, target: &str) -> Result<Vec<(u64, u64)>> {
        let request = v1::GetChangedBlocksRequest {
            volume: "data".into(),
            base_snapshot: base.into(),
            target_snapshot: target.into(),
            ..Default::default()
        };
        let mut answers = self.volumes()?.get_changed_blocks(request).await?.into_inner();
        let mut ranges = Vec::new();
        while let Some(answer) = answers.message().await? {
            ranges.extend(answer.block_metadata.iter().map(|range| (range.byte_offset, range.size_bytes)));
        }
        Ok(ranges)
    }

    async fn force_delta(&self, forced: bool) -> Result<()> {
        let mode = if forced { v1::Mode::Delta } else { v1::Mode::Unspecified };
        let mut replication = ReplicationServiceClient::new(self.pair.node(Role::Primary)?.channel()?);
        replication.set_mode(v1::SetModeRequest { group: "data".into(), mode: mode.into() }).await?;
        let deadline = Instant::now() + PATIENCE;
        let wanted = if forced { v1::Mode::Delta } else { v1::Mode::Continuous };
        while replication.get_status(v1::GetStatusRequest {}).await?.into_inner().volumes[0].mode() != wanted {
            ensure!(Instant::now() < deadline, "no {wanted:?} within {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }
}

#[tokio::test]
async fn snapshots_are_on_both_sides_at_one_position_and_stay_as_they_are() -> Result<()> {
    let mut world = World::start().await?;
    world.write(0, 3, 1).await?;
    let first = world.take("first").await?;
    let was_first = world.image.clone();
    assert!(first.mirrored && first.volumes[0].size_bytes == BLOCKS * BLOCK, "{first:?}");
    world.write(0, 100, 2).await?;
    world.take("second").await?;
    let was_second = world.image.clone();
    world.write(1, 50, 3).await?;
    world.pair.wait_caught_up().await?;

    for (name, was) in [("first", &was_first), ("second", &was_second)] {
        assert!(world.read_primary("data", name).await? == *was, "{name} on the primary");
        assert!(world.read_backup(name).await? == *was, "{name} on the backup");
    }
    // Blocks 0, 100, 200.. differ between the two.
    let expected: Vec<(u64, u64)> = (0..BLOCKS).step_by(100).map(|block| (block * BLOCK, BLOCK)).collect();
    assert_eq!(world.changed("first", "second").await?, expected);
    let since: u64 = world.changed("second", "").await?.iter().map(|(_, bytes)| bytes).sum();
    assert_eq!(since, (1..BLOCKS).step_by(50).count() as u64 * BLOCK);

    // What it should refuse, and does.
    let again = world.volumes()?.snapshot(v1::SnapshotRequest { group: "data".into(), name: "first".into() }).await;
    assert_eq!(again.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(world.delete("third").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(world.restore("third").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(world.read_backup("third").await.unwrap_err().code(), Code::NotFound);

    // Deleted in any order, also across restarts of both.
    world.delete("first").await?;
    world.pair.wait_caught_up().await?;
    assert_eq!(world.on_backup().await?, ["second"]);
    for role in [Role::Primary, Role::Backup] {
        world.pair.kill(role);
        world.pair.restart(role).await?;
    }
    world.pair.wait_caught_up().await?;
    assert!(world.read_primary("data", "second").await? == was_second);
    assert!(world.read_backup("second").await? == was_second);
    assert!(world.read_primary("data", "").await? == world.image);
    Ok(())
}

#[tokio::test]
async fn a_snapshot_of_delta_mode_is_the_primarys_alone_and_a_deletion_reaches_the_backup_by_a_run() -> Result<()> {
    let mut world = World::start().await?;
    world.write(0, 2, 1).await?;
    world.take("both").await?;
    world.pair.wait_caught_up().await?;
    world.force_delta(true).await?;
    world.write(0, 5, 2).await?;
    let alone = world.take("alone").await?;
    let was = world.image.clone();
    assert!(!alone.mirrored, "{alone:?}");
    world.delete("both").await?;
    world.write(0, 7, 3).await?;
    assert_eq!(world.on_backup().await?, ["both"]);
    world.force_delta(false).await?;
    world.pair.wait_caught_up().await?;
    assert_eq!(world.on_backup().await?, Vec::<String>::new());
    assert!(world.read_primary("data", "alone").await? == was);
    assert!(world.read_backup("").await? == world.image);
    Ok(())
}

#[tokio::test]
async fn a_restore_that_a_crash_interrupts_goes_on_and_the_volume_is_not_served_meanwhile() -> Result<()> {
    let mut world = World::start().await?;
    world.write(0, 3, 1).await?;
    world.take("good").await?;
    let was = world.image.clone();
    world.write(0, 1, 9).await?;
    world.take("later").await?;

    // Begun, and its primary dies. It may be over before that; then the volume is as it was all the same.
    let progress = world.restore("good").await?;
    drop(progress);
    world.pair.kill(Role::Primary);
    world.pair.restart(Role::Primary).await?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match world.read_primary("data", "").await {
            Ok(image) => {
                assert!(image == was, "served, and not what it was");
                break;
            }
            Err(error) => {
                let status = error.downcast_ref::<Status>().context("a status")?;
                assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
                ensure!(Instant::now() < deadline, "not restored within {PATIENCE:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    world.pair.wait_caught_up().await?;
    assert!(world.read_backup("").await? == was, "the backup");

    // The newer one is still there, and a volume is made of it.
    let clone = v1::CloneSnapshotRequest {
        volume: "data".into(),
        snapshot: "later".into(),
        name: "copy".into(),
        ..Default::default()
    };
    let mut progress = world.volumes()?.clone_snapshot(clone).await?.into_inner();
    let mut finished = false;
    while let Some(now) = progress.message().await? {
        finished = now.finished;
    }
    assert!(finished);
    assert!(world.read_primary("copy", "").await? == vec![9; usize::try_from(BLOCKS * BLOCK)?]);
    Ok(())
}

#[tokio::test]
async fn a_snapshot_is_not_deleted_while_a_volume_is_filled_from_it() -> Result<()> {
    let args = ["--staging-capacity", "16MiB", "--limits-queue-wait", "100ms", "--policy-criteria", "none"];
    let mut world = World::of(Pair::start_with(&args).await?).await?;
    world.write(0, 3, 1).await?;
    world.take("good").await?;
    let was = world.image.clone();
    world.write(0, 1, 9).await?;
    world.pair.wait_caught_up().await?;

    // No room in the journal: the restore waits for it.
    world.pair.create_volume("filler", 65536, AckRule::Staged, AwayRule::Degrade).await?;
    world.pair.link.set(Link::Cut);
    let mut blocks = BlockServiceClient::new(world.pair.node(Role::Primary)?.channel()?);
    let full = loop {
        let (volume, data) = ("filler".to_owned(), vec![7; 128 << 10].into());
        if let Err(status) = blocks.write_block(v1::WriteBlockRequest { volume, data, ..Default::default() }).await {
            break status;
        }
    };
    assert_eq!(full.code(), Code::ResourceExhausted, "{full}");
    let mut progress = world.restore("good").await?;
    let refused = world.delete("good").await.err().context("it was deleted under the restore")?;
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("being filled from the snapshot"), "{refused}");
    // Nor does the primary end with the volume half filled.
    let mut primary = ReplicationServiceClient::new(world.pair.node(Role::Primary)?.channel()?);
    let drained = v1::DemoteRequest { drain: true, timeout_ms: 500 };
    let refused = primary.demote(drained).await.err().context("it was demoted under the restore")?;
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("volume data is being filled from a snapshot"), "{refused}");

    world.pair.link.set(Link::Open);
    let mut finished = false;
    while let Some(now) = progress.message().await? {
        finished = now.finished;
    }
    assert!(finished);
    world.delete("good").await?;
    assert!(world.read_primary("data", "").await? == was);
    world.pair.wait_caught_up().await?;
    assert!(world.read_backup("").await? == was);
    assert_eq!(world.on_backup().await?, Vec::<String>::new());
    Ok(())
}
