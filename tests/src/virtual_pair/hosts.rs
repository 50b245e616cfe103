//! The software of the simulated hosts: a store on a simulated disk, driven by tasks, with the real services around it.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rand::Rng;
use rand_pcg::Pcg64Mcg;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};
use turmoil::net::{TcpListener, TcpStream};
use understudy_backup::{
    api::ReplicaNode as _,
    node::Seams,
    services::{Audience, services as backup_services},
};
use understudy_common::{
    config::{DeltaConfig, LimitsConfig, LinkConfig, ScrubConfig, Throttle},
    events::EventLog,
    journal::JournalConfig,
    lane::Lanes,
    policy::PolicyConfig,
    pool::{DeviceConfig, PoolConfig},
    scrub::Scrub,
    serve::{Accept, Protocol, ServeLimits, serve},
    storage::{Storage, sim::SimStorage},
    store::{self, Levels, Recovery, Role, Store, StoreConfig, driver::run_tasks},
    telemetry::{Metrics, Telemetry},
    types::{Lsn, Uid},
};
use understudy_primary::{
    api::BlockEngine as _, engine::Limits, node::Replication, services::services as primary_services,
};

use super::model::{BLOCKS, Model, Range, SEGMENT, VOLUMES};
use understudy_sim::delta;

/// Where both services listen.
pub(super) const PORT: u16 = 7000;

/// What a host keeps across its crashes, and what the oracle shares with it.
pub(super) struct Machine {
    pub role: Role,
    pub disk: SimStorage,
    pub config: StoreConfig,
    pub model: Arc<Mutex<Model>>,
    /// Ids, and the time that the disk takes.
    pub rng: Mutex<Pcg64Mcg>,
    /// Longest time of a step of a store, milliseconds.
    pub disk_millis: u64,
    /// What moves groups of the primary between the modes.
    pub policy: PolicyConfig,
    /// Longest time of a call.
    pub request_deadline: Duration,
    /// Ends the running software as SIGTERM would.
    pub shutdown: Mutex<CancellationToken>,
}

impl Machine {
    pub fn new(role: Role, rng: &mut Pcg64Mcg, model: &Arc<Mutex<Model>>, policy: PolicyConfig) -> Self {
        let tight_journal = rng.random_bool(0.4);
        let config = StoreConfig {
            journal: JournalConfig {
                capacity_bytes: if tight_journal { 256 * 1024 } else { 1024 * 1024 },
                file_bytes: 64 * 1024,
                reserve_bytes: 48 * 1024,
                max_batch_bytes: 32 * 1024,
            },
            pool: PoolConfig { segment_bytes: SEGMENT, devices: vec![device(56)], map_cache_bytes: 1 << 20 },
            checkpoint_bytes: 128 * 1024,
            tail_bytes: rng.random_range(1..64) * 1024,
            reference_bytes: SEGMENT as usize,
            apply_bytes: 16 * 1024,
            drain_bytes_per_s: 0,
            levels: Levels::default(),
            pending_bytes: 1 << 20,
            retain: role == Role::Primary,
            lanes: Lanes::default(),
        };
        Self {
            role,
            disk: SimStorage::new(rng.random()),
            config,
            model: Arc::clone(model),
            rng: Mutex::new(Pcg64Mcg::new(rng.random())),
            disk_millis: if rng.random_bool(0.3) { 40 } else { 3 },
            policy,
            request_deadline: Duration::from_secs(2),
            shutdown: Mutex::default(),
        }
    }

    /// Opens the store and checks it. `None` if the disk died meanwhile, or a promise was broken.
    fn open(&self) -> Option<(Arc<Store>, Recovery)> {
        let storage: Arc<dyn Storage> = Arc::new(self.disk.clone());
        let opened = store::open(storage, self.config.clone(), self.role, &mut || self.id());
        let mut model = self.model.lock();
        match opened {
            Ok((store, recovery)) => {
                model.note(format!("{} recovered up to {}", self.role, store.next_lsn()));
                match self.role {
                    Role::Primary => check_primary(&mut model, &store),
                    Role::Backup => check_backup(&mut model, &store),
                }
                Some((store, recovery))
            }
            Err(_) if self.disk.has_crashed() => None,
            Err(error) => {
                model.violate(format!("the {} does not open: {error}", self.role));
                None
            }
        }
    }

    fn id(&self) -> Uid {
        Uid(self.rng.lock().random())
    }

