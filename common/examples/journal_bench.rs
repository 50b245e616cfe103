//! Compares the journal's group commit with a bare loop that writes the same bytes in the same batches to zero-filled
//! files and syncs. Usage: `cargo run --release --example journal_bench -- DIR [SECONDS]`.
//!
//! Both run in turn in the same process, five rounds each; the table shows the medians. DIR gets two directories of
//! 128 MiB, which are removed at the end.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use understudy_common::{
    checksum::crc32c,
    journal::{Class, Journal, JournalConfig, TrimPoint},
    storage::{OpenMode, RealStorage, Storage, StorageFile},
    types::Uid,
};

const ROUNDS: usize = 5;
const RECORD_BYTES: usize = 4096;
const FILE_BYTES: u64 = 32 << 20;
const FILES: u64 = 4;
type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().ok_or("usage: journal_bench DIR [SECONDS]")?;
    let seconds: f64 = args.next().map_or(Ok(1.0), |s| s.parse())?;
    let (journal_dir, bare_dir) = (Path::new(&dir).join("journal-bench"), Path::new(&dir).join("bare-bench"));
    let mut journal = Logged::new(&journal_dir)?;
    let mut bare = Bare::new(&bare_dir)?;
    // Every file is written once before anything is measured.
    for _ in 0..FILES * FILE_BYTES / (256 * RECORD_BYTES as u64) + 1 {
        journal.commit(256)?;
    }
    println!("{:>8} {:>14} {:>14} {:>14} {:>8}", "batch", "bare rec/s", "journal rec/s", "two in flight", "ratio");
    for batch in [1usize, 16, 64, 256] {
        let time = Duration::from_secs_f64(seconds / ROUNDS as f64);
        let mut rates = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            rates[0].push(rate(batch, time, || bare.commit(batch))?);
            rates[1].push(rate(batch, time, || journal.commit(batch))?);
            rates[2].push(rate(2 * batch, time, || journal.commit_two(batch))?);
        }
        let [bare, one, two] = rates.map(median);
        println!("{batch:>8} {bare:>14.0} {one:>14.0} {two:>14.0} {:>8.2}", one / bare);
    }
    drop((journal, bare));
    std::fs::remove_dir_all(journal_dir)?;
    std::fs::remove_dir_all(bare_dir)?;
    Ok(())
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Records a second.
fn rate(records: usize, time: Duration, mut commit: impl FnMut() -> Outcome<()>) -> Outcome<f64> {
    let start = Instant::now();
    let mut done = 0;
    while start.elapsed() < time {
        commit()?;
        done += records;
    }
    Ok(done as f64 / start.elapsed().as_secs_f64())
}

struct Logged {
    journal: Journal,
    head: Bytes,
    data: Bytes,
}

impl Logged {
    fn new(dir: &Path) -> Outcome<Self> {
        let config = JournalConfig {
            capacity_bytes: FILES * FILE_BYTES,
            file_bytes: FILE_BYTES,
            reserve_bytes: 0,
            max_batch_bytes: 4 << 20,
        };
        let storage = Arc::new(RealStorage::new(dir)?);
        let store = Uid(*b"a journal's test");
        let (journal, _) = Journal::open(storage, store, config, TrimPoint::default(), &|_, _| true, &mut |_| Ok(()))?;
        let data = Bytes::from(vec![0x5a; RECORD_BYTES]);
        let head = [&[7; 40][..], &crc32c(&data).to_le_bytes()].concat();
        Ok(Self { journal, head: head.into(), data })
    }

    fn queue(&mut self, records: usize) -> Outcome<()> {
        for _ in 0..records {
            self.journal.append(self.head.clone(), self.data.clone(), Class::Data)?;
        }
        Ok(())
    }

    /// What a checkpoint would do, without one.
    fn trim(&mut self) {
        if self.journal.span_bytes() > self.journal.capacity_bytes() / 2 {
            let point = self.journal.trim_point_for(self.journal.next_lsn());
            self.journal.trim(point);
        }
    }

    fn commit(&mut self, records: usize) -> Outcome<()> {
        self.queue(records)?;
        while let Some(batch) = self.journal.begin_batch() {
            let result = batch.write();
            self.journal.finish_batch(batch, result)?;
        }
        self.trim();
        Ok(())
    }

    /// Two batches at a time, each written by a thread of its own (made anew, which costs it some 20 us).
    fn commit_two(&mut self, records: usize) -> Outcome<()> {
        self.queue(records)?;
        let first = self.journal.begin_batch().ok_or("nothing queued")?;
        self.queue(records)?;
        let second = self.journal.begin_batch().ok_or("nothing queued")?;
        let (one, two) = std::thread::scope(|s| {
            let other = s.spawn(|| first.write());
            let two = second.write();
            (other.join(), two)
        });
        self.journal.finish_batch(first, one.map_err(|_| "a writer panicked")?)?;
        self.journal.finish_batch(second, two)?;
        self.commit(0)
    }
}

/// The same bytes, with nothing but a position.
struct Bare {
    files: Vec<Arc<dyn StorageFile>>,
    file: usize,
    offset: u64,
    buffer: Vec<u8>,
}

impl Bare {
    fn new(dir: &Path) -> Outcome<Self> {
        let storage = RealStorage::new(dir)?;
        let mut files = Vec::new();
        for i in 0..FILES {
            let file = storage.open(&i.to_string(), OpenMode::OrCreate)?;
            file.write_zeros(0, FILE_BYTES)?;
            file.sync_data()?;
            files.push(file);
        }
        storage.sync_dir("")?;
        Ok(Self { files, file: 0, offset: 0, buffer: vec![0x5a; 256 * (RECORD_BYTES + 64) + 512] })
    }

    fn commit(&mut self, records: usize) -> Outcome<()> {
        let bytes = (64 + records * (RECORD_BYTES + 64)).next_multiple_of(512);
        if self.offset + bytes as u64 > FILE_BYTES {
            self.file = (self.file + 1) % self.files.len();
            self.offset = 0;
        }
        self.files[self.file].write_all_at(&self.buffer[..bytes], self.offset)?;
        self.files[self.file].sync_data()?;
        self.offset += bytes as u64;
        Ok(())
    }
}
