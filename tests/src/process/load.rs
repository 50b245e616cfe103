//! Writers that go on while services die under them, and what they know of each block.
//!
//! Each writer owns a range of blocks, so that it alone decides what they may hold: the stamp acknowledged last, or
//! that of an attempt whose outcome is not known. An attempt is a value in flight; it may still take effect behind a
//! later acknowledged one as long as the process that received it lives, so it stays allowed until a write is
//! acknowledged by a later process. Attempts are repeated under the same client sequence until they are acknowledged
//! (which checks at-most-once), but for some that are given up.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};
use understudy_common::checksum::crc32c;
use understudy_proto::v1::{self, block_service_client::BlockServiceClient};

use super::{PATIENCE, POLL_INTERVAL};

/// Bytes of a block of the load's volumes.
pub const BLOCK_BYTES: usize = 4096;
/// Blocks that one writer owns.
pub const BLOCKS_PER_WRITER: usize = 64;
/// Writes in flight on a stream; less than a writer's blocks, so that those in flight are of different blocks.
const WINDOW: usize = 16;
/// A request unanswered for so long is repeated.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// The content of a block that was last written with `stamp`; stamp 0 is a block never written.
#[must_use]
pub fn fill(volume: usize, block: usize, stamp: u64) -> Bytes {
    let mut data = vec![0; BLOCK_BYTES];
    if stamp != 0 {
        let place = (volume as u64) << 32 | block as u64;
        Pcg64Mcg::seed_from_u64(stamp.rotate_left(32) ^ place).fill_bytes(&mut data);
        data[..8].copy_from_slice(&stamp.to_le_bytes());
    }
    data.into()
}

/// What one block may hold.
#[derive(Debug, Clone, Default)]
pub struct Cell {
    acked: u64,
    /// Stamps of attempts without an answer, each with the number of the process that got it.
    open: Vec<(u64, u64)>,
}

impl Cell {
    fn attempted(&mut self, stamp: u64, process: u64) {
        self.open.push((stamp, process));
    }

    fn acknowledged(&mut self, stamp: u64, process: u64) {
        self.acked = stamp;
        self.open.retain(|&(open, receiver)| open != stamp && receiver == process);
    }

    /// Checks the content of this block.
    ///
    /// # Errors
    /// It is none of the allowed ones.
    pub fn check(&self, volume: usize, block: usize, content: &[u8]) -> Result<()> {
        let stamp = content.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)).context("a block is cut short")?;
        let Self { acked, open } = self;
        ensure!(
            stamp == *acked || open.iter().any(|(open, _)| *open == stamp),
            "volume {volume} block {block} holds stamp {stamp:#x}; acknowledged was {acked:#x}, unknown {open:x?}"
        );
        ensure!(content == fill(volume, block, stamp), "volume {volume} block {block}, stamp {stamp:#x}: bytes differ");
        Ok(())
    }
}

/// The primary that serves now: the number of the process, and a channel to it.
type Server = Option<(u64, Channel)>;

/// Running writers.
#[derive(Debug)]
pub struct Load {
    server: watch::Sender<Server>,
    stop: watch::Sender<bool>,
    acks: Arc<AtomicU64>,
    writers: JoinSet<Result<(usize, Vec<Cell>)>>,
    processes: u64,
}

impl Load {
    /// Starts `writers` on each volume; every other one uses a stream. Each volume needs
    /// `writers * BLOCKS_PER_WRITER` blocks. Nothing is written before [`Load::serve`].
    #[must_use]
    pub fn start(seed: u64, volumes: &[&str], writers: usize) -> Self {
        let (server, _) = watch::channel(None);
        let (stop, _) = watch::channel(false);
        let mut load = Self { server, stop, acks: Arc::default(), writers: JoinSet::new(), processes: 0 };
        for (volume, name) in volumes.iter().enumerate() {
            for number in 0..writers {
                let id = (volume * writers + number) as u64 + 1;
                let writer = Writer {
                    volume,
                    name: (*name).to_owned(),
                    first: number * BLOCKS_PER_WRITER,
                    cells: vec![Cell::default(); BLOCKS_PER_WRITER],
                    client_id: format!("writer-{id}"),
                    stamp: id << 40,
                    rng: Pcg64Mcg::seed_from_u64(seed ^ id << 48),
                    server: load.server.subscribe(),
                    stop: load.stop.subscribe(),
                    acks: Arc::clone(&load.acks),
                };
                let streams = number % 2 == 1;
                load.writers.spawn(async move { if streams { writer.stream().await } else { writer.unary().await } });
            }
        }
        load
    }

    /// Directs the writers to a new process of the primary, or lets them wait.
    pub fn serve(&mut self, channel: Option<Channel>) {
        self.processes += 1;
        self.server.send_replace(channel.map(|channel| (self.processes, channel)));
    }

