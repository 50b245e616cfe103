//! The pool against plain arrays: random operations, checkpoints, crashes and replay; every step is checked. The power
//! fails between operations, and at any call to the disk within one: a write in place, the sync of a device or of the
//! catalogue, a device that is made, grown or wiped, and the recovery from an earlier failure.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_pcg::Pcg64Mcg;

use super::super::{chunk::HOLE, map::Key, volumes::LayerState, *};
use crate::{
    checksum::crc32c,
    storage::sim::SimStorage,
    types::{AckRule, AwayRule, BlockRange, BlockSize, GroupId, LayerId, SegmentId, VolumeSpec},
};

const UID: Uid = Uid([7; 16]);
const SEGMENT: u32 = 64 * 1024;
/// Virtual segments that are written: few, at the edges of chunks, and the last one, which is cut.
const HOT: [u64; 7] = [0, 1, 63, 64, 65, 130, 199];

pub(super) fn spec(id: u64, block_bytes: u32, size_bytes: u64) -> VolumeSpec {
    VolumeSpec {
        id: VolumeId(id),
        name: format!("v{id}"),
        group: GroupId(id),
        group_name: format!("v{id}"),
        size_bytes,
        block_size: BlockSize::new(block_bytes).unwrap(),
        segment_bytes: SEGMENT,
        ack: AckRule::Staged,
        away: AwayRule::Block,
    }
}

/// The contents of a block: 0 for zeros, else a number that only this write has.
fn fill(stamp: u32, bytes: u32) -> Vec<u8> {
    let mut out = vec![0; bytes as usize];
    for (i, part) in out.chunks_exact_mut(4).enumerate() {
        part.copy_from_slice(&if stamp == 0 { 0 } else { stamp ^ (i as u32) << 20 }.to_le_bytes());
    }
    out
}

#[derive(Clone)]
struct Image(Vec<u32>);

#[derive(Clone)]
struct VolumeModel {
    spec: VolumeSpec,
    head: Image,
    snapshots: Vec<(LayerId, Image)>,
}

type Model = BTreeMap<VolumeId, VolumeModel>;

/// A record of the imagined journal.
#[derive(Clone, Debug)]
enum Op {
    CreateVolume(VolumeSpec),
    DeleteVolume(VolumeId),
    Grow(VolumeId, u64),
    Write(VolumeId, u64, Vec<u32>),
    Reference(VolumeId, u64, Vec<SegmentId>, Vec<u32>),
    Zero(VolumeId, u64, u64),
    Snapshot(VolumeId, LayerId),
    DeleteSnapshot(VolumeId, LayerId),
    RollBack(VolumeId, LayerId),
}

fn apply_to_model(model: &mut Model, op: &Op) {
    let set = |v: &mut VolumeModel, first: u64, stamps: &[u32]| {
        v.head.0[first as usize..first as usize + stamps.len()].copy_from_slice(stamps);
    };
    match op {
        Op::CreateVolume(spec) => {
            let head = Image(vec![0; spec.block_count() as usize]);
            model.insert(spec.id, VolumeModel { spec: spec.clone(), head, snapshots: Vec::new() });
        }
        Op::DeleteVolume(id) => drop(model.remove(id)),
        Op::Grow(id, size) => {
            let v = model.get_mut(id).unwrap();
            v.spec.size_bytes = *size;
            let blocks = v.spec.block_count() as usize;
            v.head.0.resize(blocks, 0);
            v.snapshots.iter_mut().for_each(|(_, image)| image.0.resize(blocks, 0));
        }
        Op::Write(id, first, stamps) | Op::Reference(id, first, _, stamps) => {
            set(model.get_mut(id).unwrap(), *first, stamps);
        }
        Op::Zero(id, first, count) => set(model.get_mut(id).unwrap(), *first, &vec![0; *count as usize]),
        Op::Snapshot(id, layer) => {
            let v = model.get_mut(id).unwrap();
            v.snapshots.push((*layer, v.head.clone()));
        }
        Op::DeleteSnapshot(id, layer) => model.get_mut(id).unwrap().snapshots.retain(|(l, _)| l != layer),
        Op::RollBack(id, layer) => {
            let v = model.get_mut(id).unwrap();
            v.head = v.snapshots.iter().find(|(l, _)| l == layer).unwrap().1.clone();
        }
    }
}

