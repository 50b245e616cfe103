//! The receiving half of a session, as a state machine over the store: what is accepted, and what may be answered.
//!
//! No clock and no socket. Invariants:
//! - A frame of another session than the open one changes nothing.
//! - Within a session ship numbers are dense; within a lane of a group each record names the one before it. A gap ends
//!   the session; a record at or below what the lane holds is a duplicate and only counted.
//! - A ship number is answered when every record up to it is durable here, or refused by name.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use thiserror::Error;
use understudy_common::{
    history::{History, Relation},
    lives::{Lives, NotOurs},
    mutant::Mutant,
    record::{self, Control, DecodeError, Op, Record, WriteData},
    state::{GroupState, LanePlaces},
    store::{HeldSnapshot, ModeError, NewRun, Role, Store, SubmitError},
    types::{GroupId, Lsn, Position, Uid, VolumeId, VolumeSpec},
};

/// The protocol this version speaks.
pub const PROTOCOL: u32 = 1;
/// The largest step of a generation that is believed.
const GENERATION_STEP_MAX: u64 = 1 << 20;

/// What the primary says of itself.
#[derive(Debug, Clone)]
pub struct Hello {
    /// Nil on no primary.
    pub pair: Uid,
    /// Its data directory.
    pub instance: Uid,
    /// Its generation.
    pub generation: u64,
    /// And its random half.
    pub generation_id: Uid,
    /// Version of the protocol.
    pub protocol: u32,
    /// Of its pool.
    pub segment_bytes: u32,
    /// Its newest durable record.
    pub durable: Lsn,
    /// The groups it has or ships records of; `None`: it does not say.
    pub groups: Option<BTreeSet<GroupId>>,
    /// Its generations; the last is its own.
    pub history: History,
    /// The lives of its directory; empty: it does not say.
    pub lives: Lives,
}

/// A group of a backup that was a primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DivergedGroup {
    /// The group.
    pub group: GroupId,
    /// Its table says where it differs from the fork; or why it does not.
    pub exact: Result<(), String>,
    /// The volumes it has here.
    pub volumes: Vec<VolumeId>,
}

/// Why an attach is refused. Nothing was changed.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
pub enum AttachRefusal {
    /// Versions.
    #[error("the primary speaks protocol {theirs}, this backup {PROTOCOL}: upgrade the older one")]
    Protocol {
        /// Of the primary.
        theirs: u32,
    },
    /// Another pair.
    #[error(
        "this backup belongs to pair {ours}, the primary to pair {theirs}: point the primary at its own backup, or give it an empty one"
    )]
    ForeignPair {
        /// Of the backup.
        ours: Uid,
        /// Of the primary.
        theirs: Uid,
    },
    /// The primary was superseded.
    #[error(
        "the primary's generation {theirs} is over: the pair is at {}; `understudy demote` makes it a backup",
        .history.newest().map_or(0, |g| g.number)
    )]
    OldGeneration {
        /// Of the primary.
        theirs: u64,
        /// Of the backup.
        history: History,
    },
    /// Both sides went on by themselves.
    #[error(
        "split brain: both sides were promoted since generation {shared}, which they share; run `understudy resolve` on \
         the side that is to give up its changes"
    )]
    Fork {
        /// The newest generation that both know.
        shared: u64,
        /// Of the backup.
        history: History,
    },
    /// A number that cannot be, or one that does not fit its history.
    #[error("generation {generation} of the primary cannot follow {ours}, the one this backup knows")]
    Generation {
        /// Of the primary.
        generation: u64,
        /// Of the backup.
        ours: u64,
    },
    /// A change of role is under way.
    #[error("this backup is being promoted")]
    Promoting,
    /// Geometry.
    #[error(
        "the primary's segments have {theirs} bytes, this backup's pool has {ours}: create the backup with [pool] segment = {theirs}"
    )]
    SegmentSize {
        /// Of the backup.
        ours: u32,
        /// Of the primary.
        theirs: u32,
    },
    /// The primary was restored from an old copy.
    #[error(
        "this backup holds group {group} up to {ours}, the primary's journal ends at {theirs}: it was restored from an old copy; run `understudy resolve` on the side that is to give up its changes"
    )]
    Ahead {
        /// The group.
        group: GroupId,
        /// Of the backup.
        ours: Lsn,
        /// Of the primary.
        theirs: Lsn,
        /// Of the backup.
        history: History,
    },
    /// The primary's directory is not the one whose records are here.
    #[error(
        "the primary runs on an old copy of its directory, or on a second one: {why}; stop it, or run `understudy resolve` \
         on the side that is to give up its changes"
    )]
    Copy {
        /// What does not fit.
        why: NotOurs,
        /// Of the backup.
        history: History,
    },
    /// The store.
    #[error("{0}")]
    Store(String),
}

