//! [`Results`]: all that a benchmark found, schema `postcopy-bench/1`: every run's figures, and
//! their medians and spreads. Made from the files of a [`Store`], as often as anybody likes.

use super::cell::Cell;
use super::figures::{self, FIGURES};
use super::floors::{Floor, Floors};
use super::plan::{Plan, RECORDED_ROUND};
use super::statistics::Spread;
use super::store::{Failed, Outcome, Run, Store};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The value of `schema`.
pub const SCHEMA: &str = "postcopy-bench/1";

/// All that was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: String,
    /// What was measured, of what and on what.
    pub plan: Plan,
    /// How many runs the plan has, and what became of them.
    pub runs: Count,
    /// What the figures are.
    pub figures: BTreeMap<String, Meaning>,
    /// The floors of each round, and their spread over the rounds.
    pub floors: FloorResults,
    /// The cells, in the order of the plan.
    pub cells: Vec<CellResults>,
}

/// Runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// All of the plan.
    pub planned: u64,
    /// Of them, those that completed.
    pub completed: u64,
    /// Of them, those that failed.
    pub failed: u64,
}

impl Count {
    /// Those that were not made yet.
    pub fn missing(self) -> u64 {
        self.planned.saturating_sub(self.completed + self.failed)
    }
}

/// What a figure is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meaning {
    /// What it counts.
    pub unit: String,
    /// What it is.
    pub what: String,
}

/// The floors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FloorResults {
    /// What each is, in nanoseconds or bits a second.
    pub what: BTreeMap<Floor, String>,
    /// Of each round.
    pub rounds: BTreeMap<u32, Floors>,
    /// The rounds' medians.
    pub spread: BTreeMap<Floor, Spread>,
}

/// A cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CellResults {
    /// Its name.
    pub name: String,
    /// What it is.
    pub cell: Cell,
    /// Each figure over all runs that completed.
    pub figures: BTreeMap<String, Spread>,
    /// Its runs, as far as they were made.
    pub runs: Vec<RunResults>,
}

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunResults {
    /// Its round; 0: it was recorded, and is not in the spreads.
    pub round: u32,
    /// When it began, in milliseconds since 1970.
    pub at_unix_ms: u64,
    /// The machine's load when it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_average: Option<f64>,
    /// Why it failed, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<Failed>,
    /// Its figures.
    pub figures: BTreeMap<String, f64>,
}

impl CellResults {
    /// The reasons of the runs that failed.
    pub fn failures(&self) -> impl Iterator<Item = (u32, &Failed)> {
        self.runs.iter().filter_map(|run| Some((run.round, run.failed.as_ref()?)))
    }

    /// The median of a figure.
    pub fn median(&self, name: &str) -> Option<f64> {
        self.figures.get(name).map(|spread| spread.median)
    }
}

impl Results {
    /// What the store holds.
    pub fn of(store: &Store) -> anyhow::Result<Self> {
        let plan = store.plan();
        let mut floors = BTreeMap::new();
        for round in 1..=plan.rounds {
            floors.extend(store.floors(round)?.map(|of| (round, of)));
        }
        let mut runs = Vec::new();
        for cell in &plan.cells {
            for round in plan.all_rounds() {
                runs.extend(store.run(round, cell)?);
            }
        }
        Ok(Self::made(plan.clone(), floors, &runs))
    }

    /// Makes the results of these runs.
    pub fn made(plan: Plan, floors: BTreeMap<u32, Floors>, runs: &[Run]) -> Self {
        let mut count = Count { planned: plan.runs(), ..Count::default() };
        let mut cells = Vec::new();
        for cell in &plan.cells {
            let of_cell: Vec<RunResults> = runs
                .iter()
                .filter(|run| run.cell == *cell)
                .map(|run| run_results(run, floors.get(&run.round)))
                .collect();
            let failed = of_cell.iter().filter(|run| run.failed.is_some()).count() as u64;
            count.failed += failed;
            count.completed += of_cell.len() as u64 - failed;
            cells.push(CellResults {
                name: cell.to_string(),
                cell: cell.clone(),
                figures: spreads(&of_cell),
                runs: of_cell,
            });
        }
        let figures = FIGURES.iter().map(|figure| {
            let (unit, what) = (figure.unit.name().to_owned(), figure.what.to_owned());
            (figure.name.to_owned(), Meaning { unit, what })
        });
        Self {
            schema: SCHEMA.to_owned(),
            runs: count,
            figures: figures.collect(),
            floors: floor_results(floors),
            cells,
            plan,
        }
    }
}

