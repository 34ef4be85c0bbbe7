//! The link is lost after the commit, in one way or another, and comes back: the migration goes
//! on by itself, no page is placed twice, and both sides tell the same.

use super::harness::{
    Guest, MIGRATION, Receiver, Running, SOON, folder, permit, poll, read_report,
};
use postcopy::transport::Ticket;
use postcopy::transport::relay::{Relay, RelayConfig, Way, targets};
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// So much memory takes about 5 s over this link.
const MEMORY: &str = "64M";
const BANDWIDTH: u64 = 100_000_000;
const PAGES: u64 = 64 << 8;

/// What must be true of a source's report after `outages` or more losses of the link.
fn check_recovered(report: &Value, outages: usize) {
    assert_eq!(report["outcome"], "recovered", "{report:#}");
    let pages = |name: &str| report["pages"][name].as_u64().expect("a count of pages");
    let origins = ["seeded", "demanded", "pushed", "drained", "zero", "hole"];
    let sum: u64 = origins.iter().map(|origin| pages(origin)).sum();
    let again = pages("resent_after_link_loss");
    assert_eq!(sum, PAGES + again, "each page once and those that were lost again: {report:#}");
    assert_eq!((pages("sent_twice"), pages("placed_twice")), (0, 0), "{report:#}");
    let told = report["outages"].as_array().expect("outages");
    assert!(told.len() >= outages, "{report:#}");
    assert_eq!(report["link"]["epochs"].as_u64(), Some(told.len() as u64 + 1), "{report:#}");
    let resent: u64 = told.iter().filter_map(|one| one["resent_pages"].as_u64()).sum();
    assert_eq!(resent, again, "{report:#}");
    for one in told {
        let at = |pointer: &str| one.pointer(pointer).and_then(Value::as_u64);
        assert!(at("/destination/up_at_us") >= at("/destination/lost_at_us"), "{report:#}");
        assert!(at("/destination/up_at_us").is_some(), "{report:#}");
    }
    // What was on its way is little: some round trips of the link, not what was sent in 1.5 s.
    assert!(again * 4096 < BANDWIDTH / 8 / 4 * told.len() as u64, "{again} pages: {report:#}");
}

/// A guest on its way over a relay.
struct Moving {
    guest: Guest,
    receiver: Receiver,
    source: Running,
    relay: Relay,
    report: String,
}

impl Moving {
    /// The guest has left its VMM when this returns.
    fn start(arguments: &[&str]) -> Self {
        let mut guest = Guest::start_with(&[
            "--guest",
            "process",
            "--memory",
            MEMORY,
            "--zero",
            "30",
            "--think-ns",
            "2000",
        ]);
        let receiver = Receiver::start_with(arguments);
        let ticket: Ticket = receiver.ticket.trim().parse().expect("a ticket");
        let config = RelayConfig {
            bandwidth_bps: Some(BANDWIDTH),
            rtt: Duration::from_millis(2),
            ..RelayConfig::default()
        };
        let relay = Relay::spawn(config, &targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket));
        let relay = relay.expect("a relay");
        let ticket = relay.redirect(&ticket).expect("the same ticket").to_string();
        let report = guest.path("report.json");
        let source = guest.migrate(&ticket, &[&["--report", &report], arguments].concat());
        assert!(guest.process.line().contains("the guest has left"));
        std::thread::sleep(Duration::from_millis(700));
        Self { guest, receiver, source, relay, report }
    }

    /// Both sides end well, and tell the same.
    fn recovers(self, outages: usize) -> Value {
        self.source.succeed(MIGRATION);
        let report = read_report(&self.report);
        let destination = self.receiver.report();
        assert_eq!(destination["verified"], true, "{destination:#}");
        check_recovered(&report, outages);
        for same in ["/outcome", "/link/epochs", "/network_faults", "/late_hits", "/local_faults"] {
            assert_eq!(report.pointer(same), destination.pointer(same), "{same}: {report:#}");
        }
        self.guest.has_left();
        report
    }
}

