//! Tests of the report as a whole: both parts merged, checked, written and shown.

use super::human::render;
use super::merge::*;
use super::schema::*;

fn heading() -> Heading {
    Heading {
        outcome: Outcome::Completed,
        reason: None,
        mode: Mode::PostCopy,
        policy: Some("bubbling".to_owned()),
        guest: Guest {
            kind: "kvm".to_owned(),
            memory_bytes: 1 << 30,
            page_size: 4096,
            vcpus: 2,
            backing: "memfd".to_owned(),
            workload: Some("random".to_owned()),
            was_paused: None,
        },
        link: Link {
            encrypted: true,
            push_lanes: Some(2),
            rtt_us: Some(201),
            mtu: Some(1452),
            bandwidth_limit_bps: None,
            epochs: Some(1),
        },
        switchover: None,
    }
}

fn source() -> SourcePart {
    SourcePart {
        handshake_us: Some(2_140),
        source_brownout_us: Some(310),
        pause_us: Some(180),
        capture_us: Some(420),
        until_running_heard_us: Some(1_990),
        switchover_bytes: Some(151_552),
        total_us: Some(1_834_221),
        pages: Pages {
            total: Some(262_144),
            zero: Some(20_000),
            hole: Some(42_144),
            poisoned: Some(0),
            seeded: Some(24),
            demanded: Some(1_076),
            pushed: Some(198_900),
            drained: Some(0),
            precopied: None,
            resent_after_link_loss: Some(0),
            sent_twice: Some(0),
            placed_twice: None,
        },
        steady_per_second: Some(812_044),
        wire_bytes: WireBytes { to_destination: Some(846_003_112), to_source: Some(9_120_441) },
        outages: Vec::new(),
        serve_ns: Some(hop(11_200)),
        compression: Some(Compression {
            mode: "auto".to_owned(),
            pages: 150_016,
            frames: 2_344,
            bytes_before: 614_465_536,
            bytes_after: 201_300_112,
            unshrunk_frames: 12,
            cpu_us: 820_400,
            probes: 9,
            probes_cpu_us: 2_970,
            why: Some("it saves more time than it takes".to_owned()),
            switched: 1,
            switches: vec![CompressionSwitch {
                at_us: 291_400,
                on: true,
                why: "it saves more time than it takes".to_owned(),
                shrunk_to_percent: Some(33),
                page_cpu_ns: Some(5_412),
                link_bytes_per_second: Some(118_411_200),
            }],
        }),
        cpu_us: Some(1_220_110),
        peak_rss_bytes: Some(1_092_616_192),
    }
}

fn hop(nanos: u64) -> Distribution {
    Distribution {
        count: 1_080,
        mean: Some(nanos + 70),
        p50: Some(nanos),
        p90: Some(2 * nanos),
        p99: Some(3 * nanos),
        p999: Some(4 * nanos),
        max: Some(5 * nanos),
    }
}

fn destination() -> DestinationPart {
    DestinationPart {
        restore_us: Some(710),
        resume_us: Some(95),
        target_brownout_us: Some(1_829_400),
        pages: Pages {
            total: Some(262_144),
            zero: Some(20_000),
            hole: Some(42_144),
            placed_twice: Some(0),
            ..Pages::default()
        },
        network_faults: Some(1_080),
        pages_a_fault: None,
        late_hits: Some(311),
        unattributed_faults: Some(3),
        local_faults: Some(140),
        fault_latency_ns: Some(Distribution {
            count: 1_391,
            mean: Some(402_113),
            p50: Some(361_215),
            p90: Some(611_327),
            p99: Some(1_204_223),
            p999: Some(2_910_207),
            max: Some(3_001_871),
        }),
        fault_hops_ns: FaultHops {
            ask: Some(hop(9_100)),
            answer: Some(hop(348_000)),
            serve: None,
            place: Some(hop(4_115)),
        },
        blocktime_us: Some(Blocktime { total: 559_340, per_vcpu: vec![281_200, 278_140] }),
        guest_max_gap_us: Some(2_440),
        guest_stall_ns: Some(Distribution {
            count: 1_388,
            mean: Some(419_000),
            p50: Some(376_832),
            p99: Some(1_310_720),
            max: Some(3_100_000),
            ..Distribution::default()
        }),
        epochs: Some(1),
        outages: Vec::new(),
        guest_steps: GuestSteps {
            during_target_brownout: Some(1_101_220),
            steady_per_second: None,
            us_to_90_percent: Some(911_000),
        },
        wire_bytes: WireBytes::default(),
        cpu_us: Some(1_904_551),
        peak_rss_bytes: Some(1_110_441_984),
        verified: Some(true),
    }
}

fn whole() -> Report {
    Report::merge(heading(), source(), Some(destination()))
}

