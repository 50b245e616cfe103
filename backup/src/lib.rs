//! Understudy's backup service: holds what the primary has, and serves it to readers.

pub mod api;
pub mod clones;
pub mod error;
pub mod node;
pub mod receiver;
pub mod run;
pub mod run_receiver;
pub mod services;
