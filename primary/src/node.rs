//! The primary's node: the engine with its link, its events and its figures, behind the seam of the services.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity as TlsIdentity};
use tracing::info;
use understudy_common::{
    config::{DeltaConfig, LinkConfig, PrimaryConfig, ScrubConfig, TlsConfig},
    events::EventLog,
    history::Relation,
    policy::{PolicyConfig, Recorder},
    process::{Exit, Failure},
    scrub::Scrub,
    state::GroupState,
    store::{self, Recovery, Role, Store, driver::Threads, setup},
    telemetry::Metrics,
    types::{AckRule, AwayRule, Lsn, Uid, VolumeSpec},
};
use understudy_proto::{convert, pool, v1};

use crate::{
    api::{
        BlockEngine, Changed, Copy, EngineError, EventStream, NewVolume, PolicyInForce, ReadPiece, UnshippedVolume,
        VerifyStream, VolumeKey, WriteAck, WriteRequest,
    },
    compare::Comparison,
    control::{self, Control, place},
    engine::{Engine, Limits, Permit, Ticket, unix_ms},
    link::{Connecting, Link, LinkView},
    repair::Repairs,
    replicator::{Attached, Handle, Replicator},
    snapshot_schedule,
};

/// How long an operator waits for what the backup says.
const PEER_CALL: Duration = Duration::from_secs(3);
/// Over which rates are measured.
const RATE_STEP: Duration = Duration::from_secs(1);

/// Bytes a second, as of the last step.
#[derive(Debug, Clone, Copy, Default)]
struct Rates {
    usage: f64,
    flush: f64,
}

struct Inner {
    engine: Engine,
    replicator: Handle,
    scrub: Scrub,
    /// `None` without a backup.
    sessions: Option<watch::Receiver<Option<Attached>>>,
    comparing: tokio::sync::Mutex<()>,
    inline: bool,
    /// The policy of the settings.
    configured: PolicyConfig,
    view: Arc<Mutex<LinkView>>,
    peer: String,
    events: EventLog,
    metrics: Metrics,
    rates: Mutex<Rates>,
    /// A write was refused for a full staging area, and none was taken since.
    staging_full: AtomicBool,
    recovery: Recovery,
    recovery_time: Duration,
    stop: CancellationToken,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    threads: Mutex<Option<Threads>>,
    /// The role has changed: the process is to end.
    changed: CancellationToken,
}

/// How long a demotion waits for the backup where nobody says.
const DRAIN: Duration = Duration::from_secs(30);

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

/// Recovers the node of a data directory, starts its threads and its link.
///
/// # Errors
/// With the exit code of the process.
pub async fn open(config: PrimaryConfig, metrics: Metrics) -> Result<Node, Failure> {
    let connect = config
        .backup
        .url
        .as_ref()
        .map(|url| connector(url, &config.link, &config.tls))
        .transpose()
        .map_err(|why| Failure::new(Exit::Config, why))?;
    let retain = connect.is_some();
    let mut store_config = setup::store_config(&config.pool, &config.staging, &config.checkpoint, retain);
    store_config.lanes = config.lanes;
    let (data_dir, staging) = (config.data_dir.clone(), config.staging.clone());
    let unwritten = metrics.events_unwritten.clone();
    let opening = tokio::task::spawn_blocking(move || {
        let start = Instant::now();
        let storage = setup::storage(&data_dir, &staging)
            .map_err(|error| Failure::new(Exit::Storage, format!("{}: {error}", data_dir.display())))?;
        let (store, recovery) =
            store::open(Arc::clone(&storage), store_config, Role::Primary, &mut || Uid(rand::random()))
                .map_err(|error| Failure::new(exit_of(&error), error))?;
        let events = EventLog::open(storage, unwritten);
        let threads = Threads::start(&store).map_err(|error| Failure::new(Exit::Internal, error))?;
        Ok((store, recovery, start.elapsed(), threads, events))
    });
    let (store, recovery, recovery_time, threads, events) =
        opening.await.map_err(|error| Failure::new(Exit::Internal, error))??;
    info!(
        records = recovery.records,
        replayed = recovery.replayed,
        bytes = recovery.bytes,
        dropped_bytes = recovery.dropped_bytes,
        seconds = recovery_time.as_secs_f64(),
        "recovered"
    );
    // Before the call itself is ended with DEADLINE_EXCEEDED, so that the client hears what became of its write.
    let deadline = config.limits.request_deadline - config.limits.request_deadline / 8;
    let limits = Limits {
        message_bytes: config.limits.message_bytes as u64,
        in_flight_bytes: config.limits.in_flight_bytes,
        queue_wait: config.limits.queue_wait.min(deadline),
        deadline,
        inline_reads: false,
        lease: config.lease.required.then_some(config.lease.ttl),
    };
    let peer = config.backup.url.unwrap_or_default();
    let observations = config.data_dir.join("observations.jsonl");
    let recorded = config.observation_log_bytes;
    let replication = Replication {
        link: config.link,
        policy: config.policy,
        delta: config.delta,
        scrub: config.scrub,
        observations: (recorded > 0).then_some((observations, recorded)),
    };
    let node =
        Node::start(store, limits, replication, connect, peer, metrics, events, recovery, recovery_time, Some(threads));
    let schedule = snapshot_schedule::run(node.clone(), config.snapshots, node.inner.stop.clone());
    node.inner.tasks.lock().push(tokio::spawn(schedule));
    Ok(node)
}

