//! The client host: writers that repeat each write until it is acknowledged, a reader of the backup, and the end.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::Mutex;
use rand::Rng;
use rand_pcg::Pcg64Mcg;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};
use understudy_common::{checksum::crc32c, types::Lsn};
use understudy_proto::v1::{
    self, backup_service_client::BackupServiceClient, block_service_client::BlockServiceClient,
    read_blocks_response::Content, replication_service_client::ReplicationServiceClient,
    volume_service_client::VolumeServiceClient, write_result::Outcome,
};

use super::{
    hosts::connect,
    model::{BLOCK, BLOCKS, Model, PER_SEGMENT, Range, VOLUMES, fill},
};

/// A call that takes longer is given up and repeated.
const PATIENCE: Duration = Duration::from_millis(2500);
/// Writers; the last two use streams.
const WRITERS: usize = 4;
/// Blocks of each volume that a writer owns, beside the last segment.
const OWN: usize = (BLOCKS - PER_SEGMENT) / WRITERS;
/// Writes that a stream has under way.
const WINDOW: usize = 8;

type Shared = Arc<Mutex<Model>>;

/// Codes after which a write is tried again. Others say that the request is wrong, and it is not.
fn is_passing(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Internal
            | Code::ResourceExhausted
    )
}

async fn patiently<T>(call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    match timeout(PATIENCE, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded("no answer in time")),
    }
}

/// A writer with its blocks, its sequence and its connection.
struct Writer {
    id: usize,
    model: Shared,
    rng: Pcg64Mcg,
    client: Option<BlockServiceClient<Channel>>,
    sequence: u64,
}

/// A write that is repeated until it is acknowledged.
#[derive(Debug, Clone, Copy)]
struct Write {
    range: Range,
    stamp: u64,
    sequence: u64,
    tries: u32,
}

impl Write {
    fn data(&self) -> bytes::Bytes {
        let Range { volume, first, count } = self.range;
        (first..first + count).flat_map(|block| fill(self.stamp, volume, block)).collect::<Vec<u8>>().into()
    }

    fn request(&self, who: usize) -> v1::WriteBlockRequest {
        let data = self.data();
        v1::WriteBlockRequest {
            volume_id: 0,
            volume: VOLUMES[self.range.volume].into(),
            offset_bytes: self.range.offset(),
            crc32c: Some(crc32c(&data)),
            data,
            client_id: format!("writer-{who}"),
            sequence: self.sequence,
        }
    }
}

impl Writer {
    fn new(id: usize, model: &Shared, seed: u128) -> Self {
        Self { id, model: Arc::clone(model), rng: Pcg64Mcg::new(seed), client: None, sequence: 0 }
    }

    fn is_healed(&self) -> bool {
        self.model.lock().healed
    }

