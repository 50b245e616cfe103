//! Deterministic simulation of a pair: both stores on simulated disks, the sender and the receiver, and a network that
//! delays, loses, delivers late frames of old sessions, and cuts. One seed decides everything.
//!
//! Each stage of a store is three steps (take, run, finish); the simulation interleaves them freely and crashes a node
//! before, inside or after any of them. After each acknowledgement, recovery and quiet phase an oracle checks the
//! promises of `ARCHITECTURE.md` against the history of all writes ([`model`]):
//!
//! - P1: an acknowledged write is there after any recovery (I1, I2), and on both sides if it was acknowledged as both.
//! - P4: the image of each group on the backup is one the primary once had, at the position the backup names (I3).
//! - P5: when faults end, both images are equal to the history (I5).
//! - P6: the image is made of a prefix of each lane, and no lane has overtaken what it must not.
//! - P10: a read sees every acknowledged write, and nothing that is not in the history (I10).
//! - P11: a repeated client sequence has no second effect (I12).
//! - After a failed sync a node refuses work (I14). Damage in the middle of a journal is refused (I15).
//! - The image of the last checkpoint stays readable until the next one: nothing that it refers to is reused.

mod clients;
pub mod delta;
pub mod integrity;
mod link;
mod model;
mod node;
mod oracle;
mod roles;
mod snapshots;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;
use understudy_backup::receiver::{Hello, PROTOCOL, Receiver};
use understudy_common::{
    lives::Lives,
    store::{ImageReader, Role, Store},
    types::{Lsn, VolumeId},
};
use understudy_primary::sender::{Sender, Welcome};

use delta::Delta;
pub use delta::PATHS as DELTA_PATHS;
use link::Wire;
use model::Model;
use node::{Node, Reopening};
pub use roles::{PATHS as ROLE_PATHS, run as run_roles};

/// Block size of the simulated volumes.
const BLOCK: usize = 512;
const SEGMENT: u32 = 64 * 1024;
const BLOCKS_PER_SEGMENT: u64 = SEGMENT as u64 / BLOCK as u64;

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

type Outcome = Result<(), Violation>;

fn broken(what: impl Into<String>) -> Violation {
    Violation(what.into())
}

/// What a primary says of itself when it attaches.
fn hello(store: &Store, lives: Lives) -> Hello {
    let identity = store.identity();
    Hello {
        pair: identity.pair,
        instance: identity.instance,
        generation: identity.generation,
        generation_id: identity.generation_id,
        protocol: PROTOCOL,
        segment_bytes: SEGMENT,
        durable: store.marks().borrow().durable,
        groups: Some(store.shipped_groups()),
        history: store.history(),
        lives,
    }
}

/// What a run was made of; decided by the seed ("swarm": each run has some faults and not others).
#[derive(Debug, Clone)]
struct Faults {
    primary_crashes: bool,
    backup_crashes: bool,
    cuts: bool,
    lost_frames: bool,
    late_frames: bool,
    power_loss: bool,
    failed_syncs: bool,
    large_writes: bool,
    catalogue: bool,
    readers: bool,
    lanes: bool,
    snapshots: bool,
    devices: bool,
}

/// How often something happened in a run, or in many.
pub type Counts = BTreeMap<&'static str, u64>;

/// Paths that a large number of seeds must have reached.
pub const PATHS: &[&str] = &[
    "acked local",
    "acked both",
    "acked placed",
    "written by reference",
    "crashes",
    "crashes in recovery",
    "torn tails dropped",
    "checkpoints",
    "checkpoints after a recovery's crash",
    "sessions",
    "spilled records",
    "refused groups",
    "records that were overtaken",
    "full lanes",
    "busy answers",
    "lost frames noticed",
    "late frames",
    "duplicates answered",
    "duplicates answered after a crash",
    "failed syncs",
    "growths",
    "volumes created",
    "volumes grown",
    "volumes shrunk",
    "shrinks below data refused",
    "volumes deleted",
    "images read on the backup",
    "reads held open",
    "damaged journals refused",
    "backups given space",
    "snapshots taken on both sides",
    "snapshots deleted",
    "snapshots compared",
    "devices added",
    "devices to be drained",
    "drains cancelled",
    "drains refused",
    "segments moved off a device",
    "devices removed",
];

/// How a run ended, for the test's summary and for comparing two runs of one seed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Summary {
    /// See [`PATHS`].
    pub counts: Counts,
    /// Hash of everything that happened, in order.
    pub trace: u64,
}

impl Summary {
    fn count(&mut self, what: &'static str, n: u64) {
        debug_assert!(PATHS.contains(&what) || DELTA_PATHS.contains(&what), "{what}");
        *self.counts.entry(what).or_default() += n;
    }
}

