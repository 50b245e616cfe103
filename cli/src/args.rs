//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use understudy_common::units::{parse_bytes, parse_duration};

/// Wrong usage that only shows once the arguments are seen together.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// Understudy: a live copy of block volumes on a second machine.
#[derive(Debug, Parser)]
#[command(
    name = "understudy",
    version,
    propagate_version = true,
    after_help = "Examples:\n  understudy demo\n  understudy volume create data --size 1GiB\n  understudy import disk.img data --create\n  understudy --json status"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Print JSON for machines.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// URL of the primary.
    #[arg(
        long,
        global = true,
        env = "UNDERSTUDY_PRIMARY",
        default_value = "http://127.0.0.1:7400",
        value_name = "URL"
    )]
    pub(crate) primary: String,
    /// URL of the backup [default: http://127.0.0.1:7500].
    #[arg(long, global = true, env = "UNDERSTUDY_BACKUP", value_name = "URL")]
    pub(crate) backup: Option<String>,
    /// How long a request is repeated while its service is away.
    #[arg(long, global = true, default_value = "3s", value_parser = parse_duration, value_name = "TIME")]
    pub(crate) retry_for: Duration,
    /// PEM file of the authority that signed the services' certificates, for https URLs.
    #[arg(long, global = true, env = "UNDERSTUDY_TLS_CA", value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// PEM file of this client's certificate.
    #[arg(long, global = true, env = "UNDERSTUDY_TLS_CERT", value_name = "FILE")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// PEM file of the key of that certificate.
    #[arg(long, global = true, env = "UNDERSTUDY_TLS_KEY", value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create, list, show, grow and delete volumes.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Write a file into a volume; zero regions are skipped.
    #[command(after_help = "Example:\n  understudy import disk.img data --create --ack both")]
    Import(ImportArgs),
    /// Write a volume into a sparse file.
    #[command(
        after_help = "Examples:\n  understudy export data disk.img\n  understudy export data copy.img --from-backup"
    )]
    Export(ExportArgs),
    /// Write bytes at an offset.
    #[command(after_help = "Example:\n  echo hello | understudy write data --offset 4KiB --file -")]
    Write(WriteArgs),
    /// Read bytes from an offset, to standard output or a file.
    #[command(after_help = "Example:\n  understudy read data --offset 4KiB --length 16 | xxd")]
    Read(ReadArgs),
    /// The pool's devices and space.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// How the pair is doing.
    #[command(after_help = "Examples:\n  understudy status --watch\n  understudy --json status | jq .link.state")]
    Status(StatusArgs),
    /// What happened, and what happens, until Ctrl-C.
    #[command(after_help = "Examples:\n  understudy events\n  understudy --json events --after 120 --count 10")]
    Events(EventsArgs),
    /// Show what the data directory of a stopped node holds, without changing it; fails if it finds problems.
    #[command(
        after_help = "Examples:\n  understudy inspect /var/lib/understudy\n  understudy --json inspect /var/lib/understudy"
    )]
    Inspect(InspectArgs),
    /// Ask both services whether they serve; fails if one does not.
    #[command(after_help = "Example:\n  understudy health --side primary")]
    Health(HealthArgs),
    /// Measure a running pair.
    #[command(
        after_help = "Examples:\n  understudy bench --in-flight 256 --seconds 30\n  understudy --backup http://127.0.0.1:7500 bench --block 64KiB --pattern random"
    )]
    Bench(BenchArgs),
    /// Show a pair at work on this machine: copy a real image, freeze and kill each side, compare.
    #[command(
        after_help = "Examples:\n  understudy demo\n  understudy --json demo --size 256MiB\n  understudy demo --image disk.img --keep"
    )]
    Demo(DemoArgs),
    /// Print the completions of a shell.
    #[command(after_help = "Example:\n  understudy completions bash > /etc/bash_completion.d/understudy")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Ack {
    /// Durable in the primary's journal.
    Staged,
    /// As staged, and written in its place on the primary.
    Primary,
    /// Durable on the primary and on the backup.
    Both,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Away {
    /// Go on without the backup.
    Degrade,
    /// Refuse and hold writes.
    Block,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume.
    #[command(after_help = "Example:\n  understudy volume create data --size 64MiB --ack both --away block")]
    Create {
        /// 1 to 63 of a-z, 0-9, '-', '_' and '.'.
        name: String,
        /// A multiple of the block size.
        #[arg(long, value_parser = parse_bytes)]
        size: u64,
        /// 512B to 64KiB, a power of two.
        #[arg(long, value_parser = parse_bytes, default_value = "4KiB")]
        block_size: u64,
        /// When writes are acknowledged.
        #[arg(long, value_enum, default_value = "staged")]
        ack: Ack,
        /// What a volume with --ack both does while the backup is away.
        #[arg(long, value_enum, default_value = "degrade")]
        away: Away,
        /// Group to switch, cut and promote with [default: its own].
        #[arg(long, default_value = "")]
        group: String,
    },
    /// List all volumes.
    #[command(after_help = "Example:\n  understudy volume list")]
    List,
    /// Show one volume.
    #[command(after_help = "Example:\n  understudy volume show data")]
    Show {
        /// The volume.
        name: String,
    },
    /// Grow a volume.
    #[command(after_help = "Example:\n  understudy volume resize data --size 128MiB")]
    Resize {
        /// The volume.
        name: String,
        /// The new size.
        #[arg(long, value_parser = parse_bytes)]
        size: u64,
    },
    /// Delete a volume with its data, on both sides.
    #[command(after_help = "Example:\n  understudy volume delete data")]
    Delete {
        /// The volume.
        name: String,
    },
    /// Change when writes are acknowledged, from the next write on.
    #[command(after_help = "Example:\n  understudy volume set-ack data both --away block")]
    SetAck {
        /// The volume.
        name: String,
        /// The rule.
        #[arg(value_enum)]
        ack: Ack,
        /// What a volume with the rule "both" does while the backup is away [default: as it is].
        #[arg(long, value_enum)]
        away: Option<Away>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// File or block device to read.
    pub(crate) file: PathBuf,
    /// Volume to write.
    pub(crate) volume: String,
    /// Create the volume if it is missing, as large as the file.
    #[arg(long)]
    pub(crate) create: bool,
    /// Block size of a volume created here.
    #[arg(long, value_parser = parse_bytes, default_value = "4KiB")]
    pub(crate) block_size: u64,
    /// Ack rule of a volume created here.
    #[arg(long, value_enum, default_value = "staged")]
    pub(crate) ack: Ack,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Volume to read.
    pub(crate) volume: String,
    /// File to write; it is replaced.
    pub(crate) file: PathBuf,
    /// Read the backup's consistent image instead of the primary's head.
    #[arg(long)]
    pub(crate) from_backup: bool,
}

#[derive(Debug, Args)]
pub(crate) struct WriteArgs {
    /// Volume to write.
    pub(crate) volume: String,
    /// Where to start.
    #[arg(long, value_parser = parse_bytes)]
    pub(crate) offset: u64,
    /// File with the bytes; "-" is standard input.
    #[arg(long)]
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ReadArgs {
    /// Volume to read.
    pub(crate) volume: String,
    /// Where to start.
    #[arg(long, value_parser = parse_bytes)]
    pub(crate) offset: u64,
    /// How much.
    #[arg(long, value_parser = parse_bytes)]
    pub(crate) length: u64,
    /// File to write; "-" is standard output. With --json a file must be named.
    #[arg(long, default_value = "-")]
    pub(crate) file: PathBuf,
    /// Read the backup's consistent image instead of the primary's head.
    #[arg(long)]
    pub(crate) from_backup: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Show the devices and their space.
    #[command(after_help = "Example:\n  understudy pool show")]
    Show,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Print it again and again, until Ctrl-C.
    #[arg(long)]
    pub(crate) watch: bool,
    /// Time between two prints.
    #[arg(long, value_parser = parse_duration, default_value = "1s")]
    pub(crate) interval: Duration,
    /// Ask the backup instead of the primary.
    #[arg(long)]
    pub(crate) from_backup: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Begin behind this event; 0 begins with the present state.
    #[arg(long, default_value_t = 0)]
    pub(crate) after: u64,
    /// End after so many events.
    #[arg(long)]
    pub(crate) count: Option<u64>,
    /// Ask the backup instead of the primary.
    #[arg(long)]
    pub(crate) from_backup: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Side {
    /// The primary.
    Primary,
    /// The backup.
    Backup,
    /// Both.
    Both,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The data directory.
    pub(crate) dir: PathBuf,
    /// Directory of the journal [default: DIR/journal].
    #[arg(long, value_name = "DIR")]
    pub(crate) staging_path: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct HealthArgs {
    /// Whom to ask.
    #[arg(long, value_enum, default_value = "both")]
    pub(crate) side: Side,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pattern {
    /// Ascending, again from the start at the end.
    Sequential,
    /// Any block.
    Random,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Order of the offsets.
    #[arg(long, value_enum, default_value = "sequential")]
    pub(crate) pattern: Pattern,
    /// Bytes of one write.
    #[arg(long, value_parser = parse_bytes, default_value = "4KiB")]
    pub(crate) block: u64,
    /// Writes in flight, 1 to 1024.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) in_flight: u16,
    /// How long to write.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) seconds: u64,
    /// Volume to write, which overwrites its data; made when missing, then deleted at the end.
    #[arg(long, default_value = "bench")]
    pub(crate) volume: String,
    /// Size of a volume made here.
    #[arg(long, value_parser = parse_bytes, default_value = "1GiB")]
    pub(crate) size: u64,
    /// Ack rule of a volume made here.
    #[arg(long, value_enum, default_value = "staged")]
    pub(crate) ack: Ack,
    /// Keep a volume made here.
    #[arg(long)]
    pub(crate) keep: bool,
    /// One RPC a write instead of one stream.
    #[arg(long)]
    pub(crate) unary: bool,
    /// Seed of offsets and data.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Copy this image instead of one made on the spot.
    #[arg(long)]
    pub(crate) image: Option<PathBuf>,
    /// Size of the image made on the spot.
    #[arg(long, value_parser = parse_bytes, default_value = "64MiB", conflicts_with = "image")]
    pub(crate) size: u64,
    /// Keep the folder with images, logs and data.
    #[arg(long)]
    pub(crate) keep: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_an_example() {
        fn check(command: &clap::Command) {
            if command.get_subcommands().next().is_none() {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("understudy "), "{} has no example", command.get_name());
            }
            command.get_subcommands().filter(|c| c.get_name() != "help").for_each(check);
        }
        let command = Cli::command();
        command.clone().debug_assert();
        check(&command);
    }

    #[test]
    fn sizes_and_times_are_read_with_units() {
        let cli =
            Cli::try_parse_from(["understudy", "volume", "create", "v", "--size", "64MiB", "--retry-for", "500ms"]);
        let cli = cli.unwrap();
        assert_eq!(cli.global.retry_for, Duration::from_millis(500));
        assert!(matches!(cli.command, Command::Volume(VolumeCommand::Create { size: 67_108_864, .. })));
        assert!(Cli::try_parse_from(["understudy", "volume", "create", "v", "--size", "64 parsecs"]).is_err());
    }
}
