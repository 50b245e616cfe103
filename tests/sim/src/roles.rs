//! Changes of role: two nodes that are promoted, demoted, fenced, split and put together again, and that die at any call
//! to their disks on the way, also while a directory is being converted.
//!
//! Groups have a few blocks, and of each the whole image behind every record is remembered, by position. A primary's
//! head, a backup's image and what a promotion makes of it are compared with that; in the end the two sides are joined
//! by whatever the situation asks for (attach, demotion, yielding), and must be identical.
//!
//! In some of the seeds snapshots are taken, deleted and restored, and promotions go back to one: each is the image that it
//! was taken of wherever it is, and a volume that is filled from one is served again when it is that image.
//!
//! Only calls a service makes are made here, in its order. Messages of a session do not overtake each other: that is the
//! matter of the other simulations.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, seq::IteratorRandom};
use rand_pcg::Pcg64Mcg;
use understudy_backup::receiver::{AttachRefusal, Receiver};
use understudy_common::{
    history::Relation,
    journal::JournalConfig,
    lane::Lanes,
    pool::{DeviceConfig, PoolConfig},
    record::{self, Control, RunKind},
    state::{GroupMode, GroupState},
    storage::{Storage, sim::SimStorage},
    store::{
        self, Change, Levels, ModeError, Promotion, Role, RoleError, ShrinkError, SnapshotError, Store, StoreConfig,
        SubmitError,
    },
    types::{AckRule, AwayRule, BlockSize, GroupId, Position, SnapshotId, Uid, VolumeId, VolumeSpec},
};
use understudy_primary::{
    runner::{RunOptions, Runner},
    sender::{Sender, Welcome},
};
use understudy_proto::convert;

use super::{BLOCK, Outcome, SEGMENT, Summary, Violation, broken, delta::port, hello, model::Stamp};

/// Paths that a large number of seeds must have reached.
pub const PATHS: &[&str] = &[
    "promotions",
    "promotions within a run",
    "promotions refused",
    "demotions of a primary",
    "crashes within a change of role",
    "crashes within a conversion",
    "primaries fenced",
    "writes refused by a fenced primary",
    "writes by a primary that does not know",
    "exact failbacks",
    "failbacks with everything",
    "split brains",
    "sides that gave up",
    "runs committed",
    "old disks put back",
    "old copies of a primary put back",
    "old copies refused",
    "snapshots taken",
    "snapshots deleted",
    "snapshots compared",
    "restores begun",
    "promotions to a snapshot",
    "volumes filled from a snapshot",
    "identical at the end",
];

const GROUPS: u64 = 2;
const BLOCKS: u64 = 48;
/// Rounds within which the two sides must be joined again.
const JOIN_ROUNDS: usize = 200;

type Image = BTreeMap<VolumeId, Vec<Stamp>>;

struct Host {
    disk: SimStorage,
    store: Option<Arc<Store>>,
    receiver: Option<Receiver>,
    /// What its head holds, while it is a primary.
    heads: BTreeMap<GroupId, Image>,
    /// It was told that it is superseded.
    told: bool,
    /// A copy of the disk of a backup, and its generation.
    copy: Option<(u64, SimStorage)>,
    /// The copy was put back: it holds less than it has acknowledged.
    restored: bool,
    /// A copy of the disk of a primary, and its generation.
    old_self: Option<(Uid, SimStorage)>,
}

struct Session {
    primary: usize,
    id: Uid,
    sender: Sender,
    runner: Option<Runner>,
}

struct World {
    rng: Pcg64Mcg,
    hosts: [Host; 2],
    session: Option<Session>,
    /// The image of a group behind each record of any primary: by the id of its generation, for numbers are used twice
    /// where the pair splits.
    images: BTreeMap<(GroupId, Uid, Position), Image>,
    /// What each snapshot was taken of. Their ids are never used twice, unless a primary goes on as an old copy.
    snapshots: BTreeMap<SnapshotId, Image>,
    /// Generations of which an old copy of the primary was put back: two records may have one position, so nothing is known
    /// of a backup that holds one.
    copied: BTreeSet<Uid>,
    /// A primary on such a copy was refused, so that somebody has to choose.
    refused_copy: bool,
    /// Nothing is lost on the way any more.
    joining: bool,
    stamp: u64,
    time: i64,
    summary: Summary,
    forks: bool,
    old_disks: bool,
    with_snapshots: bool,
}

/// The id of a generation that a node knows; nil for one that it does not.
fn line(store: &Store, number: u64) -> Uid {
    let history = store.history();
    let known = history.generations().iter().find(|generation| generation.number == number);
    known.map_or(Uid::default(), |generation| generation.id)
}

fn config() -> StoreConfig {
    StoreConfig {
        journal: JournalConfig {
            capacity_bytes: 512 * 1024,
            file_bytes: 32 * 1024,
            reserve_bytes: 64 * 1024,
            max_batch_bytes: 16 * 1024,
        },
        pool: PoolConfig {
            segment_bytes: SEGMENT,
            devices: vec![DeviceConfig { path: "device".into(), size_bytes: Some(16 << 20), max_bytes: None }],
            map_cache_bytes: 1 << 20,
        },
        checkpoint_bytes: 64 * 1024,
        tail_bytes: 16 * 1024,
        reference_bytes: usize::MAX,
        apply_bytes: 8 * 1024,
        drain_bytes_per_s: 0,
        levels: Levels::default(),
        pending_bytes: 1 << 20,
        retain: false,
        lanes: Lanes::default(),
    }
}

/// Does everything that is under way. False if the store has failed.
fn settle(store: &Arc<Store>, checkpoint: bool) -> bool {
    while let Some(job) = store.take_batch() {
        let result = job.run();
        store.finish_batch(job, result);
    }
    while let Some(mut job) = store.take_apply() {
        let result = job.run();
        store.finish_apply(job, result);
    }
    if checkpoint {
        while store.sweep() {}
    }
    if (checkpoint || store.checkpoint_requested())
        && let Some(job) = store.take_checkpoint()
    {
        let result = job.run();
        store.finish_checkpoint(job, result);
    }
    store.failure().is_none()
}

impl Host {
    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().expect("it is up")
    }

    fn role(&self) -> Role {
        self.store().identity().role
    }

    fn is_up(&self) -> bool {
        self.store.is_some()
    }
}

/// Runs one seed.
///
/// # Errors
/// The first promise that was broken.
pub fn run(seed: u64, steps: u32) -> Result<Summary, Violation> {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let host = |rng: &mut Pcg64Mcg| Host {
        disk: SimStorage::new(rng.random()),
        store: None,
        receiver: None,
        heads: BTreeMap::new(),
        told: false,
        copy: None,
        restored: false,
        old_self: None,
    };
    let hosts = [host(&mut rng), host(&mut rng)];
    let (forks, old_disks, with_snapshots) = (rng.random_bool(0.3), rng.random_bool(0.3), rng.random_bool(0.4));
    let mut world = World {
        rng,
        hosts,
        session: None,
        images: BTreeMap::new(),
        snapshots: BTreeMap::new(),
        copied: BTreeSet::new(),
        refused_copy: false,
        joining: false,
        stamp: 0,
        time: 1,
        summary: Summary::default(),
        forks,
        old_disks,
        with_snapshots,
    };
    world.open(0, Role::Primary)?;
    world.open(1, Role::Backup)?;
    world.create_volumes()?;
    for _ in 0..steps / 4 {
        world.time += 1;
        world.step()?;
        world.check_images()?;
    }
    world.join()?;
    Ok(world.summary)
}

