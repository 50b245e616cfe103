//! Writable clones of the image, to try a failover on while replication goes on.
//!
//! A clone is a base and what was written on top of it. The base is a layer of its own, as that of a reader: a record
//! that copies nothing, and that nothing of the primary deletes. What is written goes to a sparse file that has no name,
//! so it is gone with the process, however that ends; the layer goes at the next start, as those of readers do.
//!
//! Invariants:
//! - Nothing of a clone is a record but the making and the end of its layer: no position, mark or block of the replica
//!   depends on it.
//! - A block is written, zero, or that of the base; the first two exclude each other.
//! - What all clones have written is at most `clones.capacity`, counted before it is written.
//! - Replication comes first: writes are refused while the pool or the file system is short, and the clones are discarded
//!   when a record or a run lacks the space that their bases hold.
//!
//! Layout of the file: the blocks at their offset, and behind the end of the volume a CRC32C of each, little-endian.
//!
//! Deliberately absent: durability.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use parking_lot::{Mutex, RwLock};
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use understudy_common::{
    checksum::crc32c,
    delta::BlockSet,
    events::EventLog,
    record::{self, ClientSequence},
    state::{NodeState, SequenceCheck},
    store::{ImageReader, ReadFailure, Store},
    telemetry::Metrics,
    types::{AckRule, AwayRule, Lsn, VolumeId, VolumeSpec},
};
use understudy_proto::{convert, v1};

use crate::{
    api::{NodeError, PieceContent, VolumeKey},
    node::unix_ms,
};

/// Clones at one time. Each holds one of the layers that readers may hold.
pub const CLONES_MAX: usize = 8;
/// Ids of clones: above those of volumes.
const IDS_FROM: u64 = 1 << 63;
/// Share of the pool, counted with what it can grow by, that writes to clones leave free.
const POOL_SHARE: u64 = 16;
/// Share of the file system that they leave free, and the most of it.
const DISK_SHARE: u64 = 32;
const DISK_LEFT_MAX: u64 = 1 << 30;
/// Blocks whose checksums are read in one step.
const STEP_BLOCKS: u64 = 4096;

/// What a write does.
#[derive(Debug, Clone)]
pub enum CloneChange {
    /// Bytes, and their CRC32C.
    Data(Bytes, Option<u32>),
    /// So many bytes of zeros, to the byte.
    Zeroes(u64),
    /// The whole blocks inside so many bytes.
    Discard(u64),
}

/// A write to a clone.
#[derive(Debug, Clone)]
pub struct CloneWrite {
    /// The clone.
    pub volume: VolumeKey,
    /// In bytes.
    pub offset_bytes: u64,
    /// What.
    pub change: CloneChange,
    /// Whose request it is.
    pub client: Option<ClientSequence>,
}

/// What a clone has of its own.
struct Own {
    written: BlockSet,
    zero: BlockSet,
    /// Only its clients are used: what they did here.
    clients: NodeState,
}

/// One clone.
pub struct CloneVolume {
    spec: VolumeSpec,
    base: ImageReader,
    /// Name of its snapshot; empty: the image.
    snapshot: String,
    /// The volume of the replica.
    of: String,
    /// The primary's time of the base, Unix milliseconds.
    time_unix_ms: i64,
    made_unix_ms: i64,
    own: RwLock<Own>,
    file: File,
    /// Bytes of every clone.
    used: Arc<AtomicU64>,
}

struct Made {
    next: u64,
    by_name: BTreeMap<String, Arc<CloneVolume>>,
}

struct Inner {
    store: Arc<Store>,
    /// Where the files are; none in a simulation.
    dir: Option<PathBuf>,
    capacity_bytes: u64,
    used: Arc<AtomicU64>,
    made: Mutex<Made>,
    /// The newest record when clones gave way: their layers are gone when it is applied.
    gave_way: AtomicU64,
    /// Refused for space, and told; until one is taken again.
    refusing: AtomicBool,
    events: EventLog,
    metrics: Metrics,
}

