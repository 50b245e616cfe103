//! The mode policy: when a group leaves continuous mode, when runs begin, when it returns (Figs. 4, 8, 10, 11).
//!
//! [`GroupPolicy`] is a pure state machine: no clock, no I/O, no randomness. All it may know is in the
//! [`Observation`], all it says is in the [`Decision`]; the same observations from the same state give the same
//! decisions, on any machine. It keeps timers, dwell and damping. The *phase* always comes with the observation, so
//! that policy and store cannot disagree: a decision that the store did not carry out is made again.
//!
//! Invariants:
//! - An action is legal in the phase it was made in ([`Phase::after`]).
//! - A cause keeps a group in delta mode until its own leave threshold is passed; the group returns when none holds.
//! - What runs put on the link is neither usage nor delay nor imbalance. It measures the capacity.
//! - A group whose writes wait for both sides leaves continuous mode for [`Cause::Initial`], [`Cause::Operator`],
//!   [`Cause::BackupRefused`] and the link only.
//! - Without a link no run begins.
//!
//! Absent on purpose: aborting a run that is open. A run resumes by address, whatever the link does.

mod cause;
mod config;
mod damping;
mod decision;
mod delta;
mod enter;
mod meter;
mod observation;
mod ratio;
mod recorder;
mod runs;
pub mod simulate;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use crate::record::RunKind;
pub use cause::{Action, Cause, Phase};
pub(crate) use config::criteria_problem;
pub use config::ms_text;
pub use config::{Criteria, PolicyConfig, PolicyProblem, PolicyProblems, Schedule};
pub use decision::{Decision, Reason, Rule, Unit, Verdict};
pub use observation::{LastRun, LedgerTotals, Observation, OperatorRequest, RunView};
pub use ratio::Ratio;
pub use recorder::Recorder;

use crate::units::short_bytes;
use damping::Damping;
use delta::{Episode, Weights};
use enter::{Imbalance, Weighed};
use meter::Meter;
use runs::Runs;

/// Timers, dwell and damping of one group. Serialized it is the state from which an observation log is replayed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GroupPolicy {
    meter: Meter,
    damping: Damping,
    runs: Runs,
    imbalance: Imbalance,
    /// The stay in delta mode, while there is one.
    episode: Option<Episode>,
}

impl GroupPolicy {
    /// For a group that nothing is known of yet; also one that was in delta mode when the process ended.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Weighs one observation. Called every `policy.weigh_interval`, and may be called at any other time.
    pub fn on_observation(&mut self, config: &PolicyConfig, obs: &Observation) -> Decision {
        self.meter.on_observation(config, obs);
        if self.runs.on_observation(obs)
            && let Some(run) = &obs.last_run
        {
            self.meter.on_run(run);
            if let Some(episode) = &mut self.episode {
                episode.on_run_end(run, obs.dirty_bytes);
            }
        }
        self.follow_phase(config, obs);
        let decision = match (&mut self.episode, obs.phase) {
            (None, _) => self.streaming(config, obs),
            (Some(_), Phase::FinalRound) => self.final_round(config, obs),
            (Some(_), _) => self.delta(config, obs),
        };
        debug_assert!(obs.phase.after(decision.action).is_some(), "{:?} in {:?}", decision.action, obs.phase);
        decision
    }

    /// Opens and closes the stay in delta mode as the observed phase says.
    fn follow_phase(&mut self, config: &PolicyConfig, obs: &Observation) {
        match (&self.episode, obs.phase.is_delta()) {
            (None, true) => {
                let cause = obs.mode_cause.unwrap_or(Cause::LinkDown);
                if cause.is_damped() {
                    self.damping.on_leave(config, obs.now_ms);
                }
                self.imbalance = Imbalance::default();
                self.episode = Some(Episode::new(cause, obs.now_ms));
            }
            (Some(episode), false) => {
                if episode.began_for.is_damped() {
                    self.damping.on_return(obs.now_ms);
                }
                self.episode = None;
            }
            (None, false) | (Some(_), true) => {}
        }
    }

    fn streaming(&mut self, config: &PolicyConfig, obs: &Observation) -> Decision {
        let Self { meter, damping, runs, imbalance, .. } = self;
        let weighed = enter::streaming(config, obs, imbalance, damping, runs, meter);
        let cause = weighed.weightiest(config, obs);
        let Weighed { because, fires } = weighed;
        let action = match cause {
            None => Action::None,
            Some(Cause::Redundancy) => Action::StartRun { kind: RunKind::Redundancy },
            Some(cause) => Action::Switch { cause },
        };
        match action {
            Action::Switch { cause: Cause::Fill | Cause::Imbalance } => meter.on_saturated(obs.flush_bytes_per_s),
            Action::StartRun { .. } => runs.on_redundancy(obs.now_ms),
            _ => {}
        }
        let alternative = match cause {
            None => "switch to delta mode: no criterion fires".to_owned(),
            Some(_) => {
                let growth = obs.usage_bytes_per_s.saturating_sub(obs.flush_bytes_per_s);
                let full = obs.free_bytes().checked_div(growth).map_or_else(
                    || "which does not grow".to_owned(),
                    |seconds| format!("full in {}", ms_text(seconds.saturating_mul(1000))),
                );
                let (retained, free) = (short_bytes(obs.retained_bytes), short_bytes(obs.free_bytes()));
                format!("stay in continuous mode with {retained} retained and {free} of the journal free, {full}")
            }
        };
        Decision { action, cause, holds: fires, because, alternative }
    }

    fn final_round(&mut self, config: &PolicyConfig, obs: &Observation) -> Decision {
        // Timers go on, though no run can begin here.
        let weights = Weights { config, obs, damping: &self.damping, runs: &self.runs };
        if let Some(episode) = &mut self.episode {
            episode.weigh(&weights, &mut self.meter);
        }
        let weighed = enter::final_round(config, obs);
        let cause = weighed.weightiest(config, obs);
        let Some(episode) = &mut self.episode else { unreachable!("asked in delta mode only") };
        let action = match cause {
            None => Action::None,
            Some(cause) => {
                if episode.on_demote() {
                    self.runs.on_demote(obs.run.map(|run| run.kind));
                    if cause.is_damped() {
                        self.damping.on_failure(config);
                    }
                }
                Action::Demote { cause }
            }
        };
        let alternative = match action {
            Action::None => "demote the final round: no criterion fires".to_owned(),
            _ => format!(
                "hold {} more until the final round commits",
                short_bytes(obs.run.map_or(0, |run| run.total_bytes.saturating_sub(run.done_bytes)))
            ),
        };
        Decision {
            action,
            cause: cause.or(Some(episode.began_for)),
            holds: weighed.fires,
            because: weighed.because,
            alternative,
        }
    }

    fn delta(&mut self, config: &PolicyConfig, obs: &Observation) -> Decision {
        let weights = Weights { config, obs, damping: &self.damping, runs: &self.runs };
        let Some(episode) = &mut self.episode else { unreachable!("asked in delta mode only") };
        let because = episode.weigh(&weights, &mut self.meter);
        let (action, because, alternative) = if obs.phase == Phase::Tracking {
            episode.tracking(&weights, &self.meter, because)
        } else {
            (Action::None, because, "nothing: a run is open".to_owned())
        };
        let holds = episode.holding();
        let cause = holds.first().copied().or(obs.mode_cause).or(Some(episode.began_for));
        Decision { action, cause, holds, because, alternative }
    }
}
