//! `mode`, `delta` and `policy` against a primary that only answers what operators ask.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::pin::Pin;
use std::process::Output;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use understudy_client::proto::replication_service_server::{ReplicationService, ReplicationServiceServer};
use understudy_client::proto::{self, *};

/// What was asked last.
#[derive(Debug, Default)]
struct Asked {
    mode: Option<SetModeRequest>,
    policy: Option<SetPolicyRequest>,
    explain: Option<ExplainRequest>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Asked>>);

fn policy(settings: &HashMap<String, String>) -> Policy {
    let mut all = HashMap::from([("policy.dwell".to_owned(), "30s".to_owned())]);
    all.extend(settings.clone());
    Policy { settings: all, changed: settings.keys().cloned().collect() }
}

#[tonic::async_trait]
impl ReplicationService for Fake {
    type WatchEventsStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<Event, Status>> + Send>>;

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<proto::Status>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn watch_events(&self, _: Request<WatchEventsRequest>) -> Result<Response<Self::WatchEventsStream>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    type VerifyStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<VerifyProgress, Status>> + Send>>;

    async fn verify(&self, request: Request<VerifyRequest>) -> Result<Response<Self::VerifyStream>, Status> {
        let VerifyRequest { volume, repair, .. } = request.into_inner();
        let difference = VerifyDifference {
            volume_id: 1,
            volume: "data".to_owned(),
            first_block: 7,
            block_count: 2,
            ..Default::default()
        };
        let progress = |finished| VerifyProgress {
            group: "data".to_owned(),
            position: Some(Position { generation: 1, lsn: 9 }),
            done_bytes: 4096,
            total_bytes: 8192,
            differences: if finished || volume == "same" { Vec::new() } else { vec![difference.clone()] },
            differing_blocks: if volume == "same" { 0 } else { 2 },
            repaired_blocks: if repair && finished { 2 } else { 0 },
            finished,
        };
        let told = [Ok(progress(false)), Ok(progress(true))];
        Ok(Response::new(Box::pin(tokio_stream::iter(told))))
    }

    async fn scrub(&self, request: Request<ScrubRequest>) -> Result<Response<ScrubResponse>, Status> {
        let ScrubRequest { start, volume, .. } = request.into_inner();
        let status = ScrubStatus { running: start, done_bytes: 3 << 20, damaged_blocks: 1, ..Default::default() };
        let damaged = DamagedBlock { volume_id: 1, block: 5, snapshot_only: true, snapshot_id: 3 };
        Ok(Response::new(ScrubResponse {
            primary: Some(status),
            backup_reason: "it is a test".to_owned(),
            primary_damaged: if volume == "bad" { vec![damaged] } else { Vec::new() },
            ..Default::default()
        }))
    }

    async fn start_delta(&self, request: Request<StartDeltaRequest>) -> Result<Response<StartDeltaResponse>, Status> {
        match request.into_inner().group {
            group if group == "data" => Ok(Response::new(StartDeltaResponse { group, dirty_bytes: 3 << 20 })),
            group => Err(Status::failed_precondition(format!("group {group} is in phase streaming"))),
        }
    }

    async fn abort_delta(&self, request: Request<AbortRunRequest>) -> Result<Response<AbortRunResponse>, Status> {
        let run = RunProgress { kind: "round".to_owned(), done_bytes: 1024, total_bytes: 4096, ..Default::default() };
        Ok(Response::new(AbortRunResponse { group: request.into_inner().group, run: Some(run) }))
    }

    async fn set_mode(&self, request: Request<SetModeRequest>) -> Result<Response<SetModeResponse>, Status> {
        let request = request.into_inner();
        self.0.lock().unwrap().mode = Some(request.clone());
        Ok(Response::new(SetModeResponse {
            group: request.group,
            mode: Mode::Delta.into(),
            phase: Phase::Tracking.into(),
            cause: "operator".to_owned(),
        }))
    }

    async fn set_policy(&self, request: Request<SetPolicyRequest>) -> Result<Response<Policy>, Status> {
        let request = request.into_inner();
        let answer = policy(&request.settings);
        self.0.lock().unwrap().policy = Some(request);
        Ok(Response::new(answer))
    }

    async fn get_policy(&self, _: Request<GetPolicyRequest>) -> Result<Response<Policy>, Status> {
        Ok(Response::new(policy(&HashMap::new())))
    }

    type GetUnshippedStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<Unshipped, Status>> + Send>>;

    async fn demote(&self, request: Request<DemoteRequest>) -> Result<Response<DemoteResponse>, Status> {
        match request.into_inner().drain {
            true => Err(Status::failed_precondition("data: not everything is on the backup")),
            false => Ok(Response::new(DemoteResponse { generation: 3, unshipped_bytes: 8192, ..Default::default() })),
        }
    }

