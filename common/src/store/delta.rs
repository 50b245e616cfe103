//! The primary's delta tables and ledgers, and the steps of a group between its modes (Figs. 4, 6, 7, 10, 11).
//!
//! Tables, ledgers and what is retained move with the newest record, in the step that gives it its LSN: a record
//! carries its mark (625 before 630). [`Side::apply`] is that step, and recovery goes through it as well.
//!
//! Invariants:
//! - A record of a group is retained or a mark, by the group's mode at its LSN ([`crate::state::GroupMode::retains`]).
//! - The tables of a group in continuous mode are empty: its differences are what is retained.
//! - A mark goes only when the backup has committed a run that carried it.
//! - A checkpoint holds the tables as of the newest record at its capture, later than the state beside them. They are a
//!   superset for every record up to there: a run is sent only when its cut is durable here, so that what a commit has
//!   cleared is on the backup whatever part of the journal a crash leaves. Replay only adds marks up to there.
//! - Records that a switch released are trimmed only when a checkpoint includes the switch.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::{
    delta::{BlockSet, Changes, DeltaTable, Items, Ledger, SetKind, SetRow},
    mutant::Mutant,
    record::{Control, Op, Record, RunKind},
    state::{GroupMode, NodeState, PrimaryRun},
    types::{BlockRange, GroupId, LayerId, Lsn, SnapshotId, Uid, VolumeId},
};

use super::{
    Front, LaneRetained, Retained, Store, SubmitError, Submitted,
    conflicts::{Conflicts, is_barrier},
};

/// What a group lacks on the backup, in whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeltaSizes {
    /// Blocks in the active sets.
    pub active_blocks: u64,
    /// And their bytes.
    pub active_bytes: u64,
    /// Blocks in the frozen sets.
    pub frozen_blocks: u64,
    /// And their bytes.
    pub frozen_bytes: u64,
    /// Bytes that shipping every retained record takes (field 542).
    pub cr_bytes: u64,
    /// Bytes that one run over their blocks takes (field 541, in bytes).
    pub dr_bytes: u64,
}