struct World {
    rng: Pcg64Mcg,
    faults: Faults,
    primary: Node,
    backup: Node,
    sender: Option<Sender>,
    receiver: Option<Receiver>,
    wires: Vec<Wire>,
    /// An attach the backup has accepted and not answered: it drains first.
    attaching: Option<(Welcome, Lsn)>,
    link: bool,
    /// Of a run with delta mode.
    delta: Option<Delta>,
    model: Model,
    /// An image of a volume on the backup, and when it is to be compared.
    image: Option<(ImageReader, VolumeId, u32)>,
    now: u32,
    time: i64,
    summary: Summary,
    /// Print what happens: `UNDERSTUDY_TRACE`.
    trace: bool,
}

/// Runs one seed in continuous mode.
///
/// # Errors
/// The first promise that was broken.
pub fn run(seed: u64, steps: u32) -> Result<Summary, Violation> {
    run_with(seed, steps, false)
}

/// Runs one seed with delta mode.
///
/// # Errors
/// The first promise that was broken.
pub fn run_delta(seed: u64, steps: u32) -> Result<Summary, Violation> {
    run_with(seed, steps, true)
}

fn run_with(seed: u64, steps: u32, with_delta: bool) -> Result<Summary, Violation> {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let faults = Faults {
        primary_crashes: rng.random_bool(0.7),
        backup_crashes: rng.random_bool(0.6),
        cuts: rng.random_bool(0.6),
        lost_frames: rng.random_bool(0.3),
        late_frames: rng.random_bool(0.5),
        power_loss: rng.random_bool(0.8),
        failed_syncs: rng.random_bool(0.3),
        large_writes: rng.random_bool(0.5),
        catalogue: rng.random_bool(0.5),
        readers: rng.random_bool(0.5),
        lanes: rng.random_bool(0.5),
        snapshots: rng.random_bool(0.5),
        devices: rng.random_bool(0.3),
    };
    let primary = Node::new(Role::Primary, &mut rng, &faults);
    let backup = Node::new(Role::Backup, &mut rng, &faults);
    let delta = with_delta.then(|| Delta::new(&mut rng));
    let mut world = World {
        rng,
        faults,
        primary,
        backup,
        sender: None,
        receiver: None,
        wires: Vec::new(),
        attaching: None,
        link: true,
        delta,
        model: Model::default(),
        image: None,
        now: 0,
        time: 1,
        summary: Summary::default(),
        trace: std::env::var_os("UNDERSTUDY_TRACE").is_some(),
    };
    world.start_primary()?;
    world.start_backup()?;
    for _ in 0..3 {
        world.create_volume()?;
    }
    for now in 0..steps {
        world.now = now;
        world.step()?;
    }
    world.settle()?;
    Ok(world.summary)
}

/// Prints what happens, if the environment asks for it.
macro_rules! trace {
    ($world:expr, $($arg:tt)*) => {
        if $world.trace { println!("{:>4}: {}", $world.now, format_args!($($arg)*)); }
    };
}
pub(crate) use trace;

impl World {
    fn note(&mut self, what: u64) {
        self.summary.trace = (self.summary.trace ^ what).wrapping_mul(0x100_0000_01b3).rotate_left(5);
    }

    fn step(&mut self) -> Outcome {
        self.time += i64::from(self.rng.random_range(0..20u8));
        if self.delta.is_some() && self.rng.random_bool(0.45) {
            self.delta_step()?;
            return self.acknowledge();
        }
        if self.faults.snapshots && self.rng.random_bool(0.02) {
            return match self.rng.random_range(0..8) {
                0 => self.check_snapshots(),
                _ => self.change_snapshots(),
            };
        }
        if self.faults.devices && self.rng.random_bool(0.02) {
            let node = if self.rng.random() { &mut self.primary } else { &mut self.backup };
            return node.change_devices(&mut self.rng, &mut self.summary);
        }
        let choice = self.rng.random_range(0..1000u32);
        self.note(u64::from(choice));
        match choice {
            0..240 => self.client_write()?,
            240..270 => self.client_read()?,
            270..275 => self.client_retry()?,
            275..290 if self.faults.catalogue => self.change_catalogue()?,
            290..500 => self.turn_primary()?,
            500..680 => self.turn_backup()?,
            680..920 => self.turn_link()?,
            920..940 if self.faults.cuts => self.cut(),
            940..950 if self.faults.primary_crashes => self.crash_primary(None)?,
            950..960 if self.faults.backup_crashes => self.crash_backup(None)?,
            960..980 => self.link = true,
            980..984 if self.faults.failed_syncs => {
                let nth = self.rng.random_range(1..6);
                if self.rng.random() { self.primary.plan_failed_sync(nth) } else { self.backup.plan_failed_sync(nth) }
            }
            984..987 if self.faults.readers => self.open_image()?,
            987 => self.churn()?,
            // Rarely: a recovery of a copy of the disk costs more than a hundred other steps.
            988 => self.primary.check_base_image(&self.model)?,
            989 => self.backup.check_base_image(&self.model)?,
            990..1000 if self.faults.readers => {
                let until = self.now + self.rng.random_range(5..300);
                let node = if self.rng.random_bool(0.6) { &mut self.primary } else { &mut self.backup };
                node.hold_read(&mut self.rng, &self.model, until)?;
            }
            _ => {}
        }
        for node in [&mut self.primary, &mut self.backup] {
            if node.end_read(self.now, &self.model)? {
                self.summary.count("reads held open", 1);
            }
        }
        if self.image.as_ref().is_some_and(|(_, _, until)| self.now >= *until) {
            self.compare_image()?;
        }
        self.acknowledge()
    }

