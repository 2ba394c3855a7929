//! Writers that are killed at any instant: nothing torn is served, what was acknowledged is there, nothing leaks.
//!
//! This binary runs itself as the writer, by the ignored tests.
#![expect(clippy::unwrap_used, reason = "a failure of these is the test's")]

mod common;

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{BLOCK, Engine, SLOT, digest, settings, settled};
use kvmesh_kvbm::Digest;
use kvmesh_kvbm::control::StoreServer;
use kvmesh_kvbm::embedded::BlockStore;
use kvmesh_kvbm::store::{Settings, Store};
use kvmesh_kvbm::tiers::Tier;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

const KILLS: usize = 1_000;
/// Side by side, each on a folder of its own.
const LANES: usize = 4;
/// Blocks a writer writes in turn; fewer fit into memory.
const NUMBERS: u64 = 192;
const PAGES: u64 = 64;
const RUN: u64 = 16;
/// Of a `BlockStore`.
const SIZE: usize = 2 * BLOCK;
/// The longest that a writer is let write.
const INSTANT_US: u64 = 4_000;
const FOLDER: &str = "KVMESH_TEST_FOLDER";
const FIRST: &str = "KVMESH_TEST_FIRST";

/// This binary as a writer that runs until it is killed.
struct Writer {
    child: Child,
    said: Lines<BufReader<ChildStdout>>,
}

impl Writer {
    /// Returns once it writes.
    fn start(test: &str, folder: &Path, first: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--ignored", "--nocapture"])
            .env(FOLDER, folder)
            .env(FIRST, first.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut writer = Self { child, said };
        assert!(writer.words().any(|word| word == "on"), "the writer ended");
        writer
    }

    fn words(&mut self) -> impl Iterator<Item = String> {
        self.said.by_ref().map_while(Result::ok)
    }

    /// Kills it in the middle of whatever it does after some time; what else it said.
    fn kill(mut self, after: Duration) -> Vec<String> {
        let begun = Instant::now();
        while begun.elapsed() < after {
            std::hint::spin_loop();
        }
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.words().collect()
    }
}

fn say(word: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{word}").and_then(|()| out.flush()).unwrap();
}

fn told(name: &str) -> String {
    std::env::var(name).expect("started by another test")
}

/// `KILLS` of them, in lanes with a generator each.
fn in_lanes(kill: impl Fn(&Path, &mut ChaCha8Rng, usize) + Sync) {
    std::thread::scope(|scope| {
        for lane in 0..LANES {
            let kill = &kill;
            scope.spawn(move || {
                let dir = tempfile::tempdir().unwrap();
                let mut random = ChaCha8Rng::seed_from_u64(lane as u64);
                kill(dir.path(), &mut random, KILLS / LANES);
            });
        }
    });
}

fn content(number: u64) -> Vec<u8> {
    vec![(number * 7) as u8; SIZE]
}

#[test]
fn a_writer_killed_at_any_instant_leaves_whole_blocks_and_all_that_were_flushed() {
    in_lanes(|dir, random, kills| {
        let (mut first, mut out, mut flushed) = (0, vec![0; SIZE], 0);
        for _ in 0..kills {
            let writer = Writer::start("writes_to_the_disk", dir, first);
            let said = writer.kill(Duration::from_micros(random.random_range(0..INSTANT_US)));
            // A last word may be cut off: what it said is less than what it did.
            let sound = said
                .iter()
                .rev()
                .find_map(|word| word.strip_suffix('.')?.parse().ok());
            let acknowledged = sound.unwrap_or(first);
            let store = BlockStore::new(&disk(dir), SIZE as u32).unwrap();
            assert_eq!(store.store().health().unwrap().problem, None);
            let end = acknowledged + 3 * RUN;
            for number in acknowledged.saturating_sub(NUMBERS)..end {
                let found = store.get(digest(number), &mut out).unwrap();
                // Those of earlier writers may have left for later ones.
                let there = number >= first && number < acknowledged;
                assert!(found.is_some() || !there, "{number} was flushed");
                assert!(
                    found.is_none() || out == content(number),
                    "{number} is torn"
                );
            }
            let stats = store.store().stats();
            assert!(
                stats.iter().all(|(_, stats)| stats.corrupt == 0),
                "{stats:?}"
            );
            store.close();
            flushed += acknowledged - first;
            first = end;
        }
        assert!(flushed > 0, "no writer came to a flush");
    });
}

#[test]
#[ignore = "a writer that others kill"]
fn writes_to_the_disk() {
    let store = BlockStore::new(&disk(Path::new(&told(FOLDER))), SIZE as u32).unwrap();
    let first: u64 = told(FIRST).parse().unwrap();
    say("on");
    for number in first.. {
        assert!(store.put(digest(number), &content(number)).unwrap());
        if number % RUN == 0 {
            store.flush().unwrap();
            say(format_args!("{}.", number + 1));
        }
    }
}

/// Room on the disk for all that one writer comes to.
fn disk(dir: &Path) -> Settings {
    settings(dir, 64, 1024)
}

#[test]
fn an_engine_killed_at_any_instant_leaves_no_slot_and_nothing_half_filled() {
    in_lanes(|dir, random, kills| {
        let path = dir.join("kvbm.sock");
        let tiers = Arc::new(Store::new(&Settings::host(dir, 48 * SLOT)).unwrap());
        let server = StoreServer::start(&path, tiers).unwrap();
        let mut reader = Engine::new(&path, 1);
        let (mut whole, host) = (0, server.store().host());
        for _ in 0..kills {
            let first = random.random_range(0..NUMBERS);
            let writer = Writer::start("offloads_to_a_store", dir, first);
            writer.kill(Duration::from_micros(random.random_range(0..INSTANT_US)));
            settled("nothing of it is left", || {
                server.engines() == 1 && host.stats().blocks_in_use == 0
            });
            for number in 0..NUMBERS {
                let Some(mut lease) = reader.client.lease(&[digest(number)]).unwrap() else {
                    continue;
                };
                reader.wipe();
                lease.load(&reader.pages, &[0], 0, 2).unwrap();
                lease.release();
                for (part, buffer) in reader.buffers.iter().enumerate() {
                    let wanted = ((number % PAGES) * 3 + part as u64) as u8;
                    assert!(
                        buffer.iter().all(|&byte| byte == wanted),
                        "{number} is torn"
                    );
                }
                whole += 1;
            }
        }
        assert!(whole > 0, "no engine came to store anything");
        assert_eq!(host.stats().corrupt, 0);
        host.flush();
        assert_eq!(host.stats().used_bytes, 0);
    });
}

#[test]
#[ignore = "a writer that others kill"]
fn offloads_to_a_store() {
    let path = Path::new(&told(FOLDER)).join("kvbm.sock");
    let engine = Engine::new(&path, PAGES as usize);
    let first: u64 = told(FIRST).parse().unwrap();
    say("on");
    for start in (first..).step_by(RUN as usize) {
        let numbers = (start..start + RUN).map(|number| number % NUMBERS);
        let chain: Vec<Digest> = numbers.clone().map(digest).collect();
        let pages: Vec<u32> = numbers.map(|number| (number % PAGES) as u32).collect();
        engine
            .client
            .offload(None, &chain, &engine.pages, &pages)
            .unwrap();
    }
}
