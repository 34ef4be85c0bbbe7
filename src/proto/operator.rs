//! What an operator may have done to a session, and what each costs: the vocabulary that
//! both sides share.
//!
//! Which of it is possible in which state is in [`source`](super::source) and
//! [`destination`](super::destination), beside what it does there.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Something that an operator has done to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Pause the guest and have it move now, whatever of it has been copied.
    Switch,
    /// Send no page that no vCPU waits for, until it is to go on.
    Hold,
    /// Go on sending pages.
    GoOn,
    /// Change the limits on bandwidth and downtime.
    Limit,
    /// Look for the destination at another address.
    Redirect,
    /// End the session.
    GiveUp,
    /// Run the guest at the source although it was committed.
    TakeBack,
}

impl Command {
    /// Every one.
    pub const ALL: [Self; 7] = [
        Self::Switch,
        Self::Hold,
        Self::GoOn,
        Self::Limit,
        Self::Redirect,
        Self::GiveUp,
        Self::TakeBack,
    ];

    /// Its name on a command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Switch => "switch",
            Self::Hold => "hold",
            Self::GoOn => "go-on",
            Self::Limit => "limit",
            Self::Redirect => "redirect",
            Self::GiveUp => "give-up",
            Self::TakeBack => "take-back",
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What an operator must say that he has understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Risk {
    /// The guest may be lost for good.
    LoseTheGuest,
    /// The guest may run on two hosts at once, each a different one from now on.
    TwoRunningGuests,
}

impl Risk {
    /// The argument that says so on a command line.
    pub const fn flag(self) -> &'static str {
        match self {
            Self::LoseTheGuest => "--yes-lose-the-guest",
            Self::TwoRunningGuests => "--yes-it-runs-nowhere-else",
        }
    }
}

/// What follows from a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Consequence {
    /// In words.
    pub text: &'static str,
    /// What must be acknowledged, if anything must.
    pub risk: Option<Risk>,
}

impl Consequence {
    /// One that nothing needs to be acknowledged for.
    pub(super) const fn harmless(text: &'static str) -> Self {
        Self { text, risk: None }
    }

    /// One that takes an acknowledgement.
    pub(super) const fn risky(risk: Risk, text: &'static str) -> Self {
        Self { text, risk: Some(risk) }
    }
}

/// Where the guest is, as far as one side knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Whereabouts {
    /// It runs at the source, or is being paused there.
    Source,
    /// It runs nowhere: it is on its way, or lost.
    Nowhere,
    /// It was, or may have been, given to the destination, and nobody here knows whether
    /// it runs there.
    InDoubt,
    /// It runs at the destination.
    Destination,
}

impl Whereabouts {
    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Source => "runs at the source",
            Self::Nowhere => "runs nowhere",
            Self::InDoubt => {
                "is in doubt: this side cannot know whether it runs at the destination"
            }
            Self::Destination => "runs at the destination",
        }
    }
}
