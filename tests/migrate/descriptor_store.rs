//! Under a service manager with a descriptor store a fault server needs no keeper. The manager
//! here is a small one: it keeps the descriptors that come to its notify socket, and starts a
//! process with them as sd_listen_fds(3) says.

use super::commit_word::{CommitWord, Decision};
use super::fakes::FakeDestination;
use super::harness::{
    Guest, MIGRATION, POSTCOPY, Receiver, Running, SOON, folder, poll, processes_with, read_report,
};
use super::keeper::{FAST, Move, check_moved, check_resumed};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use postcopy::proto::message::ToDestination;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

/// What a manager knows of its service.
#[derive(Default)]
struct Service {
    store: Vec<(String, OwnedFd)>,
    said: Vec<String>,
}

/// A manager of one service.
struct Manager {
    folder: TempDir,
    service: Arc<Mutex<Service>>,
}

impl Manager {
    fn start() -> Self {
        let folder = folder();
        let socket = UnixDatagram::bind(folder.path().join("notify")).expect("a notify socket");
        let service = Arc::new(Mutex::new(Service::default()));
        let of = service.clone();
        // Ends with the test's process.
        std::thread::spawn(move || {
            loop {
                let (text, descriptors) = receive(&socket);
                of.lock().expect("no panic").hear(&text, descriptors);
            }
        });
        Self { folder, service }
    }

    fn names(&self) -> Vec<String> {
        let service = self.service.lock().expect("no panic");
        let mut names: Vec<_> = service.store.iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    fn has_said(&self, what: &str) -> bool {
        self.service.lock().expect("no panic").said.iter().any(|line| line.contains(what))
    }

    fn hears(&self, what: &str) {
        poll("a word to the manager", SOON, || self.has_said(what).then_some(()));
    }

    /// Starts `postcopy migrate` with `arguments`, and with what is in the store.
    fn run(&self, guest: &Guest, arguments: &[&str]) -> Running {
        // Duplicates, so far up that they are not in the way of the numbers from 3 on.
        let service = self.service.lock().expect("no panic");
        let high = |(name, fd): &(String, OwnedFd)| {
            let fd = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(200));
            // SAFETY: the kernel has just made it.
            (name.clone(), unsafe { OwnedFd::from_raw_fd(fd.expect("room for one more")) })
        };
        let passed: Vec<(String, OwnedFd)> = service.store.iter().map(high).collect();
        drop(service);
        // The number is known to the shell only, which becomes the process.
        let script = "export LISTEN_PID=$$; exec \"$@\"";
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, "sh", POSTCOPY]);
        command.env("NOTIFY_SOCKET", self.folder.path().join("notify"));
        command.env("FDSTORE", "32").env("WATCHDOG_USEC", "400000");
        if !passed.is_empty() {
            let names: Vec<&str> = passed.iter().map(|(name, _)| name.as_str()).collect();
            command.env("LISTEN_FDS", passed.len().to_string());
            command.env("LISTEN_FDNAMES", names.join(":"));
        }
        let numbers: Vec<RawFd> = passed.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        let pass_on = move || {
            for (to, &from) in (3..).zip(&numbers) {
                // SAFETY: between fork and exec, two plain system calls on numbers that are
                // this process's own; what was at `to` belonged to the parent.
                if unsafe { nix::libc::dup2(from, to) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: it allocates nothing and takes no lock.
        unsafe { command.pre_exec(pass_on) };
        let control = guest.control();
        let migrate = ["migrate", "--quiet", "--descriptor-store", "--control", &control];
        let running = Running::start_as(command, &[&migrate, arguments].concat());
        drop(passed);
        running
    }
}

impl Service {
    fn hear(&mut self, text: &str, mut descriptors: Vec<OwnedFd>) {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        let name = value("FDNAME=").unwrap_or("stored").to_owned();
        if value("FDSTORE=") == Some("1") {
            assert!(!name.contains(':') && name.len() < 256, "{name}");
            for descriptor in descriptors.drain(..) {
                let known = self.store.iter().any(|(_, other)| same(other, &descriptor));
                if !known {
                    self.store.push((name.clone(), descriptor));
                }
            }
        }
        if value("FDSTOREREMOVE=") == Some("1") {
            self.store.retain(|(other, _)| *other != name);
        }
        self.said.push(text.trim().to_owned());
        // A barrier's descriptor is closed here, when all before it is done.
    }
}

/// Whether both are the same file.
fn same(one: &OwnedFd, other: &OwnedFd) -> bool {
    let file = |fd| nix::sys::stat::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
    file(one).expect("a file") == file(other).expect("a file")
}

fn receive(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
    let mut bytes = [0; 4096];
    let mut control = nix::cmsg_space!([RawFd; 32]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags);
    let message = message.expect("a datagram");
    let mut descriptors = Vec::new();
    for part in message.cmsgs().expect("room for all") {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            // SAFETY: the kernel has just made them.
            let owned = numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
            descriptors.extend(owned);
        }
    }
    let length = message.bytes;
    (String::from_utf8_lossy(&bytes[..length]).into_owned(), descriptors)
}

