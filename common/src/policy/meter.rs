//! What the link has shown it can take, and what is asked of it.

use serde::{Deserialize, Serialize};

use super::{LastRun, Observation, PolicyConfig, RunKind, config::ms};

/// A run of fewer bytes says more about its fixed costs than about the link.
pub(super) const MEASURE_FLOOR_BYTES: u64 = 4 << 20;

/// There is headroom while usage is at most 9/10 of the capacity.
const HEADROOM_TENTHS: u64 = 9;

/// Smoothed usage, and the capacity of the way to the backup's disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Meter {
    /// Exponential average of usage, and when it was brought up to date.
    usage: Option<(u64, u64)>,
    /// At least this many bytes a second go through.
    capacity: u64,
    /// The capacity was measured, and on this link: it is not just a lower bound.
    measured: bool,
    /// The stream is held to so many bytes a second, whatever the link takes; 0: to none.
    limit: u64,
}

impl Meter {
    /// Follows usage, over a quarter of the dwell.
    pub(super) fn on_observation(&mut self, config: &PolicyConfig, obs: &Observation) {
        self.limit = config.stream_bytes_per_second;
        let window_ms = (ms(config.dwell) / 4).max(1);
        let now = obs.now_ms;
        let Some((average, at)) = self.usage else {
            self.usage = Some((obs.usage_bytes_per_s, now));
            return;
        };
        let passed = u128::from(now.saturating_sub(at));
        let whole = (passed + u128::from(window_ms)).max(1);
        // average + (new - average) * passed / whole, without signs.
        let sum = u128::from(average) * (whole - passed) + u128::from(obs.usage_bytes_per_s) * passed;
        self.usage = Some((narrow(sum / whole), now));
    }

    /// A run ended. Its speed is counted in whole blocks, as usage is: what it compresses or elides makes the stream
    /// look faster than it is, and a return that comes of it may fail and be damped; the other way round it would not be
    /// tried. A full run, which finds most blocks equal, says nothing.
    pub(super) fn on_run(&mut self, run: &LastRun) {
        if !run.committed || run.bytes == 0 || run.kind == RunKind::Full {
            return;
        }
        let rate = narrow(u128::from(run.bytes) * 1000 / u128::from(run.duration_ms.max(1)));
        if run.bytes >= MEASURE_FLOOR_BYTES {
            (self.capacity, self.measured) = (rate, true);
        } else {
            self.capacity = self.capacity.max(rate);
        }
    }

    /// The stream was given more than it could take, and took this. A hint until a run measures: what slowed the
    /// stream may have been the beginning of an outage.
    pub(super) fn on_saturated(&mut self, flush_bytes_per_s: u64) {
        if flush_bytes_per_s > 0 {
            (self.capacity, self.measured) = (flush_bytes_per_s, false);
        }
    }

    /// The link that was measured is gone; the one that comes back may be another.
    pub(super) fn on_link_lost(&mut self) {
        self.measured = false;
    }

    /// Whether a run has measured this link.
    pub(super) fn is_measured(&self) -> bool {
        self.measured
    }

    /// Smoothed usage, bytes a second.
    pub(super) fn usage(&self) -> u64 {
        self.usage.map_or(0, |(average, _)| average)
    }

    /// What the stream may be given, bytes a second; 0: not known.
    pub(super) fn capacity(&self) -> u64 {
        if self.limit == 0 { self.capacity } else { self.capacity.min(self.limit) }
    }

    /// The usage up to which there is headroom.
    pub(super) fn headroom(&self) -> u64 {
        narrow(u128::from(self.capacity()) * u128::from(HEADROOM_TENTHS) / 10)
    }

    /// True while usage stays below the capacity by a margin.
    pub(super) fn has_headroom(&self) -> bool {
        self.usage() <= self.headroom()
    }

    /// How long a run over `bytes` would take; `None`: nobody knows.
    fn predict_ms(&self, bytes: u64, obs: &Observation) -> Option<u128> {
        if self.capacity > 0 {
            return Some(u128::from(bytes) * 1000 / u128::from(self.capacity));
        }
        let run = obs.last_run.as_ref().filter(|run| run.committed && run.bytes > 0)?;
        Some(u128::from(run.duration_ms) * u128::from(bytes.div_ceil(run.bytes).max(1)))
    }

    /// What clients would write while a run over `bytes` goes on; `None`: nobody knows.
    pub(super) fn written_during(&self, bytes: u64, obs: &Observation) -> Option<u64> {
        if bytes == 0 {
            return Some(0);
        }
        let usage = self.usage().max(obs.usage_bytes_per_s);
        Some(narrow(self.predict_ms(bytes, obs)?.saturating_mul(u128::from(usage)) / 1000))
    }
}

fn narrow(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}
