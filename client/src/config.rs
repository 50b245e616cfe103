//! What a client may be told.

use std::path::PathBuf;
use std::time::Duration;

use rand::rngs::OsRng;
use rand::{Rng, TryRngCore};

/// PEM files for `https` URLs.
#[derive(Debug, Clone, Default)]
pub struct TlsFiles {
    /// Certificates that the server's chain must end in. Required: the system's roots are not consulted.
    pub ca: Option<PathBuf>,
    /// This client's certificate chain; goes with `key`.
    pub cert: Option<PathBuf>,
    /// Private key of `cert`.
    pub key: Option<PathBuf>,
    /// Name expected in the server's certificate; by default the host of the URL.
    pub server_name: Option<String>,
}

/// Settings of a [`Client`](crate::Client). [`ClientConfig::new`] gives the defaults named at each field.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// `http://host:port` or `https://host:port`. The name is resolved anew for each connection.
    pub url: String,
    /// Used where the URL is `https`.
    pub tls: TlsFiles,
    /// Names the writer to the server, at most [`ClientConfig::CLIENT_ID_BYTES_MAX`] bytes. Default: random. Two live
    /// clients must not share one: their sequences would be taken for repetitions of each other.
    pub client_id: String,
    /// Largest message sent or received, in bytes. Default 8 MiB; the server has a limit of its own.
    pub message_bytes_max: usize,
    /// Bound of one attempt to connect. Default 2 s.
    pub connect_timeout: Duration,
    /// Bound of one request, and of the silence between two answers of a stream of reads. Default 30 s.
    pub request_timeout: Duration,
    /// How long a request that is safe to repeat is repeated while the server is away. Default 10 s; 0 tries once.
    pub retry_for: Duration,
    /// Silence on a connection in use after which the peer is asked for a sign of life. Default 2 s.
    pub keepalive_interval: Duration,
    /// How long the sign of life may take before the connection counts as lost. Default 4 s.
    pub keepalive_timeout: Duration,
    /// First pause between two attempts; each one doubles it, with jitter. Default 50 ms.
    pub backoff_min: Duration,
    /// Longest pause between two attempts. Default 2 s.
    pub backoff_max: Duration,
}

impl ClientConfig {
    /// The protocol allows 64 bytes; 16 are kept to tell the streams of one client apart.
    pub const CLIENT_ID_BYTES_MAX: usize = 48;

    /// Defaults for the server at `url`.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            tls: TlsFiles::default(),
            client_id: format!("{:032x}", OsRng.unwrap_err().random::<u128>()),
            message_bytes_max: 8 << 20,
            connect_timeout: Duration::from_secs(2),
            request_timeout: Duration::from_secs(30),
            retry_for: Duration::from_secs(10),
            keepalive_interval: Duration::from_secs(2),
            keepalive_timeout: Duration::from_secs(4),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(2),
        }
    }

    /// Largest payload of one write: the message limit less room for the other fields.
    pub(crate) fn payload_bytes_max(&self) -> usize {
        self.message_bytes_max.saturating_sub(1024)
    }
}