/// The clones of a backup. Cheap to clone.
#[derive(Clone)]
pub struct Clones {
    inner: Arc<Inner>,
}

impl Clones {
    /// None yet. `dir` is the data directory; without one none can be made.
    #[must_use]
    pub fn new(
        store: Arc<Store>,
        dir: Option<PathBuf>,
        capacity_bytes: u64,
        events: EventLog,
        metrics: Metrics,
    ) -> Self {
        let made = Mutex::new(Made { next: IDS_FROM, by_name: BTreeMap::new() });
        let (used, gave_way, refusing) = (Arc::new(AtomicU64::new(0)), AtomicU64::new(0), AtomicBool::new(false));
        let inner = Inner { store, dir, capacity_bytes, used, made, gave_way, refusing, events, metrics };
        Self { inner: Arc::new(inner) }
    }

    /// Whether a clone of this name can be made.
    ///
    /// # Errors
    /// The name is no name or taken, or there are [`CLONES_MAX`].
    pub fn check_new(&self, name: &str) -> Result<(), NodeError> {
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let fits = (1..=63).contains(&name.len())
            && name.starts_with(good)
            && name.chars().all(|c| good(c) || matches!(c, '-' | '_' | '.'));
        if !fits {
            let why = format!("{name:?} is not 1 to 63 of a-z, 0-9, '-', '_' and '.', starting with a letter or digit");
            return Err(NodeError::Invalid { field: "name", why });
        }
        let made = self.inner.made.lock();
        let volume = self.inner.store.with_state(|state| state.volume_by_name(name).is_some());
        if volume || made.by_name.contains_key(name) {
            return Err(NodeError::CloneExists { name: name.to_owned() });
        }
        if made.by_name.len() >= CLONES_MAX {
            let why = format!("there are {CLONES_MAX} clones, the most that are served; discard one first");
            return Err(NodeError::CloneSpace { why });
        }
        self.check_short(0)
    }

    /// Makes a clone whose base is open and can be read. Copies nothing.
    ///
    /// # Errors
    /// As of [`Clones::check_new`]; or its file cannot be made.
    pub fn make(
        &self,
        name: &str,
        base: ImageReader,
        snapshot: &str,
        time_unix_ms: i64,
    ) -> Result<v1::CloneInfo, NodeError> {
        self.check_new(name)?;
        let of = base.spec().clone();
        let checksums = of.block_count().saturating_mul(4);
        let file = self.scratch().and_then(|file| {
            file.set_len(of.size_bytes.saturating_add(checksums))?;
            Ok(file)
        });
        let file = file.map_err(|error| NodeError::CloneSpace {
            why: format!("the file for what is written to the clone cannot be made in the data directory: {error}"),
        })?;
        let mut made = self.inner.made.lock();
        if made.by_name.contains_key(name) {
            return Err(NodeError::CloneExists { name: name.to_owned() });
        }
        let spec = VolumeSpec {
            id: VolumeId(made.next),
            name: name.to_owned(),
            group_name: name.to_owned(),
            ack: AckRule::Staged,
            away: AwayRule::Degrade,
            ..of.clone()
        };
        made.next += 1;
        let own = Own { written: BlockSet::new(), zero: BlockSet::new(), clients: NodeState::default() };
        let clone = CloneVolume {
            spec,
            base,
            snapshot: snapshot.to_owned(),
            of: of.name,
            time_unix_ms,
            made_unix_ms: unix_ms(),
            own: RwLock::new(own),
            file,
            used: Arc::clone(&self.inner.used),
        };
        let info = clone.info();
        made.by_name.insert(name.to_owned(), Arc::new(clone));
        drop(made);
        let position = info.position.map(|p| understudy_common::types::Position::from(p).to_string());
        let fields = [
            ("clone", name.to_owned()),
            ("volume", info.volume.clone()),
            ("snapshot", snapshot.to_owned()),
            ("position", position.unwrap_or_default()),
        ];
        self.inner.events.record(unix_ms(), "clone.created", "a writable clone of the image is served", fields);
        self.refresh_metrics();
        Ok(info)
    }