#[test]
fn the_json_of_a_whole_report() {
    insta::assert_snapshot!(whole().to_json());
}

#[test]
fn a_whole_report_for_a_person() {
    insta::assert_snapshot!(render(&whole()));
}

fn huge_pages() -> HugePages {
    let call_ns = Distribution { count: 520, max: Some(9_100_000), ..Distribution::default() };
    HugePages {
        blocks: 512,
        collapsed: 510,
        refused: 2,
        failed: 0,
        us_to_90_percent: Some(4_410_000),
        total_us: 4_900_000,
        call_ns,
        guest_stall_ns: None,
        cpu_us: Some(2_600_000),
    }
}

#[test]
fn huge_pages_for_a_person() {
    let mut report = whole();
    report.huge_pages = Some(huge_pages());
    assert_eq!(report.check(), [""; 0]);
    let text = render(&report);
    let rows: Vec<&str> = text.lines().skip_while(|row| !row.starts_with("Huge")).collect();
    assert_eq!(
        rows[..3],
        [
            "Huge pages       510 of 512 blocks, refused 2, 90 % after 4.41 s,",
            "                 all tried after 4.90 s, processor time 2.60 s",
            "  a block        520 times, max 9.10 ms",
        ]
    );
}

#[test]
fn an_aborted_one_for_a_person_says_why_and_hides_control_characters() {
    let reason = "the destination refused the layout: region 1 starts at 0x100000000 there and \
                  at 0xc0000000 here\u{1b}[2J";
    let heading =
        Heading { outcome: Outcome::Aborted, reason: Some(reason.to_owned()), ..heading() };
    let source = SourcePart { handshake_us: Some(1500), ..SourcePart::default() };
    let report = Report::merge(heading, source, None);
    assert_eq!(report.check(), Vec::<String>::new());
    insta::assert_snapshot!(render(&report));
}

#[test]
fn the_downtime_is_read_from_one_clock_and_its_parts_make_it_up() {
    let report = whole();
    assert_eq!(report.downtime_us, Some(1_990 - 100));
    assert_eq!(report.downtime_error_us, Some(100));
    assert_eq!(report.downtime_parts_us.transfer, Some(1_890 - 180 - 420 - 710 - 95));
    assert_eq!(report.check(), Vec::<String>::new());

    let mut without = source();
    without.until_running_heard_us = None;
    let report = Report::merge(heading(), without, Some(destination()));
    assert_eq!((report.downtime_us, report.downtime_error_us), (None, None));
    assert_eq!(report.downtime_parts_us.transfer, None);
    assert_eq!(report.check(), ["downtime_us is absent"]);
}

#[test]
fn what_was_not_measured_is_absent_and_what_is_null_is_the_reason_only() {
    let report = Report::merge(heading(), SourcePart::default(), None);
    let json: serde_json::Value = serde_json::from_str(&report.to_json()).unwrap();
    assert!(json["pages"].as_object().unwrap().is_empty());
    assert!(json["downtime_parts_us"].as_object().unwrap().is_empty());
    for absent in ["downtime_us", "network_faults", "verified", "blocktime_us", "total_us"] {
        assert!(json.get(absent).is_none(), "{absent}");
    }
    let nulls = json.as_object().unwrap().iter().filter(|(_, value)| value.is_null());
    assert_eq!(nulls.map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["reason"]);
    let json: serde_json::Value = serde_json::from_str(&whole().to_json()).unwrap();
    assert_eq!(json["pages"]["sent_twice"], 0);
    assert_eq!(json["pages"]["placed_twice"], 0);
    assert_eq!(json["pages"]["resent_after_link_loss"], 0);
}

#[test]
fn a_report_is_read_back_as_it_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    whole().write(&path).unwrap();
    let read: Report = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(read, whole());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_link_stays_a_link_and_a_failure_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let (link, file) = (directory.path().join("link"), directory.path().join("file"));
    std::os::unix::fs::symlink(&file, &link).unwrap();
    whole().write(&link).unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink(), "whatever it led to is lost");
    let read: Report = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(read, whole());
    // As a device would: neither replaced nor written beside.
    let folder = directory.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    whole().write(&folder).unwrap_err();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 3);
}

