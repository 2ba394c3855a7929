//! Blocks that an engine has leased, and how it loads them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmesh_core::Digest;

use super::client::Connection;
use super::wire::Request;
use crate::copy::Pages;
use crate::error::{Error, Result};
use crate::image::Layout;
use crate::slot::{self, Arrival};
use crate::tiers::Origins;

/// How often a block on its way from a lower tier is looked at.
const POLL: Duration = Duration::from_micros(50);

/// Blocks that stay in the arena until this is dropped, even if the store dies meanwhile.
pub struct ClientLease {
    pub(super) connection: Arc<Connection>,
    pub(super) layout: Arc<Layout>,
    /// None: released, or never granted.
    pub(super) id: Option<u64>,
    pub(super) chain: Vec<Digest>,
    pub(super) slots: Vec<u64>,
    /// Places of blocks that were on their way when they were leased.
    pub(super) coming: Vec<u32>,
    pub(super) origins: Origins,
    /// They are waited for so long.
    pub(super) patience: Duration,
    /// Of all segments of all blocks, from the headers; empty until the first load.
    pub(super) checksums: Vec<u64>,
    pub(super) corrupt: Vec<u32>,
}

impl ClientLease {
    /// Blocks leased.
    pub fn blocks(&self) -> usize {
        self.slots.len()
    }

    /// Of these, those that came up from a lower tier and that no engine has read since.
    pub fn origins(&self) -> Origins {
        self.origins
    }

    /// Copies segments `first..end` of all leased blocks into `pages`, whose `ids` are in chain order, and verifies
    /// them. The first call waits for blocks on their way; it fails with `Lost` if one does not come. After an error the
    /// pages' contents are not to be used.
    pub fn load(&mut self, pages: &Pages, ids: &[u32], first: usize, end: usize) -> Result<()> {
        let segments = self.layout.segments().len();
        if ids.len() != self.slots.len() || first > end || end > segments {
            return Err(Error::Invalid("the load does not fit the lease".into()));
        }
        pages
            .check(self.layout.segments(), ids)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        if self.checksums.is_empty() {
            self.wait_for_coming()?;
            self.read_headers()?;
        }
        for (index, (&slot, &id)) in self.slots.iter().zip(ids).enumerate() {
            for number in first..end {
                let segment = self.layout.segments()[number];
                let source = self
                    .connection
                    .arena
                    .at(slot + segment.offset as u64, segment.bytes);
                // SAFETY: `at` checked the bounds, and while the lease lasts nobody writes the slot; a store that has
                // died cannot give it to anyone. The pages are those `Pages::new`'s caller vouches for.
                let arrived = unsafe { pages.copy_from(id, number, source) };
                if arrived != self.checksums[index * segments + number] {
                    self.corrupt.push(index as u32);
                    return Err(Error::Corrupt {
                        digest: self.chain[index],
                        what: "segment",
                    });
                }
            }
        }
        Ok(())
    }

    /// Lets go of the blocks and tells the store of corrupt ones. Nothing can be loaded any more. A store that is
    /// gone has released them already.
    pub fn release(&mut self) {
        if let Some(id) = self.id.take() {
            // Only a lost connection can fail this, and losing it releases the lease.
            let _ = self.connection.call(&Request::release(id, &self.corrupt));
        }
        self.slots.clear();
        self.checksums.clear();
    }

    fn wait_for_coming(&mut self) -> Result<()> {
        let begun = Instant::now();
        while let Some(&place) = self.coming.last() {
            let index = place as usize;
            let (Some(&slot), Some(&digest)) = (self.slots.get(index), self.chain.get(index))
            else {
                return Err(Error::Protocol("a block that was not leased is coming"));
            };
            match slot::look(&self.connection.arena, slot) {
                Arrival::Here => drop(self.coming.pop()),
                Arrival::Failed => return Err(Error::Lost(digest)),
                // A store that died brings nothing any more.
                Arrival::Coming
                    if begun.elapsed() > self.patience || !self.connection.is_alive() =>
                {
                    return Err(Error::Lost(digest));
                }
                Arrival::Coming => std::thread::sleep(POLL),
            }
        }
        Ok(())
    }

    fn read_headers(&mut self) -> Result<()> {
        let mut checksums = Vec::with_capacity(self.slots.len() * self.layout.segments().len());
        for (index, (&slot, digest)) in self.slots.iter().zip(&self.chain).enumerate() {
            match slot::checksums(&self.connection.arena, slot, &self.layout, digest) {
                Some(sums) => checksums.extend(sums),
                None => {
                    self.corrupt.push(index as u32);
                    return Err(Error::Corrupt {
                        digest: *digest,
                        what: "header",
                    });
                }
            }
        }
        self.checksums = checksums;
        Ok(())
    }
}

impl Drop for ClientLease {
    fn drop(&mut self) {
        self.release();
    }
}
