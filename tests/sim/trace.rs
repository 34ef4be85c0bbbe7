//! The trace: every event in order, its last lines kept and all of it hashed.

use std::collections::VecDeque;
use std::time::Duration;

const LINES_KEPT: usize = 120;

/// What happened, for a human who replays a seed and for comparing two runs.
#[derive(Debug)]
pub struct Trace {
    print: bool,
    last: VecDeque<String>,
    hash: u64,
    lines: u64,
}

impl Trace {
    pub fn new(print: bool) -> Self {
        Self { print, last: VecDeque::new(), hash: 0xcbf2_9ce4_8422_2325, lines: 0 }
    }

    pub fn line(&mut self, now: Duration, text: std::fmt::Arguments<'_>) {
        let line = format!("{:>12} us  {text}", now.as_micros());
        for byte in line.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        self.lines += 1;
        if self.print {
            println!("{line}");
        }
        if self.last.len() == LINES_KEPT {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }

    /// A digest of all lines, and how many there were.
    pub fn digest(&self) -> (u64, u64) {
        (self.hash, self.lines)
    }

    pub fn last_lines(&self) -> String {
        self.last.iter().map(|line| format!("{line}\n")).collect()
    }
}
