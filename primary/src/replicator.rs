//! Drives the modes: asks the policy of each group, carries out what it says, and drives the run that is open.
//!
//! The decisions are those of [`GroupPolicy`], the steps those of the store, the run is a [`Runner`]; here are the
//! clock, the calls and the measurements. One run is open at a time: groups take turns.

mod calls;
mod groups;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, interval_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use understudy_common::{
    config::DeltaConfig,
    events::EventLog,
    policy::{Action, Cause, Decision, LastRun, Observation, PolicyConfig, Recorder},
    record::RunKind,
    store::{ModeError, Store},
    telemetry::Metrics,
    types::{AckRule, GroupId},
};

use crate::{
    engine::unix_ms,
    link::LinkView,
    pace::{ClientLoad, Pace},
    runner::{CHUNK_BYTES, PIECE_BYTES, RunCounts, RunError, RunOptions, RunRequest, Runner},
};

pub use calls::Attached;
use calls::{Calls, Ended, Heard};
use groups::{Group, Measured, observe};

/// How often clients are looked at while a run is open.
const PACE_STEP: Duration = Duration::from_millis(20);
/// Bytes of a run that are read and not answered.
const WINDOW_BYTES: u64 = 8 << 20;
/// Decisions that are kept of a group.
const DECISIONS: usize = 32;
/// After a call that failed while the session goes on.
const RETRY: Duration = Duration::from_millis(500);

/// What somebody asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Be in delta mode until released.
    Hold,
    /// Take that back.
    Release,
    /// Begin one run now.
    StartRun,
    /// End the run that is open without a commit.
    AbortRun,
}

/// A decision that did something, or the newest one.
#[derive(Debug, Clone)]
pub struct Explained {
    /// When, Unix milliseconds.
    pub time_unix_ms: i64,
    /// What was seen.
    pub observation: Observation,
    /// What was decided.
    pub decision: Decision,
}

/// A run that ended, for people.
#[derive(Debug, Clone)]
pub struct RunReport {
    /// What for.
    pub kind: RunKind,
    /// Or aborted.
    pub committed: bool,
    /// Aborted because the backup cannot.
    pub refused: bool,
    /// Why it was aborted; empty for one that was committed.
    pub why: String,
    /// What it moved.
    pub counts: RunCounts,
    /// From its cut to its end.
    pub duration: Duration,
    /// Unix milliseconds.
    pub ended_unix_ms: i64,
}

/// How a group is doing.
#[derive(Debug, Clone, Default)]
pub struct GroupView {
    /// The run that is open.
    pub run: Option<(RunCounts, Duration)>,
    /// The one that ended last since the start.
    pub last_run: Option<RunReport>,
    /// Newest last.
    pub decisions: Vec<Explained>,
    /// Somebody holds it in delta mode.
    pub held: bool,
}

/// What others see of the replicator, and ask of it. Cheap to clone.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

struct Shared {
    policy: RwLock<PolicyConfig>,
    views: Mutex<BTreeMap<GroupId, GroupView>>,
    asks: Mutex<BTreeMap<GroupId, Vec<Ask>>>,
    wake: Notify,
    /// Acknowledged writes and their time, since the last look.
    writes: AtomicU64,
    write_micros: AtomicU64,
}

