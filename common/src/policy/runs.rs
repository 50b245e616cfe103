//! How the last runs ended, and when the next may begin.

use serde::{Deserialize, Serialize};

use super::{Observation, PolicyConfig, Reason, Rule, RunKind, Verdict, config::ms};

/// Shortest pause behind a failed run.
const RETRY_MIN_MS: u64 = 1000;

/// Runs as they ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Runs {
    /// The end of the run that was seen last.
    seen_ms: Option<u64>,
    /// Runs in succession that were aborted.
    failed: u32,
    /// The last one was refused, and none committed since.
    refused: bool,
    /// When the last redundancy run was asked for.
    redundancy_ms: Option<u64>,
    /// Redundancy runs in succession that were aborted or demoted.
    redundancy_failed: u32,
    /// The present redundancy run was demoted: its commit is no success.
    redundancy_demoted: bool,
}

impl Runs {
    /// True once for each run that ended; it is taken note of.
    pub(super) fn on_observation(&mut self, obs: &Observation) -> bool {
        let Some(run) = &obs.last_run else { return false };
        if self.seen_ms == Some(run.ended_ms) {
            return false;
        }
        self.seen_ms = Some(run.ended_ms);
        if run.committed {
            (self.failed, self.refused) = (0, false);
        } else {
            self.failed = self.failed.saturating_add(1);
            self.refused = run.refused.is_some();
        }
        if run.kind == RunKind::Redundancy {
            if !run.committed {
                self.redundancy_failed = self.redundancy_failed.saturating_add(1);
            } else if !self.redundancy_demoted {
                self.redundancy_failed = 0;
            }
            self.redundancy_demoted = false;
        }
        true
    }

    /// A redundancy run is asked for.
    pub(super) fn on_redundancy(&mut self, now_ms: u64) {
        self.redundancy_ms = Some(now_ms);
    }

    /// The open run is demoted.
    pub(super) fn on_demote(&mut self, kind: Option<RunKind>) {
        if kind == Some(RunKind::Redundancy) && !self.redundancy_demoted {
            self.redundancy_failed = self.redundancy_failed.saturating_add(1);
            self.redundancy_demoted = true;
        }
    }

    /// The last run was refused, and none committed since.
    pub(super) fn is_refused(&self) -> bool {
        self.refused
    }

    /// Whether enough time has passed since the last redundancy run.
    pub(super) fn redundancy_interval(&self, config: &PolicyConfig, now_ms: u64) -> Reason {
        let least = ms(config.redundancy_min_interval);
        let wait = grown(least, self.redundancy_failed).min(ms(config.dwell_max).max(least));
        let passed = self.redundancy_ms.map(|asked| now_ms.saturating_sub(asked));
        let ready = passed.is_none_or(|passed| passed >= wait);
        let verdict = if ready { Verdict::Fires } else { Verdict::Quiet };
        Reason::ms(Rule::RedundancyInterval, passed, wait, verdict)
    }

    /// Whether enough time has passed since runs failed; `None`: the last did not fail.
    pub(super) fn retry(&self, config: &PolicyConfig, obs: &Observation) -> Option<Reason> {
        if self.failed == 0 {
            return None;
        }
        let least = if self.refused { ms(config.dwell) } else { ms(config.link_settle).max(RETRY_MIN_MS) };
        let wait = grown(least, self.failed - 1).min(ms(config.dwell_max).max(RETRY_MIN_MS));
        let passed = obs.now_ms.saturating_sub(self.seen_ms.unwrap_or_default());
        let verdict = if passed >= wait { Verdict::Ready } else { Verdict::Waits };
        Some(Reason::ms(Rule::Retry, Some(passed), wait, verdict))
    }
}

fn grown(least_ms: u64, doublings: u32) -> u64 {
    least_ms.saturating_mul(1_u64.checked_shl(doublings).unwrap_or(u64::MAX))
}
