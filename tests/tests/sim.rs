//! The pair in simulation: thousands of seeds, each with its own faults, against the promises.
//!
//! `UNDERSTUDY_SEEDS` is the number of seeds, `UNDERSTUDY_SEED` the first one; a failure prints the seed to repeat.

use understudy_tests::sim;

/// Seeds behind which every path must have been reached.
const MANY: u64 = 500;

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().expect("a number"))
}

#[test]
fn every_seed_keeps_the_promises() {
    let (first, seeds) = (env("UNDERSTUDY_SEED", 1), env("UNDERSTUDY_SEEDS", 600));
    match sim::run_many(first, seeds, 600) {
        Ok(totals) => {
            println!("seeds {first}..{}: {totals:#?}", first + seeds);
            for path in sim::PATHS.iter().filter(|_| seeds >= MANY) {
                assert!(totals.get(path).is_some_and(|n| *n > 0), "no seed came to {path:?}");
            }
        }
        Err((seed, violation)) => panic!("UNDERSTUDY_SEED={seed} UNDERSTUDY_SEEDS=1: {violation}"),
    }
}

#[test]
fn one_seed_run_twice_gives_the_same_trace() {
    for seed in [3, 77, 1234] {
        assert_eq!(sim::run(seed, 600), sim::run(seed, 600), "seed {seed}");
    }
}
