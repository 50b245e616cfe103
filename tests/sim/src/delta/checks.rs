//! What must be true of delta mode at every instant.
//!
//! - P2: where the newest image of the primary differs from the image of the backup, the block is in the active set, in
//!   the frozen set, or has a retained item. Compared bit by bit, with the backup as it is and as a power cut would leave
//!   it: what the backup loses then must not have been cleared or released.
//! - P3: the end of a run and every release are covered by what the backup holds durably (the same power cut).
//! - P4: in a run the backup's image is that of before it.
//! - The data of a run is the image at its cut: not that of the head, nor of a head that had not come to the cut.
//! - The ledger equals a recount of what is retained.
//! - The excess of a run is bounded: each block that it carries was written since the position that the primary knows the
//!   backup to hold. So a block that is equal on both sides was written again with the content it had, or the answer that
//!   covers its last write was not heard before the switch: at most what was in flight. Only a recovery adds to that: a
//!   checkpoint stores the tables as of a later record than the state, so records that a crash loses leave their marks,
//!   and marks that a commit has cleared since the checkpoint come back, until the next commit.
//! - At rest: no marks, no items, no snapshots.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use rand::Rng;
use understudy_common::{
    delta::BlockSet,
    state::PrimaryRun,
    store::Store,
    types::{GroupId, Lsn, VolumeId},
};

use understudy_primary::runner::RunRequest;

use super::{
    super::{
        BLOCK, Outcome, World, broken,
        model::{Event, Stamp, What},
    },
    port::{self, Mode},
};

impl World {
    /// P2 against the backup as it is.
    pub(super) fn check_cover(&self) -> Outcome {
        match &self.backup.store {
            Some(store) => self.check_cover_of(store, "the backup"),
            None => Ok(()),
        }
    }

    fn check_cover_of(&self, backup: &Arc<Store>, who: &str) -> Outcome {
        // Of another disk than the one it knows the table says nothing.
        if !self.delta.as_ref().is_some_and(|delta| delta.bound) || self.primary.store.is_none() {
            return Ok(());
        }
        let store = self.primary.store();
        for (volume, spec) in self.model.live() {
            let lanes = port::view(backup, spec.group).map(|view| view.lanes).unwrap_or_default();
            let newest = self.model.image(volume, Lsn(u64::MAX)).expect("it is live");
            let held = self.model.image_of(volume, &lanes).unwrap_or_default();
            let mut marks = port::marks(store, volume);
            marks.union_with(&store.ledger(spec.group).marks(volume));
            for (block, newest) in (0..).zip(&newest) {
                // What a volume has not, reads as zeros when it has it.
                let held = usize::try_from(block).ok().and_then(|b| held.get(b)).copied().unwrap_or(Stamp(0));
                if held != *newest && !marks.contains(block) {
                    return Err(broken(format!(
                        "block {block} of volume {volume} is not marked and not retained: {who} at {lanes:?} has {held:?}, the primary {newest:?}, and is in {:?}",
                        port::mode(store, spec.group)
                    )));
                }
            }
        }
        Ok(())
    }

