//! `policy simulate`: offline.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use understudy_common::config::{Service, load};
use understudy_common::policy::simulate::plot::{Samples, svg};
use understudy_common::policy::simulate::trace::{self, TraceError};
use understudy_common::policy::simulate::{
    Comparison, LinkModel, Outcome, PairModel, Scenario, TraceWorkload, compare, log,
};
use understudy_common::policy::{PolicyConfig, ms_text};

use crate::args::{Global, SimulateArgs, Usage};
use crate::commands::volume::block_bytes;
use crate::output::{print_json, print_line, size, table};

/// Transitions of a table; JSON has all.
const TRANSITIONS_SHOWN: usize = 20;

pub(crate) fn run(global: &Global, args: &SimulateArgs) -> Result<()> {
    let policy = policy(args)?;
    let named = || format!("cannot simulate {}", args.file.display());
    let mut file = open(&args.file)?;
    if is_log(&mut file).with_context(named)? {
        let other = (!args.set.is_empty() || args.config.is_some()).then_some(&policy);
        return replay(global, args, file, other).with_context(named);
    }
    let trace = trace::parse(file, args.trace_rate.filter(|rate| *rate > 0)).map_err(|error| match error {
        TraceError::NoRate => Usage(format!("{} {error}", args.file.display())).into(),
        error => anyhow::Error::new(error).context(named()),
    })?;
    // Any power of two that a volume may have.
    let block = u64::from(block_bytes(args.block_size)?);
    if !block.is_power_of_two() || !(512..=65_536).contains(&block) {
        return Err(Usage("--block-size must be a power of two from 512B to 64KiB".to_owned()).into());
    }
    let (devices, discards) = (trace.devices, trace.discards);
    let workload = TraceWorkload { trace, block_bytes: block };
    let pair = PairModel { capacity_bytes: args.capacity, window_bytes: args.window, ..PairModel::default() };
    let link = LinkModel::new(args.link_rate.clone(), args.rtt, args.outage.clone(), args.noise * 10, args.seed);
    let scenario = Scenario { workload: &workload, link, pair, policy };
    let mut samples = Samples::new();
    let comparison = compare(&scenario, &mut samples);
    plot(args, &samples, args.capacity)?;
    if global.json {
        let mut json = serde_json::to_value(&comparison)?;
        for (name, outcome) in
            [("continuous", &comparison.continuous), ("delta", &comparison.delta), ("adaptive", &comparison.adaptive)]
        {
            json[name]["wire_bytes"] = json!(outcome.wire_bytes());
            json[name]["continuous_ms"] = json!(outcome.continuous_ms());
            json[name]["delta_ms"] = json!(outcome.delta_ms());
        }
        json["link"] = serde_json::to_value(&scenario.link)?;
        json["pair"] = serde_json::to_value(scenario.pair)?;
        json["policy"] = serde_json::to_value(&scenario.policy)?;
        json["discards_left_out"] = json!(discards);
        return print_json(&json);
    }
    print_line(&format!(
        "{} written to {devices} device{} in blocks of {}{}",
        size(comparison.written_bytes),
        if devices == 1 { "" } else { "s" },
        size(block),
        if discards > 0 { format!(", {discards} discards left out") } else { String::new() }
    ))?;
    print_line(&text(&comparison))
}

/// The defaults, then the file of `--config`, then `--set`.
fn policy(args: &SimulateArgs) -> Result<PolicyConfig> {
    let mut policy = PolicyConfig::default();
    if let Some(file) = &args.config {
        // A directory has to be named, and none is opened.
        let words = [OsString::from("simulate"), "--data-dir".into(), ".".into(), "--config".into(), file.into()];
        let loaded = load(Service::Primary, words, [])?;
        if let Some(problem) = loaded.problems.first() {
            bail!("{problem} ({} problems in all; --check-config of the primary shows them)", loaded.problems.len());
        }
        policy = PolicyConfig::from_values(|path| loaded.effective.value(path).map(|(value, _)| value.clone()));
    }
    let changes: BTreeMap<String, String> = args.set.iter().cloned().collect();
    policy.with(&changes).map_err(|problems| Usage(problems.to_string()).into())
}

fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    if path == Path::new("-") {
        return Ok(Box::new(BufReader::new(std::io::stdin())));
    }
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(Box::new(BufReader::new(file)))
}

