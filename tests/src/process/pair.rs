//! A primary and a backup as processes, with a faulty link between them, and reads of both images.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;
use tonic::{Code, Streaming, transport::Channel};
use understudy_proto::v1::{
    self, backup_service_client::BackupServiceClient, block_service_client::BlockServiceClient,
    replication_service_client::ReplicationServiceClient, volume_service_client::VolumeServiceClient,
};

use super::{Node, PATIENCE, Role};
use understudy_common::proxy::Proxy;

const STATUS_INTERVAL: Duration = Duration::from_millis(50);

/// Short times, so that a lost link is noticed within a round; a small journal, so that it wraps.
const PRIMARY_ARGS: [&str; 6] = ["--link-heartbeat", "100ms", "--link-timeout", "500ms", "--staging-capacity", "64MiB"];
const BACKUP_ARGS: [&str; 2] = ["--staging-capacity", "64MiB"];

/// A pair in a temporary directory. Its processes are killed when it is dropped.
#[derive(Debug)]
pub struct Pair {
    directory: TempDir,
    primary: Option<Node>,
    primary_args: Vec<String>,
    backup_args: Vec<String>,
    backup: Option<Node>,
    /// The link from the primary to the backup.
    pub link: Proxy,
}

impl Pair {
    /// Starts both sides and waits until both are ready.
    ///
    /// # Errors
    /// A side does not start.
    pub async fn start() -> Result<Self> {
        Self::start_with(&PRIMARY_ARGS).await
    }

    /// As [`Pair::start`], with other settings of the primary.
    ///
    /// # Errors
    /// A side does not start.
    pub async fn start_with(primary_args: &[&str]) -> Result<Self> {
        Self::start_both(primary_args, &[]).await
    }

    /// As [`Pair::start_with`], with more settings of the backup.
    ///
    /// # Errors
    /// A side does not start.
    pub async fn start_both(primary_args: &[&str], backup_args: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let backup_args: Vec<&str> = BACKUP_ARGS.iter().chain(backup_args).copied().collect();
        let backup = Node::start(Role::Backup, &directory.path().join("backup"), &backup_args).await?;
        let link = Proxy::start(backup.replica.context("ready")?).await?;
        let mut pair = Self {
            directory,
            primary: None,
            primary_args: primary_args.iter().map(|&arg| arg.into()).collect(),
            backup_args: backup_args.iter().map(|&arg| arg.into()).collect(),
            backup: Some(backup),
            link,
        };
        pair.restart(Role::Primary).await?;
        Ok(pair)
    }

    /// A pair of processes that were started otherwise; they cannot be restarted.
    #[must_use]
    pub fn of(directory: TempDir, primary: Node, backup: Node, link: Proxy) -> Self {
        let (primary, backup) = (Some(primary), Some(backup));
        Self { directory, primary, primary_args: Vec::new(), backup_args: Vec::new(), backup, link }
    }

    /// The data directory of a side.
    #[must_use]
    pub fn data_dir(&self, role: Role) -> PathBuf {
        self.directory.path().join(role.name())
    }

    /// The running process of a side.
    ///
    /// # Errors
    /// It was killed and not restarted.
    pub fn node(&self, role: Role) -> Result<&Node> {
        let node = match role {
            Role::Primary => &self.primary,
            Role::Backup => &self.backup,
        };
        node.as_ref().with_context(|| format!("the {} is not running", role.name()))
    }

    /// SIGKILL. The link still leads to where the backup was.
    pub fn kill(&mut self, role: Role) {
        match role {
            Role::Primary => self.primary = None,
            Role::Backup => self.backup = None,
        }
    }

    /// Starts a side again, as a new process with a new address; the link follows the backup.
    ///
    /// # Errors
    /// It does not get ready.
    pub async fn restart(&mut self, role: Role) -> Result<()> {
        let data_dir = self.data_dir(role);
        match role {
            Role::Backup => {
                let args: Vec<&str> = self.backup_args.iter().map(String::as_str).collect();
                let node = Node::start(role, &data_dir, &args).await?;
                self.link.retarget(node.replica.context("ready")?);
                self.backup = Some(node);
            }
            Role::Primary => {
                let url = format!("http://{}", self.link.address());
                let args: Vec<&str> =
                    self.primary_args.iter().map(String::as_str).chain(["--backup-url", &url]).collect();
                self.primary = Some(Node::start(role, &data_dir, &args).await?);
            }
        }
        Ok(())
    }

