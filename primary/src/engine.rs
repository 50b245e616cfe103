//! The engine: what clients ask, in terms of the store.
//!
//! A request takes a permit of bytes, is given its LSN (which is its order), and is answered when its volume's rule
//! allows. Requests wait for space in the staging area before they have an LSN, for a bounded time; then they are
//! refused. Nothing is queued without a permit.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use thiserror::Error;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, timeout_at},
};
use understudy_common::{
    checksum::crc32c,
    record::{self, CLIENT_ID_BYTES_MAX, Control},
    state::{NodeState, VOLUMES_MAX},
    store::{Change, Marks, ModifyError, ReadFailure, Store, SubmitError, Submitted},
    types::{AckRule, AwayRule, BlockRange, BlockSize, GroupId, Lsn, Position, VolumeId, VolumeSpec},
};

pub use understudy_common::record::ClientSequence;

/// Blocks that one record of zeros covers at most: 1 GiB of 4 KiB blocks.
const ZERO_BLOCKS_MAX: u64 = 1 << 18;
/// Largest volume: 16 EiB would overflow byte offsets on the way.
const VOLUME_BYTES_MAX: u64 = 1 << 60;

/// Bytes in flight that a request may hold.
#[derive(Debug)]
pub struct Permit {
    _bytes: OwnedSemaphorePermit,
}

/// A write that has its LSN.
#[derive(Debug)]
pub struct Ticket {
    submitted: Submitted,
    rule: AckRule,
    deadline: Instant,
    _permit: Option<Permit>,
}

impl Ticket {
    /// Until when it may wait for its acknowledgement.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }
}

/// Bounds on what clients may ask.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Payload of one request.
    pub message_bytes: u64,
    /// Payload of all requests that are not answered.
    pub in_flight_bytes: u64,
    /// How long a request waits for room.
    pub queue_wait: Duration,
    /// How long a write waits for its acknowledgement.
    pub deadline: Duration,
    /// Reads stay on the calling thread: for simulated disks.
    pub inline_reads: bool,
}

impl EngineError {
    fn of_submit(error: SubmitError, spec: &VolumeSpec, client: Option<&ClientSequence>, waited: Duration) -> Self {
        let waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        match error {
            SubmitError::Failed(failed) => Self::Failed { why: failed.to_string() },
            SubmitError::NoVolume(_) => Self::NoVolume { volume: spec.name.clone() },
            SubmitError::OutOfRange { first, end, blocks } => {
                let block_bytes = u64::from(spec.block_size.bytes());
                Self::OutOfRange {
                    volume: spec.name.clone(),
                    offset_bytes: first * block_bytes,
                    length_bytes: (end - first) * block_bytes,
                    size_bytes: blocks * block_bytes,
                }
            }
            SubmitError::Shape { .. } => Self::Invalid { field: "data", why: error.to_string() },
            SubmitError::TooLarge { needed, max } => Self::TooLarge { bytes: needed, limit_bytes: max },
            SubmitError::SequenceTooOld { sequence, highest } => Self::SequenceTooOld {
                client: client.map_or_else(String::new, |c| c.client.clone()),
                sequence,
                newest: highest,
                window: SEQUENCE_WINDOW,
            },
            SubmitError::Space(space) => {
                let segment = u64::from(spec.segment_bytes);
                Self::NoSpace {
                    needed_bytes: space.needed * segment,
                    free_bytes: space.free.saturating_sub(space.reserved) * segment,
                }
            }
            SubmitError::StagingFull { span, capacity, .. } => {
                Self::StagingFull { span_bytes: span, capacity_bytes: capacity, waited_ms }
            }
        }
    }

    fn of_read(error: ReadFailure, spec: &VolumeSpec) -> Self {
        match error {
            ReadFailure::NoVolume(_) => Self::NoVolume { volume: spec.name.clone() },
            ReadFailure::OutOfRange { first, end, blocks } => {
                let no_wait = Duration::ZERO;
                Self::of_submit(SubmitError::OutOfRange { first, end, blocks }, spec, None, no_wait)
            }
            ReadFailure::Damaged { block, .. } => Self::DataLoss {
                volume: spec.name.clone(),
                offset_bytes: block * u64::from(spec.block_size.bytes()),
            },
            ReadFailure::Submit(error) => Self::of_submit(error, spec, None, Duration::ZERO),
            ReadFailure::Failed(_) | ReadFailure::Pool(_) | ReadFailure::Io(_) | ReadFailure::Readers => {
                Self::Failed { why: error.to_string() }
            }
        }
    }
}

