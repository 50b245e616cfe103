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
mod conflicts;
mod delta;
mod devices;
pub mod driver;
mod fsck;
mod held;
mod inspect;
mod levels;
mod overlay;
mod read;
mod recovery;
mod replica;
mod retained;
mod role;
mod scrub;
pub mod setup;
mod shrink;
mod snapshot;
#[cfg(test)]
mod testing;
mod watches;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
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
pub use conflicts::SentFirst;
pub use delta::{DeltaSizes, ModeError, Released};
pub use devices::{DeviceChangeError, RelocationJob};
pub use fsck::{Checkup, fsck};
pub use held::HeldSnapshot;
pub use inspect::{GroupFound, Inspection, JournalFound, VolumeFound, inspect};
pub use levels::{OverLevel, PoolBytes};
pub use read::{ImageReader, LayerReader, ReadFailure, ReadOut};
pub use recovery::{OpenError, Recovery};
pub use replica::{NewRun, RunContent};
pub use retained::{GroupRetained, LaneRetained, LaneSpan, Retained};
pub use role::{Back, Promoted, Promotion, RoleError, demote_stopped, role_of};
pub use scrub::{Checked, Mended, Repair, ScrubJob, Suspect};
pub use shrink::ShrinkError;
pub use snapshot::SnapshotError;

use crate::{
    catalog::Catalog,
    history::History,
    journal::{Journal, JournalConfig, JournalReader, RawRecord, ReadError as JournalReadError, TrimPoint},
    lane::{LANES_MAX, Lanes},
    lives::Lives,
    pool::{NoSpace, Pool, PoolConfig, PoolIo, Reservation, Space},
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
    /// Bytes a second that are moved off draining devices; 0: no limit.
    pub drain_bytes_per_s: u64,
    /// Shares of the pool at which to warn and to stop.
    pub levels: Levels,
    /// Payload that may wait to be written to its place; more waits at admission.
    pub pending_bytes: usize,
    /// True if records are kept until a backup holds them.
    pub retain: bool,
    /// Of the primary.
    pub lanes: Lanes,
}

/// Shares of the pool, in millionths of its size, that blocks and what waits to be reused may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Levels {
    /// From here on it is said that space runs short.
    pub warn_millionths: u32,
    /// Beyond, clients get no new segments: overwrites in place and discards still go. 1,000,000: until none is left.
    pub stop_millionths: u32,
}

impl Default for Levels {
    fn default() -> Self {
        Self { warn_millionths: 800_000, stop_millionths: MILLION }
    }
}

/// All of the pool.
pub const MILLION: u32 = 1_000_000;

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
    /// A primary that was superseded: the generation that did it. 0 otherwise.
    #[serde(default)]
    pub fenced: u64,
    /// The role before a change of it, until the directory was converted.
    #[serde(default)]
    pub former: Option<Role>,
    /// A backup whose changes an operator gave up: any primary of the pair may fill it anew.
    #[serde(default)]
    pub yields: bool,
    /// The life of the primary that a backup met last; nil before the first of this generation.
    #[serde(default)]
    pub met: Uid,
}

/// What the last checkpoint made visible: the root from which everything else is replayed.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Root {
    state: NodeState,
    /// The newest record that the pool's metadata includes.
    applied: Lsn,
    trim: TrimPoint,
    acked: BTreeMap<GroupId, retained::Acked>,
    /// The delta tables beside it include what every record before this one did to their sets.
    tables_next: Lsn,
    /// Records were kept for a backup.
    retain: bool,
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

struct Queued {
    entry: Arc<Entry>,
    /// Space promised to the record until it is in its place.
    _reservation: Option<Reservation>,
}

