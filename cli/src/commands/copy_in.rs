//! `import`: a file into a volume.
//!
//! A thread reads the file, skips its holes, and tells data from zeros; the writes go over one stream. Zeros are
//! skipped in a volume created here, and written as zeros (not as data) in one that was there before.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::{Bytes, BytesMut};
use serde_json::json;
use tokio::sync::mpsc;
use tonic::Code;
use understudy_client::proto::{AckRule, CreateVolumeRequest, Position};
use understudy_client::{Client, ClientError, VolumeHandle, WriteStreamConfig};
use understudy_common::checksum::is_zero;

use super::volume::block_bytes;
use crate::args::{Global, ImportArgs};
use crate::convert;
use crate::output::{per_second, print_json, print_line, progress, rate, size};

/// Largest write. A quarter of the smallest sensible message limit.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;
/// Unit of the zero test.
const GRAIN_BYTES: usize = 4096;
/// Largest range of one request for zeros.
const ZEROS_BYTES_MAX: u64 = 1 << 30;

/// What an import did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Imported {
    /// Length of the file.
    pub(crate) bytes: u64,
    /// Of them, sent as data.
    pub(crate) data_bytes: u64,
    /// From the first byte read to the answer of the flush.
    pub(crate) time: Duration,
    /// Position of the flush.
    pub(crate) position: Option<Position>,
}

/// A piece of a file.
#[derive(Debug)]
enum Piece {
    Data(u64, Bytes),
    Zeros(u64, u64),
}

pub(crate) async fn run(global: &Global, args: ImportArgs) -> Result<()> {
    let length = file_length(&args.file)?;
    let client = global.primary_client()?;
    let (volume, fresh) = match client.volume(&args.volume).await {
        Ok(volume) => (volume, false),
        Err(error) if error.code() == Some(Code::NotFound) => {
            if !args.create {
                return Err(anyhow::Error::new(error)
                    .context("add --create to make the volume, or choose one of `understudy volume list`"));
            }
            let block = block_bytes(args.block_size)?;
            (create(&client, &args.volume, length, block, args.ack.into()).await?, true)
        }
        Err(error) => return Err(error.into()),
    };
    let bar = progress(length, global.json);
    let done = import(&volume, &args.file, fresh, |at| bar.set_position(at)).await;
    bar.finish_and_clear();
    let done = done?;
    if global.json {
        return print_json(&json!({
            "volume": args.volume,
            "created": fresh,
            "bytes": done.bytes,
            "data_bytes": done.data_bytes,
            "zero_bytes": done.bytes - done.data_bytes,
            "seconds": done.time.as_secs_f64(),
            "bytes_per_s": per_second(done.bytes, done.time),
            "position": convert::position(done.position),
        }));
    }
    print_line(&format!(
        "imported {} ({} of data) into {} in {:.1}s, {}/s",
        size(done.bytes),
        size(done.data_bytes),
        args.volume,
        done.time.as_secs_f64(),
        rate(per_second(done.bytes, done.time))
    ))
}

/// Creates a volume that holds `length` bytes.
pub(crate) async fn create(
    client: &Client,
    name: &str,
    length: u64,
    block_bytes: u32,
    ack: AckRule,
) -> Result<VolumeHandle, ClientError> {
    let size_bytes = length.max(1).next_multiple_of(u64::from(block_bytes.max(1)));
    let (name, ack) = (name.to_owned(), ack.into());
    let request = CreateVolumeRequest { name: name.clone(), size_bytes, block_bytes, ack, ..Default::default() };
    client.volumes().create(request).await?;
    client.volume(&name).await
}

/// Length of a file or block device.
pub(crate) fn file_length(path: &Path) -> Result<u64> {
    let open = || File::open(path)?.seek(SeekFrom::End(0));
    open().with_context(|| format!("cannot read {}; give a readable file", path.display()))
}

