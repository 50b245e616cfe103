//! What drives a store: journal writer, applier, checkpointer, growth. They only call take, run and finish.
//!
//! [`Threads`] runs them as threads, each waiting for its work. [`run_tasks`] runs them on the caller's async runtime
//! without a thread, so that a simulation decides how they interleave and where they are lost.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError, SyncSender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tokio::time::sleep;

use super::{CheckpointJob, Front, Store};
use crate::journal::{FilePreparation, Journal};

/// How often an idle thread looks whether it is to end.
const IDLE: Duration = Duration::from_millis(100);
/// How long durable records may wait for others to be applied with, and the bytes from which on they do not.
const APPLY_LAG: Duration = Duration::from_millis(2);
const APPLY_SOON_BYTES: usize = 1 << 20;
/// A pause that was asked for.
const PAUSE: Duration = Duration::from_millis(5);
/// How often an idle stage of [`run_tasks`] looks for work.
const POLL: Duration = Duration::from_millis(1);

/// Counters of the stages, for metrics.
#[derive(Default)]
pub struct Stats {
    /// Group commits.
    pub batches: AtomicU64,
    /// Time in them, microseconds.
    pub batch_micros: AtomicU64,
    /// Records applied.
    pub applied: AtomicU64,
    /// Records read back from the journal for a sender that has fallen out of the memory tail.
    pub spilled: AtomicU64,
    /// Checkpoints.
    pub checkpoints: AtomicU64,
    /// Time in them, microseconds.
    pub checkpoint_micros: AtomicU64,
    /// Called with the seconds of each group commit.
    pub on_batch: std::sync::OnceLock<Box<dyn Fn(f64) + Send + Sync>>,
    /// Called with the seconds of each checkpoint.
    pub on_checkpoint: std::sync::OnceLock<Box<dyn Fn(f64) + Send + Sync>>,
}

impl Stats {
    fn on_batch_done(&self, spent: Duration) {
        self.batches.fetch_add(1, Ordering::Relaxed);
        self.batch_micros.fetch_add(micros(spent), Ordering::Relaxed);
        if let Some(observe) = self.on_batch.get() {
            observe(spent.as_secs_f64());
        }
    }

    fn on_checkpoint_done(&self, spent: Duration) {
        self.checkpoints.fetch_add(1, Ordering::Relaxed);
        self.checkpoint_micros.fetch_add(micros(spent), Ordering::Relaxed);
        if let Some(observe) = self.on_checkpoint.get() {
            observe(spent.as_secs_f64());
        }
    }
}

/// What admission asks of the background.
#[derive(Default)]
pub(super) struct Wants {
    /// The applier has nothing to do and waits for the first record.
    applier_idle: AtomicBool,
    /// Somebody waits for a moment between two jobs of the applier.
    pause: AtomicBool,
    checkpoint: AtomicBool,
    growth: Mutex<Ahead>,
    growth_work: Condvar,
}

/// Work that is done ahead of need.
#[derive(Default)]
struct Ahead {
    /// The pool is to grow.
    grow: bool,
    /// A file of the journal is to be filled with zeros.
    file: Option<FilePreparation>,
    /// One is being filled.
    filling: bool,
}

impl Wants {
    /// Has the journal's next file made ready, so that no batch waits for it.
    fn prepare(&self, journal: &mut Journal) {
        let mut ahead = self.growth.lock();
        if !ahead.filling && ahead.file.is_none() {
            ahead.file = journal.prepare_next_file();
            if ahead.file.is_some() {
                self.growth_work.notify_one();
            }
        }
    }

    /// For the applier, which looks at it behind each job.
    pub(super) fn ask_checkpoint(&self) {
        self.checkpoint.store(true, Ordering::Release);
    }

    fn take_checkpoint(&self) -> bool {
        self.checkpoint.swap(false, Ordering::AcqRel)
    }

    fn take_growth(&self) -> bool {
        std::mem::take(&mut self.growth.lock().grow)
    }
}

impl Front {
    /// True if what waits for its place is not to wait for more.
    fn apply_soon(&self) -> bool {
        self.queue_bytes >= APPLY_SOON_BYTES || self.queue_places > 0
    }
}

impl Store {
    /// Something became durable: wakes the applier, unless it waits for more to come.
    pub(super) fn wake_applier(&self, front: &Front) {
        if front.apply_soon() || self.wants.applier_idle.load(Ordering::Acquire) {
            self.apply_work.notify_one();
        }
    }

    /// Asks the applier for a pause between two jobs: under load there is hardly any, and [`Store::check_suspect`] needs
    /// one.
    pub fn request_pause(&self) {
        self.wants.pause.store(true, Ordering::Release);
    }

