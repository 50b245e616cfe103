//! A pair as the policy sees it: one group, a journal, a link, runs. No data, no crash: those belong to the simulation
//! of the store.

use std::collections::VecDeque;

use foldhash::{HashMap, HashSet};
use serde::Serialize;

use super::{link::LinkBudget, workload::BlockWrite};
use crate::policy::{Action, Cause, LastRun, LedgerTotals, Observation, OperatorRequest, Phase, RunKind, RunView};

/// Rates are averages over so many ticks: a second.
const RATE_TICKS: usize = 20;
const _: () = assert!(RATE_TICKS as u64 * TICK_MS == 1000);

/// Time of a step.
pub(super) const TICK_MS: u64 = 50;

/// What the pair is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PairModel {
    /// What the span may grow to.
    pub capacity_bytes: u64,
    /// Bytes in flight to the backup.
    pub window_bytes: u64,
    /// A sync of the backup's journal.
    pub sync_ms: u64,
    /// Both snapshots of a run.
    pub snapshot_ms: u64,
}

impl Default for PairModel {
    fn default() -> Self {
        Self { capacity_bytes: 1 << 30, window_bytes: 16 << 20, sync_ms: 2, snapshot_ms: 20 }
    }
}

#[derive(Debug, Clone, Copy)]
struct Record {
    at_ms: u64,
    first: u64,
    count: u64,
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    sent_ms: u64,
    acked_ms: u64,
}

#[derive(Debug)]
struct Run {
    kind: RunKind,
    started_ms: u64,
    total_bytes: u64,
    done_bytes: u64,
    /// The snapshots are taken, the first data goes out.
    ready_ms: u64,
    /// Everything is out, the commit is on its way.
    commit_ms: Option<u64>,
    /// Of the oldest write in it.
    oldest_ms: Option<u64>,
}

/// Sums over one simulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Wire {
    /// Records of continuous mode.
    pub continuous_bytes: u64,
    /// Runs.
    pub delta_bytes: u64,
}

/// The pair at one instant.
pub(super) struct Pair<'a> {
    model: PairModel,
    block_bytes: u64,
    rtt_ms: u64,
    link: LinkBudget<'a>,
    /// What records may take of the link, bytes a second; 0: all of it.
    stream_bytes_per_s: u64,
    /// What the last record took ahead.
    stream_owed: u64,
    now_ms: u64,
    link_up: bool,
    link_since_ms: u64,
    pub(super) phase: Phase,
    mode_cause: Option<Cause>,
    retained: VecDeque<Record>,
    retained_bytes: u64,
    /// The oldest retained records, in flight.
    sent: VecDeque<Sent>,
    sent_bytes: u64,
    items: HashMap<u64, u32>,
    cr_bytes: u64,
    active: HashSet<u64>,
    /// Time of the oldest write in it.
    active_oldest_ms: Option<u64>,
    run: Option<Run>,
    last_run: Option<LastRun>,
    pub(super) operator: OperatorRequest,
    usage: Rate,
    flush: Rate,
    traffic: Rate,
    pub(super) wire: Wire,
    pub(super) runs: u64,
}

impl<'a> Pair<'a> {
    pub(super) fn new(
        model: PairModel,
        block_bytes: u64,
        rtt_ms: u64,
        link: LinkBudget<'a>,
        stream_bytes_per_s: u64,
        phase: Phase,
    ) -> Self {
        Self {
            stream_bytes_per_s,
            stream_owed: 0,
            model,
            block_bytes,
            rtt_ms,
            link,
            now_ms: 0,
            link_up: true,
            link_since_ms: 0,
            phase,
            mode_cause: phase.is_delta().then_some(Cause::Operator),
            retained: VecDeque::new(),
            retained_bytes: 0,
            sent: VecDeque::new(),
            sent_bytes: 0,
            items: HashMap::default(),
            cr_bytes: 0,
            active: HashSet::default(),
            active_oldest_ms: None,
            run: None,
            last_run: None,
            operator: OperatorRequest::default(),
            usage: Rate::default(),
            flush: Rate::default(),
            traffic: Rate::default(),
            wire: Wire::default(),
            runs: 0,
        }
    }

