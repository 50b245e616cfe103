//! Changes of role: promotion, demotion, and what a primary that was superseded keeps.
//!
//! A change is one commit of the catalogue: role, generation and history together, and [`Identity::former`], which says
//! that the rest of the directory is still that of the other role. The next opening *converts* it: everything is
//! replayed as what it was written as, one record makes it what it is now, and a checkpoint holds that, before `former`
//! goes. A crash anywhere in between converts again. So there is no instant with half a role.
//!
//! ```text
//! backup --promote--> primary (former: backup) --open--> primary
//! primary --demote--> backup (former: primary) --open--> backup, every group diverged
//! primary --fence---> primary that serves nobody; --demote--> as above
//! ```
//!
//! A promotion to a snapshot names its ids in the same commit. The conversion then begins a restore from each behind the
//! record of the promotion, so no volume is served before it is what it was in its snapshot.
//!
//! After a promotion a group is in delta mode with an empty table and the position (new generation, LSN of the record):
//! its chain begins with the cut of its first run, so nothing of it can follow a record of the generation before.

use std::{collections::BTreeMap, sync::Arc};

use thiserror::Error;

use crate::{
    catalog::{Catalog, CatalogError},
    delta::BlockSet,
    history::{Generation, History},
    lives::Lives,
    mutant::Mutant,
    record::Control,
    state::{GroupState, NodeState, Snapshot},
    storage::Storage,
    types::{GroupId, Position, SnapshotId, Uid, VolumeId, VolumeSpec},
};

use super::{
    Front, Identity, OpenError, Role, Store, StoreConfig, SubmitError,
    recovery::{HISTORY, IDENTITY, LIVES, load, open_as},
};

/// In the catalogue: the snapshots that the conversion goes back to.
const GO_BACK: &str = "go_back";

/// Why a role was not changed. Nothing was changed.
#[derive(Debug, Error)]
pub enum RoleError {
    /// The directory is not what is to be changed.
    #[error("this directory is a {is}, not a {wanted}")]
    Role {
        /// What it is.
        is: Role,
        /// What it should be.
        wanted: Role,
    },
    /// Somebody else has promoted.
    #[error(
        "generation {expected} was expected and {is} is current: look at the status of both sides, then decide anew"
    )]
    Generation {
        /// Of the request.
        expected: u64,
        /// Of this node.
        is: u64,
    },
    /// No group has an image.
    #[error(
        "no group has a complete image, so there is nothing to promote; waiting for a first synchronisation: {:?}",
        .names
    )]
    Nothing {
        /// Names of the groups.
        names: Vec<String>,
    },
    /// A group has no image.
    #[error(
        "{} never had a complete image and would be gone: force the promotion to go on without, or keep the old primary",
        .names.join(", ")
    )]
    Inconsistent {
        /// Names of the groups.
        names: Vec<String>,
    },
    /// A group has changes of its own.
    #[error(
        "{} was demoted and holds changes that the new primary never got: a promotion splits the pair; force it only if \
         that primary is gone for good",
        .names.join(", ")
    )]
    Diverged {
        /// Names of the groups.
        names: Vec<String>,
    },
    /// A group has no such snapshot.
    #[error(
        "{} has no snapshot {snapshot:?} here: take one that every group has (`understudy snapshot list --from-backup`), \
         or promote to the newest image and restore single groups then",
        .names.join(", ")
    )]
    NoSnapshot {
        /// The snapshot.
        snapshot: String,
        /// Names of the groups.
        names: Vec<String>,
    },
    /// The backup does not hold everything.
    #[error("{}: not everything is on the backup", .names.join(", "))]
    NotDrained {
        /// Names of the groups.
        names: Vec<String>,
    },
    /// The store.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

/// What a promotion is asked to be.
#[derive(Debug, Clone, Copy, Default)]
pub struct Promotion<'a> {
    /// Refused unless this is the generation; `None`: whatever it is.
    pub expected: Option<u64>,
    /// Also with groups without an image, which go, and with diverged ones.
    pub force: bool,
    /// Back to the snapshot of this name, which every group that stays must have.
    pub at: Option<&'a str>,
}

