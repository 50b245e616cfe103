//! Where the blocks of an image are.

use smallvec::SmallVec;

use super::{
    Pool, PoolError,
    chunk::HOLE,
    layers::locate,
    volumes::LayerState,
    write::{mask, shares},
};
use crate::types::{LayerId, SegmentId, VolumeId};

/// Consecutive blocks that lie in one segment, or nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First block, in the volume.
    pub first_block: u64,
    /// How many.
    pub count: u64,
    /// `None` reads as zeros. Block `n` lies in slot `n` modulo the blocks of a segment.
    pub at: Option<SegmentId>,
}

/// Keeps what is freed meanwhile from being reused. To be ended with [`Pool::end_read`].
#[derive(Debug)]
#[must_use = "a ticket that is not ended holds freed segments for ever"]
pub struct ReadTicket(u64);

impl Pool {
    /// Starts a read: addresses resolved from here on stay valid until [`Pool::end_read`]. Blocks written in place
    /// meanwhile may be torn; the caller's overlay knows them.
    pub fn begin_read(&mut self) -> ReadTicket {
        ReadTicket(self.segments.begin_read())
    }

    /// Ends a read.
    pub fn end_read(&mut self, ticket: ReadTicket) {
        self.segments.end_read(ticket.0);
    }

    /// Appends to `out` where the blocks of the head (`None`) or of a snapshot are: in order, without gaps, coalesced.
    ///
    /// # Errors
    /// The volume, snapshot or range does not exist, or the catalogue fails.
    pub fn resolve(
        &mut self,
        volume: VolumeId,
        layer: Option<LayerId>,
        first_block: u64,
        count: u64,
        out: &mut Vec<Piece>,
    ) -> Result<(), PoolError> {
        let (per, _) = self.check_range(volume, first_block, count)?;
        let mut trees: SmallVec<[u64; 8]> = SmallVec::new();
        if let Some(id) = layer {
            let layers = &self.volumes[&volume].layers;
            let at = layers.iter().position(|l| l.id == id && l.state == LayerState::Live);
            trees.extend(layers[at.ok_or(PoolError::NoSnapshot(id))?..].iter().map(|l| l.tree));
        }
        // Behind the newest layer comes the head as it is seen, not as its own tree has it.
        trees.extend(self.head_trees(volume));
        let start = out.len();
        for share in shares(first_block, count, per) {
            let mut left = share.mask();
            let mut found: SmallVec<[(SegmentId, u128); 4]> = SmallVec::new();
            for tree in &trees {
                if left == 0 {
                    break;
                }
                let (key, index) = locate(*tree, share.vseg);
                for e in self.chunk(key)?.entry(index) {
                    if e.owned & left != 0 {
                        found.push((e.segment, e.owned & left));
                    }
                }
                for (_, owned) in &found {
                    left &= !owned;
                }
            }
            found.push((HOLE, left));
            let mut at = share.first;
            while at < share.first + share.count {
                let (segment, owned) = found.iter().find(|(_, m)| m >> at & 1 == 1).expect("a place or a hole");
                let run = (owned >> at).trailing_ones();
                debug_assert_eq!(owned & mask(at, run), mask(at, run));
                push(
                    out,
                    start,
                    Piece {
                        first_block: share.vseg * u64::from(per) + u64::from(at),
                        count: run.into(),
                        at: Some(*segment).filter(|s| *s != HOLE),
                    },
                );
                at += run;
            }
        }
        Ok(())
    }
}

/// Appends a piece to those from `start` on, joining it to the last one if it lies in the same place.
fn push(out: &mut Vec<Piece>, start: usize, piece: Piece) {
    match out[start..].last_mut() {
        Some(last) if last.at == piece.at => last.count += piece.count,
        _ => out.push(piece),
    }
}
