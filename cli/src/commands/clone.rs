//! `clone`: writable copies of the backup's image.

use anyhow::Result;
use serde_json::{Value, json};
use understudy_client::proto::{CloneImageRequest, CloneInfo, DeleteCloneRequest, ListClonesRequest};

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
                return print_json(&clone_json(&made));
            }
            print_line(&clone_table(&[made]))?;
            print_line(&format!("served as a volume at {}: use it as --primary", global.backup_url()))
        }
        CloneCommand::List => {
            let clones = client.backup().clones(ListClonesRequest {}).await?.clones;
            if global.json {
                return print_json(&Value::Array(clones.iter().map(clone_json).collect()));
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

fn clone_json(clone: &CloneInfo) -> Value {
    json!({
        "name": clone.name,
        "volume": clone.volume,
        "snapshot": clone.snapshot,
        "position": convert::position(clone.position),
        "time_unix_ms": clone.time_unix_ms,
        "size_bytes": clone.size_bytes,
        "block_bytes": clone.block_bytes,
        "written_bytes": clone.written_bytes,
        "made_unix_ms": clone.made_unix_ms,
    })
}

fn clone_table(clones: &[CloneInfo]) -> String {
    let row = |clone: &CloneInfo| {
        let of = match clone.snapshot.as_str() {
            "" => clone.volume.clone(),
            snapshot => format!("{}@{snapshot}", clone.volume),
        };
        let image = convert::position_text(clone.position);
        [clone.name.clone(), of, image, time(clone.time_unix_ms), size(clone.size_bytes), size(clone.written_bytes)]
    };
    table(["CLONE", "OF", "IMAGE", "OF THE TIME", "SIZE", "WRITTEN"], clones.iter().map(row))
}