/// Why a change was not admitted, before it is known how long it waits.
enum Refused {
    Submit(SubmitError),
    Engine(EngineError),
}

struct Inner {
    store: Arc<Store>,
    marks: watch::Receiver<Marks>,
    permits: Arc<Semaphore>,
    limits: Limits,
    attached: watch::Sender<bool>,
    draining: AtomicBool,
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
    pub fn new(store: Arc<Store>, limits: Limits) -> Self {
        let permits = usize::try_from(limits.in_flight_bytes.min(u64::from(u32::MAX))).expect("32 bits");
        let inner = Inner {
            marks: store.marks(),
            store,
            permits: Arc::new(Semaphore::new(permits)),
            limits,
            attached: watch::channel(false).0,
            draining: AtomicBool::new(false),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The store below.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.inner.store
    }

    /// The bounds.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// The watermarks, for whoever waits for several tickets.
    #[must_use]
    pub fn marks(&self) -> watch::Receiver<Marks> {
        self.inner.marks.clone()
    }

    /// The link's driver says whether a session is open.
    pub fn set_attached(&self, attached: bool) {
        self.inner.attached.send_replace(attached);
    }

    /// Refuses new requests from now on; what has an LSN is still answered.
    pub fn drain(&self) {
        self.inner.draining.store(true, Ordering::Release);
    }

    /// True after [`Engine::drain`].
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.inner.draining.load(Ordering::Acquire)
    }

    /// Takes a permit for a request of so many bytes.
    ///
    /// # Errors
    /// If the request is larger than the limit, or no room came in time.
    pub async fn admit(&self, bytes: u64) -> Result<Permit, EngineError> {
        let limits = &self.inner.limits;
        if bytes > limits.message_bytes {
            return Err(EngineError::Invalid(format!(
                "{bytes} bytes are more than one request may carry ({} bytes): send smaller pieces",
                limits.message_bytes
            )));
        }
        if self.is_draining() {
            return Err(EngineError::Draining);
        }
        let weight = u32::try_from(bytes.max(512)).expect("checked above");
        let permits = Arc::clone(&self.inner.permits);
        let permit = match Arc::clone(&permits).try_acquire_many_owned(weight) {
            Ok(permit) => permit,
            Err(_) => tokio::time::timeout(limits.queue_wait, permits.acquire_many_owned(weight))
                .await
                .map_err(|_| {
                    EngineError::Full(format!(
                        "{} bytes of requests are waiting for their acknowledgement, the limit ([limits] in_flight): \
                         send slower or raise it",
                        limits.in_flight_bytes
                    ))
                })?
                .expect("the semaphore is never closed"),
        };
        Ok(Permit { _bytes: permit })
    }

    /// Gives a request its LSN. Calls one behind the other take effect in that order.
    ///
    /// # Errors
    /// See [`EngineError`]; nothing was changed then.
    pub async fn submit(&self, permit: Permit, request: WriteRequest) -> Result<Ticket, EngineError> {
        let spec = self.spec(&request.volume)?;
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
        let until = Instant::now() + self.inner.limits.queue_wait;
        if spec.ack == AckRule::Both && spec.away == AwayRule::Block {
            self.wait_attached(until).await?;
        }
        let submitted = loop {
            let mut marks = self.inner.marks.clone();
            marks.mark_unchanged();
            if self.inner.store.queue_bytes() > self.inner.store.config().pending_bytes {
                self.wait_room(&mut marks, until, "blocks are written to disk slower than they arrive").await?;
                continue;
            }
            match self.try_submit(&spec, &request) {
                Err(EngineError::Full(why)) => {
                    self.inner.store.request_checkpoint();
                    self.inner.store.request_growth();
                    self.wait_room(&mut marks, until, &why).await?;
                }
                other => break other?,
            }
        };
        let deadline = Instant::now() + self.inner.limits.deadline;
        Ok(Ticket { submitted, rule: spec.ack, deadline, _permit: Some(permit) })
    }

