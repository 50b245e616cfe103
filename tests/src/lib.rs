//! Harness for whole-system tests.

pub mod sim;
