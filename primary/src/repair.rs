//! Mends damaged blocks of either side from the other one, while a session is open.
//!
//! Of the primary's own damaged block the backup is asked, if it provably holds the same version; see
//! `understudy_common::store::Repair` for why that cannot bring back an old one. Of the backup's, the primary writes its
//! version once more. Both are ordinary writes: they are journaled, shipped or marked like any other.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use understudy_common::{
    checksum::crc32c,
    events::EventLog,
    pool::Owner,
    store::Store,
    types::{BlockRange, VolumeId},
};
use understudy_proto::v1;

use crate::{engine::unix_ms, replicator::Attached};

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// A block that is still damaged is tried again after so long: its repair is on its way, or the other side may be mended
/// meanwhile.
const AGAIN: Duration = Duration::from_secs(10);
/// One call to the backup.
const CALL: Duration = Duration::from_secs(5);

/// See the module.
pub(crate) struct Repairs {
    store: Arc<Store>,
    sessions: watch::Receiver<Option<Attached>>,
    events: EventLog,
    inline: bool,
    /// What was tried, on the backup or here, and when.
    tried: BTreeMap<(bool, VolumeId, u64), Instant>,
}

impl Repairs {
    pub fn new(store: Arc<Store>, sessions: watch::Receiver<Option<Attached>>, events: EventLog, inline: bool) -> Self {
        Self { store, sessions, events, inline, tried: BTreeMap::new() }
    }

    /// Goes on until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(looks.tick()).await.is_some() {
            let attached = self.sessions.borrow().clone();
            let Some(attached) = attached else { continue };
            self.tried.retain(|_, at| at.elapsed() < AGAIN);
            if stop.run_until_cancelled(self.mend(&attached)).await.is_none() {
                return;
            }
        }
    }

    async fn mend(&mut self, attached: &Attached) {
        for (suspect, owner) in self.store.damaged() {
            if owner == Owner::Head && self.is_due(false, suspect.volume, suspect.block) {
                self.fetch(attached, suspect.volume, suspect.block).await;
            }
        }
        let asked = v1::ReplicaScrubRequest { session: attached.session.clone(), ..Default::default() };
        let mut client = attached.client.clone();
        let Ok(Ok(answer)) = timeout(CALL, client.scrub(asked)).await else { return };
        for block in answer.into_inner().damaged.iter().filter(|block| !block.snapshot_only) {
            let volume = VolumeId(block.volume_id);
            if self.is_due(true, volume, block.block) {
                self.rewrite(volume, block.block).await;
            }
        }
    }

    fn is_due(&mut self, on_backup: bool, volume: VolumeId, block: u64) -> bool {
        let due = !self.tried.contains_key(&(on_backup, volume, block));
        if due {
            self.tried.insert((on_backup, volume, block), Instant::now());
        }
        due
    }

    /// Repairs a block of this side.
    async fn fetch(&self, attached: &Attached, volume: VolumeId, block: u64) {
        // What is retained or marked may differ there; when the backup has it, it is tried again.
        let Some(repair) = self.store.begin_repair(volume, block) else { return };
        let (data, why) = match fetch(attached, volume, block).await {
            Ok(data) => (Some(data), String::new()),
            Err(why) => (None, why),
        };
        match self.store.finish_repair(repair, data, unix_ms()) {
            Ok(Some(_)) => self.tell("primary", volume, block),
            Ok(None) if why.is_empty() => {}
            Ok(None) => warn!(%volume, block, why, "a damaged block cannot be fetched from the backup"),
            Err(error) => warn!(%volume, block, %error, "a damaged block cannot be repaired yet"),
        }
    }

    /// Has a block of the backup written once more.
    async fn rewrite(&self, volume: VolumeId, block: u64) {
        let store = Arc::clone(&self.store);
        let write = move || store.rewrite(BlockRange { volume, first: block, count: 1 }, unix_ms());
        let written = if self.inline { Ok(write()) } else { tokio::task::spawn_blocking(write).await };
        match written {
            Ok(Ok(_)) => self.tell("backup", volume, block),
            Ok(Err(error)) => warn!(%volume, block, %error, "a damaged block of the backup cannot be repaired yet"),
            Err(error) => warn!(%error, "a repair was ended"),
        }
    }

    fn tell(&self, side: &str, volume: VolumeId, block: u64) {
        info!(side, %volume, block, "block.repaired");
        let fields = [("side", side.to_owned()), ("volume", volume.to_string()), ("block", block.to_string())];
        let message = format!("block {block} of volume {volume} of the {side} is written anew from the other side");
        self.events.record(unix_ms(), "block.repaired", message, fields);
    }
}

async fn fetch(attached: &Attached, volume: VolumeId, block: u64) -> Result<Bytes, String> {
    let mut client = attached.client.clone();
    let request = v1::FetchBlockRequest { session: attached.session.clone(), volume_id: volume.0, block };
    let answer = match timeout(CALL, client.fetch_block(request)).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return Err(status.message().to_owned()),
        Err(_) => return Err(format!("no answer within {CALL:?}")),
    };
    if crc32c(&answer.data) != answer.crc32c {
        return Err("it was damaged on the way".into());
    }
    Ok(answer.data)
}
