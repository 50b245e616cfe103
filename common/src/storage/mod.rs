//! The storage seam: everything durable goes through these two traits.
//!
//! What callers may assume, and nothing more (the simulated disk breaks everything else): a write of one aligned
//! 512-byte sector is atomic; writes are unordered until [`StorageFile::sync_data`] of *that file* returns; a new,
//! renamed or removed name is durable after [`Storage::sync_dir`] of its directory; after a failed sync the state of
//! the file is unknown. Names are relative to the root of the storage (`journal/0000`), or absolute for devices.

mod real;
pub mod sim;

use std::{
    io::{self, IoSlice},
    sync::Arc,
};

pub use self::{real::RealStorage, sim::SimStorage};

/// How [`Storage::open`] treats a name that exists or does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// It must exist.
    Existing,
    /// It is made if it does not exist.
    OrCreate,
    /// It must not exist.
    CreateNew,
    /// It must exist; writes fail.
    ReadOnly,
}

/// A tree of files.
pub trait Storage: Send + Sync + 'static {
    /// Opens a file.
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>>;
    /// Names (without the directory) of the files in `dir`, sorted. An absent directory is empty.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;
    /// Makes `dir` and its parents. Durable after `sync_dir` of the parent.
    fn create_dir(&self, dir: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Gives a file another name, replacing what had that name, atomically.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Makes the names in `dir` ("" is the root) durable.
    fn sync_dir(&self, dir: &str) -> io::Result<()>;
}

/// One open file. All methods may be called from several threads.
pub trait StorageFile: Send + Sync + 'static {
    /// Length in bytes; of a block device its capacity.
    fn len(&self) -> io::Result<u64>;
    /// True for length 0.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Fills `buf` from `offset`; `UnexpectedEof` past the end.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at `offset`, growing the file.
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bufs`, one behind the other, at `offset`.
    fn write_vectored_at(&self, bufs: &mut [IoSlice<'_>], offset: u64) -> io::Result<()>;
    /// Makes data and length durable. After an error the file must not be trusted until it was reopened and checked.
    fn sync_data(&self) -> io::Result<()>;
    /// Cuts or extends (with a hole).
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Allocates space for `[offset, offset + len)` so that later writes cannot run out of it; extends the file.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Writes zeros, really, so that later overwrites change no metadata of the file system.
    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()>;
    /// The next read of the range comes from the device, but for bytes that are not written back yet: there is nothing on
    /// the device to compare them with. A hint; where there is no cache it does nothing.
    fn drop_cache(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
    /// From here on small reads and writes at any place are what matters, and not one long one. A hint.
    fn expect_scattered(&self) {}
    /// Starts writing dirty pages of the range back without waiting. A hint.
    fn start_writeback(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}
