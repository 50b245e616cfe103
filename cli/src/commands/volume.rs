//! `volume`.

use anyhow::Result;
use serde_json::{Value, json};
use understudy_client::proto::{
    AckRule, AwayRule, CreateVolumeRequest, DeleteVolumeRequest, GetVolumeRequest, ResizeVolumeRequest,
    SetAckRuleRequest, Volume,
};

use crate::args::{Global, Usage, VolumeCommand};
use crate::convert;
use crate::output::{print_json, print_line, size, table};

/// Bytes that one call discards.
const DISCARD_BYTES: u64 = 1 << 30;

pub(crate) async fn run(global: &Global, command: VolumeCommand) -> Result<()> {
    let volumes = global.primary_client()?.volumes();
    let named = |volume: String| GetVolumeRequest { volume_id: 0, volume };
    let volume = match command {
        VolumeCommand::Create { name, size, block_size, ack, away, group } => {
            let ack = AckRule::from(ack).into();
            let away = AwayRule::from(away).into();
            let block_bytes = block_bytes(block_size)?;
            volumes.create(CreateVolumeRequest { name, size_bytes: size, block_bytes, group, ack, away }).await?
        }
        VolumeCommand::Show { name } => volumes.find(named(name)).await?,
        VolumeCommand::Resize { name, size, discard } => {
            let volume = volumes.find(named(name)).await?;
            if discard {
                discard_behind(global, &volume, size).await?;
            }
            // By id: a volume of the same name that someone makes meanwhile is another one.
            volumes
                .resize(ResizeVolumeRequest { volume_id: volume.id, volume: String::new(), size_bytes: size })
                .await?
        }
        VolumeCommand::SetAck { name, ack, away } => {
            let ack = AckRule::from(ack).into();
            let away = away.map_or(AwayRule::Unspecified, AwayRule::from).into();
            volumes.set_ack_rule(SetAckRuleRequest { volume_id: 0, volume: name, ack, away }).await?
        }
        VolumeCommand::List => {
            let all = volumes.list().await?;
            return if global.json {
                print_json(&Value::Array(all.iter().map(convert::volume).collect()))
            } else {
                print_line(&volume_table(&all))
            };
        }
        VolumeCommand::Delete { name } => {
            // By id: a volume of the same name that someone makes meanwhile is another one.
            let id = volumes.find(named(name.clone())).await?.id;
            volumes.delete(DeleteVolumeRequest { volume_id: id, volume: String::new() }).await?;
            return if global.json {
                print_json(&json!({"deleted": name, "id": id}))
            } else {
                print_line(&format!("deleted {name}"))
            };
        }
    };
    if global.json { print_json(&convert::volume(&volume)) } else { print_line(&volume_table(&[volume])) }
}

/// What cannot be the volume's new size is told before anything is discarded.
async fn discard_behind(global: &Global, volume: &Volume, size: u64) -> Result<()> {
    if size == 0 || !size.is_multiple_of(u64::from(volume.block_bytes)) {
        return Err(Usage(format!("--size must be a number of whole blocks of {} bytes", volume.block_bytes)).into());
    }
    let handle = global.primary_client()?.volume(&volume.name).await?;
    let mut at = size;
    while at < volume.size_bytes {
        let step = (volume.size_bytes - at).min(DISCARD_BYTES);
        handle.discard(at, step).await?;
        at += step;
    }
    Ok(())
}

/// The wire has 32 bits for it; the server checks the rest.
pub(crate) fn block_bytes(bytes: u64) -> Result<u32> {
    u32::try_from(bytes).map_err(|_| Usage("--block-size must be a power of two from 512B to 64KiB".to_owned()).into())
}

fn volume_table(volumes: &[Volume]) -> String {
    let row = |v: &Volume| {
        [
            v.name.clone(),
            v.id.to_string(),
            size(v.size_bytes),
            size(v.block_bytes.into()),
            v.group.clone(),
            convert::ack(v.ack()).to_owned(),
            convert::away(v.away()).to_owned(),
        ]
    };
    table(["NAME", "ID", "SIZE", "BLOCK", "GROUP", "ACK", "AWAY"], volumes.iter().map(row))
}
