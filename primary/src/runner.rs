//! A run (Figs 7 and 11), as a state machine: what is asked of the backup next, and what its answers mean.
//!
//! No clock and no socket: requests go out as values, answers come in. The driver is `replicator.rs`.
//!
//! ```text
//! Cut --durable and applied--> Begin --answer--> Copy --all answered--> Commit --answer--> done
//!                                ^                 |                      |
//!                                +---- detached ---+----------------------+
//! ```
//!
//! Invariants:
//! - Nothing is sent before the cut is durable, nothing is read before it is applied.
//! - Blocks are read from the snapshot, in the order of their addresses; at most `window_bytes` are in memory.
//! - The frozen set is cleared by the backup's durable commit and by nothing else.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use thiserror::Error;
use understudy_common::{
    checksum::{digest, is_zero},
    delta::BlockSet,
    mutant::Mutant,
    record::{RunKind, block_crcs},
    state::PrimaryRun,
    store::{LayerReader, ModeError, ReadFailure, Store},
    types::{GroupId, SnapshotId, VolumeId, VolumeSpec},
};
use understudy_proto::{convert, seal::Sealed as _, v1};

/// Bytes of one read and of one batch, at most, unless configured.
pub const CHUNK_BYTES: u64 = 1 << 20;
/// Bytes of one digest, unless configured.
pub const PIECE_BYTES: u64 = 64 << 10;
/// Extents of one batch, at most.
const EXTENTS_MAX: usize = 256;
/// What is compressed to see whether the rest is worth it.
const SAMPLE_BYTES: usize = 4096;

/// What is asked of the backup.
#[derive(Debug, Clone)]
pub enum RunRequest {
    /// Begin, or go on.
    Begin(v1::BeginRunRequest),
    /// Blocks.
    Batch(v1::DeltaBatchRequest),
    /// What it holds.
    Digest(v1::DigestRequest),
    /// The end.
    Commit(v1::CommitDeltaRequest),
}

/// What the backup answered.
#[derive(Debug, Clone)]
pub enum RunAnswer {
    /// To `Begin`.
    Begin(v1::BeginRunResponse),
    /// To a `Batch`.
    Batch(v1::DeltaBatchResponse),
    /// To the oldest unanswered `Digest`.
    Digest(v1::DigestResponse),
    /// To `Commit`.
    Commit(v1::CommitDeltaResponse),
}

/// Why a run cannot go on. It is to be aborted.
#[derive(Debug, Error)]
pub enum RunError {
    /// The snapshot cannot be read.
    #[error("volume {volume}: {source}")]
    Read {
        /// The volume.
        volume: VolumeId,
        /// What happened.
        source: ReadFailure,
    },
    /// The backup cannot.
    #[error("the backup refuses ({cause}): {message}")]
    Refused {
        /// "space", "segment_size", "unsupported".
        cause: String,
        /// Its words.
        message: String,
    },
    /// The run was ended by somebody else.
    #[error("the run is not open any more")]
    Ended,
    /// The end of the run cannot be noted.
    #[error(transparent)]
    Mode(#[from] ModeError),
    /// An answer is not what the backup sent.
    #[error("an answer of the backup was damaged on the way")]
    Damaged,
    /// The backup answered what was not asked.
    #[error("the backup answered {0}")]
    Answer(&'static str),
}

/// How a run is done.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions {
    /// Bytes that are read and not answered, at most.
    pub window_bytes: u64,
    /// Bytes of one read and of one batch, at most.
    pub chunk_bytes: u64,
    /// Bytes of one digest.
    pub piece_bytes: u64,
    /// Data is compressed where a sample of it gets smaller by a tenth.
    pub compress: bool,
    /// Pieces are compared before they are sent.
    pub digests: bool,
}

/// What a run has moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RunCounts {
    /// Whole blocks to be looked at, in bytes.
    pub total_bytes: u64,
    /// Of these, answered.
    pub done_bytes: u64,
    /// Data sent, as it travels.
    pub sent_bytes: u64,
    /// Not sent, because the backup held them.
    pub skipped_bytes: u64,
    /// Sent as zeros.
    pub zero_bytes: u64,
    /// Requests of digests, as they travel.
    pub digest_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Cut,
    /// True when the request is on its way.
    Begin(bool),
    Copy,
    Commit(bool),
    Done,
}

