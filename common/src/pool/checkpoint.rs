//! The pool's part of a checkpoint.
//!
//! A capture is the state exactly as of one moment, taken under the lock without copying maps. The caller performs and
//! syncs the device writes planned until then, writes the capture into one transaction of the catalogue, and reports
//! it done; only then is what was freed before it reusable.

use std::sync::Arc;

use super::{
    DeviceStanding, META, Pool, PoolState,
    chunk::Chunk,
    encode_state,
    map::Key,
    segments::{CountPage, encode_page},
};
use crate::catalog::{CatalogError, CatalogTxn};

/// What is to be known of a capture until it is done.
pub(super) struct Pending {
    id: u64,
    keys: Vec<Key>,
    /// Devices that join or leave with it.
    devices: Vec<(u16, DeviceStanding)>,
}

/// The state of the pool at one moment.
pub struct Capture {
    id: u64,
    state: PoolState,
    chunks: Vec<(Key, Arc<Chunk>)>,
    counts: Vec<((u16, u32), Arc<CountPage>)>,
}

impl Capture {
    /// For [`Pool::checkpoint_done`].
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Map chunks in it.
    #[must_use]
    pub fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// Writes it into a transaction.
    ///
    /// # Errors
    /// The catalogue cannot be written.
    pub fn write_into(&self, txn: &mut CatalogTxn<'_>) -> Result<(), CatalogError> {
        for (key, chunk) in &self.chunks {
            if chunk.is_empty() {
                txn.remove_chunk(key.tree, key.chunk)?;
            } else {
                txn.put_chunk(key.tree, key.chunk, &chunk.encode(key.tree, key.chunk))?;
            }
        }
        for ((device, page), counts) in &self.counts {
            txn.put_counts(*device, *page, &encode_page(*device, *page, counts))?;
        }
        txn.put_meta(META, &encode_state(&self.state))
    }
}

impl Pool {
    /// Captures the state as it is now. A capture that is never done costs nothing: the next one holds its changes too.
    pub fn capture(&mut self) -> Capture {
        let id = self.segments.tick();
        let chunks = self.map.unsaved();
        let keys = chunks.iter().map(|(key, _)| *key).collect();
        self.captured = Some(Pending { id, keys, devices: self.changing() });
        Capture { id, state: self.state(), chunks, counts: self.segments.dirty_pages() }
    }

    /// The last capture is durable: what was freed before it becomes reusable as soon as no read may hold its address.
    /// Nothing happens for another id than the last one's.
    pub fn checkpoint_done(&mut self, capture_id: u64) {
        if self.captured.as_ref().is_none_or(|c| c.id != capture_id) {
            return;
        }
        let Some(pending) = self.captured.take() else { return };
        self.segments.set_durable(pending.id);
        self.segments.pages_saved(pending.id);
        self.map.saved(&pending.keys, pending.id, self.segments.horizon());
        self.devices_saved(&pending.devices);
    }
}
