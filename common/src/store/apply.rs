//! Group commit and application: from the queue to the journal, and from the journal to the blocks' places.

use std::{io, sync::Arc};

use crate::{
    journal::Batch,
    mutant::Mutant,
    pool::{IoPlan, Pool, PoolError, PoolIo},
    record::{BeginRun, Control, Op, Record, WriteData},
    state::NodeState,
    types::{LayerId, Lsn, VolumeId},
};

use super::{
    Entry, Role, Store,
    admission::{Touched, is_hazard},
    failed_io,
};

/// Entries of the segment map that are merged in one step when a snapshot goes.
const SWEEP_ENTRIES: usize = 512;

/// The applier's side of the state: as of the last applied record.
pub(super) struct Applier {
    pub state: NodeState,
    pub applied: Lsn,
    pub in_flight: bool,
    /// A checkpoint is on its way to the catalogue.
    pub checkpointing: bool,
    /// The pool may have entries to sweep.
    pub sweep: bool,
    /// Segments that were moved since a checkpoint was asked for because of them.
    pub moved: u64,
}

/// One group commit.
pub struct BatchJob {
    batch: Batch,
    /// Records of the batch whose bytes go to segments first.
    references: Vec<Arc<Entry>>,
    io: PoolIo,
}

impl BatchJob {
    /// Writes and syncs. Segments that a record refers to are durable before the record is.
    ///
    /// # Errors
    /// The first write or sync that failed; nothing of the batch counts as durable then.
    pub fn run(&self) -> io::Result<()> {
        for entry in &self.references {
            if let Op::Write { volume, first_block, crcs, data: WriteData::Segments(segments, Some(bytes)), .. } =
                &entry.record.op
            {
                let (per, chunk) = (crcs.len() / segments.len(), bytes.len() / segments.len());
                for (n, segment) in segments.iter().enumerate() {
                    self.io.write_reference(
                        *volume,
                        first_block + (n * per) as u64,
                        *segment,
                        &bytes[n * chunk..][..chunk],
                        &crcs[n * per..][..per],
                    )?;
                }
            }
        }
        if !self.references.is_empty() {
            self.io.sync_devices()?;
        }
        self.batch.write()
    }
}

/// Records on their way to their place.
pub struct ApplyJob {
    entries: Vec<Arc<Entry>>,
    plan: IoPlan,
    io: PoolIo,
    sync: bool,
}

impl ApplyJob {
    /// Performs the writes.
    ///
    /// # Errors
    /// The first write or sync that failed.
    pub fn run(&mut self) -> io::Result<()> {
        self.io.perform(&mut self.plan)?;
        if self.sync { self.io.sync_devices() } else { Ok(()) }
    }

    /// How many records.
    #[must_use]
    pub fn records(&self) -> usize {
        self.entries.len()
    }
}

impl Store {
    /// Takes queued records as one group commit.
    pub fn take_batch(&self) -> Option<BatchJob> {
        let mut front = self.front.lock();
        self.take_batch_locked(&mut front)
    }

    pub(super) fn take_batch_locked(&self, front: &mut super::Front) -> Option<BatchJob> {
        if front.failed.is_some() {
            return None;
        }
        let batch = front.journal.begin_batch()?;
        let lsns = batch.lsns();
        let mut references = Vec::new();
        if !front.referenced.is_empty()
            && let Some(first) = front.queue.front().map(|q| q.entry.lsn)
        {
            let from = usize::try_from(lsns.start().0.saturating_sub(first.0)).expect("the queue fits memory");
            references.extend(
                front
                    .queue
                    .iter()
                    .skip(from)
                    .take_while(|q| q.entry.lsn <= *lsns.end())
                    .filter(|q| matches!(q.entry.record.op, Op::Write { data: WriteData::Segments(_, Some(_)), .. }))
                    .map(|q| Arc::clone(&q.entry)),
            );
        }
        let early = match front.identity.role {
            Role::Primary => Mutant::AckBeforeSync.on(),
            Role::Backup => Mutant::BackupAckBeforeSync.on(),
        };
        if early {
            self.marks.send_modify(|m| m.durable = *lsns.end());
        }
        Some(BatchJob { batch, references, io: self.io.clone() })
    }

    /// Applies the result of [`BatchJob::run`]: what is durable may now be acknowledged, shipped and applied.
    pub fn finish_batch(&self, job: BatchJob, result: io::Result<()>) {
        let mut front = self.front.lock();
        match front.journal.finish_batch(job.batch, result) {
            Ok(durable) => {
                drop(front);
                self.marks.send_modify(|m| m.durable = m.durable.max(durable));
                self.wake_applier(&self.front.lock());
            }
            Err(error) => self.fail_locked(&mut front, format!("journal: {error}")),
        }
    }

