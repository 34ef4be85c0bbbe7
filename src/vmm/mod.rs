//! The reference VMM: guests that can be migrated and that check themselves.

pub mod choice;
pub mod clock;
pub mod content;
pub mod guest;
pub mod kvm;
pub mod process;
pub mod stalls;
pub mod trace;
pub mod workload;
