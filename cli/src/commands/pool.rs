//! `pool`: the devices of one side, adding and draining them, and where segments lie.

use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use understudy_client::proto::{
    AddDeviceRequest, DeviceState, DrainDeviceRequest, GetPoolRequest, ListSegmentsRequest, ListSegmentsResponse, Pool,
    PoolDevice, SegmentDescriptor,
};
use understudy_client::{BackupClient, VolumeClient};

use crate::args::{Global, PoolCommand, PoolSide};
use crate::convert;
use crate::output::{print_json, print_line, progress, size, table};

/// Time between two looks at a drain.
const LOOK: Duration = Duration::from_millis(300);

pub(crate) async fn run(global: &Global, command: PoolCommand) -> Result<()> {
    match command {
        PoolCommand::Show { on, segments: true, volume } => {
            segments(global, &PoolClient::of(global, on)?, volume.unwrap_or_default()).await
        }
        PoolCommand::Show { on, .. } => show(global, &PoolClient::of(global, on)?.pool().await?),
        PoolCommand::Add { path, size: bytes, on } => {
            let request = AddDeviceRequest { path, size_bytes: bytes.unwrap_or_default() };
            let device = PoolClient::of(global, on)?.add(request).await?;
            if global.json {
                return print_json(&convert::pool_device(&device));
            }
            print_line(&format!("added {} as device {}, {} now", device.path, device.id, size(device.size_bytes)))
        }
        PoolCommand::Drain { path, on, cancel, no_wait } => {
            let client = PoolClient::of(global, on)?;
            let device = client.drain(DrainDeviceRequest { path, cancel }).await?;
            let device = if cancel || no_wait { device } else { wait_drained(global, &client, device).await? };
            if global.json {
                return print_json(&convert::pool_device(&device));
            }
            let path = &device.path;
            print_line(&match device.state() {
                DeviceState::Removed => format!("{path} is empty and no part of the pool any more; it may be deleted"),
                _ if cancel => format!("{path} is used again"),
                _ => format!("{path} is being drained, {} are to be moved", size(device.live_bytes)),
            })
        }
    }
}

/// The pool of a side.
enum PoolClient {
    Primary(VolumeClient),
    Backup(BackupClient),
}

impl PoolClient {
    fn of(global: &Global, side: PoolSide) -> Result<Self> {
        Ok(match side {
            PoolSide::Primary => Self::Primary(global.primary_client()?.volumes()),
            PoolSide::Backup => Self::Backup(global.backup_client()?.backup()),
        })
    }

    async fn pool(&self) -> Result<Pool> {
        Ok(match self {
            Self::Primary(client) => client.pool().await?,
            Self::Backup(client) => client.pool(GetPoolRequest {}).await?,
        })
    }

    async fn add(&self, request: AddDeviceRequest) -> Result<PoolDevice> {
        Ok(match self {
            Self::Primary(client) => client.add_device(request).await?,
            Self::Backup(client) => client.add_device(request).await?,
        })
    }

    async fn drain(&self, request: DrainDeviceRequest) -> Result<PoolDevice> {
        Ok(match self {
            Self::Primary(client) => client.drain_device(request).await?,
            Self::Backup(client) => client.drain_device(request).await?,
        })
    }

    async fn segments(&self, request: ListSegmentsRequest) -> Result<ListSegmentsResponse> {
        Ok(match self {
            Self::Primary(client) => client.segments(request).await?,
            Self::Backup(client) => client.segments(request).await?,
        })
    }
}

