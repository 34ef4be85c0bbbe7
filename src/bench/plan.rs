//! [`Plan`]: everything that decides what a benchmark measures. Two runs belong together only
//! if their plans are equal.

use super::cell::Cell;
use super::machine::{Machine, Program};
use crate::proto::compression::CompressMode;
use crate::proto::switchover::SwitchoverConfig;
use crate::vmm::trace::TraceId;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

/// What is equal for all cells.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Conditions {
    /// Least time from one step of a vCPU to its next.
    pub think_ns: u64,
    /// Part of the memory that is zero.
    pub zero_percent: u64,
    /// The seed of the guests' memory, and of what an emulated link loses.
    pub guest_seed: u64,
    /// Rounds of the hybrid mode.
    #[serde(default = "hybrid_rounds")]
    pub hybrid_rounds: u32,
    /// How long a guest may stand still where that can be chosen, in pre-copy and auto.
    #[serde(default = "max_downtime_us")]
    pub max_downtime_us: u64,
    /// Whether pushed pages are compressed.
    #[serde(default)]
    pub compress: CompressMode,
    /// Whether huge pages are made of the guests' memory in the end.
    #[serde(default)]
    pub huge_pages: bool,
    /// How long a guest runs before it is migrated.
    pub run_before_ms: u64,
    /// How long it runs on after all its memory came.
    pub run_after_ms: u64,
    /// After how long on the destination the demand-only policy pushes what is left.
    pub drain_after_ms: u64,
    /// Whether every page is compared.
    pub verify: bool,
    /// What no migration may outlast.
    pub limit_ms: u64,
    /// How long each floor is measured, each round.
    pub floor_ms: u64,
    /// Whether each cell has a first run that is recorded, for the plots, and not counted.
    pub record: bool,
}

impl Conditions {
    /// After how long on the destination the demand-only policy pushes what is left.
    pub fn drain_after(&self) -> Duration {
        Duration::from_millis(self.drain_after_ms)
    }

    /// How long a guest may stand still where that can be chosen.
    pub fn max_downtime(&self) -> Duration {
        Duration::from_micros(self.max_downtime_us)
    }
}

fn hybrid_rounds() -> u32 {
    SwitchoverConfig::default().rounds
}

fn max_downtime_us() -> u64 {
    SwitchoverConfig::default().max_downtime.as_micros() as u64
}

/// Everything that decides what is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// How often each cell is run.
    pub rounds: u32,
    /// Decides the order within each round.
    pub seed: u64,
    /// What is equal for all cells.
    pub conditions: Conditions,
    /// The cells, in the order in which they are shown.
    pub cells: Vec<Cell>,
    /// What the traces among their workloads are, by file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub traces: BTreeMap<PathBuf, TraceId>,
    /// What is measured.
    pub program: Program,
    /// On what.
    pub machine: Machine,
}

/// The round whose runs are recorded and not counted: a recording costs time, and what runs
/// first on a machine runs otherwise.
pub const RECORDED_ROUND: u32 = 0;

/// The most differences that are named.
const NAMED_MAX: usize = 5;

impl Plan {
    /// All rounds, in order, the recorded one included.
    pub fn all_rounds(&self) -> RangeInclusive<u32> {
        let first = if self.conditions.record { RECORDED_ROUND } else { 1 };
        first..=self.rounds
    }

    /// All runs.
    pub fn runs(&self) -> u64 {
        self.all_rounds().count() as u64 * self.cells.len() as u64
    }

    /// What is not the same in another plan, by name, and how it is there and here; empty if
    /// they are equal. The other one is as it stands in its file: another version's plan may have
    /// what this one's does not.
    pub fn differences(&self, other: &Value) -> Vec<String> {
        // What a file leaves out because it had no name then is what it is by default.
        let there = match Plan::deserialize(other) {
            Ok(plan) => serde_json::to_value(plan),
            Err(_) => Ok(other.clone()),
        };
        let (Ok(here), Ok(there)) = (serde_json::to_value(self), there) else {
            return vec!["the plan".to_owned()];
        };
        let mut found = Vec::new();
        compare("", &there, &here, &mut found);
        if found.len() > NAMED_MAX {
            let more = found.len() - NAMED_MAX;
            found.truncate(NAMED_MAX);
            found.push(format!("{more} more"));
        }
        found
    }
}