/// Why a step between modes was not taken. Nothing was changed.
#[derive(Debug, Error)]
pub enum ModeError {
    /// No such group.
    #[error("group {0} does not exist")]
    NoGroup(GroupId),
    /// The step does not fit.
    #[error("group {group} is {is}: {step} is not possible")]
    Illegal {
        /// The group.
        group: GroupId,
        /// Its mode.
        is: &'static str,
        /// What was asked for.
        step: &'static str,
    },
    /// The store.
    #[error(transparent)]
    Submit(#[from] SubmitError),
}

/// The journal must keep what was retained from `oldest` on until a checkpoint includes `until`.
#[derive(Debug, Clone, Copy)]
struct Pin {
    oldest: Lsn,
    until: Lsn,
}

/// See the module.
#[derive(Default)]
pub(super) struct Side {
    /// What a record of one lane must not overtake.
    pub conflicts: Conflicts,
    tables: BTreeMap<VolumeId, DeltaTable>,
    ledgers: BTreeMap<GroupId, Ledger>,
    pins: Vec<Pin>,
    /// Volumes whose tables are to go when a checkpoint includes the record that deleted them: that record may yet be
    /// lost.
    deleted: Vec<(Lsn, VolumeId)>,
    /// Volumes of stored rows that never came to be.
    stale: Vec<VolumeId>,
    /// Ledgers that switches have emptied; their memory is given back outside of the lock.
    spent: Vec<Ledger>,
}

/// What a checkpoint keeps of the tables: the rows that changed.
#[derive(Default)]
pub(super) struct Capture {
    sets: Vec<(VolumeId, SetKind, Changes)>,
    dropped: Vec<VolumeId>,
}

/// Rows of the catalogue, by volume and set, each by page.
pub(super) type Stored = BTreeMap<(VolumeId, u8), Vec<(u32, Vec<u8>)>>;

impl Capture {
    pub fn write_into(&self, txn: &mut crate::catalog::CatalogTxn<'_>) -> Result<(), crate::catalog::CatalogError> {
        for volume in &self.dropped {
            SetKind::ALL.iter().try_for_each(|set| txn.drop_delta(volume.0, set.number()))?;
        }
        for (volume, set, changes) in &self.sets {
            if changes.all {
                txn.drop_delta(volume.0, set.number())?;
            }
            for (page, row) in &changes.rows {
                match row {
                    Some(row) => txn.put_delta(volume.0, set.number(), *page, &row.encode(*volume, *set, *page))?,
                    None => txn.remove_delta(volume.0, set.number(), *page)?,
                }
            }
        }
        Ok(())
    }
}

impl Side {
    /// Moves the tables, the ledgers and `retained` over a record; `state` is as of the record before it. With
    /// `sets` false the tables hold what later records did to them: marks are only added.
    pub fn apply(&mut self, state: &NodeState, retained: &mut Retained, lsn: Lsn, record: &Record, sets: bool) {
        if record.group != GroupId::default() && !record.in_run {
            self.apply_chained(state, retained, lsn, record);
        }
        let Op::Control(control) = &record.op else { return };
        match control {
            Control::DeleteVolume { volume } => self.deleted.push((lsn, *volume)),
            Control::Switch { group, all, .. } if state.groups.contains_key(group) => {
                self.mark_retained(state, retained, *group, lsn);
                if *all {
                    for spec in state.volumes_of(*group) {
                        self.tables.entry(spec.id).or_default().mark_all(spec.block_count());
                    }
                }
            }
            Control::Cut { group, .. } if sets && is_delta(state, *group, false) => {
                self.each_table(state, *group, DeltaTable::freeze);
            }
            Control::Demote { group } if run_of(state, *group).is_some_and(|run| run.kind.retains()) => {
                self.mark_retained(state, retained, *group, lsn);
            }
            Control::Clear { group, .. } => {
                let Some(run) = run_of(state, *group) else { return };
                retained.on_committed(*group, run.position.lsn);
                if sets {
                    self.each_table(state, *group, |table| drop(table.clear_frozen()));
                }
            }
            Control::CreateVolume { spec, .. } if is_unknown_ground(state, retained, spec.group, lsn) => {
                self.tables.entry(spec.id).or_default().mark_all(spec.block_count());
            }
            Control::ResizeVolume { volume, size_bytes } => {
                let Some(spec) = state.volumes.get(volume) else { return };
                let (old, new) = (spec.block_count(), size_bytes / u64::from(spec.block_size.bytes()));
                if old < new && is_unknown_ground(state, retained, spec.group, lsn) {
                    self.mark(*volume, old, new - old);
                }
                if new < old
                    && Mutant::ShrinkDropsMarks.on()
                    && let Some(table) = self.tables.get_mut(volume)
                {
                    table.truncate(new);
                }
            }
            Control::Promote { former, drop, .. } => {
                self.pins.clear();
                self.ledgers.clear();
                for spec in state.volumes.values().filter(|spec| !drop.contains(&spec.group)) {
                    // New, it takes the place of what is stored of an earlier life as a primary.
                    let table = self.tables.entry(spec.id).insert_entry(DeltaTable::new()).into_mut();
                    if former.is_nil() {
                        table.mark_all(spec.block_count());
                    }
                }
                // The backup before is at the fork as well, or says what it has beyond.
                state.groups.keys().for_each(|group| retained.on_committed(*group, lsn));
            }
            Control::AbortRun { group, .. } => {
                let Some(run) = run_of(state, *group) else { return };
                if run.kind.retains() {
                    self.mark_retained(state, retained, *group, lsn);
                }
                if sets && Mutant::AbortForgetsFrozen.on() {
                    self.each_table(state, *group, |table| drop(table.clear_frozen()));
                } else if sets {
                    self.each_table(state, *group, DeltaTable::thaw);
                }
            }
            _ => {}
        }
    }

    /// A record of a group's chain: retained, or a mark.
    fn apply_chained(&mut self, state: &NodeState, retained: &mut Retained, lsn: Lsn, record: &Record) {
        let group = record.group;
        if lsn <= retained.acked_of(group, record.lane) {
            return;
        }
        let range = record.range();
        if state.retains(group, lsn) {
            retained.on_submitted(group, record.lane, lsn, record.payload_bytes(), is_barrier(record));
            self.conflicts.note(lsn, record);
            if let Some(range) = range {
                self.ledgers.entry(group).or_default().on_retained(range, items_of(record));
            }
            return;
        }
        retained.on_marked(group, lsn);
        if let Some(range) = range
            && !Mutant::NoMark.on()
        {
            let table = self.tables.entry(range.volume).or_default();
            table.mark(range.first, range.count);
            if Mutant::NoFrozenSet.on() {
                table.freeze();
            }
        }
    }

