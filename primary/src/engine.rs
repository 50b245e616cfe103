//! The engine: what clients ask, in terms of the store.
//!
//! A request takes a permit of bytes, is given its LSN (which is its order), and is answered when its volume's rule
//! allows. Requests wait for space in the staging area before they have an LSN, for a bounded time; then they are
//! refused. Nothing is queued without a permit.

mod snapshots;

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use understudy_common::{
    checksum::crc32c,
    events::EventLog,
    pool::MAX_BLOCKS_PER_SEGMENT,
    record::{self, CLIENT_ID_BYTES_MAX, ClientSequence, Control},
    state::{NodeState, SEQUENCE_WINDOW, SequenceCheck, VOLUMES_MAX},
    store::{Change, Marks, ModifyError, ReadFailure, ReadOut, ShrinkError, Store, SubmitError, Submitted},
    types::{AckRule, AwayRule, BlockRange, BlockSize, GroupId, Lsn, Position, SnapshotId, VolumeId, VolumeSpec},
};

use crate::{
    api::{EngineError, NewVolume, PieceContent, ReadPiece, VolumeKey, WriteAck, WriteKind, WriteRequest},
    replicator::Handle,
    standing::Standing,
    waiters::{Queue, Waiters},
};

/// Blocks that one record of zeros covers at most: 1 GiB of 4 KiB blocks.
const ZERO_BLOCKS_MAX: u64 = 1 << 18;
/// What a request without a payload counts for.
const PERMIT_BYTES_MIN: u64 = 512;
/// Largest volume, 1 EiB: byte offsets stay far from their end.
const VOLUME_BYTES_MAX: u64 = 1 << 60;

pub use snapshots::{Changed, Copy, Copying};

/// Bytes in flight that a request holds.
#[derive(Debug)]
pub struct Permit {
    _bytes: OwnedSemaphorePermit,
    /// When it was asked for: what the request waits for later counts from here.
    asked: Instant,
}

/// When a write is acknowledged, as far as the group's mode matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Staged,
    Primary,
    /// With `degrade` a write in delta mode is acknowledged as local.
    Both {
        degrade: bool,
    },
}

impl Rule {
    fn of(spec: &VolumeSpec) -> Self {
        match spec.ack {
            AckRule::Staged => Self::Staged,
            AckRule::Primary => Self::Primary,
            AckRule::Both => Self::Both { degrade: spec.away == AwayRule::Degrade },
        }
    }

    /// Where those of a lane of `group` wait, or those that wait for all of its lanes.
    fn queue(self, group: GroupId, lane: Option<u8>) -> Queue {
        match self {
            Self::Staged => Queue::Durable,
            Self::Primary => Queue::Placed,
            Self::Both { degrade } => Queue::Held(group, lane, degrade),
        }
    }
}

/// A write that has its LSN.
#[derive(Debug)]
pub struct Ticket {
    submitted: Submitted,
    rule: Rule,
    /// When the request came.
    asked: Instant,
    _permit: Option<Permit>,
}

/// Bounds on what clients may ask.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Payload of one request.
    pub message_bytes: u64,
    /// Payload of all requests that are not answered.
    pub in_flight_bytes: u64,
    /// How long a request waits for room, and for a backup that it cannot do without.
    pub queue_wait: Duration,
    /// How long after a write was asked for its outcome is reported as unknown.
    pub deadline: Duration,
    /// Reads stay on the calling thread: for simulated disks.
    pub inline_reads: bool,
    /// Serve only while a lease was renewed within so long.
    pub lease: Option<Duration>,
}

