//! The writing side: a queue that never blocks, and a thread that writes files.
//!
//! The queue is bounded in bytes. What does not fit, or could not be written, is dropped; then nothing more is written until the
//! thread has caught up and a snapshot says anew from what state things go on. The line before it says how much is missing.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::JoinHandle,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rustix::fs::{FlockOperation, flock};

use crate::{
    files,
    line::{Gap, Head, Line, Snapshot},
};

/// Milliseconds after which a file that could not be written is tried again.
const RETRY_MS: f64 = 5_000.0;

/// Where a log is written, and how much of it is kept.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// Made if it is not there. Of one router alone.
    pub directory: PathBuf,
    /// The model whose decisions these are.
    pub model: String,
    /// A life of the router.
    pub run: String,
    /// Seconds since the epoch at time 0.
    pub epoch: f64,
    /// A file that has reached so many bytes is followed by another.
    pub max_bytes: u64,
    /// Files that are kept; the oldest go.
    pub max_files: usize,
    /// Bytes that may wait for the thread.
    pub max_queued: u64,
}

/// What became of a log so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogStats {
    /// Lines written.
    pub lines: u64,
    /// Lines that were not.
    pub dropped: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Files begun.
    pub files: u64,
    /// The last failure.
    pub error: Option<String>,
}

enum Message {
    /// Begin a file.
    File,
    /// A snapshot whose state is not in base64 yet.
    Snapshot(Box<Snapshot>, Vec<u8>),
    /// Text with its line ends, and the lines in it.
    Text(Vec<u8>, u64),
}

#[derive(Default)]
struct Shared {
    queued: AtomicU64,
    failed: AtomicBool,
    lines: AtomicU64,
    lost: AtomicU64,
    bytes: AtomicU64,
    files: AtomicU64,
    error: Mutex<Option<String>>,
}

/// What a log needs before the next line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing.
    Nothing,
    /// A snapshot, in a new file or in this one.
    Snapshot { file: bool },
    /// It cannot take anything now.
    Drop,
}

/// A log that is being written. Dropped, it writes what is queued.
pub struct Log {
    config: LogConfig,
    sender: Option<Sender<Message>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Files asked for, and the bytes of what the last was sent.
    files: u64,
    file_bytes: u64,
    /// Lines missing since the last that was taken; None while none is.
    missing: Option<u64>,
    dropped: u64,
    failed_at: Option<f64>,
}

