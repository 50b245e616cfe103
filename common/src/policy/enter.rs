//! Leaving: what is weighed in continuous mode, and in a final round.

use serde::{Deserialize, Serialize};

use super::{
    Cause, Observation, PolicyConfig, Reason, Rule, Unit, Verdict, config::ms, damping::Damping, meter::Meter,
    runs::Runs,
};

/// The plain level of imbalance must be exceeded at so many weighings in succession.
const LEVEL_WEIGHINGS: u32 = 4;

/// Since when rates have been out of balance.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Imbalance {
    forecast_since_ms: Option<u64>,
    level_since_ms: Option<u64>,
}

/// What was weighed, and what fires.
pub(super) struct Weighed {
    pub(super) because: Vec<Reason>,
    pub(super) fires: Vec<Cause>,
}

impl Weighed {
    fn rule(&mut self, cause: Cause, reason: Reason) {
        if reason.verdict == Verdict::Fires && !self.fires.contains(&cause) {
            self.fires.push(cause);
        }
        self.because.push(reason);
    }

    /// The cause to act on. A link that is down explains whatever else is wrong with the traffic.
    pub(super) fn weightiest(&self, config: &PolicyConfig, obs: &Observation) -> Option<Cause> {
        let cause = self.fires.iter().min().copied()?;
        let explained = matches!(cause, Cause::Fill | Cause::Imbalance | Cause::LinkSlow);
        let down = !obs.link_up && config.criteria.contains(Cause::LinkDown);
        Some(if explained && down { Cause::LinkDown } else { cause })
    }
}

/// In continuous mode.
pub(super) fn streaming(
    config: &PolicyConfig,
    obs: &Observation,
    imbalance: &mut Imbalance,
    damping: &Damping,
    runs: &Runs,
    meter: &Meter,
) -> Weighed {
    let on = |cause| config.criteria.contains(cause);
    let mut weighed = Weighed { because: Vec::new(), fires: Vec::new() };
    certain(config, obs, &mut weighed);
    if on(Cause::LinkSlow) {
        let (age, limit) = (obs.oldest_sent_age_ms, ms(config.ack_delay_max));
        let fires = age.is_some_and(|age| age >= limit);
        weighed.rule(Cause::LinkSlow, Reason::ms(Rule::AckDelay, age, limit, fired(fires)));
    }
    // Where clients wait for both sides, only what keeps the sides apart may move the group.
    if obs.both {
        *imbalance = Imbalance::default();
        return weighed;
    }
    if on(Cause::Fill) {
        fill(config, obs, &mut weighed);
    }
    if on(Cause::Imbalance) {
        imbalance.weigh(config, obs, damping, &mut weighed);
    }
    if on(Cause::Redundancy) {
        redundancy(config, obs, damping, runs, meter, &mut weighed);
    }
    weighed
}

/// In a final round. What it holds was not sent: it counts for the span, not as delay and not as imbalance.
pub(super) fn final_round(config: &PolicyConfig, obs: &Observation) -> Weighed {
    let mut weighed = Weighed { because: Vec::new(), fires: Vec::new() };
    certain(config, obs, &mut weighed);
    // Also where clients wait for both sides: the group is in delta, a full journal would stop it.
    if config.criteria.contains(Cause::Fill) {
        fill(config, obs, &mut weighed);
    }
    weighed
}

fn certain(config: &PolicyConfig, obs: &Observation, weighed: &mut Weighed) {
    let on = |cause| config.criteria.contains(cause);
    weighed.rule(Cause::Initial, Reason::flag(Rule::NeedsFull, obs.needs_full, fired(obs.needs_full)));
    if on(Cause::Operator) {
        let hold = obs.operator.hold_delta;
        weighed.rule(Cause::Operator, Reason::flag(Rule::OperatorHold, hold, fired(hold)));
    }
    if on(Cause::LinkDown) {
        let down = (!obs.link_up).then(|| obs.now_ms.saturating_sub(obs.link_since_ms));
        let limit = ms(config.link_timeout);
        let fires = down.is_some_and(|down| down >= limit);
        weighed.rule(Cause::LinkDown, Reason::ms(Rule::LinkDown, Some(down.unwrap_or(0)), limit, fired(fires)));
    }
    if on(Cause::BackupRefused) {
        let refused = obs.refused.is_some();
        weighed.rule(Cause::BackupRefused, Reason::flag(Rule::BackupRefused, refused, fired(refused)));
    }
}

