//! Every known hazard, switched in one at a time, is caught by the simulation within 5,000 seeds, and for what it is: the
//! broken promise is one that this hazard breaks, and the same seed keeps it without the hazard.
//!
//! Run with `--features mutants`. Prints, for each, the first seed that caught it and what it broke. With
//! `UNDERSTUDY_SEEDS` set, that many seeds are run with each, and the share that failed is printed: the table in
//! `docs/testing.md` is made so.

#![cfg(feature = "mutants")]

use understudy_common::mutant::{self, Mutant};
use understudy_sim::{self as sim, Summary, Violation};

/// Seeds within which a mutant must be caught.
const SEEDS: u64 = 5000;
const STEPS: u32 = 600;

type Run = fn(u64, u32) -> Result<Summary, Violation>;

/// What a seed breaks with the hazard switched in, if anything.
fn breaks(run: Run, mutant: Mutant, seed: u64) -> Option<String> {
    mutant::activate(Some(mutant));
    let outcome = std::panic::catch_unwind(|| run(seed, STEPS));
    mutant::activate(None);
    match outcome {
        Ok(Ok(_)) => None,
        Ok(Err(violation)) => Some(violation.to_string()),
        // An assertion of the code itself; it does not count as caught, since nobody can tell what it is about.
        Err(_) => Some("an assertion failed".to_owned()),
    }
}

/// `about`: parts of messages, one of which must be in what is broken.
fn caught(run: Run, mutant: Mutant, about: &[&str]) {
    let rate: Option<u64> = std::env::var("UNDERSTUDY_SEEDS").ok().map(|n| n.parse().expect("a number"));
    let (mut first, mut other, mut failed) = (None, None, 0);
    for seed in 1..=rate.unwrap_or(SEEDS) {
        let Some(broken) = breaks(run, mutant, seed) else { continue };
        failed += 1;
        other.get_or_insert_with(|| format!("seed {seed} broke: {broken}"));
        if first.is_none() && about.iter().any(|part| broken.contains(part)) {
            first = Some((seed, broken));
            if rate.is_none() {
                break;
            }
        }
    }
    if let Some(seeds) = rate {
        println!("{mutant:?}: {failed} of {seeds} seeds fail");
    }
    let (seed, broken) = first.unwrap_or_else(|| panic!("{mutant:?} was not caught; {other:?}"));
    println!("{mutant:?}: caught by seed {seed}: {broken}");
    assert_eq!(run(seed, STEPS).map(drop), Ok(()), "seed {seed} without {mutant:?}");
}

macro_rules! mutants {
    ($run:path: $($name:ident => $mutant:ident, $about:expr;)*) => { $(
        #[test]
        fn $name() {
            caught($run, Mutant::$mutant, &$about);
        }
    )* };
}

/// What is acknowledged is gone.
const LOST: &str = "was acknowledged and is lost";
/// The same on the backup, as the primary sees it and as the oracle does.
const LOST_ON_BACKUP: [&str; 2] = ["but had acknowledged it up to", "acknowledged as durable on both sides"];
/// An image is not that of its position.
const IMAGE: &str = "the image at";
const DAMAGED: &str = "does not match";
/// A lane has overtaken what it must not.
const OVERTAKEN: &str = "has overtaken";

mutants! {
    sim::run:
    acknowledging_before_the_sync_is_caught => AckBeforeSync, [LOST];
    acknowledging_before_the_sync_on_the_backup_is_caught => BackupAckBeforeSync, LOST_ON_BACKUP;
    trimming_too_early_is_caught => TrimTooEarly, ["was trimmed from the journal", LOST, IMAGE];
    reusing_a_freed_segment_is_caught => ReuseFreedSegment, ["last checkpoint refers to what was reused"];
    overwriting_a_referenced_segment_is_caught => OverwriteReferenced, ["the sender cannot go on: record"];
    frames_of_an_old_session_are_caught => NoSessionFence, ["an undisturbed session was refused", "an answer was refused"];
    a_stream_without_a_chain_of_positions_is_caught => NoPositionChain, ["the backup: volume"];
    cumulative_acknowledgements_are_caught => CumulativeLsnAck, LOST_ON_BACKUP;
    applying_without_a_journal_is_caught => ApplyWithoutJournal, ["the backup: volume", LOST_ON_BACKUP[0], LOST_ON_BACKUP[1]];
    a_journal_without_a_new_epoch_is_caught => NoNewEpoch, [IMAGE];
    applying_before_the_sync_is_caught => ApplyBeforeSync, [IMAGE, "and does not wait for it"];
    a_new_file_without_its_directory_is_caught => NoDirectorySync, [LOST, "the checkpoint covers records"];
    a_repeated_sequence_is_caught => NoSequenceCheck, [IMAGE, "the newest write is"];
    a_root_before_its_devices_is_caught => RootBeforeDevices, [DAMAGED];
    reusing_a_segment_under_a_read_is_caught => ReuseUnderRead, ["a read that was held open"];
    a_failed_sync_that_is_ignored_is_caught => IgnoreFailedSync, ["failed, and it goes on"];
    corruption_taken_for_a_torn_tail_is_caught => CorruptionIsTornTail, ["damaged in its middle was taken for one that ends"];
    a_lane_that_overtakes_writes_to_its_blocks_is_caught => LaneConflictIgnored, [OVERTAKEN];
    a_lane_that_overtakes_the_catalogue_is_caught => LaneBarrierIgnored, [OVERTAKEN, "the backup cannot: volume"];
    a_position_of_the_group_in_place_of_its_lanes_is_caught => LanePositionOfGroup, ["the backup: volume", "an undisturbed session was refused"];
}