/// Exit code of a store that does not open.
fn exit_of(error: &store::OpenError) -> Exit {
    match error {
        store::OpenError::Role { .. } => Exit::Config,
        _ => Exit::Storage,
    }
}

/// How a primary replicates.
#[derive(Debug, Clone)]
pub struct Replication {
    /// `[link]`.
    pub link: LinkConfig,
    /// `[policy]` and what belongs to it.
    pub policy: PolicyConfig,
    /// `[delta]`.
    pub delta: DeltaConfig,
    /// `[scrub]`.
    pub scrub: ScrubConfig,
    /// Where what the policy is told is recorded, and how many bytes of it.
    pub observations: Option<(PathBuf, u64)>,
}

/// How connections to the backup are made.
pub type Connector = Box<dyn Fn() -> Connecting + Send + Sync>;

/// Connections to `url`, each with a fresh look-up of its name.
fn connector(url: &str, link: &LinkConfig, tls: &TlsConfig) -> Result<Connector, String> {
    let mut endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(|error| format!("[backup] url = {url:?}: {error}"))?
        .connect_timeout(link.timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(link.heartbeat)
        // Heartbeats notice a peer that is gone sooner; a ping may wait behind data on a slow link.
        .keep_alive_timeout(link.timeout.max(link.ack_deadline))
        .keep_alive_while_idle(true)
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20);
    if url.starts_with("https://") {
        let read = |path: &std::path::Path| std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
        let authority = tls.replica_ca.as_deref().or(tls.client_ca.as_deref());
        let authority = authority.ok_or("an https [backup] url needs [tls] replica_ca")?;
        let mut client = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(authority)?));
        if let (Some(certificate), Some(key)) = (&tls.certificate, &tls.key) {
            client = client.identity(TlsIdentity::from_pem(read(certificate)?, read(key)?));
        }
        endpoint = endpoint.tls_config(client).map_err(|error| format!("[tls]: {error}"))?;
    }
    let url = url.to_owned();
    Ok(Box::new(move || {
        let (endpoint, url) = (endpoint.clone(), url.clone());
        Box::pin(async move {
            endpoint.connect().await.map_err(|error| {
                let mut why = error.to_string();
                let mut source = std::error::Error::source(&error);
                while let Some(inner) = source {
                    why = inner.to_string();
                    source = inner.source();
                }
                format!("connecting to {url}: {why}")
            })
        })
    }))
}

impl Node {
    /// A node over an open store. `threads` are ended when the node is closed.
    #[must_use]
    #[allow(clippy::too_many_arguments, reason = "the parts that opening has made")]
    pub fn start(
        store: Arc<Store>,
        limits: Limits,
        link: Replication,
        connect: Option<Connector>,
        peer: String,
        metrics: Metrics,
        events: EventLog,
        recovery: Recovery,
        recovery_time: Duration,
        threads: Option<Threads>,
    ) -> Self {
        let (sync, checkpoint) = (metrics.journal_sync_seconds.clone(), metrics.checkpoint_seconds.clone());
        // They are set once, here.
        let _ = store.stats().on_batch.set(Box::new(move |seconds| sync.observe(seconds)));
        let _ = store.stats().on_checkpoint.set(Box::new(move |seconds| checkpoint.observe(seconds)));
        metrics.staging_capacity_bytes.set(gauge(store.config().journal.capacity_bytes));
        events.record(unix_ms(), "node.started", "the primary has started", []);
        let configured = link.policy.clone();
        let replicator = Handle::new(configured.clone());
        let inline = limits.inline_reads;
        let engine = Engine::new(Arc::clone(&store), limits, replicator.clone());
        let stop = CancellationToken::new();
        let mut tasks = vec![tokio::spawn(engine.clone().answer(stop.clone()))];
        let scrub = Scrub::new(Arc::clone(&store), link.scrub, events.clone(), metrics.clone(), unix_ms, inline);
        tasks.push(tokio::spawn(scrub.clone().run(stop.clone())));
        let mut attached = None;
        engine.resume_restores();
        let view = match connect {
            Some(connect) => {
                let (delta, observations) = (link.delta, link.observations);
                let link = Link::new(engine.clone(), link.link, connect, events.clone(), metrics.clone());
                let (view, sessions) = (link.view(), link.sessions());
                let (handle, seen) = (replicator.clone(), Arc::clone(&view));
                let repairs = Repairs::new(Arc::clone(&store), sessions.clone(), events.clone(), inline);
                tasks.push(tokio::spawn(repairs.run(stop.clone())));
                attached = Some(sessions.clone());
                let recorder = observations.map(|(path, bytes)| Recorder::start(path, bytes));
                let driver =
                    Replicator::new(store, delta, handle, seen, sessions, events.clone(), metrics.clone(), inline)
                        .recording(recorder);
                tasks.push(tokio::spawn(link.run(stop.clone())));
                tasks.push(tokio::spawn(driver.run(stop.clone())));
                view
            }
            None => Link::unconfigured(),
        };
        let inner = Arc::new(Inner {
            engine,
            replicator,
            scrub,
            sessions: attached,
            comparing: tokio::sync::Mutex::default(),
            inline,
            configured,
            view,
            peer,
            events,
            metrics,
            rates: Mutex::new(Rates::default()),
            staging_full: AtomicBool::new(false),
            recovery,
            recovery_time,
            stop,
            tasks: Mutex::new(Vec::new()),
            threads: Mutex::new(threads),
            changed: CancellationToken::new(),
        });
        let watched = inner.engine.store().clone().watch_pool(inner.events.clone(), unix_ms, inner.stop.clone());
        tasks.push(tokio::spawn(watched));
        tasks.push(tokio::spawn(measure_rates(Arc::downgrade(&inner), inner.stop.clone())));
        *inner.tasks.lock() = tasks;
        Self { inner }
    }

