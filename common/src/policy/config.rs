//! Settings of the policy, and which of them contradict each other.
//!
//! In files, flags, on the wire and in the observation log a policy is a map from setting to text; the rows that say
//! how a text becomes a value are those of the configuration (`config::policy_settings`). A bare name is one of
//! `[policy]`.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Cause, Ratio, cause::words};
use crate::{
    config::{Preset, Setting, Value, policy_settings},
    units::format_duration,
};

/// What the policy is told. Every default is that of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "BTreeMap<String, String>", try_from = "BTreeMap<String, String>")]
pub struct PolicyConfig {
    /// Causes that may move a group.
    pub criteria: Criteria,
    /// Time between two weighings of a group.
    pub weigh_interval: Duration,
    /// A link that was down for so long is interrupted. Read at start, not changeable later.
    pub link_timeout: Duration,
    /// A link that was up for so long is healthy.
    pub link_settle: Duration,
    /// A record sent and unacknowledged for so long is too late.
    pub ack_delay_max: Duration,
    /// A probe answered within this is in time again.
    pub ack_delay_leave: Duration,
    /// The stream is held to so many bytes a second (`link.throttle`), which no capacity of the link makes up for; 0: no
    /// limit. Read at start, not changeable later.
    pub stream_bytes_per_second: u64,
    /// Leave when the journal would be full sooner than this; zero: do not predict.
    pub overflow_horizon: Duration,
    /// Leave when usage exceeds the flushing rate by more; zero: no such level.
    pub imbalance_bytes_per_second: u64,
    /// Leave when the span takes more of the journal.
    pub fill_enter: Ratio,
    /// Return when it takes less.
    pub fill_leave: Ratio,
    /// Leave when CR / DR is larger.
    pub redundancy_ratio: Ratio,
    /// And CR is at least this.
    pub redundancy_floor_bytes: u64,
    /// And the last redundancy run began so long ago.
    pub redundancy_min_interval: Duration,
    /// How long there must be headroom until a cause of traffic leaves. After a return that failed every cause must
    /// have left for as long, and twice as long after each further failure.
    pub dwell: Duration,
    /// What repeated failure lets it grow to.
    pub dwell_max: Duration,
    /// When runs begin while a cause holds.
    pub schedule: Schedule,
    /// Between the beginnings of two runs of the periodic schedule.
    pub interval: Duration,
    /// For the idle schedule: usage and link use that count as idle, bytes a second.
    pub idle_bytes_per_second: u64,
    /// And for how long.
    pub idle_for: Duration,
}

/// When runs begin while a cause holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Every `interval`.
    Periodic,
    /// When an operator asks.
    Prompted,
    /// When usage and link use have been low for a while.
    Idle,
}
words!(Schedule: Periodic = "periodic", Prompted = "prompted", Idle = "idle");

/// A set of causes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Criteria(u16);

impl Criteria {
    /// No cause but [`Cause::Initial`], which cannot be switched off.
    pub const NONE: Self = Self(0);

    /// Every cause.
    #[must_use]
    pub fn all() -> Self {
        Cause::ALL.iter().fold(Self::NONE, |set, cause| set.with(*cause))
    }

    /// These causes.
    #[must_use]
    pub fn of(causes: &[Cause]) -> Self {
        causes.iter().fold(Self::NONE, |set, cause| set.with(*cause))
    }

    /// This set and `cause`.
    #[must_use]
    pub fn with(self, cause: Cause) -> Self {
        Self(self.0 | bit(cause))
    }

    /// This set but for `cause`.
    #[must_use]
    pub fn without(self, cause: Cause) -> Self {
        Self(self.0 & !bit(cause))
    }

    /// True if `cause` may move a group.
    #[must_use]
    pub fn contains(self, cause: Cause) -> bool {
        cause == Cause::Initial || self.0 & bit(cause) != 0
    }

