//! One node: its disk, its store, what it has under way, and how it dies.

use std::{collections::VecDeque, io, ops::Range, sync::Arc};

use rand::{Rng, seq::IteratorRandom};
use rand_pcg::Pcg64Mcg;
use understudy_common::{
    catalog::{Catalog, DEFAULT_CACHE_BYTES},
    journal::JournalConfig,
    lane::Lanes,
    pool::{DeviceConfig, DeviceStanding, MemberError, Piece, Pool, PoolConfig, PoolIo, ReadTicket},
    storage::{
        Storage,
        sim::{Fault, OpKind, SimStorage},
    },
    store::{self, ApplyJob, BatchJob, CheckpointJob, Levels, Recovery, RelocationJob, Role, Store, StoreConfig},
    types::{Lsn, Uid, VolumeSpec},
};

use super::{
    BLOCK, Faults, Outcome, SEGMENT, Summary, Violation, broken,
    model::{Model, Stamp},
};

/// How a node comes back.
pub(super) enum Reopening {
    MoreSpace,
}

/// A read that has found out where the blocks are and not read them yet.
struct HeldRead {
    spec: VolumeSpec,
    pieces: Vec<Piece>,
    ticket: ReadTicket,
    io: PoolIo,
    until: u32,
}

/// A group commit: what was durable when it was taken, which its header says, and how it went.
struct Commit {
    job: BatchJob,
    durable: Lsn,
    result: Option<io::Result<()>>,
}

pub(super) struct Node {
    pub role: Role,
    pub disk: SimStorage,
    pub store: Option<Arc<Store>>,
    pub config: StoreConfig,
    /// Group commits under way, oldest first.
    batches: VecDeque<Commit>,
    apply: Option<ApplyJob>,
    /// Segments on their way off a device that is drained: in the place of an apply job.
    relocation: Option<RelocationJob>,
    /// Devices that were added, and some that were to be.
    devices: u32,
    checkpoint: Option<CheckpointJob>,
    reads: Vec<HeldRead>,
    sync_fault: bool,
    /// Recovery was interrupted, and no checkpoint was made since.
    recovery_crashed: bool,
    /// What the newest batch on disk calls durable; `None` until there was one.
    pub durable_before: Option<Lsn>,
}

/// Of a device that is added.
const DEVICE_SEGMENTS: Range<u64> = 4..40;

fn device_bytes(segments: u64) -> u64 {
    4096 + 1024 * 512 + segments * u64::from(SEGMENT)
}

/// Who writes where, and how fast it is sent, at random.
fn lanes(rng: &mut Pcg64Mcg) -> Lanes {
    let count = rng.random_range(2..=4);
    let classes: Vec<String> = (0..count)
        .map(|lane| {
            let share = rng.random_range(5..=100);
            if rng.random_bool(0.4) {
                return format!("{lane}=immediate@{share}");
            }
            format!("{lane}={}/{}ms@{share}", rng.random_range(1..8), rng.random_range(1..300))
        })
        .collect();
    let clients: Vec<String> = (0..4).map(|client| format!("c{client}={}", rng.random_range(0..count))).collect();
    let default = rng.random_range(0..count).to_string();
    Lanes::parse(&classes, &clients, Some(&default)).expect("all of them are there")
}

