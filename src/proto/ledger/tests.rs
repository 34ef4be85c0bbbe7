//! Both ledgers against plain models, and many threads against one ledger.

use super::*;
use crate::proto::page::{PageIndex, PageRun};
use crate::proto::page_set::PageSet;
use crate::proto::placed::PlacedPages;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};

fn page(index: u64) -> PageIndex {
    PageIndex::new(index)
}

fn run(first: u64, count: u64) -> PageRun {
    PageRun::new(page(first), count).unwrap()
}

/// The pages whose bits `fill` sets, asked for in two goes.
fn filled(ledger: &DestinationLedger, fill: impl Fn(PageIndex, &mut [u64])) -> PageSet {
    let mut words = vec![0; ledger.pages().div_ceil(64) as usize];
    let (left, right) = words.split_at_mut(1);
    fill(page(0), left);
    fill(page(64), right);
    let bits = (0..).zip(&words).flat_map(|(word, bits)| {
        (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * 64 + bit)
    });
    set(bits)
}

fn placed(ledger: &DestinationLedger) -> PageSet {
    filled(ledger, |first, bits| ledger.fill_placed(first, bits))
}

fn requested(ledger: &DestinationLedger) -> PageSet {
    filled(ledger, |first, bits| ledger.fill_requested(first, bits))
}

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    pages.into_iter().map(|index| PageRun::single(page(index))).collect()
}

#[test]
fn a_page_is_claimed_once_and_comes_back_if_it_is_not_sent() {
    let ledger = SourceLedger::new(100);
    let claim = ledger.claim(page(7)).unwrap();
    assert!(ledger.claim(page(7)).is_none());
    assert!(ledger.claim(page(100)).is_none());
    assert_eq!(ledger.counts(), SourceCounts { unsent: 99, claimed: 1, sent: 0, sent_twice: 0 });
    drop(claim);
    let mut claim = ledger.claim_within(run(5, 1000)).unwrap();
    assert_eq!(claim.run(), run(5, 95));
    assert!(claim.split_off(0).is_none() && claim.split_off(95).is_none());
    let rest = claim.split_off(5).unwrap();
    assert_eq!((claim.run(), rest.run()), (run(5, 5), run(10, 90)));
    claim.sent();
    drop(rest);
    assert_eq!(ledger.counts(), SourceCounts { unsent: 95, claimed: 0, sent: 5, sent_twice: 0 });
    assert_eq!(ledger.next_unsent(page(5)), Some(page(10)));
    assert_eq!(ledger.prev_unsent(page(9)), Some(page(4)));
}

#[test]
fn an_epoch_begins_once_and_old_claims_mark_nothing() {
    let ledger = SourceLedger::new(10);
    let sent_late = ledger.claim(page(0)).unwrap();
    let dropped_late = ledger.claim(page(1)).unwrap();
    ledger.claim_within(run(2, 3)).unwrap().sent();
    let second = LinkEpoch::FIRST.next().unwrap();

    let other = ledger.resume_from(PlacedPages::new(11), second).unwrap_err();
    assert!(matches!(other, ResumeError::OtherGuest { theirs: 11, pages: 10 }), "{other}");
    let half = ledger.resume_from(PlacedPages::new(10), second).unwrap_err();
    assert!(matches!(half, ResumeError::NotWhole(_)), "{half}");
    assert_eq!(ledger.epoch(), LinkEpoch::FIRST);
    let set = |pages| PlacedPages::of(10, set(pages).runs());
    // Pages 3 and 4 were lost with the link; 9 was given back by the guest.
    assert_eq!(ledger.resume_from(set(vec![2, 9]), second), Ok(2));
    let again = ledger.resume_from(set(vec![2]), second).unwrap_err();
    assert!(matches!(again, ResumeError::StaleEpoch(_)), "{again}");
    assert_eq!(ledger.void(LinkEpoch::FIRST).unwrap_err().current, second);

    let anew = ledger.claim(page(1)).unwrap();
    assert_eq!((sent_late.epoch(), anew.epoch()), (LinkEpoch::FIRST, second));
    sent_late.sent();
    drop(dropped_late);
    assert!(ledger.is_unsent(page(0)) && !ledger.is_unsent(page(1)));
    assert_eq!(ledger.counts(), SourceCounts { unsent: 7, claimed: 1, sent: 2, sent_twice: 0 });

    ledger.void(second.next().unwrap()).unwrap();
    assert_eq!(ledger.counts(), SourceCounts { unsent: 10, ..Default::default() });
}

