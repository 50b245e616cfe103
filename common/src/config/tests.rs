use std::{ffi::OsString, fs, time::Duration};

use super::{BackupConfig, PrimaryConfig, Service, Start, Throttle, Value, load, setting::Preset, settings, start};
use crate::policy::{Cause, Criteria, PolicyConfig, Schedule};

fn words<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn variables<const N: usize>(pairs: [(&str, &str); N]) -> Vec<(OsString, OsString)> {
    pairs.iter().map(|(name, value)| (name.into(), value.into())).collect()
}

fn refused<C: super::FromSettings>(arguments: Vec<OsString>, variables: Vec<(OsString, OsString)>) -> String {
    match start::<C>(arguments, variables) {
        Start::Exit { code: 64, errors, .. } => errors,
        Start::Exit { code, output, .. } => panic!("exit {code}: {output}"),
        Start::Run { .. } => panic!("accepted"),
    }
}

#[test]
fn every_default_is_in_its_range_and_every_path_is_unique() {
    for service in [Service::Primary, Service::Backup] {
        let table = settings(service);
        for (index, setting) in table.iter().enumerate() {
            assert!(table[..index].iter().all(|other| other.path != setting.path), "{} twice", setting.path);
            if let Preset::Is(text) = setting.preset {
                assert!(setting.kind.parse(text).is_ok(), "{}: {text}", setting.path);
            }
        }
        super::command(service).debug_assert();
    }
}

#[test]
fn data_dir_alone_is_enough() {
    let Start::Run { config, warnings } = start::<PrimaryConfig>(words(["p", "--data-dir", "/d"]), []) else {
        panic!("refused")
    };
    assert!(warnings.is_empty());
    assert_eq!(config.listen.to_string(), "127.0.0.1:7400");
    assert_eq!(config.staging.path.to_str(), Some("/d/journal"));
    assert_eq!(config.staging.capacity_bytes, 1 << 30);
    assert_eq!(config.link.timeout, Duration::from_secs(2));
    assert_eq!(config.backup.url, None);
    let Start::Run { config, .. } = start::<BackupConfig>(words(["b", "--data-dir=/d"]), []) else { panic!("refused") };
    assert_eq!(config.admin_listen.to_string(), "127.0.0.1:7501");
    assert_eq!(config.replica.listen, None);
}

#[test]
fn a_flag_beats_a_variable_beats_the_file_beats_the_default() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("u.toml");
    fs::write(&file, "data_dir = '/file'\n[link]\ntimeout = '3s'\nheartbeat = '300ms'\nwindow = 1048576\n").unwrap();
    let file = file.to_str().unwrap();
    let arguments = words(["p", "--config", file, "--link-timeout", "5s"]);
    let variables = variables([("UNDERSTUDY_LINK_TIMEOUT", "4s"), ("UNDERSTUDY_LINK_HEARTBEAT", "400ms")]);
    let loaded = load(Service::Primary, arguments.clone(), variables.clone()).unwrap();
    assert_eq!(loaded.problems, []);
    let value = |path| loaded.effective.value(path).unwrap().0.clone();
    assert_eq!(value("link.timeout"), Value::Duration(Duration::from_secs(5)));
    assert_eq!(value("link.heartbeat"), Value::Duration(Duration::from_millis(400)));
    assert_eq!(value("link.window"), Value::Bytes(1 << 20));
    assert_eq!(value("limits.connections"), Value::Integer(64));

    let mut check = arguments;
    check.push("--check-config".into());
    let Start::Exit { code: 0, output, errors } = start::<PrimaryConfig>(check, variables) else { panic!("not 0") };
    assert_eq!(errors, "");
    for line in [
        "timeout = \"5s\" # flag --link-timeout".to_owned(),
        "heartbeat = \"400ms\" # variable UNDERSTUDY_LINK_HEARTBEAT".to_owned(),
        format!("data_dir = \"/file\" # file {file}"),
        "connections = 64 # default".to_owned(),
        "# url is not set".to_owned(),
    ] {
        assert!(output.lines().any(|found| found == line), "{line} is not in:\n{output}");
    }
    // What it prints is a file it reads.
    let printed = folder.path().join("printed.toml");
    fs::write(&printed, output).unwrap();
    let again = load(Service::Primary, words(["p", "--config", printed.to_str().unwrap()]), []).unwrap();
    assert_eq!(again.problems, []);
}

#[test]
fn every_error_is_named_with_place_value_and_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("u.toml");
    fs::write(&file, "[link]\ntimout = '2s'\nheartbeat = 500\n[limits]\nconnections = 'many'\n[colour]\nred = true\n")
        .unwrap();
    let place = file.display().to_string();
    let arguments = words(["p", "--config", &place, "--staging-capacity", "1KiB", "--listen", "0.0.0.0:1"]);
    let variables = variables([
        ("UNDERSTUDY_BACKUP_URL", "ftp://x:1"),
        ("UNDERSTUDY_LINK_TIMEUOT", "1s"),
        ("UNDERSTUDY_PRIMARY_SERVICE_HOST", "10.0.0.1"),
    ]);
    let errors = refused::<PrimaryConfig>(arguments, variables);
    for part in [
        "error: data_dir: is required and not set; set --data-dir, UNDERSTUDY_DATA_DIR",
        &format!("error: {place}:link.timout = \"2s\": no such setting; did you mean `link.timeout`?"),
        &format!("error: {place}:link.heartbeat = 500: is a time without a unit; write a time from 10ms"),
        &format!("error: {place}:limits.connections = \"many\": has the wrong type, string; write a whole number"),
        &format!("error: {place}:colour.red = true: no such setting"),
        "error: --staging-capacity = 1KiB: is not allowed; write a size from 4MiB",
        "error: --listen = \"0.0.0.0:1\": would be served without TLS",
        "tls.allow_plaintext = true",
        "error: UNDERSTUDY_BACKUP_URL = ftp://x:1: starts with neither",
        "error: UNDERSTUDY_LINK_TIMEUOT = 1s: no such setting; did you mean UNDERSTUDY_LINK_TIMEOUT?",
        "warning: UNDERSTUDY_PRIMARY_SERVICE_HOST",
        "9 errors in the configuration",
    ] {
        assert!(errors.contains(part), "{part}\nis not in:\n{errors}");
    }
}