struct Inner {
    store: Arc<Store>,
    marks: watch::Receiver<Marks>,
    permits: Arc<Semaphore>,
    limits: Limits,
    waiters: Waiters,
    /// Records were submitted of which the journal's writer was not told.
    submitted: Notify,
    /// Why no session is open, if none is.
    attached: watch::Sender<Result<(), String>>,
    draining: AtomicBool,
    standing: Standing,
    replicator: Handle,
    /// Volumes that a task of this process fills from a snapshot.
    filling: parking_lot::Mutex<BTreeSet<VolumeId>>,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

/// Unix time in milliseconds.
#[must_use]
pub fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

impl Engine {
    /// An engine over an open store.
    #[must_use]
    pub fn new(store: Arc<Store>, limits: Limits, replicator: Handle) -> Self {
        let permits = usize::try_from(limits.in_flight_bytes.min(u64::from(u32::MAX))).expect("32 bits");
        let identity = store.identity();
        let inner = Inner {
            marks: store.marks(),
            store,
            permits: Arc::new(Semaphore::new(permits)),
            limits,
            waiters: Waiters::default(),
            submitted: Notify::new(),
            attached: watch::channel(Err("no session was opened yet".to_owned())).0,
            draining: AtomicBool::new(false),
            standing: Standing::new(identity.generation, identity.fenced, limits.lease),
            replicator,
            filling: parking_lot::Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The store below.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.inner.store
    }

    /// The watermarks.
    #[must_use]
    pub fn marks(&self) -> watch::Receiver<Marks> {
        self.inner.marks.clone()
    }

    /// The link's driver says whether a session is open, or why not.
    pub fn set_attached(&self, attached: Result<(), String>) {
        drop(self.inner.attached.send_replace(attached));
    }

    /// Refuses new requests from now on; what has an LSN is still answered.
    pub fn drain(&self) {
        self.inner.draining.store(true, Ordering::Release);
    }

    /// Takes requests again.
    pub fn resume(&self) {
        self.inner.draining.store(false, Ordering::Release);
    }

    /// Whether this node may serve.
    pub(crate) fn standing(&self) -> &Standing {
        &self.inner.standing
    }

    /// Another primary has generation `by`: nothing is served or acknowledged from now on, also behind a restart. If that
    /// cannot be made durable the log says so. It is said once: each attempt to attach comes here again.
    pub(crate) fn fence(&self, by: u64, events: &EventLog) {
        let served = match self.inner.store.fence(by) {
            Ok(served) => served,
            Err(error) => {
                warn!(%error, "that another primary has taken over could not be stored");
                return;
            }
        };
        let fenced = self.inner.store.identity().fenced;
        if fenced > 0 {
            self.inner.standing.fence(fenced);
        }
        if !served {
            return;
        }
        warn!(by, "role.fenced: another primary has taken over; nothing is served any more");
        let fields = [("by", by.to_string())];
        events.record(unix_ms(), "role.fenced", "another primary has taken over", fields);
    }

    fn is_draining(&self) -> bool {
        self.inner.draining.load(Ordering::Acquire)
    }

    /// Takes a permit for a request of so many bytes.
    ///
    /// # Errors
    /// If the request is larger than the limit, or no room came in time.
    pub async fn admit(&self, bytes: u64) -> Result<Permit, EngineError> {
        let limits = &self.inner.limits;
        if bytes > limits.message_bytes {
            return Err(EngineError::TooLarge { bytes, limit_bytes: limits.message_bytes });
        }
        if self.is_draining() {
            return Err(EngineError::Draining);
        }
        let asked = Instant::now();
        let weight = u32::try_from(bytes.max(PERMIT_BYTES_MIN)).expect("a message is below 4 GiB");
        if let Ok(permit) = Arc::clone(&self.inner.permits).try_acquire_many_owned(weight) {
            return Ok(Permit { _bytes: permit, asked });
        }
        let waiting = Arc::clone(&self.inner.permits).acquire_many_owned(weight);
        let permit = timeout(limits.queue_wait, waiting).await.map_err(|_| EngineError::Busy {
            bytes,
            in_flight_bytes: limits.in_flight_bytes - self.inner.permits.available_permits() as u64,
            waited_ms: millis(limits.queue_wait),
        })?;
        Ok(Permit { _bytes: permit.expect("the semaphore is never closed"), asked })
    }

    /// Gives a request its LSN. Calls one behind the other take effect in that order.
    ///
    /// # Errors
    /// See [`EngineError`]; nothing was changed then.
    pub async fn submit(&self, permit: Permit, request: WriteRequest) -> Result<Ticket, EngineError> {
        let spec = self.spec(&request.volume)?;
        if !self.must_wait_attached(&spec)
            && let Some((first_block, change)) = whole_blocks(&spec, &request)
            && let [submitted] = self.submit_all(&spec, [(first_block, change, request.client.clone())])[..]
        {
            return Ok(Ticket { submitted, rule: Rule::of(&spec), asked: permit.asked, _permit: Some(permit) });
        }
        check_client(request.client.as_ref())?;
        let length = match &request.kind {
            WriteKind::Data(data) => data.len() as u64,
            WriteKind::Zeroes { length_bytes } | WriteKind::Discard { length_bytes } => *length_bytes,
        };
        check_range(&spec, request.offset_bytes, length)?;
        if let (WriteKind::Data(data), Some(expected)) = (&request.kind, request.crc32c) {
            let found = crc32c(data);
            if found != expected {
                return Err(EngineError::Checksum { expected, found });
            }
        }
        if spec.ack == AckRule::Both && spec.away == AwayRule::Block {
            self.wait_attached(&spec, permit.asked).await?;
        }
        let submitted = loop {
            let mut marks = self.inner.marks.clone();
            marks.mark_unchanged();
            let refused = if self.inner.store.queue_bytes() > self.inner.store.config().pending_bytes {
                self.staging_full()
            } else {
                match self.try_submit(&spec, &request) {
                    Ok(submitted) => break submitted,
                    Err(ModifyError::Read(error)) => return Err(of_read(error, &spec)),
                    Err(ModifyError::Submit(error)) => {
                        let room_may_come = self.ask_for_room(&error);
                        let refused = of_submit(error, &spec, request.client.as_ref(), permit.asked.elapsed());
                        if !room_may_come {
                            return Err(refused);
                        }
                        refused
                    }
                }
            };
            self.wait_room(&mut marks, permit.asked, refused).await?;
        };
        Ok(Ticket { submitted, rule: Rule::of(&spec), asked: permit.asked, _permit: Some(permit) })
    }

    /// Gives requests their LSNs as far as none has to wait or is refused: writes of whole blocks of one volume, from
    /// the front of `requests`. They leave it; what is left is for [`Engine::admit`] and [`Engine::submit`].
    pub fn submit_now(&self, requests: &mut VecDeque<WriteRequest>) -> Vec<Ticket> {
        let Some(first) = requests.front() else { return Vec::new() };
        let Ok(spec) = self.spec(&first.volume) else { return Vec::new() };
        if self.must_wait_attached(&spec) || self.is_draining() {
            return Vec::new();
        }
        let mut permits = Vec::with_capacity(requests.len());
        let mut changes = Vec::with_capacity(requests.len());
        for request in requests.iter().take_while(|request| request.volume == first.volume) {
            let Some((first_block, change)) = whole_blocks(&spec, request) else { break };
            let bytes = request.payload_bytes();
            let weight =
                u32::try_from(bytes.max(PERMIT_BYTES_MIN)).ok().filter(|_| bytes <= self.inner.limits.message_bytes);
            let Some(weight) = weight else { break };
            let Ok(permit) = Arc::clone(&self.inner.permits).try_acquire_many_owned(weight) else { break };
            permits.push(permit);
            changes.push((first_block, change, request.client.clone()));
        }
        if changes.is_empty() {
            return Vec::new();
        }
        let submitted = self.submit_all(&spec, changes);
        requests.drain(..submitted.len());
        let asked = Instant::now();
        let ticket = |(submitted, bytes)| {
            let permit = Some(Permit { _bytes: bytes, asked });
            Ticket { submitted, rule: Rule::of(&spec), asked, _permit: permit }
        };
        submitted.into_iter().zip(permits).map(ticket).collect()
    }

    fn must_wait_attached(&self, spec: &VolumeSpec) -> bool {
        spec.ack == AckRule::Both
            && spec.away == AwayRule::Block
            && (self.inner.attached.borrow().is_err() || self.inner.store.is_delta(spec.group))
    }

    /// Admits changes without a wait. The journal's writer is woken when the tasks that are ready now have had their
    /// turn, so that what they submit goes with the same group commit.
    fn submit_all(
        &self,
        spec: &VolumeSpec,
        changes: impl IntoIterator<Item = (u64, Change, Option<ClientSequence>)>,
    ) -> SmallVec<[Submitted; 16]> {
        let submitted = self.inner.store.submit_all(spec.id, changes, unix_ms());
        if !submitted.is_empty() {
            self.inner.submitted.notify_one();
        }
        submitted
    }

    /// True if a record that was refused may find room later, for which the background has been asked.
    fn ask_for_room(&self, error: &SubmitError) -> bool {
        let may_come = match error {
            SubmitError::StagingFull { .. } => {
                self.inner.replicator.wake();
                self.inner.store.request_trim();
                return true;
            }
            // Releases wake whoever waits.
            SubmitError::LaneFull { .. } => return true,
            SubmitError::Space(space) => {
                // The snapshots of a run and of a comparison give way: what they hold back may be all that is lacking.
                let of_run = self.inner.store.abort_open_runs(unix_ms());
                if self.inner.store.want_space() || of_run {
                    self.inner.store.request_checkpoint();
                    return true;
                }
                // Only here: whoever waits is woken by growth, and would make the pool grow on for another lack.
                self.inner.store.request_growth();
                self.inner.store.room_may_come(space)
            }
            // What was freed counts as used until a checkpoint.
            SubmitError::Level(_) => self.inner.store.space().quarantined() > 0,
            _ => false,
        };
        if may_come {
            self.inner.store.request_checkpoint();
        }
        may_come
    }

    fn staging_full(&self) -> EngineError {
        EngineError::StagingFull {
            span_bytes: self.inner.store.span_bytes(),
            capacity_bytes: self.inner.store.config().journal.capacity_bytes,
            waited_ms: millis(self.inner.limits.queue_wait),
        }
    }

    async fn wait_attached(&self, spec: &VolumeSpec, asked: Instant) -> Result<(), EngineError> {
        let deadline = asked + self.inner.limits.queue_wait;
        let mut attached = self.inner.attached.subscribe();
        if !matches!(timeout_at(deadline, attached.wait_for(Result::is_ok)).await, Ok(Ok(_))) {
            let link = self.inner.attached.borrow().clone().err().unwrap_or_default();
            return Err(EngineError::BackupAway { volume: spec.name.clone(), link });
        }
        // In delta mode nothing is acknowledged by both sides.
        let mut marks = self.inner.marks.clone();
        let continuous =
            || self.inner.store.with_state(|s| s.groups.get(&spec.group).is_none_or(|g| g.mode.is_continuous()));
        let returned = async {
            while !continuous() {
                if marks.changed().await.is_err() {
                    return false;
                }
            }
            true
        };
        if timeout_at(deadline, returned).await != Ok(true) {
            let link = "the group is in delta mode; status shows why".to_owned();
            return Err(EngineError::BackupAway { volume: spec.name.clone(), link });
        }
        Ok(())
    }

    /// Waits until something moves that may have made room.
    async fn wait_room(
        &self,
        marks: &mut watch::Receiver<Marks>,
        asked: Instant,
        refused: EngineError,
    ) -> Result<(), EngineError> {
        if self.is_draining() {
            return Err(EngineError::Draining);
        }
        match timeout_at(asked + self.inner.limits.queue_wait, marks.changed()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(refused),
        }
    }

    fn try_submit(&self, spec: &VolumeSpec, request: &WriteRequest) -> Result<Submitted, ModifyError> {
        match &request.kind {
            WriteKind::Data(data) => {
                let lane = self.inner.store.lane_of(request.client.as_ref());
                self.submit_data(lane, spec, request.offset_bytes, data, request.client.as_ref())
            }
            WriteKind::Zeroes { length_bytes } => self.submit_zeros(spec, request, *length_bytes, true),
            WriteKind::Discard { length_bytes } => self.submit_zeros(spec, request, *length_bytes, false),
        }
    }

    fn submit_data(
        &self,
        lane: u8,
        spec: &VolumeSpec,
        offset: u64,
        data: &Bytes,
        client: Option<&ClientSequence>,
    ) -> Result<Submitted, ModifyError> {
        let block_bytes = u64::from(spec.block_size.bytes());
        let end = offset + data.len() as u64;
        if offset.is_multiple_of(block_bytes) && end.is_multiple_of(block_bytes) {
            let crcs = record::block_crcs(data, spec.block_size);
            let change = Change::Write { data: data.clone(), crcs };
            let (first, client) = (offset / block_bytes, client.cloned());
            return Ok(self.inner.store.submit_in_lane(lane, spec.id, first, change, client, unix_ms())?);
        }
        let first = offset / block_bytes;
        let range = BlockRange { volume: spec.id, first, count: end.div_ceil(block_bytes) - first };
        let at = usize::try_from(offset - first * block_bytes).expect("inside a block");
        let modify = |blocks: &mut [u8]| blocks[at..at + data.len()].copy_from_slice(data);
        self.inner.store.submit_modified(lane, range, client, unix_ms(), &modify)
    }

    /// Zeros: partial blocks at the edges are written (or, for a discard, left), whole blocks give their space back.
    /// Of several records the last carries the client's sequence, so that a repetition repeats all or nothing.
    fn submit_zeros(
        &self,
        spec: &VolumeSpec,
        request: &WriteRequest,
        length: u64,
        edges: bool,
    ) -> Result<Submitted, ModifyError> {
        if let Some(lsn) = self.applied_sequence(request.client.as_ref())? {
            let position = Position { generation: self.inner.store.identity().generation, lsn };
            return Ok(Submitted { lsn, position, group: spec.group, lane: None, duplicate: true });
        }
        let block_bytes = u64::from(spec.block_size.bytes());
        let mut pieces = zero_pieces(request.offset_bytes, length, block_bytes);
        pieces.retain(|piece| edges || piece.whole);
        let (count, lane) = (pieces.len(), self.inner.store.lane_of(request.client.as_ref()));
        let mut submitted = None;
        for (n, ZeroPiece { offset, length, whole }) in pieces.into_iter().enumerate() {
            let client = request.client.as_ref().filter(|_| n + 1 == count);
            submitted = Some(if whole {
                let change = Change::Zero { count: length / block_bytes };
                let (first, client) = (offset / block_bytes, client.cloned());
                self.inner.store.submit_in_lane(lane, spec.id, first, change, client, unix_ms())?
            } else {
                let zeros = vec![0; usize::try_from(length).expect("inside a block")].into();
                self.submit_data(lane, spec, offset, &zeros, client)?
            });
        }
        // A discard of less than a block changes nothing: it is as durable as what came before it.
        Ok(submitted.unwrap_or_else(|| self.newest(spec)))
    }

    fn applied_sequence(&self, client: Option<&ClientSequence>) -> Result<Option<Lsn>, SubmitError> {
        let Some(client) = client else { return Ok(None) };
        match self.inner.store.with_state(|s| s.check_sequence(client)) {
            SequenceCheck::Fresh => Ok(None),
            SequenceCheck::Applied(lsn) => Ok(Some(lsn)),
            SequenceCheck::TooOld { highest } => {
                Err(SubmitError::SequenceTooOld { sequence: client.sequence, highest })
            }
        }
    }

    /// The newest record of the volume's group.
    fn newest(&self, spec: &VolumeSpec) -> Submitted {
        let position =
            self.inner.store.with_state(|s| s.groups.get(&spec.group).map_or(Position::default(), |g| g.position));
        Submitted { lsn: position.lsn, position, group: spec.group, lane: None, duplicate: false }
    }

    /// Waits until a write is as durable as its rule promises.
    ///
    /// # Errors
    /// If the store fails, or the acknowledgement does not come in time: the outcome is unknown then.
    pub async fn wait(&self, ticket: Ticket) -> Result<WriteAck, EngineError> {
        if let Some(result) = self.poll_settled(&ticket) {
            return result;
        }
        let settled = async {
            loop {
                let Submitted { group, lane, lsn, .. } = ticket.submitted;
                let mut waiting = self.inner.waiters.enter(ticket.rule.queue(group, lane), lsn);
                // What moved before the place was taken woke nobody.
                if let Some(result) = self.poll_settled(&ticket) {
                    return result;
                }
                waiting.woken().await;
            }
        };
        timeout_at(ticket.asked + self.inner.limits.deadline, settled).await.unwrap_or_else(|_| {
            let waited_ms = millis(self.inner.limits.deadline);
            Err(EngineError::Unconfirmed { lsn: ticket.submitted.lsn.0, waited_ms })
        })
    }

    /// Wakes the journal's writer, and those who wait for acknowledgements, until the store is gone or `stop`.
    pub(crate) async fn answer(self, stop: CancellationToken) {
        let mut marks = self.inner.marks.clone();
        loop {
            let now = *marks.borrow_and_update();
            self.inner.waiters.on_marks(&now, &self.inner.store);
            tokio::select! {
                changed = marks.changed() => if changed.is_err() { break },
                () = self.inner.submitted.notified() => self.inner.store.wake_journal(),
                () = stop.cancelled() => break,
            }
        }
        let last = *marks.borrow();
        self.inner.waiters.on_marks(&last, &self.inner.store);
    }

    /// The acknowledgement of a write if it may be given now.
    #[must_use]
    pub fn poll_settled(&self, ticket: &Ticket) -> Option<Result<WriteAck, EngineError>> {
        if let Err(error) = self.inner.standing.check() {
            return Some(Err(error));
        }
        let marks = *self.inner.marks.borrow();
        let Submitted { lsn, position, group, lane, duplicate } = ticket.submitted;
        let mut both = false;
        let settled = lsn <= marks.durable
            && match ticket.rule {
                Rule::Staged => true,
                Rule::Primary => lsn <= marks.placed || duplicate && lsn <= marks.applied,
                Rule::Both { degrade } => {
                    both = self.inner.store.is_on_backup(group, lane, lsn);
                    both || degrade && self.inner.store.is_delta(group)
                }
            };
        if settled {
            if ticket._permit.is_some() {
                self.inner.replicator.note_write(ticket.asked.elapsed());
            }
            let delta = self.inner.store.is_delta(group);
            return Some(Ok(WriteAck { position, both, duplicate, delta }));
        }
        marks.failed.then(|| Err(EngineError::Storage { message: self.inner.store.failure().unwrap_or_default() }))
    }

    /// Reads bytes of a volume, with their CRC32C.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn read(
        &self,
        volume: &VolumeKey,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> Result<(Bytes, u32), EngineError> {
        let spec = self.spec(volume)?;
        check_range(&spec, offset_bytes, length_bytes)?;
        if length_bytes > self.inner.limits.message_bytes {
            return Err(EngineError::TooLarge { bytes: length_bytes, limit_bytes: self.inner.limits.message_bytes });
        }
        let block_bytes = u64::from(spec.block_size.bytes());
        let first = offset_bytes / block_bytes;
        let count = (offset_bytes + length_bytes).div_ceil(block_bytes) - first;
        let (store, id) = (Arc::clone(&self.inner.store), spec.id);
        let read = self.blocking(&spec, move || store.read(id, first, count)).await?;
        self.wait_seen(&spec, &read).await?;
        let at = usize::try_from(offset_bytes - first * block_bytes).expect("inside a block");
        let data = read.data.slice(at..at + usize::try_from(length_bytes).expect("bounded above"));
        let crc = crc32c(&data);
        Ok((data, crc))
    }

    /// Reads from `offset_bytes` on: a hole, or at most `max_bytes` of data.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn read_piece(
        &self,
        volume: &VolumeKey,
        offset_bytes: u64,
        max_bytes: u64,
    ) -> Result<ReadPiece, EngineError> {
        let spec = self.spec(volume)?;
        check_range(&spec, offset_bytes, 1)?;
        let block_bytes = u64::from(spec.block_size.bytes());
        let position = self.newest(&spec).position;
        let first = offset_bytes / block_bytes;
        let max = (max_bytes / block_bytes).max(1).min(spec.block_count() - first);
        let (store, id) = (Arc::clone(&self.inner.store), spec.id);
        let (hole, count) = self.blocking(&spec, move || store.extent(id, first, max)).await?;
        let length = ((first + count) * block_bytes - offset_bytes).min(max_bytes.max(1));
        if hole {
            return Ok(ReadPiece { offset_bytes, content: PieceContent::Zeros(length), crc32c: 0, position });
        }
        let (data, crc32c) = self.read(&VolumeKey::Id(spec.id), offset_bytes, length).await?;
        Ok(ReadPiece { offset_bytes, content: PieceContent::Data(data), crc32c, position })
    }

