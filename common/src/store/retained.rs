//! Which records the backup has not made durable yet, group by group.
//!
//! Cost is per group, not per record: ten million retained records take no more memory than one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::types::{GroupId, Lsn};

/// The retained records of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GroupRetained {
    /// Every record of the group up to here is durable on the backup.
    pub acked: Lsn,
    /// At or below the oldest record that is not; `None` when the backup has all.
    pub oldest: Option<Lsn>,
    /// The newest record of the group.
    pub last: Lsn,
    /// Payload bytes that are not on the backup.
    pub bytes: u64,
}

impl GroupRetained {
    /// True if the backup holds the record at `lsn`.
    #[must_use]
    pub fn holds(&self, lsn: Lsn) -> bool {
        lsn <= self.acked || self.oldest.is_none()
    }
}

/// The retained records of a node. A group whose last record was released and which is gone is forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Retained {
    groups: BTreeMap<GroupId, GroupRetained>,
}

impl Retained {
    /// A record was given its place.
    pub fn on_submitted(&mut self, group: GroupId, lsn: Lsn, payload_bytes: u64) {
        let state = self.groups.entry(group).or_default();
        state.oldest.get_or_insert(lsn);
        state.last = lsn;
        state.bytes += payload_bytes;
    }

    /// The backup answered that it holds the group durably up to `lsn`; `payload_bytes` were in those records.
    pub fn on_released(&mut self, group: GroupId, lsn: Lsn, payload_bytes: u64) {
        let Some(state) = self.groups.get_mut(&group) else { return };
        if lsn <= state.acked {
            return;
        }
        state.acked = lsn;
        state.bytes = state.bytes.saturating_sub(payload_bytes);
        if state.last <= lsn {
            (state.oldest, state.bytes) = (None, 0);
        } else {
            state.oldest = Some(state.oldest.map_or(lsn.next(), |o| o.max(lsn.next())));
        }
    }

    /// The oldest place the journal must keep.
    #[must_use]
    pub fn oldest(&self) -> Option<Lsn> {
        self.groups.values().filter_map(|g| g.oldest).min()
    }

    /// One group.
    #[must_use]
    pub fn group(&self, group: GroupId) -> GroupRetained {
        self.groups.get(&group).copied().unwrap_or_default()
    }

    /// All groups.
    pub fn groups(&self) -> impl Iterator<Item = (GroupId, GroupRetained)> + '_ {
        self.groups.iter().map(|(id, g)| (*id, *g))
    }

    /// Payload bytes of all groups that are not on the backup.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.groups.values().map(|g| g.bytes).sum()
    }

    /// What a checkpoint keeps: only what was acknowledged; the rest is found again by replay.
    #[must_use]
    pub fn acked(&self) -> BTreeMap<GroupId, Lsn> {
        self.groups.iter().map(|(id, g)| (*id, g.acked)).collect()
    }

    /// Starts from the acknowledgements of a checkpoint.
    #[must_use]
    pub fn from_acked(acked: &BTreeMap<GroupId, Lsn>) -> Self {
        let groups = acked
            .iter()
            .map(|(id, acked)| (*id, GroupRetained { acked: *acked, oldest: None, last: *acked, bytes: 0 }))
            .collect();
        Self { groups }
    }

    /// Forgets groups that are gone and of which nothing is retained.
    pub fn forget(&mut self, is_live: impl Fn(GroupId) -> bool) {
        self.groups.retain(|id, g| g.oldest.is_some() || is_live(*id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_is_behind_pins_only_its_own_records() {
        let mut retained = Retained::default();
        retained.on_submitted(GroupId(1), Lsn(1), 10);
        retained.on_submitted(GroupId(2), Lsn(2), 10);
        retained.on_submitted(GroupId(1), Lsn(3), 10);
        assert_eq!(retained.oldest(), Some(Lsn(1)));
        retained.on_released(GroupId(1), Lsn(3), 20);
        assert_eq!(retained.oldest(), Some(Lsn(2)));
        assert_eq!(retained.bytes(), 10);
        retained.on_released(GroupId(2), Lsn(2), 10);
        assert_eq!(retained.oldest(), None);
        retained.on_submitted(GroupId(1), Lsn(9), 5);
        assert_eq!(retained.oldest(), Some(Lsn(9)));
    }

    #[test]
    fn an_old_answer_releases_nothing() {
        let mut retained = Retained::default();
        retained.on_submitted(GroupId(1), Lsn(1), 1);
        retained.on_submitted(GroupId(1), Lsn(2), 1);
        retained.on_released(GroupId(1), Lsn(2), 2);
        let before = retained.clone();
        retained.on_released(GroupId(1), Lsn(1), 1);
        assert_eq!(retained, before);
    }
}
