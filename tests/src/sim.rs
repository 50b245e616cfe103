//! Deterministic simulation of a pair: both stores on simulated disks, the sender and the receiver, and a network that
//! delays, duplicates late frames of old sessions, and cuts. One seed decides everything.
//!
//! Each stage of a store is three steps (take, run, finish); the simulation interleaves them freely and crashes a node
//! before, inside or after any of them. After each acknowledgement, recovery and quiet phase an oracle checks the
//! promises of `ARCHITECTURE.md`:
//!
//! - P1: an acknowledged write is there after any recovery (I1, I2), and on both sides if it was acknowledged as both.
//! - P4: the image of each group on the backup is one the primary once had, at the position the backup names (I3).
//! - P5: when faults end, both images are equal to the history (I5).
//! - P10: a read sees every acknowledged write, and nothing that is not in the history (I10).
//! - P11: a repeated client sequence has no second effect (I12).

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_pcg::Pcg64Mcg;
use understudy_backup::receiver::{FrameRefusal, Hello, PROTOCOL, Receiver};
use understudy_common::{
    journal::JournalConfig,
    pool::{DeviceConfig, PoolConfig},
    record::{ClientSequence, Control, block_crcs},
    storage::{Storage, sim::SimStorage},
    store::{self, ApplyJob, BatchJob, Change, CheckpointJob, ReadFailure, Role, Store, StoreConfig, SubmitError},
    types::{AckRule, AwayRule, BlockSize, GroupId, Lsn, Uid, VolumeId, VolumeSpec},
};
use understudy_primary::sender::{Sender, Welcome};
use understudy_proto::{convert, v1};

/// Block size of the simulated volumes.
const BLOCK: usize = 512;
/// Blocks of each volume: four segments.
const BLOCKS: u64 = 512;
const SEGMENT: u32 = 64 * 1024;

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

/// What a run was made of; decided by the seed ("swarm": each run has some faults and not others).
#[derive(Debug, Clone)]
struct Faults {
    primary_crashes: bool,
    backup_crashes: bool,
    cuts: bool,
    late_frames: bool,
    power_loss: bool,
    large_writes: bool,
    tight_journal: bool,
    tight_pool: bool,
}

/// How a run ended, for the test's summary and for comparing two runs of one seed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Summary {
    /// Acknowledged writes.
    pub acked: u64,
    /// Crashes of either node.
    pub crashes: u64,
    /// Sessions opened.
    pub sessions: u64,
    /// Checkpoints made durable.
    pub checkpoints: u64,
    /// Hash of everything that happened, in order.
    pub trace: u64,
}

struct Node {
    role: Role,
    disk: SimStorage,
    store: Option<Arc<Store>>,
    batch: Option<BatchJob>,
    apply: Option<ApplyJob>,
    checkpoint: Option<CheckpointJob>,
    config: StoreConfig,
}

