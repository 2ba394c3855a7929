//! Random programs, well-behaved and hostile, against the reference model: every match, digest and
//! size has to agree.

#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod columns;
mod reference;

use std::collections::BTreeMap;

use columns::{CLEARED, Columns, REMOVED};
use kvmesh_core::{BlockHash, ErrorKind, SetDigest, Tier};
use kvmesh_index::{HolderId, Matches, PrefixIndex};
use proptest::{prelude::*, sample::Index};
use reference::{Holder, Reference};

/// What to do; an `Index` picks among what is there at that moment.
#[derive(Clone, Debug)]
enum Op {
    AddEngine {
        node: Option<u8>,
    },
    AddStore {
        node: Option<u8>,
    },
    Store {
        holder: Index,
        tier: Index,
        blocks: Blocks,
        parent: Parent,
    },
    Remove {
        holder: Index,
        tier: Tier,
        blocks: Blocks,
    },
    Clear {
        holder: Index,
        tier: Option<Tier>,
    },
    Drop {
        holder: Index,
    },
    Match {
        blocks: Blocks,
    },
    /// A batch as it comes over the wire.
    Apply {
        holder: Index,
        events: Vec<Event>,
    },
    /// Goes on with what a snapshot brings back.
    Restore,
}

/// In whatever tier: those that the holder cannot have are skipped.
#[derive(Clone, Debug)]
enum Event {
    Stored(Tier, Blocks, Parent),
    Removed(Tier, Blocks),
    Cleared(Option<Tier>),
}

#[derive(Clone, Debug)]
enum Parent {
    True,
    None,
    Wrong(u64),
}

/// A stretch of a prompt, or blocks in no order at all.
#[derive(Clone, Debug)]
enum Blocks {
    Stretch {
        prompt: u8,
        start: usize,
        len: usize,
    },
    Prompt {
        prompt: u8,
        len: usize,
    },
    Any(Vec<u64>),
}

impl Parent {
    fn of(&self, blocks: &Blocks) -> Option<u64> {
        match self {
            Parent::True => blocks.parent(),
            Parent::None => None,
            Parent::Wrong(hash) => Some(*hash),
        }
    }
}

impl Blocks {
    fn hashes(&self) -> Vec<u64> {
        match self {
            Blocks::Stretch { prompt, start, len } => chain(*prompt, start + len).split_off(*start),
            Blocks::Prompt { prompt, len } => chain(*prompt, *len),
            Blocks::Any(hashes) => hashes.clone(),
        }
    }

    fn parent(&self) -> Option<u64> {
        match self {
            Blocks::Stretch { prompt, start, .. } => chain(*prompt, *start).pop(),
            _ => None,
        }
    }
}

/// The first blocks of one of 16 prompts. They part ways at 3, 64, 70 and 150 blocks.
fn chain(prompt: u8, len: usize) -> Vec<u64> {
    (0..len)
        .map(|at| {
            let forks = [3, 64, 70, 150].iter().filter(|&&fork| at >= fork).count() as u32;
            let branch = u64::from(prompt) & ((1 << forks) - 1);
            (branch << 32 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        })
        .collect()
}

fn tier() -> impl Strategy<Value = Tier> {
    prop::sample::select(Tier::ALL.to_vec())
}

fn node() -> impl Strategy<Value = Option<u8>> {
    prop::option::of(0u8..3)
}

fn blocks() -> impl Strategy<Value = Blocks> {
    prop_oneof![
        4 => (0u8..16, 0usize..160, 1usize..90)
            .prop_map(|(prompt, start, len)| Blocks::Stretch { prompt, start, len }),
        4 => (0u8..16, 1usize..200).prop_map(|(prompt, len)| Blocks::Prompt { prompt, len }),
        1 => prop::collection::vec(0u64..40, 0..50).prop_map(Blocks::Any),
    ]
}

fn hostile_blocks() -> impl Strategy<Value = Blocks> {
    prop::collection::vec(0u64..40, 0..150).prop_map(Blocks::Any)
}

fn parent() -> impl Strategy<Value = Parent> {
    prop_oneof![
        4 => Just(Parent::True),
        1 => Just(Parent::None),
        1 => (0u64..40).prop_map(Parent::Wrong),
    ]
}

fn op<S: Strategy<Value = Blocks> + 'static>(blocks: fn() -> S) -> impl Strategy<Value = Op> {
    let holder = any::<Index>;
    prop_oneof![
        2 => node().prop_map(|node| Op::AddEngine { node }),
        2 => node().prop_map(|node| Op::AddStore { node }),
        12 => (holder(), any::<Index>(), blocks(), parent())
            .prop_map(|(holder, tier, blocks, parent)| Op::Store { holder, tier, blocks, parent }),
        8 => (holder(), tier(), blocks())
            .prop_map(|(holder, tier, blocks)| Op::Remove { holder, tier, blocks }),
        1 => (holder(), prop::option::of(tier())).prop_map(|(holder, tier)| Op::Clear { holder, tier }),
        1 => holder().prop_map(|holder| Op::Drop { holder }),
        8 => blocks().prop_map(|blocks| Op::Match { blocks }),
        6 => (holder(), prop::collection::vec(event(blocks), 0..5))
            .prop_map(|(holder, events)| Op::Apply { holder, events }),
        1 => Just(Op::Restore),
    ]
}

