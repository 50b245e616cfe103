//! `VolumeService`: the life cycle of volumes.

use std::collections::BTreeMap;

use tonic::{Request, Response, Status};
use understudy_common::types::{AckRule, AwayRule, VolumeSpec};
use understudy_proto::{
    convert::{ack_rule, away_rule, volume_to_wire},
    v1::{self, volume_service_server::VolumeService},
};

use super::{Shared, key};
use crate::api::{BlockEngine, EngineError, NewVolume};

pub(super) struct VolumeFrontend<E>(pub Shared<E>);

#[tonic::async_trait]
impl<E: BlockEngine> VolumeService for VolumeFrontend<E> {
    async fn create_volume(&self, request: Request<v1::CreateVolumeRequest>) -> Result<Response<v1::Volume>, Status> {
        let v1::CreateVolumeRequest { name, size_bytes, block_bytes, group, ack, away } = request.into_inner();
        let volume = NewVolume {
            name,
            size_bytes,
            block_bytes,
            group: (!group.is_empty()).then_some(group),
            ack: ack_rule(ack).map_err(EngineError::from)?.unwrap_or(AckRule::Staged),
            away: away_rule(away).map_err(EngineError::from)?.unwrap_or(AwayRule::Degrade),
        };
        answer(&self.0.engine.create_volume(volume).await?)
    }

    async fn get_volume(&self, request: Request<v1::GetVolumeRequest>) -> Result<Response<v1::Volume>, Status> {
        let v1::GetVolumeRequest { volume_id, volume } = request.into_inner();
        answer(&self.0.engine.volume(&key(volume_id, volume)?)?)
    }

    async fn list_volumes(
        &self,
        _: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let volumes = self.0.engine.volumes().iter().map(wire).collect();
        Ok(Response::new(v1::ListVolumesResponse { volumes }))
    }

    async fn resize_volume(&self, request: Request<v1::ResizeVolumeRequest>) -> Result<Response<v1::Volume>, Status> {
        let v1::ResizeVolumeRequest { volume_id, volume, size_bytes } = request.into_inner();
        answer(&self.0.engine.resize_volume(&key(volume_id, volume)?, size_bytes).await?)
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        let v1::DeleteVolumeRequest { volume_id, volume } = request.into_inner();
        self.0.engine.delete_volume(&key(volume_id, volume)?).await?;
        Ok(Response::new(v1::DeleteVolumeResponse {}))
    }

    async fn set_ack_rule(&self, request: Request<v1::SetAckRuleRequest>) -> Result<Response<v1::Volume>, Status> {
        let v1::SetAckRuleRequest { volume_id, volume, ack, away } = request.into_inner();
        let volume = key(volume_id, volume)?;
        let ack = ack_rule(ack).map_err(EngineError::from)?.ok_or_else(|| EngineError::Invalid {
            field: "ack",
            why: "is not set; use STAGED, PRIMARY or BOTH".into(),
        })?;
        let away = away_rule(away).map_err(EngineError::from)?;
        answer(&self.0.engine.set_ack_rule(&volume, ack, away).await?)
    }

    async fn list_groups(&self, _: Request<v1::ListGroupsRequest>) -> Result<Response<v1::ListGroupsResponse>, Status> {
        let mut groups = BTreeMap::new();
        for spec in self.0.engine.volumes() {
            let empty = || v1::Group { id: spec.group.0, name: spec.group_name, volumes: Vec::new() };
            groups.entry(spec.group).or_insert_with(empty).volumes.push(spec.name);
        }
        Ok(Response::new(v1::ListGroupsResponse { groups: groups.into_values().collect() }))
    }

    async fn get_pool(&self, _: Request<v1::GetPoolRequest>) -> Result<Response<v1::Pool>, Status> {
        let pool = self.0.engine.pool();
        let device = |device: crate::api::DeviceInfo| v1::PoolDevice {
            id: device.id,
            path: device.path,
            size_bytes: device.size_bytes,
            free_bytes: device.free_bytes,
        };
        Ok(Response::new(v1::Pool {
            segment_bytes: pool.segment_bytes,
            total_bytes: pool.total_bytes,
            free_bytes: pool.free_bytes,
            reserved_bytes: pool.reserved_bytes,
            devices: pool.devices.into_iter().map(device).collect(),
        }))
    }
}

fn wire(volume: &VolumeSpec) -> v1::Volume {
    volume_to_wire(volume)
}

#[allow(clippy::unnecessary_wraps, clippy::result_large_err, reason = "every method ends with it")]
fn answer(volume: &VolumeSpec) -> Result<Response<v1::Volume>, Status> {
    Ok(Response::new(wire(volume)))
}
