//! What a service tells about itself: the log on standard error, and the metrics behind `/metrics`.
//!
//! Metrics observe, they never decide. Labels are bounded: by the volumes that exist, by the methods of our services, by
//! a fixed set of words. Times are in seconds, sizes in bytes, counters end in `_total`.

use std::{io, path::Path, time::SystemTime};

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder, core::Collector, process_collector::ProcessCollector,
};
use thiserror::Error;
use tracing_subscriber::EnvFilter;

use crate::config::LogConfig;

/// Content type of [`Telemetry::encode`].
pub const TEXT_FORMAT: &str = prometheus::TEXT_FORMAT;

/// Acknowledgements, syncs and calls: 50 us to 10 s.
const LATENCY_SECONDS: &[f64] = &[
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
/// Checkpoints: 1 ms to 5 min.
const WORK_SECONDS: &[f64] = &[0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// The log could not be set up.
#[derive(Debug, Error)]
pub enum LogError {
    /// `[log] level` is not a level or a list of directives.
    #[error(
        "log.level = {level:?} is not understood ({source}); write error, warn, info, debug, trace, or directives as h2=warn,info"
    )]
    Level {
        /// As configured.
        level: String,
        /// Why.
        source: tracing_subscriber::filter::ParseError,
    },
    /// Another subscriber is in place.
    #[error("the log was set up twice")]
    Twice,
}

/// Sends `tracing` to standard error, as lines for people or as JSON.
pub fn init_log(config: &LogConfig) -> Result<(), LogError> {
    let filter =
        EnvFilter::try_new(&config.level).map_err(|source| LogError::Level { level: config.level.clone(), source })?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let done = if config.json { log.json().flatten_event(true).try_init() } else { log.with_ansi(false).try_init() };
    done.map_err(|_| LogError::Twice)
}

/// Our metrics (prefix `understudy_`) and those of the process (`process_`).
#[derive(Debug, Clone)]
pub struct Telemetry {
    registry: Registry,
    process: Registry,
}

impl Telemetry {
    /// With build info (`understudy_build_info{role, version} 1`) and process metrics.
    #[must_use]
    pub fn new(role: &'static str) -> Self {
        let registry = Registry::new_custom(Some("understudy".into()), None).expect("the prefix is a metric's name");
        let process = Registry::new();
        process.register(Box::new(ProcessCollector::for_self())).expect("the registry is empty");
        let telemetry = Self { registry, process };
        let info = telemetry.int_gauge_vec("build_info", "1; the labels name role and version.", &["role", "version"]);
        info.with_label_values(&[role, env!("CARGO_PKG_VERSION")]).set(1);
        telemetry
    }

    /// The text format of Prometheus.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = Vec::new();
        for families in [self.registry.gather(), self.process.gather()] {
            TextEncoder::new().encode(&families, &mut text).expect("a vector takes every write");
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// A counter without labels. Panics when `name` exists: names are constants of the program.
    #[must_use]
    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::new(name, help))
    }

    /// A counter by `labels`.
    #[must_use]
    pub fn counter_vec(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(Opts::new(name, help), labels))
    }

    /// A gauge of whole numbers.
    #[must_use]
    pub fn int_gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::new(name, help))
    }

    /// A gauge of whole numbers by `labels`.
    #[must_use]
    pub fn int_gauge_vec(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.register(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    /// A gauge.
    #[must_use]
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::new(name, help))
    }

    /// A gauge by `labels`.
    #[must_use]
    pub fn gauge_vec(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.register(GaugeVec::new(Opts::new(name, help), labels))
    }

    /// A histogram of seconds.
    #[must_use]
    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.register(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }

    /// A histogram of seconds by `labels`.
    #[must_use]
    pub fn histogram_vec(&self, name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> HistogramVec {
        self.register(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
    }

    fn register<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let metric = made.expect("names and labels are constants that Prometheus allows");
        self.registry.register(Box::new(metric.clone())).expect("each name is registered once");
        metric
    }
}

