//! Snapshots: taken, deleted, read and compared, and copied into volumes.
//!
//! A copy goes on when whoever asked for it is gone, and after a restart: what is to be filled is in the catalogue, and
//! writing a block twice does no harm.

use std::sync::Arc;

use tokio::{sync::watch, time::timeout};
use understudy_common::{
    checksum::crc32c,
    record,
    state::{GroupState, Snapshot},
    store::{Change, LayerReader, SnapshotError, Submitted},
    types::{BlockRange, Lsn, SnapshotId, VolumeId, VolumeSpec},
};
use understudy_proto::{convert, v1};

use super::{Engine, Rule, check_name, of_submit, unix_ms};
use crate::api::{EngineError, NewVolume, PieceContent, ReadPiece, VolumeKey};

/// Bytes that are read and written in one step of a copy.
const STEP_BYTES: u64 = 1 << 20;

/// How far a copy has come.
#[derive(Debug, Clone, Default)]
pub struct Copying {
    /// Its beginning is durable: it goes on after a crash.
    pub begun: bool,
    /// Looked at or written.
    pub done_bytes: u64,
    /// Of all its volumes.
    pub total_bytes: u64,
    /// Set at its end.
    pub ended: Option<Result<(), EngineError>>,
}

/// A copy from a snapshot into volumes. It does not end with this.
#[derive(Debug, Clone)]
pub struct Copy {
    /// Volumes that are filled.
    pub volumes: Vec<VolumeSpec>,
    /// Its progress.
    pub progress: watch::Receiver<Copying>,
}

/// Ranges that have changed, and the size of the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// Ascending, in bytes: first, and how many.
    pub ranges: Vec<(u64, u64)>,
    /// Where to go on, in bytes.
    pub next: Option<u64>,
    /// Size of the volume.
    pub volume_bytes: u64,
}

impl Engine {
    /// A group by its name, or by that of one of its volumes.
    fn group(&self, name: &str) -> Result<GroupState, EngineError> {
        let found = self.inner.store.with_state(|state| state.group_by_name(name).cloned());
        found.ok_or_else(|| EngineError::NoGroup { group: name.to_owned() })
    }

    fn snapshot_of(&self, group: &GroupState, name: &str) -> Result<Snapshot, EngineError> {
        let found = self.inner.store.with_state(|state| state.snapshot_by_name(group.id, name).cloned());
        found.ok_or_else(|| EngineError::NoSnapshot { group: group.name.clone(), snapshot: name.to_owned() })
    }

    /// The snapshot of a volume's group, by its name, with the volume as it was.
    fn snapshot_of_volume(&self, volume: &VolumeKey, name: &str) -> Result<(Snapshot, VolumeSpec), EngineError> {
        let spec = self.spec(volume)?;
        let none = || EngineError::NoSnapshot { group: spec.name.clone(), snapshot: name.to_owned() };
        let found = self.inner.store.with_state(|state| state.snapshot_by_name(spec.group, name).cloned());
        let snapshot = found.ok_or_else(none)?;
        let was = snapshot.volume(spec.id).map(|(was, _)| was.clone()).ok_or_else(none)?;
        Ok((snapshot, was))
    }

    fn describe(&self, snapshot: &Snapshot, group: &str) -> Result<v1::SnapshotInfo, EngineError> {
        let held = match self.inner.store.held_bytes(snapshot) {
            Ok(held) => held,
            // Not in its place yet, or gone again.
            Err(SnapshotError::Read(_)) => 0,
            Err(error) => return Err(of_snapshot(error, group)),
        };
        Ok(convert::snapshot_to_wire(snapshot, group, held))
    }

