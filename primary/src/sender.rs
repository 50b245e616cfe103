//! The sending half of a session, as a state machine: which record goes next, and what an answer releases.
//!
//! No clock and no socket: times come in as arguments, frames go out as values. The driver is `link.rs`.
//!
//! Invariants:
//! - Only records that are durable here are shipped, in the order of their LSNs, with dense ship numbers.
//! - A record is released by the ship number that the backup answered for *it*; an answer never covers records that
//!   were held (cumulative LSNs would).
//! - At most `window_bytes` are in flight; whatever a lost session had in flight is what the next one may repeat.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use thiserror::Error;
use understudy_common::{
    journal::ReadError,
    mutant::Mutant,
    store::{ReadFailure, Spill, Store},
    types::{GroupId, Lsn, Position, Uid},
};
use understudy_proto::{convert, v1};

/// Bytes a record is taken for beside its payload.
const RECORD_BYTES: usize = 256;

/// The backup's half of an attach.
#[derive(Debug, Clone)]
pub struct Welcome {
    /// Carried by every frame.
    pub session: Uid,
    /// What the backup holds durably.
    pub positions: BTreeMap<GroupId, Position>,
}

/// Why a session cannot go on.
#[derive(Debug, Error)]
pub enum SendError {
    /// The backup lacks records that it had acknowledged.
    #[error(
        "the backup holds group {group} up to {backup}, but had acknowledged it up to {acked}: it was emptied, replaced or restored from an old copy, and needs a full synchronisation"
    )]
    BackupLost {
        /// The group.
        group: GroupId,
        /// What it holds.
        backup: Lsn,
        /// What it had acknowledged.
        acked: Lsn,
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
    lsn: Lsn,
    payload_bytes: u64,
    weight: usize,
    sent_at: Duration,
}

struct Session {
    id: Bytes,
    next_ship: u64,
    cursor: Lsn,
    positions: BTreeMap<GroupId, Lsn>,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: usize,
    /// Groups the backup refuses, with its words.
    held: BTreeMap<GroupId, Held>,
    spill: Option<Spill>,
}

/// A group the backup refuses in this session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The first record it refused.
    pub from: Lsn,
    /// "space", "segment_size", "unsupported".
    pub cause: String,
    /// For people.
    pub message: String,
}

/// See the module.
pub struct Sender {
    store: Arc<Store>,
    window_bytes: usize,
    session: Option<Session>,
}

impl Sender {
    /// A sender without a session.
    #[must_use]
    pub fn new(store: Arc<Store>, window_bytes: usize) -> Self {
        Self { store, window_bytes, session: None }
    }

    /// The backup accepted a session. What it holds already is released, and not sent again.
    ///
    /// # Errors
    /// If it holds less than it had acknowledged.
    pub fn on_attached(&mut self, welcome: &Welcome) -> Result<(), SendError> {
        self.session = None;
        let mut positions: BTreeMap<GroupId, Lsn> = welcome.positions.iter().map(|(g, p)| (*g, p.lsn)).collect();
        for (group, retained) in self.store.retained().groups() {
            let backup = positions.get(&group).copied().unwrap_or(Lsn::ZERO);
            let live = self.store.with_state(|s| s.groups.contains_key(&group));
            if !live && !positions.contains_key(&group) && retained.acked > Lsn::ZERO {
                // Deleted here; there as well, and only that answer was lost. An emptied backup does not need it.
                positions.insert(group, retained.last);
                continue;
            }
            if backup < retained.acked && (live || retained.oldest.is_some()) {
                return Err(SendError::BackupLost { group, backup, acked: retained.acked });
            }
        }
        self.session = Some(Session {
            id: Bytes::copy_from_slice(&welcome.session.0),
            next_ship: 1,
            cursor: self.store.ship_from(),
            positions,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            held: BTreeMap::new(),
            spill: None,
        });
        Ok(())
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
        let entries = self.store.records_from(session.cursor, room, &mut session.spill)?;
        let mut frames = Vec::with_capacity(entries.len());
        for entry in entries {
            session.cursor = entry.lsn.next();
            let (group, lsn) = (entry.record.group, entry.lsn);
            if session.held.contains_key(&group) {
                continue;
            }
            if session.positions.get(&group).is_some_and(|held| lsn <= *held) {
                self.store.release(group, lsn, entry.record.payload_bytes());
                continue;
            }
            let data = self.store.payload(&entry).map_err(|source| SendError::Payload { lsn, source })?;
            let weight = data.len() + RECORD_BYTES;
            let Some(frame) = convert::record_to_wire(&session.id, session.next_ship, &entry.record, data) else {
                continue;
            };
            session.in_flight.push_back(InFlight {
                ship: session.next_ship,
                group,
                lsn,
                payload_bytes: entry.record.payload_bytes(),
                weight,
                sent_at: now,
            });
            session.in_flight_bytes += weight;
            session.next_ship += 1;
            frames.push(frame);
        }
        Ok(frames)
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
            let held = Held {
                from: Lsn(refusal.position.unwrap_or_default().lsn),
                cause: refusal.cause.clone(),
                message: refusal.message.clone(),
            };
            session.held.entry(GroupId(refusal.group_id)).or_insert(held);
        }
        // One release per group and answer, not per record.
        let mut released: BTreeMap<GroupId, (Lsn, u64)> = BTreeMap::new();
        let mut newest = Lsn::ZERO;
        while session.in_flight.front().is_some_and(|f| f.ship <= ack.ship)
            && let Some(done) = session.in_flight.pop_front()
        {
            session.in_flight_bytes -= done.weight;
            newest = done.lsn;
            if session.held.get(&done.group).is_some_and(|held| done.lsn >= held.from) {
                continue;
            }
            let (lsn, bytes) = released.entry(done.group).or_default();
            (*lsn, *bytes) = (done.lsn, *bytes + done.payload_bytes);
        }
        if Mutant::CumulativeLsnAck.on() {
            for group in session.held.keys() {
                released.insert(*group, (newest, 0));
            }
        }
        for (group, (lsn, bytes)) in released {
            self.store.release(group, lsn, bytes);
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

    /// Behind the newest record that was looked at: 0 without a session.
    #[must_use]
    pub fn cursor(&self) -> Lsn {
        self.session.as_ref().map_or(Lsn::ZERO, |s| s.cursor)
    }

    /// Groups the backup refuses, with its words.
    #[must_use]
    pub fn held(&self) -> BTreeMap<GroupId, Held> {
        self.session.as_ref().map(|s| s.held.clone()).unwrap_or_default()
    }
}
