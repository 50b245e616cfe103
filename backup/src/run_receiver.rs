//! The receiving half of a run (Fig. 7), over the store: what is taken of it, and when it may be answered.
//!
//! No clock and no socket. Invariants:
//! - Only the open session, and of a run only its newest opening, changes anything.
//! - The snapshot and the mark of the run are durable before the answer to its begin, so before its first block.
//! - A run has one terminal state. A commit that came first beats an abort, and answers are repeatable.
//! - Until the commit the group reads as before the run.
//! - A message that is not what was sent changes nothing.

use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;
use understudy_common::{
    checksum::{digest, is_zero},
    mutant::Mutant,
    record::{self, DecodeError},
    state::{GroupState, Snapshot},
    store::{HeldSnapshot, LayerReader, ModeError, NewRun, ReadFailure, RunContent, Store, SubmitError},
    types::{GroupId, LayerId, Lsn, Position, SnapshotId, Uid, VolumeId, VolumeSpec},
};
use understudy_proto::{convert, convert::InvalidField, seal::Sealed, v1};

use crate::receiver::{Opening, Receiver, Refusal};

/// The largest piece that is expanded, in bytes.
const EXTENT_BYTES_MAX: usize = 16 << 20;

/// The largest piece of zeros, in blocks.
const ZERO_BLOCKS_MAX: u64 = 1 << 18;

/// Why a part of a run was not taken. Nothing of it was stored, or what was stored before it stays.
#[derive(Debug, Error)]
pub enum RunRefusal {
    /// Not the open session.
    #[error("it belongs to session {0}, which is not open here any more")]
    OldSession(Uid),
    /// Not the run, or not its newest opening.
    #[error("run {run} of group {group} is not open here: {why}")]
    NotOpen {
        /// The group.
        group: GroupId,
        /// The run.
        run: u64,
        /// More.
        why: String,
    },
    /// A batch is missing.
    #[error("batch {got} follows {expected}: one was lost")]
    Gap {
        /// Of the batch.
        got: u64,
        /// Of the opening.
        expected: u64,
    },
    /// A field makes no sense.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// Damaged on the way, and not only in the data of blocks.
    #[error("a message of a run was damaged on the way")]
    Unsealed,
    /// Data that was damaged on the way.
    #[error("volume {volume} block {block}: {source}")]
    Damaged {
        /// The volume.
        volume: VolumeId,
        /// First block of the extent.
        block: u64,
        /// What is wrong.
        source: DecodeError,
    },
    /// The backup cannot: the run is to be given up.
    #[error("{}", .0.message)]
    Cannot(Refusal),
    /// There is no room now; there will be, which was asked for.
    #[error(transparent)]
    Busy(SubmitError),
    /// The store.
    #[error(transparent)]
    Store(SubmitError),
    /// What is to be compared cannot be read, and not because a block is damaged.
    #[error("{0}")]
    Unreadable(String),
}

/// An answer that may be given when this node is durable up to `at`.
#[derive(Debug, Clone)]
pub struct When<T> {
    /// In this node's journal.
    pub at: Lsn,
    /// What to say then.
    pub answer: T,
}

impl Receiver {
    fn check(&self, message: &impl Sealed, session: &[u8]) -> Result<(), RunRefusal> {
        if !message.is_whole() {
            return Err(RunRefusal::Unsealed);
        }
        self.check_session(session)
    }

    fn check_session(&self, session: &[u8]) -> Result<(), RunRefusal> {
        let id = convert::uid("session", session)?;
        match self.session() {
            Some(open) if open == id || Mutant::NoSessionFence.on() => Ok(()),
            _ => Err(RunRefusal::OldSession(id)),
        }
    }

    /// Durable when all that was submitted here is.
    fn newest(&self) -> Lsn {
        Lsn(self.store.next_lsn().0 - 1)
    }

