//! Which blocks the backup lacks: the delta table (Fig. 5) and the redundancy ledger (Fig. 9).
//!
//! Pure: no clock, no I/O, no locks. Who owns them decides under which lock a write marks a block, and stores their rows
//! in the catalogue.

mod blocks;
mod counted;
mod ledger;
mod page;
mod rows;
mod table;

pub use blocks::{BLOCKS_MAX, BlockSet, Changes};
pub use ledger::{Items, Ledger, Taken};
pub use rows::SetRow;
pub use table::{DeltaTable, SetKind, TableChanges};

#[cfg(test)]
mod tests;
