//! Growing pauses between attempts.

use std::time::Duration;

use rand::rngs::OsRng;
use rand::{Rng, TryRngCore};

/// Doubles from `min` to `max`; each pause is between half and all of the present step, so that clients that lost the
/// same server do not come back at once.
#[derive(Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    step: Duration,
}

impl Backoff {
    pub(crate) fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, step: min }
    }

    pub(crate) fn reset(&mut self) {
        self.step = self.min;
    }

    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.step.mul_f64(OsRng.unwrap_err().random_range(0.5..=1.0));
        self.step = (self.step * 2).min(self.max);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_bound_and_start_again() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(40));
        let steps = [10, 20, 40, 40].map(Duration::from_millis);
        for step in steps {
            let pause = backoff.next();
            assert!(pause >= step / 2 && pause <= step, "{pause:?} for {step:?}");
        }
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(10));
    }
}
