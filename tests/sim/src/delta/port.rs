//! How the simulation asks the stores about delta mode, and passes messages of a run on.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use rand::Rng;
use understudy_backup::{
    receiver::Receiver,
    run_receiver::{DigestJob, RunRefusal, When},
};
use understudy_common::{
    checksum::digest,
    delta::BlockSet,
    record::RunKind,
    state::{GroupMode, LanePlaces},
    store::{LayerReader, ReadFailure, Store},
    types::{GroupId, LayerId, Lsn, Position, Uid, VolumeId, VolumeSpec},
};
use understudy_primary::runner::{RunAnswer, RunRequest};
use understudy_proto::{seal::Sealed as _, v1};

use crate::{BLOCK, model::Stamp};

/// What a group of the primary is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Records from here on are retained until they are acknowledged.
    Continuous { from: Lsn },
    /// Writes mark the table.
    Tracking,
    /// As `Tracking`, and a run is open.
    Run(Open),
}

/// An open run of the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Open {
    /// The LSN of its cut.
    pub id: u64,
    pub kind: RunKind,
}

impl Open {
    /// The position of the image that it copies.
    pub fn cut(self) -> Lsn {
        Lsn(self.id)
    }
}

pub(crate) fn mode(store: &Store, group: GroupId) -> Option<Mode> {
    store.with_state(|state| {
        Some(match &state.groups.get(&group)?.mode {
            GroupMode::Continuous { from } => Mode::Continuous { from: *from },
            GroupMode::Delta { run: None, .. } => Mode::Tracking,
            GroupMode::Delta { run: Some(run), .. } => Mode::Run(Open { id: run.id, kind: run.kind }),
        })
    })
}

/// The groups of the primary, also those whose last volume is gone and that wait for a run.
pub(crate) fn groups(store: &Store) -> Vec<GroupId> {
    store.with_state(|state| state.groups.keys().copied().collect())
}

/// Snapshots that runs hold on this node.
pub(crate) fn run_layers(store: &Store) -> Vec<LayerId> {
    store.with_state(|state| {
        let readers: Vec<LayerId> = state.readers().collect();
        let of_user = |layer: &LayerId| state.snapshots.values().flat_map(|s| &s.layers).any(|(_, l)| l == layer);
        state.layers.keys().filter(|layer| !readers.contains(layer) && !of_user(layer)).copied().collect()
    })
}

/// Marked blocks of a volume: active or frozen.
pub(crate) fn marks(store: &Store, volume: VolumeId) -> BlockSet {
    let mut marks = store.active(volume);
    marks.union_with(&store.frozen(volume));
    marks
}

// --- the backup as a reader finds it

/// What the backup says of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The newest record of the image that a reader gets.
    pub position: Position,
    /// And of each of its lanes.
    pub lanes: LanePlaces,
    /// A run is open.
    pub in_run: bool,
    /// False until the first commit.
    pub consistent: bool,
}

/// `None` if it does not know the group.
pub fn view(store: &Store, group: GroupId) -> Option<View> {
    store.with_state(|state| {
        let group = state.groups.get(&group)?;
        let (position, lanes) = (group.position, group.lanes.clone());
        Some(View { position, lanes, in_run: group.run.is_some(), consistent: group.consistent })
    })
}

/// Reads the image of a volume on the backup: in a run, that of before it. `None` while the record that begins the run
/// may not be applied: a reader would wait.
pub(crate) fn read(store: &Arc<Store>, spec: &VolumeSpec) -> Option<Result<Bytes, ReadFailure>> {
    let applied = store.marks().borrow().applied.next() == store.next_lsn();
    (applied || store.replica_run(spec.group).is_none()).then(|| read_applied(store, spec))
}

/// The same where the record that begins the run is applied.
pub fn read_applied(store: &Arc<Store>, spec: &VolumeSpec) -> Result<Bytes, ReadFailure> {
    let run = store.replica_run(spec.group);
    let layer = run.and_then(|run| run.layers.iter().find(|(volume, _)| *volume == spec.id).map(|(_, layer)| *layer));
    match layer {
        Some(layer) => LayerReader::new(store, spec, layer).read(0, spec.block_count()),
        None => store.read(spec.id, 0, spec.block_count()).map(|read| read.data),
    }
}

// --- messages

/// What is sent to the backup of a run.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    Run(RunRequest),
    Abort(v1::AbortDeltaRequest),
}

impl Request {
    pub fn abort(session: Uid, group: GroupId, run: u64) -> Self {
        Self::Abort(v1::AbortDeltaRequest { session: Bytes::copy_from_slice(&session.0), group_id: group.0, run })
    }

