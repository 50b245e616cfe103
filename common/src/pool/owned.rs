//! Walking over every block version that has an owner, and asking who owns one.

use super::{
    Pool, PoolError,
    chunk::{CHUNK_SEGMENTS, HOLE},
    layers::locate,
    map::Key,
    write::runs,
};
use crate::types::{BlockSize, LayerId, SegmentId, VolumeId};

/// A place in the walk. The walk goes by volume, then by the age of its layers' maps, then by address; a version that the
/// head hands to a new snapshot meanwhile comes later. One that a deleted snapshot hands to an older one may be passed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct OwnedPlace {
    volume: VolumeId,
    tree: u64,
    chunk: u32,
}

/// Block versions of one virtual segment that lie in one segment and have one owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owned {
    /// Whose they are.
    pub volume: VolumeId,
    /// Where they lie.
    pub segment: SegmentId,
    /// Size of a block.
    pub block_size: BlockSize,
    /// First block of the virtual segment.
    pub base: u64,
    /// Which of its blocks.
    pub blocks: u128,
}

impl Owned {
    /// Their size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        u64::from(self.blocks.count_ones()) * u64::from(self.block_size.bytes())
    }

    /// Runs of neighbouring blocks: the first one, as a number in the volume, and how many.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let base = self.base;
        runs(self.blocks).map(move |(first, count)| (base + u64::from(first), u64::from(count)))
    }

    /// One of them alone.
    #[must_use]
    pub fn only(self, block: u64) -> Self {
        Self { blocks: 1 << (block - self.base), ..self }
    }
}

impl OwnedPlace {
    /// As text, for who asks for the next part by it.
    #[must_use]
    pub fn to_token(self) -> String {
        format!("{}.{}.{}", self.volume.0, self.tree, self.chunk)
    }

    /// From such a text.
    #[must_use]
    pub fn from_token(token: &str) -> Option<Self> {
        let mut parts = token.split('.');
        let mut next = || parts.next();
        let (volume, tree, chunk) = (next()?.parse().ok()?, next()?.parse().ok()?, next()?.parse().ok()?);
        next().is_none().then_some(Self { volume: VolumeId(volume), tree, chunk })
    }
}

/// What a layer of a volume has of one virtual segment in one physical segment (Figs. 2A, 2B).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// The volume.
    pub volume: VolumeId,
    /// The virtual segment: with the volume, the identity of the segment.
    pub virtual_segment: u64,
    /// Where it lies.
    pub segment: SegmentId,
    /// The first byte of it on its device.
    pub offset_bytes: u64,
    /// Which of its blocks.
    pub blocks: u128,
    /// The snapshot whose they are; `None` for the head, 0 for one that is going.
    pub layer: Option<LayerId>,
}

/// Who sees a block version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// The head, and maybe snapshots.
    Head,
    /// Snapshots only.
    Snapshot,
}

impl Pool {
    /// The block versions in the next part of the walk, of one volume if `only` says so, and the place behind it. `None` at
    /// the end. Keep a read ticket from before this call on while they are read.
    ///
    /// # Errors
    /// The catalogue cannot be read, or is damaged.
    pub fn owned_from(
        &mut self,
        from: OwnedPlace,
        only: Option<VolumeId>,
    ) -> Result<Option<(Vec<Owned>, OwnedPlace)>, PoolError> {
        let wanted = |id: VolumeId| id >= from.volume && only.is_none_or(|only| only == id);
        let mut volumes: Vec<_> = self.volumes.values().filter(|v| !v.deleting && wanted(v.id())).collect();
        volumes.sort_unstable_by_key(|v| v.id());
        let mut trees: Vec<(VolumeId, u64)> = Vec::new();
        for v in volumes {
            let start = trees.len();
            trees.extend(v.layers.iter().map(|layer| layer.tree).chain([v.head]).map(|tree| (v.id(), tree)));
            trees[start..].sort_unstable();
        }
        for (volume, tree) in trees.into_iter().filter(|place| *place >= (from.volume, from.tree)) {
            let first = if (volume, tree) == (from.volume, from.tree) { from.chunk } else { 0 };
            let Some(chunk) = self.map.next(tree, first, u32::MAX)? else { continue };
            let spec = &self.volumes[&volume].spec;
            let (per, block_size) = (u64::from(spec.blocks_per_segment()), spec.block_size);
            let extents = self.chunk(Key { tree, chunk })?.extents().iter().filter(|e| e.segment != HOLE);
            let owned = extents.map(|e| Owned {
                volume,
                segment: e.segment,
                block_size,
                base: (u64::from(chunk) * CHUNK_SEGMENTS + u64::from(e.index)) * per,
                blocks: e.owned,
            });
            return Ok(Some((owned.collect(), OwnedPlace { volume, tree, chunk: chunk + 1 })));
        }
        Ok(None)
    }

