//! Room for slots of several sizes in one space.
//!
//! The space is cut into regions; a region holds slots of one size (one slab), takes its size when the slab needs room,
//! and loses it when its last slot is empty. Pure bookkeeping: no byte of the space is touched.

use std::collections::BTreeMap;

use super::Slot;
use crate::error::{Error, Result};
use crate::eviction::Tick;

/// Regions a small space is cut into; large ones have more, of at most [`MAX_REGION_BYTES`].
const REGIONS: u64 = 32;
const MAX_REGION_BYTES: u64 = 1 << 30;
const ALIGNMENT: u64 = crate::image::ALIGNMENT as u64;

/// One slot size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SlabId(pub(super) usize);

pub(super) struct Slabs<T> {
    region_bytes: u64,
    regions: Vec<Option<Region<T>>>,
    unassigned: Vec<usize>,
    slabs: Vec<Slab>,
    by_size: BTreeMap<u64, SlabId>,
    used_bytes: u64,
}

struct Slab {
    slot_bytes: u64,
    /// Regions of this slab with vacant slots.
    open: Vec<usize>,
}

struct Region<T> {
    slab: SlabId,
    slot_bytes: u64,
    slots: Vec<Option<T>>,
    vacant: Vec<u32>,
    newest: Tick,
}

/// Bytes of a region of a new space: slots keep their places where it stays the same.
pub(super) fn region_bytes_of(capacity: u64) -> u64 {
    (capacity / REGIONS).clamp(ALIGNMENT, MAX_REGION_BYTES) / ALIGNMENT * ALIGNMENT
}

impl<T> Slabs<T> {
    pub(super) fn new(capacity: u64) -> Self {
        let region_bytes = region_bytes_of(capacity);
        let count = (capacity / region_bytes) as usize;
        Self {
            region_bytes,
            regions: (0..count).map(|_| None).collect(),
            unassigned: (0..count).rev().collect(),
            slabs: Vec::new(),
            by_size: BTreeMap::new(),
            used_bytes: 0,
        }
    }

    /// Bytes of a region: the largest slot there can be.
    pub(super) fn region_bytes(&self) -> u64 {
        self.region_bytes
    }

    /// The slab of this slot size.
    pub(super) fn open(&mut self, slot_bytes: u64) -> Result<SlabId> {
        if slot_bytes > self.region_bytes {
            return Err(Error::LayoutTooLarge {
                slot: slot_bytes,
                needed: slot_bytes * REGIONS,
            });
        }
        let next = SlabId(self.slabs.len());
        let id = *self.by_size.entry(slot_bytes).or_insert(next);
        if id == next {
            self.slabs.push(Slab {
                slot_bytes,
                open: Vec::new(),
            });
        }
        Ok(id)
    }

    /// Puts a value into a vacant slot of the slab, in a fresh region if there is one.
    pub(super) fn insert(&mut self, slab: SlabId, value: T) -> std::result::Result<Slot, T> {
        let slot_bytes = self.slabs[slab.0].slot_bytes;
        let index = match self.slabs[slab.0].open.last() {
            Some(&index) => index,
            None => match self.unassigned.pop() {
                Some(index) => {
                    self.assign(index, slab, slot_bytes);
                    index
                }
                None => return Err(value),
            },
        };
        let Some(region) = self.regions[index].as_mut() else {
            return Err(value);
        };
        let Some(number) = region.vacant.pop() else {
            return Err(value);
        };
        region.slots[number as usize] = Some(value);
        if region.vacant.is_empty() {
            self.slabs[slab.0].open.pop();
        }
        self.used_bytes += slot_bytes;
        Ok(Slot(
            index as u64 * self.region_bytes + u64::from(number) * slot_bytes,
        ))
    }

    /// Puts a value into this slot; false where the slab cannot have a slot there, or it is taken. After the last one
    /// comes [`settle`](Self::settle).
    pub(super) fn insert_at(&mut self, slab: SlabId, slot: Slot, value: T) -> bool {
        let slot_bytes = self.slabs[slab.0].slot_bytes;
        let index = (slot.0 / self.region_bytes) as usize;
        if self.regions.get(index).is_some_and(Option::is_none) {
            self.assign(index, slab, slot_bytes);
        }
        let Some((index, number)) = self.place(slot) else {
            return false;
        };
        let Some(region) = self.regions[index].as_mut() else {
            return false;
        };
        if region.slab != slab || region.slots[number].is_some() {
            return false;
        }
        region.slots[number] = Some(value);
        self.used_bytes += slot_bytes;
        true
    }

