//! The delta table of one volume (750, Fig. 5).
//!
//! The patent's column 756 is membership in a set; a block that was not changed since has no row. There are two sets:
//!
//! - **Active**: blocks written since the last cut. Step 625 comes before step 630 because the record that carries the
//!   write carries its mark: whoever makes a record of delta mode visible calls [`DeltaTable::mark`] in the same step,
//!   and replay does so again. Step 635, the acknowledgement, waits for the record, and so for the mark.
//! - **Frozen**: what the open run copies, as of its cut. That is the patent's snapshot of the delta table, taken with
//!   the snapshot of the data (842). Writes behind the cut mark the active set, so that a block may be in both, and
//!   clearing one never clears the other.
//!
//! The patent clears a flag as soon as its block was sent (851, 966). Here [`DeltaTable::clear_frozen`] clears all at
//! once, on the backup's durable commit; an aborted run gives its blocks back with [`DeltaTable::thaw`]. Nothing else
//! removes a mark, but [`DeltaTable::truncate`] for blocks that are gone.
//!
//! Invariant, with the retained records: active OR frozen OR retained is a superset of the difference of the two sides.
//!
//! A table moves over records in their order. It must be captured as of one record and never be moved over a record
//! twice: a mark may be repeated, but a cut repeated behind later marks would freeze blocks that its run does not read.

use super::{BlockSet, Changes};

/// Which of the two sets; its number is part of the key of their rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetKind {
    /// Written since the last cut.
    Active,
    /// Copied by the open run.
    Frozen,
}

impl SetKind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Active, Self::Frozen];

    /// 0 or 1.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Active => 0,
            Self::Frozen => 1,
        }
    }
}

/// What of a table changed since it was stored.
#[derive(Debug, Default)]
pub struct TableChanges {
    /// Rows of [`SetKind::Active`].
    pub active: Changes,
    /// Rows of [`SetKind::Frozen`].
    pub frozen: Changes,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeltaTable {
    active: BlockSet,
    frozen: BlockSet,
}

impl DeltaTable {
    /// No marks.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// From stored sets.
    #[must_use]
    pub fn from_sets(active: BlockSet, frozen: BlockSet) -> Self {
        Self { active, frozen }
    }

    /// Marks `count` blocks from `first` on as changed (625).
    pub fn mark(&mut self, first: u64, count: u64) {
        self.active.insert_range(first, count);
    }

    /// Marks every block of a volume of `blocks` blocks: nothing is known of what the backup holds.
    pub fn mark_all(&mut self, blocks: u64) {
        self.active.insert_all(blocks);
    }

    /// Marks all of `blocks`, as the switch does with those of retained records, and a demotion with those of held
    /// ones. Costs no more than the pages of the smaller set.
    pub fn mark_set(&mut self, blocks: BlockSet) {
        absorb(&mut self.active, blocks);
    }

    /// The cut: what was marked before belongs to the run that begins, what will be marked does not (842). Costs nothing
    /// unless a frozen set was left by an aborted run and not thawed.
    pub fn freeze(&mut self) {
        let active = self.active.take();
        absorb(&mut self.frozen, active);
    }

    /// The run was aborted: its blocks wait for the next one.
    pub fn thaw(&mut self) {
        let frozen = self.frozen.take();
        absorb(&mut self.active, frozen);
    }

    /// The run's commit is durable on the backup: the blocks as of the cut are there. Returns what was frozen: its
    /// memory may be given back outside of a lock.
    pub fn clear_frozen(&mut self) -> BlockSet {
        self.frozen.take()
    }

    /// A hazard, for [`crate::mutant::Mutant::ShrinkDropsMarks`]: marks from block `blocks` on go, before it is durable that
    /// the volume ends there.
    pub fn truncate(&mut self, blocks: u64) {
        self.active.truncate(blocks);
    }

    /// A hazard, for [`crate::mutant::Mutant::ClearWhenSent`]: the open run's blocks below `end` lose their marks.
    pub fn forget_frozen(&mut self, end: u64) {
        self.frozen.remove_range(0, end);
    }

    /// Blocks written since the last cut.
    #[must_use]
    pub fn active(&self) -> &BlockSet {
        &self.active
    }

    /// Blocks of the open run.
    #[must_use]
    pub fn frozen(&self) -> &BlockSet {
        &self.frozen
    }

    /// True if the block is marked in either set.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        self.active.contains(block) || self.frozen.contains(block)
    }

    /// True if no block is marked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.active.is_empty() && self.frozen.is_empty()
    }

    /// Memory it takes, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.active.memory_bytes() + self.frozen.memory_bytes()
    }

    /// The rows that changed since the last call, of both sets: to be stored in one commit.
    pub fn take_changed(&mut self) -> TableChanges {
        TableChanges { active: self.active.take_changed(), frozen: self.frozen.take_changed() }
    }
}

/// `into` becomes the union of both: the smaller is added to the larger.
fn absorb(into: &mut BlockSet, mut other: BlockSet) {
    if other.rows() > into.rows() {
        // Taken, it counts as stored nowhere: what is stored for `into` goes.
        let small = std::mem::replace(into, other.take());
        into.union_with(&small);
    } else {
        into.union_with(&other);
    }
}