    /// Words of the setting: names of causes, or `none`.
    pub fn parse(words: &[String]) -> Result<Self, String> {
        if words.len() == 1 && words[0] == "none" {
            return Ok(Self::NONE);
        }
        words.iter().try_fold(Self::NONE, |set, word| match Cause::from_word(word) {
            Some(cause) if cause != Cause::Initial => Ok(set.with(cause)),
            _ => Err(format!("names {word}, which is no criterion")),
        })
    }

    /// The words that [`Criteria::parse`] reads.
    #[must_use]
    pub fn words(self) -> Vec<String> {
        let own = |cause: &&Cause| **cause != Cause::Initial && self.contains(**cause);
        let words: Vec<String> = Cause::ALL.iter().filter(own).map(ToString::to_string).collect();
        if words.is_empty() { vec!["none".to_owned()] } else { words }
    }
}

fn bit(cause: Cause) -> u16 {
    1 << (cause as u16)
}

/// A value that is refused, or two settings that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{setting} {message}; {remedy}")]
pub struct PolicyProblem {
    /// `section.name`; as it was given where there is no such setting.
    pub setting: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub remedy: String,
}

/// Everything that is wrong with a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct PolicyProblems(pub Vec<PolicyProblem>);

impl fmt::Display for PolicyProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if index == 0 { "" } else { "; and " })?;
        }
        Ok(())
    }
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self::from_values(|_| None)
    }
}

impl PolicyConfig {
    /// From checked values of the settings' kinds; where there is none, the default.
    #[must_use]
    pub fn from_values(value_of: impl Fn(&str) -> Option<Value>) -> Self {
        let value = |path: &str| value_of(path).unwrap_or_else(|| default_value(path));
        let time = |path: &str| match value(path) {
            Value::Duration(time) => time,
            other => panic!("{path} is no time: {other:?}"),
        };
        let bytes = |path: &str| match value(path) {
            Value::Bytes(bytes) => bytes,
            other => panic!("{path} is no size: {other:?}"),
        };
        let ratio = |path: &str| match value(path) {
            Value::Float(number) => Ratio::from_f64(number),
            other => panic!("{path} is no number: {other:?}"),
        };
        Self {
            // What is no criterion is a problem of its own; the rest is in force until it is solved.
            criteria: match value("policy.criteria") {
                Value::List(words) => Criteria::parse(&words).unwrap_or_else(|_| Criteria::all()),
                other => panic!("policy.criteria is no list: {other:?}"),
            },
            weigh_interval: time("policy.weigh_interval"),
            link_timeout: time("link.timeout"),
            link_settle: time("link.settle"),
            ack_delay_max: time("link.ack_delay_max"),
            ack_delay_leave: time("link.ack_delay_leave"),
            stream_bytes_per_second: bytes("link.throttle"),
            overflow_horizon: time("policy.overflow_horizon"),
            imbalance_bytes_per_second: bytes("policy.imbalance_bytes_per_second"),
            fill_enter: ratio("policy.fill_enter"),
            fill_leave: ratio("policy.fill_leave"),
            redundancy_ratio: ratio("policy.redundancy_ratio"),
            redundancy_floor_bytes: bytes("policy.redundancy_floor"),
            redundancy_min_interval: time("policy.redundancy_min_interval"),
            dwell: time("policy.dwell"),
            dwell_max: time("policy.dwell_max"),
            schedule: match value("delta.schedule") {
                Value::Text(word) => Schedule::from_word(&word).expect("one of the choices"),
                other => panic!("delta.schedule is no word: {other:?}"),
            },
            interval: time("delta.interval"),
            idle_bytes_per_second: bytes("delta.idle_bytes_per_second"),
            idle_for: time("delta.idle_for"),
        }
    }