    /// Mostly quick, now and then slow.
    fn pause(&self) -> Duration {
        let mut rng = self.rng.lock();
        let longest = if rng.random_bool(0.02) { 10 * self.disk_millis } else { self.disk_millis };
        Duration::from_millis(rng.random_range(0..=longest))
    }

    fn drive(self: &Arc<Self>, store: &Arc<Store>) {
        let (machine, store) = (Arc::clone(self), Arc::clone(store));
        tokio::spawn(async move { run_tasks(&store, move || machine.pause()).await });
    }

    fn new_shutdown(&self) -> CancellationToken {
        let token = CancellationToken::new();
        *self.shutdown.lock() = token.clone();
        token
    }
}

/// A device of a fixed size.
pub(super) fn device(segments: u64) -> DeviceConfig {
    // In front of them is room for the descriptors of a thousand.
    let size_bytes = Some(4096 + 1024 * 512 + segments * u64::from(SEGMENT));
    DeviceConfig { path: "device".into(), size_bytes, max_bytes: None }
}

/// P1: everything acknowledged is there.
fn check_primary(model: &mut Model, store: &Store) {
    let newest = model.newest_acked();
    if newest >= store.next_lsn() {
        model.violate(format!("write {newest} was acknowledged; the journal ends before {}", store.next_lsn()));
    }
    for (volume, name) in VOLUMES.iter().enumerate() {
        let Some(spec) = store.with_state(|s| s.volume_by_name(name).cloned()) else { continue };
        let range = Range { volume, first: 0, count: BLOCKS };
        match store.read(spec.id, 0, BLOCKS as u64) {
            Ok(read) => model.check_newest("the primary after recovery", range, &read.data),
            Err(error) => model.violate(format!("the primary after recovery: {name}: {error}")),
        }
    }
}

/// P4: each volume, as a reader gets it, is the image at the position that its group names; P1 for what both had.
fn check_backup(model: &mut Model, store: &Arc<Store>) {
    for (volume, name) in VOLUMES.iter().enumerate() {
        let spec = store.with_state(|state| state.volume_by_name(name).cloned());
        let known = spec.and_then(|spec| Some((delta::view(store, spec.group)?, spec)));
        model.check_both(volume, known.as_ref().map_or(Lsn::ZERO, |(view, _)| view.position.lsn));
        // Until a first run is committed there is no image, and the backup says so.
        let Some((view, spec)) = known.filter(|(view, _)| view.consistent) else { continue };
        match delta::read_applied(store, &spec) {
            Ok(data) => model.check_image("the backup after recovery", volume, view.position.lsn, &data),
            Err(error) => model.violate(format!("the backup after recovery: {name}: {error}")),
        }
    }
}

/// A listener of the simulated network.
struct Door(TcpListener);

impl Accept for Door {
    type Io = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        self.0.accept().await
    }
}

/// A connection over the simulated network, with the timeouts of a real one.
pub(super) async fn connect(host: &'static str) -> Result<Channel, String> {
    let connector =
        tower::service_fn(move |_: Uri| async move { TcpStream::connect((host, PORT)).await.map(TokioIo::new) });
    Endpoint::from_shared(format!("http://{host}:{PORT}"))
        .map_err(|error| error.to_string())?
        .http2_keep_alive_interval(Duration::from_millis(300))
        .keep_alive_timeout(Duration::from_millis(700))
        .keep_alive_while_idle(true)
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .connect_with_connector(connector)
        .await
        .map_err(|error| format!("connecting to {host}: {error}"))
}

pub(super) fn link() -> LinkConfig {
    LinkConfig {
        heartbeat: Duration::from_millis(200),
        timeout: Duration::from_millis(600),
        window_bytes: 64 << 10,
        reconnect_max: Duration::from_millis(500),
        ack_deadline: Duration::from_millis(1500),
        throttle_bytes_per_s: None,
    }
}

fn limits(request_deadline: Duration) -> LimitsConfig {
    LimitsConfig {
        message_bytes: 1 << 20,
        connections: 64,
        streams: 64,
        in_flight_bytes: 1 << 20,
        request_deadline,
        queue_wait: Duration::from_millis(500),
    }
}

fn serve_limits() -> ServeLimits {
    ServeLimits {
        handshake: Duration::from_secs(1),
        keepalive_interval: Duration::from_secs(1),
        keepalive_timeout: Duration::from_secs(1),
        drain: Duration::from_millis(500),
        ..ServeLimits::default()
    }
}

