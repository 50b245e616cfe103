//! A storage in memory for tests that need no crash states.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, IoSlice},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;

use crate::storage::{OpenMode, Storage, StorageFile};

#[derive(Default)]
pub(crate) struct MemStorage {
    files: Mutex<BTreeMap<String, Arc<MemFile>>>,
    failing: Arc<AtomicBool>,
}

#[derive(Default)]
pub(crate) struct MemFile {
    data: Mutex<Vec<u8>>,
    failing: Arc<AtomicBool>,
}

impl MemStorage {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn fail_syncs(&self, fail: bool) {
        self.failing.store(fail, Ordering::SeqCst);
    }

    pub(crate) fn contents(&self, name: &str) -> Vec<u8> {
        self.files.lock()[name].data.lock().clone()
    }

    pub(crate) fn set_contents(&self, name: &str, data: Vec<u8>) {
        let failing = self.failing.clone();
        let file = Arc::new(MemFile { data: Mutex::new(data), failing });
        self.files.lock().insert(name.to_owned(), file);
    }
}

impl Storage for MemStorage {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let mut files = self.files.lock();
        match (files.get(name), mode) {
            (Some(_), OpenMode::CreateNew) => Err(ErrorKind::AlreadyExists.into()),
            (Some(file), _) => Ok(file.clone()),
            (None, OpenMode::Existing | OpenMode::ReadOnly) => Err(ErrorKind::NotFound.into()),
            (None, _) => {
                let file = Arc::new(MemFile { failing: self.failing.clone(), ..MemFile::default() });
                files.insert(name.to_owned(), file.clone());
                Ok(file)
            }
        }
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let prefix = format!("{dir}/");
        Ok(self.files.lock().keys().filter_map(|n| n.strip_prefix(&prefix)).map(str::to_owned).collect())
    }

    fn create_dir(&self, _dir: &str) -> io::Result<()> {
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.files.lock().remove(name).map(drop).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.files.lock();
        let file = files.remove(from).ok_or(ErrorKind::NotFound)?;
        files.insert(to.to_owned(), file);
        Ok(())
    }

    fn sync_dir(&self, _dir: &str) -> io::Result<()> {
        Ok(())
    }
}

impl StorageFile for MemFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.data.lock().len() as u64)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        let data = self.data.lock();
        buf.copy_from_slice(data.get(at..at + buf.len()).ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        let mut data = self.data.lock();
        let len = data.len().max(at + buf.len());
        data.resize(len, 0);
        data[at..at + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        let all: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).collect();
        self.write_all_at(&all, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.failing.load(Ordering::SeqCst) { Err(io::Error::other("injected")) } else { Ok(()) }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.data.lock().resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = usize::try_from(offset + len).unwrap();
        let mut data = self.data.lock();
        let len = data.len().max(end);
        data.resize(len, 0);
        Ok(())
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_all_at(&vec![0; usize::try_from(len).unwrap()], offset)
    }
}
