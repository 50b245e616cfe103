//! Why an operation of the pool failed.

use std::io;

use super::space::NoSpace;
use crate::{
    catalog::CatalogError,
    types::{LayerId, SegmentId, Uid, VolumeId},
};

/// Why the pool could not be made, opened, or changed.
///
/// After [`PoolError::NoSpace`], [`PoolError::Catalog`], [`PoolError::Map`], [`PoolError::Counts`] and
/// [`PoolError::Segment`] from a method that changes the map, the change may be half done: drop the pool and recover
/// from the last checkpoint. Every other error left it as it was.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PoolError {
    #[error("pool: {0}")]
    Config(String),
    #[error(transparent)]
    NoSpace(#[from] NoSpace),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("the catalogue knows no pool: the data directory was not initialised completely; initialise it again")]
    NoPool,
    #[error("the state of the pool in the catalogue is damaged: {0}; restore the catalogue")]
    State(String),
    #[error("the catalogue belongs to pool {found}, expected {expected}; use the data directory of this pool")]
    ForeignCatalog { expected: Uid, found: Uid },
    #[error("the map page of layer {tree}, chunk {chunk} is damaged: {reason}; restore the catalogue")]
    Map { tree: u64, chunk: u32, reason: &'static str },
    #[error("page {page} of the live counts of device {device} is damaged; restore the catalogue")]
    Counts { device: u16, page: u32 },
    #[error("segment {:#x} is {found}, expected {expected}: catalogue and journal disagree; restore one of them", segment.0)]
    Segment { segment: SegmentId, found: &'static str, expected: &'static str },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("volume {0} does not exist in the pool")]
    NoVolume(VolumeId),
    #[error("volume {0} exists already")]
    VolumeExists(VolumeId),
    #[error(
        "volume {volume}: blocks of {block_bytes} B in segments of {segment_bytes} B: a segment of the pool has {pool_segment_bytes} B and must hold 1 to 128 blocks; choose another block size"
    )]
    Geometry { volume: VolumeId, block_bytes: u32, segment_bytes: u32, pool_segment_bytes: u32 },
    #[error("volume {volume}: {first}+{count} is outside of its {blocks} blocks, or not on a segment's boundary")]
    Range { volume: VolumeId, first: u64, count: u64, blocks: u64 },
    #[error("volume {volume} has {blocks} blocks and cannot be made smaller or larger to {wanted}")]
    Size { volume: VolumeId, blocks: u64, wanted: u64 },
    #[error("snapshot {0} does not exist in the pool")]
    NoSnapshot(LayerId),
    #[error("snapshot {0} exists already")]
    SnapshotExists(LayerId),
    #[error("snapshot {layer} of volume {volume} is not its newest one; only the newest can be rolled back to")]
    NotNewest { volume: VolumeId, layer: LayerId },
}

/// What is wrong with a device.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum DeviceError {
    #[error("device {number} ({path}, expected id {expected}): missing; attach it or correct its path")]
    Missing { number: u16, path: String, expected: Uid },
    #[error(
        "device {number} ({path}): has id {found} of pool {found_pool}, expected id {expected} of pool {expected_pool}; attach the right device"
    )]
    Foreign { number: u16, path: String, expected: Uid, found: Uid, expected_pool: Uid, found_pool: Uid },
    #[error(
        "device {number} ({path}): is device {found_number} of this pool (id {found}), expected id {expected}; put the paths into the right order"
    )]
    Swapped { number: u16, path: String, expected: Uid, found: Uid, found_number: u16 },
    #[error("device {number} ({path}, id {id}): has {found} B, needs {needed} B; attach the whole device")]
    TooSmall { number: u16, path: String, id: Uid, needed: u64, found: u64 },
    #[error(
        "device {number} ({path}, expected id {expected}): its superblock is damaged ({reason}); restore the device"
    )]
    Superblock { number: u16, path: String, expected: Uid, reason: &'static str },
    #[error("device {number} ({path}): holds data that is not of this pool; wipe its first 4 KiB if it may be used")]
    NotEmpty { number: u16, path: String },
    #[error("device {number} ({path}): it is device {found_number} of this pool under another path; name another one")]
    Present { number: u16, path: String, found_number: u16 },
    #[error("device {number} ({path}): {source}; check the device")]
    Io {
        number: u16,
        path: String,
        #[source]
        source: io::Error,
    },
}