    /// Reads whole blocks of what is not on the backup, whoever this node is by now.
    pub async fn read_unshipped(&self, spec: &VolumeSpec, first: u64, count: u64) -> Result<Bytes, EngineError> {
        let (store, id) = (Arc::clone(&self.inner.store), spec.id);
        Ok(self.blocking(spec, move || store.read(id, first, count)).await?.data)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        spec: &VolumeSpec,
        read: impl FnOnce() -> Result<T, ReadFailure> + Send + 'static,
    ) -> Result<T, EngineError> {
        let done = if self.inner.limits.inline_reads {
            read()
        } else {
            tokio::task::spawn_blocking(read)
                .await
                .map_err(|error| EngineError::Storage { message: format!("a read was ended: {error}") })?
        };
        done.map_err(|error| of_read(error, spec))
    }

    /// A read may be answered when the writes it saw may be.
    async fn wait_seen(&self, spec: &VolumeSpec, read: &ReadOut) -> Result<(), EngineError> {
        for (lsn, lane, rule) in [(read.seen, None, Rule::Staged), (read.seen_both, read.seen_lane, Rule::of(spec))] {
            if lsn > Lsn::ZERO {
                let position = Position { generation: 0, lsn };
                self.settle(Submitted { lsn, position, group: spec.group, lane, duplicate: false }, rule).await?;
            }
        }
        Ok(())
    }

