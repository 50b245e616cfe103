//! What the directory of a stopped node holds, read without changing a byte of it.
//!
//! The same state as recovery would reach: the last checkpoint, then the records behind it. The catalogue is opened
//! under an overlay in memory and the journal for reading only. The caller holds the directory's lock.
//!
//! Deliberately absent: the devices. The catalogue holds no paths, and blocks are verified when they are read.

use serde::Serialize;

use crate::{
    catalog::{Catalog, DEFAULT_CACHE_BYTES},
    journal::{Journal, RecoverError, Scan},
    pool::{self, DeviceUse},
    record::{self, Record},
    storage::Storage,
    types::{AckRule, AwayRule, GroupId},
};

use super::{
    Identity, OpenError, Retained, Role,
    recovery::{IDENTITY, load, load_root},
};

/// What was found. Ids are hexadecimal, positions are `generation` and `lsn`, sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// Which half of a pair.
    pub role: Role,
    /// The pair; zeros on a backup that has not met its primary.
    pub pair: String,
    /// This directory.
    pub instance: String,
    /// Number of the ownership of the pair.
    pub generation: u64,
    /// Its random half.
    pub generation_id: String,
    /// The newest record that the last checkpoint includes.
    pub checkpoint_lsn: u64,
    /// Live volumes.
    pub volumes: Vec<VolumeFound>,
    /// Live groups.
    pub groups: Vec<GroupFound>,
    /// The journal; absent if it cannot be read, and then `problems` says why.
    pub journal: Option<JournalFound>,
    /// Size of a segment.
    pub segment_bytes: u32,
    /// Devices as of the last checkpoint.
    pub devices: Vec<DeviceUse>,
    /// What is wrong; empty if the node would start.
    pub problems: Vec<String>,
}

/// A live volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VolumeFound {
    /// Never reused.
    pub id: u64,
    /// Unique among live volumes.
    pub name: String,
    /// Name of its group.
    pub group: String,
    /// Its size.
    pub size_bytes: u64,
    /// Its block size.
    pub block_bytes: u32,
    /// When writes are acknowledged.
    pub ack: AckRule,
    /// While the backup is away.
    pub away: AwayRule,
}

/// A live group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GroupFound {
    /// Never reused.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Generation of its newest record.
    pub generation: u64,
    /// LSN of its newest record, as the primary counts.
    pub lsn: u64,
    /// The primary's time of that record, Unix milliseconds.
    pub time_unix_ms: i64,
    /// On a primary: what the backup had acknowledged at the last checkpoint.
    pub acked_lsn: Option<u64>,
    /// On a primary: payload of the records behind that, which the backup may have in part.
    pub retained_bytes: Option<u64>,
}

/// The journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JournalFound {
    /// Files in its directory.
    pub files: usize,
    /// Their bytes.
    pub file_bytes: u64,
    /// Bytes that hold records which are still needed.
    pub span_bytes: u64,
    /// Epoch of the last valid batch.
    pub epoch: u64,
    /// First LSN that is needed.
    pub first_lsn: u64,
    /// Last durable LSN; below `first_lsn` if nothing is needed.
    pub last_lsn: u64,
    /// Records from `first_lsn` on.
    pub records: u64,
    /// Bytes of a torn tail: opening drops them, none was acknowledged.
    pub torn_bytes: u64,
}

/// Reads the node in `storage`.
///
/// # Errors
/// If there is no node, or its catalogue cannot be read or understood. Trouble with the journal or the pool is a
/// problem of the [`Inspection`] instead.
pub fn inspect(storage: &dyn Storage) -> Result<Inspection, OpenError> {
    let catalog = Catalog::open_read_only(storage, DEFAULT_CACHE_BYTES)?;
    let identity: Identity = load(&catalog, IDENTITY)?;
    let root = load_root(&catalog)?;
    let mut problems = Vec::new();
    let (segment_bytes, devices) = match pool::inspect(&catalog.read()?, identity.instance) {
        Ok((segment_bytes, devices, found)) => {
            problems.extend(found);
            (segment_bytes, devices)
        }
        Err(error) => {
            problems.push(format!("pool: {error}"));
            (0, Vec::new())
        }
    };
    let (mut state, mut retained) = (root.state, Retained::from_acked(&root.acked));
    let scanned = Journal::scan(storage, identity.instance, root.trim, &record::verify, &mut |raw| {
        let record = Record::decode(&raw.head, &raw.data)
            .map_err(|error| RecoverError::Record { lsn: raw.lsn, reason: error.to_string() })?;
        if record.group != GroupId::default() && raw.lsn > retained.acked_of(record.group, record.lane) {
            retained.on_submitted(record.group, record.lane, raw.lsn, record.payload_bytes(), false);
        }
        if raw.lsn > root.applied {
            state.apply(raw.lsn, &record);
        }
        Ok(())
    });
    let journal = match scanned {
        Ok(scan) => {
            problems.extend(scan.corruption.clone());
            Some(journal_found(&scan, root.trim.lsn.0.max(1)))
        }
        Err(error) => {
            problems.push(format!("journal: {error}"));
            None
        }
    };
    let is_primary = identity.role == Role::Primary;
    Ok(Inspection {
        role: identity.role,
        pair: identity.pair.to_string(),
        instance: identity.instance.to_string(),
        generation: identity.generation,
        generation_id: identity.generation_id.to_string(),
        checkpoint_lsn: root.applied.0,
        volumes: state
            .volumes
            .values()
            .map(|v| VolumeFound {
                id: v.id.0,
                name: v.name.clone(),
                group: v.group_name.clone(),
                size_bytes: v.size_bytes,
                block_bytes: v.block_size.bytes(),
                ack: v.ack,
                away: v.away,
            })
            .collect(),
        groups: state
            .groups
            .values()
            .map(|g| {
                let of_group = retained.group(g.id);
                GroupFound {
                    id: g.id.0,
                    name: g.name.clone(),
                    generation: g.position.generation,
                    lsn: g.position.lsn.0,
                    time_unix_ms: g.time_unix_ms,
                    acked_lsn: is_primary.then_some(of_group.acked().0),
                    retained_bytes: is_primary.then_some(of_group.bytes()),
                }
            })
            .collect(),
        journal,
        segment_bytes,
        devices,
        problems,
    })
}

