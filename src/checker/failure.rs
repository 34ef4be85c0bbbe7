//! [`CheckFailure`]: what is wrong with a guest's memory, in words for its reader.

use super::diagnosis::{GuessCounts, WrongPage};
use std::fmt;

/// Why a guest's memory is not accepted.
#[derive(Debug)]
pub enum CheckFailure {
    /// The parameters fit no guest.
    Params(String),
    /// The memory cannot be read.
    Read {
        /// The first page of the read that failed.
        page: u64,
        /// The cause.
        source: std::io::Error,
    },
    /// The memory ends before its last page.
    TooShort {
        /// The first page that is missing in part or altogether, or a little before it.
        page: u64,
        /// How many there must be.
        pages: u64,
    },
    /// Something follows the last page.
    TooLong {
        /// How many there must be.
        pages: u64,
    },
    /// A vCPU did not end as it must. The content was compared all the same, as far as
    /// that is possible.
    Vcpu {
        /// The first vCPU with a problem.
        vcpu: u32,
        /// Its problem.
        problem: VcpuProblem,
        /// What is wrong beside.
        content: Option<Box<ContentFailure>>,
    },
    /// Pages have the wrong content.
    Content(Box<ContentFailure>),
}

/// How a vCPU ended, if not well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuProblem {
    /// It found a wrong word itself.
    SelfCheck {
        /// Steps before.
        step: u64,
        /// The page.
        page: u64,
        /// The word that the vCPU wanted.
        expected: u64,
        /// The word that it found.
        found: u64,
    },
    /// It is not finished, so that it may be in the middle of a step.
    NotFinished {
        /// Its status word.
        status: u64,
        /// Its steps.
        steps: u64,
    },
    /// It has made other steps than it is known to have made.
    Steps {
        /// Known from elsewhere.
        expected: u64,
        /// In its control page.
        found: u64,
    },
    /// It tells of more steps than can be replayed.
    TooManySteps {
        /// How many.
        steps: u64,
    },
}

/// Pages with the wrong content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentFailure {
    /// The first of them.
    pub first: WrongPage,
    /// How many there are.
    pub wrong_pages: u64,
    /// How many of them were guessed to be what.
    pub guesses: GuessCounts,
}

impl CheckFailure {
    /// The wrong pages, if any were found.
    pub fn content(&self) -> Option<&ContentFailure> {
        match self {
            CheckFailure::Vcpu { content, .. } => content.as_deref(),
            CheckFailure::Content(content) => Some(content),
            _ => None,
        }
    }
}

impl fmt::Display for CheckFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CheckFailure::Params(text) => write!(f, "no guest is like this: {text}"),
            CheckFailure::Read { page, .. } => write!(f, "cannot read memory from page {page} on"),
            CheckFailure::TooShort { page, pages } => {
                write!(
                    f,
                    "the memory ends at page {page} or soon after; it must have {pages} pages"
                )
            }
            CheckFailure::TooLong { pages } => {
                write!(f, "the memory goes on after its {pages} pages")
            }
            CheckFailure::Vcpu { vcpu, problem, content } => {
                write!(f, "vCPU {vcpu} {problem}")?;
                content.as_ref().map_or(Ok(()), |content| write!(f, "; and {content}"))
            }
            CheckFailure::Content(content) => content.fmt(f),
        }
    }
}

impl std::error::Error for CheckFailure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            CheckFailure::Read { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl fmt::Display for VcpuProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VcpuProblem::SelfCheck { step, page, expected, found } => write!(
                f,
                "found {found:#018x} for {expected:#018x} in page {page} itself, in step {step}"
            ),
            VcpuProblem::NotFinished { status, steps } => {
                write!(f, "is not finished: its status is {status} after {steps} steps")
            }
            VcpuProblem::Steps { expected, found } => {
                write!(f, "tells of {found} steps; it has made {expected}")
            }
            VcpuProblem::TooManySteps { steps } => {
                write!(f, "tells of {steps} steps, too many to replay")
            }
        }
    }
}

impl fmt::Display for ContentFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, wrong_pages, guesses } = self;
        write!(f, "{wrong_pages} pages are wrong ({guesses}); the first is {first}")
    }
}
