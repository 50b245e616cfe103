//! redb's view of a file of the storage seam.
//!
//! The first failed call poisons the backend: every later call fails, so that nothing is committed on top of a file
//! whose state is unknown. The file must be opened anew, which checks it.

use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

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
