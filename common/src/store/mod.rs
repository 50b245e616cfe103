//! A node's store: journal, pool and catalogue behind one admission point.
//!
//! Data goes down: [`Store::submit`] gives a record its LSN, the journal makes it durable, the applier writes it to its
//! place, a checkpoint makes that visible and lets the journal be trimmed. Watermarks ([`Marks`]) come up.
//!
//! Each stage is three steps: *take* (a short lock, no I/O), *run* (I/O, no lock), *finish* (a short lock). Threads
//! call them in [`driver`]; the simulation calls them in any order a thread could, and crashes between any two.
//!
//! Invariants:
//! - LSNs are dense, and a record's place in the queue is its LSN minus the first one's.
//! - Nothing is applied, shipped or acknowledged before it is durable here.
//! - After a failed write or sync nothing is accepted or answered until the store is reopened.
//! - Lock order: applier, front, pool.
//!
//! Deliberately absent: who may write, when to acknowledge, and the network.

mod admission;
mod apply;
mod checkpoint;
pub mod driver;
mod inspect;
mod overlay;
mod read;
mod recovery;
mod retained;
pub mod setup;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
};

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;

pub use admission::{Change, ModifyError, SubmitError, Submitted};
pub use apply::{ApplyJob, BatchJob};
pub use checkpoint::CheckpointJob;
pub use inspect::{GroupFound, Inspection, JournalFound, VolumeFound, inspect};
pub use read::{ImageReader, ReadFailure, ReadOut};
pub use recovery::{OpenError, Recovery};
pub use retained::{GroupRetained, Retained};

use crate::{
    catalog::Catalog,
    journal::{Journal, JournalConfig, JournalReader, ReadError as JournalReadError, TrimPoint},
    pool::{Pool, PoolConfig, PoolIo, Reservation, Space},
    record::{Record, WriteData},
    state::NodeState,
    storage::Storage,
    types::{GroupId, Lsn, SegmentId, Uid, VolumeId},
};

use overlay::Overlay;

/// Which half of the pair a data directory belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Serves writes.
    Primary,
    /// Holds the copy.
    Backup,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        })
    }
}

/// How a store is set up.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The staging area.
    pub journal: JournalConfig,
    /// The devices.
    pub pool: PoolConfig,
    /// Journal bytes after which a checkpoint is taken.
    pub checkpoint_bytes: u64,
    /// Recent records kept in memory for the sender.
    pub tail_bytes: usize,
    /// Smallest write whose bytes go to fresh segments instead of the journal; `usize::MAX` switches that off.
    pub reference_bytes: usize,
    /// Payload of one apply job.
    pub apply_bytes: usize,
    /// Payload that may wait to be written to its place; more waits at admission.
    pub pending_bytes: usize,
    /// True if records are kept until a backup holds them.
    pub retain: bool,
}

/// Who a data directory is. Durable in the catalogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Which half.
    pub role: Role,
    /// The pair; nil on a backup that has not met its primary.
    pub pair: Uid,
    /// This directory.
    pub instance: Uid,
    /// Number of the ownership of the pair.
    pub generation: u64,
    /// Tells two generations of one number apart.
    pub generation_id: Uid,
}

/// What the last checkpoint made visible: the root from which everything else is replayed.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Root {
    state: NodeState,
    /// The newest record that the pool's metadata includes.
    applied: Lsn,
    trim: TrimPoint,
    acked: BTreeMap<GroupId, Lsn>,
}

/// How far this node's records have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks {
    /// Durable in the journal.
    pub durable: Lsn,
    /// Written to their place.
    pub applied: Lsn,
    /// Written to their place and synced, for records that ask for it.
    pub placed: Lsn,
    /// Raised whenever the backup's answers release something.
    pub releases: u64,
    /// The store has failed: nothing will move any more.
    pub failed: bool,
}

/// A record with its place.
#[derive(Debug)]
pub struct Entry {
    /// In this node's journal.
    pub lsn: Lsn,
    /// The record.
    pub record: Record,
    /// The writer waits until it is synced in its place.
    pub place: bool,
}

impl Entry {
    /// Bytes it holds in memory.
    fn memory_bytes(&self) -> usize {
        match &self.record.op {
            crate::record::Op::Write { data: WriteData::Inline(data) | WriteData::Segments(_, Some(data)), .. } => {
                data.len() + 256
            }
            _ => 256,
        }
    }
}

struct Watch {
    range: crate::types::BlockRange,
    touched: bool,
    id: u64,
}

struct Queued {
    entry: Arc<Entry>,
    /// Space promised to the record until it is in its place.
    _reservation: Option<Reservation>,
}

