//! Which records the backup has not made durable yet, by group and lane.
//!
//! Cost is per lane of a group, not per record: ten million retained records take no more memory than one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::{
    lane::LANES_MAX,
    types::{GroupId, Lsn},
};

/// The retained records of one lane of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LaneRetained {
    /// Every record of the lane up to here is durable on the backup.
    pub acked: Lsn,
    /// At or below the oldest record that is not; `None` when the backup has all.
    pub oldest: Option<Lsn>,
    /// The newest record that was retained.
    pub last: Lsn,
    /// The newest of those that no lane of the group overtakes.
    pub barrier: Lsn,
    /// Payload bytes that are not on the backup.
    pub bytes: u64,
}

/// The retained records of one group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GroupRetained {
    /// By number, as far as any was used.
    lanes: SmallVec<[LaneRetained; 1]>,
    /// A run brought every lane to here.
    base: Lsn,
    /// The newest record of the group.
    pub last: Lsn,
    /// The newest record that became a mark: a run brings it to the backup.
    marked: Lsn,
}

impl GroupRetained {
    /// One of its lanes.
    #[must_use]
    pub fn lane(&self, lane: u8) -> LaneRetained {
        let unused = LaneRetained { acked: self.base, ..LaneRetained::default() };
        self.lanes.get(usize::from(lane)).copied().unwrap_or(unused)
    }

    fn lane_mut(&mut self, lane: u8) -> &mut LaneRetained {
        let (at, unused) = (usize::from(lane), LaneRetained { acked: self.base, ..LaneRetained::default() });
        if self.lanes.len() <= at {
            self.lanes.resize(at + 1, unused);
        }
        &mut self.lanes[at]
    }

    /// The lanes that were used.
    pub fn lanes(&self) -> impl Iterator<Item = (u8, &LaneRetained)> {
        (0..).zip(&self.lanes)
    }

    /// At or below the oldest record that is not on the backup; `None` when the backup has all.
    #[must_use]
    pub fn oldest(&self) -> Option<Lsn> {
        self.lanes.iter().filter_map(|lane| lane.oldest).min()
    }

    /// Payload bytes that are not on the backup.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.bytes).sum()
    }

    /// Every record of the group up to here is durable on the backup.
    #[must_use]
    pub fn acked(&self) -> Lsn {
        let acked = self.lanes.iter().map(|lane| lane.acked).min().unwrap_or(self.base);
        match self.oldest() {
            // What one lane lacks, another one may be far beyond.
            Some(oldest) if self.lanes.len() > 1 && acked >= self.marked => acked.max(Lsn(oldest.0 - 1)),
            _ => acked,
        }
    }

    /// True if the backup holds the record of `lane` at `lsn`; of all lanes, everything up to `lsn`, if `lane` is
    /// `None`.
    #[must_use]
    pub fn holds(&self, lane: Option<u8>, lsn: Lsn) -> bool {
        let held = |lane: &LaneRetained| {
            lsn <= lane.acked || lsn > self.marked && lane.oldest.is_none_or(|oldest| lsn < oldest)
        };
        match lane {
            Some(lane) => held(&self.lane(lane)),
            None => self.lanes.iter().all(held) && (!self.lanes.is_empty() || held(&self.lane(0))),
        }
    }

    /// The newest record that the backup may hold, with every one before it in `lane`, or in all.
    #[must_use]
    pub fn held_upto(&self, lane: Option<u8>) -> Lsn {
        let upto = |lane: &LaneRetained| if lane.oldest.is_none() { Lsn::MAX } else { lane.acked };
        match lane {
            Some(lane) => upto(&self.lane(lane)),
            // Between two records of one lane there may be one of another that is waited for.
            None => self.oldest().map_or(Lsn::MAX, |oldest| Lsn(oldest.0 - 1)),
        }
    }
}

/// What the backup had acknowledged of a group, as a checkpoint stores it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Acked {
    /// There is one lane.
    One(Lsn),
    /// There are several, or a run was committed.
    Lanes {
        /// Of lanes that were not used.
        base: Lsn,
        /// By number.
        lanes: Vec<Lsn>,
    },
}

