//! The backup's node: a store, the receiver of the primary's session, and what readers and operators ask.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use understudy_common::{
    checksum::crc32c,
    config::{BackupConfig, LinkConfig, ScrubConfig},
    delta::BlockSet,
    events::EventLog,
    lane::LANES_MAX,
    process::{Exit, Failure},
    record::Control,
    scrub::{self, Scrub},
    state::{GroupState, Place, Snapshot},
    store::{self, ImageReader, ReadFailure, Recovery, Role, Store, StoreConfig, driver::Threads, setup},
    telemetry::Metrics,
    types::{GroupId, Lsn, Position, SnapshotId, Uid, VolumeId, VolumeSpec},
};
use understudy_proto::{convert, pool, seal::Sealed as _, v1};

use crate::{
    api::{EventStream, ImageInfo, NodeError, PieceContent, ReplicaNode, VolumeKey, When},
    clones::{self, CloneWrite, Clones},
    receiver::{AttachRefusal, DivergedGroup, FrameRefusal, Hello, Receiver},
    run_receiver::RunRefusal,
};

/// How long a new session waits for the records of the one before to become durable.
const DRAIN: Duration = Duration::from_secs(10);

/// What a simulation replaces.
pub struct Seams {
    /// Makes the ids of sessions; unpredictable in service.
    pub session_id: Box<dyn Fn() -> Uid + Send + Sync>,
    /// Reads stay on the calling thread: for simulated disks.
    pub inline_reads: bool,
    /// In memory in a simulation; in the data directory in service.
    pub events: EventLog,
    /// `[scrub]`.
    pub scrub: ScrubConfig,
    /// Where the files of clones are, and how much may be written to all of them; without it there are none.
    pub clones: Option<(PathBuf, u64)>,
}

impl Default for Seams {
    fn default() -> Self {
        Self {
            session_id: Box::new(|| Uid(rand::random())),
            inline_reads: false,
            events: EventLog::default(),
            scrub: ScrubConfig { interval: Duration::ZERO, bytes_per_s: None },
            clones: None,
        }
    }
}

struct Inner {
    store: Arc<Store>,
    receiver: Mutex<Receiver>,
    /// An answer may have become possible without a sync.
    progress: Notify,
    link: Mutex<Link>,
    events: EventLog,
    metrics: Metrics,
    recovery: Recovery,
    recovery_time: Duration,
    link_config: LinkConfig,
    seams: Seams,
    scrub: Scrub,
    clones: Clones,
    stop: CancellationToken,
    scrubbing: Mutex<Option<JoinHandle<()>>>,
    threads: Mutex<Option<Threads>>,
    /// The role has changed: the process is to end.
    changed: CancellationToken,
}

/// By lane, Unix milliseconds; 0: not known.
type Complete = [i64; LANES_MAX];

/// What is known of the primary.
struct Link {
    session: Option<Uid>,
    last_heard: Option<Instant>,
    since_unix_ms: i64,
    /// The primary's time at which a lane of a group had nothing that is missing here.
    complete: BTreeMap<GroupId, Complete>,
    /// What is so as soon as this node is durable up to an LSN.
    pending: Option<(Lsn, BTreeMap<GroupId, Complete>)>,
    announced: bool,
    /// What the primary had acknowledged and this side did not hold, as of the last heartbeat.
    bytes_at_risk: u64,
    /// The primary's lease does not end before.
    lease_until: Option<Instant>,
    /// The last primary that was refused since one was accepted.
    refused: Option<Refused>,
}

struct Refused {
    why: String,
    /// Both sides have what the other has not.
    split: bool,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

/// Recovers the node of a data directory and starts its threads.
///
/// # Errors
/// With the exit code of the process.
pub async fn open(config: BackupConfig, metrics: Metrics) -> Result<Node, Failure> {
    let store_config = setup::store_config(&config.pool, &config.staging, &config.checkpoint, false);
    let opening = tokio::task::spawn_blocking(move || open_blocking(&config, store_config, metrics));
    opening.await.map_err(|error| Failure::new(Exit::Internal, error))?
}

fn open_blocking(config: &BackupConfig, store_config: StoreConfig, metrics: Metrics) -> Result<Node, Failure> {
    let start = std::time::Instant::now();
    let storage = setup::storage(&config.data_dir, &config.staging)
        .map_err(|error| Failure::new(Exit::Storage, format!("{}: {error}", config.data_dir.display())))?;
    let (store, recovery) = store::open(Arc::clone(&storage), store_config, Role::Backup, &mut || Uid(rand::random()))
        .map_err(|error| Failure::new(exit_of(&error), error))?;
    let recovery_time = start.elapsed();
    info!(
        records = recovery.records,
        replayed = recovery.replayed,
        bytes = recovery.bytes,
        dropped_bytes = recovery.dropped_bytes,
        seconds = recovery_time.as_secs_f64(),
        "recovered"
    );
    observe(&store, &metrics);
    let threads = Threads::start(&store).map_err(|error| Failure::new(Exit::Internal, error))?;
    let events = EventLog::open(storage, metrics.events_unwritten.clone());
    clones::clear(&config.data_dir);
    let clones = Some((config.data_dir.clone(), config.clones.capacity_bytes));
    let seams = Seams { events, scrub: config.scrub, clones, ..Seams::default() };
    let link = config.link.clone();
    Ok(Node::with_seams(store, link, metrics, recovery, recovery_time, Some(threads), seams))
}

/// Exit code of a store that does not open.
fn exit_of(error: &store::OpenError) -> Exit {
    match error {
        store::OpenError::Role { .. } => Exit::Config,
        _ => Exit::Storage,
    }
}

fn observe(store: &Store, metrics: &Metrics) {
    let (sync, checkpoint) = (metrics.journal_sync_seconds.clone(), metrics.checkpoint_seconds.clone());
    // They are set once, here.
    let _ = store.stats().on_batch.set(Box::new(move |seconds| sync.observe(seconds)));
    let _ = store.stats().on_checkpoint.set(Box::new(move |seconds| checkpoint.observe(seconds)));
}

/// Unix time in milliseconds.
pub(crate) fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

impl Node {
    /// A node over an open store. `threads` are ended when the node is closed.
    #[must_use]
    pub fn with_seams(
        store: Arc<Store>,
        link_config: LinkConfig,
        metrics: Metrics,
        recovery: Recovery,
        recovery_time: Duration,
        threads: Option<Threads>,
        seams: Seams,
    ) -> Self {
        let events = seams.events.clone();
        events.record(unix_ms(), "node.started", "the backup has started", []);
        let link = Link {
            session: None,
            last_heard: None,
            since_unix_ms: unix_ms(),
            complete: BTreeMap::new(),
            pending: None,
            announced: false,
            bytes_at_risk: 0,
            lease_until: None,
            refused: None,
        };
        metrics.staging_capacity_bytes.set(gauge(store.config().journal.capacity_bytes));
        let timeout = link_config.timeout;
        let (at, inline) = (seams.scrub, seams.inline_reads);
        let scrub = Scrub::new(Arc::clone(&store), at, events.clone(), metrics.clone(), unix_ms, inline);
        let (dir, capacity) = seams.clones.clone().map_or((None, 0), |(dir, bytes)| (Some(dir), bytes));
        let clones = Clones::new(Arc::clone(&store), dir, capacity, events.clone(), metrics.clone());
        let giving_way = clones.clone();
        let receiver = Receiver::new(Arc::clone(&store)).with_giving_way(move || giving_way.give_way());
        let stop = CancellationToken::new();
        let scrubbing = Mutex::new(Some(tokio::spawn(scrub.clone().run(stop.clone()))));
        let node = Self {
            inner: Arc::new(Inner {
                receiver: Mutex::new(receiver),
                store,
                progress: Notify::new(),
                link: Mutex::new(link),
                events,
                metrics,
                recovery,
                recovery_time,
                link_config,
                seams,
                scrub,
                clones,
                stop,
                scrubbing,
                threads: Mutex::new(threads),
                changed: CancellationToken::new(),
            }),
        };
        let (store, events) = (Arc::clone(&node.inner.store), node.inner.events.clone());
        tokio::spawn(store.watch_pool(events, unix_ms, node.inner.stop.clone()));
        // A link that is lost is noticed also where nobody asks: what is held for the primary goes.
        let (inner, stop) = (Arc::downgrade(&node.inner), node.inner.stop.clone());
        tokio::spawn(async move {
            while stop.run_until_cancelled(tokio::time::sleep(timeout)).await.is_some()
                && let Some(inner) = inner.upgrade()
            {
                Self { inner }.is_attached();
            }
        });
        node
    }

