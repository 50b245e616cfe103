//! `inspect`: what the directory of a stopped node holds.

use anyhow::{Context as _, Result, bail, ensure};
use understudy_common::process::lock_to_inspect;
use understudy_common::storage::RealStorage;
use understudy_common::store::{self, Inspection};

use crate::args::{Global, InspectArgs};
use crate::output::{print_json, print_line, size, table, time};

pub(crate) fn run(global: &Global, args: &InspectArgs) -> Result<()> {
    let _lock = lock_to_inspect(&args.dir)?;
    // It exists, so nothing is made.
    let mut storage = RealStorage::new(&args.dir).context("cannot open the directory")?;
    if let Some(staging) = &args.staging_path {
        ensure!(staging.is_dir(), "{} is not a directory; name the one of [staging] path", staging.display());
        storage = storage.with_journal(staging)?;
    }
    let found = store::inspect(&storage).with_context(|| format!("cannot read {}", args.dir.display()))?;
    if global.json {
        print_json(&serde_json::to_value(&found)?)?
    } else {
        print(&found)?
    }
    match found.problems.len() {
        0 => Ok(()),
        n => bail!("{n} problems found in {}; restore the disk, or use the other side", args.dir.display()),
    }
}

fn print(found: &Inspection) -> Result<()> {
    print_line(&format!(
        "{} instance {} generation {} of pair {}",
        found.role, found.instance, found.generation, found.pair
    ))?;
    print_line(&format!("checkpoint up to record {}", found.checkpoint_lsn))?;
    if let Some(j) = &found.journal {
        let torn = if j.torn_bytes == 0 { String::new() } else { format!(", torn tail of {}", size(j.torn_bytes)) };
        let files = format!("{} files of {}, {} needed", j.files, size(j.file_bytes), size(j.span_bytes));
        let records = format!("records {} to {}", j.first_lsn, j.last_lsn);
        print_line(&format!("journal {files}, epoch {}, {records}{torn}", j.epoch))?;
    }
    let volumes = found.volumes.iter().map(|v| {
        let (ack, away) = (format!("{:?}", v.ack).to_lowercase(), format!("{:?}", v.away).to_lowercase());
        [v.name.clone(), v.id.to_string(), size(v.size_bytes), size(v.block_bytes.into()), v.group.clone(), ack, away]
    });
    print_line(&table(["VOLUME", "ID", "SIZE", "BLOCK", "GROUP", "ACK", "AWAY"], volumes))?;
    let groups = found.groups.iter().map(|g| {
        let acked = g.acked_lsn.map_or_else(String::new, |lsn| lsn.to_string());
        let retained = g.retained_bytes.map_or_else(String::new, size);
        [g.name.clone(), format!("{}:{}", g.generation, g.lsn), time(g.time_unix_ms), acked, retained]
    });
    print_line(&table(["GROUP", "POSITION", "TIME", "ACKED", "RETAINED"], groups))?;
    let devices = found
        .devices
        .iter()
        .map(|d| [d.number.to_string(), d.id.clone(), d.segments.to_string(), d.used.to_string(), d.free.to_string()]);
    print_line(&format!("pool with segments of {}", size(found.segment_bytes.into())))?;
    print_line(&table(["DEVICE", "ID", "SEGMENTS", "USED", "FREE"], devices))?;
    found.problems.iter().try_for_each(|problem| print_line(&format!("problem: {problem}")))
}
