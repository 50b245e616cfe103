//! Snapshots for users in the simulation: taken and deleted at any moment, on either side of switches and runs.
//!
//! - P7: a snapshot is the image of the position that it names, as long as it is there, on both sides.
//! - At rest the backup holds every snapshot that the primary says is mirrored, and none that the primary has not.

use std::{collections::BTreeSet, sync::Arc};

use rand::{Rng, seq::IteratorRandom};
use understudy_common::{
    state::Snapshot,
    store::{ReadFailure, SnapshotError, Store},
    types::{GroupId, SnapshotId},
};

use super::{Outcome, World, broken, oracle::compare_bytes, trace};

/// Snapshots of one group: space is tight.
const SNAPSHOTS: usize = 3;

impl World {
    pub(super) fn change_snapshots(&mut self) -> Outcome {
        let (store, time) = (Arc::clone(self.primary.store()), self.time);
        let groups: Vec<GroupId> = store.with_state(|state| state.groups.keys().copied().collect());
        let Some(group) = groups.into_iter().choose(&mut self.rng) else { return Ok(()) };
        let taken: Vec<SnapshotId> = store.with_state(|state| state.snapshots_of(group).map(|s| s.id).collect());
        let result = if taken.len() < SNAPSHOTS && self.rng.random_bool(0.6) {
            let name = format!("s{}", store.with_state(|state| state.last_snapshot.0 + 1));
            store.take_snapshot(group, &name, time).map(|(snapshot, _)| {
                trace!(self, "snapshot {} of group {group}, mirrored {}", snapshot.id, snapshot.mirrored);
                let what =
                    if snapshot.mirrored { "snapshots taken on both sides" } else { "snapshots taken on one side" };
                self.summary.count(what, 1);
            })
        } else {
            let Some(id) = taken.into_iter().choose(&mut self.rng) else { return Ok(()) };
            store.drop_snapshot(id, time).map(|_| {
                trace!(self, "snapshot {id} of group {group} is deleted");
                self.summary.count("snapshots deleted", 1);
            })
        };
        match result {
            Ok(()) => Ok(()),
            Err(SnapshotError::Submit(error)) => self.refused(&store, &error),
            Err(error) => Err(broken(format!("a snapshot was refused: {error}"))),
        }
    }

    /// P7.
    pub(super) fn check_snapshots(&mut self) -> Outcome {
        self.check_mirrored()?;
        for (who, store) in [("the primary", self.primary.store()), ("the backup", self.backup.store())] {
            let applied = store.marks().borrow().applied;
            for snapshot in snapshots(store).into_iter().filter(|snapshot| snapshot.lsn <= applied) {
                for (volume, _) in &snapshot.layers {
                    let (spec, _) = snapshot.volume(*volume).expect("it has its layer");
                    let reader = store.snapshot_reader(snapshot.id, *volume);
                    let reader = reader.map_err(|error| broken(format!("{who}: {error}")))?;
                    let what = format!("{who}: snapshot {} of volume {volume}", snapshot.id);
                    let data = match reader.read(0, spec.block_count()) {
                        Ok(data) => data,
                        Err(ReadFailure::Failed(_)) => continue,
                        // Its deletion is not applied yet, and the catalogue is ahead: not here, which it looked at.
                        Err(error) => return Err(broken(format!("{what} cannot be read: {error}"))),
                    };
                    let position = snapshot.position.lsn;
                    let image = self.model.image(*volume, position);
                    let image = image.ok_or_else(|| broken(format!("{what} is of a time before the volume")))?;
                    compare_bytes(&data, &image, &what, position)?;
                    self.summary.count("snapshots compared", 1);
                }
            }
        }
        Ok(())
    }

    /// What the backup will not get is not called mirrored: in delta mode nothing is on its way to it.
    fn check_mirrored(&self) -> Outcome {
        let counted = |what| self.summary.counts.get(what).is_some_and(|n| *n > 0);
        // Of a disk that was put in the primary hears with the next run.
        if counted("old disks put back") || counted("empty disks put in") {
            return Ok(());
        }
        let theirs: BTreeSet<SnapshotId> = snapshots(self.backup.store()).iter().map(|s| s.id).collect();
        let (store, ours) = (self.primary.store(), snapshots(self.primary.store()));
        match ours.iter().find(|s| s.mirrored && store.is_delta(s.group) && !theirs.contains(&s.id)) {
            Some(missing) => {
                Err(broken(format!("snapshot {} is called mirrored, and the backup does not get it", missing.id)))
            }
            None => Ok(()),
        }
    }

    pub(super) fn check_snapshots_at_rest(&mut self) -> Outcome {
        self.check_snapshots()?;
        let ours = snapshots(self.primary.store());
        let all: BTreeSet<SnapshotId> = ours.iter().map(|s| s.id).collect();
        let mirrored: BTreeSet<SnapshotId> = ours.iter().filter(|s| s.mirrored).map(|s| s.id).collect();
        let theirs: BTreeSet<SnapshotId> = snapshots(self.backup.store()).iter().map(|s| s.id).collect();
        if let Some(orphan) = theirs.difference(&all).next() {
            return Err(broken(format!("the backup at rest holds snapshot {orphan}, which is deleted")));
        }
        match mirrored.difference(&theirs).next() {
            Some(missing) => Err(broken(format!("the backup at rest lacks the mirrored snapshot {missing}"))),
            None => Ok(()),
        }
    }
}

fn snapshots(store: &Store) -> Vec<Snapshot> {
    store.with_state(|state| state.snapshots.values().cloned().collect())
}
