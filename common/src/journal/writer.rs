//! One batch on its way to the disk; runs without the journal's lock.

use std::{
    io::{self, IoSlice},
    ops::RangeInclusive,
    sync::Arc,
};

use bytes::Bytes;

use super::{
    format::{BATCH_HEADER_LEN, BatchHeader, FILE_HEADER_LEN, FileHeader, RECORD_HEADER_LEN, RecordHeader, SECTOR},
    slot::Slot,
};
use crate::{
    storage::Storage,
    types::{Lsn, Uid},
};

/// A journal's file that may be made before it is needed.
pub struct FilePreparation {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) slot: Arc<Slot>,
    pub(super) file_bytes: u64,
}

impl FilePreparation {
    /// Fills the file with zeros and makes it durable. An error is also reported by the first batch that needs the file.
    pub fn run(&self) -> io::Result<()> {
        self.slot.prepare(&*self.storage, self.file_bytes).map(drop)
    }
}

/// Records that become durable together, and their place.
pub struct Batch {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) store: Uid,
    pub(super) slot: Arc<Slot>,
    pub(super) file_bytes: u64,
    /// The batch opens a file: its header goes with it.
    pub(super) file_header: Option<FileHeader>,
    pub(super) offset: u64,
    pub(super) header: BatchHeader,
    pub(super) records: Vec<(Bytes, Bytes)>,
}

impl Batch {
    /// The records of the batch.
    #[must_use]
    pub fn lsns(&self) -> RangeInclusive<Lsn> {
        self.header.first_lsn..=self.header.last_lsn()
    }

    /// Bytes the batch takes in its file.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "a batch is in memory")]
    pub fn bytes(&self) -> usize {
        self.header.span() as usize
    }

    /// Writes and syncs; makes the file first if it is new and [`FilePreparation`] did not. The result belongs to
    /// `Journal::finish_batch`, also when it is an error. Never call it again after an error.
    pub fn write(&self) -> io::Result<()> {
        let file = self.slot.prepare(&*self.storage, self.file_bytes)?;
        let (headers, ends) = self.encode_headers();
        let padding = [0; FILE_HEADER_LEN];
        let mut slices = Vec::with_capacity(2 * self.records.len() + 3);
        let file_header = self.file_header.map(|h| h.encode());
        let mut offset = self.offset;
        if let Some(bytes) = &file_header {
            slices.push(IoSlice::new(bytes));
            offset -= SECTOR;
        }
        let mut start = 0;
        for (end, (_, data)) in ends.iter().zip(&self.records) {
            slices.push(IoSlice::new(&headers[start..*end]));
            if !data.is_empty() {
                slices.push(IoSlice::new(data));
            }
            start = *end;
        }
        if self.records.is_empty() {
            slices.push(IoSlice::new(&headers));
        }
        #[allow(clippy::cast_possible_truncation, reason = "less than a sector")]
        let pad = (self.header.span() - self.header.byte_len) as usize;
        slices.push(IoSlice::new(&padding[..pad]));
        file.write_vectored_at(&mut slices, offset)?;
        self.slot.sync()
    }

    /// The batch header and, for each record, its header and head; and where each record's data comes in between.
    fn encode_headers(&self) -> (Vec<u8>, Vec<usize>) {
        let heads: usize = self.records.iter().map(|(head, _)| head.len()).sum();
        let mut out = Vec::with_capacity(BATCH_HEADER_LEN + self.records.len() * RECORD_HEADER_LEN + heads);
        out.extend_from_slice(&self.header.encode(&self.store));
        let salt = self.header.salt(&self.store);
        let mut ends = Vec::with_capacity(self.records.len());
        let mut lsn = self.header.first_lsn;
        for (head, data) in &self.records {
            #[allow(clippy::cast_possible_truncation, reason = "append refuses longer records")]
            let header = RecordHeader { head_len: head.len() as u32, data_len: data.len() as u32, lsn };
            out.extend_from_slice(&header.encode(head, &salt));
            out.extend_from_slice(head);
            ends.push(out.len());
            lsn = lsn.next();
        }
        (out, ends)
    }
}
