//! The backup's disk is copied, and replaced by an older copy or an empty one.

use std::sync::Arc;

use rand::Rng;
use understudy_common::{storage::sim::SimStorage, types::Lsn};

use super::{
    super::{Outcome, World, trace},
    port, view,
};

/// Copies of the backup's disk that are kept.
const COPIES: usize = 2;

impl World {
    /// Keeps a copy of the backup's disk as it would be after a power cut now.
    pub(super) fn copy_backup(&mut self) {
        let disk = self.backup.disk.fork();
        disk.clear_faults();
        disk.crash(&mut self.rng);
        let delta = self.delta.as_mut().expect("a run with delta mode");
        if delta.copies.len() == COPIES {
            delta.copies.remove(0);
        }
        delta.copies.push(disk);
    }

    /// Somebody puts an older copy of the backup's disk in its place, or an empty one.
    pub(super) fn replace_backup(&mut self) -> Outcome {
        let swarm = self.delta().swarm.clone();
        let prefer_empty = swarm.empty_disks && self.rng.random();
        let old = if swarm.old_disks && !prefer_empty { self.delta().copies.pop() } else { None };
        if old.is_none() && !swarm.empty_disks {
            return Ok(());
        }
        self.acknowledge()?;
        self.stop_backup(true);
        let emptied = old.is_none();
        self.backup.disk = old.unwrap_or_else(|| SimStorage::new(self.rng.random()));
        self.summary.count(if emptied { "empty disks put in" } else { "old disks put back" }, 1);
        trace!(self, "disk of the backup replaced, empty {emptied}");
        self.delta().bound = false;
        self.backup.open(&mut self.rng)?;
        self.forget_acknowledged_on_backup();
        let store = Arc::clone(self.backup.store());
        let in_run = port::groups(&store).into_iter().any(|group| view(&store, group).is_some_and(|view| view.in_run));
        self.summary.count("old disks put back in a run", u64::from(in_run));
        self.link = true;
        self.backup_started()
    }

    /// Nothing that the disk put in lacks counts as acknowledged by both any more; that the primary has it stays true.
    fn forget_acknowledged_on_backup(&mut self) {
        let store = Arc::clone(self.backup.store());
        for event in &mut self.model.history {
            let position = view(&store, event.group).map_or(Lsn::ZERO, |view| view.position.lsn);
            if event.acked == Some(true) && event.lsn > position {
                event.acked = Some(false);
            }
        }
    }
}
