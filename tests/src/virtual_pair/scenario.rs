//! A pair in virtual time that only a script disturbs: for tests that say what happens, and when.
//!
//! Time passes only while everybody waits, whatever the machine does meanwhile. So a script may let seconds pass and
//! then say that nothing has happened in them.

use std::{collections::HashMap, future::Future, sync::Arc, time::Duration};

use anyhow::{Result, anyhow, ensure};
use bytes::Bytes;
use parking_lot::Mutex;
use rand::SeedableRng;
use rand_pcg::Pcg64Mcg;
use tokio::time::{Instant, sleep};
use tonic::{Status, transport::Channel};
use understudy_common::{policy::PolicyConfig, store::Role};
use understudy_proto::v1::{
    self, block_service_client::BlockServiceClient, replication_service_client::ReplicationServiceClient,
    volume_service_client::VolumeServiceClient,
};

use super::{
    TICK,
    client::backup_image,
    hosts::{self, Machine, connect},
    model::{BLOCK, Model, fill},
};

/// Virtual time within which what is waited for must have happened.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// What a pair is made of.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The primary's.
    pub policy: PolicyConfig,
    /// Segments of 64 KiB in the backup's pool.
    pub backup_segments: u64,
    /// Longest time of a call.
    pub request_deadline: Duration,
}

impl Default for Setting {
    /// A policy whose times are short, and a backup as large as the primary.
    fn default() -> Self {
        let policy = PolicyConfig {
            weigh_interval: Duration::from_millis(50),
            link_timeout: hosts::link().timeout,
            link_settle: Duration::from_millis(100),
            dwell: Duration::from_millis(500),
            dwell_max: Duration::from_secs(5),
            ..PolicyConfig::default()
        };
        Self { policy, backup_segments: 56, request_deadline: Duration::from_secs(30) }
    }
}

/// Starts a pair and plays `script` as its client.
///
/// # Errors
/// That of the script, or of a host.
pub fn play<F>(setting: Setting, script: impl FnOnce() -> F) -> Result<()>
where
    F: Future<Output = Result<()>> + 'static,
{
    super::count_panics();
    let mut rng = Pcg64Mcg::seed_from_u64(1);
    let model = Arc::new(Mutex::new(Model::new()));
    let mut sim = turmoil::Builder::new()
        .rng_seed(1)
        .tick_duration(TICK)
        .simulation_duration(20 * PATIENCE)
        .tcp_capacity(1024)
        .build();
    let mut machine = |role, segments| {
        let mut machine = Machine::new(role, &mut rng, &model, setting.policy.clone());
        machine.config.pool.devices = vec![hosts::device(segments)];
        machine.request_deadline = setting.request_deadline;
        Arc::new(machine)
    };
    let (primary, backup) = (machine(Role::Primary, 56), machine(Role::Backup, setting.backup_segments));
    sim.host("primary", move || hosts::primary(Arc::clone(&primary)));
    sim.host("backup", move || hosts::backup(Arc::clone(&backup)));
    let script = script();
    sim.client("client", async move { Ok(script.await?) });
    let played = sim.run().map_err(|error| anyhow!("{error:?}"));
    drop(sim);
    played?;
    ensure!(super::PANICS.get() == 0, "a task panicked; see above");
    model.lock().violation().map_or(Ok(()), |violation| Err(anyhow!("{violation}")))
}

/// Messages between primary and backup are lost from now on.
pub fn cut_link() {
    turmoil::partition("primary", "backup");
}

/// They arrive again.
pub fn repair_link() {
    turmoil::repair("primary", "backup");
}

/// Lets time pass.
pub async fn pass(time: Duration) {
    sleep(time).await;
}

async fn primary() -> Result<Channel, Status> {
    connect("primary").await.map_err(Status::unavailable)
}

async fn replication() -> Result<ReplicationServiceClient<Channel>, Status> {
    Ok(ReplicationServiceClient::new(primary().await?))
}

/// Waits until the primary serves and is attached.
///
/// # Errors
/// It is not within a minute.
pub async fn until_attached() -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let attached = || async {
        let status = replication().await?.get_status(v1::GetStatusRequest {}).await?.into_inner();
        Ok::<_, Status>(status.link.unwrap_or_default().state == "attached")
    };
    while !attached().await.unwrap_or(false) {
        ensure!(Instant::now() < deadline, "the primary is not attached");
        sleep(POLL).await;
    }
    Ok(())
}

