//! The command line.

mod failover;
mod policy;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use understudy_common::units::{parse_bytes, parse_duration};

pub(crate) use failover::{DemoteArgs, Loser, NodeArgs, NodeRole, PromoteArgs, ResolveArgs, SwitchoverArgs};
pub(crate) use policy::{DeltaCommand, ExplainArgs, ModeCommand, PolicyCommand, PolicySetArgs, SimulateArgs};

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
        after_help = "Examples:\n  understudy export data disk.img\n  understudy export data copy.img --from-backup\n  understudy export data@monday monday.img"
    )]
    Export(ExportArgs),
    /// Take, list, delete, restore, clone and compare snapshots.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Writable copies of the backup's image, to try a failover on: O(1), not replicated, gone with the backup's process.
    #[command(subcommand)]
    Clone(CloneCommand),
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
    /// Begin and abort runs of delta replication.
    #[command(subcommand)]
    Delta(DeltaCommand),
    /// Force delta mode, and release it.
    #[command(subcommand)]
    Mode(ModeCommand),
    /// When groups leave continuous mode and return: settings, reasons, simulation.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// What happened, and what happens, until Ctrl-C.
    #[command(after_help = "Examples:\n  understudy events\n  understudy --json events --after 120 --count 10")]
    Events(EventsArgs),
    /// Show what the data directory of a stopped node holds, without changing it; fails if it finds problems.
    #[command(
        after_help = "Examples:\n  understudy inspect /var/lib/understudy\n  understudy --json inspect /var/lib/understudy"
    )]
    Inspect(InspectArgs),
    /// Read back every stored block on both sides and compare it with its checksum; damaged blocks are repaired from the
    /// other side where that holds the same version. Fails if some stay damaged.
    #[command(
        after_help = "Examples:\n  understudy scrub\n  understudy scrub data\n  understudy --json scrub --status"
    )]
    Scrub(ScrubArgs),
    /// Compare both sides at one position, while writes go on; fails if blocks differ and were not repaired.
    #[command(
        after_help = "Examples:\n  understudy verify\n  understudy verify data --repair\n  understudy --json verify | jq .identical"
    )]
    Verify(VerifyArgs),
    /// Check the data directory of a stopped node, without changing it; fails if it finds problems.
    #[command(
        after_help = "Examples:\n  understudy fsck /var/lib/understudy\n  understudy --json fsck --data /var/lib/understudy"
    )]
    Fsck(FsckArgs),
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
    /// Make the backup the primary: the primary is gone for good, or for too long.
    #[command(
        after_help = "Examples:\n  understudy --backup http://127.0.0.1:7500 promote --generation 1\n  understudy promote --force\n  understudy promote --at monday --dry-run"
    )]
    Promote(PromoteArgs),
    /// Make a primary, running or stopped, a backup.
    #[command(
        after_help = "Examples:\n  understudy --primary http://127.0.0.1:7400 demote\n  understudy demote --dir /var/lib/understudy"
    )]
    Demote(DemoteArgs),
    /// Exchange the roles of a pair without loss, and say how long writes paused. Safe to repeat.
    #[command(
        after_help = "Example:\n  understudy --primary http://a:7400 --backup http://b:7400 switchover\n\nIf the backup does not catch up in time the primary goes on as before. If a later step fails, nobody serves until\nthe same command is run again."
    )]
    Switchover(SwitchoverArgs),
    /// After a loss or a split: see and export what a primary never shipped, or give it up.
    #[command(
        after_help = "Examples:\n  understudy resolve --list\n  understudy resolve --export lost.img --volume data\n  understudy --primary http://a:7400 resolve --discard primary"
    )]
    Resolve(ResolveArgs),
    /// Run the service that a data directory is for, and the other one after a change of role.
    #[command(
        after_help = "Example:\n  understudy node --data-dir /var/lib/understudy --role primary --peer http://b:7400 -- --listen 127.0.0.1:7400"
    )]
    Node(NodeArgs),
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
    /// Make a volume larger or, if only zeros are cut off, smaller.
    #[command(after_help = "Examples:\n  understudy volume resize data --size 128MiB\n  \
                            understudy volume resize data --size 16MiB --discard")]
    Resize {
        /// The volume.
        name: String,
        /// The new size.
        #[arg(long, value_parser = parse_bytes)]
        size: u64,
        /// Discard first what lies behind the new end.
        #[arg(long)]
        discard: bool,
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
    /// VOLUME or VOLUME@SNAPSHOT to read.
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

/// `TARGET@SNAPSHOT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    /// A volume or a group.
    pub(crate) target: String,
    /// Name of the snapshot.
    pub(crate) snapshot: String,
}

