//! The client against a primary in memory that breaks connections, refuses, and falls silent.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::{Fake, Fault};
use tonic::Code;
use understudy_client::proto::CreateVolumeRequest;
use understudy_client::{Client, ClientConfig, ClientError, VolumeHandle, WriteStreamConfig};

const BLOCK: usize = 4096;

async fn connect(fake: &Fake, change: impl FnOnce(&mut ClientConfig)) -> VolumeHandle {
    let mut config = ClientConfig::new(fake.url());
    config.backoff_min = Duration::from_millis(1);
    config.backoff_max = Duration::from_millis(5);
    change(&mut config);
    Client::connect(config).await.unwrap().volume("v").await.unwrap()
}

fn block(fill: u8) -> Bytes {
    vec![fill; BLOCK].into()
}

#[tokio::test]
async fn answers_come_in_order_and_data_is_read_back() {
    let fake = Fake::start(64 * BLOCK).await;
    let volume = connect(&fake, |_| {}).await;
    let stream = volume.write_stream();
    let mut pending = Vec::new();
    for n in 0..64_u8 {
        pending.push(stream.write(u64::from(n) * BLOCK as u64, block(n)).await.unwrap());
    }
    for (lsn, write) in (1..).zip(pending) {
        assert_eq!(write.sequence(), lsn);
        assert_eq!(write.await.unwrap().position.lsn, lsn);
    }
    stream.finish().await.unwrap();
    assert_eq!(volume.read(5 * BLOCK as u64, BLOCK as u64).await.unwrap(), block(5));
}

#[tokio::test]
async fn unary_write_is_repeated_after_a_cut_and_applied_once() {
    let fake = Fake::start(BLOCK).await;
    let volume = connect(&fake, |_| {}).await;
    fake.faults([Fault::CutBefore, Fault::CutAfter, Fault::Status(Code::Unavailable)]);
    let written = volume.write(0, block(9)).await.unwrap();
    assert!(written.duplicate, "the second sending had been applied");
    let state = fake.state.lock().unwrap();
    assert_eq!((state.applied.len(), state.duplicates, state.arrived), (1, 1, 4));
}

#[tokio::test]
async fn refused_unary_write_is_not_repeated() {
    let fake = Fake::start(BLOCK).await;
    let volume = connect(&fake, |_| {}).await;
    fake.faults([Fault::Status(Code::ResourceExhausted)]);
    let error = volume.write(0, block(1)).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::ResourceExhausted));
    assert_eq!(fake.state.lock().unwrap().arrived, 1);
}

#[tokio::test]
async fn creating_a_volume_is_never_sent_twice() {
    let fake = Fake::start(BLOCK).await;
    let config = ClientConfig::new(fake.url());
    let client = Client::connect(config).await.unwrap();
    let error = client.volumes().create(CreateVolumeRequest::default()).await.unwrap_err();
    assert!(matches!(error, ClientError::Rpc { .. }), "{error}");
    assert_eq!(fake.state.lock().unwrap().creates, 1);
}

/// Random cuts, before and after the write is applied: each write lands once, in order.
#[tokio::test]
async fn stream_applies_each_write_once_and_in_order_through_cuts() {
    for seed in 0..20 {
        let mut rng = StdRng::seed_from_u64(seed);
        let fake = Fake::start(16 * BLOCK).await;
        let volume = connect(&fake, |_| {}).await;
        fake.faults((0..600).map(|_| match rng.random_range(0..40) {
            0 => Fault::CutBefore,
            1 => Fault::CutAfter,
            2 => Fault::Status(Code::Unavailable),
            3 => Fault::Status(Code::ResourceExhausted),
            _ => Fault::None,
        }));
        let stream = volume.write_stream_with(WriteStreamConfig { in_flight_max: 32, ..WriteStreamConfig::default() });
        let mut expected = vec![0; 16 * BLOCK];
        let mut pending = Vec::new();
        for n in 1..=200_u8 {
            let at = rng.random_range(0..15 * BLOCK);
            expected[at..at + BLOCK].fill(n);
            pending.push(stream.write(at as u64, block(n)).await.unwrap());
        }
        for write in pending {
            write.await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        }
        stream.finish().await.unwrap();
        let state = fake.state.lock().unwrap();
        assert!(state.image == expected, "seed {seed}: the image differs");
        let sequences: Vec<u64> = state.applied.iter().map(|(_, sequence)| *sequence).collect();
        assert_eq!(sequences, (1..=200).collect::<Vec<_>>(), "seed {seed}");
    }
}