/// Makes a volume, which is a group of its own, once the primary is attached.
///
/// # Errors
/// The primary refuses.
pub async fn create_volume(name: &str, segments: u64, ack: v1::AckRule, away: v1::AwayRule) -> Result<()> {
    until_attached().await?;
    let request = v1::CreateVolumeRequest {
        name: name.into(),
        size_bytes: segments << 16,
        block_bytes: u32::try_from(BLOCK)?,
        ack: ack.into(),
        away: away.into(),
        ..Default::default()
    };
    VolumeServiceClient::new(primary().await?).create_volume(request).await?;
    Ok(())
}

/// What a block holds behind the write of `stamp`.
#[must_use]
pub fn content(block: u64, stamp: u64) -> Bytes {
    fill(stamp, 0, usize::try_from(block).expect("small")).into()
}

/// Writes one block, under the sequence `stamp`.
///
/// # Errors
/// The primary refuses, or does not confirm it in time.
pub async fn write(volume: &str, block: u64, stamp: u64) -> Result<v1::WriteBlockResponse, Status> {
    let request = v1::WriteBlockRequest {
        volume: volume.into(),
        offset_bytes: block * BLOCK as u64,
        data: content(block, stamp),
        client_id: volume.into(),
        sequence: stamp,
        ..Default::default()
    };
    Ok(BlockServiceClient::new(primary().await?).write_block(request).await?.into_inner())
}

/// Writes one block of each segment of `segments`.
///
/// # Errors
/// As [`write`].
pub async fn write_segments(volume: &str, segments: std::ops::Range<u64>, stamp: u64) -> Result<(), Status> {
    for segment in segments {
        write(volume, segment << 16 >> BLOCK.ilog2(), stamp + segment).await?;
    }
    Ok(())
}

/// Discards a volume's content.
///
/// # Errors
/// The primary refuses.
pub async fn discard(volume: &str, segments: u64) -> Result<()> {
    let request = v1::DiscardRequest { volume: volume.into(), length_bytes: segments << 16, ..Default::default() };
    BlockServiceClient::new(primary().await?).discard(request).await?;
    Ok(())
}

/// What the backup shows of a block.
///
/// # Errors
/// It shows no image.
pub async fn block_on_backup(volume: &str, block: u64) -> Result<Bytes> {
    let (_, image) = backup_image(volume).await?;
    let at = usize::try_from(block)? * BLOCK;
    ensure!(at + BLOCK <= image.len(), "an image of {} bytes", image.len());
    Ok(Bytes::copy_from_slice(&image[at..at + BLOCK]))
}

/// What the primary says of a volume.
///
/// # Errors
/// It has none of this name.
pub async fn status(volume: &str) -> Result<v1::VolumeStatus> {
    let status = replication().await?.get_status(v1::GetStatusRequest {}).await?.into_inner();
    status.volumes.into_iter().find(|v| v.name == volume).ok_or_else(|| anyhow!("there is no volume {volume}"))
}

/// Polls [`status`] until `done` holds of it.
///
/// # Errors
/// It does not within a minute.
pub async fn until(volume: &str, what: &str, done: impl Fn(&v1::VolumeStatus) -> bool) -> Result<v1::VolumeStatus> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = status(volume).await?;
        if done(&status) {
            return Ok(status);
        }
        ensure!(Instant::now() < deadline, "waited in vain until {what}: {status:?}");
        sleep(POLL).await;
    }
}

/// Polls until a volume is in continuous mode and the backup has all of it.
///
/// # Errors
/// As [`until`].
pub async fn until_settled(volume: &str) -> Result<v1::VolumeStatus> {
    let settled = |v: &v1::VolumeStatus| v.mode() == v1::Mode::Continuous && v.bytes_at_risk == 0;
    until(volume, "it is continuous and the backup has all", settled).await
}

/// `understudy delta start`.
///
/// # Errors
/// The primary refuses.
pub async fn start_delta(volume: &str) -> Result<()> {
    replication().await?.start_delta(v1::StartDeltaRequest { group: volume.into() }).await?;
    Ok(())
}

/// `understudy mode set` and `mode release`.
///
/// # Errors
/// The primary refuses.
pub async fn hold_delta(volume: &str, hold: bool) -> Result<()> {
    let mode = if hold { v1::Mode::Delta } else { v1::Mode::Unspecified };
    replication().await?.set_mode(v1::SetModeRequest { group: volume.into(), mode: mode.into() }).await?;
    Ok(())
}

/// `understudy policy set`.
///
/// # Errors
/// The primary refuses.
pub async fn set_policy(name: &str, text: &str) -> Result<()> {
    let settings = HashMap::from([(name.to_owned(), text.to_owned())]);
    replication().await?.set_policy(v1::SetPolicyRequest { settings, validate_only: false }).await?;
    Ok(())
}
