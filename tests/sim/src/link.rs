//! The network between the sender and the receiver, and both ends of a session.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::atomic::Ordering,
    time::Duration,
};

use bytes::Bytes;
use rand::Rng;
use understudy_backup::receiver::FrameRefusal;
use understudy_common::{
    lives::Lives,
    store::{ModeError, SubmitError},
    types::Uid,
};
use understudy_primary::sender::{SendError, Sender, Welcome};
use understudy_proto::{convert, v1};

use super::{Outcome, World, broken, hello, trace};

/// Frames and answers of one connection.
pub(super) struct Wire {
    session: Uid,
    frames: VecDeque<v1::StagedRecord>,
    answers: VecDeque<v1::StagedAck>,
    /// The newest ship number in an answer.
    answered: u64,
    /// The connection is gone; its frames may still arrive.
    old: bool,
    /// A frame was lost: the receiver must notice.
    lossy: bool,
}

impl World {
    pub(super) fn turn_link(&mut self) -> Outcome {
        if !self.link {
            self.deliver_late();
            return Ok(());
        }
        if self.attaching.is_some() {
            return self.finish_attach();
        }
        if !self.sender.as_ref().is_some_and(Sender::is_attached) {
            return self.attach();
        }
        match self.rng.random_range(0..10) {
            0..4 => self.send()?,
            4..7 => self.deliver_frame()?,
            7..9 => self.answer()?,
            _ => {
                self.deliver_late();
                // A group that was refused is tried again in a new session, when the others have had their turn.
                if self.rng.random_bool(0.2) && self.sender.as_ref().is_some_and(|s| !s.held().is_empty()) {
                    self.reconnect();
                }
            }
        }
        Ok(())
    }

    fn reconnect(&mut self) {
        self.cut();
        self.link = true;
    }

    fn attach(&mut self) -> Outcome {
        let hello = hello(self.primary.store(), Lives::default());
        let session = Uid(self.rng.random());
        match self.receiver.as_mut().expect("the backup is up").attach(&hello, session) {
            Ok((positions, drained)) => {
                let instance = self.backup.store().identity().instance;
                let unfinished = self.backup.store().with_state(|state| {
                    let groups = state.groups.values().filter(|g| g.run.is_some() || !g.consistent);
                    groups.map(|g| g.id).collect()
                });
                self.attaching =
                    Some((Welcome { session, instance, positions, unfinished, diverged: BTreeMap::new() }, drained));
                Ok(())
            }
            Err(error) => {
                if self.backup.check_failure()? {
                    self.summary.count("failed syncs", 1);
                    return self.crash_backup(Some(true));
                }
                Err(broken(format!("the backup refuses its primary: {error}")))
            }
        }
    }

    fn finish_attach(&mut self) -> Outcome {
        let durable = self.backup.store().marks().borrow().durable;
        let Some((welcome, _)) = self.attaching.take_if(|(_, drained)| *drained <= durable) else { return Ok(()) };
        let sender = self.sender.as_mut().expect("the primary is up");
        let lost = sender.on_attached(&welcome, self.time);
        let lost = match lost {
            Ok(lost) => lost,
            Err(SendError::Mode(ModeError::Submit(error)) | SendError::Submit(error)) => {
                return self.attach_refused(&error);
            }
            Err(SendError::Gone { .. }) if self.delta.is_some() => return Ok(()),
            Err(error) => return Err(broken(format!("attach: {error}"))),
        };
        self.summary.count("sessions", 1);
        let (frames, answers) = (VecDeque::new(), VecDeque::new());
        self.wires.push(Wire { session: welcome.session, frames, answers, answered: 0, old: false, lossy: false });
        self.delta_attached(welcome.session, &lost)
    }

    /// The store has failed, or must make room before it can note what it found.
    fn attach_refused(&mut self, error: &SubmitError) -> Outcome {
        match error {
            SubmitError::Failed(_) => Ok(()),
            SubmitError::StagingFull { .. } => {
                self.primary.store().request_checkpoint();
                Ok(())
            }
            error => Err(broken(format!("attach: {error}"))),
        }
    }

    fn send(&mut self) -> Outcome {
        let spilled = |world: &Self| world.primary.store().stats().spilled.load(Ordering::Relaxed);
        let (before, now) = (spilled(self), Duration::from_millis(self.time.unsigned_abs()));
        let sender = self.sender.as_mut().expect("the primary is up");
        let frames = sender.poll(now, 4096).map_err(|e| broken(format!("the sender cannot go on: {e}")))?;
        if let Some(wire) = self.wires.iter_mut().find(|w| !w.old) {
            wire.frames.extend(frames);
        }
        let after = spilled(self);
        self.summary.count("spilled records", after - before);
        Ok(())
    }

