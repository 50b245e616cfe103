//! Scrubbing and repair: reading back what is stored, knowing what is damaged, and mending it without ever giving a
//! client an old block.
//!
//! Invariants:
//! - A block is called damaged only by [`Store::check_suspect`], between two apply jobs and under the applier's lock: then
//!   no write in place is under way and everything that the map names is written, so a mismatch is no race.
//! - A repair is an ordinary write. It is admitted only if the backup provably holds the block's newest version - no
//!   record that touches the block is retained, and the block is not marked - before the backup is asked *and* after, with
//!   no write of the block and no change of the catalogue in between ([`super::watches`]). A retained record and a mark are
//!   all by which the sides may differ, so what the backup answers is what the block held all that time.
//! - To mend the backup, the primary writes what it holds once more: to a reader that changes nothing.
//! - A version that only snapshots see never changes, so it is mended where it lies: with what the other side reads from a
//!   mirrored snapshot that sees it, and only if that has the checksum which is stored for the version.
//!
//! Deliberately absent: when to scrub and how fast (`crate::scrub`), and the call to the backup.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::{
    mutant::Mutant,
    pool::{Owned, OwnedPlace, Owner, PoolError, PoolIo, ReadTicket},
    record::block_crcs,
    types::{BlockRange, LayerId, SegmentId, SnapshotId, VolumeId},
};

use super::{Change, Front, ModifyError, Store, SubmitError, Submitted};

/// Damaged blocks that are known by name; of more only their number is told, by the scrub that finds them.
pub const DAMAGED_MAX: usize = 4096;
/// Blocks that reads found damaged and that are to be looked at.
const SUSPECTS_MAX: usize = 256;
/// Key of the scrub's times in the catalogue.
const SCRUB: &str = "scrub";

/// A block version that did not match its checksum when it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Suspect {
    /// Whose it is.
    pub volume: VolumeId,
    /// Its number.
    pub block: u64,
    /// Where it lies.
    pub segment: SegmentId,
}

/// What a suspect is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checked {
    /// A job of the applier is under way: ask again.
    Busy,
    /// It matches, or nobody owns it any more.
    Sound,
    /// It is damaged, and listed.
    Damaged(Owner),
}

/// What became of mending a version that only snapshots see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mended {
    /// A job of the applier is under way: try again.
    Busy,
    /// It is written anew, and to be looked at once more.
    Yes,
    /// Nothing was written: it is another version, or nobody owns it any more.
    No,
}

/// What is known to be damaged.
#[derive(Default)]
pub(super) struct Damage {
    /// With true, if the block was written since it was looked at.
    known: BTreeMap<Suspect, (Owner, bool)>,
    /// What reads came upon: a block of the head or of a snapshot.
    reads: BTreeSet<(VolumeId, Option<LayerId>, u64)>,
}

impl Damage {
    /// Lists a damaged block while there is room on the list.
    pub(super) fn note(&mut self, suspect: Suspect, owner: Owner) {
        if self.known.len() < DAMAGED_MAX || self.known.contains_key(&suspect) {
            self.known.insert(suspect, (owner, false));
        }
    }

    /// Blocks were written to their place.
    pub(super) fn on_written(&mut self, range: BlockRange) {
        let at = |block| Suspect { volume: range.volume, block, segment: SegmentId(0) };
        self.known.range_mut(at(range.first)..at(range.end())).for_each(|(_, (_, written))| *written = true);
    }
}

/// A part of a scrub.
pub struct ScrubJob {
    io: PoolIo,
    ticket: ReadTicket,
    owned: Vec<Owned>,
    next: OwnedPlace,
}

impl ScrubJob {
    /// What it reads.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.owned.iter().map(Owned::bytes).sum()
    }

    /// Reads and compares. What it finds may be a write that is under way: see [`Store::check_suspect`].
    #[must_use]
    pub fn run(&self) -> Vec<Suspect> {
        let mut buffer = Vec::new();
        let mut suspects = Vec::new();
        for owned in &self.owned {
            let bad = self.io.scrub(owned, &mut buffer);
            suspects.extend(bad.into_iter().map(|block| Suspect {
                volume: owned.volume,
                block,
                segment: owned.segment,
            }));
        }
        suspects
    }
}

