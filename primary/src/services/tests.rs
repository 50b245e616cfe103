//! The services over a real loopback socket, with an engine in memory.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::Arc,
    task::Poll,
};

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use understudy_common::{
    config::{self, PrimaryConfig, Start},
    delta::BlockSet,
    policy::PolicyConfig,
    process::Failure,
    serve::{self, Protocol, ServeLimits},
    telemetry::Telemetry,
    types::{AckRule, AwayRule, BlockSize, GroupId, Lsn, Position, VolumeId, VolumeSpec},
};
use understudy_proto::v1::{
    self, block_service_client::BlockServiceClient, read_blocks_response::Content,
    replication_service_client::ReplicationServiceClient, volume_service_client::VolumeServiceClient,
    write_result::Outcome,
};

use super::*;
use crate::api::*;

/// Volumes in memory; a write settles when `settled` reaches its LSN.
#[derive(Clone)]
pub(crate) struct Memory(Arc<Inner>);

pub(crate) struct Inner {
    state: Mutex<State>,
    /// Everything up to this LSN is durable.
    settled: watch::Sender<u64>,
    events: Mutex<Vec<mpsc::Sender<v1::Event>>>,
}

#[derive(Default)]
struct State {
    volumes: BTreeMap<u64, (VolumeSpec, Vec<u8>)>,
    lsn: u64,
    order: Vec<u64>,
    sequences: HashSet<(String, u64)>,
    policy: PolicyConfig,
}

pub(crate) struct Ticket {
    lsn: u64,
    duplicate: bool,
}

impl Memory {
    pub(crate) fn new(settled: u64) -> Self {
        let (settled, _) = watch::channel(settled);
        Self(Arc::new(Inner { state: Mutex::default(), settled, events: Mutex::default() }))
    }

    fn with<R>(
        &self,
        key: &VolumeKey,
        act: impl FnOnce(&mut VolumeSpec, &mut Vec<u8>) -> Result<R, EngineError>,
    ) -> Result<R, EngineError> {
        let mut state = self.0.state.lock();
        let found = state.volumes.values_mut().find(|(info, _)| match key {
            VolumeKey::Id(id) => info.id == *id,
            VolumeKey::Name(name) => info.name == *name,
        });
        let (info, data) = found.ok_or_else(|| EngineError::NoVolume { volume: key.to_string() })?;
        act(info, data)
    }

    fn range(&self, key: &VolumeKey, offset: u64, length: u64) -> Result<std::ops::Range<usize>, EngineError> {
        self.with(key, |info, _| match offset.checked_add(length).filter(|end| *end <= info.size_bytes) {
            Some(end) => Ok(usize::try_from(offset).unwrap()..usize::try_from(end).unwrap()),
            None => Err(EngineError::OutOfRange {
                volume: info.name.clone(),
                offset_bytes: offset,
                length_bytes: length,
                size_bytes: info.size_bytes,
            }),
        })
    }

    fn group(&self, name: &str) -> Result<(), EngineError> {
        let state = self.0.state.lock();
        let mut names = state.volumes.values().map(|(spec, _)| spec.group_name.as_str());
        names.any(|group| group == name).then_some(()).ok_or_else(|| EngineError::NoGroup { group: name.into() })
    }

    fn ack(&self, ticket: &Ticket) -> WriteAck {
        let position = Position { generation: 1, lsn: Lsn(ticket.lsn) };
        WriteAck { position, both: false, duplicate: ticket.duplicate, delta: false }
    }
}

impl BlockEngine for Memory {
    type Permit = u64;
    type Ticket = Ticket;

    async fn admit(&self, bytes: u64) -> Result<u64, EngineError> {
        if bytes == 13 {
            return Err(EngineError::Busy { bytes, in_flight_bytes: 100, waited_ms: 5 });
        }
        Ok(bytes)
    }

    async fn submit(&self, _: u64, request: WriteRequest) -> Result<Ticket, EngineError> {
        let length = super::block::range_bytes(&request);
        let range = self.range(&request.volume, request.offset_bytes, length)?;
        if let (WriteKind::Data(data), Some(expected)) = (&request.kind, request.crc32c) {
            let found = understudy_common::checksum::crc32c(data);
            if found != expected {
                return Err(EngineError::Checksum { expected, found });
            }
        }
        let mut state = self.0.state.lock();
        if let Some(ClientSequence { client, sequence }) = request.client
            && !state.sequences.insert((client, sequence))
        {
            return Ok(Ticket { lsn: state.lsn, duplicate: true });
        }
        state.lsn += 1;
        let lsn = state.lsn;
        state.order.push(request.offset_bytes);
        drop(state);
        self.with(&request.volume, |_, bytes| {
            match &request.kind {
                WriteKind::Data(data) => bytes[range].copy_from_slice(data),
                WriteKind::Zeroes { .. } | WriteKind::Discard { .. } => bytes[range].fill(0),
            }
            Ok(())
        })?;
        Ok(Ticket { lsn, duplicate: false })
    }

