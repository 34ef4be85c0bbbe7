//! The shared-memory primitives of the ledgers: the standard library's, or
//! loom's when their models are checked (`--cfg loom`). Nothing else.

#[cfg(loom)]
pub(super) use loom::sync::{
    Arc, RwLock,
    atomic::{AtomicU64, Ordering},
};
#[cfg(not(loom))]
pub(super) use std::sync::{
    Arc, RwLock,
    atomic::{AtomicU64, Ordering},
};