    /// Begins a run, or goes on with it (840).
    ///
    /// # Errors
    /// See [`RunRefusal`].
    pub fn on_begin(&mut self, request: &v1::BeginRunRequest) -> Result<When<v1::BeginRunResponse>, RunRefusal> {
        self.check(request, &request.session)?;
        let (group, run) = (GroupId(request.group_id), request.run);
        let cut: Position = request.cut.ok_or_else(|| missing("cut"))?.into();
        let mut answer = v1::BeginRunResponse { session: request.session.clone(), ..Default::default() };
        let (open, committed, position) = self.store.with_state(|state| {
            let known = state.groups.get(&group);
            let gone = state.is_gone(group) && request.volumes.is_empty();
            let same = |g: &GroupState| g.committed_run == run && g.position.generation == cut.generation;
            let committed = known.is_some_and(same) || gone;
            let position = known.filter(|g| g.diverged.is_none()).map(|g| g.position);
            // A run of another primary may have the same number.
            (known.and_then(|g| g.run.clone()).filter(|r| r.id == run && r.cut == cut), committed, position)
        });
        // Whole: a side of a split may have deleted a volume that the other one kept.
        let stays = |volume: VolumeId| request.volumes.iter().any(|spec| spec.id == volume.0);
        let whole = |snapshot: &Snapshot| {
            let mut kept = snapshot.specs.iter().filter(|spec| stays(spec.id)).peekable();
            kept.peek().is_some() && kept.all(|spec| snapshot.volume(spec.id).is_some())
        };
        let held = || {
            self.store.with_state(|state| {
                let held = state.snapshots_of(group).filter(|s| request.snapshot_ids.contains(&s.id.0) && whole(s));
                held.map(|snapshot| snapshot.id.0).collect()
            })
        };
        if committed {
            (answer.committed, answer.snapshot_ids) = (true, held());
            return Ok(When { at: self.newest(), answer: answer.sealed() });
        }
        if let Some(position) = position.filter(|position| *position > cut) {
            let why = format!("the group is at {position} already, behind the cut {cut}");
            return Err(RunRefusal::NotOpen { group, run, why });
        }
        match open {
            Some(open) if open.cancelled => {
                return Err(RunRefusal::NotOpen { group, run, why: "it was given up".into() });
            }
            Some(open) => {
                answer.progress = open.progress.map(|(volume, block)| v1::RunPlace { volume_id: volume.0, block });
            }
            None => {
                let specs = request.volumes.iter().cloned().map(convert::volume_from_wire);
                let specs = specs.collect::<Result<Vec<_>, _>>()?;
                self.let_go_of_clashes(group, &specs).map_err(|error| RunRefusal::Unreadable(error.to_string()))?;
                if let Some(refusal) = self.cannot(group, cut, &specs, request.dirty_bytes) {
                    return Err(RunRefusal::Cannot(refusal));
                }
                let group_name = request.group.clone();
                let snapshots = request.snapshot_ids.iter().copied().map(SnapshotId).collect();
                let time_unix_ms = request.time_unix_ms;
                let new = NewRun { group, group_name, id: run, cut, time_unix_ms, specs, snapshots };
                self.store.begin_run(new).map_err(RunRefusal::Store)?;
            }
        }
        answer.snapshot_ids = held();
        let at = self.newest();
        let session = self.session.as_mut().expect("checked above");
        session.forget_refusal(group);
        answer.opening = session.open(group, run);
        Ok(When { at, answer: answer.sealed() })
    }

    /// What this node can never do for the run, or not now, with the numbers.
    fn cannot(&self, group: GroupId, position: Position, specs: &[VolumeSpec], dirty_bytes: u64) -> Option<Refusal> {
        let refuse = |volume, cause, message| Some(Refusal { group, volume, position, cause, message });
        let ours = self.store.config().pool.segment_bytes;
        if let Some(spec) = specs.iter().find(|spec| spec.segment_bytes != ours) {
            let message =
                format!("volume {} has segments of {} bytes, this pool {ours}", spec.name, spec.segment_bytes);
            return refuse(spec.id, "segment_size", message);
        }
        let space = self.store.space();
        let free = space.free().saturating_sub(space.reserved()).saturating_add(space.can_grow());
        let needed = dirty_bytes.div_ceil(u64::from(ours));
        if needed > free {
            // What they give back is there when the primary tries again.
            let _ = self.give_way();
            self.store.request_checkpoint();
            let message = format!(
                "the run may need {needed} segments of {ours} bytes beside the image it may not touch, and {free} are \
                 free: give the backup's pool more space"
            );
            return refuse(VolumeId::default(), "space", message);
        }
        None
    }

