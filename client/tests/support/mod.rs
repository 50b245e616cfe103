//! An in-process primary with one volume in memory, and a link in front of it that can be cut.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, Streaming};
use understudy_client::proto::block_service_server::{BlockService, BlockServiceServer};
use understudy_client::proto::volume_service_server::{VolumeService, VolumeServiceServer};
use understudy_client::proto::*;

/// What happens to the next write that arrives.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// Served as it should be.
    None,
    /// The connection breaks before the write is applied.
    CutBefore,
    /// The connection breaks after the write is applied, before its answer.
    CutAfter,
    /// The RPC ends with this status before the write is applied.
    Status(Code),
    /// The write itself is refused.
    Refuse(Code),
    /// Nothing is answered any more on this stream.
    Silence,
    /// The answer names another write.
    WrongTag,
}

#[derive(Debug, Default)]
pub struct State {
    pub image: Vec<u8>,
    /// One for each write that arrives; then none.
    pub faults: VecDeque<Fault>,
    /// (client, sequence) in the order applied.
    pub applied: Vec<(String, u64)>,
    pub arrived: usize,
    pub duplicates: usize,
    pub creates: usize,
    pub bad_read_crc: bool,
    /// Reads end with UNAVAILABLE after so many chunks, once.
    pub cut_read_after: Option<usize>,
    seen: HashMap<String, HashSet<u64>>,
    cut: Option<Arc<Link>>,
}

/// The primary behind its link.
pub struct Fake {
    pub state: Arc<Mutex<State>>,
    pub link: Arc<Link>,
}

impl Fake {
    pub async fn start(size: usize) -> Self {
        let state = Arc::new(Mutex::new(State { image: vec![0; size], ..State::default() }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = Service(state.clone());
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(BlockServiceServer::new(service.clone()))
                .add_service(VolumeServiceServer::new(service))
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        let link = Link::start(address).await;
        state.lock().unwrap().cut = Some(link.clone());
        Self { state, link }
    }

    pub fn faults(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.lock().unwrap().faults = faults.into_iter().collect();
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.link.address)
    }
}

/// A TCP relay.
#[derive(Debug)]
pub struct Link {
    pub address: SocketAddr,
    target: SocketAddr,
    relays: Mutex<JoinSet<()>>,
    accept: Mutex<Option<JoinHandle<()>>>,
}

impl Link {
    async fn start(target: SocketAddr) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let link = Arc::new(Self { address, target, relays: Mutex::default(), accept: Mutex::default() });
        link.listen(listener);
        link
    }