    /// The value of each setting, by `section.name`.
    #[must_use]
    pub fn values(&self) -> BTreeMap<&'static str, Value> {
        BTreeMap::from([
            ("policy.criteria", Value::List(self.criteria.words())),
            ("policy.weigh_interval", Value::Duration(self.weigh_interval)),
            ("link.timeout", Value::Duration(self.link_timeout)),
            ("link.settle", Value::Duration(self.link_settle)),
            ("link.ack_delay_max", Value::Duration(self.ack_delay_max)),
            ("link.ack_delay_leave", Value::Duration(self.ack_delay_leave)),
            ("link.throttle", Value::Bytes(self.stream_bytes_per_second)),
            ("policy.overflow_horizon", Value::Duration(self.overflow_horizon)),
            ("policy.imbalance_bytes_per_second", Value::Bytes(self.imbalance_bytes_per_second)),
            ("policy.fill_enter", Value::Float(self.fill_enter.to_f64())),
            ("policy.fill_leave", Value::Float(self.fill_leave.to_f64())),
            ("policy.redundancy_ratio", Value::Float(self.redundancy_ratio.to_f64())),
            ("policy.redundancy_floor", Value::Bytes(self.redundancy_floor_bytes)),
            ("policy.redundancy_min_interval", Value::Duration(self.redundancy_min_interval)),
            ("policy.dwell", Value::Duration(self.dwell)),
            ("policy.dwell_max", Value::Duration(self.dwell_max)),
            ("delta.schedule", Value::Text(self.schedule.to_string())),
            ("delta.interval", Value::Duration(self.interval)),
            ("delta.idle_bytes_per_second", Value::Bytes(self.idle_bytes_per_second)),
            ("delta.idle_for", Value::Duration(self.idle_for)),
        ])
    }

    /// Each setting by `section.name` with its text, as [`PolicyConfig::with`] reads it.
    #[must_use]
    pub fn texts(&self) -> BTreeMap<String, String> {
        self.values().into_iter().map(|(path, value)| (path.to_owned(), value.to_text())).collect()
    }

    /// This policy with some settings changed, by `section.name`, or by the bare name of one of `[policy]`.
    ///
    /// # Errors
    /// Every unknown name, refused text and contradiction at once.
    pub fn with(&self, changes: &BTreeMap<String, String>) -> Result<Self, PolicyProblems> {
        let mut problems = Vec::new();
        let mut values = self.values();
        for (name, text) in changes {
            let Some(setting) = find(name) else {
                problems.push(PolicyProblem {
                    setting: name.clone(),
                    message: "is no setting of the policy".into(),
                    remedy: format!("use one of {}", names()),
                });
                continue;
            };
            match setting.kind.parse(text) {
                Ok(value) => {
                    problems.extend(criteria_problem(setting.path, &value));
                    values.insert(setting.path, value);
                }
                Err(fault) => problems.push(PolicyProblem {
                    setting: setting.path.into(),
                    message: format!("= {text} {}", fault.message),
                    remedy: fault.remedy,
                }),
            }
        }
        let changed = Self::from_values(|path| values.get(path).cloned());
        problems.extend(changed.validate());
        if problems.is_empty() { Ok(changed) } else { Err(PolicyProblems(problems)) }
    }

    /// Every contradiction.
    #[must_use]
    pub fn validate(&self) -> Vec<PolicyProblem> {
        let mut found = Vec::new();
        let mut report = |setting: &str, message: String, remedy: &str| {
            found.push(PolicyProblem { setting: setting.into(), message, remedy: remedy.into() });
        };
        let on = |cause| self.criteria.contains(cause);
        if on(Cause::Fill) && self.fill_leave >= self.fill_enter {
            let message = format!(
                "is {}, not below policy.fill_enter, {}: the group would return into what it left for",
                self.fill_leave, self.fill_enter
            );
            report("policy.fill_leave", message, "lower it, for example to half of policy.fill_enter");
        }
        if on(Cause::LinkSlow) && self.ack_delay_leave >= self.ack_delay_max {
            let message = format!(
                "is {}, not below link.ack_delay_max, {}: the group would return into what it left for",
                format_duration(self.ack_delay_leave),
                format_duration(self.ack_delay_max)
            );
            report("link.ack_delay_leave", message, "lower it, for example to a fifth of link.ack_delay_max");
        }
        if self.dwell.is_zero() {
            let message = "is zero: nothing damps a group that leaves and returns again and again".into();
            report("policy.dwell", message, "set it to 1s or more; 30s is the default");
        }
        if self.dwell > self.dwell_max {
            let message = format!(
                "is {}, below policy.dwell, {}: it cannot be what dwell grows to",
                format_duration(self.dwell_max),
                format_duration(self.dwell)
            );
            report("policy.dwell_max", message, "raise it; equal to policy.dwell it switches the growth off");
        }
        if on(Cause::Imbalance) {
            if self.overflow_horizon.is_zero() && self.imbalance_bytes_per_second == 0 {
                let message =
                    "is zero, and so is policy.imbalance_bytes_per_second: imbalance is on and has nothing to weigh";
                report("policy.overflow_horizon", message.into(), "set one of them, or take imbalance out of criteria");
            }
            if !self.overflow_horizon.is_zero() && self.weigh_interval * 4 > self.overflow_horizon {
                let message = format!(
                    "is {}: within policy.overflow_horizon, {}, a group is not weighed four times",
                    format_duration(self.weigh_interval),
                    format_duration(self.overflow_horizon)
                );
                report("policy.weigh_interval", message, "lower it, or raise policy.overflow_horizon");
            }
        }
        if on(Cause::Redundancy) {
            if self.redundancy_ratio <= Ratio::ONE {
                let message = format!("is {}: CR is never below DR, so it would always fire", self.redundancy_ratio);
                report("policy.redundancy_ratio", message, "set it above 1; 3 is the default");
            }
            if self.redundancy_min_interval.is_zero() {
                let message = "is zero: a hot workload would start one redundancy run after the other".into();
                report("policy.redundancy_min_interval", message, "set it to 1s or more; 1min is the default");
            }
        }
        if self.schedule == Schedule::Periodic && self.interval.is_zero() {
            report("delta.interval", "is zero: no schedule can keep it".into(), "set it to 1s or more");
        }
        if self.schedule == Schedule::Idle && (self.idle_for.is_zero() || self.idle_bytes_per_second == 0) {
            let message =
                "with delta.schedule = idle, delta.idle_for and delta.idle_bytes_per_second must be above zero";
            report("delta.schedule", message.into(), "set both, or choose another schedule");
        }
        found
    }
}

