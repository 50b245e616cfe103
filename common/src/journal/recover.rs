//! Opening a journal: what is in it, whether its end is torn or its middle corrupt, and the start of a new epoch.
//!
//! The chain is what can be read from the trim point on: batches one behind the other, LSNs without a hole, epochs that
//! never sink, files in sequence. Where it ends, [`Tail::look_behind`] decides: if anything behind proves that more was
//! durable, the journal is corrupt and is not opened. Otherwise the rest was never confirmed and is dropped. Before
//! `open` returns, what was read is made durable (it may have come from a cache that a failed sync left behind), and so
//! is the batch that starts the new epoch, which hides what was dropped for good.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
};

use parking_lot::Mutex;

use super::{
    Cursor, FileUse, Journal, JournalConfig, RawRecord, TrimPoint,
    format::{BATCH_HEADER_LEN, BatchHeader, FILE_HEADER_LEN, FileHeader, SECTOR},
    reader::Window,
    slot::{DIR, Slot, slot_index, slot_name},
    unused_index,
    writer::Batch,
};
use crate::{
    mutant::Mutant,
    storage::{OpenMode, Storage, StorageFile},
    types::{Lsn, Uid},
};

/// What opening found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovered {
    /// The LSN of the next record.
    pub next_lsn: Lsn,
    /// Records delivered.
    pub records: u64,
    /// Their heads and data, in bytes.
    pub bytes: u64,
    /// Bytes of batches that were never confirmed and are dropped, as far as their headers can be read.
    pub dropped_bytes: u64,
    /// The epoch that begins now.
    pub epoch: u64,
}

/// What a journal holds, read without changing it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// Files in the journal's directory.
    pub files: usize,
    /// Their bytes.
    pub file_bytes: u64,
    /// Bytes from the first file that is needed to the end of what is valid.
    pub span_bytes: u64,
    /// Epoch of the last valid batch; 0 if there is none.
    pub epoch: u64,
    /// The LSN the next record would get.
    pub next_lsn: Lsn,
    /// Records from the trim point on.
    pub records: u64,
    /// Bytes of batches that were never confirmed; opening drops them.
    pub dropped_bytes: u64,
    /// Why opening would refuse the journal as corrupt, if it would.
    pub corruption: Option<String>,
}

/// Why a journal was not opened. Nothing may be served.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The sizes do not fit together.
    #[error("journal settings: {0}")]
    Config(&'static str),
    /// A durable record is missing or bad.
    #[error(
        "{file} is corrupt at byte {offset}, record {lsn}: {evidence}; nothing was changed: restore the disk, or \
         promote the backup"
    )]
    Corrupt {
        /// The file.
        file: String,
        /// Where the batch should start.
        offset: u64,
        /// The first record that is missing.
        lsn: Lsn,
        /// Why it cannot be a torn tail.
        evidence: String,
    },
    /// Written by another version of the format.
    #[error("{file} has journal format {version}, this program reads 1; use the program that wrote it")]
    Version {
        /// The file.
        file: String,
        /// Its format.
        version: u32,
    },
    /// Of another data directory.
    #[error("{file} belongs to store {found}, not to {expected}; put the right staging directory in place")]
    Foreign {
        /// The file.
        file: String,
        /// Whose it is.
        found: Uid,
        /// Whose it should be.
        expected: Uid,
    },
    /// The caller could not take a record.
    #[error("record {lsn} cannot be replayed: {reason}")]
    Record {
        /// The record.
        lsn: Lsn,
        /// Why.
        reason: String,
    },
    /// The storage failed.
    #[error("{doing} {file}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file or directory.
        file: String,
        /// What the system said.
        source: io::Error,
    },
}

fn io_error(doing: &'static str, file: impl Into<String>) -> impl FnOnce(io::Error) -> RecoverError {
    let file = file.into();
    move |source| RecoverError::Io { doing, file, source }
}

/// A file as it was found.
struct Found {
    index: u32,
    file: Arc<dyn StorageFile>,
    len: u64,
    header: Option<FileHeader>,
}

impl Found {
    fn window(&self) -> Result<Window, RecoverError> {
        Window::new(Arc::clone(&self.file)).map_err(io_error("reading", slot_name(self.index)))
    }
}

