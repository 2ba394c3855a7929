//! The service: objects by name, every call with a deadline.

use std::fmt;
use std::future::IntoFuture;
use std::time::{Duration, SystemTime};

use futures::TryStreamExt;
use opendal::layers::RetryLayer;
use opendal::services::{Fs, S3};
use opendal::{Buffer, ErrorKind, Operator};
use tokio::sync::Semaphore;

use super::ObjectSettings;
use crate::error::{Error, Result};

/// Calls under way at a time, of reading and of writing.
const READS: usize = 32;
const WRITES: usize = 8;
/// Of one call, in which it is tried again after a passing failure.
const RETRIES: usize = 2;
const DELETIONS: usize = 5;
const RETRY_AFTER: Duration = Duration::from_millis(50);
const RETRY_WITHIN: Duration = Duration::from_millis(500);
/// Objects that are listed at most.
const LISTED: usize = 1 << 22;
/// What is written to see whether anything can be.
const PROBE_BYTES: usize = 64 << 10;
/// Where files are written before they get their names.
const WRITING: &str = ".writing";
const DEFAULT_REGION: &str = "us-east-1";

/// Why a call gave nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// There is no such object.
    Absent,
    /// The service does not do.
    Broken(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => {
                f.write_str("no such bucket or object; make it, or correct kvbm.object.url")
            }
            Self::Broken(why) => f.write_str(why),
        }
    }
}

type Outcome<T> = std::result::Result<T, Failure>;

/// One object of a listing.
pub(super) struct Listed {
    pub(super) path: String,
    pub(super) modified: SystemTime,
}

pub(super) struct Bucket {
    operator: Operator,
    timeout: Duration,
    reads: Semaphore,
    writes: Semaphore,
}

impl Bucket {
    /// Makes no call to the service. Fails for a URL that is none, and for a directory that cannot be had.
    pub(super) fn open(settings: &ObjectSettings) -> Result<Self> {
        let operator = operator(settings)?;
        let retries = RetryLayer::new()
            .with_max_times(RETRIES)
            .with_min_delay(RETRY_AFTER)
            .with_max_delay(RETRY_WITHIN)
            .with_jitter();
        Ok(Self {
            operator: operator.layer(retries),
            timeout: settings.timeout,
            reads: Semaphore::new(READS),
            writes: Semaphore::new(WRITES),
        })
    }

    pub(super) async fn get(&self, path: &str) -> Outcome<Buffer> {
        let _turn = self.reads.acquire().await;
        self.call(self.operator.read(path)).await
    }

    pub(super) async fn put(&self, path: &str, body: Vec<u8>) -> Outcome<()> {
        let _turn = self.writes.acquire().await;
        self.call(self.operator.write(path, body)).await.map(drop)
    }

    /// Deletes those that are there.
    pub(super) async fn delete(&self, paths: Vec<String>) -> Outcome<()> {
        let _turn = self.writes.acquire().await;
        for _ in 0..DELETIONS {
            match self.call(self.operator.delete_iter(paths.clone())).await {
                // Another store deletes the same ones: those behind it are to be deleted still.
                Err(Failure::Absent) => {}
                deleted => return deleted,
            }
        }
        // What is left is found by the next listing.
        Ok(())
    }

    /// All objects whose names begin so.
    pub(super) async fn list(&self, beginning: &str) -> Outcome<Vec<Listed>> {
        let _turn = self.reads.acquire().await;
        let list = self.operator.lister_with(beginning).recursive(true);
        let mut lister = match self.call(list).await {
            Ok(lister) => lister,
            Err(Failure::Absent) => return Ok(Vec::new()),
            Err(failure) => return Err(failure),
        };
        let mut listed = Vec::new();
        // Each page has the whole time.
        loop {
            let entry = match self.call(lister.try_next()).await {
                Ok(Some(entry)) if listed.len() < LISTED => entry,
                Ok(_) => return Ok(listed),
                Err(failure) => return Err(failure),
            };
            if !entry.metadata().is_file() {
                continue;
            }
            let path = entry.path().to_owned();
            let modified = match entry.metadata().last_modified() {
                Some(time) => Some(time),
                // Of files the listing says nothing.
                None => match self.call(self.operator.stat(&path)).await {
                    Ok(metadata) => metadata.last_modified(),
                    Err(Failure::Absent) => continue,
                    Err(failure) => return Err(failure),
                },
            };
            listed.push(Listed {
                path,
                modified: modified.map_or(SystemTime::UNIX_EPOCH, SystemTime::from),
            });
        }
    }

