//! Huge pages in this host's pool, for as long as a test needs them.
//!
//! Not a test by itself. The pool is the host's: one test at a time sets it, whichever process
//! it is in, and sets it back.

use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, read_to_string, write};
use std::time::{Duration, Instant};

const SET: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
const SURPLUS: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/surplus_hugepages";
const OVERCOMMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";

/// So many free huge pages and no more, until it is dropped.
pub struct Pool {
    before: u64,
    _alone: Flock<File>,
}

fn number(path: &str) -> Option<u64> {
    read_to_string(path).ok()?.trim().parse().ok()
}

/// Waits for a number, which changes a moment after the end of whoever changes it.
fn becomes(path: &str, wanted: u64) {
    let asked = Instant::now();
    while number(path) != Some(wanted) {
        let now = number(path);
        assert!(asked.elapsed() < Duration::from_secs(20), "{path} is {now:?} and not {wanted}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Pool {
    /// `pages` of 2 MiB; none, and a line that says so, where they cannot be had.
    pub fn of(pages: u64) -> Option<Self> {
        let lock = std::env::temp_dir().join("postcopy-test-huge-pages");
        let lock = File::create(lock).expect("a file for a lock");
        let alone = Flock::lock(lock, FlockArg::LockExclusive).expect("a lock");
        if number(OVERCOMMIT) != Some(0) {
            println!("SKIPPED: this kernel has no pool of huge pages of 2 MiB, or one without end");
            return None;
        }
        // What a test before had may still be on its way back.
        becomes(SURPLUS, 0);
        let (before, free) = number(SET).zip(number(FREE)).expect("there is a pool");
        let pool = Self { before, _alone: alone };
        let set = write(SET, (before - free + pages).to_string());
        if set.is_err() || number(FREE) != Some(pages) {
            println!("SKIPPED: {pages} huge pages cannot be had here: {set:?}");
            return None;
        }
        Some(pool)
    }

    /// Waits until nobody has `free` of them.
    pub fn has_free(&self, free: u64) {
        becomes(FREE, free);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = write(SET, self.before.to_string());
    }
}