/// What a promotion makes of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promoted {
    /// Its name.
    pub name: String,
    /// Its image, by the count of the primary before.
    pub position: Position,
    /// That primary's time of it, Unix milliseconds.
    pub time_unix_ms: i64,
    /// An unfinished run is taken back.
    pub rolled_back: bool,
    /// It has no image, and goes.
    pub dropped: bool,
    /// What it goes back to; `None`: it stays its image.
    pub back: Option<Back>,
}

/// The snapshot that a promoted group goes back to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Back {
    /// Its position, by the count of the primary before.
    pub position: Position,
    /// That primary's time of it, Unix milliseconds.
    pub time_unix_ms: i64,
    /// Names of the group's volumes that it has not: they stay as in the image.
    pub kept: Vec<String>,
}

impl Back {
    fn new(state: &NodeState, group: &GroupState, snapshot: &Snapshot) -> Self {
        let kept = state.volumes_of(group.id).filter(|spec| snapshot.volume(spec.id).is_none());
        let kept = kept.map(|spec| spec.name.clone()).collect();
        Self { position: snapshot.position, time_unix_ms: snapshot.time_unix_ms, kept }
    }
}

impl Front {
    fn expect(&self, role: Role) -> Result<(), RoleError> {
        let is = self.identity.role;
        if is == role { Ok(()) } else { Err(RoleError::Role { is, wanted: role }) }
    }

    /// What becomes of each group, and the snapshots to go back to.
    fn plan_promotion(&self, wanted: Promotion<'_>) -> Result<(Vec<Promoted>, Vec<SnapshotId>), RoleError> {
        let Promotion { expected, force, at } = wanted;
        self.expect(Role::Backup)?;
        let is = self.identity.generation;
        if let Some(expected) = expected.filter(|expected| *expected != is) {
            return Err(RoleError::Generation { expected, is });
        }
        let state = &self.state;
        let names = |fits: &dyn Fn(&GroupState) -> bool| -> Vec<String> {
            state.groups.values().filter(|g| fits(g)).map(|g| g.name.clone()).collect()
        };
        let inconsistent = names(&|g| !g.consistent);
        if inconsistent.len() == state.groups.len() {
            return Err(RoleError::Nothing { names: inconsistent });
        }
        if !force && !inconsistent.is_empty() {
            return Err(RoleError::Inconsistent { names: inconsistent });
        }
        let diverged = names(&|g| g.diverged.is_some());
        if !force && !diverged.is_empty() {
            return Err(RoleError::Diverged { names: diverged });
        }
        let back = |g: &GroupState| at.filter(|_| g.consistent).and_then(|name| state.snapshot_by_name(g.id, name));
        if let Some(at) = at {
            let names = names(&|g| g.consistent && back(g).is_none());
            if !names.is_empty() {
                return Err(RoleError::NoSnapshot { snapshot: at.to_owned(), names });
            }
        }
        let promoted = state.groups.values().map(|g| Promoted {
            name: g.name.clone(),
            position: g.position,
            time_unix_ms: g.time_unix_ms,
            rolled_back: g.run.is_some() && g.consistent,
            dropped: !g.consistent,
            back: back(g).map(|snapshot| Back::new(state, g, snapshot)),
        });
        let snapshots = state.groups.values().filter_map(|g| back(g).map(|snapshot| snapshot.id));
        Ok((promoted.collect(), snapshots.collect()))
    }
}

impl Store {
    /// The generations that this side knows.
    #[must_use]
    pub fn history(&self) -> History {
        self.front.lock().history.clone()
    }

    /// What a promotion would make of each group. Nothing is changed.
    ///
    /// # Errors
    /// See [`RoleError`].
    pub fn plan_promotion(&self, wanted: Promotion<'_>) -> Result<Vec<Promoted>, RoleError> {
        Ok(self.front.lock().plan_promotion(wanted)?.0)
    }

