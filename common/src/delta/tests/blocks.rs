use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::PAGE;
use crate::delta::{BlockSet, SetRow};

/// Blocks of the sets of these tests.
const BLOCKS: u64 = 4 * PAGE;

#[derive(Debug, Clone)]
enum Step {
    Insert(u64, u64),
    Remove(u64, u64),
    /// Every so many blocks one, so that a page has more runs than are kept as runs.
    Scatter(u64, u64, u64),
    /// The same the other way: holes in what is full.
    Pierce(u64, u64, u64),
    Truncate(u64),
    Union(Vec<(u64, u64)>),
    Take,
}

/// Ends of pages more often than what lies between them.
fn place() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..BLOCKS,
        (0..BLOCKS / PAGE, 0_u64..6).prop_map(|(page, off)| (page * PAGE + off).saturating_sub(3)),
        (0..BLOCKS / PAGE).prop_map(|page| page * PAGE),
    ]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0_u64..80, 1 => Just(PAGE), 1 => 1_u64..2 * PAGE]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (place(), length()).prop_map(|(first, count)| Step::Insert(first, count)),
        4 => (place(), length()).prop_map(|(first, count)| Step::Remove(first, count)),
        2 => (place(), 1_u64..800, 2_u64..50).prop_map(|(first, n, every)| Step::Scatter(first, n, every)),
        2 => (place(), 1_u64..800, 2_u64..50).prop_map(|(first, n, every)| Step::Pierce(first, n, every)),
        1 => (0..BLOCKS + 10).prop_map(Step::Truncate),
        1 => proptest::collection::vec((place(), length()), 0..4).prop_map(Step::Union),
        1 => Just(Step::Take),
    ]
}

fn within(first: u64, count: u64) -> std::ops::Range<u64> {
    first..(first + count).min(BLOCKS)
}

fn apply(set: &mut BlockSet, model: &mut BTreeSet<u64>, step: &Step) {
    match step {
        Step::Insert(first, count) => {
            let range = within(*first, *count);
            set.insert_range(range.start, range.end - range.start);
            model.extend(range);
        }
        Step::Remove(first, count) => {
            set.remove_range(*first, *count);
            let mut behind = model.split_off(first);
            model.append(&mut behind.split_off(&(first + count)));
        }
        Step::Scatter(first, n, every) => {
            for block in (0..*n).map(|i| first + i * every).filter(|b| *b < BLOCKS) {
                set.insert_range(block, 1);
                model.insert(block);
            }
        }
        Step::Pierce(first, n, every) => {
            for block in (0..*n).map(|i| first + i * every) {
                set.remove_range(block, 1);
                model.remove(&block);
            }
        }
        Step::Truncate(blocks) => {
            set.truncate(*blocks);
            model.split_off(blocks);
        }
        Step::Union(ranges) => {
            let mut other = BlockSet::new();
            for (first, count) in ranges {
                let range = within(*first, *count);
                other.insert_range(range.start, range.end - range.start);
                model.extend(range);
            }
            set.union_with(&other);
        }
        Step::Take => {}
    }
}

fn runs_of(model: &BTreeSet<u64>) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for block in model {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == *block => *count += 1,
            _ => runs.push((*block, 1)),
        }
    }
    runs
}

fn check(set: &BlockSet, model: &BTreeSet<u64>) -> Result<(), TestCaseError> {
    prop_assert_eq!(set.len(), model.len() as u64);
    prop_assert_eq!(set.is_empty(), model.is_empty());
    prop_assert_eq!(set.iter_runs().collect::<Vec<_>>(), runs_of(model));
    Ok(())
}

