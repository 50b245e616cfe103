//! How full the pool is, and what is done about it: a warning, and a level beyond which clients get no new segments.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Change, Front, Levels, MILLION, Store};
use crate::{
    events::EventLog,
    pool::{DeviceInfo, DeviceStanding, Space},
    types::{BlockRange, VolumeId},
    units::format_bytes,
};

/// How often the level is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// By so much the used share must fall below the level before the warning is given again.
const HYSTERESIS_MILLIONTHS: u32 = 20_000;

/// Bytes of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolBytes {
    /// What it has, with what its files may still grow by; without what is free on devices that are drained.
    pub size: u64,
    /// Of which blocks, journal records and what waits to be reused take so much.
    pub used: u64,
    /// Sizes of all volumes.
    pub promised: u64,
}

/// A write of a client that found the pool in use beyond its level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{used_bytes} of the pool's {size_bytes} bytes are in use, and pool.stop_at ends new allocations at {stop_bytes}: \
     discard or delete data or snapshots, add a device, or raise pool.stop_at"
)]
pub struct OverLevel {
    /// With what the write would take.
    pub used_bytes: u64,
    /// Of the pool.
    pub size_bytes: u64,
    /// The level.
    pub stop_bytes: u64,
}

/// The warning, given once for each crossing.
#[derive(Debug, Default)]
struct Warning {
    given: bool,
}

impl Warning {
    /// `Some(true)`: to be given. `Some(false)`: to be taken back.
    fn on_share(&mut self, share_millionths: u32, levels: &Levels) -> Option<bool> {
        let above = share_millionths >= levels.warn_millionths;
        let below = share_millionths.saturating_add(HYSTERESIS_MILLIONTHS) <= levels.warn_millionths;
        if !self.given && above || self.given && below {
            self.given = above;
            return Some(above);
        }
        None
    }
}

/// Segments that it has, with what it may grow by, and those in use.
fn size_and_used(space: &Space) -> (u64, u64) {
    let there = space.total().saturating_sub(space.retired());
    (there.saturating_add(space.can_grow()), there.saturating_sub(space.free()))
}

fn share_millionths(part: u64, whole: u64) -> u32 {
    let share = u128::from(part) * u128::from(MILLION) / u128::from(whole.max(1));
    u32::try_from(share).unwrap_or(u32::MAX)
}

impl Store {
    /// How full the pool is.
    #[must_use]
    pub fn pool_bytes(&self) -> PoolBytes {
        let segment = u64::from(self.config.pool.segment_bytes);
        let (size, used) = size_and_used(&self.space);
        let promised = self.front.lock().state.volumes.values().map(|spec| spec.size_bytes).sum();
        PoolBytes { size: size.saturating_mul(segment), used: used.saturating_mul(segment), promised }
    }

    /// Refuses a client's write that needs new segments when more of the pool would be in use than `pool.stop_at` says.
    pub(super) fn check_level(
        &self,
        front: &Front,
        volume: VolumeId,
        first: u64,
        change: &Change,
    ) -> Result<(), OverLevel> {
        let stop = self.config.levels.stop_millionths;
        let (Change::Write { crcs, .. }, true) = (change, stop < MILLION) else { return Ok(()) };
        let (range, spec) = (BlockRange { volume, first, count: crcs.len() as u64 }, front.state.volumes.get(&volume));
        // What is wrong with the request is told by admission.
        let valid = first.checked_add(range.count).filter(|_| range.count > 0);
        let Some((spec, end)) = spec.zip(valid).filter(|(spec, end)| *end <= spec.block_count()) else { return Ok(()) };
        let per_segment = u64::from(spec.blocks_per_segment());
        let worst = (end - 1) / per_segment - first / per_segment + 1;
        let (size, used) = size_and_used(&self.space);
        let wanted = used.saturating_add(self.space.reserved()).saturating_add(worst);
        let limit = u64::try_from(u128::from(size) * u128::from(stop) / u128::from(MILLION)).unwrap_or(u64::MAX);
        if wanted <= limit {
            return Ok(());
        }
        let pending = front.overlay.touches(range, per_segment);
        if front.queue_hazards == 0 && self.pool.lock().fits(range, pending).unwrap_or(false) {
            return Ok(());
        }
        let segment = u64::from(self.config.pool.segment_bytes);
        let bytes = |segments: u64| segments.saturating_mul(segment);
        Err(OverLevel { used_bytes: bytes(wanted), size_bytes: bytes(size), stop_bytes: bytes(limit) })
    }

    /// Tells, until `stop`, when the pool is fuller than `pool.warn_at`, and when devices come and go.
    pub async fn watch_pool(self: Arc<Self>, events: EventLog, now_unix_ms: fn() -> i64, stop: CancellationToken) {
        let mut warning = Warning::default();
        let mut devices = self.devices();
        while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
            let bytes = self.pool_bytes();
            let share = share_millionths(bytes.used, bytes.size);
            if let Some(full) = warning.on_share(share, &self.config.levels) {
                let (used, size) = (format_bytes(bytes.used), format_bytes(bytes.size));
                let kind = if full { "pool.low" } else { "pool.relieved" };
                if full {
                    warn!(%used, %size, "pool.low: the pool runs short of space; discard or delete data or snapshots, or add a device");
                } else {
                    info!(%used, %size, "pool.relieved: the pool has space again");
                }
                let message = format!("{used} of {size} of the pool are in use");
                let fields = [
                    ("used_bytes", bytes.used.to_string()),
                    ("size_bytes", bytes.size.to_string()),
                    ("promised_bytes", bytes.promised.to_string()),
                    ("warn_at", (f64::from(self.config.levels.warn_millionths) / 1e6).to_string()),
                ];
                events.record(now_unix_ms(), kind, message, fields);
            }
            let now = self.devices();
            for device in &now {
                let before = devices.get(usize::from(device.number)).map(|before| before.standing);
                note_device(&events, now_unix_ms(), device, before);
            }
            devices = now;
        }
    }
}

fn note_device(events: &EventLog, now_unix_ms: i64, device: &DeviceInfo, before: Option<DeviceStanding>) {
    let kind = match device.standing {
        standing if before == Some(standing) => return,
        DeviceStanding::Serving if before == Some(DeviceStanding::Returning) => "pool.device_returned",
        DeviceStanding::Serving => "pool.device_added",
        DeviceStanding::Draining => "pool.device_draining",
        DeviceStanding::Removed => "pool.device_removed",
        DeviceStanding::Joining | DeviceStanding::Returning | DeviceStanding::Removing => return,
    };
    let fields = [("device", device.number.to_string()), ("path", device.path.clone())];
    events.record(now_unix_ms, kind, format!("device {} of the pool", device.path), fields);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_warning_is_given_once_for_each_crossing() {
        let levels = Levels { warn_millionths: 800_000, stop_millionths: MILLION };
        let mut warning = Warning::default();
        let told: Vec<_> = [0, 799_999, 800_000, 900_000, 790_000, 800_000, 780_001, 780_000, 100, 800_001]
            .into_iter()
            .map(|share| warning.on_share(share, &levels))
            .collect();
        let mut want = vec![None; 10];
        (want[2], want[7], want[9]) = (Some(true), Some(false), Some(true));
        assert_eq!(told, want);
    }

    #[test]
    fn shares_are_of_any_size() {
        assert_eq!(share_millionths(0, 0), 0);
        assert_eq!(share_millionths(1, 4), 250_000);
        assert_eq!(share_millionths(u64::MAX, u64::MAX), MILLION);
    }
}