    /// Every retained record of the group becomes a mark.
    fn mark_retained(&mut self, state: &NodeState, retained: &mut Retained, group: GroupId, lsn: Lsn) {
        if let Some(oldest) = retained.on_switched(group) {
            self.pins.push(Pin { oldest, until: lsn });
        }
        let Some(ledger) = self.ledgers.get_mut(&group) else { return };
        let taken = ledger.take();
        for (volume, blocks) in taken.marks {
            if state.volumes.contains_key(&volume) && !Mutant::SwitchWithoutMarks.on() {
                self.tables.entry(volume).or_default().mark_set(blocks);
            }
        }
        self.spent.push(taken.rest);
    }

    fn each_table(&mut self, state: &NodeState, group: GroupId, step: impl Fn(&mut DeltaTable)) {
        for spec in state.volumes_of(group) {
            if let Some(table) = self.tables.get_mut(&spec.id) {
                step(table);
            }
        }
    }

    /// The oldest record that a checkpoint as of `applied` must leave in the journal for the sake of a switch behind it.
    pub fn pinned(&self, applied: Lsn) -> Option<Lsn> {
        if Mutant::TrimBeforeSwitch.on() {
            return None;
        }
        self.pins.iter().filter(|pin| pin.until > applied).map(|pin| pin.oldest).min()
    }

    /// A checkpoint as of `applied` is durable.
    pub fn on_checkpoint(&mut self, applied: Lsn) {
        self.pins.retain(|pin| pin.until > applied);
    }

    /// The pages that changed since the last capture, for a checkpoint as of `applied`.
    pub fn capture(&mut self, applied: Lsn) -> Capture {
        let mut capture = Capture { sets: Vec::new(), dropped: std::mem::take(&mut self.stale) };
        let early = Mutant::DropMarksEarly.on();
        for (_, volume) in self.deleted.extract_if(.., |(lsn, _)| *lsn <= applied || early) {
            self.tables.remove(&volume);
            capture.dropped.push(volume);
        }
        for (volume, table) in &mut self.tables {
            let changes = table.take_changed();
            let sets = [(SetKind::Active, changes.active), (SetKind::Frozen, changes.frozen)];
            capture.sets.extend(sets.into_iter().map(|(set, changes)| (*volume, set, changes)));
        }
        capture.sets.retain(|(_, _, changes)| !changes.is_empty());
        capture
    }

    /// The tables of a checkpoint.
    pub fn load(stored: Stored) -> Result<Self, String> {
        let mut sets: BTreeMap<VolumeId, [BlockSet; 2]> = BTreeMap::new();
        for ((volume, number), rows) in stored {
            let bad = |why: &str| format!("delta table of volume {volume}: {why}");
            let set = SetKind::ALL.into_iter().find(|set| set.number() == number).ok_or_else(|| bad("unknown set"))?;
            let rows = rows.iter().map(|(page, blob)| Ok((*page, SetRow::decode(volume, set, *page, blob)?)));
            let rows = rows.collect::<Result<Vec<_>, &str>>().map_err(bad)?;
            sets.entry(volume).or_default()[usize::from(number)] = BlockSet::from_rows(rows).map_err(bad)?;
        }
        let table = |(volume, [active, frozen]): (_, [BlockSet; 2])| (volume, DeltaTable::from_sets(active, frozen));
        Ok(Self { tables: sets.into_iter().map(table).collect(), ..Self::default() })
    }

    /// Ledgers to be dropped outside of the lock.
    pub fn take_spent(&mut self) -> Vec<Ledger> {
        std::mem::take(&mut self.spent)
    }

    /// Behind the last record of recovery: what is not in delta mode has no marks, and what a lost record has made is not
    /// there. Marks behind the end of a volume stay: see [`super::shrink`].
    pub fn on_recovered(&mut self, state: &NodeState) {
        let lost = |volume: &VolumeId| !state.volumes.contains_key(volume);
        self.stale.extend(self.tables.extract_if(.., |volume, _| lost(volume)).map(|(volume, _)| volume));
        for (volume, table) in &mut self.tables {
            let spec = &state.volumes[volume];
            if state.groups.get(&spec.group).is_none_or(|g| g.mode.is_continuous()) {
                // New, it takes the place of what is stored.
                *table = DeltaTable::new();
            }
        }
    }

    /// True if the sides may differ in a block: it is marked, or a record that touches it is retained.
    pub fn differs(&self, group: GroupId, volume: VolumeId, block: u64) -> bool {
        self.tables.get(&volume).is_some_and(|table| table.contains(block))
            || self.ledgers.get(&group).is_some_and(|ledger| ledger.items(volume, block) > 0)
    }

