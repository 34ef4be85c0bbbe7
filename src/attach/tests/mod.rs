//! Tests of the attach protocol over real sockets: a [`MockVm`] behind a real
//! [`Server`], and clients that are well-behaved (here), hostile, or killed.

mod dirty;
mod golden;
mod hostile;
mod keep;
mod killed;
mod taken_back;

use super::client::{AttachError, Attached};
use super::commit_word::Decision;
use super::handover::{HandoverError, MemoryFiles};
use super::message::{GuestInfo, Paused, STATE_BYTES_MAX, Status};
use super::server::{AttachedVm, Description, Patience, ServeEnd, Server, ServerError};
use crate::memory::dirty_bitmap::DirtyBitmap;
use crate::memory::ram::{Backing, GuestRam};
use crate::proto::layout::MemoryLayout;
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const PAGES: u64 = 8;
const LONG: Duration = Duration::from_secs(20);

/// What happened to the guest, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Paused,
    Resumed,
    Reset,
    Released,
    Stopped,
    LogStarted,
    Round,
    LogStopped,
}

/// A VM whose guest is a flag and eight pages, page `i` filled with `i + 1`.
struct MockVm {
    ram: GuestRam,
    running: bool,
    captures: u64,
    state: Vec<u8>,
    pause_fails: bool,
    resume_fails: bool,
    writes: dirty::Writes,
    events: Sender<Event>,
}

impl MockVm {
    fn new(events: Sender<Event>) -> Self {
        let ram = GuestRam::new(MemoryLayout::flat(PAGES).unwrap(), Backing::Memfd).unwrap();
        for page in 0..PAGES {
            let run = PageRun::single(PageIndex::new(page));
            ram.write_run(run, &[page as u8 + 1; PAGE_SIZE]);
        }
        let state = b"state".to_vec();
        Self {
            ram,
            running: true,
            captures: 0,
            state,
            pause_fails: false,
            resume_fails: false,
            writes: dirty::Writes::default(),
            events,
        }
    }

    fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }
}

impl AttachedVm for MockVm {
    fn describe(&self) -> Description {
        Description {
            layout: self.ram.layout().clone(),
            machine: "mock machine".to_owned(),
            guest: GuestInfo {
                kind: "mock".to_owned(),
                vcpus: 2,
                workload_json: "{}".to_owned(),
                pid: std::process::id(),
            },
        }
    }

    fn memory(&self) -> MemoryFiles<'_> {
        MemoryFiles::of(&self.ram).unwrap()
    }

    fn pause_and_capture(&mut self) -> Result<Paused, String> {
        assert!(self.running, "paused twice");
        if self.pause_fails {
            return Err("vCPU 1 does not stop".to_owned());
        }
        self.running = false;
        self.captures += 1;
        self.tell(Event::Paused);
        Ok(Paused {
            state: self.state.clone(),
            seeds: vec![PageIndex::new(0), PageIndex::new(PAGES - 1)],
            paused_at_ns: super::monotonic_ns(),
            frozen_at_ns: super::monotonic_ns(),
            pause_us: 3,
            capture_us: 4,
            steps: self.captures,
            was_paused: false,
        })
    }

    fn resume(&mut self) -> Result<(), String> {
        assert!(!self.running, "resumed while it ran");
        if self.resume_fails {
            return Err("vCPU 0 is gone".to_owned());
        }
        self.running = true;
        self.tell(Event::Resumed);
        Ok(())
    }

    fn released(&mut self) {
        assert!(!self.running);
        self.tell(Event::Released);
    }

    fn status(&mut self) -> Status {
        Status { running: self.running, steps: 77, failure: None }
    }

    fn reset_instruments(&mut self) -> Result<(), String> {
        assert!(self.running);
        self.tell(Event::Reset);
        Ok(())
    }

    fn stop(&mut self) {
        self.running = false;
        self.tell(Event::Stopped);
    }

    fn has_dirty_log(&self) -> bool {
        self.writes.known()
    }

    fn start_dirty_log(&mut self) -> Result<(), String> {
        assert!(self.running);
        self.writes.start()?;
        self.tell(Event::LogStarted);
        Ok(())
    }

    fn dirty_round(&mut self, into: &DirtyBitmap) -> Result<u64, String> {
        self.tell(Event::Round);
        self.writes.round(into)
    }

    fn stop_dirty_log(&mut self) -> Result<(), String> {
        self.writes.stop()?;
        self.tell(Event::LogStopped);
        Ok(())
    }
}

