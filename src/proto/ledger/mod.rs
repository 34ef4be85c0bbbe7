//! The page ledgers: which page is where, on either side of a migration.
//!
//! ```text
//! source       Unsent -> Claimed -> Sent
//! destination  Missing -> Requested -> Placing -> Placed
//!              and known zero, Removed, Poisoned
//! ```
//!
//! A ledger holds no page, sends nothing and waits for nothing. It is shared by
//! all threads of its side; no lock is held across a copy or a send. What a
//! thread may do with pages it gets as a value that cannot be copied: a
//! [`Claim`] to send them, a [`Landing`] to place them, and [`Drained`], the
//! proof that no page is missing.

mod destination;
mod landing;
#[cfg(all(test, loom))]
mod loom_models;
mod page_state;
mod source;
mod state_table;
#[cfg(all(test, not(loom)))]
mod tests;

pub use destination::{
    DestinationCounts, DestinationLedger, Drained, FaultAnswer, OutOfRange, Unfinished,
};
pub use landing::{Landing, Landings};
pub use source::{Claim, Claims, ResumeError, SourceCounts, SourceLedger, StaleEpoch, Unwritten};

use serde::{Deserialize, Serialize};
use std::fmt;

/// The number of a link epoch: the time between two losses of the link, or
/// between an aborted commit and the next attempt. It only ever rises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LinkEpoch(u32);

impl LinkEpoch {
    /// The epoch that a migration begins with.
    pub const FIRST: Self = Self(0);

    /// The epoch with this number.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The epoch after this one; `None` after 2^32 of them.
    pub const fn next(self) -> Option<Self> {
        match self.0.checked_add(1) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
}

impl fmt::Display for LinkEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "link epoch {}", self.0)
    }
}
