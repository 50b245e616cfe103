//! The checkpoint: what the pool's metadata and the catalogue were right behind one record.
//!
//! It is fuzzy: admission and application go on while it is written. It is captured between two apply jobs, so it is
//! exact about that record. The order is devices, then one commit of the catalogue that carries segment maps, live
//! counts, state and the new trim point together; only then is the journal trimmed and are freed segments reusable.

use std::{io, sync::Arc};

use thiserror::Error;

use crate::{
    catalog::CatalogError,
    journal::TrimPoint,
    mutant::Mutant,
    pool::{Capture, PoolIo},
    types::Lsn,
};

use super::{Front, Root, Store, delta};

/// Key of the root in the catalogue.
pub(super) const ROOT: &str = "root";

/// Why a checkpoint was not made. The one before it stays valid.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The devices could not be synced.
    #[error("syncing the devices: {0}")]
    Devices(io::Error),
    /// The catalogue could not be committed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

/// A checkpoint on its way to the catalogue.
pub struct CheckpointJob {
    store: Arc<Store>,
    capture: Capture,
    tables: delta::Capture,
    root: Root,
    io: PoolIo,
}

impl CheckpointJob {
    /// Makes it durable.
    ///
    /// # Errors
    /// If a sync or the commit failed; the checkpoint before it stays the valid one.
    pub fn run(&self) -> Result<(), CheckpointError> {
        if !Mutant::RootBeforeDevices.on() {
            self.io.sync_devices().map_err(CheckpointError::Devices)?;
        }
        Ok(write_root(&self.store.catalog, &self.root, Some((&self.capture, &self.tables)))?)
    }
}

pub(super) fn write_root(
    catalog: &crate::catalog::Catalog,
    root: &Root,
    capture: Option<(&Capture, &delta::Capture)>,
) -> Result<(), CatalogError> {
    let json = serde_json::to_vec(root).expect("plain data");
    catalog.write(|txn| {
        if let Some((pool, tables)) = capture {
            pool.write_into(txn)?;
            tables.write_into(txn)?;
        }
        txn.put_meta(ROOT, &json)
    })
}

impl Front {
    /// The first record that a checkpoint as of `applied` leaves in the journal.
    fn keep_from(&self, applied: Lsn) -> Lsn {
        let kept = [self.retained.oldest(), self.delta.pinned(applied)].into_iter().flatten().min();
        kept.map_or(applied.next(), |oldest| oldest.min(applied.next()))
    }

    /// Bytes of the staging area that are in use: the span of the journal and the segments its records refer to.
    pub(super) fn staged_bytes(&self) -> u64 {
        self.journal.span_bytes() + self.referenced_bytes
    }

    /// What of [`Front::staged_bytes`] stays when everything before the record `lsn` goes.
    fn staged_from(&self, lsn: Lsn, segment_bytes: u32) -> u64 {
        let released = self.released_references(lsn) * u64::from(segment_bytes);
        self.journal.span_from(lsn) + self.referenced_bytes.saturating_sub(released)
    }

    /// Segments of records below `keep_from`, which a checkpoint would give back.
    fn released_references(&self, keep_from: Lsn) -> u64 {
        let released = self.referenced.iter().take_while(|(lsn, _)| *lsn < keep_from);
        released.map(|(_, segments)| segments.len() as u64).sum()
    }
}

impl Store {
    /// What of [`Store::span_bytes`] the oldest retained record pins. The rest goes with a checkpoint: a group that left
    /// continuous mode would not make it less.
    #[must_use]
    pub fn pinned_bytes(&self) -> u64 {
        let front = self.front.lock();
        front.retained.oldest().map_or(0, |oldest| front.staged_from(oldest, self.config.pool.segment_bytes))
    }

    /// True when enough was journaled since the last checkpoint, or a checkpoint would let much of it be trimmed.
    #[must_use]
    pub fn checkpoint_due(&self) -> bool {
        let applied = self.marks.borrow().applied;
        let front = self.front.lock();
        if front.failed.is_some() {
            return false;
        }
        let kept = front.staged_from(front.keep_from(applied), self.config.pool.segment_bytes);
        let trimmable = front.staged_bytes().saturating_sub(kept);
        // The journal is trimmed by whole files: less than two of them is not worth a checkpoint.
        let two_files = 2 * self.config.journal.file_bytes;
        let quarter = front.journal.capacity_bytes() / 4;
        let is_tight = front.journal.span_bytes() > front.journal.capacity_bytes() - quarter;
        let worth = if is_tight { two_files } else { quarter.max(two_files) };
        let since = front.journal.span_from(front.checkpoint_next);
        since >= self.config.checkpoint_bytes || since > 0 && trimmable >= worth
    }