    async fn settle(&self, submitted: Submitted, rule: Rule) -> Result<WriteAck, EngineError> {
        self.wait(Ticket { submitted, rule, asked: Instant::now(), _permit: None }).await
    }

    /// Returns when everything submitted to the volume's group before is durable by its rule.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn flush(&self, volume: &VolumeKey) -> Result<WriteAck, EngineError> {
        let spec = self.spec(volume)?;
        let rule = if spec.ack == AckRule::Primary { Rule::Staged } else { Rule::of(&spec) };
        self.settle(self.newest(&spec), rule).await
    }

    /// Makes a volume. Returns when it is durable.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn create_volume(&self, new: NewVolume) -> Result<VolumeSpec, EngineError> {
        let (made, submitted) = self.submit_volume(new, None)?;
        self.settle(submitted, Rule::Staged).await?;
        Ok(made)
    }

    /// The record of a new volume; of one that is to be filled, it says so, and no reader sees it empty.
    fn submit_volume(
        &self,
        new: NewVolume,
        fill: Option<(SnapshotId, VolumeId)>,
    ) -> Result<(VolumeSpec, Submitted), EngineError> {
        self.inner.standing.check()?;
        check_name("name", &new.name)?;
        let group_name = new.group.unwrap_or_else(|| new.name.clone());
        check_name("group", &group_name)?;
        let segment_bytes = self.inner.store.config().pool.segment_bytes;
        let block_size = check_block_size(new.block_bytes, segment_bytes)?;
        check_size(new.size_bytes, block_size)?;
        let mut made = None;
        let submitted = self.inner.store.submit_decided(unix_ms(), |state: &NodeState| {
            if state.volume_by_name(&new.name).is_some() {
                return Err(Decided::Engine(EngineError::VolumeExists { volume: new.name.clone() }));
            }
            if let Some((snapshot, _)) = fill.filter(|(snapshot, _)| !state.snapshots.contains_key(snapshot)) {
                let (group, snapshot) = (group_name.clone(), snapshot.to_string());
                return Err(Decided::Engine(EngineError::NoSnapshot { group, snapshot }));
            }
            if state.volumes.len() >= VOLUMES_MAX {
                let why = format!("there are {VOLUMES_MAX} volumes, the most a node serves; delete one first");
                return Err(Decided::Engine(EngineError::Invalid { field: "name", why }));
            }
            let known = state.groups.values().find(|g| g.name == group_name);
            let group = known.map_or(GroupId(state.last_group.0 + 1), |g| g.id);
            let spec = VolumeSpec {
                id: VolumeId(state.last_volume.0 + 1),
                name: new.name.clone(),
                group,
                group_name: group_name.clone(),
                size_bytes: new.size_bytes,
                block_size,
                segment_bytes,
                ack: new.ack,
                away: new.away,
            };
            made = Some(spec.clone());
            Ok((group, Control::CreateVolume { spec, fill }))
        })?;
        Ok((made.expect("decided above"), submitted))
    }

    /// Makes a volume larger or, if what is cut off reads as zeros, smaller. Returns when that is durable.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn resize_volume(&self, volume: &VolumeKey, size_bytes: u64) -> Result<VolumeSpec, EngineError> {
        let spec = self.spec(volume)?;
        if size_bytes < spec.size_bytes {
            return self.shrink_volume(&spec, size_bytes).await;
        }
        self.change(&VolumeKey::Id(spec.id), |now| {
            check_size(size_bytes, now.block_size)?;
            if size_bytes < now.size_bytes {
                // Somebody else has made it larger meanwhile, and may write there.
                return Err(EngineError::Shrink {
                    volume: now.name.clone(),
                    why: "it has just been made larger".into(),
                });
            }
            Ok(Control::ResizeVolume { volume: now.id, size_bytes })
        })
        .await
    }

    async fn shrink_volume(&self, spec: &VolumeSpec, size_bytes: u64) -> Result<VolumeSpec, EngineError> {
        check_size(size_bytes, spec.block_size)?;
        let (store, id) = (Arc::clone(&self.inner.store), spec.id);
        let shrunk = self.blocking(spec, move || Ok(store.shrink(id, size_bytes, unix_ms()))).await?;
        let submitted = shrunk.map_err(|error| of_shrink(error, spec))?;
        self.settle(submitted, Rule::Staged).await?;
        self.spec(&VolumeKey::Id(id))
    }

    /// Changes when writes are acknowledged, from the next one on.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn set_ack_rule(
        &self,
        volume: &VolumeKey,
        ack: AckRule,
        away: Option<AwayRule>,
    ) -> Result<VolumeSpec, EngineError> {
        self.change(volume, |spec| Ok(Control::SetAckRule { volume: spec.id, ack, away: away.unwrap_or(spec.away) }))
            .await
    }

    /// Deletes a volume. Returns when that is durable.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn delete_volume(&self, volume: &VolumeKey) -> Result<(), EngineError> {
        let id = self.spec(volume)?.id;
        let submitted = self.decide(id, |spec| Ok(Control::DeleteVolume { volume: spec.id }))?;
        self.settle(submitted, Rule::Staged).await?;
        Ok(())
    }

    async fn change(
        &self,
        volume: &VolumeKey,
        control: impl FnOnce(&VolumeSpec) -> Result<Control, EngineError>,
    ) -> Result<VolumeSpec, EngineError> {
        let id = self.spec(volume)?.id;
        let submitted = self.decide(id, control)?;
        self.settle(submitted, Rule::Staged).await?;
        self.spec(&VolumeKey::Id(id))
    }

    fn decide(
        &self,
        id: VolumeId,
        control: impl FnOnce(&VolumeSpec) -> Result<Control, EngineError>,
    ) -> Result<Submitted, Decided> {
        self.inner.store.submit_decided(unix_ms(), |state: &NodeState| {
            let spec = state.volumes.get(&id).ok_or_else(|| EngineError::NoVolume { volume: id.to_string() });
            let spec = spec.map_err(Decided::Engine)?;
            Ok((spec.group, control(spec).map_err(Decided::Engine)?))
        })
    }

    /// All volumes, by id.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeSpec> {
        self.inner.store.with_state(|s| s.volumes.values().cloned().collect())
    }

    /// One volume.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn spec(&self, volume: &VolumeKey) -> Result<VolumeSpec, EngineError> {
        self.inner.standing.check()?;
        let spec = self.inner.store.with_state(|state| match volume {
            VolumeKey::Id(id) => state.volumes.get(id).cloned(),
            VolumeKey::Name(name) => state.volume_by_name(name).cloned(),
        });
        spec.ok_or_else(|| EngineError::NoVolume { volume: volume.to_string() })
    }
}