    /// Finds out which slots are vacant.
    pub(super) fn settle(&mut self) {
        self.unassigned.clear();
        for slab in &mut self.slabs {
            slab.open.clear();
        }
        for (index, region) in self.regions.iter_mut().enumerate().rev() {
            let Some(region) = region else {
                self.unassigned.push(index);
                continue;
            };
            let empty = |&number: &u32| region.slots[number as usize].is_none();
            region.vacant = (0..region.slots.len() as u32).rev().filter(empty).collect();
            if !region.vacant.is_empty() {
                self.slabs[region.slab.0].open.push(index);
            }
        }
    }

    fn assign(&mut self, index: usize, slab: SlabId, slot_bytes: u64) {
        let count = (self.region_bytes / slot_bytes) as u32;
        self.regions[index] = Some(Region {
            slab,
            slot_bytes,
            slots: (0..count).map(|_| None).collect(),
            vacant: (0..count).rev().collect(),
            newest: 0,
        });
        self.slabs[slab.0].open.push(index);
    }

    /// Bytes of the slab's slots.
    pub(super) fn slot_bytes(&self, slab: SlabId) -> u64 {
        self.slabs[slab.0].slot_bytes
    }

    /// Vacant slots of the slab, and all it could have.
    pub(super) fn room(&self, slab: SlabId) -> (usize, usize) {
        let of_slab = &self.slabs[slab.0];
        let in_region = (self.region_bytes / of_slab.slot_bytes) as usize;
        let open = of_slab
            .open
            .iter()
            .filter_map(|&index| self.regions[index].as_ref());
        let vacant: usize = open.map(|region| region.vacant.len()).sum();
        (
            vacant + self.unassigned.len() * in_region,
            self.regions.len() * in_region,
        )
    }

    /// Takes the value out of a slot, which is vacant then.
    pub(super) fn remove(&mut self, slot: Slot) -> Option<T> {
        let (index, number) = self.place(slot)?;
        let region = self.regions[index].as_mut()?;
        let value = region.slots[number].take()?;
        let slab = region.slab.0;
        self.used_bytes -= region.slot_bytes;
        if region.vacant.is_empty() {
            self.slabs[slab].open.push(index);
        }
        region.vacant.push(number as u32);
        if region.vacant.len() == region.slots.len() {
            self.regions[index] = None;
            self.unassigned.push(index);
            self.slabs[slab].open.retain(|&open| open != index);
        }
        Some(value)
    }

    pub(super) fn get(&self, slot: Slot) -> Option<&T> {
        let (index, number) = self.place(slot)?;
        self.regions[index].as_ref()?.slots[number].as_ref()
    }

    pub(super) fn get_mut(&mut self, slot: Slot) -> Option<&mut T> {
        let (index, number) = self.place(slot)?;
        self.regions[index].as_mut()?.slots[number].as_mut()
    }

    /// Values with their slots, in the order of the slots, from the one behind `after` on.
    pub(super) fn behind(&self, after: Option<Slot>) -> impl Iterator<Item = (Slot, &T)> {
        let from = after.map_or(0, |slot| slot.0 + 1);
        let first = (from / self.region_bytes) as usize;
        (self.regions.iter().enumerate())
            .skip(first)
            .filter_map(|(index, region)| {
                Some((index as u64 * self.region_bytes, region.as_ref()?))
            })
            .flat_map(move |(base, region)| {
                let number = from.saturating_sub(base).div_ceil(region.slot_bytes) as usize;
                let slots = region.slots.iter().enumerate().skip(number);
                slots.filter_map(move |(number, value)| {
                    let slot = Slot(base + number as u64 * region.slot_bytes);
                    Some((slot, value.as_ref()?))
                })
            })
    }

    /// Notes the use of a slot, for `coldest_region`.
    pub(super) fn used(&mut self, slot: Slot, now: Tick) {
        let region = self
            .place(slot)
            .and_then(|(index, _)| self.regions[index].as_mut());
        if let Some(region) = region {
            region.newest = now;
        }
    }

