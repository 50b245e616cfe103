use std::{io, path::Path};

use super::*;
use crate::storage::{RealStorage, SimStorage, sim::OpKind};

fn numbers(events: &[Event]) -> Vec<u64> {
    events.iter().map(|event| event.number).collect()
}

fn counter() -> IntCounter {
    IntCounter::new("unwritten", "events").unwrap()
}

fn real(dir: &Path) -> Arc<dyn Storage> {
    Arc::new(RealStorage::new(dir).unwrap())
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

#[tokio::test]
async fn a_stream_begins_as_it_is_told_and_goes_on_with_each_event() {
    let log = EventLog::new(8);
    let state = log.record(1, "a", "", []);
    let mut events = Box::pin(log.follow(1, Some(state)));
    assert_eq!(events.next().await.unwrap().number, 1);
    for number in 2..5 {
        log.record(2, "b", "", []);
        assert_eq!(events.next().await.unwrap().number, number);
    }
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

#[test]
fn long_texts_are_cut_between_characters() {
    let log = EventLog::new(1);
    let event = log.record(1, "a", "é".repeat(5000), [("long", format!("a{}", "é".repeat(5000)))]);
    assert_eq!((event.message.len(), event.fields["long"].len()), (TEXT_BYTES_MAX, TEXT_BYTES_MAX - 1));
}

#[test]
fn numbers_are_dense_after_an_end_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let unwritten = counter();
    for run in 0..3 {
        let log = EventLog::open(real(dir.path()), unwritten.clone());
        assert_eq!(numbers(&log.after(0)), (1..=run * 3).collect::<Vec<_>>());
        log.record(1, "node.started", "", []);
        log.record(2, "link.lost", "gone", [("cause", "timeout".to_owned())]);
        log.close(3, "in order");
        // Nobody keeps this one.
        log.record(4, "late", "", []);
    }
    let kept = EventLog::open(real(dir.path()), unwritten.clone()).after(5);
    let kinds: Vec<_> = kept.iter().map(|event| event.kind.as_str()).collect();
    assert_eq!(kinds, [ENDED, "node.started", "link.lost", ENDED]);
    assert_eq!(unwritten.get(), 0);
}

/// A reader may have seen numbers that never reached the disk.
#[test]
fn numbers_that_may_have_been_shown_are_not_given_again() {
    let dir = tempfile::tempdir().unwrap();
    let log = EventLog::open(real(dir.path()), counter());
    for _ in 0..10 {
        log.record(1, "a", "", []);
    }
    let writer = log.0.kept.lock().writer.take().unwrap();
    writer.close();
    log.record(1, "never written", "", []);
    let shown = log.newest();

    let log = EventLog::open(real(dir.path()), counter());
    assert_eq!(numbers(&log.after(0)), (1..=10).collect::<Vec<_>>());
    let next = log.record(2, "b", "", []);
    assert_eq!(next.number, 11 + SKIPPED);
    assert_eq!(log.after(shown), [next]);
}

#[test]
fn what_cannot_be_written_is_counted_and_shown_all_the_same() {
    let storage = SimStorage::new(1);
    let unwritten = counter();
    let log = EventLog::open(Arc::new(storage.clone()), unwritten.clone());
    storage.fail_nth(OpKind::Write, 1, io::ErrorKind::StorageFull);
    log.record(1, "a", "", []);
    while unwritten.get() == 0 {
        std::thread::yield_now();
    }
    log.close(1, "");
    assert_eq!((unwritten.get(), numbers(&log.after(0))), (1, vec![1, 2]));
    let log = EventLog::open(Arc::new(storage), unwritten);
    assert_eq!(numbers(&log.after(0)), [2]);
}

#[test]
fn files_that_cannot_be_read_do_not_stop_a_node() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("events.jsonl")).unwrap();
    let unwritten = counter();
    let log = EventLog::open(real(dir.path()), unwritten.clone());
    assert_eq!(log.record(1, "a", "", []).number, 1);
    log.close(2, "");
    assert_eq!((unwritten.get(), log.after(0).len()), (2, 2));
}
