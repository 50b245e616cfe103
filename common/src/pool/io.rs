//! Device I/O: plans of writes, reads with verification, syncs. Needs no lock of the pool.
//!
//! The checksum at rest of a block is the CRC32C that came with it, mixed with its volume and number: a block that lies
//! in the wrong place does not verify, and the CRC itself can be had back and served on.
//!
//! The slots are read from the device each time they are changed, not cached here: the kernel must have the page of a
//! slot to write 512 bytes of it, so the read comes from its cache, where one page serves eight segments.

use std::{
    io::{self, IoSlice},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use parking_lot::RwLock;
use smallvec::SmallVec;

use super::{
    device::{Device, SLOT_BYTES},
    error::DeviceError,
    owned::Owned,
    read::Piece,
};
use crate::{
    checksum::crc32c,
    types::{BlockSize, SegmentId, VolumeId},
};

/// Buffers in one vectored write, at most; the kernel takes 1024.
const MAX_VECTORS: usize = 1024;
pub(super) const SLOT: usize = 512;
const _: () = assert!(SLOT as u64 == SLOT_BYTES);

/// A bijection of 64 bits that spreads every input bit (the finaliser of splitmix64).
pub(super) fn scramble(x: u64) -> u64 {
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// What is mixed into the checksum of a block: another value for (nearly) every volume and block.
#[allow(clippy::cast_possible_truncation, reason = "the lower half is as good as the upper")]
pub(super) fn mix(volume: VolumeId, block: u64) -> u32 {
    scramble(block ^ volume.0.wrapping_mul(0x9e37_79b9_7f4a_7c15)) as u32
}

/// Blocks of one segment, one behind the other.
#[derive(Debug)]
pub(super) struct PlannedWrite {
    pub segment: SegmentId,
    /// First slot.
    pub first: u32,
    pub data: Bytes,
    /// Checksums at rest, one for each block.
    pub crcs: SmallVec<[u32; 4]>,
}

/// Device writes that are decided and not yet performed. Of two writes of one block the later counts.
#[derive(Debug, Default)]
pub struct IoPlan {
    writes: Vec<PlannedWrite>,
    bytes: usize,
}

impl IoPlan {
    /// An empty plan.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Bytes of data in it, blocks that are overwritten included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn push(&mut self, write: PlannedWrite) {
        self.bytes += write.data.len();
        self.writes.push(write);
    }
}

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ReadError {
    #[error(
        "block {block} of volume {volume} on device {path} at {offset}: its data does not match its checksum \
         ({found:#010x}, stored {stored:#010x}); restore it from the other side"
    )]
    BadChecksum { volume: VolumeId, block: u64, path: String, offset: u64, found: u32, stored: u32 },
    #[error("volume {volume} on device {path} at {offset}: {source}")]
    Io {
        volume: VolumeId,
        path: String,
        offset: u64,
        #[source]
        source: io::Error,
    },
}

/// The devices by number; `None` for one that was removed.
type Table = Arc<[Option<Arc<Device>>]>;

/// A handle for device I/O. A clone is another handle of the same devices, and sees those that are added.
#[derive(Clone)]
pub struct PoolIo {
    /// Held for as long as it takes to count a reference.
    devices: Arc<RwLock<Table>>,
    poisoned: Arc<AtomicBool>,
}

impl PoolIo {
    pub(super) fn new(devices: Vec<Option<Arc<Device>>>) -> Self {
        Self { devices: Arc::new(RwLock::new(devices.into())), poisoned: Arc::new(AtomicBool::new(false)) }
    }

    /// Makes `device` the one of this number, the next one or one that is there, or takes it away.
    pub(super) fn set_device(&self, number: u16, device: Option<Arc<Device>>) {
        let mut table = self.devices.write();
        let mut devices = table.to_vec();
        let at = usize::from(number);
        if at == devices.len() {
            devices.push(device);
        } else {
            devices[at] = device;
        }
        *table = devices.into();
    }

    fn table(&self) -> Table {
        self.devices.read().clone()
    }

