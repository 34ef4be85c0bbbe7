//! Guests in huge pages of hugetlbfs, at the source and at the destination.

use super::harness::{Guest, MIGRATION, Receiver, Running, check_report, read_report};
use super::huge_page_pool::Pool;
use postcopy::transport::Ticket;
use postcopy::transport::relay::{Relay, RelayConfig, Way, targets};
use postcopy::vmm::kvm::kvm_available;
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// A guest of 128 MiB, in pages.
const PAGES: u64 = 128 << 8;
/// And in huge ones.
const HUGE: u64 = 64;

fn guest(more: &[&str]) -> Guest {
    Guest::start_with(&[&["--memory", "128M", "--think-ns", "2000"], more].concat())
}

/// Over a link of 200 Mbit/s; the guest has left when this returns.
fn set_out(guest: &mut Guest, receiver: &Receiver) -> (Running, Relay, String) {
    let ticket: Ticket = receiver.ticket.trim().parse().expect("a ticket");
    let config = RelayConfig {
        bandwidth_bps: Some(200_000_000),
        rtt: Duration::from_millis(1),
        ..RelayConfig::default()
    };
    let relay = Relay::spawn(config, &targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket));
    let relay = relay.expect("a relay");
    let ticket = relay.redirect(&ticket).expect("the same ticket").to_string();
    let report = guest.path("report.json");
    let source = guest.migrate(&ticket, &["--report", &report]);
    assert!(guest.process.line().contains("the guest has left"));
    (source, relay, report)
}

/// Both sides in huge pages, and the link is lost on the way.
fn recovers(kind: &str) {
    let Some(pool) = Pool::of(2 * HUGE) else { return };
    let mut guest = guest(&["--guest", kind, "--hugetlb", "--vcpus", "2", "--zero", "20"]);
    // All of the guest is in huge pages, and all of its memory there is reserved.
    pool.has_free(HUGE);
    let receiver = Receiver::start_with(&["--backing", "hugetlb"]);
    let (source, relay, report) = set_out(&mut guest, &receiver);
    std::thread::sleep(Duration::from_millis(700));
    pool.has_free(0);
    // What the source sends meanwhile is lost for certain.
    relay.cut(Way::ToTarget, true);
    std::thread::sleep(Duration::from_millis(50));
    relay.blackhole(true);
    std::thread::sleep(Duration::from_millis(2450));
    relay.blackhole(false);
    source.succeed(MIGRATION);
    let report = read_report(&report);
    let destination = receiver.report();
    assert_eq!(destination["verified"], true, "{destination:#}");
    assert_eq!(report["outcome"], "recovered", "{report:#}");
    let pages = |name: &str| report["pages"][name].as_u64().expect("a count of pages");
    let origins = ["seeded", "demanded", "pushed", "drained", "zero", "hole"];
    let sum: u64 = origins.iter().map(|origin| pages(origin)).sum();
    assert!(pages("resent_after_link_loss") > 0, "{report:#}");
    assert_eq!(sum, PAGES + pages("resent_after_link_loss"), "{report:#}");
    assert_eq!((pages("sent_twice"), pages("placed_twice")), (0, 0), "{report:#}");
    waits_are_for_huge_pages(&report);
    guest.has_left();
}

/// There are fewer faults than huge pages and vCPUs that may wait for each, and one asks for many
/// pages.
fn waits_are_for_huge_pages(report: &Value) {
    let count = |name: &str| report[name].as_u64().expect("a count of faults");
    let (network, late) = (count("network_faults"), count("late_hits"));
    assert!(network + late <= HUGE * (count_of_vcpus(report) + 1), "{report:#}");
    assert!(network > 0, "{report:#}");
    assert_eq!(count("pages_a_fault"), 512, "{report:#}");
    let demanded = report["pages"]["demanded"].as_u64().expect("a count of pages");
    assert!(demanded > network, "{report:#}");
}

fn count_of_vcpus(report: &Value) -> u64 {
    report["guest"]["vcpus"].as_u64().expect("a count of vCPUs")
}

#[test]
fn a_process_in_huge_pages_survives_a_lost_link() {
    recovers("process");
}

#[test]
fn a_virtual_machine_in_huge_pages_survives_a_lost_link() {
    match kvm_available() {
        Ok(()) => recovers("kvm"),
        Err(why) => println!("SKIPPED: no KVM here: {why}"),
    }
}

#[test]
fn pages_of_many_lanes_make_huge_ones() {
    let Some(_pool) = Pool::of(HUGE) else { return };
    let guest = guest(&["--guest", "process", "--vcpus", "4", "--zero", "30"]);
    let receiver = Receiver::start_with(&["--backing", "hugetlb", "--push-lanes", "8"]);
    let report = guest.path("report.json");
    guest.migrate(&receiver.ticket, &["--report", &report]).succeed(MIGRATION);
    let mut source = read_report(&report);
    source["verified"] = receiver.report()["verified"].clone();
    check_report(&source);
    waits_are_for_huge_pages(&source);
    guest.has_left();
}

#[test]
fn a_guest_that_asks_for_everything_gets_it_in_huge_pages() {
    let Some(_pool) = Pool::of(HUGE) else { return };
    let guest = guest(&["--guest", "process", "--vcpus", "2"]);
    let receiver = Receiver::start_with(&["--backing", "hugetlb"]);
    let report = guest.path("report.json");
    let asked = ["--report", &report, "--policy", "demand-only", "--drain-after", "2s"];
    guest.migrate(&receiver.ticket, &asked).succeed(MIGRATION);
    let mut source = read_report(&report);
    source["verified"] = receiver.report()["verified"].clone();
    check_report(&source);
    waits_are_for_huge_pages(&source);
    guest.has_left();
}

#[test]
fn huge_pages_at_the_source_become_small_ones() {
    let Some(pool) = Pool::of(HUGE) else { return };
    let guest = guest(&["--guest", "process", "--hugetlb", "--zero", "30"]);
    let receiver = Receiver::start();
    let report = guest.path("report.json");
    guest.migrate(&receiver.ticket, &["--report", &report]).succeed(MIGRATION);
    let mut source = read_report(&report);
    source["verified"] = receiver.report()["verified"].clone();
    check_report(&source);
    guest.has_left();
    pool.has_free(HUGE);
}

#[test]
fn a_pool_that_is_too_small_is_refused_and_the_guest_runs_on() {
    let Some(pool) = Pool::of(HUGE - 10) else { return };
    let guest = guest(&["--guest", "process"]);
    // Nor is there a way around it.
    for more in [&[][..], &["--overcommit"]] {
        let receiver = Receiver::start_with(&[&["--backing", "hugetlb"], more].concat());
        let migration = guest.migrate(&receiver.ticket, &[]).wait(MIGRATION);
        let why = ["64 huge pages of 2 MiB are needed", "gave 54", "the guest runs on here"];
        migration.failed_with(3, &why);
        receiver.fails_with(3, &["vm.nr_hugepages is 10 too low", "no guest is here"]);
        // What was taken is given back.
        pool.has_free(HUGE - 10);
        guest.runs_on();
    }
    guest.migrates_to(Receiver::start());
}