struct Front {
    identity: Identity,
    /// Lanes that are paced.
    paced: [bool; LANES_MAX],
    history: History,
    lives: Lives,
    journal: Journal,
    /// As of the newest record.
    state: NodeState,
    overlay: Overlay,
    /// Records that are not in their place, from `marks.applied + 1` on.
    queue: VecDeque<Queued>,
    queue_bytes: usize,
    /// Records in the queue that may turn an overwrite in place into an allocation.
    queue_hazards: usize,
    /// Records in the queue whose writer waits until they are in their place.
    queue_places: usize,
    /// Recent records, for the sender.
    tail: VecDeque<Arc<Entry>>,
    tail_bytes: usize,
    retained: Retained,
    delta: delta::Side,
    /// Segments that belong to records of the journal.
    referenced: VecDeque<(Lsn, Vec<SegmentId>)>,
    referenced_bytes: u64,
    /// Newest write of each virtual segment that is acknowledged only when the backup has it.
    unacked_both: UnackedBoth,
    /// Size at which acknowledged ones are forgotten.
    prune_both_at: usize,
    watches: watches::Watches,
    /// Payload bytes submitted, and released by the backup, since the store was opened.
    traffic: (u64, u64),
    /// Of it, by group.
    group_traffic: BTreeMap<GroupId, (u64, u64)>,
    failed: Option<String>,
    /// First LSN that the last captured checkpoint does not include.
    checkpoint_next: Lsn,
    /// The primary's time of some records, at most every [`TIME_STEP_MS`], for the age of the oldest retained one.
    times: VecDeque<(Lsn, i64)>,
}

/// By volume and virtual segment: up to where the backup must be, in this lane, or in all.
type UnackedBoth = HashMap<(VolumeId, u64), (Option<u8>, Lsn), RandomState>;

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
    /// Taken behind every other lock.
    damage: Mutex<scrub::Damage>,
    held: held::Held,
}

/// Recent records that are looked at under one lock in search of those of one lane.
const LOOKED_AT_MAX: usize = 4096;
/// Distance of the times that are kept.
const TIME_STEP_MS: i64 = 100;
/// How many times are kept; when there are more, every second one goes.
const TIMES_MAX: usize = 16 * 1024;
/// Segments of `both` volumes that are remembered before acknowledged ones are looked for.
const PRUNE_BOTH_MIN: usize = 1024;

impl Front {
    /// Forgets recent records that no session will ask for any more.
    fn prune_tail(&mut self) {
        let keep_from = self.retained.oldest().unwrap_or_else(|| self.journal.next_lsn());
        while let Some(entry) = self.tail.pop_front_if(|entry| entry.lsn < keep_from) {
            self.tail_bytes -= entry.memory_bytes();
        }
    }

    /// Forgets acknowledged writes of `both` volumes, now and then.
    fn prune_both(&mut self) {
        if self.unacked_both.len() >= self.prune_both_at {
            let (retained, volumes) = (&self.retained, &self.state.volumes);
            self.unacked_both.retain(|(volume, _), (lane, lsn)| {
                volumes.get(volume).is_some_and(|spec| !retained.holds(spec.group, *lane, *lsn))
            });
            self.prune_both_at = 2 * self.unacked_both.len().max(PRUNE_BOTH_MIN);
        }
    }

    fn sent_first(&self, entry: &Entry) -> SentFirst {
        let group = self.retained.get(entry.record.group);
        group.map_or_else(SentFirst::new, |group| self.delta.conflicts.before(entry.lsn, &entry.record, group))
    }

    fn is_paced(&self, lane: u8) -> bool {
        self.paced[usize::from(lane)]
    }

