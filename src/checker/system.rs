//! The system pages: control pages, histograms, filler, and the KVM guest's own.

use super::CheckPattern;
use super::diagnosis::Findings;
use super::failure::{CheckFailure, VcpuProblem};
use super::machine;
use super::model::{Model, PAGE_BYTES, Page, Place, WORDS};
use super::replay::Replay;
use super::stream::{Pages, words};
use std::io::Read;

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"postcopy");
pub(super) const MAGIC_WORD: usize = 0;
pub(super) const STEPS_WORD: usize = 1;
pub(super) const VSEED_WORD: usize = 3;
/// Words that change with each step: steps, cursor and lane.
pub(super) const MOVING_WORDS: [usize; 3] = [STEPS_WORD, CURSOR_WORD, 18];

const STATUS_WORD: usize = 13;
const FAILED_WORDS: [usize; 3] = [14, 15, 16];
const CURSOR_WORD: usize = 17;
const INSTRUMENT_STEP_WORD: usize = 22;
const STALLS_WORD: usize = 25;
const STALL_SUM_WORD: usize = 26;
const TICKS_WORD: usize = 27;
const TRACE_START_WORD: usize = 28;
/// Think time, step limit, stop request; stall threshold, instrument request and seen;
/// largest gap, last end: whatever the VMM and the clock made of them.
const FREE_WORDS: [usize; 8] = [10, 11, 12, 19, 20, 21, 23, 24];

/// Buckets that no duration falls into.
const NO_BUCKETS: std::ops::Range<usize> = 8..24;

const FINISHED: u64 = 1;
const FAILED: u64 = 2;

/// The most steps of a vCPU that are replayed: some minutes' work.
const STEPS_MAX: u64 = 1 << 36;

/// The system pages as they were read.
#[derive(Debug)]
pub(super) struct System {
    pages: Vec<Page>,
}

/// What the vCPUs tell of themselves.
#[derive(Debug)]
pub(super) struct Told {
    /// Steps of each, as known from elsewhere or else as told.
    pub(super) steps: Vec<u64>,
    /// With which step each began its trace anew.
    pub(super) trace_starts: Vec<u64>,
    /// The first one that did not end well.
    pub(super) problem: Option<(u32, VcpuProblem)>,
}

impl System {
    /// Reads all before the arena.
    pub(super) fn read<R: Read>(stream: &mut Pages<R>, arena: u64) -> Result<Self, CheckFailure> {
        let mut bytes = vec![0; arena as usize * PAGE_BYTES];
        stream.read(&mut bytes)?;
        Ok(Self { pages: bytes.chunks_exact(PAGE_BYTES).map(words).collect() })
    }

    fn control(&self, vcpu: u32) -> &Page {
        &self.pages[16 + 2 * vcpu as usize]
    }

    fn histogram(&self, vcpu: u32) -> &Page {
        &self.pages[17 + 2 * vcpu as usize]
    }

    /// How many steps each vCPU made, and whether it ended well.
    pub(super) fn told(&self, model: &Model) -> Result<Told, CheckFailure> {
        let mut told = Told { steps: Vec::new(), trace_starts: Vec::new(), problem: None };
        for vcpu in model.vcpus() {
            let control = self.control(vcpu);
            let found = control[STEPS_WORD];
            let known = model.params.expect_steps.as_ref().map(|steps| steps[vcpu as usize]);
            let steps = known.unwrap_or(found);
            told.steps.push(steps);
            told.trace_starts.push(control[TRACE_START_WORD]);
            if steps > STEPS_MAX {
                let problem = VcpuProblem::TooManySteps { steps };
                return Err(CheckFailure::Vcpu { vcpu, problem, content: None });
            }
            let [page, expected, wrong] = FAILED_WORDS.map(|word| control[word]);
            let problem = match control[STATUS_WORD] {
                FAILED => {
                    Some(VcpuProblem::SelfCheck { step: found, page, expected, found: wrong })
                }
                FINISHED => known
                    .filter(|&known| known != found)
                    .map(|expected| VcpuProblem::Steps { expected, found }),
                status => Some(VcpuProblem::NotFinished { status, steps: found }),
            };
            told.problem = told.problem.or(problem.map(|problem| (vcpu, problem)));
        }
        Ok(told)
    }

