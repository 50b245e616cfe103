//! Who owned the pair, and when: the generations of both sides, compared at `Attach`.
//!
//! Each promotion adds a generation: a number one above the last, and 16 random bytes, which tell apart two promotions
//! that did not know of each other. It says where the generation before it ended on the side that was promoted. Pure:
//! no clock, no I/O.
//!
//! Invariant: numbers ascend strictly; the newest [`GENERATIONS_MAX`] are kept.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::types::{GroupId, Position, Uid};

/// Generations that are remembered. Two sides further apart are taken for strangers, and need an operator's word.
pub const GENERATIONS_MAX: usize = 64;

/// One ownership of the pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// From 1.
    pub number: u64,
    /// Random.
    pub id: Uid,
    /// The data directory that was the primary.
    pub primary: Uid,
    /// What that directory held of each group when it became the primary. Empty for the first generation, and for all but
    /// the newest.
    pub fork: BTreeMap<GroupId, Position>,
    /// The life ([`crate::lives`]) of the primary before that it had met last; nil where that is not known.
    #[serde(default)]
    pub met: Uid,
}

/// The generations of one side, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct History(Vec<Generation>);

/// How two histories lie to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// The newest generation of both is the same.
    Same,
    /// Ours is the beginning of theirs.
    Ancestor,
    /// Theirs is the beginning of ours.
    Descendant,
    /// Both went on by themselves: split brain. The newest generation they share, 0 for none.
    Fork {
        /// Its number.
        shared: u64,
    },
}

impl History {
    /// From generations of the other side.
    ///
    /// # Errors
    /// If the numbers do not ascend, or there are too many.
    pub fn new(generations: Vec<Generation>) -> Result<Self, String> {
        if generations.len() > GENERATIONS_MAX {
            return Err(format!("{} generations are more than {GENERATIONS_MAX}", generations.len()));
        }
        if generations.iter().any(|g| g.number == 0) || !generations.is_sorted_by(|a, b| a.number < b.number) {
            return Err("the numbers of generations do not ascend".into());
        }
        Ok(Self(generations))
    }

    /// The generations, oldest first.
    #[must_use]
    pub fn generations(&self) -> &[Generation] {
        &self.0
    }

    /// The newest; `None` before the first.
    #[must_use]
    pub fn newest(&self) -> Option<&Generation> {
        self.0.last()
    }

    /// Adds the next generation.
    pub fn push(&mut self, generation: Generation) {
        debug_assert!(self.newest().is_none_or(|newest| newest.number < generation.number));
        // Only the last fork is asked for: one side that is two generations behind gets everything.
        self.0.iter_mut().for_each(|before| before.fork.clear());
        self.0.push(generation);
        let excess = self.0.len().saturating_sub(GENERATIONS_MAX);
        self.0.drain(..excess);
    }

    /// How this history lies to `theirs`. One without a generation is everybody's ancestor.
    #[must_use]
    pub fn relation(&self, theirs: &Self) -> Relation {
        let (Some(our_newest), Some(their_newest)) = (self.newest(), theirs.newest()) else {
            return match (self.0.is_empty(), theirs.0.is_empty()) {
                (true, true) => Relation::Same,
                (true, false) => Relation::Ancestor,
                _ => Relation::Descendant,
            };
        };
        let same = |g: &&Generation| theirs.0.iter().any(|t| (t.number, t.id) == (g.number, g.id));
        let shared = self.0.iter().rev().find(same).map_or(0, |g| g.number);
        match (shared == our_newest.number, shared == their_newest.number) {
            (true, true) => Relation::Same,
            (true, false) => Relation::Ancestor,
            (false, true) => Relation::Descendant,
            (false, false) => Relation::Fork { shared },
        }
    }

    /// Where the generation `number` ended, for `group`, if the newest generation came right behind it.
    #[must_use]
    pub fn fork_of(&self, number: u64, group: GroupId) -> Option<Position> {
        let [.., before, newest] = &self.0[..] else { return None };
        (before.number == number).then(|| newest.fork.get(&group).copied()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Lsn;
    use proptest::prelude::*;

    fn history(ids: &[u8]) -> History {
        let mut history = History::default();
        for (number, id) in (1..).zip(ids) {
            history.push(Generation {
                number,
                id: Uid([*id; 16]),
                primary: Uid::default(),
                fork: BTreeMap::new(),
                met: Uid::default(),
            });
        }
        history
    }

    #[test]
    fn relations_of_histories() {
        use Relation::{Ancestor, Descendant, Fork, Same};
        for (ours, theirs, relation) in [
            (&[][..], &[][..], Same),
            (&[], &[1], Ancestor),
            (&[1], &[], Descendant),
            (&[1], &[1], Same),
            (&[1], &[1, 2], Ancestor),
            (&[1, 2, 3], &[1], Descendant),
            (&[1, 2], &[1, 3], Fork { shared: 1 }),
            (&[1, 2, 4], &[1, 3], Fork { shared: 1 }),
            (&[1, 2, 4, 5], &[1, 2, 3], Fork { shared: 2 }),
            (&[1], &[9], Fork { shared: 0 }),
            (&[1, 2], &[9], Fork { shared: 0 }),
        ] {
            assert_eq!(history(ours).relation(&history(theirs)), relation, "{ours:?} {theirs:?}");
        }
    }

    #[test]
    fn old_generations_are_forgotten_and_strangers_do_not_match() {
        let mut long = history(&[1]);
        let early = long.clone();
        for number in 2..=GENERATIONS_MAX as u64 + 1 {
            long.push(Generation {
                number,
                id: Uid([7; 16]),
                primary: Uid::default(),
                fork: BTreeMap::new(),
                met: Uid::default(),
            });
        }
        assert_eq!(long.generations().len(), GENERATIONS_MAX);
        assert_eq!(early.relation(&long), Relation::Fork { shared: 0 });
        assert!(History::new(long.generations().iter().rev().cloned().collect()).is_err());
    }

    #[test]
    fn a_fork_is_known_of_the_generation_right_before_the_newest() {
        let mut history = history(&[1, 2]);
        let at = Position { generation: 2, lsn: Lsn(9) };
        let fork = BTreeMap::from([(GroupId(4), at)]);
        history.push(Generation { number: 3, id: Uid([3; 16]), primary: Uid::default(), fork, met: Uid::default() });
        assert_eq!(history.fork_of(2, GroupId(4)), Some(at));
        assert_eq!(history.fork_of(2, GroupId(5)), None);
        assert_eq!(history.fork_of(1, GroupId(4)), None);
    }

    proptest! {
        /// Both sides come to the same conclusion.
        #[test]
        fn relations_mirror(a in proptest::collection::vec(0u8..3, 0..6), b in proptest::collection::vec(0u8..3, 0..6)) {
            let mirrored = match history(&b).relation(&history(&a)) {
                Relation::Ancestor => Relation::Descendant,
                Relation::Descendant => Relation::Ancestor,
                other => other,
            };
            // A generation is one event: the same number and id have the same past.
            let agree = |n: usize| a.get(n).is_some() && a.get(n) == b.get(n);
            let prefix = (0..6).take_while(|n| agree(*n)).count();
            prop_assume!((prefix..6).all(|n| !agree(n)));
            prop_assert_eq!(history(&a).relation(&history(&b)), mirrored);
        }
    }
}
