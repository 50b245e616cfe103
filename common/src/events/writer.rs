//! The thread that writes events. Its queue is bounded and nobody waits for it, but who closes it.

use std::{
    io, iter,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::{self, JoinHandle},
    time::Duration,
};

use prometheus::IntCounter;
use tracing::warn;

use super::{Event, file::EventFile};

/// Events that wait.
const QUEUE: usize = 256;
/// Between two syncs: they must not get in the way of the journal's, however many events there are.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Writer {
    /// Without a thread nothing takes what is sent.
    queue: SyncSender<Event>,
    thread: Option<JoinHandle<()>>,
    unwritten: IntCounter,
}

impl Writer {
    pub(super) fn start(file: EventFile, unwritten: IntCounter) -> io::Result<Self> {
        let (queue, events) = sync_channel(QUEUE);
        let counter = unwritten.clone();
        let thread = thread::Builder::new().name("events".into()).spawn(move || run(file, &events, &counter))?;
        Ok(Self { queue, thread: Some(thread), unwritten })
    }

    /// Counts every event.
    pub(super) fn broken(unwritten: IntCounter) -> Self {
        Self { queue: sync_channel(0).0, thread: None, unwritten }
    }

    /// Does not wait.
    pub(super) fn write(&self, event: &Event) {
        if self.queue.try_send(event.clone()).is_err() {
            self.unwritten.inc();
        }
    }

    /// Waits until the queue is written, or given up.
    pub(super) fn close(self) {
        drop(self.queue);
        if let Some(thread) = self.thread {
            // A panic of it ends the process.
            let _ = thread.join();
        }
    }
}

fn run(mut file: EventFile, queue: &Receiver<Event>, unwritten: &IntCounter) {
    let mut is_well = true;
    while let Ok(first) = queue.recv() {
        let events: Vec<Event> = iter::once(first).chain(queue.try_iter().take(QUEUE)).collect();
        match file.append(&events) {
            Ok(()) => is_well = true,
            Err(error) => {
                unwritten.inc_by(events.len() as u64);
                if is_well {
                    warn!(%error, "events cannot be written to the data directory");
                }
                is_well = false;
            }
        }
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use super::*;
    use crate::storage::SimStorage;

    #[test]
    fn a_stuck_disk_holds_up_nobody_and_its_queue_is_bounded() {
        let (disk, unwritten) = (SimStorage::new(1), IntCounter::new("unwritten", "events").unwrap());
        // The thread is in a sync that does not return.
        let (queue, events) = sync_channel(QUEUE);
        let writer = Writer { queue, thread: None, unwritten: unwritten.clone() };
        for number in 1..=2000 {
            let (kind, message, fields) = ("a".into(), String::new(), BTreeMap::new());
            writer.write(&Event { number, time_unix_ms: 1, kind, message, fields });
        }
        assert_eq!(unwritten.get(), 2000 - QUEUE as u64);
        writer.close();
        // Now it does.
        run(EventFile::open(Arc::new(disk.clone())).unwrap().0, &events, &unwritten);
        let (_, found) = EventFile::open(Arc::new(disk)).unwrap();
        assert!(found.iter().map(|event| event.number).eq(1..=QUEUE as u64));
    }
}