    /// A file without a name.
    fn scratch(&self) -> io::Result<File> {
        let dir = self.inner.dir.as_deref().ok_or_else(|| io::Error::other("there is no data directory"))?;
        let path = dir.join("clone.scratch");
        let gone = |result: io::Result<()>| match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        // One that a crash left behind is empty.
        let _one = self.inner.made.lock();
        gone(fs::remove_file(&path))?;
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        fs::remove_file(&path)?;
        Ok(file)
    }

    /// All of them, by name.
    #[must_use]
    pub fn list(&self) -> Vec<v1::CloneInfo> {
        self.inner.made.lock().by_name.values().map(|clone| clone.info()).collect()
    }

    /// The volumes they are served as, by name.
    #[must_use]
    pub fn volumes(&self) -> Vec<v1::Volume> {
        self.inner.made.lock().by_name.values().map(|clone| convert::volume_to_wire(&clone.spec)).collect()
    }

    /// One of them.
    ///
    /// # Errors
    /// It is none, and perhaps a volume of the replica, which nobody may write.
    pub fn get(&self, key: &VolumeKey) -> Result<Arc<CloneVolume>, NodeError> {
        let found = {
            let made = self.inner.made.lock();
            match key {
                VolumeKey::Name(name) => made.by_name.get(name).cloned(),
                VolumeKey::Id(id) => made.by_name.values().find(|clone| clone.spec.id == *id).cloned(),
            }
        };
        let replica = |state: &NodeState| match key {
            VolumeKey::Name(name) => state.volume_by_name(name).is_some(),
            VolumeKey::Id(id) => state.volumes.contains_key(id),
        };
        found.ok_or_else(|| match self.inner.store.with_state(replica) {
            true => NodeError::NotAClone { volume: key.to_string() },
            false => NodeError::NoClone { name: key.to_string() },
        })
    }

