//! Tenants' shares of a tier, and the blocks that are ranked together.
//!
//! Where no shares are set, all blocks of a slab are ranked together: one part. Where they are, each tenant's are, and
//! who loses a block for another's room is the tenant that holds most for its weight. So nobody's block leaves for
//! another tenant's while its own tenant holds no more than its share of what is taken, and what a tenant does not use
//! of its share is lent to those who store (weighted max-min fairness).
//!
//! Whose a block is, is said of a chain before it is stored, or known from its chain or from when the block was here
//! before; else it is nobody's, which is one tenant more.

use kvmesh_core::Digest;
use rustc_hash::FxHashMap;

use super::super::entry::{Block, Key};
use super::super::ranking::Ranking;
use super::super::slabs::SlabId;
use super::super::{NamespaceId, Slot, TenantWeights};
use super::Catalog;
use super::parking::Parked;
use crate::eviction::{Ghosts, Tick};

/// Blocks whose tenant is remembered that are not in the tier.
const REMEMBERED: usize = 262_144;
/// Tenants with shares of their own; those that come later are nobody.
const MOST_TENANTS: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct TenantId(usize);

impl TenantId {
    pub(super) const NOBODY: Self = Self(0);
}

/// A part's place in the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct PartId(pub(super) usize);

/// Blocks of one slab that are ranked together.
pub(super) struct Part {
    pub(super) slab: SlabId,
    pub(super) tenant: TenantId,
    pub(super) ranking: Ranking,
    pub(super) parked: Parked,
    /// Slots that are taken for it.
    pub(super) taken: usize,
}

/// The parts of one slab, the first of them nobody's.
#[derive(Default)]
pub(super) struct PartsOfSlab {
    pub(super) parts: Vec<PartId>,
    by_tenant: FxHashMap<TenantId, PartId>,
    /// Slots that are taken in all of them.
    pub(super) taken: usize,
}

pub(super) struct Shares {
    weights: TenantWeights,
    /// By their numbers.
    tenants: Vec<Tenant>,
    by_name: FxHashMap<String, TenantId>,
    remembered: Ghosts<TenantId>,
    /// What all hold, and the weights of those who hold something.
    bytes: u64,
    weight: f64,
}

struct Tenant {
    name: String,
    weight: f64,
    /// Of the slots that are taken for it.
    bytes: u64,
}

impl Shares {
    fn new(weights: TenantWeights) -> Self {
        let mut shares = Self {
            weights,
            tenants: Vec::new(),
            by_name: FxHashMap::default(),
            remembered: Ghosts::default(),
            bytes: 0,
            weight: 0.0,
        };
        shares.tenant("");
        shares
    }

    fn tenant(&mut self, name: &str) -> TenantId {
        if let Some(&known) = self.by_name.get(name) {
            return known;
        }
        if self.tenants.len() == MOST_TENANTS {
            return TenantId::NOBODY;
        }
        let id = TenantId(self.tenants.len());
        self.tenants.push(Tenant {
            name: name.into(),
            weight: self.weights.of(name),
            bytes: 0,
        });
        self.by_name.insert(name.into(), id);
        id
    }

    /// A tenant's slot is taken, or is free again.
    fn count(&mut self, tenant: TenantId, bytes: u64, taken: bool) {
        let held = &mut self.tenants[tenant.0].bytes;
        let before = *held;
        if taken {
            (*held, self.bytes) = (before + bytes, self.bytes + bytes);
        } else {
            (*held, self.bytes) = (before - bytes, self.bytes - bytes);
        }
        if (before == 0) != (*held == 0) {
            let holding = self.tenants.iter().filter(|tenant| tenant.bytes > 0);
            self.weight = holding.map(|tenant| tenant.weight).sum();
        }
    }

    fn remember(&mut self, key: &Key, tenant: TenantId) {
        if tenant != TenantId::NOBODY {
            self.remembered.take(key.name());
            self.remembered.put(key.name(), tenant, REMEMBERED);
        }
    }
}