    /// Makes the directory of a backup that of the primary of the next generation, durably: the process is to end, and
    /// to be started as the other. Nothing may arrive any more, and all that did must be durable.
    ///
    /// # Errors
    /// See [`RoleError`].
    pub fn promote(&self, wanted: Promotion<'_>, id: Uid) -> Result<(u64, Vec<Promoted>), RoleError> {
        let mut front = self.front.lock();
        let (promoted, back) = front.plan_promotion(wanted)?;
        let is = front.identity.generation;
        let fork = front.state.groups.values().filter(|g| g.consistent).map(|g| (g.id, complete(g))).collect();
        let number = if Mutant::PromoteKeepsGeneration.on() { is } else { is + 1 };
        let (primary, met) = (front.identity.instance, front.identity.met);
        // They are of one ownership of the pair.
        front.lives = Lives::default();
        self.write_identity(&mut front, &back, |identity, history| {
            identity.role = Role::Primary;
            identity.former = Some(Role::Backup);
            identity.met = Uid::default();
            if !Mutant::PromoteKeepsGeneration.on() {
                (identity.generation, identity.generation_id) = (number, id);
                history.push(Generation { number, id, primary, fork, met });
            }
        })?;
        Ok((number, promoted))
    }

    /// Makes the directory of a primary that of a backup, durably: the process is to end, and to be started as the
    /// other. With `drained` only if the backup holds everything.
    ///
    /// # Errors
    /// See [`RoleError`].
    pub fn demote_node(&self, drained: bool) -> Result<(), RoleError> {
        let mut front = self.front.lock();
        front.expect(Role::Primary)?;
        let behind = |id: &GroupId| front.retained.group(*id).oldest().is_some();
        // The other side does not know that a volume is being filled, and would serve it as it is.
        let filling = |g: &GroupState| g.volumes.iter().any(|id| front.state.restores.contains_key(id));
        let open = |g: &&GroupState| behind(&g.id) || !g.mode.is_continuous() || filling(g);
        let open = front.state.groups.values().filter(open);
        let names: Vec<String> = open.map(|g| g.name.clone()).collect();
        if drained && !names.is_empty() {
            return Err(RoleError::NotDrained { names });
        }
        self.write_identity(&mut front, &[], |identity, _| {
            identity.role = Role::Backup;
            identity.former = Some(Role::Primary);
            identity.fenced = 0;
        })?;
        Ok(())
    }

    /// Gives up what this side has and the other has not, after a split: it becomes a backup, of any primary of the pair
    /// that attaches next, and gets everything from it.
    ///
    /// # Errors
    /// See [`RoleError`].
    pub fn yield_node(&self) -> Result<(), RoleError> {
        let mut front = self.front.lock();
        self.write_identity(&mut front, &[], |identity, _| {
            identity.former = Some(identity.role);
            identity.role = Role::Backup;
            (identity.fenced, identity.yields) = (0, true);
        })?;
        Ok(())
    }

    /// Another primary has generation `by`: this one serves nobody any more, also behind a restart. True if it has served
    /// until now.
    ///
    /// # Errors
    /// If that cannot be made durable; the store has failed then, which serves nobody either.
    pub fn fence(&self, by: u64) -> Result<bool, CatalogError> {
        let mut front = self.front.lock();
        if Mutant::NoFence.on() || front.identity.role != Role::Primary || front.identity.fenced >= by {
            return Ok(false);
        }
        let served = front.identity.fenced == 0;
        self.write_identity(&mut front, &[], |identity, _| identity.fenced = by)?;
        Ok(served)
    }

    /// The lives of this directory as the primary of its generation, with the one of this process: a backup is about to
    /// be asked.
    ///
    /// # Errors
    /// If a new one cannot be made durable; the store has failed then.
    pub fn lives(&self, random: impl FnOnce() -> Uid) -> Result<Lives, CatalogError> {
        let mut front = self.front.lock();
        if front.lives.open().is_none() && front.identity.role == Role::Primary {
            front.lives.begin(random());
            self.write_lives(&mut front)?;
        }
        Ok(front.lives.clone())
    }