    /// Discards a clone: its space comes back.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn delete(&self, name: &str) -> Result<(), NodeError> {
        let gone = self.inner.made.lock().by_name.remove(name);
        let gone = gone.ok_or_else(|| NodeError::NoClone { name: name.to_owned() })?;
        let fields = [("clone", name.to_owned()), ("written_bytes", gone.written_bytes().to_string())];
        // Whoever reads or writes it this moment ends first.
        drop(gone);
        self.inner.events.record(unix_ms(), "clone.discarded", "an operator discarded it", fields);
        self.inner.store.request_checkpoint();
        self.refresh_metrics();
        Ok(())
    }

    /// The replica lacks space: every clone goes. True if there was one, or the space of one is on its way.
    #[must_use]
    pub fn give_way(&self) -> bool {
        let gone = std::mem::take(&mut self.inner.made.lock().by_name);
        let any = !gone.is_empty();
        for (name, clone) in gone {
            tracing::warn!(clone = name, "discarded: the replica lacks the space that its base holds");
            let fields = [("clone", name), ("written_bytes", clone.written_bytes().to_string())];
            let message = "discarded: the replica lacks the space that its base holds";
            self.inner.events.record(unix_ms(), "clone.discarded", message, fields);
        }
        let store = &self.inner.store;
        if any {
            self.inner.gave_way.store(store.next_lsn().0 - 1, Ordering::Relaxed);
            store.request_checkpoint();
            self.refresh_metrics();
        }
        any || store.marks().borrow().applied.0 < self.inner.gave_way.load(Ordering::Relaxed)
    }

    /// Sets the gauges.
    pub fn refresh_metrics(&self) {
        let clones = self.inner.made.lock().by_name.len();
        self.inner.metrics.clones.set(i64::try_from(clones).unwrap_or(i64::MAX));
        let bytes = self.inner.used.load(Ordering::Relaxed);
        self.inner.metrics.clone_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Refuses while replication may need what is left.
    fn check_short(&self, new_bytes: u64) -> Result<(), NodeError> {
        let space = self.inner.store.space();
        let segment = u64::from(self.inner.store.config().pool.segment_bytes);
        let free = (space.free() + space.can_grow()).saturating_sub(space.reserved());
        let left = (space.total() + space.can_grow()).div_ceil(POOL_SHARE);
        if free < left {
            let (free, left) = (free * segment, left * segment);
            let why = format!("the pool has {free} bytes free, and writes to clones leave {left} to the replica");
            return Err(NodeError::CloneSpace { why });
        }
        let Some(dir) = &self.inner.dir else { return Ok(()) };
        let disk = statvfs(dir.as_path()).map_err(|error| NodeError::CloneSpace {
            why: format!("the free space of the data directory is not known: {error}"),
        })?;
        let (free, total) = (disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize);
        let left = (total / DISK_SHARE).min(DISK_LEFT_MAX);
        if free < left.saturating_add(new_bytes) {
            let why = format!(
                "the file system of the data directory has {free} bytes free, and writes to clones leave {left}"
            );
            return Err(NodeError::CloneSpace { why });
        }
        Ok(())
    }

    /// Counts bytes before they are written.
    fn take(&self, bytes: u64) -> Result<(), NodeError> {
        if bytes == 0 {
            return Ok(());
        }
        self.check_short(bytes)?;
        let limit = self.inner.capacity_bytes;
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit);
        self.inner.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).map(drop).map_err(|used| {
            let why = format!(
                "what was written to clones takes {used} bytes and may take {limit} (clones.capacity); discard one, or \
                 raise it"
            );
            NodeError::CloneSpace { why }
        })
    }

    /// Writes. It is seen by the next read.
    ///
    /// # Errors
    /// See [`NodeError`]; nothing was changed but by one of `Storage`.
    pub fn write(&self, request: &CloneWrite) -> Result<v1::WriteBlockResponse, NodeError> {
        let clone = self.get(&request.volume)?;
        let written = clone.write(request, |bytes| self.take(bytes));
        match &written {
            Err(NodeError::CloneSpace { why }) if !self.inner.refusing.swap(true, Ordering::Relaxed) => {
                tracing::warn!(why, "writes to clones are refused");
                let fields = [("clone", clone.spec.name.clone())];
                self.inner.events.record(unix_ms(), "clone.refused", why.clone(), fields);
            }
            Ok(_) => self.inner.refusing.store(false, Ordering::Relaxed),
            Err(_) => {}
        }
        written
    }
}

/// A run of blocks of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Written,
    Zero,
    Base,
}

impl Own {
    /// How many blocks from `at` on, up to `end`, are of one kind.
    fn kind(&self, at: u64, end: u64) -> (Kind, u64) {
        let max = end - at;
        match (self.written.next_run(at, max), self.zero.next_run(at, max)) {
            (Some((first, count)), _) if first == at => (Kind::Written, count),
            (_, Some((first, count))) if first == at => (Kind::Zero, count),
            (written, zero) => {
                let behind = written.into_iter().chain(zero).map(|(first, _)| first).min();
                (Kind::Base, behind.unwrap_or(end).min(end) - at)
            }
        }
    }

    /// Blocks of a range that are written.
    fn count_written(&self, first: u64, count: u64) -> u64 {
        let (mut at, end, mut sum) = (first, first + count, 0);
        while at < end
            && let Some((start, run)) = self.written.next_run(at, end - at)
            && start < end
        {
            let run = run.min(end - start);
            (sum, at) = (sum + run, start + run);
        }
        sum
    }
}

impl CloneVolume {
    /// As a volume.
    #[must_use]
    pub fn spec(&self) -> &VolumeSpec {
        &self.spec
    }

    /// What its base is waiting for.
    #[must_use]
    pub fn base(&self) -> &ImageReader {
        &self.base
    }

    fn block_bytes(&self) -> u64 {
        u64::from(self.spec.block_size.bytes())
    }

    fn written_bytes(&self) -> u64 {
        self.own.read().written.len() * self.block_bytes()
    }

