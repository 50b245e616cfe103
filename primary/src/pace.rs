//! How fast a run may go beside clients (`[delta] throttle`), and records may be sent (`[link] throttle`). Pure: times and
//! measurements come in as arguments.
//!
//! Adaptive: the rate falls when acknowledged writes take noticeably longer, or are noticeably fewer, than without a run,
//! and grows otherwise. Both count: where processors are short, requests wait where this node does not see them yet. It
//! never falls below [`RATE_MIN`], so that a run always progresses, nor, up to [`RATE_START`], below twice what clients
//! write: a run that is slower than they are leaves more behind than it has carried, and the group would never return.
//!
//! How writes fare without a run is learnt at once where they fare better than was known. That they fare worse is learnt
//! only when no run has been under way for a while, or one goes at its lowest rate: otherwise runs one behind the other
//! would teach what they make of it themselves. Clients that have just written and are not heard of are taken for delayed,
//! not for gone.

use std::time::Duration;

use understudy_common::config::Throttle;

/// The lowest rate, bytes a second.
const RATE_MIN: f64 = (4 << 20) as f64;
/// Where a run begins beside clients at most, bytes a second.
const RATE_START: f64 = (32 << 20) as f64;
/// The highest rate that is told from none.
const RATE_MAX: f64 = (16_u64 << 30) as f64;
/// A run slows down when a write takes so many times as long as without one, or there are so many times fewer.
const SLOWED: f64 = 1.3;
/// It goes faster while it is less than so many times.
const UNHURT: f64 = 1.15;
/// Writes a second from which on their number tells something.
const MANY: f64 = 1000.0;
/// Time over which writes are counted.
const COUNTED: Duration = Duration::from_millis(100);
/// Of a tick's mean, what is learnt: where writes fare better than was known, and where they fare worse.
const LEARNT: (f64, f64) = (0.05, 0.02);
/// A run is not felt any more so long after its end.
const SETTLED: Duration = Duration::from_millis(300);
/// Clients that have written so recently are still there.
const PRESENT: Duration = Duration::from_secs(1);
/// What is sent at once at most takes so long at the rate, seconds.
const CHUNK_SECONDS: f64 = 0.01;
/// And not less than this, bytes.
const CHUNK_MIN: u64 = 64 << 10;
/// What is sent at once after a pause, in seconds of the rate.
const BURST_SECONDS: f64 = 0.02;

/// Acknowledged writes since the last look.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ClientLoad {
    /// How many.
    pub writes: u64,
    /// Bytes that were written meanwhile.
    pub bytes: u64,
    /// Their mean time from the request to the acknowledgement, seconds.
    pub mean_seconds: f64,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Pace {
    throttle: Throttle,
    /// Mean time of a write without a run, seconds; `None` until there were some.
    calm_seconds: Option<f64>,
    /// Writes a second without a run.
    calm_writes: f64,
    /// Writes a second of late.
    writes: f64,
    /// Bytes a second that clients write.
    usage: f64,
    rate: f64,
    /// Since the last run.
    rested: Duration,
    /// Since the last acknowledged write.
    quiet: Duration,
    /// Bytes that may be sent now; negative while a batch is paid off.
    credit: f64,
}

impl Pace {
    /// As the setting says.
    #[must_use]
    pub fn new(throttle: Throttle) -> Self {
        let (calm_seconds, calm_writes, writes, usage) = (None, 0.0, 0.0, 0.0);
        let (rate, rested, quiet, credit) = (RATE_START, SETTLED, PRESENT, 0.0);
        Self { throttle, calm_seconds, calm_writes, writes, usage, rate, rested, quiet, credit }
    }

    /// A run begins, at what the one before has come down to.
    pub fn on_begun(&mut self) {
        (self.rate, self.credit) = (self.rate.min(RATE_START), 0.0);
    }

    /// `elapsed` has passed with this load of clients.
    pub fn on_tick(&mut self, elapsed: Duration, load: ClientLoad, in_run: bool) {
        self.quiet = if load.writes > 0 { Duration::ZERO } else { self.quiet.saturating_add(elapsed) };
        self.rested = if in_run { Duration::ZERO } else { self.rested.saturating_add(elapsed) };
        self.learn(elapsed, load, in_run);
        if !in_run {
            return;
        }
        if self.throttle == Throttle::Adaptive {
            let slowed = self.slowed(load);
            self.rate *= match load.writes {
                _ if self.quiet >= PRESENT => 2.0,
                0 => 1.0,
                _ if slowed > SLOWED => 0.8,
                _ if slowed > UNHURT => 1.0,
                _ => 1.05,
            };
            self.rate = self.rate.clamp(self.lowest(), RATE_MAX);
        }
        let rate = self.rate();
        self.credit = (self.credit + rate * elapsed.as_secs_f64()).min(rate * BURST_SECONDS);
    }

