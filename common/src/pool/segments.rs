//! Physical segments: live counts, free segments, quarantine, pins.
//!
//! Each segment is in exactly one state: *free*; *live* (some layer owns a slot of it); *quarantined* (freed, but a
//! checkpoint that covers the free is not durable yet, or a read that may hold its address runs); *pinned* (owned by
//! nobody, but a journal record refers to it); *unreferenced* (allocated for a record that is not applied yet, or for a
//! copy that is under way); or *retired* (free, on a device that is closed to allocations).
//!
//! Time is a counter that a capture and a read ticket advance. What is freed carries the current time as its stamp, and
//! is reusable behind [`Segments::horizon`].

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Arc, atomic::Ordering},
};

use foldhash::fast::FixedState;
use hashbrown::{HashMap, HashSet};

use super::{
    error::PoolError,
    space::{NoSpace, Space},
};
use crate::{checksum::crc32c_parts, mutant::Mutant, types::SegmentId};

/// Live counts in a page.
pub(super) const PAGE_COUNTS: usize = 4096;
/// Segments taken from one device before the next one's turn.
const STRIPE_SEGMENTS: u32 = 64;

pub(super) type CountPage = [u8; PAGE_COUNTS];

struct DeviceSegments {
    /// Segments that exist.
    total: u64,
    counts: Vec<Arc<CountPage>>,
    /// One bit for each segment: 1 is free.
    free: Vec<u64>,
    free_count: u64,
    /// Word of `free` at which the search goes on.
    next: usize,
    /// Gives no segments away: free ones count as retired.
    closed: bool,
    /// Segments of which a layer owns a slot.
    live: u64,
    quarantined: u64,
}

/// Segments of one device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct DeviceCounts {
    pub total: u64,
    /// On a closed device: retired.
    pub free: u64,
    pub live: u64,
    pub quarantined: u64,
}

impl DeviceCounts {
    /// Pinned and unreferenced: what records of the journal refer to, and copies under way.
    pub(super) fn held(&self) -> u64 {
        self.total.saturating_sub(self.free + self.live + self.quarantined)
    }
}

#[derive(Debug, Default)]
struct Pin {
    /// Records that refer to the segment.
    records: u32,
    /// When the last one let go.
    released: u64,
}

struct Run {
    stamp: u64,
    first: SegmentId,
    count: u64,
}

/// What is in which state, in segments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SegmentStates {
    /// Can be allocated.
    pub free: u64,
    /// A layer owns a slot.
    pub live: u64,
    /// Freed, not reusable yet.
    pub quarantined: u64,
    /// Owned by nobody, a journal record refers to it.
    pub pinned: u64,
    /// Allocated for a record that is not applied yet, or for a copy.
    pub unreferenced: u64,
    /// Free, on a device that gives none away.
    pub retired: u64,
    /// All.
    pub total: u64,
}

pub(super) struct Segments {
    devices: Vec<DeviceSegments>,
    /// Pages changed since the checkpoint that holds them, with the time of the last change.
    dirty: HashMap<(u16, u32), u64, FixedState>,
    quarantine: VecDeque<Run>,
    pins: HashMap<SegmentId, Pin, FixedState>,
    cooling: VecDeque<(u64, SegmentId)>,
    unreferenced: HashSet<SegmentId, FixedState>,
    tickets: BTreeSet<u64>,
    clock: u64,
    durable: u64,
    turn: (usize, u32),
    space: Arc<Space>,
}

impl Segments {
    pub(super) fn new(space: Arc<Space>) -> Self {
        Self {
            devices: Vec::new(),
            dirty: HashMap::default(),
            quarantine: VecDeque::new(),
            pins: HashMap::default(),
            cooling: VecDeque::new(),
            unreferenced: HashSet::default(),
            tickets: BTreeSet::new(),
            clock: 1,
            durable: 0,
            turn: (0, 0),
            space,
        }
    }

    /// Adds a device with no segments. A closed one gives none away.
    pub(super) fn add_device(&mut self, closed: bool) {
        self.devices.push(DeviceSegments {
            total: 0,
            counts: Vec::new(),
            free: Vec::new(),
            free_count: 0,
            next: 0,
            closed,
            live: 0,
            quarantined: 0,
        });
    }

