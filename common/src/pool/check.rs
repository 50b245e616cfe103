//! Checks of the pool of a stopped node, as of its last checkpoint, without changing a byte: that every block version has
//! one owner, that the live counts are those of the maps, and that the blocks match their checksums.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use foldhash::fast::FixedState;
use hashbrown::HashMap;

use super::{
    META, PoolError, PoolIo, PoolState,
    chunk::{CHUNK_SEGMENTS, Chunk, HOLE},
    device::{self, Superblock},
    members::{DeviceState, Standing},
    owned::Owned,
    segments::{PAGE_COUNTS, decode_page},
    volumes::LayerState,
};
use crate::{
    catalog::CatalogView,
    storage::{OpenMode, Storage},
    types::{LayerId, SegmentId, Uid, VolumeId, VolumeSpec},
};

/// A volume of the pool: what it is, the snapshots that can be read, and whether it is going.
#[derive(Debug, Clone)]
pub struct PoolVolume {
    /// All of it.
    pub spec: VolumeSpec,
    /// Its live snapshots.
    pub layers: Vec<LayerId>,
    /// It was deleted and is being freed.
    pub deleting: bool,
}

/// Numbers of segments and blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    /// Segments of all devices.
    pub segments: u64,
    /// Of which a layer owns a block.
    pub owned_segments: u64,
    /// Block versions.
    pub owned_blocks: u64,
}

/// The catalogue's side of a pool.
pub struct PoolCheck {
    state: PoolState,
    /// Of each tree: whose it is, and who sees what it owns.
    trees: BTreeMap<u64, (usize, Seen)>,
}

/// Who sees the block versions of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// The head, and maybe snapshots.
    Head,
    /// A snapshot, or the head or an older snapshot to which they go.
    Snapshot,
    /// Nobody any more: the sweep frees them.
    Nobody,
}

/// Is given where problems go, who sees what the map owns, and what that is.
type Visit<'a> = &'a mut dyn FnMut(&mut dyn FnMut(String), Seen, &Owned);

/// Owned slots of a segment, and whose they are.
struct Claim {
    volume: VolumeId,
    vseg: u64,
    owned: u128,
}

impl PoolCheck {
    /// Reads what the catalogue knows of the pool of `owner`. Snapshots of `readers` went with the process that had them:
    /// it gives them back when it starts.
    ///
    /// # Errors
    /// It holds no pool, another one, or one that is not understood.
    pub fn load(view: &CatalogView, owner: Uid, readers: &BTreeSet<LayerId>) -> Result<Self, PoolError> {
        let blob = view.meta(META)?.ok_or(PoolError::NoPool)?;
        let state: PoolState = serde_json::from_slice(&blob).map_err(|e| PoolError::State(e.to_string()))?;
        if state.version != 1 {
            return Err(PoolError::State(format!("unknown version {}", state.version)));
        }
        if state.uid != owner {
            return Err(PoolError::ForeignCatalog { expected: owner, found: state.uid });
        }
        let mut trees = BTreeMap::new();
        for (at, volume) in state.volumes.iter().enumerate() {
            let seen = |seen: Seen| (at, if volume.deleting { Seen::Nobody } else { seen });
            trees.insert(volume.head, seen(Seen::Head));
            let mut is_older_live = false;
            for layer in &volume.layers {
                let is_read = readers.contains(&layer.id);
                is_older_live |= layer.state == LayerState::Live && !is_read;
                // What a deleted snapshot owns goes to the next older live one.
                let goes = (layer.state == LayerState::Deleting || is_read) && !is_older_live;
                trees.insert(layer.tree, seen(if goes { Seen::Nobody } else { Seen::Snapshot }));
            }
        }
        Ok(Self { state, trees })
    }

