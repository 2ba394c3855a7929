//! `{% generation %}` blocks, with which templates mark the assistant's part for training. They render as what they
//! hold, in a scope of its own.

use std::borrow::Cow;

/// The source with the tags replaced by ones that minijinja knows; whitespace control stays.
pub fn without_generation_tags(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (inside, after) = tag.split_at(end);
        let name = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match name {
            "generation" => out.push_str(&inside.replace("generation", "with")),
            "endgeneration" => out.push_str(&inside.replace("endgeneration", "endwith")),
            _ => out.push_str(inside),
        }
        rest = after;
    }
    out.push_str(rest);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_become_scopes_and_all_else_stays() {
        let source = "{%- generation -%}{{ add_generation_prompt }}{% endgeneration %}{% if generation %}{% endif %}";
        assert_eq!(
            without_generation_tags(source),
            "{%- with -%}{{ add_generation_prompt }}{% endwith %}{% if generation %}{% endif %}"
        );
        assert_eq!(
            without_generation_tags("a {% generation"),
            "a {% generation"
        );
    }
}
