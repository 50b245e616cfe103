//! Real files and block devices behind the storage seam.
//!
//! Relative names live below `root`, whose directories are made with mode 0700 and whose files with 0600. Absolute
//! names are opened as they are: devices of the pool. A block device has the length of its capacity, cannot change it,
//! and needs no allocation. Deliberately absent: direct I/O, io_uring and retries of anything but `EINTR`.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, IoSlice, Seek, SeekFrom},
    num::NonZeroU64,
    os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::fs::FallocateFlags;

use super::{OpenMode, Storage, StorageFile};

/// Most buffers the kernel takes in one call (`UIO_MAXIOV`).
const IOVECS_MAX: usize = 1024;
/// Unit of the page cache; a multiple of it where pages are larger does no harm.
const PAGE_BYTES: u64 = 64 * 1024;
/// The most that one call writes to a file whose writes are scattered. The page cache keeps what one call wrote, or what
/// was read ahead, as one piece of up to 2 MiB, and ext4 walks through all of a piece for each small write into it.
const SCATTERED_BYTES: usize = 128 * 1024;
/// Zeros written by one call.
static ZEROS: [u8; 256 * 1024] = [0; 256 * 1024];

/// Files below a directory, and devices by absolute name.
#[derive(Debug, Clone)]
pub struct RealStorage {
    root: PathBuf,
    /// The journal's directory, where it does not lie below `root`.
    journal: Option<PathBuf>,
}

impl RealStorage {
    /// Makes `root` (mode 0700, with its parents) if it does not exist.
    pub fn new(root: impl Into<PathBuf>) -> io::Result<Self> {
        let root = root.into();
        make_dir(&root)?;
        Ok(Self { root, journal: None })
    }

    /// Puts what is named `journal/..` into a directory of its own, made if it does not exist.
    pub fn with_journal(self, directory: impl Into<PathBuf>) -> io::Result<Self> {
        let directory = directory.into();
        make_dir(&directory)?;
        Ok(Self { journal: Some(directory), ..self })
    }

    /// The directory relative names start from.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, name: &str) -> PathBuf {
        if let (Some(journal), Some(below)) = (&self.journal, name.strip_prefix("journal")) {
            return journal.join(below.trim_start_matches('/'));
        }
        // `join` takes an absolute name as it is; an empty one would add a slash.
        if name.is_empty() { self.root.clone() } else { self.root.join(name) }
    }
}

impl Storage for RealStorage {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(mode != OpenMode::ReadOnly).mode(0o600);
        match mode {
            OpenMode::Existing | OpenMode::ReadOnly => {}
            OpenMode::OrCreate => _ = options.create(true),
            OpenMode::CreateNew => _ = options.create_new(true),
        }
        let file = options.open(self.path(name))?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name} is neither a file nor a block device"),
            ));
        }
        Ok(Arc::new(RealFile { file, is_device: kind.is_block_device(), call_bytes: AtomicUsize::new(usize::MAX) }))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.path(dir)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if !entry.file_type()?.is_dir()
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn create_dir(&self, dir: &str) -> io::Result<()> {
        make_dir(&self.path(dir))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        File::open(self.path(dir))?.sync_all()
    }
}

fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

struct RealFile {
    file: File,
    is_device: bool,
    /// The most that one call writes.
    call_bytes: AtomicUsize,
}

impl RealFile {
    /// A device has the space it has: asking for more is an error, for less is nothing to do.
    fn check_device_bounds(&self, end: u64) -> io::Result<()> {
        let len = self.len()?;
        if end > len {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the block device has {len} bytes, {end} are needed"),
            ));
        }
        Ok(())
    }
}

