//! Known hazards that can be switched on, so that tests prove they would notice.
//!
//! Without the feature `mutants`, [`Mutant::on`] is a constant `false` and the compiler removes the branch.

/// A hazard from `docs/testing.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Mutant {
    /// The primary acknowledges before its journal is synced.
    AckBeforeSync = 1,
    /// The backup acknowledges before its journal is synced.
    BackupAckBeforeSync,
    /// The journal is trimmed up to the head instead of the checkpoint.
    TrimTooEarly,
    /// A freed segment is reused before the checkpoint that covers the free.
    ReuseFreedSegment,
    /// A freed segment is reused while a read holds its address.
    ReuseUnderRead,
    /// A small write goes in place into a segment that an unshipped record refers to.
    OverwriteReferenced,
    /// The backup does not compare the session of a frame.
    NoSessionFence,
    /// The backup does not compare the chain of positions.
    NoPositionChain,
    /// An acknowledgement releases every record up to an LSN, also of groups that are held.
    CumulativeLsnAck,
    /// The backup applies records in place without a journal.
    ApplyWithoutJournal,
    /// A bad record in the middle of the journal is taken for its end.
    CorruptionIsTornTail,
    /// Recovery does not start a new epoch.
    NoNewEpoch,
    /// Writes in place start before their record is durable.
    ApplyBeforeSync,
    /// A new file is synced without its directory.
    NoDirectorySync,
    /// The store goes on after a failed sync.
    IgnoreFailedSync,
    /// A repeated client sequence is applied again.
    NoSequenceCheck,
    /// The checkpoint is made visible before the devices are synced.
    RootBeforeDevices,
}

#[cfg(feature = "mutants")]
mod switch {
    use std::cell::Cell;

    thread_local! {
        static ACTIVE: Cell<u8> = const { Cell::new(0) };
    }

    /// Switches one mutant on for this thread, or all off.
    pub fn activate(mutant: Option<super::Mutant>) {
        ACTIVE.set(mutant.map_or(0, |m| m as u8));
    }

    impl super::Mutant {
        /// True while this hazard is switched on.
        #[must_use]
        pub fn on(self) -> bool {
            ACTIVE.get() == self as u8
        }
    }
}

#[cfg(feature = "mutants")]
pub use switch::activate;

#[cfg(not(feature = "mutants"))]
impl Mutant {
    /// Always false without the feature `mutants`.
    #[must_use]
    #[inline(always)]
    pub fn on(self) -> bool {
        false
    }
}
