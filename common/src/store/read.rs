//! Reads: what is pending first, then the blocks' places, each block compared with its checksum.
//!
//! A read holds no lock while it reads a device. A write in place that overtakes it shows as a checksum that does not
//! match, and the read looks again; a segment that was freed is not reused while a read may hold its address.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use thiserror::Error;

use crate::{
    pool::{Piece, Pool, PoolError, PoolIo, ReadError},
    record::{Control, Op, Record, WriteData},
    state::{LanePlaces, Place},
    types::{BlockRange, BlockSize, GroupId, LayerId, Lsn, Position, SnapshotId, VolumeId, VolumeSpec},
};

use super::{Failed, Store, SubmitError, overlay::Found};

/// How often a read looks again before a mismatch is taken for damage.
const ATTEMPTS: usize = 16;
/// Images that may be read, or be the base of a clone, at one time: each holds a snapshot.
const READERS_MAX: usize = 24;

/// What was read.
#[derive(Debug, Clone)]
pub struct ReadOut {
    /// Whole blocks.
    pub data: Bytes,
    /// Answer only when this LSN is acknowledged: the read saw that write.
    pub seen: Lsn,
    /// For volumes acknowledged by both sides: answer only when the backup holds this LSN of the group; 0: nothing.
    pub seen_both: Lsn,
    /// In this lane; in all of them for `None`.
    pub seen_lane: Option<u8>,
}