    /// The engine below.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    /// The scrub of this side.
    #[must_use]
    pub fn scrub_of_store(&self) -> &Scrub {
        &self.inner.scrub
    }

    fn volume_status(&self, spec: &VolumeSpec, group: Option<&GroupState>, view: &LinkView) -> v1::VolumeStatus {
        let store = self.inner.engine.store();
        let control = self.control();
        let retained = store.retained_of(spec.group);
        let marks = *store.marks().borrow();
        let at = |lsn: Lsn| place(group, lsn);
        let acked = group.map_or(retained.acked(), |group| control.acked(group));
        let oldest = group.and_then(|group| control.oldest_missing(group));
        let now = unix_ms();
        let age_ms = oldest.map_or(0, |time| (now - time).max(0));
        let cause = view.held.get(&spec.group);
        let mut status = v1::VolumeStatus {
            id: spec.id.0,
            name: spec.name.clone(),
            group: spec.group_name.clone(),
            group_id: spec.group.0,
            size_bytes: spec.size_bytes,
            block_bytes: spec.block_size.bytes(),
            mode: v1::Mode::Continuous.into(),
            cause: cause.map_or_else(String::new, |held| format!("backup_refused ({}): {}", held.cause, held.message)),
            phase: v1::Phase::Streaming.into(),
            position: Some(v1::VolumePosition {
                next: at(Lsn::MAX),
                durable: at(marks.durable),
                sent: at(if view.state == "attached" { view.sent.max(acked) } else { acked }),
                acked: at(acked),
                applied: at(marks.applied),
            }),
            bytes_at_risk: retained.bytes(),
            recovery_point: Some(v1::RecoveryPoint {
                position: at(acked),
                time_unix_ms: oldest.unwrap_or(now),
                age_seconds: Duration::from_millis(u64::try_from(age_ms).unwrap_or_default()).as_secs_f64(),
            }),
            consistent: group.is_some_and(|group| control.is_consistent(group)),
            ack: v1::AckRule::from(spec.ack).into(),
            away: v1::AwayRule::from(spec.away).into(),
            lanes: group.map(|group| control.lanes(group, now)).unwrap_or_default(),
            ..v1::VolumeStatus::default()
        };
        if let Some(group) = group {
            control.describe(spec, group, &mut status);
        }
        status
    }

    fn control(&self) -> Control<'_> {
        let has_backup = self.inner.view.lock().state != "unconfigured";
        Control { store: self.inner.engine.store(), handle: &self.inner.replicator, has_backup }
    }

    fn note_snapshot(&self, kind: &str, group: &str, snapshot: &str, message: String) {
        let fields = [("group", group.to_owned()), ("snapshot", snapshot.to_owned())];
        self.inner.events.record(unix_ms(), kind, message, fields);
    }

    fn note_volume(&self, kind: &str, spec: &VolumeSpec) {
        let fields =
            [("volume", spec.name.clone()), ("id", spec.id.to_string()), ("size_bytes", spec.size_bytes.to_string())];
        self.inner.events.record(unix_ms(), kind, format!("volume {}", spec.name), fields);
    }
}