    /// Takes durable records to be applied. `None`: nothing to do, or a job is in flight.
    pub fn take_apply(&self) -> Option<ApplyJob> {
        let mut applier = self.applier.lock();
        if applier.in_flight {
            return None;
        }
        let mut entries = Vec::new();
        {
            let front = self.front.lock();
            if front.failed.is_some() {
                return None;
            }
            let durable = self.marks.borrow().durable;
            let mut bytes = 0;
            for queued in &front.queue {
                let early = queued.entry.lsn > durable && !applies_early(front.identity.role, &queued.entry.record);
                if early || bytes >= self.config.apply_bytes {
                    break;
                }
                bytes += queued.entry.memory_bytes();
                entries.push(Arc::clone(&queued.entry));
            }
        }
        if entries.is_empty() {
            return None;
        }
        let mut plan = IoPlan::new();
        let mut sync = false;
        {
            let mut pool = self.pool.lock();
            for entry in &entries {
                sync |= entry.place;
                applier.sweep |= matches!(entry.record.op, Op::Control(_));
                if let Err(error) = plan_record(&mut pool, &entry.record, &mut plan) {
                    drop(pool);
                    self.fail(format!("record {} cannot be applied: {error}", entry.lsn));
                    return None;
                }
            }
        }
        applier.in_flight = true;
        Some(ApplyJob { entries, plan, io: self.io.clone(), sync })
    }

    /// Applies the result of [`ApplyJob::run`]: the records are in their place, and the overlay forgets them.
    pub fn finish_apply(&self, job: ApplyJob, result: io::Result<()>) {
        let mut applier = self.applier.lock();
        if let Err(error) = result {
            self.fail(failed_io("writing blocks to their place", &error));
            return;
        }
        let last = job.entries.last().expect("a job has records").lsn;
        // Geometry of a volume from before a record that deletes it.
        let mut touched = Vec::with_capacity(job.entries.len());
        for entry in &job.entries {
            touched.extend(Touched::of(&entry.record, &applier.state));
            applier.state.apply(entry.lsn, &entry.record);
        }
        applier.applied = last;
        applier.in_flight = false;
        drop(applier);
        {
            let mut damage = self.damage.lock();
            touched.iter().for_each(|touched| damage.on_written(touched.range));
        }
        let mut popped = Vec::with_capacity(job.entries.len());
        {
            let mut front = self.front.lock();
            for touched in touched {
                front.overlay.remove(last, touched.range, touched.per_segment);
            }
            for _ in &job.entries {
                let queued = front.queue.pop_front().expect("applied records are at the front of the queue");
                front.queue_bytes -= queued.entry.memory_bytes();
                front.queue_hazards -= usize::from(is_hazard(&queued.entry.record));
                front.queue_places -= usize::from(queued.entry.place);
                popped.push(queued);
            }
        }
        drop(popped);
        let acknowledge = Mutant::ApplyWithoutJournal.on() && self.front.lock().identity.role == Role::Backup;
        self.marks.send_modify(|m| {
            m.applied = last;
            if job.sync {
                m.placed = last;
            }
            if acknowledge {
                m.durable = m.durable.max(last);
            }
        });
    }

    /// Merges some entries of snapshots that are going. True if there is more to do.
    pub fn sweep(&self) -> bool {
        let mut applier = self.applier.lock();
        if applier.in_flight || !applier.sweep {
            return applier.sweep;
        }
        match self.pool.lock().sweep_step(SWEEP_ENTRIES) {
            Ok(more) => applier.sweep = more,
            Err(error) => {
                applier.sweep = false;
                self.fail(format!("segment map: {error}"));
            }
        }
        applier.sweep
    }

    /// Payload bytes that wait to be written to their place.
    #[must_use]
    pub fn queue_bytes(&self) -> usize {
        self.front.lock().queue_bytes
    }
}

/// Hazards: a record is written to its place before it is durable in the journal.
fn applies_early(role: Role, record: &Record) -> bool {
    (Mutant::ApplyBeforeSync.on() || Mutant::ApplyWithoutJournal.on() && role == Role::Backup)
        // The bytes of such a record are written with its batch: nothing to hurry.
        && !matches!(record.op, Op::Write { data: WriteData::Segments(..), .. })
}

