//! The catalogue of a node as a pure function of its records.
//!
//! Both copies a node keeps - as of the newest record, for admission, and as of the last applied one, for checkpoints -
//! go through [`NodeState::apply`], and so does recovery. No clock, no I/O.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::{
    record::{BeginRun, ClientSequence, Control, Op, Record, RunKind},
    types::{BlockRange, GroupId, LayerId, Lsn, Position, SnapshotId, Uid, VolumeId, VolumeSpec},
};

/// How far apart a client's requests may arrive out of order.
pub const SEQUENCE_WINDOW: u64 = 1024;
/// Clients whose sequences are remembered; the one silent for longest is forgotten first.
pub const CLIENTS_MAX: usize = 1024;
/// Live volumes of a node.
pub const VOLUMES_MAX: usize = 4096;
/// Snapshots of a group: a read of the oldest looks at every layer.
pub const SNAPSHOTS_MAX: usize = 256;

/// A place in the history of a group, and the primary's time of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Place {
    /// As the primary counts.
    pub position: Position,
    /// Unix milliseconds.
    pub time_unix_ms: i64,
}

/// The newest record of each lane of a group. On the backup this names its image: every record of a lane up to there,
/// and none behind it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LanePlaces {
    /// Of lanes that have had no record since a run that carried all of them.
    base: Place,
    /// By number, as far as any had one.
    lanes: Vec<Place>,
}

impl LanePlaces {
    /// Every lane is there.
    #[must_use]
    pub fn all(base: Place) -> Self {
        Self { base, lanes: Vec::new() }
    }

    /// Of one lane.
    #[must_use]
    pub fn place(&self, lane: u8) -> Place {
        self.lanes.get(usize::from(lane)).copied().unwrap_or(self.base)
    }

    /// Of one lane.
    #[must_use]
    pub fn of(&self, lane: u8) -> Position {
        self.place(lane).position
    }

    /// The lane has come to here.
    pub fn set(&mut self, lane: u8, place: Place) {
        let at = usize::from(lane);
        if self.lanes.len() <= at {
            self.lanes.resize(at + 1, self.base);
        }
        self.lanes[at] = place;
    }

    /// Of lanes without a place of their own.
    #[must_use]
    pub fn base(&self) -> Place {
        self.base
    }

    /// The lanes with a place of their own.
    pub fn own(&self) -> impl Iterator<Item = (u8, Place)> {
        (0..).zip(self.lanes.iter().copied())
    }
}

/// What a node knows of one group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupState {
    /// Never reused.
    pub id: GroupId,
    /// The name operators use.
    pub name: String,
    /// The newest record of the group, as a position of the primary.
    pub position: Position,
    /// The primary's time of that record.
    pub time_unix_ms: i64,
    /// The newest record of each of its lanes.
    #[serde(default)]
    pub lanes: LanePlaces,
    /// Its volumes; a group is gone with its last volume, in delta mode with the commit of that.
    pub volumes: Vec<VolumeId>,
    /// Primary: how it is replicated.
    pub mode: GroupMode,
    /// Primary: the time of the first change since the last cut, Unix milliseconds, while changes are marked.
    pub marked_since_unix_ms: Option<i64>,
    /// Backup: the run it is in.
    pub run: Option<ReplicaRun>,
    /// Backup: the newest run that was committed; 0 for none.
    pub committed_run: u64,
    /// Backup: there is an image. False from the first run of a group that came without one, to its commit.
    pub consistent: bool,
    /// Backup that was a primary: the image has changes that the primary of now does not know, until its first commit.
    #[serde(default)]
    pub diverged: Option<Diverged>,
}

/// What is known of the difference between a group of an old primary and the backup it had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diverged {
    /// That backup had acknowledged so much, in LSNs of this journal. What came later is in the delta table.
    pub acked: Lsn,
    /// The table does not say it: every block may differ.
    pub unknown: bool,
}

impl GroupState {
    fn new(id: GroupId, name: &str) -> Self {
        Self {
            id,
            name: name.to_owned(),
            position: Position::default(),
            time_unix_ms: 0,
            lanes: LanePlaces::default(),
            volumes: Vec::new(),
            mode: GroupMode::Continuous { from: Lsn::ZERO },
            marked_since_unix_ms: None,
            run: None,
            committed_run: 0,
            consistent: true,
            diverged: None,
        }
    }
}

