//! The whole pair in virtual time: the real services and link over a simulated network, stores on simulated disks.
//!
//! One thread, one seed: hosts "primary", "backup" and "client" run the code of the services (tonic, hyper, h2, the
//! stages of the stores) on paused clocks, so a seed decides every latency, fault and interleaving, and seconds pass in
//! milliseconds. `sim` explores more interleavings of the cores; this finds what lies between them and the sockets:
//! deadlines, half-open connections, sessions, restarts, repeated calls.
//!
//! Faults: links that drop, drop one way, or hold messages back and deliver them late; hosts that lose their process or
//! their power, disks that die in the middle of an operation or of a recovery, and orderly restarts. In half of the seeds
//! every criterion of the mode policy may move groups; [`scenario`] has pairs in which only a script disturbs anything.
//!
//! The oracle checks P1 (an acknowledged write is there after each restart, and on the backup if it was acknowledged as
//! both), P4 (the backup's image is one that the primary had at the position it names), P5 (when faults end the pair
//! comes to rest with equal images), P10 (reads see acknowledged writes) and P11 (repeated sequences have no second
//! effect).

mod client;
mod hosts;
mod model;
pub mod scenario;

use std::{cell::Cell, panic, sync::Arc, sync::Once, time::Duration};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_pcg::Pcg64Mcg;
use turmoil::Sim;
use understudy_common::{
    policy::{Criteria, PolicyConfig, Ratio, Schedule},
    store::Role,
};

use hosts::Machine;
use model::Model;

/// Time that the pair has, after faults have ended, to come to rest.
const REST: Duration = Duration::from_secs(60);
/// How far the clocks move at a time.
const TICK: Duration = Duration::from_millis(1);

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Acknowledged writes.
    pub acked: u64,
    /// Attempts that had to be repeated.
    pub retries: u64,
    /// Images of the backup that were compared.
    pub images: u64,
    /// Disturbances of a link.
    pub cuts: u64,
    /// Restarts of either node.
    pub restarts: u64,
    /// Writes acknowledged in delta mode.
    pub acked_in_delta: u64,
    /// Changes of a group's mode, either way, that its acknowledgements show.
    pub mode_changes: u64,
    /// When the run ended.
    pub virtual_millis: u128,
    /// Hash of what clients saw, where, and when.
    pub trace: u64,
}

/// A broken promise, and what came before it.
#[derive(Debug)]
pub struct Violation {
    /// What was broken.
    pub what: String,
    /// The newest lines of the trace.
    pub report: String,
}

/// What may happen in a run; decided by the seed ("swarm": each run has some faults and not others).
struct Faults {
    pair_link: bool,
    client_link: bool,
    primary_crashes: bool,
    backup_crashes: bool,
    power_loss: bool,
    restarts: bool,
    /// Longest time between two faults, milliseconds.
    every_millis: u64,
}

/// A link between two hosts, and until when it is disturbed.
struct Wire {
    ends: (&'static str, &'static str),
    repaired_at: Option<(Duration, Cut)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Drop,
    DropThere,
    DropBack,
    Hold,
}

struct Host {
    machine: Arc<Machine>,
    name: &'static str,
    /// When a host that is down comes back.
    back_at: Option<Duration>,
}

struct Controller {
    rng: Pcg64Mcg,
    faults: Faults,
    model: Arc<Mutex<Model>>,
    wires: [Wire; 3],
    hosts: [Host; 2],
    next_fault: Duration,
    cuts: u64,
    restarts: u64,
}

thread_local! {
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

/// A panic of a task ends a service; tokio would only end the task.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            before(info);
        }));
    });
    PANICS.set(0);
}

