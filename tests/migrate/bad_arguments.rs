//! What users get wrong before anything can move: each case gives one clear line, the
//! exit code that `--help` promises, and a guest that runs on.

use super::fakes::FakeDestination;
use super::harness::{
    Guest, MIGRATION, POSTCOPY, Receiver, Running, SOON, check_report, folder, permit, read_report,
};
use nix::unistd::geteuid;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// The user and group that may do least.
const NOBODY: u32 = 65534;

/// Runs `postcopy` to its end, which must come soon.
fn ends(arguments: &[&str]) -> super::harness::Ended {
    Running::start(arguments).wait(SOON)
}

/// The binary where another user can reach it, to be run as that user.
fn as_nobody() -> Option<(TempDir, Command)> {
    if !geteuid().is_root() {
        eprintln!("skipped: what another user may not do: becoming one needs root");
        return None;
    }
    let folder = folder();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).expect("our folder");
    let binary = folder.path().join("postcopy");
    std::fs::copy(POSTCOPY, &binary).expect("room for a copy of the binary");
    let mut command = Command::new(&binary);
    command.uid(NOBODY).gid(NOBODY);
    Some((folder, command))
}

#[test]
fn wrong_arguments_are_named_and_end_with_code_2() {
    let cases = [
        ("run --control c --memory 7M", "'7M' for '--memory"),
        ("run --control c --memory 9M", "multiple of 2 MiB"),
        ("run --control c --memory 12X", "\"12X\" is no size"),
        ("run --control c --memory 99999999999T", "is no size"),
        ("run --control c --vcpus 0", "'0' for '--vcpus"),
        ("run --control c --vcpus 5", "'5' for '--vcpus"),
        ("run --control c --zero 91", "'91' for '--zero"),
        ("run --control c --workload golf", "'golf' for '--workload"),
        ("run --control c --workload trace:", "followed by the name of a file"),
        ("bench --workload random,golf", "possible values: sequential, strided"),
        ("run --control c --guest xen", "'xen' for '--guest"),
        ("run --control c --page-tables 1g", "'1g' for '--page-tables"),
        ("run --control c --cpl 1", "'1' for '--cpl"),
        ("run", "--control"),
        ("receive --push-lanes 0", "'0' for '--push-lanes"),
        ("receive --push-lanes 9", "'9' for '--push-lanes"),
        ("receive --ticket-life 1x", "\"1x\" is no time"),
        ("receive --ticket-life 100000000000y", "is no time"),
        ("receive --verify-after 100000000000y", "is no time"),
        ("receive --port 65536", "'65536' for '--port"),
        ("receive --listen here", "'here' for '--listen"),
        ("receive --backing tape", "'tape' for '--backing"),
        ("migrate --control c", "--ticket"),
        ("migrate --control c --ticket t --policy hope", "'hope' for '--policy"),
        ("migrate --control c --ticket t --drain-after 100000000000y", "is no time"),
        ("demo --loss 100%", "\"100%\" is no part"),
        ("demo --bandwidth 0", "\"0\" is no rate"),
        ("demo --rtt fast", "\"fast\" is no time"),
        ("demo --memory 7M", "'7M' for '--memory"),
        ("bench --link 1Gbit:1ms:1%:x", "is no link"),
        ("bench --memory 8M,7M", "'7M' for '--memory"),
        ("bench --policy bubbling,best", "bubbling"),
        ("bench --runs 0", "'0' for '--runs"),
        ("check --pages 1", "--seed"),
        ("check --pages 1 --seed 1 --workload random --page-tables 4k", "--kvm"),
        ("check --pages 1 --seed 1 --workload random --kvm --regions 0:x", "\"0:x\" is no region"),
        ("teleport", "'teleport'"),
        ("", "Usage"),
    ];
    for (arguments, what) in cases {
        let ended = ends(&arguments.split_whitespace().collect::<Vec<_>>());
        assert_eq!(ended.code, Some(2), "{arguments}: {ended:?}");
        assert!(ended.stderr.contains(what), "{arguments}: nothing of {what}: {}", ended.stderr);
        assert_eq!(ended.stdout, "", "{arguments}");
    }
}

