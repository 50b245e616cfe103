//! The devices of a running pool: adding one, draining one, and which ones a pool is opened with.
//!
//! ```text
//! joining --checkpoint--> serving --drain--> draining --empty--> removing --checkpoint--> removed
//!                            ^                  | cancel
//!                            +---checkpoint-- returning
//! ```
//!
//! - A device that joins has no segments until a durable checkpoint names it: no record of the journal ever refers to a
//!   device that a recovery does not know. One that returns gives none away until then: replay would lack them.
//! - A draining device gives no segments away. It is empty when each of its segments is free: then no layer owns a slot
//!   of it, no record refers to it, no read may hold an address in it, and the last checkpoint says so too.
//! - A number is never used again, so that an address of a removed device stays an error.
//! - A checkpoint names the state as of its capture. What it made durable is reported by [`Pool::checkpoint_done`].

use std::{
    io::{self, ErrorKind},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    DeviceConfig, Pool, PoolError,
    device::{self, Device, Superblock},
    device_uid,
    error::DeviceError,
    io::scramble,
};
use crate::{mutant::Mutant, storage::Storage, types::Uid};

/// What a device is to the pool as far as a checkpoint knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Standing {
    #[default]
    Serving,
    Draining,
    Removed,
}

/// A device as the catalogue knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DeviceState {
    pub uid: Uid,
    pub segments: u64,
    /// Where it was when the checkpoint was made; empty in a catalogue from before paths were kept.
    #[serde(default)]
    pub path: String,
    #[serde(default)]
    pub standing: Standing,
    /// Of a device that was added while the pool was in use; one that the pool was made with has its sizes from the
    /// settings.
    #[serde(default)]
    pub added: Option<Sizes>,
}

/// Sizes of a device as they were asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sizes {
    pub size_bytes: Option<u64>,
    pub max_bytes: Option<u64>,
}

/// What a device is to the pool now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceStanding {
    /// It waits for the checkpoint that names it.
    Joining,
    /// It gives segments away.
    Serving,
    /// What lives on it is moved to the others.
    Draining,
    /// Its drain was cancelled; it waits for the checkpoint that says so.
    Returning,
    /// Nothing lives on it; the checkpoint that says so is to come.
    Removing,
    /// It is no part of the pool any more.
    Removed,
}

/// A device of the pool.
pub(super) struct Member {
    pub uid: Uid,
    pub config: DeviceConfig,
    pub added: bool,
    pub standing: DeviceStanding,
    /// `None` when it was removed.
    pub device: Option<Arc<Device>>,
    /// Segments it will have when it has joined.
    pub joining: u64,
    /// A durable checkpoint has it as it stands.
    pub saved: bool,
}

impl Member {
    /// As the catalogue knows it; `opened` with the configuration that it was opened with, unless it was removed.
    pub(super) fn open(known: &DeviceState, opened: Option<(Device, DeviceConfig)>) -> Self {
        let standing = match known.standing {
            Standing::Serving => DeviceStanding::Serving,
            Standing::Draining => DeviceStanding::Draining,
            Standing::Removed => DeviceStanding::Removed,
        };
        let (device, config) = opened.unzip();
        let sizes = known.added.unwrap_or(Sizes { size_bytes: None, max_bytes: None });
        let recorded =
            DeviceConfig { path: known.path.clone(), size_bytes: sizes.size_bytes, max_bytes: sizes.max_bytes };
        Self {
            uid: known.uid,
            config: config.unwrap_or(recorded),
            added: known.added.is_some(),
            standing,
            device: device.map(Arc::new),
            joining: 0,
            saved: true,
        }
    }

