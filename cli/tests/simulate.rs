//! `policy simulate`: the built command on files, without a service.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use understudy_common::policy::simulate::log::LogLine;
use understudy_common::policy::simulate::{LinkModel, PairModel, Pattern, Scenario, Shaped, Strategy, simulate};
use understudy_common::policy::{GroupPolicy, PolicyConfig};

fn understudy(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_understudy")).args(["policy", "simulate"]).args(args).output().unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Ten minutes: two of 20 MiB/s, which is twice what the link takes, then next to nothing.
fn fio(version: u32) -> String {
    let mut text = format!("fio version {version} iolog\n");
    for n in 0..2400_u64 {
        let (at, offset) = (n * 50_000, n % 300 * (1 << 20));
        if version == 3 {
            let _ = write!(text, "{at} ");
        }
        let _ = writeln!(text, "/dev/x write {offset} {}", 1 << 20);
    }
    if version == 3 {
        let _ = writeln!(text, "600000000 /dev/x write 0 4096");
    }
    text
}

#[test]
fn a_trace_is_compared_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let (trace, plot) = (folder.path().join("fio.log"), folder.path().join("run.svg"));
    std::fs::write(&trace, fio(3)).unwrap();
    let link = ["--link-rate", "10MiB", "--rtt", "20ms", "--capacity", "256MiB", "--block-size", "64KiB"];
    let args = [&["--json", name(&trace), "--plot", name(&plot)], &link[..]].concat();
    let told = json(&understudy(&args));
    let bytes = |pointer: &str| told.pointer(pointer).and_then(Value::as_u64).unwrap();
    assert_eq!(bytes("/written_bytes"), (2400 << 20) + (64 << 10));
    assert_eq!(bytes("/continuous/wire_bytes"), bytes("/written_bytes"));
    assert!(bytes("/continuous/overflow_ms") > 0);
    assert_eq!((bytes("/adaptive/overflow_ms"), bytes("/delta/overflow_ms")), (0, 0));
    assert!(bytes("/adaptive/departures") >= 1 && bytes("/adaptive/wire_bytes") <= bytes("/continuous/wire_bytes"));
    assert!((300 << 20..=bytes("/adaptive/wire_bytes")).contains(&bytes("/optimum_bytes")));
    assert!(std::fs::read_to_string(&plot).unwrap().starts_with("<svg "));

    let table = understudy(&[&[name(&trace)], &link[..]].concat());
    let text = String::from_utf8(table.stdout).unwrap();
    for part in ["2.3 GiB written", "continuous", "optimum", "ON THE WIRE", "streaming -> ", "switch ("] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    // Another policy, another outcome.
    let never = json(&understudy(&[&["--json", name(&trace), "--set", "criteria=none"], &link[..]].concat()));
    assert_eq!(never.pointer("/adaptive/departures"), Some(&0.into()));
    // An outage is a reason of its own.
    let cut = [&["--json", name(&trace), "--outage", "5min+30s", "--set", "criteria=link_down"], &link[..]].concat();
    let cut = json(&understudy(&cut));
    assert_eq!(cut.pointer("/adaptive/departures"), Some(&1.into()));
}

#[test]
fn a_trace_without_times_needs_a_rate() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("fio.log");
    std::fs::write(&trace, fio(2)).unwrap();
    let refused = understudy(&[name(&trace)]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--trace-rate 50MiB"));
    let told = json(&understudy(&["--json", name(&trace), "--trace-rate", "20MiB", "--link-rate", "10MiB"]));
    assert_eq!(told["written_bytes"], 2400_u64 << 20);
}

