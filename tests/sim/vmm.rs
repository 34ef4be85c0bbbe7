//! The source's VMM: it owns the guest until the commit word says otherwise.

use crate::ledgers::Ledger;
use crate::network::Side;
use crate::source_side::SourceStep;
use crate::world::{Event, Sabotage, World};

#[derive(Debug, Default)]
pub struct Vmm {
    /// The commit word in shared memory: 0 undecided, 1 committed, 2 taken back.
    pub word: u64,
    pub paused: bool,
    /// It is on its way into a pause.
    pub pausing: bool,
    /// It is to resume after that: it does what its client asks for in order.
    pub resume_next: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum VmmStep {
    /// The fault-server of this incarnation asks for the guest.
    Pause { incarnation: u32 },
    /// The fault-server gives the guest back.
    Resume,
    /// The fault-server is dead.
    ServerGone,
    /// The VMM wants its guest back, for a reason of its own.
    TakeBack,
}

impl<L: Ledger> World<L> {
    pub fn vmm_step(&mut self, step: VmmStep) {
        self.trace.line(self.now, format_args!("VMM {step:?}, {:?}", self.vmm));
        match step {
            VmmStep::Pause { incarnation } => {
                self.vmm.pausing = false;
                // The guest of a dead server is not paused for it.
                if incarnation != self.source.incarnation || self.source.session.is_none() {
                    return;
                }
                let step = if self.vmm.word != 0 || self.random.percent(1) {
                    SourceStep::PauseFailed
                } else {
                    self.vmm.paused = true;
                    self.guest.generation += 1;
                    self.checker.pauses();
                    SourceStep::Paused
                };
                self.soon(500, Event::Source { incarnation, step });
                if std::mem::take(&mut self.vmm.resume_next) {
                    self.vmm_step(VmmStep::Resume);
                }
            }
            VmmStep::Resume if self.vmm.pausing => self.vmm.resume_next = true,
            VmmStep::Resume | VmmStep::TakeBack if !self.vmm.paused => {}
            VmmStep::Resume | VmmStep::TakeBack => self.take_back(),
            VmmStep::ServerGone => self.take_back(),
        }
    }

    /// Takes the guest back unless the word forbids it: one compare-and-exchange.
    fn take_back(&mut self) {
        if self.vmm.word == 0 {
            self.vmm.word = 2;
            self.checker.writes_word(2);
        }
        let allowed = self.vmm.word == 2 || self.sabotage == Sabotage::IgnoreWord;
        if self.vmm.paused && allowed {
            self.vmm.paused = false;
            self.checker.starts(Side::Source);
            self.start_vcpus();
        }
    }
}