    /// Its volumes.
    #[must_use]
    pub fn volumes(&self) -> Vec<PoolVolume> {
        let volume = |v: &super::volumes::Volume| PoolVolume {
            spec: v.spec.clone(),
            layers: v.layers.iter().filter(|l| l.state == LayerState::Live).map(|l| l.id).collect(),
            deleting: v.deleting,
        };
        self.state.volumes.iter().map(volume).collect()
    }

    /// Paths of its devices, in their order, without those that were removed; empty where the catalogue does not know.
    #[must_use]
    pub fn device_paths(&self) -> Vec<String> {
        self.present().map(|(_, device)| device.path.clone()).collect()
    }

    fn present(&self) -> impl Iterator<Item = (u16, &DeviceState)> {
        (0..).zip(&self.state.devices).filter(|(_, device)| device.standing != Standing::Removed)
    }

    /// Compares the maps with each other and with the live counts.
    ///
    /// # Errors
    /// The catalogue cannot be read.
    pub fn maps(&self, view: &CatalogView, problem: &mut dyn FnMut(String)) -> Result<Counted, PoolError> {
        let mut counted =
            Counted { segments: self.state.devices.iter().map(|d| d.segments).sum(), ..Counted::default() };
        let mut claims: HashMap<SegmentId, Claim, FixedState> = HashMap::default();
        let total: u64 = self.state.volumes.iter().map(|v| 1 + v.layers.len() as u64).sum();
        if self.trees.len() as u64 != total {
            problem("two layers of the pool have one map".into());
        }
        if let Some((tree, _)) = self.trees.last_key_value().filter(|(tree, _)| **tree >= self.state.next_tree) {
            problem(format!("map {tree} is in use, and {} is the next to be given", self.state.next_tree));
        }
        self.each_extent(view, problem, &mut |problem, seen, owned| {
            let Owned { volume, segment, base, blocks, .. } = *owned;
            if segment == HOLE {
                if seen == Seen::Head {
                    problem(format!("volume {volume}: the head owns a hole from block {base} on"));
                }
                return;
            }
            counted.owned_blocks += u64::from(blocks.count_ones());
            let known = self.state.devices.get(usize::from(segment.device()));
            if known.is_none_or(|device| segment.index() >= device.segments) {
                problem(format!("volume {volume} block {base}: {} does not exist", name(segment)));
            }
            let claim = claims.entry(segment).or_insert(Claim { volume, vseg: base, owned: 0 });
            if (claim.volume, claim.vseg) != (volume, base) {
                problem(format!(
                    "{} belongs to volume {} from block {} on, and to volume {volume} from block {base} on",
                    name(segment),
                    claim.volume,
                    claim.vseg
                ));
            } else if claim.owned & blocks != 0 {
                let slot = u64::from((claim.owned & blocks).trailing_zeros());
                problem(format!(
                    "volume {volume} block {}: its version in {} has two owners",
                    base + slot,
                    name(segment)
                ));
            }
            claim.owned |= blocks;
        })?;
        counted.owned_segments = claims.len() as u64;
        view.counts(|device, page, blob| {
            let Some(counts) = decode_page(device, page, blob) else {
                problem(PoolError::Counts { device, page }.to_string());
                return;
            };
            let first = u64::from(page) * PAGE_COUNTS as u64;
            for (index, count) in (first..).zip(counts) {
                let id = SegmentId::new(device, index);
                let owned = claims.remove(&id).map_or(0, |claim| claim.owned.count_ones());
                if owned != u32::from(count) {
                    problem(format!("{} counts {count} blocks in use, its maps own {owned}", name(id)));
                }
            }
        })?;
        for segment in claims.keys() {
            problem(format!("{} counts no block in use, and its maps own some", name(*segment)));
        }
        Ok(counted)
    }