impl World {
    fn count(&mut self, what: &'static str) {
        debug_assert!(PATHS.contains(&what), "{what}");
        *self.summary.counts.entry(what).or_default() += 1;
    }

    fn other(host: usize) -> usize {
        1 - host
    }

    // --- lives

    /// Opens a node as `role`; a planned crash of the disk is lived through.
    fn open(&mut self, host: usize, role: Role) -> Outcome {
        for attempt in 0.. {
            let storage: Arc<dyn Storage> = Arc::new(self.hosts[host].disk.clone());
            let config = StoreConfig { retain: role == Role::Primary, ..config() };
            let mut uid = || Uid(self.rng.random());
            match store::open(storage, config, role, &mut uid) {
                Ok((store, _)) => {
                    self.hosts[host].receiver = (role == Role::Backup).then(|| Receiver::new(Arc::clone(&store)));
                    self.hosts[host].store = Some(store);
                    if settle(self.hosts[host].store(), false) {
                        return self.opened(host);
                    }
                    self.hosts[host].store = None;
                    self.hosts[host].receiver = None;
                }
                // The change that was seen was not durable, and the power took it back.
                Err(store::OpenError::Role { found, .. }) if attempt > 0 => return self.open(host, found),
                Err(error) if !self.hosts[host].disk.has_crashed() => {
                    return Err(broken(format!("node {host} does not open as a {role}: {error}")));
                }
                Err(_) => {}
            }
            if attempt > 4 {
                return Err(broken(format!("node {host} does not open at all")));
            }
            self.count("crashes within a conversion");
            self.power(host);
        }
        unreachable!("the loop ends within")
    }

    fn power(&mut self, host: usize) {
        if self.rng.random() {
            self.hosts[host].disk.crash(&mut self.rng);
        } else {
            self.hosts[host].disk.kill();
        }
    }

    /// What is there must be what was there.
    fn opened(&mut self, host: usize) -> Outcome {
        self.hosts[host].told = self.hosts[host].store().identity().fenced > 0;
        if self.hosts[host].role() == Role::Backup {
            return Ok(());
        }
        let store = Arc::clone(self.hosts[host].store());
        // Records whose journal a crash took are not there any more; their LSNs are given again.
        let next = store.next_lsn();
        let ours = store.identity().generation_id;
        self.images.retain(|(_, line, at), _| *line != ours || at.lsn < next);
        let groups = store.with_state(|s| s.groups.values().map(|g| (g.id, g.position)).collect::<Vec<_>>());
        self.hosts[host].heads.clear();
        for (group, position) in groups {
            let image = match self.images.get(&(group, line(&store, position.generation), position)) {
                Some(image) => image.clone(),
                None => return Err(broken(format!("node {host} has group {group} at {position}, which nobody wrote"))),
            };
            self.check_head(&store, host, group, &image)?;
            self.hosts[host].heads.insert(group, image);
        }
        Ok(())
    }

    fn stop(&mut self, host: usize) {
        self.session = None;
        self.hosts[host].store = None;
        self.hosts[host].receiver = None;
    }

    /// Ends a node whose role has changed; the next start may crash on its way.
    fn stop_for_change(&mut self, host: usize) {
        self.stop(host);
        if self.hosts[host].disk.has_crashed() || self.rng.random_bool(0.2) {
            self.power(host);
        } else {
            // The process ends.
            self.hosts[host].disk.kill();
        }
        self.plan_crash(host, 40);
    }

    fn crash(&mut self, host: usize) -> Outcome {
        self.stop(host);
        self.power(host);
        self.reopen(host)
    }

    /// Opens it as what the directory says, as `understudy node` does.
    fn reopen(&mut self, host: usize) -> Outcome {
        self.stop(host);
        // The process has ended.
        self.hosts[host].disk.kill();
        let role = store::role_of(&self.hosts[host].disk.clone()).map_err(|e| broken(format!("role: {e}")))?;
        let role = role.ok_or_else(|| broken("a node without a role"))?;
        self.open(host, role)
    }

    /// Lets what is under way happen. A failed store is a crash.
    fn settle(&mut self, host: usize) -> Outcome {
        let checkpoint = self.rng.random_bool(0.1);
        if settle(self.hosts[host].store(), checkpoint) { Ok(()) } else { self.crash(host) }
    }

    // --- clients

    fn create_volumes(&mut self) -> Outcome {
        for id in 1..=GROUPS {
            self.create(0, GroupId(id))?;
        }
        self.settle(0)
    }

    fn create(&mut self, host: usize, group: GroupId) -> Outcome {
        let store = Arc::clone(self.hosts[host].store());
        let id = VolumeId(store.with_state(|s| s.last_volume.0) + 1);
        let spec = VolumeSpec {
            id,
            name: format!("v{id}"),
            group,
            group_name: format!("g{group}"),
            size_bytes: BLOCKS * BLOCK as u64,
            block_size: BlockSize::new(512).expect("a power of two"),
            segment_bytes: SEGMENT,
            ack: AckRule::Staged,
            away: AwayRule::Degrade,
        };
        let submitted = store.submit_control(group, Control::CreateVolume { spec, fill: None }, self.time);
        self.changed(host, group, submitted.map(|s| s.position), |image| {
            image.insert(id, vec![Stamp(0); 48]);
        })
    }

    fn changed(
        &mut self,
        host: usize,
        group: GroupId,
        submitted: Result<Position, SubmitError>,
        change: impl FnOnce(&mut Image),
    ) -> Outcome {
        match submitted {
            Ok(position) => {
                let line = self.hosts[host].store().identity().generation_id;
                let image = self.hosts[host].heads.entry(group).or_default();
                change(image);
                self.images.insert((group, line, position), image.clone());
                Ok(())
            }
            Err(SubmitError::StagingFull { .. } | SubmitError::Failed(_) | SubmitError::NotPrimary) => Ok(()),
            Err(error) => Err(broken(format!("a good change was refused: {error}"))),
        }
    }