impl Log {
    /// Begins a log. Fails when the directory cannot be written, or another router writes there.
    pub fn open(config: LogConfig) -> io::Result<Self> {
        fs::create_dir_all(&config.directory)?;
        let name = files::name_of(&config.model);
        let lock = OpenOptions::new()
            .create(true)
            .append(true)
            .open(config.directory.join(format!("{name}.lock")))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            let why = format!("another router writes there ({error}); give each a directory");
            io::Error::new(io::ErrorKind::ResourceBusy, why)
        })?;
        let written = files::list(&config.directory)?;
        let last = written.iter().filter(|file| file.name == name);
        let writer = Writer {
            next: last.map(|file| file.number + 1).max().unwrap_or(1),
            name,
            config: config.clone(),
            file: None,
            shared: Arc::default(),
            _lock: lock,
        };
        let shared = Arc::clone(&writer.shared);
        let (sender, receiver) = channel();
        let thread = std::thread::Builder::new()
            .name("decision-log".into())
            .spawn(move || writer.run(&receiver))?;
        Ok(Self {
            config,
            sender: Some(sender),
            shared,
            thread: Some(thread),
            files: 0,
            file_bytes: 0,
            missing: None,
            dropped: 0,
            failed_at: None,
        })
    }

    /// What became of it.
    pub fn stats(&self) -> LogStats {
        let error = self.shared.error.lock();
        LogStats {
            lines: self.shared.lines.load(Relaxed),
            dropped: self.dropped + self.shared.lost.load(Relaxed),
            bytes: self.shared.bytes.load(Relaxed),
            files: self.shared.files.load(Relaxed),
            error: error.unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// What it needs at `now`, before a line can be taken.
    pub fn need(&mut self, now: f64) -> Need {
        if self.files == 0 {
            return Need::Snapshot { file: true };
        }
        if self.shared.failed.load(Relaxed) {
            let since = *self.failed_at.get_or_insert(now);
            self.missing.get_or_insert(0);
            if now - since < RETRY_MS {
                return Need::Drop;
            }
            self.failed_at = None;
            self.shared.failed.store(false, Relaxed);
            return Need::Snapshot { file: true };
        }
        if self.missing.is_some() {
            let behind = self.shared.queued.load(Relaxed) > self.config.max_queued / 2;
            return match behind {
                true => Need::Drop,
                false => Need::Snapshot { file: false },
            };
        }
        match self.file_bytes >= self.config.max_bytes {
            true => Need::Snapshot { file: true },
            false => Need::Nothing,
        }
    }

    /// Takes the snapshot that it needs, and its state.
    pub fn snapshot(&mut self, snapshot: Snapshot, state: Vec<u8>, file: bool) {
        if file {
            self.files += 1;
            self.file_bytes = 0;
            self.send(Message::File, 0);
        }
        if let Some(lines) = self.missing.take() {
            if let Ok(mut gap) = serde_json::to_vec(&Line::Gap(Gap { lines })) {
                gap.push(b'\n');
                let size = gap.len() as u64;
                self.send(Message::Text(gap, 1), size);
            }
        }
        let size = state.len() as u64;
        // Does not count: a file would else be full with a snapshot that is larger than it may be.
        self.send(Message::Snapshot(Box::new(snapshot), state), size);
    }

    /// Takes a line, which ends with its line end, or drops it.
    pub fn push(&mut self, line: Vec<u8>) {
        let size = line.len() as u64;
        if self.missing.is_some()
            || self.shared.queued.load(Relaxed) + size > self.config.max_queued
        {
            self.drop_line();
        } else {
            self.file_bytes += size;
            self.send(Message::Text(line, 1), size);
        }
    }

    /// A line was not even made.
    pub fn drop_line(&mut self) {
        self.dropped += 1;
        *self.missing.get_or_insert(0) += 1;
    }

    fn send(&mut self, message: Message, size: u64) {
        self.shared.queued.fetch_add(size, Relaxed);
        if let Some(sender) = &self.sender {
            // The thread lives as long as this does.
            let _ = sender.send(message);
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread's side.
struct Writer {
    config: LogConfig,
    name: String,
    next: u64,
    file: Option<BufWriter<File>>,
    shared: Arc<Shared>,
    /// Held as long as the thread lives.
    _lock: File,
}

impl Writer {
    fn run(mut self, receiver: &Receiver<Message>) {
        loop {
            let message = match receiver.try_recv() {
                Err(TryRecvError::Empty) => {
                    // Nothing to do: let others see what there is.
                    let flushed = self.file.as_mut().map_or(Ok(()), Write::flush);
                    self.check(flushed, 0);
                    receiver.recv().ok()
                }
                other => other.ok(),
            };
            let Some(message) = message else {
                break;
            };
            let (size, lines) = match &message {
                Message::File => (0, 0),
                Message::Snapshot(_, state) => (state.len() as u64, 1),
                Message::Text(text, lines) => (text.len() as u64, *lines),
            };
            let done = self.take(message);
            self.check(done, lines);
            self.shared.queued.fetch_sub(size, Relaxed);
        }
        let flushed = self.file.as_mut().map_or(Ok(()), Write::flush);
        self.check(flushed, 0);
    }

    fn check(&mut self, done: io::Result<()>, lines: u64) {
        match done {
            Ok(()) => {}
            Err(error) => {
                self.file = None;
                self.shared.lost.fetch_add(lines, Relaxed);
                let mut last = self
                    .shared
                    .error
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                *last = Some(error.to_string());
                self.shared.failed.store(true, Relaxed);
            }
        }
    }

    fn take(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::File => self.begin(),
            Message::Text(text, lines) => self.write(&text, lines),
            Message::Snapshot(mut snapshot, state) => {
                snapshot.state = STANDARD.encode(state);
                self.write_line(&Line::Snapshot(*snapshot))
            }
        }
    }

    fn begin(&mut self) -> io::Result<()> {
        let begun = self.open();
        self.shared.files.fetch_add(1, Relaxed);
        begun?;
        self.write_line(&Line::Head(Head {
            version: crate::line::VERSION,
            model: self.config.model.clone(),
            run: self.config.run.clone(),
            epoch: self.config.epoch,
        }))
    }

    fn open(&mut self) -> io::Result<()> {
        if let Some(mut file) = self.file.take() {
            file.flush()?;
        }
        let path = files::path_of(&self.config.directory, &self.name, self.next);
        self.next += 1;
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        self.file = Some(BufWriter::new(file));
        let written = files::list(&self.config.directory)?;
        let mine: Vec<_> = written
            .iter()
            .filter(|file| file.name == self.name)
            .collect();
        let over = mine.len().saturating_sub(self.config.max_files.max(1));
        for file in &mine[..over] {
            fs::remove_file(&file.path)?;
        }
        Ok(())
    }

    fn write_line(&mut self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.write(&text, 1)
    }

    fn write(&mut self, text: &[u8], lines: u64) -> io::Result<()> {
        let Some(file) = &mut self.file else {
            // Its file failed; what is queued behind that is lost.
            self.shared.lost.fetch_add(lines, Relaxed);
            return Ok(());
        };
        file.write_all(text)?;
        self.shared.lines.fetch_add(lines, Relaxed);
        self.shared.bytes.fetch_add(text.len() as u64, Relaxed);
        Ok(())
    }
}
