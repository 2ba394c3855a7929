//! Blocks' images on their way to the disk and from it: many at a time, and more as some have arrived.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::io::{Source, Transfer};
use super::{Device, NvmeTier};
use crate::error::{Error, Result};
use crate::tiers::Slot;

/// Blocks to be written, chosen as there is room for more under way.
pub(crate) trait Writes {
    /// Reserved slots of more blocks, at most `most`. None: there are no more now; asked again when one has ended.
    fn next(&mut self, most: usize) -> Vec<Slot>;

    /// The image of one of them, to be written to `place` in the file.
    fn transfer(&mut self, slot: Slot, place: u64) -> Transfer;

    /// These are there, and may be sealed, or have failed.
    fn written(&mut self, results: Vec<(Slot, Result<()>)>);
}

impl NvmeTier {
    /// Writes the image of a reserved slot, made by `transfer` from a place in the file; it may be sealed then. Blocks.
    pub(super) fn write(
        &self,
        slot: Slot,
        transfer: &mut dyn FnMut(u64) -> Transfer,
    ) -> Result<()> {
        struct One<'a> {
            slot: Option<Slot>,
            transfer: &'a mut dyn FnMut(u64) -> Transfer,
            result: Result<()>,
        }
        impl Writes for One<'_> {
            fn next(&mut self, _: usize) -> Vec<Slot> {
                self.slot.take().into_iter().collect()
            }

            fn transfer(&mut self, _: Slot, place: u64) -> Transfer {
                (self.transfer)(place)
            }

            fn written(&mut self, results: Vec<(Slot, Result<()>)>) {
                for (_, result) in results {
                    self.result = result;
                }
            }
        }
        let mut one = One {
            slot: Some(slot),
            transfer,
            result: Err(Error::NotFilled),
        };
        self.write_all(&mut one);
        one.result
    }

    /// Writes what there is, until there is no more and all has ended. Blocks.
    pub(crate) fn write_all(&self, writes: &mut dyn Writes) {
        match self.online() {
            Ok(device) => {
                let mut stream = Stream {
                    tier: self,
                    device: device.clone(),
                    writes,
                    under_way: Vec::new(),
                };
                device.disk.stream(&mut stream);
            }
            Err(_) => loop {
                let slots = writes.next(usize::MAX);
                if slots.is_empty() {
                    return;
                }
                let offline = |slot| (slot, Err(Error::Offline(self.dir.clone())));
                writes.written(slots.into_iter().map(offline).collect());
            },
        }
    }

    /// Reads the images of leased slots, each by `transfer` from a place in the file and one in `slots`. Blocks.
    pub(crate) fn fetch(
        &self,
        slots: &[Slot],
        transfer: &mut dyn FnMut(u64, usize) -> Transfer,
        mut done: impl FnMut(usize, Result<()>),
    ) {
        let offline = || Err(Error::Offline(self.dir.clone()));
        let Ok(device) = self.online() else {
            return (0..slots.len()).for_each(|place| done(place, offline()));
        };
        let mut places = Vec::with_capacity(slots.len());
        let mut transfers = Vec::with_capacity(slots.len());
        for (place, inside) in self.places(&device, slots).into_iter().enumerate() {
            match inside {
                Some(inside) => {
                    places.push(place);
                    transfers.push(transfer(inside.0, place));
                }
                None => done(place, offline()),
            }
        }
        let (mut failure, begun) = (None, Instant::now());
        let mut lost = Vec::new();
        device.disk.run(&transfers, |number, result| {
            let place = places[number];
            match &result {
                Ok(()) => {
                    self.reads.record(begun.elapsed());
                    self.health.lock().read_bytes += transfers[number].bytes() as u64;
                }
                Err(error) => {
                    failure.get_or_insert_with(|| error.to_string());
                    lost.push(slots[place]);
                }
            }
            done(place, result);
        });
        if let Some(failure) = failure {
            // A place that cannot be read takes the tier out once, not whenever it is wanted.
            self.forget(&lost);
            self.take_out(&device, &failure);
        }
    }

    /// Where the slots are in this device's file; None: they are of another time, or the tier is out.
    fn places(&self, device: &Arc<Device>, slots: &[Slot]) -> Vec<Option<Slot>> {
        let current = self.device.read();
        let is_it = (current.as_ref()).is_some_and(|now| Arc::ptr_eq(now, device));
        let contents = self.contents.lock();
        let place = |&slot| contents.inside(slot).filter(|_| is_it);
        slots.iter().map(place).collect()
    }
}

/// Writes as transfers of one device.
struct Stream<'a> {
    tier: &'a NvmeTier,
    device: Arc<Device>,
    writes: &'a mut dyn Writes,
    /// Each with its bytes and when it was begun.
    under_way: Vec<(Slot, usize, Instant)>,
}

impl Source for Stream<'_> {
    fn next(&mut self, most: usize) -> Vec<(u64, Transfer)> {
        loop {
            let slots = self.writes.next(most);
            if slots.is_empty() {
                return Vec::new();
            }
            // First, so that no slot is written while the record says that it holds another block.
            self.tier.record();
            let (mut transfers, mut failed) = (Vec::new(), Vec::new());
            let places = self.tier.places(&self.device, &slots);
            for (slot, place) in slots.into_iter().zip(places) {
                let Some(place) = place else {
                    failed.push((slot, Err(Error::Offline(self.tier.dir.clone()))));
                    continue;
                };
                let transfer = self.writes.transfer(slot, place.0);
                self.under_way
                    .push((slot, transfer.bytes(), Instant::now()));
                transfers.push((slot.0, transfer));
            }
            if !failed.is_empty() {
                self.writes.written(failed);
            }
            if !transfers.is_empty() {
                return transfers;
            }
        }
    }

    fn ended(&mut self, ended: Vec<(u64, io::Result<()>)>) {
        let (mut results, mut whole, mut failure) = (Vec::new(), Vec::new(), None);
        let mut written = 0;
        for (number, result) in ended {
            let mine = |(slot, ..): &(Slot, _, _)| slot.0 == number;
            if let Some(place) = self.under_way.iter().position(mine) {
                let (slot, bytes, begun) = self.under_way.swap_remove(place);
                if result.is_ok() {
                    self.tier.writes.record(begun.elapsed());
                    whole.push(slot);
                    written += bytes as u64;
                }
            }
            let result = result.map_err(|error| self.device.disk.failed(error));
            if let Err(error) = &result {
                failure.get_or_insert_with(|| error.to_string());
            }
            results.push((Slot(number), result));
        }
        self.tier.health.lock().written_bytes += written;
        {
            let mut contents = self.tier.contents.lock();
            for slot in whole {
                // Unless the tier went away meanwhile.
                if let Some(slot) = contents.inside(slot)
                    && contents.catalog.is_reserved(slot)
                {
                    contents.filled.insert(slot);
                }
            }
        }
        self.writes.written(results);
        if let Some(failure) = failure {
            self.tier.take_out(&self.device, &failure);
        }
    }
}
