//! Which ports of a link are up, each direction for itself.
//!
//! A count for each: even is up, odd is down. A datagram on its way remembers the count that it
//! left under, so it is lost by a cut that came and went while it was under way. No IO.

use super::{PORTS_MAX, Way};
use std::sync::atomic::{AtomicU64, Ordering};

/// The state of every port, both directions.
#[derive(Debug, Default)]
pub(super) struct Switch {
    to_target: [AtomicU64; PORTS_MAX],
    to_client: [AtomicU64; PORTS_MAX],
}

/// The state under which a datagram left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch(u64);

impl Switch {
    /// Takes a port's direction down or up again; nothing if it is so already.
    /// A port that does not exist is ignored.
    pub(super) fn set(&self, port: usize, way: Way, down: bool) {
        if let Some(count) = self.counts(way).get(port) {
            let flip = |now: u64| (is_down(now) != down).then_some(now + 1);
            // Refused means that nothing is to be done.
            let _ = count.fetch_update(Ordering::AcqRel, Ordering::Acquire, flip);
        }
    }

    /// Loses what is on its way, and leaves the port as it is.
    pub(super) fn flush(&self, port: usize, way: Way) {
        if let Some(count) = self.counts(way).get(port) {
            count.fetch_add(2, Ordering::AcqRel);
        }
    }

    /// What a datagram that leaves now has to remember; `None` if the port is down.
    pub(super) fn up(&self, port: usize, way: Way) -> Option<Stretch> {
        let now = self.counts(way).get(port)?.load(Ordering::Acquire);
        (!is_down(now)).then_some(Stretch(now))
    }

    fn counts(&self, way: Way) -> &[AtomicU64; PORTS_MAX] {
        match way {
            Way::ToTarget => &self.to_target,
            Way::ToClient => &self.to_client,
        }
    }
}

fn is_down(count: u64) -> bool {
    count % 2 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_that_came_and_went_is_another_stretch() {
        let switch = Switch::default();
        let before = switch.up(3, Way::ToTarget);
        assert!(before.is_some());
        switch.set(3, Way::ToTarget, false);
        assert_eq!(switch.up(3, Way::ToTarget), before, "it was up already");
        switch.set(3, Way::ToTarget, true);
        switch.set(3, Way::ToTarget, true);
        assert_eq!(switch.up(3, Way::ToTarget), None);
        assert!(switch.up(3, Way::ToClient).is_some() && switch.up(2, Way::ToTarget).is_some());
        switch.set(3, Way::ToTarget, false);
        let after = switch.up(3, Way::ToTarget);
        assert!(after.is_some() && after != before);
        switch.flush(3, Way::ToTarget);
        assert!(switch.up(3, Way::ToTarget).is_some_and(|now| Some(now) != after));
        assert_eq!(switch.up(PORTS_MAX, Way::ToTarget), None);
    }
}