    async fn wait_attached(&self, until: Instant) -> Result<(), EngineError> {
        let mut attached = self.inner.attached.subscribe();
        let waited = timeout_at(until, attached.wait_for(|a| *a)).await;
        match waited {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(EngineError::BackupAway),
        }
    }

    async fn wait_room(
        &self,
        marks: &mut watch::Receiver<Marks>,
        until: Instant,
        why: &str,
    ) -> Result<(), EngineError> {
        if self.is_draining() {
            return Err(EngineError::Draining);
        }
        match timeout_at(until, marks.changed()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(EngineError::Full(why.to_owned())),
        }
    }

    fn try_submit(&self, spec: &VolumeSpec, request: &WriteRequest) -> Result<Submitted, EngineError> {
        match &request.kind {
            WriteKind::Data(data) => self.submit_data(spec, request.offset_bytes, data, request.client.as_ref()),
            WriteKind::Zeroes { length_bytes } => self.submit_zeros(spec, request, *length_bytes, true),
            WriteKind::Discard { length_bytes } => self.submit_zeros(spec, request, *length_bytes, false),
        }
    }

    fn submit_data(
        &self,
        spec: &VolumeSpec,
        offset: u64,
        data: &Bytes,
        client: Option<&ClientSequence>,
    ) -> Result<Submitted, EngineError> {
        let block_bytes = u64::from(spec.block_size.bytes());
        let end = offset + data.len() as u64;
        if offset.is_multiple_of(block_bytes) && end.is_multiple_of(block_bytes) {
            let crcs = record::block_crcs(data, spec.block_size);
            let change = Change::Write { data: data.clone(), crcs };
            return Ok(self.inner.store.submit(spec.id, offset / block_bytes, change, client.cloned(), unix_ms())?);
        }
        let first = offset / block_bytes;
        let range = BlockRange { volume: spec.id, first, count: end.div_ceil(block_bytes) - first };
        let at = usize::try_from(offset - first * block_bytes).expect("inside a block");
        let modify = |blocks: &mut [u8]| blocks[at..at + data.len()].copy_from_slice(data);
        Ok(self.inner.store.submit_modified(range, client, unix_ms(), &modify)?)
    }

    /// Zeros: partial blocks at the edges are written (or, for a discard, left), whole blocks give their space back.
    /// Of several records the last carries the client's sequence, so that a repetition repeats all or nothing.
    fn submit_zeros(
        &self,
        spec: &VolumeSpec,
        request: &WriteRequest,
        length: u64,
        edges: bool,
    ) -> Result<Submitted, EngineError> {
        if let Some(client) = &request.client
            && let Some(lsn) = self.applied_sequence(client)?
        {
            let position = Position { generation: self.inner.store.identity().generation, lsn };
            return Ok(Submitted { lsn, position, group: spec.group, duplicate: true });
        }
        let block_bytes = u64::from(spec.block_size.bytes());
        let (offset, end) = (request.offset_bytes, request.offset_bytes + length);
        let (first, last) = (offset.div_ceil(block_bytes), end / block_bytes);
        let mut pieces = Vec::new();
        if first > last {
            // Inside one block.
            pieces.push((offset, length, true));
        } else {
            if offset < first * block_bytes {
                pieces.push((offset, first * block_bytes - offset, true));
            }
            let mut at = first;
            while at < last {
                let count = (last - at).min(ZERO_BLOCKS_MAX);
                pieces.push((at * block_bytes, count * block_bytes, false));
                at += count;
            }
            if last * block_bytes < end {
                pieces.push((last * block_bytes, end - last * block_bytes, true));
            }
        }
        if !edges {
            pieces.retain(|(.., partial)| !partial);
        }
        let count = pieces.len();
        let mut submitted = None;
        for (n, (offset, length, partial)) in pieces.into_iter().enumerate() {
            let client = request.client.as_ref().filter(|_| n + 1 == count);
            submitted = Some(if partial {
                let zeros = vec![0; usize::try_from(length).expect("inside a block")].into();
                self.submit_data(spec, offset, &zeros, client)?
            } else {
                let change = Change::Zero { count: length / block_bytes };
                self.inner.store.submit(spec.id, offset / block_bytes, change, client.cloned(), unix_ms())?
            });
        }
        // A discard of less than a block changes nothing: it is as durable as what came before it.
        Ok(submitted.unwrap_or_else(|| self.newest(spec)))
    }