fn event<S: Strategy<Value = Blocks>>(blocks: fn() -> S) -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (tier(), blocks(), parent()).prop_map(|(tier, of, parent)| Event::Stored(tier, of, parent)),
        3 => (tier(), blocks()).prop_map(|(tier, of)| Event::Removed(tier, of)),
        1 => prop::option::of(tier()).prop_map(Event::Cleared),
    ]
}

/// Index and model side by side, with the index's ids as the model's names.
struct Pair {
    index: PrefixIndex,
    model: Reference,
    names: BTreeMap<u32, String>,
    /// Holders that there ever were.
    added: usize,
    max_bytes: Option<usize>,
    /// Whether blocks were forgotten at the cap, in whichever life of the index.
    forgetful: bool,
    /// Whether this is another life, which knows nothing of what was forgotten before.
    restored: bool,
    matches: Matches,
}

impl Pair {
    fn new(max_bytes: Option<usize>) -> Self {
        let index = PrefixIndex::new(max_bytes);
        let mut pair = Self {
            index,
            model: Reference::default(),
            names: BTreeMap::new(),
            added: 0,
            max_bytes,
            forgetful: false,
            restored: false,
            matches: Matches::new(),
        };
        pair.run(&Op::AddEngine { node: Some(0) });
        pair.run(&Op::AddStore { node: Some(0) });
        pair
    }

    fn add(&mut self, engine: bool, node: Option<u8>) {
        let name = format!("holder-{}", self.added);
        self.added += 1;
        let node = node.map(|node| format!("node-{node}"));
        let id = if engine {
            self.index.add_engine(&name, node.as_deref())
        } else {
            self.index.add_store(&name, node.as_deref())
        };
        let id = id.unwrap().get();
        let known = self.model.holders.insert(id, Holder { engine, node });
        assert!(known.is_none(), "an id came twice");
        self.names.insert(id, name);
    }