    fn write(&mut self, host: usize) -> Outcome {
        let store = Arc::clone(self.hosts[host].store());
        let Some((group, volume)) = served(&store).into_iter().map(|spec| (spec.group, spec.id)).choose(&mut self.rng)
        else {
            return Ok(());
        };
        let blocks = store.with_state(|s| s.volumes[&volume].block_count());
        let first = self.rng.random_range(0..blocks);
        let count = self.rng.random_range(1..=(blocks - first).min(4));
        self.stamp += 1;
        let stamp = Stamp(if self.rng.random_bool(0.1) { 0 } else { self.stamp });
        let change = if stamp.0 == 0 {
            Change::Zero { count }
        } else {
            let data: Vec<u8> = (0..count).flat_map(|_| stamp.fill()).collect();
            let crcs = record::block_crcs(&data, BlockSize::new(512).expect("a power of two"));
            Change::Write { data: Bytes::from(data), crcs }
        };
        let submitted = store.submit(volume, first, change, None, self.time);
        if self.hosts[host].told {
            self.count("writes refused by a fenced primary");
            if submitted.is_ok() {
                return Err(broken(format!("node {host} was superseded, knows it, and took a write")));
            }
            return Ok(());
        }
        let newest = self.hosts.iter().filter(|h| h.is_up()).map(|h| h.store().identity().generation).max();
        if newest > Some(store.identity().generation) {
            self.count("writes by a primary that does not know");
        }
        self.changed(host, group, submitted.map(|s| s.position), |image| {
            if let Some(blocks) = image.get_mut(&volume) {
                let range = usize::try_from(first).expect("small")..usize::try_from(first + count).expect("small");
                blocks[range].fill(stamp);
            }
        })
    }

    fn resize(&mut self, host: usize) -> Outcome {
        let store = Arc::clone(self.hosts[host].store());
        let Some(spec) = served(&store).into_iter().choose(&mut self.rng) else { return Ok(()) };
        if self.hosts[host].told {
            return Ok(());
        }
        let (blocks, submitted) = if self.rng.random() && spec.block_count() > BLOCKS {
            // Nothing is done to make it possible: it often is refused.
            let blocks = self.rng.random_range(BLOCKS..spec.block_count());
            match store.shrink(spec.id, blocks * BLOCK as u64, self.time) {
                Ok(submitted) => (blocks, Ok(submitted)),
                Err(ShrinkError::Submit(error)) => (blocks, Err(error)),
                Err(ShrinkError::Data { .. } | ShrinkError::Read(_)) => return Ok(()),
                Err(error) => return Err(broken(format!("volume {} is not cut: {error}", spec.id))),
            }
        } else {
            let blocks = spec.block_count() + 8;
            let control = Control::ResizeVolume { volume: spec.id, size_bytes: blocks * BLOCK as u64 };
            (blocks, store.submit_control(spec.group, control, self.time))
        };
        self.changed(host, spec.group, submitted.map(|s| s.position), |image| {
            if let Some(image) = image.get_mut(&spec.id) {
                image.resize(usize::try_from(blocks).expect("small"), Stamp(0));
            }
        })
    }

    fn delete(&mut self, host: usize) -> Outcome {
        let store = Arc::clone(self.hosts[host].store());
        let kept = |spec: &VolumeSpec| store.with_state(|s| s.groups[&spec.group].volumes.len() > 1);
        let Some(spec) = served(&store).into_iter().filter(kept).choose(&mut self.rng) else { return Ok(()) };
        if self.hosts[host].told {
            return Ok(());
        }
        let submitted = store.submit_control(spec.group, Control::DeleteVolume { volume: spec.id }, self.time);
        self.changed(host, spec.group, submitted.map(|s| s.position), |image| {
            image.remove(&spec.id);
        })
    }

    // --- snapshots

    /// Of every group under one name, so that a promotion may go back to it.
    fn take_snapshots(&mut self, host: usize) -> Outcome {
        let store = Arc::clone(self.hosts[host].store());
        let name = format!("s{}", self.time);
        let groups = store.with_state(|s| {
            let few = |g: &&GroupState| s.snapshots_of(g.id).count() < 3;
            s.groups.values().filter(few).map(|g| g.id).collect::<Vec<_>>()
        });
        for group in groups {
            let filling = store.restores().iter().any(|(id, _)| store.with_state(|s| s.volumes[id].group == group));
            if self.hosts[host].told || filling {
                continue;
            }
            let submitted = match store.take_snapshot(group, &name, self.time) {
                Ok((snapshot, submitted)) => {
                    let image = self.hosts[host].heads.get(&group).cloned().unwrap_or_default();
                    self.snapshots.insert(snapshot.id, image);
                    self.count("snapshots taken");
                    Ok(submitted.position)
                }
                Err(SnapshotError::Submit(error)) => Err(error),
                Err(error) => return Err(broken(format!("a snapshot of group {group} was refused: {error}"))),
            };
            self.changed(host, group, submitted, |_| {})?;
        }
        Ok(())
    }

    fn delete_snapshot(&mut self, host: usize) -> Outcome {
        let store = Arc::clone(self.hosts[host].store());
        let taken = store.with_state(|s| s.snapshots.values().map(|s| (s.id, s.group)).collect::<Vec<_>>());
        let Some((id, group)) = taken.into_iter().choose(&mut self.rng) else { return Ok(()) };
        if self.hosts[host].told {
            return Ok(());
        }
        let submitted = match store.drop_snapshot(id, self.time) {
            Ok(submitted) => {
                self.count("snapshots deleted");
                Ok(submitted.position)
            }
            Err(SnapshotError::InUse) => return Ok(()),
            Err(SnapshotError::Submit(error)) => Err(error),
            Err(error) => return Err(broken(format!("snapshot {id} is not deleted: {error}"))),
        };
        self.changed(host, group, submitted, |_| {})
    }

    fn begin_restore(&mut self, host: usize) -> Outcome {
        let store = Arc::clone(self.hosts[host].store());
        let Some((id, volumes)) = store
            .with_state(|s| s.snapshots.values().map(|s| (s.id, s.layers.clone())).collect::<Vec<_>>())
            .into_iter()
            .choose(&mut self.rng)
        else {
            return Ok(());
        };
        if self.hosts[host].told {
            return Ok(());
        }
        let volumes = volumes.into_iter().map(|(volume, _)| (volume, volume)).collect();
        match store.begin_restore(id, volumes, self.time) {
            Ok(_) => self.count("restores begun"),
            Err(SnapshotError::Smaller { .. } | SnapshotError::Submit(_)) => {}
            Err(error) => return Err(broken(format!("a restore from snapshot {id} was refused: {error}"))),
        }
        Ok(())
    }

