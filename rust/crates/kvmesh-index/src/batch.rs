//! One serialized `kvmesh.v1.KvEventBatch`: a protobuf message of columns, read where they lie.
//!
//! Fields: 1 the holder's name, 7 operations, 8 counts, 9 hashes, 10 parents; others are passed over.

use kvmesh_core::{Error, Result, Tier};

/// What one event of a batch says.
pub enum Change<'a> {
    /// Tier, parent, hashes.
    Stored(Tier, Option<u64>, &'a [u64]),
    /// Tier, hashes.
    Removed(Tier, &'a [u64]),
    /// One tier, or all.
    Cleared(Option<Tier>),
}

/// A batch whose columns add up.
#[derive(Default)]
pub struct Batch<'a> {
    pub holder: &'a str,
    ops: Vec<u64>,
    counts: Vec<u64>,
    hashes: Vec<u64>,
    parents: Vec<u64>,
}

const FIRST: u64 = 0;
const BEHIND: u64 = 1;
const REMOVED: u64 = 2;
const CLEARED: u64 = 3;
/// An operation is a tier's number times this, plus the kind.
const KINDS: u64 = 4;

impl<'a> Batch<'a> {
    /// Reads a batch. Fails with `InvalidArgument`.
    pub fn parse(bytes: &'a [u8]) -> Result<Self> {
        let mut batch = Self::default();
        let mut input = Input(bytes);
        while !input.0.is_empty() {
            let key = input.varint()?;
            match (key >> 3, key & 7) {
                (1, 2) => {
                    batch.holder = std::str::from_utf8(input.bytes()?)
                        .map_err(|_| damaged("the holder's name is not UTF-8"))?;
                }
                (7, wire) => input.varints(wire, &mut batch.ops)?,
                (8, wire) => input.varints(wire, &mut batch.counts)?,
                (9, wire) => input.fixed(wire, &mut batch.hashes)?,
                (10, wire) => input.fixed(wire, &mut batch.parents)?,
                (0 | 1, _) => return Err(damaged("a field has the wrong type")),
                (_, wire) => input.skip(wire)?,
            }
        }
        batch.check()?;
        Ok(batch)
    }

    fn check(&self) -> Result<()> {
        if self.ops.len() != self.counts.len() {
            return Err(damaged("every operation needs a count"));
        }
        let total = self
            .counts
            .iter()
            .try_fold(0u64, |total, &count| total.checked_add(count));
        if total != Some(self.hashes.len() as u64) {
            return Err(damaged("the counts are not those of the hashes"));
        }
        let kinds = || self.ops.iter().map(|op| op % KINDS);
        if kinds().filter(|&kind| kind == BEHIND).count() != self.parents.len() {
            return Err(damaged("the parents are not those of the operations"));
        }
        if kinds()
            .zip(&self.counts)
            .any(|(kind, &count)| kind == CLEARED && count > 0)
        {
            return Err(damaged("a clear has no hashes"));
        }
        Ok(())
    }

    /// The events in order. Those in tiers that this version does not know are left out.
    pub fn changes(&self) -> impl Iterator<Item = Change<'_>> {
        let (mut hashes, mut parents) = (self.hashes.as_slice(), self.parents.iter());
        self.ops
            .iter()
            .zip(&self.counts)
            .filter_map(move |(&op, &count)| {
                let (these, rest) = hashes.split_at(count as usize);
                hashes = rest;
                // On the wire 0 is no tier.
                let number = op / KINDS;
                let tier = number
                    .checked_sub(1)
                    .and_then(|at| Tier::ALL.get(at as usize))
                    .copied();
                match op % KINDS {
                    FIRST => Some(Change::Stored(tier?, None, these)),
                    BEHIND => {
                        let parent = parents.next().copied();
                        Some(Change::Stored(tier?, parent, these))
                    }
                    REMOVED => Some(Change::Removed(tier?, these)),
                    _ if number == 0 => Some(Change::Cleared(None)),
                    _ => Some(Change::Cleared(Some(tier?))),
                }
            })
    }
}

/// What is left to read.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    #[inline]
    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for (at, &byte) in self.0.iter().take(10).enumerate() {
            value |= u64::from(byte & 0x7f) << (7 * at);
            if byte < 0x80 {
                self.0 = &self.0[at + 1..];
                return Ok(value);
            }
        }
        Err(damaged("it ends within a number"))
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        let count = usize::try_from(count).map_err(|_| damaged("a field is too long"))?;
        let (taken, rest) = self
            .0
            .split_at_checked(count)
            .ok_or_else(|| damaged("it ends within a field"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn bytes(&mut self) -> Result<&'a [u8]> {
        let count = self.varint()?;
        self.take(count)
    }

    /// A repeated field: packed, or one of its entries.
    fn varints(&mut self, wire: u64, into: &mut Vec<u64>) -> Result<()> {
        match wire {
            0 => into.push(self.varint()?),
            2 => {
                let mut packed = Input(self.bytes()?);
                while !packed.0.is_empty() {
                    into.push(packed.varint()?);
                }
            }
            _ => return Err(damaged("a field has the wrong type")),
        }
        Ok(())
    }

    /// As [`Self::varints`], for numbers of 8 bytes.
    fn fixed(&mut self, wire: u64, into: &mut Vec<u64>) -> Result<()> {
        let packed = match wire {
            1 => self.take(8)?,
            2 => self.bytes()?,
            _ => return Err(damaged("a field has the wrong type")),
        };
        let numbers = packed.chunks_exact(8);
        if !numbers.remainder().is_empty() {
            return Err(damaged("a column of hashes ends within one"));
        }
        into.extend(numbers.map(|bytes| {
            let mut number = [0; 8];
            number.copy_from_slice(bytes);
            u64::from_le_bytes(number)
        }));
        Ok(())
    }

    fn skip(&mut self, wire: u64) -> Result<()> {
        match wire {
            0 => self.varint().map(drop),
            1 => self.take(8).map(drop),
            2 => self.bytes().map(drop),
            5 => self.take(4).map(drop),
            _ => Err(damaged("a field has an unknown type")),
        }
    }
}

fn damaged(what: &str) -> Error {
    Error::invalid(format!("not a batch of events: {what}"))
}
