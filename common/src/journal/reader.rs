//! Reading records back: windows over a file, batches in them, and the reader the sender uses.

use std::{io, ops::RangeInclusive, sync::Arc};

use bytes::Bytes;

use super::{
    Files, RawRecord, file_of,
    format::{BATCH_HEADER_LEN, BatchHeader, SECTOR, split_record},
    slot::Slot,
};
use crate::{
    storage::StorageFile,
    types::{Lsn, Uid},
};

/// Read at a time, in bytes.
const WINDOW: u64 = 1 << 20;

/// A part of a file in memory. Reads behind the end of the file see zeros, as a file that was never filled.
pub(super) struct Window {
    file: Arc<dyn StorageFile>,
    len: u64,
    start: u64,
    bytes: Bytes,
}

impl Window {
    pub(super) fn new(file: Arc<dyn StorageFile>) -> io::Result<Self> {
        Ok(Self { len: file.len()?, file, start: 0, bytes: Bytes::new() })
    }

    /// `len` bytes at `offset`, shorter at the end of the file.
    #[allow(clippy::cast_possible_truncation, reason = "offsets inside a buffer")]
    pub(super) fn get(&mut self, offset: u64, len: u64) -> io::Result<Bytes> {
        let end = offset.saturating_add(len).min(self.len);
        let offset = offset.min(end);
        if offset < self.start || end > self.start + self.bytes.len() as u64 {
            let read_end = end.max(offset.saturating_add(WINDOW).min(self.len));
            let mut buf = vec![0; (read_end - offset) as usize];
            self.file.read_exact_at(&mut buf, offset)?;
            (self.start, self.bytes) = (offset, buf.into());
        }
        Ok(self.bytes.slice((offset - self.start) as usize..(end - self.start) as usize))
    }

    /// The batch header at `offset`, if there is one that could have been written there.
    pub(super) fn batch_header(&mut self, offset: u64, store: &Uid) -> io::Result<Option<BatchHeader>> {
        let bytes = self.get(offset, BATCH_HEADER_LEN as u64)?;
        Ok(BatchHeader::decode(&bytes, store).filter(|h| {
            h.byte_len >= BATCH_HEADER_LEN as u64 && offset.saturating_add(h.byte_len) <= self.len && h.first_lsn.0 > 0
        }))
    }

    /// The records of a batch, or the LSN of the first bad one.
    pub(super) fn records(
        &mut self,
        offset: u64,
        header: &BatchHeader,
        store: &Uid,
    ) -> io::Result<Result<Vec<RawRecord>, Lsn>> {
        let mut bytes = self.get(offset, header.byte_len)?.slice(BATCH_HEADER_LEN..);
        let salt = header.salt(store);
        let mut records = Vec::new();
        let mut lsn = header.first_lsn;
        for _ in 0..header.record_count {
            match split_record(&bytes, &salt) {
                Some((record, head, data)) if record.lsn == lsn => {
                    let end = data.end;
                    records.push(RawRecord { lsn, head: bytes.slice(head), data: bytes.slice(data) });
                    bytes = bytes.slice(end..);
                }
                _ => return Ok(Err(lsn)),
            }
            lsn = lsn.next();
        }
        Ok(if bytes.is_empty() { Ok(records) } else { Err(lsn) })
    }
}