    /// Closes a device to allocations, or opens it again.
    pub(super) fn set_closed(&mut self, device: u16, closed: bool) {
        let d = &mut self.devices[usize::from(device)];
        if std::mem::replace(&mut d.closed, closed) == closed {
            return;
        }
        let free = d.free_count;
        if closed {
            self.space.free.fetch_sub(free, Ordering::AcqRel);
            self.space.retired.fetch_add(free, Ordering::Relaxed);
        } else {
            self.space.retired.fetch_sub(free, Ordering::Relaxed);
            self.space.free.fetch_add(free, Ordering::AcqRel);
        }
    }

    /// Takes all segments from a closed device, each of which must be retired and known as such to the last checkpoint.
    pub(super) fn remove_device(&mut self, device: u16) {
        let d = &mut self.devices[usize::from(device)];
        debug_assert!(d.closed && d.free_count == d.total, "nobody owns or waits for a segment of it");
        self.space.total.fetch_sub(d.total, Ordering::Relaxed);
        self.space.retired.fetch_sub(d.free_count, Ordering::Relaxed);
        (d.total, d.free_count, d.next) = (0, 0, 0);
        (d.free, d.counts) = (Vec::new(), Vec::new());
        self.dirty.retain(|(number, _), _| *number != device);
    }

    /// Adds free segments to the end of a device.
    pub(super) fn extend(&mut self, device: u16, total: u64) {
        let d = &mut self.devices[usize::from(device)];
        let first = d.total;
        d.counts.resize_with(to_usize(total.div_ceil(PAGE_COUNTS as u64)), || Arc::new([0; PAGE_COUNTS]));
        d.free.resize(to_usize(total.div_ceil(64)), 0);
        d.total = total;
        self.space.total.fetch_add(total - first, Ordering::Relaxed);
        for index in first..total {
            self.set_free(SegmentId::new(device, index));
        }
    }

    /// Takes over a page of live counts from the catalogue. The segments must exist and be free.
    pub(super) fn load_page(&mut self, device: u16, page: u32, blob: &[u8]) -> Result<(), PoolError> {
        let damaged = PoolError::Counts { device, page };
        let Some(counts) = decode_page(device, page, blob) else { return Err(damaged) };
        let d = self.devices.get_mut(usize::from(device));
        if d.as_ref().is_some_and(|d| d.total == 0 && d.closed) && counts.iter().all(|count| *count == 0) {
            // Of a device that was removed.
            return Ok(());
        }
        let Some(slot) = d.and_then(|d| d.counts.get_mut(page as usize)) else { return Err(damaged) };
        *slot = Arc::new(counts);
        for (i, _) in counts.iter().enumerate().filter(|(_, count)| **count != 0) {
            let id = SegmentId::new(device, u64::from(page) * PAGE_COUNTS as u64 + i as u64);
            if !self.exists(id) {
                return Err(damaged);
            }
            self.clear_free(id);
            self.devices[usize::from(device)].live += 1;
        }
        Ok(())
    }

    // --- time

    /// The stamp of what is freed now.
    pub(super) fn now(&self) -> u64 {
        self.clock
    }

    /// Advances time for a capture and names it.
    pub(super) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// What was freed before this time is reusable.
    pub(super) fn horizon(&self) -> u64 {
        let durable = if Mutant::ReuseFreedSegment.on() { u64::MAX } else { self.durable };
        let reads = if Mutant::ReuseUnderRead.on() { None } else { self.tickets.first().copied() };
        durable.min(reads.unwrap_or(u64::MAX))
    }

    pub(super) fn set_durable(&mut self, time: u64) {
        self.durable = self.durable.max(time);
        self.advance();
    }

    pub(super) fn begin_read(&mut self) -> u64 {
        let ticket = self.tick();
        self.tickets.insert(ticket);
        ticket
    }

    pub(super) fn end_read(&mut self, ticket: u64) {
        self.tickets.remove(&ticket);
        self.advance();
    }

    fn advance(&mut self) {
        let horizon = self.horizon();
        while let Some(&(stamp, id)) = self.cooling.front().filter(|(stamp, _)| *stamp < horizon) {
            self.cooling.pop_front();
            if self.pins.get(&id).is_some_and(|p| p.records == 0 && p.released == stamp) {
                self.pins.remove(&id);
            }
        }
        while self.quarantine.front().is_some_and(|run| run.stamp < horizon) {
            let run = self.quarantine.pop_front().expect("it has a front");
            self.space.quarantined.fetch_sub(run.count, Ordering::Relaxed);
            self.devices[usize::from(run.first.device())].quarantined -= run.count;
            for i in 0..run.count {
                self.set_free(SegmentId(run.first.0 + i));
            }
        }
    }