#[test]
fn an_observation_log_is_replayed_to_the_live_decisions() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("observations.jsonl");
    let workload = Shaped {
        length_ms: 600_000,
        block_bytes: 1 << 20,
        shape: Box::new(|at| if at < 60_000 { 200 << 20 } else { 10 << 20 }),
        noise_permille: 100,
        pattern: Pattern::Uniform(5000),
        seed: 1,
    };
    let policy = PolicyConfig::default();
    let scenario = Scenario {
        workload: &workload,
        link: LinkModel::steady(100 << 20, 20),
        pair: PairModel::default(),
        policy: policy.clone(),
    };
    let mut lines = vec![
        LogLine::Policy { policy: Box::new(policy) },
        LogLine::State { group: "data".to_owned(), state: Box::new(GroupPolicy::new()) },
    ];
    simulate(&scenario, Strategy::Adaptive, |tick| {
        let Some((obs, decision)) = tick.weighed else { return };
        lines.push(LogLine::Observation { group: "data".to_owned(), observation: Box::new(obs.clone()) });
        lines.push(LogLine::Decision { group: "data".to_owned(), decision: Box::new(decision.clone()) });
    });
    let text =
        |lines: &[LogLine]| lines.iter().map(|line| serde_json::to_string(line).unwrap() + "\n").collect::<String>();
    std::fs::write(&path, text(&lines)).unwrap();
    let plot = folder.path().join("log.svg");
    let told = json(&understudy(&["--json", name(&path), "--plot", name(&plot)]));
    assert_eq!((&told["groups"]["data"]["different"], &told["other_policy"]), (&0.into(), &false.into()));
    assert!(told["groups"]["data"]["compared"].as_u64().unwrap() > 1000);
    assert!(told["groups"]["data"]["actions"][0]["why"].as_str().unwrap().contains("switch (imbalance)"));
    assert!(std::fs::read_to_string(&plot).unwrap().contains("span of the journal"));
    // By another policy it only tells.
    let other = json(&understudy(&["--json", name(&path), "--set", "fill_enter=0.2", "--set", "fill_leave=0.1"]));
    assert!(other["groups"]["data"]["different"].as_u64().unwrap() > 0 && other["other_policy"] == true);
    // A log that was tampered with does not pass.
    let LogLine::Decision { decision, .. } = &mut lines[3] else { panic!("a decision follows each observation") };
    decision.alternative.push('!');
    std::fs::write(&path, text(&lines)).unwrap();
    let tampered = understudy(&[name(&path)]);
    assert_eq!(tampered.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&tampered.stderr).contains("1 decisions are not those"));
    assert!(String::from_utf8_lossy(&tampered.stdout).contains("first in line 4"));
}

#[test]
fn a_policy_comes_from_a_configuration_file() {
    let folder = tempfile::tempdir().unwrap();
    let (trace, config) = (folder.path().join("fio.log"), folder.path().join("primary.toml"));
    std::fs::write(&trace, fio(3)).unwrap();
    std::fs::write(&config, "data_dir = '/d'\n[policy]\ncriteria = ['link_down']\n").unwrap();
    let told = json(&understudy(&["--json", name(&trace), "--config", name(&config), "--link-rate", "10MiB"]));
    assert_eq!(told["policy"]["policy.criteria"], "link_down");
    assert_eq!(told.pointer("/adaptive/departures"), Some(&0.into()));
    std::fs::write(&config, "data_dir = '/d'\n[policy]\nfill_leave = 0.95\ndwell = '0s'\n").unwrap();
    let refused = understudy(&[name(&trace), "--config", name(&config)]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    assert!(message.contains("policy.fill_leave") && message.contains("2 problems"), "{message}");
}

#[test]
fn wrong_usage_is_told_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("fio.log");
    std::fs::write(&trace, fio(3)).unwrap();
    let trace = name(&trace);
    for (args, code, part) in [
        (&[trace, "--set", "fill_entre=1"][..], 2, "use one of"),
        (&[trace, "--set", "dwell=0"], 2, "policy.dwell"),
        (&[trace, "--outage", "5s"], 2, "START+LENGTH"),
        (&[trace, "--block-size", "3KiB"], 2, "power of two"),
        (&["/nowhere"], 1, "cannot open"),
        (&["/dev/null"], 1, "is no trace"),
    ] {
        let refused = understudy(args);
        let message = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(code), "{message}");
        assert!(message.contains(part), "{part} is not in {message}");
    }
}