/// A valid write of whole blocks with a checksum that fits: its first block and what becomes of them. Anything else is
/// for the longer way, which says what is wrong.
fn whole_blocks(spec: &VolumeSpec, request: &WriteRequest) -> Option<(u64, Change)> {
    let WriteKind::Data(data) = &request.kind else { return None };
    let block_bytes = u64::from(spec.block_size.bytes());
    let length = data.len() as u64;
    if !request.offset_bytes.is_multiple_of(block_bytes) || !length.is_multiple_of(block_bytes) {
        return None;
    }
    check_client(request.client.as_ref()).ok()?;
    check_range(spec, request.offset_bytes, length).ok()?;
    let crcs = record::block_crcs(data, spec.block_size);
    let fits = match (request.crc32c, &crcs[..]) {
        (None, _) => true,
        // The checksum of one block is that of the request: one pass over the data.
        (Some(expected), [one]) => expected == *one,
        (Some(expected), _) => expected == crc32c(data),
    };
    fits.then(|| (request.offset_bytes / block_bytes, Change::Write { data: data.clone(), crcs }))
}

/// What a decision about the catalogue refuses.
enum Decided {
    Engine(EngineError),
    Submit(SubmitError),
}

impl From<SubmitError> for Decided {
    fn from(error: SubmitError) -> Self {
        Self::Submit(error)
    }
}