    /// Opens the devices for reading, each by its path.
    ///
    /// # Errors
    /// Not one path for each device.
    pub fn open(
        &self,
        storage: &dyn Storage,
        paths: &[String],
        problem: &mut dyn FnMut(String),
    ) -> Result<Option<PoolIo>, PoolError> {
        if paths.len() != self.present().count() {
            let (given, known) = (paths.len(), self.present().count());
            return Err(PoolError::Config(format!("{given} devices are named, the pool has {known}")));
        }
        let mut devices = vec![None; self.state.devices.len()];
        let mut opened = 0;
        for ((number, known), path) in self.present().zip(paths) {
            let expected = Superblock {
                pool: self.state.uid,
                device: known.uid,
                number,
                segment_bytes: self.state.segment_bytes,
                zone_segments: self.state.zone_segments,
                segments: known.segments,
            };
            match device::open(storage, path, &expected, OpenMode::ReadOnly) {
                Ok((device, _)) => {
                    devices[usize::from(number)] = Some(Arc::new(device));
                    opened += 1;
                }
                Err(error) => problem(error.to_string()),
            }
        }
        Ok((opened == paths.len()).then(|| PoolIo::new(devices)))
    }

    /// Compares every owned block that somebody sees with its checksum. `skip` says of a block that a record of the journal writes it anew.
    /// Returns the bytes that were read.
    ///
    /// # Errors
    /// The catalogue cannot be read.
    pub fn data(
        &self,
        view: &CatalogView,
        io: &PoolIo,
        skip: &dyn Fn(VolumeId, u64) -> bool,
        problem: &mut dyn FnMut(String),
    ) -> Result<u64, PoolError> {
        let (mut bytes, mut buffer) = (0, Vec::new());
        // What is wrong with the maps is told by `maps`.
        self.each_extent(view, &mut |_| {}, &mut |_, seen, owned| {
            if owned.segment == HOLE || seen == Seen::Nobody {
                return;
            }
            bytes += owned.bytes();
            for block in io.scrub(owned, &mut buffer) {
                if !skip(owned.volume, block) {
                    let (volume, at) = (owned.volume, name(owned.segment));
                    problem(format!("volume {volume} block {block} in {at} does not match its checksum"));
                }
            }
        })?;
        Ok(bytes)
    }

    /// Calls `visit` with each valid extent of a known map, and who sees it.
    fn each_extent(
        &self,
        view: &CatalogView,
        problem: &mut dyn FnMut(String),
        visit: Visit<'_>,
    ) -> Result<(), PoolError> {
        view.maps(|tree, number, blob| {
            let Some((volume, seen)) = self.trees.get(&tree) else {
                problem(format!("map {tree}, chunk {number}, belongs to no volume"));
                return;
            };
            let spec = &self.state.volumes[*volume].spec;
            let chunk = match Chunk::decode(tree, number, blob) {
                Ok(chunk) => chunk,
                Err(reason) => {
                    problem(PoolError::Map { tree, chunk: number, reason }.to_string());
                    return;
                }
            };
            let per = u64::from(spec.blocks_per_segment());
            for extent in chunk.extents() {
                let base = (u64::from(number) * CHUNK_SEGMENTS + u64::from(extent.index)) * per;
                let last = u64::from(127 - extent.owned.leading_zeros());
                if last >= per || base + last >= spec.block_count() {
                    let (id, end) = (spec.id, spec.block_count());
                    problem(format!("volume {id}: map {tree} has block {}, and the volume ends at {end}", base + last));
                    continue;
                }
                let (volume, segment, block_size) = (spec.id, extent.segment, spec.block_size);
                visit(problem, *seen, &Owned { volume, segment, block_size, base, blocks: extent.owned });
            }
        })?;
        Ok(())
    }
}

fn name(segment: SegmentId) -> String {
    format!("segment {} of device {}", segment.index(), segment.device())
}

/// A chunk under another key, as nothing writes it: for tests of what finds it.
#[cfg(test)]
pub(crate) fn reseal(blob: &[u8], from: (u64, u32), to: (u64, u32)) -> Vec<u8> {
    Chunk::decode(from.0, from.1, blob).expect("a whole one").encode(to.0, to.1)
}
