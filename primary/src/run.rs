//! From settings to a served engine, and back down: build, serve, drain.

use std::{future::Future, sync::Arc};

use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use understudy_common::{
    admin::{AdminPort, Readiness},
    config::PrimaryConfig,
    process::{Exit, Failure},
    serve::{self, BindError, Protocol, ServeLimits},
    telemetry::{Metrics, Telemetry, write_ready_file},
    tls::{self, ServerTls},
};
use understudy_proto::json;

use crate::{api::BlockEngine, services};

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
