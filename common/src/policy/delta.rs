//! Delta mode: which causes hold, when runs begin, and the return.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{
    Action, Cause, LastRun, Observation, Phase, PolicyConfig, Ratio, Reason, Rule, RunKind, Schedule, Verdict,
    config::ms,
    damping::Damping,
    enter::{count, since},
    meter::{MEASURE_FLOOR_BYTES, Meter},
    runs::Runs,
};
use crate::units::short_bytes;

/// So many rounds in succession that leave no less than the best one: there is no end to them.
const STALLED_ROUNDS: u32 = 3;

/// While a return is damped, rounds keep the backup's image young: this many within the dwell.
const ROUNDS_A_DWELL: u64 = 4;

/// One stay in delta mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Episode {
    /// When it was first seen.
    since_ms: u64,
    /// What it was begun for.
    pub(super) began_for: Cause,
    /// What keeps the group here.
    holding: BTreeSet<Cause>,
    /// Since when nothing does.
    clear_since_ms: Option<u64>,
    headroom_since_ms: Option<u64>,
    probe_since_ms: Option<u64>,
    idle_since_ms: Option<u64>,
    /// When the last run of this stay that committed began.
    last_start_ms: Option<u64>,
    /// A round of the return was asked for while so many bytes were dirty.
    returning: Option<u64>,
    /// The least that a round of the return left dirty.
    best_bytes: Option<u64>,
    /// Rounds since.
    stalled: u32,
    /// The open final round is to be demoted.
    demoted: bool,
}

/// What an episode is weighed with.
pub(super) struct Weights<'a> {
    pub(super) config: &'a PolicyConfig,
    pub(super) obs: &'a Observation,
    pub(super) damping: &'a Damping,
    pub(super) runs: &'a Runs,
}

/// What is done and why.
pub(super) type Verdicts = (Action, Vec<Reason>, String);

impl Episode {
    /// The group is in delta mode for `cause`.
    pub(super) fn new(cause: Cause, now_ms: u64) -> Self {
        Self {
            since_ms: now_ms,
            began_for: cause,
            holding: BTreeSet::from([cause]),
            clear_since_ms: None,
            headroom_since_ms: None,
            probe_since_ms: None,
            idle_since_ms: None,
            last_start_ms: None,
            returning: None,
            best_bytes: None,
            stalled: 0,
            demoted: false,
        }
    }

    /// What keeps the group here, the weightiest first.
    pub(super) fn holding(&self) -> Vec<Cause> {
        self.holding.iter().copied().collect()
    }

    /// The open final round is to be demoted; true the first time it is said.
    pub(super) fn on_demote(&mut self) -> bool {
        // The return starts again, and so does the wait for it.
        self.clear_since_ms = None;
        !std::mem::replace(&mut self.demoted, true)
    }

    /// `run` ended, and so many bytes are dirty now.
    pub(super) fn on_run_end(&mut self, run: &LastRun, dirty_bytes: u64) {
        if run.committed {
            self.last_start_ms = Some(run.ended_ms.saturating_sub(run.duration_ms));
        }
        let Some(begun_with) = self.returning.take().filter(|_| run.committed) else { return };
        let best = self.best_bytes.unwrap_or(begun_with);
        // Five percent less is progress.
        if dirty_bytes <= best - best / 20 {
            (self.best_bytes, self.stalled) = (Some(dirty_bytes), 0);
        } else {
            (self.best_bytes, self.stalled) = (Some(best), self.stalled.saturating_add(1));
        }
    }

