//! The format "postcopy-trace v1": lines of words.
//!
//! ```text
//! # postcopy-trace v1          the first line; other lines from # on are comments
//! pages N                      pages of the guest that it was recorded of
//! page_size 4096
//! touch T_US PAGE VCPU         first touch of a page: none twice, in order of the vCPU's time
//! workload, zero, dirty_*, accessed, map ...     what else was known of the guest: not read
//! ```
//!
//! Of touches below [`SYSTEM_PAGES`] only the time is kept: the reference guests have pages of
//! their own there.

use super::{TIME_US_MAX, TOUCHES_MAX, Touch};
use crate::vmm::workload::{SYSTEM_PAGES, VCPUS_MAX};
use std::collections::HashSet;
use std::ops::RangeInclusive;

const FIRST_LINE: &str = "# postcopy-trace v1";
/// The most pages: those of 16 TiB.
const PAGES_MAX: u64 = 1 << 32;
/// So much of a wrong line is shown.
const SHOWN_CHARS: usize = 60;

/// A line that is none of the format.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct WrongLine {
    /// From 1.
    pub(super) line: usize,
    pub(super) expected: String,
    pub(super) found: String,
}

/// What may stand in place of what does.
type Expected = String;

/// The touches of each vCPU. No page is there twice, and each vCPU has at least one.
pub(super) fn touches(text: &str) -> Result<Vec<Vec<Touch>>, WrongLine> {
    let mut reader = Reader::default();
    let mut lines = 0;
    for (number, line) in (1..).zip(text.lines()) {
        lines = number;
        let wrong = |expected| WrongLine { line: number, expected, found: shown(line) };
        reader.line(number, line).map_err(wrong)?;
    }
    let found = "the end of the file".to_owned();
    reader.end().map_err(|expected| WrongLine { line: lines + 1, expected, found })
}

fn shown(line: &str) -> String {
    let cut: String = line.chars().take(SHOWN_CHARS).collect();
    let dots = if cut.len() < line.len() { "..." } else { "" };
    format!("{cut:?}{dots}")
}

/// What the lines so far told.
#[derive(Default)]
struct Reader {
    pages: Option<u64>,
    page_size: bool,
    touched: HashSet<u64>,
    vcpus: [OneVcpu; VCPUS_MAX as usize],
}

#[derive(Default)]
struct OneVcpu {
    touches: Vec<Touch>,
    /// The time of its last line.
    last_us: u64,
    /// The time of its last touch that is kept.
    kept_us: u64,
}

impl Reader {
    fn line(&mut self, number: usize, line: &str) -> Result<(), Expected> {
        if number == 1 {
            return if line == FIRST_LINE { Ok(()) } else { Err(format!("{FIRST_LINE:?}")) };
        }
        if line.starts_with('#') || line.trim().is_empty() {
            return Ok(());
        }
        let mut words = line.split_ascii_whitespace();
        match words.next().unwrap_or_default() {
            "pages" if self.pages.is_none() => {
                let [pages] = numbers(words, "pages N", [1..=PAGES_MAX])?;
                self.pages = Some(pages);
            }
            "page_size" => {
                numbers(words, "page_size 4096", [4096..=4096])?;
                self.page_size = true;
            }
            "touch" => self.touch(words)?,
            "workload" | "zero" | "accessed" | "map" => {}
            word if word.starts_with("dirty_") => {}
            _ => {
                return Err("a comment, pages (once), page_size, touch, workload, zero, dirty_*, \
                            accessed or map"
                    .into());
            }
        }
        Ok(())
    }

    fn touch<'a>(&mut self, words: impl Iterator<Item = &'a str>) -> Result<(), Expected> {
        let pages = self.pages.filter(|_| self.page_size);
        let pages = pages.ok_or("pages and page_size before the first touch")?;
        let ranges = [0..=TIME_US_MAX, 0..=pages - 1, 0..=u64::from(VCPUS_MAX) - 1];
        let [time, page, vcpu] = numbers(words, "touch T_US PAGE VCPU", ranges)?;
        let of = &mut self.vcpus[vcpu as usize];
        if time < of.last_us {
            return Err(format!("a time of vCPU {vcpu} from {} us on", of.last_us));
        }
        of.last_us = time;
        if self.touched.len() == TOUCHES_MAX {
            return Err(format!("no more than {TOUCHES_MAX} touches"));
        }
        if !self.touched.insert(page) {
            return Err("a page that was not touched before".into());
        }
        if page >= SYSTEM_PAGES {
            of.touches.push(Touch { page, wait_us: time - of.kept_us });
            of.kept_us = time;
        }
        Ok(())
    }

    fn end(self) -> Result<Vec<Vec<Touch>>, Expected> {
        let mut vcpus: Vec<_> = self.vcpus.into_iter().map(|of| of.touches).collect();
        while vcpus.pop_if(|touches| touches.is_empty()).is_some() {}
        match vcpus.iter().position(Vec::is_empty) {
            _ if vcpus.is_empty() => Err(format!("a touch of a page from {SYSTEM_PAGES} on")),
            Some(vcpu) => Err(format!("a touch of a page from {SYSTEM_PAGES} on by vCPU {vcpu}")),
            None => Ok(vcpus),
        }
    }
}

/// As many numbers as there are ranges, each in its own, and nothing else.
fn numbers<'a, const N: usize>(
    mut words: impl Iterator<Item = &'a str>,
    form: &str,
    ranges: [RangeInclusive<u64>; N],
) -> Result<[u64; N], Expected> {
    let mut found = [0; N];
    for (number, range) in found.iter_mut().zip(&ranges) {
        let word = words.next().and_then(|word| word.parse().ok());
        *number = word.filter(|number| range.contains(number)).ok_or_else(|| {
            let ranges = ranges.iter().map(|range| format!("{} to {}", range.start(), range.end()));
            let ranges: Vec<String> = ranges.collect();
            format!("\"{form}\" with numbers of {}", ranges.join(", "))
        })?;
    }
    match words.next() {
        None => Ok(found),
        Some(_) => Err(format!("\"{form}\" and nothing behind it")),
    }
}