async fn measure_rates(inner: std::sync::Weak<Inner>, stop: CancellationToken) {
    let mut ticks = interval(RATE_STEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before: Option<(u64, u64)> = None;
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let Some(inner) = inner.upgrade() else { return };
        let (submitted, released) = inner.engine.store().traffic();
        if let Some((submitted_before, released_before)) = before {
            let per_second = |now: u64, then: u64| bytes_f64(now.saturating_sub(then)) / RATE_STEP.as_secs_f64();
            let rates =
                Rates { usage: per_second(submitted, submitted_before), flush: per_second(released, released_before) };
            *inner.rates.lock() = rates;
        }
        before = Some((submitted, released));
    }
}

impl Node {
    /// Tells once when writes begin to be refused for want of staging space, and once when they are taken again.
    fn note_staging(&self, full: bool) {
        if self.inner.staging_full.load(Ordering::Relaxed) == full
            || self.inner.staging_full.swap(full, Ordering::Relaxed) == full
        {
            return;
        }
        let (kind, message) = if full {
            ("staging.full", "writes are refused until the backup has caught up")
        } else {
            ("staging.relieved", "writes are taken again")
        };
        self.inner.events.record(unix_ms(), kind, message, []);
    }
}

impl BlockEngine for Node {
    type Permit = Permit;
    type Ticket = Ticket;

    async fn admit(&self, bytes: u64) -> Result<Permit, EngineError> {
        self.inner.engine.admit(bytes).await
    }

    async fn submit(&self, permit: Permit, request: WriteRequest) -> Result<Ticket, EngineError> {
        let submitted = self.inner.engine.submit(permit, request).await;
        match &submitted {
            Ok(_) => self.note_staging(false),
            Err(EngineError::StagingFull { .. }) => self.note_staging(true),
            Err(_) => {}
        }
        submitted
    }

    fn submit_now(&self, requests: &mut VecDeque<WriteRequest>) -> Vec<Ticket> {
        let tickets = self.inner.engine.submit_now(requests);
        if !tickets.is_empty() {
            self.note_staging(false);
        }
        tickets
    }

    async fn wait(&self, ticket: Ticket) -> Result<WriteAck, EngineError> {
        self.inner.engine.wait(ticket).await
    }

    fn poll_settled(&self, ticket: &Ticket) -> Option<Result<WriteAck, EngineError>> {
        self.inner.engine.poll_settled(ticket)
    }

