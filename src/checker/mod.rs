//! The independent checker: says whether a reference guest's memory is exactly what
//! its steps must have left behind.
//!
//! It shares no code with the guests nor with the engine that moves them: what it
//! knows of them it has from the text of `vmm::workload`, and it computes all of it
//! anew. It imports nothing of this crate.
//!
//! The memory comes as a stream of pages in page order. The system pages come first;
//! in them each vCPU tells how many steps it has made. From that follow the visits to
//! every arena page (`replay`), and so every word of it, which are compared as the
//! stream goes by (`model`). What is wrong with a wrong page is guessed by
//! `diagnosis`.

mod diagnosis;
mod failure;
mod machine;
mod model;
mod parallel;
mod replay;
mod stream;
mod system;

pub use diagnosis::{Guess, GuessCounts, WrongPage};
pub use failure::{CheckFailure, ContentFailure, VcpuProblem};
pub use machine::CheckMachine;

use model::Model;
use serde::{Deserialize, Serialize};
use std::io::Read;
use system::System;

/// An access pattern; the words are those of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckPattern {
    /// Pattern 0.
    Sequential,
    /// Pattern 1.
    Strided,
    /// Pattern 2.
    Random,
    /// Pattern 3.
    Zipf,
    /// Pattern 4.
    HotSetWithScan,
    /// Pattern 5.
    PointerChase,
    /// Pattern 6.
    ReadModifyWrite,
    /// Pattern 7: the pages of [`CheckParams::touches`].
    Trace,
}

impl std::str::FromStr for CheckPattern {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Ok(match name {
            "sequential" => Self::Sequential,
            "strided" => Self::Strided,
            "random" => Self::Random,
            "zipf" => Self::Zipf,
            "hot-set-with-scan" => Self::HotSetWithScan,
            "pointer-chase" => Self::PointerChase,
            "read-modify-write" => Self::ReadModifyWrite,
            "trace" => Self::Trace,
            _ => return Err(format!("there is no access pattern {name:?}")),
        })
    }
}

/// What the guest was told to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckParams {
    /// Pages of guest memory.
    pub pages: u64,
    /// vCPUs, 1 to 4.
    pub vcpus: u32,
    /// The workload's seed.
    pub seed: u64,
    /// The workload's pattern.
    pub pattern: CheckPattern,
    /// The pages that each vCPU touches, in order, if the pattern is a trace.
    pub touches: Vec<Vec<u64>>,
    /// Pages of the zero tail.
    pub zero_pages: u64,
    /// The machine, if it was the KVM guest: it has its own tables, stacks, clocks and
    /// program in guest memory.
    pub kvm: Option<CheckMachine>,
    /// Steps of each vCPU as told by another source than the memory (registers, the
    /// VMM's status). Without it a damaged step counter may go unnoticed if the steps
    /// in between write nothing.
    pub expect_steps: Option<Vec<u64>>,
}

/// What was found in a guest whose memory is right.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckSummary {
    /// Pages of which every word that the specification lays down was compared.
    pub pages_compared: u64,
    /// Pages of the KVM guest's program, of which nothing is known.
    pub pages_unmodelled: u64,
    /// How many of the pages compared had to be zero, and are.
    pub zero_pages: u64,
    /// Steps of each vCPU.
    pub steps: Vec<u64>,
    /// Visits that wrote, of all vCPUs.
    pub visits: u64,
}

/// Compares the guest memory that `memory` yields, page after page from page 0 and
/// nothing else, with what a guest with `params` must have left behind when it
/// finished.
///
/// Needs 8 bytes a page and, for patterns that are not periodic, time in proportion
/// to the steps: some 10^9 in a few seconds.
pub fn check(params: &CheckParams, memory: impl Read) -> Result<CheckSummary, CheckFailure> {
    let model = Model::new(params)?;
    let mut stream = stream::Pages::new(memory, params.pages);
    let system = System::read(&mut stream, model.arena)?;
    let told = system.told(&model)?;
    let replay = replay::replay(&model, told.steps, &told.trace_starts);
    let mut findings = diagnosis::Findings::default();
    system.compare(&model, &replay, &mut findings);
    stream::compare_arena_and_tail(&model, &replay, &mut stream, &mut findings)?;
    stream.expect_end()?;
    findings.conclude(told.problem, &replay)
}

#[cfg(test)]
mod tests;
