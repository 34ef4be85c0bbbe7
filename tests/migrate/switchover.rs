//! Memory that is copied before the guest moves: every mode, and what happens when such a
//! migration ends early.

use super::harness::{Guest, MIGRATION, Receiver, Running, SOON, poll, read_report};
use super::loopback::demo;
use nix::sys::signal::Signal;
use postcopy::transport::Ticket;
use postcopy::transport::relay::{Relay, RelayConfig, targets};
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

fn count(report: &Value, pointer: &str) -> u64 {
    let value = report.pointer(pointer).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("no {pointer} in {report:#}"))
}

/// Migrates in this mode; the report must say so.
fn moves(mode: &str, arguments: &str) -> Value {
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    let report = demo(&[&["--mode", mode], &arguments[..]].concat());
    let copies = mode != "post-copy";
    assert_eq!(report["switchover"]["asked"].as_str(), copies.then_some(mode), "{report:#}");
    assert_eq!(report["pages"]["precopied"].is_u64(), copies, "{report:#}");
    if mode != "auto" {
        assert_eq!(report["mode"], mode, "{report:#}");
    }
    let rounds = report["switchover"]["rounds"].as_array().map_or(0, Vec::len);
    match mode {
        "post-copy" | "stop-and-copy" => assert_eq!(rounds, 0, "{report:#}"),
        "hybrid" => assert!((1..=3).contains(&rounds), "{report:#}"),
        _ => assert!(rounds >= 1, "{report:#}"),
    }
    if ["pre-copy", "stop-and-copy"].contains(&mode) {
        let all = count(&report, "/pages/total");
        assert_eq!(count(&report, "/pages/precopied"), all, "{report:#}");
        assert_eq!(count(&report, "/network_faults"), 0, "{report:#}");
    }
    report
}

/// A test for each line: a mode, and the guest.
macro_rules! moves {
    ($($name:ident: $mode:literal, $arguments:literal,)*) => {
        $(#[test] fn $name() { moves($mode, $arguments); })*
    };
}

moves! {
    kvm_pre_copy: "pre-copy", "--guest kvm --memory 64M --think-ns 20000 --zero 30",
    kvm_hybrid: "hybrid", "--guest kvm --memory 128M --vcpus 2 --zero 30",
    kvm_hybrid_of_rounds: "hybrid",
        "--guest kvm --memory 96M --rounds 3 --push-lanes 3 --page-tables 4k",
    kvm_stop_and_copy: "stop-and-copy", "--guest kvm --memory 64M --vcpus 2 --zero 30 --push-lanes 3",
    kvm_auto: "auto", "--guest kvm --memory 96M --workload hot-set-with-scan --vcpus 2",
    kvm_post_copy: "post-copy", "--guest kvm --memory 64M",
    process_stop_and_copy: "stop-and-copy", "--guest process --memory 64M --zero 30",
    // The policy decides about what is left.
    kvm_hybrid_on_demand: "hybrid",
        "--guest kvm --memory 64M --policy demand-only --drain-after 1s",
}

/// A guest that is being copied over a link that takes seconds for it.
struct Copying {
    guest: Guest,
    receiver: Receiver,
    source: Running,
    relay: Relay,
    report: String,
}

impl Copying {
    /// Some of it has gone over the link when this returns.
    fn start(mode: &[&str]) -> Self {
        Self::start_of("2000", mode)
    }

    /// The same of a guest that makes a step each `think` nanoseconds.
    fn start_of(think: &str, mode: &[&str]) -> Self {
        let guest = ["--guest", "kvm", "--memory", "64M", "--zero", "30", "--think-ns", think];
        let guest = Guest::start_with(&guest);
        let receiver = Receiver::start();
        let ticket: Ticket = receiver.ticket.trim().parse().expect("a ticket");
        let config = RelayConfig {
            bandwidth_bps: Some(100_000_000),
            rtt: Duration::from_millis(2),
            ..RelayConfig::default()
        };
        let relay = Relay::spawn(config, &targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket));
        let relay = relay.expect("a relay");
        let ticket = relay.redirect(&ticket).expect("the same ticket").to_string();
        let report = guest.path("report.json");
        let source = guest.migrate(&ticket, &[mode, &["--report", &report]].concat());
        let copies = || relay.stats().to_target.forwarded_bytes > 2 << 20;
        poll("pages on the link", SOON, || copies().then_some(()));
        Self { guest, receiver, source, relay, report }
    }

    /// It was aborted: the guest runs on, and nothing before did it any harm.
    fn stays(self, why: &str) {
        let ended = self.source.wait(SOON);
        let last = ended.stderr.lines().last().unwrap_or_default();
        assert!(ended.code == Some(3) && last.contains(why), "{ended:?}");
        assert!(last.contains("the guest runs on here"), "{ended:?}");
        let report = read_report(&self.report);
        assert_eq!(report["outcome"], "aborted", "{report:#}");
        self.guest.runs_on();
        assert!(self.receiver.process.wait(SOON).code != Some(0));
        self.guest.migrates_to(Receiver::start());
    }
}

