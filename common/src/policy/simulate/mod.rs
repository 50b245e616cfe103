//! The policy in a world of its own: replays of what was observed, and pairs that are made up from a trace and a link.
//!
//! - [`log::replay`] reads an observation log and decides again: with the logged policy exactly as it was decided live.
//! - [`compare`] takes a workload (a [`trace`], or a shape) through a model of the pair and its link, in continuous
//!   mode, in delta mode, by a policy, and gives the offline optimum beside them (`optimum`).
//! - [`plot::svg`] draws one run.
//!
//! Everything is deterministic: time is a counter, noise has a seed.
//!
//! What the model leaves out: discards, elided zeros, compression, digests, the client's reaction to back-pressure
//! (what does not fit into the journal is counted and still retained), a second group, adaptive throttling of runs.

mod link;
pub mod log;
mod optimum;
mod pair;
pub mod plot;
#[cfg(test)]
mod tests;
pub mod trace;
mod workload;

use std::collections::BTreeMap;

use serde::Serialize;

pub use link::{LinkModel, Outage, RateFrom};
pub use pair::{PairModel, Wire};
pub use workload::{BlockWrite, Pattern, Shape, Shaped, TraceWorkload, Workload};

use super::{Action, Decision, GroupPolicy, Observation, Phase, PolicyConfig, Ratio, RunKind, config::ms};
use link::LinkBudget;
use pair::{Pair, TICK_MS};
use plot::Samples;

/// After the last write the pair gets so long to catch up, and a schedule's interval more.
const DRAIN_MS: u64 = 2 * 3_600_000;

/// What is simulated.
pub struct Scenario<'a> {
    /// What clients write.
    pub workload: &'a dyn Workload,
    /// Over what.
    pub link: LinkModel,
    /// Between what.
    pub pair: PairModel,
    /// Of the adaptive strategy, and the schedule of delta mode.
    pub policy: PolicyConfig,
}

/// How the mode is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Always continuous.
    Continuous,
    /// Always delta, runs by the schedule.
    Delta,
    /// By the policy.
    Adaptive,
    /// The rule that flaps: leave above a share of the capacity, return below the same share, count all traffic. Here
    /// to be compared with.
    Naive(Ratio),
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// How the mode was chosen.
    pub strategy: Strategy,
    /// Time in each phase, milliseconds.
    pub phase_ms: BTreeMap<Phase, u64>,
    /// Times continuous mode, or a final round, was left.
    pub departures: u64,
    /// Times continuous mode was reached again.
    pub returns: u64,
    /// Every change of the mode.
    pub transitions: Vec<Transition>,
    /// Runs that committed.
    pub runs: u64,
    /// On the wire.
    pub wire: Wire,
    /// Largest age of the recovery point, milliseconds.
    pub age_ms_max: u64,
    /// Largest span, bytes.
    pub span_bytes_max: u64,
    /// Time for which the span was above the capacity, milliseconds: clients would have waited, then been refused.
    pub overflow_ms: u64,
    /// Until the backup lacked nothing, milliseconds.
    pub duration_ms: u64,
    /// The backup lacked nothing at the end.
    pub complete: bool,
}

impl Outcome {
    /// Bytes of both kinds.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        self.wire.continuous_bytes + self.wire.delta_bytes
    }

    /// Time in delta mode, milliseconds.
    #[must_use]
    pub fn delta_ms(&self) -> u64 {
        self.phase_ms.iter().filter(|(phase, _)| phase.is_delta()).map(|(_, ms)| ms).sum()
    }

    /// Time in continuous mode, milliseconds.
    #[must_use]
    pub fn continuous_ms(&self) -> u64 {
        self.phase_ms.get(&Phase::Streaming).copied().unwrap_or(0)
    }
}

/// A change of the mode.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Transition {
    /// When.
    pub at_ms: u64,
    /// Before.
    pub from: Phase,
    /// Behind.
    pub to: Phase,
    /// The decision in words; a return has none, it is the commit of a final round.
    pub why: String,
}

/// All strategies side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// What clients wrote, in whole blocks.
    pub written_bytes: u64,
    /// Always continuous.
    pub continuous: Outcome,
    /// Always delta.
    pub delta: Outcome,
    /// By the policy.
    pub adaptive: Outcome,
    /// No strategy whose age is never above `adaptive.age_ms_max` sends less; see the module `optimum`.
    pub optimum_bytes: u64,
}

/// Runs every strategy, and samples the adaptive one for a plot.
#[must_use]
pub fn compare(scenario: &Scenario<'_>, samples: &mut Samples) -> Comparison {
    let adaptive = simulate(scenario, Strategy::Adaptive, |tick| samples.on_tick(tick));
    let optimum_bytes = optimum::bytes(scenario.workload, adaptive.age_ms_max);
    let blocks: u64 = scenario.workload.writes().map(|write| write.count).sum();
    Comparison {
        written_bytes: blocks * scenario.workload.block_bytes(),
        continuous: simulate(scenario, Strategy::Continuous, |_| {}),
        delta: simulate(scenario, Strategy::Delta, |_| {}),
        adaptive,
        optimum_bytes,
    }
}

/// What a run shows from tick to tick.
pub struct Tick<'a> {
    /// Now.
    pub now_ms: u64,
    /// What the group is doing.
    pub phase: Phase,
    /// Of the recovery point.
    pub age_ms: u64,
    /// Of the journal.
    pub span_bytes: u64,
    /// Over the last second.
    pub usage_bytes_per_s: u64,
    /// Over the last second.
    pub link_bytes_per_s: u64,
    /// What was weighed in this tick, and what was decided.
    pub weighed: Option<(&'a Observation, &'a Decision)>,
}