    // --- allocation

    /// Takes a free segment. It is in no state until it is claimed or marked unreferenced.
    pub(super) fn allocate(&mut self) -> Result<SegmentId, NoSpace> {
        for _ in 0..self.devices.len() {
            let (device, taken) = self.turn;
            if taken < STRIPE_SEGMENTS && self.devices[device].can_give() {
                self.turn.1 += 1;
                let id = SegmentId::new(u16::try_from(device).expect("few devices"), self.devices[device].find());
                self.clear_free(id);
                return Ok(id);
            }
            self.turn = ((device + 1) % self.devices.len(), 0);
        }
        // One device that has just used up its turn is back at it now.
        if self.devices.iter().any(DeviceSegments::can_give) { self.allocate() } else { Err(self.space.no_space(1)) }
    }

    /// Allocates `count` segments for a record that is yet to be journaled: all, or none.
    pub(super) fn allocate_unreferenced(&mut self, count: u64) -> Result<Vec<SegmentId>, NoSpace> {
        if self.space.free() < count {
            return Err(self.space.no_space(count));
        }
        let ids: Result<Vec<_>, _> = (0..count).map(|_| self.allocate()).collect();
        self.unreferenced.extend(ids.iter().flatten());
        ids
    }

    /// Gives back a segment whose record was never journaled.
    pub(super) fn release_unreferenced(&mut self, id: SegmentId) -> Result<(), PoolError> {
        if !self.unreferenced.remove(&id) {
            return Err(PoolError::Segment { segment: id, found: self.state(id), expected: "unreferenced" });
        }
        match self.pins.get(&id) {
            None => self.set_free(id),
            Some(pin) if pin.records == 0 => self.quarantine(id),
            Some(_) => {}
        }
        Ok(())
    }

    /// Makes a segment ready for the claims of the record that refers to it.
    pub(super) fn reference(&mut self, id: SegmentId) -> Result<(), PoolError> {
        if !self.exists(id) {
            return Err(PoolError::Segment { segment: id, found: "absent", expected: "free" });
        }
        if self.unreferenced.remove(&id) {
            return Ok(());
        }
        match self.state(id) {
            "free" => self.clear_free(id),
            "pinned" => {}
            found => return Err(PoolError::Segment { segment: id, found, expected: "unreferenced, pinned or free" }),
        }
        Ok(())
    }

    // --- ownership

    /// Counts `slots` more owned slots.
    pub(super) fn claim(&mut self, id: SegmentId, slots: u32) -> Result<(), PoolError> {
        self.change(id, |count| count.checked_add(u8::try_from(slots).ok()?).filter(|c| *c <= 128)).map(drop)
    }

    /// Counts `slots` fewer. A segment that nobody owns any more goes to quarantine, unless a record refers to it.
    pub(super) fn release(&mut self, id: SegmentId, slots: u32) -> Result<(), PoolError> {
        let left = self.change(id, |count| count.checked_sub(u8::try_from(slots).ok()?))?;
        if left == 0 && self.pins.get(&id).is_none_or(|p| p.records == 0) {
            self.quarantine(id);
        }
        Ok(())
    }

    /// Hands every owned slot of `from` to `to`, which is unreferenced. `from` goes to quarantine, unless a record refers
    /// to it. Nobody owns a slot of `from` any more: `to` is given back.
    pub(super) fn transfer(&mut self, from: SegmentId, to: SegmentId) -> Result<(), PoolError> {
        let slots = u32::from(self.live(from));
        if slots == 0 {
            return self.release_unreferenced(to);
        }
        self.reference(to)?;
        self.claim(to, slots)?;
        self.release(from, slots)?;
        Ok(())
    }

    pub(super) fn live(&self, id: SegmentId) -> u8 {
        let index = to_usize(id.index());
        let page = self.devices.get(usize::from(id.device())).and_then(|d| d.counts.get(index / PAGE_COUNTS));
        page.map_or(0, |page| page[index % PAGE_COUNTS])
    }