    /// A client writes.
    pub(super) fn write(&mut self, write: BlockWrite) {
        let bytes = write.count * self.block_bytes;
        self.usage.add(bytes);
        if matches!(self.phase, Phase::Streaming | Phase::FinalRound) {
            self.retained.push_back(Record { at_ms: write.at_ms, first: write.first, count: write.count });
            self.retained_bytes += bytes;
            for block in write.first..write.first + write.count {
                *self.items.entry(block).or_default() += 1;
            }
            self.cr_bytes += bytes;
        } else {
            self.active.extend(write.first..write.first + write.count);
            self.active_oldest_ms.get_or_insert(write.at_ms);
        }
    }

    /// Time passes, up to `now_ms`; `outage` is the one it is in.
    pub(super) fn tick(&mut self, now_ms: u64, outage: Option<(u64, u64)>) {
        self.now_ms = now_ms;
        self.link.tick(now_ms, TICK_MS);
        if outage.is_none() != self.link_up {
            (self.link_up, self.link_since_ms) = (outage.is_none(), now_ms);
            // What was in flight is sent again over the next session.
            self.sent.clear();
            self.sent_bytes = 0;
        }
        if self.link_up {
            self.acknowledge();
            if self.phase == Phase::Streaming {
                self.stream();
            }
            self.run_on();
        }
        for rate in [&mut self.usage, &mut self.flush, &mut self.traffic] {
            rate.tick();
        }
    }

    fn acknowledge(&mut self) {
        while self.sent.front().is_some_and(|sent| sent.acked_ms <= self.now_ms) {
            self.sent.pop_front();
            let Some(record) = self.retained.pop_front() else { break };
            let bytes = record.count * self.block_bytes;
            self.sent_bytes -= bytes;
            self.flush.add(bytes);
            self.release(record);
        }
    }

    fn release(&mut self, record: Record) {
        let bytes = record.count * self.block_bytes;
        self.retained_bytes -= bytes;
        self.cr_bytes -= bytes;
        for block in record.first..record.first + record.count {
            if let Some(items) = self.items.get_mut(&block) {
                *items -= 1;
                if *items == 0 {
                    self.items.remove(&block);
                }
            }
        }
    }

    fn stream(&mut self) {
        let given = self.stream_bytes_per_s * TICK_MS / 1000;
        let mut left = if given == 0 { u64::MAX } else { given.saturating_sub(self.stream_owed) };
        self.stream_owed = self.stream_owed.saturating_sub(given);
        while left > 0 && self.link.has_room() && self.sent_bytes < self.model.window_bytes {
            let Some(record) = self.retained.get(self.sent.len()) else { return };
            let bytes = record.count * self.block_bytes;
            self.link.send(bytes);
            if given > 0 {
                self.stream_owed += bytes.saturating_sub(left);
                left = left.saturating_sub(bytes);
            }
            self.traffic.add(bytes);
            self.wire.continuous_bytes += bytes;
            self.sent_bytes += bytes;
            let acked_ms = self.now_ms + self.rtt_ms + self.model.sync_ms;
            self.sent.push_back(Sent { sent_ms: self.now_ms, acked_ms });
        }
    }

    fn run_on(&mut self) {
        let Some(run) = &mut self.run else { return };
        if self.now_ms < run.ready_ms {
            return;
        }
        let bytes = self.link.room().min(run.total_bytes - run.done_bytes);
        self.link.send(bytes);
        self.traffic.add(bytes);
        self.wire.delta_bytes += bytes;
        run.done_bytes += bytes;
        if run.done_bytes < run.total_bytes {
            return;
        }
        let commit_ms = *run.commit_ms.get_or_insert(self.now_ms + self.rtt_ms + self.model.sync_ms);
        if self.now_ms < commit_ms {
            return;
        }
        self.last_run = Some(LastRun {
            kind: run.kind,
            committed: true,
            bytes: run.total_bytes,
            duration_ms: self.now_ms - run.started_ms,
            ended_ms: self.now_ms,
            refused: None,
        });
        self.run = None;
        self.runs += 1;
        self.phase = self.phase.after_run(true).unwrap_or(self.phase);
        if !self.phase.is_delta() {
            self.mode_cause = None;
        }
    }

