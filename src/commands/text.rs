//! Laying out text for a terminal of 80 columns.

use std::fmt::Write as _;

/// The width that everything is to fit in.
pub(super) const WIDTH: usize = 80;

/// Breaks text at blanks into lines, each behind `indent` blanks and further ones behind two more. A
/// word that is longer than a line stays whole, and so does a command between backticks, which is to be
/// copied.
pub(super) fn wrap(text: &str, indent: usize) -> String {
    let mut out = String::new();
    let mut line = " ".repeat(indent);
    let mut empty = true;
    for word in words(text) {
        if !empty && width(&line) + 1 + width(word) > WIDTH {
            out.push_str(&line);
            out.push('\n');
            line = " ".repeat(indent + 2);
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    out.push_str(&line);
    out.push('\n');
    out
}

/// What text may be broken between: words, of which a command between backticks is one.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |c| {
        quoted ^= c == '`';
        c == ' ' && !quoted
    })
}

/// Text without what goes beyond a width, which a sign at its end tells.
pub(super) fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    kept + "…"
}

/// Text without its middle, if it is longer than a width: names often differ only in their ends.
fn cut_inside(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    let tail = width.saturating_sub(1) / 2;
    let head = width.saturating_sub(1) - tail;
    let inside = head..count - tail;
    let mut out = String::new();
    for (place, c) in text.chars().enumerate() {
        if place == inside.start {
            out.push('…');
        }
        if !inside.contains(&place) {
            out.push(c);
        }
    }
    out
}

/// `namespace/name` and what follows in a width: the namespace gives way first, then the name.
pub(super) fn cut_service(service: &str, rest: &str, width: usize) -> String {
    const LEAST: usize = 12;
    let (namespace, name) = service.split_once('/').unwrap_or(("", service));
    let room = width.saturating_sub(rest.chars().count() + 1);
    let for_namespace = room.saturating_sub(name.chars().count()).max(LEAST);
    let namespace = cut_inside(namespace, for_namespace);
    let name = cut_inside(name, room.saturating_sub(namespace.chars().count()).max(LEAST));
    cut(&format!("{namespace}/{name}{rest}"), width)
}

/// `label` in a column of its own, and text beside it.
pub(super) fn labelled(label: &str, text: &str, column: usize) -> String {
    let wrapped = wrap(text, column);
    let hanging = wrapped
        .replace(&format!("\n{}", " ".repeat(column + 2)), &format!("\n{}", " ".repeat(column)));
    format!("{label:<column$}{}", hanging.trim_start())
}

/// Rows of cells in aligned columns, without blanks at their ends.
pub(super) fn columns(rows: &[Vec<String>], indent: usize) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| self::width(cell)).max()
    };
    let widths: Vec<_> = (0..count).map(|column| width(column).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = " ".repeat(indent);
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// A colour. Where standard output is no terminal it is taken out again, when it is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Paint {
    Good,
    Attention,
    Bad,
    Bold,
}

impl Paint {
    /// Paints a text.
    pub(super) fn on(self, text: &str) -> String {
        let code = match self {
            Self::Good => "32",
            Self::Attention => "33",
            Self::Bad => "31",
            Self::Bold => "1",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// How wide a text is on a terminal: in characters, colours left out.
fn width(text: &str) -> usize {
    let mut chars = text.chars();
    let mut width = 0;
    while let Some(c) = chars.next() {
        if c == '\x1b' {
            chars.by_ref().find(|c| *c == 'm');
        } else {
            width += 1;
        }
    }
    width
}

/// `1 endpoint`, `2 endpoints`.
pub(super) fn count<N: TryInto<u64> + std::fmt::Display + Copy>(number: N, what: &str) -> String {
    if number.try_into().is_ok_and(|number| number == 1) {
        format!("1 {what}")
    } else {
        format!("{number} {what}s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_broken_at_blanks_and_indented() {
        let text = wrap("word ".repeat(30).trim(), 4);
        assert!(text.lines().all(|line| line.len() <= WIDTH), "{text}");
        assert!(text.starts_with("    word"));
        assert!(text.lines().nth(1).unwrap().starts_with("      word"));
        let long = "x".repeat(100);
        assert_eq!(wrap(&long, 2), format!("  {long}\n"));
        let command = format!("`nft {}`", "x ".repeat(40));
        let text = wrap(&format!("look with {command}, or not"), 2);
        assert!(text.lines().any(|line| line.trim() == format!("{command},")), "{text}");
        let beside = labelled("Label", &"word ".repeat(30), 10);
        let lines: Vec<_> = beside.lines().collect();
        assert!(lines[0].starts_with("Label     word") && lines[1].starts_with("          word"));
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a".into(), "bb".into()], vec!["ccc".into(), String::new()]];
        assert_eq!(columns(&rows, 1), " a    bb\n ccc\n");
    }
}
