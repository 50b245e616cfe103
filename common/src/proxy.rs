//! A TCP proxy that stands for the link, in tests and in the demo: it can reset, freeze and slow down what goes through
//! it.
//!
//! Invariants: while frozen, connections are accepted and no byte moves (a half-open link: no reset, no end of file);
//! a cut ends every connection with RST, in both directions. Dropping the proxy cuts.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
    task::JoinHandle,
};

/// Bytes moved at a time: the grain of freezing and slowing.
const CHUNK_BYTES: usize = 16 * 1024;

/// What the link does with bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Passes them on at once.
    Open,
    /// Resets what is connected and what tries to connect.
    Cut,
    /// Accepts connections and passes on nothing.
    Frozen,
    /// Passes on so many bytes a second, for each connection and direction.
    Slow(u32),
}

/// State that the connections watch.
#[derive(Debug, Clone, Copy)]
struct State {
    link: Link,
    target: SocketAddr,
}

/// A link from [`Proxy::address`] to a target that may move.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    state: watch::Sender<State>,
    listener: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1; open.
    ///
    /// # Errors
    /// The listener cannot be made.
    pub async fn start(target: SocketAddr) -> io::Result<Self> {
        Self::start_at((Ipv4Addr::LOCALHOST, 0).into(), target).await
    }

    /// Listens on `address`; open.
    ///
    /// # Errors
    /// The listener cannot be made.
    pub async fn start_at(address: SocketAddr, target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (state, watched) = watch::channel(State { link: Link::Open, target });
        let listener = tokio::spawn(accept(listener, watched));
        Ok(Self { address, state, listener })
    }

    /// Where to connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the link, also for what is connected now.
    pub fn set(&self, link: Link) {
        self.state.send_modify(|state| state.link = link);
    }

    /// Where connections made from now on lead.
    pub fn retarget(&self, target: SocketAddr) {
        self.state.send_modify(|state| state.target = target);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.set(Link::Cut);
        self.listener.abort();
    }
}

async fn accept(listener: TcpListener, state: watch::Receiver<State>) {
    while let Ok((client, _)) = listener.accept().await {
        tokio::spawn(serve(client, state.clone()));
    }
}

/// Carries one connection until either end closes, an error, or a cut; then resets both ends.
async fn serve(mut client: TcpStream, mut state: watch::Receiver<State>) {
    let opened = wait_while_frozen(&mut state).await;
    let Some(State { target, .. }) = opened.filter(|state| state.link != Link::Cut) else {
        let _ = client.set_zero_linger();
        return;
    };
    let Ok(mut server) = TcpStream::connect(target).await else {
        let _ = client.set_zero_linger();
        return;
    };
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
        // Whatever ends the connection, both ends learn it by RST.
        let _ = stream.set_zero_linger();
    }
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    tokio::select! {
        () = carry(from_client, to_server, state.clone()) => {}
        () = carry(from_server, to_client, state.clone()) => {}
        () = until_cut(&mut state) => {}
    }
}

/// The state once it is not frozen; `None` when the proxy is gone.
async fn wait_while_frozen(state: &mut watch::Receiver<State>) -> Option<State> {
    state.wait_for(|state| state.link != Link::Frozen).await.ok().map(|state| *state)
}

async fn until_cut(state: &mut watch::Receiver<State>) {
    // An error means that the proxy is gone, which is a cut.
    let _ = state.wait_for(|state| state.link == Link::Cut).await;
}

async fn carry(mut from: tcp::ReadHalf<'_>, mut to: tcp::WriteHalf<'_>, mut state: watch::Receiver<State>) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        // Bytes read just before the freeze wait here, and are lost with the connection if a cut follows.
        let Some(now) = wait_while_frozen(&mut state).await else { return };
        if let Link::Slow(bytes_per_second) = now.link {
            #[allow(clippy::cast_precision_loss, reason = "at most a chunk")]
            let seconds = count as f64 / f64::from(bytes_per_second.max(1));
            tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends back what it gets.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        address
    }

    async fn round_trip(stream: &mut TcpStream) -> io::Result<u8> {
        stream.write_all(b"x").await?;
        stream.read_u8().await
    }

    #[tokio::test]
    async fn open_link_carries_both_ways() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(round_trip(&mut stream).await.unwrap(), b'x');
    }

    #[tokio::test]
    async fn cut_resets_what_is_connected_and_what_connects() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let mut old = TcpStream::connect(proxy.address()).await.unwrap();
        round_trip(&mut old).await.unwrap();
        proxy.set(Link::Cut);
        assert_eq!(old.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        // The reset may come before or after the handshake is seen to be complete.
        if let Ok(mut new) = TcpStream::connect(proxy.address()).await {
            assert!(round_trip(&mut new).await.is_err());
        }
    }

    #[tokio::test]
    async fn frozen_link_accepts_and_carries_nothing_until_it_thaws() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        proxy.set(Link::Frozen);
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        stream.write_all(b"y").await.unwrap();
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(stream.try_read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        proxy.set(Link::Open);
        assert_eq!(stream.read_u8().await.unwrap(), b'y');
    }

    #[tokio::test]
    async fn slow_link_carries_everything() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        proxy.set(Link::Slow(1 << 20));
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        let sent = vec![7; 3 * CHUNK_BYTES];
        stream.write_all(&sent).await.unwrap();
        let mut got = vec![0; sent.len()];
        stream.read_exact(&mut got).await.unwrap();
        assert_eq!(got, sent);
    }
}