/// Ends the process if a test hangs.
struct Watchdog(#[expect(dead_code, reason = "its end is the sign")] Sender<()>);

impl Watchdog {
    fn new() -> Self {
        let (alive, ended) = channel::<()>();
        std::thread::spawn(move || {
            if ended.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
                eprintln!("an attach test hangs");
                std::process::abort();
            }
        });
        Self(alive)
    }
}

/// What a server has logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn warnings(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().filter(|line| line.contains("WARN")).map(str::to_owned).collect()
    }
}

/// A server on a thread of its own.
struct Served {
    path: PathBuf,
    events: Receiver<Event>,
    log: Log,
    thread: JoinHandle<(Result<ServeEnd, ServerError>, MockVm)>,
    _directory: tempfile::TempDir,
    _watchdog: Watchdog,
}

impl Served {
    fn new() -> Self {
        Self::with(Patience::default(), |_| {})
    }

    fn with(patience: Patience, set_up: impl FnOnce(&mut MockVm)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("attach");
        let server = Server::bind(&path).unwrap().with_patience(patience);
        let (sender, events) = channel();
        let mut vm = MockVm::new(sender);
        set_up(&mut vm);
        let log = Log::default();
        let writer = log.clone();
        let thread = std::thread::spawn(move || {
            let subscriber = tracing_subscriber::fmt()
                .with_ansi(false)
                .without_time()
                .with_writer(move || writer.clone())
                .finish();
            let served = tracing::subscriber::with_default(subscriber, || server.serve(&mut vm));
            (served, vm)
        });
        Self { path, events, log, thread, _directory: directory, _watchdog: Watchdog::new() }
    }

    /// Attaches, also right after another client has left.
    fn attach(&self) -> Attached {
        Attached::connect(&self.path).unwrap()
    }

    #[track_caller]
    fn expect(&self, event: Event) {
        assert_eq!(self.events.recv_timeout(LONG), Ok(event));
    }

    /// Stops the guest; gives what happened since the last look, and the guest.
    fn stop(self) -> (Vec<Event>, MockVm) {
        self.attach().stop("the test is over").unwrap();
        let (end, vm) = self.thread.join().unwrap();
        assert_eq!(end.unwrap(), ServeEnd::Stopped);
        let mut events: Vec<_> = self.events.try_iter().collect();
        assert_eq!(events.pop(), Some(Event::Stopped));
        (events, vm)
    }
}

#[test]
fn a_migration_from_attaching_to_letting_go() {
    let served = Served::new();
    let mut attached = served.attach();
    assert_eq!(attached.machine, "mock machine");
    assert_eq!((attached.guest.kind.as_str(), attached.guest.vcpus), ("mock", 2));
    assert_eq!(attached.layout().pages(), PAGES);
    assert_eq!(attached.status().unwrap(), Status { running: true, steps: 77, failure: None });
    attached.reset_instruments().unwrap();
    served.expect(Event::Reset);

    let before = super::monotonic_ns();
    let paused = attached.pause().unwrap();
    served.expect(Event::Paused);
    assert_eq!(paused.state, b"state");
    assert_eq!(paused.seeds, [PageIndex::new(0), PageIndex::new(PAGES - 1)]);
    assert!((before..super::monotonic_ns()).contains(&paused.paused_at_ns), "one clock");
    assert!(!attached.status().unwrap().running);
    assert!(matches!(attached.reset_instruments(), Err(AttachError::Failed { .. })));
    assert_eq!(attached.pause().unwrap(), paused, "asked again, the same capture");

    let proof = attached.word.commit().unwrap();
    attached.committed(&proof).unwrap();
    let (end, vm) = served.thread.join().unwrap();
    assert_eq!(end.unwrap(), ServeEnd::Released);
    assert_eq!(served.events.try_iter().collect::<Vec<_>>(), [Event::Released]);
    drop(vm);
    let mut content = [0; PAGE_SIZE];
    attached.ram.read_run(PageRun::single(PageIndex::new(5)), &mut content);
    assert_eq!(content, [6; PAGE_SIZE], "the memory outlives the VM");
    assert_eq!(served.log.warnings(), [""; 0]);
}

