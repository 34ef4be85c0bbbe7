//! What the engine asks of a VMM, on either side.

use crate::memory::dirty_bitmap::{DirtyBitmap, NO_DIRTY_LOG};
use crate::proto::message::{Hello, Mismatch};
use crate::proto::page::PageIndex;
use crate::report::schema::Distribution;
use nix::unistd::Pid;
use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// A failure of the VMM, with its cause.
pub type VmError = Box<dyn std::error::Error + Send + Sync>;

/// A paused guest as it travels.
#[derive(Clone, Debug, Default)]
pub struct Captured {
    /// The machine state, memory apart.
    pub state: Vec<u8>,
    /// Pages that the vCPUs need for their first instructions.
    pub seeds: Vec<PageIndex>,
    /// How long it took until every vCPU stood still.
    pub pause: Duration,
    /// How long it took to read the state out.
    pub capture: Duration,
    /// Whether its user had it paused before it was asked for: then it arrives paused, and
    /// [`SourceVm::resume`] leaves it so.
    pub was_paused: bool,
}

/// The source's VMM: it has a running guest whose memory the engine can read.
///
/// All calls come from one thread, and may block. `pause` begins the blackout.
pub trait SourceVm: Any + Send {
    /// Asks the guest to start its own instruments anew, before the blackout.
    fn reset_instruments(&mut self) {}
    /// Begins to remember which pages are written, by whomever, with none remembered, and
    /// returns where they are told: for copying memory while the guest runs. It ends with
    /// [`resume`](SourceVm::resume), [`release`](SourceVm::release) or
    /// [`aborted`](SourceVm::aborted).
    ///
    /// # Errors
    /// This VMM cannot tell.
    fn start_dirty_log(&mut self) -> Result<Arc<DirtyBitmap>, VmError> {
        Err(NO_DIRTY_LOG.into())
    }
    /// Puts the pages that were written since the last round into the bitmap; after
    /// [`pause`](SourceVm::pause), all that ever were.
    ///
    /// # Errors
    /// What was written is not known any more, and the log has ended.
    fn dirty_round(&mut self) -> Result<(), VmError> {
        Err(NO_DIRTY_LOG.into())
    }
    /// Stops every vCPU and takes the machine state out. After an error the guest
    /// runs on.
    fn pause(&mut self) -> Result<Captured, VmError>;
    /// The point of no return: after `Ok(true)` the guest must never run here again.
    /// `Ok(false)`: the VMM has taken its guest back already, which a VMM in this process
    /// does not do by itself. An error means that nothing was recorded: the guest is resumed.
    /// A call that does not return leaves it nowhere.
    fn commit(&mut self) -> Result<bool, VmError> {
        Ok(true)
    }
    /// Undoes the commit, on an operator's word that the guest does not run at the
    /// destination and never will: after `Ok` it is this side's again, for ever, and is
    /// resumed. After an error it is the destination's, as before. Only asked for while
    /// nobody has heard from there that it runs.
    fn take_back(&mut self) -> Result<(), VmError> {
        Err("this VMM cannot take a guest back that it has given away".into())
    }
    /// Lets the guest go on here as it was before [`pause`](SourceVm::pause): the migration was
    /// aborted before the commit, or the commit was undone.
    fn resume(&mut self) -> Result<(), VmError>;
    /// The guest runs elsewhere: vCPUs and devices may go. Its memory is still read here
    /// and must stay as it is until [`drained`](SourceVm::drained).
    fn release(&mut self) -> Result<(), VmError>;
    /// All memory is elsewhere, too: what is left of the guest may go.
    fn drained(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    /// The operator has given the guest up after the commit: whoever holds its memory only
    /// for the session's sake may let go. Nothing may be resumed.
    fn given_up(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    /// The session is over and was aborted, before the commit or by taking that back; a paused
    /// guest was resumed before this.
    ///
    /// # Errors
    /// Why the guest is not here any more, if it is not: nobody is told then that it runs
    /// on.
    fn aborted(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// What the guest itself measured, for the report.
#[derive(Clone, Debug, Default)]
pub struct GuestFigures {
    /// Largest gap between two steps.
    pub max_gap: Option<Duration>,
    /// Steps slower than a native fault, in nanoseconds.
    pub stalls: Option<Distribution>,
}

/// The destination's VMM. All calls come from one thread, and may block; while
/// `restore` and `resume` run, the engine serves faults on other threads.
pub trait DestinationVm: Any + Send {
    /// Memory of the VMM's own making for the proposed guest, of the proposed layout:
    /// private anonymous, or shared mappings of files, or those of files of hugetlbfs (2 MiB), and
    /// all of one kind. What is in it is lost.
    /// `None`: the engine makes it.
    fn memory(&mut self, _proposal: &Hello) -> Result<Option<GuestMemoryMmap>, Mismatch> {
        Ok(None)
    }
    /// Makes VM, vCPUs and memory slots for the proposed guest over `memory`, whose pages
    /// are missing and trapped: nothing here may touch them, and no reference into them may
    /// be made, ever. Returns the machine configuration that came out, which must equal the
    /// source's.
    fn prepare(&mut self, proposal: &Hello, memory: GuestMemoryMmap) -> Result<String, Mismatch>;
    /// The kernel thread of each vCPU, asked for after `prepare`. Faults of threads that are
    /// not named are served as well, but not counted as a vCPU's.
    fn vcpu_threads(&self) -> Vec<Pid> {
        Vec::new()
    }
    /// Puts the machine state in. May touch guest memory.
    fn restore(&mut self, state: &[u8]) -> Result<(), VmError>;
    /// Lets the vCPUs run; returns when the first one has entered the guest, and
    /// when that was.
    fn resume(&mut self) -> Result<Instant, VmError>;
    /// The guest is here for good, but its user had it paused at the source: it is not resumed.
    /// From here on it is the VMM's to let it run, at any time; pages come meanwhile.
    ///
    /// # Errors
    /// The guest cannot be kept: it is lost.
    fn keep_paused(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    /// Whether the guest has done what it was to do.
    fn workload_ended(&mut self) -> bool {
        false
    }
    /// Steps of work that the guest counted so far, once it runs.
    fn steps(&mut self) -> Option<u64> {
        None
    }
    /// The guest's own figures, once it runs; only pages that are placed may be read.
    fn figures(&mut self) -> GuestFigures {
        GuestFigures::default()
    }
}