    fn submit_now(&self, requests: &mut VecDeque<WriteRequest>) -> Vec<Ticket> {
        let mut tickets = Vec::new();
        // What is not aligned goes the longer way, and what is behind it waits for it.
        while let Some(request) = requests.pop_front_if(|request| request.offset_bytes.is_multiple_of(4096)) {
            match self.submit(0, request.clone()).now_or_never() {
                Some(Ok(ticket)) => tickets.push(ticket),
                _ => {
                    requests.push_front(request);
                    break;
                }
            }
        }
        tickets
    }

    async fn wait(&self, ticket: Ticket) -> Result<WriteAck, EngineError> {
        self.0.settled.subscribe().wait_for(|settled| *settled >= ticket.lsn).await.unwrap();
        Ok(self.ack(&ticket))
    }

    fn poll_settled(&self, ticket: &Ticket) -> Option<Result<WriteAck, EngineError>> {
        (*self.0.settled.borrow() >= ticket.lsn).then(|| Ok(self.ack(ticket)))
    }

    async fn read(&self, volume: &VolumeKey, offset: u64, length: u64) -> Result<(Bytes, u32), EngineError> {
        let range = self.range(volume, offset, length)?;
        let data = self.with(volume, |_, bytes| Ok(Bytes::copy_from_slice(&bytes[range])))?;
        let crc = understudy_common::checksum::crc32c(&data);
        Ok((data, crc))
    }

    async fn read_piece(&self, volume: &VolumeKey, offset_bytes: u64, max: u64) -> Result<ReadPiece, EngineError> {
        let (data, crc32c) = self.read(volume, offset_bytes, max).await?;
        let position = Position { generation: 1, lsn: Lsn(7) };
        let zeros = data.iter().all(|byte| *byte == 0);
        // More zeros than were asked for, as an engine may answer.
        let content = if zeros { PieceContent::Zeros(max + 4096) } else { PieceContent::Data(data) };
        Ok(ReadPiece { offset_bytes, content, crc32c: if zeros { 0 } else { crc32c }, position })
    }

    async fn flush(&self, volume: &VolumeKey) -> Result<WriteAck, EngineError> {
        self.volume(volume)?;
        let lsn = self.0.state.lock().lsn;
        self.wait(Ticket { lsn, duplicate: false }).await
    }

    async fn create_volume(&self, volume: NewVolume) -> Result<VolumeSpec, EngineError> {
        let mut state = self.0.state.lock();
        if state.volumes.values().any(|(info, _)| info.name == volume.name) {
            return Err(EngineError::VolumeExists { volume: volume.name });
        }
        let id = state.volumes.len() as u64 + 1;
        let spec = VolumeSpec {
            id: VolumeId(id),
            group: GroupId(id),
            group_name: volume.group.unwrap_or_else(|| volume.name.clone()),
            name: volume.name,
            size_bytes: volume.size_bytes,
            block_size: BlockSize::new(4096).unwrap(),
            segment_bytes: 65536,
            ack: volume.ack,
            away: volume.away,
        };
        let data = vec![0; usize::try_from(volume.size_bytes).unwrap()];
        state.volumes.insert(id, (spec.clone(), data));
        Ok(spec)
    }

    async fn resize_volume(&self, volume: &VolumeKey, size_bytes: u64) -> Result<VolumeSpec, EngineError> {
        self.with(volume, |info, data| {
            if size_bytes < info.size_bytes {
                return Err(EngineError::Shrink { volume: info.name.clone(), why: "it holds data".into() });
            }
            info.size_bytes = size_bytes;
            data.resize(usize::try_from(size_bytes).unwrap(), 0);
            Ok(info.clone())
        })
    }

    async fn delete_volume(&self, volume: &VolumeKey) -> Result<(), EngineError> {
        let id = self.volume(volume)?.id;
        self.0.state.lock().volumes.remove(&id.0);
        Ok(())
    }