impl From<Decided> for EngineError {
    fn from(decided: Decided) -> Self {
        match decided {
            Decided::Engine(error) => error,
            Decided::Submit(SubmitError::StagingFull { span, capacity, .. }) => {
                Self::StagingFull { span_bytes: span, capacity_bytes: capacity, waited_ms: 0 }
            }
            Decided::Submit(error) => Self::Storage { message: error.to_string() },
        }
    }
}

fn of_submit(error: SubmitError, spec: &VolumeSpec, client: Option<&ClientSequence>, waited: Duration) -> EngineError {
    match error {
        SubmitError::Failed(failed) => EngineError::Storage { message: failed.0 },
        SubmitError::NotPrimary => EngineError::Role { why: error.to_string() },
        SubmitError::NoVolume(_) => EngineError::NoVolume { volume: spec.name.clone() },
        SubmitError::Restoring(_) => EngineError::Restoring { volume: spec.name.clone() },
        SubmitError::OutOfRange { first, end, blocks } => out_of_range(spec, first, end, blocks),
        SubmitError::Shape { .. } => EngineError::Invalid { field: "data", why: error.to_string() },
        SubmitError::TooLarge { needed, max } => EngineError::TooLarge { bytes: needed, limit_bytes: max },
        SubmitError::SequenceTooOld { sequence, highest } => EngineError::SequenceTooOld {
            client: client.map_or_else(String::new, |c| c.client.clone()),
            sequence,
            newest: highest,
            window: SEQUENCE_WINDOW,
        },
        SubmitError::Space(space) => {
            let segment = u64::from(spec.segment_bytes);
            EngineError::NoSpace {
                needed_bytes: space.needed * segment,
                free_bytes: space.free.saturating_sub(space.reserved) * segment,
            }
        }
        SubmitError::Level(level) => level.into(),
        SubmitError::StagingFull { span, capacity, .. } => {
            EngineError::StagingFull { span_bytes: span, capacity_bytes: capacity, waited_ms: millis(waited) }
        }
        SubmitError::LaneFull { lane, held, share } => {
            EngineError::LaneFull { lane, held_bytes: held, share_bytes: share, waited_ms: millis(waited) }
        }
    }
}