    /// Writes acknowledged so far.
    #[must_use]
    pub fn acks(&self) -> u64 {
        self.acks.load(Ordering::Relaxed)
    }

    /// Waits until `count` more writes were acknowledged, or `at_most` has passed.
    ///
    /// # Errors
    /// A writer failed, or not one write was acknowledged within [`PATIENCE`].
    pub async fn progress(&mut self, count: u64, at_most: Duration) -> Result<()> {
        let (start, before) = (Instant::now(), self.acks());
        while self.acks() < before + count {
            if let Some(ended) = self.writers.try_join_next() {
                ended??;
                bail!("a writer ended before it was told to");
            }
            if start.elapsed() > at_most && self.acks() > before {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "no write was acknowledged within {PATIENCE:?}");
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Stops the writers. The cells of each volume, in the order of its blocks.
    ///
    /// # Errors
    /// A writer failed: a wrong answer, or a refusal that no fault explains.
    pub async fn finish(mut self) -> Result<Vec<Vec<Cell>>> {
        self.stop.send_replace(true);
        let mut parts = Vec::new();
        while let Some(ended) = self.writers.join_next().await {
            parts.push(ended??);
        }
        parts.sort_by_key(|(place, _)| *place);
        let mut volumes: Vec<Vec<Cell>> = Vec::new();
        for (place, cells) in parts {
            let volume = place >> 32;
            volumes.resize_with(volumes.len().max(volume + 1), Vec::new);
            volumes[volume].extend(cells);
        }
        Ok(volumes)
    }
}

struct Writer {
    volume: usize,
    name: String,
    /// Block of the first cell.
    first: usize,
    cells: Vec<Cell>,
    client_id: String,
    /// Of the last write; never repeated, also not by other writers.
    stamp: u64,
    rng: Pcg64Mcg,
    server: watch::Receiver<Server>,
    stop: watch::Receiver<bool>,
    acks: Arc<AtomicU64>,
}

/// A write: which cell gets which stamp.
#[derive(Debug, Clone, Copy)]
struct Write {
    cell: usize,
    stamp: u64,
}

impl Writer {
    /// Place of the first cell in the order of all, and the cells.
    fn result(self) -> (usize, Vec<Cell>) {
        (self.volume << 32 | self.first, self.cells)
    }

    /// The primary of the moment; `None` when it is time to stop.
    async fn server(&mut self) -> Option<(u64, BlockServiceClient<Channel>)> {
        tokio::select! {
            biased;
            _ = self.stop.wait_for(|stop| *stop) => None,
            server = self.server.wait_for(Option::is_some) => {
                let (process, channel) = server.ok()?.clone()?;
                Some((process, BlockServiceClient::new(channel)))
            }
        }
    }

    fn request(&self, write: Write) -> v1::WriteBlockRequest {
        let block = self.first + write.cell;
        let data = fill(self.volume, block, write.stamp);
        v1::WriteBlockRequest {
            volume: self.name.clone(),
            offset_bytes: (block * BLOCK_BYTES) as u64,
            crc32c: Some(crc32c(&data)),
            data,
            client_id: self.client_id.clone(),
            sequence: write.stamp & ((1 << 40) - 1),
            ..Default::default()
        }
    }

    fn next_write(&mut self, cell: usize) -> Write {
        self.stamp += 1;
        Write { cell, stamp: self.stamp }
    }

    fn acknowledged(&mut self, write: Write, process: u64) {
        self.cells[write.cell].acknowledged(write.stamp, process);
        self.acks.fetch_add(1, Ordering::Relaxed);
    }

    async fn unary(mut self) -> Result<(usize, Vec<Cell>)> {
        while let Some((_, client)) = self.server().await {
            let cell = self.rng.random_range(0..self.cells.len());
            if self.rng.random_ratio(1, 8) {
                self.read(client, cell).await?;
                continue;
            }
            let write = self.next_write(cell);
            let give_up = self.rng.random_ratio(1, 4);
            while let Some((process, mut client)) = self.server().await {
                self.cells[cell].attempted(write.stamp, process);
                match timeout(ANSWER_WITHIN, client.write_block(self.request(write))).await {
                    Ok(Ok(_)) => {
                        self.acknowledged(write, process);
                        break;
                    }
                    Ok(Err(status)) => transient(&status)?,
                    Err(_) => {}
                }
                if give_up {
                    break;
                }
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        }
        Ok(self.result())
    }

    async fn read(&mut self, mut client: BlockServiceClient<Channel>, cell: usize) -> Result<()> {
        let block = self.first + cell;
        let request = v1::ReadBlockRequest {
            volume: self.name.clone(),
            offset_bytes: (block * BLOCK_BYTES) as u64,
            length_bytes: BLOCK_BYTES as u64,
            ..Default::default()
        };
        match timeout(ANSWER_WITHIN, client.read_block(request)).await {
            Ok(Ok(answer)) => self.cells[cell].check(self.volume, block, &answer.into_inner().data),
            Ok(Err(status)) => {
                tokio::time::sleep(POLL_INTERVAL).await;
                transient(&status)
            }
            Err(_) => Ok(()),
        }
    }

    /// Keeps `WINDOW` writes in flight. After a failure, those without an answer are sent again, in their order.
    async fn stream(mut self) -> Result<(usize, Vec<Cell>)> {
        let mut pending = VecDeque::new();
        while let Some((process, client)) = self.server().await {
            let mut stop = self.stop.clone();
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => break,
                ended = self.one_stream(client, process, &mut pending) => ended?,
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(self.result())
    }

    /// Returns when the stream has failed.
    async fn one_stream(
        &mut self,
        mut client: BlockServiceClient<Channel>,
        process: u64,
        pending: &mut VecDeque<Write>,
    ) -> Result<()> {
        let (requests, outgoing) = mpsc::channel(WINDOW);
        for write in pending.iter() {
            self.send(&requests, *write, process);
        }
        self.refill(&requests, process, pending);
        let mut answers = match timeout(ANSWER_WITHIN, client.write_blocks(ReceiverStream::new(outgoing))).await {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => return transient(&status),
            Err(_) => return Ok(()),
        };
        loop {
            let answer = match timeout(ANSWER_WITHIN, answers.message()).await {
                Ok(Ok(Some(answer))) => answer,
                Ok(Err(status)) => return transient(&status),
                Ok(Ok(None)) | Err(_) => return Ok(()),
            };
            for result in answer.results {
                let write = pending.pop_front().context("a result without a request")?;
                ensure!(result.tag == write.stamp, "result {:#x}, expected {:#x}", result.tag, write.stamp);
                match result.outcome {
                    Some(v1::write_result::Outcome::Written(_)) => self.acknowledged(write, process),
                    Some(v1::write_result::Outcome::Error(error)) => {
                        transient(&Status::new(Code::from_i32(error.code), error.message))?;
                        pending.push_back(write);
                        self.send(&requests, write, process);
                    }
                    None => bail!("a result without an outcome"),
                }
            }
            self.refill(&requests, process, pending);
        }
    }

    fn refill(&mut self, requests: &mpsc::Sender<v1::WriteBlocksRequest>, process: u64, pending: &mut VecDeque<Write>) {
        while pending.len() < WINDOW {
            let cell = self.rng.random_range(0..self.cells.len());
            if pending.iter().any(|write| write.cell == cell) {
                continue;
            }
            let write = self.next_write(cell);
            pending.push_back(write);
            self.send(requests, write, process);
        }
    }

    fn send(&mut self, requests: &mpsc::Sender<v1::WriteBlocksRequest>, write: Write, process: u64) {
        self.cells[write.cell].attempted(write.stamp, process);
        let request = v1::WriteBlocksRequest { tag: write.stamp, write: Some(self.request(write)) };
        // Never full, since it holds as many as may be pending; closed only when the stream has failed.
        let _ = requests.try_send(request);
    }
}

/// Passes what a fault of the process or the link explains; anything else fails the test.
fn transient(status: &Status) -> Result<()> {
    match status.code() {
        Code::Unavailable
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Unknown
        // How hyper reports a connection that was reset under a request.
        | Code::Internal => Ok(()),
        // What it was is another node's by now.
        Code::FailedPrecondition if status.message().contains("send the request to the primary") => Ok(()),
        _ => bail!("the primary refused a good request: {status:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cell_allows_the_acknowledged_stamp_and_unknown_outcomes_only() {
        let mut cell = Cell::default();
        assert!(cell.check(0, 3, &fill(0, 3, 0)).is_ok());
        cell.attempted(1, 7);
        assert!(cell.check(0, 3, &fill(0, 3, 0)).is_ok());
        assert!(cell.check(0, 3, &fill(0, 3, 1)).is_ok());
        cell.acknowledged(1, 7);
        assert!(cell.check(0, 3, &fill(0, 3, 0)).is_err(), "an acknowledged write may not be lost");
        assert!(cell.check(0, 4, &fill(0, 3, 1)).is_err(), "a block of another place");
    }

    #[test]
    fn attempt_given_up_is_allowed_until_a_later_process_acknowledges() {
        let mut cell = Cell::default();
        cell.attempted(1, 7);
        cell.attempted(2, 7);
        cell.acknowledged(2, 7);
        assert!(cell.check(0, 0, &fill(0, 0, 1)).is_ok(), "it may still be on its way");
        cell.attempted(3, 8);
        cell.acknowledged(3, 8);
        assert!(cell.check(0, 0, &fill(0, 0, 1)).is_err());
        assert!(cell.check(0, 0, &fill(0, 0, 2)).is_err());
        assert!(cell.check(0, 0, &fill(0, 0, 3)).is_ok());
    }
}