/// How the primary replicates a group.
///
/// ```text
/// Continuous --Switch--> Delta --Cut--> Delta in a run --Clear--> Delta, or Continuous after a run that retains
///                          ^                |  ^
///                          |----AbortRun----|  Demote: the run retains no more
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
pub enum GroupMode {
    /// Records are retained until the backup has them, and shipped.
    Continuous {
        /// The first record of this kind.
        from: Lsn,
    },
    /// Changes are marked in the delta table, and copied by runs.
    Delta {
        /// The switch.
        since: Lsn,
        /// Why.
        cause: String,
        /// Everything is marked, and no run was committed since.
        full: bool,
        /// The run that is open.
        run: Option<PrimaryRun>,
    },
}

impl GroupMode {
    /// True if the record at `lsn` of the group is retained for the backup, and not a mark, in this mode.
    #[must_use]
    pub fn retains(&self, lsn: Lsn) -> bool {
        match self {
            Self::Continuous { from } => lsn >= *from,
            Self::Delta { run: Some(run), .. } => run.kind.retains() && lsn.0 >= run.id,
            Self::Delta { run: None, .. } => false,
        }
    }

    /// The open run.
    #[must_use]
    pub fn run(&self) -> Option<&PrimaryRun> {
        match self {
            Self::Delta { run, .. } => run.as_ref(),
            Self::Continuous { .. } => None,
        }
    }

    /// True in continuous mode.
    #[must_use]
    pub fn is_continuous(&self) -> bool {
        matches!(self, Self::Continuous { .. })
    }
}

/// An open run, as the primary sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrimaryRun {
    /// The LSN of its cut: unique, since nothing of a run is sent before its cut is durable.
    pub id: u64,
    /// What for; a final round that was demoted is an ordinary one.
    pub kind: RunKind,
    /// The group's position at the cut.
    pub position: Position,
    /// The time of the cut, Unix milliseconds.
    pub time_unix_ms: i64,
    /// The snapshots it reads.
    pub layers: Vec<(VolumeId, LayerId)>,
    /// The group's volumes at the cut.
    pub specs: Vec<VolumeSpec>,
    /// Time of the first change that it carries, Unix milliseconds.
    pub marked_since_unix_ms: Option<i64>,
    /// It carries every block: any backup will do.
    #[serde(default)]
    pub everything: bool,
}

/// An open run, as the backup sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaRun {
    /// The primary's id of it.
    pub id: u64,
    /// The group's position when it is committed.
    pub cut: Position,
    /// The primary's time of the cut, Unix milliseconds.
    pub time_unix_ms: i64,
    /// The group's volumes at the cut.
    pub specs: Vec<VolumeSpec>,
    /// The image from before the run.
    pub layers: Vec<(VolumeId, LayerId)>,
    /// Everything before this block of this volume was written, in the order of the run.
    pub progress: Option<(VolumeId, u64)>,
    /// The primary gave it up: nothing is taken of it any more.
    pub cancelled: bool,
    /// The group's snapshots on the primary: any other goes with the commit.
    #[serde(default)]
    pub snapshots: Vec<SnapshotId>,
}

/// A snapshot for users, of the volumes that its group had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Never reused, the same on both sides.
    pub id: SnapshotId,
    /// Unique in its group.
    pub name: String,
    /// The group.
    pub group: GroupId,
    /// Its volumes as they were.
    pub specs: Vec<VolumeSpec>,
    /// Their layers on this node.
    pub layers: Vec<(VolumeId, LayerId)>,
    /// The group's position that it holds.
    pub position: Position,
    /// The primary's time of its record, Unix milliseconds.
    pub time_unix_ms: i64,
    /// Its record went, or will go, to the backup.
    pub mirrored: bool,
    /// Its record in this node's journal: the layers can be read when that is applied.
    pub lsn: Lsn,
}

