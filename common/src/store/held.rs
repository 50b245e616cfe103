//! Snapshots that a running task holds: of a group, at one record of its stream. They go with the task, and with a restart.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::{
    record::{Control, Op, Record},
    types::{GroupId, LayerId, Lsn, Position, Uid, VolumeId, VolumeSpec},
};

use super::{Front, ModeError, Store, SubmitError, Submitted, delta::illegal};

/// How many are held, and how often the space that they hold back was wanted.
#[derive(Default)]
pub(super) struct Held {
    count: AtomicU64,
    wanted: AtomicU64,
}

/// Volumes, each with its snapshot.
type Volumes = Vec<(VolumeSpec, LayerId)>;

/// See the module. Dropping it gives the snapshots back.
pub struct HeldSnapshot {
    store: Arc<Store>,
    group: GroupId,
    position: Position,
    lsn: Lsn,
    time_unix_ms: i64,
    volumes: Volumes,
    wanted_before: u64,
}

impl HeldSnapshot {
    fn new(store: &Arc<Store>, submitted: Submitted, time_unix_ms: i64, volumes: Volumes) -> Self {
        store.held.count.fetch_add(1, Ordering::AcqRel);
        let wanted_before = store.held.wanted.load(Ordering::Acquire);
        let Submitted { lsn, position, group, .. } = submitted;
        Self { store: Arc::clone(store), group, position, lsn, time_unix_ms, volumes, wanted_before }
    }

    /// True if a write lacked space since: they are to be dropped.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.store.held.wanted.load(Ordering::Acquire) != self.wanted_before
    }

    /// The group.
    #[must_use]
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// Of what position the snapshots are, as the primary counts.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// They may be read when this LSN of this node is applied.
    #[must_use]
    pub fn ready_at(&self) -> Lsn {
        self.lsn
    }

    /// The group's volumes at the position, each with its snapshot.
    #[must_use]
    pub fn volumes(&self) -> &[(VolumeSpec, LayerId)] {
        &self.volumes
    }
}

impl Drop for HeldSnapshot {
    fn drop(&mut self) {
        let control = Control::DeleteSnapshot { layers: self.volumes.iter().map(|(_, layer)| *layer).collect() };
        // On failure the snapshots go at the next start.
        let _ = self.store.submit_control(GroupId::default(), control, self.time_unix_ms);
        self.store.held.count.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Front {
    /// A new layer for each volume of the group, with the volumes as they are.
    fn new_layers(&self, group: GroupId) -> (Volumes, Vec<(VolumeId, LayerId)>) {
        let layers = self.state.new_layers(group);
        let specs = self.state.volumes_of(group).cloned();
        (specs.zip(layers.iter().map(|(_, layer)| *layer)).collect(), layers)
    }
}

impl Store {
    /// Takes a snapshot of a group in continuous mode here and, by a record of its stream, on the backup of `session`, at
    /// one position.
    ///
    /// # Errors
    /// See [`ModeError`].
    pub fn snapshot_both(
        self: &Arc<Self>,
        group: GroupId,
        session: Uid,
        time_unix_ms: i64,
    ) -> Result<HeldSnapshot, ModeError> {
        let mut front = self.front.lock();
        let mode = &front.state.groups.get(&group).ok_or(ModeError::NoGroup(group))?.mode;
        if !mode.is_continuous() {
            return Err(illegal(group, mode, "a comparison at one position"));
        }
        let (volumes, layers) = front.new_layers(group);
        let control = Control::VerifySnapshot { session, layers };
        let submitted = self.submit_control_locked(&mut front, group, control, time_unix_ms)?;
        drop(front);
        Ok(HeldSnapshot::new(self, submitted, time_unix_ms, volumes))
    }

    /// The backup's side of [`Store::snapshot_both`]: as [`Store::submit_replica`], with layers of this node.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was changed then.
    pub fn submit_snapshot(self: &Arc<Self>, mut record: Record) -> Result<HeldSnapshot, SubmitError> {
        let mut front = self.front.lock();
        front.check()?;
        let (group, time_unix_ms) = (record.group, record.time_unix_ms);
        let (volumes, layers) = front.new_layers(group);
        if let Op::Control(Control::VerifySnapshot { layers: to_make, .. }) = &mut record.op {
            *to_make = layers;
        }
        let submitted = self.admit(&mut front, record, false)?;
        drop(front);
        Ok(HeldSnapshot::new(self, submitted, time_unix_ms, volumes))
    }

    /// A client's write lacks space: held snapshots are to give way. True if there are any.
    pub fn want_space(&self) -> bool {
        let any = self.held.count.load(Ordering::Acquire) > 0;
        if any {
            self.held.wanted.fetch_add(1, Ordering::AcqRel);
        }
        any
    }
}
