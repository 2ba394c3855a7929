//! Transfers between memory and a file, many at a time: the only part of this tier that handles raw memory.
//!
//! Through io_uring where the kernel lets us have a ring, else by positioned calls on a few threads.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, types};
use parking_lot::Mutex;

/// Transfers under way at a time.
const DEPTH: usize = 32;
/// Of them, those that are begun together.
const GROUP: usize = 8;
/// Threads where there is no ring.
const THREADS: usize = 8;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// Where transfers come from, as long as there are any.
pub(crate) trait Source {
    /// More of them, at most `most`, each with a number that no other under way has. None: there are no more now; it is
    /// asked again when one has ended.
    fn next(&mut self, most: usize) -> Vec<(u64, Transfer)>;

    /// These have ended.
    fn ended(&mut self, ended: Vec<(u64, io::Result<()>)>);
}

/// One run of bytes of the file, and the one or two pieces of memory that belong to it.
#[derive(Clone, Copy)]
pub(crate) struct Transfer {
    direction: Direction,
    offset: u64,
    pieces: [libc::iovec; 2],
    count: usize,
}

// SAFETY: `new`'s caller vouches for the memory until the transfer is used no more, from whatever thread.
unsafe impl Send for Transfer {}
// SAFETY: as above; a shared transfer only tells where the memory is.
unsafe impl Sync for Transfer {}

impl Transfer {
    /// Bytes from `offset` on, to or from the pieces one after the other.
    ///
    /// # Safety
    /// Until the value and its copies are dropped, every piece must be memory that may be read (written: `Read`), and
    /// that nobody else writes (accesses: `Read`) while a transfer runs, except processes whose bytes are checked later.
    pub(crate) unsafe fn new(
        direction: Direction,
        offset: u64,
        pieces: &[(*mut u8, usize)],
    ) -> Self {
        assert!((1..=2).contains(&pieces.len()), "one piece or two");
        let piece = |&(at, bytes): &(*mut u8, usize)| libc::iovec {
            iov_base: at.cast(),
            iov_len: bytes,
        };
        Self {
            direction,
            offset,
            pieces: [
                piece(&pieces[0]),
                piece(pieces.get(1).unwrap_or(&pieces[0])),
            ],
            count: pieces.len(),
        }
    }

    /// Bytes to move.
    pub(crate) fn bytes(&self) -> usize {
        self.pieces[..self.count].iter().map(|p| p.iov_len).sum()
    }

    /// Runs on this thread.
    fn run(&self, file: &File) -> io::Result<()> {
        let mut pieces = self.pieces;
        let (mut first, mut offset) = (0, self.offset as libc::off_t);
        while first < self.count {
            let (at, count) = (
                pieces[first..].as_mut_ptr(),
                (self.count - first) as libc::c_int,
            );
            // SAFETY: the pieces are valid by `new`'s contract, less what has been moved already.
            let moved = unsafe {
                match self.direction {
                    Direction::Read => libc::preadv(file.as_raw_fd(), at, count, offset),
                    Direction::Write => libc::pwritev(file.as_raw_fd(), at, count, offset),
                }
            };
            if moved < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            if moved == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            offset += moved as libc::off_t;
            let mut left = moved as usize;
            while left > 0 {
                let piece = &mut pieces[first];
                let part = left.min(piece.iov_len);
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(part).cast();
                piece.iov_len -= part;
                left -= part;
                first += usize::from(piece.iov_len == 0);
            }
        }
        Ok(())
    }
}

/// The way batches run.
pub(crate) struct Engine {
    /// Rings that nobody uses now; None where the kernel has none for us.
    rings: Option<Mutex<Vec<IoUring>>>,
}

impl Engine {
    /// Tries the kernel for a ring.
    pub(crate) fn probe() -> Self {
        let try_ring = || -> io::Result<IoUring> {
            let ring = IoUring::new(DEPTH as u32)?;
            let mut probe = Probe::new();
            ring.submitter().register_probe(&mut probe)?;
            let able =
                probe.is_supported(opcode::Readv::CODE) && probe.is_supported(opcode::Writev::CODE);
            if able {
                Ok(ring)
            } else {
                Err(io::ErrorKind::Unsupported.into())
            }
        };
        Self {
            rings: try_ring().ok().map(|ring| Mutex::new(vec![ring])),
        }
    }

