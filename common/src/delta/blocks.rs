//! A set of block numbers of one volume, in memory.
//!
//! Pages of 32,768 blocks, each shared until it is changed, so that a clone is cheap; consecutive full pages are one
//! row, so that "everything" takes no more room than nothing. A set knows which of its rows differ from what the
//! catalogue holds; the rows' byte form is in [`super::rows`].
//!
//! Invariants: rows do not overlap; a page that is kept is neither empty nor full; rows of full pages do not touch.
//!
//! Deliberately absent: I/O, and which volume it is.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
    sync::Arc,
};

use foldhash::fast::FixedState;
use hashbrown::HashSet;

use super::page::{PAGE_BLOCKS, Page};

const PAGE: u64 = PAGE_BLOCKS as u64;
/// Block numbers are below this: twice what a segment map can hold.
pub const BLOCKS_MAX: u64 = 1 << 46;
/// What a row takes in the tree, in bytes, when its nodes are two thirds full.
const ROW_BYTES: usize = 3 * (size_of::<u32>() + size_of::<Row>()) / 2;

/// The members of a page, or of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Row {
    /// Neither empty nor full.
    Some(Arc<Page>),
    /// So many pages, all of whose blocks are members.
    Full(u32),
}

/// What of a set the catalogue does not hold yet.
#[derive(Debug)]
enum Unsaved {
    /// Any row it holds may be wrong.
    All,
    /// The rows of these pages.
    Pages(HashSet<u32, FixedState>),
}

/// The rows in which a set differs from what was taken before.
#[derive(Debug, Default)]
pub struct Changes {
    /// Everything that is stored for the set goes first: what follows is all of it.
    pub all: bool,
    /// By page, ascending: the row to store, or `None` if what is stored goes.
    pub rows: Vec<(u32, Option<super::SetRow>)>,
}

impl Changes {
    /// True if there is nothing to store or remove.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.all && self.rows.is_empty()
    }
}

/// A set of block numbers. A clone shares its pages and counts as stored nowhere.
#[derive(Debug)]
pub struct BlockSet {
    rows: BTreeMap<u32, Row>,
    len: u64,
    unsaved: Unsaved,
}

impl Default for BlockSet {
    fn default() -> Self {
        Self { rows: BTreeMap::new(), len: 0, unsaved: Unsaved::All }
    }
}

impl Clone for BlockSet {
    fn clone(&self) -> Self {
        Self { rows: self.rows.clone(), len: self.len, unsaved: Unsaved::All }
    }
}

impl PartialEq for BlockSet {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.rows == other.rows
    }
}

impl Eq for BlockSet {}

/// What a set holds of a page.
enum Look<'a> {
    Empty,
    Some(&'a Arc<Page>),
    /// With the pages up to this one, exclusive.
    Full(u64),
}