    /// Repeats a write under its sequence until it is acknowledged.
    ///
    /// # Errors
    /// It is refused for another reason than that the backup is away, or for longer than [`PATIENCE`].
    pub async fn until_acknowledged(
        &self,
        client: &mut BlockServiceClient<Channel>,
        request: v1::WriteBlockRequest,
    ) -> Result<v1::WriteBlockResponse> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match client.write_block(request.clone()).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) if status.code() == Code::Unavailable && Instant::now() < deadline => {}
                Err(status) => return Err(status.into()),
            }
        }
    }

    /// Creates a volume of 4 KiB blocks.
    ///
    /// # Errors
    /// The primary refuses.
    pub async fn create_volume(&self, name: &str, blocks: u64, ack: v1::AckRule, away: v1::AwayRule) -> Result<()> {
        let request = v1::CreateVolumeRequest {
            name: name.to_owned(),
            size_bytes: blocks * 4096,
            ack: ack.into(),
            away: away.into(),
            ..Default::default()
        };
        VolumeServiceClient::new(self.node(Role::Primary)?.channel()?).create_volume(request).await?;
        Ok(())
    }

    /// Polls the primary's status until its link is attached, or is not.
    ///
    /// # Errors
    /// Not within [`PATIENCE`].
    pub async fn wait_attached(&self, attached: bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut client = ReplicationServiceClient::new(self.node(Role::Primary)?.channel()?);
        loop {
            let link = client.get_status(v1::GetStatusRequest {}).await?.into_inner().link.unwrap_or_default();
            if (link.state == "attached") == attached {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the link is still {} after {PATIENCE:?}", link.state);
            tokio::time::sleep(STATUS_INTERVAL).await;
        }
    }

    /// Polls the primary's status until nothing that it acknowledged is missing on the backup.
    ///
    /// # Errors
    /// Not within [`PATIENCE`]; the message holds the last status and both logs.
    pub async fn wait_caught_up(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut client = ReplicationServiceClient::new(self.node(Role::Primary)?.channel()?);
        loop {
            let status = client.get_status(v1::GetStatusRequest {}).await.map(tonic::Response::into_inner);
            if let Ok(status) = &status {
                let attached = status.link.as_ref().is_some_and(|link| link.state == "attached");
                if attached && status.volumes.iter().all(|volume| volume.bytes_at_risk == 0) {
                    return Ok(());
                }
            }
            if Instant::now() > deadline {
                let (primary, backup) = (self.node(Role::Primary)?.log_tail(), self.node(Role::Backup)?.log_tail());
                bail!("the backup did not catch up within {PATIENCE:?}: {status:?}\n{primary}\n{backup}");
            }
            tokio::time::sleep(STATUS_INTERVAL).await;
        }
    }

    /// The whole volume as one side serves it.
    ///
    /// # Errors
    /// The side refuses, or its answer has a gap.
    pub async fn read_image(&self, role: Role, volume: &str) -> Result<Vec<u8>> {
        image_of(self.node(role)?, role, volume).await
    }
}

/// The whole volume as a node serves it in its role.
///
/// # Errors
/// It refuses, or its answer has a gap.
pub async fn image_of(node: &Node, role: Role, volume: &str) -> Result<Vec<u8>> {
    let channel = node.channel()?;
    match role {
        Role::Primary => {
            let request = v1::ReadBlocksRequest { volume: volume.to_owned(), ..Default::default() };
            collect(BlockServiceClient::new(channel).read_blocks(request).await?.into_inner(), |chunk| {
                let content = match chunk.content {
                    Some(v1::read_blocks_response::Content::Data(data)) => Chunk::Data(data),
                    Some(v1::read_blocks_response::Content::ZeroBytes(count)) => Chunk::Zeros(count),
                    None => Chunk::Zeros(0),
                };
                (chunk.offset_bytes, content)
            })
            .await
        }
        Role::Backup => {
            let request = v1::ReadImageRequest { volume: volume.to_owned(), ..Default::default() };
            collect(BackupServiceClient::new(channel).read_blocks(request).await?.into_inner(), |chunk| {
                let content = match chunk.content {
                    Some(v1::read_image_response::Content::Data(data)) => Chunk::Data(data),
                    Some(v1::read_image_response::Content::ZeroBytes(count)) => Chunk::Zeros(count),
                    None => Chunk::Zeros(0),
                };
                (chunk.offset_bytes, content)
            })
            .await
        }
    }
}

enum Chunk {
    Data(bytes::Bytes),
    Zeros(u64),
}

async fn collect<T>(mut answers: Streaming<T>, content: impl Fn(T) -> (u64, Chunk)) -> Result<Vec<u8>> {
    let mut image = Vec::new();
    while let Some(answer) = answers.message().await? {
        let (offset, content) = content(answer);
        ensure!(offset == image.len() as u64, "chunk at {offset}, expected {}", image.len());
        match content {
            Chunk::Data(data) => image.extend_from_slice(&data),
            Chunk::Zeros(count) => image.resize(image.len() + usize::try_from(count)?, 0),
        }
    }
    Ok(image)
}
