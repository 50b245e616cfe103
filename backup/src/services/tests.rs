//! The services over a real loopback socket, with a node in memory.

use crate::receiver::AttachRefusal;
use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use understudy_common::{
    config::{self, BackupConfig, Start},
    delta::BlockSet,
    process::Failure,
    serve::{self, Protocol, ServeLimits},
    telemetry::Telemetry,
    types::{Lsn, Position, Uid, VolumeId},
};
use understudy_proto::v1::{
    self, backup_service_client::BackupServiceClient, read_image_response::Content,
    replica_service_client::ReplicaServiceClient,
};

use super::*;
use crate::api::*;

const SESSION: Bytes = Bytes::from_static(&[7; 16]);

/// Takes records of session [`SESSION`] in dense order; they are durable when a test says so.
#[derive(Clone)]
struct Memory(Arc<Inner>);

struct Inner {
    received: watch::Sender<u64>,
    durable: watch::Sender<u64>,
    events: Mutex<Vec<mpsc::Sender<v1::Event>>>,
}

struct Image;

impl ReplicaNode for Memory {
    type Image = Image;

    async fn attach(&self, request: v1::AttachRequest) -> Result<v1::AttachResponse, NodeError> {
        if request.protocol != 1 {
            return Err(AttachRefusal::Protocol { theirs: request.protocol }.into());
        }
        Ok(v1::AttachResponse { session: SESSION, ..Default::default() })
    }

    async fn receive(&self, records: Vec<v1::StagedRecord>) -> Result<(), NodeError> {
        for record in records {
            let expected = *self.0.received.borrow() + 1;
            if record.ship != expected {
                return Err(NodeError::Frame { why: format!("{} came where {expected} was next", record.ship) });
            }
            self.0.received.send_replace(record.ship);
        }
        Ok(())
    }

    async fn acknowledged(&self, session: Uid, after: u64) -> Result<v1::StagedAck, NodeError> {
        if session.0 != [7; 16] {
            return Err(NodeError::OldSession { session });
        }
        let ship = *self.0.durable.subscribe().wait_for(|durable| *durable > after).await.unwrap();
        Ok(v1::StagedAck { session: SESSION, ship, refusals: vec![] })
    }

    async fn heartbeat(&self, request: v1::HeartbeatRequest) -> Result<v1::HeartbeatResponse, NodeError> {
        let durable_ship = *self.0.durable.borrow();
        Ok(v1::HeartbeatResponse { session: request.session, durable_ship, ..Default::default() })
    }

    async fn begin_run(&self, request: v1::BeginRunRequest) -> Result<v1::BeginRunResponse, NodeError> {
        Ok(v1::BeginRunResponse { session: request.session, opening: 1, ..Default::default() })
    }

    async fn take_batch(&self, batch: v1::DeltaBatchRequest) -> Result<When<v1::DeltaBatchResponse>, NodeError> {
        if batch.opening != 1 {
            return Err(NodeError::Run { why: format!("opening {} is over", batch.opening) });
        }
        let answer = v1::DeltaBatchResponse { run: batch.run, number: batch.number, ..Default::default() };
        Ok(When { at: Lsn(batch.number), answer })
    }

    async fn durable(&self, lsn: Lsn) -> Result<(), NodeError> {
        self.0.durable.subscribe().wait_for(|durable| *durable >= lsn.0).await.unwrap();
        Ok(())
    }

    async fn digest(&self, request: v1::DigestRequest) -> Result<v1::DigestResponse, NodeError> {
        Ok(v1::DigestResponse { session: request.session, same: vec![true; request.pieces.len()], crc32c: 0 })
    }

    async fn commit_run(&self, request: v1::CommitDeltaRequest) -> Result<v1::CommitDeltaResponse, NodeError> {
        Ok(v1::CommitDeltaResponse { session: request.session, ..Default::default() })
    }

    async fn abort_run(&self, request: v1::AbortDeltaRequest) -> Result<v1::AbortDeltaResponse, NodeError> {
        Ok(v1::AbortDeltaResponse { session: request.session, committed: false })
    }

    async fn end_verify(&self, request: v1::EndVerifyRequest) -> Result<v1::EndVerifyResponse, NodeError> {
        Ok(v1::EndVerifyResponse { session: request.session })
    }

    async fn scrub(&self, request: v1::ReplicaScrubRequest) -> Result<v1::ReplicaScrubResponse, NodeError> {
        let status = v1::ScrubStatus { running: request.start, volume_id: request.volume_id, ..Default::default() };
        let session = request.session;
        Ok(v1::ReplicaScrubResponse { session, status: Some(status), damaged: Vec::new() })
    }