    /// The lives of this directory in the newest generation that it was the primary of.
    #[must_use]
    pub fn known_lives(&self) -> Lives {
        self.front.lock().lives.clone()
    }

    /// The life of the process before, if it had one, is over.
    pub(super) fn end_life(&self) -> Result<(), CatalogError> {
        let mut front = self.front.lock();
        let newest = front.journal.durable_lsn();
        if front.lives.end(newest) { self.write_lives(&mut front) } else { Ok(()) }
    }

    fn write_lives(&self, front: &mut Front) -> Result<(), CatalogError> {
        let lives = serde_json::to_vec(&front.lives).expect("plain data");
        let written = self.catalog.write(|txn| txn.put_meta(LIVES, &lives));
        if let Err(error) = &written {
            self.fail_locked(front, format!("catalogue: {error}"));
        }
        written
    }

    /// Changes identity and history durably, outside of the journal: rare.
    ///
    /// # Errors
    /// If the catalogue cannot be written; the store has failed then.
    pub fn set_identity(&self, change: impl FnOnce(&mut Identity, &mut History)) -> Result<(), CatalogError> {
        let mut front = self.front.lock();
        self.write_identity(&mut front, &[], change)
    }

    /// Under the front lock: nothing is admitted as what the directory is not any more. `back` are the snapshots that the
    /// conversion goes back to, in the same commit.
    fn write_identity(
        &self,
        front: &mut Front,
        back: &[SnapshotId],
        change: impl FnOnce(&mut Identity, &mut History),
    ) -> Result<(), CatalogError> {
        change(&mut front.identity, &mut front.history);
        let identity = serde_json::to_vec(&front.identity).expect("plain data");
        let history = serde_json::to_vec(&front.history).expect("plain data");
        let back = serde_json::to_vec(back).expect("plain data");
        let lives = serde_json::to_vec(&front.lives).expect("plain data");
        let written = self.catalog.write(|txn| {
            txn.put_meta(HISTORY, &history)?;
            txn.put_meta(LIVES, &lives)?;
            txn.put_meta(GO_BACK, &back)?;
            txn.put_meta(IDENTITY, &identity)
        });
        if let Err(error) = &written {
            self.fail_locked(front, format!("catalogue: {error}"));
        }
        written
    }

    /// The blocks of each volume of `group` in which this side may differ from what the backup before had acknowledged:
    /// active, frozen and retained.
    #[must_use]
    pub fn divergence(&self, group: GroupId) -> BTreeMap<VolumeId, BlockSet> {
        let front = self.front.lock();
        let volumes = front.state.volumes_of(group).map(|spec| (spec.id, front.delta.differing(group, spec.id)));
        volumes.collect()
    }

    /// Blocks that the backup has changed by itself while it was a primary: they are for the next run. False if the group
    /// is not in delta mode, or the volume is gone.
    pub fn mark_diverged(&self, group: GroupId, volume: VolumeId, runs: &[(u64, u64)]) -> bool {
        let mut front = self.front.lock();
        let front = &mut *front;
        let in_delta = front.state.groups.get(&group).is_some_and(|g| !g.mode.is_continuous());
        let Some(spec) = front.state.volumes.get(&volume).filter(|spec| in_delta && spec.group == group) else {
            return false;
        };
        let blocks = spec.block_count();
        for (first, count) in runs {
            let count = (*count).min(blocks.saturating_sub(*first));
            if count > 0 {
                front.delta.mark(volume, *first, count);
            }
        }
        true
    }

