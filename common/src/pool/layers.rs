//! Handing block versions between the layers of a volume.
//!
//! Settling a virtual segment merges what deleted and rolled back layers hold of it, oldest layer first: a version that
//! two layers hold belongs, for an older snapshot, to the older of the two. It is done when the segment is touched and,
//! for all the others, by [`Pool::sweep_step`]. A rolled back layer that still holds something of a virtual segment
//! implies that no newer layer does, because every change settles first.

use smallvec::SmallVec;

use super::{
    Pool, PoolError,
    chunk::{CHUNK_SEGMENTS, Chunk, Extent, HOLE},
    map::Key,
    volumes::LayerState,
};
use crate::types::{SegmentId, VolumeId};

/// A copy of an entry. Most have one extent.
pub(super) type Entry = SmallVec<[Extent; 2]>;

/// The key and place in its chunk of a virtual segment.
pub(super) fn locate(tree: u64, vseg: u64) -> (Key, u8) {
    let chunk = u32::try_from(vseg / CHUNK_SEGMENTS).expect("volumes are that small");
    (Key { tree, chunk }, u8::try_from(vseg % CHUNK_SEGMENTS).expect("below 64"))
}

impl Pool {
    pub(super) fn chunk(&mut self, key: Key) -> Result<&Chunk, PoolError> {
        let horizon = self.segments.horizon();
        self.map.chunk(key, horizon)
    }

    pub(super) fn change(&mut self, key: Key) -> Result<&mut Chunk, PoolError> {
        let (horizon, now) = (self.segments.horizon(), self.segments.now());
        self.map.change(key, horizon, now)
    }

    pub(super) fn entry(&mut self, tree: u64, vseg: u64) -> Result<Entry, PoolError> {
        let (key, index) = locate(tree, vseg);
        Ok(Entry::from_slice(self.chunk(key)?.entry(index)))
    }

    pub(super) fn set_entry(&mut self, tree: u64, vseg: u64, entry: &[Extent]) -> Result<(), PoolError> {
        let (key, index) = locate(tree, vseg);
        self.change(key)?.set_entry(index, entry);
        Ok(())
    }

    /// Gives ownership of slots to a layer. Nothing for an empty `mask`.
    pub(super) fn give(&mut self, tree: u64, vseg: u64, segment: SegmentId, mask: u128) -> Result<(), PoolError> {
        if mask != 0 {
            let (key, index) = locate(tree, vseg);
            self.change(key)?.add(index, segment, mask, 0);
        }
        Ok(())
    }

    /// Frees block versions that were just taken from their owner. Their slots stay used in the head `head` until the
    /// free is covered. Nothing for an empty `mask` or a hole.
    pub(super) fn free(&mut self, head: u64, vseg: u64, segment: SegmentId, mask: u128) -> Result<(), PoolError> {
        if mask == 0 || segment == HOLE {
            return Ok(());
        }
        self.segments.release(segment, mask.count_ones())?;
        let (key, index) = locate(head, vseg);
        if self.chunk(key)?.entry(index).iter().any(|e| e.segment == segment) {
            let now = self.segments.now();
            self.change(key)?.note_freed(index, segment, mask, now);
        }
        Ok(())
    }

    /// Settles a virtual segment: afterwards only live layers and the head hold something of it.
    pub(super) fn settle(&mut self, volume: VolumeId, vseg: u64) -> Result<(), PoolError> {
        let v = &self.volumes[&volume];
        if v.is_settled() {
            return Ok(());
        }
        let head = v.head;
        let layers: SmallVec<[(u64, LayerState); 8]> = v.layers.iter().map(|l| (l.tree, l.state)).collect();
        let mut older = None;
        let mut handed_back = 0;
        for (tree, state) in layers {
            if state == LayerState::Live {
                older = Some(tree);
                continue;
            }
            let entry = self.entry(tree, vseg)?;
            if entry.is_empty() {
                continue;
            }
            self.set_entry(tree, vseg, &[])?;
            if state == LayerState::Deleting {
                self.hand_to_older(older, head, vseg, &entry)?;
            } else {
                self.hand_back(volume, vseg, &entry, &mut handed_back)?;
            }
        }
        Ok(())
    }

    fn hand_to_older(&mut self, older: Option<u64>, head: u64, vseg: u64, entry: &Entry) -> Result<(), PoolError> {
        let kept = match older {
            Some(older) => {
                let (key, index) = locate(older, vseg);
                !self.chunk(key)?.owned(index)
            }
            None => 0,
        };
        for e in entry {
            if let Some(older) = older {
                self.give(older, vseg, e.segment, e.owned & kept)?;
            }
            self.free(head, vseg, e.segment, e.owned & !kept)?;
        }
        Ok(())
    }

    /// Gives the versions of a rolled back layer to the head, except where an older one did so already.
    fn hand_back(
        &mut self,
        volume: VolumeId,
        vseg: u64,
        entry: &Entry,
        handed_back: &mut u128,
    ) -> Result<(), PoolError> {
        let head = self.volumes[&volume].head;
        let wanted = entry.iter().fold(0, |mask, e| mask | e.owned) & !*handed_back;
        let mut now = self.entry(head, vseg)?;
        let mut freed: SmallVec<[(SegmentId, u128); 4]> = SmallVec::new();
        for e in &mut now {
            freed.push((e.segment, e.owned & wanted));
            e.owned &= !wanted;
        }
        self.set_entry(head, vseg, &now)?;
        let mut returned: SmallVec<[SegmentId; 4]> = SmallVec::new();
        for e in entry {
            freed.push((e.segment, e.owned & !wanted));
            let mask = e.owned & wanted;
            if e.segment == HOLE || mask == 0 {
                continue;
            }
            let all = self.full_mask(volume);
            let (key, index) = locate(head, vseg);
            let chunk = self.change(key)?;
            if !chunk.entry(index).iter().any(|h| h.segment == e.segment) {
                returned.push(e.segment);
            }
            chunk.add(index, e.segment, mask, all);
        }
        *handed_back |= wanted;
        for (segment, mask) in freed {
            self.free(head, vseg, segment, mask)?;
        }
        for segment in returned {
            self.find_unowned(volume, vseg, segment)?;
        }
        Ok(())
    }

