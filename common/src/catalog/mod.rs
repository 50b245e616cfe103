//! The catalogue: every durable fact that is neither a record nor a block.
//!
//! A [redb](https://docs.rs/redb) database in one file of the storage, with four tables: `meta` (named values), `map`
//! (chunks of the segment maps), `counts` (pages of live counts) and `delta` (pages of the delta tables). Each [`Catalog::write`] is one durable commit, all
//! or nothing. After a failed access the catalogue refuses everything until it is opened again.
//!
//! The layout of the values is in `docs/formats.md`.

mod backend;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use redb::{Database, ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, TableError};

use crate::storage::{OpenMode, Storage};

pub(crate) const FILE: &str = "catalog.redb";
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const MAP: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("map");
const COUNTS: TableDefinition<'_, (u16, u32), &[u8]> = TableDefinition::new("counts");
const DELTA: TableDefinition<'_, (u64, u8, u32), &[u8]> = TableDefinition::new("delta");

/// Memory redb may use to cache pages, unless configured: 8 MiB.
pub const DEFAULT_CACHE_BYTES: usize = 8 * 1024 * 1024;

/// Why the catalogue could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The file could not be opened, made or synced.
    #[error("catalogue {FILE}: {source}; check the data directory and its permissions")]
    Open {
        /// What the storage said.
        #[source]
        source: io::Error,
    },
    /// The database refused: I/O failed, or the file is damaged.
    #[error("catalogue {FILE}: {source}; the node must be restarted, and if it says so again, restored")]
    Database {
        /// What redb said.
        #[source]
        source: Box<redb::Error>,
    },
    /// An earlier access failed.
    #[error("catalogue {FILE}: refused, because an earlier access failed; restart the node")]
    Poisoned,
}

fn database(source: impl Into<redb::Error>) -> CatalogError {
    CatalogError::Database { source: Box::new(source.into()) }
}

/// The open catalogue. A clone is another handle of the same database.
#[derive(Clone)]
pub struct Catalog {
    db: Arc<Database>,
    poisoned: Arc<AtomicBool>,
}

impl Catalog {
    /// Opens the catalogue of `storage`, or makes an empty one, with a page cache of at most `cache_bytes`.
    ///
    /// # Errors
    /// The file cannot be opened, or is damaged beyond what redb repairs.
    pub fn open(storage: &dyn Storage, cache_bytes: usize) -> Result<Self, CatalogError> {
        let opened = storage.open(FILE, OpenMode::OrCreate).and_then(|f| storage.sync_dir("").map(|()| f));
        let file = opened.map_err(|source| CatalogError::Open { source })?;
        let poisoned = Arc::new(AtomicBool::new(false));
        let backend = backend::Backend::new(file, poisoned.clone());
        let db = Database::builder().set_cache_size(cache_bytes).create_with_backend(backend).map_err(database)?;
        Ok(Self { db: Arc::new(db), poisoned })
    }

    /// Opens the catalogue of `storage` without changing its file: what redb writes while it opens, or repairs what a
    /// killed process left, stays in memory. A later [`Catalog::write`] would be lost.
    ///
    /// # Errors
    /// There is no catalogue, it cannot be read, or it is damaged beyond what redb repairs.
    pub fn open_read_only(storage: &dyn Storage, cache_bytes: usize) -> Result<Self, CatalogError> {
        let open = || {
            let file = storage.open(FILE, OpenMode::ReadOnly)?;
            if file.is_empty()? {
                // redb would make an empty database of it.
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty: the node never started"));
            }
            backend::Overlay::new(file)
        };
        let backend = open().map_err(|source| CatalogError::Open { source })?;
        let db = Database::builder().set_cache_size(cache_bytes).create_with_backend(backend).map_err(database)?;
        Ok(Self { db: Arc::new(db), poisoned: Arc::new(AtomicBool::new(false)) })
    }

