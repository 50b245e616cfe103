//! The frame of a service's `main`: settings, log, lock of the directory, runtime, signals, exit code.

use std::{
    fs::{self, File, TryLockError},
    future::Future,
    io::{self, Read, Seek, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    config::{self, FromSettings, Start},
    telemetry,
};

/// Exit codes of the services; success is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Bad configuration, or the directory belongs to the other role or is in use.
    Config = config::EXIT_CONFIG,
    /// A mistake of ours.
    Internal = 70,
    /// Storage failed or is damaged.
    Storage = 74,
    /// The role changed; start again.
    Again = 75,
}

/// Why a service ends without success.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Failure {
    /// Exit code.
    pub exit: Exit,
    /// What happened and what to do.
    pub message: String,
}

impl Failure {
    /// `message` says what happened and what to do.
    pub fn new(exit: Exit, message: impl ToString) -> Self {
        Self { exit, message: message.to_string() }
    }
}

/// Runs a service to its end. `body` gets the settings and a token that SIGTERM and SIGINT cancel; the lock of the data
/// directory is held around it. Runs on this thread alone: two runtimes' threads are slower for one stream.
pub fn run<C: FromSettings, F: Future<Output = Result<(), Failure>>>(
    body: impl FnOnce(C, CancellationToken) -> F,
) -> ExitCode {
    let (config, warnings) = match config::start::<C>(std::env::args_os(), std::env::vars_os()) {
        Start::Run { config, warnings } => (*config, warnings),
        Start::Exit { code, output, errors } => {
            // Nobody is left to tell when these fail.
            let _ = io::stdout().write_all(output.as_bytes());
            let _ = io::stderr().write_all(errors.as_bytes());
            return ExitCode::from(code);
        }
    };
    if let Err(failure) = telemetry::init_log(config.log()) {
        let _ = writeln!(io::stderr(), "error: {failure}");
        return ExitCode::from(Exit::Config as u8);
    }
    exit_on_panic();
    for warning in warnings {
        warn!("{warning}");
    }
    match lock_and_run(config, body) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!(exit = failure.exit as u8, "{failure}");
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn lock_and_run<C: FromSettings, F: Future<Output = Result<(), Failure>>>(
    config: C,
    body: impl FnOnce(C, CancellationToken) -> F,
) -> Result<(), Failure> {
    let _lock = DirectoryLock::acquire(config.data_dir()).map_err(|error| Failure::new(error.exit(), error))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Internal, format!("cannot start the runtime: {error}")))?;
    let result = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        cancel_on_signal(shutdown.clone())
            .map_err(|error| Failure::new(Exit::Internal, format!("cannot listen for signals: {error}")))?;
        body(config, shutdown).await
    });
    // What outlived the drain is blocked in a system call; it must not hold up the exit.
    runtime.shutdown_background();
    result
}

fn cancel_on_signal(shutdown: CancellationToken) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        info!(signal = name, "draining");
        shutdown.cancel();
    });
    Ok(())
}

/// A panic of any thread ends the process: nothing goes on with half a state.
fn exit_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        std::process::exit(i32::from(Exit::Internal as u8));
    }));
}

/// The right to use a data directory; one process has it. Ends with the value or the process.
#[derive(Debug)]
pub struct DirectoryLock {
    _file: File,
}

/// The directory could not be locked.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another process has it.
    #[error("{directory} is in use by process {holder}; stop it or choose another data_dir")]
    InUse {
        /// The data directory.
        directory: PathBuf,
        /// What the lock file says; `unknown` where it says nothing.
        holder: String,
    },
    /// The directory or the lock file cannot be made.
    #[error("cannot lock {directory}: {source}; check that data_dir can be made and written")]
    Io {
        /// The data directory.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl LockError {
    fn exit(&self) -> Exit {
        match self {
            Self::InUse { .. } => Exit::Config,
            Self::Io { .. } => Exit::Storage,
        }
    }
}

impl DirectoryLock {
    /// Makes `directory` (for this user alone) where it is absent and locks it.
    pub fn acquire(directory: &Path) -> Result<Self, LockError> {
        let io = |source| LockError::Io { directory: directory.into(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(io)?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(directory.join("lock"))
            .map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // For the message alone.
                let _ = (&file).take(20).read_to_string(&mut holder);
                let holder = if holder.trim().is_empty() { "unknown" } else { holder.trim() }.to_owned();
                return Err(LockError::InUse { directory: directory.into(), holder });
            }
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(io)?;
        writeln!(file, "{}", std::process::id()).map_err(io)?;
        Ok(Self { _file: file })
    }
}

/// Holds the lock of a directory that exists, to look at it: the file is not written, and a missing one not made.
///
/// # Errors
/// A service has the directory, or there is none.
pub fn lock_to_inspect(directory: &Path) -> Result<Option<File>, LockError> {
    let io = |source| LockError::Io { directory: directory.into(), source };
    fs::read_dir(directory).map_err(io)?;
    let file = match File::open(directory.join("lock")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(io)?,
    };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // For the message alone.
            let _ = (&file).take(20).read_to_string(&mut holder);
            let holder = if holder.trim().is_empty() { "unknown" } else { holder.trim() }.to_owned();
            Err(LockError::InUse { directory: directory.into(), holder })
        }
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_locked_once() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("a/b");
        let lock = DirectoryLock::acquire(&directory).unwrap();
        let refused = DirectoryLock::acquire(&directory).unwrap_err();
        assert_eq!(refused.exit(), Exit::Config);
        assert!(refused.to_string().contains(&format!("in use by process {};", std::process::id())), "{refused}");
        assert!(matches!(lock_to_inspect(&directory), Err(LockError::InUse { .. })));
        drop(lock);
        assert!(lock_to_inspect(&directory).unwrap().is_some());
        DirectoryLock::acquire(&directory).unwrap();
        assert!(matches!(DirectoryLock::acquire(Path::new("/proc/none")), Err(LockError::Io { .. })));
    }
}
