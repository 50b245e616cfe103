//! Making, opening and damaging devices.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    super::{testing::MemStorage, *},
    model::spec,
};
use crate::{
    checksum::crc32c,
    types::{BlockSize, LayerId, Uid, VolumeId},
};

const UID: Uid = Uid([9; 16]);
const SIZE: u64 = 4096 + 8 * 512 + 8 * 65536;

fn config(paths: &[&str]) -> PoolConfig {
    let device = |p: &&str| DeviceConfig { path: (*p).to_owned(), size_bytes: Some(SIZE), max_bytes: None };
    PoolConfig { segment_bytes: 65536, devices: paths.iter().map(device).collect(), map_cache_bytes: 1 << 20 }
}

struct Made {
    storage: Arc<MemStorage>,
    catalog: Catalog,
    pool: Pool,
}

fn made(uid: Uid, paths: &[&str]) -> Made {
    let storage = MemStorage::new();
    let catalog = Catalog::open(&*storage, 1 << 20).unwrap();
    let pool = Pool::create_with_zones(storage.clone(), &catalog, uid, &config(paths), 8).unwrap();
    Made { storage, catalog, pool }
}

fn open(made: &Made, paths: &[&str]) -> Result<Pool, PoolError> {
    Pool::open(made.storage.clone(), &made.catalog, UID, &config(paths))
}

fn device_error(result: Result<Pool, PoolError>) -> DeviceError {
    match result {
        Err(PoolError::Device(e)) => e,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it opened"),
    }
}

#[test]
fn wrong_devices_are_told_apart() {
    let m = made(UID, &["pool/a", "pool/b"]);
    assert_eq!(open(&m, &["pool/a", "pool/b"]).unwrap().space().free(), 16);
    assert!(matches!(device_error(open(&m, &["pool/a", "pool/c"])), DeviceError::Missing { number: 1, .. }));
    let swapped = device_error(open(&m, &["pool/b", "pool/a"]));
    assert!(matches!(&swapped, DeviceError::Swapped { number: 0, found_number: 1, .. }));
    let text = swapped.to_string();
    assert!(text.contains("pool/b") && text.contains(&device_uid(UID, 0).to_string()), "{text}");
    assert!(text.contains(&device_uid(UID, 1).to_string()), "{text}");

    let whole = m.storage.contents("pool/b");
    let other = made(Uid([8; 16]), &["pool/a", "pool/b"]);
    m.storage.set_contents("pool/b", other.storage.contents("pool/b"));
    assert!(matches!(device_error(open(&m, &["pool/a", "pool/b"])), DeviceError::Foreign { number: 1, .. }));
    m.storage.set_contents("pool/b", whole[..whole.len() - 1].to_vec());
    assert!(matches!(device_error(open(&m, &["pool/a", "pool/b"])), DeviceError::TooSmall { number: 1, .. }));
    let mut bad = whole.clone();
    bad[20] ^= 1;
    m.storage.set_contents("pool/b", bad);
    assert!(matches!(device_error(open(&m, &["pool/a", "pool/b"])), DeviceError::Superblock { number: 1, .. }));
    m.storage.set_contents("pool/b", whole);
    assert!(open(&m, &["pool/a", "pool/b"]).is_ok());

    let foreign = Pool::open(m.storage.clone(), &m.catalog, Uid([8; 16]), &config(&["pool/a", "pool/b"]));
    assert!(matches!(foreign, Err(PoolError::ForeignCatalog { .. })));
    assert!(matches!(open(&m, &["pool/a"]), Err(PoolError::Config(_))));
}

#[test]
fn foreign_data_is_not_overwritten() {
    let storage = MemStorage::new();
    storage.set_contents("pool/a", vec![1; 9000]);
    let catalog = Catalog::open(&*storage, 1 << 20).unwrap();
    let refused = Pool::create(storage.clone(), &catalog, UID, &config(&["pool/a"]));
    assert!(matches!(device_error(refused), DeviceError::NotEmpty { .. }));
    assert_eq!(storage.contents("pool/a"), vec![1; 9000]);
    assert!(matches!(Pool::open(storage, &catalog, UID, &config(&["pool/a"])), Err(PoolError::NoPool)));
}