struct Front {
    identity: Identity,
    journal: Journal,
    /// As of the newest record.
    state: NodeState,
    overlay: Overlay,
    /// Records that are not in their place, from `marks.applied + 1` on.
    queue: VecDeque<Queued>,
    queue_bytes: usize,
    /// Records in the queue that may turn an overwrite in place into an allocation.
    queue_hazards: usize,
    /// Recent records, for the sender.
    tail: VecDeque<Arc<Entry>>,
    tail_bytes: usize,
    retained: Retained,
    /// Segments that belong to records of the journal.
    referenced: VecDeque<(Lsn, Vec<SegmentId>)>,
    referenced_bytes: u64,
    /// Newest write of each virtual segment that is acknowledged only when the backup has it.
    unacked_both: HashMap<(VolumeId, u64), Lsn, RandomState>,
    /// Size at which acknowledged ones are forgotten.
    prune_both_at: usize,
    /// Blocks that somebody reads in order to write them back changed, and whether they were written meanwhile.
    watches: Vec<Watch>,
    watch_id: u64,
    /// Payload bytes submitted, and released by the backup, since the store was opened.
    traffic: (u64, u64),
    failed: Option<String>,
    /// First LSN that the last captured checkpoint does not include.
    checkpoint_next: Lsn,
    /// The primary's time of some records, at most every [`TIME_STEP_MS`], for the age of the oldest retained one.
    times: VecDeque<(Lsn, i64)>,
}

/// See the module.
pub struct Store {
    config: StoreConfig,
    front: Mutex<Front>,
    /// Wakes the journal writer.
    work: Condvar,
    /// Wakes the applier.
    apply_work: Condvar,
    applier: Mutex<apply::Applier>,
    pool: Mutex<Pool>,
    io: PoolIo,
    space: Arc<Space>,
    catalog: Catalog,
    marks: watch::Sender<Marks>,
    wants: driver::Wants,
    stats: driver::Stats,
}

/// Distance of the times that are kept.
const TIME_STEP_MS: i64 = 100;
/// How many times are kept; when there are more, every second one goes.
const TIMES_MAX: usize = 16 * 1024;
/// Segments of `both` volumes that are remembered before acknowledged ones are looked for.
const PRUNE_BOTH_MIN: usize = 1024;

impl Front {
    /// Forgets acknowledged writes of `both` volumes, now and then.
    fn prune_both(&mut self) {
        if self.unacked_both.len() >= self.prune_both_at {
            let (retained, volumes) = (&self.retained, &self.state.volumes);
            self.unacked_both.retain(|(volume, _), lsn| {
                volumes.get(volume).is_some_and(|spec| !retained.group(spec.group).holds(*lsn))
            });
            self.prune_both_at = 2 * self.unacked_both.len().max(PRUNE_BOTH_MIN);
        }
    }

    fn note_time(&mut self, lsn: Lsn, time_unix_ms: i64) {
        let keep_from = self.retained.oldest().unwrap_or(lsn);
        while self.times.get(1).is_some_and(|(second, _)| *second <= keep_from) {
            self.times.pop_front();
        }
        if self.times.back().is_none_or(|(_, last)| time_unix_ms >= last + TIME_STEP_MS) {
            self.times.push_back((lsn, time_unix_ms));
        }
        if self.times.len() > TIMES_MAX {
            let mut odd = false;
            self.times.retain(|_| {
                odd = !odd;
                odd
            });
        }
    }
}

/// The store refuses work because an earlier write or sync failed.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[error("the store has failed and must be reopened: {0}")]
pub struct Failed(pub String);

