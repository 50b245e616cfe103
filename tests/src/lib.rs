//! Harness for whole-system tests.

pub mod sim;
pub mod process;
pub mod proxy;
