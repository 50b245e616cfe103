//! A device of the pool: where its parts lie, its superblock, and how it is made, checked and grown.
//!
//! Layout (`docs/formats.md`, "Pool device"): a 4 KiB superblock page, then zones of a checksum area (512 bytes for
//! each segment) and the segments. Of the superblock only the first 512 bytes carry anything, so that rewriting it when
//! the device grows is atomic. A segment counts as existing once the superblock that covers it is durable.

use std::{
    io::{self, ErrorKind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;

use super::{DeviceConfig, error::DeviceError};
use crate::{
    checksum::{crc32c, is_zero},
    storage::{OpenMode, Storage, StorageFile},
    types::Uid,
};

/// Size of the superblock page.
pub(super) const SUPERBLOCK_BYTES: u64 = PAGE as u64;
const PAGE: usize = 4096;
/// Size of the checksum slot of one segment: one sector, so that it is never torn.
pub(super) const SLOT_BYTES: u64 = 512;
const MAGIC: [u8; 8] = *b"UNDSPOOL";
const VERSION: u32 = 1;
/// Bytes covered by the superblock's checksum.
const SEALED: usize = 64;

/// What a superblock says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Superblock {
    pub pool: Uid,
    pub device: Uid,
    pub number: u16,
    pub segment_bytes: u32,
    pub zone_segments: u32,
    /// Segments whose space is allocated.
    pub segments: u64,
}

impl Superblock {
    pub(super) fn encode(&self) -> [u8; PAGE] {
        let mut out = [0; PAGE];
        out[0..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..28].copy_from_slice(&self.pool.0);
        out[28..44].copy_from_slice(&self.device.0);
        out[44..46].copy_from_slice(&self.number.to_le_bytes());
        out[48..52].copy_from_slice(&self.segment_bytes.to_le_bytes());
        out[52..56].copy_from_slice(&self.zone_segments.to_le_bytes());
        out[56..64].copy_from_slice(&self.segments.to_le_bytes());
        let crc = crc32c(&out[..SEALED]);
        out[SEALED..SEALED + 4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub(super) fn decode(page: &[u8; PAGE]) -> Result<Self, &'static str> {
        let part = |at: usize, len: usize| &page[at..at + len];
        let u32_at = |at| u32::from_le_bytes(part(at, 4).try_into().expect("4 bytes"));
        if part(0, 8) != MAGIC {
            return Err("no magic number of a pool device");
        }
        if u32_at(SEALED) != crc32c(&page[..SEALED]) || !is_zero(&page[SEALED + 4..]) {
            return Err("bad checksum");
        }
        if u32_at(8) != VERSION {
            return Err("unknown version");
        }
        let out = Self {
            pool: Uid(part(12, 16).try_into().expect("16 bytes")),
            device: Uid(part(28, 16).try_into().expect("16 bytes")),
            number: u16::from_le_bytes(part(44, 2).try_into().expect("2 bytes")),
            segment_bytes: u32_at(48),
            zone_segments: u32_at(52),
            segments: u64::from_le_bytes(part(56, 8).try_into().expect("8 bytes")),
        };
        let sane = out.segment_bytes.is_power_of_two() && out.zone_segments >= 8 && out.zone_segments.is_multiple_of(8);
        if sane && out.segments < 1 << 48 { Ok(out) } else { Err("impossible sizes") }
    }
}

/// Where the parts of a device lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub segment_bytes: u64,
    pub zone_segments: u64,
}

impl Layout {
    pub(super) fn area_bytes(&self) -> u64 {
        self.zone_segments * SLOT_BYTES
    }

    fn zone_start(&self, zone: u64) -> u64 {
        SUPERBLOCK_BYTES + zone * (self.area_bytes() + self.zone_segments * self.segment_bytes)
    }

    pub(super) fn data_offset(&self, index: u64) -> u64 {
        self.zone_start(index / self.zone_segments)
            + self.area_bytes()
            + index % self.zone_segments * self.segment_bytes
    }

    pub(super) fn slot_offset(&self, index: u64) -> u64 {
        self.zone_start(index / self.zone_segments) + index % self.zone_segments * SLOT_BYTES
    }

    /// Bytes a device with `segments` segments takes.
    pub(super) fn device_bytes(&self, segments: u64) -> u64 {
        segments.checked_sub(1).map_or(SUPERBLOCK_BYTES, |last| self.data_offset(last) + self.segment_bytes)
    }

    /// Segments that fit into `bytes`.
    pub(super) fn segments_in(&self, bytes: u64) -> u64 {
        let zone = self.zone_start(1) - SUPERBLOCK_BYTES;
        let room = bytes.saturating_sub(SUPERBLOCK_BYTES);
        let rest = (room % zone).saturating_sub(self.area_bytes()) / self.segment_bytes;
        room / zone * self.zone_segments + rest
    }
}

/// An open device.
pub(super) struct Device {
    pub path: String,
    pub file: Arc<dyn StorageFile>,
    pub layout: Layout,
    dirty: AtomicBool,
    syncing: Mutex<()>,
}

impl Device {
    fn new(path: &str, file: Arc<dyn StorageFile>, layout: Layout) -> Self {
        file.expect_scattered();
        Self { path: path.to_owned(), file, layout, dirty: AtomicBool::new(false), syncing: Mutex::new(()) }
    }

    /// To be called after a write returned and before its caller asks for a sync.
    pub(super) fn mark_dirty(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    /// Syncs unless nothing was written. Waits for a sync that runs: its result covers the caller's writes only if it
    /// started after them.
    pub(super) fn sync(&self) -> io::Result<()> {
        let _one = self.syncing.lock();
        if self.dirty.swap(false, Ordering::AcqRel) {
            self.file.sync_data().inspect_err(|_| self.dirty.store(true, Ordering::Release))?;
        }
        Ok(())
    }

    /// Allocates the segments `[superblock.segments, segments)`, zeros their checksum areas and makes a superblock that
    /// covers them durable.
    pub(super) fn extend(&self, superblock: &Superblock, segments: u64) -> io::Result<()> {
        self.allocate(superblock, segments)?;
        self.commit(superblock, segments)
    }

    /// The first half of [`Device::extend`]: what may fail for want of space, and changes nothing that is in use.
    pub(super) fn allocate(&self, superblock: &Superblock, segments: u64) -> io::Result<()> {
        let (old, new) = (self.layout.device_bytes(superblock.segments), self.layout.device_bytes(segments));
        if !is_block_device(&self.path) {
            self.file.allocate(old, new - old)?;
        }
        let zones =
            superblock.segments.div_ceil(self.layout.zone_segments)..segments.div_ceil(self.layout.zone_segments);
        for zone in zones {
            self.file.write_zeros(self.layout.zone_start(zone), self.layout.area_bytes())?;
        }
        Ok(())
    }

    /// The second half of [`Device::extend`]. A failed sync here may have lost blocks written before.
    pub(super) fn commit(&self, superblock: &Superblock, segments: u64) -> io::Result<()> {
        self.file.sync_data()?;
        self.file.write_all_at(&Superblock { segments, ..*superblock }.encode(), 0)?;
        self.file.sync_data()
    }
}

/// Block devices have their size; everything else is a file that is allocated and may grow.
pub(super) fn is_block_device(path: &str) -> bool {
    path.starts_with("/dev/")
}

/// The directory part of a name of the storage.
fn directory(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| if dir.is_empty() { "/" } else { dir })
}

/// Makes the directory of a new device, durably.
fn make_directory(storage: &dyn Storage, dir: &str) -> io::Result<()> {
    storage.create_dir(dir)?;
    // Whichever of the names above it are new.
    let mut above = dir;
    while !above.is_empty() && above != "/" {
        above = directory(above);
        match storage.sync_dir(above) {
            // Where one may not look nothing was made.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => break,
            synced => synced?,
        }
    }
    Ok(())
}

/// Makes a device. One that carries a superblock of the same pool is made anew: its pool was never finished, or with
/// `present`, the ids of the devices that the pool has, it is none of those. With `present` its directory must exist.
pub(super) fn create(
    storage: &dyn Storage,
    config: &DeviceConfig,
    blank: Superblock,
    present: Option<&[Uid]>,
) -> Result<(Device, u64), DeviceError> {
    let (number, path) = (blank.number, config.path.clone());
    let io_error = |source| DeviceError::Io { number, path: path.clone(), source };
    let layout = Layout { segment_bytes: blank.segment_bytes.into(), zone_segments: blank.zone_segments.into() };
    let block_device = is_block_device(&path);
    if present.is_none() && !block_device && !directory(&path).is_empty() {
        make_directory(storage, directory(&path)).map_err(io_error)?;
    }
    let mode = if block_device { OpenMode::Existing } else { OpenMode::OrCreate };
    let file = storage.open(&path, mode).map_err(io_error)?;
    let length = file.len().map_err(io_error)?;
    let mut page = [0; PAGE];
    let start = usize::try_from(length.min(SUPERBLOCK_BYTES)).expect("at most a page");
    file.read_exact_at(&mut page[..start], 0).map_err(io_error)?;
    let ours = Superblock::decode(&page).ok().filter(|s| s.pool == blank.pool);
    if let Some(found) = ours.filter(|s| present.is_some_and(|present| present.contains(&s.device))) {
        return Err(DeviceError::Present { number, path, found_number: found.number });
    }
    if ours.is_none() && !is_zero(&page) {
        return Err(DeviceError::NotEmpty { number, path });
    }
    let size = match (block_device, config.size_bytes) {
        (true, None) => length,
        (true, Some(size)) if size > length => {
            return Err(DeviceError::TooSmall { number, path, id: blank.device, needed: size, found: length });
        }
        (_, Some(size)) => size,
        (false, None) => config.max_bytes.unwrap_or(u64::MAX).min(layout.device_bytes(layout.zone_segments)),
    };
    let segments = layout.segments_in(size);
    let device = Device::new(&path, file, layout);
    device.extend(&Superblock { segments: 0, ..blank }, segments).map_err(io_error)?;
    if !block_device {
        storage.sync_dir(directory(&path)).map_err(io_error)?;
    }
    Ok((device, segments))
}

/// Opens a device and checks that it is the one that the catalogue names in `expected`.
pub(super) fn open(
    storage: &dyn Storage,
    path: &str,
    expected: &Superblock,
    mode: OpenMode,
) -> Result<(Device, Superblock), DeviceError> {
    let number = expected.number;
    let owned = || path.to_owned();
    let io_error = |source| DeviceError::Io { number, path: path.to_owned(), source };
    let file = match storage.open(path, mode) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Err(DeviceError::Missing { number, path: owned(), expected: expected.device });
        }
        Err(e) => return Err(io_error(e)),
    };
    let found = file.len().map_err(io_error)?;
    let too_small = |needed| DeviceError::TooSmall { number, path: owned(), id: expected.device, needed, found };
    if found < SUPERBLOCK_BYTES {
        return Err(too_small(SUPERBLOCK_BYTES));
    }
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, 0).map_err(io_error)?;
    let damaged = |reason| DeviceError::Superblock { number, path: owned(), expected: expected.device, reason };
    let superblock = Superblock::decode(&page).map_err(damaged)?;
    if superblock.pool != expected.pool || superblock.number == number && superblock.device != expected.device {
        return Err(DeviceError::Foreign {
            number,
            path: owned(),
            expected: expected.device,
            found: superblock.device,
            expected_pool: expected.pool,
            found_pool: superblock.pool,
        });
    }
    if superblock.number != number {
        return Err(DeviceError::Swapped {
            number,
            path: owned(),
            expected: expected.device,
            found: superblock.device,
            found_number: superblock.number,
        });
    }
    if superblock.segment_bytes != expected.segment_bytes || superblock.zone_segments != expected.zone_segments {
        return Err(damaged("other sizes of segments or zones than in the catalogue"));
    }
    let layout = Layout { segment_bytes: expected.segment_bytes.into(), zone_segments: expected.zone_segments.into() };
    let needed = layout.device_bytes(superblock.segments.max(expected.segments));
    if found < needed {
        return Err(too_small(needed));
    }
    if superblock.segments < expected.segments {
        return Err(damaged("an older state than the catalogue's"));
    }
    let device = Device::new(path, file, layout);
    // What a killed process wrote last, as a superblock with more segments, may be in the cache alone; the next checkpoint
    // will build upon it.
    device.mark_dirty();
    Ok((device, superblock))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Superblock {
        Superblock {
            pool: Uid([1; 16]),
            device: Uid([2; 16]),
            number: 3,
            segment_bytes: 65536,
            zone_segments: 1024,
            segments: 5000,
        }
    }

    #[test]
    fn golden_superblock() {
        let page = sample().encode();
        let mut want = b"UNDSPOOL\x01\0\0\0".to_vec();
        want.extend_from_slice(&[1; 16]);
        want.extend_from_slice(&[2; 16]);
        want.extend_from_slice(&[3, 0, 0, 0, 0, 0, 1, 0, 0, 4, 0, 0, 0x88, 0x13, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[..64], want);
        assert_eq!(page[64..68], crc32c(&want).to_le_bytes());
        assert_eq!(Superblock::decode(&page), Ok(sample()));
    }

    #[test]
    fn every_flipped_bit_of_the_superblock_is_detected() {
        let page = sample().encode();
        for bit in 0..page.len() * 8 {
            let mut bad = page;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn parts_of_a_device_lie_one_behind_the_other() {
        let layout = Layout { segment_bytes: 65536, zone_segments: 8 };
        let mut end = SUPERBLOCK_BYTES;
        for index in 0..50 {
            if index % 8 == 0 {
                assert_eq!(layout.slot_offset(index), end);
                end += layout.area_bytes();
            }
            assert_eq!(layout.data_offset(index), end);
            assert_eq!(layout.slot_offset(index), layout.slot_offset(index / 8 * 8) + index % 8 * SLOT_BYTES);
            end += 65536;
            assert_eq!(layout.device_bytes(index + 1), end);
            assert_eq!(layout.segments_in(end), index + 1);
            assert_eq!(layout.segments_in(end - 1), index);
        }
        assert_eq!((layout.device_bytes(0), layout.segments_in(0)), (SUPERBLOCK_BYTES, 0));
    }
}