    /// The records that make the state of a backup that of a primary: of the promotion, and of a restore from each of
    /// the snapshots to go `back` to.
    fn become_primary(&self, back: &[SnapshotId]) -> Result<(), SubmitError> {
        let mut front = self.front.lock();
        let state = &front.state;
        // The image of a diverged group is not one that the primary before had: no table fits it.
        let diverged = state.groups.values().any(|g| g.diverged.is_some());
        let former = match front.history.generations() {
            [.., former, _] if !diverged => former.primary,
            _ => Uid::default(),
        };
        let runs = || state.groups.values().filter_map(|g| g.run.as_ref());
        let layers = runs().flat_map(|run| run.layers.iter().copied()).filter(|(v, _)| state.volumes.contains_key(v));
        let unseen = runs().flat_map(|run| run.specs.iter().map(|spec| spec.id));
        let control = Control::Promote {
            generation: front.identity.generation,
            ids_above: ids_above(&front.identity),
            former,
            layers: if Mutant::PromoteWithoutRollBack.on() { Vec::new() } else { layers.collect() },
            delete: unseen.filter(|id| !state.volumes.contains_key(id)).collect(),
            drop: state.groups.values().filter(|g| !g.consistent).map(|g| g.id).collect(),
        };
        self.submit_control_locked(&mut front, GroupId::default(), control, 0)?;
        for id in back {
            let Some(snapshot) = front.state.snapshots.get(id) else { continue };
            let volumes = snapshot.layers.iter().map(|(volume, _)| (*volume, *volume)).collect();
            let known = |was: &VolumeSpec| front.state.volumes.get(&was.id).map(|spec| (spec.group, spec.size_bytes));
            let smaller = snapshot.specs.iter().filter_map(|was| Some((was, known(was)?)));
            let smaller = smaller.filter(|(was, (_, size_bytes))| *size_bytes < was.size_bytes);
            let smaller: Vec<_> = smaller.map(|(was, (group, _))| (group, was.id, was.size_bytes)).collect();
            for (group, volume, size_bytes) in smaller {
                let control = Control::ResizeVolume { volume, size_bytes };
                self.submit_control_locked(&mut front, group, control, 0)?;
            }
            let control = Control::BeginRestore { snapshot: *id, volumes };
            self.submit_control_locked(&mut front, GroupId::default(), control, 0)?;
        }
        Ok(())
    }

    /// The records that make the state of a primary, or of a backup that yields, that of a diverged backup.
    fn become_backup(&self, unknown: bool) -> Result<(), SubmitError> {
        self.abort_open_runs(0);
        let groups: Vec<GroupId> = self.with_state(|state| state.groups.keys().copied().collect());
        for group in groups {
            // What was retained becomes marks, which outlive the journal.
            if !self.is_delta(group) {
                self.switch(group, "link_down", false, 0).map_err(|error| match error {
                    super::ModeError::Submit(error) => error,
                    error => unreachable!("a group that is there switches: {error}"),
                })?;
            }
        }
        let mut front = self.front.lock();
        if unknown {
            // It may be of a primary that this side does not follow any more, and its number is no name for it there.
            let in_run = front.state.groups.values().filter(|g| g.run.as_ref().is_some_and(|run| !run.cancelled));
            for group in in_run.map(|g| g.id).collect::<Vec<_>>() {
                self.submit_control_locked(&mut front, GroupId::default(), Control::CancelRun { group }, 0)?;
            }
        }
        // Of any lane: whoever began with less in one of them does not fit.
        let newest = |id: &GroupId| front.retained.group(*id).lanes().map(|(_, lane)| lane.acked).max();
        let acked = front.state.groups.keys().map(|id| (*id, newest(id).unwrap_or_default())).collect();
        let control = Control::StepDown { acked, unknown };
        self.submit_control_locked(&mut front, GroupId::default(), control, 0).map(drop)
    }

    /// Everything submitted becomes durable and applied, and a checkpoint holds it.
    fn settle(self: &Arc<Self>) -> Result<(), OpenError> {
        while let Some(job) = self.take_batch() {
            let result = job.run();
            self.finish_batch(job, result);
        }
        while let Some(mut job) = self.take_apply() {
            let result = job.run();
            self.finish_apply(job, result);
        }
        if let Some(job) = self.take_checkpoint() {
            let result = job.run();
            self.finish_checkpoint(job, result);
        }
        self.failure().map_or(Ok(()), |why| Err(OpenError::Convert(why)))
    }
}

