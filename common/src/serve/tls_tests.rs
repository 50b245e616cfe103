//! The accept loop with real certificates over a real socket.

use std::{path::PathBuf, sync::Arc, time::SystemTime};

use http_body_util::{BodyExt, Full};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore, SupportedProtocolVersion,
        crypto::ring::default_provider,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
        version::{TLS12, TLS13},
    },
};

use super::*;
use crate::tls;

/// Certificates of one authority in a folder.
struct Authority {
    folder: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { folder, issuer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes `NAME.pem` and `NAME.key` of a certificate that ends in 2033.
    fn issue(&self, name: &str) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(2033, 5, 18);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let (pem, key_pem) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
        std::fs::write(&pem, certificate.pem()).unwrap();
        std::fs::write(&key_pem, key.serialize_pem()).unwrap();
        (pem, key_pem)
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.path("ca.pem")).unwrap()).unwrap();
        roots
    }
}

/// Serves what answers with the number of certificates of its peer.
async fn server(tls: TlsAcceptor) -> (SocketAddr, CancellationToken) {
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = tower::service_fn(async |request: Request<Incoming>| {
        let count = request.extensions().get::<Peer>().unwrap().certificates.len();
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(count.to_string()))))
    });
    let shutdown = CancellationToken::new();
    let limits = ServeLimits::default();
    tokio::spawn(serve(listener, Protocol::Grpc, Some(tls), limits, service, shutdown.clone()));
    (address, shutdown)
}

/// One call; an error of any stage is its text.
async fn call(
    address: SocketAddr,
    roots: RootCertStore,
    identity: Option<(PathBuf, PathBuf)>,
    version: &'static SupportedProtocolVersion,
) -> Result<Bytes, String> {
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((pem, key)) => {
            let chain = vec![CertificateDer::from_pem_file(pem).unwrap()];
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key).unwrap()).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|e| e.to_string())?;
    let (mut client, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    let request = Request::get("https://localhost/").body(Full::<Bytes>::default()).unwrap();
    let response = client.send_request(request).await.map_err(|e| e.to_string())?;
    Ok(response.into_body().collect().await.map_err(|e| e.to_string())?.to_bytes())
}

#[tokio::test]
async fn tls_is_version_1_3_alone_and_its_end_is_known() {
    let authority = Authority::new();
    let (pem, key) = authority.issue("server");
    let tls = tls::server(&pem, &key, None, "h2").unwrap();
    let expiry = tls.expiry.unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(expiry.as_secs(), 1_999_987_200, "2033-05-18");
    let (address, _shutdown) = server(tls.acceptor).await;
    assert_eq!(call(address, authority.roots(), None, &TLS13).await.unwrap(), "0");
    call(address, authority.roots(), None, &TLS12).await.unwrap_err();
    call(address, Authority::new().roots(), None, &TLS13).await.unwrap_err();
}

#[tokio::test]
async fn with_authorities_only_their_clients_are_served() {
    let authority = Authority::new();
    let (pem, key) = authority.issue("server");
    let tls = tls::server(&pem, &key, Some(&authority.path("ca.pem")), "h2").unwrap();
    let (address, _shutdown) = server(tls.acceptor).await;
    let identity = Some(authority.issue("client"));
    assert_eq!(call(address, authority.roots(), identity, &TLS13).await.unwrap(), "1");
    call(address, authority.roots(), None, &TLS13).await.unwrap_err();
    let stranger = Authority::new();
    call(address, authority.roots(), Some(stranger.issue("client")), &TLS13).await.unwrap_err();
}

#[test]
fn unusable_files_are_named() {
    let authority = Authority::new();
    let (pem, key) = authority.issue("server");
    let (_, other_key) = authority.issue("other");
    for (certificate, key, part) in [
        (&key, &key, "holds no certificate"),
        (&pem, &pem, "no private key"),
        (&pem, &other_key, "belong together"),
        (&authority.path("absent"), &key, "absent"),
    ] {
        let error = tls::server(certificate, key, None, "h2").map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(part), "{part} is not in {error}");
    }
}