/// A ledger whose claim is broken on purpose is built from honest ones.
#[test]
fn claims_can_be_broken_from_outside() {
    struct Twice(SourceLedger, SourceLedger);
    impl Claims for Twice {
        fn claim(&self, page: PageIndex) -> Option<Claim> {
            self.0.claim(page).or_else(|| self.1.claim(page))
        }
        fn claim_within(&self, run: PageRun) -> Option<Claim> {
            self.0.claim_within(run).or_else(|| self.1.claim_within(run))
        }
        fn next_unsent(&self, from: PageIndex) -> Option<PageIndex> {
            self.1.next_unsent(from)
        }
        fn prev_unsent(&self, from: PageIndex) -> Option<PageIndex> {
            self.1.prev_unsent(from)
        }
        fn unsent(&self) -> u64 {
            self.1.unsent()
        }
        fn is_unsent(&self, page: PageIndex) -> bool {
            self.1.is_unsent(page)
        }
    }
    let broken = Twice(SourceLedger::new(4), SourceLedger::new(4));
    let claims = (broken.claim(page(2)).unwrap(), broken.claim(page(2)).unwrap());
    assert_eq!(claims.0.run(), claims.1.run());
}

#[test]
fn many_claimers_share_the_pages_out() {
    const PAGES: u64 = 5_000;
    let ledger = SourceLedger::new(PAGES);
    let sent: Vec<AtomicU32> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
    let send = |claim: Claim| {
        for page in claim.run().pages() {
            sent[page.as_usize()].fetch_add(1, Ordering::Relaxed);
        }
        claim.sent();
    };
    std::thread::scope(|scope| {
        scope.spawn(|| (0..PAGES).rev().filter_map(|it| ledger.claim(page(it))).for_each(send));
        for pusher in 0..3 {
            let (ledger, send) = (&ledger, &send);
            scope.spawn(move || {
                let mut from = page(pusher * PAGES / 3);
                while let Some(next) = ledger.next_unsent(from).or(ledger.next_unsent(page(0))) {
                    if let Some(claim) = ledger.claim_within(run(next.get(), 13)) {
                        from = page(claim.run().end());
                        // Some are given up, as on a connection that is closing.
                        if claim.run().count() % 5 == 2 { drop(claim) } else { send(claim) }
                    }
                    if let Some(claim) = ledger.claim(next) {
                        send(claim);
                    }
                }
            });
        }
    });
    assert!(sent.iter().all(|times| times.load(Ordering::Relaxed) == 1));
    assert_eq!(ledger.counts(), SourceCounts { sent: PAGES, ..Default::default() });
}