impl Node {
    pub fn new(role: Role, rng: &mut Pcg64Mcg, faults: &Faults) -> Self {
        let capacity = if rng.random() { 192 * 1024 } else { 512 * 1024 };
        // A tight pool is smaller than the volumes in it, and may be given more.
        let tight = rng.random_bool(0.4);
        let config = StoreConfig {
            journal: JournalConfig {
                capacity_bytes: capacity,
                file_bytes: 32 * 1024,
                reserve_bytes: 48 * 1024,
                max_batch_bytes: 16 * 1024,
            },
            pool: PoolConfig {
                segment_bytes: SEGMENT,
                devices: vec![DeviceConfig {
                    path: "device".into(),
                    size_bytes: (!tight).then_some(device_bytes(96)),
                    max_bytes: tight.then_some(device_bytes(rng.random_range(6..16))),
                }],
                map_cache_bytes: 1 << 20,
            },
            checkpoint_bytes: 64 * 1024,
            tail_bytes: rng.random_range(1..64) * 1024,
            reference_bytes: if faults.large_writes { SEGMENT as usize } else { usize::MAX },
            apply_bytes: 8 * 1024,
            drain_bytes_per_s: 0,
            levels: Levels::default(),
            pending_bytes: 1 << 20,
            retain: role == Role::Primary,
            lanes: if role == Role::Primary && faults.lanes { lanes(rng) } else { Lanes::default() },
        };
        Self {
            role,
            disk: SimStorage::new(rng.random()),
            store: None,
            config,
            batches: VecDeque::new(),
            apply: None,
            relocation: None,
            devices: 0,
            checkpoint: None,
            reads: Vec::new(),
            sync_fault: false,
            recovery_crashed: false,
            durable_before: None,
        }
    }

    pub fn store(&self) -> &Arc<Store> {
        self.store.as_ref().expect("the node is up")
    }

    pub fn is_settled(&self) -> bool {
        let store = self.store();
        let marks = *store.marks().borrow();
        marks.applied.next() == store.next_lsn()
    }

    /// One step of one stage.
    pub fn turn(&mut self, rng: &mut Pcg64Mcg, summary: &mut Summary) {
        let store = Arc::clone(self.store());
        match rng.random_range(0..24) {
            0..6 => {
                self.take_batch();
            }
            6..12 => {
                self.run_batch(rng);
                self.finish_batches();
            }
            12..16 => {
                if self.apply.is_none() {
                    self.apply = store.take_apply();
                }
                if self.apply.is_none() && self.relocation.is_none() {
                    self.relocation = store.take_relocation();
                }
            }
            16..20 => {
                if let Some(mut job) = self.apply.take() {
                    let result = job.run();
                    store.finish_apply(job, result);
                }
                if self.finish_relocation() {
                    summary.count("segments moved off a device", 1);
                }
            }
            20 | 21 => {
                store.sweep();
                if self.checkpoint.is_none()
                    && (store.checkpoint_due() || store.checkpoint_requested() || rng.random_bool(0.08))
                {
                    self.checkpoint = store.take_checkpoint();
                }
            }
            22 => {
                if let Some(job) = self.checkpoint.take() {
                    let result = job.run();
                    summary.count("checkpoints", u64::from(result.is_ok()));
                    if result.is_ok() && std::mem::take(&mut self.recovery_crashed) {
                        summary.count("checkpoints after a recovery's crash", 1);
                    }
                    store.finish_checkpoint(job, result);
                }
            }
            _ => {
                if store.space().can_grow() > 0 && store.space().free() < 2 {
                    summary.count("growths", u64::from(store.grow()));
                }
            }
        }
    }

    /// True if segments were moved.
    fn finish_relocation(&mut self) -> bool {
        let Some(mut job) = self.relocation.take() else { return false };
        let result = job.run();
        let moved = result.is_ok();
        self.store().finish_relocation(job, result);
        moved
    }

    /// Somebody adds a device, drains one, or thinks better of it.
    pub fn change_devices(&mut self, rng: &mut Pcg64Mcg, summary: &mut Summary) -> Outcome {
        // A device that is not part of the pool yet, or any more, may fail: the node goes on.
        if self.sync_fault {
            return Ok(());
        }
        let store = Arc::clone(self.store());
        let of = |wanted: &[DeviceStanding]| {
            let devices = store.devices().into_iter();
            devices.filter(|device| wanted.contains(&device.standing)).map(|device| device.path).collect::<Vec<_>>()
        };
        let serving = of(&[DeviceStanding::Serving]);
        let (what, changed) = match rng.random_range(0..6) {
            choice if serving.len() == 1 || choice < 2 && serving.len() < 4 => {
                ("devices added", self.add_device(rng.random_range(DEVICE_SEGMENTS)))
            }
            2..5 => match serving.into_iter().choose(rng) {
                Some(path) => ("devices to be drained", store.drain_device(&path)),
                None => return Ok(()),
            },
            _ => match of(&[DeviceStanding::Draining]).into_iter().choose(rng) {
                Some(path) => ("drains cancelled", store.cancel_drain(&path)),
                None => return Ok(()),
            },
        };
        match changed {
            Ok(_) => summary.count(what, 1),
            Err(MemberError::Last { .. } | MemberError::NoRoom { .. }) => summary.count("drains refused", 1),
            Err(MemberError::Busy) => {}
            Err(error) => return Err(broken(format!("the {}'s devices: {error}", self.role))),
        }
        Ok(())
    }

