//! What both roles of Understudy are made of.
//!
//! Nothing here knows gRPC. Decisions are plain state machines; all file I/O goes through the [`storage`] seam, so that
//! the simulation can crash between any two calls.

pub mod checksum;
pub mod mutant;
pub mod record;
pub mod storage;
pub mod types;
pub mod units;