    fn change(&mut self, id: SegmentId, to: impl FnOnce(u8) -> Option<u8>) -> Result<u8, PoolError> {
        let index = to_usize(id.index());
        let d = self.devices.get_mut(usize::from(id.device()));
        let Some(page) = d.and_then(|d| d.counts.get_mut(index / PAGE_COUNTS)) else {
            return Err(PoolError::Segment { segment: id, found: "absent", expected: "live" });
        };
        let Some(count) = to(page[index % PAGE_COUNTS]) else {
            return Err(PoolError::Segment {
                segment: id,
                found: "counted wrongly",
                expected: "owned as the map says",
            });
        };
        let before = std::mem::replace(&mut Arc::make_mut(page)[index % PAGE_COUNTS], count);
        let d = &mut self.devices[usize::from(id.device())];
        d.live = d.live + u64::from(before == 0 && count > 0) - u64::from(before > 0 && count == 0);
        let number = u32::try_from(index / PAGE_COUNTS).expect("2^44 segments");
        self.dirty.insert((id.device(), number), self.clock);
        Ok(count)
    }

    fn quarantine(&mut self, id: SegmentId) {
        self.space.quarantined.fetch_add(1, Ordering::Relaxed);
        self.devices[usize::from(id.device())].quarantined += 1;
        let stamp = self.clock;
        match self.quarantine.back_mut() {
            Some(run) if run.stamp == stamp && run.first.0 + run.count == id.0 => run.count += 1,
            _ => self.quarantine.push_back(Run { stamp, first: id, count: 1 }),
        }
        self.advance();
    }

    // --- pins

    pub(super) fn pin(&mut self, id: SegmentId) {
        if self.state(id) == "free" {
            self.clear_free(id);
        } else if self.state(id) == "quarantined" {
            self.leave_quarantine(id);
        }
        self.pins.entry(id).or_default().records += 1;
    }

    pub(super) fn unpin(&mut self, id: SegmentId) {
        let stamp = self.clock;
        let Some(pin) = self.pins.get_mut(&id).filter(|p| p.records > 0) else {
            debug_assert!(false, "unpin of a segment that is not pinned");
            return;
        };
        pin.records -= 1;
        if pin.records > 0 {
            return;
        }
        pin.released = stamp;
        if self.live(id) == 0 && !self.unreferenced.contains(&id) {
            self.pins.remove(&id);
            self.quarantine(id);
        } else {
            self.cooling.push_back((stamp, id));
            self.advance();
        }
    }

    /// True if nothing may be written into the segment: a record refers to it, or did until after the last checkpoint.
    pub(super) fn is_pinned(&self, id: SegmentId) -> bool {
        !self.pins.is_empty() && !Mutant::OverwriteReferenced.on() && self.pins.contains_key(&id)
    }

    /// A quarantined segment that is pinned again starts its wait anew when it is let go. Rare, hence the search.
    fn leave_quarantine(&mut self, id: SegmentId) {
        let held = |run: &Run| (run.first.0..run.first.0 + run.count).contains(&id.0);
        let Some(at) = self.quarantine.iter().position(held) else { return };
        let run = self.quarantine.remove(at).expect("it was found");
        let before = Run { stamp: run.stamp, first: run.first, count: id.0 - run.first.0 };
        let after = Run { stamp: run.stamp, first: SegmentId(id.0 + 1), count: run.count - before.count - 1 };
        for part in [after, before].into_iter().filter(|part| part.count > 0) {
            self.quarantine.insert(at, part);
        }
        self.space.quarantined.fetch_sub(1, Ordering::Relaxed);
        self.devices[usize::from(id.device())].quarantined -= 1;
    }

    // --- free bits

    fn exists(&self, id: SegmentId) -> bool {
        self.devices.get(usize::from(id.device())).is_some_and(|d| id.index() < d.total)
    }

    fn set_free(&mut self, id: SegmentId) {
        let d = &mut self.devices[usize::from(id.device())];
        let word = &mut d.free[to_usize(id.index() / 64)];
        debug_assert_eq!(*word >> (id.index() % 64) & 1, 0, "freed once");
        *word |= 1 << (id.index() % 64);
        d.free_count += 1;
        let count = if d.closed { &self.space.retired } else { &self.space.free };
        count.fetch_add(1, Ordering::AcqRel);
    }