    /// Takes a snapshot of a group. Returns when it is durable.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn take_snapshot(&self, group: &str, name: &str) -> Result<v1::SnapshotInfo, EngineError> {
        check_name("name", name)?;
        let group = self.group(group)?;
        let taken = self.inner.store.take_snapshot(group.id, name, unix_ms());
        let (snapshot, submitted) = taken.map_err(|error| of_snapshot(error, &group.name))?;
        self.settle(submitted, Rule::Staged).await?;
        self.describe(&snapshot, &group.name)
    }

    /// The snapshots of a group, or of every group.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn snapshots(&self, group: Option<&str>) -> Result<Vec<v1::SnapshotInfo>, EngineError> {
        let only = group.map(|name| self.group(name)).transpose()?.map(|group| group.id);
        let found = self.inner.store.with_state(|state| state.named_snapshots(only));
        found.iter().map(|(snapshot, group)| self.describe(snapshot, group)).collect()
    }

    /// Names and times of the snapshots of a group, Unix milliseconds. What they hold is not asked for, which takes a
    /// look at their maps.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn snapshot_times(&self, group: &str) -> Result<Vec<(String, i64)>, EngineError> {
        let group = self.group(group)?.id;
        let time = |snapshot: &Snapshot| (snapshot.name.clone(), snapshot.time_unix_ms);
        Ok(self.inner.store.with_state(|state| state.snapshots_of(group).map(time).collect()))
    }

    /// Deletes a snapshot. Returns when that is durable.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn delete_snapshot(&self, group: &str, name: &str) -> Result<(), EngineError> {
        let group = self.group(group)?;
        let snapshot = self.snapshot_of(&group, name)?;
        let dropped = self.inner.store.drop_snapshot(snapshot.id, unix_ms());
        self.settle(dropped.map_err(|error| of_snapshot(error, &group.name))?, Rule::Staged).await?;
        Ok(())
    }

    /// Reads from `offset_bytes` of a volume's snapshot on: a hole, or at most `max_bytes` of data.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn read_snapshot(
        &self,
        volume: &VolumeKey,
        snapshot: &str,
        offset_bytes: u64,
        max_bytes: u64,
    ) -> Result<ReadPiece, EngineError> {
        let (snapshot, spec) = self.snapshot_of_volume(volume, snapshot)?;
        super::check_range(&spec, offset_bytes, 1)?;
        self.applied(snapshot.lsn).await?;
        let reader = self.reader(snapshot.id, &spec)?;
        let block_bytes = u64::from(spec.block_size.bytes());
        let first = offset_bytes / block_bytes;
        let max = (max_bytes / block_bytes).max(1).min(spec.block_count() - first);
        let position = snapshot.position;
        let read = move || {
            let (hole, count) = reader.extent(first, max)?;
            Ok((count, if hole { None } else { Some(reader.read(first, count)?) }))
        };
        let (count, data) = self.blocking(&spec, read).await?;
        let length = ((first + count) * block_bytes - offset_bytes).min(max_bytes.max(1));
        let Some(data) = data else {
            return Ok(ReadPiece { offset_bytes, content: PieceContent::Zeros(length), crc32c: 0, position });
        };
        let at = usize::try_from(offset_bytes - first * block_bytes).expect("inside a block");
        let data = data.slice(at..at + usize::try_from(length).expect("bounded by the message size"));
        let crc32c = crc32c(&data);
        Ok(ReadPiece { offset_bytes, content: PieceContent::Data(data), crc32c, position })
    }

    /// The volume as it was in a snapshot.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn snapshot_spec(&self, volume: &VolumeKey, snapshot: &str) -> Result<VolumeSpec, EngineError> {
        Ok(self.snapshot_of_volume(volume, snapshot)?.1)
    }

    /// Ranges of a volume, from `offset_bytes` on, that differ between a snapshot and a newer one, or the head.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn changed_blocks(
        &self,
        volume: &VolumeKey,
        base: &str,
        target: Option<&str>,
        offset_bytes: u64,
    ) -> Result<Changed, EngineError> {
        let (base, spec) = self.snapshot_of_volume(volume, base)?;
        let volume_bytes = self.spec(&VolumeKey::Id(spec.id))?.size_bytes;
        let (target, upto, volume_bytes) = match target {
            Some(name) => {
                let (target, target_spec) = self.snapshot_of_volume(volume, name)?;
                if target.lsn < base.lsn {
                    let why = format!("{name:?} is older than the base snapshot; swap the two");
                    return Err(EngineError::Invalid { field: "target_snapshot", why });
                }
                (Some(target.id), target.lsn, target_spec.size_bytes)
            }
            None => (None, Lsn(self.inner.store.next_lsn().0 - 1), volume_bytes),
        };
        self.applied(upto).await?;
        let block_bytes = u64::from(spec.block_size.bytes());
        let (ranges, next) = self.differing(&spec, base.id, target, offset_bytes / block_bytes).await?;
        let bytes = |range: BlockRange| (range.first * block_bytes, range.count * block_bytes);
        let next = next.map(|block| block * block_bytes);
        Ok(Changed { ranges: ranges.into_iter().map(bytes).collect(), next, volume_bytes })
    }

    async fn differing(
        &self,
        spec: &VolumeSpec,
        base: SnapshotId,
        target: Option<SnapshotId>,
        first: u64,
    ) -> Result<(Vec<BlockRange>, Option<u64>), EngineError> {
        let (store, id) = (Arc::clone(&self.inner.store), spec.id);
        let done = self.blocking(spec, move || Ok(store.changed_blocks(id, base, target, first))).await?;
        done.map_err(|error| of_snapshot(error, &spec.name))
    }

    /// Makes volumes of a group, or only `volume`, what they were in a snapshot. Returns when it has begun durably.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn restore(&self, group: &str, volume: Option<&str>, snapshot: &str) -> Result<Copy, EngineError> {
        let volumes: Vec<VolumeId>;
        let snapshot = match volume {
            Some(volume) => {
                let (snapshot, spec) = self.snapshot_of_volume(&VolumeKey::Name(volume.to_owned()), snapshot)?;
                volumes = vec![spec.id];
                snapshot
            }
            None => {
                let snapshot = self.snapshot_of(&self.group(group)?, snapshot)?;
                volumes = snapshot.layers.iter().map(|(volume, _)| *volume).collect();
                snapshot
            }
        };
        self.begin(&snapshot, volumes.into_iter().map(|volume| (volume, volume)).collect()).await
    }

    /// Makes a volume with the content of a snapshot. Returns when it has begun durably.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn clone_snapshot(
        &self,
        volume: &VolumeKey,
        snapshot: &str,
        name: String,
        group: Option<String>,
    ) -> Result<Copy, EngineError> {
        let (snapshot, spec) = self.snapshot_of_volume(volume, snapshot)?;
        let (size_bytes, block_bytes) = (spec.size_bytes, spec.block_size.bytes());
        let new = NewVolume { name, size_bytes, block_bytes, group, ack: spec.ack, away: spec.away };
        // One record: at no instant, and behind no crash, is there an empty volume that is served.
        let (made, submitted) = self.submit_volume(new, Some((snapshot.id, spec.id)))?;
        self.inner.filling.lock().insert(made.id);
        let volumes = vec![(made.id, spec.id)];
        self.filled(vec![made], snapshot.id, volumes, submitted).await
    }

    async fn begin(&self, snapshot: &Snapshot, volumes: Vec<(VolumeId, VolumeId)>) -> Result<Copy, EngineError> {
        if self.is_draining() {
            return Err(EngineError::Draining);
        }
        let specs: Vec<VolumeSpec> =
            volumes.iter().map(|(volume, _)| self.spec(&VolumeKey::Id(*volume))).collect::<Result<_, _>>()?;
        let name = || specs.first().map(|spec| spec.name.clone()).unwrap_or_default();
        {
            let mut filling = self.inner.filling.lock();
            if let Some(busy) = specs.iter().find(|spec| filling.contains(&spec.id)) {
                return Err(EngineError::Restoring { volume: busy.name.clone() });
            }
            filling.extend(specs.iter().map(|spec| spec.id));
        }
        let begun = self.inner.store.begin_restore(snapshot.id, volumes.clone(), unix_ms());
        let submitted = match begun {
            Ok(submitted) => submitted,
            Err(error) => {
                self.release_filling(&volumes);
                return Err(of_snapshot(error, &name()));
            }
        };
        self.filled(specs, snapshot.id, volumes, submitted).await
    }

    /// Fills volumes whose restore was submitted. Returns when that is durable.
    async fn filled(
        &self,
        specs: Vec<VolumeSpec>,
        snapshot: SnapshotId,
        volumes: Vec<(VolumeId, VolumeId)>,
        submitted: Submitted,
    ) -> Result<Copy, EngineError> {
        let mut progress = self.fill(snapshot, volumes, submitted);
        // The task goes on, and keeps its channel, also when nobody waits here any more.
        let _ = progress.wait_for(|copying| copying.begun || copying.ended.is_some()).await;
        if let Some(Err(error)) = &progress.borrow().ended {
            return Err(error.clone());
        }
        Ok(Copy { volumes: specs, progress })
    }

    fn release_filling(&self, volumes: &[(VolumeId, VolumeId)]) {
        self.inner.filling.lock().retain(|id| !volumes.iter().any(|(volume, _)| volume == id));
    }

    /// Goes on with what was being filled when the node stopped.
    pub fn resume_restores(&self) {
        let newest = Lsn(self.inner.store.next_lsn().0 - 1);
        for (volume, restore) in self.inner.store.restores() {
            let Ok(spec) = self.spec(&VolumeKey::Id(volume)) else { continue };
            let volumes = vec![(volume, restore.source)];
            self.inner.filling.lock().insert(volume);
            let submitted = Submitted {
                lsn: newest,
                position: understudy_common::types::Position { generation: 0, lsn: newest },
                group: spec.group,
                lane: None,
                duplicate: false,
            };
            drop(self.fill(restore.snapshot, volumes, submitted));
        }
    }

    fn fill(
        &self,
        snapshot: SnapshotId,
        volumes: Vec<(VolumeId, VolumeId)>,
        begun: Submitted,
    ) -> watch::Receiver<Copying> {
        let (progress, seen) = watch::channel(Copying::default());
        let engine = self.clone();
        tokio::spawn(async move {
            let ended = engine.fill_all(snapshot, &volumes, begun, &progress).await;
            engine.release_filling(&volumes);
            if let Err(error) = &ended {
                tracing::warn!(%error, "filling volumes from a snapshot has stopped");
            }
            progress.send_modify(|copying| copying.ended = Some(ended));
        });
        seen
    }

    async fn fill_all(
        &self,
        snapshot: SnapshotId,
        volumes: &[(VolumeId, VolumeId)],
        begun: Submitted,
        progress: &watch::Sender<Copying>,
    ) -> Result<(), EngineError> {
        self.settle(begun, Rule::Staged).await?;
        progress.send_modify(|copying| copying.begun = true);
        // What clients wrote before is in the maps then; what they write now is refused.
        self.applied(begun.lsn).await?;
        let mut parts = Vec::new();
        for (volume, source) in volumes {
            let spec = self.spec(&VolumeKey::Id(*volume))?;
            let (was, _) = {
                let held = self.inner.store.snapshot(snapshot);
                let found = held.as_ref().and_then(|s| s.volume(*source)).map(|(was, layer)| (was.clone(), layer));
                found.ok_or_else(|| EngineError::NoSnapshot {
                    group: spec.name.clone(),
                    snapshot: snapshot.to_string(),
                })?
            };
            let ranges = if volume == source {
                self.to_restore(&spec, &was, snapshot).await?
            } else {
                vec![BlockRange { volume: *volume, first: 0, count: was.block_count() }]
            };
            let blocks: u64 = ranges.iter().map(|range| range.count).sum();
            let bytes = blocks * u64::from(spec.block_size.bytes());
            progress.send_modify(|copying| copying.total_bytes += bytes);
            parts.push((spec, was, ranges));
        }
        for (spec, was, ranges) in parts {
            let reader = Arc::new(self.reader(snapshot, &was)?);
            let fresh = spec.id != was.id;
            for range in ranges {
                self.copy_range(&spec, &reader, range, fresh, progress).await?;
            }
        }
        let ids = volumes.iter().map(|(volume, _)| *volume).collect();
        let ended = self.inner.store.end_restore(ids, unix_ms());
        let ended = ended.map_err(|error| EngineError::Storage { message: error.to_string() })?;
        self.settle(ended, Rule::Staged).await?;
        Ok(())
    }

    /// What differs from the snapshot, and what the volume has gained since.
    async fn to_restore(
        &self,
        spec: &VolumeSpec,
        was: &VolumeSpec,
        snapshot: SnapshotId,
    ) -> Result<Vec<BlockRange>, EngineError> {
        let (mut ranges, mut from) = (Vec::new(), Some(0));
        while let Some(first) = from {
            let (found, next) = self.differing(was, snapshot, None, first).await?;
            ranges.extend(found);
            from = next;
        }
        let end = was.block_count();
        ranges.retain_mut(|range| {
            range.count = range.count.min(end.saturating_sub(range.first));
            range.count > 0
        });
        if spec.block_count() > end {
            ranges.push(BlockRange { volume: spec.id, first: end, count: spec.block_count() - end });
        }
        Ok(ranges)
    }

    /// Copies blocks; those behind the snapshot's end become zeros.
    async fn copy_range(
        &self,
        spec: &VolumeSpec,
        reader: &Arc<LayerReader>,
        range: BlockRange,
        fresh: bool,
        progress: &watch::Sender<Copying>,
    ) -> Result<(), EngineError> {
        let block_bytes = u64::from(spec.block_size.bytes());
        let step = (STEP_BYTES / block_bytes).max(1);
        let mut at = range.first;
        while at < range.end() {
            // Steps end at multiples of their size: whole segments are written by reference.
            let max = (step - at % step).min(range.end() - at);
            let (count, change) = if at >= reader.spec().block_count() {
                let count = (range.end() - at).min(super::ZERO_BLOCKS_MAX);
                (count, Some(Change::Zero { count }))
            } else {
                let (reader, size) = (Arc::clone(reader), spec.block_size);
                let read = move || {
                    let (hole, count) = reader.extent(at, max)?;
                    if hole {
                        return Ok((count, (!fresh).then_some(Change::Zero { count })));
                    }
                    let data = reader.read(at, count)?;
                    let crcs = record::block_crcs(&data, size);
                    Ok((count, Some(Change::Write { data, crcs })))
                };
                self.blocking(spec, read).await?
            };
            if let Some(change) = change {
                self.submit_copied(spec, at, change).await?;
            }
            at += count;
            progress.send_modify(|copying| copying.done_bytes += count * block_bytes);
        }
        Ok(())
    }

    /// Waits for room as long as it takes: until the node ends.
    async fn submit_copied(&self, spec: &VolumeSpec, first: u64, change: Change) -> Result<(), EngineError> {
        loop {
            if self.is_draining() {
                return Err(EngineError::Draining);
            }
            let store = &self.inner.store;
            let mut marks = self.inner.marks.clone();
            marks.mark_unchanged();
            if store.queue_bytes() <= store.config().pending_bytes {
                match store.submit_restored(spec.id, first, change.clone(), unix_ms()) {
                    Ok(_) => return Ok(()),
                    Err(error) => {
                        if !self.ask_for_room(&error) {
                            return Err(of_submit(error, spec, None, self.inner.limits.queue_wait));
                        }
                    }
                }
            }
            // What has not moved in time is looked at again.
            let _ = timeout(self.inner.limits.queue_wait, marks.changed()).await;
        }
    }

    fn reader(&self, snapshot: SnapshotId, spec: &VolumeSpec) -> Result<LayerReader, EngineError> {
        self.inner.store.snapshot_reader(snapshot, spec.id).map_err(|error| of_snapshot(error, &spec.name))
    }

    async fn applied(&self, lsn: Lsn) -> Result<(), EngineError> {
        let mut marks = self.inner.marks.clone();
        let ended = marks.wait_for(|m| m.applied >= lsn || m.failed).await.is_err();
        if ended || self.inner.store.failure().is_some() {
            return Err(EngineError::Storage { message: self.inner.store.failure().unwrap_or_default() });
        }
        Ok(())
    }
}

