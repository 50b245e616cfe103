//! A simulated disk that does whatever the storage seam allows, and no more; deterministic under a seed.
//!
//! Each file has its current content, which reads see, and its durable content. A write is a list of 512-byte sectors
//! that wait for the sync of *their* file; a crash keeps any subset of them, in order. The same holds for lengths, and
//! for names until their directory is synced. A failed sync leaves pages that look clean and are not durable, and no
//! later sync saves them. Content is kept in shared 4 KiB pages: a crash or a sync costs what was written since the
//! last one, whatever the size of the file.

mod content;
mod names;

use std::{
    collections::BTreeMap,
    io::{self, IoSlice},
    ops::Range,
    sync::Arc,
};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

use self::{
    content::Content,
    names::{Names, Node},
};
use super::{OpenMode, Storage, StorageFile};

/// Unit of atomicity, in bytes.
pub const SECTOR: u64 = 512;

/// What a call does, for faults that pick the nth of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OpKind {
    /// `open` that makes a file.
    Create,
    /// `read_exact_at`.
    Read,
    /// `write_all_at`, `write_vectored_at`, `write_zeros`.
    Write,
    /// `sync_data`.
    Sync,
    /// `set_len`.
    SetLen,
    /// `allocate`.
    Allocate,
    /// `create_dir`.
    CreateDir,
    /// `remove`.
    Remove,
    /// `rename`.
    Rename,
    /// `sync_dir`.
    SyncDir,
}

/// The error an injected fault returns.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// An error of this kind.
    Kind(io::ErrorKind),
    /// The error of this number, as the system numbers them (5 is EIO, 28 is ENOSPC).
    Os(i32),
}

impl Fault {
    /// An I/O error of the device (EIO).
    pub const EIO: Self = Self::Os(5);
    /// No space left on the device.
    pub const ENOSPC: Self = Self::Os(28);

    fn error(self) -> io::Error {
        match self {
            Self::Kind(kind) => io::Error::new(kind, "injected fault"),
            Self::Os(number) => io::Error::from_raw_os_error(number),
        }
    }
}

impl From<io::ErrorKind> for Fault {
    fn from(kind: io::ErrorKind) -> Self {
        Self::Kind(kind)
    }
}

/// A handle to one simulated disk; clones are the same disk.
#[derive(Clone)]
pub struct SimStorage {
    disk: Arc<Mutex<Disk>>,
}

struct Disk {
    names: Names,
    rng: Pcg64Mcg,
    /// Grows with each crash; handles of an older boot are dead.
    boot: u64,
    /// Mutating calls so far.
    ops: u64,
    /// The mutating call at which the machine dies.
    crash_at: Option<u64>,
    crashed: bool,
    /// Calls of each kind that are still to come before the fault.
    faults: Vec<(OpKind, u64, Fault)>,
    bad_ranges: Vec<(String, Range<u64>)>,
    capacity_pages: u64,
}

