//! The messages, as bytes.
//!
//! A frame is a little-endian u32 length and that many bytes: a tag, then fields in order. Texts and lists carry a u32
//! count. Digests are 32 bytes, everything else fixed-width little-endian. An engine and its store are of the same
//! release; [`VERSION`] refuses any other pairing.

use std::io::{self, Read};

use kvmesh_core::Digest;

use crate::error::{Error, Result};
use crate::eviction::Hints;
use crate::namespace::Namespace;
use crate::tiers::Origins;

/// Changes with the messages and with the slot image.
pub(super) const VERSION: u32 = 4;
/// A look-up of half a million blocks.
const MAX_FRAME: usize = 16 << 20;

/// Offsets in `Response::Rooms` that are none.
pub(super) const PRESENT: u64 = u64::MAX;
pub(super) const FULL: u64 = u64::MAX - 1;

#[derive(Debug, PartialEq)]
pub(super) enum Request {
    /// First on every connection. `engine` tells processes apart.
    Hello {
        engine: u64,
        namespace: Namespace,
    },
    /// A greeting in another version.
    Other {
        version: u32,
    },
    /// `per_block_us`: in how long the engine computes a block; 0: it would not wait for any.
    Lookup {
        per_block_us: u32,
        chain: Vec<Digest>,
    },
    /// `tenant`: whose the blocks are; empty: nobody's.
    Reserve {
        tenant: String,
        parent: Option<Digest>,
        chain: Vec<Digest>,
    },
    /// Slots this connection reserved and filled. All its other reservations are given up.
    Register {
        slots: Vec<u64>,
    },
    Lease {
        chain: Vec<Digest>,
    },
    /// What requests that use these blocks say of their return.
    Hint {
        blocks: Vec<Digest>,
        hints: Hints,
    },
    /// Ends a lease; `corrupt` are indices of blocks whose checksum did not match.
    Release {
        lease: u64,
        corrupt: Vec<u32>,
    },
}

#[derive(Debug, PartialEq)]
pub(super) enum Response {
    /// Comes with the arena's descriptor.
    Welcome {
        version: u32,
    },
    /// `coming`: more are being brought from elsewhere.
    Found {
        blocks: u32,
        coming: bool,
    },
    /// One slot offset a block, or `PRESENT`, or `FULL`.
    Rooms {
        slots: Vec<u64>,
    },
    Registered {
        blocks: u32,
    },
    /// Of the blocks at the places `coming` the slot is being filled: its first word tells when it is.
    Leased {
        lease: u64,
        slots: Vec<u64>,
        coming: Vec<u32>,
        origins: Origins,
    },
    Released,
    Hinted,
    Refused {
        reason: String,
    },
}

/// A frame under construction.
struct Frame(Vec<u8>);

impl Frame {
    fn new(tag: u8) -> Self {
        Self(vec![0, 0, 0, 0, tag])
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(self, bytes: &[u8]) -> Self {
        let mut frame = self.u32(bytes.len() as u32);
        frame.0.extend(bytes);
        frame
    }

    fn digests(self, digests: &[Digest]) -> Self {
        let mut frame = self.u32(digests.len() as u32);
        frame.0.reserve(digests.len() * Digest::LEN);
        for digest in digests {
            frame.0.extend_from_slice(digest.as_bytes());
        }
        frame
    }

    fn u32s(self, values: &[u32]) -> Self {
        values
            .iter()
            .fold(self.u32(values.len() as u32), |frame, value| {
                frame.u32(*value)
            })
    }

    fn u64s(self, values: &[u64]) -> Self {
        values
            .iter()
            .fold(self.u32(values.len() as u32), |frame, value| {
                frame.u64(*value)
            })
    }

    fn finish(mut self) -> Vec<u8> {
        let length = (self.0.len() - 4) as u32;
        self.0[..4].copy_from_slice(&length.to_le_bytes());
        self.0
    }
}

/// The unread part of a frame.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self
            .0
            .split_at_checked(count)
            .ok_or(Error::Protocol("a message ends early"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn u32(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(self.take(4)?);
        Ok(u32::from_le_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8)?);
        Ok(u64::from_le_bytes(bytes))
    }

    fn bytes(&mut self) -> Result<&'a [u8]> {
        let length = self.u32()? as usize;
        self.take(length)
    }

    fn digests(&mut self) -> Result<Vec<Digest>> {
        let count = self.u32()? as usize;
        let bytes = self.take(count.saturating_mul(Digest::LEN))?;
        Ok(bytes
            .chunks_exact(Digest::LEN)
            .map(|chunk| Digest::new(std::array::from_fn(|at| chunk[at])))
            .collect())
    }

    fn u32s(&mut self) -> Result<Vec<u32>> {
        let count = self.u32()? as usize;
        let mut values = Fields(self.take(count.saturating_mul(4))?);
        (0..count).map(|_| values.u32()).collect()
    }

    fn u64s(&mut self) -> Result<Vec<u64>> {
        let count = self.u32()? as usize;
        let mut values = Fields(self.take(count.saturating_mul(8))?);
        (0..count).map(|_| values.u64()).collect()
    }

    fn end(self) -> Result<()> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Error::Protocol("a message has bytes left over"))
        }
    }
}

impl Request {
    pub(super) fn hello(engine: u64, namespace: &Namespace) -> Vec<u8> {
        Frame::new(1)
            .u32(VERSION)
            .u64(engine)
            .bytes(&namespace.to_bytes())
            .finish()
    }