    async fn set_ack_rule(
        &self,
        volume: &VolumeKey,
        ack: AckRule,
        away: Option<AwayRule>,
    ) -> Result<VolumeSpec, EngineError> {
        self.with(volume, |info, _| {
            info.ack = ack;
            info.away = away.unwrap_or(info.away);
            Ok(info.clone())
        })
    }

    fn volume(&self, volume: &VolumeKey) -> Result<VolumeSpec, EngineError> {
        self.with(volume, |info, _| Ok(info.clone()))
    }

    fn volumes(&self) -> Vec<VolumeSpec> {
        self.0.state.lock().volumes.values().map(|(info, _)| info.clone()).collect()
    }

    fn pool(&self) -> v1::Pool {
        let devices = vec![v1::PoolDevice { path: "/d/pool".into(), ..Default::default() }];
        v1::Pool { segment_bytes: 65536, total_bytes: 10, free_bytes: 4, devices, ..Default::default() }
    }

    async fn add_device(&self, request: v1::AddDeviceRequest) -> Result<v1::PoolDevice, EngineError> {
        Ok(v1::PoolDevice { path: request.path, size_bytes: request.size_bytes, ..Default::default() })
    }

    async fn drain_device(&self, request: v1::DrainDeviceRequest) -> Result<v1::PoolDevice, EngineError> {
        Err(EngineError::Pool { code: tonic::Code::NotFound, why: request.path })
    }

    fn list_segments(&self, _: v1::ListSegmentsRequest) -> Result<v1::ListSegmentsResponse, EngineError> {
        Ok(v1::ListSegmentsResponse::default())
    }

    async fn take_snapshot(&self, group: &str, name: &str) -> Result<v1::SnapshotInfo, EngineError> {
        self.group(group)?;
        Ok(v1::SnapshotInfo { id: 1, name: name.into(), group: group.into(), ..Default::default() })
    }

    async fn snapshots(&self, _: Option<&str>) -> Result<Vec<v1::SnapshotInfo>, EngineError> {
        Ok(Vec::new())
    }

    fn snapshot_times(&self, _: &str) -> Result<Vec<(String, i64)>, EngineError> {
        Ok(Vec::new())
    }

    async fn delete_snapshot(&self, group: &str, name: &str) -> Result<(), EngineError> {
        Err(EngineError::NoSnapshot { group: group.into(), snapshot: name.into() })
    }

    async fn restore_snapshot(&self, group: &str, _: Option<&str>, name: &str) -> Result<Copy, EngineError> {
        Err(EngineError::NoSnapshot { group: group.into(), snapshot: name.into() })
    }

    async fn clone_snapshot(
        &self,
        _: &VolumeKey,
        name: &str,
        _: String,
        _: Option<String>,
    ) -> Result<Copy, EngineError> {
        Err(EngineError::NoSnapshot { group: "v".into(), snapshot: name.into() })
    }

    async fn changed_blocks(&self, _: &VolumeKey, _: &str, _: Option<&str>, _: u64) -> Result<Changed, EngineError> {
        Ok(Changed { ranges: vec![(0, 4096)], next: None, volume_bytes: 8192 })
    }

    fn snapshot_spec(&self, volume: &VolumeKey, _: &str) -> Result<VolumeSpec, EngineError> {
        self.volume(volume)
    }

    async fn read_snapshot(&self, volume: &VolumeKey, _: &str, at: u64, max: u64) -> Result<ReadPiece, EngineError> {
        self.read_piece(volume, at, max).await
    }

    async fn start_delta(&self, group: &str) -> Result<v1::StartDeltaResponse, EngineError> {
        self.group(group)?;
        let why = "a run begins in delta mode only; SetMode forces it".into();
        Err(EngineError::WrongPhase { group: group.into(), phase: "streaming", why })
    }

    async fn abort_delta(&self, group: &str) -> Result<v1::AbortRunResponse, EngineError> {
        self.group(group)?;
        Ok(v1::AbortRunResponse { group: group.into(), run: None })
    }

    async fn force_delta(&self, group: &str, forced: bool) -> Result<v1::SetModeResponse, EngineError> {
        self.group(group)?;
        let mode = if forced { v1::Mode::Delta } else { v1::Mode::Continuous };
        Ok(v1::SetModeResponse { group: group.into(), mode: mode.into(), ..Default::default() })
    }

    fn policy(&self) -> PolicyInForce {
        PolicyInForce { policy: self.0.state.lock().policy.clone(), configured: PolicyConfig::default() }
    }

    fn set_policy(&self, policy: PolicyConfig) {
        self.0.state.lock().policy = policy;
    }

