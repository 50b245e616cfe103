//! The built command against a primary in memory.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code)]
#[path = "../../client/tests/support/mod.rs"]
mod support;

use std::path::Path;
use std::process::Output;

use serde_json::Value;
use support::Fake;

async fn understudy(fake: &Fake, args: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.args(["--retry-for", "0", "--primary", &fake.url()]).args(args);
    command.output().await.unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn imported_file_is_exported_again_to_the_byte() {
    let fake = Fake::start(3 << 20).await;
    let folder = tempfile::tempdir().unwrap();
    let (source, copy) = (folder.path().join("source"), folder.path().join("copy"));
    let mut image = vec![0; 3 << 20];
    image[5000..9000].fill(7);
    image[2_500_000..].fill(9);
    std::fs::write(&source, &image).unwrap();
    // The volume was there before: its old data must give way to the file's zeros, which the fake does not know.
    let refused = understudy(&fake, &["import", text(&source), "v"]).await;
    assert_eq!(refused.status.code(), Some(1));
    fake.state.lock().unwrap().image.copy_from_slice(&image);
    let exported = json(&understudy(&fake, &["--json", "export", "v", text(&copy)]).await);
    assert_eq!(exported["bytes"], 3 << 20);
    assert!(std::fs::read(&copy).unwrap() == image);
}

#[tokio::test]
async fn written_bytes_are_read_back() {
    let fake = Fake::start(1 << 20).await;
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    std::fs::write(&source, b"the understudy learns the part").unwrap();
    let written = understudy(&fake, &["--json", "write", "v", "--offset", "4KiB", "--file", text(&source)]).await;
    let written = json(&written);
    assert_eq!((&written["bytes"], &written["durability"]), (&Value::from(30), &Value::from("local")));
    let read = understudy(&fake, &["read", "v", "--offset", "4KiB", "--length", "14"]).await;
    assert_eq!(read.stdout, b"the understudy");
}

#[tokio::test]
async fn bench_reports_rate_and_latency() {
    let fake = Fake::start(1 << 20).await;
    for mode in [&["--in-flight", "16"][..], &["--in-flight", "4", "--unary", "--pattern", "random"]] {
        let args = [&["--json", "bench", "--volume", "v", "--seconds", "1"], mode].concat();
        let report = json(&understudy(&fake, &args).await);
        assert!(report["writes"].as_u64().unwrap() > 0, "{report}");
        assert!(report["latency_us"]["p99"].as_u64().unwrap() >= report["latency_us"]["p50"].as_u64().unwrap());
    }
}

#[tokio::test]
async fn errors_are_one_line_with_the_remedy() {
    let fake = Fake::start(4096).await;
    let missing = understudy(&fake, &["import", "/etc/hostname", "nothing"]).await;
    assert_eq!(missing.status.code(), Some(1));
    let message = String::from_utf8(missing.stderr).unwrap();
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.starts_with("error: ") && message.contains("--create"), "{message}");

    fake.link.down().await;
    let away = understudy(&fake, &["status"]).await;
    assert_eq!(away.status.code(), Some(1));
    let message = String::from_utf8(away.stderr).unwrap();
    assert!(message.contains("cannot reach") && message.contains("check that the service runs"), "{message}");

    for usage in
        [&["volume", "create", "v", "--size", "lots"][..], &["--json", "read", "v", "--offset", "0", "--length", "1"]]
    {
        assert_eq!(understudy(&fake, usage).await.status.code(), Some(2), "{usage:?}");
    }
}
