//! The connection to one server, and the rule of what is repeated.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Response, Status};
use understudy_proto::v1::GetVolumeRequest;
use understudy_proto::v1::block_service_client::BlockServiceClient;

use crate::backoff::Backoff;
use crate::config::{ClientConfig, TlsFiles};
use crate::error::{ClientError, describe, is_loss, was_not_sent};
use crate::read::ReadStream;
use crate::sequence::Sequences;
use crate::services::{BackupClient, ReplicationClient, VolumeClient};
use crate::volume::VolumeHandle;

/// Stream and connection windows and frame size that let one stream fill a loopback or a long link.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
const FRAME_BYTES: u32 = 256 << 10;

/// One server, by one URL; a primary or a backup. Cheap to clone; clones share the connection and the client's id.
///
/// The connection is made anew, with fresh name resolution, whenever it breaks. Repeated, with growing pauses, for at
/// most [`ClientConfig::retry_for`]:
/// - anything, when no connection could be made: the request never left;
/// - reads, status, `Flush`, `ResizeVolume` and `SetAckRule`, which do the same when done twice;
/// - writes, discards and zeroes, which carry a sequence that the server applies at most once.
///
/// Never repeated once sent: `CreateVolume` and `DeleteVolume`. Never repeated: what the server refused.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: ClientConfig,
    channel: Channel,
    sequences: Sequences,
    streams: AtomicU64,
}

/// Which failures of a request may be answered by sending it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// Doing it twice is doing it once.
    Safe,
    /// Only if it certainly was not sent.
    Unsent,
}

impl Client {
    /// Connects, trying for [`ClientConfig::retry_for`].
    ///
    /// # Errors
    /// [`ClientError::Config`] for settings that cannot be used, [`ClientError::Unreachable`] when nobody answered.
    pub async fn connect(config: ClientConfig) -> Result<Self, ClientError> {
        let endpoint = endpoint(&config)?;
        let start = Instant::now();
        let mut backoff = Backoff::new(config.backoff_min, config.backoff_max);
        loop {
            match endpoint.connect().await {
                Ok(channel) => return Ok(Self::with_channel(config, channel)),
                Err(error) => {
                    let pause = backoff.next();
                    if start.elapsed() + pause > config.retry_for {
                        return Err(unreachable(&config, start.elapsed(), innermost(&error)));
                    }
                    sleep(pause).await;
                }
            }
        }
    }

    /// Connects with the first request.
    ///
    /// # Errors
    /// [`ClientError::Config`] for settings that cannot be used.
    pub fn lazy(config: ClientConfig) -> Result<Self, ClientError> {
        let channel = endpoint(&config)?.connect_lazy();
        Ok(Self::with_channel(config, channel))
    }

    fn with_channel(config: ClientConfig, channel: Channel) -> Self {
        let (sequences, streams) = (Sequences::default(), AtomicU64::new(0));
        Self { shared: Arc::new(Shared { config, channel, sequences, streams }) }
    }

    /// The settings in use.
    #[must_use]
    pub fn config(&self) -> &ClientConfig {
        &self.shared.config
    }

