//! Models of the ledgers' races, run by loom under every interleaving:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p postcopy --no-default-features --lib --release \
//!     --target-dir target/loom loom_
//! ```
//!
//! The kernel's part is a page with waiters, as userfaultfd keeps them: nobody
//! begins to wait at a page that is mapped, and mapping it wakes who waits.

use super::{DestinationLedger, FaultAnswer, LinkEpoch, SourceLedger};
use crate::proto::page::{PageIndex, PageRun};
use crate::proto::placed::PlacedPages;
use loom::sync::{Arc, Mutex};
use loom::thread;

const PAGE: PageIndex = PageIndex::new(0);

fn run(first: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex::new(first), count).unwrap()
}

/// One page of memory under userfaultfd, with one vCPU.
#[derive(Default)]
struct Kernel(Mutex<KernelPage>);

#[derive(Default)]
struct KernelPage {
    mapped: bool,
    waiting: bool,
}

impl Kernel {
    /// The vCPU touches the page; `true` if that raised a fault event.
    fn touch(&self) -> bool {
        let mut page = self.0.lock().unwrap();
        page.waiting = !page.mapped;
        page.waiting
    }

    /// The placing ioctl.
    fn place(&self) {
        let mut page = self.0.lock().unwrap();
        assert!(!page.mapped, "the page is placed twice");
        *page = KernelPage { mapped: true, waiting: false };
    }

    fn wake(&self) {
        self.0.lock().unwrap().waiting = false;
    }

    fn assert_done(&self) {
        let page = self.0.lock().unwrap();
        assert!(page.mapped, "the page was never placed");
        assert!(!page.waiting, "the vCPU waits for ever");
    }
}

/// What the thread that reads events does: answers a fault, and says whether it
/// asked the source.
fn answer_fault(kernel: &Kernel, ledger: &DestinationLedger) -> bool {
    match ledger.fault(PAGE).unwrap() {
        FaultAnswer::Request => return true,
        FaultAnswer::Wait => {}
        FaultAnswer::Wake => kernel.wake(),
        FaultAnswer::Zero(landing) => {
            kernel.place();
            landing.placed();
        }
    }
    false
}

fn place_all(kernel: &Kernel, ledger: &DestinationLedger) -> usize {
    ledger
        .land(PageRun::single(PAGE))
        .unwrap()
        .map(|landing| {
            kernel.place();
            landing.placed();
        })
        .count()
}

#[test]
fn loom_one_of_two_claimers_gets_a_page() {
    loom::model(|| {
        let ledger = Arc::new(SourceLedger::new(3));
        let pusher = {
            let ledger = ledger.clone();
            thread::spawn(move || {
                let mut pages = 0;
                while let Some(claim) = ledger.claim_within(run(0, 3)) {
                    pages += claim.run().count();
                    claim.sent();
                }
                pages
            })
        };
        let demanded = ledger.claim(PageIndex::new(1));
        let demanded = demanded.map(|claim| claim.sent()).is_some();
        assert_eq!(pusher.join().unwrap() + u64::from(demanded), 3);
        let counts = ledger.counts();
        assert_eq!((counts.unsent, counts.sent, counts.sent_twice), (0, 3, 0));
    });
}

#[test]
fn loom_a_claim_that_is_handed_back_can_be_claimed_again() {
    loom::model(|| {
        let ledger = Arc::new(SourceLedger::new(1));
        let other = {
            let ledger = ledger.clone();
            thread::spawn(move || ledger.claim(PAGE).map(|claim| claim.sent()).is_some())
        };
        drop(ledger.claim(PAGE));
        let sent = other.join().unwrap();
        assert_eq!(ledger.is_unsent(PAGE), !sent);
        assert_eq!(ledger.unsent(), u64::from(!sent));
        assert_eq!(ledger.counts().sent, u64::from(sent));
    });
}

#[test]
fn loom_a_claim_of_a_void_epoch_marks_nothing() {
    loom::model(|| {
        let ledger = Arc::new(SourceLedger::new(2));
        let claimer = {
            let ledger = ledger.clone();
            thread::spawn(move || {
                // One is sent, one is handed back; either way.
                let epoch = ledger.claim(PAGE).map(|claim| {
                    let epoch = claim.epoch();
                    claim.sent();
                    epoch
                });
                drop(ledger.claim(PageIndex::new(1)));
                epoch
            })
        };
        let second = LinkEpoch::new(1);
        ledger.void(second).unwrap();
        let epoch = claimer.join().unwrap().unwrap();
        let sent_anew = epoch == second;
        assert_eq!(ledger.counts().sent, u64::from(sent_anew));
        assert_eq!(ledger.is_unsent(PAGE), !sent_anew);
        assert!(ledger.is_unsent(PageIndex::new(1)));
        assert_eq!(ledger.unsent(), 2 - u64::from(sent_anew));
        assert_eq!(ledger.counts().sent_twice, 0);
    });
}

#[test]
fn loom_a_lost_link_leaves_no_page_claimed_by_nobody() {
    loom::model(|| {
        let ledger = Arc::new(SourceLedger::new(2));
        let claimer = {
            let ledger = ledger.clone();
            thread::spawn(move || ledger.claim_within(run(0, 2)).map(|claim| claim.sent()))
        };
        let placed = PlacedPages::of(2, [PageRun::single(PAGE)]);
        let again = ledger.resume_from(placed, LinkEpoch::new(1)).unwrap();
        claimer.join().unwrap();
        // Whoever comes later finds the missing page, unless it is sent by now.
        let claim = ledger.claim_within(run(0, 2));
        let found = claim.as_ref().map(|claim| claim.run());
        assert!(found.is_none() || found == Some(run(1, 1)));
        assert!(again <= u64::from(found.is_some()));
        claim.into_iter().for_each(|claim| claim.sent());
        assert_eq!(ledger.counts().sent, 2);
        assert_eq!(ledger.counts().sent_twice, 0);
    });
}

