//! Dirty rounds: which pages were written, told through a shared bitmap.

use super::super::client::DirtyLog;
use super::super::message::{CAPABILITY_DIRTY_LOG, Message, Request};
use super::*;
use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;

/// What the mock's guest has written, shared with the test that plays the guest.
#[derive(Clone, Default)]
pub(super) struct Writes(Arc<Mutex<Log>>);

#[derive(Default)]
struct Log {
    known: bool,
    on: bool,
    pages: BTreeSet<u64>,
    start_fails: bool,
    round_fails: bool,
    stop_fails: bool,
    /// Held back until it says so.
    gate: Option<Receiver<()>>,
}

impl Writes {
    /// Of a VMM that can tell.
    pub(super) fn tracking() -> Self {
        let writes = Self::default();
        writes.log().known = true;
        writes
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.0.lock().unwrap()
    }

    /// The guest writes.
    fn write(&self, page: u64) {
        let mut log = self.log();
        if log.on {
            log.pages.insert(page);
        }
    }

    pub(super) fn on(&self) -> bool {
        self.log().on
    }

    pub(super) fn known(&self) -> bool {
        self.log().known
    }

    pub(super) fn start(&self) -> Result<(), String> {
        let mut log = self.log();
        if log.start_fails {
            return Err("no memory for a log".to_owned());
        }
        (log.on, log.pages) = (true, BTreeSet::new());
        Ok(())
    }

    pub(super) fn round(&self, into: &DirtyBitmap) -> Result<u64, String> {
        let gate = self.log().gate.take();
        if let Some(gate) = gate {
            gate.recv_timeout(LONG).unwrap();
        }
        let mut log = self.log();
        assert!(log.on, "a round without a log");
        let pages = std::mem::take(&mut log.pages);
        if log.round_fails {
            return Err("slot 1 has no log".to_owned());
        }
        pages.iter().for_each(|&page| into.set(PageIndex::new(page)));
        Ok(pages.len() as u64)
    }

    pub(super) fn stop(&self) -> Result<(), String> {
        let mut log = self.log();
        assert!(log.on, "stopped without a log");
        if log.stop_fails {
            return Err("slot 1 keeps its log".to_owned());
        }
        log.on = false;
        Ok(())
    }
}

fn served(writes: &Writes) -> Served {
    Served::with(Patience::default(), |vm| vm.writes = writes.clone())
}

/// The only word of the mock's bitmap.
fn taken(log: &DirtyLog) -> u64 {
    log.bitmap.take(0).unwrap()
}

#[test]
fn rounds_tell_what_was_written_since_the_last_one_and_end_with_the_pause() {
    let writes = Writes::tracking();
    let served = served(&writes);
    let mut attached = served.attach();
    assert!(attached.has_dirty_log());
    writes.write(7);
    let before = super::super::monotonic_ns();
    let log = attached.start_dirty_log().unwrap();
    assert!((before..=super::super::monotonic_ns()).contains(&log.started_at_ns));
    assert_eq!(log.bitmap.pages(), PAGES);
    let round = attached.dirty_round().unwrap();
    assert_eq!((round.pages, taken(&log)), (0, 0), "what was written before does not count");
    assert!(log.started_at_ns <= round.began_at_ns && round.began_at_ns <= round.ended_at_ns);

    writes.write(0);
    writes.write(5);
    assert_eq!(attached.dirty_round().unwrap().pages, 2);
    writes.write(5);
    writes.write(6);
    assert_eq!(attached.dirty_round().unwrap().pages, 2, "also a page whose bit is set");
    assert_eq!(taken(&log), 0b110_0001, "rounds are added up until they are taken");
    assert_eq!(taken(&log), 0);

    writes.write(1);
    attached.pause().unwrap();
    assert_eq!(attached.dirty_round().unwrap().pages, 1);
    assert_eq!(taken(&log), 0b10);
    assert_eq!(attached.dirty_round().unwrap().pages, 0, "nothing writes after the pause");
    let proof = attached.word.commit().unwrap();
    assert_eq!(attached.dirty_round().unwrap().pages, 0, "nor after the commit");
    attached.committed(&proof).unwrap();
    assert_eq!(served.thread.join().unwrap().0.unwrap(), ServeEnd::Released);
    log.bitmap.set(PageIndex::new(3));
    assert_eq!(taken(&log), 0b1000, "the bitmap outlives the VMM");
}

#[test]
fn a_vmm_that_cannot_track_says_so_by_name() {
    let served = Served::new();
    let mut attached = served.attach();
    assert!(!attached.has_dirty_log());
    let error = attached.start_dirty_log().unwrap_err();
    assert!(matches!(error, AttachError::Lacks(CAPABILITY_DIRTY_LOG)), "{error}");
    // A client that asks all the same is told as well.
    for (request, expected) in [
        (Request::StartDirtyLog, "cannot tell which pages"),
        (Request::DirtyRound, "not started"),
        (Request::StopDirtyLog, "not started"),
    ] {
        let error = attached.ask(&request).unwrap_err();
        assert!(
            matches!(&error, AttachError::Failed { why, .. } if why.contains(expected)),
            "{error}"
        );
    }
    assert!(attached.status().unwrap().running);
    drop(attached);
    assert_eq!(served.stop().0, []);
}

