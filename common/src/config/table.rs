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
    let (own_listeners, peer) = match service {
        Service::Primary => (PRIMARY_LISTENERS, PRIMARY_PEER),
        Service::Backup => (BACKUP_LISTENERS, BACKUP_PEER),
    };
    [GENERAL, own_listeners, peer, SHARED].concat()
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

const SHARED: &[Setting] = &[
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
    row("pool.cache", bytes(MIB, TIB), Is("16MiB"), "Memory for pages of segment maps"),
    row("staging.path", Kind::Path, InDataDir("journal"), "Directory of the journal"),
    row("staging.capacity", bytes(4 * MIB, 1024 * TIB), Is("1GiB"), "Largest size of the journal"),
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
