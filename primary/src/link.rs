//! The link to the backup: connects, attaches, drives the [`Sender`], and notices when the other side is gone.
//!
//! A peer may vanish without a reset (frozen, dropped packets, a new address behind the same name). Three clocks find
//! out: the time since anything was heard of it, HTTP/2 pings, and the age of the oldest record that was sent and not
//! answered.
//! Each attempt to connect resolves the name anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tracing::{info, warn};
use understudy_common::{
    config::LinkConfig,
    events::EventLog,
    history::Relation,
    lane::LANES_MAX,
    state::{GroupState, LanePlaces, Place},
    telemetry::Metrics,
    types::{GroupId, Lsn, Uid, VolumeId},
};
use understudy_proto::{
    convert::{self, OLD_COPY},
    v1::{self, replica_service_client::ReplicaServiceClient},
};

use crate::{
    engine::{Engine, unix_ms},
    pace::StreamPace,
    replicator::Attached,
    sender::{Held, Lost, Sender, Welcome},
    window::Window,
};

/// The protocol this version speaks.
const PROTOCOL: u32 = 1;
/// First pause after a failed attempt.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// How long a group that the backup refuses is left alone before a new session tries it again.
const HELD_RETRY: Duration = Duration::from_secs(5);
/// Payload that is handed to the transport in one go. More than a stream of writes takes in one go: a backup that falls
/// behind costs reading records back.
const CHUNK_BYTES: usize = 1 << 20;

/// A connection attempt.
pub type Connecting = Pin<Box<dyn Future<Output = Result<Channel, String>> + Send>>;

/// A heartbeat under way: its round trip, or why the link counts as lost.
type Beating = Pin<Box<dyn Future<Output = Result<Duration, String>> + Send>>;

/// How the link is doing.
#[derive(Debug, Clone)]
pub struct LinkView {
    /// "attached", "connecting", "refused" or "unconfigured".
    pub state: &'static str,
    /// Why it is not attached.
    pub reason: String,
    /// Since when, Unix milliseconds.
    pub since_unix_ms: i64,
    /// Of the last heartbeat.
    pub rtt: Duration,
    /// Records up to here were handed to the transport.
    pub sent: Lsn,
    /// Records sent and not answered.
    pub in_flight: usize,
    /// Groups the backup refuses.
    pub held: BTreeMap<GroupId, Held>,
    /// When the session was opened.
    pub since: Instant,
    /// The last sign of life of the backup.
    pub heard: Instant,
    /// When the oldest record without an answer was sent.
    pub oldest_sent: Option<Instant>,
    /// Round trip of the last heartbeat that had a sync of the backup's journal in it, in this session.
    pub probe: Option<Duration>,
}

impl LinkView {
    fn new(state: &'static str) -> Self {
        Self {
            state,
            reason: String::new(),
            since_unix_ms: unix_ms(),
            rtt: Duration::ZERO,
            sent: Lsn::ZERO,
            in_flight: 0,
            held: BTreeMap::new(),
            since: Instant::now(),
            heard: Instant::now(),
            oldest_sent: None,
            probe: None,
        }
    }
}

/// The driver's parts.
pub struct Link {
    engine: Engine,
    config: LinkConfig,
    connect: Box<dyn Fn() -> Connecting + Send + Sync>,
    events: EventLog,
    metrics: Metrics,
    view: Arc<Mutex<LinkView>>,
    sessions: watch::Sender<Option<Attached>>,
    start: Instant,
}

/// Why a session ended or did not begin.
enum Ended {
    /// Not connected, or lost: try again soon.
    Lost(String),
    /// The backup says no: trying again helps only when somebody acts.
    Refused(String),
    /// A group that was refused is to be tried again.
    Retry,
}

impl Link {
    /// A link over connections that `connect` makes.
    #[must_use]
    pub fn new(
        engine: Engine,
        config: LinkConfig,
        connect: Box<dyn Fn() -> Connecting + Send + Sync>,
        events: EventLog,
        metrics: Metrics,
    ) -> Self {
        let view = Arc::new(Mutex::new(LinkView::new("connecting")));
        let sessions = watch::channel(None).0;
        Self { engine, config, connect, events, metrics, view, sessions, start: Instant::now() }
    }

    /// Follows the open session.
    #[must_use]
    pub fn sessions(&self) -> watch::Receiver<Option<Attached>> {
        self.sessions.subscribe()
    }