#[tokio::test]
async fn refused_write_is_told_and_the_stream_goes_on() {
    let fake = Fake::start(4 * BLOCK).await;
    let volume = connect(&fake, |_| {}).await;
    fake.faults([Fault::None, Fault::Refuse(Code::OutOfRange), Fault::None]);
    let stream = volume.write_stream();
    let first = stream.write(0, block(1)).await.unwrap();
    let second = stream.write(BLOCK as u64, block(2)).await.unwrap();
    let third = stream.write(2 * BLOCK as u64, block(3)).await.unwrap();
    first.await.unwrap();
    let refused = second.await.unwrap_err();
    assert!(matches!(refused, ClientError::Refused { sequence: 2, code: Code::OutOfRange, .. }), "{refused}");
    third.await.unwrap();
    stream.finish().await.unwrap();
    assert_eq!(fake.state.lock().unwrap().arrived, 3, "nothing was repeated");
}

#[tokio::test]
async fn stream_survives_a_server_that_is_away_for_a_while() {
    let fake = Fake::start(4 * BLOCK).await;
    let volume = connect(&fake, |_| {}).await;
    let stream = volume.write_stream();
    stream.write(0, block(1)).await.unwrap().await.unwrap();
    fake.link.down().await;
    let waiting = stream.write(BLOCK as u64, block(2)).await.unwrap();
    fake.link.up().await;
    waiting.await.unwrap();
    stream.finish().await.unwrap();
}

#[tokio::test]
async fn giving_up_names_what_has_an_unknown_outcome() {
    let fake = Fake::start(4 * BLOCK).await;
    let volume = connect(&fake, |_| {}).await;
    fake.faults([Fault::None, Fault::Silence]);
    let deadline = Duration::from_millis(200);
    let stream = volume.write_stream_with(WriteStreamConfig { deadline, ..WriteStreamConfig::default() });
    stream.write(0, block(1)).await.unwrap().await.unwrap();
    let unknown = stream.write(BLOCK as u64, block(2)).await.unwrap();
    let error = unknown.await.unwrap_err();
    assert!(matches!(error, ClientError::OutcomeUnknown { sequence: 2, .. }), "{error}");
    let error = stream.write(0, block(3)).await.unwrap_err();
    assert!(matches!(error, ClientError::GaveUp { first: 2, unknown: 1, not_sent: 0, .. }), "{error}");
    let error = stream.finish().await.unwrap_err();
    assert!(error.to_string().contains("from sequence 2"), "{error}");
}

#[tokio::test]
async fn stream_that_the_server_refuses_ends_at_once() {
    let fake = Fake::start(4 * BLOCK).await;
    let volume = connect(&fake, |_| {}).await;
    fake.faults([Fault::Status(Code::FailedPrecondition)]);
    let stream = volume.write_stream();
    let error = stream.write(0, block(1)).await.unwrap().await.unwrap_err();
    assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
    assert!(stream.finish().await.is_err());
    assert_eq!(fake.state.lock().unwrap().arrived, 1);
}

#[tokio::test]
async fn answer_for_another_write_ends_the_stream() {
    let fake = Fake::start(4 * BLOCK).await;
    let volume = connect(&fake, |_| {}).await;
    fake.faults([Fault::WrongTag]);
    let stream = volume.write_stream();
    let error = stream.write(0, block(1)).await.unwrap().await.unwrap_err();
    assert!(error.to_string().contains("protocol"), "{error}");
}

