//! Understudy's primary service: what clients talk to.
//!
//! Data goes down, watermarks come up: the services in [`services`] turn messages into requests of the engine
//! ([`api`]), which orders them and answers when they are durable.

pub mod api;
mod compare;
mod control;
pub mod engine;
pub mod error;
pub mod link;
pub mod node;
mod pace;
mod repair;
pub mod replicator;
pub mod run;
pub mod runner;
mod schedule;
pub mod sender;
pub mod services;
pub mod snapshot_schedule;
mod standing;
pub mod verify;
mod waiters;
mod window;