fn write(m: &mut Made, volume: u64, block: u64, data: &[u8]) {
    let mut plan = IoPlan::new();
    let crcs: Vec<_> = data.chunks(4096).map(crc32c).collect();
    m.pool.plan_write(VolumeId(volume), block, &Bytes::copy_from_slice(data), &crcs, &mut plan).unwrap();
    m.pool.io().perform(&mut plan).unwrap();
    assert!(plan.is_empty());
}

fn read(m: &mut Made, volume: u64, block: u64) -> Result<Vec<u8>, ReadError> {
    let mut pieces = Vec::new();
    m.pool.resolve(VolumeId(volume), None, block, 1, &mut pieces).unwrap();
    let (mut out, mut crcs) = (vec![9; 4096], Vec::new());
    m.pool.io().read(VolumeId(volume), BlockSize::new(4096).unwrap(), &pieces[0], &mut out, &mut crcs)?;
    Ok(out)
}

#[test]
fn every_flipped_byte_of_data_or_slot_is_detected() {
    let mut m = made(UID, &["pool/a"]);
    m.pool.create_volume(&spec(1, 4096, 1 << 20)).unwrap();
    write(&mut m, 1, 3, &[5; 4096]);
    assert_eq!(read(&mut m, 1, 3).unwrap(), [5; 4096]);
    assert_eq!(read(&mut m, 1, 4).unwrap(), [0; 4096]);
    let mut pieces = Vec::new();
    m.pool.resolve(VolumeId(1), None, 3, 1, &mut pieces).unwrap();
    let index = pieces[0].at.unwrap().index();
    let data = usize::try_from(m.pool.layout.data_offset(index)).unwrap() + 3 * 4096;
    let slot = usize::try_from(m.pool.layout.slot_offset(index)).unwrap() + 3 * 4;
    let file = m.pool.members[0].device.as_ref().unwrap().file.clone();
    for at in (data..data + 4096).chain(slot..slot + 4) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at as u64).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at as u64).unwrap();
        assert!(matches!(read(&mut m, 1, 3), Err(ReadError::BadChecksum { block: 3, .. })), "byte {at}");
        file.write_all_at(&byte, at as u64).unwrap();
    }
    assert!(read(&mut m, 1, 3).is_ok());
}

#[test]
fn a_block_in_another_place_does_not_verify() {
    let mut m = made(UID, &["pool/a"]);
    m.pool.create_volume(&spec(1, 4096, 1 << 20)).unwrap();
    m.pool.create_volume(&spec(2, 4096, 1 << 20)).unwrap();
    write(&mut m, 1, 0, &[5; 4096]);
    let mut pieces = Vec::new();
    m.pool.resolve(VolumeId(1), None, 0, 1, &mut pieces).unwrap();
    let (io, size) = (m.pool.io(), BlockSize::new(4096).unwrap());
    let mut out = vec![0; 4096];
    io.read(VolumeId(1), size, &pieces[0], &mut out, &mut Vec::new()).unwrap();
    assert!(io.read(VolumeId(2), size, &pieces[0], &mut out, &mut Vec::new()).is_err());
    let other = Piece { first_block: 16, ..pieces[0] };
    assert!(io.read(VolumeId(1), size, &other, &mut out, &mut Vec::new()).is_err());
}

#[test]
fn flipped_bytes_in_the_catalogues_blobs_are_detected() {
    let mut m = made(UID, &["pool/a"]);
    m.pool.create_volume(&spec(1, 4096, 1 << 20)).unwrap();
    write(&mut m, 1, 0, &[5; 4096]);
    let capture = m.pool.capture();
    m.catalog.write(|txn| capture.write_into(txn)).unwrap();
    m.pool.checkpoint_done(capture.id());
    assert_eq!(m.pool.dirty_chunks(), 0);
    let mut reopened = open(&m, &["pool/a"]).unwrap();
    assert_eq!(reopened.segment_states(), m.pool.segment_states());
    let mut pieces = Vec::new();
    reopened.resolve(VolumeId(1), None, 0, 1, &mut pieces).unwrap();

    let chunk = m.catalog.read().unwrap().chunk(1, 0, <[u8]>::to_vec).unwrap().unwrap();
    for at in 0..chunk.len() {
        let mut bad = chunk.clone();
        bad[at] ^= 1;
        m.catalog.write(|txn| txn.put_chunk(1, 0, &bad)).unwrap();
        let result = open(&m, &["pool/a"]).unwrap().resolve(VolumeId(1), None, 0, 1, &mut pieces);
        assert!(matches!(result, Err(PoolError::Map { tree: 1, chunk: 0, .. })));
    }
    m.catalog.write(|txn| txn.put_counts(0, 0, &[0; 4100])).unwrap();
    assert!(matches!(open(&m, &["pool/a"]), Err(PoolError::Counts { device: 0, page: 0 })));
}

