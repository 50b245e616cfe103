//! The catalogue of a node as a pure function of its records.
//!
//! Both copies a node keeps - as of the newest record, for admission, and as of the last applied one, for checkpoints -
//! go through [`NodeState::apply`], and so does recovery. No clock, no I/O.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::{
    record::{ClientSequence, Control, Op, Record},
    types::{GroupId, LayerId, Lsn, Position, VolumeId, VolumeSpec},
};

/// How far apart a client's requests may arrive out of order.
pub const SEQUENCE_WINDOW: u64 = 1024;
/// Clients whose sequences are remembered; the one silent for longest is forgotten first.
pub const CLIENTS_MAX: usize = 1024;
/// Live volumes of a node.
pub const VOLUMES_MAX: usize = 4096;

/// What a node knows of one group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupState {
    /// Never reused.
    pub id: GroupId,
    /// The name operators use.
    pub name: String,
    /// The newest record of the group, as a position of the primary.
    pub position: Position,
    /// The primary's time of that record.
    pub time_unix_ms: i64,
    /// Its volumes; a group is gone with its last volume.
    pub volumes: Vec<VolumeId>,
}

/// Sequences of one client that were applied: the highest, and which of the 1024 below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientState {
    highest: u64,
    /// Bit `n`: `highest - n` was seen.
    seen: Vec<u64>,
    /// LSN of the client's newest record: every remembered request lies at or below it.
    pub lsn: Lsn,
}

/// What a repeated, late or fresh sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SequenceCheck {
    /// Not seen.
    Fresh,
    /// Applied; the newest record of that client is at this LSN.
    Applied(Lsn),
    /// Too far below the highest to know.
    TooOld {
        /// The highest sequence of the client.
        highest: u64,
    },
}

impl ClientState {
    fn new() -> Self {
        Self { highest: 0, seen: vec![0; usize::try_from(SEQUENCE_WINDOW / 64).expect("16")], lsn: Lsn::ZERO }
    }

    fn bit(&self, back: u64) -> (usize, u64) {
        (usize::try_from(back / 64).expect("below 16"), 1 << (back % 64))
    }

    fn check(&self, sequence: u64) -> SequenceCheck {
        if sequence > self.highest {
            return SequenceCheck::Fresh;
        }
        let back = self.highest - sequence;
        if back >= SEQUENCE_WINDOW {
            return SequenceCheck::TooOld { highest: self.highest };
        }
        let (word, bit) = self.bit(back);
        if self.seen[word] & bit != 0 { SequenceCheck::Applied(self.lsn) } else { SequenceCheck::Fresh }
    }

    fn mark(&mut self, sequence: u64, lsn: Lsn) {
        if sequence > self.highest {
            self.shift(sequence - self.highest);
            self.highest = sequence;
        }
        let back = self.highest - sequence;
        if back < SEQUENCE_WINDOW {
            let (word, bit) = self.bit(back);
            self.seen[word] |= bit;
        }
        self.lsn = lsn;
    }

    fn shift(&mut self, by: u64) {
        if by >= SEQUENCE_WINDOW {
            self.seen.fill(0);
            return;
        }
        let (words, bits) = (usize::try_from(by / 64).expect("below 16"), by % 64);
        for at in (0..self.seen.len()).rev() {
            let from = at.checked_sub(words).map_or(0, |i| self.seen[i]);
            let below = at.checked_sub(words + 1).map_or(0, |i| self.seen[i]);
            self.seen[at] = if bits == 0 { from } else { from << bits | below >> (64 - bits) };
        }
    }
}

/// The catalogue as of one record.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeState {
    /// Live volumes.
    pub volumes: BTreeMap<VolumeId, VolumeSpec>,
    /// Live groups.
    pub groups: BTreeMap<GroupId, GroupState>,
    /// Remembered clients.
    pub clients: BTreeMap<String, ClientState>,
    /// Clients in the order of their last first-seen, for forgetting.
    client_order: VecDeque<String>,
    /// Largest volume id ever given.
    pub last_volume: VolumeId,
    /// Largest group id ever given.
    pub last_group: GroupId,
    /// Largest layer id ever given.
    pub last_layer: LayerId,
}