fn run_results(run: &Run, floors: Option<&Floors>) -> RunResults {
    let (failed, figures) = match &run.outcome {
        Outcome::Completed(report) => (None, figures::of_run(report, &run.cell, floors)),
        Outcome::Failed(failed) => (Some(failed.clone()), BTreeMap::new()),
    };
    let Run { round, at_unix_ms, load_average, .. } = *run;
    RunResults { round, at_unix_ms, load_average, failed, figures }
}

fn spreads(runs: &[RunResults]) -> BTreeMap<String, Spread> {
    let counted = runs.iter().filter(|run| run.round != RECORDED_ROUND);
    let of = |name: &str| {
        let values: Vec<f64> =
            counted.clone().filter_map(|run| run.figures.get(name).copied()).collect();
        Spread::of(&values)
    };
    FIGURES.iter().filter_map(|figure| Some((figure.name.to_owned(), of(figure.name)?))).collect()
}

fn floor_results(rounds: BTreeMap<u32, Floors>) -> FloorResults {
    let what = |floor: Floor| {
        let unit = if floor.is_rate() { "bit/s" } else { "ns" };
        (floor, format!("{}, {unit}", floor.what()))
    };
    let spread = |floor: Floor| {
        let medians: Vec<f64> =
            rounds.values().filter_map(|of| of.get(floor)).map(|of| of.p50).collect();
        Some((floor, Spread::of(&medians)?))
    };
    let spread = Floor::ALL.into_iter().filter_map(spread).collect();
    FloorResults { what: Floor::ALL.into_iter().map(what).collect(), rounds, spread }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::floors::{Found, Measured};
    use crate::bench::plan::tests::plan;
    use crate::bench::store::RUN_SCHEMA;
    use crate::proto::switchover;
    use crate::report::schema::{Blocktime, Distribution, Mode, Report, Round, Switchover};

    /// A report with fixed figures; `n` makes the runs differ.
    pub fn report(n: u64) -> Report {
        let text = format!(
            r#"{{"schema": "postcopy-report/1", "outcome": "completed", "reason": null,
            "side": "source", "mode": "post-copy", "policy": "bubbling",
            "guest": {{"kind": "process", "memory_bytes": 8388608, "page_size": 4096, "vcpus": 1,
                       "backing": "memfd-continue", "workload": "random"}},
            "link": {{"encrypted": true, "push_lanes": 1}},
            "phases_us": {{"handshake": 40000, "source_brownout": 10, "blackout": 1500,
                           "target_brownout": 50000}},
            "downtime_us": {}, "downtime_parts_us": {{}}, "total_us": 91510,
            "guest_stall_ns": {{"count": 100, "mean": 90000, "p50": {}, "p99": 1200000,
                                "max": 2000000}},
            "pages": {{"total": 2048, "zero": 0, "hole": 0, "seeded": 8, "demanded": 90,
                       "pushed": 1950, "drained": 0}},
            "network_faults": 90, "late_hits": 10,
            "fault_latency_ns": {{"count": 100, "mean": 70000, "p50": 60000, "p99": 900000,
                                  "max": 1500000}},
            "blocktime_us": {{"total": 7000, "per_vcpu": [7000]}},
            "guest_steps": {{"steady_per_second": 1000000}},
            "wire_bytes": {{"to_destination": 8500000, "to_source": 100000}},
            "cpu_us": {{"source": 20000, "destination": 30000}},
            "peak_rss_bytes": {{"source": 20000000, "destination": 21000000}},
            "verified": true}}"#,
            1500 + n,
            40_000 + 2000 * n
        );
        serde_json::from_str(&text).unwrap()
    }

    /// A report of a guest of which some memory was copied before it moved, or all.
    pub fn report_of(mode: Mode) -> Report {
        let mut report = report(0);
        report.mode = mode;
        report.phases_us.source_brownout = Some(48_500);
        let round = |sent| Round { sent, ..Round::default() };
        let rounds = match mode {
            Mode::StopAndCopy => vec![],
            _ => vec![round(1536), round(512)],
        };
        report.switchover = Some(Switchover { rounds, copied: 2048, ..Switchover::default() });
        let pages = &mut report.pages;
        if mode == Mode::Hybrid {
            (pages.precopied, pages.pushed) = (Some(1024), Some(926));
            return report;
        }
        (pages.precopied, pages.seeded) = (Some(2048), Some(0));
        (pages.demanded, pages.pushed) = (Some(0), Some(0));
        (report.network_faults, report.late_hits) = (Some(0), Some(0));
        report.blocktime_us =
            report.blocktime_us.map(|_| Blocktime { total: 0, per_vcpu: vec![0] });
        report.fault_latency_ns = Some(Distribution::default());
        report
    }

    fn run(round: u32, cell: &Cell, outcome: Outcome) -> Run {
        Run {
            schema: RUN_SCHEMA.to_owned(),
            round,
            cell: cell.clone(),
            at_unix_ms: 1_795_000_000_000 + u64::from(round),
            took_ms: 700,
            load_average: Some(0.5),
            outcome,
        }
    }

    /// Results of one round of three modes.
    pub fn results_of_modes() -> Results {
        let mut plan = plan();
        plan.rounds = 1;
        plan.conditions.record = false;
        let cell = plan.cells[0].clone();
        let of = [
            (switchover::Mode::PostCopy, report(0)),
            (switchover::Mode::Hybrid, report_of(Mode::Hybrid)),
            (switchover::Mode::StopAndCopy, report_of(Mode::StopAndCopy)),
        ];
        let runs = of.map(|(mode, report)| {
            run(1, &Cell { mode, ..cell.clone() }, Outcome::Completed(Box::new(report)))
        });
        plan.cells = runs.iter().map(|run| run.cell.clone()).collect();
        Results::made(plan, BTreeMap::new(), &runs)
    }

    /// Results of fixed figures: a recorded round and three others, none of them whole.
    pub fn results() -> Results {
        let plan = plan();
        let (loopback, emulated) = (&plan.cells[0], &plan.cells[1]);
        let completed = |n| Outcome::Completed(Box::new(report(n)));
        let failed = Failed { reason: "the link did not come back".into(), code: 4 };
        let runs = [
            run(0, loopback, completed(1000)),
            run(1, loopback, completed(1)),
            run(2, loopback, completed(5)),
            run(3, loopback, completed(2)),
            run(1, emulated, completed(3)),
            run(2, emulated, Outcome::Failed(failed)),
        ];
        let floors = |round: u32| {
            let time = |p50: f64| {
                let (p99, min) = (Some(3.0 * p50), Some(p50 / 2.0));
                Found::Measured(Measured { count: 1000, p50, p99, min, max: 10.0 * p50 })
            };
            let rate = |p50: f64| {
                let (p99, min) = (None, Some(p50 / 2.0));
                Found::Measured(Measured { count: 10, p50, p99, min, max: 1.5 * p50 })
            };
            Floors(BTreeMap::from([
                (Floor::Memcpy, time(300.0)),
                (Floor::Place, time(500.0 + f64::from(round))),
                (Floor::LocalFault, Found::Failed("userfaultfd is not permitted".into())),
                (Floor::TcpFault, time(20_000.0 * f64::from(round))),
                (Floor::Tcp, rate(20e9)),
                (Floor::Udp, rate(2.72e9)),
            ]))
        };
        let floors = (1..=3).map(|round| (round, floors(round))).collect();
        Results::made(plan, floors, &runs)
    }

    #[test]
    fn ratios_are_to_the_floor_of_the_same_round_and_of_the_same_device() {
        let results = results();
        assert_eq!(results.runs, Count { planned: 8, completed: 5, failed: 1 });
        assert_eq!(results.runs.missing(), 2);
        let loopback = &results.cells[0];
        // 42, 50 and 44 us over 20, 40 and 60 us.
        let ratios: Vec<f64> =
            loopback.runs[1..].iter().map(|run| run.figures["stall_p50_to_tcp_fault"]).collect();
        assert_eq!(ratios, [2.1, 1.25, 44.0 / 60.0]);
        // What was recorded is not counted.
        assert_eq!(loopback.figures["stall_p50_ns"].count, 3);
        assert_eq!(loopback.figures["stall_p50_ns"].max, 50_000.0);
        assert_eq!(loopback.median("stall_p50_to_tcp_fault"), Some(1.25));
        // 8.5 MB in 50 ms are 1.36 Gbit/s, half of UDP's.
        assert_eq!(loopback.median("rate_to_udp"), Some(0.5));
        assert_eq!(loopback.median("pages_per_second"), Some(2040.0 / 0.05));
        assert_eq!(loopback.median("late_hit_share"), Some(0.1));
        assert_eq!(loopback.median("rate_to_link"), None);
        let emulated = &results.cells[1];
        assert_eq!(emulated.median("stall_p50_to_tcp_fault"), None);
        assert_eq!(emulated.median("rate_to_link"), Some(1.36));
        assert_eq!(emulated.failures().count(), 1);
    }

    #[test]
    fn the_json_has_this_shape() {
        insta::assert_snapshot!(serde_json::to_string_pretty(&results()).unwrap());
    }
}
