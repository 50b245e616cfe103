//! Causes, phases, runs and actions, and which action is legal in which phase.
//!
//! ```text
//!                 Switch                    StartRun(Round)            run ends
//!   Streaming ------------> Tracking ------------------------> Round ----------+
//!     |   ^                  ^   |  StartRun(Full)                ^            |
//!     |   |                  |   +------------------> FullRun ----|------------+--> Tracking
//!     |   | commit   abort   |   |  StartRun(Final)               | Demote
//!     |   +--------------- FinalRound <------------+              |
//!     +------------------>   |   ------------------------------->-+
//!       StartRun(Redundancy)
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::record::RunKind;

macro_rules! words {
    ($type:ident: $($variant:ident = $word:literal),+ $(,)?) => {
        impl $type {
            /// All of them, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word of logs, metrics, JSON and settings.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// The one with this word.
            #[must_use]
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(super) use words;

/// Why a group is, or goes, in delta mode. In the order of weight: where several hold, the first is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The backup has no image to build on: first synchronisation, or it was emptied, replaced or set back.
    Initial,
    /// Somebody forced it.
    Operator,
    /// The link is interrupted (Fig. 4, step 404).
    LinkDown,
    /// The backup is up and cannot take the group's records or runs.
    BackupRefused,
    /// The staging device is too full.
    Fill,
    /// Usage exceeds the flushing rate (Fig. 8, step 420).
    Imbalance,
    /// The link delivers with an unacceptable delay.
    LinkSlow,
    /// Rounds do not get shorter, so that none can be the last.
    CannotConverge,
    /// Continuous replication would send the same blocks again and again (Fig. 10, step 448).
    Redundancy,
}
words!(Cause: Initial = "initial", Operator = "operator", LinkDown = "link_down", BackupRefused = "backup_refused",
    Fill = "fill", Imbalance = "imbalance", LinkSlow = "link_slow", CannotConverge = "cannot_converge",
    Redundancy = "redundancy");

impl Cause {
    /// True for causes that say something about how the pair copes: a return soon followed by one of them has failed.
    #[must_use]
    pub fn is_damped(self) -> bool {
        !matches!(self, Self::Initial | Self::Operator | Self::Redundancy)
    }
}

/// What a group is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Continuous mode.
    Streaming,
    /// Delta mode, no run open.
    Tracking,
    /// Delta mode, an ordinary run open: writes mark the new active set.
    Round,
    /// Delta mode, the last run open: writes from its cut on are retained and held.
    FinalRound,
    /// Delta mode, a run over the whole address space open.
    FullRun,
}
words!(Phase: Streaming = "streaming", Tracking = "tracking", Round = "round", FinalRound = "final_round",
    FullRun = "full_run");

/// What the group is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum Action {
    /// Stay as it is.
    None,
    /// Leave continuous mode: every retained record becomes a mark.
    Switch {
        /// Why.
        cause: Cause,
    },
    /// Begin a run.
    StartRun {
        /// Which.
        kind: RunKind,
    },
    /// Make the final round an ordinary one: what it held becomes marks, the run goes on.
    Demote {
        /// Why.
        cause: Cause,
    },
}

impl Phase {
    /// The phase that `action` leads to; `None`: it is illegal here.
    #[must_use]
    pub fn after(self, action: Action) -> Option<Self> {
        match (self, action) {
            (phase, Action::None) => Some(phase),
            (Self::Streaming, Action::Switch { .. }) => Some(Self::Tracking),
            (Self::Streaming, Action::StartRun { kind: RunKind::Redundancy })
            | (Self::Tracking, Action::StartRun { kind: RunKind::Final }) => Some(Self::FinalRound),
            (Self::Tracking, Action::StartRun { kind: RunKind::Round }) | (Self::FinalRound, Action::Demote { .. }) => {
                Some(Self::Round)
            }
            (Self::Tracking, Action::StartRun { kind: RunKind::Full }) => Some(Self::FullRun),
            _ => None,
        }
    }

    /// The phase behind the end of the run that is open; `None` where none is.
    #[must_use]
    pub fn after_run(self, committed: bool) -> Option<Self> {
        match self {
            Self::Streaming | Self::Tracking => None,
            Self::FinalRound if committed => Some(Self::Streaming),
            Self::Round | Self::FinalRound | Self::FullRun => Some(Self::Tracking),
        }
    }

    /// True in delta mode.
    #[must_use]
    pub fn is_delta(self) -> bool {
        self != Self::Streaming
    }
}
