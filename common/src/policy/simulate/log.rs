//! The observation log: one JSON value a line.
//!
//! A log begins anywhere: a `policy` line and a `state` line for each group say from where. What follows is in the
//! order of time. `decision` lines hold what was decided live; without them a log can still be replayed.
//!
//! ```text
//! {"line":"policy","policy":{"policy.fill_enter":"0.9",..}}
//! {"line":"state","group":"data","state":{..}}
//! {"line":"observation","group":"data","observation":{"now_ms":7,..}}
//! {"line":"decision","group":"data","decision":{..}}
//! ```

use std::{collections::BTreeMap, io::BufRead};

use serde::{Deserialize, Serialize};

use crate::policy::{Action, Decision, GroupPolicy, Observation, Phase, PolicyConfig};

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum LogLine {
    /// The policy of every group from here on.
    Policy {
        /// In force.
        policy: Box<PolicyConfig>,
    },
    /// What a group's policy remembers. Written at the head of a log, and where a group begins anew.
    State {
        /// Name of the group.
        group: String,
        /// Its state.
        state: Box<GroupPolicy>,
    },
    /// What was observed.
    Observation {
        /// Name of the group.
        group: String,
        /// Input of the next decision.
        observation: Box<Observation>,
    },
    /// What was decided live on the group's last observation.
    Decision {
        /// Name of the group.
        group: String,
        /// Output.
        decision: Box<Decision>,
    },
}

/// Why a log cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file cannot be read.
    #[error("cannot be read")]
    Io(#[from] std::io::Error),
    /// A line is no line of a log.
    #[error("line {line} is no line of an observation log ({source})")]
    Line {
        /// From 1.
        line: u64,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A decision without an observation before it.
    #[error("line {line} is a decision of group {group} without an observation before it; the log was cut inside")]
    NoObservation {
        /// From 1.
        line: u64,
        /// Its group.
        group: String,
    },
}

/// What a replay found.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Replay {
    /// Each group, by name.
    pub groups: BTreeMap<String, GroupReplay>,
    /// The policy was replaced by another one: decisions may differ, and the phases are those of the old one.
    pub other_policy: bool,
}

/// One group of a replay.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct GroupReplay {
    /// Observations read.
    pub observations: u64,
    /// Live decisions that were compared.
    pub compared: u64,
    /// Those that came out different.
    pub different: u64,
    /// Time observed in each phase, milliseconds.
    pub phase_ms: BTreeMap<Phase, u64>,
    /// Changes between continuous and delta mode, as observed.
    pub transitions: u64,
    /// Largest span, bytes.
    pub span_bytes_max: u64,
    /// Decisions that act, at most [`ACTIONS_MAX`] of them, the first of a row of equal ones.
    pub actions: Vec<Acted>,
    /// The first decision that came out different.
    pub first_difference: Option<Difference>,
}

/// Decisions that a [`GroupReplay`] lists.
pub const ACTIONS_MAX: usize = 10_000;

/// A decision that acts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Acted {
    /// Of the observation.
    pub now_ms: u64,
    /// What.
    pub action: Action,
    /// In words, with the rules that decided it.
    pub why: String,
}

/// A live decision and what came out instead.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// From 1.
    pub line: u64,
    /// As logged.
    pub live: Decision,
    /// As replayed.
    pub replayed: Decision,
}

#[derive(Default)]
struct Group {
    policy: GroupPolicy,
    last: Option<(Observation, Decision)>,
    found: GroupReplay,
}

/// Decides again, by the logged policies, or all of it by `other`. `watch` sees each observation.
///
/// # Errors
/// The log cannot be read.
pub fn replay(
    log: impl BufRead,
    other: Option<&PolicyConfig>,
    mut watch: impl FnMut(&Observation),
) -> Result<Replay, LogError> {
    let mut config = other.cloned().unwrap_or_default();
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for (line, text) in (1..).zip(log.lines()) {
        let text = text?;
        if text.trim().is_empty() {
            continue;
        }
        match serde_json::from_str(&text).map_err(|source| LogError::Line { line, source })? {
            LogLine::Policy { policy } if other.is_none() => config = *policy,
            LogLine::Policy { .. } => {}
            LogLine::State { group, state } => groups.entry(group).or_default().policy = *state,
            LogLine::Observation { group, observation } => {
                watch(&observation);
                groups.entry(group).or_default().observe(&config, *observation);
            }
            LogLine::Decision { group, decision } => {
                let no_observation = || LogError::NoObservation { line, group: group.clone() };
                groups.get_mut(&group).ok_or_else(no_observation)?.compare(line, *decision, no_observation)?;
            }
        }
    }
    let groups = groups.into_iter().map(|(name, group)| (name, group.found)).collect();
    Ok(Replay { groups, other_policy: other.is_some() })
}

impl Group {
    fn observe(&mut self, config: &PolicyConfig, obs: Observation) {
        let decision = self.policy.on_observation(config, &obs);
        let found = &mut self.found;
        found.observations += 1;
        found.span_bytes_max = found.span_bytes_max.max(obs.span_bytes);
        let before = self.last.as_ref();
        if let Some((before, _)) = before {
            *found.phase_ms.entry(before.phase).or_default() += obs.now_ms.saturating_sub(before.now_ms);
            found.transitions += u64::from(before.phase.is_delta() != obs.phase.is_delta());
        }
        let repeated = before.is_some_and(|(_, before)| before.action == decision.action);
        if decision.acts() && !repeated && found.actions.len() < ACTIONS_MAX {
            let (now_ms, action, why) = (obs.now_ms, decision.action, decision.to_string());
            found.actions.push(Acted { now_ms, action, why });
        }
        self.last = Some((obs, decision));
    }

    fn compare(&mut self, line: u64, live: Decision, no_observation: impl Fn() -> LogError) -> Result<(), LogError> {
        let (_, replayed) = self.last.as_ref().ok_or_else(no_observation)?;
        self.found.compared += 1;
        if *replayed != live {
            self.found.different += 1;
            if self.found.first_difference.is_none() {
                self.found.first_difference = Some(Difference { line, live, replayed: replayed.clone() });
            }
        }
        Ok(())
    }
}
