//! [`Matrix`]: the values of each thing that varies, the cells that they make, and the order
//! in which a round runs them.

use super::cell::Cell;
use crate::proto::prepaging::PolicyKind;
use crate::proto::switchover::Mode;
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
    /// When memory moves.
    pub modes: Vec<Mode>,
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
    /// A way to move that no memory at the destination allows.
    #[error(
        "{0} copies memory before the guest moves, and no backing is given that takes it then; \
         memfd-continue does"
    )]
    NoBacking(Mode),
    /// Two traces that could not be told apart in tables and in the names of files.
    #[error("two workloads would be called {0} in the results; rename one's file")]
    SameName(String),
}

impl Matrix {
    /// Every combination that there can be, each once: links innermost, guests outermost. What is
    /// given twice counts once.
    pub fn cells(&self) -> Result<Vec<Cell>, MatrixError> {
        let first = Cell {
            guest: *first("guest", &self.guests)?,
            workload: first("workload", &self.workloads)?.clone(),
            mode: *first("mode", &self.modes)?,
            policy: *first("policy", &self.policies)?,
            memory: *first("memory", &self.memories)?,
            vcpus: *first("number of vCPUs", &self.vcpus)?,
            backing: *first("backing", &self.backings)?,
            push_lanes: *first("number of push lanes", &self.push_lanes)?,
            link: *first("link", &self.links)?,
        };
        let fitting = |mode: Mode| self.backings.iter().filter(move |of| fit(mode, **of)).count();
        if let Some(mode) = self.modes.iter().find(|mode| fitting(**mode) == 0) {
            return Err(MatrixError::NoBacking(*mode));
        }
        let counts = [
            self.guests.len(),
            self.workloads.len(),
            self.modes.iter().map(|mode| fitting(*mode)).sum(),
            self.policies.len(),
            self.memories.len(),
            self.vcpus.len(),
            self.push_lanes.len(),
            self.links.len(),
        ];
        let count = counts.into_iter().fold(1, usize::saturating_mul);
        if count > CELLS_MAX {
            return Err(MatrixError::TooLarge(count));
        }
        let cells = spread(vec![first], &self.guests, |cell, of| cell.guest = of);
        let cells = spread(cells, &self.workloads, |cell, of| cell.workload = of);
        let cells = spread(cells, &self.modes, |cell, of| cell.mode = of);
        let cells = spread(cells, &self.policies, |cell, of| cell.policy = of);
        let cells = spread(cells, &self.memories, |cell, of| cell.memory = of);
        let cells = spread(cells, &self.vcpus, |cell, of| cell.vcpus = of);
        let mut cells = spread(cells, &self.backings, |cell, of| cell.backing = of);
        cells.retain(|cell| fit(cell.mode, cell.backing));
        let cells = spread(cells, &self.push_lanes, |cell, of| cell.push_lanes = of);
        let cells = spread(cells, &self.links, |cell, of| cell.link = of);
        let mut slugs = BTreeSet::new();
        match cells.iter().find(|cell| !slugs.insert(cell.slug())) {
            Some(cell) => Err(MatrixError::SameName(cell.workload.short())),
            None => Ok(cells),
        }
    }

    /// The combinations that there cannot be, in words; nothing if all are cells.
    pub fn left_out(&self) -> Option<String> {
        let names = |names: Vec<String>| (!names.is_empty()).then(|| names.join(", "));
        let modes = unique(&self.modes).into_iter().filter(|of| of.copies());
        let backings = unique(&self.backings).into_iter().filter(|of| !of.takes_copies());
        let modes = names(modes.map(|of| of.to_string()).collect())?;
        let backings = names(backings.map(|of| of.to_string()).collect())?;
        let why = "only memfd-continue takes pages before the guest comes";
        Some(format!("{modes} with {backings}: {why}"))
    }
}

/// Whether a guest can be moved so into such memory.
fn fit(mode: Mode, backing: DestinationBacking) -> bool {
    !mode.copies() || backing.takes_copies()
}

fn first<'a, T>(name: &'static str, values: &'a [T]) -> Result<&'a T, MatrixError> {
    values.first().ok_or(MatrixError::Empty(name))
}

/// In place of each cell one for each value.
fn spread<T: Clone + PartialEq>(
    cells: Vec<Cell>,
    values: &[T],
    set: impl Fn(&mut Cell, T),
) -> Vec<Cell> {
    let values = unique(values);
    let each = |cell: Cell| {
        values
            .iter()
            .map(|value| {
                let mut cell = cell.clone();
                set(&mut cell, value.clone());
                cell
            })
            .collect::<Vec<_>>()
    };
    cells.into_iter().flat_map(each).collect()
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
            modes: vec![Mode::PostCopy, Mode::Hybrid],
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
        assert_eq!((cells.len(), names.len(), slugs.len()), (144, 144, 144));
        assert_eq!(
            cells[0].to_string(),
            "process random post-copy demand-only 8M 1vcpu anonymous 1lane loopback"
        );
        assert_eq!(
            cells[143].to_string(),
            "process zipf hybrid bubbling 16M 1vcpu memfd-continue 4lane 1Gbit:1ms"
        );
        let mut twice = matrix();
        twice.links.extend(twice.links.clone());
        twice.vcpus = vec![1, 1];
        twice.modes = vec![Mode::PostCopy, Mode::Hybrid, Mode::PostCopy];
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
        assert_eq!(large.cells(), Err(MatrixError::TooLarge(720_072)));
    }

    #[test]
    fn a_mode_that_copies_is_measured_only_with_memory_that_takes_copies() {
        let mixed = matrix();
        let cells = mixed.cells().unwrap();
        let with = |mode, backing| {
            let is = |cell: &&Cell| cell.mode == mode && cell.backing == backing;
            cells.iter().filter(is).count()
        };
        assert_eq!(with(Mode::PostCopy, DestinationBacking::Anonymous), 48);
        assert_eq!(with(Mode::Hybrid, DestinationBacking::MemfdContinue), 48);
        assert_eq!(with(Mode::Hybrid, DestinationBacking::Anonymous), 0);
        let left_out = mixed.left_out().unwrap();
        assert!(left_out.starts_with("hybrid with anonymous: "), "{left_out}");

        let alone = Matrix { modes: vec![Mode::PostCopy], ..matrix() };
        assert_eq!((alone.cells().unwrap().len(), alone.left_out()), (96, None));
        let fits = Matrix { backings: vec![DestinationBacking::MemfdContinue], ..matrix() };
        assert_eq!((fits.cells().unwrap().len(), fits.left_out()), (96, None));

        // A mode of which nothing would be left.
        let backings = vec![DestinationBacking::MemfdCopy, DestinationBacking::Hugetlb];
        let never = Matrix { modes: Mode::ALL.to_vec(), backings, ..matrix() };
        let refused = never.cells().unwrap_err();
        assert_eq!(refused, MatrixError::NoBacking(Mode::PreCopy));
        assert!(refused.to_string().contains("memfd-continue"), "{refused}");
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