impl SimStorage {
    /// An empty disk. The seed decides what a failed or crashing call leaves behind.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let disk = Disk {
            names: Names::default(),
            rng: Pcg64Mcg::seed_from_u64(seed),
            boot: 0,
            ops: 0,
            crash_at: None,
            crashed: false,
            faults: Vec::new(),
            bad_ranges: Vec::new(),
            capacity_pages: u64::MAX,
        };
        Self { disk: Arc::new(Mutex::new(disk)) }
    }

    /// An independent copy of the disk as it is, pending writes and plans included. Handles stay with the original.
    #[must_use]
    pub fn fork(&self) -> Self {
        let disk = self.disk.lock();
        let copy = Disk {
            names: disk.names.fork(),
            rng: disk.rng.clone(),
            faults: disk.faults.clone(),
            bad_ranges: disk.bad_ranges.clone(),
            ..*disk
        };
        Self { disk: Arc::new(Mutex::new(copy)) }
    }

    /// Mutating calls so far: creations, writes, syncs, lengths, allocations, names.
    #[must_use]
    pub fn ops(&self) -> u64 {
        self.disk.lock().ops
    }

    /// The `n`th mutating call from now (1 is the next) and everything after it fails with "crashed", until
    /// [`Self::crash`]. The call may have had its effect, or part of it.
    pub fn crash_after(&self, n: u64) {
        let mut disk = self.disk.lock();
        disk.crash_at = Some(disk.ops + n.max(1));
    }

    /// Forgets the plan of [`Self::crash_after`], unless its call was reached.
    pub fn cancel_crash(&self) {
        self.disk.lock().crash_at = None;
    }

    /// True once the call chosen by [`Self::crash_after`] was reached.
    #[must_use]
    pub fn has_crashed(&self) -> bool {
        self.disk.lock().crashed
    }

    /// The power fails and comes back: of each file any subset of the unsynced sectors and lengths survives, of each
    /// directory any subset of the unsynced names; open handles are dead. Ends the plan of [`Self::crash_after`].
    pub fn crash(&self, rng: &mut impl Rng) {
        let disk = &mut *self.disk.lock();
        disk.names.crash(rng);
        disk.boot += 1;
        disk.crash_at = None;
        disk.crashed = false;
    }

    /// The process dies and the machine does not: everything written survives, open handles are dead. Ends the plan of
    /// [`Self::crash_after`].
    pub fn kill(&self) {
        let disk = &mut *self.disk.lock();
        disk.boot += 1;
        disk.crash_at = None;
        disk.crashed = false;
    }

    /// The `n`th call of `kind` from now (1 is the next) fails once. A failed write may have had part of its effect; a
    /// failed sync makes an unknown part durable and the rest never.
    pub fn fail_nth(&self, kind: OpKind, n: u64, fault: impl Into<Fault>) {
        self.disk.lock().faults.push((kind, n.max(1), fault.into()));
    }

    /// Reads that touch `range` of the file fail with EIO until [`Self::clear_faults`].
    pub fn fail_reads(&self, name: &str, range: Range<u64>) {
        self.disk.lock().bad_ranges.push((name.to_owned(), range));
    }

    /// How many plans of [`Self::fail_nth`] have not been reached.
    #[must_use]
    pub fn faults_planned(&self) -> usize {
        self.disk.lock().faults.len()
    }

    /// Forgets the plans of [`Self::fail_nth`] and [`Self::fail_reads`].
    pub fn clear_faults(&self) {
        let mut disk = self.disk.lock();
        disk.faults.clear();
        disk.bad_ranges.clear();
    }

    /// Space of the disk, in units of 4 KiB; what needs more fails with ENOSPC. Holes need none.
    pub fn set_capacity(&self, bytes: u64) {
        self.disk.lock().capacity_pages = bytes / content::PAGE;
    }

    /// Changes one byte of a file behind its back, durably.
    ///
    /// # Panics
    /// If there is no such file or it is shorter.
    pub fn corrupt(&self, name: &str, offset: u64, xor: u8) {
        let disk = self.disk.lock();
        let node = disk.names.find(name).expect("corrupt() is given a file that exists");
        node.content.lock().corrupt(offset, xor);
    }

    /// The current content of a file.
    pub fn read_all(&self, name: &str) -> io::Result<Vec<u8>> {
        let disk = self.disk.lock();
        let node = disk.names.find(name)?;
        let content = node.content.lock();
        let mut bytes = vec![0; usize::try_from(content.len()).map_err(io::Error::other)?];
        content.read(&mut bytes, 0)?;
        Ok(bytes)
    }
}

impl Disk {
    /// Counts a call and says whether a plan lets it fail. What a failing call leaves behind is the caller's matter.
    fn begin(&mut self, boot: u64, kind: OpKind) -> io::Result<Outcome> {
        if self.crashed || boot != self.boot {
            return Err(crashed());
        }
        if kind != OpKind::Read {
            self.ops += 1;
            if self.crash_at.is_some_and(|at| self.ops >= at) {
                self.crashed = true;
                return Ok(Outcome::Fails(crashed()));
            }
        }
        let mut hit = None;
        self.faults.retain_mut(|(of, left, fault)| {
            if *of == kind {
                *left -= 1;
                if *left == 0 {
                    hit = Some(*fault);
                    return false;
                }
            }
            true
        });
        Ok(hit.map_or(Outcome::Goes, |fault| Outcome::Fails(fault.error())))
    }

