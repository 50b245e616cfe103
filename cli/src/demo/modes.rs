//! The part of the demo that shows the modes: a cut link, hot blocks, and a link that is too slow.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use parking_lot::Mutex;
use rand::{RngCore as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use serde_json::json;
use tokio::task::JoinHandle;
use understudy_client::proto::{Event, Mode, VolumeStatus};
use understudy_client::{Client, VolumeHandle};
use understudy_common::proxy::Link;

use super::load::Load;
use super::{CALM, LOAD_VOLUME, Stage, of};
use crate::commands::copy_in;
use crate::output::size;

const HOT_VOLUME: &str = "hot";
const BULK_VOLUME: &str = "bulk";
const HOT_BLOCKS: u64 = 64;
/// Writes to the hot blocks, and as much data at least as the floor of the criterion.
const HOT_WRITES: u64 = 6144;
const BULK_BYTES: u64 = 256 << 20;
const SLOW_BYTES_PER_S: u32 = 4 << 20;
/// Speed of the writer that the slow link cannot follow.
const BULK_BYTES_PER_S: u64 = 48 << 20;

/// Settings of the demo's primary that let it show in seconds what takes minutes in service.
pub(super) const HASTE: [&str; 18] = [
    "--link-heartbeat",
    "250ms",
    "--link-timeout",
    "1s",
    "--link-settle",
    "500ms",
    "--policy-dwell",
    "1s",
    "--policy-weigh-interval",
    "100ms",
    "--policy-redundancy-floor",
    "8MiB",
    "--policy-redundancy-min-interval",
    "1s",
    "--policy-overflow-horizon",
    "2s",
    "--staging-capacity",
    "256MiB",
];

/// What the primary says of its modes and runs, as it says it.
pub(super) struct Transitions {
    seen: Arc<Mutex<Vec<Event>>>,
    task: JoinHandle<()>,
}

impl Transitions {
    pub(super) fn follow(client: &Client) -> Self {
        let mut events = client.replication().events(0);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            while let Ok(event) = events.next().await {
                sink.lock().push(event);
            }
        });
        Self { seen, task }
    }

    /// How many events there are so far.
    fn mark(&self) -> usize {
        self.seen.lock().len()
    }

    /// Events of a kind since a mark.
    fn since(&self, mark: usize, kind: &str) -> Vec<Event> {
        self.seen.lock()[mark..].iter().filter(|event| event.kind == kind).cloned().collect()
    }
}

impl Drop for Transitions {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Stage<'_> {
    /// The link is cut under load and comes back.
    pub(super) async fn cut_link(&mut self, load: &mut Load, transitions: &Transitions) -> Result<()> {
        let (before, mark, start) = (load.writes(), transitions.mark(), Instant::now());
        self.link.set(Link::Cut);
        self.until("the load's volume is in delta mode", || self.mode_is(LOAD_VOLUME, Mode::Delta)).await?;
        let after = start.elapsed().as_secs_f64();
        let text = format!("link cut: delta mode after {after:.2}s; writes go on and mark their blocks");
        self.say_of(LOAD_VOLUME, "cut_link", &text, json!({"noticed_seconds": after})).await?;
        tokio::time::sleep(3 * CALM).await;
        let volume = self.status_of(LOAD_VOLUME).await?;
        let age = volume.recovery_point.unwrap_or_default().age_seconds;
        let writes = load.writes() - before;
        let text = format!(
            "{writes} writes acknowledged since; the backup still answers with the image of {age:.1}s ago, {} are at risk",
            size(volume.bytes_at_risk)
        );
        let fields = json!({"writes": writes, "bytes_at_risk": volume.bytes_at_risk, "age_seconds": age});
        self.say_of(LOAD_VOLUME, "tracking", &text, fields).await?;
        let back = Instant::now();
        self.link.set(Link::Open);
        self.until_mode(LOAD_VOLUME, Mode::Continuous).await?;
        let took = back.elapsed().as_secs_f64();
        let runs = transitions.since(mark, "run.committed");
        let sent: u64 = runs.iter().map(|run| number(run, "sent_bytes")).sum();
        self.settle(load).await?;
        let text = format!(
            "link back: {} rounds sent {}, continuous after {took:.2}s; both sides identical",
            runs.len(),
            size(sent)
        );
        let fields =
            json!({"rounds": runs.len(), "sent_bytes": sent, "seconds_to_continuous": took, "identical": true});
        self.say_of(LOAD_VOLUME, "return", &text, fields).await?;
        load.resume().await
    }