    /// Marks blocks outside of a record: a superset is always right.
    pub fn mark(&mut self, volume: VolumeId, first: u64, count: u64) {
        self.tables.entry(volume).or_default().mark(first, count);
    }

    /// The blocks of a volume that the backup may not have.
    pub fn differing(&self, group: GroupId, volume: VolumeId) -> BlockSet {
        let mut blocks = self.ledgers.get(&group).map(|ledger| ledger.marks(volume)).unwrap_or_default();
        if let Some(table) = self.tables.get(&volume) {
            blocks.union_with(table.active());
            blocks.union_with(table.frozen());
        }
        blocks
    }

    fn sizes(&self, state: &NodeState, group: GroupId) -> DeltaSizes {
        let mut sizes = DeltaSizes::default();
        for spec in state.volumes_of(group) {
            if let Some(table) = self.tables.get(&spec.id) {
                let bytes = u64::from(spec.block_size.bytes());
                sizes.active_blocks += table.active().len();
                sizes.active_bytes += table.active().len() * bytes;
                sizes.frozen_blocks += table.frozen().len();
                sizes.frozen_bytes += table.frozen().len() * bytes;
            }
        }
        if let Some(ledger) = self.ledgers.get(&group) {
            (sizes.cr_bytes, sizes.dr_bytes) = (ledger.cr_bytes(), ledger.dr_bytes());
        }
        sizes
    }
}

fn items_of(record: &Record) -> Items {
    match &record.op {
        Op::Write { block_size, .. } => Items::Data { block_bytes: block_size.bytes() },
        Op::Zero(_) | Op::Control(_) => Items::Zeros,
    }
}

fn run_of(state: &NodeState, group: GroupId) -> Option<&PrimaryRun> {
    state.groups.get(&group)?.mode.run()
}

/// True if the backup may have something where a new volume, or the new end of one, is zeros here: before the first commit
/// to a backup that was a primary itself, or of which nothing is known. What is retained is shipped behind a commit.
fn is_unknown_ground(state: &NodeState, retained: &Retained, group: GroupId, lsn: Lsn) -> bool {
    let mode = state.groups.get(&group).map(|g| &g.mode);
    let at_fork = state.promoted_at > Lsn::ZERO && retained.group(group).acked() <= state.promoted_at;
    mode.is_some_and(|mode| matches!(mode, GroupMode::Delta { full, .. } if *full || at_fork) && !mode.retains(lsn))
}

fn is_delta(state: &NodeState, group: GroupId, in_run: bool) -> bool {
    state.groups.get(&group).is_some_and(|g| !g.mode.is_continuous() && g.mode.run().is_some() == in_run)
}

impl Store {
    /// Leaves continuous mode, or, in delta mode, names another cause and with `all` marks everything.
    ///
    /// # Errors
    /// See [`ModeError`].
    pub fn switch(&self, group: GroupId, cause: &str, all: bool, time_unix_ms: i64) -> Result<Submitted, ModeError> {
        let oldest = self.oldest_retained_time(group);
        self.step(group, time_unix_ms, |front, _| {
            // Snapshots are records of lane 0.
            let acked = front.retained.acked_of(group, 0);
            let unmirrored = front.state.snapshots_of(group).filter(|s| s.mirrored && s.lsn > acked);
            let unmirrored = unmirrored.filter(|_| !Mutant::SwitchKeepsMirrored.on());
            let unmirrored = unmirrored.map(|s| s.id).collect();
            // Of a backup that is to be filled anew it is not known since when it lacks what it lacks.
            let since_unix_ms = oldest.or(all.then_some(time_unix_ms));
            Ok(Control::Switch { group, cause: cause.to_owned(), since_unix_ms, all, unmirrored })
        })
    }

    /// Begins a run: the snapshot is taken and the delta table frozen, as of this record. Nothing of the run may be
    /// sent before the record is durable, nor read before it is applied.
    ///
    /// # Errors
    /// See [`ModeError`].
    pub fn cut(&self, group: GroupId, kind: RunKind, time_unix_ms: i64) -> Result<PrimaryRun, ModeError> {
        self.step(group, time_unix_ms, |front, mode| match mode {
            GroupMode::Delta { run: None, .. } => {
                Ok(Control::Cut { group, kind, layers: front.state.new_layers(group) })
            }
            mode => Err(illegal(group, mode, "a cut")),
        })?;
        self.run_of(group).ok_or(ModeError::NoGroup(group))
    }

