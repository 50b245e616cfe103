//! The pool: devices cut into segments, and the maps that say who owns which block of which segment.
//!
//! A volume has a head layer and a chain of snapshot layers, oldest to newest. Layers are reverse deltas: the head owns
//! the current versions of its blocks, a snapshot owns the versions that were displaced after it was taken (or a hole,
//! where the block was not allocated then). What a snapshot does not own it sees through the newer layers.
//!
//! Invariants
//! - Every block version has exactly one owner; a segment's live count is the number of its owned slots over all layers.
//! - Block `n` of a virtual segment lies in slot `n` of some physical segment. Nothing is copied but what lives on a
//!   device that is drained ([`relocate`]): then a whole segment goes to the same slots of another, for all its owners.
//! - A slot that a durable checkpoint, a read or a journal record may refer to is not written, except in place by the
//!   record that follows in the journal: when the head owns it, no snapshot sees it, and no record refers to its segment.
//! - Layers that are being deleted or rolled back are settled, oldest first, for a virtual segment before it changes.
//!
//! The pool holds the state after the last applied record; the state on disk is that of the last checkpoint, from which
//! the same calls in the same order lead here again. Placements may differ then: **recovery must [`Pool::pin`] every
//! segment that a record in the journal refers to before it applies the first record**, so that no other write takes it.
//!
//! Absent: the journal, the overlay of writes not performed yet, and any thread. The caller holds the lock; only
//! [`PoolIo`] and [`Growth::perform`] do device I/O, without it.

mod check;
mod checkpoint;
mod chunk;
mod device;
mod error;
mod grow;
mod inspect;
mod io;
mod layers;
mod map;
mod members;
mod owned;
mod read;
mod relocate;
mod segments;
mod snapshots;
mod space;
mod volumes;
mod write;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use device::{Device, Layout, Superblock};
use foldhash::fast::FixedState;
use hashbrown::HashMap;
use map::Map;
use members::{DeviceState, Member, Standing};
use segments::Segments;
use serde::{Deserialize, Serialize};

#[cfg(test)]
pub(crate) use check::reseal;
pub use check::{Counted, PoolCheck, PoolVolume};
pub use checkpoint::Capture;
pub use error::{DeviceError, PoolError};
pub use grow::Growth;
pub use inspect::{DeviceUse, inspect};
pub use io::{IoPlan, PoolIo, ReadError};
pub use members::{DeviceInfo, DeviceStanding, MadeDevice, MemberError, NewDevice, RemovedDevice};
pub use owned::{Descriptor, Owned, OwnedPlace, Owner};
pub use read::{Piece, ReadTicket};
pub use relocate::{MovedDamage, Relocation};
pub use segments::SegmentStates;
pub use space::{NoSpace, Reservation, Space};

use crate::{
    catalog::Catalog,
    storage::{OpenMode, Storage},
    types::{Uid, VolumeId},
};

/// Default size of a segment: 64 KiB.
pub const DEFAULT_SEGMENT_BYTES: u32 = 64 * 1024;
/// Default memory for map pages that are not dirty: 16 MiB.
pub const DEFAULT_MAP_CACHE_BYTES: usize = 16 * 1024 * 1024;
/// Blocks in a segment, at most: the width of an ownership mask and of a checksum slot.
pub const MAX_BLOCKS_PER_SEGMENT: u32 = 128;

const ZONE_BYTES: u32 = 64 * 1024 * 1024;
const META: &str = "pool";

/// What the pool is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// Size of a segment: a power of two, 64 KiB to 1 MiB. Fixed when the pool is made.
    pub segment_bytes: u32,
    /// In their order; the order is checked when the pool is opened.
    pub devices: Vec<DeviceConfig>,
    /// Memory for map pages that are not dirty.
    pub map_cache_bytes: usize,
}

/// A file or block device of the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Name in the storage, or an absolute path. Below `/dev/` it is a block device.
    pub path: String,
    /// Fixed size, allocated at once. `None`: a file grows as needed up to `max_bytes`, a block device is used whole.
    pub size_bytes: Option<u64>,
    /// Largest size of a growing file. `None`: no bound but the file system's.
    pub max_bytes: Option<u64>,
}

/// What the pool keeps in the catalogue besides maps and counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PoolState {
    version: u32,
    uid: Uid,
    segment_bytes: u32,
    zone_segments: u32,
    devices: Vec<DeviceState>,
    volumes: Vec<volumes::Volume>,
    next_tree: u64,
}

