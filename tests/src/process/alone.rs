//! A primary without a backup, with one volume of 4 KiB blocks.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use understudy_proto::v1::{
    self, block_service_client::BlockServiceClient, volume_service_client::VolumeServiceClient,
};

use super::{
    Node, Role,
    load::{self, BLOCK_BYTES},
};

/// Exit code of a service whose storage failed or is not what it should be.
pub const EXIT_STORAGE: i32 = 74;

const VOLUME: &str = "volume";

/// See the module.
#[derive(Debug)]
pub struct Alone {
    /// Its process.
    pub node: Node,
    directory: PathBuf,
}

impl Alone {
    /// Starts on a new directory below `parent` and creates a volume of 1 MiB.
    ///
    /// # Errors
    /// The service does not start or refuses.
    pub async fn start(parent: &Path, name: &str, args: &[&str]) -> Result<Self> {
        let alone = Self::reopen(parent, name, args).await?;
        alone.create_volume(1 << 20).await?;
        Ok(alone)
    }

    /// Starts on a directory below `parent`.
    ///
    /// # Errors
    /// The service does not start.
    pub async fn reopen(parent: &Path, name: &str, args: &[&str]) -> Result<Self> {
        let directory = parent.join(name);
        Ok(Self { node: Node::start(Role::Primary, &directory, args).await?, directory })
    }

    /// Creates the volume that all other calls are about.
    ///
    /// # Errors
    /// The service refuses.
    pub async fn create_volume(&self, size_bytes: u64) -> Result<()> {
        let request = v1::CreateVolumeRequest { name: VOLUME.into(), size_bytes, ..Default::default() };
        VolumeServiceClient::new(self.node.channel()?).create_volume(request).await?;
        Ok(())
    }

    /// The request of a write of one block.
    #[must_use]
    pub fn request(&self, block: u64, stamp: u64) -> v1::WriteBlockRequest {
        v1::WriteBlockRequest {
            volume: VOLUME.into(),
            offset_bytes: block * BLOCK_BYTES as u64,
            data: load::fill(0, usize::try_from(block).expect("a small number"), stamp),
            ..Default::default()
        }
    }

    /// Writes one block.
    ///
    /// # Errors
    /// The service refuses, or is gone.
    pub async fn write(&self, block: u64, stamp: u64) -> Result<()> {
        BlockServiceClient::new(self.node.channel()?).write_block(self.request(block, stamp)).await?;
        Ok(())
    }

    /// Reads one block.
    ///
    /// # Errors
    /// The service refuses, or is gone.
    pub async fn read(&self, block: u64) -> Result<bytes::Bytes> {
        let request = v1::ReadBlockRequest {
            volume: VOLUME.into(),
            offset_bytes: block * BLOCK_BYTES as u64,
            length_bytes: BLOCK_BYTES as u64,
            ..Default::default()
        };
        Ok(BlockServiceClient::new(self.node.channel()?).read_block(request).await?.into_inner().data)
    }

    /// The file of the pool's first device.
    ///
    /// # Errors
    /// The service is gone.
    pub async fn device(&self) -> Result<PathBuf> {
        let pool = VolumeServiceClient::new(self.node.channel()?).get_pool(v1::GetPoolRequest {}).await?.into_inner();
        // An absolute path replaces the directory.
        Ok(self.directory.join(&pool.devices.first().context("a pool without devices")?.path))
    }
}

/// A start on `directory` ends with [`EXIT_STORAGE`], and the log holds each of `words`.
///
/// # Errors
/// It does not.
pub async fn refuses_to_start(directory: &Path, args: &[&str], words: &[&str]) -> Result<()> {
    let mut node = Node::spawn(Role::Primary, directory, args)?;
    let status = node.wait_exit().await?;
    let log = node.log_tail();
    ensure!(status.code() == Some(EXIT_STORAGE), "{status}, expected exit code {EXIT_STORAGE}\n{log}");
    for word in words {
        ensure!(log.contains(word), "the refusal does not name {word:?}\n{log}");
    }
    Ok(())
}
