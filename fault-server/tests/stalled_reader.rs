//! The real `fault-server`, between a guest and a destination of this process, with outputs
//! that are full and that nobody reads: it moves the guest all the same, and ends.

use nix::fcntl::{FcntlArg, fcntl};
use postcopy::attach::server::{ServeEnd, Server};
use postcopy::checker::{CheckParams, CheckPattern, check};
use postcopy::host::arrival::{self, Arrival};
use postcopy::host::departure::Departure;
use postcopy::host::new_guest;
use postcopy::memory::ram::{Backing, GuestRam};
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::page::{PageIndex, PageRun};
use postcopy::uffd::UffdOptions;
use postcopy::uffd::open::open;
use postcopy::vmm::guest::{DirtyLogChoice, Guest, GuestKind};
use postcopy::vmm::workload::{MachineForm, Pattern, Workload};
use postcopy::{DestinationBuilder, Outcome};
use std::io::{PipeReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

const PAGES: u64 = 4096;
/// For everything here, on a machine that does many other things.
const LIMIT: Duration = Duration::from_secs(60);

/// A pipe of a page with nothing to read in it but that it is full.
fn full() -> (PipeReader, Stdio) {
    let (read, mut write) = std::io::pipe().expect("a pipe");
    let size = fcntl(&write, FcntlArg::F_SETPIPE_SZ(4096)).expect("a small pipe");
    write.write_all(&vec![b'x'; size as usize]).expect("room for so much");
    (read, write.into())
}

/// It is killed if the test fails.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn workload() -> Workload {
    Workload {
        pattern: Pattern::Random,
        seed: 7,
        vcpus: 1,
        think_ns: 2000,
        step_limit: 0,
        zero_pages: 0,
        form: MachineForm::default(),
        trace: None,
    }
}

/// Stops the guest and compares all its memory.
fn verify(guest: &mut dyn Guest) {
    let steps = arrival::finish(guest).expect("a guest that has found nothing wrong");
    let params = CheckParams {
        pages: PAGES,
        vcpus: 1,
        seed: workload().seed,
        pattern: CheckPattern::Random,
        touches: vec![],
        zero_pages: 0,
        kvm: None,
        expect_steps: Some(steps),
    };
    let run = PageRun::new(PageIndex::new(0), PAGES).expect("a run");
    let mut memory = vec![0; run.bytes()];
    guest.ram().read_run(run, &mut memory);
    check(&params, memory.as_slice()).expect("memory as the guest left it");
}

#[test]
fn the_fault_server_program_moves_a_guest_whatever_becomes_of_its_readers() {
    if let Err(error) = open(UffdOptions::for_kvm(), postcopy::DestinationBacking::MemfdContinue) {
        return println!("SKIPPED: no guest can be received here: {error}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let control = folder.path().join("control");
    let layout = MemoryLayout::pc(PAGES).expect("a layout");
    let ram = Arc::new(GuestRam::new(layout, Backing::Memfd).expect("memory"));
    let mut guest =
        new_guest(GuestKind::Process, ram, workload(), DirtyLogChoice::Auto).expect("a guest");
    guest.resume().expect("it runs");
    let server = Server::bind(&control).expect("a control socket");
    let vmm = thread::spawn(move || {
        let mut departure = Departure::new(guest).expect("memory in a file");
        server.serve(&mut departure).expect("a guest that is served")
    });
    let receiver = DestinationBuilder::new().is_kvm(|_| false).build().expect("a destination");
    let ticket = receiver.ticket().to_string();
    let arrival = Arrival::default();
    let vm = Box::new(arrival.clone());
    let destination = thread::spawn(move || receiver.run(vm).expect("a destination's end"));

    let ((_stdout, to_stdout), (_stderr, to_stderr)) = (full(), full());
    let mut program = Command::new(env!("CARGO_BIN_EXE_fault-server"));
    program.arg("--die-with-parent").args(["--status", "json", "--log", "trace"]);
    program.args(["--no-keeper", "--ticket", &ticket, "--control"]).arg(&control);
    program.stdin(Stdio::null()).stdout(to_stdout).stderr(to_stderr);
    let mut program = Killed(program.spawn().expect("the program starts"));
    let began = Instant::now();
    let status = loop {
        if let Some(status) = program.0.try_wait().expect("a child") {
            break status;
        }
        assert!(began.elapsed() < LIMIT, "it waits for its readers");
        thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(status.code(), Some(0));
    assert_eq!(vmm.join().expect("a VMM"), ServeEnd::Released);
    let end = destination.join().expect("a destination");
    assert_eq!(end.outcome, Outcome::Completed);
    verify(arrival.take().expect("a guest that came").as_mut());
}
