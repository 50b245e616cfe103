//! Understudy's primary service: what clients talk to.
//!
//! Data goes down, watermarks come up: the services in [`services`] turn messages into requests of the engine
//! ([`api`]), which orders them and answers when they are durable.

pub mod api;
pub mod engine;
pub mod error;
pub mod link;
pub mod node;
pub mod run;
pub mod sender;
pub mod services;