/// The sides differ in a block, and nothing says so.
const UNMARKED: &str = "is not marked and not retained";
/// A run ships what was not there at its cut.
const RUN_DATA: &str = "not in the image at its cut";

mutants! {
    sim::run_delta:
    a_write_that_does_not_mark_is_caught => NoMark, [UNMARKED];
    a_shrink_that_drops_marks_is_caught => ShrinkDropsMarks, [UNMARKED];
    a_table_of_one_set_is_caught => NoFrozenSet, [UNMARKED];
    a_switch_that_marks_nothing_is_caught => SwitchWithoutMarks, [UNMARKED];
    trimming_before_a_switch_is_held_is_caught => TrimBeforeSwitch, [UNMARKED, "was trimmed from the journal"];
    an_abort_that_forgets_its_blocks_is_caught => AbortForgetsFrozen, [UNMARKED];
    a_run_without_a_snapshot_on_the_backup_is_caught => NoReplicaSnapshot, ["the backup: volume"];
    messages_of_an_old_run_are_caught => OldRunAccepted, ["the backup: volume", "the backup at rest", UNMARKED];
    a_commit_answered_before_its_sync_is_caught => CommitBeforeSync, [UNMARKED, "but the backup has it durably up to"];
    stream_records_during_a_run_are_caught => StreamDuringRun, ["the backup: volume"];
    shipping_before_the_commit_is_caught => ShipBeforeCommit, ["the backup: volume", "an undisturbed session was refused"];
    run_data_read_from_the_head_is_caught => RunReadsHead, [RUN_DATA];
    run_data_read_too_early_is_caught => RunReadsEarly, [RUN_DATA];
    a_run_sent_before_its_cut_is_durable_is_caught => CutNotDurable, [UNMARKED, "the backup: volume", "the backup at"];
    a_table_that_outlives_its_backup_is_caught => KeepTableForNewBackup, [UNMARKED, "the backup: volume"];
    a_mark_cleared_when_its_block_is_sent_is_caught => ClearWhenSent, [UNMARKED];
    marks_dropped_before_their_volume_is_gone_are_caught => DropMarksEarly, [UNMARKED];
    a_damaged_message_that_is_taken_is_caught => TakeDamaged, ["with a flipped bit was taken"];
    a_run_that_goes_on_too_far_is_caught => ResumeTooFar, ["the backup: volume", UNMARKED];
    snapshots_that_the_backup_never_got_are_caught => SwitchKeepsMirrored, ["is called mirrored, and the backup does not get it"];
    snapshots_that_another_backup_lacks_are_caught => RunKeepsMirrored, ["lacks the mirrored snapshot"];
    snapshots_left_behind_by_a_commit_are_caught => KeepDeletedSnapshots, ["which is deleted"];
}

mutants! {
    sim::run_roles:
    a_promotion_without_a_new_generation_is_caught => PromoteKeepsGeneration, ["a promotion of generation"];
    an_old_primary_that_is_not_fenced_is_caught => NoFence, ["was superseded, knows it, and took a write"];
    a_failback_without_the_old_side_is_caught => FailbackWithoutReport, [UNMARKED];
    a_failback_below_what_was_acknowledged_is_caught => FailbackBelowAcked, [UNMARKED];
    an_old_copy_of_a_primary_that_is_taken_is_caught => TakeOldCopy, [UNMARKED];
    a_promotion_that_keeps_an_unfinished_run_is_caught => PromoteWithoutRollBack, ["in the image of its position"];
}