    pub fn is_batch(&self) -> bool {
        matches!(self, Self::Run(RunRequest::Batch(_)))
    }

    /// As it arrives with a bit flipped; `None` if it is no message any more, or still the same.
    pub fn flipped(&self, rng: &mut impl Rng) -> Option<Self> {
        Some(Self::Run(match self {
            Self::Run(RunRequest::Begin(begin)) => RunRequest::Begin(flipped(begin, rng)?),
            Self::Run(RunRequest::Batch(batch)) => RunRequest::Batch(flipped(batch, rng)?),
            Self::Run(RunRequest::Digest(ask)) => RunRequest::Digest(flipped(ask, rng)?),
            Self::Run(RunRequest::Commit(commit)) => RunRequest::Commit(flipped(commit, rng)?),
            // It may end another run: that is always safe.
            Self::Abort(_) => return None,
        }))
    }

    /// True if both are batches that differ in nothing but the data of blocks.
    pub fn differs_in_data(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Run(RunRequest::Batch(a)), Self::Run(RunRequest::Batch(b))) => a.covered() == b.covered(),
            _ => false,
        }
    }

    pub fn begins(&self) -> Option<(GroupId, u64)> {
        match self {
            Self::Run(RunRequest::Begin(begin)) => Some((GroupId(begin.group_id), begin.run)),
            _ => None,
        }
    }
}

/// As [`Request::flipped`].
pub(crate) fn flipped_answer(answer: &RunAnswer, rng: &mut impl Rng) -> Option<RunAnswer> {
    Some(match answer {
        RunAnswer::Begin(begin) => RunAnswer::Begin(flipped(begin, rng)?),
        RunAnswer::Batch(batch) => RunAnswer::Batch(flipped(batch, rng)?),
        RunAnswer::Digest(digests) => RunAnswer::Digest(flipped(digests, rng)?),
        RunAnswer::Commit(commit) => RunAnswer::Commit(flipped(commit, rng)?),
    })
}

fn flipped<M: Message + Default + PartialEq>(message: &M, rng: &mut impl Rng) -> Option<M> {
    let mut bytes = message.encode_to_vec();
    let at = rng.random_range(0..bytes.len());
    bytes[at] ^= 1 << rng.random_range(0..8);
    // Some values have more than one form: true is any number but 0.
    M::decode(&bytes[..]).ok().filter(|damaged| damaged != message)
}

/// What the backup is to answer when it is durable up to `at`.
pub(crate) struct Reply {
    pub at: Lsn,
    body: Body,
}

enum Body {
    Ready(RunAnswer),
    /// Compared when the answer is given, which may be a while later.
    Digest(DigestJob),
    /// To who has given the run up.
    Nobody,
}

impl Reply {
    /// `None`: nobody waits for it.
    pub fn answer(self) -> Result<Option<RunAnswer>, RunRefusal> {
        match self.body {
            Body::Ready(answer) => Ok(Some(answer)),
            Body::Digest(job) => Ok(Some(RunAnswer::Digest(job.run()?))),
            Body::Nobody => Ok(None),
        }
    }
}

fn reply<T>(when: When<T>, wrap: impl Fn(T) -> RunAnswer) -> Reply {
    Reply { at: when.at, body: Body::Ready(wrap(when.answer)) }
}

/// Hands a message to the backup.
pub(crate) fn deliver(receiver: &mut Receiver, request: &Request, time: i64) -> Result<Reply, RunRefusal> {
    match request {
        Request::Run(RunRequest::Begin(begin)) => receiver.on_begin(begin).map(|a| reply(a, RunAnswer::Begin)),
        Request::Run(RunRequest::Batch(batch)) => receiver.on_batch(batch).map(|a| reply(a, RunAnswer::Batch)),
        Request::Run(RunRequest::Commit(commit)) => receiver.on_commit(commit).map(|a| reply(a, RunAnswer::Commit)),
        Request::Run(RunRequest::Digest(ask)) => {
            receiver.on_digest(ask.clone()).map(|job| Reply { at: Lsn::ZERO, body: Body::Digest(job) })
        }
        Request::Abort(abort) => receiver.on_abort(abort, time).map(|when| Reply { at: when.at, body: Body::Nobody }),
    }
}

