//! The settings as the services hold them: parsed once, every value valid.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Service, load::Effective};
use crate::units::{UnitError, parse_bytes};

/// A configuration that can be made from checked values.
pub trait FromSettings: Sized {
    /// Whose table it is made from.
    const SERVICE: Service;
    /// `effective` is free of problems and of this service's table.
    fn from_settings(effective: &Effective) -> Self;
    /// Where everything durable is.
    fn data_dir(&self) -> &Path;
    /// How to log.
    fn log(&self) -> &LogConfig;
}

/// Settings of the primary.
#[derive(Debug, Clone)]
pub struct PrimaryConfig {
    /// Where everything durable is.
    pub data_dir: PathBuf,
    /// Clients and operators, gRPC.
    pub listen: SocketAddr,
    /// Metrics, health, status page.
    pub admin_listen: SocketAddr,
    /// Gets the bound addresses.
    pub ready_file: Option<PathBuf>,
    /// `[backup]`.
    pub backup: BackupPeerConfig,
    /// `[pool]`.
    pub pool: PoolConfig,
    /// `[staging]`.
    pub staging: StagingConfig,
    /// `[link]`.
    pub link: LinkConfig,
    /// `[limits]`.
    pub limits: LimitsConfig,
    /// `[checkpoint]`.
    pub checkpoint: CheckpointConfig,
    /// `[shutdown]`.
    pub shutdown: ShutdownConfig,
    /// `[tls]`.
    pub tls: TlsConfig,
    /// `[log]`.
    pub log: LogConfig,
}

/// Settings of the backup.
#[derive(Debug, Clone)]
pub struct BackupConfig {
    /// Where everything durable is.
    pub data_dir: PathBuf,
    /// Operators and readers, gRPC.
    pub listen: SocketAddr,
    /// Metrics, health, status page.
    pub admin_listen: SocketAddr,
    /// Gets the bound addresses.
    pub ready_file: Option<PathBuf>,
    /// `[replica]`.
    pub replica: ReplicaConfig,
    /// `[pool]`.
    pub pool: PoolConfig,
    /// `[staging]`.
    pub staging: StagingConfig,
    /// `[link]`.
    pub link: LinkConfig,
    /// `[limits]`.
    pub limits: LimitsConfig,
    /// `[checkpoint]`.
    pub checkpoint: CheckpointConfig,
    /// `[shutdown]`.
    pub shutdown: ShutdownConfig,
    /// `[tls]`.
    pub tls: TlsConfig,
    /// `[log]`.
    pub log: LogConfig,
}

/// `[backup]` of the primary.
#[derive(Debug, Clone)]
pub struct BackupPeerConfig {
    /// `http://host:port` or `https://host:port`; `None`: nothing is replicated.
    pub url: Option<String>,
}

/// `[replica]` of the backup.
#[derive(Debug, Clone)]
pub struct ReplicaConfig {
    /// `None`: the primary is served on `listen`.
    pub listen: Option<SocketAddr>,
}

/// `[pool]`.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Empty: one file in the data directory that grows.
    pub devices: Vec<DeviceSetting>,
    /// Unit of physical allocation in bytes, a power of two.
    pub segment_bytes: u64,
    /// Cap of the file that grows, in bytes.
    pub max_bytes: u64,
    /// Memory for pages of segment maps, in bytes.
    pub cache_bytes: u64,
}

/// One device of the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSetting {
    /// A file or a block device.
    pub path: PathBuf,
    /// In bytes; `None`: as large as it is.
    pub size_bytes: Option<u64>,
}

impl DeviceSetting {
    /// `PATH` or `PATH=SIZE`.
    pub fn parse(text: &str) -> Result<Self, UnitError> {
        match text.rsplit_once('=') {
            Some((path, size)) => Ok(Self { path: path.into(), size_bytes: Some(parse_bytes(size)?) }),
            None => Ok(Self { path: text.into(), size_bytes: None }),
        }
    }
}

/// `[staging]`.
#[derive(Debug, Clone)]
pub struct StagingConfig {
    /// Directory of the journal.
    pub path: PathBuf,
    /// Largest size of the journal in bytes.
    pub capacity_bytes: u64,
}

/// `[link]`.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// Time between two heartbeats.
    pub heartbeat: Duration,
    /// Silence after which the link is lost; at least two heartbeats.
    pub timeout: Duration,
    /// Bytes in flight to the backup.
    pub window_bytes: u64,
    /// Longest pause between two attempts to connect.
    pub reconnect_max: Duration,
    /// Age of an unacknowledged record that breaks the session.
    pub ack_deadline: Duration,
}

/// `[limits]`.
#[derive(Debug, Clone)]
pub struct LimitsConfig {
    /// Largest gRPC message in bytes.
    pub message_bytes: usize,
    /// Open connections.
    pub connections: usize,
    /// Concurrent calls on one connection.
    pub streams: u32,
    /// Bytes of unacknowledged writes of all clients.
    pub in_flight_bytes: u64,
    /// Longest duration of a unary call.
    pub request_deadline: Duration,
    /// Wait for admission.
    pub queue_wait: Duration,
}