    /// Writes what is planned, sorted by place and joined where it touches, and empties the plan. One call at a time:
    /// two would race for checksum slots.
    ///
    /// # Errors
    /// A device fails, which poisons this handle and its clones for writing; or one did before.
    pub fn perform(&self, plan: &mut IoPlan) -> io::Result<()> {
        if plan.writes.is_empty() {
            return Ok(());
        }
        self.guarded(|| {
            // Stable: later writes of a segment stay behind earlier ones.
            plan.writes.sort_by_key(|w| w.segment);
            let table = self.table();
            write_data(&table, &plan.writes)?;
            write_slots(&table, &plan.writes)
        })?;
        plan.writes.clear();
        plan.bytes = 0;
        Ok(())
    }

    /// Makes everything written before durable.
    ///
    /// # Errors
    /// A sync fails, which poisons this handle and its clones; or one did before.
    pub fn sync_devices(&self) -> io::Result<()> {
        self.guarded(|| self.table().iter().flatten().try_for_each(|d| d.sync()))
    }

    /// True after a failed write or sync.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// Writes the blocks of a segment of [`super::Pool::allocate_reference`] and its checksums, from its start.
    /// `raw_crcs` has the CRC32C of each block. May run beside everything else.
    ///
    /// # Errors
    /// As [`PoolIo::perform`].
    pub fn write_reference(
        &self,
        volume: VolumeId,
        first_block: u64,
        segment: SegmentId,
        data: &[u8],
        raw_crcs: &[u32],
    ) -> io::Result<()> {
        self.guarded(|| {
            let device = self.device(segment)?;
            let mut slot = [0; SLOT];
            for ((block, crc), out) in (first_block..).zip(raw_crcs).zip(slot.chunks_exact_mut(4)) {
                out.copy_from_slice(&(crc ^ mix(volume, block)).to_le_bytes());
            }
            device.file.write_all_at(data, device.layout.data_offset(segment.index()))?;
            device.file.write_all_at(&slot, device.layout.slot_offset(segment.index()))?;
            device.mark_dirty();
            Ok(())
        })
    }

    /// Reads a piece into `out`, which has its size, verifies it, and appends the CRC32C of each block to `raw_crcs`.
    /// A block that is being written in place may fail to verify: resolve and read again.
    ///
    /// # Errors
    /// A device fails, or a block does not match its checksum.
    ///
    /// # Panics
    /// If `out` has another size.
    pub fn read(
        &self,
        volume: VolumeId,
        block_size: BlockSize,
        piece: &Piece,
        out: &mut [u8],
        raw_crcs: &mut Vec<u32>,
    ) -> Result<(), ReadError> {
        let block_bytes = block_size.bytes() as usize;
        assert_eq!(out.len() as u64, piece.count * block_bytes as u64, "the size of the piece");
        let Some(segment) = piece.at else {
            out.fill(0);
            let crc = crc32c(&out[..block_bytes]);
            raw_crcs.extend(std::iter::repeat_n(crc, out.len() / block_bytes));
            return Ok(());
        };
        let failed = |path: &str, offset, source| ReadError::Io { volume, path: path.to_owned(), offset, source };
        let device = self.device(segment).map_err(|e| failed("?", segment.0, e))?;
        let first = piece.first_block % (device.layout.segment_bytes / block_bytes as u64);
        let offset = device.layout.data_offset(segment.index()) + first * block_bytes as u64;
        device.file.read_exact_at(out, offset).map_err(|e| failed(&device.path, offset, e))?;
        let mut slot = [0; SLOT];
        let stored = &mut slot[..4 * (out.len() / block_bytes)];
        let at = device.layout.slot_offset(segment.index()) + 4 * first;
        device.file.read_exact_at(stored, at).map_err(|e| failed(&device.path, at, e))?;
        for (i, (data, stored)) in out.chunks_exact(block_bytes).zip(stored.chunks_exact(4)).enumerate() {
            let block = piece.first_block + i as u64;
            let stored = u32::from_le_bytes(stored.try_into().expect("4 bytes")) ^ mix(volume, block);
            let found = crc32c(data);
            if found != stored {
                let (path, offset) = (device.path.clone(), offset + (i * block_bytes) as u64);
                return Err(ReadError::BadChecksum { volume, block, path, offset, found, stored });
            }
            raw_crcs.push(found);
        }
        Ok(())
    }

