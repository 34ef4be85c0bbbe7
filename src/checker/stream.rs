//! The stream of pages: reading it, and comparing the arena and the tail as they go by.

use super::diagnosis::Findings;
use super::failure::CheckFailure;
use super::model::{Model, PAGE_BYTES, Page, Place};
use super::parallel::on_threads;
use super::replay::Replay;
use std::io::{ErrorKind, Read};

/// Pages read and compared at a time: 8 MiB.
const BATCH_PAGES: u64 = 2048;

/// A reader of pages in page order.
#[derive(Debug)]
pub(super) struct Pages<R> {
    reader: R,
    pages: u64,
    next: u64,
}

impl<R: Read> Pages<R> {
    pub(super) fn new(reader: R, pages: u64) -> Self {
        Self { reader, pages, next: 0 }
    }

    /// Reads the next pages, as many as `into` has room for.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<(), CheckFailure> {
        let page = self.next;
        self.next += (into.len() / PAGE_BYTES) as u64;
        self.reader.read_exact(into).map_err(|source| match source.kind() {
            ErrorKind::UnexpectedEof => CheckFailure::TooShort { page, pages: self.pages },
            _ => CheckFailure::Read { page, source },
        })
    }

    /// Makes sure that the last page was read.
    pub(super) fn expect_end(&mut self) -> Result<(), CheckFailure> {
        match self.reader.read_exact(&mut [0]) {
            Ok(()) => Err(CheckFailure::TooLong { pages: self.pages }),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(()),
            Err(source) => Err(CheckFailure::Read { page: self.next, source }),
        }
    }
}

/// The words of a page's bytes.
pub(super) fn words(bytes: &[u8]) -> Page {
    let mut words = [0; _];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    words
}

/// Reads and compares all pages after the system pages.
pub(super) fn compare_arena_and_tail<R: Read>(
    model: &Model,
    replay: &Replay,
    stream: &mut Pages<R>,
    findings: &mut Findings,
) -> Result<(), CheckFailure> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let mut buffer = vec![0; BATCH_PAGES as usize * PAGE_BYTES];
    let mut first = model.arena;
    while first < model.params.pages {
        let count = BATCH_PAGES.min(model.params.pages - first);
        let batch = &mut buffer[..count as usize * PAGE_BYTES];
        stream.read(batch)?;
        let share = count.div_ceil(threads);
        let parts =
            (first..).step_by(share as usize).zip(batch.chunks(share as usize * PAGE_BYTES));
        let found =
            on_threads(parts.collect(), |(first, part)| compare(model, replay, first, part));
        found.into_iter().for_each(|later| findings.append(later));
        first += count;
    }
    Ok(())
}

fn compare(model: &Model, replay: &Replay, first: u64, bytes: &[u8]) -> Findings {
    let mut findings = Findings::default();
    for (page, bytes) in (first..).zip(bytes.chunks_exact(PAGE_BYTES)) {
        let found = words(bytes);
        match model.place(page) {
            Place::Tail => findings.compare_zero(model, page, &found),
            _ => {
                let visits = replay.visits[(page - model.arena) as usize];
                findings.compare(model, page, visits, &found);
            }
        }
    }
    findings
}