    fn deliver_frame(&mut self) -> Outcome {
        let Some(wire) = self.wires.iter_mut().find(|w| !w.old) else { return Ok(()) };
        if self.faults.lost_frames && self.rng.random_bool(0.01) && wire.frames.len() > 1 {
            wire.frames.pop_front();
            wire.lossy = true;
        }
        let lossy = wire.lossy;
        let Some(frame) = wire.frames.pop_front() else { return Ok(()) };
        let receiver = self.receiver.as_mut().expect("the backup is up");
        let (session, ship) = (Uid::from_slice(&frame.session).expect("16 bytes"), frame.ship);
        let record = convert::record_from_wire(frame.clone()).map_err(|e| broken(e.to_string()))?;
        let newest = self.backup.store().with_state(|state| state.groups.get(&record.group).map(|g| g.position));
        let overtaken = newest.is_some_and(|newest| record.position < newest);
        let result = receiver.on_record(session, ship, &record);
        trace!(
            self,
            "backup takes frame {ship}: record {} of group {}, lane {}: {result:?}",
            record.position.lsn,
            record.group,
            record.lane
        );
        self.summary.count("records that were overtaken", u64::from(overtaken && result.is_ok()));
        match result {
            Ok(()) => Ok(()),
            Err(FrameRefusal::Busy(_)) => {
                self.summary.count("busy answers", 1);
                wire.frames.push_front(frame);
                Ok(())
            }
            Err(FrameRefusal::Gap { .. }) if lossy => {
                self.summary.count("lost frames noticed", 1);
                self.reconnect();
                Ok(())
            }
            Err(_) if self.backup.check_failure()? => {
                self.summary.count("failed syncs", 1);
                self.crash_backup(Some(true))
            }
            Err(error) => Err(broken(format!("an undisturbed session was refused: {error}"))),
        }
    }

    fn answer(&mut self) -> Outcome {
        let durable = self.backup.store().marks().borrow().durable;
        let receiver = self.receiver.as_mut().expect("the backup is up");
        let Some((session, answer)) = receiver.poll_answer(durable) else { return Ok(()) };
        if let Some(refusal) = answer.refusals.iter().find(|r| r.cause != "space") {
            return Err(broken(format!("the backup cannot: {}", refusal.message)));
        }
        let ack = v1::StagedAck {
            session: Bytes::copy_from_slice(&session.0),
            ship: answer.ship,
            refusals: answer
                .refusals
                .iter()
                .map(|r| v1::Refusal {
                    group_id: r.group.0,
                    volume_id: r.volume.0,
                    position: Some(r.position.into()),
                    cause: r.cause.into(),
                    message: r.message.clone(),
                })
                .collect(),
        };
        self.summary.count("refused groups", answer.refusals.len() as u64);
        let Some(wire) = self.wires.iter_mut().find(|w| !w.old && w.session == session) else { return Ok(()) };
        if ack.ship > wire.answered || !ack.refusals.is_empty() {
            wire.answered = ack.ship;
            wire.answers.push_back(ack);
        }
        if self.rng.random_bool(0.7)
            && let Some(ack) = wire.answers.pop_front()
        {
            trace!(self, "primary hears {}", ack.ship);
            let sender = self.sender.as_mut().expect("the primary is up");
            sender.on_ack(&ack).map_err(|error| broken(format!("an answer was refused: {error}")))?;
        }
        Ok(())
    }

    pub(super) fn cut(&mut self) {
        self.link = false;
        self.attaching = None;
        if let Some(sender) = &mut self.sender {
            sender.on_detached();
        }
        self.delta_detached();
        for wire in &mut self.wires {
            wire.old = true;
            wire.answers.clear();
        }
        if !self.faults.late_frames {
            self.wires.clear();
        }
        let excess = self.wires.len().saturating_sub(3);
        self.wires.drain(..excess);
    }

    /// A frame of a connection that is gone arrives after all.
    fn deliver_late(&mut self) {
        let Some(receiver) = &mut self.receiver else { return };
        if let Some(frame) = self.wires.iter_mut().filter(|w| w.old).find_map(|w| w.frames.pop_front()) {
            let (session, ship) = (Uid::from_slice(&frame.session).expect("16 bytes"), frame.ship);
            if let Ok(record) = convert::record_from_wire(frame) {
                // Whatever the receiver says goes to nobody.
                let _ = receiver.on_record(session, ship, &record);
                self.summary.count("late frames", 1);
            }
        }
    }
}
