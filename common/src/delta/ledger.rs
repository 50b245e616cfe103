//! The redundancy ledger of one group (data table 525, Fig. 9): what its retained records would ship one by one, against
//! what one run would.
//!
//! - Column 532 and 533: the blocks with retained items, and how many, are kept (see [`super::counted`]).
//! - Column 534 is column 533 times the size of a block and is not kept; field 542, its sum, is: *CR bytes*.
//! - Field 541, times the size of a block, is *DR bytes*; volumes of a group may have different sizes.
//!
//! An item is one block of one record. Items of zeros (discard, write of zeros) ship nothing either way, since a run
//! elides zeros: they add no CR bytes, and a block with nothing but such items adds no DR bytes. A block with data and
//! zeros counts as one block of DR bytes, also if the newest item is zeros: DR is never too small, and the ratio never
//! too large. Their blocks are marks like others.
//!
//! The blocks with items are what a switch marks. They are kept as sets, so that the switch takes them
//! ([`Ledger::take`]) and looks at no item.

use std::collections::BTreeMap;

use crate::types::{BlockRange, VolumeId};

use super::{BlockSet, counted::Counted};

/// What the blocks of a record are to the ledger: one item each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Items {
    /// They ship as whole blocks.
    Data {
        /// Size of a block of the volume, in bytes.
        block_bytes: u32,
    },
    /// Zeros: no bytes.
    Zeros,
}

#[derive(Debug, Clone, Default)]
struct VolumeItems {
    data: Counted,
    zeros: Counted,
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    volumes: BTreeMap<VolumeId, VolumeItems>,
    cr_bytes: u64,
    dr_bytes: u64,
}

/// What a switch took out of a ledger.
#[derive(Debug)]
pub struct Taken {
    /// By volume, the blocks that had items.
    pub marks: Vec<(VolumeId, BlockSet)>,
    /// The counts; giving their memory back takes time, which a lock has not.
    pub rest: Ledger,
}

impl Ledger {
    /// Nothing is retained.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A record of these blocks is retained (443).
    pub fn on_retained(&mut self, range: BlockRange, items: Items) {
        let volume = self.volumes.entry(range.volume).or_default();
        match items {
            Items::Data { block_bytes } => {
                let listed = volume.data.add(range.first, range.count);
                self.dr_bytes += listed * u64::from(block_bytes);
                self.cr_bytes += range.count * u64::from(block_bytes);
            }
            Items::Zeros => {
                volume.zeros.add(range.first, range.count);
            }
        }
    }

    /// A record that [`Ledger::on_retained`] counted is retained no more.
    pub fn on_released(&mut self, range: BlockRange, items: Items) {
        // It was taken by a switch.
        let Some(volume) = self.volumes.get_mut(&range.volume) else { return };
        match items {
            Items::Data { block_bytes } => {
                let gone = volume.data.remove(range.first, range.count);
                self.dr_bytes = self.dr_bytes.saturating_sub(gone * u64::from(block_bytes));
                self.cr_bytes = self.cr_bytes.saturating_sub(range.count * u64::from(block_bytes));
            }
            Items::Zeros => {
                volume.zeros.remove(range.first, range.count);
            }
        }
        if volume.data.members().is_empty() && volume.zeros.members().is_empty() {
            self.volumes.remove(&range.volume);
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Takes all out of it: the marks of a switch. Costs no more than the pages of the items of zeros.
    #[must_use]
    pub fn take(&mut self) -> Taken {
        let mut rest = std::mem::take(self);
        let marks = rest.volumes.iter_mut().map(|(id, volume)| {
            let mut marks = volume.data.take_members();
            if marks.is_empty() {
                marks = volume.zeros.take_members();
            } else {
                marks.union_with(volume.zeros.members());
            }
            (*id, marks)
        });
        Taken { marks: marks.collect(), rest }
    }

    /// The blocks of a volume that have items.
    #[must_use]
    pub fn marks(&self, volume: VolumeId) -> BlockSet {
        let Some(volume) = self.volumes.get(&volume) else { return BlockSet::new() };
        let mut marks = volume.data.members().clone();
        marks.union_with(volume.zeros.members());
        marks
    }

    /// Items of a block (column 533), those of zeros among them.
    #[must_use]
    pub fn items(&self, volume: VolumeId, block: u64) -> u64 {
        self.volumes.get(&volume).map_or(0, |v| v.data.count(block) + v.zeros.count(block))
    }

    /// Bytes that shipping every retained item takes (field 542).
    #[must_use]
    pub fn cr_bytes(&self) -> u64 {
        self.cr_bytes
    }

    /// Bytes that one run over their blocks takes: at most so many (field 541 in bytes).
    #[must_use]
    pub fn dr_bytes(&self) -> u64 {
        self.dr_bytes
    }

    /// CR bytes by DR bytes, the data transfer ratio (446): 1 or more. `None` if nothing would be shipped either way.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a ratio, compared with a threshold")]
    pub fn ratio(&self) -> Option<f64> {
        (self.dr_bytes > 0).then(|| self.cr_bytes as f64 / self.dr_bytes as f64)
    }

    /// Memory it takes, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let volumes = self.volumes.values().map(|v| v.data.memory_bytes() + v.zeros.memory_bytes());
        size_of::<Self>() + volumes.sum::<usize>()
    }
}
