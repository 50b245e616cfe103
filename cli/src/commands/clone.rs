//! `clone`: writable copies of the backup's image.

use anyhow::Result;
use serde_json::{Value, json};
use understudy_client::proto::{CloneImageRequest, CloneInfo, DeleteCloneRequest, ListClonesRequest};
use understudy_proto::json;

use crate::args::{CloneCommand, Global};
use crate::convert;
use crate::output::{print_json, print_line, size, table, time};

pub(crate) async fn run(global: &Global, command: CloneCommand) -> Result<()> {
    let client = global.backup_client()?;
    match command {
        CloneCommand::Create { volume, name, snapshot } => {
            let request = CloneImageRequest { volume_id: 0, volume, snapshot, name };
            let made = client.backup().clone_image(request).await?;
            if global.json {
                return print_json(&json::clone(&made));
            }
            print_line(&clone_table(&[made]))?;
            print_line(&format!("served as a volume at {}: use it as --primary", global.backup_url()))
        }
        CloneCommand::List => {
            let clones = client.backup().clones(ListClonesRequest {}).await?.clones;
            if global.json {
                return print_json(&Value::Array(clones.iter().map(json::clone).collect()));
            }
            print_line(&clone_table(&clones))
        }
        CloneCommand::Delete { name } => {
            client.backup().delete_clone(DeleteCloneRequest { name: name.clone() }).await?;
            if global.json {
                return print_json(&json!({"deleted": name}));
            }
            print_line(&format!("discarded {name}"))
        }
    }
}

/// `data`, or `data@monday`.
pub(super) fn base(clone: &CloneInfo) -> String {
    match clone.snapshot.as_str() {
        "" => clone.volume.clone(),
        snapshot => format!("{}@{snapshot}", clone.volume),
    }
}

fn clone_table(clones: &[CloneInfo]) -> String {
    let row = |clone: &CloneInfo| {
        let image = convert::position_text(clone.position);
        [
            clone.name.clone(),
            base(clone),
            image,
            time(clone.time_unix_ms),
            size(clone.size_bytes),
            size(clone.written_bytes),
        ]
    };
    table(["CLONE", "OF", "IMAGE", "OF THE TIME", "SIZE", "WRITTEN"], clones.iter().map(row))
}
