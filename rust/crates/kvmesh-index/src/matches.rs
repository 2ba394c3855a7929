//! The answer to one match, and the walk that finds it.
//!
//! As long as only engines hold what a prompt consists of, the walk keeps the engines whose prefix is still whole as
//! bits, 64 in a word, and touches an engine of its own only where its prefix ends. From the first piece
//! with a lower tier on it goes from engine to engine, for each sees other stores.

use std::ops::BitOr;

use kvmesh_core::Tier;

use crate::{
    blocks::Blocks,
    cover::{Key, Kind},
    holders::{GROUP, HolderId, Holders, Slot},
    line::low_bits,
    piece::Piece,
    sync::Arc,
    walk::Start,
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
    start: Start,
}

/// The answer, and what is needed on the way.
#[derive(Default)]
struct Walk {
    depth: u32,
    groups: Vec<Engines>,
    /// By holder, in whole groups: how far engines reach that are not live any more; 0 for all others.
    depths: Vec<u32>,
    lower: Option<Lower>,
    spare: Lower,
}

/// Holders with neighbouring numbers, one bit each.
#[derive(Clone, Copy, Default)]
struct Engines {
    /// The engines in the answer.
    seen: u64,
    /// Of these, the ones that hold all so far; before the first piece all engines.
    live: u64,
    /// Those that hold all of the piece; those that have ended in it.
    whole: u64,
    ended: u64,
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

    /// The engines that see at least the first block, in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = Match> + '_ {
        let Walk { groups, depths, .. } = &self.walk;
        let lower = self.walk.lower.as_ref().map(|lower| &lower.depths[..]);
        // One of the two is empty. Plain loops over columns, of which the compiler makes vector code.
        let depths = if lower.is_some() { &[] } else { &depths[..] };
        let lower = lower.unwrap_or(&[]);
        let ids = self.holders.ids();
        let devices = found(groups, ids, depths).flat_map(|(ids, depths)| {
            let pairs = ids.iter().zip(depths).filter(|&(_, &depth)| depth > 0);
            pairs.map(|(&engine, &depth)| Match {
                engine,
                depths: [depth; 4],
            })
        });
        let tiers = found(groups, ids, lower).flat_map(|(ids, depths)| {
            let pairs = ids.iter().zip(depths).filter(|(_, depths)| depths[3] > 0);
            pairs.map(|(&engine, &depths)| Match { engine, depths })
        });
        devices.chain(tiers)
    }

    /// Number of engines found.
    pub fn len(&self) -> usize {
        let count = |group: &Engines| group.seen.count_ones() as usize;
        self.walk.groups.iter().map(count).sum()
    }

    /// Whether no engine sees even the first block.
    pub fn is_empty(&self) -> bool {
        self.walk.groups.iter().all(|group| group.seen == 0)
    }

    /// Replaces the answer by that for `hashes`. `current` is asked for the holders of this version when the last answer
    /// had others.
    pub(crate) fn walk(
        &mut self,
        hashes: &[u64],
        version: u64,
        current: impl FnOnce() -> Arc<Holders>,
        blocks: &Blocks,
    ) {
        if self.holders.version() != version {
            self.holders = current();
        }
        let Self {
            holders,
            walk,
            entries,
            start,
        } = self;
        walk.start(holders);
        blocks.walk(hashes, entries, start, |piece| {
            let goes_on = walk
                .on_devices(&piece)
                .unwrap_or_else(|| walk.in_all_tiers(&piece, holders));
            walk.depth += piece.count as u32;
            goes_on
        });
        walk.end();
    }
}

impl Walk {
    fn start(&mut self, holders: &Holders) {
        let engines = holders.engine_words();
        self.groups.clear();
        self.groups.extend(engines.iter().map(|&live| Engines {
            live,
            ..Engines::default()
        }));
        self.depths.clear();
        self.depths.resize(engines.len() * GROUP, 0);
        self.depth = 0;
        if let Some(lower) = self.lower.take() {
            self.spare = lower;
        }
    }

