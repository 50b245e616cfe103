//! Damage in the simulation: bits flip on the disks of either side, while blocks are written, shipped, read back by scrubs,
//! compared and repaired, and both nodes lose their power.
//!
//! Smaller than the rest of this crate, which checks that nothing is lost: here every step may come upon a damaged block. Checked is
//! that a scrub calls damaged what was flipped and nothing else, that a comparison lists what differs and nothing else, that
//! no damaged block is shipped or served, and that in the end everything that was flipped is mended and both sides hold what
//! was written last.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use rand::{
    Rng, SeedableRng,
    seq::{IndexedRandom, IteratorRandom},
};
use rand_pcg::Pcg64Mcg;
use understudy_backup::{
    receiver::{FrameRefusal, Receiver},
    run_receiver::RunRefusal,
};
use understudy_common::{
    journal::JournalConfig,
    lane::Lanes,
    lives::Lives,
    pool::{DeviceConfig, OwnedPlace, Owner, PoolConfig},
    record::{Control, block_crcs},
    storage::{Storage, sim::SimStorage},
    store::{
        self, ApplyJob, Change, Checked, ImageReader, Levels, Mended, ReadFailure, Repair, Role, ScrubJob,
        SnapshotError, Store, StoreConfig, SubmitError, Suspect,
    },
    types::{AckRule, AwayRule, BlockRange, BlockSize, GroupId, Lsn, SnapshotId, Uid, VolumeId, VolumeSpec},
};
use understudy_primary::{
    sender::{Sender, Welcome},
    verify::Verifier,
};
use understudy_proto::{convert, v1};

use crate::{BLOCK, Counts, Outcome, SEGMENT, Violation, broken, hello};

const BLOCKS: u64 = 600;
const VOLUMES: [VolumeId; 2] = [VolumeId(1), VolumeId(2)];
const DEVICE: &str = "device";

/// Paths that a number of seeds must have reached.
pub const PATHS: &[&str] = &[
    "flips on the primary",
    "flips on the backup",
    "found by a scrub",
    "suspects that were sound",
    "asked while the applier was busy",
    "seen by snapshots only",
    "repairs from the backup",
    "repairs given up",
    "repairs not begun",
    "rewrites for the backup",
    "snapshots",
    "versions of snapshots mended",
    "comparisons",
    "comparisons that found a flip",
    "power cuts",
];

struct Side {
    role: Role,
    disk: SimStorage,
    config: StoreConfig,
    store: Arc<Store>,
    apply: Option<ApplyJob>,
    scrub: Option<ScrubJob>,
    at: OwnedPlace,
    suspects: Vec<Suspect>,
    /// What was flipped and not found mended: volume and block.
    flipped: BTreeSet<(VolumeId, u64)>,
}

impl Side {
    fn new(role: Role, rng: &mut Pcg64Mcg) -> Result<Self, Violation> {
        let config = StoreConfig {
            journal: JournalConfig {
                capacity_bytes: 2 << 20,
                file_bytes: 128 * 1024,
                reserve_bytes: 64 * 1024,
                max_batch_bytes: 32 * 1024,
            },
            pool: PoolConfig {
                segment_bytes: SEGMENT,
                devices: vec![DeviceConfig {
                    path: DEVICE.into(),
                    size_bytes: Some(4096 + 1024 * 512 + 96 * u64::from(SEGMENT)),
                    max_bytes: None,
                }],
                map_cache_bytes: 1 << 20,
            },
            checkpoint_bytes: 64 * 1024,
            tail_bytes: 64 * 1024,
            reference_bytes: usize::MAX,
            apply_bytes: 16 * 1024,
            drain_bytes_per_s: 0,
            levels: Levels::default(),
            pending_bytes: 1 << 20,
            retain: role == Role::Primary,
            lanes: Lanes::default(),
        };
        let disk = SimStorage::new(rng.random());
        let store = open(&disk, &config, role, rng)?;
        let (at, suspects) = (OwnedPlace::default(), Vec::new());
        Ok(Self { role, disk, config, store, apply: None, scrub: None, at, suspects, flipped: BTreeSet::new() })
    }

