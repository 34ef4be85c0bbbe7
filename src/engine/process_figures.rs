//! What this process used so far, for the report.

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

/// Processor time of all threads, in microseconds.
pub fn cpu_us() -> Option<u64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let time = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    u64::try_from(time).ok()
}

/// The most memory that was ever resident, in bytes; the guest's is in it.
pub fn peak_rss_bytes() -> Option<u64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    u64::try_from(usage.max_rss()).ok().map(|kib| kib * 1024)
}