    async fn connected(&mut self) -> Result<BlockServiceClient<Channel>, Status> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let channel = match timeout(PATIENCE, connect("primary")).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(why)) => return Err(Status::unavailable(why)),
            Err(_) => return Err(Status::deadline_exceeded("connecting took too long")),
        };
        Ok(self.client.insert(BlockServiceClient::new(channel).max_decoding_message_size(1 << 22)).clone())
    }

    /// A few hot blocks, so that versions pile up.
    fn choose(&mut self, most: usize) -> Range {
        let hot = self.rng.random_bool(0.7);
        let at = self.rng.random_range(0..if hot { 6 } else { OWN });
        let count = self.rng.random_range(1..=most).min(OWN - at);
        Range { volume: self.rng.random_range(0..VOLUMES.len()), first: self.id * OWN + at, count }
    }

    fn begin(&mut self, range: Range, zeros: bool) -> Write {
        self.sequence += 1;
        let stamp = self.model.lock().begin(range, zeros);
        Write { range, stamp, sequence: self.sequence, tries: 0 }
    }

    fn acked(&self, write: &Write, answer: &v1::WriteBlockResponse) {
        let mut model = self.model.lock();
        let (who, position) = (self.id, answer.position.unwrap_or_default());
        let both = answer.durability == i32::from(v1::Durability::Both);
        let delta = answer.mode() == v1::Mode::Delta;
        model.note(format!(
            "writer {who}: {} acked at {}.{}{}{}{}",
            write.sequence,
            position.generation,
            position.lsn,
            if answer.duplicate { " again" } else { "" },
            if both { " both" } else { "" },
            if delta { " in delta mode" } else { "" },
        ));
        model.acked_in(write.range.volume, delta);
        if answer.duplicate && write.tries <= 1 {
            model.violate(format!("writer {who}: {write:?} was taken for a duplicate"));
        }
        model.end(write.range, Lsn(position.lsn), answer.duplicate, both);
    }

    /// Another try follows, unless the answer cannot be one to a request that is right.
    fn failed(&mut self, write: &Write, status: &Status) -> bool {
        let mut model = self.model.lock();
        model.retries += 1;
        model.note(format!("writer {}: {} {:?} {}", self.id, write.sequence, status.code(), status.message()));
        if !is_passing(status.code()) {
            model.violate(format!("writer {}: {write:?}: {status}", self.id));
            return false;
        }
        true
    }

    /// One call for each write.
    async fn unary(mut self) {
        while !self.is_healed() {
            let large = self.id == 0 && self.rng.random_bool(0.04);
            let range = if large {
                let volume = self.rng.random_range(0..VOLUMES.len());
                Range { volume, first: BLOCKS - PER_SEGMENT, count: PER_SEGMENT }
            } else {
                self.choose(4)
            };
            let zeros = self.rng.random_bool(0.1);
            let mut write = self.begin(range, zeros);
            while let Err(status) = self.attempt(&mut write, zeros).await {
                if !self.failed(&write, &status) {
                    return;
                }
                // Sometimes over the same connection, sometimes over another.
                if self.rng.random_bool(0.7) {
                    self.client = None;
                }
                sleep(Duration::from_millis(self.rng.random_range(5..100))).await;
            }
            if self.rng.random_bool(0.3) {
                self.read(range).await;
            }
            sleep(Duration::from_millis(self.rng.random_range(0..40))).await;
        }
    }

    async fn attempt(&mut self, write: &mut Write, zeros: bool) -> Result<(), Status> {
        let mut client = self.connected().await?;
        write.tries += 1;
        let request = write.request(self.id);
        let answer = if zeros {
            let v1::WriteBlockRequest { volume_id, volume, offset_bytes, client_id, sequence, .. } = request;
            let length_bytes = write.range.length();
            let request = v1::WriteZeroesRequest { volume_id, volume, offset_bytes, length_bytes, client_id, sequence };
            patiently(client.write_zeroes(request)).await?
        } else {
            patiently(client.write_block(request)).await?
        };
        self.acked(write, &answer);
        Ok(())
    }

    /// Nobody else writes these blocks: they hold what was acknowledged last.
    async fn read(&mut self, range: Range) {
        let Some(mut client) = self.client.clone() else { return };
        let volume = VOLUMES[range.volume].to_owned();
        let (offset_bytes, length_bytes) = (range.offset(), range.length());
        let request = v1::ReadBlockRequest { volume_id: 0, volume, offset_bytes, length_bytes };
        let answer = patiently(client.read_block(request)).await;
        let mut model = self.model.lock();
        match answer {
            Ok(answer) => {
                if crc32c(&answer.data) != answer.crc32c {
                    model.violate("a read came with the wrong checksum".into());
                }
                model.check_newest("a read", range, &answer.data);
            }
            Err(status) if is_passing(status.code()) => self.client = None,
            Err(status) => model.violate(format!("a read of {range:?}: {status}")),
        }
    }

    /// Many writes under way on a stream, of blocks that do not overlap. When it breaks, all are repeated in order.
    async fn streaming(mut self) {
        let mut pending = VecDeque::new();
        while !(self.is_healed() && pending.is_empty()) {
            if let Err(status) = self.stream(&mut pending).await {
                let first = pending.front().copied();
                let none = Write { range: self.choose(1), stamp: 0, sequence: 0, tries: 0 };
                if !self.failed(&first.unwrap_or(none), &status) {
                    return;
                }
                self.client = None;
                sleep(Duration::from_millis(self.rng.random_range(5..100))).await;
            }
        }
    }

    /// One stream; ends well when faults have ended and everything is acknowledged.
    async fn stream(&mut self, pending: &mut VecDeque<Write>) -> Result<(), Status> {
        let mut client = self.connected().await?;
        // Each write is in it at most once: it is never full.
        let (requests, queue) = mpsc::channel(2 * WINDOW);
        let who = self.id;
        let send = |write: &mut Write| {
            write.tries += 1;
            let request = v1::WriteBlocksRequest { tag: write.sequence, write: Some(write.request(who)) };
            requests.try_send(request).map_err(|_| Status::unavailable("the stream is closed"))
        };
        for write in pending.iter_mut() {
            send(write)?;
        }
        let mut answers = patiently(client.write_blocks(ReceiverStream::new(queue))).await?;
        loop {
            let healed = self.is_healed();
            if healed && pending.is_empty() {
                return Ok(());
            }
            let more = !healed && pending.len() < WINDOW;
            let next = Duration::from_millis(self.rng.random_range(0..30));
            tokio::select! {
                biased;
                answer = patience(answers.message(), !pending.is_empty()) => {
                    let Some(answer) = answer? else { return Err(Status::unavailable("the stream has ended")) };
                    for result in answer.results {
                        self.settle(pending, result)?;
                    }
                }
                () = sleep(next), if more => {
                    let range = self.choose(2);
                    if !pending.iter().any(|w| w.range.overlaps(&range)) {
                        let mut write = self.begin(range, false);
                        let sent = send(&mut write);
                        pending.push_back(write);
                        sent?;
                    }
                }
            }
        }
    }

    fn settle(&self, pending: &mut VecDeque<Write>, result: v1::WriteResult) -> Result<(), Status> {
        let Some(write) = pending.front().filter(|write| write.sequence == result.tag).copied() else {
            self.model.lock().violate(format!("result {} is not the next one", result.tag));
            return Err(Status::unavailable("results out of order"));
        };
        match result.outcome {
            Some(Outcome::Written(answer)) => {
                self.acked(&write, &answer);
                pending.pop_front();
                Ok(())
            }
            Some(Outcome::Error(error)) => Err(Status::new(Code::from(error.code), error.message)),
            None => Err(Status::invalid_argument("a result without an outcome")),
        }
    }
}

