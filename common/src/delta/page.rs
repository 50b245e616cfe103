//! One page of a block set: which of 32,768 consecutive blocks are members.
//!
//! Few runs of members are kept as runs, many as a bitmap of 4 KiB; which of the two is no part of the value. Counts
//! are kept. A page may be empty or full while it is worked with; in a set those two have no page.

use smallvec::SmallVec;

/// Blocks of a page.
pub(super) const PAGE_BLOCKS: u32 = 32 * 1024;
pub(super) const WORDS: usize = PAGE_BLOCKS as usize / 64;
/// A page of more runs becomes a bitmap: at half its size, since runs cost more to change.
const RUNS_MAX: usize = 512;
/// A bitmap becomes runs again when so few blocks are members, or so few are not. Below `RUNS_MAX`, so that a page
/// does not change back and forth.
const RUNS_AGAIN: u32 = 256;

/// Members without a gap; both ends belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub first: u16,
    pub last: u16,
}

impl Run {
    /// The blocks `lo..hi`, with `lo < hi <= PAGE_BLOCKS`.
    fn new(lo: u32, hi: u32) -> Self {
        debug_assert!(lo < hi && hi <= PAGE_BLOCKS);
        let narrow = |n: u32| u16::try_from(n).expect("a block within its page");
        Self { first: narrow(lo), last: narrow(hi - 1) }
    }

    fn lo(self) -> u32 {
        u32::from(self.first)
    }

    fn hi(self) -> u32 {
        u32::from(self.last) + 1
    }

    fn count(self) -> u32 {
        self.hi() - self.lo()
    }
}

pub(super) type Words = [u64; WORDS];
type Runs = SmallVec<[Run; 4]>;

#[derive(Debug, Clone)]
enum Form {
    /// Sorted, with a gap between neighbours.
    Runs(Runs),
    /// Block `n` is bit `n % 64` of word `n / 64`.
    Bits(Box<Words>),
}

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Page {
    count: u32,
    form: Form,
}

impl Page {
    pub fn empty() -> Self {
        Self { count: 0, form: Form::Runs(Runs::new()) }
    }

    /// The blocks `lo..hi`.
    pub fn range(lo: u32, hi: u32) -> Self {
        let mut page = Self::empty();
        page.insert(lo, hi);
        page
    }

    /// From sorted runs with gaps between them.
    pub fn from_runs(runs: impl IntoIterator<Item = Run>) -> Self {
        let runs: Runs = runs.into_iter().collect();
        debug_assert!(runs.windows(2).all(|w| w[0].hi() < w[1].lo()));
        let count = runs.iter().map(|r| r.count()).sum();
        let mut page = Self { count, form: Form::Runs(runs) };
        page.settle();
        page
    }

    pub fn from_words(words: Box<Words>) -> Self {
        let count = words.iter().map(|w| w.count_ones()).sum();
        let mut page = Self { count, form: Form::Bits(words) };
        page.settle();
        page
    }