    // --- stages

    fn turn_primary(&mut self) -> Outcome {
        self.primary.turn(&mut self.rng, &mut self.summary);
        if self.primary.check_failure()? {
            self.summary.count("failed syncs", 1);
            self.crash_primary(Some(true))?;
        }
        Ok(())
    }

    fn turn_backup(&mut self) -> Outcome {
        self.backup.turn(&mut self.rng, &mut self.summary);
        if self.backup.check_failure()? {
            self.summary.count("failed syncs", 1);
            return self.crash_backup(Some(true));
        }
        if self.rng.random_bool(0.02) {
            self.check_backup_image()?;
        }
        Ok(())
    }

    // --- starts and crashes

    /// True if its journal had a torn tail.
    fn start_primary(&mut self) -> Result<bool, Violation> {
        let recovery = self.primary.open(&mut self.rng)?;
        let torn = recovery.dropped_bytes > 0;
        self.summary.count("torn tails dropped", u64::from(torn));
        self.sender = Some(Sender::new(Arc::clone(self.primary.store()), 16 * 1024));
        // Opening may have added records of its own behind what it found.
        let next = self.primary.store().marks().borrow().durable.next();
        self.note(next.0);
        trace!(self, "primary starts at {next}");
        self.model.on_primary_started(next)?;
        self.check_primary_image()?;
        self.delta_primary_started()?;
        Ok(torn)
    }

    fn start_backup(&mut self) -> Outcome {
        let recovery = self.backup.open(&mut self.rng)?;
        self.summary.count("torn tails dropped", u64::from(recovery.dropped_bytes > 0));
        self.backup_started()
    }

    fn backup_started(&mut self) -> Outcome {
        self.receiver = Some(Receiver::new(Arc::clone(self.backup.store())));
        self.note(self.backup.store().next_lsn().0);
        self.check_backup_image()?;
        self.delta_backup_started()
    }

    /// The backup's process is gone; what it had under way is not undone.
    fn stop_backup(&mut self, power: bool) {
        trace!(self, "backup stops, power {power}");
        self.cut();
        self.receiver = None;
        self.image = None;
        self.backup.crash_inside(&mut self.rng, power);
    }

    /// The power of the primary fails before anything that is under way gets further.
    fn cut_power_of_primary(&mut self) -> Outcome {
        self.summary.count("crashes", 1);
        trace!(self, "power cut of the primary");
        self.cut();
        self.sender = None;
        self.primary.crash(&mut self.rng, true);
        self.start_primary()?;
        self.link = true;
        Ok(())
    }

    /// `power`: whether what was not synced is lost; by the seed if `None`.
    fn crash_primary(&mut self, power: Option<bool>) -> Outcome {
        let power = power.unwrap_or(self.faults.power_loss);
        self.summary.count("crashes", 1);
        trace!(self, "primary crashes, power {power}");
        self.cut();
        self.sender = None;
        self.primary.crash_inside(&mut self.rng, power);
        self.primary.crash_in_recovery(&mut self.rng, power, &mut self.summary);
        let torn = self.start_primary()?;
        self.link = true;
        if torn && self.rng.random_bool(0.6) {
            // The next batch lies where the torn one began, and the power fails again: what is behind it stays dropped.
            for _ in 0..self.rng.random_range(1..3) {
                self.client_write()?;
            }
            self.primary.drain(&mut self.rng);
            self.acknowledge()?;
            return self.crash_primary(Some(power));
        }
        if self.rng.random_bool(0.3) { self.client_retry_any() } else { Ok(()) }
    }

    fn crash_backup(&mut self, power: Option<bool>) -> Outcome {
        let power = power.unwrap_or(self.faults.power_loss);
        self.summary.count("crashes", 1);
        self.stop_backup(power);
        self.backup.crash_in_recovery(&mut self.rng, power, &mut self.summary);
        self.start_backup()?;
        self.link = true;
        Ok(())
    }

