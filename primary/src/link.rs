//! The link to the backup: connects, attaches, drives the [`Sender`], and notices when the other side is gone.
//!
//! A peer may vanish without a reset (frozen, dropped packets, a new address behind the same name). Three clocks find
//! out: the heartbeat's own deadline, HTTP/2 pings, and the age of the oldest record that was sent and not answered.
//! Each attempt to connect resolves the name anew.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tracing::{info, warn};
use understudy_common::{
    config::LinkConfig,
    events::EventLog,
    telemetry::Metrics,
    types::{GroupId, Lsn, Position, Uid},
};
use understudy_proto::{
    convert,
    v1::{self, replica_service_client::ReplicaServiceClient},
};

use crate::{
    engine::{Engine, unix_ms},
    sender::{Held, Sender, Welcome},
};

/// The protocol this version speaks.
const PROTOCOL: u32 = 1;
/// First pause after a failed attempt.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// How long a group that the backup refuses is left alone before a new session tries it again.
const HELD_RETRY: Duration = Duration::from_secs(5);
/// Payload that is handed to the transport in one go.
const CHUNK_BYTES: usize = 256 << 10;

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
    pub held: std::collections::BTreeMap<GroupId, Held>,
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
            held: std::collections::BTreeMap::new(),
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
        Self { engine, config, connect, events, metrics, view, start: Instant::now() }
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
        let window = usize::try_from(self.config.window_bytes).unwrap_or(usize::MAX);
        let mut sender = Sender::new(Arc::clone(self.engine.store()), window);
        let mut backoff = BACKOFF_MIN;
        loop {
            let began = Instant::now();
            let Some(ended) = shutdown.run_until_cancelled(self.session(&mut sender)).await else { return };
            sender.on_detached();
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
        let welcome = match timeout(self.config.ack_deadline, client.attach(self.hello())).await {
            Ok(Ok(answer)) => match welcome(answer.into_inner()) {
                Ok(welcome) => welcome,
                Err(why) => return Ended::Refused(why),
            },
            Ok(Err(status)) => return of_status("attach", &status),
            Err(_) => return Ended::Lost(lost("attaching")),
        };
        if let Err(error) = sender.on_attached(&welcome) {
            return Ended::Refused(error.to_string());
        }
        // As many records as the window takes: the channel is never full.
        let (frames, queue) = mpsc::channel(usize::try_from(self.config.window_bytes / 256).unwrap_or(usize::MAX) + 1);
        let answers = match timeout(self.config.timeout, client.write_block(ReceiverStream::new(queue))).await {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => return of_status("write_block", &status),
            Err(_) => return Ended::Lost(lost("opening the stream")),
        };
        self.on_attached();
        self.exchange(sender, &welcome, client, frames, answers).await
    }

    fn on_attached(&self) {
        self.engine.set_attached(Ok(()));
        self.metrics.link_up.set(1);
        let changed = {
            let mut view = self.view.lock();
            let changed = view.state != "attached";
            if changed {
                view.since_unix_ms = unix_ms();
            }
            (view.state, view.reason) = ("attached", String::new());
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
        let mut ticks = interval(self.config.heartbeat);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heartbeat: Option<Beating> = None;
        let mut held_since = None;
        loop {
            marks.mark_unchanged();
            let more = match self.send(sender, &frames) {
                Ok(more) => more,
                Err(ended) => return ended,
            };
            tokio::select! {
                biased;
                answer = answers.message() => match answer {
                    Ok(Some(answer)) => {
                        if let Some(sent_at) = sender.oldest_sent_at() {
                            let spent = self.start.elapsed().saturating_sub(sent_at);
                            self.metrics.replication_ack_seconds.observe(spent.as_secs_f64());
                        }
                        if let Err(error) = sender.on_ack(&answer) {
                            return Ended::Lost(error.to_string());
                        }
                        self.view.lock().in_flight = sender.in_flight();
                    }
                    Ok(None) => return Ended::Lost("the backup ended the stream".into()),
                    Err(status) => return of_status("stream", &status),
                },
                beat = async { heartbeat.as_mut().expect("guarded").await }, if heartbeat.is_some() => {
                    heartbeat = None;
                    match beat {
                        Ok(rtt) => {
                            self.metrics.link_rtt_seconds.set(rtt.as_secs_f64());
                            self.view.lock().rtt = rtt;
                        }
                        Err(why) => return Ended::Lost(why),
                    }
                }
                _ = ticks.tick() => {
                    if heartbeat.is_none() {
                        heartbeat = Some(self.heartbeat(welcome.session, client.clone()));
                    }
                    if let Some(ended) = self.check(sender, &mut held_since) {
                        return ended;
                    }
                }
                _ = marks.changed(), if !more => {}
                () = tokio::task::yield_now(), if more => {}
            }
        }
    }

    /// Hands records to the transport. True if there may be more.
    fn send(&self, sender: &mut Sender, frames: &mpsc::Sender<v1::StagedRecord>) -> Result<bool, Ended> {
        let records = sender
            .poll(self.start.elapsed(), CHUNK_BYTES)
            .map_err(|error| Ended::Refused(format!("what is to be sent cannot be read: {error}")))?;
        let more = !records.is_empty();
        let mut bytes = 0;
        for record in records {
            if let Some(v1::staged_record::Op::Write(write)) = &record.op {
                bytes += write.data.len() as u64;
            }
            frames.try_send(record).map_err(|_| Ended::Lost("the stream is closed".into()))?;
        }
        if more {
            self.metrics.replication_sent_bytes.with_label_values(&["continuous"]).inc_by(bytes);
            let mut view = self.view.lock();
            (view.sent, view.in_flight) = (Lsn(sender.cursor().0.saturating_sub(1)), sender.in_flight());
        }
        Ok(more)
    }

    /// What only time tells.
    fn check(&self, sender: &Sender, held_since: &mut Option<Instant>) -> Option<Ended> {
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

    fn hello(&self) -> v1::AttachRequest {
        let store = self.engine.store();
        let identity = store.identity();
        v1::AttachRequest {
            pair_id: identity.pair.0.to_vec().into(),
            instance_id: identity.instance.0.to_vec().into(),
            generation: identity.generation,
            generation_id: identity.generation_id.0.to_vec().into(),
            protocol: PROTOCOL,
            segment_bytes: store.config().pool.segment_bytes,
            durable_lsn: store.marks().borrow().durable.0,
            oldest_lsn: store.ship_from().0,
        }
    }

    fn heartbeat(&self, session: Uid, mut client: ReplicaServiceClient<Channel>) -> Beating {
        let store = self.engine.store();
        let complete = store.with_state(|state| {
            let place = |g: &understudy_common::state::GroupState| v1::GroupPosition {
                group_id: g.id.0,
                lane: 0,
                position: Some(g.position.into()),
            };
            state.groups.values().map(place).collect()
        });
        let request = v1::HeartbeatRequest {
            session: session.0.to_vec().into(),
            time_unix_ms: unix_ms(),
            next_lsn: store.next_lsn().0,
            sync: false,
            complete,
        };
        let limit = self.config.timeout;
        Box::pin(async move {
            let start = Instant::now();
            match timeout(limit, client.heartbeat(request)).await {
                Ok(Ok(_)) => Ok(start.elapsed()),
                Ok(Err(status)) => Err(format!("heartbeat: {}", status.message())),
                Err(_) => Err(format!("a heartbeat was not answered within [link] timeout ({limit:?})")),
            }
        })
    }
}

fn welcome(answer: v1::AttachResponse) -> Result<Welcome, String> {
    let session = convert::uid("session", &answer.session).map_err(|e| e.to_string())?;
    let positions = answer
        .positions
        .into_iter()
        .map(|p| (GroupId(p.group_id), p.position.map_or(Position::default(), Position::from)))
        .collect();
    Ok(Welcome { session, positions })
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
