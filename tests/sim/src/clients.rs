//! Clients of the primary: writes, reads, retries, changes of the catalogue, and when they are acknowledged.

use std::sync::Arc;

use bytes::Bytes;
use rand::{
    Rng,
    seq::{IndexedRandom, IteratorRandom},
};
use understudy_common::{
    record::{ClientSequence, Control, block_crcs},
    store::{Change, ReadFailure, ShrinkError, Store, SubmitError, Submitted},
    types::{AckRule, AwayRule, BlockSize, GroupId, VolumeId, VolumeSpec},
};

use super::{
    BLOCK, BLOCKS_PER_SEGMENT, Outcome, SEGMENT, World, broken, delta,
    model::{Event, Stamp, What},
};

/// A volume is not cut to fewer.
const BLOCKS_MIN: u64 = BLOCKS_PER_SEGMENT;

fn change(stamp: Stamp, count: u64, block_size: BlockSize) -> Change {
    if stamp.0 == 0 {
        return Change::Zero { count };
    }
    let data: Bytes = stamp.fill().repeat(usize::try_from(count).expect("small")).into();
    let crcs = block_crcs(&data, block_size);
    Change::Write { data, crcs }
}

impl World {
    pub(super) fn client_write(&mut self) -> Outcome {
        let volumes: Vec<VolumeSpec> = self.model.live().into_values().collect();
        let Some(spec) = volumes.choose(&mut self.rng).cloned() else { return Ok(()) };
        let blocks = spec.block_count();
        let large = self.faults.large_writes && self.rng.random_bool(0.15);
        let (first, count) = if large {
            (self.rng.random_range(0..blocks / BLOCKS_PER_SEGMENT) * BLOCKS_PER_SEGMENT, BLOCKS_PER_SEGMENT)
        } else {
            // A few hot blocks, so that versions pile up.
            let first =
                if self.rng.random_bool(0.7) { self.rng.random_range(0..12) } else { self.rng.random_range(0..blocks) };
            let count = if self.rng.random() { 1 } else { self.rng.random_range(1..=4) };
            (first, count.min(blocks - first))
        };
        let zero = !large && self.rng.random_bool(0.1);
        let client = self.rng.random_bool(0.6).then(|| {
            let client = ["c0", "c1", "c2", "c3"][self.rng.random_range(0..if self.faults.lanes { 4 } else { 2 })];
            ClientSequence { client: client.into(), sequence: self.model.next_sequence(client) }
        });
        let stamp = if zero { Stamp(0) } else { self.model.next_stamp() };
        let accepted = self.submit(&spec, first, count, stamp, client.clone())?;
        if large && accepted {
            self.summary.count("written by reference", 1);
        }
        if accepted && client.is_some() && self.rng.random_bool(0.1) {
            // Another write comes in between; the retry must not bring the old bytes back.
            let over = self.model.next_stamp();
            self.submit(&spec, first, 1, over, None)?;
            self.repeat(self.model.history.iter().rposition(|e| e.client == client).expect("just submitted"))?;
        }
        Ok(())
    }

    /// True if it was accepted.
    fn submit(
        &mut self,
        spec: &VolumeSpec,
        first: u64,
        count: u64,
        stamp: Stamp,
        client: Option<ClientSequence>,
    ) -> Result<bool, super::Violation> {
        let store = Arc::clone(self.primary.store());
        let submitted = store.submit(spec.id, first, change(stamp, count, spec.block_size), client.clone(), self.time);
        match submitted {
            Ok(submitted) if submitted.duplicate => {
                Err(broken(format!("the fresh sequence {client:?} was taken for a duplicate")))
            }
            Ok(submitted) => {
                super::trace!(self, "write {} of {}/{first}+{count} as {stamp:?}", submitted.lsn, spec.id);
                let what = What::Write { first, count, stamp };
                self.remember(&submitted, spec, what, spec.ack, client);
                Ok(true)
            }
            Err(error) => self.refused(&store, &error).map(|()| false),
        }
    }

