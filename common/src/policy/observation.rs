//! What the policy may know: one group at one instant.
//!
//! An observation is all the input of a decision. Written one per line they are the observation log, from which
//! [`super::simulate`] makes the same decisions again; [`super::Recorder`] writes it.

use serde::{Deserialize, Serialize};

use super::{Cause, Phase, RunKind};

/// One group at one instant. Times are milliseconds of one monotonic clock with any origin; rates are averages over
/// the last seconds, taken by whoever observes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// Now.
    pub now_ms: u64,
    /// What the group is doing.
    pub phase: Phase,
    /// Why it was switched to delta; `None` in continuous mode.
    #[serde(default)]
    pub mode_cause: Option<Cause>,
    /// The backup is attached and answers heartbeats.
    pub link_up: bool,
    /// Since when it is up, or down; down begins with the last sign of life.
    pub link_since_ms: u64,
    /// Age of the oldest record *sent* and not acknowledged. Held and paced records were not sent.
    #[serde(default)]
    pub oldest_sent_age_ms: Option<u64>,
    /// Round trip of the last probe, with a sync of the backup's journal in it; `None`: none was answered since the
    /// link came up.
    #[serde(default)]
    pub probe_rtt_ms: Option<u64>,
    /// From the oldest retained record of any group to the head of the journal, with referenced segments. What lies
    /// before it goes with a checkpoint, whatever the mode.
    pub span_bytes: u64,
    /// What the span may grow to: the journal, or the group's share of it.
    pub capacity_bytes: u64,
    /// The group holds the oldest retained record, so that its switch shortens the span.
    pub owns_oldest: bool,
    /// Client writes into the journal. Run traffic is never usage.
    pub usage_bytes_per_s: u64,
    /// Retained records released by the backup's answers. Run traffic is never flushing.
    pub flush_bytes_per_s: u64,
    /// Everything on the link, runs too.
    #[serde(default)]
    pub link_bytes_per_s: u64,
    /// Of the records the group retains.
    #[serde(default)]
    pub ledger: LedgerTotals,
    /// A volume of the group is acknowledged by both sides.
    #[serde(default)]
    pub both: bool,
    /// Why the backup, which is up, cannot take this group's records; `None` once it can.
    #[serde(default)]
    pub refused: Option<String>,
    /// What somebody asked for.
    #[serde(default)]
    pub operator: OperatorRequest,
    /// The backup has no image that a delta can build on.
    #[serde(default)]
    pub needs_full: bool,
    /// Whole blocks marked in the active set.
    #[serde(default)]
    pub dirty_bytes: u64,
    /// The run that is open.
    #[serde(default)]
    pub run: Option<RunView>,
    /// The run that ended last.
    #[serde(default)]
    pub last_run: Option<LastRun>,
    /// Of this group.
    #[serde(default)]
    pub retained_bytes: u64,
}

impl Observation {
    /// What the span may still grow by.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.capacity_bytes.saturating_sub(self.span_bytes)
    }
}

/// What an operator asked for. Both at once: runs on demand while delta mode is forced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OperatorRequest {
    /// Be in delta mode until this is taken back.
    pub hold_delta: bool,
    /// Begin one run now. Whoever observes takes it back when a run has begun.
    pub start_run: bool,
}

/// Sums of the redundancy ledger (Fig. 9, fields 541 and 542).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LedgerTotals {
    /// What continuous replication of everything retained would send (step 444), in whole blocks.
    pub cr_bytes: u64,
    /// What one delta replication of the same blocks would send (step 445).
    pub dr_bytes: u64,
}

impl LedgerTotals {
    /// CR / DR (step 446); `None` where nothing is retained.
    #[must_use]
    pub fn ratio(self) -> Option<super::Ratio> {
        super::Ratio::of(self.cr_bytes, self.dr_bytes)
    }
}

/// A run that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunView {
    /// As it was begun; a demoted one may keep its kind.
    pub kind: RunKind,
    /// When it was begun.
    pub started_ms: u64,
    /// Of its frozen set.
    pub total_bytes: u64,
    /// Settled so far.
    pub done_bytes: u64,
}

/// A run that ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastRun {
    /// As it was begun.
    pub kind: RunKind,
    /// Or aborted.
    pub committed: bool,
    /// Whole blocks it settled: sent, elided, or found equal on the backup.
    pub bytes: u64,
    /// From its beginning to its end.
    pub duration_ms: u64,
    /// When. A run that ended before this process began is not reported.
    pub ended_ms: u64,
    /// Why either side refused it (space, version); `None` where nobody did.
    #[serde(default)]
    pub refused: Option<String>,
}
