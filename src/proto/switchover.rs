//! When the guest moves: how much of its memory is copied while it still runs at the source,
//! and what becomes of the rest.
//!
//! Pure policy. It is asked when a migration begins, now and then while a round of pre-copy
//! is sent, and after each one; it is told what was sent, how long that took and what the
//! guest has written meanwhile. Which pages a round sends is not its business: those that
//! are not at the destination as they are, and that were not written since the round began.
//! Those that were are *hot* and left for the next round, or for after the switchover. So a
//! page that a round sends is wasted only if it is written after it was sent: for a guest
//! that writes everywhere alike, at any rate, that is at most 22 % of its memory in a round,
//! the greatest value of `ln(1 + x)/x - 1/(1 + x)`, and what is written between two looks at
//! what is.
//!
//! [`Mode::Auto`] weighs seconds of the guest's time, with `s` the seconds that a page takes on
//! the link, `q` the share of a round's pages that its end finds written again, and `f` the
//! time that a vCPU waits at a page that it misses:
//!
//! * What is left is copied with the guest paused, if that takes no longer than
//!   [`AUTO_STOP`] and the user's limit. It takes the guest less than faults on the same pages.
//! * Another round is run as long as it takes more faults off the guest than it costs: of `r`
//!   pages it settles `r (1 - q)`, each of which is a fault less, and costs a share of the link and
//!   the processors for `r s`, and a trap for each page that is written again.
//! * And as long as what goes over the link in all stays below [`AUTO_SENT`] times the guest's
//!   memory.
//! * Else the guest moves, and what is left follows.
//!
//! A limit on the time that all of it takes ([`SwitchoverConfig::max_total`]) ends the rounds in every
//! mode: pages that follow the guest are sent once.

use std::time::Duration;

/// The longest that the automatic mode pauses the guest for copying, whatever the user allows.
pub const AUTO_STOP: Duration = Duration::from_millis(20);
/// How much the automatic mode sends in all, in guests, as far as a round can be foreseen.
pub const AUTO_SENT: f64 = 2.0;
/// What a pause costs beside the copying: capture, restore, and some round trips.
const FIXED: Duration = Duration::from_millis(5);
/// Rounds after which pre-copy is taken not to come to an end.
const ROUNDS_MAX: u32 = 30;
/// What a round costs the guest meanwhile, as a share of the round's time.
const ROUND_SHARE: f64 = 0.1;
/// What a write to a page costs the guest, the first time in a round: a trap of the hypervisor.
const WRITE_TRAP_S: f64 = 10e-6;
/// What a fault over the network takes beside the round trip.
const FAULT_S: f64 = 100e-6;
/// Pages that a round must have sent before its beginning says something about its end.
const TELLING_PAGES: u64 = 1024;

/// How a guest is moved.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum Mode {
    /// All memory follows the guest.
    #[default]
    PostCopy,
    /// Memory is copied in rounds until what is left can be copied in the pause.
    PreCopy,
    /// Some rounds of copying, and the rest follows the guest.
    Hybrid,
    /// All memory is copied in the pause.
    StopAndCopy,
    /// Whatever costs the guest least, decided by what is measured on the way.
    Auto,
}

impl Mode {
    /// All there are.
    pub const ALL: [Self; 5] =
        [Self::PostCopy, Self::PreCopy, Self::Hybrid, Self::StopAndCopy, Self::Auto];

    /// Its name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PostCopy => "post-copy",
            Self::PreCopy => "pre-copy",
            Self::Hybrid => "hybrid",
            Self::StopAndCopy => "stop-and-copy",
            Self::Auto => "auto",
        }
    }

    /// Whether memory is copied before the guest runs at the destination.
    pub const fn copies(self) -> bool {
        !matches!(self, Self::PostCopy)
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no mode has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no such way to move a guest")]
pub struct UnknownMode;

impl std::str::FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(name: &str) -> Result<Self, UnknownMode> {
        Self::ALL.into_iter().find(|mode| mode.name() == name).ok_or(UnknownMode)
    }
}

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SwitchoverConfig {
    /// How the guest is moved.
    pub mode: Mode,
    /// Rounds of the hybrid mode, 1 to 30.
    pub rounds: u32,
    /// How long the guest may stand still where that can be chosen: in pre-copy, and in auto.
    pub max_downtime: Duration,
    /// How long it may take from the first page until the last, as far as that can be chosen: no
    /// round is begun, or gone on with, that would make it longer. Where memory alone takes longer
    /// than that, so does all of it.
    pub max_total: Option<Duration>,
    /// How fast pages are copied and pushed at most, in bits a second of IP packets. What is sent
    /// to a vCPU that waits is not counted.
    pub max_bandwidth: Option<u64>,
    /// The same once the guest has left, if it is another limit then.
    pub max_postcopy_bandwidth: Option<u64>,
}

