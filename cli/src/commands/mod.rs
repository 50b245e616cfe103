//! One module a command.

mod clone;
pub(crate) mod copy_in;
pub(crate) mod copy_out;
mod events;
mod failover;
mod fsck;
mod health;
mod inspect;
mod mode;
mod node;
mod policy;
mod pool;
mod range;
mod scrub;
mod simulate;
mod snapshot;
mod status;
mod verify;
mod volume;

use std::io::Write as _;

use anyhow::Result;
use clap::CommandFactory as _;

use crate::args::{Cli, Command};
use crate::{bench, demo};

/// Runs one command to its end.
pub(crate) async fn run(Cli { global, command }: Cli) -> Result<()> {
    match command {
        Command::Volume(command) => volume::run(&global, command).await,
        Command::Import(args) => copy_in::run(&global, args).await,
        Command::Export(args) => copy_out::run(&global, args).await,
        Command::Snapshot(command) => snapshot::run(&global, command).await,
        Command::Clone(command) => clone::run(&global, command).await,
        Command::Write(args) => range::write(&global, args).await,
        Command::Read(args) => range::read(&global, args).await,
        Command::Pool(command) => pool::run(&global, command).await,
        Command::Status(args) => status::run(&global, args).await,
        Command::Delta(command) => mode::delta(&global, command).await,
        Command::Mode(command) => mode::run(&global, command).await,
        Command::Policy(command) => policy::run(&global, command).await,
        Command::Events(args) => events::run(&global, args).await,
        Command::Inspect(args) => inspect::run(&global, &args),
        Command::Scrub(args) => scrub::run(&global, args).await,
        Command::Verify(args) => verify::run(&global, args).await,
        Command::Fsck(args) => fsck::run(&global, &args),
        Command::Health(args) => health::run(&global, args).await,
        Command::Bench(args) => bench::run(&global, args).await,
        Command::Demo(args) => demo::run(&global, args).await,
        Command::Promote(args) => failover::promote(&global, args).await,
        Command::Demote(args) => failover::demote(&global, args).await,
        Command::Switchover(args) => failover::switchover(&global, args).await,
        Command::Resolve(args) => failover::resolve(&global, args).await,
        Command::Node(args) => node::run(&args).await,
        Command::Completions { shell } => {
            // Rendered first: the generator panics when its writer fails.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "understudy", &mut script);
            Ok(std::io::stdout().write_all(&script)?)
        }
    }
}
