//! What snapshots hold, and how two images of a volume differ: both are read off the maps.

use super::{
    Pool, PoolError,
    chunk::{CHUNK_SEGMENTS, HOLE},
    map::Key,
    volumes::LayerState,
    write::runs,
};
use crate::types::{BlockRange, LayerId, VolumeId};

/// [`CHUNK_SEGMENTS`], as the length of an array.
const PLACES: usize = 64;
const _: () = assert!(PLACES as u64 == CHUNK_SEGMENTS);

impl Pool {
    /// Blocks from `first` on that have another version in snapshot `base` than in the newer snapshot `target`, or the
    /// head. Looks at up to `max_chunks` chunks; the second value is where to go on.
    ///
    /// A layer owns what was displaced while it was the newest: so the difference is what the layers from `base` on, and
    /// before `target`, own. What goes back to the head, or is handed to an older layer, still counts.
    ///
    /// # Errors
    /// The volume or a snapshot does not exist, `target` is not newer, or the catalogue fails.
    pub fn changed_blocks(
        &mut self,
        volume: VolumeId,
        base: LayerId,
        target: Option<LayerId>,
        first: u64,
        max_chunks: usize,
    ) -> Result<(Vec<BlockRange>, Option<u64>), PoolError> {
        let v = self.volume(volume)?;
        let place = |id: LayerId| {
            let at = v.layers.iter().position(|l| l.id == id && l.state == LayerState::Live);
            at.ok_or(PoolError::NoSnapshot(id))
        };
        let (from, to) = (place(base)?, target.map_or(Ok(v.layers.len()), place)?);
        if from > to {
            return Err(PoolError::NoSnapshot(target.unwrap_or(base)));
        }
        let trees: Vec<u64> = v.layers[from..to].iter().map(|l| l.tree).collect();
        let (per, blocks) = (u64::from(v.spec.blocks_per_segment()), v.spec.block_count());
        let chunk_of = |block: u64| u32::try_from(block / per / CHUNK_SEGMENTS).expect("volumes are that small");
        let mut out: Vec<BlockRange> = Vec::new();
        let mut next = chunk_of(first);
        for _ in 0..max_chunks {
            let mut chunk: Option<u32> = None;
            for tree in &trees {
                let found = self.map.next(*tree, next, chunk.unwrap_or(u32::MAX))?;
                chunk = [chunk, found].into_iter().flatten().min();
            }
            let Some(chunk) = chunk else { return Ok((out, None)) };
            let mut owned = [0_u128; PLACES];
            for tree in &trees {
                for e in self.chunk(Key { tree: *tree, chunk })?.extents() {
                    owned[usize::from(e.index)] |= e.owned;
                }
            }
            for (index, mask) in owned.iter().enumerate() {
                let start = (u64::from(chunk) * CHUNK_SEGMENTS + index as u64) * per;
                for (at, count) in runs(*mask) {
                    // What was cut off the volume since is not there to differ.
                    let (at, end) = ((start + u64::from(at)).max(first), (start + u64::from(at + count)).min(blocks));
                    match out.last_mut() {
                        _ if at >= end => {}
                        Some(last) if last.end() == at => last.count += end - at,
                        _ => out.push(BlockRange { volume, first: at, count: end - at }),
                    }
                }
            }
            next = chunk + 1;
        }
        Ok((out, Some(u64::from(next) * CHUNK_SEGMENTS * per)))
    }

    /// Block versions that a snapshot owns, in up to `max_chunks` chunks from `from` on; the second value is where to
    /// go on.
    ///
    /// # Errors
    /// The volume or snapshot does not exist, or the catalogue fails.
    pub fn held_blocks(
        &mut self,
        volume: VolumeId,
        layer: LayerId,
        from: u32,
        max_chunks: usize,
    ) -> Result<(u64, Option<u32>), PoolError> {
        let v = self.volume(volume)?;
        let found = v.layers.iter().find(|l| l.id == layer && l.state == LayerState::Live);
        let tree = found.ok_or(PoolError::NoSnapshot(layer))?.tree;
        let (mut blocks, mut next) = (0, from);
        for _ in 0..max_chunks {
            let Some(chunk) = self.map.next(tree, next, u32::MAX)? else { return Ok((blocks, None)) };
            let extents = self.chunk(Key { tree, chunk })?.extents();
            blocks +=
                extents.iter().filter(|e| e.segment != HOLE).map(|e| u64::from(e.owned.count_ones())).sum::<u64>();
            next = chunk + 1;
        }
        Ok((blocks, Some(next)))
    }
}
