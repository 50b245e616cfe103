use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use crate::delta::{BlockSet, Changes, DeltaTable, SetRow};

fn runs(set: &BlockSet) -> Vec<(u64, u64)> {
    set.iter_runs().collect()
}

#[test]
fn a_write_behind_the_cut_keeps_its_mark_through_the_commit() {
    let mut table = DeltaTable::new();
    table.mark(4, 2);
    table.freeze();
    table.mark(5, 1);
    assert_eq!((runs(table.active()), runs(table.frozen())), (vec![(5, 1)], vec![(4, 2)]));
    assert_eq!(table.clear_frozen().len(), 2);
    assert_eq!(runs(table.active()), [(5, 1)]);
    assert!(!table.contains(4) && table.contains(5));
}

#[test]
fn an_aborted_run_keeps_its_marks() {
    let mut table = DeltaTable::new();
    table.mark(4, 2);
    table.freeze();
    table.mark(9, 1);
    table.thaw();
    assert_eq!(runs(table.active()), [(4, 2), (9, 1)]);
    assert!(table.frozen().is_empty());
}

#[test]
fn a_cut_over_a_run_that_was_not_thawed_takes_its_blocks_along() {
    let mut table = DeltaTable::new();
    table.mark(4, 2);
    table.freeze();
    table.mark(9, 1);
    table.freeze();
    assert_eq!(runs(table.frozen()), [(4, 2), (9, 1)]);
    assert!(table.active().is_empty());
}

fn store(rows: &mut BTreeMap<u32, SetRow>, changes: Changes) {
    if changes.all {
        rows.clear();
    }
    for (page, row) in changes.rows {
        match row {
            Some(row) => rows.insert(page, row),
            None => rows.remove(&page),
        };
    }
}

#[derive(Debug, Clone)]
enum Step {
    Mark(u64, u64),
    MarkSet(u64, u64),
    Freeze,
    Thaw,
    Clear,
    Truncate(u64),
    Store,
    Reload,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || prop_oneof![0_u64..50, super::PAGE - 10..super::PAGE + 50];
    prop_oneof![
        4 => (place(), 1_u64..20).prop_map(|(first, count)| Step::Mark(first, count)),
        1 => (place(), 1_u64..2 * super::PAGE).prop_map(|(first, count)| Step::MarkSet(first, count)),
        2 => Just(Step::Freeze),
        1 => Just(Step::Thaw),
        1 => Just(Step::Clear),
        1 => place().prop_map(Step::Truncate),
        2 => Just(Step::Store),
        1 => Just(Step::Reload),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Two plain sets do the same, and what a checkpoint stored is the table as of the checkpoint.
    #[test]
    fn a_table_is_two_sets_before_and_behind_a_restart(steps in proptest::collection::vec(step(), 1..60)) {
        let mut table = DeltaTable::new();
        let (mut active, mut frozen) = (BTreeSet::new(), BTreeSet::new());
        let (mut active_rows, mut frozen_rows) = (BTreeMap::new(), BTreeMap::new());
        let mut saved = (BTreeSet::new(), BTreeSet::new());
        for step in steps {
            match step {
                Step::Mark(first, count) => {
                    table.mark(first, count);
                    active.extend(first..first + count);
                }
                Step::MarkSet(first, count) => {
                    let mut set = BlockSet::new();
                    set.insert_range(first, count);
                    table.mark_set(set);
                    active.extend(first..first + count);
                }
                Step::Freeze => {
                    table.freeze();
                    frozen.append(&mut active);
                }
                Step::Thaw => {
                    table.thaw();
                    active.append(&mut frozen);
                }
                Step::Clear => {
                    prop_assert_eq!(table.clear_frozen().len(), frozen.len() as u64);
                    frozen.clear();
                }
                Step::Truncate(blocks) => {
                    table.truncate(blocks);
                    active.split_off(&blocks);
                }
                Step::Store => {
                    let changes = table.take_changed();
                    store(&mut active_rows, changes.active);
                    store(&mut frozen_rows, changes.frozen);
                    saved = (active.clone(), frozen.clone());
                }
                Step::Reload => {
                    table = DeltaTable::from_sets(
                        BlockSet::from_rows(active_rows.clone()).unwrap(),
                        BlockSet::from_rows(frozen_rows.clone()).unwrap(),
                    );
                    (active, frozen) = saved.clone();
                }
            }
            for (set, model) in [(table.active(), &active), (table.frozen(), &frozen)] {
                prop_assert_eq!(set.len(), model.len() as u64);
                let blocks = set.iter_runs().flat_map(|(first, count)| first..first + count);
                prop_assert!(blocks.eq(model.iter().copied()));
            }
        }
    }
}
