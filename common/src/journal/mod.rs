//! The durable, ordered log: staging device and write-ahead log in one.
//!
//! A record is an opaque `head` and `data`; the journal gives it its LSN. Records are queued, taken as batches, written
//! and synced without a lock, and durable in order. Layout and the case analysis of torn writes: `docs/formats.md`.
//!
//! Invariants:
//! - `durable_lsn` only moves over batches whose sync succeeded, in order, whose file was durable with its name before.
//! - No sector of a durable record is written again until its whole file lies before the trim point.
//! - After a failed write or sync nothing more becomes durable until the journal is opened anew.
//! - Recovery starts a new epoch before it returns, so that what it dropped never comes back.
//!
//! Deliberately absent: threads, clocks, and the checksum of `data`, which is the caller's (`verify`).

mod format;
mod reader;
mod recover;
mod slot;
mod writer;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use self::{
    format::{BATCH_HEADER_LEN, BatchHeader, FileHeader, RECORD_HEADER_LEN, SECTOR},
    slot::Slot,
};
pub use self::{
    reader::{JournalReader, ReadError},
    recover::{RecoverError, Recovered, Scan},
    writer::{Batch, FilePreparation},
};
use crate::{
    mutant::Mutant,
    storage::Storage,
    types::{Lsn, Uid},
};

/// Batches between [`Journal::begin_batch`] and [`Journal::finish_batch`].
const IN_FLIGHT_MAX: usize = 2;
/// Distance of the places that [`Journal::span_from`] and [`Journal::reader`] know, in bytes.
const INDEX_STEP: u64 = 1 << 20;

/// Sizes of a journal, in bytes. They may change from one opening to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalConfig {
    /// All files together; rounded down to whole files, at least two.
    pub capacity_bytes: u64,
    /// One file: a multiple of 512, at least 4 KiB. A record and its headers must fit in one.
    pub file_bytes: u64,
    /// What only [`Class::Control`] may use.
    pub reserve_bytes: u64,
    /// A batch takes no further record beyond this; it always takes one.
    pub max_batch_bytes: usize,
}

/// What a checkpoint records of the journal: recovery scans from the file and delivers from the LSN on.
///
/// The default stands for a journal that no checkpoint has trimmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TrimPoint {
    /// Records below are not needed.
    pub lsn: Lsn,
    /// The file with that record, or where it will be.
    pub file_sequence: u64,
}

/// A record as it lies in the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawRecord {
    /// Its place.
    pub lsn: Lsn,
    /// Covered by the journal's checksum.
    pub head: Bytes,
    /// Covered by checksums in the head only. A slice of a larger buffer: copy what is kept for long.
    pub data: Bytes,
}

/// Who may use the reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Switch, demote, clear, abort: what must always find space.
    Control,
    /// Everything else.
    Data,
}

/// Why a record was not queued. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The span from the trim point would pass the capacity, or the reserve.
    #[error(
        "the journal is full: {needed} bytes are needed, {span} of {capacity} are in use; wait until records are \
         released and checkpointed, or enlarge [staging] capacity"
    )]
    JournalFull {
        /// What the record takes in bytes, with headers and padding.
        needed: u64,
        /// Bytes in use, queued records included.
        span: u64,
        /// Bytes that records of this class may use.
        capacity: u64,
    },
    /// Longer than a file.
    #[error("a record of {bytes} bytes does not fit a journal file, which takes {limit}; split the write")]
    TooLarge {
        /// What the record takes in bytes.
        bytes: u64,
        /// What a file takes.
        limit: u64,
    },
    /// A write or sync failed before.
    #[error(transparent)]
    Failed(#[from] JournalError),
}

/// The journal is unusable until it is opened anew.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the journal failed and takes nothing until it is reopened: {cause}")]
pub struct JournalError {
    /// The first failure.
    pub cause: String,
}

/// One use of a file.
struct FileUse {
    slot: Arc<Slot>,
    sequence: u64,
    first_lsn: Lsn,
    /// Bytes of all files before it: gives a place in the journal one number.
    base: u64,
    /// Its length.
    bytes: u64,
    /// Where the next batch goes.
    end: u64,
    /// First LSN and offset of a batch every [`INDEX_STEP`].
    index: Vec<(Lsn, u64)>,
}

