//! The backup's node: a store, the receiver of the primary's session, and what readers and operators ask.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tracing::{info, warn};
use understudy_common::{
    checksum::crc32c,
    config::{BackupConfig, LinkConfig},
    events::{Event, EventLog},
    process::{Exit, Failure},
    state::GroupState,
    store::{self, ImageReader, ReadFailure, Recovery, Role, Store, StoreConfig, driver::Threads, setup},
    telemetry::Metrics,
    types::{GroupId, Lsn, Position, Uid, VolumeSpec},
};
use understudy_proto::{convert, v1};

use crate::{
    api::{EventStream, ImageInfo, NodeError, PieceContent, ReplicaNode, VolumeKey},
    receiver::{FrameRefusal, Hello, Receiver},
};

/// How long a new session waits for the records of the one before to become durable.
const DRAIN: Duration = Duration::from_secs(10);
/// Events that are kept.
const EVENTS: usize = 1024;

/// What a simulation replaces.
pub struct Seams {
    /// Makes the ids of sessions; unpredictable in service.
    pub session_id: Box<dyn Fn() -> Uid + Send + Sync>,
    /// Reads stay on the calling thread: for simulated disks.
    pub inline_reads: bool,
}

impl Default for Seams {
    fn default() -> Self {
        Self { session_id: Box::new(|| Uid(rand::random())), inline_reads: false }
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
    threads: Mutex<Option<Threads>>,
}

/// What is known of the primary.
struct Link {
    session: Option<Uid>,
    last_heard: Option<Instant>,
    since_unix_ms: i64,
    /// The primary's time at which a group had nothing that is missing here.
    complete: BTreeMap<GroupId, i64>,
    announced: bool,
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
    let (store, recovery) = store::open(storage, store_config, Role::Backup, &mut || Uid(rand::random()))
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
    Ok(Node::new(store, config.link.clone(), metrics, recovery, recovery_time, Some(threads)))
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

fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

impl Node {
    /// A node over an open store. `threads` are ended when the node is closed.
    #[must_use]
    pub fn new(
        store: Arc<Store>,
        link_config: LinkConfig,
        metrics: Metrics,
        recovery: Recovery,
        recovery_time: Duration,
        threads: Option<Threads>,
    ) -> Self {
        Self::with_seams(store, link_config, metrics, recovery, recovery_time, threads, Seams::default())
    }

    /// As [`Node::new`], with parts of its own.
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
        let events = EventLog::new(EVENTS);
        events.record(unix_ms(), "node.started", "the backup has started", []);
        let link = Link {
            session: None,
            last_heard: None,
            since_unix_ms: unix_ms(),
            complete: BTreeMap::new(),
            announced: false,
        };
        metrics.staging_capacity_bytes.set(gauge(store.config().journal.capacity_bytes));
        Self {
            inner: Arc::new(Inner {
                receiver: Mutex::new(Receiver::new(Arc::clone(&store))),
                store,
                progress: Notify::new(),
                link: Mutex::new(link),
                events,
                metrics,
                recovery,
                recovery_time,
                link_config,
                seams,
                threads: Mutex::new(threads),
            }),
        }
    }

    /// The store below.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.inner.store
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

    fn storage_error(&self) -> NodeError {
        NodeError::Storage { message: self.inner.store.failure().unwrap_or_default() }
    }

    fn age_ms(&self, group: &GroupState) -> i64 {
        let complete = self.inner.link.lock().complete.get(&group.id).copied().unwrap_or_default();
        (unix_ms() - complete.max(group.time_unix_ms)).max(0)
    }

