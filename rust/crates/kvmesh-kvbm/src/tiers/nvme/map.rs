//! The record of what every slot holds: a log of events, read once at start.
//!
//! Blocks' bytes are not read to know what is there. An event is on record before the slot it frees is written again
//! and after the slot it fills was, so a process that dies at any moment leaves a record whose slots hold what it says.
//! Power may fail between the two; then a slot does not prove its block, which is found when it is read.
//!
//! Each entry is a length, a checksum and that many bytes; what follows the first that is not whole was being written
//! when its writer died and is cut off.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use kvmesh_core::Digest;
use rustc_hash::FxHashMap;
use twox_hash::XxHash3_64;

use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::tiers::catalog::Event;
use crate::tiers::{NamespaceId, Slot};

const NAME: &str = "map";
/// Changes with the entries, the image of a block, and the digests' meaning.
const VERSION: u32 = 1;
/// No entry is longer: a namespace with 250,000 segments.
const MAX_ENTRY: usize = 1 << 20;
/// A log is written anew when it has so many entries for each block, and this many more.
const SLACK: u64 = 3;
const LEAST: u64 = 65_536;

const GEOMETRY: u8 = 1;
const NAMESPACE: u8 = 2;
const STORED: u8 = 3;
const REMOVED: u8 = 4;

/// An open log, at its end.
pub(super) struct Map {
    file: File,
    path: PathBuf,
    entries: u64,
    /// How many are recorded.
    namespaces: usize,
    unsynced: bool,
}

/// What a log said.
#[derive(Debug, Default)]
pub(super) struct Recorded {
    pub(super) region_bytes: Option<u64>,
    /// By their numbers.
    pub(super) namespaces: Vec<Namespace>,
    /// Blocks that are there, in the order they were stored.
    pub(super) stored: Vec<Event>,
}

impl Map {
    /// Opens the log in `dir` and reads it; a new one if there is none, or only one of another version.
    pub(super) fn open(dir: &Path) -> Result<(Self, Recorded)> {
        let path = dir.join(NAME);
        let failed = || Error::io("cannot use", &path);
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(failed())?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed())?;
        let (recorded, entries, whole) = replay(&bytes);
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(failed())?;
        }
        let map = Self {
            file,
            path,
            entries,
            namespaces: recorded.namespaces.len(),
            unsynced: true,
        };
        Ok((map, recorded))
    }

    /// How many namespaces are recorded.
    pub(super) fn namespaces(&self) -> usize {
        self.namespaces
    }

    /// Adds namespaces, whose numbers are the next, and events. They outlive this process at once, the machine after
    /// `sync`.
    pub(super) fn append(&mut self, namespaces: &[Namespace], events: &[Event]) -> Result<()> {
        let mut log = Log::default();
        for namespace in namespaces {
            log.entry(NAMESPACE, &[&namespace.to_bytes()]);
        }
        for event in events {
            log.event(event);
        }
        self.write(&log)?;
        self.namespaces += namespaces.len();
        Ok(())
    }

    /// Makes what was added outlive the machine.
    pub(super) fn sync(&mut self) -> Result<()> {
        if std::mem::take(&mut self.unsynced) {
            self.file
                .sync_data()
                .map_err(Error::io("cannot write", &self.path))?;
        }
        Ok(())
    }

    /// Whether the log is mostly history.
    pub(super) fn is_stale(&self, blocks: u64) -> bool {
        self.entries > SLACK * blocks + LEAST
    }

    /// Puts this in place of all that was recorded.
    pub(super) fn rewrite(
        &mut self,
        region_bytes: u64,
        namespaces: &[Namespace],
        stored: &[Event],
    ) -> Result<()> {
        let mut log = Log::default();
        let geometry = [&VERSION.to_le_bytes()[..], &region_bytes.to_le_bytes()];
        log.entry(GEOMETRY, &geometry);
        for namespace in namespaces {
            log.entry(NAMESPACE, &[&namespace.to_bytes()]);
        }
        for event in stored {
            log.event(event);
        }
        let new = self.path.with_extension("new");
        let failed = || Error::io("cannot write", &new);
        // Appending, as the log it becomes.
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&new)
            .map_err(failed())?;
        file.set_len(0).map_err(failed())?;
        file.write_all(&log.bytes).map_err(failed())?;
        file.sync_all().map_err(failed())?;
        std::fs::rename(&new, &self.path).map_err(Error::io("cannot write", &self.path))?;
        if let Some(dir) = self.path.parent() {
            let synced = File::open(dir).and_then(|dir| dir.sync_all());
            synced.map_err(Error::io("cannot write", &self.path))?;
        }
        (self.file, self.entries, self.unsynced) = (file, log.entries, false);
        self.namespaces = namespaces.len();
        Ok(())
    }

    fn write(&mut self, log: &Log) -> Result<()> {
        if log.entries == 0 {
            return Ok(());
        }
        self.file
            .write_all(&log.bytes)
            .map_err(Error::io("cannot write", &self.path))?;
        self.entries += log.entries;
        self.unsynced = true;
        Ok(())
    }
}

