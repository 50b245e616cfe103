//! `mode` and `delta`: what an operator says about the mode of a group and its runs.

use anyhow::Result;
use serde_json::{Value, json};
use understudy_client::proto::{AbortRunRequest, Mode, SetModeRequest, SetModeResponse, StartDeltaRequest};
use understudy_proto::json::run_progress;

use crate::args::{DeltaCommand, Global, ModeCommand};
use crate::convert;
use crate::output::{print_json, print_line, size};

pub(crate) async fn run(global: &Global, command: ModeCommand) -> Result<()> {
    // The only mode that can be forced.
    let (group, mode) = match command {
        ModeCommand::Set { group, mode: _ } => (group, Mode::Delta),
        ModeCommand::Release { group } => (group, Mode::Unspecified),
    };
    let set = global.primary_client()?.replication().set_mode(SetModeRequest { group, mode: mode.into() }).await?;
    if global.json {
        return print_json(&mode_json(&set));
    }
    let next = match (mode, set.mode()) {
        (Mode::Delta, Mode::Continuous) => "; the switch comes with the next weighing",
        (Mode::Unspecified, Mode::Delta) => "; it returns when its policy says so",
        _ => "",
    };
    print_line(&format!("{}{next}", mode_text(&set)))
}

fn mode_json(set: &SetModeResponse) -> Value {
    json!({
        "group": set.group,
        "mode": convert::mode(set.mode()),
        "phase": convert::phase(set.phase()),
        "cause": set.cause,
    })
}

fn mode_text(set: &SetModeResponse) -> String {
    let cause = if set.cause.is_empty() { String::new() } else { format!(" ({})", set.cause) };
    format!("{}: {}{cause}, {}", set.group, convert::mode(set.mode()), convert::phase(set.phase()))
}

pub(crate) async fn delta(global: &Global, command: DeltaCommand) -> Result<()> {
    let replication = global.primary_client()?.replication();
    let (json, text) = match command {
        DeltaCommand::Start { group } => {
            let started = replication.start_delta(StartDeltaRequest { group }).await?;
            let text = format!("{}: run begun with {} marked", started.group, size(started.dirty_bytes));
            (json!({"group": started.group, "dirty_bytes": started.dirty_bytes}), text)
        }
        DeltaCommand::Abort { group } => {
            let aborted = replication.abort_delta(AbortRunRequest { group }).await?;
            let far = aborted.run.as_ref().map_or_else(String::new, |run| {
                format!(" after {} of {}", size(run.done_bytes), size(run.total_bytes))
            });
            let text = format!("{}: run aborted{far}; its marks stay", aborted.group);
            (json!({"group": aborted.group, "run": aborted.run.as_ref().map(run_progress)}), text)
        }
    };
    if global.json { print_json(&json) } else { print_line(&text) }
}
