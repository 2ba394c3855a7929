//! Finding markers in a text that comes in pieces.

/// Where the earliest of `markers` begins in `text` and which it is; of several at one place, the longest.
pub fn find(text: &str, markers: &[&'static str]) -> Option<(usize, &'static str)> {
    markers
        .iter()
        .filter_map(|marker| text.find(marker).map(|at| (at, *marker)))
        .min_by_key(|(at, marker)| (*at, usize::MAX - marker.len()))
}

/// Length of the longest end of `text` that one of `markers` begins with, but is not yet whole.
pub fn open_end(text: &str, markers: &[&str]) -> usize {
    let longest = |marker: &&str| {
        (1..marker.len())
            .rev()
            .find(|&length| text.as_bytes().ends_with(&marker.as_bytes()[..length]))
    };
    markers.iter().filter_map(longest).max().unwrap_or(0)
}

/// Whether `text` may become a text that begins with one of `markers`.
pub fn may_begin(text: &str, markers: &[&str]) -> bool {
    markers.iter().any(|marker| marker.starts_with(text))
}