/// The snapshots that a promotion goes back to; none in a directory from before there was such a thing.
fn go_back(catalog: &Catalog) -> Result<Vec<SnapshotId>, OpenError> {
    if catalog.read()?.meta(GO_BACK)?.is_none() {
        return Ok(Vec::new());
    }
    load(catalog, GO_BACK)
}

/// Ids that a primary gives are above those that any primary before it has given, also of what it never heard of, and are
/// not those that another one of the same number gives: 2^28 for each, told apart by 16 random bits.
fn ids_above(identity: &Identity) -> u64 {
    let random = u64::from(u16::from_le_bytes([identity.generation_id.0[0], identity.generation_id.0[1]]));
    identity.generation.saturating_sub(1) << 44 | random << 28
}

/// The position up to which a group has every record, of whatever lane.
fn complete(group: &crate::state::GroupState) -> Position {
    group.lanes.own().map(|(_, place)| place.position).min().unwrap_or(group.position)
}

/// Converts a directory whose role has changed.
pub(super) fn convert(
    storage: &Arc<dyn Storage>,
    catalog: &Catalog,
    config: &StoreConfig,
    identity: Identity,
    former: Role,
) -> Result<(), OpenError> {
    let (store, kept) = {
        // Its records are those of the former role; what is submitted here is for the new one.
        let replay_retain = former == Role::Primary;
        let config = StoreConfig { retain: true, ..config.clone() };
        let (store, _, kept) = open_as(storage, catalog.clone(), config, identity, Some(replay_retain))?;
        (store, kept)
    };
    store.drop_readers();
    // What follows is not of the life before.
    store.end_life()?;
    // A checkpoint first: what it frees of the journal is room for the records that follow.
    store.settle()?;
    let converted = match identity.role {
        Role::Primary => store.become_primary(&go_back(catalog)?),
        Role::Backup => store.become_backup(former == Role::Backup || identity.yields || !kept),
    };
    converted.map_err(|error| OpenError::Convert(error.to_string()))?;
    store.settle()?;
    store.set_identity(|identity, _| identity.former = None)?;
    Ok(())
}

/// The role of the directory in `storage`; `None` if no node was made there.
///
/// # Errors
/// If the catalogue cannot be read or understood.
pub fn role_of(storage: &dyn Storage) -> Result<Option<Role>, OpenError> {
    if !storage.list("")?.iter().any(|name| name == crate::catalog::FILE) {
        return Ok(None);
    }
    let catalog = Catalog::open_read_only(storage, crate::catalog::DEFAULT_CACHE_BYTES)?;
    if catalog.read()?.meta(IDENTITY)?.is_none() {
        return Ok(None);
    }
    Ok(Some(load::<Identity>(&catalog, IDENTITY)?.role))
}

/// Makes the directory of a stopped primary that of a backup; its generation is returned. The caller holds its lock.
///
/// # Errors
/// If it is not a primary's, or the catalogue cannot be read or written.
pub fn demote_stopped(storage: &dyn Storage) -> Result<u64, OpenError> {
    let catalog = Catalog::open(storage, crate::catalog::DEFAULT_CACHE_BYTES)?;
    let mut identity: Identity = load(&catalog, IDENTITY)?;
    if identity.role != Role::Primary {
        return Err(OpenError::Role { found: identity.role, wanted: Role::Primary });
    }
    if identity.former.is_some() {
        return Err(OpenError::Convert(
            "it was promoted and never started since; start understudy-primary first".into(),
        ));
    }
    (identity.role, identity.former, identity.fenced) = (Role::Backup, Some(Role::Primary), 0);
    let json = serde_json::to_vec(&identity).expect("plain data");
    catalog.write(|txn| txn.put_meta(IDENTITY, &json))?;
    Ok(identity.generation)
}
