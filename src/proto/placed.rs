//! The pages that the destination has, as it tells them after a lost link: a bit
//! a page in memory, parts of 16 MiB of guest memory on the wire.
//!
//! What it costs is bounded by the guest's size and nothing else: whatever the
//! pattern, a part takes at most a byte more than a bit for each of its pages,
//! and both sides hold a message and a bitmap, not the set.
//!
//! # On the wire
//!
//! A message says the number of its first part, then one part after the other:
//!
//! ```text
//! +--------------+------+---------+------+---------+ ...
//! | first part   | form | content | form | content |
//! +--------------+------+---------+------+---------+ ...
//! form 0  none of the part's pages; no content
//! form 1  all of them; no content
//! form 2  runs, first, count - 1, gap - 1, count - 1, gap - 1, count - 1 ...
//! form 3  a bit a page, the lowest bit of a byte first; unused bits are 0
//! ```
//!
//! Numbers are unsigned LEB128 varints in their shortest form; `first` counts from
//! the part's first page, and `gap`, the pages between two runs, is at least 1. A
//! part has the shortest of the forms, the bitmap among equals. So a set has one
//! encoding, and a part is neither taken twice nor left out.

use super::bitmap::{AtomicBitmap, low_bits};
use super::page::{PageIndex, PageRun};
use std::fmt;

/// Pages in a part; the last one of a guest may have fewer.
pub const PART_PAGES: u64 = 4096;
/// Words in a part's bitmap.
pub const PART_WORDS: usize = (PART_PAGES / WORD_PAGES) as usize;
/// The most parts in a message: with 2 GiB of guest memory to a message, it has at
/// most 65,674 bytes.
pub const MESSAGE_PARTS_MAX: u64 = 128;

const WORD_PAGES: u64 = 64;

const NONE: u8 = 0;
const ALL: u8 = 1;
const RUNS: u8 = 2;
const BITS: u8 = 3;

/// Why bytes are not the next parts of the set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacedError {
    /// The bytes end inside a part, or before the first.
    #[error("a message of it ends in the middle")]
    Truncated,
    /// The message does not go on where the one before it ended.
    #[error("part {part} comes where part {expected} is due")]
    OutOfOrder {
        /// Where it begins.
        part: u64,
        /// Where it should.
        expected: u64,
    },
    /// More parts than a message, or the guest, has.
    #[error("a message of it has too many parts")]
    TooManyParts,
    /// A form that does not exist.
    #[error("part {part} has the unknown form {form}")]
    UnknownForm {
        /// Which part.
        part: u64,
        /// The form.
        form: u8,
    },
    /// A number that is longer than need be, or larger than 64 bits.
    #[error("a number in it is not in its shortest form or exceeds 64 bits")]
    BadNumber,
    /// A page that the part does not have.
    #[error("part {part} reaches past its {pages} pages")]
    PastTheEnd {
        /// Which part.
        part: u64,
        /// How many pages it has.
        pages: u64,
    },
    /// Another form says the same in fewer bytes.
    #[error("part {part} is not in its shortest form")]
    NotShortest {
        /// Which part.
        part: u64,
    },
    /// It was said to be whole and is not.
    #[error("it ends after {taken} of {parts} parts")]
    Incomplete {
        /// Parts that came.
        taken: u64,
        /// Parts that there are.
        parts: u64,
    },
}

/// A set of pages, a bit a page: the parts that have been taken in so far.
#[derive(Clone, PartialEq, Eq)]
pub struct PlacedPages {
    /// Bits past the last page are clear.
    words: Vec<u64>,
    pages: u64,
    count: u64,
    parts_taken: u64,
}

impl PlacedPages {
    /// No part yet of the set of a guest of `pages` pages.
    pub fn new(pages: u64) -> Self {
        let words = vec![0; pages.div_ceil(WORD_PAGES) as usize];
        Self { words, pages, count: 0, parts_taken: 0 }
    }

