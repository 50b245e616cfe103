//! `bench`: a load generator against a running primary.
//!
//! Each write's data is a slice of one random buffer at a shifting offset, so that no two writes in a row are alike and
//! making them costs nothing. Latency is from handing the write to the client until its answer.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clap::ValueEnum as _;
use hdrhistogram::Histogram;
use rand::{RngCore as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use serde_json::{Value, json};
use tonic::Code;
use understudy_client::proto::{DeleteVolumeRequest, Position};
use understudy_client::{Client, ClientError, PendingWrite, VolumeHandle, WriteStreamConfig, Written};
use understudy_common::policy::simulate;

use crate::args::{BenchArgs, Global, Pattern, Usage};
use crate::commands::copy_in;
use crate::convert;
use crate::output::{per_second, print_json, print_line, rate, size};

/// How long the backup may take to acknowledge the rest.
const SETTLE_LIMIT: Duration = Duration::from_secs(600);

/// One write of `--fill`: large, and below what is written to segments of its own.
const FILL_BYTES: u64 = 128 << 10;

/// What was measured.
struct Measured {
    writes: u64,
    time: Duration,
    /// Microseconds.
    latency: Histogram<u64>,
    last: Option<Written>,
}

pub(crate) async fn run(global: &Global, args: BenchArgs) -> Result<()> {
    let client = global.primary_client()?;
    let (volume, made) = match client.volume(&args.volume).await {
        Ok(volume) => (volume, false),
        Err(error) if error.code() == Some(Code::NotFound) => {
            (copy_in::create(&client, &args.volume, args.size, 4096, args.ack.into()).await?, true)
        }
        Err(error) => return Err(error.into()),
    };
    let measured = tokio::select! {
        measured = measure(global, &client, &volume, &args) => measured,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted; nothing was measured")),
    };
    if made && !args.keep {
        let request = DeleteVolumeRequest { volume_id: volume.volume().id, ..Default::default() };
        client.volumes().delete(request).await.context("the volume made for the measurement is still there")?;
    }
    let report = measured?;
    if global.json { print_json(&report) } else { print_report(&report) }
}

async fn measure(global: &Global, client: &Client, volume: &VolumeHandle, args: &BenchArgs) -> Result<Value> {
    let mut source = Source::new(args, volume.volume().size_bytes)?;
    if args.fill {
        fill(volume, &source.pool).await?;
        volume.flush().await?;
        if global.backup.is_some() {
            until_acked(client, volume.volume().id).await?;
        }
    }
    let measured =
        if args.unary { unary(volume, args, &mut source).await? } else { streamed(volume, args, &mut source).await? };
    if let Some(path) = &args.trace {
        source.write_trace(path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let bytes = measured.writes * args.block;
    let mut report = json!({
        "mode": if args.unary { "unary" } else { "stream" },
        "pattern": args.pattern.to_possible_value().map(|value| value.get_name().to_owned()),
        "block_bytes": args.block,
        "in_flight": args.in_flight,
        "seconds": measured.time.as_secs_f64(),
        "writes": measured.writes,
        "bytes": bytes,
        "writes_per_s": per_second(measured.writes, measured.time),
        "bytes_per_s": per_second(bytes, measured.time),
        "durability": measured.last.map(|w| convert::durability(w.durability)),
        "latency_us": {
            "p50": measured.latency.value_at_quantile(0.5),
            "p90": measured.latency.value_at_quantile(0.9),
            "p99": measured.latency.value_at_quantile(0.99),
            "p999": measured.latency.value_at_quantile(0.999),
            "max": measured.latency.max(),
        },
    });
    if global.backup.is_some() {
        let start = Instant::now();
        volume.flush().await?;
        until_acked(client, volume.volume().id).await?;
        let time = measured.time + start.elapsed();
        report["until_backup"] = json!({
            "seconds": time.as_secs_f64(),
            "lag_seconds": start.elapsed().as_secs_f64(),
            "writes_per_s": per_second(measured.writes, time),
            "bytes_per_s": per_second(bytes, time),
        });
    }
    Ok(report)
}

/// Writes the whole volume once.
async fn fill(volume: &VolumeHandle, pool: &Bytes) -> Result<()> {
    let stream = volume.write_stream();
    let size = volume.volume().size_bytes;
    let mut pending = VecDeque::new();
    let mut offset = 0;
    while offset < size {
        let length = FILL_BYTES.min(size - offset);
        pending.push_back(stream.write(offset, pool.slice(..usize::try_from(length)?)).await?);
        offset += length;
        if pending.len() == 64
            && let Some(oldest) = pending.pop_front()
        {
            oldest.await?;
        }
    }
    for write in pending {
        write.await?;
    }
    Ok(stream.finish().await?)
}

/// Offsets and data of the writes to come.
struct Source {
    rng: Pcg64Mcg,
    pool: Bytes,
    next: u64,
    block: usize,
    pattern: simulate::Pattern,
    start: Instant,
    /// When each write was made, and of which block; `None` if nobody asked for it.
    trace: Option<Vec<(Duration, u64)>>,
}

impl Source {
    fn new(args: &BenchArgs, volume_bytes: u64) -> Result<Self> {
        let block = usize::try_from(args.block).ok().filter(|b| (1..=4 << 20).contains(b));
        let block = block.ok_or_else(|| Usage("--block must be from 1B to 4MiB".to_owned()))?;
        if volume_bytes < args.block {
            bail!("the volume has {volume_bytes} bytes, less than one block; use a larger one");
        }
        let mut rng = Pcg64Mcg::seed_from_u64(args.seed);
        let mut pool = vec![0; block + (1 << 20)];
        rng.fill_bytes(&mut pool);
        let all = volume_bytes / args.block;
        let pattern = match args.pattern {
            Pattern::Sequential => simulate::Pattern::Sequential(all),
            Pattern::Random => simulate::Pattern::Uniform(all),
            Pattern::HotSpot => simulate::Pattern::HotSpot { hot: (all / 100).max(1), all },
            Pattern::Zipfian => simulate::Pattern::Zipf(all),
        };
        let trace = args.trace.as_ref().map(|_| Vec::new());
        Ok(Self { rng, pool: pool.into(), next: 0, block, pattern, start: Instant::now(), trace })
    }

    fn next(&mut self) -> (u64, Bytes) {
        let shift = usize::try_from(self.next % (1 << 16)).unwrap_or(0) * 16;
        let number = self.pattern.block(self.next, &mut self.rng);
        self.next += 1;
        if let Some(trace) = &mut self.trace {
            trace.push((self.start.elapsed(), number));
        }
        (number * self.block as u64, self.pool.slice(shift..shift + self.block))
    }

    fn write_trace(&self, path: &Path) -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        writeln!(file, "fio version 3 iolog")?;
        for (at, number) in self.trace.iter().flatten() {
            writeln!(file, "{} bench write {} {}", at.as_micros(), number * self.block as u64, self.block)?;
        }
        file.flush()
    }
}

fn histogram() -> Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 600_000_000, 3).context("the histogram's bounds")
}

