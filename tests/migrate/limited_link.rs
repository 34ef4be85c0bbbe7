//! Migrations over an emulated link of 200 Mbit/s, 2 ms round trip and 1 % loss.

use super::loopback::demo;
use std::time::Duration;

const LINK: [&str; 6] = ["--bandwidth", "200Mbit", "--rtt", "2ms", "--loss", "1%"];

/// Migrates over the link and checks that the link showed.
fn migrates(arguments: &str) {
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    let report = demo(&[&LINK[..], &arguments].concat());
    assert_eq!(report["link"]["bandwidth_limit_bps"], 200_000_000, "{report:#}");
    let rtt = report["link"]["rtt_us"].as_u64().expect("a round trip");
    assert!(rtt >= 2000, "{report:#}");
    // So many bytes cannot have come any faster than this.
    let bytes = report["wire_bytes"]["to_destination"].as_u64().expect("bytes sent");
    let least = Duration::from_secs_f64(bytes as f64 * 8.0 / 200e6 * 0.9);
    let total = Duration::from_micros(report["total_us"].as_u64().expect("a total time"));
    assert!(total > least, "{total:?} for {bytes} bytes: {report:#}");
    assert!(report["network_faults"].as_u64().is_some_and(|faults| faults > 0), "{report:#}");
    // No answer to a fault takes less than a round trip.
    let slowest = report["fault_latency_ns"]["max"].as_u64().expect("a latency");
    assert!(slowest >= 2_000_000, "{report:#}");
}

#[test]
fn a_process_moves_over_a_lossy_link() {
    migrates("--guest process --memory 64M --workload random --vcpus 2");
}

#[test]
fn a_process_moves_on_demand_over_a_lossy_link() {
    migrates("--guest process --memory 16M --workload zipf --policy demand-only --drain-after 1s");
}

#[test]
fn a_virtual_machine_moves_over_a_lossy_link() {
    migrates("--guest kvm --memory 64M --workload pointer-chase --push-lanes 3 --zero 30");
}
