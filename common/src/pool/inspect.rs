//! What the catalogue says of the pool, without opening a device: for a stopped node.
//!
//! The catalogue holds no paths, so devices are known by number and id. Counts are those of the last checkpoint.

use serde::Serialize;

use super::{
    META, PoolError, PoolState, Standing,
    segments::{PAGE_COUNTS, decode_page},
};
use crate::{catalog::CatalogView, types::Uid};

/// One device as of the last checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceUse {
    /// Its number in the pool.
    pub number: u16,
    /// Its id, in hexadecimal.
    pub id: String,
    /// Segments that exist.
    pub segments: u64,
    /// Segments of which some layer owns a block.
    pub used: u64,
    /// The others.
    pub free: u64,
}

/// The segment size in bytes, the devices, and what is wrong with the counts.
///
/// # Errors
/// The catalogue cannot be read, holds no pool, or one that is not understood.
pub fn inspect(view: &CatalogView, owner: Uid) -> Result<(u32, Vec<DeviceUse>, Vec<String>), PoolError> {
    let blob = view.meta(META)?.ok_or(PoolError::NoPool)?;
    let state: PoolState = serde_json::from_slice(&blob).map_err(|e| PoolError::State(e.to_string()))?;
    if state.version != 1 {
        return Err(PoolError::State(format!("unknown version {}", state.version)));
    }
    if state.uid != owner {
        return Err(PoolError::ForeignCatalog { expected: owner, found: state.uid });
    }
    let known = (0..).zip(&state.devices);
    let mut devices: Vec<DeviceUse> = known
        .map(|(number, d)| DeviceUse { number, id: d.uid.to_string(), segments: d.segments, used: 0, free: d.segments })
        .collect();
    let mut problems = Vec::new();
    view.counts(|number, page, blob| {
        let device = devices.get_mut(usize::from(number));
        let (Some(device), Some(counts)) = (device, decode_page(number, page, blob)) else {
            problems.push(PoolError::Counts { device: number, page }.to_string());
            return;
        };
        let first = u64::from(page) * PAGE_COUNTS as u64;
        let owned = (first..).zip(counts).filter(|(_, count)| *count != 0);
        let mut used = 0;
        for (segment, _) in owned {
            if segment >= device.segments {
                problems.push(format!("device {number}: segment {segment} is in use and does not exist"));
            } else {
                used += 1;
            }
        }
        device.used += used;
        device.free = device.segments - device.used;
    })?;
    // Numbers of removed devices are not used again.
    devices.retain(|d| state.devices[usize::from(d.number)].standing != Standing::Removed);
    Ok((state.segment_bytes, devices, problems))
}