/// What could be read, and where it ends.
struct Chain {
    files: VecDeque<FileUse>,
    epoch: u64,
    next: Lsn,
    records: u64,
    bytes: u64,
    /// Everything up to here was durable by the word of a later batch.
    proven: Lsn,
    /// File, offset and end of batches that nothing proves, and their last LSN.
    unproven: VecDeque<(u32, u64, u64, Lsn)>,
    /// The last batch, if it only starts an epoch.
    last_epoch_start: Option<u64>,
}

/// What lies behind the end of the chain.
#[derive(Default)]
struct Tail {
    max_epoch: u64,
    dropped_bytes: u64,
    evidence: Option<String>,
}

impl Journal {
    /// Reads the journal from the trim point on, gives each record with `lsn >= trim.lsn` to `on_record` in order, and
    /// starts a new epoch durably. `verify` says whether data fits its head. Makes an empty journal if there is none.
    pub fn open(
        storage: Arc<dyn Storage>,
        store: Uid,
        config: JournalConfig,
        trim: TrimPoint,
        verify: &dyn Fn(&[u8], &[u8]) -> bool,
        on_record: &mut dyn FnMut(RawRecord) -> Result<(), RecoverError>,
    ) -> Result<(Self, Recovered), RecoverError> {
        check_config(&config)?;
        storage.create_dir(DIR).map_err(io_error("making directory", DIR))?;
        storage.sync_dir("").map_err(io_error("syncing the directory of", DIR))?;
        let found = find_files(&*storage, store, OpenMode::Existing)?;
        let mut chain = read_chain(&found, store, trim, verify, on_record)?;
        let start = trim.file_sequence.max(1);
        let tail = Tail::look_behind(&found, store, &chain, start)?;
        if let Some(error) = corruption(&chain, &tail, trim) {
            return Err(error);
        }
        make_durable(&*storage, &found, &chain, start)?;

        let mut free = BTreeMap::new();
        for f in &found {
            if chain.files.iter().all(|used| used.slot.index != f.index) {
                // One that was never used may have failed while it was made: it is made again.
                let is_whole = f.len >= config.file_bytes && f.header.is_some();
                let slot = if is_whole { Slot::ready(f.index, Arc::clone(&f.file)) } else { Slot::new(f.index) };
                free.insert(f.index, Arc::new(slot));
            }
        }
        let is_new = chain.files.is_empty();
        let epoch = if Mutant::NoNewEpoch.on() && !is_new { chain.epoch } else { tail.max_epoch.max(chain.epoch) + 1 };
        if epoch > chain.epoch {
            start_epoch(&storage, store, &config, &mut chain, &mut free, epoch)?;
        }
        let recovered = Recovered {
            next_lsn: chain.next,
            records: chain.records,
            bytes: chain.bytes,
            dropped_bytes: tail.dropped_bytes,
            epoch,
        };
        let last = chain.files.back().expect("the new epoch has a file");
        let journal = Self {
            plan: Cursor { base: last.base, bytes: last.bytes, offset: last.end },
            storage,
            store,
            config,
            epoch,
            next_lsn: chain.next,
            durable_lsn: Lsn(chain.next.0 - 1),
            trim,
            files: Arc::new(Mutex::new(chain.files)),
            free,
            queue: VecDeque::new(),
            queued_bytes: 0,
            in_flight: VecDeque::new(),
            failed: None,
        };
        Ok((journal, recovered))
    }

    /// As [`Journal::open`], but changes nothing: files are opened for reading only, no epoch begins, and corruption is
    /// a finding instead of an error.
    ///
    /// # Errors
    /// The journal cannot be read, is of another store or version, or `on_record` refuses a record.
    pub fn scan(
        storage: &dyn Storage,
        store: Uid,
        trim: TrimPoint,
        verify: &dyn Fn(&[u8], &[u8]) -> bool,
        on_record: &mut dyn FnMut(RawRecord) -> Result<(), RecoverError>,
    ) -> Result<Scan, RecoverError> {
        let found = find_files(storage, store, OpenMode::ReadOnly)?;
        let chain = read_chain(&found, store, trim, verify, on_record)?;
        let tail = Tail::look_behind(&found, store, &chain, trim.file_sequence.max(1))?;
        Ok(Scan {
            files: found.len(),
            file_bytes: found.iter().map(|f| f.len).sum(),
            span_bytes: chain.files.back().map_or(0, |last| last.base + last.end),
            epoch: chain.epoch,
            next_lsn: chain.next,
            records: chain.records,
            dropped_bytes: tail.dropped_bytes,
            corruption: corruption(&chain, &tail, trim).map(|error| error.to_string()),
        })
    }
}

