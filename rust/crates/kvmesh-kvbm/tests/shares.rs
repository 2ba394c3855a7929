//! Tenants' shares of the host tier: a burst takes what others do not use, and nothing of what they do.
#![expect(clippy::unwrap_used, reason = "a failure of these is the test's")]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use common::{Engine, SLOT, digest, namespace, settings, settled};
use kvmesh_kvbm::block::{Filled, Lease, Reservation, Reserved, lease, register, reserve};
use kvmesh_kvbm::control::StoreServer;
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::store::{Settings, Store};
use kvmesh_kvbm::tiers::{HostTier, NamespaceId, TenantWeights, Tier};
use kvmesh_kvbm::{Digest, Namespace};
use proptest::prelude::*;

const TENANTS: [&str; 4] = ["", "acme", "rival", "small"];
/// Slots of the smaller blocks in all.
const SLOTS: u64 = 64;
const PAGE: u64 = 4096;

fn weights() -> TenantWeights {
    let named = [("acme", 2.0), ("small", 0.5), ("*", 1.0)];
    TenantWeights::new(HashMap::from(
        named.map(|(name, weight)| (name.into(), weight)),
    ))
    .unwrap()
}

fn of_size(bytes: u32) -> Namespace {
    Namespace {
        segments: vec![bytes],
        ..namespace("m")
    }
}

/// A host tier, with blocks of one page and of two.
struct Node {
    host: Arc<HostTier>,
    tier: Arc<dyn Tier>,
    namespaces: [NamespaceId; 2],
}

impl Node {
    fn new(policy: Policy, weights: Option<TenantWeights>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Arc::new(HostTier::with_policy(dir.path(), SLOTS * PAGE, policy).unwrap());
        weights.into_iter().for_each(|weights| host.share(weights));
        let namespaces = [100, 5000].map(|bytes| host.open(&of_size(bytes)).unwrap());
        Self {
            tier: host.clone(),
            host,
            namespaces,
        }
    }

    fn held(&self) -> BTreeMap<String, u64> {
        self.host.held_by_tenant().into_iter().collect()
    }

