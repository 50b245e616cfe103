//! Hysteresis in time: a return that fails makes the next one wait longer.

use serde::{Deserialize, Serialize};

use super::{PolicyConfig, config::ms};

/// A group that leaves again within so many dwells has returned too early.
const FAILED_WITHIN_DWELLS: u64 = 8;

/// How often returns have failed lately.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Damping {
    /// The dwell is doubled so many times.
    level: u32,
    /// The last return to continuous mode.
    returned_ms: Option<u64>,
}

impl Damping {
    /// The dwell, doubled for each failure.
    pub(super) fn dwell_ms(&self, config: &PolicyConfig) -> u64 {
        let dwell = ms(config.dwell).saturating_mul(1_u64.checked_shl(self.level).unwrap_or(u64::MAX));
        dwell.min(ms(config.dwell_max))
    }

    /// What every cause must stay away for before a return: nothing, unless one failed.
    pub(super) fn return_wait_ms(&self, config: &PolicyConfig) -> u64 {
        if self.level == 0 { 0 } else { self.dwell_ms(config) }
    }

    /// True within one dwell of a return, while the stream works off what was held.
    pub(super) fn just_returned(&self, config: &PolicyConfig, now_ms: u64) -> bool {
        self.returned_ms.is_some_and(|returned| now_ms.saturating_sub(returned) < self.dwell_ms(config))
    }

    /// The group is in continuous mode again.
    pub(super) fn on_return(&mut self, now_ms: u64) {
        self.returned_ms = Some(now_ms);
    }

    /// The group left continuous mode for a cause that is damped.
    pub(super) fn on_leave(&mut self, config: &PolicyConfig, now_ms: u64) {
        let Some(returned) = self.returned_ms.take() else { return };
        let mut stayed = now_ms.saturating_sub(returned);
        if stayed < self.dwell_ms(config).saturating_mul(FAILED_WITHIN_DWELLS) {
            return self.on_failure(config);
        }
        // Each calm stretch as long as failures count takes one doubling back.
        while self.level > 0 {
            let calm = self.dwell_ms(config).saturating_mul(FAILED_WITHIN_DWELLS);
            if stayed < calm {
                break;
            }
            stayed -= calm;
            self.level -= 1;
        }
    }

    /// A return failed.
    pub(super) fn on_failure(&mut self, config: &PolicyConfig) {
        if self.dwell_ms(config) < ms(config.dwell_max) {
            self.level += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_returns_double_the_dwell_up_to_its_bound_and_calm_halves_it_again() {
        let config = PolicyConfig::default();
        let (mut damping, mut now) = (Damping::default(), 0);
        assert_eq!((damping.dwell_ms(&config), damping.return_wait_ms(&config)), (30_000, 0));
        for expected in [60_000, 120_000, 240_000, 480_000, 600_000, 600_000] {
            damping.on_return(now);
            now += 1000;
            damping.on_leave(&config, now);
            assert_eq!(damping.return_wait_ms(&config), expected);
        }
        damping.on_return(now);
        now += 8 * 600_000;
        damping.on_leave(&config, now);
        assert_eq!(damping.dwell_ms(&config), 480_000);
        damping.on_return(now);
        now += 7 * 24 * 3_600_000;
        damping.on_leave(&config, now);
        assert_eq!(damping.return_wait_ms(&config), 0);
    }

    #[test]
    fn the_first_departure_is_no_failure() {
        let config = PolicyConfig::default();
        let mut damping = Damping::default();
        damping.on_leave(&config, 5);
        assert_eq!(damping, Damping::default());
    }
}
