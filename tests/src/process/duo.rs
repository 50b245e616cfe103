//! Nodes that change roles: each may be the primary, and is reached by the others through a link of its own. Two of them
//! are a pair from the start; a third one joins where a test starts it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;
use tonic::{Code, Status, transport::Channel};
use understudy_common::proxy::Proxy;
use understudy_proto::v1::{
    self, backup_service_client::BackupServiceClient, block_service_client::BlockServiceClient,
    replication_service_client::ReplicationServiceClient, volume_service_client::VolumeServiceClient,
};

use super::{
    Node, PATIENCE, Role,
    load::{self, BLOCK_BYTES},
    pair,
};

/// Exit code of a service whose role has changed.
pub const EXIT_AGAIN: i32 = 75;
/// Exit code of a service on a directory of the other role.
pub const EXIT_WRONG_ROLE: i32 = 64;

const LOOK: Duration = Duration::from_millis(10);
/// Short times, so that a link is lost and found within a test.
const PRIMARY_ARGS: [&str; 18] = [
    "--link-heartbeat",
    "50ms",
    "--link-timeout",
    "400ms",
    "--link-settle",
    "100ms",
    "--link-reconnect-max",
    "300ms",
    "--policy-weigh-interval",
    "50ms",
    "--policy-dwell",
    "500ms",
    "--staging-capacity",
    "64MiB",
    "--delta-throttle",
    "none",
    "--limits-queue-wait",
    "1s",
];
const BACKUP_ARGS: [&str; 6] = ["--link-heartbeat", "50ms", "--link-timeout", "400ms", "--staging-capacity", "64MiB"];

/// Nodes that a test may run.
pub const NODES: usize = 3;

/// See the module.
#[derive(Debug)]
pub struct Duo {
    directory: TempDir,
    nodes: [Option<Node>; NODES],
    /// `doors[n]` leads to node `n`: what another one, as a primary, connects to.
    pub doors: [Proxy; NODES],
    /// Whom a node connects to as a primary, from its next start on.
    pub peers: [usize; NODES],
    extra: Vec<String>,
}

impl Duo {
    /// Node 0 is the primary, node 1 its backup.
    ///
    /// # Errors
    /// A side does not start.
    pub async fn start() -> Result<Self> {
        Self::start_with(&[]).await
    }

    /// As [`Duo::start`], with more settings of whoever is the primary.
    ///
    /// # Errors
    /// A side does not start.
    pub async fn start_with(extra: &[&str]) -> Result<Self> {
        let nowhere = || Proxy::start(([127, 0, 0, 1], 1).into());
        let doors = [nowhere().await?, nowhere().await?, nowhere().await?];
        let extra = extra.iter().map(|&arg| arg.to_owned()).collect();
        let (directory, nodes) = (tempfile::tempdir()?, [None, None, None]);
        let mut duo = Self { directory, nodes, doors, peers: [1, 0, 0], extra };
        duo.run(1, Role::Backup).await?;
        duo.run(0, Role::Primary).await?;
        Ok(duo)
    }

    /// The data directory of a node.
    #[must_use]
    pub fn data_dir(&self, node: usize) -> PathBuf {
        self.directory.path().join(format!("node{node}"))
    }

    /// A running process.
    ///
    /// # Errors
    /// It does not run.
    pub fn node(&self, node: usize) -> Result<&Node> {
        self.nodes[node].as_ref().with_context(|| format!("node {node} is not running"))
    }

    fn args(&self, node: usize, role: Role) -> Vec<String> {
        let mut args: Vec<String> = match role {
            Role::Primary => PRIMARY_ARGS.iter().map(|&arg| arg.into()).chain(self.extra.iter().cloned()).collect(),
            Role::Backup => BACKUP_ARGS.iter().map(|&arg| arg.into()).collect(),
        };
        if role == Role::Primary {
            args.extend(["--backup-url".into(), format!("http://{}", self.doors[self.peers[node]].address())]);
        }
        args
    }

    /// Starts the service of `role` on a node's directory.
    ///
    /// # Errors
    /// It does not get ready.
    pub async fn run(&mut self, node: usize, role: Role) -> Result<()> {
        let args = self.args(node, role);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let started = Node::start(role, &self.data_dir(node), &args).await?;
        self.doors[node].retarget(started.replica.context("ready")?);
        self.nodes[node] = Some(started);
        Ok(())
    }

