//! `postcopy demo --cut`: the emulated link goes down and comes back, and what that cost is
//! printed from the stamps of all who saw it.

use postcopy::program::units::parse_time;
use postcopy::report::schema::{Outage, OutageTimes, Report};
use postcopy::transport::relay::Relay;
use std::fmt::Write;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// When the link goes down, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// After the guest left the source.
    after: Duration,
    lasts: Duration,
}

impl FromStr for Cut {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (after, lasts) =
            text.split_once(':').ok_or_else(|| format!("{text:?} is not AFTER:FOR, as 2s:5s"))?;
        Ok(Self { after: parse_time(after)?, lasts: parse_time(lasts)? })
    }
}

/// A cut that was made: moments of `CLOCK_MONOTONIC`, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    down_us: u64,
    back_us: u64,
}

/// Makes the cuts, counted from now.
pub fn make(relay: &Arc<Relay>, cuts: &[Cut]) -> anyhow::Result<Vec<Made>> {
    let began = Instant::now();
    let mut made = Vec::new();
    for cut in cuts {
        std::thread::sleep(cut.after.saturating_sub(began.elapsed()));
        let down_us = monotonic_us()?;
        relay.blackhole(true);
        std::thread::sleep(cut.lasts);
        let back_us = monotonic_us()?;
        relay.blackhole(false);
        made.push(Made { down_us, back_us });
    }
    Ok(made)
}

fn monotonic_us() -> anyhow::Result<u64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(Duration::from(now).as_micros() as u64)
}

/// What became of each cut, a paragraph each. All processes of a demonstration share the
/// clock, so the two sides' moments can be set against the link's own.
pub fn render(made: &[Made], report: &Report, bandwidth_bps: Option<u64>) -> String {
    let mut text = String::new();
    for (number, cut) in (1..).zip(made) {
        let seconds = (cut.back_us - cut.down_us) as f64 / 1e6;
        let _ = writeln!(text, "cut {number}: the link was down for {seconds:.3} s");
        let during = |outage: &&Outage| {
            lost_at(outage).is_some_and(|at| at >= cut.down_us)
                && outage.destination.as_ref().and_then(|side| side.up_at_us) >= Some(cut.back_us)
        };
        let Some(outage) = report.outages.iter().find(during) else {
            let _ =
                writeln!(text, "  nobody lost a link by it: it came too late, or was too short");
            continue;
        };
        render_outage(&mut text, cut, outage, report, bandwidth_bps);
    }
    text
}

fn render_outage(
    text: &mut String,
    cut: &Made,
    outage: &Outage,
    report: &Report,
    bandwidth_bps: Option<u64>,
) {
    let ms = |from: u64, to: Option<u64>| match to {
        Some(to) => format!("{:.1} ms", (to as f64 - from as f64) / 1000.0),
        None => "unknown".to_owned(),
    };
    let source = outage.source.clone().unwrap_or_default();
    let there = outage.destination.clone().unwrap_or_default();
    let noticed = [&source, &there].map(|side: &OutageTimes| ms(cut.down_us, side.lost_at_us));
    let up = [&source, &there].map(|side| ms(cut.back_us, side.up_at_us));
    let paused = there.lost_at_us.map_or(0, |lost| there.up_at_us.unwrap_or(lost) - lost);
    let _ = writeln!(
        text,
        "  noticed after {} at the source, {} at the destination: {}",
        noticed[0],
        noticed[1],
        outage.why.as_deref().unwrap_or("no reason known"),
    );
    let _ = writeln!(
        text,
        "  paused for {:.3} s; {} attempts to connect",
        paused as f64 / 1e6,
        outage.attempts.unwrap_or_default()
    );
    let _ = writeln!(
        text,
        "  from the link's return: up at the destination {}, at the source {}, first page placed {}",
        up[1],
        up[0],
        ms(cut.back_us, there.first_placed_at_us),
    );
    let again = outage.resent_pages.unwrap_or_default() * report.guest.page_size;
    let _ = write!(text, "  sent again: {} pages, {again} bytes", outage.resent_pages.unwrap_or(0));
    if let (Some(bps), Some(rtt_us)) = (bandwidth_bps, report.link.rtt_us) {
        let lanes = 1 + u64::from(report.link.push_lanes.unwrap_or(1));
        let bytes = bps / 8 * (rtt_us + 1000) / 1_000_000;
        let _ = write!(
            text,
            "; a bandwidth-delay product (round trip {rtt_us} us) and a millisecond of the rate \
             are {bytes} bytes a lane, of which there are {lanes}"
        );
    }
    text.push('\n');
}

fn lost_at(outage: &Outage) -> Option<u64> {
    let of = |side: &Option<OutageTimes>| side.as_ref().and_then(|side| side.lost_at_us);
    of(&outage.source).into_iter().chain(of(&outage.destination)).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_is_a_time_and_a_time() {
        let cut = Cut { after: Duration::from_secs(2), lasts: Duration::from_millis(500) };
        assert_eq!("2s:500ms".parse(), Ok(cut));
        for wrong in ["", "2s", "2s:", ":5s", "2s:5s:1s", "2:5"] {
            assert!(wrong.parse::<Cut>().is_err(), "{wrong}");
        }
    }
}