fn of_read(error: ReadFailure, spec: &VolumeSpec) -> EngineError {
    match error {
        ReadFailure::NoVolume(_) => EngineError::NoVolume { volume: spec.name.clone() },
        ReadFailure::Restoring(_) => EngineError::Restoring { volume: spec.name.clone() },
        ReadFailure::OutOfRange { first, end, blocks } => out_of_range(spec, first, end, blocks),
        ReadFailure::Damaged { block, .. } => EngineError::Damaged { volume: spec.name.clone(), block },
        ReadFailure::Submit(error) => of_submit(error, spec, None, Duration::ZERO),
        ReadFailure::Failed(_) | ReadFailure::Pool(_) | ReadFailure::Io(_) | ReadFailure::Readers => {
            EngineError::Storage { message: error.to_string() }
        }
    }
}

fn of_shrink(error: ShrinkError, spec: &VolumeSpec) -> EngineError {
    let refused = |why: String| EngineError::Shrink { volume: spec.name.clone(), why };
    match error {
        ShrinkError::Data { block, .. } => {
            let at = block * u64::from(spec.block_size.bytes());
            refused(format!("there is data behind the new end, the first at byte {at}; discard it, or ask for more"))
        }
        ShrinkError::NotLarger(_) => refused("somebody else has just resized it; look at its size".into()),
        ShrinkError::Busy(_) => {
            let what = "it is written behind the new end, or volumes and snapshots change";
            refused(format!("{what}, each time it is looked at; stop that and try again"))
        }
        ShrinkError::Read(error) => of_read(error, spec),
        ShrinkError::Submit(error) => of_submit(error, spec, None, Duration::ZERO),
    }
}