#[test]
fn a_guest_that_is_being_copied_stays_when_the_user_wants_it_to() {
    let copying = Copying::start(&["--mode", "hybrid"]);
    copying.source.signal(Signal::SIGINT);
    copying.stays("interrupted by the user");
}

#[test]
fn a_guest_that_is_being_copied_stays_when_its_destination_dies() {
    let mut copying = Copying::start(&["--mode", "pre-copy"]);
    copying.receiver.process.kill();
    copying.stays("the link was lost");
}

#[test]
fn a_guest_that_is_being_copied_stays_when_the_link_is_cut() {
    let copying = Copying::start(&["--mode", "hybrid"]);
    copying.relay.blackhole(true);
    copying.stays("the link was lost");
}

#[test]
fn a_guest_whose_rest_is_being_copied_in_its_pause_runs_on_when_the_link_is_cut() {
    let copying = Copying::start(&["--mode", "stop-and-copy"]);
    copying.relay.blackhole(true);
    copying.stays("the link was lost");
}

#[test]
fn a_guest_whose_fault_server_dies_while_it_is_being_copied_runs_on() {
    let mut copying = Copying::start(&["--mode", "hybrid"]);
    copying.source.kill();
    copying.guest.runs_on();
    assert!(copying.receiver.process.wait(SOON).code != Some(0));
    copying.guest.migrates_to(Receiver::start());
}

#[test]
fn a_link_that_is_lost_after_the_rounds_costs_a_hybrid_no_more_than_any_other() {
    let mut copying = Copying::start(&["--mode", "hybrid"]);
    assert!(copying.guest.process.line().contains("the guest has left"));
    copying.relay.blackhole(true);
    std::thread::sleep(Duration::from_millis(2500));
    copying.relay.blackhole(false);
    copying.source.succeed(MIGRATION);
    let report = read_report(&copying.report);
    assert!(count(&report, "/pages/precopied") > 0, "{report:#}");
    assert_eq!(count(&report, "/pages/placed_twice"), 0, "{report:#}");
    assert_eq!(copying.receiver.report()["verified"], true, "{report:#}");
    copying.guest.has_left();
}

#[test]
fn pre_copy_that_never_comes_to_an_end_is_given_up_and_the_guest_runs_on() {
    let guest = Guest::start_with(&["--guest", "kvm", "--memory", "8M", "--workload", "random"]);
    let receiver = Receiver::start();
    // A pause takes longer, whatever is left.
    let mode = ["--mode", "pre-copy", "--max-downtime", "1ms"];
    let source = guest.migrate(&receiver.ticket, &mode);
    source.wait(MIGRATION).failed_with(3, &["pre-copy does not come to an end: after 30 rounds"]);
    receiver.fails_with(3, &["pre-copy does not come to an end"]);
    guest.runs_on();
}

#[test]
fn a_guest_moves_when_there_is_no_time_for_more_rounds() {
    // What is not zero of it takes the link four seconds, and more.
    let copying = Copying::start(&["--mode", "hybrid", "--rounds", "3", "--max-total", "2s"]);
    copying.source.succeed(MIGRATION);
    let report = read_report(&copying.report);
    assert_eq!(count(&report, "/switchover/max_total_us"), 2_000_000, "{report:#}");
    let rounds = report["switchover"]["rounds"].as_array().expect("rounds");
    let why = rounds.last().and_then(|round| round["why"].as_str()).expect("a round");
    assert!(rounds.len() == 1 && why.contains("there is no time for more"), "{report:#}");
    assert_eq!(copying.receiver.report()["verified"], true);
    copying.guest.has_left();
}

