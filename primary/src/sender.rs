//! The sending half of a session, as a state machine: which record goes next, and what an answer releases.
//!
//! No clock and no socket: times come in as arguments, frames go out as values. The driver is `link.rs`.
//!
//! Invariants:
//! - Only records that are durable here are shipped, those of a lane in the order of their LSNs, with dense ship numbers.
//! - A record is shipped when those of other lanes that it must not overtake were ([`crate::schedule`]).
//! - A record is released by the ship number that the backup answered for *it*; an answer never covers records that
//!   were held (cumulative LSNs would).
//! - At most `window_bytes` are in flight; whatever a lost session had in flight is what the next one may repeat.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use thiserror::Error;
use understudy_common::{
    journal::ReadError,
    lane::LANES_MAX,
    mutant::Mutant,
    state::{GroupMode, GroupState, LanePlaces, Place},
    store::{Entry, LaneRetained, ModeError, ReadFailure, Released, Spill, Store, SubmitError},
    types::{GroupId, Lsn, Position, Uid, VolumeId},
};
use understudy_proto::{convert, v1};

use crate::schedule::{Head, Next, Schedule};

/// Bytes a record is taken for beside its payload.
const RECORD_BYTES: usize = 256;
/// Looks into the journal for records of a lane, at one poll.
const FETCHES_MAX: usize = 64;

/// The backup's half of an attach.
#[derive(Debug, Clone)]
pub struct Welcome {
    /// Carried by every frame.
    pub session: Uid,
    /// The backup's data directory.
    pub instance: Uid,
    /// What the backup holds durably of each lane.
    pub positions: BTreeMap<GroupId, LanePlaces>,
    /// Groups that hold no image, or are in a run.
    pub unfinished: BTreeSet<GroupId>,
    /// Groups with changes of their own, which are not in `positions`: `None` if all of them are marked here by now, so
    /// that the group counts as at the fork; otherwise why not.
    pub diverged: BTreeMap<GroupId, Option<String>>,
}

impl Welcome {
    /// What the backup holds of each lane, in LSNs of this generation: nothing of what is of another one counts. A run
    /// brings all lanes of a group into one generation.
    fn held(&self, generation: u64, fork: Lsn) -> BTreeMap<GroupId, LanePlaces> {
        let newest =
            |places: &LanePlaces| places.own().map(|(_, p)| p).chain([places.base()]).map(|p| p.position).max();
        let ours = |places: &LanePlaces| newest(places).is_some_and(|p| p.generation == generation);
        let of_ours = self.positions.iter().filter(|(_, places)| ours(places)).map(|(g, places)| (*g, places.clone()));
        let at_fork = || {
            let position = Position { generation, lsn: fork };
            LanePlaces::all(Place { position, time_unix_ms: 0 })
        };
        let merged = self.diverged.iter().filter(|(_, why)| why.is_none());
        of_ours.chain(merged.map(|(g, _)| (*g, at_fork()))).collect()
    }
}

/// A group that needs a full run: nothing that the backup holds of it can be built upon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// The group.
    pub group: GroupId,
    /// For people.
    pub why: String,
}

