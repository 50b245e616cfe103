//! The gRPC services of the backup: wire to node and back, nothing else.

mod clones;
mod pieces;
mod replica;
mod serving;
#[cfg(test)]
mod tests;

use axum::Router;
use tokio_util::sync::CancellationToken;
use tonic::{server::NamedService, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::Layer as _;
use understudy_common::{
    config::LimitsConfig,
    grpc::{Grpc, GrpcLayer},
    telemetry::Metrics,
};
use understudy_proto::{
    FILE_DESCRIPTOR_SET,
    methods::methods,
    v1::{
        backup_service_server::BackupServiceServer, block_service_server::BlockServiceServer,
        replica_service_server::ReplicaServiceServer, volume_service_server::VolumeServiceServer,
    },
};

use crate::api::{NodeError, ReplicaNode};
use clones::{CloneBlocks, CloneVolumes};
use replica::ReplicaFrontend;
use serving::BackupFrontend;

/// What a message has around its largest payload: a record of 512-byte blocks carries 4 bytes of checksum for each.
const MESSAGE_OVERHEAD_BYTES: usize = 4096;

/// What the services share.
#[derive(Debug, Clone)]
struct Shared<N> {
    node: N,
    /// Largest payload.
    message_bytes: usize,
    /// Streams end when it is cancelled.
    shutdown: CancellationToken,
}

/// Refuses more than a message may carry.
fn within(bytes: u64, limit: usize) -> Result<(), NodeError> {
    let limit_bytes = u64::try_from(limit).unwrap_or(u64::MAX);
    if bytes > limit_bytes { Err(NodeError::TooLarge { bytes, limit_bytes }) } else { Ok(()) }
}

/// Which services a listener has, beside health and reflection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// Operators and readers: `BackupService`, and `BlockService` and `VolumeService` of clones.
    Operators,
    /// The primary: `ReplicaService`.
    Primary,
    /// Both on one listener.
    All,
}

/// What a listener serves, and the switch of its health.
pub struct Services {
    /// With metrics and deadlines around it.
    pub router: Grpc<Router>,
    /// Says NOT_SERVING until it is told otherwise.
    pub health: Health,
}

/// Builds the services of one listener around `node`. Streams end with UNAVAILABLE when `shutdown` is cancelled.
pub async fn services<N: ReplicaNode>(
    node: N,
    audience: Audience,
    limits: &LimitsConfig,
    metrics: &Metrics,
    shutdown: CancellationToken,
) -> Services {
    const COMPILED: &str = "the descriptors are compiled into the program";
    let shared = Shared { node, message_bytes: limits.message_bytes, shutdown: shutdown.clone() };
    let limit = limits.message_bytes + MESSAGE_OVERHEAD_BYTES;
    // A record of the primary's largest write, widened to whole blocks, with its checksums.
    let record_limit = limits.message_bytes + limits.message_bytes / 64 + (256 << 10);
    let names: &[&'static str] = match audience {
        Audience::Operators => &[Backup::<N>::NAME, Blocks::<N>::NAME, Volumes::<N>::NAME],
        Audience::Primary => &[Replica::<N>::NAME],
        Audience::All => &[Backup::<N>::NAME, Blocks::<N>::NAME, Volumes::<N>::NAME, Replica::<N>::NAME],
    };
    let (reporter, health_server) = tonic_health::server::health_reporter();
    let health = Health { reporter, names: names.to_vec() };
    health.set(false).await;
    let reflection = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("grpc.health.v1.Health");
        names.iter().fold(builder, |builder, name| builder.with_service_name(*name))
    };
    let mut routes = Routes::new(health_server.max_decoding_message_size(limit).max_encoding_message_size(limit))
        .add_service(
            reflection().build_v1().expect(COMPILED).max_decoding_message_size(limit).max_encoding_message_size(limit),
        )
        .add_service(
            reflection()
                .build_v1alpha()
                .expect(COMPILED)
                .max_decoding_message_size(limit)
                .max_encoding_message_size(limit),
        );
    if audience != Audience::Primary {
        routes = routes
            .add_service(
                Backup::new(BackupFrontend(shared.clone()))
                    .max_decoding_message_size(limit)
                    .max_encoding_message_size(limit),
            )
            .add_service(
                Blocks::new(CloneBlocks(shared.clone()))
                    .max_decoding_message_size(limit)
                    .max_encoding_message_size(limit),
            )
            .add_service(
                Volumes::new(CloneVolumes(shared.clone()))
                    .max_decoding_message_size(limit)
                    .max_encoding_message_size(limit),
            );
    }
    if audience != Audience::Operators {
        routes = routes.add_service(
            Replica::new(ReplicaFrontend(shared))
                .max_decoding_message_size(record_limit)
                .max_encoding_message_size(limit),
        );
    }
    let served = [
        FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let layer = GrpcLayer::new(served.into_iter().flat_map(methods), metrics, limits.request_deadline, shutdown);
    Services { router: layer.layer(routes.prepare().into_axum_router()), health }
}

type Backup<N> = BackupServiceServer<BackupFrontend<N>>;
type Blocks<N> = BlockServiceServer<CloneBlocks<N>>;
type Volumes<N> = VolumeServiceServer<CloneVolumes<N>>;
type Replica<N> = ReplicaServiceServer<ReplicaFrontend<N>>;

/// `grpc.health.v1`: of the listener as a whole and of each of its services.
#[derive(Debug, Clone)]
pub struct Health {
    reporter: HealthReporter,
    names: Vec<&'static str>,
}

impl Health {
    /// SERVING or NOT_SERVING.
    pub async fn set(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in [""].iter().chain(&self.names) {
            self.reporter.set_service_status(service, status).await;
        }
    }
}
