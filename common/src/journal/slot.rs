//! The files of the journal, which are filled with zeros once and then used again and again.
//!
//! A slot is a file name; what it holds is said by the header of its present use. After a failed sync a slot refuses
//! every later one: the error is reported once by the system, and a second sync would call lost pages durable.

use std::{io, sync::Arc};

use parking_lot::Mutex;

use crate::{
    mutant::Mutant,
    storage::{OpenMode, Storage, StorageFile},
};

/// Directory of the journal's files.
pub(super) const DIR: &str = "journal";

pub(super) struct Slot {
    pub(super) index: u32,
    state: Mutex<State>,
    /// Apart from `state`, so that one batch is written while another one is synced.
    failed_sync: Mutex<Option<String>>,
}

enum State {
    /// Not made, or not known to have its full length.
    Unprepared,
    Ready(Arc<dyn StorageFile>),
    Failed(String),
}

impl Slot {
    pub(super) fn new(index: u32) -> Self {
        Self { index, state: Mutex::new(State::Unprepared), failed_sync: Mutex::new(None) }
    }

    /// A slot whose file has its length and a durable name.
    pub(super) fn ready(index: u32, file: Arc<dyn StorageFile>) -> Self {
        Self { index, state: Mutex::new(State::Ready(file)), failed_sync: Mutex::new(None) }
    }

    pub(super) fn name(&self) -> String {
        slot_name(self.index)
    }

    /// The file of a slot in use.
    pub(super) fn file(&self) -> io::Result<Arc<dyn StorageFile>> {
        match &*self.state.lock() {
            State::Ready(file) => Ok(Arc::clone(file)),
            State::Unprepared => Err(io::Error::new(io::ErrorKind::NotFound, "the journal file is not prepared")),
            State::Failed(why) => Err(io::Error::other(why.clone())),
        }
    }

    pub(super) fn is_unprepared(&self) -> bool {
        // A slot that is being prepared holds the lock, and needs no second one.
        self.state.try_lock().is_some_and(|state| matches!(*state, State::Unprepared))
    }

    /// Makes the file, filled with zeros, durable with its name. Does nothing if that was done.
    pub(super) fn prepare(&self, storage: &dyn Storage, file_bytes: u64) -> io::Result<Arc<dyn StorageFile>> {
        let mut state = self.state.lock();
        match &*state {
            State::Ready(file) => return Ok(Arc::clone(file)),
            State::Failed(why) => return Err(io::Error::other(why.clone())),
            State::Unprepared => {}
        }
        let make = || {
            let file = storage.open(&self.name(), OpenMode::OrCreate)?;
            // A length that a failed sync left in the cache alone is not set again by writing below it.
            file.set_len(0)?;
            file.write_zeros(0, file_bytes)?;
            file.sync_data()?;
            if !Mutant::NoDirectorySync.on() {
                storage.sync_dir(DIR)?;
            }
            Ok(file)
        };
        let made: io::Result<Arc<dyn StorageFile>> = make();
        *state = match &made {
            Ok(file) => State::Ready(Arc::clone(file)),
            Err(e) => State::Failed(format!("the file could not be made: {e}")),
        };
        made
    }

    /// Syncs the file; one caller at a time, so that no caller misses an error that another one was told.
    pub(super) fn sync(&self) -> io::Result<()> {
        let mut failed = self.failed_sync.lock();
        if let Some(why) = &*failed {
            return Err(io::Error::other(why.clone()));
        }
        let synced = self.file()?.sync_data();
        if let Err(e) = &synced {
            *failed = Some(format!("an earlier sync of {} failed: {e}", self.name()));
        }
        synced
    }
}

pub(super) fn slot_name(index: u32) -> String {
    format!("{DIR}/{index:08x}")
}

/// The slot of a file name in [`DIR`].
pub(super) fn slot_index(name: &str) -> Option<u32> {
    if name.len() == 8 { u32::from_str_radix(name, 16).ok() } else { None }
}
