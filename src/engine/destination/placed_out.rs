//! What a new link begins with: telling the source which pages are here, and asking
//! it again for those that somebody waits for.
//!
//! The ledger of a large guest takes a while to read, and the set a while to send. So
//! both go in pieces, and between two of them the thread does what else it has to do:
//! faults are read, and asked for, meanwhile.

use super::said;
use crate::engine::control::ControlError;
use crate::proto::ledger::DestinationLedger;
use crate::proto::message::ToSource;
use crate::proto::page::{PageIndex, PageRun};
use crate::proto::placed::{MESSAGE_PARTS_MAX, PlacedMessages};
use quinn::SendStream;

/// Words of the ledger's answer that are looked at in one go: 2 GiB of guest memory.
const WORDS: usize = 8 << 10;

/// Sends the set of placed pages.
pub async fn tell(
    ledger: &DestinationLedger,
    control: &mut SendStream,
) -> Result<(), ControlError> {
    let mut messages = PlacedMessages::new(ledger.pages());
    let placed = |first, bits: &mut [u64]| ledger.fill_placed(first, bits);
    while let Some(part) = messages.next(MESSAGE_PARTS_MAX, placed) {
        let last = messages.is_done();
        said::say(control, &ToSource::Placed { part, last }).await?;
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// Calls `ask` for the pages that were asked for on an earlier link and have not come.
pub async fn ask_again(ledger: &DestinationLedger, ask: impl Fn(PageRun)) {
    let mut bits = vec![0; WORDS];
    for first in (0..ledger.pages()).step_by(WORDS * 64) {
        bits.fill(0);
        ledger.fill_requested(PageIndex::new(first), &mut bits);
        for (word, bits) in (0..).zip(&bits) {
            let mut left = *bits;
            while left != 0 {
                let begin = left.trailing_zeros();
                let count = (left >> begin).trailing_ones();
                let page = PageIndex::new(first + word * 64 + u64::from(begin));
                PageRun::new(page, count.into()).into_iter().for_each(&ask);
                left &= !(u64::MAX >> (64 - count) << begin);
            }
        }
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn what_was_asked_for_is_asked_for_again_and_neighbours_together() {
        let ledger = DestinationLedger::new(3000);
        let runs = [(0, 1), (5, 3), (62, 2), (64, 64), (127 + 64, 1), (2999, 1)];
        let runs = runs.map(|(first, count)| PageRun::new(PageIndex::new(first), count).unwrap());
        for page in runs.into_iter().flat_map(PageRun::pages) {
            let _ = ledger.fault(page).unwrap();
        }
        let asked = RefCell::new(Vec::new());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(ask_again(&ledger, |run| asked.borrow_mut().push(run)));
        assert_eq!(asked.into_inner(), runs);
    }
}