#[test]
fn an_operator_gives_a_guest_less_time() {
    let copying = Copying::start(&["--mode", "pre-copy", "--max-downtime", "1ms"]);
    say(&copying.guest, &["limit", "--max-total", "1s"]);
    copying.stays("with another round it takes");
}

#[test]
fn a_destination_that_can_take_no_page_before_the_pause_says_so() {
    let guest = Guest::start_with(&["--guest", "kvm", "--memory", "16M"]);
    let receiver = Receiver::start_with(&["--backing", "anonymous"]);
    let source = guest.migrate(&receiver.ticket, &["--mode", "hybrid"]);
    let why = ["pages that come before the pause", "anonymous and not memfd-continue"];
    source.wait(SOON).failed_with(3, &why);
    receiver.fails_with(3, &why);
    guest.runs_on();
}

/// Says something to the session of a guest.
fn say(guest: &Guest, words: &[&str]) {
    let (command, rest) = words.split_first().expect("a command");
    let control = guest.control();
    let session = [&["session", command, "--control", &control], rest].concat();
    Running::start(&session).succeed(SOON);
}

/// Bytes that went to the destination within this time, by the relay, and how long it was.
fn passed(relay: &Relay, time: Duration) -> (u64, Duration) {
    let bytes = || relay.stats().to_target.forwarded_bytes;
    let (before, began) = (bytes(), std::time::Instant::now());
    std::thread::sleep(time);
    (bytes() - before, began.elapsed())
}

#[test]
fn an_operator_has_a_guest_move_that_is_being_copied() {
    let copying = Copying::start(&["--mode", "pre-copy", "--max-downtime", "1ms"]);
    say(&copying.guest, &["switch"]);
    copying.source.succeed(MIGRATION);
    let report = read_report(&copying.report);
    assert_eq!(
        (&report["mode"], &report["switchover"]["asked"]),
        (&"hybrid".into(), &"pre-copy".into())
    );
    let rounds = report["switchover"]["rounds"].as_array().expect("rounds");
    let why = rounds.last().and_then(|round| round["why"].as_str()).expect("a round");
    assert!(why.contains("operator"), "{report:#}");
    assert_eq!(copying.receiver.report()["verified"], true);
    copying.guest.has_left();
}

#[test]
fn an_operator_holds_pages_back_and_lets_them_go() {
    let copying = Copying::start(&["--mode", "hybrid"]);
    say(&copying.guest, &["hold"]);
    // What is on its way arrives; then there are signs of life only.
    poll("a quiet link", SOON, || {
        let (bytes, time) = passed(&copying.relay, Duration::from_millis(300));
        (bytes as f64 * 8.0 < 1e6 * time.as_secs_f64()).then_some(())
    });
    say(&copying.guest, &["go-on"]);
    copying.source.succeed(MIGRATION);
    assert_eq!(copying.receiver.report()["verified"], true);
    copying.guest.has_left();
}

#[test]
fn a_limit_on_bandwidth_is_kept_and_can_be_changed_meanwhile() {
    // A guest that hardly writes, so that the round goes on; no vCPU waits for a page meanwhile.
    let mode = ["--mode", "hybrid", "--max-bandwidth", "40Mbit"];
    let copying = Copying::start_of("50000000", &mode);
    let (bytes, time) = passed(&copying.relay, Duration::from_secs(1));
    let most = 40e6 / 8.0 * 1.05 * time.as_secs_f64();
    assert!((bytes as f64) < most, "{bytes} bytes in {time:?}");
    say(&copying.guest, &["limit", "--max-bandwidth", "10Mbit"]);
    // What was on its way before may come yet.
    std::thread::sleep(Duration::from_millis(300));
    let (bytes, time) = passed(&copying.relay, Duration::from_secs(1));
    let most = 10e6 / 8.0 * 1.05 * time.as_secs_f64();
    assert!((bytes as f64) < most, "{bytes} bytes in {time:?}");
    say(&copying.guest, &["limit", "--max-bandwidth", "none"]);
    copying.source.succeed(MIGRATION);
    assert_eq!(copying.receiver.report()["verified"], true);
    copying.guest.has_left();
}