    async fn read(
        &self,
        volume: &VolumeKey,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> Result<(Bytes, u32), EngineError> {
        // A damaged block is counted when the scrub has looked at it.
        self.inner.engine.read(volume, offset_bytes, length_bytes).await
    }

    async fn read_piece(
        &self,
        volume: &VolumeKey,
        offset_bytes: u64,
        max_bytes: u64,
    ) -> Result<ReadPiece, EngineError> {
        self.inner.engine.read_piece(volume, offset_bytes, max_bytes).await
    }

    async fn flush(&self, volume: &VolumeKey) -> Result<WriteAck, EngineError> {
        self.inner.engine.flush(volume).await
    }

    async fn create_volume(&self, volume: NewVolume) -> Result<VolumeSpec, EngineError> {
        let spec = self.inner.engine.create_volume(volume).await?;
        self.note_volume("volume.created", &spec);
        Ok(spec)
    }

    async fn resize_volume(&self, volume: &VolumeKey, size_bytes: u64) -> Result<VolumeSpec, EngineError> {
        let spec = self.inner.engine.resize_volume(volume, size_bytes).await?;
        self.note_volume("volume.resized", &spec);
        Ok(spec)
    }

    async fn delete_volume(&self, volume: &VolumeKey) -> Result<(), EngineError> {
        let spec = self.inner.engine.spec(volume)?;
        self.inner.engine.delete_volume(volume).await?;
        self.inner.metrics.forget_volume(&spec.name);
        self.note_volume("volume.deleted", &spec);
        Ok(())
    }

    async fn set_ack_rule(
        &self,
        volume: &VolumeKey,
        ack: AckRule,
        away: Option<AwayRule>,
    ) -> Result<VolumeSpec, EngineError> {
        let spec = self.inner.engine.set_ack_rule(volume, ack, away).await?;
        self.note_volume("volume.ack_changed", &spec);
        Ok(spec)
    }

    fn volume(&self, volume: &VolumeKey) -> Result<VolumeSpec, EngineError> {
        self.inner.engine.spec(volume)
    }

    fn volumes(&self) -> Vec<VolumeSpec> {
        self.inner.engine.volumes()
    }

    fn pool(&self) -> v1::Pool {
        pool::pool_to_wire(self.inner.engine.store())
    }

    async fn add_device(&self, request: v1::AddDeviceRequest) -> Result<v1::PoolDevice, EngineError> {
        Ok(pool::add_device(self.inner.engine.store(), request).await?)
    }

    async fn drain_device(&self, request: v1::DrainDeviceRequest) -> Result<v1::PoolDevice, EngineError> {
        Ok(pool::drain_device(self.inner.engine.store(), request).await?)
    }

    fn list_segments(&self, request: v1::ListSegmentsRequest) -> Result<v1::ListSegmentsResponse, EngineError> {
        let v1::ListSegmentsRequest { volume, page_token } = request;
        let volume = match volume.is_empty() {
            true => None,
            false => Some(self.inner.engine.spec(&VolumeKey::Name(volume))?.id),
        };
        Ok(pool::list_segments(self.inner.engine.store(), volume, &page_token)?)
    }

    async fn take_snapshot(&self, group: &str, name: &str) -> Result<v1::SnapshotInfo, EngineError> {
        let taken = self.inner.engine.take_snapshot(group, name).await?;
        let mirrored = if taken.mirrored { "on both sides" } else { "on the primary alone" };
        self.note_snapshot("snapshot.created", &taken.group, name, format!("snapshot {name} {mirrored}"));
        Ok(taken)
    }

    async fn snapshots(&self, group: Option<&str>) -> Result<Vec<v1::SnapshotInfo>, EngineError> {
        let (engine, group) = (self.inner.engine.clone(), group.map(str::to_owned));
        tokio::task::spawn_blocking(move || engine.snapshots(group.as_deref()))
            .await
            .map_err(|error| EngineError::Storage { message: format!("a read was ended: {error}") })?
    }

    fn snapshot_times(&self, group: &str) -> Result<Vec<(String, i64)>, EngineError> {
        self.inner.engine.snapshot_times(group)
    }

    async fn delete_snapshot(&self, group: &str, name: &str) -> Result<(), EngineError> {
        self.inner.engine.delete_snapshot(group, name).await?;
        self.note_snapshot("snapshot.deleted", group, name, format!("snapshot {name}"));
        Ok(())
    }

    async fn restore_snapshot(&self, group: &str, volume: Option<&str>, snapshot: &str) -> Result<Copy, EngineError> {
        let copy = self.inner.engine.restore(group, volume, snapshot).await?;
        self.note_snapshot(
            "snapshot.restoring",
            volume.unwrap_or(group),
            snapshot,
            format!("from snapshot {snapshot}"),
        );
        Ok(copy)
    }

    async fn clone_snapshot(
        &self,
        volume: &VolumeKey,
        snapshot: &str,
        name: String,
        group: Option<String>,
    ) -> Result<Copy, EngineError> {
        let copy = self.inner.engine.clone_snapshot(volume, snapshot, name, group).await?;
        for spec in &copy.volumes {
            self.note_volume("volume.created", spec);
        }
        Ok(copy)
    }

    async fn changed_blocks(
        &self,
        volume: &VolumeKey,
        base: &str,
        target: Option<&str>,
        offset_bytes: u64,
    ) -> Result<Changed, EngineError> {
        self.inner.engine.changed_blocks(volume, base, target, offset_bytes).await
    }

    fn snapshot_spec(&self, volume: &VolumeKey, snapshot: &str) -> Result<VolumeSpec, EngineError> {
        self.inner.engine.snapshot_spec(volume, snapshot)
    }

    async fn read_snapshot(
        &self,
        volume: &VolumeKey,
        snapshot: &str,
        offset_bytes: u64,
        max_bytes: u64,
    ) -> Result<ReadPiece, EngineError> {
        self.inner.engine.read_snapshot(volume, snapshot, offset_bytes, max_bytes).await
    }

    async fn start_delta(&self, group: &str) -> Result<v1::StartDeltaResponse, EngineError> {
        self.control().start_delta(group).await
    }

    async fn abort_delta(&self, group: &str) -> Result<v1::AbortRunResponse, EngineError> {
        self.control().abort_delta(group).await
    }

    async fn force_delta(&self, group: &str, forced: bool) -> Result<v1::SetModeResponse, EngineError> {
        self.control().force_delta(group, forced).await
    }

    fn policy(&self) -> PolicyInForce {
        PolicyInForce { policy: self.inner.replicator.policy(), configured: self.inner.configured.clone() }
    }

    fn set_policy(&self, policy: PolicyConfig) {
        let changed = control::changes(&self.inner.replicator.policy().texts(), &policy.texts());
        self.inner.replicator.set_policy(policy);
        let changed = changed.iter().map(|(name, text)| format!("{name} = {text}")).collect::<Vec<_>>().join(", ");
        info!(changed, "policy.changed");
        self.inner.events.record(unix_ms(), "policy.changed", format!("an operator set {changed}"), []);
    }

    fn explain(&self, group: Option<&str>, limit: usize) -> Result<Vec<v1::GroupExplanation>, EngineError> {
        self.control().explain(group, limit)
    }

    async fn scrub(&self, volume: Option<VolumeKey>, start: bool) -> Result<v1::ScrubResponse, EngineError> {
        let volume = volume.map(|key| self.inner.engine.spec(&key)).transpose()?.map(|spec| spec.id);
        if start {
            self.inner.scrub.ask(volume);
        }
        let mut answer = v1::ScrubResponse {
            primary: Some(convert::scrub_to_wire(&self.inner.scrub.status())),
            primary_damaged: convert::damaged_to_wire(self.inner.engine.store()),
            ..Default::default()
        };
        let attached = self.inner.sessions.as_ref().and_then(|sessions| sessions.borrow().clone());
        let Some(Attached { session, mut client }) = attached else {
            answer.backup_reason = self.inner.view.lock().reason.clone();
            return Ok(answer);
        };
        let request = v1::ReplicaScrubRequest { session, start, volume_id: volume.map_or(0, |id| id.0) };
        match timeout(PEER_CALL, client.scrub(request)).await {
            Ok(Ok(backup)) => {
                let v1::ReplicaScrubResponse { status, damaged, .. } = backup.into_inner();
                (answer.backup, answer.backup_damaged) = (status, damaged);
            }
            Ok(Err(status)) => answer.backup_reason = status.message().to_owned(),
            Err(_) => answer.backup_reason = format!("the backup did not answer within {PEER_CALL:?}"),
        }
        Ok(answer)
    }

    fn verify(&self, volume: Option<VolumeKey>, repair: bool) -> Result<VerifyStream, EngineError> {
        let only = volume.map(|key| self.inner.engine.spec(&key)).transpose()?;
        let store = Arc::clone(self.inner.engine.store());
        let groups = match &only {
            Some(spec) => vec![spec.group],
            None => store.with_state(|state| state.groups.keys().copied().collect()),
        };
        let (told, progress) = mpsc::channel(16);
        let (sessions, view) = (self.inner.sessions.clone(), Arc::clone(&self.inner.view));
        let (inline, events) = (self.inner.inline, self.inner.events.clone());
        let comparison = Comparison { store, sessions, view, inline, repair, events, told };
        let (node, stop) = (self.clone(), self.inner.stop.clone());
        tokio::spawn(async move {
            // The backup holds the snapshots of one comparison.
            let compare = async {
                let _one = node.inner.comparing.lock().await;
                comparison.run(groups, only.map(|spec| spec.id)).await;
            };
            stop.run_until_cancelled(compare).await
        });
        Ok(ReceiverStream::new(progress))
    }

    async fn refuse_primary(&self, request: v1::AttachRequest) -> tonic::Status {
        use tonic::Status;
        let store = self.inner.engine.store();
        let (identity, history) = (store.identity(), store.history());
        let theirs = match convert::history_from_wire(request.history) {
            Ok(theirs) if request.pair_id == identity.pair.0[..] => theirs,
            _ => return Status::failed_precondition("this node is the primary of another pair"),
        };
        let newest = theirs.newest().map_or(0, |g| g.number);
        match history.relation(&theirs) {
            Relation::Ancestor => {
                self.inner.engine.fence(newest, &self.inner.events);
                Status::failed_precondition(format!(
                    "this node was the primary of generation {} and is superseded; `understudy demote` makes it a backup",
                    identity.generation
                ))
            }
            Relation::Descendant => {
                let message = format!(
                    "generation {newest} is over: this node is the primary of generation {}; `understudy demote` makes the \
                     other one a backup",
                    identity.generation
                );
                Status::with_details(
                    tonic::Code::FailedPrecondition,
                    message,
                    convert::attach_refused("superseded", &history),
                )
            }
            Relation::Fork { shared } => {
                let message = format!(
                    "split brain: two primaries since generation {shared}, which they share; run `understudy resolve` on the \
                     side that is to give up its changes"
                );
                if self.inner.engine.standing().begin_split() {
                    self.inner.events.record(unix_ms(), "split_brain.detected", message.clone(), []);
                }
                let details = convert::attach_refused("split_brain", &history);
                Status::with_details(tonic::Code::FailedPrecondition, message, details)
            }
            Relation::Same => Status::failed_precondition(
                "this node is a primary of the same generation: the directory was copied, or [backup] url names the \
                 primary itself",
            ),
        }
    }

    async fn demote(&self, request: v1::DemoteRequest) -> Result<v1::DemoteResponse, EngineError> {
        let (engine, store) = (&self.inner.engine, self.inner.engine.store());
        if request.drain {
            // It would end with the drain, half done.
            if let Some((volume, _)) = store.restores().first() {
                let volume =
                    store.with_state(|s| s.volumes.get(volume).map(|spec| spec.name.clone())).unwrap_or_default();
                return Err(EngineError::Restoring { volume });
            }
            let wait = if request.timeout_ms == 0 { DRAIN } else { Duration::from_millis(request.timeout_ms) };
            engine.drain();
            let drained = async {
                loop {
                    match store.demote_node(true) {
                        Err(store::RoleError::NotDrained { .. }) => tokio::time::sleep(Duration::from_millis(5)).await,
                        other => return other,
                    }
                }
            };
            let demoted = tokio::time::timeout(wait, drained).await.unwrap_or_else(|_| store.demote_node(true));
            if let Err(error) = demoted {
                engine.resume();
                return Err(of_role(error));
            }
        } else {
            store.demote_node(false).map_err(of_role)?;
        }
        engine.standing().demote();
        let identity = store.identity();
        let positions = store.with_state(|state| state.groups.values().map(|g| (g.id, g.position)).collect::<Vec<_>>());
        let unshipped = self.unshipped(None)?;
        let bytes = unshipped.iter().map(|u| u.blocks.len() * u64::from(u.spec.block_size.bytes()));
        let unshipped_bytes: u64 = bytes.sum();
        info!(generation = identity.generation, unshipped_bytes, "role.demoted");
        let fields = [("unshipped_bytes", unshipped_bytes.to_string()), ("drained", request.drain.to_string())];
        self.inner.events.record(unix_ms(), "role.demoted", "this side is a backup from now on", fields);
        self.inner.changed.cancel();
        let place = |(group, position): (understudy_common::types::GroupId, understudy_common::types::Position)| {
            v1::GroupPosition { group_id: group.0, lane: 0, position: Some(position.into()) }
        };
        let positions = positions.into_iter().map(place).collect();
        Ok(v1::DemoteResponse { generation: identity.generation, positions, unshipped_bytes })
    }

    fn resolve(&self) -> Result<v1::ResolveSplitBrainResponse, EngineError> {
        let store = self.inner.engine.store();
        if !self.inner.engine.standing().is_split() {
            let why =
                "there is nothing to resolve: this primary has met no other side that went on by itself since it \
                       started; `understudy demote` makes it a backup"
                    .to_owned();
            return Err(EngineError::Role { why });
        }
        store.yield_node().map_err(of_role)?;
        self.inner.engine.standing().demote();
        let message = "an operator gave up what this side has and the other has not";
        self.inner.events.record(unix_ms(), "role.yielded", message, []);
        self.inner.changed.cancel();
        Ok(v1::ResolveSplitBrainResponse { generation: store.identity().generation })
    }

    fn renew_lease(&self, generation: u64) -> Result<v1::RenewLeaseResponse, EngineError> {
        let remaining = self.inner.engine.standing().renew(generation)?;
        Ok(v1::RenewLeaseResponse { remaining_ms: u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX) })
    }