    /// Members.
    pub fn count(&self) -> u32 {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn is_full(&self) -> bool {
        self.count == PAGE_BLOCKS
    }

    pub fn contains(&self, block: u32) -> bool {
        match &self.form {
            Form::Runs(runs) => {
                let at = runs.partition_point(|r| r.hi() <= block);
                runs.get(at).is_some_and(|r| r.lo() <= block)
            }
            Form::Bits(words) => words[word(block)] & bit(block) != 0,
        }
    }

    /// The first run of members at or behind `from`, as `(lo, hi)`; a run that reaches over `from` begins there.
    pub fn next_run(&self, from: u32) -> Option<(u32, u32)> {
        if from >= PAGE_BLOCKS {
            return None;
        }
        match &self.form {
            Form::Runs(runs) => {
                let at = runs.partition_point(|r| r.hi() <= from);
                runs.get(at).map(|r| (r.lo().max(from), r.hi()))
            }
            Form::Bits(words) => {
                let lo = find(words, from, 0)?;
                Some((lo, find(words, lo, u64::MAX).unwrap_or(PAGE_BLOCKS)))
            }
        }
    }

    /// All runs, sorted, with gaps between them.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let (lo, hi) = self.next_run(from)?;
            from = hi;
            Some(Run::new(lo, hi))
        })
    }

    /// Its bitmap; `None` if it is kept as runs.
    pub fn words(&self) -> Option<&Words> {
        match &self.form {
            Form::Runs(_) => None,
            Form::Bits(words) => Some(words),
        }
    }

    /// Makes `lo..hi` members.
    pub fn insert(&mut self, lo: u32, hi: u32) {
        if lo >= hi {
            return;
        }
        match &mut self.form {
            Form::Runs(runs) => {
                // Those that overlap or touch become one.
                let start = runs.partition_point(|r| r.hi() < lo);
                let len = runs[start..].iter().take_while(|r| r.lo() <= hi).count();
                let Some(touched) = runs[start..start + len].first().zip(runs[start..start + len].last()) else {
                    runs.insert(start, Run::new(lo, hi));
                    self.count += hi - lo;
                    return self.settle();
                };
                let merged = Run::new(lo.min(touched.0.lo()), hi.max(touched.1.hi()));
                let before: u32 = runs[start..start + len].iter().map(|r| r.count()).sum();
                runs[start] = merged;
                runs.drain(start + 1..start + len);
                self.count += merged.count() - before;
            }
            Form::Bits(words) => {
                let mut added = 0;
                masks(lo, hi, |at, mask| {
                    added += (mask & !words[at]).count_ones();
                    words[at] |= mask;
                });
                self.count += added;
            }
        }
        self.settle();
    }

    /// Makes `lo..hi` no members.
    pub fn remove(&mut self, lo: u32, hi: u32) {
        if lo >= hi {
            return;
        }
        match &mut self.form {
            Form::Runs(runs) => {
                let start = runs.partition_point(|r| r.hi() <= lo);
                let len = runs[start..].iter().take_while(|r| r.lo() < hi).count();
                let Some((first, last)) = runs[start..start + len].first().zip(runs[start..start + len].last()) else {
                    return;
                };
                let before: u32 = runs[start..start + len].iter().map(|r| r.count()).sum();
                let left = (first.lo() < lo).then(|| Run::new(first.lo(), lo));
                let right = (hi < last.hi()).then(|| Run::new(hi, last.hi()));
                let kept: SmallVec<[Run; 2]> = left.into_iter().chain(right).collect();
                self.count -= before - kept.iter().map(|r| r.count()).sum::<u32>();
                if len == 1 && kept.len() == 2 {
                    runs[start] = kept[0];
                    runs.insert(start + 1, kept[1]);
                } else {
                    runs[start..start + kept.len()].copy_from_slice(&kept);
                    runs.drain(start + kept.len()..start + len);
                }
            }
            Form::Bits(words) => {
                let mut removed = 0;
                masks(lo, hi, |at, mask| {
                    removed += (mask & words[at]).count_ones();
                    words[at] &= !mask;
                });
                self.count -= removed;
            }
        }
        self.settle();
    }

    /// Adds the members of `other`.
    pub fn union(&mut self, other: &Self) {
        match &other.form {
            Form::Runs(runs) => runs.iter().for_each(|r| self.insert(r.lo(), r.hi())),
            Form::Bits(theirs) => self.change_words(|words| {
                words.iter_mut().zip(theirs.iter()).for_each(|(a, b)| *a |= b);
            }),
        }
    }

    /// Removes the members of `other`.
    pub fn subtract(&mut self, other: &Self) {
        match &other.form {
            Form::Runs(runs) => runs.iter().for_each(|r| self.remove(r.lo(), r.hi())),
            Form::Bits(theirs) => self.change_words(|words| {
                words.iter_mut().zip(theirs.iter()).for_each(|(a, b)| *a &= !b);
            }),
        }
    }

    /// The members of both.
    pub fn intersect(&self, other: &Self) -> Self {
        match (&self.form, &other.form) {
            (Form::Bits(ours), Form::Bits(theirs)) => {
                let mut words = ours.clone();
                words.iter_mut().zip(theirs.iter()).for_each(|(a, b)| *a &= b);
                Self::from_words(words)
            }
            (Form::Runs(runs), _) => other.clip(runs),
            (_, Form::Runs(runs)) => self.clip(runs),
        }
    }

    /// The members that lie in `runs`.
    fn clip(&self, runs: &[Run]) -> Self {
        let mut out = Runs::new();
        for run in runs {
            let mut from = run.lo();
            while let Some((lo, hi)) = self.next_run(from).filter(|(lo, _)| *lo < run.hi()) {
                out.push(Run::new(lo, hi.min(run.hi())));
                from = hi;
                if hi >= run.hi() {
                    break;
                }
            }
        }
        Self::from_runs(out)
    }

    /// Memory it takes, in bytes.
    pub fn memory_bytes(&self) -> usize {
        let heap = match &self.form {
            Form::Runs(runs) if runs.spilled() => runs.capacity() * size_of::<Run>(),
            Form::Runs(_) => 0,
            Form::Bits(_) => size_of::<Words>(),
        };
        size_of::<Self>() + heap
    }

    fn change_words(&mut self, change: impl FnOnce(&mut Words)) {
        let mut words = match std::mem::replace(&mut self.form, Form::Runs(Runs::new())) {
            Form::Bits(words) => words,
            Form::Runs(runs) => to_words(&runs),
        };
        change(&mut words);
        *self = Self::from_words(words);
    }

    /// Takes the form that suits.
    fn settle(&mut self) {
        match &self.form {
            Form::Runs(runs) if runs.len() > RUNS_MAX => self.form = Form::Bits(to_words(runs)),
            Form::Bits(_) if self.count <= RUNS_AGAIN || PAGE_BLOCKS - self.count < RUNS_AGAIN => {
                let runs: Runs = self.runs().collect();
                self.form = Form::Runs(runs);
            }
            _ => {}
        }
    }
}

