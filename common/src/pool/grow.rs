//! Growing the files of the pool, a zone at a time, in three steps so that the slow one needs no lock.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use super::{
    DeviceStanding, Member, Pool, PoolIo,
    device::{Device, Superblock, is_block_device},
};

/// A growth of one device that was planned and is to be performed, then finished.
pub struct Growth {
    device: Arc<Device>,
    io: PoolIo,
    superblock: Superblock,
    segments: u64,
}

impl Growth {
    /// Segments to be gained.
    #[must_use]
    pub fn segments(&self) -> u64 {
        self.segments - self.superblock.segments
    }

    /// Allocates the space and makes it part of the device, durably. Takes as long as the file system wants.
    ///
    /// # Errors
    /// The file system is full: the device is as it was, but for space that the next growth uses. Or a sync fails: it is
    /// also the sync of blocks that were written before, so it poisons the pool's [`PoolIo`].
    pub fn perform(&self) -> io::Result<()> {
        self.device.allocate(&self.superblock, self.segments)?;
        self.io.guarded(|| self.device.commit(&self.superblock, self.segments))
    }
}

impl Pool {
    /// Plans a growth by up to one zone of the smallest device that may grow. `None` if none may, or one is under way.
    pub fn grow(&mut self) -> Option<Growth> {
        if self.growing {
            return None;
        }
        let candidates = (0..).zip(&self.members).map(|(number, _)| (self.room(number), number));
        let (_, number) = candidates
            .filter(|(room, _)| *room > 0)
            .min_by_key(|(_, number)| self.segments.device_segments(*number))?;
        let member = &self.members[usize::from(number)];
        let device = member.device.clone()?;
        let at = self.segments.device_segments(number);
        let zone = self.layout.zone_segments;
        let superblock = Superblock {
            pool: self.uid,
            device: member.uid,
            number,
            segment_bytes: u32::try_from(self.layout.segment_bytes).expect("it came from 32 bits"),
            zone_segments: u32::try_from(zone).expect("it came from 32 bits"),
            segments: at,
        };
        self.growing = true;
        let segments = ((at / zone + 1) * zone).min(at + self.room(number));
        Some(Growth { device, io: self.io.clone(), superblock, segments })
    }

    /// Ends a growth. Its segments are free if it succeeded. Returns how many were gained.
    pub fn finish_grow(&mut self, growth: &Growth, performed: &io::Result<()>) -> u64 {
        self.growing = false;
        if performed.is_err() {
            return 0;
        }
        self.segments.extend(growth.superblock.number, growth.segments);
        self.update_can_grow();
        growth.segments()
    }

    pub(super) fn update_can_grow(&mut self) {
        let devices = (0..).zip(&self.members);
        let room = devices.map(|(number, _)| self.room(number)).fold(0, u64::saturating_add);
        self.space.can_grow.store(room, Ordering::Relaxed);
    }

    /// Segments that a device may still gain.
    pub(super) fn room(&self, number: u16) -> u64 {
        let Member { config, standing, .. } = &self.members[usize::from(number)];
        if *standing != DeviceStanding::Serving || config.size_bytes.is_some() || is_block_device(&config.path) {
            return 0;
        }
        let most = self.layout.segments_in(config.max_bytes.unwrap_or(1 << 62));
        most.saturating_sub(self.segments.device_segments(number))
    }
}