    /// A step of filling a volume from a snapshot, by what differs.
    fn fill(&mut self, host: usize) -> Outcome {
        if self.hosts[host].told {
            return Ok(());
        }
        // What it was filled with is not read before it is applied.
        self.settle(host)?;
        let store = Arc::clone(self.hosts[host].store());
        let Some((volume, restore)) = store.restores().into_iter().choose(&mut self.rng) else { return Ok(()) };
        let group = store.with_state(|s| s.volumes[&volume].group);
        let mut wanted = self.snapshots[&restore.snapshot][&restore.source].clone();
        let head = &self.hosts[host].heads[&group][&volume];
        if wanted.len() > head.len() {
            return Err(broken(format!("volume {volume} is filled from a snapshot in which it is larger")));
        }
        wanted.resize(head.len(), Stamp(0));
        let Some(first) = (0..head.len()).find(|block| head[*block] != wanted[*block]) else {
            let ended = store.end_restore(vec![volume], self.time);
            self.count("volumes filled from a snapshot");
            return match ended {
                Ok(_) | Err(SubmitError::StagingFull { .. } | SubmitError::Failed(_) | SubmitError::NotPrimary) => {
                    Ok(())
                }
                Err(error) => Err(broken(format!("volume {volume} is not served again: {error}"))),
            };
        };
        let count = (head.len() - first).min(16);
        // What is read, not what is remembered.
        let reader = store.snapshot_reader(restore.snapshot, restore.source);
        let reader = reader.map_err(|error| broken(format!("snapshot {}: {error}", restore.snapshot)))?;
        let held = usize::try_from(reader.spec().block_count()).expect("small").saturating_sub(first).min(count);
        let mut data = vec![0; count * BLOCK];
        if held > 0 {
            let read = reader.read(first as u64, held as u64);
            let read = read.map_err(|error| broken(format!("snapshot {}: {error}", restore.snapshot)))?;
            data[..held * BLOCK].copy_from_slice(&read);
        }
        let crcs = record::block_crcs(&data, BlockSize::new(512).expect("a power of two"));
        let change = Change::Write { data: Bytes::from(data), crcs };
        let submitted = store.submit_restored(volume, first as u64, change, self.time);
        self.changed(host, group, submitted.map(|s| s.position), |image| {
            if let Some(blocks) = image.get_mut(&volume) {
                blocks[first..first + count].copy_from_slice(&wanted[first..first + count]);
            }
        })
    }

    /// A snapshot is what it was taken of, wherever it is.
    fn check_snapshots(&mut self, host: usize) -> Outcome {
        let store = Arc::clone(self.hosts[host].store());
        let applied = store.marks().borrow().applied;
        let snapshots = store.with_state(|s| s.snapshots.values().cloned().collect::<Vec<_>>());
        for snapshot in snapshots.into_iter().filter(|snapshot| snapshot.lsn <= applied) {
            let Some(image) = self.snapshots.get(&snapshot.id) else {
                return Err(broken(format!("node {host} has snapshot {}, which nobody took", snapshot.id)));
            };
            for (volume, _) in &snapshot.layers {
                let (spec, _) = snapshot.volume(*volume).expect("it has its layer");
                let reader = store.snapshot_reader(snapshot.id, *volume);
                let read = reader
                    .map_err(|e| e.to_string())
                    .and_then(|reader| reader.read(0, spec.block_count()).map_err(|e| e.to_string()));
                let data = read.map_err(|e| broken(format!("node {host}: snapshot {}: {e}", snapshot.id)))?;
                compare(host, spec, &data, image.get(volume))?;
            }
            self.count("snapshots compared");
        }
        Ok(())
    }

    // --- steps

    fn primaries(&self) -> Vec<usize> {
        (0..2).filter(|n| self.hosts[*n].is_up() && self.hosts[*n].role() == Role::Primary).collect()
    }

    fn step(&mut self) -> Outcome {
        let Some(primary) = self.primaries().into_iter().choose(&mut self.rng) else {
            // Two backups: somebody promotes one of them.
            let host = self.rng.random_range(0..2);
            return self.promote(host, true);
        };
        if self.with_snapshots && self.rng.random_bool(0.2) {
            return match self.rng.random_range(0..12) {
                0..3 => self.take_snapshots(primary),
                3 => self.delete_snapshot(primary),
                4 => self.begin_restore(primary),
                _ => self.fill(primary),
            };
        }
        match self.rng.random_range(0..100) {
            0..40 => self.write(primary),
            40..43 => self.resize(primary),
            43..46 if !self.hosts[primary].told => {
                let group = GroupId(self.rng.random_range(1..=GROUPS));
                if self.hosts[primary].heads.contains_key(&group) { self.create(primary, group) } else { Ok(()) }
            }
            46..48 => self.delete(primary),
            48..51 if self.old_disks => self.swap_disk(Self::other(primary)),
            48..60 => self.settle(primary),
            60..75 => self.exchange(),
            75..80 if self.session.is_none() => self.attach(primary).map(drop),
            80..82 => {
                self.session = None;
                Ok(())
            }
            82..86 => self.switch_one(),
            86..90 => self.begin_run(),
            90..93 => {
                let host = self.rng.random_range(0..2);
                if self.hosts[host].is_up() { self.crash(host) } else { self.reopen(host) }
            }
            93..96 => {
                let backup = Self::other(primary);
                if self.hosts[backup].role() == Role::Backup { self.promote(backup, false) } else { Ok(()) }
            }
            96..98 => self.demote(primary),
            98 if self.old_disks => self.swap_disk(Self::other(primary)),
            99 if self.old_disks && !self.with_snapshots => self.swap_primary(primary),
            _ => Ok(()),
        }
    }

    /// Copies the disk of a backup, or puts the copy back, while nobody was promoted in between.
    fn swap_disk(&mut self, host: usize) -> Outcome {
        let identity = self.hosts[host].store().identity();
        if identity.role != Role::Backup || identity.generation == 0 {
            return Ok(());
        }
        match self.hosts[host].copy.take() {
            Some((generation, copy)) if generation == identity.generation => {
                self.session = None;
                let old = &mut self.hosts[host];
                (old.store, old.receiver, old.disk, old.restored) = (None, None, copy, true);
                self.count("old disks put back");
                self.power(host);
                self.reopen(host)
            }
            _ => {
                self.settle(host)?;
                let copy = self.hosts[host].disk.fork();
                self.hosts[host].copy = Some((identity.generation, copy));
                Ok(())
            }
        }
    }

    /// Copies the disk of a primary, or puts the copy back, in the same generation.
    fn swap_primary(&mut self, host: usize) -> Outcome {
        self.settle(host)?;
        let identity = self.hosts[host].store().identity();
        match self.hosts[host].old_self.take() {
            _ if self.hosts[host].told => Ok(()),
            Some((generation, copy)) if generation == identity.generation_id => {
                self.session = None;
                let old = &mut self.hosts[host];
                (old.store, old.disk) = (None, copy);
                self.copied.insert(generation);
                self.count("old copies of a primary put back");
                self.power(host);
                self.reopen(host)
            }
            _ => {
                let copy = self.hosts[host].disk.fork();
                self.hosts[host].old_self = Some((identity.generation_id, copy));
                Ok(())
            }
        }
    }

