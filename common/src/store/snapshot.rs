//! Snapshots for users: taken and deleted in O(1), read, compared, and copied into volumes.
//!
//! A snapshot of a group in continuous mode is a record of the group's chain, so both sides hold it at one position. In
//! delta mode it is this node's own (`mirrored` is false): the backup never had that image. A deletion travels while the
//! group's records do; the next run tells the backup of the others.
//!
//! A volume is filled from a snapshot by ordinary writes of the blocks that differ, so marks, records and the backup need
//! to know nothing of it. Until all are written the volume is not served, also across a crash.

use std::sync::Arc;

use thiserror::Error;

use crate::{
    record::Control,
    state::{GroupMode, NodeState, Restore, SNAPSHOTS_MAX, Snapshot},
    types::{BlockRange, GroupId, LayerId, SnapshotId, VolumeId, VolumeSpec},
};

use super::{Change, Front, LayerReader, ReadFailure, Store, SubmitError, Submitted};

/// Chunks of a segment map that are looked at under one lock.
const CHUNKS: usize = 64;

/// Why something was not done with a snapshot. Nothing was changed.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// No such group.
    #[error("group {0} does not exist")]
    NoGroup(GroupId),
    /// No such snapshot, or it has not that volume.
    #[error("snapshot {0} does not exist, or does not hold that volume")]
    NoSnapshot(SnapshotId),
    /// The name is taken.
    #[error("the group has a snapshot {0:?} already: delete it, or choose another name")]
    Exists(String),
    /// Too many.
    #[error("the group has {SNAPSHOTS_MAX} snapshots, the most that are served: delete one first")]
    TooMany,
    /// It holds more than the volume to be filled from it has room for.
    #[error("the snapshot holds volume {volume} with {held_bytes} bytes, and it has {size_bytes} now: resize it first")]
    Smaller {
        /// The volume.
        volume: VolumeId,
        /// In the snapshot.
        held_bytes: u64,
        /// Now.
        size_bytes: u64,
    },
    /// A volume is filled from it.
    #[error("a volume is being filled from the snapshot: delete it when that is done")]
    InUse,
    /// The store.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The segment maps.
    #[error(transparent)]
    Read(#[from] ReadFailure),
}

impl Front {
    /// Puts this node's layers into a record of the stream that makes or deletes a snapshot.
    pub(super) fn name_layers(&self, control: &mut Control) {
        match control {
            Control::TakeSnapshot { group, layers, .. } => *layers = self.state.new_layers(*group),
            Control::DropSnapshot { id, layers } => *layers = layers_of(&self.state, *id),
            _ => {}
        }
    }
}

fn layers_of(state: &NodeState, id: SnapshotId) -> Vec<LayerId> {
    let layers = state.snapshots.get(&id).map(|snapshot| snapshot.layers.as_slice()).unwrap_or_default();
    layers.iter().map(|(_, layer)| *layer).collect()
}

/// Records of the group are retained for the backup from here on.
fn is_shipped(front: &Front, group: GroupId) -> bool {
    front.state.retains(group, front.journal.next_lsn())
}

