//! Writable clones of the backup's image, under load on the primary: what is written to one is seen in it and nowhere
//! else, its base stays whatever the primary does, it gives way where space is short, and a crash ends it alone.
//!
//! `UNDERSTUDY_BIN_DIR` names the binaries to test.

use anyhow::{Context as _, Result, bail, ensure};
use tonic::{Code, Status, transport::Channel};
use understudy_client::{Client, ClientConfig};
use understudy_proto::v1::{
    self, AckRule, AwayRule, backup_service_client::BackupServiceClient, block_service_client::BlockServiceClient,
    read_blocks_response::Content, volume_service_client::VolumeServiceClient,
};
use understudy_tests::process::{PATIENCE, Role, pair::Pair};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 2048;

struct World {
    pair: Pair,
}

impl World {
    async fn start(pair: Pair) -> Result<Self> {
        pair.create_volume("data", BLOCKS, AckRule::Staged, AwayRule::Degrade).await?;
        Ok(Self { pair })
    }

    fn channel(&self, role: Role) -> Channel {
        self.pair.node(role).expect("it runs").channel().expect("an address")
    }

    fn backup(&self) -> BackupServiceClient<Channel> {
        BackupServiceClient::new(self.channel(Role::Backup))
    }

    fn blocks(&self, role: Role) -> BlockServiceClient<Channel> {
        BlockServiceClient::new(self.channel(role))
    }

    fn volumes(&self, role: Role) -> VolumeServiceClient<Channel> {
        VolumeServiceClient::new(self.channel(role))
    }

    async fn write(&self, role: Role, volume: &str, offset: u64, data: Vec<u8>) -> Result<(), Status> {
        let request = v1::WriteBlockRequest {
            volume: volume.into(),
            offset_bytes: offset,
            crc32c: Some(understudy_common::checksum::crc32c(&data)),
            data: data.into(),
            ..Default::default()
        };
        self.blocks(role).write_block(request).await.map(drop)
    }

    async fn read(&self, role: Role, volume: &str, snapshot: &str) -> Result<Vec<u8>, Status> {
        let request = v1::ReadBlocksRequest { volume: volume.into(), snapshot: snapshot.into(), ..Default::default() };
        let mut pieces = self.blocks(role).read_blocks(request).await?.into_inner();
        let mut image = Vec::new();
        while let Some(piece) = pieces.message().await? {
            match piece.content.expect("content") {
                Content::Data(data) => image.extend_from_slice(&data),
                Content::ZeroBytes(n) => image.resize(image.len() + usize::try_from(n).expect("small"), 0),
            }
        }
        Ok(image)
    }

    async fn clone(&self, volume: &str, snapshot: &str, name: &str) -> Result<v1::CloneInfo, Status> {
        let request = v1::CloneImageRequest {
            volume: volume.into(),
            snapshot: snapshot.into(),
            name: name.into(),
            ..Default::default()
        };
        Ok(self.backup().clone_snapshot(request).await?.into_inner())
    }

    async fn list(&self) -> Result<Vec<v1::CloneInfo>> {
        Ok(self.backup().list_clones(v1::ListClonesRequest {}).await?.into_inner().clones)
    }

    async fn discard(&self, name: &str) -> Result<(), Status> {
        self.backup().delete_clone(v1::DeleteCloneRequest { name: name.into() }).await.map(drop)
    }

    async fn take(&self, name: &str) -> Result<()> {
        let request = v1::SnapshotRequest { group: "data".into(), name: name.into() };
        self.volumes(Role::Primary).snapshot(request).await?;
        Ok(())
    }

    /// Both sides hold the same.
    async fn same(&self) -> Result<Vec<u8>> {
        self.pair.wait_caught_up().await?;
        let ours = self.read(Role::Primary, "data", "").await?;
        let node = self.pair.node(Role::Backup)?;
        let theirs = understudy_tests::process::pair::image_of(node, Role::Backup, "data").await?;
        ensure!(ours == theirs, "the replica is not what the primary has");
        Ok(ours)
    }
}

