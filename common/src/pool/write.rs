//! Where a write goes.
//!
//! In place, if the head owns the block, the newest snapshot does not see this version, and no record refers to the
//! segment. Else the old version stays where it is - it passes to the snapshot that sees it, or is freed - and the new
//! one goes to a slot of another of the head's segments that is proven to be unused, else to a fresh segment. So at most
//! one segment is allocated for each virtual segment that a write touches.

use bytes::Bytes;
use smallvec::SmallVec;

use super::{
    NoSpace, Pool, PoolError,
    chunk::{CHUNK_SEGMENTS, Extent, HOLE},
    io::{IoPlan, PlannedWrite, mix},
    layers::{Entry, locate},
    map::Key,
};
use crate::types::{BlockRange, SegmentId, VolumeId};

/// Slots for blocks: a segment and the mask of blocks in it.
type Places = SmallVec<[(SegmentId, u128); 4]>;

/// What is to happen to some blocks of one virtual segment.
struct Placement {
    /// Written over their old version.
    in_place: Places,
    /// Written to unused slots of listed segments.
    beside: Places,
    /// Written to a fresh segment.
    fresh: u128,
    /// Blocks whose present version the newest snapshot sees.
    seen: u128,
    entry: Entry,
}

/// One virtual segment's share of a range.
pub(super) struct Share {
    pub vseg: u64,
    /// First block within the virtual segment.
    pub first: u32,
    pub count: u32,
}

impl Share {
    pub(super) fn mask(&self) -> u128 {
        mask(self.first, self.count)
    }
}

pub(super) fn mask(first: u32, count: u32) -> u128 {
    if count == 0 { 0 } else { u128::MAX >> (128 - count) << first }
}

/// Cuts a range at the boundaries of virtual segments.
pub(super) fn shares(first: u64, count: u64, blocks_per_segment: u32) -> impl Iterator<Item = Share> {
    let per = u64::from(blocks_per_segment);
    let end = first + count;
    let mut at = first;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let stop = end.min((at / per + 1) * per);
            let share = Share { vseg: at / per, first: small(at % per), count: small(stop - at) };
            at = stop;
            share
        })
    })
}

fn small(n: u64) -> u32 {
    u32::try_from(n).expect("a number of blocks within a segment")
}

impl Pool {
    /// Places whole blocks: changes the map at once and appends the device writes to `plan`. `raw_crcs` has the CRC32C
    /// of each block. Until the plan is performed, readers must not be shown these blocks from the devices.
    ///
    /// # Errors
    /// The volume or the range does not exist; no space, which a reservation of one segment for each virtual segment
    /// touched rules out; or the catalogue fails.
    ///
    /// # Panics
    /// If `data` is not whole blocks, one for each of `raw_crcs`.
    pub fn plan_write(
        &mut self,
        volume: VolumeId,
        first_block: u64,
        data: &Bytes,
        raw_crcs: &[u32],
        plan: &mut IoPlan,
    ) -> Result<(), PoolError> {
        let (per, block) = self.check_range(volume, first_block, raw_crcs.len() as u64)?;
        assert_eq!(data.len(), raw_crcs.len() * block, "whole blocks, each with its checksum");
        let mut done = 0;
        for share in shares(first_block, raw_crcs.len() as u64, per) {
            let placement = self.place(volume, share.vseg, share.mask())?;
            let places = self.carry_out(volume, share.vseg, share.mask(), placement)?;
            for (segment, blocks) in places {
                for (start, count) in runs(blocks) {
                    let from = done + (start - share.first) as usize;
                    let to = from + count as usize;
                    let number = first_block + from as u64;
                    let crcs = (number..).zip(&raw_crcs[from..to]).map(|(b, crc)| crc ^ mix(volume, b)).collect();
                    plan.push(PlannedWrite { segment, first: start, data: data.slice(from * block..to * block), crcs });
                }
            }
            done += share.count as usize;
        }
        Ok(())
    }

