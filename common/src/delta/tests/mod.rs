mod blocks;
mod format;
mod ledger;
mod memory;
mod table;

/// Blocks of a page.
const PAGE: u64 = 32 * 1024;
