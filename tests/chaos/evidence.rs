//! What proves that a failure struck in its phase: the log of failpoints, which the
//! processes write themselves, with the host's monotonic clock, when they pass from one
//! phase to the next.
//!
//! Nothing here knows what was planned.

use super::plan::Phase;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A phase begins when one of these is passed. The commit decides between two of them, so
/// the time from before the commit word to after it is in neither.
const BEGIN: [(Phase, &[&str]); 5] = [
    (Phase::Handshake, &["destination::after_urgent_accepted", "source::after_urgent_connected"]),
    (Phase::Blackout, &["source::before_pause"]),
    (Phase::Doubt, &["source::after_commit_word"]),
    (Phase::Brownout, &["source::before_release"]),
    (Phase::Release, &["destination::before_unregistered"]),
];
/// What ends the blackout, whatever comes of it.
const COMMITTING: &str = "source::before_commit_word";
/// The migration is taken back: what comes after one of these is in no phase of it.
const TAKEN_BACK: [&str; 5] = [
    "source::before_resume",
    "vmm::before_abort_word",
    "keeper::before_abort_word",
    "source::before_abort_sent",
    "destination::before_abort_sent",
];
/// The guest is started at the destination.
pub const ENTERS: &str = "vmm::before_enter";

/// The destination has heard a proposal.
pub const PREPARES: &str = "vmm::before_prepare";

/// All points that are to be passed with a note and nothing else.
pub fn stamps() -> impl Iterator<Item = &'static str> {
    let begin = BEGIN.iter().flat_map(|(_, points)| points.iter().copied());
    begin.chain([COMMITTING, ENTERS, PREPARES]).chain(TAKEN_BACK)
}

/// A time on the host's monotonic clock, in nanoseconds.
pub type Ns = u64;

/// A point that was passed, or at which a process was stopped or held up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    pub at: Ns,
    pub pid: i32,
    pub point: String,
    pub action: String,
}

/// The log of failpoints of one migration.
#[derive(Clone, Debug)]
pub struct PointLog(PathBuf);

impl PointLog {
    /// The log at `path`, which need not be there yet.
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Everything in it.
    pub fn read(&self) -> Vec<Passed> {
        let text = std::fs::read_to_string(&self.0).unwrap_or_default();
        // A line that is being written has no end yet.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| parse(line).unwrap_or_else(|| panic!("{line:?}"))).collect()
    }

    /// The line of this point, if it was passed.
    pub fn of(&self, point: &str) -> Option<Passed> {
        // What was disarmed has no time.
        self.read().into_iter().find(|passed| passed.point == point && passed.at > 0)
    }

    /// Has all `points` that were not passed yet do nothing any more.
    pub fn disarm<'a>(&self, points: impl Iterator<Item = &'a str>) {
        let lines: String = points.map(|point| format!("0 0 {point} disarmed\n")).collect();
        let file = OpenOptions::new().append(true).create(true).open(&self.0);
        file.and_then(|mut file| file.write_all(lines.as_bytes())).expect("our own log");
    }
}

fn parse(line: &str) -> Option<Passed> {
    let mut words = line.splitn(4, ' ');
    let at = words.next()?.parse().ok()?;
    let pid = words.next()?.parse().ok()?;
    let (point, action) = (words.next()?.to_owned(), words.next()?.to_owned());
    Some(Passed { at, pid, point, action })
}

/// The phase in which everything from `from` to `to` happened, by the whole log of the
/// migration; or what the log says instead.
pub fn phase_of(log: &[Passed], from: Ns, to: Ns) -> Result<Phase, String> {
    let passed = |point: &str| {
        log.iter().filter(|line| line.at > 0 && line.point == point).map(|line| line.at).min()
    };
    let first = |points: &[&str]| points.iter().filter_map(|point| passed(point)).min();
    let ends = |phase: Phase| -> Option<Ns> {
        let later = BEGIN.iter().filter(|(other, _)| *other > phase);
        let next = later.filter_map(|(_, points)| first(points)).min();
        let committing = passed(COMMITTING).filter(|_| phase.is_before_the_commit());
        [next, committing, first(&TAKEN_BACK)].into_iter().flatten().min()
    };
    for (phase, points) in BEGIN.iter().rev() {
        let Some(begin) = first(points) else { continue };
        if begin > from {
            continue;
        }
        return match ends(*phase) {
            Some(end) if to >= end => {
                let late = (to - end) / 1000;
                Err(format!("it was over {late} us after {} had ended", phase.name()))
            }
            _ => Ok(*phase),
        };
    }
    Err("it struck before the first connection".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(text: &str) -> Vec<Passed> {
        text.lines().map(|line| parse(line).expect("a line")).collect()
    }

    #[test]
    fn a_strike_is_in_a_phase_only_as_a_whole() {
        let whole = "100 1 source::after_urgent_connected delay 0\n\
                     200 1 source::before_pause delay 0\n\
                     300 1 source::before_commit_word delay 0\n\
                     310 1 source::after_commit_word stall\n\
                     400 1 source::before_release delay 0\n\
                     500 2 destination::before_unregistered delay 0";
        let whole = log(whole);
        assert!(phase_of(&whole, 50, 60).is_err());
        assert_eq!(phase_of(&whole, 100, 199), Ok(Phase::Handshake));
        assert!(phase_of(&whole, 199, 200).is_err());
        assert_eq!(phase_of(&whole, 200, 299), Ok(Phase::Blackout));
        for between in [(299, 300), (301, 305), (305, 315)] {
            assert!(phase_of(&whole, between.0, between.1).is_err(), "{between:?}");
        }
        assert_eq!(phase_of(&whole, 310, 399), Ok(Phase::Doubt));
        assert_eq!(phase_of(&whole, 400, 499), Ok(Phase::Brownout));
        assert_eq!(phase_of(&whole, 500, 9999), Ok(Phase::Release));
    }

    #[test]
    fn what_is_taken_back_is_in_no_phase_and_what_was_disarmed_was_not_passed() {
        let aborted = log("100 1 source::after_urgent_connected delay 0\n\
                           200 1 source::before_pause delay 0\n\
                           0 0 source::after_commit_word disarmed\n\
                           250 3 vmm::before_abort_word delay 0");
        assert_eq!(phase_of(&aborted, 210, 249), Ok(Phase::Blackout));
        assert!(phase_of(&aborted, 240, 260).is_err());
        assert!(phase_of(&aborted, 270, 280).is_err());
    }
}
