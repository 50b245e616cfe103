//! The accept loop of every listener, with a deadline for each stage of a connection and a bound on each resource.
//!
//! A connection takes its place before it is accepted, so that more of them wait in the backlog instead of in memory; it
//! loses it when it does not finish TLS, or send a first request, in time. From then on HTTP/2 keepalive finds peers
//! that are gone. When the process runs out of file descriptors the loop waits and goes on. At shutdown it stops
//! accepting, asks each peer to go away, waits for open calls until the drain deadline, and then drops what is left.
//!
//! What is absent on purpose: HTTP/1 upgrade, protocol detection, TLS below 1.3.

use std::{
    convert::Infallible,
    error::Error as StdError,
    future::Future,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, rustls::pki_types::CertificateDer};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::{Service, ServiceExt};
use tracing::{debug, warn};

/// Pause after a failed accept (out of file descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listener could not be opened.
#[derive(Debug, Error)]
#[error("cannot listen on {address}: {source}; choose another address or stop what uses it")]
pub struct BindError {
    /// As configured.
    pub address: SocketAddr,
    /// Why.
    pub source: io::Error,
}

/// Opens a listener. Port 0 takes a free one; `local_addr` tells which.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, source })
}

/// Where connections come from: the operating system, or a simulated network.
pub trait Accept: Send + 'static {
    /// One connection.
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;
    /// Waits for the next connection. Cancel-safe.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Io, SocketAddr)>> + Send;
}

impl Accept for TcpListener {
    type Io = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, peer) = Self::accept(self).await?;
        stream.set_nodelay(true)?;
        Ok((stream, peer))
    }
}

/// What is spoken on a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2 with prior knowledge.
    Grpc,
    /// HTTP/1.1, for the admin port.
    Http1,
}

/// Bounds of a listener.
#[derive(Debug, Clone)]
pub struct ServeLimits {
    /// Open connections.
    pub connections: usize,
    /// Concurrent calls on one of them.
    pub streams: u32,
    /// From accepting to the end of the TLS handshake, and from there to the first request.
    pub handshake: Duration,
    /// Idle time after which the peer is asked whether it is there.
    pub keepalive_interval: Duration,
    /// Time it has to answer.
    pub keepalive_timeout: Duration,
    /// After shutdown began, time that open calls have to end.
    pub drain: Duration,
}

impl Default for ServeLimits {
    fn default() -> Self {
        Self {
            connections: 64,
            streams: 64,
            handshake: Duration::from_secs(3),
            keepalive_interval: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(5),
            drain: Duration::from_secs(5),
        }
    }
}

/// Who is at the other end. An extension of every request.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Where it connected from.
    pub address: SocketAddr,
    /// Its verified chain, own certificate first; empty without TLS or without client authorities.
    pub certificates: Arc<[CertificateDer<'static>]>,
}

/// Accepts and serves until `shutdown`, then drains. Returns when the last connection is gone or the drain deadline has
/// passed; the number is that of connections dropped by it.
pub async fn serve<A, S, B>(
    listener: A,
    protocol: Protocol,
    tls: Option<TlsAcceptor>,
    limits: ServeLimits,
    service: S,
    shutdown: CancellationToken,
) -> usize
where
    A: Accept,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let places = Arc::new(Semaphore::new(limits.connections));
    let connections = TaskTracker::new();
    // Dropped with this future: what the deadline leaves behind does not outlive it.
    let abort = CancellationToken::new();
    let _abort_on_drop = abort.clone().drop_guard();
    while let Some((io, address, place)) = next(&listener, &places, &shutdown).await {
        let connection = Connection {
            protocol,
            tls: tls.clone(),
            limits: limits.clone(),
            service: service.clone(),
            shutdown: shutdown.clone(),
        };
        let abort = abort.clone();
        connections.spawn(async move {
            let _place = place;
            let _ = abort.run_until_cancelled(connection.run(io, address)).await;
        });
    }
    drop(listener);
    connections.close();
    if timeout(limits.drain, connections.wait()).await.is_ok() { 0 } else { connections.len() }
}