/// Runs one seed, with faults for `disturbed` of virtual time.
///
/// # Errors
/// The first promise that was broken.
pub fn run(seed: u64, disturbed: Duration) -> Result<Summary, Violation> {
    count_panics();
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let model = Arc::new(Mutex::new(Model::new()));
    let slow = rng.random_bool(0.3);
    let mut sim = turmoil::Builder::new()
        .rng_seed(rng.random())
        .tick_duration(TICK)
        .min_message_latency(Duration::from_millis(rng.random_range(0..3)))
        .max_message_latency(Duration::from_millis(if slow { 80 } else { 8 }))
        .simulation_duration(disturbed + REST)
        .tcp_capacity(1024)
        .build();
    let policy = policy(&mut rng);
    let primary = Arc::new(Machine::new(Role::Primary, &mut rng, &model, policy.clone()));
    let backup = Arc::new(Machine::new(Role::Backup, &mut rng, &model, policy));
    let machine = Arc::clone(&primary);
    sim.host("primary", move || hosts::primary(Arc::clone(&machine)));
    let machine = Arc::clone(&backup);
    sim.host("backup", move || hosts::backup(Arc::clone(&machine)));
    sim.client("client", client::client(Arc::clone(&model), rng.random()));
    let mut controller = Controller::new(rng, model, primary, backup);
    let result = controller.run(&mut sim, disturbed);
    let virtual_millis = sim.elapsed().as_millis();
    // Before the model is read: what the hosts still hold ends here.
    drop(sim);
    let model = controller.model.lock();
    result.map_err(|what| Violation { what, report: model.report() })?;
    Ok(Summary {
        acked: model.acked,
        retries: model.retries,
        images: model.images,
        cuts: controller.cuts,
        restarts: controller.restarts,
        acked_in_delta: model.acked_in_delta,
        mode_changes: model.mode_changes,
        virtual_millis,
        trace: model.trace(),
    })
}

/// In half of the runs every criterion moves groups, at levels that are reached all the time; in the others nothing but
/// what a lost backup needs.
fn policy(rng: &mut Pcg64Mcg) -> PolicyConfig {
    let mut millis = |range| Duration::from_millis(rng.random_range(range));
    let (ack_delay_max, dwell, interval, idle_for) =
        (millis(500..1400), millis(100..600), millis(200..1500), millis(100..600));
    let policy = PolicyConfig {
        criteria: if rng.random() { Criteria::all() } else { Criteria::NONE },
        weigh_interval: Duration::from_millis(50),
        link_timeout: hosts::link().timeout,
        link_settle: Duration::from_millis(100),
        ack_delay_max,
        ack_delay_leave: Duration::from_millis(450),
        overflow_horizon: Duration::from_secs(1),
        redundancy_ratio: Ratio::from_f64(1.5),
        redundancy_floor_bytes: rng.random_range(1..32) << 10,
        redundancy_min_interval: Duration::from_millis(300),
        dwell,
        dwell_max: Duration::from_secs(2),
        schedule: *[Schedule::Periodic, Schedule::Idle, Schedule::Prompted].choose(rng).expect("three"),
        interval,
        idle_bytes_per_second: 64 << 10,
        idle_for,
        ..PolicyConfig::default()
    };
    assert_eq!(policy.validate(), [], "a policy that the service would refuse");
    policy
}

impl Controller {
    fn new(mut rng: Pcg64Mcg, model: Arc<Mutex<Model>>, primary: Arc<Machine>, backup: Arc<Machine>) -> Self {
        let faults = Faults {
            pair_link: rng.random_bool(0.7),
            client_link: rng.random_bool(0.5),
            primary_crashes: rng.random_bool(0.6),
            backup_crashes: rng.random_bool(0.6),
            power_loss: rng.random_bool(0.7),
            restarts: rng.random_bool(0.3),
            every_millis: rng.random_range(300..2500),
        };
        let wire = |a, b| Wire { ends: (a, b), repaired_at: None };
        let host = |name, machine| Host { machine, name, back_at: None };
        Self {
            rng,
            faults,
            model,
            wires: [wire("primary", "backup"), wire("client", "primary"), wire("client", "backup")],
            hosts: [host("primary", primary), host("backup", backup)],
            next_fault: Duration::from_millis(200),
            cuts: 0,
            restarts: 0,
        }
    }

    fn run(&mut self, sim: &mut Sim<'_>, disturbed: Duration) -> Result<(), String> {
        loop {
            let now = sim.elapsed();
            self.model.lock().now = now;
            let healed = now >= disturbed;
            if healed && !self.model.lock().healed {
                self.heal(sim);
            }
            if !healed && now >= self.next_fault {
                self.next_fault = now + self.millis(10, self.faults.every_millis);
                self.disturb(sim);
            }
            self.recover(sim);
            let finished = sim.step().map_err(|error| error.to_string());
            if PANICS.get() > 0 {
                return Err("a task panicked; see above".into());
            }
            if let Some(violation) = self.model.lock().violation() {
                return Err(violation.to_owned());
            }
            if finished? {
                return Ok(());
            }
        }
    }

    fn millis(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(self.rng.random_range(least..=most))
    }

