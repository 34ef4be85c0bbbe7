//! Guests of every kind over loopback: a covering set of the configurations, each
//! guest with each workload at least once, and every other choice several times.

use super::harness::{MIGRATION, Running, check_report, folder, permit, read_report};
use postcopy::vmm::choice::WorkloadChoice;
use serde_json::Value;

/// Runs `postcopy demo`, checks its report and hands it out.
pub fn demo(arguments: &[&str]) -> Value {
    let _permit = permit();
    let folder = folder();
    let path = folder.path().join("report.json");
    let path = path.to_str().expect("a temporary folder has a plain name");
    let times = ["demo", "--quiet", "--run-before", "200ms", "--run-after", "200ms"];
    let demo = [&times, arguments, &["--report", path]].concat();
    let ended = Running::start(&demo).succeed(MIGRATION);
    assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("", ""), "it was to be quiet");
    let report = read_report(path);
    check_report(&report);
    report
}

fn count(report: &Value, pointer: &str) -> u64 {
    let value = report.pointer(pointer).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("no {pointer} in {report:#}"))
}

/// What the arguments say must show in the report.
fn migrates(arguments: &str) {
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    let option = |name: &str, default: &'static str| {
        let at = arguments.iter().position(|argument| *argument == name);
        at.map_or(default.to_owned(), |at| arguments[at + 1].to_owned())
    };
    let report = demo(&arguments);
    assert_eq!(report["guest"]["kind"], option("--guest", ""));
    assert_eq!(report["guest"]["backing"], option("--backing", "memfd-continue"));
    let workload: WorkloadChoice = option("--workload", "random").parse().expect("a workload");
    assert_eq!(report["guest"]["workload"], workload.short());
    assert_eq!(report["guest"]["vcpus"].to_string(), option("--vcpus", "1"));
    assert_eq!(report["policy"], option("--policy", "bubbling"));
    assert_eq!(report["link"]["push_lanes"].to_string(), option("--push-lanes", "1"));

    let pages = |name: &str| count(&report, &format!("/pages/{name}"));
    assert!(pages("seeded") > 0, "{report:#}");
    let faults = count(&report, "/network_faults");
    if option("--policy", "") == "demand-only" {
        // Nothing comes of itself, so every first touch of a page is a fault.
        assert!(faults > 0 && pages("demanded") > 0, "{report:#}");
        assert_eq!(pages("pushed"), 0, "{report:#}");
        assert!(pages("drained") > 0, "{report:#}");
    } else {
        assert_eq!(pages("drained"), 0, "{report:#}");
        assert!(pages("pushed") > 0, "{report:#}");
    }
    if ["random", "read-modify-write"].contains(&option("--workload", "random").as_str()) {
        // These go everywhere at once: they meet pages before those were pushed.
        assert!(faults > 0, "{report:#}");
    }
    if option("--zero", "0") == "30" {
        // Half of the tail was written with zeros; of the other half the guest has read
        // some, which fills holes. A page that was asked for first counts as demanded.
        let tail = pages("total") * 30 / 100;
        assert!(pages("zero") >= tail / 3 && pages("hole") > 0, "{report:#}");
        assert!(pages("zero") + pages("hole") >= tail * 9 / 10, "{report:#}");
    }
}

