//! [`render`]: the report as text for a person, in 80 columns.
//!
//! It shows what is in the report and what is wrong with it; what was not measured
//! does not appear. Text in a report may come from elsewhere, so control characters
//! are replaced before it can reach a terminal.

use super::schema::{CompressionSwitch, Distribution, Outcome, Report, Side};
use indicatif::{HumanBytes, HumanCount};

/// Columns of a line.
const WIDTH: usize = 80;
/// The most times that compression was turned on or off that are shown.
const SWITCHES_SHOWN: usize = 4;
/// Columns of the labels.
const INDENT: usize = 17;

/// The report as lines of text, each with a line feed.
pub fn render(report: &Report) -> String {
    let mut page = Paper::default();
    headline(report, &mut page);
    page.gap();
    downtime(report, &mut page);
    page.gap();
    pages(report, &mut page);
    page.gap();
    faults(report, &mut page);
    page.gap();
    huge_pages(report, &mut page);
    page.gap();
    cost(report, &mut page);
    compression(report, &mut page);
    page.gap();
    verdict(report, &mut page);
    page.text
}

fn headline(report: &Report, page: &mut Paper) {
    let outcome = match report.outcome {
        Outcome::Completed => "completed",
        Outcome::Aborted => "aborted: no guest was given away",
        Outcome::Recovered => "completed after a loss on the way",
        Outcome::Lost => "lost: the guest runs nowhere",
    };
    page.row("Migration", [outcome.to_owned()]);
    page.words("Reason", report.reason.as_deref());
    let policy = report.policy.as_deref().map(|policy| format!("policy {}", clean(policy)));
    page.row("Mode", [Some(report.mode.to_string()), policy].into_iter().flatten());
    if let Some(switchover) = &report.switchover {
        for (number, round) in (1..).zip(&switchover.rounds) {
            let left = format!("{} left", HumanCount(round.stale));
            let sent = format!("{} pages in {}", HumanCount(round.sent), micros(round.took_us));
            page.row(&format!("  round {number}"), [sent, left, clean(&round.why)]);
        }
    }
    let guest = &report.guest;
    let vcpus = if guest.vcpus == 1 { "vCPU" } else { "vCPUs" };
    page.row(
        "Guest",
        [
            Some(clean(&guest.kind)),
            Some(HumanBytes(guest.memory_bytes).to_string()),
            Some(format!("{} {vcpus}", guest.vcpus)),
            guest.workload.as_deref().map(clean),
            Some(format!("on {}", clean(&guest.backing))),
        ]
        .into_iter()
        .flatten(),
    );
    let link = &report.link;
    page.row(
        "Link",
        [
            Some(if link.encrypted { "encrypted" } else { "not encrypted" }.to_owned()),
            link.rtt_us.map(|rtt| format!("round trip {}", micros(rtt))),
            link.mtu.map(|mtu| format!("datagrams of {mtu} bytes")),
            link.push_lanes.map(|lanes| format!("push lanes {lanes}")),
            link.bandwidth_limit_bps.map(|bps| format!("limited to {}", bit_rate(bps as f64))),
            link.epochs.filter(|&epochs| epochs > 1).map(|n| format!("lost {} times", n - 1)),
        ]
        .into_iter()
        .flatten(),
    );
    if report.side == Side::Destination {
        page.row("Measured by", ["the destination alone".to_owned()]);
    }
}

fn downtime(report: &Report, page: &mut Paper) {
    let downtime = report.downtime_us.map(|downtime| match report.downtime_error_us {
        Some(error) => format!("{} +- {}", micros(downtime), micros(error)),
        None => micros(downtime),
    });
    page.row("Downtime", downtime);
    let parts = &report.downtime_parts_us;
    page.row(
        "  made of",
        named([
            ("pause", parts.pause),
            ("capture", parts.capture),
            ("transfer", parts.transfer),
            ("restore", parts.restore),
            ("resume", parts.resume),
        ]),
    );
    page.row(
        "  guest's clock",
        report.guest_max_gap_us.map(|gap| format!("largest gap between two steps {}", micros(gap))),
    );
    let phases = &report.phases_us;
    page.row(
        "Phases",
        named([
            ("handshake", phases.handshake),
            ("source brownout", phases.source_brownout),
            ("blackout", phases.blackout),
            ("target brownout", phases.target_brownout),
        ]),
    );
    page.row("Total time", report.total_us.map(micros));
}