    /// Brings the causes that hold up to date.
    pub(super) fn weigh(&mut self, weights: &Weights<'_>, meter: &mut Meter) -> Vec<Reason> {
        let Weights { config, obs, runs, .. } = weights;
        let mut because = Vec::new();
        let hold = |episode: &mut Self, cause: Cause, holds: bool| {
            if holds && config.criteria.contains(cause) {
                episode.holding.insert(cause);
            } else {
                episode.holding.remove(&cause);
            }
        };
        hold(self, Cause::Initial, obs.needs_full);
        hold(self, Cause::Operator, obs.operator.hold_delta);
        hold(self, Cause::Redundancy, false);
        for (cause, rule, set) in [
            (Cause::Initial, Rule::NeedsFull, obs.needs_full),
            (Cause::Operator, Rule::OperatorHold, obs.operator.hold_delta),
        ] {
            if set && config.criteria.contains(cause) {
                because.push(Reason::flag(rule, set, Verdict::Holds));
            }
        }

        let up_for = obs.link_up.then(|| obs.now_ms.saturating_sub(obs.link_since_ms));
        let settled = up_for.is_some_and(|up| up >= ms(config.link_settle));
        if !obs.link_up {
            meter.on_link_lost();
        }
        hold(self, Cause::LinkDown, !obs.link_up || (self.holding.contains(&Cause::LinkDown) && !settled));
        because.push(Reason::ms(
            Rule::LinkSettle,
            up_for,
            ms(config.link_settle),
            held(self.holding.contains(&Cause::LinkDown)),
        ));

        let refused = obs.refused.is_some() || runs.is_refused();
        hold(self, Cause::BackupRefused, refused);
        if refused {
            because.push(Reason::flag(Rule::BackupRefused, true, held(self.holding.contains(&Cause::BackupRefused))));
        }

        self.weigh_headroom(config, obs, meter, &mut because);
        self.weigh_probes(config, obs, &mut because);
        if self.holding.is_empty() {
            self.clear_since_ms.get_or_insert(obs.now_ms);
        } else {
            self.clear_since_ms = None;
        }
        because
    }

    /// `fill`, `imbalance` and `cannot_converge` leave when the link has room for what clients write.
    fn weigh_headroom(&mut self, config: &PolicyConfig, obs: &Observation, meter: &Meter, because: &mut Vec<Reason>) {
        const TRAFFIC: [Cause; 3] = [Cause::Fill, Cause::Imbalance, Cause::CannotConverge];
        let dwell_ms = ms(config.dwell);
        let kept = since(&mut self.headroom_since_ms, meter.has_headroom(), obs.now_ms);
        let roomy = kept.is_some_and(|kept| kept >= dwell_ms);
        let low = !config.fill_leave.is_exceeded_by(obs.span_bytes, obs.capacity_bytes);
        if !TRAFFIC.iter().any(|cause| self.holding.contains(cause)) {
            return;
        }
        let is_over = |cause: &Cause| {
            TRAFFIC.contains(cause) && (!config.criteria.contains(*cause) || (roomy && (*cause != Cause::Fill || low)))
        };
        let before = self.holding.len();
        self.holding.retain(|cause| !is_over(cause));
        if !self.holding.contains(&Cause::CannotConverge) && before != self.holding.len() {
            (self.best_bytes, self.stalled) = (None, 0);
        }
        because.push(Reason::rate(Rule::Headroom, Some(meter.usage()), meter.headroom(), held(!meter.has_headroom())));
        because.push(Reason::ms(Rule::HeadroomTime, kept, dwell_ms, held(!roomy)));
        if self.holding.contains(&Cause::Fill) {
            let share = Ratio::of(obs.span_bytes, obs.capacity_bytes);
            because.push(Reason::ratio(Rule::Fill, share, config.fill_leave, held(!low)));
        }
    }

    /// `link_slow` leaves when probes were fast for a while. Beside a run they are slow for a good reason.
    fn weigh_probes(&mut self, config: &PolicyConfig, obs: &Observation, because: &mut Vec<Reason>) {
        if !self.holding.contains(&Cause::LinkSlow) {
            return;
        }
        if !config.criteria.contains(Cause::LinkSlow) {
            self.holding.remove(&Cause::LinkSlow);
            return;
        }
        if obs.phase != Phase::Tracking {
            return;
        }
        let limit = ms(config.ack_delay_leave);
        let fast = obs.link_up && obs.probe_rtt_ms.is_some_and(|rtt| rtt <= limit);
        let kept = since(&mut self.probe_since_ms, fast, obs.now_ms);
        let left = kept.is_some_and(|kept| kept >= ms(config.link_settle));
        if left {
            self.holding.remove(&Cause::LinkSlow);
        }
        because.push(Reason::ms(Rule::ProbeRoundTrip, obs.probe_rtt_ms, limit, held(!left)));
    }

