//! [`Guest`]: what the KVM guest and the process guest have in common.

use super::kvm::processor::Processor;
use super::workload::Workload;
use crate::memory::dirty_bitmap::DirtyBitmap;
use crate::memory::ram::GuestRam;
use crate::proto::page::PageIndex;
use nix::unistd::Pid;
use std::sync::Arc;
use std::time::Instant;

/// Which reference guest.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum GuestKind {
    /// A virtual machine under KVM.
    Kvm,
    /// Threads of this process.
    Process,
}

impl GuestKind {
    /// Its name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Process => "process",
        }
    }
}

/// How a guest's writes are logged, if they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DirtyLogChoice {
    /// What costs a guest of its kind least: of the process guest the only log that there is.
    #[default]
    Auto,
    /// KVM's bitmaps, read and cleared at once.
    Bitmap,
    /// KVM's bitmaps, read at once and cleared in parts (Linux 5.2).
    Manual,
    /// KVM's ring of each vCPU (Linux 6.1).
    Ring,
}

impl DirtyLogChoice {
    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Bitmap => "bitmap",
            Self::Manual => "manual",
            Self::Ring => "ring",
        }
    }
}

/// A failure of a guest: what was tried, and the cause.
#[derive(Debug, thiserror::Error)]
#[error("{kind:?} guest: cannot {action}")]
pub struct GuestError {
    /// Which guest.
    pub kind: GuestKind,
    /// What was tried, as an infinitive: "create vCPU 1", "restore MSRs of vCPU 0".
    pub action: String,
    /// The cause.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// A guest whose vCPUs can be stopped anywhere, taken out as bytes, put into another
/// process and run on there.
///
/// The order of calls: on the source, `start`, then `pause`, `capture`, and either
/// `resume` (the migration was aborted) or drop. On the destination `prepare` (before
/// the blackout: threads and vCPUs exist, nothing runs), `restore`, `resume`.
pub trait Guest: Send {
    /// Which one.
    fn kind(&self) -> GuestKind;
    /// What it was told to do.
    fn workload(&self) -> &Workload;
    /// Its memory.
    fn ram(&self) -> &Arc<GuestRam>;
    /// The machine configuration that both sides must agree on, as stable text.
    fn machine(&self) -> String;
    /// The processor that it sees, if it is a virtual one: what a destination must show it.
    fn processor(&self) -> Option<&Processor> {
        None
    }
    /// The kernel thread of each vCPU, for telling whose fault a fault is.
    fn vcpu_threads(&self) -> Vec<Pid>;
    /// Pages that each vCPU needs for its first instructions: its code, stack,
    /// tables and control pages. At most 32.
    fn seeds(&self) -> Vec<PageIndex>;
    /// Stops every vCPU; none runs guest code after this returns. After an error all of them
    /// run on, as before.
    fn pause(&mut self) -> Result<(), GuestError>;
    /// The complete state of a paused guest, memory apart, in its envelope.
    fn capture(&mut self) -> Result<Vec<u8>, GuestError>;
    /// Puts such a state into a guest that has not run. May touch guest memory.
    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError>;
    /// Lets the vCPUs run: for the first time, after `pause`, or after `restore`.
    fn resume(&mut self) -> Result<(), GuestError>;
    /// When the first vCPU entered guest code after the last `resume`, once it has.
    fn first_entry(&self) -> Option<Instant>;
    /// An error that ended a vCPU thread, if there was one.
    fn failure(&self) -> Option<String>;
    /// Whether it can tell which pages were written. If not, the next three fail.
    fn has_dirty_log(&self) -> bool {
        false
    }
    /// Begins to remember which pages the guest writes, with none remembered.
    fn start_dirty_log(&mut self) -> Result<(), GuestError> {
        Err(no_dirty_log(self.kind()))
    }
    /// Folds the pages that were written since the last round into `into`, together with
    /// those that this process itself wrote, which the guest may not know of; returns how
    /// many pages those are. After `capture` it has all that is ever written before
    /// `resume`.
    fn dirty_round(
        &mut self,
        by_this_process: &[PageIndex],
        into: &DirtyBitmap,
    ) -> Result<u64, GuestError> {
        let _ = (by_this_process, into);
        Err(no_dirty_log(self.kind()))
    }
    /// Remembers no more.
    fn stop_dirty_log(&mut self) -> Result<(), GuestError> {
        Err(no_dirty_log(self.kind()))
    }
}

fn no_dirty_log(kind: GuestKind) -> GuestError {
    let source = "such a guest does not know which pages it writes".into();
    GuestError { kind, action: "log its writes".into(), source }
}