/// A repair of a block of the primary's head under way. It is to be finished or dropped by [`Store::finish_repair`].
#[derive(Debug)]
#[must_use]
pub struct Repair {
    range: BlockRange,
    watch: u64,
}

impl Store {
    /// The next part of a scrub. `None` at the end.
    ///
    /// # Errors
    /// The segment map cannot be read.
    pub fn take_scrub(&self, from: OwnedPlace, only: Option<VolumeId>) -> Result<Option<ScrubJob>, PoolError> {
        let mut pool = self.pool.lock();
        let Some((owned, next)) = pool.owned_from(from, only)? else { return Ok(None) };
        Ok(Some(ScrubJob { io: self.io.clone(), ticket: pool.begin_read(), owned, next }))
    }

    /// The place behind a job.
    pub fn finish_scrub(&self, job: ScrubJob) -> OwnedPlace {
        self.pool.lock().end_read(job.ticket);
        job.next
    }

    /// Finds out what a suspect is, and lists it or takes it off the list.
    ///
    /// # Errors
    /// The segment map cannot be read.
    pub fn check_suspect(&self, suspect: Suspect) -> Result<Checked, PoolError> {
        let applier = self.applier.lock();
        if applier.in_flight && !Mutant::ScrubRaces.on() {
            return Ok(Checked::Busy);
        }
        let (found, ticket) = {
            let mut pool = self.pool.lock();
            (pool.owner_of(suspect.volume, suspect.block, suspect.segment)?, pool.begin_read())
        };
        let bad = found.filter(|(_, owned)| !self.io.scrub(owned, &mut Vec::new()).is_empty());
        self.pool.lock().end_read(ticket);
        drop(applier);
        let mut damage = self.damage.lock();
        let Some((owner, _)) = bad else {
            damage.known.remove(&suspect);
            return Ok(Checked::Sound);
        };
        damage.note(suspect, owner);
        Ok(Checked::Damaged(owner))
    }

    /// The blocks that are known to be damaged, and who sees them.
    #[must_use]
    pub fn damaged(&self) -> Vec<(Suspect, Owner)> {
        self.damage.lock().known.iter().map(|(suspect, (owner, _))| (*suspect, *owner)).collect()
    }

    /// Of those, the ones that may have been mended: a device may take long to fail, so others are not read again.
    ///
    /// # Errors
    /// The segment map cannot be read.
    pub fn maybe_mended(&self) -> Result<Vec<Suspect>, PoolError> {
        let known = self.damage.lock().known.clone();
        let mut out = Vec::new();
        for (suspect, (_, written)) in known {
            let Suspect { volume, block, segment } = suspect;
            if written || self.pool.lock().owner_of(volume, block, segment)?.is_none() {
                out.push(suspect);
            }
        }
        Ok(out)
    }

    /// A read of a block failed: it is to be looked at.
    pub(super) fn note_damaged_read(&self, volume: VolumeId, layer: Option<LayerId>, block: u64) {
        let mut damage = self.damage.lock();
        if damage.reads.len() < SUSPECTS_MAX {
            damage.reads.insert((volume, layer, block));
        }
    }