    fn reserve(
        &self,
        tenant: &str,
        size: usize,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Reservation> {
        let namespace = self.namespaces[size];
        self.host
            .claim(namespace, &chain[chain.len() - 1..], tenant);
        reserve(&self.tier, namespace, parent, chain)
    }

    /// Stores what there is room for; how many blocks there was none for.
    fn store(&self, tenant: &str, size: usize, chain: &[Digest]) -> usize {
        let rooms = self.reserve(tenant, size, None, chain);
        let full = (rooms.iter()).filter(|room| matches!(room, Reservation::Full));
        let full = full.count();
        let content = vec![7; [100, 5000][size]];
        let filled: Vec<Filled> = rooms
            .into_iter()
            .filter_map(|room| match room {
                Reservation::Room(reserved) => Some(reserved.fill(&[&content]).unwrap()),
                _ => None,
            })
            .collect();
        register(filled);
        full
    }

    fn lookup(&self, size: usize, chain: &[Digest]) -> usize {
        self.tier.lookup(self.namespaces[size], chain)
    }
}

/// A tenant's chain by its number; chains share nothing.
fn chain(tenant: usize, number: u64, length: u64) -> Vec<Digest> {
    let first = (tenant as u64) << 40 | number << 16;
    (first..first + length).map(digest).collect()
}

#[derive(Debug, Clone)]
enum Step {
    Store {
        tenant: usize,
        size: usize,
        number: u64,
        length: u64,
        finish: bool,
    },
    Lease {
        tenant: usize,
        size: usize,
        number: u64,
    },
    DropLease,
    DropReserved,
    Evict {
        tenant: usize,
        number: u64,
    },
}

fn steps(tenants: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Step>> {
    let of = (tenants, 0..2_usize, 0..12_u64);
    let step = prop_oneof![
        12 => (of.clone(), 1..12_u64, prop::bool::weighted(0.9)).prop_map(
            |((tenant, size, number), length, finish)| Step::Store { tenant, size, number, length, finish }
        ),
        4 => of.clone().prop_map(|(tenant, size, number)| Step::Lease { tenant, size, number }),
        4 => Just(Step::DropLease),
        2 => Just(Step::DropReserved),
        1 => of.prop_map(|(tenant, _, number)| Step::Evict { tenant, number }),
    ];
    prop::collection::vec(step, 1..160)
}

/// What blocks are on their way out or in hand, so that they cannot leave.
#[derive(Default)]
struct Held {
    leases: Vec<Lease>,
    reserved: Vec<Reserved>,
}

/// Makes a step; the rooms a store was given. `each` hears of what tenants had before each block was reserved.
fn make(
    node: &Node,
    held: &mut Held,
    step: &Step,
    mut each: impl FnMut(&BTreeMap<String, u64>),
) -> Vec<Option<u64>> {
    match *step {
        Step::Store {
            tenant,
            size,
            number,
            length,
            finish,
        } => {
            let chain = chain(tenant, number, length);
            let content = vec![7; [100, 5000][size]];
            let (mut places, mut filled) = (Vec::new(), Vec::new());
            for (at, block) in chain.iter().enumerate() {
                let before = node.held();
                let parent = at.checked_sub(1).map(|before| &chain[before]);
                let block = std::slice::from_ref(block);
                let room = node.reserve(TENANTS[tenant], size, parent, block).remove(0);
                each(&before);
                places.push(match &room {
                    Reservation::Room(reserved) => Some(reserved.slot().0),
                    Reservation::Present => None,
                    Reservation::Full => break,
                });
                match room {
                    Reservation::Room(reserved) if finish => {
                        filled.push(reserved.fill(&[&content]).unwrap());
                    }
                    Reservation::Room(reserved) => held.reserved.push(reserved),
                    _ => {}
                }
            }
            register(filled);
            return places;
        }
        Step::Lease {
            tenant,
            size,
            number,
        } => {
            let chain = chain(tenant, number, 12);
            let leased = lease(&node.tier, node.namespaces[size], &chain, usize::MAX);
            held.leases.push(leased);
        }
        Step::DropLease => drop((!held.leases.is_empty()).then(|| held.leases.remove(0))),
        Step::DropReserved => held.reserved.clear(),
        Step::Evict { tenant, number } => {
            let _ = (node.tier).evict(node.namespaces[0], &chain(tenant, number, 12));
        }
    }
    Vec::new()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whoever loses a block for another tenant's still has its share of what is taken, but for the block that left.
    #[test]
    fn nobody_falls_below_its_share_for_anothers_room(
        program in steps(0..4), policy in prop::sample::select(Policy::ALL.to_vec()),
    ) {
        let (node, weights) = (Node::new(policy, Some(weights())), weights());
        let mut held = Held::default();
        for step in &program {
            let mut lost = Vec::new();
            make(&node, &mut held, step, |before| {
                let Step::Store { tenant, .. } = *step else {
                    return;
                };
                let (newcomer, after) = (TENANTS[tenant], node.held());
                let others = || before.iter().filter(|(name, _)| *name != newcomer);
                let holding = others().filter(|(_, bytes)| **bytes > 0);
                let weight: f64 = holding.map(|(name, _)| weights.of(name)).sum();
                let level = before.values().sum::<u64>() as f64 / (weight + weights.of(newcomer));
                for (name, &bytes) in others().filter(|(name, bytes)| after[*name] < **bytes) {
                    lost.push((name.clone(), bytes, after[name], weights.of(name) * level));
                }
            });
            for (name, had, has, share) in lost {
                // The largest block has two pages.
                prop_assert!(
                    has as f64 > share - 2.0 * PAGE as f64,
                    "{name:?} had {had}, has {has} of a share of {share}"
                );
            }
            prop_assert_eq!(node.held().values().sum::<u64>(), node.tier.stats().used_bytes);
        }
        drop(held);
        node.tier.flush();
        prop_assert_eq!(node.tier.stats().used_bytes, 0);
        prop_assert!(node.held().values().all(|&bytes| bytes == 0));
    }

    /// Whoever is within its share has room, if nothing is in use.
    #[test]
    fn a_share_is_had_when_it_is_wanted(
        stores in prop::collection::vec((0..4_usize, 0..60_u64, 1..8_u64), 1..120),
        policy in prop::sample::select(Policy::ALL.to_vec()),
    ) {
        let (node, weights) = (Node::new(policy, Some(weights())), weights());
        let all: f64 = TENANTS.iter().map(|name| weights.of(name)).sum();
        for (tenant, number, length) in stores {
            let name = TENANTS[tenant];
            let full = node.store(name, 0, &chain(tenant, number, length));
            let held = node.held().get(name).copied().unwrap_or(0);
            let share = weights.of(name) * (SLOTS * PAGE) as f64 / all;
            // The least share there can be: when all hold something.
            prop_assert!(
                full == 0 || (held + PAGE) as f64 >= share.min((SLOTS * PAGE) as f64),
                "{name:?} has {held} of at least {share}, and no room for {full}"
            );
        }
    }

    /// One tenant's blocks are where they would be without shares. By policies that do not look at the time, which is not
    /// the same for both.
    #[test]
    fn one_tenant_sees_no_difference(
        program in steps(1..2),
        policy in prop::sample::select(vec![Policy::Lru, Policy::Gdsf, Policy::S3Fifo]),
    ) {
        let nodes = [Node::new(policy, None), Node::new(policy, Some(weights()))];
        let mut held = [Held::default(), Held::default()];
        for step in &program {
            let [one, other] = [0, 1].map(|at| make(&nodes[at], &mut held[at], step, |_| ()));
            prop_assert_eq!(one, other, "rooms of {:?}", step);
        }
        prop_assert_eq!(nodes[0].tier.stats(), nodes[1].tier.stats());
    }
}

/// Hits of a tenant that comes back to the same chains while another stores ever new ones; of so many.
fn hits_beside_a_burst(policy: Policy, weights: Option<TenantWeights>) -> (usize, usize) {
    const ROUNDS: usize = 20;
    let node = Node::new(policy, weights);
    // Three eighths of the tier, in chains of four.
    let steady: Vec<Vec<Digest>> = (0..6).map(|number| chain(1, number, 4)).collect();
    let (mut hits, mut asked, mut fresh) = (0, 0, 0);
    for round in 0..ROUNDS {
        for chain in &steady {
            if round > 0 {
                hits += node.lookup(0, chain);
                asked += chain.len();
            }
            node.store("steady", 0, chain);
        }
        for _ in 0..SLOTS {
            node.store("burst", 0, &chain(2, fresh, 2));
            fresh += 1;
        }
    }
    (hits, asked)
}

#[test]
fn a_burst_does_not_push_out_what_another_tenant_comes_back_to() {
    for policy in Policy::ALL {
        let equal = TenantWeights::new(HashMap::new()).unwrap();
        let (hits, asked) = hits_beside_a_burst(policy, Some(equal));
        assert_eq!(hits, asked, "{policy:?}: all within its share");
    }
    let (hits, _) = hits_beside_a_burst(Policy::Lru, None);
    assert_eq!(hits, 0, "without shares the burst takes it all");
}

#[test]
fn what_a_tenant_does_not_use_is_lent_and_comes_back() {
    let node = Node::new(Policy::Lru, Some(weights()));
    for number in 0..2 * SLOTS {
        assert_eq!(node.store("rival", 0, &chain(2, number, 1)), 0);
    }
    assert_eq!(node.held()["rival"], SLOTS * PAGE, "nobody else wants it");
    for number in 0..2 * SLOTS {
        assert_eq!(node.store("acme", 0, &chain(1, number, 1)), 0);
    }
    // Two parts of three, one of three; the block that is left over is anybody's.
    let third = SLOTS / 3 * PAGE;
    let held = node.held();
    assert!(
        held["rival"] >= third && held["acme"] >= 2 * third,
        "{held:?}"
    );
}

#[test]
fn weights_are_numbers_above_zero() {
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let named = HashMap::from([("acme".to_owned(), weight)]);
        let error = TenantWeights::new(named).unwrap_err().to_string();
        assert!(
            error.contains("acme") && error.contains("kvbm.tenant_weights"),
            "{error}"
        );
    }
}

fn shared(dir: &Path) -> Settings {
    Settings {
        tenant_weights: Some(TenantWeights::new(HashMap::new()).unwrap()),
        ..settings(dir, 64, 512)
    }
}

#[test]
fn an_engine_says_whose_its_blocks_are_and_what_comes_from_the_disk_is_still_theirs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kvbm.sock");
    let store = Arc::new(Store::new(&shared(dir.path())).unwrap());
    let server = StoreServer::start(&path, store).unwrap();
    let engine = Engine::new(&path, 12);
    let offload = |tenant: &str, parent: Option<Digest>, numbers: std::ops::Range<u64>| {
        let chain: Vec<Digest> = numbers.map(digest).collect();
        let ids: Vec<u32> = (0..chain.len() as u32).collect();
        let client = &engine.client;
        let stored = client.offload_for(tenant, parent.as_ref(), &chain, &engine.pages, &ids);
        assert_eq!(stored.unwrap().stored, chain.len());
    };
    offload("acme", None, 0..8);
    offload("", Some(digest(7)), 8..10);
    offload("rival", None, 100..104);
    offload("", None, 200..201);
    let held = || -> BTreeMap<String, u64> {
        let held = server.store().host().held_by_tenant().into_iter();
        held.filter(|(_, bytes)| *bytes > 0).collect()
    };
    let expected = |tenants: &[(&str, u64)]| -> BTreeMap<String, u64> {
        let named = tenants.iter();
        named
            .map(|&(name, blocks)| (name.into(), blocks * SLOT))
            .collect()
    };
    let all = expected(&[("acme", 10), ("rival", 4), ("", 1)]);
    assert_eq!(held(), all, "what follows a tenant's block is the tenant's");
    server.store().persist(None).unwrap();
    server.store().host().flush();
    assert_eq!(held(), expected(&[]));
    let chain: Vec<Digest> = (0..10).map(digest).collect();
    assert_eq!(engine.client.lookup(&chain).unwrap(), 10);
    settled("all come up", || held() == expected(&[("acme", 10)]));
}
