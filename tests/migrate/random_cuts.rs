//! Migrations that copy memory before the guest moves, over links that are cut at random times,
//! and that are called off at random times. Where the guest is at last, it is whole.
//!
//! `POSTCOPY_RANDOM_CUTS=100 cargo test --test migrate random_cuts -- --nocapture` runs 100 of
//! them instead of a few; `POSTCOPY_RANDOM_CUTS_SEED` those of a seed once more.

use super::harness::{Guest, MIGRATION, Receiver, SOON, read_report};
use nix::sys::signal::Signal;
use postcopy::transport::Ticket;
use postcopy::transport::relay::{Relay, RelayConfig, Way, targets};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

const MIGRATIONS: u64 = 4;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// One migration; how it ended.
fn migrates(seed: u64) -> &'static str {
    let random = &mut StdRng::seed_from_u64(seed);
    let mut pick = |of: &[&'static str]| *of.choose(random).expect("some");
    let mode = pick(&["hybrid", "hybrid", "hybrid", "auto", "pre-copy", "stop-and-copy"]);
    let workload = pick(&["random", "zipf", "hot-set-with-scan"]);
    let (vcpus, zero, lanes) = (pick(&["1", "2"]), pick(&["0", "30"]), pick(&["1", "3"]));
    let think = random.random_range(5_000..100_000).to_string();
    let guest = Guest::start_with(&[
        "--guest",
        "kvm",
        "--memory",
        "16M",
        "--vcpus",
        vcpus,
        "--zero",
        zero,
        "--workload",
        workload,
        "--think-ns",
        &think,
        "--seed",
        &seed.to_string(),
    ]);
    let receiver = Receiver::start_with(&["--push-lanes", lanes]);
    let ticket: Ticket = receiver.ticket.trim().parse().expect("a ticket");
    let config = RelayConfig {
        // A second for all of it, or a little more.
        bandwidth_bps: Some(random.random_range(80_000_000..200_000_000)),
        rtt: Duration::from_micros(random.random_range(0..5_000)),
        loss: *[0.0, 0.001].choose(random).expect("some"),
        ..RelayConfig::default()
    };
    let targets = targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket);
    let relay = Relay::spawn(config, &targets).expect("a relay");
    let ticket = relay.redirect(&ticket).expect("the same ticket").to_string();
    let report = guest.path("report.json");
    let rounds = random.random_range(1..=3).to_string();
    let arguments = ["--mode", mode, "--rounds", &rounds, "--report", &report];
    let mut source = guest.migrate(&ticket, &arguments);
    std::thread::sleep(Duration::from_millis(random.random_range(0..2_500)));
    let what = random.random_range(0..4);
    match what {
        0 => source.signal(Signal::SIGINT),
        1..=3 => {
            // Too short to be noticed, or long enough for the link to be given up.
            let lasts = *[200, 2_500].choose(random).expect("some");
            match what {
                1 => relay.blackhole(true),
                2 => relay.cut(Way::ToTarget, true),
                _ => relay.cut(Way::ToClient, true),
            }
            std::thread::sleep(Duration::from_millis(lasts));
            relay.blackhole(false);
            relay.cut(Way::ToTarget, false);
            relay.cut(Way::ToClient, false);
        }
        _ => {}
    }
    let ended = source.wait_code_within(MIGRATION);
    match ended {
        Some(0) => {
            let report = read_report(&report);
            // The destination's part may not have come, if the link was cut at the very end.
            let twice = report["pages"]["placed_twice"].as_u64().unwrap_or(0);
            assert_eq!(twice, 0, "seed {seed}: {report:#}");
            assert_eq!(receiver.report()["verified"], true, "seed {seed}: {report:#}");
            guest.has_left();
            "there"
        }
        // Or interrupted before it had begun.
        Some(3) | None if ended.is_some() || what == 0 => {
            guest.runs_on();
            // Nobody may have come there yet. One that is in doubt would not end by this.
            receiver.process.signal(Signal::SIGINT);
            assert_ne!(receiver.process.wait(SOON).code, Some(0), "seed {seed}: it is at both");
            guest.migrates_to(Receiver::start());
            "here"
        }
        other => {
            let report = std::fs::read_to_string(&report).unwrap_or_default();
            panic!("seed {seed}: the fault server ended with {other:?}: {report}");
        }
    }
}

#[test]
fn whatever_cuts_or_calls_off_a_migration_that_copies_its_guest_is_whole_somewhere() {
    let first =
        number("POSTCOPY_RANDOM_CUTS_SEED").unwrap_or_else(|| rand::random_range(0..1 << 40));
    let mut ends = BTreeMap::<_, u64>::new();
    for seed in first..first + number("POSTCOPY_RANDOM_CUTS").unwrap_or(MIGRATIONS) {
        println!("POSTCOPY_RANDOM_CUTS_SEED={seed}");
        *ends.entry(migrates(seed)).or_default() += 1;
    }
    println!("{ends:?}");
}
