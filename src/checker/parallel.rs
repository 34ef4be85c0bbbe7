//! [`on_threads`]: work that is split, on as many threads as there are to be had.

use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, scope};

/// Does each piece of `work`; the results are in its order. Where a thread cannot be made,
/// those that are there do its share.
pub(super) fn on_threads<W: Send, T: Send>(work: Vec<W>, one: impl Fn(W) -> T + Sync) -> Vec<T> {
    let pieces = work.len();
    let left = Mutex::new(work.into_iter().enumerate());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let some = || {
        let mut done = Vec::new();
        while let Some((index, piece)) = next() {
            done.push((index, one(piece)));
        }
        done
    };
    scope(|scope| {
        let helpers: Vec<_> =
            (1..pieces).map_while(|_| Builder::new().spawn_scoped(scope, some).ok()).collect();
        let mut done = some();
        for helper in helpers {
            done.extend(helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done.sort_by_key(|(index, _)| *index);
        done.into_iter().map(|(_, result)| result).collect()
    })
}
