//! The lives of a primary's directory: what tells it from a copy of it.
//!
//! A copy of a directory has the same ids and the same generation, and gives the same LSNs to other records. So a primary
//! begins a *life*, named by 16 random bytes, before it first asks a backup in a process, and the next opening notes where
//! that ended: at the newest record there was. The backup remembers the life that it met last. What it holds of that life
//! must lie before its end, in the list of whoever attaches: an old copy does not know the life, or ended it earlier.
//! Pure: no clock, no I/O.
//!
//! Invariants: of one generation; all but the newest have ended; the newest [`LIVES_MAX`] are kept.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::types::{Lsn, Uid};

/// Lives that are remembered. A backup that has missed so many is refused until an operator's word.
pub const LIVES_MAX: usize = 256;

/// One life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// Random.
    pub id: Uid,
    /// The newest record when the next process began; `None` while it lasts.
    pub end: Option<Lsn>,
}

/// Those of one primary in its generation, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Lives(Vec<Life>);

/// Why what a backup holds is not of these lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NotOurs {
    /// The life is of another directory, or of a later state of this one.
    #[error("it does not know its life {0}, which the backup has met")]
    Unknown(Uid),
    /// It held less when it ended.
    #[error("its life {life} ended at {end}, and the backup holds {held} of it")]
    Beyond {
        /// The life.
        life: Uid,
        /// Where it ended.
        end: Lsn,
        /// The newest record of the backup.
        held: Lsn,
    },
}

impl Lives {
    /// From those of the other side.
    ///
    /// # Errors
    /// If there are too many, or one has no end and is not the newest.
    pub fn new(lives: Vec<Life>) -> Result<Self, String> {
        if lives.len() > LIVES_MAX {
            return Err(format!("{} lives are more than {LIVES_MAX}", lives.len()));
        }
        if lives.iter().rev().skip(1).any(|life| life.end.is_none()) {
            return Err("a life that is over has no end".into());
        }
        Ok(Self(lives))
    }

    /// Oldest first.
    #[must_use]
    pub fn lives(&self) -> &[Life] {
        &self.0
    }

    /// The one that lasts.
    #[must_use]
    pub fn open(&self) -> Option<Uid> {
        self.0.last().filter(|life| life.end.is_none()).map(|life| life.id)
    }

    /// A process begins with records up to `newest`. False if that changes nothing.
    pub fn end(&mut self, newest: Lsn) -> bool {
        match self.0.last_mut().filter(|life| life.end.is_none()) {
            Some(life) => life.end.replace(newest).is_none(),
            None => false,
        }
    }

    /// A backup is asked for the first time in a process.
    pub fn begin(&mut self, id: Uid) {
        debug_assert!(self.open().is_none());
        self.0.push(Life { id, end: None });
        let excess = self.0.len().saturating_sub(LIVES_MAX);
        self.0.drain(..excess);
    }

    /// Whether a backup that met life `met` last, and has records up to `held`, has them from here.
    ///
    /// # Errors
    /// See [`NotOurs`].
    pub fn check(&self, met: Uid, held: Lsn) -> Result<(), NotOurs> {
        let life = self.0.iter().find(|life| life.id == met).ok_or(NotOurs::Unknown(met))?;
        match life.end {
            Some(end) if held > end => Err(NotOurs::Beyond { life: met, end, held }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Uid = Uid([1; 16]);
    const B: Uid = Uid([2; 16]);

    #[test]
    fn a_copy_does_not_know_later_lives_or_ended_its_own_earlier() {
        let mut lives = Lives::default();
        assert!(!lives.end(Lsn(3)), "none has begun");
        lives.begin(A);
        let mut copy = lives.clone();
        assert!(lives.end(Lsn(20)) && !lives.end(Lsn(30)), "it ends once");
        lives.begin(B);
        assert_eq!((lives.check(A, Lsn(20)), lives.check(B, Lsn(99))), (Ok(()), Ok(())));
        assert_eq!(lives.check(A, Lsn(21)), Err(NotOurs::Beyond { life: A, end: Lsn(20), held: Lsn(21) }));
        // Taken while the first one lasted, at record 10.
        copy.end(Lsn(10));
        assert_eq!(copy.check(A, Lsn(20)), Err(NotOurs::Beyond { life: A, end: Lsn(10), held: Lsn(20) }));
        assert_eq!(copy.check(B, Lsn(5)), Err(NotOurs::Unknown(B)));
    }

    #[test]
    fn the_newest_are_kept_and_nonsense_is_refused() {
        let mut lives = Lives::default();
        for n in 0..=LIVES_MAX {
            lives.end(Lsn(1));
            lives.begin(Uid([u8::try_from(n % 251).expect("small"); 16]));
        }
        assert_eq!(lives.lives().len(), LIVES_MAX);
        assert!(Lives::new(lives.lives().to_vec()).is_ok());
        assert!(Lives::new(lives.lives().iter().rev().copied().collect()).is_err(), "an open one before others");
        assert!(Lives::new(vec![Life { id: A, end: Some(Lsn(1)) }; LIVES_MAX + 1]).is_err(), "too many");
    }
}
