//! Post-copy live migration of virtual machines.
#![cfg_attr(not(feature = "io"), forbid(unsafe_code))]

pub mod checker;
#[cfg(feature = "io")]
pub mod memory;
pub mod proto;
#[cfg(feature = "io")]
pub mod uffd;
#[cfg(feature = "io")]
pub mod vmm;
