//! Events on disk: JSON lines with a checksum, in two files of bounded size.
//!
//! `events.jsonl` is appended to; when it is full it becomes `events.old.jsonl`, in the place of the one before. So the
//! newest [`FILE_BYTES_MAX`] are always there, and never more than twice as many. A line that is damaged, or torn by a
//! crash, is left out when the files are read; what is behind the last good one is cut off. Layout: `docs/formats.md`.
//!
//! After a failed write or sync the end does not move, and what was left behind it is cut off before the next write: a
//! page that a failed sync took for clean is then written anew.

use std::{
    io::{self, Write as _},
    sync::Arc,
};

use super::Event;
use crate::{
    checksum::crc32c,
    storage::{OpenMode, Storage, StorageFile},
};

const CURRENT: &str = "events.jsonl";
const OLD: &str = "events.old.jsonl";
/// Size of each file. A line is far smaller: texts and the number of fields are bounded.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Length of what follows an event's own fields: `,"crc32c":"89abcdef"}`.
const TAIL_BYTES: usize = 21;

pub(super) struct EventFile {
    storage: Arc<dyn Storage>,
    file: Arc<dyn StorageFile>,
    /// Behind the last good line.
    end: u64,
    /// Its name is not durable yet.
    is_new: bool,
    /// Something behind the end was left by a failure.
    is_torn: bool,
    bytes_max: u64,
}

impl EventFile {
    /// The files of a directory, made where they are absent, and the events in them, oldest first.
    pub(super) fn open(storage: Arc<dyn Storage>) -> io::Result<(Self, Vec<Event>)> {
        Self::open_with(storage, FILE_BYTES_MAX)
    }

