//! Runs the prefix index and its peers over one stream and prints the medians of every figure as JSON.
//!
//!     index-bench TRACE WORKERS BLOCKS_PER_WORKER COPIES ROUNDS

mod memory;
mod stream;
mod subjects;

use std::{
    collections::BTreeMap,
    hint::black_box,
    path::Path,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Instant,
};

use cpu_time::ThreadTime;
use stream::Stream;
use subjects::{Chain, Crtc, Ours, Subject};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

type Figures = BTreeMap<&'static str, f64>;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| arguments[at].parse::<u64>().expect("a number");
    let stream = Stream::new(
        Path::new(&arguments[1]),
        number(2) as u32,
        number(3) as usize,
        number(4),
    );
    let mut rounds: BTreeMap<&str, Vec<Figures>> = BTreeMap::new();
    let subjects = [
        run::<Ours>,
        run::<Chain<false>>,
        run::<Chain<true>>,
        run::<Crtc>,
    ];
    for round in 0..number(5) as usize {
        // By turns the first, whose memory the process has not had before.
        for at in 0..subjects.len() {
            subjects[(round + at) % subjects.len()](&stream, &mut rounds);
        }
    }
    let totals: Vec<f64> = rounds
        .values()
        .flatten()
        .map(|figures| figures["total"])
        .collect();
    assert!(
        totals.iter().all(|&total| total == totals[0]),
        "the answers differ: {totals:?}"
    );
    let medians: BTreeMap<_, Figures> = rounds
        .iter()
        .map(|(&name, rounds)| {
            let median = |key| {
                let mut values: Vec<f64> = rounds.iter().map(|figures| figures[key]).collect();
                values.sort_by(f64::total_cmp);
                values[values.len() / 2]
            };
            (
                name,
                rounds[0].keys().map(|&key| (key, median(key))).collect(),
            )
        })
        .collect();
    println!("{}", serde_json::to_string(&medians).expect("numbers"));
}

fn run<S: Subject>(stream: &Stream, rounds: &mut BTreeMap<&str, Vec<Figures>>) {
    let mut figures = Figures::new();
    throughput::<S>(stream, &mut figures);
    latency::<S>(stream, &mut figures);
    together::<S>(stream, &mut figures);
    rounds.entry(S::NAME).or_default().push(figures);
}

/// Updates alone, on one thread, by the thread's own CPU time: others may be at work on the machine.
fn throughput<S: Subject>(stream: &Stream, figures: &mut Figures) {
    let index = S::new(stream.workers);
    let updates = index.prepare(stream);
    let clock = ThreadTime::now();
    index.replay(stream, updates);
    let seconds = clock.elapsed().as_secs_f64();
    figures.insert("ops_per_s", stream.operations() as f64 / seconds);
}

/// Every request looked up, the answer read once, and then applied; memory at the end.
fn latency<S: Subject>(stream: &Stream, figures: &mut Figures) {
    let mut times = Vec::with_capacity(stream.requests.len());
    let mut total = 0;
    let mut answer = S::Answer::default();
    let before = memory::used();
    let index = S::new(stream.workers);
    let mut lane = index.lane();
    for request in &stream.requests {
        let start = Instant::now();
        index.look(stream, request, &mut answer);
        let sum = S::total(black_box(&answer));
        times.push(start.elapsed().as_nanos() as u64);
        total += sum;
        index.update(&mut lane, stream, request);
    }
    figures.insert("total", total as f64);
    drop(answer);
    figures.insert(
        "bytes_per_block",
        (memory::used() - before) as f64 / stream.held() as f64,
    );
    percentiles(times, "p50_us", "p99_us", figures);
}

/// One thread writes while another reads.
fn together<S: Subject>(stream: &Stream, figures: &mut Figures) {
    let index = S::new(stream.workers);
    let updates = index.prepare(stream);
    let (done, start) = (AtomicBool::new(false), Barrier::new(2));
    let (seconds, times) = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            start.wait();
            let clock = ThreadTime::now();
            index.replay(stream, updates);
            done.store(true, Relaxed);
            clock.elapsed().as_secs_f64()
        });
        let reader = scope.spawn(|| {
            let (mut times, mut answer) = (Vec::with_capacity(1 << 20), S::Answer::default());
            start.wait();
            'all: loop {
                for request in &stream.requests {
                    if done.load(Relaxed) {
                        break 'all;
                    }
                    let clock = Instant::now();
                    index.look(stream, request, &mut answer);
                    black_box(S::total(black_box(&answer)));
                    times.push(clock.elapsed().as_nanos() as u64);
                }
            }
            times
        });
        (
            writer.join().expect("a writer"),
            reader.join().expect("a reader"),
        )
    });
    figures.insert("shared_ops_per_s", stream.operations() as f64 / seconds);
    percentiles(times, "shared_p50_us", "shared_p99_us", figures);
}

fn percentiles(mut times: Vec<u64>, p50: &'static str, p99: &'static str, figures: &mut Figures) {
    times.sort_unstable();
    figures.insert(p50, times[times.len() / 2] as f64 / 1e3);
    figures.insert(p99, times[times.len() * 99 / 100] as f64 / 1e3);
}