/// Pressure moves the group whose oldest retained record pins everything behind it.
fn fill(config: &PolicyConfig, obs: &Observation, weighed: &mut Weighed) {
    let above = config.fill_enter.is_exceeded_by(obs.span_bytes, obs.capacity_bytes);
    let share = super::Ratio::of(obs.span_bytes, obs.capacity_bytes);
    let reason = Reason::ratio(Rule::Fill, share, config.fill_enter, fired(above && obs.owns_oldest));
    weighed.rule(Cause::Fill, reason);
}

impl Imbalance {
    fn weigh(&mut self, config: &PolicyConfig, obs: &Observation, damping: &Damping, weighed: &mut Weighed) {
        let growth = obs.usage_bytes_per_s.saturating_sub(obs.flush_bytes_per_s);
        let horizon = ms(config.overflow_horizon);
        if horizon > 0 {
            let full_in = (u128::from(obs.free_bytes()) * 1000)
                .checked_div(u128::from(growth))
                .map(|ms| u64::try_from(ms).unwrap_or(u64::MAX));
            let short = full_in.is_some_and(|full_in| full_in < horizon);
            // A burst that ends within a quarter of the horizon has three quarters left to be worked off in.
            let held = since(&mut self.forecast_since_ms, short, obs.now_ms);
            let urgent = full_in.is_some_and(|full_in| full_in < horizon / 4);
            let fires = urgent || held.is_some_and(|held| held >= horizon / 4);
            weighed.rule(Cause::Imbalance, Reason::ms(Rule::OverflowForecast, full_in, horizon, fired(fires)));
        }
        let level = config.imbalance_bytes_per_second;
        if level > 0 {
            let above = growth > level && !damping.just_returned(config, obs.now_ms);
            let held = since(&mut self.level_since_ms, above, obs.now_ms);
            let fires = held.is_some_and(|held| held >= ms(config.weigh_interval * LEVEL_WEIGHINGS));
            weighed.rule(Cause::Imbalance, Reason::rate(Rule::ImbalanceLevel, Some(growth), level, fired(fires)));
        }
    }
}

/// Fig. 10, steps 444 to 448. All rules must fire; a redundancy run is worth it, never necessary.
fn redundancy(
    config: &PolicyConfig,
    obs: &Observation,
    damping: &Damping,
    runs: &Runs,
    meter: &Meter,
    weighed: &mut Weighed,
) {
    let (cr, dr) = (obs.ledger.cr_bytes, obs.ledger.dr_bytes);
    let above = config.redundancy_ratio.is_exceeded_by(cr, dr);
    let enough = cr > 0 && cr >= config.redundancy_floor_bytes;
    let written = meter.written_during(dr, obs);
    let fits = written.is_none_or(|written| written <= obs.free_bytes() / 2);
    let up_for = obs.link_up.then(|| obs.now_ms.saturating_sub(obs.link_since_ms));
    let settled = up_for.is_some_and(|up| up >= ms(config.link_settle));
    let because = [
        Reason::ratio(Rule::RedundancyRatio, obs.ledger.ratio(), config.redundancy_ratio, fired(above)),
        Reason::bytes(Rule::RedundancyFloor, Some(cr), config.redundancy_floor_bytes, fired(enough)),
        runs.redundancy_interval(config, obs.now_ms),
        Reason::bytes(Rule::FinalFits, written, obs.free_bytes() / 2, fired(fits)),
        Reason::ms(Rule::LinkSettle, up_for, ms(config.link_settle), fired(settled)),
    ];
    let fires = because.iter().all(|reason| reason.verdict == Verdict::Fires)
        && obs.refused.is_none()
        && !damping.just_returned(config, obs.now_ms);
    // The others are only of interest while the ratio is.
    let shown = if above { &because[..] } else { &because[..2] };
    weighed.because.extend(shown);
    if fires {
        weighed.fires.push(Cause::Redundancy);
    }
}

fn fired(fires: bool) -> Verdict {
    if fires { Verdict::Fires } else { Verdict::Quiet }
}

/// For how long `holds` has been true without a break.
pub(super) fn since(start: &mut Option<u64>, holds: bool, now_ms: u64) -> Option<u64> {
    if !holds {
        *start = None;
        return None;
    }
    Some(now_ms.saturating_sub(*start.get_or_insert(now_ms)))
}

/// A count against its limit.
pub(super) fn count(rule: Rule, value: u32, limit: u32, verdict: Verdict) -> Reason {
    Reason { rule, value: Some(value.into()), threshold: limit.into(), unit: Unit::Count, verdict }
}
