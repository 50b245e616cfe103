//! Every known hazard, switched in one at a time, is caught by the simulation within 5,000 seeds, and for what it is: the
//! broken promise is one that this hazard breaks, and the same seed keeps it without the hazard.
//!
//! Run with `--features mutants`. Prints, for each, the first seed that caught it and what it broke. With
//! `UNDERSTUDY_SEEDS` set, that many seeds are run with each, and the share that failed is printed: the table in
//! `docs/testing.md` is made so.

#![cfg(feature = "mutants")]

use understudy_common::mutant::{self, Mutant};
use understudy_tests::sim;

/// Seeds within which a mutant must be caught.
const SEEDS: u64 = 5000;
const STEPS: u32 = 600;

/// What a seed breaks with the hazard switched in, if anything.
fn breaks(mutant: Mutant, seed: u64) -> Option<String> {
    mutant::activate(Some(mutant));
    let outcome = std::panic::catch_unwind(|| sim::run(seed, STEPS));
    mutant::activate(None);
    match outcome {
        Ok(Ok(_)) => None,
        Ok(Err(violation)) => Some(violation.to_string()),
        // An assertion of the code itself; it does not count as caught, since nobody can tell what it is about.
        Err(_) => Some("an assertion failed".to_owned()),
    }
}

/// `about`: parts of messages, one of which must be in what is broken.
fn caught(mutant: Mutant, about: &[&str]) {
    let rate: Option<u64> = std::env::var("UNDERSTUDY_SEEDS").ok().map(|n| n.parse().expect("a number"));
    let (mut first, mut failed) = (None, 0);
    for seed in 1..=rate.unwrap_or(SEEDS) {
        let Some(broken) = breaks(mutant, seed) else { continue };
        failed += 1;
        if first.is_none() && about.iter().any(|part| broken.contains(part)) {
            first = Some((seed, broken));
            if rate.is_none() {
                break;
            }
        }
    }
    let (seed, broken) = first.unwrap_or_else(|| panic!("{mutant:?} was not caught"));
    println!("{mutant:?}: caught by seed {seed}: {broken}");
    if let Some(seeds) = rate {
        println!("{mutant:?}: {failed} of {seeds} seeds fail");
    }
    assert_eq!(sim::run(seed, STEPS).map(drop), Ok(()), "seed {seed} without {mutant:?}");
}

macro_rules! mutants {
    ($($name:ident => $mutant:ident, $about:expr;)*) => { $(
        #[test]
        fn $name() {
            caught(Mutant::$mutant, &$about);
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

mutants! {
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
}