    /// P2, P3 and P4 of the backup if its power failed now: a copy of it loses what is not synced, and recovers.
    pub(super) fn check_power_cut_of_backup(&mut self) -> Outcome {
        if self.backup.store.is_none() {
            return Ok(());
        }
        let disk = self.backup.disk.fork();
        disk.clear_faults();
        disk.crash(&mut self.rng);
        let opened = self.backup.open_disk(&disk, &mut self.rng);
        let (store, _) = opened.map_err(|e| broken(format!("a copy of the backup does not open: {e}")))?;
        self.summary.count("power cuts of a copy of the backup", 1);
        self.check_replica(&store)?;
        if !self.delta().bound {
            return Ok(());
        }
        self.check_cover_of(&store, "the backup after a power cut")?;
        for group in port::groups(self.primary.store()) {
            let primary = self.primary.store();
            // Its last volume is gone: a backup that knows nothing of it holds all of it.
            let gone = primary.with_state(|state| state.volumes_of(group).next().is_none());
            if gone || port::is_full(primary, group) {
                continue;
            }
            let lanes = port::view(&store, group).map(|view| view.lanes).unwrap_or_default();
            for (lane, of) in self.primary.store().retained_of(group).lanes() {
                let (acked, held) = (of.acked, lanes.of(lane).lsn);
                if held < acked {
                    return Err(broken(format!(
                        "lane {lane} of group {group} counts as held up to {acked}, but the backup has it durably up to \
                         {held}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Each block that a run ships or compares is that of the image at its cut.
    pub(super) fn check_claims(&self, run: &PrimaryRun, request: &RunRequest) -> Outcome {
        let mut images = BTreeMap::new();
        for (volume, block, claim) in port::claims(request).map_err(broken)? {
            let image =
                images.entry(volume).or_insert_with(|| self.model.image(volume, Lsn(run.id)).unwrap_or_default());
            let at = usize::try_from(block).expect("small").min(image.len());
            if !claim.holds(&image[at..]) {
                return Err(broken(format!(
                    "a run says of block {block} of volume {volume} what is not in the image at its cut {}, which has {:?}",
                    run.id,
                    image.get(at),
                )));
            }
        }
        Ok(())
    }

    /// Counts what a run is about to copy though the backup holds it, and bounds it: see the module.
    pub(super) fn check_excess(&mut self, group: GroupId, run: &PrimaryRun) -> Outcome {
        let (store, delta) = (Arc::clone(self.primary.store()), self.delta());
        let recovered = delta.recovered.contains(&group);
        // Of a backup that needs everything the table says nothing.
        if !delta.bound || port::is_full(&store, group) {
            return Ok(());
        }
        let Some(backup) = self.backup.store.clone() else { return Ok(()) };
        let base = store.retained_of(group).acked();
        let held = port::view(&backup, group).map_or(Lsn::ZERO, |view| view.position.lsn);
        for spec in &run.specs {
            let image = |position| self.model.image(spec.id, position).unwrap_or_default();
            let (old, new) = (image(held), image(Lsn(run.id)));
            let (mut marked, mut same, mut unheard, mut kept) = (0, 0, 0, 0);
            let mut frozen = store.frozen(spec.id);
            frozen.truncate(spec.block_count());
            for block in frozen.iter_runs().flat_map(|(first, count)| first..first + count) {
                marked += 1;
                let at = usize::try_from(block).expect("small");
                // Where everything is to go, a new volume is marked whole, and a new end.
                let made = |e: &Event| e.volume == spec.id && matches!(e.what, What::Create(_) | What::Resize { .. });
                let touched = |e: &Event| e.touches(spec.id, block).is_some() || made(e);
                let written = |e: &&Event| e.lsn > base && e.lsn.0 < run.id && touched(e);
                let last = self.model.history.iter().rev().find(written).map(|event| event.lsn);
                if last.is_none() && !recovered {
                    return Err(broken(format!(
                        "block {block} of volume {} is marked, and no write since {base} has marked it",
                        spec.id
                    )));
                }
                if old.get(at).copied().unwrap_or(Stamp(0)) != new.get(at).copied().unwrap_or(Stamp(0)) {
                    continue;
                }
                match last {
                    None => kept += 1,
                    Some(last) if last <= held => unheard += 1,
                    Some(_) => same += 1,
                }
            }
            self.summary.count("blocks marked at cuts", marked);
            self.summary.count("blocks marked and equal", same + unheard + kept);
            self.summary.count("blocks marked and equal: written again with the same content", same);
            self.summary.count("blocks marked and equal: the answer was not heard", unheard);
            self.summary.count("blocks marked and equal: kept by a recovery", kept);
        }
        Ok(())
    }

    /// The ledgers equal a recount.
    pub(super) fn check_ledgers(&self) -> Outcome {
        if self.delta.is_none() || self.primary.store.is_none() {
            return Ok(());
        }
        port::groups(self.primary.store()).into_iter().try_for_each(|group| self.check_ledger(group))
    }

    fn check_ledger(&self, group: GroupId) -> Outcome {
        let store = self.primary.store();
        let retained = store.retained_of(group);
        let from = match port::mode(store, group) {
            Some(Mode::Continuous { from }) => Some(from),
            Some(Mode::Run(open)) if open.kind.retains() => Some(open.cut()),
            Some(Mode::Run(_) | Mode::Tracking) | None => None,
        };
        let (mut items, mut with_data) = (BTreeMap::<(VolumeId, u64), u64>::new(), BTreeSet::new());
        let mut cr_blocks = 0;
        let counts = |e: &&Event| {
            e.group == group && from.is_some_and(|from| e.lsn >= from) && e.lsn > retained.lane(e.lane).acked
        };
        for event in self.model.history.iter().filter(counts) {
            let What::Write { first, count, stamp } = event.what else { continue };
            for block in first..first + count {
                *items.entry((event.volume, block)).or_default() += 1;
                if stamp.0 != 0 {
                    cr_blocks += 1;
                    with_data.insert((event.volume, block));
                }
            }
        }
        let ledger = store.ledger(group);
        let bytes = |blocks: usize| blocks as u64 * BLOCK as u64;
        let (cr, dr) = (bytes(cr_blocks), bytes(with_data.len()));
        if (ledger.cr_bytes(), ledger.dr_bytes()) != (cr, dr) {
            return Err(broken(format!(
                "the ledger of group {group} has {} and {} bytes, a recount {cr} and {dr}",
                ledger.cr_bytes(),
                ledger.dr_bytes()
            )));
        }
        for spec in self.model.ever().filter(|spec| spec.group == group) {
            let mut expected = BlockSet::new();
            for (_, block) in items.keys().filter(|(volume, _)| *volume == spec.id) {
                expected.insert_range(*block, 1);
            }
            if ledger.marks(spec.id) != expected {
                return Err(broken(format!("the ledger's blocks of volume {} are not those of a recount", spec.id)));
            }
        }
        for ((volume, block), count) in items {
            let found = ledger.items(volume, block);
            if found != count {
                return Err(broken(format!(
                    "the ledger has {found} items of block {block} of volume {volume}, a recount {count}"
                )));
            }
        }
        Ok(())
    }

    /// Nothing of delta mode is left when the pair is at rest.
    pub(crate) fn check_delta_at_rest(&mut self) -> Outcome {
        if self.delta.is_none() {
            return Ok(());
        }
        self.check_ledgers()?;
        self.check_cover()?;
        let store = self.primary.store();
        for (volume, spec) in self.model.live() {
            if !port::marks(store, volume).is_empty() || store.ledger(spec.group).ratio().is_some() {
                return Err(broken(format!("the pair is at rest and volume {volume} has marks")));
            }
            let view = port::view(self.backup.store(), spec.group);
            if view.as_ref().is_none_or(|view| view.in_run || !view.consistent) {
                return Err(broken(format!(
                    "the pair is at rest and the backup says {view:?} of group {}",
                    spec.group
                )));
            }
        }
        for (who, node) in [("primary", &self.primary), ("backup", &self.backup)] {
            let left = port::run_layers(node.store());
            if !left.is_empty() {
                return Err(broken(format!("the pair is at rest and the {who} holds the snapshots {left:?}")));
            }
        }
        if self.rng.random_bool(0.3) { self.check_power_cut_of_backup() } else { Ok(()) }
    }
}
