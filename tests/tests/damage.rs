//! Flipped bits on the disks of a real pair under load: found, mended, never spread; and directories that are checked.

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tonic::{Code, transport::Channel};
use understudy_common::proxy::Link;
use understudy_proto::v1::{
    self, AckRule, AwayRule, backup_service_client::BackupServiceClient, block_service_client::BlockServiceClient,
    replication_service_client::ReplicationServiceClient, volume_service_client::VolumeServiceClient,
};
use understudy_tests::process::{
    PATIENCE, Role, bin_dir,
    load::{BLOCK_BYTES, BLOCKS_PER_WRITER, Load, fill},
    pair::Pair,
    seed,
};

const WRITERS: usize = 4;
/// Blocks of the volume that nobody writes while it is damaged.
const BLOCKS: u64 = 64;
const LOOK: Duration = Duration::from_millis(50);

/// Flips a bit of a block where it lies in the pool of a side. Waits until it lies there.
async fn flip(directory: &Path, content: &[u8]) -> Result<()> {
    let device = directory.join("pool-0");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let bytes = fs::read(&device)?;
        if let Some(at) = bytes.chunks_exact(BLOCK_BYTES).position(|block| block == content) {
            let at = (at * BLOCK_BYTES + 77) as u64;
            let mut byte = [0];
            let file = fs::File::options().read(true).write(true).open(&device)?;
            file.read_exact_at(&mut byte, at)?;
            file.write_all_at(&[byte[0] ^ 4], at)?;
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the block is not in its place after {PATIENCE:?}");
        tokio::time::sleep(LOOK).await;
    }
}

async fn scrub(client: &mut ReplicationServiceClient<Channel>, start: bool) -> Result<v1::ScrubResponse> {
    Ok(client.scrub(v1::ScrubRequest { start, ..Default::default() }).await?.into_inner())
}

/// Every message of a comparison of everything.
async fn verify(client: &mut ReplicationServiceClient<Channel>, repair: bool) -> Result<Vec<v1::VerifyProgress>> {
    let request = v1::VerifyRequest { repair, ..Default::default() };
    let mut stream = client.verify(request).await?.into_inner();
    let mut told = Vec::new();
    while let Some(message) = stream.message().await? {
        told.push(message);
    }
    Ok(told)
}

