//! The settings of each service. Flags, variables, the file, help, checks and defaults all come from these rows.

use std::time::Duration;

use super::{
    Service,
    setting::{Kind, Preset, Setting},
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

const fn row(path: &'static str, kind: Kind, preset: Preset, help: &'static str) -> Setting {
    Setting { path, kind, preset, help }
}

const fn bytes(min: u64, max: u64) -> Kind {
    Kind::Bytes { min, max }
}

const fn millis(min: u64, max: u64) -> Kind {
    Kind::Duration { min: Duration::from_millis(min), max: Duration::from_millis(max) }
}

const fn count(min: u64, max: u64) -> Kind {
    Kind::Integer { min, max }
}

use Preset::{InDataDir, Is, Required, Unset};

/// The settings of `service`, in the order of help and of `--check-config`.
#[must_use]
pub fn settings(service: Service) -> Vec<Setting> {
    match service {
        Service::Primary => [
            GENERAL,
            PRIMARY_LISTENERS,
            PRIMARY_PEER,
            STORE,
            SCRUB,
            LINK,
            LINK_POLICY,
            LINK_THROTTLE,
            POLICY,
            POLICY_LOG,
            DELTA_POLICY,
            DELTA,
            LANES,
            SNAPSHOTS,
            LEASE,
            SERVING,
        ]
        .concat(),
        Service::Backup => [GENERAL, BACKUP_LISTENERS, BACKUP_PEER, STORE, SCRUB, CLONES, LINK, SERVING].concat(),
    }
}

/// The settings that the mode policy is made of.
#[must_use]
pub fn policy_settings() -> Vec<Setting> {
    let timeout: Vec<Setting> = LINK.iter().filter(|setting| setting.path == "link.timeout").copied().collect();
    [&timeout[..], LINK_POLICY, LINK_THROTTLE, POLICY, DELTA_POLICY].concat()
}

const GENERAL: &[Setting] = &[
    row("data_dir", Kind::Path, Required, "Directory of everything durable; made if absent, locked while in use"),
    row("ready_file", Kind::Path, Unset, "File that gets the bound addresses as JSON once the service is ready"),
];

const PRIMARY_LISTENERS: &[Setting] = &[
    row("listen", Kind::SocketAddr, Is("127.0.0.1:7400"), "Where clients and operators are served over gRPC"),
    row("admin_listen", Kind::SocketAddr, Is("127.0.0.1:7401"), "Where metrics, health and the status page are served"),
];

const BACKUP_LISTENERS: &[Setting] = &[
    row("listen", Kind::SocketAddr, Is("127.0.0.1:7500"), "Where operators and readers are served over gRPC"),
    row("admin_listen", Kind::SocketAddr, Is("127.0.0.1:7501"), "Where metrics, health and the status page are served"),
];

const PRIMARY_PEER: &[Setting] =
    &[row("backup.url", Kind::Url, Unset, "The backup's replication listener; without it nothing is replicated")];

const BACKUP_PEER: &[Setting] = &[row(
    "replica.listen",
    Kind::SocketAddr,
    Unset,
    "Where the primary is served; without it the primary is served on `listen`",
)];

const STORE: &[Setting] = &[
    row(
        "pool.devices",
        Kind::List,
        Unset,
        "Files or block devices of the pool, each PATH or PATH=SIZE; without it one file in data_dir that grows",
    ),
    row(
        "pool.segment",
        bytes(4 * KIB, 8 * MIB),
        Is("64KiB"),
        "Unit of physical allocation of new volumes; a power of two",
    ),
    row("pool.max", bytes(MIB, 1024 * TIB), Is("1TiB"), "Largest size of the file that grows"),
    row(
        "pool.warn_at",
        Kind::Float { min: 0.0, max: 1.0 },
        Is("0.8"),
        "Share of the pool in use from which on it is said that space runs short",
    ),
    row(
        "pool.stop_at",
        Kind::Float { min: 0.01, max: 1.0 },
        Is("1"),
        "Share of the pool in use beyond which clients get no new segments; 1: until none is left",
    ),
    row(
        "pool.drain_rate",
        bytes(0, 1024 * GIB),
        Is("64MiB"),
        "Bytes a second that are moved off a device that is drained; 0: no limit",
    ),
    row("pool.cache", bytes(MIB, TIB), Is("16MiB"), "Memory for pages of segment maps"),
    row("staging.path", Kind::Path, InDataDir("journal"), "Directory of the journal"),
    row("staging.capacity", bytes(4 * MIB, 1024 * TIB), Is("1GiB"), "Largest size of the journal"),
];

const SCRUB: &[Setting] = &[
    row(
        "scrub.interval",
        millis(0, 366 * 86_400_000),
        Is("7d"),
        "Every stored block is read back and compared with its checksum so often; 0: only when it is asked for",
    ),
    row("scrub.rate", bytes(0, 1024 * GIB), Is("16MiB"), "Bytes a second that a scrub reads; 0: no limit"),
];

const CLONES: &[Setting] = &[row(
    "clones.capacity",
    bytes(MIB, 1024 * TIB),
    Is("4GiB"),
    "Bytes of blocks that were written to clones, of all of them together",
)];

const LINK: &[Setting] = &[
    row("link.heartbeat", millis(10, 60_000), Is("500ms"), "Time between two heartbeats"),
    row("link.timeout", millis(50, 600_000), Is("2s"), "The link is lost when nothing was heard for this long"),
    row("link.window", bytes(64 * KIB, 4 * GIB), Is("16MiB"), "Bytes in flight to the backup"),
    row("link.reconnect_max", millis(50, 600_000), Is("5s"), "Longest pause between two attempts to connect"),
    row(
        "link.ack_deadline",
        millis(100, 3_600_000),
        Is("10s"),
        "A record sent and not acknowledged for this long breaks the session",
    ),
];

const LINK_POLICY: &[Setting] = &[
    row(
        "link.settle",
        millis(0, 3_600_000),
        Is("2s"),
        "A link that came back is healthy when it was up for this long; also the pause before a failed run is repeated",
    ),
    row(
        "link.ack_delay_max",
        millis(10, 3_600_000),
        Is("5s"),
        "link_slow: leave continuous mode when a record sent was not acknowledged for this long",
    ),
    row(
        "link.ack_delay_leave",
        millis(1, 3_600_000),
        Is("1s"),
        "link_slow: the link is fast again when probes are answered within this for link.settle",
    ),
];

const LINK_THROTTLE: &[Setting] =
    &[row("link.throttle", bytes(0, 1024 * GIB), Is("0"), "Bytes a second of continuous replication; 0: no limit")];

const POLICY: &[Setting] = &[
    row(
        "policy.criteria",
        Kind::List,
        Is("operator,link_down,backup_refused,fill,imbalance,link_slow,cannot_converge,redundancy"),
        "What may move a group out of continuous mode; none: nothing but a first synchronisation",
    ),
    row("policy.weigh_interval", millis(10, 60_000), Is("500ms"), "Time between two weighings of a group"),
    row(
        "policy.overflow_horizon",
        millis(0, 3_600_000),
        Is("10s"),
        "imbalance: leave when the journal would be full sooner than this; 0: do not predict",
    ),
    row(
        "policy.imbalance_bytes_per_second",
        bytes(0, 1024 * GIB),
        Is("0"),
        "imbalance: leave when usage exceeds the flushing rate by more than this; 0: no such level",
    ),
    row(
        "policy.fill_enter",
        Kind::Float { min: 0.01, max: 0.99 },
        Is("0.9"),
        "fill: leave when what is not on the backup pins more of staging.capacity",
    ),
    row(
        "policy.fill_leave",
        Kind::Float { min: 0.0, max: 0.99 },
        Is("0.5"),
        "fill: return when what is not on the backup pins less of staging.capacity",
    ),
    row(
        "policy.redundancy_ratio",
        Kind::Float { min: 0.0, max: 1_000_000.0 },
        Is("3"),
        "redundancy: leave when continuous replication would send more than this many times what a run would",
    ),
    row(
        "policy.redundancy_floor",
        bytes(0, 1024 * TIB),
        Is("64MiB"),
        "redundancy: never below so many bytes of continuous replication",
    ),
    row(
        "policy.redundancy_min_interval",
        millis(0, 86_400_000),
        Is("1min"),
        "redundancy: time between the beginnings of two such runs",
    ),
    row(
        "policy.dwell",
        millis(0, 86_400_000),
        Is("30s"),
        "Causes of traffic leave when the link had headroom for this long; a return that failed makes the next wait it, too",
    ),
    row(
        "policy.dwell_max",
        millis(0, 86_400_000),
        Is("10min"),
        "What the wait grows to, doubled by each failed return",
    ),
];

const POLICY_LOG: &[Setting] = &[row(
    "policy.observation_log",
    bytes(0, TIB),
    Is("16MiB"),
    "Size of data_dir/observations.jsonl and the file before it, which `understudy policy simulate` replays; 0: none",
)];

const DELTA_POLICY: &[Setting] = &[
    row(
        "delta.schedule",
        Kind::Choice(&["periodic", "prompted", "idle"]),
        Is("periodic"),
        "When runs begin while a cause holds; when none does, the return begins by itself",
    ),
    row("delta.interval", millis(0, 30 * 86_400_000), Is("30min"), "periodic: time between the beginnings of two runs"),
    row("delta.idle_bytes_per_second", bytes(0, 1024 * GIB), Is("1MiB"), "idle: usage and link use that count as idle"),
    row("delta.idle_for", millis(0, 86_400_000), Is("30s"), "idle: how long both must have been idle"),
];

const DELTA: &[Setting] = &[row(
    "delta.throttle",
    Kind::Text,
    Is("adaptive"),
    "Speed of runs: adaptive gives way to clients, none does not, a size as 50MiB is bytes a second",
)];

const LANES: &[Setting] = &[
    row(
        "lanes.classes",
        Kind::List,
        Unset,
        "Lanes by number, each NAME=immediate or NAME=N/TIME (N records in each TIME), with @PERCENT of the journal",
    ),
    row("lanes.clients", Kind::List, Unset, "Whose writes go to which lane, each CLIENT=LANE or PREFIX*=LANE"),
    row("lanes.default", Kind::Text, Unset, "Lane of everybody else; without it the first"),
];

const SNAPSHOTS: &[Setting] = &[
    row(
        "snapshots.interval",
        millis(0, 366 * 86_400_000),
        Is("0s"),
        "Take a snapshot of every group this often, named auto-TIME; 0s: none",
    ),
    row("snapshots.keep_last", count(1, 200), Is("24"), "Scheduled snapshots of a group that are kept in any case"),
    row("snapshots.keep_hourly", count(0, 200), Is("0"), "Hours of which the newest scheduled snapshot is kept"),
    row("snapshots.keep_daily", count(0, 200), Is("7"), "Days (UTC) of which the newest scheduled snapshot is kept"),
    row(
        "snapshots.before",
        Kind::Text,
        Unset,
        "Shell command before each scheduled snapshot, as to freeze an application; if it fails none is taken",
    ),
    row("snapshots.after", Kind::Text, Unset, "Shell command after each scheduled snapshot, also when it has failed"),
];

const LEASE: &[Setting] = &[
    row(
        "lease.mode",
        Kind::Choice(&["off", "required"]),
        Is("off"),
        "required: serve only while somebody outside of the pair renews the lease with RenewLease",
    ),
    row("lease.ttl", millis(100, 3_600_000), Is("10s"), "How long the lease holds after each RenewLease"),
];

const SERVING: &[Setting] = &[
    row("limits.message", bytes(64 * KIB, 256 * MIB), Is("8MiB"), "Largest gRPC message, in both directions"),
    row("limits.connections", count(1, 65_536), Is("64"), "Open connections; more wait to be accepted"),
    row("limits.streams", count(1, 65_536), Is("64"), "Concurrent calls on one connection"),
    row("limits.in_flight", bytes(MIB, TIB), Is("256MiB"), "Bytes of unacknowledged writes of all clients together"),
    row(
        "limits.request_deadline",
        millis(100, 3_600_000),
        Is("30s"),
        "Longest duration of a call that is not a stream; longer deadlines of clients are cut to it",
    ),
    row(
        "limits.queue_wait",
        millis(0, 3_600_000),
        Is("5s"),
        "A write waits this long for its share of memory and journal, then it is refused",
    ),
    row(
        "checkpoint.bytes",
        bytes(MIB, 1024 * TIB),
        Is("256MiB"),
        "Journal bytes after which a checkpoint starts; bounds the time of recovery",
    ),
    row("shutdown.drain", millis(0, 3_600_000), Is("5s"), "Time that calls get to end after SIGTERM or SIGINT"),
    row("tls.certificate", Kind::Path, Unset, "PEM file with the certificate chain of every gRPC listener"),
    row("tls.key", Kind::Path, Unset, "PEM file with the private key of tls.certificate"),
    row(
        "tls.client_ca",
        Kind::Path,
        Unset,
        "PEM file with the authorities of clients; set, every client must show a certificate",
    ),
    row("tls.replica_ca", Kind::Path, Unset, "PEM file with the authorities of the other side of the pair"),
    row("tls.allow_plaintext", Kind::Bool, Is("false"), "Allow listeners without TLS on addresses other than loopback"),
    row("log.format", Kind::Choice(&["human", "json"]), Is("human"), "Form of the log on standard error"),
    row(
        "log.level",
        Kind::Text,
        Is("info"),
        "error, warn, info, debug, trace, or directives as understudy_primary=debug,h2=warn",
    ),
];