    /// Makes whole blocks read as zeros. Takes time in proportion to what is allocated in the range.
    ///
    /// # Errors
    /// The volume or the range does not exist, or the catalogue fails.
    pub fn plan_zero(&mut self, volume: VolumeId, first_block: u64, count: u64) -> Result<(), PoolError> {
        let (per, _) = self.check_range(volume, first_block, count)?;
        let (first, last) = (first_block / u64::from(per), (first_block + count - 1) / u64::from(per));
        let chunk_of = |vseg: u64| u32::try_from(vseg / CHUNK_SEGMENTS).expect("volumes are that small");
        let mut from = chunk_of(first);
        while let Some(chunk) = self.next_of_head(volume, from, chunk_of(last))? {
            let mut indexes: SmallVec<[u8; 64]> = SmallVec::new();
            for tree in self.head_trees(volume) {
                indexes.extend(self.indexes(Key { tree, chunk })?);
            }
            indexes.sort_unstable();
            indexes.dedup();
            for index in indexes {
                let vseg = u64::from(chunk) * CHUNK_SEGMENTS + u64::from(index);
                let start = first_block.saturating_sub(vseg * u64::from(per)).min(u64::from(per));
                let stop = (first_block + count).saturating_sub(vseg * u64::from(per)).min(u64::from(per));
                if start < stop {
                    self.zero(volume, vseg, mask(small(start), small(stop - start)))?;
                }
            }
            from = chunk + 1;
        }
        Ok(())
    }

    /// Allocates whole segments for a record that will refer to them. The caller writes them through
    /// [`super::PoolIo::write_reference`], syncs, pins them and journals the record, or gives them back with
    /// [`Pool::release_unreferenced`]. It holds a reservation of `count`.
    ///
    /// # Errors
    /// Fewer than `count` are free; none is taken.
    pub fn allocate_reference(&mut self, count: u64) -> Result<Vec<SegmentId>, NoSpace> {
        self.segments.allocate_unreferenced(count)
    }

    /// Gives back segments of [`Pool::allocate_reference`] whose record was not journaled.
    ///
    /// # Errors
    /// A segment is not one of those.
    pub fn release_unreferenced(&mut self, segments: &[SegmentId]) -> Result<(), PoolError> {
        segments.iter().try_for_each(|id| self.segments.release_unreferenced(*id))
    }

    /// Makes `segments` the place of the blocks from `first_block`, which starts a segment; the last segment may be cut
    /// by the end of the volume. In replay, segments that the checkpoint has as free are taken.
    ///
    /// # Errors
    /// The volume or range does not exist, a segment is in use, or the catalogue fails.
    pub fn plan_reference(
        &mut self,
        volume: VolumeId,
        first_block: u64,
        segments: &[SegmentId],
    ) -> Result<(), PoolError> {
        let spec = &self.volume(volume)?.spec;
        let (per, blocks) = (spec.blocks_per_segment(), spec.block_count());
        let count = (segments.len() as u64 * u64::from(per)).min(blocks.saturating_sub(first_block));
        let aligned = first_block.is_multiple_of(u64::from(per));
        if !aligned || count.div_ceil(u64::from(per)) != segments.len() as u64 {
            return Err(PoolError::Range { volume, first: first_block, count, blocks });
        }
        self.check_range(volume, first_block, count)?;
        for (share, segment) in shares(first_block, count, per).zip(segments) {
            self.segments.reference(*segment)?;
            self.settle(volume, share.vseg)?;
            let (seen, entry) = self.head_entry(volume, share.vseg)?;
            let placement = Placement { in_place: Places::new(), beside: Places::new(), fresh: 0, seen, entry };
            self.carry_out_with(volume, share.vseg, share.mask(), placement, Some((*segment, share.mask())))?;
        }
        Ok(())
    }

    /// Keeps a segment from being written or freed for the sake of a journal record that refers to it. Counted.
    pub fn pin(&mut self, segment: SegmentId) {
        self.segments.pin(segment);
    }

    /// Undoes one [`Pool::pin`]. The last one leaves the segment protected until the next checkpoint is durable.
    pub fn unpin(&mut self, segment: SegmentId) {
        self.segments.unpin(segment);
    }