    fn add_device(&mut self, segments: u64) -> Result<u16, MemberError> {
        self.devices += 1;
        self.store().add_device(&format!("device{}", self.devices), Some(device_bytes(segments)))
    }

    /// Space for one whose pool is full for good.
    pub fn add_space(&mut self) -> Outcome {
        self.add_device(64).map(drop).map_err(|error| broken(format!("the {} gets no space: {error}", self.role)))
    }

    fn take_batch(&mut self) {
        let durable = self.store().marks().borrow().durable;
        if self.batches.len() < 2
            && let Some(job) = self.store().take_batch()
        {
            self.batches.push_back(Commit { job, durable, result: None });
        }
    }

    /// Any of those under way may reach the disk first.
    fn run_batch(&mut self, rng: &mut Pcg64Mcg) {
        if let Some(batch) = self.batches.iter_mut().filter(|b| b.result.is_none()).choose(rng) {
            batch.result = Some(batch.job.run());
        }
    }

    fn finish_batches(&mut self) {
        while let Some(Commit { job, durable, result: Some(result) }) =
            self.batches.pop_front_if(|batch| batch.result.is_some())
        {
            self.durable_before = Some(durable);
            self.store().finish_batch(job, result);
        }
    }

    /// Finishes everything that is under way, with a checkpoint at the end.
    pub fn drain(&mut self, rng: &mut Pcg64Mcg) {
        let store = Arc::clone(self.store());
        loop {
            self.take_batch();
            if self.batches.is_empty() || store.failure().is_some() {
                break;
            }
            self.run_batch(rng);
            self.finish_batches();
        }
        self.checkpoint_now();
    }

    /// Applies what is durable and makes a checkpoint, whatever else is under way.
    pub fn checkpoint_now(&mut self) {
        let store = Arc::clone(self.store());
        self.finish_relocation();
        while let Some(mut job) = self.apply.take().or_else(|| store.take_apply()) {
            let result = job.run();
            store.finish_apply(job, result);
        }
        if let Some(job) = self.checkpoint.take().or_else(|| store.take_checkpoint()) {
            let result = job.run();
            store.finish_checkpoint(job, result);
        }
    }

    pub fn removed_devices(&self) -> u64 {
        self.store().devices().iter().filter(|device| device.standing == DeviceStanding::Removed).count() as u64
    }

    /// Volumes of reads that are held open.
    pub fn held_volumes(&self) -> impl Iterator<Item = &VolumeSpec> {
        self.reads.iter().map(|read| &read.spec)
    }

    // --- faults

    pub fn plan_failed_sync(&mut self, nth: u64) {
        // A device that joins or leaves may fail, and the node goes on.
        if !self.sync_fault && !self.store().has_changing_devices() {
            self.sync_fault = true;
            self.disk.fail_nth(OpKind::Sync, nth, Fault::EIO);
        }
    }

    /// Forgets the sync that is to fail; false, and nothing forgotten, if it has.
    pub fn clear_faults(&mut self) -> bool {
        let hit = self.sync_fault && self.disk.faults_planned() == 0;
        if !hit {
            self.disk.clear_faults();
            self.sync_fault = false;
        }
        !hit
    }