/// Why a session cannot go on.
#[derive(Debug, Error)]
pub enum SendError {
    /// The store refuses to note that groups need a full run.
    #[error("{0}")]
    Mode(#[from] ModeError),
    /// The store refuses to note which backup it is.
    #[error("{0}")]
    Submit(#[from] SubmitError),
    /// The backup is behind what it had acknowledged of a group that was deleted since: the next session tells it.
    #[error("group {group} was deleted, and the backup has an older copy of it, or none: attaching again")]
    Gone {
        /// The group.
        group: GroupId,
    },
    /// The journal cannot be read.
    #[error("journal: {0}")]
    Journal(#[from] ReadError),
    /// A payload cannot be read.
    #[error("record {lsn}: {source}")]
    Payload {
        /// Its place.
        lsn: Lsn,
        /// What happened.
        source: ReadFailure,
    },
    /// The backup answered for records that were not sent.
    #[error("the backup acknowledged ship number {got}, but only {sent} were sent")]
    Answer {
        /// Its number.
        got: u64,
        /// Ours.
        sent: u64,
    },
}

struct InFlight {
    ship: u64,
    group: GroupId,
    lane: u8,
    released: Released,
    payload_bytes: u64,
    weight: usize,
    sent_at: Duration,
}

struct Session {
    id: Bytes,
    next_ship: u64,
    /// What the backup held at the start.
    positions: BTreeMap<GroupId, LanePlaces>,
    /// The newest record of each lane that was shipped.
    shipped: BTreeMap<(GroupId, u8), Lsn>,
    /// Where the group's continuous mode began, when it was looked at last.
    from: BTreeMap<GroupId, Lsn>,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: usize,
    /// Groups the backup refuses, with its words.
    held: BTreeMap<GroupId, Held>,
    spills: [Option<Spill>; LANES_MAX],
    /// Records of groups up to here are marks.
    marks: BTreeMap<GroupId, Lsn>,
    /// The last poll ended before it had found all that it may send.
    interrupted: bool,
}

/// A group the backup refuses in this session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Ship number of the first record it refused.
    pub from: u64,
    /// "space", "segment_size", "unsupported".
    pub cause: String,
    /// For people.
    pub message: String,
}

impl Session {
    /// A group that came back from delta mode is shipped from the cut of its last run on; one that left continuous mode
    /// is not held any more. Where to begin again, if a group came back.
    fn look_at_modes(&mut self, store: &Store) -> Option<Lsn> {
        let (mut back, mut gone) = (None, Vec::new());
        store.with_state(|state| {
            for group in state.groups.values() {
                match group.mode {
                    GroupMode::Continuous { from } => {
                        if self.from.insert(group.id, from).is_some_and(|before| before != from) {
                            back = Some(from.min(back.unwrap_or(from)));
                        }
                    }
                    GroupMode::Delta { .. } => {
                        self.from.insert(group.id, Lsn::MAX);
                        self.held.remove(&group.id);
                    }
                }
            }
            // One that is gone with its last volume may have left records behind the cut of its last run.
            gone.extend(self.from.extract_if(.., |id, from| *from == Lsn::MAX && !state.groups.contains_key(id)));
        });
        for (group, _) in gone {
            back = [back, store.retained_of(group).oldest()].into_iter().flatten().min();
        }
        back
    }

    /// Up to where the records of each group are marks. To be asked behind a fetch: a switch that is not seen then lies
    /// behind every record that was found.
    fn look_at_marks(&mut self, store: &Store) {
        self.marks = store.with_state(|state| {
            let unshipped = |mode: &GroupMode| match mode {
                GroupMode::Continuous { from } => *from,
                GroupMode::Delta { .. } if Mutant::ShipBeforeCommit.on() => mode.run().map_or(Lsn::MAX, |r| Lsn(r.id)),
                GroupMode::Delta { .. } => Lsn::MAX,
            };
            let all = state.groups.values().map(|g| (g.id, unshipped(&g.mode)));
            all.filter(|(_, from)| *from > Lsn::ZERO).collect()
        });
    }

    /// True for a record that is to be sent in this session.
    fn wants(&self, entry: &Entry) -> bool {
        let (group, lane, lsn) = (entry.record.group, entry.record.lane, entry.lsn);
        let is_mark = self.marks.get(&group).is_some_and(|from| lsn < *from);
        let shipped = || self.shipped.get(&(group, lane)).is_some_and(|shipped| lsn <= *shipped);
        group != GroupId::default() && !is_mark && !self.held.contains_key(&group) && !shipped()
    }

    /// True if the backup held it when the session began.
    fn is_there(&self, entry: &Entry) -> bool {
        let held = self.positions.get(&entry.record.group);
        held.is_some_and(|held| entry.lsn <= held.of(entry.record.lane).lsn)
    }
}

/// See the module.
pub struct Sender {
    store: Arc<Store>,
    window_bytes: usize,
    schedule: Schedule<Arc<Entry>>,
    session: Option<Session>,
    /// Groups of a diverged backup whose differences are marked here. The marks outlive a session, and a run that
    /// carries them is not to find them marked again.
    merged: BTreeSet<(Uid, GroupId)>,
}

impl Sender {
    /// A sender without a session.
    #[must_use]
    pub fn new(store: Arc<Store>, window_bytes: usize) -> Self {
        let schedule = Schedule::new(&store.config().lanes);
        Self { store, window_bytes, schedule, session: None, merged: BTreeSet::new() }
    }

    /// At most so many bytes are in flight from now on.
    pub fn set_window(&mut self, bytes: usize) {
        self.window_bytes = bytes;
    }

    /// A diverged backup can say where a group differs; false if that is marked here already.
    #[must_use]
    pub fn begins_merge(&self, instance: Uid, group: GroupId) -> bool {
        !self.merged.contains(&(instance, group)) && !Mutant::FailbackWithoutReport.on()
    }

    /// Marks blocks in which it differs. Those of a volume that is gone here go there as well.
    pub fn merge(&self, group: GroupId, volume: VolumeId, runs: &[(u64, u64)]) {
        self.store.mark_diverged(group, volume, runs);
    }

    /// It has said everything, and has these volumes: of what it had deleted by itself it lacks all.
    pub fn merged(&mut self, instance: Uid, group: GroupId, there: &BTreeSet<VolumeId>) {
        let volumes: Vec<_> =
            self.store.with_state(|s| s.volumes_of(group).map(|spec| (spec.id, spec.block_count())).collect());
        for (volume, count) in volumes.into_iter().filter(|(volume, _)| !there.contains(volume)) {
            self.store.mark_diverged(group, volume, &[(0, count)]);
        }
        self.merged.insert((instance, group));
    }

    /// The backup accepted a session. What it holds already is released, and not sent again. Groups of which it does not
    /// hold what it had acknowledged are in delta mode, with every block marked, when this returns.
    ///
    /// # Errors
    /// If the store refuses to note that.
    pub fn on_attached(&mut self, welcome: &Welcome, time_unix_ms: i64) -> Result<Vec<Lost>, SendError> {
        self.session = None;
        let fork = self.store.with_state(|state| state.promoted_at);
        let mut positions = welcome.held(self.store.identity().generation, fork);
        for (group, retained) in self.store.retained().groups() {
            if self.store.with_state(|s| s.groups.contains_key(&group)) {
                continue;
            }
            let backup = positions.get(&group);
            if retained.lanes().all(|(lane, of)| backup.map_or(Lsn::ZERO, |b| b.of(lane).lsn) >= of.acked) {
                continue;
            }
            // Not before it is sure here that it ends: a crash could bring it back.
            let ends = retained.last <= self.store.marks().borrow().durable;
            match backup {
                // There as well, and only that answer was lost. An emptied backup does not need it.
                None if ends => {
                    let position = Position { generation: 0, lsn: retained.last };
                    positions.insert(group, LanePlaces::all(Place { position, time_unix_ms: 0 }));
                }
                // What leads from there to its end was let go. The next hello does not name it, and the backup lets go
                // of it as a whole.
                Some(_) if ends => {
                    for (lane, of) in retained.lanes() {
                        self.store.release(group, lane, retained.last, of.bytes, &[]);
                    }
                    return Err(SendError::Gone { group });
                }
                _ => return Err(SendError::Gone { group }),
            }
        }
        let lost = self.find_lost(welcome, &positions);
        for Lost { group, .. } in &lost {
            if let Some(run) = self.store.run_of(*group) {
                self.store.abort_run(*group, run.id, time_unix_ms)?;
            }
            self.store.switch(*group, "initial", true, time_unix_ms)?;
        }
        if self.store.with_state(|state| state.backup) != welcome.instance {
            // Behind the marks: who finds it in the journal finds them as well.
            self.store.bind(welcome.instance, time_unix_ms)?;
        }
        self.schedule.restart(self.store.ship_from());
        self.session = Some(Session {
            id: Bytes::copy_from_slice(&welcome.session.0),
            next_ship: 1,
            positions,
            shipped: BTreeMap::new(),
            from: BTreeMap::new(),
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            held: BTreeMap::new(),
            spills: Default::default(),
            marks: BTreeMap::new(),
            interrupted: false,
        });
        Ok(lost)
    }

    /// Groups that cannot go on from what the backup holds.
    fn find_lost(&self, welcome: &Welcome, positions: &BTreeMap<GroupId, LanePlaces>) -> Vec<Lost> {
        if Mutant::KeepTableForNewBackup.on() {
            return Vec::new();
        }
        let (groups, bound) = self.store.with_state(|state| {
            // A group of which everything is marked already can lose no more, nor can one without volumes; and its run goes
            // on, if that carries as much.
            let settled = |g: &&GroupState| match &g.mode {
                GroupMode::Delta { full: true, run, .. } => run.as_ref().is_none_or(|run| run.everything),
                mode => g.volumes.is_empty() && mode.run().is_none_or(|run| run.specs.is_empty()),
            };
            let groups = state.groups.values().filter(|g| !settled(g));
            let groups = groups.map(|g| (g.id, g.lanes.clone(), g.mode.is_continuous()));
            (groups.collect::<Vec<_>>(), state.backup)
        });
        let other = !bound.is_nil() && bound != welcome.instance;
        let none = LanePlaces::default();
        let why = |(group, newest, continuous): (GroupId, LanePlaces, bool)| {
            let (retained, backup) = (self.store.retained_of(group), positions.get(&group).unwrap_or(&none));
            if other {
                return Some(format!("it is another backup ({}) than the one before", welcome.instance));
            }
            if let Some(Some(why)) = welcome.diverged.get(&group) {
                return Some(format!("the backup was a primary and has changes of its own: {why}"));
            }
            let lanes = || (0..).take(LANES_MAX).map(|lane| (lane, retained.lane(lane), backup.of(lane).lsn));
            if let Some((lane, of, held)) = lanes().find(|(_, of, held)| *held < of.acked) {
                let acked = of.acked;
                return Some(format!(
                    "the backup holds lane {lane} of it up to {held}, but had acknowledged it up to {acked}: it was \
                     emptied, or restored from an old copy"
                ));
            }
            if continuous && welcome.unfinished.contains(&group) {
                return Some("the backup is in a run of it that this primary does not know".to_owned());
            }
            let unkept =
                |(lane, of, held): &(u8, LaneRetained, Lsn)| *held < newest.of(*lane).lsn && of.oldest.is_none();
            let (lane, _, held) = lanes().find(unkept).filter(|_| continuous)?;
            let newest = newest.of(lane).lsn;
            Some(format!(
                "the backup holds lane {lane} of it up to {held}, and what came until {newest} was not kept for it"
            ))
        };
        groups.into_iter().filter_map(|g| Some(Lost { group: g.0, why: why(g)? })).collect()
    }

    /// The session is over. What was in flight stays retained.
    pub fn on_detached(&mut self) {
        self.session = None;
    }

    /// The next frames, up to about `max_bytes` and what the window leaves.
    ///
    /// # Errors
    /// If the journal or the pool cannot give a record back.
    pub fn poll(&mut self, now: Duration, max_bytes: usize) -> Result<Vec<v1::StagedRecord>, SendError> {
        let Some(session) = &mut self.session else { return Ok(Vec::new()) };
        let room = self.window_bytes.saturating_sub(session.in_flight_bytes).min(max_bytes);
        if room == 0 {
            return Ok(Vec::new());
        }
        if let Some(from) = session.look_at_modes(&self.store) {
            self.schedule.rewind(from);
        }
        let durable = self.store.marks().borrow().durable;
        let (spans, next) = self.store.lane_spans();
        self.schedule.on_look(now, &spans, durable, next);
        for (lane, oldest) in self.schedule.paced(&spans) {
            self.schedule.set_over_share(lane, self.store.is_over_share(lane, oldest));
        }
        session.look_at_marks(&self.store);
        self.schedule.retain(|head| session.wants(&head.record));
        let (mut frames, mut taken, mut fetches) = (Vec::new(), 0, 0);
        while taken < room {
            let lane = match self.schedule.next() {
                Next::Send(lane) => lane,
                Next::Fetch(lane) if fetches < FETCHES_MAX => {
                    fetches += 1;
                    let (from, spill) = (self.schedule.cursor(lane), &mut session.spills[usize::from(lane)]);
                    let found = self.store.lane_records(lane, from, room - taken, spill)?;
                    session.look_at_marks(&self.store);
                    let mut heads = Vec::with_capacity(found.records.len());
                    for (record, first) in found.records.into_iter().filter(|(entry, _)| session.wants(entry)) {
                        let lsn = record.lsn;
                        if session.is_there(&record) {
                            let released = Released::of(lsn, &record.record);
                            self.store.release(
                                record.record.group,
                                lane,
                                lsn,
                                record.record.payload_bytes(),
                                &[released],
                            );
                        } else {
                            heads.push(Head { lsn, first, record });
                        }
                    }
                    self.schedule.on_found(lane, heads, found.next);
                    continue;
                }
                Next::Fetch(_) => {
                    session.interrupted = true;
                    return Ok(frames);
                }
                Next::Wait => break,
            };
            let Some(Head { record: entry, .. }) = self.schedule.take(lane) else { break };
            let (group, lsn, payload_bytes) = (entry.record.group, entry.lsn, entry.record.payload_bytes());
            let released = Released::of(lsn, &entry.record);
            let data = self.store.payload(&entry).map_err(|source| SendError::Payload { lsn, source })?;
            let weight = data.len() + RECORD_BYTES;
            let Some(frame) = convert::record_to_wire(&session.id, session.next_ship, &entry.record, data) else {
                continue;
            };
            session.shipped.insert((group, lane), lsn);
            let (ship, sent_at) = (session.next_ship, now);
            session.in_flight.push_back(InFlight { ship, group, lane, released, payload_bytes, weight, sent_at });
            session.in_flight_bytes += weight;
            session.next_ship += 1;
            taken += weight;
            frames.push(frame);
        }
        session.interrupted = false;
        Ok(frames)
    }

    /// True if the last poll has not looked at all that may be sent.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.interrupted)
    }

    /// When a paced lane may go on; `None` if none waits for its turn.
    #[must_use]
    pub fn due(&self) -> Option<Duration> {
        // A full window waits for answers, not for the clock.
        let open = self.session.as_ref().filter(|session| session.in_flight_bytes < self.window_bytes);
        open.and_then(|_| self.schedule.due())
    }

    /// An answer of the backup. Answers of another session are ignored.
    ///
    /// # Errors
    /// If it answers for what was not sent.
    pub fn on_ack(&mut self, ack: &v1::StagedAck) -> Result<(), SendError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        if ack.session != session.id {
            return Ok(());
        }
        if ack.ship >= session.next_ship {
            return Err(SendError::Answer { got: ack.ship, sent: session.next_ship - 1 });
        }
        for refusal in &ack.refusals {
            // What was sent behind it was refused, too: LSNs say nothing of that where lanes overtake.
            let (group, lsn) = (GroupId(refusal.group_id), Lsn(refusal.position.unwrap_or_default().lsn));
            let refused = session.in_flight.iter().find(|f| f.group == group && f.released.lsn == lsn);
            let held = Held {
                from: refused.map_or(0, |f| f.ship),
                cause: refusal.cause.clone(),
                message: refusal.message.clone(),
            };
            session.held.entry(group).or_insert(held);
        }
        // One release per lane of a group and answer, not per record.
        let mut released: BTreeMap<(GroupId, u8), (Lsn, u64, Vec<Released>)> = BTreeMap::new();
        let mut newest = Lsn::ZERO;
        while session.in_flight.front().is_some_and(|f| f.ship <= ack.ship)
            && let Some(done) = session.in_flight.pop_front()
        {
            session.in_flight_bytes -= done.weight;
            newest = done.released.lsn;
            if session.held.get(&done.group).is_some_and(|held| done.ship >= held.from) {
                continue;
            }
            let (lsn, bytes, records) = released.entry((done.group, done.lane)).or_default();
            (*lsn, *bytes) = (newest, *bytes + done.payload_bytes);
            records.push(done.released);
        }
        if Mutant::CumulativeLsnAck.on() {
            for group in session.held.keys() {
                released.insert((*group, 0), (newest, 0, Vec::new()));
            }
        }
        for ((group, lane), (lsn, bytes, records)) in released {
            self.store.release(group, lane, lsn, bytes, &records);
        }
        Ok(())
    }

    /// When the oldest unanswered record was sent.
    #[must_use]
    pub fn oldest_sent_at(&self) -> Option<Duration> {
        self.session.as_ref()?.in_flight.front().map(|f| f.sent_at)
    }

    /// Records sent and not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.session.as_ref().map_or(0, |s| s.in_flight.len())
    }

    /// True if a session is open.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.session.is_some()
    }

    /// Behind the newest record of which every one before it was sent: 0 without a session.
    #[must_use]
    pub fn cursor(&self) -> Lsn {
        self.session.as_ref().map_or(Lsn::ZERO, |_| self.schedule.sent_upto().unwrap_or_else(|| self.store.next_lsn()))
    }

    /// Groups the backup refuses, with its words.
    #[must_use]
    pub fn held(&self) -> BTreeMap<GroupId, Held> {
        self.session.as_ref().map(|s| s.held.clone()).unwrap_or_default()
    }
}
