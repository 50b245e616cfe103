//! A chunk of a segment map: the extents of 64 consecutive virtual segments of one layer, and its byte form.
//!
//! Invariants: extents are sorted by virtual segment; within one, no segment appears twice, no block has two owners,
//! `owned` is not empty and is part of `used`.

use crate::{checksum::crc32c_parts, types::SegmentId};

/// Virtual segments in a chunk.
pub(super) const CHUNK_SEGMENTS: u64 = 64;
/// The place of a block version that reads as zeros: a snapshot owns it where the head allocated later.
pub(super) const HOLE: SegmentId = SegmentId(u64::MAX);

const VERSION: u8 = 1;
const HEADER: usize = 8;
const FLAG_HOLE: u8 = 1;
const FLAG_USED: u8 = 2;

/// What a layer has of one virtual segment in one physical segment. Bit `n` stands for block `n` of the segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// Virtual segment within the chunk, below 64.
    pub index: u8,
    /// Where, or [`HOLE`].
    pub segment: SegmentId,
    /// Blocks whose version here belongs to the layer. Never empty.
    pub owned: u128,
    /// Slots not proven to be reusable. Of meaning in a head only; elsewhere equal to `owned`.
    pub used: u128,
}

/// Slots of a segment listed in the head that lost their owner at `stamp`. In memory only: after a restart the
/// checkpoint that was loaded covers them, and nobody reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Freed {
    segment: SegmentId,
    mask: u128,
    stamp: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Chunk {
    extents: Vec<Extent>,
    freed: Vec<Freed>,
}

impl Chunk {
    pub(super) fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Memory it takes, in bytes.
    pub(super) fn weight(&self) -> usize {
        128 + self.extents.capacity() * size_of::<Extent>() + self.freed.capacity() * size_of::<Freed>()
    }

    fn range(&self, index: u8) -> std::ops::Range<usize> {
        let start = self.extents.partition_point(|e| e.index < index);
        let len = self.extents[start..].iter().take_while(|e| e.index == index).count();
        start..start + len
    }

    pub(super) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    pub(super) fn entry(&self, index: u8) -> &[Extent] {
        &self.extents[self.range(index)]
    }

    /// Blocks of which the layer owns a version.
    pub(super) fn owned(&self, index: u8) -> u128 {
        self.entry(index).iter().fold(0, |mask, e| mask | e.owned)
    }

    /// Replaces an entry; extents that own nothing are left out, and what was known of their segments' slots too.
    pub(super) fn set_entry(&mut self, index: u8, entry: &[Extent]) {
        let range = self.range(index);
        if !self.freed.is_empty() {
            let gone = |s: SegmentId| !entry.iter().any(|e| e.segment == s && e.owned != 0);
            let old = &self.extents[range.clone()];
            self.freed.retain(|f| !(gone(f.segment) && old.iter().any(|e| e.segment == f.segment)));
        }
        self.extents.splice(range, entry.iter().filter(|e| e.owned != 0).copied());
    }

    /// Adds ownership to an entry. With `used`, to all of what may have been written in the segment if it is new here.
    pub(super) fn add(&mut self, index: u8, segment: SegmentId, owned: u128, used: u128) {
        let range = self.range(index);
        if let Some(e) = self.extents[range.clone()].iter_mut().find(|e| e.segment == segment) {
            debug_assert_eq!(e.owned & owned, 0, "a block version has one owner");
            e.owned |= owned;
            e.used |= owned;
        } else {
            self.extents.insert(range.end, Extent { index, segment, owned, used: used | owned });
        }
    }

    /// Everything that lies in `from` lies in `to` now, and what is known of slots of `from` is known of `to`.
    pub(super) fn move_segment(&mut self, from: SegmentId, to: SegmentId) {
        self.extents.iter_mut().filter(|e| e.segment == from).for_each(|e| e.segment = to);
        self.freed.iter_mut().filter(|f| f.segment == from).for_each(|f| f.segment = to);
    }

    /// Notes that slots of a listed segment lost their owner. Not listed: nothing to remember.
    pub(super) fn note_freed(&mut self, index: u8, segment: SegmentId, mask: u128, stamp: u64) {
        if !self.entry(index).iter().any(|e| e.segment == segment) {
            return;
        }
        match self.freed.iter_mut().find(|f| f.segment == segment && f.stamp == stamp) {
            Some(f) => f.mask |= mask,
            None => self.freed.push(Freed { segment, mask, stamp }),
        }
    }