    /// Follows how the link is doing.
    #[must_use]
    pub fn view(&self) -> Arc<Mutex<LinkView>> {
        Arc::clone(&self.view)
    }

    /// What a primary without a backup shows.
    #[must_use]
    pub fn unconfigured() -> Arc<Mutex<LinkView>> {
        let reason = "no [backup] url is set: nothing is replicated".to_owned();
        Arc::new(Mutex::new(LinkView { reason, ..LinkView::new("unconfigured") }))
    }

    /// Keeps a session open until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut sender = Sender::new(Arc::clone(self.engine.store()), 0);
        let mut backoff = BACKOFF_MIN;
        loop {
            let began = Instant::now();
            let Some(ended) = shutdown.run_until_cancelled(self.session(&mut sender)).await else { return };
            sender.on_detached();
            self.sessions.send_replace(None);
            self.on_ended(&ended);
            if matches!(ended, Ended::Retry) {
                continue;
            }
            // A session that had lasted starts over at once.
            backoff = if began.elapsed() > self.config.reconnect_max { BACKOFF_MIN } else { backoff * 2 };
            backoff = backoff.min(self.config.reconnect_max);
            if shutdown.run_until_cancelled(sleep(backoff)).await.is_none() {
                return;
            }
        }
    }

    fn on_ended(&self, ended: &Ended) {
        let (state, kind, reason) = match ended {
            Ended::Lost(reason) => ("connecting", "link.lost", reason.clone()),
            Ended::Refused(reason) => ("refused", "link.refused", reason.clone()),
            Ended::Retry => return,
        };
        self.engine.set_attached(Err(reason.clone()));
        self.metrics.link_up.set(0);
        let changed = {
            let mut view = self.view.lock();
            let changed = view.state != state;
            if changed {
                view.since_unix_ms = unix_ms();
            }
            (view.state, view.reason, view.in_flight) = (state, reason.clone(), 0);
            changed
        };
        if changed {
            warn!(reason, "{kind}");
            self.events.record(unix_ms(), kind, reason, []);
        }
    }

    async fn session(&self, sender: &mut Sender) -> Ended {
        let lost = |what: &str| format!("{what} took longer than [link] timeout ({:?})", self.config.timeout);
        let channel = match timeout(self.config.timeout, (self.connect)()).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(why)) => return Ended::Lost(why),
            Err(_) => return Ended::Lost(lost("connecting")),
        };
        let message_bytes = 256 << 20;
        let mut client = ReplicaServiceClient::new(channel)
            .max_decoding_message_size(message_bytes)
            .max_encoding_message_size(message_bytes);
        let hello = match self.hello() {
            Ok(hello) => hello,
            Err(why) => return Ended::Lost(why),
        };
        let mut answer = match timeout(self.config.ack_deadline, client.attach(hello)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => {
                self.hear_refusal(&status);
                return of_status("attach", &status);
            }
            Err(_) => return Ended::Lost(lost("attaching")),
        };
        let diverged = std::mem::take(&mut answer.diverged);
        let mut welcome = match welcome(answer) {
            Ok(welcome) => welcome,
            Err(why) => return Ended::Refused(why),
        };
        for group in diverged {
            let id = GroupId(group.group_id);
            let merged = timeout(self.config.ack_deadline, self.merge(sender, &mut client, &welcome, group)).await;
            match merged.unwrap_or_else(|_| Err(lost("telling what differs"))) {
                Ok(why) => welcome.diverged.insert(id, why),
                Err(why) => return Ended::Lost(why),
            };
        }
        match sender.on_attached(&welcome, unix_ms()) {
            Ok(lost) => self.note_lost(&lost),
            Err(error) => return Ended::Lost(error.to_string()),
        }
        // As many records as the window takes: the channel is never full.
        let (frames, queue) = mpsc::channel(usize::try_from(self.config.window_bytes / 256).unwrap_or(usize::MAX) + 1);
        let answers = match timeout(self.config.timeout, client.write_block(ReceiverStream::new(queue))).await {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => return of_status("write_block", &status),
            Err(_) => return Ended::Lost(lost("opening the stream")),
        };
        self.on_attached();
        let session = Bytes::copy_from_slice(&welcome.session.0);
        self.sessions.send_replace(Some(Attached { session, client: client.clone() }));
        self.exchange(sender, &welcome, client, frames, answers).await
    }

    /// What the other side says of generations when it refuses: this one may be over.
    fn hear_refusal(&self, status: &tonic::Status) {
        let Some((reason, theirs)) = convert::attach_refused_from(status.details()) else { return };
        let relation = self.engine.store().history().relation(&theirs);
        let newest = theirs.newest().map_or(0, |g| g.number);
        match relation {
            Relation::Ancestor => self.engine.fence(newest, &self.events),
            Relation::Fork { .. } => {
                if self.engine.standing().begin_split() {
                    self.events.record(unix_ms(), "split_brain.detected", status.message(), []);
                }
            }
            Relation::Same if reason == OLD_COPY => {
                self.engine.standing().begin_split();
            }
            Relation::Same | Relation::Descendant => warn!(reason, "the other side refuses without cause"),
        }
    }

    /// Marks what a backup that was a primary says of a group. `None`: all of it is marked, so that the group counts as at
    /// the fork; otherwise why not. The outer error: the link.
    async fn merge(
        &self,
        sender: &mut Sender,
        client: &mut ReplicaServiceClient<Channel>,
        welcome: &Welcome,
        diverged: v1::DivergedGroup,
    ) -> Result<Option<String>, String> {
        let group = GroupId(diverged.group_id);
        if !diverged.exact {
            return Ok(Some(diverged.why));
        }
        let there: BTreeSet<VolumeId> = diverged.volume_ids.into_iter().map(VolumeId).collect();
        if !sender.begins_merge(welcome.instance, group) {
            return Ok(None);
        }
        let request = v1::GetDivergenceRequest {
            session: Bytes::copy_from_slice(&welcome.session.0),
            group_id: diverged.group_id,
        };
        let lost = |status: tonic::Status| format!("get_divergence: {}", status.message());
        let mut messages = client.get_divergence(request).await.map_err(lost)?.into_inner();
        let mut blocks = 0;
        while let Some(v1::DivergedRanges { volume_id, ranges }) = messages.message().await.map_err(lost)? {
            let runs: Vec<(u64, u64)> = ranges.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
            sender.merge(group, VolumeId(volume_id), &runs);
            blocks += runs.iter().map(|(_, count)| count).sum::<u64>();
        }
        sender.merged(welcome.instance, group, &there);
        let fields = [("group", group.to_string()), ("blocks", blocks.to_string())];
        info!(%group, blocks, "failback.exact: what differs on the old primary is marked");
        self.events.record(unix_ms(), "failback.exact", "what differs on the old primary is marked", fields);
        Ok(None)
    }

    fn note_lost(&self, lost: &[Lost]) {
        for Lost { group, why } in lost {
            warn!(%group, why, "a group needs a full run");
            let fields = [("group", group.to_string())];
            self.events.record(unix_ms(), "mode.full_run_needed", format!("a full run is needed: {why}"), fields);
        }
    }

    fn on_attached(&self) {
        self.engine.standing().end_split();
        self.engine.set_attached(Ok(()));
        self.metrics.link_up.set(1);
        let changed = {
            let mut view = self.view.lock();
            let changed = view.state != "attached";
            if changed {
                view.since_unix_ms = unix_ms();
            }
            (view.state, view.reason) = ("attached", String::new());
            (view.since, view.heard) = (Instant::now(), Instant::now());
            (view.oldest_sent, view.probe) = (None, None);
            changed
        };
        if changed {
            info!("link.attached");
            self.events.record(unix_ms(), "link.attached", "the backup is attached", []);
        }
    }

    async fn exchange(
        &self,
        sender: &mut Sender,
        welcome: &Welcome,
        client: ReplicaServiceClient<Channel>,
        frames: mpsc::Sender<v1::StagedRecord>,
        mut answers: tonic::Streaming<v1::StagedAck>,
    ) -> Ended {
        let mut marks = self.engine.marks();
        let mut ticks = interval(self.config.heartbeat.min(self.config.timeout / 8));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heartbeat: Option<Beating> = None;
        let mut beat_at: Option<Instant> = None;
        let mut probing = false;
        let mut held_since = None;
        let mut pace = StreamPace::new(self.config.throttle_bytes_per_s);
        let mut window = Window::new(usize::try_from(self.config.window_bytes).unwrap_or(usize::MAX));
        sender.set_window(window.bytes());
        loop {
            marks.mark_unchanged();
            let wait = pace.waits_until(self.start.elapsed());
            let more = match wait {
                Some(_) => false,
                None => match self.send(sender, &frames, &mut pace) {
                    Ok(more) => more,
                    Err(ended) => return ended,
                },
            };
            // The throttle holds all back, a lane's pace only that lane.
            let due = wait.or_else(|| sender.due());
            tokio::select! {
                biased;
                answer = answers.message() => match answer {
                    Ok(Some(answer)) => {
                        if let Some(sent_at) = sender.oldest_sent_at() {
                            let now = self.start.elapsed();
                            let spent = now.saturating_sub(sent_at);
                            window.on_answer(now, spent);
                            sender.set_window(window.bytes());
                            self.metrics.replication_ack_seconds.observe(spent.as_secs_f64());
                        }
                        if let Err(error) = sender.on_ack(&answer) {
                            return Ended::Lost(error.to_string());
                        }
                        let oldest_sent = sender.oldest_sent_at().map(|sent| self.start + sent);
                        let mut view = self.view.lock();
                        (view.in_flight, view.heard) = (sender.in_flight(), Instant::now());
                        view.oldest_sent = oldest_sent;
                    }
                    Ok(None) => return Ended::Lost("the backup ended the stream".into()),
                    Err(status) => return of_status("stream", &status),
                },
                beat = async { heartbeat.as_mut().expect("guarded").await }, if heartbeat.is_some() => {
                    heartbeat = None;
                    match beat {
                        Ok(rtt) => {
                            self.metrics.link_rtt_seconds.set(rtt.as_secs_f64());
                            let mut view = self.view.lock();
                            (view.rtt, view.heard) = (rtt, Instant::now());
                            view.probe = Some(rtt).filter(|_| probing);
                        }
                        Err(why) => return Ended::Lost(why),
                    }
                }
                _ = ticks.tick() => {
                    if heartbeat.is_none() && beat_at.is_none_or(|at| at.elapsed() >= self.config.heartbeat) {
                        beat_at = Some(Instant::now());
                        // In delta mode nothing else shows how long the backup takes.
                        probing = self.engine.store().with_state(|s| s.groups.values().any(|g| !g.mode.is_continuous()));
                        heartbeat = Some(self.heartbeat(welcome.session, client.clone(), probing));
                    }
                    if let Some(ended) = self.check(sender, &mut held_since) {
                        return ended;
                    }
                }
                () = sleep_until(self.start + due.unwrap_or_default()), if due.is_some() && !more => {}
                _ = marks.changed(), if !more && wait.is_none() => {}
                () = tokio::task::yield_now(), if more => {}
            }
        }
    }

    /// Hands records to the transport. True if there may be more.
    fn send(
        &self,
        sender: &mut Sender,
        frames: &mpsc::Sender<v1::StagedRecord>,
        pace: &mut StreamPace,
    ) -> Result<bool, Ended> {
        let records = sender
            .poll(self.start.elapsed(), pace.chunk(CHUNK_BYTES))
            .map_err(|error| Ended::Refused(format!("what is to be sent cannot be read: {error}")))?;
        let sent = !records.is_empty();
        let mut bytes = 0;
        for record in records {
            if let Some(v1::staged_record::Op::Write(write)) = &record.op {
                bytes += write.data.len() as u64;
            }
            frames.try_send(record).map_err(|_| Ended::Lost("the stream is closed".into()))?;
        }
        if sent {
            pace.on_sent(self.start.elapsed(), bytes);
            self.metrics.replication_sent_bytes.with_label_values(&["continuous"]).inc_by(bytes);
            let mut view = self.view.lock();
            (view.sent, view.in_flight) = (Lsn(sender.cursor().0.saturating_sub(1)), sender.in_flight());
            view.oldest_sent = sender.oldest_sent_at().map(|sent| self.start + sent);
        }
        Ok(sent || sender.is_interrupted())
    }

    /// What only time tells.
    fn check(&self, sender: &Sender, held_since: &mut Option<Instant>) -> Option<Ended> {
        // A heartbeat may wait behind data on a slow link: whatever is answered shows that the backup is there.
        let silent = self.view.lock().heard.elapsed();
        if silent > self.config.timeout {
            let limit = self.config.timeout;
            return Some(Ended::Lost(format!(
                "nothing was heard of the backup for {silent:?} ([link] timeout = {limit:?})"
            )));
        }
        let age = sender.oldest_sent_at().map(|sent| self.start.elapsed().saturating_sub(sent));
        if let Some(age) = age.filter(|age| *age > self.config.ack_deadline) {
            let limit = self.config.ack_deadline;
            return Some(Ended::Lost(format!(
                "a record was not answered for {age:?} ([link] ack_deadline = {limit:?})"
            )));
        }
        let held = sender.held();
        if held.is_empty() {
            *held_since = None;
        } else if held_since.get_or_insert_with(Instant::now).elapsed() > HELD_RETRY {
            return Some(Ended::Retry);
        }
        let mut view = self.view.lock();
        if held != view.held {
            for (group, refused) in &held {
                warn!(%group, cause = refused.cause, message = refused.message, "the backup refuses a group");
            }
            view.held = held;
        }
        None
    }

    fn hello(&self) -> Result<v1::AttachRequest, String> {
        let store = self.engine.store();
        let lives = store.lives(|| Uid(rand::random())).map_err(|error| error.to_string())?;
        let (identity, durable) = (store.identity(), store.marks().borrow().durable);
        Ok(v1::AttachRequest {
            pair_id: identity.pair.0.to_vec().into(),
            instance_id: identity.instance.0.to_vec().into(),
            generation: identity.generation,
            generation_id: identity.generation_id.0.to_vec().into(),
            protocol: PROTOCOL,
            segment_bytes: store.config().pool.segment_bytes,
            durable_lsn: durable.0,
            oldest_lsn: store.ship_from().0,
            history: convert::history_to_wire(&store.history()),
            groups: Some(v1::GroupList { group_ids: store.shipped_groups().into_iter().map(|id| id.0).collect() }),
            lives: convert::lives_to_wire(&lives),
        })
    }

    fn heartbeat(&self, session: Uid, mut client: ReplicaServiceClient<Channel>, sync: bool) -> Beating {
        let store = self.engine.store();
        let complete = store.with_state(|state| {
            let places = |g: &GroupState| {
                let group_id = g.id.0;
                let place = move |(lane, place): (u8, Place)| {
                    let position = Some(place.position.into());
                    v1::GroupPosition { group_id, lane: lane.into(), position }
                };
                // Behind a cut no lane may have a place of its own; what all of them have stands for lane 0.
                let all = (g.lanes.own().next().is_none()).then_some((0, g.lanes.base()));
                all.into_iter().chain(g.lanes.own()).map(place).collect::<Vec<_>>()
            };
            state.groups.values().flat_map(places).collect()
        });
        let request = v1::HeartbeatRequest {
            session: session.0.to_vec().into(),
            time_unix_ms: unix_ms(),
            next_lsn: store.next_lsn().0,
            sync,
            complete,
            bytes_at_risk: store.bytes_at_risk(),
            lease_remaining_ms: self.engine.standing().lease_remaining().map(millis),
        };
        Box::pin(async move {
            let start = Instant::now();
            match client.heartbeat(request).await {
                Ok(_) => Ok(start.elapsed()),
                Err(status) => Err(format!("heartbeat: {}", status.message())),
            }
        })
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn welcome(answer: v1::AttachResponse) -> Result<Welcome, String> {
    let session = convert::uid("session", &answer.session).map_err(|e| e.to_string())?;
    let place = |p: &v1::GroupPosition| Place { position: p.position.unwrap_or_default().into(), time_unix_ms: 0 };
    let mut positions: BTreeMap<GroupId, LanePlaces> = BTreeMap::new();
    for base in &answer.bases {
        positions.insert(GroupId(base.group_id), LanePlaces::all(place(base)));
    }
    for own in &answer.positions {
        let lane = u8::try_from(own.lane).ok().filter(|lane| usize::from(*lane) < LANES_MAX);
        let lane = lane.ok_or_else(|| format!("the backup answers for lane {}, which cannot be", own.lane))?;
        positions.entry(GroupId(own.group_id)).or_default().set(lane, place(own));
    }
    let instance = convert::uid("instance_id", &answer.instance_id).map_err(|e| e.to_string())?;
    let unfinished = answer.inconsistent_groups.into_iter().chain(answer.groups_in_run).map(GroupId).collect();
    Ok(Welcome { session, instance, positions, unfinished, diverged: BTreeMap::new() })
}

/// Codes of a peer that is away end in another attempt; others are an answer.
fn of_status(what: &str, status: &tonic::Status) -> Ended {
    use tonic::Code;
    let reason = format!("{what}: {}", status.message());
    match status.code() {
        Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented => Ended::Refused(reason),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::OutOfRange
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => Ended::Lost(reason),
    }
}
