//! [`Cell`]: one combination of all that a benchmark varies.

use super::plan::Conditions;
use crate::proto::prepaging::PolicyKind;
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
            guest: guest.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect(),
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
        let Self { guest, policy, vcpus, backing, push_lanes, link, .. } = self;
        let guest = guest.name();
        f.pad(&format!(
            "{guest} {workload} {policy} {memory} {vcpus}vcpu {backing} {push_lanes}lane {link}"
        ))
    }
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