impl Snapshot {
    /// A volume as it was, and its layer.
    #[must_use]
    pub fn volume(&self, id: VolumeId) -> Option<(&VolumeSpec, LayerId)> {
        let (_, layer) = self.layers.iter().find(|(volume, _)| *volume == id)?;
        Some((self.specs.iter().find(|spec| spec.id == id)?, *layer))
    }
}

/// A volume that is being filled from a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The volume of it.
    pub source: VolumeId,
}

/// Sequences of one client that were applied: the highest, and which of the 1024 below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientState {
    highest: u64,
    /// Bit `n`: `highest - n` was seen.
    seen: Vec<u64>,
    /// LSN of the client's newest record: every remembered request lies at or below it.
    pub lsn: Lsn,
}

/// What a repeated, late or fresh sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SequenceCheck {
    /// Not seen.
    Fresh,
    /// Applied; the newest record of that client is at this LSN.
    Applied(Lsn),
    /// Too far below the highest to know.
    TooOld {
        /// The highest sequence of the client.
        highest: u64,
    },
}

impl ClientState {
    fn new() -> Self {
        Self { highest: 0, seen: vec![0; usize::try_from(SEQUENCE_WINDOW / 64).expect("16")], lsn: Lsn::ZERO }
    }

    fn bit(&self, back: u64) -> (usize, u64) {
        (usize::try_from(back / 64).expect("below 16"), 1 << (back % 64))
    }

    fn check(&self, sequence: u64) -> SequenceCheck {
        if sequence > self.highest {
            return SequenceCheck::Fresh;
        }
        let back = self.highest - sequence;
        if back >= SEQUENCE_WINDOW {
            return SequenceCheck::TooOld { highest: self.highest };
        }
        let (word, bit) = self.bit(back);
        if self.seen[word] & bit != 0 { SequenceCheck::Applied(self.lsn) } else { SequenceCheck::Fresh }
    }

    fn mark(&mut self, sequence: u64, lsn: Lsn) {
        if sequence > self.highest {
            self.shift(sequence - self.highest);
            self.highest = sequence;
        }
        let back = self.highest - sequence;
        if back < SEQUENCE_WINDOW {
            let (word, bit) = self.bit(back);
            self.seen[word] |= bit;
        }
        self.lsn = lsn;
    }

    fn shift(&mut self, by: u64) {
        if by >= SEQUENCE_WINDOW {
            self.seen.fill(0);
            return;
        }
        let (words, bits) = (usize::try_from(by / 64).expect("below 16"), by % 64);
        for at in (0..self.seen.len()).rev() {
            let from = at.checked_sub(words).map_or(0, |i| self.seen[i]);
            let below = at.checked_sub(words + 1).map_or(0, |i| self.seen[i]);
            self.seen[at] = if bits == 0 { from } else { from << bits | below >> (64 - bits) };
        }
    }
}

/// The catalogue as of one record.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeState {
    /// Live volumes.
    pub volumes: BTreeMap<VolumeId, VolumeSpec>,
    /// Live groups.
    pub groups: BTreeMap<GroupId, GroupState>,
    /// Remembered clients.
    pub clients: BTreeMap<String, ClientState>,
    /// Clients in the order of their last first-seen, for forgetting.
    client_order: VecDeque<String>,
    /// Live layers of every kind but heads.
    pub layers: BTreeMap<LayerId, VolumeId>,
    /// Snapshots for users.
    #[serde(default)]
    pub snapshots: BTreeMap<SnapshotId, Snapshot>,
    /// Largest snapshot id ever given, or on a backup seen.
    #[serde(default)]
    pub last_snapshot: SnapshotId,
    /// Primary: volumes that are being filled, and not served.
    #[serde(default)]
    pub restores: BTreeMap<VolumeId, Restore>,
    /// Largest volume id ever given.
    pub last_volume: VolumeId,
    /// Largest group id ever given, or on a backup seen.
    pub last_group: GroupId,
    /// Backup: groups below that it has not seen, first and last of each range: those that went by runs only, or were held.
    #[serde(default)]
    unseen: Vec<(u64, u64)>,
    /// Largest layer id ever given.
    pub last_layer: LayerId,
    /// Primary: the backup that the delta tables are against; nil before the first.
    pub backup: Uid,
    /// The record by which this directory became a primary the last time; 0 if it was made as one.
    #[serde(default)]
    pub promoted_at: Lsn,
}

