//! Hosts without KVM or userfaultfd, or where a user may not use them: the real binary
//! in a mount namespace of its own, in which a device is hidden or is another's.
//!
//! Needs root and util-linux; without them one line says that it was skipped.

use super::harness::{Guest, POSTCOPY, Receiver, Running, SOON, folder};
use nix::unistd::geteuid;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// Devices as they are, but for those in the list.
const WITHOUT_KVM: &str = "null zero random urandom userfaultfd";
const WITHOUT_USERFAULTFD: &str = "null zero random urandom kvm";
const WITHOUT_BOTH: &str = "null zero random urandom";

/// A host on which something is missing.
struct Host {
    folder: TempDir,
    script: String,
    program: String,
}

impl Host {
    /// A host that `script` makes of this one. It may use `$PLACE`, an empty folder.
    fn new(script: &str) -> Option<Self> {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "setpriv", "--reuid", "65534", "true"]).stderr(Stdio::null());
        if !geteuid().is_root() || !unshare.status().is_ok_and(|status| status.success()) {
            eprintln!("skipped: hosts without devices: needs root, unshare and setpriv");
            return None;
        }
        let folder = folder();
        // Another user must be able to look in, and to run the binary.
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755))
            .expect("our folder");
        std::fs::create_dir(folder.path().join("place")).expect("our folder");
        let program = folder.path().join("postcopy");
        std::fs::copy(POSTCOPY, &program).expect("room for a copy of the binary");
        let program = program.to_str().expect("a plain name").to_owned();
        Some(Self { folder, script: script.to_owned(), program })
    }

    /// One with only these devices.
    fn with_devices(devices: &str) -> Option<Self> {
        Self::new(&format!(
            "mount -t tmpfs devices $PLACE; cd /dev; cp -a {devices} $PLACE; cd /; \
             mount --bind $PLACE /dev; exec \"$@\""
        ))
    }

    /// One whose users may not use `device`, but may use `other`; and nobody special.
    fn forbids(device: &str, other: &str) -> Option<Self> {
        Self::new(&format!(
            "mount -t tmpfs devices $PLACE; cp -a /dev/{device} /dev/{other} $PLACE; \
             chmod 600 $PLACE/{device}; chmod 666 $PLACE/{other}; \
             mount --bind $PLACE/{device} /dev/{device}; \
             mount --bind $PLACE/{other} /dev/{other}; \
             exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\""
        ))
    }

    /// The binary under test there.
    fn postcopy(&self) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", &self.script, "sh", &self.program]);
        command.env("PLACE", self.folder.path().join("place"));
        command
    }
}

const KVM: [&str; 6] = ["--guest", "kvm", "--memory", "16M", "--think-ns", "2000"];

/// A guest that was asked for as a virtual machine is not made anything else.
fn no_virtual_machine(host: Option<Host>, why: &str) {
    let Some(host) = host else { return };
    // That user may make a socket here.
    std::fs::set_permissions(host.folder.path(), PermissionsExt::from_mode(0o777))
        .expect("our folder");
    let control = host.folder.path().join("control");
    let control = control.to_str().expect("a plain name");
    let run = [&["run", "--control", control], &KVM[..]].concat();
    let ended = Running::start_as(host.postcopy(), &run).wait(SOON);
    ended.failed_with(1, &["KVM does not work here", "KVM cannot be used", why]);
}

#[test]
fn a_source_without_kvm_says_why() {
    no_virtual_machine(
        Host::with_devices(WITHOUT_KVM),
        "cannot open /dev/kvm: No such file or directory",
    );
    let hidden = "mount --bind /dev/null /dev/kvm; exec \"$@\"";
    no_virtual_machine(Host::new(hidden), "/dev/kvm does not answer as KVM does");
    no_virtual_machine(
        Host::forbids("kvm", "userfaultfd"),
        "cannot open /dev/kvm: Permission denied",
    );
}

#[test]
fn a_source_without_kvm_or_userfaultfd_runs_and_migrates_a_process() {
    let Some(host) = Host::with_devices(WITHOUT_BOTH) else { return };
    let mut guest = Guest::start_as(host.postcopy(), &["--memory", "16M", "--think-ns", "2000"]);
    guest.process.says("KVM does not work here");
    let (receiver, report) = (Receiver::start(), guest.path("report.json"));
    let there = ["--report", &report];
    guest.migrate_as(host.postcopy(), &receiver.ticket, &there).succeed(SOON);
    guest.has_left();
    assert_eq!(receiver.report()["verified"], true);
}

/// The destination refuses before the blackout, both sides say why, and the guest runs on.
fn refused(host: Option<Host>, guest: &[&str], parts: &[&str]) {
    let Some(host) = host else { return };
    let guest = Guest::start_with(guest);
    let receiver = Receiver::start_as(host.postcopy(), &[]);
    let migration = guest.migrate(&receiver.ticket, &[]).wait(SOON);
    migration.failed_with(3, &[parts, &["the guest runs on here"]].concat());
    guest.runs_on();
    receiver.fails_with(3, &[parts, &["no guest is here"]].concat());
    guest.migrates_to(Receiver::start());
}

#[test]
fn a_destination_without_kvm_refuses_a_virtual_machine() {
    let why = "cannot open /dev/kvm: No such file or directory";
    refused(Host::with_devices(WITHOUT_KVM), &KVM, &["the guest", "kvm", why]);
}

#[test]
fn a_destination_where_kvm_is_forbidden_refuses_a_virtual_machine() {
    let why = "cannot open /dev/kvm: Permission denied";
    refused(Host::forbids("kvm", "userfaultfd"), &KVM, &["the guest", "kvm", why]);
}

#[test]
fn a_destination_where_userfaultfd_is_forbidden_says_what_to_set() {
    let said =
        ["/dev/userfaultfd cannot be opened (Permission denied", "vm.unprivileged_userfaultfd=1"];
    refused(Host::forbids("userfaultfd", "kvm"), &KVM, &said);
}

#[test]
fn a_destination_without_userfaultfd_refuses_even_root_without_the_capability() {
    let Some(mut host) = Host::with_devices(WITHOUT_USERFAULTFD) else { return };
    // Else the system call would do without the device.
    host.script = host.script.replace("exec ", "exec setpriv --bounding-set=-sys_ptrace ");
    let said = ["/dev/userfaultfd cannot be opened (No such file", "run with CAP_SYS_PTRACE"];
    refused(Some(host), &KVM, &said);
}

#[test]
fn a_process_needs_no_kvm_at_its_destination() {
    let Some(host) = Host::with_devices(WITHOUT_KVM) else { return };
    Guest::start().migrates_to(Receiver::start_as(host.postcopy(), &[]));
}

/// A disk that fills up costs the report and nothing else, and leaves no half of one.
#[test]
fn a_full_disk_costs_only_the_report() {
    let full = "mount -t tmpfs -o size=8k full $PLACE; head -c 8192 /dev/zero > $PLACE/other \
                || true; \"$@\" && code=0 || code=$?; ls $PLACE; exit $code";
    let Some(host) = Host::new(full) else { return };
    let (guest, receiver) = (Guest::start(), Receiver::start());
    let report = host.folder.path().join("place/report.json");
    let report = report.to_str().expect("a plain name");
    let migration = guest.migrate_as(host.postcopy(), &receiver.ticket, &["--report", report]);
    let ended = migration.wait(SOON);
    let parts = ["the migration completed", "cannot write the report", report, "No space left"];
    ended.failed_with(6, &parts);
    assert_eq!(ended.stdout.lines().last(), Some("other"), "something was left behind");
    guest.has_left();
    assert_eq!(receiver.report()["verified"], true);
}
