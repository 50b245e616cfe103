//! `health`: the standard health service of both sides.

use anyhow::{Result, bail};
use serde_json::{Map, json};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::args::{Global, HealthArgs, Side};
use crate::output::{one_line, print_json, print_line};

pub(crate) async fn run(global: &Global, args: HealthArgs) -> Result<()> {
    let sides = [(Side::Primary, "primary", global.primary.as_str()), (Side::Backup, "backup", global.backup_url())];
    let mut answers = Map::new();
    let mut bad = Vec::new();
    for (side, name, url) in sides {
        if args.side != Side::Both && args.side != side {
            continue;
        }
        let (state, reason) = check(global, url).await;
        if !global.json {
            let reason = if reason.is_empty() { String::new() } else { format!(": {reason}") };
            print_line(&format!("{name} {url} {state}{reason}"))?;
        }
        if state != "SERVING" {
            bad.push(name);
        }
        answers.insert(name.to_owned(), json!({"url": url, "state": state, "reason": reason}));
    }
    if global.json {
        print_json(&answers.into())?;
    }
    if !bad.is_empty() {
        bail!("{} not serving; start it, see its log, or give its address by --primary or --backup", bad.join(" and "));
    }
    Ok(())
}

async fn check(global: &Global, url: &str) -> (&'static str, String) {
    let client = match global.client(url) {
        Ok(client) => client,
        Err(error) => return ("UNKNOWN", one_line(&format!("{error:#}"))),
    };
    let mut health = HealthClient::new(client.channel());
    let asked = health.check(HealthCheckRequest { service: String::new() });
    let limit = global.retry_for.max(std::time::Duration::from_secs(1));
    match tokio::time::timeout(limit, asked).await {
        Ok(Ok(answer)) => (answer.into_inner().status().as_str_name(), String::new()),
        Ok(Err(status)) => {
            let error: &dyn std::error::Error = &status;
            let cause = std::iter::successors(Some(error), |e| (*e).source()).last();
            ("UNREACHABLE", one_line(&cause.map_or_else(String::new, ToString::to_string)))
        }
        Err(_) => (ServingStatus::Unknown.as_str_name(), format!("no answer within {limit:.1?}")),
    }
}
