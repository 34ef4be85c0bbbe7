//! Never two: once the commit is made, the guest that was at the source makes no step.
//!
//! Its steps are read from its own memory, through `/proc`, whoever may map it by then: the
//! word says who the guest's is, and a step after that was made by a second one.

use super::commit_word::{CommitWord, Decision};
use super::harness::{Guest, POSTCOPY};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Where the steps of a vCPU are counted: in word 1 of its control page, see
/// `src/vmm/workload.rs`.
const CONTROL_PAGE: u64 = 16;
const STEPS_WORD: u64 = 1;
const VCPUS_MAX: u64 = 2;

/// Watches a guest at its source until the commit, and remembers its steps then.
pub struct SourceGuest {
    memory: Arc<File>,
    over: Arc<AtomicBool>,
    watch: Option<JoinHandle<Option<Vec<u64>>>>,
}

impl SourceGuest {
    /// The guest whose VMM is the process `pid`, which is alive; from now on its `word` is
    /// watched.
    pub fn of(pid: u32, word: CommitWord) -> Self {
        let memory = Arc::new(guest_memory(pid));
        let over = Arc::new(AtomicBool::new(false));
        let (of, until) = (memory.clone(), over.clone());
        let watch = std::thread::spawn(move || {
            loop {
                // It may have been made in the last moment.
                let last = until.load(Ordering::Relaxed);
                if matches!(word.decision(), Decision::Committed | Decision::Running) {
                    return Some(steps(&of));
                }
                if last {
                    return None;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self { memory, over, watch: Some(watch) }
    }

    /// Ends the watch, and fails if the guest has made a step since the commit. Says whether
    /// there was a commit.
    pub fn made_no_step_since_the_commit(&mut self) -> bool {
        self.over.store(true, Ordering::Relaxed);
        let watch = self.watch.take().expect("it is asked once");
        let Some(then) = watch.join().expect("nothing in it panics") else { return false };
        let now = steps(&self.memory);
        assert_eq!(then, now, "the guest runs twice: it made steps at the source since the commit");
        assert!(then[0] > 0, "these are no steps of a guest: {then:?}");
        true
    }
}

impl Drop for SourceGuest {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn guest_memory(pid: u32) -> File {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs");
    let memory = |path: &PathBuf| {
        let target = std::fs::read_link(path).unwrap_or_default();
        target.to_string_lossy().starts_with("/memfd:guest-memory")
    };
    let path = descriptors.flatten().map(|entry| entry.path()).find(memory);
    File::open(path.expect("a VMM has its guest's memory in a memfd")).expect("we may read it")
}

fn steps(memory: &File) -> Vec<u64> {
    let read = |vcpu| {
        let mut word = [0; 8];
        let at = (CONTROL_PAGE + 2 * vcpu) * 4096 + STEPS_WORD * 8;
        memory.read_exact_at(&mut word, at).expect("a guest has control pages");
        u64::from_le_bytes(word)
    };
    (0..VCPUS_MAX).map(read).collect()
}

#[test]
fn a_guest_that_runs_on_after_the_commit_is_noticed() {
    let arguments = ["--guest", "process", "--memory", "16M"];
    let guest = Guest::start_unlimited(Command::new(POSTCOPY), &arguments);
    let pid = guest.process.pid();
    let mut watched = SourceGuest::of(pid, CommitWord::of(pid));
    // A VMM does not take a word for the commit of a guest that it has not paused.
    let attached = guest.attach();
    let _proof = attached.word.commit().expect("an undecided word");
    std::thread::sleep(Duration::from_millis(300));
    let asked = AssertUnwindSafe(|| watched.made_no_step_since_the_commit());
    let panicked = std::panic::catch_unwind(asked).expect_err("two guests");
    let said = panicked.downcast_ref::<String>().expect("a text");
    assert!(said.contains("the guest runs twice"), "{said}");
}
