//! How a block's bytes become an object, and an object a block.

use std::ops::Range;

use kvmesh_core::Digest;
use parking_lot::Mutex;

use super::{ObjectTier, pack};
use crate::error::{Error, Result};
use crate::image::Layout;
use crate::journal::Journal;
use crate::namespace::Namespace;
use crate::tiers::contents::Contents;
use crate::tiers::kept::Kept;
use crate::tiers::{NamespaceId, Slot};

impl Kept for ObjectTier {
    const KIND: kvmesh_core::Tier = kvmesh_core::Tier::Network;

    fn contents(&self) -> &Mutex<Contents> {
        &self.contents
    }

    fn changes(&self) -> &Journal {
        &self.journal
    }

    fn open_kept(&self, namespace: &Namespace) -> Result<NamespaceId> {
        self.contents.lock().catalog.open(namespace)
    }

    fn is_writable(&self) -> bool {
        self.settings.writable
    }

    fn made_room(&self) {
        self.delete_removed();
    }

    // What was written and is not registered may stay: it is whole, and the next listing finds it.
    fn changed(&self) {
        self.delete_removed();
    }

    fn write_block(
        &self,
        slot: Slot,
        digest: &Digest,
        layout: &Layout,
        checksums: &[u64],
        segments: &[&[u8]],
    ) -> Result<()> {
        let body = pack(layout, digest, checksums, segments);
        let own = self.own.upgrade().ok_or_else(|| self.broken("it is out"))?;
        let written = self.wait(async move { own.put(slot, body).await });
        written.unwrap_or_else(|| Err(self.broken("it is out")))
    }

    fn read_block(
        &self,
        slot: Slot,
        digest: &Digest,
        layout: &Layout,
        segments: Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        let own = self.own.upgrade().ok_or_else(|| self.broken("it is out"))?;
        let read = self.wait(async move { own.get(slot).await });
        let body = read.unwrap_or_else(|| Err(self.broken("it is out")))?;
        let digest = *digest;
        let parts =
            Self::proven(&body, &digest, layout).map_err(|what| Error::Corrupt { digest, what })?;
        let mut rest = out;
        for part in &parts[segments] {
            let (this, next) = rest.split_at_mut(part.len());
            this.copy_from_slice(part);
            rest = next;
        }
        Ok(())
    }
}