    fn unshipped(&self, volume: Option<&str>) -> Result<Vec<UnshippedVolume>, EngineError> {
        let store = self.inner.engine.store();
        let state = store.state();
        if let Some(name) = volume.filter(|name| state.volume_by_name(name).is_none()) {
            return Err(EngineError::NoVolume { volume: name.to_owned() });
        }
        let mut unshipped = Vec::new();
        for group in state.groups.keys() {
            for (id, blocks) in store.divergence(*group) {
                let spec = state.volumes.get(&id).filter(|spec| volume.is_none_or(|name| spec.name == name));
                unshipped.extend(spec.cloned().map(|spec| UnshippedVolume { spec, blocks }));
            }
        }
        Ok(unshipped)
    }

    async fn read_unshipped(&self, spec: &VolumeSpec, first_block: u64, count: u64) -> Result<Bytes, EngineError> {
        self.inner.engine.read_unshipped(spec, first_block, count).await
    }

    fn status(&self) -> v1::Status {
        let store = self.inner.engine.store();
        let identity = store.identity();
        let view = self.inner.view.lock().clone();
        let rates = *self.inner.rates.lock();
        let state = store.state();
        let (span, capacity) = (store.span_bytes(), store.config().journal.capacity_bytes);
        v1::Status {
            role: "primary".into(),
            pair_id: identity.pair.to_string(),
            instance_id: identity.instance.to_string(),
            generation: identity.generation,
            link: Some(v1::LinkStatus {
                state: view.state.into(),
                rtt_ms: view.rtt.as_secs_f64() * 1000.0,
                since_unix_ms: view.since_unix_ms,
                reason: view.reason.clone(),
                peer: self.inner.peer.clone(),
            }),
            staging: Some(v1::StagingStatus {
                span_bytes: span,
                capacity_bytes: capacity,
                fill_ratio: if capacity == 0 { 0.0 } else { bytes_f64(span) / bytes_f64(capacity) },
                usage_bytes_per_s: rates.usage,
                flush_bytes_per_s: rates.flush,
                retained_bytes: store.retained().bytes(),
            }),
            volumes: state
                .volumes
                .values()
                .map(|spec| self.volume_status(spec, state.groups.get(&spec.group), &view))
                .collect(),
            recovery_seconds: self.inner.recovery_time.as_secs_f64(),
            recovery_records: self.inner.recovery.replayed,
            version: env!("CARGO_PKG_VERSION").into(),
            fenced_by: self.inner.engine.standing().fenced_by(),
            lease_remaining_seconds: self.inner.engine.standing().lease_remaining().map(|rest| rest.as_secs_f64()),
            clones: Vec::new(),
        }
    }

