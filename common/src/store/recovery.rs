//! Opening: the last checkpoint, then every record behind it through the same functions in the same order.
//!
//! The journal is read twice. The first pass proves it whole before anything is changed, and pins the segments that its
//! records refer to: a record's segments were taken when it was admitted, which is earlier than its place in the order
//! says, and replay must not give them to a record before it. The second pass applies.
//!
//! Time is proportional to the journal since the trim point. Recovery itself may be interrupted anywhere: it changes
//! nothing that a second one would not do again.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
};

use hashbrown::HashMap;
use parking_lot::{Condvar, Mutex};
use thiserror::Error;
use tokio::sync::watch;

use crate::{
    catalog::{Catalog, CatalogError, DEFAULT_CACHE_BYTES},
    history::{Generation, History},
    journal::{Journal, ReadError, RecoverError, TrimPoint},
    lane::LANES_MAX,
    lives::Lives,
    pool::{IoPlan, Pool, PoolError},
    record::{self, Op, Record, WriteData},
    state::NodeState,
    storage::Storage,
    types::{GroupId, Lsn, SegmentId, Uid, VolumeId},
};

use super::{
    Front, Identity, Marks, Retained, Role, Root, Store, StoreConfig, UnackedBoth,
    admission::{Touched, note_unacked},
    apply::{Applier, plan_record},
    checkpoint::{ROOT, write_root},
    delta,
    driver::Stats,
    overlay::Overlay,
    role,
};

/// Key of the identity in the catalogue.
pub(super) const IDENTITY: &str = "identity";
/// Key of the generations in the catalogue.
pub(super) const HISTORY: &str = "history";
/// Of a primary: [`Lives`].
pub(super) const LIVES: &str = "lives";
/// Payload replayed before it is written.
const REPLAY_BYTES: usize = 8 << 20;

/// What opening did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recovery {
    /// True for a directory that was empty.
    pub created: bool,
    /// Records replayed behind the checkpoint.
    pub replayed: u64,
    /// Records found in the journal.
    pub records: u64,
    /// Bytes of the journal that were read.
    pub bytes: u64,
    /// Bytes of a torn tail that were dropped: none of them was ever acknowledged.
    pub dropped_bytes: u64,
    /// The journal's epoch from now on.
    pub epoch: u64,
}