/// Who may lose how much for a newcomer's room.
pub(super) struct Claim<'a> {
    shares: &'a Shares,
    newcomer: TenantId,
    bytes: u64,
    /// What is taken for each unit of weight of those who hold something, the newcomer included.
    level: f64,
}

impl Claim<'_> {
    /// What the tenant holds for each unit of its weight, the newcomer counted as if it were here.
    pub(super) fn height(&self, tenant: TenantId) -> f64 {
        self.height_without(tenant, 0)
    }

    /// Whether that tenant has its share at least, after it has lost so many bytes.
    pub(super) fn has_share_without(&self, tenant: TenantId, lost: u64) -> bool {
        tenant == self.newcomer || self.height_without(tenant, lost) >= self.level
    }

    /// Whether that tenant's blocks may leave for the newcomer.
    pub(super) fn may_lose(&self, tenant: TenantId) -> bool {
        tenant == self.newcomer || self.height(tenant) > self.level
    }

    /// Whether the newcomer's tenant has less than its share with it, so that another has more.
    pub(super) fn is_below_share(&self) -> bool {
        self.height(self.newcomer) < self.level
    }

    fn height_without(&self, tenant: TenantId, lost: u64) -> f64 {
        let Tenant { bytes, weight, .. } = &self.shares.tenants[tenant.0];
        let coming = if tenant == self.newcomer {
            self.bytes
        } else {
            0
        };
        (bytes + coming).saturating_sub(lost) as f64 / weight
    }
}

impl Catalog {
    /// From now on tenants have shares. Of a catalog that holds nothing yet.
    pub(crate) fn share(&mut self, weights: TenantWeights) {
        self.shares = Some(Shares::new(weights));
    }

    /// These blocks, and what is stored behind them, are this tenant's if they are stored now.
    pub(crate) fn claim(&mut self, namespace: NamespaceId, blocks: &[Digest], tenant: &str) {
        if let Some(shares) = &mut self.shares {
            let tenant = shares.tenant(tenant);
            for &digest in blocks {
                shares.remember(&Key(namespace, digest), tenant);
            }
        }
    }

    /// What tenants hold, in bytes of their slots: all that ever held something. Empty where they have no shares.
    pub(crate) fn held_by_tenant(&self) -> Vec<(String, u64)> {
        let tenants = self.shares.iter().flat_map(|shares| &shares.tenants);
        tenants
            .map(|tenant| (tenant.name.clone(), tenant.bytes))
            .collect()
    }

    /// A new slab has nobody's part.
    pub(super) fn add_parts(&mut self) {
        while self.by_slab.len() < self.slabs.len() {
            self.by_slab.push(PartsOfSlab::default());
            let slab = SlabId(self.by_slab.len() - 1);
            self.add_part(slab, TenantId::NOBODY);
        }
    }

