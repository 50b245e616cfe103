//! The pair in simulation: thousands of seeds, each with its own faults, against the promises.
//!
//! `UNDERSTUDY_SEEDS` is the number of seeds, `UNDERSTUDY_SEED` the first one; a failure prints the seed to repeat.

use understudy_sim::{self as sim, Summary, Violation};

/// Seeds behind which every path must have been reached.
const MANY: u64 = 500;

type Run = fn(u64, u32) -> Result<Summary, Violation>;

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().expect("a number"))
}

fn every_seed(run: Run, paths: &[&str]) {
    let (first, seeds) = (env("UNDERSTUDY_SEED", 1), env("UNDERSTUDY_SEEDS", 600));
    match sim::run_many(run, first, seeds, 600) {
        Ok(totals) => {
            println!("seeds {first}..{}: {totals:#?}", first + seeds);
            if let Some(marked) = totals.get("blocks marked at cuts").filter(|marked| **marked > 0) {
                let equal = totals.get("blocks marked and equal").copied().unwrap_or_default();
                println!("{equal} of {marked} blocks that runs carried were equal: {:.1} %", percent(equal, *marked));
            }
            for path in paths.iter().filter(|_| seeds >= MANY) {
                assert!(totals.get(path).is_some_and(|n| *n > 0), "no seed came to {path:?}");
            }
        }
        Err((seed, violation)) => panic!("UNDERSTUDY_SEED={seed} UNDERSTUDY_SEEDS=1: {violation}"),
    }
}

#[allow(clippy::cast_precision_loss, reason = "a share for people")]
fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole as f64
}

#[test]
fn every_seed_keeps_the_promises() {
    every_seed(sim::run, sim::PATHS);
}

#[test]
fn every_seed_keeps_the_promises_in_delta_mode() {
    every_seed(sim::run_delta, sim::DELTA_PATHS);
}

#[test]
fn every_seed_survives_changes_of_role() {
    every_seed(sim::run_roles, sim::ROLE_PATHS);
}

#[test]
fn one_seed_run_twice_gives_the_same_trace() {
    for seed in [3, 77, 1234] {
        assert_eq!(sim::run(seed, 600), sim::run(seed, 600), "seed {seed}");
        assert_eq!(sim::run_delta(seed, 600), sim::run_delta(seed, 600), "seed {seed}");
    }
}