impl NodeState {
    /// Moves the state over one record at `lsn` of this node's journal.
    pub fn apply(&mut self, lsn: Lsn, record: &Record) {
        if let Some(client) = &record.client {
            self.note_sequence(client, lsn);
        }
        if let Op::Control(control) = &record.op {
            self.apply_control(lsn, record, control);
        }
        let Some(group) = self.groups.get_mut(&record.group) else { return };
        if record.in_run {
            if let (Some(run), Some(range)) = (&mut group.run, record.range()) {
                run.progress = Some((range.volume, range.end()));
            }
            return;
        }
        if !group.mode.retains(lsn) {
            group.marked_since_unix_ms.get_or_insert(record.time_unix_ms);
        }
        group.lanes.set(record.lane, Place { position: record.position, time_unix_ms: record.time_unix_ms });
        // On the backup one lane may be behind another.
        if record.position >= group.position {
            (group.position, group.time_unix_ms) = (record.position, record.time_unix_ms);
        }
    }

    /// A state that was stored before there were lanes has all its records in lane 0.
    pub fn fill_lanes(&mut self) {
        for group in self.groups.values_mut().filter(|g| g.lanes == LanePlaces::default()) {
            group.lanes.set(0, Place { position: group.position, time_unix_ms: group.time_unix_ms });
        }
    }

    /// The volume that a record changes: of the group's run, if it belongs to that.
    #[must_use]
    pub fn spec_for(&self, record: &Record) -> Option<&VolumeSpec> {
        self.spec_of(record.range()?, record.group, record.in_run)
    }

    fn spec_of(&self, range: BlockRange, group: GroupId, in_run: bool) -> Option<&VolumeSpec> {
        if in_run {
            let run = self.groups.get(&group)?.run.as_ref()?;
            return run.specs.iter().find(|spec| spec.id == range.volume);
        }
        self.volumes.get(&range.volume)
    }

    /// True if the record at `lsn` of `group` is retained for the backup, and not a mark. A group that is gone was in
    /// continuous mode when it went.
    #[must_use]
    pub fn retains(&self, group: GroupId, lsn: Lsn) -> bool {
        self.groups.get(&group).is_none_or(|g| g.mode.retains(lsn))
    }

    /// Layers of those who read an image: no run and no snapshot for users holds them.
    pub fn readers(&self) -> impl Iterator<Item = LayerId> {
        let held = |layer: &LayerId| {
            let of_replica = |g: &GroupState| g.run.iter().flat_map(|run| &run.layers).any(|(_, l)| l == layer);
            let of_primary = |g: &GroupState| g.mode.run().iter().flat_map(|run| &run.layers).any(|(_, l)| l == layer);
            let of_user = self.snapshots.values().flat_map(|s| &s.layers).any(|(_, l)| l == layer);
            of_user || self.groups.values().any(|g| of_replica(g) || of_primary(g))
        };
        self.layers.keys().filter(move |layer| !held(layer)).copied()
    }

    /// The volumes of a group.
    pub fn volumes_of(&self, group: GroupId) -> impl Iterator<Item = &VolumeSpec> {
        let volumes = self.groups.get(&group).map(|g| g.volumes.as_slice()).unwrap_or_default();
        volumes.iter().filter_map(|id| self.volumes.get(id))
    }

    /// What is known of a client's sequence.
    #[must_use]
    pub fn check_sequence(&self, request: &ClientSequence) -> SequenceCheck {
        self.clients.get(&request.client).map_or(SequenceCheck::Fresh, |c| c.check(request.sequence))
    }

    /// The live volume of that name.
    #[must_use]
    pub fn volume_by_name(&self, name: &str) -> Option<&VolumeSpec> {
        self.volumes.values().find(|v| v.name == name)
    }

    /// A group by its name, or by that of one of its volumes.
    #[must_use]
    pub fn group_by_name(&self, name: &str) -> Option<&GroupState> {
        let of_volume = || self.groups.get(&self.volume_by_name(name)?.group);
        self.groups.values().find(|group| group.name == name).or_else(of_volume)
    }

