//! An arena (`src/arena.rs`) of words, in which threads see what the C++ memory model lets them see: a word has all the
//! values that were ever written to it, and a thread may read any that is not older than one it has seen. Who observes
//! what another has published sees all that the other had seen by then. Every access of a word is a point at which
//! another thread may go on.
//!
//! The rules can be weakened, and a process can die: from some access on, what it writes has no effect.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Mutex;

use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;

/// Of each word, the oldest value that may still be read.
pub type View = BTreeMap<u64, usize>;

/// What the arena does not do as it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Publishing lets nobody see what was written before.
    Release,
    /// Observing shows nothing but the word.
    Acquire,
    /// Words are not erased.
    Erase,
}

thread_local! {
    // All of the model checker's threads are this one.
    static FAULT: Cell<Fault> = const { Cell::new(Fault::None) };
}

shuttle::thread_local! {
    static SEEN: RefCell<View> = RefCell::new(View::new());
    static LEFT: Cell<Option<usize>> = Cell::new(None);
}

pub fn set_fault(fault: Fault) {
    FAULT.set(fault);
}

/// What this thread has seen.
pub fn seen() -> View {
    SEEN.with(|seen| seen.borrow().clone())
}

/// This thread sees that, too.
pub fn adopt(other: &View) {
    SEEN.with(|seen| {
        let mut seen = seen.borrow_mut();
        for (&word, &oldest) in other {
            let of_word = seen.entry(word).or_default();
            *of_word = oldest.max(*of_word);
        }
    });
}

/// This thread's process dies at its so many-th write from now on.
pub fn dies_after(writes: usize) {
    LEFT.with(|left| left.set(Some(writes)));
}

/// Whether this thread's process is dead.
pub fn is_dead() -> bool {
    LEFT.with(|left| left.get() == Some(0))
}

#[derive(Debug)]
pub struct Arena {
    bytes: u64,
    words: Mutex<BTreeMap<u64, Vec<Written>>>,
    turn: AtomicU64,
}

#[derive(Debug, Clone)]
struct Written {
    value: u64,
    /// What its writer had seen, if the word was published.
    view: Option<View>,
}

impl Arena {
    pub fn create(_: &Path, bytes: u64) -> Result<Self> {
        Ok(Self {
            bytes,
            words: Mutex::default(),
            turn: AtomicU64::new(0),
        })
    }

    pub fn open(_: OwnedFd) -> io::Result<Self> {
        unreachable!("one process's memory here")
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn publish(&self, offset: u64, word: u64) {
        if !(word == 0 && FAULT.get() == Fault::Erase) {
            self.store(offset, word, FAULT.get() != Fault::Release);
        }
    }

    pub fn observe(&self, offset: u64) -> u64 {
        self.load(offset, FAULT.get() != Fault::Acquire)
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        for (at, word) in bytes.chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(word.try_into().unwrap());
            self.store(offset + 8 * at as u64, word, false);
        }
    }

    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let words = (0..length as u64 / 8).map(|at| self.load(offset + 8 * at, false));
        words.flat_map(u64::to_le_bytes).collect()
    }

    pub fn put(&self, offset: u64, bytes: &[u8]) -> u64 {
        self.write(offset, bytes);
        sum(bytes)
    }

    pub fn get(&self, offset: u64, out: &mut [u8]) -> u64 {
        out.copy_from_slice(&self.read(offset, out.len()));
        sum(out)
    }

    pub fn checksum(&self, offset: u64, length: usize) -> u64 {
        sum(&self.read(offset, length))
    }

    fn store(&self, offset: u64, value: u64, publish: bool) {
        assert!(offset % 8 == 0 && offset + 8 <= self.bytes);
        self.turn.load(Ordering::SeqCst);
        if is_dead() {
            return;
        }
        LEFT.with(|left| left.set(left.get().map(|left| left - 1)));
        let mut words = self.words.lock().unwrap();
        let written = words.entry(offset).or_default();
        // The word was 0 before anything was written to it.
        SEEN.with(|seen| seen.borrow_mut().insert(offset, written.len() + 1));
        written.push(Written {
            value,
            view: publish.then(seen),
        });
    }

    fn load(&self, offset: u64, observe: bool) -> u64 {
        assert!(offset % 8 == 0 && offset + 8 <= self.bytes);
        self.turn.load(Ordering::SeqCst);
        let words = self.words.lock().unwrap();
        let written = words.get(&offset).map_or(&[][..], Vec::as_slice);
        let oldest = SEEN.with(|seen| seen.borrow().get(&offset).copied().unwrap_or(0));
        // Mostly the newest, as machines do.
        let number = match thread_rng().gen_range(0..4) {
            0 => thread_rng().gen_range(oldest..=written.len()),
            _ => written.len(),
        };
        SEEN.with(|seen| seen.borrow_mut().insert(offset, number));
        let Some(read) = number.checked_sub(1).map(|at| &written[at]) else {
            return 0;
        };
        if let (true, Some(view)) = (observe, &read.view) {
            adopt(view);
        }
        read.value
    }
}

/// As `copy::checksum` for what is this short.
fn sum(bytes: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot_with_seed(0, bytes)
}
