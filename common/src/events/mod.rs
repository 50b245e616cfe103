//! What happened, in order: a bounded memory of events that any number of readers follow at their own pace.
//!
//! Numbers ascend from 1 and are dense within a run. A reader names the last number it knows and gets what is larger;
//! one that is slower than the bound misses the oldest and sees it by the gap in the numbers.
//!
//! [`EventLog::open`] also keeps events in the data directory (`file`), on a thread of its own (`writer`): recording
//! never waits, and an event that cannot be written is counted. Numbers go on after a restart. A run that did not end
//! in order may have shown events that never reached the disk, so the next one leaves [`SKIPPED`] numbers out: what a
//! reader resumes by is not given twice.

mod file;
mod writer;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use futures_util::{Stream, StreamExt as _, stream};
use parking_lot::Mutex;
use prometheus::IntCounter;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::warn;

use self::{file::EventFile, writer::Writer};
use crate::storage::Storage;

/// Numbers left out after a run that did not end in order: more than wait to be written at any time.
pub const SKIPPED: u64 = 1000;
/// Kind of the last event of a run that ended in order.
pub const ENDED: &str = "node.ended";
/// Events that a node keeps in memory.
const KEPT: usize = 1024;
/// A message or a field's value is cut to so many bytes.
const TEXT_BYTES_MAX: usize = 4096;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// From 1, ascending.
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
    kept: Mutex<Kept>,
    capacity: usize,
    /// Number of the newest event.
    newest: watch::Sender<u64>,
}

#[derive(Debug)]
struct Kept {
    events: VecDeque<Event>,
    next: u64,
    /// `None`: in memory alone.
    writer: Option<Writer>,
}

impl EventLog {
    /// Keeps the newest `capacity` events, at least one, in memory.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self::restore(capacity, [])
    }

    /// Goes on after `events`, which ascend, of an earlier run.
    #[must_use]
    pub fn restore(capacity: usize, events: impl IntoIterator<Item = Event>) -> Self {
        let capacity = capacity.max(1);
        let mut events: VecDeque<Event> = events.into_iter().collect();
        events.drain(..events.len().saturating_sub(capacity));
        let last = events.back().map_or(0, |event| event.number);
        let kept = Mutex::new(Kept { events, next: last + 1, writer: None });
        Self(Arc::new(Inner { kept, capacity, newest: watch::Sender::new(last) }))
    }

    /// As [`EventLog::default`], and in the files of `storage`, with what they hold of earlier runs. Where they cannot be
    /// read the log goes on in memory: it must not keep a node from serving. `unwritten` counts events that may be
    /// missing in the files.
    #[must_use]
    pub fn open(storage: Arc<dyn Storage>, unwritten: IntCounter) -> Self {
        let opened = EventFile::open(storage).and_then(|(file, events)| {
            let ended = events.last().is_none_or(|event| event.kind == ENDED);
            Ok((Writer::start(file, unwritten.clone())?, events, ended))
        });
        let (writer, events, ended) = opened.unwrap_or_else(|error| {
            warn!(%error, "the files of events cannot be used: events are kept in memory alone");
            (Writer::broken(unwritten), Vec::new(), true)
        });
        let log = Self::restore(KEPT, events);
        {
            let mut kept = log.0.kept.lock();
            kept.next += if ended { 0 } else { SKIPPED };
            kept.writer = Some(writer);
        }
        log
    }

    /// Adds an event; it gets the next number. Long texts are cut.
    pub fn record<const N: usize>(
        &self,
        time_unix_ms: i64,
        kind: &str,
        message: impl Into<String>,
        fields: [(&str, String); N],
    ) -> Event {
        let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), cut(value))).collect();
        let message = cut(message.into());
        // The lock is held to the end: files and readers get events in the order of their numbers.
        let mut kept = self.0.kept.lock();
        let event = Event { number: kept.next, time_unix_ms, kind: kind.to_owned(), message, fields };
        kept.next += 1;
        if kept.events.len() == self.0.capacity {
            kept.events.pop_front();
        }
        kept.events.push_back(event.clone());
        if let Some(writer) = &kept.writer {
            writer.write(&event);
        }
        self.0.newest.send_replace(event.number);
        event
    }

    /// Records [`ENDED`], the last event of a run, and waits until what is in the queue is written. What is recorded
    /// later stays in memory.
    pub fn close(&self, time_unix_ms: i64, message: impl Into<String>) {
        self.record(time_unix_ms, ENDED, message, []);
        let writer = self.0.kept.lock().writer.take();
        if let Some(writer) = writer {
            writer.close();
        }
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
        let from = kept.events.partition_point(|event| event.number <= after);
        kept.events.range(from..).cloned().collect()
    }

    /// Waits until there are events with a larger number than `after`. Cancel-safe.
    pub async fn next_after(&self, after: u64) -> Vec<Event> {
        let mut newest = self.0.newest.subscribe();
        newest.wait_for(|newest| *newest > after).await.expect("the sender lives as long as this handle");
        self.after(after)
    }

    /// `first`, if any, then the events with a larger number than `after` as they come, without end.
    pub fn follow(&self, after: u64, first: Option<Event>) -> impl Stream<Item = Event> + Send + use<> {
        let log = self.clone();
        let later = stream::unfold((log, after), |(log, after)| async move {
            let events = log.next_after(after).await;
            let after = events.last().map_or(after, |event| event.number);
            Some((stream::iter(events), (log, after)))
        });
        stream::iter(first).chain(later.flatten())
    }
}

impl Default for EventLog {
    /// In memory alone.
    fn default() -> Self {
        Self::new(KEPT)
    }
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    text
}

#[cfg(test)]
mod tests;