#[test]
fn tracking_out_of_order_fails_and_changes_nothing() {
    let writes = Writes::tracking();
    let served = served(&writes);
    let mut attached = served.attach();
    #[track_caller]
    fn fails<T: std::fmt::Debug>(expected: &str, result: Result<T, AttachError>) {
        let error = result.unwrap_err();
        assert!(
            matches!(&error, AttachError::Failed { why, .. } if why.contains(expected)),
            "{error:?}"
        );
    }
    fails("not started", attached.dirty_round());
    fails("not started", attached.stop_dirty_log());
    let log = attached.start_dirty_log().unwrap();
    served.expect(Event::LogStarted);
    writes.write(2);
    fails("started already", attached.start_dirty_log());
    assert_eq!(attached.dirty_round().unwrap().pages, 1, "the log goes on");
    served.expect(Event::Round);
    attached.stop_dirty_log().unwrap();
    served.expect(Event::LogStopped);
    fails("not started", attached.dirty_round());
    fails("not started", attached.stop_dirty_log());
    // Started again, it is a new log with a new bitmap.
    let second = attached.start_dirty_log().unwrap();
    served.expect(Event::LogStarted);
    assert_eq!((taken(&second), taken(&log)), (0, 0b100));
    attached.stop_dirty_log().unwrap();
    served.expect(Event::LogStopped);
    attached.pause().unwrap();
    served.expect(Event::Paused);
    fails("paused", attached.start_dirty_log());
    attached.resume().unwrap();
    served.expect(Event::Resumed);
    assert_eq!(served.stop().0, []);
}

#[test]
fn tracking_ends_with_its_client() {
    let writes = Writes::tracking();
    let served = served(&writes);
    // One that leaves.
    let mut attached = served.attach();
    attached.start_dirty_log().unwrap();
    served.expect(Event::LogStarted);
    drop(attached);
    served.expect(Event::LogStopped);
    // One that gives the paused guest back, or dies: the guest does not run a step slowly.
    for gives_back in [true, false] {
        let mut attached = served.attach();
        attached.start_dirty_log().unwrap();
        attached.pause().unwrap();
        if gives_back {
            attached.resume().unwrap();
        } else {
            drop(attached);
        }
        for event in [Event::LogStarted, Event::Paused, Event::LogStopped, Event::Resumed] {
            served.expect(event);
        }
    }
    // One that has committed: its successor finds the guest paused, and no log.
    let mut attached = served.attach();
    attached.start_dirty_log().unwrap();
    attached.pause().unwrap();
    let proof = attached.word.commit().unwrap();
    drop(attached);
    for event in [Event::LogStarted, Event::Paused, Event::LogStopped] {
        served.expect(event);
    }
    let mut next = served.attach();
    assert!(matches!(next.dirty_round(), Err(AttachError::Failed { .. })));
    assert!(matches!(next.start_dirty_log(), Err(AttachError::Failed { .. })));
    next.committed(&proof).unwrap();
    served.expect(Event::Released);
}

#[test]
fn a_client_that_is_silent_after_the_pause_loses_the_guest_and_the_log() {
    let writes = Writes::tracking();
    let patience = Patience { paused: Duration::from_millis(300), ..Patience::default() };
    let served = Served::with(patience, |vm| vm.writes = writes.clone());
    let mut attached = served.attach();
    attached.start_dirty_log().unwrap();
    attached.pause().unwrap();
    for event in [Event::LogStarted, Event::Paused, Event::LogStopped, Event::Resumed] {
        served.expect(event);
    }
    drop(attached);
    assert_eq!(served.stop().0, []);
}

#[test]
fn a_client_that_dies_inside_a_round_leaves_no_log() {
    let writes = Writes::tracking();
    let (open, gate) = channel();
    writes.log().gate = Some(gate);
    let served = served(&writes);
    let mut stream = UnixStream::connect(&served.path).unwrap();
    for request in [Request::hello(), Request::StartDirtyLog, Request::DirtyRound] {
        stream.write_all(&request.encode().unwrap()).unwrap();
    }
    served.expect(Event::LogStarted);
    served.expect(Event::Round);
    drop(stream);
    assert!(writes.on(), "the round is under way");
    open.send(()).unwrap();
    served.expect(Event::LogStopped);
    assert!(!writes.on());
    assert_eq!(served.stop().0, []);
}

#[test]
fn a_round_that_fails_ends_the_log_and_a_log_that_does_not_start_or_stop_is_told() {
    let writes = Writes::tracking();
    let served = served(&writes);
    let mut attached = served.attach();
    attached.start_dirty_log().unwrap();
    served.expect(Event::LogStarted);
    writes.log().round_fails = true;
    let error = attached.dirty_round().unwrap_err().to_string();
    assert!(error.contains("slot 1 has no log") && error.contains("has ended"), "{error}");
    served.expect(Event::Round);
    served.expect(Event::LogStopped);
    assert!(matches!(attached.dirty_round(), Err(AttachError::Failed { .. })));

    writes.log().start_fails = true;
    let error = attached.start_dirty_log().unwrap_err().to_string();
    assert!(error.contains("no memory for a log"), "{error}");
    assert!(matches!(attached.stop_dirty_log(), Err(AttachError::Failed { .. })));

    *writes.log() = Log { known: true, stop_fails: true, ..Log::default() };
    attached.start_dirty_log().unwrap();
    let error = attached.stop_dirty_log().unwrap_err().to_string();
    assert!(error.contains("slot 1 keeps its log"), "{error}");
    // It can be tried again, is tried when the client leaves, and a last time no more.
    writes.log().stop_fails = false;
    attached.stop_dirty_log().unwrap();
    attached.start_dirty_log().unwrap();
    writes.log().stop_fails = true;
    drop(attached);
    let mut next = served.attach();
    let warnings = served.log.warnings();
    assert!(matches!(&warnings[..], [line] if line.contains("does not stop")), "{warnings:?}");
    next.start_dirty_log().unwrap();
    writes.log().stop_fails = false;
    drop(next);
    use Event::{LogStarted, LogStopped};
    let events = [LogStarted, LogStopped, LogStarted, LogStarted, LogStopped];
    assert_eq!(served.stop().0, events);
}
