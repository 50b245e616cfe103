//! The services beside the blocks: volumes, replication, and what a backup offers.

use std::ops::Range;

use tonic::transport::Channel;
use tonic::{Request, Streaming};
use understudy_proto::v1::backup_service_client::BackupServiceClient;
use understudy_proto::v1::replication_service_client::ReplicationServiceClient;
use understudy_proto::v1::volume_service_client::VolumeServiceClient;
use understudy_proto::v1::{
    CreateVolumeRequest, DeleteVolumeRequest, Event, GetPoolRequest, GetStatusRequest, GetVolumeRequest, Group,
    ListGroupsRequest, ListVolumesRequest, Pool, ResizeVolumeRequest, SetAckRuleRequest, Status as PairStatus, Volume,
    WatchEventsRequest,
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

    /// Events with a number above `after`; 0 begins with the present state.
    #[must_use]
    pub fn events(&self, after: u64) -> EventStream {
        EventStream { client: self.client.clone(), of_backup: false, after, events: None }
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

    /// Events with a number above `after`; 0 begins with the present state.
    #[must_use]
    pub fn events(&self, after: u64) -> EventStream {
        EventStream { client: self.client.clone(), of_backup: true, after, events: None }
    }

    /// Reads the consistent image of `volume`: all chunks are of one position. An empty range at 0 reads it whole.
    #[must_use]
    pub fn read_stream(&self, volume: &str, range: Range<u64>) -> ReadStream {
        ReadStream::of_image(self.client.clone(), volume.to_owned(), range)
    }
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
