//! `node`: runs the service that a directory is for, and the other one after a change of role.

use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};
use understudy_common::process::Exit;
use understudy_common::storage::RealStorage;
use understudy_common::store::{self, Role};

use crate::args::{NodeArgs, NodeRole};

/// Exit code of a service whose role has changed.
const AGAIN: i32 = Exit::Again as i32;
/// Of a node whose service was killed by a signal: as shells say it.
const KILLED: i32 = 128;
/// How often a service is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Ended with the node, whatever ends that in order.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        // Errors only mean that it ended before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ends with the exit code of the last service.
pub(crate) async fn run(args: &NodeArgs) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        let role = role(args)?;
        let mut service = Service(
            command(args, role)?
                .spawn()
                .with_context(|| format!("understudy-{role} cannot be started; name its directory with --bin-dir"))?,
        );
        let status = loop {
            let told = tokio::select! {
                _ = terminate.recv() => true,
                _ = interrupt.recv() => true,
                () = tokio::time::sleep(LOOK) => false,
            };
            if told && let Some(pid) = i32::try_from(service.0.id()).ok().and_then(Pid::from_raw) {
                kill_process(pid, Signal::TERM)?;
            }
            if let Some(status) = service.0.try_wait()? {
                break status;
            }
        };
        drop(service);
        match code(status) {
            AGAIN => eprintln!("the role of {} has changed", args.data_dir.display()),
            code => std::process::exit(code),
        }
    }
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status.code().unwrap_or_else(|| KILLED + status.signal().unwrap_or_default())
}

/// What the directory says, or for an empty one, the arguments.
fn role(args: &NodeArgs) -> Result<Role> {
    let wanted = match args.role {
        NodeRole::Primary => Role::Primary,
        NodeRole::Backup => Role::Backup,
    };
    if !args.data_dir.is_dir() {
        return Ok(wanted);
    }
    let storage = RealStorage::new(&args.data_dir).context("cannot open the directory")?;
    let found = store::role_of(&storage).with_context(|| format!("cannot read {}", args.data_dir.display()))?;
    Ok(found.unwrap_or(wanted))
}

fn command(args: &NodeArgs, role: Role) -> Result<Command> {
    let beside = || {
        let own = std::env::current_exe().context("the directory of this binary is not known")?;
        anyhow::Ok(own.parent().map(PathBuf::from).unwrap_or_default())
    };
    let dir = args.bin_dir.clone().map_or_else(beside, Ok)?;
    let mut command = Command::new(dir.join(format!("understudy-{role}")));
    command.arg("--data-dir").arg(&args.data_dir);
    let config = match role {
        Role::Primary => &args.primary_config,
        Role::Backup => &args.backup_config,
    };
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    if let (Role::Primary, Some(peer)) = (role, &args.peer) {
        command.arg("--backup-url").arg(peer);
    }
    command.args(&args.settings);
    Ok(command)
}