fn compare(name: &str, there: &Value, here: &Value, found: &mut Vec<String>) {
    match (there, here) {
        (Value::Object(one), Value::Object(other)) => {
            let keys: std::collections::BTreeSet<&String> =
                one.keys().chain(other.keys()).collect();
            for key in keys {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                let of = |object: &serde_json::Map<String, Value>| {
                    object.get(key).cloned().unwrap_or_default()
                };
                compare(&name, &of(one), &of(other), found);
            }
        }
        (Value::Array(one), Value::Array(other)) if one.len() == other.len() => {
            for (index, (one, other)) in one.iter().zip(other).enumerate() {
                compare(&format!("{name}[{index}]"), one, other, found);
            }
        }
        (Value::Array(one), Value::Array(other)) => {
            found.push(format!("{name}: {} there, {} now", one.len(), other.len()));
        }
        (one, other) if one != other => found.push(format!("{name}: {one} there, {other} now")),
        _ => {}
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::matrix::Matrix;
    use crate::proto::prepaging::PolicyKind;
    use crate::proto::switchover::Mode;
    use crate::trial::LinkShape;
    use crate::uffd::DestinationBacking;
    use crate::vmm::choice::WorkloadChoice;
    use crate::vmm::guest::GuestKind;
    use crate::vmm::workload::Pattern;

    /// A plan of two cells.
    pub fn plan() -> Plan {
        let matrix = Matrix {
            guests: vec![GuestKind::Process],
            workloads: vec![WorkloadChoice::Pattern(Pattern::Random)],
            modes: vec![Mode::PostCopy],
            policies: vec![PolicyKind::Bubbling],
            memories: vec![8 << 20],
            vcpus: vec![1],
            backings: vec![DestinationBacking::MemfdContinue],
            push_lanes: vec![1],
            links: vec![LinkShape::default(), "1Gbit:1ms:0.1%".parse().unwrap()],
        };
        Plan {
            rounds: 3,
            seed: 7,
            conditions: Conditions {
                think_ns: 0,
                zero_percent: 0,
                guest_seed: 1,
                hybrid_rounds: 2,
                max_downtime_us: 300_000,
                compress: CompressMode::Auto,
                huge_pages: false,
                run_before_ms: 100,
                run_after_ms: 50,
                drain_after_ms: 1000,
                verify: true,
                limit_ms: 60_000,
                floor_ms: 200,
                record: true,
            },
            cells: matrix.cells().unwrap(),
            traces: BTreeMap::new(),
            program: Program {
                version: "0.1.0".into(),
                debug_assertions: false,
                crc32: Some("00c0ffee".into()),
            },
            machine: Machine {
                processor: Some("A processor".into()),
                cores: Some(2),
                memory_bytes: Some(8 << 30),
                kernel: Some("Linux 6.1".into()),
                virtual_machine: Some(true),
            },
        }
    }

    #[test]
    fn a_plan_survives_its_file() {
        let text = serde_json::to_string(&plan()).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan());
        assert!(
            text.contains("\"memfd-continue\"") && text.contains("\"1Gbit:1ms:0.1%\""),
            "{text}"
        );
    }

    #[test]
    fn what_differs_is_named() {
        let (here, value) = (plan(), |plan: &Plan| serde_json::to_value(plan).unwrap());
        assert_eq!(here.differences(&value(&plan())), Vec::<String>::new());
        let mut there = plan();
        there.seed = 8;
        there.cells[1].memory = 16 << 20;
        there.program.crc32 = None;
        assert_eq!(
            here.differences(&value(&there)),
            [
                "cells[1].memory: 16777216 there, 8388608 now",
                "program.crc32: null there, \"00c0ffee\" now",
                "seed: 8 there, 7 now",
            ]
        );
        there.cells.pop();
        assert_eq!(here.differences(&value(&there))[0], "cells: 1 there, 2 now");
    }

    #[test]
    fn a_plan_of_an_earlier_version_differs_by_name_or_by_nothing() {
        let mut there = serde_json::to_value(plan()).unwrap();
        // It had no such conditions, and what is done by default is what was always done.
        for name in ["huge_pages", "hybrid_rounds", "max_downtime_us"] {
            assert!(there["conditions"].as_object_mut().unwrap().remove(name).is_some(), "{name}");
        }
        // It had one way to move a guest.
        for cell in there["cells"].as_array_mut().unwrap() {
            assert!(cell.as_object_mut().unwrap().remove("mode").is_some());
        }
        assert_eq!(plan().differences(&there), Vec::<String>::new());
        // It had one number of push lanes for all cells.
        let mut there = serde_json::to_value(plan()).unwrap();
        there["conditions"]["push_lanes"] = 2.into();
        for cell in there["cells"].as_array_mut().unwrap() {
            cell.as_object_mut().unwrap().remove("push_lanes");
        }
        let found = plan().differences(&there);
        for named in
            ["cells[0].push_lanes: null there, 1 now", "conditions.push_lanes: 2 there, null now"]
        {
            assert!(found.iter().any(|of| of == named), "no {named:?} in {found:?}");
        }
    }
}
