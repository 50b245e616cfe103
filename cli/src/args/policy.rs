//! Arguments of `delta`, `mode` and `policy`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use understudy_common::policy::simulate::{Outage, RateFrom};
use understudy_common::units::{parse_bytes, parse_duration};

#[derive(Debug, Subcommand)]
pub(crate) enum DeltaCommand {
    /// Begin a run of a group that is in delta mode, whatever its schedule says.
    #[command(after_help = "Example:\n  understudy delta start data")]
    Start {
        /// A group, or a volume of it.
        group: String,
    },
    /// Abort the open run of a group; its marks stay.
    #[command(after_help = "Example:\n  understudy delta abort data")]
    Abort {
        /// A group, or a volume of it.
        group: String,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ForcedMode {
    /// Mark changed blocks, copy them in runs.
    Delta,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModeCommand {
    /// Force a mode until it is released.
    #[command(after_help = "Example:\n  understudy mode set data delta")]
    Set {
        /// A group, or a volume of it.
        group: String,
        /// The mode; continuous mode cannot be forced.
        #[arg(value_enum)]
        mode: ForcedMode,
    },
    /// Leave the mode to the policy again.
    #[command(after_help = "Example:\n  understudy mode release data")]
    Release {
        /// A group, or a volume of it.
        group: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Show every setting of the policy in force.
    #[command(after_help = "Example:\n  understudy policy show")]
    Show,
    /// Change settings, for every group, from the next weighing on; all of them or none.
    #[command(
        after_help = "Examples:\n  understudy policy set fill_enter=0.8 fill_leave=0.4\n  understudy policy set --check delta.schedule=idle link.settle=10s"
    )]
    Set(PolicySetArgs),
    /// Say why groups are in their modes: what was weighed, against which thresholds, and the alternative.
    #[command(
        after_help = "Examples:\n  understudy policy explain data\n  understudy --json policy explain | jq '.groups[].now.because'"
    )]
    Explain(ExplainArgs),
    /// Replay an observation log, or a block trace over a made-up link, against any policy; needs no service.
    #[command(after_help = "Examples:
  understudy policy simulate observations.jsonl
  understudy policy simulate fio.log --link-rate 50MiB --rtt 20ms --outage 10min+90s --plot run.svg
  understudy policy simulate blkparse.txt --link-rate 100MiB --link-rate 30min=5MiB --set fill_enter=0.8
  fio --name=w --rw=randwrite --size=1g --write_iolog=fio.log

An observation log is replayed to the decisions that were made live; with --set or --config, to those of that policy.
A trace is an iolog of fio (version 3, or version 2 with --trace-rate) or the text of blkparse. It is taken through
continuous mode, delta mode and the policy. \"optimum\" is a lower bound: no strategy whose recovery point is never
older than the policy's largest age sends less, even if it knew the future.")]
    Simulate(SimulateArgs),
}

/// `NAME=VALUE`.
pub(crate) type SettingArg = (String, String);

fn setting(text: &str) -> Result<SettingArg, String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE, as fill_enter=0.8")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[derive(Debug, Args)]
pub(crate) struct PolicySetArgs {
    /// Settings, as fill_enter=0.8 or delta.schedule=idle; \"policy show\" has all names.
    #[arg(required = true, value_name = "NAME=VALUE", value_parser = setting)]
    pub(crate) settings: Vec<SettingArg>,
    /// Only check them.
    #[arg(long)]
    pub(crate) check: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// A group, or a volume of it [default: every group].
    pub(crate) group: Option<String>,
    /// Past decisions of each group.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) limit: u32,
}

#[derive(Debug, Args)]
pub(crate) struct SimulateArgs {
    /// Observation log or trace; \"-\" is standard input.
    pub(crate) file: PathBuf,
    /// A setting of the policy, over those of --config.
    #[arg(long, value_name = "NAME=VALUE", value_parser = setting)]
    pub(crate) set: Vec<SettingArg>,
    /// Take the policy from a primary's configuration file.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// What the link takes, bytes a second; repeated with a time in front it changes.
    #[arg(long, value_name = "[START=]RATE", default_value = "100MiB")]
    pub(crate) link_rate: Vec<RateFrom>,
    /// Round trip of the link.
    #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = parse_duration)]
    pub(crate) rtt: Duration,
    /// Time without a link, as 10min+90s; may be repeated.
    #[arg(long, value_name = "START+LENGTH")]
    pub(crate) outage: Vec<Outage>,
    /// Noise of the link's rate, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub(crate) noise: u32,
    /// Seed of the noise.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Size of the journal.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_bytes)]
    pub(crate) capacity: u64,
    /// Bytes in flight to the backup.
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = parse_bytes)]
    pub(crate) window: u64,
    /// Block size of the volume: partial blocks travel whole.
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = parse_bytes)]
    pub(crate) block_size: u64,
    /// Rate of the writes of a trace without times, bytes a second.
    #[arg(long, value_name = "RATE", value_parser = parse_bytes)]
    pub(crate) trace_rate: Option<u64>,
    /// Draw the run by the policy: modes, span, age of the recovery point, rates.
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
}
