//! The answer to one match, and the walk that finds it.
//!
//! As long as only engines hold what a prompt consists of, the walk keeps the engines whose prefix is still whole as
//! bits, 64 in a word, and touches an engine of its own only where its prefix ends. From the first piece
//! with a lower tier on it goes from engine to engine, for each sees other stores.

use kvmesh_core::Tier;

use crate::{
    blocks::Blocks,
    cover::{Key, Kind},
    holders::{GROUP, HolderId, Holders, NO_NODE, Slot},
    line::low_bits,
    piece::Piece,
    sync::Arc,
};

/// How far one engine's cached prefix reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// The engine.
    pub engine: HolderId,
    /// Leading blocks, all of them on its device; on device or host; on device, host or nvme; in
    /// any tier. Non-decreasing.
    pub depths: [u32; 4],
}

/// The answer to a match. Keep one a thread and use it again: once grown, matching allocates nothing.
#[derive(Default)]
pub struct Matches {
    holders: Arc<Holders>,
    walk: Walk,
    entries: Vec<(Key, u64)>,
}

/// The answer, and what is needed on the way. By holder: as many as there are numbers, in whole words.
#[derive(Default)]
struct Walk {
    depth: u32,
    /// Bits by holder: the engines in the answer; of these, the ones that hold all so far; those that hold all of the
    /// piece; those that have ended in it.
    seen: Vec<u64>,
    live: Vec<u64>,
    whole: Vec<u64>,
    ended: Vec<u64>,
    /// By holder: how far engines reach that are not live any more.
    depths: Vec<u32>,
    lower: Option<Lower>,
    spare: Lower,
}

/// What a walk keeps from the first lower tier on. What pieces hold is zero between them.
#[derive(Default)]
struct Lower {
    /// By holder, of those seen.
    depths: Vec<[u32; 4]>,
    /// The engines whose prefix may still grow.
    live: Vec<u16>,
    /// Blocks of the piece on each engine's device, by holder; in each node's host and nvme tiers; in the network.
    devices: Vec<u64>,
    nodes: Vec<[u64; 2]>,
    seen_nodes: Vec<u16>,
    network: u64,
}

impl Matches {
    /// An empty answer.
    pub fn new() -> Self {
        Self::default()
    }

    /// The engines that see at least the first block, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = Match> + '_ {
        let Walk { seen, depths, .. } = &self.walk;
        ones(seen).filter_map(move |holder| {
            let depths = match &self.walk.lower {
                None => [depths[holder]; 4],
                Some(lower) => lower.depths[holder],
            };
            let (engine, _) = self.holders.view(holder as u16)?;
            Some(Match { engine, depths })
        })
    }

    /// Number of engines found.
    pub fn len(&self) -> usize {
        let count = |word: &u64| word.count_ones() as usize;
        self.walk.seen.iter().map(count).sum()
    }

    /// Whether no engine sees even the first block.
    pub fn is_empty(&self) -> bool {
        self.walk.seen.iter().all(|&word| word == 0)
    }

    /// Replaces the answer by that for `hashes`.
    pub(crate) fn walk(&mut self, hashes: &[u64], holders: &Arc<Holders>, blocks: &Blocks) {
        if !Arc::ptr_eq(&self.holders, holders) {
            self.holders = Arc::clone(holders);
        }
        let Self {
            holders,
            walk,
            entries,
        } = self;
        walk.start(holders);
        blocks.walk(hashes, entries, |piece| {
            let devices = |&(key, _): &(Key, u64)| key.tier() == Tier::Device;
            let goes_on = if walk.lower.is_none() && piece.entries.iter().all(devices) {
                walk.on_devices(&piece)
            } else {
                walk.in_all_tiers(&piece, holders)
            };
            walk.depth += piece.count as u32;
            goes_on
        });
        walk.end();
    }
}