/// The pool. See the module.
pub struct Pool {
    uid: Uid,
    storage: Arc<dyn Storage>,
    layout: Layout,
    members: Vec<Member>,
    io: PoolIo,
    space: Arc<Space>,
    segments: Segments,
    map: Map,
    volumes: HashMap<VolumeId, volumes::Volume, FixedState>,
    next_tree: u64,
    growing: bool,
    /// A device is being made.
    adding: bool,
    /// Devices that the last checkpoints removed.
    removed: Vec<RemovedDevice>,
    /// Those of them that are being wiped.
    wiping: Vec<u16>,
    /// Where the search for what is to be moved goes on.
    relocating: OwnedPlace,
    lacks_room: bool,
    captured: Option<checkpoint::Pending>,
}

impl Pool {
    /// Makes the devices and an empty pool, durably. A pool that exists in the catalogue is replaced.
    ///
    /// # Errors
    /// The configuration is impossible, a device cannot be made or holds foreign data, or the catalogue fails.
    pub fn create(
        storage: Arc<dyn Storage>,
        catalog: &Catalog,
        uid: Uid,
        config: &PoolConfig,
    ) -> Result<Self, PoolError> {
        let zone_segments = ZONE_BYTES / config.segment_bytes.max(1);
        Self::create_with_zones(storage, catalog, uid, config, zone_segments)
    }

    fn create_with_zones(
        storage: Arc<dyn Storage>,
        catalog: &Catalog,
        uid: Uid,
        config: &PoolConfig,
        zone_segments: u32,
    ) -> Result<Self, PoolError> {
        check_config(config)?;
        let mut devices = Vec::new();
        for (number, device) in (0..).zip(&config.devices) {
            let blank = Superblock {
                pool: uid,
                device: device_uid(uid, number),
                number,
                segment_bytes: config.segment_bytes,
                zone_segments,
                segments: 0,
            };
            let (opened, segments) = device::create(&*storage, device, blank, None)?;
            if segments == 0 {
                return Err(PoolError::Config(format!("device {} is too small for one segment", device.path)));
            }
            let (path, standing) = (device.path.clone(), Standing::Serving);
            let state = DeviceState { uid: blank.device, segments, path, standing, added: None };
            devices.push((Some((opened, device.clone())), state));
        }
        let (devices, states): (Vec<_>, Vec<_>) = devices.into_iter().unzip();
        let state = PoolState {
            version: 1,
            uid,
            segment_bytes: config.segment_bytes,
            zone_segments,
            devices: states,
            volumes: Vec::new(),
            next_tree: 1,
        };
        catalog.write(|txn| txn.put_meta(META, &encode_state(&state)))?;
        Ok(Self::assemble(storage, catalog, config, state, devices))
    }

    /// Opens the pool in the state of the last checkpoint.
    ///
    /// # Errors
    /// The catalogue holds no pool, or another one, or a damaged one; a device is missing, foreign, swapped, too small
    /// or damaged.
    pub fn open(
        storage: Arc<dyn Storage>,
        catalog: &Catalog,
        uid: Uid,
        config: &PoolConfig,
    ) -> Result<Self, PoolError> {
        check_config(config)?;
        let view = catalog.read()?;
        let blob = view.meta(META)?.ok_or(PoolError::NoPool)?;
        let mut state: PoolState = serde_json::from_slice(&blob).map_err(|e| PoolError::State(e.to_string()))?;
        if state.version != 1 {
            return Err(PoolError::State(format!("unknown version {}", state.version)));
        }
        if state.uid != uid {
            return Err(PoolError::ForeignCatalog { expected: uid, found: state.uid });
        }
        if state.segment_bytes != config.segment_bytes {
            return Err(PoolError::Config(format!(
                "segments of {} B are configured, the pool was made with {} B",
                config.segment_bytes, state.segment_bytes
            )));
        }
        let configs = members::match_devices(&config.devices, &state.devices)?;
        let mut devices = Vec::new();
        for ((number, device), known) in (0..).zip(configs).zip(&mut state.devices) {
            let Some(device) = device else {
                devices.push(None);
                continue;
            };
            let expected = Superblock {
                pool: uid,
                device: known.uid,
                number,
                segment_bytes: state.segment_bytes,
                zone_segments: state.zone_segments,
                segments: known.segments,
            };
            let (opened, superblock) = device::open(&*storage, &device.path, &expected, OpenMode::Existing)?;
            // The device may have grown after the checkpoint, and records may refer to what it gained.
            known.segments = superblock.segments;
            devices.push(Some((opened, device)));
        }
        let mut pool = Self::assemble(storage, catalog, config, state, devices);
        let mut pages = Ok(());
        view.counts(|device, page, blob| {
            if pages.is_ok() {
                pages = pool.segments.load_page(device, page, blob);
            }
        })?;
        pages.map(|()| pool)
    }