/// The error of a chain that ends too early; `None` if what lies behind its end is a torn tail.
fn corruption(chain: &Chain, tail: &Tail, trim: TrimPoint) -> Option<RecoverError> {
    let (at, offset) = chain.files.back().map_or((0, SECTOR), |f| (f.slot.index, f.end));
    let corrupt = |evidence| RecoverError::Corrupt { file: slot_name(at), offset, lsn: chain.next, evidence };
    if let Some(evidence) = &tail.evidence
        && !Mutant::CorruptionIsTornTail.on()
    {
        return Some(corrupt(evidence.clone()));
    }
    let is_short = chain.next < trim.lsn || (chain.files.is_empty() && trim.file_sequence > 0);
    let start = trim.file_sequence.max(1);
    is_short.then(|| corrupt(format!("the checkpoint covers records below {} of file {start}", trim.lsn)))
}

fn check_config(config: &JournalConfig) -> Result<(), RecoverError> {
    let wrong = if !config.file_bytes.is_multiple_of(SECTOR) || config.file_bytes < 8 * SECTOR {
        "file_bytes must be a multiple of 512 and at least 4096"
    } else if config.capacity_bytes < 2 * config.file_bytes {
        "capacity_bytes must be at least two files"
    } else if config.reserve_bytes >= config.capacity_bytes {
        "reserve_bytes must be below capacity_bytes"
    } else {
        return Ok(());
    };
    Err(RecoverError::Config(wrong))
}

fn find_files(storage: &dyn Storage, store: Uid, mode: OpenMode) -> Result<Vec<Found>, RecoverError> {
    let mut found = Vec::new();
    for name in storage.list(DIR).map_err(io_error("listing", DIR))? {
        let Some(index) = slot_index(&name) else { continue };
        let name = slot_name(index);
        let file = storage.open(&name, mode).map_err(io_error("opening", &name))?;
        let len = file.len().map_err(io_error("reading", &name))?;
        let mut header = None;
        if len >= SECTOR {
            let mut bytes = [0; FILE_HEADER_LEN];
            file.read_exact_at(&mut bytes, 0).map_err(io_error("reading", &name))?;
            header =
                FileHeader::decode(&bytes).map_err(|version| RecoverError::Version { file: name.clone(), version })?;
        }
        if let Some(h) = header
            && h.store != store
        {
            return Err(RecoverError::Foreign { file: name, found: h.store, expected: store });
        }
        found.push(Found { index, file, len, header });
    }
    Ok(found)
}

/// The file of a sequence that can follow; of two, one is of a dropped epoch.
fn find_use(found: &[Found], sequence: u64, first: Option<Lsn>, epoch: u64) -> Option<(&Found, FileHeader)> {
    found
        .iter()
        .filter_map(|f| f.header.map(|h| (f, h)))
        .filter(|(_, h)| h.sequence == sequence && first.is_none_or(|lsn| h.first_lsn == lsn) && h.epoch >= epoch)
        .max_by_key(|(_, h)| h.epoch)
}

fn read_chain(
    found: &[Found],
    store: Uid,
    trim: TrimPoint,
    verify: &dyn Fn(&[u8], &[u8]) -> bool,
    on_record: &mut dyn FnMut(RawRecord) -> Result<(), RecoverError>,
) -> Result<Chain, RecoverError> {
    let mut chain = Chain {
        files: VecDeque::new(),
        epoch: 0,
        next: Lsn::ZERO.next(),
        records: 0,
        bytes: 0,
        proven: Lsn::ZERO,
        unproven: VecDeque::new(),
        last_epoch_start: None,
    };
    let mut next_file = match trim.file_sequence {
        // Nothing was trimmed: the journal starts with its first record.
        0 => find_use(found, 1, Some(chain.next), 0),
        sequence => find_use(found, sequence, None, 0).filter(|(_, h)| h.first_lsn <= trim.lsn),
    };
    while let Some((file, header)) = next_file {
        if chain.files.is_empty() {
            chain.next = header.first_lsn;
        }
        chain.epoch = header.epoch;
        let base = chain.files.back().map_or(0, |f| f.base + f.bytes);
        chain.files.push_back(FileUse {
            slot: Arc::new(Slot::ready(file.index, Arc::clone(&file.file))),
            sequence: header.sequence,
            first_lsn: header.first_lsn,
            base,
            bytes: header.file_bytes,
            end: SECTOR,
            index: Vec::new(),
        });
        chain.read_file(file, store, trim.lsn, verify, on_record)?;
        next_file = find_use(found, header.sequence + 1, Some(chain.next), chain.epoch);
    }
    Ok(chain)
}

