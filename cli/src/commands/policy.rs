//! `policy show`, `policy set` and `policy explain`.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};
use understudy_client::proto::{
    Decision, ExplainRequest, GetPolicyRequest, GroupExplanation, Policy, Reason, SetPolicyRequest,
};
use understudy_common::policy::{Unit, Verdict};
use understudy_proto::json::decision;

use crate::args::{ExplainArgs, Global, PolicyCommand, PolicySetArgs};
use crate::commands::simulate;
use crate::convert;
use crate::output::{print_json, print_line, table, time};

pub(crate) async fn run(global: &Global, command: PolicyCommand) -> Result<()> {
    match command {
        PolicyCommand::Show => {
            let policy = global.primary_client()?.replication().policy(GetPolicyRequest {}).await?;
            show(global, &policy)
        }
        PolicyCommand::Set(args) => set(global, args).await,
        PolicyCommand::Explain(args) => explain(global, args).await,
        PolicyCommand::Simulate(args) => simulate::run(global, &args),
    }
}

async fn set(global: &Global, PolicySetArgs { settings, check }: PolicySetArgs) -> Result<()> {
    let request = SetPolicyRequest { settings: settings.into_iter().collect(), validate_only: check };
    let policy = global.primary_client()?.replication().set_policy(request).await?;
    show(global, &policy)
}

fn show(global: &Global, policy: &Policy) -> Result<()> {
    let settings: BTreeMap<&String, &String> = policy.settings.iter().collect();
    if global.json {
        return print_json(&json!({"settings": settings, "changed": policy.changed}));
    }
    let row = |(name, text): (&String, &String)| {
        let changed = if policy.changed.contains(name) { "changed" } else { "" };
        [name.clone(), text.clone(), changed.to_owned()]
    };
    print_line(&table(["SETTING", "VALUE", ""], settings.into_iter().map(row)))
}

async fn explain(global: &Global, ExplainArgs { group, limit }: ExplainArgs) -> Result<()> {
    let request = ExplainRequest { group: group.unwrap_or_default(), limit };
    let answer = global.primary_client()?.replication().explain(request).await?;
    if global.json {
        let groups: Vec<Value> = answer.groups.iter().map(group_json).collect();
        return print_json(&json!({"groups": groups}));
    }
    answer.groups.iter().try_for_each(|group| print_line(&group_text(group)))
}

fn group_json(group: &GroupExplanation) -> Value {
    json!({
        "group": group.group,
        "mode": convert::mode(group.mode()),
        "phase": convert::phase(group.phase()),
        "cause": group.cause,
        "now": group.now.as_ref().map(decision),
        "decisions": group.decisions.iter().map(decision).collect::<Vec<_>>(),
    })
}

fn group_text(group: &GroupExplanation) -> String {
    let cause = if group.cause.is_empty() { String::new() } else { format!(" ({})", group.cause) };
    let mut lines =
        vec![format!("{}: {}{cause}, {}", group.group, convert::mode(group.mode()), convert::phase(group.phase()))];
    if let Some(now) = &group.now {
        lines.push(format!("weighed {}: {}; otherwise: {}", time(now.time_unix_ms), action(now), now.alternative));
        lines.push(table(["RULE", "SEEN", "THRESHOLD", "VERDICT"], now.because.iter().map(rule)));
    }
    for past in &group.decisions {
        // Of an old decision only what decided it.
        let decisive = |reason: &&Reason| Verdict::from_word(&reason.verdict).is_none_or(Verdict::is_decisive);
        let why = past.because.iter().filter(decisive);
        let why: Vec<String> = why.map(short).collect();
        lines.push(format!(
            "{} {}: {}; otherwise: {}",
            time(past.time_unix_ms),
            action(past),
            why.join(", "),
            past.alternative
        ));
    }
    lines.join("\n")
}

fn action(decision: &Decision) -> String {
    match decision.action.as_str() {
        "none" => "nothing to do".to_owned(),
        "start_run" => format!("start {} run", decision.run_kind),
        other => format!("{other} for {}", decision.cause),
    }
}

fn rule(reason: &Reason) -> [String; 4] {
    let text = |amount| amount_text(&reason.unit, amount);
    [
        reason.rule.clone(),
        reason.value.map_or_else(|| "-".to_owned(), text),
        if reason.unit == "flag" { String::new() } else { text(reason.threshold) },
        reason.verdict.clone(),
    ]
}

fn short(reason: &Reason) -> String {
    let [rule, seen, threshold, verdict] = rule(reason);
    let against = if threshold.is_empty() { String::new() } else { format!(" against {threshold}") };
    format!("{rule} {seen}{against} {verdict}")
}

/// A unit of a newer service is shown as it is named.
fn amount_text(unit: &str, amount: u64) -> String {
    Unit::from_word(unit).map_or_else(|| format!("{amount} {unit}"), |unit| unit.text(amount))
}