    fn subscribe(&self, after: u64) -> EventStream {
        convert::watch_events(&self.inner.events, after, unix_ms(), || self.status())
    }

    fn refresh_metrics(&self) {
        let status = self.status();
        let (metrics, store) = (&self.inner.metrics, self.inner.engine.store());
        let age = status.volumes.iter().filter_map(|v| v.recovery_point.as_ref()).map(|r| r.age_seconds);
        metrics.recovery_point_age_seconds.set(age.fold(0.0, f64::max));
        if let Some(staging) = &status.staging {
            metrics.staging_span_bytes.set(gauge(staging.span_bytes));
            metrics.staging_usage_bytes_per_second.set(staging.usage_bytes_per_s);
            metrics.staging_flush_bytes_per_second.set(staging.flush_bytes_per_s);
        }
        let oldest = store.retained().oldest();
        let lag = oldest.map_or(0, |oldest| store.next_lsn().0.saturating_sub(oldest.0));
        metrics.replication_lag_records.set(gauge(lag));
        let segment = u64::from(store.config().pool.segment_bytes);
        let space = store.space();
        for (state, segments) in [
            ("free", space.free()),
            ("reserved", space.reserved()),
            ("used", space.total().saturating_sub(space.free())),
        ] {
            metrics.pool_bytes.with_label_values(&[state]).set(gauge(segments * segment));
        }
        metrics.pool_promised_bytes.set(gauge(store.pool_bytes().promised));
        metrics.redundancy_ratio.set(control::redundancy_ratio(store));
        for volume in &status.volumes {
            let mode = if volume.mode() == v1::Mode::Delta { "delta" } else { "continuous" };
            metrics.set_mode(&volume.name, mode);
            metrics.delta_dirty_blocks.with_label_values(&[&volume.name]).set(gauge(volume.dirty_blocks));
        }
        metrics.bytes_at_risk.set(gauge(store.bytes_at_risk()));
        let retained = store.retained();
        let lanes = &store.config().lanes;
        // With one lane the figures of the node are its.
        for lane in (0..).take(lanes.count()).filter(|_| lanes.count() > 1) {
            let name = lanes.name(lane);
            let of_lane = status.volumes.iter().flat_map(|v| &v.lanes).filter(|l| l.lane == u32::from(lane));
            let age = of_lane.filter_map(|l| l.recovery_point.as_ref()).map(|r| r.age_seconds).fold(0.0, f64::max);
            metrics.lane_retained_bytes.with_label_values(&[&name]).set(gauge(retained.lane_bytes(lane)));
            metrics.lane_recovery_point_age_seconds.with_label_values(&[&name]).set(age);
        }
        metrics.lease_remaining_seconds.set(status.lease_remaining_seconds.unwrap_or_default());
    }

