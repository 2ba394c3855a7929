//! Stop strings: the answer ends before the one that is complete first, wherever the text is cut into pieces.

/// Watches one text as it grows; holds back an end that may become a stop string.
///
/// Each stop string is followed by its own Knuth-Morris-Pratt automaton, over bytes: matches of UTF-8 in UTF-8 begin
/// and end with whole characters.
#[derive(Default)]
pub struct StopStrings {
    stops: Vec<Follower>,
    held: String,
    matched: Option<usize>,
}

struct Follower {
    stop: String,
    /// By matched length: the length of the longest proper end of that much which the stop string begins with.
    failure: Vec<usize>,
    /// How much of the stop string the text ends with.
    matched: usize,
}

impl Follower {
    fn new(stop: String) -> Self {
        let bytes = stop.as_bytes();
        let mut failure = vec![0; bytes.len() + 1];
        let mut length = 0;
        for at in 1..bytes.len() {
            while length > 0 && bytes[at] != bytes[length] {
                length = failure[length];
            }
            if bytes[at] == bytes[length] {
                length += 1;
            }
            failure[at + 1] = length;
        }
        Self {
            stop,
            failure,
            matched: 0,
        }
    }

    /// Whether `byte` completes the stop string.
    fn advance(&mut self, byte: u8) -> bool {
        let stop = self.stop.as_bytes();
        while self.matched > 0 && stop[self.matched] != byte {
            self.matched = self.failure[self.matched];
        }
        if stop[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == stop.len()
    }
}

impl StopStrings {
    /// Empty stop strings are none.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self {
            stops: stops
                .into_iter()
                .filter(|stop| !stop.is_empty())
                .map(Follower::new)
                .collect(),
            ..Self::default()
        }
    }

    /// Whether there is nothing to watch for.
    pub fn is_empty(&self) -> bool {
        self.stops.is_empty()
    }

    /// The stop string that ended the text. Of several that were complete with one character, the longest.
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|at| self.stops[at].stop.as_str())
    }

    /// Adds to `out` what of the text so far is safe to show. After a match, nothing more is.
    pub fn feed(&mut self, piece: &str, out: &mut String) {
        if self.stops.is_empty() {
            out.push_str(piece);
            return;
        }
        if self.matched.is_some() {
            return;
        }
        let before = self.held.len();
        self.held.push_str(piece);
        for (at, byte) in piece.bytes().enumerate() {
            let mut longest = 0;
            for (index, follower) in self.stops.iter_mut().enumerate() {
                if follower.advance(byte) && follower.stop.len() > longest {
                    longest = follower.stop.len();
                    self.matched = Some(index);
                }
            }
            if longest > 0 {
                out.push_str(&self.held[..before + at + 1 - longest]);
                self.held = String::new();
                return;
            }
        }
        let open = self.stops.iter().map(|each| each.matched).max();
        let safe = self.held.len() - open.unwrap_or(0);
        out.push_str(&self.held[..safe]);
        self.held.drain(..safe);
    }

    /// Adds what was held back, once the text has ended.
    pub fn flush(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut watcher = StopStrings::new(stops.iter().map(|stop| (*stop).to_owned()));
        let mut out = String::new();
        for piece in pieces {
            watcher.feed(piece, &mut out);
        }
        watcher.flush(&mut out);
        (out, watcher.matched().map(str::to_owned))
    }

    #[test]
    fn every_pair_of_borders() {
        let text = "eins zwéi</s>drei";
        let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        for (i, &first) in borders.iter().enumerate() {
            for &second in &borders[i..] {
                let pieces = [&text[..first], &text[first..second], &text[second..]];
                let expected = ("eins zwéi".to_owned(), Some("</s>".to_owned()));
                assert_eq!(run(&["</s>"], &pieces), expected);
            }
        }
    }

    #[test]
    fn first_complete_wins_and_the_longest_of_those() {
        let of = |stops: &[&str], text: &str| run(stops, &[text]);
        assert_eq!(
            of(&["world", "o w"], "hello world"),
            ("hell".to_owned(), Some("o w".to_owned()))
        );
        assert_eq!(
            of(&["d", "abcd"], "xabcd"),
            ("x".to_owned(), Some("abcd".to_owned()))
        );
        assert_eq!(of(&["", "z"], "abc"), ("abc".to_owned(), None));
    }

    #[test]
    fn nothing_is_held_back_without_reason() {
        let mut watcher = StopStrings::new(["\n\n".to_owned()]);
        let mut feed = |piece: &str| {
            let mut out = String::new();
            watcher.feed(piece, &mut out);
            out
        };
        assert_eq!(feed("abc"), "abc");
        assert_eq!(feed("d\n"), "d");
        assert_eq!(feed("e"), "\ne");
        assert_eq!(feed("\n\nrest"), "");
        assert_eq!(feed("more"), "");
    }
}