fn rebuilt(model: &BTreeSet<u64>) -> BlockSet {
    let mut set = BlockSet::new();
    runs_of(model).into_iter().rev().for_each(|(first, count)| set.insert_range(first, count));
    set
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_set_is_what_a_btree_set_is(
        steps in proptest::collection::vec(step(), 1..40),
        probes in proptest::collection::vec((place(), 1_u64..3 * PAGE), 20),
    ) {
        let (mut set, mut model) = (BlockSet::new(), BTreeSet::new());
        // What a catalogue would hold, and copies made on the way.
        let mut stored: BTreeMap<u32, SetRow> = BTreeMap::new();
        let mut copies = Vec::new();
        for (n, step) in steps.iter().enumerate() {
            apply(&mut set, &mut model, step);
            if matches!(step, Step::Take) {
                let changes = set.take_changed();
                if changes.all {
                    stored.clear();
                }
                for (page, row) in changes.rows {
                    match row {
                        Some(row) => stored.insert(page, row),
                        None => stored.remove(&page),
                    };
                }
                prop_assert!(set.take_changed().is_empty());
                let loaded = BlockSet::from_rows(stored.clone());
                prop_assert_eq!(loaded.as_ref(), Ok(&set));
                if n % 2 == 0 {
                    // As after a restart.
                    set = loaded.unwrap();
                }
            }
            if n % 8 == 0 {
                copies.push((set.clone(), model.clone()));
            }
        }
        check(&set, &model)?;
        prop_assert_eq!(&set, &rebuilt(&model));
        for (copy, model) in &copies {
            check(copy, model)?;
        }
        for (place, max) in probes {
            prop_assert_eq!(set.contains(place), model.contains(&place));
            let expected = model.range(place..).next().map(|first| {
                let count = (*first..).take_while(|b| model.contains(b)).count() as u64;
                (*first, count.min(max))
            });
            prop_assert_eq!(set.next_run(place, max), expected);
        }
    }

    #[test]
    fn equal_sets_are_equal_however_they_came_about(
        steps in proptest::collection::vec(step(), 1..12),
        extra in place(),
    ) {
        let (mut set, mut model) = (BlockSet::new(), BTreeSet::new());
        steps.iter().for_each(|step| apply(&mut set, &mut model, step));
        let mut other = rebuilt(&model);
        prop_assert_eq!(&set, &other);
        if other.contains(extra) { other.remove_range(extra, 1) } else { other.insert_range(extra, 1) }
        prop_assert_ne!(&set, &other);
    }
}

#[test]
fn everything_is_one_row_and_can_be_pierced_anywhere() {
    let blocks = 1 << 28;
    let mut set = BlockSet::new();
    set.insert_all(blocks);
    assert_eq!(set.take_changed().rows.len(), 1);
    set.remove_range(5 * PAGE + 7, 1);
    assert_eq!(set.len(), blocks - 1);
    assert_eq!(
        set.iter_runs().collect::<Vec<_>>(),
        [(0, 5 * PAGE + 7), (5 * PAGE + 8, blocks - 5 * PAGE - 8)],
        "a run goes on over rows"
    );
    let pages: Vec<u32> = set.take_changed().rows.iter().map(|(page, _)| *page).collect();
    assert_eq!(pages, [0, 5, 6]);
    set.insert_range(5 * PAGE + 7, 1);
    let changed = set.take_changed();
    assert_eq!(
        changed.rows.iter().map(|(page, row)| (*page, row.is_some())).collect::<Vec<_>>(),
        [(0, true), (5, false), (6, false)]
    );
    assert_eq!(set.next_run(17, u64::MAX), Some((17, blocks - 17)));
    assert_eq!(set.next_run(17, 3), Some((17, 3)));
    assert_eq!(set.next_run(blocks, 3), None);
}

#[test]
fn the_highest_block_and_what_lies_above() {
    let mut set = BlockSet::new();
    set.insert_range(crate::delta::BLOCKS_MAX - 1, 1);
    assert_eq!(set.next_run(0, u64::MAX), Some((crate::delta::BLOCKS_MAX - 1, 1)));
    assert!(!set.contains(u64::MAX) && set.next_run(u64::MAX, 1).is_none());
    set.insert_all(crate::delta::BLOCKS_MAX);
    assert_eq!(set.len(), crate::delta::BLOCKS_MAX);
    set.remove_range(3, u64::MAX);
    assert_eq!(set.iter_runs().collect::<Vec<_>>(), [(0, 3)]);
}

#[test]
#[should_panic(expected = "a block of a volume")]
fn a_block_that_no_volume_has_is_not_taken() {
    BlockSet::new().insert_range(crate::delta::BLOCKS_MAX, 1);
}