    /// Compares all of them.
    pub(super) fn compare(&self, model: &Model, replay: &Replay, findings: &mut Findings) {
        for (page, found) in (0..).zip(&self.pages) {
            match model.place(page) {
                Place::Control(vcpu) => {
                    let expected = self.expected_control(model, replay, vcpu);
                    let steps = replay.steps[vcpu as usize];
                    findings.judge(model, page, steps, &expected, found);
                }
                Place::Histogram(_) => {
                    let mut expected = *found;
                    expected[NO_BUCKETS].fill(0);
                    findings.judge(model, page, 0, &expected, found);
                }
                Place::Table => findings.judge(model, page, 0, &model.table(page), found),
                Place::Gates => findings.judge(model, page, 0, &machine::gates(found), found),
                Place::Processor(vcpu) => {
                    let expected = machine::descriptors(vcpu, found);
                    findings.judge(model, page, 0, &expected, found);
                }
                Place::Clock(_) => findings.judge(model, page, 0, &machine::clock(found), found),
                // What still has a tag is no program, and is filler, maybe another page's.
                Place::Program if model.page_of_tag(found[0]).is_none() => findings.unmodelled(),
                _ => findings.compare(model, page, 0, found),
            }
        }
    }

    /// A vCPU's control page. Words that cannot be foretold are taken as they are, if
    /// they agree with what they depend on.
    fn expected_control(&self, model: &Model, replay: &Replay, vcpu: u32) -> Page {
        let found = self.control(vcpu);
        let steps = replay.steps[vcpu as usize];
        let (cursor, lane) = replay.cursors[vcpu as usize];
        let mut words = [0; WORDS];
        let known = [
            MAGIC,
            steps,
            model.params.seed,
            model.vseed(vcpu),
            model.params.pattern as u64,
            model.slice_first(vcpu),
            model.slice,
            model.tail(),
            model.params.zero_pages,
            model.write_every() - 1,
        ];
        words[..known.len()].copy_from_slice(&known);
        words[STATUS_WORD] = FINISHED;
        (words[MOVING_WORDS[1]], words[MOVING_WORDS[2]]) = (cursor, lane);
        for free in FREE_WORDS {
            words[free] = found[free];
        }
        words[INSTRUMENT_STEP_WORD] = found[INSTRUMENT_STEP_WORD].min(steps);
        let stalls = Stalls::of(self.histogram(vcpu));
        words[STALLS_WORD] = stalls.count;
        words[STALL_SUM_WORD] = found[STALL_SUM_WORD].clamp(stalls.sum_min, stalls.sum_max);
        let traced = model.params.pattern == CheckPattern::Trace;
        words[TRACE_START_WORD] = if traced { found[TRACE_START_WORD].min(steps) } else { 0 };
        words[TICKS_WORD] = if model.params.kvm.is_some() { found[TICKS_WORD] } else { 0 };
        words
    }
}

/// What a histogram says of the counters beside it.
struct Stalls {
    count: u64,
    sum_min: u64,
    sum_max: u64,
}

impl Stalls {
    fn of(histogram: &Page) -> Self {
        let mut stalls = Self { count: 0, sum_min: 0, sum_max: 0 };
        for (bucket, &count) in histogram.iter().enumerate() {
            if count == 0 || NO_BUCKETS.contains(&bucket) {
                continue;
            }
            let (least, most) = bucket_range(bucket as u64);
            stalls.count = stalls.count.wrapping_add(count);
            stalls.sum_min = stalls.sum_min.saturating_add(least.saturating_mul(count));
            stalls.sum_max = stalls.sum_max.saturating_add(most.saturating_mul(count));
        }
        stalls
    }
}

/// The least and the most ticks that fall into a bucket: eight of them an octave,
/// and one for each number below 8.
fn bucket_range(bucket: u64) -> (u64, u64) {
    if bucket < 8 {
        return (bucket, bucket);
    }
    let exponent = (bucket / 8).max(3);
    let width = 1u64 << (exponent - 3);
    let least = (8 + bucket % 8) * width;
    (least, least + (width - 1))
}