#[test]
fn a_landing_is_exclusive_and_may_be_placed_in_parts() {
    let ledger = DestinationLedger::new(40);
    assert!(matches!(ledger.fault(page(20)), Ok(FaultAnswer::Request)));
    assert!(matches!(ledger.fault(page(20)), Ok(FaultAnswer::Wait)));
    assert!(ledger.fault(page(40)).is_err());
    assert!(ledger.land(run(39, 2)).is_err());

    let landings: Vec<Landing> = ledger.land(run(10, 20)).unwrap().collect();
    assert_eq!(landings.iter().map(Landing::run).collect::<Vec<_>>(), [run(10, 20)]);
    assert_eq!(ledger.land(run(10, 20)).unwrap().count(), 0);
    assert_eq!(ledger.counts().duplicates, 20);
    assert!(matches!(ledger.fault(page(11)), Ok(FaultAnswer::Wait)));

    let [landing] = landings.try_into().unwrap();
    let rest = landing.placed_some(5).unwrap();
    assert!(matches!(ledger.fault(page(14)), Ok(FaultAnswer::Wake)));
    // What EAGAIN looks like through a wrapper that takes it for a count.
    let rest = rest.placed_some(u64::MAX - 10).unwrap();
    let rest = rest.placed_some(0).unwrap();
    assert_eq!(rest.run(), run(15, 15));
    assert_eq!(rest.hand_back(), run(15, 15));
    assert_eq!(requested(&ledger), set([20]));
    assert_eq!(placed(&ledger), set(10..15));
    assert_eq!(ledger.finish().unwrap_err(), Unfinished { missing: 35, in_hand: 0 });

    let around: Vec<PageRun> = ledger
        .land(run(0, 40))
        .unwrap()
        .map(|landing| {
            let run = landing.run();
            assert!(landing.placed_some(run.count()).is_none());
            run
        })
        .collect();
    assert_eq!(around, [run(0, 10), run(15, 25)]);
    let counts = ledger.finish().unwrap().counts();
    assert_eq!((counts.placed, counts.placed_twice, counts.duplicates), (40, 0, 25));
}

#[test]
fn a_full_ledger_is_not_finished_while_a_page_is_in_hand() {
    let ledger = DestinationLedger::new(2);
    ledger.land(run(0, 1)).unwrap().for_each(Landing::placed);
    assert!(ledger.mark_zero(run(1, 1)).unwrap().is_empty());
    assert!(ledger.finish().is_ok());
    let Ok(FaultAnswer::Zero(landing)) = ledger.fault(page(1)) else { panic!() };
    assert_eq!(ledger.finish().unwrap_err(), Unfinished { missing: 0, in_hand: 1 });
    landing.placed();
    assert!(ledger.finish().is_ok());
}

#[test]
fn pages_that_are_held_are_nobody_elses_and_were_not_told_to_have_come() {
    let ledger = DestinationLedger::new(64);
    ledger.land(run(0, 8)).unwrap().for_each(Landing::placed);
    let _ = ledger.fault(page(20)).unwrap();
    let held: Vec<_> = ledger.hold(run(0, 32)).unwrap().collect();
    assert_eq!(held.iter().map(Landing::run).collect::<Vec<_>>(), [run(8, 24)]);
    assert_eq!(ledger.land(run(8, 24)).unwrap().count(), 0);
    assert!(matches!(ledger.fault(page(21)), Ok(FaultAnswer::Wait)));
    let counts = ledger.counts();
    assert_eq!((counts.duplicates, counts.in_hand, counts.missing), (24, 24, 56));
    // Given back by the guest meanwhile: whoever holds it must wake who was told to wait.
    assert!(ledger.removed(run(25, 1)).unwrap().is_empty());
    assert!(matches!(ledger.fault(page(25)), Ok(FaultAnswer::Wait)));
    drop(held);
    let Ok(FaultAnswer::Zero(again)) = ledger.fault(page(25)) else { panic!() };
    again.placed();
    // Who faulted before, or meanwhile, is remembered.
    let waited_for = ledger.mark_zero(run(8, 24)).unwrap();
    assert_eq!(waited_for.iter().map(Landing::run).collect::<Vec<_>>(), [run(20, 2)]);
    waited_for.into_iter().for_each(Landing::placed);
    assert_eq!(ledger.counts().missing, 32);
}