/// A volume of the run.
struct Source {
    spec: VolumeSpec,
    reader: LayerReader,
    blocks: BlockSet,
}

/// Blocks read in one go, as extents.
struct Chunk {
    volume: usize,
    extents: Vec<v1::DeltaExtent>,
    block_bytes: u64,
    blocks: u64,
}

/// What was read and not sent, in the order of addresses: a batch is sent when all before it is.
enum Item {
    /// Digests of it are being compared: first block and bytes of each piece.
    Asked { volume: usize, pieces: Vec<(u64, Bytes)> },
    /// To be sent.
    Ready(Chunk),
}

/// A batch that is not answered.
struct Sent {
    number: u64,
    bytes: u64,
}

/// See the module.
pub struct Runner {
    store: Arc<Store>,
    group: GroupId,
    group_name: String,
    run: PrimaryRun,
    options: RunOptions,
    /// Bytes of a batch for now.
    chunk_bytes: u64,
    sources: Vec<Source>,
    session: Bytes,
    step: Step,
    opening: u64,
    next_batch: u64,
    /// The volume and block to look at next.
    at: (usize, u64),
    queue: VecDeque<Item>,
    sent: VecDeque<Sent>,
    held_bytes: u64,
    /// Snapshots for users that the backup holds, of those that it was asked for.
    snapshots: Vec<SnapshotId>,
    counts: RunCounts,
}

impl Runner {
    /// Takes up the open run of a group. Without a session it asks for nothing.
    #[must_use]
    pub fn new(store: Arc<Store>, group: GroupId, run: PrimaryRun, options: RunOptions) -> Self {
        let mut specs = run.specs.clone();
        specs.sort_unstable_by_key(|spec| spec.id);
        let layers: BTreeMap<_, _> = run.layers.iter().copied().collect();
        let sources = specs.into_iter().filter_map(|spec| {
            let reader = LayerReader::new(&store, &spec, *layers.get(&spec.id)?);
            let mut blocks = store.frozen(spec.id);
            // Marks behind the end of a volume that was cut.
            blocks.truncate(spec.block_count());
            Some(Source { blocks, reader, spec })
        });
        let sources: Vec<Source> = sources.collect();
        let total_bytes = sources.iter().map(|s| s.blocks.len() * u64::from(s.spec.block_size.bytes())).sum();
        let group_name = store.with_state(|s| s.groups.get(&group).map(|g| g.name.clone())).unwrap_or_default();
        Self {
            store,
            group,
            group_name,
            options,
            chunk_bytes: options.chunk_bytes,
            sources,
            session: Bytes::new(),
            step: Step::Cut,
            opening: 0,
            next_batch: 1,
            at: (0, 0),
            snapshots: Vec::new(),
            queue: VecDeque::new(),
            sent: VecDeque::new(),
            held_bytes: 0,
            counts: RunCounts { total_bytes, ..RunCounts::default() },
            run,
        }
    }

    /// A session is open: the run begins, or goes on where the backup is.
    pub fn on_attached(&mut self, session: &[u8]) {
        self.session = Bytes::copy_from_slice(session);
        self.restart();
    }

    /// The session is over. What the backup has made durable stays.
    pub fn on_detached(&mut self) {
        self.session = Bytes::new();
        self.restart();
    }

    fn restart(&mut self) {
        if !matches!(self.step, Step::Cut | Step::Done) {
            self.step = Step::Begin(false);
        }
        self.queue.clear();
        self.sent.clear();
        self.held_bytes = 0;
        if !Mutant::ResumeTooFar.on() {
            self.at = (0, 0);
        }
    }

    /// The session it was told of last; empty without one.
    #[must_use]
    pub fn session(&self) -> &[u8] {
        &self.session
    }

    /// True until its cut is durable and applied.
    #[must_use]
    pub fn waits_for_cut(&self) -> bool {
        self.step == Step::Cut && !self.session.is_empty()
    }

    /// The group.
    #[must_use]
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// The run.
    #[must_use]
    pub fn run(&self) -> &PrimaryRun {
        &self.run
    }