#[test]
fn a_trace_that_cannot_be_replayed_is_refused_with_what_is_wrong_with_it() {
    let folder = folder();
    let small = "trace:tests/samples/small.trace";
    let control = folder.path().join("control");
    let control = control.to_str().expect("a temporary folder's name");
    let other = format!("trace:{}", folder.path().join("other.trace").display());
    std::fs::write(folder.path().join("other.trace"), "# postcopy-trace v2\n").expect("room");
    let cases = [
        (&["--workload", small][..], "small is of 2 vCPUs; the guest has 1 (--vcpus 2)"),
        (&["--workload", small, "--vcpus", "2", "--memory", "32M"], "needs at least 16016 pages"),
        (&["--workload", small, "--vcpus", "2", "--guest", "kvm"], "cannot replay a trace"),
        (&["--workload", "trace:/nowhere"], "trace /nowhere: cannot read it"),
        (&["--workload", &other], "line 1: expected \"# postcopy-trace v1\""),
    ];
    for (arguments, what) in cases {
        let ended = ends(&[&["run", "--control", control][..], arguments].concat());
        assert_eq!(ended.code, Some(1), "{arguments:?}: {ended:?}");
        assert!(ended.stderr.contains(what), "{arguments:?}: {}", ended.stderr);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    }
}

#[test]
fn a_form_of_the_kvm_guest_is_not_silently_dropped_for_the_process_guest() {
    let folder = folder();
    let control = folder.path().join("control").display().to_string();
    for form in [["--page-tables", "4k"], ["--cpl", "0"]] {
        let run = ["run", "--control", &control, "--memory", "16M", "--guest", "process"];
        let ended = ends(&[run.as_slice(), form.as_slice()].concat());
        assert_eq!(ended.code, Some(1), "{form:?}: {ended:?}");
        assert!(ended.stderr.contains("forms of the KVM guest"), "{ended:?}");
    }
}

#[test]
fn a_guest_that_does_not_fit_the_host_is_not_started() {
    let folder = folder();
    let control = folder.path().join("control");
    let control = control.to_str().expect("a plain name");
    ends(&["run", "--control", control, "--memory", "8T"])
        .failed_with(1, &["8796093022208 bytes of guest memory do not fit", "leaves"]);
    assert!(!Path::new(control).exists(), "the socket was left behind");
}

#[test]
fn a_control_socket_that_cannot_be_made_is_named() {
    let guest = Guest::start();
    let run = |control: &str| ends(&["run", "--memory", "8M", "--control", control]);
    let taken = guest.control();
    run(&taken).failed_with(1, &["another process listens at", &taken]);
    let file = guest.path("file");
    std::fs::write(&file, "precious").expect("our folder");
    run(&file).failed_with(1, &["exists and is not a socket", &file]);
    assert_eq!(std::fs::read_to_string(&file).expect("still there"), "precious");
    let nowhere = guest.path("no/such/folder");
    run(&nowhere).failed_with(1, &["cannot listen at", &nowhere, "No such file"]);
    let long = guest.path(&"x".repeat(200));
    run(&long).failed_with(1, &["cannot listen at", &long]);
    guest.runs_on();
}

#[test]
fn a_control_socket_that_is_none_is_named() {
    let _permit = permit();
    let folder = folder();
    let path = |name: &str| folder.path().join(name).to_str().expect("a plain name").to_owned();
    let destination = FakeDestination::listen();
    let migrate =
        |control: &str| ends(&["migrate", "--control", control, "--ticket", &destination.ticket]);
    let missing = path("missing");
    migrate(&missing).failed_with(1, &["cannot attach", &missing, "No such file"]);
    let file = path("file");
    std::fs::write(&file, "").expect("our folder");
    migrate(&file).failed_with(1, &["cannot attach", &file, "Connection refused"]);
    let stale = path("stale");
    drop(UnixListener::bind(&stale).expect("our folder"));
    migrate(&stale).failed_with(1, &["cannot attach", &stale, "Connection refused"]);

    // Somebody else's sockets: one that hangs up, one that talks nonsense.
    for nonsense in [&b""[..], b"HTTP/1.1 400 Bad Request\r\n\r\n", &[0xff; 64], &[0; 64]] {
        let other = path(&format!("other-{}-{}", nonsense.len(), nonsense.first().unwrap_or(&1)));
        let listener = UnixListener::bind(&other).expect("our folder");
        let answer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let _ = std::io::Write::write_all(&mut stream, nonsense);
        });
        migrate(&other).failed_with(1, &["cannot attach", &other]);
        answer.join().expect("the client was there");
    }
}