fn of_snapshot(error: SnapshotError, group: &str) -> EngineError {
    let (group, why) = (group.to_owned(), error.to_string());
    match error {
        SnapshotError::NoGroup(_) => EngineError::NoGroup { group },
        SnapshotError::NoSnapshot(id) => EngineError::NoSnapshot { group, snapshot: id.to_string() },
        SnapshotError::Exists(snapshot) => EngineError::SnapshotExists { group, snapshot },
        SnapshotError::TooMany
        | SnapshotError::Smaller { .. }
        | SnapshotError::InUse
        | SnapshotError::Submit(_)
        | SnapshotError::Read(_) => EngineError::Snapshot { group, why },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use understudy_common::{
        journal::JournalConfig,
        lane::Lanes,
        policy::PolicyConfig,
        pool::{DeviceConfig, PoolConfig},
        storage::SimStorage,
        store::{self, Levels, ReadFailure, Role, Store, StoreConfig},
        types::{AckRule, AwayRule, BlockSize, Uid},
    };

    use super::*;
    use crate::{engine::Limits, replicator::Handle};

    fn open(disk: &SimStorage) -> (Arc<Store>, Engine) {
        let device = DeviceConfig { path: "pool".into(), size_bytes: Some(4 << 20), max_bytes: None };
        let config = StoreConfig {
            journal: JournalConfig {
                capacity_bytes: 1 << 20,
                file_bytes: 64 << 10,
                reserve_bytes: 64 << 10,
                max_batch_bytes: 16 << 10,
            },
            pool: PoolConfig { segment_bytes: 64 << 10, devices: vec![device], map_cache_bytes: 1 << 20 },
            checkpoint_bytes: 64 << 10,
            tail_bytes: 64 << 10,
            reference_bytes: usize::MAX,
            apply_bytes: 64 << 10,
            pending_bytes: 1 << 20,
            retain: true,
            lanes: Lanes::default(),
            levels: Levels::default(),
            drain_bytes_per_s: 0,
        };
        let mut ids = (1..).map(|n| Uid([n; 16]));
        let storage = Arc::new(disk.clone());
        let (store, _) = store::open(storage, config, Role::Primary, &mut || ids.next().unwrap()).unwrap();
        let limits = Limits {
            message_bytes: 1 << 20,
            in_flight_bytes: 1 << 20,
            queue_wait: Duration::from_secs(5),
            deadline: Duration::from_secs(5),
            inline_reads: true,
            lease: None,
        };
        let engine = Engine::new(Arc::clone(&store), limits, Handle::new(PolicyConfig::default()));
        (store, engine)
    }

    /// One group commit; false if there was nothing to commit.
    fn commit(store: &Store) -> bool {
        let Some(job) = store.take_batch() else { return false };
        let result = job.run();
        store.finish_batch(job, result);
        true
    }

    fn apply(store: &Store) {
        while let Some(mut job) = store.take_apply() {
            let result = job.run();
            store.finish_apply(job, result);
        }
    }

    /// Whether the clone is there; if it is served, it must be whole.
    fn check_clone(store: &Store, when: &str) -> bool {
        let Some(id) = store.with_state(|s| s.volume_by_name("copy").map(|spec| spec.id)) else { return false };
        match store.read(id, 3, 1) {
            Ok(read) => assert!(read.data[..] == [7; 512], "{when}: served, and not what it is a clone of"),
            Err(ReadFailure::Restoring(_)) => {}
            Err(error) => panic!("{when}: {error}"),
        }
        true
    }

    /// Looked at at every step of a clone, and behind a crash after every group commit.
    #[tokio::test]
    async fn a_clone_is_never_served_empty() {
        let disk = SimStorage::new(1);
        let (store, engine) = open(&disk);
        let stop = tokio_util::sync::CancellationToken::new();
        tokio::spawn(engine.clone().answer(stop.clone()));
        let new = NewVolume {
            name: "v".into(),
            size_bytes: 64 << 10,
            block_bytes: 512,
            group: None,
            ack: AckRule::Staged,
            away: AwayRule::Degrade,
        };
        let (made, _) = engine.submit_volume(new, None).unwrap();
        let data = bytes::Bytes::from(vec![7; 512]);
        let crcs = record::block_crcs(&data, BlockSize::new(512).unwrap());
        store.submit(made.id, 3, Change::Write { data, crcs }, None, 1).unwrap();
        store.take_snapshot(made.group, "s", 1).unwrap();
        while commit(&store) {}
        apply(&store);

        let cloning = engine.clone();
        let volume = VolumeKey::Name("v".into());
        let clone = tokio::spawn(async move { cloning.clone_snapshot(&volume, "s", "copy".into(), None).await });
        let mut crashes = 0;
        while !clone.is_finished() || !store.restores().is_empty() {
            tokio::task::yield_now().await;
            let there = check_clone(&store, "alive");
            if commit(&store) && there {
                let after = disk.fork();
                after.kill();
                let (reopened, _) = open(&after);
                while commit(&reopened) {}
                apply(&reopened);
                crashes += usize::from(check_clone(&reopened, "behind a crash"));
            }
            apply(&store);
        }
        assert!(crashes > 1, "{crashes} crashes with the clone there");
        clone.await.unwrap().unwrap();
        stop.cancel();
    }
}