const ALL: [&str; 3] = ["postcopy-commit-word", "postcopy-memory-0", "postcopy-record"];

#[test]
fn a_service_that_is_not_disturbed_stores_its_session_and_leaves_nothing_there() {
    let mut moved = Move::prepare(FAST, Duration::ZERO);
    let manager = Manager::start();
    let migration =
        manager.run(&moved.guest, &["--ticket", &moved.ticket, "--report", &moved.report]);
    moved.vmm_leaves();
    assert_eq!(manager.names(), ALL);
    assert!(manager.has_said("READY=1"));
    assert!(processes_with(&moved.guest.keeper()).is_empty(), "it needs no keeper");
    manager.hears("STATUS=target brownout: ");
    manager.hears("WATCHDOG=1");
    migration.succeed(MIGRATION);
    assert!(manager.names().is_empty());
    check_moved(&moved.verified());
}

#[test]
fn a_service_killed_in_the_middle_goes_on_from_the_store() {
    let mut moved = Move::prepare(FAST, Duration::from_millis(2));
    let manager = Manager::start();
    // The command line is the same each time, as a unit's is.
    let arguments = ["--ticket", &moved.ticket.clone(), "--report", &moved.report.clone()];
    let mut first = manager.run(&moved.guest, &arguments);
    moved.vmm_leaves();
    moved.until(25);
    first.kill();
    let mut second = manager.run(&moved.guest, &arguments);
    moved.until(50);
    second.signal(Signal::SIGABRT);
    assert!(second.wait_killed());
    manager.run(&moved.guest, &arguments).succeed(MIGRATION);
    assert!(manager.names().is_empty());
    check_resumed(&moved.verified());
}

#[test]
fn a_service_killed_before_the_commit_tells_its_destination() {
    let guest = Guest::start();
    let manager = Manager::start();
    let mut destination = FakeDestination::listen();
    let arguments = ["--ticket", &destination.ticket.clone()];
    let mut first = manager.run(&guest, &arguments);
    let word = CommitWord::of(guest.process.pid());
    destination.takes_state();
    first.kill();
    poll("the VMM's decision", SOON, || (word.decision() == Decision::Aborted).then_some(()));
    let second = manager.run(&guest, &arguments);
    let reattach = destination.comes();
    assert!(matches!(&reattach, ToDestination::Reattach { committed: None, .. }), "{reattach:?}");
    assert!(matches!(destination.hear(), Ok(ToDestination::Abort { .. })));
    destination.vanish();
    second.wait(SOON).failed_with(3, &["the guest runs on here"]);
    assert!(manager.names().is_empty());
    guest.runs_on();
    guest.migrates_to(Receiver::start());
}

#[test]
fn without_a_manager_there_is_no_descriptor_store() {
    let guest = Guest::start();
    let receiver = Receiver::start();
    let ended = guest.migrate(&receiver.ticket, &["--descriptor-store"]).wait(SOON);
    ended.failed_with(1, &["no service manager has started this program"]);
    guest.runs_on();
    let report = guest.path("report.json");
    guest.migrate(&receiver.ticket, &["--report", &report]).succeed(MIGRATION);
    assert_eq!(read_report(&report)["outcome"], "completed");
    assert_eq!(receiver.report()["verified"], true);
}
