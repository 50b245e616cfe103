//! Moving what lives on a draining device to other devices, some segments at a time.
//!
//! A relocation is not journaled, because where a block lies is no part of the state that is replicated. It is made in
//! three steps, in the place of an apply job: plan (under the lock), copy (without it, while nothing is written to its
//! place), finish (under the lock). The copy has the place and the slots of the original, so writes go on as they would
//! have gone on there. After a crash the map is that of the last checkpoint, and the original is still there: quarantine
//! holds it until a checkpoint covers that it was left.
//!
//! A block that does not match its checksum is copied with the checksum it has, and one that cannot be read with a
//! checksum that does not match: damage stays damage.

use std::io;

use super::{
    Owned, OwnedPlace, Pool, PoolError, PoolIo,
    device::Device,
    io::{SLOT, mix},
    layers::locate,
};
use crate::{checksum::crc32c, mutant::Mutant, types::SegmentId};

/// One segment on its way to another device.
#[derive(Debug, Clone, Copy)]
struct Move {
    /// The slots that have an owner.
    owned: Owned,
    to: SegmentId,
}

/// A block version that was damaged before it was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MovedDamage {
    /// Whose it is, and where it lies now.
    pub owned: Owned,
    /// Its number in the volume.
    pub block: u64,
}

/// Some segments that are to be copied, and then finished by [`Pool::finish_relocation`].
#[must_use]
pub struct Relocation {
    io: PoolIo,
    moves: Vec<Move>,
    damaged: Vec<MovedDamage>,
}

impl Relocation {
    /// How many segments.
    #[must_use]
    pub fn segments(&self) -> u64 {
        self.moves.len() as u64
    }

    /// Bytes that are read, and written.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.moves.iter().map(|m| m.owned.bytes()).sum()
    }

    /// What was found to be damaged, where it lies now.
    #[must_use]
    pub fn damaged(&self) -> &[MovedDamage] {
        &self.damaged
    }

    /// Copies. Nothing else may write to the place of a block meanwhile.
    ///
    /// # Errors
    /// As [`PoolIo::perform`]. What cannot be read is no error.
    pub fn run(&mut self) -> io::Result<()> {
        let mut buffer = Vec::new();
        for m in &self.moves {
            let bad = self.io.copy(&m.owned, m.to, &mut buffer)?;
            let owned = Owned { segment: m.to, ..m.owned };
            self.damaged.extend(bad.into_iter().map(|block| MovedDamage { owned, block }));
        }
        Ok(())
    }
}

impl PoolIo {
    /// Copies the owned slots of a segment to the same slots of `to`. Returns the blocks that are damaged.
    fn copy(&self, owned: &Owned, to: SegmentId, buffer: &mut Vec<u8>) -> io::Result<Vec<u64>> {
        let (source, target) = (self.device(owned.segment)?, self.device(to)?);
        let block_bytes = owned.block_size.bytes() as usize;
        let mut stored = [0; SLOT];
        let slots = source.file.read_exact_at(&mut stored, source.layout.slot_offset(owned.segment.index()));
        let mut slot = [0; SLOT];
        let mut bad = Vec::new();
        self.guarded(|| {
            for (first, count) in owned.runs() {
                let at = (first - owned.base) * block_bytes as u64;
                buffer.clear();
                buffer.resize(usize::try_from(count).expect("within a segment") * block_bytes, 0);
                let lost = read_blocks(&source, owned.segment, at, block_bytes, buffer);
                for (n, block) in (first..first + count).enumerate() {
                    let data = &buffer[n * block_bytes..(n + 1) * block_bytes];
                    let sealed = crc32c(data) ^ mix(owned.volume, block);
                    let place = 4 * usize::try_from(block - owned.base).expect("within a segment");
                    let kept = u32::from_le_bytes(stored[place..place + 4].try_into().expect("4 bytes"));
                    let unknown = lost.contains(&n) || slots.is_err();
                    let seal = if unknown { !sealed } else { kept };
                    if seal != sealed {
                        bad.push(block);
                    }
                    let seal = if Mutant::RelocateMendsDamage.on() { sealed } else { seal };
                    slot[place..place + 4].copy_from_slice(&seal.to_le_bytes());
                }
                target.file.write_all_at(buffer, target.layout.data_offset(to.index()) + at)?;
            }
            target.file.write_all_at(&slot, target.layout.slot_offset(to.index()))?;
            target.mark_dirty();
            Ok(())
        })?;
        Ok(bad)
    }
}