    fn explain(&self, group: Option<&str>, limit: usize) -> Result<Vec<v1::GroupExplanation>, EngineError> {
        let decisions = vec![v1::Decision::default(); limit];
        Ok(vec![v1::GroupExplanation { group: group.unwrap_or("all").into(), decisions, ..Default::default() }])
    }

    fn verify(&self, volume: Option<VolumeKey>, _: bool) -> Result<VerifyStream, EngineError> {
        volume.map(|key| self.volume(&key)).transpose()?;
        let (told, progress) = mpsc::channel(1);
        told.try_send(Err(EngineError::NoBackup { link: "it is a test".into() })).unwrap();
        Ok(ReceiverStream::new(progress))
    }

    async fn scrub(&self, volume: Option<VolumeKey>, start: bool) -> Result<v1::ScrubResponse, EngineError> {
        let volume = volume.map(|key| self.volume(&key)).transpose()?;
        let volume_id = volume.map_or(0, |spec| spec.id.0);
        let primary = v1::ScrubStatus { running: start, volume_id, ..Default::default() };
        Ok(v1::ScrubResponse { primary: Some(primary), ..Default::default() })
    }

    async fn refuse_primary(&self, request: v1::AttachRequest) -> tonic::Status {
        tonic::Status::failed_precondition(format!("generation {} is over", request.generation))
    }

    async fn demote(&self, request: v1::DemoteRequest) -> Result<v1::DemoteResponse, EngineError> {
        match request.drain {
            true => Err(EngineError::Role { why: "not drained".into() }),
            false => Ok(v1::DemoteResponse { generation: 4, ..Default::default() }),
        }
    }

    fn resolve(&self) -> Result<v1::ResolveSplitBrainResponse, EngineError> {
        Ok(v1::ResolveSplitBrainResponse { generation: 4 })
    }

    fn renew_lease(&self, generation: u64) -> Result<v1::RenewLeaseResponse, EngineError> {
        if generation == 4 { Ok(v1::RenewLeaseResponse { remaining_ms: 5 }) } else { Err(EngineError::NoLease) }
    }

    fn unshipped(&self, volume: Option<&str>) -> Result<Vec<UnshippedVolume>, EngineError> {
        let volumes = self.volumes().into_iter().filter(|spec| volume.is_none_or(|name| name == spec.name));
        let mut blocks = BlockSet::new();
        blocks.insert_range(1, 2);
        Ok(volumes.map(|spec| UnshippedVolume { spec, blocks: blocks.clone() }).collect())
    }

    async fn read_unshipped(&self, spec: &VolumeSpec, first: u64, count: u64) -> Result<Bytes, EngineError> {
        let bytes = u64::from(spec.block_size.bytes());
        Ok(self.read(&VolumeKey::Id(spec.id), first * bytes, count * bytes).await?.0)
    }

    fn status(&self) -> v1::Status {
        v1::Status { role: "primary".into(), generation: 1, ..Default::default() }
    }

    fn subscribe(&self, after: u64) -> EventStream {
        let (sender, receiver) = mpsc::channel(8);
        sender.try_send(v1::Event { number: after, kind: "state".into(), ..Default::default() }).unwrap();
        self.0.events.lock().push(sender);
        Box::pin(ReceiverStream::new(receiver))
    }

    fn refresh_metrics(&self) {}

    async fn failed(&self) -> Failure {
        std::future::pending().await
    }

    async fn close(&self) -> Result<(), Failure> {
        Ok(())
    }
}

struct Served {
    engine: Memory,
    telemetry: Telemetry,
    health: Health,
    shutdown: CancellationToken,
    address: SocketAddr,
    server: tokio::task::JoinHandle<usize>,
}

/// Serves an engine on which everything up to `settled` is durable.
async fn serve(settled: u64) -> Served {
    let arguments = ["p", "--data-dir", "/d", "--limits-message", "1MiB"].map(Into::into);
    let Start::Run { config, .. } = config::start::<PrimaryConfig>(arguments, []) else { panic!("refused") };
    let engine = Memory::new(settled);
    let telemetry = Telemetry::new("primary");
    let shutdown = CancellationToken::new();
    let metrics = Metrics::new(&telemetry);
    let services = services(engine.clone(), &config.limits, &metrics, shutdown.clone()).await;
    let listener = serve::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let limits = ServeLimits::default();
    let server = tokio::spawn(serve::serve(listener, Protocol::Grpc, None, limits, services.router, shutdown.clone()));
    Served { engine, telemetry, health: services.health, shutdown, address, server }
}