    fn applied_sequence(&self, client: &ClientSequence) -> Result<Option<Lsn>, EngineError> {
        use understudy_common::state::SequenceCheck;
        match self.inner.store.with_state(|s| s.check_sequence(client)) {
            SequenceCheck::Fresh => Ok(None),
            SequenceCheck::Applied(lsn) => Ok(Some(lsn)),
            SequenceCheck::TooOld { highest } => {
                Err(SubmitError::SequenceTooOld { sequence: client.sequence, highest }.into())
            }
        }
    }

    /// The newest record of the volume's group.
    fn newest(&self, spec: &VolumeSpec) -> Submitted {
        let position =
            self.inner.store.with_state(|s| s.groups.get(&spec.group).map_or(Position::default(), |g| g.position));
        Submitted { lsn: position.lsn, position, group: spec.group, duplicate: false }
    }

    /// Waits until a write is as durable as its rule promises.
    ///
    /// # Errors
    /// If the store fails, or the acknowledgement does not come in time: the outcome is unknown then.
    pub async fn wait(&self, ticket: Ticket) -> Result<WriteAck, EngineError> {
        let mut marks = self.inner.marks.clone();
        loop {
            marks.mark_unchanged();
            if let Some(result) = self.poll_settled(&ticket) {
                return result;
            }
            match timeout_at(ticket.deadline, marks.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(EngineError::OutcomeUnknown(ticket.submitted.position)),
            }
        }
    }