#[test]
fn zeros_are_answered_here() {
    let ledger = DestinationLedger::new(64);
    let _ = ledger.fault(page(30)).unwrap();
    let _ = ledger.fault(page(31)).unwrap();
    let in_hand = ledger.land(run(50, 2)).unwrap().next().unwrap();
    let waited_for = ledger.mark_zero(run(0, 64)).unwrap();
    assert_eq!(waited_for.iter().map(Landing::run).collect::<Vec<_>>(), [run(30, 2)]);
    assert_eq!(ledger.missing(), 2);
    waited_for.into_iter().for_each(Landing::placed);
    assert_eq!(ledger.counts().duplicates, 2);
    assert_eq!(ledger.land(run(0, 4)).unwrap().count(), 0, "bytes for zero pages");
    let mut swept = PageSet::new();
    for it in run(20, 40).pages() {
        if let FaultAnswer::Zero(landing) = ledger.fault(it).unwrap() {
            swept.insert(landing.run());
            landing.placed();
        }
    }
    let expected = [run(20, 10), run(32, 18), run(52, 8)];
    assert_eq!(swept.runs().collect::<Vec<_>>(), expected);
    in_hand.placed();
    let counts = ledger.finish().unwrap().counts();
    assert_eq!((counts.placed, counts.zero), (40, 24));
}

#[test]
fn a_removed_page_reads_as_zero_for_ever() {
    let ledger = DestinationLedger::new(8);
    ledger.land(run(0, 2)).unwrap().for_each(Landing::placed);
    let in_hand = ledger.land(run(2, 1)).unwrap().next().unwrap();
    let _ = ledger.fault(page(3)).unwrap();
    let waited_for = ledger.removed(run(0, 8)).unwrap();
    assert_eq!(waited_for.iter().map(Landing::run).collect::<Vec<_>>(), [run(3, 1)]);
    waited_for.into_iter().for_each(Landing::placed);
    in_hand.placed();
    assert_eq!(ledger.counts().removed, 8);
    assert_eq!(ledger.land(run(0, 8)).unwrap().count(), 0);
    assert_eq!((ledger.counts().unwanted, ledger.counts().duplicates), (8, 0));
    for _ in 0..2 {
        let Ok(FaultAnswer::Zero(landing)) = ledger.fault(page(2)) else { panic!() };
        landing.placed();
    }
    assert_eq!(placed(&ledger), PageSet::all(8));
    assert_eq!(ledger.finish().unwrap().counts().placed_twice, 0);
}

#[test]
fn a_poisoned_page_is_settled_and_its_waiter_is_woken() {
    let ledger = DestinationLedger::new(6);
    assert!(matches!(ledger.fault(page(1)), Ok(FaultAnswer::Request)));
    let mut landing = ledger.land(run(0, 4)).unwrap().next().unwrap();
    landing = landing.poisoned_some(3).unwrap();
    assert_eq!(landing.run(), run(3, 1));
    landing.hand_back();
    assert_eq!((ledger.missing(), ledger.counts().poisoned), (3, 3));
    // A fault that was read late, and bytes that come too late.
    assert!(matches!(ledger.fault(page(1)), Ok(FaultAnswer::Wake)));
    assert_eq!(ledger.land(run(0, 3)).unwrap().count(), 0);
    assert!(ledger.mark_zero(run(2, 1)).unwrap().is_empty());
    assert_eq!(ledger.counts().duplicates, 4);
    // It is neither sent again after a lost link, nor fetched again.
    assert_eq!((placed(&ledger), ledger.poisoned_set()), (set(0..3), set(0..3)));
    // Given back by the guest, also while it is being poisoned.
    assert!(ledger.removed(run(2, 1)).unwrap().is_empty());
    let in_hand = ledger.land(run(4, 1)).unwrap().next().unwrap();
    assert!(ledger.removed(run(4, 1)).unwrap().is_empty());
    in_hand.poisoned();
    assert_eq!((ledger.counts().poisoned, ledger.counts().removed), (2, 2));
    for landing in ledger.land(run(0, 6)).unwrap() {
        landing.placed();
    }
    let counts = ledger.finish().unwrap().counts();
    assert_eq!((counts.placed, counts.poisoned, counts.removed), (2, 2, 2));
    assert_eq!(counts.placed_twice, 0);
}

