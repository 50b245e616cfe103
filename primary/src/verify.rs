//! Comparing both sides of a group at one position, as a state machine: what is asked of the backup next, and what its
//! answers mean.
//!
//! No clock and no socket. A record in the group's stream takes a snapshot on both sides, so both are of one position
//! whatever is written meanwhile; digests of pieces are compared, and of a piece that differs those of its blocks.
//!
//! Invariants:
//! - Digests are of bytes that were read, and only they travel. A piece of zeros travels as such.
//! - What the primary cannot read is listed as that and not compared.
//! - Answers of another session end the comparison: the backup's snapshot went with it.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use thiserror::Error;
use understudy_common::{
    checksum::digest,
    mutant::Mutant,
    store::{HeldSnapshot, LayerReader, ReadFailure, Store},
    types::{VolumeId, VolumeSpec},
};
use understudy_proto::{seal::Sealed as _, v1};

/// Bytes of a piece of data.
const PIECE_BYTES: u64 = 64 << 10;
/// Blocks of a piece of zeros, at most.
const HOLE_BLOCKS: u64 = 1 << 16;
/// Pieces of one request.
const PIECES: usize = 32;
/// Into how many parts a piece that differs is cut.
const PARTS: u64 = 128;
/// Runs of blocks that are listed; behind that the comparison ends.
pub const DIFFERENCES_MAX: usize = 10_000;

/// Consecutive blocks that are not the same on both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The volume.
    pub volume: VolumeId,
    /// First block.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// The primary cannot read them, so they were not compared.
    pub unreadable: bool,
}

/// Why a comparison ended before its end.
#[derive(Debug, Error)]
pub enum VerifyError {
    /// The snapshot cannot be read, but for damaged blocks.
    #[error("volume {volume}: {source}")]
    Read {
        /// The volume.
        volume: VolumeId,
        /// What happened.
        source: ReadFailure,
    },
    /// The backup answered what was not asked.
    #[error("the backup answered {0}")]
    Answer(&'static str),
}

struct Source {
    spec: VolumeSpec,
    reader: LayerReader,
}

/// A piece of a volume.
#[derive(Debug, Clone, Copy)]
struct Piece {
    source: usize,
    first: u64,
    count: u64,
}

/// See the module.
pub struct Verifier {
    store: Arc<Store>,
    snapshot: HeldSnapshot,
    session: Bytes,
    sources: Vec<Source>,
    /// What is to be looked at next.
    at: (usize, u64),
    /// Pieces that differ and are to be cut.
    cut: VecDeque<Piece>,
    asked: Vec<Piece>,
    done_bytes: u64,
    differences: Vec<Difference>,
}

impl Verifier {
    /// Compares what `snapshot` sees, of one volume if `only` says so, over a session. It is to be readable: applied here.
    #[must_use]
    pub fn new(store: &Arc<Store>, snapshot: HeldSnapshot, session: Bytes, only: Option<VolumeId>) -> Self {
        let wanted = snapshot.volumes().iter().filter(|(spec, _)| only.is_none_or(|only| spec.id == only));
        let sources =
            wanted.map(|(spec, layer)| Source { spec: spec.clone(), reader: LayerReader::new(store, spec, *layer) });
        let sources = sources.collect();
        let store = Arc::clone(store);
        let (at, cut, asked) = ((0, 0), VecDeque::new(), Vec::new());
        Self { store, snapshot, session, sources, at, cut, asked, done_bytes: 0, differences: Vec::new() }
    }

    /// The snapshot.
    #[must_use]
    pub fn snapshot(&self) -> &HeldSnapshot {
        &self.snapshot
    }

    /// Bytes looked at, and all.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.done_bytes, self.sources.iter().map(|source| source.spec.size_bytes).sum())
    }

    /// What differs so far.
    #[must_use]
    pub fn differences(&self) -> &[Difference] {
        &self.differences
    }

