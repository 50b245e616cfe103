//! Which records of other lanes a record must not overtake.
//!
//! Two lanes may write one block. The backup must see such writes in their order, so before a record is sent, those of
//! other lanes before it that touch its blocks are, each with its lane's records before it. They are found by a table
//! of fixed size: by hash of a block, the newest record of each lane that touched it. A block that shares its place with
//! another one costs priority, never order. Records that touch very many blocks, and control records, are barriers:
//! nothing of their group overtakes them, nor do they overtake anything of it.
//!
//! The table is filled as records are retained, at admission and at recovery. While all records are of lane 0 there is
//! none.

use smallvec::SmallVec;

use crate::{
    mutant::Mutant,
    record::Record,
    types::{BlockRange, Lsn},
};

use super::GroupRetained;

/// Places of the table: 2 MiB for each lane in use.
const PLACES: usize = 1 << 18;
/// A record of more blocks is a barrier.
const BLOCKS_MAX: u64 = 1024;

/// Lanes of which everything up to an LSN must be sent first.
pub type SentFirst = SmallVec<[(u8, Lsn); 2]>;

/// See the module.
#[derive(Default)]
pub(super) struct Conflicts {
    /// By lane; empty for one that was not used. Plain numbers: memory that is all zeros is only taken when written to.
    newest: Vec<Vec<u64>>,
    /// What came before there was a table was of lane 0, and was not noted: any of it may conflict.
    unnoted: Lsn,
}

/// True for a record that nothing of its group overtakes.
pub(super) fn is_barrier(record: &Record) -> bool {
    record.range().is_none_or(|range| range.count > BLOCKS_MAX)
}

impl Conflicts {
    /// A record is retained.
    pub fn note(&mut self, lsn: Lsn, record: &Record) {
        let at = usize::from(record.lane);
        if at == 0 && self.newest.is_empty() {
            return;
        }
        if self.newest.is_empty() {
            self.unnoted = Lsn(lsn.0 - 1);
        }
        if self.newest.len() <= at {
            self.newest.resize(at + 1, Vec::new());
        }
        let newest = &mut self.newest[at];
        if newest.is_empty() {
            *newest = vec![0; PLACES];
        }
        if !is_barrier(record)
            && let Some(range) = record.range()
        {
            places(range).for_each(|place| newest[place] = lsn.0);
        }
    }

    /// What must be sent before the record at `lsn` of a group: exact if it is asked right behind the admission; later,
    /// writes that came meanwhile hide where the ones before were, and more is taken.
    pub fn before(&self, lsn: Lsn, record: &Record, group: &GroupRetained) -> SentFirst {
        let mut first = SentFirst::new();
        if self.newest.is_empty() {
            return first;
        }
        let barrier = is_barrier(record) && !Mutant::LaneBarrierIgnored.on();
        for (lane, retained) in group.lanes().filter(|(lane, _)| *lane != record.lane) {
            let touched = || {
                if Mutant::LaneConflictIgnored.on() {
                    return Lsn::ZERO;
                }
                let newest = self.newest.get(usize::from(lane)).filter(|newest| !newest.is_empty());
                let noted =
                    newest.zip(record.range()).and_then(|(newest, range)| places(range).map(|p| newest[p]).max());
                Lsn(noted.unwrap_or_default()).max(if lane == 0 { self.unnoted } else { Lsn::ZERO })
            };
            let upto = match barrier {
                true => retained.last,
                false if Mutant::LaneBarrierIgnored.on() => touched(),
                false => touched().max(retained.barrier),
            };
            let upto = upto.min(Lsn(lsn.0 - 1));
            if upto > retained.acked {
                first.push((lane, upto));
            }
        }
        first
    }
}

fn places(range: BlockRange) -> impl Iterator<Item = usize> {
    let count = range.count.min(BLOCKS_MAX);
    (range.first..range.first + count).map(move |block| {
        let mixed = (block ^ range.volume.0.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        usize::try_from(mixed >> 46).expect("18 bits")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        record::{Control, Op},
        store::Retained,
        types::{GroupId, Position, VolumeId},
    };

    #[derive(Default)]
    struct Node {
        retained: Retained,
        conflicts: Conflicts,
    }

    fn record(lane: u8, op: Op) -> Record {
        let (position, previous, group) = (Position::default(), Lsn::ZERO, GroupId(1));
        Record { position, previous, group, lane, time_unix_ms: 0, client: None, in_run: false, op }
    }

    fn zeros(lane: u8, first: u64, count: u64) -> Record {
        record(lane, Op::Zero(BlockRange { volume: VolumeId(1), first, count }))
    }

    impl Node {
        fn submit(&mut self, lsn: u64, record: &Record) -> Vec<(u8, u64)> {
            let (lane, barrier) = (record.lane, is_barrier(record));
            self.retained.on_submitted(record.group, lane, Lsn(lsn), 0, barrier);
            self.conflicts.note(Lsn(lsn), record);
            self.before(lsn, record)
        }

        fn before(&self, lsn: u64, record: &Record) -> Vec<(u8, u64)> {
            let first = self.conflicts.before(Lsn(lsn), record, &self.retained.group(record.group));
            first.into_iter().map(|(lane, lsn)| (lane, lsn.0)).collect()
        }
    }

    #[test]
    fn a_record_waits_for_those_of_other_lanes_that_touch_its_blocks_and_no_others() {
        let mut node = Node::default();
        assert_eq!(node.submit(1, &zeros(1, 0, 1)), [], "nothing of lane 0 is there");
        assert_eq!(node.submit(2, &zeros(1, 10, 4)), []);
        assert_eq!(node.submit(3, &zeros(0, 5, 1)), []);
        assert_eq!(node.submit(4, &zeros(0, 12, 1)), [(1, 2)]);
        assert_eq!(node.submit(5, &zeros(2, 12, 1)), [(0, 4), (1, 2)]);
        // Asked for late, it cannot know what block 12 had before it, and takes all that may be.
        node.submit(6, &zeros(1, 12, 1));
        assert_eq!(node.before(4, &zeros(0, 12, 1)), [(1, 3), (2, 3)]);
        node.retained.on_released(GroupId(1), 1, Lsn(3), 0);
        assert_eq!(node.before(4, &zeros(0, 12, 1)), [(2, 3)]);
    }

    #[test]
    fn nothing_overtakes_a_barrier_and_a_barrier_overtakes_nothing() {
        let mut node = Node::default();
        node.submit(1, &zeros(1, 0, 1));
        let grow = record(0, Op::Control(Control::ResizeVolume { volume: VolumeId(1), size_bytes: 1 }));
        assert_eq!(node.submit(2, &grow), [(1, 1)]);
        assert_eq!(node.submit(3, &zeros(1, 7, 1)), [(0, 2)]);
        assert_eq!(node.submit(4, &zeros(2, 0, BLOCKS_MAX + 1)), [(0, 2), (1, 3)]);
        assert_eq!(node.submit(5, &zeros(0, 5_000_000, 1)), [(2, 4)]);
    }

    #[test]
    fn what_lane_0_retained_before_there_was_another_may_conflict() {
        let mut node = Node::default();
        node.submit(1, &zeros(0, 0, 1));
        node.submit(2, &zeros(0, 1, 1));
        assert_eq!(node.submit(3, &zeros(1, 9, 1)), [(0, 2)]);
        node.retained.on_released(GroupId(1), 0, Lsn(2), 0);
        assert_eq!(node.submit(4, &zeros(1, 9, 1)), []);
    }
}