#[test]
fn a_placement_over_a_placement_is_counted_apart_from_the_states() {
    let ledger = DestinationLedger::new(4);
    ledger.land(run(0, 2)).unwrap().for_each(Landing::placed);
    // A landing that no exclusive state stands behind.
    Landing::new(&ledger, run(1, 2)).placed();
    assert_eq!(ledger.counts().placed_twice, 1);
}

#[test]
fn many_placers_place_every_page_once() {
    const PAGES: u64 = 3_000;
    let ledger = DestinationLedger::new(PAGES);
    let placed: Vec<AtomicU32> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
    let place = |landing: Landing| {
        for page in landing.run().pages() {
            placed[page.as_usize()].fetch_add(1, Ordering::Relaxed);
        }
        landing.placed();
    };
    std::thread::scope(|scope| {
        for step in [1, 7, 64] {
            let (ledger, place) = (&ledger, &place);
            scope.spawn(move || {
                for first in (0..PAGES).step_by(step) {
                    let count = (step as u64).min(PAGES - first);
                    ledger.land(run(first, count)).unwrap().for_each(place);
                }
            });
        }
        scope.spawn(|| {
            for first in (0..PAGES).rev() {
                if let Ok(FaultAnswer::Zero(_)) = ledger.fault(page(first)) {
                    unreachable!("no page was marked as zero");
                }
            }
        });
    });
    assert!(placed.iter().all(|times| times.load(Ordering::Relaxed) == 1));
    let counts = ledger.finish().unwrap().counts();
    assert_eq!((counts.placed, counts.duplicates), (PAGES, 2 * PAGES));
}

const MODEL_PAGES: u64 = 150;

fn steps(kinds: u8) -> impl Strategy<Value = Vec<(u8, u64, u64)>> {
    prop::collection::vec((0..kinds, 0..MODEL_PAGES, 1..80u64), 1..80)
}

#[derive(Clone, Copy, PartialEq)]
enum Source {
    Claimed,
    Sent,
}