    /// Turns a final round into an ordinary one: what was retained since its cut becomes marks.
    ///
    /// # Errors
    /// See [`ModeError`].
    pub fn demote(&self, group: GroupId, time_unix_ms: i64) -> Result<Submitted, ModeError> {
        self.step(group, time_unix_ms, |_, mode| match mode.run() {
            Some(run) if run.kind.retains() => Ok(Control::Demote { group }),
            _ => Err(illegal(group, mode, "a demotion")),
        })
    }

    /// The backup has durably committed run `id`, and holds these snapshots for users.
    ///
    /// # Errors
    /// See [`ModeError`].
    pub fn clear(
        &self,
        group: GroupId,
        id: u64,
        held: &[SnapshotId],
        time_unix_ms: i64,
    ) -> Result<Submitted, ModeError> {
        let submitted = self.step(group, time_unix_ms, |front, mode| match mode.run() {
            Some(run) if run.id == id => {
                let lacks = front.state.snapshots_of(group).filter(|s| s.mirrored && !held.contains(&s.id));
                let unmirrored = lacks.filter(|_| !Mutant::RunKeepsMirrored.on()).map(|snapshot| snapshot.id).collect();
                Ok(Control::Clear { group, layers: layers_of(run), unmirrored })
            }
            _ => Err(illegal(group, mode, "the end of this run")),
        })?;
        // What waited for the backup is answered, and the sender looks again.
        self.marks.send_modify(|m| m.releases += 1);
        Ok(submitted)
    }

    /// The run has ended without a commit.
    ///
    /// # Errors
    /// See [`ModeError`].
    pub fn abort_run(&self, group: GroupId, id: u64, time_unix_ms: i64) -> Result<Submitted, ModeError> {
        self.step(group, time_unix_ms, |_, mode| match mode.run() {
            Some(run) if run.id == id => Ok(Control::AbortRun { group, layers: layers_of(run) }),
            _ => Err(illegal(group, mode, "the end of this run")),
        })
    }

    /// From now on the delta tables are against the backup of this data directory.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn bind(&self, instance: Uid, time_unix_ms: i64) -> Result<Submitted, SubmitError> {
        self.submit_control(GroupId::default(), Control::Bind { instance }, time_unix_ms)
    }

    fn step(
        &self,
        group: GroupId,
        time_unix_ms: i64,
        decide: impl FnOnce(&Front, &GroupMode) -> Result<Control, ModeError>,
    ) -> Result<Submitted, ModeError> {
        let mut front = self.front.lock();
        let mode = &front.state.groups.get(&group).ok_or(ModeError::NoGroup(group))?.mode;
        let control = decide(&front, mode)?;
        let submitted = self.submit_control_locked(&mut front, GroupId::default(), control, time_unix_ms)?;
        let spent = front.delta.take_spent();
        drop(front);
        drop(spent);
        Ok(submitted)
    }

    /// The open run of a group.
    #[must_use]
    pub fn run_of(&self, group: GroupId) -> Option<PrimaryRun> {
        self.with_state(|state| run_of(state, group).cloned())
    }

    /// Acknowledged bytes that the backup does not hold.
    #[must_use]
    pub fn bytes_at_risk(&self) -> u64 {
        let front = self.front.lock();
        let sizes = front.state.groups.keys().map(|group| front.delta.sizes(&front.state, *group));
        front.retained.bytes() + sizes.map(|s| s.active_bytes + s.frozen_bytes).sum::<u64>()
    }

    /// How much of a group is marked, and its ledger.
    #[must_use]
    pub fn delta_sizes(&self, group: GroupId) -> DeltaSizes {
        let front = self.front.lock();
        front.delta.sizes(&front.state, group)
    }

    /// Blocks of a volume that are marked: active, and frozen.
    #[must_use]
    pub fn marked_blocks(&self, volume: VolumeId) -> (u64, u64) {
        let front = self.front.lock();
        front.delta.tables.get(&volume).map_or((0, 0), |table| (table.active().len(), table.frozen().len()))
    }

    /// The frozen set of a volume; a copy of it costs its pages' addresses.
    #[must_use]
    pub fn frozen(&self, volume: VolumeId) -> BlockSet {
        self.front.lock().delta.tables.get(&volume).map(|table| table.frozen().clone()).unwrap_or_default()
    }

    /// The active set of a volume.
    #[must_use]
    pub fn active(&self, volume: VolumeId) -> BlockSet {
        self.front.lock().delta.tables.get(&volume).map(|table| table.active().clone()).unwrap_or_default()
    }