    fn remember(
        &mut self,
        submitted: &Submitted,
        spec: &VolumeSpec,
        what: What,
        rule: AckRule,
        client: Option<ClientSequence>,
    ) {
        let (lsn, lane) = (submitted.lsn, submitted.lane.expect("it is fresh"));
        let (group, volume, boot) = (spec.group, spec.id, self.model.boot);
        self.model.history.push(Event { lsn, group, lane, volume, what, rule, client, acked: None, boot });
    }

    /// What may be refused, and what the service would ask of the background then.
    pub(super) fn refused(&mut self, store: &Store, error: &SubmitError) -> Outcome {
        match error {
            SubmitError::StagingFull { .. } | SubmitError::Space(_) => {
                store.request_checkpoint();
                Ok(())
            }
            SubmitError::LaneFull { .. } => {
                self.summary.count("full lanes", 1);
                Ok(())
            }
            SubmitError::Failed(_) => Ok(()),
            error => Err(broken(format!("a change was refused: {error}"))),
        }
    }

    /// A client that has heard nothing repeats its newest request.
    pub(super) fn client_retry(&mut self) -> Outcome {
        match self.model.history.iter().rposition(|e| e.client.is_some()) {
            Some(at) => self.repeat(at),
            None => Ok(()),
        }
    }

    /// After a crash: any request that is in the journal, as old as it may be.
    pub(super) fn client_retry_any(&mut self) -> Outcome {
        let known: Vec<usize> =
            (0..self.model.history.len()).filter(|i| self.model.history[*i].client.is_some()).collect();
        let Some(at) = known.choose(&mut self.rng) else { return Ok(()) };
        self.repeat(*at)?;
        self.summary.count("duplicates answered after a crash", 1);
        Ok(())
    }

    /// Sends a request again that the primary has: it must be answered and have no effect. What is in its place by now
    /// stays, which the images show.
    fn repeat(&mut self, at: usize) -> Outcome {
        let event = self.model.history[at].clone();
        let (What::Write { first, count, stamp }, Some(spec)) = (event.what, self.model.live().remove(&event.volume))
        else {
            return Ok(());
        };
        let store = Arc::clone(self.primary.store());
        let again = change(stamp, count, spec.block_size);
        match store.submit(spec.id, first, again, event.client, self.time) {
            Ok(submitted) => {
                // Written again, it is not in the history, and the next comparison of images finds it.
                self.summary.count("duplicates answered", u64::from(submitted.duplicate));
                Ok(())
            }
            Err(error) => self.refused(&store, &error),
        }
    }

    /// A volume, best one that is being read, is emptied, and others take its space at once.
    pub(super) fn churn(&mut self) -> Outcome {
        let live = self.model.live();
        let held = self.primary.held_volumes().find(|spec| live.contains_key(&spec.id)).map(|spec| spec.id);
        let Some(spec) = held.or_else(|| live.keys().next().copied()).and_then(|id| live.get(&id)) else {
            return Ok(());
        };
        self.submit(spec, 0, spec.block_count(), Stamp(0), None)?;
        self.primary.drain(&mut self.rng);
        self.primary.drain(&mut self.rng);
        for _ in 0..8 {
            let other = live.values().choose(&mut self.rng).expect("there is one");
            // The slots that hot blocks have in their segments.
            let first = self.rng.random_range(0..other.block_count() / BLOCKS_PER_SEGMENT) * BLOCKS_PER_SEGMENT;
            let stamp = self.model.next_stamp();
            self.submit(other, first, 16, stamp, None)?;
        }
        self.primary.drain(&mut self.rng);
        Ok(())
    }

