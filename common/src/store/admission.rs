//! Admission: space is reserved, the record gets its LSN, and reads see it - one step under the front lock.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;
use thiserror::Error;

use crate::{
    journal::{AppendError, Class},
    pool::{NoSpace, Reservation},
    record::{ClientSequence, Control, Op, Record, WriteData},
    state::{NodeState, SequenceCheck},
    types::{BlockRange, GroupId, Lsn, Position, SegmentId, VolumeId, VolumeSpec},
};

use super::{Entry, Failed, Front, OverLevel, Queued, ReadFailure, Retained, Store, UnackedBoth, overlay::Content};

/// Free segments below which a pool that may grow does so ahead of need.
pub(super) const GROW_BELOW: u64 = 512;

/// A change of blocks, in whole blocks.
#[derive(Debug, Clone)]
pub enum Change {
    /// New bytes with the checksum of each block.
    Write {
        /// Whole blocks.
        data: Bytes,
        /// One for each block.
        crcs: SmallVec<[u32; 2]>,
    },
    /// Zeros; the space is given back.
    Zero {
        /// Blocks.
        count: u64,
    },
}

/// The answer of admission: not durable yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Submitted {
    /// Wait until this LSN is durable.
    pub lsn: Lsn,
    /// As the primary counts.
    pub position: Position,
    /// The group of the record.
    pub group: GroupId,
    /// Its lane; `None` stands for everything before it, in all lanes.
    pub lane: Option<u8>,
    /// The client's sequence was applied before; nothing was written now.
    pub duplicate: bool,
}

/// Why a record was not admitted. Nothing was changed.
#[derive(Debug, Error)]
pub enum SubmitError {
    /// An earlier I/O error.
    #[error(transparent)]
    Failed(#[from] Failed),
    /// The directory is not, or no longer, that of the primary.
    #[error("this node is not the primary any more")]
    NotPrimary,
    /// No such volume.
    #[error("volume {0} does not exist")]
    NoVolume(VolumeId),
    /// It is filled from a snapshot, and not served meanwhile.
    #[error("volume {0} is being filled from a snapshot: try again when that is done")]
    Restoring(VolumeId),
    /// Past the end.
    #[error("blocks {first}..{end} lie outside of the volume, which has {blocks} blocks")]
    OutOfRange {
        /// First block of the request.
        first: u64,
        /// One behind the last.
        end: u64,
        /// Size of the volume.
        blocks: u64,
    },
    /// The data is not a whole number of blocks.
    #[error("{bytes} bytes are not {blocks} whole blocks of {block_bytes} bytes")]
    Shape {
        /// Bytes given.
        bytes: usize,
        /// Checksums given.
        blocks: usize,
        /// Size of a block.
        block_bytes: u32,
    },
    /// A sequence too far in the past to know whether it was applied.
    #[error(
        "client sequence {sequence} is more than 1024 below the highest one seen ({highest}): whether it was applied is not known any more"
    )]
    SequenceTooOld {
        /// Of the request.
        sequence: u64,
        /// Of the client.
        highest: u64,
    },
    /// The pool has no place for it.
    #[error(transparent)]
    Space(#[from] NoSpace),
    /// More of the pool is in use than clients may take.
    #[error(transparent)]
    Level(#[from] OverLevel),
    /// The staging area is full.
    #[error(
        "the staging area holds {span} of {capacity} bytes and {needed} more are needed: wait until the backup has caught up, or raise [staging] capacity"
    )]
    StagingFull {
        /// For this record.
        needed: u64,
        /// In use.
        span: u64,
        /// Of the area.
        capacity: u64,
    },
    /// The lane holds its share of the staging area.
    #[error(
        "lane {lane} holds {held} bytes that the backup has not taken, of {share} that are its share of the staging area: wait until the backup has caught up, or raise its share in [lanes] classes"
    )]
    LaneFull {
        /// Its name.
        lane: String,
        /// Retained payload.
        held: u64,
        /// What it may hold.
        share: u64,
    },
    /// Larger than a journal file.
    #[error("a record of {needed} bytes is larger than the journal takes ({max} bytes): write smaller pieces")]
    TooLarge {
        /// Of the record.
        needed: u64,
        /// Of the journal.
        max: u64,
    },
}