#[test]
fn a_refused_data_dir_is_not_also_called_missing() {
    let errors = refused::<BackupConfig>(words(["b", "--data-dir", ""]), vec![]);
    assert!(errors.contains("--data-dir = : is empty"), "{errors}");
    assert!(errors.contains("1 error in"), "{errors}");
}

#[test]
fn rules_between_settings_hold() {
    let base = ["b", "--data-dir", "/d"];
    for (more, part) in [
        (["--link-timeout", "600ms"], "twice link.heartbeat"),
        (["--tls-client-ca", "/nowhere"], "needs TLS"),
        (["--tls-certificate", "/nowhere"], "cannot be read"),
        (["--replica-listen", "[::]:9"], "without TLS"),
        (["--pool-segment", "96KiB"], "power of two"),
        (["--pool-devices", "/a,/b,/a=1GiB"], "names /a twice"),
        (["--pool-devices", "/a=lots"], "not PATH or PATH=SIZE"),
        (["--limits-in-flight", "2MiB"], "could never be admitted"),
        (["--log-format", "xml"], "one of human, json"),
        (["--log-level", "h2=loud"], "is not understood"),
    ] {
        let arguments = base.iter().chain(&more).map(OsString::from).collect();
        let errors = refused::<BackupConfig>(arguments, vec![]);
        assert!(errors.contains(part), "{part}\nis not in:\n{errors}");
    }
}

#[test]
fn plaintext_is_served_everywhere_when_it_was_asked_for() {
    let arguments = words(["b", "--data-dir", "/d", "--listen", "0.0.0.0:1", "--tls-allow-plaintext"]);
    assert!(matches!(start::<BackupConfig>(arguments, []), Start::Run { .. }));
}

#[test]
fn devices_come_one_by_one_or_with_commas() {
    let arguments = words(["b", "--data-dir", "/d", "--pool-devices", "/a=1MiB", "--pool-devices", "/b,/c"]);
    let Start::Run { config, .. } = start::<BackupConfig>(arguments, []) else { panic!("refused") };
    let found: Vec<_> = config.pool.devices.iter().map(|d| (d.path.to_str().unwrap(), d.size_bytes)).collect();
    assert_eq!(found, [("/a", Some(1 << 20)), ("/b", None), ("/c", None)]);
}

#[test]
fn an_unknown_flag_and_help_have_their_exit_codes() {
    let errors = refused::<PrimaryConfig>(words(["p", "--link-timout", "1s"]), vec![]);
    assert!(errors.contains("--link-timeout"), "{errors}");
    let Start::Exit { code: 0, output, .. } = start::<PrimaryConfig>(words(["p", "--help"]), []) else {
        panic!("help is no error")
    };
    for part in ["Examples:", "UNDERSTUDY_LINK_TIMEOUT", "default 2s", "Settings of [link]"] {
        assert!(output.contains(part), "{part}\nis not in:\n{output}");
    }
}

#[test]
fn contradictions_of_the_policy_are_all_named() {
    let arguments = words([
        "p",
        "--data-dir=/d",
        "--policy-fill-leave=0.95",
        "--policy-dwell=0s",
        "--policy-criteria=fill,weather",
        "--delta-throttle=soon",
        "--link-ack-delay-leave=6s",
    ]);
    let errors = refused::<PrimaryConfig>(arguments, vec![]);
    for part in [
        "--policy-fill-leave = 0.95: is 0.95, not below policy.fill_enter, 0.9",
        "--policy-dwell = \"0s\": is zero",
        "--policy-criteria = [\"fill\", \"weather\"]: names weather, which is no criterion; use none, or some of operator",
        "--delta-throttle = \"soon\": is not understood",
        "--link-ack-delay-leave = \"6s\": is 6s, not below link.ack_delay_max, 5s",
        "5 errors in the configuration",
    ] {
        assert!(errors.contains(part), "{part}\nis not in:\n{errors}");
    }
}

#[test]
fn the_policy_and_its_surroundings_are_read() {
    let arguments = words([
        "p",
        "--data-dir=/d",
        "--policy-criteria=fill,link_down",
        "--link-throttle=5MiB",
        "--delta-throttle=none",
        "--policy-observation-log=0",
        "--delta-schedule=idle",
    ]);
    let Start::Run { config, .. } = start::<PrimaryConfig>(arguments, []) else { panic!("refused") };
    assert_eq!(config.policy.criteria, Criteria::of(&[Cause::Fill, Cause::LinkDown]));
    assert_eq!((config.policy.schedule, config.policy.stream_bytes_per_second), (Schedule::Idle, 5 << 20));
    assert_eq!((config.link.throttle_bytes_per_s, config.delta.throttle), (Some(5 << 20), Throttle::Unlimited));
    assert_eq!(config.observation_log_bytes, 0);
    assert_eq!(Throttle::parse("50MiB"), Ok(Throttle::BytesPerSecond(50 << 20)));
    let Start::Run { config, .. } = start::<PrimaryConfig>(words(["p", "--data-dir=/d"]), []) else {
        panic!("refused")
    };
    assert_eq!(config.policy, PolicyConfig::default());
    assert_eq!((config.link.throttle_bytes_per_s, config.delta.throttle), (None, Throttle::Adaptive));
}
