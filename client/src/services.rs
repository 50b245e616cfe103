//! The services beside the blocks: volumes, replication, and what a backup offers.

use std::ops::Range;

use tonic::transport::Channel;
use tonic::{Request, Streaming};
use understudy_proto::v1::backup_service_client::BackupServiceClient;
use understudy_proto::v1::replication_service_client::ReplicationServiceClient;
use understudy_proto::v1::volume_service_client::VolumeServiceClient;
use understudy_proto::v1::{
    AbortRunRequest, AbortRunResponse, AddDeviceRequest, ChangedBlocks, CloneImageRequest, CloneInfo,
    CloneSnapshotRequest, CopyProgress, CreateVolumeRequest, DeleteCloneRequest, DeleteCloneResponse,
    DeleteSnapshotRequest, DeleteSnapshotResponse, DeleteVolumeRequest, DemoteRequest, DemoteResponse,
    DrainDeviceRequest, Event, ExplainRequest, ExplainResponse, GetChangedBlocksRequest, GetPolicyRequest,
    GetPoolRequest, GetStatusRequest, GetUnshippedRequest, GetVolumeRequest, Group, ListClonesRequest,
    ListClonesResponse, ListGroupsRequest, ListSegmentsRequest, ListSegmentsResponse, ListSnapshotsRequest,
    ListSnapshotsResponse, ListVolumesRequest, Policy, Pool, PoolDevice, PromoteRequest, PromoteResponse,
    RenewLeaseRequest, RenewLeaseResponse, ResizeVolumeRequest, ResolveSplitBrainRequest, ResolveSplitBrainResponse,
    RestoreSnapshotRequest, ScrubRequest, ScrubResponse, SetAckRuleRequest, SetModeRequest, SetModeResponse,
    SetPolicyRequest, SnapshotInfo, SnapshotRequest, StartDeltaRequest, StartDeltaResponse, Status as PairStatus,
    Unshipped, VerifyProgress, VerifyRequest, Volume, WatchEventsRequest,
};

use crate::client::{Client, Repeat};
use crate::error::{ClientError, is_loss};
use crate::read::ReadStream;