    /// What reads came upon since the last call.
    ///
    /// # Errors
    /// The segment map cannot be read.
    pub fn take_suspects(&self) -> Result<Vec<Suspect>, PoolError> {
        let reads = std::mem::take(&mut self.damage.lock().reads);
        let mut pool = self.pool.lock();
        let mut suspects = Vec::new();
        for (volume, layer, block) in reads {
            match pool.place_of(volume, layer, block) {
                Ok(Some(segment)) => suspects.push(Suspect { volume, block, segment }),
                // Discarded, deleted or shrunk since.
                Ok(None) | Err(PoolError::NoVolume(_) | PoolError::Range { .. } | PoolError::NoSnapshot(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(suspects)
    }

    /// A snapshot that sees this version and that the backup holds as well: the other side can mend it from there.
    ///
    /// # Errors
    /// The segment map cannot be read.
    pub fn mirrored_sight(&self, suspect: Suspect) -> Result<Option<SnapshotId>, PoolError> {
        let mirrored: Vec<SnapshotId> =
            self.with_state(|state| state.snapshots.values().filter(|s| s.mirrored).map(|s| s.id).collect());
        for id in mirrored {
            if self.seen_by_snapshot(id, suspect.volume, suspect.block)? == Some(suspect) {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// The version of a block that snapshot `id` sees, where it lies.
    ///
    /// # Errors
    /// The segment map cannot be read.
    pub fn seen_by_snapshot(&self, id: SnapshotId, volume: VolumeId, block: u64) -> Result<Option<Suspect>, PoolError> {
        let layer = self.with_state(|state| Some(state.snapshots.get(&id)?.volume(volume)?.1));
        let Some(layer) = layer else { return Ok(None) };
        match self.pool.lock().place_of(volume, Some(layer), block) {
            Ok(segment) => Ok(segment.map(|segment| Suspect { volume, block, segment })),
            Err(PoolError::NoVolume(_) | PoolError::Range { .. } | PoolError::NoSnapshot(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Mends a version that only snapshots see with what the other side read from one of them.
    ///
    /// # Errors
    /// The segment map cannot be read, or the device fails.
    pub fn mend_version(&self, suspect: Suspect, data: &[u8]) -> Result<Mended, PoolError> {
        let applier = self.applier.lock();
        if applier.in_flight {
            return Ok(Mended::Busy);
        }
        let (found, ticket) = {
            let mut pool = self.pool.lock();
            (pool.owner_of(suspect.volume, suspect.block, suspect.segment)?, pool.begin_read())
        };
        let mended = match found {
            Some((Owner::Snapshot, owned)) if data.len() == owned.block_size.bytes() as usize => {
                self.io.mend(&owned, data).map_err(PoolError::from)
            }
            _ => Ok(false),
        };
        self.pool.lock().end_read(ticket);
        drop(applier);
        if !mended? {
            return Ok(Mended::No);
        }
        self.damage.lock().known.entry(suspect).and_modify(|(_, written)| *written = true);
        Ok(Mended::Yes)
    }

    /// Begins the repair of a block of the head from the backup of the session that is open, unless the backup may hold
    /// another version.
    #[must_use]
    pub fn begin_repair(&self, volume: VolumeId, block: u64) -> Option<Repair> {
        let mut front = self.front.lock();
        if !self.config.retain || !front.is_same_on_backup(volume, block) {
            return None;
        }
        let range = BlockRange { volume, first: block, count: 1 };
        Some(Repair { range, watch: front.watches.begin(range) })
    }

    /// Ends a repair: writes the block if the backup gave one, and nothing has come in between that makes it an old one.
    /// `None`: nothing was written.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was changed then.
    pub fn finish_repair(
        &self,
        repair: Repair,
        data: Option<Bytes>,
        time_unix_ms: i64,
    ) -> Result<Option<Submitted>, SubmitError> {
        let mut front = self.front.lock();
        let Repair { range, watch } = repair;
        let touched = front.watches.end(watch);
        let Some(data) = data else { return Ok(None) };
        let late = touched || !front.is_same_on_backup(range.volume, range.first);
        if late && !Mutant::RepairUnproven.on() {
            return Ok(None);
        }
        let Some(block_size) = front.state.volumes.get(&range.volume).map(|spec| spec.block_size) else {
            return Ok(None);
        };
        if data.len() != block_size.bytes() as usize {
            return Ok(None);
        }
        let crcs = block_crcs(&data, block_size);
        let change = Change::Write { data, crcs };
        let submitted =
            self.submit_locked(&mut front, self.lane_of(None), range.volume, range.first, change, None, time_unix_ms)?;
        self.work.notify_one();
        Ok(Some(submitted))
    }

    /// Writes blocks once more as they are, for a backup that cannot read its own any more: the stream, or a run, carries
    /// them there.
    ///
    /// # Errors
    /// What reading refuses - a damaged block is not written again - or admission.
    pub fn rewrite(&self, range: BlockRange, time_unix_ms: i64) -> Result<Submitted, ModifyError> {
        self.submit_modified(self.lane_of(None), range, None, time_unix_ms, &|_| {})
    }

    /// When the last scrub was completed, Unix milliseconds, and whether one ever was; otherwise when this was first asked.
    pub fn scrubbed(&self, now_unix_ms: i64) -> (i64, bool) {
        let stored = self.catalog.read().and_then(|view| view.meta(SCRUB)).ok().flatten();
        if let Some(times) = stored.and_then(|json| serde_json::from_slice(&json).ok()) {
            return times;
        }
        self.note_scrubbed(now_unix_ms, false);
        (now_unix_ms, false)
    }

    /// Keeps when the last scrub was completed, or that none was.
    pub fn note_scrubbed(&self, unix_ms: i64, completed: bool) {
        let json = serde_json::to_vec(&(unix_ms, completed)).expect("plain data");
        if let Err(error) = self.catalog.write(|txn| txn.put_meta(SCRUB, &json)) {
            self.fail(format!("catalogue: {error}"));
        }
    }
}

impl Front {
    /// True if the backup holds the newest version of the block: by I4 the sides differ in what is retained or marked.
    fn is_same_on_backup(&self, volume: VolumeId, block: u64) -> bool {
        let Some(spec) = self.state.volumes.get(&volume).filter(|spec| block < spec.block_count()) else {
            return false;
        };
        !self.delta.differs(spec.group, volume, block) || Mutant::RepairUnproven.on()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        storage::sim::SimStorage,
        store::testing::{commit, create, open, write},
        types::GroupId,
    };

    const V: VolumeId = VolumeId(1);
    const OLD: [u8; 512] = [7; 512];

    /// Block 3 was written, a snapshot taken, and the block written over; its old version has a flipped bit.
    fn made() -> (Arc<Store>, SnapshotId, Suspect) {
        let disk = SimStorage::new(1);
        let store = open(Arc::new(disk.clone()), 1);
        create(&store, 1);
        write(&store, 1, 3, 7);
        let (snapshot, _) = store.take_snapshot(GroupId(1), "s", 5).unwrap();
        commit(&store);
        write(&store, 1, 3, 8);
        let seen = store.seen_by_snapshot(snapshot.id, V, 3).unwrap().unwrap();
        let bytes = disk.read_all("pool-0").unwrap();
        let at = bytes.chunks_exact(512).position(|block| *block == OLD).unwrap() as u64;
        disk.corrupt("pool-0", at * 512 + 5, 1);
        assert_eq!(store.check_suspect(seen).unwrap(), Checked::Damaged(Owner::Snapshot));
        (store, snapshot.id, seen)
    }

    #[test]
    fn a_version_of_a_snapshot_is_mended_where_it_lies_and_with_nothing_else() {
        let (store, snapshot, seen) = made();
        assert_eq!(store.mirrored_sight(seen).unwrap(), Some(snapshot));
        for other in [&[8; 512][..], &[0; 512], &OLD[..511]] {
            assert_eq!(store.mend_version(seen, other).unwrap(), Mended::No);
        }
        assert_eq!(store.check_suspect(seen).unwrap(), Checked::Damaged(Owner::Snapshot));
        assert_eq!(store.mend_version(seen, &OLD).unwrap(), Mended::Yes);
        assert_eq!(store.maybe_mended().unwrap(), [seen]);
        assert_eq!(store.check_suspect(seen).unwrap(), Checked::Sound);
        assert_eq!(store.snapshot_reader(snapshot, V).unwrap().read(3, 1).unwrap()[..], OLD);
        assert_eq!(store.read(V, 3, 1).unwrap().data[..], [8; 512]);
    }

    #[test]
    fn a_version_that_nobody_owns_any_more_is_left_alone() {
        let (store, snapshot, seen) = made();
        store.drop_snapshot(snapshot, 6).unwrap();
        commit(&store);
        while store.sweep() {}
        assert_eq!(store.mend_version(seen, &OLD).unwrap(), Mended::No);
        assert_eq!(store.mirrored_sight(seen).unwrap(), None);
        // What the head sees is for a record.
        let head = store.pool.lock().place_of(V, None, 3).unwrap().unwrap();
        let head = Suspect { segment: head, ..seen };
        assert_eq!(store.mend_version(head, &[8; 512]).unwrap(), Mended::No);
    }
}
