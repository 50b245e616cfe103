//! A small primary for tests of one thread, whose stages run when they are called.

use std::sync::Arc;

use super::{Change, Levels, Role, Store, StoreConfig};
use crate::{
    journal::JournalConfig,
    lane::Lanes,
    pool::{DeviceConfig, PoolConfig},
    record::{Control, block_crcs},
    storage::Storage,
    types::{AckRule, AwayRule, BlockSize, GroupId, Uid, VolumeId, VolumeSpec},
};

/// Bytes of a block.
const BLOCK: u32 = 512;

fn config(devices: u32) -> StoreConfig {
    let device = |n| DeviceConfig { path: format!("pool-{n}"), size_bytes: Some(2 << 20), max_bytes: None };
    StoreConfig {
        journal: JournalConfig {
            capacity_bytes: 256 << 10,
            file_bytes: 32 << 10,
            reserve_bytes: 32 << 10,
            max_batch_bytes: 16 << 10,
        },
        pool: PoolConfig {
            segment_bytes: 64 << 10,
            devices: (0..devices).map(device).collect(),
            map_cache_bytes: 1 << 20,
        },
        checkpoint_bytes: 64 << 10,
        tail_bytes: 64 << 10,
        reference_bytes: usize::MAX,
        apply_bytes: 64 << 10,
        drain_bytes_per_s: 0,
        levels: Levels::default(),
        pending_bytes: 1 << 20,
        retain: true,
        lanes: Lanes::default(),
    }
}

/// A new primary.
pub(super) fn open(storage: Arc<dyn Storage>, devices: u32) -> Arc<Store> {
    let mut ids = (1..).map(|n| Uid([n; 16]));
    super::open(storage, config(devices), Role::Primary, &mut || ids.next().unwrap()).unwrap().0
}

/// A volume of 1 MiB, which is a group of its own.
pub(super) fn create(store: &Store, id: u64) {
    let spec = VolumeSpec {
        id: VolumeId(id),
        name: format!("v{id}"),
        group: GroupId(id),
        group_name: format!("v{id}"),
        size_bytes: 1 << 20,
        block_size: BlockSize::new(BLOCK).unwrap(),
        segment_bytes: 64 << 10,
        ack: AckRule::Staged,
        away: AwayRule::Degrade,
    };
    store.submit_control(spec.group, Control::CreateVolume { spec, fill: None }, 1).unwrap();
    commit(store);
}

/// Until all is durable and applied.
pub(super) fn commit(store: &Store) {
    while let Some(job) = store.take_batch() {
        let result = job.run();
        store.finish_batch(job, result);
    }
    while let Some(mut job) = store.take_apply() {
        let result = job.run();
        store.finish_apply(job, result);
    }
}

/// Writes a block of one byte, durably.
pub(super) fn write(store: &Store, volume: u64, block: u64, byte: u8) {
    let data = bytes::Bytes::from(vec![byte; BLOCK as usize]);
    let crcs = block_crcs(&data, BlockSize::new(BLOCK).unwrap());
    store.submit(VolumeId(volume), block, Change::Write { data, crcs }, None, 5).unwrap();
    commit(store);
}

/// Takes a checkpoint, to its end.
pub(super) fn checkpoint(store: &Arc<Store>) {
    let job = store.take_checkpoint().unwrap();
    let result = job.run();
    store.finish_checkpoint(job, result);
}