    /// Of the backup; forced if somebody says that it must be.
    fn promote(&mut self, host: usize, must: bool) -> Outcome {
        let store = Arc::clone(self.hosts[host].store());
        let diverged = store.with_state(|s| s.groups.values().any(|g| g.diverged.is_some()));
        let alone = store.with_state(|s| s.groups.is_empty());
        if alone || diverged && !must && !self.forks {
            return Ok(());
        }
        self.settle(host)?;
        if self.hosts[host].role() != Role::Backup {
            return Ok(());
        }
        let store = Arc::clone(self.hosts[host].store());
        self.check_acknowledged(host)?;
        self.session = None;
        if let Some(receiver) = &mut self.hosts[host].receiver {
            receiver.close();
        }
        let history = store.history();
        let copied = |at: Position| {
            let of = history.generations().iter().find(|g| g.number == at.generation);
            of.is_some_and(|of| self.copied.contains(&of.id))
        };
        let groups: Vec<(GroupId, Position, bool)> = store.with_state(|s| {
            let groups = s.groups.values().filter(|g| g.consistent);
            let unknown = |g: &GroupState| g.diverged.is_some_and(|d| d.unknown) || copied(g.position);
            groups.map(|g| (g.id, g.position, unknown(g))).collect()
        });
        let mut before: BTreeMap<GroupId, Image> = BTreeMap::new();
        for (group, position, unknown) in groups {
            let image = match self.images.get(&(group, line(&store, position.generation), position)) {
                Some(image) if !unknown => image.clone(),
                // It may be of a generation that was given up: what it reads as is all that is known.
                _ if unknown => read_image(&store, group)?,
                _ => return Err(broken(format!("group {group} was at {position}, which nobody wrote"))),
            };
            before.insert(group, image);
        }
        let in_run = store.with_state(|s| s.groups.values().any(|g| g.run.is_some() && g.consistent));
        let at = if self.rng.random_bool(0.5) { self.common_snapshot(&store) } else { None };
        let generation = store.identity().generation;
        let stale = generation.wrapping_add(1);
        if !matches!(
            store.promote(Promotion { expected: Some(stale), force: true, at: None }, Uid([1; 16])),
            Err(RoleError::Generation { .. })
        ) {
            return Err(broken("a promotion that expected another generation was not refused"));
        }
        self.plan_crash(host, 12);
        let id = Uid(self.rng.random());
        let wanted = Promotion { expected: Some(generation), force: diverged || must, at: at.as_deref() };
        let promoted = store.promote(wanted, id);
        match promoted {
            Ok((number, _)) if number > generation => {}
            Ok((number, _)) => return Err(broken(format!("a promotion of generation {generation} gave {number}"))),
            Err(RoleError::Catalog(_)) => self.count("crashes within a change of role"),
            Err(_) => {
                self.count("promotions refused");
                self.hosts[host].disk.cancel_crash();
                return self.reopen(host);
            }
        }
        let mut filled = BTreeSet::new();
        if let Some(at) = &at {
            for (group, image) in &mut before {
                let snapshot = store.with_state(|s| s.snapshot_by_name(*group, at).cloned());
                let snapshot = snapshot.ok_or_else(|| broken("a promotion to a snapshot that is not there"))?;
                for (volume, _) in &snapshot.layers {
                    let held = self.snapshots[&snapshot.id][volume].len();
                    // It may be gone in the image, which a run has brought.
                    if let Some(blocks) = image.get_mut(volume) {
                        blocks.resize(blocks.len().max(held), Stamp(0));
                        filled.insert(*volume);
                    }
                }
            }
        }
        drop(store);
        self.reopen_promoted(host, id, &before, in_run, at.is_some().then_some(&filled))
    }

    /// A snapshot that every group with an image has under one name.
    fn common_snapshot(&mut self, store: &Store) -> Option<String> {
        let names = store.with_state(|s| {
            let mut groups = s.groups.values().filter(|g| g.consistent);
            let names = |g: &GroupState| s.snapshots_of(g.id).map(|s| s.name.clone()).collect::<BTreeSet<_>>();
            let first = groups.next().map(names).unwrap_or_default();
            groups.fold(first, |common, group| &common & &names(group))
        });
        names.into_iter().choose(&mut self.rng)
    }

    /// The image of each group behind a promotion is that from before it.
    /// With `filled` it went back to a snapshot, and these volumes are not served before they are what that was.
    fn reopen_promoted(
        &mut self,
        host: usize,
        id: Uid,
        before: &BTreeMap<GroupId, Image>,
        in_run: bool,
        filled: Option<&BTreeSet<VolumeId>>,
    ) -> Outcome {
        self.stop_for_change(host);
        let role = loop {
            match store::role_of(&self.hosts[host].disk.clone()) {
                Ok(role) => break role.expect("it was made before"),
                Err(error) if !self.hosts[host].disk.has_crashed() => return Err(broken(format!("role: {error}"))),
                Err(_) => self.power(host),
            }
        };
        // Every LSN that the record of the promotion can get has the image from before it.
        if role == Role::Primary {
            let identity = self.peek(host)?;
            for (group, image) in before {
                self.promoted_image(host, *group, id, identity, image);
            }
        }
        let opened = self.open(host, role);
        self.hosts[host].disk.cancel_crash();
        opened?;
        if self.hosts[host].role() == Role::Primary {
            self.count("promotions");
            (self.hosts[host].copy, self.hosts[host].restored) = (None, false);
            if in_run {
                self.count("promotions within a run");
            }
            let store = Arc::clone(self.hosts[host].store());
            let kept: BTreeSet<GroupId> = store.with_state(|s| s.groups.keys().copied().collect());
            if !before.keys().all(|group| kept.contains(group)) {
                return Err(broken("a group with an image was lost by a promotion"));
            }
            let filling: BTreeSet<VolumeId> = store.restores().into_iter().map(|(volume, _)| volume).collect();
            if filled.is_some() {
                self.count("promotions to a snapshot");
            }
            if filling != filled.cloned().unwrap_or_default() {
                return Err(broken(format!("volumes {filling:?} are filled behind a promotion, not {filled:?}")));
            }
            // A volume that was larger in its snapshot grows first.
            let later = |g: &GroupState, promoted_at| g.position.lsn > promoted_at && filled.is_some();
            if let Some(group) = store.with_state(|s| {
                let begins = |g: &&GroupState| g.position.lsn == s.promoted_at || later(g, s.promoted_at);
                s.groups.values().find(|g| g.mode.is_continuous() || !begins(g)).map(|g| g.id)
            }) {
                return Err(broken(format!("group {group} does not begin anew behind a promotion")));
            }
        }
        Ok(())
    }

    /// The generation of a directory that is not open.
    fn peek(&self, host: usize) -> Result<u64, Violation> {
        let found = store::inspect(&self.hosts[host].disk.clone()).map_err(|e| broken(format!("inspect: {e}")))?;
        Ok(found.generation)
    }

    fn promoted_image(&mut self, host: usize, group: GroupId, id: Uid, generation: u64, image: &Image) {
        // The conversion may be repeated, each time with a later record.
        let journal = store::inspect(&self.hosts[host].disk.clone()).ok().and_then(|found| found.journal);
        let last = journal.map_or(0, |journal| journal.last_lsn.max(journal.first_lsn));
        for lsn in last.saturating_sub(64)..last + 64 {
            let position = Position { generation, lsn: understudy_common::types::Lsn(lsn) };
            self.images.insert((group, id, position), image.clone());
        }
    }

    fn plan_crash(&mut self, host: usize, calls: u64) {
        if self.rng.random_bool(0.5) {
            let n = self.rng.random_range(1..=calls);
            self.hosts[host].disk.crash_after(n);
        }
    }

