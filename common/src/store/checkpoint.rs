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
};

use super::{Root, Store};

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
        Ok(write_root(&self.store.catalog, &self.root, Some(&self.capture))?)
    }
}

pub(super) fn write_root(
    catalog: &crate::catalog::Catalog,
    root: &Root,
    capture: Option<&Capture>,
) -> Result<(), CatalogError> {
    let json = serde_json::to_vec(root).expect("plain data");
    catalog.write(|txn| {
        if let Some(capture) = capture {
            capture.write_into(txn)?;
        }
        txn.put_meta(ROOT, &json)
    })
}

impl Store {
    /// True when enough was journaled since the last checkpoint, or a checkpoint would let much of it be trimmed.
    #[must_use]
    pub fn checkpoint_due(&self) -> bool {
        let applied = self.marks.borrow().applied;
        let front = self.front.lock();
        if front.failed.is_some() {
            return false;
        }
        let span = front.journal.span_bytes();
        let keep_from = front.retained.oldest().map_or(applied.next(), |o| o.min(applied.next()));
        let trimmable = span.saturating_sub(front.journal.span_from(keep_from))
            + if span == 0 { 0 } else { front.referenced_bytes / 2 };
        // The journal is trimmed by whole files: less than two of them is not worth a checkpoint.
        let quarter = (front.journal.capacity_bytes() / 4).max(2 * self.config.journal.file_bytes);
        let since = front.journal.span_from(front.checkpoint_next);
        since >= self.config.checkpoint_bytes || since > 0 && trimmable >= quarter
    }

    /// Captures a checkpoint as of the last applied record. `None` while an apply job or another checkpoint is in
    /// flight.
    pub fn take_checkpoint(self: &Arc<Self>) -> Option<CheckpointJob> {
        let mut applier = self.applier.lock();
        if applier.in_flight || applier.checkpointing {
            return None;
        }
        let (trim, acked) = {
            let mut front = self.front.lock();
            if front.failed.is_some() {
                return None;
            }
            let behind = applier.applied.next();
            let keep_from = front.retained.oldest().map_or(behind, |oldest| oldest.min(behind));
            let keep_from = if Mutant::TrimTooEarly.on() { front.journal.next_lsn() } else { keep_from };
            front.checkpoint_next = behind;
            (front.journal.trim_point_for(keep_from), front.retained.acked())
        };
        let capture = self.pool.lock().capture();
        let root = Root { state: applier.state.clone(), applied: applier.applied, trim, acked };
        applier.checkpointing = true;
        Some(CheckpointJob { store: Arc::clone(self), capture, root, io: self.io.clone() })
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
            let state = &front.state;
            front.retained.forget(|group| state.groups.contains_key(&group));
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

    /// Changes the identity durably, outside of the journal: rare, and only while nothing else depends on it.
    ///
    /// # Errors
    /// If the catalogue cannot be written.
    pub fn set_identity(self: &Arc<Self>, change: impl FnOnce(&mut super::Identity)) -> Result<(), CatalogError> {
        let identity = {
            let mut front = self.front.lock();
            change(&mut front.identity);
            front.identity
        };
        let json = serde_json::to_vec(&identity).expect("plain data");
        let written = self.catalog.write(|txn| txn.put_meta(super::recovery::IDENTITY, &json));
        if let Err(error) = &written {
            self.fail(format!("catalogue: {error}"));
        }
        written
    }
}