/// The metrics of both services. Those of a service that has no use for them stay at zero.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Acknowledged writes, discards and zeroes.
    pub writes: IntCounter,
    /// Their bytes.
    pub write_bytes: IntCounter,
    /// From the request to its acknowledgement; label `mode` (`continuous`, `delta`).
    pub write_ack_seconds: HistogramVec,
    /// Journal from the oldest retained record to the head.
    pub staging_span_bytes: IntGauge,
    /// Largest size of the journal.
    pub staging_capacity_bytes: IntGauge,
    /// Bytes a second that enter the journal.
    pub staging_usage_bytes_per_second: Gauge,
    /// Bytes a second that the backup acknowledges.
    pub staging_flush_bytes_per_second: Gauge,
    /// Bytes sent to the backup; label `kind` (`continuous`, `delta`).
    pub replication_sent_bytes: IntCounterVec,
    /// Records the backup has not acknowledged.
    pub replication_lag_records: IntGauge,
    /// From sending a record to its acknowledgement.
    pub replication_ack_seconds: Histogram,
    /// Age of the recovery point; 0 when nothing acknowledged is missing on the backup.
    pub recovery_point_age_seconds: Gauge,
    /// The same by lane, where there are several; label `lane`.
    pub lane_recovery_point_age_seconds: GaugeVec,
    /// Payload that the backup does not hold; label `lane`, where there are several.
    pub lane_retained_bytes: IntGaugeVec,
    /// 1 while a session is attached.
    pub link_up: IntGauge,
    /// Round trip of the last heartbeat.
    pub link_rtt_seconds: Gauge,
    /// Of a primary under `[lease] mode = "required"`.
    pub lease_remaining_seconds: Gauge,
    /// Bytes of the pool; label `state` (`free`, `reserved`, `used`).
    pub pool_bytes: IntGaugeVec,
    /// Writable clones that the backup serves.
    pub clones: IntGauge,
    /// Bytes of blocks that were written to them.
    pub clone_bytes: IntGauge,
    /// Sizes of all volumes.
    pub pool_promised_bytes: IntGauge,
    /// Blocks whose checksum was wrong: found (`repaired` is `false`), and mended or overwritten since (`true`).
    pub checksum_errors: IntCounterVec,
    /// Unix time at which the last scrub of everything was completed; 0: never.
    pub scrub_last_completed_timestamp_seconds: IntGauge,
    /// Group commits of the journal.
    pub journal_sync_seconds: Histogram,
    /// Checkpoints.
    pub checkpoint_seconds: Histogram,
    /// 1 for the mode a volume is in, 0 for the others; labels `volume`, `mode`.
    pub mode: IntGaugeVec,
    /// Switches between modes; labels `from`, `to`, `cause` (of a return, the kind of the last run).
    pub mode_transitions: IntCounterVec,
    /// Blocks marked in the delta tables; label `volume`.
    pub delta_dirty_blocks: IntGaugeVec,
    /// Runs that ended; label `result` (`committed`, `aborted`).
    pub delta_runs: IntCounterVec,
    /// From the cut of a run to its end.
    pub delta_run_seconds: Histogram,
    /// What ended runs moved; label `kind` (`sent`, `skipped`, `zero`).
    pub delta_bytes: IntCounterVec,
    /// CR / DR of the group with the largest; 0 where nothing is retained.
    pub redundancy_ratio: Gauge,
    /// Acknowledged bytes that the backup does not hold yet.
    pub bytes_at_risk: IntGauge,
    /// Calls that ended; labels `service`, `method`, `code`.
    pub grpc_requests: IntCounterVec,
    /// From the head of a call to its end; labels `service`, `method`.
    pub grpc_request_seconds: HistogramVec,
    /// Events that may be missing in the data directory.
    pub events_unwritten: IntCounter,
    /// Unix time at which the certificate of the listeners ends.
    pub tls_certificate_expiry_timestamp_seconds: IntGauge,
}