    async fn fetch_block(&self, request: v1::FetchBlockRequest) -> Result<v1::FetchBlockResponse, NodeError> {
        Err(NodeError::Damaged { volume: request.volume_id.to_string(), block: request.block })
    }

    async fn mend_block(&self, request: v1::MendBlockRequest) -> Result<v1::MendBlockResponse, NodeError> {
        Ok(v1::MendBlockResponse { session: request.session, mended: false })
    }

    async fn snapshots(&self, _: Option<&str>) -> Result<Vec<v1::SnapshotInfo>, NodeError> {
        Ok(Vec::new())
    }

    async fn divergence(&self, _: v1::GetDivergenceRequest) -> Result<BTreeMap<VolumeId, BlockSet>, NodeError> {
        let mut blocks = BlockSet::new();
        (0..40_000).for_each(|n| blocks.insert_range(3 * n, 2));
        Ok(BTreeMap::from([(VolumeId(7), blocks)]))
    }

    async fn promote(&self, request: v1::PromoteRequest) -> Result<v1::PromoteResponse, NodeError> {
        match request.force {
            true => Ok(v1::PromoteResponse { generation: request.expected_generation + 1, ..Default::default() }),
            false => Err(NodeError::PrimaryServes { why: "attached".into(), bytes_at_risk: 9, heard_seconds: 1 }),
        }
    }

    async fn resolve(&self) -> Result<v1::ResolveSplitBrainResponse, NodeError> {
        Ok(v1::ResolveSplitBrainResponse { generation: 3 })
    }

    async fn make_clone(&self, request: v1::CloneImageRequest) -> Result<v1::CloneInfo, NodeError> {
        Ok(v1::CloneInfo { name: request.name, ..Default::default() })
    }

    fn clones(&self) -> Vec<v1::CloneInfo> {
        Vec::new()
    }

    async fn delete_clone(&self, name: &str) -> Result<(), NodeError> {
        Err(NodeError::NoClone { name: name.into() })
    }

    fn clone_volumes(&self) -> Vec<v1::Volume> {
        Vec::new()
    }

    fn clone_volume(&self, volume: &VolumeKey) -> Result<v1::Volume, NodeError> {
        Err(NodeError::NotAClone { volume: volume.to_string() })
    }

    async fn write_clone(&self, request: CloneWrite) -> Result<v1::WriteBlockResponse, NodeError> {
        Err(NodeError::NotAClone { volume: request.volume.to_string() })
    }

    async fn read_clone(&self, volume: &VolumeKey, _: u64, _: u64) -> Result<(Bytes, u32), NodeError> {
        Err(NodeError::NotAClone { volume: volume.to_string() })
    }

    async fn read_clone_piece(
        &self,
        volume: &VolumeKey,
        _: u64,
        _: u64,
    ) -> Result<(PieceContent, Position), NodeError> {
        Err(NodeError::NotAClone { volume: volume.to_string() })
    }

    async fn open_image(&self, volume: &VolumeKey, _: Option<&str>) -> Result<Image, NodeError> {
        match volume {
            VolumeKey::Name(name) if name == "v" => Ok(Image),
            other => Err(NodeError::NoVolume { volume: other.to_string() }),
        }
    }

    fn pool(&self) -> v1::Pool {
        v1::Pool::default()
    }

    async fn add_device(&self, request: v1::AddDeviceRequest) -> Result<v1::PoolDevice, NodeError> {
        Ok(v1::PoolDevice { path: request.path, size_bytes: request.size_bytes, ..Default::default() })
    }

    async fn drain_device(&self, request: v1::DrainDeviceRequest) -> Result<v1::PoolDevice, NodeError> {
        Err(NodeError::Pool { code: tonic::Code::NotFound, why: request.path })
    }

    fn list_segments(&self, _: v1::ListSegmentsRequest) -> Result<v1::ListSegmentsResponse, NodeError> {
        Ok(v1::ListSegmentsResponse::default())
    }

    fn image_info(&self, _: &Image) -> ImageInfo {
        ImageInfo { volume: "v".into(), size_bytes: 10_000, position: Position { generation: 1, lsn: Lsn(5) } }
    }