/// Blocks that a message ships or compares, with what it says of them.
pub(crate) fn claims(request: &RunRequest) -> Result<Vec<(VolumeId, u64, Claim)>, String> {
    let mut claims = Vec::new();
    match request {
        RunRequest::Batch(batch) => {
            for extent in &batch.extents {
                let volume = VolumeId(extent.volume_id);
                match extent.content.as_ref().ok_or("an extent without content")? {
                    v1::delta_extent::Content::ZeroBlocks(count) => {
                        let blocks = extent.first_block..extent.first_block + count;
                        claims.extend(blocks.map(|block| (volume, block, Claim::Block(Some(Stamp(0))))));
                    }
                    v1::delta_extent::Content::Data(data) => {
                        let bytes = expand(data)?;
                        let blocks = (extent.first_block..).zip(bytes.chunks(BLOCK));
                        claims.extend(blocks.map(|(block, bytes)| (volume, block, Claim::Block(Stamp::of(bytes)))));
                    }
                }
            }
        }
        RunRequest::Digest(ask) => {
            let volume = VolumeId(ask.volume_id);
            for piece in &ask.pieces {
                let claim = Claim::Digest { blocks: piece.block_count, digest: piece.digest.clone() };
                claims.push((volume, piece.first_block, claim));
            }
        }
        RunRequest::Begin(_) | RunRequest::Commit(_) => {}
    }
    Ok(claims)
}

/// What a message says of a block.
pub(crate) enum Claim {
    /// Its content; `None` if no write ever made it.
    Block(Option<Stamp>),
    /// The digest of it and those behind it.
    Digest { blocks: u64, digest: Bytes },
}

impl Claim {
    /// True if `image`, from the claim's block on, is what it says.
    pub fn holds(&self, image: &[Stamp]) -> bool {
        match self {
            Self::Block(stamp) => stamp.is_some() && *stamp == image.first().copied(),
            Self::Digest { blocks, digest: said } => {
                let Some(image) = usize::try_from(*blocks).ok().and_then(|n| image.get(..n)) else { return false };
                let bytes: Vec<u8> = image.iter().flat_map(|stamp| stamp.fill()).collect();
                digest(&bytes)[..] == said[..]
            }
        }
    }
}

fn expand(data: &v1::DeltaData) -> Result<Bytes, String> {
    match data.compression() {
        v1::Compression::Unspecified => Ok(data.data.clone()),
        v1::Compression::Lz4 => {
            let out = lz4_flex::block::decompress(&data.data, data.block_crc32c.len() * BLOCK);
            out.map(Bytes::from).map_err(|e| e.to_string())
        }
    }
}

/// A request in a few words, for the trace.
pub(crate) fn brief(request: &RunRequest) -> String {
    match request {
        RunRequest::Begin(begin) => {
            format!("begin of run {} of group {} at {:?}", begin.run, begin.group_id, begin.cut)
        }
        RunRequest::Batch(batch) => {
            let extent = |e: &v1::DeltaExtent| {
                let content = match &e.content {
                    Some(v1::delta_extent::Content::Data(data)) => format!("{} blocks", data.block_crc32c.len()),
                    Some(v1::delta_extent::Content::ZeroBlocks(count)) => format!("{count} zeros"),
                    None => String::new(),
                };
                format!("{}/{}: {content}", e.volume_id, e.first_block)
            };
            let extents: Vec<String> = batch.extents.iter().map(extent).collect();
            format!("batch {} of opening {} of run {}: {extents:?}", batch.number, batch.opening, batch.run)
        }
        RunRequest::Digest(ask) => {
            let pieces: Vec<(u64, u64)> = ask.pieces.iter().map(|p| (p.first_block, p.block_count)).collect();
            format!("digests of run {} of volume {}: {pieces:?}", ask.run, ask.volume_id)
        }
        RunRequest::Commit(commit) => format!("commit of run {}", commit.run),
    }
}

/// The same of any message.
pub(crate) fn brief_request(request: &Request) -> String {
    match request {
        Request::Run(request) => brief(request),
        Request::Abort(abort) => format!("abort of run {}", abort.run),
    }
}

/// An answer in a few words.
pub(crate) fn brief_answer(answer: &RunAnswer) -> String {
    match answer {
        RunAnswer::Begin(begin) => {
            format!("begun: opening {}, {:?}, committed {}", begin.opening, begin.progress, begin.committed)
        }
        RunAnswer::Batch(batch) => format!("batch {} of run {}", batch.number, batch.run),
        RunAnswer::Digest(digests) => format!("same {:?}", digests.same),
        RunAnswer::Commit(commit) => format!("committed at {:?}", commit.position),
    }
}

/// True if everything of the group is marked: what an earlier backup had acknowledged is of no meaning.
pub(crate) fn is_full(store: &Store, group: GroupId) -> bool {
    store.with_state(|state| {
        state.groups.get(&group).is_some_and(|g| matches!(g.mode, GroupMode::Delta { full: true, .. }))
    })
}
