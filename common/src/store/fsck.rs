//! Checks the directory of a stopped node, without changing a byte of it.
//!
//! [`super::inspect`] tells whether the node would start; here is told whether what it would start from is whole: the
//! catalogue agrees with itself, every block version has one owner, the counts are those of the maps, and, if that is asked
//! for, every block matches its checksum. The caller holds the directory's lock.
//!
//! Everything is as of the last checkpoint. A block that a record behind it writes is left out of the comparison with
//! checksums: a crash may have left a part of that write, and recovery writes it anew. So is a version that nobody sees any
//! more: of a volume or a snapshot that was deleted and is being freed, or of one that went with the process which read it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{
    catalog::{Catalog, DEFAULT_CACHE_BYTES},
    delta::BlockSet,
    journal::Journal,
    pool::PoolCheck,
    record::{self, Record},
    state::NodeState,
    storage::Storage,
    types::{GroupId, Lsn, VolumeId},
};

use super::{
    Identity, OpenError, Role, Root,
    checkpoint::ROOT,
    delta, inspect,
    recovery::{IDENTITY, load},
    retained::Acked,
};

/// Problems that are told by name.
const PROBLEMS_MAX: usize = 1000;

/// What was checked, and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Checkup {
    /// Which half of a pair.
    pub role: Role,
    /// This directory, in hexadecimal.
    pub instance: String,
    /// The newest record that the last checkpoint includes.
    pub checkpoint_lsn: u64,
    /// Segments of the pool.
    pub segments: u64,
    /// Of which a layer owns a block.
    pub owned_segments: u64,
    /// The others.
    pub free_segments: u64,
    /// Block versions that have an owner.
    pub owned_blocks: u64,
    /// Bytes that were read and compared with their checksums; absent if that was not asked for or not possible.
    pub compared_bytes: Option<u64>,
    /// Blocks that were left out of that, because the journal writes them anew.
    pub journaled_blocks: u64,
    /// All problems.
    pub problem_count: u64,
    /// What is wrong: the first thousand.
    pub problems: Vec<String>,
}

/// Checks the node in `storage`. With `data`, every block; the devices are where the last checkpoint says, or at `devices`,
/// in their order.
///
/// # Errors
/// If there is no node, or its catalogue cannot be read or understood.
pub fn fsck(storage: &dyn Storage, data: bool, devices: &[String]) -> Result<Checkup, OpenError> {
    let found = inspect(storage)?;
    let catalog = Catalog::open_read_only(storage, DEFAULT_CACHE_BYTES)?;
    let identity: Identity = load(&catalog, IDENTITY)?;
    let root: Root = load(&catalog, ROOT)?;
    let view = catalog.read()?;
    let mut out = Checkup {
        role: identity.role,
        instance: identity.instance.to_string(),
        checkpoint_lsn: root.applied.0,
        segments: 0,
        owned_segments: 0,
        free_segments: 0,
        owned_blocks: 0,
        compared_bytes: None,
        journaled_blocks: 0,
        problem_count: 0,
        problems: Vec::new(),
    };
    let mut problems = Problems::default();
    found.problems.into_iter().for_each(|problem| problems.add(problem));
    let mut problem = |what: String| problems.add(what);
    let last = found.journal.as_ref().map_or(root.applied, |journal| Lsn(journal.last_lsn).max(root.applied));
    check_root(&identity, &root, last, &mut problem);
    let mut rows = delta::Stored::new();
    view.delta(|volume, set, page, blob| {
        rows.entry((VolumeId(volume), set)).or_default().push((page, blob.to_vec()));
    })?;
    if let Err(why) = delta::Side::load(rows) {
        problem(why);
    }
    let written = journaled(storage, &identity, &root);
    out.journaled_blocks = written.values().map(BlockSet::len).sum();
    match PoolCheck::load(&view, identity.instance, &root.state.readers().collect()) {
        // Told by the inspection.
        Err(_) => {}
        Ok(pool) => {
            check_volumes(&root.state, &pool, &mut problem);
            let counted = pool.maps(&view, &mut problem)?;
            (out.segments, out.owned_segments) = (counted.segments, counted.owned_segments);
            (out.free_segments, out.owned_blocks) =
                (counted.segments.saturating_sub(counted.owned_segments), counted.owned_blocks);
            let known = pool.device_paths();
            let paths = if devices.is_empty() { &known[..] } else { devices };
            if paths.iter().any(String::is_empty) {
                problem("the catalogue does not know the paths of the devices: name each with --device".into());
            } else if let Some(io) = pool.open(storage, paths, &mut problem)?
                && data
            {
                let skip = |volume, block| written.get(&volume).is_some_and(|blocks: &BlockSet| blocks.contains(block));
                out.compared_bytes = Some(pool.data(&view, &io, &skip, &mut problem)?);
            }
        }
    }
    (out.problem_count, out.problems) = (problems.count, problems.list);
    Ok(out)
}