impl Served {
    async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    /// Clients, and a volume `v` of 1 MiB.
    async fn clients(&self) -> (BlockServiceClient<Channel>, VolumeServiceClient<Channel>) {
        let channel = self.channel().await;
        let mut volumes = VolumeServiceClient::new(channel.clone());
        volumes.create_volume(create("v")).await.unwrap();
        (BlockServiceClient::new(channel), volumes)
    }
}

fn create(name: &str) -> v1::CreateVolumeRequest {
    v1::CreateVolumeRequest { name: name.into(), size_bytes: 1 << 20, ..Default::default() }
}

fn write(offset_bytes: u64, data: &'static [u8]) -> v1::WriteBlockRequest {
    let data = Bytes::from_static(data);
    let crc32c = Some(understudy_common::checksum::crc32c(&data));
    v1::WriteBlockRequest { volume: "v".into(), offset_bytes, data, crc32c, ..Default::default() }
}

fn all(tag: u64, offset_bytes: u64, data: &'static [u8]) -> v1::WriteBlocksRequest {
    v1::WriteBlocksRequest { tag, write: Some(write(offset_bytes, data)) }
}

#[tokio::test]
async fn what_was_written_is_read() {
    let served = serve(u64::MAX).await;
    let (mut blocks, _) = served.clients().await;
    let answer = blocks.write_block(write(5, b"hello")).await.unwrap().into_inner();
    assert_eq!(answer.position, Some(v1::Position { generation: 1, lsn: 1 }));
    assert_eq!(answer.durability(), v1::Durability::Local);
    let read = v1::ReadBlockRequest { volume_id: 1, offset_bytes: 4, length_bytes: 7, ..Default::default() };
    let read = blocks.read_block(read).await.unwrap().into_inner();
    assert_eq!(read.data.as_ref(), b"\0hello\0");
    assert_eq!(read.crc32c, understudy_common::checksum::crc32c(b"\0hello\0"));

    let request = v1::ReadBlocksRequest { volume: "v".into(), chunk_bytes: 4096, ..Default::default() };
    let pieces: Vec<_> = blocks.read_blocks(request).await.unwrap().into_inner().collect().await;
    let mut next = 0;
    for piece in pieces {
        let piece = piece.unwrap();
        assert_eq!(piece.offset_bytes, next);
        next += match piece.content.unwrap() {
            Content::Data(data) => data.len() as u64,
            Content::ZeroBytes(bytes) => bytes,
        };
    }
    assert_eq!(next, 1 << 20);

    let zeroes = v1::WriteZeroesRequest { volume: "v".into(), offset_bytes: 5, length_bytes: 1, ..Default::default() };
    blocks.write_zeroes(zeroes).await.unwrap();
    let flush = blocks.flush(v1::FlushRequest { volume: "v".into(), volume_id: 0 }).await.unwrap().into_inner();
    assert_eq!(flush.position.unwrap().lsn, 2);
    let text = served.telemetry.encode();
    assert!(text.contains("understudy_writes_total 2\n"), "{text}");
    assert!(text.contains("understudy_write_bytes_total 6\n"), "{text}");
    let line =
        "understudy_grpc_requests_total{code=\"OK\",method=\"WriteBlock\",service=\"understudy.v1.BlockService\"} 1";
    assert!(text.contains(line), "{text}");
}

