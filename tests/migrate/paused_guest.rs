//! Guests that their user has paused: each mode moves them, and they stay paused.

use super::harness::{Guest, MIGRATION, Receiver, SOON, poll, read_report};
use postcopy::attach::message::Status;
use postcopy::host::arrival::{Arrival, finish};
use postcopy::proto::message::{Hello, Mismatch};
use postcopy::proto::page::{PageIndex, PageRun};
use postcopy::proto::source::Outcome;
use postcopy::vmm::content::Instruments;
use postcopy::vmm::guest::Guest as AnyGuest;
use postcopy::vmm::workload::control;
use postcopy::{DestinationBuilder, DestinationEnd, DestinationVm, VmError};
use serde_json::Value;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// A guest that makes some steps and is paused before it serves anybody.
fn paused(kind: &str) -> Guest {
    let what = ["--guest", kind, "--memory", "32M", "--zero", "30", "--vcpus", "2"];
    Guest::start_with(&[&what[..], &["--think-ns", "2000", "--pause-after", "200ms"]].concat())
}

fn status(guest: &Guest) -> Status {
    let status = guest.attach().status().expect("a status");
    assert!(!status.running && status.failure.is_none(), "{status:?}");
    status
}

/// It arrives as it left, makes no step, and goes on where it stood when it is let to.
fn stays_paused(kind: &str, mode: &str) {
    let guest = paused(kind);
    let before = status(&guest);
    assert!(before.steps > 0);
    let receiver = DestinationBuilder::new().build().expect("two free ports");
    let (ticket, report) = (receiver.ticket().to_string(), guest.path("report.json"));
    let arrival = Arrival::default();
    let vm = Box::new(arrival.clone());
    let (done, end) = channel();
    std::thread::spawn(move || done.send(Box::new(receiver.run(vm).expect("threads"))));
    guest.migrate(&ticket, &["--mode", mode, "--report", &report]).succeed(MIGRATION);
    let end: Box<DestinationEnd> = end.recv_timeout(SOON).expect("a destination that ends");
    assert_eq!(end.outcome, Outcome::Completed);
    let report: Value = read_report(&report);
    assert_eq!(report["guest"]["was_paused"], true, "{report:#}");
    assert_eq!(report["mode"], mode, "{report:#}");
    assert_eq!(report["network_faults"], 0, "nobody touches a page: {report:#}");
    guest.has_left();

    assert!(arrival.came_paused());
    let mut guest = arrival.take().expect("the guest");
    let steps = |guest: &dyn AnyGuest| -> u64 {
        (0..2).map(|vcpu| Instruments::new(guest.ram(), vcpu).get(control::STEPS)).sum()
    };
    let memory = |guest: &dyn AnyGuest| {
        let all = PageRun::new(PageIndex::new(0), guest.ram().layout().pages()).unwrap();
        let mut bytes = vec![0; all.bytes()];
        guest.ram().read_run(all, &mut bytes);
        bytes
    };
    assert_eq!(steps(guest.as_ref()), before.steps);
    let all = memory(guest.as_ref());
    // A vCPU that ran would make some hundred steps.
    std::thread::sleep(Duration::from_millis(100));
    assert!(all == memory(guest.as_ref()), "something of it runs");
    assert!(guest.first_entry().is_none());
    guest.resume().expect("a guest that can go on");
    poll("steps", SOON, || (steps(guest.as_ref()) > before.steps + 100).then_some(()));
    finish(guest.as_mut()).expect("a guest that finds nothing wrong");
}

#[test]
fn a_virtual_machine_stays_paused_in_post_copy() {
    stays_paused("kvm", "post-copy");
}

#[test]
fn a_virtual_machine_stays_paused_in_stop_and_copy() {
    stays_paused("kvm", "stop-and-copy");
}

#[test]
fn a_virtual_machine_stays_paused_in_pre_copy() {
    stays_paused("kvm", "pre-copy");
}

#[test]
fn a_process_stays_paused_in_post_copy() {
    stays_paused("process", "post-copy");
}

#[test]
fn a_process_stays_paused_in_stop_and_copy() {
    stays_paused("process", "stop-and-copy");
}

#[test]
fn a_process_stays_paused_in_hybrid() {
    stays_paused("process", "hybrid");
}

/// A destination that cannot take the state: the guest was captured, and is not committed.
struct Refuses(Arrival);

impl DestinationVm for Refuses {
    fn prepare(&mut self, hello: &Hello, memory: GuestMemoryMmap) -> Result<String, Mismatch> {
        self.0.prepare(hello, memory)
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), VmError> {
        Err("not this one".into())
    }
    fn resume(&mut self) -> Result<Instant, VmError> {
        Err("nothing was restored".into())
    }
}

/// An aborted migration leaves it paused, too; the next one takes it, and every page is right.
fn stays_paused_here(kind: &str) {
    let guest = paused(kind);
    let before = status(&guest);
    let receiver = DestinationBuilder::new().build().expect("two free ports");
    let ticket = receiver.ticket().to_string();
    std::thread::spawn(move || receiver.run(Box::new(Refuses(Arrival::default()))));
    guest.migrate(&ticket, &[]).wait(SOON).failed_with(3, &["not this one"]);
    assert_eq!(status(&guest).steps, before.steps);
    let receiver = Receiver::start();
    guest.migrate(&receiver.ticket, &[]).succeed(MIGRATION);
    guest.has_left();
    let report = receiver.report();
    assert_eq!((&report["verified"], &report["guest"]["was_paused"]), (&true.into(), &true.into()));
}

#[test]
fn a_virtual_machine_stays_paused_where_it_stays() {
    stays_paused_here("kvm");
}

#[test]
fn a_process_stays_paused_where_it_stays() {
    stays_paused_here("process");
}
