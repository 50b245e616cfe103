//! What operators see and say of modes, runs and the policy, in the words of the services.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::{sleep, timeout};
use understudy_common::{
    policy::{Action, Cause, Decision},
    state::{GroupMode, GroupState},
    store::Store,
    types::{GroupId, Lsn, Position, VolumeSpec},
};
use understudy_proto::v1;

use crate::{
    api::EngineError,
    replicator::{Ask, Explained, GroupView, Handle, RunReport},
    runner::RunCounts,
};

/// How long an operator waits for what was asked for to be seen.
const SEEN: Duration = Duration::from_secs(5);
/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(20);
/// Past decisions that are told if nobody says how many.
const DECISIONS: usize = 20;

/// Modes and runs of a primary's groups.
#[derive(Clone, Copy)]
pub(crate) struct Control<'a> {
    pub store: &'a Store,
    pub handle: &'a Handle,
    pub has_backup: bool,
}

impl Control<'_> {
    /// A group by its name, or by that of one of its volumes.
    fn find(&self, name: &str) -> Result<GroupState, EngineError> {
        let found = self.store.with_state(|state| state.group_by_name(name).cloned());
        found.ok_or_else(|| EngineError::NoGroup { group: name.to_owned() })
    }

    fn wrong_phase(&self, group: &GroupState, why: &str) -> EngineError {
        EngineError::WrongPhase { group: group.name.clone(), phase: phase_word(&group.mode), why: why.into() }
    }

    fn needs_backup(&self, group: &GroupState) -> Result<(), EngineError> {
        if self.has_backup {
            return Ok(());
        }
        Err(self.wrong_phase(group, "no [backup] url is set, so nothing is replicated; set it and start again"))
    }

    /// Waits until `done` holds of the group.
    async fn until(&self, id: GroupId, done: impl Fn(&GroupState) -> bool) -> Option<GroupState> {
        let wait = async {
            loop {
                let group = self.store.with_state(|state| state.groups.get(&id).cloned());
                match group {
                    Some(group) if !done(&group) => sleep(LOOK).await,
                    other => return other,
                }
            }
        };
        timeout(SEEN, wait).await.ok().flatten()
    }

    pub async fn start_delta(&self, name: &str) -> Result<v1::StartDeltaResponse, EngineError> {
        let group = self.find(name)?;
        self.needs_backup(&group)?;
        match &group.mode {
            GroupMode::Continuous { .. } => {
                let why = "there is nothing to copy in continuous mode; `mode set` forces delta mode";
                return Err(self.wrong_phase(&group, why));
            }
            GroupMode::Delta { run: Some(_), .. } => {
                return Err(self.wrong_phase(&group, "a run is open; wait for its end or abort it"));
            }
            GroupMode::Delta { run: None, .. } => {}
        }
        let dirty_bytes = self.store.delta_sizes(group.id).active_bytes;
        let before = self.handle.view(group.id).last_run.map(|run| run.ended_unix_ms);
        self.handle.ask(group.id, Ask::StartRun);
        // A short one may be over before it is looked at.
        let begun = |g: &GroupState| {
            let over = self.handle.view(g.id).last_run.map(|run| run.ended_unix_ms) != before;
            g.mode.run().is_some() || g.mode.is_continuous() || over
        };
        match self.until(group.id, begun).await {
            Some(_) => Ok(v1::StartDeltaResponse { group: group.name, dirty_bytes }),
            None => {
                let why = "no run has begun within 5 s: is the link up, or another group's run open? See `status`, \
                           `policy explain`";
                Err(self.wrong_phase(&group, why))
            }
        }
    }

    pub async fn abort_delta(&self, name: &str) -> Result<v1::AbortRunResponse, EngineError> {
        let group = self.find(name)?;
        let Some(run) = group.mode.run() else { return Err(self.wrong_phase(&group, "no run is open")) };
        let progress = run_progress(&group, &self.handle.view(group.id));
        self.handle.ask(group.id, Ask::AbortRun);
        self.until(group.id, |g| g.mode.run().is_none_or(|open| open.id != run.id)).await;
        Ok(v1::AbortRunResponse { group: group.name.clone(), run: progress })
    }

    pub async fn force_delta(&self, name: &str, forced: bool) -> Result<v1::SetModeResponse, EngineError> {
        let group = self.find(name)?;
        self.needs_backup(&group)?;
        self.handle.ask(group.id, if forced { Ask::Hold } else { Ask::Release });
        let seen = self.until(group.id, |g| !forced || !g.mode.is_continuous()).await;
        let group =
            seen.ok_or_else(|| self.wrong_phase(&group, "delta mode was not reached within 5 s; see `events`"))?;
        let (mode, phase) = mode_of(&group.mode);
        let cause = cause_of(&group.mode).to_owned();
        Ok(v1::SetModeResponse { group: group.name, mode: mode.into(), phase: phase.into(), cause })
    }

    pub fn explain(&self, name: Option<&str>, limit: usize) -> Result<Vec<v1::GroupExplanation>, EngineError> {
        let groups = match name {
            Some(name) => vec![self.find(name)?],
            None => self.store.with_state(|state| state.groups.values().cloned().collect()),
        };
        let limit = if limit == 0 { DECISIONS } else { limit };
        Ok(groups.iter().map(|group| explanation(group, &self.handle.view(group.id), limit)).collect())
    }

    /// Marks, ledger and runs of a volume.
    pub fn describe(&self, spec: &VolumeSpec, group: &GroupState, status: &mut v1::VolumeStatus) {
        let (active, frozen) = self.store.marked_blocks(spec.id);
        let sizes = self.store.delta_sizes(group.id);
        let view = self.handle.view(group.id);
        let (mode, phase) = mode_of(&group.mode);
        (status.mode, status.phase) = (mode.into(), phase.into());
        if !group.mode.is_continuous() {
            cause_of(&group.mode).clone_into(&mut status.cause);
        }
        status.dirty_blocks = active + frozen;
        status.bytes_at_risk += status.dirty_blocks * u64::from(spec.block_size.bytes());
        status.redundancy = Some(v1::Redundancy {
            cr_bytes: sizes.cr_bytes,
            dr_bytes: sizes.dr_bytes,
            ratio: (sizes.dr_bytes > 0).then(|| float(sizes.cr_bytes) / float(sizes.dr_bytes)),
        });
        status.run = run_progress(group, &view);
        status.last_run = view.last_run.as_ref().map(last_run);
    }

    /// Until the first run of a group is committed, the backup has no image of it.
    pub fn is_consistent(&self, group: &GroupState) -> bool {
        self.has_backup && (group.mode.is_continuous() || self.store.retained_of(group.id).acked() > Lsn::ZERO)
    }

    /// What the backup holds: all but what is retained or marked.
    pub fn acked(&self, group: &GroupState) -> Lsn {
        let retained = self.store.retained_of(group.id);
        let all = retained.oldest().is_none() && self.has_backup && group.mode.is_continuous();
        if all { group.position.lsn } else { retained.acked() }
    }

    /// The recovery point of each lane that has had records; none where there is one lane only.
    pub fn lanes(&self, group: &GroupState, now_unix_ms: i64) -> Vec<v1::LaneStatus> {
        let (lanes, retained) = (&self.store.config().lanes, self.store.retained_of(group.id));
        if lanes.count() == 1 && retained.lanes().count() <= 1 {
            return Vec::new();
        }
        let marked = [group.marked_since_unix_ms, group.mode.run().and_then(|run| run.marked_since_unix_ms)];
        let lane = |lane: u8| {
            let of = retained.lane(lane);
            let oldest = marked.into_iter().chain([self.store.oldest_retained_time_of(group.id, lane)]).flatten().min();
            let all = of.oldest.is_none() && self.has_backup && group.mode.is_continuous();
            let age_ms = oldest.map_or(0, |time| u64::try_from(now_unix_ms - time).unwrap_or_default());
            v1::LaneStatus {
                lane: lane.into(),
                name: lanes.name(lane),
                class: lanes.class(lane).to_string(),
                recovery_point: Some(v1::RecoveryPoint {
                    position: place(Some(group), if all { group.lanes.of(lane).lsn } else { of.acked }),
                    time_unix_ms: oldest.unwrap_or(now_unix_ms),
                    age_seconds: Duration::from_millis(age_ms).as_secs_f64(),
                }),
                retained_bytes: of.bytes,
            }
        };
        let used = retained.lanes().count().max(lanes.count());
        (0..).take(used).map(lane).collect()
    }

    /// The time of the oldest change that the backup does not have, Unix milliseconds.
    pub fn oldest_missing(&self, group: &GroupState) -> Option<i64> {
        let frozen = group.mode.run().and_then(|run| run.marked_since_unix_ms);
        let retained = self.store.oldest_retained_time(group.id);
        [group.marked_since_unix_ms, frozen, retained].into_iter().flatten().min()
    }
}