#[derive(Default)]
struct Problems {
    count: u64,
    list: Vec<String>,
}

impl Problems {
    fn add(&mut self, problem: String) {
        self.count += 1;
        if self.list.len() < PROBLEMS_MAX && !self.list.contains(&problem) {
            self.list.push(problem);
        }
    }
}

/// Blocks that records behind the checkpoint write.
fn journaled(storage: &dyn Storage, identity: &Identity, root: &Root) -> BTreeMap<VolumeId, BlockSet> {
    let mut written: BTreeMap<VolumeId, BlockSet> = BTreeMap::new();
    // What is wrong with the journal was told by the inspection.
    let _ = Journal::scan(storage, identity.instance, root.trim, &record::verify, &mut |raw| {
        if let Ok(record) = Record::decode(&raw.head, &raw.data)
            && raw.lsn > root.applied
            && let Some(range) = record.range()
        {
            written.entry(range.volume).or_default().insert_range(range.first, range.count);
        }
        Ok(())
    });
    written
}

/// The state agrees with itself, with the identity and with the journal, which ends at `last`.
fn check_root(identity: &Identity, root: &Root, last: Lsn, problem: &mut dyn FnMut(String)) {
    let state = &root.state;
    if root.trim.lsn > root.applied.next() {
        problem(format!("the journal is trimmed up to {}, the checkpoint is of {}", root.trim.lsn, root.applied));
    }
    if identity.role == Role::Primary && identity.generation == 0 {
        problem("a primary of generation 0".into());
    }
    for (id, group) in &state.groups {
        let own = identity.role == Role::Primary;
        if own && group.position.lsn > root.applied {
            problem(format!("group {id} is at {}, the checkpoint is of {}", group.position, root.applied));
        }
        if group.position.generation > identity.generation {
            let generation = identity.generation;
            problem(format!("group {id} is at {}, and the node is of generation {generation}", group.position));
        }
        if let Some(acked) = root.acked.get(id).map(Acked::newest).filter(|acked| *acked > last) {
            problem(format!("the backup has acknowledged group {id} up to {acked}, the journal ends at {last}"));
        }
        if group.run.as_ref().is_some_and(|run| run.cut < group.position) {
            problem(format!("group {id} is at {}, behind the cut of the run that it is in", group.position));
        }
        for volume in &group.volumes {
            if state.volumes.get(volume).is_none_or(|spec| spec.group != *id) {
                problem(format!("group {id} lists volume {volume}, which is not in it"));
            }
        }
    }
    for (id, spec) in &state.volumes {
        let listed = state.groups.get(&spec.group).is_some_and(|group| group.volumes.contains(id));
        if !listed || spec.id != *id {
            problem(format!("volume {id} is in group {}, which does not list it", spec.group));
        }
        if *id > state.last_volume || spec.group > state.last_group {
            problem(format!("volume {id} of group {} has an id that was never given", spec.group));
        }
    }
    let orphans = state.layers.iter().filter(|(layer, _)| **layer > state.last_layer);
    orphans.for_each(|(layer, _)| problem(format!("snapshot {layer} has an id that was never given")));
    for snapshot in state.snapshots.values().filter(|s| s.id > state.last_snapshot) {
        problem(format!("snapshot {} of group {} has an id that was never given", snapshot.name, snapshot.group));
    }
    for id in root.acked.keys().filter(|id| **id > state.last_group || **id == GroupId::default()) {
        problem(format!("the backup has acknowledged group {id}, which was never made"));
    }
}