/// Moves the pool over one record. Replay goes through here as well.
pub(super) fn plan_record(pool: &mut Pool, record: &Record, plan: &mut IoPlan) -> Result<(), PoolError> {
    match &record.op {
        Op::Write { volume, first_block, crcs, data: WriteData::Inline(data), .. } => {
            pool.plan_write(*volume, *first_block, data, crcs, plan)
        }
        Op::Write { volume, first_block, data: WriteData::Segments(segments, _), .. } => {
            pool.plan_reference(*volume, *first_block, segments)
        }
        Op::Zero(range) => pool.plan_zero(range.volume, range.first, range.count),
        Op::Control(control) => match control {
            Control::CreateVolume { spec, .. } => pool.create_volume(spec),
            Control::ResizeVolume { volume, size_bytes } => {
                cut(pool, *volume, *size_bytes)?;
                grow(pool, *volume, *size_bytes)
            }
            Control::DeleteVolume { volume } => pool.delete_volume(*volume),
            Control::SetAckRule { .. } => Ok(()),
            Control::CreateSnapshot { layers } | Control::VerifySnapshot { layers, .. } => {
                layers.iter().try_for_each(|(v, l)| pool.create_snapshot(*v, *l))
            }
            Control::DeleteSnapshot { layers } => delete_snapshots(pool, layers),
            Control::RollBack { layers } => layers.iter().try_for_each(|(v, l)| pool.roll_back(*v, *l)),
            Control::PinSnapshot { volume, layer, of } => pool.pin_snapshot(*volume, *layer, *of),
            Control::Probe
            | Control::Bind { .. }
            | Control::Switch { .. }
            | Control::Demote { .. }
            | Control::StepDown { .. }
            | Control::CancelRun { .. } => Ok(()),
            Control::Cut { layers, .. } => layers.iter().try_for_each(|(v, l)| pool.create_snapshot(*v, *l)),
            Control::Clear { layers, .. } | Control::AbortRun { layers, .. } => delete_snapshots(pool, layers),
            Control::BeginRun { run } => begin_run(pool, run),
            Control::Promote { layers, delete, .. } => {
                layers.iter().try_for_each(|(volume, layer)| pool.roll_back(*volume, *layer))?;
                layers.iter().try_for_each(|(_, layer)| pool.delete_snapshot(*layer))?;
                delete.iter().try_for_each(|volume| pool.delete_volume(*volume))
            }
            Control::CommitRun { delete, layers, .. } => {
                delete.iter().try_for_each(|volume| pool.delete_volume(*volume))?;
                delete_snapshots(pool, layers)
            }
            Control::TakeSnapshot { layers, .. } => layers.iter().try_for_each(|(v, l)| pool.create_snapshot(*v, *l)),
            Control::DropSnapshot { layers, .. } => delete_snapshots(pool, layers),
            Control::BeginRestore { .. } | Control::EndRestore { .. } => Ok(()),
        },
    }
}

fn delete_snapshots(pool: &mut Pool, layers: &[LayerId]) -> Result<(), PoolError> {
    layers.iter().try_for_each(|layer| match pool.delete_snapshot(*layer) {
        // It went with its volume.
        Err(PoolError::NoSnapshot(_)) => Ok(()),
        other => other,
    })
}

/// Frees what the head of a volume has behind `size_bytes`. The volume keeps its place in the pool, for who reads an image
/// from before.
fn cut(pool: &mut Pool, volume: VolumeId, size_bytes: u64) -> Result<(), PoolError> {
    let (blocks, kept) = (pool.block_count(volume), size_bytes / pool.block_bytes(volume)?);
    if kept < blocks { pool.plan_zero(volume, kept, blocks - kept) } else { Ok(()) }
}

/// Makes a volume so large, if it is not: it may have been larger before.
fn grow(pool: &mut Pool, volume: VolumeId, size_bytes: u64) -> Result<(), PoolError> {
    if size_bytes / pool.block_bytes(volume)? <= pool.block_count(volume) {
        return Ok(());
    }
    pool.grow_volume(volume, size_bytes)
}

fn begin_run(pool: &mut Pool, run: &BeginRun) -> Result<(), PoolError> {
    run.delete.iter().try_for_each(|volume| pool.delete_volume(*volume))?;
    run.layers.iter().try_for_each(|(volume, layer)| pool.create_snapshot(*volume, *layer))?;
    run.shrink.iter().try_for_each(|(volume, size_bytes)| cut(pool, *volume, *size_bytes))?;
    run.create.iter().try_for_each(|spec| pool.create_volume(spec))?;
    run.grow.iter().try_for_each(|(volume, size_bytes)| grow(pool, *volume, *size_bytes))
}