    /// A segment came back into the head's list, which does not know what is used in it: all, but what no layer owns is
    /// reusable after the next checkpoint.
    fn find_unowned(&mut self, volume: VolumeId, vseg: u64, segment: SegmentId) -> Result<(), PoolError> {
        let v = &self.volumes[&volume];
        let head = v.head;
        let trees: SmallVec<[u64; 8]> = v.layers.iter().map(|l| l.tree).chain([head]).collect();
        let mut unowned = self.full_mask(volume);
        for tree in trees {
            let (key, index) = locate(tree, vseg);
            for e in self.chunk(key)?.entry(index).iter().filter(|e| e.segment == segment) {
                unowned &= !e.owned;
            }
        }
        if unowned != 0 {
            let now = self.segments.now();
            let (key, index) = locate(head, vseg);
            self.change(key)?.note_freed(index, segment, unowned, now);
        }
        Ok(())
    }

    /// All blocks of a segment of the volume.
    pub(super) fn full_mask(&self, volume: VolumeId) -> u128 {
        u128::MAX >> (128 - self.volumes[&volume].spec.blocks_per_segment())
    }

    /// Settles or frees up to `max_entries` entries of what was deleted or rolled back. True if there is more to do.
    ///
    /// # Errors
    /// The catalogue cannot be read, or is damaged.
    pub fn sweep_step(&mut self, max_entries: usize) -> Result<bool, PoolError> {
        let mut left = max_entries;
        while left > 0 {
            let todo = self.volumes.values().filter(|v| v.deleting || !v.is_settled()).map(super::volumes::Volume::id);
            let Some(volume) = todo.min() else { return Ok(false) };
            if self.volumes[&volume].deleting {
                self.sweep_deleted(volume, &mut left)?;
            } else {
                self.sweep_layer(volume, &mut left)?;
            }
        }
        Ok(self.volumes.values().any(|v| v.deleting || !v.is_settled()))
    }

    /// Works on the oldest layer to be settled until it is done or `left` is used up.
    fn sweep_layer(&mut self, volume: VolumeId, left: &mut usize) -> Result<(), PoolError> {
        let layers = &self.volumes[&volume].layers;
        let at = layers.iter().position(|l| l.state != LayerState::Live).expect("it is not settled");
        let (tree, mut cursor) = (layers[at].tree, layers[at].cursor);
        while *left > 0 {
            let Some(chunk) = self.map.next(tree, cursor, u32::MAX)? else {
                self.volumes.get_mut(&volume).expect("it exists").layers.remove(at);
                // Even an empty layer is work: the caller's loop ends.
                *left -= 1;
                return Ok(());
            };
            cursor = chunk;
            for index in self.indexes(Key { tree, chunk })?.into_iter().take(*left) {
                self.settle(volume, u64::from(chunk) * CHUNK_SEGMENTS + u64::from(index))?;
                *left -= 1;
            }
        }
        self.volumes.get_mut(&volume).expect("it exists").layers[at].cursor = cursor;
        Ok(())
    }

    /// Frees the layers of a deleted volume one by one.
    pub(super) fn sweep_deleted(&mut self, volume: VolumeId, left: &mut usize) -> Result<(), PoolError> {
        let v = &self.volumes[&volume];
        let (head, layer) = (v.head, v.layers.last().map(|l| (l.tree, l.cursor)));
        let (tree, mut cursor) = layer.unwrap_or((head, v.cursor));
        while *left > 0 {
            let Some(chunk) = self.map.next(tree, cursor, u32::MAX)? else {
                let gone = self.volumes.get_mut(&volume).expect("it exists").layers.pop().is_none();
                if gone {
                    self.volumes.remove(&volume);
                }
                *left -= 1;
                return Ok(());
            };
            cursor = chunk;
            for index in self.indexes(Key { tree, chunk })?.into_iter().take(*left) {
                let vseg = u64::from(chunk) * CHUNK_SEGMENTS + u64::from(index);
                let entry = self.entry(tree, vseg)?;
                self.set_entry(tree, vseg, &[])?;
                for e in entry {
                    if e.segment != HOLE {
                        self.segments.release(e.segment, e.owned.count_ones())?;
                    }
                }
                *left -= 1;
            }
        }
        let v = self.volumes.get_mut(&volume).expect("it exists");
        match v.layers.last_mut() {
            Some(layer) => layer.cursor = cursor,
            None => v.cursor = cursor,
        }
        Ok(())
    }

    /// The places in a chunk that have an entry.
    pub(super) fn indexes(&mut self, key: Key) -> Result<SmallVec<[u8; 64]>, PoolError> {
        let mut out: SmallVec<[u8; 64]> = self.chunk(key)?.extents().iter().map(|e| e.index).collect();
        out.dedup();
        Ok(out)
    }
}