/// The pool has the volumes and snapshots of the state: both are of one checkpoint.
fn check_volumes(state: &NodeState, pool: &PoolCheck, problem: &mut dyn FnMut(String)) {
    let volumes = pool.volumes();
    let in_run: Vec<_> = state.groups.values().filter_map(|g| g.run.as_ref()).flat_map(|run| &run.specs).collect();
    for (id, spec) in &state.volumes {
        let Some(known) = volumes.iter().find(|v| v.spec.id == *id && !v.deleting) else {
            problem(format!("volume {id} is not in the pool"));
            continue;
        };
        // It may have been larger, and a run grows it before its commit.
        let size = in_run.iter().find(|s| s.id == *id).map_or(spec.size_bytes, |s| s.size_bytes.max(spec.size_bytes));
        if known.spec.size_bytes < size || known.spec.block_size != spec.block_size {
            problem(format!("volume {id} has {size} bytes, and {} in the pool", known.spec.size_bytes));
        }
    }
    for known in volumes.iter().filter(|v| !v.deleting) {
        let id = known.spec.id;
        if !state.volumes.contains_key(&id) && !in_run.iter().any(|spec| spec.id == id) {
            problem(format!("the pool has volume {id}, which does not exist"));
        }
        for layer in known.layers.iter().filter(|layer| state.layers.get(layer) != Some(&id)) {
            problem(format!("the pool has snapshot {layer} of volume {id}, which does not exist"));
        }
    }
    for (layer, volume) in &state.layers {
        if !volumes.iter().any(|v| v.spec.id == *volume && !v.deleting && v.layers.contains(layer)) {
            problem(format!("snapshot {layer} of volume {volume} is not in the pool"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        storage::sim::SimStorage,
        store::testing::{checkpoint, commit, create, open, write},
        types::SnapshotId,
    };

    /// Two volumes, a snapshot that owns a version, a checkpoint, and a write behind it.
    fn made() -> SimStorage {
        let disk = SimStorage::new(1);
        let store = open(Arc::new(disk.clone()), 2);
        create(&store, 1);
        create(&store, 2);
        for block in [0, 1, 300] {
            write(&store, 1, block, 7);
            write(&store, 2, block, 9);
        }
        // Kept as a crash keeps it.
        std::mem::forget(store.open_image(VolumeId(1), 5).unwrap());
        write(&store, 1, 0, 8);
        checkpoint(&store);
        write(&store, 2, 300, 10);
        disk
    }

    fn problems(disk: &SimStorage) -> Vec<String> {
        fsck(disk, true, &[]).unwrap().problems
    }

    #[test]
    fn a_whole_directory_has_no_problems_and_stays_as_it_is() {
        let disk = made();
        let before = disk.read_all("catalog.redb").unwrap();
        let found = fsck(&disk, true, &[]).unwrap();
        assert_eq!(found.problems, Vec::<String>::new());
        assert_eq!((found.owned_blocks, found.journaled_blocks), (7, 1));
        // Not the one of the image, which went with its process.
        assert_eq!(found.compared_bytes, Some(6 * 512));
        assert_eq!(found.segments, found.owned_segments + found.free_segments);
        assert_eq!(disk.read_all("catalog.redb").unwrap(), before);
    }

    #[test]
    fn a_flipped_byte_is_found_where_blocks_are_read_and_only_there() {
        let disk = made();
        let bytes = disk.read_all("pool-0").unwrap();
        let at = bytes.chunks_exact(512).position(|block| *block == [9; 512]).unwrap() as u64;
        disk.corrupt("pool-0", at * 512 + 5, 1);
        assert_eq!(fsck(&disk, false, &[]).unwrap().problem_count, 0);
        let found = problems(&disk);
        assert!(found.len() == 1 && found[0].starts_with("volume 2 block 0 in segment"), "{found:?}");
    }

    #[test]
    fn a_block_that_the_journal_writes_anew_may_be_torn() {
        let disk = made();
        let bytes = disk.read_all("pool-0").unwrap();
        let at = bytes.chunks_exact(512).position(|block| *block == [10; 512]).unwrap() as u64;
        disk.corrupt("pool-0", at * 512 + 5, 1);
        assert_eq!(problems(&disk), Vec::<String>::new());
    }

    /// As [`made`], with a flipped byte in the version of block 0 of volume 1 that only the snapshot owns.
    #[test]
    fn a_damaged_version_is_told_as_long_as_somebody_sees_it() {
        let flip = |disk: &SimStorage| {
            let bytes = disk.read_all("pool-0").unwrap();
            let at = bytes.chunks_exact(512).position(|block| *block == [7; 512]).unwrap() as u64;
            disk.corrupt("pool-0", at * 512 + 5, 1);
        };
        // The image went with the process that read it, whether or not it was given back.
        let disk = made();
        flip(&disk);
        assert_eq!(problems(&disk), Vec::<String>::new());

        // A snapshot of the user is there until it is deleted, and gone from then on, freed or not.
        let disk = SimStorage::new(1);
        let store = open(Arc::new(disk.clone()), 2);
        create(&store, 1);
        write(&store, 1, 0, 7);
        let group = GroupId(1);
        store.take_snapshot(group, "kept", 5).unwrap();
        commit(&store);
        write(&store, 1, 0, 8);
        checkpoint(&store);
        flip(&disk);
        let found = problems(&disk);
        assert!(found.len() == 1 && found[0].starts_with("volume 1 block 0 in segment"), "{found:?}");
        store.drop_snapshot(SnapshotId(1), 5).unwrap();
        commit(&store);
        checkpoint(&store);
        assert_eq!(problems(&disk), Vec::<String>::new());
    }

    #[test]
    fn whatever_is_wrong_in_the_catalogue_is_found() {
        type Damage = fn(&Catalog);
        fn chunk(catalog: &Catalog, tree: u64) -> Vec<u8> {
            catalog.read().unwrap().chunk(tree, 0, <[u8]>::to_vec).unwrap().unwrap()
        }
        fn change<T: Serialize + serde::de::DeserializeOwned>(catalog: &Catalog, key: &'static str, step: fn(&mut T)) {
            let mut value: T = load(catalog, key).unwrap();
            step(&mut value);
            let json = serde_json::to_vec(&value).unwrap();
            catalog.write(|txn| txn.put_meta(key, &json)).unwrap();
        }
        let cases: [(Damage, &str); 8] = [
            (|c| c.write(|txn| txn.remove_chunk(1, 0)).unwrap(), "its maps own 0"),
            (
                |c| {
                    let mut blob = chunk(c, 1);
                    blob[9] ^= 1;
                    c.write(|txn| txn.put_chunk(1, 0, &blob)).unwrap();
                },
                "is damaged",
            ),
            (
                |c| {
                    let blob = crate::pool::reseal(&chunk(c, 1), (1, 0), (2, 0));
                    c.write(|txn| txn.put_chunk(2, 0, &blob)).unwrap();
                },
                "belongs to volume 1 from block 0 on, and to volume 2",
            ),
            (
                |c| {
                    let blob = crate::pool::reseal(&chunk(c, 1), (1, 0), (77, 0));
                    c.write(|txn| txn.put_chunk(77, 0, &blob)).unwrap();
                },
                "belongs to no volume",
            ),
            (|c| c.write(|txn| txn.put_counts(0, 0, &[0; 4100])).unwrap(), "live counts of device 0 is damaged"),
            (|c| c.write(|txn| txn.put_delta(1, 0, 0, &[1, 2, 3])).unwrap(), "delta table of volume 1"),
            (
                |c| change::<Root>(c, ROOT, |root| drop(root.state.volumes.remove(&VolumeId(2)))),
                "the pool has volume 2, which does not exist",
            ),
            (
                |c| {
                    change::<Root>(c, ROOT, |root| {
                        root.state.groups.get_mut(&GroupId(1)).unwrap().position.lsn = Lsn(9999);
                    });
                },
                "group 1 is at 1:9999",
            ),
        ];
        for (damage, told) in cases {
            let disk = made();
            disk.kill();
            damage(&Catalog::open(&disk, DEFAULT_CACHE_BYTES).unwrap());
            let found = problems(&disk);
            assert!(found.iter().any(|problem| problem.contains(told)), "{told:?} is not in {found:?}");
        }
    }
}