    fn volume_status(&self, spec: &VolumeSpec, group: Option<&GroupState>, durable: bool) -> v1::VolumeStatus {
        let position = group.map_or(Position::default(), |g| g.position);
        let age_ms = group.map_or(0, |g| self.age_ms(g));
        // Between two heartbeats of a primary that is there, nothing is known to be missing.
        let fresh = self.inner.link_config.heartbeat * 2 + Duration::from_millis(500);
        let age = Duration::from_millis(u64::try_from(age_ms).unwrap_or_default());
        let age_seconds = if age <= fresh { 0.0 } else { age.as_secs_f64() };
        let wire = Some(v1::Position::from(position));
        v1::VolumeStatus {
            id: spec.id.0,
            name: spec.name.clone(),
            group: spec.group_name.clone(),
            size_bytes: spec.size_bytes,
            block_bytes: spec.block_size.bytes(),
            mode: v1::Mode::Continuous.into(),
            cause: String::new(),
            phase: v1::Phase::Streaming.into(),
            position: Some(v1::VolumePosition {
                next: wire,
                durable: durable.then_some(wire).flatten(),
                sent: wire,
                acked: durable.then_some(wire).flatten(),
                applied: None,
            }),
            bytes_at_risk: 0,
            recovery_point: Some(v1::RecoveryPoint {
                position: wire,
                time_unix_ms: group.map_or(0, |g| g.time_unix_ms),
                age_seconds,
            }),
            // Continuous mode applies whole records in their order: there is an image at every instant.
            consistent: true,
            ack: v1::AckRule::from(spec.ack).into(),
            away: v1::AwayRule::from(spec.away).into(),
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
        };
        let session = (self.inner.seams.session_id)();
        let attached = self.inner.receiver.lock().attach(&hello, session);
        let (positions, drained) = attached.inspect_err(|error| {
            warn!(%error, "attach refused");
            self.inner.events.record(unix_ms(), "link.refused", error.to_string(), []);
        })?;
        self.wait_durable(drained).await?;
        self.inner.link.lock().session = Some(session);
        self.heard();
        let identity = self.inner.store.identity();
        Ok(v1::AttachResponse {
            pair_id: identity.pair.0.to_vec().into(),
            instance_id: identity.instance.0.to_vec().into(),
            session: session.0.to_vec().into(),
            positions: positions
                .into_iter()
                .map(|(group, position)| v1::GroupPosition {
                    group_id: group.0,
                    lane: 0,
                    position: Some(position.into()),
                })
                .collect(),
            max_frame_bytes: 0,
        })
    }

    async fn receive(&self, record: v1::StagedRecord) -> Result<(), NodeError> {
        let (session, ship) = (convert::uid("session", &record.session)?, record.ship);
        let record = convert::record_from_wire(record)?;
        let store = &self.inner.store;
        loop {
            let mut marks = store.marks();
            marks.mark_unchanged();
            if store.queue_bytes() <= store.config().pending_bytes {
                let taken = self.inner.receiver.lock().on_record(session, ship, &record);
                match taken {
                    Ok(()) => {
                        // It may be one that nothing has to be synced for.
                        self.inner.progress.notify_waiters();
                        return Ok(());
                    }
                    // It has asked for what it lacks.
                    Err(FrameRefusal::Busy(_)) => {}
                    Err(FrameRefusal::OldSession(session)) => return Err(NodeError::OldSession { session }),
                    Err(FrameRefusal::Store(error)) => return Err(NodeError::Storage { message: error.to_string() }),
                    Err(error) => return Err(NodeError::Frame { why: error.to_string() }),
                }
            }
            if marks.changed().await.is_err() || marks.borrow().failed {
                return Err(self.storage_error());
            }
        }
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
        let session = convert::uid("session", &request.session)?;
        if self.inner.receiver.lock().session() != Some(session) {
            return Err(NodeError::OldSession { session });
        }
        self.heard();
        let marks = *self.inner.store.marks().borrow();
        if marks.durable.next() == self.inner.store.next_lsn() {
            let held = self.inner.store.state().groups;
            let mut link = self.inner.link.lock();
            link.complete.retain(|group, _| held.contains_key(group));
            for place in &request.complete {
                let (group, position) = (GroupId(place.group_id), place.position.unwrap_or_default().into());
                if held.get(&group).is_some_and(|g| g.position >= position) {
                    link.complete.insert(group, request.time_unix_ms);
                }
            }
        }
        let durable_ship = self.inner.receiver.lock().poll_answered(marks.durable);
        Ok(v1::HeartbeatResponse { session: request.session, time_unix_ms: unix_ms(), durable_ship })
    }