    async fn renew_lease(&self, _: Request<RenewLeaseRequest>) -> Result<Response<RenewLeaseResponse>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }

    async fn resolve_split_brain(
        &self,
        _: Request<ResolveSplitBrainRequest>,
    ) -> Result<Response<ResolveSplitBrainResponse>, Status> {
        Ok(Response::new(ResolveSplitBrainResponse { generation: 3 }))
    }

    async fn get_unshipped(
        &self,
        request: Request<GetUnshippedRequest>,
    ) -> Result<Response<Self::GetUnshippedStream>, Status> {
        let with_data = request.into_inner().data;
        let range = |offset_bytes: u64, fill: u8| {
            let data = if with_data { vec![fill; 4096].into() } else { Default::default() };
            Ok(Unshipped { volume: "data".to_owned(), offset_bytes, length_bytes: 4096, data })
        };
        Ok(Response::new(Box::pin(tokio_stream::iter([range(8192, 1), range(65536, 2)]))))
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        self.0.lock().unwrap().explain = Some(request.into_inner());
        let reason = |rule: &str, value, threshold, unit: &str, verdict: &str| Reason {
            rule: rule.to_owned(),
            value,
            threshold,
            unit: unit.to_owned(),
            verdict: verdict.to_owned(),
        };
        let now = Decision {
            time_unix_ms: 1_763_914_732_123,
            action: "none".to_owned(),
            cause: "fill".to_owned(),
            because: vec![
                reason("headroom", Some(90 << 20), 45 << 20, "bytes_per_s", "holds"),
                reason("probe_round_trip", None, 1000, "ms", "holds"),
                reason("needs_full", Some(0), 1, "flag", "left"),
                reason("novelty", Some(7), 9, "parsecs", "holds"),
            ],
            alternative: "return".to_owned(),
            ..Default::default()
        };
        let past = Decision {
            action: "switch".to_owned(),
            because: vec![
                reason("fill", Some(950_000), 900_000, "millionths", "fires"),
                reason("ack_delay", Some(5), 5000, "ms", "quiet"),
            ],
            alternative: "stay".to_owned(),
            ..now.clone()
        };
        let group = GroupExplanation {
            group: "data".to_owned(),
            mode: Mode::Delta.into(),
            phase: Phase::Tracking.into(),
            cause: "fill".to_owned(),
            now: Some(now),
            decisions: vec![past],
        };
        Ok(Response::new(ExplainResponse { groups: vec![group] }))
    }
}

async fn start() -> (Fake, String) {
    let fake = Fake::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(ReplicationServiceServer::new(fake.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    (fake, url)
}

async fn understudy(url: &str, args: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.args(["--retry-for", "0", "--primary", url]).args(args).output().await.unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&text(output)).unwrap()
}

#[tokio::test]
async fn a_mode_is_forced_and_released() {
    let (fake, url) = start().await;
    let set = json(&understudy(&url, &["--json", "mode", "set", "data", "delta"]).await);
    assert_eq!((&set["mode"], &set["phase"], &set["cause"]), (&"delta".into(), &"tracking".into(), &"operator".into()));
    let asked = || fake.0.lock().unwrap().mode.clone().unwrap();
    assert_eq!((asked().group.as_str(), asked().mode()), ("data", Mode::Delta));
    let released = text(&understudy(&url, &["mode", "release", "data"]).await);
    assert_eq!(released, "data: delta (operator), tracking; it returns when its policy says so\n");
    assert_eq!(asked().mode(), Mode::Unspecified);
    let forced = understudy(&url, &["mode", "set", "data", "continuous"]).await;
    assert_eq!(forced.status.code(), Some(2));
}

#[tokio::test]
async fn runs_are_begun_and_aborted() {
    let (_, url) = start().await;
    assert_eq!(text(&understudy(&url, &["delta", "start", "data"]).await), "data: run begun with 3.0 MiB marked\n");
    let refused = understudy(&url, &["delta", "start", "other"]).await;
    assert_eq!(refused.status.code(), Some(1));
    let message = String::from_utf8(refused.stderr).unwrap();
    assert!(message.lines().count() == 1 && message.contains("phase streaming"), "{message}");
    let aborted = json(&understudy(&url, &["--json", "delta", "abort", "data"]).await);
    assert_eq!(aborted["run"]["done_bytes"], 1024);
}

#[tokio::test]
async fn a_policy_is_shown_changed_and_checked() {
    let (fake, url) = start().await;
    let shown = json(&understudy(&url, &["--json", "policy", "show"]).await);
    assert_eq!(shown["settings"]["policy.dwell"], "30s");
    let set = text(&understudy(&url, &["policy", "set", "--check", "fill_enter=0.8", "criteria=fill,link_down"]).await);
    let line = set.lines().find(|line| line.trim_start().starts_with("criteria")).unwrap();
    assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["criteria", "fill,link_down", "changed"]);
    let asked = fake.0.lock().unwrap().policy.clone().unwrap();
    assert!(asked.validate_only);
    assert_eq!((asked.settings["fill_enter"].as_str(), asked.settings["criteria"].as_str()), ("0.8", "fill,link_down"));
    for wrong in [&["policy", "set"][..], &["policy", "set", "fill_enter"]] {
        assert_eq!(understudy(&url, wrong).await.status.code(), Some(2));
    }
}

