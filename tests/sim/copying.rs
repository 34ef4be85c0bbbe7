//! Pages that are copied before the guest moves, on both sides: what the engines do around
//! the session machines between Accept and State.

use crate::ledgers::Ledger;
use crate::network::{Lane, Packet, Side};
use crate::random::Random;
use crate::source_side::SourceStep;
use crate::world::{Event, Sabotage, World};
use postcopy::proto::destination::DestinationEvent;
use postcopy::proto::frame::{FrameHeader, Origin, PageKind};
use postcopy::proto::ledger::Claim;
use postcopy::proto::message::{ToDestination, encode};
use postcopy::proto::page::{PageIndex, PageRun};
use postcopy::proto::placed::{PlacedMessages, PlacedPages};
use postcopy::proto::source::SourceEvent;
use postcopy::proto::switchover::{Mode, RoundSoFar, SwitchoverConfig};
use std::time::Duration;

const LANES: u64 = 3;

/// How the guest is moved: mostly as ever.
pub fn draw(random: &mut Random) -> SwitchoverConfig {
    let mode = match random.below(10) {
        0 => Mode::PreCopy,
        1 | 2 => Mode::Hybrid,
        3 => Mode::StopAndCopy,
        4 => Mode::Auto,
        _ => Mode::PostCopy,
    };
    let rounds = random.between(1, 4) as u32;
    // One that is never kept has pre-copy give up.
    let max_downtime = Duration::from_millis(random.pick(&[1, 20, 1000]));
    SwitchoverConfig { mode, rounds, max_downtime, ..SwitchoverConfig::default() }
}

/// Whether it comes to no end: no pause is as short as that.
pub fn gives_up(config: &SwitchoverConfig) -> bool {
    config.mode == Mode::PreCopy && config.max_downtime < Duration::from_millis(5)
}

/// The source's part.
#[derive(Debug, Default)]
pub struct Copying {
    /// Pages that were written since the VMM was asked last; `None` if it does not remember.
    log: Option<Vec<bool>>,
    /// Pages that it has told of, and that were not taken out.
    written: Vec<bool>,
    on: bool,
    chain: u32,
    next: u64,
    copied: u64,
    copied_before: u64,
    began: Duration,
}

impl Copying {
    /// The guest writes to a page.
    pub fn writes(&mut self, page: usize) {
        if let Some(log) = &mut self.log {
            log[page] = true;
        }
    }

    fn fold(&mut self, forgets: bool) {
        let Some(log) = &mut self.log else { return };
        self.written.resize(log.len(), false);
        for (log, written) in log.iter_mut().zip(&mut self.written) {
            *written |= std::mem::take(log);
        }
        if forgets && let Some(first) = self.written.iter_mut().find(|written| **written) {
            *first = false;
        }
    }

    fn word(&self, index: u64) -> u64 {
        let bits = self.written.iter().skip(index as usize * 64).take(64).enumerate();
        bits.fold(0, |word, (bit, written)| word | u64::from(*written) << bit)
    }
}

/// The destination's part.
#[derive(Debug, Default)]
pub struct Copied {
    /// What is in the file: a version, 0 for a page that is zero.
    file: Vec<Option<u64>>,
    came: u64,
    awaited: Option<u64>,
    /// The source has said which are valid.
    over: bool,
}

impl<L: Ledger> World<L> {
    pub fn log_starts(&mut self) {
        if self.random.percent(1) || self.vmm.dead {
            self.harm();
            return self.source_event(SourceEvent::DirtyLogFailed("no".into()));
        }
        self.source.copying.log = Some(vec![false; self.pages as usize]);
        self.source_event(SourceEvent::DirtyLogStarted);
    }

    /// What was written is stale and unsent; returns what is valid.
    fn take_written(&mut self) -> PlacedPages {
        let copying = &mut self.source.copying;
        let valid = self.source.ledger.keep_unwritten(&mut |index| copying.word(index));
        copying.written.fill(false);
        valid
    }

    pub fn start_round(&mut self) {
        self.mark("a round begins".into());
        self.take_written();
        let copying = &mut self.source.copying;
        (copying.on, copying.next, copying.began) = (true, 0, self.now);
        copying.copied_before = copying.copied;
        copying.chain += 1;
        let (chain, incarnation) = (copying.chain, self.source.incarnation);
        self.soon(500, Event::Source { incarnation, step: SourceStep::Copy { chain } });
    }

    pub fn cut_round(&mut self) {
        self.mark("a round is cut short".into());
        self.source.copying.on = false;
    }

    /// The guest is paused: the VMM tells all that was ever written.
    pub fn fold_written(&mut self) {
        let forgets = self.sabotage == Sabotage::WrittenForgotten;
        self.source.copying.fold(forgets);
    }

    pub fn look_at_round(&mut self) {
        if self.vmm.dead {
            return self.source_event(SourceEvent::DirtyLogFailed("its VMM is dead".into()));
        }
        self.fold_written();
        let copying = &self.source.copying;
        let counts = self.source.ledger.count_unwritten(&mut |index| copying.word(index));
        let round = RoundSoFar {
            sent: copying.copied - copying.copied_before,
            unsent: counts.unsent,
            written: counts.written,
            stale: self.pages - counts.sent,
            took: self.now - copying.began,
            rtt: Duration::from_millis(1),
        };
        self.source_event(SourceEvent::Looked(round));
    }