impl BlockSet {
    /// No block; stored nowhere.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Blocks in it.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if no block is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True if the block is in it.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        if block >= BLOCKS_MAX {
            return false;
        }
        let (page, offset) = split(block);
        match self.look(page) {
            Look::Empty => false,
            Look::Some(content) => content.contains(offset),
            Look::Full(_) => true,
        }
    }

    /// Adds `count` blocks from `first` on.
    ///
    /// # Panics
    /// If they end above [`BLOCKS_MAX`]: no volume has such blocks.
    pub fn insert_range(&mut self, first: u64, count: u64) {
        let end = first.checked_add(count).filter(|end| *end <= BLOCKS_MAX).expect("a block of a volume");
        for_pages(first..end, |part| match part {
            Part::Within { page, lo, hi } => self.change_page(page, |content| content.insert(lo, hi)),
            Part::Pages(pages) => self.fill(pages),
        });
    }

    /// Adds every block of a volume of `blocks` blocks.
    ///
    /// # Panics
    /// As [`BlockSet::insert_range`].
    pub fn insert_all(&mut self, blocks: u64) {
        self.insert_range(0, blocks);
    }

    /// Removes `count` blocks from `first` on.
    pub fn remove_range(&mut self, first: u64, count: u64) {
        let end = first.saturating_add(count).min(BLOCKS_MAX);
        for_pages(first.min(end)..end, |part| match part {
            Part::Within { page, lo, hi } => match self.look(page) {
                Look::Empty => {}
                Look::Some(_) => self.change_page(page, |content| content.remove(lo, hi)),
                Look::Full(_) => self.pierce(page, |content| content.remove(lo, hi)),
            },
            Part::Pages(pages) => self.empty(pages),
        });
    }

    /// Removes every block from number `blocks` on: the volume became that small.
    pub fn truncate(&mut self, blocks: u64) {
        self.remove_range(blocks, BLOCKS_MAX);
    }

    /// Removes all.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Takes all out of it and leaves nothing. Both count as stored nowhere.
    #[must_use]
    pub fn take(&mut self) -> Self {
        let mut out = std::mem::take(self);
        out.unsaved = Unsaved::All;
        out
    }

    /// Adds the blocks of `other`. Pages that only `other` has are shared.
    pub fn union_with(&mut self, other: &Self) {
        for (page, row) in &other.rows {
            match row {
                Row::Full(pages) => self.fill(*page..*page + *pages),
                Row::Some(content) => match self.look(*page) {
                    Look::Full(_) => {}
                    Look::Empty => {
                        self.len += u64::from(content.count());
                        self.rows.insert(*page, Row::Some(Arc::clone(content)));
                        self.note(*page);
                    }
                    Look::Some(_) => self.union_page(*page, content),
                },
            }
        }
    }

    /// The first run of blocks at or behind `from`, at most `max_len` of it: its first block and how many.
    #[must_use]
    pub fn next_run(&self, from: u64, max_len: u64) -> Option<(u64, u64)> {
        let (first, mut end) = self.next_piece(from)?;
        while end.is_multiple_of(PAGE) && end < BLOCKS_MAX && end - first < max_len {
            let (page, _) = split(end);
            end = match self.look(page) {
                Look::Empty => break,
                Look::Full(behind) => behind * PAGE,
                Look::Some(content) => match content.next_run(0) {
                    Some((0, hi)) => u64::from(page) * PAGE + u64::from(hi),
                    _ => break,
                },
            };
        }
        let count = (end - first).min(max_len);
        (count > 0).then_some((first, count))
    }

    /// Every run of blocks, ascending: its first block and how many. No two of them touch.
    pub fn iter_runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let (first, count) = self.next_run(from, u64::MAX)?;
            from = first + count;
            Some((first, count))
        })
    }

    /// Memory it takes, in bytes; pages that it shares with a clone count for both.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        const ARC: usize = 2 * size_of::<usize>();
        let pages = self.rows.values().map(|row| match row {
            Row::Some(content) => ARC + content.memory_bytes(),
            Row::Full(_) => 0,
        });
        let unsaved = match &self.unsaved {
            Unsaved::All => 0,
            Unsaved::Pages(pages) => pages.allocation_size(),
        };
        size_of::<Self>() + self.rows.len() * ROW_BYTES + pages.sum::<usize>() + unsaved
    }

    // --- what is stored

    /// From stored rows, ascending by page. It counts as stored.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn from_rows(rows: impl IntoIterator<Item = (u32, super::SetRow)>) -> Result<Self, &'static str> {
        let mut out = Self::default();
        let (mut behind, mut after_full) = (0, false);
        for (page, super::SetRow(row)) in rows {
            let full = matches!(row, Row::Full(_));
            if u64::from(page) < behind || full && after_full && u64::from(page) == behind {
                return Err("rows overlap or are out of order");
            }
            (behind, after_full) = (u64::from(page) + row.pages(), full);
            if behind * PAGE > BLOCKS_MAX {
                return Err("blocks that no volume has");
            }
            out.len += row.count();
            out.rows.insert(page, row);
        }
        out.unsaved = Unsaved::Pages(HashSet::default());
        Ok(out)
    }

    /// The rows that changed since the last call. The caller makes them durable, or this set is lost with the process.
    pub fn take_changed(&mut self) -> Changes {
        match std::mem::replace(&mut self.unsaved, Unsaved::Pages(HashSet::default())) {
            Unsaved::All => {
                let rows = self.rows.iter().map(|(page, row)| (*page, Some(super::SetRow(row.clone()))));
                Changes { all: true, rows: rows.collect() }
            }
            Unsaved::Pages(pages) => {
                let row = |page| (page, self.rows.get(&page).cloned().map(super::SetRow));
                let mut rows: Vec<_> = pages.into_iter().map(row).collect();
                rows.sort_unstable_by_key(|(page, _)| *page);
                Changes { all: false, rows }
            }
        }
    }

    // --- pages

    /// The blocks of `part` (of page `page`) that are in the set.
    pub(super) fn intersect_page(&self, page: u32, part: &Page) -> Page {
        match self.look(page) {
            Look::Empty => Page::empty(),
            Look::Full(_) => part.clone(),
            Look::Some(content) => content.intersect(part),
        }
    }

    pub(super) fn union_page(&mut self, page: u32, part: &Page) {
        if !part.is_empty() {
            self.change_page(page, |content| content.union(part));
        }
    }

    pub(super) fn subtract_page(&mut self, page: u32, part: &Page) {
        match self.look(page) {
            Look::Empty => {}
            Look::Some(_) => self.change_page(page, |content| content.subtract(part)),
            Look::Full(_) => self.pierce(page, |content| content.subtract(part)),
        }
    }

    /// Of the blocks of `part`, takes out those that are in the set and adds the others. Returns what was taken out.
    pub(super) fn toggle_page(&mut self, page: u32, mut part: Page) -> Page {
        let taken = self.intersect_page(page, &part);
        if !taken.is_empty() {
            part.subtract(&taken);
            self.subtract_page(page, &taken);
        }
        self.union_page(page, &part);
        taken
    }

    /// True if no block of the range is in the set.
    pub(super) fn is_disjoint(&self, first: u64, count: u64) -> bool {
        self.next_run(first, 1).is_none_or(|(next, _)| next - first >= count)
    }

    /// Rows in it, a measure of the work it makes.
    pub(super) fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Changes a page; a full one stays full.
    fn change_page(&mut self, page: u32, change: impl FnOnce(&mut Page)) {
        if !matches!(self.rows.get(&page), Some(Row::Some(_))) {
            if matches!(self.look(page), Look::Full(_)) {
                return;
            }
            self.rows.insert(page, Row::Some(Arc::new(Page::empty())));
        }
        let Some(Row::Some(content)) = self.rows.get_mut(&page) else { unreachable!("it is kept as a page") };
        let before = content.count();
        change(Arc::make_mut(content));
        let (now, full) = (content.count(), content.is_full());
        self.len = self.len + u64::from(now) - u64::from(before);
        if now == 0 {
            self.rows.remove(&page);
        }
        if now != before {
            self.note(page);
        }
        if full {
            self.fill(page..page + 1);
        }
    }

    /// Changes a full page.
    fn pierce(&mut self, page: u32, change: impl FnOnce(&mut Page)) {
        self.empty(page..page + 1);
        self.change_page(page, |content| {
            content.insert(0, PAGE_BLOCKS);
            change(content);
        });
    }

    /// Makes all blocks of the pages members.
    fn fill(&mut self, pages: Range<u32>) {
        let Range { mut start, mut end } = pages;
        // Rows inside go; rows of full pages that overlap or touch become part of the new one.
        if let Some((first, n)) = self.full_before(start)
            && first + n >= start
        {
            self.drop_row(first);
            (start, end) = (first, end.max(first + n));
        }
        while let Some((page, row)) = self.rows.range(start..=end).next().map(|(page, row)| (*page, row.clone())) {
            match row {
                Row::Some(_) if page == end => break,
                Row::Some(_) => {}
                Row::Full(n) => end = end.max(page + n),
            }
            self.drop_row(page);
        }
        self.put_row(start, Row::Full(end - start));
    }

    /// Makes no block of the pages a member.
    fn empty(&mut self, pages: Range<u32>) {
        let Range { start, end } = pages;
        if let Some((first, n)) = self.full_before(start)
            && first + n > start
        {
            self.drop_row(first);
            self.put_row(first, Row::Full(start - first));
            if first + n > end {
                self.put_row(end, Row::Full(first + n - end));
            }
        }
        while let Some((page, row)) = self.rows.range(start..end).next().map(|(page, row)| (*page, row.clone())) {
            self.drop_row(page);
            if let Row::Full(n) = row
                && page + n > end
            {
                self.put_row(end, Row::Full(page + n - end));
            }
        }
    }

    /// The last row before a page, if it is of full ones: its first page and how many.
    fn full_before(&self, page: u32) -> Option<(u32, u32)> {
        match self.rows.range(..page).next_back()? {
            (first, Row::Full(pages)) => Some((*first, *pages)),
            (_, Row::Some(_)) => None,
        }
    }

    fn drop_row(&mut self, page: u32) {
        if let Some(row) = self.rows.remove(&page) {
            self.len -= row.count();
            self.note(page);
        }
    }

    fn put_row(&mut self, page: u32, row: Row) {
        self.len += row.count();
        match self.rows.entry(page) {
            Entry::Vacant(entry) => entry.insert(row),
            Entry::Occupied(_) => unreachable!("its place was made empty"),
        };
        self.note(page);
    }

    fn note(&mut self, page: u32) {
        if let Unsaved::Pages(pages) = &mut self.unsaved {
            pages.insert(page);
        }
    }

    fn look(&self, page: u32) -> Look<'_> {
        // The usual case is cheaper to look for than a range.
        if let Some(Row::Some(content)) = self.rows.get(&page) {
            return Look::Some(content);
        }
        match self.rows.range(..=page).next_back() {
            Some((at, Row::Full(pages))) if at + pages > page => Look::Full(u64::from(at + pages)),
            _ => Look::Empty,
        }
    }

    /// Blocks at or behind `from` that lie in one row, without a gap: first and end.
    fn next_piece(&self, from: u64) -> Option<(u64, u64)> {
        if from >= BLOCKS_MAX {
            return None;
        }
        let (page, offset) = split(from);
        let in_page = |page: u32, (lo, hi): (u32, u32)| {
            let start = u64::from(page) * PAGE;
            (start + u64::from(lo), start + u64::from(hi))
        };
        match self.look(page) {
            Look::Full(behind) => return Some((from, behind * PAGE)),
            Look::Some(content) => {
                if let Some(run) = content.next_run(offset) {
                    return Some(in_page(page, run));
                }
            }
            Look::Empty => {}
        }
        let (page, row) = self.rows.range(page.checked_add(1)?..).next()?;
        Some(match row {
            Row::Full(pages) => (u64::from(*page) * PAGE, u64::from(page + pages) * PAGE),
            Row::Some(content) => in_page(*page, content.next_run(0).expect("a kept page is not empty")),
        })
    }
}