/// Why a store does not open.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The directory belongs to the other half of a pair.
    #[error(
        "this directory belongs to a {found}, not to a {wanted}: start understudy-{found} on it, or name another data_dir"
    )]
    Role {
        /// In the directory.
        found: Role,
        /// Of this binary.
        wanted: Role,
    },
    /// The catalogue.
    #[error("catalogue: {0}")]
    Catalog(#[from] CatalogError),
    /// What the catalogue holds is not understood.
    #[error("catalogue entry {key:?} is not understood ({why}): was it written by a newer version?")]
    Root {
        /// Which entry.
        key: &'static str,
        /// The parser's words.
        why: String,
    },
    /// The devices.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] RecoverError),
    /// Files.
    #[error("storage: {0}")]
    Io(#[from] io::Error),
    /// The role has changed, and the rest of the directory cannot follow. It is tried again with each start.
    #[error("the directory cannot be made that of its new role yet: {0}; mend that and start again")]
    Convert(String),
    /// A record cannot be applied.
    #[error("record {lsn} cannot be replayed: {why}")]
    Replay {
        /// Its place.
        lsn: Lsn,
        /// What happened.
        why: String,
    },
}

struct Replay {
    pool: Pool,
    state: NodeState,
    applied: Lsn,
    plan: IoPlan,
    planned_bytes: usize,
    retained: Retained,
    delta: delta::Side,
    /// Records before this one have done to the delta tables what they do, but for their marks.
    tables_next: Lsn,
    retain: bool,
    referenced: VecDeque<(Lsn, Vec<SegmentId>)>,
    unacked_both: UnackedBoth,
    replayed: u64,
}

impl Replay {
    /// First pass: what the record holds on to.
    fn on_found(&mut self, lsn: Lsn, record: &Record) {
        if let Op::Write { data: WriteData::Segments(segments, _), .. } = &record.op {
            for segment in segments {
                self.pool.pin(*segment);
            }
            self.referenced.push_back((lsn, segments.clone()));
        }
    }

    /// Second pass.
    fn on_record(&mut self, lsn: Lsn, record: &Record) -> Result<(), String> {
        // Up to the checkpoint it is only to be known what is retained.
        let chained = record.group != GroupId::default() && self.state.retains(record.group, lsn);
        if self.retain && (lsn > self.applied || chained) {
            self.delta.apply(&self.state, &mut self.retained, lsn, record, lsn >= self.tables_next);
        }
        if let Some(touched) = Touched::of(record, &self.state)
            && touched.both
            && self.retain
            && !self.retained.holds(record.group, Some(record.lane), lsn)
        {
            note_unacked(&mut self.unacked_both, &self.retained, &touched, record, lsn);
        }
        if lsn <= self.applied {
            return Ok(());
        }
        plan_record(&mut self.pool, record, &mut self.plan).map_err(|e| e.to_string())?;
        self.planned_bytes += usize::try_from(record.payload_bytes()).unwrap_or(usize::MAX);
        if self.planned_bytes >= REPLAY_BYTES {
            self.perform().map_err(|e| e.to_string())?;
        }
        self.state.apply(lsn, record);
        self.applied = lsn;
        self.replayed += 1;
        Ok(())
    }

    fn run(&mut self, journal: &Journal, from: Lsn) -> Result<(), OpenError> {
        if from > journal.durable_lsn() {
            return Ok(());
        }
        let read = |error: ReadError| OpenError::Replay { lsn: from, why: error.to_string() };
        let mut reader = journal.reader(from).map_err(read)?;
        loop {
            let records = reader.read(journal.durable_lsn(), REPLAY_BYTES).map_err(read)?;
            if records.is_empty() {
                break;
            }
            for raw in records {
                let lsn = raw.lsn;
                Record::decode(&raw.head, &raw.data)
                    .map_err(|e| e.to_string())
                    .and_then(|record| self.on_record(lsn, &record))
                    .map_err(|why| OpenError::Replay { lsn, why })?;
            }
        }
        self.perform()?;
        Ok(())
    }

    fn perform(&mut self) -> io::Result<()> {
        self.planned_bytes = 0;
        let mut plan = std::mem::take(&mut self.plan);
        self.pool.io().perform(&mut plan)
    }
}

pub(super) fn open(
    storage: Arc<dyn Storage>,
    config: StoreConfig,
    role: Role,
    random: &mut dyn FnMut() -> Uid,
) -> Result<(Arc<Store>, Recovery), OpenError> {
    let catalog = Catalog::open(&*storage, DEFAULT_CACHE_BYTES)?;
    let created = catalog.read()?.meta(IDENTITY)?.is_none();
    if created {
        create(&storage, &catalog, &config, role, random)?;
    }
    let identity: Identity = load(&catalog, IDENTITY)?;
    if identity.role != role {
        return Err(OpenError::Role { found: identity.role, wanted: role });
    }
    if let Some(former) = identity.former {
        role::convert(&storage, &catalog, &config, identity, former)?;
    }
    let identity: Identity = load(&catalog, IDENTITY)?;
    let (store, mut recovery, kept) = open_as(&storage, catalog, config, identity, None)?;
    recovery.created = created;
    // Before anything is admitted: a record behind it was never shipped in the life before.
    store.end_life()?;
    store.drop_readers();
    store.abort_open_runs(0);
    if !kept {
        store.mark_everything("initial");
    }
    Ok((store, recovery))
}

/// The store as of its newest record, and whether records were kept for a backup as long as it wants. `replay_retain`
/// overrides, for the records that are there, whether they are.
pub(super) fn open_as(
    storage: &Arc<dyn Storage>,
    catalog: Catalog,
    config: StoreConfig,
    identity: Identity,
    replay_retain: Option<bool>,
) -> Result<(Arc<Store>, Recovery, bool), OpenError> {
    let root = load_root(&catalog)?;
    let history = load_history(&catalog, &identity)?;
    let lives = if catalog.read()?.meta(LIVES)?.is_some() { load(&catalog, LIVES)? } else { Lives::default() };
    let pool = Pool::open(Arc::clone(storage), &catalog, identity.instance, &config.pool)?;

    let mut rows = delta::Stored::new();
    catalog.read()?.delta(|volume, set, page, blob| {
        rows.entry((VolumeId(volume), set)).or_default().push((page, blob.to_vec()));
    })?;
    let delta = delta::Side::load(rows).map_err(|why| OpenError::Root { key: "delta", why })?;
    let mut retained = Retained::from_acked(&root.acked);
    for group in root.state.groups.values().filter(|g| !g.mode.is_continuous()) {
        // Its records up to here are marks, in a final round up to its cut.
        let retaining = group.mode.run().filter(|run| run.kind.retains());
        retained.on_marked(group.id, retaining.map_or(group.position.lsn, |run| run.position.lsn));
    }
    let mut replay = Replay {
        pool,
        state: root.state,
        applied: root.applied,
        plan: IoPlan::new(),
        planned_bytes: 0,
        retained,
        delta,
        tables_next: root.tables_next,
        retain: replay_retain.map_or(config.retain, |retain| retain && root.retain),
        referenced: VecDeque::new(),
        unacked_both: HashMap::default(),
        replayed: 0,
    };
    let mut oldest = None;
    let (journal, recovered) = Journal::open(
        Arc::clone(storage),
        identity.instance,
        config.journal,
        root.trim,
        &record::verify,
        &mut |raw| {
            let lsn = raw.lsn;
            oldest.get_or_insert(lsn);
            let record = Record::decode(&raw.head, &raw.data)
                .map_err(|error| RecoverError::Record { lsn, reason: error.to_string() })?;
            replay.on_found(lsn, &record);
            Ok(())
        },
    )?;
    if let Some(oldest) = oldest {
        replay.run(&journal, oldest)?;
    }
    let recovery = Recovery {
        created: false,
        replayed: replay.replayed,
        records: recovered.records,
        bytes: recovered.bytes,
        dropped_bytes: recovered.dropped_bytes,
        epoch: recovered.epoch,
    };
    replay.delta.on_recovered(&replay.state);
    let kept = root.retain || !config.retain;
    let store = assemble(config, catalog, (identity, history, lives), journal, replay);
    Ok((store, recovery, kept))
}

/// Directories from before there was a history have one generation: their own.
fn load_history(catalog: &Catalog, identity: &Identity) -> Result<History, OpenError> {
    if catalog.read()?.meta(HISTORY)?.is_some() {
        return load(catalog, HISTORY);
    }
    let mut history = History::default();
    if identity.generation > 0 {
        let primary = if identity.role == Role::Primary { identity.instance } else { Uid::default() };
        history.push(first_generation(identity, primary));
    }
    Ok(history)
}

fn first_generation(identity: &Identity, primary: Uid) -> Generation {
    Generation {
        number: identity.generation,
        id: identity.generation_id,
        primary,
        fork: BTreeMap::new(),
        met: Uid::default(),
    }
}

fn create(
    storage: &Arc<dyn Storage>,
    catalog: &Catalog,
    config: &StoreConfig,
    role: Role,
    random: &mut dyn FnMut() -> Uid,
) -> Result<(), OpenError> {
    let identity = Identity {
        role,
        pair: if role == Role::Primary { random() } else { Uid::default() },
        instance: random(),
        generation: u64::from(role == Role::Primary),
        generation_id: if role == Role::Primary { random() } else { Uid::default() },
        fenced: 0,
        former: None,
        yields: false,
        met: Uid::default(),
    };
    Pool::create(Arc::clone(storage), catalog, identity.instance, &config.pool)?;
    let root = Root {
        state: NodeState::default(),
        applied: Lsn::ZERO,
        trim: TrimPoint::default(),
        acked: std::collections::BTreeMap::new(),
        tables_next: Lsn::ZERO,
        retain: config.retain,
    };
    write_root(catalog, &root, None)?;
    // The identity comes last: a directory that has one is whole.
    let json = serde_json::to_vec(&identity).expect("plain data");
    catalog.write(|txn| txn.put_meta(IDENTITY, &json))?;
    Ok(())
}

pub(super) fn load<T: serde::de::DeserializeOwned>(catalog: &Catalog, key: &'static str) -> Result<T, OpenError> {
    let json = catalog.read()?.meta(key)?.ok_or_else(|| OpenError::Root { key, why: "it is missing".into() })?;
    serde_json::from_slice(&json).map_err(|e| OpenError::Root { key, why: e.to_string() })
}

/// The last checkpoint.
pub(super) fn load_root(catalog: &Catalog) -> Result<Root, OpenError> {
    let mut root: Root = load(catalog, ROOT)?;
    root.state.fill_lanes();
    Ok(root)
}

fn assemble(
    config: StoreConfig,
    catalog: Catalog,
    (identity, history, lives): (Identity, History, Lives),
    journal: Journal,
    replay: Replay,
) -> Arc<Store> {
    let (io, space) = (replay.pool.io(), replay.pool.space());
    let durable = journal.durable_lsn();
    let segment_bytes = u64::from(config.pool.segment_bytes);
    let referenced_bytes = replay.referenced.iter().map(|(_, s)| s.len() as u64 * segment_bytes).sum();
    let mut paced = [false; LANES_MAX];
    for (lane, paced) in (0..).zip(&mut paced) {
        *paced = config.lanes.is_paced(lane);
    }
    let front = Front {
        identity,
        paced,
        history,
        lives,
        journal,
        state: replay.state.clone(),
        overlay: Overlay::default(),
        queue: VecDeque::new(),
        queue_bytes: 0,
        queue_hazards: 0,
        queue_places: 0,
        tail: VecDeque::new(),
        tail_bytes: 0,
        retained: replay.retained,
        delta: replay.delta,
        referenced: replay.referenced,
        referenced_bytes,
        failed: None,
        checkpoint_next: Lsn::ZERO,
        times: VecDeque::new(),
        unacked_both: replay.unacked_both,
        prune_both_at: 0,
        watches: super::watches::Watches::default(),
        traffic: (0, 0),
        group_traffic: BTreeMap::new(),
    };
    let applier = Applier {
        state: replay.state,
        applied: durable,
        in_flight: false,
        checkpointing: false,
        sweep: true,
        moved: 0,
    };
    let marks = Marks { durable, applied: durable, placed: Lsn::ZERO, releases: 0, failed: false };
    Arc::new(Store {
        config,
        front: Mutex::new(front),
        work: Condvar::new(),
        apply_work: Condvar::new(),
        applier: Mutex::new(applier),
        pool: Mutex::new(replay.pool),
        io,
        space,
        catalog,
        marks: watch::channel(marks).0,
        wants: super::driver::Wants::default(),
        stats: Stats::default(),
        damage: Mutex::default(),
        held: super::held::Held::default(),
    })
}