    /// The store below.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.inner.store
    }

    /// The scrub of this side.
    #[must_use]
    pub fn scrub_of_store(&self) -> &Scrub {
        &self.inner.scrub
    }

    fn check_session(&self, session: &[u8]) -> Result<(), NodeError> {
        let session = convert::uid("session", session)?;
        match self.inner.receiver.lock().session() {
            Some(open) if open == session => Ok(()),
            _ => Err(NodeError::OldSession { session }),
        }
    }

    /// The primary was heard of within the link's timeout.
    fn is_attached(&self) -> bool {
        let (attached, changed, since) = {
            let mut link = self.inner.link.lock();
            let heard = link.last_heard.is_some_and(|at| at.elapsed() <= self.inner.link_config.timeout);
            let attached = link.session.is_some() && heard;
            let changed = attached != link.announced;
            if changed {
                link.announced = attached;
                link.since_unix_ms = unix_ms();
            }
            (attached, changed, link.since_unix_ms)
        };
        if changed {
            let (kind, message) = if attached {
                ("link.attached", "the primary is attached")
            } else {
                ("link.lost", "the primary was not heard of within [link] timeout")
            };
            if !attached {
                self.inner.receiver.lock().forget_verify();
            }
            info!("{kind}");
            self.inner.events.record(since, kind, message, []);
        }
        attached
    }

    fn heard(&self) {
        self.inner.link.lock().last_heard = Some(Instant::now());
        self.is_attached();
    }

    fn volume(&self, key: &VolumeKey) -> Result<VolumeSpec, NodeError> {
        let spec = self.inner.store.with_state(|state| match key {
            VolumeKey::Id(id) => state.volumes.get(id).cloned(),
            VolumeKey::Name(name) => state.volume_by_name(name).cloned(),
        });
        spec.ok_or_else(|| NodeError::NoVolume { volume: key.to_string() })
    }

    async fn wait_durable(&self, lsn: Lsn) -> Result<(), NodeError> {
        let mut marks = self.inner.store.marks();
        let waiting = marks.wait_for(|m| m.durable >= lsn || m.failed);
        let failed = match timeout(DRAIN, waiting).await {
            Ok(Ok(marks)) => marks.failed,
            Ok(Err(_)) => true,
            Err(_) => return Err(NodeError::Busy { why: "records of the session before are not durable yet".into() }),
        };
        if failed { Err(self.storage_error()) } else { Ok(()) }
    }

    async fn wait_applied(&self, lsn: Lsn) -> Result<(), NodeError> {
        let mut marks = self.inner.store.marks();
        let ended = marks.wait_for(|m| m.applied >= lsn || m.failed).await.is_err();
        if ended || self.inner.store.failure().is_some() { Err(self.storage_error()) } else { Ok(()) }
    }

