//! Understudy's protocol: generated types, the codec they travel with, and the conversion between wire and domain.
//!
//! This crate knows no service: it opens no socket and keeps no state.

pub mod codec;
pub mod convert;
pub mod json;
pub mod methods;
pub mod policy;
pub mod pool;
pub mod seal;
pub mod together;

/// Package `understudy.v1`.
#[allow(missing_docs)]
pub mod v1 {
    tonic::include_proto!("understudy.v1");
}

/// The compiled descriptors, for the reflection service.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/understudy_descriptor.bin"));
