//! Delta mode in the simulation: switches, runs and what may happen to them at any step.
//!
//! The mode policy is not part of it: switches, cuts, demotions and aborts come at random, at the worst moments. In the
//! end the simulation plays the policy until every group is continuous again.
//!
//! What may happen, each by a part of the seeds:
//!
//! - links are cut and nodes die at any step of a run, on either side; an open run ends with its primary's process;
//! - messages are repeated; those of an old connection, with batches and commits of runs that are over, arrive late;
//! - messages are lost, come twice, overtake each other, or come with a bit flipped, answers as well;
//! - the backup's disk is replaced by an older copy of itself, also one from the middle of a run, or by an empty one.
//!
//! What is checked is in [`checks`].

mod checks;
mod disks;
pub(crate) mod port;
mod wire;

use std::{collections::BTreeSet, sync::Arc};

use rand::{Rng, seq::IndexedRandom};
use understudy_backup::run_receiver::RunRefusal;
use understudy_common::{
    record::RunKind,
    state::PrimaryRun,
    storage::sim::SimStorage,
    store::{ModeError, SubmitError},
    types::{GroupId, Lsn, Uid},
};
use understudy_primary::{
    runner::{RunAnswer, RunError, RunOptions, RunRequest, Runner},
    sender::{Lost, Sender},
};
use understudy_proto::v1;

pub(super) use port::read;
use port::{Mode, Request};
pub use port::{read_applied, view};
use wire::{RunWire, Taken};

use super::{BLOCK, Outcome, World, broken, trace};

/// Connections that are gone and whose messages may still arrive.
const OLD_WIRES: usize = 3;

/// Paths that a large number of seeds must have reached.
pub const PATHS: &[&str] = &[
    "switches",
    "switches with records in flight",
    "rounds",
    "final rounds",
    "full rounds",
    "demotions",
    "aborts",
    "commits",
    "commits of a final round",
    "commits heard of behind a reconnect",
    "caught up",
    "runs gone on with",
    "runs superseded",
    "runs ended by a crash of the primary",
    "runs refused",
    "cuts with the LSN of one that was lost",
    "switches lost behind a checkpoint",
    "pieces found the same",
    "repeated messages",
    "late messages",
    "old disks put back",
    "old disks put back in a run",
    "empty disks put in",
    "groups that need everything",
    "power cuts of a copy of the backup",
    "messages lost",
    "batches taken twice refused",
    "batches out of order refused",
    "damaged requests refused",
    "damaged answers refused",
    "blocks marked at cuts",
    "blocks marked and equal",
    "blocks marked and equal: written again with the same content",
    "blocks marked and equal: the answer was not heard",
    "blocks marked and equal: kept by a recovery",
    "snapshots taken on one side",
];

/// What of delta mode a run is made of.
#[derive(Debug, Clone)]
struct Swarm {
    finals: bool,
    aborts: bool,
    demotions: bool,
    repeated: bool,
    damage: bool,
    old_disks: bool,
    empty_disks: bool,
    options: RunOptions,
}

pub(super) struct Delta {
    swarm: Swarm,
    /// The run that is being sent. The driver sends one at a time.
    runner: Option<Runner>,
    wires: Vec<RunWire>,
    /// It is to be given up, which the journal had no room to note yet.
    ending: bool,
    /// Of the runner; a new one begins with each run and each time that a run begins again.
    attempt: u64,
    /// Copies of the backup's disk, as a power cut would have left it.
    copies: Vec<SimStorage>,
    /// The primary has attached to the disk that is there now: the tables speak of it.
    bound: bool,
    /// The records by which it noted that the disk was another one end here; a crash may take them back.
    bound_at: Lsn,
    /// Groups that were in delta mode when the primary recovered, until a run of them is committed: their tables may hold
    /// marks that no record of the history made.
    recovered: BTreeSet<GroupId>,
}

