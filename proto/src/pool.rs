//! The pool on the wire: the same answers on both sides.

use std::{collections::BTreeMap, sync::Arc};

use tonic::Code;
use understudy_common::{
    pool::{Descriptor, DeviceError, DeviceInfo, DeviceStanding, MemberError, OwnedPlace},
    store::{DeviceChangeError, Store},
    types::{LayerId, VolumeId},
};

use crate::{convert::InvalidField, v1};

/// Segments in one answer, about: what one chunk of a map holds comes together.
const SEGMENTS_MAX: usize = 1024;
/// Chunks of maps that are looked at for one answer.
const CHUNKS_MAX: usize = 256;

/// Why a request about the pool was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRefusal {
    /// The canonical code.
    pub code: Code,
    /// What happened and what to do.
    pub why: String,
}

impl From<DeviceChangeError> for PoolRefusal {
    fn from(error: DeviceChangeError) -> Self {
        let code = match &error {
            DeviceChangeError::Failed(_) => Code::Internal,
            DeviceChangeError::Member(member) => match member {
                MemberError::InUse { .. } | MemberError::Device(DeviceError::Present { .. }) => Code::AlreadyExists,
                MemberError::TooMany | MemberError::NoRoom { .. } => Code::ResourceExhausted,
                MemberError::Busy => Code::Unavailable,
                MemberError::TooSmall { .. } => Code::InvalidArgument,
                MemberError::Unknown { .. } => Code::NotFound,
                MemberError::NoDirectory { .. }
                | MemberError::NoBlockDevice { .. }
                | MemberError::Last { .. }
                | MemberError::Standing { .. }
                | MemberError::Device(_) => Code::FailedPrecondition,
            },
        };
        Self { code, why: error.to_string() }
    }
}

impl From<InvalidField> for PoolRefusal {
    fn from(error: InvalidField) -> Self {
        Self { code: Code::InvalidArgument, why: error.to_string() }
    }
}

/// The pool as it is.
#[must_use]
pub fn pool_to_wire(store: &Store) -> v1::Pool {
    let config = store.config();
    let segment = u64::from(config.pool.segment_bytes);
    let (space, bytes) = (store.space(), store.pool_bytes());
    v1::Pool {
        segment_bytes: config.pool.segment_bytes,
        total_bytes: bytes.size,
        free_bytes: space.free().saturating_add(space.can_grow()).saturating_mul(segment),
        reserved_bytes: space.reserved() * segment,
        devices: store.devices().iter().map(|device| device_to_wire(device, segment)).collect(),
        used_bytes: bytes.used,
        promised_bytes: bytes.promised,
        warn_at: f64::from(config.levels.warn_millionths) / 1e6,
        stop_at: f64::from(config.levels.stop_millionths) / 1e6,
        drain_lacks_room: store.drain_lacks_room(),
    }
}

fn device_to_wire(device: &DeviceInfo, segment_bytes: u64) -> v1::PoolDevice {
    let state = match device.standing {
        DeviceStanding::Joining | DeviceStanding::Returning => v1::DeviceState::Joining,
        DeviceStanding::Serving => v1::DeviceState::Serving,
        DeviceStanding::Draining => v1::DeviceState::Draining,
        DeviceStanding::Removing => v1::DeviceState::Removing,
        DeviceStanding::Removed => v1::DeviceState::Removed,
    };
    v1::PoolDevice {
        id: device.number.into(),
        path: device.path.clone(),
        size_bytes: device.segments * segment_bytes,
        free_bytes: device.free * segment_bytes,
        state: state.into(),
        live_bytes: device.live * segment_bytes,
        waiting_bytes: (device.quarantined + device.held) * segment_bytes,
    }
}

fn answer(store: &Store, device: &DeviceInfo) -> v1::PoolDevice {
    device_to_wire(device, store.config().pool.segment_bytes.into())
}

/// Adds a device; answers when it is durable and gives space.
///
/// # Errors
/// See [`MemberError`].
pub async fn add_device(store: &Arc<Store>, request: v1::AddDeviceRequest) -> Result<v1::PoolDevice, PoolRefusal> {
    let v1::AddDeviceRequest { path, size_bytes } = request;
    let path = named(path)?;
    let device = store.add_device_durably(path, (size_bytes > 0).then_some(size_bytes)).await?;
    Ok(answer(store, &device))
}

/// Begins to drain a device, or ends that; answers when it is durable.
///
/// # Errors
/// See [`MemberError`].
pub async fn drain_device(store: &Arc<Store>, request: v1::DrainDeviceRequest) -> Result<v1::PoolDevice, PoolRefusal> {
    let v1::DrainDeviceRequest { path, cancel } = request;
    let device = store.drain_device_durably(named(path)?, cancel).await?;
    Ok(answer(store, &device))
}

fn named(path: String) -> Result<String, InvalidField> {
    if path.is_empty() {
        return Err(InvalidField { field: "path", why: "is empty; name a file or a block device".into() });
    }
    Ok(path)
}

/// The segments that layers own blocks in, a part of them.
///
/// # Errors
/// The place makes no sense, or the maps cannot be read.
pub fn list_segments(
    store: &Store,
    volume: Option<VolumeId>,
    page_token: &str,
) -> Result<v1::ListSegmentsResponse, PoolRefusal> {
    let unknown = || InvalidField { field: "page_token", why: "is none of an answer; leave it empty".into() };
    let mut place = match page_token {
        "" => OwnedPlace::default(),
        token => OwnedPlace::from_token(token).ok_or_else(unknown)?,
    };
    let (names, snapshots): (BTreeMap<VolumeId, String>, BTreeMap<LayerId, String>) = store.with_state(|state| {
        let names = state.volumes.values().map(|spec| (spec.id, spec.name.clone())).collect();
        let layers = state.snapshots.values().flat_map(|s| s.layers.iter().map(|(_, layer)| (*layer, s.name.clone())));
        (names, layers.collect())
    });
    let mut segments = Vec::new();
    for _ in 0..CHUNKS_MAX {
        let found = store.with_pool(|pool| pool.descriptors_from(place, volume));
        let found = found.map_err(|error| PoolRefusal { code: Code::Internal, why: error.to_string() })?;
        let Some((found, next)) = found else {
            return Ok(v1::ListSegmentsResponse { segments, next_page_token: String::new() });
        };
        segments.extend(found.iter().map(|descriptor| segment_to_wire(descriptor, &names, &snapshots)));
        place = next;
        if segments.len() >= SEGMENTS_MAX {
            break;
        }
    }
    Ok(v1::ListSegmentsResponse { segments, next_page_token: place.to_token() })
}

fn segment_to_wire(
    descriptor: &Descriptor,
    names: &BTreeMap<VolumeId, String>,
    snapshots: &BTreeMap<LayerId, String>,
) -> v1::SegmentDescriptor {
    let snapshot = descriptor.layer.map(|layer| snapshots.get(&layer).cloned().unwrap_or_default());
    v1::SegmentDescriptor {
        volume_id: descriptor.volume.0,
        volume: names.get(&descriptor.volume).cloned().unwrap_or_default(),
        virtual_segment: descriptor.virtual_segment,
        device: descriptor.segment.device().into(),
        segment: descriptor.segment.index(),
        device_offset_bytes: descriptor.offset_bytes,
        blocks: descriptor.blocks.count_ones(),
        blocks_mask: descriptor.blocks.to_le_bytes().to_vec().into(),
        of_head: descriptor.layer.is_none(),
        snapshot: snapshot.unwrap_or_default(),
    }
}