macro_rules! unary {
    ($(#[$doc:meta])* $name:ident, $rpc:ident, $label:literal, $repeat:expr, $message:ty => $answer:ty) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// What the server refused, or its loss.
        pub async fn $name(&self, message: $message) -> Result<$answer, ClientError> {
            let send = |request: Request<$message>| {
                let mut service = self.service();
                async move { service.$rpc(request).await }
            };
            self.client.call($label, $repeat, message, send).await
        }
    };
}

macro_rules! stream {
    ($(#[$doc:meta])* $name:ident, $rpc:ident, $label:literal, $repeat:expr, $message:ty => $answer:ty) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// What the server refused, or its loss.
        pub async fn $name(&self, message: $message) -> Result<Streaming<$answer>, ClientError> {
            let send = |mut request: Request<$message>| {
                // It outlives the bound of one request.
                request.metadata_mut().remove("grpc-timeout");
                let mut service = self.service();
                async move { service.$rpc(request).await }
            };
            self.client.call($label, $repeat, message, send).await
        }
    };
}

/// The life cycle of volumes.
#[derive(Debug, Clone)]
pub struct VolumeClient {
    client: Client,
}

impl VolumeClient {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    fn service(&self) -> VolumeServiceClient<Channel> {
        VolumeServiceClient::new(self.client.channel())
    }

    unary!(
        /// Creates a volume. Not repeated once sent: after a loss, look whether it exists.
        create, create_volume, "CreateVolume", Repeat::Unsent, CreateVolumeRequest => Volume
    );
    unary!(
        /// One volume, by id or name.
        find, get_volume, "GetVolume", Repeat::Safe, GetVolumeRequest => Volume
    );
    unary!(
        /// Grows a volume.
        resize, resize_volume, "ResizeVolume", Repeat::Safe, ResizeVolumeRequest => Volume
    );
    unary!(
        /// Changes when writes are acknowledged, from the next write on.
        set_ack_rule, set_ack_rule, "SetAckRule", Repeat::Safe, SetAckRuleRequest => Volume
    );

    unary!(
        /// Takes a snapshot of a group. Not repeated once sent: after a loss, look whether it exists.
        snapshot, snapshot, "Snapshot", Repeat::Unsent, SnapshotRequest => SnapshotInfo
    );
    unary!(
        /// The snapshots of a group, or of every group.
        snapshots, list_snapshots, "ListSnapshots", Repeat::Safe, ListSnapshotsRequest => ListSnapshotsResponse
    );
    unary!(
        /// Deletes a snapshot. Not repeated once sent: after a loss, look whether it exists.
        delete_snapshot, delete_snapshot, "DeleteSnapshot", Repeat::Unsent,
        DeleteSnapshotRequest => DeleteSnapshotResponse
    );
    stream!(
        /// Makes volumes what they were in a snapshot: the answers tell its progress. The copy does not end with them.
        restore_snapshot, restore_snapshot, "RestoreSnapshot", Repeat::Unsent, RestoreSnapshotRequest => CopyProgress
    );
    stream!(
        /// Makes a volume with the content of a snapshot: the answers tell its progress.
        clone_snapshot, clone_snapshot, "CloneSnapshot", Repeat::Unsent, CloneSnapshotRequest => CopyProgress
    );
    stream!(
        /// Ranges that differ between a snapshot and a newer one, or the head.
        changed_blocks, get_changed_blocks, "GetChangedBlocks", Repeat::Safe, GetChangedBlocksRequest => ChangedBlocks
    );

    /// All volumes.
    ///
    /// # Errors
    /// The loss of the server.
    pub async fn list(&self) -> Result<Vec<Volume>, ClientError> {
        let send = |request| {
            let mut service = self.service();
            async move { service.list_volumes(request).await }
        };
        Ok(self.client.call("ListVolumes", Repeat::Safe, ListVolumesRequest {}, send).await?.volumes)
    }

    /// Deletes a volume with its data. Not repeated once sent: after a loss, look whether it exists.
    ///
    /// # Errors
    /// What the server refused, or its loss.
    pub async fn delete(&self, message: DeleteVolumeRequest) -> Result<(), ClientError> {
        let send = |request| {
            let mut service = self.service();
            async move { service.delete_volume(request).await }
        };
        self.client.call("DeleteVolume", Repeat::Unsent, message, send).await.map(|_| ())
    }

    /// All groups.
    ///
    /// # Errors
    /// The loss of the server.
    pub async fn groups(&self) -> Result<Vec<Group>, ClientError> {
        let send = |request| {
            let mut service = self.service();
            async move { service.list_groups(request).await }
        };
        Ok(self.client.call("ListGroups", Repeat::Safe, ListGroupsRequest {}, send).await?.groups)
    }

    /// The devices and their space.
    ///
    /// # Errors
    /// The loss of the server.
    pub async fn pool(&self) -> Result<Pool, ClientError> {
        let send = |request| {
            let mut service = self.service();
            async move { service.get_pool(request).await }
        };
        self.client.call("GetPool", Repeat::Safe, GetPoolRequest {}, send).await
    }

    unary!(
        /// Adds a device to the pool. Not repeated once sent: after a loss, look at the pool.
        add_device, add_device, "AddDevice", Repeat::Unsent, AddDeviceRequest => PoolDevice
    );
    unary!(
        /// Begins to drain a device, or ends that.
        drain_device, drain_device, "DrainDevice", Repeat::Safe, DrainDeviceRequest => PoolDevice
    );
    unary!(
        /// Where segments lie, a part at a time.
        segments, list_segments, "ListSegments", Repeat::Safe, ListSegmentsRequest => ListSegmentsResponse
    );
}

/// How the pair is doing, as the primary sees it.
#[derive(Debug, Clone)]
pub struct ReplicationClient {
    client: Client,
}

impl ReplicationClient {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    fn service(&self) -> ReplicationServiceClient<Channel> {
        ReplicationServiceClient::new(self.client.channel())
    }

    /// The present state.
    ///
    /// # Errors
    /// The loss of the server.
    pub async fn status(&self) -> Result<PairStatus, ClientError> {
        let send = |request| {
            let mut service = self.service();
            async move { service.get_status(request).await }
        };
        self.client.call("GetStatus", Repeat::Safe, GetStatusRequest {}, send).await
    }

    unary!(
        /// Begins a run of a group in delta mode. Not repeated once sent: after a loss, look whether one is open.
        start_delta, start_delta, "StartDelta", Repeat::Unsent, StartDeltaRequest => StartDeltaResponse
    );
    unary!(
        /// Aborts the open run of a group. Not repeated once sent: it might abort the next one.
        abort_delta, abort_delta, "AbortDelta", Repeat::Unsent, AbortRunRequest => AbortRunResponse
    );
    unary!(
        /// Forces delta mode, or leaves the mode to the policy again.
        set_mode, set_mode, "SetMode", Repeat::Safe, SetModeRequest => SetModeResponse
    );
    unary!(
        /// Changes settings of the mode policy.
        set_policy, set_policy, "SetPolicy", Repeat::Safe, SetPolicyRequest => Policy
    );
    unary!(
        /// The mode policy in force.
        policy, get_policy, "GetPolicy", Repeat::Safe, GetPolicyRequest => Policy
    );
    unary!(
        /// Why groups are in their modes.
        explain, explain, "Explain", Repeat::Safe, ExplainRequest => ExplainResponse
    );
    unary!(
        /// Begins a scrub on both sides, or tells how it is doing. One that is under way goes on.
        scrub, scrub, "Scrub", Repeat::Safe, ScrubRequest => ScrubResponse
    );

    /// Compares both sides. Not repeated once begun.
    ///
    /// # Errors
    /// What the server refused, or its loss.
    pub async fn verify(&self, message: VerifyRequest) -> Result<VerifyStream, ClientError> {
        let send = |mut request: Request<VerifyRequest>| {
            // It takes as long as the volumes are large; the connection's keepalive notices a lost peer.
            request.metadata_mut().remove("grpc-timeout");
            let mut service = self.service();
            async move { service.verify(request).await }
        };
        Ok(VerifyStream(self.client.call("Verify", Repeat::Unsent, message, send).await?))
    }

    unary!(
        /// Makes the primary a backup. Not repeated once sent: after a loss, look what it is.
        demote, demote, "Demote", Repeat::Unsent, DemoteRequest => DemoteResponse
    );
    unary!(
        /// Extends the lease.
        renew_lease, renew_lease, "RenewLease", Repeat::Safe, RenewLeaseRequest => RenewLeaseResponse
    );
    unary!(
        /// Gives up the changes of a primary after a split. Not repeated once sent.
        resolve_split_brain, resolve_split_brain, "ResolveSplitBrain", Repeat::Unsent,
        ResolveSplitBrainRequest => ResolveSplitBrainResponse
    );

    /// What the primary has acknowledged and its backup has not, range by range.
    ///
    /// # Errors
    /// What the server refused, or its loss.
    pub async fn unshipped(&self, message: GetUnshippedRequest) -> Result<Streaming<Unshipped>, ClientError> {
        let send = |mut request: Request<GetUnshippedRequest>| {
            // It takes as long as there is much.
            request.metadata_mut().remove("grpc-timeout");
            let mut service = self.service().max_decoding_message_size(self.client.config().message_bytes_max);
            async move { service.get_unshipped(request).await }
        };
        self.client.call("GetUnshipped", Repeat::Safe, message, send).await
    }

    /// Events with a number above `after`; 0 begins with the present state.
    #[must_use]
    pub fn events(&self, after: u64) -> EventStream {
        EventStream { client: self.client.clone(), of_backup: false, after, events: None }
    }
}

/// How a comparison of both sides goes on.
#[derive(Debug)]
pub struct VerifyStream(Streaming<VerifyProgress>);

impl VerifyStream {
    /// The next message; `None` at the end.
    ///
    /// # Errors
    /// What ended the comparison.
    pub async fn next(&mut self) -> Result<Option<VerifyProgress>, ClientError> {
        self.0.message().await.map_err(|status| ClientError::rpc("Verify", status))
    }
}

/// What a backup offers to operators and readers.
#[derive(Debug, Clone)]
pub struct BackupClient {
    client: Client,
}

impl BackupClient {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    pub(crate) fn service(&self) -> BackupServiceClient<Channel> {
        let limit = self.client.config().message_bytes_max;
        BackupServiceClient::new(self.client.channel()).max_decoding_message_size(limit)
    }

    /// The present state.
    ///
    /// # Errors
    /// The loss of the server.
    pub async fn status(&self) -> Result<PairStatus, ClientError> {
        let send = |request| {
            let mut service = self.service();
            async move { service.get_status(request).await }
        };
        self.client.call("GetStatus", Repeat::Safe, GetStatusRequest {}, send).await
    }

    unary!(
        /// The backup's pool.
        pool, get_pool, "GetPool", Repeat::Safe, GetPoolRequest => Pool
    );
    unary!(
        /// Adds a device to the backup's pool. Not repeated once sent: after a loss, look at the pool.
        add_device, add_device, "AddDevice", Repeat::Unsent, AddDeviceRequest => PoolDevice
    );
    unary!(
        /// Begins to drain a device of the backup's pool, or ends that.
        drain_device, drain_device, "DrainDevice", Repeat::Safe, DrainDeviceRequest => PoolDevice
    );
    unary!(
        /// Where segments of the backup's pool lie, a part at a time.
        segments, list_segments, "ListSegments", Repeat::Safe, ListSegmentsRequest => ListSegmentsResponse
    );
    unary!(
        /// Makes the backup the primary. Not repeated once sent: after a loss, look at its generation.
        promote, promote, "Promote", Repeat::Unsent, PromoteRequest => PromoteResponse
    );
    unary!(
        /// Makes a writable clone of the image of a volume on the backup, or of a snapshot. Not repeated once sent: after a
        /// loss, look whether it exists.
        clone_image, clone_snapshot, "CloneSnapshot", Repeat::Unsent, CloneImageRequest => CloneInfo
    );
    unary!(
        /// The clones of the backup.
        clones, list_clones, "ListClones", Repeat::Safe, ListClonesRequest => ListClonesResponse
    );
    unary!(
        /// Discards a clone. Not repeated once sent: after a loss, look whether it exists.
        delete_clone, delete_clone, "DeleteClone", Repeat::Unsent, DeleteCloneRequest => DeleteCloneResponse
    );
    unary!(
        /// Gives up the changes of a backup after a split. Not repeated once sent.
        resolve_split_brain, resolve_split_brain, "ResolveSplitBrain", Repeat::Unsent,
        ResolveSplitBrainRequest => ResolveSplitBrainResponse
    );

    /// Events with a number above `after`; 0 begins with the present state.
    #[must_use]
    pub fn events(&self, after: u64) -> EventStream {
        EventStream { client: self.client.clone(), of_backup: true, after, events: None }
    }

    /// Reads the consistent image of `volume`: all chunks are of one position. An empty range at 0 reads it whole.
    #[must_use]
    pub fn read_stream(&self, volume: &str, range: Range<u64>) -> ReadStream {
        ReadStream::of_image(self.client.clone(), volume.to_owned(), String::new(), range)
    }

    /// As [`BackupClient::read_stream`], of a snapshot.
    #[must_use]
    pub fn read_snapshot(&self, volume: &str, snapshot: &str, range: Range<u64>) -> ReadStream {
        ReadStream::of_image(self.client.clone(), volume.to_owned(), snapshot.to_owned(), range)
    }

    unary!(
        /// The snapshots of a group, or of every group, that the backup holds.
        snapshots, list_snapshots, "ListSnapshots", Repeat::Safe, ListSnapshotsRequest => ListSnapshotsResponse
    );
}

/// Events in the order of their numbers, resumed by number after a broken connection.
#[derive(Debug)]
pub struct EventStream {
    client: Client,
    of_backup: bool,
    after: u64,
    events: Option<Streaming<Event>>,
}

impl EventStream {
    /// The next event. Waits without bound while nothing happens and the server is there.
    ///
    /// # Errors
    /// What the server refused, or its loss for longer than the client's `retry_for`.
    pub async fn next(&mut self) -> Result<Event, ClientError> {
        loop {
            if self.events.is_none() {
                self.events = Some(self.open().await?);
            }
            let Some(events) = &mut self.events else { continue };
            match events.message().await {
                Ok(Some(event)) => {
                    self.after = self.after.max(event.number);
                    return Ok(event);
                }
                Ok(None) => self.events = None,
                Err(status) if is_loss(&status) => self.events = None,
                Err(status) => return Err(ClientError::rpc("WatchEvents", status)),
            }
            // The stream ended: a server that ends each one at once must not be asked in a tight loop.
            tokio::time::sleep(self.client.config().backoff_min).await;
        }
    }

    async fn open(&self) -> Result<Streaming<Event>, ClientError> {
        let send = |mut request: Request<WatchEventsRequest>| {
            // Watching has no end; the connection's keepalive notices a lost peer.
            request.metadata_mut().remove("grpc-timeout");
            let (client, of_backup) = (self.client.clone(), self.of_backup);
            async move {
                if of_backup {
                    client.backup().service().watch_events(request).await
                } else {
                    client.replication().service().watch_events(request).await
                }
            }
        };
        let message = WatchEventsRequest { after: self.after };
        self.client.call("WatchEvents", Repeat::Safe, message, send).await
    }
}