#[tokio::test]
async fn each_refusal_has_its_code_and_its_reason() {
    let served = serve(u64::MAX).await;
    let (mut blocks, mut volumes) = served.clients().await;
    let mut refused = async |request: v1::WriteBlockRequest| {
        let status = blocks.write_block(request).await.unwrap_err();
        (status.code(), status.message().to_owned())
    };
    for (request, code, part) in [
        (write(1 << 20, b"x"), Code::OutOfRange, "1048576 bytes"),
        (write(u64::MAX, b"x"), Code::OutOfRange, "18446744073709551615"),
        (write(0, b""), Code::InvalidArgument, "data: is empty"),
        (v1::WriteBlockRequest { volume: "w".into(), ..write(0, b"x") }, Code::NotFound, "volume w does not exist"),
        (v1::WriteBlockRequest { volume: String::new(), ..write(0, b"x") }, Code::InvalidArgument, "set volume_id"),
        (v1::WriteBlockRequest { crc32c: Some(1), ..write(0, b"x") }, Code::InvalidArgument, "0x00000001"),
        (v1::WriteBlockRequest { sequence: 1, ..write(0, b"x") }, Code::InvalidArgument, "client_id: is empty"),
        (
            v1::WriteBlockRequest { client_id: "c".repeat(65), sequence: 1, ..write(0, b"x") },
            Code::InvalidArgument,
            "may have 64",
        ),
        (
            v1::WriteBlockRequest { data: vec![1; (1 << 20) + 1].into(), crc32c: None, ..write(0, b"") },
            Code::ResourceExhausted,
            "limit of 1048576 (limits.message)",
        ),
        (write(0, b"thirteen byte"), Code::ResourceExhausted, "limits.in_flight"),
    ] {
        let (found, message) = refused(request).await;
        assert_eq!(found, code, "{message}");
        assert!(message.contains(part), "{part} is not in {message}");
    }
    let status = volumes.create_volume(create("v")).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    let shrink = v1::ResizeVolumeRequest { volume: "v".into(), size_bytes: 4096, ..Default::default() };
    assert_eq!(volumes.resize_volume(shrink).await.unwrap_err().code(), Code::FailedPrecondition);
    let rule = v1::SetAckRuleRequest { volume: "v".into(), ack: 9, ..Default::default() };
    assert_eq!(volumes.set_ack_rule(rule).await.unwrap_err().code(), Code::InvalidArgument);
    let read =
        v1::ReadBlocksRequest { volume: "v".into(), offset_bytes: 1, length_bytes: 1 << 20, ..Default::default() };
    assert_eq!(blocks.read_blocks(read).await.unwrap_err().code(), Code::OutOfRange);
}

#[tokio::test]
async fn a_repeated_sequence_is_told_apart() {
    let served = serve(u64::MAX).await;
    let (mut blocks, _) = served.clients().await;
    let request = v1::WriteBlockRequest { client_id: "c".into(), sequence: 1, ..write(0, b"x") };
    assert!(!blocks.write_block(request.clone()).await.unwrap().into_inner().duplicate);
    assert!(blocks.write_block(request).await.unwrap().into_inner().duplicate);
}