fn replication(policy: PolicyConfig) -> Replication {
    let scrub = ScrubConfig { interval: Duration::ZERO, bytes_per_s: None };
    let delta = DeltaConfig { throttle: Throttle::Adaptive };
    Replication { link: link(), policy, delta, scrub, observations: None }
}

/// The primary, from recovery to its end.
pub(super) async fn primary(machine: Arc<Machine>) -> turmoil::Result {
    let Some((store, recovery)) = machine.open() else { return Ok(()) };
    machine.drive(&store);
    let config = limits(machine.request_deadline);
    let engine_limits = Limits {
        message_bytes: config.message_bytes as u64,
        in_flight_bytes: config.in_flight_bytes,
        queue_wait: config.queue_wait,
        // As the service does: the answer has to reach the client before its call ends.
        deadline: config.request_deadline - config.request_deadline / 8,
        inline_reads: true,
        lease: None,
    };
    let metrics = Metrics::new(&Telemetry::new("primary"));
    let connect: understudy_primary::node::Connector = Box::new(|| Box::pin(connect("backup")));
    let node = understudy_primary::node::Node::start(
        store,
        engine_limits,
        replication(machine.policy.clone()),
        Some(connect),
        "backup".into(),
        metrics.clone(),
        EventLog::default(),
        recovery,
        Duration::ZERO,
        None,
    );
    tokio::spawn(scrub_again(Arc::clone(&machine), node.scrub_of_store().clone(), Arc::clone(node.engine().store())));
    let shutdown = machine.new_shutdown();
    let services = primary_services(node.clone(), &config, &metrics, shutdown.clone()).await;
    services.health.set(true).await;
    let door = Door(TcpListener::bind(("0.0.0.0", PORT)).await?);
    tokio::select! {
        biased;
        _ = node.failed() => return Ok(()),
        _ = serve(door, Protocol::Grpc, None, serve_limits(), services.router, shutdown) => {}
    }
    closed(&machine, node.close().await.map_err(|error| error.to_string()));
    Ok(())
}

/// The backup, from recovery to its end.
pub(super) async fn backup(machine: Arc<Machine>) -> turmoil::Result {
    let Some((store, recovery)) = machine.open() else { return Ok(()) };
    machine.drive(&store);
    let config = limits(machine.request_deadline);
    let metrics = Metrics::new(&Telemetry::new("backup"));
    let ids = Arc::clone(&machine);
    let seams = Seams { session_id: Box::new(move || ids.id()), inline_reads: true, ..Seams::default() };
    let node = understudy_backup::node::Node::with_seams(
        store,
        link(),
        metrics.clone(),
        recovery,
        Duration::ZERO,
        None,
        seams,
    );
    tokio::spawn(scrub_again(Arc::clone(&machine), node.scrub_of_store().clone(), Arc::clone(node.store())));
    let shutdown = machine.new_shutdown();
    let services = backup_services(node.clone(), Audience::All, &config, &metrics, shutdown.clone()).await;
    services.health.set(true).await;
    let door = Door(TcpListener::bind(("0.0.0.0", PORT)).await?);
    tokio::select! {
        biased;
        _ = node.failed() => return Ok(()),
        _ = serve(door, Protocol::Grpc, None, serve_limits(), services.router, shutdown) => {}
    }
    closed(&machine, node.close().await.map_err(|error| error.to_string()));
    Ok(())
}

/// I11: nothing damages a block here, so no scrub finds one damaged, whatever is being written.
async fn scrub_again(machine: Arc<Machine>, scrub: Scrub, store: Arc<Store>) {
    while store.failure().is_none() {
        scrub.ask(None);
        tokio::time::sleep(Duration::from_millis(300)).await;
        if let Some(damaged) = store.damaged().first().filter(|_| !machine.disk.has_crashed()) {
            machine.model.lock().violate(format!("a scrub of the {} takes {damaged:?} for damaged", machine.role));
        }
    }
}

fn closed(machine: &Machine, result: Result<(), String>) {
    let mut model = machine.model.lock();
    model.note(format!("{} closed", machine.role));
    if let Err(error) = result
        && !machine.disk.has_crashed()
    {
        model.violate(format!("the {} does not close: {error}", machine.role));
    }
}