    /// The first object whose name begins so.
    pub(super) async fn first(&self, beginning: String) -> Outcome<Option<String>> {
        let _turn = self.reads.acquire().await;
        let found = async {
            let mut lister = self.operator.lister_with(&beginning).limit(1).await?;
            while let Some(entry) = lister.try_next().await? {
                if entry.metadata().is_file() {
                    return Ok(Some(entry.into_parts().0));
                }
            }
            Ok(None)
        };
        match self.call(found).await {
            Err(Failure::Absent) => Ok(None),
            found => found,
        }
    }

    /// Whether objects can be written, read and deleted.
    pub(super) async fn probe(&self, path: &str) -> Outcome<()> {
        self.put(path, vec![0x5A; PROBE_BYTES]).await?;
        self.get(path).await?;
        self.delete(vec![path.into()]).await
    }

    async fn call<T>(&self, call: impl IntoFuture<Output = opendal::Result<T>>) -> Outcome<T> {
        match tokio::time::timeout(self.timeout, call.into_future()).await {
            Ok(result) => result.map_err(failure),
            Err(_) => Err(Failure::Broken(format!(
                "no answer within {} s",
                self.timeout.as_secs_f64()
            ))),
        }
    }
}

/// In words of which none is a secret, whatever the service has answered.
fn failure(error: opendal::Error) -> Failure {
    let why = match error.kind() {
        ErrorKind::NotFound => return Failure::Absent,
        ErrorKind::PermissionDenied => {
            "access denied; correct the credentials, or what they may do (get, put, delete, list)"
                .into()
        }
        ErrorKind::RateLimited => {
            "too many requests; it must allow more, or fewer stores use it".into()
        }
        ErrorKind::ConfigInvalid => {
            "no such bucket, or it is not to be had as configured; correct kvbm.object".into()
        }
        kind => format!("{kind}: {}", root_cause(&error)),
    };
    Failure::Broken(why)
}

/// What the innermost error says: a refused connection, a full disk.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let said = cause.to_string();
    said.lines()
        .next()
        .unwrap_or_default()
        .chars()
        .take(200)
        .collect()
}

/// Where objects are kept.
enum Place<'a> {
    Files(&'a str),
    Bucket { name: &'a str, prefix: &'a str },
}

/// Fails for a URL that is none.
pub(super) fn check_url(url: &str) -> Result<()> {
    place_of(url).map(drop)
}

fn place_of(url: &str) -> Result<Place<'_>> {
    let refused = |why: &str| {
        Err(Error::Invalid(format!(
            "{why}, not {url:?}; correct kvbm.object.url"
        )))
    };
    if let Some(path) = url.strip_prefix("fs://") {
        return match path.starts_with('/') {
            true => Ok(Place::Files(path)),
            false => refused("a directory is named as fs:///path"),
        };
    }
    let Some(rest) = url.strip_prefix("s3://") else {
        return refused("object storage is named as s3://bucket/prefix or fs:///path");
    };
    match rest.split_once('/').unwrap_or((rest, "")) {
        ("", _) => refused("a bucket is named as s3://bucket/prefix"),
        (name, prefix) => Ok(Place::Bucket { name, prefix }),
    }
}

fn operator(settings: &ObjectSettings) -> Result<Operator> {
    // The HTTP client, which is made for files too, wants one to have been chosen; a second choice changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let built = match place_of(&settings.url)? {
        Place::Files(path) => {
            let writing = format!("{}/{WRITING}", path.trim_end_matches('/'));
            let files = Fs::default().root(path).atomic_write_dir(&writing);
            Operator::new(files).map(|builder| builder.finish())
        }
        Place::Bucket { name, prefix } => {
            Operator::new(s3(settings, name, prefix)).map(|builder| builder.finish())
        }
    };
    built.map_err(|error| Error::Storage {
        at: settings.url.clone(),
        why: failure(error).to_string(),
    })
}

fn s3(settings: &ObjectSettings, bucket: &str, prefix: &str) -> S3 {
    let region = settings.region.clone();
    let region = region.or_else(|| std::env::var("AWS_REGION").ok());
    let mut s3 = S3::default()
        .bucket(bucket)
        .root(&format!("/{prefix}"))
        .region(region.as_deref().unwrap_or(DEFAULT_REGION));
    if let Some(endpoint) = &settings.endpoint {
        s3 = s3.endpoint(endpoint);
    }
    if let Some(credentials) = &settings.credentials {
        s3 = s3
            .access_key_id(&credentials.access_key_id)
            .secret_access_key(&credentials.secret_access_key);
        if let Some(token) = &credentials.session_token {
            s3 = s3.session_token(token);
        }
    }
    s3
}
