//! What the simulation knows to be true: every write in order, and what was acknowledged.

use std::collections::BTreeMap;

use understudy_common::{
    record::ClientSequence,
    state::LanePlaces,
    types::{AckRule, GroupId, Lsn, VolumeId, VolumeSpec},
};

use super::{BLOCK, Outcome, broken};

/// The content of a block: a number that says which write it came from; 0 is zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stamp(pub u64);

static ZEROS: [u8; BLOCK] = [0; BLOCK];

impl Stamp {
    pub fn fill(self) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        if self.0 != 0 {
            for (n, chunk) in (0..).zip(block.chunks_exact_mut(8)) {
                let word = self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(n);
                chunk.copy_from_slice(&word.to_le_bytes());
            }
            block[..8].copy_from_slice(&self.0.to_le_bytes());
        }
        block
    }

    /// `None` if no write ever made such a block.
    pub fn of(block: &[u8]) -> Option<Self> {
        if block == ZEROS {
            return Some(Self(0));
        }
        let stamp = Self(u64::from_le_bytes(block[..8].try_into().expect("eight bytes")));
        (stamp.fill() == block).then_some(stamp)
    }
}

/// What a record of the history does to its volume.
#[derive(Debug, Clone)]
pub(super) enum What {
    Create(VolumeSpec),
    Resize { blocks: u64 },
    Delete,
    Write { first: u64, count: u64, stamp: Stamp },
}

/// A record in the history of the primary.
#[derive(Debug, Clone)]
pub(super) struct Event {
    pub lsn: Lsn,
    pub group: GroupId,
    pub lane: u8,
    pub volume: VolumeId,
    pub what: What,
    pub rule: AckRule,
    pub client: Option<ClientSequence>,
    /// Acknowledged, and true if both sides had it then.
    pub acked: Option<bool>,
    /// Start of the primary in which it was submitted.
    pub boot: u32,
}

impl Event {
    /// True if who holds every lane up to there holds this.
    pub fn is_in(&self, lanes: &LanePlaces) -> bool {
        self.lsn <= lanes.of(self.lane).lsn
    }

    pub fn touches(&self, volume: VolumeId, block: u64) -> Option<Stamp> {
        match &self.what {
            What::Write { first, count, stamp }
                if self.volume == volume && (*first..first + count).contains(&block) =>
            {
                Some(*stamp)
            }
            _ => None,
        }
    }
}

/// All records in the order of their LSNs.
#[derive(Default)]
pub(super) struct Model {
    pub history: Vec<Event>,
    pub boot: u32,
    last_stamp: u64,
}

impl Model {
    pub fn next_stamp(&mut self) -> Stamp {
        self.last_stamp += 1;
        Stamp(self.last_stamp)
    }

    /// The sequence that client `who` uses next.
    pub fn next_sequence(&self, who: &str) -> u64 {
        let used = self.history.iter().filter_map(|e| e.client.as_ref().filter(|c| c.client == who));
        used.map(|c| c.sequence + 1).max().unwrap_or(1)
    }

    /// The volumes that exist at `position`.
    pub fn volumes(&self, position: Lsn) -> BTreeMap<VolumeId, VolumeSpec> {
        self.volumes_where(|e| e.lsn <= position)
    }

    /// The volumes that a part of the records makes.
    pub fn volumes_where(&self, holds: impl Fn(&Event) -> bool) -> BTreeMap<VolumeId, VolumeSpec> {
        let mut volumes = BTreeMap::new();
        for event in self.history.iter().filter(|e| holds(e)) {
            match &event.what {
                What::Create(spec) => {
                    volumes.insert(event.volume, spec.clone());
                }
                What::Resize { blocks } => {
                    if let Some(spec) = volumes.get_mut(&event.volume) {
                        spec.size_bytes = blocks * BLOCK as u64;
                    }
                }
                What::Delete => {
                    volumes.remove(&event.volume);
                }
                What::Write { .. } => {}
            }
        }
        volumes
    }

    /// The volumes that exist now.
    pub fn live(&self) -> BTreeMap<VolumeId, VolumeSpec> {
        self.volumes(Lsn(u64::MAX))
    }