    /// A layer that is not there yet for each volume of a group.
    #[must_use]
    pub fn new_layers(&self, group: GroupId) -> Vec<(VolumeId, LayerId)> {
        let new = (self.last_layer.0 + 1..).map(LayerId);
        self.volumes_of(group).map(|spec| spec.id).zip(new).collect()
    }

    /// A client's request was applied by the record at `lsn`.
    pub fn note_sequence(&mut self, request: &ClientSequence, lsn: Lsn) {
        self.client_mut(&request.client).mark(request.sequence, lsn);
    }

    fn client_mut(&mut self, client: &str) -> &mut ClientState {
        if !self.clients.contains_key(client) {
            if self.clients.len() >= CLIENTS_MAX
                && let Some(oldest) = self.client_order.pop_front()
            {
                self.clients.remove(&oldest);
            }
            self.client_order.push_back(client.to_owned());
        }
        self.clients.entry(client.to_owned()).or_insert_with(ClientState::new)
    }

    fn apply_control(&mut self, lsn: Lsn, record: &Record, control: &Control) {
        let time_unix_ms = record.time_unix_ms;
        match control {
            Control::CreateVolume { spec, fill } => {
                self.note_ids(spec);
                if let Some((snapshot, source)) = *fill {
                    self.restores.insert(spec.id, Restore { snapshot, source });
                }
                let group =
                    self.groups.entry(spec.group).or_insert_with(|| GroupState::new(spec.group, &spec.group_name));
                group.volumes.push(spec.id);
                self.volumes.insert(spec.id, spec.clone());
            }
            Control::ResizeVolume { volume, size_bytes } => {
                if let Some(spec) = self.volumes.get_mut(volume) {
                    spec.size_bytes = *size_bytes;
                }
            }
            Control::DeleteVolume { volume } => self.delete_volume(*volume),
            Control::SetAckRule { volume, ack, away } => {
                if let Some(spec) = self.volumes.get_mut(volume) {
                    (spec.ack, spec.away) = (*ack, *away);
                }
            }
            Control::CreateSnapshot { layers } => self.add_layers(layers),
            Control::PinSnapshot { volume, layer, .. } => self.add_layers(&[(*volume, *layer)]),
            Control::DeleteSnapshot { layers } => self.remove_layers(layers.iter()),
            Control::RollBack { .. } | Control::Probe => {}
            Control::Bind { instance } => self.backup = *instance,
            Control::Switch { group, .. }
            | Control::Cut { group, .. }
            | Control::Demote { group }
            | Control::Clear { group, .. }
            | Control::AbortRun { group, .. } => self.apply_mode(lsn, time_unix_ms, *group, control),
            Control::BeginRun { run } => self.begin_run(run),
            Control::CancelRun { group } => {
                if let Some(run) = self.groups.get_mut(group).and_then(|g| g.run.as_mut()) {
                    run.cancelled = true;
                }
            }
            Control::VerifySnapshot { layers, .. } => self.add_layers(layers),
            Control::CommitRun { group, layers, .. } => self.commit_run(*group, layers),
            Control::TakeSnapshot { id, group, name, mirrored, layers } => {
                self.add_layers(layers);
                self.last_snapshot = self.last_snapshot.max(*id);
                let group_position = self.groups.get(group).map_or(Position::default(), |g| g.position);
                let snapshot = Snapshot {
                    id: *id,
                    name: name.clone(),
                    group: *group,
                    specs: self.volumes_of(*group).cloned().collect(),
                    layers: layers.clone(),
                    position: if *mirrored { record.position } else { group_position },
                    time_unix_ms,
                    mirrored: *mirrored,
                    lsn,
                };
                self.snapshots.insert(*id, snapshot);
            }
            Control::DropSnapshot { id, layers } => {
                self.remove_layers(layers.iter());
                self.snapshots.remove(id);
            }
            Control::BeginRestore { snapshot, volumes } => {
                let restore = |(volume, source): &_| (*volume, Restore { snapshot: *snapshot, source: *source });
                self.restores.extend(volumes.iter().map(restore));
            }
            Control::EndRestore { volumes } => self.restores.retain(|volume, _| !volumes.contains(volume)),
            Control::Promote { generation, ids_above, former, layers, drop, .. } => {
                self.remove_layers(layers.iter().map(|(_, layer)| layer));
                self.groups.retain(|id, _| !drop.contains(id));
                self.promote(lsn, *generation, *ids_above, *former);
            }
            Control::StepDown { acked, unknown } => {
                for group in self.groups.values_mut() {
                    let acked = acked.iter().find(|(id, _)| *id == group.id).map_or(Lsn::ZERO, |(_, lsn)| *lsn);
                    group.diverged = Some(Diverged { acked, unknown: *unknown });
                    group.committed_run = 0;
                    // The table outlives a restart in delta mode only.
                    group.mode = delta_from(lsn, *unknown);
                }
                // A run brings the volumes that were being filled.
                self.restores.clear();
            }
        }
    }

