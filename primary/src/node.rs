//! The primary's node: the engine with its link, its events and its figures, behind the seam of the services.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity as TlsIdentity};
use tracing::info;
use understudy_common::{
    config::{LinkConfig, PrimaryConfig, TlsConfig},
    events::{Event, EventLog},
    process::{Exit, Failure},
    state::GroupState,
    store::{self, Recovery, Role, Store, driver::Threads, setup},
    telemetry::Metrics,
    types::{AckRule, AwayRule, Lsn, Position, Uid, VolumeSpec},
};
use understudy_proto::v1;

use crate::{
    api::{
        BlockEngine, DeviceInfo, EngineError, EventStream, NewVolume, PoolInfo, ReadPiece, VolumeKey, WriteAck,
        WriteRequest,
    },
    engine::{Engine, Limits, Permit, Ticket, unix_ms},
    link::{Connecting, Link, LinkView},
};

/// Events that are kept.
const EVENTS: usize = 1024;
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
}

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
    let store_config = setup::store_config(&config.pool, &config.staging, &config.checkpoint, retain);
    let (data_dir, staging) = (config.data_dir.clone(), config.staging.clone());
    let opening = tokio::task::spawn_blocking(move || {
        let start = Instant::now();
        let storage = setup::storage(&data_dir, &staging)
            .map_err(|error| Failure::new(Exit::Storage, format!("{}: {error}", data_dir.display())))?;
        let (store, recovery) = store::open(storage, store_config, Role::Primary, &mut || Uid(rand::random()))
            .map_err(|error| Failure::new(exit_of(&error), error))?;
        let threads = Threads::start(&store).map_err(|error| Failure::new(Exit::Internal, error))?;
        Ok((store, recovery, start.elapsed(), threads))
    });
    let (store, recovery, recovery_time, threads) =
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
    };
    let peer = config.backup.url.unwrap_or_default();
    Ok(Node::start(store, limits, config.link, connect, peer, metrics, recovery, recovery_time, Some(threads)))
}

/// Exit code of a store that does not open.
fn exit_of(error: &store::OpenError) -> Exit {
    match error {
        store::OpenError::Role { .. } => Exit::Config,
        _ => Exit::Storage,
    }
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
        .keep_alive_timeout(link.timeout)
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
        link: LinkConfig,
        connect: Option<Connector>,
        peer: String,
        metrics: Metrics,
        recovery: Recovery,
        recovery_time: Duration,
        threads: Option<Threads>,
    ) -> Self {
        let (sync, checkpoint) = (metrics.journal_sync_seconds.clone(), metrics.checkpoint_seconds.clone());
        // They are set once, here.
        let _ = store.stats().on_batch.set(Box::new(move |seconds| sync.observe(seconds)));
        let _ = store.stats().on_checkpoint.set(Box::new(move |seconds| checkpoint.observe(seconds)));
        metrics.staging_capacity_bytes.set(gauge(store.config().journal.capacity_bytes));
        let events = EventLog::new(EVENTS);
        events.record(unix_ms(), "node.started", "the primary has started", []);
        let engine = Engine::new(store, limits);
        let stop = CancellationToken::new();
        let mut tasks = Vec::new();
        let view = match connect {
            Some(connect) => {
                let link = Link::new(engine.clone(), link, connect, events.clone(), metrics.clone());
                let view = link.view();
                tasks.push(tokio::spawn(link.run(stop.clone())));
                view
            }
            None => Link::unconfigured(),
        };
        let inner = Arc::new(Inner {
            engine,
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
        });
        tasks.push(tokio::spawn(measure_rates(Arc::downgrade(&inner), inner.stop.clone())));
        *inner.tasks.lock() = tasks;
        Self { inner }
    }

    /// The engine below.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    fn volume_status(&self, spec: &VolumeSpec, group: Option<&GroupState>, view: &LinkView) -> v1::VolumeStatus {
        let store = self.inner.engine.store();
        let retained = store.retained_of(spec.group);
        let last = group.map_or(Position::default(), |g| g.position);
        let marks = *store.marks().borrow();
        let at = |lsn: Lsn| Some(v1::Position::from(Position { generation: last.generation, lsn: lsn.min(last.lsn) }));
        let configured = view.state != "unconfigured";
        let acked = if retained.oldest.is_none() && configured { last.lsn } else { retained.acked };
        let oldest = store.oldest_retained_time(spec.group);
        let now = unix_ms();
        let age_ms = oldest.map_or(0, |time| (now - time).max(0));
        v1::VolumeStatus {
            id: spec.id.0,
            name: spec.name.clone(),
            group: spec.group_name.clone(),
            size_bytes: spec.size_bytes,
            block_bytes: spec.block_size.bytes(),
            mode: v1::Mode::Continuous.into(),
            cause: view
                .held
                .get(&spec.group)
                .map_or_else(String::new, |held| format!("backup_refused ({}): {}", held.cause, held.message)),
            phase: v1::Phase::Streaming.into(),
            position: Some(v1::VolumePosition {
                next: at(last.lsn),
                durable: at(marks.durable),
                sent: at(if view.state == "attached" { view.sent.max(acked) } else { acked }),
                acked: at(acked),
                applied: at(marks.applied),
            }),
            bytes_at_risk: retained.bytes,
            recovery_point: Some(v1::RecoveryPoint {
                position: at(acked),
                time_unix_ms: oldest.unwrap_or(now),
                age_seconds: Duration::from_millis(u64::try_from(age_ms).unwrap_or_default()).as_secs_f64(),
            }),
            consistent: configured,
            ack: v1::AckRule::from(spec.ack).into(),
            away: v1::AwayRule::from(spec.away).into(),
        }
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

