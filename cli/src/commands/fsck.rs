//! `fsck`: whether the directory of a stopped node is whole.

use anyhow::{Context as _, Result, bail, ensure};
use understudy_common::process::lock_to_inspect;
use understudy_common::storage::RealStorage;
use understudy_common::store::{self, Checkup};

use crate::args::{FsckArgs, Global};
use crate::output::{print_json, print_line, size};

pub(crate) fn run(global: &Global, args: &FsckArgs) -> Result<()> {
    let _lock = lock_to_inspect(&args.dir)?;
    // It exists, so nothing is made.
    let mut storage = RealStorage::new(&args.dir).context("cannot open the directory")?;
    if let Some(staging) = &args.staging_path {
        ensure!(staging.is_dir(), "{} is not a directory; name the one of [staging] path", staging.display());
        storage = storage.with_journal(staging)?;
    }
    // A relative path of the command line is not one of the directory.
    let absolute = args.device.iter().map(std::path::absolute).collect::<Result<Vec<_>, _>>()?;
    let devices: Vec<String> = absolute.iter().map(|path| path.to_string_lossy().into_owned()).collect();
    let found =
        store::fsck(&storage, args.data, &devices).with_context(|| format!("cannot read {}", args.dir.display()))?;
    if global.json {
        print_json(&serde_json::to_value(&found)?)?
    } else {
        print(&found)?
    }
    match found.problem_count {
        0 => Ok(()),
        n => bail!("{n} problems found in {}; restore the disk, or use the other side", args.dir.display()),
    }
}

fn print(found: &Checkup) -> Result<()> {
    print_line(&format!(
        "{} instance {}, checkpoint up to record {}",
        found.role, found.instance, found.checkpoint_lsn
    ))?;
    print_line(&format!(
        "{} segments: {} owned, {} free; {} block versions",
        found.segments, found.owned_segments, found.free_segments, found.owned_blocks
    ))?;
    match found.compared_bytes {
        Some(bytes) => print_line(&format!(
            "{} read and compared with their checksums, without {} blocks that the journal writes anew",
            size(bytes),
            found.journaled_blocks
        ))?,
        None => print_line("the blocks themselves were not read: --data does that")?,
    }
    found.problems.iter().try_for_each(|problem| print_line(&format!("problem: {problem}")))?;
    match found.problem_count.saturating_sub(found.problems.len() as u64) {
        0 => Ok(()),
        more => print_line(&format!("and {more} more problems")),
    }
}