/// The fake never answers, so what gets through is exactly what the bounds allow.
#[tokio::test]
async fn writes_in_flight_are_bounded_by_count_and_bytes() {
    for (in_flight_max, in_flight_bytes_max, allowed) in [(3, 1 << 20, 3), (100, 5 * BLOCK, 5)] {
        let fake = Fake::start(64 * BLOCK).await;
        let volume = connect(&fake, |_| {}).await;
        fake.faults([Fault::Silence]);
        let config = WriteStreamConfig { in_flight_max, in_flight_bytes_max, ..WriteStreamConfig::default() };
        let stream = volume.write_stream_with(config);
        let mut held = Vec::new();
        for _ in 0..allowed {
            held.push(stream.write(0, block(1)).await.unwrap());
        }
        let more = tokio_test_poll(stream.write(0, block(1)));
        assert!(more.await, "write {allowed} had to wait");
        drop(held);
    }
}

/// True if the future is pending at its first poll.
async fn tokio_test_poll<T>(future: impl Future<Output = T>) -> bool {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| std::task::Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}

#[tokio::test]
async fn oversized_write_is_refused_before_it_is_sent() {
    let fake = Fake::start(BLOCK).await;
    let volume = connect(&fake, |config| config.message_bytes_max = 64 << 10).await;
    let large = Bytes::from(vec![0; 64 << 10]);
    assert!(matches!(volume.write(0, large.clone()).await, Err(ClientError::TooLarge { .. })));
    assert!(matches!(volume.write_stream().write(0, large).await, Err(ClientError::TooLarge { .. })));
    assert_eq!(fake.state.lock().unwrap().arrived, 0);
}

#[tokio::test]
async fn long_read_goes_on_where_it_broke() {
    let fake = Fake::start(600 * BLOCK).await;
    let volume = connect(&fake, |_| {}).await;
    let expected = {
        let mut state = fake.state.lock().unwrap();
        for (index, bytes) in state.image.chunks_mut(BLOCK).enumerate().filter(|(index, _)| index % 3 > 0) {
            bytes.fill(u8::try_from(index % 251).unwrap() + 1);
        }
        state.cut_read_after = Some(100);
        state.image.clone()
    };
    let whole = volume.read(0, 600 * BLOCK as u64).await.unwrap();
    assert!(whole == expected);
    assert!(fake.state.lock().unwrap().cut_read_after.is_none(), "the cut happened");
}

#[tokio::test]
async fn bad_checksum_is_not_passed_on() {
    let fake = Fake::start(BLOCK).await;
    let volume = connect(&fake, |_| {}).await;
    fake.state.lock().unwrap().bad_read_crc = true;
    assert!(matches!(volume.read(0, 100).await, Err(ClientError::Checksum { .. })));
}

#[tokio::test]
async fn unreachable_server_is_named_with_the_remedy() {
    let fake = Fake::start(BLOCK).await;
    fake.link.down().await;
    let mut config = ClientConfig::new(fake.url());
    config.retry_for = Duration::ZERO;
    let error = Client::connect(config).await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("check that the service runs"), "{error}");
}

#[tokio::test]
async fn settings_that_cannot_be_used_are_refused_by_name() {
    for (url, setting) in [("ftp://x", "URL"), ("127.0.0.1:7400", "URL"), ("https://x:1", "TLS ca")] {
        match Client::lazy(ClientConfig::new(url)) {
            Err(ClientError::Config { setting: named, .. }) => assert_eq!(named, setting, "{url}"),
            other => panic!("{url}: {other:?}"),
        }
    }
    let mut config = ClientConfig::new("http://127.0.0.1:1");
    config.client_id = "x".repeat(49);
    assert!(matches!(Client::lazy(config), Err(ClientError::Config { setting: "client id", .. })));
}
