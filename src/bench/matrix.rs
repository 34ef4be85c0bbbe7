//! [`Matrix`]: the values of each thing that varies, the cells that they make, and the order
//! in which a round runs them.

use super::cell::Cell;
use crate::proto::prepaging::PolicyKind;
use crate::trial::LinkShape;
use crate::uffd::DestinationBacking;
use crate::vmm::choice::WorkloadChoice;
use crate::vmm::guest::GuestKind;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use std::collections::BTreeSet;

/// The most cells of a matrix.
pub const CELLS_MAX: usize = 10_000;

/// What varies.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Kinds of guest.
    pub guests: Vec<GuestKind>,
    /// What the guests do.
    pub workloads: Vec<WorkloadChoice>,
    /// Pre-paging policies.
    pub policies: Vec<PolicyKind>,
    /// Bytes of memory.
    pub memories: Vec<u64>,
    /// Numbers of vCPUs.
    pub vcpus: Vec<u32>,
    /// What memory is made of at the destination.
    pub backings: Vec<DestinationBacking>,
    /// Numbers of push connections.
    pub push_lanes: Vec<u8>,
    /// Links.
    pub links: Vec<LinkShape>,
}

/// A matrix that cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// Nothing to run.
    #[error("no {0} is given, so there is no cell to run")]
    Empty(&'static str),
    /// More than anybody would wait for.
    #[error("the matrix has {0} cells; the most is {CELLS_MAX}")]
    TooLarge(usize),
    /// Two traces that could not be told apart in tables and in the names of files.
    #[error("two workloads would be called {0} in the results; rename one's file")]
    SameName(String),
}

impl Matrix {
    /// Every combination, each once: links innermost, guests outermost. What is given twice
    /// counts once.
    pub fn cells(&self) -> Result<Vec<Cell>, MatrixError> {
        let axes = [
            ("guest", self.guests.len()),
            ("workload", self.workloads.len()),
            ("policy", self.policies.len()),
            ("memory", self.memories.len()),
            ("number of vCPUs", self.vcpus.len()),
            ("backing", self.backings.len()),
            ("number of push lanes", self.push_lanes.len()),
            ("link", self.links.len()),
        ];
        if let Some((name, _)) = axes.iter().find(|(_, values)| *values == 0) {
            return Err(MatrixError::Empty(name));
        }
        let count =
            axes.iter().fold(1usize, |product, (_, values)| product.saturating_mul(*values));
        if count > CELLS_MAX {
            return Err(MatrixError::TooLarge(count));
        }
        let (guests, workloads) = (unique(&self.guests), unique(&self.workloads));
        let (policies, memories) = (unique(&self.policies), unique(&self.memories));
        let (vcpus, backings) = (unique(&self.vcpus), unique(&self.backings));
        let (push_lanes, links) = (unique(&self.push_lanes), unique(&self.links));
        let mut cells = Vec::with_capacity(count);
        for &guest in &guests {
            for workload in &workloads {
                for &policy in &policies {
                    for &memory in &memories {
                        for &vcpus in &vcpus {
                            for &backing in &backings {
                                for &push_lanes in &push_lanes {
                                    cells.extend(links.iter().map(|&link| Cell {
                                        guest,
                                        workload: workload.clone(),
                                        policy,
                                        memory,
                                        vcpus,
                                        backing,
                                        push_lanes,
                                        link,
                                    }));
                                }
                            }
                        }
                    }
                }
            }
        }
        let mut slugs = BTreeSet::new();
        match cells.iter().find(|cell| !slugs.insert(cell.slug())) {
            Some(cell) => Err(MatrixError::SameName(cell.workload.short())),
            None => Ok(cells),
        }
    }
}

fn unique<T: Clone + PartialEq>(values: &[T]) -> Vec<T> {
    let mut found: Vec<T> = Vec::new();
    for value in values {
        if !found.contains(value) {
            found.push(value.clone());
        }
    }
    found
}

/// The order in which `round` runs `cells` cells: another one each round, the same for a seed.
pub fn order(cells: usize, round: u32, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..cells).collect();
    // Seeds of neighbouring rounds must have nothing in common.
    let mut random =
        StdRng::seed_from_u64(seed ^ u64::from(round).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    order.shuffle(&mut random);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::workload::Pattern;

    fn matrix() -> Matrix {
        Matrix {
            guests: vec![GuestKind::Process],
            workloads: [Pattern::Random, Pattern::Zipf].map(WorkloadChoice::Pattern).to_vec(),
            policies: PolicyKind::ALL.to_vec(),
            memories: vec![8 << 20, 16 << 20],
            vcpus: vec![1],
            backings: vec![DestinationBacking::Anonymous, DestinationBacking::MemfdContinue],
            push_lanes: vec![1, 4],
            links: vec![LinkShape::default(), "1Gbit:1ms".parse().unwrap()],
        }
    }

    #[test]
    fn every_combination_is_a_cell_once() {
        let cells = matrix().cells().unwrap();
        let names: BTreeSet<String> = cells.iter().map(ToString::to_string).collect();
        let slugs: BTreeSet<String> = cells.iter().map(Cell::slug).collect();
        assert_eq!((cells.len(), names.len(), slugs.len()), (96, 96, 96));
        assert_eq!(
            cells[0].to_string(),
            "process random demand-only 8M 1vcpu anonymous 1lane loopback"
        );
        assert_eq!(
            cells[95].to_string(),
            "process zipf bubbling 16M 1vcpu memfd-continue 4lane 1Gbit:1ms"
        );
        let mut twice = matrix();
        twice.links.extend(twice.links.clone());
        twice.vcpus = vec![1, 1];
        twice.push_lanes = vec![1, 4, 1];
        assert_eq!(twice.cells().unwrap(), cells);
    }

    #[test]
    fn a_matrix_without_a_cell_or_with_too_many_is_refused() {
        let files = ["/a/x.trace.gz", "/b/x.trace"].map(|file| WorkloadChoice::Trace(file.into()));
        let traces = Matrix { workloads: files.to_vec(), ..matrix() };
        assert_eq!(traces.cells(), Err(MatrixError::SameName("trace:x".into())));
        let none = Matrix { backings: vec![], ..matrix() };
        assert_eq!(none.cells(), Err(MatrixError::Empty("backing")));
        let large = Matrix { memories: (1..=10_001).collect(), ..matrix() };
        assert_eq!(large.cells(), Err(MatrixError::TooLarge(480_048)));
    }

    #[test]
    fn each_round_runs_all_cells_in_an_order_of_its_own() {
        let rounds: Vec<Vec<usize>> = (1..=4).map(|round| order(20, round, 7)).collect();
        for (round, order_of_it) in (1..).zip(&rounds) {
            let mut sorted = order_of_it.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..20).collect::<Vec<_>>(), "round {round}");
            assert_eq!(*order_of_it, order(20, round, 7), "the same again");
        }
        let distinct: BTreeSet<&Vec<usize>> = rounds.iter().collect();
        assert_eq!(distinct.len(), 4);
        assert_ne!(order(20, 1, 7), order(20, 1, 8));
    }
}
