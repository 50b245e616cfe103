//! Real service processes: started on free ports, watched by their ready files, killed when dropped.
//!
//! Every wait is a polling loop with a deadline; a wait that fails says what the service logged last.

pub mod alone;
pub mod duo;
pub mod load;
pub mod pair;

use std::{
    fs::{self, File},
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::{Channel, Endpoint};

/// Longest wait for a service to start, recover, catch up or stop.
pub const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Where the service binaries are: `UNDERSTUDY_BIN_DIR`, or the directory of this build, brought up to date first.
///
/// # Panics
/// The binaries cannot be built.
#[must_use]
pub fn bin_dir() -> &'static Path {
    static BIN_DIR: OnceLock<PathBuf> = OnceLock::new();
    BIN_DIR.get_or_init(|| match std::env::var_os("UNDERSTUDY_BIN_DIR") {
        Some(dir) => fs::canonicalize(&dir).unwrap_or_else(|error| panic!("UNDERSTUDY_BIN_DIR {dir:?}: {error}")),
        None => build_binaries().unwrap_or_else(|error| panic!("{error:#}")),
    })
}

/// `cargo test` builds the binaries of other packages only by chance, so ask for them.
fn build_binaries() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    // target/PROFILE/deps/test-0123
    let dir = test.parent().and_then(Path::parent).context("the test executable is not below a profile directory")?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // With a test among what is built, dependencies have the features that they have in `cargo test --workspace`, and none
    // is built twice.
    let what = ["build", "--quiet", "--workspace", "--bins", "--test", "sim"];
    cargo.args(what).current_dir(env!("CARGO_MANIFEST_DIR"));
    if dir.ends_with("release") {
        cargo.arg("--release");
    }
    ensure!(cargo.status().context("cargo cannot be run")?.success(), "cargo build of the services failed");
    Ok(dir.to_owned())
}

/// Which service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `understudy-primary`
    Primary,
    /// `understudy-backup`
    Backup,
}

impl Role {
    /// As in the name of the binary.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        }
    }
}

/// The command of a service, without the `UNDERSTUDY_*` variables meant for the tests: they would be settings to it.
#[must_use]
pub fn service(role: Role) -> Command {
    let mut command = Command::new(bin_dir().join(format!("understudy-{}", role.name())));
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"UNDERSTUDY_") {
            command.env_remove(name);
        }
    }
    command
}

/// The command of a service that sees `hosts` in the place of the machine's `/etc/hosts`: in a mount namespace of its own.
#[must_use]
pub fn service_with_hosts(role: Role, hosts: &Path) -> Command {
    let service = service(role);
    let mut command = namespace();
    command.args(["sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]).arg(hosts).arg(service.get_program());
    // It sets none, it only removes some.
    for (name, _) in service.get_envs() {
        command.env_remove(name);
    }
    command
}

/// Whether [`service_with_hosts`] works on this machine.
#[must_use]
pub fn has_namespaces() -> bool {
    let tried = namespace().args(["mount", "--bind", "/etc/hosts", "/etc/hosts"]).output();
    tried.is_ok_and(|output| output.status.success())
}

fn namespace() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount"]);
    command
}

/// A service's process. Killed by SIGKILL when dropped.
#[derive(Debug)]
pub struct Node {
    child: Child,
    log: PathBuf,
    ready_file: PathBuf,
    /// Where it serves clients, once [`Node::wait_ready`] returned.
    pub grpc: Option<SocketAddr>,
    /// Where the backup serves its primary: the replica listener, or `grpc`.
    pub replica: Option<SocketAddr>,
}

impl Node {
    /// Starts the service on `data_dir` with `args` added. Its log is `data_dir` with the extension `log`, appended.
    ///
    /// # Errors
    /// A file cannot be made or the binary not be started.
    pub fn spawn(role: Role, data_dir: &Path, args: &[&str]) -> Result<Self> {
        Self::spawn_by(service(role), data_dir, args)
    }

    /// As [`Node::spawn`], by a command that becomes the service.
    ///
    /// # Errors
    /// As there.
    pub fn spawn_by(mut command: Command, data_dir: &Path, args: &[&str]) -> Result<Self> {
        let log = data_dir.with_extension("log");
        let ready_file = data_dir.with_extension("ready");
        match fs::remove_file(&ready_file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let output = File::options().create(true).append(true).open(&log)?;
        let child = command
            .arg("--data-dir")
            .arg(data_dir)
            .arg("--ready-file")
            .arg(&ready_file)
            .args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("{} cannot be started", command.get_program().display()))?;
        Ok(Self { child, log, ready_file, grpc: None, replica: None })
    }

    /// [`Node::spawn`] and [`Node::wait_ready`].
    ///
    /// # Errors
    /// As of these.
    pub async fn start(role: Role, data_dir: &Path, args: &[&str]) -> Result<Self> {
        let mut node = Self::spawn(role, data_dir, args)?;
        node.wait_ready().await?;
        Ok(node)
    }

    /// Waits for the ready file and takes the addresses from it.
    ///
    /// # Errors
    /// The service ended, or was not ready within [`PATIENCE`].
    pub async fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(ready) = fs::read(&self.ready_file).ok().and_then(|text| parse(&text)) {
                let address = |key: &str| ready[key].as_str().and_then(|text| text.parse().ok());
                self.grpc = Some(address("grpc").context("the ready file names no gRPC address")?);
                self.replica = address("replica").or(self.grpc);
                ensure!(ready["pid"].as_u64() == Some(self.child.id().into()), "the ready file is of another process");
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the service ended with {status} instead of getting ready:\n{}", self.log_tail());
            }
            ensure!(Instant::now() < deadline, "not ready within {PATIENCE:?}:\n{}", self.log_tail());
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// SIGKILL, and waits until the process is gone.
    ///
    /// # Errors
    /// The system refuses.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    /// SIGTERM, without waiting.
    ///
    /// # Errors
    /// The process is gone.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// SIGSTOP: it keeps its connections and says nothing any more. SIGKILL still ends it.
    ///
    /// # Errors
    /// The process is gone.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT: it goes on where it was.
    ///
    /// # Errors
    /// The process is gone.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("no process id")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Waits until the process ends by itself.
    ///
    /// # Errors
    /// It did not within [`PATIENCE`].
    pub async fn wait_exit(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "did not end within {PATIENCE:?}:\n{}", self.log_tail());
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// A channel to the client listener, that connects when first used.
    ///
    /// # Errors
    /// The service is not ready yet.
    pub fn channel(&self) -> Result<Channel> {
        let address = self.grpc.context("the service is not ready")?;
        Ok(Endpoint::from_shared(format!("http://{address}"))?.connect_timeout(Duration::from_secs(2)).connect_lazy())
    }

    /// What the service logged last.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&log[log.len().saturating_sub(4096)..]).into_owned();
        format!("--- end of {}\n{text}---", self.log.display())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Errors only mean that it ended before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A ready file may be read while it is being written.
fn parse(text: &[u8]) -> Option<serde_json::Value> {
    serde_json::from_slice(text).ok()
}

/// The seed of a test: `UNDERSTUDY_SEED`, or `default`. Printed, so that a failure can be replayed.
#[must_use]
pub fn seed(default: u64) -> u64 {
    let seed = std::env::var("UNDERSTUDY_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    println!("seed {seed}: replay with UNDERSTUDY_SEED={seed}");
    seed
}