    /// One that uses no ring.
    #[cfg(test)]
    pub(crate) fn threads() -> Self {
        Self { rings: None }
    }

    /// "io_uring" or "threads".
    pub(crate) fn name(&self) -> &'static str {
        if self.rings.is_some() {
            "io_uring"
        } else {
            "threads"
        }
    }

    /// Runs all transfers, in any order; calls `done` with each one's place as it ends, on this thread.
    pub(crate) fn run(
        &self,
        file: &File,
        transfers: &[Transfer],
        done: impl FnMut(usize, io::Result<()>),
    ) {
        if let [one] = transfers {
            let mut done = done;
            return done(0, one.run(file));
        }
        let mut all = All {
            transfers: transfers.iter().enumerate(),
            done,
        };
        self.stream(file, &mut all);
    }

    /// Runs what the source has, until it has no more and all has ended; calls it on this thread. What it gives is under
    /// way while it is asked for more.
    pub(crate) fn stream(&self, file: &File, source: &mut dyn Source) {
        let Some(rings) = &self.rings else {
            return stream_on_threads(file, source);
        };
        let idle = rings.lock().pop();
        let mut ring = match idle.map_or_else(|| IoUring::new(DEPTH as u32), Ok) {
            Ok(ring) => ring,
            Err(_) => return stream_on_threads(file, source),
        };
        let mut flight = Flight {
            ring: &mut ring,
            entries: Box::new([None; DEPTH]),
            flying: 0,
        };
        loop {
            let mut more = true;
            while more && flight.room() >= GROUP {
                let next = source.next(GROUP);
                more = !next.is_empty();
                flight.launch(file, next);
            }
            if flight.flying == 0 {
                break;
            }
            // Room for a group, where there may be one; else what comes first.
            let wanted = if more { GROUP - flight.room() } else { 1 };
            let ended = flight.landed(wanted).into_iter();
            let ended = ended.map(|(number, transfer, result)| {
                let result = match result {
                    moved if moved >= 0 && moved as usize == transfer.bytes() => Ok(()),
                    // Cut short or interrupted: once more, which finishes it or tells why not.
                    moved if moved >= 0 || -moved == libc::EAGAIN || -moved == libc::EINTR => {
                        transfer.run(file)
                    }
                    error => Err(io::Error::from_raw_os_error(-error)),
                };
                (number, result)
            });
            source.ended(ended.collect());
        }
        drop(flight);
        rings.lock().push(ring);
    }
}

/// Transfers that are all known before.
struct All<'a, F> {
    transfers: std::iter::Enumerate<std::slice::Iter<'a, Transfer>>,
    done: F,
}

impl<F: FnMut(usize, io::Result<()>)> Source for All<'_, F> {
    fn next(&mut self, most: usize) -> Vec<(u64, Transfer)> {
        let next = self.transfers.by_ref().take(most);
        next.map(|(place, &transfer)| (place as u64, transfer))
            .collect()
    }

    fn ended(&mut self, ended: Vec<(u64, io::Result<()>)>) {
        for (place, result) in ended {
            (self.done)(place as usize, result);
        }
    }
}

/// A ring with transfers under way, which must land before their memory may go.
struct Flight<'a> {
    ring: &'a mut IoUring,
    /// What is under way, by the ring's number for it; each with its source's.
    entries: Box<[Option<(u64, Transfer)>; DEPTH]>,
    flying: usize,
}

