//! Who waits for an acknowledgement, in the order in which it may come.
//!
//! The marks move several times for each group commit. If each waiter followed them itself, every move would wake
//! every waiter; here one task follows them and wakes those that may be answered. A waiter that is woken looks for
//! itself, so a wake too many does no harm.

use std::{collections::BTreeMap, ops::Bound};

use parking_lot::Mutex;
use tokio::sync::oneshot;
use understudy_common::{
    store::{Marks, Store},
    types::{GroupId, Lsn},
};

/// What decides when a waiter may be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Queue {
    /// In the journal.
    Durable,
    /// In its place.
    Placed,
    /// By the backup, in one lane or in all, or, with the last, not at all in delta mode.
    Held(GroupId, Option<u8>, bool),
}

/// A place: the queue, the record, and a number that makes it unique.
type Place = (Queue, Lsn, u64);

#[derive(Debug, Default)]
struct Inner {
    waiting: BTreeMap<Place, oneshot::Sender<()>>,
    next: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Waiters {
    inner: Mutex<Inner>,
}

/// A place in a queue; given up when it is dropped.
pub(crate) struct Waiting<'a> {
    waiters: &'a Waiters,
    place: Place,
    woken: oneshot::Receiver<()>,
}

impl Waiters {
    /// Takes a place for a record. Look at the marks after this, and then wait.
    pub(crate) fn enter(&self, queue: Queue, lsn: Lsn) -> Waiting<'_> {
        let (wake, woken) = oneshot::channel();
        let mut inner = self.inner.lock();
        inner.next += 1;
        let place = (queue, lsn, inner.next);
        inner.waiting.insert(place, wake);
        Waiting { waiters: self, place, woken }
    }

    /// Wakes those that the marks may satisfy; all of them if the store has failed.
    pub(crate) fn on_marks(&self, marks: &Marks, store: &Store) {
        let mut inner = self.inner.lock();
        let waiting = &mut inner.waiting;
        if marks.failed {
            std::mem::take(waiting).into_values().for_each(wake);
            return;
        }
        let mut from = Bound::Unbounded;
        while let Some((&(queue, _, _), _)) = waiting.range((from, Bound::Unbounded)).next() {
            let upto = match queue {
                Queue::Durable => marks.durable,
                // A record that need not be synced in its place is settled by being there.
                Queue::Placed => marks.placed.max(marks.applied),
                Queue::Held(group, _, true) if store.is_delta(group) => Lsn::MAX,
                Queue::Held(group, lane, _) => store.retained_of(group).held_upto(lane),
            };
            while let Some(entry) = waiting.range((queue, Lsn::ZERO, 0)..).next()
                && entry.0.0 == queue
                && entry.0.1 <= upto
            {
                let place = *entry.0;
                waiting.remove(&place).into_iter().for_each(wake);
            }
            from = Bound::Excluded((queue, Lsn::MAX, u64::MAX));
        }
    }
}

fn wake(waiter: oneshot::Sender<()>) {
    // Nobody is there any more: nothing to wake.
    let _ = waiter.send(());
}

impl Waiting<'_> {
    /// Resolves when it is worth looking again.
    pub(crate) async fn woken(&mut self) {
        // The sender is dropped only after it has sent.
        let _ = (&mut self.woken).await;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.waiters.inner.lock().waiting.remove(&self.place);
    }
}
