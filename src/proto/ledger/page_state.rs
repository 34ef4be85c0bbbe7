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
    /// As `Missing`, but the memory holds old bytes.
    Stale = 2,
    /// As `Requested`, but the memory holds old bytes.
    StaleRequested = 3,
    /// Known to be zero, over memory that was never written.
    Zero = 4,
    /// Known to be zero, but the memory holds old bytes.
    StaleZero = 5,
    /// Its bytes are in place.
    Placed = 6,
    /// Given back by the guest: it reads as zero and is never fetched again.
    /// Whether it is mapped at the moment, the ledger does not know.
    Removed = 7,
    /// Its bytes are lost: the source could not read them, and whoever touches it gets a
    /// memory error. It is never in hand, and uses the bits that a placed page in hand would.
    Poisoned = 14,
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

use Kind::{Missing, Placed, Poisoned, Removed, Requested, Stale, StaleRequested, StaleZero, Zero};

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

    /// The state of the lowest four bits.
    pub(super) fn from_bits(bits: u64) -> Self {
        const KINDS: [Kind; 8] =
            [Missing, Requested, Stale, StaleRequested, Zero, StaleZero, Placed, Removed];
        let bits = bits as u8 & Self::MASK as u8;
        if bits == Poisoned as u8 {
            return Self::at_rest(Poisoned);
        }
        Self { kind: KINDS[usize::from(bits & 7)], placing: bits & Self::PLACING != 0 }
    }

    pub(super) fn bits(self) -> u64 {
        let placing = if self.placing { Self::PLACING } else { 0 };
        u64::from(self.kind as u8 | placing)
    }

    /// A vCPU, or another thread, stands still at the page.
    pub(super) fn fault(self) -> (Self, OnFault) {
        match (self.kind, self.placing) {
            (Missing, false) => (Self::at_rest(Requested), OnFault::Request),
            (Stale, false) => (Self::at_rest(StaleRequested), OnFault::Request),
            (Requested | StaleRequested, false) => (self, OnFault::Wait),
            (Zero | StaleZero | Removed, false) => (Self::in_hand(self.kind), OnFault::Zero),
            // In hand: remembered, for the case that it is handed back.
            (Missing, true) => (Self::in_hand(Requested), OnFault::Wait),
            (Stale, true) => (Self::in_hand(StaleRequested), OnFault::Wait),
            (Requested | StaleRequested | Zero | StaleZero | Removed, true) => {
                (self, OnFault::Wait)
            }
            (Placed | Poisoned, _) => (self, OnFault::Wake),
        }
    }

    /// The page's bytes are here, to be placed by the caller.
    pub(super) fn land(self) -> Result<Self, Refusal> {
        match (self.kind, self.placing) {
            (Missing | Requested | Stale | StaleRequested, false) => Ok(Self::in_hand(self.kind)),
            (Removed, _) => Err(Refusal::Unwanted),
            _ => Err(Refusal::Duplicate),
        }
    }

    /// The caller would place zeros for a page that is known to be zero.
    pub(super) fn land_zero(self) -> Option<Self> {
        matches!(self, Self { kind: Zero | StaleZero, placing: false })
            .then_some(Self::in_hand(self.kind))
    }

    /// The source says that the page is zero. Where somebody waits for it, the
    /// new state is one in hand, and the caller's to place.
    pub(super) fn mark_zero(self) -> Result<Self, Refusal> {
        match (self.kind, self.placing) {
            (Missing, false) => Ok(Self::at_rest(Zero)),
            (Stale, false) => Ok(Self::at_rest(StaleZero)),
            (Requested, false) => Ok(Self::in_hand(Zero)),
            (StaleRequested, false) => Ok(Self::in_hand(StaleZero)),
            (Removed, _) => Err(Refusal::Unwanted),
            _ => Err(Refusal::Duplicate),
        }
    }

    /// The guest has given the page back. Where somebody waits for it, the new
    /// state is one in hand that was not, and the caller's to place.
    pub(super) fn remove(self) -> Self {
        let waited_for = matches!(self.kind, Requested | StaleRequested);
        Self { kind: Removed, placing: self.placing || waited_for }
    }

    /// The page is to be fetched again; `None` if it is in hand.
    pub(super) fn discard(self) -> Option<Self> {
        match (self.kind, self.placing) {
            (_, true) => None,
            (Placed | StaleZero, _) => Some(Self::at_rest(Stale)),
            (Zero, _) => Some(Self::at_rest(Missing)),
            (Missing | Requested | Stale | StaleRequested | Removed | Poisoned, _) => Some(self),
        }
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

    /// Whether nothing remains to be done for the page but to answer faults.
    pub(super) fn is_settled(self) -> bool {
        matches!(self.kind, Zero | Placed | Removed | Poisoned)
    }

    /// Whether the source need not send the page again.
    pub(super) fn is_known(self) -> bool {
        matches!(self.kind, Zero | StaleZero | Placed | Removed | Poisoned)
    }

    /// Whether the page may have been placed before and is rightly placed again.
    pub(super) fn may_be_placed_again(self) -> bool {
        matches!(self.kind, Stale | StaleRequested | StaleZero | Removed)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::fmt::Write;

    fn all() -> impl Iterator<Item = PageState> {
        (0..16).map(PageState::from_bits)
    }

    fn name(state: PageState) -> String {
        format!("{:?}{}", state.kind, if state.placing { "*" } else { "" })
    }

    #[test]
    fn every_state_has_its_own_four_bits() {
        for (bits, state) in (0..).zip(all()) {
            assert_eq!(state.bits(), bits);
        }
        assert_eq!(PageState::from_bits(0), PageState::at_rest(Missing), "a new ledger's words");
    }

    /// Every state and event; `*` is a page in hand.
    #[test]
    fn the_table_of_states_is_this() {
        let mut table = String::new();
        let mut line = |cells: [String; 8]| {
            let cells = cells.map(|cell| format!("{cell:<16}")).concat();
            writeln!(table, "{}", cells.trim_end()).unwrap();
        };
        line(
            ["state", "fault", "", "land", "mark_zero", "land_zero", "remove", "discard"]
                .map(String::from),
        );
        for state in all() {
            let refused = |refusal: Refusal| format!("{refusal:?}!");
            let (next, answer) = state.fault();
            line([
                name(state),
                name(next),
                format!("{answer:?}"),
                state.land().map_or_else(refused, name),
                state.mark_zero().map_or_else(refused, name),
                state.land_zero().map_or("-".into(), name),
                name(state.remove()),
                state.discard().map_or("InHand!".into(), name),
            ]);
        }
        insta::assert_snapshot!(table, @r"
        state           fault                           land            mark_zero       land_zero       remove          discard
        Missing         Requested       Request         Missing*        Zero            -               Removed         Missing
        Requested       Requested       Wait            Requested*      Zero*           -               Removed*        Requested
        Stale           StaleRequested  Request         Stale*          StaleZero       -               Removed         Stale
        StaleRequested  StaleRequested  Wait            StaleRequested* StaleZero*      -               Removed*        StaleRequested
        Zero            Zero*           Zero            Duplicate!      Duplicate!      Zero*           Removed         Missing
        StaleZero       StaleZero*      Zero            Duplicate!      Duplicate!      StaleZero*      Removed         Stale
        Placed          Placed          Wake            Duplicate!      Duplicate!      -               Removed         Stale
        Removed         Removed*        Zero            Unwanted!       Unwanted!       -               Removed         Removed
        Missing*        Requested*      Wait            Duplicate!      Duplicate!      -               Removed*        InHand!
        Requested*      Requested*      Wait            Duplicate!      Duplicate!      -               Removed*        InHand!
        Stale*          StaleRequested* Wait            Duplicate!      Duplicate!      -               Removed*        InHand!
        StaleRequested* StaleRequested* Wait            Duplicate!      Duplicate!      -               Removed*        InHand!
        Zero*           Zero*           Wait            Duplicate!      Duplicate!      -               Removed*        InHand!
        StaleZero*      StaleZero*      Wait            Duplicate!      Duplicate!      -               Removed*        InHand!
        Poisoned        Poisoned        Wake            Duplicate!      Duplicate!      -               Removed         Poisoned
        Removed*        Removed*        Wait            Unwanted!       Unwanted!       -               Removed*        InHand!
        ");
    }
}