#[test]
fn the_destinations_part_is_bounded_and_parsed() {
    let part = destination();
    assert_eq!(DestinationPart::from_json(&part.to_json()).unwrap(), part);
    let newer = br#"{"network_faults": 3, "figure_of_the_future": {"a": [1]}}"#;
    assert_eq!(DestinationPart::from_json(newer).unwrap().network_faults, Some(3));
    let long = vec![b' '; PART_BYTES_MAX + 1];
    assert!(matches!(DestinationPart::from_json(&long), Err(PartError::TooLong(_))));
    for bad in ["", "[]", "null", "\u{0}"] {
        let parsed = DestinationPart::from_json(bad.as_bytes());
        assert!(matches!(parsed, Err(PartError::NoObject)), "{bad:?}");
    }
    for bad in ["{", "{}x", r#"{"network_faults": -1}"#, r#"{"network_faults": 1.5}"#] {
        let parsed = DestinationPart::from_json(bad.as_bytes());
        assert!(matches!(parsed, Err(PartError::Json(_))), "{bad:?}");
    }
}

/// Each break of an invariant is found, and found alone.
#[test]
fn each_broken_invariant_is_named() {
    type Break = fn(&mut Report);
    let broken: [(&str, Break); 19] = [
        ("schema is", |r| r.schema = "postcopy-report/2".to_owned()),
        ("no reason given", |r| r.outcome = Outcome::Aborted),
        ("bytes of memory", |r| r.guest.memory_bytes += 4096),
        ("blocktime of 1 vCPUs", |r| r.blocktime_us.as_mut().unwrap().per_vcpu = vec![559_340]),
        ("out of order", |r| r.fault_latency_ns.as_mut().unwrap().p90 = Some(1)),
        ("fault_hops_ns.serve are out of order", |r| {
            r.fault_hops_ns.serve.as_mut().unwrap().p99 = Some(1);
        }),
        ("hops of", |r| r.fault_hops_ns.place = None),
        ("out of order", |r| r.guest_stall_ns.as_mut().unwrap().mean = Some(u64::MAX)),
        ("not what it should be", |r| r.verified = Some(false)),
        ("link was lost", |r| r.link.epochs = Some(2)),
        ("sent_twice is 1", |r| r.pages.sent_twice = Some(1)),
        ("placed_twice is absent", |r| r.pages.placed_twice = None),
        ("resent_after_link_loss is 9", |r| r.pages.resent_after_link_loss = Some(9)),
        ("parts of the downtime", |r| r.downtime_parts_us.pause = Some(181)),
        ("not the downtime", |r| r.phases_us.blackout = None),
        ("poisoned + precopied is 262145, not 262144", |r| r.pages.zero = Some(20_001)),
        ("a count of pages is absent", |r| r.pages.drained = None),
        ("1391 fault latencies for 1390", |r| r.late_hits = Some(310)),
        ("more unattributed", |r| r.unattributed_faults = Some(1_532)),
    ];
    for (expected, break_it) in broken {
        let mut report = whole();
        break_it(&mut report);
        let wrong = report.check();
        assert!(matches!(&wrong[..], [only] if only.contains(expected)), "{expected}: {wrong:?}");
    }
    let mut huge = whole();
    huge.huge_pages = Some(HugePages { failed: 1, ..huge_pages() });
    assert_eq!(huge.check(), ["513 of 512 blocks became huge pages or did not"]);
    let mut many = whole();
    let moved = |count: &mut Option<u64>, by: i64| *count = count.unwrap().checked_add_signed(by);
    moved(&mut many.pages.demanded, 924);
    moved(&mut many.pages.pushed, -924);
    assert_eq!(many.check(), ["more pages were demanded than there were network faults"]);
    many.pages_a_fault = Some(512);
    assert_eq!(many.check(), [""; 0], "each may have asked for a huge page");
    let mut recovered = whole();
    recovered.outcome = Outcome::Recovered;
    recovered.pages.drained = None;
    assert!(recovered.check().iter().any(|wrong| wrong.contains("a count of pages is absent")));
    let alone = Report::merge(heading(), source(), None);
    assert_eq!(alone.check(), [""; 0], "the destination's part may be lost on its way");
    let mut report = whole();
    report.pages.pushed = Some(u64::MAX);
    report.network_faults = Some(u64::MAX);
    report.local_faults = Some(u64::MAX);
    assert_eq!(report.check().len(), 2, "and nothing overflows");
}

#[test]
fn a_person_never_sees_more_than_80_columns() {
    let mut report = whole();
    report.guest.memory_bytes = 16 << 40;
    report.reason = Some("word ".repeat(100));
    report.blocktime_us.as_mut().unwrap().per_vcpu = vec![u64::MAX / 2000; 64];
    report.pages.pushed = Some(1 << 32);
    report.downtime_parts_us = DowntimeParts {
        pause: Some(u64::MAX),
        capture: Some(u64::MAX),
        transfer: Some(u64::MAX),
        restore: Some(u64::MAX),
        resume: Some(u64::MAX),
    };
    for report in [report, whole()] {
        let text = render(&report);
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line:?}");
            assert_eq!(line.trim_end(), line);
        }
        assert!(!text.contains("\n\n\n"));
    }
}