    /// What it has moved.
    #[must_use]
    pub fn counts(&self) -> RunCounts {
        self.counts
    }

    /// True when the run is committed and cleared here.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.step == Step::Done
    }

    /// True if [`Runner::poll`] may have something without another answer.
    #[must_use]
    pub fn can_go_on(&self) -> bool {
        match self.step {
            Step::Copy => {
                matches!(self.queue.front(), Some(Item::Ready(_)))
                    || self.held_bytes < self.options.window_bytes && self.next_place().is_some()
            }
            Step::Begin(asked) | Step::Commit(asked) => !asked && !self.session.is_empty(),
            Step::Cut | Step::Done => false,
        }
    }

    /// Bytes of a batch from here on, at most what the options say.
    pub fn limit_chunk(&mut self, bytes: u64) {
        self.chunk_bytes = bytes.clamp(1, self.options.chunk_bytes);
    }

    /// The next request. Reads the snapshot: for a thread that may wait.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn poll(&mut self) -> Result<Option<RunRequest>, RunError> {
        if self.session.is_empty() {
            return Ok(None);
        }
        // Also before a begin: the attach may have found another backup, of which this run's blocks are not all.
        if self.step != Step::Done && self.store.run_of(self.group).is_none_or(|run| run.id != self.run.id) {
            return Err(RunError::Ended);
        }
        if self.step == Step::Cut {
            let marks = *self.store.marks().borrow();
            let durable = marks.durable.0 >= self.run.id || Mutant::CutNotDurable.on();
            if durable && (self.is_readable() || Mutant::CutNotDurable.on()) {
                self.step = Step::Begin(false);
            }
        }
        match self.step {
            Step::Cut | Step::Done | Step::Begin(true) | Step::Commit(true) => Ok(None),
            Step::Begin(false) => {
                self.step = Step::Begin(true);
                Ok(Some(RunRequest::Begin(self.begin().sealed())))
            }
            Step::Copy => self.copy(),
            Step::Commit(false) => {
                self.step = Step::Commit(true);
                let (session, group_id, run) = (self.session.clone(), self.group.0, self.run.id);
                let commit = v1::CommitDeltaRequest { session, group_id, run, crc32c: 0 };
                Ok(Some(RunRequest::Commit(commit.sealed())))
            }
        }
    }

    fn begin(&self) -> v1::BeginRunRequest {
        v1::BeginRunRequest {
            session: self.session.clone(),
            group_id: self.group.0,
            group: self.group_name.clone(),
            run: self.run.id,
            cut: Some(self.run.position.into()),
            time_unix_ms: self.run.time_unix_ms,
            volumes: self.run.specs.iter().map(convert::volume_to_wire).collect(),
            kind: self.run.kind.as_str().into(),
            dirty_bytes: self.dirty_bytes(),
            crc32c: 0,
            snapshot_ids: self.store.with_state(|state| state.snapshots_of(self.group).map(|s| s.id.0).collect()),
        }
    }

    /// What the run may write: for a full run the blocks that are allocated are not known, and the backup is asked for
    /// nothing beforehand.
    fn dirty_bytes(&self) -> u64 {
        if self.run.kind == RunKind::Full { 0 } else { self.counts.total_bytes }
    }

    /// An answer of the backup. Those of another session are ignored.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn on_answer(&mut self, answer: RunAnswer, time_unix_ms: i64) -> Result<(), RunError> {
        let (session, whole) = match &answer {
            RunAnswer::Begin(a) => (&a.session, a.is_whole()),
            RunAnswer::Batch(a) => (&a.session, a.is_whole()),
            RunAnswer::Digest(a) => (&a.session, a.is_whole()),
            RunAnswer::Commit(a) => (&a.session, a.is_whole()),
        };
        if !whole {
            return Err(RunError::Damaged);
        }
        if *session != self.session || self.session.is_empty() {
            return Ok(());
        }
        match answer {
            RunAnswer::Begin(answer) => self.on_begun(answer, time_unix_ms),
            RunAnswer::Batch(answer) if answer.run == self.run.id => self.on_batch(answer),
            RunAnswer::Batch(_) => Ok(()),
            RunAnswer::Digest(answer) => self.on_digest(&answer),
            RunAnswer::Commit(_) if self.step == Step::Commit(true) => self.finish(time_unix_ms),
            RunAnswer::Commit(_) => Err(RunError::Answer("a commit that was not asked for")),
        }
    }

    fn on_begun(&mut self, answer: v1::BeginRunResponse, time_unix_ms: i64) -> Result<(), RunError> {
        if self.step != Step::Begin(true) {
            return Err(RunError::Answer("a begin that was not asked for"));
        }
        check_refusal(answer.refusal)?;
        self.snapshots = answer.snapshot_ids.iter().copied().map(SnapshotId).collect();
        if answer.committed {
            return self.finish(time_unix_ms);
        }
        (self.opening, self.next_batch) = (answer.opening, 1);
        if let Some(place) = answer.progress.filter(|_| !Mutant::ResumeTooFar.on()) {
            let volume = self.sources.iter().position(|s| s.spec.id.0 >= place.volume_id);
            self.at = match volume {
                Some(at) if self.sources[at].spec.id.0 == place.volume_id => (at, place.block),
                Some(at) => (at, 0),
                None => (self.sources.len(), 0),
            };
        }
        self.counts.done_bytes = self.bytes_before(self.at);
        self.step = Step::Copy;
        self.end_copy();
        Ok(())
    }

    /// Dirty bytes in front of a place.
    fn bytes_before(&self, (volume, block): (usize, u64)) -> u64 {
        let whole = |s: &Source| s.blocks.len() * u64::from(s.spec.block_size.bytes());
        let part = self.sources.get(volume).map_or(0, |source| {
            let mut rest = source.blocks.clone();
            rest.truncate(block);
            rest.len() * u64::from(source.spec.block_size.bytes())
        });
        self.sources.iter().take(volume).map(whole).sum::<u64>() + part
    }

    fn on_batch(&mut self, answer: v1::DeltaBatchResponse) -> Result<(), RunError> {
        check_refusal(answer.refusal)?;
        if answer.number >= self.next_batch {
            return Err(RunError::Answer("a batch that was not sent"));
        }
        while let Some(done) = self.sent.pop_front_if(|sent| sent.number <= answer.number) {
            self.held_bytes -= done.bytes;
            self.counts.done_bytes += done.bytes;
        }
        self.end_copy();
        Ok(())
    }

    fn on_digest(&mut self, answer: &v1::DigestResponse) -> Result<(), RunError> {
        let asked = self.queue.iter().position(|item| matches!(item, Item::Asked { .. }));
        let Some((place, Item::Asked { volume, pieces })) = asked.and_then(|at| Some((at, self.queue.remove(at)?)))
        else {
            return Err(RunError::Answer("digests that were not asked for"));
        };
        if answer.same.len() != pieces.len() {
            return Err(RunError::Answer("another number of digests"));
        }
        let block_bytes = u64::from(self.sources[volume].spec.block_size.bytes());
        let mut chunk = Chunk { volume, extents: Vec::new(), block_bytes, blocks: 0 };
        for ((first, data), same) in pieces.into_iter().zip(&answer.same) {
            let bytes = data.len() as u64;
            if *same {
                self.counts.skipped_bytes += bytes;
                self.counts.done_bytes += bytes;
                self.held_bytes -= bytes;
            } else {
                chunk.blocks += bytes / block_bytes;
                self.add_data(&mut chunk, first, &data);
            }
        }
        if !chunk.extents.is_empty() {
            self.queue.insert(place, Item::Ready(chunk));
        }
        self.end_copy();
        Ok(())
    }

    /// The run is committed on the backup: what it carried is cleared here.
    fn finish(&mut self, time_unix_ms: i64) -> Result<(), RunError> {
        self.store.clear(self.group, self.run.id, &self.snapshots, time_unix_ms)?;
        self.counts.done_bytes = self.counts.total_bytes;
        self.step = Step::Done;
        Ok(())
    }

    /// All was looked at, sent and answered.
    fn end_copy(&mut self) {
        let idle = self.queue.is_empty() && self.sent.is_empty();
        if self.step == Step::Copy && idle && self.next_place().is_none() {
            self.step = Step::Commit(false);
        }
    }

    /// The next dirty blocks, at most a chunk.
    fn next_place(&self) -> Option<(usize, u64, u64)> {
        let (mut volume, mut block) = self.at;
        while let Some(source) = self.sources.get(volume) {
            let max = (self.chunk_bytes / u64::from(source.spec.block_size.bytes())).max(1);
            if let Some((first, count)) = source.blocks.next_run(block, max) {
                return Some((volume, first, count));
            }
            (volume, block) = (volume + 1, 0);
        }
        None
    }

    /// The applier has passed the cut.
    fn is_readable(&self) -> bool {
        self.store.marks().borrow().applied.0 >= self.run.id || Mutant::RunReadsEarly.on()
    }

    fn copy(&mut self) -> Result<Option<RunRequest>, RunError> {
        if Mutant::CutNotDurable.on() && !self.is_readable() {
            return Ok(None);
        }
        if let Some(Item::Ready(chunk)) = self.queue.pop_front_if(|item| matches!(item, Item::Ready(_))) {
            return Ok(Some(self.send(chunk)));
        }
        if self.held_bytes >= self.options.window_bytes {
            return Ok(None);
        }
        let Some((volume, ..)) = self.next_place() else {
            self.end_copy();
            return Ok(None);
        };
        let block_bytes = u64::from(self.sources[volume].spec.block_size.bytes());
        let mut chunk = Chunk { volume, extents: Vec::new(), block_bytes, blocks: 0 };
        let mut pieces = Vec::new();
        let mut bytes = 0;
        while let Some((next_volume, first, count)) = self.next_place() {
            let full = chunk.extents.len().max(pieces.len()) >= EXTENTS_MAX || bytes >= self.chunk_bytes;
            if full || next_volume != volume {
                break;
            }
            let source = &self.sources[volume];
            let id = source.spec.id;
            let failed = |source| RunError::Read { volume: id, source };
            let max = count.min((self.chunk_bytes - bytes).div_ceil(block_bytes).max(1));
            let (hole, count) = source.reader.extent(first, max).map_err(failed)?;
            // Either zeros or digests: what is compared is sent later, and the order stays.
            if if hole { !pieces.is_empty() } else { self.options.digests && !chunk.extents.is_empty() } {
                break;
            }
            self.at = (volume, first + count);
            if hole {
                // A long hole is one extent, whatever its size.
                let (first, count) = self.extend_hole(volume, first, count)?;
                self.counts.zero_bytes += count * block_bytes;
                chunk.blocks += count;
                push_zeros(&mut chunk.extents, id, first, count);
                continue;
            }
            let data = if Mutant::RunReadsHead.on() {
                self.store.read(id, first, count).map(|read| read.data).map_err(failed)?
            } else {
                source.reader.read(first, count).map_err(failed)?
            };
            bytes += data.len() as u64;
            if self.options.digests {
                let step = usize::try_from(self.options.piece_bytes.max(block_bytes)).expect("small");
                let piece =
                    |start| (first + start as u64 / block_bytes, data.slice(start..data.len().min(start + step)));
                pieces.extend((0..data.len()).step_by(step).map(piece));
            } else {
                chunk.blocks += count;
                self.add_data(&mut chunk, first, &data);
            }
        }
        self.held_bytes += if pieces.is_empty() { chunk.blocks * block_bytes } else { bytes };
        if pieces.is_empty() {
            if self.queue.is_empty() {
                return Ok(Some(self.send(chunk)));
            }
            self.queue.push_back(Item::Ready(chunk));
            return Ok(None);
        }
        self.counts.digest_bytes += 32 * pieces.len() as u64;
        let digests = pieces.iter().map(|(first, data)| v1::DigestPiece {
            first_block: *first,
            block_count: data.len() as u64 / block_bytes,
            digest: Bytes::copy_from_slice(&digest(data)),
        });
        let request = v1::DigestRequest {
            session: self.session.clone(),
            group_id: self.group.0,
            run: self.run.id,
            volume_id: self.sources[volume].spec.id.0,
            pieces: digests.collect(),
            crc32c: 0,
            verify: false,
        };
        self.queue.push_back(Item::Asked { volume, pieces });
        Ok(Some(RunRequest::Digest(request.sealed())))
    }

    /// Goes on over the dirty blocks behind a hole as long as they are holes.
    fn extend_hole(&mut self, volume: usize, first: u64, mut count: u64) -> Result<(u64, u64), RunError> {
        const HOLE_BLOCKS_MAX: u64 = 1 << 18;
        while count < HOLE_BLOCKS_MAX {
            let source = &self.sources[volume];
            let Some((next, more)) = source.blocks.next_run(first + count, HOLE_BLOCKS_MAX - count) else { break };
            if next != first + count {
                break;
            }
            let read = source.reader.extent(next, more);
            let (hole, more) = read.map_err(|error| RunError::Read { volume: source.spec.id, source: error })?;
            if !hole {
                break;
            }
            count += more;
        }
        self.at = (volume, first + count);
        Ok((first, count))
    }

    /// Data as extents: blocks of zeros are said and not sent.
    fn add_data(&mut self, chunk: &mut Chunk, first: u64, data: &Bytes) {
        let spec = &self.sources[chunk.volume].spec;
        let (volume, size) = (spec.id, spec.block_size.bytes() as usize);
        let zero: Vec<bool> = data.chunks_exact(size).map(is_zero).collect();
        let mut at = 0;
        while at < zero.len() {
            let run = zero[at..].iter().take_while(|z| **z == zero[at]).count();
            let first = first + at as u64;
            if zero[at] {
                self.counts.zero_bytes += (run * size) as u64;
                push_zeros(&mut chunk.extents, volume, first, run as u64);
            } else {
                let bytes = data.slice(at * size..(at + run) * size);
                let block_crc32c = block_crcs(&bytes, spec.block_size).to_vec();
                let (data, compression) = if self.options.compress { compress(bytes) } else { plain(bytes) };
                self.counts.sent_bytes += data.len() as u64;
                chunk.extents.push(v1::DeltaExtent {
                    volume_id: volume.0,
                    first_block: first,
                    content: Some(v1::delta_extent::Content::Data(v1::DeltaData {
                        block_crc32c,
                        data,
                        compression: compression.into(),
                    })),
                });
            }
            at += run;
        }
    }

    fn send(&mut self, chunk: Chunk) -> RunRequest {
        let number = self.next_batch;
        self.next_batch += 1;
        self.sent.push_back(Sent { number, bytes: chunk.blocks * chunk.block_bytes });
        if Mutant::ClearWhenSent.on() {
            self.store.forget_sent(self.sources[chunk.volume].spec.id, self.at.1);
        }
        let batch = v1::DeltaBatchRequest {
            session: self.session.clone(),
            group_id: self.group.0,
            run: self.run.id,
            opening: self.opening,
            number,
            extents: chunk.extents,
            crc32c: 0,
        };
        RunRequest::Batch(batch.sealed())
    }
}