impl Chain {
    /// Takes the batches of the last file, as long as each follows from the one before.
    fn read_file(
        &mut self,
        found: &Found,
        store: Uid,
        deliver_from: Lsn,
        verify: &dyn Fn(&[u8], &[u8]) -> bool,
        on_record: &mut dyn FnMut(RawRecord) -> Result<(), RecoverError>,
    ) -> Result<(), RecoverError> {
        let mut window = found.window()?;
        let file = self.files.back_mut().expect("pushed by the caller");
        self.last_epoch_start = None;
        loop {
            let offset = file.end;
            let error = io_error("reading", slot_name(found.index));
            let header = window.batch_header(offset, &store).map_err(error)?;
            let Some(header) = header.filter(|h| {
                h.file_sequence == file.sequence
                    && h.first_lsn == self.next
                    && h.epoch >= self.epoch
                    && offset + h.byte_len <= file.bytes
            }) else {
                return Ok(());
            };
            let error = io_error("reading", slot_name(found.index));
            let Ok(records) = window.records(offset, &header, &store).map_err(error)? else { return Ok(()) };
            let wanted = || records.iter().filter(|r| r.lsn >= deliver_from);
            if !wanted().all(|r| verify(&r.head, &r.data)) {
                return Ok(());
            }
            self.records += wanted().count() as u64;
            self.bytes += wanted().map(|r| (r.head.len() + r.data.len()) as u64).sum::<u64>();
            for record in records.into_iter().filter(|r| r.lsn >= deliver_from) {
                on_record(record)?;
            }
            self.epoch = header.epoch;
            self.next = header.last_lsn().next();
            self.proven = self.proven.max(header.durable_lsn);
            // Before it is pushed: the start of an epoch does not prove itself.
            while self.unproven.front().is_some_and(|(.., last)| *last <= self.proven) {
                self.unproven.pop_front();
            }
            self.unproven.push_back((found.index, offset, offset + header.span(), header.last_lsn()));
            self.last_epoch_start = (header.record_count == 0).then_some(offset);
            file.note_batch(header.first_lsn, offset);
            file.end += header.span();
        }
    }
}

impl Tail {
    /// Looks at everything that may have been written after the end of the chain.
    ///
    /// A batch of the same or a later epoch and file proves that the chain should go on if it names a durable LSN the
    /// chain does not reach, or if it has records of a later epoch, since the start of an epoch is durable before its
    /// first record is written. The bare start of an epoch at the end of the chain proves nothing: its file's header
    /// may have been lost with the same crash.
    fn look_behind(found: &[Found], store: Uid, chain: &Chain, start: u64) -> Result<Self, RecoverError> {
        let mut tail = Self::default();
        let end = chain.files.back().map(|f| (f.slot.index, f.sequence, f.end));
        let sequence = end.map_or(start, |(_, sequence, _)| sequence);
        for f in found {
            tail.max_epoch = tail.max_epoch.max(f.header.map_or(0, |h| h.epoch));
            let from = match (f.header, end) {
                (_, Some((index, _, offset))) if index == f.index => offset,
                (Some(h), _) if h.sequence < sequence => continue,
                (Some(h), None) => {
                    // The first file is made durable before anything is served, and others only follow it.
                    tail.evidence = Some(format!("file {start} is missing, file {} is there", h.sequence));
                    SECTOR
                }
                _ => SECTOR,
            };
            let mut window = f.window()?;
            for offset in (from..f.len).step_by(FILE_HEADER_LEN) {
                let header = window.batch_header(offset, &store).map_err(io_error("reading", slot_name(f.index)))?;
                let Some(h) = header else { continue };
                tail.max_epoch = tail.max_epoch.max(h.epoch);
                if h.epoch < chain.epoch || h.file_sequence < sequence {
                    continue;
                }
                if h.durable_lsn >= chain.next || (h.epoch > chain.epoch && h.record_count > 0) {
                    let place = format!("the batch at byte {offset} of {}", slot_name(f.index));
                    let epoch = format!("epoch {}", h.epoch);
                    tail.evidence = Some(format!("{place}, {epoch}, says that {} was durable", h.durable_lsn));
                    return Ok(tail);
                }
                if h.record_count > 0 && h.first_lsn >= chain.next {
                    tail.dropped_bytes += h.byte_len - BATCH_HEADER_LEN as u64;
                }
            }
        }
        Ok(tail)
    }
}

