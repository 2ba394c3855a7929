//! Traces made up to be hard for one policy or another. One request a second; blocks of [`BLOCK_TOKENS`] tokens.

use kvmesh_eviction::simulate::Request;
use kvmesh_eviction::{Hints, Key};

pub const BLOCK_TOKENS: u64 = 512;
/// Blocks of a chain that is used as a whole.
const CHAIN: u64 = 8;

/// Makes a trace; `scale` is about the number of blocks at which its cache matters.
pub type Make = fn(u64) -> Vec<Request>;

/// The traces by name.
pub const TRACES: [(&str, Make); 10] = [
    ("scan", scan),
    ("loop", cycle),
    ("two loops", two_cycles),
    ("sawtooth", sawtooth),
    ("zipf", zipf),
    ("drift", drift),
    ("retired", retired),
    ("phases", phases),
    ("chat", chat),
    ("agents", agents),
];

/// Numbers that look random and are the same every time (xorshift64*).
pub struct Random(pub u64);

impl Random {
    /// Below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32;
        (high * limit) >> 32
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Below `limit`, about as often as 1 / (its rank).
    fn zipf(&mut self, limit: u64) -> u64 {
        let uniform = self.below(1 << 32) as f64 / f64::from(u32::MAX);
        ((limit as f64 + 1.0).powf(uniform) as u64 - 1).min(limit - 1)
    }
}

/// Requests one by one.
#[derive(Default)]
struct Trace(Vec<Request>);

impl Trace {
    fn ask(&mut self, chain: Vec<Key>) {
        self.0.push(Request {
            seconds: self.0.len() as f64,
            tokens: chain.len() as u64 * BLOCK_TOKENS,
            chain,
            hints: Hints::default(),
        });
    }

    /// A chain that shares nothing with others; equal (kind, name) is the same chain.
    fn whole(&mut self, kind: u64, name: u64) {
        self.ask(blocks(kind, name, CHAIN));
    }
}

fn blocks(kind: u64, name: u64, count: u64) -> Vec<Key> {
    (0..count)
        .map(|place| Key((kind << 56) + (name << 24) + place))
        .collect()
}

fn requests(scale: u64) -> u64 {
    scale * 8
}

/// A hot set, and two requests in three that never come again.
fn scan(scale: u64) -> Vec<Request> {
    let (mut trace, mut random) = (Trace::default(), Random(1));
    for number in 0..requests(scale) {
        if number % 3 == 0 {
            trace.whole(1, random.below(scale * 3 / 4 / CHAIN));
        } else {
            trace.whole(2, number);
        }
    }
    trace.0
}

/// Somewhat more chains than fit, in a round: LRU never hits.
fn cycle(scale: u64) -> Vec<Request> {
    let mut trace = Trace::default();
    for number in 0..requests(scale) {
        trace.whole(1, number % (scale * 5 / 4 / CHAIN));
    }
    trace.0
}

/// A short round at one in four requests, a long one at the others.
fn two_cycles(scale: u64) -> Vec<Request> {
    let mut trace = Trace::default();
    for number in 0..requests(scale) {
        if number % 4 == 0 {
            trace.whole(1, number / 4 % (scale / 2 / CHAIN));
        } else {
            trace.whole(2, number % (scale * 2 / CHAIN));
        }
    }
    trace.0
}

/// Somewhat more chains than fit, forth and back: whatever is kept hits about as much, but at other times.
fn sawtooth(scale: u64) -> Vec<Request> {
    let mut trace = Trace::default();
    let chains = scale * 8 / 5 / CHAIN;
    for number in 0..requests(scale) {
        let place = number % (2 * chains - 2);
        trace.whole(1, place.min(2 * chains - 2 - place));
    }
    trace.0
}

fn zipf(scale: u64) -> Vec<Request> {
    let (mut trace, mut random) = (Trace::default(), Random(2));
    for _ in 0..requests(scale) {
        trace.whole(1, random.zipf(scale));
    }
    trace.0
}

/// A working set that moves on: what is old never comes back, however often it was used.
fn drift(scale: u64) -> Vec<Request> {
    let (mut trace, mut random) = (Trace::default(), Random(3));
    for number in 0..requests(scale) {
        trace.whole(1, number / 4 + random.below(scale * 5 / 4 / CHAIN));
    }
    trace.0
}

/// Every quarter of the trace another set is used often and then no more, beside rounds that last.
fn retired(scale: u64) -> Vec<Request> {
    let (mut trace, mut random) = (Trace::default(), Random(4));
    let all = requests(scale);
    for number in 0..all {
        if number % 2 == 0 {
            let set = number * 4 / all;
            trace.whole(1, set * scale + random.below(scale / 2 / CHAIN));
        } else {
            trace.whole(2, number % (scale / CHAIN));
        }
    }
    trace.0
}

/// Rounds, a moving set, and Zipf in turn, an eighth of the trace each.
fn phases(scale: u64) -> Vec<Request> {
    let (mut trace, mut random) = (Trace::default(), Random(5));
    let all = requests(scale);
    for number in 0..all {
        let phase = number * 8 / all;
        match phase % 3 {
            0 => trace.whole(phase, number % (scale * 5 / 4 / CHAIN)),
            1 => trace.whole(phase, number / 4 + random.below(scale * 5 / 4 / CHAIN)),
            _ => trace.whole(phase, random.zipf(scale)),
        }
    }
    trace.0
}

/// Conversations below a shared head, that go on with 60 % after a pause, a little longer each time.
fn chat(scale: u64) -> Vec<Request> {
    let (mut trace, mut random) = (Trace::default(), Random(6));
    let mut open: Vec<(u64, u64)> = Vec::new();
    for number in 0..requests(scale) {
        let goes_on = open.len() as u64 > scale / 32 && random.chance(60);
        let (name, turn) = if goes_on {
            // Mostly the recent ones.
            let back = random.zipf(open.len() as u64);
            let place = open.len() - 1 - back as usize;
            open.remove(place)
        } else {
            (number, 0)
        };
        let mut chain = blocks(1, 0, 3);
        chain.extend(blocks(2, name, 4 + 3 * turn));
        trace.ask(chain);
        open.push((name, turn + 1));
        if open.len() as u64 > scale / 8 {
            open.remove(0);
        }
    }
    trace.0
}

/// Agents of twelve at a time, each of many fast turns and then gone.
fn agents(scale: u64) -> Vec<Request> {
    let (mut trace, mut random) = (Trace::default(), Random(7));
    let at_once = (scale / 40).max(2);
    let mut live: Vec<(u64, u64)> = (0..at_once).map(|name| (name, random.below(20))).collect();
    let mut next = at_once;
    for _ in 0..requests(scale) {
        let place = random.below(at_once) as usize;
        let (name, turn) = &mut live[place];
        let mut chain = blocks(1, *name % 3, 6);
        chain.extend(blocks(2, *name, 2 + 2 * *turn));
        trace.ask(chain);
        *turn += 1;
        if *turn > 20 {
            live[place] = (next, 0);
            next += 1;
        }
    }
    trace.0
}