    pub(super) fn lookup(chain: &[Digest], per_block_us: u32) -> Vec<u8> {
        Frame::new(2).u32(per_block_us).digests(chain).finish()
    }

    pub(super) fn reserve(tenant: &str, parent: Option<&Digest>, chain: &[Digest]) -> Vec<u8> {
        Frame::new(3)
            .bytes(tenant.as_bytes())
            .digests(parent.map(std::slice::from_ref).unwrap_or_default())
            .digests(chain)
            .finish()
    }

    pub(super) fn register(slots: &[u64]) -> Vec<u8> {
        Frame::new(4).u64s(slots).finish()
    }

    pub(super) fn lease(chain: &[Digest]) -> Vec<u8> {
        Frame::new(5).digests(chain).finish()
    }

    pub(super) fn hint(blocks: &[Digest], hints: &Hints) -> Vec<u8> {
        let returns = hints.returns.map_or(2, u32::from);
        Frame::new(7)
            .digests(blocks)
            .u64s(hints.session.as_slice())
            .u32(returns)
            .u32(u32::from(hints.tool_call))
            .u32s(hints.returns_in.map(f32::to_bits).as_slice())
            .finish()
    }

    pub(super) fn release(lease: u64, corrupt: &[u32]) -> Vec<u8> {
        Frame::new(6).u64(lease).u32s(corrupt).finish()
    }

    pub(super) fn decode(frame: &[u8]) -> Result<Self> {
        let mut fields = Fields(frame);
        let request = match fields.u8()? {
            1 => {
                let (version, engine) = (fields.u32()?, fields.u64()?);
                if version != VERSION {
                    // What follows may look different in another version.
                    return Ok(Self::Other { version });
                }
                let namespace = Namespace::from_bytes(fields.bytes()?)
                    .ok_or(Error::Protocol("not a namespace"))?;
                Self::Hello { engine, namespace }
            }
            2 => Self::Lookup {
                per_block_us: fields.u32()?,
                chain: fields.digests()?,
            },
            3 => Self::Reserve {
                tenant: String::from_utf8_lossy(fields.bytes()?).into_owned(),
                parent: fields.digests()?.first().copied(),
                chain: fields.digests()?,
            },
            4 => Self::Register {
                slots: fields.u64s()?,
            },
            5 => Self::Lease {
                chain: fields.digests()?,
            },
            6 => Self::Release {
                lease: fields.u64()?,
                corrupt: fields.u32s()?,
            },
            7 => Self::Hint {
                blocks: fields.digests()?,
                hints: Hints {
                    session: fields.u64s()?.first().copied(),
                    returns: match fields.u32()? {
                        0 => Some(false),
                        1 => Some(true),
                        _ => None,
                    },
                    tool_call: fields.u32()? != 0,
                    returns_in: fields.u32s()?.first().copied().map(f32::from_bits),
                },
            },
            _ => return Err(Error::Protocol("an unknown request")),
        };
        fields.end()?;
        Ok(request)
    }
}

impl Response {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Welcome { version } => Frame::new(129).u32(*version),
            Self::Found { blocks, coming } => Frame::new(130).u32(*blocks).u32(u32::from(*coming)),
            Self::Rooms { slots } => Frame::new(131).u64s(slots),
            Self::Registered { blocks } => Frame::new(132).u32(*blocks),
            Self::Leased {
                lease,
                slots,
                coming,
                origins,
            } => (Frame::new(133).u64(*lease).u64s(slots).u32s(coming))
                .u32(origins.nvme)
                .u32(origins.network),
            Self::Released => Frame::new(134),
            Self::Hinted => Frame::new(136),
            Self::Refused { reason } => Frame::new(135).bytes(reason.as_bytes()),
        }
        .finish()
    }

    pub(super) fn decode(frame: &[u8]) -> Result<Self> {
        let mut fields = Fields(frame);
        let response = match fields.u8()? {
            129 => Self::Welcome {
                version: fields.u32()?,
            },
            130 => Self::Found {
                blocks: fields.u32()?,
                coming: fields.u32()? != 0,
            },
            131 => Self::Rooms {
                slots: fields.u64s()?,
            },
            132 => Self::Registered {
                blocks: fields.u32()?,
            },
            133 => Self::Leased {
                lease: fields.u64()?,
                slots: fields.u64s()?,
                coming: fields.u32s()?,
                origins: Origins {
                    nvme: fields.u32()?,
                    network: fields.u32()?,
                },
            },
            134 => Self::Released,
            136 => Self::Hinted,
            135 => Self::Refused {
                reason: String::from_utf8_lossy(fields.bytes()?).into_owned(),
            },
            _ => return Err(Error::Protocol("an unknown response")),
        };
        fields.end()?;
        Ok(response)
    }
}

/// Reads one frame, without its length, into `frame`; false at the orderly end of the stream.
pub(super) fn read_frame(stream: &mut impl Read, frame: &mut Vec<u8>) -> io::Result<bool> {
    let mut length = [0; 4];
    // The engine's process may have handlers of signals, which interrupt a read that has a timeout.
    let count = loop {
        match stream.read(&mut length) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => break read?,
        }
    };
    if count == 0 {
        return Ok(false);
    }
    stream.read_exact(&mut length[count..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a frame is too long",
        ));
    }
    frame.resize(length, 0);
    stream.read_exact(frame)?;
    Ok(true)
}

#[cfg(test)]
mod tests;