    /// Reads block versions from the device and not from the system's cache, and compares each with its checksum: the
    /// numbers of those that differ or cannot be read. `buffer` is kept for the next call.
    pub fn scrub(&self, owned: &Owned, buffer: &mut Vec<u8>) -> Vec<u64> {
        let block_bytes = owned.block_size.bytes() as usize;
        let mut bad = Vec::new();
        let mut read = |first_block: u64, count: u64| {
            buffer.resize(usize::try_from(count).expect("at most a segment") * block_bytes, 0);
            let piece = Piece { first_block, count, at: Some(owned.segment) };
            self.drop_cache(owned, first_block, count);
            self.read(owned.volume, owned.block_size, &piece, buffer, &mut Vec::new()).is_ok()
        };
        for (first, count) in owned.runs() {
            if !read(first, count) {
                bad.extend((first..first + count).filter(|block| !read(*block, 1)));
            }
        }
        bad
    }

    /// Writes a damaged block version anew where it lies, if `data` has the checksum that is stored for it: nothing else does
    /// that the maps could name there. False if it has not. The next checkpoint syncs it; lost before, it is damaged as
    /// before. Keep the applier still, and a read ticket from before `owned` was looked up.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// If `owned` is not one block, or `data` has another size.
    pub fn mend(&self, owned: &Owned, data: &[u8]) -> Result<bool, DeviceError> {
        let block_bytes = owned.block_size.bytes() as usize;
        assert!(owned.blocks.count_ones() == 1 && data.len() == block_bytes, "one block");
        let (index, number) = (owned.segment.index(), owned.segment.device());
        let failed = |path: &str, source| DeviceError::Io { number, path: path.to_owned(), source };
        let device = self.device(owned.segment).map_err(|source| failed("?", source))?;
        let slot = u64::from(owned.blocks.trailing_zeros());
        let mut stored = [0; 4];
        let read = device.file.read_exact_at(&mut stored, device.layout.slot_offset(index) + 4 * slot);
        read.map_err(|source| failed(&device.path, source))?;
        if u32::from_le_bytes(stored) ^ mix(owned.volume, owned.base + slot) != crc32c(data) {
            return Ok(false);
        }
        let offset = device.layout.data_offset(index) + slot * block_bytes as u64;
        let written = self.guarded(|| device.file.write_all_at(data, offset));
        written.map_err(|source| failed(&device.path, source))?;
        device.mark_dirty();
        Ok(true)
    }

    fn drop_cache(&self, owned: &Owned, first_block: u64, count: u64) {
        let Ok(device) = self.device(owned.segment) else { return };
        let (slot, bytes) = (first_block - owned.base, u64::from(owned.block_size.bytes()));
        let index = owned.segment.index();
        // What cannot be dropped is read from the cache.
        let _ = device.file.drop_cache(device.layout.data_offset(index) + slot * bytes, count * bytes);
        let _ = device.file.drop_cache(device.layout.slot_offset(index) + 4 * slot, 4 * count);
    }

    /// Runs `run` unless an earlier write or sync failed; an error of it is the last thing this pool does.
    pub(super) fn guarded<T>(&self, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.is_poisoned() {
            return Err(io::Error::other("an earlier write or sync of the pool failed; restart the node"));
        }
        run().inspect_err(|_| self.poisoned.store(true, Ordering::Release))
    }

    pub(super) fn device(&self, segment: SegmentId) -> io::Result<Arc<Device>> {
        let device = self.devices.read().get(usize::from(segment.device())).cloned().flatten();
        device.ok_or_else(|| absent(segment))
    }
}

fn absent(segment: SegmentId) -> io::Error {
    io::Error::other(format!("device {} does not exist", segment.device()))
}

fn find(table: &[Option<Arc<Device>>], segment: SegmentId) -> io::Result<&Device> {
    table.get(usize::from(segment.device())).and_then(Option::as_deref).ok_or_else(|| absent(segment))
}