impl Delta {
    pub fn new(rng: &mut impl Rng) -> Self {
        let options = RunOptions {
            window_bytes: rng.random_range(1..32) * 1024,
            chunk_bytes: rng.random_range(1..8) * 1024,
            piece_bytes: rng.random_range(1..4) * BLOCK as u64,
            compress: rng.random(),
            digests: rng.random_bool(0.3),
        };
        let swarm = Swarm {
            finals: rng.random_bool(0.8),
            aborts: rng.random_bool(0.5),
            demotions: rng.random_bool(0.5),
            repeated: rng.random_bool(0.4),
            damage: rng.random_bool(0.3),
            old_disks: rng.random_bool(0.3),
            empty_disks: rng.random_bool(0.2),
            options,
        };
        Self {
            swarm,
            runner: None,
            wires: Vec::new(),
            ending: false,
            attempt: 0,
            copies: Vec::new(),
            bound: false,
            bound_at: Lsn::ZERO,
            recovered: BTreeSet::new(),
        }
    }

    /// Nothing is damaged any more.
    pub fn heal(&mut self) {
        self.swarm.damage = false;
    }

    /// The primary has met the disk that is there now.
    pub fn is_bound(&self) -> bool {
        self.bound
    }

    /// The run begins, or begins again.
    fn attach_runner(&mut self) {
        self.attempt += 1;
        let session = self.wire().map(|wire| wire.session);
        if let Some((runner, session)) = self.runner.as_mut().zip(session).filter(|_| !self.ending) {
            runner.on_attached(&session.0);
        }
    }

    fn wire(&mut self) -> Option<&mut RunWire> {
        self.wires.iter_mut().find(|wire| !wire.old)
    }
}

impl World {
    fn delta(&mut self) -> &mut Delta {
        self.delta.as_mut().expect("a run with delta mode")
    }

    /// One step of delta mode, instead of one of the others.
    pub(super) fn delta_step(&mut self) -> Outcome {
        let choice = self.rng.random_range(0..100_u32);
        self.note(u64::from(choice));
        let swarm = self.delta().swarm.clone();
        match choice {
            0..3 => self.switch_one(),
            3 if self.faults.primary_crashes && self.faults.power_loss && self.rng.random_bool(0.3) => {
                self.lose_switches()
            }
            4..16 => self.begin_one(),
            16..18 if swarm.demotions => self.demote_one(),
            18..20 if swarm.aborts => self.abort_one(),
            20..92 => self.turn_run(),
            92..94 if swarm.old_disks => {
                self.copy_backup();
                Ok(())
            }
            94 if (swarm.old_disks || swarm.empty_disks) && self.rng.random_bool(0.2) => self.replace_backup(),
            95 if self.rng.random_bool(0.2) => self.check_power_cut_of_backup(),
            95 if self.rng.random_bool(0.5) => self.catch_up(),
            96..98 => self.check_cover(),
            98..100 => self.check_ledgers(),
            _ => Ok(()),
        }
    }

    // --- the nodes' lives

    pub(super) fn delta_primary_started(&mut self) -> Outcome {
        if self.delta.is_none() {
            return Ok(());
        }
        let store = Arc::clone(self.primary.store());
        let durable = store.marks().borrow().durable;
        let in_delta = |group: &GroupId| !matches!(port::mode(&store, *group), Some(Mode::Continuous { .. }));
        let recovered = port::groups(&store).into_iter().filter(in_delta).collect();
        let delta = self.delta();
        delta.bound &= delta.bound_at <= durable;
        delta.recovered = recovered;
        delta.ending = false;
        if let Some(runner) = self.delta().runner.take() {
            let group = runner.group();
            if !runner.is_done() && matches!(port::mode(&store, group), Some(Mode::Run(_))) {
                return Err(broken(format!("a run of group {group} is open behind a restart")));
            }
            self.summary.count("runs ended by a crash of the primary", u64::from(!runner.is_done()));
            self.check_cover()?;
            self.check_ledgers()?;
            return self.cut_again(group, runner.run().id);
        }
        self.check_cover()?;
        self.check_ledgers()
    }

    /// The cut of a run was lost: another one of its group may get its LSN, and so its name.
    fn cut_again(&mut self, group: GroupId, id: u64) -> Outcome {
        let store = Arc::clone(self.primary.store());
        if !(store.next_lsn().0..store.next_lsn().0 + 16).contains(&id) || self.rng.random() {
            return Ok(());
        }
        for _ in 0..32 {
            if store.next_lsn().0 >= id {
                break;
            }
            self.client_write()?;
        }
        if store.next_lsn().0 == id && port::mode(&store, group) == Some(Mode::Tracking) {
            let time = self.time;
            if let Some(run) = self.took(store.cut(group, RunKind::Final, time))? {
                self.summary.count("cuts with the LSN of one that was lost", 1);
                return self.start_runner(group, run);
            }
        }
        Ok(())
    }