    /// Reads of the disk stay off the runtime's threads, but in a simulation.
    async fn blocking<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> Result<T, NodeError> + Send + 'static,
    ) -> Result<T, NodeError> {
        if self.inner.seams.inline_reads {
            return read();
        }
        let done = tokio::task::spawn_blocking(read).await;
        done.map_err(|error| NodeError::Storage { message: format!("a read was ended: {error}") })?
    }

    async fn take(&self, records: Vec<v1::StagedRecord>) -> Result<(), NodeError> {
        let store = &self.inner.store;
        let mut marks = store.marks();
        for record in records {
            let (session, ship) = (convert::uid("session", &record.session)?, record.ship);
            let record = convert::record_from_wire(record)?;
            loop {
                marks.mark_unchanged();
                if store.queue_bytes() <= store.config().pending_bytes {
                    let taken = self.inner.receiver.lock().on_record(session, ship, &record);
                    match taken {
                        Ok(()) => break,
                        // It has asked for what it lacks.
                        Err(FrameRefusal::Busy(_)) => {}
                        Err(FrameRefusal::OldSession(session)) => return Err(NodeError::OldSession { session }),
                        Err(FrameRefusal::Store(error)) => {
                            return Err(NodeError::Storage { message: error.to_string() });
                        }
                        Err(error) => return Err(NodeError::Frame { why: error.to_string() }),
                    }
                }
                self.taken();
                if marks.changed().await.is_err() || marks.borrow().failed {
                    return Err(self.storage_error());
                }
            }
        }
        Ok(())
    }

    /// Records were taken, some of which perhaps need no sync to be answered.
    fn taken(&self) {
        self.heard();
        self.inner.store.wake_journal();
        self.inner.progress.notify_waiters();
    }

    fn storage_error(&self) -> NodeError {
        NodeError::Storage { message: self.inner.store.failure().unwrap_or_default() }
    }

    /// Seconds; 0 where nothing is known to be missing. Of the lanes by number, as far as any had a record.
    fn ages(&self, group: &GroupState) -> Vec<f64> {
        let complete = self.inner.link.lock().complete.get(&group.id).copied().unwrap_or_default();
        let now = unix_ms();
        // Between two heartbeats of a primary that is there, nothing is known to be missing.
        let fresh = self.inner.link_config.heartbeat * 2 + Duration::from_millis(500);
        let age = |lane: u8| {
            let known = complete[usize::from(lane)].max(group.lanes.place(lane).time_unix_ms);
            let age = Duration::from_millis(u64::try_from(now - known).unwrap_or_default());
            if age <= fresh { 0.0 } else { age.as_secs_f64() }
        };
        // A lane that the primary has told of and that has had no record here is behind the others.
        let newest = complete.iter().max().copied().unwrap_or_default();
        let told = complete.iter().rposition(|time| *time < newest).map_or(0, |at| at + 1);
        (0..).take(group.lanes.own().count().max(told).max(1)).map(age).collect()
    }

    /// The primary says what the newest record of each lane is. What is here of it counts when it is durable.
    fn note_complete(&self, request: &v1::HeartbeatRequest, durable: Lsn) {
        let store = &self.inner.store;
        let held = store
            .with_state(|state| state.groups.values().map(|g| (g.id, g.lanes.clone())).collect::<BTreeMap<_, _>>());
        // Behind everything that was looked at.
        let newest = Lsn(store.next_lsn().0 - 1);
        let mut complete: BTreeMap<GroupId, Complete> = BTreeMap::new();
        for place in &request.complete {
            let (group, lane) = (GroupId(place.group_id), u8::try_from(place.lane).unwrap_or(u8::MAX));
            let Some(lanes) = held.get(&group) else { continue };
            let of = complete.entry(group).or_insert([request.time_unix_ms; LANES_MAX]);
            if let Some(of) = of.get_mut(usize::from(lane))
                && lanes.of(lane) < place.position.unwrap_or_default().into()
            {
                *of = 0;
            }
        }
        let mut link = self.inner.link.lock();
        let before = link.pending.replace((newest, complete));
        for (_, complete) in before.into_iter().chain(link.pending.clone()).filter(|(at, _)| *at <= durable) {
            for (group, times) in complete {
                let known = link.complete.entry(group).or_default();
                known.iter_mut().zip(times).for_each(|(known, time)| *known = (*known).max(time));
            }
        }
        link.complete.retain(|group, _| held.contains_key(group));
    }

    /// The recovery point of each lane, where there are several.
    fn lane_status(group: &GroupState, ages: &[f64]) -> Vec<v1::LaneStatus> {
        let status = |(lane, age_seconds): (u8, &f64)| {
            let Place { position, time_unix_ms } = group.lanes.place(lane);
            let position = Some(position.into());
            let recovery_point = Some(v1::RecoveryPoint { position, time_unix_ms, age_seconds: *age_seconds });
            v1::LaneStatus { lane: lane.into(), name: lane.to_string(), recovery_point, ..v1::LaneStatus::default() }
        };
        if ages.len() > 1 { (0..).zip(ages).map(status).collect() } else { Vec::new() }
    }

    /// Refuses a promotion beside a primary that serves, as far as this side can know.
    fn check_primary_is_gone(&self) -> Result<(), NodeError> {
        let attached = self.is_attached();
        let link = self.inner.link.lock();
        let lease = link.lease_until.map(|until| until.saturating_duration_since(Instant::now()));
        let why = match lease.filter(|rest| !rest.is_zero()) {
            _ if attached => "the primary is attached".to_owned(),
            Some(rest) => format!("the primary's lease holds for another {} ms", rest.as_millis()),
            None => return Ok(()),
        };
        let heard_seconds = link.last_heard.map_or(0, |at| at.elapsed().as_secs());
        Err(NodeError::PrimaryServes { why, bytes_at_risk: link.bytes_at_risk, heard_seconds })
    }

    /// Behind the last record: nothing arrives any more.
    async fn promote_closed(&self, request: &v1::PromoteRequest) -> Result<(u64, Vec<v1::PromotedGroup>), NodeError> {
        let store = &self.inner.store;
        self.wait_durable(Lsn(store.next_lsn().0 - 1)).await?;
        for place in &request.handed_over {
            let (group, position) = (GroupId(place.group_id), Position::from(place.position.unwrap_or_default()));
            let held = store.with_state(|state| state.groups.get(&group).map_or(Position::default(), |g| g.position));
            if held < position {
                return Err(NodeError::Role(format!(
                    "group {group} is at {held} here and was handed over at {position}: promote with --force, and what is \
                     between is lost, or start the old primary again"
                )));
            }
        }
        // What was handed over is as new as it can be.
        let ages = if request.handed_over.is_empty() { self.group_ages() } else { BTreeMap::new() };
        let (generation, groups) = store.promote(promotion(request), Uid(rand::random())).map_err(of_role)?;
        Ok((generation, groups.into_iter().map(|promoted| promoted_to_wire(promoted, &ages)).collect()))
    }

    /// How old the image of each group is at most, by name.
    fn group_ages(&self) -> BTreeMap<String, f64> {
        let groups: Vec<GroupState> = self.inner.store.with_state(|state| state.groups.values().cloned().collect());
        let oldest = |g: &GroupState| self.ages(g).into_iter().fold(0.0, f64::max);
        groups.iter().map(|g| (g.name.clone(), oldest(g))).collect()
    }

    /// What a promotion would do. It changes nothing, and does not end the session.
    fn plan_promotion(&self, request: &v1::PromoteRequest) -> Result<v1::PromoteResponse, NodeError> {
        let store = &self.inner.store;
        let groups = store.plan_promotion(promotion(request)).map_err(of_role)?;
        let ages = self.group_ages();
        Ok(v1::PromoteResponse {
            generation: store.identity().generation,
            groups: groups.into_iter().map(|promoted| promoted_to_wire(promoted, &ages)).collect(),
            bytes_at_risk: self.inner.link.lock().bytes_at_risk,
        })
    }

    fn volume_status(&self, spec: &VolumeSpec, group: Option<&GroupState>, durable: bool) -> v1::VolumeStatus {
        let position = group.map_or(Position::default(), |g| g.position);
        let ages = group.map(|g| self.ages(g)).unwrap_or_default();
        let age_seconds = ages.iter().copied().fold(0.0, f64::max);
        // Of several lanes the one that is behind says how much of the group is here.
        let behind = group
            .into_iter()
            .flat_map(|g| (0..).zip(&ages).filter(|(_, age)| **age > 0.0).map(|(l, _)| g.lanes.place(l)));
        let newest = Place { position, time_unix_ms: group.map_or(0, |g| g.time_unix_ms) };
        let point = behind.min_by_key(|place| place.position).unwrap_or(newest);
        let wire = Some(v1::Position::from(position));
        let in_run = group.is_some_and(|g| g.run.is_some());
        v1::VolumeStatus {
            id: spec.id.0,
            name: spec.name.clone(),
            group: spec.group_name.clone(),
            group_id: spec.group.0,
            size_bytes: spec.size_bytes,
            block_bytes: spec.block_size.bytes(),
            mode: if in_run { v1::Mode::Delta } else { v1::Mode::Continuous }.into(),
            cause: String::new(),
            phase: if in_run { v1::Phase::Round } else { v1::Phase::Streaming }.into(),
            position: Some(v1::VolumePosition {
                next: wire,
                durable: durable.then_some(wire).flatten(),
                sent: wire,
                acked: durable.then_some(wire).flatten(),
                applied: None,
            }),
            bytes_at_risk: 0,
            recovery_point: Some(v1::RecoveryPoint {
                position: Some(point.position.into()),
                time_unix_ms: point.time_unix_ms,
                age_seconds,
            }),
            // Whole records in their order, or a run below the image from before it: there is one at every instant, but
            // before the first run of a group that came without one is committed.
            consistent: group.is_none_or(|g| g.consistent),
            diverged: group.is_some_and(|g| g.diverged.is_some()),
            ack: v1::AckRule::from(spec.ack).into(),
            away: v1::AwayRule::from(spec.away).into(),
            lanes: group.map(|g| Self::lane_status(g, &ages)).unwrap_or_default(),
            ..v1::VolumeStatus::default()
        }
    }
}