    /// A batch of blocks (845 to 851).
    ///
    /// # Errors
    /// See [`RunRefusal`]. After `Busy` the same batch is to be offered again.
    pub fn on_batch(&mut self, batch: &v1::DeltaBatchRequest) -> Result<When<v1::DeltaBatchResponse>, RunRefusal> {
        self.check(batch, &batch.session)?;
        let (group, run) = (GroupId(batch.group_id), batch.run);
        let opening = self.session.as_ref().expect("checked above").opening;
        if !Mutant::OldRunAccepted.on() {
            let fits = |o: &Opening| o.group == group && o.run == run && o.number == batch.opening;
            let Some(opening) = opening.filter(fits) else {
                return Err(RunRefusal::NotOpen { group, run, why: "another opening is".into() });
            };
            if opening.next_batch != batch.number {
                return Err(RunRefusal::Gap { got: batch.number, expected: opening.next_batch });
            }
        }
        // What was offered before and found no room in its middle goes on there.
        let written = self.session.as_ref().and_then(|s| s.opening).map_or(0, |opening| opening.extents);
        for (n, extent) in batch.extents.iter().enumerate().skip(written) {
            if let Err(refusal) = self.write_extent(group, run, extent) {
                self.note_batch(|opening| opening.extents = n);
                return Err(refusal);
            }
        }
        self.note_batch(|opening| (opening.next_batch, opening.extents) = (batch.number + 1, 0));
        let (session, number) = (batch.session.clone(), batch.number);
        let answer = v1::DeltaBatchResponse { session, run, number, ..Default::default() };
        Ok(When { at: self.newest(), answer: answer.sealed() })
    }

    fn note_batch(&mut self, note: impl FnOnce(&mut Opening)) {
        if let Some(opening) = self.session.as_mut().and_then(|s| s.opening.as_mut()) {
            note(opening);
        }
    }

    fn write_extent(&self, group: GroupId, run: u64, extent: &v1::DeltaExtent) -> Result<(), RunRefusal> {
        use v1::delta_extent::Content;
        let (volume, first) = (VolumeId(extent.volume_id), extent.first_block);
        let write = |first, content| match self.store.write_run(group, run, volume, first, content) {
            Ok(_) => Ok(()),
            Err(ModeError::Submit(error)) => Err(self.no_room(group, volume, error)),
            Err(error) => Err(RunRefusal::NotOpen { group, run, why: error.to_string() }),
        };
        match extent.content.as_ref().ok_or_else(|| missing("content"))? {
            Content::ZeroBlocks(count) => write(first, RunContent::Zeros(*count)),
            Content::Data(data) => {
                let spec = self.store.replica_run(group).and_then(|r| r.specs.into_iter().find(|s| s.id == volume));
                let Some(spec) = spec else {
                    return Err(RunRefusal::NotOpen { group, run, why: format!("it has no volume {volume}") });
                };
                let crcs = data.block_crc32c.as_slice().into();
                let bytes = expand(data, data.block_crc32c.len() * spec.block_size.bytes() as usize)?;
                record::check_blocks(&bytes, spec.block_size, &crcs).map_err(|source| RunRefusal::Damaged {
                    volume,
                    block: first,
                    source,
                })?;
                // A record has to fit into a file of this node's journal, which the primary does not know.
                let size = spec.block_size.bytes() as usize;
                let file = usize::try_from(self.store.config().journal.file_bytes).unwrap_or(usize::MAX);
                let most = (file / 2 / size).max(1);
                data.block_crc32c.chunks(most).zip((0..).step_by(most)).try_for_each(|(crcs, at)| {
                    let piece = bytes.slice(at * size..(at + crcs.len()) * size);
                    write(first + at as u64, RunContent::Data(piece, crcs.into()))
                })
            }
        }
    }

    fn no_room(&self, group: GroupId, volume: VolumeId, error: SubmitError) -> RunRefusal {
        match error {
            SubmitError::Space(space) if self.give_way() || self.store.room_may_come(&space) => {
                self.store.request_checkpoint();
                self.store.request_growth();
                RunRefusal::Busy(SubmitError::Space(space))
            }
            error @ SubmitError::StagingFull { .. } => {
                self.store.request_checkpoint();
                RunRefusal::Busy(error)
            }
            error @ SubmitError::Failed(_) => RunRefusal::Store(error),
            error => {
                let cause = if matches!(error, SubmitError::Space(_)) { "space" } else { "unsupported" };
                let position = Position::default();
                RunRefusal::Cannot(Refusal { group, volume, position, cause, message: error.to_string() })
            }
        }
    }