    /// Every volume that ever was.
    pub fn ever(&self) -> impl Iterator<Item = &VolumeSpec> {
        self.history.iter().filter_map(|e| if let What::Create(spec) = &e.what { Some(spec) } else { None })
    }

    /// The blocks of a volume at `position`; `None` if it does not exist there.
    pub fn image(&self, volume: VolumeId, position: Lsn) -> Option<Vec<Stamp>> {
        self.image_where(volume, |e| e.lsn <= position)
    }

    /// The same of who holds every lane of the volume's group up to there.
    pub fn image_of(&self, volume: VolumeId, lanes: &LanePlaces) -> Option<Vec<Stamp>> {
        self.image_where(volume, |e| e.is_in(lanes))
    }

    fn image_where(&self, volume: VolumeId, holds: impl Fn(&Event) -> bool) -> Option<Vec<Stamp>> {
        let mut image = None;
        for event in self.history.iter().filter(|e| e.volume == volume && holds(e)) {
            match &event.what {
                What::Create(spec) => image = Some(vec![Stamp(0); size(spec.block_count())]),
                What::Resize { blocks } => image.as_mut()?.resize(size(*blocks), Stamp(0)),
                What::Delete => image = None,
                What::Write { first, count, stamp } => {
                    image.as_mut()?[size(*first)..size(first + count)].fill(*stamp);
                }
            }
        }
        image
    }

    /// P6: of a group of which every lane is held up to there, nothing held has overtaken a write to the same block or a
    /// record of the catalogue that is not, nor has one of the catalogue overtaken anything.
    pub fn check_order(&self, group: GroupId, lanes: &LanePlaces) -> Outcome {
        let mut missing = BTreeMap::new();
        let (mut any, mut control) = (None, None);
        for event in self.history.iter().filter(|e| e.group == group) {
            let touched = match &event.what {
                What::Write { first, count, .. } => Some(*first..first + count),
                What::Create(_) | What::Resize { .. } | What::Delete => None,
            };
            if !event.is_in(lanes) {
                any = Some(event.lsn);
                match touched {
                    Some(blocks) => missing.extend(blocks.map(|block| ((event.volume, block), event.lsn))),
                    None => control = Some(event.lsn),
                }
                continue;
            }
            let overtaken = match touched {
                Some(mut blocks) => control.or_else(|| blocks.find_map(|b| missing.get(&(event.volume, b)).copied())),
                None => any,
            };
            if let Some(overtaken) = overtaken {
                return Err(broken(format!(
                    "record {} of lane {} has overtaken {overtaken}, which it must not: the lanes are at {lanes:?}",
                    event.lsn, event.lane
                )));
            }
        }
        Ok(())
    }

    /// The newest content of a block.
    pub fn newest(&self, volume: VolumeId, block: u64) -> Stamp {
        self.history.iter().rev().find_map(|e| e.touches(volume, block)).unwrap_or(Stamp(0))
    }

    /// True if the block ever held this.
    pub fn ever_held(&self, volume: VolumeId, block: u64, stamp: Stamp) -> bool {
        stamp.0 == 0 || self.history.iter().any(|e| e.touches(volume, block) == Some(stamp))
    }

    /// The primary starts with `next` as its next LSN: what is not in its journal never happened.
    pub fn on_primary_started(&mut self, next: Lsn) -> Outcome {
        self.boot += 1;
        if let Some(lost) = self.history.iter().find(|e| e.acked.is_some() && e.lsn >= next) {
            let end = Lsn(next.0 - 1);
            return Err(broken(format!("write {} was acknowledged and is lost: the journal ends at {end}", lost.lsn)));
        }
        self.history.retain(|e| e.lsn < next);
        Ok(())
    }

    pub fn fold(&self, trace: u64) -> u64 {
        self.history.iter().fold(trace, |t, e| (t ^ e.lsn.0).wrapping_mul(0x100_0000_01b3))
    }
}

fn size(n: u64) -> usize {
    usize::try_from(n).expect("a small volume")
}