    /// The connection, for services this crate does not wrap (health, reflection).
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.shared.channel.clone()
    }

    /// The life cycle of volumes. Served by the primary.
    #[must_use]
    pub fn volumes(&self) -> VolumeClient {
        VolumeClient::new(self.clone())
    }

    /// How the pair is doing. Served by the primary.
    #[must_use]
    pub fn replication(&self) -> ReplicationClient {
        ReplicationClient::new(self.clone())
    }

    /// What a backup offers, where this client is connected to one.
    #[must_use]
    pub fn backup(&self) -> BackupClient {
        BackupClient::new(self.clone())
    }

    /// Reads a volume of a snapshot, as of `range`.
    #[must_use]
    pub fn read_snapshot(&self, volume: &str, snapshot: &str, range: std::ops::Range<u64>) -> ReadStream {
        ReadStream::of_snapshot(self.clone(), volume.to_owned(), snapshot.to_owned(), range)
    }

    /// Looks a volume up by name and gives access to its blocks.
    ///
    /// # Errors
    /// [`ClientError::Rpc`] with `NotFound` if there is none.
    pub async fn volume(&self, name: &str) -> Result<VolumeHandle, ClientError> {
        let volume = self.volumes().find(GetVolumeRequest { volume_id: 0, volume: name.to_owned() }).await?;
        Ok(VolumeHandle::new(self.clone(), volume))
    }

    pub(crate) fn blocks(&self) -> BlockServiceClient<Channel> {
        let limit = self.shared.config.message_bytes_max;
        BlockServiceClient::new(self.channel()).max_decoding_message_size(limit).max_encoding_message_size(limit)
    }

    pub(crate) fn sequences(&self) -> &Sequences {
        &self.shared.sequences
    }

    /// An id for one more stream of writes, so that its sequences are its own.
    pub(crate) fn stream_id(&self) -> String {
        let number = self.shared.streams.fetch_add(1, Ordering::Relaxed);
        format!("{}/{number:x}", self.shared.config.client_id)
    }

    /// Sends `message` by `send`, bounded by the request timeout, and again where `repeat` allows it.
    pub(crate) async fn call<M, T, F>(
        &self,
        operation: &'static str,
        repeat: Repeat,
        message: M,
        mut send: impl FnMut(Request<M>) -> F,
    ) -> Result<T, ClientError>
    where
        M: Clone,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let config = self.config();
        let start = Instant::now();
        let mut backoff = Backoff::new(config.backoff_min, config.backoff_max);
        loop {
            let mut request = Request::new(message.clone());
            request.set_timeout(config.request_timeout);
            let status = match timeout(config.request_timeout, send(request)).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => {
                    Status::deadline_exceeded(format!("no answer within {:.1?}; try later", config.request_timeout))
                }
            };
            let unsent = was_not_sent(&status);
            let again = unsent || repeat == Repeat::Safe && is_loss(&status);
            let pause = backoff.next();
            if !again || start.elapsed() + pause > config.retry_for {
                return Err(if unsent {
                    unreachable(config, start.elapsed(), describe(&status))
                } else {
                    ClientError::rpc(operation, status)
                });
            }
            tracing::debug!(operation, error = %describe(&status), ?pause, "sending the request again");
            sleep(pause).await;
        }
    }
}

fn unreachable(config: &ClientConfig, waited: Duration, reason: String) -> ClientError {
    ClientError::Unreachable { url: config.url.clone(), waited, reason }
}

/// The transport's own message says "transport error"; the cause says what it was.
fn innermost(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |e| e.source()).last().map_or_else(String::new, ToString::to_string)
}

fn endpoint(config: &ClientConfig) -> Result<Endpoint, ClientError> {
    let bad = |setting, value: &str, reason: String| ClientError::Config { setting, value: value.to_owned(), reason };
    let id_bytes = config.client_id.len();
    if id_bytes == 0 || id_bytes > ClientConfig::CLIENT_ID_BYTES_MAX {
        let reason = format!("it has {id_bytes} bytes; use 1 to {}", ClientConfig::CLIENT_ID_BYTES_MAX);
        return Err(bad("client id", &config.client_id, reason));
    }
    let endpoint = Endpoint::from_shared(config.url.clone())
        .map_err(|e| bad("URL", &config.url, format!("{}; write http://host:port", innermost(&e))))?;
    let tls = match endpoint.uri().scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err(bad("URL", &config.url, "write http://host:port or https://host:port".to_owned())),
    };
    let endpoint = endpoint
        .connect_timeout(config.connect_timeout)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(config.keepalive_interval)
        .keep_alive_timeout(config.keepalive_timeout)
        .keep_alive_while_idle(false);
    if !tls {
        return Ok(endpoint);
    }
    endpoint.tls_config(tls_config(&config.tls)?).map_err(|e| bad("TLS files", &config.url, innermost(&e)))
}

fn tls_config(files: &TlsFiles) -> Result<ClientTlsConfig, ClientError> {
    let missing =
        |setting, reason: &str| ClientError::Config { setting, value: String::new(), reason: reason.to_owned() };
    let ca = files.ca.as_deref().ok_or_else(|| {
        missing("TLS ca", "an https URL needs the PEM file of the authority that signed the server's certificate")
    })?;
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read_pem("TLS ca", ca)?));
    match (&files.cert, &files.key) {
        (Some(cert), Some(key)) => {
            tls = tls.identity(Identity::from_pem(read_pem("TLS cert", cert)?, read_pem("TLS key", key)?));
        }
        (None, None) => {}
        _ => return Err(missing("TLS cert", "certificate and key go together; give both or neither")),
    }
    if let Some(name) = &files.server_name {
        tls = tls.domain_name(name);
    }
    Ok(tls)
}

fn read_pem(setting: &'static str, path: &Path) -> Result<Vec<u8>, ClientError> {
    std::fs::read(path).map_err(|e| ClientError::Config {
        setting,
        value: path.display().to_string(),
        reason: format!("{e}; give a readable PEM file"),
    })
}