    /// Every group is its image, at the record at `lsn`, and nothing of it is marked.
    fn promote(&mut self, lsn: Lsn, generation: u64, floor: u64, former: Uid) {
        for group in self.groups.values_mut() {
            group.position = Position { generation, lsn };
            group.lanes = LanePlaces::all(Place { position: group.position, time_unix_ms: group.time_unix_ms });
            group.mode = delta_from(lsn, former.is_nil());
            (group.marked_since_unix_ms, group.run, group.committed_run) = (None, None, 0);
            (group.consistent, group.diverged) = (true, None);
        }
        (self.backup, self.promoted_at) = (former, lsn);
        // What a client did here is not what it did at the primary before.
        self.clients.clear();
        self.client_order.clear();
        self.last_volume = self.last_volume.max(VolumeId(floor));
        self.last_snapshot = self.last_snapshot.max(SnapshotId(floor));
        if self.last_group.0 < floor {
            self.unseen.push((self.last_group.0 + 1, floor));
            self.last_group = GroupId(floor);
        }
    }

    fn unmirror(&mut self, snapshots: &[SnapshotId]) {
        for id in snapshots {
            if let Some(snapshot) = self.snapshots.get_mut(id) {
                snapshot.mirrored = false;
            }
        }
    }

    /// Snapshots of volumes that are gone have lost their layers.
    fn prune_snapshots(&mut self) {
        let (layers, volumes) = (&self.layers, &self.volumes);
        self.snapshots.retain(|_, snapshot| {
            snapshot.layers.retain(|(_, layer)| layers.contains_key(layer));
            !snapshot.layers.is_empty()
        });
        self.restores.retain(|volume, _| volumes.contains_key(volume));
    }

    /// The snapshot of a group by its name.
    #[must_use]
    pub fn snapshot_by_name(&self, group: GroupId, name: &str) -> Option<&Snapshot> {
        self.snapshots_of(group).find(|snapshot| snapshot.name == name)
    }

