//! Tests of the pool as a whole.

#![allow(clippy::cast_possible_truncation, reason = "small numbers")]

mod devices;
mod model;
#[cfg(feature = "mutants")]
mod mutants;