impl AttachRefusal {
    /// Both sides have what the other has not, and an operator is to choose.
    #[must_use]
    pub fn is_split(&self) -> bool {
        matches!(self, Self::Fork { .. } | Self::Ahead { .. } | Self::Copy { .. })
    }
}

/// Why a frame was not taken. Nothing of it was stored.
#[derive(Debug, Error)]
pub enum FrameRefusal {
    /// Not the open session.
    #[error("the frame belongs to session {0}, which is not open here any more")]
    OldSession(Uid),
    /// A frame is missing.
    #[error("ship number {got} follows {expected}: a frame was lost")]
    Gap {
        /// Of the frame.
        got: u64,
        /// Of the session.
        expected: u64,
    },
    /// A record is missing.
    #[error("lane {lane} of group {group} is at {ours}, but record {lsn} follows {previous}: a record was lost")]
    Chain {
        /// The group.
        group: GroupId,
        /// The lane.
        lane: u8,
        /// What it holds.
        ours: Lsn,
        /// What the record follows.
        previous: Lsn,
        /// The record.
        lsn: Lsn,
    },
    /// The group is in a run, and the record lies behind its cut.
    #[error("group {group} is in a run up to {cut}, and record {lsn} comes before its commit")]
    InRun {
        /// The group.
        group: GroupId,
        /// The position of the cut.
        cut: Lsn,
        /// The record.
        lsn: Lsn,
    },
    /// The generation is not the session's.
    #[error("record {0} is of another generation than its session")]
    Generation(Position),
    /// Damaged on the way.
    #[error("record {lsn}: {source}")]
    Damaged {
        /// The record.
        lsn: Lsn,
        /// What is wrong.
        source: DecodeError,
    },
    /// There is no room now; there will be after a checkpoint or a growth, which was asked for.
    #[error(transparent)]
    Busy(SubmitError),
    /// The store.
    #[error(transparent)]
    Store(SubmitError),
}

/// A group this backup cannot go on with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The group.
    pub group: GroupId,
    /// Its volume.
    pub volume: VolumeId,
    /// The first record that was refused.
    pub position: Position,
    /// "space", "segment_size", "unsupported".
    pub cause: &'static str,
    /// For people, with numbers.
    pub message: String,
}

/// What may be answered now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Every record up to here is durable or refused.
    pub ship: u64,
    /// The refusals of the session so far, if there are new ones.
    pub refusals: Vec<Refusal>,
}

pub(crate) struct Session {
    id: Uid,
    pub(crate) generation: u64,
    next_ship: u64,
    /// Ship numbers that wait for an LSN of this node to be durable.
    pending: VecDeque<(u64, Lsn)>,
    answered: u64,
    refused: BTreeMap<GroupId, Refusal>,
    refusals_answered: usize,
    /// The opening of a run whose batches are taken.
    pub(crate) opening: Option<Opening>,
    openings: u64,
    /// The snapshots that a comparison of this session has taken; they go with it.
    pub(crate) verify: Option<Arc<HeldSnapshot>>,
    /// Comparisons up to here are over; their records may be on their way.
    pub(crate) verified: Lsn,
}

/// See the module.
pub struct Receiver {
    pub(crate) store: Arc<Store>,
    pub(crate) session: Option<Session>,
    /// The role is about to change: nothing arrives any more.
    closed: bool,
    /// What holds space that the replica needs lets go of it. True if there was something.
    gives_way: Box<dyn Fn() -> bool + Send>,
}

impl Receiver {
    /// A receiver without a session.
    #[must_use]
    pub fn new(store: Arc<Store>) -> Self {
        Self { store, session: None, closed: false, gives_way: Box::new(|| false) }
    }