    /// The whole set that `runs` make up; what lies past the end is left out.
    pub fn of(pages: u64, runs: impl IntoIterator<Item = PageRun>) -> Self {
        let mut set = Self::new(pages);
        for run in runs {
            let end = run.end().min(pages);
            set_bits(&mut set.words, run.first().get().min(end), end);
        }
        set.count = count_bits(&set.words);
        set.parts_taken = parts_of(pages);
        set
    }

    /// The whole set whose bitmap has these words; bits past the last page are left out.
    pub(super) fn of_words(pages: u64, mut words: Vec<u64>) -> Self {
        words.resize(pages.div_ceil(WORD_PAGES) as usize, 0);
        if let Some(last) = words.last_mut().filter(|_| !pages.is_multiple_of(WORD_PAGES)) {
            *last &= low_bits(pages % WORD_PAGES);
        }
        let count = count_bits(&words);
        Self { words, pages, count, parts_taken: parts_of(pages) }
    }

    /// How many pages the guest has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: PageIndex) -> bool {
        let word = self.words.get((page.get() / WORD_PAGES) as usize);
        word.is_some_and(|word| word >> (page.get() % WORD_PAGES) & 1 == 1)
    }

    /// The pages of the set that are also in `other`, a bitmap of the same guest's pages, and
    /// those that are not.
    pub fn split(&self, other: &AtomicBitmap) -> (Self, Self) {
        let both = |of: fn(u64, u64) -> u64| {
            let words = self.words.iter().zip(other.loads()).map(|(mine, other)| of(*mine, other));
            Self::of_words(self.pages, words.collect())
        };
        (both(|mine, other| mine & other), both(|mine, other| mine & !other))
    }

    /// Its maximal runs in rising order.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        Runs { words: &self.words, pages: self.pages, next: 0 }
            .filter_map(|(first, end)| PageRun::new(PageIndex::new(first), end - first))
    }

    /// Sets the bits of those pages of the set whose bits `bits` has, from `first` on, a multiple
    /// of 64.
    pub fn fill(&self, first: PageIndex, bits: &mut [u64]) {
        let from = (first.get() / WORD_PAGES) as usize;
        for (bits, word) in bits.iter_mut().zip(self.words.iter().skip(from)) {
            *bits |= word;
        }
    }

    /// Takes in the parts of a message. After an error the set is of no use.
    ///
    /// # Errors
    /// Any [`PlacedError`] but `Incomplete`.
    pub fn take(&mut self, message: &[u8]) -> Result<(), PlacedError> {
        let mut rest = message;
        let part = take_number(&mut rest)?;
        let expected = self.parts_taken;
        if part != expected {
            return Err(PlacedError::OutOfOrder { part, expected });
        }
        if rest.is_empty() {
            return Err(PlacedError::Truncated);
        }
        let parts_max = (parts_of(self.pages) - expected).min(MESSAGE_PARTS_MAX);
        while !rest.is_empty() {
            if self.parts_taken == expected + parts_max {
                return Err(PlacedError::TooManyParts);
            }
            self.take_part(&mut rest)?;
        }
        Ok(())
    }

    /// Whether all parts have come.
    ///
    /// # Errors
    /// [`PlacedError::Incomplete`] if not.
    pub fn complete(&self) -> Result<(), PlacedError> {
        let (taken, parts) = (self.parts_taken, parts_of(self.pages));
        if taken == parts { Ok(()) } else { Err(PlacedError::Incomplete { taken, parts }) }
    }

    /// The words of the bitmap: the bit of page 0 is the lowest of the first.
    pub(super) fn into_words(self) -> Vec<u64> {
        self.words
    }

    /// As [`into_words`](Self::into_words).
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    fn take_part(&mut self, rest: &mut &[u8]) -> Result<(), PlacedError> {
        let part = self.parts_taken;
        let from = part as usize * PART_WORDS;
        let pages = pages_of(part, self.pages);
        let words = &mut self.words[from..][..pages.div_ceil(WORD_PAGES) as usize];
        let past_the_end = PlacedError::PastTheEnd { part, pages };
        let (&form, after) = rest.split_first().ok_or(PlacedError::Truncated)?;
        *rest = after;
        match form {
            NONE => {}
            ALL => set_bits(words, 0, pages),
            RUNS => take_runs(words, pages, rest, &past_the_end)?,
            BITS => {
                let length = bitmap_len(pages);
                let (bits, after) = rest.split_at_checked(length).ok_or(PlacedError::Truncated)?;
                *rest = after;
                for (word, bytes) in words.iter_mut().zip(bits.chunks(8)) {
                    let mut whole = [0; 8];
                    whole[..bytes.len()].copy_from_slice(bytes);
                    *word = u64::from_le_bytes(whole);
                }
                let unused = WORD_PAGES * words.len() as u64 - pages;
                if words.last().is_some_and(|word| u64::from(word.leading_zeros()) < unused) {
                    return Err(past_the_end);
                }
            }
            form => return Err(PlacedError::UnknownForm { part, form }),
        }
        if form_of(words, pages) != form {
            return Err(PlacedError::NotShortest { part });
        }
        self.count += count_bits(words);
        self.parts_taken += 1;
        Ok(())
    }
}