    async fn open_image(&self, volume: &VolumeKey) -> Result<Self::Image, NodeError> {
        let spec = self.volume(volume)?;
        let image = self.inner.store.open_image(spec.id, unix_ms()).map_err(|error| of_read(error, &spec))?;
        let mut marks = self.inner.store.marks();
        let ready = marks.wait_for(|m| m.applied >= image.ready_at() || m.failed).await;
        if ready.is_err() || self.inner.store.failure().is_some() {
            return Err(self.storage_error());
        }
        Ok(Arc::new(image))
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
        if self.inner.seams.inline_reads {
            return read();
        }
        tokio::task::spawn_blocking(read)
            .await
            .map_err(|error| NodeError::Storage { message: format!("a read was ended: {error}") })?
    }

    fn status(&self) -> v1::Status {
        let attached = self.is_attached();
        let store = &self.inner.store;
        let identity = store.identity();
        let state = store.state();
        let durable = store.marks().borrow().durable.next() == store.next_lsn();
        let link = self.inner.link.lock();
        let (since_unix_ms, met) = (link.since_unix_ms, link.last_heard.is_some());
        drop(link);
        let (span, capacity) = (store.span_bytes(), store.config().journal.capacity_bytes);
        v1::Status {
            role: "backup".into(),
            pair_id: identity.pair.to_string(),
            instance_id: identity.instance.to_string(),
            generation: identity.generation,
            link: Some(v1::LinkStatus {
                state: if attached { "attached" } else { "waiting" }.into(),
                rtt_ms: 0.0,
                since_unix_ms,
                reason: match (attached, met) {
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
        }
    }

    fn subscribe(&self, after: u64) -> EventStream {
        let first = (after == 0).then(|| {
            let status = self.status();
            v1::Event {
                number: self.inner.events.newest(),
                time_unix_ms: unix_ms(),
                kind: "state".into(),
                message: format!("backup, {} volumes", status.volumes.len()),
                fields: status.link.map(|link| ("link".to_owned(), link.state)).into_iter().collect(),
            }
        });
        let from = first.as_ref().map_or(after, |event| event.number);
        let log = self.inner.events.clone();
        let later = futures_util::stream::unfold(from, move |from| {
            let log = log.clone();
            async move {
                let events = log.next_after(from).await;
                let next = events.last().map_or(from, |event| event.number);
                Some((futures_util::stream::iter(events.into_iter().map(event_to_wire)), next))
            }
        });
        Box::pin(futures_util::stream::iter(first).chain(later.flatten()))
    }

    fn refresh_metrics(&self) {
        let status = self.status();
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
        for volume in &status.volumes {
            metrics.set_mode(&volume.name, "continuous");
        }
    }

    async fn failed(&self) -> Failure {
        let mut marks = self.inner.store.marks();
        // The store lives as long as this node.
        let _ = marks.wait_for(|m| m.failed).await;
        Failure::new(Exit::Storage, self.inner.store.failure().unwrap_or_default())
    }

    async fn close(&self) -> Result<(), Failure> {
        let store = &self.inner.store;
        let last = Lsn(store.next_lsn().0 - 1);
        let durable = self.wait_durable(last).await;
        let threads = self.inner.threads.lock().take();
        drop(threads);
        durable.map_err(|error| Failure::new(Exit::Storage, error))
    }
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
        ReadFailure::Readers => NodeError::Busy { why: error.to_string() },
        ReadFailure::Failed(_) | ReadFailure::Pool(_) | ReadFailure::Io(_) | ReadFailure::Submit(_) => {
            NodeError::Storage { message: error.to_string() }
        }
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

fn event_to_wire(event: Event) -> v1::Event {
    v1::Event {
        number: event.number,
        time_unix_ms: event.time_unix_ms,
        kind: event.kind,
        message: event.message,
        fields: event.fields.into_iter().collect(),
    }
}

#[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
