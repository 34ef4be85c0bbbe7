//! Processes that are killed, or hang, at moments that nobody chose: real guests, real
//! processes, SIGKILL. A few rounds each, or as many as asked for:
//!
//! ```sh
//! cargo test --test torture -- --nocapture
//! POSTCOPY_TORTURE_ROUNDS=100 cargo test --test torture after_commit -- --nocapture
//! POSTCOPY_TORTURE_SEED=17 POSTCOPY_TORTURE_ROUNDS=1 cargo test --test torture ...
//! ```
//!
//! Each round prints one line with its seed, which decides the guest, the link and the
//! moment; how far the processes were by then is the machine's own doing, and is printed
//! too. The commit is not guessed at: it is read from the commit word, which the VMM has
//! in a memfd.
#![cfg(feature = "io")]

// Child processes: limits, captured output, the number that runs at a time.
#[allow(dead_code)] // The other tests use the rest.
#[path = "../migrate/harness.rs"]
mod harness;
// Rounds: seeds, a limit on each, nothing left behind.
mod rounds;
// The commit word of another process.
mod commit_word;

// The source's VMM hangs or dies while the memory is still at the source.
mod after_commit;
// The destination, or the fault server, dies before the commit.
mod before_commit;
