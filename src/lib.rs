//! Post-copy live migration of virtual machines.
//!
//! A guest is paused at the source, the state of its vCPUs is sent, and it runs on at the
//! destination at once, without its memory. Touching a page that is not there is trapped
//! by `userfaultfd` and becomes a *network fault*: the page is asked for over QUIC, on a
//! lane that nothing else uses. Meanwhile *pre-paging* pushes all other pages, those near
//! recent faults first, so that most faults never happen. Each page is sent exactly once.
//!
//! # Finding your way
//!
//! * [`proto`] is what may happen, and compiles by itself (`default-features = false`):
//!   ledgers, frames, policies and the two session machines, without sockets, threads,
//!   clocks or `unsafe`.
//! * `memory`, `uffd`, `transport`, `attach` and `vmm` each talk to one part of the
//!   outside, and know nothing of each other.
//! * `engine` wires them: `engine::source::Migration` on one side,
//!   `engine::destination::Receiver` on the other, and in `engine::vm` what both ask of a
//!   VMM.
//! * `host` is the reference VMM, `fault_server` the source for VMMs in another process,
//!   [`checker`] the judge of both.
//!
//! The life of a page, the threads and the failures are in `docs/architecture.md`, the
//! bytes on the wire in `docs/protocol.md`.
//!
//! # The life of a page, without a network
//!
//! Only who holds a claim can frame a page, and only who holds a landing can place it:
//!
//! ```
//! use postcopy::proto::frame::{FrameHeader, FrameLimits, Origin, PageKind};
//! use postcopy::proto::ledger::{DestinationLedger, FaultAnswer, SourceLedger};
//! use postcopy::proto::page::PageIndex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (source, destination) = (SourceLedger::new(1024), DestinationLedger::new(1024));
//! let page = PageIndex::new(7);
//!
//! // A vCPU touches the page at the destination: it must be asked for, but only once.
//! assert!(matches!(destination.fault(page)?, FaultAnswer::Request));
//! assert!(matches!(destination.fault(page)?, FaultAnswer::Wait));
//!
//! // The source claims it, and nobody else can.
//! let claim = source.claim(page).ok_or("it was claimed before")?;
//! let header = FrameHeader::for_claim(&claim, PageKind::Raw, Origin::Demand, 0).encode();
//! claim.sent();
//! assert!(source.claim(page).is_none());
//!
//! // It arrives, and is placed.
//! let header = FrameHeader::parse(&header, FrameLimits { pages: 1024, epoch: 0 })?;
//! for landing in destination.land(header.run)? {
//!     // Here its content is put into the guest's memory.
//!     landing.placed();
//! }
//! assert!(destination.is_settled(page));
//! assert_eq!(destination.missing(), 1023);
//! # Ok(())
//! # }
//! ```
#![cfg_attr(
    feature = "io",
    doc = r##"
# In a VMM

The source; the engine calls `pause` when both sides have agreed, `release` when the guest
runs at the destination, and `drained` when all its pages are there:

```no_run
use postcopy::engine::source::{Migration, SourceConfig};
use postcopy::engine::vm::{Captured, SourceVm, VmError};
use postcopy::memory::ram::{Backing, GuestRam};
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::prepaging::PolicyKind;
use postcopy::proto::source::SessionLimits;
use postcopy::transport::{LinkOptions, Ticket};
use std::sync::Arc;
use std::time::{Duration, Instant};

struct Vmm { /* vCPUs, devices */ }

impl SourceVm for Vmm {
    fn pause(&mut self) -> Result<Captured, VmError> {
        let asked = Instant::now();
        // Stop every vCPU, so that nothing writes guest memory any more.
        let pause = asked.elapsed();
        let state = Vec::new(); // The registers of vCPUs and devices.
        Ok(Captured { state, seeds: Vec::new(), pause, capture: Duration::ZERO })
    }
    fn commit(&mut self) -> Result<bool, VmError> {
        Ok(true) // From here on the guest must never run here again.
    }
    fn resume(&mut self) -> Result<(), VmError> {
        Ok(()) // Aborted before the commit: let the vCPUs run on.
    }
    fn release(&mut self) -> Result<(), VmError> {
        Ok(()) // It runs there: let the vCPUs go. The memory is still read.
    }
    fn drained(&mut self) -> Result<(), VmError> {
        Ok(()) // Now it is not.
    }
}

fn migrate(vmm: Vmm, ram: Arc<GuestRam>, ticket: Ticket) -> Result<(), Box<dyn std::error::Error>> {
    let config = SourceConfig {
        ticket,
        link: LinkOptions::default(),
        limits: SessionLimits::default(),
        policy: PolicyKind::Bubbling,
        pivots: None,
        drain_after: None,
        machine: "what must be equal on both sides".into(),
        guest: b"what the destination's VMM must know to make the guest".to_vec(),
        vcpus: 1,
        guest_kind: "kvm".into(),
        workload: None,
    };
    let end = Migration::new(config, ram).run(Box::new(vmm), |_progress| {})?;
    println!("{:?}", end.outcome);
    Ok(())
}
# fn main() -> Result<(), Box<dyn std::error::Error>> {
#     let ram = Arc::new(GuestRam::new(MemoryLayout::flat(1024)?, Backing::Memfd)?);
#     migrate(Vmm {}, ram, std::env::args().nth(1).ok_or("no ticket")?.parse()?)
# }
```

The destination implements `engine::vm::DestinationVm` in the same way and hands it to
`engine::destination::Receiver::run`; `host::arrival` is an example. A VMM in another
process than the engine is reached through [`attach`] and served by [`fault_server`].
"##
)]
#![cfg_attr(not(feature = "io"), forbid(unsafe_code))]

#[cfg(feature = "io")]
pub mod attach;
pub mod checker;
#[cfg(feature = "io")]
pub mod engine;
#[cfg(feature = "io")]
pub mod fault_server;
#[cfg(feature = "io")]
pub mod host;
#[cfg(feature = "io")]
pub mod memory;
#[cfg(feature = "io")]
pub mod program;
pub mod proto;
#[cfg(feature = "io")]
pub mod report;
#[cfg(feature = "io")]
pub mod transport;
#[cfg(feature = "io")]
pub mod uffd;
#[cfg(feature = "io")]
pub mod vmm;