/// Entries as bytes.
#[derive(Default)]
struct Log {
    bytes: Vec<u8>,
    entries: u64,
}

impl Log {
    fn entry(&mut self, kind: u8, fields: &[&[u8]]) {
        let start = self.bytes.len();
        self.bytes.extend([0; 12]);
        self.bytes.push(kind);
        for field in fields {
            self.bytes.extend_from_slice(field);
        }
        let length = (self.bytes.len() - start - 12) as u32;
        let checksum = XxHash3_64::oneshot(&self.bytes[start + 12..]);
        self.bytes[start..start + 4].copy_from_slice(&length.to_le_bytes());
        self.bytes[start + 4..start + 12].copy_from_slice(&checksum.to_le_bytes());
        self.entries += 1;
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Stored {
                slot,
                namespace,
                digest,
                parent,
            } => {
                let parent = parent.as_ref().map_or(&[][..], |parent| parent.as_bytes());
                let fields = [
                    &slot.0.to_le_bytes()[..],
                    &namespace.0.to_le_bytes(),
                    digest.as_bytes(),
                    parent,
                ];
                self.entry(STORED, &fields);
            }
            Event::Removed { slot, .. } => self.entry(REMOVED, &[&slot.0.to_le_bytes()]),
        }
    }
}

/// What the bytes record, how many entries they are, and how many bytes of them are whole.
fn replay(bytes: &[u8]) -> (Recorded, u64, usize) {
    let mut recorded = Recorded::default();
    let mut slots: FxHashMap<Slot, (u64, Event)> = FxHashMap::default();
    let (mut entries, mut at) = (0, 0);
    while let Some((body, next)) = entry_at(bytes, at) {
        if apply(body, entries, &mut recorded, &mut slots).is_none() {
            break;
        }
        (entries, at) = (entries + 1, next);
    }
    let mut stored: Vec<(u64, Event)> = slots.into_values().collect();
    stored.sort_unstable_by_key(|(order, _)| *order);
    recorded.stored = stored.into_iter().map(|(_, event)| event).collect();
    (recorded, entries, at)
}

fn entry_at(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let head = bytes.get(at..at + 12)?;
    let length = u32::from_le_bytes(*head.first_chunk()?) as usize;
    let checksum = u64::from_le_bytes(*head[4..].first_chunk()?);
    if length == 0 || length > MAX_ENTRY {
        return None;
    }
    let body = bytes.get(at + 12..at + 12 + length)?;
    (XxHash3_64::oneshot(body) == checksum).then_some((body, at + 12 + length))
}

