//! [`CommitWord`]: one word of shared memory that decides where a guest runs.
//!
//! The fault-server turns it from undecided to committed *before* Commit leaves
//! for the destination; the VMM turns it from undecided to aborted before it
//! lets a paused guest run again. Both are one atomic compare-and-exchange, so
//! exactly one of them happens, whichever process dies and whatever a socket
//! says. It is not a lock: nobody waits on it.
//!
//! A commit may be in doubt: the word says committed, and nobody has heard that the guest
//! runs at the destination. From there it goes one step further, again by one
//! compare-and-exchange, of which only one can succeed: to *running*, once the destination
//! has said so, or to *taken back*, on an operator's word that it does not run there and
//! will not.
//!
//! ```mermaid
//! stateDiagram-v2
//!   undecided --> committed: the fault-server
//!   undecided --> aborted: the VMM, or a keeper
//!   committed --> running: the fault-server has heard Running
//!   committed --> taken_back: an operator asserts that it does not run there
//! ```

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

const UNDECIDED: u64 = 0;
const COMMITTED: u64 = 1;
const ABORTED: u64 = 2;
const TAKEN_BACK: u64 = 3;
const RUNNING: u64 = 4;

/// Bytes of the shared file: one page. The word is its first eight bytes.
const FILE_BYTES: usize = 4096;

/// A word in shared memory that goes once from undecided to committed or aborted, and from
/// committed once to running or taken back.
#[derive(Debug)]
pub struct CommitWord {
    word: NonNull<AtomicU64>,
    memfd: OwnedFd,
}

/// What a [`CommitWord`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing yet: the guest belongs to the VMM.
    Undecided,
    /// The guest may run on the destination, and never again here.
    Committed,
    /// The guest stays here, and no Commit leaves.
    Aborted,
    /// It was committed, and an operator took it back, on his word that it does not run at
    /// the destination and never will: it is the VMM's again.
    TakenBack,
    /// It was committed, and was heard to run at the destination: nobody takes it back.
    Running,
    /// A value that neither side writes. Nobody may run the guest on its account.
    Damaged(u64),
}

/// Proof that the word says committed. Commit may leave for the destination.
#[derive(Debug)]
#[must_use = "Commit leaves only on the strength of this"]
pub struct Committed(());

/// Proof that the word says aborted, or taken back. The guest may run on here.
#[derive(Debug)]
#[must_use = "the guest is resumed only on the strength of this"]
pub struct Aborted(());

/// The VMM has taken the guest back: Commit must not leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the VMM has already taken the guest back (commit word {found})")]
pub struct AlreadyAborted {
    /// The word's value.
    pub found: u64,
}

/// The guest has been given away: it must not run here again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest has already been given to the destination (commit word {found})")]
pub struct AlreadyCommitted {
    /// The word's value.
    pub found: u64,
}

/// The guest is not in doubt, so nobody can take it back, or be told that it runs there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", match *.found {
    UNDECIDED => "the guest was not committed".to_owned(),
    ABORTED => "the guest was not committed, and is its VMM's".to_owned(),
    TAKEN_BACK => "an operator has taken the guest back".to_owned(),
    RUNNING => "the guest was heard to run at the destination".to_owned(),
    found => format!("the commit word is damaged ({found})"),
})]
pub struct NotInDoubt {
    /// The word's value.
    pub found: u64,
}

/// A commit word that could not be made or mapped.
#[derive(Debug, thiserror::Error)]
pub enum CommitWordError {
    /// A system call failed.
    #[error("cannot {action} the commit word")]
    System {
        /// What was tried: "make", "size", "seal", "map".
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: nix::Error,
    },
    /// The file handed over could shrink under the mapping, or is no memfd.
    #[error("the commit word's file is not a memfd sealed against shrinking")]
    NotSealed,
    /// The file handed over does not have the size of a commit word.
    #[error("the commit word's file has {0} bytes, not {FILE_BYTES}")]
    Size(u64),
}

