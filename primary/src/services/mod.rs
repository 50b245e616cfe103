//! The gRPC services of the primary: wire to engine and back, nothing else.

mod block;
mod replica;
mod replication;
mod stream;
#[cfg(test)]
pub(crate) mod tests;
mod volume;

use axum::Router;
use bytes::Bytes;
use prometheus::Histogram;
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
        block_service_server::BlockServiceServer, replica_service_server::ReplicaServiceServer,
        replication_service_server::ReplicationServiceServer, volume_service_server::VolumeServiceServer,
    },
};

use crate::api::{BlockEngine, EngineError, VolumeKey};
use block::BlockFrontend;
use replica::ReplicaFrontend;
use replication::ReplicationFrontend;
use volume::VolumeFrontend;

/// What a message has around its largest payload.
const MESSAGE_OVERHEAD_BYTES: usize = 4096;

/// What the services share.
#[derive(Debug, Clone)]
struct Shared<E> {
    engine: E,
    metrics: Metrics,
    /// `write_ack_seconds` of continuous mode, and of delta mode.
    ack_seconds: [Histogram; 2],
    /// Largest payload.
    message_bytes: usize,
    /// Streams end when it is cancelled.
    shutdown: CancellationToken,
}

/// Everything that is served to clients, and the switch of its health.
pub struct Services {
    /// With metrics and deadlines around it.
    pub router: Grpc<Router>,
    /// Says NOT_SERVING until it is told otherwise.
    pub health: Health,
}

/// Builds the services around `engine`. Streams end with UNAVAILABLE when `shutdown` is cancelled.
pub async fn services<E: BlockEngine>(
    engine: E,
    limits: &LimitsConfig,
    metrics: &Metrics,
    shutdown: CancellationToken,
) -> Services {
    let shared = Shared {
        engine,
        metrics: metrics.clone(),
        ack_seconds: ["continuous", "delta"].map(|mode| metrics.write_ack_seconds.with_label_values(&[mode])),
        message_bytes: limits.message_bytes,
        shutdown: shutdown.clone(),
    };
    let limit = limits.message_bytes + MESSAGE_OVERHEAD_BYTES;
    let (reporter, health_server) = tonic_health::server::health_reporter();
    let health = Health(reporter);
    health.set(false).await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(Block::<E>::NAME)
            .with_service_name(Volume::<E>::NAME)
            .with_service_name(Replication::<E>::NAME)
            .with_service_name("grpc.health.v1.Health")
    };
    const COMPILED: &str = "the descriptors are compiled into the program";
    let routes = Routes::new(
        Block::new(BlockFrontend(shared.clone())).max_decoding_message_size(limit).max_encoding_message_size(limit),
    )
    .add_service(
        Volume::new(VolumeFrontend(shared.clone())).max_decoding_message_size(limit).max_encoding_message_size(limit),
    )
    .add_service(
        ReplicaServiceServer::new(ReplicaFrontend(shared.clone()))
            .max_decoding_message_size(limit)
            .max_encoding_message_size(limit),
    )
    .add_service(
        Replication::new(ReplicationFrontend(shared)).max_decoding_message_size(limit).max_encoding_message_size(limit),
    )
    .add_service(health_server.max_decoding_message_size(limit).max_encoding_message_size(limit))
    .add_service(
        reflection().build_v1().expect(COMPILED).max_decoding_message_size(limit).max_encoding_message_size(limit),
    )
    .add_service(
        reflection().build_v1alpha().expect(COMPILED).max_decoding_message_size(limit).max_encoding_message_size(limit),
    );
    let served = [
        FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let methods = served.into_iter().flat_map(methods);
    let layer = GrpcLayer::new(methods, metrics, limits.request_deadline, shutdown);
    Services { router: layer.layer(routes.prepare().into_axum_router()), health }
}

type Block<E> = BlockServiceServer<BlockFrontend<E>>;
type Volume<E> = VolumeServiceServer<VolumeFrontend<E>>;
type Replication<E> = ReplicationServiceServer<ReplicationFrontend<E>>;

/// `grpc.health.v1`: of the server as a whole and of each service.
#[derive(Debug, Clone)]
pub struct Health(HealthReporter);

impl Health {
    /// SERVING or NOT_SERVING.
    pub async fn set(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in
            ["", "understudy.v1.BlockService", "understudy.v1.VolumeService", "understudy.v1.ReplicationService"]
        {
            self.0.set_service_status(service, status).await;
        }
    }
}

/// The volume that a request names.
fn key(volume_id: u64, volume: String) -> Result<VolumeKey, EngineError> {
    match (volume_id, volume.is_empty()) {
        (0, true) => {
            Err(EngineError::Invalid { field: "volume", why: "names no volume; set volume_id or volume".into() })
        }
        (0, false) => Ok(VolumeKey::Name(volume)),
        (id, _) => Ok(VolumeKey::Id(understudy_common::types::VolumeId(id))),
    }
}

/// Refuses what is longer than a message may be.
fn within(bytes: u64, limit: usize) -> Result<(), EngineError> {
    let limit_bytes = u64::try_from(limit).unwrap_or(u64::MAX);
    if bytes > limit_bytes { Err(EngineError::TooLarge { bytes, limit_bytes }) } else { Ok(()) }
}

/// The length of `data`.
fn length(data: &Bytes) -> u64 {
    u64::try_from(data.len()).unwrap_or(u64::MAX)
}