impl Handle {
    /// A handle for a replicator that is not started: what is asked waits.
    #[must_use]
    pub fn new(policy: PolicyConfig) -> Self {
        Self(Arc::new(Shared {
            policy: RwLock::new(policy),
            views: Mutex::default(),
            asks: Mutex::default(),
            wake: Notify::new(),
            writes: AtomicU64::new(0),
            write_micros: AtomicU64::new(0),
        }))
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> PolicyConfig {
        self.0.policy.read().clone()
    }

    /// Puts a policy in force, from the next look on.
    pub fn set_policy(&self, policy: PolicyConfig) {
        *self.0.policy.write() = policy;
        self.wake();
    }

    /// How a group is doing.
    #[must_use]
    pub fn view(&self, group: GroupId) -> GroupView {
        self.0.views.lock().get(&group).cloned().unwrap_or_default()
    }

    /// Asks for something; it is done with the next look at the group.
    pub fn ask(&self, group: GroupId, ask: Ask) {
        self.0.asks.lock().entry(group).or_default().push(ask);
        self.wake();
    }

    /// Looks at every group now: the staging area is nearly full, or something else changed.
    pub fn wake(&self) {
        self.0.wake.notify_one();
    }

    /// A write was acknowledged after so long.
    pub fn note_write(&self, spent: Duration) {
        self.0.writes.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(spent.as_micros()).unwrap_or(u64::MAX);
        self.0.write_micros.fetch_add(micros, Ordering::Relaxed);
    }

    #[allow(clippy::cast_precision_loss, reason = "a mean")]
    fn take_load(&self) -> ClientLoad {
        let writes = self.0.writes.swap(0, Ordering::Relaxed);
        let micros = self.0.write_micros.swap(0, Ordering::Relaxed);
        let mean_seconds = if writes == 0 { 0.0 } else { micros as f64 / writes as f64 / 1e6 };
        ClientLoad { writes, bytes: 0, mean_seconds }
    }
}

/// A run under way.
struct Running {
    runner: Option<Runner>,
    group: GroupId,
    id: u64,
    began: Instant,
    retry_at: Option<Instant>,
}

/// What a poll of a runner gave.
type Polled = (Runner, Result<Option<RunRequest>, RunError>);

/// See the module.
pub struct Replicator {
    store: Arc<Store>,
    handle: Handle,
    link: Arc<Mutex<LinkView>>,
    sessions: watch::Receiver<Option<Attached>>,
    events: EventLog,
    metrics: Metrics,
    start: Instant,
    groups: BTreeMap<GroupId, Group>,
    measured: Measured,
    pace: Pace,
    running: Option<Running>,
    polling: Option<JoinHandle<Polled>>,
    calls: Calls,
    inline: bool,
    recorder: Option<Recorder>,
}

impl Replicator {
    /// A replicator over sessions that the link's driver opens. With `inline` the snapshot is read on the calling
    /// thread: for simulated disks.
    #[must_use]
    #[allow(clippy::too_many_arguments, reason = "the parts that opening has made")]
    pub fn new(
        store: Arc<Store>,
        config: DeltaConfig,
        handle: Handle,
        link: Arc<Mutex<LinkView>>,
        sessions: watch::Receiver<Option<Attached>>,
        events: EventLog,
        metrics: Metrics,
        inline: bool,
    ) -> Self {
        Self {
            pace: Pace::new(config.throttle),
            measured: Measured::new(&store),
            store,
            handle,
            link,
            sessions,
            events,
            metrics,
            start: Instant::now(),
            groups: BTreeMap::new(),
            running: None,
            polling: None,
            calls: Calls::default(),
            inline,
            recorder: None,
        }
    }

    /// Records what the policy is told and what it says.
    #[must_use]
    pub fn recording(mut self, recorder: Option<Recorder>) -> Self {
        self.recorder = recorder;
        self
    }