/// A record whose segments must keep its data, from its pin to the checkpoint after its unpin.
#[derive(Clone)]
struct Retained {
    volume: VolumeId,
    block_bytes: u32,
    first: u64,
    segments: Vec<SegmentId>,
    stamps: Vec<u32>,
    /// `Some(capture that covers the unpin)` once released.
    released: Option<u64>,
}

struct Reader {
    ticket: ReadTicket,
    volume: VolumeId,
    layer: Option<LayerId>,
    pieces: Vec<Piece>,
    expected: Image,
    block_size: BlockSize,
    /// The number of operations before it.
    since: usize,
}

/// The power failed at a call to the disk.
struct Died;

type Step<T = ()> = Result<T, Died>;

/// What the last checkpoint holds, under this name of the catalogue: the number of its capture.
const CAPTURE: &str = "model-capture";

/// What a capture includes.
#[derive(Clone)]
struct Captured {
    number: u64,
    operations: usize,
    model: Model,
}

struct World {
    rng: Pcg64Mcg,
    storage: SimStorage,
    config: PoolConfig,
    catalog: Option<Catalog>,
    pool: Option<Pool>,
    model: Model,
    /// The model at the last durable checkpoint, and the operations since.
    base: Model,
    log: Vec<Op>,
    /// All operations that ever were.
    history: Vec<Op>,
    /// Operations that `log` lost to checkpoints.
    trimmed: usize,
    capture: Option<(Capture, Captured)>,
    captures: u64,
    /// A checkpoint whose commit the disk has not answered yet.
    committing: Option<Captured>,
    retained: Vec<Retained>,
    readers: Vec<Reader>,
    next_device: u32,
    next: u32,
    next_volume: u64,
    seen: Seen,
}

impl World {
    fn new(seed: u64) -> Self {
        let storage = SimStorage::new(seed);
        let device = |n: u32, segments: u64, grows: bool| DeviceConfig {
            path: format!("pool/{n}"),
            size_bytes: (!grows).then_some(4096 + segments.div_ceil(8) * 8 * 512 + segments * u64::from(SEGMENT)),
            max_bytes: grows.then_some(4096 + 2 * 8 * (512 + u64::from(SEGMENT))),
        };
        let config = PoolConfig {
            segment_bytes: SEGMENT,
            devices: vec![device(0, 44, false), device(1, 0, true)],
            map_cache_bytes: 2000,
        };
        let catalog = Catalog::open(&storage, 1 << 20).unwrap();
        let pool = Pool::create_with_zones(Arc::new(storage.clone()), &catalog, UID, &config, 8).unwrap();
        let mut world = Self {
            rng: Pcg64Mcg::seed_from_u64(seed),
            storage,
            config,
            catalog: Some(catalog),
            pool: Some(pool),
            model: Model::new(),
            base: Model::new(),
            log: Vec::new(),
            history: Vec::new(),
            trimmed: 0,
            capture: None,
            captures: 0,
            committing: None,
            retained: Vec::new(),
            readers: Vec::new(),
            next_device: 2,
            next: 0,
            next_volume: 3,
            seen: Seen::default(),
        };
        // Sizes that end inside a segment.
        for spec in [spec(1, 4096, 200 * 65536 - 3 * 4096), spec(2, 512, 200 * 65536 - 5 * 512)] {
            assert!(world.run(Op::CreateVolume(spec)).is_ok());
        }
        world
    }

    fn pool(&mut self) -> &mut Pool {
        self.pool.as_mut().unwrap()
    }

    /// Nothing but a power failure may let a call fail.
    fn lived<T, E: std::fmt::Debug>(&self, result: Result<T, E>) -> Step<T> {
        result.map_err(|error| {
            assert!(self.storage.has_crashed(), "{error:?}");
            Died
        })
    }

    fn sync(&mut self) -> Step {
        let synced = self.pool().io().sync_devices();
        self.lived(synced)
    }