    fn open_with(storage: Arc<dyn Storage>, bytes_max: u64) -> io::Result<(Self, Vec<Event>)> {
        let mut events = Vec::new();
        match storage.open(OLD, OpenMode::ReadOnly) {
            Ok(old) => _ = read(&*old, bytes_max, &mut events)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let file = storage.open(CURRENT, OpenMode::OrCreate)?;
        let end = read(&*file, bytes_max, &mut events)?;
        if file.len()? > end {
            file.set_len(end)?;
        }
        Ok((Self { storage, file, end, is_new: true, is_torn: false, bytes_max }, events))
    }

    /// Makes events durable. After an error some of them may be.
    pub(super) fn append(&mut self, events: &[Event]) -> io::Result<()> {
        let mut lines = Vec::new();
        for event in events {
            let line = encode(event);
            if self.end + (lines.len() + line.len()) as u64 > self.bytes_max {
                self.write(&mut lines)?;
                self.rotate()?;
            }
            lines.extend_from_slice(&line);
        }
        self.write(&mut lines)
    }

    fn write(&mut self, lines: &mut Vec<u8>) -> io::Result<()> {
        if self.is_new {
            self.storage.sync_dir("")?;
            self.is_new = false;
        }
        if !lines.is_empty() {
            if std::mem::replace(&mut self.is_torn, true) {
                self.file.set_len(self.end)?;
            }
            self.file.write_all_at(lines, self.end)?;
            self.file.sync_data()?;
            self.is_torn = false;
            self.end += lines.len() as u64;
            lines.clear();
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        match self.storage.rename(CURRENT, OLD) {
            // An attempt before this one got so far.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
        // Or a crash might leave the new name without the rename: the full file would be gone.
        self.storage.sync_dir("")?;
        self.file = self.storage.open(CURRENT, OpenMode::OrCreate)?;
        (self.end, self.is_new, self.is_torn) = (0, true, false);
        Ok(())
    }
}

/// Adds what a file holds, as far as its numbers go on. Returns the end of the last good line.
fn read(file: &dyn StorageFile, bytes_max: u64, events: &mut Vec<Event>) -> io::Result<u64> {
    let mut bytes = vec![0; usize::try_from(file.len()?.min(bytes_max)).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    let (mut at, mut end) = (0, 0);
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        at += line.len() as u64;
        let Some(event) = line.strip_suffix(b"\n").and_then(decode) else { continue };
        if events.last().is_none_or(|last| last.number < event.number) {
            events.push(event);
            end = at;
        }
    }
    Ok(end)
}

/// One line.
fn encode(event: &Event) -> Vec<u8> {
    let mut line = serde_json::to_vec(event).expect("an event is made of texts and numbers");
    // The closing brace; the checksum becomes the last field.
    line.pop();
    let checksum = crc32c(&line);
    writeln!(line, ",\"crc32c\":\"{checksum:08x}\"}}").expect("a vector takes every write");
    line
}

/// `None` if the line is damaged.
fn decode(line: &[u8]) -> Option<Event> {
    let (fields, tail) = line.split_at_checked(line.len().checked_sub(TAIL_BYTES)?)?;
    if tail != format!(",\"crc32c\":\"{:08x}\"}}", crc32c(fields)).as_bytes() {
        return None;
    }
    serde_json::from_slice(&[fields, b"}"].concat()).ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::{Rng as _, SeedableRng as _};
    use rand_pcg::Pcg64Mcg;

    use super::*;
    use crate::storage::{RealStorage, SimStorage, sim::OpKind};

    fn event(number: u64) -> Event {
        Event {
            number,
            time_unix_ms: -5,
            kind: "link.lost".into(),
            message: "it said \"no\"\n".into(),
            fields: BTreeMap::from([("cause".into(), "timeout".into())]),
        }
    }

    fn numbers(events: &[Event]) -> Vec<u64> {
        events.iter().map(|event| event.number).collect()
    }

    #[test]
    fn a_line_has_these_bytes() {
        let line = "{\"number\":7,\"time_unix_ms\":-5,\"kind\":\"link.lost\",\"message\":\"it said \\\"no\\\"\\n\",\
                    \"fields\":{\"cause\":\"timeout\"},\"crc32c\":\"534f62ef\"}\n";
        let encoded = encode(&event(7));
        assert_eq!(String::from_utf8_lossy(&encoded), line);
        assert_eq!(decode(encoded.strip_suffix(b"\n").unwrap()), Some(event(7)));
    }

    #[test]
    fn real_files_hold_the_newest_events_in_a_bounded_size() {
        let dir = tempfile::tempdir().unwrap();
        let storage: Arc<dyn Storage> = Arc::new(RealStorage::new(dir.path()).unwrap());
        let bytes_max = 10 * encode(&event(1000)).len() as u64;
        let (mut file, found) = EventFile::open_with(Arc::clone(&storage), bytes_max).unwrap();
        assert!(found.is_empty());
        for number in 1000..1100 {
            file.append(&[event(number)]).unwrap();
            let (_, found) = EventFile::open_with(Arc::clone(&storage), bytes_max).unwrap();
            assert_eq!(found.last(), Some(&event(number)));
            assert!(found.windows(2).all(|pair| pair[0].number + 1 == pair[1].number), "{:?}", numbers(&found));
            assert!((10.min(number - 999)..=20).contains(&(found.len() as u64)), "{:?}", numbers(&found));
        }
        // Many at once pass through both files.
        file.append(&(1100..1200).map(event).collect::<Vec<_>>()).unwrap();
        let (_, found) = EventFile::open_with(storage, bytes_max).unwrap();
        assert_eq!(numbers(&found), (1180..1200).collect::<Vec<_>>());
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            assert!(entry.unwrap().metadata().unwrap().len() <= bytes_max);
        }
    }

    #[test]
    fn a_torn_last_line_is_dropped_and_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let storage: Arc<dyn Storage> = Arc::new(RealStorage::new(dir.path()).unwrap());
        let lines = [encode(&event(1)), encode(&event(2))].concat();
        let path = dir.path().join(CURRENT);
        for torn in lines.len() / 2..lines.len() {
            std::fs::write(&path, &lines[..torn]).unwrap();
            let (mut file, found) = EventFile::open(Arc::clone(&storage)).unwrap();
            assert_eq!(found, [event(1)]);
            assert_eq!(std::fs::read(&path).unwrap(), encode(&event(1)), "{torn} bytes were left");
            file.append(&[event(9)]).unwrap();
            assert_eq!(EventFile::open(Arc::clone(&storage)).unwrap().1, [event(1), event(9)]);
        }
    }

    #[test]
    fn a_flipped_byte_costs_the_lines_it_touches_and_changes_none() {
        let all: Vec<Event> = (1..5).map(event).collect();
        let lines: Vec<u8> = all.iter().flat_map(encode).collect();
        for at in 0..lines.len() {
            let storage = SimStorage::new(1);
            let file = storage.open(CURRENT, OpenMode::CreateNew).unwrap();
            file.write_all_at(&lines, 0).unwrap();
            storage.corrupt(CURRENT, at as u64, 1 << (at % 8));
            let (_, found) = EventFile::open(Arc::new(storage)).unwrap();
            assert!(found.iter().all(|event| all.contains(event)), "byte {at}: {found:?}");
            assert!((2..4).contains(&found.len()), "byte {at}: {:?} are left", numbers(&found));
        }
    }

    #[test]
    fn after_any_crash_what_was_made_durable_is_there() {
        for seed in 0..2000 {
            let mut rng = Pcg64Mcg::seed_from_u64(seed);
            let storage = SimStorage::new(seed);
            let bytes_max = 5 * encode(&event(1)).len() as u64;
            let (mut durable, mut next) = (0, 1);
            for _ in 0..4 {
                if rng.random_bool(0.3) {
                    let kind = [OpKind::Sync, OpKind::Write, OpKind::Rename, OpKind::Create, OpKind::SyncDir];
                    storage.fail_nth(kind[rng.random_range(0..5)], rng.random_range(1..6), io::ErrorKind::Other);
                }
                storage.crash_after(rng.random_range(1..40));
                if let Ok((mut file, _)) = EventFile::open_with(Arc::new(storage.clone()), bytes_max) {
                    for _ in 0..rng.random_range(1..20) {
                        let count = rng.random_range(1..4);
                        let events: Vec<Event> = (next..next + count).map(event).collect();
                        next += count;
                        if file.append(&events).is_ok() {
                            durable = next - 1;
                        }
                    }
                }
                storage.crash(&mut rng);
                storage.clear_faults();
                let (_, found) = EventFile::open_with(Arc::new(storage.fork()), bytes_max).unwrap();
                let newest = found.last().map_or(0, |event| event.number);
                assert!(newest >= durable, "seed {seed}: {durable} was durable, {:?} are left", numbers(&found));
                assert!(found.iter().all(|found| *found == event(found.number)), "seed {seed}: {found:?}");
                assert!(found.is_sorted_by_key(|event| event.number), "seed {seed}: {:?}", numbers(&found));
            }
        }
    }
}