impl fmt::Debug for PlacedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 16;
        let mut set = f.debug_set();
        set.entries(self.runs().take(SHOWN));
        match self.runs().nth(SHOWN) {
            None => set.finish(),
            Some(_) => set.finish_non_exhaustive(),
        }
    }
}

/// The messages that tell a set: the sender's side.
#[derive(Debug)]
pub struct PlacedMessages {
    pages: u64,
    next: u64,
}

impl PlacedMessages {
    /// Of a guest of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self { pages, next: 0 }
    }

    /// Whether every message has been made.
    pub fn is_done(&self) -> bool {
        self.next == parts_of(self.pages)
    }

    /// The next message, of at most `parts_max` parts (1 to [`MESSAGE_PARTS_MAX`]);
    /// `None` after the last one. For each part `placed` is given its first page and
    /// clear words, and sets the bits of the pages that are placed; those past the
    /// last page are ignored.
    pub fn next(
        &mut self,
        parts_max: u64,
        mut placed: impl FnMut(PageIndex, &mut [u64]),
    ) -> Option<Vec<u8>> {
        let end = parts_of(self.pages).min(self.next + parts_max.clamp(1, MESSAGE_PARTS_MAX));
        if self.next == end {
            return None;
        }
        let mut message = Vec::new();
        put_number(&mut message, self.next);
        for part in self.next..end {
            let pages = pages_of(part, self.pages);
            let mut words = [0; PART_WORDS];
            let words = &mut words[..pages.div_ceil(WORD_PAGES) as usize];
            placed(PageIndex::new(part * PART_PAGES), words);
            if let (Some(word), 1..) = (words.last_mut(), pages % WORD_PAGES) {
                *word &= u64::MAX >> (WORD_PAGES - pages % WORD_PAGES);
            }
            put_part(words, pages, &mut message);
        }
        self.next = end;
        Some(message)
    }
}

fn parts_of(pages: u64) -> u64 {
    pages.div_ceil(PART_PAGES)
}

/// How many pages the part has in a guest of `pages`.
fn pages_of(part: u64, pages: u64) -> u64 {
    (pages - part * PART_PAGES).min(PART_PAGES)
}

fn bitmap_len(pages: u64) -> usize {
    pages.div_ceil(8) as usize
}