    /// A piece that only engines hold, behind others such: whoever does not hold it has ended. Whether anybody goes on;
    /// `None`, and nothing has happened, where others hold it too.
    #[inline]
    fn on_devices(&mut self, piece: &Piece<'_>) -> Option<bool> {
        if self.lower.is_some() {
            return None;
        }
        let mut partly = false;
        self.groups.iter_mut().for_each(|group| group.whole = 0);
        for &entry in piece.entries {
            let (at, members, depth) = piece.on_device(entry)?;
            // An entry newer than this view of the holders is not of this answer.
            if let Some(group) = self.groups.get_mut(at) {
                let all = depth as usize == piece.count;
                group.whole |= if all { members } else { 0 };
                partly |= !all;
            }
        }
        let mut any = 0;
        let first = self.depth == 0;
        for (group, depths) in self.groups.iter_mut().zip(self.depths.chunks_mut(GROUP)) {
            group.ended = group.live & !group.whole;
            group.live &= group.whole;
            any |= group.live;
            if first {
                group.seen = group.live;
            } else if group.ended != 0 {
                raise(depths, group.ended, self.depth, u32::bitor);
            }
        }
        if partly {
            for &entry in piece.entries {
                let (at, members, depth) = piece.on_device(entry)?;
                let Some(group) = self.groups.get_mut(at) else {
                    continue;
                };
                let ended = group.ended & members;
                if ended != 0 && depth > 0 {
                    let depths = &mut self.depths[at * GROUP..][..GROUP];
                    raise(depths, ended, self.depth + depth, u32::max);
                    group.seen |= ended;
                }
            }
        }
        Some(any != 0)
    }

    /// Gives those their depth whose prefix has not ended.
    fn end(&mut self) {
        if self.lower.is_some() || self.depth == 0 {
            return;
        }
        for (group, depths) in self.groups.iter().zip(self.depths.chunks_mut(GROUP)) {
            if group.live != 0 {
                raise(depths, group.live, self.depth, u32::bitor);
            }
        }
    }

    /// Any piece. From the first with a lower tier on.
    #[cold]
    fn in_all_tiers(&mut self, piece: &Piece<'_>, holders: &Holders) -> bool {
        let mut lower = self.lower.take().unwrap_or_else(|| self.descend());
        lower.load(piece, holders, self.groups.len());
        if self.depth == 0 {
            lower.gather(&mut self.groups, piece, holders);
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
        lower.depths.clear();
        lower.depths.resize(self.depths.len(), [0; 4]);
        lower.live.clear();
        if self.depth > 0 {
            let live = || ones(self.groups.iter().map(|group| group.live));
            let seen = ones(self.groups.iter().map(|group| group.seen));
            seen.for_each(|at| lower.depths[at] = [self.depths[at]; 4]);
            live().for_each(|at| lower.depths[at] = [self.depth; 4]);
            lower.live.extend(live().map(|at| at as u16));
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
                    for at in ones([word].into_iter()) {
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
    fn gather(&mut self, groups: &mut [Engines], piece: &Piece<'_>, holders: &Holders) {
        if self.network & 1 == 1 {
            let all = groups.iter_mut().zip(holders.engine_words());
            all.for_each(|(group, &engines)| group.seen = engines);
        } else {
            for (at, members, depth) in piece.devices() {
                if let Some(group) = groups.get_mut(at).filter(|_| depth > 0) {
                    group.seen |= members & holders.engine_words()[at];
                }
            }
            for &node in &self.seen_nodes {
                let [host, nvme] = self.nodes[usize::from(node)];
                if (host | nvme) & 1 == 1 {
                    for &engine in holders.engines_of(node) {
                        groups[usize::from(engine) / GROUP].seen |=
                            1 << (usize::from(engine) % GROUP);
                    }
                }
            }
        }
        let seen = ones(groups.iter().map(|group| group.seen));
        self.live.extend(seen.map(|engine| engine as u16));
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
            let [host, nvme] = holders
                .node_of(engine)
                .map_or([0; 2], |node| nodes[usize::from(node)]);
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

/// Ids and depths of the groups in which somebody was seen, group by group.
fn found<'a, T>(
    groups: &'a [Engines],
    ids: &'a [HolderId],
    depths: &'a [T],
) -> impl Iterator<Item = (&'a [HolderId], &'a [T])> {
    let columns = ids.chunks(GROUP).zip(depths.chunks(GROUP));
    let all = columns.zip(groups).filter(|(_, group)| group.seen != 0);
    all.map(|(columns, _)| columns)
}

/// The positions of all bits.
fn ones(words: impl Iterator<Item = u64>) -> impl Iterator<Item = usize> {
    words.enumerate().flat_map(|(at, word)| {
        let mut left = word;
        std::iter::from_fn(move || {
            let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
            left &= left - 1;
            Some(at * GROUP + bit)
        })
    })
}

/// Raises the depths that `chosen` names to `depth`. `either` is the greater of the two or, where the old ones are 0 as those
/// of live engines are, what takes fewer instructions.
#[inline]
fn raise(depths: &mut [u32], mut chosen: u64, depth: u32, either: impl Fn(u32, u32) -> u32) {
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
            depths[at] = either(depths[at], depth);
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
            *old = either(*old, new);
        }
    }
}