    /// True if [`Chunk::reclaim`] would change something.
    pub(super) fn can_reclaim(&self, horizon: u64) -> bool {
        self.freed.iter().any(|f| f.stamp < horizon)
    }

    /// Makes slots freed before `horizon` reusable.
    pub(super) fn reclaim(&mut self, horizon: u64) {
        let extents = &mut self.extents;
        self.freed.retain(|f| {
            if f.stamp >= horizon {
                return true;
            }
            // Not `find` by entry: a segment belongs to one virtual segment.
            if let Some(e) = extents.iter_mut().find(|e| e.segment == f.segment) {
                debug_assert_eq!(e.owned & f.mask, 0, "a freed slot has no owner");
                e.used &= !f.mask;
            }
            false
        });
    }

    /// True if forgetting what is only known in memory would make a slot reusable too early.
    pub(super) fn must_stay(&self, horizon: u64) -> bool {
        self.freed.iter().any(|f| f.stamp >= horizon)
    }

    fn unproven(&self, segment: SegmentId) -> u128 {
        self.freed.iter().filter(|f| f.segment == segment).fold(0, |m, f| m | f.mask)
    }

    /// The byte form of `docs/formats.md`, "Map chunk". Freed slots are written as reusable: the blob is part of the
    /// checkpoint that covers their free.
    pub(super) fn encode(&self, tree: u64, chunk: u32) -> Vec<u8> {
        let widest = self.extents.iter().fold(0, |m, e| m | e.used);
        let mask_bytes = [1_u8, 2, 4, 8].into_iter().find(|n| widest >> (8 * n) == 0).unwrap_or(16);
        let mut out = Vec::with_capacity(HEADER + self.extents.len() * (10 + 2 * usize::from(mask_bytes)));
        out.extend_from_slice(&[0, 0, 0, 0, VERSION, mask_bytes]);
        let count = u16::try_from(self.extents.len()).expect("64 segments of at most 128 blocks");
        out.extend_from_slice(&count.to_le_bytes());
        for e in &self.extents {
            let used = e.used & !self.unproven(e.segment);
            let hole = if e.segment == HOLE { FLAG_HOLE } else { 0 };
            let more = if used == e.owned { 0 } else { FLAG_USED };
            out.extend_from_slice(&[e.index, hole | more]);
            if hole == 0 {
                out.extend_from_slice(&e.segment.0.to_le_bytes());
            }
            out.extend_from_slice(&e.owned.to_le_bytes()[..usize::from(mask_bytes)]);
            if more != 0 {
                out.extend_from_slice(&used.to_le_bytes()[..usize::from(mask_bytes)]);
            }
        }
        let crc = seal(tree, chunk, &out[4..]);
        out[..4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads the byte form; `Err` says what is wrong.
    pub(super) fn decode(tree: u64, chunk: u32, blob: &[u8]) -> Result<Self, &'static str> {
        let (crc, body) = blob.split_first_chunk::<4>().ok_or("too short")?;
        if u32::from_le_bytes(*crc) != seal(tree, chunk, body) {
            return Err("bad checksum");
        }
        let (header, mut rest) = body.split_first_chunk::<4>().ok_or("too short")?;
        let [version, mask_bytes, count @ ..] = *header;
        if version != VERSION {
            return Err("unknown version");
        }
        if !matches!(mask_bytes, 1 | 2 | 4 | 8 | 16) {
            return Err("bad width of masks");
        }
        let mut out = Self::default();
        for _ in 0..u16::from_le_bytes(count) {
            let [index, flags] = *take::<2>(&mut rest)?;
            if u64::from(index) >= CHUNK_SEGMENTS || flags & !(FLAG_HOLE | FLAG_USED) != 0 {
                return Err("bad extent");
            }
            let segment =
                if flags & FLAG_HOLE == 0 { SegmentId(u64::from_le_bytes(*take::<8>(&mut rest)?)) } else { HOLE };
            let owned = take_mask(&mut rest, mask_bytes)?;
            let used = if flags & FLAG_USED == 0 { owned } else { take_mask(&mut rest, mask_bytes)? };
            if owned == 0 || owned & !used != 0 || out.extents.last().is_some_and(|e| e.index > index) {
                return Err("bad extent");
            }
            let twice = |e: &Extent| e.segment == segment || e.owned & owned != 0;
            if out.entry(index).iter().any(twice) {
                return Err("a block with two owners");
            }
            out.extents.push(Extent { index, segment, owned, used });
        }
        if rest.is_empty() { Ok(out) } else { Err("too long") }
    }
}

/// The checksum covers the key, so that a blob under another key is noticed.
fn seal(tree: u64, chunk: u32, body: &[u8]) -> u32 {
    crc32c_parts(&[&tree.to_le_bytes(), &chunk.to_le_bytes(), body])
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Result<&'a [u8; N], &'static str> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or("too short")?;
    *rest = tail;
    Ok(head)
}

fn take_mask(rest: &mut &[u8], bytes: u8) -> Result<u128, &'static str> {
    let (head, tail) = rest.split_at_checked(usize::from(bytes)).ok_or("too short")?;
    *rest = tail;
    let mut wide = [0; 16];
    wide[..head.len()].copy_from_slice(head);
    Ok(u128::from_le_bytes(wide))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Chunk {
        let mut chunk = Chunk::default();
        chunk.add(0, SegmentId::new(1, 7), 0x00ff, 0x0fff);
        chunk.add(0, HOLE, 0xff00, 0);
        chunk.add(63, SegmentId(5), 1, 0);
        chunk
    }