    /// Asked when a record or a run lacks space. It must not take this receiver's lock.
    #[must_use]
    pub fn with_giving_way(self, gives_way: impl Fn() -> bool + Send + 'static) -> Self {
        Self { gives_way: Box::new(gives_way), ..self }
    }

    pub(crate) fn give_way(&self) -> bool {
        (self.gives_way)()
    }

    /// Opens session `id`, ending the one before. The positions may be told to the primary once this node is durable
    /// up to the LSN beside them: it releases what they cover.
    ///
    /// # Errors
    /// See [`AttachRefusal`].
    pub fn attach(&mut self, hello: &Hello, id: Uid) -> Result<(BTreeMap<GroupId, LanePlaces>, Lsn), AttachRefusal> {
        let ours = self.store.identity();
        if hello.protocol != PROTOCOL {
            return Err(AttachRefusal::Protocol { theirs: hello.protocol });
        }
        let fresh = ours.pair.is_nil();
        if !fresh && ours.pair != hello.pair || hello.pair.is_nil() {
            return Err(AttachRefusal::ForeignPair { ours: ours.pair, theirs: hello.pair });
        }
        let (generation, history) = (hello.generation, self.store.history());
        let newest = hello.history.newest().map(|g| (g.number, g.id));
        let step = generation.saturating_sub(ours.generation);
        if newest != Some((generation, hello.generation_id)) || !fresh && step > GENERATION_STEP_MAX {
            return Err(AttachRefusal::Generation { generation, ours: ours.generation });
        }
        let same = match history.relation(&hello.history) {
            Relation::Same if ours.role == Role::Backup => true,
            Relation::Same | Relation::Descendant => {
                return Err(AttachRefusal::OldGeneration { theirs: generation, history });
            }
            Relation::Ancestor => false,
            Relation::Fork { .. } if ours.yields => false,
            Relation::Fork { shared } => return Err(AttachRefusal::Fork { shared, history }),
        };
        if self.closed || ours.role != Role::Backup {
            return Err(AttachRefusal::Promoting);
        }
        let segment_bytes = self.store.config().pool.segment_bytes;
        if hello.segment_bytes != segment_bytes {
            return Err(AttachRefusal::SegmentSize { ours: segment_bytes, theirs: hello.segment_bytes });
        }
        // The position of a diverged group is no place in this primary's history; the cut of a run that is open is one, and
        // some of what it carries is here. What may differ anywhere is brought anew as a whole.
        let newest: Vec<_> = self.store.with_state(|state| {
            let image = |g: &GroupState| Some(g.position).filter(|_| g.diverged.is_none());
            let anew = |g: &GroupState| g.diverged.is_some_and(|diverged| diverged.unknown);
            let open = |g: &GroupState| g.run.as_ref().map(|run| Position { lsn: Lsn(run.id), ..run.cut });
            // The mutant takes away both guards: a cut that a crash has lost would be refused here.
            let run = |g: &GroupState| open(g).filter(|_| !anew(g) && !Mutant::CutNotDurable.on());
            let groups = state.groups.values();
            groups.flat_map(|g| [image(g), run(g)].into_iter().flatten().map(|at| (g.id, at))).collect()
        });
        let of_this = newest.iter().filter(|(_, position)| position.generation == hello.generation);
        for (group, position) in of_this.clone() {
            if position.lsn > hello.durable {
                return Err(AttachRefusal::Ahead { group: *group, ours: position.lsn, theirs: hello.durable, history });
            }
        }
        let known = same && !ours.yields && !ours.met.is_nil() && !hello.lives.lives().is_empty();
        if known && !Mutant::TakeOldCopy.on() {
            let held = of_this.map(|(_, position)| position.lsn).max().unwrap_or_default();
            let checked = hello.lives.check(ours.met, held);
            checked.map_err(|why| AttachRefusal::Copy { why, history: history.clone() })?;
        }
        let met = hello.lives.open().unwrap_or_default();
        if !same || ours.yields || ours.met != met {
            self.store
                .set_identity(|identity, history| {
                    identity.pair = hello.pair;
                    identity.generation = hello.generation;
                    identity.generation_id = hello.generation_id;
                    (identity.yields, identity.met) = (false, met);
                    history.clone_from(&hello.history);
                })
                .map_err(|error| AttachRefusal::Store(error.to_string()))?;
        }
        if let Some(groups) = &hello.groups {
            self.let_go(groups).map_err(|error| AttachRefusal::Store(error.to_string()))?;
        }
        let held = self.positions();
        self.session = Some(Session {
            id,
            generation: hello.generation,
            next_ship: 1,
            pending: VecDeque::new(),
            answered: 0,
            refused: BTreeMap::new(),
            refusals_answered: 0,
            opening: None,
            openings: 0,
            verify: None,
            verified: Lsn::ZERO,
        });
        Ok((held, Lsn(self.store.next_lsn().0 - 1)))
    }