    /// Carries out what was decided.
    pub(super) fn act(&mut self, action: Action) {
        match action {
            Action::None => {}
            Action::Switch { cause } => {
                self.mark_retained();
                self.mode_cause = Some(cause);
            }
            Action::Demote { .. } => self.mark_retained(),
            Action::StartRun { kind } => {
                if kind == RunKind::Redundancy {
                    self.mark_retained();
                    self.mode_cause = Some(Cause::Redundancy);
                }
                self.operator.start_run = false;
                self.run = Some(Run {
                    kind,
                    started_ms: self.now_ms,
                    total_bytes: count(self.active.len()) * self.block_bytes,
                    done_bytes: 0,
                    ready_ms: self.now_ms + 2 * self.rtt_ms + self.model.snapshot_ms,
                    commit_ms: None,
                    oldest_ms: self.active_oldest_ms.take(),
                });
                self.active.clear();
            }
        }
        self.phase = self.phase.after(action).unwrap_or(self.phase);
    }

    fn mark_retained(&mut self) {
        if let Some(oldest) = self.retained.front() {
            self.active_oldest_ms.get_or_insert(oldest.at_ms);
        }
        self.active.extend(self.items.drain().map(|(block, _)| block));
        self.retained.clear();
        self.sent.clear();
        (self.retained_bytes, self.sent_bytes, self.cr_bytes) = (0, 0, 0);
    }

    /// The policy's view.
    pub(super) fn observation(&self) -> Observation {
        let queued_ms = |bytes: u64| {
            let rate = u128::from(self.link.rate_at(self.now_ms));
            u64::try_from((u128::from(bytes) * 1000).checked_div(rate).unwrap_or(0)).unwrap_or(u64::MAX)
        };
        Observation {
            now_ms: self.now_ms,
            phase: self.phase,
            mode_cause: self.mode_cause,
            link_up: self.link_up,
            link_since_ms: self.link_since_ms,
            oldest_sent_age_ms: self.sent.front().map(|sent| self.now_ms - sent.sent_ms),
            probe_rtt_ms: self
                .link_up
                .then(|| (self.rtt_ms + self.model.sync_ms).saturating_add(queued_ms(self.sent_bytes))),
            span_bytes: self.retained_bytes,
            capacity_bytes: self.model.capacity_bytes,
            owns_oldest: !self.retained.is_empty(),
            usage_bytes_per_s: self.usage.per_second(),
            flush_bytes_per_s: self.flush.per_second(),
            link_bytes_per_s: self.traffic.per_second(),
            ledger: LedgerTotals { cr_bytes: self.cr_bytes, dr_bytes: count(self.items.len()) * self.block_bytes },
            both: false,
            refused: None,
            operator: self.operator,
            needs_full: false,
            dirty_bytes: count(self.active.len()) * self.block_bytes,
            run: self.run.as_ref().map(|run| RunView {
                kind: run.kind,
                started_ms: run.started_ms,
                total_bytes: run.total_bytes,
                done_bytes: run.done_bytes,
            }),
            last_run: self.last_run.clone(),
            retained_bytes: self.retained_bytes,
        }
    }

    /// Age of the recovery point: of the oldest write that the backup lacks.
    pub(super) fn age_ms(&self) -> u64 {
        let run = self.run.as_ref().and_then(|run| run.oldest_ms);
        let oldest = [self.retained.front().map(|record| record.at_ms), self.active_oldest_ms, run];
        oldest.iter().flatten().min().map_or(0, |oldest| self.now_ms.saturating_sub(*oldest))
    }

    /// True when the backup lacks nothing.
    pub(super) fn is_complete(&self) -> bool {
        self.retained.is_empty() && self.active.is_empty() && self.run.is_none()
    }

    pub(super) fn span_bytes(&self) -> u64 {
        self.retained_bytes
    }

    /// Usage and traffic, bytes a second.
    pub(super) fn rates(&self) -> (u64, u64) {
        (self.usage.per_second(), self.traffic.per_second())
    }
}

fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// Bytes over the last second.
#[derive(Debug, Default)]
struct Rate {
    ticks: VecDeque<u64>,
    now: u64,
    sum: u64,
}

impl Rate {
    fn add(&mut self, bytes: u64) {
        self.now += bytes;
    }

    fn tick(&mut self) {
        self.sum += self.now;
        self.ticks.push_back(std::mem::take(&mut self.now));
        if self.ticks.len() > RATE_TICKS {
            self.sum -= self.ticks.pop_front().unwrap_or(0);
        }
    }

    fn per_second(&self) -> u64 {
        self.sum
    }
}