/// Why records could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The records were released and their file was given free.
    #[error("record {lsn} was trimmed from the journal, which starts at {oldest}; what it held needs a delta run")]
    Trimmed {
        /// The record asked for.
        lsn: Lsn,
        /// The oldest one there is.
        oldest: Lsn,
    },
    /// The record is not yet written.
    #[error("record {lsn} is not in the journal, which holds {} to {}", .held.start(), .held.end())]
    Unknown {
        /// The record asked for.
        lsn: Lsn,
        /// What there is.
        held: RangeInclusive<Lsn>,
    },
    /// A durable record is bad.
    #[error(
        "{file} is corrupt at byte {offset}, record {lsn}; the disk lost what it had confirmed: check it, and \
             resynchronise from the other side"
    )]
    Corrupt {
        /// The file.
        file: String,
        /// Where the batch starts.
        offset: u64,
        /// The record.
        lsn: Lsn,
    },
    /// Reading failed.
    #[error("reading {file} at byte {offset}: {source}")]
    Io {
        /// The file.
        file: String,
        /// Where.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// Reads durable records in order, without the journal's lock. What is trimmed meanwhile ends in an error.
pub struct JournalReader {
    files: Files,
    store: Uid,
    next: Lsn,
    /// File sequence and offset of the batch with `next`, or one before it.
    place: (u64, u64),
}

impl JournalReader {
    pub(super) fn new(files: Files, store: Uid, lsn: Lsn) -> Result<Self, ReadError> {
        let place = {
            let files = files.lock();
            let file = file_of(&files, lsn).map(|i| &files[i]);
            let file = file.ok_or(ReadError::Trimmed { lsn, oldest: files[0].first_lsn })?;
            (file.sequence, file.place_of(lsn))
        };
        Ok(Self { files, store, next: lsn, place })
    }

    /// The record the next read starts with.
    #[must_use]
    pub fn next_lsn(&self) -> Lsn {
        self.next
    }

    /// Records in order, at most `durable`, until `max_bytes` of heads and data are passed; empty when caught up.
    /// `durable` is the journal's `durable_lsn`. Data is not checked: its checksums are in the head.
    pub fn read(&mut self, durable: Lsn, max_bytes: usize) -> Result<Vec<RawRecord>, ReadError> {
        let mut out = Vec::new();
        let mut bytes = 0;
        let mut open: Option<(u64, Arc<Slot>, Window)> = None;
        while self.next <= durable && bytes < max_bytes {
            let slot = self.locate()?;
            let (sequence, offset) = self.place;
            let io_error = |source| ReadError::Io { file: slot.name(), offset, source };
            if open.as_ref().is_none_or(|(of, ..)| *of != sequence) {
                let window = slot.file().and_then(Window::new).map_err(io_error)?;
                open = Some((sequence, Arc::clone(&slot), window));
            }
            let (.., window) = open.as_mut().expect("opened above");
            let header = window.batch_header(offset, &self.store).map_err(io_error)?;
            let header = header.filter(|h| h.file_sequence == sequence && h.first_lsn <= self.next);
            let records = match &header {
                Some(header) => window.records(offset, header, &self.store).map_err(io_error)?,
                None => Err(self.next),
            };
            // The file may have been trimmed and used again while it was read.
            self.locate()?;
            if self.place != (sequence, offset) {
                continue;
            }
            let (Some(header), Ok(records)) = (header, records) else {
                return Err(ReadError::Corrupt { file: slot.name(), offset, lsn: self.next });
            };
            for record in records {
                if record.lsn == self.next && record.lsn <= durable && bytes < max_bytes {
                    bytes += record.head.len() + record.data.len();
                    self.next = record.lsn.next();
                    out.push(record);
                }
            }
            if header.last_lsn() < self.next {
                self.place.1 = offset + header.span();
            }
        }
        Ok(out)
    }

    /// The slot of the file at `place`, after moving on to the next file if this one is read to its end. A reader that
    /// had caught up may find its file gone and what it wants in one that is still there.
    fn locate(&mut self) -> Result<Arc<Slot>, ReadError> {
        let files = self.files.lock();
        let oldest = files[0].first_lsn;
        let index = self.place.0.checked_sub(files[0].sequence).and_then(|i| usize::try_from(i).ok());
        let Some(file) = index.and_then(|i| files.get(i)) else {
            let file = file_of(&files, self.next).map(|i| &files[i]);
            let file = file.ok_or(ReadError::Trimmed { lsn: self.next, oldest })?;
            self.place = (file.sequence, file.place_of(self.next));
            return Ok(Arc::clone(&file.slot));
        };
        if self.place.1 < file.end {
            return Ok(Arc::clone(&file.slot));
        }
        match index.and_then(|i| files.get(i + 1)) {
            Some(next) => {
                self.place = (next.sequence, SECTOR);
                Ok(Arc::clone(&next.slot))
            }
            None => {
                let held = files[0].first_lsn..=Lsn(self.next.0 - 1);
                Err(ReadError::Unknown { lsn: self.next, held })
            }
        }
    }
}
