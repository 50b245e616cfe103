//! Whether this node may serve at all: it was not superseded, not demoted, and its lease, if it needs one, holds.
//!
//! Asked before each request is taken and again before each acknowledgement, so nothing is acknowledged later than the
//! node knows. The clock is the monotonic one.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::api::EngineError;

/// See the module.
#[derive(Debug)]
pub(crate) struct Standing {
    generation: u64,
    /// The generation that superseded this one; 0: none.
    fenced: AtomicU64,
    demoted: AtomicBool,
    /// There is another side that went on by itself.
    split: AtomicBool,
    lease: Option<Lease>,
}

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    /// `None` until it was renewed for the first time.
    until: Mutex<Option<Instant>>,
}

impl Standing {
    /// Of the primary of `generation`. With `lease` it serves only while that was renewed within so long.
    pub fn new(generation: u64, fenced: u64, lease: Option<Duration>) -> Self {
        let lease = lease.map(|ttl| Lease { ttl, until: Mutex::new(None) });
        Self {
            generation,
            fenced: AtomicU64::new(fenced),
            demoted: AtomicBool::new(false),
            split: AtomicBool::new(false),
            lease,
        }
    }

    /// Nothing is served any more.
    pub fn fence(&self, by: u64) {
        self.fenced.fetch_max(by, Ordering::AcqRel);
    }

    /// Another side that went on by itself was met. True for the first time.
    pub fn begin_split(&self) -> bool {
        !self.split.swap(true, Ordering::AcqRel)
    }

    /// A backup has accepted a session.
    pub fn end_split(&self) {
        self.split.store(false, Ordering::Release);
    }

    /// Whether there are two truths, so that one side may have to give up its own.
    pub fn is_split(&self) -> bool {
        self.split.load(Ordering::Acquire) || self.fenced_by() > 0
    }

    /// Nothing is served any more.
    pub fn demote(&self) {
        self.demoted.store(true, Ordering::Release);
    }

    /// The generation that superseded this one.
    pub fn fenced_by(&self) -> u64 {
        self.fenced.load(Ordering::Acquire)
    }

    /// What is left of the lease; `None` where none is needed.
    pub fn lease_remaining(&self) -> Option<Duration> {
        let until = *self.lease.as_ref()?.until.lock();
        Some(until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now())))
    }

    /// Extends the lease.
    ///
    /// # Errors
    /// If none is needed, it is for another generation, or this one is over.
    pub fn renew(&self, generation: u64) -> Result<Duration, EngineError> {
        let lease = self.lease.as_ref().ok_or_else(|| EngineError::Role {
            why: "[lease] mode is off, so there is no lease; set it to required and start again".into(),
        })?;
        if generation != self.generation {
            let why = format!("the lease is for generation {generation}, and this primary has {}", self.generation);
            return Err(EngineError::Role { why });
        }
        self.check_role()?;
        *lease.until.lock() = Some(Instant::now() + lease.ttl);
        Ok(lease.ttl)
    }

    fn check_role(&self) -> Result<(), EngineError> {
        let (by, generation) = (self.fenced_by(), self.generation);
        if by > 0 {
            let why = format!(
                "this primary of generation {generation} was superseded; `understudy resolve --list` shows what it never \
                 shipped, `understudy demote` makes it a backup"
            );
            return Err(EngineError::Fenced { why, generation: by });
        }
        if self.demoted.load(Ordering::Acquire) {
            let why = "this primary was demoted and ends".to_owned();
            return Err(EngineError::Fenced { why, generation: generation + 1 });
        }
        Ok(())
    }

    /// Whether anything may be served, or acknowledged, now.
    ///
    /// # Errors
    /// What stands against it.
    pub fn check(&self) -> Result<(), EngineError> {
        self.check_role()?;
        match self.lease_remaining() {
            Some(Duration::ZERO) => Err(EngineError::NoLease),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_lease_ends_on_the_clock_and_is_renewed_for_its_own_generation_alone() {
        let standing = Standing::new(3, 0, Some(Duration::from_secs(5)));
        assert_eq!(standing.check(), Err(EngineError::NoLease), "it was never renewed");
        assert!(standing.renew(2).is_err());
        assert_eq!(standing.renew(3), Ok(Duration::from_secs(5)));
        assert_eq!(standing.check(), Ok(()));
        tokio::time::advance(Duration::from_millis(4999)).await;
        assert_eq!(standing.lease_remaining(), Some(Duration::from_millis(1)));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(standing.check(), Err(EngineError::NoLease));
        standing.renew(3).unwrap();
        standing.fence(4);
        assert!(matches!(standing.check(), Err(EngineError::Fenced { generation: 4, .. })));
        assert!(standing.renew(3).is_err(), "a superseded primary gets no lease");
    }

    #[test]
    fn without_a_lease_only_the_role_counts() {
        let standing = Standing::new(1, 0, None);
        assert_eq!((standing.check(), standing.lease_remaining()), (Ok(()), None));
        assert!(standing.renew(1).is_err());
        standing.demote();
        assert!(matches!(standing.check(), Err(EngineError::Fenced { generation: 2, .. })));
        assert!(Standing::new(1, 7, None).check().is_err(), "fenced before the restart");
    }
}
