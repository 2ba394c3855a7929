//! `s3_server DIRECTORY PORT KEY SECRET`: a real S3 server for tests, whose buckets are a directory's directories.

#[path = "../tests/common/s3.rs"]
mod s3;

use std::path::Path;

use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [root, port, key, secret] = &arguments[..] else {
        eprintln!("s3_server DIRECTORY PORT KEY SECRET");
        std::process::exit(2);
    };
    let listener = TcpListener::bind(format!("127.0.0.1:{port}")).await?;
    s3::serve(listener, Path::new(root), key, secret).await;
    Ok(())
}