fn out_of_range(spec: &VolumeSpec, first: u64, end: u64, blocks: u64) -> EngineError {
    let block_bytes = u64::from(spec.block_size.bytes());
    EngineError::OutOfRange {
        volume: spec.name.clone(),
        offset_bytes: first * block_bytes,
        length_bytes: (end - first) * block_bytes,
        size_bytes: blocks * block_bytes,
    }
}

/// A part of a range of zeros: whole blocks, or a part of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ZeroPiece {
    offset: u64,
    length: u64,
    whole: bool,
}

fn zero_pieces(offset: u64, length: u64, block_bytes: u64) -> Vec<ZeroPiece> {
    let end = offset + length;
    let (first, last) = (offset.div_ceil(block_bytes), end / block_bytes);
    if first > last {
        return vec![ZeroPiece { offset, length, whole: false }];
    }
    let mut pieces = Vec::new();
    if offset < first * block_bytes {
        pieces.push(ZeroPiece { offset, length: first * block_bytes - offset, whole: false });
    }
    let mut at = first;
    while at < last {
        let count = (last - at).min(ZERO_BLOCKS_MAX);
        pieces.push(ZeroPiece { offset: at * block_bytes, length: count * block_bytes, whole: true });
        at += count;
    }
    if last * block_bytes < end {
        pieces.push(ZeroPiece { offset: last * block_bytes, length: end - last * block_bytes, whole: false });
    }
    pieces
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn check_block_size(block_bytes: u32, segment_bytes: u32) -> Result<BlockSize, EngineError> {
    let block_bytes = if block_bytes == 0 { 4096 } else { block_bytes };
    let block_size = BlockSize::new(block_bytes).ok_or_else(|| EngineError::Invalid {
        field: "block_bytes",
        why: format!("{block_bytes} is not a power of two from 512 to 65536"),
    })?;
    if segment_bytes / block_bytes > MAX_BLOCKS_PER_SEGMENT {
        return Err(EngineError::Invalid {
            field: "block_bytes",
            why: format!(
                "a segment of {segment_bytes} bytes (pool.segment) holds at most {MAX_BLOCKS_PER_SEGMENT} blocks; ask \
                 for blocks of at least {} bytes",
                segment_bytes / MAX_BLOCKS_PER_SEGMENT
            ),
        });
    }
    Ok(block_size)
}

fn check_size(size_bytes: u64, block_size: BlockSize) -> Result<(), EngineError> {
    let block_bytes = block_size.bytes();
    if size_bytes == 0 || !size_bytes.is_multiple_of(u64::from(block_bytes)) || size_bytes > VOLUME_BYTES_MAX {
        let why = format!("{size_bytes} is not a positive multiple of the block size {block_bytes}, or above 1 EiB");
        return Err(EngineError::Invalid { field: "size_bytes", why });
    }
    Ok(())
}

fn check_range(spec: &VolumeSpec, offset_bytes: u64, length_bytes: u64) -> Result<(), EngineError> {
    if length_bytes == 0 {
        return Err(EngineError::Invalid { field: "length_bytes", why: "is 0; name at least one byte".into() });
    }
    if offset_bytes.checked_add(length_bytes).is_none_or(|end| end > spec.size_bytes) {
        let (volume, size_bytes) = (spec.name.clone(), spec.size_bytes);
        return Err(EngineError::OutOfRange { volume, offset_bytes, length_bytes, size_bytes });
    }
    Ok(())
}

fn check_client(client: Option<&ClientSequence>) -> Result<(), EngineError> {
    match client {
        Some(c) if c.client.is_empty() || c.client.len() > CLIENT_ID_BYTES_MAX => Err(EngineError::Invalid {
            field: "client_id",
            why: format!("has {} bytes; use 1 to {CLIENT_ID_BYTES_MAX}", c.client.len()),
        }),
        Some(c) if c.sequence == 0 => {
            Err(EngineError::Invalid { field: "sequence", why: "is 0; count requests from 1".into() })
        }
        _ => Ok(()),
    }
}

fn check_name(field: &'static str, name: &str) -> Result<(), EngineError> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let ok = (1..=63).contains(&name.len())
        && name.starts_with(good)
        && name.chars().all(|c| good(c) || matches!(c, '-' | '_' | '.'));
    if ok {
        return Ok(());
    }
    let why = format!("{name:?} is not 1 to 63 of a-z, 0-9, '-', '_' and '.', starting with a letter or digit");
    Err(EngineError::Invalid { field, why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_split_at_blocks_and_cover_the_range() {
        for (offset, length) in [(0, 4096), (1, 10), (4000, 200), (4096, 8192), (100, 20000), (4095, 2)] {
            let pieces = zero_pieces(offset, length, 4096);
            let mut at = offset;
            for piece in &pieces {
                assert_eq!(piece.offset, at, "{offset}+{length}");
                let aligned = piece.offset % 4096 == 0 && piece.length % 4096 == 0;
                assert_eq!(piece.whole, aligned, "{offset}+{length}");
                assert!(piece.whole || piece.offset / 4096 == (piece.offset + piece.length - 1) / 4096);
                at += piece.length;
            }
            assert_eq!(at, offset + length);
        }
    }
}