    pub(super) fn delta_backup_started(&mut self) -> Outcome {
        self.check_cover()
    }

    pub(super) fn delta_attached(&mut self, session: Uid, lost: &[Lost]) -> Outcome {
        if self.delta.is_none() {
            return match lost.first() {
                Some(lost) => Err(broken(format!("a group is lost without cause: {lost:?}"))),
                None => Ok(()),
            };
        }
        trace!(
            self,
            "attached; lost {lost:?}, {:?}, {:?}",
            self.primary.store().retained(),
            self.backup.store().with_state(|state| state.groups.clone())
        );
        self.summary.count("groups that need everything", lost.len() as u64);
        let newest = Lsn(self.primary.store().next_lsn().0 - 1);
        let delta = self.delta();
        if !delta.bound {
            (delta.bound, delta.bound_at) = (true, newest);
        }
        delta.wires.push(RunWire::new(session));
        delta.attach_runner();
        self.check_cover()
    }

    pub(super) fn delta_detached(&mut self) {
        let late = self.faults.late_frames;
        let Some(delta) = &mut self.delta else { return };
        if let Some(runner) = &mut delta.runner {
            runner.on_detached();
        }
        delta.wires.iter_mut().for_each(RunWire::cut);
        if !late {
            delta.wires.clear();
        }
        let excess = delta.wires.len().saturating_sub(OLD_WIRES);
        delta.wires.drain(..excess);
    }

    // --- what an operator and the policy do

    fn one_where(&mut self, want: impl Fn(Mode) -> bool) -> Option<GroupId> {
        let store = self.primary.store();
        let fits = |group: &GroupId| port::mode(store, *group).is_some_and(&want);
        let groups: Vec<GroupId> = port::groups(store).into_iter().filter(fits).collect();
        groups.choose(&mut self.rng).copied()
    }

    /// What the store may refuse of a record of delta mode: the journal keeps a reserve for them, and the checkpoint that
    /// gives it back must come.
    fn took<T>(&mut self, result: Result<T, ModeError>) -> Result<Option<T>, super::Violation> {
        match result {
            Ok(taken) => Ok(Some(taken)),
            Err(ModeError::Submit(SubmitError::Failed(_))) => Ok(None),
            Err(ModeError::Submit(SubmitError::StagingFull { .. })) => {
                self.primary.store().request_checkpoint();
                Ok(None)
            }
            Err(error) => Err(broken(format!("a step between modes was refused: {error}"))),
        }
    }

    fn switch_one(&mut self) -> Outcome {
        let Some(group) = self.one_where(|mode| matches!(mode, Mode::Continuous { .. })) else { return Ok(()) };
        let (store, time) = (Arc::clone(self.primary.store()), self.time);
        let in_flight = self.sender.as_ref().is_some_and(|sender| sender.in_flight() > 0);
        if self.took(store.switch(group, "operator", false, time))?.is_some() {
            trace!(self, "switch of group {group}");
            self.summary.count("switches", 1);
            self.summary.count("switches with records in flight", u64::from(in_flight));
        }
        self.check_ledgers()?;
        self.check_cover()?;
        Ok(())
    }

    /// A checkpoint lets go of what switches have released, and the power fails before the switches are durable.
    fn lose_switches(&mut self) -> Outcome {
        for _ in 0..self.rng.random_range(0..60) {
            self.client_write()?;
        }
        self.primary.drain(&mut self.rng);
        self.acknowledge()?;
        while self.one_where(|mode| matches!(mode, Mode::Continuous { .. })).is_some() {
            let before = self.primary.store().next_lsn();
            self.switch_one()?;
            if self.primary.store().next_lsn() == before {
                return Ok(());
            }
        }
        self.primary.checkpoint_now();
        self.summary.count("switches lost behind a checkpoint", 1);
        self.cut_power_of_primary()
    }

    fn begin_one(&mut self) -> Outcome {
        let finals = self.delta().swarm.finals;
        let kind = match self.rng.random_range(0..10) {
            0..5 if finals => RunKind::Final,
            5 if finals => RunKind::Redundancy,
            6 => RunKind::Full,
            _ => RunKind::Round,
        };
        match self.one_where(|mode| mode == Mode::Tracking) {
            Some(group) => self.begin_run(group, kind),
            None => Ok(()),
        }
    }