    fn fresh(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    /// Journals an operation and applies it.
    fn run(&mut self, op: Op) -> Step {
        self.journal(&op);
        self.apply(&op)
    }

    fn journal(&mut self, op: &Op) {
        apply_to_model(&mut self.model, op);
        self.history.push(op.clone());
        self.log.push(op.clone());
    }

    fn apply(&mut self, op: &Op) -> Step {
        let mut plan = IoPlan::new();
        self.plan(op, &mut plan);
        let performed = self.pool().io().perform(&mut plan);
        self.lived(performed)
    }

    fn plan(&mut self, op: &Op, plan: &mut IoPlan) {
        let pool = self.pool.as_mut().unwrap();
        match op {
            Op::CreateVolume(spec) => pool.create_volume(spec).unwrap(),
            Op::DeleteVolume(id) => pool.delete_volume(*id).unwrap(),
            Op::Grow(id, size) => pool.grow_volume(*id, *size).unwrap(),
            Op::Write(id, first, stamps) => {
                let bytes = pool.volumes[id].spec.block_size.bytes();
                let blocks: Vec<_> = stamps.iter().map(|s| fill(*s, bytes)).collect();
                let crcs: Vec<_> = blocks.iter().map(|b| crc32c(b)).collect();
                pool.plan_write(*id, *first, &Bytes::from(blocks.concat()), &crcs, plan).unwrap();
            }
            Op::Reference(id, first, segments, _) => pool.plan_reference(*id, *first, segments).unwrap(),
            Op::Zero(id, first, count) => pool.plan_zero(*id, *first, *count).unwrap(),
            Op::Snapshot(id, layer) => pool.create_snapshot(*id, *layer).unwrap(),
            Op::DeleteSnapshot(_, layer) => pool.delete_snapshot(*layer).unwrap(),
            Op::RollBack(id, layer) => pool.roll_back(*id, *layer).unwrap(),
        }
    }

    // --- the steps

    fn some_volume(&mut self) -> VolumeModel {
        let ids: Vec<_> = self.model.keys().copied().collect();
        self.model[ids.choose(&mut self.rng).unwrap()].clone()
    }

    fn some_range(&mut self, v: &VolumeModel, most: u64) -> (u64, u64) {
        let per = u64::from(v.spec.blocks_per_segment());
        let first = *HOT.choose(&mut self.rng).unwrap() * per + self.rng.random_range(0..per);
        let first = first.min(v.spec.block_count() - 1);
        (first, self.rng.random_range(1..=most.min(v.spec.block_count() - first)))
    }

    /// A step, and the restart if the power fails in it.
    fn step(&mut self) {
        if self.rng.random_bool(0.01) {
            self.storage.crash_after(self.rng.random_range(1..20));
        }
        if self.try_step().is_err() {
            self.seen.deaths += 1;
            self.crash();
        }
    }

    fn try_step(&mut self) -> Step {
        match self.rng.random_range(0..124) {
            100..106 => return self.add_device(),
            106..110 => self.drain(),
            110 => self.cancel_drain(),
            111..124 => return self.relocate(),
            0..40 => return self.write(),
            40..48 => return self.reference(),
            48..54 => {
                let v = self.some_volume();
                let per = u64::from(v.spec.blocks_per_segment());
                let most = if self.rng.random_bool(0.1) { u64::MAX } else { 2 * per };
                let (first, count) = self.some_range(&v, most);
                return self.run(Op::Zero(v.spec.id, first, count));
            }
            54..60 => {
                let v = self.some_volume();
                if v.snapshots.len() < 4 {
                    let layer = LayerId(u64::from(self.fresh()));
                    return self.run(Op::Snapshot(v.spec.id, layer));
                }
            }
            60..65 => {
                let v = self.some_volume();
                if let Some((layer, _)) = v.snapshots.choose(&mut self.rng) {
                    return self.run(Op::DeleteSnapshot(v.spec.id, *layer));
                }
            }
            65..68 => {
                let v = self.some_volume();
                if let Some((layer, _)) = v.snapshots.last() {
                    return self.run(Op::RollBack(v.spec.id, *layer));
                }
            }
            68..74 => {
                let most = self.rng.random_range(1..6);
                let swept = self.pool().sweep_step(most);
                return self.lived(swept).map(drop);
            }
            74..80 => self.begin_capture(),
            80..86 => return self.finish_capture(),
            86..90 => self.begin_read(),
            90..93 => self.release(),
            93..95 => self.crash(),
            95 => return self.replace_volume(),
            96 => {
                let v = self.some_volume();
                let size = v.spec.size_bytes + 512 * 8 * self.rng.random_range(0..3);
                return self.run(Op::Grow(v.spec.id, size));
            }
            97 => return self.grow_pool(),
            _ => self.end_reads(),
        }
        Ok(())
    }

    fn has_space(&mut self, volume: VolumeId, first: u64, count: u64) -> bool {
        let need = self.pool().allocation_need(BlockRange { volume, first, count }).unwrap();
        need <= self.pool().space().free()
    }

    /// A few writes in one plan.
    fn write(&mut self) -> Step {
        let mut plan = IoPlan::new();
        for _ in 0..self.rng.random_range(1..4) {
            let v = self.some_volume();
            let most = if self.rng.random_bool(0.2) { 2 * u64::from(v.spec.blocks_per_segment()) } else { 4 };
            let (first, count) = self.some_range(&v, most);
            if !self.has_space(v.spec.id, first, count) {
                continue;
            }
            let range = BlockRange { volume: v.spec.id, first, count };
            let need = self.pool().allocation_need(range).unwrap();
            let free = self.pool().space().free();
            let op = Op::Write(v.spec.id, first, (0..count).map(|_| self.fresh()).collect());
            self.plan(&op, &mut plan);
            assert_eq!(free - self.pool().space().free(), need, "what was needed is what was taken");
            self.journal(&op);
        }
        let performed = self.pool().io().perform(&mut plan);
        self.lived(performed)
    }

    fn reference(&mut self) -> Step {
        let v = self.some_volume();
        let (per, bytes) = (u64::from(v.spec.blocks_per_segment()), v.spec.block_size.bytes());
        let first = *HOT.choose(&mut self.rng).unwrap() * per;
        let count = (per * self.rng.random_range(1..3)).min(v.spec.block_count() - first);
        let Ok(segments) = self.pool().allocate_reference(count.div_ceil(per)) else { return Ok(()) };
        let stamps: Vec<u32> = (0..count).map(|_| self.fresh()).collect();
        for (i, segment) in segments.iter().enumerate() {
            let part = &stamps[i * per as usize..stamps.len().min((i + 1) * per as usize)];
            let blocks: Vec<_> = part.iter().map(|s| fill(*s, bytes)).collect();
            let crcs: Vec<_> = blocks.iter().map(|b| crc32c(b)).collect();
            let at = first + i as u64 * per;
            let written = self.pool().io().write_reference(v.spec.id, at, *segment, &blocks.concat(), &crcs);
            self.lived(written)?;
        }
        if self.rng.random_bool(0.2) {
            self.check_structure();
            self.pool().release_unreferenced(&segments).unwrap();
            return Ok(());
        }
        self.sync()?;
        segments.iter().for_each(|s| self.pool().pin(*s));
        if self.rng.random_bool(0.3) {
            self.begin_capture();
        }
        self.check_structure();
        self.retained.push(Retained {
            volume: v.spec.id,
            block_bytes: bytes,
            first,
            segments: segments.clone(),
            stamps: stamps.clone(),
            released: None,
        });
        self.run(Op::Reference(v.spec.id, first, segments, stamps))
    }

    fn release(&mut self) {
        let held: Vec<_> = (0..self.retained.len()).filter(|i| self.retained[*i].released.is_none()).collect();
        let Some(&at) = held.choose(&mut self.rng) else { return };
        self.retained[at].released = Some(self.captures + 1);
        for segment in self.retained[at].segments.clone() {
            self.pool().unpin(segment);
        }
    }

    fn begin_capture(&mut self) {
        let capture = self.pool().capture();
        self.captures += 1;
        let operations = self.trimmed + self.log.len();
        self.capture = Some((capture, Captured { number: self.captures, operations, model: self.model.clone() }));
    }

    fn finish_capture(&mut self) -> Step {
        let Some((capture, captured)) = self.capture.take() else { return Ok(()) };
        self.sync()?;
        if self.rng.random_bool(0.1) {
            self.crash();
            return Ok(());
        }
        let catalog = self.catalog.clone().unwrap();
        let number = captured.number.to_le_bytes();
        self.committing = Some(captured);
        let committed = catalog.write(|txn| {
            capture.write_into(txn)?;
            txn.put_meta(CAPTURE, &number).map_err(PoolError::from)
        });
        self.lived(committed)?;
        self.committed();
        if self.rng.random_bool(0.1) {
            self.crash();
            return Ok(());
        }
        self.pool().checkpoint_done(capture.id());
        for removed in self.pool().take_removed() {
            self.seen.removed += 1;
            self.pool().on_wiped(removed.number);
            if self.rng.random_bool(0.8) {
                let wiped = removed.wipe();
                self.lived(wiped)?;
                assert!(self.storage.read_all(&removed.path).unwrap()[..4096].iter().all(|b| *b == 0));
            }
        }
        Ok(())
    }

    /// The checkpoint that was being committed is the last one now.
    fn committed(&mut self) {
        let Some(captured) = self.committing.take() else { return };
        self.log.drain(..captured.operations - self.trimmed);
        self.trimmed = captured.operations;
        self.base = captured.model;
        self.retained.retain(|r| r.released.is_none_or(|c| c > captured.number));
    }

    // --- devices

    fn add_device(&mut self) -> Step {
        let sizes = |n: u64| 4096 + n.div_ceil(8) * 8 * 512 + n * u64::from(SEGMENT);
        let standing = |d: &DeviceInfo| d.standing != DeviceStanding::Removed;
        let present: Vec<_> = self.pool().devices().into_iter().filter(standing).collect();
        if present.len() > 7 {
            return Ok(());
        }
        // Now and then one that is there, or was there.
        let path = if self.rng.random_bool(0.3) {
            format!("pool/{}", self.rng.random_range(0..self.next_device))
        } else {
            self.next_device += 1;
            format!("pool/{}", self.next_device - 1)
        };
        let grows = self.rng.random_bool(0.3);
        let size_bytes = (!grows).then_some(sizes(self.rng.random_range(1..40)));
        let config = DeviceConfig { path: path.clone(), size_bytes, max_bytes: grows.then_some(sizes(24)) };
        let new = match self.pool().new_device(config) {
            Ok(new) => new,
            Err(MemberError::InUse { number, .. }) => {
                assert!(present.iter().any(|d| d.number == number && d.path == path));
                return Ok(());
            }
            Err(other) => panic!("{other}"),
        };
        assert!(!present.iter().any(|d| d.path == path));
        let made = new.make();
        let made = self.lived(made)?;
        if self.rng.random_bool(0.1) {
            self.crash();
            return Ok(());
        }
        if self.rng.random_bool(0.1) {
            self.pool().abandon(new);
            return Ok(());
        }
        let number = self.pool().attach(new, made);
        assert_eq!(self.pool().devices()[usize::from(number)].segments, 0, "not before a checkpoint names it");
        Ok(())
    }

    fn drain(&mut self) {
        let serving = |d: &DeviceInfo| d.standing == DeviceStanding::Serving;
        let devices: Vec<_> = self.pool().devices().into_iter().filter(serving).collect();
        let Some(device) = devices.choose(&mut self.rng) else { return };
        match self.pool().drain(&device.path) {
            Ok(number) => assert_eq!(number, device.number),
            Err(MemberError::Last { .. }) => assert_eq!(devices.len(), 1),
            Err(MemberError::NoRoom { needed_bytes, available_bytes, .. }) => assert!(needed_bytes > available_bytes),
            Err(other) => panic!("{other}"),
        }
    }

    fn cancel_drain(&mut self) {
        let draining = |d: &DeviceInfo| d.standing == DeviceStanding::Draining;
        if let Some(device) = self.pool().devices().into_iter().find(draining) {
            self.pool().cancel_drain(&device.path).unwrap();
        }
    }

    fn relocate(&mut self) -> Step {
        self.pool().tend_devices();
        let most = self.rng.random_range(1..8);
        // A walk comes by chunks with nothing to be moved.
        let job = (0..12).find_map(|_| self.pool().plan_relocation(most).unwrap());
        let Some(mut job) = job else { return Ok(()) };
        if self.rng.random_bool(0.3) {
            self.check_structure();
        }
        let ran = job.run();
        self.lived(ran)?;
        assert!(job.damaged().is_empty());
        if self.rng.random_bool(0.05) {
            self.crash();
            return Ok(());
        }
        if self.rng.random_bool(0.3) {
            // As admission does, which asks where writes would go.
            let v = self.some_volume();
            let (first, count) = self.some_range(&v, 20);
            self.pool().allocation_need(BlockRange { volume: v.spec.id, first, count }).unwrap();
        }
        self.seen.moved += job.segments();
        self.pool().finish_relocation(&job).unwrap();
        Ok(())
    }

    fn begin_read(&mut self) {
        let v = self.some_volume();
        let snapshot = v.snapshots.choose(&mut self.rng).cloned().filter(|_| self.rng.random_bool(0.5));
        let (layer, expected) = snapshot.map_or((None, v.head.clone()), |(l, image)| (Some(l), image));
        let ticket = self.pool().begin_read();
        let mut pieces = Vec::new();
        self.pool().resolve(v.spec.id, layer, 0, v.spec.block_count(), &mut pieces).unwrap();
        pieces.retain(|p| p.at.is_some());
        let since = self.history.len();
        let block_size = v.spec.block_size;
        self.readers.push(Reader { ticket, volume: v.spec.id, layer, pieces, expected, block_size, since });
    }

    /// Reads what was resolved long ago: nothing but writes in place may have changed it.
    fn end_reads(&mut self) {
        for reader in std::mem::take(&mut self.readers) {
            if self.model.contains_key(&reader.volume) {
                let changed = written_in_place(
                    &self.history[reader.since..],
                    reader.volume,
                    reader.layer,
                    reader.expected.0.len(),
                );
                self.check_pieces(reader.volume, reader.block_size, &reader.pieces, &reader.expected, &changed);
            }
            self.pool().end_read(reader.ticket);
        }
    }

    fn replace_volume(&mut self) -> Step {
        let v = self.some_volume();
        if self.retained.iter().any(|r| r.volume == v.spec.id) || self.rng.random_bool(0.5) {
            return Ok(());
        }
        self.run(Op::DeleteVolume(v.spec.id))?;
        let id = self.next_volume;
        self.next_volume += 1;
        self.run(Op::CreateVolume(spec(id, v.spec.block_size.bytes(), 200 * 65536 - 4096)))
    }

    fn grow_pool(&mut self) -> Step {
        let Some(growth) = self.pool().grow() else { return Ok(()) };
        assert!(self.pool().grow().is_none());
        let done = if self.rng.random_bool(0.2) { Err(std::io::Error::other("full")) } else { growth.perform() };
        self.pool().finish_grow(&growth, &done);
        self.sync()
    }

    /// The power fails, and may fail again while the node comes back.
    fn crash(&mut self) {
        loop {
            self.seen.crashes += 1;
            self.readers.clear();
            self.capture = None;
            self.pool = None;
            self.catalog = None;
            self.storage.crash(&mut self.rng);
            if self.rng.random_bool(0.2) {
                self.storage.crash_after(self.rng.random_range(1..20));
            }
            if self.recover().is_ok() {
                return;
            }
            self.seen.deaths += 1;
        }
    }

    fn recover(&mut self) -> Step {
        let catalog = self.lived(Catalog::open(&self.storage, 1 << 20))?;
        let pool = Pool::open(Arc::new(self.storage.clone()), &catalog, UID, &self.config);
        self.pool = Some(self.lived(pool)?);
        let committed = catalog.read().unwrap().meta(CAPTURE).unwrap();
        self.catalog = Some(catalog);
        if self.committing.as_ref().is_some_and(|c| committed.is_some_and(|number| number == c.number.to_le_bytes())) {
            self.committed();
        }
        self.committing = None;
        self.check_base();
        let referred = |op: &Op| if let Op::Reference(_, _, ids, _) = op { ids.clone() } else { Vec::new() };
        let in_log: Vec<_> = self.log.iter().flat_map(referred).collect();
        // A release is not durable before the next checkpoint: what is not covered is retained again.
        for r in &mut self.retained {
            r.released = None;
        }
        let held: Vec<_> = self.retained.iter().flat_map(|r| r.segments.clone()).collect();
        in_log.iter().chain(&held).for_each(|s| self.pool().pin(*s));
        for op in self.log.clone() {
            if self.rng.random_bool(0.2) {
                let swept = self.pool().sweep_step(2);
                self.lived(swept)?;
            }
            self.apply(&op)?;
        }
        in_log.iter().for_each(|s| self.pool().unpin(*s));
        self.sync()
    }

    // --- the checks

    /// The image of the last checkpoint is whole: only what was written in place since may differ.
    fn check_base(&mut self) {
        let (base, log) = (self.base.clone(), self.log.clone());
        for v in base.values() {
            let snapshots = v.snapshots.iter().map(|(layer, image)| (Some(*layer), image));
            for (layer, image) in [(None, &v.head)].into_iter().chain(snapshots) {
                let mut pieces = Vec::new();
                self.pool().resolve(v.spec.id, layer, 0, v.spec.block_count(), &mut pieces).unwrap();
                let changed = written_in_place(&log, v.spec.id, layer, image.0.len());
                self.check_pieces(v.spec.id, v.spec.block_size, &pieces, image, &changed);
            }
        }
    }

    /// What a snapshot and a newer image are said to share is the same in both.
    fn check_changes(&mut self, v: &VolumeModel) {
        for (n, (base, image)) in v.snapshots.iter().enumerate() {
            let newer = v.snapshots[n + 1..].iter().map(|(layer, image)| (Some(*layer), image));
            for (target, other) in newer.chain([(None, &v.head)]) {
                let mut differs = vec![false; image.0.len()];
                let mut from = Some(0);
                while let Some(first) = from {
                    let (ranges, next) = self.pool().changed_blocks(v.spec.id, *base, target, first, 2).unwrap();
                    for block in ranges.iter().flat_map(|range| range.first..range.end()) {
                        assert!(!std::mem::replace(&mut differs[block as usize], true), "block {block} comes twice");
                    }
                    from = next;
                }
                let same = (0..differs.len()).all(|b| differs[b] || image.0[b] == other.0[b]);
                assert!(same, "{:?}: {base:?} and {target:?} differ in blocks that were not named", v.spec.id);
            }
        }
    }

    fn check_images(&mut self) {
        for v in self.model.clone().values() {
            self.check_changes(v);
            let snapshots = v.snapshots.iter().map(|(layer, image)| (Some(*layer), image));
            for (layer, image) in [(None, &v.head)].into_iter().chain(snapshots) {
                let mut pieces = Vec::new();
                self.pool().resolve(v.spec.id, layer, 0, v.spec.block_count(), &mut pieces).unwrap();
                let mut next = 0;
                for p in &pieces {
                    assert_eq!(p.first_block, next, "in order, without gaps");
                    next += p.count;
                    if p.at.is_none() {
                        let blocks = &image.0[p.first_block as usize..next as usize];
                        assert!(blocks.iter().all(|b| *b == 0), "{:?} {layer:?} {p:?}: lost", v.spec.id);
                    }
                }
                assert_eq!(next, v.spec.block_count());
                pieces.retain(|p| p.at.is_some());
                self.check_pieces(v.spec.id, v.spec.block_size, &pieces, image, &vec![false; image.0.len()]);
            }
        }
        for r in self.retained.clone() {
            let block_size = BlockSize::new(r.block_bytes).unwrap();
            let per = u64::from(SEGMENT / r.block_bytes);
            let mut image = Image(vec![0; r.first as usize]);
            image.0.extend(&r.stamps);
            for (i, segment) in r.segments.iter().enumerate() {
                let first_block = r.first + i as u64 * per;
                let count = per.min(image.0.len() as u64 - first_block);
                let piece = Piece { first_block, count, at: Some(*segment) };
                self.check_pieces(r.volume, block_size, &[piece], &image, &vec![false; image.0.len()]);
            }
        }
    }

    fn check_pieces(&mut self, id: VolumeId, size: BlockSize, pieces: &[Piece], image: &Image, changed: &[bool]) {
        let io = self.pool().io();
        for p in pieces {
            for block in p.first_block..p.first_block + p.count {
                if changed[block as usize] {
                    continue;
                }
                let piece = Piece { first_block: block, count: 1, at: p.at };
                let mut data = vec![0; size.bytes() as usize];
                let mut crcs = Vec::new();
                io.read(id, size, &piece, &mut data, &mut crcs).unwrap();
                assert_eq!(data, fill(image.0[block as usize], size.bytes()), "volume {id} block {block} {piece:?}");
                assert_eq!(crcs, [crc32c(&data)]);
            }
        }
    }

    fn check_structure(&mut self) {
        let pool = self.pool.as_mut().unwrap();
        let volumes: Vec<_> = pool.volumes.values().cloned().collect();
        // Each segment: whose it is, and its owned slots.
        let mut owners: BTreeMap<SegmentId, (VolumeId, u64, u128)> = BTreeMap::new();
        let mut heads = Vec::new();
        for v in &volumes {
            assert!(v.layers.iter().all(|l| l.state != LayerState::Live || l.id != LayerId(0)));
            for tree in v.layers.iter().map(|l| l.tree).chain([v.head]) {
                let mut from = 0;
                while let Some(chunk) = pool.map.next(tree, from, u32::MAX).unwrap() {
                    from = chunk + 1;
                    for e in pool.chunk(Key { tree, chunk }).unwrap().extents().to_vec() {
                        let vseg = u64::from(chunk) * 64 + u64::from(e.index);
                        assert!(e.owned != 0 && e.owned & !e.used == 0);
                        if e.segment == HOLE {
                            assert_ne!(tree, v.head, "a head owns no holes");
                            continue;
                        }
                        let owner = owners.entry(e.segment).or_insert((v.id(), vseg, 0));
                        assert_eq!((owner.0, owner.1), (v.id(), vseg), "a segment belongs to one place");
                        assert_eq!(owner.2 & e.owned, 0, "a block version has one owner");
                        owner.2 |= e.owned;
                        if tree == v.head {
                            heads.push(e);
                        }
                    }
                }
            }
        }
        for e in heads {
            assert_eq!(owners[&e.segment].2 & !e.used, 0, "an owned slot counts as used");
        }
        let mut live = 0;
        let devices = pool.devices();
        let mut by_device = SegmentStates::default();
        for (device, total) in devices.iter().map(|d| (d.number, d.segments)) {
            let info = &devices[usize::from(device)];
            assert_eq!(info.free + info.live + info.quarantined + info.held, total);
            by_device.quarantined += info.quarantined;
            by_device.live += info.live;
            for id in (0..total).map(|i| SegmentId::new(device, i)) {
                let owned = owners.get(&id).map_or(0, |(_, _, mask)| mask.count_ones());
                assert_eq!(u32::from(pool.segments.live(id)), owned, "{id:?}");
                live += u64::from(owned > 0);
            }
        }
        let s = pool.segment_states();
        assert_eq!((s.live, by_device.live, by_device.quarantined), (live, live, s.quarantined));
        assert_eq!(s.free + s.live + s.quarantined + s.pinned + s.unreferenced + s.retired, s.total);
        let space = pool.space();
        assert_eq!((space.total(), space.free(), space.quarantined()), (s.total, s.free, s.quarantined));
        assert_eq!(space.retired(), s.retired);
        for (segment, _) in owners {
            let standing = devices[usize::from(segment.device())].standing;
            assert!(
                !matches!(standing, DeviceStanding::Removing | DeviceStanding::Removed),
                "{segment:?} {standing:?}"
            );
        }
    }

    fn checkpoint(&mut self) {
        self.begin_capture();
        assert!(self.finish_capture().is_ok());
        self.storage.cancel_crash();
    }

    /// In the end everything that is not in use comes back.
    fn finish(&mut self) {
        self.storage.cancel_crash();
        self.end_reads();
        while self.retained.iter().any(|r| r.released.is_none()) {
            self.release();
        }
        while self.pool().sweep_step(10).unwrap() {}
        for _ in 0..2 {
            self.checkpoint();
        }
        self.checkpoint();
        self.check_structure();
        self.check_images();
    }
}

/// The blocks that records wrote where a reader of `layer` from before them may look: those of the head, and of a
/// snapshot that was deleted meanwhile.
fn written_in_place(ops: &[Op], volume: VolumeId, layer: Option<LayerId>, blocks: usize) -> Vec<bool> {
    let mut changed = vec![false; blocks];
    let deleted = |op: &Op| matches!(op, Op::DeleteSnapshot(_, l) if Some(*l) == layer);
    if layer.is_some() && !ops.iter().any(deleted) {
        return changed;
    }
    for op in ops {
        if let Op::Write(id, first, stamps) = op
            && *id == volume
        {
            changed.iter_mut().skip(*first as usize).take(stamps.len()).for_each(|c| *c = true);
        }
    }
    changed
}

/// Runs a seed. Panics at the first wrong step.
pub(super) fn run_seed(seed: u64, steps: u32) -> Seen {
    run_seed_looking(seed, steps, 8)
}

/// What a seed came upon.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Seen {
    crashes: u32,
    /// Of them, within an operation or a recovery.
    deaths: u32,
    /// Segments.
    moved: u64,
    /// Devices.
    removed: u32,
}

fn run_seed_looking(seed: u64, steps: u32, images_every: u32) -> Seen {
    let mut world = World::new(seed);
    for step in 0..steps {
        world.step();
        world.check_structure();
        if step % images_every == 0 {
            world.check_images();
        }
    }
    world.finish();
    world.seen
}

#[test]
fn pool_equals_the_model_through_checkpoints_and_crashes() {
    let mut all = Seen::default();
    for seed in 0..16 {
        let run = std::panic::catch_unwind(|| run_seed(seed, 300));
        let seen = run.unwrap_or_else(|_| panic!("seed {seed} failed"));
        all.crashes += seen.crashes;
        all.deaths += seen.deaths;
        all.moved += seen.moved;
        all.removed += seen.removed;
    }
    assert!(
        all.crashes > 16 && all.deaths > 20 && all.moved > 100 && all.removed > 5,
        "{all:?}: the test has lost its edge"
    );
}

#[test]
fn pool_equals_the_model_over_ten_thousand_operations() {
    let seen = run_seed_looking(1000, 10_000, 100);
    assert!(
        seen.crashes > 150 && seen.deaths > 100 && seen.moved > 150 && seen.removed > 2,
        "{seen:?}: the test has lost its edge"
    );
}
