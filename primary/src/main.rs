//! The `understudy-primary` binary.

fn main() {}
