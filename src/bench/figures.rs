//! The figures of a run: each with its name, its unit, and how it follows from the report and
//! from the floors of the same round.
//!
//! What a way of moving does not have is absent: rounds, where nothing is copied in rounds, and
//! rates of the target brownout, where all memory was there before it.

use super::cell::Cell;
use super::floors::{Floor, Floors};
use crate::proto::switchover;
use crate::report::schema::{Distribution, Mode, Report};
use std::collections::BTreeMap;

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nanoseconds.
    Nanos,
    /// Microseconds.
    Micros,
    /// Pieces.
    Count,
    /// Pieces a second.
    PerSecond,
    /// Bits a second.
    BitsPerSecond,
    /// Bytes.
    Bytes,
    /// A part of a whole, from 0 to 1.
    Share,
    /// A multiple, of a floor for instance.
    Times,
}

impl Unit {
    /// Its name in the JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nanos => "ns",
            Self::Micros => "us",
            Self::Count => "count",
            Self::PerSecond => "1/s",
            Self::BitsPerSecond => "bit/s",
            Self::Bytes => "bytes",
            Self::Share => "share",
            Self::Times => "times",
        }
    }
}

/// A figure.
pub struct Figure {
    /// Its name in the JSON.
    pub name: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// What it is.
    pub what: &'static str,
    of: fn(&Source<'_>) -> Option<f64>,
}

/// What figures are made of.
struct Source<'a> {
    report: &'a Report,
    floors: Option<&'a Floors>,
    cell: &'a Cell,
}