impl FileUse {
    fn note_batch(&mut self, first: Lsn, offset: u64) {
        if self.index.last().is_none_or(|(_, last)| offset - last >= INDEX_STEP) {
            self.index.push((first, offset));
        }
    }

    /// The nearest known batch at or below `lsn`.
    fn place_of(&self, lsn: Lsn) -> u64 {
        let after = self.index.partition_point(|(first, _)| *first <= lsn);
        self.index.get(after.saturating_sub(1)).map_or(SECTOR, |(_, offset)| *offset)
    }
}

/// The files from the trim point to the head, never empty; shared with the readers.
type Files = Arc<Mutex<VecDeque<FileUse>>>;

fn file_of(files: &VecDeque<FileUse>, lsn: Lsn) -> Option<usize> {
    files.partition_point(|f| f.first_lsn <= lsn).checked_sub(1)
}

/// A place for planning: the end of what is written or queued.
#[derive(Clone, Copy)]
struct Cursor {
    base: u64,
    bytes: u64,
    offset: u64,
}

impl Cursor {
    /// Where the end is after `size` more bytes: in this file if they fit, else in the next.
    fn after(self, size: u64, file_bytes: u64) -> Self {
        if self.offset + size <= self.bytes {
            Self { offset: self.offset + size, ..self }
        } else {
            Self { base: self.base + self.bytes, bytes: file_bytes, offset: SECTOR + size }
        }
    }

    fn end(self) -> u64 {
        self.base + self.offset
    }
}

fn record_len(head: &Bytes, data: &Bytes) -> u64 {
    (RECORD_HEADER_LEN + head.len() + data.len()) as u64
}

/// Upper bound of what a record takes: a batch of its own.
fn lone_span(head: &Bytes, data: &Bytes) -> u64 {
    (BATCH_HEADER_LEN as u64 + record_len(head, data)).next_multiple_of(SECTOR)
}

/// The journal; its owner calls it under a lock, [`Batch::write`] without.
pub struct Journal {
    storage: Arc<dyn Storage>,
    store: Uid,
    config: JournalConfig,
    epoch: u64,
    next_lsn: Lsn,
    durable_lsn: Lsn,
    trim: TrimPoint,
    files: Files,
    /// Slots that hold nothing needed.
    free: BTreeMap<u32, Arc<Slot>>,
    queue: VecDeque<(Bytes, Bytes)>,
    queued_bytes: usize,
    /// Bound of the end once the queue is written.
    plan: Cursor,
    in_flight: VecDeque<Lsn>,
    failed: Option<JournalError>,
}

impl Journal {
    /// The LSN of the next record.
    #[must_use]
    pub fn next_lsn(&self) -> Lsn {
        self.next_lsn
    }

    /// Everything up to here is durable.
    #[must_use]
    pub fn durable_lsn(&self) -> Lsn {
        self.durable_lsn
    }

    /// The failure after which nothing more becomes durable until the journal is opened anew.
    #[must_use]
    pub fn failure(&self) -> Option<&JournalError> {
        self.failed.as_ref()
    }

    /// Queues a record, in memory only. The caller builds `head` with [`Self::next_lsn`].
    pub fn append(&mut self, head: Bytes, data: Bytes, class: Class) -> Result<Lsn, AppendError> {
        if let Some(error) = &self.failed {
            return Err(error.clone().into());
        }
        let needed = lone_span(&head, &data);
        let limit = (self.config.file_bytes - SECTOR).min(u64::from(u32::MAX));
        if needed > limit {
            return Err(AppendError::TooLarge { bytes: needed, limit });
        }
        let plan = self.plan.after(needed, self.config.file_bytes);
        let start = self.start();
        let reserve = if class == Class::Data { self.config.reserve_bytes } else { 0 };
        let capacity = self.capacity_bytes().saturating_sub(reserve);
        if plan.end() - start > capacity {
            return Err(AppendError::JournalFull { needed, span: self.plan.end() - start, capacity });
        }
        self.plan = plan;
        self.queued_bytes += RECORD_HEADER_LEN + head.len() + data.len();
        self.queue.push_back((head, data));
        let lsn = self.next_lsn;
        self.next_lsn = lsn.next();
        Ok(lsn)
    }