/// Why a read failed.
#[derive(Debug, Error)]
pub enum ReadFailure {
    /// An earlier I/O error.
    #[error(transparent)]
    Failed(#[from] Failed),
    /// No such volume.
    #[error("volume {0} does not exist")]
    NoVolume(VolumeId),
    /// It is filled from a snapshot, and not served meanwhile.
    #[error("volume {0} is being filled from a snapshot: try again when that is done")]
    Restoring(VolumeId),
    /// Past the end.
    #[error("blocks {first}..{end} lie outside of the volume, which has {blocks} blocks")]
    OutOfRange {
        /// First block of the request.
        first: u64,
        /// One behind the last.
        end: u64,
        /// Size of the volume.
        blocks: u64,
    },
    /// The bytes on the device are not those that were written.
    #[error("block {block} of volume {volume} is damaged on disk: its checksum does not match")]
    Damaged {
        /// The volume.
        volume: VolumeId,
        /// Its block.
        block: u64,
    },
    /// The segment map.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The device.
    #[error("reading a device: {0}")]
    Io(#[from] std::io::Error),
    /// Too many images are being read.
    #[error("{READERS_MAX} images are being read or cloned already: try again when one of them ends")]
    Readers,
    /// A snapshot could not be taken.
    #[error(transparent)]
    Submit(#[from] SubmitError),
}

impl Store {
    /// Reads whole blocks of the head of a volume.
    ///
    /// # Errors
    /// See [`ReadFailure`].
    pub fn read(&self, volume: VolumeId, first: u64, count: u64) -> Result<ReadOut, ReadFailure> {
        for attempt in 1.. {
            match self.try_read(volume, first, count) {
                Err(ReadFailure::Damaged { .. }) if attempt < ATTEMPTS => std::thread::yield_now(),
                Err(ReadFailure::Damaged { volume, block }) => {
                    self.note_damaged_read(volume, None, block);
                    return Err(ReadFailure::Damaged { volume, block });
                }
                other => return other,
            }
        }
        unreachable!("the last attempt returns")
    }

    /// Reads whole blocks of the head of a volume of an open run, which may not be seen yet: as of what the run has
    /// written.
    ///
    /// # Errors
    /// See [`ReadFailure`].
    pub fn read_in_run(&self, spec: &VolumeSpec, first: u64, count: u64) -> Result<Bytes, ReadFailure> {
        for attempt in 1.. {
            match self.try_read_as(Some(spec), spec.id, first, count) {
                Err(ReadFailure::Damaged { .. }) if attempt < ATTEMPTS => std::thread::yield_now(),
                other => return other.map(|read| read.data),
            }
        }
        unreachable!("the last attempt returns")
    }

    fn try_read(&self, volume: VolumeId, first: u64, count: u64) -> Result<ReadOut, ReadFailure> {
        self.try_read_as(None, volume, first, count)
    }

    fn try_read_as(
        &self,
        spec: Option<&VolumeSpec>,
        volume: VolumeId,
        first: u64,
        count: u64,
    ) -> Result<ReadOut, ReadFailure> {
        let blocks = usize::try_from(count).expect("a request is bounded by the message size");
        let mut seen = Lsn::ZERO;
        let (block_size, mut data, mut crcs, mut covered);
        {
            let front = self.front.lock();
            front.check()?;
            if spec.is_none() && front.state.restores.contains_key(&volume) {
                return Err(ReadFailure::Restoring(volume));
            }
            let spec = spec.or_else(|| front.state.volumes.get(&volume)).ok_or(ReadFailure::NoVolume(volume))?;
            check_range(spec, first, count)?;
            block_size = spec.block_size;
            let block_bytes = block_size.bytes() as usize;
            data = BytesMut::zeroed(blocks * block_bytes);
            crcs = vec![0; blocks];
            covered = vec![false; blocks];
            let mut found = Found { data: &mut data, crcs: &mut crcs, covered: &mut covered, seen: &mut seen };
            let range = BlockRange { volume, first, count };
            front.overlay.read(range, u64::from(spec.blocks_per_segment()), block_bytes, &mut found);
        }
        let mut at = 0;
        while at < blocks {
            let run = covered[at..].iter().take_while(|c| **c == covered[at]).count();
            if !covered[at] {
                let block_bytes = block_size.bytes() as usize;
                let out = &mut data[at * block_bytes..][..run * block_bytes];
                self.read_placed(volume, None, block_size, first + at as u64, run as u64, out)?;
            }
            at += run;
        }
        let (seen_lane, seen_both) = self.unacked_both(BlockRange { volume, first, count });
        Ok(ReadOut { data: data.freeze(), seen, seen_both, seen_lane })
    }

    /// The newest write of `range` that waits for the backup. Asked behind a read, it covers all that the read saw.
    fn unacked_both(&self, range: BlockRange) -> (Option<u8>, Lsn) {
        let front = self.front.lock();
        let Some(spec) = front.state.volumes.get(&range.volume) else { return Default::default() };
        if front.unacked_both.is_empty() {
            return Default::default();
        }
        let per_segment = u64::from(spec.blocks_per_segment());
        (range.first / per_segment..=(range.end() - 1) / per_segment)
            .filter_map(|segment| front.unacked_both.get(&(range.volume, segment)).copied())
            .reduce(|(lane, lsn), (other, newer)| (lane.filter(|lane| Some(*lane) == other), lsn.max(newer)))
            .unwrap_or_default()
    }

    /// Reads blocks from their place in the head or a snapshot.
    fn read_placed(
        &self,
        volume: VolumeId,
        layer: Option<LayerId>,
        block_size: BlockSize,
        first: u64,
        count: u64,
        out: &mut [u8],
    ) -> Result<(), ReadFailure> {
        let mut pieces: Vec<Piece> = Vec::new();
        let ticket = {
            let mut pool = self.pool.lock();
            resolve(&mut pool, volume, layer, first, count, &mut pieces)?;
            pool.begin_read()
        };
        let block_bytes = block_size.bytes() as usize;
        let mut crcs = Vec::new();
        let result = pieces.iter().try_for_each(|piece| {
            let at = usize::try_from(piece.first_block - first).expect("inside the request") * block_bytes;
            let len = usize::try_from(piece.count).expect("inside the request") * block_bytes;
            self.io.read(volume, block_size, piece, &mut out[at..at + len], &mut crcs)
        });
        self.pool.lock().end_read(ticket);
        result.map_err(|error| match error {
            ReadError::BadChecksum { block, .. } => ReadFailure::Damaged { volume, block },
            ReadError::Io { source, .. } => ReadFailure::Io(source),
        })
    }

    /// Looks from block `first` on: how many blocks, at most `max`, are all holes or all not.
    ///
    /// # Errors
    /// See [`ReadFailure`].
    pub fn extent(&self, volume: VolumeId, first: u64, max: u64) -> Result<(bool, u64), ReadFailure> {
        let per_segment = {
            let front = self.front.lock();
            if front.state.restores.contains_key(&volume) {
                return Err(ReadFailure::Restoring(volume));
            }
            let spec = front.state.volumes.get(&volume).ok_or(ReadFailure::NoVolume(volume))?;
            check_range(spec, first, max)?;
            let per_segment = u64::from(spec.blocks_per_segment());
            // Pending writes are looked at segment by segment: a range with one is data.
            let segment_end = ((first / per_segment + 1) * per_segment).min(first + max);
            if front.overlay.touches(BlockRange { volume, first, count: segment_end - first }, per_segment) {
                return Ok((false, segment_end - first));
            }
            per_segment
        };
        let (hole, mut count) = self.extent_placed(volume, None, first, max)?;
        if hole {
            let front = self.front.lock();
            let mut at = first;
            while at < first + count {
                let end = ((at / per_segment + 1) * per_segment).min(first + count);
                if front.overlay.touches(BlockRange { volume, first: at, count: end - at }, per_segment) {
                    break;
                }
                at = end;
            }
            if at == first {
                return Ok((false, ((first / per_segment + 1) * per_segment).min(first + count) - first));
            }
            count = at - first;
        }
        Ok((hole, count))
    }

    fn extent_placed(
        &self,
        volume: VolumeId,
        layer: Option<LayerId>,
        first: u64,
        max: u64,
    ) -> Result<(bool, u64), ReadFailure> {
        let mut pieces: Vec<Piece> = Vec::new();
        resolve(&mut self.pool.lock(), volume, layer, first, max, &mut pieces)?;
        let hole = pieces.first().is_none_or(|p| p.at.is_none());
        let count = pieces.iter().take_while(|p| p.at.is_none() == hole).map(|p| p.count).sum::<u64>();
        Ok((hole, count.max(1)))
    }

    /// Takes a snapshot of a volume, local to this node, to read one image from. Wait until `lsn` is applied before
    /// reading.
    ///
    /// # Errors
    /// See [`ReadFailure`].
    pub fn open_image(self: &Arc<Self>, volume: VolumeId, time_unix_ms: i64) -> Result<ImageReader, ReadFailure> {
        let mut front = self.front.lock();
        front.check()?;
        let spec = front.state.volumes.get(&volume).ok_or(ReadFailure::NoVolume(volume))?.clone();
        if front.state.readers().count() >= READERS_MAX {
            return Err(ReadFailure::Readers);
        }
        let group = front.state.groups.get(&spec.group);
        let position = group.map_or(Position::default(), |g| g.position);
        let lanes = group.map(|g| g.lanes.clone()).unwrap_or_default();
        let layer = LayerId(front.state.last_layer.0 + 1);
        // In a run the image is the one from before it.
        let below = group.and_then(|g| g.run.as_ref()).and_then(|run| run.layers.iter().find(|(v, _)| *v == volume));
        let control = match below {
            Some((_, of)) => Control::PinSnapshot { volume, layer, of: *of },
            None => Control::CreateSnapshot { layers: vec![(volume, layer)] },
        };
        let lsn = self.submit_control_locked(&mut front, GroupId::default(), control, time_unix_ms)?.lsn;
        drop(front);
        Ok(ImageReader { reader: LayerReader::new(self, &spec, layer), position, lanes, lsn, time_unix_ms })
    }

    /// As [`Store::open_image`], of a snapshot for users.
    ///
    /// # Errors
    /// See [`ReadFailure`]; `NoSnapshot` of the pool, if it is gone.
    pub fn open_snapshot_image(
        self: &Arc<Self>,
        volume: VolumeId,
        snapshot: SnapshotId,
        time_unix_ms: i64,
    ) -> Result<ImageReader, ReadFailure> {
        let mut front = self.front.lock();
        front.check()?;
        if front.state.readers().count() >= READERS_MAX {
            return Err(ReadFailure::Readers);
        }
        let held = front.state.snapshots.get(&snapshot).and_then(|s| Some((s.volume(volume)?, s.position)));
        let ((spec, of), position) = held.ok_or(ReadFailure::NoVolume(volume))?;
        let (spec, layer) = (spec.clone(), LayerId(front.state.last_layer.0 + 1));
        let control = Control::PinSnapshot { volume, layer, of };
        let lsn = self.submit_control_locked(&mut front, GroupId::default(), control, time_unix_ms)?.lsn;
        drop(front);
        // No lane overtakes the record of a snapshot.
        let lanes = LanePlaces::all(Place { position, time_unix_ms: 0 });
        Ok(ImageReader { reader: LayerReader::new(self, &spec, layer), position, lanes, lsn, time_unix_ms })
    }

    /// Ends the images that were being read when the node stopped.
    pub(super) fn drop_readers(&self) {
        let mut front = self.front.lock();
        let layers: Vec<LayerId> = front.state.readers().collect();
        if !layers.is_empty() {
            // It fails only on a store that has failed, or whose journal's reserve is used up; the next start tries
            // again.
            let control = Control::DeleteSnapshot { layers };
            let _ = self.submit_control_locked(&mut front, GroupId::default(), control, 0);
        }
    }
}

/// One consistent image of a volume. Dropping it gives its snapshot back.
pub struct ImageReader {
    reader: LayerReader,
    position: Position,
    lanes: LanePlaces,
    lsn: Lsn,
    time_unix_ms: i64,
}

impl ImageReader {
    /// The volume as it was.
    #[must_use]
    pub fn spec(&self) -> &VolumeSpec {
        &self.reader.spec
    }

    /// The newest record in the image, as the primary counts.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// The newest record of each lane in it.
    #[must_use]
    pub fn lanes(&self) -> &LanePlaces {
        &self.lanes
    }

    /// Reading may start when this LSN is applied.
    #[must_use]
    pub fn ready_at(&self) -> Lsn {
        self.lsn
    }

    /// How many blocks from `first` on, at most `max`, are all holes or all not.
    ///
    /// # Errors
    /// See [`ReadFailure`].
    pub fn extent(&self, first: u64, max: u64) -> Result<(bool, u64), ReadFailure> {
        self.reader.extent(first, max)
    }

    /// Reads whole blocks.
    ///
    /// # Errors
    /// See [`ReadFailure`].
    pub fn read(&self, first: u64, count: u64) -> Result<Bytes, ReadFailure> {
        self.reader.read(first, count)
    }
}

impl Drop for ImageReader {
    fn drop(&mut self) {
        let store = &self.reader.store;
        let mut front = store.front.lock();
        let control = Control::DeleteSnapshot { layers: vec![self.reader.layer] };
        // On failure the snapshot goes at the next start.
        let _ = store.submit_control_locked(&mut front, GroupId::default(), control, self.time_unix_ms);
    }
}

/// Reads a snapshot that somebody else holds.
pub struct LayerReader {
    store: Arc<Store>,
    spec: VolumeSpec,
    layer: LayerId,
}

impl LayerReader {
    /// Reads `layer` of the volume `spec`.
    #[must_use]
    pub fn new(store: &Arc<Store>, spec: &VolumeSpec, layer: LayerId) -> Self {
        Self { store: Arc::clone(store), spec: spec.clone(), layer }
    }

    /// The volume as it was.
    #[must_use]
    pub fn spec(&self) -> &VolumeSpec {
        &self.spec
    }

    /// How many blocks from `first` on, at most `max`, are all holes or all not.
    ///
    /// # Errors
    /// See [`ReadFailure`].
    pub fn extent(&self, first: u64, max: u64) -> Result<(bool, u64), ReadFailure> {
        check_range(&self.spec, first, max)?;
        self.store.extent_placed(self.spec.id, Some(self.layer), first, max)
    }

    /// Reads whole blocks.
    ///
    /// # Errors
    /// See [`ReadFailure`].
    pub fn read(&self, first: u64, count: u64) -> Result<Bytes, ReadFailure> {
        check_range(&self.spec, first, count)?;
        let bytes = usize::try_from(count).expect("a request is bounded") * self.spec.block_size.bytes() as usize;
        for attempt in 1.. {
            let mut data = BytesMut::zeroed(bytes);
            let read =
                self.store.read_placed(self.spec.id, Some(self.layer), self.spec.block_size, first, count, &mut data);
            match read {
                // A block the snapshot does not own yet is read from the head, where a write may just displace it.
                Err(ReadFailure::Damaged { .. }) if attempt < ATTEMPTS => std::thread::yield_now(),
                Err(error) => {
                    if let ReadFailure::Damaged { volume, block } = error {
                        self.store.note_damaged_read(volume, Some(self.layer), block);
                    }
                    return Err(error);
                }
                Ok(()) => return Ok(data.freeze()),
            }
        }
        unreachable!("the last attempt returns")
    }
}

/// As [`Pool::resolve`]; what the pool does not know yet, because the record that made or grew the volume is not
/// applied, holds nothing.
fn resolve(
    pool: &mut Pool,
    volume: VolumeId,
    layer: Option<LayerId>,
    first: u64,
    count: u64,
    pieces: &mut Vec<Piece>,
) -> Result<(), PoolError> {
    let known = if layer.is_some() { count } else { pool.block_count(volume).saturating_sub(first).min(count) };
    if known > 0 {
        pool.resolve(volume, layer, first, known, pieces)?;
    }
    if known < count {
        pieces.push(Piece { first_block: first + known, count: count - known, at: None });
    }
    Ok(())
}

fn check_range(spec: &VolumeSpec, first: u64, count: u64) -> Result<(), ReadFailure> {
    let end = first.saturating_add(count);
    if count == 0 || end > spec.block_count() {
        return Err(ReadFailure::OutOfRange { first, end, blocks: spec.block_count() });
    }
    Ok(())
}

/// The bytes of a write.
pub(super) fn payload(io: &PoolIo, record: &Record) -> Result<Bytes, ReadFailure> {
    let Op::Write { volume, first_block, block_size, crcs, data } = &record.op else { return Ok(Bytes::new()) };
    match data {
        WriteData::Inline(data) | WriteData::Segments(_, Some(data)) => Ok(data.clone()),
        WriteData::Segments(segments, None) => {
            let per_segment = crcs.len() / segments.len().max(1);
            let segment_bytes = per_segment * block_size.bytes() as usize;
            let mut out = BytesMut::zeroed(crcs.len() * block_size.bytes() as usize);
            let mut found = Vec::new();
            for (n, segment) in segments.iter().enumerate() {
                let piece = Piece {
                    first_block: first_block + (n * per_segment) as u64,
                    count: per_segment as u64,
                    at: Some(*segment),
                };
                let out = &mut out[n * segment_bytes..][..segment_bytes];
                found.clear();
                io.read(*volume, *block_size, &piece, out, &mut found).map_err(|error| match error {
                    ReadError::BadChecksum { block, .. } => ReadFailure::Damaged { volume: *volume, block },
                    ReadError::Io { source, .. } => ReadFailure::Io(source),
                })?;
                if found[..] != crcs[n * per_segment..][..per_segment] {
                    return Err(ReadFailure::Damaged { volume: *volume, block: piece.first_block });
                }
            }
            Ok(out.freeze())
        }
    }
}
