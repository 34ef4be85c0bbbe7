//! [`Cell`]: one combination of all that a benchmark varies.

use super::plan::Conditions;
use crate::proto::prepaging::PolicyKind;
use crate::proto::switchover::Mode;
use crate::trial::{LinkShape, Trial, Voice};
use crate::uffd::DestinationBacking;
use crate::vmm::choice::WorkloadChoice;
use crate::vmm::guest::GuestKind;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// How both sides of a trial wait for a link that was lost: a benchmark has no link to wait for.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is migrated, how, and over what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// A virtual machine, or threads of a process.
    pub guest: GuestKind,
    /// What the guest does.
    pub workload: WorkloadChoice,
    /// When its memory moves. Before this varied, it moved after the guest.
    #[serde(default, with = "mode")]
    pub mode: Mode,
    /// The pre-paging policy.
    pub policy: PolicyKind,
    /// Its memory, in bytes.
    pub memory: u64,
    /// Its vCPUs.
    pub vcpus: u32,
    /// What its memory is made of at the destination.
    #[serde(with = "backing")]
    pub backing: DestinationBacking,
    /// Push connections.
    pub push_lanes: u8,
    /// The link.
    pub link: LinkShape,
}

impl Cell {
    /// The guest's memory as people write it.
    pub fn memory_name(&self) -> String {
        memory_name(self.memory)
    }

    /// Its name in file names: of letters, digits, points and hyphens only.
    pub fn slug(&self) -> String {
        let name = self.to_string().replace('%', "pct");
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        name.chars().map(plain).collect()
    }

    /// The trial that it is.
    pub fn trial(&self, conditions: &Conditions) -> Trial {
        let text = |value: &dyn fmt::Display| value.to_string();
        let mut policy = vec!["--policy".to_owned(), text(&self.policy)];
        if self.policy == PolicyKind::DemandOnly {
            // It has no other end: a benchmark's guest works for as long as it runs.
            policy.extend(["--drain-after".to_owned(), written(conditions.drain_after())]);
        }
        policy.extend(["--compress".to_owned(), text(&conditions.compress)]);
        let switchover = [
            ("--mode", text(&self.mode)),
            ("--rounds", text(&conditions.hybrid_rounds)),
            ("--max-downtime", written(conditions.max_downtime())),
        ];
        policy.extend(arguments(switchover));
        let guest = [
            ("--guest", self.guest.name().to_owned()),
            ("--memory", text(&self.memory)),
            ("--vcpus", text(&self.vcpus)),
            ("--workload", text(&self.workload)),
            ("--think-ns", text(&conditions.think_ns)),
            ("--seed", text(&conditions.guest_seed)),
            ("--zero", text(&conditions.zero_percent)),
        ];
        Trial {
            guest: arguments(guest).collect(),
            policy,
            destination: self.workload.destination_arguments(),
            backing: self.backing,
            huge_pages: conditions.huge_pages,
            push_lanes: self.push_lanes,
            link: self.link,
            relayed: false,
            seed: conditions.guest_seed,
            patience: PATIENCE,
            run_before: Duration::from_millis(conditions.run_before_ms),
            run_after: Duration::from_millis(conditions.run_after_ms),
            verify: conditions.verify,
            voice: Voice::Kept,
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (workload, memory) = (self.workload.short(), self.memory_name());
        let Self { guest, mode, policy, vcpus, backing, push_lanes, link, .. } = self;
        let guest = guest.name();
        f.pad(&format!(
            "{guest} {workload} {mode} {policy} {memory} {vcpus}vcpu {backing} {push_lanes}lane {link}"
        ))
    }
}

fn arguments<const N: usize>(pairs: [(&str, String); N]) -> impl Iterator<Item = String> {
    pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value])
}

fn written(time: Duration) -> String {
    humantime::format_duration(time).to_string()
}

fn memory_name(bytes: u64) -> String {
    [(30, "G"), (20, "M"), (10, "K")]
        .into_iter()
        .find(|(shift, _)| bytes.is_multiple_of(1 << shift))
        .map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

/// A backing by its name on the command line.
mod backing {
    use super::{DestinationBacking, ValueEnum};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(it: &DestinationBacking, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(it)
    }

    pub fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<DestinationBacking, D::Error> {
        let name = String::deserialize(from)?;
        DestinationBacking::from_str(&name, false).map_err(D::Error::custom)
    }
}

/// A mode by its name on the command line.
mod mode {
    use super::Mode;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(it: &Mode, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(it.name())
    }

    pub fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Mode, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan::tests::plan;

    #[test]
    fn a_mode_is_in_the_name_in_the_file_and_on_the_command_line() {
        let conditions =
            Conditions { hybrid_rounds: 3, max_downtime_us: 1500, ..plan().conditions };
        for mode in Mode::ALL {
            let cell = Cell { mode, ..plan().cells[1].clone() };
            let (name, slug) = (cell.to_string(), cell.slug());
            assert!(name.starts_with(&format!("process random {mode} bubbling 8M ")), "{name}");
            assert_eq!(
                slug,
                format!(
                    "process-random-{mode}-bubbling-8M-1vcpu-memfd-continue-1lane-1Gbit-1ms-0.1pct"
                )
            );
            let json = serde_json::to_value(&cell).unwrap();
            assert_eq!(json["mode"], mode.name());
            assert_eq!(serde_json::from_value::<Cell>(json).unwrap(), cell);
            let arguments = cell.trial(&conditions).policy.join(" ");
            let wanted = format!(" --mode {mode} --rounds 3 --max-downtime 1ms 500us");
            assert!(arguments.ends_with(&wanted), "{arguments}");
        }
    }

    #[test]
    fn a_cell_of_an_earlier_version_is_one_of_post_copy() {
        let cell = plan().cells[0].clone();
        let mut json = serde_json::to_value(&cell).unwrap();
        assert!(json.as_object_mut().unwrap().remove("mode").is_some());
        assert_eq!(serde_json::from_value::<Cell>(json.clone()).unwrap(), cell);
        json["mode"] = "best".into();
        assert!(serde_json::from_value::<Cell>(json).is_err());
    }
}
