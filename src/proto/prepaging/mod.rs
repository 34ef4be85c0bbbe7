//! Pre-paging: which pages the source pushes next, without being asked.
//!
//! A [`Policy`] is a pure state machine on the source's push thread. It hears of
//! the faults that reach the source and of the link, and hands out runs of pages,
//! one at a time. It keeps no account of what was sent: that is the source
//! ledger's, seen here as [`Unsent`], and only the ledger's claim decides. How
//! *much* may be under way is not decided here either, see
//! [`pacing`](super::pacing).

mod bubbling;
mod demand_only;
mod linear;
#[cfg(test)]
mod model;
#[cfg(test)]
mod properties;

pub use bubbling::Bubbling;
pub use demand_only::DemandOnly;
pub use linear::Linear;

use super::page::{PageIndex, PageRun};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A request for a page that reached the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The page asked for.
    pub page: PageIndex,
    /// The vCPU that waits for it, if the fault came from one.
    pub vcpu: Option<u32>,
    /// When it reached the source, counted from the session's beginning.
    pub at: Duration,
}

/// What a policy may know about the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// The urgent lane's round trip now.
    pub rtt: Duration,
    /// Its round trip when no queue stands on the path.
    pub base_rtt: Duration,
    /// What the push lanes deliver, in bits a second; 0 if not known yet.
    pub rate_bps: u64,
}

/// The pages that the source has not claimed yet, as its ledger sees them.
///
/// Other threads claim pages meanwhile, so an answer may be out of date when it
/// arrives; but a page never becomes unsent again within a link epoch.
pub trait Unsent {
    /// How many pages the guest has, sent ones included.
    fn pages(&self) -> u64;
    /// Whether `page` is still to be claimed; `false` out of range.
    fn is_unsent(&self, page: PageIndex) -> bool;
    /// The first unsent page at or above `from`.
    fn next_unsent(&self, from: PageIndex) -> Option<PageIndex>;
    /// The last unsent page at or below `from`.
    fn prev_unsent(&self, from: PageIndex) -> Option<PageIndex>;
}

/// Why a run is pushed. Reports count the two apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Pre-paging, while the guest may still fault on these pages.
    Push,
    /// What a policy that pushes nothing sends at the end, so that there is one.
    Drain,
}

/// A run to push. All its pages were unsent when it was made; the ledger's claim
/// has the last word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suggestion {
    /// The pages.
    pub run: PageRun,
    /// Why.
    pub origin: Origin,
}

/// An order in which to push pages.
///
/// Every page number that comes in may be hostile: what is out of range is
/// ignored, and the state kept is bounded whatever comes.
pub trait Policy: Send + fmt::Debug {
    /// Its name as on the command line and in reports.
    fn name(&self) -> &'static str;

    /// The guest asked for a page that had not been claimed: a network fault.
    fn fault(&mut self, fault: Fault);

    /// The guest asked for a page that was already on its way.
    fn late_hit(&mut self, fault: Fault);

    /// The link as measured last.
    fn link(&mut self, link: LinkState);

    /// Push all that is left: the workload ended, or the time for measuring
    /// faults alone is over. Cannot be taken back.
    fn drain(&mut self);

    /// The next run to push, of at most `pages_max` pages; `None` if there is
    /// nothing to push now. A suggestion counts as taken: the next one goes on
    /// after it, though pages that were not claimed come up again later.
    fn next(&mut self, unsent: &dyn Unsent, pages_max: u32) -> Option<Suggestion>;
}

/// The policies that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyKind {
    /// Nothing until the drain: [`DemandOnly`].
    DemandOnly,
    /// Upward from the last fault: [`Linear`].
    Linear,
    /// Around the last faults: [`Bubbling`].
    #[default]
    Bubbling,
}

/// What a policy is built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyConfig {
    /// How many pages the guest has.
    pub pages: u64,
    /// The most pivots that bubbling keeps, 1 to [`PIVOTS_MAX`]; what is outside is clamped.
    pub pivots_max: usize,
}

/// The most pivots that any bubbling policy keeps: each costs a look at every
/// suggestion.
pub const PIVOTS_MAX: usize = 64;

/// Pivots unless told otherwise; Hines and Gopalan found little gain beyond seven.
pub const PIVOTS_DEFAULT: usize = 7;

impl PolicyConfig {
    /// The default for a guest of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self { pages, pivots_max: PIVOTS_DEFAULT }
    }
}

impl PolicyKind {
    /// All of them.
    pub const ALL: [PolicyKind; 3] =
        [PolicyKind::DemandOnly, PolicyKind::Linear, PolicyKind::Bubbling];

    /// Its name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DemandOnly => "demand-only",
            Self::Linear => "linear",
            Self::Bubbling => "bubbling",
        }
    }

    /// A policy of this kind, with nothing heard yet.
    pub fn build(self, config: PolicyConfig) -> Box<dyn Policy> {
        match self {
            Self::DemandOnly => Box::new(DemandOnly::new()),
            Self::Linear => Box::new(Linear::new(config)),
            Self::Bubbling => Box::new(Bubbling::new(config)),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no policy has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no pre-paging policy is called {0:?}; there are demand-only, linear and bubbling")]
pub struct UnknownPolicy(pub String);

impl FromStr for PolicyKind {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| UnknownPolicy(name.chars().take(64).collect()))
    }
}

/// The first run of unsent pages at or above `from`, cut at `pages_max`.
fn run_up(unsent: &dyn Unsent, from: u64, pages_max: u32) -> Option<PageRun> {
    if pages_max == 0 || from >= unsent.pages() {
        return None;
    }
    let first = unsent.next_unsent(PageIndex::new(from))?;
    let more = (1..u64::from(pages_max))
        .take_while(|&n| first.checked_add(n).is_some_and(|page| unsent.is_unsent(page)))
        .count();
    PageRun::new(first, 1 + more as u64)
}

/// The last run of unsent pages at or below `from`, cut at `pages_max`.
fn run_down(unsent: &dyn Unsent, from: u64, pages_max: u32) -> Option<PageRun> {
    if pages_max == 0 {
        return None;
    }
    let last = unsent.prev_unsent(PageIndex::new(from))?.get();
    let more = (1..u64::from(pages_max))
        .take_while(|&n| {
            last.checked_sub(n).is_some_and(|page| unsent.is_unsent(PageIndex::new(page)))
        })
        .count() as u64;
    PageRun::new(PageIndex::new(last - more), 1 + more)
}

/// As [`run_up`], going on at page 0 when nothing is left above.
fn run_around(unsent: &dyn Unsent, from: u64, pages_max: u32) -> Option<PageRun> {
    run_up(unsent, from, pages_max).or_else(|| run_up(unsent, 0, pages_max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for kind in PolicyKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            assert_eq!(kind.build(PolicyConfig::new(16)).name(), kind.name());
        }
        assert_eq!("Linear".parse::<PolicyKind>(), Err(UnknownPolicy("Linear".into())));
    }
}