impl ReplicaNode for Node {
    type Image = Arc<ImageReader>;

    async fn attach(&self, request: v1::AttachRequest) -> Result<v1::AttachResponse, NodeError> {
        let hello = Hello {
            pair: convert::uid("pair_id", &request.pair_id)?,
            instance: convert::uid("instance_id", &request.instance_id)?,
            generation: request.generation,
            generation_id: convert::uid("generation_id", &request.generation_id)?,
            protocol: request.protocol,
            segment_bytes: request.segment_bytes,
            durable: Lsn(request.durable_lsn),
            groups: request.groups.map(|groups| groups.group_ids.into_iter().map(GroupId).collect()),
            history: convert::history_from_wire(request.history)?,
            lives: convert::lives_from_wire(request.lives)?,
        };
        let session = (self.inner.seams.session_id)();
        let attached = self.inner.receiver.lock().attach(&hello, session);
        let (positions, drained) = attached.inspect_err(|error| {
            warn!(%error, "attach refused");
            let why = error.to_string();
            let kind =
                if matches!(error, AttachRefusal::Fork { .. }) { "split_brain.detected" } else { "link.refused" };
            let refused = Refused { why: why.clone(), split: error.is_split() };
            // It will be asked again and again.
            if self.inner.link.lock().refused.replace(refused).is_none_or(|before| before.why != why) {
                self.inner.events.record(unix_ms(), kind, why, []);
            }
        })?;
        self.wait_durable(drained).await?;
        {
            let mut link = self.inner.link.lock();
            (link.session, link.refused) = (Some(session), None);
        }
        self.heard();
        let identity = self.inner.store.identity();
        let diverged = self.inner.receiver.lock().diverged();
        let unfinished = |which: fn(&GroupState) -> bool| {
            self.inner.store.with_state(|s| s.groups.values().filter(|g| which(g)).map(|g| g.id.0).collect())
        };
        Ok(v1::AttachResponse {
            pair_id: identity.pair.0.to_vec().into(),
            instance_id: identity.instance.0.to_vec().into(),
            session: session.0.to_vec().into(),
            bases: positions.iter().map(|(group, lanes)| place(*group, 0, lanes.base())).collect(),
            positions: positions
                .iter()
                .flat_map(|(group, lanes)| lanes.own().map(|(lane, own)| place(*group, lane, own)))
                .collect(),
            max_frame_bytes: 0,
            inconsistent_groups: unfinished(|group| !group.consistent),
            groups_in_run: unfinished(|group| group.run.is_some()),
            diverged: diverged.into_iter().map(diverged_to_wire).collect(),
        })
    }

    async fn receive(&self, records: Vec<v1::StagedRecord>) -> Result<(), NodeError> {
        let taken = self.take(records).await;
        self.taken();
        taken
    }