impl Default for SwitchoverConfig {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            // The first takes long enough for most of what the guest works on to be written meanwhile.
            rounds: 2,
            max_downtime: Duration::from_millis(300),
            max_total: None,
            max_bandwidth: None,
            max_postcopy_bandwidth: None,
        }
    }
}

impl SwitchoverConfig {
    /// The most rounds of the hybrid mode.
    pub const ROUNDS_MAX: u32 = ROUNDS_MAX;

    /// The limit that holds before the guest has left, and after it.
    pub fn bandwidth(&self, has_left: bool) -> Option<u64> {
        let after = self.max_postcopy_bandwidth.filter(|_| has_left);
        after.or(self.max_bandwidth)
    }

    /// Whether memory is copied before the guest runs at the destination.
    pub fn copies(&self) -> bool {
        self.mode.copies()
    }
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// A round of copying, the guest running.
    Round,
    /// The guest is paused and moves; what is left follows it.
    PostCopy,
    /// The guest is paused, and moves when what is left has been copied.
    StopAndCopy,
    /// There will be no end: the guest stays where it is.
    GiveUp(String),
}

/// A round, or what there is of it so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundSoFar {
    /// Pages that were sent in it.
    pub sent: u64,
    /// Pages that are still to be sent in it.
    pub unsent: u64,
    /// Pages that were written since it began.
    pub written: u64,
    /// Pages that are not at the destination as they are here.
    pub stale: u64,
    /// How long it has gone on.
    pub took: Duration,
    /// The round trip, as far as it is known.
    pub rtt: Duration,
}

/// A round that is over, for the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundEnd {
    /// What there was of it.
    pub round: RoundSoFar,
    /// What came next, and why, in words.
    pub why: String,
}

/// Decides, and remembers why.
#[derive(Clone, Debug)]
pub struct Planner {
    config: SwitchoverConfig,
    pages: u64,
    /// Pages that were stale when the round began.
    before: u64,
    next: Next,
    ordered: bool,
    ended: Vec<RoundEnd>,
    /// Pages written by the first look at a round, and when that was.
    looked: Option<(u64, Duration)>,
    /// Why the round was to be cut short, if it was.
    cut: Option<&'static str>,
}

impl Planner {
    /// For a guest of so many pages.
    pub fn new(config: SwitchoverConfig, pages: u64) -> Self {
        let next = match config.mode {
            Mode::PostCopy => Next::PostCopy,
            Mode::StopAndCopy => Next::StopAndCopy,
            Mode::PreCopy | Mode::Hybrid | Mode::Auto => Next::Round,
        };
        let (ended, looked, cut) = (Vec::new(), None, None);
        Self { config, pages, before: pages, next, ordered: false, ended, looked, cut }
    }

    /// What was asked for.
    pub fn config(&self) -> SwitchoverConfig {
        self.config
    }

    /// The guest may stand still for so long from now on.
    pub fn set_max_downtime(&mut self, most: Duration) {
        self.config.max_downtime = most;
    }

    /// All of it may take so long from now on.
    pub fn set_max_total(&mut self, most: Option<Duration>) {
        self.config.max_total = most;
    }

    /// The operator wants the guest to move now: what is left follows it.
    pub fn move_now(&mut self) {
        self.ordered = true;
    }

    /// Whether it is to move now.
    pub fn is_ordered(&self) -> bool {
        self.ordered
    }