#[test]
fn a_failed_sync_poisons_the_devices() {
    let mut m = made(UID, &["pool/a"]);
    m.pool.create_volume(&spec(1, 4096, 1 << 20)).unwrap();
    write(&mut m, 1, 0, &[5; 4096]);
    m.storage.fail_syncs(true);
    let io = m.pool.io();
    assert!(io.sync_devices().is_err());
    m.storage.fail_syncs(false);
    assert!(io.sync_devices().is_err() && m.pool.io().is_poisoned());
}

#[test]
fn writes_without_snapshots_stay_in_place_and_snapshots_cost_touched_blocks_only() {
    let mut m = made(UID, &["pool/a"]);
    m.pool.create_volume(&spec(1, 4096, 1 << 20)).unwrap();
    for i in 0..10 {
        write(&mut m, 1, 0, &[i; 65536]);
    }
    assert_eq!(m.pool.space().free(), 7);
    m.pool.create_snapshot(VolumeId(1), LayerId(1)).unwrap();
    for i in 0..10 {
        write(&mut m, 1, 2, &[i; 4096]);
        write(&mut m, 1, 9, &[i; 4096]);
    }
    assert_eq!(m.pool.space().free(), 6, "one segment for all displaced blocks");
    assert!(matches!(m.pool.create_snapshot(VolumeId(1), LayerId(1)), Err(PoolError::SnapshotExists(_))));
    assert!(matches!(m.pool.roll_back(VolumeId(1), LayerId(2)), Err(PoolError::NoSnapshot(_))));
    m.pool.create_snapshot(VolumeId(1), LayerId(2)).unwrap();
    assert!(matches!(m.pool.roll_back(VolumeId(1), LayerId(1)), Err(PoolError::NotNewest { .. })));
}

#[test]
fn a_full_pool_refuses_with_numbers() {
    let mut m = made(UID, &["pool/a"]);
    m.pool.create_volume(&spec(1, 4096, 1 << 20)).unwrap();
    write(&mut m, 1, 0, &[1; 8 * 65536]);
    let mut plan = IoPlan::new();
    let data = Bytes::from(vec![1; 4096]);
    let refused = m.pool.plan_write(VolumeId(1), 200, &data, &[crc32c(&data)], &mut plan);
    assert!(matches!(refused, Err(PoolError::NoSpace(NoSpace { needed: 1, free: 0, can_grow: 0, .. }))));
    m.pool.plan_zero(VolumeId(1), 0, 16).unwrap();
    assert_eq!((m.pool.space().free(), m.pool.space().quarantined()), (0, 1));
    let capture = m.pool.capture();
    m.catalog.write(|txn| capture.write_into(txn)).unwrap();
    m.pool.checkpoint_done(capture.id());
    m.pool.plan_write(VolumeId(1), 200, &data, &[crc32c(&data)], &mut plan).unwrap();
    assert!(matches!(
        m.pool.plan_write(VolumeId(1), 255, &Bytes::from(vec![1; 8192]), &[0, 0], &mut plan),
        Err(PoolError::Range { first: 255, count: 2, blocks: 256, .. })
    ));
    assert!(matches!(m.pool.plan_zero(VolumeId(3), 0, 1), Err(PoolError::NoVolume(VolumeId(3)))));
}

fn checkpoint(m: &mut Made) {
    let capture = m.pool.capture();
    m.pool.io().sync_devices().unwrap();
    m.catalog.write(|txn| capture.write_into(txn)).unwrap();
    m.pool.checkpoint_done(capture.id());
}

fn add(m: &mut Made, path: &str, size_bytes: u64) -> Result<u16, MemberError> {
    let config = DeviceConfig { path: path.into(), size_bytes: Some(size_bytes), max_bytes: None };
    let new = m.pool.new_device(config)?;
    match new.make() {
        Ok(made) => Ok(m.pool.attach(new, made)),
        Err(error) => {
            m.pool.abandon(new);
            Err(error)
        }
    }
}