    /// True if the node has failed, as it must after a failed sync and must not otherwise.
    pub fn check_failure(&mut self) -> Result<bool, Violation> {
        let told = !self.batches.iter().any(|batch| batch.result.is_some());
        let hit = self.sync_fault && self.disk.faults_planned() == 0;
        if hit && !told && self.store().failure().is_none() {
            return Ok(false);
        }
        match (self.store().failure(), hit) {
            (None, false) => Ok(false),
            (Some(_), true) => Ok(true),
            (Some(why), false) => Err(broken(format!("the {} failed without a fault: {why}", self.role))),
            (None, true) => Err(broken(format!("a sync of the {} failed, and it goes on", self.role))),
        }
    }

    /// Loses the process, and with `power` everything that was not synced. A failed sync always takes the machine
    /// along: what the system shows of the file from then on need not be on the disk, which no process can know.
    pub fn crash(&mut self, rng: &mut Pcg64Mcg, power: bool) {
        let sync_failed = self.sync_fault && self.disk.faults_planned() == 0;
        if power || sync_failed {
            self.disk.crash(rng);
        } else {
            self.disk.kill();
        }
        self.disk.clear_faults();
        self.sync_fault = false;
        self.durable_before = None;
        // Its handles are dead: nothing that ends here tidies up on the disk.
        self.reads.clear();
        self.batches.clear();
        (self.apply, self.relocation, self.checkpoint, self.store) = (None, None, None, None);
    }

    /// Loses a node before, inside or after whatever it has under way.
    pub fn crash_inside(&mut self, rng: &mut Pcg64Mcg, power: bool) {
        if rng.random_bool(0.7) {
            self.disk.crash_after(rng.random_range(0..12));
            let store = Arc::clone(self.store());
            // What is under way gets as far as the disk lets it.
            if rng.random_bool(0.1) {
                store.grow();
            }
            if self.devices > 0 && rng.random_bool(0.2) {
                let _ = self.add_device(rng.random_range(DEVICE_SEGMENTS));
            }
            if let Some(mut job) = self.relocation.take() {
                let _ = job.run();
            }
            if rng.random_bool(0.5)
                && let Some(job) = self.checkpoint.take().or_else(|| store.take_checkpoint())
            {
                let _ = job.run();
            }
            if let Some(mut job) = self.apply.take() {
                let _ = job.run();
            }
            self.take_batch();
            while self.batches.iter().any(|batch| batch.result.is_none()) {
                self.run_batch(rng);
            }
        }
        self.crash(rng, power);
    }

    /// Recovery is itself interrupted now and then, and the pool's files may have been given more room.
    pub fn crash_in_recovery(&mut self, rng: &mut Pcg64Mcg, power: bool, summary: &mut Summary) {
        if rng.random_bool(0.2) {
            self.reopen_limit(4);
        }
        for _ in 0..2 {
            if rng.random_bool(0.3) {
                self.disk.crash_after(rng.random_range(0..40));
                let _ = self.open(rng);
                if self.disk.has_crashed() {
                    summary.count("crashes in recovery", 1);
                    self.recovery_crashed = true;
                }
                self.crash(rng, power);
            }
        }
    }

    /// Ends the process in good order and prepares it to start as said.
    pub fn reopen_with(&mut self, rng: &mut Pcg64Mcg, how: Reopening) {
        self.crash(rng, false);
        match how {
            Reopening::MoreSpace => self.reopen_limit(64),
        }
    }

    fn reopen_limit(&mut self, segments: u64) {
        if let Some(max) = &mut self.config.pool.devices[0].max_bytes {
            *max = (*max + segments * u64::from(SEGMENT)).min(device_bytes(128));
        }
    }

    pub fn open(&mut self, rng: &mut Pcg64Mcg) -> Result<Recovery, Violation> {
        // Other settings: what is journaled stays in its lane.
        if self.config.lanes.count() > 1 && rng.random_bool(0.3) {
            self.config.lanes = lanes(rng);
        }
        let opened = self.open_disk(&self.disk, rng);
        let (store, recovery) = opened.map_err(|e| broken(format!("the {} does not open: {e}", self.role)))?;
        self.store = Some(store);
        Ok(recovery)
    }