impl CommitWord {
    /// A new word, undecided, in a new memfd.
    pub fn create() -> Result<Self, CommitWordError> {
        let failed = |action| move |source| CommitWordError::System { action, source };
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let memfd = memfd_create(c"commit-word", flags).map_err(failed("make"))?;
        nix::unistd::ftruncate(&memfd, FILE_BYTES as i64).map_err(failed("size"))?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).map_err(failed("seal"))?;
        Self::map(memfd)
    }

    /// Maps the word that another process made and handed over.
    pub fn from_fd(memfd: OwnedFd) -> Result<Self, CommitWordError> {
        let seals = fcntl(&memfd, FcntlArg::F_GET_SEALS).map_err(|_| CommitWordError::NotSealed)?;
        if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(CommitWordError::NotSealed);
        }
        let bytes = nix::sys::stat::fstat(&memfd)
            .map_err(|source| CommitWordError::System { action: "look at", source })?
            .st_size as u64;
        if bytes != FILE_BYTES as u64 {
            return Err(CommitWordError::Size(bytes));
        }
        Self::map(memfd)
    }

    fn map(memfd: OwnedFd) -> Result<Self, CommitWordError> {
        const LEN: NonZeroUsize = NonZeroUsize::new(FILE_BYTES).unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; the file has
        // this length and is sealed against losing it.
        let start = unsafe { mmap(None, LEN, protection, MapFlags::MAP_SHARED, &memfd, 0) }
            .map_err(|source| CommitWordError::System { action: "map", source })?;
        Ok(Self { word: start.cast(), memfd })
    }

    /// The fault-server's step: from here on the guest may run on the destination.
    /// Commit leaves only after this has succeeded. Doing it twice is doing it once.
    pub fn commit(&self) -> Result<Committed, AlreadyAborted> {
        match self.step(UNDECIDED, COMMITTED) {
            Ok(()) | Err(RUNNING) => Ok(Committed(())),
            Err(found) => Err(AlreadyAborted { found }),
        }
    }

    /// The VMM's step: from here on no Commit leaves. A paused guest is resumed only
    /// after this has succeeded. Doing it twice is doing it once, and it succeeds, with
    /// nothing done, where an operator has taken the guest back.
    pub fn abort(&self) -> Result<Aborted, AlreadyCommitted> {
        match self.step(UNDECIDED, ABORTED) {
            Ok(()) | Err(TAKEN_BACK) => Ok(Aborted(())),
            Err(found) => Err(AlreadyCommitted { found }),
        }
    }

    /// The operator's step: a committed guest that was not heard to run at the destination
    /// is its VMM's again. If it does run there, or does so later, there are two of it: only
    /// an operator who knows that it cannot may have this done. Doing it twice is doing it
    /// once.
    pub fn take_back(&self) -> Result<Aborted, NotInDoubt> {
        match self.step(COMMITTED, TAKEN_BACK) {
            Ok(()) => Ok(Aborted(())),
            Err(found) => Err(NotInDoubt { found }),
        }
    }

    /// Whether [`take_back`](Self::take_back) would succeed now, or has.
    pub fn in_doubt(&self) -> Result<(), NotInDoubt> {
        match self.word().load(Ordering::SeqCst) {
            COMMITTED | TAKEN_BACK => Ok(()),
            found => Err(NotInDoubt { found }),
        }
    }

    /// The fault-server has heard that the guest runs at the destination: from here on it
    /// cannot be taken back. Doing it twice is doing it once.
    pub fn running(&self) -> Result<(), NotInDoubt> {
        self.step(COMMITTED, RUNNING).map_err(|found| NotInDoubt { found })
    }

    /// What the word says now. While it says [`Decision::Undecided`] or
    /// [`Decision::Committed`] it may say something else a moment later.
    pub fn decision(&self) -> Decision {
        match self.word().load(Ordering::SeqCst) {
            UNDECIDED => Decision::Undecided,
            COMMITTED => Decision::Committed,
            ABORTED => Decision::Aborted,
            TAKEN_BACK => Decision::TakenBack,
            RUNNING => Decision::Running,
            damaged => Decision::Damaged(damaged),
        }
    }

    /// Whether both are the same word, handed over twice.
    pub fn is(&self, other: &CommitWord) -> bool {
        let file = |word: &CommitWord| {
            let of = nix::sys::stat::fstat(&word.memfd).ok()?;
            Some((of.st_dev, of.st_ino))
        };
        file(self).is_some_and(|own| file(other) == Some(own))
    }

    /// The memfd, to be handed to the other process.
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// From one value to another, if that was not done before; the value found if it is
    /// neither.
    fn step(&self, from: u64, to: u64) -> Result<(), u64> {
        match self.word().compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => Ok(()),
            Err(found) if found == to => Ok(()),
            Err(found) => Err(found),
        }
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: page-aligned, mapped until drop, and both processes touch it only
        // with atomic operations; any bit pattern is a valid `u64`.
        unsafe { self.word.as_ref() }
    }
}

// SAFETY: the mapping is owned, and the word is only used atomically.
unsafe impl Send for CommitWord {}
// SAFETY: as above.
unsafe impl Sync for CommitWord {}