impl Node {
    fn new(role: Role, rng: &mut Pcg64Mcg, faults: &Faults) -> Self {
        let capacity = if faults.tight_journal { 192 * 1024 } else { 512 * 1024 };
        let segments = if faults.tight_pool { 14 } else { 64 };
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
                    size_bytes: Some(4096 + segments * (512 + u64::from(SEGMENT))),
                    max_bytes: None,
                }],
                map_cache_bytes: 1 << 20,
            },
            checkpoint_bytes: 64 * 1024,
            tail_bytes: rng.random_range(1..64) * 1024,
            reference_bytes: if faults.large_writes { SEGMENT as usize } else { usize::MAX },
            apply_bytes: 8 * 1024,
            pending_bytes: 1 << 20,
            retain: role == Role::Primary,
        };
        Self {
            role,
            disk: SimStorage::new(rng.random()),
            store: None,
            batch: None,
            apply: None,
            checkpoint: None,
            config,
        }
    }

    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().expect("the node is up")
    }

    /// Loses the process, and with `power` everything that was not synced.
    fn crash(&mut self, rng: &mut Pcg64Mcg, power: bool) {
        if power {
            self.disk.crash(rng);
        } else {
            self.disk.kill();
        }
        // Its handles are dead: nothing that ends here tidies up on the disk.
        (self.batch, self.apply, self.checkpoint, self.store) = (None, None, None, None);
    }

    fn open(&mut self, rng: &mut Pcg64Mcg) -> Result<(), String> {
        let storage: Arc<dyn Storage> = Arc::new(self.disk.clone());
        let mut ids = || Uid(rng.random());
        match store::open(storage, self.config.clone(), self.role, &mut ids) {
            Ok((store, _)) => {
                self.store = Some(store);
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp(u64);

impl Stamp {
    fn fill(self) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        if self.0 != 0 {
            for (n, chunk) in block.chunks_exact_mut(8).enumerate() {
                chunk.copy_from_slice(
                    &(self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(n as u32 % 64)).to_le_bytes(),
                );
            }
            block[..8].copy_from_slice(&self.0.to_le_bytes());
        }
        block
    }

    fn of(block: &[u8]) -> Option<Self> {
        let stamp = Self(u64::from_le_bytes(block[..8].try_into().expect("eight bytes")));
        (stamp.fill() == block).then_some(stamp)
    }
}

/// One write in the history of the primary.
#[derive(Debug, Clone)]
struct Event {
    lsn: Lsn,
    volume: VolumeId,
    first: u64,
    count: u64,
    /// 0: zeros.
    stamp: Stamp,
    client: Option<ClientSequence>,
    /// Acknowledged, and as durable on both sides.
    acked: Option<bool>,
    both: bool,
    duplicate: bool,
}

/// Frames and answers of one connection.
struct Wire {
    session: Uid,
    frames: VecDeque<v1::StagedRecord>,
    answers: VecDeque<v1::StagedAck>,
    /// The connection is gone; its frames may still arrive.
    old: bool,
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
    volumes: Vec<VolumeSpec>,
    history: Vec<Event>,
    next_stamp: u64,
    next_sequence: [u64; 2],
    time: i64,
    summary: Summary,
}

/// Runs one seed.
///
/// # Errors
/// The first promise that was broken.
pub fn run(seed: u64, steps: u32) -> Result<Summary, Violation> {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let faults = Faults {
        primary_crashes: rng.random_bool(0.7),
        backup_crashes: rng.random_bool(0.6),
        cuts: rng.random_bool(0.6),
        late_frames: rng.random_bool(0.5),
        power_loss: rng.random_bool(0.8),
        large_writes: rng.random_bool(0.5),
        tight_journal: rng.random_bool(0.5),
        tight_pool: rng.random_bool(0.4),
    };
    let primary = Node::new(Role::Primary, &mut rng, &faults);
    let backup = Node::new(Role::Backup, &mut rng, &faults);
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
        volumes: Vec::new(),
        history: Vec::new(),
        next_stamp: 1,
        next_sequence: [1, 1],
        time: 1,
        summary: Summary::default(),
    };
    world.start_primary()?;
    world.start_backup()?;
    world.create_volumes()?;
    for _ in 0..steps {
        world.step()?;
    }
    world.settle()?;
    Ok(world.summary)
}

impl World {
    fn note(&mut self, what: u64) {
        self.summary.trace = (self.summary.trace ^ what).wrapping_mul(0x100_0000_01b3).rotate_left(5);
    }

    fn start_primary(&mut self) -> Outcome {
        self.primary.open(&mut self.rng).map_err(|e| broken(format!("the primary does not open: {e}")))?;
        self.sender = Some(Sender::new(Arc::clone(self.primary.store()), 16 * 1024));
        self.note(self.primary.store().next_lsn().0);
        self.forget_lost_events();
        self.check_acked_on_primary()
    }

    fn start_backup(&mut self) -> Outcome {
        self.backup.open(&mut self.rng).map_err(|e| broken(format!("the backup does not open: {e}")))?;
        self.receiver = Some(Receiver::new(Arc::clone(self.backup.store())));
        self.note(self.backup.store().next_lsn().0);
        self.check_backup_image()
    }

    fn create_volumes(&mut self) -> Outcome {
        for n in 1..=3u64 {
            // Volumes 2 and 3 are one group; volume 3 is acknowledged by both sides.
            let group = GroupId(n.min(2));
            let spec = VolumeSpec {
                id: VolumeId(n),
                name: format!("v{n}"),
                group,
                group_name: format!("g{}", group.0),
                size_bytes: BLOCKS * BLOCK as u64,
                block_size: BlockSize::new(BLOCK as u32).expect("512"),
                segment_bytes: SEGMENT,
                ack: if n == 3 { AckRule::Both } else { AckRule::Staged },
                away: AwayRule::Degrade,
            };
            self.primary
                .store()
                .submit_control(group, Control::CreateVolume { spec: spec.clone() }, self.time)
                .map_err(|e| broken(format!("creating a volume: {e}")))?;
            self.volumes.push(spec);
        }
        // A volume counts from its acknowledgement on: make it durable before anything can be lost.
        while let Some(job) = self.primary.store().take_batch() {
            let result = job.run();
            self.primary.store().finish_batch(job, result);
        }
        Ok(())
    }

    fn step(&mut self) -> Outcome {
        self.time += i64::from(self.rng.random_range(0..20u8));
        let choice = self.rng.random_range(0..100u32);
        self.note(u64::from(choice));
        match choice {
            0..25 => self.client_write()?,
            25..28 => self.client_read()?,
            28..50 => self.turn_primary()?,
            50..68 => self.turn_backup()?,
            68..92 => self.turn_link()?,
            92..94 if self.faults.cuts => self.cut(),
            94..95 if self.faults.primary_crashes => self.crash_primary()?,
            95..96 if self.faults.backup_crashes => self.crash_backup()?,
            96..98 => {
                self.link = true;
            }
            _ => {}
        }
        self.acknowledge()
    }

    // --- clients

    fn client_write(&mut self) -> Outcome {
        let Some(store) = self.primary.store.clone() else { return Ok(()) };
        let spec = self.volumes.choose(&mut self.rng).expect("volumes").clone();
        let per_segment = u64::from(SEGMENT) / BLOCK as u64;
        let large = self.faults.large_writes && self.rng.random_bool(0.15);
        let (first, count) = if large {
            (self.rng.random_range(0..BLOCKS / per_segment) * per_segment, per_segment)
        } else {
            // A few hot blocks, so that versions pile up.
            let first =
                if self.rng.random_bool(0.7) { self.rng.random_range(0..12) } else { self.rng.random_range(0..BLOCKS) };
            (first, self.rng.random_range(1..=4).min(BLOCKS - first))
        };
        let zero = !large && self.rng.random_bool(0.1);
        let who = self.rng.random_range(0..3usize);
        let client = (who < 2).then(|| ClientSequence { client: format!("c{who}"), sequence: self.next_sequence[who] });
        let stamp = Stamp(if zero { 0 } else { self.next_stamp });
        let change = if zero {
            Change::Zero { count }
        } else {
            let data: Bytes = stamp.fill().repeat(usize::try_from(count).expect("small")).into();
            let crcs = block_crcs(&data, spec.block_size);
            Change::Write { data, crcs }
        };
        match store.submit(spec.id, first, change.clone(), client.clone(), self.time) {
            Ok(submitted) => {
                if submitted.duplicate {
                    return Err(broken(format!("fresh sequence {client:?} was taken for a duplicate")));
                }
                self.next_stamp += 1;
                if who < 2 {
                    self.next_sequence[who] += 1;
                }
                self.history.push(Event {
                    lsn: submitted.lsn,
                    volume: spec.id,
                    first,
                    count,
                    stamp,
                    client: client.clone(),
                    acked: None,
                    both: spec.ack == AckRule::Both,
                    duplicate: false,
                });
                if client.is_some() && self.rng.random_bool(0.1) {
                    self.repeat_last(&store, &spec, first, change)?;
                }
                Ok(())
            }
            Err(
                SubmitError::StagingFull { .. }
                | SubmitError::Space(_)
                | SubmitError::Failed(_)
                | SubmitError::TooLarge { .. },
            ) => Ok(()),
            Err(error) => Err(broken(format!("a write was refused: {error}"))),
        }
    }

    /// A retry of the last request, after others may have come in between, must not write again.
    fn repeat_last(&mut self, store: &Arc<Store>, spec: &VolumeSpec, first: u64, change: Change) -> Outcome {
        let mut repeated = self.history.last().cloned().expect("just pushed");
        let over = Stamp(self.next_stamp);
        let data: Bytes = over.fill().into();
        let crcs = block_crcs(&data, spec.block_size);
        if let Ok(submitted) = store.submit(spec.id, first, Change::Write { data, crcs }, None, self.time) {
            self.next_stamp += 1;
            self.history.push(Event {
                lsn: submitted.lsn,
                first,
                count: 1,
                stamp: over,
                client: None,
                ..repeated.clone()
            });
        }
        if let Ok(submitted) = store.submit(spec.id, first, change, repeated.client.clone(), self.time)
            && !submitted.duplicate
        {
            // The mutant writes again; the oracle compares images with the history, which holds it once.
            repeated.duplicate = true;
        }
        Ok(())
    }

    fn client_read(&mut self) -> Outcome {
        let Some(store) = self.primary.store.clone() else { return Ok(()) };
        let spec = self.volumes.choose(&mut self.rng).expect("volumes").clone();
        let first = self.rng.random_range(0..16);
        let read = match store.read(spec.id, first, 4) {
            Ok(read) => read,
            Err(ReadFailure::Failed(_)) => return Ok(()),
            Err(error) => return Err(broken(format!("a read failed: {error}"))),
        };
        for (n, bytes) in read.data.chunks_exact(BLOCK).enumerate() {
            let block = first + n as u64;
            let expected = self.expected(spec.id, block, Lsn(u64::MAX));
            match Stamp::of(bytes) {
                Some(found) if found == expected => {}
                found => {
                    return Err(broken(format!(
                        "a read of volume {} block {block} gave {found:?}, the newest write is {expected:?}",
                        spec.id
                    )));
                }
            }
        }
        Ok(())
    }

    /// Acknowledges what the rules allow, and remembers it.
    fn acknowledge(&mut self) -> Outcome {
        let Some(store) = self.primary.store.clone() else { return Ok(()) };
        let durable = store.marks().borrow().durable;
        let retained = store.retained();
        let mut acked = 0;
        for event in self.history.iter_mut().rev().take(256) {
            if event.acked.is_some() || event.lsn > durable {
                continue;
            }
            let group = GroupId(event.volume.0.min(2));
            let on_backup = retained.group(group).acked >= event.lsn;
            if !event.both {
                event.acked = Some(on_backup);
                acked += 1;
            } else if on_backup {
                event.acked = Some(true);
                acked += 1;
            }
        }
        self.summary.acked += acked;
        Ok(())
    }

    // --- stages

    fn turn_primary(&mut self) -> Outcome {
        turn(&mut self.primary, &mut self.rng, &mut self.summary);
        self.after_io_of_primary()
    }

    fn after_io_of_primary(&mut self) -> Outcome {
        let failed = self.primary.store.as_ref().and_then(|s| s.failure());
        match failed {
            Some(why) => Err(broken(format!("the primary failed without a fault: {why}"))),
            None => Ok(()),
        }
    }

    fn turn_backup(&mut self) -> Outcome {
        turn(&mut self.backup, &mut self.rng, &mut self.summary);
        let failed = self.backup.store.as_ref().and_then(|s| s.failure());
        if let Some(why) = failed {
            return Err(broken(format!("the backup failed without a fault: {why}")));
        }
        if self.rng.random_bool(0.02) {
            self.check_backup_image()?;
        }
        Ok(())
    }

    // --- network

    fn turn_link(&mut self) -> Outcome {
        if self.sender.is_none() || self.receiver.is_none() {
            self.deliver_late();
            return Ok(());
        }
        if !self.link {
            self.deliver_late();
            return Ok(());
        }
        if self.attaching.is_some() {
            return self.finish_attach();
        }
        if !self.sender.as_ref().is_some_and(Sender::is_attached) {
            return self.attach();
        }
        match self.rng.random_range(0..10) {
            0..4 => self.send()?,
            4..7 => self.deliver_frame()?,
            7..9 => self.answer()?,
            _ => {
                self.deliver_late();
                // A group that was refused is tried again in a new session.
                if self.sender.as_ref().is_some_and(|s| !s.held().is_empty()) {
                    self.cut();
                    self.link = true;
                }
            }
        }
        Ok(())
    }

    fn attach(&mut self) -> Outcome {
        let identity = self.primary.store().identity();
        let hello = Hello {
            pair: identity.pair,
            instance: identity.instance,
            generation: identity.generation,
            generation_id: identity.generation_id,
            protocol: PROTOCOL,
            segment_bytes: SEGMENT,
            durable: self.primary.store().marks().borrow().durable,
        };
        let session = Uid(self.rng.random());
        let receiver = self.receiver.as_mut().expect("checked");
        match receiver.attach(&hello, session) {
            Ok((positions, drained)) => {
                self.attaching = Some((Welcome { session, positions }, drained));
                Ok(())
            }
            Err(error) => Err(broken(format!("the backup refuses its primary: {error}"))),
        }
    }

    fn finish_attach(&mut self) -> Outcome {
        let durable = self.backup.store().marks().borrow().durable;
        let Some((welcome, _)) = self.attaching.take_if(|(_, drained)| *drained <= durable) else { return Ok(()) };
        let sender = self.sender.as_mut().expect("checked");
        sender.on_attached(&welcome).map_err(|e| broken(format!("attach: {e}")))?;
        self.summary.sessions += 1;
        self.wires.push(Wire {
            session: welcome.session,
            frames: VecDeque::new(),
            answers: VecDeque::new(),
            old: false,
        });
        Ok(())
    }

    fn send(&mut self) -> Outcome {
        let sender = self.sender.as_mut().expect("checked");
        let frames = sender.poll(Duration::ZERO, 4096).map_err(|e| broken(format!("the sender cannot go on: {e}")))?;
        if let Some(wire) = self.wires.iter_mut().find(|w| !w.old) {
            wire.frames.extend(frames);
        }
        Ok(())
    }

    fn deliver_frame(&mut self) -> Outcome {
        let Some(wire) = self.wires.iter_mut().find(|w| !w.old) else { return Ok(()) };
        let Some(frame) = wire.frames.pop_front() else { return Ok(()) };
        let receiver = self.receiver.as_mut().expect("checked");
        let (session, ship) = (Uid::from_slice(&frame.session).expect("16 bytes"), frame.ship);
        let record = convert::record_from_wire(frame.clone()).map_err(|e| broken(e.to_string()))?;
        match receiver.on_record(session, ship, &record) {
            Ok(()) => Ok(()),
            Err(FrameRefusal::Busy(_)) => {
                wire.frames.push_front(frame);
                Ok(())
            }
            Err(error @ (FrameRefusal::Gap { .. } | FrameRefusal::OldSession(_))) if self.faults.late_frames => {
                // Only a disturbed session may see these; it ends, and the next one repeats.
                let _ = error;
                self.cut();
                self.link = true;
                Ok(())
            }
            Err(error) => Err(broken(format!("an undisturbed session was refused: {error}"))),
        }
    }

    fn answer(&mut self) -> Outcome {
        let durable = self.backup.store().marks().borrow().durable;
        let receiver = self.receiver.as_mut().expect("checked");
        let Some((session, answer)) = receiver.poll_answer(durable) else { return Ok(()) };
        let ack = v1::StagedAck {
            session: Bytes::copy_from_slice(&session.0),
            ship: answer.ship,
            refusals: answer
                .refusals
                .iter()
                .map(|r| v1::Refusal {
                    group_id: r.group.0,
                    volume_id: r.volume.0,
                    position: Some(r.position.into()),
                    cause: r.cause.into(),
                    message: r.message.clone(),
                })
                .collect(),
        };
        let Some(wire) = self.wires.iter_mut().find(|w| !w.old && w.session == session) else { return Ok(()) };
        wire.answers.push_back(ack);
        if self.rng.random_bool(0.7)
            && let Some(ack) = wire.answers.pop_front()
        {
            let sender = self.sender.as_mut().expect("checked");
            if let Err(error) = sender.on_ack(&ack) {
                return Err(broken(format!("an answer was refused: {error}")));
            }
        }
        Ok(())
    }

    fn cut(&mut self) {
        self.link = false;
        self.attaching = None;
        if let Some(sender) = &mut self.sender {
            sender.on_detached();
        }
        for wire in &mut self.wires {
            wire.old = true;
            wire.answers.clear();
        }
        if !self.faults.late_frames {
            self.wires.clear();
        }
        let excess = self.wires.len().saturating_sub(3);
        self.wires.drain(..excess);
    }

    /// A frame of a connection that is gone arrives after all.
    fn deliver_late(&mut self) {
        let Some(receiver) = &mut self.receiver else { return };
        if let Some(frame) = self.wires.iter_mut().filter(|w| w.old).find_map(|w| w.frames.pop_front()) {
            let session = Uid::from_slice(&frame.session).expect("16 bytes");
            let ship = frame.ship;
            if let Ok(record) = convert::record_from_wire(frame) {
                // Whatever the receiver says goes to nobody.
                let _ = receiver.on_record(session, ship, &record);
            }
        }
    }

    // --- crashes

    fn crash_primary(&mut self) -> Outcome {
        if self.primary.store.is_none() {
            return Ok(());
        }
        self.summary.crashes += 1;
        self.cut();
        self.sender = None;
        crash_inside(&mut self.primary, &mut self.rng, self.faults.power_loss);
        self.crash_in_recovery(true)?;
        self.start_primary()?;
        self.link = true;
        Ok(())
    }

    fn crash_backup(&mut self) -> Outcome {
        if self.backup.store.is_none() {
            return Ok(());
        }
        self.summary.crashes += 1;
        self.cut();
        self.receiver = None;
        crash_inside(&mut self.backup, &mut self.rng, self.faults.power_loss);
        self.crash_in_recovery(false)?;
        self.start_backup()?;
        self.link = true;
        Ok(())
    }

    /// Recovery is itself interrupted now and then.
    fn crash_in_recovery(&mut self, primary: bool) -> Outcome {
        let power = self.faults.power_loss;
        for _ in 0..2 {
            if self.rng.random_bool(0.3) {
                let node = if primary { &mut self.primary } else { &mut self.backup };
                node.disk.crash_after(self.rng.random_range(0..40));
                let _ = node.open(&mut self.rng);
                node.crash(&mut self.rng, power);
            }
        }
        Ok(())
    }

    // --- the oracle

    /// Writes that had no acknowledgement and are not in the journal never happened.
    fn forget_lost_events(&mut self) {
        let next = self.primary.store().next_lsn();
        self.history.retain(|e| e.lsn < next || e.acked.is_some());
        for (who, next) in self.next_sequence.iter_mut().enumerate() {
            let name = format!("c{who}");
            *next = self
                .history
                .iter()
                .filter_map(|e| e.client.as_ref().filter(|c| c.client == name).map(|c| c.sequence + 1))
                .max()
                .unwrap_or(1);
        }
    }

    /// The stamp of a block in the image of `position`.
    fn expected(&self, volume: VolumeId, block: u64, position: Lsn) -> Stamp {
        self.history
            .iter()
            .rev()
            .filter(|e| e.volume == volume && e.lsn <= position && (e.first..e.first + e.count).contains(&block))
            .max_by_key(|e| e.lsn)
            .map_or(Stamp(0), |e| e.stamp)
    }

    fn images(&self, volume: VolumeId, position: Lsn) -> Vec<Stamp> {
        let mut image = vec![Stamp(0); usize::try_from(BLOCKS).expect("small")];
        let mut events: Vec<&Event> = self.history.iter().filter(|e| e.volume == volume && e.lsn <= position).collect();
        events.sort_by_key(|e| e.lsn);
        for event in events {
            for block in event.first..event.first + event.count {
                image[usize::try_from(block).expect("small")] = event.stamp;
            }
        }
        image
    }

    fn compare(&self, store: &Arc<Store>, volume: VolumeId, position: Lsn, who: &str) -> Outcome {
        let read = match store.read(volume, 0, BLOCKS) {
            Ok(read) => read,
            Err(error) => return Err(broken(format!("{who}: volume {volume} cannot be read: {error}"))),
        };
        let image = self.images(volume, position);
        for (block, (bytes, expected)) in read.data.chunks_exact(BLOCK).zip(image).enumerate() {
            let found = Stamp::of(bytes);
            if found != Some(expected) {
                return Err(broken(format!(
                    "{who}: volume {volume} block {block} holds {found:?}, the image at {position} has {expected:?}"
                )));
            }
        }
        Ok(())
    }

    /// P1 on the primary after a recovery: its image is exactly the history up to what it recovered, and everything
    /// acknowledged is in there.
    fn check_acked_on_primary(&mut self) -> Outcome {
        let store = Arc::clone(self.primary.store());
        let newest = Lsn(store.next_lsn().0 - 1);
        if let Some(lost) = self.history.iter().find(|e| e.acked.is_some() && e.lsn > newest) {
            return Err(broken(format!(
                "write {} was acknowledged and is lost: the journal ends at {newest}",
                lost.lsn
            )));
        }
        for spec in &self.volumes {
            self.compare(&store, spec.id, newest, "the primary after recovery")?;
        }
        Ok(())
    }

    /// P4: each volume on the backup is the image at the position the backup names; P1 for `both`.
    fn check_backup_image(&mut self) -> Outcome {
        let store = Arc::clone(self.backup.store());
        let state = store.state();
        for spec in &self.volumes {
            if !state.volumes.contains_key(&spec.id) {
                continue;
            }
            let position = state.groups.get(&spec.group).map_or(Lsn::ZERO, |g| g.position.lsn);
            self.compare(&store, spec.id, position, "the backup")?;
        }
        for event in self.history.iter().filter(|e| e.acked == Some(true)) {
            let group = GroupId(event.volume.0.min(2));
            let position = state.groups.get(&group).map_or(Lsn::ZERO, |g| g.position.lsn);
            if position < event.lsn {
                return Err(broken(format!(
                    "write {} was acknowledged as durable on both sides; the backup is at {position}",
                    event.lsn
                )));
            }
        }
        Ok(())
    }

    /// Faults end; the pair must come to rest with equal images.
    fn settle(&mut self) -> Outcome {
        self.link = true;
        self.faults.cuts = false;
        self.faults.late_frames = false;
        self.wires.retain(|w| !w.old);
        if self.wires.is_empty() {
            self.cut();
            self.link = true;
        }
        for _ in 0..60_000 {
            if self.is_quiet() {
                break;
            }
            turn(&mut self.primary, &mut self.rng, &mut self.summary);
            turn(&mut self.backup, &mut self.rng, &mut self.summary);
            self.after_io_of_primary()?;
            self.turn_link()?;
        }
        self.acknowledge()?;
        if !self.is_quiet() {
            let retained = self.primary.store().retained();
            let held = self.sender.as_ref().map(Sender::held);
            return Err(broken(format!("the pair does not come to rest: {retained:?}, held {held:?}")));
        }
        for (node, who) in [(&self.primary, "the primary at the end"), (&self.backup, "the backup at the end")] {
            for spec in &self.volumes {
                self.compare(node.store(), spec.id, Lsn(u64::MAX), who)?;
            }
        }
        let trace = self.history.iter().fold(self.summary.trace, |t, e| (t ^ e.lsn.0).wrapping_mul(0x100_0000_01b3));
        self.summary.trace = trace;
        Ok(())
    }

    fn is_quiet(&self) -> bool {
        let settled = |store: &Arc<Store>| {
            let marks = *store.marks().borrow();
            marks.applied.next() == store.next_lsn()
        };
        settled(self.primary.store())
            && settled(self.backup.store())
            && self.primary.store().retained().oldest().is_none()
    }
}

/// One step of one stage of a node.
fn turn(node: &mut Node, rng: &mut Pcg64Mcg, summary: &mut Summary) {
    let Some(store) = node.store.clone() else { return };
    match rng.random_range(0..12) {
        0..3 => {
            if node.batch.is_none() {
                node.batch = store.take_batch();
            }
        }
        3..6 => {
            if let Some(job) = node.batch.take() {
                let result = job.run();
                store.finish_batch(job, result);
            }
        }
        6..8 => {
            if node.apply.is_none() {
                node.apply = store.take_apply();
            }
        }
        8..10 => {
            if let Some(mut job) = node.apply.take() {
                let result = job.run();
                store.finish_apply(job, result);
            }
        }
        10 => {
            store.sweep();
            if node.checkpoint.is_none()
                && (store.checkpoint_due() || store.checkpoint_requested() || rng.random_bool(0.1))
            {
                node.checkpoint = store.take_checkpoint();
            }
        }
        _ => {
            if let Some(job) = node.checkpoint.take() {
                let result = job.run();
                store.finish_checkpoint(job, result);
                summary.checkpoints += 1;
            }
        }
    }
}

/// Loses a node before, inside or after whatever it has under way.
fn crash_inside(node: &mut Node, rng: &mut Pcg64Mcg, power: bool) {
    if rng.random_bool(0.7) {
        node.disk.crash_after(rng.random_range(0..12));
        let store = node.store.clone().expect("the node is up");
        // What is under way gets as far as the disk lets it.
        if rng.random_bool(0.5)
            && let Some(job) = node.checkpoint.take().or_else(|| store.take_checkpoint())
        {
            let _ = job.run();
        }
        if let Some(mut job) = node.apply.take() {
            let _ = job.run();
        }
        if let Some(job) = node.batch.take().or_else(|| store.take_batch()) {
            let _ = job.run();
        }
    }
    node.crash(rng, power);
}

/// Runs `seeds` seeds from `first` on; the first violation names its seed.
///
/// # Errors
/// The seed and what it broke.
pub fn run_many(first: u64, seeds: u64, steps: u32) -> Result<BTreeMap<&'static str, u64>, (u64, Violation)> {
    let mut totals = BTreeMap::new();
    for seed in first..first + seeds {
        let summary = run(seed, steps).map_err(|violation| (seed, violation))?;
        for (name, value) in [
            ("acked", summary.acked),
            ("crashes", summary.crashes),
            ("sessions", summary.sessions),
            ("checkpoints", summary.checkpoints),
        ] {
            *totals.entry(name).or_default() += value;
        }
    }
    Ok(totals)
}