    pub(super) fn state(&self, segments: u64) -> DeviceState {
        let DeviceConfig { path, size_bytes, max_bytes } = self.config.clone();
        DeviceState {
            uid: self.uid,
            segments: if self.is_gone() { 0 } else { segments },
            path,
            standing: match self.standing {
                DeviceStanding::Joining | DeviceStanding::Returning | DeviceStanding::Serving => Standing::Serving,
                DeviceStanding::Draining => Standing::Draining,
                DeviceStanding::Removing | DeviceStanding::Removed => Standing::Removed,
            },
            added: self.added.then_some(Sizes { size_bytes, max_bytes }),
        }
    }

    pub(super) fn is_gone(&self) -> bool {
        matches!(self.standing, DeviceStanding::Removing | DeviceStanding::Removed)
    }
}

/// A device of a running pool. All counts are segments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number.
    pub number: u16,
    /// Where it is, or was.
    pub path: String,
    /// What it is to the pool.
    pub standing: DeviceStanding,
    /// A durable checkpoint says so.
    pub saved: bool,
    /// Those it has.
    pub segments: u64,
    /// Those nobody needs; of a draining device they are not given away.
    pub free: u64,
    /// Those of which a layer owns a slot: of a draining device they are to be moved.
    pub live: u64,
    /// Those that were freed and wait for a checkpoint or a read.
    pub quarantined: u64,
    /// Those that records of the journal refer to and nobody owns, and those in between.
    pub held: u64,
}

/// Why a device cannot be added or drained. The pool is as it was.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum MemberError {
    #[error("{path} is device {number} of this pool already")]
    InUse { path: String, number: u16 },
    #[error("the pool has had 65535 devices, and numbers are not used again; make a pool of fewer, larger devices")]
    TooMany,
    #[error("another device is being added; wait until that is done")]
    Busy,
    #[error("the directory of {path} does not exist; make it, or name another path")]
    NoDirectory { path: String },
    #[error("{path} does not exist; a path below /dev/ names a block device that is there")]
    NoBlockDevice { path: String },
    #[error("{path} would have {size_bytes} B, and one segment needs {needed_bytes} B; give it more")]
    TooSmall { path: String, size_bytes: u64, needed_bytes: u64 },
    #[error("{path} is no device of this pool; `pool show` lists them")]
    Unknown { path: String },
    #[error("{path} is the last device that takes data; add another one first")]
    Last { path: String },
    #[error("{path} is {standing}; {remedy}")]
    Standing { path: String, standing: &'static str, remedy: &'static str },
    #[error(
        "{needed_bytes} B are in use on {path} and {available_bytes} B are left on the other devices; add a device, or delete data or snapshots"
    )]
    NoRoom { path: String, needed_bytes: u64, available_bytes: u64 },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A device that is being made for the pool. [`Pool::attach`] or [`Pool::abandon`] ends it.
#[must_use]
pub struct NewDevice {
    storage: Arc<dyn Storage>,
    config: DeviceConfig,
    blank: Superblock,
    /// Of the devices that the pool has.
    present: Vec<Uid>,
}

impl NewDevice {
    /// Makes the file, or takes the block device, with a superblock, durably. Takes as long as the file system wants.
    ///
    /// # Errors
    /// See [`MemberError`]. A file that was made is removed again.
    pub fn make(&self) -> Result<MadeDevice, MemberError> {
        let path = &self.config.path;
        let existed = self.storage.open(path, crate::storage::OpenMode::ReadOnly).is_ok();
        let made = self.try_make();
        if made.is_err() && !existed && !device::is_block_device(path) {
            // What stays is a file that another try takes.
            let _ = self.storage.remove(path);
        }
        made
    }

