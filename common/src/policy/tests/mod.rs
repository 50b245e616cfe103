//! The policy's tables: transitions, criteria, return, settings.

mod criteria;
mod returning;
mod settings;
mod transitions;

use std::time::Duration;

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A group, and a store that does at once what the policy says.
struct Group {
    policy: GroupPolicy,
    config: PolicyConfig,
    obs: Observation,
    actions: Vec<Action>,
}

impl Group {
    /// Streaming quietly over a link that has been up for a minute.
    fn new() -> Self {
        let obs = Observation {
            now_ms: 60_000,
            phase: Phase::Streaming,
            mode_cause: None,
            link_up: true,
            link_since_ms: 0,
            oldest_sent_age_ms: None,
            probe_rtt_ms: Some(2),
            span_bytes: 0,
            capacity_bytes: GIB,
            owns_oldest: true,
            usage_bytes_per_s: 10 * MIB,
            flush_bytes_per_s: 10 * MIB,
            link_bytes_per_s: 10 * MIB,
            ledger: LedgerTotals::default(),
            both: false,
            refused: None,
            operator: OperatorRequest::default(),
            needs_full: false,
            dirty_bytes: 0,
            run: None,
            last_run: None,
            retained_bytes: 0,
        };
        let group = Self { policy: GroupPolicy::new(), config: PolicyConfig::default(), obs, actions: Vec::new() };
        assert!(group.config.validate().is_empty());
        group
    }

    /// In delta mode for `cause`, with some dirty blocks.
    fn in_delta(cause: Cause) -> Self {
        let mut group = Self::new();
        group.obs.phase = Phase::Tracking;
        group.obs.mode_cause = Some(cause);
        group.obs.dirty_bytes = 16 * MIB;
        group
    }

    /// Weighs without carrying out.
    fn weigh(&mut self) -> Decision {
        let decision = self.policy.on_observation(&self.config, &self.obs);
        assert!(self.obs.phase.after(decision.action).is_some(), "{decision}");
        decision
    }

    /// Weighs, and carries out.
    fn step(&mut self) -> Decision {
        let decision = self.weigh();
        if decision.acts() {
            self.actions.push(decision.action);
        }
        let next = self.obs.phase.after(decision.action).unwrap();
        let begun = |kind, total_bytes, started_ms| Some(RunView { kind, started_ms, total_bytes, done_bytes: 0 });
        match decision.action {
            Action::None => {}
            Action::Switch { cause } => {
                self.obs.mode_cause = Some(cause);
                self.obs.dirty_bytes += self.obs.ledger.dr_bytes;
                self.obs.ledger = LedgerTotals::default();
            }
            Action::StartRun { kind } => {
                if kind == RunKind::Redundancy {
                    self.obs.mode_cause = Some(Cause::Redundancy);
                    self.obs.dirty_bytes = self.obs.ledger.dr_bytes;
                    self.obs.ledger = LedgerTotals::default();
                }
                self.obs.run = begun(kind, self.obs.dirty_bytes, self.obs.now_ms);
                self.obs.operator.start_run = false;
                self.obs.dirty_bytes = 0;
            }
            Action::Demote { .. } => {}
        }
        self.obs.phase = next;
        decision
    }

    /// Steps twice a second for `seconds`, or until something is done.
    fn until_action(&mut self, seconds: u64) -> Decision {
        for _ in 0..seconds * 2 {
            self.obs.now_ms += 500;
            let decision = self.step();
            if decision.acts() {
                return decision;
            }
        }
        self.weigh()
    }

    /// Nothing is done for `seconds`.
    fn quiet_for(&mut self, seconds: u64) {
        let before = self.actions.len();
        self.until_action(seconds);
        assert_eq!(self.actions[before..], [], "at {}", self.obs.now_ms);
    }

    /// The open run ends after `ms`, with so much written meanwhile.
    fn run_ends(&mut self, ms: u64, committed: bool, dirty_bytes: u64) {
        let run = self.obs.run.take().unwrap();
        self.obs.now_ms = run.started_ms + ms;
        self.obs.last_run = Some(LastRun {
            kind: run.kind,
            committed,
            bytes: run.total_bytes,
            duration_ms: ms,
            ended_ms: self.obs.now_ms,
            refused: None,
        });
        self.obs.dirty_bytes = dirty_bytes + if committed { 0 } else { run.total_bytes };
        self.obs.phase = self.obs.phase.after_run(committed).unwrap();
        if self.obs.phase == Phase::Streaming {
            self.obs.mode_cause = None;
        }
    }

    fn link(&mut self, up: bool) {
        (self.obs.link_up, self.obs.link_since_ms) = (up, self.obs.now_ms);
        self.obs.flush_bytes_per_s = if up { self.obs.usage_bytes_per_s } else { 0 };
        self.obs.probe_rtt_ms = up.then_some(2);
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