impl Store {
    /// Takes a snapshot of every volume of a group, at the instant of its record.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn take_snapshot(
        &self,
        group: GroupId,
        name: &str,
        time_unix_ms: i64,
    ) -> Result<(Snapshot, Submitted), SnapshotError> {
        let mut front = self.front.lock();
        let state = &front.state;
        let mode = &state.groups.get(&group).ok_or(SnapshotError::NoGroup(group))?.mode;
        if state.snapshot_by_name(group, name).is_some() {
            return Err(SnapshotError::Exists(name.to_owned()));
        }
        if state.snapshots_of(group).count() >= SNAPSHOTS_MAX {
            return Err(SnapshotError::TooMany);
        }
        // Not in a final round: a demotion would leave its record to nobody.
        let mirrored = matches!(mode, GroupMode::Continuous { .. }) && self.config.retain;
        let id = SnapshotId(state.last_snapshot.0 + 1);
        let layers = state.new_layers(group);
        let control = Control::TakeSnapshot { id, group, name: name.to_owned(), mirrored, layers };
        let chain = if mirrored { group } else { GroupId::default() };
        let submitted = self.submit_control_locked(&mut front, chain, control, time_unix_ms)?;
        Ok((front.state.snapshots[&id].clone(), submitted))
    }

    /// Deletes a snapshot, on the backup as well.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn drop_snapshot(&self, id: SnapshotId, time_unix_ms: i64) -> Result<Submitted, SnapshotError> {
        let mut front = self.front.lock();
        let group = front.state.snapshots.get(&id).ok_or(SnapshotError::NoSnapshot(id))?.group;
        if front.state.restores.values().any(|restore| restore.snapshot == id) {
            return Err(SnapshotError::InUse);
        }
        let chain = if is_shipped(&front, group) { group } else { GroupId::default() };
        let control = Control::DropSnapshot { id, layers: layers_of(&front.state, id) };
        Ok(self.submit_control_locked(&mut front, chain, control, time_unix_ms)?)
    }

    /// A snapshot.
    #[must_use]
    pub fn snapshot(&self, id: SnapshotId) -> Option<Snapshot> {
        self.with_state(|state| state.snapshots.get(&id).cloned())
    }

    /// Reads a volume of a snapshot. Wait until the snapshot's `lsn` is applied before reading. When the snapshot is
    /// deleted meanwhile, reads fail.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn snapshot_reader(self: &Arc<Self>, id: SnapshotId, volume: VolumeId) -> Result<LayerReader, SnapshotError> {
        let snapshot = self.snapshot(id).ok_or(SnapshotError::NoSnapshot(id))?;
        let (spec, layer) = snapshot.volume(volume).ok_or(SnapshotError::NoSnapshot(id))?;
        Ok(LayerReader::new(self, spec, layer))
    }

    /// Blocks of `volume`, from block `first` on, of which `base` has other versions than `target`, a newer snapshot, or
    /// the head: ascending ranges, and where to go on if there may be more. In time proportional to what changed.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn changed_blocks(
        &self,
        volume: VolumeId,
        base: SnapshotId,
        target: Option<SnapshotId>,
        first: u64,
    ) -> Result<(Vec<BlockRange>, Option<u64>), SnapshotError> {
        let held = |id: SnapshotId| {
            let found = self.with_state(|state| {
                state.snapshots.get(&id)?.volume(volume).map(|(spec, layer)| (spec.block_count(), layer))
            });
            found.ok_or(SnapshotError::NoSnapshot(id))
        };
        let (_, base) = held(base)?;
        let (blocks, target) = match target {
            Some(target) => held(target).map(|(blocks, layer)| (blocks, Some(layer)))?,
            None => {
                let blocks = self.with_state(|state| state.volumes.get(&volume).map(VolumeSpec::block_count));
                (blocks.ok_or(SubmitError::NoVolume(volume))?, None)
            }
        };
        let changed = self.pool.lock().changed_blocks(volume, base, target, first, CHUNKS);
        let (mut changed, next) = changed.map_err(ReadFailure::from)?;
        // The pool keeps the place of a larger one.
        changed.retain_mut(|range| {
            range.count = range.count.min(blocks.saturating_sub(range.first));
            range.count > 0
        });
        Ok((changed, next.filter(|next| *next < blocks)))
    }

    /// Bytes of block versions that only this snapshot and older ones hold.
    ///
    /// # Errors
    /// The segment map cannot be read.
    pub fn held_bytes(&self, snapshot: &Snapshot) -> Result<u64, SnapshotError> {
        let mut bytes = 0;
        for (volume, layer) in &snapshot.layers {
            let Some((spec, _)) = snapshot.volume(*volume) else { continue };
            let mut from = Some(0);
            while let Some(chunk) = from {
                let held = self.pool.lock().held_blocks(*volume, *layer, chunk, CHUNKS);
                let (blocks, next) = held.map_err(ReadFailure::from)?;
                bytes += blocks * u64::from(spec.block_size.bytes());
                from = next;
            }
        }
        Ok(bytes)
    }

    /// From here on the volumes are not served: they are to be filled, each from a volume of the snapshot. What they
    /// were being filled from before does not count any more.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn begin_restore(
        &self,
        snapshot: SnapshotId,
        volumes: Vec<(VolumeId, VolumeId)>,
        time_unix_ms: i64,
    ) -> Result<Submitted, SnapshotError> {
        let mut front = self.front.lock();
        let held = front.state.snapshots.get(&snapshot).ok_or(SnapshotError::NoSnapshot(snapshot))?;
        for (volume, source) in &volumes {
            let (was, _) = held.volume(*source).ok_or(SnapshotError::NoSnapshot(snapshot))?;
            let spec = front.state.volumes.get(volume).ok_or(SubmitError::NoVolume(*volume))?;
            if spec.size_bytes < was.size_bytes {
                let (volume, held_bytes, size_bytes) = (*volume, was.size_bytes, spec.size_bytes);
                return Err(SnapshotError::Smaller { volume, held_bytes, size_bytes });
            }
        }
        let control = Control::BeginRestore { snapshot, volumes };
        Ok(self.submit_control_locked(&mut front, GroupId::default(), control, time_unix_ms)?)
    }

    /// The volumes are filled, and served again.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn end_restore(&self, volumes: Vec<VolumeId>, time_unix_ms: i64) -> Result<Submitted, SubmitError> {
        self.submit_control(GroupId::default(), Control::EndRestore { volumes }, time_unix_ms)
    }

    /// A change of blocks of a volume that is being filled.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn submit_restored(
        &self,
        volume: VolumeId,
        first_block: u64,
        change: Change,
        time_unix_ms: i64,
    ) -> Result<Submitted, SubmitError> {
        let mut front = self.front.lock();
        let submitted =
            self.submit_change(&mut front, self.lane_of(None), volume, first_block, change, None, time_unix_ms)?;
        self.work.notify_one();
        Ok(submitted)
    }

    /// Volumes that are being filled.
    #[must_use]
    pub fn restores(&self) -> Vec<(VolumeId, Restore)> {
        self.with_state(|state| state.restores.iter().map(|(volume, restore)| (*volume, *restore)).collect())
    }
}
