//! Mends damaged blocks of either side from the other one, while a session is open.
//!
//! Of the primary's own damaged block the backup is asked, if it provably holds the same version; see
//! `understudy_common::store::Repair` for why that cannot bring back an old one. Of the backup's, the primary writes its
//! version once more. Both are ordinary writes: they are journaled, shipped or marked like any other.
//!
//! A version that only snapshots see is read on the other side from a mirrored snapshot, and written anew where it lies.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::watch,
    task::JoinError,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use understudy_common::{
    checksum::crc32c,
    events::EventLog,
    pool::Owner,
    scrub,
    store::{Store, Suspect},
    types::{BlockRange, SnapshotId, VolumeId},
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

/// On the backup or here, a block of a volume, and where it lies or which snapshot sees it.
type Tried = (bool, VolumeId, u64, u64);

/// See the module.
pub(crate) struct Repairs {
    store: Arc<Store>,
    sessions: watch::Receiver<Option<Attached>>,
    events: EventLog,
    inline: bool,
    /// What was tried, on the backup or here, and when.
    tried: BTreeMap<Tried, Instant>,
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
            if !self.is_due((false, suspect.volume, suspect.block, suspect.segment.0)) {
                continue;
            }
            match owner {
                Owner::Head => self.fetch(attached, suspect.volume, suspect.block).await,
                Owner::Snapshot => self.fetch_version(attached, suspect).await,
            }
        }
        let asked = v1::ReplicaScrubRequest { session: attached.session.clone(), ..Default::default() };
        let mut client = attached.client.clone();
        let Ok(Ok(answer)) = timeout(CALL, client.scrub(asked)).await else { return };
        for block in &answer.into_inner().damaged {
            let (volume, snapshot) = (VolumeId(block.volume_id), SnapshotId(block.snapshot_id));
            if !self.is_due((true, volume, block.block, snapshot.0)) {
                continue;
            }
            match block.snapshot_only {
                false => self.rewrite(volume, block.block).await,
                true if block.snapshot_id == 0 => {}
                true => self.send_version(attached, snapshot, volume, block.block).await,
            }
        }
    }

    fn is_due(&mut self, tried: Tried) -> bool {
        let due = !self.tried.contains_key(&tried);
        if due {
            self.tried.insert(tried, Instant::now());
        }
        due
    }

    /// Repairs a block of this side.
    async fn fetch(&self, attached: &Attached, volume: VolumeId, block: u64) {
        // What is retained or marked may differ there; when the backup has it, it is tried again.
        let Some(repair) = self.store.begin_repair(volume, block) else { return };
        let (data, why) = match fetch(attached, volume, block, SnapshotId(0)).await {
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

    /// Repairs a version of this side that only snapshots see.
    async fn fetch_version(&self, attached: &Attached, suspect: Suspect) {
        let Suspect { volume, block, .. } = suspect;
        let snapshot = match self.store.mirrored_sight(suspect) {
            Ok(Some(snapshot)) => snapshot,
            // The backup never had that image.
            Ok(None) => return,
            Err(error) => return warn!(%volume, block, %error, "who sees a damaged block cannot be found out"),
        };
        let data = match fetch(attached, volume, block, snapshot).await {
            Ok(data) => data,
            Err(why) => return warn!(%volume, block, %snapshot, why, "a damaged block of a snapshot cannot be fetched"),
        };
        let store = Arc::clone(&self.store);
        match self.blocking(move || scrub::mend(&store, suspect, &data)).await {
            Ok(Ok(true)) => self.tell("primary", volume, block),
            Ok(Ok(false)) => warn!(%volume, block, %snapshot, "what the backup holds of a damaged block does not fit"),
            Ok(Err(error)) => warn!(%volume, block, %error, "a damaged block of a snapshot cannot be repaired"),
            Err(error) => warn!(%error, "a repair was ended"),
        }
    }

    /// Has a version of the backup's that only snapshots see written anew.
    async fn send_version(&self, attached: &Attached, snapshot: SnapshotId, volume: VolumeId, block: u64) {
        let Ok(reader) = self.store.snapshot_reader(snapshot, volume) else { return };
        let data = match self.blocking(move || reader.read(block, 1)).await {
            Ok(Ok(data)) => data,
            Ok(Err(error)) => return warn!(%volume, block, %snapshot, %error, "a block for the backup cannot be read"),
            Err(error) => return warn!(%error, "a repair was ended"),
        };
        let crc32c = crc32c(&data);
        let (session, volume_id, snapshot_id) = (attached.session.clone(), volume.0, snapshot.0);
        let request = v1::MendBlockRequest { session, volume_id, block, snapshot_id, data, crc32c };
        match timeout(CALL, attached.client.clone().mend_block(request)).await {
            Ok(Ok(answer)) if answer.get_ref().mended => self.tell("backup", volume, block),
            Ok(Ok(_)) => {
                warn!(%volume, block, %snapshot, "what this side holds of a damaged block does not fit the backup's")
            }
            Ok(Err(status)) => {
                warn!(%volume, block, why = status.message(), "the backup does not mend a damaged block")
            }
            Err(_) => warn!(%volume, block, "the backup did not answer within {CALL:?}"),
        }
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
        if self.inline { Ok(work()) } else { tokio::task::spawn_blocking(work).await }
    }

    /// Has a block of the backup written once more.
    async fn rewrite(&self, volume: VolumeId, block: u64) {
        let store = Arc::clone(&self.store);
        let write = move || store.rewrite(BlockRange { volume, first: block, count: 1 }, unix_ms());
        match self.blocking(write).await {
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

/// From the head, or from a snapshot.
async fn fetch(attached: &Attached, volume: VolumeId, block: u64, snapshot: SnapshotId) -> Result<Bytes, String> {
    let mut client = attached.client.clone();
    let (session, volume_id, snapshot_id) = (attached.session.clone(), volume.0, snapshot.0);
    let request = v1::FetchBlockRequest { session, volume_id, block, snapshot_id };
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