/// All figures, in the order in which they are shown.
pub const FIGURES: &[Figure] = &[
    Figure {
        name: "stall_p50_ns",
        unit: Unit::Nanos,
        what: "the guest's stalls by its own clock, median: steps slower than a native fault",
        of: |s| s.stall(|of| of.p50),
    },
    Figure {
        name: "stall_p99_ns",
        unit: Unit::Nanos,
        what: "the guest's stalls, 99 in 100 are not longer",
        of: |s| s.stall(|of| of.p99),
    },
    Figure {
        name: "stall_max_ns",
        unit: Unit::Nanos,
        what: "the guest's longest stall",
        of: |s| s.stall(|of| of.max),
    },
    Figure {
        name: "fault_p50_ns",
        unit: Unit::Nanos,
        what: "network faults and late hits, from reading the fault until the page is placed, median",
        of: |s| s.fault(|of| of.p50),
    },
    Figure {
        name: "fault_p99_ns",
        unit: Unit::Nanos,
        what: "network faults and late hits, 99 in 100 are not longer",
        of: |s| s.fault(|of| of.p99),
    },
    Figure {
        name: "faults",
        unit: Unit::Count,
        what: "network faults and late hits",
        of: |s| s.faults(),
    },
    Figure {
        name: "faults_per_second",
        unit: Unit::PerSecond,
        what: "network faults and late hits in a second of the target brownout",
        of: |s| Some(s.faults()? / s.following_seconds()?),
    },
    Figure {
        name: "late_hit_share",
        unit: Unit::Share,
        what: "late hits among network faults and late hits",
        of: |s| {
            s.faults()
                .filter(|all| *all > 0.0)
                .and_then(|all| Some(number(s.report.late_hits)? / all))
        },
    },
    Figure {
        name: "total_us",
        unit: Unit::Micros,
        what: "from the request until both sides agree that it is done",
        of: |s| number(s.report.total_us),
    },
    Figure {
        name: "handshake_us",
        unit: Unit::Micros,
        what: "the phase until both sides agree on what is moved",
        of: |s| number(s.report.phases_us.handshake),
    },
    Figure {
        name: "source_brownout_us",
        unit: Unit::Micros,
        what: "the phase until the pause",
        of: |s| number(s.report.phases_us.source_brownout),
    },
    Figure {
        name: "target_brownout_us",
        unit: Unit::Micros,
        what: "the phase in which the guest runs at the destination, its memory incomplete",
        of: |s| number(s.report.phases_us.target_brownout),
    },
    Figure {
        name: "downtime_us",
        unit: Unit::Micros,
        what: "vCPUs paused on the source until the first one runs on the destination",
        of: |s| number(s.report.downtime_us),
    },
    Figure {
        name: "guest_max_gap_us",
        unit: Unit::Micros,
        what: "the largest gap that the guest's own clock saw around the switchover",
        of: |s| number(s.report.guest_max_gap_us),
    },
    Figure {
        name: "blocktime_us",
        unit: Unit::Micros,
        what: "the standstill of all vCPUs together, as the destination saw it",
        of: |s| number(s.report.blocktime_us.as_ref().map(|of| of.total)),
    },
    Figure {
        name: "copy_rounds",
        unit: Unit::Count,
        what: "rounds of copying before the guest moved",
        of: |s| s.rounds(),
    },
    Figure {
        name: "precopied_share",
        unit: Unit::Share,
        what: "pages whose last content was at the destination before the guest was, among all",
        of: |s| Some(number(s.report.pages.precopied)? / s.total()?),
    },
    Figure {
        name: "copied_to_memory",
        unit: Unit::Times,
        what: "pages copied before the guest came, each as often as it was, as a multiple of all",
        of: |s| Some(s.copied()? / s.total()?),
    },
    Figure {
        name: "sent_to_memory",
        unit: Unit::Times,
        what: "pages sent before and after it came, each as often as it was, as a multiple of all",
        of: |s| Some(s.sent()? / s.total()?),
    },
    Figure {
        name: "pages_per_second",
        unit: Unit::PerSecond,
        what: "pages with content that followed the guest, and all that were copied, in a second of \
               the target brownout, or from the source brownout on if any were copied",
        of: |s| Some(s.pages()? / s.moving_seconds()?),
    },
    Figure {
        name: "wire_bits_per_second",
        unit: Unit::BitsPerSecond,
        what: "UDP payload to the destination in a second of the same time as pages_per_second",
        of: |s| s.wire_rate(),
    },
    Figure {
        name: "wire_bytes_to_destination",
        unit: Unit::Bytes,
        what: "UDP payload to the destination",
        of: |s| number(s.report.wire_bytes.to_destination),
    },
    Figure {
        name: "wire_bytes_to_source",
        unit: Unit::Bytes,
        what: "UDP payload to the source",
        of: |s| number(s.report.wire_bytes.to_source),
    },
    Figure {
        name: "cpu_source_us",
        unit: Unit::Micros,
        what: "processor time of the fault server",
        of: |s| number(s.report.cpu_us.source),
    },
    Figure {
        name: "cpu_destination_us",
        unit: Unit::Micros,
        what: "processor time of the destination, its guest included",
        of: |s| number(s.report.cpu_us.destination),
    },
    Figure {
        name: "peak_rss_source_bytes",
        unit: Unit::Bytes,
        what: "the fault server's memory, guest memory included",
        of: |s| number(s.report.peak_rss_bytes.source),
    },
    Figure {
        name: "peak_rss_destination_bytes",
        unit: Unit::Bytes,
        what: "the destination's memory, guest memory included",
        of: |s| number(s.report.peak_rss_bytes.destination),
    },
    Figure {
        name: "guest_steps_in_brownout",
        unit: Unit::Count,
        what: "what the guest got done until its memory was complete",
        of: |s| number(s.report.guest_steps.during_target_brownout),
    },
    Figure {
        name: "guest_steady_per_second",
        unit: Unit::PerSecond,
        what: "steps of the guest in a second, undisturbed",
        of: |s| number(s.report.guest_steps.steady_per_second),
    },
    Figure {
        name: "us_to_90_percent",
        unit: Unit::Micros,
        what: "until the guest made nine tenths of its steady rate again",
        of: |s| number(s.report.guest_steps.us_to_90_percent),
    },
    Figure {
        name: "stall_p50_to_tcp_fault",
        unit: Unit::Times,
        what: "stall_p50_ns by the median of the floor tcp-fault; over loopback only",
        of: |s| Some(s.stall(|of| of.p50)? / s.floor(Floor::TcpFault)?.p50),
    },
    Figure {
        name: "stall_p99_to_tcp_fault",
        unit: Unit::Times,
        what: "stall_p99_ns by 99 % of the floor tcp-fault; over loopback only",
        of: |s| Some(s.stall(|of| of.p99)? / s.floor(Floor::TcpFault)?.p99?),
    },
    Figure {
        name: "fault_p50_to_tcp_fault",
        unit: Unit::Times,
        what: "fault_p50_ns by the median of the floor tcp-fault; over loopback only",
        of: |s| Some(s.fault(|of| of.p50)? / s.floor(Floor::TcpFault)?.p50),
    },
    Figure {
        name: "rate_to_udp",
        unit: Unit::Share,
        what: "wire_bits_per_second by the median of the floor udp; over loopback only",
        of: |s| Some(s.wire_rate()? / s.floor(Floor::Udp)?.p50),
    },
    Figure {
        name: "rate_to_link",
        unit: Unit::Share,
        what: "wire_bits_per_second by the emulated link's bandwidth",
        of: |s| Some(s.wire_rate()? / s.cell.link.bandwidth_bps? as f64),
    },
];

/// The figure of this name.
pub fn figure(name: &str) -> Option<&'static Figure> {
    FIGURES.iter().find(|figure| figure.name == name)
}

/// All figures of a run, by name; what was not measured is absent.
pub fn of_run(report: &Report, cell: &Cell, floors: Option<&Floors>) -> BTreeMap<String, f64> {
    let source = Source { report, floors, cell };
    let found = FIGURES.iter().filter_map(|figure| {
        let value = (figure.of)(&source).filter(|value| value.is_finite())?;
        Some((figure.name.to_owned(), value))
    });
    found.collect()
}

