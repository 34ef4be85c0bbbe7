//! Nothing writes to a guest's memory once it is paused: neither KVM, nor the capture, nor
//! the VMM's threads and instruments, nor a whole migration, nor the VMM's end.

use super::dirty_rounds::{difference, has_log, image};
use super::harness::{Guest, MIGRATION, Receiver, SOON};
use postcopy::attach::client::{AttachError, Attached};
use postcopy::engine::attached::AttachedVmm;
use postcopy::engine::source::{Migration, SourceConfig};
use postcopy::engine::vm::{Captured, SourceVm, VmError};
use postcopy::memory::ram::GuestRam;
use postcopy::proto::prepaging::PolicyKind;
use postcopy::proto::source::{Outcome, SessionLimits};
use postcopy::transport::LinkOptions;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long writers have to show themselves: many ticks of every timer.
const WATCHED: Duration = Duration::from_millis(400);

fn start(kind: &str, vcpus: &str) -> Guest {
    let arguments = ["--memory", "32M", "--think-ns", "2000", "--workload", "read-modify-write"];
    Guest::start_with(&[&["--guest", kind, "--vcpus", vcpus], &arguments[..]].concat())
}

fn stays_frozen(kind: &str, vcpus: &str) {
    let guest = start(kind, vcpus);
    let mut attached = guest.attach();
    let ram = attached.ram.clone();
    let log = attached.has_dirty_log().then(|| attached.start_dirty_log().expect("a log"));
    assert_eq!(log.is_some(), has_log(kind, "auto"));
    attached.reset_instruments().expect("a running guest");
    let moving = image(&ram);
    let paused = attached.pause().expect("a paused guest");
    let frozen = image(&ram);
    assert!(!difference(&moving, &frozen).is_empty(), "the guest did nothing before");
    let now = postcopy::attach::monotonic_ns();
    assert!(paused.paused_at_ns <= paused.frozen_at_ns && paused.frozen_at_ns <= now);
    if log.is_some() {
        assert!(attached.dirty_round().expect("the last round").pages > 0);
    }

    let began = Instant::now();
    while began.elapsed() < WATCHED {
        assert!(!attached.status().expect("a status").running);
        assert_eq!(attached.pause().expect("the same capture"), paused);
        let refused = attached.reset_instruments();
        assert!(matches!(refused, Err(AttachError::Failed { .. })), "{refused:?}");
        if log.is_some() {
            assert_eq!(attached.dirty_round().expect("a round").pages, 0);
        }
    }
    if log.is_some() {
        attached.stop_dirty_log().expect("a log");
    }
    assert_eq!(difference(&frozen, &image(&ram)), [0; 0], "while it was paused");

    let proof = attached.word.commit().expect("an undecided word");
    attached.committed(&proof).expect("a VMM that lets go");
    guest.process.succeed(SOON);
    assert_eq!(difference(&frozen, &image(&ram)), [0; 0], "when its VMM ended");
}

#[test]
fn a_kvm_guest_stays_frozen() {
    stays_frozen("kvm", "1");
}

#[test]
fn a_kvm_guest_of_two_vcpus_stays_frozen() {
    stays_frozen("kvm", "2");
}

#[test]
fn a_process_guest_stays_frozen() {
    stays_frozen("process", "1");
}

#[test]
fn a_process_guest_of_two_vcpus_stays_frozen() {
    stays_frozen("process", "2");
}

/// The VMM, with its guest's memory looked at when it is paused and before it is released.
struct Watched {
    vmm: AttachedVmm,
    ram: Arc<GuestRam>,
    frozen: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl SourceVm for Watched {
    fn pause(&mut self) -> Result<Captured, VmError> {
        let captured = self.vmm.pause()?;
        *self.frozen.lock().unwrap() = image(&self.ram);
        Ok(captured)
    }
    fn commit(&mut self) -> Result<bool, VmError> {
        self.vmm.commit()
    }
    fn resume(&mut self) -> Result<(), VmError> {
        self.vmm.resume()
    }
    fn release(&mut self) -> Result<(), VmError> {
        let changed = difference(&self.frozen.lock().unwrap(), &image(&self.ram));
        if !changed.is_empty() {
            return Err(format!("pages {changed:?} changed during the migration").into());
        }
        self.vmm.release()
    }
}

fn config(attached: &Attached, receiver: &Receiver) -> SourceConfig {
    SourceConfig {
        ticket: receiver.ticket.parse().expect("a ticket"),
        link: LinkOptions::default(),
        limits: SessionLimits::default(),
        policy: PolicyKind::Bubbling,
        pivots: None,
        drain_after: None,
        switchover: Default::default(),
        compress: Default::default(),
        machine: attached.machine.clone(),
        guest: attached.guest.workload_json.clone().into_bytes(),
        vcpus: attached.guest.vcpus as u16,
        guest_kind: attached.guest.kind.clone(),
        workload: None,
    }
}

fn stays_frozen_through_a_migration(kind: &str) {
    let guest = start(kind, "2");
    let receiver = Receiver::start();
    let attached = guest.attach();
    let ram = attached.ram.clone();
    let config = config(&attached, &receiver);
    let frozen = Arc::new(Mutex::new(Vec::new()));
    let vmm = AttachedVmm::new(attached).expect("a guest that is here");
    let vmm = Watched { vmm, ram: ram.clone(), frozen: frozen.clone() };
    let end = Migration::new(config, ram.clone()).run(Box::new(vmm));
    assert_eq!(end.expect("threads").outcome, Outcome::Completed);
    assert_eq!(receiver.report()["verified"], true);
    guest.process.succeed(MIGRATION);
    let changed = difference(&frozen.lock().unwrap(), &image(&ram));
    assert_eq!(changed, [0; 0], "at the migration's end");
}

#[test]
fn a_kvm_guest_stays_frozen_through_a_migration() {
    stays_frozen_through_a_migration("kvm");
}

#[test]
fn a_process_guest_stays_frozen_through_a_migration() {
    stays_frozen_through_a_migration("process");
}