    fn tiers(&self, holder: u32) -> &'static [Tier] {
        let Holder { engine, node } = &self.model.holders[&holder];
        match (engine, node) {
            (true, _) => &[Tier::Device],
            (false, Some(_)) => &[Tier::Host, Tier::Nvme, Tier::Network],
            (false, None) => &[Tier::Network],
        }
    }

    fn apply(&mut self, id: u32, events: &[Event]) {
        let name = self.names[&id].clone();
        let mut batch = Columns {
            holder: &name,
            ..Columns::default()
        };
        // On the wire 0 is no tier, or all of them.
        let number = |tier: Tier| tier as u64 + 1;
        for event in events {
            batch = match event {
                Event::Stored(tier, blocks, parent) => {
                    let (hashes, parent) = (blocks.hashes(), parent.of(blocks));
                    if self.tiers(id).contains(tier) {
                        self.model.store(id, &hashes, *tier);
                    }
                    batch.event(number(*tier), u64::from(parent.is_some()), parent, &hashes)
                }
                Event::Removed(tier, blocks) => {
                    let hashes = blocks.hashes();
                    self.model.remove(id, &hashes, *tier);
                    batch.event(number(*tier), REMOVED, None, &hashes)
                }
                Event::Cleared(tier) => {
                    self.model.clear(id, *tier);
                    batch.event(tier.map_or(0, number), CLEARED, None, &[])
                }
            };
        }
        self.index.apply(&batch.bytes()).unwrap();
    }

    fn restore(&mut self) {
        self.forgetful |= self.index.stats().forgotten > 0;
        let copy = PrefixIndex::restore(&self.index.snapshot(), self.max_bytes).unwrap();
        for &id in self.model.holders.keys() {
            for tier in Tier::ALL {
                let digest =
                    |index: &PrefixIndex| index.digest(HolderId::from_raw(id), tier).unwrap();
                let (before, after) = (digest(&self.index), digest(&copy));
                if copy.stats().forgotten == 0 {
                    assert_eq!(after, before);
                } else {
                    assert!(after.count <= before.count);
                }
            }
        }
        self.index = copy;
        self.restored = true;
    }

    fn pick(&self, holder: &Index) -> Option<u32> {
        let ids: Vec<u32> = self.model.holders.keys().copied().collect();
        (!ids.is_empty()).then(|| *holder.get(&ids))
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::AddEngine { node } => self.add(true, *node),
            Op::AddStore { node } => self.add(false, *node),
            Op::Store {
                holder,
                tier,
                blocks,
                parent,
            } => {
                let Some(id) = self.pick(holder) else { return };
                let tier = *tier.get(self.tiers(id));
                let hashes = blocks.hashes();
                self.index
                    .store(HolderId::from_raw(id), &hashes, parent.of(blocks), tier)
                    .unwrap();
                self.model.store(id, &hashes, tier);
            }
            Op::Remove {
                holder,
                tier,
                blocks,
            } => {
                let Some(id) = self.pick(holder) else { return };
                let hashes = blocks.hashes();
                self.index
                    .remove(HolderId::from_raw(id), &hashes, *tier)
                    .unwrap();
                self.model.remove(id, &hashes, *tier);
            }
            Op::Clear { holder, tier } => {
                let Some(id) = self.pick(holder) else { return };
                self.index.clear(HolderId::from_raw(id), *tier).unwrap();
                self.model.clear(id, *tier);
            }
            Op::Drop { holder } => {
                let Some(id) = self.pick(holder) else { return };
                self.index.drop_holder(HolderId::from_raw(id)).unwrap();
                self.model.drop_holder(id);
                self.names.remove(&id);
                let error = self.index.clear(HolderId::from_raw(id), None).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NotFound);
            }
            Op::Match { blocks } => {
                let hashes = blocks.hashes();
                let (found, truth) = (self.matches(&hashes), self.model.matches(&hashes));
                if self.forgetful || self.index.stats().forgotten > 0 {
                    assert_less(&found, &truth);
                } else {
                    assert_eq!(found, truth);
                }
            }
            Op::Apply { holder, events } => {
                let Some(id) = self.pick(holder) else { return };
                self.apply(id, events);
            }
            Op::Restore => self.restore(),
        }
    }

    fn matches(&mut self, hashes: &[u64]) -> BTreeMap<u32, [u32; 4]> {
        self.index.matches(hashes, &mut self.matches);
        let found: BTreeMap<_, _> = self
            .matches
            .iter()
            .map(|found| (found.engine.get(), found.depths))
            .collect();
        assert_eq!(found.len(), self.matches.len(), "an engine came twice");
        found
    }

    /// What a holder's part lacks was forgotten of it.
    fn check_forgotten(&self) {
        for &id in self.model.holders.keys() {
            for tier in Tier::ALL {
                let id = HolderId::from_raw(id);
                let held = self.index.digest(id, tier).unwrap().count;
                let truth = self.model.tier(id.get(), tier).len() as u64;
                let forgotten = self.index.forgotten(id, tier).unwrap();
                assert!(held <= truth && truth <= held + forgotten);
            }
        }
    }

    fn check(&mut self) {
        for &id in self.model.holders.keys() {
            for tier in Tier::ALL {
                let mut truth = SetDigest::default();
                let mut wanted: Vec<u64> = self.model.tier(id, tier);
                wanted
                    .iter()
                    .for_each(|&hash| truth.insert(BlockHash(hash)));
                wanted.sort_unstable();
                let mut blocks = self.index.blocks(HolderId::from_raw(id), tier).unwrap();
                blocks.sort_unstable();
                assert_eq!(blocks, wanted);
                assert_eq!(
                    self.index.digest(HolderId::from_raw(id), tier).unwrap(),
                    truth
                );
            }
        }
        let stats = self.index.stats();
        assert_eq!(stats.held, self.model.held.len() as u64);
        let mut distinct: Vec<u64> = self.model.held.iter().map(|&(_, _, hash)| hash).collect();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(stats.blocks, distinct.len());
        assert_eq!(stats.holders, self.model.holders.len());
        // Emptied, the index holds nothing at all.
        for id in self.model.holders.keys() {
            self.index.drop_holder(HolderId::from_raw(*id)).unwrap();
        }
        let empty = self.index.stats();
        assert_eq!(
            (empty.blocks, empty.held, empty.runs, empty.holders),
            (0, 0, 0, 0)
        );
    }
}

/// Under-reporting is what a cap may cost; over-reporting is not.
fn assert_less(found: &BTreeMap<u32, [u32; 4]>, truth: &BTreeMap<u32, [u32; 4]>) {
    for (engine, depths) in found {
        let limits = truth
            .get(engine)
            .expect("an engine that sees nothing was found");
        assert!(
            depths
                .iter()
                .zip(limits)
                .all(|(depth, limit)| depth <= limit)
        );
        assert!(depths.is_sorted());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn programs(ops in prop::collection::vec(op(blocks), 1..80)) {
        let mut pair = Pair::new(None);
        ops.iter().for_each(|op| pair.run(op));
        pair.check();
    }

    #[test]
    fn hostile_programs(ops in prop::collection::vec(op(hostile_blocks), 1..80)) {
        let mut pair = Pair::new(None);
        ops.iter().for_each(|op| pair.run(op));
        pair.check();
    }

    #[test]
    fn a_cap_holds_and_never_over_reports(
        ops in prop::collection::vec(op(blocks), 1..80),
        max_bytes in 0usize..30_000,
    ) {
        let mut pair = Pair::new(Some(max_bytes));
        for op in &ops {
            pair.run(op);
            let stats = pair.index.stats();
            // Tallies of the holders themselves cannot be forgotten.
            let fixed = stats.runs == 0;
            if !pair.restored {
                pair.check_forgotten();
            }
            prop_assert!(fixed || stats.bytes <= max_bytes, "{} of {max_bytes}", stats.bytes);
        }
    }
}