    /// As [`Self::begin`] for calls that have their effect as a whole or not at all.
    fn begin_atomic(&mut self, boot: u64, kind: OpKind) -> io::Result<(bool, io::Result<()>)> {
        Ok(match self.begin(boot, kind)? {
            Outcome::Goes => (true, Ok(())),
            // A call during which the power fails may still have had its effect.
            Outcome::Fails(e) => (self.crashed && self.rng.random(), Err(e)),
        })
    }

    fn check_space(&self, new_pages: u64) -> io::Result<()> {
        if self.capacity_pages == u64::MAX || new_pages == 0 {
            return Ok(());
        }
        let used = self.names.pages_used();
        if used + new_pages > self.capacity_pages { Err(Fault::ENOSPC.error()) } else { Ok(()) }
    }
}

enum Outcome {
    Goes,
    Fails(io::Error),
}

fn crashed() -> io::Error {
    io::Error::other("crashed")
}

impl Storage for SimStorage {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let disk = &mut *self.disk.lock();
        if disk.crashed {
            return Err(crashed());
        }
        let node = match (disk.names.find(name), mode) {
            (Ok(_), OpenMode::CreateNew) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Ok(node), _) => node,
            (Err(e), OpenMode::Existing | OpenMode::ReadOnly) => return Err(e),
            (Err(_), OpenMode::OrCreate | OpenMode::CreateNew) => {
                let (goes, result) = disk.begin_atomic(disk.boot, OpKind::Create)?;
                let node = Arc::new(Node::default());
                if goes {
                    disk.names.link(name, Arc::clone(&node))?;
                }
                result?;
                node
            }
        };
        Ok(Arc::new(SimFile {
            disk: Arc::clone(&self.disk),
            node,
            boot: disk.boot,
            name: name.to_owned(),
            read_only: mode == OpenMode::ReadOnly,
        }))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let disk = self.disk.lock();
        if disk.crashed { Err(crashed()) } else { Ok(disk.names.list(dir)) }
    }

    fn create_dir(&self, dir: &str) -> io::Result<()> {
        let disk = &mut *self.disk.lock();
        let (goes, result) = disk.begin_atomic(disk.boot, OpKind::CreateDir)?;
        if goes {
            disk.names.create_dir(dir);
        }
        result
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let disk = &mut *self.disk.lock();
        let (goes, result) = disk.begin_atomic(disk.boot, OpKind::Remove)?;
        if goes {
            disk.names.unlink(name)?;
        }
        result
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let disk = &mut *self.disk.lock();
        let (goes, result) = disk.begin_atomic(disk.boot, OpKind::Rename)?;
        if goes {
            disk.names.rename(from, to)?;
        }
        result
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        let disk = &mut *self.disk.lock();
        let (goes, result) = disk.begin_atomic(disk.boot, OpKind::SyncDir)?;
        if goes {
            disk.names.sync_dir(dir)?;
        }
        result
    }
}

struct SimFile {
    disk: Arc<Mutex<Disk>>,
    node: Arc<Node>,
    boot: u64,
    name: String,
    read_only: bool,
}

impl SimFile {
    /// Runs `change` on the content of the file if it fits the disk; a failing call has none, part or all of its effect.
    fn change(
        &self,
        kind: OpKind,
        end: Option<u64>,
        new_pages: impl FnOnce(&Content) -> u64,
        change: impl FnOnce(&mut Content, Extent),
    ) -> io::Result<()> {
        let disk = &mut *self.disk.lock();
        let outcome = disk.begin(self.boot, kind)?;
        if self.read_only {
            return Err(io::Error::from_raw_os_error(9));
        }
        if end.is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Not through the lock of the content: the sum below locks each file in turn.
        let pages = new_pages(&self.node.content.lock());
        disk.check_space(pages)?;
        let content = &mut *self.node.content.lock();
        match outcome {
            Outcome::Goes => {
                change(content, Extent::All);
                Ok(())
            }
            Outcome::Fails(e) => {
                match disk.rng.random_range(0..3) {
                    0 => {}
                    1 => change(content, Extent::Part(disk.rng.random())),
                    _ => change(content, Extent::All),
                }
                Err(e)
            }
        }
    }
}