fn push_zeros(extents: &mut Vec<v1::DeltaExtent>, volume: VolumeId, first: u64, count: u64) {
    use v1::delta_extent::Content;
    if let Some(v1::DeltaExtent { volume_id, first_block, content: Some(Content::ZeroBlocks(before)) }) =
        extents.last_mut()
        && *volume_id == volume.0
        && *first_block + *before == first
    {
        *before += count;
        return;
    }
    let content = Some(Content::ZeroBlocks(count));
    extents.push(v1::DeltaExtent { volume_id: volume.0, first_block: first, content });
}

fn plain(data: Bytes) -> (Bytes, v1::Compression) {
    (data, v1::Compression::Unspecified)
}

fn compress(data: Bytes) -> (Bytes, v1::Compression) {
    let pays = |raw: usize, packed: usize| packed < raw - raw / 10;
    let sample = &data[..data.len().min(SAMPLE_BYTES)];
    if !pays(sample.len(), lz4_flex::block::compress(sample).len()) {
        return plain(data);
    }
    let packed = lz4_flex::block::compress(&data);
    if pays(data.len(), packed.len()) { (packed.into(), v1::Compression::Lz4) } else { plain(data) }
}

fn check_refusal(refusal: Option<v1::Refusal>) -> Result<(), RunError> {
    match refusal {
        Some(v1::Refusal { cause, message, .. }) => Err(RunError::Refused { cause, message }),
        None => Ok(()),
    }
}