fn named(text: &str) -> Result<Named, String> {
    match text.split_once('@') {
        Some((target, snapshot)) if !target.is_empty() && !snapshot.is_empty() => {
            Ok(Named { target: target.to_owned(), snapshot: snapshot.to_owned() })
        }
        _ => Err("write TARGET@SNAPSHOT, as data@monday".to_owned()),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Take a snapshot of every volume of a group at one instant, on both sides.
    #[command(after_help = "Examples:
  understudy snapshot create data@monday
  understudy snapshot create data@clean --freeze /mnt/data
  understudy snapshot create db@nightly --before 'psql -c checkpoint' --after 'echo done'")]
    Create {
        /// A group, or a volume of it, and the name of the snapshot.
        #[arg(value_parser = named, value_name = "TARGET@SNAPSHOT")]
        snapshot: Named,
        /// Freeze the file system mounted here meanwhile (fsfreeze), so that it is clean in the snapshot.
        #[arg(long, value_name = "MOUNTPOINT")]
        freeze: Option<PathBuf>,
        /// Command of the shell to run before; if it fails nothing is taken.
        #[arg(long, value_name = "COMMAND")]
        before: Option<String>,
        /// Command of the shell to run afterwards, also when taking it has failed.
        #[arg(long, value_name = "COMMAND")]
        after: Option<String>,
    },
    /// List snapshots.
    #[command(after_help = "Examples:\n  understudy snapshot list\n  understudy snapshot list data --from-backup")]
    List {
        /// A group, or a volume of it [default: every group].
        group: Option<String>,
        /// Those that the backup holds.
        #[arg(long)]
        from_backup: bool,
    },
    /// Delete a snapshot, on both sides; the others stay as they are.
    #[command(after_help = "Example:\n  understudy snapshot delete data@monday")]
    Delete {
        /// A group, or a volume of it, and the name of the snapshot.
        #[arg(value_parser = named, value_name = "TARGET@SNAPSHOT")]
        snapshot: Named,
    },
    /// Make a volume what it was in a snapshot, by writing the blocks that differ. It is not served meanwhile.
    #[command(
        after_help = "Examples:\n  understudy snapshot restore data@monday\n  understudy snapshot restore db@nightly --group"
    )]
    Restore {
        /// A volume (with --group a group) and the name of the snapshot.
        #[arg(value_parser = named, value_name = "TARGET@SNAPSHOT")]
        snapshot: Named,
        /// Every volume of the group.
        #[arg(long)]
        group: bool,
    },
    /// Make a new volume with the content of a snapshot.
    #[command(after_help = "Example:\n  understudy snapshot clone data@monday data-test")]
    Clone {
        /// A volume and the name of the snapshot.
        #[arg(value_parser = named, value_name = "VOLUME@SNAPSHOT")]
        snapshot: Named,
        /// Name of the new volume.
        name: String,
        /// Group of the new volume [default: its own].
        #[arg(long, default_value = "")]
        group: String,
    },
    /// Show the ranges that differ between a snapshot and a newer one, or the volume as it is.
    #[command(
        after_help = "Examples:\n  understudy snapshot diff data@monday\n  understudy --json snapshot diff data@monday tuesday"
    )]
    Diff {
        /// A volume and the name of the older snapshot.
        #[arg(value_parser = named, value_name = "VOLUME@SNAPSHOT")]
        base: Named,
        /// Name of the newer snapshot [default: the volume as it is].
        target: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum CloneCommand {
    /// Make one, and serve it on the backup's listener as a volume.
    #[command(
        after_help = "Examples:\n  understudy --backup http://b:7500 clone create data try\n  understudy --backup http://b:7500 clone create data --snapshot monday try\n  understudy --primary http://b:7500 export try try.img"
    )]
    Create {
        /// A volume.
        volume: String,
        /// Name of the clone.
        name: String,
        /// Of this snapshot instead of the newest image.
        #[arg(long, value_name = "SNAPSHOT", default_value = "", hide_default_value = true)]
        snapshot: String,
    },
    /// List them.
    #[command(after_help = "Example:\n  understudy --backup http://b:7500 clone list")]
    List,
    /// Discard one, with all that was written to it.
    #[command(after_help = "Example:\n  understudy --backup http://b:7500 clone delete try")]
    Delete {
        /// Its name.
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Show the devices and their space, or where segments lie.
    #[command(
        after_help = "Examples:\n  understudy pool show\n  understudy pool show --on backup\n  understudy pool show --segments --volume data"
    )]
    Show {
        /// Whose pool.
        #[arg(long, value_enum, default_value = "primary")]
        on: PoolSide,
        /// One line for each segment of a volume: where it lies, and how many of its blocks are there.
        #[arg(long)]
        segments: bool,
        /// With --segments: of this volume only.
        #[arg(long, requires = "segments")]
        volume: Option<String>,
    },
    /// Add a file or a block device to the pool, while it is in use.
    #[command(
        after_help = "Examples:\n  understudy pool add /srv/pool-2 --size 64GiB\n  understudy pool add /dev/nvme1n1\n  understudy pool add /srv/pool-2 --on backup"
    )]
    Add {
        /// On the side's machine. Below /dev/ a block device, else a file, which is made.
        path: String,
        /// Allocated at once [default: a file grows up to pool.max, a block device is used whole].
        #[arg(long, value_parser = parse_bytes)]
        size: Option<u64>,
        /// Whose pool.
        #[arg(long, value_enum, default_value = "primary")]
        on: PoolSide,
    },
    /// Move everything off a device and take it out of the pool, while it is in use. May be interrupted, also by a restart
    /// of the service, and called again.
    #[command(
        after_help = "Examples:\n  understudy pool drain /srv/pool-1\n  understudy pool drain /srv/pool-1 --cancel"
    )]
    Drain {
        /// As `pool show` names it.
        path: String,
        /// Whose pool.
        #[arg(long, value_enum, default_value = "primary")]
        on: PoolSide,
        /// Use the device again; what was moved stays where it is.
        #[arg(long, conflicts_with = "no_wait")]
        cancel: bool,
        /// Return when the drain has begun; `pool show` tells how far it is.
        #[arg(long)]
        no_wait: bool,
    },
}

