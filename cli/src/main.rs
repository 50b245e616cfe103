//! The `understudy` command: the operator's and newcomer's tool.
//!
//! Exit codes: 0 done, 1 failed (one line on standard error, with the remedy), 2 wrong usage.

use std::process::ExitCode;

use clap::Parser as _;

mod args;
mod bench;
mod commands;
mod connect;
mod convert;
mod demo;
mod output;

/// Large message buffers: glibc's allocator would spend its time in page faults.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("UNDERSTUDY_LOG").unwrap_or_else(|_| "error".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    // One thread: measured faster than several for one stream on few cores. Files are read on threads of their own.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = match runtime {
        Ok(runtime) => {
            let done = runtime.block_on(commands::run(cli));
            // A thread that waits for standard input must not keep the process.
            runtime.shutdown_background();
            done
        }
        Err(error) => Err(anyhow::Error::new(error).context("cannot start the runtime")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let usage = error.downcast_ref::<args::Usage>().is_some();
            eprintln!("error: {}", output::one_line(&format!("{error:#}")));
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}