impl BlockEngine for Node {
    type Permit = Permit;
    type Ticket = Ticket;

    async fn admit(&self, bytes: u64) -> Result<Permit, EngineError> {
        self.inner.engine.admit(bytes).await
    }

    async fn submit(&self, permit: Permit, request: WriteRequest) -> Result<Ticket, EngineError> {
        let submitted = self.inner.engine.submit(permit, request).await;
        let full = matches!(submitted, Err(EngineError::StagingFull { .. }));
        if (full || submitted.is_ok()) && self.inner.staging_full.swap(full, Ordering::Relaxed) != full {
            let (kind, message) = if full {
                ("staging.full", "writes are refused until the backup has caught up")
            } else {
                ("staging.relieved", "writes are taken again")
            };
            self.inner.events.record(unix_ms(), kind, message, []);
        }
        submitted
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
        let read = self.inner.engine.read(volume, offset_bytes, length_bytes).await;
        if matches!(read, Err(EngineError::Damaged { .. })) {
            self.inner.metrics.checksum_errors.with_label_values(&["false"]).inc();
        }
        read
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

    fn pool(&self) -> PoolInfo {
        let store = self.inner.engine.store();
        let segment = u64::from(store.config().pool.segment_bytes);
        let space = store.space();
        let devices = store.with_pool(|pool| pool.device_sizes());
        PoolInfo {
            segment_bytes: store.config().pool.segment_bytes,
            total_bytes: space.total().saturating_add(space.can_grow()).saturating_mul(segment),
            free_bytes: space.free().saturating_add(space.can_grow()).saturating_mul(segment),
            reserved_bytes: space.reserved() * segment,
            devices: (0..)
                .zip(devices)
                .map(|(id, (path, total, free))| DeviceInfo {
                    id,
                    path,
                    size_bytes: total * segment,
                    free_bytes: free * segment,
                })
                .collect(),
        }
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
        }
    }

    fn subscribe(&self, after: u64) -> EventStream {
        let first = (after == 0).then(|| {
            let status = self.status();
            v1::Event {
                number: self.inner.events.newest(),
                time_unix_ms: unix_ms(),
                kind: "state".into(),
                message: format!("primary, {} volumes", status.volumes.len()),
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
        let (metrics, store) = (&self.inner.metrics, self.inner.engine.store());
        let age = status.volumes.iter().filter_map(|v| v.recovery_point.as_ref()).map(|r| r.age_seconds);
        metrics.recovery_point_age_seconds.set(age.fold(0.0, f64::max));
        if let Some(staging) = &status.staging {
            metrics.staging_span_bytes.set(gauge(staging.span_bytes));
            metrics.staging_usage_bytes_per_second.set(staging.usage_bytes_per_s);
            metrics.staging_flush_bytes_per_second.set(staging.flush_bytes_per_s);
            metrics.bytes_at_risk.set(gauge(staging.retained_bytes));
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
        for volume in &status.volumes {
            metrics.set_mode(&volume.name, "continuous");
        }
    }

    async fn failed(&self) -> Failure {
        let mut marks = self.inner.engine.marks();
        // The store lives as long as this node.
        let _ = marks.wait_for(|m| m.failed).await;
        Failure::new(Exit::Storage, self.inner.engine.store().failure().unwrap_or_default())
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
        match store.failure() {
            Some(why) => Err(Failure::new(Exit::Storage, why)),
            None => Ok(()),
        }
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

#[allow(clippy::cast_precision_loss, reason = "a rate or a ratio for people")]
fn bytes_f64(bytes: u64) -> f64 {
    bytes as f64
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