    fn try_make(&self) -> Result<MadeDevice, MemberError> {
        let path = self.config.path.clone();
        let layout = device::Layout {
            segment_bytes: self.blank.segment_bytes.into(),
            zone_segments: self.blank.zone_segments.into(),
        };
        let needed_bytes = layout.device_bytes(1);
        let asked = self.config.size_bytes.or(self.config.max_bytes.filter(|_| !device::is_block_device(&path)));
        if let Some(size_bytes) = asked.filter(|size| *size < needed_bytes) {
            return Err(MemberError::TooSmall { path, size_bytes, needed_bytes });
        }
        let made = device::create(&*self.storage, &self.config, self.blank, Some(&self.present));
        let (device, segments) = made.map_err(|error| match error {
            DeviceError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
                if device::is_block_device(&path) {
                    MemberError::NoBlockDevice { path: path.clone() }
                } else {
                    MemberError::NoDirectory { path: path.clone() }
                }
            }
            other => other.into(),
        })?;
        if segments == 0 {
            let size_bytes = device.file.len().unwrap_or_default();
            return Err(MemberError::TooSmall { path, size_bytes, needed_bytes });
        }
        Ok(MadeDevice { device: Arc::new(device), segments })
    }
}

/// A device with a superblock that the pool does not know yet.
pub struct MadeDevice {
    device: Arc<Device>,
    segments: u64,
}

/// A device that was removed durably, and still has its superblock.
pub struct RemovedDevice {
    device: Arc<Device>,
    /// Its number.
    pub number: u16,
    /// Where it is.
    pub path: String,
}

impl RemovedDevice {
    /// Wipes the superblock: nothing takes the device for one of the pool any more.
    ///
    /// # Errors
    /// It cannot be written. The pool does not mind.
    pub fn wipe(&self) -> io::Result<()> {
        let page = usize::try_from(device::SUPERBLOCK_BYTES).expect("one page");
        self.device.file.write_all_at(&vec![0; page], 0)?;
        self.device.file.sync_data()
    }
}

impl Pool {
    /// Begins to add a device. Then [`NewDevice::make`] without the lock, and [`Pool::attach`].
    ///
    /// # Errors
    /// See [`MemberError`].
    pub fn new_device(&mut self, config: DeviceConfig) -> Result<NewDevice, MemberError> {
        if self.adding {
            return Err(MemberError::Busy);
        }
        if let Some(number) = self.number_of(&config.path) {
            return Err(MemberError::InUse { path: config.path, number });
        }
        let number = u16::try_from(self.members.len()).ok().filter(|number| *number < u16::MAX);
        let number = number.ok_or(MemberError::TooMany)?;
        let blank = Superblock {
            pool: self.uid,
            device: added_uid(self.uid, number, &config.path),
            number,
            segment_bytes: u32::try_from(self.layout.segment_bytes).expect("it came from 32 bits"),
            zone_segments: u32::try_from(self.layout.zone_segments).expect("it came from 32 bits"),
            segments: 0,
        };
        let present = self.members.iter().filter(|m| m.standing != DeviceStanding::Removed).map(|m| m.uid).collect();
        self.adding = true;
        Ok(NewDevice { storage: self.storage.clone(), config, blank, present })
    }

    /// Puts a device that was made into the pool. It joins with the next checkpoint. Returns its number.
    pub fn attach(&mut self, new: NewDevice, made: MadeDevice) -> u16 {
        self.adding = false;
        let number = new.blank.number;
        assert_eq!(usize::from(number), self.members.len(), "one is added at a time");
        self.io.set_device(number, Some(made.device.clone()));
        self.segments.add_device(false);
        self.members.push(Member {
            uid: new.blank.device,
            config: new.config,
            added: true,
            standing: DeviceStanding::Joining,
            device: Some(made.device),
            joining: made.segments,
            saved: false,
        });
        number
    }

    /// Ends the making of a device that failed.
    pub fn abandon(&mut self, new: NewDevice) {
        drop(new);
        self.adding = false;
    }