/// Looks until the device is removed, also across a restart of the service that is shorter than `--retry-for`.
async fn wait_drained(global: &Global, client: &PoolClient, begun: PoolDevice) -> Result<PoolDevice> {
    let bar = progress(begun.live_bytes, global.json);
    loop {
        let pool = client.pool().await?;
        let Some(device) = pool.devices.into_iter().find(|device| device.id == begun.id) else {
            bail!("the pool has no device {} any more", begun.id);
        };
        match device.state() {
            DeviceState::Removed => {
                bar.finish_and_clear();
                return Ok(device);
            }
            DeviceState::Draining | DeviceState::Removing => {}
            _ => bail!("the drain of {} was cancelled", device.path),
        }
        bar.set_length(begun.live_bytes.max(device.live_bytes));
        bar.set_position(begun.live_bytes.saturating_sub(device.live_bytes));
        if pool.drain_lacks_room {
            bar.set_message("no room on the other devices: add one, or delete data or snapshots");
        } else if device.live_bytes == 0 {
            bar.set_message("waiting for a checkpoint, and for records that the backup has not taken");
        } else {
            bar.set_message("");
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn show(global: &Global, pool: &Pool) -> Result<()> {
    if global.json {
        return print_json(&convert::pool(pool));
    }
    print_line(&format!(
        "{} of {} used, {} free, {} reserved, segments of {}",
        size(pool.used_bytes),
        size(pool.total_bytes),
        size(pool.free_bytes),
        size(pool.reserved_bytes),
        size(pool.segment_bytes.into())
    ))?;
    print_line(&format!(
        "{} promised to volumes, {:.2} times the pool",
        size(pool.promised_bytes),
        convert::share(pool.promised_bytes, pool.total_bytes)
    ))?;
    let used = convert::share(pool.used_bytes, pool.total_bytes);
    if used >= pool.warn_at {
        print_line(&format!(
            "warning: {:.0} % of the pool are in use (pool.warn_at = {}): discard or delete data or snapshots, or add a device",
            used * 100.0,
            pool.warn_at
        ))?;
    }
    if pool.drain_lacks_room {
        print_line("warning: a drain has no room on the other devices: add one, or delete data or snapshots")?;
    }
    let row = |d: &PoolDevice| {
        let state = convert::device_state(d.state()).to_owned();
        [d.id.to_string(), size(d.size_bytes), size(d.free_bytes), size(d.live_bytes), state, d.path.clone()]
    };
    let present = pool.devices.iter().filter(|d| d.state() != DeviceState::Removed);
    print_line(&table(["ID", "SIZE", "FREE", "LIVE", "STATE", "PATH"], present.map(row)))
}

/// Printed as they come: a volume may have many.
async fn segments(global: &Global, client: &PoolClient, volume: String) -> Result<()> {
    let mut page_token = String::new();
    let mut first = true;
    loop {
        let request = ListSegmentsRequest { volume: volume.clone(), page_token };
        let answer = client.segments(request).await?;
        if global.json {
            for segment in &answer.segments {
                print_line(&segment_json(segment).to_string())?;
            }
        } else if !answer.segments.is_empty() || first {
            let heads = ["VOLUME", "SEGMENT", "DEVICE", "PLACE", "OFFSET", "BLOCKS", "OWNER"];
            print_line(&table(heads, answer.segments.iter().map(segment_row)))?;
        }
        first = false;
        page_token = answer.next_page_token;
        if page_token.is_empty() {
            return Ok(());
        }
    }
}

fn owner(segment: &SegmentDescriptor) -> String {
    match (segment.of_head, segment.snapshot.as_str()) {
        (true, _) => "head".into(),
        (false, "") => "snapshot of the node".into(),
        (false, name) => format!("@{name}"),
    }
}

fn segment_row(segment: &SegmentDescriptor) -> [String; 7] {
    [
        segment.volume.clone(),
        segment.virtual_segment.to_string(),
        segment.device.to_string(),
        segment.segment.to_string(),
        segment.device_offset_bytes.to_string(),
        segment.blocks.to_string(),
        owner(segment),
    ]
}

fn segment_json(segment: &SegmentDescriptor) -> Value {
    json!({
        "volume": segment.volume,
        "volume_id": segment.volume_id,
        "virtual_segment": segment.virtual_segment,
        "device": segment.device,
        "segment": segment.segment,
        "device_offset_bytes": segment.device_offset_bytes,
        "blocks": segment.blocks,
        "of_head": segment.of_head,
        "snapshot": segment.snapshot,
    })
}
