//! Batches of events as holders send them.

/// Kinds of events.
pub const REMOVED: u64 = 2;
pub const CLEARED: u64 = 3;

/// A batch as protobuf writes it.
#[derive(Clone, Default)]
pub struct Columns<'a> {
    pub holder: &'a str,
    pub ops: Vec<u64>,
    pub counts: Vec<u64>,
    pub hashes: Vec<u64>,
    pub parents: Vec<u64>,
}

fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn field(number: u64, bytes: &[u8], out: &mut Vec<u8>) {
    varint((number << 3) | 2, out);
    varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

impl Columns<'_> {
    /// One more event; kinds as in events.proto.
    pub fn event(mut self, tier: u64, kind: u64, parent: Option<u64>, hashes: &[u64]) -> Self {
        self.ops.push(tier * 4 + kind);
        self.counts.push(hashes.len() as u64);
        self.hashes.extend(hashes);
        self.parents.extend(parent);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        field(1, self.holder.as_bytes(), &mut out);
        varint((2 << 3) | 1, &mut out); // incarnation, fixed64
        out.extend_from_slice(&7u64.to_le_bytes());
        varint(3 << 3, &mut out); // sequence
        varint(300, &mut out);
        for (number, column) in [(7, &self.ops), (8, &self.counts)] {
            let mut packed = Vec::new();
            column.iter().for_each(|&entry| varint(entry, &mut packed));
            field(number, &packed, &mut out);
        }
        for (number, column) in [(9, &self.hashes), (10, &self.parents)] {
            let packed: Vec<u8> = column
                .iter()
                .flat_map(|entry| entry.to_le_bytes())
                .collect();
            field(number, &packed, &mut out);
        }
        out
    }
}
