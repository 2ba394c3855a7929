//! Where a JSON value ends, byte by byte. Nothing but nesting and strings is looked at: what a model writes is passed
//! on as it is, valid or not.

/// Follows one value from its first byte.
#[derive(Clone, Copy, Debug, Default)]
pub struct ValueEnd {
    kind: Kind,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Unknown,
    Container,
    String,
    Scalar,
}

/// What a byte is to the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Inside; more follow.
    Inside,
    /// The value's last byte.
    Last,
    /// Behind the value, which had ended with the byte before.
    Behind,
}

impl ValueEnd {
    /// The next byte.
    pub fn next(&mut self, byte: u8) -> Part {
        if self.in_string {
            if self.escaped {
                self.escaped = false;
            } else if byte == b'\\' {
                self.escaped = true;
            } else if byte == b'"' {
                self.in_string = false;
                if self.kind == Kind::String {
                    return Part::Last;
                }
            }
            return Part::Inside;
        }
        if self.kind == Kind::Unknown {
            self.kind = match byte {
                b'{' | b'[' => Kind::Container,
                b'"' => Kind::String,
                _ => Kind::Scalar,
            };
        }
        match (self.kind, byte) {
            (Kind::Scalar, b',' | b'}' | b']' | b';' | b' ' | b'\t' | b'\n' | b'\r') => {
                return Part::Behind;
            }
            (Kind::Scalar, _) => {}
            (_, b'"') => self.in_string = true,
            (_, b'{' | b'[') => self.depth += 1,
            (_, b'}' | b']') => {
                self.depth -= 1;
                if self.depth == 0 {
                    return Part::Last;
                }
            }
            _ => {}
        }
        Part::Inside
    }
}