    /// A hazard, for [`Mutant::ClearWhenSent`]: the blocks of the open run below `end` are not marked any more.
    pub fn forget_sent(&self, volume: VolumeId, end: u64) {
        if let Some(table) = self.front.lock().delta.tables.get_mut(&volume) {
            table.forget_frozen(end);
        }
    }

    /// A copy of the ledger of a group.
    #[must_use]
    pub fn ledger(&self, group: GroupId) -> Ledger {
        self.front.lock().delta.ledgers.get(&group).cloned().unwrap_or_default()
    }

    /// Every block of every group is to go to the backup: nothing was kept for it, or it is another one.
    pub fn mark_everything(&self, cause: &str) {
        let groups: Vec<GroupId> = self.with_state(|state| state.groups.keys().copied().collect());
        for group in groups {
            // It fails only on a store that has failed, or whose journal's reserve is used up; attaching asks again.
            let _ = self.switch(group, cause, true, 0);
        }
    }

    /// True in delta mode.
    #[must_use]
    pub fn is_delta(&self, group: GroupId) -> bool {
        self.with_state(|state| state.groups.get(&group).is_some_and(|g| !g.mode.is_continuous()))
    }

    /// Ends every open run without a commit, and gives back what its snapshot holds. True if there was one.
    pub fn abort_open_runs(&self, time_unix_ms: i64) -> bool {
        let open: Vec<(GroupId, u64)> =
            self.with_state(|state| state.groups.values().filter_map(|g| Some((g.id, g.mode.run()?.id))).collect());
        // It fails only on a store that has failed, or whose journal's reserve is used up; then the run goes on from its
        // snapshot, which is only dropped with it.
        open.iter().filter(|(group, id)| self.abort_run(*group, *id, time_unix_ms).is_ok()).count() > 0
    }
}

impl Front {
    /// The backup answered that it holds `lane` of `group` durably up to `lsn`: these records were in between.
    pub(super) fn release(&mut self, group: GroupId, lane: u8, lsn: Lsn, payload_bytes: u64, records: &[Released]) {
        let in_delta = self.state.groups.get(&group).is_some_and(|g| !g.mode.is_continuous());
        if in_delta {
            // Its records are marks, and a backup in a run answers for what it leaves to the run: held is what the commit
            // says.
            self.traffic.1 += payload_bytes;
            return;
        }
        let LaneRetained { acked, oldest, .. } = self.retained.group(group).lane(lane);
        if let Some(ledger) = self.delta.ledgers.get_mut(&group) {
            // What a switch has taken out of the ledger is not in it any more.
            let counted = oldest.map_or(lsn, |oldest| Lsn(oldest.0 - 1)).max(acked);
            for record in records.iter().filter(|record| record.lsn > counted) {
                if let Some((range, items)) = record.items {
                    ledger.on_released(range, items);
                }
            }
        }
        self.retained.on_released(group, lane, lsn, payload_bytes);
        if self.retained.get(group).is_none_or(|retained| retained.oldest().is_none()) {
            self.delta.ledgers.remove(&group);
        }
        self.traffic.1 += payload_bytes;
        if !self.is_paced(lane) {
            self.group_traffic.entry(group).or_default().1 += payload_bytes;
        }
        self.prune_both();
    }
}

/// A record that the backup answered for.
#[derive(Debug, Clone, Copy)]
pub struct Released {
    /// Its place.
    pub lsn: Lsn,
    /// What it changed.
    items: Option<(BlockRange, Items)>,
}

impl Released {
    /// The part of a record that a release needs.
    #[must_use]
    pub fn of(lsn: Lsn, record: &Record) -> Self {
        Self { lsn, items: record.range().map(|range| (range, items_of(record))) }
    }
}

fn layers_of(run: &PrimaryRun) -> Vec<LayerId> {
    run.layers.iter().map(|(_, layer)| *layer).collect()
}

pub(super) fn illegal(group: GroupId, mode: &GroupMode, step: &'static str) -> ModeError {
    let is = match mode {
        GroupMode::Continuous { .. } => "in continuous mode",
        GroupMode::Delta { run: None, .. } => "in delta mode without a run",
        GroupMode::Delta { run: Some(run), .. } if run.kind.retains() => "in a final round",
        GroupMode::Delta { run: Some(_), .. } => "in a round",
    };
    ModeError::Illegal { group, is, step }
}