/// The next message; where one is awaited, in time.
async fn patience<T>(
    next: impl Future<Output = Result<Option<T>, Status>>,
    awaited: bool,
) -> Result<Option<T>, Status> {
    if !awaited {
        return next.await;
    }
    timeout(PATIENCE, next).await.unwrap_or_else(|_| Err(Status::deadline_exceeded("no result in time")))
}

/// Reads whole images of the backup while writes and faults go on.
async fn reader(model: Shared, seed: u128) {
    let mut rng = Pcg64Mcg::new(seed);
    while !model.lock().healed {
        sleep(Duration::from_millis(rng.random_range(50..400))).await;
        let volume = rng.random_range(0..VOLUMES.len());
        match timeout(PATIENCE, backup_image(VOLUMES[volume])).await {
            Ok(Ok((position, data))) => {
                let mut model = model.lock();
                model.note(format!("image of {} at {position}", VOLUMES[volume]));
                model.check_image("an image of the backup", volume, position, &data);
            }
            // It may not know the volume yet.
            Ok(Err(status)) if is_passing(status.code()) || status.code() == Code::NotFound => {}
            Ok(Err(status)) => model.lock().violate(format!("an image of the backup: {status}")),
            Err(_) => {}
        }
    }
}

/// The position of the backup's image of a volume, and its bytes.
pub(super) async fn backup_image(volume: &str) -> Result<(Lsn, Vec<u8>), Status> {
    use v1::read_image_response::Content;
    let mut client = BackupServiceClient::new(connect("backup").await.map_err(Status::unavailable)?);
    let request = v1::ReadImageRequest { volume: volume.to_owned(), chunk_bytes: 16 << 10, ..Default::default() };
    let mut answers = client.read_blocks(request).await?.into_inner();
    let (mut position, mut data) = (Lsn::ZERO, Vec::new());
    while let Some(answer) = answers.message().await? {
        position = Lsn(answer.position.unwrap_or_default().lsn);
        match answer.content {
            Some(Content::Data(bytes)) => data.extend_from_slice(&bytes),
            Some(Content::ZeroBytes(count)) => data.resize(data.len() + usize::try_from(count).unwrap_or(0), 0),
            None => {}
        }
    }
    Ok((position, data))
}

async fn primary_image(volume: &str) -> Result<Vec<u8>, Status> {
    let mut client = BlockServiceClient::new(connect("primary").await.map_err(Status::unavailable)?);
    let request = v1::ReadBlocksRequest { volume: volume.to_owned(), chunk_bytes: 16 << 10, ..Default::default() };
    let mut answers = client.read_blocks(request).await?.into_inner();
    let mut data = Vec::new();
    while let Some(answer) = answers.message().await? {
        match answer.content {
            Some(Content::Data(bytes)) => data.extend_from_slice(&bytes),
            Some(Content::ZeroBytes(count)) => data.resize(data.len() + usize::try_from(count).unwrap_or(0), 0),
            None => {}
        }
    }
    Ok(data)
}