#[tokio::test]
async fn a_stream_answers_in_order_and_in_batches() {
    let served = serve(0).await;
    let (mut blocks, _) = served.clients().await;
    let (sender, receiver) = mpsc::channel(16);
    let mut answers = blocks.write_blocks(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    for tag in 0..6 {
        // One is refused; the stream goes on.
        let offset = if tag == 3 { 1 << 20 } else { tag * 100 };
        sender.send(all(tag, offset, b"data")).await.unwrap();
    }
    // Nothing is durable, so nothing is answered, until the engine has seen all five.
    while served.engine.0.state.lock().lsn < 5 {
        tokio::task::yield_now().await;
    }
    let early = std::future::poll_fn(|context| match std::pin::Pin::new(&mut answers).poll_next(context) {
        Poll::Ready(_) => Poll::Ready(true),
        Poll::Pending => Poll::Ready(false),
    });
    assert!(!early.await, "acknowledged before it was durable");
    served.engine.0.settled.send_replace(5);

    let mut results = Vec::new();
    let mut messages = 0;
    while results.len() < 6 {
        results.extend(answers.next().await.unwrap().unwrap().results);
        messages += 1;
    }
    assert!(messages < 6, "{messages} messages for six results");
    assert_eq!(results.iter().map(|result| result.tag).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    for result in results {
        match (result.tag, result.outcome.unwrap()) {
            (3, Outcome::Error(error)) => assert_eq!(error.code, i32::from(Code::OutOfRange)),
            (3, Outcome::Written(_)) => panic!("written behind the end"),
            (_, Outcome::Written(_)) => {}
            (tag, Outcome::Error(error)) => panic!("{tag}: {error:?}"),
        }
    }
    assert_eq!(served.engine.0.state.lock().order, [0, 100, 200, 400, 500]);
    drop(sender);
    assert!(answers.next().await.is_none(), "the end of the requests is the end of the answers");
}

#[tokio::test]
async fn at_shutdown_streams_answer_what_was_submitted_and_end() {
    let served = serve(0).await;
    let (mut blocks, _) = served.clients().await;
    let (sender, receiver) = mpsc::channel(16);
    let mut answers = blocks.write_blocks(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    let watch = v1::WatchEventsRequest { after: 0 };
    let mut events =
        ReplicationServiceClient::new(served.channel().await).watch_events(watch).await.unwrap().into_inner();
    assert_eq!(events.next().await.unwrap().unwrap().kind, "state");
    let check = HealthCheckRequest { service: String::new() };
    let mut health = HealthClient::new(served.channel().await).watch(check).await.unwrap().into_inner();
    health.next().await.unwrap().unwrap();
    sender.send(all(1, 0, b"data")).await.unwrap();
    while served.engine.0.state.lock().lsn < 1 {
        tokio::task::yield_now().await;
    }
    served.shutdown.cancel();
    served.engine.0.settled.send_replace(1);
    assert_eq!(answers.next().await.unwrap().unwrap().results[0].tag, 1);
    let end = answers.next().await.unwrap().unwrap_err();
    assert_eq!(end.code(), Code::Unavailable);
    assert!(end.message().contains("draining"), "{end}");
    assert_eq!(events.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
    assert_eq!(health.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
    assert_eq!(served.server.await.unwrap(), 0, "nothing had to be dropped");
}

#[tokio::test]
async fn volumes_groups_and_pool_are_listed() {
    let served = serve(u64::MAX).await;
    let (_, mut volumes) = served.clients().await;
    let both = v1::CreateVolumeRequest { group: "g".into(), ack: v1::AckRule::Both.into(), ..create("w") };
    let made = volumes.create_volume(both).await.unwrap().into_inner();
    assert_eq!((made.ack(), made.away(), made.block_bytes), (v1::AckRule::Both, v1::AwayRule::Degrade, 4096));
    let grow = v1::ResizeVolumeRequest { volume_id: made.id, size_bytes: 2 << 20, ..Default::default() };
    assert_eq!(volumes.resize_volume(grow).await.unwrap().into_inner().size_bytes, 2 << 20);
    let listed = volumes.list_volumes(v1::ListVolumesRequest {}).await.unwrap().into_inner().volumes;
    assert_eq!(listed.iter().map(|volume| volume.name.as_str()).collect::<Vec<_>>(), ["v", "w"]);
    let groups = volumes.list_groups(v1::ListGroupsRequest {}).await.unwrap().into_inner().groups;
    assert_eq!(groups[1], v1::Group { id: 2, name: "g".into(), volumes: vec!["w".into()] });
    let pool = volumes.get_pool(v1::GetPoolRequest {}).await.unwrap().into_inner();
    assert_eq!((pool.free_bytes, pool.devices.len()), (4, 1));
    let delete = v1::DeleteVolumeRequest { volume: "w".into(), ..Default::default() };
    volumes.delete_volume(delete).await.unwrap();
    let get = v1::GetVolumeRequest { volume: "w".into(), ..Default::default() };
    assert_eq!(volumes.get_volume(get).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn the_policy_is_changed_as_a_whole_or_not_at_all() {
    let served = serve(u64::MAX).await;
    let mut client = ReplicationServiceClient::new(served.channel().await);
    let request = |settings: &[(&str, &str)], validate_only| v1::SetPolicyRequest {
        settings: settings.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect(),
        validate_only,
    };
    let before = client.get_policy(v1::GetPolicyRequest {}).await.unwrap().into_inner();
    assert_eq!((before.settings["policy.fill_enter"].as_str(), before.changed.len()), ("0.9", 0));

    let checked = client.set_policy(request(&[("fill_enter", "0.8")], true)).await.unwrap().into_inner();
    assert_eq!(checked.changed, ["policy.fill_enter"]);
    assert_eq!(client.get_policy(v1::GetPolicyRequest {}).await.unwrap().into_inner(), before);
    let set = client.set_policy(request(&[("fill_enter", "0.8"), ("delta.schedule", "idle")], false)).await.unwrap();
    assert_eq!(set.get_ref().changed, ["delta.schedule", "policy.fill_enter"]);
    assert_eq!(client.get_policy(v1::GetPolicyRequest {}).await.unwrap().into_inner(), set.into_inner());

    for (settings, parts) in [
        (&[][..], &["is empty"][..]),
        (
            &[("fill_entre", "0.8"), ("dwell", "0"), ("fill_leave", "0.95")],
            &["fill_entre", "policy.dwell", "fill_leave"],
        ),
        (&[("link.timeout", "1s")], &["read at start"]),
    ] {
        let status = client.set_policy(request(settings, false)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(parts.iter().all(|part| status.message().contains(part)), "{status}");
    }
    assert_eq!(client.get_policy(v1::GetPolicyRequest {}).await.unwrap().into_inner().changed.len(), 2);
}

#[tokio::test]
async fn modes_and_runs_are_asked_for_by_group() {
    let served = serve(u64::MAX).await;
    served.clients().await;
    let mut client = ReplicationServiceClient::new(served.channel().await);
    let mode = |group: &str, mode| v1::SetModeRequest { group: group.into(), mode };
    let set = client.set_mode(mode("v", v1::Mode::Delta.into())).await.unwrap().into_inner();
    assert_eq!((set.group.as_str(), set.mode()), ("v", v1::Mode::Delta));
    assert_eq!(client.set_mode(mode("v", 0)).await.unwrap().into_inner().mode(), v1::Mode::Continuous);
    for (request, code, part) in [
        (mode("v", v1::Mode::Continuous.into()), Code::InvalidArgument, "cannot be forced"),
        (mode("v", 9), Code::InvalidArgument, "is no mode"),
        (mode("", 2), Code::InvalidArgument, "names no group"),
        (mode("w", 2), Code::NotFound, "group w does not exist"),
    ] {
        let status = client.set_mode(request).await.unwrap_err();
        assert_eq!(status.code(), code);
        assert!(status.message().contains(part), "{status}");
    }
    let start = client.start_delta(v1::StartDeltaRequest { group: "v".into() }).await.unwrap_err();
    assert_eq!(start.code(), Code::FailedPrecondition);
    assert!(start.message().contains("group v is in phase streaming"), "{start}");
    let abort = v1::AbortRunRequest { group: "v".into() };
    assert_eq!(client.abort_delta(abort).await.unwrap().into_inner().group, "v");
    for (group, limit, shown) in [("", 0, 20), ("v", 3, 3), ("v", 5000, 1000)] {
        let request = v1::ExplainRequest { group: group.into(), limit };
        let groups = client.explain(request).await.unwrap().into_inner().groups;
        assert_eq!((groups.len(), groups[0].decisions.len()), (1, shown));
    }
}

#[tokio::test]
async fn health_follows_readiness() {
    let served = serve(u64::MAX).await;
    let mut client = HealthClient::new(served.channel().await);
    for (serving, expected) in [(None, 2), (Some(true), 1), (Some(false), 2)] {
        if let Some(serving) = serving {
            served.health.set(serving).await;
        }
        for service in ["", "understudy.v1.BlockService"] {
            let check = HealthCheckRequest { service: service.into() };
            assert_eq!(client.check(check).await.unwrap().into_inner().status, expected);
        }
    }
}

#[tokio::test]
async fn reflection_lists_our_services_and_health_in_both_versions() {
    use tonic_reflection::pb::{v1 as new, v1alpha as old};
    let served = serve(u64::MAX).await;
    let services = ["grpc.health.v1.Health", "understudy.v1.BlockService", "understudy.v1.VolumeService"];

    let request = new::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(new::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mut client = new::server_reflection_client::ServerReflectionClient::new(served.channel().await);
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
    let new::server_reflection_response::MessageResponse::ListServicesResponse(list) = answer else {
        panic!("no list")
    };
    for service in services {
        assert!(list.service.iter().any(|found| found.name == service), "{service}");
    }

    let request = old::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(old::server_reflection_request::MessageRequest::FileContainingSymbol(
            "grpc.health.v1.Health".into(),
        )),
    };
    let mut client = old::server_reflection_client::ServerReflectionClient::new(served.channel().await);
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
    assert!(matches!(answer, old::server_reflection_response::MessageResponse::FileDescriptorResponse(_)));
}

#[tokio::test]
async fn changes_of_role_pass_through_and_another_primary_is_told() {
    let served = serve(u64::MAX).await;
    let mut client = ReplicationServiceClient::new(served.channel().await);
    let drain = v1::DemoteRequest { drain: true, ..Default::default() };
    assert_eq!(client.demote(drain).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(client.demote(v1::DemoteRequest::default()).await.unwrap().into_inner().generation, 4);
    assert_eq!(client.renew_lease(v1::RenewLeaseRequest { generation: 4 }).await.unwrap().into_inner().remaining_ms, 5);
    let refused = client.renew_lease(v1::RenewLeaseRequest { generation: 3 }).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let mut replica = v1::replica_service_client::ReplicaServiceClient::new(served.channel().await);
    let attach = v1::AttachRequest { generation: 3, ..Default::default() };
    let told = replica.attach(attach).await.unwrap_err();
    assert_eq!((told.code(), told.message()), (Code::FailedPrecondition, "generation 3 is over"));
    assert_eq!(replica.heartbeat(v1::HeartbeatRequest::default()).await.unwrap_err().code(), Code::FailedPrecondition);
}
