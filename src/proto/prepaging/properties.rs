//! The policies against a plain set, under any stream of events.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

/// Unsent pages, as a set of numbers.
#[derive(Clone, Debug)]
pub(super) struct Set {
    pages: u64,
    unsent: BTreeSet<u64>,
}

impl Set {
    /// All pages unsent.
    pub(super) fn full(pages: u64) -> Self {
        Self { pages, unsent: (0..pages).collect() }
    }

    /// Takes `page` out; says whether it was in.
    pub(super) fn remove(&mut self, page: PageIndex) -> bool {
        self.unsent.remove(&page.get())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.unsent.is_empty()
    }
}

impl Unsent for Set {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn is_unsent(&self, page: PageIndex) -> bool {
        self.unsent.contains(&page.get())
    }

    fn next_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.unsent.range(from.get()..).next().copied().map(PageIndex::new)
    }

    fn prev_unsent(&self, from: PageIndex) -> Option<PageIndex> {
        self.unsent.range(..=from.get()).next_back().copied().map(PageIndex::new)
    }
}

#[derive(Clone, Copy, Debug)]
enum Act {
    /// A request for this page, `after` microseconds later; the source decides
    /// whether it is a fault or a late hit.
    Ask {
        page: u64,
        after: u64,
    },
    /// A hostile late hit: nobody checks that the page was sent.
    LateHit {
        page: u64,
    },
    Link {
        rtt_us: u64,
        rate_bps: u64,
    },
    /// Suggestions taken, with this bound; `refused` of them lose to another claimer.
    Push {
        pages_max: u32,
        runs: u32,
        refused: bool,
    },
}

fn act(pages: u64) -> impl Strategy<Value = Act> {
    // Mostly pages near each other, so that bubbles meet and streams form.
    let page = prop_oneof![
        4 => 0..pages,
        6 => (0..pages / 8 + 1).prop_map(move |page| (page + pages / 2).min(pages - 1)),
        1 => any::<u64>(),
    ];
    prop_oneof![
        6 => (page.clone(), 0..3000u64).prop_map(|(page, after)| Act::Ask { page, after }),
        2 => page.prop_map(|page| Act::LateHit { page }),
        1 => (any::<u64>(), any::<u64>()).prop_map(|(rtt_us, rate_bps)| Act::Link { rtt_us, rate_bps }),
        4 => (0..=70u32, 0..6u32, any::<bool>())
            .prop_map(|(pages_max, runs, refused)| Act::Push { pages_max, runs, refused }),
    ]
}

fn take(
    policy: &mut dyn Policy,
    set: &mut Set,
    pages_max: u32,
    refused: bool,
) -> Option<Suggestion> {
    let next = policy.next(set, pages_max)?;
    assert!(next.run.count() <= u64::from(pages_max));
    assert!(next.run.end() <= set.pages());
    for page in next.run.pages() {
        assert!(set.is_unsent(page), "{policy:?} suggests {page}, which is sent");
        if !refused {
            set.remove(page);
        }
    }
    Some(next)
}

proptest! {
    #[test]
    fn suggestions_are_unsent_and_a_drain_covers_all(
        kind in prop::sample::select(PolicyKind::ALL.to_vec()),
        (pages, acts) in (1..3000u64)
            .prop_flat_map(|pages| (Just(pages), prop::collection::vec(act(pages), 0..200))),
        pivots_max in 0..12usize,
        drain_max in 1..=64u32,
    ) {
        let mut policy = kind.build(PolicyConfig { pages, pivots_max });
        let mut set = Set::full(pages);
        let mut at = Duration::ZERO;
        for act in acts {
            match act {
                Act::Ask { page, after } => {
                    at += Duration::from_micros(after);
                    let fault = Fault { page: PageIndex::new(page), vcpu: None, at };
                    if set.remove(fault.page) || page >= pages {
                        policy.fault(fault);
                    } else {
                        policy.late_hit(fault);
                    }
                }
                Act::LateHit { page } => {
                    policy.late_hit(Fault { page: PageIndex::new(page), vcpu: Some(7), at });
                }
                Act::Link { rtt_us, rate_bps } => {
                    let rtt = Duration::from_micros(rtt_us);
                    policy.link(LinkState { rtt, base_rtt: rtt / 2, rate_bps });
                }
                Act::Push { pages_max, runs, refused } => {
                    for _ in 0..runs {
                        let empty = set.is_empty();
                        let next = take(&mut *policy, &mut set, pages_max, refused);
                        if kind == PolicyKind::DemandOnly || pages_max == 0 || empty {
                            prop_assert_eq!(next, None);
                        } else {
                            prop_assert_eq!(next.map(|next| next.origin), Some(Origin::Push));
                        }
                    }
                }
            }
        }
        policy.drain();
        let mut runs = 0;
        while let Some(next) = take(&mut *policy, &mut set, drain_max, false) {
            prop_assert_eq!(next.origin == Origin::Drain, kind == PolicyKind::DemandOnly);
            runs += 1;
            prop_assert!(runs <= pages);
        }
        prop_assert!(set.is_empty(), "{:?} leaves {:?}", policy, set);
    }

    #[test]
    fn pivots_are_bounded_and_never_overlap(
        events in prop::collection::vec((0..4000u64, any::<bool>()), 0..500),
        pivots_max in 0..100usize,
    ) {
        let mut policy = Bubbling::new(PolicyConfig { pages: 4000, pivots_max });
        let mut set = Set::full(4000);
        for (number, (page, push)) in events.into_iter().enumerate() {
            let page = PageIndex::new(page);
            let fault = Fault { page, vcpu: None, at: Duration::from_millis(number as u64) };
            if set.remove(page) { policy.fault(fault) } else { policy.late_hit(fault) }
            prop_assert!(policy.pivots() <= pivots_max.clamp(1, PIVOTS_MAX));
            prop_assert!(policy.bubbles_are_apart(), "{:?}", policy);
            if push {
                take(&mut policy, &mut set, 16, false);
                prop_assert!(policy.bubbles_are_apart(), "{:?}", policy);
            }
        }
    }
}
