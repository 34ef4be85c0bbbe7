//! A keeper's server: it outlasts fault servers that were to go on with a guest that was
//! given away, and none that left a guest to its VMM.

use super::*;
use crate::attach::commit_word::CommitWord;
use crate::attach::socket::Connection;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// What a keeper has, with the record that a test gives it.
struct Kept {
    vm: MockVm,
    record: OwnedFd,
}

impl AttachedVm for Kept {
    fn describe(&self) -> Description {
        self.vm.describe()
    }
    fn memory(&self) -> MemoryFiles<'_> {
        self.vm.memory()
    }
    fn pause_and_capture(&mut self) -> Result<Paused, String> {
        Err("only memory is here".into())
    }
    fn resume(&mut self) -> Result<(), String> {
        panic!("a keeper has no guest to resume")
    }
    fn released(&mut self) {}
    fn status(&mut self) -> Status {
        Status { running: false, steps: 0, failure: None }
    }
    fn reset_instruments(&mut self) -> Result<(), String> {
        Err("only memory is here".into())
    }
    fn stop(&mut self) {}
    fn record(&self) -> Option<BorrowedFd<'_>> {
        Some(std::os::fd::AsFd::as_fd(&self.record))
    }
}

/// A keeper on a thread, and the connection of the fault server that made it.
fn keeper(linger: Duration) -> (PathBuf, Attached, JoinHandle<ServeEnd>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keeper");
    let server = Server::bind(&path).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let word = CommitWord::create().unwrap();
    let thread = std::thread::spawn(move || {
        let record = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut &record, b"the record").unwrap();
        let mut kept = Kept { vm: MockVm::new(channel().0), record: record.into() };
        let first = Connection::new(theirs).unwrap();
        server.keep(first, &mut kept, word, || linger).unwrap()
    });
    let attached = Attached::over(Connection::new(ours).unwrap()).unwrap();
    (path, attached, thread, directory)
}

fn record_of(attached: &mut Attached) -> String {
    let file = std::fs::File::from(attached.record().unwrap());
    let mut bytes = [0; 10];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_committed_guest_is_kept_for_one_client_after_another() {
    let _watchdog = Watchdog::new();
    let (path, mut first, keeper, _directory) = keeper(Duration::ZERO);
    assert_eq!(record_of(&mut first), "the record");
    let refused = Attached::connect(&path).unwrap_err();
    assert!(matches!(refused, AttachError::Refused { .. }), "{refused:?}");
    assert!(matches!(first.pause(), Err(AttachError::Failed { .. })));
    let proof = first.word.commit().unwrap();
    drop(first);
    for _ in 0..3 {
        let mut next = Attached::connect(&path).unwrap();
        assert_eq!(next.word.decision(), Decision::Committed);
        assert_eq!(record_of(&mut next), "the record");
        let mut content = [0; PAGE_SIZE];
        next.ram.read_run(PageRun::single(PageIndex::new(5)), &mut content);
        assert_eq!(content, [6; PAGE_SIZE]);
    }
    // Garbage ends a conversation and not the keeper.
    let mut stranger = UnixStream::connect(&path).unwrap();
    stranger.write_all(&[0xff; 64]).unwrap();
    drop(stranger);
    Attached::connect(&path).unwrap().committed(&proof).unwrap();
    assert_eq!(keeper.join().unwrap(), ServeEnd::Released);
    assert!(!path.exists());
}

#[test]
fn a_guest_that_was_not_given_away_is_its_vmms() {
    let _watchdog = Watchdog::new();
    // Nobody is in doubt: it ends with its client.
    let (path, first, keeper, _directory) = keeper(Duration::ZERO);
    let word = Arc::clone(&first.word);
    drop(first);
    assert_eq!(keeper.join().unwrap(), ServeEnd::GivenBack);
    assert_eq!(word.decision(), Decision::Aborted, "nobody may commit behind its back");
    assert!(!path.exists());
}

#[test]
fn a_destination_in_doubt_may_still_be_told() {
    let _watchdog = Watchdog::new();
    let (path, first, keeper, _directory) = keeper(LONG);
    drop(first);
    let next = Attached::connect(&path).unwrap();
    assert_eq!(next.word.decision(), Decision::Aborted);
    // It was told.
    next.resume().unwrap();
    assert_eq!(keeper.join().unwrap(), ServeEnd::GivenBack);
}

#[test]
fn a_guest_that_was_taken_back_is_kept_only_for_who_tells_its_destination() {
    let _watchdog = Watchdog::new();
    let (path, first, keeper, _directory) = keeper(LONG);
    let _proof = first.word.commit().unwrap();
    drop(first);
    let next = Attached::connect(&path).unwrap();
    let _proof = next.word.take_back().unwrap();
    drop(next);
    let last = Attached::connect(&path).unwrap();
    assert_eq!(last.word.decision(), Decision::TakenBack);
    last.resume().unwrap();
    assert_eq!(keeper.join().unwrap(), ServeEnd::GivenBack);
}

#[test]
fn an_operator_may_end_a_keeper() {
    let _watchdog = Watchdog::new();
    let (path, first, keeper, _directory) = keeper(Duration::ZERO);
    let _proof = first.word.commit().unwrap();
    drop(first);
    Attached::connect(&path).unwrap().stop("it is lost").unwrap();
    assert_eq!(keeper.join().unwrap(), ServeEnd::Stopped);
}
