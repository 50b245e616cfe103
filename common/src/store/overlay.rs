//! Writes that have an LSN but are not in their place yet, so that reads see every acknowledged write.
//!
//! Invariant: an entry stays until the applier has performed its write; the segment map may change before that.

use bytes::Bytes;
use foldhash::fast::RandomState;
use hashbrown::HashMap;
use smallvec::SmallVec;

use crate::types::{BlockRange, Lsn, VolumeId};

/// What a pending write leaves in its blocks.
#[derive(Debug, Clone)]
pub enum Content {
    /// These bytes, with the checksum of each block.
    Data(Bytes, SmallVec<[u32; 2]>),
    /// Zeros.
    Zeros,
}

#[derive(Debug)]
struct Pending {
    lsn: Lsn,
    /// First block, as a number within the volume.
    first: u64,
    count: u64,
    content: Content,
}

/// Pending writes by volume and virtual segment.
#[derive(Debug, Default)]
pub struct Overlay {
    segments: HashMap<(VolumeId, u64), SmallVec<[Pending; 1]>, RandomState>,
}

/// What a read found so far.
pub struct Found<'a> {
    /// The blocks.
    pub data: &'a mut [u8],
    /// Their checksums.
    pub crcs: &'a mut [u32],
    /// Which blocks are there.
    pub covered: &'a mut [bool],
    /// Newest pending write that was read.
    pub seen: &'a mut Lsn,
}

impl Overlay {
    /// Adds a write. `per_segment` is the number of blocks in a virtual segment.
    pub fn insert(&mut self, lsn: Lsn, range: BlockRange, per_segment: u64, block_bytes: usize, content: &Content) {
        let mut first = range.first;
        while first < range.end() {
            let segment = first / per_segment;
            let end = range.end().min((segment + 1) * per_segment);
            let content = match content {
                Content::Zeros => Content::Zeros,
                Content::Data(data, crcs) => {
                    let from = index(first - range.first);
                    let to = index(end - range.first);
                    Content::Data(data.slice(from * block_bytes..to * block_bytes), crcs[from..to].into())
                }
            };
            let pending = Pending { lsn, first, count: end - first, content };
            self.segments.entry((range.volume, segment)).or_default().push(pending);
            first = end;
        }
    }

    /// Forgets what a write at or below `applied` left in the segments of `range`.
    pub fn remove(&mut self, applied: Lsn, range: BlockRange, per_segment: u64) {
        if range.count == 0 {
            return;
        }
        for segment in range.first / per_segment..=(range.end() - 1) / per_segment {
            if let hashbrown::hash_map::Entry::Occupied(mut entry) = self.segments.entry((range.volume, segment)) {
                entry.get_mut().retain(|p| p.lsn > applied);
                if entry.get().is_empty() {
                    entry.remove();
                }
            }
        }
    }

    /// Copies what is pending of `range` into `found`, newest first.
    pub fn read(&self, range: BlockRange, per_segment: u64, block_bytes: usize, found: &mut Found<'_>) {
        if range.count == 0 {
            return;
        }
        for segment in range.first / per_segment..=(range.end() - 1) / per_segment {
            let Some(pending) = self.segments.get(&(range.volume, segment)) else { continue };
            for write in pending.iter().rev() {
                let from = write.first.max(range.first);
                let to = (write.first + write.count).min(range.end());
                for block in from..to {
                    let at = index(block - range.first);
                    if found.covered[at] {
                        continue;
                    }
                    let out = &mut found.data[at * block_bytes..][..block_bytes];
                    match &write.content {
                        Content::Zeros => {
                            out.fill(0);
                            found.crcs[at] = crate::checksum::crc32c(out);
                        }
                        Content::Data(data, crcs) => {
                            let source = index(block - write.first);
                            out.copy_from_slice(&data[source * block_bytes..][..block_bytes]);
                            found.crcs[at] = crcs[source];
                        }
                    }
                    found.covered[at] = true;
                    *found.seen = (*found.seen).max(write.lsn);
                }
            }
        }
    }

    /// True if a write to one of the virtual segments of `range` is pending.
    #[must_use]
    pub fn touches(&self, range: BlockRange, per_segment: u64) -> bool {
        range.count != 0
            && (range.first / per_segment..=(range.end() - 1) / per_segment)
                .any(|segment| self.segments.contains_key(&(range.volume, segment)))
    }
}

fn index(blocks: u64) -> usize {
    usize::try_from(blocks).expect("a request is far smaller than the address space")
}
