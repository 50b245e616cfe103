//! No space left: in the pool, which refuses what needs more, and on the disk below, which is a failure.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use tonic::{Code, Status};
use understudy_proto::v1::{self, block_service_client::BlockServiceClient};
use understudy_tests::process::{
    alone::{Alone, EXIT_STORAGE},
    load::{self, BLOCK_BYTES},
};

const BLOCKS_PER_WRITE: u64 = 16;

#[tokio::test]
async fn a_full_pool_refuses_with_numbers_and_still_overwrites() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let device = format!("{}=4MiB", directory.path().join("device").display());
    let args = ["--pool-devices", &device, "--limits-queue-wait", "500ms"];
    let alone = Alone::reopen(directory.path(), "node", &args).await?;
    alone.create_volume(16 << 20).await?;
    let (written, refused) = fill(&alone, 16 << 20, 1).await?;
    let refused = refused.context("16 MiB fit into a device of 4 MiB")?;
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("free") && refused.message().contains("needed"), "{refused}");
    assert!(refused.message().chars().any(|c| c.is_ascii_digit()), "no numbers: {refused}");
    assert!(written * 4096 > 2 << 20, "only {written} blocks of a device of 4 MiB were usable");

    let (overwritten, refused) = fill(&alone, written * 4096, 2).await?;
    assert_eq!(overwritten, written, "{refused:?}");
    let Err(refused) = write(&alone, written, 3).await? else { anyhow::bail!("there is room after an overwrite") };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert_eq!(read(&alone, written).await?, vec![0; BLOCK_BYTES], "a refused write left something");

    drop(alone);
    let alone = Alone::reopen(directory.path(), "node", &args).await?;
    for block in 0..written {
        assert!(read(&alone, block).await? == content(block, 2), "block {block} after a restart");
    }
    // What a discard gives back can be written again.
    let request = v1::DiscardRequest { volume: "volume".into(), length_bytes: 1 << 20, ..Default::default() };
    BlockServiceClient::new(alone.node.channel()?).discard(request).await?;
    write(&alone, written, 4).await?.context("a write into space that a discard gave back")?;
    assert!(read(&alone, written).await? == content(written, 4));
    Ok(())
}

#[tokio::test]
async fn a_full_disk_never_loses_what_was_acknowledged() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let Some(disk) = SmallDisk::mount(&directory.path().join("disk"), "96m")? else {
        eprintln!("NOT CHECKED: a full disk; mounting a tmpfs needs root");
        return Ok(());
    };
    // The pool may grow to more than the disk has.
    let args = ["--staging-capacity", "16MiB", "--limits-queue-wait", "500ms"];
    let mut alone = Alone::reopen(&disk.path, "node", &args).await?;
    alone.create_volume(256 << 20).await?;
    let (written, refused) = fill(&alone, 256 << 20, 1).await?;
    let refused = refused.context("256 MiB fit onto a disk of 96 MiB")?;
    println!("{written} blocks, then {refused}");
    if refused.code() == Code::ResourceExhausted {
        let (overwritten, refused) = fill(&alone, written * 4096 / 2, 1).await?;
        assert_eq!(overwritten, written / 2, "{refused:?}");
        alone.node.kill()?;
    } else {
        // A write or a sync failed: nothing may be acknowledged after that.
        let status = alone.node.wait_exit().await?;
        ensure!(status.code() == Some(EXIT_STORAGE), "{status} after {refused}\n{}", alone.node.log_tail());
    }
    drop(alone);
    disk.enlarge("256m")?;
    let alone = Alone::reopen(&disk.path, "node", &args).await?;
    for block in 0..written {
        assert!(read(&alone, block).await? == content(block, 1), "block {block} after a restart");
    }
    write(&alone, written, 2).await?.context("a write after the disk has room again")?;
    Ok(())
}

/// A file system of its own, unmounted when dropped.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// `None` where this may not be done.
    fn mount(path: &Path, size: &str) -> Result<Option<Self>> {
        std::fs::create_dir(path)?;
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).output();
        let mounted = mounted.is_ok_and(|output| output.status.success());
        Ok(mounted.then(|| Self { path: path.to_owned() }))
    }

    fn enlarge(&self, size: &str) -> Result<()> {
        let status = Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(&self.path).status()?;
        ensure!(status.success(), "remount: {status}");
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}

/// Writes the volume from its start in pieces, up to `size_bytes` or the first refusal. Returns the blocks written.
async fn fill(alone: &Alone, size_bytes: u64, stamp: u64) -> Result<(u64, Option<Status>)> {
    let mut block = 0;
    while block * 4096 < size_bytes {
        if let Err(refused) = write(alone, block, stamp).await? {
            return Ok((block, Some(refused)));
        }
        block += BLOCKS_PER_WRITE;
    }
    Ok((block, None))
}

/// Writes the piece that starts at `block`.
async fn write(alone: &Alone, block: u64, stamp: u64) -> Result<Result<(), Status>> {
    let mut data = Vec::new();
    for block in block..block + BLOCKS_PER_WRITE {
        data.extend_from_slice(&content(block, stamp));
    }
    let request = v1::WriteBlockRequest { data: data.into(), ..alone.request(block, stamp) };
    Ok(BlockServiceClient::new(alone.node.channel()?).write_block(request).await.map(drop))
}

async fn read(alone: &Alone, block: u64) -> Result<Bytes> {
    alone.read(block).await
}

fn content(block: u64, stamp: u64) -> Bytes {
    load::fill(0, usize::try_from(block).expect("a small number"), stamp)
}
