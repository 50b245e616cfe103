//! The oracle: compares what the nodes hold with the history.

use std::sync::Arc;

use rand::Rng;
use understudy_common::{
    state::{LanePlaces, Place},
    store::{ReadFailure, Store},
    types::{AckRule, GroupId, Lsn, Position, VolumeId, VolumeSpec},
};

use super::{
    BLOCK, Outcome, World, broken, delta,
    model::{Model, Stamp},
};

fn compare(model: &Model, store: &Arc<Store>, volume: VolumeId, position: Lsn, who: &str) -> Outcome {
    let image = model.image(volume, position).expect("the caller knows that it exists");
    let read = match store.read(volume, 0, image.len() as u64) {
        Ok(read) => read,
        Err(error) => return Err(broken(format!("{who}: volume {volume} cannot be read: {error}"))),
    };
    compare_bytes(&read.data, &image, &format!("{who}: volume {volume}"), position)
}

pub(super) fn compare_bytes(bytes: &[u8], image: &[Stamp], what: &str, position: Lsn) -> Outcome {
    for (block, (bytes, expected)) in bytes.chunks_exact(BLOCK).zip(image).enumerate() {
        let found = Stamp::of(bytes);
        if found != Some(*expected) {
            return Err(broken(format!(
                "{what} block {block} holds {found:?}, the image at {position} has {expected:?}"
            )));
        }
    }
    Ok(())
}

/// Every lane is there.
pub(super) fn everywhere(lsn: Lsn) -> LanePlaces {
    LanePlaces::all(Place { position: Position { generation: 1, lsn }, time_unix_ms: 0 })
}

impl World {
    /// P1 on the primary after a recovery: its image is exactly the history up to what it recovered. That everything
    /// acknowledged is in there the model has checked.
    pub(super) fn check_primary_image(&self) -> Outcome {
        let store = self.primary.store();
        let newest = Lsn(store.next_lsn().0 - 1);
        let expected = self.model.live();
        store.with_state(|state| {
            if state.volumes == expected { Ok(()) } else { Err(broken("the primary's catalogue is not the history's")) }
        })?;
        expected.keys().try_for_each(|volume| compare(&self.model, store, *volume, newest, "the primary"))
    }

    /// P4: each group on the backup is the image at the position the backup names; P1 for `both`.
    pub(super) fn check_backup_image(&self) -> Outcome {
        self.check_replica(self.backup.store())
    }

    /// The same of any store that recovered from the backup's disk. What is read is what a reader gets: in a run, the
    /// image of before it.
    pub(super) fn check_replica(&self, store: &Arc<Store>) -> Outcome {
        let volumes: Vec<VolumeSpec> = store.with_state(|state| state.volumes.values().cloned().collect());
        let mut groups: Vec<GroupId> = self.model.ever().map(|spec| spec.group).collect();
        groups.sort_unstable();
        groups.dedup();
        for group in groups {
            let view = delta::view(store, group);
            let lanes = match &view {
                Some(view) => view.lanes.clone(),
                // Its last volume was deleted, or nothing of it has come yet.
                None if store.with_state(|state| state.is_gone(group)) => everywhere(Lsn::MAX),
                None => LanePlaces::default(),
            };
            let position = view.as_ref().map_or(Lsn::ZERO, |view| view.position.lsn);
            self.model.check_order(group, &lanes)?;
            let mut expected = self.model.volumes_where(|e| e.group == group && e.is_in(&lanes));
            if view.is_some_and(|view| !view.consistent) {
                // It says so itself: it has no image of the group yet, and shows none.
                expected.clear();
            }
            for spec in expected.values() {
                let found = volumes.iter().find(|v| v.id == spec.id);
                if found != Some(spec) {
                    return Err(broken(format!("the backup at {position} has {found:?}, not {spec:?}")));
                }
                let image = self.model.image_of(spec.id, &lanes).expect("it is there at its position");
                let Some(data) = delta::read(store, spec) else { continue };
                let data =
                    data.map_err(|error| broken(format!("the backup: volume {} cannot be read: {error}", spec.id)))?;
                compare_bytes(&data, &image, &format!("the backup: volume {}", spec.id), position)?;
            }
            if let Some(extra) = volumes.iter().find(|v| v.group == group && !expected.contains_key(&v.id)) {
                return Err(broken(format!("the backup at {position} still has volume {}", extra.id)));
            }
            if !self.model.live().values().any(|spec| spec.group == group) {
                // Deleted: nobody will ask for it, and a disk put in since need not have it.
                continue;
            }
            let lost = |e: &&super::model::Event| e.group == group && e.acked == Some(true) && !e.is_in(&lanes);
            if let Some(lost) = self.model.history.iter().find(lost) {
                return Err(broken(format!(
                    "write {} was acknowledged as durable on both sides; the backup is at {position}, {lanes:?}",
                    lost.lsn
                )));
            }
        }
        Ok(())
    }