    // --- the end

    /// Faults end; the pair must come to rest with equal images.
    fn settle(&mut self) -> Outcome {
        self.faults.lost_frames = false;
        // A sync that has failed has consequences, one that was to fail has not.
        if !self.primary.clear_faults() {
            self.crash_primary(Some(true))?;
        }
        if !self.backup.clear_faults() {
            self.crash_backup(Some(true))?;
        }
        self.image = None;
        for node in [&mut self.primary, &mut self.backup] {
            while node.end_read(u32::MAX, &self.model)? {}
        }
        self.faults.late_frames = false;
        if let Some(delta) = &mut self.delta {
            delta.heal();
        }
        self.cut();
        self.link = true;
        for round in 0..60_000 {
            if self.is_quiet() {
                break;
            }
            self.time += 5;
            if round % 1_500 == 1_499 {
                self.give_space()?;
            }
            self.turn_primary()?;
            self.turn_backup()?;
            self.turn_link()?;
            self.settle_delta()?;
        }
        self.acknowledge()?;
        if !self.is_quiet() {
            let (retained, space) = (self.primary.store().retained(), self.backup.store().space());
            let (sender, receiver) = (self.sender.as_ref(), self.receiver.as_ref());
            return Err(broken(format!(
                "the pair does not come to rest: {retained:?}, held {:?}, in flight {:?}, refused {:?}, {space:?}, marks {:?} and {:?}, {}",
                sender.map(Sender::held),
                sender.map(Sender::in_flight),
                receiver.map(Receiver::refused),
                *self.primary.store().marks().borrow(),
                *self.backup.store().marks().borrow(),
                self.delta_note(),
            )));
        }
        self.check_at_rest()?;
        self.check_delta_at_rest()?;
        self.check_snapshots_at_rest()?;
        for node in [&self.primary, &self.backup] {
            self.summary.count("devices removed", node.removed_devices());
        }
        if self.rng.random_bool(0.3) {
            self.check_damaged_journal()?;
        }
        let trace = self.model.fold(self.summary.trace);
        self.summary.trace = trace;
        Ok(())
    }

    /// The backup's pool is full for good: somebody gives it space, and the groups it refused must catch up.
    fn give_space(&mut self) -> Outcome {
        if self.faults.devices {
            return self.backup.add_space();
        }
        if self.backup.config.pool.devices[0].size_bytes.is_some() {
            return Ok(());
        }
        self.summary.count("backups given space", 1);
        self.cut();
        self.receiver = None;
        self.backup.reopen_with(&mut self.rng, Reopening::MoreSpace);
        self.start_backup()?;
        self.link = true;
        Ok(())
    }

    fn is_quiet(&self) -> bool {
        let retained = self.primary.store().retained().oldest().is_some();
        self.primary.is_settled() && self.backup.is_settled() && !retained && self.is_delta_quiet()
    }
}

/// Runs `seeds` seeds from `first` on, each by [`run`] or [`run_delta`], on two threads; the first violation names its seed.
///
/// # Errors
/// The lowest seed that broke a promise, and which.
///
/// # Panics
/// If a thread does.
pub fn run_many(
    run: fn(u64, u32) -> Result<Summary, Violation>,
    first: u64,
    seeds: u64,
    steps: u32,
) -> Result<Counts, (u64, Violation)> {
    const THREADS: u64 = 2;
    let lowest = AtomicU64::new(u64::MAX);
    let part = |thread: u64| {
        let mut totals = Counts::new();
        for seed in (first + thread..first + seeds).step_by(usize::try_from(THREADS).expect("two")) {
            if seed > lowest.load(Ordering::Relaxed) {
                break;
            }
            let summary = run(seed, steps).map_err(|violation| {
                lowest.fetch_min(seed, Ordering::Relaxed);
                (seed, violation)
            })?;
            for (name, value) in summary.counts {
                *totals.entry(name).or_default() += value;
            }
        }
        Ok(totals)
    };
    let part = &part;
    let parts: Vec<Result<Counts, (u64, Violation)>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|n| scope.spawn(move || part(n))).collect();
        threads.into_iter().map(|t| t.join().expect("a simulation does not panic")).collect()
    });
    let mut totals = Counts::new();
    let mut failed = None;
    for part in parts {
        match part {
            Ok(counts) => counts.into_iter().for_each(|(name, value)| *totals.entry(name).or_default() += value),
            Err((seed, why)) if failed.as_ref().is_none_or(|(lowest, _)| seed < *lowest) => failed = Some((seed, why)),
            Err(_) => {}
        }
    }
    failed.map_or(Ok(totals), Err)
}