    /// Asks for a checkpoint, which makes freed segments and journal files reusable.
    pub fn request_checkpoint(&self) {
        self.wants.checkpoint.store(true, Ordering::Release);
        // Under the lock: not between the applier's look and its wait.
        let _front = self.front.lock();
        self.apply_work.notify_one();
    }

    /// True, once, after [`Store::request_checkpoint`].
    pub fn checkpoint_requested(&self) -> bool {
        self.wants.take_checkpoint()
    }

    /// Asks for the pool to grow, if it may and has little left. Whoever waits for room of another kind asks as well.
    pub fn request_growth(&self) {
        let free = self.space.free().saturating_sub(self.space.reserved());
        if free < super::admission::GROW_BELOW && self.space.can_grow() > 0 {
            self.wants.growth.lock().grow = true;
            self.wants.growth_work.notify_one();
        }
    }

    /// Grows the pool by one step. True if it grew.
    pub fn grow(&self) -> bool {
        let Some(growth) = self.pool.lock().grow() else { return false };
        let performed = growth.perform();
        if let Err(error) = &performed {
            if self.io.is_poisoned() {
                self.fail(format!("growing the pool: {error}"));
            } else {
                tracing::warn!(%error, "the pool cannot grow");
            }
        }
        let gained = self.pool.lock().finish_grow(&growth, &performed);
        // After a failure nobody is woken: they would ask again at once, and so on for as long as they wait.
        if gained > 0 {
            self.marks.send_modify(|_| {});
        }
        gained > 0
    }
}

/// The running threads. Dropping it ends them; what was accepted and is not durable then is not acknowledged.
pub struct Threads {
    store: Arc<Store>,
    stop: Arc<AtomicBool>,
    handles: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts the threads of a store.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(store: &Arc<Store>) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (checkpoints, jobs) = mpsc::sync_channel::<CheckpointJob>(1);
        let mut threads = Self { store: Arc::clone(store), stop, handles: Vec::new() };
        threads.spawn("journal", journal)?;
        threads.spawn("applier", move |store, stop| applier(store, stop, &checkpoints))?;
        threads.spawn("checkpoint", move |store, stop| checkpointer(store, stop, &jobs))?;
        threads.spawn("growth", grower)?;
        Ok(threads)
    }

    fn spawn(
        &mut self,
        name: &str,
        body: impl FnOnce(&Arc<Store>, &AtomicBool) + Send + 'static,
    ) -> std::io::Result<()> {
        let (store, stop) = (Arc::clone(&self.store), Arc::clone(&self.stop));
        self.handles.push(thread::Builder::new().name(name.into()).spawn(move || body(&store, &stop))?);
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.store.work.notify_all();
        self.store.apply_work.notify_all();
        self.store.wants.growth_work.notify_all();
        for handle in self.handles.drain(..) {
            // A thread that panicked has been reported by the panic hook; the process aborts in release builds.
            let _ = handle.join();
        }
    }
}

fn journal(store: &Arc<Store>, stop: &AtomicBool) {
    loop {
        let job = {
            let mut front = store.front.lock();
            loop {
                if stop.load(Ordering::Acquire) || front.failed.is_some() {
                    return;
                }
                if let Some(job) = store.take_batch_locked(&mut front) {
                    store.wants.prepare(&mut front.journal);
                    break job;
                }
                store.work.wait_for(&mut front, IDLE);
            }
        };
        let start = Instant::now();
        let result = job.run();
        let spent = start.elapsed();
        store.finish_batch(job, result);
        store.stats.on_batch_done(spent);
    }
}

/// Records are applied some at a time: each job costs a change of threads and of marks, and joins what touches.
fn applier(store: &Arc<Store>, stop: &AtomicBool, checkpoints: &SyncSender<CheckpointJob>) {
    let mut tend_at = Instant::now();
    loop {
        if stop.load(Ordering::Acquire) || store.marks.borrow().failed {
            return;
        }
        if store.wants.pause.swap(false, Ordering::AcqRel) {
            thread::sleep(PAUSE);
        }
        if let Some(mut job) = store.take_apply() {
            let records = job.records() as u64;
            let result = job.run();
            store.finish_apply(job, result);
            store.stats.applied.fetch_add(records, Ordering::Relaxed);
        } else if !store.sweep() {
            let changing = store.has_changing_devices();
            let wait = if changing { tend_at.saturating_duration_since(Instant::now()).min(IDLE) } else { IDLE };
            wait_for_records(store, wait);
        } else {
            continue;
        }
        if Instant::now() >= tend_at {
            tend_at = Instant::now() + store.tend_devices();
        }
        let mut front = store.front.lock();
        if !front.apply_soon() && front.failed.is_none() && !front.queue.is_empty() {
            store.apply_work.wait_for(&mut front, APPLY_LAG);
        }
        drop(front);
        if let Some(job) = due_checkpoint(store) {
            // There is room: one is taken at a time. The receiver is gone only while the store ends.
            let _ = checkpoints.send(job);
        }
    }
}

