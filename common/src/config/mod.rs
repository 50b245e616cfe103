//! Settings of the services: one declarative table, from which flags, variables, the file, help and checks come.
//!
//! `[link] timeout` of the file is `--link-timeout` and `UNDERSTUDY_LINK_TIMEOUT`; a flag beats a variable, a variable
//! the file, the file the default. Every error is reported at once, with its place, its value and its remedy, before
//! anything is opened. Behind [`start`] every value is valid.

mod checks;
mod command;
mod load;
mod setting;
mod table;
#[cfg(test)]
mod tests;
mod typed;

use std::ffi::OsString;

pub use command::command;
pub use load::{Effective, Loaded, Problem, Source, load};
pub use setting::{Fault, Kind, Preset, Setting, Value};
pub use table::{policy_settings, settings};
pub use typed::{
    BackupConfig, BackupPeerConfig, CheckpointConfig, ClonesConfig, DeltaConfig, DeviceSetting, FromSettings,
    LimitsConfig, LinkConfig, LogConfig, PoolConfig, PrimaryConfig, ReplicaConfig, ScrubConfig, ShutdownConfig,
    SnapshotsConfig, StagingConfig, Throttle, TlsConfig,
};

/// In front of every variable.
pub const VARIABLE_PREFIX: &str = "UNDERSTUDY_";

/// Exit code of a bad configuration.
pub const EXIT_CONFIG: u8 = 64;

/// Variables with our prefix that are no settings: `--config`, and those of the operator's command.
const FOREIGN_VARIABLES: [&str; 3] = ["UNDERSTUDY_CONFIG", "UNDERSTUDY_PRIMARY", "UNDERSTUDY_BACKUP"];

/// Whose settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// `understudy-primary`.
    Primary,
    /// `understudy-backup`.
    Backup,
}

impl Service {
    /// Name of the program.
    #[must_use]
    pub fn binary(self) -> &'static str {
        match self {
            Self::Primary => "understudy-primary",
            Self::Backup => "understudy-backup",
        }
    }

    /// Name of the role.
    #[must_use]
    pub fn role(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        }
    }

    fn about(self) -> &'static str {
        match self {
            Self::Primary => "Serves block volumes and streams every write to the backup",
            Self::Backup => "Keeps a live, consistent copy of the primary's volumes",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Primary => Self::Backup,
            Self::Backup => Self::Primary,
        }
    }
}

/// What to do after the settings were read.
#[derive(Debug)]
pub enum Start<C> {
    /// Go on.
    Run {
        /// Every value is valid.
        config: Box<C>,
        /// For the log.
        warnings: Vec<Problem>,
    },
    /// Print and exit.
    Exit {
        /// 0 or [`EXIT_CONFIG`].
        code: u8,
        /// For standard output.
        output: String,
        /// For standard error.
        errors: String,
    },
}

/// Reads the settings of a service from its arguments (the first is the program) and variables.
pub fn start<C: FromSettings>(
    arguments: impl IntoIterator<Item = OsString>,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Start<C> {
    let loaded = match load(C::SERVICE, arguments, variables) {
        Ok(loaded) => loaded,
        Err(message) if message.use_stderr() => {
            return Start::Exit { code: EXIT_CONFIG, output: String::new(), errors: message.to_string() };
        }
        Err(help) => return Start::Exit { code: 0, output: help.to_string(), errors: String::new() },
    };
    if !loaded.check && loaded.problems.is_empty() {
        let config = Box::new(C::from_settings(&loaded.effective));
        return Start::Run { config, warnings: loaded.warnings };
    }
    let code = if loaded.problems.is_empty() { 0 } else { EXIT_CONFIG };
    let output = if loaded.check { loaded.effective.to_toml() } else { String::new() };
    let mut errors = String::new();
    for warning in &loaded.warnings {
        errors.push_str(&format!("warning: {warning}\n"));
    }
    for problem in &loaded.problems {
        errors.push_str(&format!("error: {problem}\n"));
    }
    if code != 0 {
        let count = loaded.problems.len();
        errors.push_str(&format!("{count} error{} in the configuration\n", if count == 1 { "" } else { "s" }));
    }
    Start::Exit { code, output, errors }
}

impl Effective {
    /// A TOML file of these settings, each with its source in a comment; those that are off are comments.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut section = None;
        // Keys outside of sections come first: below a header they would belong to it.
        let (bare, sectioned): (Vec<&Setting>, Vec<&Setting>) =
            self.settings.iter().partition(|s| s.section().is_none());
        for setting in bare.into_iter().chain(sectioned) {
            if setting.section() != section {
                section = setting.section();
                text.push_str(&format!("\n[{}]\n", setting.section().unwrap_or_default()));
            }
            match self.value(setting.path) {
                Some((value, source)) => {
                    let source = match source {
                        Source::Flag => format!("flag --{}", setting.flag()),
                        Source::Variable => format!("variable {}", setting.variable()),
                        Source::File(file) => format!("file {}", file.display()),
                        Source::Default => "default".to_owned(),
                    };
                    text.push_str(&format!("{} = {value} # {source}\n", setting.key()));
                }
                None => text.push_str(&format!("# {} is not set\n", setting.key())),
            }
        }
        text
    }
}