    pub(super) fn client_read(&mut self) -> Outcome {
        let store = Arc::clone(self.primary.store());
        let volumes: Vec<VolumeSpec> = self.model.live().into_values().collect();
        let Some(spec) = volumes.choose(&mut self.rng) else { return Ok(()) };
        let first = self.rng.random_range(0..16);
        let read = match store.read(spec.id, first, 4) {
            Ok(read) => read,
            Err(ReadFailure::Failed(_)) => return Ok(()),
            Err(error) => return Err(broken(format!("a read failed: {error}"))),
        };
        for (block, bytes) in (first..).zip(read.data.chunks_exact(BLOCK)) {
            let expected = self.model.newest(spec.id, block);
            let found = Stamp::of(bytes);
            if found != Some(expected) {
                return Err(broken(format!(
                    "a read of volume {} block {block} gave {found:?}, the newest write is {expected:?}",
                    spec.id
                )));
            }
        }
        // It must wait for what it saw and nobody has been told of yet.
        let durable = store.marks().borrow().durable;
        for event in self.model.history.iter().filter(|e| (first..first + 4).any(|b| e.touches(spec.id, b).is_some())) {
            let waits_here = event.lsn <= durable || read.seen >= event.lsn;
            // Degraded, it was acknowledged here.
            let held = store.retained().holds(event.group, Some(event.lane), event.lsn);
            let on_backup = held || store.is_delta(event.group);
            let waits = read.seen_both >= event.lsn && read.seen_lane.is_none_or(|lane| lane == event.lane);
            // What was written over is on the backup before what the read saw.
            let over = |b| self.model.history.iter().any(|e| e.lsn > event.lsn && e.touches(spec.id, b).is_some());
            let seen = (first..first + 4).any(|b| event.touches(spec.id, b).is_some() && !over(b));
            if !waits_here || event.rule == AckRule::Both && !on_backup && seen && !waits {
                return Err(broken(format!("a read saw write {} and does not wait for it", event.lsn)));
            }
        }
        Ok(())
    }

    // --- catalogue

    pub(super) fn change_catalogue(&mut self) -> Outcome {
        let live: Vec<VolumeSpec> = self.model.live().into_values().collect();
        match self.rng.random_range(0..3) {
            0 if live.len() < 5 => self.create_volume(),
            1 if live.len() > 1 => {
                let spec = live.choose(&mut self.rng).expect("two or more").clone();
                self.control(&spec, Control::DeleteVolume { volume: spec.id }, What::Delete, "volumes deleted")
            }
            _ => {
                let Some(spec) = live.choose(&mut self.rng).cloned() else { return Ok(()) };
                // Half of those that are cut grow again at once: the backup may see one size, and not what was between.
                let spec = if self.rng.random_bool(0.6) { self.shrink(spec)? } else { Some(spec) };
                let Some(spec) = spec.filter(|_| self.rng.random()) else { return Ok(()) };
                let blocks = (spec.block_count() + self.rng.random_range(1..200)).min(2048);
                let control = Control::ResizeVolume { volume: spec.id, size_bytes: blocks * BLOCK as u64 };
                self.control(&spec, control, What::Resize { blocks }, "volumes grown")
            }
        }
    }

    /// Writes behind what is to be the end, discards that, and cuts the volume there: that must be refused before, and not
    /// after. The volume as it is then; `None` if there was no room for a record.
    fn shrink(&mut self, mut spec: VolumeSpec) -> Result<Option<VolumeSpec>, super::Violation> {
        if spec.block_count() <= BLOCKS_MIN {
            return Ok(Some(spec));
        }
        let store = Arc::clone(self.primary.store());
        let blocks = self.rng.random_range(BLOCKS_MIN..spec.block_count());
        let (count, size_bytes) = (spec.block_count() - blocks, blocks * BLOCK as u64);
        if self.rng.random() {
            let (at, stamp) = (self.rng.random_range(blocks..spec.block_count()), self.model.next_stamp());
            if !self.submit(&spec, at, 1, stamp, None)? {
                return Ok(None);
            }
            match store.shrink(spec.id, size_bytes, self.time) {
                Err(ShrinkError::Data { block, .. }) if block <= at => {
                    self.summary.count("shrinks below data refused", 1)
                }
                Err(ShrinkError::Read(ReadFailure::Failed(_))) => return Ok(None),
                other => {
                    return Err(broken(format!("block {at} of {} is written and the volume cut: {other:?}", spec.id)));
                }
            }
        }
        if !self.submit(&spec, blocks, count, Stamp(0), None)? {
            return Ok(None);
        }
        match store.shrink(spec.id, size_bytes, self.time) {
            Ok(submitted) => {
                self.summary.count("volumes shrunk", 1);
                super::trace!(self, "record {} cuts volume {} to {blocks} blocks", submitted.lsn, spec.id);
                self.remember(&submitted, &spec, What::Resize { blocks }, AckRule::Staged, None);
                spec.size_bytes = size_bytes;
                Ok(Some(spec))
            }
            Err(ShrinkError::Submit(error)) => self.refused(&store, &error).map(|()| None),
            Err(ShrinkError::Read(ReadFailure::Failed(_))) => Ok(None),
            Err(error) => Err(broken(format!("volume {} is not cut: {error}", spec.id))),
        }
    }