    /// Asks for a checkpoint if it would make room in the staging area. Whoever waits for room and is refused again asks
    /// again: each release and each applied job moves the marks.
    pub fn request_trim(&self) {
        let applied = self.marks.borrow().applied;
        let helps = {
            let front = self.front.lock();
            let keep_from = front.keep_from(applied);
            front.released_references(keep_from) > 0 || front.journal.would_trim(keep_from)
        };
        if helps {
            self.request_checkpoint();
        }
    }

    /// Captures a checkpoint as of the last applied record. `None` while an apply job or another checkpoint is in
    /// flight.
    pub fn take_checkpoint(self: &Arc<Self>) -> Option<CheckpointJob> {
        let mut applier = self.applier.lock();
        if applier.in_flight || applier.checkpointing {
            return None;
        }
        let (trim, acked, tables, tables_next) = {
            let mut front = self.front.lock();
            if front.failed.is_some() {
                return None;
            }
            let behind = applier.applied.next();
            let keep_from = front.keep_from(applier.applied);
            let keep_from = if Mutant::TrimTooEarly.on() { front.journal.next_lsn() } else { keep_from };
            front.checkpoint_next = behind;
            let trim = front.journal.trim_point_for(keep_from);
            (trim, front.retained.acked(), front.delta.capture(applier.applied), front.journal.next_lsn())
        };
        let capture = self.pool.lock().capture();
        let (state, applied, retain) = (applier.state.clone(), applier.applied, self.config.retain);
        let root = Root { state, applied, trim, acked, tables_next, retain };
        applier.checkpointing = true;
        Some(CheckpointJob { store: Arc::clone(self), capture, tables, root, io: self.io.clone() })
    }

    /// Applies the result of [`CheckpointJob::run`].
    pub fn finish_checkpoint(&self, job: CheckpointJob, result: Result<(), CheckpointError>) {
        if let Err(error) = result {
            self.fail(format!("checkpoint: {error}"));
            return;
        }
        let trim: TrimPoint = job.root.trim;
        let mut released = Vec::new();
        {
            let mut front = self.front.lock();
            let front = &mut *front;
            front.journal.trim(trim);
            front.delta.on_checkpoint(job.root.applied);
            let state = &front.state;
            front.retained.forget(trim.lsn, |group| state.groups.contains_key(&group));
            front.group_traffic.retain(|group, _| state.groups.contains_key(group));
            while front.referenced.front().is_some_and(|(lsn, _)| *lsn < trim.lsn)
                && let Some((_, segments)) = front.referenced.pop_front()
            {
                front.referenced_bytes -= segments.len() as u64 * u64::from(self.config.pool.segment_bytes);
                released.push(segments);
            }
            while front.tail.front().is_some_and(|e| e.lsn < trim.lsn)
                && let Some(entry) = front.tail.pop_front()
            {
                front.tail_bytes -= entry.memory_bytes();
            }
        }
        let mut pool = self.pool.lock();
        pool.checkpoint_done(job.capture.id());
        for segment in released.into_iter().flatten() {
            pool.unpin(segment);
        }
        drop(pool);
        self.applier.lock().checkpointing = false;
        // Whoever waits for space in the staging area looks again.
        self.marks.send_modify(|_| {});
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::testing::{create, open, write};
    use crate::{
        storage::sim::SimStorage,
        types::{GroupId, Lsn},
    };

    #[test]
    fn what_a_checkpoint_would_free_is_not_pinned() {
        let store = open(Arc::new(SimStorage::new(1)), 1);
        create(&store, 1);
        // More than a file of the journal holds.
        for block in 0..40 {
            write(&store, 1, block, 7);
        }
        let all = store.pinned_bytes();
        assert!(all >= 40 * 512, "{all}");
        store.release(GroupId(1), 0, Lsn(36), 0, &[]);
        let rest = store.pinned_bytes();
        assert!(rest < all && rest >= 5 * 512, "{rest} of {all}");
        store.release(GroupId(1), 0, Lsn(41), 0, &[]);
        assert_eq!(store.pinned_bytes(), 0);
        assert!(store.span_bytes() >= all && !store.checkpoint_due());
    }
}