impl Metrics {
    /// Registers all of them.
    #[must_use]
    pub fn new(telemetry: &Telemetry) -> Self {
        let t = telemetry;
        Self {
            writes: t.counter("writes_total", "Acknowledged writes, discards and zeroes."),
            write_bytes: t.counter("write_bytes_total", "Bytes of acknowledged writes, discards and zeroes."),
            write_ack_seconds: t.histogram_vec(
                "write_ack_seconds",
                "Time from a write to its acknowledgement.",
                LATENCY_SECONDS,
                &["mode"],
            ),
            staging_span_bytes: t
                .int_gauge("staging_span_bytes", "Journal bytes from the oldest retained record to the head."),
            staging_capacity_bytes: t.int_gauge("staging_capacity_bytes", "Largest size of the journal."),
            staging_usage_bytes_per_second: t
                .gauge("staging_usage_bytes_per_second", "Bytes a second that enter the journal."),
            staging_flush_bytes_per_second: t
                .gauge("staging_flush_bytes_per_second", "Bytes a second that the backup acknowledges."),
            replication_sent_bytes: t.counter_vec(
                "replication_sent_bytes_total",
                "Bytes sent to the backup.",
                &["kind"],
            ),
            replication_lag_records: t
                .int_gauge("replication_lag_records", "Records that the backup has not acknowledged."),
            replication_ack_seconds: t.histogram(
                "replication_ack_seconds",
                "Time from sending a record to its acknowledgement.",
                LATENCY_SECONDS,
            ),
            recovery_point_age_seconds: t.gauge(
                "recovery_point_age_seconds",
                "Age of the recovery point; 0 when the backup misses nothing acknowledged.",
            ),
            lane_recovery_point_age_seconds: t.gauge_vec(
                "lane_recovery_point_age_seconds",
                "Age of the recovery point of a lane, where there are several.",
                &["lane"],
            ),
            lane_retained_bytes: t.int_gauge_vec(
                "lane_retained_bytes",
                "Payload of a lane that the backup does not hold, where there are several.",
                &["lane"],
            ),
            link_up: t.int_gauge("link_up", "1 while a replication session is attached."),
            link_rtt_seconds: t.gauge("link_rtt_seconds", "Round trip of the last heartbeat."),
            lease_remaining_seconds: t.gauge("lease_remaining_seconds", "What is left of the lease; 0 without one."),
            pool_promised_bytes: t
                .int_gauge("pool_promised_bytes", "Sizes of all volumes: what the pool has promised."),
            pool_bytes: t.int_gauge_vec("pool_bytes", "Bytes of the pool by state.", &["state"]),
            clones: t.int_gauge("clones", "Writable clones that the backup serves."),
            clone_bytes: t.int_gauge("clone_bytes", "Bytes of blocks that were written to clones."),
            checksum_errors: t.counter_vec(
                "checksum_errors_total",
                "Blocks whose checksum was wrong: found (false), and mended since (true).",
                &["repaired"],
            ),
            scrub_last_completed_timestamp_seconds: t.int_gauge(
                "scrub_last_completed_timestamp_seconds",
                "Unix time at which the last scrub of everything was completed; 0: never.",
            ),
            journal_sync_seconds: t.histogram("journal_sync_seconds", "Group commits of the journal.", LATENCY_SECONDS),
            checkpoint_seconds: t.histogram("checkpoint_seconds", "Duration of checkpoints.", WORK_SECONDS),
            mode: t.int_gauge_vec("mode", "1 for the mode that a volume is in.", &["volume", "mode"]),
            mode_transitions: t.counter_vec(
                "mode_transitions_total",
                "Switches between modes.",
                &["from", "to", "cause"],
            ),
            delta_dirty_blocks: t.int_gauge_vec(
                "delta_dirty_blocks",
                "Blocks marked in the delta tables.",
                &["volume"],
            ),
            delta_runs: t.counter_vec("delta_runs_total", "Runs that ended.", &["result"]),
            delta_run_seconds: t.histogram("delta_run_seconds", "From the cut of a run to its end.", WORK_SECONDS),
            delta_bytes: t.counter_vec("delta_bytes_total", "What ended runs moved.", &["kind"]),
            redundancy_ratio: t.gauge("redundancy_ratio", "Largest CR / DR of a group; 0 with nothing retained."),
            bytes_at_risk: t.int_gauge("bytes_at_risk", "Acknowledged bytes that the backup does not hold yet."),
            grpc_requests: t.counter_vec(
                "grpc_requests_total",
                "Calls that ended, by canonical code.",
                &["service", "method", "code"],
            ),
            grpc_request_seconds: t.histogram_vec(
                "grpc_request_seconds",
                "Time from the head of a call to its end.",
                LATENCY_SECONDS,
                &["service", "method"],
            ),
            events_unwritten: t.counter("events_unwritten_total", "Events that may be missing in the data directory."),
            tls_certificate_expiry_timestamp_seconds: t.int_gauge(
                "tls_certificate_expiry_timestamp_seconds",
                "Unix time at which the certificate of the listeners ends; 0 without TLS.",
            ),
        }
    }