fn record(latency: &mut Histogram<u64>, since: Instant) {
    latency.saturating_record(u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX).max(1));
}

async fn streamed(volume: &VolumeHandle, args: &BenchArgs, source: &mut Source) -> Result<Measured> {
    let in_flight_max = usize::from(args.in_flight);
    let in_flight_bytes_max = in_flight_max.saturating_mul(source.block).max(1);
    let stream =
        volume.write_stream_with(WriteStreamConfig { in_flight_max, in_flight_bytes_max, ..Default::default() });
    let start = Instant::now();
    let until = start + Duration::from_secs(args.seconds);
    let mut measured = Measured { writes: 0, time: Duration::ZERO, latency: histogram()?, last: None };
    let mut pending: VecDeque<(Instant, PendingWrite)> = VecDeque::with_capacity(in_flight_max);
    loop {
        let more = Instant::now() < until;
        if more && pending.len() < in_flight_max {
            let (offset, data) = source.next();
            pending.push_back((Instant::now(), stream.write(offset, data).await?));
            continue;
        }
        // Answers come in order: the oldest is the next.
        let Some((since, write)) = pending.pop_front() else { break };
        measured.last = Some(write.await?);
        measured.writes += 1;
        record(&mut measured.latency, since);
    }
    measured.time = start.elapsed();
    stream.finish().await?;
    Ok(measured)
}

async fn unary(volume: &VolumeHandle, args: &BenchArgs, source: &mut Source) -> Result<Measured> {
    let start = Instant::now();
    let until = start + Duration::from_secs(args.seconds);
    let mut measured = Measured { writes: 0, time: Duration::ZERO, latency: histogram()?, last: None };
    let mut running = tokio::task::JoinSet::new();
    loop {
        while Instant::now() < until && running.len() < usize::from(args.in_flight) {
            let (volume, (offset, data)) = (volume.clone(), source.next());
            running.spawn(async move {
                let since = Instant::now();
                let written = volume.write(offset, data).await?;
                Ok::<_, ClientError>((since, written))
            });
        }
        let Some(done) = running.join_next().await else { break };
        let (since, written) = done??;
        measured.writes += 1;
        measured.last = Some(written);
        record(&mut measured.latency, since);
    }
    measured.time = start.elapsed();
    Ok(measured)
}

/// Waits until the backup holds everything of the volume that is durable on the primary.
async fn until_acked(client: &Client, volume_id: u64) -> Result<()> {
    let since = Instant::now();
    loop {
        let status = client.replication().status().await?;
        let volume = status.volumes.iter().find(|v| v.id == volume_id).context("the volume has been deleted")?;
        let positions = volume.position.unwrap_or_default();
        if key(positions.acked.unwrap_or_default()) >= key(positions.durable.unwrap_or_default()) {
            return Ok(());
        }
        if since.elapsed() > SETTLE_LIMIT {
            let link = status.link.unwrap_or_default();
            bail!(
                "the backup did not catch up within {SETTLE_LIMIT:?} (link {}: {}); see `understudy status`",
                link.state,
                link.reason
            );
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn key(position: Position) -> (u64, u64) {
    (position.generation, position.lsn)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "shown as whole numbers")]
fn print_report(report: &Value) -> Result<()> {
    let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_f64).unwrap_or(0.0);
    print_line(&format!(
        "{} writes of {} in {:.1}s: {:.0} writes/s, {}/s",
        number("/writes") as u64,
        size(number("/block_bytes") as u64),
        number("/seconds"),
        number("/writes_per_s"),
        rate(number("/bytes_per_s"))
    ))?;
    print_line(&format!(
        "latency p50 {} us, p90 {} us, p99 {} us, p99.9 {} us, max {} us",
        number("/latency_us/p50"),
        number("/latency_us/p90"),
        number("/latency_us/p99"),
        number("/latency_us/p999"),
        number("/latency_us/max")
    ))?;
    if report.get("until_backup").is_some() {
        print_line(&format!(
            "until the backup held everything {:.1}s: {:.0} writes/s, {}/s; {:.3}s after the last write",
            number("/until_backup/seconds"),
            number("/until_backup/writes_per_s"),
            rate(number("/until_backup/bytes_per_s")),
            number("/until_backup/lag_seconds")
        ))?;
    }
    Ok(())
}
