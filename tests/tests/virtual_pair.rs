//! The whole pair, services and sockets included, in virtual time: many seeds, each with its own faults.
//!
//! With `RUSTFLAGS="--cfg tokio_unstable"` a seed decides everything. Without, tokio wakes the waiters of a channel in an
//! order of its own, so that a seed decides the faults and writes, but not every interleaving.
//!
//! `UNDERSTUDY_SEEDS` is the number of seeds, `UNDERSTUDY_SEED` the first one; a failure prints the seed to repeat.

use std::{ops::Range, thread, time::Duration};

use understudy_tests::virtual_pair::{self, Summary};

/// Virtual time with faults.
const DISTURBED: Duration = Duration::from_secs(8);

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().expect("a number"))
}

#[test]
fn every_seed_keeps_the_promises() {
    let (first, seeds) = (env("UNDERSTUDY_SEED", 1), env("UNDERSTUDY_SEEDS", 20));
    // A seed runs on one thread; two of them use the cores of a small machine.
    let parts = thread::scope(|scope| {
        let parts = [0, 1].map(|n| scope.spawn(move || run_every_second(first + n..first + seeds)));
        parts.map(|part| part.join().expect("every seed keeps the promises"))
    });
    let mut totals = [0; 7];
    for part in parts {
        totals.iter_mut().zip(part).for_each(|(total, counted)| *total += counted);
    }
    let [acked, in_delta, changes, retries, images, cuts, restarts] = totals;
    println!(
        "seeds {first}..{}: {acked} writes acknowledged, {in_delta} of them in delta mode, {changes} changes of mode, \
         {retries} attempts repeated, {images} images compared, {cuts} disturbed links, {restarts} restarts",
        first + seeds
    );
    assert!(seeds < 10 || totals.iter().all(|total| *total > 0), "something was not tried");
}

/// What was counted; the first violation is a panic that names its seed.
fn run_every_second(seeds: Range<u64>) -> [u64; 7] {
    let mut totals = [0; 7];
    for seed in seeds.step_by(2) {
        match virtual_pair::run(seed, DISTURBED) {
            Ok(run) => {
                let Summary { acked, acked_in_delta, mode_changes, retries, images, cuts, restarts, .. } = run;
                let counted = [acked, acked_in_delta, mode_changes, retries, images, cuts, restarts];
                totals.iter_mut().zip(counted).for_each(|(total, counted)| *total += counted);
            }
            Err(violation) => panic!(
                "{}{}\nUNDERSTUDY_SEED={seed} UNDERSTUDY_SEEDS=1 .ci/run virtual",
                violation.report, violation.what
            ),
        }
    }
    totals
}

#[cfg(tokio_unstable)]
#[test]
fn one_seed_run_twice_gives_the_same_trace() {
    for seed in [3, 77, 1234] {
        let once = virtual_pair::run(seed, DISTURBED).map_err(|violation| violation.what);
        assert_eq!(once, virtual_pair::run(seed, DISTURBED).map_err(|violation| violation.what), "seed {seed}");
    }
}