fn relocate_all(m: &mut Made) -> Vec<MovedDamage> {
    let mut damaged = Vec::new();
    for _ in 0..100 {
        if let Some(mut job) = m.pool.plan_relocation(4).unwrap() {
            job.run().unwrap();
            m.pool.finish_relocation(&job).unwrap();
            damaged.extend(job.damaged());
        }
    }
    damaged
}

#[test]
fn a_device_is_added_and_another_drained_and_both_are_known_again() {
    let mut m = made(UID, &["pool/a"]);
    m.pool.create_volume(&spec(1, 4096, 1 << 20)).unwrap();
    write(&mut m, 1, 0, &[5; 3 * 65536]);
    m.pool.create_snapshot(VolumeId(1), LayerId(1)).unwrap();
    write(&mut m, 1, 7, &[6; 4096]);
    assert!(matches!(m.pool.drain("pool/a"), Err(MemberError::Last { .. })));
    assert!(matches!(m.pool.drain("pool/x"), Err(MemberError::Unknown { .. })));

    assert_eq!(add(&mut m, "pool/b", SIZE).unwrap(), 1);
    assert_eq!((m.pool.space().total(), m.pool.standing(1)), (8, Some(DeviceStanding::Joining)));
    assert!(matches!(add(&mut m, "pool/b", SIZE), Err(MemberError::InUse { number: 1, .. })));
    assert!(matches!(m.pool.drain("pool/b"), Err(MemberError::Standing { .. })));
    checkpoint(&mut m);
    assert_eq!((m.pool.space().total(), m.pool.standing(1)), (16, Some(DeviceStanding::Serving)));
    assert_eq!(open(&m, &["pool/a"]).unwrap().space().total(), 16, "it is opened by the path that is known");

    m.pool.drain("pool/a").unwrap();
    assert_eq!((m.pool.space().free(), m.pool.space().retired()), (8, 4));
    checkpoint(&mut m);
    assert_eq!(open(&m, &["pool/a"]).unwrap().standing(0), Some(DeviceStanding::Draining));
    assert!(relocate_all(&mut m).is_empty());
    assert_eq!(m.pool.devices()[0].live, 0);
    assert!(m.pool.tend_devices(), "a checkpoint is to cover that they were left");
    assert_eq!(m.pool.standing(0), Some(DeviceStanding::Draining));
    checkpoint(&mut m);
    assert!(m.pool.tend_devices());
    assert_eq!(m.pool.standing(0), Some(DeviceStanding::Removing));
    assert!(m.pool.take_removed().is_empty(), "it is not removed before that is durable");
    checkpoint(&mut m);
    let removed = m.pool.take_removed();
    assert_eq!((removed[0].number, removed[0].path.as_str()), (0, "pool/a"));
    removed[0].wipe().unwrap();
    assert_eq!(m.pool.devices()[0].standing, DeviceStanding::Removing);
    m.pool.on_wiped(0);
    assert_eq!(m.pool.devices()[0].standing, DeviceStanding::Removed);
    assert_eq!(m.storage.contents("pool/a")[..4096], [0; 4096]);
    m.storage.remove("pool/a").unwrap();
    assert!(!m.pool.has_changing_devices());
    assert_eq!(read(&mut m, 1, 7).unwrap(), [6; 4096]);
    let mut reopened = open(&m, &["pool/a"]).unwrap();
    assert_eq!(reopened.segment_states(), m.pool.segment_states());
    let mut pieces = Vec::new();
    reopened.resolve(VolumeId(1), Some(LayerId(1)), 7, 1, &mut pieces).unwrap();
    assert_eq!(pieces[0].at.unwrap().device(), 1);

    // The number of the removed device is not used again.
    assert_eq!(add(&mut m, "pool/a", SIZE).unwrap(), 2);
    checkpoint(&mut m);
    assert_eq!(open(&m, &["pool/a"]).unwrap().space().total(), 16);
}