impl Flight<'_> {
    fn room(&self) -> usize {
        DEPTH - self.flying
    }

    /// Begins with these; no more than there is room for.
    fn launch(&mut self, file: &File, transfers: Vec<(u64, Transfer)>) {
        if transfers.is_empty() {
            return;
        }
        let fd = types::Fd(file.as_raw_fd());
        let mut vacant = 0;
        for transfer in transfers {
            while self.entries[vacant].is_some() {
                vacant += 1;
            }
            let (_, transfer) = self.entries[vacant].insert(transfer);
            let (pieces, count) = (transfer.pieces.as_ptr(), transfer.count as u32);
            let entry = match transfer.direction {
                Direction::Read => opcode::Readv::new(fd, pieces, count)
                    .offset(transfer.offset)
                    .build(),
                Direction::Write => opcode::Writev::new(fd, pieces, count)
                    .offset(transfer.offset)
                    .build(),
            };
            // SAFETY: the entry stays in its box until it has landed, its memory by `new`'s contract, and the file
            // outlives the flight, which waits for all to land when dropped.
            let pushed = unsafe { self.ring.submission().push(&entry.user_data(vacant as u64)) };
            assert!(pushed.is_ok(), "no more transfers than entries");
            self.flying += 1;
        }
        // Where it fails, `landed` submits again.
        let _ = self.ring.submit();
    }

    /// Waits for so many, at least one; which have landed, with the kernel's results.
    fn landed(&mut self, wanted: usize) -> Vec<(u64, Transfer, i32)> {
        loop {
            // Interrupted, or the kernel is short of something: what is under way lands all the same.
            if self.ring.submit_and_wait(wanted.max(1)).is_err() {
                std::thread::sleep(Duration::from_micros(50));
            }
            let entries = &mut self.entries;
            let landed: Vec<_> = (self.ring.completion())
                .filter_map(|entry| {
                    let (number, transfer) = entries[entry.user_data() as usize].take()?;
                    Some((number, transfer, entry.result()))
                })
                .collect();
            self.flying -= landed.len();
            if !landed.is_empty() {
                return landed;
            }
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        while self.flying > 0 {
            self.landed(1);
        }
    }
}

fn stream_on_threads(file: &File, source: &mut dyn Source) {
    loop {
        let mut transfers = source.next(GROUP);
        while !transfers.is_empty() && transfers.len() + GROUP <= DEPTH {
            let more = source.next(GROUP);
            if more.is_empty() {
                break;
            }
            transfers.extend(more);
        }
        if transfers.is_empty() {
            return;
        }
        let next = AtomicUsize::new(0);
        let (sender, results) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..THREADS.min(transfers.len()) {
                let (next, transfers, sender) = (&next, &transfers, sender.clone());
                scope.spawn(move || {
                    while let Some((number, transfer)) =
                        transfers.get(next.fetch_add(1, Ordering::Relaxed))
                    {
                        // The receiver lives longer than this scope.
                        let _ = sender.send((*number, transfer.run(file)));
                    }
                });
            }
            drop(sender);
            for ended in results {
                source.ended(vec![ended]);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_move_every_byte_to_its_place_on_a_ring_and_on_threads() {
        for engine in [Engine::probe(), Engine::threads()] {
            let file = tempfile::tempfile().unwrap();
            const BLOCK: usize = 8192;
            const BLOCKS: usize = 3 * DEPTH + 5;
            let mut memory: Vec<u8> = (0..BLOCK * BLOCKS).map(|i| (i / 97) as u8).collect();
            let base = memory.as_mut_ptr();
            let all = |direction, base: *mut u8| -> Vec<Transfer> {
                (0..BLOCKS)
                    .map(|i| {
                        let at = base.wrapping_add(i * BLOCK);
                        let pieces = [(at, 4096), (at.wrapping_add(4096), BLOCK - 4096)];
                        // SAFETY: inside vectors that outlive the transfers and that nobody else touches.
                        unsafe { Transfer::new(direction, (i * BLOCK) as u64, &pieces) }
                    })
                    .collect()
            };
            let mut seen = vec![0; BLOCKS];
            engine.run(&file, &all(Direction::Write, base), |place, result| {
                result.unwrap();
                seen[place] += 1;
            });
            let mut back = vec![0_u8; memory.len()];
            engine.run(
                &file,
                &all(Direction::Read, back.as_mut_ptr()),
                |place, result| {
                    result.unwrap();
                    seen[place] += 1;
                },
            );
            assert_eq!(seen, [2; BLOCKS]);
            assert_eq!(back, memory);
            let past = (BLOCKS * BLOCK) as u64;
            // SAFETY: as above.
            let beyond =
                unsafe { Transfer::new(Direction::Read, past, &[(back.as_mut_ptr(), BLOCK)]) };
            engine.run(&file, &[beyond], |_, result| assert!(result.is_err()));
        }
    }
}
