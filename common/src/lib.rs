//! What both roles of Understudy are made of.
//!
//! Nothing here knows gRPC. Decisions are plain state machines; all file I/O goes through the [`storage`] seam, so that
//! the simulation can crash between any two calls.

pub mod admin;
pub mod catalog;
pub mod checksum;
pub mod config;
pub mod delta;
pub mod events;
pub mod grpc;
pub mod history;
pub mod journal;
pub mod lane;
pub mod lives;
pub mod mutant;
pub mod policy;
pub mod pool;
pub mod process;
pub mod proxy;
pub mod record;
pub mod scrub;
pub mod serve;
pub mod state;
pub mod storage;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod types;
pub mod units;
