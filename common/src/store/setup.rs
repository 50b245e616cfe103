//! A store's set-up from the settings of a service.

use std::{io, path::Path, sync::Arc};

use crate::{
    config,
    journal::JournalConfig,
    lane::Lanes,
    pool::{DeviceConfig, PoolConfig},
    storage::{RealStorage, Storage},
};

use super::StoreConfig;

/// Name of the device that grows where none is configured.
const DEFAULT_DEVICE: &str = "pool-0";
/// Smallest and largest file of the journal.
const JOURNAL_FILE_BYTES: (u64, u64) = (1 << 20, 64 << 20);
/// Largest reserve of the journal for control records.
const RESERVE_BYTES_MAX: u64 = 4 << 20;
/// One group commit.
const BATCH_BYTES: usize = 4 << 20;
/// One apply job.
const APPLY_BYTES: usize = 8 << 20;
/// Payload that waits to be written to its place.
const PENDING_BYTES: usize = 64 << 20;
/// Recent records that are kept for the sender.
const TAIL_BYTES: usize = 64 << 20;
/// Writes from here on go to fresh segments and are journaled by reference. Below, writing twice costs less than
/// syncing two files.
const REFERENCE_BYTES: usize = 256 << 10;

/// The files of a service.
///
/// # Errors
/// If its directories cannot be made.
pub fn storage(data_dir: &Path, staging: &config::StagingConfig) -> io::Result<Arc<dyn Storage>> {
    let storage = RealStorage::new(data_dir)?;
    if staging.path == data_dir.join("journal") {
        return Ok(Arc::new(storage));
    }
    Ok(Arc::new(storage.with_journal(&staging.path)?))
}

/// The set-up; `retain` on the side whose records are shipped.
#[must_use]
pub fn store_config(
    pool: &config::PoolConfig,
    staging: &config::StagingConfig,
    checkpoint: &config::CheckpointConfig,
    retain: bool,
) -> StoreConfig {
    let capacity_bytes = staging.capacity_bytes.max(4 * JOURNAL_FILE_BYTES.0);
    let file_bytes = (capacity_bytes / 16).clamp(JOURNAL_FILE_BYTES.0, JOURNAL_FILE_BYTES.1) & !511;
    let mut devices: Vec<DeviceConfig> = pool
        .devices
        .iter()
        .map(|device| DeviceConfig {
            path: device.path.to_string_lossy().into_owned(),
            size_bytes: device.size_bytes,
            max_bytes: Some(pool.max_bytes),
        })
        .collect();
    if devices.is_empty() {
        devices.push(DeviceConfig { path: DEFAULT_DEVICE.into(), size_bytes: None, max_bytes: Some(pool.max_bytes) });
    }
    StoreConfig {
        journal: JournalConfig {
            capacity_bytes,
            file_bytes,
            reserve_bytes: (capacity_bytes / 16).min(RESERVE_BYTES_MAX),
            max_batch_bytes: BATCH_BYTES,
        },
        pool: PoolConfig {
            segment_bytes: u32::try_from(pool.segment_bytes).expect("checked with the settings"),
            devices,
            map_cache_bytes: usize::try_from(pool.cache_bytes).unwrap_or(usize::MAX),
        },
        checkpoint_bytes: checkpoint.bytes,
        tail_bytes: TAIL_BYTES,
        reference_bytes: REFERENCE_BYTES,
        apply_bytes: APPLY_BYTES,
        drain_bytes_per_s: pool.drain_bytes_per_s,
        levels: pool.levels,
        pending_bytes: PENDING_BYTES,
        retain,
        lanes: Lanes::default(),
    }
}