impl PartialEq for Page {
    fn eq(&self, other: &Self) -> bool {
        self.count == other.count
            && match (&self.form, &other.form) {
                (Form::Bits(a), Form::Bits(b)) => a == b,
                _ => self.runs().eq(other.runs()),
            }
    }
}

impl Eq for Page {}

fn word(block: u32) -> usize {
    block as usize / 64
}

fn bit(block: u32) -> u64 {
    1 << (block % 64)
}

fn to_words(runs: &[Run]) -> Box<Words> {
    let mut words = Box::new([0; WORDS]);
    for run in runs {
        masks(run.lo(), run.hi(), |at, mask| words[at] |= mask);
    }
    words
}

/// Calls `visit` with each word that `lo..hi` (not empty) touches, and its bits there.
fn masks(lo: u32, hi: u32, mut visit: impl FnMut(usize, u64)) {
    let (first, last) = (word(lo), word(hi - 1));
    for at in first..=last {
        let from = if at == first { u64::MAX << (lo % 64) } else { u64::MAX };
        let to = if at == last { u64::MAX >> (63 - (hi - 1) % 64) } else { u64::MAX };
        visit(at, from & to);
    }
}

/// The first block at or behind `from` whose bit, exclusive-or `flip`, is set.
fn find(words: &Words, from: u32, flip: u64) -> Option<u32> {
    if from >= PAGE_BLOCKS {
        return None;
    }
    let start = word(from);
    let mut word = (words[start] ^ flip) & (u64::MAX << (from % 64));
    for block in (u32::try_from(start).expect("below 512") * 64..).step_by(64) {
        if word != 0 {
            return Some(block + word.trailing_zeros());
        }
        word = *words.get(block as usize / 64 + 1)? ^ flip;
    }
    None
}