    fn assemble(
        storage: Arc<dyn Storage>,
        catalog: &Catalog,
        config: &PoolConfig,
        state: PoolState,
        devices: Vec<Option<(Device, DeviceConfig)>>,
    ) -> Self {
        let layout = Layout { segment_bytes: state.segment_bytes.into(), zone_segments: state.zone_segments.into() };
        let space = Arc::new(Space::default());
        let mut segments = Segments::new(space.clone());
        let mut members = Vec::new();
        for ((number, known), opened) in (0..).zip(&state.devices).zip(devices) {
            segments.add_device(known.standing != Standing::Serving);
            segments.extend(number, if opened.is_some() { known.segments } else { 0 });
            members.push(Member::open(known, opened));
        }
        let mut pool = Self {
            uid: state.uid,
            storage,
            layout,
            io: PoolIo::new(members.iter().map(|member| member.device.clone()).collect()),
            members,
            space,
            segments,
            map: Map::new(catalog.clone(), config.map_cache_bytes),
            volumes: state.volumes.into_iter().map(|v| (v.id(), v)).collect(),
            next_tree: state.next_tree,
            growing: false,
            adding: false,
            removed: Vec::new(),
            wiping: Vec::new(),
            relocating: OwnedPlace::default(),
            lacks_room: false,
            captured: None,
        };
        pool.update_can_grow();
        pool
    }

    /// The counts that need no lock.
    #[must_use]
    pub fn space(&self) -> Arc<Space> {
        self.space.clone()
    }

    /// The handle for device I/O.
    #[must_use]
    pub fn io(&self) -> PoolIo {
        self.io.clone()
    }

    /// Map chunks that the next capture would take.
    #[must_use]
    pub fn dirty_chunks(&self) -> usize {
        self.map.unsaved_count()
    }

    /// Counts segments by state, looking at each one: for checks and inspection.
    #[must_use]
    pub fn segment_states(&self) -> SegmentStates {
        self.segments.states()
    }

    fn state(&self) -> PoolState {
        let device = |(number, member): (u16, &Member)| member.state(self.segments.device_segments(number));
        let mut volumes: Vec<_> = self.volumes.values().cloned().collect();
        volumes.sort_unstable_by_key(volumes::Volume::id);
        PoolState {
            version: 1,
            uid: self.uid,
            segment_bytes: u32::try_from(self.layout.segment_bytes).expect("it came from 32 bits"),
            zone_segments: u32::try_from(self.layout.zone_segments).expect("it came from 32 bits"),
            devices: (0..).zip(&self.members).map(device).collect(),
            volumes,
            next_tree: self.next_tree,
        }
    }
}

fn encode_state(state: &PoolState) -> Vec<u8> {
    serde_json::to_vec(state).expect("numbers, strings and lists only")
}

fn check_config(config: &PoolConfig) -> Result<(), PoolError> {
    let refuse = |what: String| Err(PoolError::Config(what));
    if !config.segment_bytes.is_power_of_two() || !(64 * 1024..=1024 * 1024).contains(&config.segment_bytes) {
        return refuse(format!("segments of {} B; use a power of two, 64 KiB to 1 MiB", config.segment_bytes));
    }
    if config.devices.is_empty() || config.devices.len() > usize::from(u16::MAX) {
        return refuse(format!("{} devices; use 1 to 65535", config.devices.len()));
    }
    for (i, device) in config.devices.iter().enumerate() {
        if config.devices[..i].iter().any(|other| other.path == device.path) {
            return refuse(format!("device {} is named twice", device.path));
        }
    }
    Ok(())
}

/// The identity of device `number`: derived, so that making a pool is deterministic, and as unique as the pool's.
fn device_uid(pool: Uid, number: u16) -> Uid {
    let half = |part: usize| {
        let bytes: [u8; 8] = pool.0[part * 8..part * 8 + 8].try_into().expect("8 bytes");
        io::scramble(u64::from_le_bytes(bytes) ^ u64::from(number) << 1 ^ part as u64).to_le_bytes()
    };
    let mut out = [0; 16];
    out[..8].copy_from_slice(&half(0));
    out[8..].copy_from_slice(&half(1));
    Uid(out)
}
