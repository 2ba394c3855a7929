//! The walk of a match from run to run, and what it asks memory for before it gets there.
//!
//! Nearly all of a match's time is waiting for memory. The walk asks for what it will read some runs ahead, by guesses that
//! cost nothing but the asking where they are wrong: each run keeps in mind those behind it, and prompts mostly
//! have their start in common with the last one.

use prefetch_index::prefetch_index;

use crate::{
    blocks::{Blocks, Found},
    cover::Key,
    line::{LINE_WORDS, low_bits},
    piece::Piece,
    run::{Place, RUN_BLOCKS, Run, Shape, lines_for},
    table::Table,
};

/// Equal blocks of a run after which a match is likely to pass all of it.
const NEAR: usize = 2 * LINE_WORDS;

/// Runs ahead of the walk whose hashes are asked for.
const AHEAD: usize = 2;

/// Where the last walk began: prompts mostly part from one another at the same place, behind a common start.
#[derive(Default)]
pub struct Start {
    /// The first block's place, and the shape of its run then.
    place: Option<(Place, Shape)>,
    /// Blocks that prompt had in common with its first run.
    parting: usize,
}

/// Goes ahead of the walk and asks for runs' heads and hashes. What it reads was asked for a run earlier.
struct Scout<'a> {
    blocks: &'a Blocks,
    table: &'a Table,
    prompt: &'a [u64],
    /// The run whose head was asked for last, and where in the prompt it may start.
    run: Option<u32>,
    at: usize,
    /// Runs whose hashes were asked for and at which the walk is not yet.
    ahead: usize,
    /// Blocks of the prompt that were asked for.
    asked: usize,
}

impl Scout<'_> {
    /// Begins where the walk is about to look, at block `at` of the prompt.
    #[inline]
    fn begin(&mut self, place: Place, at: usize) {
        self.ahead = 0;
        self.read_prompt(at);
        if let Some(run) = self.blocks.run(place.run()) {
            let shape = run.shape();
            self.blocks.expect_lines(shape);
            self.follow(run, at + shape.len().saturating_sub(place.offset()));
        }
    }

    /// Follows `run`, whose blocks end at `end` of the prompt: asks for the head of the one behind it, or for the table's
    /// bucket where none is known.
    #[inline]
    fn follow(&mut self, run: &Run, end: usize) {
        self.run = None;
        let Some(&hash) = self.prompt.get(end) else {
            return;
        };
        self.run = run.next(hash);
        self.at = end;
        match self.run {
            Some(next) => self.blocks.runs.expect(next, 1),
            None => self.table.expect(&[hash]),
        }
    }

    /// Asks for the hashes of the run that it is at, and goes on.
    #[inline]
    fn advance(&mut self) {
        let Some(run) = self.run.and_then(|id| self.blocks.run(id)) else {
            return;
        };
        let shape = run.shape();
        self.blocks.expect_lines(shape);
        self.ahead += 1;
        self.follow(run, self.at + shape.len());
    }

    /// Asks for the prompt up to the end of the next runs.
    #[inline]
    fn read_prompt(&mut self, at: usize) {
        let end = (at + (AHEAD + 2) * RUN_BLOCKS).min(self.prompt.len());
        let start = self.asked.max(at);
        if start < end {
            (start..end)
                .step_by(LINE_WORDS)
                .for_each(|at| prefetch_index(self.prompt, at));
            self.asked = end;
        }
    }
}

impl Blocks {
    /// Visits `hashes` piece by piece, a piece being blocks that lie together in one run. Stops at an
    /// unknown block or when `visit` returns false.
    #[inline]
    pub fn walk(
        &self,
        hashes: &[u64],
        entries: &mut Vec<(Key, u64)>,
        start: &mut Start,
        mut visit: impl FnMut(Piece<'_>) -> bool,
    ) {
        // The start's memory is fetched while the prompt's is.
        if let Some((place, shape)) = start.place {
            self.runs.expect(place.run(), 1);
            let lines = lines_for(start.parting).min(shape.lines());
            self.lines.expect(shape.hashes(), lines);
        }
        let table = self.table.load();
        let mut now = self.budget.max().map(|_| self.now());
        table.expect(hashes.get(start.parting..=start.parting).unwrap_or(&[]));
        let mut scout = Scout {
            blocks: self,
            table: &table,
            prompt: hashes,
            run: None,
            at: 0,
            ahead: 0,
            asked: 0,
        };
        let mut at = 0;
        let mut last: Option<&Run> = None;
        while let Some(&hash) = hashes.get(at) {
            let is_first = at == 0;
            let guess = match last.take() {
                Some(run) => run.next(hash).map(|id| Place::new(id, 0)),
                None if is_first => start.place.map(|(place, _)| place),
                None => None,
            };
            let known = guess.and_then(|place| Some((self.look(place, hash, Shape::len)?, place)));
            if let (Some((_, place)), false) = (&known, is_first) {
                if scout.ahead == 0 {
                    scout.begin(*place, at);
                } else {
                    scout.ahead -= 1;
                    scout.read_prompt(at);
                }
            }
            let found = known.or_else(|| {
                table.find(hash, |place| {
                    if !is_first {
                        scout.begin(place, at);
                    }
                    Some((self.look(place, hash, Shape::len)?, place))
                })
            });
            let Some((found, place)) = found else {
                return;
            };
            let Found {
                run,
                shape,
                hashes: stored,
                offset,
            } = found;
            let len = shape.len();
            run.cover.expect(&self.lines);
            let rest = &hashes[at..];
            let near = len.min(offset + NEAR);
            let mut count = stored.common(offset, near, rest);
            if offset + count == near {
                if is_first {
                    scout.follow(run, at + len - offset);
                }
                scout.advance();
                count += stored.common(near, len, &rest[count..]);
            }
            entries.clear();
            if count == 0
                || !run
                    .cover
                    .read(&self.lines, offset, low_bits(count), entries)
                || !run.still(shape)
            {
                continue; // the run has changed its shape; look again where the block is
            }
            if let Some(now) = &mut now {
                if run.touched() < *now {
                    run.touch(*now);
                }
                *now -= 1;
            }
            let piece = Piece {
                entries,
                offset,
                count,
            };
            if !visit(piece) {
                return;
            }
            if is_first {
                *start = Start {
                    place: Some((place, shape)),
                    parting: count,
                };
            }
            if scout.ahead < AHEAD {
                scout.advance();
            }
            at += count;
            last = Some(run);
        }
    }
}