/// `[checkpoint]`.
#[derive(Debug, Clone)]
pub struct CheckpointConfig {
    /// Journal bytes after which one starts.
    pub bytes: u64,
}

/// `[shutdown]`.
#[derive(Debug, Clone)]
pub struct ShutdownConfig {
    /// Time that calls get to end.
    pub drain: Duration,
}

/// `[tls]`.
#[derive(Debug, Clone)]
pub struct TlsConfig {
    /// Certificate chain of the listeners, PEM.
    pub certificate: Option<PathBuf>,
    /// Its private key, PEM. Set exactly when `certificate` is.
    pub key: Option<PathBuf>,
    /// Authorities of clients, PEM.
    pub client_ca: Option<PathBuf>,
    /// Authorities of the other side of the pair, PEM.
    pub replica_ca: Option<PathBuf>,
    /// Plaintext was allowed beyond loopback.
    pub allow_plaintext: bool,
}

/// `[log]`.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// JSON instead of human text.
    pub json: bool,
    /// Level or directives.
    pub level: String,
}

impl FromSettings for PrimaryConfig {
    const SERVICE: Service = Service::Primary;

    fn from_settings(from: &Effective) -> Self {
        Self {
            data_dir: required(from.path("data_dir")),
            listen: from.address("listen").expect("has a default"),
            admin_listen: from.address("admin_listen").expect("has a default"),
            ready_file: from.path("ready_file").map(Path::to_owned),
            backup: BackupPeerConfig { url: from.text("backup.url").map(str::to_owned) },
            pool: pool(from),
            staging: staging(from),
            link: link(from),
            limits: limits(from),
            checkpoint: CheckpointConfig { bytes: from.bytes("checkpoint.bytes") },
            shutdown: ShutdownConfig { drain: from.duration("shutdown.drain") },
            tls: tls(from),
            log: log(from),
        }
    }

    fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    fn log(&self) -> &LogConfig {
        &self.log
    }
}

impl FromSettings for BackupConfig {
    const SERVICE: Service = Service::Backup;

    fn from_settings(from: &Effective) -> Self {
        Self {
            data_dir: required(from.path("data_dir")),
            listen: from.address("listen").expect("has a default"),
            admin_listen: from.address("admin_listen").expect("has a default"),
            ready_file: from.path("ready_file").map(Path::to_owned),
            replica: ReplicaConfig { listen: from.address("replica.listen") },
            pool: pool(from),
            staging: staging(from),
            link: link(from),
            limits: limits(from),
            checkpoint: CheckpointConfig { bytes: from.bytes("checkpoint.bytes") },
            shutdown: ShutdownConfig { drain: from.duration("shutdown.drain") },
            tls: tls(from),
            log: log(from),
        }
    }

    fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    fn log(&self) -> &LogConfig {
        &self.log
    }
}

fn required(path: Option<&Path>) -> PathBuf {
    path.expect("its absence is a problem, and there is none").to_owned()
}

fn pool(from: &Effective) -> PoolConfig {
    let device = |text: &String| DeviceSetting::parse(text).expect("checked before");
    PoolConfig {
        devices: from.list("pool.devices").iter().map(device).collect(),
        segment_bytes: from.bytes("pool.segment"),
        max_bytes: from.bytes("pool.max"),
        cache_bytes: from.bytes("pool.cache"),
    }
}

fn staging(from: &Effective) -> StagingConfig {
    StagingConfig { path: required(from.path("staging.path")), capacity_bytes: from.bytes("staging.capacity") }
}

fn link(from: &Effective) -> LinkConfig {
    LinkConfig {
        heartbeat: from.duration("link.heartbeat"),
        timeout: from.duration("link.timeout"),
        window_bytes: from.bytes("link.window"),
        reconnect_max: from.duration("link.reconnect_max"),
        ack_deadline: from.duration("link.ack_deadline"),
    }
}

fn limits(from: &Effective) -> LimitsConfig {
    const IN_RANGE: &str = "the table's range is smaller";
    LimitsConfig {
        message_bytes: usize::try_from(from.bytes("limits.message")).expect(IN_RANGE),
        connections: usize::try_from(from.integer("limits.connections")).expect(IN_RANGE),
        streams: u32::try_from(from.integer("limits.streams")).expect(IN_RANGE),
        in_flight_bytes: from.bytes("limits.in_flight"),
        request_deadline: from.duration("limits.request_deadline"),
        queue_wait: from.duration("limits.queue_wait"),
    }
}

fn tls(from: &Effective) -> TlsConfig {
    let path = |path| from.path(path).map(Path::to_owned);
    TlsConfig {
        certificate: path("tls.certificate"),
        key: path("tls.key"),
        client_ca: path("tls.client_ca"),
        replica_ca: path("tls.replica_ca"),
        allow_plaintext: from.flag("tls.allow_plaintext"),
    }
}

fn log(from: &Effective) -> LogConfig {
    LogConfig {
        json: from.text("log.format") == Some("json"),
        level: from.text("log.level").expect("has a default").to_owned(),
    }
}