fn pages(report: &Report, page: &mut Paper) {
    let pages = &report.pages;
    let total = pages.total;
    page.row("Pages", total.map(|count| format!("{:>14}", HumanCount(count).to_string())));
    for (label, count) in [
        ("  zero", pages.zero),
        ("  holes", pages.hole),
        ("  lost", pages.poisoned.filter(|count| *count > 0)),
        ("  pre-copied", pages.precopied),
        ("  seeded", pages.seeded),
        ("  demanded", pages.demanded),
        ("  pushed", pages.pushed),
        ("  drained", pages.drained),
    ] {
        page.row(
            label,
            count.map(|count| {
                let share = total.filter(|&total| total > 0);
                let share =
                    share.map(|total| format!("{:7.2} %", count as f64 * 100.0 / total as f64));
                format!("{:>14}{}", HumanCount(count).to_string(), share.unwrap_or_default())
            }),
        );
    }
    page.row(
        "  more than once",
        [
            pages.sent_twice.map(|count| format!("sent {}", HumanCount(count))),
            pages.placed_twice.map(|count| format!("placed {}", HumanCount(count))),
            pages
                .resent_after_link_loss
                .map(|count| format!("sent again after a lost link {}", HumanCount(count))),
        ]
        .into_iter()
        .flatten(),
    );
}

fn faults(report: &Report, page: &mut Paper) {
    page.row(
        "Faults",
        [
            ("network", report.network_faults),
            ("late hits", report.late_hits),
            ("local", report.local_faults),
            ("raised by no vCPU", report.unattributed_faults),
        ]
        .into_iter()
        .filter_map(|(name, count)| Some(format!("{name} {}", HumanCount(count?)))),
    );
    page.row("  latency", distribution(report.fault_latency_ns.as_ref()));
    let hops = &report.fault_hops_ns;
    page.row(
        "  hops, median",
        [
            ("asked for after", &hops.ask),
            ("answered", &hops.answer),
            ("of that at the source", &hops.serve),
            ("placed", &hops.place),
        ]
        .into_iter()
        .filter_map(|(name, hop)| {
            Some(format!("{name} {}", nanos(u128::from(hop.as_ref()?.p50?))))
        }),
    );
    if let Some(blocktime) = &report.blocktime_us {
        let per_vcpu = blocktime.per_vcpu.iter().enumerate();
        let vcpus = per_vcpu.map(|(vcpu, &time)| format!("vCPU {vcpu} {}", micros(time)));
        let total = format!("{} in all", micros(blocktime.total));
        page.row("Blocktime", std::iter::once(total).chain(vcpus));
    }
    page.row("Guest's stalls", distribution(report.guest_stall_ns.as_ref()));
    let steps = &report.guest_steps;
    page.row(
        "Guest's steps",
        [
            steps.steady_per_second.map(|rate| format!("steady {}/s", HumanCount(rate))),
            steps
                .during_target_brownout
                .map(|count| format!("{} during the target brownout", HumanCount(count))),
            steps.us_to_90_percent.map(|time| format!("90 % of steady after {}", micros(time))),
        ]
        .into_iter()
        .flatten(),
    );
}

fn huge_pages(report: &Report, page: &mut Paper) {
    let Some(huge) = &report.huge_pages else { return };
    let blocks = |count: u64, what: &str| format!("{what} {}", HumanCount(count));
    page.row(
        "Huge pages",
        [
            Some(format!("{} of {} blocks", HumanCount(huge.collapsed), HumanCount(huge.blocks))),
            (huge.refused > 0).then(|| blocks(huge.refused, "refused")),
            (huge.failed > 0).then(|| blocks(huge.failed, "failed")),
            huge.us_to_90_percent.map(|time| format!("90 % after {}", micros(time))),
            Some(format!("all tried after {}", micros(huge.total_us))),
            huge.cpu_us.map(|time| format!("processor time {}", micros(time))),
        ]
        .into_iter()
        .flatten(),
    );
    page.row("  a block", distribution(Some(&huge.call_ns)));
    page.row("  guest's stalls", distribution(huge.guest_stall_ns.as_ref()));
}

fn cost(report: &Report, page: &mut Paper) {
    let wire = &report.wire_bytes;
    let bytes =
        |name: &str, bytes: Option<u64>| bytes.map(|bytes| format!("{name} {}", HumanBytes(bytes)));
    page.row(
        "On the wire",
        [
            bytes("to destination", wire.to_destination),
            bytes("to source", wire.to_source),
            bytes("in the switchover", report.switchover_bytes),
        ]
        .into_iter()
        .flatten(),
    );
    let rate = wire.to_destination.zip(report.total_us.filter(|&total| total > 0));
    page.row(
        "Rate",
        rate.map(|(bytes, total)| {
            format!("{} over the total time", bit_rate(bytes as f64 * 8e6 / total as f64))
        }),
    );
    let (cpu, rss) = (&report.cpu_us, &report.peak_rss_bytes);
    page.row("Processor time", named([("source", cpu.source), ("destination", cpu.destination)]));
    page.row(
        "Peak memory",
        [bytes("source", rss.source), bytes("destination", rss.destination)].into_iter().flatten(),
    );
}

