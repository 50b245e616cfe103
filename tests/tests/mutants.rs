//! Every known hazard, switched in one at a time, is caught by the simulation within 5,000 seeds.
//!
//! Run with `--features mutants`. Prints, for each, the first seed that caught it and what it broke.

#![cfg(feature = "mutants")]

use understudy_common::mutant::{self, Mutant};
use understudy_tests::sim;

/// Seeds within which a mutant must be caught.
const SEEDS: u64 = 5000;
const STEPS: u32 = 600;

fn caught(mutant: Mutant) {
    mutant::activate(Some(mutant));
    for seed in 1..=SEEDS {
        // A broken invariant may also show as a failed assertion of the code itself.
        let outcome = std::panic::catch_unwind(|| sim::run(seed, STEPS));
        let how = match outcome {
            Ok(Ok(_)) => continue,
            Ok(Err(violation)) => violation.to_string(),
            Err(_) => "an assertion failed".to_owned(),
        };
        mutant::activate(None);
        println!("{mutant:?}: caught by seed {seed}: {how}");
        return;
    }
    mutant::activate(None);
    panic!("{mutant:?} was not caught by {SEEDS} seeds");
}

macro_rules! mutants {
    ($($name:ident => $mutant:ident,)*) => { $(
        #[test]
        fn $name() {
            caught(Mutant::$mutant);
        }
    )* };
}

mutants! {
    acknowledging_before_the_sync_is_caught => AckBeforeSync,
    acknowledging_before_the_sync_on_the_backup_is_caught => BackupAckBeforeSync,
    trimming_too_early_is_caught => TrimTooEarly,
    reusing_a_freed_segment_is_caught => ReuseFreedSegment,
    overwriting_a_referenced_segment_is_caught => OverwriteReferenced,
    frames_of_an_old_session_are_caught => NoSessionFence,
    a_stream_without_a_chain_of_positions_is_caught => NoPositionChain,
    cumulative_acknowledgements_are_caught => CumulativeLsnAck,
    applying_without_a_journal_is_caught => ApplyWithoutJournal,
    a_journal_without_a_new_epoch_is_caught => NoNewEpoch,
    applying_before_the_sync_is_caught => ApplyBeforeSync,
    a_new_file_without_its_directory_is_caught => NoDirectorySync,
    a_repeated_sequence_is_caught => NoSequenceCheck,
    a_root_before_its_devices_is_caught => RootBeforeDevices,
    reusing_a_segment_under_a_read_is_caught => ReuseUnderRead,
    a_failed_sync_that_is_ignored_is_caught => IgnoreFailedSync,
    corruption_taken_for_a_torn_tail_is_caught => CorruptionIsTornTail,
}
