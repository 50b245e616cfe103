use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::PAGE;
use crate::{
    delta::{BlockSet, Items, Ledger},
    types::{BlockRange, VolumeId},
};

fn data(block_bytes: u32) -> Items {
    Items::Data { block_bytes }
}

fn range(volume: u64, first: u64, count: u64) -> BlockRange {
    BlockRange { volume: VolumeId(volume), first, count }
}

/// Fig. 9: three items for block 2, one for block 3, five for block 8, of 1000 bytes each.
#[test]
fn the_patents_example_has_a_ratio_of_three() {
    let mut ledger = Ledger::new();
    assert_eq!(ledger.ratio(), None);
    for (block, items) in [(2, 3), (3, 1), (8, 5)] {
        for _ in 0..items {
            ledger.on_retained(range(1, block, 1), data(1000));
        }
    }
    assert_eq!([2, 3, 8, 9].map(|block| ledger.items(VolumeId(1), block)), [3, 1, 5, 0]);
    assert_eq!((ledger.cr_bytes(), ledger.dr_bytes()), (9000, 3000));
    assert_eq!(ledger.ratio(), Some(3.0));
}

#[test]
fn volumes_of_one_group_count_their_own_size_of_a_block() {
    let mut ledger = Ledger::new();
    ledger.on_retained(range(1, 0, 2), data(512));
    ledger.on_retained(range(2, 0, 1), data(65536));
    ledger.on_retained(range(2, 0, 1), data(65536));
    assert_eq!((ledger.cr_bytes(), ledger.dr_bytes()), (1024 + 2 * 65536, 1024 + 65536));
    ledger.on_released(range(2, 0, 1), data(65536));
    assert_eq!(ledger.ratio(), Some(1.0));
}

#[test]
fn zeros_are_marks_without_bytes() {
    let mut ledger = Ledger::new();
    ledger.on_retained(range(1, 0, 1 << 28), Items::Zeros);
    assert_eq!((ledger.cr_bytes(), ledger.dr_bytes(), ledger.ratio()), (0, 0, None));
    assert_eq!(ledger.marks(VolumeId(1)).len(), 1 << 28);
    assert!(ledger.memory_bytes() < 1024);
    ledger.on_retained(range(1, 5, 1), data(4096));
    assert_eq!(ledger.ratio(), Some(1.0));
    assert_eq!(ledger.items(VolumeId(1), 5), 2);
    ledger.on_released(range(1, 0, 1 << 28), Items::Zeros);
    assert_eq!(ledger.marks(VolumeId(1)).iter_runs().collect::<Vec<_>>(), [(5, 1)]);
}

#[test]
fn a_block_stays_a_mark_until_its_last_item_is_released() {
    let mut ledger = Ledger::new();
    (0..1000).for_each(|_| ledger.on_retained(range(1, 7, 1), data(512)));
    for left in (0..1000).rev() {
        assert!(ledger.marks(VolumeId(1)).contains(7));
        ledger.on_released(range(1, 7, 1), data(512));
        assert_eq!(ledger.items(VolumeId(1), 7), left);
    }
    assert!(ledger.marks(VolumeId(1)).is_empty());
    assert_eq!((ledger.cr_bytes(), ledger.dr_bytes()), (0, 0));
}

#[test]
fn what_a_switch_took_is_not_released_again() {
    let mut ledger = Ledger::new();
    ledger.on_retained(range(1, 3, 2), data(512));
    ledger.on_retained(range(1, 4, 4), Items::Zeros);
    ledger.on_retained(range(2, 0, 1), Items::Zeros);
    let taken = ledger.take();
    let marks: Vec<_> = taken.marks.iter().map(|(v, set)| (v.0, set.iter_runs().collect::<Vec<_>>())).collect();
    assert_eq!(marks, [(1, vec![(3, 5)]), (2, vec![(0, 1)])]);
    ledger.on_released(range(1, 3, 2), data(512));
    assert_eq!((ledger.cr_bytes(), ledger.dr_bytes(), ledger.ratio()), (0, 0, None));
    assert!(ledger.take().marks.is_empty());
}

/// Recounts everything from the list of what is retained.
fn recount(ledger: &Ledger, retained: &[(BlockRange, Items)]) -> Result<(), TestCaseError> {
    let mut items: BTreeMap<(VolumeId, u64), u64> = BTreeMap::new();
    let mut distinct: BTreeSet<(VolumeId, u64)> = BTreeSet::new();
    let (mut cr, mut dr) = (0, 0);
    for (range, kind) in retained {
        for block in range.first..range.end() {
            *items.entry((range.volume, block)).or_default() += 1;
            if let Items::Data { block_bytes } = kind {
                cr += u64::from(*block_bytes);
                if distinct.insert((range.volume, block)) {
                    dr += u64::from(*block_bytes);
                }
            }
        }
    }
    prop_assert_eq!((ledger.cr_bytes(), ledger.dr_bytes()), (cr, dr));
    prop_assert_eq!(ledger.ratio(), (dr > 0).then(|| cr as f64 / dr as f64));
    for volume in [VolumeId(1), VolumeId(2)] {
        let mut expected = BlockSet::new();
        for (_, block) in items.keys().filter(|(v, _)| *v == volume) {
            expected.insert_range(*block, 1);
        }
        prop_assert_eq!(ledger.marks(volume), expected);
    }
    for ((volume, block), n) in items {
        prop_assert_eq!(ledger.items(volume, block), n);
    }
    Ok(())
}

#[derive(Debug, Clone)]
enum Step {
    Retain { volume: u64, first: u64, count: u64, zeros: bool },
    Release { which: usize },
    Take,
}

fn step() -> impl Strategy<Value = Step> {
    let place = prop_oneof![0_u64..24, PAGE - 8..PAGE + 8];
    let count = prop_oneof![6 => 1_u64..6, 1 => 600_u64..1500];
    prop_oneof![
        60 => (1_u64..3, place, count, proptest::bool::weighted(0.2))
            .prop_map(|(volume, first, count, zeros)| Step::Retain { volume, first, count, zeros }),
        // Lanes and held groups release in other orders than that of the records.
        40 => any::<usize>().prop_map(|which| Step::Release { which }),
        1 => Just(Step::Take),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_ledger_is_what_a_recount_gives(steps in proptest::collection::vec(step(), 1..120)) {
        let (mut ledger, mut retained) = (Ledger::new(), Vec::new());
        for (n, step) in steps.into_iter().enumerate() {
            match step {
                Step::Retain { volume, first, count, zeros } => {
                    let kind = if zeros { Items::Zeros } else { data(512 << volume) };
                    ledger.on_retained(range(volume, first, count), kind);
                    retained.push((range(volume, first, count), kind));
                }
                Step::Release { which } if !retained.is_empty() => {
                    let (range, kind) = retained.swap_remove(which % retained.len());
                    ledger.on_released(range, kind);
                }
                Step::Release { .. } => {}
                Step::Take => {
                    let before: Vec<_> = [1, 2].map(|v| ledger.marks(VolumeId(v))).into();
                    for (volume, marks) in ledger.take().marks {
                        prop_assert_eq!(&marks, &before[usize::try_from(volume.0).unwrap() - 1]);
                    }
                    retained.clear();
                }
            }
            if n % 16 == 0 {
                recount(&ledger, &retained)?;
            }
        }
        recount(&ledger, &retained)?;
        for (range, kind) in retained {
            ledger.on_released(range, kind);
        }
        recount(&ledger, &[])?;
    }
}
