//! What was decided, and everything it was decided on: what `explain` prints.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Action, Cause, Ratio, cause::words, config::ms_text};
use crate::units::short_bytes;

/// The answer to one observation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// What to do.
    pub action: Action,
    /// Why the group is, or goes, in delta mode: the weightiest cause that holds, or the last one while it returns.
    /// `None` in continuous mode.
    pub cause: Option<Cause>,
    /// Every cause that holds, the weightiest first.
    pub holds: Vec<Cause>,
    /// Each rule that was weighed, with what it saw and what it compares with.
    pub because: Vec<Reason>,
    /// What would be done otherwise, and what it would take.
    pub alternative: String,
}

impl Decision {
    /// True where something is to be done.
    #[must_use]
    pub fn acts(&self) -> bool {
        self.action != Action::None
    }

    /// What was seen by `rule`.
    #[must_use]
    pub fn reason(&self, rule: Rule) -> Option<&Reason> {
        self.because.iter().find(|reason| reason.rule == rule)
    }
}

/// One rule, what it saw and what it compares with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Which.
    pub rule: Rule,
    /// What was seen; `None` where it is not known.
    pub value: Option<u64>,
    /// What it is compared with.
    pub threshold: u64,
    /// Of both numbers.
    pub unit: Unit,
    /// The outcome.
    pub verdict: Verdict,
}

/// Unit of the numbers of a [`Reason`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Milliseconds.
    Ms,
    /// Bytes.
    Bytes,
    /// Bytes a second.
    BytesPerS,
    /// Millionths.
    Millionths,
    /// 1 is yes, 0 is no.
    Flag,
    /// A number of things.
    Count,
}
words!(Unit: Ms = "ms", Bytes = "bytes", BytesPerS = "bytes_per_s", Millionths = "millionths", Flag = "flag",
    Count = "count");

/// Outcome of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It does not ask to leave continuous mode.
    Quiet,
    /// It asks to leave continuous mode, or a final round.
    Fires,
    /// It keeps the group in delta mode.
    Holds,
    /// It does not keep the group in delta mode (any more).
    Left,
    /// It keeps a run from beginning.
    Waits,
    /// It lets a run begin.
    Ready,
}
words!(Verdict: Quiet = "quiet", Fires = "fires", Holds = "holds", Left = "left", Waits = "waits", Ready = "ready");

impl Verdict {
    /// False for a rule that asks for nothing.
    #[must_use]
    pub fn is_decisive(self) -> bool {
        !matches!(self, Self::Quiet | Self::Left)
    }
}

/// A rule of the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// The backup has no image to build on.
    NeedsFull,
    /// Delta mode is forced.
    OperatorHold,
    /// A run was asked for.
    OperatorRun,
    /// How long the link has been down.
    LinkDown,
    /// How long the link has been up.
    LinkSettle,
    /// The backup refuses.
    BackupRefused,
    /// Share of the journal that the span takes.
    Fill,
    /// Time until the journal is full at this usage and flushing rate.
    OverflowForecast,
    /// Usage minus flushing rate.
    ImbalanceLevel,
    /// Age of the oldest record sent and not acknowledged.
    AckDelay,
    /// Round trip of a probe.
    ProbeRoundTrip,
    /// CR / DR.
    RedundancyRatio,
    /// CR.
    RedundancyFloor,
    /// Time since the last redundancy run.
    RedundancyInterval,
    /// Usage, against what the link has shown it can take.
    Headroom,
    /// How long there has been headroom without a break.
    HeadroomTime,
    /// Rounds in succession that left no less than the best one.
    Convergence,
    /// How long no cause has held.
    Dwell,
    /// What would be held during a final round, against half of the free span.
    FinalFits,
    /// Time since the last run began.
    Schedule,
    /// How long usage and link have been low.
    Idle,
    /// Time since a run failed.
    Retry,
}
words!(Rule: NeedsFull = "needs_full", OperatorHold = "operator_hold", OperatorRun = "operator_run",
    LinkDown = "link_down", LinkSettle = "link_settle", BackupRefused = "backup_refused", Fill = "fill",
    OverflowForecast = "overflow_forecast", ImbalanceLevel = "imbalance_level", AckDelay = "ack_delay",
    ProbeRoundTrip = "probe_round_trip", RedundancyRatio = "redundancy_ratio", RedundancyFloor = "redundancy_floor",
    RedundancyInterval = "redundancy_interval", Headroom = "headroom", HeadroomTime = "headroom_time",
    Convergence = "convergence", Dwell = "dwell", FinalFits = "final_fits", Schedule = "schedule", Idle = "idle",
    Retry = "retry");

impl Reason {
    /// A rule that has no amount.
    pub(super) fn flag(rule: Rule, set: bool, verdict: Verdict) -> Self {
        Self { rule, value: Some(u64::from(set)), threshold: 1, unit: Unit::Flag, verdict }
    }

    /// A rule over times.
    pub(super) fn ms(rule: Rule, value: Option<u64>, threshold: u64, verdict: Verdict) -> Self {
        Self { rule, value, threshold, unit: Unit::Ms, verdict }
    }

    /// A rule over amounts.
    pub(super) fn bytes(rule: Rule, value: Option<u64>, threshold: u64, verdict: Verdict) -> Self {
        Self { rule, value, threshold, unit: Unit::Bytes, verdict }
    }

    /// A rule over rates.
    pub(super) fn rate(rule: Rule, value: Option<u64>, threshold: u64, verdict: Verdict) -> Self {
        Self { rule, value, threshold, unit: Unit::BytesPerS, verdict }
    }

    /// A rule over ratios.
    pub(super) fn ratio(rule: Rule, value: Option<Ratio>, threshold: Ratio, verdict: Verdict) -> Self {
        let value = value.map(Ratio::millionths);
        Self { rule, value, threshold: threshold.millionths(), unit: Unit::Millionths, verdict }
    }
}

impl Unit {
    /// `amount` with this unit, for people.
    #[must_use]
    pub fn text(self, amount: u64) -> String {
        match self {
            Self::Ms => ms_text(amount),
            Self::Bytes => short_bytes(amount),
            Self::BytesPerS => format!("{}/s", short_bytes(amount)),
            Self::Millionths => Ratio::from_millionths(amount).to_string(),
            Self::Flag => if amount == 0 { "no" } else { "yes" }.to_owned(),
            Self::Count => amount.to_string(),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.value.map_or_else(|| "none".to_owned(), |value| self.unit.text(value));
        match self.unit {
            Unit::Flag => write!(f, "{} {value} {}", self.rule, self.verdict),
            unit => write!(f, "{} {value} against {} {}", self.rule, unit.text(self.threshold), self.verdict),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Switch { cause } => write!(f, "switch ({cause})"),
            Self::StartRun { kind } => write!(f, "start {kind}"),
            Self::Demote { cause } => write!(f, "demote ({cause})"),
        }
    }
}

/// The action and the rules that decided it; `{:#}` has every rule that was weighed.
impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.action)?;
        let all = f.alternate();
        let shown = |reason: &&Reason| all || reason.verdict.is_decisive();
        for (index, reason) in self.because.iter().filter(shown).enumerate() {
            write!(f, "{} {reason}", if index == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
}