    fn listen(self: &Arc<Self>, listener: TcpListener) {
        let link = self.clone();
        let accept = tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let target = link.target;
                link.relays.lock().unwrap().spawn(async move {
                    let Ok(mut far) = TcpStream::connect(target).await else { return };
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
        *self.accept.lock().unwrap() = Some(accept);
    }

    /// Breaks every connection; new ones are accepted.
    pub fn cut(&self) {
        self.relays.lock().unwrap().abort_all();
    }

    /// Breaks every connection; new ones are refused.
    pub async fn down(&self) {
        let accept = self.accept.lock().unwrap().take();
        if let Some(accept) = accept {
            accept.abort();
            let _ = accept.await;
        }
        self.cut();
    }

    /// Accepts again.
    pub async fn up(self: &Arc<Self>) {
        self.listen(TcpListener::bind(self.address).await.unwrap());
    }
}

#[derive(Clone)]
struct Service(Arc<Mutex<State>>);

enum Done {
    Answer(WriteResult),
    Cut,
    End(Status),
    Silence,
}

impl Service {
    fn apply(&self, write: WriteBlockRequest) -> WriteBlockResponse {
        let state = &mut *self.0.lock().unwrap();
        assert_eq!(write.crc32c, Some(understudy_client::crc32c(&write.data)));
        assert!(write.client_id.len() <= 64 && write.sequence > 0);
        let duplicate = !state.seen.entry(write.client_id.clone()).or_default().insert(write.sequence);
        if duplicate {
            state.duplicates += 1;
        } else {
            let start = usize::try_from(write.offset_bytes).unwrap();
            state.image[start..start + write.data.len()].copy_from_slice(&write.data);
            state.applied.push((write.client_id, write.sequence));
        }
        let lsn = state.applied.len() as u64;
        WriteBlockResponse {
            position: Some(Position { generation: 1, lsn }),
            mode: Mode::Continuous.into(),
            durability: Durability::Local.into(),
            duplicate,
        }
    }

    fn fault(&self) -> Fault {
        let mut state = self.0.lock().unwrap();
        state.arrived += 1;
        state.faults.pop_front().unwrap_or(Fault::None)
    }

    fn cut(&self) {
        let link = self.0.lock().unwrap().cut.clone();
        link.expect("set at the start").cut();
    }

    fn serve(&self, request: WriteBlocksRequest) -> Done {
        let WriteBlocksRequest { tag, write: Some(write) } = request else { panic!("a request without a write") };
        let written = |tag, response| WriteResult { tag, outcome: Some(write_result::Outcome::Written(response)) };
        match self.fault() {
            Fault::None => Done::Answer(written(tag, self.apply(write))),
            Fault::WrongTag => Done::Answer(written(tag + 7, self.apply(write))),
            Fault::CutBefore => Done::Cut,
            Fault::CutAfter => {
                self.apply(write);
                Done::Cut
            }
            Fault::Status(code) => Done::End(Status::new(code, "as the test asked")),
            Fault::Silence => Done::Silence,
            Fault::Refuse(code) => Done::Answer(WriteResult {
                tag,
                outcome: Some(write_result::Outcome::Error(WriteError {
                    code: code.into(),
                    message: "as the test asked".to_owned(),
                })),
            }),
        }
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl BlockService for Service {
    async fn write_block(&self, request: Request<WriteBlockRequest>) -> Result<Response<WriteBlockResponse>, Status> {
        match self.fault() {
            Fault::None => Ok(Response::new(self.apply(request.into_inner()))),
            Fault::CutAfter => {
                self.apply(request.into_inner());
                self.cut();
                std::future::pending().await
            }
            Fault::CutBefore => {
                self.cut();
                std::future::pending().await
            }
            Fault::Status(code) | Fault::Refuse(code) => Err(Status::new(code, "as the test asked")),
            Fault::Silence | Fault::WrongTag => std::future::pending().await,
        }
    }

    type WriteBlocksStream = Answers<WriteBlocksResponse>;

    async fn write_blocks(
        &self,
        request: Request<Streaming<WriteBlocksRequest>>,
    ) -> Result<Response<Self::WriteBlocksStream>, Status> {
        let mut requests = request.into_inner();
        let service = self.clone();
        let (answers, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            while let Some(Ok(request)) = requests.next().await {
                match service.serve(request) {
                    Done::Answer(result) => {
                        let _ = answers.send(Ok(WriteBlocksResponse { results: vec![result] })).await;
                    }
                    Done::End(status) => {
                        let _ = answers.send(Err(status)).await;
                        return;
                    }
                    Done::Cut => {
                        service.cut();
                        return std::future::pending().await;
                    }
                    Done::Silence => return std::future::pending().await,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn read_block(&self, request: Request<ReadBlockRequest>) -> Result<Response<ReadBlockResponse>, Status> {
        let request = request.into_inner();
        let state = self.0.lock().unwrap();
        let start = usize::try_from(request.offset_bytes).unwrap();
        let end = start + usize::try_from(request.length_bytes).unwrap();
        let data = state.image.get(start..end).ok_or_else(|| Status::out_of_range("beyond the end"))?;
        let crc32c = understudy_client::crc32c(data) ^ u32::from(state.bad_read_crc);
        Ok(Response::new(ReadBlockResponse { data: Bytes::copy_from_slice(data), crc32c }))
    }

    type ReadBlocksStream = Answers<ReadBlocksResponse>;

    async fn read_blocks(
        &self,
        request: Request<ReadBlocksRequest>,
    ) -> Result<Response<Self::ReadBlocksStream>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let mut answers = Vec::new();
        let mut offset = usize::try_from(request.offset_bytes).unwrap();
        let end = offset + usize::try_from(request.length_bytes).unwrap();
        let cut = state.cut_read_after.take().unwrap_or(usize::MAX);
        while offset < end && answers.len() < cut {
            let data = &state.image[offset..end.min(offset + 4096)];
            let content = if data.iter().all(|b| *b == 0) {
                read_blocks_response::Content::ZeroBytes(data.len() as u64)
            } else {
                read_blocks_response::Content::Data(Bytes::copy_from_slice(data))
            };
            answers.push(Ok(ReadBlocksResponse {
                offset_bytes: offset as u64,
                content: Some(content),
                crc32c: understudy_client::crc32c(data),
                position: None,
            }));
            offset += data.len();
        }
        if offset < end {
            answers.push(Err(Status::unavailable("as the test asked")));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(answers))))
    }

    async fn flush(&self, _: Request<FlushRequest>) -> Result<Response<FlushResponse>, Status> {
        Ok(Response::new(FlushResponse { position: None, durability: Durability::Local.into() }))
    }

    async fn discard(&self, _: Request<DiscardRequest>) -> Result<Response<WriteBlockResponse>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn write_zeroes(&self, _: Request<WriteZeroesRequest>) -> Result<Response<WriteBlockResponse>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }
}

#[tonic::async_trait]
impl VolumeService for Service {
    async fn create_volume(&self, _: Request<CreateVolumeRequest>) -> Result<Response<Volume>, Status> {
        let creates = {
            let mut state = self.0.lock().unwrap();
            state.creates += 1;
            state.creates
        };
        if creates == 1 {
            self.cut();
            std::future::pending::<()>().await;
        }
        Err(Status::already_exists("created before"))
    }

    async fn get_volume(&self, request: Request<GetVolumeRequest>) -> Result<Response<Volume>, Status> {
        let size_bytes = self.0.lock().unwrap().image.len() as u64;
        match request.into_inner().volume {
            name if name == "v" => Ok(Response::new(Volume { id: 1, name, size_bytes, ..Volume::default() })),
            name => Err(Status::not_found(format!("no volume \"{name}\""))),
        }
    }

    async fn list_volumes(&self, _: Request<ListVolumesRequest>) -> Result<Response<ListVolumesResponse>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn resize_volume(&self, _: Request<ResizeVolumeRequest>) -> Result<Response<Volume>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn delete_volume(&self, _: Request<DeleteVolumeRequest>) -> Result<Response<DeleteVolumeResponse>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn set_ack_rule(&self, _: Request<SetAckRuleRequest>) -> Result<Response<Volume>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn list_groups(&self, _: Request<ListGroupsRequest>) -> Result<Response<ListGroupsResponse>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn get_pool(&self, _: Request<GetPoolRequest>) -> Result<Response<Pool>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn add_device(&self, _: Request<AddDeviceRequest>) -> Result<Response<PoolDevice>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn drain_device(&self, _: Request<DrainDeviceRequest>) -> Result<Response<PoolDevice>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn list_segments(&self, _: Request<ListSegmentsRequest>) -> Result<Response<ListSegmentsResponse>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn snapshot(&self, _: Request<SnapshotRequest>) -> Result<Response<SnapshotInfo>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn list_snapshots(
        &self,
        _: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn delete_snapshot(
        &self,
        _: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    type RestoreSnapshotStream = tokio_stream::Empty<Result<CopyProgress, Status>>;

    async fn restore_snapshot(
        &self,
        _: Request<RestoreSnapshotRequest>,
    ) -> Result<Response<Self::RestoreSnapshotStream>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    type CloneSnapshotStream = tokio_stream::Empty<Result<CopyProgress, Status>>;

    async fn clone_snapshot(
        &self,
        _: Request<CloneSnapshotRequest>,
    ) -> Result<Response<Self::CloneSnapshotStream>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    type GetChangedBlocksStream = tokio_stream::Empty<Result<ChangedBlocks, Status>>;

    async fn get_changed_blocks(
        &self,
        _: Request<GetChangedBlocksRequest>,
    ) -> Result<Response<Self::GetChangedBlocksStream>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }
}
