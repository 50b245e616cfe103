//! What the client knows, and what it follows that each image may hold.
//!
//! Each block has one writer, which has at most one write of it under way and repeats it, under the same client
//! sequence, until it is acknowledged. So a block is a list of acknowledged writes, and maybe one attempt.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use understudy_common::types::Lsn;

/// Block size of the volumes, bytes.
pub(super) const BLOCK: usize = 512;
/// Blocks of a segment.
pub(super) const PER_SEGMENT: usize = 128;
/// Bytes of a segment.
pub(super) const SEGMENT: u32 = 64 * 1024;
/// Blocks of each volume. The last segment takes writes of whole segments.
pub(super) const BLOCKS: usize = 3 * PER_SEGMENT;
/// Names of the volumes; the second and third are one group.
pub(super) const VOLUMES: [&str; 3] = ["staged", "grouped", "both"];
/// Lines of the log that are kept for the report of a failure.
const LINES: usize = 60;

/// An acknowledged write of a block.
#[derive(Debug, Clone, Copy)]
struct Event {
    stamp: u64,
    /// Its LSN, or, for an answer that repeats an earlier one, an upper bound.
    lsn: Lsn,
    exact: bool,
    both: bool,
}

#[derive(Debug, Clone)]
struct Block {
    /// Ascending in LSN. The first is the block as it was created, zeros.
    acked: Vec<Event>,
    attempt: Option<u64>,
}

/// See the module.
pub(super) struct Model {
    volumes: Vec<Vec<Block>>,
    next_stamp: u64,
    lines: VecDeque<String>,
    trace: DefaultHasher,
    print: bool,
    violation: Option<String>,
    /// The virtual time between two steps of the hosts.
    pub now: Duration,
    /// Faults have ended: the writers finish what they have and stop.
    pub healed: bool,
    pub acked: u64,
    pub acked_in_delta: u64,
    pub mode_changes: u64,
    /// Of each volume, whether its newest acknowledgement came in delta mode.
    in_delta: [bool; VOLUMES.len()],
    pub retries: u64,
    pub images: u64,
}

/// A range of one volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub volume: usize,
    pub first: usize,
    pub count: usize,
}

impl Range {
    pub fn offset(&self) -> u64 {
        (self.first * BLOCK) as u64
    }

    pub fn length(&self) -> u64 {
        (self.count * BLOCK) as u64
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        self.volume == other.volume && self.first < other.first + other.count && other.first < self.first + self.count
    }
}

/// What a stamp looks like in a block; stamp 0 is zeros.
pub(super) fn fill(stamp: u64, volume: usize, block: usize) -> Vec<u8> {
    if stamp == 0 {
        return vec![0; BLOCK];
    }
    let place = ((volume as u64) << 32) | block as u64;
    let words = (0..BLOCK as u64 / 8).map(|n| match n {
        0 => stamp,
        n => (stamp ^ place << 20).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(n),
    });
    words.flat_map(u64::to_le_bytes).collect()
}

/// The stamp of a block as it was read; `None` if it is not one whole stamp.
fn stamp_of(bytes: &[u8], volume: usize, block: usize) -> Option<u64> {
    let stamp = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    (fill(stamp, volume, block) == bytes).then_some(stamp)
}

impl Model {
    pub fn new() -> Self {
        let created = Event { stamp: 0, lsn: Lsn::ZERO, exact: true, both: false };
        let block = Block { acked: vec![created], attempt: None };
        Self {
            volumes: vec![vec![block; BLOCKS]; VOLUMES.len()],
            next_stamp: 1,
            lines: VecDeque::new(),
            trace: DefaultHasher::new(),
            print: std::env::var_os("UNDERSTUDY_TRACE").is_some(),
            violation: None,
            now: Duration::ZERO,
            healed: false,
            acked: 0,
            acked_in_delta: 0,
            mode_changes: 0,
            in_delta: [false; VOLUMES.len()],
            retries: 0,
            images: 0,
        }
    }

