//! Understudy primary service.

pub mod engine;
pub mod sender;