    fn note(&self, line: String) {
        self.model.lock().note(line);
    }

    fn disturb(&mut self, sim: &mut Sim<'_>) {
        match self.rng.random_range(0..8) {
            0..2 if self.faults.pair_link => self.cut(sim, 0),
            2 if self.faults.client_link => {
                let which = self.rng.random_range(1..3);
                self.cut(sim, which);
            }
            3 if self.faults.primary_crashes => self.crash(sim, 0),
            4 if self.faults.backup_crashes => self.crash(sim, 1),
            5 if self.faults.primary_crashes => self.kill_disk(0),
            6 if self.faults.backup_crashes => self.kill_disk(1),
            7 if self.faults.restarts => {
                let host = self.hosts.choose(&mut self.rng).expect("two");
                host.machine.shutdown.lock().cancel();
                self.note(format!("{} is told to end", host.name));
            }
            _ => {}
        }
    }

    fn cut(&mut self, sim: &Sim<'_>, which: usize) {
        if self.wires[which].repaired_at.is_some() {
            return;
        }
        self.cuts += 1;
        let how = *[Cut::Drop, Cut::DropThere, Cut::DropBack, Cut::Hold].choose(&mut self.rng).expect("four");
        let (a, b) = self.wires[which].ends;
        match how {
            Cut::Drop => sim.partition(a, b),
            Cut::DropThere => sim.partition_oneway(a, b),
            Cut::DropBack => sim.partition_oneway(b, a),
            Cut::Hold => sim.hold(a, b),
        }
        let most = if self.rng.random_bool(0.2) { 4000 } else { 600 };
        let until = sim.elapsed() + self.millis(1, most);
        self.wires[which].repaired_at = Some((until, how));
        self.note(format!("{a} - {b}: {how:?} until {:.3}", until.as_secs_f64()));
    }

    /// The host is gone at once; its power with it, or only its process.
    fn crash(&mut self, sim: &mut Sim<'_>, which: usize) {
        let name = self.hosts[which].name;
        if sim.is_host_running(name) {
            self.note(format!("{name} crashes"));
            self.down(sim, which);
        }
    }

    fn down(&mut self, sim: &mut Sim<'_>, which: usize) {
        let name = self.hosts[which].name;
        sim.crash(name);
        let back = self.millis(1, 800);
        let host = &mut self.hosts[which];
        if self.faults.power_loss {
            host.machine.disk.crash(&mut self.rng);
        } else {
            host.machine.disk.kill();
        }
        host.back_at = Some(sim.elapsed() + back);
    }

    /// The disk dies in the middle of one of the next operations, also while the host recovers; the process notices.
    fn kill_disk(&mut self, which: usize) {
        let after = self.rng.random_range(1..60);
        let host = &self.hosts[which];
        host.machine.disk.crash_after(after);
        self.note(format!("the disk of {} dies after {after} operations", host.name));
    }

    /// Brings back what is down, and repairs what is due.
    fn recover(&mut self, sim: &mut Sim<'_>) {
        let now = sim.elapsed();
        for wire in &mut self.wires {
            if let Some((_, how)) = wire.repaired_at.take_if(|(at, _)| *at <= now) {
                repair(sim, wire.ends, how);
            }
        }
        for which in 0..self.hosts.len() {
            let name = self.hosts[which].name;
            match self.hosts[which].back_at {
                Some(at) if at <= now => {
                    self.hosts[which].back_at = None;
                    self.restarts += 1;
                    sim.bounce(name);
                }
                None if !sim.is_host_running(name) => {
                    self.note(format!("{name} has ended"));
                    self.down(sim, which);
                }
                _ => {}
            }
        }
    }

    fn heal(&mut self, sim: &mut Sim<'_>) {
        for wire in &mut self.wires {
            if let Some((_, how)) = wire.repaired_at.take() {
                repair(sim, wire.ends, how);
            }
        }
        for host in &self.hosts {
            host.machine.disk.cancel_crash();
        }
        let mut model = self.model.lock();
        model.healed = true;
        model.note("faults have ended".into());
    }
}

fn repair(sim: &Sim<'_>, (a, b): (&'static str, &'static str), how: Cut) {
    match how {
        Cut::Drop => sim.repair(a, b),
        Cut::DropThere => sim.repair_oneway(a, b),
        Cut::DropBack => sim.repair_oneway(b, a),
        Cut::Hold => sim.release(a, b),
    }
}