impl From<PolicyConfig> for BTreeMap<String, String> {
    fn from(config: PolicyConfig) -> Self {
        config.texts()
    }
}

impl TryFrom<BTreeMap<String, String>> for PolicyConfig {
    type Error = PolicyProblems;

    fn try_from(texts: BTreeMap<String, String>) -> Result<Self, PolicyProblems> {
        Self::default().with(&texts)
    }
}

/// Whether the list of criteria names one that does not exist.
pub(crate) fn criteria_problem(path: &str, value: &Value) -> Option<PolicyProblem> {
    let Value::List(words) = value else { return None };
    if path != "policy.criteria" {
        return None;
    }
    let message = Criteria::parse(words).err()?;
    let remedy = format!("use none, or some of {}", Criteria::all().words().join(", "));
    Some(PolicyProblem { setting: path.into(), message, remedy })
}

fn find(name: &str) -> Option<Setting> {
    let path = if name.contains('.') { name.to_owned() } else { format!("policy.{name}") };
    policy_settings().into_iter().find(|setting| setting.path == path)
}

fn names() -> String {
    policy_settings().iter().map(|setting| setting.path).collect::<Vec<_>>().join(", ")
}

fn default_value(path: &str) -> Value {
    let setting = find(path).expect("asked for rows of the table");
    match setting.preset {
        Preset::Is(text) => setting.kind.parse(text).expect("defaults are checked by a test"),
        other => panic!("{path} has no default: {other:?}"),
    }
}

/// In milliseconds, rounded down.
pub(super) fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds for people: exact below ten minutes, whole seconds above.
#[must_use]
pub fn ms_text(ms: u64) -> String {
    match ms {
        1..=999 => format!("{ms}ms"),
        0..600_000 => {
            let fraction = format!("{:03}", ms % 1000);
            let fraction = fraction.trim_end_matches('0');
            format!("{}{}{fraction}s", ms / 1000, if fraction.is_empty() { "" } else { "." })
        }
        _ => format_duration(Duration::from_secs(ms / 1000)),
    }
}
