//! How much may be in flight: as much as the link carries in a fraction of a second. Pure.
//!
//! What is in flight on a slow link waits in buffers, and everything behind it waits as long: heartbeats, the begin of
//! a run, the acknowledgements of `both`. So the window shrinks while answers take longer than [`SLOW`], and grows back
//! while they do not.

use std::time::Duration;

/// An answer that took longer came from a queue.
const SLOW: Duration = Duration::from_millis(400);
/// An answer within this has room for more.
const FAST: Duration = Duration::from_millis(200);
/// Time between two steps down, so that each shows before the next.
const STEP_DOWN: Duration = Duration::from_millis(200);
/// Time between two steps up.
const STEP_UP: Duration = Duration::from_millis(20);
/// The smallest window.
const BYTES_MIN: usize = 256 << 10;

/// See the module.
#[derive(Debug, Clone)]
pub struct Window {
    bytes: usize,
    max: usize,
    stepped: Duration,
}

impl Window {
    /// At most `max` bytes; begins with a quarter of it.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self { bytes: (max / 4).max(BYTES_MIN).min(max), max, stepped: Duration::ZERO }
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// At `now` an answer came that took `spent`.
    pub fn on_answer(&mut self, now: Duration, spent: Duration) {
        let since = now.saturating_sub(self.stepped);
        if spent > SLOW && since >= STEP_DOWN {
            self.bytes = (self.bytes / 2).max(BYTES_MIN.min(self.max));
            self.stepped = now;
        } else if spent < FAST && since >= STEP_UP {
            self.bytes = (self.bytes + self.bytes / 4).min(self.max);
            self.stepped = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link of so many bytes a second that is always given the whole window: the delay is what is in flight.
    fn settle(window: &mut Window, now: &mut Duration, bytes_per_second: usize) -> Duration {
        let mut delay = Duration::ZERO;
        for _ in 0..1000 {
            *now += Duration::from_millis(50);
            let micros = window.bytes() as u64 * 1_000_000 / bytes_per_second as u64;
            delay = Duration::from_micros(micros);
            window.on_answer(*now, delay);
        }
        delay
    }

    #[test]
    fn the_delay_is_bounded_on_a_slow_link_and_the_window_whole_on_a_fast_one() {
        let (mut window, mut now) = (Window::new(16 << 20), Duration::ZERO);
        assert_eq!(settle(&mut window, &mut now, 1 << 30), Duration::from_micros(15_625));
        assert_eq!(window.bytes(), 16 << 20);
        let slow = settle(&mut window, &mut now, 4 << 20);
        assert!(slow <= Duration::from_millis(420), "{slow:?}");
        assert!(slow >= Duration::from_millis(150), "{slow:?}");
        settle(&mut window, &mut now, 1 << 30);
        assert_eq!(window.bytes(), 16 << 20);
    }

    #[test]
    fn a_link_that_carries_nothing_leaves_the_smallest_window() {
        let (mut window, mut now) = (Window::new(16 << 20), Duration::ZERO);
        settle(&mut window, &mut now, 1 << 10);
        assert_eq!(window.bytes(), BYTES_MIN);
        assert_eq!(Window::new(1000).bytes(), 1000);
    }
}