    /// Opens a store on any disk as this node would.
    pub fn open_disk(&self, disk: &SimStorage, rng: &mut Pcg64Mcg) -> Result<(Arc<Store>, Recovery), store::OpenError> {
        let storage: Arc<dyn Storage> = Arc::new(disk.clone());
        store::open(storage, self.config.clone(), self.role, &mut || Uid(rng.random()))
    }

    // --- reads

    /// Resolves a read and holds it open, as a slow device would.
    pub fn hold_read(&mut self, rng: &mut Pcg64Mcg, model: &Model, until: u32) -> Outcome {
        // What is planned and not performed is covered by the overlay, which this read does not look at.
        if self.apply.is_some() || self.reads.len() >= 3 {
            return Ok(());
        }
        let store = Arc::clone(self.store());
        let known = model.live().into_values().filter(|spec| store.with_pool(|p| p.block_count(spec.id)) > 0);
        let Some(spec) = known.choose(rng) else { return Ok(()) };
        let mut pieces = Vec::new();
        let held = store.with_pool(|pool| {
            pool.resolve(spec.id, None, 0, pool.block_count(spec.id), &mut pieces)?;
            Ok::<_, understudy_common::pool::PoolError>((pool.begin_read(), pool.io()))
        });
        let (ticket, io) = held.map_err(|e| broken(format!("a read cannot be resolved: {e}")))?;
        self.reads.push(HeldRead { spec, pieces, ticket, io, until });
        Ok(())
    }

    /// Reads what was resolved long ago: its addresses must still hold the same blocks. True if there was such a read.
    pub fn end_read(&mut self, now: u32, model: &Model) -> Result<bool, Violation> {
        let Some(at) = self.reads.iter().position(|read| read.until <= now) else { return Ok(false) };
        let read = self.reads.swap_remove(at);
        let result = verify(&read.io, &read.spec, &read.pieces, model);
        self.store().with_pool(|pool| pool.end_read(read.ticket));
        result.map_err(|why| broken(format!("a read that was held open on the {}: {why}", self.role)))?;
        Ok(true)
    }

    /// What the last checkpoint refers to is not reused before the next one: its image reads as blocks of its volumes,
    /// in the versions of then or newer.
    pub fn check_base_image(&mut self, model: &Model) -> Outcome {
        let disk = self.disk.fork();
        disk.kill();
        disk.clear_faults();
        let instance = self.store().identity().instance;
        let check = || -> Result<(), String> {
            let catalog = Catalog::open(&disk, DEFAULT_CACHE_BYTES).map_err(|e| e.to_string())?;
            let pool = Pool::open(Arc::new(disk.clone()), &catalog, instance, &self.config.pool);
            let mut pool = pool.map_err(|e| e.to_string())?;
            for spec in model.ever() {
                let blocks = pool.block_count(spec.id);
                if blocks > 0 {
                    let mut pieces = Vec::new();
                    pool.resolve(spec.id, None, 0, blocks, &mut pieces).map_err(|e| e.to_string())?;
                    verify(&pool.io(), spec, &pieces, model)?;
                }
            }
            Ok(())
        };
        check().map_err(|why| broken(format!("the {}'s last checkpoint refers to what was reused: {why}", self.role)))
    }
}

/// Reads pieces from the devices: each block must verify, and be one that it once was.
fn verify(io: &PoolIo, spec: &VolumeSpec, pieces: &[Piece], model: &Model) -> Result<(), String> {
    let mut crcs = Vec::new();
    for piece in pieces.iter().filter(|p| p.at.is_some()) {
        let mut data = vec![0; usize::try_from(piece.count).expect("small") * BLOCK];
        io.read(spec.id, spec.block_size, piece, &mut data, &mut crcs).map_err(|e| e.to_string())?;
        for (block, bytes) in (piece.first_block..).zip(data.chunks_exact(BLOCK)) {
            if Stamp::of(bytes).is_none_or(|stamp| !model.ever_held(spec.id, block, stamp)) {
                return Err(format!("volume {} block {block} holds what was never written to it", spec.id));
            }
        }
    }
    Ok(())
}