    /// How the guest was moved, as far as that is decided: never [`Mode::Auto`].
    pub fn moved(&self) -> Mode {
        match (self.ended.is_empty(), &self.next) {
            (true, Next::StopAndCopy) => Mode::StopAndCopy,
            (true, _) => Mode::PostCopy,
            (false, Next::PostCopy) => Mode::Hybrid,
            (false, _) => Mode::PreCopy,
        }
    }

    /// The rounds that are over.
    pub fn rounds(&self) -> &[RoundEnd] {
        &self.ended
    }

    /// What comes next, as far as that is decided.
    pub fn next(&self) -> &Next {
        &self.next
    }

    /// Whether a round that goes on is to be cut short: the guest then moves at once. The automatic
    /// mode does so where a round is not worth what it sends, hybrid, too, where there is no time.
    pub fn during(&mut self, round: &RoundSoFar) -> bool {
        let may_cut = matches!(self.config.mode, Mode::Auto | Mode::Hybrid);
        if !may_cut || round.sent < TELLING_PAGES {
            return false;
        }
        let in_all = self.in_all(round, round.stale as f64);
        self.cut = if self.config.max_total.is_some_and(|most| in_all > most) {
            Some("there is no time for more")
        } else if self.config.mode == Mode::Auto && !self.will_pay(round) {
            Some("most would be written again")
        } else {
            None
        };
        self.cut.is_some()
    }

    /// Whether it pays to go on with a round, as far as two looks at it tell.
    fn will_pay(&mut self, round: &RoundSoFar) -> bool {
        let Some((written, at)) = self.looked else {
            self.looked = Some((round.written, round.took));
            return true;
        };
        let s = per_page(round);
        let end = round.took.as_secs_f64() + round.unsent as f64 * s;
        let now = (round.took.as_secs_f64(), round.written as f64);
        let written = extrapolated((at.as_secs_f64(), written as f64), now, end);
        pays(round, self.again(written))
    }

    /// What comes after a round.
    pub fn after(&mut self, round: RoundSoFar) -> Next {
        self.looked = None;
        let cut = self.cut.take();
        let count = self.ended.len() as u32 + 1;
        let s = per_page(&round);
        let copying = Duration::from_secs_f64(round.stale as f64 * s);
        let rest = copying + FIXED + 2 * round.rtt;
        let limit = self.config.max_downtime;
        let (next, why) = match self.config.mode {
            _ if self.ordered => (Next::PostCopy, "the operator wants the guest to move".into()),
            Mode::PostCopy => (Next::PostCopy, "all memory follows".into()),
            Mode::StopAndCopy => (Next::StopAndCopy, "all memory is copied in the pause".into()),
            Mode::Hybrid if let Some(why) = cut => (Next::PostCopy, cut_short(why)),
            Mode::Hybrid if count < self.config.rounds && round.stale > 0 => {
                let why = format!("{count} of {} rounds", self.config.rounds);
                (Next::Round, why)
            }
            Mode::Hybrid => {
                let why = format!("{count} of {} rounds: the rest follows", self.config.rounds);
                (Next::PostCopy, why)
            }
            Mode::PreCopy if rest <= limit => {
                let why = format!("the rest takes {rest:.1?} of {limit:.1?}: it is copied");
                (Next::StopAndCopy, why)
            }
            Mode::PreCopy if count >= ROUNDS_MAX => {
                let why = format!(
                    "pre-copy does not come to an end: after {count} rounds {} pages are left, \
                     which would take {rest:.1?} of {limit:.1?}",
                    round.stale
                );
                (Next::GiveUp(why.clone()), why)
            }
            Mode::PreCopy => {
                (Next::Round, format!("the rest would take {rest:.1?} of {limit:.1?}"))
            }
            Mode::Auto => self.weigh(&round, cut, rest, count),
        };
        let (next, why) = self.within_time(&round, next, why);
        self.before = round.stale;
        self.next = next.clone();
        self.ended.push(RoundEnd { round, why });
        next
    }

    /// How long it takes from the first page until the last, if so many pages are still to be sent.
    fn in_all(&self, round: &RoundSoFar, pages: f64) -> Duration {
        let before: Duration = self.ended.iter().map(|ended| ended.round.took).sum();
        before + round.took + Duration::from_secs_f64(pages * per_page(round))
    }

