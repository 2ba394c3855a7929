//! A page's digest by x86-64's SHA instructions, with the parent's digest in registers.
//!
//! A chain is as slow as the way from one digest to the next. Through memory, as a library's compression of whole
//! messages needs it, that way has two byte swaps and two stores that are loaded again; here it has none.

// Newer compilers than the oldest that is supported take many of these instructions for safe here.
#![allow(unused_unsafe)]

use std::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_blend_epi16, _mm_loadu_si128, _mm_set_epi64x,
    _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8,
    _mm_shuffle_epi32, _mm_storeu_si128,
};

use crate::{Digest, hash::Block};

/// SHA-256's round constants (FIPS 180-4, 4.2.2).
#[rustfmt::skip]
const ROUNDS: [u32; 64] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
    0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
    0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
    0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
    0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
    0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
    0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
    0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
];

/// Words in a register.
const LANES: usize = 4;
/// Registers that hold a block of a message.
const PARTS: usize = 4;

/// The state of a compression as the instructions take it: words a, b, e, f and c, d, g, h.
#[derive(Clone, Copy)]
struct State {
    abef: __m128i,
    cdgh: __m128i,
}

/// A digest's words in order.
#[derive(Clone, Copy)]
struct Words([__m128i; 2]);

/// The SHA instructions, for who has asked the processor.
#[derive(Clone, Copy)]
pub struct Sha(());

impl Sha {
    /// `None` where the processor lacks them.
    pub fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("sha")
            && is_x86_feature_detected!("ssse3")
            && is_x86_feature_detected!("sse4.1");
        has.then_some(Self(()))
    }

    /// Calls `each` with the digests of the pages behind `parent`. `write` lays a page out as a padded message in
    /// blocks, whose first 32 bytes the parent takes the place of.
    #[inline]
    pub fn chain<T>(
        self,
        initial: &[u32; 8],
        parent: &Digest,
        pages: impl Iterator<Item = T>,
        write: impl FnMut(T, &mut [Block]),
        blocks: &mut [Block],
        each: impl FnMut(Digest),
    ) {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { chain(initial, parent, pages, write, blocks, each) }
    }
}

/// Turns the bytes of every word.
#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
unsafe fn swap(words: __m128i) -> __m128i {
    // SAFETY: the caller has the instructions.
    unsafe {
        let order = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
        _mm_shuffle_epi8(words, order)
    }
}

#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
unsafe fn load(bytes: &[u8; Digest::LEN]) -> Words {
    let halves = bytes.as_ptr().cast::<__m128i>();
    // SAFETY: the array has two halves of 16 bytes; unaligned loads.
    unsafe {
        Words([
            swap(_mm_loadu_si128(halves)),
            swap(_mm_loadu_si128(halves.add(1))),
        ])
    }
}

#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
unsafe fn store(words: Words) -> [u8; Digest::LEN] {
    let mut bytes = [0; Digest::LEN];
    let halves = bytes.as_mut_ptr().cast::<__m128i>();
    // SAFETY: the array has two halves of 16 bytes; unaligned stores.
    unsafe {
        _mm_storeu_si128(halves, swap(words.0[0]));
        _mm_storeu_si128(halves.add(1), swap(words.0[1]));
    }
    bytes
}

#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
unsafe fn chain<T>(
    initial: &[u32; 8],
    parent: &Digest,
    pages: impl Iterator<Item = T>,
    mut write: impl FnMut(T, &mut [Block]),
    blocks: &mut [Block],
    mut each: impl FnMut(Digest),
) {
    let words = initial.as_ptr().cast::<__m128i>();
    // SAFETY: `initial` has two registers of words; the caller has the instructions.
    let (initial, mut parent) = unsafe {
        let [dcba, hgfe] = [_mm_loadu_si128(words), _mm_loadu_si128(words.add(1))];
        (arrange(dcba, hgfe), load(parent.as_bytes()))
    };
    for page in pages {
        write(page, blocks);
        let mut state = initial;
        let mut start = Some(parent);
        for block in &*blocks {
            let parts = block.as_ptr().cast::<__m128i>();
            // SAFETY: a block has four parts of 16 bytes; unaligned loads.
            state = unsafe {
                let [first, second] = match start.take() {
                    Some(Words(words)) => words,
                    None => [
                        swap(_mm_loadu_si128(parts)),
                        swap(_mm_loadu_si128(parts.add(1))),
                    ],
                };
                let third = swap(_mm_loadu_si128(parts.add(2)));
                let fourth = swap(_mm_loadu_si128(parts.add(3)));
                compress(state, [first, second, third, fourth])
            };
        }
        // SAFETY: the caller has the instructions.
        parent = unsafe { in_order(state) };
        // SAFETY: as above.
        each(Digest::new(unsafe { store(parent) }));
    }
}

/// The words of a state.
#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
unsafe fn in_order(state: State) -> Words {
    // SAFETY: the caller has the instructions.
    unsafe {
        let feba = _mm_shuffle_epi32(state.abef, 0x1b);
        let dchg = _mm_shuffle_epi32(state.cdgh, 0xb1);
        Words([
            _mm_blend_epi16(feba, dchg, 0xf0),
            _mm_alignr_epi8(dchg, feba, 8),
        ])
    }
}

/// The state of these words, in order.
#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
unsafe fn arrange(dcba: __m128i, hgfe: __m128i) -> State {
    // SAFETY: the caller has the instructions.
    unsafe {
        let cdab = _mm_shuffle_epi32(dcba, 0xb1);
        let efgh = _mm_shuffle_epi32(hgfe, 0x1b);
        State {
            abef: _mm_alignr_epi8(cdab, efgh, 8),
            cdgh: _mm_blend_epi16(efgh, cdab, 0xf0),
        }
    }
}

/// FIPS 180-4, 6.2.2, four rounds at a time.
#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
unsafe fn compress(before: State, mut words: [__m128i; PARTS]) -> State {
    let State { mut abef, mut cdgh } = before;
    // Written out, so that words stay in registers.
    macro_rules! rounds {
        ($($group:literal)*) => {$(
            let constants = _mm_loadu_si128(ROUNDS.as_ptr().add($group * LANES).cast());
            let sums = _mm_add_epi32(words[$group % PARTS], constants);
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sums);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sums, 0x0e));
        )*};
    }
    // The words of four groups on take the place of this one's.
    macro_rules! rounds_and_words {
        ($($group:literal)*) => {$(
            rounds!($group);
            let [this, next, third, last] =
                std::array::from_fn(|at| words[($group + at) % PARTS]);
            let mixed = _mm_sha256msg1_epu32(this, next);
            let mixed = _mm_add_epi32(mixed, _mm_alignr_epi8(last, third, 4));
            words[$group % PARTS] = _mm_sha256msg2_epu32(mixed, last);
        )*};
    }
    // SAFETY: there are constants for sixteen groups of four rounds; the caller has the instructions.
    unsafe {
        rounds_and_words!(0 1 2 3 4 5 6 7 8 9 10 11);
        rounds!(12 13 14 15);
        State {
            abef: _mm_add_epi32(abef, before.abef),
            cdgh: _mm_add_epi32(cdgh, before.cdgh),
        }
    }
}