fn journal_found(scan: &Scan, first_lsn: u64) -> JournalFound {
    JournalFound {
        files: scan.files,
        file_bytes: scan.file_bytes,
        span_bytes: scan.span_bytes,
        epoch: scan.epoch,
        first_lsn,
        last_lsn: scan.next_lsn.0 - 1,
        records: scan.records,
        torn_bytes: scan.dropped_bytes,
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

    use super::*;
    use crate::{
        storage::RealStorage,
        store::{
            Store,
            testing::{checkpoint, create, open, write},
        },
        types::Lsn,
    };

    /// A primary with a volume, six writes, and a checkpoint behind the third.
    fn primary(folder: &Path) -> Arc<Store> {
        let store = open(Arc::new(RealStorage::new(folder).unwrap()), 1);
        create(&store, 1);
        for block in 0..6 {
            write(&store, 1, block * 128, 7);
            if block == 2 {
                store.release(GroupId(1), 0, Lsn(3), 1024, &[]);
                checkpoint(&store);
            }
        }
        store
    }

    fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
        let mut out = BTreeMap::new();
        for dir in ["", "journal"] {
            for entry in fs::read_dir(folder.join(dir)).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_file() {
                    let name = format!("{dir}/{}", entry.file_name().to_string_lossy());
                    out.insert(name, fs::read(entry.path()).unwrap());
                }
            }
        }
        out
    }

    fn copy(from: &Path, to: &Path) {
        fs::create_dir(to.join("journal")).unwrap();
        for (name, bytes) in content(from) {
            fs::write(to.join(name.trim_start_matches('/')), bytes).unwrap();
        }
    }

    fn look(folder: &Path) -> Inspection {
        let before = content(folder);
        let found = inspect(&RealStorage::new(folder).unwrap()).unwrap();
        assert!(content(folder) == before, "inspection changed a file");
        found
    }

    #[test]
    fn a_stopped_and_a_killed_node_show_what_they_held_and_stay_as_they_are() {
        let (stopped, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = primary(stopped.path());
        // What a SIGKILL leaves: all that was written, nothing tidied up.
        copy(stopped.path(), killed.path());
        let (durable, state, instance) = (store.marks().borrow().durable, store.state(), store.identity().instance);
        let retained = store.retained_of(GroupId(1));
        drop(store);
        for folder in [&stopped, &killed] {
            let found = look(folder.path());
            assert_eq!(found.problems, Vec::<String>::new());
            assert_eq!((found.role, found.generation), (Role::Primary, 1));
            assert_eq!(found.instance, instance.to_string());
            let journal = found.journal.unwrap();
            assert_eq!((journal.last_lsn, journal.torn_bytes), (durable.0, 0));
            assert_eq!(found.groups[0].lsn, state.groups[&GroupId(1)].position.lsn.0);
            assert_eq!(found.groups[0].acked_lsn, Some(3));
            assert_eq!(found.groups[0].retained_bytes, Some(retained.bytes()));
            assert_eq!((found.volumes.len(), found.volumes[0].name.as_str()), (1, "v1"));
            assert_eq!((found.devices.len(), found.devices[0].used), (1, 3), "as of the checkpoint");
        }
    }

    #[test]
    fn a_damaged_journal_is_a_problem_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        drop(primary(folder.path()));
        let path = folder.path().join("journal/00000000");
        let mut bytes = fs::read(&path).unwrap();
        // The second batch: the first one only starts the epoch.
        bytes[512 + 512 + 70] ^= 1;
        fs::write(&path, bytes).unwrap();
        let problems = look(folder.path()).problems;
        assert!(problems.len() == 1 && problems[0].contains("corrupt at byte 1024"), "{problems:?}");
    }
}
