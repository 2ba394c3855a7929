//! A real S3 server over a directory.
#![allow(dead_code)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use kvmesh_kvbm::tiers::Credentials;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;

pub const KEY: &str = "tests";
pub const SECRET: &str = "no-secret-at-all";
const BUCKET: &str = "blocks";
pub const URL: &str = "s3://blocks/of/kvmesh";

pub fn credentials() -> Credentials {
    Credentials {
        access_key_id: KEY.into(),
        secret_access_key: SECRET.into(),
        session_token: None,
    }
}

/// The directory of the objects below `URL` of a server over `root`.
pub fn objects_in(root: &Path) -> PathBuf {
    root.join(BUCKET).join("of/kvmesh")
}

/// Serves the buckets of a directory until it is dropped.
pub async fn serve(listener: TcpListener, root: &Path, key: &str, secret: &str) {
    let files = s3s_fs::FileSystem::new(root).expect("a directory");
    let mut service = S3ServiceBuilder::new(files);
    service.set_auth(SimpleAuth::from_single(key, secret));
    let service = service.build();
    let http = Builder::new(TokioExecutor::new());
    loop {
        let Ok((socket, _)) = listener.accept().await else {
            continue;
        };
        let connection = http.serve_connection(TokioIo::new(socket), service.clone());
        let connection = connection.into_owned();
        tokio::spawn(async move {
            let _ = connection.await;
        });
    }
}

/// A server in this process, with one bucket. Dropped, it is gone, and its connections with it.
pub struct S3Server {
    address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

impl S3Server {
    /// On a port of its own, or of one that is gone.
    pub fn start(root: &Path, port: Option<u16>) -> Self {
        std::fs::create_dir_all(root.join(BUCKET)).expect("a bucket");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = runtime
            .block_on(TcpListener::bind(("127.0.0.1", port.unwrap_or(0))))
            .expect("a port");
        let address = listener.local_addr().expect("an address");
        let root = root.to_owned();
        runtime.spawn(async move { serve(listener, &root, KEY, SECRET).await });
        Self {
            address,
            _runtime: runtime,
        }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
}