impl NodeState {
    /// Moves the state over one record at `lsn` of this node's journal.
    pub fn apply(&mut self, lsn: Lsn, record: &Record) {
        if let Some(ClientSequence { client, sequence }) = &record.client {
            self.client_mut(client).mark(*sequence, lsn);
        }
        if let Op::Control(control) = &record.op {
            self.apply_control(control);
        }
        if let Some(group) = self.groups.get_mut(&record.group) {
            group.position = record.position;
            group.time_unix_ms = record.time_unix_ms;
        }
    }

    /// What is known of a client's sequence.
    #[must_use]
    pub fn check_sequence(&self, request: &ClientSequence) -> SequenceCheck {
        self.clients.get(&request.client).map_or(SequenceCheck::Fresh, |c| c.check(request.sequence))
    }

    /// The live volume of that name.
    #[must_use]
    pub fn volume_by_name(&self, name: &str) -> Option<&VolumeSpec> {
        self.volumes.values().find(|v| v.name == name)
    }

    fn client_mut(&mut self, client: &str) -> &mut ClientState {
        if !self.clients.contains_key(client) {
            if self.clients.len() >= CLIENTS_MAX
                && let Some(oldest) = self.client_order.pop_front()
            {
                self.clients.remove(&oldest);
            }
            self.client_order.push_back(client.to_owned());
        }
        self.clients.entry(client.to_owned()).or_insert_with(ClientState::new)
    }

    fn apply_control(&mut self, control: &Control) {
        match control {
            Control::CreateVolume { spec } => {
                self.last_volume = self.last_volume.max(spec.id);
                self.last_group = self.last_group.max(spec.group);
                let group = self.groups.entry(spec.group).or_insert_with(|| GroupState {
                    id: spec.group,
                    name: spec.group_name.clone(),
                    position: Position::default(),
                    time_unix_ms: 0,
                    volumes: Vec::new(),
                });
                group.volumes.push(spec.id);
                self.volumes.insert(spec.id, spec.clone());
            }
            Control::ResizeVolume { volume, size_bytes } => {
                if let Some(spec) = self.volumes.get_mut(volume) {
                    spec.size_bytes = *size_bytes;
                }
            }
            Control::DeleteVolume { volume } => {
                // The group goes with its last volume. Its id is never used again, so a late duplicate of one of its
                // records is known by an id that is neither live nor new.
                if let Some(spec) = self.volumes.remove(volume)
                    && let Some(group) = self.groups.get_mut(&spec.group)
                {
                    group.volumes.retain(|v| v != volume);
                    if group.volumes.is_empty() {
                        self.groups.remove(&spec.group);
                    }
                }
            }
            Control::SetAckRule { volume, ack, away } => {
                if let Some(spec) = self.volumes.get_mut(volume) {
                    (spec.ack, spec.away) = (*ack, *away);
                }
            }
            Control::CreateSnapshot { layers } => {
                for (_, layer) in layers {
                    self.last_layer = self.last_layer.max(*layer);
                }
            }
            Control::DeleteSnapshot { .. } | Control::RollBack { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn sequences_are_remembered_as_a_set_remembers_them(steps in proptest::collection::vec(1u64..200, 1..400), big in proptest::option::of(1000u64..5000)) {
            let mut client = ClientState::new();
            let mut model = BTreeSet::new();
            let mut base = 1;
            for (n, step) in steps.iter().enumerate() {
                let sequence = if step % 3 == 0 { base + step } else { base.saturating_sub(*step).max(1) };
                if n == 100 { base += big.unwrap_or(0); }
                let highest = model.last().copied().unwrap_or(0);
                let expected = if sequence <= highest && highest - sequence >= SEQUENCE_WINDOW {
                    SequenceCheck::TooOld { highest }
                } else if model.contains(&sequence) { SequenceCheck::Applied(client.lsn) } else { SequenceCheck::Fresh };
                prop_assert_eq!(client.check(sequence), expected);
                if expected == SequenceCheck::Fresh {
                    client.mark(sequence, Lsn(n as u64));
                    model.insert(sequence);
                    base = base.max(sequence);
                }
            }
        }
    }
}
