//! [`replay`]: from the steps of each vCPU to the visits that wrote, a page.
//!
//! Sequential, strided and pointer-chase steps go round all `n` pages of the slice in
//! one fixed order, so that their counts follow without making a step; the others
//! are made one by one, those that write only.

use super::CheckPattern;
use super::model::{Model, mulhi};
use super::parallel::on_threads;

/// Lanes of the strided pattern, and its stride.
const STRIDE: u64 = 16;

/// What the steps leave behind.
#[derive(Debug)]
pub(super) struct Replay {
    /// Steps of each vCPU.
    pub(super) steps: Vec<u64>,
    /// Visits that wrote to each arena page, those after the last slice included.
    pub(super) visits: Vec<u64>,
    /// Cursor and lane of each vCPU.
    pub(super) cursors: Vec<(u64, u64)>,
}

/// Replays `steps[v]` steps of each vCPU `v`, on a thread each if there are as many.
/// `trace_starts` are the steps with which a trace was begun anew.
pub(super) fn replay(model: &Model, steps: Vec<u64>, trace_starts: &[u64]) -> Replay {
    let mut visits = vec![0; (model.tail() - model.arena) as usize];
    let slices = visits.chunks_exact_mut(model.slice as usize);
    let work = slices.zip(model.vcpus().zip(&steps)).collect();
    let cursors = on_threads(work, |(visits, (vcpu, &steps))| one(model, vcpu, steps, visits));
    trace(model, &steps, trace_starts, &mut visits);
    Replay { steps, visits, cursors }
}

/// Replays one vCPU; gives its cursor and lane.
fn one(model: &Model, vcpu: u32, steps: u64, visits: &mut [u64]) -> (u64, u64) {
    let (n, every) = (model.slice, model.write_every());
    let vseed = model.vseed(vcpu);
    match model.params.pattern {
        CheckPattern::Sequential => round(0..n, steps, every, visits),
        CheckPattern::Strided => {
            let order = (0..STRIDE).flat_map(|lane| (lane..n).step_by(STRIDE as usize));
            let (cursor, _) = round(order, steps, every, visits);
            (cursor, cursor % STRIDE)
        }
        CheckPattern::PointerChase => {
            let order = std::iter::successors(Some(0), |&k| Some(model.chase(vcpu, k)));
            round(order.take(n as usize), steps, every, visits)
        }
        CheckPattern::Random | CheckPattern::ReadModifyWrite => {
            for s in (0..steps).step_by(every as usize) {
                visits[mulhi(Model::draw(vseed, s), n) as usize] += 1;
            }
            (0, 0)
        }
        CheckPattern::Zipf => {
            zipf(vseed, n, steps, every, visits);
            (0, 0)
        }
        CheckPattern::HotSetWithScan => {
            let hot = (n / 16).max(1);
            // A scanning step is the last of eight and so never one that writes.
            for s in (0..steps).step_by(every as usize) {
                visits[mulhi(Model::draw(vseed, s), hot) as usize] += 1;
            }
            (steps / 8 % n, 0)
        }
        // It may leave its slice.
        CheckPattern::Trace => (0, 0),
    }
}

/// Replays the touches of a trace, if there are any, wherever in the arena they are.
fn trace(model: &Model, steps: &[u64], starts: &[u64], visits: &mut [u64]) {
    for ((&steps, &start), touches) in steps.iter().zip(starts).zip(&model.params.touches) {
        for s in (0..steps).step_by(model.write_every() as usize) {
            let since = if s < start { s } else { s - start };
            let page = touches[(since % touches.len() as u64) as usize];
            visits[(page - model.arena) as usize] += 1;
        }
    }
}

/// Counts by rank first, and only then looks up which page has which rank.
fn zipf(vseed: u64, n: u64, steps: u64, every: u64, visits: &mut [u64]) {
    let mut by_rank = vec![0u64; n as usize];
    for s in (0..steps).step_by(every as usize) {
        let mut u = Model::draw(vseed, s) >> 32;
        u = (u * u) >> 32;
        u = (u * u) >> 32;
        by_rank[((u * n) >> 32) as usize] += 1;
    }
    for (rank, count) in by_rank.into_iter().enumerate() {
        visits[mulhi(Model::draw(vseed, rank as u64), n) as usize] += count;
    }
}

/// Steps that go round `order`, a permutation of the slice, from its beginning.
fn round(
    order: impl Iterator<Item = u64>,
    steps: u64,
    every: u64,
    visits: &mut [u64],
) -> (u64, u64) {
    let n = visits.len() as u64;
    let mut cursor = 0;
    for (position, k) in (0..n).zip(order) {
        visits[k as usize] = writes_at(position, n, steps, every);
        if position == steps % n {
            cursor = k;
        }
    }
    (cursor, 0)
}

/// How many `s` below `steps` are `position` modulo `n` and 0 modulo `every`.
fn writes_at(position: u64, n: u64, steps: u64, every: u64) -> u64 {
    if steps <= position {
        return 0;
    }
    let times = (steps - 1 - position) / n + 1;
    // Times `t` and `t + every` write both or neither.
    (0..every.min(times))
        .filter(|t| (position + t * n).is_multiple_of(every))
        .map(|t| (times - 1 - t) / every + 1)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_counts_are_those_of_counting() {
        for n in 16..40u64 {
            for every in [1, 4] {
                for steps in [0, 1, 15, 16, 17, 100, 321, 1000] {
                    for position in 0..n {
                        let counted = (0..steps)
                            .filter(|s| s % n == position && s % every == 0)
                            .count() as u64;
                        assert_eq!(writes_at(position, n, steps, every), counted);
                    }
                }
            }
        }
    }
}