    fn begin_run(&mut self, group: GroupId, kind: RunKind) -> Outcome {
        if self.delta().runner.is_some() || !self.sender.as_ref().is_some_and(Sender::is_attached) {
            return Ok(());
        }
        let (store, time) = (Arc::clone(self.primary.store()), self.time);
        let Some(run) = self.took(store.cut(group, kind, time))? else { return Ok(()) };
        self.start_runner(group, run)
    }

    fn start_runner(&mut self, group: GroupId, run: PrimaryRun) -> Outcome {
        let (store, kind) = (Arc::clone(self.primary.store()), run.kind);
        self.summary.count(
            match kind {
                RunKind::Round => "rounds",
                RunKind::Final | RunKind::Redundancy => "final rounds",
                RunKind::Full => "full rounds",
            },
            1,
        );
        trace!(self, "run {} of group {group}: {kind}", run.id);
        self.check_excess(group, &run)?;
        let mut options = self.delta().swarm.options;
        options.digests |= kind == RunKind::Full;
        let delta = self.delta();
        (delta.runner, delta.ending) = (Some(Runner::new(store, group, run, options)), false);
        delta.attach_runner();
        self.check_cover()
    }

    fn demote_one(&mut self) -> Outcome {
        let retains = |mode| matches!(mode, Mode::Run(open) if open.kind.retains());
        let Some(group) = self.one_where(retains) else { return Ok(()) };
        let (store, time) = (Arc::clone(self.primary.store()), self.time);
        if self.took(store.demote(group, time))?.is_some() {
            trace!(self, "demotion of group {group}");
            self.summary.count("demotions", 1);
        }
        self.check_cover()?;
        self.check_ledgers()
    }

    fn abort_one(&mut self) -> Outcome {
        if self.delta().runner.is_some() {
            self.summary.count("aborts", 1);
        }
        self.abort_run()
    }

    /// Gives the run up: here first, and the backup is told.
    fn abort_run(&mut self) -> Outcome {
        let Some(runner) = self.delta().runner.take() else { return Ok(()) };
        let (store, time) = (Arc::clone(self.primary.store()), self.time);
        let (group, run) = (runner.group(), runner.run().id);
        if store.run_of(group).is_some_and(|open| open.id == run)
            && self.took(store.abort_run(group, run, time))?.is_none()
        {
            // It asks for nothing any more, and nobody hears what was asked.
            let delta = self.delta();
            (delta.runner, delta.ending) = (Some(runner), true);
            delta.attempt += 1;
            return Ok(());
        }
        self.delta().ending = false;
        trace!(self, "abort of run {run} of group {group}");
        let delta = self.delta();
        delta.attempt += 1;
        let attempt = delta.attempt;
        if let Some(wire) = delta.wire() {
            wire.ask(attempt, Request::abort(wire.session, group, run));
        }
        self.check_cover()?;
        self.check_ledgers()
    }

    // --- messages

    pub(super) fn turn_run(&mut self) -> Outcome {
        if !self.link || self.delta().wire().is_none() {
            return self.deliver_late_request();
        }
        match self.rng.random_range(0..10) {
            0..3 => self.poll_runner(),
            3..6 => self.deliver_request(),
            6..9 => self.deliver_reply(),
            _ => self.deliver_late_request(),
        }
    }

