//! How a migration's source ends when there is nothing to migrate to, or nothing to
//! migrate: in time, and without a second guest.

use postcopy::attach::client::Attached;
use postcopy::attach::handover::MemoryFiles;
use postcopy::attach::message::{GuestInfo, Paused, Status};
use postcopy::attach::server::{AttachedVm, Description, Server};
use postcopy::engine::attached::{AttachedVmm, GivenAway};
use postcopy::engine::source::{Migration, SourceConfig};
use postcopy::engine::vm::{Captured, SourceVm, VmError};
use postcopy::memory::ram::{Backing, GuestRam};
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::prepaging::PolicyKind;
use postcopy::proto::source::{Outcome, SessionLimits};
use postcopy::transport::ticket::Host;
use postcopy::transport::{Identity, LinkOptions};
use postcopy::{Event, Phase, Progress};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Ends the process if a test hangs.
fn watchdog() -> Sender<()> {
    let (alive, ended) = channel::<()>();
    std::thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("a source does not end");
            std::process::abort();
        }
    });
    alive
}

fn ram() -> GuestRam {
    GuestRam::new(MemoryLayout::flat(8).unwrap(), Backing::Memfd).unwrap()
}

/// A guest that is never asked for anything.
struct Untouched;

impl SourceVm for Untouched {
    fn pause(&mut self) -> Result<Captured, VmError> {
        Err("paused without an agreement".into())
    }
    fn commit(&mut self) -> Result<bool, VmError> {
        Err("committed without an agreement".into())
    }
    fn resume(&mut self) -> Result<(), VmError> {
        Err("resumed without a pause".into())
    }
    fn release(&mut self) -> Result<(), VmError> {
        Err("released without a commit".into())
    }
}

#[test]
fn a_source_that_is_cancelled_while_nobody_answers_ends_at_once() {
    let _watchdog = watchdog();
    // A port that takes datagrams and never answers.
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = silent.local_addr().unwrap().port();
    let expires = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 600;
    let identity = Identity::generate(expires).unwrap();
    let host = Host::from(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let ticket = identity.ticket(host, port, vec![port]).unwrap();
    let config = SourceConfig {
        ticket,
        link: LinkOptions::default(),
        limits: SessionLimits::default(),
        policy: PolicyKind::Bubbling,
        pivots: None,
        drain_after: None,
        switchover: Default::default(),
        compress: Default::default(),
        machine: "none".into(),
        guest: Vec::new(),
        vcpus: 1,
        guest_kind: "none".into(),
        workload: None,
    };
    let migration = Migration::new(config, Arc::new(ram()));
    let canceller = migration.canceller();
    let began = Instant::now();
    let watch = move |event: Event| {
        // The dial is under way since before the first one.
        let Event::Progress(Progress { phase, elapsed, .. }) = event else { return };
        if phase == Phase::Handshake && elapsed > Duration::from_millis(50) {
            canceller.cancel("the user says so");
        }
    };
    let end = migration.on_event(watch).run(Box::new(Untouched)).unwrap();
    let took = began.elapsed();
    assert_eq!(end.outcome, Outcome::Aborted("the user says so".into()));
    // The handshake alone would go on for 4 s.
    assert!(took < Duration::from_secs(3), "it took {took:?}");
}

/// A guest that can be paused once, and says this of itself.
struct Pausable(GuestRam, Status);

const RUNS: Status = Status { running: true, steps: 0, failure: None };

impl AttachedVm for Pausable {
    fn describe(&self) -> Description {
        let guest = GuestInfo { kind: "none".into(), vcpus: 1, workload_json: "{}".into(), pid: 1 };
        Description { layout: self.0.layout().clone(), machine: "none".into(), guest }
    }
    fn memory(&self) -> MemoryFiles<'_> {
        MemoryFiles::of(&self.0).unwrap()
    }
    fn pause_and_capture(&mut self) -> Result<Paused, String> {
        Ok(Paused {
            state: b"state".to_vec(),
            seeds: Vec::new(),
            paused_at_ns: 0,
            frozen_at_ns: 0,
            pause_us: 0,
            capture_us: 0,
            steps: 0,
            was_paused: false,
        })
    }
    fn resume(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn released(&mut self) {}
    fn status(&mut self) -> Status {
        self.1.clone()
    }
    fn reset_instruments(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn stop(&mut self) {}
}

#[test]
fn a_guest_that_was_given_away_is_not_migrated_a_second_time() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let server = Server::bind(&path).unwrap();
    let served = std::thread::spawn(move || server.serve(&mut Pausable(ram(), RUNS)));

    // An aborted migration leaves a guest that can be migrated.
    let mut first = AttachedVmm::new(Attached::connect(&path).unwrap()).unwrap();
    first.pause().unwrap();
    first.resume().unwrap();
    let mut second = AttachedVmm::new(Attached::connect(&path).unwrap()).unwrap();
    second.pause().unwrap();
    assert!(second.commit().unwrap());
    // Its fault server dies before the memory has gone.
    drop(second);

    let third = Attached::connect(&path).unwrap();
    assert_eq!(AttachedVmm::new(third).unwrap_err(), GivenAway);
    Attached::connect(&path).unwrap().stop("the test is over").unwrap();
    served.join().unwrap().unwrap();
}

#[test]
fn after_an_abort_the_vmm_is_asked_whether_its_guest_runs() {
    let _watchdog = watchdog();
    let stopped = Status { running: false, ..RUNS };
    let failed = Status { failure: Some("triple fault".into()), ..RUNS };
    let cases = [(RUNS, None), (stopped, Some("does not run")), (failed, Some("triple fault"))];
    for (status, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let server = Server::bind(&path).unwrap();
        let served = std::thread::spawn(move || server.serve(&mut Pausable(ram(), status)));
        let mut vmm = AttachedVmm::new(Attached::connect(&path).unwrap()).unwrap();
        let said = vmm.aborted().map_err(|error| error.to_string());
        match expected {
            None => assert_eq!(said, Ok(())),
            Some(expected) => assert!(said.as_ref().unwrap_err().contains(expected), "{said:?}"),
        }
        drop(vmm);
        Attached::connect(&path).unwrap().stop("the test is over").unwrap();
        served.join().unwrap().unwrap();
    }
}
