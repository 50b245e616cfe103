//! What is measured of a group, and what the policy is told of it.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;
use understudy_common::{
    policy::{Cause, GroupPolicy, LastRun, LedgerTotals, Observation, OperatorRequest, Phase, RunView},
    record::RunKind,
    state::GroupMode,
    store::Store,
    types::GroupId,
};

use super::{is_both, millis};
use crate::{link::LinkView, runner::RunCounts};

/// Over which rates are averaged.
const RATE_TIME: Duration = Duration::from_secs(2);

/// What is kept of a group between two looks.
#[derive(Default)]
pub(super) struct Group {
    /// When, submitted and released, bytes since the start.
    samples: VecDeque<(Instant, u64, u64)>,
    pub policy: GroupPolicy,
    pub operator: OperatorRequest,
    pub last_run: Option<LastRun>,
    /// The next run compares before it sends.
    pub compare_next: bool,
}

impl Group {
    /// Usage and flushing of the group, bytes a second.
    fn rates(&mut self, now: Instant, (submitted, released): (u64, u64)) -> (u64, u64) {
        self.samples.push_back((now, submitted, released));
        while self.samples.len() > 2 && self.samples[1].0 + RATE_TIME <= now {
            self.samples.pop_front();
        }
        let first = self.samples[0];
        let spent = now - first.0;
        (rate(first.1, submitted, spent), rate(first.2, released, spent))
    }
}

/// Traffic of the node on the link.
pub(super) struct Measured {
    /// When, and bytes since the start.
    samples: VecDeque<(Instant, u64)>,
    /// What runs put on the link since the start.
    pub link_bytes: u64,
    /// Of the open run, what was counted.
    pub run_sent: u64,
}

impl Measured {
    pub fn new(store: &Store) -> Self {
        let mut out = Self { samples: VecDeque::new(), link_bytes: 0, run_sent: 0 };
        out.on_look(store, Instant::now());
        out
    }

    pub fn on_look(&mut self, store: &Store, now: Instant) {
        let (_, released) = store.traffic();
        self.samples.push_back((now, self.link_bytes + released));
        while self.samples.len() > 2 && self.samples[1].0 + RATE_TIME <= now {
            self.samples.pop_front();
        }
    }

    /// Link use, bytes a second.
    fn rate(&self) -> u64 {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else { return 0 };
        rate(first.1, last.1, last.0 - first.0)
    }
}

/// Bytes a second.
fn rate(from: u64, to: u64, spent: Duration) -> u64 {
    let per_second = u128::from(to.saturating_sub(from)) * 1000 / u128::from(millis(spent).max(1));
    u64::try_from(per_second).unwrap_or(u64::MAX)
}

/// The group as it is now; `None` if it is gone.
pub(super) fn observe(
    store: &Store,
    id: GroupId,
    group: &mut Group,
    link: &LinkView,
    measured: &Measured,
    run: Option<(RunCounts, Duration)>,
    start: Instant,
) -> Option<Observation> {
    let (phase, mode_cause, needs_full, kind) = store.with_state(|state| {
        let mode = &state.groups.get(&id)?.mode;
        Some(match mode {
            GroupMode::Continuous { .. } => (Phase::Streaming, None, false, None),
            GroupMode::Delta { cause, full, run, .. } => {
                let cause = Cause::from_word(cause).or(Some(Cause::Operator));
                let kind = run.as_ref().map(|run| run.kind);
                let phase = match kind {
                    None => Phase::Tracking,
                    Some(RunKind::Round) => Phase::Round,
                    Some(RunKind::Full) => Phase::FullRun,
                    Some(RunKind::Final | RunKind::Redundancy) => Phase::FinalRound,
                };
                (phase, cause, *full, kind)
            }
        })
    })?;
    let now = Instant::now();
    let since_start = |at: Instant| millis(at.saturating_duration_since(start));
    let link_up = link.state == "attached";
    let (usage, flush) = group.rates(now, store.group_traffic(id));
    let retained = store.retained_of(id);
    let sizes = store.delta_sizes(id);
    let journal = store.config().journal;
    Some(Observation {
        now_ms: since_start(now),
        phase,
        mode_cause,
        link_up,
        link_since_ms: since_start(if link_up { link.since } else { link.heard }),
        oldest_sent_age_ms: link.oldest_sent.filter(|_| link_up).map(|at| millis(now.saturating_duration_since(at))),
        probe_rtt_ms: link.probe.filter(|_| link_up).map(millis),
        span_bytes: store.pinned_bytes(),
        capacity_bytes: journal.capacity_bytes - journal.reserve_bytes,
        owns_oldest: retained.oldest().is_some() && retained.oldest() == store.retained_oldest(),
        usage_bytes_per_s: usage,
        flush_bytes_per_s: flush,
        link_bytes_per_s: measured.rate(),
        ledger: LedgerTotals { cr_bytes: sizes.cr_bytes, dr_bytes: sizes.dr_bytes },
        both: is_both(store, id),
        refused: link.held.get(&id).map(|held| format!("{}: {}", held.cause, held.message)),
        operator: group.operator,
        needs_full,
        dirty_bytes: sizes.active_bytes,
        run: kind.map(|kind| {
            let (counts, spent) = run.unwrap_or_default();
            RunView {
                kind,
                started_ms: since_start(now).saturating_sub(millis(spent)),
                total_bytes: counts.total_bytes,
                done_bytes: counts.done_bytes,
            }
        }),
        last_run: group.last_run.clone(),
        retained_bytes: retained.bytes(),
    })
}