impl Store {
    /// Who this node is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.front.lock().identity
    }

    /// How it is set up.
    #[must_use]
    pub fn config(&self) -> &StoreConfig {
        &self.config
    }

    /// The watermarks, and their changes.
    #[must_use]
    pub fn marks(&self) -> watch::Receiver<Marks> {
        self.marks.subscribe()
    }

    /// The catalogue as of the newest record.
    #[must_use]
    pub fn state(&self) -> NodeState {
        self.front.lock().state.clone()
    }

    /// Runs `f` on the catalogue as of the newest record, under the lock: keep it short.
    pub fn with_state<T>(&self, f: impl FnOnce(&NodeState) -> T) -> T {
        f(&self.front.lock().state)
    }

    /// The LSN the next record will get.
    #[must_use]
    pub fn next_lsn(&self) -> Lsn {
        self.front.lock().journal.next_lsn()
    }

    /// Space of the pool.
    #[must_use]
    pub fn space(&self) -> &Arc<Space> {
        &self.space
    }

    /// Counters and times of the stages.
    #[must_use]
    pub fn stats(&self) -> &driver::Stats {
        &self.stats
    }

    /// Bytes of the staging area that are in use: the span of the journal and the segments its records refer to.
    #[must_use]
    pub fn span_bytes(&self) -> u64 {
        let front = self.front.lock();
        front.journal.span_bytes() + front.referenced_bytes
    }

    /// What the backup does not hold.
    #[must_use]
    pub fn retained(&self) -> Retained {
        self.front.lock().retained.clone()
    }

    /// Payload bytes that were submitted, and that the backup released, since the store was opened.
    #[must_use]
    pub fn traffic(&self) -> (u64, u64) {
        self.front.lock().traffic
    }

    /// One group of it.
    #[must_use]
    pub fn retained_of(&self, group: GroupId) -> GroupRetained {
        self.front.lock().retained.group(group)
    }

    /// A time, Unix milliseconds, at or a little before that of the oldest record of `group` that the backup does not
    /// hold; `None` if it holds all.
    #[must_use]
    pub fn oldest_retained_time(&self, group: GroupId) -> Option<i64> {
        let front = self.front.lock();
        let oldest = front.retained.group(group).oldest?;
        let behind = front.times.partition_point(|(lsn, _)| *lsn <= oldest);
        front.times.get(behind.saturating_sub(1)).map(|(_, time)| *time)
    }

    /// The first record a new session has to look at: the oldest retained one, or the next.
    #[must_use]
    pub fn ship_from(&self) -> Lsn {
        let front = self.front.lock();
        front.retained.oldest().unwrap_or_else(|| front.journal.next_lsn())
    }

    /// Why the store refuses work, if it does.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.front.lock().failed.clone()
    }

    /// Refuses all work from now on.
    pub fn fail(&self, why: impl Into<String>) {
        let mut front = self.front.lock();
        self.fail_locked(&mut front, why.into());
    }

    fn fail_locked(&self, front: &mut Front, why: String) {
        if front.failed.is_none() {
            front.failed = Some(why);
        }
        self.marks.send_modify(|m| m.failed = true);
        self.work.notify_all();
        self.apply_work.notify_all();
    }

    /// The backup answered that it holds `group` durably up to `lsn`, records of so many payload bytes.
    pub fn release(&self, group: GroupId, lsn: Lsn, payload_bytes: u64) {
        {
            let mut front = self.front.lock();
            front.retained.on_released(group, lsn, payload_bytes);
            front.traffic.1 += payload_bytes;
            front.prune_both();
        }
        self.marks.send_modify(|m| m.releases += 1);
    }

    /// Durable records from `from` on, in order, up to about `max_bytes`; from memory where they are still there.
    ///
    /// # Errors
    /// If the journal was trimmed past `from` or cannot be read.
    pub fn records_from(
        &self,
        from: Lsn,
        max_bytes: usize,
        spill: &mut Option<Spill>,
    ) -> Result<Vec<Arc<Entry>>, JournalReadError> {
        let front = self.front.lock();
        let durable = self.marks.borrow().durable;
        if from > durable {
            return Ok(Vec::new());
        }
        if let Some(first) = front.tail.front().map(|e| e.lsn)
            && first <= from
        {
            *spill = None;
            let skip = usize::try_from(from.0 - first.0).expect("the tail fits memory");
            let mut bytes = 0;
            return Ok(front
                .tail
                .iter()
                .skip(skip)
                .take_while(|e| {
                    let take = e.lsn <= durable && bytes < max_bytes;
                    bytes += e.memory_bytes();
                    take
                })
                .cloned()
                .collect());
        }
        let mut reader = match spill.take() {
            Some(Spill { next, reader }) if next == from => reader,
            _ => front.journal.reader(from)?,
        };
        drop(front);
        let raw = reader.read(durable, max_bytes)?;
        let mut entries = Vec::with_capacity(raw.len());
        for record in raw {
            let lsn = record.lsn;
            let record = Record::decode(&record.head, &record.data).map_err(|source| JournalReadError::Corrupt {
                file: format!("the journal ({source})"),
                offset: 0,
                lsn,
            })?;
            entries.push(Arc::new(Entry { lsn, record, place: false }));
        }
        self.stats.spilled.fetch_add(entries.len() as u64, std::sync::atomic::Ordering::Relaxed);
        let next = entries.last().map_or(from, |e| e.lsn.next());
        *spill = Some(Spill { next, reader });
        Ok(entries)
    }

    /// The bytes of a write, from memory or, for a record that refers to segments, from the pool.
    ///
    /// # Errors
    /// If they cannot be read or do not match their checksums.
    pub fn payload(&self, entry: &Entry) -> Result<bytes::Bytes, ReadFailure> {
        read::payload(&self.io, &entry.record)
    }

    /// Segments of the pool, for status and tests.
    pub fn with_pool<T>(&self, f: impl FnOnce(&mut Pool) -> T) -> T {
        f(&mut self.pool.lock())
    }
}

/// A place in the journal's files for a sender that has fallen out of the memory tail.
pub struct Spill {
    next: Lsn,
    reader: JournalReader,
}

fn failed_io(what: &str, error: &io::Error) -> String {
    format!("{what}: {error}")
}

/// Opens a store or makes a new one. See [`recovery`].
///
/// # Errors
/// If the directory belongs to the other role, a device is missing or foreign, or the journal is corrupt.
pub fn open(
    storage: Arc<dyn Storage>,
    config: StoreConfig,
    role: Role,
    random: &mut dyn FnMut() -> Uid,
) -> Result<(Arc<Store>, Recovery), OpenError> {
    recovery::open(storage, config, role, random)
}
