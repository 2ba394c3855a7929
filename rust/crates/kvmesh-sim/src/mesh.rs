//! kvmesh's own router under simulation: the selector and the prefix index, as the service puts them together.

use std::rc::Rc;

use kvmesh_core::Tier;
use kvmesh_index::{HolderId, Matches, PrefixIndex};
use kvmesh_select::{
    Config, Context, Found, Lookup, Placed, Probe, Progress, Refused, Request as Wanted, Role,
    Selector, WorkerId, WorkerSpec,
};
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rustc_hash::FxHashMap;

use crate::{
    Error, Result,
    cluster::Cluster,
    router::{Placement, Router},
    store::Change,
    trace::Request,
};

/// The prefix index with the selector's names for its engines.
struct Index {
    prefixes: PrefixIndex,
    holders: Vec<HolderId>,
    /// By node; the network's after those of the nodes.
    stores: Vec<HolderId>,
    workers: FxHashMap<HolderId, WorkerId>,
    matches: Matches,
}

impl Lookup for Index {
    fn matches(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        self.prefixes.matches(blocks, &mut self.matches);
        let named = |hit: kvmesh_index::Match| {
            Some(Found {
                worker: *self.workers.get(&hit.engine)?,
                depths: hit.depths,
            })
        };
        found.extend(self.matches.iter().filter_map(named));
    }
}

/// kvmesh's router.
pub struct Mesh {
    selector: Selector,
    index: Index,
    ids: Vec<WorkerId>,
    numbers: FxHashMap<WorkerId, usize>,
    chance: ChaCha8Rng,
    placed: Vec<Placed>,
    refused: Vec<Refused>,
    leases: Vec<u64>,
    /// Factors by which workers' times are misread.
    errors: Vec<f64>,
}

impl Mesh {
    /// A router for a cluster. What it measures of each worker is off by a factor of its own, drawn once from
    /// `1 - rate_error .. 1 + rate_error`.
    pub fn new(
        cluster: &Cluster,
        config: Config,
        requests: usize,
        rate_error: f64,
        seed: u64,
    ) -> Result<Self> {
        let mut chance = ChaCha8Rng::seed_from_u64(seed);
        let mut mesh = Self {
            selector: Selector::new(Config {
                block_tokens: cluster.shape.block_tokens,
                lease_ttl_ms: f64::INFINITY,
                ..config
            }),
            index: Index {
                prefixes: PrefixIndex::new(None),
                holders: Vec::new(),
                stores: Vec::new(),
                workers: FxHashMap::default(),
                matches: Matches::new(),
            },
            ids: Vec::new(),
            numbers: FxHashMap::default(),
            placed: Vec::new(),
            refused: Vec::new(),
            leases: vec![0; requests],
            errors: (0..cluster.workers())
                .map(|_| 1.0 + rate_error * chance.random_range(-1.0..=1.0))
                .collect(),
            chance,
        };
        let named = |node: usize| format!("node-{node}");
        let taken = |error: kvmesh_core::Error| Error::invalid(error.to_string());
        for node in 0..cluster.stores() {
            let name = named(node);
            let store = mesh.index.prefixes.add_store(&name, Some(&name));
            mesh.index.stores.push(store.map_err(taken)?);
        }
        if cluster.store.is_some_and(|shape| shape.network > 0) {
            let store = mesh.index.prefixes.add_store("network", None);
            mesh.index.stores.push(store.map_err(taken)?);
        }
        for number in 0..cluster.workers() {
            let role = match number {
                n if n < cluster.aggregated => Role::Aggregated,
                n if n < cluster.aggregated + cluster.prefill => Role::Prefill,
                _ => Role::Decode,
            };
            let spec = WorkerSpec {
                key: number as u64,
                role,
                class: "simulated".into(),
                pool: 0,
                blocks: cluster.shape.blocks,
                pass_tokens: cluster.shape.pass_tokens,
                probe: probe(cluster, mesh.errors[number]),
                offers: Vec::new(),
            };
            let id = mesh.selector.add_worker(&spec);
            mesh.selector.misread(id, mesh.errors[number]);
            let holder = mesh
                .index
                .prefixes
                .add_engine(
                    &number.to_string(),
                    cluster
                        .store
                        .map(|_| named(cluster.node_of(number)))
                        .as_deref(),
                )
                .map_err(taken)?;
            mesh.ids.push(id);
            mesh.numbers.insert(id, number);
            mesh.index.holders.push(holder);
            mesh.index.workers.insert(holder, id);
        }
        Ok(mesh)
    }

    /// The selector, to ask about its state.
    pub fn selector(&self) -> &Selector {
        &self.selector
    }

