//! The reference VMM: guests that can be migrated and that check themselves.

pub mod content;
pub mod guest;
pub mod kvm;
pub mod workload;
