use std::{convert::Infallible, sync::Arc};

use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{SendRequest, handshake};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::{Notify, mpsc},
    task::JoinHandle,
};

use super::*;

/// A network of pipes in virtual time; each `None` is a failed accept.
struct Pipes(tokio::sync::Mutex<mpsc::Receiver<Option<DuplexStream>>>);

impl Accept for Pipes {
    type Io = DuplexStream;

    async fn accept(&self) -> io::Result<(DuplexStream, SocketAddr)> {
        match self.0.lock().await.recv().await {
            Some(Some(io)) => Ok((io, SocketAddr::from(([127, 0, 0, 1], 1)))),
            Some(None) => Err(io::Error::other("too many open files")),
            None => std::future::pending().await,
        }
    }
}

struct Server {
    connect: mpsc::Sender<Option<DuplexStream>>,
    shutdown: CancellationToken,
    done: JoinHandle<usize>,
    /// Lets calls to `/slow` answer.
    release: Arc<Notify>,
    /// Told when a call to `/slow` arrived.
    arrived: Arc<Notify>,
    seen: Arc<Mutex<Vec<SocketAddr>>>,
}

fn server(protocol: Protocol, limits: ServeLimits) -> Server {
    let (connect, connections) = mpsc::channel(8);
    let (release, arrived) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let shutdown = CancellationToken::new();
    let service = {
        let (release, arrived, seen) = (release.clone(), arrived.clone(), seen.clone());
        tower::service_fn(move |request: Request<Incoming>| {
            let (release, arrived) = (release.clone(), arrived.clone());
            let peer = request.extensions().get::<Peer>().expect("every request names its peer").address;
            seen.lock().push(peer);
            async move {
                if request.uri().path() == "/slow" {
                    arrived.notify_one();
                    release.notified().await;
                }
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
            }
        })
    };
    let pipes = Pipes(tokio::sync::Mutex::new(connections));
    let done = tokio::spawn(serve(pipes, protocol, None, limits, service, shutdown.clone()));
    Server { connect, shutdown, done, release, arrived, seen }
}

impl Server {
    async fn pipe(&self) -> DuplexStream {
        let (near, far) = duplex(1 << 16);
        self.connect.send(Some(far)).await.unwrap();
        near
    }

    async fn client(&self) -> SendRequest<Full<Bytes>> {
        let (client, connection) = handshake(TokioExecutor::new(), TokioIo::new(self.pipe().await)).await.unwrap();
        tokio::spawn(connection);
        client
    }
}

async fn get(client: &mut SendRequest<Full<Bytes>>, path: &str) -> hyper::Result<Bytes> {
    let request = Request::get(format!("http://host{path}")).body(Full::default()).unwrap();
    Ok(client.send_request(request).await?.into_body().collect().await?.to_bytes())
}

#[tokio::test(start_paused = true)]
async fn calls_are_answered_and_know_their_peer() {
    let server = server(Protocol::Grpc, ServeLimits::default());
    assert_eq!(get(&mut server.client().await, "/").await.unwrap(), "hello");
    assert_eq!(server.seen.lock().as_slice(), [SocketAddr::from(([127, 0, 0, 1], 1))]);
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_loses_its_place() {
    let server = server(Protocol::Grpc, ServeLimits { connections: 1, ..ServeLimits::default() });
    let mut silent = server.pipe().await;
    // The only place is taken until the silent one is dropped, then this call goes through.
    assert_eq!(get(&mut server.client().await, "/").await.unwrap(), "hello");
    let mut rest = Vec::new();
    silent.read_to_end(&mut rest).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_preface_without_a_request_is_not_enough() {
    let server = server(Protocol::Grpc, ServeLimits { connections: 1, ..ServeLimits::default() });
    let mut preface = server.pipe().await;
    preface.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    assert_eq!(get(&mut server.client().await, "/").await.unwrap(), "hello");
}

#[tokio::test(start_paused = true)]
async fn failed_accepts_are_survived() {
    let server = server(Protocol::Grpc, ServeLimits::default());
    for _ in 0..5 {
        server.connect.send(None).await.unwrap();
    }
    assert_eq!(get(&mut server.client().await, "/").await.unwrap(), "hello");
}

#[tokio::test(start_paused = true)]
async fn open_calls_end_before_the_drain_does() {
    let server = server(Protocol::Grpc, ServeLimits::default());
    let mut client = server.client().await;
    let call = tokio::spawn(async move { get(&mut client, "/slow").await });
    server.arrived.notified().await;
    server.shutdown.cancel();
    server.release.notify_one();
    assert_eq!(call.await.unwrap().unwrap(), "hello");
    assert_eq!(server.done.await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_outlives_the_drain_is_dropped() {
    let server = server(Protocol::Grpc, ServeLimits::default());
    let mut client = server.client().await;
    let call = tokio::spawn(async move { get(&mut client, "/slow").await });
    server.arrived.notified().await;
    server.shutdown.cancel();
    assert_eq!(server.done.await.unwrap(), 1);
    assert!(call.await.unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn the_admin_protocol_is_http_1() {
    let server = server(Protocol::Http1, ServeLimits::default());
    let mut pipe = server.pipe().await;
    pipe.write_all(b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    pipe.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("hello"), "{answer}");
    // Half a head is cut off in time.
    let mut slow = server.pipe().await;
    slow.write_all(b"GET / HT").await.unwrap();
    slow.read_to_string(&mut answer).await.unwrap();
}
