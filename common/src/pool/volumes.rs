//! The life of volumes and snapshots. Every step is O(1); what follows from it is done by the sweep.

use serde::{Deserialize, Serialize};

use super::{MAX_BLOCKS_PER_SEGMENT, Pool, PoolError};
use crate::types::{LayerId, VolumeId, VolumeSpec};

/// What is to become of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum LayerState {
    /// A snapshot that can be read.
    Live,
    /// Its versions go to the next older live snapshot, or are freed.
    Deleting,
    /// Its versions go back to the head.
    RollingBack,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Layer {
    /// Whose; 0 for one that is rolled back.
    pub id: LayerId,
    /// Where its map is. A layer's id is not enough: a rollback leaves the old map behind and gives the id a new one.
    pub tree: u64,
    pub state: LayerState,
    /// Chunks below are settled.
    pub cursor: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Volume {
    pub spec: VolumeSpec,
    /// The tree of the head.
    pub head: u64,
    /// Oldest first.
    pub layers: Vec<Layer>,
    /// Every layer is to be freed.
    pub deleting: bool,
    /// Of the head, while deleting.
    pub cursor: u32,
}

impl Volume {
    pub(super) fn id(&self) -> VolumeId {
        self.spec.id
    }

    /// The tree of the newest snapshot, to which blocks that the head displaces go.
    pub(super) fn newest(&self) -> Option<u64> {
        self.layers.iter().rev().find(|l| l.state == LayerState::Live).map(|l| l.tree)
    }

    pub(super) fn is_settled(&self) -> bool {
        self.layers.iter().all(|l| l.state == LayerState::Live)
    }
}

impl Pool {
    /// Blocks of a volume; 0 if the pool does not know it.
    #[must_use]
    pub fn block_count(&self, id: VolumeId) -> u64 {
        self.volumes.get(&id).filter(|v| !v.deleting).map_or(0, |v| v.spec.block_count())
    }

    /// Size of a block.
    pub(crate) fn block_bytes(&self, id: VolumeId) -> Result<u64, PoolError> {
        Ok(u64::from(self.volume(id)?.spec.block_size.bytes()))
    }

    /// Adds a volume that reads as zeros.
    ///
    /// # Errors
    /// It exists, or its blocks do not fit the pool's segments.
    pub fn create_volume(&mut self, spec: &VolumeSpec) -> Result<(), PoolError> {
        // One that comes back while it is being swept: a run brings what an earlier one or a promotion took away.
        while self.volumes.get(&spec.id).is_some_and(|volume| volume.deleting) {
            let mut left = usize::MAX;
            self.sweep_deleted(spec.id, &mut left)?;
        }
        if self.volumes.contains_key(&spec.id) {
            return Err(PoolError::VolumeExists(spec.id));
        }
        let blocks = spec.blocks_per_segment();
        if u64::from(spec.segment_bytes) != self.layout.segment_bytes || !(1..=MAX_BLOCKS_PER_SEGMENT).contains(&blocks)
        {
            return Err(PoolError::Geometry {
                volume: spec.id,
                block_bytes: spec.block_size.bytes(),
                segment_bytes: spec.segment_bytes,
                pool_segment_bytes: u32::try_from(self.layout.segment_bytes).expect("it came from 32 bits"),
            });
        }
        if spec.block_count().div_ceil(u64::from(blocks)) > u64::from(u32::MAX) * super::chunk::CHUNK_SEGMENTS {
            return Err(PoolError::Size { volume: spec.id, blocks: 0, wanted: spec.block_count() });
        }
        let head = self.new_tree();
        let volume = Volume { spec: spec.clone(), head, layers: Vec::new(), deleting: false, cursor: 0 };
        self.volumes.insert(spec.id, volume);
        Ok(())
    }

    /// Makes a volume larger; what it gains reads as zeros. `size_bytes` is its new size.
    ///
    /// # Errors
    /// It does not exist, or would shrink, or would be larger than the map can say.
    pub fn grow_volume(&mut self, id: VolumeId, size_bytes: u64) -> Result<(), PoolError> {
        let volume = self.volume_mut(id)?;
        let largest = u64::from(u32::MAX) * super::chunk::CHUNK_SEGMENTS * u64::from(volume.spec.segment_bytes);
        let block = u64::from(volume.spec.block_size.bytes());
        if size_bytes < volume.spec.size_bytes || size_bytes > largest || !size_bytes.is_multiple_of(block) {
            let blocks = volume.spec.block_count();
            return Err(PoolError::Size { volume: id, blocks, wanted: size_bytes / block });
        }
        volume.spec.size_bytes = size_bytes;
        Ok(())
    }

    /// Deletes a volume and its snapshots; the sweep frees them.
    ///
    /// # Errors
    /// It does not exist.
    pub fn delete_volume(&mut self, id: VolumeId) -> Result<(), PoolError> {
        self.volume_mut(id)?.deleting = true;
        Ok(())
    }

    /// Takes a snapshot: `layer` sees the volume as it is now.
    ///
    /// # Errors
    /// The volume does not exist, or `layer` does.
    pub fn create_snapshot(&mut self, volume: VolumeId, layer: LayerId) -> Result<(), PoolError> {
        self.volume_mut(volume)?;
        if self.find_layer(layer).is_some() {
            return Err(PoolError::SnapshotExists(layer));
        }
        let tree = self.new_tree();
        self.volume_mut(volume)?.layers.push(Layer { id: layer, tree, state: LayerState::Live, cursor: 0 });
        Ok(())
    }

    /// Takes a snapshot that sees what snapshot `of` sees, and goes on to see it when that one is deleted.
    ///
    /// # Errors
    /// The volume or `of` does not exist, or `layer` does.
    pub fn pin_snapshot(&mut self, volume: VolumeId, layer: LayerId, of: LayerId) -> Result<(), PoolError> {
        if self.find_layer(layer).is_some() {
            return Err(PoolError::SnapshotExists(layer));
        }
        let found = self.find_layer(of).filter(|(v, _)| *v == volume);
        let (_, at) = found.ok_or(PoolError::NoSnapshot(of))?;
        let tree = self.new_tree();
        // Right below: it owns nothing and sees through `of`, whose versions are handed to it when that goes.
        self.volume_mut(volume)?.layers.insert(at, Layer { id: layer, tree, state: LayerState::Live, cursor: 0 });
        Ok(())
    }

    /// Deletes a snapshot; the sweep hands on or frees what it owns.
    ///
    /// # Errors
    /// It does not exist.
    pub fn delete_snapshot(&mut self, layer: LayerId) -> Result<(), PoolError> {
        let (volume, at) = self.find_layer(layer).ok_or(PoolError::NoSnapshot(layer))?;
        let layer = &mut self.volume_mut(volume)?.layers[at];
        (layer.state, layer.cursor) = (LayerState::Deleting, 0);
        Ok(())
    }

    /// Makes the head what `layer`, the newest snapshot, sees. The snapshot remains.
    ///
    /// # Errors
    /// The snapshot does not exist in this volume, or there is a newer one.
    pub fn roll_back(&mut self, volume: VolumeId, layer: LayerId) -> Result<(), PoolError> {
        let found = self.find_layer(layer).filter(|(v, _)| *v == volume);
        let (_, at) = found.ok_or(PoolError::NoSnapshot(layer))?;
        let layers = &self.volumes[&volume].layers;
        if layers[at + 1..].iter().any(|l| l.state == LayerState::Live) {
            return Err(PoolError::NotNewest { volume, layer });
        }
        let tree = self.new_tree();
        let layers = &mut self.volume_mut(volume)?.layers;
        // Newer layers that are being deleted hold versions that `layer` sees: they go back to the head as well.
        for old in &mut layers[at..] {
            (old.id, old.state, old.cursor) = (LayerId(0), LayerState::RollingBack, 0);
        }
        layers.push(Layer { id: layer, tree, state: LayerState::Live, cursor: 0 });
        Ok(())
    }

    pub(super) fn volume(&self, id: VolumeId) -> Result<&Volume, PoolError> {
        self.volumes.get(&id).filter(|v| !v.deleting).ok_or(PoolError::NoVolume(id))
    }

    fn volume_mut(&mut self, id: VolumeId) -> Result<&mut Volume, PoolError> {
        self.volumes.get_mut(&id).filter(|v| !v.deleting).ok_or(PoolError::NoVolume(id))
    }

    /// The live snapshot `layer`: its volume and place in the chain.
    fn find_layer(&self, layer: LayerId) -> Option<(VolumeId, usize)> {
        self.volumes.values().filter(|v| !v.deleting).find_map(|v| {
            let at = v.layers.iter().position(|l| l.id == layer && l.state == LayerState::Live)?;
            Some((v.id(), at))
        })
    }

    fn new_tree(&mut self) -> u64 {
        self.next_tree += 1;
        self.next_tree - 1
    }
}