/// Makes the volumes; repeats each until it is there.
async fn create_volumes(model: &Shared) {
    for (n, name) in VOLUMES.iter().enumerate() {
        loop {
            let created = async {
                let mut client = VolumeServiceClient::new(connect("primary").await.map_err(Status::unavailable)?);
                let request = v1::CreateVolumeRequest {
                    name: (*name).into(),
                    size_bytes: (BLOCKS * BLOCK) as u64,
                    block_bytes: u32::try_from(BLOCK).expect("512"),
                    group: if n == 0 { String::new() } else { "group".into() },
                    ack: i32::from(if n == 2 { v1::AckRule::Both } else { v1::AckRule::Staged }),
                    away: i32::from(v1::AwayRule::Degrade),
                };
                patiently(client.create_volume(request)).await
            };
            match timeout(PATIENCE, created).await {
                Ok(Ok(_)) => break,
                // An attempt without an answer made it.
                Ok(Err(status)) if status.code() == Code::AlreadyExists => break,
                Ok(Err(status)) if !is_passing(status.code()) => {
                    model.lock().violate(format!("creating {name}: {status}"));
                    return;
                }
                _ => sleep(Duration::from_millis(50)).await,
            }
        }
        model.lock().note(format!("volume {name} made"));
    }
}

/// Waits until the pair is at rest: the backup holds everything.
async fn at_rest(model: &Shared) {
    loop {
        let status = async {
            let mut client = ReplicationServiceClient::new(connect("primary").await.map_err(Status::unavailable)?);
            patiently(client.get_status(v1::GetStatusRequest {})).await
        };
        if let Ok(Ok(status)) = timeout(PATIENCE, status).await {
            let retained = status.staging.unwrap_or_default().retained_bytes;
            let behind = status.volumes.iter().filter_map(|v| v.position.as_ref()).any(|p| p.acked != p.next);
            let link = status.link.unwrap_or_default();
            let delta = status.volumes.iter().find(|v| v.mode() != v1::Mode::Continuous);
            if retained == 0 && !behind && delta.is_none() && link.state == "attached" {
                return;
            }
            let mode = delta.map(|v| format!(", {} in delta mode for {:?}, {:?}", v.name, v.cause, v.last_run));
            let (state, reason, mode) = (link.state, link.reason, mode.unwrap_or_default());
            model.lock().note(format!("{retained} bytes retained, link {state} {reason}{mode}"));
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// P5: when faults have ended both images are what the client wrote.
async fn compare(model: &Shared) {
    for (volume, name) in VOLUMES.iter().enumerate() {
        let images = (primary_image(name).await, backup_image(name).await);
        let mut model = model.lock();
        let expected = model.expected_image(volume);
        match images {
            (Ok(primary), Ok((position, backup))) => {
                model.note(format!("{name} compared at {position}"));
                if primary != expected {
                    model.violate(format!(
                        "{name} on the primary at the end: {}",
                        first_difference(&primary, &expected)
                    ));
                }
                if backup != expected {
                    model.violate(format!("{name} on the backup at the end: {}", first_difference(&backup, &expected)));
                }
            }
            (primary, backup) => {
                let error = primary.err().or(backup.err());
                model.violate(format!("{name} cannot be read at the end: {error:?}"));
            }
        }
    }
}

fn first_difference(found: &[u8], expected: &[u8]) -> String {
    let at = found.iter().zip(expected).position(|(a, b)| a != b);
    format!("{} of {} bytes, first difference at byte {at:?}", found.len(), expected.len())
}

/// The software of the client host.
pub(super) async fn client(model: Shared, seeds: [u128; WRITERS + 1]) -> turmoil::Result {
    create_volumes(&model).await;
    let [a, b, c, d, reads] = seeds;
    tokio::join!(
        Writer::new(0, &model, a).unary(),
        Writer::new(1, &model, b).unary(),
        Writer::new(2, &model, c).streaming(),
        Writer::new(3, &model, d).streaming(),
        reader(Arc::clone(&model), reads),
    );
    at_rest(&model).await;
    compare(&model).await;
    Ok(())
}