/// Why a change of a part of a block was not admitted.
#[derive(Debug, Error)]
pub enum ModifyError {
    /// What was there could not be read.
    #[error(transparent)]
    Read(#[from] ReadFailure),
    /// The result was refused.
    #[error(transparent)]
    Submit(#[from] SubmitError),
}

impl Store {
    /// Admits a change of blocks of the primary's client.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was changed then.
    pub fn submit(
        &self,
        volume: VolumeId,
        first_block: u64,
        change: Change,
        client: Option<ClientSequence>,
        time_unix_ms: i64,
    ) -> Result<Submitted, SubmitError> {
        let lane = self.lane_of(client.as_ref());
        self.submit_in_lane(lane, volume, first_block, change, client, time_unix_ms)
    }

    /// The same in a lane that the caller knows: of several records of one request only the last names its client.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was changed then.
    pub fn submit_in_lane(
        &self,
        lane: u8,
        volume: VolumeId,
        first_block: u64,
        change: Change,
        client: Option<ClientSequence>,
        time_unix_ms: i64,
    ) -> Result<Submitted, SubmitError> {
        let mut front = self.front.lock();
        let submitted = self.submit_locked(&mut front, lane, volume, first_block, change, client, time_unix_ms)?;
        self.work.notify_one();
        Ok(submitted)
    }

    /// The lane of a client's writes.
    #[must_use]
    pub fn lane_of(&self, client: Option<&ClientSequence>) -> u8 {
        self.config.lanes.of_client(client.map(|c| c.client.as_str()))
    }

    /// Admits changes of one volume, one behind the other, in one step: up to the first that is refused, which is left
    /// for [`Store::submit`] to refuse. Returns the answers of those admitted. Stops as well where more than
    /// `pending_bytes` wait for their place. Call [`Store::wake_journal`] behind the last of several.
    pub fn submit_all(
        &self,
        volume: VolumeId,
        changes: impl IntoIterator<Item = (u64, Change, Option<ClientSequence>)>,
        time_unix_ms: i64,
    ) -> SmallVec<[Submitted; 16]> {
        let mut front = self.front.lock();
        let mut admitted = SmallVec::new();
        for (first_block, change, client) in changes {
            if front.queue_bytes > self.config.pending_bytes {
                break;
            }
            let lane = self.lane_of(client.as_ref());
            match self.submit_locked(&mut front, lane, volume, first_block, change, client, time_unix_ms) {
                Ok(submitted) => admitted.push(submitted),
                Err(_) => break,
            }
        }
        admitted
    }

    #[allow(clippy::too_many_arguments, reason = "one request, of two callers")]
    pub(super) fn submit_locked(
        &self,
        front: &mut Front,
        lane: u8,
        volume: VolumeId,
        first_block: u64,
        change: Change,
        client: Option<ClientSequence>,
        time_unix_ms: i64,
    ) -> Result<Submitted, SubmitError> {
        if front.state.restores.contains_key(&volume) {
            return Err(SubmitError::Restoring(volume));
        }
        self.check_level(front, volume, first_block, &change)?;
        self.submit_change(front, lane, volume, first_block, change, client, time_unix_ms)
    }

    /// As [`Store::submit_locked`], also where the volume is being filled.
    #[allow(clippy::too_many_arguments, reason = "one request, of two callers")]
    pub(super) fn submit_change(
        &self,
        front: &mut Front,
        lane: u8,
        volume: VolumeId,
        first_block: u64,
        change: Change,
        client: Option<ClientSequence>,
        time_unix_ms: i64,
    ) -> Result<Submitted, SubmitError> {
        front.check()?;
        if front.identity.role != super::Role::Primary || front.identity.fenced > 0 {
            return Err(SubmitError::NotPrimary);
        }
        let spec = front.state.volumes.get(&volume).ok_or(SubmitError::NoVolume(volume))?;
        let group = spec.group;
        if let Some(request) = &client
            && !crate::mutant::Mutant::NoSequenceCheck.on()
        {
            match front.state.check_sequence(request) {
                SequenceCheck::Fresh => {}
                SequenceCheck::Applied(lsn) => {
                    let position = Position { generation: front.identity.generation, lsn };
                    // It may be one of a lane that the client had before another configuration.
                    return Ok(Submitted { lsn, position, group, lane: None, duplicate: true });
                }
                SequenceCheck::TooOld { highest } => {
                    return Err(SubmitError::SequenceTooOld { sequence: request.sequence, highest });
                }
            }
        }
        let block_size = spec.block_size;
        let place = spec.ack == crate::types::AckRule::Primary;
        let op = match change {
            Change::Write { data, crcs } => {
                Op::Write { volume, first_block, block_size, crcs, data: WriteData::Inline(data) }
            }
            Change::Zero { count } => Op::Zero(BlockRange { volume, first: first_block, count }),
        };
        let record = Record {
            position: Position { generation: front.identity.generation, lsn: front.journal.next_lsn() },
            previous: front.state.groups.get(&group).map_or(Lsn::ZERO, |g| g.lanes.of(lane).lsn),
            group,
            lane,
            time_unix_ms,
            client,
            in_run: false,
            op,
        };
        self.admit(front, record, place)
    }

    /// Reads blocks, changes them with `modify` and admits the result, as if nobody could write them in between.
    ///
    /// # Errors
    /// What reading or admission refuses; nothing was changed then.
    pub fn submit_modified(
        &self,
        lane: u8,
        range: BlockRange,
        client: Option<&ClientSequence>,
        time_unix_ms: i64,
        modify: &dyn Fn(&mut [u8]),
    ) -> Result<Submitted, ModifyError> {
        let watch = self.front.lock().watches.begin(range);
        let result = loop {
            let read = match self.read(range.volume, range.first, range.count) {
                Ok(read) => read,
                Err(error) => break Err(error.into()),
            };
            let mut data = Vec::from(read.data);
            modify(&mut data);
            let data = Bytes::from(data);
            let mut front = self.front.lock();
            if front.watches.take_touched(watch) {
                continue;
            }
            let Some(block_size) = front.state.volumes.get(&range.volume).map(|v| v.block_size) else {
                break Err(SubmitError::NoVolume(range.volume).into());
            };
            let crcs = crate::record::block_crcs(&data, block_size);
            let change = Change::Write { data, crcs };
            break self
                .submit_locked(&mut front, lane, range.volume, range.first, change, client.cloned(), time_unix_ms)
                .map_err(ModifyError::from);
        };
        self.front.lock().watches.end(watch);
        self.work.notify_one();
        result
    }

    /// Admits a change of the catalogue on the primary.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was changed then.
    pub fn submit_control(
        &self,
        group: GroupId,
        control: Control,
        time_unix_ms: i64,
    ) -> Result<Submitted, SubmitError> {
        let mut front = self.front.lock();
        self.submit_control_locked(&mut front, group, control, time_unix_ms)
    }

    /// As [`Store::submit_control`], with the change decided under the same lock from the newest state.
    ///
    /// # Errors
    /// What `decide` refuses, or a [`SubmitError`].
    pub fn submit_decided<E: From<SubmitError>>(
        &self,
        time_unix_ms: i64,
        decide: impl FnOnce(&NodeState) -> Result<(GroupId, Control), E>,
    ) -> Result<Submitted, E> {
        let mut front = self.front.lock();
        let (group, control) = decide(&front.state)?;
        Ok(self.submit_control_locked(&mut front, group, control, time_unix_ms)?)
    }

    pub(super) fn submit_control_locked(
        &self,
        front: &mut Front,
        group: GroupId,
        control: Control,
        time_unix_ms: i64,
    ) -> Result<Submitted, SubmitError> {
        front.check()?;
        let record = Record {
            position: Position { generation: front.identity.generation, lsn: front.journal.next_lsn() },
            previous: front.state.groups.get(&group).map_or(Lsn::ZERO, |g| g.lanes.of(0).lsn),
            group,
            lane: 0,
            time_unix_ms,
            client: None,
            in_run: false,
            op: Op::Control(control),
        };
        let submitted = self.admit(front, record, false)?;
        self.work.notify_one();
        Ok(submitted)
    }

    /// Admits a record that came over the stream. Its position stays the primary's. Several may come together: call
    /// [`Store::wake_journal`] behind the last one.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was changed then.
    pub fn submit_replica(&self, mut record: Record) -> Result<Submitted, SubmitError> {
        let mut front = self.front.lock();
        front.check()?;
        if let Op::Control(control) = &mut record.op {
            front.name_layers(control);
        }
        self.admit(&mut front, record, false)
    }

    /// Wakes the journal's writer.
    pub fn wake_journal(&self) {
        let _front = self.front.lock();
        self.work.notify_one();
    }

    /// The caller wakes the journal's writer.
    pub(super) fn admit(&self, front: &mut Front, mut record: Record, place: bool) -> Result<Submitted, SubmitError> {
        let lsn = front.journal.next_lsn();
        let class = if record.is_data() { Class::Data } else { Class::Control };
        let blocks = self.check_blocks(front, &record)?;
        let (segments, no_space) = match self.place_large(front, &mut record) {
            Ok(segments) => (segments, None),
            Err(no_space) => (Vec::new(), Some(no_space)),
        };
        let result = self.admit_placed(front, record, lsn, class, blocks, &segments, place);
        // It would have fitted into segments: what it lacks is space, which may come, and not a smaller size.
        let result = match (result, no_space) {
            (Err(SubmitError::TooLarge { .. }), Some(no_space)) => Err(no_space.into()),
            (result, _) => result,
        };
        if result.is_err() && !segments.is_empty() {
            let mut pool = self.pool.lock();
            for segment in &segments {
                pool.unpin(*segment);
            }
            if let Err(error) = pool.release_unreferenced(&segments) {
                drop(pool);
                self.fail_locked(front, format!("segments that were just allocated cannot be given back: {error}"));
            }
        }
        result
    }

    #[allow(clippy::too_many_arguments, reason = "one call, split for the clean-up above")]
    fn admit_placed(
        &self,
        front: &mut Front,
        record: Record,
        lsn: Lsn,
        class: Class,
        blocks: Option<Touched>,
        segments: &[SegmentId],
        place: bool,
    ) -> Result<Submitted, SubmitError> {
        let reservation = match &blocks {
            Some(touched) if segments.is_empty() && matches!(record.op, Op::Write { .. }) => {
                self.reserve(front, touched)?
            }
            _ => None,
        };
        let referenced_bytes = segments.len() as u64 * u64::from(self.config.pool.segment_bytes);
        let (head, data) = record.encode();
        let needed = (head.len() + data.len()) as u64 + referenced_bytes;
        let retains = self.config.retain && front.state.retains(record.group, lsn);
        let lane_share = self.config.lanes.share_percent(record.lane);
        if class == Class::Data {
            let span = front.staged_bytes();
            let capacity = front.journal.capacity_bytes() - self.config.journal.reserve_bytes;
            if span + needed > capacity {
                return Err(SubmitError::StagingFull { needed, span, capacity });
            }
            if retains && lane_share < 100 {
                let (held, share) =
                    (front.retained.lane_bytes(record.lane), self.config.lanes.share_bytes(record.lane, capacity));
                // One record is always taken, however small the share.
                if held > 0 && held + record.payload_bytes() > share {
                    return Err(SubmitError::LaneFull { lane: self.config.lanes.name(record.lane), held, share });
                }
            }
        }
        front.journal.append(head, data, class).map_err(|error| match error {
            AppendError::JournalFull { needed, span, capacity } => SubmitError::StagingFull { needed, span, capacity },
            AppendError::TooLarge { bytes, limit } => SubmitError::TooLarge { needed: bytes, max: limit },
            AppendError::Failed(error) => SubmitError::Failed(Failed(error.cause)),
        })?;
        let (group, lane) = (record.group, Some(record.lane));
        let answer = Submitted { lsn, position: record.position, group, lane, duplicate: false };
        if self.config.retain {
            front.delta.apply(&front.state, &mut front.retained, lsn, &record, true);
            if record.group != GroupId::default() {
                front.note_time(lsn, record.time_unix_ms);
            }
        }
        front.state.apply(lsn, &record);
        if !segments.is_empty() {
            front.referenced.push_back((lsn, segments.to_vec()));
            front.referenced_bytes += referenced_bytes;
        }
        if let Some(touched) = &blocks {
            let content = match &record.op {
                Op::Write { crcs, data: WriteData::Inline(data) | WriteData::Segments(_, Some(data)), .. } => {
                    Content::Data(data.clone(), crcs.clone())
                }
                _ => Content::Zeros,
            };
            front.overlay.insert(lsn, touched.range, touched.per_segment, touched.block_bytes, &content);
            if touched.both && self.config.retain {
                note_unacked(&mut front.unacked_both, &front.retained, touched, &record, lsn);
            }
        }
        // A change of the catalogue may change every block.
        front.watches.touch(blocks.as_ref().map(|touched| touched.range));
        let entry = Arc::new(Entry { lsn, record, place });
        let payload_bytes = entry.record.payload_bytes();
        front.traffic.0 += payload_bytes;
        // What waits for its turn is no sign of a slow backup.
        if payload_bytes > 0 && self.config.retain && !(retains && front.is_paced(entry.record.lane)) {
            front.group_traffic.entry(entry.record.group).or_default().0 += payload_bytes;
        }
        front.queue_bytes += entry.memory_bytes();
        front.queue_hazards += usize::from(is_hazard(&entry.record));
        front.queue_places += usize::from(entry.place);
        if self.config.retain {
            front.tail_bytes += entry.memory_bytes();
            front.tail.push_back(Arc::clone(&entry));
            while front.tail_bytes > self.config.tail_bytes
                && let Some(oldest) = front.tail.pop_front()
            {
                front.tail_bytes -= oldest.memory_bytes();
            }
        }
        front.queue.push_back(Queued { entry, _reservation: reservation });
        Ok(answer)
    }

    /// The blocks a record changes, checked against the volume; `None` for control records.
    fn check_blocks(&self, front: &Front, record: &Record) -> Result<Option<Touched>, SubmitError> {
        let Some(range) = record.range() else { return Ok(None) };
        let spec = front.state.spec_for(record).ok_or(SubmitError::NoVolume(range.volume))?;
        let end = range.first.checked_add(range.count).filter(|end| *end <= spec.block_count() && range.count > 0);
        if end.is_none() {
            return Err(SubmitError::OutOfRange {
                first: range.first,
                end: range.first.saturating_add(range.count),
                blocks: spec.block_count(),
            });
        }
        if let Op::Write { crcs, data: WriteData::Inline(data), block_size, .. } = &record.op
            && (*block_size != spec.block_size || data.len() != crcs.len() * spec.block_size.bytes() as usize)
        {
            return Err(SubmitError::Shape {
                bytes: data.len(),
                blocks: crcs.len(),
                block_bytes: spec.block_size.bytes(),
            });
        }
        Ok(Some(Touched::new(range, spec)))
    }

    /// Gives a large aligned write fresh segments, so that its bytes are written to disk once. No segments: it is for
    /// the journal.
    ///
    /// # Errors
    /// There are none; the caller falls back to the journal.
    fn place_large(&self, front: &Front, record: &mut Record) -> Result<Vec<SegmentId>, NoSpace> {
        let Some(per_segment) = front.state.spec_for(record).map(|spec| u64::from(spec.blocks_per_segment())) else {
            return Ok(Vec::new());
        };
        let Op::Write { first_block, crcs, data, .. } = &mut record.op else { return Ok(Vec::new()) };
        let WriteData::Inline(bytes) = data else { return Ok(Vec::new()) };
        let aligned = first_block.is_multiple_of(per_segment) && (crcs.len() as u64).is_multiple_of(per_segment);
        if bytes.len() < self.config.reference_bytes || !aligned {
            return Ok(Vec::new());
        }
        let count = crcs.len() as u64 / per_segment;
        // Held until they are allocated, so that space promised to others is not taken.
        let _reservation = self.space.reserve(count)?;
        let mut pool = self.pool.lock();
        let segments = pool.allocate_reference(count)?;
        for segment in &segments {
            pool.pin(*segment);
        }
        *data = WriteData::Segments(segments.clone(), Some(bytes.clone()));
        Ok(segments)
    }

    /// Reserves the worst case of a write. When space is low, the exact need: an overwrite in place needs none.
    fn reserve(&self, front: &Front, touched: &Touched) -> Result<Option<Reservation>, SubmitError> {
        match self.space.reserve(touched.segments().count() as u64) {
            Ok(reservation) => {
                self.request_growth();
                Ok(Some(reservation))
            }
            Err(no_space) => {
                let pending = front.overlay.touches(touched.range, touched.per_segment);
                if front.queue_hazards == 0 && self.pool.lock().fits(touched.range, pending).unwrap_or(false) {
                    return Ok(None);
                }
                Err(no_space.into())
            }
        }
    }
}

impl Front {
    pub(super) fn check(&self) -> Result<(), Failed> {
        self.failed.as_ref().map_or(Ok(()), |why| Err(Failed(why.clone())))
    }
}

/// The blocks of a record in terms of its volume's geometry.
pub(super) struct Touched {
    pub range: BlockRange,
    pub per_segment: u64,
    pub block_bytes: usize,
    /// The volume is acknowledged by both sides.
    pub both: bool,
}

impl Touched {
    fn new(range: BlockRange, spec: &VolumeSpec) -> Self {
        Self {
            range,
            per_segment: u64::from(spec.blocks_per_segment()),
            block_bytes: spec.block_size.bytes() as usize,
            both: spec.ack == crate::types::AckRule::Both,
        }
    }

    /// `None` for control records and for volumes that are gone.
    pub fn of(record: &Record, state: &NodeState) -> Option<Self> {
        let range = record.range().filter(|r| r.count > 0)?;
        state.spec_for(record).map(|spec| Self::new(range, spec))
    }

    /// The virtual segments.
    pub fn segments(&self) -> std::ops::RangeInclusive<u64> {
        self.range.first / self.per_segment..=(self.range.end() - 1) / self.per_segment
    }
}

/// The record waits for the backup: so do reads that see it. Where two lanes wait, all do.
pub(super) fn note_unacked(
    unacked: &mut UnackedBoth,
    retained: &Retained,
    touched: &Touched,
    record: &Record,
    lsn: Lsn,
) {
    for segment in touched.segments() {
        let entry = unacked.entry((touched.range.volume, segment)).or_insert((Some(record.lane), lsn));
        let one = entry.0 == Some(record.lane) || retained.holds(record.group, entry.0, entry.1);
        *entry = (one.then_some(record.lane), lsn);
    }
}

/// True for records after which an overwrite may need a new place.
pub(super) fn is_hazard(record: &Record) -> bool {
    !matches!(record.op, Op::Write { data: WriteData::Inline(_), .. })
}