    fn info(&self) -> v1::CloneInfo {
        v1::CloneInfo {
            name: self.spec.name.clone(),
            volume: self.of.clone(),
            snapshot: self.snapshot.clone(),
            position: Some(self.base.position().into()),
            time_unix_ms: self.time_unix_ms,
            size_bytes: self.spec.size_bytes,
            block_bytes: self.spec.block_size.bytes(),
            written_bytes: self.written_bytes(),
            made_unix_ms: self.made_unix_ms,
        }
    }

    fn check_range(&self, offset_bytes: u64, length_bytes: u64) -> Result<(), NodeError> {
        if length_bytes == 0 {
            return Err(NodeError::Invalid { field: "length_bytes", why: "is 0; name at least one byte".into() });
        }
        let size_bytes = self.spec.size_bytes;
        if offset_bytes.checked_add(length_bytes).is_none_or(|end| end > size_bytes) {
            let volume = self.spec.name.clone();
            return Err(NodeError::OutOfRange { volume, offset_bytes, length_bytes, size_bytes });
        }
        Ok(())
    }

    fn failed(&self, error: &io::Error) -> NodeError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::FileTooLarge | io::ErrorKind::QuotaExceeded => {
                NodeError::CloneSpace { why: format!("the file of the clone cannot be written: {error}") }
            }
            _ => NodeError::Clone { name: self.spec.name.clone(), why: format!("its file failed: {error}") },
        }
    }

    fn of_base(&self, error: ReadFailure) -> NodeError {
        match error {
            ReadFailure::Damaged { block, .. } => NodeError::Damaged { volume: self.spec.name.clone(), block },
            ReadFailure::Pool(_) => {
                let why = format!("volume {} is gone, and what was not written since with it", self.of);
                NodeError::Clone { name: self.spec.name.clone(), why }
            }
            error => NodeError::Storage { message: error.to_string() },
        }
    }

    /// Whole blocks.
    fn read_blocks(&self, own: &Own, first: u64, count: u64) -> Result<Bytes, NodeError> {
        let block = usize::try_from(self.block_bytes()).expect("at most 64 KiB");
        let blocks = usize::try_from(count).expect("a request is bounded by the message size");
        let mut out = BytesMut::zeroed(blocks * block);
        let (mut at, end) = (first, first + count);
        while at < end {
            let (kind, run) = own.kind(at, end);
            let from = usize::try_from(at - first).expect("inside") * block;
            let length = usize::try_from(run).expect("inside") * block;
            let part = &mut out[from..from + length];
            match kind {
                Kind::Zero => {}
                Kind::Base => part.copy_from_slice(&self.base.read(at, run).map_err(|e| self.of_base(e))?),
                Kind::Written => self.read_written(at, part)?,
            }
            at += run;
        }
        Ok(out.freeze())
    }

    fn checksums_at(&self, block: u64) -> u64 {
        self.spec.size_bytes + 4 * block
    }

    fn read_written(&self, first: u64, out: &mut [u8]) -> Result<(), NodeError> {
        let block = usize::try_from(self.block_bytes()).expect("at most 64 KiB");
        self.file.read_exact_at(out, first * self.block_bytes()).map_err(|e| self.failed(&e))?;
        let mut crcs = vec![0; out.len() / block * 4];
        self.file.read_exact_at(&mut crcs, self.checksums_at(first)).map_err(|e| self.failed(&e))?;
        for ((data, crc), at) in out.chunks(block).zip(crcs.chunks(4)).zip(first..) {
            if crc32c(data).to_le_bytes() != crc {
                return Err(NodeError::Damaged { volume: self.spec.name.clone(), block: at });
            }
        }
        Ok(())
    }

    /// Writes whole blocks that were counted.
    fn put(&self, own: &mut Own, first: u64, data: &[u8]) -> Result<(), NodeError> {
        let crcs: Vec<u8> =
            record::block_crcs(data, self.spec.block_size).iter().flat_map(|crc| crc.to_le_bytes()).collect();
        let count = data.len() as u64 / self.block_bytes();
        // Named before it is written: half of it is damaged, and not what was there.
        own.written.insert_range(first, count);
        own.zero.remove_range(first, count);
        let done = self.file.write_all_at(data, first * self.block_bytes());
        let done = done.and_then(|()| self.file.write_all_at(&crcs, self.checksums_at(first)));
        done.map_err(|e| self.failed(&e))
    }

    /// Makes whole blocks zeros, and gives their space back.
    fn put_zeros(&self, own: &mut Own, first: u64, count: u64) -> Result<(), NodeError> {
        let written = own.count_written(first, count);
        if written > 0 {
            let (at, length) = (first * self.block_bytes(), count * self.block_bytes());
            let punched = fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, length);
            punched.map_err(|error| self.failed(&error.into()))?;
            self.used.fetch_sub(written * self.block_bytes(), Ordering::Relaxed);
        }
        own.written.remove_range(first, count);
        own.zero.insert_range(first, count);
        Ok(())
    }

    fn write(
        &self,
        request: &CloneWrite,
        take: impl Fn(u64) -> Result<(), NodeError>,
    ) -> Result<v1::WriteBlockResponse, NodeError> {
        let (offset, block) = (request.offset_bytes, self.block_bytes());
        let length = match &request.change {
            CloneChange::Data(data, _) => data.len() as u64,
            CloneChange::Zeroes(length) | CloneChange::Discard(length) => *length,
        };
        self.check_range(offset, length)?;
        if let CloneChange::Data(data, Some(expected)) = &request.change
            && crc32c(data) != *expected
        {
            let why = format!("is {expected:08x}, and the data has {:08x}: it was damaged on the way", crc32c(data));
            return Err(NodeError::Invalid { field: "crc32c", why });
        }
        let mut own = self.own.write();
        let mut answer = v1::WriteBlockResponse {
            position: Some(self.base.position().into()),
            mode: v1::Mode::Unspecified.into(),
            durability: v1::Durability::Unspecified.into(),
            duplicate: false,
        };
        if let Some(client) = &request.client {
            match own.clients.check_sequence(client) {
                SequenceCheck::Fresh => {}
                SequenceCheck::Applied(_) => {
                    answer.duplicate = true;
                    return Ok(answer);
                }
                SequenceCheck::TooOld { highest } => {
                    let (sequence, field) = (client.sequence, "sequence");
                    let why = format!("{sequence} is too far below {highest}, the newest of the client, to be known");
                    return Err(NodeError::Invalid { field, why });
                }
            }
        }
        let end = offset + length;
        match &request.change {
            CloneChange::Data(data, _) => self.write_bytes(&mut own, offset, data, &take)?,
            CloneChange::Zeroes(_) => {
                // The edges, byte by byte; what is between, as a hole.
                let (first, last) = (offset.div_ceil(block), end / block);
                if first > last {
                    self.write_bytes(&mut own, offset, &zeros(length), &take)?;
                } else {
                    self.write_bytes(&mut own, offset, &zeros(first * block - offset), &take)?;
                    self.write_bytes(&mut own, last * block, &zeros(end - last * block), &take)?;
                    if first < last {
                        self.put_zeros(&mut own, first, last - first)?;
                    }
                }
            }
            CloneChange::Discard(_) => {
                let (first, last) = (offset.div_ceil(block), end / block);
                if first < last {
                    self.put_zeros(&mut own, first, last - first)?;
                }
            }
        }
        if let Some(client) = &request.client {
            own.clients.note_sequence(client, Lsn::ZERO);
        }
        Ok(answer)
    }

    /// Bytes inside of the volume; what is of a part of a block is read and changed.
    fn write_bytes(
        &self,
        own: &mut Own,
        offset: u64,
        data: &[u8],
        take: &impl Fn(u64) -> Result<(), NodeError>,
    ) -> Result<(), NodeError> {
        if data.is_empty() {
            return Ok(());
        }
        let block = self.block_bytes();
        let end = offset + data.len() as u64;
        let (first, last) = (offset / block, end.div_ceil(block));
        let count = last - first;
        let new = (count - own.count_written(first, count)) * block;
        take(new)?;
        let aligned = offset == first * block && end == last * block;
        let done = if aligned {
            self.put(own, first, data)
        } else {
            self.widen(own, offset, data).and_then(|whole| self.put(own, first, &whole))
        };
        // What was counted for blocks that did not become written.
        let missing = (count - own.count_written(first, count)) * block;
        self.used.fetch_sub(missing, Ordering::Relaxed);
        done
    }

    /// The whole blocks that a write touches, with its bytes in them.
    fn widen(&self, own: &Own, offset: u64, data: &[u8]) -> Result<BytesMut, NodeError> {
        let block = self.block_bytes();
        let end = offset + data.len() as u64;
        let (first, last) = (offset / block, end.div_ceil(block));
        let bytes = |blocks: u64| usize::try_from(blocks * block).expect("a request is bounded");
        let mut whole = BytesMut::zeroed(bytes(last - first));
        if offset > first * block {
            let edge = self.read_blocks(own, first, 1)?;
            whole[..edge.len()].copy_from_slice(&edge);
        }
        if end < last * block && (last - first > 1 || offset == first * block) {
            let edge = self.read_blocks(own, last - 1, 1)?;
            whole[bytes(last - 1 - first)..].copy_from_slice(&edge);
        }
        let at = usize::try_from(offset - first * block).expect("inside a block");
        whole[at..at + data.len()].copy_from_slice(data);
        Ok(whole)
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub fn read(&self, offset_bytes: u64, length_bytes: u64) -> Result<(Bytes, u32), NodeError> {
        self.check_range(offset_bytes, length_bytes)?;
        let block = self.block_bytes();
        let (first, last) = (offset_bytes / block, (offset_bytes + length_bytes).div_ceil(block));
        let whole = self.read_blocks(&self.own.read(), first, last - first)?;
        let at = usize::try_from(offset_bytes - first * block).expect("inside a block");
        let data = whole.slice(at..at + usize::try_from(length_bytes).expect("bounded by the message size"));
        let crc = crc32c(&data);
        Ok((data, crc))
    }

    /// From `offset_bytes` on: a hole, or at most `max_bytes` of data.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub fn piece(&self, offset_bytes: u64, max_bytes: u64) -> Result<PieceContent, NodeError> {
        self.check_range(offset_bytes, 1)?;
        let block = self.block_bytes();
        let first = offset_bytes / block;
        let max = (max_bytes / block).max(1).min(self.spec.block_count() - first);
        let own = self.own.read();
        let (kind, count) = own.kind(first, first + max);
        let (hole, count) = match kind {
            Kind::Zero => (true, count),
            Kind::Written => (false, count.min(STEP_BLOCKS)),
            Kind::Base => self.base.extent(first, count).map_err(|e| self.of_base(e))?,
        };
        let length = ((first + count) * block - offset_bytes).min(max_bytes.max(1));
        if hole {
            return Ok(PieceContent::Zeros(length));
        }
        let whole = self.read_blocks(&own, first, count)?;
        let at = usize::try_from(offset_bytes - first * block).expect("inside a block");
        let data = whole.slice(at..at + usize::try_from(length).expect("bounded by the message size"));
        let crc32c = crc32c(&data);
        Ok(PieceContent::Data { data, crc32c })
    }
}

impl Drop for CloneVolume {
    fn drop(&mut self) {
        let bytes = self.own.get_mut().written.len() * u64::from(self.spec.block_size.bytes());
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Less than two blocks.
fn zeros(length: u64) -> Vec<u8> {
    vec![0; usize::try_from(length).expect("less than two blocks")]
}

/// Removes what a crash may have left in a data directory: an empty file.
pub fn clear(dir: &Path) {
    // It is made anew where it is needed.
    let _ = fs::remove_file(dir.join("clone.scratch"));
}
