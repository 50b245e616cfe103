//! One module a command.

pub(crate) mod copy_in;
pub(crate) mod copy_out;
mod events;
mod health;
mod inspect;
mod range;
mod status;
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
        Command::Write(args) => range::write(&global, args).await,
        Command::Read(args) => range::read(&global, args).await,
        Command::Pool(command) => volume::pool(&global, command).await,
        Command::Status(args) => status::run(&global, args).await,
        Command::Events(args) => events::run(&global, args).await,
        Command::Inspect(args) => inspect::run(&global, &args),
        Command::Health(args) => health::run(&global, args).await,
        Command::Bench(args) => bench::run(&global, args).await,
        Command::Demo(args) => demo::run(&global, args).await,
        Command::Completions { shell } => {
            // Rendered first: the generator panics when its writer fails.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "understudy", &mut script);
            Ok(std::io::stdout().write_all(&script)?)
        }
    }
}