    pub(super) fn create_volume(&mut self) -> Outcome {
        let live = self.model.live();
        let (last_volume, last_group) = self.primary.store().with_state(|s| (s.last_volume, s.last_group));
        let groups: Vec<GroupId> = live.values().map(|spec| spec.group).collect();
        let joined = if self.rng.random() { groups.choose(&mut self.rng).copied() } else { None };
        let group = joined.unwrap_or(GroupId(last_group.0 + 1));
        let id = VolumeId(last_volume.0 + 1);
        let spec = VolumeSpec {
            id,
            name: format!("v{id}"),
            group,
            group_name: format!("g{group}"),
            size_bytes: self.rng.random_range(300..1100) * BLOCK as u64,
            block_size: BlockSize::new(512).expect("512"),
            segment_bytes: SEGMENT,
            ack: *[AckRule::Staged, AckRule::Both, AckRule::Primary].choose(&mut self.rng).expect("three"),
            away: AwayRule::Degrade,
        };
        self.control(
            &spec,
            Control::CreateVolume { spec: spec.clone(), fill: None },
            What::Create(spec.clone()),
            "volumes created",
        )
    }

    fn control(&mut self, spec: &VolumeSpec, control: Control, what: What, counted: &'static str) -> Outcome {
        let store = Arc::clone(self.primary.store());
        match store.submit_control(spec.group, control, self.time) {
            Ok(submitted) => {
                self.summary.count(counted, 1);
                super::trace!(self, "record {} of group {}: {what:?}", submitted.lsn, spec.group);
                self.remember(&submitted, spec, what, AckRule::Staged, None);
                Ok(())
            }
            Err(error) => self.refused(&store, &error),
        }
    }

    // --- acknowledgements

    /// Acknowledges what the rules allow, and remembers it.
    pub(super) fn acknowledge(&mut self) -> Outcome {
        let store = Arc::clone(self.primary.store());
        let marks = *store.marks().borrow();
        if marks.failed {
            return Ok(());
        }
        let boot = self.model.boot;
        // A disk that was put in and that the primary has not met need not hold what the one before had acknowledged.
        let met = self.delta.as_ref().is_none_or(delta::Delta::is_bound);
        let (mut local, mut both, mut placed) = (0, 0, 0);
        for event in self.model.history.iter_mut().rev().take(256) {
            if event.acked.is_some() || event.lsn > marks.durable {
                continue;
            }
            let on_backup = met && store.is_on_backup(event.group, Some(event.lane), event.lsn);
            match event.rule {
                AckRule::Staged => local += 1,
                AckRule::Both if on_backup => both += 1,
                // Degraded.
                AckRule::Both
                    if store.with_state(|s| s.groups.get(&event.group).is_some_and(|g| !g.mode.is_continuous())) =>
                {
                    local += 1;
                }
                // Who asked before a crash has got no answer.
                AckRule::Primary if event.boot == boot && marks.placed >= event.lsn => placed += 1,
                _ => continue,
            }
            event.acked = Some(on_backup);
        }
        self.summary.count("acked local", local);
        self.summary.count("acked both", both);
        self.summary.count("acked placed", placed);
        Ok(())
    }
}