/// The next connection and its place; `None` at shutdown.
async fn next<A: Accept>(
    listener: &A,
    places: &Arc<Semaphore>,
    shutdown: &CancellationToken,
) -> Option<(A::Io, SocketAddr, OwnedSemaphorePermit)> {
    let accepted = async {
        let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let mut failures = 0_u64;
        loop {
            match listener.accept().await {
                Ok((io, address)) => return (io, address, place),
                Err(error) => {
                    // One line at the start of a trouble, then one every ten seconds.
                    if failures.is_multiple_of(100) {
                        warn!(%error, failures, "cannot accept connections; check the limit of open files");
                    }
                    failures += 1;
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    shutdown.run_until_cancelled(accepted).await
}

/// One connection, from the handshake to its end.
struct Connection<S> {
    protocol: Protocol,
    tls: Option<TlsAcceptor>,
    limits: ServeLimits,
    service: S,
    shutdown: CancellationToken,
}

impl<S, B> Connection<S>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    async fn run(self, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, address: SocketAddr) {
        let Some(tls) = &self.tls else {
            return self.speak(io, Peer { address, certificates: Arc::new([]) }).await;
        };
        match timeout(self.limits.handshake, tls.accept(io)).await {
            Ok(Ok(io)) => {
                let certificates = io.get_ref().1.peer_certificates().unwrap_or_default();
                let certificates = certificates.iter().map(|each| each.clone().into_owned()).collect();
                self.speak(io, Peer { address, certificates }).await;
            }
            Ok(Err(error)) => debug!(%address, %error, "TLS handshake failed"),
            Err(_) => debug!(%address, "TLS handshake took too long"),
        }
    }

    async fn speak(self, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, peer: Peer) {
        let address = peer.address;
        let heard = Arc::new(AtomicBool::new(false));
        let service = {
            let (service, heard) = (self.service.clone(), heard.clone());
            service_fn(move |mut request: Request<Incoming>| {
                heard.store(true, Ordering::Relaxed);
                request.extensions_mut().insert(peer.clone());
                service.clone().oneshot(request)
            })
        };
        let io = TokioIo::new(io);
        let result = match self.protocol {
            Protocol::Grpc => {
                let mut connection = pin!(self.http2().serve_connection(io, service));
                tokio::select! {
                    biased;
                    result = connection.as_mut() => result,
                    () = self.ends(&heard) => {
                        connection.as_mut().graceful_shutdown();
                        self.last(&heard, connection).await
                    }
                }
            }
            Protocol::Http1 => {
                let mut connection = pin!(self.http1().serve_connection(io, service));
                tokio::select! {
                    biased;
                    result = connection.as_mut() => result,
                    () = self.ends(&heard) => {
                        connection.as_mut().graceful_shutdown();
                        self.last(&heard, connection).await
                    }
                }
            }
        };
        if let Err(error) = result {
            debug!(%address, %error, "connection ended");
        }
    }

    /// Resolves at shutdown, or when the peer did not send a first request in time.
    async fn ends(&self, heard: &AtomicBool) {
        let silent = async {
            sleep(self.limits.handshake).await;
            if heard.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        };
        let _ = self.shutdown.run_until_cancelled(silent).await;
    }

    /// Drives a connection that was told to end. One that never spoke gets no time for it.
    async fn last(&self, heard: &AtomicBool, connection: impl Future<Output = hyper::Result<()>>) -> hyper::Result<()> {
        if heard.load(Ordering::Relaxed) { connection.await } else { Ok(()) }
    }

    fn http2(&self) -> hyper::server::conn::http2::Builder<TokioExecutor> {
        let mut http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        http2
            .timer(TokioTimer::new())
            .keep_alive_interval(self.limits.keepalive_interval)
            .keep_alive_timeout(self.limits.keepalive_timeout)
            .max_concurrent_streams(self.limits.streams)
            // Measured: twice the throughput of the defaults for 64 KiB and 1 MiB messages.
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
            .max_frame_size(256 << 10)
            .max_header_list_size(16 << 10);
        http2
    }

    fn http1(&self) -> hyper::server::conn::http1::Builder {
        let mut http1 = hyper::server::conn::http1::Builder::new();
        http1.timer(TokioTimer::new()).header_read_timeout(self.limits.handshake).max_buf_size(64 << 10);
        http1
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