    fn demote(&mut self, host: usize) -> Outcome {
        let store = Arc::clone(self.hosts[host].store());
        let drained = self.rng.random_bool(0.3);
        self.plan_crash(host, 6);
        match store.demote_node(drained) {
            Ok(()) => self.count("demotions of a primary"),
            Err(RoleError::Catalog(_)) => self.count("crashes within a change of role"),
            Err(RoleError::NotDrained { .. }) => {
                self.hosts[host].disk.cancel_crash();
                return Ok(());
            }
            Err(error) => return Err(broken(format!("a demotion was refused: {error}"))),
        }
        drop(store);
        self.after_change(host)
    }

    fn after_change(&mut self, host: usize) -> Outcome {
        self.stop_for_change(host);
        let opened = self.reopen_planned(host);
        self.hosts[host].disk.cancel_crash();
        opened
    }

    fn reopen_planned(&mut self, host: usize) -> Outcome {
        match store::role_of(&self.hosts[host].disk.clone()) {
            Ok(role) => self.open(host, role.expect("it was made before")),
            Err(_) if self.hosts[host].disk.has_crashed() => {
                self.power(host);
                self.reopen(host)
            }
            Err(error) => Err(broken(format!("role: {error}"))),
        }
    }

    // --- a session

    /// True if one is open behind it.
    fn attach(&mut self, primary: usize) -> Result<bool, Violation> {
        let backup = Self::other(primary);
        self.settle(primary)?;
        self.settle(backup)?;
        if self.hosts[primary].role() != Role::Primary || self.hosts[primary].told {
            return Ok(false);
        }
        let (ours, theirs) = (Arc::clone(self.hosts[primary].store()), Arc::clone(self.hosts[backup].store()));
        let identity = ours.identity();
        if self.hosts[backup].role() == Role::Primary {
            self.meet(primary, backup)?;
            return Ok(false);
        }
        let life = Uid(self.rng.random());
        let Ok(lives) = ours.lives(|| life) else {
            self.crash(primary)?;
            return Ok(false);
        };
        let hello = hello(&ours, lives);
        let id = Uid(self.rng.random());
        let receiver = self.hosts[backup].receiver.as_mut().expect("a backup");
        let positions = match receiver.attach(&hello, id) {
            Ok((positions, _)) => positions,
            Err(AttachRefusal::OldGeneration { history, .. }) => {
                if ours.history().relation(&history) != Relation::Ancestor {
                    return Err(broken("a primary was called superseded that is not"));
                }
                self.fence(primary, history.newest().map_or(0, |g| g.number))?;
                return Ok(false);
            }
            Err(AttachRefusal::Fork { .. }) => {
                self.count("split brains");
                return Ok(false);
            }
            Err(AttachRefusal::Ahead { .. } | AttachRefusal::Copy { .. })
                if self.copied.contains(&identity.generation_id) =>
            {
                self.count("old copies refused");
                self.refused_copy = true;
                return Ok(false);
            }
            Err(error) => return Err(broken(format!("an attach was refused: {error}"))),
        };
        let diverged = receiver.diverged();
        self.settle(backup)?;
        let unfinished = theirs.with_state(|state| {
            state.groups.values().filter(|g| g.run.is_some() || !g.consistent).map(|g| g.id).collect()
        });
        let instance = theirs.identity().instance;
        let mut sender = match self.session.take() {
            Some(session) if session.primary == primary => session.sender,
            _ => Sender::new(Arc::clone(&ours), 1 << 20),
        };
        let mut welcome = Welcome { session: id, instance, positions, unfinished, diverged: BTreeMap::new() };
        for group in diverged {
            let why = match &group.exact {
                Err(why) => Some(why.clone()),
                Ok(()) => {
                    if sender.begins_merge(instance, group.group) {
                        for (volume, blocks) in theirs.divergence(group.group) {
                            let runs: Vec<(u64, u64)> = blocks.iter_runs().collect();
                            sender.merge(group.group, volume, &runs);
                        }
                        sender.merged(instance, group.group, &group.volumes.iter().copied().collect());
                    }
                    None
                }
            };
            self.count(if why.is_none() { "exact failbacks" } else { "failbacks with everything" });
            welcome.diverged.insert(group.group, why);
        }
        match sender.on_attached(&welcome, self.time) {
            Ok(_) => {}
            Err(error) if ours.failure().is_some() => {
                let _ = error;
                self.crash(primary)?;
                return Ok(false);
            }
            Err(_) => return Ok(false),
        }
        // Runs that nobody goes on with, as the replicator ends them.
        ours.abort_open_runs(self.time);
        self.session = Some(Session { primary, id, sender, runner: None });
        self.check_cover(primary)?;
        Ok(true)
    }

    /// A primary attaches to another one.
    fn meet(&mut self, caller: usize, called: usize) -> Outcome {
        let (ours, theirs) = (self.hosts[called].store().history(), self.hosts[caller].store().history());
        match ours.relation(&theirs) {
            Relation::Ancestor => self.fence(called, theirs.newest().map_or(0, |g| g.number)),
            Relation::Descendant => self.fence(caller, ours.newest().map_or(0, |g| g.number)),
            Relation::Fork { .. } => {
                self.count("split brains");
                Ok(())
            }
            Relation::Same => Err(broken("two primaries of one generation")),
        }
    }

    fn fence(&mut self, host: usize, by: u64) -> Outcome {
        self.hosts[host].told = true;
        self.count("primaries fenced");
        match self.hosts[host].store().fence(by) {
            Ok(_) => Ok(()),
            Err(_) => self.crash(host),
        }
    }

    fn exchange(&mut self) -> Outcome {
        let Some(Session { primary, id, .. }) = self.session else { return Ok(()) };
        let backup = Self::other(primary);
        self.settle(primary)?;
        let Some(session) = &mut self.session else { return Ok(()) };
        let frames = session.sender.poll(Duration::ZERO, 8192).map_err(|e| broken(format!("the sender: {e}")))?;
        let all = frames.len();
        let take = if self.joining { all } else { self.rng.random_range(0..=all) };
        for frame in frames.into_iter().take(take) {
            let ship = frame.ship;
            let record = convert::record_from_wire(frame).map_err(|e| broken(format!("a frame: {e}")))?;
            let receiver = self.hosts[backup].receiver.as_mut().expect("a backup");
            if receiver.on_record(id, ship, &record).is_err() {
                // The session ends, and the next one goes on from what is held.
                self.session = None;
                return Ok(());
            }
        }
        self.settle(backup)?;
        let durable = self.hosts[backup].store().marks().borrow().durable;
        let answer = self.hosts[backup].receiver.as_mut().and_then(|r| r.poll_answer(durable));
        if let (Some(session), Some((_, answer))) = (&mut self.session, answer) {
            let ack = understudy_proto::v1::StagedAck {
                session: Bytes::copy_from_slice(&id.0),
                ship: answer.ship,
                refusals: Vec::new(),
            };
            session.sender.on_ack(&ack).map_err(|e| broken(format!("an answer: {e}")))?;
        }
        if take < all {
            // What was lost on the way is sent again by the next session.
            self.session = None;
        }
        for _ in 0..self.rng.random_range(0..4) {
            self.turn_run()?;
        }
        Ok(())
    }