    async fn read_piece(&self, _: &Image, offset_bytes: u64, max_bytes: u64) -> Result<PieceContent, NodeError> {
        if offset_bytes >= 8192 {
            return Ok(PieceContent::Zeros(1 << 20));
        }
        let data = Bytes::from(vec![1; usize::try_from(max_bytes.min(8192 - offset_bytes)).unwrap()]);
        let crc32c = understudy_common::checksum::crc32c(&data);
        Ok(PieceContent::Data { data, crc32c })
    }

    fn status(&self) -> v1::Status {
        v1::Status { role: "backup".into(), ..Default::default() }
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
    node: Memory,
    shutdown: CancellationToken,
    address: SocketAddr,
    server: tokio::task::JoinHandle<usize>,
}

async fn serve(audience: Audience) -> Served {
    let arguments = ["b", "--data-dir", "/d", "--limits-message", "1MiB"].map(Into::into);
    let Start::Run { config, .. } = config::start::<BackupConfig>(arguments, []) else { panic!("refused") };
    let (received, durable) = (watch::channel(0).0, watch::channel(0).0);
    let node = Memory(Arc::new(Inner { received, durable, events: Mutex::default() }));
    let shutdown = CancellationToken::new();
    let metrics = Metrics::new(&Telemetry::new("backup"));
    let services = services(node.clone(), audience, &config.limits, &metrics, shutdown.clone()).await;
    services.health.set(true).await;
    let listener = serve::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let limits = ServeLimits::default();
    let server = tokio::spawn(serve::serve(listener, Protocol::Grpc, None, limits, services.router, shutdown.clone()));
    Served { node, shutdown, address, server }
}

impl Served {
    async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    async fn exchange(
        &self,
    ) -> (mpsc::Sender<v1::StagedRecord>, impl StreamExt<Item = Result<v1::StagedAck, Status>> + Unpin + use<>) {
        let (sender, receiver) = mpsc::channel(16);
        let mut client = ReplicaServiceClient::new(self.channel().await);
        // Answered before the first record: a primary without writes holds a session too.
        let acks = client.write_block(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        (sender, acks)
    }
}

fn record(ship: u64) -> v1::StagedRecord {
    v1::StagedRecord { session: SESSION, ship, ..Default::default() }
}

#[tokio::test]
async fn records_are_acknowledged_when_they_are_durable() {
    let served = serve(Audience::All).await;
    let (records, mut acks) = served.exchange().await;
    for ship in 1..=3 {
        records.send(record(ship)).await.unwrap();
    }
    served.node.0.received.subscribe().wait_for(|received| *received == 3).await.unwrap();
    served.node.0.durable.send_replace(2);
    assert_eq!(acks.next().await.unwrap().unwrap().ship, 2);
    // The primary ends the stream; the rest is acknowledged before the stream ends.
    drop(records);
    served.node.0.durable.send_replace(3);
    assert_eq!(acks.next().await.unwrap().unwrap().ship, 3);
    assert!(acks.next().await.is_none());
}

#[tokio::test]
async fn a_refused_record_ends_the_stream_with_the_reason() {
    for (record, code, part) in [
        (record(2), Code::Aborted, "2 came where 1 was next"),
        (v1::StagedRecord { session: Bytes::from_static(b"short"), ..record(1) }, Code::InvalidArgument, "session"),
        (v1::StagedRecord { session: Bytes::from_static(&[8; 16]), ..record(1) }, Code::Aborted, "attach again"),
    ] {
        let served = serve(Audience::Primary).await;
        let (records, mut acks) = served.exchange().await;
        records.send(record).await.unwrap();
        let status = acks.next().await.unwrap().unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(part), "{status}");
    }
}

#[tokio::test]
async fn a_stream_without_records_ends_with_its_primary() {
    let served = serve(Audience::Primary).await;
    let (records, mut acks) = served.exchange().await;
    drop(records);
    assert!(acks.next().await.is_none());
}

#[tokio::test]
async fn streams_end_at_shutdown() {
    let served = serve(Audience::All).await;
    let (records, mut acks) = served.exchange().await;
    records.send(record(1)).await.unwrap();
    served.node.0.received.subscribe().wait_for(|received| *received == 1).await.unwrap();
    let mut client = BackupServiceClient::new(served.channel().await);
    let mut events = client.watch_events(v1::WatchEventsRequest { after: 3 }).await.unwrap().into_inner();
    assert_eq!(events.next().await.unwrap().unwrap().number, 3);
    served.shutdown.cancel();
    assert_eq!(acks.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
    assert_eq!(events.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
    assert_eq!(served.server.await.unwrap(), 0, "nothing had to be dropped");
}

#[tokio::test]
async fn an_image_is_read_in_pieces_of_one_position() {
    let served = serve(Audience::Operators).await;
    let mut client = BackupServiceClient::new(served.channel().await);
    let request =
        v1::ReadImageRequest { volume: "v".into(), offset_bytes: 100, chunk_bytes: 4096, ..Default::default() };
    let mut pieces = client.read_blocks(request.clone()).await.unwrap().into_inner();
    let mut next = 100;
    while let Some(piece) = pieces.next().await {
        let piece = piece.unwrap();
        assert_eq!((piece.offset_bytes, piece.volume_size_bytes), (next, 10_000));
        assert_eq!(piece.position, Some(v1::Position { generation: 1, lsn: 5 }));
        next += match piece.content.unwrap() {
            Content::Data(data) => data.len() as u64,
            Content::ZeroBytes(bytes) => bytes,
        };
    }
    assert_eq!(next, 10_000);
    for (request, code) in [
        (v1::ReadImageRequest { offset_bytes: 10_001, ..request.clone() }, Code::OutOfRange),
        (v1::ReadImageRequest { length_bytes: 9_901, ..request.clone() }, Code::OutOfRange),
        (v1::ReadImageRequest { volume: "w".into(), ..request.clone() }, Code::NotFound),
        (v1::ReadImageRequest { volume: String::new(), ..request.clone() }, Code::InvalidArgument),
        (v1::ReadImageRequest { chunk_bytes: 2 << 20, ..request }, Code::ResourceExhausted),
    ] {
        assert_eq!(client.read_blocks(request).await.unwrap_err().code(), code);
    }
}

#[tokio::test]
async fn each_listener_serves_its_audience_alone() {
    for (audience, backup, replica) in
        [(Audience::Operators, true, false), (Audience::Primary, false, true), (Audience::All, true, true)]
    {
        let served = serve(audience).await;
        let channel = served.channel().await;
        let attach = v1::AttachRequest { protocol: 1, ..Default::default() };
        let attached = ReplicaServiceClient::new(channel.clone()).attach(attach).await;
        let status = BackupServiceClient::new(channel.clone()).get_status(v1::GetStatusRequest {}).await;
        assert_eq!(attached.is_ok(), replica, "{audience:?}");
        assert_eq!(status.is_ok(), backup, "{audience:?}");
        if let Err(refused) = attached {
            assert_eq!(refused.code(), Code::Unimplemented);
        }
        for (name, there) in [("understudy.v1.BackupService", backup), ("understudy.v1.ReplicaService", replica)] {
            let check = HealthCheckRequest { service: name.into() };
            assert_eq!(HealthClient::new(channel.clone()).check(check).await.is_ok(), there, "{audience:?} {name}");
        }
    }
}

#[tokio::test]
async fn attach_and_heartbeat_pass_through() {
    let served = serve(Audience::Primary).await;
    let mut client = ReplicaServiceClient::new(served.channel().await);
    let status = client.attach(v1::AttachRequest { protocol: 9, ..Default::default() }).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("protocol 9"), "{status}");
    served.node.0.durable.send_replace(4);
    let beat = v1::HeartbeatRequest { session: SESSION, ..Default::default() };
    assert_eq!(client.heartbeat(beat).await.unwrap().into_inner().durable_ship, 4);
}

#[tokio::test]
async fn a_divergence_comes_in_messages_and_a_promotion_passes_through() {
    let served = serve(Audience::All).await;
    let mut client = ReplicaServiceClient::new(served.channel().await);
    let mut messages = client.get_divergence(v1::GetDivergenceRequest::default()).await.unwrap().into_inner();
    let (mut count, mut next) = (0, 0);
    while let Some(message) = messages.next().await {
        let v1::DivergedRanges { volume_id, ranges } = message.unwrap();
        assert!(volume_id == 7 && !ranges.is_empty());
        for range in ranges.chunks_exact(2) {
            assert_eq!(range, [next, 2]);
            next += 3;
        }
        count += 1;
    }
    assert_eq!((next, count), (120_000, 3));
    let mut client = BackupServiceClient::new(served.channel().await);
    let refused = client.promote(v1::PromoteRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("9 bytes that it acknowledged are not here"), "{refused}");
    let forced = v1::PromoteRequest { expected_generation: 4, force: true, ..Default::default() };
    assert_eq!(client.promote(forced).await.unwrap().into_inner().generation, 5);
}