/// One of the pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PoolSide {
    /// The primary.
    Primary,
    /// The backup.
    Backup,
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
pub(crate) struct ScrubArgs {
    /// Volume to scrub [default: everything].
    pub(crate) volume: Option<String>,
    /// Begin none: show how it is doing.
    #[arg(long)]
    pub(crate) status: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Volume to compare [default: every volume].
    pub(crate) volume: Option<String>,
    /// Write blocks that differ once more, as the primary holds them.
    #[arg(long)]
    pub(crate) repair: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FsckArgs {
    /// The data directory.
    pub(crate) dir: PathBuf,
    /// Read every block and compare it with its checksum.
    #[arg(long)]
    pub(crate) data: bool,
    /// Directory of the journal [default: DIR/journal].
    #[arg(long, value_name = "DIR")]
    pub(crate) staging_path: Option<PathBuf>,
    /// A device of the pool, each in its order [default: where the last checkpoint says].
    #[arg(long, value_name = "PATH")]
    pub(crate) device: Vec<PathBuf>,
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
    /// Nine of ten in the first hundredth, the others anywhere.
    HotSpot,
    /// The nth block with a weight of about 1/n.
    Zipfian,
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
    /// Write the whole volume once before measuring, so that no write allocates.
    #[arg(long)]
    pub(crate) fill: bool,
    /// One RPC a write instead of one stream.
    #[arg(long)]
    pub(crate) unary: bool,
    /// Seed of offsets and data.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Keep what was written when, as an fio iolog that `policy simulate` reads.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
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
