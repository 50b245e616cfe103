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
    /// A write in delta mode does not mark its blocks.
    NoMark,
    /// A shrink takes away the marks behind the new end.
    ShrinkDropsMarks,
    /// Writes during a run mark the set that its commit clears.
    NoFrozenSet,
    /// A switch drops retained records without marking their blocks.
    SwitchWithoutMarks,
    /// Records that a switch released are trimmed before a checkpoint includes the switch.
    TrimBeforeSwitch,
    /// An aborted run forgets what it carried.
    AbortForgetsFrozen,
    /// The backup takes no snapshot before a run writes to its head.
    NoReplicaSnapshot,
    /// The backup takes batches and commits of a run that is over.
    OldRunAccepted,
    /// The backup answers a commit before it is durable.
    CommitBeforeSync,
    /// The backup applies stream records at or below the cut during a run.
    StreamDuringRun,
    /// The primary ships the group while its final round is open.
    ShipBeforeCommit,
    /// A run reads the head instead of the snapshot.
    RunReadsHead,
    /// A run reads its snapshot before the applier has passed the cut.
    RunReadsEarly,
    /// A run is sent before its cut is durable.
    CutNotDurable,
    /// Another backup, or an older copy of it, keeps the delta table of the one before.
    KeepTableForNewBackup,
    /// Blocks are cleared when they are sent, not when the run is committed.
    ClearWhenSent,
    /// A run goes on from where it was, and not from where the backup is.
    ResumeTooFar,
    /// A deleted volume's marks go before a checkpoint includes the record that deleted it.
    DropMarksEarly,
    /// A message of a run that was damaged on the way is believed.
    TakeDamaged,
    /// A block is repaired with what the backup holds, whether or not that is its newest version.
    RepairUnproven,
    /// A mismatch is taken for damage while writes in place are under way.
    ScrubRaces,
    /// A comparison reads the primary's head instead of its snapshot.
    VerifyReadsHead,
    /// A lane overtakes earlier writes of another one to the same blocks.
    LaneConflictIgnored,
    /// Lanes overtake control records, and are overtaken by them.
    LaneBarrierIgnored,
    /// The backup takes the newest position of a group for that of each lane.
    LanePositionOfGroup,
    /// A switch leaves snapshots that the backup does not get called mirrored.
    SwitchKeepsMirrored,
    /// A run leaves snapshots that its backup does not hold called mirrored.
    RunKeepsMirrored,
    /// The commit of a run leaves snapshots that the primary has deleted meanwhile.
    KeepDeletedSnapshots,
    /// A promotion does not raise the generation.
    PromoteKeepsGeneration,
    /// A primary that hears of a newer generation goes on.
    NoFence,
    /// A failback does not copy what the old primary had and the new one never got.
    FailbackWithoutReport,
    /// A promotion keeps what an unfinished run has written.
    PromoteWithoutRollBack,
    /// A promoted side takes a backup for one at the fork that had acknowledged more.
    FailbackBelowAcked,
    /// A segment that moves to another device is left behind by one of its owners only.
    RelocateForgetsOwner,
    /// A device goes when nobody owns a slot of it, while reads and records may still point to it.
    RemoveDeviceEarly,
    /// A damaged block that is moved gets a checksum that matches.
    RelocateMendsDamage,
    /// What a backup holds is taken for the primary's, though that runs on an old copy of its directory.
    TakeOldCopy,
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
