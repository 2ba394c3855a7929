//! What a match looks at: blocks of one run, and who holds which of them.

use kvmesh_core::Tier;

use crate::{
    cover::{Key, Kind},
    holders::tier_of_group,
};

/// Blocks that lie together in one run, and who holds which of them.
pub struct Piece<'a> {
    /// The run's entries. A mask has only the piece's blocks, the first one lowest.
    pub entries: &'a [(Key, u64)],
    /// Where in the run the piece starts, and its blocks.
    pub offset: usize,
    pub count: usize,
}

impl Piece<'_> {
    /// The engines with blocks of the piece on their devices, by [`Self::on_device`].
    #[inline]
    pub fn devices(&self) -> impl Iterator<Item = (usize, u64, u32)> {
        self.entries
            .iter()
            .filter_map(|&entry| self.on_device(entry))
    }

    /// An entry of engines' devices: which word of bits by holder, which bits, and how many leading blocks of the piece
    /// they hold. `None` for one of another tier.
    #[inline]
    pub fn on_device(&self, (key, word): (Key, u64)) -> Option<(usize, u64, u32)> {
        let (group, members, depth) = match key.kind() {
            Kind::One(slot) => (slot.group(), slot.member(), word.trailing_ones()),
            Kind::Group(group, span) => {
                let depth = (span - self.offset).min(self.count);
                (group, word, depth as u32)
            }
        };
        let (tier, at) = tier_of_group(group);
        (tier == Tier::Device).then_some((at, members, depth))
    }
}
