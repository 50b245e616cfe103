//! Bare baselines: what the machine does without Understudy. See `docs/performance.md`.
//!
//! - `journal`: the same bytes in the same batches, appended to zero-filled files and synced by one thread.
//! - `echo`: an empty unary RPC with the same payload.
//! - `pipeline`: client, first process and second process (a child) joined by bidirectional streams; each process
//!   appends and syncs a batch, and answers when both have. No index, no checksum, no apply.
//!
//! Each prints one JSON object. Example: `bare pipeline --dir /tmp/bare --block 4KiB --in-flight 256 --seconds 30`.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, IoSlice, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc as blocking;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clap::{Parser, Subcommand};
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};
use understudy_common::units::parse_bytes;
use understudy_proto::v1::block_service_client::BlockServiceClient;
use understudy_proto::v1::block_service_server::{BlockService, BlockServiceServer};
use understudy_proto::v1::*;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Recycled files of this size, as many as are used in turn.
const FILE_BYTES: u64 = 256 << 20;
const FILES: usize = 2;
/// Largest group of one sync.
const GROUP_BYTES: usize = 4 << 20;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
    /// Folder of the files.
    #[arg(long, global = true, default_value = "bare-data")]
    dir: PathBuf,
    /// Bytes of one write.
    #[arg(long, global = true, value_parser = parse_bytes, default_value = "4KiB")]
    block: u64,
    /// Writes in flight.
    #[arg(long, global = true, default_value_t = 64)]
    in_flight: usize,
    /// How long to run.
    #[arg(long, global = true, default_value_t = 10)]
    seconds: u64,
}

#[derive(Clone, Copy, PartialEq, Subcommand)]
enum What {
    /// Append and sync in groups.
    Journal,
    /// Empty unary RPC.
    Echo,
    /// Client, process, second process.
    Pipeline,
    /// The server of `echo`, or the second process of `pipeline`.
    #[command(hide = true)]
    Second,
    /// The first process of `pipeline`: its downstream is the second.
    #[command(hide = true)]
    First {
        /// Address of the second.
        downstream: SocketAddr,
    },
}

fn main() -> Result<()> {
    let args = Args::parse();
    std::fs::create_dir_all(&args.dir)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match args.what {
        What::Journal => print(&journal(&args)?),
        What::Echo => print(&runtime.block_on(echo(&args))?),
        What::Pipeline => print(&runtime.block_on(pipeline(&args))?),
        What::Second => runtime.block_on(serve(&args.dir.join("second"), None)),
        What::First { downstream } => runtime.block_on(serve(&args.dir.join("first"), Some(downstream))),
    }
}

fn print(report: &Value) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{report}")?)
}

fn report(name: &str, args: &Args, writes: u64, time: Duration, latency: &Histogram<u64>) -> Value {
    #[allow(clippy::cast_precision_loss, reason = "a measurement")]
    let rate = writes as f64 / time.as_secs_f64();
    #[allow(clippy::cast_precision_loss, reason = "a measurement")]
    let block = args.block as f64;
    json!({
        "name": name,
        "block_bytes": args.block,
        "in_flight": args.in_flight,
        "seconds": time.as_secs_f64(),
        "writes": writes,
        "writes_per_s": rate,
        "bytes_per_s": rate * block,
        "latency_us": {"p50": latency.value_at_quantile(0.5), "p99": latency.value_at_quantile(0.99), "max": latency.max()},
    })
}

fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 600_000_000, 3)?)
}

fn record(latency: &mut Histogram<u64>, since: Instant) {
    latency.saturating_record(u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX).max(1));
}

/// Appends to zero-filled files in turn.
struct Log {
    files: Vec<File>,
    current: usize,
    at: u64,
}

impl Log {
    fn open(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut files = Vec::new();
        for number in 0..FILES {
            let path = folder.join(format!("log-{number}"));
            let mut file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
            if file.metadata()?.len() != FILE_BYTES {
                file.set_len(0)?;
                let zeros = vec![0; 1 << 20];
                for _ in 0..FILE_BYTES / zeros.len() as u64 {
                    file.write_all(&zeros)?;
                }
                file.sync_all()?;
            }
            files.push(file);
        }
        Ok(Self { files, current: 0, at: 0 })
    }

    /// One group: written with as few calls as the system allows, then synced.
    fn append(&mut self, group: &[Bytes]) -> std::io::Result<()> {
        use std::io::{Seek as _, SeekFrom};
        let bytes: u64 = group.iter().map(|data| data.len() as u64).sum();
        if self.at + bytes > FILE_BYTES {
            (self.current, self.at) = ((self.current + 1) % self.files.len(), 0);
        }
        let file = &mut self.files[self.current];
        file.seek(SeekFrom::Start(self.at))?;
        for part in group.chunks(512) {
            let mut slices: Vec<_> = part.iter().map(|data| IoSlice::new(data)).collect();
            let mut rest = slices.as_mut_slice();
            while !rest.is_empty() {
                let written = file.write_vectored(rest)?;
                IoSlice::advance_slices(&mut rest, written);
            }
        }
        self.at += bytes;
        file.sync_data()
    }
}

