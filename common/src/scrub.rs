//! Drives the scrub of a node: when, how fast, and what is told of what it finds.
//!
//! What is damaged and what is not, the store decides ([`crate::store::Checked`]); here are the clock, the pace and the
//! events. Each look also takes up what reads came upon, and asks of every block that is listed whether it was mended.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    config::ScrubConfig,
    events::EventLog,
    pool::{OwnedPlace, Owner, PoolError},
    store::{Checked, Mended, Store, Suspect},
    telemetry::Metrics,
    types::VolumeId,
};

/// Time between two looks at what is listed.
const LOOK: Duration = Duration::from_secs(1);
/// Pause before the applier's state is asked for again, shorter than the pause that it makes, and how often it is.
const BUSY: (Duration, u32) = (Duration::from_millis(2), 1000);
/// Damaged blocks of one scrub that get an event of their own.
const EVENTS_MAX: u64 = 16;

/// How a scrub is doing, or how the last one went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    /// One is under way.
    pub running: bool,
    /// The volume that it looks at; `None`: all.
    pub volume: Option<VolumeId>,
    /// Read so far.
    pub done_bytes: u64,
    /// To be read: what is allocated now, of a volume 0: not known.
    pub total_bytes: u64,
    /// Damaged blocks that it found.
    pub damaged_blocks: u64,
    /// When it began, Unix milliseconds; 0: none was since the start.
    pub started_unix_ms: i64,
    /// When the last scrub of everything was completed, Unix milliseconds; 0: never.
    pub completed_unix_ms: i64,
}

/// The scrub of a node. Cheap to clone.
#[derive(Clone)]
pub struct Scrub(Arc<Shared>);

struct Shared {
    store: Arc<Store>,
    config: ScrubConfig,
    events: EventLog,
    metrics: Metrics,
    now_unix_ms: fn() -> i64,
    inline: bool,
    status: Mutex<ScrubStatus>,
    /// What was asked for and is not begun.
    asked: Mutex<Option<Option<VolumeId>>>,
    wake: Notify,
}

impl Scrub {
    /// A scrub that [`Scrub::run`] drives. With `inline` disks are read on the calling thread: for simulated ones.
    #[must_use]
    pub fn new(
        store: Arc<Store>,
        config: ScrubConfig,
        events: EventLog,
        metrics: Metrics,
        now_unix_ms: fn() -> i64,
        inline: bool,
    ) -> Self {
        Self(Arc::new(Shared {
            store,
            config,
            events,
            metrics,
            now_unix_ms,
            inline,
            status: Mutex::default(),
            asked: Mutex::default(),
            wake: Notify::new(),
        }))
    }

    /// Asks for a scrub of a volume, or of everything. One that is under way goes on, and no other begins.
    pub fn ask(&self, volume: Option<VolumeId>) {
        if !self.0.status.lock().running {
            *self.0.asked.lock() = Some(volume);
            self.0.wake.notify_one();
        }
    }

    /// How it is doing. What was asked for counts as under way.
    #[must_use]
    pub fn status(&self) -> ScrubStatus {
        let status = self.0.status.lock();
        let mut out = status.clone();
        if let Some(volume) = *self.0.asked.lock() {
            (out.running, out.volume, out.done_bytes, out.damaged_blocks) = (true, volume, 0, 0);
        }
        out
    }

    /// Goes on until `stop`, or until the store fails.
    pub async fn run(self, stop: CancellationToken) {
        if let Err(error) = self.go(&stop).await {
            self.0.store.fail(format!("segment map: {error}"));
        }
    }

    async fn go(&self, stop: &CancellationToken) -> Result<(), PoolError> {
        let Shared { store, config, .. } = &*self.0;
        let (mut last, completed) = store.scrubbed((self.0.now_unix_ms)());
        if completed {
            self.show_completed(last);
        }
        loop {
            // Either the time, or somebody who asks.
            let woken = timeout(LOOK, self.0.wake.notified());
            if stop.run_until_cancelled(woken).await.is_none() || store.failure().is_some() {
                return Ok(());
            }
            for look in [Store::take_suspects, Store::maybe_mended] {
                for suspect in self.blocking(look).await? {
                    self.settle(suspect).await?;
                }
            }
            let age = (self.0.now_unix_ms)() - last;
            let due = !config.interval.is_zero() && u128::try_from(age).unwrap_or(0) >= config.interval.as_millis();
            // Taken with the status: whoever asks now is told that one is under way.
            let asked = {
                let mut status = self.0.status.lock();
                let asked = self.0.asked.lock().take().or(due.then_some(None));
                if let Some(volume) = asked {
                    self.begin(&mut status, volume);
                }
                asked
            };
            let Some(volume) = asked else { continue };
            let done = self.pass(volume, stop).await;
            self.0.status.lock().running = false;
            if done? && volume.is_none() {
                last = (self.0.now_unix_ms)();
                store.note_scrubbed(last, true);
                self.show_completed(last);
            }
        }
    }

    fn begin(&self, status: &mut ScrubStatus, volume: Option<VolumeId>) {
        let space = self.0.store.space();
        let used = space.total().saturating_sub(space.free() + space.quarantined());
        *status = ScrubStatus {
            running: true,
            volume,
            total_bytes: if volume.is_none() { used * u64::from(self.0.store.config().pool.segment_bytes) } else { 0 },
            started_unix_ms: (self.0.now_unix_ms)(),
            completed_unix_ms: status.completed_unix_ms,
            ..ScrubStatus::default()
        };
    }