/// Has both sides scrubbed until both have found one block, and mended it.
async fn one_is_found_on_each_side_and_mended(
    client: &mut ReplicationServiceClient<Channel>,
    load: &mut Load,
) -> Result<()> {
    scrub(client, true).await?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = scrub(client, false).await?;
        let (primary, backup) = (found.primary.unwrap_or_default(), found.backup.unwrap_or_default());
        let mended = found.primary_damaged.is_empty() && found.backup_damaged.is_empty();
        if !primary.running && !backup.running && mended {
            ensure!((primary.damaged_blocks, backup.damaged_blocks) == (1, 1), "{primary:?}, {backup:?}");
            ensure!(primary.completed_unix_ms > 0 && primary.done_bytes > 0, "{primary:?}");
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "not mended after {PATIENCE:?}: {primary:?}, {backup:?}, {found:?}");
        load.progress(20, Duration::from_secs(1)).await?;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn flipped_bits_under_load_are_found_mended_and_never_spread() -> Result<()> {
    let seed = seed(1);
    let mut pair = Pair::start_with(&["--staging-capacity", "64MiB", "--scrub-rate", "0"]).await?;
    pair.create_volume("still", BLOCKS, AckRule::Staged, AwayRule::Degrade).await?;
    pair.create_volume("busy", (WRITERS * BLOCKS_PER_WRITER) as u64, AckRule::Staged, AwayRule::Degrade).await?;
    let channel = pair.node(Role::Primary)?.channel()?;
    let mut blocks = BlockServiceClient::new(channel.clone());
    let content = |block: u64| fill(7, usize::try_from(block).expect("few"), 1);
    for block in 0..BLOCKS {
        let (volume, offset_bytes, data) = ("still".to_owned(), block * BLOCK_BYTES as u64, content(block));
        blocks.write_block(v1::WriteBlockRequest { volume, offset_bytes, data, ..Default::default() }).await?;
    }
    pair.wait_caught_up().await?;
    let mut load = Load::start(seed, &["busy"], WRITERS);
    load.serve(Some(channel.clone()));
    load.progress(200, Duration::from_secs(5)).await?;
    let mut client = ReplicationServiceClient::new(channel.clone());

    // One block of each side, and a scrub: each is found on its side, and mended from the other.
    flip(&pair.data_dir(Role::Primary), &content(3)).await?;
    flip(&pair.data_dir(Role::Backup), &content(5)).await?;
    one_is_found_on_each_side_and_mended(&mut client, &mut load).await?;

    // The same of versions that only a snapshot sees.
    let mut volumes = VolumeServiceClient::new(channel);
    let (group, name) = ("still".to_owned(), "kept".to_owned());
    volumes.snapshot(v1::SnapshotRequest { group: group.clone(), name: name.clone() }).await?;
    let newer = |block: u64| fill(8, usize::try_from(block).expect("few"), 2);
    for block in [20, 21] {
        let (volume, offset_bytes, data) = (group.clone(), block * BLOCK_BYTES as u64, newer(block));
        blocks.write_block(v1::WriteBlockRequest { volume, offset_bytes, data, ..Default::default() }).await?;
    }
    flip(&pair.data_dir(Role::Primary), &content(20)).await?;
    flip(&pair.data_dir(Role::Backup), &content(21)).await?;
    one_is_found_on_each_side_and_mended(&mut client, &mut load).await?;
    let mut backup = BackupServiceClient::new(pair.node(Role::Backup)?.channel()?);
    for block in [20, 21] {
        let (offset_bytes, length_bytes) = (block * BLOCK_BYTES as u64, BLOCK_BYTES as u64);
        let (volume, snapshot) = (group.clone(), name.clone());
        let request = v1::ReadBlocksRequest { volume, offset_bytes, length_bytes, snapshot, ..Default::default() };
        let read = blocks.read_blocks(request).await?.into_inner().message().await?.and_then(|read| read.content);
        let whole = v1::read_blocks_response::Content::Data(content(block));
        ensure!(read == Some(whole), "block {block} of the primary's snapshot: {read:?}");
        let (volume, snapshot) = (group.clone(), name.clone());
        let request = v1::ReadImageRequest { volume, offset_bytes, length_bytes, snapshot, ..Default::default() };
        let read = backup.read_blocks(request).await?.into_inner().message().await?.and_then(|read| read.content);
        let whole = v1::read_image_response::Content::Data(content(block));
        ensure!(read == Some(whole), "block {block} of the backup's snapshot: {read:?}");
    }
    volumes.delete_snapshot(v1::DeleteSnapshotRequest { group, snapshot: name }).await?;

    // Nothing differs, whatever is written meanwhile.
    for _ in 0..3 {
        for group in verify(&mut client, false).await? {
            ensure!(group.differing_blocks == 0, "{group:?}");
        }
        load.progress(50, Duration::from_secs(1)).await?;
    }

    // One more, and no scrub: the comparison lists it and nothing else, and repairs it.
    flip(&pair.data_dir(Role::Backup), &content(9)).await?;
    let told = verify(&mut client, true).await?;
    let listed: Vec<_> = told.iter().flat_map(|message| &message.differences).collect();
    ensure!(listed.len() == 1, "{listed:?}");
    ensure!((&*listed[0].volume, listed[0].first_block, listed[0].block_count) == ("still", 9, 1), "{listed:?}");
    ensure!(told.iter().any(|message| message.finished && message.repaired_blocks == 1), "{told:?}");

    // Without a backup there is nothing to compare with.
    pair.link.set(Link::Cut);
    pair.wait_attached(false).await?;
    let refused = verify(&mut client, false).await.err().context("the backup is away")?;
    let code = refused.downcast_ref::<tonic::Status>().map(tonic::Status::code);
    ensure!(matches!(code, Some(Code::Unavailable | Code::FailedPrecondition)), "{refused:#}");
    pair.link.set(Link::Open);

    load.finish().await?;
    pair.wait_caught_up().await?;
    for name in ["still", "busy"] {
        let image = pair.read_image(Role::Primary, name).await?;
        ensure!(image == pair.read_image(Role::Backup, name).await?, "the images of {name} differ");
        let now = |n: u64| if n == 20 || n == 21 { newer(n) } else { content(n) };
        let whole = name == "busy" || (0..BLOCKS).all(|n| image.chunks(BLOCK_BYTES).any(|block| *block == now(n)[..]));
        ensure!(whole, "a block of {name} is not what was written");
    }

    // A directory in use is refused, a stopped one is whole, one with a flipped bit is not.
    for role in [Role::Primary, Role::Backup] {
        let directory = pair.data_dir(role);
        ensure!(fsck(&directory)? == Some(1), "{} is in use", directory.display());
        pair.kill(role);
        ensure!(fsck(&directory)? == Some(0), "{} has problems", directory.display());
        flip(&directory, &content(11)).await?;
        ensure!(fsck(&directory)? == Some(1), "a flipped bit in {} was not found", directory.display());
    }
    Ok(())
}

fn fsck(directory: &Path) -> Result<Option<i32>> {
    let output = Command::new(bin_dir().join("understudy")).args(["fsck", "--data"]).arg(directory).output()?;
    println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok(output.status.code())
}