fn wait_for_records(store: &Store, wait: Duration) {
    let mut front = store.front.lock();
    // Set before looking: who makes a record durable afterwards sees it.
    store.wants.applier_idle.store(true, Ordering::SeqCst);
    let durable = store.marks.borrow().durable;
    if front.queue.front().is_none_or(|q| q.entry.lsn > durable) && front.failed.is_none() {
        store.apply_work.wait_for(&mut front, wait);
    }
    store.wants.applier_idle.store(false, Ordering::Release);
}

fn due_checkpoint(store: &Arc<Store>) -> Option<CheckpointJob> {
    (store.checkpoint_due() || store.wants.take_checkpoint()).then(|| store.take_checkpoint()).flatten()
}

fn checkpointer(store: &Arc<Store>, stop: &AtomicBool, jobs: &mpsc::Receiver<CheckpointJob>) {
    loop {
        if stop.load(Ordering::Acquire) {
            return;
        }
        match jobs.recv_timeout(IDLE) {
            Ok(job) => {
                let start = Instant::now();
                let result = job.run();
                let spent = start.elapsed();
                store.finish_checkpoint(job, result);
                store.stats.on_checkpoint_done(spent);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn grower(store: &Arc<Store>, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        let (grow, file) = {
            let mut ahead = store.wants.growth.lock();
            if !ahead.grow && ahead.file.is_none() {
                store.wants.growth_work.wait_for(&mut ahead, IDLE);
            }
            let file = ahead.file.take();
            ahead.filling = file.is_some();
            (std::mem::take(&mut ahead.grow), file)
        };
        if grow {
            store.grow();
        }
        if let Some(file) = file {
            // On failure the batch that needs the file tries again, and says what is wrong.
            if let Err(error) = file.run() {
                tracing::warn!(%error, "the journal's next file cannot be made ready");
            }
            store.wants.growth.lock().filling = false;
        }
    }
}

/// Drives the stages of `store` until it fails or the future is dropped, which may lose what is between two steps.
/// `pause` is the time from taking a job to running it, and from running it to finishing it; a stage without work looks
/// again after [`POLL`].
pub async fn run_tasks(store: &Arc<Store>, pause: impl Fn() -> Duration) {
    let pause = || sleep(pause());
    let running = || !store.marks.borrow().failed;
    let (checkpoints, mut jobs) = tokio::sync::mpsc::channel(1);
    let journal = async {
        while running() {
            let Some(job) = store.take_batch() else {
                sleep(POLL).await;
                continue;
            };
            pause().await;
            let start = Instant::now();
            let result = job.run();
            store.stats.on_batch_done(start.elapsed());
            pause().await;
            store.finish_batch(job, result);
        }
    };
    let applier = async move {
        let mut tend_at = tokio::time::Instant::now();
        while running() {
            if store.wants.pause.swap(false, Ordering::AcqRel) {
                sleep(PAUSE).await;
            }
            if let Some(mut job) = store.take_apply() {
                let records = job.records() as u64;
                pause().await;
                let result = job.run();
                pause().await;
                store.finish_apply(job, result);
                store.stats.applied.fetch_add(records, Ordering::Relaxed);
            } else if !store.sweep() {
                sleep(POLL).await;
            }
            // Between two apply jobs, as the thread does.
            if tokio::time::Instant::now() >= tend_at {
                let mut wait = super::devices::LOOK;
                if let Some(mut job) = store.take_relocation() {
                    pause().await;
                    let result = job.run();
                    pause().await;
                    store.finish_relocation(job, result);
                    wait = POLL;
                }
                tend_at = tokio::time::Instant::now() + wait;
            }
            if let Some(job) = due_checkpoint(store) {
                // There is room: one is taken at a time.
                let _ = checkpoints.try_send(job);
            }
        }
        drop(checkpoints);
    };
    let checkpointer = async {
        while let Some(job) = jobs.recv().await {
            pause().await;
            let start = Instant::now();
            let result = job.run();
            store.stats.on_checkpoint_done(start.elapsed());
            pause().await;
            store.finish_checkpoint(job, result);
        }
    };
    let grower = async {
        while running() {
            if store.wants.take_growth() {
                store.grow();
            }
            sleep(POLL).await;
        }
    };
    tokio::join!(journal, applier, checkpointer, grower);
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