fn compression(report: &Report, page: &mut Paper) {
    let Some(of) = &report.compression else { return };
    let count =
        |count: u64, what: &str| (count > 0).then(|| format!("{} {what}", HumanCount(count)));
    let frames = of.frames > 0;
    let shrunk = || {
        let [before, after] = [of.bytes_before, of.bytes_after].map(HumanBytes);
        format!("{} pages from {before} to {after}", HumanCount(of.pages))
    };
    page.row(
        "Compression",
        [
            Some(clean(&of.mode)),
            Some(if frames { shrunk() } else { "no page compressed".to_owned() }),
            count(of.unshrunk_frames, "frames did not become smaller"),
            (of.cpu_us > 0).then(|| format!("processor time {}", micros(of.cpu_us))),
            count(of.probes, "probes"),
        ]
        .into_iter()
        .flatten(),
    );
    let switch = |switch: &CompressionSwitch| {
        let (on, why) = (if switch.on { "on" } else { "off" }, clean(&switch.why));
        format!("{on} after {}: {why}", micros(switch.at_us))
    };
    page.row("  turned", of.switches.iter().take(SWITCHES_SHOWN).map(switch));
    page.row("  in the end", of.why.as_deref().map(clean));
}

fn verdict(report: &Report, page: &mut Paper) {
    let verified = match report.verified {
        Some(true) => "yes: every page is as an independent model has it",
        Some(false) => "NO: the guest's memory is not what it should be",
        None => "not looked at",
    };
    page.row("Verified", [verified.to_owned()]);
    for problem in report.check() {
        page.words("Wrong", Some(&problem));
    }
}

/// Text that grows by rows of a label and items, wrapped between items.
#[derive(Default)]
struct Paper {
    text: String,
}

impl Paper {
    /// A row, if there is an item.
    fn row(&mut self, label: &str, items: impl IntoIterator<Item = String>) {
        self.wrap(label, items, ", ");
    }

    /// A row of running text, if there is any.
    fn words(&mut self, label: &str, text: Option<&str>) {
        let words = text
            .into_iter()
            .flat_map(|text| text.split_whitespace().map(clean).collect::<Vec<_>>());
        self.wrap(label, words, " ");
    }

    fn gap(&mut self) {
        if !self.text.is_empty() && !self.text.ends_with("\n\n") {
            self.text.push('\n');
        }
    }

    fn wrap(&mut self, label: &str, items: impl IntoIterator<Item = String>, separator: &str) {
        let mut line = format!("{label:<INDENT$}");
        let mut empty = true;
        for item in items {
            let width = line.chars().count() + separator.len() + item.chars().count();
            if !empty && width + separator.trim_end().len() > WIDTH {
                line.push_str(separator.trim_end());
                self.end(&line);
                line = " ".repeat(INDENT);
            } else if !empty {
                line.push_str(separator);
            }
            line.push_str(&item);
            empty = false;
        }
        if !empty {
            self.end(&line);
        }
    }

    fn end(&mut self, line: &str) {
        self.text.push_str(line.trim_end());
        self.text.push('\n');
    }
}

fn named<const N: usize>(times: [(&str, Option<u64>); N]) -> impl Iterator<Item = String> {
    times
        .map(|(name, time)| time.map(|time| format!("{name} {}", micros(time))))
        .into_iter()
        .flatten()
}

fn distribution(figures: Option<&Distribution>) -> Vec<String> {
    let Some(figures) = figures else { return Vec::new() };
    let quantiles = [
        ("mean", figures.mean),
        ("50 %", figures.p50),
        ("90 %", figures.p90),
        ("99 %", figures.p99),
        ("99.9 %", figures.p999),
        ("max", figures.max),
    ];
    let quantiles = quantiles
        .into_iter()
        .filter_map(|(name, time)| Some(format!("{name} {}", nanos(u128::from(time?)))));
    std::iter::once(format!("{} times", HumanCount(figures.count))).chain(quantiles).collect()
}

fn micros(micros: u64) -> String {
    nanos(u128::from(micros) * 1000)
}

/// A time with three digits that count.
fn nanos(nanos: u128) -> String {
    let (value, unit) = match nanos {
        0 => return "0".to_owned(),
        1..1_000 => return format!("{nanos} ns"),
        1_000..999_500 => (nanos as f64 / 1e3, "us"),
        999_500..999_500_000 => (nanos as f64 / 1e6, "ms"),
        999_500_000..119_500_000_000 => (nanos as f64 / 1e9, "s"),
        _ => {
            let seconds = (nanos + 500_000_000) / 1_000_000_000;
            return format!("{} min {:02} s", seconds / 60, seconds % 60);
        }
    };
    format!("{} {unit}", three_digits(value))
}

fn bit_rate(bits_per_second: f64) -> String {
    let (value, unit) = match bits_per_second {
        ..999.5e3 => (bits_per_second / 1e3, "kbit/s"),
        ..999.5e6 => (bits_per_second / 1e6, "Mbit/s"),
        _ => (bits_per_second / 1e9, "Gbit/s"),
    };
    format!("{} {unit}", three_digits(value))
}

fn three_digits(value: f64) -> String {
    match value {
        ..9.995 => format!("{value:.2}"),
        ..99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