#[test]
fn loom_no_wake_up_is_lost_between_a_fault_and_a_placement() {
    loom::model(|| {
        let kernel = Arc::new(Kernel::default());
        let ledger = Arc::new(DestinationLedger::new(1));
        // The source pushes the page, whether or not it is asked.
        let placer = {
            let (kernel, ledger) = (kernel.clone(), ledger.clone());
            thread::spawn(move || place_all(&kernel, &ledger))
        };
        if kernel.touch() {
            answer_fault(&kernel, &ledger);
        }
        assert_eq!(placer.join().unwrap(), 1);
        kernel.assert_done();
        assert_eq!(ledger.finish().unwrap().counts().placed, 1);
    });
}

#[test]
fn loom_a_page_that_arrives_twice_is_placed_once() {
    loom::model(|| {
        let kernel = Arc::new(Kernel::default());
        let ledger = Arc::new(DestinationLedger::new(1));
        let placer = {
            let (kernel, ledger) = (kernel.clone(), ledger.clone());
            thread::spawn(move || place_all(&kernel, &ledger))
        };
        let event = kernel.touch();
        let ours = place_all(&kernel, &ledger);
        if event {
            answer_fault(&kernel, &ledger);
        }
        assert_eq!(placer.join().unwrap() + ours, 1);
        kernel.assert_done();
        let counts = ledger.finish().unwrap().counts();
        assert_eq!((counts.placed, counts.duplicates, counts.placed_twice), (1, 1, 0));
    });
}

/// A page that the source cannot read is marked in the kernel as a mapped one is.
#[test]
fn loom_no_wake_up_is_lost_between_a_fault_and_a_poisoned_page() {
    loom::model(|| {
        let ledger = Arc::new(DestinationLedger::new(1));
        let kernel = Arc::new(Kernel::default());
        let poisoner = {
            let (ledger, kernel) = (ledger.clone(), kernel.clone());
            thread::spawn(move || {
                for landing in ledger.land(PageRun::single(PAGE)).unwrap() {
                    kernel.place();
                    landing.poisoned();
                }
            })
        };
        if kernel.touch() {
            answer_fault(&kernel, &ledger);
        }
        poisoner.join().unwrap();
        kernel.assert_done();
        assert_eq!(ledger.finish().unwrap().counts().poisoned, 1);
    });
}

#[test]
fn loom_a_request_is_remembered_when_a_landing_is_handed_back() {
    loom::model(|| {
        let kernel = Arc::new(Kernel::default());
        let ledger = Arc::new(DestinationLedger::new(1));
        let placer = {
            let ledger = ledger.clone();
            thread::spawn(move || {
                for landing in ledger.land(PageRun::single(PAGE)).unwrap() {
                    landing.hand_back();
                }
            })
        };
        let event = kernel.touch();
        assert!(event);
        answer_fault(&kernel, &ledger);
        placer.join().unwrap();
        let mut requested = [0];
        ledger.fill_requested(PAGE, &mut requested);
        assert_eq!(requested, [1]);
        assert_eq!(ledger.finish().unwrap_err().missing, 1);
        assert_eq!(place_all(&kernel, &ledger), 1);
        kernel.assert_done();
    });
}

#[test]
fn loom_a_zero_page_is_answered_whichever_comes_first() {
    loom::model(|| {
        let kernel = Arc::new(Kernel::default());
        let ledger = Arc::new(DestinationLedger::new(1));
        let marker = {
            let (kernel, ledger) = (kernel.clone(), ledger.clone());
            thread::spawn(move || {
                for landing in ledger.mark_zero(PageRun::single(PAGE)).unwrap() {
                    kernel.place();
                    landing.placed();
                }
            })
        };
        // The source never answers a request in this model: nobody relies on it.
        if kernel.touch() {
            answer_fault(&kernel, &ledger);
        }
        marker.join().unwrap();
        kernel.assert_done();
        assert_eq!(ledger.finish().unwrap().counts().placed, 1);
    });
}

#[test]
fn loom_one_of_two_faults_requests() {
    loom::model(|| {
        let ledger = Arc::new(DestinationLedger::new(1));
        let kernel = Arc::new(Kernel::default());
        let other = {
            let (kernel, ledger) = (kernel.clone(), ledger.clone());
            thread::spawn(move || answer_fault(&kernel, &ledger))
        };
        let ours = answer_fault(&kernel, &ledger);
        assert!(ours ^ other.join().unwrap());
    });
}

#[test]
fn loom_neighbours_in_one_word_do_not_disturb_each_other() {
    loom::model(|| {
        let ledger = Arc::new(DestinationLedger::new(2));
        let other = {
            let ledger = ledger.clone();
            thread::spawn(move || ledger.land(run(0, 1)).unwrap().for_each(|it| it.placed()))
        };
        ledger.land(run(1, 1)).unwrap().for_each(|it| it.placed());
        // What the counters say meanwhile is never less than what is missing.
        other.join().unwrap();
        assert_eq!(ledger.missing(), 0);
        assert_eq!(ledger.finish().unwrap().counts().placed, 2);
    });
}

#[test]
fn loom_finishing_early_is_refused() {
    loom::model(|| {
        let ledger = Arc::new(DestinationLedger::new(1));
        let kernel = Arc::new(Kernel::default());
        let placer = {
            let (kernel, ledger) = (kernel.clone(), ledger.clone());
            thread::spawn(move || place_all(&kernel, &ledger))
        };
        if ledger.finish().is_ok() {
            kernel.assert_done();
        }
        placer.join().unwrap();
        assert!(ledger.finish().is_ok());
    });
}