    async fn acknowledged(&self, session: Uid, after: u64) -> Result<v1::StagedAck, NodeError> {
        let mut marks = self.inner.store.marks();
        loop {
            let progress = self.inner.progress.notified();
            let now = *marks.borrow_and_update();
            if now.failed {
                return Err(self.storage_error());
            }
            let answer = {
                let mut receiver = self.inner.receiver.lock();
                if receiver.session() != Some(session) {
                    return Err(NodeError::OldSession { session });
                }
                receiver.poll_answer(now.durable)
            };
            if let Some((_, answer)) = answer
                && (answer.ship > after || !answer.refusals.is_empty())
            {
                return Ok(v1::StagedAck {
                    session: session.0.to_vec().into(),
                    ship: answer.ship,
                    refusals: answer.refusals.into_iter().map(refusal).collect(),
                });
            }
            tokio::select! {
                biased;
                changed = marks.changed() => if changed.is_err() { return Err(self.storage_error()) },
                () = progress => {}
            }
        }
    }

    async fn heartbeat(&self, request: v1::HeartbeatRequest) -> Result<v1::HeartbeatResponse, NodeError> {
        self.check_session(&request.session)?;
        self.heard();
        {
            let mut link = self.inner.link.lock();
            link.bytes_at_risk = request.bytes_at_risk;
            link.lease_until = request.lease_remaining_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
        }
        if request.sync {
            let store = &self.inner.store;
            let probe = store.submit_control(GroupId::default(), Control::Probe, unix_ms());
            let probe = probe.map_err(|error| NodeError::Busy { why: error.to_string() })?;
            self.wait_durable(probe.lsn).await?;
        }
        let durable = self.inner.store.marks().borrow().durable;
        self.note_complete(&request, durable);
        let durable_ship = self.inner.receiver.lock().poll_answered(durable);
        Ok(v1::HeartbeatResponse { session: request.session, time_unix_ms: unix_ms(), durable_ship })
    }