proptest! {
    #[test]
    fn the_source_ledger_behaves_as_a_map(steps in steps(7)) {
        let ledger = SourceLedger::new(MODEL_PAGES);
        let mut model: BTreeMap<u64, Source> = BTreeMap::new();
        let mut claims: Vec<Claim> = vec![];
        let mut epoch = LinkEpoch::FIRST;
        for (what, first, count) in steps {
            match what {
                0 => {
                    let claim = ledger.claim(page(first));
                    prop_assert_eq!(claim.is_some(), !model.contains_key(&first));
                    if claim.is_some() {
                        model.insert(first, Source::Claimed);
                    }
                    claims.extend(claim);
                }
                1 | 2 => {
                    let expected: Vec<u64> = (first..(first + count).min(MODEL_PAGES))
                        .skip_while(|it| model.contains_key(it))
                        .take_while(|it| !model.contains_key(it))
                        .collect();
                    let claim = ledger.claim_within(run(first, count));
                    let pages = claim.as_ref().map_or(vec![], |claim| {
                        claim.run().pages().map(PageIndex::get).collect()
                    });
                    prop_assert_eq!(&pages, &expected);
                    model.extend(pages.into_iter().map(|it| (it, Source::Claimed)));
                    claims.extend(claim);
                }
                3 | 4 if !claims.is_empty() => {
                    let claim = claims.swap_remove(first as usize % claims.len());
                    let valid = claim.epoch() == epoch;
                    for it in claim.run().pages().filter(|_| valid) {
                        match what {
                            3 => model.insert(it.get(), Source::Sent),
                            _ => model.remove(&it.get()),
                        };
                    }
                    if what == 3 { claim.sent() } else { drop(claim) }
                }
                5 if count < 10 => {
                    epoch = epoch.next().unwrap();
                    ledger.void(epoch).unwrap();
                    model.clear();
                }
                6 if count < 20 => {
                    epoch = epoch.next().unwrap();
                    // Every page that was sent below `first` arrived.
                    let arrived = |it: &u64, state: &Source| *it < first && *state == Source::Sent;
                    let all = model.values().filter(|it| **it == Source::Sent).count();
                    model.retain(|it, state| arrived(it, state));
                    let placed = PlacedPages::of(MODEL_PAGES, set(model.keys().copied()).runs());
                    let again = ledger.resume_from(placed, epoch);
                    prop_assert_eq!(again, Ok((all - model.len()) as u64));
                }
                _ => {}
            }
            let sent = model.values().filter(|it| **it == Source::Sent).count() as u64;
            let claimed = model.len() as u64 - sent;
            let unsent = MODEL_PAGES - model.len() as u64;
            prop_assert_eq!(ledger.counts(), SourceCounts { unsent, claimed, sent, sent_twice: 0 });
            let next = (first..MODEL_PAGES).find(|it| !model.contains_key(it)).map(page);
            prop_assert_eq!(ledger.next_unsent(page(first)), next);
            let prev = (0..=first).rev().find(|it| !model.contains_key(it)).map(page);
            prop_assert_eq!(ledger.prev_unsent(page(first)), prev);
            prop_assert_eq!(ledger.is_unsent(page(first)), !model.contains_key(&first));
        }
    }

    /// The model keeps one plain set for each question that can be asked of a
    /// page, rather than the ledger's states.
    #[test]
    fn the_destination_ledger_behaves_as_sets(steps in steps(11)) {
        let ledger = DestinationLedger::new(MODEL_PAGES);
        let mut model = Model::default();
        let mut hand: Vec<Landing> = vec![];
        for (what, first, count) in steps {
            let run = run(first, count.min(MODEL_PAGES - first));
            let before = hand.len();
            match what {
                0 | 1 | 5 => match (ledger.fault(page(first)).unwrap(), model.fault(first)) {
                    (FaultAnswer::Request, "request") | (FaultAnswer::Wait, "wait")
                    | (FaultAnswer::Wake, "wake") => {}
                    (FaultAnswer::Zero(landing), "zero") => hand.push(landing),
                    (answer, expected) => prop_assert!(false, "{answer:?}, not {expected}"),
                },
                2 | 3 => {
                    hand.extend(ledger.land(run).unwrap());
                    let expected = model.take(run, |model, it| {
                        !model.known.contains(&it) && !model.hand.contains(&it)
                    });
                    prop_assert_eq!(runs(&hand[before..]), expected);
                }
                4 => {
                    hand.extend(ledger.mark_zero(run).unwrap());
                    let news = |model: &Model, it: &u64| {
                        !model.known.contains(it) && !model.hand.contains(it)
                    };
                    let marked: Vec<u64> =
                        (first..run.end()).filter(|it| news(&model, it)).collect();
                    model.known.extend(&marked);
                    let expected = model.take(run, |model, it| {
                        marked.contains(&it) && model.asked.contains(&it)
                    });
                    marked.iter().for_each(|it| { model.asked.remove(it); });
                    prop_assert_eq!(runs(&hand[before..]), expected);
                }
                6 | 7 if !hand.is_empty() => {
                    let landing = hand.swap_remove(first as usize % hand.len());
                    let done = match what {
                        6 => landing.run().count(),
                        _ => count.min(landing.run().count()),
                    };
                    let pages = landing.run().pages().map(PageIndex::get);
                    for it in pages.take(done as usize) {
                        model.place(it);
                    }
                    hand.extend(landing.placed_some(done));
                }
                8 if !hand.is_empty() => {
                    let landing = hand.swap_remove(first as usize % hand.len());
                    for it in landing.hand_back().pages() {
                        model.hand.remove(&it.get());
                    }
                }
                10 if !hand.is_empty() => {
                    let landing = hand.swap_remove(first as usize % hand.len());
                    let done = count.min(landing.run().count());
                    for it in landing.run().pages().map(PageIndex::get).take(done as usize) {
                        model.poison(it);
                    }
                    hand.extend(landing.poisoned_some(done));
                }
                9 if count < 20 => {
                    hand.extend(ledger.removed(run).unwrap());
                    let expected = model.take(run, |model, it| {
                        model.asked.contains(&it) && !model.hand.contains(&it)
                    });
                    for it in first..run.end() {
                        model.removed.insert(it);
                        model.known.insert(it);
                        model.placed.remove(&it);
                        model.poisoned.remove(&it);
                        model.asked.remove(&it);
                    }
                    prop_assert_eq!(runs(&hand[before..]), expected);
                }
                _ => {}
            }
            let counts = ledger.counts();
            prop_assert_eq!(placed(&ledger), set(model.known.iter().copied()));
            prop_assert_eq!(
                requested(&ledger),
                set(model.asked.difference(&model.hand).copied())
            );
            prop_assert_eq!(ledger.missing(), MODEL_PAGES - model.known.len() as u64);
            prop_assert_eq!(counts.missing, ledger.missing());
            prop_assert_eq!(counts.placed, model.placed.len() as u64);
            prop_assert_eq!(counts.removed, model.removed.len() as u64);
            prop_assert_eq!(counts.poisoned, model.poisoned.len() as u64);
            prop_assert_eq!(ledger.poisoned_set(), set(model.poisoned.iter().copied()));
            prop_assert_eq!(counts.in_hand, model.hand.len() as u64);
            prop_assert_eq!(counts.placed_twice, 0);
            prop_assert_eq!(ledger.is_settled(page(first)), model.known.contains(&first));
            let full = model.known.len() as u64 == MODEL_PAGES && model.hand.is_empty();
            prop_assert_eq!(ledger.finish().is_ok(), full);
        }
    }
}

