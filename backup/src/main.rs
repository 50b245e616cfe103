//! The `understudy-backup` binary.

fn main() {}