#[test]
fn adding_is_refused_with_the_reason() {
    let mut m = made(UID, &["pool/a"]);
    m.storage.set_contents("pool/foreign", vec![1; 9000]);
    let refused = add(&mut m, "pool/foreign", SIZE);
    assert!(matches!(refused, Err(MemberError::Device(DeviceError::NotEmpty { .. }))));
    assert_eq!(m.storage.contents("pool/foreign"), vec![1; 9000]);
    let needed = 4096 + 8 * 512 + 65536;
    let refused = add(&mut m, "pool/b", needed - 1);
    assert!(matches!(refused, Err(MemberError::TooSmall { needed_bytes, .. }) if needed_bytes == needed));
    // The same device under another path.
    m.storage.set_contents("pool/link", m.storage.contents("pool/a"));
    let refused = add(&mut m, "pool/link", SIZE);
    assert!(matches!(refused, Err(MemberError::Device(DeviceError::Present { found_number: 0, .. }))));
    assert!(matches!(add(&mut m, "/dev/none", SIZE), Err(MemberError::NoBlockDevice { .. })));
    let new = m.pool.new_device(DeviceConfig { path: "pool/b".into(), size_bytes: None, max_bytes: None }).unwrap();
    assert!(matches!(add(&mut m, "pool/c", SIZE), Err(MemberError::Busy)));
    m.pool.abandon(new);

    // Made, and lost in a crash before the pool knew it: it can be added again, and another one can get its number.
    let config = DeviceConfig { path: "pool/lost".into(), size_bytes: Some(SIZE), max_bytes: None };
    let new = m.pool.new_device(config).unwrap();
    drop(new.make().unwrap());
    m.pool.abandon(new);
    assert_eq!(add(&mut m, "pool/b", needed).unwrap(), 1);
    assert_eq!(add(&mut m, "pool/lost", needed).unwrap(), 2);
}

#[test]
fn a_drain_that_finds_no_room_is_refused_with_both_numbers() {
    let mut m = made(UID, &["pool/a", "pool/b"]);
    m.pool.create_volume(&spec(1, 4096, 1 << 20)).unwrap();
    write(&mut m, 1, 0, &[5; 10 * 65536]);
    let Err(MemberError::NoRoom { needed_bytes, available_bytes, .. }) = m.pool.drain("pool/a") else {
        panic!("it was not refused");
    };
    let of = |number: usize| m.pool.devices()[number].clone();
    assert_eq!((needed_bytes, available_bytes), (of(0).live * 65536, of(1).free * 65536));
    m.pool.plan_zero(VolumeId(1), 0, 48).unwrap();
    checkpoint(&mut m);
    let promised = m.pool.space().reserve(m.pool.space().free()).unwrap();
    assert!(matches!(m.pool.drain("pool/a"), Err(MemberError::NoRoom { .. })));
    drop(promised);
    m.pool.drain("pool/a").unwrap();
    m.pool.cancel_drain("pool/a").unwrap();
    let free = m.pool.space().free();
    checkpoint(&mut m);
    assert!(m.pool.space().free() > free, "it gives segments away when that is durable");
}

/// Blocks whose data, or whose checksum, was damaged are damaged where they come to lie, and no others.
pub(super) fn moved_damage() {
    let mut m = made(UID, &["pool/a"]);
    m.pool.create_volume(&spec(1, 4096, 1 << 20)).unwrap();
    write(&mut m, 1, 0, &[5; 65536]);
    let mut pieces = Vec::new();
    m.pool.resolve(VolumeId(1), None, 3, 1, &mut pieces).unwrap();
    let index = pieces[0].at.unwrap().index();
    let file = m.pool.members[0].device.as_ref().unwrap().file.clone();
    file.write_all_at(&[9], m.pool.layout.data_offset(index) + 3 * 4096 + 17).unwrap();
    file.write_all_at(&[9], m.pool.layout.slot_offset(index) + 4 * 6).unwrap();
    add(&mut m, "pool/b", SIZE).unwrap();
    checkpoint(&mut m);
    m.pool.drain("pool/a").unwrap();
    let damaged: Vec<_> = relocate_all(&mut m).iter().map(|d| (d.block, d.owned.segment.device())).collect();
    assert_eq!(damaged, [(3, 1), (6, 1)]);
    for block in 0..16 {
        let read = read(&mut m, 1, block);
        assert_eq!(read.is_err(), [3, 6].contains(&block), "block {block}");
    }
}

#[test]
fn damage_stays_damage_when_it_is_moved() {
    moved_damage();
}