    fn commit(&self) {
        while let Some(job) = self.store.take_batch() {
            let result = job.run();
            self.store.finish_batch(job, result);
        }
    }

    fn finish_apply(&mut self) {
        if let Some(mut job) = self.apply.take() {
            let result = job.run();
            self.store.finish_apply(job, result);
        }
    }

    fn drain(&mut self) {
        self.commit();
        self.finish_apply();
        while let Some(job) = self.store.take_apply() {
            self.apply = Some(job);
            self.finish_apply();
        }
        while self.store.sweep() {}
    }

    fn checkpoint(&mut self) {
        if let Some(job) = self.store.take_checkpoint() {
            let result = job.run();
            self.store.finish_checkpoint(job, result);
        }
    }

    /// A power cut, in the middle of whatever is under way.
    fn crash(&mut self, rng: &mut Pcg64Mcg) -> Outcome {
        if rng.random() {
            self.disk.crash_after(rng.random_range(0..8));
            if let Some(mut job) = self.apply.take() {
                let _ = job.run();
            }
        }
        self.disk.crash(rng);
        (self.apply, self.scrub, self.at) = (None, None, OwnedPlace::default());
        self.suspects.clear();
        self.check_disk()?;
        self.store = open(&self.disk, &self.config, self.role, rng)?;
        Ok(())
    }

    /// What is on the disk is whole, but for what was flipped.
    fn check_disk(&self) -> Outcome {
        let found = store::fsck(&self.disk, true, &[]).map_err(|error| broken(format!("fsck: {error}")))?;
        let flipped = |problem: &&String| {
            self.flipped.iter().any(|(v, b)| problem.starts_with(&format!("volume {v} block {b} in ")))
        };
        match found.problems.iter().find(|problem| !flipped(problem)) {
            Some(problem) => Err(broken(format!("fsck of the {}: {problem}", self.role))),
            None => Ok(()),
        }
    }

    /// Flips a bit of the newest version of a block, or of its checksum. False if it is not on the disk as it is.
    fn flip(&mut self, volume: VolumeId, block: u64, content: &[u8], rng: &mut Pcg64Mcg) -> bool {
        let Ok(bytes) = self.disk.read_all(DEVICE) else { return false };
        let places: Vec<usize> =
            bytes.chunks_exact(BLOCK).enumerate().filter(|(_, b)| *b == content).map(|(n, _)| n * BLOCK).collect();
        // Of several copies it is not known which one counts.
        let [at] = places[..] else { return false };
        let at = at as u64 + rng.random_range(0..BLOCK as u64);
        self.disk.corrupt(DEVICE, at, 1 << rng.random_range(0..8));
        self.flipped.insert((volume, block));
        true
    }
}

fn open(disk: &SimStorage, config: &StoreConfig, role: Role, rng: &mut Pcg64Mcg) -> Result<Arc<Store>, Violation> {
    let storage: Arc<dyn Storage> = Arc::new(disk.clone());
    let opened = store::open(storage, config.clone(), role, &mut || Uid(rng.random()));
    opened.map(|(store, _)| store).map_err(|error| broken(format!("the {role} does not open: {error}")))
}

struct World {
    rng: Pcg64Mcg,
    primary: Side,
    backup: Side,
    sender: Sender,
    receiver: Receiver,
    session: Option<Uid>,
    frames: VecDeque<v1::StagedRecord>,
    /// Writes in their order: LSN, volume, first block, content of each.
    history: Vec<(Lsn, VolumeId, u64, Vec<Bytes>)>,
    repair: Option<(Repair, VolumeId, u64, Option<Bytes>)>,
    image: Option<ImageReader>,
    /// A snapshot for users, of a volume that is a group of its own, and what it holds.
    snapshot: Option<(SnapshotId, VolumeId, Vec<Bytes>)>,
    verifier: Option<(Verifier, BTreeSet<(VolumeId, u64)>)>,
    counts: Counts,
    trace: bool,
}