    /// Bytes of the queued records, with their headers.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Takes queued records as one batch and gives it its place. `None` if nothing is queued, two batches are in
    /// flight, or the journal failed. Batches are finished in the order they were taken.
    pub fn begin_batch(&mut self) -> Option<Batch> {
        if self.failed.is_some() || self.in_flight.len() >= IN_FLIGHT_MAX {
            return None;
        }
        let (head, data) = self.queue.front()?;
        let first = lone_span(head, data);
        let first_lsn = Lsn(self.next_lsn.0 - self.queue.len() as u64);
        let files = Arc::clone(&self.files);
        let mut files = files.lock();
        let last = files.back().expect("there is always a file");
        let opens_file = last.end + first > last.bytes;
        if opens_file {
            let next = FileUse {
                slot: self.take_slot(&files),
                sequence: last.sequence + 1,
                first_lsn,
                base: last.base + last.bytes,
                bytes: self.config.file_bytes,
                end: SECTOR,
                index: Vec::new(),
            };
            files.push_back(next);
        }
        let file = files.back_mut().expect("there is always a file");
        let (records, byte_len) = self.take_records(file.bytes - file.end);
        let record_count = u32::try_from(records.len()).expect("a batch is shorter than 4 GiB");
        let header = BatchHeader {
            epoch: self.epoch,
            file_sequence: file.sequence,
            first_lsn,
            durable_lsn: self.durable_lsn,
            record_count,
            byte_len,
        };
        let file_header = opens_file.then_some(FileHeader {
            store: self.store,
            sequence: file.sequence,
            first_lsn,
            epoch: self.epoch,
            file_bytes: file.bytes,
        });
        let offset = file.end;
        file.note_batch(first_lsn, offset);
        file.end += header.span();
        self.plan = Cursor { base: file.base, bytes: file.bytes, offset: file.end };
        for (head, data) in &self.queue {
            self.plan = self.plan.after(lone_span(head, data), self.config.file_bytes);
        }
        self.in_flight.push_back(header.last_lsn());
        Some(Batch {
            storage: Arc::clone(&self.storage),
            store: self.store,
            slot: Arc::clone(&file.slot),
            file_bytes: file.bytes,
            file_header,
            offset,
            header,
            records,
        })
    }

    /// Records for one batch that fits `room`, and its length in bytes.
    fn take_records(&mut self, room: u64) -> (Vec<(Bytes, Bytes)>, u64) {
        let mut byte_len = BATCH_HEADER_LEN as u64;
        let mut count = 0;
        for (head, data) in &self.queue {
            let with = byte_len + record_len(head, data);
            let full = with > self.config.max_batch_bytes as u64 || with.next_multiple_of(SECTOR) > room;
            if count > 0 && full {
                break;
            }
            byte_len = with;
            count += 1;
        }
        let records: Vec<_> = self.queue.drain(..count).collect();
        self.queued_bytes -= records.iter().map(|(h, d)| RECORD_HEADER_LEN + h.len() + d.len()).sum::<usize>();
        (records, byte_len)
    }

    /// A file to use next: one that exists, or a new name.
    fn take_slot(&mut self, files: &VecDeque<FileUse>) -> Arc<Slot> {
        if let Some((_, slot)) = self.free.pop_first() {
            return slot;
        }
        Arc::new(Slot::new(unused_index(files)))
    }