    /// As [`Pool::owned_from`], with the layer and the place.
    ///
    /// # Errors
    /// The catalogue cannot be read, or is damaged.
    pub fn descriptors_from(
        &mut self,
        from: OwnedPlace,
        only: Option<VolumeId>,
    ) -> Result<Option<(Vec<Descriptor>, OwnedPlace)>, PoolError> {
        let Some((found, next)) = self.owned_from(from, only)? else { return Ok(None) };
        let v = &self.volumes[&next.volume];
        let layer = v.layers.iter().find(|layer| layer.tree == next.tree).map(|layer| match layer.state {
            super::volumes::LayerState::Live => layer.id,
            _ => LayerId(0),
        });
        let per = u64::from(v.spec.blocks_per_segment());
        let descriptor = |owned: Owned| Descriptor {
            volume: owned.volume,
            virtual_segment: owned.base / per,
            segment: owned.segment,
            offset_bytes: self.layout.data_offset(owned.segment.index()),
            blocks: owned.blocks,
            layer,
        };
        Ok(Some((found.into_iter().map(descriptor).collect(), next)))
    }

    /// Who sees the version of `block` that lies in `segment`; `None` if nobody owns it any more.
    ///
    /// # Errors
    /// The catalogue cannot be read, or is damaged.
    pub fn owner_of(
        &mut self,
        volume: VolumeId,
        block: u64,
        segment: SegmentId,
    ) -> Result<Option<(Owner, Owned)>, PoolError> {
        let Some(v) = self.volumes.get(&volume).filter(|v| !v.deleting && block < v.spec.block_count()) else {
            return Ok(None);
        };
        let (per, block_size) = (u64::from(v.spec.blocks_per_segment()), v.spec.block_size);
        let trees: Vec<u64> = v.layers.iter().map(|layer| layer.tree).chain([v.head]).collect();
        let (vseg, bit) = (block / per, 1_u128 << (block % per));
        for tree in trees {
            let (key, index) = locate(tree, vseg);
            let here = |e: &&super::chunk::Extent| e.segment == segment && e.owned & bit != 0;
            if self.chunk(key)?.entry(index).iter().find(here).is_some() {
                let mut pieces = Vec::new();
                self.resolve(volume, None, block, 1, &mut pieces)?;
                let seen = pieces.first().is_some_and(|piece| piece.at == Some(segment));
                let owned = Owned { volume, segment, block_size, base: vseg * per, blocks: bit };
                return Ok(Some((if seen { Owner::Head } else { Owner::Snapshot }, owned)));
            }
        }
        Ok(None)
    }

    /// Where the head's version of a block, or that of snapshot `layer`, lies; `None` for a hole.
    ///
    /// # Errors
    /// As [`Pool::resolve`].
    pub fn place_of(
        &mut self,
        volume: VolumeId,
        layer: Option<LayerId>,
        block: u64,
    ) -> Result<Option<SegmentId>, PoolError> {
        let mut pieces = Vec::new();
        self.resolve(volume, layer, block, 1, &mut pieces)?;
        Ok(pieces.first().and_then(|piece| piece.at))
    }
}