    /// A time at or a little before that of the record at `lsn`.
    fn time_of(&self, lsn: Lsn) -> Option<i64> {
        let behind = self.times.partition_point(|(noted, _)| *noted <= lsn);
        self.times.get(behind.saturating_sub(1)).map(|(_, time)| *time)
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

    /// The watermarks, and their changes. Let go of what is borrowed of them before anything else of the store is called.
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
        self.front.lock().staged_bytes()
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

    /// Of [`Store::traffic`], what belongs to a group.
    #[must_use]
    pub fn group_traffic(&self, group: GroupId) -> (u64, u64) {
        self.front.lock().group_traffic.get(&group).copied().unwrap_or_default()
    }

    /// The oldest record that the backup does not hold and that no mark stands for.
    #[must_use]
    pub fn retained_oldest(&self) -> Option<Lsn> {
        self.front.lock().retained.oldest()
    }

    /// The groups that are there, and those that are gone and of which records are still to be shipped.
    #[must_use]
    pub fn shipped_groups(&self) -> BTreeSet<GroupId> {
        let front = self.front.lock();
        let retained = front.retained.groups().filter(|(_, retained)| retained.oldest().is_some()).map(|(id, _)| id);
        front.state.groups.keys().copied().chain(retained).collect()
    }

    /// True if the backup holds the record of `group` in `lane` at `lsn`; of all lanes, everything up to there, for
    /// `None`. What a backup before it had acknowledged does not count.
    #[must_use]
    pub fn is_on_backup(&self, group: GroupId, lane: Option<u8>, lsn: Lsn) -> bool {
        let front = self.front.lock();
        let mode = front.state.groups.get(&group).map(|g| &g.mode);
        let replaced = matches!(mode, Some(crate::state::GroupMode::Delta { full: true, .. }));
        !replaced && front.retained.holds(group, lane, lsn)
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
        front.time_of(front.retained.get(group)?.oldest()?)
    }

    /// The same of one of its lanes.
    #[must_use]
    pub fn oldest_retained_time_of(&self, group: GroupId, lane: u8) -> Option<i64> {
        let front = self.front.lock();
        front.time_of(front.retained.get(group)?.lane(lane).oldest?)
    }

    /// Where the retained records of each lane are, and the LSN that the next record will get.
    #[must_use]
    pub fn lane_spans(&self) -> ([LaneSpan; LANES_MAX], Lsn) {
        let front = self.front.lock();
        (front.retained.spans(), front.journal.next_lsn())
    }

    /// True if what a lane keeps in the journal, with everything behind it, is more than its share.
    #[must_use]
    pub fn is_over_share(&self, lane: u8, oldest: Lsn) -> bool {
        let front = self.front.lock();
        let journal = &self.config.journal;
        let share = self.config.lanes.share_bytes(lane, journal.capacity_bytes - journal.reserve_bytes);
        front.journal.span_from(oldest) > share
    }

    /// The first record a new session has to look at: the oldest retained one, or the next.
    #[must_use]
    pub fn ship_from(&self) -> Lsn {
        let front = self.front.lock();
        front.retained.oldest().unwrap_or_else(|| front.journal.next_lsn())
    }

    /// True if waiting may mend this lack: a checkpoint, growth or the end of other writes gives segments back, or a
    /// discard does that is not applied yet and that no count shows.
    #[must_use]
    pub fn room_may_come(&self, lack: &NoSpace) -> bool {
        lack.quarantined > 0 || lack.can_grow > 0 || lack.reserved > 0 || self.front.lock().queue_hazards > 0
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

    /// Takes the lock of the marks under that of the front: nobody may do it the other way round.
    fn fail_locked(&self, front: &mut Front, why: String) {
        if front.failed.is_none() {
            front.failed = Some(why);
        }
        self.marks.send_modify(|m| m.failed = true);
        self.work.notify_all();
        self.apply_work.notify_all();
    }

    /// The backup answered that it holds `lane` of `group` durably up to `lsn`: `records`, of so many payload bytes.
    pub fn release(&self, group: GroupId, lane: u8, lsn: Lsn, payload_bytes: u64, records: &[Released]) {
        {
            let mut front = self.front.lock();
            front.release(group, lane, lsn, payload_bytes, records);
            front.prune_tail();
        }
        self.marks.send_modify(|m| m.releases += 1);
    }

    /// Durable records of `lane` from `from` on, in order, up to about `max_bytes`; from memory where they are still
    /// there. Stops early where many others lie in between.
    ///
    /// # Errors
    /// If the journal was trimmed past `from` or cannot be read.
    pub fn lane_records(
        &self,
        lane: u8,
        from: Lsn,
        max_bytes: usize,
        spill: &mut Option<Spill>,
    ) -> Result<LaneRecords, JournalReadError> {
        let front = self.front.lock();
        let durable = self.marks.borrow().durable;
        let mut found = LaneRecords { records: Vec::new(), next: from };
        if from > durable {
            return Ok(found);
        }
        if let Some(first) = front.tail.front().map(|e| e.lsn)
            && first <= from
        {
            *spill = None;
            let skip = usize::try_from(from.0 - first.0).expect("the tail fits memory");
            let mut bytes = 0;
            for entry in front.tail.iter().skip(skip).take_while(|e| e.lsn <= durable).take(LOOKED_AT_MAX) {
                found.next = entry.lsn.next();
                if entry.record.lane == lane {
                    bytes += entry.memory_bytes();
                    found.records.push((Arc::clone(entry), front.sent_first(entry)));
                    if bytes >= max_bytes {
                        break;
                    }
                }
            }
            return Ok(found);
        }
        let mut from_files = match spill.take() {
            Some(spill) if spill.next() == from => spill,
            _ => Spill { reader: front.journal.reader(from)?, ahead: VecDeque::new() },
        };
        drop(front);
        let entries = from_files.take(lane, durable, max_bytes)?;
        self.stats.spilled.fetch_add(entries.len() as u64, std::sync::atomic::Ordering::Relaxed);
        found.next = from_files.next();
        *spill = Some(from_files);
        let front = self.front.lock();
        found.records.extend(entries.into_iter().map(|entry| {
            let first = front.sent_first(&entry);
            (entry, first)
        }));
        Ok(found)
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

/// What [`Store::lane_records`] found.
pub struct LaneRecords {
    /// In order, each with what must be sent before it.
    pub records: Vec<(Arc<Entry>, SentFirst)>,
    /// Where to go on.
    pub next: Lsn,
}

/// Read from the files at a time, in bytes, however little is asked for.
const SPILL_BYTES: usize = 1 << 20;

/// A place in the journal's files for a sender that has fallen out of the memory tail.
pub struct Spill {
    reader: JournalReader,
    /// Read, and not asked for yet.
    ahead: VecDeque<RawRecord>,
}

impl Spill {
    /// The record that is asked for next.
    fn next(&self) -> Lsn {
        self.ahead.front().map_or(self.reader.next_lsn(), |record| record.lsn)
    }

    /// Durable records of `lane`, up to about `max_bytes` of records of any lane.
    fn take(&mut self, lane: u8, durable: Lsn, max_bytes: usize) -> Result<Vec<Arc<Entry>>, JournalReadError> {
        if self.ahead.is_empty() {
            self.ahead = self.reader.read(durable, max_bytes.max(SPILL_BYTES))?.into();
        }
        let (mut entries, mut bytes) = (Vec::new(), 0);
        while bytes < max_bytes
            && let Some(RawRecord { lsn, head, data }) = self.ahead.pop_front()
        {
            bytes += head.len() + data.len();
            if Record::lane_of(&head) != Some(lane) {
                continue;
            }
            let record = Record::decode(&head, &data).map_err(|source| JournalReadError::Corrupt {
                file: format!("the journal ({source})"),
                offset: 0,
                lsn,
            })?;
            entries.push(Arc::new(Entry { lsn, record, place: false }));
        }
        Ok(entries)
    }
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

#[cfg(test)]
mod tests {
    use super::{
        testing::{create, open, write},
        *,
    };
    use crate::storage::sim::{Fault, OpKind, SimStorage};

    #[test]
    fn a_sender_that_is_behind_reads_the_files_in_large_steps() {
        let disk = SimStorage::new(1);
        let store = open(Arc::new(disk.clone()), 1);
        create(&store, 1);
        for block in 0..150 {
            write(&store, 1, block, 7);
        }
        let (mut from, mut spill) = (Lsn(1), None);
        let mut seen = Vec::new();
        while from <= store.marks().borrow().durable {
            let found = store.lane_records(0, from, 1, &mut spill).unwrap();
            seen.extend(found.records.iter().map(|(entry, _)| entry.lsn.0));
            from = found.next;
            // The first step has read all that is not in memory.
            disk.clear_faults();
            disk.fail_nth(OpKind::Read, 1, Fault::EIO);
        }
        assert_eq!(seen, (1..=151).collect::<Vec<_>>());
        assert!(store.stats().spilled.load(std::sync::atomic::Ordering::Relaxed) > 10, "nothing was read from files");
    }
}
