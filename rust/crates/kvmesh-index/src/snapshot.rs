//! The whole state as bytes.
//!
//! Little-endian: the magic, the version, every holder number's generation, the holders, the runs
//! with their holders' masks, and SHA-256 over all of that.

use std::sync::Arc;

use kvmesh_core::{Error, Result};
use sha2::{Digest, Sha256};

use crate::{
    blocks::Blocks,
    holders::{HolderId, Holders, Kind, MAX_HOLDERS, MAX_SLOTS, Slot},
    line::low_bits,
    run::RUN_BLOCKS,
};

const MAGIC: &[u8; 12] = b"kvmesh-index";
const VERSION: u32 = 2;
const CHECKSUM: usize = 32;
const NO_NAME: u32 = u32::MAX;

/// Writers must be held off.
pub fn write(holders: &Holders, blocks: &Blocks) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + blocks.len() * 9);
    out.extend_from_slice(MAGIC);
    put(&mut out, VERSION);
    put(&mut out, holders.numbers() as u32);
    holders
        .generations()
        .for_each(|generation| put(&mut out, generation));
    put(&mut out, holders.len() as u32);
    for (id, holder) in holders.iter() {
        put(&mut out, id.get());
        out.push(u8::from(holder.kind == Kind::Store));
        put_name(&mut out, Some(&holder.name));
        put_name(&mut out, holders.node_name(holder));
    }
    blocks.for_each_run(|hashes, slots| {
        put(&mut out, hashes.len() as u32);
        put(&mut out, slots.len() as u32);
        hashes
            .iter()
            .for_each(|hash| out.extend_from_slice(&hash.to_le_bytes()));
        for (slot, mask) in slots {
            out.extend_from_slice(&slot.bits().to_le_bytes());
            out.extend_from_slice(&mask.to_le_bytes());
        }
    });
    let checksum = Sha256::digest(&out);
    out.extend_from_slice(&checksum);
    out
}

fn put(out: &mut Vec<u8>, number: u32) {
    out.extend_from_slice(&number.to_le_bytes());
}

fn put_name(out: &mut Vec<u8>, name: Option<&str>) {
    match name {
        None => put(out, NO_NAME),
        Some(name) => {
            put(out, name.len() as u32);
            out.extend_from_slice(name.as_bytes());
        }
    }
}

/// A slot, blocks in a row that it holds, and the block before them.
pub type Stored<'a> = (Slot, &'a [u64], Option<u64>);

/// A snapshot's holders, and its runs one by one.
pub struct Runs<'a> {
    pub holders: Holders,
    input: Input<'a>,
    hashes: Vec<u64>,
    /// The run's slots, and of the first one the blocks not handed out yet.
    slots: Vec<(Slot, u64)>,
}

/// Reads what comes before the runs. Fails with `InvalidArgument`.
pub fn read(bytes: &[u8]) -> Result<Runs<'_>> {
    let at = bytes.len().checked_sub(CHECKSUM).ok_or_else(damaged)?;
    let (body, checksum) = bytes.split_at(at);
    let mut input = Input(body);
    if input.take(MAGIC.len())? != MAGIC {
        return Err(damaged());
    }
    let version = input.u32()?;
    if version != VERSION {
        return Err(Error::invalid("a snapshot of another version")
            .with_context("version", version)
            .with_context("supported", VERSION));
    }
    if Sha256::digest(body).as_slice() != checksum {
        return Err(damaged());
    }
    let numbers = input.u32()? as usize;
    if numbers > MAX_HOLDERS {
        return Err(damaged());
    }
    let generations = (0..numbers).map(|_| input.u32()).collect::<Result<_>>()?;
    let mut holders = Holders::with_generations(generations);
    for _ in 0..input.u32()? {
        let id = HolderId::from_raw(input.u32()?);
        let kind = match input.take(1)? {
            [0] => Kind::Engine,
            [1] => Kind::Store,
            _ => return Err(damaged()),
        };
        let name = input.name()?.ok_or_else(damaged)?;
        let node = input.name()?;
        if !holders.restore(id, Arc::from(name), node, kind) {
            return Err(damaged());
        }
    }
    Ok(Runs {
        holders,
        input,
        hashes: Vec::new(),
        slots: Vec::new(),
    })
}

impl Runs<'_> {
    /// The next blocks.
    pub fn next(&mut self) -> Result<Option<Stored<'_>>> {
        while self.slots.last().is_none_or(|&(_, mask)| mask == 0) {
            if self.slots.pop().is_none() && !self.read_run()? {
                return Ok(None);
            }
        }
        let (slot, mask) = self.slots.last_mut().ok_or_else(damaged)?;
        let first = mask.trailing_zeros() as usize;
        let count = (*mask >> first).trailing_ones() as usize;
        *mask &= !(low_bits(count) << first);
        let parent = first.checked_sub(1).map(|before| self.hashes[before]);
        Ok(Some((*slot, &self.hashes[first..first + count], parent)))
    }

    fn read_run(&mut self) -> Result<bool> {
        if self.input.0.is_empty() {
            return Ok(false);
        }
        let (blocks, slots) = (self.input.u32()? as usize, self.input.u32()?);
        if blocks > RUN_BLOCKS {
            return Err(damaged());
        }
        self.hashes.clear();
        for _ in 0..blocks {
            self.hashes.push(self.input.u64()?);
        }
        for _ in 0..slots {
            let bits = self.input.u16()?;
            if usize::from(bits) >= MAX_SLOTS {
                return Err(damaged());
            }
            let slot = Slot::from_bits(bits);
            let mask = self.input.u64()?;
            let has = |tier| {
                self.holders
                    .holder(slot)
                    .is_some_and(|h| h.lacks(tier).is_none())
            };
            if !has(slot.tier()) || mask & !low_bits(blocks) != 0 {
                return Err(damaged());
            }
            self.slots.push((slot, mask));
        }
        Ok(true)
    }
}

/// What is left to read.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(damaged)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| damaged())
    }

    fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn name(&mut self) -> Result<Option<&'a str>> {
        let length = self.u32()?;
        if length == NO_NAME {
            return Ok(None);
        }
        let name = self.take(length as usize)?;
        std::str::from_utf8(name).map(Some).map_err(|_| damaged())
    }
}

fn damaged() -> Error {
    Error::invalid("not a snapshot of an index, or a damaged one; take another")
}