fn count_bits(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The form that a part is written in.
fn form_of(words: &[u64], pages: u64) -> u8 {
    let count = count_bits(words);
    if count == 0 {
        return NONE;
    }
    if count == pages {
        return ALL;
    }
    // A run begins where a bit is set and the one before it is not. It takes two bytes
    // at least, so most bitmaps are known for such without a look at each run.
    let mut before = 0;
    let runs = words.iter().map(|word| {
        let begins = word & !(word << 1 | before);
        before = word >> (WORD_PAGES - 1);
        u64::from(begins.count_ones())
    });
    let runs: u64 = runs.sum();
    let bitmap = bitmap_len(pages);
    if number_len(runs) + 2 * runs as usize >= bitmap {
        return BITS;
    }
    let mut after = 0;
    let mut bytes = number_len(runs);
    for (first, end) in (Runs { words, pages, next: 0 }) {
        bytes += number_len(first - after) + number_len(end - first - 1);
        after = end + 1;
    }
    if bytes < bitmap { RUNS } else { BITS }
}

fn put_part(words: &[u64], pages: u64, out: &mut Vec<u8>) {
    let form = form_of(words, pages);
    out.push(form);
    match form {
        RUNS => {
            let runs = || Runs { words, pages, next: 0 };
            put_number(out, runs().count() as u64);
            let mut after = 0;
            for (first, end) in runs() {
                put_number(out, first - after);
                put_number(out, end - first - 1);
                after = end + 1;
            }
        }
        BITS => {
            let length = out.len() + bitmap_len(pages);
            words.iter().for_each(|word| out.extend(word.to_le_bytes()));
            out.truncate(length);
        }
        _ => {}
    }
}

fn take_runs(
    words: &mut [u64],
    pages: u64,
    rest: &mut &[u8],
    past_the_end: &PlacedError,
) -> Result<(), PlacedError> {
    let runs = take_number(rest)?;
    let mut after = 0u64;
    for _ in 0..runs {
        let first = after.checked_add(take_number(rest)?);
        let count = take_number(rest)?;
        let end = first.and_then(|first| first.checked_add(count)?.checked_add(1));
        let (Some(first), Some(end)) = (first, end.filter(|end| *end <= pages)) else {
            return Err(past_the_end.clone());
        };
        set_bits(words, first, end);
        after = end + 1;
    }
    Ok(())
}

/// Sets the bits from `first` to `end`, which `words` have.
fn set_bits(words: &mut [u64], first: u64, end: u64) {
    let mut next = first;
    while next < end {
        let offset = next % WORD_PAGES;
        let count = (WORD_PAGES - offset).min(end - next);
        words[(next / WORD_PAGES) as usize] |= (u64::MAX >> (WORD_PAGES - count)) << offset;
        next += count;
    }
}

/// The maximal stretches of set bits, each with the number after its last.
struct Runs<'a> {
    words: &'a [u64],
    pages: u64,
    next: u64,
}

impl Runs<'_> {
    /// The first bit at or after `next` that is set, once the bits are flipped by
    /// `flip`; `pages` if there is none.
    fn next_bit(&self, flip: u64) -> u64 {
        let mut base = self.next - self.next % WORD_PAGES;
        let mut within = u64::MAX << (self.next % WORD_PAGES);
        while base < self.pages {
            let word = (self.words[(base / WORD_PAGES) as usize] ^ flip) & within;
            if word != 0 {
                return (base + u64::from(word.trailing_zeros())).min(self.pages);
            }
            base += WORD_PAGES;
            within = u64::MAX;
        }
        self.pages
    }
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let first = self.next_bit(0);
        self.next = first;
        if first == self.pages {
            return None;
        }
        self.next = self.next_bit(u64::MAX);
        Some((first, self.next))
    }
}

fn number_len(number: u64) -> usize {
    (u64::BITS - (number | 1).leading_zeros()).div_ceil(7) as usize
}

fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_number(rest: &mut &[u8]) -> Result<u64, PlacedError> {
    let mut number = 0u64;
    for place in 0..10 {
        let Some((&byte, after)) = rest.split_first() else {
            return Err(PlacedError::Truncated);
        };
        *rest = after;
        let bits = u64::from(byte & 0x7f);
        // The tenth byte holds the 64th bit and nothing else.
        if place == 9 && bits > 1 {
            return Err(PlacedError::BadNumber);
        }
        number |= bits << (7 * place);
        if byte & 0x80 == 0 {
            let padded = place > 0 && byte == 0;
            return if padded { Err(PlacedError::BadNumber) } else { Ok(number) };
        }
    }
    Err(PlacedError::BadNumber)
}

#[cfg(all(test, not(loom)))]
mod tests;
