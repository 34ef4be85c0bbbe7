//! One migration of our own, by `postcopy demo`: guest, destination and fault server are
//! processes of their own, and the destination's memory is verified.

use crate::figures::Figures;
use crate::payload::Load;
use anyhow::{Context, ensure};
use postcopy::report::schema::{Outcome, Report};
use postcopy::vmm::guest::GuestKind;
use postcopy::vmm::stalls::StallFigures;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Runs a guest for `run_before` and moves it.
pub fn migrate(
    guest: GuestKind,
    mode: &str,
    load: &Load,
    run_before: Duration,
) -> anyhow::Result<Figures> {
    let folder = tempfile::Builder::new().prefix("postcopy-peers-").tempdir()?;
    let report = folder.path().join("report.json");
    let mut demo = Command::new(env!("CARGO_BIN_EXE_postcopy"));
    demo.args(["--die-with-parent", "demo", "--quiet", "--workload", "random", "--vcpus", "1"]);
    demo.args(["--mode", mode]);
    demo.args(["--guest", guest.name(), "--memory", &load.memory.to_string()]);
    demo.args(["--think-ns", &load.think_ns.to_string(), "--seed", &load.seed.to_string()]);
    demo.args(["--run-before", &format!("{}ms", run_before.as_millis()), "--run-after", "0ms"]);
    demo.arg("--report").arg(&report).stdin(Stdio::null());
    let status = demo.status().context("cannot start postcopy")?;
    ensure!(status.success(), "postcopy demo ended with {status}");
    let report: Report = serde_json::from_slice(&std::fs::read(&report)?)?;
    ensure!(report.outcome == Outcome::Completed, "the migration is {:?}", report.outcome);
    ensure!(report.verified == Some(true), "the guest was not verified");
    Ok(figures(&report))
}

fn figures(report: &Report) -> Figures {
    let stalls = report.guest_stall_ns.as_ref().map(|stalls| StallFigures {
        count: stalls.count,
        mean: stalls.mean.unwrap_or_default(),
        p50: stalls.p50.unwrap_or_default(),
        p99: stalls.p99.unwrap_or_default(),
        max: stalls.max.unwrap_or_default(),
    });
    let faults = report.network_faults.zip(report.late_hits);
    Figures {
        total_us: report.total_us,
        downtime_us: report.downtime_us,
        brownout_us: report.phases_us.target_brownout,
        faults: faults.map(|(network, late)| network + late),
        blocktime_us: report.blocktime_us.as_ref().map(|blocktime| blocktime.total),
        stalls,
        steps: report.guest_steps.during_target_brownout,
        bytes: report.wire_bytes.to_destination,
    }
}