/// A position of the group at `lsn`, at most its newest.
pub(crate) fn place(group: Option<&GroupState>, lsn: Lsn) -> Option<v1::Position> {
    let last = group.map_or(Position::default(), |g| g.position);
    Some(Position { generation: last.generation, lsn: lsn.min(last.lsn) }.into())
}

fn run_progress(group: &GroupState, view: &GroupView) -> Option<v1::RunProgress> {
    let run = group.mode.run()?;
    let (counts, spent) = view.run.unwrap_or_default();
    Some(v1::RunProgress {
        kind: run.kind.as_str().into(),
        done_bytes: counts.done_bytes,
        total_bytes: counts.total_bytes,
        eta_seconds: eta(counts, spent),
        started_unix_ms: run.time_unix_ms,
    })
}

/// At the speed so far.
fn eta(counts: RunCounts, spent: Duration) -> Option<f64> {
    let left = counts.total_bytes.saturating_sub(counts.done_bytes);
    (counts.done_bytes > 0).then(|| float(left) * spent.as_secs_f64() / float(counts.done_bytes))
}

fn last_run(run: &RunReport) -> v1::LastRun {
    v1::LastRun {
        kind: run.kind.as_str().into(),
        result: if run.committed {
            "committed"
        } else if run.refused {
            "refused"
        } else {
            "aborted"
        }
        .into(),
        bytes: run.counts.sent_bytes,
        seconds: run.duration.as_secs_f64(),
        ended_unix_ms: run.ended_unix_ms,
        reason: run.why.clone(),
    }
}

