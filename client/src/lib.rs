//! Understudy's Rust client.
