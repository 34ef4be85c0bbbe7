//! The source's VMM and its keeper: the first owns the guest until the commit word says
//! otherwise, the second holds what must outlive everybody.

use crate::ledgers::Ledger;
use crate::network::Side;
use crate::source_side::SourceStep;
use crate::world::{Event, Sabotage, World};

/// The commit word's values.
pub const UNDECIDED: u64 = 0;
pub const COMMITTED: u64 = 1;
pub const ABORTED: u64 = 2;
pub const TAKEN_BACK: u64 = 3;
pub const RUNNING: u64 = 4;

#[derive(Debug, Default)]
pub struct Vmm {
    /// The commit word in shared memory.
    pub word: u64,
    pub paused: bool,
    /// It is on its way into a pause.
    pub pausing: bool,
    /// It is to resume after that: it does what its client asks for in order.
    pub resume_next: bool,
    pub dead: bool,
    /// It was told that the guest runs elsewhere.
    pub released: bool,
    pub keeper: Keeper,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keeper {
    #[default]
    NotStarted,
    Holds,
    Dead,
}

#[derive(Clone, Copy, Debug)]
pub enum VmmStep {
    /// The fault-server of this incarnation asks for the guest.
    Pause { incarnation: u32 },
    /// The fault-server gives the guest back.
    Resume,
    /// The fault-server is dead.
    ServerGone,
    /// The keeper notices the same.
    KeeperLeft,
    /// The VMM wants its guest back, for a reason of its own.
    TakeBack,
}

impl Vmm {
    /// Whether the guest was given away.
    pub fn committed(&self) -> bool {
        matches!(self.word, COMMITTED | RUNNING)
    }
}

impl<L: Ledger> World<L> {
    pub fn vmm_step(&mut self, step: VmmStep) {
        self.trace.line(self.now, format_args!("VMM {step:?}, {:?}", self.vmm));
        match step {
            VmmStep::Pause { incarnation } => self.pause(incarnation),
            VmmStep::KeeperLeft => {
                let aborts = self.sabotage != Sabotage::KeeperSleeps;
                if self.vmm.keeper == Keeper::Holds && self.vmm.word == UNDECIDED && aborts {
                    self.vmm.word = ABORTED;
                    self.checker.writes_word(ABORTED);
                }
            }
            _ if self.vmm.dead => {}
            VmmStep::Resume if self.vmm.pausing => self.vmm.resume_next = true,
            VmmStep::Resume | VmmStep::TakeBack if !self.vmm.paused => {}
            VmmStep::Resume | VmmStep::TakeBack => self.take_back(),
            VmmStep::ServerGone => self.take_back(),
        }
    }

    fn pause(&mut self, incarnation: u32) {
        self.vmm.pausing = false;
        // The guest of a dead server is not paused for it.
        if incarnation != self.source.incarnation || self.source.session.is_none() {
            return;
        }
        let unlucky = self.random.percent(1);
        let step = if self.vmm.word != UNDECIDED || self.vmm.dead || unlucky {
            self.harm();
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

    /// Takes the guest back unless the word forbids it: one compare-and-exchange.
    fn take_back(&mut self) {
        if self.vmm.word == UNDECIDED {
            self.vmm.word = ABORTED;
            self.checker.writes_word(ABORTED);
        }
        let allowed = !self.vmm.committed() || self.sabotage == Sabotage::IgnoreWord;
        if self.vmm.paused && allowed {
            self.vmm.paused = false;
            self.checker.starts(Side::Source);
            self.start_vcpus();
        }
    }

    /// The VMM dies. A guest that runs there is lost with it.
    pub fn kill_vmm(&mut self) {
        if self.vmm.dead || self.vmm.released {
            return;
        }
        self.vmm.dead = true;
        if self.checker.vmm_dies() {
            self.guest.generation += 1;
        }
        if std::mem::take(&mut self.vmm.pausing) {
            let incarnation = self.source.incarnation;
            let step = SourceStep::PauseFailed;
            self.soon(500, Event::Source { incarnation, step });
        }
    }

    /// An operator says that the destination does not run the guest, and takes it back.
    pub fn operator_takes_back(&mut self) {
        if self.vmm.word == COMMITTED && !self.vmm.dead && self.source.session.is_none() {
            self.vmm.word = TAKEN_BACK;
            self.checker.writes_word(TAKEN_BACK);
            self.vmm_step(VmmStep::TakeBack);
        }
    }
}