    /// No run is open: whether one begins.
    pub(super) fn tracking(&mut self, weights: &Weights<'_>, meter: &Meter, because: Vec<Reason>) -> Verdicts {
        let Weights { config, obs, runs, .. } = weights;
        self.demoted = false;
        let idle = obs.usage_bytes_per_s <= config.idle_bytes_per_second
            && obs.link_bytes_per_s <= config.idle_bytes_per_second;
        let idle_for = since(&mut self.idle_since_ms, idle, obs.now_ms);
        let mut because = because;
        let retry = runs.retry(config, obs);
        because.extend(retry);
        let may_retry = retry.is_none_or(|retry| retry.verdict == Verdict::Ready);

        if !obs.link_up {
            return (Action::None, because, "no run can begin before the link is up".into());
        }
        if obs.operator.start_run && config.criteria.contains(Cause::Operator) && !obs.needs_full {
            because.push(Reason::flag(Rule::OperatorRun, true, Verdict::Ready));
            return (start(RunKind::Round), because, "wait for the schedule".into());
        }
        if !may_retry {
            return (Action::None, because, "begin a run, which would fail as the last one did".into());
        }
        if obs.needs_full {
            let alternative = "stay without a usable image on the backup".to_owned();
            return (start(RunKind::Full), because, alternative);
        }
        if self.holding.is_empty() {
            return self.converge(weights, meter, because);
        }
        if self.wants_trial(config, obs, meter) {
            let alternative = format!("wait for the schedule ({}) and know no better until then", config.schedule);
            return (start(RunKind::Round), because, alternative);
        }
        self.scheduled(weights, meter, idle_for, because)
    }

    /// Some causes can only be seen to leave by a run: a refusal, and a capacity that nobody measured on this link.
    fn wants_trial(&self, config: &PolicyConfig, obs: &Observation, meter: &Meter) -> bool {
        let only = |causes: &[Cause]| self.holding.iter().all(|cause| causes.contains(cause));
        if self.holding.contains(&Cause::BackupRefused) {
            let last_try = self.last_start_ms.unwrap_or(self.since_ms);
            return only(&[Cause::BackupRefused]) && obs.now_ms.saturating_sub(last_try) >= ms(config.dwell);
        }
        let up_for = obs.now_ms.saturating_sub(obs.link_since_ms);
        // A small run shows little, but it is all there is when a group has few blocks: once in a longest dwell.
        let tried_for = obs.now_ms.saturating_sub(self.last_start_ms.unwrap_or(self.since_ms));
        let tells = obs.dirty_bytes >= MEASURE_FLOOR_BYTES || tried_for >= ms(config.dwell_max) && obs.dirty_bytes > 0;
        only(&[Cause::Fill, Cause::Imbalance, Cause::CannotConverge])
            && !meter.is_measured()
            && tells
            && up_for >= ms(config.link_settle)
    }

    /// A cause holds: by schedule only.
    fn scheduled(
        &self,
        weights: &Weights<'_>,
        meter: &Meter,
        idle_for: Option<u64>,
        mut because: Vec<Reason>,
    ) -> Verdicts {
        let Weights { config, obs, .. } = weights;
        let began = self.last_start_ms.unwrap_or(self.since_ms);
        let passed = obs.now_ms.saturating_sub(began);
        let dirty = obs.dirty_bytes > 0;
        let (reason, due) = match config.schedule {
            Schedule::Periodic => {
                let due = passed >= ms(config.interval) && dirty;
                (Some(Reason::ms(Rule::Schedule, Some(passed), ms(config.interval), ready(due))), due)
            }
            Schedule::Prompted => (None, false),
            Schedule::Idle => {
                let due = idle_for.is_some_and(|idle| idle >= ms(config.idle_for)) && dirty;
                (Some(Reason::ms(Rule::Idle, idle_for, ms(config.idle_for), ready(due))), due)
            }
        };
        because.extend(reason);
        let names = || self.holding.iter().map(|cause| cause.as_str()).collect::<Vec<_>>().join(", ");
        if !due {
            let how = match config.schedule {
                Schedule::Periodic => "a run begins by schedule or when an operator asks",
                Schedule::Prompted => "a run begins when an operator asks",
                Schedule::Idle => "a run begins when usage and link are idle or when an operator asks",
            };
            let numbers = self.holding.contains(&Cause::CannotConverge).then(|| self.without_end(meter));
            let alternative = format!("return, once {} no longer holds; until then {how}", names());
            let alternative = numbers.map_or(alternative.clone(), |numbers| format!("{alternative}; {numbers}"));
            return (Action::None, because, alternative);
        }
        let late = obs.last_run.as_ref().filter(|run| run.duration_ms > ms(config.interval));
        let alternative = match late.filter(|_| config.schedule == Schedule::Periodic) {
            Some(run) => format!(
                "the schedule cannot be kept: the last run took {}; raise delta.interval above that",
                super::config::ms_text(run.duration_ms)
            ),
            None => format!("return, once {} no longer holds", names()),
        };
        (start(RunKind::Round), because, alternative)
    }

