//! Figures of `docs/formats.md` and of the architecture's bounds, as tests.

use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

use crate::{
    delta::{BlockSet, Items, Ledger},
    types::{BlockRange, VolumeId},
};

/// Blocks of 4 KiB in 1 TiB.
const TEBIBYTE: u64 = 1 << 28;
const MIB: usize = 1 << 20;

#[test]
fn everything_of_a_tebibyte_takes_next_to_nothing() {
    let mut set = BlockSet::new();
    set.insert_all(TEBIBYTE);
    assert!(set.memory_bytes() < 256, "{}", set.memory_bytes());
    // As a write from the first to the last block makes it.
    let mut set = BlockSet::new();
    (0..TEBIBYTE / 256).for_each(|n| set.insert_range(256 * n, 256));
    assert!(set.memory_bytes() < 256, "{}", set.memory_bytes());
}

#[test]
fn the_worst_set_of_a_tebibyte_takes_32_mib() {
    // Every second block: no page is full, none is runs.
    let mut page = BlockSet::new();
    (0..16 * 1024).for_each(|n| page.insert_range(2 * n, 1));
    let row = page.take_changed().rows.swap_remove(0).1.unwrap();
    let set = BlockSet::from_rows((0..8192).map(|page| (page, row.clone()))).unwrap();
    assert_eq!(set.len(), TEBIBYTE / 2);
    let bytes = set.memory_bytes();
    println!("every second block of 1 TiB: {:.1} MiB", bytes as f64 / MIB as f64);
    assert!(bytes <= 33 * MIB, "{bytes}");
}

#[test]
fn a_sparse_set_of_a_tebibyte_takes_little() {
    let mut rng = Pcg64Mcg::seed_from_u64(1);
    let mut set = BlockSet::new();
    (0..100_000).for_each(|_| set.insert_range(rng.random_range(0..TEBIBYTE), 1));
    let bytes = set.memory_bytes();
    println!("100,000 blocks anywhere in 1 TiB: {:.1} MiB", bytes as f64 / MIB as f64);
    assert!(bytes < 2 * MIB, "{bytes}");
}

/// Memory of a ledger of so many blocks anywhere in 1 TiB, each with one to three items, and how long an item took.
fn ledger_of(blocks: u64) -> usize {
    let mut rng = Pcg64Mcg::seed_from_u64(2);
    let mut ledger = Ledger::new();
    let mut items = 0_u32;
    let start = std::time::Instant::now();
    for _ in 0..blocks {
        let range = BlockRange { volume: VolumeId(1), first: rng.random_range(0..TEBIBYTE), count: 1 };
        for _ in 0..rng.random_range(1..=3) {
            ledger.on_retained(range, Items::Data { block_bytes: 4096 });
            items += 1;
        }
    }
    let bytes = ledger.memory_bytes();
    println!("{blocks} blocks: {:.1} MiB, {:?} an item", bytes as f64 / MIB as f64, start.elapsed() / items);
    let start = std::time::Instant::now();
    let taken = ledger.take();
    println!("taken in {:?}", start.elapsed());
    drop(taken);
    bytes
}

#[test]
fn a_ledger_of_a_million_blocks_takes_little() {
    let bytes = ledger_of(1_000_000);
    assert!(bytes < 24 * MIB, "{bytes}");
}

#[test]
#[ignore = "the figure for ten million, which takes some seconds"]
fn a_ledger_of_ten_million_blocks_takes_less_than_100_mib() {
    let bytes = ledger_of(10_000_000);
    assert!(bytes < 100 * MIB, "{bytes}");
}

#[test]
fn a_ledger_of_ten_million_blocks_in_order_takes_next_to_nothing() {
    let mut ledger = Ledger::new();
    for n in 0..10_000_000 / 64 {
        let range = BlockRange { volume: VolumeId(1), first: 64 * n, count: 64 };
        ledger.on_retained(range, Items::Data { block_bytes: 4096 });
    }
    assert!(ledger.memory_bytes() < 1024, "{}", ledger.memory_bytes());
}