    /// Goes on until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut looks = interval(self.handle.policy().weigh_interval);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut paces = interval(PACE_STEP);
        paces.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut paced, mut written) = (Instant::now(), self.store.traffic().0);
        let mut marks = self.store.marks();
        let handle = self.handle.clone();
        loop {
            self.go_on();
            let waits = self.polling.is_none() && self.running.as_ref().is_some_and(Running::waits_for_cut);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                changed = self.sessions.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.on_session();
                }
                polled = async { self.polling.as_mut().expect("guarded").await }, if self.polling.is_some() => {
                    self.polling = None;
                    match polled {
                        Ok(polled) => self.on_polled(polled),
                        Err(error) => warn!(%error, "reading a snapshot was ended"),
                    }
                }
                heard = self.calls.next(), if self.polling.is_none() && self.calls.expects() => self.on_heard(heard),
                _ = paces.tick() => {
                    let now = Instant::now();
                    let traffic = self.store.traffic().0;
                    let load = ClientLoad { bytes: traffic.saturating_sub(written), ..self.handle.take_load() };
                    self.pace.on_tick(now - paced, load, self.running.is_some());
                    (paced, written) = (now, traffic);
                }
                _ = looks.tick() => {
                    self.look();
                    let period = self.handle.policy().weigh_interval;
                    if period != looks.period() {
                        looks = interval_at(Instant::now() + period, period);
                        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                    }
                }
                () = handle.0.wake.notified() => self.look(),
                _ = marks.changed(), if waits => {}
            }
        }
    }

    // --- the policy

    fn look(&mut self) {
        let now = Instant::now();
        self.measured.on_look(&self.store, now);
        let policy = self.handle.policy();
        let live: Vec<GroupId> = self.store.with_state(|state| state.groups.keys().copied().collect());
        self.groups.retain(|id, _| live.contains(id));
        self.handle.0.views.lock().retain(|id, _| live.contains(id));
        for id in live {
            let asks = self.handle.0.asks.lock().remove(&id).unwrap_or_default();
            for ask in asks {
                self.on_ask(id, ask);
            }
            self.end_forgotten(id);
            let link = self.link.lock().clone();
            let run = self.counts_of(id);
            let group = self.groups.entry(id).or_default();
            let Some(observation) = observe(&self.store, id, group, &link, &self.measured, run, self.start) else {
                continue;
            };
            let before = self.recorder.as_ref().map(|_| group.policy.clone());
            let decision = group.policy.on_observation(&policy, &observation);
            if let (Some(recorder), Some(before)) = (&mut self.recorder, before) {
                let name = self.store.with_state(|state| state.groups.get(&id).map(|group| group.name.clone()));
                recorder.record(&name.unwrap_or_default(), &policy, before, &observation, &decision);
            }
            let explained = Explained { time_unix_ms: unix_ms(), observation, decision };
            self.act(id, &explained);
            self.show(id, explained, run);
        }
        self.handle.0.asks.lock().clear();
    }

    fn counts_of(&self, group: GroupId) -> Option<(RunCounts, Duration)> {
        let running = self.running.as_ref().filter(|running| running.group == group)?;
        let counts = running.runner.as_ref().map(Runner::counts).or_else(|| {
            // It is being polled.
            self.handle.0.views.lock().get(&group).and_then(|view| view.run).map(|(counts, _)| counts)
        });
        Some((counts.unwrap_or_default(), running.began.elapsed()))
    }

    fn show(&self, id: GroupId, explained: Explained, run: Option<(RunCounts, Duration)>) {
        let mut views = self.handle.0.views.lock();
        let view = views.entry(id).or_default();
        view.run = run;
        view.held = self.groups[&id].operator.hold_delta;
        // The newest decision that changed nothing takes the place of the one before.
        if view.decisions.last().is_some_and(|last| !last.decision.acts()) {
            view.decisions.pop();
        }
        view.decisions.push(explained);
        if view.decisions.len() > DECISIONS {
            view.decisions.remove(0);
        }
    }

    fn on_ask(&mut self, id: GroupId, ask: Ask) {
        let group = self.groups.entry(id).or_default();
        match ask {
            Ask::Hold => group.operator.hold_delta = true,
            Ask::Release => group.operator.hold_delta = false,
            Ask::StartRun => group.operator.start_run = true,
            Ask::AbortRun => {
                if let Some(run) = self.store.run_of(id) {
                    self.end_run(id, run.id, run.kind, "an operator ended it", None);
                }
            }
        }
    }

    fn act(&mut self, id: GroupId, explained: &Explained) {
        let decision = &explained.decision;
        let done = match decision.action {
            Action::None => return,
            Action::Switch { cause } => self.switch(id, cause).map(|()| true),
            Action::StartRun { kind } => self.start_run(id, kind, decision.cause),
            Action::Demote { .. } => self.store.demote(id, unix_ms()).map(|_| true),
        };
        match done {
            Ok(true) => self.note(id, decision),
            // The run of another group is open, or the session has just gone: the policy will say it again.
            Ok(false) => {}
            Err(error) => warn!(group = %id, %error, "a step between modes was not taken"),
        }
    }

    fn switch(&self, id: GroupId, cause: Cause) -> Result<(), ModeError> {
        self.store.switch(id, cause.as_str(), cause == Cause::Initial, unix_ms())?;
        self.metrics.mode_transitions.with_label_values(&["continuous", "delta", cause.as_str()]).inc();
        // What the switch has released is given back by a checkpoint.
        self.store.request_checkpoint();
        Ok(())
    }

    /// False if it has to wait.
    fn start_run(&mut self, id: GroupId, kind: RunKind, cause: Option<Cause>) -> Result<bool, ModeError> {
        if self.running.is_some() || self.sessions.borrow().is_none() {
            return Ok(false);
        }
        let continuous = self.store.with_state(|s| s.groups.get(&id).is_some_and(|g| g.mode.is_continuous()));
        if continuous {
            self.switch(id, cause.unwrap_or(Cause::Redundancy))?;
        }
        let run = self.store.cut(id, kind, unix_ms())?;
        let group = self.groups.entry(id).or_default();
        group.operator.start_run = false;
        let digests = kind == RunKind::Full || std::mem::take(&mut group.compare_next);
        let options = RunOptions {
            window_bytes: WINDOW_BYTES,
            chunk_bytes: CHUNK_BYTES,
            piece_bytes: PIECE_BYTES,
            compress: true,
            digests,
        };
        let mut runner = Runner::new(Arc::clone(&self.store), id, run, options);
        if let Some(attached) = self.sessions.borrow().as_ref() {
            runner.on_attached(&attached.session);
        }
        self.pace.on_begun();
        let run_id = runner.run().id;
        self.running =
            Some(Running { runner: Some(runner), group: id, id: run_id, began: Instant::now(), retry_at: None });
        Ok(true)
    }

    /// Each decision that did something is an event and a line of the log.
    fn note(&self, id: GroupId, decision: &Decision) {
        let name = self.store.with_state(|s| s.groups.get(&id).map(|g| g.name.clone())).unwrap_or_default();
        let kind = match decision.action {
            Action::None => return,
            Action::Switch { .. } => "mode.delta",
            Action::StartRun { .. } => "run.started",
            Action::Demote { .. } => "run.demoted",
        };
        let cause = decision.cause.map_or("", Cause::as_str);
        let inputs: Vec<String> = decision.because.iter().map(ToString::to_string).collect();
        let inputs = inputs.join("; ");
        info!(group = name, cause, inputs, "{kind}: {}", decision.action);
        let fields = [
            ("group", name),
            ("cause", cause.to_owned()),
            ("action", decision.action.to_string()),
            ("inputs", inputs),
            ("alternative", decision.alternative.clone()),
        ];
        self.events.record(unix_ms(), kind, decision.action.to_string(), fields);
    }

    // --- the run

    fn on_session(&mut self) {
        let attached = self.sessions.borrow_and_update().clone();
        self.calls.reset();
        if let Some(runner) = self.running.as_mut().and_then(|running| running.runner.as_mut()) {
            match &attached {
                Some(attached) => runner.on_attached(&attached.session),
                None => runner.on_detached(),
            }
        }
    }

    /// Polls the runner, if it may have something to ask for.
    fn go_on(&mut self) {
        let Some(running) = &mut self.running else { return };
        if self.polling.is_some() || running.retry_at.is_some_and(|at| at > Instant::now()) || !self.pace.may_send() {
            return;
        }
        let Some(runner) = &running.runner else { return };
        if !(runner.can_go_on() || running.waits_for_cut()) || !self.calls.has_room() {
            return;
        }
        running.retry_at = None;
        let mut runner = running.runner.take().expect("looked at above");
        runner.limit_chunk(self.pace.chunk(CHUNK_BYTES));
        if self.inline {
            let polled = runner.poll();
            self.on_polled((runner, polled));
        } else {
            self.polling = Some(tokio::task::spawn_blocking(move || {
                let polled = runner.poll();
                (runner, polled)
            }));
        }
    }

    fn on_polled(&mut self, (mut runner, polled): Polled) {
        let Some(running) = &mut self.running else { return };
        // The session may have changed while the snapshot was read.
        let session = self.sessions.borrow().clone();
        let current = session.as_ref().map_or(&[][..], |attached| &attached.session[..]);
        if runner.session() != current {
            if current.is_empty() {
                runner.on_detached()
            } else {
                runner.on_attached(current)
            }
            running.runner = Some(runner);
            return;
        }
        let counts = runner.counts();
        running.runner = Some(runner);
        match (polled, session) {
            (Ok(Some(request)), Some(attached)) => {
                let before = self.measured.run_sent;
                self.measured.run_sent = counts.sent_bytes + counts.digest_bytes;
                let sent = self.measured.run_sent.saturating_sub(before);
                self.pace.on_sent(sent.max(4096));
                self.metrics.replication_sent_bytes.with_label_values(&["delta"]).inc_by(sent);
                self.measured.link_bytes += sent;
                self.calls.ask(&attached, request);
            }
            (Ok(_), _) => {}
            (Err(error), _) => self.on_run_error(error),
        }
    }

    fn on_heard(&mut self, heard: Heard) {
        if heard.is_ok() {
            self.link.lock().heard = Instant::now();
        }
        let Some(running) = &mut self.running else { return };
        let Some(runner) = &mut running.runner else { return };
        match heard {
            Ok(answer) => match runner.on_answer(answer, unix_ms()) {
                Ok(()) if runner.is_done() => self.on_committed(),
                Ok(()) => {}
                Err(error) => self.on_run_error(error),
            },
            Err(Ended::Again(why)) => {
                // The session may go on without this call: begin again, from where the backup is.
                warn!(why, "a call of a run failed");
                running.retry_at = Some(Instant::now() + RETRY);
                let session = runner.session().to_vec();
                runner.on_attached(&session);
                self.calls.reset();
            }
            Err(Ended::Over(why)) => {
                let (group, id, kind) = (running.group, running.id, runner.run().kind);
                self.end_run(group, id, kind, &why, None);
            }
        }
    }

    fn on_run_error(&mut self, error: RunError) {
        let Some(running) = &self.running else { return };
        let (group, id) = (running.group, running.id);
        let kind = self.store.run_of(group).map_or(RunKind::Round, |run| run.kind);
        let refused = match &error {
            RunError::Refused { cause, message } => Some(format!("{cause}: {message}")),
            _ => None,
        };
        self.end_run(group, id, kind, &error.to_string(), refused);
    }

    /// Ends a run without a commit.
    fn end_run(&mut self, group: GroupId, id: u64, kind: RunKind, why: &str, refused: Option<String>) {
        if self.store.run_of(group).is_some_and(|run| run.id == id)
            && let Err(error) = self.store.abort_run(group, id, unix_ms())
        {
            // Nobody goes on with it; the next look ends it.
            warn!(%group, %error, "a run cannot be ended yet");
            self.store.request_checkpoint();
        }
        if let Some(attached) = self.sessions.borrow().as_ref() {
            self.calls.abort(attached, group, id);
        }
        self.on_ended(group, id, kind, false, why, refused);
    }

    /// A run that could not be noted as ended, because the journal had no room even for that.
    fn end_forgotten(&self, group: GroupId) {
        let Some(run) = self.store.run_of(group) else { return };
        if self.running.as_ref().is_none_or(|running| (running.group, running.id) != (group, run.id))
            && self.store.abort_run(group, run.id, unix_ms()).is_err()
        {
            self.store.request_checkpoint();
        }
    }

    fn on_committed(&mut self) {
        let Some(Running { group, id, .. }) = self.running.as_ref() else { return };
        let (group, id) = (*group, *id);
        let runner = self.running.as_ref().and_then(|running| running.runner.as_ref());
        let kind = runner.map_or(RunKind::Round, |runner| runner.run().kind);
        self.on_ended(group, id, kind, true, "", None);
        let (name, continuous) = self.store.with_state(|state| {
            state.groups.get(&group).map_or((String::new(), false), |g| (g.name.clone(), g.mode.is_continuous()))
        });
        if continuous {
            info!(group = name, "mode.continuous: the final round is committed");
            self.metrics.mode_transitions.with_label_values(&["delta", "continuous", kind.as_str()]).inc();
            let fields = [("group", name), ("run", id.to_string())];
            self.events.record(unix_ms(), "mode.continuous", "the final round is committed", fields);
        }
    }

    fn on_ended(
        &mut self,
        group: GroupId,
        id: u64,
        kind: RunKind,
        committed: bool,
        why: &str,
        refused: Option<String>,
    ) {
        let (counts, duration) = self.counts_of(group).unwrap_or_default();
        if self.running.as_ref().is_some_and(|running| running.id == id && running.group == group) {
            self.running = None;
            self.polling = None;
            self.calls.reset();
            self.measured.run_sent = 0;
        }
        let result = if committed { "committed" } else { "aborted" };
        self.metrics.delta_runs.with_label_values(&[result]).inc();
        self.metrics.delta_run_seconds.observe(duration.as_secs_f64());
        for (kind, bytes) in
            [("sent", counts.sent_bytes), ("skipped", counts.skipped_bytes), ("zero", counts.zero_bytes)]
        {
            self.metrics.delta_bytes.with_label_values(&[kind]).inc_by(bytes);
        }
        let seconds = duration.as_secs_f64();
        info!(%group, run = id, kind = kind.as_str(), result, why, seconds, sent_bytes = counts.sent_bytes, "run ended");
        let fields = [
            ("group", group.to_string()),
            ("run", id.to_string()),
            ("kind", kind.as_str().to_owned()),
            ("seconds", format!("{seconds:.3}")),
            ("sent_bytes", counts.sent_bytes.to_string()),
            ("done_bytes", counts.done_bytes.to_string()),
            ("skipped_bytes", counts.skipped_bytes.to_string()),
            ("zero_bytes", counts.zero_bytes.to_string()),
            ("why", why.to_owned()),
        ];
        self.events.record(unix_ms(), &format!("run.{result}"), format!("{} run {id}", kind.as_str()), fields);
        let ended_ms = millis(self.start.elapsed());
        let entry = self.groups.entry(group).or_default();
        // What an aborted run wrote is there: the next one compares before it sends.
        entry.compare_next = !committed;
        let bytes = counts.done_bytes;
        entry.last_run = Some(LastRun { kind, committed, bytes, duration_ms: millis(duration), ended_ms, refused });
        let refused = entry.last_run.as_ref().is_some_and(|run| run.refused.is_some());
        let report =
            RunReport { kind, committed, refused, why: why.to_owned(), counts, duration, ended_unix_ms: unix_ms() };
        self.handle.0.views.lock().entry(group).or_default().last_run = Some(report);
        self.handle.wake();
    }
}

impl Running {
    fn waits_for_cut(&self) -> bool {
        self.runner.as_ref().is_some_and(Runner::waits_for_cut)
    }
}

/// True if a volume of the group is acknowledged by both sides.
fn is_both(store: &Store, group: GroupId) -> bool {
    store.with_state(|state| state.volumes_of(group).any(|spec| spec.ack == AckRule::Both))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