    /// The snapshots of a group, oldest first.
    pub fn snapshots_of(&self, group: GroupId) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.values().filter(move |snapshot| snapshot.group == group)
    }

    /// The snapshots of a group, or of all of them, each with the name of its group.
    #[must_use]
    pub fn named_snapshots(&self, only: Option<GroupId>) -> Vec<(Snapshot, String)> {
        let groups = self.groups.values().filter(|group| only.is_none_or(|id| id == group.id));
        let named = groups.flat_map(|group| self.snapshots_of(group.id).map(|s| (s.clone(), group.name.clone())));
        named.collect()
    }

    fn note_ids(&mut self, spec: &VolumeSpec) {
        self.last_volume = self.last_volume.max(spec.id);
        self.note_group(spec.group);
    }

    fn note_group(&mut self, GroupId(id): GroupId) {
        let last = self.last_group.0;
        if id > last {
            if id > last + 1 {
                self.unseen.push((last + 1, id - 1));
            }
            self.last_group = GroupId(id);
        } else if let Some(at) = self.unseen.iter().position(|(first, last)| (*first..=*last).contains(&id)) {
            let (first, last) = self.unseen[at];
            let around = [(first, id - 1), (id + 1, last)];
            self.unseen.splice(at..=at, around.into_iter().filter(|(first, last)| first <= last));
        }
    }

    /// True if the group was here and is not any more. Ids are never used again.
    #[must_use]
    pub fn is_gone(&self, group: GroupId) -> bool {
        let unseen = |(first, last): &(u64, u64)| (*first..=*last).contains(&group.0);
        group <= self.last_group && !self.groups.contains_key(&group) && !self.unseen.iter().any(unseen)
    }

    fn add_layers(&mut self, layers: &[(VolumeId, LayerId)]) {
        for (volume, layer) in layers {
            self.layers.insert(*layer, *volume);
            self.last_layer = self.last_layer.max(*layer);
        }
    }

    fn remove_layers<'a>(&mut self, layers: impl Iterator<Item = &'a LayerId>) {
        for layer in layers {
            self.layers.remove(layer);
        }
    }

    fn delete_volume(&mut self, volume: VolumeId) {
        // The group goes with its last volume. Its id is never used again, so a late duplicate of one of its records is
        // known by an id that is neither live nor new. In delta mode the backup learns of it by a run, which needs the
        // group.
        if let Some(spec) = self.volumes.remove(&volume)
            && let Some(group) = self.groups.get_mut(&spec.group)
        {
            group.volumes.retain(|v| *v != volume);
            self.layers.retain(|_, v| *v != volume);
            if group.volumes.is_empty() && group.mode.is_continuous() {
                self.groups.remove(&spec.group);
            }
            self.prune_snapshots();
        }
    }

    /// The primary's side of modes and runs. A step that does not fit the mode changes nothing.
    fn apply_mode(&mut self, lsn: Lsn, time_unix_ms: i64, id: GroupId, control: &Control) {
        let specs: Vec<VolumeSpec> = self.volumes_of(id).cloned().collect();
        let Some(group) = self.groups.get_mut(&id) else { return };
        match (control, &mut group.mode) {
            (Control::Switch { cause, since_unix_ms, all, unmirrored, .. }, GroupMode::Continuous { .. }) => {
                group.mode = GroupMode::Delta { since: lsn, cause: cause.clone(), full: *all, run: None };
                group.marked_since_unix_ms = *since_unix_ms;
                self.unmirror(unmirrored);
            }
            (Control::Switch { cause: new, since_unix_ms, all, .. }, GroupMode::Delta { cause, full, run, .. }) => {
                cause.clone_from(new);
                *full |= *all;
                // What a final round has retained became marks, which its commit does not carry.
                if let Some(run) = run.as_mut().filter(|run| run.kind.retains()) {
                    run.kind = RunKind::Round;
                }
                group.marked_since_unix_ms = group.marked_since_unix_ms.or(*since_unix_ms);
            }
            (Control::Cut { kind, layers, .. }, GroupMode::Delta { run: run @ None, full, .. }) => {
                *run = Some(PrimaryRun {
                    id: lsn.0,
                    kind: *kind,
                    position: group.position,
                    time_unix_ms,
                    layers: layers.clone(),
                    specs,
                    marked_since_unix_ms: group.marked_since_unix_ms.take(),
                    everything: *full,
                });
                // Committed, the run has carried every lane: the next record of each follows it.
                group.lanes = LanePlaces::all(Place { position: group.position, time_unix_ms: group.time_unix_ms });
                self.add_layers(layers);
            }
            (Control::Demote { .. }, GroupMode::Delta { run: Some(run), .. }) if run.kind.retains() => {
                run.kind = RunKind::Round;
                group.marked_since_unix_ms.get_or_insert(run.time_unix_ms);
            }
            (Control::Clear { unmirrored, .. }, GroupMode::Delta { run, full, .. }) => {
                let Some(run) = run.take() else { return };
                // What was marked behind its cut still is.
                *full &= !run.everything;
                if run.kind.retains() {
                    group.mode = GroupMode::Continuous { from: Lsn(run.id) };
                }
                // The run carried the deletion of its last volume, or the record of that will be shipped.
                if group.volumes.is_empty() && (run.kind.retains() || group.position.lsn.0 < run.id) {
                    self.groups.remove(&id);
                }
                self.remove_layers(run.layers.iter().map(|(_, layer)| layer));
                self.unmirror(unmirrored);
            }
            (Control::AbortRun { .. }, GroupMode::Delta { run, .. }) => {
                let Some(run) = run.take() else { return };
                // What it carried is older than what was marked since.
                group.marked_since_unix_ms = run.marked_since_unix_ms.or(group.marked_since_unix_ms);
                self.remove_layers(run.layers.iter().map(|(_, layer)| layer));
            }
            _ => {}
        }
    }

    fn begin_run(&mut self, begin: &BeginRun) {
        for spec in &begin.specs {
            self.note_ids(spec);
        }
        self.note_group(begin.group);
        self.add_layers(&begin.layers);
        let group = self
            .groups
            .entry(begin.group)
            .or_insert_with(|| GroupState { consistent: false, ..GroupState::new(begin.group, &begin.group_name) });
        // The image from before a run that was not committed is still the image.
        let mut layers = group.run.take().map(|run| run.layers).unwrap_or_default();
        layers.extend_from_slice(&begin.layers);
        group.run = Some(ReplicaRun {
            id: begin.id,
            cut: begin.cut,
            time_unix_ms: begin.time_unix_ms,
            specs: begin.specs.clone(),
            layers,
            progress: None,
            cancelled: false,
            snapshots: begin.snapshots.clone(),
        });
    }

    fn commit_run(&mut self, id: GroupId, layers: &[LayerId]) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let Some(run) = group.run.take() else { return };
        for volume in std::mem::take(&mut group.volumes) {
            self.volumes.remove(&volume);
            self.layers.retain(|_, v| *v != volume || run.specs.iter().any(|spec| spec.id == volume));
        }
        for layer in layers {
            self.layers.remove(layer);
        }
        self.prune_snapshots();
        let Some(group) = self.groups.get_mut(&id) else { return };
        if run.specs.is_empty() {
            self.groups.remove(&id);
            return;
        }
        group.volumes = run.specs.iter().map(|spec| spec.id).collect();
        (group.position, group.time_unix_ms) = (run.cut, run.time_unix_ms);
        group.lanes = LanePlaces::all(Place { position: run.cut, time_unix_ms: run.time_unix_ms });
        (group.committed_run, group.consistent) = (run.id, true);
        (group.diverged, group.mode) = (None, GroupMode::Continuous { from: Lsn::ZERO });
        self.volumes.extend(run.specs.into_iter().map(|spec| (spec.id, spec)));
    }
}