fn runs(landings: &[Landing]) -> Vec<PageRun> {
    landings.iter().map(Landing::run).collect()
}

#[derive(Default)]
struct Model {
    /// The source need not send these.
    known: BTreeSet<u64>,
    placed: BTreeSet<u64>,
    removed: BTreeSet<u64>,
    poisoned: BTreeSet<u64>,
    /// Somebody waits for their bytes.
    asked: BTreeSet<u64>,
    hand: BTreeSet<u64>,
}

impl Model {
    fn fault(&mut self, page: u64) -> &'static str {
        if self.placed.contains(&page) || self.poisoned.contains(&page) {
            "wake"
        } else if self.known.contains(&page) {
            if self.hand.insert(page) { "zero" } else { "wait" }
        } else if self.asked.insert(page) && !self.hand.contains(&page) {
            "request"
        } else {
            "wait"
        }
    }

    /// Takes the pages of `run` that are `wanted` in hand; returns their runs.
    fn take(&mut self, run: PageRun, wanted: impl Fn(&Self, u64) -> bool) -> Vec<PageRun> {
        let taken: Vec<u64> =
            (run.first().get()..run.end()).filter(|it| wanted(self, *it)).collect();
        self.hand.extend(&taken);
        let runs: PageSet = set(taken);
        runs.runs().collect()
    }

    fn poison(&mut self, page: u64) {
        self.hand.remove(&page);
        self.asked.remove(&page);
        self.known.insert(page);
        if !self.removed.contains(&page) {
            self.poisoned.insert(page);
        }
    }

    fn place(&mut self, page: u64) {
        self.hand.remove(&page);
        self.asked.remove(&page);
        self.known.insert(page);
        if !self.removed.contains(&page) {
            self.placed.insert(page);
        }
    }
}
