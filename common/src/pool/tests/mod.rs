//! Tests of the pool as a whole.

mod devices;
mod model;
#[cfg(feature = "mutants")]
mod mutants;