    fn poll_runner(&mut self) -> Outcome {
        if self.delta().ending {
            return self.abort_run();
        }
        let Some(runner) = &mut self.delta().runner else { return Ok(()) };
        let run = runner.run().clone();
        match runner.poll() {
            Ok(Some(request)) => {
                trace!(self, "asks {}", port::brief(&request));
                self.check_claims(&run, &request)?;
                let request = Request::Run(request);
                let attempt = self.delta().attempt;
                if let Some(wire) = self.delta().wire() {
                    wire.ask(attempt, request);
                }
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(error) => self.run_failed(&error),
        }
    }

    /// True if the run that is being sent is the one of its group.
    fn is_open(&self) -> bool {
        let runner = self.delta.as_ref().and_then(|delta| delta.runner.as_ref());
        runner.is_some_and(|runner| {
            self.primary.store().run_of(runner.group()).is_some_and(|open| open.id == runner.run().id)
        })
    }

    /// A run that cannot go on is given up, if it may fail so.
    fn run_failed(&mut self, error: &RunError) -> Outcome {
        let live = self.model.live();
        let Some(runner) = &self.delta().runner else { return Ok(()) };
        let deleted = runner.run().specs.iter().any(|spec| !live.contains_key(&spec.id));
        match error {
            RunError::Refused { .. } => self.summary.count("runs refused", 1),
            RunError::Ended => {}
            // An attach has ended it, which found everything marked.
            RunError::Mode(ModeError::Illegal { .. }) if !self.is_open() => {}
            RunError::Read { .. } if deleted => {}
            RunError::Mode(ModeError::Submit(SubmitError::Failed(_))) => {}
            // The journal's reserve is used up: the backup has the commit, and here the run is aborted when there is room.
            RunError::Mode(ModeError::Submit(SubmitError::StagingFull { .. })) => {}
            _ if self.primary.store().failure().is_some() => {}
            error => return Err(broken(format!("a run cannot go on: {error}"))),
        }
        self.abort_run()
    }

    fn deliver_request(&mut self) -> Outcome {
        let time = self.time;
        if self.delta().swarm.damage && self.rng.random_bool(0.03) {
            return self.damage_request();
        }
        let repeat = self.delta().swarm.repeated && self.rng.random_bool(0.05);
        let Some(wire) = self.delta.as_mut().and_then(Delta::wire) else { return Ok(()) };
        let Some(taken) = wire.take(&mut self.rng) else { return Ok(()) };
        let request = &taken.request;
        let before = request.begins().and_then(|(group, run)| Some((self.backup.store().replica_run(group)?.id, run)));
        let result = port::deliver(self.receiver.as_mut().expect("the backup is up"), request, time);
        if self.trace {
            let next = self.backup.store().next_lsn();
            let result = result.as_ref().map(|reply| reply.at).map_err(ToString::to_string);
            trace!(self, "backup (next {next}) takes {}: {result:?}", port::brief_request(request));
        }
        self.summary.count("runs superseded", u64::from(before.is_some_and(|(open, run)| open != run)));
        if self.backup.check_failure()? {
            self.summary.count("failed syncs", 1);
            return self.crash_backup(Some(true));
        }
        let delta = self.delta.as_mut().expect("a run with delta mode");
        let current = delta.attempt == taken.attempt;
        let wire = delta.wire().expect("it is open");
        match result {
            Ok(reply) => {
                wire.answer(&taken, reply);
                if repeat && !request.is_batch() {
                    // A call that arrives twice; what is said to the second goes to nobody.
                    let _ = port::deliver(self.receiver.as_mut().expect("the backup is up"), request, time);
                    self.summary.count("repeated messages", 1);
                }
                Ok(())
            }
            Err(RunRefusal::Busy(_)) => {
                wire.put_back(taken);
                self.summary.count("busy answers", 1);
                Ok(())
            }
            Err(refusal) if current => self.refused_request(&taken, refusal),
            Err(_) => Ok(()),
        }
    }

    /// The network does to a message what it should not. What the backup cannot tell from what was sent it must refuse, and
    /// then the run begins again, as behind a call that failed.
    fn damage_request(&mut self) -> Outcome {
        let Some(wire) = self.delta.as_mut().and_then(Delta::wire) else { return Ok(()) };
        let Some(taken) = wire.take(&mut self.rng) else { return Ok(()) };
        let batch = taken.request.is_batch();
        match self.rng.random_range(0..4) {
            0 => self.summary.count("messages lost", 1),
            1 if batch => {
                let Some(next) = wire.take_behind(&taken) else {
                    wire.put_back(taken);
                    return Ok(());
                };
                self.refuses(&next.request, "batches out of order refused", "a batch that has overtaken another one")?;
            }
            2 if batch => {
                if self.deliver_unheard(&taken.request)? {
                    self.refuses(&taken.request, "batches taken twice refused", "a batch that came twice")?;
                }
            }
            _ => match taken.request.flipped(&mut self.rng) {
                // Not even a message, which the connection says; or no harm was done, and it is lost instead.
                None => self.summary.count("damaged requests refused", 1),
                // What was written when the batch found no room in its middle is not looked at again, and some data has more
                // than one compressed form: the images tell whether damage was believed.
                Some(damaged) if damaged.differs_in_data(&taken.request) => {
                    let taken = self.deliver_unheard(&damaged)?;
                    self.summary.count("damaged requests refused", u64::from(!taken));
                }
                Some(damaged) => self.refuses(&damaged, "damaged requests refused", "a message with a flipped bit")?,
            },
        }
        trace!(self, "damaged: {}", port::brief_request(&taken.request));
        self.delta().attach_runner();
        Ok(())
    }

    /// Hands a message to the backup, whose answer nobody hears; true if it is taken.
    fn deliver_unheard(&mut self, request: &Request) -> Result<bool, super::Violation> {
        let time = self.time;
        let taken = port::deliver(self.receiver.as_mut().expect("the backup is up"), request, time).is_ok();
        Ok(taken && !self.survive_backup_failure()?)
    }

    fn refuses(&mut self, request: &Request, path: &'static str, what: &str) -> Outcome {
        if self.deliver_unheard(request)? {
            return Err(broken(format!("{what} was taken: {}", port::brief_request(request))));
        }
        self.summary.count(path, 1);
        Ok(())
    }

    /// True if the backup has failed, and was started again.
    fn survive_backup_failure(&mut self) -> Result<bool, super::Violation> {
        let failed = self.backup.check_failure()?;
        if failed {
            self.summary.count("failed syncs", 1);
            self.crash_backup(Some(true))?;
        }
        Ok(failed)
    }

    /// What the driver does when the backup refuses: a run that the backup cannot take is given up; one that is not open
    /// there begins again, or is given up.
    fn refused_request(&mut self, taken: &Taken, refusal: RunRefusal) -> Outcome {
        let Request::Run(request) = &taken.request else {
            // It is told to be polite: the next run supersedes this one.
            return Ok(());
        };
        match refusal {
            RunRefusal::Cannot(why) => {
                let refusal = v1::Refusal { cause: why.cause.into(), message: why.message, ..v1::Refusal::default() };
                let error = RunError::Refused { cause: refusal.cause, message: refusal.message };
                self.run_failed(&error)
            }
            RunRefusal::NotOpen { .. } => {
                if !matches!(request, RunRequest::Begin(_)) && self.rng.random() {
                    self.delta().attach_runner();
                    return Ok(());
                }
                self.abort_run()
            }
            RunRefusal::Store(SubmitError::StagingFull { .. }) => {
                self.backup.store().request_checkpoint();
                self.abort_run()
            }
            refusal => Err(broken(format!("a message of a run was refused: {refusal}"))),
        }
    }

    fn deliver_reply(&mut self) -> Outcome {
        let durable = self.backup.store().marks().borrow().durable;
        let delta = self.delta.as_mut().expect("a run with delta mode");
        let attempt = delta.attempt;
        let Some(reply) = delta.wire().and_then(|wire| wire.hear(&mut self.rng, attempt, durable)) else {
            return Ok(());
        };
        let answer = match reply.answer() {
            Ok(Some(answer)) => answer,
            Ok(None) => return Ok(()),
            Err(error) => return Err(broken(format!("digests were refused: {error}"))),
        };
        if self.delta().swarm.damage && self.rng.random_bool(0.02) {
            return self.damage_answer(&answer);
        }
        let time = self.time;
        trace!(self, "primary (next {}) hears {}", self.primary.store().next_lsn(), port::brief_answer(&answer));
        let Some(runner) = &mut self.delta().runner else { return Ok(()) };
        let skipped = runner.counts().skipped_bytes;
        match &answer {
            RunAnswer::Begin(begin) if begin.committed => {
                self.summary.count("commits heard of behind a reconnect", 1);
            }
            RunAnswer::Begin(begin) if begin.progress.is_some() => self.summary.count("runs gone on with", 1),
            _ => {}
        }
        let Some(runner) = &mut self.delta().runner else { return Ok(()) };
        if let Err(error) = runner.on_answer(answer, time) {
            return self.run_failed(&error);
        }
        let same = runner.counts().skipped_bytes > skipped;
        let done = runner.is_done().then(|| runner.group());
        self.summary.count("pieces found the same", u64::from(same));
        match done {
            Some(group) => self.run_done(group),
            None => Ok(()),
        }
    }

    /// An answer comes with a bit flipped, or not at all.
    fn damage_answer(&mut self, answer: &RunAnswer) -> Outcome {
        let damaged = port::flipped_answer(answer, &mut self.rng).filter(|_| self.rng.random_bool(0.8));
        let Some(damaged) = damaged else {
            self.summary.count("messages lost", 1);
            self.delta().attach_runner();
            return Ok(());
        };
        let time = self.time;
        let Some(runner) = &mut self.delta().runner else { return Ok(()) };
        match runner.on_answer(damaged, time) {
            Err(RunError::Damaged) => {
                self.summary.count("damaged answers refused", 1);
                self.abort_run()
            }
            taken => Err(broken(format!("an answer with a flipped bit was taken: {taken:?}"))),
        }
    }

    /// The run is cleared here: the backup must hold it, whatever happens now.
    fn run_done(&mut self, group: GroupId) -> Outcome {
        let Some(runner) = self.delta().runner.take() else { return Ok(()) };
        self.summary.count("commits", 1);
        self.delta().recovered.remove(&group);
        let store = self.primary.store();
        match port::mode(store, group) {
            Some(Mode::Continuous { from }) => {
                if from.0 != runner.run().id {
                    return Err(broken(format!("group {group} is continuous again, but not from its cut on")));
                }
                self.summary.count("commits of a final round", 1);
            }
            Some(Mode::Run(_)) => return Err(broken(format!("a run of group {group} is done and open"))),
            Some(Mode::Tracking) | None => {}
        }
        self.check_ledgers()?;
        self.check_cover()?;
        if self.rng.random_bool(0.5) { self.check_power_cut_of_backup() } else { Ok(()) }
    }

    /// A message of a connection that is gone arrives after all; what is said to it goes to nobody.
    fn deliver_late_request(&mut self) -> Outcome {
        let time = self.time;
        let Some(receiver) = &mut self.receiver else { return Ok(()) };
        let delta = self.delta.as_mut().expect("a run with delta mode");
        let late = delta.wires.iter_mut().filter(|wire| wire.old).find_map(|wire| wire.take(&mut self.rng));
        let Some(Taken { request, .. }) = late else { return Ok(()) };
        let result = port::deliver(receiver, &request, time).map(|reply| reply.at).map_err(|e| e.to_string());
        trace!(self, "late: backup takes {}: {result:?}", port::brief_request(&request));
        self.summary.count("late messages", 1);
        if self.backup.check_failure()? {
            self.summary.count("failed syncs", 1);
            return self.crash_backup(Some(true));
        }
        Ok(())
    }

    // --- undisturbed

    /// Nothing disturbs the pair for a while: runs are committed, groups come back to continuous mode, or almost.
    fn catch_up(&mut self) -> Outcome {
        self.link = true;
        for _ in 0..self.rng.random_range(100..1500) {
            if self.is_quiet() {
                self.summary.count("caught up", 1);
                break;
            }
            self.time += 5;
            self.turn_primary()?;
            self.turn_backup()?;
            self.turn_link()?;
            self.settle_delta()?;
        }
        self.acknowledge()
    }

    /// Plays the policy: every group goes back to continuous mode by a final round, behind a full one if almost all of it
    /// is marked.
    pub(super) fn settle_delta(&mut self) -> Outcome {
        if self.delta.is_none() {
            return Ok(());
        }
        if self.delta().runner.is_none()
            && self.rng.random_bool(0.1)
            && let Some(group) = self.one_where(|mode| mode == Mode::Tracking)
        {
            let store = self.primary.store();
            let blocks: u64 = store.with_state(|state| state.volumes_of(group).map(|spec| spec.block_count()).sum());
            let full = store.delta_sizes(group).active_blocks > blocks / 2;
            self.begin_run(group, if full { RunKind::Full } else { RunKind::Final })?;
        }
        for _ in 0..4 {
            self.turn_run()?;
        }
        Ok(())
    }

    /// Every group is continuous, and the primary has looked at the backup that is there.
    pub(super) fn is_delta_quiet(&self) -> bool {
        let Some(delta) = &self.delta else { return true };
        let store = self.primary.store();
        let continuous = |group| matches!(port::mode(store, group), Some(Mode::Continuous { .. }));
        let attached = self.sender.as_ref().is_some_and(Sender::is_attached);
        attached && delta.bound && port::groups(store).into_iter().all(continuous)
    }

    /// For the message that the pair does not come to rest.
    pub(super) fn delta_note(&self) -> String {
        let store = self.primary.store();
        let mode = |group: &GroupId| format!("group {group}: {:?}; ", port::mode(store, *group));
        port::groups(store).iter().map(mode).collect()
    }
}
