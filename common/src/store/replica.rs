//! The backup's steps of a run (Fig. 7, 840 to 851): begin, write, commit.
//!
//! A run writes below the group's snapshots: whoever reads the group sees the image from before it until the commit. A
//! run that was given up, or that another one supersedes, leaves its snapshots to the next one, which carries all that
//! this one did.

use bytes::Bytes;
use smallvec::SmallVec;

use crate::{
    mutant::Mutant,
    record::{BeginRun, Control, Op, Record, WriteData},
    state::ReplicaRun,
    types::{BlockRange, GroupId, Lsn, Position, SnapshotId, VolumeId, VolumeSpec},
};

use super::{ModeError, Store, SubmitError, Submitted};

/// What a run leaves in its blocks.
#[derive(Debug, Clone)]
pub enum RunContent {
    /// Whole blocks, with the checksum of each.
    Data(Bytes, SmallVec<[u32; 2]>),
    /// Zeros.
    Zeros(u64),
}

/// A run that is to begin.
#[derive(Debug, Clone)]
pub struct NewRun {
    /// The group.
    pub group: GroupId,
    /// Its name.
    pub group_name: String,
    /// The primary's id of the run.
    pub id: u64,
    /// The group's position at the cut.
    pub cut: Position,
    /// The primary's time of the cut, Unix milliseconds.
    pub time_unix_ms: i64,
    /// The group's volumes at the cut.
    pub specs: Vec<VolumeSpec>,
    /// The group's snapshots on the primary: any other goes with the commit.
    pub snapshots: Vec<SnapshotId>,
}

impl Store {
    /// Begins a run, or lets it supersede the one that is open. The snapshots and the mark are one record.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was changed then.
    pub fn begin_run(&self, new: NewRun) -> Result<Submitted, SubmitError> {
        let mut front = self.front.lock();
        let state = &front.state;
        let open = state.groups.get(&new.group).and_then(|g| g.run.as_ref());
        let layered = open.is_none() && !Mutant::NoReplicaSnapshot.on();
        let layers = if layered { state.new_layers(new.group) } else { Vec::new() };
        let unseen = |id: VolumeId| open.and_then(|run| run.specs.iter().find(|spec| spec.id == id));
        let known = |id: VolumeId| unseen(id).or_else(|| state.volumes.get(&id));
        let create = new.specs.iter().filter(|spec| known(spec.id).is_none()).cloned().collect();
        let grow = new.specs.iter().filter(|spec| known(spec.id).is_some_and(|k| k.size_bytes < spec.size_bytes));
        let grow = grow.map(|spec| (spec.id, spec.size_bytes)).collect();
        let shrink = new.specs.iter().filter(|spec| known(spec.id).is_some_and(|k| k.size_bytes > spec.size_bytes));
        let shrink = shrink.map(|spec| (spec.id, spec.size_bytes)).collect();
        let gone = open.map(|run| run.specs.as_slice()).unwrap_or_default().iter().map(|spec| spec.id);
        let delete =
            gone.filter(|id| !state.volumes.contains_key(id) && !new.specs.iter().any(|spec| spec.id == *id)).collect();
        let NewRun { group, group_name, id, cut, time_unix_ms, specs, snapshots } = new;
        let run = BeginRun {
            group,
            group_name,
            id,
            cut,
            time_unix_ms,
            specs,
            layers,
            create,
            grow,
            delete,
            shrink,
            snapshots,
        };
        self.submit_control_locked(
            &mut front,
            GroupId::default(),
            Control::BeginRun { run: Box::new(run) },
            time_unix_ms,
        )
    }

    /// Blocks of the open run, in the order of its addresses.
    ///
    /// # Errors
    /// See [`ModeError`].
    pub fn write_run(
        &self,
        group: GroupId,
        id: u64,
        volume: VolumeId,
        first_block: u64,
        content: RunContent,
    ) -> Result<Submitted, ModeError> {
        let mut front = self.front.lock();
        front.check().map_err(SubmitError::from)?;
        let run = open_run(&front.state, group, id)?;
        let spec = run.specs.iter().find(|spec| spec.id == volume).ok_or(SubmitError::NoVolume(volume))?;
        let op = match content {
            RunContent::Data(data, crcs) => {
                Op::Write { volume, first_block, block_size: spec.block_size, crcs, data: WriteData::Inline(data) }
            }
            RunContent::Zeros(count) => Op::Zero(BlockRange { volume, first: first_block, count }),
        };
        let record = Record {
            position: run.cut,
            previous: Lsn::ZERO,
            group,
            lane: 0,
            time_unix_ms: run.time_unix_ms,
            client: None,
            in_run: true,
            op,
        };
        let submitted = self.admit(&mut front, record, false)?;
        self.work.notify_one();
        Ok(submitted)
    }

    /// The group is the image of the cut from here on.
    ///
    /// # Errors
    /// See [`ModeError`].
    pub fn commit_run(&self, group: GroupId, id: u64) -> Result<Submitted, ModeError> {
        let mut front = self.front.lock();
        let run = open_run(&front.state, group, id)?;
        let kept = |id: VolumeId| run.specs.iter().any(|spec| spec.id == id);
        let delete = front.state.volumes_of(group).map(|spec| spec.id).filter(|id| !kept(*id)).collect();
        let dropped = front.state.snapshots_of(group).filter(|snapshot| !run.snapshots.contains(&snapshot.id));
        let dropped = dropped.filter(|_| !Mutant::KeepDeletedSnapshots.on()).flat_map(|snapshot| &snapshot.layers);
        let layers = run.layers.iter().chain(dropped).map(|(_, layer)| *layer).collect();
        let (control, time) = (Control::CommitRun { group, delete, layers }, run.time_unix_ms);
        Ok(self.submit_control_locked(&mut front, GroupId::default(), control, time)?)
    }

    /// Nothing of the run is taken any more. `Ok` as well if it is not open.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn cancel_run(&self, group: GroupId, id: u64, time_unix_ms: i64) -> Result<Option<Submitted>, SubmitError> {
        let mut front = self.front.lock();
        if open_run(&front.state, group, id).is_err() {
            return Ok(None);
        }
        let control = Control::CancelRun { group };
        self.submit_control_locked(&mut front, GroupId::default(), control, time_unix_ms).map(Some)
    }

    /// The run that the group is in, also one that was given up.
    #[must_use]
    pub fn replica_run(&self, group: GroupId) -> Option<ReplicaRun> {
        self.with_state(|state| state.groups.get(&group).and_then(|g| g.run.clone()))
    }
}

fn open_run(state: &crate::state::NodeState, group: GroupId, id: u64) -> Result<&ReplicaRun, ModeError> {
    let run = state.groups.get(&group).and_then(|g| g.run.as_ref());
    let fits = |run: &&ReplicaRun| Mutant::OldRunAccepted.on() || run.id == id && !run.cancelled;
    run.filter(fits).ok_or(ModeError::Illegal { group, is: "not in this run", step: "a part of it" })
}
