//! What went between the tiers, since the start.

/// Between the host tier and the disk, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flow {
    /// Written below.
    pub spilled: u64,
    /// Left the host tier unwritten because the writer was behind.
    pub shed: u64,
    /// Not written because they are unlikely to return.
    pub unlikely: u64,
    /// Not written because the day's bytes are used up, or nearly, for blocks as likely to return.
    pub over_budget: u64,
    /// Not written because the tier had no room, or failed.
    pub unplaced: u64,
    /// To be written, or to be passed over, before memory has room again for what comes next.
    pub waiting: u64,
    /// Read back.
    pub promoted: u64,
    /// Not read back: the disk failed, or the block was corrupt.
    pub failed: u64,
    /// To be read back now.
    pub coming: u64,
    /// Blocks of prefetches given up because their time was over before they were begun.
    pub late: u64,
}

impl Flow {
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            promoted: other.promoted,
            failed: other.failed,
            coming: other.coming,
            late: other.late,
            ..self
        }
    }
}

/// To object storage, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Archived {
    /// Written.
    pub written: u64,
    /// Not written because too many waited, or the tier was out.
    pub shed: u64,
    /// Not written because they left the host tier at once.
    pub left: u64,
    /// Not written because there was no room for them.
    pub unplaced: u64,
    /// Not written because the service failed.
    pub failed: u64,
    /// To be written now.
    pub waiting: u64,
}

/// From object storage to the host tier: what came, and by reason what was wanted and did not, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recalled {
    /// Read, checked and readable.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// As measured last; 0: nothing was read yet.
    pub bytes_per_s: u64,
    /// Not there.
    pub absent: u64,
    /// By the deadline.
    pub late: u64,
    /// The link does not beat computing.
    pub slow: u64,
    /// No room in the host tier.
    pub full: u64,
    /// Wrong bytes.
    pub corrupt: u64,
    /// The service failed.
    pub failed: u64,
    /// Too many were under way.
    pub shed: u64,
}

impl Recalled {
    /// What did not come, by reason.
    pub fn by_reason(&self) -> [(&'static str, u64); 7] {
        [
            ("absent", self.absent),
            ("late", self.late),
            ("slow", self.slow),
            ("full", self.full),
            ("corrupt", self.corrupt),
            ("failed", self.failed),
            ("shed", self.shed),
        ]
    }
}