    /// Closes a device to allocations: what lives on it is to be moved. Durable with the next checkpoint. One that is
    /// draining already goes on.
    ///
    /// # Errors
    /// See [`MemberError`].
    pub fn drain(&mut self, path: &str) -> Result<u16, MemberError> {
        let number = self.number_of(path).ok_or_else(|| MemberError::Unknown { path: path.into() })?;
        let path = path.to_owned();
        match self.members[usize::from(number)].standing {
            DeviceStanding::Serving => {}
            DeviceStanding::Draining | DeviceStanding::Removing | DeviceStanding::Removed => return Ok(number),
            DeviceStanding::Joining | DeviceStanding::Returning => {
                let (standing, remedy) = ("joining the pool", "wait until that is done");
                return Err(MemberError::Standing { path, standing, remedy });
            }
        }
        let takes_data = |n: usize| n != usize::from(number) && self.members[n].standing == DeviceStanding::Serving;
        if !(0..self.members.len()).any(takes_data) {
            return Err(MemberError::Last { path });
        }
        let here = self.segments.device_counts(number);
        let room_here = self.room(number);
        let needed = here.live + here.held();
        let reserved = self.space.reserved();
        let elsewhere = (self.space.free() + self.space.quarantined() + self.space.can_grow())
            .saturating_sub(here.free + here.quarantined + room_here + reserved);
        let bytes = self.layout.segment_bytes;
        let no_room = |needed: u64, available: u64| {
            let (needed_bytes, available_bytes) = (needed * bytes, available * bytes);
            MemberError::NoRoom { path: path.clone(), needed_bytes, available_bytes }
        };
        if needed > elsewhere {
            return Err(no_room(needed, elsewhere));
        }
        // What is promised to writes must be free elsewhere now, whatever quarantine and growth will give.
        let promised = self.space.reserve(here.free);
        let promised = promised.map_err(|lack| no_room(lack.reserved, lack.free.saturating_sub(here.free)))?;
        self.segments.set_closed(number, true);
        drop(promised);
        self.members[usize::from(number)].change(DeviceStanding::Draining);
        self.relocating = super::OwnedPlace::default();
        self.update_can_grow();
        Ok(number)
    }

    /// Takes a draining device back, from the next checkpoint on. What was moved stays where it is.
    ///
    /// # Errors
    /// See [`MemberError`].
    pub fn cancel_drain(&mut self, path: &str) -> Result<u16, MemberError> {
        let number = self.number_of(path).ok_or_else(|| MemberError::Unknown { path: path.into() })?;
        let member = &mut self.members[usize::from(number)];
        match member.standing {
            DeviceStanding::Draining => {}
            DeviceStanding::Serving | DeviceStanding::Joining | DeviceStanding::Returning => return Ok(number),
            DeviceStanding::Removing | DeviceStanding::Removed => {
                let (standing, remedy) = ("empty and being removed", "add it again when that is done");
                return Err(MemberError::Standing { path: path.to_owned(), standing, remedy });
            }
        }
        member.change(DeviceStanding::Returning);
        Ok(number)
    }