    async fn begin_run(&self, request: v1::BeginRunRequest) -> Result<v1::BeginRunResponse, NodeError> {
        let begun = self.inner.receiver.lock().on_begin(&request);
        let group = request.group.clone();
        match begun {
            Ok(When { at, answer }) => {
                self.wait_durable(at).await?;
                if !answer.committed && answer.progress.is_none() {
                    let fields = [("group", group), ("run", request.run.to_string()), ("kind", request.kind)];
                    self.inner.events.record(unix_ms(), "run.begun", "the primary has begun a run", fields);
                }
                Ok(answer)
            }
            Err(RunRefusal::Cannot(refused)) => {
                warn!(group, cause = refused.cause, message = refused.message, "a run was refused");
                let fields = [("group", group), ("cause", refused.cause.to_owned())];
                self.inner.events.record(unix_ms(), "run.refused", refused.message.clone(), fields);
                let (session, refusal) = (request.session, Some(refusal(refused)));
                Ok(v1::BeginRunResponse { session, refusal, ..Default::default() }.sealed())
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn take_batch(&self, request: v1::DeltaBatchRequest) -> Result<When<v1::DeltaBatchResponse>, NodeError> {
        self.heard();
        let store = &self.inner.store;
        loop {
            let mut marks = store.marks();
            marks.mark_unchanged();
            if store.queue_bytes() <= store.config().pending_bytes {
                let taken = self.inner.receiver.lock().on_batch(&request);
                match taken {
                    Ok(when) => return Ok(when),
                    // It has asked for what it lacks.
                    Err(RunRefusal::Busy(_)) => {}
                    Err(RunRefusal::Cannot(refused)) => {
                        warn!(group = %refused.group, message = refused.message, "a run cannot go on");
                        let refusal = Some(refusal(refused));
                        let (session, run, number) = (request.session, request.run, request.number - 1);
                        let answer = v1::DeltaBatchResponse { session, run, number, refusal, crc32c: 0 };
                        return Ok(When { at: Lsn::ZERO, answer: answer.sealed() });
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            if marks.changed().await.is_err() || marks.borrow().failed {
                return Err(self.storage_error());
            }
        }
    }

    async fn durable(&self, lsn: Lsn) -> Result<(), NodeError> {
        self.wait_durable(lsn).await
    }

    async fn digest(&self, request: v1::DigestRequest) -> Result<v1::DigestResponse, NodeError> {
        let job = self.inner.receiver.lock().on_digest(request)?;
        self.wait_applied(job.ready_at()).await?;
        self.blocking(move || Ok(job.run()?)).await
    }

    async fn commit_run(&self, request: v1::CommitDeltaRequest) -> Result<v1::CommitDeltaResponse, NodeError> {
        let When { at, answer } = self.inner.receiver.lock().on_commit(&request)?;
        self.wait_durable(at).await?;
        let position = answer.position.map(|p| Position::from(p).to_string()).unwrap_or_default();
        let fields =
            [("group", request.group_id.to_string()), ("run", request.run.to_string()), ("position", position)];
        self.inner.events.record(unix_ms(), "run.committed", "the image is that of the run's cut", fields);
        Ok(answer)
    }

    async fn abort_run(&self, request: v1::AbortDeltaRequest) -> Result<v1::AbortDeltaResponse, NodeError> {
        let When { at, answer } = self.inner.receiver.lock().on_abort(&request, unix_ms())?;
        self.wait_durable(at).await?;
        Ok(answer)
    }

    async fn end_verify(&self, request: v1::EndVerifyRequest) -> Result<v1::EndVerifyResponse, NodeError> {
        Ok(self.inner.receiver.lock().on_end_verify(&request)?)
    }

    async fn scrub(&self, request: v1::ReplicaScrubRequest) -> Result<v1::ReplicaScrubResponse, NodeError> {
        self.check_session(&request.session)?;
        if request.start {
            self.inner.scrub.ask(Some(VolumeId(request.volume_id)).filter(|id| id.0 != 0));
        }
        let status = Some(convert::scrub_to_wire(&self.inner.scrub.status()));
        let damaged = convert::damaged_to_wire(&self.inner.store);
        Ok(v1::ReplicaScrubResponse { session: request.session, status, damaged })
    }

    async fn fetch_block(&self, request: v1::FetchBlockRequest) -> Result<v1::FetchBlockResponse, NodeError> {
        self.check_session(&request.session)?;
        let spec = self.volume(&VolumeKey::Id(VolumeId(request.volume_id)))?;
        let (store, block, id) = (Arc::clone(&self.inner.store), request.block, SnapshotId(request.snapshot_id));
        // The bytes are compared with their checksum: what is damaged here too goes nowhere.
        let read = move || match id.0 {
            0 => store.read(spec.id, block, 1).map(|read| read.data).map_err(|error| of_read(error, &spec)),
            _ => match store.snapshot_reader(id, spec.id) {
                Ok(reader) => reader.read(block, 1).map_err(|error| of_read(error, &spec)),
                Err(_) => Err(NodeError::NoSnapshot { volume: spec.name.clone(), snapshot: id.to_string() }),
            },
        };
        let data = self.blocking(read).await?;
        let crc32c = crc32c(&data);
        Ok(v1::FetchBlockResponse { session: request.session, data, crc32c })
    }

    async fn mend_block(&self, request: v1::MendBlockRequest) -> Result<v1::MendBlockResponse, NodeError> {
        self.check_session(&request.session)?;
        let v1::MendBlockRequest { session, volume_id, block, snapshot_id, data, crc32c: sent } = request;
        if crc32c(&data) != sent {
            return Ok(v1::MendBlockResponse { session, mended: false });
        }
        let store = Arc::clone(&self.inner.store);
        let mend = move || {
            let seen = store.seen_by_snapshot(SnapshotId(snapshot_id), VolumeId(volume_id), block);
            let mended = seen.and_then(|seen| seen.map_or(Ok(false), |suspect| scrub::mend(&store, suspect, &data)));
            mended.map_err(|error| NodeError::Storage { message: error.to_string() })
        };
        let mended = self.blocking(mend).await?;
        Ok(v1::MendBlockResponse { session, mended })
    }

    async fn divergence(&self, request: v1::GetDivergenceRequest) -> Result<BTreeMap<VolumeId, BlockSet>, NodeError> {
        self.check_session(&request.session)?;
        Ok(self.inner.store.divergence(GroupId(request.group_id)))
    }

    async fn promote(&self, request: v1::PromoteRequest) -> Result<v1::PromoteResponse, NodeError> {
        if request.validate_only {
            return self.plan_promotion(&request);
        }
        let planned = !request.handed_over.is_empty();
        let bytes_at_risk = self.inner.link.lock().bytes_at_risk;
        if !request.force && !planned {
            self.check_primary_is_gone()?;
        }
        self.inner.receiver.lock().close();
        let promoted = self.promote_closed(&request).await.map(|(generation, groups)| v1::PromoteResponse {
            generation,
            groups,
            bytes_at_risk: if planned { 0 } else { bytes_at_risk },
        });
        match &promoted {
            Ok(promoted) => {
                let generation = promoted.generation;
                info!(generation, "role.promoted");
                let (generation, forced) = (generation.to_string(), request.force.to_string());
                let fields = [("generation", generation), ("forced", forced), ("snapshot", request.at_snapshot)];
                self.inner.events.record(unix_ms(), "role.promoted", "this side is the primary from now on", fields);
                self.inner.changed.cancel();
            }
            Err(error) => {
                warn!(%error, "a promotion was refused");
                self.inner.receiver.lock().reopen();
            }
        }
        promoted
    }

    async fn resolve(&self) -> Result<v1::ResolveSplitBrainResponse, NodeError> {
        if !self.inner.link.lock().refused.as_ref().is_some_and(|refused| refused.split) {
            let why = "there is nothing to resolve: this backup has refused no primary because of a split since it \
                       started; if there is one, let the two sides meet first";
            return Err(NodeError::Role(why.to_owned()));
        }
        self.inner.receiver.lock().close();
        let generation = self.inner.store.identity().generation;
        self.inner.store.yield_node().map_err(|error| NodeError::Storage { message: error.to_string() })?;
        let message = "an operator gave up what this side has and the other has not";
        self.inner.events.record(unix_ms(), "role.yielded", message, []);
        self.inner.changed.cancel();
        Ok(v1::ResolveSplitBrainResponse { generation })
    }

    async fn snapshots(&self, group: Option<&str>) -> Result<Vec<v1::SnapshotInfo>, NodeError> {
        let store = Arc::clone(&self.inner.store);
        let found = store.with_state(|state| {
            let id = |name: &str| {
                let none = || NodeError::NoGroup { group: name.to_owned() };
                state.group_by_name(name).map(|group| group.id).ok_or_else(none)
            };
            Ok::<_, NodeError>(state.named_snapshots(group.map(id).transpose()?))
        })?;
        self.blocking(move || {
            // What is not in its place yet holds nothing.
            let described = |(snapshot, group): &(Snapshot, String)| {
                convert::snapshot_to_wire(snapshot, group, store.held_bytes(snapshot).unwrap_or(0))
            };
            Ok(found.iter().map(described).collect())
        })
        .await
    }

    async fn open_image(&self, volume: &VolumeKey, snapshot: Option<&str>) -> Result<Self::Image, NodeError> {
        let spec = self.volume(volume)?;
        let store = &self.inner.store;
        let opened = match snapshot {
            Some(name) => {
                let id = store.with_state(|state| state.snapshot_by_name(spec.group, name).map(|s| s.id));
                let none = || NodeError::NoSnapshot { volume: spec.name.clone(), snapshot: name.to_owned() };
                store.open_snapshot_image(spec.id, id.ok_or_else(none)?, unix_ms())
            }
            None => store.open_image(spec.id, unix_ms()),
        };
        let image = opened.map_err(|error| of_read(error, &spec))?;
        self.wait_applied(image.ready_at()).await?;
        Ok(Arc::new(image))
    }

    async fn make_clone(&self, request: v1::CloneImageRequest) -> Result<v1::CloneInfo, NodeError> {
        let v1::CloneImageRequest { volume_id, volume, snapshot, name } = request;
        self.inner.clones.check_new(&name)?;
        let spec = self.volume(&VolumeKey::of(volume_id, volume)?)?;
        let store = &self.inner.store;
        let consistent = store.with_state(|state| state.groups.get(&spec.group).is_none_or(|group| group.consistent));
        if !consistent {
            return Err(NodeError::Role(format!(
                "volume {} has no complete image yet: try again when it has",
                spec.name
            )));
        }
        let (base, time) = if snapshot.is_empty() {
            let time = store.with_state(|state| state.groups.get(&spec.group).map_or(0, |group| group.time_unix_ms));
            (store.open_image(spec.id, unix_ms()), time)
        } else {
            let held = store.with_state(|state| state.snapshot_by_name(spec.group, &snapshot).cloned());
            let none = || NodeError::NoSnapshot { volume: spec.name.clone(), snapshot: snapshot.clone() };
            let held = held.filter(|held| held.volume(spec.id).is_some()).ok_or_else(none)?;
            (store.open_snapshot_image(spec.id, held.id, unix_ms()), held.time_unix_ms)
        };
        let base = base.map_err(|error| of_read(error, &spec))?;
        self.wait_applied(base.ready_at()).await?;
        self.inner.clones.make(&name, base, &snapshot, time)
    }

    fn clones(&self) -> Vec<v1::CloneInfo> {
        self.inner.clones.list()
    }

    async fn delete_clone(&self, name: &str) -> Result<(), NodeError> {
        self.inner.clones.delete(name)
    }

    fn clone_volumes(&self) -> Vec<v1::Volume> {
        self.inner.clones.volumes()
    }

    fn clone_volume(&self, volume: &VolumeKey) -> Result<v1::Volume, NodeError> {
        Ok(convert::volume_to_wire(self.inner.clones.get(volume)?.spec()))
    }

    async fn write_clone(&self, request: CloneWrite) -> Result<v1::WriteBlockResponse, NodeError> {
        let clones = self.inner.clones.clone();
        self.blocking(move || clones.write(&request)).await
    }

    async fn read_clone(&self, volume: &VolumeKey, offset: u64, length: u64) -> Result<(Bytes, u32), NodeError> {
        let clone = self.inner.clones.get(volume)?;
        self.blocking(move || clone.read(offset, length)).await
    }

    async fn read_clone_piece(
        &self,
        volume: &VolumeKey,
        offset: u64,
        max_bytes: u64,
    ) -> Result<(PieceContent, Position), NodeError> {
        let clone = self.inner.clones.get(volume)?;
        let position = clone.base().position();
        Ok((self.blocking(move || clone.piece(offset, max_bytes)).await?, position))
    }

    fn pool(&self) -> v1::Pool {
        pool::pool_to_wire(&self.inner.store)
    }

    async fn add_device(&self, request: v1::AddDeviceRequest) -> Result<v1::PoolDevice, NodeError> {
        Ok(pool::add_device(&self.inner.store, request).await?)
    }

    async fn drain_device(&self, request: v1::DrainDeviceRequest) -> Result<v1::PoolDevice, NodeError> {
        Ok(pool::drain_device(&self.inner.store, request).await?)
    }

    fn list_segments(&self, request: v1::ListSegmentsRequest) -> Result<v1::ListSegmentsResponse, NodeError> {
        let v1::ListSegmentsRequest { volume, page_token } = request;
        let find = |state: &understudy_common::state::NodeState| state.volume_by_name(&volume).map(|spec| spec.id);
        let only = match volume.is_empty() {
            true => None,
            false => Some(self.inner.store.with_state(find).ok_or(NodeError::NoVolume { volume })?),
        };
        Ok(pool::list_segments(&self.inner.store, only, &page_token)?)
    }

    fn image_info(&self, image: &Self::Image) -> ImageInfo {
        let spec = image.spec();
        ImageInfo { volume: spec.name.clone(), size_bytes: spec.size_bytes, position: image.position() }
    }

    async fn read_piece(
        &self,
        image: &Self::Image,
        offset_bytes: u64,
        max_bytes: u64,
    ) -> Result<PieceContent, NodeError> {
        let image = Arc::clone(image);
        let read = move || read_piece(&image, offset_bytes, max_bytes).map_err(|error| of_read(error, image.spec()));
        self.blocking(read).await
    }

    fn status(&self) -> v1::Status {
        let attached = self.is_attached();
        let store = &self.inner.store;
        let identity = store.identity();
        let state = store.state();
        let durable = store.marks().borrow().durable;
        let durable = durable.next() == store.next_lsn();
        let link = self.inner.link.lock();
        let (since_unix_ms, met) = (link.since_unix_ms, link.last_heard.is_some());
        let refused = link.refused.as_ref().map(|refused| refused.why.clone()).filter(|_| !attached);
        drop(link);
        let (span, capacity) = (store.span_bytes(), store.config().journal.capacity_bytes);
        v1::Status {
            role: "backup".into(),
            pair_id: identity.pair.to_string(),
            instance_id: identity.instance.to_string(),
            generation: identity.generation,
            link: Some(v1::LinkStatus {
                state: match (attached, &refused) {
                    (true, _) => "attached",
                    (false, Some(_)) => "refused",
                    (false, None) => "waiting",
                }
                .into(),
                rtt_ms: 0.0,
                since_unix_ms,
                reason: match (attached, met) {
                    _ if refused.is_some() => refused.unwrap_or_default(),
                    (true, _) => String::new(),
                    (false, true) => "the primary was not heard of within [link] timeout".into(),
                    (false, false) => "no primary has attached since the start".into(),
                },
                peer: String::new(),
            }),
            staging: Some(v1::StagingStatus {
                span_bytes: span,
                capacity_bytes: capacity,
                fill_ratio: ratio(span, capacity),
                usage_bytes_per_s: 0.0,
                flush_bytes_per_s: 0.0,
                retained_bytes: 0,
            }),
            volumes: state
                .volumes
                .values()
                .map(|spec| self.volume_status(spec, state.groups.get(&spec.group), durable))
                .collect(),
            recovery_seconds: self.inner.recovery_time.as_secs_f64(),
            recovery_records: self.inner.recovery.replayed,
            version: env!("CARGO_PKG_VERSION").into(),
            clones: self.inner.clones.list(),
            ..v1::Status::default()
        }
    }

    fn subscribe(&self, after: u64) -> EventStream {
        convert::watch_events(&self.inner.events, after, unix_ms(), || self.status())
    }

    fn refresh_metrics(&self) {
        let status = self.status();
        self.inner.clones.refresh_metrics();
        let metrics = &self.inner.metrics;
        metrics.link_up.set(i64::from(self.is_attached()));
        let age = status.volumes.iter().filter_map(|v| v.recovery_point.as_ref()).map(|r| r.age_seconds);
        metrics.recovery_point_age_seconds.set(age.fold(0.0, f64::max));
        metrics.staging_span_bytes.set(gauge(self.inner.store.span_bytes()));
        let space = self.inner.store.space();
        let segment = u64::from(self.inner.store.config().pool.segment_bytes);
        for (state, segments) in [
            ("free", space.free()),
            ("reserved", space.reserved()),
            ("used", space.total().saturating_sub(space.free())),
        ] {
            metrics.pool_bytes.with_label_values(&[state]).set(gauge(segments * segment));
        }
        metrics.pool_promised_bytes.set(gauge(self.inner.store.pool_bytes().promised));
        for volume in &status.volumes {
            metrics.set_mode(&volume.name, "continuous");
        }
    }

    async fn failed(&self) -> Failure {
        let mut marks = self.inner.store.marks();
        // The store lives as long as this node. What is seen of the marks is let go of before the store is asked.
        let failed = async { drop(marks.wait_for(|m| m.failed).await) };
        tokio::select! {
            () = failed => {
                Failure::new(Exit::Storage, self.inner.store.failure().unwrap_or_default())
            }
            () = self.inner.changed.cancelled() => {
                let role = self.inner.store.identity().role;
                Failure::new(Exit::Again, format!("the role has changed: start understudy-{role} on this directory"))
            }
        }
    }

    async fn close(&self) -> Result<(), Failure> {
        let store = &self.inner.store;
        let last = Lsn(store.next_lsn().0 - 1);
        let durable = self.wait_durable(last).await;
        self.inner.stop.cancel();
        let scrubbing = self.inner.scrubbing.lock().take();
        if let Some(scrubbing) = scrubbing {
            // A task that panicked has ended the process.
            let _ = scrubbing.await;
        }
        let threads = self.inner.threads.lock().take();
        drop(threads);
        let message = durable.as_ref().map_or_else(ToString::to_string, |()| "the backup has ended in order".into());
        self.inner.events.close(unix_ms(), message);
        durable.map_err(|error| Failure::new(Exit::Storage, error))
    }
}

fn place(group: GroupId, lane: u8, place: Place) -> v1::GroupPosition {
    v1::GroupPosition { group_id: group.0, lane: lane.into(), position: Some(place.position.into()) }
}

fn read_piece(image: &ImageReader, offset_bytes: u64, max_bytes: u64) -> Result<PieceContent, ReadFailure> {
    let spec = image.spec();
    let block_bytes = u64::from(spec.block_size.bytes());
    let first = offset_bytes / block_bytes;
    let max = (max_bytes / block_bytes).max(1).min(spec.block_count() - first);
    let (hole, count) = image.extent(first, max)?;
    let length = ((first + count) * block_bytes - offset_bytes).min(max_bytes.max(1));
    if hole {
        return Ok(PieceContent::Zeros(length));
    }
    let at = usize::try_from(offset_bytes - first * block_bytes).expect("inside a block");
    let length = usize::try_from(length).expect("bounded by the message size");
    let data = image.read(first, count)?.slice(at..at + length);
    let crc32c = crc32c(&data);
    Ok(PieceContent::Data { data, crc32c })
}

fn of_read(error: ReadFailure, spec: &VolumeSpec) -> NodeError {
    match error {
        ReadFailure::NoVolume(_) => NodeError::NoVolume { volume: spec.name.clone() },
        ReadFailure::OutOfRange { first, end, .. } => {
            let block_bytes = u64::from(spec.block_size.bytes());
            NodeError::OutOfRange {
                volume: spec.name.clone(),
                offset_bytes: first * block_bytes,
                length_bytes: (end - first) * block_bytes,
                size_bytes: spec.size_bytes,
            }
        }
        ReadFailure::Damaged { block, .. } => NodeError::Damaged { volume: spec.name.clone(), block },
        ReadFailure::Readers | ReadFailure::Restoring(_) => NodeError::Busy { why: error.to_string() },
        ReadFailure::Failed(_) | ReadFailure::Pool(_) | ReadFailure::Io(_) | ReadFailure::Submit(_) => {
            NodeError::Storage { message: error.to_string() }
        }
    }
}

fn promotion(request: &v1::PromoteRequest) -> store::Promotion<'_> {
    store::Promotion {
        expected: Some(request.expected_generation).filter(|expected| *expected > 0),
        force: request.force,
        at: Some(request.at_snapshot.as_str()).filter(|name| !name.is_empty()),
    }
}

/// With the age of its image, seconds, of those by name; 0 for one that is not there.
fn promoted_to_wire(promoted: store::Promoted, ages: &BTreeMap<String, f64>) -> v1::PromotedGroup {
    let back = |back: store::Back| v1::BackToSnapshot {
        position: Some(back.position.into()),
        time_unix_ms: back.time_unix_ms,
        volumes_kept: back.kept,
    };
    v1::PromotedGroup {
        age_seconds: ages.get(&promoted.name).copied().unwrap_or_default(),
        group: promoted.name,
        position: Some(promoted.position.into()),
        time_unix_ms: promoted.time_unix_ms,
        rolled_back: promoted.rolled_back,
        dropped: promoted.dropped,
        back: promoted.back.map(back),
    }
}

fn of_role(error: store::RoleError) -> NodeError {
    match error {
        store::RoleError::Catalog(error) => NodeError::Storage { message: error.to_string() },
        error => NodeError::Role(error.to_string()),
    }
}

fn diverged_to_wire(diverged: DivergedGroup) -> v1::DivergedGroup {
    v1::DivergedGroup {
        group_id: diverged.group.0,
        exact: diverged.exact.is_ok(),
        why: diverged.exact.err().unwrap_or_default(),
        volume_ids: diverged.volumes.into_iter().map(|volume| volume.0).collect(),
    }
}

fn refusal(refusal: crate::receiver::Refusal) -> v1::Refusal {
    v1::Refusal {
        group_id: refusal.group.0,
        volume_id: refusal.volume.0,
        position: Some(refusal.position.into()),
        cause: refusal.cause.into(),
        message: refusal.message,
    }
}

#[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
