//! Decisions of the mode policy on the wire.

use understudy_common::policy::{self, Action, LastRun, LedgerTotals, Phase, RunView};

use crate::v1;

impl From<Phase> for v1::Phase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Streaming => Self::Streaming,
            Phase::Tracking => Self::Tracking,
            Phase::Round => Self::Round,
            Phase::FinalRound => Self::FinalRound,
            Phase::FullRun => Self::FullRun,
        }
    }
}

impl From<Phase> for v1::Mode {
    fn from(phase: Phase) -> Self {
        if phase.is_delta() { Self::Delta } else { Self::Continuous }
    }
}

impl From<&policy::Reason> for v1::Reason {
    fn from(reason: &policy::Reason) -> Self {
        Self {
            rule: reason.rule.to_string(),
            value: reason.value,
            threshold: reason.threshold,
            unit: reason.unit.to_string(),
            verdict: reason.verdict.to_string(),
        }
    }
}

/// A decision and the time at which it was made.
#[must_use]
pub fn decision(time_unix_ms: i64, decision: &policy::Decision) -> v1::Decision {
    let (action, cause, run_kind) = match decision.action {
        Action::None => ("none", None, None),
        Action::Switch { cause } => ("switch", Some(cause), None),
        Action::StartRun { kind } => ("start_run", None, Some(kind)),
        Action::Demote { cause } => ("demote", Some(cause), None),
    };
    v1::Decision {
        time_unix_ms,
        action: action.into(),
        cause: cause.or(decision.cause).map_or_else(String::new, |cause| cause.to_string()),
        run_kind: run_kind.map_or_else(String::new, |kind| kind.to_string()),
        holds: decision.holds.iter().map(ToString::to_string).collect(),
        because: decision.because.iter().map(v1::Reason::from).collect(),
        alternative: decision.alternative.clone(),
    }
}

impl From<LedgerTotals> for v1::Redundancy {
    fn from(ledger: LedgerTotals) -> Self {
        Self { cr_bytes: ledger.cr_bytes, dr_bytes: ledger.dr_bytes, ratio: ledger.ratio().map(policy::Ratio::to_f64) }
    }
}

/// An open run at `now_ms` of the clock of its view.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "a guess for people")]
pub fn run_progress(run: &RunView, now_ms: u64, started_unix_ms: i64) -> v1::RunProgress {
    let left = run.total_bytes.saturating_sub(run.done_bytes);
    let passed_ms = now_ms.saturating_sub(run.started_ms);
    let known = run.done_bytes > 0 && passed_ms > 0;
    v1::RunProgress {
        kind: run.kind.to_string(),
        done_bytes: run.done_bytes,
        total_bytes: run.total_bytes,
        eta_seconds: known.then(|| left as f64 / run.done_bytes as f64 * passed_ms as f64 / 1000.0),
        started_unix_ms,
    }
}

/// A run that ended, and when by the clock on the wall. `reason` is why it was aborted, where it was.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "seconds for people")]
pub fn last_run(run: &LastRun, ended_unix_ms: i64, reason: &str) -> v1::LastRun {
    let result = match (run.committed, &run.refused) {
        (true, _) => "committed",
        (false, Some(_)) => "refused",
        (false, None) => "aborted",
    };
    v1::LastRun {
        kind: run.kind.to_string(),
        result: result.into(),
        bytes: run.bytes,
        seconds: run.duration_ms as f64 / 1000.0,
        ended_unix_ms,
        reason: run.refused.clone().unwrap_or_else(|| reason.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use understudy_common::policy::{Cause, Reason, Rule, RunKind, Unit, Verdict};

    use super::*;

    #[test]
    fn a_decision_keeps_every_number() {
        let because = vec![
            Reason { rule: Rule::Fill, value: Some(1), threshold: 2, unit: Unit::Millionths, verdict: Verdict::Fires },
            Reason { rule: Rule::AckDelay, value: None, threshold: 5, unit: Unit::Ms, verdict: Verdict::Quiet },
        ];
        let mut made = policy::Decision {
            action: Action::Switch { cause: Cause::Fill },
            cause: Some(Cause::Fill),
            holds: vec![Cause::Fill],
            because,
            alternative: "stay".into(),
        };
        let wire = decision(7, &made);
        assert_eq!((wire.action.as_str(), wire.cause.as_str(), wire.run_kind.as_str()), ("switch", "fill", ""));
        assert_eq!((wire.time_unix_ms, wire.holds), (7, vec!["fill".to_owned()]));
        assert_eq!((wire.because[0].value, wire.because[1].value), (Some(1), None));
        assert_eq!((wire.because[0].rule.as_str(), wire.because[1].unit.as_str()), ("fill", "ms"));
        made.action = Action::StartRun { kind: RunKind::Final };
        made.cause = None;
        let wire = decision(7, &made);
        assert_eq!((wire.action.as_str(), wire.cause.as_str(), wire.run_kind.as_str()), ("start_run", "", "final"));
    }

    #[test]
    fn runs_and_the_ledger_are_told_as_they_are() {
        let run = RunView { kind: RunKind::Round, started_ms: 1000, total_bytes: 400, done_bytes: 100 };
        assert_eq!(run_progress(&run, 3000, 5).eta_seconds, Some(6.0));
        assert_eq!(run_progress(&RunView { done_bytes: 0, ..run }, 3000, 5).eta_seconds, None);
        let ended = |committed, refused| LastRun {
            kind: RunKind::Full,
            committed,
            bytes: 1,
            duration_ms: 1500,
            ended_ms: 0,
            refused,
        };
        let texts = |run: v1::LastRun| (run.result, run.reason);
        assert_eq!(texts(last_run(&ended(true, None), 9, "")), ("committed".into(), String::new()));
        assert_eq!(texts(last_run(&ended(false, None), 9, "asked")), ("aborted".into(), "asked".into()));
        assert_eq!(texts(last_run(&ended(false, Some("full".into())), 9, "")), ("refused".into(), "full".into()));
        assert_eq!(v1::Redundancy::from(LedgerTotals { cr_bytes: 9000, dr_bytes: 3000 }).ratio, Some(3.0));
        assert_eq!(v1::Redundancy::from(LedgerTotals::default()).ratio, None);
    }
}
