//! `export`: a volume into a sparse file.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::json;
use understudy_client::proto::{ListSnapshotsRequest, Position};
use understudy_client::{Client, Content, ReadStream};
use understudy_common::checksum::is_zero;

use crate::args::{ExportArgs, Global};
use crate::convert;
use crate::output::{per_second, print_json, print_line, progress, rate, size};

/// Zeros are left out in units of this size: a block of most file systems.
const GRAIN_BYTES: usize = 4096;

/// What an export did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exported {
    /// Size of the volume.
    pub(crate) bytes: u64,
    /// Of them, written to the file.
    pub(crate) data_bytes: u64,
    /// From the first request to the sync of the file.
    pub(crate) time: Duration,
    /// Position of the image; of its last chunk where the head was read.
    pub(crate) position: Option<Position>,
}

/// Where to read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin<'a> {
    /// The head on the primary.
    Primary(&'a Client),
    /// The consistent image on the backup.
    Backup(&'a Client),
}

pub(crate) async fn run(global: &Global, args: ExportArgs) -> Result<()> {
    let client = if args.from_backup { global.backup_client()? } else { global.primary_client()? };
    let from = if args.from_backup { Origin::Backup(&client) } else { Origin::Primary(&client) };
    let bar = progress(0, global.json);
    let done = export(from, &args.volume, &args.file, |at, total| {
        bar.set_length(total);
        bar.set_position(at);
    })
    .await;
    bar.finish_and_clear();
    let done = done?;
    if global.json {
        return print_json(&json!({
            "volume": args.volume,
            "file": args.file,
            "from": if args.from_backup { "backup" } else { "primary" },
            "bytes": done.bytes,
            "data_bytes": done.data_bytes,
            "zero_bytes": done.bytes - done.data_bytes,
            "seconds": done.time.as_secs_f64(),
            "bytes_per_s": per_second(done.bytes, done.time),
            "position": convert::position(done.position),
        }));
    }
    print_line(&format!(
        "exported {} ({} of data) from {} in {:.1}s, {}/s",
        size(done.bytes),
        size(done.data_bytes),
        args.volume,
        done.time.as_secs_f64(),
        rate(per_second(done.bytes, done.time))
    ))
}

/// Reads a whole volume into `path`, which is replaced. The file is synced.
pub(crate) async fn export(
    from: Origin<'_>,
    volume: &str,
    path: &Path,
    mut at: impl FnMut(u64, u64),
) -> Result<Exported> {
    let start = Instant::now();
    let (mut stream, mut total): (ReadStream, u64) = match from {
        Origin::Primary(client) => match volume.split_once('@') {
            Some((volume, snapshot)) => {
                let bytes = snapshot_bytes(client, volume, snapshot).await?;
                (client.read_snapshot(volume, snapshot, 0..bytes), bytes)
            }
            None => {
                let handle = client.volume(volume).await?;
                (handle.read_stream(0..0), handle.volume().size_bytes)
            }
        },
        Origin::Backup(client) => match volume.split_once('@') {
            Some((volume, snapshot)) => (client.backup().read_snapshot(volume, snapshot, 0..0), 0),
            None => (client.backup().read_stream(volume, 0..0), 0),
        },
    };
    let name = path.display();
    // Opened with the first chunk: an export that is refused leaves the file as it was.
    let mut output: Option<Output> = None;
    let (mut bytes, mut position) = (0, None);
    while let Some(chunk) = stream.next().await? {
        let output = match &mut output {
            Some(output) => output,
            None => output.insert(Output::create(path).with_context(|| format!("cannot create {name}"))?),
        };
        total = chunk.volume_size_bytes.unwrap_or(total);
        position = Some(chunk.position);
        bytes = chunk.offset_bytes + chunk.content.length_bytes();
        output.write(chunk.offset_bytes, chunk.content).with_context(|| format!("cannot write {name}"))?;
        at(bytes, total.max(bytes));
    }
    let data_bytes = match output {
        Some(output) => output.finish(bytes).with_context(|| format!("cannot write {name}"))?,
        None => 0,
    };
    Ok(Exported { bytes, data_bytes, time: start.elapsed(), position })
}

/// Size of a volume in a snapshot.
async fn snapshot_bytes(client: &Client, volume: &str, snapshot: &str) -> Result<u64> {
    let all = client.volumes().snapshots(ListSnapshotsRequest { group: volume.to_owned() }).await?.snapshots;
    let found = all.iter().find(|s| s.name == snapshot).and_then(|s| s.volumes.iter().find(|v| v.name == volume));
    let found =
        found.with_context(|| format!("{volume} has no snapshot {snapshot}; `snapshot list` shows those it has"))?;
    Ok(found.size_bytes)
}

/// A regular file is made sparse; a device gets its zeros written.
struct Output {
    file: File,
    sparse: bool,
    data_bytes: u64,
}

impl Output {
    fn create(path: &Path) -> std::io::Result<Self> {
        let file = File::create(path)?;
        let sparse = file.metadata()?.is_file();
        Ok(Self { file, sparse, data_bytes: 0 })
    }

    fn write(&mut self, mut at: u64, content: Content) -> std::io::Result<()> {
        match content {
            Content::Data(data) => {
                for run in (Runs { rest: &data, sparse: self.sparse }) {
                    if !(self.sparse && is_zero(run)) {
                        self.file.write_all_at(run, at)?;
                        self.data_bytes += run.len() as u64;
                    }
                    at += run.len() as u64;
                }
            }
            Content::Zeros(count) if !self.sparse => {
                let zeros = vec![0; 1 << 20];
                let end = at + count;
                while at < end {
                    let take = usize::try_from(end - at).unwrap_or(zeros.len()).min(zeros.len());
                    self.file.write_all_at(&zeros[..take], at)?;
                    at += take as u64;
                }
            }
            Content::Zeros(_) => {}
        }
        Ok(())
    }

    fn finish(self, length: u64) -> std::io::Result<u64> {
        if self.sparse {
            self.file.set_len(length)?;
        }
        self.file.sync_all()?;
        Ok(self.data_bytes)
    }
}

/// Runs of grains that are all zeros or all not, so that data is written in few calls.
struct Runs<'a> {
    rest: &'a [u8],
    sparse: bool,
}

impl<'a> Iterator for Runs<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.rest.is_empty() {
            return None;
        }
        let end = if self.sparse {
            let mut grains = self.rest.chunks(GRAIN_BYTES);
            let zero = grains.next().is_some_and(is_zero);
            let more = grains.take_while(|grain| is_zero(grain) == zero).count();
            ((1 + more) * GRAIN_BYTES).min(self.rest.len())
        } else {
            self.rest.len()
        };
        let (run, rest) = self.rest.split_at(end);
        self.rest = rest;
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn zeros_become_holes_and_the_length_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let mut data = vec![0; 1 << 20];
        data[500_000] = 7;
        let mut output = Output::create(&path).unwrap();
        output.write(0, Content::Data(data.clone().into())).unwrap();
        output.write(1 << 20, Content::Zeros(1 << 20)).unwrap();
        assert_eq!(output.finish(2 << 20).unwrap(), 4096);
        data.resize(2 << 20, 0);
        assert!(std::fs::read(&path).unwrap() == data);
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20, "the file is not sparse");
    }
}