    /// No round is begun that there is no time for.
    fn within_time(&self, round: &RoundSoFar, next: Next, why: String) -> (Next, String) {
        let stale = round.stale as f64;
        let in_all = self.in_all(round, stale * (1.0 + self.again(stale)));
        match self.config.max_total {
            Some(most) if next == Next::Round && in_all > most => {
                let why = format!("{why}; with another round it takes {in_all:.1?} of {most:.1?}");
                match self.config.mode {
                    Mode::PreCopy => (Next::GiveUp(why.clone()), why),
                    _ => (Next::PostCopy, why),
                }
            }
            _ => (next, why),
        }
    }

    fn weigh(
        &self,
        round: &RoundSoFar,
        cut: Option<&str>,
        rest: Duration,
        count: u32,
    ) -> (Next, String) {
        let limit = self.config.max_downtime.min(AUTO_STOP);
        if rest <= limit {
            let why = format!("the rest takes {rest:.1?} of {limit:.1?}: it is copied");
            return (Next::StopAndCopy, why);
        }
        if let Some(why) = cut {
            return (Next::PostCopy, cut_short(why));
        }
        let again = self.again(round.stale as f64);
        let share = format!("{:.0} % are to be sent again", again * 100.0);
        let before: u64 = self.ended.iter().map(|ended| ended.round.sent).sum();
        // What was sent, what is left, and what of that would be sent once more.
        let sent = (before + round.sent) as f64 + round.stale as f64 * (1.0 + again);
        if sent > AUTO_SENT * self.pages as f64 {
            let sent = sent / self.pages as f64;
            let why =
                format!("{share}: a round more makes {sent:.1} guests sent, the rest follows");
            return (Next::PostCopy, why);
        }
        if count < ROUNDS_MAX && pays(round, again) {
            return (Next::Round, format!("{share}: another round pays"));
        }
        (Next::PostCopy, format!("{share}: another round does not pay, the rest follows"))
    }

    /// So many stale pages as a share of those that there were before the round.
    fn again(&self, stale: f64) -> f64 {
        (stale / self.before.max(1) as f64).min(1.0)
    }
}

/// Whether a round as this one, of pages of which the share `again` is written again, takes off
/// the guest more than it costs, page by page.
fn pays(round: &RoundSoFar, again: f64) -> bool {
    let s = per_page(round);
    let saves = (1.0 - again) * (FAULT_S + round.rtt.as_secs_f64() + s);
    let costs = s * ROUND_SHARE + again * (WRITE_TRAP_S + s);
    saves > costs
}

fn cut_short(why: &str) -> String {
    format!("cut short, for {why}: the rest follows")
}

/// Seconds on the link that a page of this round took.
fn per_page(round: &RoundSoFar) -> f64 {
    round.took.as_secs_f64() / round.sent.max(1) as f64
}

/// How many pages will have been written at `end`, by how many there were at two times: as
/// if those that are written at all were met at random, `h (1 - exp(-t / c))`. Where
/// they do not become rarer they go on at the same rate.
fn extrapolated((t1, d1): (f64, f64), (t2, d2): (f64, f64), end: f64) -> f64 {
    if d2 <= d1 || t2 <= t1 || d1 <= 0.0 {
        return d2;
    }
    // The curve through (0, 0), (t1, d1) and (t2, d2), by bisection in the rate 1 / c: the
    // ratio of the two rises from t1 / t2 (a line) towards 1.
    let ratio = d1 / d2;
    let of = |k: f64| (1.0 - (-k * t1).exp()) / (1.0 - (-k * t2).exp());
    if ratio <= t1 / t2 * 1.02 {
        return d2 + (d2 - d1) / (t2 - t1) * (end - t2).max(0.0);
    }
    let (mut low, mut high) = (1e-9, 1e3 / t1);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if of(middle) < ratio { low = middle } else { high = middle }
    }
    let k = (low + high) / 2.0;
    d2 * (1.0 - (-k * end.max(t2)).exp()) / (1.0 - (-k * t2).exp())
}

#[cfg(test)]
mod tests;