/// A log is JSON, no trace is. Looks without taking.
fn is_log(file: &mut impl BufRead) -> std::io::Result<bool> {
    Ok(file.fill_buf()?.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{'))
}

fn replay(global: &Global, args: &SimulateArgs, file: impl BufRead, other: Option<&PolicyConfig>) -> Result<()> {
    let mut samples = Samples::new();
    let mut capacity = 0;
    let found = log::replay(file, other, |obs| {
        capacity = obs.capacity_bytes;
        samples.on_observation(obs);
    })?;
    plot(args, &samples, capacity)?;
    let different: u64 = found.groups.values().map(|group| group.different).sum();
    if global.json {
        print_json(&serde_json::to_value(&found)?)?;
    } else {
        for (name, group) in &found.groups {
            let phases = group.phase_ms.iter().map(|(phase, ms)| format!("{phase} {}", ms_text(*ms)));
            print_line(&format!(
                "{name}: {} observations, {} transitions, span up to {}; {}",
                group.observations,
                group.transitions,
                size(group.span_bytes_max),
                phases.collect::<Vec<_>>().join(", ")
            ))?;
            print_line(&format!("{name}: {} decisions compared, {} different", group.compared, group.different))?;
            if let Some(first) = &group.first_difference {
                print_line(&format!("{name}: first in line {}: live {:#}", first.line, first.live))?;
                print_line(&format!("{name}: replayed {:#}", first.replayed))?;
            }
            for acted in group.actions.iter().take(TRANSITIONS_SHOWN) {
                print_line(&format!("{name} at {}: {}", ms_text(acted.now_ms), acted.why))?;
            }
        }
    }
    if different > 0 && !found.other_policy {
        bail!(
            "{different} decisions are not those that were made live; was the log cut, or written by another version?"
        );
    }
    Ok(())
}

fn plot(args: &SimulateArgs, samples: &Samples, capacity: u64) -> Result<()> {
    let Some(path) = &args.plot else { return Ok(()) };
    let title = args.file.file_name().unwrap_or(args.file.as_os_str()).to_string_lossy();
    std::fs::write(path, svg(&title, samples, capacity)).with_context(|| format!("cannot write {}", path.display()))
}

fn text(comparison: &Comparison) -> String {
    let Comparison { continuous, delta, adaptive, optimum_bytes, .. } = comparison;
    let mut rows: Vec<[String; 10]> =
        [("continuous", continuous), ("delta", delta), ("adaptive", adaptive)].map(|(n, o)| row(n, o)).to_vec();
    let mut optimum: [String; 10] = std::array::from_fn(|_| "-".to_owned());
    optimum[0] = "optimum".to_owned();
    optimum[6] = format!("<= {}", ms_text(adaptive.age_ms_max));
    optimum[9] = size(*optimum_bytes);
    rows.push(optimum);
    let header = [
        "STRATEGY",
        "CONTINUOUS",
        "DELTA",
        "LEFT",
        "RETURNED",
        "RUNS",
        "AGE MAX",
        "SPAN MAX",
        "OVERFLOW",
        "ON THE WIRE",
    ];
    let mut lines = vec![table(header, rows)];
    for transition in adaptive.transitions.iter().take(TRANSITIONS_SHOWN) {
        let why = if transition.why.is_empty() { "the final round committed" } else { &transition.why };
        lines.push(format!("{} {} -> {}: {why}", ms_text(transition.at_ms), transition.from, transition.to));
    }
    let more = adaptive.transitions.len().saturating_sub(TRANSITIONS_SHOWN);
    if more > 0 {
        lines.push(format!("and {more} more; --json has all"));
    }
    lines.join("\n")
}

fn row(name: &str, outcome: &Outcome) -> [String; 10] {
    let overflow = if outcome.overflow_ms == 0 { "no".to_owned() } else { ms_text(outcome.overflow_ms) };
    let age = ms_text(outcome.age_ms_max);
    [
        name.to_owned(),
        ms_text(outcome.continuous_ms()),
        ms_text(outcome.delta_ms()),
        outcome.departures.to_string(),
        outcome.returns.to_string(),
        outcome.runs.to_string(),
        // It was still growing when the simulation gave up.
        if outcome.complete { age } else { format!("> {age}") },
        size(outcome.span_bytes_max),
        overflow,
        size(outcome.wire_bytes()),
    ]
}
