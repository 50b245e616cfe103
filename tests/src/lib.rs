//! Harness for whole-system tests.

pub mod integrity;
pub mod process;
pub mod sim;
pub mod virtual_pair;
