//! From settings to a served node, and back down: build, serve, drain.

use std::{future::Future, net::SocketAddr, path::Path, process::ExitCode, sync::Arc};

use serde_json::json;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use understudy_common::{
    admin::{AdminPort, Readiness},
    config::BackupConfig,
    process::{self, Exit, Failure},
    serve::{self, BindError, Protocol, ServeLimits},
    telemetry::{Metrics, Telemetry, write_ready_file},
    tls::{self, ServerTls},
};
use understudy_proto::json;

use crate::{
    api::ReplicaNode,
    services::{self, Audience},
};

/// A listener and whom it is for.
struct Door {
    listener: TcpListener,
    address: SocketAddr,
    audience: Audience,
    tls: Option<ServerTls>,
}

/// The whole program: settings, log, lock, [`run`], exit code.
pub fn main<N: ReplicaNode, F: Future<Output = Result<N, Failure>>>(
    open: impl FnOnce(BackupConfig, Metrics) -> F,
) -> ExitCode {
    process::run(|config, shutdown| run(config, shutdown, open))
}

/// Serves until `shutdown` or a failure of the node. `open` recovers the node; until it returns, the admin port answers
/// and says that the service is not ready.
pub async fn run<N: ReplicaNode, F: Future<Output = Result<N, Failure>>>(
    config: BackupConfig,
    shutdown: CancellationToken,
    open: impl FnOnce(BackupConfig, Metrics) -> F,
) -> Result<(), Failure> {
    let telemetry = Telemetry::new("backup");
    let metrics = Metrics::new(&telemetry);
    let readiness = Readiness::new("recovering");
    let doors = doors(&config).await?;
    if let Some(expiry) = doors[0].tls.as_ref().and_then(|tls| tls.expiry) {
        metrics.set_certificate_expiry(expiry);
    }
    let admin =
        AdminPort::open(config.admin_listen, telemetry.clone(), readiness.clone()).await.map_err(bad_address)?;

    let node = open(config.clone(), metrics.clone()).await?;
    let (for_status, for_refresh) = (node.clone(), node.clone());
    admin.show(Arc::new(move || json::status(&for_status.status())), move || for_refresh.refresh_metrics());
    let result = serve_node(&config, &node, doors, &admin, &readiness, &metrics, shutdown).await;
    let closed = node.close().await;
    admin.close().await;
    result.and(closed)
}

async fn serve_node<N: ReplicaNode>(
    config: &BackupConfig,
    node: &N,
    doors: Vec<Door>,
    admin: &AdminPort,
    readiness: &Readiness,
    metrics: &Metrics,
    shutdown: CancellationToken,
) -> Result<(), Failure> {
    let grpc = doors[0].address;
    let replica = doors.get(1).map(|door| door.address);
    let limits = ServeLimits {
        connections: config.limits.connections,
        streams: config.limits.streams,
        drain: config.shutdown.drain,
        ..ServeLimits::default()
    };
    let mut serving = JoinSet::new();
    let mut health = Vec::new();
    for door in doors {
        let services = services::services(node.clone(), door.audience, &config.limits, metrics, shutdown.clone()).await;
        let tls = door.tls.map(|tls| tls.acceptor);
        let (limits, shutdown) = (limits.clone(), shutdown.clone());
        serving.spawn(serve::serve(door.listener, Protocol::Grpc, tls, limits, services.router, shutdown));
        services.health.set(true).await;
        health.push(services.health);
    }
    readiness.ready();
    if let Some(file) = &config.ready_file {
        let contents = json!({
            "grpc": grpc.to_string(),
            "admin": admin.address.to_string(),
            "replica": replica.map(|address| address.to_string()),
            "nbd": null,
            "pid": std::process::id(),
        });
        write_ready_file(file, &contents).map_err(|error| Failure::new(Exit::Config, error))?;
    }
    info!(%grpc, ?replica, admin = %admin.address, "ready");

    let failure = tokio::select! {
        () = shutdown.cancelled() => None,
        failure = node.failed() => Some(failure),
    };
    readiness.not_ready("draining");
    for health in health {
        health.set(false).await;
    }
    shutdown.cancel();
    let mut dropped = 0;
    while let Some(done) = serving.join_next().await {
        dropped += done.map_err(|error| Failure::new(Exit::Internal, error))?;
    }
    if dropped == 0 {
        info!("drained");
    } else {
        warn!(dropped, "connections were dropped at the end of shutdown.drain");
    }
    failure.map_or(Ok(()), Err)
}

/// The listener of operators first; then, where it has one of its own, that of the primary.
async fn doors(config: &BackupConfig) -> Result<Vec<Door>, Failure> {
    let client_ca = config.tls.client_ca.as_deref();
    let audience = if config.replica.listen.is_some() { Audience::Operators } else { Audience::All };
    let mut doors = vec![door(config, config.listen, audience, client_ca).await?];
    if let Some(address) = config.replica.listen {
        let authority = config.tls.replica_ca.as_deref().or(client_ca);
        doors.push(door(config, address, Audience::Primary, authority).await?);
    }
    Ok(doors)
}

async fn door(
    config: &BackupConfig,
    address: SocketAddr,
    audience: Audience,
    authority: Option<&Path>,
) -> Result<Door, Failure> {
    let tls = match (&config.tls.certificate, &config.tls.key) {
        (Some(certificate), Some(key)) => {
            Some(tls::server(certificate, key, authority, "h2").map_err(|error| Failure::new(Exit::Config, error))?)
        }
        _ => None,
    };
    let listener = serve::bind(address).await.map_err(bad_address)?;
    let address = listener.local_addr().map_err(|error| Failure::new(Exit::Internal, error))?;
    Ok(Door { listener, address, audience, tls })
}

fn bad_address(error: BindError) -> Failure {
    Failure::new(Exit::Config, error)
}