    #[test]
    fn golden_bytes() {
        let blob = sample().encode(3, 9);
        let want = [
            0x12, 0x34, 0x56, 0x78, 1, 2, 3, 0, // checksum, version, bytes of a mask, extents
            0, 2, 7, 0, 0, 0, 0, 0, 1, 0, 0xff, 0, 0xff, 0x0f, // segment 7 of device 1
            0, 1, 0, 0xff, // hole
            63, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1, 0,
        ];
        assert_eq!(blob[4..], want[4..]);
        assert_eq!(blob[..4], crc32c_parts(&[&3_u64.to_le_bytes(), &9_u32.to_le_bytes(), &want[4..]]).to_le_bytes());
        assert_eq!(Chunk::decode(3, 9, &blob).unwrap(), sample());
    }

    #[test]
    fn every_flipped_bit_and_a_foreign_key_are_detected() {
        let blob = sample().encode(3, 9);
        assert!(Chunk::decode(3, 8, &blob).is_err());
        assert!(Chunk::decode(2, 9, &blob).is_err());
        for bit in 0..blob.len() * 8 {
            let mut bad = blob.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Chunk::decode(3, 9, &bad).is_err(), "bit {bit}");
        }
        for len in 0..blob.len() {
            assert!(Chunk::decode(3, 9, &blob[..len]).is_err());
        }
    }

    #[test]
    fn a_freed_slot_is_reusable_behind_the_horizon_only() {
        let mut chunk = Chunk::default();
        chunk.add(4, SegmentId(5), 0b01, 0b11);
        chunk.note_freed(4, SegmentId(5), 0b10, 8);
        assert!(chunk.must_stay(8) && !chunk.can_reclaim(8));
        chunk.reclaim(8);
        assert_eq!(chunk.entry(4)[0].used, 0b11);
        assert_eq!(Chunk::decode(0, 0, &chunk.encode(0, 0)).unwrap().entry(4)[0].used, 0b01);
        chunk.reclaim(9);
        assert_eq!(chunk.entry(4)[0].used, 0b01);
        assert!(!chunk.must_stay(8));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            parts in proptest::collection::vec((0_u8..64, 0_u64..4, any::<u128>(), any::<u128>(), 0_u32..128), 0..40),
        ) {
            let mut chunk = Chunk::default();
            for (index, segment, owned, used, shift) in parts {
                let (owned, used) = (owned >> shift, used >> shift);
                let owned = owned & !chunk.owned(index);
                if owned != 0 {
                    let segment = if segment == 3 { HOLE } else { SegmentId::new(2, u64::from(index) * 4 + segment) };
                    chunk.add(index, segment, owned, if segment == HOLE { 0 } else { used });
                }
            }
            prop_assert_eq!(Chunk::decode(1, 2, &chunk.encode(1, 2)), Ok(chunk));
        }

        #[test]
        fn any_bytes_are_refused_or_valid(mut body in proptest::collection::vec(any::<u8>(), 4..80)) {
            body[0] = VERSION;
            let mut blob = seal(1, 2, &body).to_le_bytes().to_vec();
            blob.extend_from_slice(&body);
            if let Ok(chunk) = Chunk::decode(1, 2, &blob) {
                prop_assert_eq!(Chunk::decode(1, 2, &chunk.encode(1, 2)), Ok(chunk));
            }
        }
    }
}
