//! Status lines: how a migration stands, one line a second and one at each change of
//! phase, as text or as JSON; and a last line that says how it ended.

use clap::ValueEnum;
use postcopy::engine::event::Pause;
use postcopy::report::schema::Report;
use postcopy::{Event, Phase, Progress};
use std::io::Write;
use std::time::Duration;

/// Lines come no closer together than this, unless the phase changes.
const INTERVAL: Duration = Duration::from_secs(1);

/// What a line is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people and logs.
    Text,
    /// One JSON object a line.
    Json,
}

/// The status of one migration.
#[derive(Debug)]
pub struct Status {
    format: Format,
    last: Option<(Phase, Duration)>,
    why_paused: String,
}

impl Status {
    /// Nothing said yet.
    pub fn new(format: Format) -> Self {
        Self { format, last: None, why_paused: String::new() }
    }

    /// Prints a line if it is time to.
    pub fn update(&mut self, event: Event) {
        if let Some(line) = self.event(event) {
            print(&line);
        }
    }

    fn event(&mut self, event: Event) -> Option<String> {
        match event {
            Event::Progress(now) => self.line(now),
            Event::Paused { why } => {
                self.why_paused = why;
                None
            }
            _ => None,
        }
    }

    fn line(&mut self, now: Progress) -> Option<String> {
        let phase = now.phase;
        let due = self
            .last
            .is_none_or(|(last, at)| last != phase || now.elapsed.saturating_sub(at) >= INTERVAL);
        if !due {
            return None;
        }
        self.last = Some((phase, now.elapsed));
        Some(match self.format {
            Format::Text => format!(
                "{:.1} s {phase}{}: {} of {} pages, {} network faults, {} MiB of pages",
                now.elapsed.as_secs_f64(),
                now.paused.map(|pause| self.pause(now.elapsed, pause)).unwrap_or_default(),
                now.settled,
                now.pages,
                now.network_faults,
                now.wire_bytes >> 20,
            ),
            Format::Json => {
                let mut line = serde_json::json!({
                    "elapsed_us": now.elapsed.as_micros() as u64,
                    "phase": phase.name(),
                    "pages_settled": now.settled,
                    "pages_total": now.pages,
                    "network_faults": now.network_faults,
                    "page_bytes": now.wire_bytes,
                });
                if let Some(pause) = now.paused {
                    line["paused"] = serde_json::json!({
                        "since_us": now.elapsed.saturating_sub(pause.lasts).as_micros() as u64,
                        "attempts": pause.attempts,
                        "why": self.why_paused,
                    });
                }
                line.to_string()
            }
        })
    }

    /// Since when, why, and that it is not over.
    fn pause(&self, elapsed: Duration, pause: Pause) -> String {
        let since = elapsed.saturating_sub(pause.lasts).as_secs_f64();
        let (why, attempts) = (&self.why_paused, pause.attempts);
        format!(
            " since {since:.1} s, the link was lost ({why}), connecting again, attempt {attempts}"
        )
    }
}

/// Prints how the migration ended.
pub fn end(format: Format, report: &Report) {
    print(&end_line(format, report));
}

fn end_line(format: Format, report: &Report) -> String {
    let outcome = serde_json::to_value(report.outcome).unwrap_or_default();
    match format {
        Format::Text => {
            let outcome = outcome.as_str().unwrap_or("over");
            let why = report.reason.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
            let downtime = report
                .downtime_us
                .map(|us| format!(", downtime {:.1} ms", us as f64 / 1000.0))
                .unwrap_or_default();
            format!("{outcome}{why}{downtime}")
        }
        Format::Json => serde_json::json!({
            "outcome": outcome,
            "reason": report.reason,
            "downtime_us": report.downtime_us,
            "total_us": report.total_us,
        })
        .to_string(),
    }
}

fn print(line: &str) {
    // A reader that went away must not end a migration. One that has only stopped holds up
    // nothing but this thread, whose work is to print.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64, phase: Phase) -> Progress {
        Progress {
            phase,
            settled: 3,
            pages: 4,
            network_faults: 2,
            wire_bytes: 5 << 20,
            elapsed: Duration::from_millis(millis),
            paused: None,
        }
    }

    #[test]
    fn a_pause_says_since_when_and_why_and_that_it_is_not_over() {
        let pause = Pause { lasts: Duration::from_millis(1500), attempts: 4 };
        let now = Progress { paused: Some(pause), ..at(4000, Phase::Paused) };
        let lost = Event::Paused { why: "cut".into() };
        let mut text = Status::new(Format::Text);
        assert_eq!(text.event(lost.clone()), None);
        let line = text.event(Event::Progress(now)).unwrap();
        let told =
            "4.0 s paused since 2.5 s, the link was lost (cut), connecting again, attempt 4: 3 of";
        assert!(line.starts_with(told), "{line}");
        let mut json = Status::new(Format::Json);
        json.event(lost);
        let line = json.event(Event::Progress(now)).unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["phase"], "paused");
        let paused = serde_json::json!({"since_us": 2_500_000, "attempts": 4, "why": "cut"});
        assert_eq!(value["paused"], paused);
    }

    #[test]
    fn a_line_comes_each_second_and_at_each_change_of_phase() {
        let mut status = Status::new(Format::Text);
        assert!(status.line(at(0, Phase::Handshake)).is_some());
        assert!(status.line(at(10, Phase::Handshake)).is_none());
        assert!(status.line(at(20, Phase::Blackout)).is_some());
        assert!(status.line(at(1019, Phase::Blackout)).is_none());
        assert!(status.line(at(1020, Phase::Blackout)).is_some());
        let line = status.line(at(2500, Phase::TargetBrownout)).unwrap();
        let expected = "2.5 s target brownout: 3 of 4 pages, 2 network faults, 5 MiB of pages";
        assert_eq!(line, expected);
    }

    #[test]
    fn a_json_line_is_an_object_with_units_in_its_names() {
        let line = Status::new(Format::Json).line(at(2500, Phase::TargetBrownout)).unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        let expected = serde_json::json!({
            "elapsed_us": 2_500_000, "phase": "target brownout", "pages_settled": 3,
            "pages_total": 4, "network_faults": 2, "page_bytes": 5 << 20,
        });
        assert_eq!(value, expected);
    }
}