    /// No cause holds: rounds that shrink, then the final one.
    fn converge(&mut self, weights: &Weights<'_>, meter: &Meter, mut because: Vec<Reason>) -> Verdicts {
        let Weights { config, obs, damping, .. } = weights;
        let clear_for = obs.now_ms.saturating_sub(self.clear_since_ms.unwrap_or(obs.now_ms));
        let wait = damping.return_wait_ms(config);
        if clear_for < wait {
            because.push(Reason::ms(Rule::Dwell, Some(clear_for), wait, Verdict::Waits));
            return self.while_damped(obs, wait, because);
        }
        because.push(Reason::ms(Rule::Dwell, Some(clear_for), wait, Verdict::Ready));
        let half = obs.free_bytes() / 2;
        let written = meter.written_during(obs.dirty_bytes, obs);
        let fits = written.is_some_and(|written| written <= half);
        because.push(Reason::bytes(Rule::FinalFits, written, half, ready(fits)));
        let keeps_up = !meter.is_measured() || meter.usage() <= meter.capacity();
        if meter.is_measured() {
            because.push(Reason::rate(Rule::Headroom, Some(meter.usage()), meter.capacity(), ready(keeps_up)));
        }
        if fits && keeps_up {
            let alternative = "another ordinary round, as long as the final one does not fit".to_owned();
            return (start(RunKind::Final), because, alternative);
        }
        let stalled = self.stalled >= STALLED_ROUNDS;
        let verdict = if stalled { Verdict::Holds } else { Verdict::Ready };
        because.push(count(Rule::Convergence, self.stalled, STALLED_ROUNDS, verdict));
        if stalled && config.criteria.contains(Cause::CannotConverge) {
            self.holding.insert(Cause::CannotConverge);
            (self.clear_since_ms, self.headroom_since_ms) = (None, None);
            let alternative = self.without_end(meter);
            return (Action::None, because, alternative);
        }
        self.returning = Some(obs.dirty_bytes);
        let alternative = "the final round, once what clients write meanwhile fits half of the free span".to_owned();
        (start(RunKind::Round), because, alternative)
    }

    /// The numbers of `cannot_converge`.
    fn without_end(&self, meter: &Meter) -> String {
        format!(
            "{STALLED_ROUNDS} rounds in succession left no less than {} to send: return when usage ({}/s) stays below \
             {}/s, or give runs more of the link",
            short_bytes(self.best_bytes.unwrap_or_default()),
            short_bytes(meter.usage()),
            short_bytes(meter.headroom())
        )
    }

    fn while_damped(&self, obs: &Observation, wait_ms: u64, because: Vec<Reason>) -> Verdicts {
        let last = self.last_start_ms.unwrap_or(self.since_ms);
        let alternative = "return at once, as before, and leave again".to_owned();
        if obs.dirty_bytes > 0 && obs.now_ms.saturating_sub(last) >= wait_ms / ROUNDS_A_DWELL {
            return (start(RunKind::Round), because, alternative);
        }
        (Action::None, because, alternative)
    }
}

fn start(kind: RunKind) -> Action {
    Action::StartRun { kind }
}

fn held(holds: bool) -> Verdict {
    if holds { Verdict::Holds } else { Verdict::Left }
}

fn ready(is: bool) -> Verdict {
    if is { Verdict::Ready } else { Verdict::Waits }
}
