//! The model notices the hazards that the pool must avoid.

use std::panic::catch_unwind;

use super::model::run_seed;
use crate::mutant::{Mutant, activate};

fn is_caught(mutant: Mutant) {
    activate(Some(mutant));
    let caught = (0..200).find(|seed| catch_unwind(|| run_seed(*seed, 300)).is_err());
    activate(None);
    assert!(caught.is_some(), "{mutant:?} was not noticed");
}

#[test]
fn reuse_of_a_freed_segment_is_caught() {
    is_caught(Mutant::ReuseFreedSegment);
}

#[test]
fn reuse_under_a_read_is_caught() {
    is_caught(Mutant::ReuseUnderRead);
}

#[test]
fn overwriting_a_referenced_segment_is_caught() {
    is_caught(Mutant::OverwriteReferenced);
}

#[test]
fn an_owner_that_is_left_behind_is_caught() {
    is_caught(Mutant::RelocateForgetsOwner);
}

#[test]
fn a_device_that_goes_too_early_is_caught() {
    is_caught(Mutant::RemoveDeviceEarly);
}

#[test]
fn damage_that_is_mended_by_a_move_is_caught() {
    activate(Some(Mutant::RelocateMendsDamage));
    let caught = catch_unwind(super::devices::moved_damage).is_err();
    activate(None);
    assert!(caught);
}