/// (a) One thread commits what the others have handed in, as one group; `in_flight` writes are always waiting.
fn journal(args: &Args) -> Result<Value> {
    let mut log = Log::open(&args.dir.join("journal"))?;
    let data = Bytes::from(vec![7; usize::try_from(args.block)?]);
    // A group is what is in flight, up to the bound: all of them wait for the one sync, then come again.
    let count = args.in_flight.clamp(1, (GROUP_BYTES / data.len()).max(1));
    let group = vec![data; count];
    let mut latency = histogram()?;
    let start = Instant::now();
    let mut writes = 0;
    while start.elapsed().as_secs() < args.seconds {
        let since = Instant::now();
        log.append(&group)?;
        record(&mut latency, since);
        writes += count as u64;
    }
    Ok(report("journal", args, writes, start.elapsed(), &latency))
}

/// (b) Empty unary RPCs, `in_flight` at a time, to a process of its own.
async fn echo(args: &Args) -> Result<Value> {
    let server = Process::start(args, &["second"])?;
    let client = BlockServiceClient::new(connect(server.address).await?);
    let data = Bytes::from(vec![7; usize::try_from(args.block)?]);
    let mut running = tokio::task::JoinSet::new();
    let mut latency = histogram()?;
    let start = Instant::now();
    let mut writes = 0;
    loop {
        while running.len() < args.in_flight && start.elapsed().as_secs() < args.seconds {
            let (mut client, data) = (client.clone(), data.clone());
            running.spawn(async move {
                let since = Instant::now();
                client.write_block(WriteBlockRequest { data, ..Default::default() }).await.map(|_| since)
            });
        }
        let Some(done) = running.join_next().await else { break };
        record(&mut latency, done??);
        writes += 1;
    }
    Ok(report("echo", args, writes, start.elapsed(), &latency))
}

/// (c) A stream of writes to the first process, which hands each on to the second.
async fn pipeline(args: &Args) -> Result<Value> {
    let second = Process::start(args, &["second"])?;
    let first = Process::start(args, &["first", &second.address.to_string()])?;
    let mut client = BlockServiceClient::new(connect(first.address).await?);
    let (sender, receiver) = mpsc::channel(64);
    let mut answers = client.write_blocks(ReceiverStream::new(receiver)).await?.into_inner();
    let data = Bytes::from(vec![7; usize::try_from(args.block)?]);
    let mut in_flight: VecDeque<Instant> = VecDeque::new();
    let mut latency = histogram()?;
    let start = Instant::now();
    let (mut writes, mut tag) = (0, 0);
    loop {
        let more = start.elapsed().as_secs() < args.seconds;
        if !more && in_flight.is_empty() {
            break;
        }
        tokio::select! {
            biased;
            permit = sender.reserve(), if more && in_flight.len() < args.in_flight => {
                tag += 1;
                let write = Some(WriteBlockRequest { data: data.clone(), ..Default::default() });
                permit?.send(WriteBlocksRequest { tag, write });
                in_flight.push_back(Instant::now());
            }
            answer = answers.message() => {
                let answer = answer?.context("the first process ended its stream")?;
                for _ in answer.results {
                    record(&mut latency, in_flight.pop_front().context("an answer too many")?);
                    writes += 1;
                }
            }
        }
    }
    Ok(report("pipeline", args, writes, start.elapsed(), &latency))
}

/// A child of this program; ended when dropped.
struct Process {
    child: Child,
    address: SocketAddr,
}