impl Source<'_> {
    fn stall(&self, of: fn(&Distribution) -> Option<u64>) -> Option<f64> {
        number(self.report.guest_stall_ns.as_ref().and_then(of))
    }

    fn fault(&self, of: fn(&Distribution) -> Option<u64>) -> Option<f64> {
        number(self.report.fault_latency_ns.as_ref().and_then(of))
    }

    fn faults(&self) -> Option<f64> {
        Some(number(self.report.network_faults)? + number(self.report.late_hits)?)
    }

    /// How long the guest ran at the destination while its memory came.
    fn following_seconds(&self) -> Option<f64> {
        let follows = matches!(self.report.mode, Mode::PostCopy | Mode::Hybrid);
        number(self.report.phases_us.target_brownout.filter(|_| follows)).and_then(seconds)
    }

    /// How long memory was on its way: what was copied before went in all phases.
    fn moving_seconds(&self) -> Option<f64> {
        let phases = &self.report.phases_us;
        let target = number(phases.target_brownout)?;
        seconds(match &self.report.switchover {
            None => target,
            Some(_) => number(phases.source_brownout)? + number(phases.blackout)? + target,
        })
    }

    /// Whether there are rounds is a matter of what was asked for.
    fn rounds(&self) -> Option<f64> {
        let switchover = self.report.switchover.as_ref()?;
        let in_rounds = self.cell.mode != switchover::Mode::StopAndCopy;
        in_rounds.then_some(switchover.rounds.len() as f64)
    }

    fn total(&self) -> Option<f64> {
        number(self.report.pages.total).filter(|all| *all > 0.0)
    }

    fn copied(&self) -> Option<f64> {
        self.report.switchover.as_ref().map(|of| of.copied as f64)
    }

    /// Pages that came while memory moved: those with content that followed the guest, and those
    /// that were copied before, be they zero or not.
    fn pages(&self) -> Option<f64> {
        let pages = &self.report.pages;
        let followed = number(pages.demanded)? + number(pages.pushed)? + number(pages.drained)?;
        Some(followed + self.copied().unwrap_or(0.0))
    }

    /// All pages that were sent.
    fn sent(&self) -> Option<f64> {
        let again = number(self.report.pages.resent_after_link_loss).unwrap_or(0.0);
        Some(self.pages()? + number(self.report.pages.seeded)? + again)
    }

    fn wire_rate(&self) -> Option<f64> {
        Some(8.0 * number(self.report.wire_bytes.to_destination)? / self.moving_seconds()?)
    }

    /// A floor, for what crossed the same device: an emulated link has its own.
    fn floor(&self, floor: Floor) -> Option<Measures> {
        let measured = self.floors.filter(|_| self.cell.link.is_loopback())?.get(floor)?;
        Some(Measures { p50: measured.p50, p99: measured.p99 })
    }
}

struct Measures {
    p50: f64,
    p99: Option<f64>,
}

fn number(value: Option<u64>) -> Option<f64> {
    value.map(|value| value as f64)
}

fn seconds(us: f64) -> Option<f64> {
    Some(us / 1e6).filter(|s| *s > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan::tests::plan;
    use crate::bench::results::tests::{report, report_of};
    use switchover::Mode as Asked;

    fn figures(asked: Asked, report: &Report) -> BTreeMap<String, f64> {
        of_run(report, &Cell { mode: asked, ..plan().cells[0].clone() }, None)
    }

    #[test]
    fn what_was_copied_before_is_beside_what_followed() {
        let of = figures(Asked::Hybrid, &report_of(Mode::Hybrid));
        assert_eq!(of["copy_rounds"], 2.0);
        // 1,536 and 512 pages in the rounds, 1,024 of 2,048 still so at the end, the others after.
        let shares =
            ["precopied_share", "copied_to_memory", "sent_to_memory"].map(|of_it| of[of_it]);
        assert_eq!(shares, [0.5, 1.0, 1.5]);
        // 48.5 ms in the source brownout, 1.5 ms in the blackout, 50 ms in the target brownout.
        assert_eq!(of["pages_per_second"], (2048.0 + 1016.0) / 0.1);
        assert_eq!(of["wire_bits_per_second"], 8.0 * 8_500_000.0 / 0.1);
        assert_eq!((of["faults"], of["faults_per_second"]), (100.0, 2000.0));
    }

    #[test]
    fn what_a_mode_does_not_have_is_absent() {
        let follows = figures(Asked::PostCopy, &report(0));
        for absent in ["copy_rounds", "precopied_share", "copied_to_memory"] {
            assert_eq!(follows.get(absent), None, "{absent}");
        }
        assert_eq!((follows["sent_to_memory"], follows["pages_per_second"]), (1.0, 40_800.0));

        let stopped = figures(Asked::StopAndCopy, &report_of(Mode::StopAndCopy));
        for absent in ["copy_rounds", "faults_per_second", "late_hit_share"] {
            assert_eq!(stopped.get(absent), None, "{absent}");
        }
        assert_eq!((stopped["precopied_share"], stopped["copied_to_memory"]), (1.0, 1.0));
        // It was counted, and there was none.
        assert_eq!((stopped["faults"], stopped["blocktime_us"]), (0.0, 0.0));

        // What was asked for may have moved in another way: then there was a round.
        let auto = figures(Asked::Auto, &report_of(Mode::PreCopy));
        assert_eq!((auto["copy_rounds"], auto.get("faults_per_second")), (2.0, None));
    }
}
