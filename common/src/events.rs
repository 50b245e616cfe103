//! What happened, in order: a bounded memory of events that any number of readers follow at their own pace.
//!
//! Numbers are dense and ascend from 1. A reader names the last number it knows and gets what is larger; one that is
//! slower than the bound misses the oldest and sees it by the gap in the numbers. Keeping events over a restart is up to
//! the caller: [`EventLog::restore`].

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// From 1, dense.
    pub number: u64,
    /// Unix milliseconds.
    pub time_unix_ms: i64,
    /// A stable name, as `link.attached`.
    pub kind: String,
    /// For people.
    pub message: String,
    /// For machines.
    pub fields: BTreeMap<String, String>,
}

/// The events of a node. Clones are handles of one log.
#[derive(Debug, Clone)]
pub struct EventLog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kept: Mutex<VecDeque<Event>>,
    capacity: usize,
    /// Number of the newest event.
    newest: watch::Sender<u64>,
}

impl EventLog {
    /// Keeps the newest `capacity` events, at least one.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self::restore(capacity, [])
    }

    /// Goes on after `events`, which ascend, of an earlier run.
    #[must_use]
    pub fn restore(capacity: usize, events: impl IntoIterator<Item = Event>) -> Self {
        let capacity = capacity.max(1);
        let mut kept: VecDeque<Event> = events.into_iter().collect();
        kept.drain(..kept.len().saturating_sub(capacity));
        let newest = watch::Sender::new(kept.back().map_or(0, |event| event.number));
        Self(Arc::new(Inner { kept: Mutex::new(kept), capacity, newest }))
    }

    /// Adds an event; it gets the next number.
    pub fn record<const N: usize>(
        &self,
        time_unix_ms: i64,
        kind: &str,
        message: impl Into<String>,
        fields: [(&str, String); N],
    ) -> Event {
        let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut kept = self.0.kept.lock();
        let number = *self.0.newest.borrow() + 1;
        let event = Event { number, time_unix_ms, kind: kind.to_owned(), message: message.into(), fields };
        if kept.len() == self.0.capacity {
            kept.pop_front();
        }
        kept.push_back(event.clone());
        self.0.newest.send_replace(number);
        event
    }

    /// Number of the newest event; 0 before the first.
    #[must_use]
    pub fn newest(&self) -> u64 {
        *self.0.newest.borrow()
    }

    /// The kept events with a larger number than `after`, oldest first.
    #[must_use]
    pub fn after(&self, after: u64) -> Vec<Event> {
        let kept = self.0.kept.lock();
        let from = kept.partition_point(|event| event.number <= after);
        kept.range(from..).cloned().collect()
    }

    /// Waits until there are events with a larger number than `after`. Cancel-safe.
    pub async fn next_after(&self, after: u64) -> Vec<Event> {
        let mut newest = self.0.newest.subscribe();
        newest.wait_for(|newest| *newest > after).await.expect("the sender lives as long as this handle");
        self.after(after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(events: &[Event]) -> Vec<u64> {
        events.iter().map(|event| event.number).collect()
    }

    #[tokio::test]
    async fn readers_resume_by_number_and_wait_for_what_is_new() {
        let log = EventLog::new(3);
        for kind in ["a", "b"] {
            log.record(1, kind, "", []);
        }
        assert_eq!(numbers(&log.next_after(0).await), [1, 2]);
        let reader = tokio::spawn({
            let log = log.clone();
            async move { log.next_after(2).await }
        });
        tokio::task::yield_now().await;
        log.record(2, "link.lost", "gone", [("cause", "timeout".to_owned())]);
        let read = reader.await.unwrap();
        assert_eq!((read[0].number, read[0].fields["cause"].as_str()), (3, "timeout"));
    }

    #[test]
    fn the_oldest_are_forgotten_and_numbers_go_on_after_a_restart() {
        let log = EventLog::new(2);
        for _ in 0..5 {
            log.record(1, "a", "", []);
        }
        assert_eq!(numbers(&log.after(0)), [4, 5]);
        let log = EventLog::restore(2, log.after(0));
        assert_eq!(log.record(2, "b", "", []).number, 6);
        assert_eq!(numbers(&log.after(0)), [5, 6]);
    }
}