    /// The part of a chain's blocks.
    pub(super) fn part_for(
        &mut self,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> PartId {
        let slab = self.slab_of(namespace);
        let Some(shares) = &self.shares else {
            return self.by_slab[slab.0].parts[0];
        };
        let keys = chain.iter().rev().chain(parent);
        let said = keys.clone().find_map(|&digest| {
            let key = Key(namespace, digest);
            shares.remembered.get(key.name()).copied()
        });
        let here = || {
            keys.clone().find_map(|&digest| {
                let slot = self.index.get(&Key(namespace, digest))?;
                let part = self.slabs.get(slot)?.part;
                Some(self.parts[part.0].tenant)
            })
        };
        let tenant = said.or_else(here).unwrap_or(TenantId::NOBODY);
        match self.by_slab[slab.0].by_tenant.get(&tenant) {
            Some(&part) => part,
            None => self.add_part(slab, tenant),
        }
    }

    /// Which block makes room for one of this part, and its tenant's being the newcomer's. None: no block may.
    pub(super) fn loser(&mut self, part: PartId) -> Option<(Slot, bool)> {
        let (slab, newcomer) = (self.parts[part.0].slab, self.parts[part.0].tenant);
        let Some(claim) = self.claim_of(part) else {
            return self.next_to_leave(part).map(|slot| (slot, true));
        };
        let parts = self.by_slab[slab.0].parts.iter();
        let mut losers: Vec<(f64, PartId)> = parts
            .map(|&other| (self.parts[other.0].tenant, other))
            .filter(|&(tenant, _)| claim.may_lose(tenant))
            .map(|(tenant, other)| (claim.height(tenant), other))
            .collect();
        // The newcomer's own first where others hold as much.
        losers.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1 != part).cmp(&(b.1 != part))));
        losers.into_iter().find_map(|(_, other)| {
            let slot = self.next_to_leave(other)?;
            Some((slot, self.parts[other.0].tenant == newcomer))
        })
    }

    /// The newcomer's claim to others' room, where tenants have shares.
    pub(super) fn claim_of(&self, part: PartId) -> Option<Claim<'_>> {
        let shares = self.shares.as_ref()?;
        let newcomer = self.parts[part.0].tenant;
        let bytes = self.slabs.slot_bytes(self.parts[part.0].slab);
        let tenant = &shares.tenants[newcomer.0];
        let new = if tenant.bytes == 0 {
            tenant.weight
        } else {
            0.0
        };
        Some(Claim {
            shares,
            newcomer,
            bytes,
            level: (shares.bytes + bytes) as f64 / (shares.weight + new),
        })
    }

    /// Takes the blocks' slots of a region for the newcomer: whether all are idle, and their tenants keep their shares.
    pub(super) fn may_take(&self, part: PartId, blocks: &mut dyn Iterator<Item = &Block>) -> bool {
        let claim = self.claim_of(part);
        let mut lost: FxHashMap<TenantId, u64> = FxHashMap::default();
        for block in blocks {
            if !block.is_idle() {
                return false;
            }
            if claim.is_some() {
                let part = &self.parts[block.part.0];
                *lost.entry(part.tenant).or_default() += self.slabs.slot_bytes(part.slab);
            }
        }
        claim.is_none_or(|claim| {
            lost.into_iter()
                .all(|(tenant, bytes)| claim.has_share_without(tenant, bytes))
        })
    }

    /// Another layout's region makes room only where its last use is before this.
    pub(super) fn region_before(&self, part: PartId, own: Option<Slot>) -> Tick {
        let of_share = self.claim_of(part);
        if of_share.is_some_and(|claim| claim.is_below_share()) {
            return Tick::MAX;
        }
        own.and_then(|slot| self.slabs.get(slot))
            .map_or(Tick::MAX, |victim| victim.used)
    }

    /// A slot is taken for this part, or is free again.
    pub(super) fn count(&mut self, part: PartId, taken: bool) {
        let Part {
            slab,
            tenant,
            taken: of_part,
            ..
        } = &mut self.parts[part.0];
        let of_slab = &mut self.by_slab[slab.0].taken;
        if taken {
            (*of_part, *of_slab) = (*of_part + 1, *of_slab + 1);
        } else {
            (*of_part, *of_slab) = (*of_part - 1, *of_slab - 1);
        }
        if let Some(shares) = &mut self.shares {
            shares.count(*tenant, self.slabs.slot_bytes(*slab), taken);
        }
    }

    /// A block leaves that may come back.
    pub(super) fn remember_tenant(&mut self, key: &Key, part: PartId) {
        let tenant = self.parts[part.0].tenant;
        if let Some(shares) = &mut self.shares {
            shares.remember(key, tenant);
        }
    }

    fn add_part(&mut self, slab: SlabId, tenant: TenantId) -> PartId {
        let id = PartId(self.parts.len());
        self.parts.push(Part {
            slab,
            tenant,
            ranking: Ranking::new(self.policy.build()),
            parked: Parked::default(),
            taken: 0,
        });
        let of_slab = &mut self.by_slab[slab.0];
        of_slab.parts.push(id);
        of_slab.by_tenant.insert(tenant, id);
        id
    }
}