    /// A few blocks are written over and over while the link is slow: one run ships each of them once.
    pub(super) async fn hot_blocks(&self, transitions: &Transitions) -> Result<()> {
        let volume = copy_in::create(&self.primary_client, HOT_VOLUME, 16 << 20, 4096, Default::default()).await?;
        let mark = transitions.mark();
        self.link.set(Link::Slow(SLOW_BYTES_PER_S));
        let mut expected = vec![0; usize::try_from(volume.volume().size_bytes)?];
        let stream = volume.write_stream();
        let mut rng = Pcg64Mcg::seed_from_u64(3);
        let mut pending = Vec::new();
        for n in 0..HOT_WRITES {
            let at = (n % HOT_BLOCKS) * 4096;
            let data = random(&mut rng, 4096);
            expected[usize::try_from(at)?..][..4096].copy_from_slice(&data);
            pending.push(stream.write(at, data).await?);
            if pending.len() >= 256 {
                for write in pending.drain(..) {
                    write.await?;
                }
            }
        }
        for write in pending {
            write.await?;
        }
        stream.finish().await?;
        let of_hot = |event: &Event| event.fields.get("kind").is_some_and(|kind| kind == "redundancy");
        let run = || async { Ok(transitions.since(mark, "run.committed").iter().any(of_hot)) };
        self.until("a redundancy run is committed", run).await?;
        self.link.set(Link::Open);
        self.until_mode(HOT_VOLUME, Mode::Continuous).await?;
        let run = transitions.since(mark, "run.committed").into_iter().find(of_hot).context("seen above")?;
        let sent = number(&run, "sent_bytes");
        self.check(HOT_VOLUME, &volume, expected).await?;
        let text = format!(
            "{HOT_WRITES} writes to {HOT_BLOCKS} blocks over a link of {}/s: one run of {} took the place of what was \
             retained; both sides identical",
            size(SLOW_BYTES_PER_S.into()),
            size(sent)
        );
        let fields = json!({"written_bytes": HOT_WRITES * 4096, "sent_bytes": sent, "identical": true});
        self.say_of(HOT_VOLUME, "redundancy", &text, fields).await
    }

    /// More is written than the link carries: the group leaves continuous mode before the staging area is full.
    pub(super) async fn slow_link(&self, transitions: &Transitions) -> Result<()> {
        let volume = copy_in::create(&self.primary_client, BULK_VOLUME, BULK_BYTES, 4096, Default::default()).await?;
        let mark = transitions.mark();
        self.link.set(Link::Slow(SLOW_BYTES_PER_S));
        let mut expected = vec![0; usize::try_from(BULK_BYTES)?];
        let stream = volume.write_stream();
        let mut rng = Pcg64Mcg::seed_from_u64(4);
        let (start, mut at) = (Instant::now(), 0);
        let switched = loop {
            if at >= BULK_BYTES {
                bail!(
                    "{} were written, {} over the slow link, and the group stayed in continuous mode",
                    size(at),
                    size(at)
                );
            }
            let data = random(&mut rng, 256 << 10);
            expected[usize::try_from(at)?..][..data.len()].copy_from_slice(&data);
            let length = data.len() as u64;
            stream.write(at, data).await?.await?;
            at += length;
            let status = self.primary_client.replication().status().await?;
            if let Some(volume) = of(&status, volume.volume().id).filter(|v| v.mode() == Mode::Delta) {
                break (volume.cause.clone(), status.staging.unwrap_or_default().fill_ratio);
            }
            let due = Duration::from_secs_f64(at as f64 / BULK_BYTES_PER_S as f64);
            tokio::time::sleep(due.saturating_sub(start.elapsed())).await;
        };
        stream.finish().await?;
        let (cause, fill) = switched;
        let text = format!(
            "{}/s written over a link of {}/s: delta mode ({cause}) with the staging area {:.0} % full",
            size(BULK_BYTES_PER_S),
            size(SLOW_BYTES_PER_S.into()),
            fill * 100.0
        );
        let fields = json!({"written_bytes": at, "fill_ratio": fill});
        self.say_of(BULK_VOLUME, "imbalance", &text, fields).await?;
        if cause != "imbalance" {
            bail!("the slow link was left for {cause}, not for imbalance");
        }
        self.link.set(Link::Open);
        self.until_mode(BULK_VOLUME, Mode::Continuous).await?;
        self.check(BULK_VOLUME, &volume, expected).await?;
        let rounds = transitions.since(mark, "run.committed").len();
        let text = format!("link fast again: continuous after {rounds} rounds; both sides identical");
        self.say_of(BULK_VOLUME, "balance", &text, json!({"rounds": rounds, "identical": true})).await
    }

    async fn status_of(&self, volume: &str) -> Result<VolumeStatus> {
        let status = self.primary_client.replication().status().await?;
        status.volumes.into_iter().find(|v| v.name == volume).with_context(|| format!("volume {volume} is not there"))
    }

    async fn mode_is(&self, volume: &str, mode: Mode) -> Result<bool> {
        Ok(self.status_of(volume).await?.mode() == mode)
    }

    async fn until_mode(&self, volume: &str, mode: Mode) -> Result<()> {
        self.until(&format!("volume {volume} is in {mode:?} mode"), || self.mode_is(volume, mode)).await
    }

    async fn say_of(&self, volume: &str, step: &str, text: &str, fields: serde_json::Value) -> Result<()> {
        let status = self.status_of(volume).await.ok();
        self.report.step(step, status.as_ref(), text, fields)
    }

    /// Both sides against what was written.
    async fn check(&self, name: &str, volume: &VolumeHandle, expected: Vec<u8>) -> Result<()> {
        let path: PathBuf = self.file(&format!("{name}-expected"));
        tokio::fs::write(&path, expected).await.context("cannot write the expected image")?;
        volume.flush().await?;
        self.until_acked(volume.volume().id).await?;
        self.compare(name, volume.volume().id, &path).await
    }
}

fn random(rng: &mut Pcg64Mcg, bytes: usize) -> Bytes {
    let mut data = vec![0; bytes];
    rng.fill_bytes(&mut data);
    data.into()
}

fn number(event: &Event, field: &str) -> u64 {
    event.fields.get(field).and_then(|text| text.parse().ok()).unwrap_or_default()
}