    fn switch_one(&mut self) -> Outcome {
        let Some(session) = &self.session else { return Ok(()) };
        let store = Arc::clone(self.hosts[session.primary].store());
        let group = GroupId(self.rng.random_range(1..=GROUPS));
        if !store.is_delta(group) {
            // A full journal, or a group that is gone, is no matter here.
            let _ = store.switch(group, "operator", false, self.time);
        }
        Ok(())
    }

    fn begin_run(&mut self) -> Outcome {
        let kind = if self.rng.random() { RunKind::Final } else { RunKind::Round };
        self.begin(kind)
    }

    fn begin(&mut self, kind: RunKind) -> Outcome {
        let Some(session) = self.session.as_mut().filter(|s| s.runner.is_none()) else { return Ok(()) };
        let store = Arc::clone(self.hosts[session.primary].store());
        let tracking = |mode: &GroupMode| matches!(mode, GroupMode::Delta { run: None, .. });
        let open =
            store.with_state(|s| s.groups.values().filter(|g| tracking(&g.mode)).map(|g| g.id).collect::<Vec<_>>());
        let Some(group) = open.into_iter().choose(&mut self.rng) else { return Ok(()) };
        let kind = match store.with_state(|s| s.groups[&group].mode.clone()) {
            GroupMode::Delta { full: true, .. } => RunKind::Full,
            _ => kind,
        };
        let run = match store.cut(group, kind, self.time) {
            Ok(run) => run,
            Err(ModeError::Submit(_)) => return Ok(()),
            Err(error) => return Err(broken(format!("a cut was refused: {error}"))),
        };
        let options = RunOptions {
            window_bytes: 4096,
            chunk_bytes: 2048,
            piece_bytes: BLOCK as u64 * 4,
            compress: self.rng.random(),
            digests: kind == RunKind::Full,
        };
        let mut runner = Runner::new(store, group, run, options);
        runner.on_attached(&session.id.0);
        session.runner = Some(runner);
        Ok(())
    }

    /// One request of the run and its answer.
    fn turn_run(&mut self) -> Outcome {
        let Some(session) = &mut self.session else { return Ok(()) };
        let (primary, backup) = (session.primary, Self::other(session.primary));
        if session.runner.is_none() {
            return Ok(());
        }
        self.settle(primary)?;
        let Some(session) = &mut self.session else { return Ok(()) };
        let Some(runner) = &mut session.runner else { return Ok(()) };
        let request = match runner.poll() {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(_) => return self.abort_run(),
        };
        let receiver = self.hosts[backup].receiver.as_mut().expect("a backup");
        let Ok(reply) = port::deliver(receiver, &port::Request::Run(request), self.time) else {
            return self.abort_run();
        };
        self.settle(backup)?;
        let Some(session) = &mut self.session else { return Ok(()) };
        let Some(runner) = &mut session.runner else { return Ok(()) };
        let Ok(Some(answer)) = reply.answer() else { return self.abort_run() };
        if runner.on_answer(answer, self.time).is_err() {
            return self.abort_run();
        }
        if runner.is_done() {
            session.runner = None;
            self.count("runs committed");
            return self.check_cover(primary);
        }
        Ok(())
    }

    fn abort_run(&mut self) -> Outcome {
        let Some(session) = &mut self.session else { return Ok(()) };
        if let Some(runner) = session.runner.take() {
            let store = self.hosts[session.primary].store();
            let _ = store.abort_run(runner.group(), runner.run().id, self.time);
        }
        Ok(())
    }

    // --- checks

    fn check_head(&self, store: &Arc<Store>, host: usize, group: GroupId, image: &Image) -> Outcome {
        let specs = store.with_state(|s| s.volumes_of(group).cloned().collect::<Vec<_>>());
        if specs.len() != image.len() {
            return Err(broken(format!(
                "node {host} has {} volumes of group {group}, not {}",
                specs.len(),
                image.len()
            )));
        }
        let filling = store.restores();
        for spec in specs.into_iter().filter(|spec| filling.iter().all(|(volume, _)| *volume != spec.id)) {
            let read = store.read(spec.id, 0, spec.block_count());
            let data = read.map_err(|e| broken(format!("node {host}, volume {}: {e}", spec.id)))?.data;
            compare(host, &spec, &data, image.get(&spec.id))?;
        }
        Ok(())
    }

    /// Each backup holds, of each group with an image, the one of its position.
    fn check_images(&mut self) -> Outcome {
        for host in 0..2 {
            if !self.hosts[host].is_up() || self.rng.random_bool(0.8) {
                continue;
            }
            self.settle(host)?;
            self.check_snapshots(host)?;
            if self.hosts[host].role() != Role::Backup {
                continue;
            }
            let store = Arc::clone(self.hosts[host].store());
            for group in port::groups(&store) {
                let Some(view) = port::view(&store, group).filter(|view| view.consistent) else { continue };
                let unknown = store.with_state(|s| s.groups[&group].diverged.is_some_and(|d| d.unknown));
                let of = line(&store, view.position.generation);
                let unknown = unknown || self.copied.contains(&of);
                let Some(image) = self.images.get(&(group, of, view.position)).filter(|_| !unknown) else { continue };
                let specs = store.with_state(|s| s.volumes_of(group).cloned().collect::<Vec<_>>());
                for spec in specs {
                    let Some(read) = port::read(&store, &spec) else { continue };
                    let data = read.map_err(|e| broken(format!("node {host}, volume {}: {e}", spec.id)))?;
                    compare(host, &spec, &data, image.get(&spec.id))?;
                }
            }
        }
        Ok(())
    }