    fn show_completed(&self, unix_ms: i64) {
        self.0.status.lock().completed_unix_ms = unix_ms;
        self.0.metrics.scrub_last_completed_timestamp_seconds.set(unix_ms / 1000);
    }

    /// Reads everything that is owned. False if it was stopped.
    async fn pass(&self, volume: Option<VolumeId>, stop: &CancellationToken) -> Result<bool, PoolError> {
        let Shared { store, config, events, .. } = &*self.0;
        let began = Instant::now();
        info!(?volume, "scrub.started");
        events.record((self.0.now_unix_ms)(), "scrub.started", "every stored block is read back", []);
        let mut at = OwnedPlace::default();
        while let Some(job) = self.blocking(move |store| store.take_scrub(at, volume)).await? {
            let bytes = job.bytes();
            let (job, suspects) = self
                .blocking(move |_| {
                    let suspects = job.run();
                    Ok((job, suspects))
                })
                .await?;
            at = store.finish_scrub(job);
            for suspect in suspects {
                self.settle(suspect).await?;
            }
            let done = {
                let mut status = self.0.status.lock();
                status.done_bytes += bytes;
                status.done_bytes
            };
            // As fast as the rate allows since the beginning, and never without letting others have their turn.
            let wait =
                config.bytes_per_s.map_or(Duration::ZERO, |rate| due(done, rate).saturating_sub(began.elapsed()));
            if stop.run_until_cancelled(sleep(wait)).await.is_none() || store.failure().is_some() {
                return Ok(false);
            }
        }
        let ScrubStatus { done_bytes, damaged_blocks, .. } = self.0.status.lock().clone();
        let seconds = began.elapsed().as_secs_f64();
        info!(?volume, done_bytes, damaged_blocks, seconds, "scrub.completed");
        let fields = [
            ("volume", volume.map_or_else(String::new, |id| id.to_string())),
            ("bytes", done_bytes.to_string()),
            ("damaged_blocks", damaged_blocks.to_string()),
            ("seconds", format!("{seconds:.3}")),
        ];
        let message = format!("{damaged_blocks} damaged blocks were found");
        events.record((self.0.now_unix_ms)(), "scrub.completed", message, fields);
        Ok(true)
    }

    /// Finds out what a suspect is, and tells it if that is news.
    async fn settle(&self, suspect: Suspect) -> Result<(), PoolError> {
        let known = |store: &Store| store.damaged().iter().any(|(listed, _)| *listed == suspect);
        let before = known(&self.0.store);
        for _ in 0..BUSY.1 {
            match self.blocking(move |store| store.check_suspect(suspect)).await? {
                Checked::Busy => {
                    self.0.store.request_pause();
                    sleep(BUSY.0).await;
                }
                Checked::Damaged(owner) => {
                    if !before {
                        self.tell_damaged(suspect, owner);
                    }
                    return Ok(());
                }
                Checked::Sound => {
                    if before {
                        self.tell_mended(suspect);
                    }
                    return Ok(());
                }
            }
        }
        // The applier was never idle when it was looked at; a scrub or a read will come upon it again.
        Ok(())
    }

    fn tell_damaged(&self, suspect: Suspect, owner: Owner) {
        self.0.metrics.checksum_errors.with_label_values(&["false"]).inc();
        let found = {
            let mut status = self.0.status.lock();
            status.damaged_blocks += u64::from(status.running);
            status.damaged_blocks
        };
        let Suspect { volume, block, .. } = suspect;
        warn!(%volume, block, ?owner, "block.damaged");
        if found <= EVENTS_MAX {
            let seen_by = if owner == Owner::Head { "head" } else { "snapshot" };
            let fields =
                [("volume", volume.to_string()), ("block", block.to_string()), ("seen_by", seen_by.to_owned())];
            let message = format!("block {block} of volume {volume} does not match its checksum");
            self.0.events.record((self.0.now_unix_ms)(), "block.damaged", message, fields);
        }
    }

    fn tell_mended(&self, Suspect { volume, block, .. }: Suspect) {
        self.0.metrics.checksum_errors.with_label_values(&["true"]).inc();
        info!(%volume, block, "block.mended");
        let fields = [("volume", volume.to_string()), ("block", block.to_string())];
        let message = format!("block {block} of volume {volume} was repaired, written anew or given back");
        self.0.events.record((self.0.now_unix_ms)(), "block.mended", message, fields);
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, PoolError> + Send + 'static,
    ) -> Result<T, PoolError> {
        let store = Arc::clone(&self.0.store);
        if self.0.inline {
            return work(&store);
        }
        // It panics only if the work does, which ends the process.
        tokio::task::spawn_blocking(move || work(&store)).await.expect("the work does not panic")
    }
}

/// Mends a version that only snapshots see with what the other side holds, as soon as the applier is still. False: it does
/// not fit, nobody owns it any more, or the applier never was. For a thread that may wait.
///
/// # Errors
/// The segment map cannot be read, or the device fails.
pub fn mend(store: &Store, suspect: Suspect, data: &[u8]) -> Result<bool, PoolError> {
    for _ in 0..BUSY.1 {
        match store.mend_version(suspect, data)? {
            Mended::Busy => {
                store.request_pause();
                std::thread::sleep(BUSY.0);
            }
            mended => return Ok(mended == Mended::Yes),
        }
    }
    Ok(false)
}

/// When so many bytes may have been read.
fn due(bytes: u64, per_second: u64) -> Duration {
    Duration::from_millis(u64::try_from(u128::from(bytes) * 1000 / u128::from(per_second)).unwrap_or(u64::MAX))
}