/// Writes all of `path` into `volume` and flushes it. `fresh`: the volume is known to be all zeros.
pub(crate) async fn import(
    volume: &VolumeHandle,
    path: &Path,
    fresh: bool,
    mut at: impl FnMut(u64),
) -> Result<Imported> {
    let start = Instant::now();
    let length = file_length(path)?;
    let room = volume.volume().size_bytes;
    if length > room {
        let name = &volume.volume().name;
        bail!(
            "{} has {length} bytes, volume {name} {room}; grow it: understudy volume resize {name} --size {length}",
            path.display()
        );
    }
    let mut pieces = read_pieces(path.to_owned(), length);
    let stream = volume.write_stream_with(WriteStreamConfig { in_flight_max: 64, ..WriteStreamConfig::default() });
    let (pending, mut answers) = mpsc::channel::<understudy_client::PendingWrite>(64);
    let collect = tokio::spawn(async move {
        while let Some(write) = answers.recv().await {
            write.await?;
        }
        Ok::<(), ClientError>(())
    });
    let (mut seen, mut data_bytes) = (0, 0);
    while let Some(piece) = pieces.recv().await {
        match piece.with_context(|| format!("cannot read {}", path.display()))? {
            Piece::Data(offset, data) => {
                (seen, data_bytes) = (seen + data.len() as u64, data_bytes + data.len() as u64);
                let write = stream.write(offset, data).await?;
                if pending.send(write).await.is_err() {
                    // A write was refused; the collector says which.
                    break;
                }
            }
            Piece::Zeros(offset, count) => {
                seen += count;
                let mut done = 0;
                while !fresh && done < count {
                    let part = (count - done).min(ZEROS_BYTES_MAX);
                    volume.write_zeroes(offset + done, part).await?;
                    done += part;
                }
            }
        }
        at(seen);
    }
    drop(pending);
    collect.await??;
    stream.finish().await?;
    if seen != length {
        bail!("{} changed while it was read: {seen} of {length} bytes; import it again", path.display());
    }
    let flushed = volume.flush().await?;
    Ok(Imported { bytes: length, data_bytes, time: start.elapsed(), position: flushed.position })
}

/// Reads the file on a thread of its own, at most four chunks ahead.
fn read_pieces(path: PathBuf, length: u64) -> mpsc::Receiver<std::io::Result<Piece>> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let sent =
            File::open(path).and_then(|file| split(&file, length, |piece| sender.blocking_send(Ok(piece)).is_ok()));
        if let Err(error) = sent {
            let _ = sender.blocking_send(Err(error));
        }
    });
    receiver
}

/// Cuts the file into data and zeros. Ends early when `emit` wants no more.
fn split(file: &File, length: u64, mut emit: impl FnMut(Piece) -> bool) -> std::io::Result<()> {
    let mut at = 0;
    while at < length {
        let data = next_data(file, at, length);
        if data > at && !emit(Piece::Zeros(at, data - at)) {
            return Ok(());
        }
        at = data;
        if at == length {
            return Ok(());
        }
        let take = usize::try_from(length - at).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let mut chunk = BytesMut::zeroed(take);
        file.read_exact_at(&mut chunk, at)?;
        if !split_chunk(chunk.freeze(), at, &mut emit) {
            return Ok(());
        }
        at += take as u64;
    }
    Ok(())
}

/// Emits runs of zero and of other grains.
fn split_chunk(chunk: Bytes, at: u64, emit: &mut impl FnMut(Piece) -> bool) -> bool {
    let mut start = 0;
    let kinds = chunk.chunks(GRAIN_BYTES).map(is_zero).collect::<Vec<_>>();
    for run in kinds.chunk_by(|a, b| a == b) {
        let end = (start + run.len() * GRAIN_BYTES).min(chunk.len());
        let offset = at + start as u64;
        let zeros = run.first().is_some_and(|zero| *zero);
        let piece = if zeros {
            Piece::Zeros(offset, (end - start) as u64)
        } else {
            Piece::Data(offset, chunk.slice(start..end))
        };
        if !emit(piece) {
            return false;
        }
        start = end;
    }
    true
}

/// Where the next data begins: `at` itself where the file system keeps no holes.
fn next_data(file: &File, at: u64, length: u64) -> u64 {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) => data.min(length),
        // Nothing but a hole up to the end.
        Err(rustix::io::Errno::NXIO) => length,
        Err(_) => at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_cut_into_data_and_zeros_without_gaps() {
        let file = tempfile::tempfile().unwrap();
        let length = (3 * CHUNK_BYTES + 5000) as u64;
        file.set_len(length).unwrap();
        // Data inside a chunk, across a boundary, and in the short end; zeros that are written, not a hole.
        for (at, count, fill) in [(8192, 4096, 1), (CHUNK_BYTES - 100, 200, 2), (3 * CHUNK_BYTES + 4990, 10, 3)] {
            file.write_all_at(&vec![fill; count], at as u64).unwrap();
        }
        file.write_all_at(&[0; 16384], 1 << 21).unwrap();
        let mut whole = Vec::new();
        let mut data_bytes = 0;
        split(&file, length, |piece| {
            match piece {
                Piece::Data(offset, data) => {
                    assert_eq!(offset, whole.len() as u64);
                    data_bytes += data.len();
                    whole.extend_from_slice(&data);
                }
                Piece::Zeros(offset, count) => {
                    assert_eq!(offset, whole.len() as u64);
                    whole.resize(whole.len() + usize::try_from(count).unwrap(), 0);
                }
            }
            true
        })
        .unwrap();
        let mut expected = vec![0; usize::try_from(length).unwrap()];
        file.read_exact_at(&mut expected, 0).unwrap();
        assert!(whole == expected);
        assert!(data_bytes <= 5 * GRAIN_BYTES, "zeros were taken for data: {data_bytes}");
    }
}