    /// The acknowledgement of a write if it may be given now.
    #[must_use]
    pub fn poll_settled(&self, ticket: &Ticket) -> Option<Result<WriteAck, EngineError>> {
        let marks = *self.inner.marks.borrow();
        let Submitted { lsn, position, group, duplicate } = ticket.submitted;
        let durable = lsn <= marks.durable;
        let settled = durable
            && match ticket.rule {
                AckRule::Staged => true,
                AckRule::Primary => lsn <= marks.placed || duplicate && lsn <= marks.applied,
                AckRule::Both => self.inner.store.retained_of(group).holds(lsn),
            };
        if settled {
            let both = ticket.rule == AckRule::Both;
            return Some(Ok(WriteAck { position, both, duplicate }));
        }
        if marks.failed {
            let why = self.inner.store.failure().unwrap_or_default();
            return Some(Err(EngineError::Failed(format!("the store has failed: {why}"))));
        }
        None
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
            return Err(EngineError::Invalid(format!(
                "{length_bytes} bytes are more than one answer may carry ({} bytes): read smaller pieces, or use \
                 ReadBlocks",
                self.inner.limits.message_bytes
            )));
        }
        let block_bytes = u64::from(spec.block_size.bytes());
        let first = offset_bytes / block_bytes;
        let count = (offset_bytes + length_bytes).div_ceil(block_bytes) - first;
        let (store, id) = (Arc::clone(&self.inner.store), spec.id);
        let read = self.blocking(move || store.read(id, first, count)).await?;
        self.wait_seen(&spec, read.seen, read.seen_both).await?;
        let at = usize::try_from(offset_bytes - first * block_bytes).expect("inside a block");
        let data = read.data.slice(at..at + usize::try_from(length_bytes).expect("bounded"));
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
        let (hole, count) = self.blocking(move || store.extent(id, first, max)).await?;
        let length = ((first + count) * block_bytes - offset_bytes).min(max_bytes.max(1));
        if hole {
            let content = ReadContent::Zeros(length);
            return Ok(ReadPiece { offset_bytes, content, crc32c: 0, position });
        }
        let (data, crc32c) = self.read(&VolumeKey::Id(spec.id), offset_bytes, length).await?;
        Ok(ReadPiece { offset_bytes, content: ReadContent::Data(data), crc32c, position })
    }

    async fn blocking<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> Result<T, ReadFailure> + Send + 'static,
    ) -> Result<T, EngineError> {
        if self.inner.limits.inline_reads {
            return Ok(read()?);
        }
        let done = tokio::task::spawn_blocking(read).await;
        Ok(done.map_err(|error| EngineError::Failed(format!("a read was ended: {error}")))??)
    }

    /// A read may be answered when the writes it saw may be.
    async fn wait_seen(&self, spec: &VolumeSpec, seen: Lsn, seen_both: Lsn) -> Result<(), EngineError> {
        let position = |lsn| Position { generation: 0, lsn };
        let until = Instant::now() + self.inner.limits.deadline;
        for (lsn, rule) in [(seen, AckRule::Staged), (seen_both, AckRule::Both)] {
            if lsn > Lsn::ZERO {
                let submitted = Submitted { lsn, position: position(lsn), group: spec.group, duplicate: false };
                self.wait(Ticket { submitted, rule, deadline: until, _permit: None }).await?;
            }
        }
        Ok(())
    }

    /// Returns when everything submitted to the volume's group before is durable by its rule.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn flush(&self, volume: &VolumeKey) -> Result<WriteAck, EngineError> {
        let spec = self.spec(volume)?;
        let submitted = self.newest(&spec);
        let rule = if spec.ack == AckRule::Primary { AckRule::Staged } else { spec.ack };
        let deadline = Instant::now() + self.inner.limits.deadline;
        self.wait(Ticket { submitted, rule, deadline, _permit: None }).await
    }

    /// Makes a volume. Returns when it is durable.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn create_volume(
        &self,
        name: &str,
        group: &str,
        size_bytes: u64,
        block_bytes: u32,
        ack: AckRule,
        away: AwayRule,
    ) -> Result<VolumeSpec, EngineError> {
        check_name("volume", name)?;
        let group_name = if group.is_empty() { name } else { group };
        check_name("group", group_name)?;
        let block_bytes = if block_bytes == 0 { 4096 } else { block_bytes };
        let block_size = BlockSize::new(block_bytes).ok_or_else(|| {
            EngineError::Invalid(format!("block size {block_bytes} is not a power of two from 512 to 65536"))
        })?;
        let segment_bytes = self.inner.store.config().pool.segment_bytes;
        if size_bytes == 0 || !size_bytes.is_multiple_of(u64::from(block_bytes)) || size_bytes > VOLUME_BYTES_MAX {
            return Err(EngineError::Invalid(format!(
                "size {size_bytes} is not a positive multiple of the block size {block_bytes}, or above 1 EiB"
            )));
        }
        let mut made = None;
        let submitted = self.inner.store.submit_decided(unix_ms(), |state: &NodeState| {
            if state.volume_by_name(name).is_some() {
                return Err(EngineError::VolumeExists(name.to_owned()));
            }
            if state.volumes.len() >= VOLUMES_MAX {
                return Err(EngineError::Full(format!("there are {VOLUMES_MAX} volumes, the most a node serves")));
            }
            let group =
                state.groups.values().find(|g| g.name == group_name).map_or(GroupId(state.last_group.0 + 1), |g| g.id);
            let spec = VolumeSpec {
                id: VolumeId(state.last_volume.0 + 1),
                name: name.to_owned(),
                group,
                group_name: group_name.to_owned(),
                size_bytes,
                block_size,
                segment_bytes,
                ack,
                away,
            };
            made = Some(spec.clone());
            Ok((group, Control::CreateVolume { spec }))
        })?;
        self.wait_control(submitted).await?;
        Ok(made.expect("decided above"))
    }

    /// Grows a volume. Returns when that is durable.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn resize_volume(&self, volume: &VolumeKey, size_bytes: u64) -> Result<VolumeSpec, EngineError> {
        let id = self.spec(volume)?.id;
        let submitted = self.inner.store.submit_decided(unix_ms(), |state: &NodeState| {
            let spec = state.volumes.get(&id).ok_or_else(|| EngineError::NoVolume(id.to_string()))?;
            let block_bytes = u64::from(spec.block_size.bytes());
            if !size_bytes.is_multiple_of(block_bytes) || size_bytes > VOLUME_BYTES_MAX {
                return Err(EngineError::Invalid(format!(
                    "size {size_bytes} is not a multiple of the block size {block_bytes}, or above 1 EiB"
                )));
            }
            if size_bytes < spec.size_bytes {
                return Err(EngineError::Precondition(format!(
                    "volume {} has {} bytes and cannot be shrunk to {size_bytes}",
                    spec.name, spec.size_bytes
                )));
            }
            Ok((spec.group, Control::ResizeVolume { volume: id, size_bytes }))
        })?;
        self.wait_control(submitted).await?;
        self.info(&VolumeKey::Id(id))
    }

    /// Deletes a volume. Returns when that is durable.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn delete_volume(&self, volume: &VolumeKey) -> Result<(), EngineError> {
        let id = self.spec(volume)?.id;
        let submitted = self.inner.store.submit_decided(unix_ms(), |state: &NodeState| {
            let spec = state.volumes.get(&id).ok_or_else(|| EngineError::NoVolume(id.to_string()))?;
            Ok::<_, EngineError>((spec.group, Control::DeleteVolume { volume: id }))
        })?;
        self.wait_control(submitted).await
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
        let id = self.spec(volume)?.id;
        let submitted = self.inner.store.submit_decided(unix_ms(), |state: &NodeState| {
            let spec = state.volumes.get(&id).ok_or_else(|| EngineError::NoVolume(id.to_string()))?;
            let away = away.unwrap_or(spec.away);
            Ok::<_, EngineError>((spec.group, Control::SetAckRule { volume: id, ack, away }))
        })?;
        self.wait_control(submitted).await?;
        self.info(&VolumeKey::Id(id))
    }

    async fn wait_control(&self, submitted: Submitted) -> Result<(), EngineError> {
        let deadline = Instant::now() + self.inner.limits.deadline;
        self.wait(Ticket { submitted, rule: AckRule::Staged, deadline, _permit: None }).await.map(|_| ())
    }

    /// All volumes, by id.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeSpec> {
        self.inner.store.with_state(|s| s.volumes.values().cloned().collect())
    }

    /// Groups with the names of their volumes.
    #[must_use]
    pub fn groups(&self) -> BTreeMap<GroupId, (String, Vec<String>)> {
        self.inner.store.with_state(|s| {
            s.groups
                .values()
                .map(|g| {
                    let names = g.volumes.iter().filter_map(|v| s.volumes.get(v)).map(|v| v.name.clone()).collect();
                    (g.id, (g.name.clone(), names))
                })
                .collect()
        })
    }

    /// One volume.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn info(&self, volume: &VolumeKey) -> Result<VolumeSpec, EngineError> {
        self.spec(volume)
    }

    fn spec(&self, volume: &VolumeKey) -> Result<VolumeSpec, EngineError> {
        self.inner.store.with_state(|state| match volume {
            VolumeKey::Id(id) => state.volumes.get(id).cloned().ok_or_else(|| EngineError::NoVolume(id.to_string())),
            VolumeKey::Name(name) => {
                state.volume_by_name(name).cloned().ok_or_else(|| EngineError::NoVolume(format!("{name:?}")))
            }
        })
    }
}

