//! What one migration is to suffer: which guest, over which link, and what fails when. All
//! of it is drawn from a seed, before anything runs.

use super::moments::{self, Moment};
use postcopy::transport::relay::Way;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::fmt;
use std::time::Duration;

/// A phase of a migration, as `docs/failures.md` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    Handshake,
    Blackout,
    Doubt,
    Brownout,
    Release,
    Paused,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Handshake, Self::Blackout, Self::Doubt, Self::Brownout, Self::Release, Self::Paused];

    /// Its name in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::Blackout => "blackout",
            Self::Doubt => "commit in doubt",
            Self::Brownout => "target brownout",
            Self::Release => "release",
            Self::Paused => "paused",
        }
    }

    /// Whether the guest is the source's for sure.
    pub fn is_before_the_commit(self) -> bool {
        matches!(self, Self::Handshake | Self::Blackout)
    }
}

/// A process of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    FaultServer,
    Vmm,
    Keeper,
    Destination,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Failure {
    /// SIGKILL.
    Kill(Who),
    /// SIGSTOP, and SIGCONT so much later.
    Stop(Who, Duration),
    /// Nothing passes the link for so long.
    Cut(Duration),
    /// The same in one direction.
    HalfOpen(Way, Duration),
    /// The same on one lane, by its number.
    Lane(usize, Duration),
    /// The source's host has another address.
    Rebind,
}

impl Failure {
    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill(Who::FaultServer) => "kill fault server",
            Self::Kill(Who::Vmm) => "kill VMM",
            Self::Kill(Who::Keeper) => "kill keeper",
            Self::Kill(Who::Destination) => "kill destination",
            Self::Stop(Who::FaultServer, _) => "stop fault server",
            Self::Stop(Who::Vmm, _) => "stop VMM",
            Self::Stop(Who::Keeper, _) => "stop keeper",
            Self::Stop(Who::Destination, _) => "stop destination",
            Self::Cut(_) => "cut link",
            Self::HalfOpen(Way::ToTarget, _) => "half-open link, to destination",
            Self::HalfOpen(Way::ToClient, _) => "half-open link, to source",
            Self::Lane(0, _) => "cut urgent lane",
            Self::Lane(..) => "cut a push lane",
            Self::Rebind => "source's address",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::Stop(_, time) | Self::Cut(time) | Self::HalfOpen(_, time) => {
                write!(f, " {} ms", time.as_millis())
            }
            Self::Lane(lane, time) => write!(f, " {lane} {} ms", time.as_millis()),
            Self::Kill(_) | Self::Rebind => Ok(()),
        }
    }
}

/// A failure at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Hit {
    /// The phase that it is meant for.
    pub phase: Phase,
    pub moment: Moment,
    pub failure: Failure,
}

/// One migration.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub kvm: bool,
    pub mebibytes: u64,
    pub zero_percent: u64,
    pub guest: Vec<String>,
    pub push_lanes: usize,
    pub backing: &'static str,
    pub policy: &'static str,
    pub megabits: u64,
    pub rtt: Duration,
    pub loss: f64,
    /// In the order of the phases.
    pub hits: Vec<Hit>,
    /// Whether its keeper is to start a fault server again, or somebody else.
    pub supervised: bool,
    /// How long that somebody does not miss one that was killed.
    pub restart_after: Duration,
}

impl Plan {
    /// The migration of `seed`, at the `attempt`-th drawing, whose first hit is meant for
    /// `phase`. Guests are virtual machines as often as processes, if there is `kvm`.
    pub fn draw(seed: u64, attempt: u64, phase: Phase, kvm: bool) -> Self {
        let mut random = StdRng::seed_from_u64(seed.wrapping_mul(64).wrapping_add(attempt));
        let random = &mut random;
        let kvm = kvm && random.random_bool(0.5);
        let mebibytes = *[16, 16, 16, 24, 32, 32, 48, 64, 128, 256].choose(random).expect("some");
        let mut zero_percent = *[0, 0, 10, 40].choose(random).expect("some");
        if mebibytes >= 128 {
            // Large guests are there for their size; the link's time is better spent on others.
            zero_percent = 70;
        }
        let guest = draw_guest(random, seed, kvm, mebibytes, zero_percent);
        let push_lanes = random.random_range(1..=3);
        let bits = mebibytes * (100 - zero_percent) / 100 * 8_389;
        // So that all of it takes from half a second to two and a half.
        let megabits = bits / random.random_range(500..=2500);
        let mut hits = vec![draw_hit(random, phase, push_lanes)];
        if random.random_bool(0.35) {
            let later = *Phase::ALL.choose(random).expect("some");
            let second = draw_hit(random, later, push_lanes);
            if goes_with(&hits[0], &second) {
                hits.push(second);
            }
        }
        hits.sort_by_key(|hit| hit.moment.rank(hit.phase));
        Self {
            seed,
            kvm,
            mebibytes,
            zero_percent,
            guest,
            push_lanes,
            backing: ["memfd-continue", "memfd-copy", "anonymous"].choose(random).expect("some"),
            policy: ["bubbling", "bubbling", "linear", "demand-only"].choose(random).expect("some"),
            megabits: megabits.max(20),
            rtt: Duration::from_micros(*[0, 300, 2_000, 10_000, 30_000].choose(random).expect("")),
            loss: *[0.0, 0.0, 0.001, 0.01].choose(random).expect("some"),
            hits,
            supervised: random.random_bool(0.8),
            restart_after: Duration::from_millis(random.random_range(0..600)),
        }
    }