/// How much of its effect a call has.
enum Extent {
    All,
    /// The given share of it, from its start, of `u16::MAX`.
    Part(u16),
}

impl Extent {
    /// How many of `len` bytes at `offset`, up to a sector's end.
    fn cut(&self, offset: u64, len: u64) -> u64 {
        match self {
            Self::All => len,
            Self::Part(share) => {
                let end = offset + len * u64::from(*share) / u64::from(u16::MAX);
                (end / SECTOR * SECTOR).clamp(offset, offset + len) - offset
            }
        }
    }
}

impl StorageFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        let disk = self.disk.lock();
        if disk.crashed || disk.boot != self.boot { Err(crashed()) } else { Ok(self.node.content.lock().len()) }
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let disk = &mut *self.disk.lock();
        if let Outcome::Fails(e) = disk.begin(self.boot, OpKind::Read)? {
            return Err(e);
        }
        let end = offset + buf.len() as u64;
        if disk.bad_ranges.iter().any(|(name, bad)| *name == self.name && bad.start < end && offset < bad.end) {
            return Err(Fault::EIO.error());
        }
        self.node.content.lock().read(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_vectored_at(&mut [IoSlice::new(buf)], offset)
    }

    #[allow(clippy::cast_possible_truncation, reason = "parts of a buffer's length")]
    fn write_vectored_at(&self, bufs: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        let len: u64 = bufs.iter().map(|b| b.len() as u64).sum();
        let end = offset.checked_add(len);
        self.change(
            OpKind::Write,
            end,
            |content| content.holes(offset, len),
            |content, extent| {
                let mut left = extent.cut(offset, len);
                let mut at = offset;
                let parts = bufs.iter().map(|buf| {
                    let part = &buf[..left.min(buf.len() as u64) as usize];
                    left -= part.len() as u64;
                    part
                });
                for part in parts {
                    content.write(part, at);
                    at += part.len() as u64;
                }
            },
        )
    }

    fn sync_data(&self) -> io::Result<()> {
        let disk = &mut *self.disk.lock();
        let outcome = disk.begin(self.boot, OpKind::Sync)?;
        let mut content = self.node.content.lock();
        match outcome {
            Outcome::Goes => {
                content.sync();
                Ok(())
            }
            Outcome::Fails(e) => {
                // At a crash the writes stay pending, and the crash picks among them.
                if !disk.crashed {
                    content.fail_sync(&mut disk.rng);
                }
                Err(e)
            }
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(OpKind::SetLen, Some(len), |_| 0, |content, _| content.set_len(len))
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(
            OpKind::Allocate,
            offset.checked_add(len),
            |content| content.holes(offset, len),
            |content, extent| content.allocate(offset, extent.cut(offset, len)),
        )
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(
            OpKind::Write,
            offset.checked_add(len),
            |content| content.holes(offset, len),
            |content, extent| content.write_zeros(offset, extent.cut(offset, len)),
        )
    }
}

/// Which of `n` pending things survive a crash: mostly any subset, sometimes all, none or a prefix, since the rare
/// corners are where mistakes hide.
fn survivors(n: usize, rng: &mut impl Rng) -> Vec<bool> {
    match rng.random_range(0..8) {
        0 => vec![true; n],
        1 => vec![false; n],
        2 => {
            let kept = rng.random_range(0..=n);
            (0..n).map(|i| i < kept).collect()
        }
        _ => {
            let kept = rng.random_range(1..16u8);
            (0..n).map(|_| rng.random_range(0..16u8) < kept).collect()
        }
    }
}

#[cfg(test)]
mod tests;

type NameMap = BTreeMap<String, Arc<Node>>;
