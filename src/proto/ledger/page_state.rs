//! The states of a page at the destination, and which one follows which: pure
//! functions. Who may call them when, and why, is in
//! [`destination`](super::destination).

/// What is known of a page, apart from whether somebody is placing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Its bytes are not here.
    Missing = 0,
    /// Its bytes are not here and somebody waits for them.
    Requested = 1,
    /// Known to be zero, over memory that was never written.
    Zero = 2,
    /// Its bytes are in place. It is never in hand.
    Placed = 3,
    /// Given back by the guest: it reads as zero and is never fetched again.
    /// Whether it is mapped at the moment, the ledger does not know.
    Removed = 4,
    /// Its bytes are lost: the source could not read them, and whoever touches it gets a
    /// memory error. It is never in hand.
    Poisoned = 5,
}

/// The state of a page: four bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageState {
    pub(super) kind: Kind,
    /// Somebody has the page in hand to place it.
    pub(super) placing: bool,
}

/// What a fault on a page calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnFault {
    Request,
    Wait,
    Wake,
    Zero,
}

/// What a page that arrives again is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Duplicate,
    Unwanted,
}

use Kind::{Missing, Placed, Poisoned, Removed, Requested, Zero};

impl PageState {
    pub(super) const BITS: u32 = 4;
    pub(super) const MASK: u64 = 0xf;
    const PLACING: u8 = 8;

    pub(super) const fn at_rest(kind: Kind) -> Self {
        Self { kind, placing: false }
    }

    const fn in_hand(kind: Kind) -> Self {
        Self { kind, placing: true }
    }

    /// The state of the lowest four bits, which [`bits`](Self::bits) has made.
    pub(super) fn from_bits(bits: u64) -> Self {
        let bits = bits as u8 & Self::MASK as u8;
        let kind = match bits & !Self::PLACING {
            0 => Missing,
            1 => Requested,
            2 => Zero,
            3 => Placed,
            4 => Removed,
            _ => Poisoned,
        };
        Self { kind, placing: bits & Self::PLACING != 0 }
    }

    pub(super) fn bits(self) -> u64 {
        let placing = if self.placing { Self::PLACING } else { 0 };
        u64::from(self.kind as u8 | placing)
    }

    /// A vCPU, or another thread, stands still at the page.
    pub(super) fn fault(self) -> (Self, OnFault) {
        match (self.kind, self.placing) {
            (Missing, false) => (Self::at_rest(Requested), OnFault::Request),
            (Requested, false) => (self, OnFault::Wait),
            (Zero | Removed, false) => (Self::in_hand(self.kind), OnFault::Zero),
            // In hand: remembered, for the case that it is handed back.
            (Missing, true) => (Self::in_hand(Requested), OnFault::Wait),
            (Requested | Zero | Removed, true) => (self, OnFault::Wait),
            (Placed | Poisoned, _) => (self, OnFault::Wake),
        }
    }

    /// The page's bytes are here, to be placed by the caller.
    pub(super) fn land(self) -> Result<Self, Refusal> {
        match (self.kind, self.placing) {
            (Missing | Requested, false) => Ok(Self::in_hand(self.kind)),
            (Removed, _) => Err(Refusal::Unwanted),
            _ => Err(Refusal::Duplicate),
        }
    }

    /// The source says that the page is zero. Where somebody waits for it, the
    /// new state is one in hand, and the caller's to place.
    pub(super) fn mark_zero(self) -> Result<Self, Refusal> {
        match (self.kind, self.placing) {
            (Missing, false) => Ok(Self::at_rest(Zero)),
            (Requested, false) => Ok(Self::in_hand(Zero)),
            (Removed, _) => Err(Refusal::Unwanted),
            _ => Err(Refusal::Duplicate),
        }
    }

    /// The guest has given the page back. Where somebody waits for it, the new
    /// state is one in hand that was not, and the caller's to place.
    pub(super) fn remove(self) -> Self {
        Self { kind: Removed, placing: self.placing || self.kind == Requested }
    }

    /// Who had the page in hand has placed it. A page that was removed
    /// meanwhile, or before, may be unmapped again by now, so it stays removed
    /// and its next fault is answered with zeros rather than with a wake-up.
    pub(super) fn placed(self) -> Self {
        match self.kind {
            Removed => Self::at_rest(Removed),
            _ => Self::at_rest(Placed),
        }
    }

    /// Who had the page in hand has poisoned it. One that was removed meanwhile stays removed.
    pub(super) fn poisoned(self) -> Self {
        match self.kind {
            Removed => Self::at_rest(Removed),
            _ => Self::at_rest(Poisoned),
        }
    }

    /// Who had the page in hand gives it up.
    pub(super) fn hand_back(self) -> Self {
        Self::at_rest(self.kind)
    }

    /// Whether nothing remains to be done for the page but to answer faults: the source need
    /// not send it again.
    pub(super) fn is_settled(self) -> bool {
        matches!(self.kind, Zero | Placed | Removed | Poisoned)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::fmt::Write;

    fn all() -> impl Iterator<Item = PageState> {
        let kinds = [Missing, Requested, Zero, Placed, Removed, Poisoned];
        let at_rest = kinds.map(PageState::at_rest);
        at_rest.into_iter().chain([Missing, Requested, Zero, Removed].map(PageState::in_hand))
    }

    fn name(state: PageState) -> String {
        format!("{:?}{}", state.kind, if state.placing { "*" } else { "" })
    }

    #[test]
    fn every_state_has_its_own_four_bits() {
        for state in all() {
            assert!(state.bits() <= PageState::MASK);
            assert_eq!(PageState::from_bits(state.bits()), state);
        }
        assert_eq!(PageState::from_bits(0), PageState::at_rest(Missing), "a new ledger's words");
    }

    /// Every state and event; `*` is a page in hand.
    #[test]
    fn the_table_of_states_is_this() {
        let mut table = String::new();
        let mut line = |cells: [String; 6]| {
            let cells = cells.map(|cell| format!("{cell:<16}")).concat();
            writeln!(table, "{}", cells.trim_end()).unwrap();
        };
        line(["state", "fault", "", "land", "mark_zero", "remove"].map(String::from));
        for state in all() {
            let refused = |refusal: Refusal| format!("{refusal:?}!");
            let (next, answer) = state.fault();
            line([
                name(state),
                name(next),
                format!("{answer:?}"),
                state.land().map_or_else(refused, name),
                state.mark_zero().map_or_else(refused, name),
                name(state.remove()),
            ]);
        }
        insta::assert_snapshot!(table, @r"
        state           fault                           land            mark_zero       remove
        Missing         Requested       Request         Missing*        Zero            Removed
        Requested       Requested       Wait            Requested*      Zero*           Removed*
        Zero            Zero*           Zero            Duplicate!      Duplicate!      Removed
        Placed          Placed          Wake            Duplicate!      Duplicate!      Removed
        Removed         Removed*        Zero            Unwanted!       Unwanted!       Removed
        Poisoned        Poisoned        Wake            Duplicate!      Duplicate!      Removed
        Missing*        Requested*      Wait            Duplicate!      Duplicate!      Removed*
        Requested*      Requested*      Wait            Duplicate!      Duplicate!      Removed*
        Zero*           Zero*           Wait            Duplicate!      Duplicate!      Removed*
        Removed*        Removed*        Wait            Unwanted!       Unwanted!       Removed*
        ");
    }
}