impl StorageFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        if self.is_device {
            // The position is used by nothing else: all I/O names its offset.
            (&self.file).seek(SeekFrom::End(0))
        } else {
            Ok(self.file.metadata()?.len())
        }
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], mut offset: u64) -> io::Result<()> {
        for part in buf.chunks(self.call_bytes.load(Ordering::Relaxed)) {
            self.file.write_all_at(part, offset)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    fn write_vectored_at(&self, mut bufs: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        let call_bytes = self.call_bytes.load(Ordering::Relaxed);
        IoSlice::advance_slices(&mut bufs, 0);
        while let Some(first) = bufs.first() {
            let mut left = call_bytes;
            let whole = bufs.iter().take(IOVECS_MAX).take_while(|buf| {
                let fits = buf.len() <= left;
                left = left.saturating_sub(buf.len());
                fits
            });
            let written = match whole.count() {
                0 => rustix::io::pwrite(&self.file, &first[..call_bytes], offset),
                count => rustix::io::pwritev(&self.file, &bufs[..count], offset),
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    IoSlice::advance_slices(&mut bufs, written);
                    offset += written as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.is_device { self.check_device_bounds(len) } else { self.file.set_len(len) }
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = end_of(offset, len)?;
        if self.is_device {
            return self.check_device_bounds(end);
        }
        if len == 0 {
            return Ok(());
        }
        loop {
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, len) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                // A file system that cannot reserve: what lies behind the end is written, which takes the space.
                Err(rustix::io::Errno::OPNOTSUPP) => {
                    let from = self.len()?.max(offset);
                    return if from < end { self.write_zeros(from, end - from) } else { Ok(()) };
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn expect_scattered(&self) {
        self.call_bytes.store(SCATTERED_BYTES, Ordering::Relaxed);
        // Without reading ahead. Where the system does not take the advice, all is as it was.
        let _ = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::Random);
    }

    /// By `posix_fadvise`, and not by direct I/O: that needs aligned memory and a file system that has it, and first
    /// writes back, under clients' writes, what is dirty.
    fn drop_cache(&self, offset: u64, len: u64) -> io::Result<()> {
        // Parts of pages would stay.
        let start = offset & !(PAGE_BYTES - 1);
        let end = end_of(offset, len)?.next_multiple_of(PAGE_BYTES);
        rustix::fs::fadvise(&self.file, start, NonZeroU64::new(end - start), rustix::fs::Advice::DontNeed)?;
        Ok(())
    }

    fn write_zeros(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let end = end_of(offset, len)?;
        while offset < end {
            let n = usize::try_from(end - offset).map_or(ZEROS.len(), |rest| rest.min(ZEROS.len()));
            self.write_all_at(&ZEROS[..n], offset)?;
            offset += n as u64;
        }
        Ok(())
    }
}

fn end_of(offset: u64, len: u64) -> io::Result<u64> {
    offset.checked_add(len).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the range ends behind 2^64"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn vectored_write_takes_more_buffers_than_one_call() {
        let dir = tempfile::tempdir().unwrap();
        let storage = RealStorage::new(dir.path().join("data")).unwrap();
        let mut parts: Vec<Vec<u8>> = (0..3000usize).map(|i| vec![i.to_le_bytes()[0]; i % 7]).collect();
        let byte = |n: usize| (n % 251).to_le_bytes()[0];
        let long = |bytes: usize| (0..bytes).map(byte).collect::<Vec<u8>>();
        parts.extend([long(SCATTERED_BYTES), long(3 * SCATTERED_BYTES + 1), long(20_000), long(20_000)]);
        let expected = parts.concat();
        for (name, scattered) in [("f", false), ("g", true)] {
            let file = storage.open(name, OpenMode::CreateNew).unwrap();
            if scattered {
                file.expect_scattered();
            }
            let mut slices: Vec<_> = parts.iter().map(|p| IoSlice::new(p)).collect();
            file.write_vectored_at(&mut slices, 10).unwrap();
            file.write_all_at(&expected, 10 + expected.len() as u64).unwrap();
            let mut read = vec![0; 2 * expected.len()];
            file.read_exact_at(&mut read, 10).unwrap();
            assert!(read == [&expected[..], &expected].concat(), "{name}");
            assert_eq!(file.len().unwrap(), 10 + read.len() as u64);
        }
    }

    #[test]
    fn names_live_below_the_root_with_private_modes() {
        let dir = tempfile::tempdir().unwrap();
        let storage = RealStorage::new(dir.path().join("data")).unwrap();
        storage.create_dir("a/b").unwrap();
        storage.open("a/b/two", OpenMode::CreateNew).unwrap();
        storage.open("a/b/one", OpenMode::OrCreate).unwrap();
        storage.sync_dir("a/b").unwrap();
        storage.sync_dir("").unwrap();
        assert_eq!(storage.list("a/b").unwrap(), ["one", "two"]);
        assert_eq!(storage.list("a").unwrap(), [""; 0]);
        assert_eq!(storage.list("absent").unwrap(), [""; 0]);
        storage.rename("a/b/one", "a/b/two").unwrap();
        storage.remove("a/b/two").unwrap();
        assert_eq!(storage.open("a/b/two", OpenMode::Existing).err().map(|e| e.kind()), Some(io::ErrorKind::NotFound));
        assert!(storage.open("a", OpenMode::ReadOnly).is_err());
        storage.open("f", OpenMode::CreateNew).unwrap();
        let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("data"), mode("data/a/b"), mode("data/f")), (0o700, 0o700, 0o600));
    }

    #[test]
    fn allocation_and_zeros_extend_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let storage = RealStorage::new(dir.path()).unwrap();
        let file = storage.open("f", OpenMode::CreateNew).unwrap();
        file.allocate(0, 8192).unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        file.write_zeros(4096, 600_000).unwrap();
        file.sync_data().unwrap();
        assert_eq!(file.len().unwrap(), 604_096);
        let mut buf = [1; 2];
        file.read_exact_at(&mut buf, 4095).unwrap();
        assert_eq!(buf, [7, 0]);
        file.set_len(1).unwrap();
        assert_eq!(file.read_exact_at(&mut buf, 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(storage.open("f", OpenMode::ReadOnly).unwrap().write_all_at(&[1], 0).is_err());
        assert!(file.allocate(u64::MAX, 2).is_err());
    }
}