    /// Runs `change` in one transaction and commits it durably. An error of `change` discards all of it.
    ///
    /// # Errors
    /// Those of `change`, and a failed commit, after which the catalogue is poisoned.
    pub fn write<T, E: From<CatalogError>>(
        &self,
        change: impl FnOnce(&mut CatalogTxn<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        self.check()?;
        let txn = self.db.begin_write().map_err(database)?;
        let out = {
            let mut tables = CatalogTxn {
                meta: txn.open_table(META).map_err(database)?,
                map: txn.open_table(MAP).map_err(database)?,
                counts: txn.open_table(COUNTS).map_err(database)?,
                delta: txn.open_table(DELTA).map_err(database)?,
            };
            change(&mut tables)?
        };
        txn.commit().map_err(|e| {
            self.poisoned.store(true, Ordering::Release);
            database(e)
        })?;
        Ok(out)
    }

    /// A view of the last commit. It stays as it is while later commits happen; drop it soon, it holds their space.
    ///
    /// # Errors
    /// The catalogue is poisoned or cannot be read.
    pub fn read(&self) -> Result<CatalogView, CatalogError> {
        self.check()?;
        Ok(CatalogView { txn: self.db.begin_read().map_err(database)? })
    }

    /// True after a failed access.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    fn check(&self) -> Result<(), CatalogError> {
        if self.is_poisoned() { Err(CatalogError::Poisoned) } else { Ok(()) }
    }
}

/// The tables inside [`Catalog::write`].
pub struct CatalogTxn<'a> {
    meta: redb::Table<'a, &'static str, &'static [u8]>,
    map: redb::Table<'a, (u64, u32), &'static [u8]>,
    counts: redb::Table<'a, (u16, u32), &'static [u8]>,
    delta: redb::Table<'a, (u64, u8, u32), &'static [u8]>,
}

impl CatalogTxn<'_> {
    /// The named value, as this transaction sees it.
    ///
    /// # Errors
    /// The catalogue cannot be read.
    pub fn meta(&self, name: &str) -> Result<Option<Vec<u8>>, CatalogError> {
        Ok(self.meta.get(name).map_err(database)?.map(|v| v.value().to_vec()))
    }

    /// Stores a named value.
    ///
    /// # Errors
    /// The catalogue cannot be written.
    pub fn put_meta(&mut self, name: &str, value: &[u8]) -> Result<(), CatalogError> {
        self.meta.insert(name, value).map_err(database)?;
        Ok(())
    }

    /// Removes a named value, if it exists.
    ///
    /// # Errors
    /// The catalogue cannot be written.
    pub fn remove_meta(&mut self, name: &str) -> Result<(), CatalogError> {
        self.meta.remove(name).map_err(database)?;
        Ok(())
    }

    /// Stores chunk `chunk` of map `tree`.
    ///
    /// # Errors
    /// The catalogue cannot be written.
    pub fn put_chunk(&mut self, tree: u64, chunk: u32, blob: &[u8]) -> Result<(), CatalogError> {
        self.map.insert((tree, chunk), blob).map_err(database)?;
        Ok(())
    }

    /// Removes chunk `chunk` of map `tree`, if it exists.
    ///
    /// # Errors
    /// The catalogue cannot be written.
    pub fn remove_chunk(&mut self, tree: u64, chunk: u32) -> Result<(), CatalogError> {
        self.map.remove((tree, chunk)).map_err(database)?;
        Ok(())
    }

    /// Stores page `page` of the live counts of `device`.
    ///
    /// # Errors
    /// The catalogue cannot be written.
    pub fn put_counts(&mut self, device: u16, page: u32, blob: &[u8]) -> Result<(), CatalogError> {
        self.counts.insert((device, page), blob).map_err(database)?;
        Ok(())
    }

    /// Stores page `page` of a set of the delta table of `volume`.
    ///
    /// # Errors
    /// The catalogue cannot be written.
    pub fn put_delta(&mut self, volume: u64, set: u8, page: u32, blob: &[u8]) -> Result<(), CatalogError> {
        self.delta.insert((volume, set, page), blob).map_err(database)?;
        Ok(())
    }

    /// Removes page `page` of a set of the delta table of `volume`, if it exists.
    ///
    /// # Errors
    /// The catalogue cannot be written.
    pub fn remove_delta(&mut self, volume: u64, set: u8, page: u32) -> Result<(), CatalogError> {
        self.delta.remove((volume, set, page)).map_err(database)?;
        Ok(())
    }

    /// Removes a set of the delta table of `volume`.
    ///
    /// # Errors
    /// The catalogue cannot be written.
    pub fn drop_delta(&mut self, volume: u64, set: u8) -> Result<(), CatalogError> {
        self.delta.retain_in((volume, set, 0)..=(volume, set, u32::MAX), |_, _| false).map_err(database)
    }
}