    /// The next request; `None` when all is compared, or too much differs. Reads the snapshot: for a thread that may wait.
    ///
    /// # Errors
    /// See [`VerifyError`].
    pub fn poll(&mut self) -> Result<Option<v1::DigestRequest>, VerifyError> {
        loop {
            if self.differences.len() >= DIFFERENCES_MAX {
                return Ok(None);
            }
            let pieces = match self.cut.pop_front() {
                Some(piece) => parts(piece),
                None => match self.next_pieces()? {
                    pieces if pieces.is_empty() => return Ok(None),
                    pieces => pieces,
                },
            };
            let mut request = v1::DigestRequest {
                session: self.session.clone(),
                group_id: self.snapshot.group().0,
                run: self.snapshot.position().lsn.0,
                volume_id: self.sources[pieces[0].source].spec.id.0,
                pieces: Vec::new(),
                verify: true,
                crc32c: 0,
            };
            self.asked.clear();
            for piece in pieces {
                if let Some(asked) = self.digest(piece)? {
                    request.pieces.push(asked);
                    self.asked.push(piece);
                }
            }
            if !request.pieces.is_empty() {
                return Ok(Some(request.sealed()));
            }
        }
    }

    /// What the backup says to the request before.
    ///
    /// # Errors
    /// See [`VerifyError`].
    pub fn on_answer(&mut self, answer: &v1::DigestResponse) -> Result<(), VerifyError> {
        if !answer.is_whole() {
            return Err(VerifyError::Answer("damaged on the way"));
        }
        if answer.session != self.session {
            return Err(VerifyError::Answer("for another session"));
        }
        if answer.same.len() != self.asked.len() {
            return Err(VerifyError::Answer("another number of digests"));
        }
        for (piece, same) in std::mem::take(&mut self.asked).into_iter().zip(&answer.same) {
            match (same, piece.count) {
                (true, _) => {}
                (false, 1) => self.differs(piece, false),
                (false, _) => self.cut.push_back(piece),
            }
        }
        Ok(())
    }

    fn differs(&mut self, piece: Piece, unreadable: bool) {
        let volume = self.sources[piece.source].spec.id;
        match self.differences.last_mut() {
            Some(last)
                if (last.volume, last.first + last.count, last.unreadable) == (volume, piece.first, unreadable) =>
            {
                last.count += piece.count;
            }
            _ => self.differences.push(Difference { volume, first: piece.first, count: piece.count, unreadable }),
        }
    }

    /// The next pieces of one volume, each a hole or data.
    fn next_pieces(&mut self) -> Result<Vec<Piece>, VerifyError> {
        let mut pieces: Vec<Piece> = Vec::new();
        while pieces.len() < PIECES {
            let (source, first) = self.at;
            let Some(Source { spec, reader }) = self.sources.get(source) else { break };
            if first >= spec.block_count() {
                if !pieces.is_empty() {
                    break;
                }
                self.at = (source + 1, 0);
                continue;
            }
            let block_bytes = u64::from(spec.block_size.bytes());
            let left = spec.block_count() - first;
            let read = |source| VerifyError::Read { volume: spec.id, source };
            let (hole, count) = reader.extent(first, left.min(HOLE_BLOCKS)).map_err(read)?;
            let count = if hole { count } else { count.min((PIECE_BYTES / block_bytes).max(1)) };
            pieces.push(Piece { source, first, count });
            self.at = (source, first + count);
            self.done_bytes += count * block_bytes;
        }
        Ok(pieces)
    }

    /// Its digest; `None` for what cannot be read: it is cut further, or listed.
    fn digest(&mut self, piece: Piece) -> Result<Option<v1::DigestPiece>, VerifyError> {
        let Piece { source, first, count } = piece;
        let Source { spec, reader } = &self.sources[source];
        let failed = |source| VerifyError::Read { volume: spec.id, source };
        let (hole, length) = reader.extent(first, count).map_err(failed)?;
        if hole && length == count {
            return Ok(Some(v1::DigestPiece { first_block: first, block_count: count, digest: Bytes::new() }));
        }
        let read = if Mutant::VerifyReadsHead.on() {
            self.store.read(spec.id, first, count).map(|read| read.data)
        } else {
            reader.read(first, count)
        };
        match read {
            Ok(data) => {
                let digest = Bytes::copy_from_slice(&digest(&data));
                Ok(Some(v1::DigestPiece { first_block: first, block_count: count, digest }))
            }
            Err(ReadFailure::Damaged { .. }) => {
                if count == 1 {
                    self.differs(piece, true);
                } else {
                    self.cut.push_back(piece);
                }
                Ok(None)
            }
            Err(error) => Err(failed(error)),
        }
    }
}

fn parts(piece: Piece) -> Vec<Piece> {
    let step = piece.count.div_ceil(PARTS).max(1);
    let end = piece.first + piece.count;
    let firsts = (piece.first..end).step_by(usize::try_from(step).expect("a hole is not that long"));
    firsts.map(|first| Piece { first, count: step.min(end - first), ..piece }).collect()
}
