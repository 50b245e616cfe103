//! The settings as the services hold them: parsed once, every value valid.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Service, load::Effective, setting::Value};
use crate::{
    lane::{LaneProblem, Lanes},
    policy::PolicyConfig,
    store::Levels,
    units::{UnitError, parse_bytes},
};

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
    /// `[scrub]`.
    pub scrub: ScrubConfig,
    /// `[link]`.
    pub link: LinkConfig,
    /// `[policy]`, with what belongs to it of `[link]` and `[delta]`.
    pub policy: PolicyConfig,
    /// Size of the observation log in bytes; 0: none.
    pub observation_log_bytes: u64,
    /// `[delta]` but for its schedule, which is the policy's.
    pub delta: DeltaConfig,
    /// `[lanes]`.
    pub lanes: Lanes,
    /// `[snapshots]`.
    pub snapshots: SnapshotsConfig,
    /// `[lease]`.
    pub lease: LeaseConfig,
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
    /// `[scrub]`.
    pub scrub: ScrubConfig,
    /// `[clones]`.
    pub clones: ClonesConfig,
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
    /// Shares of the pool at which to warn and to stop.
    pub levels: Levels,
    /// Bytes a second that are moved off a draining device; 0: no limit.
    pub drain_bytes_per_s: u64,
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

/// `[clones]` of the backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClonesConfig {
    /// Bytes of blocks that were written to clones, of all of them together.
    pub capacity_bytes: u64,
}

/// `[scrub]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubConfig {
    /// Time between two scrubs; zero: none by itself.
    pub interval: Duration,
    /// `None`: no limit.
    pub bytes_per_s: Option<u64>,
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
    /// Limit of continuous replication in bytes a second; `None`: none. Of the primary.
    pub throttle_bytes_per_s: Option<u64>,
}

/// `[delta]` but for its schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaConfig {
    /// Speed of runs.
    pub throttle: Throttle,
}

/// Speed of runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Throttle {
    /// Gives way to clients, and always progresses.
    Adaptive,
    /// As fast as it goes.
    Unlimited,
    /// At most so many bytes a second; never 0.
    BytesPerSecond(u64),
}

impl Throttle {
    /// `adaptive`, `none` or a size.
    pub fn parse(text: &str) -> Result<Self, UnitError> {
        match text {
            "adaptive" => Ok(Self::Adaptive),
            "none" => Ok(Self::Unlimited),
            size => Ok(match parse_bytes(size)? {
                0 => Self::Unlimited,
                bytes => Self::BytesPerSecond(bytes),
            }),
        }
    }
}

/// `[lease]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseConfig {
    /// Serve only under a lease.
    pub required: bool,
    /// How long it holds.
    pub ttl: Duration,
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

/// `[snapshots]` of the primary.
#[derive(Debug, Clone)]
pub struct SnapshotsConfig {
    /// Time between two; 0: none are taken.
    pub interval: Duration,
    /// Kept in any case.
    pub keep_last: usize,
    /// Hours of which the newest is kept.
    pub keep_hourly: usize,
    /// Days of which the newest is kept.
    pub keep_daily: usize,
    /// Shell command before each.
    pub before: Option<String>,
    /// Shell command after each.
    pub after: Option<String>,
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
            scrub: scrub(from),
            link: link(from),
            policy: policy(from),
            observation_log_bytes: from.bytes("policy.observation_log"),
            delta: DeltaConfig {
                throttle: Throttle::parse(from.text("delta.throttle").expect("has a default")).expect("checked before"),
            },
            lanes: lanes(from).expect("checked before"),
            snapshots: SnapshotsConfig {
                interval: from.duration("snapshots.interval"),
                keep_last: usize::try_from(from.integer("snapshots.keep_last")).expect(IN_RANGE),
                keep_hourly: usize::try_from(from.integer("snapshots.keep_hourly")).expect(IN_RANGE),
                keep_daily: usize::try_from(from.integer("snapshots.keep_daily")).expect(IN_RANGE),
                before: from.text("snapshots.before").map(str::to_owned),
                after: from.text("snapshots.after").map(str::to_owned),
            },
            lease: LeaseConfig {
                required: from.text("lease.mode") == Some("required"),
                ttl: from.duration("lease.ttl"),
            },
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
            scrub: scrub(from),
            clones: ClonesConfig { capacity_bytes: from.bytes("clones.capacity") },
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

const IN_RANGE: &str = "the table's range is smaller";

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
        levels: Levels {
            warn_millionths: from.millionths("pool.warn_at"),
            stop_millionths: from.millionths("pool.stop_at"),
        },
        drain_bytes_per_s: from.bytes("pool.drain_rate"),
    }
}

fn staging(from: &Effective) -> StagingConfig {
    StagingConfig { path: required(from.path("staging.path")), capacity_bytes: from.bytes("staging.capacity") }
}

fn scrub(from: &Effective) -> ScrubConfig {
    ScrubConfig {
        interval: from.duration("scrub.interval"),
        bytes_per_s: Some(from.bytes("scrub.rate")).filter(|bytes| *bytes > 0),
    }
}

fn link(from: &Effective) -> LinkConfig {
    LinkConfig {
        heartbeat: from.duration("link.heartbeat"),
        timeout: from.duration("link.timeout"),
        window_bytes: from.bytes("link.window"),
        reconnect_max: from.duration("link.reconnect_max"),
        ack_deadline: from.duration("link.ack_deadline"),
        // No row of the backup's.
        throttle_bytes_per_s: match from.value("link.throttle") {
            Some((Value::Bytes(bytes), _)) => Some(*bytes).filter(|bytes| *bytes > 0),
            _ => None,
        },
    }
}

/// Also what has contradictions, so that they can be found.
pub(super) fn policy(from: &Effective) -> PolicyConfig {
    PolicyConfig::from_values(|path| from.value(path).map(|(value, _)| value.clone()))
}

/// Also what is wrong with them.
pub(super) fn lanes(from: &Effective) -> Result<Lanes, Vec<LaneProblem>> {
    Lanes::parse(from.list("lanes.classes"), from.list("lanes.clients"), from.text("lanes.default"))
}

fn limits(from: &Effective) -> LimitsConfig {
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