fn check_range(spec: &VolumeSpec, offset: u64, length: u64) -> Result<(), EngineError> {
    if length == 0 {
        return Err(EngineError::Invalid("the length is 0: name at least one byte".into()));
    }
    let end = offset.saturating_add(length);
    if end > spec.size_bytes {
        return Err(EngineError::OutOfRange { offset, end, size: spec.size_bytes });
    }
    Ok(())
}

fn check_client(client: Option<&ClientSequence>) -> Result<(), EngineError> {
    match client {
        Some(c) if c.client.is_empty() || c.client.len() > CLIENT_ID_BYTES_MAX => {
            Err(EngineError::Invalid(format!("client_id has {} bytes: use 1 to {CLIENT_ID_BYTES_MAX}", c.client.len())))
        }
        Some(c) if c.sequence == 0 => {
            Err(EngineError::Invalid("sequence is 0: a client counts its requests from 1".into()))
        }
        _ => Ok(()),
    }
}

fn check_name(what: &str, name: &str) -> Result<(), EngineError> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let ok = (1..=63).contains(&name.len())
        && name.starts_with(good)
        && name.chars().all(|c| good(c) || matches!(c, '-' | '_' | '.'));
    if ok {
        return Ok(());
    }
    Err(EngineError::Invalid(format!(
        "{what} name {name:?} is not 1 to 63 of a-z, 0-9, '-', '_' and '.', starting with a letter or digit"
    )))
}