enum Decider<'a> {
    Policy(&'a PolicyConfig, Box<GroupPolicy>),
    Continuous,
    Naive(Ratio),
}

/// Runs one strategy; `watch` sees every tick.
pub fn simulate(scenario: &Scenario<'_>, strategy: Strategy, mut watch: impl FnMut(&Tick<'_>)) -> Outcome {
    let phase = if strategy == Strategy::Delta { Phase::Tracking } else { Phase::Streaming };
    let link = LinkBudget::new(&scenario.link);
    let (block_bytes, limit) = (scenario.workload.block_bytes(), scenario.policy.stream_bytes_per_second);
    let mut pair = Pair::new(scenario.pair, block_bytes, scenario.link.rtt_ms, link, limit, phase);
    pair.operator.hold_delta = strategy == Strategy::Delta;
    let mut policy = scenario.policy.clone();
    if strategy == Strategy::Delta {
        policy.criteria = policy.criteria.with(super::Cause::Operator);
    }
    let mut decider = match strategy {
        Strategy::Adaptive | Strategy::Delta => Decider::Policy(&policy, Box::default()),
        Strategy::Continuous => Decider::Continuous,
        Strategy::Naive(level) => Decider::Naive(level),
    };
    let mut writes = scenario.workload.writes().peekable();
    let weigh_ms = ms(scenario.policy.weigh_interval).max(TICK_MS);
    let (mut now_ms, mut weigh_at, mut last_write_ms) = (0, 0, 0);
    let mut outcome = Outcome::new(strategy);
    let drain_ms = DRAIN_MS.saturating_add(ms(scenario.policy.interval));
    loop {
        now_ms += TICK_MS;
        while let Some(write) = writes.next_if(|write| write.at_ms < now_ms) {
            last_write_ms = write.at_ms;
            pair.write(write);
        }
        let before = pair.phase;
        pair.tick(now_ms, scenario.link.outage_at(now_ms));
        outcome.note(now_ms, before, pair.phase, "");
        let drained = writes.peek().is_none();
        // Behind the trace nobody waits for a schedule.
        pair.operator.start_run = drained && strategy == Strategy::Delta && pair.phase == Phase::Tracking;
        let mut weighed = None;
        if now_ms >= weigh_at {
            weigh_at = now_ms + weigh_ms;
            let obs = pair.observation();
            let decision = decider.decide(&obs);
            let before = pair.phase;
            pair.act(decision.action);
            if decision.acts() {
                outcome.note(now_ms, before, pair.phase, &decision.to_string());
            }
            weighed = Some((obs, decision));
        }
        outcome.on_tick(&pair, scenario.pair.capacity_bytes);
        let rates = pair.rates();
        watch(&Tick {
            now_ms,
            phase: pair.phase,
            age_ms: pair.age_ms(),
            span_bytes: pair.span_bytes(),
            usage_bytes_per_s: rates.0,
            link_bytes_per_s: rates.1,
            weighed: weighed.as_ref().map(|(obs, decision)| (obs, decision)),
        });
        if drained && (pair.is_complete() || now_ms > last_write_ms.saturating_add(drain_ms)) {
            break;
        }
    }
    outcome.runs = pair.runs;
    outcome.wire = pair.wire;
    outcome.duration_ms = now_ms;
    outcome.complete = pair.is_complete();
    outcome
}

impl Outcome {
    fn new(strategy: Strategy) -> Self {
        Self {
            strategy,
            phase_ms: BTreeMap::new(),
            departures: 0,
            returns: 0,
            transitions: Vec::new(),
            runs: 0,
            wire: Wire::default(),
            age_ms_max: 0,
            span_bytes_max: 0,
            overflow_ms: 0,
            duration_ms: 0,
            complete: false,
        }
    }

    fn note(&mut self, at_ms: u64, from: Phase, to: Phase, why: &str) {
        let left = from == Phase::Streaming && to != from || from == Phase::FinalRound && to == Phase::Round;
        let returned = to == Phase::Streaming && from != to;
        self.departures += u64::from(left);
        self.returns += u64::from(returned);
        if left || returned {
            self.transitions.push(Transition { at_ms, from, to, why: why.to_owned() });
        }
    }

    fn on_tick(&mut self, pair: &Pair<'_>, capacity_bytes: u64) {
        *self.phase_ms.entry(pair.phase).or_default() += TICK_MS;
        self.age_ms_max = self.age_ms_max.max(pair.age_ms());
        self.span_bytes_max = self.span_bytes_max.max(pair.span_bytes());
        if pair.span_bytes() > capacity_bytes {
            self.overflow_ms += TICK_MS;
        }
    }
}

impl Decider<'_> {
    fn decide(&mut self, obs: &Observation) -> Decision {
        let action = match self {
            Self::Policy(config, policy) => return policy.on_observation(config, obs),
            Self::Continuous => Action::None,
            Self::Naive(level) => naive(*level, obs),
        };
        Decision { action, cause: None, holds: Vec::new(), because: Vec::new(), alternative: String::new() }
    }
}

/// All that waits or is on its way counts, whoever sends it; one level decides both ways.
fn naive(level: Ratio, obs: &Observation) -> Action {
    let run = obs.run.map_or(0, |run| run.total_bytes.saturating_sub(run.done_bytes));
    let full = level.is_exceeded_by(obs.span_bytes + run, obs.capacity_bytes) || !obs.link_up;
    match obs.phase {
        Phase::Streaming if full => Action::Switch { cause: super::Cause::Fill },
        Phase::FinalRound if full => Action::Demote { cause: super::Cause::Fill },
        Phase::Tracking if !full => Action::StartRun { kind: RunKind::Final },
        _ => Action::None,
    }
}