fn delta_from(since: Lsn, full: bool) -> GroupMode {
    let cause = if full { "initial" } else { "link_down" };
    GroupMode::Delta { since, cause: cause.into(), full, run: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_group_that_has_not_come_yet_is_not_gone() {
        let mut state = NodeState::default();
        let gone = |state: &NodeState| (1..=7).filter(|id| state.is_gone(GroupId(*id))).collect::<Vec<_>>();
        state.note_group(GroupId(6));
        assert_eq!(gone(&state), [6]);
        state.note_group(GroupId(3));
        state.note_group(GroupId(1));
        assert_eq!(gone(&state), [1, 3, 6]);
        state.note_group(GroupId(7));
        state.note_group(GroupId(3));
        assert_eq!(state.unseen, [(2, 2), (4, 5)]);
    }

    proptest! {
        #[test]
        fn sequences_are_remembered_as_a_set_remembers_them(steps in proptest::collection::vec(1u64..200, 1..400), big in proptest::option::of(1000u64..5000)) {
            let mut client = ClientState::new();
            let mut model = BTreeSet::new();
            let mut base = 1;
            for (n, step) in steps.iter().enumerate() {
                let sequence = if step % 3 == 0 { base + step } else { base.saturating_sub(*step).max(1) };
                if n == 100 { base += big.unwrap_or(0); }
                let highest = model.last().copied().unwrap_or(0);
                let expected = if sequence <= highest && highest - sequence >= SEQUENCE_WINDOW {
                    SequenceCheck::TooOld { highest }
                } else if model.contains(&sequence) { SequenceCheck::Applied(client.lsn) } else { SequenceCheck::Fresh };
                prop_assert_eq!(client.check(sequence), expected);
                if expected == SequenceCheck::Fresh {
                    client.mark(sequence, Lsn(n as u64));
                    model.insert(sequence);
                    base = base.max(sequence);
                }
            }
        }
    }
}