#[test]
fn another_user_cannot_take_a_guest() {
    let Some((_folder, nobody)) = as_nobody() else { return };
    let guest = Guest::start();
    // The folder lets everybody through; it is the socket that does not.
    let folder = Path::new(&guest.control()).parent().expect("a folder").to_owned();
    std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755)).expect("our folder");
    let destination = FakeDestination::listen();
    let control = guest.control();
    let migrate = ["migrate", "--control", &control, "--ticket", &destination.ticket];
    let ended = Running::start_as(nobody, &migrate).wait(SOON);
    ended.failed_with(1, &["cannot attach", &control, "Permission denied"]);
    guest.runs_on();
}

/// A destination without the right to userfaultfd refuses before the blackout, and
/// says on both sides what to set.
fn refused_without_userfaultfd(guest: &[&str]) {
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if allowed.is_ok_and(|text| text.trim() == "1") {
        return eprintln!("skipped: vm.unprivileged_userfaultfd is 1, so everybody may use it");
    }
    let Some((_folder, nobody)) = as_nobody() else { return };
    let guest = Guest::start_with(guest);
    let receiver = Receiver::start_as(nobody, &[]);
    let advice =
        ["userfaultfd is not permitted", "vm.unprivileged_userfaultfd=1", "read and write"];
    let migration = guest.migrate(&receiver.ticket, &[]).wait(SOON);
    migration.failed_with(3, &[&advice[..], &["the guest runs on here"]].concat());
    guest.runs_on();
    receiver.fails_with(3, &advice);
    guest.migrates_to(Receiver::start());
}

#[test]
fn a_destination_without_userfaultfd_says_what_to_set_for_a_process() {
    refused_without_userfaultfd(&["--guest", "process", "--memory", "16M", "--think-ns", "2000"]);
}

#[test]
fn a_destination_without_userfaultfd_says_what_to_set_for_a_virtual_machine() {
    refused_without_userfaultfd(&["--guest", "kvm", "--memory", "16M", "--think-ns", "2000"]);
}

#[test]
fn a_port_in_use_is_named() {
    let taken = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("an address").port();
    let receive = |port: u16| ends(&["receive", "--port", &port.to_string()]);
    let named = format!("UDP port {port} on 127.0.0.1 is in use already");
    receive(port).failed_with(1, &[&named]);
    // As the push lane's, which comes after the urgent one's.
    receive(port - 1).failed_with(1, &["is in use already"]);
    ends(&["receive", "--listen", "192.0.2.1"]).failed_with(1, &["cannot listen on UDP 192.0.2.1"]);
    ends(&["receive", "--port", "65535"]).failed_with(1, &["65535"]);
}

#[test]
fn a_report_that_cannot_be_written_does_not_hide_how_the_migration_went() {
    // Completed, on both sides.
    let guest = Guest::start();
    let nowhere = guest.path("no/such/folder/report.json");
    let receive = ["receive", "--quiet", "--verify-after", "100ms", "--report", &nowhere];
    let mut receiver = Running::start(&receive);
    let ticket = receiver.line();
    let ended = guest.migrate(&ticket, &["--report", &nowhere]).wait(MIGRATION);
    let said = ["the migration completed", "cannot write the report", &nowhere, "No such file"];
    ended.failed_with(6, &said);
    receiver.wait(MIGRATION).failed_with(6, &said);
    guest.has_left();

    // Aborted: the guest is what matters.
    let guest = Guest::start();
    let nowhere = guest.path("no/such/folder/report.json");
    let mut destination = FakeDestination::listen();
    let migration = guest.migrate(&destination.ticket, &["--report", &nowhere]);
    destination.takes_state();
    destination.close("enough");
    let ended = migration.wait(SOON);
    assert_eq!(ended.code, Some(3), "{ended:?}");
    let last = ended.stderr.lines().last().unwrap_or_default();
    assert!(last.contains("enough") && last.contains("the guest runs on here"), "{ended:?}");
    assert!(ended.stderr.contains("cannot write the report"), "{ended:?}");
    guest.runs_on();
}

#[test]
fn a_guest_that_is_being_migrated_is_not_migrated_twice() {
    let guest = Guest::start();
    let (first, second) = (Receiver::start(), Receiver::start());
    let report = guest.path("report.json");
    // Long enough under way: nothing is pushed for two seconds.
    let slow = ["--policy", "demand-only", "--drain-after", "2s", "--report", &report];
    let mut migration = guest.migrate(&first.ticket, &slow);
    migration.is_attached();
    let ended = guest.migrate(&second.ticket, &[]).wait(SOON);
    ended.failed_with(1, &["cannot attach", "another client is attached to this guest"]);
    migration.succeed(MIGRATION);
    let mut whole = read_report(&report);
    guest.has_left();
    whole["verified"] = first.report()["verified"].clone();
    check_report(&whole);
}