    /// Every device that the pool has, and had. One that is removed is shown so when it is wiped.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let info = |(number, member): (u16, &Member)| {
            let counts = self.segments.device_counts(number);
            let standing = if self.is_to_be_wiped(number) { DeviceStanding::Removing } else { member.standing };
            DeviceInfo {
                number,
                path: member.config.path.clone(),
                standing,
                saved: member.saved,
                segments: counts.total,
                free: counts.free,
                live: counts.live,
                quarantined: counts.quarantined,
                held: counts.held(),
            }
        };
        (0..).zip(&self.members).map(info).collect()
    }

    /// What a device is to the pool; `None` for a number it never had.
    #[must_use]
    pub fn standing(&self, number: u16) -> Option<DeviceStanding> {
        self.members.get(usize::from(number)).map(|member| member.standing)
    }

    /// True while a device joins, drains or is removed: [`Pool::tend_devices`] is to be called now and then.
    #[must_use]
    pub fn has_changing_devices(&self) -> bool {
        !self.removed.is_empty() || self.members.iter().any(Member::is_changing)
    }

    /// Lets devices that were drained go. True if a checkpoint would bring one a step further.
    pub fn tend_devices(&mut self) -> bool {
        let mut wants = false;
        for number in 0..self.members.len() {
            let number = u16::try_from(number).expect("numbers are checked when a device is added");
            let counts = self.segments.device_counts(number);
            let member = &mut self.members[usize::from(number)];
            let empty = counts.free == counts.total || Mutant::RemoveDeviceEarly.on() && counts.live == 0;
            // A growth under way may still bring segments.
            if member.standing == DeviceStanding::Draining && empty && !self.growing {
                member.change(DeviceStanding::Removing);
            }
            let covers = member.standing == DeviceStanding::Draining && counts.live == 0 && counts.quarantined > 0;
            wants |= !member.saved || covers;
        }
        wants
    }

    /// Devices that were removed durably since the last call. Each is to be wiped, and then told by [`Pool::on_wiped`].
    pub fn take_removed(&mut self) -> Vec<RemovedDevice> {
        let removed = std::mem::take(&mut self.removed);
        self.wiping.extend(removed.iter().map(|device| device.number));
        removed
    }

    /// A removed device was wiped, or cannot be.
    pub fn on_wiped(&mut self, number: u16) {
        self.wiping.retain(|wiping| *wiping != number);
    }

    fn is_to_be_wiped(&self, number: u16) -> bool {
        self.wiping.contains(&number) || self.removed.iter().any(|device| device.number == number)
    }

    /// The device of this path that is part of the pool, or the last one that was.
    fn number_of(&self, path: &str) -> Option<u16> {
        let members = (0..).zip(&self.members);
        let found = members.filter(|(_, m)| m.standing != DeviceStanding::Removed && m.config.path == path);
        found.map(|(number, _)| number).last()
    }

    /// Those that a capture makes durable.
    pub(super) fn changing(&self) -> Vec<(u16, DeviceStanding)> {
        let unsaved = (0..).zip(&self.members).filter(|(_, member)| !member.saved);
        let members = unsaved.map(|(number, member)| (number, member.standing));
        members.collect()
    }

    /// The checkpoint that has these states is durable.
    pub(super) fn devices_saved(&mut self, changed: &[(u16, DeviceStanding)]) {
        for (number, standing) in changed {
            let member = &mut self.members[usize::from(*number)];
            if member.standing != *standing {
                // It has changed since, and waits for another checkpoint.
                continue;
            }
            member.saved = true;
            match standing {
                DeviceStanding::Joining => {
                    member.standing = DeviceStanding::Serving;
                    self.segments.extend(*number, member.joining);
                }
                DeviceStanding::Returning => {
                    member.standing = DeviceStanding::Serving;
                    self.segments.set_closed(*number, false);
                }
                DeviceStanding::Removing => {
                    member.standing = DeviceStanding::Removed;
                    let path = member.config.path.clone();
                    let device = member.device.take();
                    self.segments.remove_device(*number);
                    self.io.set_device(*number, None);
                    self.removed.extend(device.map(|device| RemovedDevice { device, number: *number, path }));
                }
                DeviceStanding::Serving | DeviceStanding::Draining | DeviceStanding::Removed => {}
            }
        }
        if !changed.is_empty() {
            self.update_can_grow();
        }
    }
}

impl Member {
    fn is_changing(&self) -> bool {
        !self.saved || !matches!(self.standing, DeviceStanding::Serving | DeviceStanding::Removed)
    }

    fn change(&mut self, standing: DeviceStanding) {
        (self.standing, self.saved) = (standing, false);
    }
}

/// The identity of a device that is added. Its path is part of it: a file that was made before a crash, and that the pool
/// never knew, must not be taken for the device that got its number afterwards.
fn added_uid(pool: Uid, number: u16, path: &str) -> Uid {
    let mut uid = device_uid(pool, number);
    let mut state = 0;
    for (at, byte) in path.bytes().enumerate() {
        state = scramble(state ^ u64::from(byte) << 1 ^ 1);
        uid.0[8 + at % 8] ^= state.to_le_bytes()[at % 8];
    }
    for (out, byte) in uid.0.iter_mut().zip(scramble(state).to_le_bytes()) {
        *out ^= byte;
    }
    uid
}

