//! The last lines of the log, for whoever is to help: `/debug/log`, and with it the support archive.
//!
//! The log itself goes to standard error, and where that ends is often out of reach by then: a pod that
//! was replaced, another's terminal. What is kept is what was written there, no more and no less, so
//! that it holds no secret that the log does not hold; and it is bounded by its size alone, since lines
//! can be long.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, PoisonError};

/// How much is kept.
const BYTES: usize = 256 << 10;

/// How much of one line.
const LINE: usize = 8 << 10;

/// The last lines of the log.
#[derive(Debug, Default)]
pub struct Journal(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
    left_out: u64,
}

impl Journal {
    /// What is kept, the oldest line first, without colours.
    #[must_use]
    pub fn text(&self) -> String {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = match held.left_out {
            0 => String::new(),
            count => format!("({count} earlier lines are not kept)\n"),
        };
        for line in &held.lines {
            text += &anstream::adapter::strip_str(&String::from_utf8_lossy(line)).to_string();
            if !line.ends_with(b"\n") {
                text.push('\n');
            }
        }
        text
    }

    fn keep(&self, line: &[u8]) {
        let line = &line[..line.len().min(LINE)];
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.bytes += line.len();
        held.lines.push_back(line.into());
        while held.bytes > BYTES {
            let Some(oldest) = held.lines.pop_front() else { break };
            held.bytes -= oldest.len();
            held.left_out += 1;
        }
    }
}

/// The log writes each of its lines at once.
impl io::Write for &Journal {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.keep(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn the_last_lines_are_kept_and_no_more_than_that() {
        let journal = Journal::default();
        assert_eq!(journal.text(), "");
        writeln!(&journal, "\x1b[32m INFO\x1b[0m first").unwrap();
        assert_eq!(journal.text(), " INFO first\n");
        (&journal).write_all(&vec![b'x'; 3 * LINE]).unwrap();
        assert_eq!(journal.text().len(), " INFO first\n".len() + LINE + 1);
        for number in 0..100_000 {
            (&journal).write_all(format!("line {number}\n").as_bytes()).unwrap();
        }
        let text = journal.text();
        assert!(text.len() <= BYTES + 80, "{}", text.len());
        assert!(text.ends_with("line 99998\nline 99999\n"));
        let kept = text.lines().count() - 1;
        assert!(text.starts_with(&format!("({} earlier lines are not kept)\n", 100_002 - kept)));
    }
}