    fn lowest(&self) -> f64 {
        (2.0 * self.usage).clamp(RATE_MIN, RATE_START)
    }

    /// By how many times writes fare worse than without a run.
    fn slowed(&self, load: ClientLoad) -> f64 {
        let longer = self.calm_seconds.map_or(1.0, |calm| load.mean_seconds / calm.max(f64::MIN_POSITIVE));
        let fewer = if self.calm_writes >= MANY { self.calm_writes / self.writes.max(1.0) } else { 1.0 };
        longer.max(fewer)
    }

    #[allow(clippy::cast_precision_loss, reason = "a rate")]
    fn learn(&mut self, elapsed: Duration, load: ClientLoad, in_run: bool) {
        let seconds = elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let share = |over: Duration| (seconds / over.as_secs_f64()).min(1.0);
        self.writes += (load.writes as f64 / seconds - self.writes) * share(COUNTED);
        self.usage += (load.bytes as f64 / seconds - self.usage) * share(PRESENT);
        let is_calm = if in_run { self.rate <= self.lowest() } else { self.rested >= SETTLED };
        let learnt = |better: bool| match (better, is_calm) {
            (true, _) => LEARNT.0,
            (false, true) => LEARNT.1,
            (false, false) => 0.0,
        };
        self.calm_writes += (self.writes - self.calm_writes) * learnt(self.writes > self.calm_writes);
        if load.writes > 0 {
            // Nothing better is known at first.
            let calm = self.calm_seconds.get_or_insert(load.mean_seconds);
            *calm += (load.mean_seconds - *calm) * learnt(load.mean_seconds < *calm);
        }
    }

    /// Bytes to be sent at once, of `most`: so many that clients hardly feel them.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a size; bounded behind it")]
    pub fn chunk(&self, most: u64) -> u64 {
        match self.throttle {
            Throttle::Adaptive if self.quiet < PRESENT => (self.rate() * CHUNK_SECONDS) as u64,
            _ => most,
        }
        .clamp(CHUNK_MIN, most)
    }

    fn rate(&self) -> f64 {
        match self.throttle {
            Throttle::Adaptive => self.rate,
            Throttle::Unlimited => RATE_MAX,
            #[allow(clippy::cast_precision_loss, reason = "a rate")]
            Throttle::BytesPerSecond(rate) => rate as f64,
        }
    }

    /// True if something may be sent now.
    #[must_use]
    pub fn may_send(&self) -> bool {
        self.throttle == Throttle::Unlimited || self.credit >= 0.0
    }

    /// So many bytes were sent.
    #[allow(clippy::cast_precision_loss, reason = "a rate")]
    pub fn on_sent(&mut self, bytes: u64) {
        self.credit -= bytes as f64;
    }
}

/// Limit of continuous replication (`[link] throttle`). What is not sent yet is held, not late: no acknowledgement of it
/// is waited for.
#[derive(Debug, Clone)]
pub struct StreamPace {
    bytes_per_s: Option<u64>,
    /// What was sent is paid for at this time of the driver's clock.
    paid_at: Duration,
}

impl StreamPace {
    /// `None`: no limit.
    #[must_use]
    pub fn new(bytes_per_s: Option<u64>) -> Self {
        Self { bytes_per_s: bytes_per_s.filter(|rate| *rate > 0), paid_at: Duration::ZERO }
    }

    /// When something may be sent again; `None`: at once.
    #[must_use]
    pub fn waits_until(&self, now: Duration) -> Option<Duration> {
        Some(self.paid_at).filter(|at| *at > now)
    }

    /// Bytes to be sent at once, of `most`: so many that the pause behind them is short.
    #[must_use]
    pub fn chunk(&self, most: usize) -> usize {
        self.bytes_per_s.map_or(most, |rate| usize::try_from(rate / 20).unwrap_or(most).clamp(1, most))
    }

