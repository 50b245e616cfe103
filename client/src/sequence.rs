//! Sequences of unary writes.
//!
//! The server remembers which of a client's last 1024 sequences it has applied and takes an older one for a
//! repetition. So a new sequence may only be handed out while the oldest one in use is within that window: otherwise
//! a slow write would be answered as a duplicate and lost.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

/// The server's window.
pub(crate) const WINDOW: u64 = 1024;

/// Hands out sequences from 1.
#[derive(Debug, Default)]
pub(crate) struct Sequences {
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct State {
    last: u64,
    in_use: BTreeSet<u64>,
}

/// A sequence in use until dropped.
#[derive(Debug)]
pub(crate) struct Sequence<'a> {
    owner: &'a Sequences,
    pub(crate) number: u64,
}

impl Sequences {
    /// The next sequence, as soon as the window allows it.
    pub(crate) async fn next(&self) -> Sequence<'_> {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            // Registered before the look, so that a release between look and wait is not missed.
            freed.as_mut().enable();
            if let Some(sequence) = self.try_next() {
                return sequence;
            }
            freed.await;
        }
    }

    fn try_next(&self) -> Option<Sequence<'_>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let number = state.last + 1;
        if state.in_use.first().is_some_and(|oldest| number - oldest >= WINDOW) {
            return None;
        }
        state.last = number;
        state.in_use.insert(number);
        Some(Sequence { owner: self, number })
    }
}

impl Drop for Sequence<'_> {
    fn drop(&mut self) {
        self.owner.state.lock().unwrap_or_else(PoisonError::into_inner).in_use.remove(&self.number);
        self.owner.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_waits_for_the_oldest_in_use() {
        let sequences = Sequences::default();
        let oldest = sequences.try_next().unwrap();
        for expected in 2..=WINDOW {
            assert_eq!(sequences.try_next().unwrap().number, expected);
        }
        assert!(sequences.try_next().is_none(), "the oldest would fall out of the server's window");
        drop(oldest);
        assert_eq!(sequences.try_next().unwrap().number, WINDOW + 1);
    }
}