    /// The service of `role` must refuse a node's directory, and say why.
    ///
    /// # Errors
    /// It does not.
    pub async fn refuses(&self, node: usize, role: Role, word: &str) -> Result<()> {
        let args = self.args(node, role);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut wrong = Node::spawn(role, &self.data_dir(node), &args)?;
        let status = wrong.wait_exit().await?;
        ensure!(status.code() == Some(EXIT_WRONG_ROLE), "{status}\n{}", wrong.log_tail());
        ensure!(wrong.log_tail().contains(word), "{word:?} is not in\n{}", wrong.log_tail());
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self, node: usize) {
        self.nodes[node] = None;
    }

    /// Waits for the end of a node whose role has changed, and starts it as `role`.
    ///
    /// # Errors
    /// It ends otherwise, or does not get ready.
    pub async fn again(&mut self, node: usize, role: Role) -> Result<()> {
        let mut ended = self.nodes[node].take().context("it runs")?;
        let status = ended.wait_exit().await?;
        ensure!(status.code() == Some(EXIT_AGAIN), "{status}, expected {EXIT_AGAIN}\n{}", ended.log_tail());
        self.run(node, role).await
    }

    /// A copy of the directory of a node that does not run, as an operator keeps one.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn copy_of(&self, node: usize, name: &str) -> Result<PathBuf> {
        let copy = self.directory.path().join(name);
        copy_dir(&self.data_dir(node), &copy)?;
        Ok(copy)
    }

    /// Puts a copy in the place of the directory of a node that does not run.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn put_back(&self, node: usize, copy: &Path) -> Result<()> {
        let directory = self.data_dir(node);
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        copy_dir(copy, &directory)
    }

    /// The image that lies in the directory of a node, whatever that would serve: of a copy, made a backup's where it is a
    /// primary's. The node is killed, and started again as `role`.
    ///
    /// # Errors
    /// The copy does not start or serve, or the node does not start again.
    pub async fn image_at_rest(&mut self, node: usize, role: Role, volume: &str) -> Result<Vec<u8>> {
        self.kill(node);
        let copy = self.copy_of(node, &format!("at-rest{node}"))?;
        if role == Role::Primary {
            let storage = understudy_common::storage::RealStorage::new(&copy)?;
            understudy_common::store::demote_stopped(&storage)?;
        }
        let image = {
            let copied = Node::start(Role::Backup, &copy, &BACKUP_ARGS).await?;
            pair::image_of(&copied, Role::Backup, volume).await?
        };
        fs::remove_dir_all(&copy)?;
        self.run(node, role).await?;
        Ok(image)
    }

    /// The replication service of a primary.
    ///
    /// # Errors
    /// It does not run.
    pub fn replication(&self, node: usize) -> Result<ReplicationServiceClient<Channel>> {
        Ok(ReplicationServiceClient::new(self.node(node)?.channel()?))
    }

    /// The service of a backup.
    ///
    /// # Errors
    /// It does not run.
    pub fn backup(&self, node: usize) -> Result<BackupServiceClient<Channel>> {
        Ok(BackupServiceClient::new(self.node(node)?.channel()?))
    }

    /// The blocks of a primary.
    ///
    /// # Errors
    /// It does not run.
    pub fn blocks(&self, node: usize) -> Result<BlockServiceClient<Channel>> {
        Ok(BlockServiceClient::new(self.node(node)?.channel()?))
    }

    /// Promotes a node, repeating it while the primary counts as attached.
    ///
    /// # Errors
    /// It is refused for another reason.
    pub async fn promote(&self, node: usize, request: v1::PromoteRequest) -> Result<v1::PromoteResponse> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.backup(node)?.promote(request.clone()).await {
                Ok(promoted) => return Ok(promoted.into_inner()),
                Err(status) if status.message().contains("attached") && Instant::now() < deadline => {}
                Err(status) => return Err(status.into()),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Creates a volume of 4 KiB blocks.
    ///
    /// # Errors
    /// The primary refuses.
    pub async fn create_volume(
        &self,
        node: usize,
        name: &str,
        blocks: u64,
        ack: v1::AckRule,
        away: v1::AwayRule,
    ) -> Result<()> {
        let request = v1::CreateVolumeRequest {
            name: name.to_owned(),
            size_bytes: blocks * BLOCK_BYTES as u64,
            ack: ack.into(),
            away: away.into(),
            ..Default::default()
        };
        VolumeServiceClient::new(self.node(node)?.channel()?).create_volume(request).await?;
        Ok(())
    }

    /// Writes one block; what the primary says.
    ///
    /// # Errors
    /// It refuses.
    pub async fn write(
        &self,
        node: usize,
        volume: &str,
        block: u64,
        stamp: u64,
    ) -> Result<v1::WriteBlockResponse, Status> {
        let channel = self.node(node).and_then(Node::channel).map_err(|e| Status::unavailable(e.to_string()))?;
        let request = v1::WriteBlockRequest {
            volume: volume.to_owned(),
            offset_bytes: block * BLOCK_BYTES as u64,
            data: load::fill(0, usize::try_from(block).expect("a small number"), stamp),
            ..Default::default()
        };
        Ok(BlockServiceClient::new(channel).write_block(request).await?.into_inner())
    }

    /// Reads one block.
    ///
    /// # Errors
    /// The primary refuses.
    pub async fn read(&self, node: usize, volume: &str, block: u64) -> Result<bytes::Bytes> {
        let request = v1::ReadBlockRequest {
            volume: volume.to_owned(),
            offset_bytes: block * BLOCK_BYTES as u64,
            length_bytes: BLOCK_BYTES as u64,
            ..Default::default()
        };
        Ok(self.blocks(node)?.read_block(request).await?.into_inner().data)
    }

    /// Polls the status of a primary until `done`.
    ///
    /// # Errors
    /// Not within [`PATIENCE`]; the message holds the last status and the logs.
    pub async fn until(&self, node: usize, what: &str, done: impl Fn(&v1::Status) -> bool) -> Result<v1::Status> {
        let deadline = Instant::now() + PATIENCE;
        let mut client = self.replication(node)?;
        loop {
            let status = client.get_status(v1::GetStatusRequest {}).await.map(tonic::Response::into_inner);
            match status {
                Ok(status) if done(&status) => return Ok(status),
                other if Instant::now() > deadline => {
                    let logs: Vec<String> = self.nodes.iter().flatten().map(Node::log_tail).collect();
                    bail!("{what}: not within {PATIENCE:?}: {other:?}\n{}", logs.join("\n"));
                }
                _ => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Waits until everything is continuous and on the backup.
    ///
    /// # Errors
    /// As of [`Duo::until`].
    pub async fn until_joined(&self, primary: usize) -> Result<v1::Status> {
        self.until(primary, "joined", |status| {
            let attached = status.link.as_ref().is_some_and(|link| link.state == "attached");
            let calm = |v: &v1::VolumeStatus| v.mode() == v1::Mode::Continuous && v.bytes_at_risk == 0 && v.consistent;
            attached && status.volumes.iter().all(calm)
        })
        .await
    }

    /// The image of a volume as a node serves it in its role.
    ///
    /// # Errors
    /// It refuses.
    pub async fn image(&self, node: usize, role: Role, volume: &str) -> Result<Vec<u8>> {
        pair::image_of(self.node(node)?, role, volume).await
    }

    /// Both images of a volume, which must be the same.
    ///
    /// # Errors
    /// They differ, or cannot be read.
    pub async fn identical(&self, primary: usize, volume: &str) -> Result<Vec<u8>> {
        let image = self.image(primary, Role::Primary, volume).await?;
        let copy = self.image(self.peers[primary], Role::Backup, volume).await?;
        ensure!(image.len() == copy.len(), "{} and {} bytes", image.len(), copy.len());
        let differing = image.chunks(BLOCK_BYTES).zip(copy.chunks(BLOCK_BYTES)).position(|(a, b)| a != b);
        ensure!(differing.is_none(), "block {differing:?} of {volume} differs");
        Ok(image)
    }

    /// Kinds of events of a node, all that are kept.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn events(&self, node: usize, role: Role) -> Result<Vec<v1::Event>> {
        let request = v1::WatchEventsRequest { after: 1 };
        let mut stream = match role {
            Role::Primary => self.replication(node)?.watch_events(request).await?.into_inner(),
            Role::Backup => self.backup(node)?.watch_events(request).await?.into_inner(),
        };
        let mut events = Vec::new();
        while let Ok(Ok(Some(event))) = tokio::time::timeout(Duration::from_millis(300), stream.message()).await {
            events.push(event);
        }
        Ok(events)
    }

    /// Waits until a primary refuses writes of this block because it was superseded.
    ///
    /// # Errors
    /// It does not.
    pub async fn until_fenced(&self, node: usize, volume: &str, block: u64, stamp: u64) -> Result<Status> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.write(node, volume, block, stamp).await {
                Err(status) if status.code() == Code::FailedPrecondition => return Ok(status),
                other => ensure!(Instant::now() < deadline, "a superseded primary goes on: {other:?}"),
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_dir(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), &to)?;
        }
    }
    Ok(())
}
