//! Accounting of segments that any thread may read and reserve from, without the pool's lock.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Not enough free segments. All counts are segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the pool has no space: {needed} segments needed, {free} free of which {reserved} are reserved, {quarantined} freed \
     but not yet reusable, {can_grow} to be had by growing; add a device, delete data or snapshots"
)]
pub struct NoSpace {
    /// Asked for.
    pub needed: u64,
    /// Free now, reserved ones included.
    pub free: u64,
    /// Promised to others.
    pub reserved: u64,
    /// Free after the next checkpoint and the reads that run now.
    pub quarantined: u64,
    /// By which the devices may still grow.
    pub can_grow: u64,
}

/// Counts of segments. A snapshot of moving numbers: exact only under the pool's lock.
#[derive(Debug, Default)]
pub struct Space {
    pub(super) total: AtomicU64,
    pub(super) free: AtomicU64,
    pub(super) quarantined: AtomicU64,
    pub(super) can_grow: AtomicU64,
    pub(super) retired: AtomicU64,
    reserved: AtomicU64,
}

impl Space {
    /// Segments of all devices.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Segments that can be allocated now, reserved ones included.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.free.load(Ordering::Acquire)
    }

    /// Freed segments that wait for a checkpoint or a read.
    #[must_use]
    pub fn quarantined(&self) -> u64 {
        self.quarantined.load(Ordering::Relaxed)
    }

    /// Segments promised to writes that are not planned yet.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.reserved.load(Ordering::Acquire)
    }

    /// Segments by which the devices may still grow.
    #[must_use]
    pub fn can_grow(&self) -> u64 {
        self.can_grow.load(Ordering::Relaxed)
    }

    /// Free segments of devices that give none away.
    #[must_use]
    pub fn retired(&self) -> u64 {
        self.retired.load(Ordering::Relaxed)
    }

    /// Sets `count` free segments aside until the reservation is dropped. The caller drops it after the write was
    /// planned; in between the segments it took are counted twice, which errs on the safe side.
    ///
    /// # Errors
    /// Fewer than `count` are free and unreserved.
    pub fn reserve(self: &Arc<Self>, count: u64) -> Result<Reservation, NoSpace> {
        let before = self.reserved.fetch_add(count, Ordering::AcqRel);
        if before + count <= self.free() {
            return Ok(Reservation { space: self.clone(), count });
        }
        self.reserved.fetch_sub(count, Ordering::AcqRel);
        Err(NoSpace { reserved: before, ..self.no_space(count) })
    }

    pub(super) fn no_space(&self, needed: u64) -> NoSpace {
        NoSpace {
            needed,
            free: self.free(),
            reserved: self.reserved(),
            quarantined: self.quarantined(),
            can_grow: self.can_grow(),
        }
    }
}

/// Segments set aside; given back when dropped.
#[derive(Debug)]
#[must_use]
pub struct Reservation {
    space: Arc<Space>,
    count: u64,
}

impl Reservation {
    /// Segments set aside.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.space.reserved.fetch_sub(self.count, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reservation_is_refused_with_numbers_and_given_back() {
        let space = Arc::new(Space::default());
        space.free.store(10, Ordering::Relaxed);
        let first = space.reserve(7).unwrap();
        let refused = space.reserve(4).unwrap_err();
        assert_eq!((refused.needed, refused.free, refused.reserved), (4, 10, 7));
        drop(first);
        assert_eq!(space.reserve(10).unwrap().count(), 10);
        assert_eq!(space.reserved(), 0);
    }
}
