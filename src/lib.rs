//! Post-copy live migration of virtual machines.
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
