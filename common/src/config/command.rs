//! The command line, built from the table of settings.

use clap::{Arg, ArgAction, Command};

use super::{
    Service, VARIABLE_PREFIX, load,
    setting::{Kind, Preset, Setting},
    table::settings,
};

pub(super) const CONFIG: &str = "config";
pub(super) const CHECK: &str = "check-config";

/// The command line of `service`.
#[must_use]
pub fn command(service: Service) -> Command {
    let mut command = Command::new(service.binary())
        .version(env!("CARGO_PKG_VERSION"))
        .about(service.about())
        .after_help(examples(service))
        .arg(Arg::new(CONFIG).long(CONFIG).value_name("FILE").help(format!(
            "TOML file with settings. Precedence: flag, variable, file, default [variable: {VARIABLE_PREFIX}CONFIG]"
        )))
        .arg(
            Arg::new(CHECK)
                .long(CHECK)
                .action(ArgAction::SetTrue)
                .help("Print the settings in force with the source of each, and every error; exit with 0 or 64"),
        );
    for setting in settings(service) {
        command = command.arg(argument(&setting));
    }
    command
}

fn argument(setting: &Setting) -> Arg {
    let heading = setting.section().map_or_else(|| "Settings".to_owned(), |section| format!("Settings of [{section}]"));
    let action = if load::repeats(setting.kind) { ArgAction::Append } else { ArgAction::Set };
    let arg = Arg::new(setting.path)
        .long(setting.flag())
        .value_name(setting.kind.value_name())
        .help(help(setting))
        .help_heading(heading)
        .hide_possible_values(true)
        .action(action);
    match setting.kind {
        Kind::Bool => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
        _ => arg,
    }
}

fn help(setting: &Setting) -> String {
    let default = match setting.preset {
        Preset::Required => "required".to_owned(),
        Preset::Unset => "not set".to_owned(),
        Preset::Is(text) => format!("default {text}"),
        Preset::InDataDir(name) => format!("default data_dir/{name}"),
    };
    format!("{}; {} [{default}] [variable: {}]", setting.help, setting.kind.range(), setting.variable())
}

fn examples(service: Service) -> String {
    let binary = service.binary();
    let peer = match service {
        Service::Primary => "--backup-url http://127.0.0.1:7500",
        Service::Backup => "--listen 127.0.0.1:7500",
    };
    format!(
        "Examples:
  {binary} --data-dir /var/lib/understudy {peer}
  {binary} --config /etc/understudy.toml --log-format json
  {VARIABLE_PREFIX}LINK_TIMEOUT=5s {binary} --config /etc/understudy.toml --check-config

Each setting is a key of the file, a flag and a variable by one rule:
  [link] timeout = \"2s\"   --link-timeout 2s   {VARIABLE_PREFIX}LINK_TIMEOUT=2s

Exit codes: 0 ok, 64 bad configuration or wrong role, 70 internal error, 74 storage I/O error,
75 role changed, start again"
    )
}