fn apply(
    body: &[u8],
    order: u64,
    recorded: &mut Recorded,
    slots: &mut FxHashMap<Slot, (u64, Event)>,
) -> Option<()> {
    let (&kind, fields) = body.split_first()?;
    match kind {
        GEOMETRY => {
            let (version, rest) = fields.split_first_chunk()?;
            if u32::from_le_bytes(*version) != VERSION {
                return None;
            }
            recorded.region_bytes = Some(u64::from_le_bytes(rest.try_into().ok()?));
        }
        NAMESPACE => recorded.namespaces.push(Namespace::from_bytes(fields)?),
        STORED => {
            let (slot, rest) = fields.split_first_chunk()?;
            let (namespace, rest) = rest.split_first_chunk()?;
            let (digest, rest) = rest.split_first_chunk::<{ Digest::LEN }>()?;
            let slot = Slot(u64::from_le_bytes(*slot));
            let parent = match rest {
                [] => None,
                parent => Some(Digest::new(parent.try_into().ok()?)),
            };
            let stored = Event::Stored {
                slot,
                namespace: NamespaceId(u32::from_le_bytes(*namespace)),
                digest: Digest::new(*digest),
                parent,
            };
            slots.insert(slot, (order, stored));
        }
        REMOVED => {
            slots.remove(&Slot(u64::from_le_bytes(fields.try_into().ok()?)));
        }
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(slot: u64, name: u8, parent: Option<u8>) -> Event {
        Event::Stored {
            slot: Slot(slot),
            namespace: NamespaceId(0),
            digest: Digest::new([name; 32]),
            parent: parent.map(|name| Digest::new([name; 32])),
        }
    }

    fn namespace() -> Namespace {
        Namespace {
            model: "m".into(),
            revision: "é".into(),
            dtype: "f32".into(),
            layout: String::new(),
            rank: 1,
            ranks: 2,
            segments: vec![100, 7],
        }
    }

    fn removed(slot: u64, number: u8) -> Event {
        Event::Removed {
            slot: Slot(slot),
            namespace: NamespaceId(0),
            digest: Digest::new([number; 32]),
            parent: None,
        }
    }

    fn written(dir: &Path) -> Map {
        let (mut map, recorded) = Map::open(dir).unwrap();
        assert_eq!(recorded.region_bytes, None);
        map.rewrite(4096, &[namespace()], &[]).unwrap();
        map.append(&[], &[stored(0, 1, None), stored(4096, 2, Some(1))])
            .unwrap();
        map.append(&[], &[removed(0, 1), stored(0, 3, None)])
            .unwrap();
        map
    }

    #[test]
    fn a_log_tells_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        drop(written(dir.path()));
        let (mut map, recorded) = Map::open(dir.path()).unwrap();
        assert_eq!(recorded.region_bytes, Some(4096));
        assert_eq!(recorded.namespaces, [namespace()]);
        assert_eq!(
            recorded.stored,
            [stored(4096, 2, Some(1)), stored(0, 3, None)]
        );
        map.rewrite(4096, &recorded.namespaces, &recorded.stored[1..])
            .unwrap();
        map.append(&[], &[stored(8192, 9, None)]).unwrap();
        drop(map);
        let (_, recorded) = Map::open(dir.path()).unwrap();
        assert_eq!(recorded.stored, [stored(0, 3, None), stored(8192, 9, None)]);
    }

    #[test]
    fn a_log_cut_anywhere_tells_what_was_there_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        drop(written(dir.path()));
        let path = dir.path().join(NAME);
        let bytes = std::fs::read(&path).unwrap();
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let (mut map, recorded) = Map::open(dir.path()).unwrap();
            assert!(recorded.stored.len() <= 2);
            let before = recorded.stored.len();
            map.append(&[], &[stored(1 << 20, 7, None)]).unwrap();
            drop(map);
            let (_, recorded) = Map::open(dir.path()).unwrap();
            assert_eq!(recorded.stored.len(), before + 1, "cut at {length}");
        }
    }

    #[test]
    fn a_flipped_bit_ends_the_record_there() {
        let dir = tempfile::tempdir().unwrap();
        drop(written(dir.path()));
        let bytes = std::fs::read(dir.path().join(NAME)).unwrap();
        let (whole, ..) = replay(&bytes);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let (recorded, _, at) = replay(&bad);
            assert!(at <= bit / 8, "bit {bit}");
            assert_ne!(recorded.stored, whole.stored);
        }
    }
}