fn at(block: u64) -> usize {
    usize::try_from(block * BLOCK).expect("small")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_written_while_replication_goes_on_and_nobody_else_sees_it() -> Result<()> {
    let mut world = World::start(Pair::start().await?).await?;
    for block in (0..BLOCKS).step_by(3) {
        world.write(Role::Primary, "data", block * BLOCK, vec![1; 4096]).await?;
    }
    world.take("monday").await?;
    let monday = world.same().await?;
    world.write(Role::Primary, "data", 0, vec![2; 8192]).await?;
    let base = world.same().await?;

    // What it should refuse, and does.
    let code = |result: Result<v1::CloneInfo, Status>| result.unwrap_err().code();
    ensure!(code(world.clone("nothing", "", "try").await) == Code::NotFound);
    ensure!(code(world.clone("data", "tuesday", "try").await) == Code::NotFound);
    ensure!(code(world.clone("data", "", "data").await) == Code::AlreadyExists);
    ensure!(code(world.clone("data", "", "no name").await) == Code::InvalidArgument);
    let refused = world.write(Role::Backup, "data", 0, vec![9; 4096]).await.unwrap_err();
    ensure!(refused.code() == Code::FailedPrecondition && refused.message().contains("this is a backup"), "{refused}");
    let refused = world.write(Role::Backup, "try", 0, vec![9; 4096]).await.unwrap_err();
    ensure!(refused.code() == Code::NotFound && refused.message().contains("this is a backup"), "{refused}");
    let create = v1::CreateVolumeRequest { name: "new".into(), size_bytes: BLOCK, ..Default::default() };
    let refused = world.volumes(Role::Backup).create_volume(create).await.unwrap_err();
    ensure!(refused.code() == Code::FailedPrecondition, "{refused}");
    ensure!(world.discard("try").await.unwrap_err().code() == Code::NotFound);

    let made = world.clone("data", "", "try").await?;
    ensure!(made.size_bytes == BLOCKS * BLOCK && made.written_bytes == 0 && made.volume == "data", "{made:?}");
    world.clone("data", "monday", "old").await?;
    ensure!(code(world.clone("data", "", "try").await) == Code::AlreadyExists);
    ensure!(world.read(Role::Backup, "try", "").await? == base && world.read(Role::Backup, "old", "").await? == monday);

    // Load on the primary goes on; the clone is written by the client library, by parts of blocks and across them.
    let blocks = world.blocks(Role::Primary);
    let load = tokio::spawn(async move {
        for n in 0..2000_u64 {
            let request = v1::WriteBlockRequest {
                volume: "data".into(),
                offset_bytes: n * 7 % BLOCKS * BLOCK,
                data: vec![u8::try_from(n % 200).expect("small"); 4096].into(),
                ..Default::default()
            };
            blocks.clone().write_block(request).await?;
        }
        anyhow::Ok(())
    });
    let mut expected = base.clone();
    let address = world.pair.node(Role::Backup)?.grpc.context("ready")?;
    let client = Client::connect(ClientConfig::new(format!("http://{address}"))).await?;
    let volume = client.volume("try").await?;
    let stream = volume.write_stream();
    let mut pending = Vec::new();
    for n in 0..200_u64 {
        let (offset, length) = (n * 31_337 % (BLOCKS * BLOCK - 20_000), 1 + n * 97 % 12_000);
        let data = vec![u8::try_from(50 + n % 200).expect("small"); usize::try_from(length)?];
        let from = usize::try_from(offset)?;
        expected[from..from + data.len()].copy_from_slice(&data);
        pending.push(stream.write(offset, data.into()).await?);
    }
    for write in pending {
        write.await?;
    }
    stream.finish().await?;
    volume.write_zeroes(10_000, 30_000).await?;
    expected[10_000..40_000].fill(0);
    volume.discard(100 * BLOCK + 5, 3 * BLOCK).await?;
    expected[at(101)..at(103)].fill(0);
    volume.flush().await?;
    let end = world.write(Role::Backup, "try", BLOCKS * BLOCK - 10, vec![1; 11]).await.unwrap_err();
    ensure!(end.code() == Code::OutOfRange, "{end}");
    let mut damaged = v1::WriteBlockRequest { volume: "try".into(), data: vec![1; 10].into(), ..Default::default() };
    damaged.crc32c = Some(1);
    let damaged = world.blocks(Role::Backup).write_block(damaged).await.unwrap_err();
    ensure!(damaged.code() == Code::InvalidArgument, "{damaged}");
    ensure!(volume.read(3, 200_000).await? == expected[3..200_003], "read by the client");
    ensure!(world.read(Role::Backup, "try", "").await? == expected, "not what was written over the base");
    load.await??;

    // The primary deletes the snapshot: it goes on both sides, and the clone keeps what it is made of.
    let request = v1::DeleteSnapshotRequest { group: "data".into(), snapshot: "monday".into() };
    world.volumes(Role::Primary).delete_snapshot(request).await?;
    world.same().await?;
    let left = world.backup().list_snapshots(v1::ListSnapshotsRequest::default()).await?.into_inner().snapshots;
    ensure!(left.is_empty(), "{left:?}");
    ensure!(world.read(Role::Backup, "old", "").await? == monday, "the base went with the snapshot");
    ensure!(world.read(Role::Backup, "try", "").await? == expected);
    let list = world.list().await?;
    let status = world.backup().get_status(v1::GetStatusRequest {}).await?.into_inner();
    ensure!(status.clones == list, "{:?}", status.clones);
    ensure!(list.len() == 2 && list[0].name == "old" && list[1].written_bytes > 0, "{list:?}");

    // Discarded, and gone.
    world.discard("try").await?;
    ensure!(world.read(Role::Backup, "try", "").await.unwrap_err().code() == Code::NotFound);
    // A crash ends the other, and nothing else.
    world.pair.kill(Role::Backup);
    world.pair.restart(Role::Backup).await?;
    ensure!(world.list().await?.is_empty(), "a clone outlived its process");
    world.write(Role::Primary, "data", 5 * BLOCK, vec![77; 4096]).await?;
    let image = world.same().await?;
    ensure!(image[at(5)] == 77);
    let left = std::fs::read_dir(world.pair.data_dir(Role::Backup))?.filter_map(Result::ok);
    ensure!(left.map(|entry| entry.file_name()).all(|name| name != "clone.scratch"), "a file is left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_of_the_image_is_mounted_nowhere_and_checked_on_a_clone() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("image");
    std::fs::File::create(&file)?.set_len(BLOCKS * BLOCK)?;
    let tool = |name: &str, args: &[&str]| std::process::Command::new(name).args(args).arg(&file).output();
    let Ok(made) = tool("mke2fs", &["-q", "-F", "-t", "ext4"]) else {
        println!("mke2fs is not there: skipped");
        return Ok(());
    };
    ensure!(made.status.success(), "{made:?}");
    let world = World::start(Pair::start().await?).await?;
    for (n, data) in std::fs::read(&file)?.chunks(1 << 20).enumerate() {
        world.write(Role::Primary, "data", (n as u64) << 20, data.to_vec()).await?;
    }
    world.same().await?;
    world.clone("data", "", "try").await?;
    std::fs::write(&file, world.read(Role::Backup, "try", "").await?)?;
    // Changed as a mount would, and written back to the clone.
    let check = |args: &[&str]| -> Result<()> {
        let checked = tool("e2fsck", args)?;
        ensure!(checked.status.code().is_some_and(|code| code <= 1), "{checked:?}");
        Ok(())
    };
    check(&["-f", "-n"])?;
    let labelled = tool("tune2fs", &["-L", "tried"])?;
    ensure!(labelled.status.success(), "{labelled:?}");
    for (n, data) in std::fs::read(&file)?.chunks(1 << 20).enumerate() {
        world.write(Role::Backup, "try", (n as u64) << 20, data.to_vec()).await?;
    }
    std::fs::write(&file, world.read(Role::Backup, "try", "").await?)?;
    check(&["-f", "-n"])?;
    world.same().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_gives_way_where_space_is_short_and_replication_goes_on() -> Result<()> {
    // 16 MiB of pool for 8 MiB of volume.
    let directory = tempfile::tempdir()?;
    let device = format!("{}=16MiB", directory.path().join("pool").display());
    let pair = Pair::start_both(
        &["--link-heartbeat", "100ms", "--link-timeout", "500ms", "--staging-capacity", "64MiB"],
        &["--pool-devices", &device, "--clones-capacity", "1MiB", "--checkpoint-bytes", "1MiB"],
    )
    .await?;
    let world = World::start(pair).await?;
    for n in 0..8 {
        world.write(Role::Primary, "data", n << 20, vec![1; 1 << 20]).await?;
    }
    let base = world.same().await?;
    world.clone("data", "", "try").await?;
    // Its own bound.
    world.write(Role::Backup, "try", 0, vec![7; 1 << 20]).await?;
    let refused = world.write(Role::Backup, "try", 1 << 20, vec![7; 4096]).await.unwrap_err();
    ensure!(refused.code() == Code::ResourceExhausted && refused.message().contains("clones.capacity"), "{refused}");
    // What it has already may be written again, and given back.
    world.write(Role::Backup, "try", 0, vec![8; 1 << 20]).await?;
    let discard = v1::DiscardRequest { volume: "try".into(), length_bytes: 1 << 19, ..Default::default() };
    world.blocks(Role::Backup).discard(discard).await?;
    world.write(Role::Backup, "try", 1 << 20, vec![7; 4096]).await?;

    // The primary overwrites what the base holds, until the pool is short: the clone is refused first.
    for n in 0..6 {
        world.write(Role::Primary, "data", n << 20, vec![2; 1 << 20]).await?;
    }
    world.same().await?;
    for n in 0.. {
        match world.write(Role::Backup, "try", (2 << 20) + n * BLOCK, vec![7; 4096]).await {
            Err(refused) if refused.code() == Code::ResourceExhausted && refused.message().contains("pool") => break,
            Err(refused) => bail!("{refused}"),
            Ok(()) => ensure!(n < 31, "a clone is not refused while the pool is short"),
        }
        // One more segment for the replica.
        world.write(Role::Primary, "data", (6 << 20) + (n << 16), vec![3; 4096]).await?;
        world.same().await?;
    }
    ensure!(world.read(Role::Backup, "try", "").await?[3 << 20..7 << 20] == base[3 << 20..7 << 20], "the base");
    // And then it goes, so that replication does not stop.
    let large = v1::CreateVolumeRequest { name: "more".into(), size_bytes: 6 << 20, ..Default::default() };
    world.volumes(Role::Primary).create_volume(large).await?;
    for n in 0..6 {
        world.write(Role::Primary, "more", n << 20, vec![5; 1 << 20]).await?;
    }
    world.same().await?;
    ensure!(world.list().await?.is_empty(), "the clone still holds what the replica lacked");
    let request = v1::WatchEventsRequest { after: 1 };
    let mut events = world.backup().watch_events(request).await?.into_inner();
    let mut kinds = Vec::new();
    while !kinds.iter().any(|kind| kind == "clone.discarded") {
        let event = tokio::time::timeout(PATIENCE, events.message()).await??.context("an event")?;
        kinds.push(event.kind);
    }
    ensure!(kinds.iter().any(|kind| kind == "clone.refused"), "{kinds:?}");
    Ok(())
}
