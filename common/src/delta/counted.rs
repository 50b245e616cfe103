//! How often each block of a volume was counted: blocks with a count of one or more, and for the few with more the
//! binary digits of the rest, each digit a block set.
//!
//! A count costs a bit of a page that is there anyway, instead of an entry of a map; a range of blocks is counted page by
//! page, and as one where it meets nothing counted before.

use super::{
    BlockSet,
    blocks::{Part, for_pages},
    page::{PAGE_BLOCKS, Page},
};

#[derive(Debug, Clone, Default)]
pub(super) struct Counted {
    /// Blocks with a count of one or more.
    members: BlockSet,
    /// The blocks whose count less one has this binary digit; the last is not empty.
    digits: Vec<BlockSet>,
}

impl Counted {
    /// Counts each block of the range once more. Returns how many had a count of zero.
    pub fn add(&mut self, first: u64, count: u64) -> u64 {
        let before = self.members.len();
        if self.members.is_disjoint(first, count) {
            self.members.insert_range(first, count);
        } else {
            pages(first, count, |page, part| self.add_page(page, &part));
        }
        self.members.len() - before
    }

    /// Counts each block of the range once less; one with a count of zero keeps it. Returns how many came to zero.
    pub fn remove(&mut self, first: u64, count: u64) -> u64 {
        let before = self.members.len();
        if self.digits.iter().all(|digit| digit.is_disjoint(first, count)) {
            self.members.remove_range(first, count);
        } else {
            pages(first, count, |page, part| self.remove_page(page, &part));
            while self.digits.last().is_some_and(BlockSet::is_empty) {
                self.digits.pop();
            }
        }
        before - self.members.len()
    }

    /// The count of a block.
    pub fn count(&self, block: u64) -> u64 {
        let rest = (0_u32..).zip(&self.digits).map(|(n, digit)| u64::from(digit.contains(block)) << n);
        u64::from(self.members.contains(block)) + rest.sum::<u64>()
    }

    /// Blocks with a count of one or more.
    pub fn members(&self) -> &BlockSet {
        &self.members
    }

    pub fn take_members(&mut self) -> BlockSet {
        self.members.take()
    }

    pub fn memory_bytes(&self) -> usize {
        self.members.memory_bytes() + self.digits.iter().map(BlockSet::memory_bytes).sum::<usize>()
    }

    fn add_page(&mut self, page: u32, part: &Page) {
        let mut carry = self.members.intersect_page(page, part);
        if carry.count() < part.count() {
            self.members.union_page(page, part);
        }
        for digit in &mut self.digits {
            if carry.is_empty() {
                return;
            }
            carry = digit.toggle_page(page, carry);
        }
        if !carry.is_empty() {
            let mut digit = BlockSet::new();
            digit.union_page(page, &carry);
            self.digits.push(digit);
        }
    }

    fn remove_page(&mut self, page: u32, part: &Page) {
        let mut once = self.members.intersect_page(page, part);
        let mut borrow = once.clone();
        for digit in &self.digits {
            once.subtract(&digit.intersect_page(page, &once));
        }
        self.members.subtract_page(page, &once);
        borrow.subtract(&once);
        for digit in &mut self.digits {
            if borrow.is_empty() {
                return;
            }
            let all = borrow.clone();
            borrow.subtract(&digit.toggle_page(page, all));
        }
        debug_assert!(borrow.is_empty(), "what has a digit is not zero");
    }
}

fn pages(first: u64, count: u64, mut visit: impl FnMut(u32, Page)) {
    for_pages(first..first.saturating_add(count), |part| match part {
        Part::Within { page, lo, hi } => visit(page, Page::range(lo, hi)),
        Part::Pages(pages) => pages.for_each(|page| visit(page, Page::range(0, PAGE_BLOCKS))),
    });
}