    /// A file to be made ready early, so that no batch has to wait for it: when the last one is half full. `None` if
    /// there is nothing to do. Cheap; call it after [`Self::begin_batch`].
    pub fn prepare_next_file(&mut self) -> Option<FilePreparation> {
        let files = self.files.lock();
        let last = files.back()?;
        let span = last.base + last.bytes - files.front()?.base;
        if self.failed.is_some() || last.end < last.bytes / 2 || span >= self.capacity_bytes() {
            return None;
        }
        if self.free.is_empty() {
            let index = unused_index(&files);
            self.free.insert(index, Arc::new(Slot::new(index)));
        }
        let slot = Arc::clone(self.free.first_key_value()?.1);
        let unprepared = slot.is_unprepared();
        unprepared.then(|| FilePreparation {
            storage: Arc::clone(&self.storage),
            slot,
            file_bytes: self.config.file_bytes,
        })
    }

    /// Applies the result of [`Batch::write`] and returns the durable LSN. An error poisons the journal.
    ///
    /// # Panics
    /// If batches are not finished in the order they were taken.
    pub fn finish_batch(&mut self, batch: Batch, result: io::Result<()>) -> Result<Lsn, JournalError> {
        let last = self.in_flight.pop_front();
        assert_eq!(last, Some(batch.header.last_lsn()), "batches are finished in the order they were taken");
        if let Err(e) = result
            && !Mutant::IgnoreFailedSync.on()
        {
            let cause = format!("writing records {} to {}: {e}", batch.header.first_lsn, batch.header.last_lsn());
            self.failed.get_or_insert(JournalError { cause });
        }
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.durable_lsn = batch.header.last_lsn();
        Ok(self.durable_lsn)
    }

    /// What a checkpoint that covers every record below `lsn` stores.
    #[must_use]
    pub fn trim_point_for(&self, lsn: Lsn) -> TrimPoint {
        let files = self.files.lock();
        let lsn = lsn.min(self.durable_lsn.next()).max(self.trim.lsn).max(files[0].first_lsn);
        // A file that holds a durable record is itself durable.
        let file = file_of(&files, lsn.min(self.durable_lsn)).unwrap_or(0);
        TrimPoint { lsn, file_sequence: files[file].sequence }
    }

    /// True if a checkpoint that covers every record below `lsn` would give a file free.
    #[must_use]
    pub fn would_trim(&self, lsn: Lsn) -> bool {
        self.trim_point_for(lsn).file_sequence > self.files.lock()[0].sequence
    }

    /// The checkpoint with `point` is durable: files before it may be used again. Older points change nothing.
    pub fn trim(&mut self, point: TrimPoint) {
        let mut files = self.files.lock();
        let mut keep_from = point.file_sequence;
        if Mutant::TrimTooEarly.on() {
            keep_from = u64::MAX;
        } else if point.lsn < self.trim.lsn || point.file_sequence < self.trim.file_sequence {
            return;
        }
        self.trim = point;
        while files.len() > 1 && files[0].sequence < keep_from {
            let file = files.pop_front().expect("there are two");
            self.free.insert(file.slot.index, file.slot);
        }
    }

    /// Start of the first file, as one number.
    fn start(&self) -> u64 {
        self.files.lock()[0].base
    }

    /// Bytes from the start of the oldest file that is needed to the head, with headers, padding, tails of files and
    /// queued records.
    #[must_use]
    pub fn span_bytes(&self) -> u64 {
        self.plan.end() - self.start()
    }

    /// Bytes of all files.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.config.capacity_bytes / self.config.file_bytes * self.config.file_bytes
    }

    /// Bytes from the record `lsn`, or the nearest known place at or below it, to the head.
    #[must_use]
    pub fn span_from(&self, lsn: Lsn) -> u64 {
        let files = self.files.lock();
        let place = file_of(&files, lsn).map_or(files[0].base, |i| files[i].base + files[i].place_of(lsn));
        self.plan.end().saturating_sub(place)
    }

    /// A reader of durable records from `lsn` on; fails if `lsn` was trimmed.
    pub fn reader(&self, lsn: Lsn) -> Result<JournalReader, ReadError> {
        JournalReader::new(Arc::clone(&self.files), self.store, lsn)
    }
}

/// The lowest name no file of the chain has. Free slots are used first.
fn unused_index(files: &VecDeque<FileUse>) -> u32 {
    (0..=u32::MAX).find(|i| files.iter().all(|f| f.slot.index != *i)).expect("fewer files than names")
}

#[cfg(test)]
mod tests;
