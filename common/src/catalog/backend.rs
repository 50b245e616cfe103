//! redb's view of a file of the storage seam.
//!
//! The first failed call poisons the backend: every later call fails, so that nothing is committed on top of a file
//! whose state is unknown. The file must be opened anew, which checks it.

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;

use crate::storage::StorageFile;

pub(super) struct Backend {
    file: Arc<dyn StorageFile>,
    poisoned: Arc<AtomicBool>,
}

impl Backend {
    pub(super) fn new(file: Arc<dyn StorageFile>, poisoned: Arc<AtomicBool>) -> Self {
        Self { file, poisoned }
    }

    fn run<T>(&self, call: impl FnOnce(&dyn StorageFile) -> io::Result<T>) -> io::Result<T> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier access to the catalogue failed; reopen it"));
        }
        call(&*self.file).inspect_err(|_| self.poisoned.store(true, Ordering::Release))
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend").field("poisoned", &self.poisoned).finish_non_exhaustive()
    }
}

impl redb::StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.run(|f| f.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.run(|f| f.read_exact_at(out, offset))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.run(|f| f.set_len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.run(|f| f.sync_data())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.run(|f| f.write_all_at(data, offset))
    }
}

/// Size of the pieces in which an [`Overlay`] copies what is written, in bytes.
const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;

/// A file that seems to take writes: they stay in memory, and the file is only read.
pub(super) struct Overlay {
    file: Arc<dyn StorageFile>,
    state: Mutex<OverlayState>,
}

struct OverlayState {
    len: u64,
    /// Bytes of the file that still count: behind them it was cut, and grew again with zeros.
    base_len: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE_BYTES]>>,
}

impl Overlay {
    pub(super) fn new(file: Arc<dyn StorageFile>) -> io::Result<Self> {
        let len = file.len()?;
        Ok(Self { file, state: Mutex::new(OverlayState { len, base_len: len, pages: BTreeMap::new() }) })
    }

    /// What the file holds of `out`, zeros behind its end.
    fn read_base(&self, base_len: u64, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let inside = usize::try_from(base_len.saturating_sub(offset)).unwrap_or(usize::MAX).min(out.len());
        out[inside..].fill(0);
        if inside == 0 { Ok(()) } else { self.file.read_exact_at(&mut out[..inside], offset) }
    }
}

/// The parts of `[offset, offset + len)` by page: number of the page, start in it, start in the buffer, length.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let place = offset + at as u64;
        let start = usize::try_from(place % PAGE).expect("below 4096");
        let piece = (place / PAGE, start, at, (PAGE_BYTES - start).min(len - at));
        at += piece.3;
        Some(piece)
    })
}

impl fmt::Debug for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overlay").finish_non_exhaustive()
    }
}

impl redb::StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state.lock();
        if offset.saturating_add(out.len() as u64) > state.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read_base(state.base_len, offset, out)?;
        for (page, start, at, len) in pieces(offset, out.len()) {
            if let Some(bytes) = state.pages.get(&page) {
                out[at..at + len].copy_from_slice(&bytes[start..start + len]);
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        state.base_len = state.base_len.min(len);
        state.pages.split_off(&len.div_ceil(PAGE));
        if let Some(bytes) = state.pages.get_mut(&(len / PAGE)) {
            bytes[usize::try_from(len % PAGE).expect("below 4096")..].fill(0);
        }
        state.len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state.lock();
        for (page, start, at, len) in pieces(offset, data.len()) {
            if !state.pages.contains_key(&page) {
                let mut bytes = Box::new([0; PAGE_BYTES]);
                self.read_base(state.base_len, page * PAGE, &mut bytes[..])?;
                state.pages.insert(page, bytes);
            }
            let bytes = state.pages.get_mut(&page).expect("it was just made");
            bytes[start..start + len].copy_from_slice(&data[at..at + len]);
        }
        state.len = state.len.max(offset + data.len() as u64);
        Ok(())
    }
}