    /// Starts reading an image of a volume on the backup.
    pub(super) fn open_image(&mut self) -> Outcome {
        let store = self.backup.store();
        let volumes: Vec<VolumeId> = store.with_state(|state| state.volumes.keys().copied().collect());
        if self.image.is_some() || volumes.is_empty() {
            return Ok(());
        }
        let volume = volumes[self.rng.random_range(0..volumes.len())];
        match store.open_image(volume, self.time) {
            Ok(image) => {
                self.image = Some((image, volume, self.now + self.rng.random_range(10..200)));
                Ok(())
            }
            Err(ReadFailure::Failed(_) | ReadFailure::Submit(_)) => Ok(()),
            Err(error) => Err(broken(format!("no image can be read: {error}"))),
        }
    }

    /// The image is that of its position, whatever came behind it.
    pub(super) fn compare_image(&mut self) -> Outcome {
        let Some((image, volume, _)) = self.image.take() else { return Ok(()) };
        let store = self.backup.store();
        if store.marks().borrow().applied < image.ready_at() {
            self.image = Some((image, volume, self.now + 10));
            return Ok(());
        }
        let Position { lsn, .. } = image.position();
        let expected =
            self.model.image_of(volume, image.lanes()).ok_or_else(|| broken("an image of what was never there"))?;
        match image.read(0, image.spec().block_count()) {
            Ok(data) => {
                compare_bytes(&data, &expected, &format!("an image of volume {volume} on the backup:"), lsn)?;
                if data.len() != expected.len() * BLOCK {
                    return Err(broken(format!("an image of volume {volume} has another size than at {lsn}")));
                }
                self.summary.count("images read on the backup", 1);
                Ok(())
            }
            // The image went with its volume.
            Err(_) if !store.with_state(|state| state.volumes.contains_key(&volume)) => Ok(()),
            Err(ReadFailure::Failed(_)) => Ok(()),
            Err(error) => Err(broken(format!("an image of volume {volume} cannot be read: {error}"))),
        }
    }

    /// P5.
    pub(super) fn check_at_rest(&mut self) -> Outcome {
        self.check_primary_image()?;
        self.check_backup_image()?;
        let expected = self.model.live();
        if self.backup.store().with_state(|state| state.volumes != expected) {
            return Err(broken("the pair is at rest and the backup has other volumes than the primary"));
        }
        for volume in expected.keys() {
            compare(&self.model, self.backup.store(), *volume, Lsn(u64::MAX), "the backup at rest")?;
        }
        let boot = self.model.boot;
        let waits = self.model.history.iter().find(|e| {
            // A volume that is gone has nobody who waits; before a crash nobody heard of `placed`.
            e.acked.is_none() && expected.contains_key(&e.volume) && (e.rule != AckRule::Primary || e.boot == boot)
        });
        match waits {
            Some(event) => Err(broken(format!("the pair is at rest and write {} is not acknowledged", event.lsn))),
            None => Ok(()),
        }
    }

    /// I15: a byte of a journal goes bad. Either nothing that a later batch calls durable is missing, or it says so.
    pub(super) fn check_damaged_journal(&mut self) -> Outcome {
        let node = if self.rng.random() { &self.primary } else { &self.backup };
        let Some(durable) = node.durable_before else { return Ok(()) };
        for _ in 0..3 {
            let disk = node.disk.fork();
            disk.kill();
            let names =
                understudy_common::storage::Storage::list(&disk, "journal").map_err(|e| broken(e.to_string()))?;
            let name = format!("journal/{}", names[self.rng.random_range(0..names.len())]);
            let size = disk.read_all(&name).map_err(|e| broken(e.to_string()))?.len() as u64;
            if size == 0 {
                continue;
            }
            disk.corrupt(&name, self.rng.random_range(0..size), 1 << self.rng.random_range(0..8));
            match node.open_disk(&disk, &mut self.rng) {
                Err(_) => self.summary.count("damaged journals refused", 1),
                Ok((store, _)) if store.next_lsn() <= durable => {
                    let end = Lsn(store.next_lsn().0 - 1);
                    return Err(broken(format!(
                        "a journal damaged in its middle was taken for one that ends at {end}; {durable} was durable"
                    )));
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }
}