    /// The next pages of the round go out.
    pub fn copy(&mut self, chain: u32) {
        let incarnation = self.source.incarnation;
        let step = |step| Event::Source { incarnation, step };
        if chain != self.source.copying.chain || self.source.connection.is_none() {
            return;
        }
        let ledger = self.source.ledger.clone();
        let next = PageIndex::new(self.source.copying.next);
        let first = Some(next).filter(|_| self.source.copying.on);
        let first = first.and_then(|next| ledger.next_unsent(next));
        let Some(first) = first else {
            if ledger.claimed() == 0 {
                self.source.copying.on = false;
                let pages = self.source.copying.copied;
                return self.source_event(SourceEvent::RoundSent { pages });
            }
            return self.soon(2_000, step(SourceStep::Copy { chain }));
        };
        let most = self.random.between(1, 17).min(self.pages - first.get());
        self.source.copying.next = first.get() + most;
        for page in (first.get()..first.get() + most).map(PageIndex::new) {
            let written = self.source.copying.written.get(page.as_usize()).copied();
            let claim = Some(page).filter(|_| written != Some(true));
            let Some(claim) = claim.and_then(|page| ledger.claim(page)) else { continue };
            // What it holds now; it may be written before it goes out.
            let version = self.source.memory[page.as_usize()];
            let lane = Lane::Push(self.random.below(LANES) as u16);
            if self.random.percent(20) {
                self.soon(2_000, step(SourceStep::SendCopy { claim, version, lane }));
            } else {
                self.send_copy(claim, version, lane);
            }
        }
        self.soon(500, step(SourceStep::Copy { chain }));
    }

    pub fn send_copy(&mut self, claim: Claim, version: u64, lane: Lane) {
        let Some(connection) = self.source.connection else { return };
        let kind = match (version, claim.run().first().get() % 2) {
            (0, 0) => PageKind::Zero,
            (0, _) => PageKind::Hole,
            _ => PageKind::Raw,
        };
        let epoch = self.network.epoch(connection);
        let header = FrameHeader::for_claim(&claim, kind, Origin::Copy, epoch);
        let content = if kind == PageKind::Raw { vec![version] } else { Vec::new() };
        self.source.copying.copied += claim.run().count();
        claim.sent();
        self.send(connection, lane, Side::Destination, Packet::Frame(header.encode(), content));
    }

    pub fn send_valid(&mut self) {
        let valid = self.take_written();
        let sabotage = self.sabotage;
        let mut messages = PlacedMessages::new(self.pages);
        let fill = |first: PageIndex, bits: &mut [u64]| {
            valid.fill(first, bits);
            let word = bits.iter_mut().find(|word| **word != 0 && **word != u64::MAX);
            if let (Sabotage::ValidHasOneMore, Some(word)) = (sabotage, word) {
                *word |= *word + 1;
            }
        };
        while let Some(part) = messages.next(1, fill) {
            let message = encode(&ToDestination::Valid { part, last: messages.is_done() });
            if let Some(connection) = self.source.connection {
                let packet = Packet::Message(message);
                self.send(connection, Lane::Control, Side::Destination, packet);
            }
        }
    }

    /// A page comes to the destination before its guest does.
    pub fn take_copy(&mut self, header: &FrameHeader, versions: &[u64]) {
        let copied = &mut self.destination.copied;
        if copied.over {
            return self.checker.fail(format!("{:?} is copied after the guest came", header.run));
        }
        copied.file.resize(self.pages as usize, None);
        for (index, page) in header.run.pages().enumerate() {
            copied.file[page.as_usize()] = Some(versions.get(index).copied().unwrap_or(0));
        }
        copied.came += header.run.count();
        self.look_whether_landed();
    }

    pub fn await_copied(&mut self, pages: u64) {
        self.destination.copied.awaited = Some(pages);
        self.look_whether_landed();
    }

    fn look_whether_landed(&mut self) {
        let copied = &mut self.destination.copied;
        let early = self.sabotage == Sabotage::LandedTooEarly;
        if let Some(pages) = copied.awaited.filter(|pages| copied.came >= *pages || early) {
            copied.awaited = None;
            self.destination_event(DestinationEvent::Landed { pages });
        }
    }

    /// The source has said which of them are valid.
    pub fn take_valid(&mut self, valid: &PlacedPages) {
        let ledger = self.destination.ledger.clone();
        self.destination.copied.over = true;
        for page in valid.runs().flat_map(PageRun::pages) {
            let file = &self.destination.copied.file;
            let Some(version) = file.get(page.as_usize()).copied().flatten() else {
                return self.checker.fail(format!("{page} is valid, and never came"));
            };
            let run = PageRun::single(page);
            if version == 0 {
                self.checker.is_zero(page.get());
                if let Err(error) = ledger.mark_zero(run) {
                    return self.checker.fail(format!("a valid page: {error}"));
                }
                continue;
            }
            match ledger.land(run) {
                Ok(landings) => landings.for_each(|landing| landing.placed()),
                Err(error) => return self.checker.fail(format!("a valid page: {error}")),
            }
            self.checker.places(page.get(), version);
            // It is in the file, and mapped when it is touched.
            self.destination.memory[page.as_usize()] = Some(version);
            self.destination.unmapped.insert(page.get());
        }
        self.look_whether_full();
    }
}