    /// So many bytes were sent.
    pub fn on_sent(&mut self, now: Duration, bytes: u64) {
        if let Some(rate) = self.bytes_per_s {
            let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate);
            let spent = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            self.paid_at = self.paid_at.max(now).saturating_add(spent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(10);

    fn run(pace: &mut Pace, ticks: usize, load: ClientLoad) -> u64 {
        let mut sent = 0;
        for _ in 0..ticks {
            pace.on_tick(TICK, load, true);
            while pace.may_send() && sent < u64::MAX / 2 {
                pace.on_sent(1 << 20);
                sent += 1 << 20;
                if sent > 64 << 30 {
                    return sent;
                }
            }
        }
        sent
    }

    /// A pace that has seen calm clients, in a run.
    fn beside(calm: ClientLoad) -> Pace {
        let mut pace = Pace::new(Throttle::Adaptive);
        for _ in 0..400 {
            pace.on_tick(TICK, calm, false);
        }
        pace.on_begun();
        pace
    }

    const CALM: ClientLoad = ClientLoad { writes: 100, bytes: 4096, mean_seconds: 0.001 };
    const SLOW: ClientLoad = ClientLoad { mean_seconds: 0.01, ..CALM };

    #[test]
    fn a_run_gives_way_to_clients_and_goes_on() {
        let mut pace = beside(CALM);
        let slowed = run(&mut pace, 100, SLOW);
        // A second at the lowest rate, and the way down to it.
        assert!((4 << 20..10 << 20).contains(&slowed), "{slowed}");
        assert_eq!(pace.chunk(1 << 20), 64 << 10);
        let unhurt = run(&mut pace, 1000, CALM);
        assert!(unhurt > 100 * slowed, "{unhurt}");
        assert_eq!(pace.chunk(1 << 20), 1 << 20);
    }

    #[test]
    fn a_run_carries_more_than_clients_write() {
        let mut pace = beside(ClientLoad { bytes: 160 << 10, ..CALM });
        // Half a second at twice the 16 MB a second that they write, however they fare.
        let sent = run(&mut pace, 50, ClientLoad { bytes: 160 << 10, ..SLOW });
        assert!((11 << 20..18 << 20).contains(&sent), "{sent}");
    }

    #[test]
    fn clients_that_are_delayed_are_not_taken_for_gone() {
        let none = ClientLoad::default();
        let mut pace = beside(CALM);
        run(&mut pace, 100, SLOW);
        // They write twice a second, and wait for it as long as the run lets them.
        let sent: u64 = (0..10).map(|_| run(&mut pace, 49, none) + run(&mut pace, 1, SLOW)).sum();
        assert!((20 << 20..26 << 20).contains(&sent), "{sent}");
        assert!(run(&mut pace, 400, none) > 4 << 30, "nobody writes");
    }

    #[test]
    fn runs_one_behind_the_other_do_not_teach_what_they_make_of_clients() {
        let mut pace = beside(CALM);
        // Twice the time at 64 MiB/s, and in the short pause behind a run as in it.
        let felt = |pace: &Pace| ClientLoad { mean_seconds: 0.001 * (1.0 + pace.rate / f64::from(64 << 20)), ..CALM };
        let mut slowest: f64 = 0.0;
        for _ in 0..200 {
            for tick in 0..70 {
                let load = felt(&pace);
                slowest = slowest.max(load.mean_seconds);
                pace.on_tick(TICK, load, tick < 50);
            }
            pace.on_begun();
        }
        assert!(slowest < 0.0016, "{slowest}");
    }

    #[test]
    fn a_run_gives_way_where_requests_wait_before_they_are_seen() {
        let mut pace = beside(CALM);
        // Those that come are answered as fast as ever, and there are half of them.
        let fewer = run(&mut pace, 100, ClientLoad { writes: 50, ..CALM });
        assert!((4 << 20..16 << 20).contains(&fewer), "{fewer}");
        // That they are fewer has another reason.
        assert!(run(&mut pace, 1000, ClientLoad { writes: 50, ..CALM }) > 400 << 20, "it is still at its lowest rate");
    }

    #[test]
    fn a_load_that_is_slower_without_a_run_is_learnt_in_the_end() {
        let mut pace = beside(CALM);
        run(&mut pace, 1000, SLOW);
        assert!(run(&mut pace, 1000, SLOW) > 400 << 20, "it is still at its lowest rate");
    }

    #[test]
    fn a_fixed_rate_is_kept() {
        let mut pace = Pace::new(Throttle::BytesPerSecond(10 << 20));
        pace.on_begun();
        let sent = run(&mut pace, 1000, ClientLoad::default());
        assert!((95 << 20..110 << 20).contains(&sent), "{sent}");
    }

    #[test]
    fn a_throttled_stream_keeps_its_rate_and_an_open_one_never_waits() {
        let mut pace = StreamPace::new(Some(1 << 20));
        let (mut now, mut sent) = (Duration::from_secs(5), 0);
        while now < Duration::from_secs(15) {
            match pace.waits_until(now) {
                Some(at) => now = at,
                None => {
                    let bytes = pace.chunk(1 << 20) as u64;
                    pace.on_sent(now, bytes);
                    sent += bytes;
                }
            }
        }
        assert!((10 << 20..11 << 20).contains(&sent), "{sent}");
        // A pause is not made up for.
        assert_eq!(pace.waits_until(Duration::from_secs(100)), None);
        let mut open = StreamPace::new(None);
        open.on_sent(now, u64::MAX);
        assert_eq!((open.waits_until(now), open.chunk(7)), (None, 7));
    }
}
