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
use crate::proto::page::PageIndex;
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

/// Calls `ask` for each page that was asked for on an earlier link and has not come.
pub async fn ask_again(ledger: &DestinationLedger, ask: impl Fn(PageIndex)) {
    let mut bits = vec![0; WORDS];
    for first in (0..ledger.pages()).step_by(WORDS * 64) {
        bits.fill(0);
        ledger.fill_requested(PageIndex::new(first), &mut bits);
        for (word, bits) in (0..).zip(&bits).filter(|(_, bits)| **bits != 0) {
            let pages = (0..64).filter(|bit| bits >> bit & 1 == 1);
            pages.for_each(|bit| ask(PageIndex::new(first + word * 64 + bit)));
        }
        tokio::task::yield_now().await;
    }
}
