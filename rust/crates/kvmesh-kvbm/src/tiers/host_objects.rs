//! What the host tier does with object storage: it tells of what is stored, and blocks go as objects.

use kvmesh_core::Digest;

use super::catalog::Event;
use super::host::HostTier;
use super::object::pack;
use super::{NamespaceId, Slot};
use crate::image::Layout;
use crate::slot;

impl HostTier {
    /// From now on it is noted what is stored; `news` often.
    pub(crate) fn note_stored(&self) {
        self.catalog.lock().record();
    }

    /// The blocks that were stored since the last call, each with its parent, oldest first.
    pub(crate) fn news(&self) -> Vec<(NamespaceId, Digest, Option<Digest>)> {
        let events = self.catalog.lock().take_events().into_iter();
        let stored = events.filter_map(|event| match event {
            Event::Stored {
                namespace,
                digest,
                parent,
                ..
            } => Some((namespace, digest, parent)),
            Event::Removed { .. } => None,
        });
        stored.collect()
    }

    /// A leased block as an object, if its bytes are right as they are copied.
    pub(crate) fn pack(&self, slot: Slot, digest: &Digest, layout: &Layout) -> Option<Vec<u8>> {
        let checksums = slot::checksums(&self.arena, slot.0, layout, digest)?;
        let segments: Option<Vec<Vec<u8>>> = (layout.segments().iter().zip(&checksums))
            .map(|(segment, &expected)| {
                let mut bytes = vec![0; segment.bytes];
                let sum = self.arena.get(slot.0 + segment.offset as u64, &mut bytes);
                (sum == expected).then_some(bytes)
            })
            .collect();
        let segments = segments?;
        let segments: Vec<&[u8]> = segments.iter().map(Vec::as_slice).collect();
        Some(pack(layout, digest, &checksums, &segments))
    }

    /// Writes an expected block's image at rest into its slot, all but the first word.
    pub(crate) fn unpack(&self, slot: Slot, layout: &Layout, header: &[u8], segments: &[&[u8]]) {
        slot::unpack(&self.arena, slot.0, layout, header, segments);
    }
}