    /// A line of the trace, with the virtual time.
    pub fn note(&mut self, line: String) {
        let at = turmoil::sim_elapsed().unwrap_or(self.now);
        let line = format!("{:>9.3} {line}", at.as_secs_f64());
        line.hash(&mut self.trace);
        if self.print {
            eprintln!("{line}");
        }
        if self.lines.len() == LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// Hash of everything noted so far.
    pub fn trace(&self) -> u64 {
        self.trace.finish()
    }

    /// The newest lines.
    pub fn report(&self) -> String {
        self.lines.iter().map(|line| format!("{line}\n")).collect()
    }

    /// A promise was broken; the first one counts.
    pub fn violate(&mut self, what: String) {
        self.note(format!("VIOLATION {what}"));
        self.violation.get_or_insert(what);
    }

    pub fn violation(&self) -> Option<&str> {
        self.violation.as_deref()
    }

    fn blocks(&self, range: Range) -> &[Block] {
        &self.volumes[range.volume][range.first..range.first + range.count]
    }

    /// A write begins; gives its stamp.
    pub fn begin(&mut self, range: Range, zeros: bool) -> u64 {
        let stamp = if zeros { 0 } else { self.next_stamp };
        self.next_stamp += 1;
        for block in &mut self.volumes[range.volume][range.first..range.first + range.count] {
            assert!(block.attempt.replace(stamp).is_none(), "a block has one writer");
        }
        stamp
    }

    /// An acknowledgement came in this mode.
    pub fn acked_in(&mut self, volume: usize, delta: bool) {
        self.acked_in_delta += u64::from(delta);
        self.mode_changes += u64::from(std::mem::replace(&mut self.in_delta[volume], delta) != delta);
    }

    /// It was acknowledged.
    pub fn end(&mut self, range: Range, lsn: Lsn, duplicate: bool, both: bool) {
        self.acked += 1;
        for at in range.first..range.first + range.count {
            let block = &mut self.volumes[range.volume][at];
            let stamp = block.attempt.take().expect("it began");
            let before = block.acked.last().map_or(Lsn::ZERO, |event| event.lsn);
            block.acked.push(Event { stamp, lsn, exact: !duplicate, both });
            if lsn < before {
                self.violate(format!("a write was acknowledged at {lsn}, one before it at {before}"));
                return;
            }
        }
    }

    /// What the primary holds: each block's last acknowledged write, or the attempt after it.
    pub fn check_newest(&mut self, who: &str, range: Range, data: &[u8]) {
        let wrong = self.blocks(range).iter().zip(data.chunks(BLOCK)).enumerate().find_map(|(n, (block, bytes))| {
            let at = range.first + n;
            let found = stamp_of(bytes, range.volume, at);
            let newest = block.acked.last().map(|event| event.stamp);
            let allowed = found.is_some() && (found == newest || found == block.attempt);
            (!allowed).then(|| {
                let name = VOLUMES[range.volume];
                format!(
                    "{who}: {name} block {at} holds {found:?}; acknowledged {newest:?}, attempt {:?}",
                    block.attempt
                )
            })
        });
        if data.len() != range.count * BLOCK {
            self.violate(format!("{who}: {} bytes were read of {}", data.len(), range.length()));
        }
        if let Some(wrong) = wrong {
            self.violate(wrong);
        }
    }

    /// What the backup holds of a volume at `position`: an image that the primary once had there.
    pub fn check_image(&mut self, who: &str, volume: usize, position: Lsn, data: &[u8]) {
        self.images += 1;
        let range = Range { volume, first: 0, count: BLOCKS };
        let wrong = self.blocks(range).iter().zip(data.chunks(BLOCK)).enumerate().find_map(|(at, (block, bytes))| {
            let found = stamp_of(bytes, volume, at);
            let allowed = found.is_some()
                && (found == block.attempt
                    || block.acked.iter().enumerate().any(|(k, event)| {
                        let next = block.acked.get(k + 1);
                        Some(event.stamp) == found
                            && !(event.exact && event.lsn > position)
                            && next.is_none_or(|next| next.lsn > position)
                    }));
            (!allowed).then(|| {
                let name = VOLUMES[volume];
                format!("{who}: {name} block {at} holds {found:?} at position {position}; known: {block:?}")
            })
        });
        if data.len() != BLOCKS * BLOCK {
            self.violate(format!("{who}: an image of {} bytes", data.len()));
        }
        if let Some(wrong) = wrong {
            self.violate(wrong);
        }
    }

    /// A write that was acknowledged as durable on both sides is on the backup. An answer that repeats an earlier one
    /// names the client's newest record, which may be of another group.
    pub fn check_both(&mut self, volume: usize, position: Lsn) {
        let mut events = self.volumes[volume].iter().flat_map(|block| &block.acked);
        let lost = events.find(|e| e.both && e.exact && e.lsn > position).copied();
        if let Some(lost) = lost {
            self.violate(format!("{lost:?} was acknowledged as durable on both; the backup is at {position}"));
        }
    }

    /// The newest LSN that was acknowledged.
    pub fn newest_acked(&self) -> Lsn {
        let events = self.volumes.iter().flatten().filter_map(|block| block.acked.last());
        events.map(|event| event.lsn).max().unwrap_or_default()
    }

    /// At the end nothing is under way, so every block is known.
    pub fn expected_image(&self, volume: usize) -> Vec<u8> {
        let blocks = self.volumes[volume].iter().enumerate();
        blocks.flat_map(|(at, block)| fill(block.acked.last().map_or(0, |e| e.stamp), volume, at)).collect()
    }
}
