//! What all migrations of a run came to.

use super::plan::{Failure, Phase};
use super::verdict::Outcome;
use std::collections::BTreeMap;
use std::fmt;

/// One hit, and what is known of it.
#[derive(Clone, Debug)]
pub struct HitSeen {
    pub failure: Failure,
    pub aimed: Phase,
    /// The phase that it is proven to have struck in, and by what; or why it is not.
    pub proof: Result<(Phase, String), String>,
}

/// Counts.
#[derive(Default)]
pub struct Tally {
    hits: BTreeMap<&'static str, [u32; Phase::ALL.len()]>,
    outcomes: BTreeMap<Phase, BTreeMap<String, u32>>,
    unproven: u32,
    pub migrations: u32,
    pub redrawn: u32,
    /// What went wrong, with the seed.
    pub failed: Vec<String>,
}

impl Tally {
    /// Takes in a migration that was verified.
    pub fn verified(&mut self, hits: &[HitSeen], outcome: Outcome) {
        self.migrations += 1;
        for hit in hits {
            let Ok((phase, _)) = &hit.proof else {
                self.unproven += 1;
                continue;
            };
            self.hits.entry(hit.failure.name()).or_default()[*phase as usize] += 1;
            *self.outcomes.entry(*phase).or_default().entry(outcome.to_string()).or_default() += 1;
        }
    }

    /// Proven hits in a phase.
    pub fn proven(&self, phase: Phase) -> u32 {
        self.hits.values().map(|counts| counts[phase as usize]).sum()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "chaos: proven hits by failure and phase")?;
        write!(f, "{:32}", "")?;
        for phase in Phase::ALL {
            write!(f, "{:>16}", phase.name())?;
        }
        for (failure, counts) in &self.hits {
            write!(f, "\n{failure:32}")?;
            for count in counts {
                write!(f, "{count:>16}")?;
            }
        }
        write!(f, "\n{:32}", "all")?;
        for phase in Phase::ALL {
            write!(f, "{:>16}", self.proven(phase))?;
        }
        for (phase, outcomes) in &self.outcomes {
            let outcomes: Vec<String> =
                outcomes.iter().map(|(outcome, count)| format!("{count} {outcome}")).collect();
            write!(f, "\n{:32}{}", phase.name(), outcomes.join(", "))?;
        }
        write!(
            f,
            "\nchaos: {} migrations, every guest verified in {}; {} hits unproven or too late; \
             {} migrations were for redrawn hits",
            self.migrations,
            self.migrations as usize - self.failed.len(),
            self.unproven,
            self.redrawn,
        )
    }
}
