//! What a checkpoint of random map changes costs in three kinds of store: chunks of 64 entries in redb (what the pool
//! does), one redb row for each entry, and a bare log of the changed entries.
//!
//! `cargo run --release -p understudy-common --example checkpoint_bench [DIRECTORY]` makes files in DIRECTORY (default:
//! the system's temporary directory), prints a table and removes them. The map has 1,048,576 entries; each store is
//! filled first, then each number of random changes is committed durably, once.

#![allow(clippy::cast_possible_truncation, reason = "an example with a map of a million entries")]

use std::{
    error::Error,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
    time::Instant,
};

use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;
use redb::{Database, TableDefinition};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const ENTRIES: u64 = 1 << 20;
const CHUNK: u64 = 64;
/// An extent as the pool writes it: index, flags, segment, mask of 16 blocks.
const ENTRY_BYTES: usize = 12;
const CACHE_BYTES: usize = 8 * 1024 * 1024;
const CHUNKS: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("chunks");
const ROWS: TableDefinition<'_, (u64, u64), &[u8]> = TableDefinition::new("rows");

fn main() -> Result<()> {
    let dir = std::env::args().nth(1).map_or_else(std::env::temp_dir, Into::into);
    let dir = dir.join(format!("checkpoint_bench.{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let outcome = run(&dir);
    std::fs::remove_dir_all(&dir)?;
    outcome
}

fn run(dir: &Path) -> Result<()> {
    let mut map: Vec<u64> = (0..ENTRIES).collect();
    let chunks = Database::builder().set_cache_size(CACHE_BYTES).create(dir.join("chunks.redb"))?;
    let rows = Database::builder().set_cache_size(CACHE_BYTES).create(dir.join("rows.redb"))?;
    let mut log = File::create(dir.join("log"))?;
    let all: Vec<u64> = (0..ENTRIES).collect();
    write_chunks(&chunks, &map, &all)?;
    write_rows(&rows, &map, &all)?;

    println!("| changed entries | chunks of 64 in redb | one row each in redb | bare log |");
    println!("| --- | --- | --- | --- |");
    let mut rng = Pcg64Mcg::seed_from_u64(1);
    for count in [10_000, 100_000, 600_000] {
        let mut changed: Vec<u64> = (0..count).map(|_| rng.random_range(0..ENTRIES)).collect();
        changed.sort_unstable();
        changed.dedup();
        changed.iter().for_each(|entry| map[*entry as usize] += ENTRIES);
        let by_chunk = measure(|| write_chunks(&chunks, &map, &changed))?;
        let by_row = measure(|| write_rows(&rows, &map, &changed))?;
        let by_log = measure(|| append(&mut log, &map, &changed))?;
        println!("| {count} | {by_chunk} | {by_row} | {by_log} |");
    }
    Ok(())
}

/// Runs `commit` and says how long it took and what it wrote.
fn measure(commit: impl FnOnce() -> Result<()>) -> Result<String> {
    let (before, start) = (written()?, Instant::now());
    commit()?;
    let ms = start.elapsed().as_secs_f64() * 1e3;
    #[allow(clippy::cast_precision_loss, reason = "a table for people")]
    let mib = (written()? - before) as f64 / 1_048_576.0;
    Ok(format!("{ms:.0} ms, {mib:.1} MiB"))
}

/// Bytes this process has passed to `write` and its like so far.
fn written() -> Result<u64> {
    let mut text = String::new();
    File::open("/proc/self/io")?.read_to_string(&mut text)?;
    let line = text.lines().find_map(|l| l.strip_prefix("wchar: ")).ok_or("/proc/self/io without wchar")?;
    Ok(line.parse()?)
}

fn entry_bytes(map: &[u64], entry: u64) -> [u8; ENTRY_BYTES] {
    let mut out = [0; ENTRY_BYTES];
    out[0] = u8::try_from(entry % CHUNK).expect("below 64");
    out[2..10].copy_from_slice(&map[entry as usize].to_le_bytes());
    out[10..].copy_from_slice(&[0xff; 2]);
    out
}

fn write_chunks(db: &Database, map: &[u64], changed: &[u64]) -> Result<()> {
    let txn = db.begin_write()?;
    {
        let mut table = txn.open_table(CHUNKS)?;
        for group in changed.chunk_by(|a, b| a / CHUNK == b / CHUNK) {
            let first = group[0] / CHUNK * CHUNK;
            let body: Vec<u8> = (first..first + CHUNK).flat_map(|e| entry_bytes(map, e)).collect();
            let mut blob = understudy_common::checksum::crc32c(&body).to_le_bytes().to_vec();
            blob.extend_from_slice(&[1, 2, 64, 0]);
            blob.extend_from_slice(&body);
            table.insert((1, u32::try_from(first / CHUNK)?), blob.as_slice())?;
        }
    }
    Ok(txn.commit()?)
}

fn write_rows(db: &Database, map: &[u64], changed: &[u64]) -> Result<()> {
    let txn = db.begin_write()?;
    {
        let mut table = txn.open_table(ROWS)?;
        for entry in changed {
            table.insert((1, *entry), &entry_bytes(map, *entry)[1..])?;
        }
    }
    Ok(txn.commit()?)
}

/// What the changes themselves take: an entry with its number, in batches, synced once.
fn append(log: &mut File, map: &[u64], changed: &[u64]) -> Result<()> {
    log.seek(SeekFrom::End(0))?;
    let mut batch = Vec::with_capacity(1 << 20);
    for entry in changed {
        batch.extend_from_slice(&entry.to_le_bytes());
        batch.extend_from_slice(&entry_bytes(map, *entry)[1..]);
        if batch.len() >= (1 << 20) - 64 {
            let crc = understudy_common::checksum::crc32c(&batch);
            batch.extend_from_slice(&crc.to_le_bytes());
            log.write_all(&batch)?;
            batch.clear();
        }
    }
    log.write_all(&batch)?;
    Ok(log.sync_data()?)
}
