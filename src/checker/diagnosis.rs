//! What is wrong with a wrong page, and the tally of all findings.
//!
//! A guess names what the content looks like; it is meant for whoever looks for the
//! fault and is no part of the verdict.

use super::CheckSummary;
use super::failure::{CheckFailure, ContentFailure, VcpuProblem};
use super::model::{Model, Page, Place, WORDS};
use super::replay::Replay;
use std::fmt;

/// A page with the wrong content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongPage {
    /// The page.
    pub page: u64,
    /// Its first wrong word.
    pub word: usize,
    /// What that word must be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
    /// How many of its words are wrong.
    pub wrong_words: usize,
    /// What may have happened to it.
    pub guess: Guess,
}

/// What a wrong page's content looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guess {
    /// All zero: never placed.
    Lost,
    /// As it was at an earlier time: later writes are lost.
    Stale {
        /// The visits (of a control page: steps) that it shows.
        visits: u64,
        /// Those that it must show.
        expected: u64,
    },
    /// Whole, but visited more often than the steps tell: visits were repeated, or the
    /// step counter is stale.
    Ahead {
        /// The visits that it shows.
        visits: u64,
        /// Those that it must show.
        expected: u64,
    },
    /// Another page's content.
    Misplaced {
        /// That page.
        belongs_to: u64,
    },
    /// Zero in part: placed in part.
    PartlyLost,
    /// Anything else.
    Damaged,
}

/// How many wrong pages were guessed to be what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuessCounts {
    /// [`Guess::Lost`].
    pub lost: u64,
    /// [`Guess::Stale`].
    pub stale: u64,
    /// [`Guess::Ahead`].
    pub ahead: u64,
    /// [`Guess::Misplaced`].
    pub misplaced: u64,
    /// [`Guess::PartlyLost`].
    pub partly_lost: u64,
    /// [`Guess::Damaged`].
    pub damaged: u64,
}

/// What was found so far.
#[derive(Debug, Default)]
pub(super) struct Findings {
    compared: u64,
    unmodelled: u64,
    zero: u64,
    wrong: u64,
    first: Option<WrongPage>,
    guesses: GuessCounts,
}

impl Findings {
    /// A page that cannot be foretold.
    pub(super) fn unmodelled(&mut self) {
        self.unmodelled += 1;
    }

    /// Compares `found`, the content of `page`, with what it holds after `visits`.
    pub(super) fn compare(&mut self, model: &Model, page: u64, visits: u64, found: &Page) {
        let mut expected = [0; WORDS];
        model.expected(page, visits, &mut expected);
        self.judge(model, page, visits, &expected, found);
    }

    /// Compares a tail page, quickly.
    pub(super) fn compare_zero(&mut self, model: &Model, page: u64, found: &Page) {
        self.zero += u64::from(found.iter().fold(0, |all, word| all | word) == 0);
        self.judge(model, page, 0, &[0; WORDS], found);
    }

    /// Compares a page with its expected content; `age` is its visits or steps.
    pub(super) fn judge(
        &mut self,
        model: &Model,
        page: u64,
        age: u64,
        expected: &Page,
        found: &Page,
    ) {
        self.compared += 1;
        if expected == found {
            return;
        }
        let wrong = diagnose(model, page, age, expected, found);
        self.wrong += 1;
        self.guesses.add(wrong.guess);
        self.first.get_or_insert(wrong);
    }

    /// Adds what was found in the pages after these.
    pub(super) fn append(&mut self, later: Findings) {
        self.compared += later.compared;
        self.unmodelled += later.unmodelled;
        self.zero += later.zero;
        self.wrong += later.wrong;
        self.guesses.append(later.guesses);
        self.first = self.first.take().or(later.first);
    }

    /// The verdict.
    pub(super) fn conclude(
        self,
        problem: Option<(u32, VcpuProblem)>,
        replay: &Replay,
    ) -> Result<CheckSummary, CheckFailure> {
        let Self { compared, unmodelled, zero, wrong, first, guesses } = self;
        let content =
            first.map(|first| Box::new(ContentFailure { first, wrong_pages: wrong, guesses }));
        match (problem, content) {
            (Some((vcpu, problem)), content) => Err(CheckFailure::Vcpu { vcpu, problem, content }),
            (None, Some(content)) => Err(CheckFailure::Content(content)),
            (None, None) => Ok(CheckSummary {
                pages_compared: compared,
                pages_unmodelled: unmodelled,
                zero_pages: zero,
                steps: replay.steps.clone(),
                visits: replay.visits.iter().sum(),
            }),
        }
    }
}