/// A test for each line of arguments.
macro_rules! migrations {
    ($($name:ident: $arguments:literal,)*) => {
        $(#[test] fn $name() { migrates($arguments); })*
    };
}

migrations! {
    process_sequential: "--guest process --workload sequential --memory 64M --backing anonymous",
    process_strided: "--guest process --workload strided --memory 96M --vcpus 2 --policy linear \
        --backing memfd-copy",
    process_random: "--guest process --workload random --memory 128M --vcpus 2 --zero 30",
    process_zipf: "--guest process --workload zipf --memory 64M --policy demand-only \
        --drain-after 1s --push-lanes 3",
    process_hot_set: "--guest process --workload hot-set-with-scan --memory 64M --vcpus 2 \
        --push-lanes 3 --backing anonymous --policy linear",
    process_pointer_chase: "--guest process --workload pointer-chase --memory 64M --zero 30 \
        --policy demand-only --drain-after 1s --backing anonymous",
    process_read_modify_write: "--guest process --workload read-modify-write --memory 128M \
        --vcpus 2 --backing memfd-copy --push-lanes 3 --zero 30",

    kvm_sequential: "--guest kvm --workload sequential --memory 64M --vcpus 2 --policy demand-only \
        --drain-after 1s --backing memfd-copy",
    kvm_strided: "--guest kvm --workload strided --memory 64M --zero 30 --backing anonymous \
        --push-lanes 3",
    kvm_random: "--guest kvm --workload random --memory 128M --vcpus 2 --policy linear",
    kvm_zipf: "--guest kvm --workload zipf --memory 96M --vcpus 2 --backing anonymous --zero 30",
    kvm_hot_set: "--guest kvm --workload hot-set-with-scan --memory 64M --policy demand-only \
        --drain-after 1s",
    kvm_pointer_chase: "--guest kvm --workload pointer-chase --memory 64M --vcpus 2 \
        --push-lanes 3 --backing memfd-copy",
    kvm_read_modify_write: "--guest kvm --workload read-modify-write --memory 128M --vcpus 2 \
        --policy linear --push-lanes 3 --zero 30",

    // Page tables that are missing themselves; accesses that KVM makes where it emulates CPL 0.
    kvm_small_pages: "--guest kvm --workload random --memory 128M --vcpus 2 --page-tables 4k",
    kvm_small_pages_on_demand: "--guest kvm --workload random --memory 64M --page-tables 4k \
        --policy demand-only --drain-after 1s --backing anonymous --zero 30",
    kvm_kernel: "--guest kvm --workload zipf --memory 64M --vcpus 2 --cpl 0",
    kvm_kernel_small_pages: "--guest kvm --workload random --memory 64M --vcpus 4 --cpl 0 \
        --page-tables 4k --backing anonymous --policy linear",

    // The recorded touches of a real guest, which the destination knows from the same file.
    process_trace: "--guest process --workload trace:tests/samples/small.trace --memory 64M \
        --vcpus 2",
    process_trace_on_demand: "--guest process --workload trace:tests/samples/small.trace \
        --memory 64M --vcpus 2 --policy demand-only --drain-after 1s --backing anonymous",

    // Four vCPUs on two cores, eight lanes, one pivot.
    process_crowded: "--guest process --workload random --memory 64M --vcpus 4 --push-lanes 8 \
        --pivots 1",
    kvm_crowded: "--guest kvm --workload read-modify-write --memory 64M --vcpus 4 --push-lanes 8 \
        --pivots 1 --backing anonymous",
    // The smallest guests there are.
    process_smallest: "--guest process --workload pointer-chase --memory 8M --vcpus 2",
    kvm_smallest: "--guest kvm --workload sequential --memory 8M --backing anonymous",
}

/// Without a time for it, a demand-only migration is drained when the workload ends:
/// here after 30,000 steps of at least 40 us, so that it ends at the destination.
fn ends_with_the_workload(guest: &str) {
    let of = ["--guest", guest, "--memory", "64M", "--policy", "demand-only"];
    let steps = ["--steps", "30000", "--think-ns", "40000"];
    let report = demo(&[&of[..], &steps].concat());
    assert!(count(&report, "/pages/demanded") > 0, "{report:#}");
    assert!(count(&report, "/pages/drained") > 0, "{report:#}");
}

#[test]
fn a_demand_only_migration_of_a_process_ends_with_the_workload() {
    ends_with_the_workload("process");
}

#[test]
fn a_demand_only_migration_of_a_virtual_machine_ends_with_the_workload() {
    ends_with_the_workload("kvm");
}