    async fn failed(&self) -> Failure {
        let mut marks = self.inner.engine.marks();
        // The store lives as long as this node. What is seen of the marks is let go of before the store is asked.
        let failed = async { drop(marks.wait_for(|m| m.failed).await) };
        tokio::select! {
            () = failed => {
                Failure::new(Exit::Storage, self.inner.engine.store().failure().unwrap_or_default())
            }
            () = self.inner.changed.cancelled() => {
                Failure::new(Exit::Again, "the role has changed: start understudy-backup on this directory")
            }
        }
    }

    async fn close(&self) -> Result<(), Failure> {
        self.inner.engine.drain();
        let store = self.inner.engine.store();
        let last = Lsn(store.next_lsn().0 - 1);
        let mut marks = self.inner.engine.marks();
        // The store lives as long as this node.
        let _ = marks.wait_for(|m| m.durable >= last || m.failed).await;
        self.inner.stop.cancel();
        let tasks = std::mem::take(&mut *self.inner.tasks.lock());
        for task in tasks {
            // A task that panicked has ended the process.
            let _ = task.await;
        }
        let threads = self.inner.threads.lock().take();
        drop(threads);
        let failure = store.failure();
        self.inner.events.close(unix_ms(), failure.as_deref().unwrap_or("the primary has ended in order"));
        match failure {
            Some(why) => Err(Failure::new(Exit::Storage, why)),
            None => Ok(()),
        }
    }
}

fn of_role(error: store::RoleError) -> EngineError {
    match error {
        store::RoleError::Catalog(error) => EngineError::Storage { message: error.to_string() },
        error => EngineError::Role { why: error.to_string() },
    }
}

#[allow(clippy::cast_precision_loss, reason = "a rate or a ratio for people")]
fn bytes_f64(bytes: u64) -> f64 {
    bytes as f64
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