fn explanation(group: &GroupState, view: &GroupView, limit: usize) -> v1::GroupExplanation {
    let (mode, phase) = mode_of(&group.mode);
    let acted = view.decisions.iter().rev().filter(|explained| explained.decision.acts());
    v1::GroupExplanation {
        group: group.name.clone(),
        mode: mode.into(),
        phase: phase.into(),
        cause: cause_of(&group.mode).to_owned(),
        now: view.decisions.last().map(decision),
        decisions: acted.take(limit).map(decision).collect(),
    }
}

fn decision(explained: &Explained) -> v1::Decision {
    let Decision { action, cause, holds, because, alternative } = &explained.decision;
    let (word, of_action, run_kind) = match action {
        Action::None => ("none", None, ""),
        Action::Switch { cause } => ("switch", Some(*cause), ""),
        Action::StartRun { kind } => ("start_run", None, kind.as_str()),
        Action::Demote { cause } => ("demote", Some(*cause), ""),
    };
    v1::Decision {
        time_unix_ms: explained.time_unix_ms,
        action: word.into(),
        cause: of_action.or(*cause).map_or("", Cause::as_str).into(),
        run_kind: run_kind.into(),
        holds: holds.iter().map(|cause| cause.as_str().to_owned()).collect(),
        because: because
            .iter()
            .map(|reason| v1::Reason {
                rule: reason.rule.as_str().into(),
                value: reason.value,
                threshold: reason.threshold,
                unit: reason.unit.as_str().into(),
                verdict: reason.verdict.as_str().into(),
            })
            .collect(),
        alternative: alternative.clone(),
    }
}

fn cause_of(mode: &GroupMode) -> &str {
    match mode {
        GroupMode::Continuous { .. } => "",
        GroupMode::Delta { cause, .. } => cause,
    }
}

fn mode_of(mode: &GroupMode) -> (v1::Mode, v1::Phase) {
    use understudy_common::record::RunKind;
    match mode {
        GroupMode::Continuous { .. } => (v1::Mode::Continuous, v1::Phase::Streaming),
        GroupMode::Delta { run, .. } => {
            let phase = match run.as_ref().map(|run| run.kind) {
                None => v1::Phase::Tracking,
                Some(RunKind::Round) => v1::Phase::Round,
                Some(RunKind::Final | RunKind::Redundancy) => v1::Phase::FinalRound,
                Some(RunKind::Full) => v1::Phase::FullRun,
            };
            (v1::Mode::Delta, phase)
        }
    }
}

fn phase_word(mode: &GroupMode) -> &'static str {
    match mode_of(mode).1 {
        v1::Phase::Unspecified | v1::Phase::Streaming => "streaming",
        v1::Phase::Tracking => "tracking",
        v1::Phase::Round => "round",
        v1::Phase::FinalRound => "final_round",
        v1::Phase::FullRun => "full_run",
    }
}

/// Largest CR / DR of a group; 0 with nothing retained.
pub(crate) fn redundancy_ratio(store: &Store) -> f64 {
    let groups = store.with_state(|state| state.groups.keys().copied().collect::<Vec<_>>());
    let sizes = groups.into_iter().map(|group| store.delta_sizes(group)).filter(|sizes| sizes.dr_bytes > 0);
    sizes.map(|sizes| float(sizes.cr_bytes) / float(sizes.dr_bytes)).fold(0.0, f64::max)
}

/// The settings that differ from those in force.
pub(crate) fn changes(from: &BTreeMap<String, String>, to: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    to.iter().filter(|(name, text)| from.get(*name) != Some(*text)).map(|(n, t)| (n.clone(), t.clone())).collect()
}

#[allow(clippy::cast_precision_loss, reason = "a ratio or a time for people")]
fn float(number: u64) -> f64 {
    number as f64
}