    /// Lets the selector do something, and carries out what it placed.
    fn tell<R>(
        &mut self,
        now: f64,
        placements: &mut Vec<Placement>,
        what: impl FnOnce(&mut Selector, &[u64], &mut Context<'_>) -> R,
    ) -> R {
        let Self {
            selector,
            index,
            chance,
            placed,
            refused,
            leases,
            ..
        } = self;
        let mut context = Context {
            now,
            lookup: index,
            chance,
            placed,
            refused,
        };
        let answer = what(selector, leases, &mut context);
        for placed in self.placed.drain(..) {
            let request = placed.request as usize;
            self.leases[request] = placed.lease;
            placements.push(Placement {
                request,
                prefill: self.numbers[&placed.winner.prefill],
                decode: self.numbers[&placed.winner.decode],
            });
        }
        answer
    }
}

/// What an engine measures at start: passes of several sizes, some decode batches, some transfers.
fn probe(cluster: &Cluster, error: f64) -> Probe {
    let timing = &cluster.timing;
    let sizes = [1u32, 2, 4, 8, 16].map(|part| (cluster.shape.pass_tokens / 16 * part).max(1));
    Probe {
        prefill: sizes
            .iter()
            .map(|&tokens| (tokens, 0, error * timing.prefill_ms(&[(tokens, 0)])))
            .collect(),
        decode: [(1, 0.0), (8, 0.05), (32, 0.2), (64, 0.5)]
            .map(|(streams, share)| {
                (
                    streams,
                    share,
                    error * timing.decode_ms(streams as usize, share),
                )
            })
            .to_vec(),
        transfer: sizes
            .iter()
            .map(|&tokens| (tokens, error * timing.transfer_ms(tokens)))
            .collect(),
    }
}

impl Router for Mesh {
    fn arrived(&mut self, now: f64, id: usize, request: &Request, placements: &mut Vec<Placement>) {
        let wanted = Wanted {
            id: id as u64,
            prompt_tokens: request.prompt,
            blocks: request.chain.as_ref().into(),
            session: request.session,
            ..Wanted::default()
        };
        // Without a worker it stays unplaced, which the cluster reports.
        let _ = self.tell(now, placements, |selector, _, context| {
            selector.submit(wanted, context)
        });
    }

    fn prefilled(&mut self, now: f64, id: usize, placements: &mut Vec<Placement>) {
        let progress = Progress {
            prefilled: true,
            output_tokens: 0,
        };
        self.tell(now, placements, |selector, leases, context| {
            selector.progress(leases[id], progress, context)
        });
    }

    fn transferred(&mut self, now: f64, id: usize, placements: &mut Vec<Placement>) {
        let progress = Progress {
            prefilled: true,
            output_tokens: 1,
        };
        self.tell(now, placements, |selector, leases, context| {
            selector.progress(leases[id], progress, context)
        });
    }

    fn finished(&mut self, now: f64, id: usize, output: u32, placements: &mut Vec<Placement>) {
        let progress = Progress {
            prefilled: true,
            output_tokens: output,
        };
        self.tell(now, placements, |selector, leases, context| {
            selector.progress(leases[id], progress, context);
            selector.end(leases[id], context)
        });
    }

    fn stored(&mut self, _now: f64, worker: usize, chain: &Rc<[u64]>, from: usize, to: usize) {
        let parent = from.checked_sub(1).map(|at| chain[at]);
        let (holder, hashes) = (self.index.holders[worker], &chain[from..to]);
        let stored = self
            .index
            .prefixes
            .store(holder, hashes, parent, Tier::Device);
        debug_assert!(stored.is_ok());
        self.selector.stored(self.ids[worker], hashes);
    }

    fn removed(&mut self, now: f64, worker: usize, hashes: &[u64]) {
        let removed = self
            .index
            .prefixes
            .remove(self.index.holders[worker], hashes, Tier::Device);
        debug_assert!(removed.is_ok());
        self.selector.removed(now, self.ids[worker], hashes);
    }

    fn kept(&mut self, _now: f64, node: usize, change: &Change) {
        let Index {
            prefixes, stores, ..
        } = &mut self.index;
        let Change {
            tier,
            held,
            hashes,
            parent,
        } = change;
        let known = if *held {
            prefixes.store(stores[node], hashes, *parent, *tier).is_ok()
        } else {
            prefixes.remove(stores[node], hashes, *tier).is_ok()
        };
        debug_assert!(known);
    }

    fn take_refused(&mut self, into: &mut Vec<usize>) {
        let refused = self.refused.drain(..);
        into.extend(refused.map(|refused| refused.request as usize));
    }

    fn wakes_at(&self, now: f64) -> Option<f64> {
        self.selector.wakes_at(now)
    }

    fn wake(&mut self, now: f64, placements: &mut Vec<Placement>) {
        self.tell(now, placements, |selector, _, context| {
            selector.tick(context)
        });
    }
}