#[test]
fn an_aborted_migration_lets_the_guest_run_and_the_next_one_has_a_new_word() {
    let served = Served::new();
    let mut first = served.attach();
    let first_word = Arc::clone(&first.word);
    assert_eq!(first.pause().unwrap().steps, 1);
    first.resume().unwrap();
    served.expect(Event::Paused);
    served.expect(Event::Resumed);
    assert_eq!(first_word.decision(), Decision::Aborted);
    first_word.commit().unwrap_err();

    let mut second = served.attach();
    assert_eq!(second.word.decision(), Decision::Undecided);
    assert_eq!(second.pause().unwrap().steps, 2, "captured anew");
    drop(second);
    served.expect(Event::Paused);
    served.expect(Event::Resumed);
    let (events, _) = served.stop();
    assert_eq!(events, []);
}

#[test]
fn a_client_that_leaves_without_a_pause_cannot_commit_later() {
    let served = Served::new();
    let attached = served.attach();
    let word = Arc::clone(&attached.word);
    drop(attached);
    let mut next = served.attach();
    word.commit().unwrap_err();
    assert!(next.status().unwrap().running);
    drop(next);
    assert_eq!(served.stop().0, []);
}

/// Memory as VMMs have it: a file a region, or several in one, and none from its start.
#[test]
fn memory_in_several_files_is_taken_over() {
    fn page_of(value: u8) -> [u8; PAGE_SIZE] {
        [value; PAGE_SIZE]
    }
    let file = |pages: u64| {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = std::fs::File::from(memfd_create(c"test", flags).unwrap());
        file.set_len(pages * 4096).unwrap();
        Arc::new(file)
    };
    let files = [file(12), file(3)];
    // Region by region: its first page's number for the guest, its pages, file and place.
    let regions = [(0u64, 2usize, 0, 9u64), (16, 3, 1, 0), (64, 3, 0, 1)];
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files(regions.map(
        |(start, pages, index, place)| {
            let offset = FileOffset::from_arc(Arc::clone(&files[index]), place * 4096);
            (GuestAddress(start * 4096), pages * PAGE_SIZE, Some(offset))
        },
    ));
    let ram = GuestRam::from_guest_memory(memory.unwrap()).unwrap();
    let pages = ram.layout().pages();
    for page in 0..pages {
        ram.write_run(PageRun::single(PageIndex::new(page)), &page_of(page as u8 + 1));
    }
    let served = Served::with(Patience::default(), |vm| vm.ram = ram);
    let attached = served.attach();
    for page in 0..pages {
        let mut content = page_of(0);
        attached.ram.read_run(PageRun::single(PageIndex::new(page)), &mut content);
        assert_eq!(content, page_of(page as u8 + 1), "{page}");
    }
    let places = attached.ram.segments().iter().map(|of| of.file().unwrap().start() / 4096);
    assert_eq!(places.collect::<Vec<_>>(), regions.map(|(.., place)| place));
    for file in &files {
        assert!(file.set_len(4096).is_err(), "each file is sealed");
    }
    drop(attached);
    served.stop();
}