impl Walk {
    fn start(&mut self, holders: &Holders) {
        let words = holders.engine_words();
        for bits in [&mut self.seen, &mut self.whole, &mut self.ended] {
            bits.clear();
            bits.resize(words.len(), 0);
        }
        self.live.clear();
        self.live.extend_from_slice(words);
        self.depths.clear();
        self.depths.resize(words.len() * GROUP, 0);
        self.depth = 0;
        if let Some(lower) = self.lower.take() {
            self.spare = lower;
        }
    }

    /// A piece that only engines hold, behind others such: whoever does not hold it has ended.
    fn on_devices(&mut self, piece: &Piece<'_>) -> bool {
        let mut partly = false;
        self.whole.fill(0);
        for (at, members, depth) in piece.devices() {
            // An entry newer than this view of the holders is not of this answer.
            if let Some(whole) = self.whole.get_mut(at) {
                let all = depth as usize == piece.count;
                *whole |= if all { members } else { 0 };
                partly |= !all;
            }
        }
        let mut any = 0;
        for (at, &whole) in self.whole.iter().enumerate() {
            let ended = self.live[at] & !whole;
            self.ended[at] = ended;
            self.live[at] &= whole;
            any |= self.live[at];
            if ended != 0 && self.depth > 0 {
                raise(&mut self.depths[at * GROUP..][..GROUP], ended, self.depth);
            }
        }
        if self.depth == 0 {
            self.seen.copy_from_slice(&self.live);
        }
        if partly {
            for (at, members, depth) in piece.devices() {
                let ended = self.ended.get(at).copied().unwrap_or(0) & members;
                if ended != 0 && depth > 0 {
                    let depths = &mut self.depths[at * GROUP..][..GROUP];
                    raise(depths, ended, self.depth + depth);
                    if self.depth == 0 {
                        self.seen[at] |= ended;
                    }
                }
            }
        }
        any != 0
    }

    /// Gives those their depth whose prefix has not ended.
    fn end(&mut self) {
        if self.lower.is_some() || self.depth == 0 {
            return;
        }
        for (at, &live) in self.live.iter().enumerate() {
            if live != 0 {
                raise(&mut self.depths[at * GROUP..][..GROUP], live, self.depth);
            }
        }
    }

    /// Any piece. From the first with a lower tier on.
    fn in_all_tiers(&mut self, piece: &Piece<'_>, holders: &Holders) -> bool {
        let mut lower = self.lower.take().unwrap_or_else(|| self.descend());
        lower.load(piece, holders, self.live.len());
        if self.depth == 0 {
            lower.gather(&mut self.seen, piece, holders);
        }
        lower.advance(self.depth, piece.count as u32, holders);
        lower.unload(piece);
        let goes_on = !lower.live.is_empty();
        self.lower = Some(lower);
        goes_on
    }

    /// The engines so far, each on its own.
    fn descend(&mut self) -> Lower {
        let mut lower = std::mem::take(&mut self.spare);
        lower.depths.resize(self.depths.len(), [0; 4]);
        lower.live.clear();
        if self.depth > 0 {
            lower.live.extend(ones(&self.live).map(|at| at as u16));
            ones(&self.seen).for_each(|at| lower.depths[at] = [self.depths[at]; 4]);
            ones(&self.live).for_each(|at| lower.depths[at] = [self.depth; 4]);
        }
        lower
    }
}

impl Lower {
    /// Lays out who holds which blocks of the piece.
    fn load(&mut self, piece: &Piece<'_>, holders: &Holders, words: usize) {
        self.devices.resize(words * GROUP, 0);
        self.nodes.resize(holders.nodes(), [0; 2]);
        for &(key, word) in piece.entries {
            match key.kind() {
                Kind::One(slot) => self.add(slot, word, holders),
                Kind::Group(group, span) => {
                    let blocks = low_bits((span - piece.offset).min(piece.count));
                    for at in ones(&[word]) {
                        self.add(Slot::of_group(group, at as u32), blocks, holders);
                    }
                }
            }
        }
    }

