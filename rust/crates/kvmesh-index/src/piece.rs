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
    /// The engines with blocks of the piece on their devices: which word of bits by holder, which bits, and how many
    /// leading blocks.
    #[inline]
    pub fn devices(&self) -> impl Iterator<Item = (usize, u64, u32)> {
        self.entries.iter().filter_map(|&(key, word)| {
            let (group, members, depth) = match key.kind() {
                Kind::One(slot) => (slot.group(), slot.member(), word.trailing_ones()),
                Kind::Group(group, span) => {
                    (group, word, (span - self.offset).min(self.count) as u32)
                }
            };
            let (tier, at) = tier_of_group(group);
            (tier == Tier::Device).then_some((at, members, depth))
        })
    }
}