    /// How many segments a write of this range would allocate if it were planned now.
    ///
    /// # Errors
    /// The volume or the range does not exist, or the catalogue fails.
    pub fn allocation_need(&mut self, range: BlockRange) -> Result<u64, PoolError> {
        let (per, _) = self.check_range(range.volume, range.first, range.count)?;
        let mut need = 0;
        for share in shares(range.first, range.count, per) {
            need += u64::from(self.place(range.volume, share.vseg, share.mask())?.fresh != 0);
        }
        Ok(need)
    }

    /// True if a write of this range will need no segment, also behind writes of other blocks that are `pending` in the same
    /// virtual segments: those may take a segment off the head's list beside whose blocks it would go.
    ///
    /// # Errors
    /// The volume or the range does not exist, or the catalogue fails.
    pub fn fits(&mut self, range: BlockRange, pending: bool) -> Result<bool, PoolError> {
        let (per, _) = self.check_range(range.volume, range.first, range.count)?;
        for share in shares(range.first, range.count, per) {
            let placement = self.place(range.volume, share.vseg, share.mask())?;
            if placement.fresh != 0 || pending && !placement.beside.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Blocks in a segment and bytes in a block of the volume.
    pub(super) fn check_range(&self, volume: VolumeId, first: u64, count: u64) -> Result<(u32, usize), PoolError> {
        let spec = &self.volume(volume)?.spec;
        let blocks = spec.block_count();
        if count == 0 || first.checked_add(count).is_none_or(|end| end > blocks) {
            return Err(PoolError::Range { volume, first, count, blocks });
        }
        Ok((spec.blocks_per_segment(), spec.block_size.bytes() as usize))
    }

    /// The head's entry, and the blocks whose present version the newest snapshot sees.
    fn head_entry(&mut self, volume: VolumeId, vseg: u64) -> Result<(u128, Entry), PoolError> {
        let v = &self.volumes[&volume];
        let (head, newest) = (v.head, v.newest());
        let seen = match newest {
            Some(tree) => {
                let (key, index) = locate(tree, vseg);
                !self.chunk(key)?.owned(index)
            }
            None => 0,
        };
        let (key, index) = locate(head, vseg);
        let horizon = self.segments.horizon();
        if self.chunk(key)?.can_reclaim(horizon) {
            self.change(key)?.reclaim(horizon);
        }
        Ok((seen, Entry::from_slice(self.chunk(key)?.entry(index))))
    }

    /// Decides; changes nothing that can be seen.
    fn place(&mut self, volume: VolumeId, vseg: u64, blocks: u128) -> Result<Placement, PoolError> {
        self.settle(volume, vseg)?;
        let (seen, entry) = self.head_entry(volume, vseg)?;
        let (mut in_place, mut beside) = (Places::new(), Places::new());
        let mut left = blocks;
        for e in &entry {
            let here = e.owned & blocks & !seen;
            if here != 0 && !self.segments.is_pinned(e.segment) {
                in_place.push((e.segment, here));
                left &= !here;
            }
        }
        let moved = left;
        for e in &entry {
            // What owns nothing afterwards leaves the list, and its segment may be free.
            let here = left & !e.used;
            if here != 0 && e.owned & !moved != 0 && !self.segments.is_pinned(e.segment) {
                beside.push((e.segment, here));
                left &= !here;
            }
        }
        Ok(Placement { in_place, beside, fresh: left, seen, entry })
    }

    /// Carries out a placement; returns where to write each block.
    fn carry_out(
        &mut self,
        volume: VolumeId,
        vseg: u64,
        blocks: u128,
        placement: Placement,
    ) -> Result<Places, PoolError> {
        let stay = placement.in_place.iter().fold(0, |mask, (_, m)| mask | m);
        let mut places = placement.in_place.clone();
        if stay == blocks {
            return Ok(places);
        }
        let fresh = match placement.fresh {
            0 => None,
            mask => Some((self.segments.allocate()?, mask)),
        };
        places.extend(placement.beside.iter().copied().chain(fresh));
        self.carry_out_with(volume, vseg, blocks & !stay, placement, fresh)?;
        Ok(places)
    }

    /// Displaces the present versions of `moved` and makes the head own the new ones.
    fn carry_out_with(
        &mut self,
        volume: VolumeId,
        vseg: u64,
        moved: u128,
        placement: Placement,
        fresh: Option<(SegmentId, u128)>,
    ) -> Result<(), PoolError> {
        let Placement { beside, seen, mut entry, .. } = placement;
        let mut displaced = Places::new();
        for e in &mut entry {
            if e.owned & moved != 0 {
                displaced.push((e.segment, e.owned & moved));
                e.owned &= !moved;
            }
        }
        for (segment, slots) in &beside {
            let e = entry.iter_mut().find(|e| e.segment == *segment).expect("it is listed");
            e.owned |= slots;
            e.used |= slots;
            self.segments.claim(*segment, slots.count_ones())?;
        }
        if let Some((segment, slots)) = fresh {
            let index = locate(0, vseg).1;
            entry.push(Extent { index, segment, owned: slots, used: slots });
            self.segments.claim(segment, slots.count_ones())?;
        }
        let head = self.volumes[&volume].head;
        self.set_entry(head, vseg, &entry)?;
        self.hand_over(volume, vseg, moved, seen, &displaced)?;
        Ok(())
    }

    /// Passes versions that the head gave up to the newest snapshot where it sees them, frees the others, and lets the
    /// snapshot own a hole where there was none.
    fn hand_over(
        &mut self,
        volume: VolumeId,
        vseg: u64,
        moved: u128,
        seen: u128,
        displaced: &Places,
    ) -> Result<(), PoolError> {
        let v = &self.volumes[&volume];
        let (head, newest) = (v.head, v.newest());
        let mut holes = moved & seen;
        for (segment, slots) in displaced {
            holes &= !slots;
            if let Some(snapshot) = newest {
                self.give(snapshot, vseg, *segment, slots & seen)?;
            }
            self.free(head, vseg, *segment, slots & !seen)?;
        }
        if let Some(snapshot) = newest {
            self.give(snapshot, vseg, HOLE, holes)?;
        }
        Ok(())
    }

    fn zero(&mut self, volume: VolumeId, vseg: u64, blocks: u128) -> Result<(), PoolError> {
        self.settle(volume, vseg)?;
        let (seen, mut entry) = self.head_entry(volume, vseg)?;
        let mut displaced = Places::new();
        for e in &mut entry {
            if e.owned & blocks != 0 {
                displaced.push((e.segment, e.owned & blocks));
                e.owned &= !blocks;
            }
        }
        if displaced.is_empty() {
            return Ok(());
        }
        let head = self.volumes[&volume].head;
        self.set_entry(head, vseg, &entry)?;
        // No holes for the snapshot: where the head owned nothing it reads as zeros before and after.
        self.hand_over(volume, vseg, 0, seen, &displaced)
    }

    /// The trees that make up the head until all is settled: what goes back to it, oldest first, then its own.
    pub(super) fn head_trees(&self, volume: VolumeId) -> SmallVec<[u64; 4]> {
        let v = &self.volumes[&volume];
        let back = v.layers.iter().filter(|l| l.state == super::volumes::LayerState::RollingBack);
        back.map(|l| l.tree).chain([v.head]).collect()
    }

    fn next_of_head(&self, volume: VolumeId, from: u32, last: u32) -> Result<Option<u32>, PoolError> {
        let mut first = None;
        for tree in self.head_trees(volume) {
            let next = self.map.next(tree, from, first.unwrap_or(last))?;
            first = [first, next].into_iter().flatten().min();
        }
        Ok(first)
    }
}

/// The runs of ones in a mask: first bit and length.
pub(super) fn runs(mut mask: u128) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        (mask != 0).then(|| {
            let start = mask.trailing_zeros();
            let count = (mask >> start).trailing_ones();
            mask &= !self::mask(start, count);
            (start, count)
        })
    })
}
