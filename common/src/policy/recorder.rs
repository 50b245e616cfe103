//! Writes the observation log while a service decides.
//!
//! Two files at most, each half of the limit: the present one and the one before. Each begins with the policy and, for
//! each group, with the state from which its lines are replayed; so does what follows a gap. Nothing waits for the
//! disk: where the writer falls behind, lines are left out. The log is for people and decides nothing, so it is not
//! synced, and a disk that fails ends the recording and nothing else.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::JoinHandle,
};

use tracing::warn;

use super::{Decision, GroupPolicy, Observation, PolicyConfig, simulate::log::LogLine};

/// Pieces that the writer has not taken.
const QUEUE: usize = 256;

/// What the writer is given.
struct Piece {
    lines: String,
    /// Before these lines the present file becomes the one before.
    rotate: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Recorder {
    pieces: Option<SyncSender<Piece>>,
    writer: Option<JoinHandle<()>>,
    /// Of one file.
    limit_bytes: u64,
    /// Into the present file.
    written_bytes: u64,
    policy: Option<PolicyConfig>,
    /// Groups whose lines follow on each other.
    groups: BTreeSet<String>,
}

impl Recorder {
    /// Records into `path`; the file before is beside it (`observations.jsonl`, `observations.1.jsonl`). Both together
    /// take about `limit_bytes`.
    #[must_use]
    pub fn start(path: PathBuf, limit_bytes: u64) -> Self {
        let (pieces, queue) = sync_channel(QUEUE);
        let writer = std::thread::Builder::new().name("observations".into()).spawn(move || {
            if let Err(error) = write(&path, &queue) {
                warn!(path = %path.display(), %error, "observations are not recorded any more");
            }
        });
        Self {
            // Without a thread nobody records; the service goes on.
            writer: writer.inspect_err(|error| warn!(%error, "observations are not recorded")).ok(),
            pieces: Some(pieces),
            limit_bytes: limit_bytes / 2,
            written_bytes: 0,
            policy: None,
            groups: BTreeSet::new(),
        }
    }

    /// A group was weighed: by `policy`, from the state `before`.
    pub fn record(
        &mut self,
        group: &str,
        policy: &PolicyConfig,
        before: GroupPolicy,
        observation: &Observation,
        decision: &Decision,
    ) {
        let rotate = self.written_bytes >= self.limit_bytes;
        if rotate {
            self.begin_anew();
        }
        let group = || group.to_owned();
        let mut lines = Vec::with_capacity(4);
        if self.policy.as_ref() != Some(policy) {
            self.policy = Some(policy.clone());
            lines.push(LogLine::Policy { policy: Box::new(policy.clone()) });
        }
        if self.groups.insert(group()) {
            lines.push(LogLine::State { group: group(), state: Box::new(before) });
        }
        lines.push(LogLine::Observation { group: group(), observation: Box::new(observation.clone()) });
        lines.push(LogLine::Decision { group: group(), decision: Box::new(decision.clone()) });
        let mut text = String::new();
        for line in lines {
            text.push_str(&serde_json::to_string(&line).expect("a line is made of texts and numbers"));
            text.push('\n');
        }
        let length = u64::try_from(text.len()).unwrap_or(0);
        let Some(pieces) = &self.pieces else { return };
        if pieces.try_send(Piece { lines: text, rotate }).is_err() {
            return self.begin_anew();
        }
        self.written_bytes = if rotate { length } else { self.written_bytes + length };
    }

    /// What comes next needs nothing of what was written.
    fn begin_anew(&mut self) {
        self.policy = None;
        self.groups.clear();
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.pieces = None;
        // A writer that panicked has ended the process.
        let _ = self.writer.take().map(JoinHandle::join);
    }
}

fn write(path: &Path, queue: &Receiver<Piece>) -> io::Result<()> {
    // What an earlier process left is the file before.
    let mut file = rotated(path)?;
    for Piece { lines, rotate } in queue {
        if rotate {
            file = rotated(path)?;
        }
        file.write_all(lines.as_bytes())?;
    }
    Ok(())
}

fn rotated(path: &Path) -> io::Result<File> {
    match fs::rename(path, path.with_extension("1.jsonl")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().create_new(true).append(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;
    use crate::policy::simulate::{LinkModel, PairModel, Pattern, Scenario, Shaped, Strategy, log::replay, simulate};

    /// An hour of one group, recorded as a service would.
    fn recorded(path: &Path, limit_bytes: u64) -> u64 {
        let workload = Shaped {
            length_ms: 3_600_000,
            block_bytes: 1 << 20,
            shape: Box::new(|at| if at / 1000 % 600 < 60 { 200 << 20 } else { 10 << 20 }),
            noise_permille: 100,
            pattern: Pattern::Uniform(5000),
            seed: 1,
        };
        let policy = PolicyConfig::default();
        let (link, pair) = (LinkModel::steady(100 << 20, 20), PairModel::default());
        let scenario = Scenario { workload: &workload, link, pair, policy: policy.clone() };
        let mut recorder = Recorder::start(path.to_owned(), limit_bytes);
        let (mut live, mut weighed) = (GroupPolicy::new(), 0);
        simulate(&scenario, Strategy::Adaptive, |tick| {
            let Some((obs, decision)) = tick.weighed else { return };
            let before = live.clone();
            live.on_observation(&policy, obs);
            recorder.record("data", &policy, before, obs, decision);
            weighed += 1;
        });
        weighed
    }

    fn replayed(path: &Path) -> (u64, u64) {
        let log = BufReader::new(File::open(path).unwrap());
        let found = replay(log, None, |_| {}).unwrap();
        (found.groups["data"].compared, found.groups["data"].different)
    }

    #[test]
    fn what_is_recorded_is_replayed_to_the_live_decisions() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("observations.jsonl");
        let weighed = recorded(&path, 1 << 40);
        let (compared, different) = replayed(&path);
        // The writer may have been behind: then less, but never different.
        assert!(compared > 0 && compared <= weighed);
        assert_eq!(different, 0);
    }

    #[test]
    fn the_log_is_bounded_and_each_of_its_files_stands_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("observations.jsonl");
        // What another process left is kept for one more turn.
        fs::write(&path, "left\n").unwrap();
        recorded(&path, 4 << 20);
        let before = folder.path().join("observations.1.jsonl");
        for file in [&path, &before] {
            assert!(fs::metadata(file).unwrap().len() < (2 << 20) + (64 << 10));
            let (compared, different) = replayed(file);
            assert!(compared > 0);
            assert_eq!(different, 0);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_disk_that_fails_ends_the_recording_and_nothing_else() {
        recorded(Path::new("/nowhere/at/all/observations.jsonl"), 1 << 20);
    }
}