impl Process {
    fn start(args: &Args, what: &[&str]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command.args(what).arg("--dir").arg(&args.dir).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let read = child.stdout.take().map(|out| BufReader::new(out).read_line(&mut line));
        match (read, line.trim().parse()) {
            (Some(Ok(_)), Ok(address)) => Ok(Self { child, address }),
            _ => {
                child.kill()?;
                child.wait()?;
                anyhow::bail!("the child did not say where it listens")
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It is a child of ours; there is nothing to do about a failure.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn connect(address: SocketAddr) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .max_frame_size(256 << 10)
        .tcp_nodelay(true);
    Ok(endpoint.connect().await?)
}

async fn serve(folder: &Path, downstream: Option<SocketAddr>) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let downstream = match downstream {
        Some(address) => Some(connect(address).await?),
        None => None,
    };
    let service = BlockServiceServer::new(Bare { folder: folder.to_owned(), downstream });
    writeln!(std::io::stdout(), "{address}")?;
    let incoming = TcpListenerStream::new(listener).map(|stream| {
        let stream = stream?;
        stream.set_nodelay(true)?;
        Ok::<_, std::io::Error>(stream)
    });
    Server::builder()
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .max_frame_size(256 << 10)
        .add_service(service.max_decoding_message_size(16 << 20))
        .serve_with_incoming(incoming)
        .await?;
    Ok(())
}

struct Bare {
    folder: PathBuf,
    downstream: Option<Channel>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl BlockService for Bare {
    async fn write_block(&self, request: Request<WriteBlockRequest>) -> Result<Response<WriteBlockResponse>, Status> {
        drop(request);
        Ok(Response::new(WriteBlockResponse::default()))
    }

    type WriteBlocksStream = Answers<WriteBlocksResponse>;

    async fn write_blocks(
        &self,
        request: Request<Streaming<WriteBlocksRequest>>,
    ) -> Result<Response<Self::WriteBlocksStream>, Status> {
        let mut requests = request.into_inner();
        let mut log = Log::open(&self.folder).map_err(|e| Status::internal(e.to_string()))?;
        let (to_log, queued) = blocking::sync_channel::<WriteBlocksRequest>(4096);
        let (synced, groups) = mpsc::channel::<Vec<u64>>(64);
        std::thread::spawn(move || {
            while let Ok(first) = queued.recv() {
                let (mut tags, mut group, mut bytes) = (Vec::new(), Vec::new(), 0);
                let mut next = Some(first);
                while let Some(WriteBlocksRequest { tag, write }) = next {
                    let data = write.unwrap_or_default().data;
                    bytes += data.len();
                    tags.push(tag);
                    group.push(data);
                    next = if bytes < GROUP_BYTES { queued.try_recv().ok() } else { None };
                }
                if log.append(&group).is_err() || synced.blocking_send(tags).is_err() {
                    return;
                }
            }
        });
        let (forward, outbound) = mpsc::channel(64);
        let downstream = match &self.downstream {
            Some(channel) => {
                let mut client = BlockServiceClient::new(channel.clone());
                Some(client.write_blocks(ReceiverStream::new(outbound)).await?.into_inner())
            }
            None => None,
        };
        let forwards = downstream.is_some();
        tokio::spawn(async move {
            while let Some(Ok(request)) = requests.next().await {
                if forwards && forward.send(request.clone()).await.is_err() {
                    return;
                }
                // The log's queue is bounded; a full one holds back this stream alone, for the time of a sync.
                let mut request = request;
                while let Err(blocking::TrySendError::Full(back)) = to_log.try_send(request) {
                    request = back;
                    tokio::task::yield_now().await;
                }
            }
        });
        let (answer, answers) = mpsc::channel(64);
        tokio::spawn(answer_when_both(groups, downstream, answer));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn read_block(&self, _: Request<ReadBlockRequest>) -> Result<Response<ReadBlockResponse>, Status> {
        Err(Status::unimplemented("a baseline only writes"))
    }

    type ReadBlocksStream = Answers<ReadBlocksResponse>;

    async fn read_blocks(&self, _: Request<ReadBlocksRequest>) -> Result<Response<Self::ReadBlocksStream>, Status> {
        Err(Status::unimplemented("a baseline only writes"))
    }

    async fn flush(&self, _: Request<FlushRequest>) -> Result<Response<FlushResponse>, Status> {
        Err(Status::unimplemented("a baseline only writes"))
    }

    async fn discard(&self, _: Request<DiscardRequest>) -> Result<Response<WriteBlockResponse>, Status> {
        Err(Status::unimplemented("a baseline only writes"))
    }

    async fn write_zeroes(&self, _: Request<WriteZeroesRequest>) -> Result<Response<WriteBlockResponse>, Status> {
        Err(Status::unimplemented("a baseline only writes"))
    }
}

/// Answers what is synced here and, where there is a downstream, acknowledged there. Both come in the order sent.
async fn answer_when_both(
    mut groups: mpsc::Receiver<Vec<u64>>,
    mut downstream: Option<Streaming<WriteBlocksResponse>>,
    answer: mpsc::Sender<Result<WriteBlocksResponse, Status>>,
) {
    let mut there: usize = 0;
    while let Some(tags) = groups.recv().await {
        if let Some(downstream) = &mut downstream {
            while there < tags.len() {
                match downstream.message().await {
                    Ok(Some(response)) => there += response.results.len(),
                    _ => return,
                }
            }
            there -= tags.len();
        }
        let outcome = || Some(write_result::Outcome::Written(WriteBlockResponse::default()));
        let results = tags.into_iter().map(|tag| WriteResult { tag, outcome: outcome() }).collect();
        if answer.send(Ok(WriteBlocksResponse { results })).await.is_err() {
            return;
        }
    }
}
