//! From settings to a served engine, and back down: build, serve, drain.

use std::{future::Future, process::ExitCode, sync::Arc};

use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use understudy_common::{
    admin::{AdminPort, Readiness},
    config::PrimaryConfig,
    process::{self, Exit, Failure},
    serve::{self, BindError, Protocol, ServeLimits},
    telemetry::{Metrics, Telemetry, write_ready_file},
    tls::{self, ServerTls},
};
use understudy_proto::json;

use crate::{api::BlockEngine, services};

/// The whole program: settings, log, lock, [`run`], exit code.
pub fn main<E: BlockEngine, F: Future<Output = Result<E, Failure>>>(
    open: impl FnOnce(PrimaryConfig, Metrics) -> F,
) -> ExitCode {
    process::run(|config, shutdown| run(config, shutdown, open))
}

/// Serves until `shutdown` or a failure of the engine. `open` recovers the engine; until it returns, the admin port
/// answers and says that the service is not ready.
pub async fn run<E: BlockEngine, F: Future<Output = Result<E, Failure>>>(
    config: PrimaryConfig,
    shutdown: CancellationToken,
    open: impl FnOnce(PrimaryConfig, Metrics) -> F,
) -> Result<(), Failure> {
    let telemetry = Telemetry::new("primary");
    let metrics = Metrics::new(&telemetry);
    let readiness = Readiness::new("recovering");
    let tls = listener_tls(&config)?;
    if let Some(expiry) = tls.as_ref().and_then(|tls| tls.expiry) {
        metrics.set_certificate_expiry(expiry);
    }
    let listener = serve::bind(config.listen).await.map_err(bad_address)?;
    let admin =
        AdminPort::open(config.admin_listen, telemetry.clone(), readiness.clone()).await.map_err(bad_address)?;

    let engine = open(config.clone(), metrics.clone()).await?;
    let (for_status, for_refresh) = (engine.clone(), engine.clone());
    admin.show(Arc::new(move || json::status(&for_status.status())), move || for_refresh.refresh_metrics());
    let result = serve_engine(&config, &engine, listener, tls, &admin, &readiness, &metrics, shutdown).await;
    let closed = engine.close().await;
    admin.close().await;
    result.and(closed)
}

#[allow(clippy::too_many_arguments, reason = "the parts that `run` has built")]
async fn serve_engine<E: BlockEngine>(
    config: &PrimaryConfig,
    engine: &E,
    listener: TcpListener,
    tls: Option<ServerTls>,
    admin: &AdminPort,
    readiness: &Readiness,
    metrics: &Metrics,
    shutdown: CancellationToken,
) -> Result<(), Failure> {
    let address = listener.local_addr().map_err(|error| Failure::new(Exit::Internal, error))?;
    let services = services::services(engine.clone(), &config.limits, metrics, shutdown.clone()).await;
    let limits = ServeLimits {
        connections: config.limits.connections,
        streams: config.limits.streams,
        drain: config.shutdown.drain,
        ..ServeLimits::default()
    };
    let serving = tokio::spawn(serve::serve(
        listener,
        Protocol::Grpc,
        tls.map(|tls| tls.acceptor),
        limits,
        services.router,
        shutdown.clone(),
    ));
    services.health.set(true).await;
    readiness.ready();
    if let Some(file) = &config.ready_file {
        let contents = json!({
            "grpc": address.to_string(),
            "admin": admin.address.to_string(),
            "replica": null,
            "nbd": null,
            "pid": std::process::id(),
        });
        write_ready_file(file, &contents).map_err(|error| Failure::new(Exit::Config, error))?;
    }
    info!(grpc = %address, admin = %admin.address, "ready");

    let failure = tokio::select! {
        () = shutdown.cancelled() => None,
        failure = engine.failed() => Some(failure),
    };
    readiness.not_ready("draining");
    services.health.set(false).await;
    shutdown.cancel();
    match serving.await {
        Ok(0) => info!("drained"),
        Ok(dropped) => warn!(dropped, "connections were dropped at the end of shutdown.drain"),
        Err(error) => return Err(Failure::new(Exit::Internal, error)),
    }
    failure.map_or(Ok(()), Err)
}

fn listener_tls(config: &PrimaryConfig) -> Result<Option<ServerTls>, Failure> {
    let (Some(certificate), Some(key)) = (&config.tls.certificate, &config.tls.key) else { return Ok(None) };
    tls::server(certificate, key, config.tls.client_ca.as_deref(), "h2")
        .map(Some)
        .map_err(|error| Failure::new(Exit::Config, error))
}

fn bad_address(error: BindError) -> Failure {
    Failure::new(Exit::Config, error)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        sync::oneshot,
    };
    use understudy_common::config::{self, Start};
    use understudy_proto::v1::{GetStatusRequest, replication_service_client::ReplicationServiceClient};

    use super::*;
    use crate::services::tests::Memory;

    fn config(folder: &Path) -> PrimaryConfig {
        let ready = folder.join("ready.json");
        let arguments = [
            "p",
            "--listen=127.0.0.1:0",
            "--admin-listen=127.0.0.1:0",
            "--data-dir",
            folder.to_str().unwrap(),
            "--ready-file",
            ready.to_str().unwrap(),
        ];
        match config::start::<PrimaryConfig>(arguments.map(Into::into), []) {
            Start::Run { config, .. } => *config,
            Start::Exit { errors, .. } => panic!("{errors}"),
        }
    }

    async fn get(address: &str, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_service_is_ready_when_it_says_so_and_ends_when_it_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let shutdown = CancellationToken::new();
        let ready_file = folder.path().join("ready.json");
        let (recover, recovered) = oneshot::channel::<()>();
        let service = tokio::spawn(run(config, shutdown.clone(), |_, _| async {
            recovered.await.unwrap();
            Ok(Memory::new(u64::MAX))
        }));
        tokio::task::yield_now().await;
        assert!(!ready_file.exists(), "ready before it was recovered");
        recover.send(()).unwrap();
        while !ready_file.exists() {
            tokio::task::yield_now().await;
        }
        let ready: Value = serde_json::from_slice(&std::fs::read(&ready_file).unwrap()).unwrap();
        assert_eq!(ready["pid"], std::process::id());
        assert_eq!(ready["replica"], Value::Null);
        let admin = ready["admin"].as_str().unwrap();
        assert!(get(admin, "/readyz").await.starts_with("HTTP/1.1 200 OK"));
        assert!(get(admin, "/metrics").await.contains("understudy_build_info{role=\"primary\""));
        assert!(get(admin, "/").await.contains("understudy primary"));
        let url = format!("http://{}", ready["grpc"].as_str().unwrap());
        let mut client = ReplicationServiceClient::connect(url).await.unwrap();
        assert_eq!(client.get_status(GetStatusRequest {}).await.unwrap().into_inner().role, "primary");
        shutdown.cancel();
        service.await.unwrap().unwrap();
        assert!(client.get_status(GetStatusRequest {}).await.is_err());
    }

    #[tokio::test]
    async fn a_failure_to_recover_is_the_failure_of_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let failure = Failure::new(Exit::Storage, "the journal is damaged");
        let open = async |_, _| Err::<Memory, _>(failure.clone());
        let ended = run(config(folder.path()), CancellationToken::new(), open).await;
        assert_eq!(ended, Err(failure));
        assert!(!folder.path().join("ready.json").exists());
    }
}
