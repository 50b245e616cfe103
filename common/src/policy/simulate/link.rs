//! The link of a simulation: rate, round trip, outages, noise.

use std::{str::FromStr, time::Duration};

use rand::{Rng as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use serde::Serialize;

use crate::{
    policy::config::ms,
    units::{parse_bytes, parse_duration},
};

/// What the link is like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LinkModel {
    /// Bytes a second from a time on, milliseconds; in the order of time, the first from 0.
    pub rates: Vec<(u64, u64)>,
    /// Round trip, milliseconds.
    pub rtt_ms: u64,
    /// When nothing goes through: from and to, milliseconds; in the order of time.
    pub outages: Vec<(u64, u64)>,
    /// The rate of each tenth of a second differs by up to so many thousandths.
    pub noise_permille: u32,
    /// Of the noise.
    pub seed: u64,
}

impl LinkModel {
    /// A link with one rate and nothing wrong.
    #[must_use]
    pub fn steady(bytes_per_s: u64, rtt_ms: u64) -> Self {
        Self { rates: vec![(0, bytes_per_s)], rtt_ms, outages: Vec::new(), noise_permille: 0, seed: 1 }
    }

    /// Bytes a second at a time, without noise; 0 during an outage.
    #[must_use]
    pub fn rate_at(&self, now_ms: u64) -> u64 {
        if self.outage_at(now_ms).is_some() {
            return 0;
        }
        self.rates.iter().take_while(|(from, _)| *from <= now_ms).last().map_or(0, |(_, rate)| *rate)
    }

    /// The outage that a time is in.
    #[must_use]
    pub fn outage_at(&self, now_ms: u64) -> Option<(u64, u64)> {
        self.outages.iter().copied().find(|(from, to)| (*from..*to).contains(&now_ms))
    }
}

/// A time span of a simulation, written `START+LENGTH`: `10min+90s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outage {
    /// Since the beginning.
    pub start: Duration,
    /// Never zero.
    pub length: Duration,
}

impl FromStr for Outage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (start, length) = text.split_once('+').ok_or("write START+LENGTH, as 10min+90s")?;
        let parse = |part: &str| parse_duration(part).map_err(|error| error.to_string());
        let outage = Self { start: parse(start)?, length: parse(length)? };
        if outage.length.is_zero() { Err("the length is zero".into()) } else { Ok(outage) }
    }
}

/// A rate from a time on, written `RATE` or `START=RATE`: `100MiB`, `10min=5MiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateFrom {
    /// Since the beginning.
    pub start: Duration,
    /// Bytes a second.
    pub bytes_per_s: u64,
}

impl FromStr for RateFrom {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (start, rate) = text.split_once('=').unwrap_or(("0", text));
        let start = parse_duration(start).map_err(|error| error.to_string())?;
        Ok(Self { start, bytes_per_s: parse_bytes(rate).map_err(|error| error.to_string())? })
    }
}

impl LinkModel {
    /// From what a person wrote. Before the first rate that was given the first one holds.
    #[must_use]
    pub fn new(
        mut rates: Vec<RateFrom>,
        rtt: Duration,
        mut outages: Vec<Outage>,
        noise_permille: u32,
        seed: u64,
    ) -> Self {
        rates.sort_by_key(|rate| rate.start);
        outages.sort_by_key(|outage| outage.start);
        let mut rates: Vec<_> = rates.iter().map(|rate| (ms(rate.start), rate.bytes_per_s)).collect();
        if let Some(first) = rates.first_mut() {
            first.0 = 0;
        }
        let outages = outages.iter().map(|o| (ms(o.start), ms(o.start.saturating_add(o.length)))).collect();
        Self { rates, rtt_ms: ms(rtt), outages, noise_permille, seed }
    }
}

/// Hands out what the link takes, tick by tick.
#[derive(Debug)]
pub(super) struct LinkBudget<'a> {
    model: &'a LinkModel,
    random: Pcg64Mcg,
    noise_until_ms: u64,
    /// Thousandths of the rate.
    factor: u64,
    /// What was taken ahead, or is left over.
    bytes: i128,
}

impl<'a> LinkBudget<'a> {
    pub(super) fn new(model: &'a LinkModel) -> Self {
        Self { model, random: Pcg64Mcg::seed_from_u64(model.seed), noise_until_ms: 0, factor: 1000, bytes: 0 }
    }

    /// A tick begins. What the last one did not use is gone; what it took ahead is owed.
    pub(super) fn tick(&mut self, now_ms: u64, tick_ms: u64) {
        let noise = self.model.noise_permille.min(1000);
        if noise > 0 && now_ms >= self.noise_until_ms {
            self.factor = u64::from(self.random.random_range(1000 - noise..=1000 + noise));
            self.noise_until_ms = now_ms + 100;
        }
        let rate = i128::from(self.model.rate_at(now_ms)) * i128::from(self.factor);
        self.bytes = self.bytes.min(0) + rate * i128::from(tick_ms) / 1_000_000;
    }

    /// As the model says, without noise.
    pub(super) fn rate_at(&self, now_ms: u64) -> u64 {
        self.model.rate_at(now_ms)
    }

    /// True while the link takes something.
    pub(super) fn has_room(&self) -> bool {
        self.bytes > 0
    }

    /// Sends; the last piece of a tick may be owed to the next.
    pub(super) fn send(&mut self, bytes: u64) {
        self.bytes -= i128::from(bytes);
    }

    /// What can be sent without owing.
    pub(super) fn room(&self) -> u64 {
        u64::try_from(self.bytes.max(0)).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_outages_are_read_as_written() {
        assert_eq!("10min=5MiB".parse(), Ok(RateFrom { start: Duration::from_secs(600), bytes_per_s: 5 << 20 }));
        assert_eq!("1GB".parse(), Ok(RateFrom { start: Duration::ZERO, bytes_per_s: 1_000_000_000 }));
        assert_eq!("90s+1min".parse(), Ok(Outage { start: Duration::from_secs(90), length: Duration::from_secs(60) }));
        for bad in ["", "5s", "5s+0", "+5s", "5+5"] {
            assert!(bad.parse::<Outage>().is_err(), "{bad}");
        }
        let rates = vec!["10s=2MiB".parse().unwrap(), "5s=1MiB".parse().unwrap()];
        let link = LinkModel::new(rates, Duration::from_millis(20), vec!["7s+1s".parse().unwrap()], 0, 1);
        let at: Vec<u64> = [0, 6999, 7000, 7999, 8000, 10_000].map(|ms| link.rate_at(ms) >> 20).to_vec();
        assert_eq!(at, [1, 1, 0, 0, 1, 2]);
    }

    #[test]
    fn a_budget_is_the_rate_over_time_whatever_the_pieces() {
        let link = LinkModel { noise_permille: 50, ..LinkModel::steady(100 << 20, 1) };
        let mut budget = LinkBudget::new(&link);
        let mut sent = 0_u64;
        for tick in 0..20 * 60 {
            budget.tick(tick * 50, 50);
            while budget.has_room() {
                budget.send(3 << 20);
                sent += 3 << 20;
            }
        }
        assert!(sent.abs_diff(60 * (100 << 20)) < 60 << 20, "{sent}");
    }
}
