//! TLS of the streams' connections: certificates of the mesh's own, on both ends.

use std::{io, sync::Arc, time::Duration};

use parking_lot::RwLock;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::{reactor::Reactor, socket::Socket};

type Tcp = Socket<std::net::TcpStream>;

/// A peer that does not come to terms within it is let go.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);

/// What a process shows and whom it trusts, in PEM.
#[derive(Clone, Debug)]
pub struct Certificates {
    /// The process's certificate chain.
    pub cert: Vec<u8>,
    /// Its private key.
    pub key: Vec<u8>,
    /// The authorities of all others' certificates.
    pub ca: Vec<u8>,
    /// Whether callers must show a certificate of those authorities.
    pub require_client: bool,
    /// The name servers' certificates carry; empty: the host they are reached by.
    pub server_name: String,
}

/// Both ends' settings, made of [`Certificates`].
pub(crate) struct Tls {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    server_name: String,
}

/// The settings new connections get; none: plain ones.
pub(crate) type Current = Arc<RwLock<Option<Arc<Tls>>>>;

impl Tls {
    /// Fails with `InvalidData` where the certificates cannot be used.
    pub fn new(certificates: &Certificates) -> io::Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for authority in chain(&certificates.ca)? {
            roots.add(authority).map_err(unusable)?;
        }
        let roots = Arc::new(roots);
        let chain = chain(&certificates.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&certificates.key).map_err(unusable)?;
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(unusable)?;
        let mut server = server_builder(provider, roots, certificates.require_client)?
            .with_single_cert(chain, key)
            .map_err(unusable)?;
        client.alpn_protocols = vec![b"h2".to_vec()];
        server.alpn_protocols = client.alpn_protocols.clone();
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connector: TlsConnector::from(Arc::new(client)),
            server_name: certificates.server_name.clone(),
        })
    }

    /// The server's end of a connection.
    pub async fn accept(
        &self,
        stream: Tcp,
        reactor: &Arc<Reactor>,
    ) -> io::Result<server::TlsStream<Tcp>> {
        reactor
            .within(HANDSHAKE_WITHIN, self.acceptor.accept(stream))
            .await?
    }

    /// The caller's end of a connection to `host`.
    pub async fn connect(
        &self,
        host: &str,
        stream: Tcp,
        reactor: &Arc<Reactor>,
    ) -> io::Result<client::TlsStream<Tcp>> {
        let name = if self.server_name.is_empty() {
            host
        } else {
            &self.server_name
        };
        let name = ServerName::try_from(name.to_owned()).map_err(unusable)?;
        reactor
            .within(HANDSHAKE_WITHIN, self.connector.connect(name, stream))
            .await?
    }
}

fn server_builder(
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    require_client: bool,
) -> io::Result<rustls::ConfigBuilder<ServerConfig, rustls::server::WantsServerCert>> {
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?;
    if !require_client {
        return Ok(builder.with_no_client_auth());
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
        .build()
        .map_err(unusable)?;
    Ok(builder.with_client_cert_verifier(verifier))
}

fn chain(pem: &[u8]) -> io::Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(unusable)?;
    if certificates.is_empty() {
        return Err(unusable("there is no certificate in the file"));
    }
    Ok(certificates)
}

fn unusable(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
