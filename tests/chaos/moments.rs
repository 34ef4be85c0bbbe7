//! Moments: when a failure strikes, and at which points of the code a phase can be caught.
//!
//! A blackout lasts about a millisecond, so nobody hits one by chance. A process is stopped
//! at a point inside the phase (a failpoint), the failure strikes, and the process goes on; or
//! a step is made slow there, and the failure strikes somewhere in the middle of it.

use super::plan::{Failure, Phase, Who};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use std::fmt;
use std::time::Duration;

/// When a failure strikes.
#[derive(Clone, Copy, Debug)]
pub enum Moment {
    /// While a process stands still at this point.
    At(&'static str),
    /// So long after a thread began to wait at this point, for so long in all.
    Within(&'static str, Duration, Duration),
    /// So long after the migration was asked for.
    After(Duration),
    /// When so many percent of what is to be sent have left the source's host.
    Share(u64),
    /// When the link has been cut, after so many percent, and a side has noticed.
    LinkLost(u64),
}

impl Moment {
    /// What comes first has the lower rank.
    pub fn rank(&self, phase: Phase) -> u64 {
        let share = match self {
            Self::Share(percent) | Self::LinkLost(percent) => *percent,
            Self::At(_) | Self::Within(..) | Self::After(_) => 0,
        };
        let phase = match phase {
            Phase::Paused => Phase::Brownout,
            other => other,
        };
        phase as u64 * 1000 + share
    }

    /// The failpoint that it needs, and what is to happen there.
    pub fn failpoint(&self) -> Option<(&'static str, String)> {
        match self {
            Self::At(point) => Some((point, "stall".to_owned())),
            Self::Within(point, _, time) => Some((point, format!("delay {}", time.as_millis()))),
            Self::After(_) | Self::Share(_) | Self::LinkLost(_) => None,
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(point) => write!(f, "at {point}"),
            Self::Within(point, after, of) => {
                write!(f, "{} of {} ms into {point}", after.as_millis(), of.as_millis())
            }
            Self::After(time) => write!(f, "{} ms after the start", time.as_millis()),
            Self::Share(percent) => write!(f, "at {percent} %"),
            Self::LinkLost(percent) => write!(f, "link cut at {percent} % and lost"),
        }
    }
}

const HANDSHAKE: &[&str] = &[
    "source::after_urgent_connected",
    "source::before_push_connected",
    "source::after_push_connected",
    "source::before_hello_sent",
    "source::after_hello_sent",
    "destination::after_first_message",
    "destination::after_push_accepted",
    "vmm::before_prepare",
    "vmm::after_prepare",
    "destination::before_accept_sent",
    "destination::after_accept_sent",
];

/// Up to the destination's word that it is ready. (While the source is held after the state has
/// left it, the destination may say it all the same, and die: then the commit is made to nobody.)
const BLACKOUT: &[&str] = &[
    "vmm::before_pause",
    "vmm::after_pause",
    "vmm::after_capture",
    "vmm::before_paused_sent",
    "vmm::after_paused_sent",
    "source::after_pause",
    "source::before_state_sent",
    "source::after_state_sent",
    "vmm::before_restore",
    "vmm::after_restore",
    "destination::before_ready_sent",
];

/// With the VMM held here, the fault server makes the commit.
const GOES_ON_WITHOUT_VMM: &str = "vmm::after_paused_sent";

const READY: &[&str] = &["destination::after_ready_sent", "source::before_commit_word"];

const DOUBT: &[&str] = &[
    "source::after_commit_word",
    "source::before_commit_sent",
    "source::after_commit_sent",
    "vmm::before_enter",
    "vmm::after_enter",
    "destination::before_running_sent",
];

/// Points at which the VMM is there for sure.
const BROWNOUT_WITH_VMM: &[&str] = &["vmm::before_released_sent"];

const RELEASE: &[&str] = &[
    "destination::before_unregistered",
    "destination::before_drained_sent",
    "destination::after_drained_sent",
    "source::before_keeper_released",
    "source::after_keeper_released",
    "source::before_released_sent",
    "source::after_released_sent",
    "keeper::before_released_sent",
    "keeper::after_released_sent",
    "destination::before_report_sent",
];

/// Steps that can be slow without holding up the rest of their process.
const fn slow_steps(phase: Phase) -> &'static [&'static str] {
    match phase {
        Phase::Handshake => &["vmm::before_prepare", "vmm::after_prepare"],
        Phase::Blackout => &["vmm::after_pause", "vmm::after_capture", "vmm::before_restore"],
        Phase::Doubt => &["source::after_commit_word", "vmm::before_enter"],
        Phase::Release => &["keeper::before_released_sent", "source::before_keeper_released"],
        Phase::Brownout | Phase::Paused => &[],
    }
}

/// A moment in `phase` at which `failure` can strike, if there is one.
pub fn draw(random: &mut StdRng, phase: Phase, failure: Failure) -> Option<Moment> {
    if !may_strike(phase, failure) {
        return None;
    }
    let share = random.random_range(5..=85);
    match phase {
        Phase::Paused => return Some(Moment::LinkLost(share)),
        Phase::Brownout if !needs_vmm(failure) => return Some(Moment::Share(share)),
        _ => {}
    }
    // It takes the guest with it if that runs there meanwhile: it dies while somebody is held
    // whom the guest's start waits for.
    let kills_destination = failure == Failure::Kill(Who::Destination);
    if phase == Phase::Handshake && !kills_destination && random.random_bool(0.1) {
        return Some(Moment::After(Duration::from_millis(random.random_range(0..60))));
    }
    let slow = slow_steps(phase);
    if !slow.is_empty() && !kills_destination && random.random_bool(0.25) {
        let point = slow.choose(random)?;
        let time = random.random_range(60..=300);
        let into = random.random_range(5..=time - 30);
        return Some(Moment::Within(
            point,
            Duration::from_millis(into),
            Duration::from_millis(time),
        ));
    }
    let points: Vec<&'static str> = match phase {
        Phase::Handshake => HANDSHAKE.to_vec(),
        Phase::Blackout if kills_destination => BLACKOUT.to_vec(),
        Phase::Blackout => [BLACKOUT, READY].concat(),
        Phase::Doubt => DOUBT.to_vec(),
        Phase::Brownout => BROWNOUT_WITH_VMM.to_vec(),
        Phase::Release => RELEASE.to_vec(),
        Phase::Paused => Vec::new(),
    };
    let usable = points.into_iter().filter(|point| {
        let goes_on = kills_destination && *point == GOES_ON_WITHOUT_VMM;
        !goes_on && !is_gone(point, failure)
    });
    let usable: Vec<_> = usable.collect();
    usable.choose(random).copied().map(Moment::At)
}