    /// Whether this process is to be killed.
    pub fn kills(&self, who: Who) -> bool {
        self.hits.iter().any(|hit| hit.failure == Failure::Kill(who))
    }

    /// Pages that have a content to be sent.
    pub fn pages_with_content(&self) -> u64 {
        (self.mebibytes << 20 >> 12) * (100 - self.zero_percent) / 100
    }
}

fn draw_guest(
    random: &mut StdRng,
    seed: u64,
    kvm: bool,
    mebibytes: u64,
    zero_percent: u64,
) -> Vec<String> {
    let workloads = [
        "sequential",
        "strided",
        "random",
        "zipf",
        "hot-set-with-scan",
        "pointer-chase",
        "read-modify-write",
    ];
    let mut guest: Vec<String> = [
        ("--guest", if kvm { "kvm" } else { "process" }.to_owned()),
        ("--memory", format!("{mebibytes}M")),
        ("--vcpus", random.random_range(1..=2).to_string()),
        ("--workload", workloads.choose(random).expect("some").to_string()),
        ("--seed", seed.to_string()),
        // Not so busy that several of them keep each other from their core.
        ("--think-ns", random.random_range(20_000..=200_000).to_string()),
        ("--zero", zero_percent.to_string()),
    ]
    .into_iter()
    .flat_map(|(name, value)| [name.to_owned(), value])
    .collect();
    if kvm && random.random_bool(0.3) {
        guest.extend(["--page-tables", "4k"].map(str::to_owned));
    }
    guest
}

fn draw_hit(random: &mut StdRng, phase: Phase, push_lanes: usize) -> Hit {
    loop {
        let failure = draw_failure(random, push_lanes);
        if let Some(moment) = moments::draw(random, phase, failure) {
            return Hit { phase, moment, failure };
        }
    }
}

fn draw_failure(random: &mut StdRng, push_lanes: usize) -> Failure {
    let who =
        *[Who::FaultServer, Who::Vmm, Who::Keeper, Who::Destination].choose(random).expect("some");
    // Too short to be noticed, or long enough for the link to be given up.
    let milliseconds = match random.random_bool(0.5) {
        true => random.random_range(2..=600),
        false => random.random_range(1_700..=3_500),
    };
    let time = Duration::from_millis(milliseconds);
    let way = *[Way::ToTarget, Way::ToClient].choose(random).expect("some");
    match random.random_range(0..12) {
        0..=4 => Failure::Kill(who),
        5..=6 => Failure::Stop(who, time),
        7..=8 => Failure::Cut(time),
        9 => Failure::HalfOpen(way, time),
        10 => Failure::Lane(random.random_range(0..=push_lanes), time),
        _ => Failure::Rebind,
    }
}

/// Whether a guest outlives both. What two failures may cost is said in `docs/failures.md`;
/// what they must not cost is tested here.
fn goes_with(one: &Hit, other: &Hit) -> bool {
    let kills =
        |who| [one, other].into_iter().filter(|hit| hit.failure == Failure::Kill(who)).count();
    let source = kills(Who::FaultServer).min(1) + kills(Who::Keeper).min(1);
    // One who waits at a point is not to be held there by a failure that comes before it.
    let same_phase = one.phase == other.phase;
    // The commit may be made to a destination that has just died: the VMM has the guest then.
    let both_ends = kills(Who::Destination) > 0 && kills(Who::Vmm) > 0;
    source < 2 && kills(Who::Vmm) < 2 && kills(Who::Keeper) < 2 && !both_ends && !same_phase
}