/// Which device of the settings is which one of the catalogue. The settings name, in their order, the devices that the
/// pool was made with; those that were removed, and those that were added, may be named in their place by the path that
/// the catalogue has, or left out. The result has an entry for each known device: `None` for one that was removed.
pub(super) fn match_devices(
    configured: &[DeviceConfig],
    known: &[DeviceState],
) -> Result<Vec<Option<DeviceConfig>>, PoolError> {
    let mut rest = configured.iter().peekable();
    let mut out = Vec::new();
    for device in known {
        let removed = device.standing == Standing::Removed;
        let named = if removed || device.added.is_some() {
            rest.next_if(|config| config.path == device.path);
            device.added.map(|Sizes { size_bytes, max_bytes }| DeviceConfig {
                path: device.path.clone(),
                size_bytes,
                max_bytes,
            })
        } else {
            Some(rest.next().cloned().ok_or_else(|| mismatch(configured, known))?)
        };
        out.push(named.filter(|_| !removed));
    }
    if rest.next().is_some() {
        return Err(mismatch(configured, known));
    }
    Ok(out)
}

fn mismatch(configured: &[DeviceConfig], known: &[DeviceState]) -> PoolError {
    let made_with = || known.iter().filter(|d| d.added.is_none());
    let removed = made_with().filter(|d| d.standing == Standing::Removed).count();
    PoolError::Config(format!(
        "{} devices are configured, the pool was made with {}, of which {removed} were removed and need not be named; \
         name those it was made with, in their order",
        configured.len(),
        made_with().count(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(path: &str) -> DeviceConfig {
        DeviceConfig { path: path.into(), size_bytes: None, max_bytes: Some(9) }
    }

    fn known(path: &str, standing: Standing, added: bool) -> DeviceState {
        let added = added.then_some(Sizes { size_bytes: Some(7), max_bytes: None });
        DeviceState { uid: Uid([1; 16]), segments: 1, path: path.into(), standing, added }
    }

    #[test]
    fn settings_may_name_what_was_removed_or_added_or_leave_it_out() {
        use Standing::{Draining, Removed, Serving};
        let pool = [
            known("/a", Removed, false),
            known("/b", Draining, false),
            known("/c", Serving, true),
            known("/d", Removed, true),
        ];
        let names = |paths: &[&str]| {
            let configured: Vec<_> = paths.iter().map(|p| config(p)).collect();
            let found = match_devices(&configured, &pool).ok()?;
            Some(found.into_iter().map(|d| d.map(|d| (d.path, d.size_bytes))).collect::<Vec<_>>())
        };
        let want = vec![None, Some(("/b".to_owned(), None)), Some(("/c".to_owned(), Some(7))), None];
        for paths in [&["/a", "/b"][..], &["/b"], &["/a", "/b", "/c"], &["/b", "/c", "/d"], &["/b", "/d"]] {
            assert_eq!(names(paths), Some(want.clone()), "{paths:?}");
        }
        // A device of the pool may lie elsewhere by now.
        assert_eq!(names(&["/x"]).unwrap()[1], Some(("/x".to_owned(), None)));
        for paths in [&[][..], &["/a"], &["/b", "/a"], &["/b", "/x"], &["/c", "/b"], &["/a", "/b", "/d", "/c"]] {
            assert_eq!(names(paths), None, "{paths:?}");
        }
    }

    #[test]
    fn states_from_before_devices_came_and_went_are_read() {
        let old = r#"{"uid":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"segments":5}"#;
        let state: DeviceState = serde_json::from_str(old).unwrap();
        assert_eq!((state.standing, state.added, state.path.as_str()), (Standing::Serving, None, ""));
    }
}
