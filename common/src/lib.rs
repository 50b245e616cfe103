//! What both roles of Understudy are made of.
//!
//! Nothing here knows gRPC. Decisions are plain state machines; all file I/O goes through the [`storage`] seam, so that
//! the simulation can crash between any two calls.

pub mod catalog;
pub mod checksum;
pub mod journal;
pub mod mutant;
pub mod pool;
pub mod record;
pub mod state;
pub mod storage;
pub mod store;
pub mod types;
pub mod units;