    /// Groups that the primary has no more, and that no record will delete: this disk is an older copy.
    fn let_go(&self, groups: &BTreeSet<GroupId>) -> Result<(), ModeError> {
        self.drop_groups(|g| !groups.contains(&g.id))
    }

    /// Drops groups that have, under the id of a volume of `group`, another volume: this side ran on an old copy, and gave
    /// the id again. They are given up, or were never whole, so the primary brings them anew.
    pub(crate) fn let_go_of_clashes(&self, group: GroupId, specs: &[VolumeSpec]) -> Result<(), ModeError> {
        let wanted = |id: &VolumeId| specs.iter().any(|spec| spec.id == *id);
        self.drop_groups(|g| {
            let mut coming = g.run.iter().flat_map(|run| &run.specs).map(|spec| &spec.id);
            let clashes = g.volumes.iter().any(wanted) || coming.any(wanted);
            g.id != group && clashes && (g.diverged.is_some() || !g.consistent)
        })
    }

    fn drop_groups(&self, which: impl Fn(&GroupState) -> bool) -> Result<(), ModeError> {
        let gone: Vec<_> = self.store.with_state(|state| {
            let gone = state.groups.values().filter(|g| which(g));
            gone.map(|g| (g.id, g.name.clone(), g.position, g.time_unix_ms)).collect()
        });
        for (group, group_name, cut, time_unix_ms) in gone {
            // A run to an image without volumes.
            let (specs, snapshots) = (Vec::new(), Vec::new());
            let new = NewRun { group, group_name, id: u64::MAX, cut, time_unix_ms, specs, snapshots };
            self.store.begin_run(new)?;
            self.store.commit_run(group, u64::MAX)?;
        }
        Ok(())
    }

    /// The newest record of each lane here; some may not be durable yet. Those of a diverged group are no places in the
    /// primary's history.
    fn positions(&self) -> BTreeMap<GroupId, LanePlaces> {
        self.store.with_state(|state| {
            let groups = state.groups.values().filter(|g| g.diverged.is_none());
            groups.map(|g| (g.id, g.lanes.clone())).collect()
        })
    }

    /// The groups with changes that the primary does not know, and whether the tables say where. They do if the primary's
    /// generation came right behind the one in which they were made, and if it began with all that this side had been
    /// told is there.
    #[must_use]
    pub fn diverged(&self) -> Vec<DivergedGroup> {
        let history = self.store.history();
        let met = history.newest().map_or(Uid::default(), |newest| newest.met);
        let lives = self.store.known_lives();
        self.store.with_state(|state| {
            let diverged = state.groups.values().filter_map(|g| Some((g, g.diverged?)));
            let found = diverged.map(|(g, diverged)| {
                let exact = match history.fork_of(g.position.generation, g.id) {
                    _ if diverged.unknown => Err("what differs was not kept".to_owned()),
                    None => Err("the fork is not that of the newest generation, or the group was not there".to_owned()),
                    Some(fork) if fork.generation != g.position.generation => {
                        Err(format!("the new primary began with {fork}, before this side's first run"))
                    }
                    Some(fork) if fork.lsn < diverged.acked && !Mutant::FailbackBelowAcked.on() => Err(format!(
                        "the new primary began with {fork}, and had acknowledged {}: it was restored from an old copy",
                        diverged.acked
                    )),
                    // Nil: it was promoted by a version that did not keep it.
                    Some(_) if met.is_nil() || Mutant::TakeOldCopy.on() => Ok(()),
                    Some(fork) => {
                        let old = |why| format!("this side was restored from an old copy: {why}");
                        lives.check(met, fork.lsn).map_err(old)
                    }
                };
                DivergedGroup { group: g.id, exact, volumes: g.volumes.clone() }
            });
            found.collect()
        })
    }

