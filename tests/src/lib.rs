//! Harness for whole-system tests.

pub mod process;
pub mod virtual_pair;