    /// The taken slots of that region of another slab whose last use is the oldest and before `before`, of those whose
    /// values `may_go`.
    pub(super) fn coldest_region(
        &self,
        slab: SlabId,
        before: Tick,
        may_go: impl Fn(&mut dyn Iterator<Item = &T>) -> bool,
    ) -> Option<Vec<Slot>> {
        let mut candidates: Vec<(Tick, usize)> = (self.regions.iter().enumerate())
            .filter_map(|(index, region)| Some((region.as_ref()?, index)))
            .filter(|(region, _)| region.slab != slab && region.newest < before)
            .map(|(region, index)| (region.newest, index))
            .collect();
        candidates.sort_unstable();
        candidates.into_iter().find_map(|(_, index)| {
            let region = self.regions[index].as_ref()?;
            may_go(&mut region.slots.iter().flatten()).then(|| {
                let base = index as u64 * self.region_bytes;
                let taken = region
                    .slots
                    .iter()
                    .enumerate()
                    .filter(|(_, value)| value.is_some());
                taken
                    .map(|(number, _)| Slot(base + number as u64 * region.slot_bytes))
                    .collect()
            })
        })
    }

    pub(super) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    pub(super) fn len(&self) -> usize {
        self.slabs.len()
    }

    fn place(&self, slot: Slot) -> Option<(usize, usize)> {
        let index = (slot.0 / self.region_bytes) as usize;
        let region = self.regions.get(index)?.as_ref()?;
        let offset = slot.0 % self.region_bytes;
        let number = (offset / region.slot_bytes) as usize;
        (offset % region.slot_bytes == 0 && number < region.slots.len()).then_some((index, number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_all_sizes_never_overlap_and_all_room_is_used_again() {
        let capacity = 32 * 4 * ALIGNMENT;
        let mut slabs = Slabs::new(capacity);
        let sizes = [ALIGNMENT, 3 * ALIGNMENT, 4 * ALIGNMENT];
        let ids = sizes.map(|size| slabs.open(size).unwrap());
        for _ in 0..2 {
            let mut held: Vec<(Slot, u64)> = Vec::new();
            'fill: for round in 0.. {
                let kind = round % sizes.len();
                match slabs.insert(ids[kind], round) {
                    Ok(slot) => held.push((slot, sizes[kind])),
                    Err(_) => break 'fill,
                }
            }
            held.sort();
            assert!(
                held.windows(2)
                    .all(|pair| pair[0].0.0 + pair[0].1 <= pair[1].0.0)
            );
            assert!(held.iter().all(|(slot, size)| slot.0 + size <= capacity));
            assert_eq!(
                slabs.used_bytes(),
                held.iter().map(|(_, size)| size).sum::<u64>()
            );
            let slots: Vec<Slot> = held.iter().map(|(slot, _)| *slot).collect();
            let behind = |after| {
                slabs
                    .behind(after)
                    .map(|(slot, _)| slot)
                    .collect::<Vec<_>>()
            };
            assert_eq!(behind(None), slots);
            for at in 0..slots.len() {
                assert_eq!(behind(Some(slots[at])), slots[at + 1..]);
            }
            for (slot, _) in held {
                assert!(slabs.remove(slot).is_some());
                assert!(slabs.get(slot).is_none());
            }
            assert_eq!(slabs.unassigned.len(), 32);
        }
    }

    #[test]
    fn a_region_is_offered_to_another_slab_only_when_cold_and_idle() {
        let mut slabs = Slabs::new(32 * ALIGNMENT);
        let small = slabs.open(ALIGNMENT).unwrap();
        let slot = slabs.insert(small, true).unwrap();
        slabs.used(slot, 5);
        let other = SlabId(9);
        assert_eq!(slabs.coldest_region(other, 5, |_| true), None);
        assert_eq!(slabs.coldest_region(other, 6, |_| true), Some(vec![slot]));
        assert_eq!(
            slabs.coldest_region(other, 6, |mut all| Iterator::all(&mut all, |idle| !idle)),
            None
        );
        assert_eq!(slabs.coldest_region(small, 6, |_| true), None);
    }

    #[test]
    fn a_slot_larger_than_a_region_is_refused_with_the_size_it_needs() {
        let mut slabs = Slabs::<()>::new(32 * ALIGNMENT);
        let error = slabs.open(2 * ALIGNMENT).unwrap_err();
        assert!(matches!(error, Error::LayoutTooLarge { needed, .. } if needed == 64 * ALIGNMENT));
    }
}