fn diagnose(model: &Model, page: u64, age: u64, expected: &Page, found: &Page) -> WrongPage {
    let differs = |word: &usize| expected[*word] != found[*word];
    let wrong: Vec<usize> = (0..WORDS).filter(differs).collect();
    // The caller has seen a difference.
    let word = wrong.first().copied().unwrap_or(0);
    let guess = if found.iter().all(|&word| word == 0) {
        Guess::Lost
    } else if let Some(belongs_to) = owner(model, found).filter(|&owner| owner != page) {
        Guess::Misplaced { belongs_to }
    } else if let Some(shown) = age_shown(model, page, found, &wrong) {
        if shown < age {
            Guess::Stale { visits: shown, expected: age }
        } else {
            Guess::Ahead { visits: shown, expected: age }
        }
    } else if wrong.len() >= 8 && wrong.iter().all(|&word| found[word] == 0) {
        Guess::PartlyLost
    } else {
        Guess::Damaged
    };
    let (expected, found) = (expected[word], found[word]);
    WrongPage { page, word, expected, found, wrong_words: wrong.len(), guess }
}

/// The page whose content this is, at any age.
fn owner(model: &Model, found: &Page) -> Option<u64> {
    let control = |vcpu: &u32| {
        found[super::system::MAGIC_WORD] == super::system::MAGIC
            && found[super::system::VSEED_WORD] == model.vseed(*vcpu)
    };
    if let Some(vcpu) = model.vcpus().find(control) {
        return Some(16 + 2 * u64::from(vcpu));
    }
    let owner = model.page_of_tag(found[0])?;
    is_page(model, owner, found).then_some(owner)
}

/// Whether this is `page` at the age that it shows.
fn is_page(model: &Model, page: u64, found: &Page) -> bool {
    let mut expected = [0; WORDS];
    model.expected(page, found[1], &mut expected);
    let visited = matches!(model.place(page), Place::Arena(..));
    (visited || found[1] == 0) && expected == *found
}

/// The visits or steps that a page whole in itself shows.
fn age_shown(model: &Model, page: u64, found: &Page, wrong: &[usize]) -> Option<u64> {
    match model.place(page) {
        Place::Arena(..) => is_page(model, page, found).then_some(found[1]),
        Place::Control(_) => {
            let moving = wrong.iter().all(|word| super::system::MOVING_WORDS.contains(word));
            let counter = super::system::STEPS_WORD;
            (moving && wrong.contains(&counter)).then_some(found[counter])
        }
        _ => None,
    }
}

impl GuessCounts {
    fn add(&mut self, guess: Guess) {
        *match guess {
            Guess::Lost => &mut self.lost,
            Guess::Stale { .. } => &mut self.stale,
            Guess::Ahead { .. } => &mut self.ahead,
            Guess::Misplaced { .. } => &mut self.misplaced,
            Guess::PartlyLost => &mut self.partly_lost,
            Guess::Damaged => &mut self.damaged,
        } += 1;
    }

    fn append(&mut self, other: Self) {
        self.lost += other.lost;
        self.stale += other.stale;
        self.ahead += other.ahead;
        self.misplaced += other.misplaced;
        self.partly_lost += other.partly_lost;
        self.damaged += other.damaged;
    }
}

impl fmt::Display for WrongPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { page, word, expected, found, wrong_words, guess } = self;
        write!(f, "page {page}: word {word} is {found:#018x}, not {expected:#018x}; ")?;
        write!(f, "{wrong_words} of its words are wrong; {guess}")
    }
}

impl fmt::Display for Guess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Guess::Lost => write!(f, "lost: it is all zero"),
            Guess::Stale { visits, expected } => {
                write!(f, "stale: it is as it was at {visits}, {} earlier", expected - visits)
            }
            Guess::Ahead { visits, expected } => {
                write!(f, "ahead: it shows {visits} visits where the steps tell of {expected}")
            }
            Guess::Misplaced { belongs_to } => {
                write!(f, "misplaced: the content is that of page {belongs_to}")
            }
            Guess::PartlyLost => write!(f, "lost in part: all its wrong words are zero"),
            Guess::Damaged => write!(f, "damaged"),
        }
    }
}

impl fmt::Display for GuessCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lost, stale, ahead, misplaced, partly_lost, damaged } = self;
        write!(f, "{lost} lost, {stale} stale, {ahead} ahead, {misplaced} misplaced, ")?;
        write!(f, "{partly_lost} lost in part, {damaged} damaged")
    }
}