#[test]
fn memory_in_no_file_or_in_too_many_is_not_handed_over() {
    let layout = MemoryLayout::flat(PAGES).unwrap();
    let anonymous = GuestRam::new(layout, Backing::Anonymous).unwrap();
    assert!(matches!(MemoryFiles::of(&anonymous), Err(HandoverError::NoFile(0))));
    let in_files = |count: u64| {
        let ranges = (0..count).map(|index| {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let file = std::fs::File::from(memfd_create(c"test", flags).unwrap());
            file.set_len(4096).unwrap();
            (GuestAddress(index << 32), PAGE_SIZE, Some(FileOffset::new(file, 0)))
        });
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        GuestRam::from_guest_memory(memory).unwrap()
    };
    let sixteen = in_files(16);
    assert_eq!(MemoryFiles::of(&sixteen).unwrap().files().len(), 16);
    let served = Served::with(Patience::default(), |vm| vm.ram = sixteen);
    assert_eq!(served.attach().layout().pages(), 16);
    served.stop();
    let seventeen = in_files(17);
    let error = MemoryFiles::of(&seventeen).unwrap_err();
    assert!(matches!(error, HandoverError::TooManyFiles { region: 16, file: 16 }), "{error}");
}

#[test]
fn requests_out_of_order_fail_and_change_nothing() {
    let served = Served::new();
    let mut attached = served.attach();
    let proof = attached.word.commit().unwrap();
    let failed = attached.committed(&proof).unwrap_err();
    assert!(failed.to_string().contains("not paused"), "{failed}");
    drop(attached);

    let mut attached = served.attach();
    assert_eq!(attached.word.decision(), Decision::Undecided, "a guest that runs gets a new word");
    attached.pause().unwrap();
    let failed = attached.committed(&proof).unwrap_err();
    assert!(failed.to_string().contains("does not say committed"), "{failed}");
    served.expect(Event::Paused);
    let own = attached.word.commit().unwrap();
    let word = Arc::clone(&attached.word);
    let failed = attached.resume().unwrap_err();
    assert!(failed.to_string().contains("already been given"), "{failed}");
    assert_eq!(word.decision(), Decision::Committed);

    // That client has left; a later one finds the committed guest and ends the migration.
    let mut again = served.attach();
    assert_eq!(again.word.decision(), Decision::Committed);
    assert_eq!(again.pause().unwrap().steps, 1);
    again.committed(&own).unwrap();
    served.expect(Event::Released);
    assert_eq!(served.thread.join().unwrap().0.unwrap(), ServeEnd::Released);
}

#[test]
fn a_pause_that_fails_leaves_the_guest_running_and_the_client_attached() {
    let served = Served::with(Patience::default(), |vm| vm.pause_fails = true);
    let mut attached = served.attach();
    let failed = attached.pause().unwrap_err();
    assert!(failed.to_string().contains("vCPU 1 does not stop"), "{failed}");
    assert!(attached.status().unwrap().running);
    drop(attached);
    assert_eq!(served.stop().0, []);
}

#[test]
fn a_guest_that_cannot_be_resumed_ends_the_server_with_the_reason() {
    let served = Served::with(Patience::default(), |vm| vm.resume_fails = true);
    let mut attached = served.attach();
    attached.pause().unwrap();
    drop(attached);
    let (end, _) = served.thread.join().unwrap();
    assert!(matches!(end, Err(ServerError::Resume { why }) if why == "vCPU 0 is gone"));
}

#[test]
fn the_largest_state_passes_and_a_larger_one_lets_the_guest_run() {
    let served = Served::with(Patience::default(), |vm| vm.state = vec![0xa5; STATE_BYTES_MAX]);
    let mut attached = served.attach();
    let paused = attached.pause().unwrap();
    assert!(paused.state.len() == STATE_BYTES_MAX && paused.state.iter().all(|&b| b == 0xa5));
    attached.resume().unwrap();
    served.stop();

    let served = Served::with(Patience::default(), |vm| vm.state = vec![0; STATE_BYTES_MAX + 1]);
    let mut attached = served.attach();
    let failed = attached.pause().unwrap_err();
    assert!(failed.to_string().contains("longer than 16777216"), "{failed}");
    assert!(attached.status().unwrap().running);
    drop(attached);
    assert_eq!(served.stop().0, [Event::Paused, Event::Resumed]);
}

