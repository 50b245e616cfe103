//! The bytes of one simulated file: pages as reads see them, and what a crash may make of them.

use std::{collections::BTreeMap, io, sync::Arc};

use rand::Rng;

use super::{SECTOR, survivors};

/// Unit of storage, in bytes.
pub(super) const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;
const SECTOR_LEN: usize = 512;

type Page = Arc<[u8; PAGE_LEN]>;
/// Absent pages are holes of zeros.
type Pages = BTreeMap<u64, Page>;

/// Current pages, durable ones where they differ, and the changes between, in order.
#[derive(Clone, Default)]
pub(super) struct Content {
    pages: Pages,
    len: u64,
    durable_len: u64,
    /// Durable state of each page that was touched since the last good sync (`None` is a hole).
    durable: BTreeMap<u64, Option<Page>>,
    pending: Vec<Change>,
    /// A sync failed: some of `durable` differs from `pages` with nothing pending, and stays so.
    has_lost_writes: bool,
}

#[derive(Clone)]
enum Change {
    /// Whole sectors from the offset on.
    Sectors(u64, Vec<u8>),
    /// Whole sectors become zeros.
    Zeros(u64, u64),
    Len(u64),
}

impl Change {
    /// Things of this change that survive or not on their own.
    fn units(&self) -> u64 {
        match self {
            Self::Sectors(_, data) => data.len() as u64 / SECTOR,
            Self::Zeros(_, len) => len / SECTOR,
            Self::Len(_) => 1,
        }
    }
}

impl Content {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn pages_used(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Pages that a write of the range would have to add.
    pub(super) fn holes(&self, offset: u64, len: u64) -> u64 {
        if len == 0 {
            return 0;
        }
        let (first, end) = (offset / PAGE, (offset + len).div_ceil(PAGE));
        end - first - self.pages.range(first..end).count() as u64
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (page, within, part) in pieces(offset, buf.len()) {
            match self.pages.get(&page) {
                Some(bytes) => buf[part.clone()].copy_from_slice(&bytes[within..within + part.len()]),
                None => buf[part].fill(0),
            }
        }
        Ok(())
    }

    pub(super) fn write(&mut self, buf: &[u8], offset: u64) {
        if buf.is_empty() {
            return;
        }
        let end = offset + buf.len() as u64;
        self.grow(end);
        self.save(offset, end);
        put(&mut self.pages, buf, offset);
        // A sector reaches the disk as a whole, with what was in it.
        let (first, last) = (offset / SECTOR * SECTOR, end.next_multiple_of(SECTOR));
        let mut sectors = vec![0; size(last - first)];
        take(&self.pages, &mut sectors, first);
        self.pending.push(Change::Sectors(first, sectors));
    }

    pub(super) fn write_zeros(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(SECTOR).min(end), (end / SECTOR * SECTOR).max(offset));
        if len == 0 {
            return;
        }
        if first >= last {
            self.write(&vec![0; size(len)], offset);
            return;
        }
        self.grow(end);
        self.write(&vec![0; size(first - offset)], offset);
        self.save(first, last);
        put_zeros(&mut self.pages, first, last);
        self.pending.push(Change::Zeros(first, last - first));
        self.write(&vec![0; size(end - last)], last);
    }

    pub(super) fn allocate(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        self.grow(offset + len);
        let zero: Page = Arc::new([0; PAGE_LEN]);
        for page in offset / PAGE..(offset + len).div_ceil(PAGE) {
            self.pages.entry(page).or_insert_with(|| Arc::clone(&zero));
        }
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len == self.len {
            return;
        }
        if len < self.len {
            self.save(len, self.len);
        }
        cut(&mut self.pages, len);
        self.len = len;
        self.pending.push(Change::Len(len));
    }

    pub(super) fn sync(&mut self) {
        if self.has_lost_writes {
            for change in std::mem::take(&mut self.pending) {
                self.make_durable(&change, &mut |_| true);
            }
        } else {
            self.pending.clear();
            self.durable.clear();
            self.durable_len = self.len;
        }
    }

    /// Some sectors reach the disk; the others look clean from now on and never will.
    pub(super) fn fail_sync(&mut self, rng: &mut impl Rng) {
        self.has_lost_writes = true;
        self.keep_some(rng);
    }

    pub(super) fn crash(&mut self, rng: &mut impl Rng) {
        self.keep_some(rng);
        for (page, bytes) in std::mem::take(&mut self.durable) {
            match bytes {
                Some(bytes) => _ = self.pages.insert(page, bytes),
                None => _ = self.pages.remove(&page),
            }
        }
        self.len = self.durable_len;
        // Sectors that survived behind a length that did not.
        cut(&mut self.pages, self.len);
        self.has_lost_writes = false;
    }