impl Drop for CommitWord {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length and ends here.
        let _ = unsafe { munmap(self.word.cast(), FILE_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    fn other_side(word: &CommitWord) -> CommitWord {
        CommitWord::from_fd(word.memfd().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn both_sides_see_one_decision_and_it_is_final() {
        let vmm = CommitWord::create().unwrap();
        let server = other_side(&vmm);
        assert_eq!(vmm.decision(), Decision::Undecided);
        assert!(vmm.is(&server) && !vmm.is(&CommitWord::create().unwrap()));
        let _proof = server.commit().unwrap();
        assert_eq!(vmm.decision(), Decision::Committed);
        assert_eq!(vmm.abort().unwrap_err(), AlreadyCommitted { found: COMMITTED });
        let _proof = server.commit().unwrap();

        let vmm = CommitWord::create().unwrap();
        let server = other_side(&vmm);
        let _proof = vmm.abort().unwrap();
        assert_eq!(server.commit().unwrap_err(), AlreadyAborted { found: ABORTED });
        assert_eq!(server.decision(), Decision::Aborted);
    }

    #[test]
    fn a_commit_in_doubt_is_settled_once_by_what_was_heard_or_by_an_operator() {
        let vmm = CommitWord::create().unwrap();
        let server = other_side(&vmm);
        assert_eq!(server.take_back().unwrap_err(), NotInDoubt { found: UNDECIDED });
        assert_eq!(server.running().unwrap_err(), NotInDoubt { found: UNDECIDED });
        assert_eq!(vmm.decision(), Decision::Undecided);
        assert_eq!(server.in_doubt(), Err(NotInDoubt { found: UNDECIDED }));
        let _proof = server.commit().unwrap();
        server.in_doubt().unwrap();
        let _proof = server.take_back().unwrap();
        assert_eq!(vmm.decision(), Decision::TakenBack);
        let _proof = vmm.abort().expect("the guest may run here");
        let _proof = server.take_back().unwrap();
        assert_eq!(server.running().unwrap_err(), NotInDoubt { found: TAKEN_BACK });
        assert_eq!(server.commit().unwrap_err(), AlreadyAborted { found: TAKEN_BACK });
        assert_eq!(vmm.decision(), Decision::TakenBack, "for ever");

        let vmm = CommitWord::create().unwrap();
        let server = other_side(&vmm);
        let _proof = server.commit().unwrap();
        server.running().unwrap();
        assert_eq!(vmm.decision(), Decision::Running);
        assert_eq!(vmm.in_doubt(), Err(NotInDoubt { found: RUNNING }));
        server.running().unwrap();
        let _proof = server.commit().expect("still committed");
        assert_eq!(vmm.take_back().unwrap_err(), NotInDoubt { found: RUNNING });
        assert_eq!(vmm.abort().unwrap_err(), AlreadyCommitted { found: RUNNING });
        assert_eq!(vmm.decision(), Decision::Running, "for ever");

        let vmm = CommitWord::create().unwrap();
        let _proof = vmm.abort().unwrap();
        assert_eq!(vmm.take_back().unwrap_err(), NotInDoubt { found: ABORTED });
        assert_eq!(vmm.running().unwrap_err(), NotInDoubt { found: ABORTED });
    }

    #[test]
    fn a_damaged_word_lets_nobody_run_the_guest() {
        let word = CommitWord::create().unwrap();
        word.word().store(77, Ordering::SeqCst);
        assert_eq!(word.decision(), Decision::Damaged(77));
        assert!(word.commit().is_err());
        assert!(word.abort().is_err());
        assert!(word.take_back().is_err());
        assert!(word.running().is_err());
    }

    #[test]
    fn of_two_racing_sides_exactly_one_wins() {
        // 100 times 100 races: each word has a descriptor on either side.
        let mut commits = 0;
        for _ in 0..100 {
            let vmm: Vec<_> = (0..100).map(|_| CommitWord::create().unwrap()).collect();
            let server: Vec<_> = vmm.iter().map(other_side).collect();
            let start = Barrier::new(2);
            let (committed, aborted) = std::thread::scope(|scope| {
                let committer = scope.spawn(|| {
                    let commit = |word: &CommitWord| {
                        start.wait();
                        word.commit().is_ok()
                    };
                    server.iter().map(commit).collect::<Vec<_>>()
                });
                let abort = |word: &CommitWord| {
                    start.wait();
                    word.abort().is_ok()
                };
                let aborted: Vec<_> = vmm.iter().map(abort).collect();
                (committer.join().unwrap(), aborted)
            });
            for (committed, aborted) in committed.into_iter().zip(aborted) {
                assert!(committed ^ aborted, "{committed} {aborted}");
                commits += u32::from(committed);
            }
        }
        println!("{commits} of 10000 races won by the commit");
    }

    #[test]
    fn a_file_that_could_shrink_or_is_no_memfd_is_refused() {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let unsealed = memfd_create(c"x", flags).unwrap();
        assert!(matches!(CommitWord::from_fd(unsealed), Err(CommitWordError::NotSealed)));
        let device = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(CommitWord::from_fd(device.into()), Err(CommitWordError::NotSealed)));
        let wrong_size = memfd_create(c"x", flags).unwrap();
        nix::unistd::ftruncate(&wrong_size, 8).unwrap();
        fcntl(&wrong_size, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        assert!(matches!(CommitWord::from_fd(wrong_size), Err(CommitWordError::Size(8))));
    }
}