/// The catalogue as of one commit.
pub struct CatalogView {
    txn: ReadTransaction,
}

impl CatalogView {
    /// The named value.
    ///
    /// # Errors
    /// The catalogue cannot be read.
    pub fn meta(&self, name: &str) -> Result<Option<Vec<u8>>, CatalogError> {
        let Some(table) = present(self.txn.open_table(META))? else { return Ok(None) };
        Ok(table.get(name).map_err(database)?.map(|v| v.value().to_vec()))
    }

    /// All named values whose name starts with `prefix`, by name.
    ///
    /// # Errors
    /// The catalogue cannot be read.
    pub fn meta_with_prefix(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, CatalogError> {
        let mut out = Vec::new();
        let Some(table) = present(self.txn.open_table(META))? else { return Ok(out) };
        for row in table.range(prefix..).map_err(database)? {
            let (name, value) = row.map_err(database)?;
            if !name.value().starts_with(prefix) {
                break;
            }
            out.push((name.value().to_owned(), value.value().to_vec()));
        }
        Ok(out)
    }

    /// Passes chunk `chunk` of map `tree` to `use_blob`, if it exists.
    ///
    /// # Errors
    /// The catalogue cannot be read.
    pub fn chunk<T>(
        &self,
        tree: u64,
        chunk: u32,
        use_blob: impl FnOnce(&[u8]) -> T,
    ) -> Result<Option<T>, CatalogError> {
        let Some(table) = present(self.txn.open_table(MAP))? else { return Ok(None) };
        Ok(table.get((tree, chunk)).map_err(database)?.map(|v| use_blob(v.value())))
    }

    /// Calls `visit` with the number of each chunk of map `tree` in `first..=last`, in order, until it returns false.
    ///
    /// # Errors
    /// The catalogue cannot be read.
    pub fn chunks(
        &self,
        tree: u64,
        first: u32,
        last: u32,
        mut visit: impl FnMut(u32) -> bool,
    ) -> Result<(), CatalogError> {
        let Some(table) = present(self.txn.open_table(MAP))? else { return Ok(()) };
        for row in table.range((tree, first)..=(tree, last)).map_err(database)? {
            if !visit(row.map_err(database)?.0.value().1) {
                break;
            }
        }
        Ok(())
    }

    /// Passes each chunk of every map (tree, chunk, blob) to `visit`, in order.
    ///
    /// # Errors
    /// The catalogue cannot be read.
    pub fn maps(&self, mut visit: impl FnMut(u64, u32, &[u8])) -> Result<(), CatalogError> {
        let Some(table) = present(self.txn.open_table(MAP))? else { return Ok(()) };
        for row in table.iter().map_err(database)? {
            let (key, value) = row.map_err(database)?;
            let (tree, chunk) = key.value();
            visit(tree, chunk, value.value());
        }
        Ok(())
    }

    /// Passes each page of live counts (device, page, blob) to `visit`, in order.
    ///
    /// # Errors
    /// The catalogue cannot be read.
    pub fn counts(&self, mut visit: impl FnMut(u16, u32, &[u8])) -> Result<(), CatalogError> {
        let Some(table) = present(self.txn.open_table(COUNTS))? else { return Ok(()) };
        for row in table.iter().map_err(database)? {
            let (key, value) = row.map_err(database)?;
            let (device, page) = key.value();
            visit(device, page, value.value());
        }
        Ok(())
    }

    /// Passes each page of the delta tables (volume, set, page, blob) to `visit`, in order.
    ///
    /// # Errors
    /// The catalogue cannot be read.
    pub fn delta(&self, mut visit: impl FnMut(u64, u8, u32, &[u8])) -> Result<(), CatalogError> {
        let Some(table) = present(self.txn.open_table(DELTA))? else { return Ok(()) };
        for row in table.iter().map_err(database)? {
            let (key, value) = row.map_err(database)?;
            let (volume, set, page) = key.value();
            visit(volume, set, page, value.value());
        }
        Ok(())
    }
}

/// A table that was never written does not exist yet.
fn present<K: redb::Key + 'static, V: redb::Value + 'static>(
    table: Result<ReadOnlyTable<K, V>, TableError>,
) -> Result<Option<ReadOnlyTable<K, V>>, CatalogError> {
    match table {
        Ok(table) => Ok(Some(table)),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(other) => Err(database(other)),
    }
}

#[cfg(test)]
mod tests;
