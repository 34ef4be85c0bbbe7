//! Destinations with too little memory: in a control group of their own.
//!
//! Needs root and version 1's memory controller, in which a group can be told not to kill
//! anybody at its limit; without them one line says that it was skipped.

use super::harness::{Guest, MIGRATION, POSTCOPY, Receiver, Running, SOON, poll};
use nix::unistd::geteuid;
use postcopy::transport::Ticket;
use postcopy::transport::relay::{Relay, RelayConfig, targets};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const CONTROLLER: &str = "/sys/fs/cgroup/memory";
const MIB: u64 = 1 << 20;

/// A control group whose memory is limited.
struct Group(PathBuf);

impl Group {
    /// A new one. At its limit nobody is killed: what asks for memory is refused it, or waits.
    fn new(limit: u64) -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("postcopy-test-{}-{number}", std::process::id());
        let folder = PathBuf::from(CONTROLLER).join(name);
        if !geteuid().is_root() || std::fs::create_dir(&folder).is_err() {
            eprintln!("skipped: little memory: needs root and {CONTROLLER} (version 1)");
            return None;
        }
        let group = Self(folder);
        group.write("memory.oom_control", "1");
        group.limit(limit);
        Some(group)
    }

    fn write(&self, file: &str, text: &str) {
        std::fs::write(self.0.join(file), text).expect("a file of our group");
    }

    fn read(&self, file: &str) -> u64 {
        let text = std::fs::read_to_string(self.0.join(file)).expect("a file of our group");
        text.trim().parse().expect("a number")
    }

    fn limit(&self, bytes: u64) {
        self.write("memory.limit_in_bytes", &bytes.to_string());
    }

    fn used(&self) -> u64 {
        self.read("memory.usage_in_bytes")
    }

    /// The binary under test, in the group.
    fn postcopy(&self) -> Command {
        let mut command = Command::new("sh");
        let enter = format!("echo $$ >{}/cgroup.procs; exec \"$@\"", self.0.display());
        command.args(["-ec", &enter, "sh", POSTCOPY]);
        command
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Whoever waits for memory does not see that it is to end.
        let _ = std::fs::write(self.0.join("memory.limit_in_bytes"), "-1");
        poll("an empty control group", SOON, || std::fs::remove_dir(&self.0).ok());
    }
}

fn guest(memory: &str, zero: &str, think_ns: &str, permitted: bool) -> Guest {
    let arguments =
        ["--guest", "process", "--memory", memory, "--zero", zero, "--think-ns", think_ns];
    match permitted {
        true => Guest::start_with(&arguments),
        false => Guest::start_unlimited(Command::new(POSTCOPY), &arguments),
    }
}

/// Starts to migrate over a link of 100 Mbit/s; the guest has left when this returns.
fn set_out(guest: &mut Guest, receiver: &Receiver) -> (Running, Relay) {
    let ticket: Ticket = receiver.ticket.trim().parse().expect("a ticket");
    let config = RelayConfig { bandwidth_bps: Some(100_000_000), ..RelayConfig::default() };
    let relay = Relay::spawn(config, &targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket));
    let relay = relay.expect("a relay");
    let ticket = relay.redirect(&ticket).expect("the same ticket").to_string();
    let source = guest.migrate(&ticket, &[]);
    assert!(guest.process.line().contains("the guest has left"));
    (source, relay)
}

/// Two destinations come one after the other where there is room for one and a half.
fn two_into_room_for_one(backing: &str) {
    let Some(group) = Group::new(160 * MIB) else { return };
    let start = || Receiver::start_as(group.postcopy(), &["--backing", backing]);
    let (first_to, second_to) = (start(), start());
    let (mut first, second) = (guest("96M", "5", "2000", true), guest("96M", "5", "2000", false));
    let (source, _relay) = set_out(&mut first, &first_to);
    // Little of it has come, but it is taken.
    assert!(group.used() > 80 * MIB, "{} bytes in use", group.used());
    let migration = second.migrate(&second_to.ticket, &[]).wait(SOON);
    migration.failed_with(3, &["100663296 bytes", "do not fit", "the guest runs on here"]);
    second.runs_on();
    second_to.fails_with(3, &["do not fit", "no guest is here"]);
    source.succeed(MIGRATION);
    assert_eq!(first_to.report()["verified"], true);
    first.has_left();
    second.migrates_to(start());
}

#[test]
fn memory_is_a_guests_own_before_any_page_of_it_has_come() {
    two_into_room_for_one("memfd-continue");
}

#[test]
fn memory_that_cannot_be_made_beforehand_is_held_elsewhere() {
    two_into_room_for_one("anonymous");
}

#[test]
fn pages_that_are_zero_give_their_memory_back() {
    for backing in ["memfd-continue", "memfd-copy"] {
        let Some(group) = Group::new(192 * MIB) else { return };
        let receiver =
            Receiver::start_as(group.postcopy(), &["--backing", backing, "--verify-after", "600s"]);
        // A slow guest, so that most zero pages stay so for a while.
        let guest = guest("96M", "90", "200000", true);
        guest.migrate(&receiver.ticket, &[]).succeed(MIGRATION);
        guest.has_left();
        let used =
            poll("memory given back", SOON, || Some(group.used()).filter(|used| *used < 64 * MIB));
        println!("{backing}: {used} bytes in use after 96 MiB, of which 90 % are zero");
        receiver.process.signal(nix::sys::signal::Signal::SIGKILL);
    }
}

#[test]
fn a_guest_whose_pages_find_no_memory_stands_still_until_there_is_some() {
    let Some(group) = Group::new(256 * MIB) else { return };
    let receiver = Receiver::start_as(group.postcopy(), &["--overcommit"]);
    let mut guest = guest("64M", "5", "100000", true);
    let (source, _relay) = set_out(&mut guest, &receiver);
    group.limit(group.used() + MIB);
    // Pages are refused, and threads that ask for memory wait for it.
    poll("a full control group", SOON, || (group.read("memory.failcnt") > 100).then_some(()));
    // Longer than a link may be silent.
    std::thread::sleep(Duration::from_secs(3));
    group.limit(256 * MIB);
    source.succeed(MIGRATION);
    assert_eq!(receiver.report()["verified"], true);
    guest.has_left();
}
