//! Understudy backup service.

pub mod receiver;