    /// Ends the session, and takes no other: the role is about to change.
    pub fn close(&mut self) {
        (self.session, self.closed) = (None, true);
    }

    /// The role did not change.
    pub fn reopen(&mut self) {
        self.closed = false;
    }

    /// A frame of the stream.
    ///
    /// # Errors
    /// See [`FrameRefusal`]: after `Busy` the same frame is to be offered again, after any other the session is to be
    /// ended.
    pub fn on_record(&mut self, session: Uid, ship: u64, record: &Record) -> Result<(), FrameRefusal> {
        let Some(open) = self.session.as_mut().filter(|s| s.id == session || Mutant::NoSessionFence.on()) else {
            return Err(FrameRefusal::OldSession(session));
        };
        if ship != open.next_ship && !Mutant::NoSessionFence.on() && !Mutant::NoPositionChain.on() {
            return Err(FrameRefusal::Gap { got: ship, expected: open.next_ship });
        }
        if record.position.generation != open.generation {
            return Err(FrameRefusal::Generation(record.position));
        }
        if let Op::Control(Control::CreateVolume { spec, .. }) = &record.op {
            self.let_go_of_clashes(record.group, std::slice::from_ref(spec)).map_err(|error| match error {
                ModeError::Submit(error) => FrameRefusal::Store(error),
                error => unreachable!("a run that was begun is committed: {error}"),
            })?;
        }
        let Some(open) = &mut self.session else { return Err(FrameRefusal::OldSession(session)) };
        let lsn = match accept(&self.store, open, record, &*self.gives_way)? {
            Some(lsn) => lsn,
            // A duplicate or a refused record: nothing of it is to become durable, but what came before is.
            None => Lsn(self.store.next_lsn().0 - 1),
        };
        open.next_ship = ship + 1;
        open.pending.push_back((ship, lsn));
        Ok(())
    }

    /// What may be answered now that this node's journal is durable up to `durable`.
    pub fn poll_answer(&mut self, durable: Lsn) -> Option<(Uid, Answer)> {
        let session = self.session.as_mut()?;
        let ship = session.advance(durable);
        Some((session.id, Answer { ship, refusals: session.take_refusals() }))
    }

    /// The newest ship number that may be answered; refusals are left for [`Receiver::poll_answer`].
    pub fn poll_answered(&mut self, durable: Lsn) -> u64 {
        self.session.as_mut().map_or(0, |session| session.advance(durable))
    }

    /// The open session.
    #[must_use]
    pub fn session(&self) -> Option<Uid> {
        self.session.as_ref().map(|s| s.id)
    }

    /// Groups refused in the open session.
    #[must_use]
    pub fn refused(&self) -> Vec<Refusal> {
        self.session.as_ref().map(|s| s.refused.values().cloned().collect()).unwrap_or_default()
    }

    /// The stream of `session` has ended.
    pub fn on_detached(&mut self, session: Uid) {
        if self.session.as_ref().is_some_and(|s| s.id == session) {
            self.session = None;
        }
    }
}

/// The batches of a run that are taken: those of the newest answer to `Snapshot`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Opening {
    pub group: GroupId,
    pub run: u64,
    pub number: u64,
    pub next_batch: u64,
    /// Extents of that batch that are written.
    pub extents: usize,
}

impl Session {
    pub(crate) fn open(&mut self, group: GroupId, run: u64) -> u64 {
        self.openings += 1;
        self.opening = Some(Opening { group, run, number: self.openings, next_batch: 1, extents: 0 });
        self.openings
    }

    fn advance(&mut self, durable: Lsn) -> u64 {
        while self.pending.front().is_some_and(|(_, lsn)| *lsn <= durable)
            && let Some((ship, _)) = self.pending.pop_front()
        {
            self.answered = ship;
        }
        self.answered
    }

    /// A run brings the group on.
    pub(crate) fn forget_refusal(&mut self, group: GroupId) {
        if self.refused.remove(&group).is_some() {
            self.refusals_answered = self.refusals_answered.saturating_sub(1);
        }
    }

    fn take_refusals(&mut self) -> Vec<Refusal> {
        if self.refused.len() == self.refusals_answered {
            return Vec::new();
        }
        self.refusals_answered = self.refused.len();
        self.refused.values().cloned().collect()
    }
}

