//! A steady load of small writes, and the image that it must have produced.
//!
//! At most one write to a block is in flight, and a refused one is repeated until it is acknowledged: so the expected
//! image, a file, is known to the byte whenever the load is paused.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tonic::Code;
use understudy_client::{ClientError, PendingWrite, VolumeHandle, WriteStream, WriteStreamConfig};

const BLOCK_BYTES: u64 = 4096;
const IN_FLIGHT: usize = 64;
/// 20 writes every 10 ms: 2,000 a second.
const TICK: Duration = Duration::from_millis(10);
const WRITES_PER_TICK: usize = 20;

/// The load, and how to hold it.
#[derive(Debug)]
pub(super) struct Load {
    commands: Option<mpsc::Sender<Command>>,
    task: Option<JoinHandle<Result<()>>>,
    writes: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Command {
    /// Answered once every write is acknowledged.
    Pause(oneshot::Sender<()>),
    Resume,
}

impl Load {
    /// Starts writing to `volume`; `expected` becomes the image that it must have.
    pub(super) fn start(volume: &VolumeHandle, expected: &Path) -> Result<Self> {
        let file = File::create(expected).context("cannot create the expected image")?;
        file.set_len(volume.volume().size_bytes)?;
        let writes = Arc::new(AtomicU64::new(0));
        let config = WriteStreamConfig { deadline: Duration::from_secs(120), ..WriteStreamConfig::default() };
        let writer = Writer {
            stream: volume.write_stream_with(config),
            blocks: volume.volume().size_bytes / BLOCK_BYTES,
            expected: file,
            rng: Pcg64Mcg::seed_from_u64(2),
            in_flight: VecDeque::new(),
            again: Vec::new(),
            busy: HashSet::new(),
            writes: writes.clone(),
        };
        let (commands, receiver) = mpsc::channel(1);
        Ok(Self { commands: Some(commands), task: Some(tokio::spawn(writer.run(receiver))), writes })
    }

    /// Acknowledged writes so far.
    pub(super) fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// Returns once nothing is in flight and the expected image is complete.
    pub(super) async fn pause(&mut self) -> Result<()> {
        let (done, paused) = oneshot::channel();
        self.command(Command::Pause(done)).await?;
        match paused.await {
            Ok(()) => Ok(()),
            Err(_) => self.failure().await,
        }
    }

    pub(super) async fn resume(&mut self) -> Result<()> {
        self.command(Command::Resume).await
    }

    /// Ends it; every write is acknowledged then.
    pub(super) async fn finish(mut self) -> Result<()> {
        self.commands = None;
        self.failure().await
    }

    async fn command(&mut self, command: Command) -> Result<()> {
        let Some(commands) = &self.commands else { return Ok(()) };
        match commands.send(command).await {
            Ok(()) => Ok(()),
            Err(_) => self.failure().await,
        }
    }

    async fn failure(&mut self) -> Result<()> {
        match self.task.take() {
            Some(task) => task.await?,
            None => Ok(()),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

struct Writer {
    stream: WriteStream,
    blocks: u64,
    expected: File,
    rng: Pcg64Mcg,
    in_flight: VecDeque<(u64, Bytes, PendingWrite)>,
    /// Refused for now.
    again: Vec<(u64, Bytes)>,
    /// Blocks that are in one of the two.
    busy: HashSet<u64>,
    writes: Arc<AtomicU64>,
}

impl Writer {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Result<()> {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut paused: Option<oneshot::Sender<()>> = None;
        let (mut running, mut open) = (true, true);
        loop {
            if self.busy.is_empty() && !running {
                if let Some(paused) = paused.take() {
                    let _ = paused.send(());
                }
                if !open {
                    return Ok(self.stream.finish().await?);
                }
            }
            tokio::select! {
                command = commands.recv(), if open => match command {
                    Some(Command::Pause(done)) => (running, paused) = (false, Some(done)),
                    Some(Command::Resume) => running = true,
                    None => (running, open) = (false, false),
                },
                answer = oldest(&mut self.in_flight), if !self.in_flight.is_empty() => self.on_answer(answer)?,
                _ = ticks.tick(), if running || !self.again.is_empty() => self.issue(running).await?,
            }
        }
    }

    async fn issue(&mut self, fresh: bool) -> Result<()> {
        for _ in 0..WRITES_PER_TICK {
            if self.in_flight.len() >= IN_FLIGHT {
                break;
            }
            let (block, data) = match self.again.pop() {
                Some(write) => write,
                None if fresh => {
                    let block = self.rng.random_range(0..self.blocks);
                    if !self.busy.insert(block) {
                        continue;
                    }
                    let mut data = vec![0; 4096];
                    self.rng.fill_bytes(&mut data);
                    (block, data.into())
                }
                None => break,
            };
            let write = self.stream.write(block * BLOCK_BYTES, data.clone()).await?;
            self.in_flight.push_back((block, data, write));
        }
        Ok(())
    }

    fn on_answer(&mut self, answer: Result<understudy_client::Written, ClientError>) -> Result<()> {
        let Some((block, data, _)) = self.in_flight.pop_front() else { return Ok(()) };
        match answer {
            Ok(_) => {
                self.expected.write_all_at(&data, block * BLOCK_BYTES).context("cannot write the expected image")?;
                self.busy.remove(&block);
                self.writes.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Err(ClientError::Refused { code: Code::Unavailable | Code::ResourceExhausted | Code::Aborted, .. }) => {
                self.again.push((block, data));
                Ok(())
            }
            Err(error) => Err(anyhow::Error::new(error).context("a write of the load failed")),
        }
    }
}

/// The answer of the oldest write; it stays in the queue, so that a cancelled wait loses nothing.
async fn oldest(
    in_flight: &mut VecDeque<(u64, Bytes, PendingWrite)>,
) -> Result<understudy_client::Written, ClientError> {
    match in_flight.front_mut() {
        Some((_, _, write)) => write.await,
        None => std::future::pending().await,
    }
}
