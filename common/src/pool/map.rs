//! The paged segment maps of all layers: a bounded cache of chunks in front of the catalogue.
//!
//! A chunk that differs from the last durable checkpoint (`unsaved`) stays in memory until a checkpoint holds it; the
//! others are evicted by second chance. A capture shares chunks with the map; the next change copies the chunk.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use foldhash::fast::FixedState;
use hashbrown::HashMap;

use super::{chunk::Chunk, error::PoolError};
use crate::catalog::Catalog;

/// Which chunk of which layer's tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub tree: u64,
    pub chunk: u32,
}

struct Cached {
    chunk: Arc<Chunk>,
    referenced: bool,
    /// Waits in the ring for its eviction.
    in_ring: bool,
    unsaved: bool,
    /// Part of the map's `bytes`.
    weight: usize,
}

pub(super) struct Map {
    catalog: Catalog,
    cached: HashMap<Key, Cached, FixedState>,
    ring: VecDeque<Key>,
    /// With the time of the last change.
    unsaved: BTreeMap<Key, u64>,
    bytes: usize,
    limit: usize,
}

impl Map {
    pub(super) fn new(catalog: Catalog, limit: usize) -> Self {
        let cached = HashMap::default();
        Self { catalog, cached, ring: VecDeque::new(), unsaved: BTreeMap::new(), bytes: 0, limit }
    }

    /// The chunk, from memory or the catalogue. `horizon` as in [`super::segments::Segments::horizon`].
    pub(super) fn chunk(&mut self, key: Key, horizon: u64) -> Result<&Chunk, PoolError> {
        self.load(key, horizon)?;
        let cached = self.cached.get_mut(&key).expect("just loaded");
        cached.referenced = true;
        Ok(&cached.chunk)
    }

    /// The chunk, to be changed at `now`.
    pub(super) fn change(&mut self, key: Key, horizon: u64, now: u64) -> Result<&mut Chunk, PoolError> {
        self.load(key, horizon)?;
        let cached = self.cached.get_mut(&key).expect("just loaded");
        cached.referenced = true;
        cached.unsaved = true;
        self.unsaved.insert(key, now);
        Ok(Arc::make_mut(&mut cached.chunk))
    }

    /// The first chunk of `tree` in `from..=last` that is not empty.
    pub(super) fn next(&self, tree: u64, from: u32, last: u32) -> Result<Option<u32>, PoolError> {
        if from > last {
            return Ok(None);
        }
        let key = |chunk| Key { tree, chunk };
        let mut range = self.unsaved.range(key(from)..=key(last)).map(|(k, _)| k);
        let in_memory = range.find(|k| !self.cached[*k].chunk.is_empty()).map(|k| k.chunk);
        let mut saved = None;
        self.catalog.read()?.chunks(tree, from, in_memory.unwrap_or(last), |chunk| {
            let stale = self.unsaved.contains_key(&key(chunk));
            saved = (!stale).then_some(chunk);
            stale
        })?;
        Ok(saved.or(in_memory))
    }

    /// Every unsaved chunk, by key.
    pub(super) fn unsaved(&self) -> Vec<(Key, Arc<Chunk>)> {
        self.unsaved.keys().map(|key| (*key, self.cached[key].chunk.clone())).collect()
    }

    pub(super) fn unsaved_count(&self) -> usize {
        self.unsaved.len()
    }

    /// The checkpoint that was captured at `time` is durable: of `keys`, those not changed since are clean.
    pub(super) fn saved(&mut self, keys: &[Key], time: u64, horizon: u64) {
        for key in keys {
            if self.unsaved.get(key).is_some_and(|changed| *changed < time) {
                self.unsaved.remove(key);
                let cached = self.cached.get_mut(key).expect("unsaved chunks stay");
                cached.unsaved = false;
                self.bytes -= cached.weight;
                cached.weight = cached.chunk.weight();
                self.bytes += cached.weight;
                if !std::mem::replace(&mut cached.in_ring, true) {
                    self.ring.push_back(*key);
                }
            }
        }
        self.evict(horizon);
    }

    fn load(&mut self, key: Key, horizon: u64) -> Result<(), PoolError> {
        if self.cached.contains_key(&key) {
            return Ok(());
        }
        let decoded =
            self.catalog.read()?.chunk(key.tree, key.chunk, |blob| Chunk::decode(key.tree, key.chunk, blob))?;
        let chunk = decoded
            .transpose()
            .map_err(|reason| PoolError::Map { tree: key.tree, chunk: key.chunk, reason })?
            .unwrap_or_default();
        let weight = chunk.weight();
        self.bytes += weight;
        // Before it is in: the one that was asked for is not the one to go.
        self.evict(horizon);
        let cached = Cached { chunk: Arc::new(chunk), referenced: true, in_ring: true, unsaved: false, weight };
        self.cached.insert(key, cached);
        self.ring.push_back(key);
        Ok(())
    }

    fn evict(&mut self, horizon: u64) {
        // Each chunk gets a second chance at most once in a call.
        let mut tries = 2 * self.ring.len();
        while self.bytes > self.limit && tries > 0 {
            tries -= 1;
            let Some(key) = self.ring.pop_front() else { return };
            let cached = self.cached.get_mut(&key).expect("what is in the ring is cached");
            if cached.unsaved {
                cached.in_ring = false;
            } else if std::mem::take(&mut cached.referenced) || cached.chunk.must_stay(horizon) {
                self.ring.push_back(key);
            } else {
                self.bytes -= cached.weight;
                self.cached.remove(&key);
            }
        }
    }
}