fn write_data(table: &[Option<Arc<Device>>], writes: &[PlannedWrite]) -> io::Result<()> {
    let mut batch = Batch::default();
    for group in writes.chunk_by(|a, b| a.segment == b.segment) {
        let device = find(table, group[0].segment)?;
        let start = device.layout.data_offset(group[0].segment.index());
        if let [one] = group {
            batch.add(device, start + u64::from(one.first) * block_bytes(one) as u64, &one.data)?;
            continue;
        }
        // The last write of each slot, by number in the group.
        let mut last = [u32::MAX; 128];
        for (i, write) in group.iter().enumerate().rev() {
            for slot in last[write.first as usize..].iter_mut().take(write.crcs.len()) {
                if *slot == u32::MAX {
                    *slot = u32::try_from(i).expect("a plan fits into memory");
                }
            }
        }
        let mut slot = 0;
        while slot < last.len() {
            let Some(write) = group.get(last[slot] as usize) else {
                slot += 1;
                continue;
            };
            let run = last[slot..].iter().take_while(|n| **n == last[slot]).count();
            let bytes = block_bytes(write);
            let from = (slot - write.first as usize) * bytes;
            batch.add(device, start + (slot * bytes) as u64, &write.data[from..from + run * bytes])?;
            slot += run;
        }
    }
    batch.flush()
}

/// One read and write for each row of neighbouring slots.
fn write_slots(table: &[Option<Arc<Device>>], writes: &[PlannedWrite]) -> io::Result<()> {
    let mut slots = Vec::new();
    let mut rest = writes;
    while let Some(first) = rest.first() {
        let device = find(table, first.segment)?;
        let in_zone = device.layout.zone_segments - first.segment.index() % device.layout.zone_segments;
        let mut next = first.segment.0;
        let len = rest
            .iter()
            .take_while(|w| {
                let joins = w.segment.0 <= next && w.segment.0 - first.segment.0 < in_zone;
                next = w.segment.0 + 1;
                joins
            })
            .count();
        let (row, others) = rest.split_at(len);
        let count = row[row.len() - 1].segment.0 - first.segment.0 + 1;
        slots.resize(usize::try_from(count).expect("at most a zone") * SLOT, 0);
        let offset = device.layout.slot_offset(first.segment.index());
        device.file.read_exact_at(&mut slots, offset)?;
        for write in row {
            let nth = usize::try_from(write.segment.0 - first.segment.0).expect("at most a zone");
            let at = nth * SLOT + 4 * write.first as usize;
            let out = &mut slots[at..at + 4 * write.crcs.len()];
            for (out, crc) in out.chunks_exact_mut(4).zip(&write.crcs) {
                out.copy_from_slice(&crc.to_le_bytes());
            }
        }
        device.file.write_all_at(&slots, offset)?;
        device.mark_dirty();
        rest = others;
    }
    Ok(())
}

fn block_bytes(write: &PlannedWrite) -> usize {
    write.data.len() / write.crcs.len()
}

/// Buffers that lie one behind the other on one device.
#[derive(Default)]
struct Batch<'a> {
    device: Option<&'a Device>,
    start: u64,
    end: u64,
    buffers: Vec<IoSlice<'a>>,
}

impl<'a> Batch<'a> {
    fn add(&mut self, device: &'a Device, offset: u64, data: &'a [u8]) -> io::Result<()> {
        let same = self.device.is_some_and(|d| std::ptr::eq(d, device));
        if !same || offset != self.end || self.buffers.len() == MAX_VECTORS {
            self.flush()?;
            (self.device, self.start, self.end) = (Some(device), offset, offset);
        }
        self.end += data.len() as u64;
        self.buffers.push(IoSlice::new(data));
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let Some(device) = self.device.filter(|_| !self.buffers.is_empty()) else { return Ok(()) };
        match &mut self.buffers[..] {
            [one] => device.file.write_all_at(one, self.start)?,
            several => device.file.write_vectored_at(several, self.start)?,
        }
        device.mark_dirty();
        self.buffers.clear();
        Ok(())
    }
}
