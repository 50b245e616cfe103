//! How fast a run may go beside clients (`[delta] throttle`), and records may be sent (`[link] throttle`). Pure: times and
//! measurements come in as arguments.
//!
//! Adaptive: the rate falls when acknowledged writes take noticeably longer than they did outside of runs, and grows
//! otherwise. It never falls below [`RATE_MIN`], so that a run always progresses.

use std::time::Duration;

use understudy_common::config::Throttle;

/// The lowest rate, bytes a second.
const RATE_MIN: f64 = (4 << 20) as f64;
/// Where a run begins beside clients, bytes a second.
const RATE_START: f64 = (32 << 20) as f64;
/// The highest rate that is told from none.
const RATE_MAX: f64 = (16_u64 << 30) as f64;
/// A run slows down when a write takes so many times as long as outside of runs.
const SLOWED: f64 = 1.4;
/// What is sent at once after a pause, in seconds of the rate.
const BURST_SECONDS: f64 = 0.02;

/// Acknowledged writes since the last look.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ClientLoad {
    /// How many.
    pub writes: u64,
    /// Their mean time from the request to the acknowledgement, seconds.
    pub mean_seconds: f64,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Pace {
    throttle: Throttle,
    /// Mean time of a write outside of runs, seconds; `None` until there were some.
    calm_seconds: Option<f64>,
    rate: f64,
    /// Bytes that may be sent now; negative while a batch is paid off.
    credit: f64,
}

impl Pace {
    /// As the setting says.
    #[must_use]
    pub fn new(throttle: Throttle) -> Self {
        Self { throttle, calm_seconds: None, rate: RATE_START, credit: 0.0 }
    }

    /// A run begins.
    pub fn on_begun(&mut self) {
        (self.rate, self.credit) = (RATE_START, 0.0);
    }

    /// `elapsed` has passed with this load of clients.
    pub fn on_tick(&mut self, elapsed: Duration, load: ClientLoad, in_run: bool) {
        if !in_run {
            if load.writes > 0 {
                let calm = self.calm_seconds.get_or_insert(load.mean_seconds);
                *calm += (load.mean_seconds - *calm) * 0.2;
            }
            return;
        }
        if self.throttle == Throttle::Adaptive {
            self.rate *= match self.calm_seconds {
                _ if load.writes == 0 => 2.0,
                Some(calm) if load.mean_seconds > calm * SLOWED => 0.7,
                _ => 1.15,
            };
            self.rate = self.rate.clamp(RATE_MIN, RATE_MAX);
        }
        let rate = self.rate();
        self.credit = (self.credit + rate * elapsed.as_secs_f64()).min(rate * BURST_SECONDS);
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

    #[test]
    fn a_run_gives_way_to_clients_and_goes_on() {
        let mut pace = Pace::new(Throttle::Adaptive);
        let calm = ClientLoad { writes: 100, mean_seconds: 0.001 };
        for _ in 0..50 {
            pace.on_tick(TICK, calm, false);
        }
        pace.on_begun();
        let slowed = run(&mut pace, 1000, ClientLoad { writes: 100, mean_seconds: 0.01 });
        // Ten seconds at the lowest rate, and the way down to it.
        assert!((40 << 20..80 << 20).contains(&slowed), "{slowed}");
        let unhurt = run(&mut pace, 1000, calm);
        assert!(unhurt > 10 * slowed, "{unhurt}");
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
