//! The receiving half of a session, as a state machine over the store: what is accepted, and what may be answered.
//!
//! No clock and no socket. Invariants:
//! - A frame of another session than the open one changes nothing.
//! - Within a session ship numbers are dense; within a group each record names the one before it. A gap ends the
//!   session; a record at or below what the group holds is a duplicate and only counted.
//! - A ship number is answered when every record up to it is durable here, or refused by name.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use thiserror::Error;
use understudy_common::{
    mutant::Mutant,
    record::{self, Control, DecodeError, Op, Record, WriteData},
    store::{Store, SubmitError},
    types::{GroupId, Lsn, Position, Uid, VolumeId},
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
    #[error("the primary's generation {theirs} is older than {ours}: another primary has taken over")]
    OldGeneration {
        /// Of the backup.
        ours: u64,
        /// Of the primary.
        theirs: u64,
    },
    /// Two primaries of one generation, or a number that cannot be.
    #[error("generation {generation} of the primary is not the one this backup knows: the pair has split")]
    Fork {
        /// Its number.
        generation: u64,
    },
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
        "this backup holds group {group} up to {ours}, the primary's journal ends at {theirs}: the primary was restored from an old copy"
    )]
    Ahead {
        /// The group.
        group: GroupId,
        /// Of the backup.
        ours: Lsn,
        /// Of the primary.
        theirs: Lsn,
    },
    /// The store.
    #[error("{0}")]
    Store(String),
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
    #[error("group {group} is at {ours}, but record {lsn} follows {previous}: a record was lost")]
    Chain {
        /// The group.
        group: GroupId,
        /// What it holds.
        ours: Lsn,
        /// What the record follows.
        previous: Lsn,
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

struct Session {
    id: Uid,
    generation: u64,
    next_ship: u64,
    /// Ship numbers that wait for an LSN of this node to be durable.
    pending: VecDeque<(u64, Lsn)>,
    answered: u64,
    refused: BTreeMap<GroupId, Refusal>,
    refusals_answered: usize,
}

/// See the module.
pub struct Receiver {
    store: Arc<Store>,
    session: Option<Session>,
}

impl Receiver {
    /// A receiver without a session.
    #[must_use]
    pub fn new(store: Arc<Store>) -> Self {
        Self { store, session: None }
    }

    /// Opens session `id`, ending the one before. The positions may be told to the primary once this node is durable
    /// up to the LSN beside them: it releases what they cover.
    ///
    /// # Errors
    /// See [`AttachRefusal`].
    pub fn attach(&mut self, hello: &Hello, id: Uid) -> Result<(BTreeMap<GroupId, Position>, Lsn), AttachRefusal> {
        let ours = self.store.identity();
        if hello.protocol != PROTOCOL {
            return Err(AttachRefusal::Protocol { theirs: hello.protocol });
        }
        let fresh = ours.pair.is_nil();
        if !fresh && ours.pair != hello.pair || hello.pair.is_nil() {
            return Err(AttachRefusal::ForeignPair { ours: ours.pair, theirs: hello.pair });
        }
        if hello.generation < ours.generation {
            return Err(AttachRefusal::OldGeneration { ours: ours.generation, theirs: hello.generation });
        }
        let same = hello.generation == ours.generation && hello.generation_id == ours.generation_id;
        let next =
            fresh || hello.generation > ours.generation && hello.generation - ours.generation <= GENERATION_STEP_MAX;
        if !same && !next {
            return Err(AttachRefusal::Fork { generation: hello.generation });
        }
        let segment_bytes = self.store.config().pool.segment_bytes;
        if hello.segment_bytes != segment_bytes {
            return Err(AttachRefusal::SegmentSize { ours: segment_bytes, theirs: hello.segment_bytes });
        }
        let held = self.positions();
        for (group, position) in &held {
            if position.generation == hello.generation && position.lsn > hello.durable {
                return Err(AttachRefusal::Ahead { group: *group, ours: position.lsn, theirs: hello.durable });
            }
        }
        if !same {
            self.store
                .set_identity(|identity| {
                    identity.pair = hello.pair;
                    identity.generation = hello.generation;
                    identity.generation_id = hello.generation_id;
                })
                .map_err(|error| AttachRefusal::Store(error.to_string()))?;
        }
        self.session = Some(Session {
            id,
            generation: hello.generation,
            next_ship: 1,
            pending: VecDeque::new(),
            answered: 0,
            refused: BTreeMap::new(),
            refusals_answered: 0,
        });
        Ok((held, Lsn(self.store.next_lsn().0 - 1)))
    }

    /// The newest record of each group here; some may not be durable yet.
    fn positions(&self) -> BTreeMap<GroupId, Position> {
        self.store.with_state(|state| state.groups.iter().map(|(id, g)| (*id, g.position)).collect())
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
        let lsn = match accept(&self.store, open, record)? {
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

impl Session {
    fn advance(&mut self, durable: Lsn) -> u64 {
        while self.pending.front().is_some_and(|(_, lsn)| *lsn <= durable)
            && let Some((ship, _)) = self.pending.pop_front()
        {
            self.answered = ship;
        }
        self.answered
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
fn accept(store: &Store, session: &mut Session, record: &Record) -> Result<Option<Lsn>, FrameRefusal> {
    let (group, position) = (record.group, record.position);
    if session.refused.contains_key(&group) {
        return Ok(None);
    }
    if let Op::Write { crcs, data: WriteData::Inline(data), block_size, .. } = &record.op {
        record::check_blocks(data, *block_size, crcs)
            .map_err(|source| FrameRefusal::Damaged { lsn: position.lsn, source })?;
    }
    let (held, gone) =
        store.with_state(|state| (state.groups.get(&group).map(|g| g.position), group <= state.last_group));
    if !Mutant::NoPositionChain.on() {
        match held {
            Some(held) if position <= held => return Ok(None),
            None if gone => return Ok(None),
            _ => {}
        }
        let ours = held.map_or(Lsn::ZERO, |h| h.lsn);
        if record.previous != ours {
            return Err(FrameRefusal::Chain { group, ours, previous: record.previous, lsn: position.lsn });
        }
    }
    let volume = volume_of(&record.op);
    let refuse = |session: &mut Session, cause: &'static str, message: String| {
        session.refused.insert(group, Refusal { group, volume, position, cause, message });
        Ok(None)
    };
    if let Op::Control(Control::CreateVolume { spec }) = &record.op {
        let ours = store.config().pool.segment_bytes;
        if spec.segment_bytes != ours {
            let message =
                format!("volume {} has segments of {} bytes, this pool {ours}", spec.name, spec.segment_bytes);
            return refuse(session, "segment_size", message);
        }
    }
    match store.submit_replica(record.clone()) {
        Ok(submitted) => Ok(Some(submitted.lsn)),
        // Reserved space counts: most overwrites give their reservation back when they are in their place.
        Err(SubmitError::Space(no_space))
            if no_space.quarantined > 0 || no_space.can_grow > 0 || no_space.reserved > 0 =>
        {
            store.request_checkpoint();
            store.request_growth();
            Err(FrameRefusal::Busy(SubmitError::Space(no_space)))
        }
        Err(error @ SubmitError::StagingFull { .. }) => {
            store.request_checkpoint();
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
        Op::Control(Control::CreateVolume { spec }) => spec.id,
        Op::Control(
            Control::ResizeVolume { volume, .. }
            | Control::DeleteVolume { volume }
            | Control::SetAckRule { volume, .. },
        ) => *volume,
        Op::Control(Control::CreateSnapshot { .. } | Control::DeleteSnapshot { .. } | Control::RollBack { .. }) => {
            VolumeId::default()
        }
    }
}
