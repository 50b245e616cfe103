use std::collections::BTreeMap;

use super::*;
use crate::config::policy_settings;

fn changed<const N: usize>(changes: [(&str, &str); N]) -> Result<PolicyConfig, PolicyProblems> {
    let changes = changes.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
    PolicyConfig::default().with(&changes)
}

#[test]
fn every_setting_is_in_the_table_and_is_read_as_it_is_written() {
    let config = PolicyConfig::default();
    assert_eq!(config.validate(), []);
    let texts = config.texts();
    let paths: Vec<&str> = policy_settings().iter().map(|setting| setting.path).collect();
    assert_eq!(texts.len(), paths.len());
    assert!(paths.iter().all(|path| texts.contains_key(*path)));
    assert_eq!(config.with(&texts).unwrap(), config);
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<PolicyConfig>(&json).unwrap(), config);
    assert!(json.contains(r#""policy.fill_enter":"0.9""#), "{json}");
}

#[test]
fn a_setting_is_changed_by_its_bare_name_or_its_path() {
    let config = changed([("fill_enter", "0.8"), ("link.settle", "10s"), ("delta.schedule", "idle")]).unwrap();
    assert_eq!(config.fill_enter, Ratio::from_millionths(800_000));
    assert_eq!((config.link_settle, config.schedule), (seconds(10), Schedule::Idle));
    let config = changed([("criteria", "fill, link_down")]).unwrap();
    assert_eq!(config.criteria, Criteria::of(&[Cause::Fill, Cause::LinkDown]));
    assert_eq!(changed([("criteria", "none")]).unwrap().criteria, Criteria::NONE);
}

#[test]
fn every_mistake_is_named_at_once() {
    let problems = changed([
        ("fill_entre", "0.8"),
        ("dwell", "soon"),
        ("criteria", "fill,weather"),
        ("fill_leave", "0.95"),
        ("redundancy_ratio", "1"),
    ])
    .unwrap_err();
    let settings: Vec<&str> = problems.0.iter().map(|problem| problem.setting.as_str()).collect();
    assert_eq!(
        settings,
        ["policy.criteria", "policy.dwell", "fill_entre", "policy.fill_leave", "policy.redundancy_ratio"]
    );
    assert!(problems.0.iter().all(|problem| !problem.remedy.is_empty()));
}

#[test]
fn contradictions_are_refused_with_setting_and_remedy() {
    for (changes, setting) in [
        (vec![("fill_leave", "0.9")], "policy.fill_leave"),
        (vec![("link.ack_delay_leave", "5s")], "link.ack_delay_leave"),
        (vec![("dwell", "0")], "policy.dwell"),
        (vec![("dwell", "0"), ("dwell_max", "0")], "policy.dwell"),
        (vec![("dwell", "20min")], "policy.dwell_max"),
        (vec![("overflow_horizon", "0")], "policy.overflow_horizon"),
        (vec![("overflow_horizon", "1s")], "policy.weigh_interval"),
        (vec![("redundancy_ratio", "0.5")], "policy.redundancy_ratio"),
        (vec![("redundancy_min_interval", "0")], "policy.redundancy_min_interval"),
        (vec![("delta.interval", "0")], "delta.interval"),
        (vec![("delta.schedule", "idle"), ("delta.idle_for", "0")], "delta.schedule"),
    ] {
        let texts: BTreeMap<String, String> = changes.iter().map(|(n, t)| ((*n).into(), (*t).into())).collect();
        let problems = PolicyConfig::default().with(&texts).unwrap_err();
        assert_eq!(problems.0.len(), 1, "{problems}");
        assert_eq!(problems.0[0].setting, setting);
    }
    // What is switched off contradicts nothing.
    changed([("criteria", "link_down"), ("fill_leave", "0.95"), ("redundancy_ratio", "1"), ("overflow_horizon", "0")])
        .unwrap();
    changed([("overflow_horizon", "0"), ("imbalance_bytes_per_second", "1MiB")]).unwrap();
}

#[test]
fn times_are_short_for_people() {
    for (ms, text) in [
        (0, "0s"),
        (20, "20ms"),
        (2050, "2.05s"),
        (10_000, "10s"),
        (73_200, "73.2s"),
        (599_999, "599.999s"),
        (1_800_400, "30min"),
        (7_261_000, "7261s"),
    ] {
        assert_eq!(crate::policy::config::ms_text(ms), text);
    }
}