#[test]
fn a_client_that_pauses_and_is_silent_loses_the_guest_again() {
    let patience = Patience { paused: Duration::from_millis(300), ..Patience::default() };
    let served = Served::with(patience, |_| {});
    let mut attached = served.attach();
    attached.pause().unwrap();
    served.expect(Event::Paused);
    served.expect(Event::Resumed);
    attached.word.commit().unwrap_err();
    assert!(attached.status().is_err());

    // One that commits may be as silent as it likes.
    let mut attached = served.attach();
    attached.pause().unwrap();
    served.expect(Event::Paused);
    let proof = attached.word.commit().unwrap();
    let silence = served.events.recv_timeout(Duration::from_millis(900));
    assert_eq!(silence, Err(RecvTimeoutError::Timeout));
    attached.committed(&proof).unwrap();
    served.expect(Event::Released);
    let warnings = served.log.warnings();
    assert!(matches!(&warnings[..], [line] if line.contains("taken back")), "{warnings:?}");
}

#[test]
fn a_second_client_is_refused_while_the_first_is_attached() {
    let served = Served::new();
    let mut first = served.attach();
    for _ in 0..50 {
        let refused = Attached::connect(&served.path).unwrap_err();
        assert!(
            matches!(&refused, AttachError::Refused { why } if why.contains("another client")),
            "{refused:?}"
        );
    }
    assert!(first.status().unwrap().running);
    drop(first);
    assert_eq!(served.stop().0, []);
}

#[test]
fn stopping_a_paused_guest_ends_it_without_a_commit() {
    let served = Served::new();
    let mut attached = served.attach();
    attached.pause().unwrap();
    let word = Arc::clone(&attached.word);
    attached.stop("operator").unwrap();
    assert_eq!(served.thread.join().unwrap().0.unwrap(), ServeEnd::Stopped);
    assert_eq!(served.events.try_iter().collect::<Vec<_>>(), [Event::Paused, Event::Stopped]);
    word.commit().unwrap_err();
}

/// However a commit and the loss of the connection fall together, the guest is
/// either given away and never resumed, or resumed and never given away.
#[test]
fn a_commit_that_races_the_end_of_the_connection_is_decided_once() {
    let (mut committed, mut aborted) = (0, 0);
    for _ in 0..100 {
        let served = Served::new();
        let mut attached = served.attach();
        attached.pause().unwrap();
        served.expect(Event::Paused);
        let word = Arc::clone(&attached.word);
        let start = std::sync::Barrier::new(2);
        let proof = std::thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                drop(attached);
            });
            start.wait();
            // Later and later, from before the server can see the end to after it.
            (0..(committed + aborted) * 200).for_each(|_| std::hint::spin_loop());
            word.commit()
        });
        let mut next = served.attach();
        match proof {
            Ok(proof) => {
                committed += 1;
                next.committed(&proof).unwrap();
                served.expect(Event::Released);
            }
            Err(_) => {
                aborted += 1;
                served.expect(Event::Resumed);
                assert_eq!(next.word.decision(), Decision::Undecided);
                drop(next);
                assert_eq!(served.stop().0, []);
            }
        }
    }
    println!("{committed} committed, {aborted} aborted");
}

#[test]
fn a_vmm_has_no_session_record() {
    let served = Served::new();
    let mut attached = served.attach();
    let failed = attached.record().unwrap_err();
    assert!(matches!(failed, AttachError::Lacks("session-record")), "{failed}");
    let asked = attached.ask(&super::message::Request::Record).unwrap_err();
    assert!(asked.to_string().contains("no session record"), "{asked}");
    assert!(attached.status().unwrap().running);
    drop(attached);
    assert_eq!(served.stop().0, []);
}
