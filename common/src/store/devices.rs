//! Devices of the pool that come and go while the store is in use.
//!
//! What is to be moved off a draining device is moved in the place of an apply job: take, run and finish as everywhere,
//! and meanwhile nothing is applied, swept or captured. The driver paces it.

use std::{io, sync::Arc, time::Duration};

use thiserror::Error;
use tracing::{info, warn};

use super::{Failed, Store, failed_io, scrub::Suspect};
use crate::pool::{DeviceConfig, DeviceInfo, DeviceStanding, MemberError, Relocation};

/// Bytes of one job, at least one segment: what clients wait for its end.
const JOB_BYTES: u64 = 1 << 20;
/// Segments that are moved before a checkpoint is asked for, so that changed map chunks do not pile up in memory.
const MOVED_PER_CHECKPOINT: u64 = 4096;
/// How often changing devices are looked at while nothing is to be moved.
pub(super) const LOOK: Duration = Duration::from_millis(50);

/// Why a device was not added or drained.
#[derive(Debug, Error)]
pub enum DeviceChangeError {
    /// It was refused; the pool is as it was.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// The store failed before the change was durable.
    #[error(transparent)]
    Failed(#[from] Failed),
}

/// Segments on their way to other devices.
#[must_use]
pub struct RelocationJob(Relocation);

impl RelocationJob {
    /// Copies them.
    ///
    /// # Errors
    /// The first write that failed.
    pub fn run(&mut self) -> io::Result<()> {
        self.0.run()
    }

    /// Bytes that are moved.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }
}

impl Store {
    /// Adds a device to the pool: a file, or below `/dev/` a block device. It gives space when
    /// [`Store::device_standing`] says that it serves, which a checkpoint makes it. Takes as long as the file system needs
    /// to make the file. `size_bytes` is allocated at once; without it a file grows as those of the settings.
    ///
    /// # Errors
    /// See [`MemberError`]; the pool is as it was.
    pub fn add_device(&self, path: &str, size_bytes: Option<u64>) -> Result<u16, MemberError> {
        let max_bytes = self.config.pool.devices.iter().filter_map(|device| device.max_bytes).max();
        let config = DeviceConfig { path: path.to_owned(), size_bytes, max_bytes };
        let new = self.pool.lock().new_device(config)?;
        match new.make() {
            Ok(made) => {
                let number = self.pool.lock().attach(new, made);
                self.request_checkpoint();
                Ok(number)
            }
            Err(error) => {
                self.pool.lock().abandon(new);
                Err(error)
            }
        }
    }

    /// Begins to drain a device. Durable when the next checkpoint is, which is asked for.
    ///
    /// # Errors
    /// See [`MemberError`]; the pool is as it was.
    pub fn drain_device(&self, path: &str) -> Result<u16, MemberError> {
        // Growth that was planned before would count as room here.
        let number = self.pool.lock().drain(path)?;
        self.request_checkpoint();
        Ok(number)
    }

    /// Ends the drain of a device before it is empty.
    ///
    /// # Errors
    /// See [`MemberError`]; the pool is as it was.
    pub fn cancel_drain(&self, path: &str) -> Result<u16, MemberError> {
        let number = self.pool.lock().cancel_drain(path)?;
        self.request_checkpoint();
        Ok(number)
    }

    /// As [`Store::add_device`], and waits until the device is durably part of the pool and gives space.
    ///
    /// # Errors
    /// See [`DeviceChangeError`].
    pub async fn add_device_durably(
        self: &Arc<Self>,
        path: String,
        size_bytes: Option<u64>,
    ) -> Result<DeviceInfo, DeviceChangeError> {
        let store = Arc::clone(self);
        let made = tokio::task::spawn_blocking(move || store.add_device(&path, size_bytes)).await;
        let number = made.map_err(|error| Failed(format!("the making of a device was ended: {error}")))??;
        // One that somebody drains at once has been part of it.
        self.wait_device(number, |device| device.standing != DeviceStanding::Joining).await
    }

    /// As [`Store::drain_device`], or [`Store::cancel_drain`], and waits until that is durable.
    ///
    /// # Errors
    /// See [`DeviceChangeError`].
    pub async fn drain_device_durably(
        self: &Arc<Self>,
        path: String,
        cancel: bool,
    ) -> Result<DeviceInfo, DeviceChangeError> {
        let number = if cancel { self.cancel_drain(&path)? } else { self.drain_device(&path)? };
        self.wait_device(number, |device| device.saved).await
    }