    /// # Panics
    /// If `offset` is behind the end.
    pub(super) fn corrupt(&mut self, offset: u64, xor: u8) {
        assert!(offset < self.len, "byte {offset} of a file of {}", self.len);
        let (page, within) = (offset / PAGE, size(offset % PAGE));
        let current = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE_LEN]));
        Arc::make_mut(current)[within] ^= xor;
        if let Some(durable) = self.durable.get_mut(&page) {
            Arc::make_mut(durable.get_or_insert_with(|| Arc::new([0; PAGE_LEN])))[within] ^= xor;
        }
    }

    fn grow(&mut self, end: u64) {
        if end > self.len {
            self.len = end;
            self.pending.push(Change::Len(end));
        }
    }

    /// Remembers the durable state of the pages of a range before their first change.
    fn save(&mut self, offset: u64, end: u64) {
        for page in offset / PAGE..end.div_ceil(PAGE) {
            self.durable.entry(page).or_insert_with(|| self.pages.get(&page).cloned());
        }
    }

    fn keep_some(&mut self, rng: &mut impl Rng) {
        let pending = std::mem::take(&mut self.pending);
        let units: u64 = pending.iter().map(Change::units).sum();
        let kept = survivors(size(units), rng);
        let mut next = kept.into_iter();
        for change in pending {
            self.make_durable(&change, &mut |_| next.next().expect("one decision for each unit"));
        }
    }

    /// Applies the sectors of `change` that are `kept` to the durable state.
    fn make_durable(&mut self, change: &Change, kept: &mut dyn FnMut(u64) -> bool) {
        let (offset, data) = match change {
            Change::Len(len) => {
                if kept(0) {
                    for (page, bytes) in self.durable.range_mut(len / PAGE..) {
                        cut_page(*page, bytes, *len);
                    }
                    self.durable_len = *len;
                }
                return;
            }
            Change::Zeros(offset, _) => (*offset, None),
            Change::Sectors(offset, data) => (*offset, Some(data)),
        };
        for i in 0..change.units() {
            if !kept(i) {
                continue;
            }
            let (at, from) = (offset + i * SECTOR, size(i * SECTOR));
            let page = self.durable.get_mut(&(at / PAGE)).expect("saved before it was changed");
            if page.is_none() && data.is_none() {
                continue;
            }
            let bytes = Arc::make_mut(page.get_or_insert_with(|| Arc::new([0; PAGE_LEN])));
            let within = size(at % PAGE);
            let sector = &mut bytes[within..within + SECTOR_LEN];
            match data {
                Some(data) => sector.copy_from_slice(&data[from..from + SECTOR_LEN]),
                None => sector.fill(0),
            }
        }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "lengths of buffers in memory")]
fn size(n: u64) -> usize {
    n as usize
}

/// Cuts a range at page borders: page, offset in it, range of the buffer.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let within = size(at % PAGE);
        let n = (PAGE_LEN - within).min(len - done);
        done += n;
        Some((at / PAGE, within, done - n..done))
    })
}

fn take(pages: &Pages, buf: &mut [u8], offset: u64) {
    for (page, within, part) in pieces(offset, buf.len()) {
        if let Some(bytes) = pages.get(&page) {
            buf[part.clone()].copy_from_slice(&bytes[within..within + part.len()]);
        }
    }
}

fn put(pages: &mut Pages, buf: &[u8], offset: u64) {
    for (page, within, part) in pieces(offset, buf.len()) {
        let bytes = pages.entry(page).or_insert_with(|| Arc::new([0; PAGE_LEN]));
        Arc::make_mut(bytes)[within..within + part.len()].copy_from_slice(&buf[part]);
    }
}

/// Whole pages share one page of zeros.
fn put_zeros(pages: &mut Pages, start: u64, end: u64) {
    let zero: Page = Arc::new([0; PAGE_LEN]);
    for (page, within, part) in pieces(start, size(end - start)) {
        if part.len() as u64 == PAGE {
            pages.insert(page, Arc::clone(&zero));
        } else {
            let bytes = pages.entry(page).or_insert_with(|| Arc::clone(&zero));
            Arc::make_mut(bytes)[within..within + part.len()].fill(0);
        }
    }
}

/// Makes everything behind `len` zeros.
fn cut(pages: &mut Pages, len: u64) {
    pages.split_off(&len.div_ceil(PAGE));
    if !len.is_multiple_of(PAGE)
        && let Some(bytes) = pages.get_mut(&(len / PAGE))
        && bytes[size(len % PAGE)..].iter().any(|b| *b != 0)
    {
        Arc::make_mut(bytes)[size(len % PAGE)..].fill(0);
    }
}

fn cut_page(page: u64, bytes: &mut Option<Page>, len: u64) {
    if page * PAGE >= len {
        *bytes = None;
    } else if let Some(bytes) = bytes {
        Arc::make_mut(bytes)[size(len - page * PAGE)..].fill(0);
    }
}