impl Row {
    pub fn pages(&self) -> u64 {
        match self {
            Self::Some(_) => 1,
            Self::Full(pages) => u64::from(*pages),
        }
    }

    fn count(&self) -> u64 {
        match self {
            Self::Some(content) => u64::from(content.count()),
            Self::Full(pages) => u64::from(*pages) * PAGE,
        }
    }
}

/// A part of a range of blocks.
pub(super) enum Part {
    /// Some blocks of a page, or all of one.
    Within { page: u32, lo: u32, hi: u32 },
    /// Whole pages.
    Pages(Range<u32>),
}

/// Cuts a range of blocks into whole pages and what is left at its ends.
pub(super) fn for_pages(blocks: Range<u64>, mut visit: impl FnMut(Part)) {
    let Range { start, end } = blocks;
    if start >= end {
        return;
    }
    let ((first, lo), (last, hi)) = (split(start), split(end));
    if first == last {
        return visit(Part::Within { page: first, lo, hi });
    }
    let whole = if lo == 0 { first } else { first + 1 };
    if lo != 0 {
        visit(Part::Within { page: first, lo, hi: PAGE_BLOCKS });
    }
    if whole < last {
        visit(Part::Pages(whole..last));
    }
    if hi != 0 {
        visit(Part::Within { page: last, lo: 0, hi });
    }
}

/// The page of a block, at most [`BLOCKS_MAX`], and its number there.
fn split(block: u64) -> (u32, u32) {
    let page = u32::try_from(block / PAGE).expect("a block of a volume");
    (page, u32::try_from(block % PAGE).expect("below a page"))
}