    async fn wait_device(
        &self,
        number: u16,
        reached: impl Fn(&DeviceInfo) -> bool,
    ) -> Result<DeviceInfo, DeviceChangeError> {
        let mut marks = self.marks();
        loop {
            marks.mark_unchanged();
            let device = self.devices().swap_remove(usize::from(number));
            if reached(&device) {
                return Ok(device);
            }
            if marks.borrow().failed || marks.changed().await.is_err() {
                return Err(Failed(self.failure().unwrap_or_default()).into());
            }
        }
    }

    /// Every device that the pool has, and had.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceInfo> {
        self.pool.lock().devices()
    }

    /// What a device is to the pool; `None` for a number it never had.
    #[must_use]
    pub fn device_standing(&self, number: u16) -> Option<DeviceStanding> {
        self.pool.lock().standing(number)
    }

    /// True if what is to be moved finds no room on the other devices.
    #[must_use]
    pub fn drain_lacks_room(&self) -> bool {
        self.pool.lock().lacks_room()
    }

    /// True while a device joins, drains or leaves.
    #[must_use]
    pub fn has_changing_devices(&self) -> bool {
        self.pool.lock().has_changing_devices()
    }

    /// Takes the next segments to be moved. `None`: there is nothing, or a job is in flight. Also brings devices that join
    /// or leave a step further.
    pub fn take_relocation(&self) -> Option<RelocationJob> {
        let mut applier = self.applier.lock();
        if applier.in_flight || self.marks.borrow().failed {
            return None;
        }
        let most = (JOB_BYTES / u64::from(self.config.pool.segment_bytes)).max(1);
        let mut pool = self.pool.lock();
        if !pool.has_changing_devices() {
            return None;
        }
        let wants = pool.tend_devices();
        let removed = pool.take_removed();
        let planned = pool.plan_relocation(usize::try_from(most).expect("few"));
        let lacks_room = pool.lacks_room();
        drop(pool);
        for device in removed {
            match device.wipe() {
                Ok(()) => info!(device = device.number, path = device.path, "the device is drained and removed"),
                Err(error) => warn!(
                    device = device.number,
                    path = device.path,
                    %error,
                    "the device is drained and removed; its superblock could not be wiped, which does no harm"
                ),
            }
            self.pool.lock().on_wiped(device.number);
            self.marks.send_modify(|_| {});
        }
        if lacks_room {
            self.request_growth();
        }
        if wants || lacks_room {
            self.wants.ask_checkpoint();
        }
        match planned {
            Ok(Some(relocation)) => {
                applier.moved += relocation.segments();
                if applier.moved >= MOVED_PER_CHECKPOINT {
                    applier.moved = 0;
                    self.wants.ask_checkpoint();
                }
                applier.in_flight = true;
                Some(RelocationJob(relocation))
            }
            Ok(None) => None,
            Err(error) => {
                drop(applier);
                self.fail(format!("segment map: {error}"));
                None
            }
        }
    }

    /// Applies the result of [`RelocationJob::run`].
    pub fn finish_relocation(&self, job: RelocationJob, result: io::Result<()>) {
        let mut applier = self.applier.lock();
        if let Err(error) = result {
            self.fail(failed_io("moving blocks to another device", &error));
            return;
        }
        let mut damaged = Vec::new();
        let finished = {
            let mut pool = self.pool.lock();
            pool.finish_relocation(&job.0).and_then(|()| {
                for found in job.0.damaged() {
                    let owner = pool.owner_of(found.owned.volume, found.block, found.owned.segment)?;
                    damaged.extend(owner.map(|(owner, owned)| {
                        let (volume, segment) = (owned.volume, owned.segment);
                        (Suspect { volume, block: found.block, segment }, owner)
                    }));
                }
                Ok(())
            })
        };
        applier.in_flight = false;
        drop(applier);
        if let Err(error) = finished {
            self.fail(format!("segment map: {error}"));
            return;
        }
        let mut known = self.damage.lock();
        damaged.into_iter().for_each(|(suspect, owner)| known.note(suspect, owner));
    }

    /// One step of what changing devices need, and how long to wait until the next one.
    pub(super) fn tend_devices(&self) -> Duration {
        let Some(mut job) = self.take_relocation() else { return LOOK };
        let bytes = job.bytes();
        let result = job.run();
        self.finish_relocation(job, result);
        match self.config.drain_bytes_per_s {
            0 => Duration::ZERO,
            rate => Duration::from_micros(bytes.saturating_mul(1_000_000) / rate),
        }
    }
}
