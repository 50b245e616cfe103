//! The two services as children: started, frozen, killed, started again, and ended on every path.
//!
//! A child is killed when its [`Service`] is dropped. A release build aborts on a panic without dropping anything, so
//! the panic hook kills them as well.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

/// How long a service may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// Children that run, for the panic hook.
static CHILDREN: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// What a service writes when it is ready.
#[derive(Debug, Clone, Deserialize)]
struct Ready {
    grpc: String,
    admin: String,
    pid: u32,
}

/// One service: its folder, its ports, its process.
#[derive(Debug)]
pub(super) struct Service {
    name: &'static str,
    folder: PathBuf,
    extra: Vec<OsString>,
    ready: Option<Ready>,
    child: Option<Child>,
}

impl Service {
    /// Starts `understudy-NAME` with its data in `folder/NAME`; returns once it is ready.
    pub(super) async fn start(name: &'static str, folder: &Path, extra: Vec<OsString>) -> Result<Self> {
        kill_children_on_panic();
        let mut service = Self { name, folder: folder.to_owned(), extra, ready: None, child: None };
        service.run().await?;
        Ok(service)
    }

    /// Starts it again, at the same addresses.
    pub(super) async fn restart(&mut self) -> Result<()> {
        self.run().await
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.ready.as_ref().map_or("", |r| r.grpc.as_str()))
    }

    /// SIGSTOP: the process is there, its connections are open, nothing moves.
    pub(super) fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    pub(super) fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// SIGKILL; works on a frozen process too.
    pub(super) fn kill(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let pid = Pid::from_child(&child);
        let killed = child.kill();
        let waited = child.wait();
        forget(pid);
        killed.and(waited.map(|_| ())).with_context(|| format!("cannot kill {}", self.name))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().with_context(|| format!("{} is not running", self.name))?;
        kill_process(Pid::from_child(child), signal).with_context(|| format!("cannot send a signal to {}", self.name))
    }

    async fn run(&mut self) -> Result<()> {
        let ready_file = self.folder.join(format!("{}.ready", self.name));
        if ready_file.exists() {
            std::fs::remove_file(&ready_file).context("cannot remove the old ready file")?;
        }
        let binary = binary(self.name)?;
        let log = self.log()?;
        let (grpc, admin) = match &self.ready {
            Some(ready) => (ready.grpc.as_str(), ready.admin.as_str()),
            None => ("127.0.0.1:0", "127.0.0.1:0"),
        };
        let mut command = Command::new(&binary);
        command
            .arg("--data-dir")
            .arg(self.folder.join(self.name))
            .args(["--listen", grpc, "--admin-listen", admin, "--ready-file"])
            .arg(&ready_file)
            .args(&self.extra)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for the demo, which then ends its children.
            .process_group(0);
        // Settings of the caller's own services are not meant for these.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("UNDERSTUDY_")) {
            command.env_remove(name);
        }
        let child = command.spawn().with_context(|| format!("cannot start {}", binary.display()))?;
        remember(Pid::from_child(&child));
        let id = child.id();
        self.child = Some(child);
        self.ready = Some(self.wait_ready(&ready_file, id).await?);
        Ok(())
    }

    async fn wait_ready(&mut self, file: &Path, id: u32) -> Result<Ready> {
        let start = Instant::now();
        loop {
            let ready = std::fs::read(file).ok().and_then(|text| serde_json::from_slice::<Ready>(&text).ok());
            if let Some(ready) = ready.filter(|ready| ready.pid == id) {
                return Ok(ready);
            }
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if let Some(status) = ended {
                bail!("understudy-{} ended with {status} before it was ready: {}", self.name, self.last_words());
            }
            if start.elapsed() > READY_LIMIT {
                bail!("understudy-{} was not ready within {READY_LIMIT:?}: {}", self.name, self.last_words());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join(format!("{}.log", self.name))
    }

    fn log(&self) -> Result<File> {
        let path = self.log_path();
        let file = OpenOptions::new().create(true).append(true).open(&path);
        file.with_context(|| format!("cannot write {}", path.display()))
    }

    /// The end of its log.
    fn last_words(&self) -> String {
        let tail = || -> std::io::Result<String> {
            let mut file = File::open(self.log_path())?;
            let length = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(length.saturating_sub(500)))?;
            let mut text = Vec::new();
            file.read_to_end(&mut text)?;
            Ok(String::from_utf8_lossy(&text).trim().to_owned())
        };
        tail().unwrap_or_default()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Nothing more can be done about a child that cannot be killed.
        let _ = self.kill();
    }
}

/// Beside this executable, or where PATH has it.
fn binary(name: &str) -> Result<PathBuf> {
    let file = format!("understudy-{name}");
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(&file)));
    let in_path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&in_path).map(|folder| folder.join(&file)).collect::<Vec<_>>();
    let found = beside.into_iter().chain(in_path).find(|path| path.is_file());
    found.with_context(|| format!("{file} is neither beside this program nor in PATH; build it: cargo build --release"))
}

fn remember(pid: Pid) {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner).push(pid);
}

fn forget(pid: Pid) {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner).retain(|p| *p != pid);
}

fn kill_children_on_panic() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // A panic while the list is held must not wait for itself.
            if let Ok(children) = CHILDREN.try_lock() {
                for pid in children.iter() {
                    let _ = kill_process(*pid, Signal::KILL);
                }
            }
            next(info);
        }));
    });
}