impl Acked {
    /// The newest record that is covered.
    pub fn newest(&self) -> Lsn {
        match self {
            Self::One(lsn) => *lsn,
            Self::Lanes { base, lanes } => lanes.iter().copied().max().unwrap_or_default().max(*base),
        }
    }
}

/// Where the retained records of one lane are, of all groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LaneSpan {
    /// The oldest one.
    pub oldest: Option<Lsn>,
    /// The newest one.
    pub last: Lsn,
}

/// The retained records of a node. A group whose last record was released and which is gone is forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Retained {
    groups: BTreeMap<GroupId, GroupRetained>,
    /// Payload bytes of each lane, of all groups.
    lane_bytes: [u64; LANES_MAX],
}

impl Retained {
    /// A record was given its place. No lane of the group overtakes a `barrier`.
    pub fn on_submitted(&mut self, group: GroupId, lane: u8, lsn: Lsn, payload_bytes: u64, barrier: bool) {
        let group = self.groups.entry(group).or_default();
        group.last = lsn;
        let state = group.lane_mut(lane);
        state.oldest.get_or_insert(lsn);
        state.last = lsn;
        if barrier {
            state.barrier = lsn;
        }
        state.bytes += payload_bytes;
        self.lane_bytes[usize::from(lane)] += payload_bytes;
    }

    /// The backup answered that it holds a lane of the group durably up to `lsn`; `payload_bytes` were in those records.
    pub fn on_released(&mut self, group: GroupId, lane: u8, lsn: Lsn, payload_bytes: u64) {
        let Some(group) = self.groups.get_mut(&group) else { return };
        let state = group.lane_mut(lane);
        if lsn <= state.acked {
            return;
        }
        state.acked = lsn;
        if state.oldest.is_none_or(|oldest| oldest > lsn) {
            // What it answers for became a mark meanwhile.
            return;
        }
        let before = state.bytes;
        state.bytes = state.bytes.saturating_sub(payload_bytes);
        if state.last <= lsn {
            (state.oldest, state.bytes) = (None, 0);
        } else {
            state.oldest = Some(state.oldest.map_or(lsn.next(), |o| o.max(lsn.next())));
        }
        self.lane_bytes[usize::from(lane)] -= before - state.bytes;
    }

    /// A record was given its place and is a mark.
    pub fn on_marked(&mut self, group: GroupId, lsn: Lsn) {
        let state = self.groups.entry(group).or_default();
        (state.last, state.marked) = (lsn, lsn);
    }

    /// Every retained record of the group becomes a mark. The oldest one is returned.
    pub fn on_switched(&mut self, group: GroupId) -> Option<Lsn> {
        let state = self.groups.entry(group).or_default();
        state.marked = state.last.max(state.marked);
        let oldest = state.oldest();
        for (lane, bytes) in state.lanes.iter_mut().zip(&mut self.lane_bytes) {
            *bytes -= lane.bytes;
            (lane.oldest, lane.bytes) = (None, 0);
        }
        oldest
    }

    /// A run brought the backup to `lsn`, in every lane.
    pub fn on_committed(&mut self, group: GroupId, lsn: Lsn) {
        let state = self.groups.entry(group).or_default();
        state.base = state.base.max(lsn);
        state.lanes.iter_mut().for_each(|lane| lane.acked = lane.acked.max(lsn));
        state.last = state.last.max(lsn);
    }

    /// The oldest place the journal must keep.
    #[must_use]
    pub fn oldest(&self) -> Option<Lsn> {
        self.groups.values().filter_map(GroupRetained::oldest).min()
    }

    /// Where the retained records of each lane are.
    #[must_use]
    pub fn spans(&self) -> [LaneSpan; LANES_MAX] {
        let mut spans = [LaneSpan::default(); LANES_MAX];
        for (at, lane) in self.groups.values().flat_map(|group| group.lanes.iter().enumerate()) {
            let (span, oldest) = (&mut spans[at], lane.oldest);
            span.oldest = [span.oldest, oldest].into_iter().flatten().min();
            if oldest.is_some() {
                span.last = span.last.max(lane.last);
            }
        }
        spans
    }