    /// Which pieces are here already: to be looked at without this receiver.
    ///
    /// # Errors
    /// See [`RunRefusal`].
    pub fn on_digest(&self, request: v1::DigestRequest) -> Result<DigestJob, RunRefusal> {
        self.check(&request, &request.session)?;
        let (group, run) = (GroupId(request.group_id), request.run);
        if request.verify {
            let held = self.session.as_ref().and_then(|session| session.verify.clone());
            let fits = |held: &Arc<HeldSnapshot>| held.group() == group && held.position().lsn.0 == run;
            let why = || RunRefusal::NotOpen { group, run, why: "no snapshots to compare were taken at it".into() };
            let snapshot = held.filter(fits).ok_or_else(why)?;
            let known = |(spec, _): &&(VolumeSpec, LayerId)| spec.id.0 == request.volume_id;
            let (spec, layer) = snapshot.volumes().iter().find(known).cloned().ok_or_else(why)?;
            let snapshot = Some((snapshot, layer));
            return Ok(DigestJob { store: Arc::clone(&self.store), spec, snapshot, request });
        }
        let open = self.store.replica_run(group).filter(|open| open.id == run && !open.cancelled);
        let Some(open) = open else {
            return Err(RunRefusal::NotOpen { group, run, why: "no digests of it".into() });
        };
        let volume = VolumeId(request.volume_id);
        let Some(spec) = open.specs.into_iter().find(|spec| spec.id == volume) else {
            return Err(RunRefusal::NotOpen { group, run, why: format!("it has no volume {volume}") });
        };
        Ok(DigestJob { store: Arc::clone(&self.store), spec, snapshot: None, request })
    }

    /// Who compares is gone.
    pub fn forget_verify(&mut self) {
        if let Some(session) = &mut self.session {
            session.verify = None;
        }
    }

    /// The snapshots of a comparison go.
    ///
    /// # Errors
    /// See [`RunRefusal`].
    pub fn on_end_verify(&mut self, request: &v1::EndVerifyRequest) -> Result<v1::EndVerifyResponse, RunRefusal> {
        self.check_session(&request.session)?;
        if let Some(session) = &mut self.session {
            session.verified = session.verified.max(Lsn(request.position.unwrap_or_default().lsn));
            session.verify.take_if(|held| held.position().lsn <= session.verified);
        }
        Ok(v1::EndVerifyResponse { session: request.session.clone() })
    }

    /// The group becomes the image of the cut.
    ///
    /// # Errors
    /// See [`RunRefusal`].
    pub fn on_commit(&mut self, request: &v1::CommitDeltaRequest) -> Result<When<v1::CommitDeltaResponse>, RunRefusal> {
        self.check(request, &request.session)?;
        let (group, run) = (GroupId(request.group_id), request.run);
        if !self.is_committed(group, run) {
            match self.store.commit_run(group, run) {
                Ok(_) => {}
                Err(ModeError::Submit(error)) => return Err(RunRefusal::Store(error)),
                Err(error) => return Err(RunRefusal::NotOpen { group, run, why: error.to_string() }),
            }
        }
        let position = self.store.with_state(|state| state.groups.get(&group).map(|g| g.position.into()));
        let at = if Mutant::CommitBeforeSync.on() { Lsn::ZERO } else { self.newest() };
        let answer = v1::CommitDeltaResponse { session: request.session.clone(), position, crc32c: 0 };
        Ok(When { at, answer: answer.sealed() })
    }

    /// Nothing more is taken of the run.
    ///
    /// # Errors
    /// See [`RunRefusal`].
    pub fn on_abort(
        &mut self,
        request: &v1::AbortDeltaRequest,
        time_unix_ms: i64,
    ) -> Result<When<v1::AbortDeltaResponse>, RunRefusal> {
        self.check_session(&request.session)?;
        let (group, run) = (GroupId(request.group_id), request.run);
        let committed = self.is_committed(group, run);
        if !committed {
            self.store.cancel_run(group, run, time_unix_ms).map_err(RunRefusal::Store)?;
        }
        let answer = v1::AbortDeltaResponse { session: request.session.clone(), committed };
        Ok(When { at: self.newest(), answer })
    }