/// Fills `out`, and says which blocks of it could not be read: those are zeros.
fn read_blocks(device: &Device, segment: SegmentId, at: u64, block_bytes: usize, out: &mut [u8]) -> Vec<usize> {
    let offset = device.layout.data_offset(segment.index()) + at;
    if device.file.read_exact_at(out, offset).is_ok() {
        return Vec::new();
    }
    let mut lost = Vec::new();
    for (n, block) in out.chunks_exact_mut(block_bytes).enumerate() {
        if device.file.read_exact_at(block, offset + (n * block_bytes) as u64).is_err() {
            block.fill(0);
            lost.push(n);
        }
    }
    lost
}

impl Pool {
    /// The next segments of draining devices that are to be moved, at most `max`. `None` where nothing is to be moved
    /// now: there is nothing, or this part of the walk has none, or there is no room, which [`Pool::lacks_room`] tells.
    ///
    /// # Errors
    /// The catalogue cannot be read, or is damaged.
    pub fn plan_relocation(&mut self, max: usize) -> Result<Option<Relocation>, PoolError> {
        self.lacks_room = false;
        if !self.has_live_on_draining() {
            return Ok(None);
        }
        let Some((found, next)) = self.owned_from(self.relocating, None)? else {
            // What was handed to a layer that had been passed by is found in the next walk.
            self.relocating = OwnedPlace::default();
            return Ok(None);
        };
        let mut sources: Vec<Owned> = Vec::new();
        for owned in found {
            let there = sources.iter().any(|other| other.segment == owned.segment);
            if self.is_draining(owned.segment) && !there {
                sources.push(owned);
            }
        }
        let all = sources.len() <= max;
        sources.truncate(max);
        if sources.is_empty() {
            self.relocating = next;
            return Ok(None);
        }
        let count = sources.len() as u64;
        // Space that is promised to writes is not taken.
        let reserved = self.space.reserve(count);
        let targets = match &reserved {
            Ok(_) => self.segments.allocate_unreferenced(count),
            Err(lack) => Err(*lack),
        };
        let Ok(targets) = targets else {
            self.lacks_room = true;
            return Ok(None);
        };
        let mut moves = Vec::with_capacity(sources.len());
        for (mut owned, to) in sources.into_iter().zip(targets) {
            owned.blocks = self.owned_slots(&owned)?;
            moves.push(Move { owned, to });
        }
        if all {
            self.relocating = next;
        }
        Ok(Some(Relocation { io: self.io.clone(), moves, damaged: Vec::new() }))
    }

    /// Points every owner of what was copied to the copy. The originals go to quarantine.
    ///
    /// # Errors
    /// The catalogue cannot be read, or is damaged.
    pub fn finish_relocation(&mut self, done: &Relocation) -> Result<(), PoolError> {
        for Move { owned, to } in &done.moves {
            // Layers may have handed versions to each other meanwhile, or freed them; nobody took new ones.
            for (tree, vseg) in self.trees_of(owned) {
                let (key, index) = locate(tree, vseg);
                if self.chunk(key)?.entry(index).iter().any(|e| e.segment == owned.segment) {
                    self.change(key)?.move_segment(owned.segment, *to);
                }
                if Mutant::RelocateForgetsOwner.on() {
                    break;
                }
            }
            self.segments.transfer(owned.segment, *to)?;
        }
        Ok(())
    }

    /// True if the last plan found no room for what is to be moved.
    #[must_use]
    pub fn lacks_room(&self) -> bool {
        self.lacks_room
    }

    fn is_draining(&self, segment: SegmentId) -> bool {
        self.standing(segment.device()) == Some(super::DeviceStanding::Draining)
    }

    fn has_live_on_draining(&self) -> bool {
        let mut members = (0..).zip(&self.members);
        members.any(|(number, member)| {
            member.standing == super::DeviceStanding::Draining && self.segments.device_counts(number).live > 0
        })
    }

    /// Every slot of a segment that any layer owns.
    fn owned_slots(&mut self, owned: &Owned) -> Result<u128, PoolError> {
        let mut slots = 0;
        for (tree, vseg) in self.trees_of(owned) {
            let (key, index) = locate(tree, vseg);
            let entry = self.chunk(key)?.entry(index);
            slots |= entry.iter().filter(|e| e.segment == owned.segment).fold(0, |mask, e| mask | e.owned);
        }
        Ok(slots)
    }

    /// The maps in which a segment may be listed, and the virtual segment. None for a volume that is gone.
    fn trees_of(&self, owned: &Owned) -> Vec<(u64, u64)> {
        let Some(volume) = self.volumes.get(&owned.volume) else { return Vec::new() };
        let vseg = owned.base / u64::from(volume.spec.blocks_per_segment());
        volume.layers.iter().map(|layer| layer.tree).chain([volume.head]).map(|tree| (tree, vseg)).collect()
    }
}