    /// Shows `volume` in `mode`, one of `continuous` and `delta`.
    pub fn set_mode(&self, volume: &str, mode: &str) {
        for known in ["continuous", "delta"] {
            self.mode.with_label_values(&[volume, known]).set(i64::from(known == mode));
        }
    }

    /// Forgets a volume that was deleted.
    pub fn forget_volume(&self, volume: &str) {
        for known in ["continuous", "delta"] {
            // An error says that it was never shown.
            let _ = self.mode.remove_label_values(&[volume, known]);
        }
        let _ = self.delta_dirty_blocks.remove_label_values(&[volume]);
    }

    /// Shows when a certificate ends.
    pub fn set_certificate_expiry(&self, expiry: SystemTime) {
        let seconds = expiry.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.tls_certificate_expiry_timestamp_seconds.set(i64::try_from(seconds).unwrap_or(i64::MAX));
    }
}

/// Why a file of readiness could not be written.
#[derive(Debug, Error)]
#[error("cannot write the ready file {path}: {source}; check ready_file and its directory")]
pub struct ReadyFileError {
    path: String,
    source: io::Error,
}

/// Writes `contents` to `path` so that a reader sees all of it or nothing: written aside, then renamed.
pub fn write_ready_file(path: &Path, contents: &serde_json::Value) -> Result<(), ReadyFileError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}", std::process::id()));
    std::fs::write(&aside, format!("{contents}\n"))
        .and_then(|()| std::fs::rename(&aside, path))
        .map_err(|source| ReadyFileError { path: path.display().to_string(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_have_the_prefix_and_the_process_has_its_own() {
        let telemetry = Telemetry::new("primary");
        let metrics = Metrics::new(&telemetry);
        metrics.writes.inc();
        metrics.set_mode("db", "continuous");
        metrics.pool_bytes.with_label_values(&["free"]).set(5);
        metrics.journal_sync_seconds.observe(0.0002);
        let text = telemetry.encode();
        for line in [
            "understudy_build_info{role=\"primary\",version=\"0.1.0\"} 1",
            "understudy_writes_total 1",
            "understudy_mode{mode=\"continuous\",volume=\"db\"} 1",
            "understudy_mode{mode=\"delta\",volume=\"db\"} 0",
            "understudy_pool_bytes{state=\"free\"} 5",
            "understudy_journal_sync_seconds_bucket{le=\"0.00025\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
        assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
        metrics.forget_volume("db");
        assert!(!telemetry.encode().contains("volume=\"db\""));
    }

    #[test]
    fn the_ready_file_appears_whole() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ready");
        let contents = serde_json::json!({"grpc": "127.0.0.1:1", "replica": null});
        write_ready_file(&file, &contents).unwrap();
        let read: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(read, contents);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_ready_file(&folder.path().join("absent/ready"), &contents).is_err());
    }
}