    fn is_committed(&self, group: GroupId, run: u64) -> bool {
        let generation = self.session.as_ref().map(|session| session.generation);
        self.store.with_state(|state| match state.groups.get(&group) {
            Some(known) => known.committed_run == run && Some(known.position.generation) == generation,
            // Its last volume went with the run.
            None => state.is_gone(group),
        })
    }
}

/// Pieces that are to be compared.
pub struct DigestJob {
    store: Arc<Store>,
    spec: VolumeSpec,
    /// Of a comparison: held until the job is done.
    snapshot: Option<(Arc<HeldSnapshot>, LayerId)>,
    request: v1::DigestRequest,
}

impl DigestJob {
    /// It may run when this LSN is applied.
    #[must_use]
    pub fn ready_at(&self) -> Lsn {
        self.snapshot.as_ref().map_or(Lsn::ZERO, |(snapshot, _)| snapshot.ready_at())
    }

    /// True if the snapshot reads as `piece` says. A block that is damaged does not.
    fn holds(&self, reader: &LayerReader, piece: &v1::DigestPiece) -> Result<bool, RunRefusal> {
        let compared = || {
            if !piece.digest.is_empty() {
                let data = reader.read(piece.first_block, piece.block_count)?;
                return Ok(digest(&data)[..] == piece.digest[..]);
            }
            let (mut at, end) = (piece.first_block, piece.first_block.saturating_add(piece.block_count));
            let most = (EXTENT_BYTES_MAX as u64 / 16 / u64::from(self.spec.block_size.bytes())).max(1);
            while at < end {
                let (hole, count) = reader.extent(at, end - at)?;
                let count = if hole { count } else { count.min(most) };
                if !hole && !is_zero(&reader.read(at, count)?) {
                    return Ok(false);
                }
                at += count;
            }
            Ok(true)
        };
        match compared() {
            Err(ReadFailure::Damaged { .. }) => Ok(false),
            Err(ReadFailure::OutOfRange { .. }) => Ok(false),
            // Not knowing is not a difference.
            Err(error) => Err(RunRefusal::Unreadable(error.to_string())),
            Ok(same) => Ok(same),
        }
    }

    /// Reads the bytes, and not their checksums. What cannot be read is not the same.
    ///
    /// # Errors
    /// For a piece that is larger than any.
    pub fn run(&self) -> Result<v1::DigestResponse, RunRefusal> {
        let mut same = Vec::with_capacity(self.request.pieces.len());
        let reader = self.snapshot.as_ref().map(|(_, layer)| LayerReader::new(&self.store, &self.spec, *layer));
        for piece in &self.request.pieces {
            let zeros = piece.digest.is_empty() && piece.block_count <= ZERO_BLOCKS_MAX;
            let bytes = piece.block_count.saturating_mul(u64::from(self.spec.block_size.bytes()));
            if bytes > EXTENT_BYTES_MAX as u64 && !(zeros && reader.is_some()) {
                let why = format!("a piece of {bytes} bytes is larger than {EXTENT_BYTES_MAX}");
                return Err(RunRefusal::Invalid(InvalidField { field: "block_count", why }));
            }
            if let Some(reader) = &reader {
                same.push(self.holds(reader, piece)?);
                continue;
            }
            let read = self.store.read_in_run(&self.spec, piece.first_block, piece.block_count);
            same.push(read.is_ok_and(|data| digest(&data)[..] == piece.digest[..]));
        }
        Ok(v1::DigestResponse { session: self.request.session.clone(), same, crc32c: 0 }.sealed())
    }
}

fn expand(data: &v1::DeltaData, bytes: usize) -> Result<Bytes, RunRefusal> {
    let invalid = |why: String| RunRefusal::Invalid(InvalidField { field: "data", why });
    if bytes > EXTENT_BYTES_MAX {
        return Err(invalid(format!("{bytes} bytes are more than {EXTENT_BYTES_MAX}")));
    }
    match data.compression() {
        v1::Compression::Unspecified => Ok(data.data.clone()),
        v1::Compression::Lz4 => {
            let out = lz4_flex::block::decompress(&data.data, bytes).map_err(|e| invalid(e.to_string()))?;
            Ok(out.into())
        }
    }
}

fn missing(field: &'static str) -> RunRefusal {
    RunRefusal::Invalid(InvalidField { field, why: "missing".into() })
}
