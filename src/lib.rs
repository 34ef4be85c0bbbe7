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
//! * `engine` wires them: `SourceBuilder` and `Migration` on one side, `DestinationBuilder`
//!   and `Receiver` on the other, and in `engine::vm` what both ask of a VMM.
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
//! let limits = FrameLimits { pages: 1024, epoch: 0, compressed: false };
//! let header = FrameHeader::parse(&header, limits)?;
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

Two traits say what a VMM must do: [`SourceVm`] and [`DestinationVm`]. Two builders say what
the engine must know: [`SourceBuilder`] takes the guest's memory, as a
[`GuestMemoryMmap`](vm_memory::GuestMemoryMmap), and the [`Ticket`] that
[`DestinationBuilder`] made. An [`Event`] tells how it goes.

```
use postcopy::{Captured, DestinationBuilder, Event, SourceBuilder, SourceVm, VmError};
use std::time::Instant;
use vm_memory::{GuestAddress, GuestMemoryMmap};

struct Vmm { /* vCPUs, devices */ }

impl SourceVm for Vmm {
    fn pause(&mut self) -> Result<Captured, VmError> {
        let asked = Instant::now();
        // Stop every vCPU and device, so that nothing writes guest memory any more.
        let pause = asked.elapsed();
        let state = Vec::new(); // The registers of vCPUs and devices.
        Ok(Captured { state, pause, ..Captured::default() })
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

# fn main() -> Result<(), Box<dyn std::error::Error>> {
// On one host; its VMM is given to `receiver.run`.
let receiver = DestinationBuilder::new().push_lanes(2).build()?;
println!("{}", receiver.ticket());

// On the other, where the guest runs.
let ticket = receiver.ticket().to_string().parse()?;
let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
// SAFETY: once `pause` has returned, nothing writes to `memory` unless `resume` is called.
let migration = unsafe { SourceBuilder::new(memory, ticket) }
    .machine("what must be equal on both sides")
    .guest("what the destination's VMM must know to make the guest")
    .vcpus(1)
    .on_event(|event| if let Event::Phase(phase) = event { println!("{phase}") })
    .build()?;
# let elsewhere = false;
# if elsewhere {
let end = migration.run(Box::new(Vmm {}))?;
println!("{:?}", end.outcome);
# }
# Ok(())
# }
```

The whole of it, with the destination and a KVM guest, is `examples/tiny_vmm`; what may block,
what must never touch memory and which memory is refused is in `docs/embedding.md`. A VMM in
another process than the engine is reached through [`attach`] and served by [`fault_server`].
"##
)]
#![cfg_attr(not(feature = "io"), forbid(unsafe_code))]

#[cfg(feature = "io")]
pub mod attach;
#[cfg(feature = "io")]
pub mod bench;
pub mod checker;
#[cfg(feature = "io")]
pub mod engine;
#[cfg(feature = "io")]
pub mod failpoint;
#[cfg(feature = "io")]
pub mod fault_server;
#[cfg(feature = "io")]
pub mod host;
#[cfg(feature = "io")]
pub mod memory;
#[cfg(feature = "io")]
pub mod operator;
#[cfg(feature = "io")]
pub mod program;
pub mod proto;
#[cfg(feature = "io")]
pub mod report;
#[cfg(feature = "io")]
pub mod transport;
#[cfg(feature = "io")]
pub mod trial;
#[cfg(feature = "io")]
pub mod uffd;
#[cfg(feature = "io")]
pub mod vmm;

#[cfg(feature = "io")]
pub use engine::{
    ConfigError,
    destination::{
        Canceller as DestinationCanceller, Collapsing, DestinationBuilder, DestinationEnd, Receiver,
    },
    event::{Event, Phase, Progress},
    operator::{Operator, SessionStatus},
    source::{Canceller as SourceCanceller, Migration, SourceBuilder, SourceEnd},
    vm::{Captured, DestinationVm, GuestFigures, SourceVm, VmError},
};
#[cfg(feature = "io")]
pub use memory::users::MemoryUser;
#[cfg(feature = "io")]
pub use proto::{
    compression::CompressMode,
    message::{Hello, Mismatch},
    page::PageIndex,
    prepaging::PolicyKind,
    source::{Outcome, SessionLimits},
    timeline::Stamp,
};
#[cfg(feature = "io")]
pub use transport::{LinkOptions, Ticket};
#[cfg(feature = "io")]
pub use uffd::DestinationBacking;
/// Guest memory comes in and goes out as this crate's types.
#[cfg(feature = "io")]
pub use vm_memory;
