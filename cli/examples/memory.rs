//! What a node's store takes in memory, in time to recover and in time for a snapshot. See `docs/performance.md`.
//!
//! - `map`: a thin volume of 1 TiB, of which 100 GiB are allocated, scattered: one 4 KiB write to each of 1,638,400
//!   random segments of 64 KiB; then the same store opened anew.
//! - `retained`: 10 million records of 4 KiB that no backup holds.
//! - `recover`: stores whose journal holds ever more records behind the last checkpoint, opened anew.
//! - `snapshot`: the time to take one with 1 GiB and with 1 TiB allocated, one 4 KiB write to each segment of 1 MiB, while
//!   random blocks are written.
//!
//! The stores are real ones with their threads. For want of disk the bytes that `map` and `snapshot` write to devices go
//! nowhere, and those of `retained` to devices and journal: only lengths and first pages are kept. The rest is real.
//!
//! Example: `memory map --dir /tmp/memory`. Prints a line for each measurement.

use std::collections::HashMap;
use std::io::{self, IoSlice, Write as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clap::{Parser, ValueEnum};
use rand::{Rng as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use understudy_common::journal::JournalConfig;
use understudy_common::lane::Lanes;
use understudy_common::pool::{DeviceConfig, PoolConfig};
use understudy_common::record::{Control, block_crcs};
use understudy_common::storage::{OpenMode, RealStorage, Storage, StorageFile};
use understudy_common::store::driver::Threads;
use understudy_common::store::{self, Change, Levels, Recovery, Role, Store, StoreConfig};
use understudy_common::types::{AckRule, AwayRule, BlockSize, GroupId, Lsn, Uid, VolumeId, VolumeSpec};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const MIB: u64 = 1 << 20;
const BLOCK: u32 = 4096;
const SEGMENT: u32 = 64 << 10;
const DEVICE: &str = "pool-0";
const VOLUME: VolumeId = VolumeId(1);

#[derive(Parser)]
struct Args {
    what: What,
    /// Folder of the stores; made, and left behind.
    #[arg(long, default_value = "memory-data")]
    dir: PathBuf,
    /// Records of `retained`, segments of `map`.
    #[arg(long)]
    count: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    Map,
    Retained,
    Recover,
    Snapshot,
    /// The second half of `map`.
    #[value(hide = true)]
    Reopen,
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.what {
        What::Map => map(&args),
        What::Retained => retained(&args),
        What::Recover => recover(&args),
        What::Snapshot => snapshot(&args),
        What::Reopen => reopen(&args),
    }
}

fn print(line: &str) -> Result<()> {
    Ok(writeln!(io::stdout(), "{line}")?)
}

fn map(args: &Args) -> Result<()> {
    let count = args.count.unwrap_or((100 << 30) / u64::from(SEGMENT));
    let size = 1 << 40;
    let storage = Hollow::new(args, false)?;
    // No tail: it is a buffer, and the measurement is of the rest.
    let config = StoreConfig { tail_bytes: 0, retain: false, ..config(1 << 30, 256 * MIB) };
    let (store, _) = open(Arc::clone(&storage) as _, &config)?;
    print(&format!("empty: {}", memory()?))?;
    let threads = Threads::start(&store)?;
    create(&store, size)?;
    let mut rng = Pcg64Mcg::seed_from_u64(1);
    let segments = size / u64::from(SEGMENT);
    let start = Instant::now();
    let mut written = 0;
    while store.space().total() - store.space().free() < count {
        let first = rng.random_range(0..segments) * u64::from(SEGMENT / BLOCK);
        submit(&store, first)?;
        written += 1;
        if written % (count / 4) == 0 {
            print(&format!("{written} segments written: {}", memory()?))?;
        }
    }
    settle(&store)?;
    print(&format!("{written} segments written in {:.0?}: {}", start.elapsed(), memory()?))?;
    checkpoint(&store)?;
    print(&format!("checkpointed: {}", memory()?))?;
    drop(threads);
    drop(store);
    storage.save()?;
    // A process of its own: this one's allocator keeps what was needed while writing.
    let status =
        std::process::Command::new(std::env::current_exe()?).arg("reopen").arg("--dir").arg(&args.dir).status()?;
    if status.success() { Ok(()) } else { bail!("the second process failed") }
}

fn reopen(args: &Args) -> Result<()> {
    let config = StoreConfig { tail_bytes: 0, retain: false, ..config(1 << 30, 256 * MIB) };
    let storage = Hollow::again(args)?;
    let start = Instant::now();
    let (store, recovery) = open(storage, &config)?;
    let used = store.space().total() - store.space().free();
    print(&format!(
        "opened in {:.2?} ({} records replayed), {} GiB allocated: {}",
        start.elapsed(),
        recovery.replayed,
        (used * u64::from(SEGMENT)) >> 30,
        memory()?
    ))
}

fn retained(args: &Args) -> Result<()> {
    let count = args.count.unwrap_or(10_000_000);
    let config = config(count * 5000 + (1 << 30), 256 * MIB);
    let (store, _) = open(Hollow::new(args, true)?, &config)?;
    print(&format!("empty: {}", memory()?))?;
    let _threads = Threads::start(&store)?;
    create(&store, 1 << 30)?;
    let mut rng = Pcg64Mcg::seed_from_u64(1);
    let blocks = (1 << 30) / u64::from(BLOCK);
    let start = Instant::now();
    for n in 1..=count {
        submit(&store, rng.random_range(0..blocks))?;
        if n % (count / 5).max(1) == 0 {
            let bytes = store.retained().bytes();
            print(&format!("{n} records retained, {} MiB: {}", bytes / MIB, memory()?))?;
        }
    }
    settle(&store)?;
    print(&format!("settled after {:.0?}: {}", start.elapsed(), memory()?))
}

fn recover(args: &Args) -> Result<()> {
    for mib in [64, 128, 256, 512] {
        let folder = args.dir.join(format!("recover-{mib}"));
        let storage = Arc::new(RealStorage::new(&folder)?);
        // No checkpoint: neither for the journal's length, nor for a pool that has to grow.
        let mut config = config(1 << 30, u64::MAX);
        config.pool.devices[0].size_bytes = Some(1600 * MIB);
        let (store, _) = open(Arc::clone(&storage) as _, &config)?;
        let threads = Threads::start(&store)?;
        create(&store, 256 * MIB)?;
        let mut rng = Pcg64Mcg::seed_from_u64(1);
        for _ in 0..mib * MIB / u64::from(BLOCK) {
            submit(&store, rng.random_range(0..256 * MIB / u64::from(BLOCK)))?;
        }
        settle(&store)?;
        drop(threads);
        drop(store);
        let start = Instant::now();
        let (_store, Recovery { replayed, bytes, .. }) = open(storage, &config)?;
        let time = start.elapsed();
        let per_record = time / u32::try_from(replayed.max(1))?;
        print(&format!(
            "{} MiB of journal, {replayed} records replayed: {time:.2?}, {per_record:.1?} a record",
            bytes / MIB
        ))?;
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(())
}

fn snapshot(args: &Args) -> Result<()> {
    const TAKEN: usize = 101;
    let mut config = StoreConfig { tail_bytes: 0, retain: false, ..config(1 << 30, 256 * MIB) };
    config.pool.segment_bytes = 512 << 10;
    let (store, _) = open(Hollow::new(args, false)?, &config)?;
    let _threads = Threads::start(&store)?;
    let (size, per_segment) = (1 << 40, (512 << 10) / u64::from(BLOCK));
    create(&store, size)?;
    let mut rng = Pcg64Mcg::seed_from_u64(1);
    let mut segments = 0;
    for upto in [2 << 10, 2 << 20] {
        while segments < upto {
            submit(&store, segments * per_segment)?;
            segments += 1;
        }
        settle(&store)?;
        checkpoint(&store)?;
        let mut times = Vec::with_capacity(TAKEN);
        for n in 0..TAKEN {
            for _ in 0..100 {
                submit(&store, rng.random_range(0..segments * per_segment))?;
            }
            let start = Instant::now();
            let (taken, submitted) = store.take_snapshot(GroupId(1), &format!("s{n}"), 1)?;
            while store.marks().borrow().durable < submitted.lsn {
                std::thread::yield_now();
            }
            times.push(start.elapsed());
            settle(&store)?;
            store.drop_snapshot(taken.id, 1)?;
        }
        times.sort_unstable();
        let allocated = (store.space().total() - store.space().free()) / 2048;
        print(&format!(
            "{allocated} GiB allocated: a snapshot durable in {:.0?} (median of {TAKEN}; {:.0?} to {:.0?}); {}",
            times[TAKEN / 2],
            times[0],
            times[TAKEN - 1],
            memory()?
        ))?;
    }
    Ok(())
}

/// As the services set up theirs, but for the sizes given.
fn config(capacity_bytes: u64, checkpoint_bytes: u64) -> StoreConfig {
    let device = DeviceConfig { path: DEVICE.into(), size_bytes: None, max_bytes: Some(1 << 42) };
    StoreConfig {
        journal: JournalConfig {
            capacity_bytes,
            file_bytes: 64 * MIB,
            reserve_bytes: 4 * MIB,
            max_batch_bytes: 4 << 20,
        },
        pool: PoolConfig { segment_bytes: SEGMENT, devices: vec![device], map_cache_bytes: 16 << 20 },
        checkpoint_bytes,
        tail_bytes: 64 << 20,
        reference_bytes: 256 << 10,
        apply_bytes: 8 << 20,
        drain_bytes_per_s: 0,
        levels: Levels::default(),
        pending_bytes: 64 << 20,
        retain: true,
        lanes: Lanes::default(),
    }
}

fn open(storage: Arc<dyn Storage>, config: &StoreConfig) -> Result<(Arc<Store>, Recovery)> {
    let mut ids = (1..).map(|n| Uid([n; 16]));
    Ok(store::open(storage, config.clone(), Role::Primary, &mut || ids.next().unwrap_or_default())?)
}

fn create(store: &Store, size_bytes: u64) -> Result<()> {
    let spec = VolumeSpec {
        id: VOLUME,
        name: "data".into(),
        group: GroupId(1),
        group_name: "data".into(),
        size_bytes,
        block_size: BlockSize::new(BLOCK).context("4 KiB")?,
        segment_bytes: store.config().pool.segment_bytes,
        ack: AckRule::Staged,
        away: AwayRule::Degrade,
    };
    store.submit_control(GroupId(1), Control::CreateVolume { spec, fill: None }, 1)?;
    Ok(())
}

/// Writes a block, with memory of its own, once there is room.
fn submit(store: &Arc<Store>, block: u64) -> Result<()> {
    let data = Bytes::from(vec![7; BLOCK as usize]);
    let crcs = block_crcs(&data, BlockSize::new(BLOCK).context("4 KiB")?);
    loop {
        if store.queue_bytes() <= store.config().pending_bytes {
            match store.submit(VOLUME, block, Change::Write { data: data.clone(), crcs: crcs.clone() }, None, 5) {
                Ok(_) => return Ok(()),
                Err(error) if store.failure().is_some() => bail!("the store has failed: {error}"),
                Err(_) => {
                    store.request_growth();
                    store.request_checkpoint();
                }
            }
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Waits until everything submitted is in its place.
fn settle(store: &Store) -> Result<()> {
    let last = Lsn(store.next_lsn().0 - 1);
    let marks = store.marks();
    while marks.borrow().applied < last {
        if let Some(why) = store.failure() {
            bail!("the store has failed: {why}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn checkpoint(store: &Arc<Store>) -> Result<()> {
    let before = store.stats().checkpoints.load(Ordering::Relaxed);
    store.request_checkpoint();
    while store.stats().checkpoints.load(Ordering::Relaxed) == before {
        if let Some(why) = store.failure() {
            bail!("the store has failed: {why}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Resident memory of this process.
fn memory() -> Result<String> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mib = |name: &str| -> Result<u64> {
        let line = status.lines().find(|line| line.starts_with(name)).context("a line of /proc/self/status")?;
        Ok(line.split_whitespace().nth(1).context("its number")?.parse::<u64>()? / 1024)
    };
    Ok(format!(
        "{} MiB resident, {} MiB of it the program's own, peak {} MiB",
        mib("VmRSS")?,
        mib("RssAnon")?,
        mib("VmHWM")?
    ))
}

/// Storage whose devices, and perhaps journal, keep no bytes.
struct Hollow {
    real: RealStorage,
    journal: bool,
    files: Mutex<HashMap<String, Arc<HollowFile>>>,
}

impl Hollow {
    fn new(args: &Args, journal: bool) -> Result<Arc<Self>> {
        if args.dir.exists() {
            std::fs::remove_dir_all(&args.dir)?;
        }
        Ok(Arc::new(Self { real: RealStorage::new(&args.dir)?, journal, files: Mutex::default() }))
    }

    /// Keeps what there is of the first device for another process.
    fn save(&self) -> io::Result<()> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = files.get(DEVICE) else { return Ok(()) };
        let mut kept = file.len.load(Ordering::Relaxed).to_le_bytes().to_vec();
        kept.extend_from_slice(&file.page.lock().unwrap_or_else(PoisonError::into_inner));
        std::fs::write(self.real.root().join("hollow"), kept)
    }

    /// The storage of `map`, in another process.
    fn again(args: &Args) -> Result<Arc<Self>> {
        let kept = std::fs::read(args.dir.join("hollow"))?;
        let (len, page) = kept.split_first_chunk::<8>().context("the length of the device")?;
        let file = HollowFile { len: AtomicU64::new(u64::from_le_bytes(*len)), page: Mutex::new(page.to_vec()) };
        let files = HashMap::from([(DEVICE.to_owned(), Arc::new(file))]);
        Ok(Arc::new(Self { real: RealStorage::new(&args.dir)?, journal: false, files: Mutex::new(files) }))
    }

    fn is_hollow(&self, name: &str) -> bool {
        self.journal && name.starts_with("journal/") || name == DEVICE
    }
}

impl Storage for Hollow {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        if !self.is_hollow(name) {
            return self.real.open(name, mode);
        }
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(files.entry(name.to_owned()).or_default()) as _)
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let hollow = files.keys().filter_map(|name| name.strip_prefix(&format!("{dir}/")).map(str::to_owned));
        let mut names: Vec<_> = hollow.chain(self.real.list(dir)?).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn create_dir(&self, dir: &str) -> io::Result<()> {
        self.real.create_dir(dir)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        if !self.is_hollow(name) {
            return self.real.remove(name);
        }
        self.files.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.real.rename(from, to)
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.real.sync_dir(dir)
    }
}

/// A length and a first page; the rest reads as zeros.
#[derive(Default)]
struct HollowFile {
    len: AtomicU64,
    page: Mutex<Vec<u8>>,
}

const PAGE: usize = 4096;

impl HollowFile {
    fn extend(&self, len: u64) {
        self.len.fetch_max(len, Ordering::Relaxed);
    }
}

impl StorageFile for HollowFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.len.load(Ordering::Relaxed))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        buf.fill(0);
        if let Some(at) = usize::try_from(offset).ok().filter(|at| *at < PAGE) {
            let page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
            let known = page.get(at..).unwrap_or_default();
            let count = known.len().min(buf.len());
            buf[..count].copy_from_slice(&known[..count]);
        }
        Ok(())
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.extend(offset + buf.len() as u64);
        if let Some(at) = usize::try_from(offset).ok().filter(|at| *at < PAGE) {
            let mut page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
            page.resize(PAGE, 0);
            let count = buf.len().min(PAGE - at);
            page[at..at + count].copy_from_slice(&buf[..count]);
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        for buf in bufs {
            self.write_all_at(buf, offset)?;
            offset += buf.len() as u64;
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.len.store(len, Ordering::Relaxed);
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.extend(offset + len);
        Ok(())
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        self.extend(offset + len);
        Ok(())
    }
}
