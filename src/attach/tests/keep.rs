//! A keeper's server: it outlasts fault servers that were to go on with a guest that was
//! given away, and none that left a guest to its VMM.

use super::*;
use crate::attach::commit_word::CommitWord;
use crate::attach::keep::{Gone, Next, Succession};
use crate::attach::socket::Connection;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

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

/// Starts nobody, and waits for somebody: for ever, if the guest was given away.
struct Waits {
    linger: Duration,
    until: Option<Instant>,
}

impl Succession for Waits {
    fn next(&mut self, gone: Option<Gone>) -> Next {
        if gone.is_some_and(|gone| !gone.committed) {
            self.until.get_or_insert(Instant::now() + self.linger);
        }
        Next::Wait(self.until)
    }
    fn start(&mut self) -> Option<Connection> {
        panic!("it said to wait")
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
        let mut succession = Waits { linger, until: None };
        server.keep(first, &mut kept, word, &mut succession).unwrap()
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

/// Says how each client went, and starts the next ones over sockets that it is given.
struct Starts {
    gone: Sender<Gone>,
    next: Receiver<UnixStream>,
}

impl Succession for Starts {
    fn next(&mut self, gone: Option<Gone>) -> Next {
        let gone = gone.expect("each start works");
        self.gone.send(gone).unwrap();
        if gone.on_purpose { Next::Wait(None) } else { Next::Start(Instant::now()) }
    }
    fn start(&mut self) -> Option<Connection> {
        Some(Connection::new(self.next.recv().unwrap()).unwrap())
    }
}

#[test]
fn one_is_started_after_another_until_one_leaves_on_purpose() {
    let _watchdog = Watchdog::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keeper");
    let server = Server::bind(&path).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let word = CommitWord::create().unwrap();
    let (gone, how) = channel();
    let (sockets, next) = channel();
    let keeper = std::thread::spawn(move || {
        let record = tempfile::tempfile().unwrap().into();
        let mut kept = Kept { vm: MockVm::new(channel().0), record };
        let first = Connection::new(theirs).unwrap();
        server.keep(first, &mut kept, word, &mut Starts { gone, next }).unwrap()
    });
    let first = Attached::over(Connection::new(ours).unwrap()).unwrap();
    let _proof = first.word.commit().unwrap();
    drop(first);
    let first = how.recv().unwrap();
    assert!(first.committed && first.was_at_work && !first.on_purpose, "{first:?}");
    let start = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        sockets.send(theirs).unwrap();
        Attached::over(Connection::new(ours).unwrap()).unwrap()
    };
    // One that dies before it has taken the session over, and one that dies after.
    drop(start());
    assert!(!how.recv().unwrap().was_at_work);
    let mut second = start();
    second.record().unwrap();
    // While it is there it is alone.
    assert!(matches!(Attached::connect(&path), Err(AttachError::Refused { .. })));
    drop(second);
    assert!(how.recv().unwrap().was_at_work);
    start().leave().unwrap();
    assert!(how.recv().unwrap().on_purpose);
    Attached::connect(&path).unwrap().stop("over").unwrap();
    assert_eq!(keeper.join().unwrap(), ServeEnd::Stopped);
}

#[test]
fn a_guest_that_stays_is_told_of_from_a_place_that_is_free_for_others() {
    let _watchdog = Watchdog::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keeper");
    let server = Server::bind(&path).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let word = CommitWord::create().unwrap();
    let (gone, _how) = channel();
    let (sockets, next) = channel();
    let keeper = std::thread::spawn(move || {
        let record = tempfile::tempfile().unwrap().into();
        let mut kept = Kept { vm: MockVm::new(channel().0), record };
        let first = Connection::new(theirs).unwrap();
        server.keep(first, &mut kept, word, &mut Starts { gone, next }).unwrap()
    });
    drop(Attached::over(Connection::new(ours).unwrap()).unwrap());
    let (ours, theirs) = UnixStream::pair().unwrap();
    sockets.send(theirs).unwrap();
    let next = Attached::over(Connection::new(ours).unwrap()).unwrap();
    assert_eq!(next.word.decision(), Decision::Aborted);
    let _another = Server::bind(&path).expect("nobody is in the way");
    next.resume().unwrap();
    assert_eq!(keeper.join().unwrap(), ServeEnd::GivenBack);
    assert!(path.exists(), "it is the other one's");
}

#[test]
fn a_vmm_holds_the_record_of_a_guest_that_was_given_away_and_of_no_other() {
    let _watchdog = Watchdog::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vmm");
    let server = Server::bind(&path).unwrap();
    let vmm = std::thread::spawn(move || server.serve(&mut MockVm::new(channel().0)).unwrap());
    let record = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut &record, b"the record").unwrap();
    let leave_one = || {
        let mut client = Attached::connect(&path).unwrap();
        assert!(!client.has_record());
        client.keep_record(std::os::fd::AsFd::as_fd(&record)).unwrap();
        client.pause().unwrap();
        client
    };
    // Not given away: the next client begins anew.
    drop(leave_one());
    let client = leave_one();
    let proof = client.word.commit().unwrap();
    drop(client);
    let mut next = Attached::connect(&path).unwrap();
    assert_eq!(record_of(&mut next), "the record");
    next.committed(&proof).unwrap();
    assert_eq!(vmm.join().unwrap(), ServeEnd::Released);
}