#[tokio::test]
async fn an_explanation_has_what_was_seen_and_what_it_was_compared_with() {
    let (fake, url) = start().await;
    let told = text(&understudy(&url, &["policy", "explain", "data", "--limit", "3"]).await);
    for part in [
        "data: delta (fill), tracking",
        "weighed 2025-11-23T16:18:52.123Z: nothing to do; otherwise: return",
        "90.0 MiB/s",
        "45.0 MiB/s",
        "switch for fill: fill 0.95 against 0.9 fires; otherwise: stay",
        "7 parsecs",
    ] {
        assert!(told.contains(part), "{part} is not in:\n{told}");
    }
    assert!(!told.contains("ack_delay"), "{told}");
    let asked = fake.0.lock().unwrap().explain.clone().unwrap();
    assert_eq!((asked.group.as_str(), asked.limit), ("data", 3));
    let told = json(&understudy(&url, &["--json", "policy", "explain"]).await);
    assert_eq!(told["groups"][0]["now"]["because"][0]["threshold"], 45 << 20);
    assert_eq!(told["groups"][0]["now"]["because"][1]["value"], Value::Null);
    assert_eq!(told["groups"][0]["decisions"][0]["action"], "switch");
}

#[tokio::test]
async fn a_scrub_is_begun_followed_and_fails_while_blocks_are_damaged() {
    let (_, url) = start().await;
    let done = json(&understudy(&url, &["--json", "scrub", "data"]).await);
    assert_eq!((&done["primary"]["running"], &done["primary"]["done_bytes"]), (&false.into(), &(3 << 20).into()));
    assert_eq!((&done["backup"], &done["backup_reason"]), (&Value::Null, &"it is a test".into()));
    let bad = understudy(&url, &["scrub", "bad"]).await;
    assert_eq!(bad.status.code(), Some(1));
    let shown = String::from_utf8(bad.stdout).unwrap();
    assert!(shown.contains("primary: block 5 of volume 1, seen by snapshots only"), "{shown}");
}

#[tokio::test]
async fn a_comparison_lists_what_differs_and_fails_unless_it_is_repaired() {
    let (_, url) = start().await;
    assert_eq!(text(&understudy(&url, &["verify", "same"]).await), "data: identical at 1:9\n");
    let differs = understudy(&url, &["verify"]).await;
    assert_eq!(differs.status.code(), Some(1));
    let shown = String::from_utf8(differs.stdout).unwrap();
    assert_eq!(shown, "data: 2 blocks differ, 0 repaired at 1:9\ndata: blocks 7..9 differ\n");
    let repaired = json(&understudy(&url, &["--json", "verify", "--repair"]).await);
    assert_eq!((&repaired["differing_blocks"], &repaired["repaired_blocks"]), (&2.into(), &2.into()));
}

#[tokio::test]
async fn what_was_never_shipped_is_listed_and_exported_and_a_primary_is_demoted() {
    let (_, url) = start().await;
    let listed = json(&understudy(&url, &["--json", "resolve", "--list"]).await);
    assert_eq!((&listed["bytes"], &listed["ranges"][1]["offset_bytes"]), (&8192.into(), &65536.into()));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lost.img");
    let export = ["resolve", "--export", file.to_str().unwrap(), "--volume", "data"];
    assert!(text(&understudy(&url, &export).await).starts_with("8.0 KiB written to "));
    let bytes = std::fs::read(&file).unwrap();
    assert_eq!((bytes.len(), bytes[8191], bytes[8192], bytes[65536]), (65536 + 4096, 0, 1, 2));
    assert_eq!(understudy(&url, &["resolve"]).await.status.code(), Some(2), "nothing was asked for");
    assert_eq!(understudy(&url, &export[..3]).await.status.code(), Some(2), "no volume");

    let demoted = json(&understudy(&url, &["--json", "demote"]).await);
    assert_eq!((&demoted["generation"], &demoted["unshipped_bytes"]), (&3.into(), &8192.into()));
    let refused = understudy(&url, &["demote", "--drain"]).await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8(refused.stderr).unwrap().contains("not everything is on the backup"));
    let absent = understudy(&url, &["demote", "--dir", folder.path().join("none").to_str().unwrap()]).await;
    assert!(String::from_utf8(absent.stderr).unwrap().contains("is no directory"));
}