    /// Every block in which the backup's image differs from the primary's head is marked or retained.
    fn check_cover(&mut self, primary: usize) -> Outcome {
        let backup = Self::other(primary);
        self.settle(backup)?;
        if self.session.is_none() {
            return Ok(());
        }
        let (ours, theirs) = (Arc::clone(self.hosts[primary].store()), Arc::clone(self.hosts[backup].store()));
        for (group, head) in &self.hosts[primary].heads {
            let full = |mode: &GroupMode| matches!(mode, GroupMode::Delta { full: true, .. });
            if ours.with_state(|s| s.groups.get(group).is_none_or(|g| full(&g.mode))) {
                continue;
            }
            let covered = ours.divergence(*group);
            let specs = theirs.with_state(|s| s.volumes_of(*group).cloned().collect::<Vec<_>>());
            for spec in specs {
                let (Some(head), Some(Ok(data))) = (head.get(&spec.id), port::read(&theirs, &spec)) else { continue };
                for ((block, bytes), stamp) in (0..).zip(data.chunks(BLOCK)).zip(head) {
                    let marked = covered.get(&spec.id).is_some_and(|blocks| blocks.contains(block));
                    if Stamp::of(bytes) != Some(*stamp) && !marked {
                        return Err(broken(format!(
                            "volume {} block {block} differs between the sides, is not marked and not retained",
                            spec.id
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// What its own primary was told is on this backup is.
    fn check_acknowledged(&self, host: usize) -> Outcome {
        let primary = Self::other(host);
        if self.hosts[host].restored || !self.hosts[primary].is_up() || self.hosts[primary].role() != Role::Primary {
            return Ok(());
        }
        let (ours, theirs) = (self.hosts[host].store(), self.hosts[primary].store());
        let of = ours.identity().generation_id;
        if of != theirs.identity().generation_id || self.copied.contains(&of) {
            return Ok(());
        }
        for (group, held) in theirs.retained().groups() {
            let generation = theirs.identity().generation;
            let at = ours.with_state(|s| s.groups.get(&group).filter(|g| g.diverged.is_none()).map(|g| g.position));
            let forked = theirs.with_state(|s| s.promoted_at);
            if let Some(at) = at.filter(|_| held.acked() > forked)
                && at < (Position { generation, lsn: held.acked() })
            {
                return Err(broken(format!(
                    "group {group} is at {at}, but had acknowledged it up to {}",
                    held.acked()
                )));
            }
        }
        Ok(())
    }

    // --- the end

    /// Joins the two sides by what the situation asks for, until they are identical.
    fn join(&mut self) -> Outcome {
        self.joining = true;
        for host in 0..2 {
            if !self.hosts[host].is_up() {
                self.reopen(host)?;
            }
        }
        for _ in 0..JOIN_ROUNDS {
            self.time += 1;
            if self.join_once()? {
                self.count("identical at the end");
                return Ok(());
            }
        }
        let state = |n: usize| {
            let store = self.hosts[n].store();
            let (identity, state) = (store.identity(), store.state());
            format!("{identity:?} {:?} {:?}", state.groups, store.history())
        };
        Err(broken(format!("the sides were not joined: {}\n{}", state(0), state(1))))
    }

    fn join_once(&mut self) -> Result<bool, Violation> {
        let generation = |world: &Self, n: usize| world.hosts[n].store().identity().generation;
        let primary = match self.primaries()[..] {
            [] => {
                // A backup that is nobody's, or one that was demoted and whose primary never came to be.
                let host = if generation(self, 0) >= generation(self, 1) { 0 } else { 1 };
                return self.promote(host, true).map(|()| false);
            }
            [primary] => primary,
            [a, b] | [a, b, ..] => {
                let primary = if generation(self, a) >= generation(self, b) { a } else { b };
                self.meet(primary, Self::other(primary))?;
                let loser = Self::other(primary);
                if self.hosts[loser].told {
                    let demoted = self.hosts[loser].store().demote_node(false);
                    demoted.map_err(|e| broken(format!("a superseded primary cannot be demoted: {e}")))?;
                } else if self.hosts[primary].told {
                    return Err(broken("the newest primary is superseded"));
                } else {
                    self.give_up(loser)?;
                }
                return self.reopen(loser).map(|()| false);
            }
        };
        if self.hosts[primary].told {
            // It was superseded by a node that has been demoted since.
            let demoted = self.hosts[primary].store().demote_node(false);
            demoted.map_err(|e| broken(format!("a superseded primary cannot be demoted: {e}")))?;
            return self.reopen(primary).map(|()| false);
        }
        let backup = Self::other(primary);
        self.refused_copy = false;
        if self.session.is_none() && !self.attach(primary)? {
            let fork = matches!(
                self.hosts[backup].store().history().relation(&self.hosts[primary].store().history()),
                Relation::Fork { .. }
            );
            let copy = std::mem::take(&mut self.refused_copy);
            if (fork || copy) && self.hosts[backup].role() == Role::Backup {
                self.give_up(backup)?;
                self.reopen(backup)?;
            }
            return Ok(false);
        }
        for _ in 0..20 {
            self.fill(primary)?;
            if self.hosts[primary].role() != Role::Primary {
                return Ok(false);
            }
            self.begin(RunKind::Final)?;
            self.exchange()?;
            self.turn_run()?;
        }
        self.settle(primary)?;
        self.settle(backup)?;
        if self.session.is_none() {
            return Ok(false);
        }
        let store = Arc::clone(self.hosts[primary].store());
        let continuous = store.with_state(|s| s.groups.values().all(|g| g.mode.is_continuous()));
        if !continuous || store.retained_oldest().is_some() || !store.restores().is_empty() {
            return Ok(false);
        }
        let theirs = Arc::clone(self.hosts[backup].store());
        let heads = self.hosts[primary].heads.clone();
        for (group, image) in heads.iter().filter(|(_, image)| !image.is_empty()) {
            self.check_head(&store, primary, *group, image)?;
            self.check_head(&theirs, backup, *group, image)?;
        }
        self.check_snapshots(primary)?;
        self.check_snapshots(backup)?;
        let mirrored =
            store.with_state(|s| s.snapshots.values().filter(|s| s.mirrored).map(|s| s.id).collect::<Vec<_>>());
        let lacks = theirs.with_state(|s| mirrored.into_iter().find(|id| !s.snapshots.contains_key(id)));
        if let Some(missing) = lacks {
            return Err(broken(format!("the backup lacks the mirrored snapshot {missing}")));
        }
        Ok(true)
    }

    fn give_up(&mut self, host: usize) -> Outcome {
        self.count("sides that gave up");
        match self.hosts[host].store().yield_node() {
            Ok(()) | Err(RoleError::Catalog(_)) => Ok(()),
            Err(error) => Err(broken(format!("a side cannot give up: {error}"))),
        }
    }
}

/// Volumes that are not being filled from a snapshot.
fn served(store: &Store) -> Vec<VolumeSpec> {
    store.with_state(|s| s.volumes.values().filter(|spec| !s.restores.contains_key(&spec.id)).cloned().collect())
}

fn read_image(store: &Arc<Store>, group: GroupId) -> Result<Image, Violation> {
    let specs = store.with_state(|s| s.volumes_of(group).cloned().collect::<Vec<_>>());
    let mut image = Image::new();
    for spec in specs {
        let data = port::read(store, &spec).and_then(Result::ok).ok_or_else(|| broken("an image cannot be read"))?;
        let stamps: Option<Vec<Stamp>> = data.chunks(BLOCK).map(Stamp::of).collect();
        image.insert(spec.id, stamps.ok_or_else(|| broken("a block that nobody wrote"))?);
    }
    Ok(image)
}

fn compare(host: usize, spec: &VolumeSpec, data: &[u8], image: Option<&Vec<Stamp>>) -> Outcome {
    let Some(image) = image else { return Err(broken(format!("node {host} has volume {}, which is gone", spec.id))) };
    if data.len() != image.len() * BLOCK {
        return Err(broken(format!(
            "node {host}: volume {} has {} bytes, not {}",
            spec.id,
            data.len(),
            image.len() * BLOCK
        )));
    }
    for (block, (bytes, stamp)) in data.chunks(BLOCK).zip(image).enumerate() {
        if Stamp::of(bytes) != Some(*stamp) {
            return Err(broken(format!(
                "node {host}: volume {} block {block} is {:?}, and {stamp:?} in the image of its position",
                spec.id,
                Stamp::of(bytes)
            )));
        }
    }
    Ok(())
}