    /// One group.
    #[must_use]
    pub fn get(&self, group: GroupId) -> Option<&GroupRetained> {
        self.groups.get(&group)
    }

    /// One group.
    #[must_use]
    pub fn group(&self, group: GroupId) -> GroupRetained {
        self.groups.get(&group).cloned().unwrap_or_default()
    }

    /// See [`LaneRetained::acked`].
    #[must_use]
    pub fn acked_of(&self, group: GroupId, lane: u8) -> Lsn {
        self.groups.get(&group).map_or(Lsn::ZERO, |g| g.lane(lane).acked)
    }

    /// See [`GroupRetained::holds`].
    #[must_use]
    pub fn holds(&self, group: GroupId, lane: Option<u8>, lsn: Lsn) -> bool {
        self.groups.get(&group).map_or_else(|| GroupRetained::default().holds(lane, lsn), |g| g.holds(lane, lsn))
    }

    /// All groups.
    pub fn groups(&self) -> impl Iterator<Item = (GroupId, &GroupRetained)> + '_ {
        self.groups.iter().map(|(id, g)| (*id, g))
    }

    /// Payload bytes of all groups that are not on the backup.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.lane_bytes.iter().sum()
    }

    /// Payload bytes of a lane, of all groups, that are not on the backup.
    #[must_use]
    pub fn lane_bytes(&self, lane: u8) -> u64 {
        self.lane_bytes[usize::from(lane)]
    }

    /// What a checkpoint keeps: only what was acknowledged; the rest is found again by replay.
    #[must_use]
    pub(super) fn acked(&self) -> BTreeMap<GroupId, Acked> {
        let acked = |g: &GroupRetained| match &g.lanes[..] {
            [only] if g.base == Lsn::ZERO => Acked::One(only.acked),
            lanes => Acked::Lanes { base: g.base, lanes: lanes.iter().map(|lane| lane.acked).collect() },
        };
        self.groups.iter().map(|(id, g)| (*id, acked(g))).collect()
    }

    /// Starts from the acknowledgements of a checkpoint.
    #[must_use]
    pub(super) fn from_acked(acked: &BTreeMap<GroupId, Acked>) -> Self {
        let state = |acked: &Acked| {
            let (base, lanes) = match acked {
                Acked::One(acked) => (Lsn::ZERO, std::slice::from_ref(acked)),
                Acked::Lanes { base, lanes } => (*base, &lanes[..]),
            };
            let lane = |acked: &Lsn| LaneRetained { acked: *acked, last: *acked, ..LaneRetained::default() };
            let last = lanes.iter().copied().max().unwrap_or(base).max(base);
            GroupRetained { lanes: lanes.iter().map(lane).collect(), base, last, marked: Lsn::ZERO }
        };
        let groups = acked.iter().map(|(id, acked)| (*id, state(acked))).collect();
        Self { groups, lane_bytes: [0; LANES_MAX] }
    }

    /// Forgets groups that are gone and of which nothing is retained, nor is in the journal, which begins with `first`: a
    /// restart would take what it finds there for records that nobody has.
    pub fn forget(&mut self, first: Lsn, is_live: impl Fn(GroupId) -> bool) {
        self.groups.retain(|id, g| g.oldest().is_some() || g.last >= first || is_live(*id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_is_behind_pins_only_its_own_records() {
        let mut retained = Retained::default();
        retained.on_submitted(GroupId(1), 0, Lsn(1), 10, false);
        retained.on_submitted(GroupId(2), 0, Lsn(2), 10, false);
        retained.on_submitted(GroupId(1), 0, Lsn(3), 10, false);
        assert_eq!(retained.oldest(), Some(Lsn(1)));
        retained.on_released(GroupId(1), 0, Lsn(3), 20);
        assert_eq!(retained.oldest(), Some(Lsn(2)));
        assert_eq!(retained.bytes(), 10);
        retained.on_released(GroupId(2), 0, Lsn(2), 10);
        assert_eq!(retained.oldest(), None);
        retained.on_submitted(GroupId(1), 0, Lsn(9), 5, false);
        assert_eq!(retained.oldest(), Some(Lsn(9)));
    }

    #[test]
    fn a_switch_leaves_nothing_retained_and_nothing_held_by_the_backup() {
        let mut retained = Retained::default();
        retained.on_submitted(GroupId(1), 0, Lsn(1), 10, false);
        retained.on_submitted(GroupId(1), 0, Lsn(4), 10, false);
        assert_eq!(retained.on_switched(GroupId(1)), Some(Lsn(1)));
        retained.on_marked(GroupId(1), Lsn(6));
        // An answer for what was on its way.
        retained.on_released(GroupId(1), 0, Lsn(1), 10);
        let state = retained.group(GroupId(1));
        assert_eq!((state.oldest(), state.bytes()), (None, 0));
        assert!(state.holds(None, Lsn(1)) && !state.holds(None, Lsn(4)) && !state.holds(None, Lsn(6)));
        // Held since a cut.
        retained.on_submitted(GroupId(1), 0, Lsn(9), 10, false);
        retained.on_committed(GroupId(1), Lsn(6));
        let state = retained.group(GroupId(1));
        assert!(state.holds(None, Lsn(6)) && !state.holds(None, Lsn(9)));
        assert_eq!(retained.oldest(), Some(Lsn(9)));
    }

    #[test]
    fn an_old_answer_releases_nothing() {
        let mut retained = Retained::default();
        retained.on_submitted(GroupId(1), 0, Lsn(1), 1, false);
        retained.on_submitted(GroupId(1), 0, Lsn(2), 1, false);
        retained.on_released(GroupId(1), 0, Lsn(2), 2);
        let before = retained.clone();
        retained.on_released(GroupId(1), 0, Lsn(1), 1);
        assert_eq!(retained, before);
    }

    #[test]
    fn lanes_are_released_one_by_one_and_switched_and_committed_together() {
        let mut retained = Retained::default();
        let group = GroupId(1);
        for (lane, lsn) in [(0, 1), (1, 2), (0, 3), (1, 5)] {
            retained.on_submitted(group, lane, Lsn(lsn), 10, false);
        }
        retained.on_released(group, 0, Lsn(3), 20);
        let state = retained.group(group);
        assert!(state.holds(Some(0), Lsn(3)) && !state.holds(Some(1), Lsn(2)) && !state.holds(None, Lsn(3)));
        assert!(state.holds(None, Lsn(1)), "nothing at or below it is missing");
        assert_eq!((state.acked(), state.oldest(), retained.oldest()), (Lsn(1), Some(Lsn(2)), Some(Lsn(2))));
        assert_eq!((retained.lane_bytes(0), retained.lane_bytes(1), retained.bytes()), (0, 20, 20));
        assert_eq!(retained.spans()[..2], [LaneSpan::default(), LaneSpan { oldest: Some(Lsn(2)), last: Lsn(5) }]);
        let again = Retained::from_acked(&retained.acked());
        assert_eq!([again.acked_of(group, 0), again.acked_of(group, 1)], [Lsn(3), Lsn(0)]);

        assert_eq!(retained.on_switched(group), Some(Lsn(2)));
        assert_eq!((retained.bytes(), retained.group(group).acked()), (0, Lsn::ZERO));
        retained.on_committed(group, Lsn(5));
        let state = retained.group(group);
        assert!(state.holds(Some(7), Lsn(5)) && state.holds(None, Lsn(5)));
        let again = Retained::from_acked(&retained.acked());
        assert_eq!([again.acked_of(group, 0), again.acked_of(group, 7)], [Lsn(5), Lsn(5)]);
    }

    #[test]
    fn a_checkpoint_from_before_there_were_lanes_is_read() {
        let old: BTreeMap<GroupId, Acked> = serde_json::from_str(r#"{"3": 17}"#).unwrap();
        let retained = Retained::from_acked(&old);
        assert_eq!([retained.acked_of(GroupId(3), 0), retained.acked_of(GroupId(3), 1)], [Lsn(17), Lsn(0)]);
        assert_eq!(serde_json::to_string(&retained.acked()).unwrap(), r#"{"3":17}"#);
    }
}
