//! Arguments of the changes of role.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use understudy_common::units::parse_duration;

#[derive(Debug, Args)]
pub(crate) struct PromoteArgs {
    /// Refuse unless the backup is at this generation: nobody else has promoted since you looked.
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub(crate) generation: u64,
    /// Although the primary is attached or holds a lease, a group has no image, or the pair splits. Says what is lost.
    #[arg(long)]
    pub(crate) force: bool,
    /// Go back to this snapshot, which every group must have, instead of the newest image. The volumes are served when
    /// they are what they were in it.
    #[arg(long, value_name = "SNAPSHOT")]
    pub(crate) at: Option<String>,
    /// Only say what would become of each group, and what would be lost. Whether the primary is gone is not asked.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoteArgs {
    /// The data directory of a stopped primary, instead of a running one.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["drain", "timeout"])]
    pub(crate) dir: Option<PathBuf>,
    /// Only once the backup holds everything; writes are refused until then.
    #[arg(long)]
    pub(crate) drain: bool,
    /// How long to wait for that; then the primary goes on as before.
    #[arg(long, value_parser = parse_duration, default_value = "30s")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct SwitchoverArgs {
    /// How long the backup may take to catch up; then the primary goes on as before.
    #[arg(long, value_parser = parse_duration, default_value = "30s")]
    pub(crate) timeout: Duration,
}

/// A side by what it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Loser {
    /// The service at --primary.
    Primary,
    /// The service at --backup.
    Backup,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).multiple(false)))]
pub(crate) struct ResolveArgs {
    /// List by volume and range what the primary has acknowledged and its backup never did.
    #[arg(long, group = "what")]
    pub(crate) list: bool,
    /// Write that of one volume into a sparse file, each range at its offset.
    #[arg(long, group = "what", value_name = "FILE", requires = "volume")]
    pub(crate) export: Option<PathBuf>,
    /// Give up the changes of this side: it becomes a backup and gets everything from the other.
    #[arg(long, group = "what", value_enum, value_name = "SIDE")]
    pub(crate) discard: Option<Loser>,
    /// The volume to list or export.
    #[arg(long)]
    pub(crate) volume: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NodeRole {
    /// Serves writes.
    Primary,
    /// Holds the copy.
    Backup,
}

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// The node's data directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
    /// What an empty directory becomes; afterwards the directory says it.
    #[arg(long, value_enum, default_value = "backup")]
    pub(crate) role: NodeRole,
    /// Where the other node is: the [backup] url while this one is the primary.
    #[arg(long, value_name = "URL")]
    pub(crate) peer: Option<String>,
    /// Configuration file while this node is the primary.
    #[arg(long, value_name = "FILE")]
    pub(crate) primary_config: Option<PathBuf>,
    /// Configuration file while this node is the backup.
    #[arg(long, value_name = "FILE")]
    pub(crate) backup_config: Option<PathBuf>,
    /// Directory of the services' binaries [default: that of this one].
    #[arg(long, value_name = "DIR")]
    pub(crate) bin_dir: Option<PathBuf>,
    /// Settings of both services, as flags.
    #[arg(last = true)]
    pub(crate) settings: Vec<OsString>,
}
