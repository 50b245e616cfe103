//! Harness for whole-system tests.

pub mod process;
pub mod proxy;
pub mod sim;
pub mod virtual_pair;
