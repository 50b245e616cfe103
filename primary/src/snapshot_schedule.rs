//! Scheduled snapshots: when one is due, which ones are kept, and the hooks around each.
//!
//! What is due and what goes is a pure function of the time and of the snapshots there are ([`plan`]), so a restart
//! changes nothing. Only snapshots whose names begin with [`PREFIX`] are touched.

use std::{collections::BTreeSet, process::Stdio, time::Duration};

use tokio::{
    process::Command,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use understudy_common::{config::SnapshotsConfig, units::civil};

use crate::{api::BlockEngine, engine::unix_ms};

/// In front of the names of scheduled snapshots.
pub const PREFIX: &str = "auto-";
/// How often it is looked.
const TICK: Duration = Duration::from_secs(1);
/// Longest time of a hook.
const HOOK: Duration = Duration::from_secs(60);
const HOUR_MS: i64 = 3_600_000;

/// A scheduled snapshot: its name, and when it was taken, Unix milliseconds.
pub type Taken = (String, i64);

/// What is to be done with the snapshots of one group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// One is due: its name.
    pub take: Option<String>,
    /// These go.
    pub delete: Vec<String>,
}

/// What is due at `now_unix_ms`, and which of `taken` are neither one of the newest nor the newest of an hour or a day
/// that is to be kept.
#[must_use]
pub fn plan(config: &SnapshotsConfig, taken: &[Taken], now_unix_ms: i64) -> Plan {
    let mut taken: Vec<&Taken> = taken.iter().collect();
    taken.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
    let every = i64::try_from(config.interval.as_millis()).unwrap_or(i64::MAX);
    let due = every > 0 && taken.first().is_none_or(|(_, time)| now_unix_ms.saturating_sub(*time) >= every);
    let mut keep: BTreeSet<&str> = taken.iter().take(config.keep_last).map(|(name, _)| name.as_str()).collect();
    for (length, count) in [(HOUR_MS, config.keep_hourly), (24 * HOUR_MS, config.keep_daily)] {
        let mut periods = BTreeSet::new();
        for (name, time) in &taken {
            let period = time.div_euclid(length);
            if periods.len() < count && periods.insert(period) {
                keep.insert(name);
            }
        }
    }
    let delete = taken.iter().map(|(name, _)| name).filter(|name| !keep.contains(name.as_str())).cloned().collect();
    Plan { take: due.then(|| name(now_unix_ms)), delete }
}

/// As `auto-20261124t150405z`.
fn name(unix_ms: i64) -> String {
    let seconds = u64::try_from(unix_ms / 1000).unwrap_or_default();
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds % 86_400 / 3600, seconds / 60 % 60, seconds % 60);
    format!("{PREFIX}{year:04}{month:02}{day:02}t{hour:02}{minute:02}{second:02}z")
}

/// Keeps every group's snapshots as configured, until `stop`.
pub async fn run<E: BlockEngine>(engine: E, config: SnapshotsConfig, stop: CancellationToken) {
    if config.interval.is_zero() {
        return;
    }
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let groups: BTreeSet<String> = engine.volumes().into_iter().map(|spec| spec.group_name).collect();
        for group in groups {
            // Whatever fails is tried again with the next tick.
            if let Err(why) = turn(&engine, &config, &group).await {
                warn!(group, why, "scheduled snapshots");
            }
        }
    }
}

async fn turn<E: BlockEngine>(engine: &E, config: &SnapshotsConfig, group: &str) -> Result<(), String> {
    let mut taken: Vec<Taken> = engine.snapshot_times(group).map_err(|error| error.to_string())?;
    taken.retain(|(name, _)| name.starts_with(PREFIX));
    if let Some(name) = plan(config, &taken, unix_ms()).take {
        hook(config.before.as_deref(), group, &name).await?;
        let result = engine.take_snapshot(group, &name).await;
        // Whatever was frozen before must be thawed.
        hook(config.after.as_deref(), group, &name).await?;
        taken.push((name, result.map_err(|error| error.to_string())?.time_unix_ms));
    }
    for name in plan(config, &taken, unix_ms()).delete {
        engine.delete_snapshot(group, &name).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

async fn hook(command: Option<&str>, group: &str, snapshot: &str) -> Result<(), String> {
    let Some(command) = command else { return Ok(()) };
    let mut child = Command::new("sh");
    child.args(["-c", command]).env("UNDERSTUDY_GROUP", group).env("UNDERSTUDY_SNAPSHOT", snapshot);
    child.stdin(Stdio::null()).kill_on_drop(true);
    match timeout(HOOK, child.status()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("{command:?} ended with {status}")),
        Ok(Err(error)) => Err(format!("{command:?} cannot be started: {error}")),
        Err(_) => Err(format!("{command:?} was ended after {HOOK:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(keep_last: usize, keep_hourly: usize, keep_daily: usize) -> SnapshotsConfig {
        let interval = Duration::from_secs(600);
        SnapshotsConfig { interval, keep_last, keep_hourly, keep_daily, before: None, after: None }
    }

    #[test]
    fn names_are_times() {
        assert_eq!(name(1_795_532_645_000), "auto-20261124t150405z");
    }

    #[test]
    fn one_is_due_when_the_newest_is_old_enough() {
        let config = config(9, 0, 0);
        assert!(plan(&config, &[], 5).take.is_some());
        let taken = [("a".to_owned(), 1_000_000), ("b".to_owned(), 0)];
        assert_eq!(plan(&config, &taken, 1_599_999).take, None);
        assert!(plan(&config, &taken, 1_600_000).take.is_some());
        // A clock that was set back takes none before its time.
        assert_eq!(plan(&config, &taken, 0).take, None);
    }

    #[test]
    fn the_newest_of_each_hour_and_day_stay_and_the_last_ones() {
        // One every 10 minutes for three days.
        let taken: Vec<Taken> = (0..3 * 144).map(|n| (format!("s{n}"), n * 600_000)).collect();
        let now = 3 * 24 * HOUR_MS;
        let delete = plan(&config(3, 5, 2), &taken, now).delete;
        let kept: Vec<&str> =
            taken.iter().map(|(n, _)| n.as_str()).filter(|n| !delete.iter().any(|d| d == n)).collect();
        // Last of day 2 (s287); last of the hours before; the last three, of which one ends day 3 and its last hour.
        assert_eq!(kept, ["s287", "s407", "s413", "s419", "s425", "s429", "s430", "s431"]);
        assert_eq!(plan(&config(3, 5, 2), &[], now).delete, Vec::<String>::new());
    }
}