/// Runs one seed.
///
/// # Errors
/// What was broken first.
pub fn run(seed: u64, steps: u32) -> Result<Counts, Violation> {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let primary = Side::new(Role::Primary, &mut rng)?;
    let backup = Side::new(Role::Backup, &mut rng)?;
    let mut world = World {
        sender: Sender::new(Arc::clone(&primary.store), 64 * 1024),
        receiver: Receiver::new(Arc::clone(&backup.store)),
        rng,
        primary,
        backup,
        session: None,
        frames: VecDeque::new(),
        history: Vec::new(),
        repair: None,
        image: None,
        snapshot: None,
        verifier: None,
        counts: Counts::new(),
        trace: std::env::var_os("UNDERSTUDY_TRACE").is_some(),
    };
    world.create()?;
    for _ in 0..steps {
        world.step()?;
    }
    world.settle()?;
    Ok(world.counts)
}

impl World {
    fn count(&mut self, what: &'static str) {
        debug_assert!(PATHS.contains(&what), "{what}");
        *self.counts.entry(what).or_default() += 1;
    }

    fn note(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{}", what());
        }
    }

    fn create(&mut self) -> Outcome {
        for id in VOLUMES {
            let spec = VolumeSpec {
                id,
                name: format!("v{id}"),
                group: GroupId(id.0),
                group_name: format!("v{id}"),
                size_bytes: BLOCKS * BLOCK as u64,
                block_size: BlockSize::new(512).expect("it is one"),
                segment_bytes: SEGMENT,
                ack: AckRule::Staged,
                away: AwayRule::Degrade,
            };
            let made = self.primary.store.submit_control(spec.group, Control::CreateVolume { spec, fill: None }, 1);
            made.map_err(|error| broken(error.to_string()))?;
        }
        self.attach()?;
        self.drain()
    }

    fn step(&mut self) -> Outcome {
        match self.rng.random_range(0..100) {
            0..22 => self.write(),
            22..32 => {
                self.primary.commit();
                Ok(())
            }
            32..36 => {
                self.backup.commit();
                Ok(())
            }
            36..52 => {
                let side = self.side();
                if side.apply.is_some() {
                    side.finish_apply()
                } else {
                    side.apply = side.store.take_apply()
                }
                Ok(())
            }
            52..66 => self.ship(),
            66..68 => {
                let side = self.side();
                side.checkpoint();
                side.store.sweep();
                Ok(())
            }
            68..72 => {
                self.flip();
                Ok(())
            }
            72..84 => self.scrub(),
            84..90 => self.mend(),
            90..92 if self.rng.random() => self.turn_image(),
            90..92 => self.turn_snapshot(),
            92..98 => self.verify(),
            98 if self.rng.random_bool(0.3) => self.crash(),
            _ => self.read(),
        }
    }

    fn side(&mut self) -> &mut Side {
        if self.rng.random() { &mut self.primary } else { &mut self.backup }
    }

    /// What was written last; zeros where nothing was.
    fn newest(&self, volume: VolumeId, block: u64) -> Bytes {
        let of = |(_, v, first, blocks): &(Lsn, VolumeId, u64, Vec<Bytes>)| {
            let at = block.checked_sub(*first).filter(|_| *v == volume)?;
            blocks.get(usize::try_from(at).expect("few")).cloned()
        };
        self.history.iter().rev().find_map(of).unwrap_or_else(|| Bytes::from_static(&[0; BLOCK]))
    }

    fn write(&mut self) -> Outcome {
        let volume = *VOLUMES.choose(&mut self.rng).expect("two");
        let count = self.rng.random_range(1..6);
        // Few blocks, so that they are written again and again.
        let first = self.rng.random_range(0..BLOCKS / 4) * 4 % (BLOCKS - count);
        let blocks: Vec<Bytes> = (0..count).map(|_| (0..BLOCK).map(|_| self.rng.random::<u8>()).collect()).collect();
        let data = Bytes::from(blocks.concat());
        let crcs = block_crcs(&data, BlockSize::new(512).expect("it is one"));
        match self.primary.store.submit(volume, first, Change::Write { data, crcs }, None, 1) {
            Ok(submitted) => self.history.push((submitted.lsn, volume, first, blocks)),
            Err(SubmitError::StagingFull { .. } | SubmitError::Space(_)) => self.primary.checkpoint(),
            Err(error) => return Err(broken(error.to_string())),
        }
        Ok(())
    }

    /// A read gives what was written last, or says that it cannot.
    fn read(&mut self) -> Outcome {
        let volume = *VOLUMES.choose(&mut self.rng).expect("two");
        let block = self.rng.random_range(0..BLOCKS);
        match self.primary.store.read(volume, block, 1) {
            Ok(read) if read.data == self.newest(volume, block) => Ok(()),
            Ok(_) => Err(broken(format!("volume {volume} block {block} does not read as it was written last"))),
            Err(ReadFailure::Damaged { .. }) if self.primary.flipped.contains(&(volume, block)) => Ok(()),
            Err(error) => Err(broken(format!("volume {volume} block {block}: {error}"))),
        }
    }

    // --- the link

    fn attach(&mut self) -> Outcome {
        let hello = hello(&self.primary.store, Lives::default());
        let session = Uid(self.rng.random());
        let (positions, _) = self.receiver.attach(&hello, session).map_err(|e| broken(e.to_string()))?;
        self.backup.commit();
        let instance = self.backup.store.identity().instance;
        let welcome = Welcome { session, instance, positions, unfinished: BTreeSet::new(), diverged: BTreeMap::new() };
        let lost = self.sender.on_attached(&welcome, 1).map_err(|e| broken(e.to_string()))?;
        if let Some(lost) = lost.first() {
            return Err(broken(format!("a group is lost: {lost:?}")));
        }
        self.session = Some(session);
        Ok(())
    }

    fn ship(&mut self) -> Outcome {
        let Some(session) = self.session else { return self.attach() };
        let frames = self.sender.poll(Duration::ZERO, 8 * 1024);
        self.frames.extend(frames.map_err(|error| broken(format!("the sender: {error}")))?);
        for _ in 0..self.rng.random_range(0..6) {
            let Some(frame) = self.frames.pop_front() else { break };
            let record = convert::record_from_wire(frame.clone()).map_err(|e| broken(e.to_string()))?;
            match self.receiver.on_record(session, frame.ship, &record) {
                Ok(()) => {}
                Err(FrameRefusal::Busy(_)) => {
                    self.frames.push_front(frame);
                    self.backup.drain();
                    self.backup.checkpoint();
                }
                Err(error) => return Err(broken(format!("the backup refuses: {error}"))),
            }
        }
        let durable = self.backup.store.marks().borrow().durable;
        if let Some((id, answer)) = self.receiver.poll_answer(durable) {
            let session = Bytes::copy_from_slice(&id.0);
            let ack = v1::StagedAck { session, ship: answer.ship, refusals: Vec::new() };
            self.sender.on_ack(&ack).map_err(|error| broken(error.to_string()))?;
        }
        Ok(())
    }

    fn crash(&mut self) -> Outcome {
        self.count("power cuts");
        (self.repair, self.image) = (None, None);
        self.verifier = None;
        self.frames.clear();
        self.session = None;
        self.sender.on_detached();
        if self.rng.random() {
            self.primary.crash(&mut self.rng)?;
            // Opening may have added records of its own behind what it found.
            let next = self.primary.store.marks().borrow().durable.next();
            self.history.retain(|(lsn, ..)| *lsn < next);
            self.sender = Sender::new(Arc::clone(&self.primary.store), 64 * 1024);
        } else {
            self.backup.crash(&mut self.rng)?;
            self.receiver = Receiver::new(Arc::clone(&self.backup.store));
        }
        Ok(())
    }

    // --- damage

    fn flip(&mut self) {
        let volume = *VOLUMES.choose(&mut self.rng).expect("two");
        let block = self.rng.random_range(0..BLOCKS);
        // The version of a block is lost for good only if both sides lose it.
        if self.primary.flipped.contains(&(volume, block)) || self.backup.flipped.contains(&(volume, block)) {
            return;
        }
        let content = self.newest(volume, block);
        if content == [0; BLOCK][..] {
            return;
        }
        let on_primary = self.rng.random();
        let side = if on_primary { &mut self.primary } else { &mut self.backup };
        if side.flip(volume, block, &content, &mut self.rng) {
            self.count(if on_primary { "flips on the primary" } else { "flips on the backup" });
            self.note(|| format!("flip, primary {on_primary}: volume {volume} block {block}"));
        }
    }

    /// One step of a scrub of one side.
    fn scrub(&mut self) -> Outcome {
        let mut counted = Vec::new();
        let error = |e: understudy_common::pool::PoolError| broken(e.to_string());
        let side = self.side();
        let role = side.role;
        match side.scrub.take() {
            Some(job) => {
                side.suspects.extend(job.run());
                side.at = side.store.finish_scrub(job);
            }
            None => {
                side.scrub = side.store.take_scrub(side.at, None).map_err(error)?;
                if side.scrub.is_none() {
                    side.at = OwnedPlace::default();
                }
            }
        }
        side.suspects.extend(side.store.take_suspects().map_err(error)?);
        side.suspects.extend(side.store.maybe_mended().map_err(error)?);
        for suspect in std::mem::take(&mut side.suspects) {
            match side.store.check_suspect(suspect).map_err(error)? {
                Checked::Busy => {
                    counted.push("asked while the applier was busy");
                    side.suspects.push(suspect);
                }
                Checked::Sound => counted.push("suspects that were sound"),
                Checked::Damaged(owner) => {
                    if !side.flipped.contains(&(suspect.volume, suspect.block)) {
                        return Err(broken(format!("a scrub of the {role} takes {suspect:?} for damaged")));
                    }
                    counted.push("found by a scrub");
                    if owner == Owner::Snapshot {
                        counted.push("seen by snapshots only");
                    }
                }
            }
        }
        counted.into_iter().for_each(|what| self.count(what));
        Ok(())
    }

    /// Takes and deletes a snapshot for users, on both sides.
    fn turn_snapshot(&mut self) -> Outcome {
        let store = Arc::clone(&self.primary.store);
        // A crash may have lost the last one.
        let (volume, done) = match self.snapshot.take().filter(|(id, ..)| store.snapshot(*id).is_some()) {
            Some((id, volume, _)) => (volume, store.drop_snapshot(id, 1).map(|_| None)),
            None => {
                let (volume, name) =
                    (*VOLUMES.choose(&mut self.rng).expect("two"), self.rng.random::<u64>().to_string());
                let made = store.take_snapshot(GroupId(volume.0), &name, 1);
                (volume, made.map(|(snapshot, _)| Some(snapshot.id)))
            }
        };
        match done {
            Ok(Some(id)) => {
                self.snapshot = Some((id, volume, (0..BLOCKS).map(|block| self.newest(volume, block)).collect()));
                self.count("snapshots");
            }
            Ok(None) => {}
            // One that could not be deleted stays, and is not looked at any more.
            Err(SnapshotError::Submit(SubmitError::StagingFull { .. } | SubmitError::Space(_))) => {
                self.primary.checkpoint()
            }
            Err(error) => return Err(broken(error.to_string())),
        }
        Ok(())
    }

    /// Mends a version that only snapshots of one side see from a snapshot of the other side.
    fn mend_version(&mut self) -> Outcome {
        let error = |e: understudy_common::pool::PoolError| broken(e.to_string());
        let (mine, other) = match self.rng.random() {
            true => (&self.primary.store, &self.backup.store),
            false => (&self.backup.store, &self.primary.store),
        };
        let damaged = mine.damaged().into_iter().filter(|(_, owner)| *owner == Owner::Snapshot);
        let Some((suspect, _)) = damaged.choose(&mut self.rng) else { return Ok(()) };
        let Some(id) = mine.mirrored_sight(suspect).map_err(error)? else { return Ok(()) };
        let Ok(reader) = other.snapshot_reader(id, suspect.volume) else { return Ok(()) };
        // It may not have applied the snapshot yet.
        let Ok(data) = reader.read(suspect.block, 1) else { return Ok(()) };
        if mine.mend_version(suspect, &data).map_err(error)? == Mended::Yes {
            self.count("versions of snapshots mended");
        }
        Ok(())
    }

    /// One step of a repair.
    fn mend(&mut self) -> Outcome {
        if self.rng.random_bool(0.2) {
            return self.mend_version();
        }
        if let Some((repair, volume, block, data)) = self.repair.take() {
            if data.is_none() && self.rng.random_bool(0.8) {
                // The backup answers now, whatever has come in between.
                let data = self.backup.store.read(volume, block, 1).ok().map(|read| read.data);
                self.repair = Some((repair, volume, block, data));
                return Ok(());
            }
            let asked = data.is_some();
            return match self.primary.store.finish_repair(repair, data, 1) {
                Ok(Some(_)) => {
                    self.count("repairs from the backup");
                    Ok(())
                }
                Ok(None) => {
                    if asked {
                        self.count("repairs given up");
                    }
                    Ok(())
                }
                Err(SubmitError::StagingFull { .. } | SubmitError::Space(_)) => Ok(()),
                Err(error) => Err(broken(error.to_string())),
            };
        }
        let heads = |store: &Store| {
            let damaged = store.damaged().into_iter().filter(|(_, owner)| *owner == Owner::Head);
            damaged.map(|(suspect, _)| (suspect.volume, suspect.block)).collect::<Vec<_>>()
        };
        let on_backup = heads(&self.backup.store);
        if let Some((volume, first)) = on_backup.choose(&mut self.rng).copied()
            && self.rng.random()
        {
            if self.primary.store.rewrite(BlockRange { volume, first, count: 1 }, 1).is_ok() {
                self.count("rewrites for the backup");
            }
            return Ok(());
        }
        if let Some((volume, block)) = heads(&self.primary.store).choose(&mut self.rng).copied()
            && self.session.is_some()
        {
            match self.primary.store.begin_repair(volume, block) {
                Some(repair) => self.repair = Some((repair, volume, block, None)),
                None => self.count("repairs not begun"),
            }
        }
        Ok(())
    }

    /// Opens and closes an image: versions pass to its snapshot.
    fn turn_image(&mut self) -> Outcome {
        if self.image.take().is_none() {
            let volume = *VOLUMES.choose(&mut self.rng).expect("two");
            let store = if self.rng.random() { &self.primary.store } else { &self.backup.store };
            if store.with_state(|state| state.volumes.contains_key(&volume)) {
                self.image = Some(store.open_image(volume, 1).map_err(|error| broken(error.to_string()))?);
            }
        }
        Ok(())
    }

    /// One step of a comparison.
    fn verify(&mut self) -> Outcome {
        let Some(session) = self.session else { return Ok(()) };
        let Some((verifier, flipped)) = &mut self.verifier else {
            let group = GroupId(VOLUMES.choose(&mut self.rng).expect("two").0);
            if let Ok(snapshot) = self.primary.store.snapshot_both(group, session, 1) {
                let session = Bytes::copy_from_slice(&session.0);
                let verifier = Verifier::new(&self.primary.store, snapshot, session, None);
                self.verifier = Some((verifier, BTreeSet::new()));
            }
            return Ok(());
        };
        flipped.extend(self.primary.flipped.iter().chain(&self.backup.flipped));
        let (at, group) = (verifier.snapshot().ready_at(), verifier.snapshot().group());
        let applied = self.primary.store.marks().borrow().applied;
        if applied < at || !self.primary.store.is_on_backup(group, None, at) {
            return Ok(());
        }
        // The backup answers when it has applied the record.
        self.backup.drain();
        flipped.extend(self.primary.flipped.iter().chain(&self.backup.flipped));
        for _ in 0..self.rng.random_range(1..4) {
            let Some(request) = verifier.poll().map_err(|error| broken(error.to_string()))? else {
                let (verifier, flipped) = self.verifier.take().expect("looked at above");
                return self.compared(&verifier, &flipped);
            };
            let answer = self.receiver.on_digest(request).and_then(|job| job.run());
            let answer = answer.map_err(|error: RunRefusal| broken(error.to_string()))?;
            verifier.on_answer(&answer).map_err(|error| broken(error.to_string()))?;
        }
        Ok(())
    }

    /// Nothing is listed but what was flipped on either side while the comparison was under way.
    fn compared(&mut self, verifier: &Verifier, flipped: &BTreeSet<(VolumeId, u64)>) -> Outcome {
        self.count("comparisons");
        for d in verifier.differences() {
            for block in d.first..d.first + d.count {
                if !flipped.contains(&(d.volume, block)) {
                    return Err(broken(format!(
                        "a comparison lists volume {} block {block}, which is the same",
                        d.volume
                    )));
                }
            }
        }
        if !verifier.differences().is_empty() {
            self.count("comparisons that found a flip");
        }
        let request = v1::EndVerifyRequest {
            session: Bytes::copy_from_slice(&self.session.expect("a comparison has one").0),
            position: Some(verifier.snapshot().position().into()),
        };
        self.receiver.on_end_verify(&request).map(drop).map_err(|error| broken(error.to_string()))
    }

    // --- the end

    fn drain(&mut self) -> Outcome {
        for _ in 0..2_000 {
            self.primary.drain();
            self.ship()?;
            self.backup.drain();
            if self.primary.store.retained().oldest().is_none() && self.frames.is_empty() {
                return self.drain_rest();
            }
        }
        Err(broken("the pair does not come to rest"))
    }

    fn drain_rest(&mut self) -> Outcome {
        self.primary.drain();
        self.backup.drain();
        Ok(())
    }

    /// Everything that was flipped is found and mended, and both sides hold what was written last.
    fn settle(&mut self) -> Outcome {
        (self.image, self.verifier) = (None, None);
        if let Some((repair, ..)) = self.repair.take() {
            self.primary.store.finish_repair(repair, None, 1).map_err(|error| broken(error.to_string()))?;
        }
        // Whose record is on its way is over as well.
        if let Some(session) = self.session {
            let newest = self.primary.store.next_lsn();
            let position = Some(v1::Position { generation: 1, lsn: newest.0 });
            let request = v1::EndVerifyRequest { session: Bytes::copy_from_slice(&session.0), position };
            self.receiver.on_end_verify(&request).map_err(|error| broken(error.to_string()))?;
        }
        for _ in 0..6 {
            self.drain()?;
            self.scrub_all()?;
            for _ in 0..200 {
                self.mend()?;
            }
        }
        self.drain()?;
        self.scrub_all()?;
        for side in [&self.primary, &self.backup] {
            if let Some(damaged) = side.store.damaged().first() {
                return Err(broken(format!("{damaged:?} of the {} stays damaged", side.role)));
            }
            for volume in VOLUMES {
                for block in 0..BLOCKS {
                    let read = side.store.read(volume, block, 1);
                    let read = read.map_err(|e| broken(format!("the {} at rest: {e}", side.role)))?;
                    if read.data != self.newest(volume, block) {
                        let role = side.role;
                        return Err(broken(format!("the {role} at rest: volume {volume} block {block} is an old one")));
                    }
                }
            }
        }
        self.check_snapshot()
    }

    /// The snapshot is on both sides what it was taken of.
    fn check_snapshot(&self) -> Outcome {
        let Some((id, volume, content)) = &self.snapshot else { return Ok(()) };
        if self.primary.store.snapshot(*id).is_none() {
            return Ok(());
        }
        for side in [&self.primary, &self.backup] {
            let role = side.role;
            let reader = side.store.snapshot_reader(*id, *volume);
            let reader = reader.map_err(|e| broken(format!("snapshot {id} of the {role}: {e}")))?;
            for (block, content) in (0..).zip(content) {
                let read = reader.read(block, 1).map_err(|e| broken(format!("snapshot {id} of the {role}: {e}")))?;
                if read != content {
                    return Err(broken(format!("block {block} of snapshot {id} of the {role} is another one")));
                }
            }
        }
        Ok(())
    }

    fn scrub_all(&mut self) -> Outcome {
        let error = |e: understudy_common::pool::PoolError| broken(e.to_string());
        for side in [&mut self.primary, &mut self.backup] {
            let mut suspects = std::mem::take(&mut side.suspects);
            if let Some(job) = side.scrub.take() {
                side.store.finish_scrub(job);
            }
            let mut at = OwnedPlace::default();
            while let Some(job) = side.store.take_scrub(at, None).map_err(error)? {
                suspects.extend(job.run());
                at = side.store.finish_scrub(job);
            }
            suspects.extend(side.store.maybe_mended().map_err(error)?);
            for suspect in suspects {
                side.store.check_suspect(suspect).map_err(error)?;
            }
        }
        Ok(())
    }
}