/// Makes the chain durable, and headers of dropped files invalid.
///
/// After a failed sync the system may show pages that are clean and not on the disk: what no later batch proves is
/// written again, the same bytes in the same place, before it is synced.
fn make_durable(storage: &dyn Storage, found: &[Found], chain: &Chain, start: u64) -> Result<(), RecoverError> {
    for f in found {
        let name = slot_name(f.index);
        let used = chain.files.iter().find(|used| used.slot.index == f.index);
        let rewrite = |from: u64, to: u64| -> Result<(), RecoverError> {
            let bytes = f.window()?.get(from, to - from).map_err(io_error("reading", &name))?;
            f.file.write_all_at(&bytes, from).map_err(io_error("writing", &name))
        };
        if let Some(used) = used {
            for (_, from, to, _) in chain.unproven.iter().filter(|(index, ..)| *index == f.index) {
                rewrite(*from, *to)?;
            }
            if used.end == SECTOR || chain.unproven.iter().any(|(i, from, ..)| (*i, *from) == (f.index, SECTOR)) {
                rewrite(0, SECTOR)?;
            }
        } else if f.header.is_some_and(|h| h.sequence >= start) {
            f.file.write_zeros(0, SECTOR).map_err(io_error("writing", &name))?;
        } else {
            continue;
        }
        f.file.sync_data().map_err(io_error("syncing", &name))?;
    }
    storage.sync_dir(DIR).map_err(io_error("syncing", DIR))
}

/// Writes the start of `epoch` at the end of the chain, in the place of an epoch that got no record.
fn start_epoch(
    storage: &Arc<dyn Storage>,
    store: Uid,
    config: &JournalConfig,
    chain: &mut Chain,
    free: &mut BTreeMap<u32, Arc<Slot>>,
    epoch: u64,
) -> Result<(), RecoverError> {
    let mut file_header = None;
    if let Some(offset) = chain.last_epoch_start
        && let Some(file) = chain.files.back_mut()
    {
        file.end = offset;
    }
    if chain.files.back().is_none_or(|f| f.end + SECTOR > f.bytes) {
        let (sequence, base) = chain.files.back().map_or((1, 0), |f| (f.sequence + 1, f.base + f.bytes));
        let slot = free.pop_first().map_or_else(|| Arc::new(Slot::new(unused_index(&chain.files))), |(_, s)| s);
        let (first_lsn, bytes) = (chain.next, config.file_bytes);
        file_header = Some(FileHeader { store, sequence, first_lsn, epoch, file_bytes: bytes });
        let index = Vec::new();
        chain.files.push_back(FileUse { slot, sequence, first_lsn, base, bytes, end: SECTOR, index });
    }
    let file = chain.files.back_mut().expect("pushed if there was none");
    let header = BatchHeader {
        epoch,
        file_sequence: file.sequence,
        first_lsn: chain.next,
        durable_lsn: Lsn(chain.next.0 - 1),
        record_count: 0,
        byte_len: BATCH_HEADER_LEN as u64,
    };
    let batch = Batch {
        storage: Arc::clone(storage),
        store,
        slot: Arc::clone(&file.slot),
        file_bytes: file.bytes,
        file_header,
        offset: file.end,
        header,
        records: Vec::new(),
    };
    batch.write().map_err(io_error("starting a new epoch in", file.slot.name()))?;
    if file.index.is_empty() {
        file.note_batch(chain.next, file.end);
    }
    file.end += SECTOR;
    Ok(())
}