/// `None` for a record that is not stored: a duplicate, or of a group that is refused.
fn accept(
    store: &Arc<Store>,
    session: &mut Session,
    record: &Record,
    gives_way: &dyn Fn() -> bool,
) -> Result<Option<Lsn>, FrameRefusal> {
    let (group, position) = (record.group, record.position);
    if session.refused.contains_key(&group) {
        return Ok(None);
    }
    if let Op::Write { crcs, data: WriteData::Inline(data), block_size, .. } = &record.op {
        record::check_blocks(data, *block_size, crcs)
            .map_err(|source| FrameRefusal::Damaged { lsn: position.lsn, source })?;
    }
    let (held, gone, cut) = store.with_state(|state| {
        let known = state.groups.get(&group);
        let cut = known.and_then(|g| g.run.as_ref()).map(|run| run.cut);
        let newest = |g: &GroupState| {
            if Mutant::LanePositionOfGroup.on() { g.position } else { g.lanes.of(record.lane) }
        };
        (known.map(newest), state.is_gone(group), cut)
    });
    if let Some(cut) = cut
        && !Mutant::StreamDuringRun.on()
    {
        // What was on its way at the switch: the run carries it.
        if position <= cut {
            return Ok(None);
        }
        return Err(FrameRefusal::InRun { group, cut: cut.lsn, lsn: position.lsn });
    }
    if !Mutant::NoPositionChain.on() {
        match held {
            Some(held) if position <= held => return Ok(None),
            None if gone => return Ok(None),
            _ => {}
        }
        let ours = held.map_or(Lsn::ZERO, |h| h.lsn);
        if record.previous != ours {
            let (lane, previous, lsn) = (record.lane, record.previous, position.lsn);
            return Err(FrameRefusal::Chain { group, lane, ours, previous, lsn });
        }
    }
    let volume = volume_of(&record.op);
    let refuse = |session: &mut Session, cause: &'static str, message: String| {
        session.refused.insert(group, Refusal { group, volume, position, cause, message });
        Ok(None)
    };
    if let Op::Control(Control::CreateVolume { spec, .. }) = &record.op {
        let ours = store.config().pool.segment_bytes;
        if spec.segment_bytes != ours {
            let message =
                format!("volume {} has segments of {} bytes, this pool {ours}", spec.name, spec.segment_bytes);
            return refuse(session, "segment_size", message);
        }
    }
    let awaited = |wanted: &Uid| *wanted == session.id && position.lsn > session.verified;
    let submitted = if matches!(&record.op, Op::Control(Control::VerifySnapshot { session, .. }) if awaited(session)) {
        store.submit_snapshot(record.clone()).map(|snapshot| {
            let lsn = snapshot.ready_at();
            session.verify = Some(Arc::new(snapshot));
            lsn
        })
    } else {
        store.submit_replica(record.clone()).map(|submitted| submitted.lsn)
    };
    match submitted {
        Ok(lsn) => Ok(Some(lsn)),
        // The snapshot of a comparison gives way.
        Err(SubmitError::Space(no_space))
            if session.verify.take().is_some() || gives_way() || store.room_may_come(&no_space) =>
        {
            store.request_checkpoint();
            store.request_growth();
            Err(FrameRefusal::Busy(SubmitError::Space(no_space)))
        }
        Err(error @ SubmitError::StagingFull { .. }) => {
            store.request_trim();
            Err(FrameRefusal::Busy(error))
        }
        Err(SubmitError::Space(no_space)) => refuse(session, "space", no_space.to_string()),
        Err(error @ (SubmitError::NoVolume(_) | SubmitError::OutOfRange { .. } | SubmitError::Shape { .. })) => {
            refuse(session, "unsupported", error.to_string())
        }
        Err(error @ SubmitError::TooLarge { .. }) => refuse(session, "unsupported", error.to_string()),
        Err(error) => Err(FrameRefusal::Store(error)),
    }
}

fn volume_of(op: &Op) -> VolumeId {
    match op {
        Op::Write { volume, .. } => *volume,
        Op::Zero(range) => range.volume,
        Op::Control(Control::CreateVolume { spec, .. }) => spec.id,
        Op::Control(
            Control::ResizeVolume { volume, .. }
            | Control::DeleteVolume { volume }
            | Control::SetAckRule { volume, .. },
        ) => *volume,
        Op::Control(_) => VolumeId::default(),
    }
}
