//! The commit word as an onlooker sees it: read through `/proc`, by what
//! `docs/attach.md` says of it.

use super::harness::{SOON, TimeLimit, poll};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// What the word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Undecided,
    Committed,
    Aborted,
    /// Committed before.
    TakenBack,
    /// Committed before, and heard to run at the destination.
    Running,
}

/// The commit word that a VMM keeps for its next, or present, fault server. It stays
/// readable when the VMM is dead.
pub struct CommitWord(File);

impl CommitWord {
    /// The word in the process `pid`.
    pub fn of(pid: u32) -> Self {
        let file = poll("a VMM with a commit word", SOON, || {
            let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
            let paths = descriptors.flatten().map(|entry| entry.path());
            let named = |path: &std::path::PathBuf| {
                let target = std::fs::read_link(path).unwrap_or_default();
                target.to_string_lossy().starts_with("/memfd:commit-word")
            };
            let mut words = paths.filter(named);
            let word = words.next()?;
            assert!(words.next().is_none(), "a VMM with two commit words");
            File::open(word).ok()
        });
        Self(file)
    }

    /// What it says now.
    pub fn decision(&self) -> Decision {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, 0).expect("a commit word has eight bytes");
        match u64::from_ne_bytes(bytes) {
            0 => Decision::Undecided,
            1 => Decision::Committed,
            2 => Decision::Aborted,
            3 => Decision::TakenBack,
            4 => Decision::Running,
            other => panic!("the commit word says {other}"),
        }
    }

    /// Waits for the commit, and returns as soon as it can be seen.
    pub fn committed(&self) {
        let mut limit = TimeLimit::new(SOON);
        while !matches!(self.decision(), Decision::Committed | Decision::Running) {
            assert!(!limit.is_over(), "no commit within {SOON:?}");
            std::thread::sleep(Duration::from_micros(10));
        }
    }
}