    fn add(&mut self, slot: Slot, blocks: u64, holders: &Holders) {
        match slot.tier() {
            Tier::Device => {
                if let Some(device) = self.devices.get_mut(usize::from(slot.holder())) {
                    *device |= blocks;
                }
            }
            Tier::Network => self.network |= blocks,
            tier => {
                let Some(node) = holders.node_of(slot.holder()) else {
                    return;
                };
                let tiers = &mut self.nodes[usize::from(node)];
                if *tiers == [0; 2] {
                    self.seen_nodes.push(node);
                }
                tiers[tier as usize - Tier::Host as usize] |= blocks;
            }
        }
    }

    /// Takes every engine that sees the first block as a candidate, once.
    fn gather(&mut self, seen: &mut [u64], piece: &Piece<'_>, holders: &Holders) {
        if self.network & 1 == 1 {
            seen.copy_from_slice(holders.engine_words());
        } else {
            for (at, members, depth) in piece.devices() {
                if let Some(seen) = seen.get_mut(at).filter(|_| depth > 0) {
                    *seen |= members & holders.engine_words()[at];
                }
            }
            for &node in &self.seen_nodes {
                let [host, nvme] = self.nodes[usize::from(node)];
                if (host | nvme) & 1 == 1 {
                    for &engine in holders.engines_of(node) {
                        seen[usize::from(engine) / GROUP] |= 1 << (usize::from(engine) % GROUP);
                    }
                }
            }
        }
        for engine in ones(seen) {
            self.depths[engine] = [0; 4];
            self.live.push(engine as u16);
        }
    }

    /// Moves every live engine's depths on, and sets those aside whose prefix ends in this piece.
    fn advance(&mut self, depth: u32, count: u32, holders: &Holders) {
        let Self {
            depths,
            live,
            devices,
            nodes,
            network,
            ..
        } = self;
        live.retain(|&engine| {
            let at = usize::from(engine);
            let [host, nvme] = match holders.view(engine) {
                Some((_, node)) if node != NO_NODE => nodes[usize::from(node)],
                _ => [0; 2],
            };
            let mut visible = 0;
            let masks = [devices[at], host, nvme, *network];
            for (reached, mask) in depths[at].iter_mut().zip(masks) {
                visible |= mask;
                if *reached == depth {
                    *reached += visible.trailing_ones();
                }
            }
            depths[at][3] == depth + count
        });
    }

    fn unload(&mut self, piece: &Piece<'_>) {
        for (at, mut members, _) in piece.devices() {
            if let Some(devices) = self.devices.get_mut(at * GROUP..(at + 1) * GROUP) {
                while members != 0 {
                    devices[members.trailing_zeros() as usize] = 0;
                    members &= members - 1;
                }
            }
        }
        for node in self.seen_nodes.drain(..) {
            self.nodes[usize::from(node)] = [0; 2];
        }
        self.network = 0;
    }
}

/// The positions of all bits.
fn ones(words: &[u64]) -> impl Iterator<Item = usize> {
    words.iter().enumerate().flat_map(|(at, &word)| {
        let mut left = word;
        std::iter::from_fn(move || {
            let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
            left &= left - 1;
            Some(at * GROUP + bit)
        })
    })
}

/// Raises the depths that `chosen` names to `depth`.
#[inline]
fn raise(depths: &mut [u32], mut chosen: u64, depth: u32) {
    /// Below so many the ones of a word are raised one by one.
    const FEW: u32 = 16;
    const BITS: [u32; 32] = {
        let mut bits = [0; 32];
        let mut at = 0;
        while at < 32 {
            bits[at] = 1 << at;
            at += 1;
        }
        bits
    };
    if chosen.count_ones() < FEW {
        while chosen != 0 {
            let at = chosen.trailing_zeros() as usize;
            depths[at] = depths[at].max(depth);
            chosen &= chosen - 1;
        }
        return;
    }
    // Without a branch, so that it becomes vector code.
    for (half, depths) in [chosen as u32, (chosen >> 32) as u32]
        .into_iter()
        .zip(depths.chunks_exact_mut(BITS.len()))
    {
        for (old, bit) in depths.iter_mut().zip(BITS) {
            let new = if half & bit == 0 { 0 } else { depth };
            *old = (*old).max(new);
        }
    }
}