    fn clear_free(&mut self, id: SegmentId) {
        let d = &mut self.devices[usize::from(id.device())];
        let word = &mut d.free[to_usize(id.index() / 64)];
        debug_assert_eq!(*word >> (id.index() % 64) & 1, 1, "taken once");
        *word &= !(1 << (id.index() % 64));
        d.free_count -= 1;
        let count = if d.closed { &self.space.retired } else { &self.space.free };
        count.fetch_sub(1, Ordering::AcqRel);
    }

    fn state(&self, id: SegmentId) -> &'static str {
        if !self.exists(id) {
            return "absent";
        }
        let word = self.devices[usize::from(id.device())].free[to_usize(id.index() / 64)];
        if word >> (id.index() % 64) & 1 == 1 {
            "free"
        } else if self.live(id) > 0 {
            "live"
        } else if self.unreferenced.contains(&id) {
            "unreferenced"
        } else if self.pins.get(&id).is_some_and(|p| p.records > 0) {
            "pinned"
        } else {
            "quarantined"
        }
    }

    /// Counts the states by looking at every segment.
    pub(super) fn states(&self) -> SegmentStates {
        let mut out = SegmentStates::default();
        for (device, d) in self.devices.iter().enumerate() {
            for index in 0..d.total {
                out.total += 1;
                match self.state(SegmentId::new(u16::try_from(device).expect("few devices"), index)) {
                    "free" if d.closed => out.retired += 1,
                    "free" => out.free += 1,
                    "live" => out.live += 1,
                    "unreferenced" => out.unreferenced += 1,
                    "pinned" => out.pinned += 1,
                    _ => out.quarantined += 1,
                }
            }
        }
        out
    }

    // --- checkpoint

    pub(super) fn device_segments(&self, device: u16) -> u64 {
        self.devices[usize::from(device)].total
    }

    pub(super) fn device_counts(&self, device: u16) -> DeviceCounts {
        let d = &self.devices[usize::from(device)];
        DeviceCounts { total: d.total, free: d.free_count, live: d.live, quarantined: d.quarantined }
    }

    /// The pages that no durable checkpoint holds as they are.
    pub(super) fn dirty_pages(&self) -> Vec<((u16, u32), Arc<CountPage>)> {
        let page = |&(device, page): &(u16, u32)| self.devices[usize::from(device)].counts[page as usize].clone();
        let mut pages: Vec<_> = self.dirty.keys().map(|key| (*key, page(key))).collect();
        pages.sort_unstable_by_key(|(key, _)| *key);
        pages
    }

    /// Pages not changed since `time` are clean.
    pub(super) fn pages_saved(&mut self, time: u64) {
        self.dirty.retain(|_, changed| *changed >= time);
    }
}

impl DeviceSegments {
    fn can_give(&self) -> bool {
        self.free_count > 0 && !self.closed
    }

    /// The next free segment; there must be one.
    fn find(&mut self) -> u64 {
        let words = self.free.len();
        let at = (0..words).map(|i| (self.next + i) % words).find(|w| self.free[*w] != 0).expect("free_count > 0");
        self.next = at;
        at as u64 * 64 + u64::from(self.free[at].trailing_zeros())
    }
}

/// The byte form of `docs/formats.md`, "Page of live counts".
pub(super) fn encode_page(device: u16, page: u32, counts: &CountPage) -> Vec<u8> {
    let mut out = vec![0; 4];
    out.extend_from_slice(counts);
    let crc = seal(device, page, counts);
    out[..4].copy_from_slice(&crc.to_le_bytes());
    out
}

pub(super) fn decode_page(device: u16, page: u32, blob: &[u8]) -> Option<CountPage> {
    let (crc, counts) = blob.split_first_chunk::<4>()?;
    let counts: CountPage = counts.try_into().ok()?;
    (u32::from_le_bytes(*crc) == seal(device, page, &counts)).then_some(counts)
}

fn seal(device: u16, page: u32, counts: &CountPage) -> u32 {
    crc32c_parts(&[&device.to_le_bytes(), &page.to_le_bytes(), counts])
}

/// Counts that are held in memory fit.
fn to_usize(n: u64) -> usize {
    usize::try_from(n).expect("a table in memory is that long")
}
