//! Everything between this crate and `userfaultfd`: getting a descriptor
//! ([`mod@open`]), putting guest memory under it ([`mod@register`]), reading what the
//! guest waits for ([`trap`]) and answering it ([`place`]). And, for a guest at the source,
//! which pages were written ([`write_log`]).
//!
//! Nothing here knows which pages are placed, requested or on their way; the
//! ledgers in [`proto`](crate::proto) do. Nothing here touches the registered
//! mapping either: a thread that did so would wait for itself.

mod blocks;
mod content;
mod ioctl;
pub mod open;
pub mod place;
pub mod register;
pub mod trap;
pub mod write_log;

pub use content::Content;
pub use open::{OpenError, UffdOptions};
pub use place::{PlaceError, Placed, Placer, Stop};
pub use register::{DestinationBacking, RegisterError, register};
pub use trap::{BATCH_EVENTS_MAX, Trap, TrapError, TrapEvent};
pub use write_log::{WriteLog, WriteLogError};
