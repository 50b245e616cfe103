//! `verify`: both sides compared at one position.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use understudy_client::proto::{VerifyDifference, VerifyProgress, VerifyRequest};

use crate::args::{Global, VerifyArgs};
use crate::convert;
use crate::output::{print_json, print_line, progress};

pub(crate) async fn run(global: &Global, args: VerifyArgs) -> Result<()> {
    let request = VerifyRequest { volume_id: 0, volume: args.volume.unwrap_or_default(), repair: args.repair };
    let mut stream = global.primary_client()?.replication().verify(request).await?;
    let bar = progress(0, global.json);
    let mut groups: BTreeMap<String, VerifyProgress> = BTreeMap::new();
    let mut differences: Vec<VerifyDifference> = Vec::new();
    while let Some(told) = stream.next().await? {
        bar.set_length(told.total_bytes);
        bar.set_position(told.done_bytes);
        differences.extend(told.differences.iter().cloned());
        groups.insert(told.group.clone(), told);
    }
    bar.finish_and_clear();
    let sum = |of: fn(&VerifyProgress) -> u64| groups.values().map(of).sum::<u64>();
    let (differing, repaired) = (sum(|g| g.differing_blocks), sum(|g| g.repaired_blocks));
    if global.json {
        print_json(&json!({
            "groups": groups.values().map(group_json).collect::<Vec<_>>(),
            "differences": differences.iter().map(difference_json).collect::<Vec<_>>(),
            "differing_blocks": differing,
            "repaired_blocks": repaired,
            "identical": differing == 0,
        }))?;
    } else {
        for group in groups.values() {
            let at = convert::position_text(group.position);
            let found = match group.differing_blocks {
                0 => "identical".to_owned(),
                n => format!("{n} blocks differ, {} repaired", group.repaired_blocks),
            };
            print_line(&format!("{}: {found} at {at}", group.group))?;
        }
        for d in &differences {
            let end = d.first_block + d.block_count;
            let why = if d.primary_unreadable { "cannot be read on the primary" } else { "differ" };
            print_line(&format!("{}: blocks {}..{end} {why}", d.volume, d.first_block))?;
        }
    }
    match differing - repaired {
        0 => Ok(()),
        left if args.repair => {
            bail!("{left} blocks differ and were not repaired: the primary cannot read them; see `scrub`")
        }
        left => bail!("{left} blocks differ: `understudy verify --repair` writes what the primary holds on both sides"),
    }
}

fn group_json(group: &VerifyProgress) -> Value {
    json!({
        "group": group.group,
        "position": convert::position(group.position),
        "compared_bytes": group.done_bytes,
        "differing_blocks": group.differing_blocks,
        "repaired_blocks": group.repaired_blocks,
    })
}

fn difference_json(d: &VerifyDifference) -> Value {
    json!({
        "volume": d.volume,
        "volume_id": d.volume_id,
        "first_block": d.first_block,
        "block_count": d.block_count,
        "primary_unreadable": d.primary_unreadable,
    })
}