#[test]
fn a_link_that_is_cut_again_and_again_is_found_again_each_time() {
    let moving = Moving::start(&[]);
    for _ in 0..2 {
        // What the source sends while it still hears the acknowledgements of what came before is
        // lost for certain. With both ways cut at once, all that it sent may just have arrived.
        moving.relay.cut(Way::ToTarget, true);
        std::thread::sleep(Duration::from_millis(50));
        moving.relay.blackhole(true);
        std::thread::sleep(Duration::from_millis(2450));
        moving.relay.blackhole(false);
        std::thread::sleep(Duration::from_millis(1500));
    }
    let report = moving.recovers(1);
    assert!(report["pages"]["resent_after_link_loss"].as_u64() > Some(0), "{report:#}");
}

#[test]
fn a_cut_in_the_middle_of_finding_each_other_again_costs_another_attempt() {
    let moving = Moving::start(&[]);
    moving.relay.blackhole(true);
    std::thread::sleep(Duration::from_millis(2000));
    // Long enough for a hello, mostly too short for all the lanes.
    for _ in 0..20 {
        moving.relay.blackhole(false);
        std::thread::sleep(Duration::from_millis(15));
        moving.relay.blackhole(true);
        std::thread::sleep(Duration::from_millis(100));
    }
    moving.relay.blackhole(false);
    moving.recovers(1);
}

#[test]
fn one_lane_that_is_lost_alone_is_a_lost_link() {
    // The urgent lane, then the push lane.
    for port in 0..2 {
        let moving = Moving::start(&[]);
        for way in [Way::ToTarget, Way::ToClient] {
            moving.relay.cut_port(port, way, true);
        }
        std::thread::sleep(Duration::from_millis(2500));
        for way in [Way::ToTarget, Way::ToClient] {
            moving.relay.cut_port(port, way, false);
        }
        moving.recovers(1);
    }
}

#[test]
fn a_link_that_is_down_in_one_direction_only_is_a_lost_link() {
    for way in [Way::ToTarget, Way::ToClient] {
        let moving = Moving::start(&[]);
        moving.relay.cut(way, true);
        std::thread::sleep(Duration::from_millis(4500));
        moving.relay.cut(way, false);
        moving.recovers(1);
    }
}

#[test]
fn a_source_whose_address_changes_finds_the_destination_again() {
    let moving = Moving::start(&[]);
    moving.relay.blackhole(true);
    std::thread::sleep(Duration::from_millis(2000));
    moving.relay.rebind();
    moving.relay.blackhole(false);
    moving.recovers(1);
}

#[test]
fn a_link_that_does_not_come_back_is_given_up_when_patience_is_over_and_not_before() {
    let moving = Moving::start(&["--patience", "3s"]);
    moving.relay.blackhole(true);
    let Moving { guest, receiver, mut source, relay, .. } = moving;
    std::thread::sleep(Duration::from_millis(2500));
    assert!(source.runs(), "it gave up too early");
    for (side, why) in [
        (source, "the link did not come back after the commit"),
        (receiver.process, "the link did not come back; pages of the guest are missing"),
    ] {
        let ended = side.wait(SOON);
        assert_eq!(ended.code, Some(4), "{ended:?}");
        assert!(ended.stderr.contains(why), "{ended:?}");
    }
    // The memory is still held, for whoever goes on with the session.
    let keeper = guest.keeper();
    poll("a keeper", SOON, || (!super::harness::processes_with(&keeper).is_empty()).then_some(()));
    drop(relay);
}

#[test]
fn the_demonstration_cuts_its_link_and_tells_what_that_cost() {
    let _permit = permit();
    let folder = folder();
    let path = folder.path().join("report.json");
    let path = path.to_str().expect("a temporary folder has a plain name");
    let demo = [
        "demo",
        "--memory",
        MEMORY,
        "--bandwidth",
        "100Mbit",
        "--rtt",
        "2ms",
        "--cut",
        "1s:2s",
        "--report",
        path,
    ];
    let ended = Running::start(&demo).succeed(MIGRATION);
    check_recovered(&read_report(path), 1);
    for said in ["cut 1: the link was down for 2.0", "first page placed", "sent again: "] {
        assert!(ended.stdout.contains(said), "{said:?} is not in: {}", ended.stdout);
    }
    // The display says why, and that it is not over.
    for said in ["the link is lost", "paused"] {
        assert!(ended.stderr.contains(said), "{said:?} is not in: {}", ended.stderr);
    }
}