fn needs_vmm(failure: Failure) -> bool {
    matches!(failure, Failure::Kill(Who::Vmm) | Failure::Stop(Who::Vmm, _))
}

/// What is a failure that a guest must outlive, or a migration at least must end after.
fn may_strike(phase: Phase, failure: Failure) -> bool {
    match failure {
        // Before the commit the guest is where its VMM is, after it where the destination is:
        // it is lost with that, by design.
        Failure::Kill(Who::Vmm) => matches!(phase, Phase::Doubt | Phase::Brownout),
        Failure::Kill(Who::Destination) => phase.is_before_the_commit(),
        Failure::Stop(Who::Vmm, _) => !matches!(phase, Phase::Release | Phase::Paused),
        // The link is down already, wholly; but it may come back in one direction only.
        Failure::Cut(_) | Failure::Lane(..) => phase != Phase::Paused,
        Failure::Kill(_) | Failure::Stop(..) | Failure::HalfOpen(..) | Failure::Rebind => true,
    }
}

/// Whether who is to be struck has gone by then.
fn is_gone(point: &str, failure: Failure) -> bool {
    let keeper = matches!(failure, Failure::Kill(Who::Keeper) | Failure::Stop(Who::Keeper, _));
    let has_left = [
        "source::after_keeper_released",
        "source::before_released_sent",
        "source::after_released_sent",
        "keeper::after_released_sent",
        "destination::before_report_sent",
    ];
    keeper && has_left.contains(&point)
}
