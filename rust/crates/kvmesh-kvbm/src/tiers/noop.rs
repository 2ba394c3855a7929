//! Keeps nothing: for tests, and for callers that want a tier where there is none.

use std::ops::Range;
use std::sync::Arc;

use kvmesh_core::{BlockHash, Digest};
use parking_lot::Mutex;

use super::{Capabilities, Held, NamespaceId, Room, Slot, Stats, Tier};
use crate::error::{Error, Result};
use crate::eviction::Hints;
use crate::image::Layout;
use crate::journal::{Change, Journal};
use crate::namespace::Namespace;

/// A tier that is always full.
#[derive(Debug, Default)]
pub struct NoopTier {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    namespaces: Vec<Namespace>,
    lookups: u64,
}

impl Tier for NoopTier {
    fn kind(&self) -> Option<kvmesh_core::Tier> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            retains: false,
            mapped: false,
            durable: false,
        }
    }

    fn open(&self, namespace: &Namespace) -> Result<NamespaceId> {
        let namespaces = &mut self.state.lock().namespaces;
        let known = namespaces.iter().position(|known| known == namespace);
        let id = known.unwrap_or_else(|| {
            namespaces.push(namespace.clone());
            namespaces.len() - 1
        });
        Ok(NamespaceId(id as u32))
    }

    fn layout(&self, namespace: NamespaceId) -> Arc<Layout> {
        Arc::new(Layout::new(
            &self.state.lock().namespaces[namespace.0 as usize],
        ))
    }

    fn hint(&self, _: NamespaceId, _: &[BlockHash], _: Hints) {}

    fn lookup(&self, _: NamespaceId, chain: &[Digest]) -> usize {
        self.state.lock().lookups += chain.len() as u64;
        0
    }

    fn reserve(&self, _: NamespaceId, _: Option<&Digest>, chain: &[Digest]) -> Vec<Room> {
        vec![Room::Full; chain.len()]
    }

    fn fill(&self, _: Slot, _: &[&[u8]]) -> Result<()> {
        Err(Error::NotFilled)
    }

    fn seal(&self, _: Slot) -> Result<()> {
        Err(Error::NotFilled)
    }

    fn abandon(&self, _: &[Slot]) {}

    fn register(&self, _: &[Slot]) {}

    fn lease(&self, _: NamespaceId, _: &[Digest], _: usize) -> Vec<Slot> {
        Vec::new()
    }

    fn walk(&self, _: Option<Slot>, _: usize) -> Vec<Held> {
        Vec::new()
    }

    fn hold(&self, _: NamespaceId, _: &Digest) -> Option<Slot> {
        None
    }

    fn digests(&self, _: NamespaceId, _: &[BlockHash]) -> Vec<Digest> {
        Vec::new()
    }

    fn read(&self, _: Slot, _: Range<usize>, _: &mut [u8]) -> Result<()> {
        Err(Error::NotFilled)
    }

    fn release(&self, _: &[Slot]) {}

    fn discard(&self, _: Slot) {}

    fn evict(&self, _: NamespaceId, _: &[Digest]) -> usize {
        0
    }

    fn flush(&self) -> usize {
        0
    }

    fn stats(&self) -> Stats {
        Stats {
            lookups: self.state.lock().lookups,
            ..Stats::default()
        }
    }

    fn journal(&self) -> Option<&Journal> {
        None
    }

    fn snapshot(&self) -> (Vec<Change>, Vec<Change>) {
        (Vec::new(), Vec::new())
    }
}
