//! Whether pushed pages are compressed: decided by what was measured on the way.
//!
//! Compressing pays where the link is the limit, the pages become smaller, and making them
//! smaller takes less time than the link would have needed for the rest. [`Compression`] is
//! told three things, and decides by them; it measures and compresses nothing itself:
//!
//! * how long a lane that always had pages to push stood still because the link took no more
//!   ([`stretch`](Compression::stretch)): a lane that was busy, or waited for a core, gains
//!   nothing by more work;
//! * how many bytes of pages left in that time ([`sent`](Compression::sent));
//! * what compressing some of the guest's own pages cost, and how small they became
//!   ([`tried`](Compression::tried)). As long as it is off these are probes, which are sent as
//!   they are. There are none unless lanes wait, and but for the first four they take at
//!   most a hundredth of a lane's time.
//!
//! All that is looked at by *rounds* of at least 50 ms. It is turned on after two rounds that
//! speak for it:
//!
//! ```text
//! (1 - ratio) / speed > 2 * cost          speed: bytes of pages a second, uncompressed
//! ```
//!
//! The margin leaves room for the destination's part, which takes less. It is turned off if
//! without the margin that is no longer so, if pages do not become smaller, or if four rounds
//! were not a tenth faster than those before; it is then left alone for a second, next time
//! for two, up to half a minute. While it is on nobody knows what the link would do without,
//! so every ten seconds it is off for three rounds, to look.
//!
//! Pages that are asked for and seeds are no business of this: they are never compressed.

pub mod codec;
mod mode;
#[cfg(test)]
mod simulation;

pub use mode::{CompressMode, UnknownMode};
use std::time::Duration;

/// The shortest round, and the fewest frames of one.
const ROUND_MIN: Duration = Duration::from_millis(50);
const ROUND_FRAMES_MIN: u32 = 4;
/// Rounds of which the fastest tells what the link takes uncompressed.
const SPEEDS: usize = 3;
/// The share of its time for which a lane stands still if the link is the limit.
const WAITING: f64 = 0.25;
/// Rounds in a row that turn it on.
const AGREEING: u32 = 2;
/// Rounds in a row that turn it off for not being faster: more than those of which the fastest
/// is what they are compared with, or chance would decide on a busy machine.
const SLOW: u32 = SPEEDS as u32 + 1;
/// Frames that were tried before anything is said about cost and ratio.
const TRIED_MIN: u32 = 4;
/// What a frame that was tried weighs when the next one is.
const DECAY: f64 = 15.0 / 16.0;
/// Probes take this part of a lane's time at most.
const PROBE_DIVISOR: u32 = 100;
/// How much of what the link would have needed compressing may take: to begin, and to go on.
const MARGIN_ON: f64 = 2.0;
const MARGIN_OFF: f64 = 1.0;
/// Pages that do not become smaller than this are not compressed: to begin, and to go on.
const RATIO_ON: f64 = 0.85;
const RATIO_OFF: f64 = 0.9;
/// How much faster pages must leave than uncompressed ones did.
const FASTER: f64 = 1.1;
/// How long it is on without a look at the link without it.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How long it is left off after it was not worth it: first, and at most.
const HOLD_OFF_MIN: Duration = Duration::from_secs(1);
const HOLD_OFF_MAX: Duration = Duration::from_secs(30);
/// The most switches that are kept; those beyond are counted.
pub const SWITCHES_MAX: usize = 32;

/// What is done with the next frame of pushed pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// It is sent as it is.
    Raw,
    /// It is compressed to see what that does, and sent as it is.
    Probe,
    /// It is compressed, and sent so if it became smaller.
    Compress,
}

/// Why it is on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Too little is known.
    NotMeasured,
    /// The lanes do not wait for the link.
    LinkIsNotTheLimit,
    /// The pages hardly become smaller.
    DoesNotShrink,
    /// The link would need less time than it takes.
    CostsMore,
    /// It saves time.
    Pays,
    /// Pages did not leave faster than without.
    NotFaster,
    /// To see what the link does without.
    Looks,
    /// What was known is of another link.
    NewLink,
}

impl Why {
    /// In words, for a report.
    pub const fn text(self) -> &'static str {
        match self {
            Self::NotMeasured => "not enough was measured",
            Self::LinkIsNotTheLimit => "the lanes did not wait for the link",
            Self::DoesNotShrink => "pages hardly become smaller",
            Self::CostsMore => "it takes longer than it saves",
            Self::Pays => "it saves more time than it takes",
            Self::NotFaster => "pages did not leave faster",
            Self::Looks => "to see what the link does without",
            Self::NewLink => "another link",
        }
    }
}

/// It was turned on or off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Switch {
    /// When.
    pub at: Duration,
    /// Whether on.
    pub on: bool,
    /// Why.
    pub why: Why,
    /// What pages shrank to, as far as tried: 1 is not at all.
    pub ratio: Option<f64>,
    /// Processor time for a byte of pages, in nanoseconds.
    pub cost_ns: Option<f64>,
    /// Bytes of pages that left in a second, uncompressed.
    pub speed: Option<f64>,
}

/// What it came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Frames sent compressed.
    pub frames: u64,
    /// Bytes of the pages in them.
    pub page_bytes: u64,
    /// Bytes sent for them.
    pub sent_bytes: u64,
    /// Frames that were to be compressed and did not become smaller.
    pub unshrunk: u64,
    /// Processor time for all of these.
    pub took: Duration,
    /// Frames compressed only to see.
    pub probes: u64,
    /// Processor time for those.
    pub probes_took: Duration,
    /// The first switches.
    pub switches: Vec<Switch>,
    /// All of them.
    pub switched: u64,
}

/// Decides which frames are compressed. All times count from the same beginning.
#[derive(Clone, Debug)]
pub struct Compression {
    mode: CompressMode,
    on: bool,
    /// Of the last switch.
    since: Duration,
    /// Why it is as it is.
    why: Why,
    /// It is not turned on before, and how long it is left off next time.
    not_before: Duration,
    hold_off: Duration,
    tried: Tried,
    probing: bool,
    next_probe: Duration,
    round: Option<Round>,
    /// The next round is not looked at: what was sent before the last switch is in it.
    mixed: bool,
    /// Speeds of the last rounds without compression, in bytes of pages a second.
    speeds: [f64; SPEEDS],
    /// Rounds in a row that speak for a switch.
    agreeing: u32,
    figures: Figures,
}

/// What compressing has done to the frames tried last.
#[derive(Clone, Debug, Default)]
struct Tried {
    frames: u32,
    page_bytes: f64,
    sent_bytes: f64,
    took_ns: f64,
}

impl Tried {
    /// Both are `None` until enough was tried.
    fn ratio(&self) -> Option<f64> {
        (self.frames >= TRIED_MIN).then(|| self.sent_bytes / self.page_bytes)
    }

    fn cost_ns(&self) -> Option<f64> {
        (self.frames >= TRIED_MIN).then(|| self.took_ns / self.page_bytes)
    }
}

#[derive(Clone, Debug)]
struct Round {
    began: Duration,
    frames: u32,
    page_bytes: u64,
    /// Of all lanes.
    pushing: Duration,
    waited: Duration,
}

impl Compression {
    /// One that knows nothing yet.
    pub fn new(mode: CompressMode) -> Self {
        Self {
            mode,
            on: false,
            since: Duration::ZERO,
            why: Why::NotMeasured,
            not_before: Duration::ZERO,
            hold_off: HOLD_OFF_MIN,
            tried: Tried::default(),
            probing: false,
            next_probe: Duration::ZERO,
            round: None,
            mixed: false,
            speeds: [0.0; SPEEDS],
            agreeing: 0,
            figures: Figures::default(),
        }
    }

    /// What the user wants.
    pub fn mode(&self) -> CompressMode {
        self.mode
    }

    /// What is done with a frame that is sent now.
    pub fn next(&self, now: Duration) -> Treatment {
        match self.mode {
            CompressMode::Never => Treatment::Raw,
            CompressMode::Always => Treatment::Compress,
            CompressMode::Auto if self.on => Treatment::Compress,
            CompressMode::Auto if self.probing && now >= self.next_probe => Treatment::Probe,
            CompressMode::Auto => Treatment::Raw,
        }
    }

    /// A frame was compressed as [`next`](Self::next) said. `block_bytes` is `None` if it did
    /// not become smaller; it took `took` of a processor.
    pub fn tried(
        &mut self,
        now: Duration,
        treatment: Treatment,
        (page_bytes, block_bytes): (usize, Option<usize>),
        took: Duration,
    ) {
        let (figures, tried) = (&mut self.figures, &mut self.tried);
        let sent_bytes = block_bytes.unwrap_or(page_bytes);
        match treatment {
            Treatment::Raw => return,
            Treatment::Probe => {
                figures.probes += 1;
                figures.probes_took += took;
                if tried.frames + 1 >= TRIED_MIN {
                    self.next_probe = now + took * PROBE_DIVISOR;
                }
            }
            Treatment::Compress => {
                figures.took += took;
                match block_bytes {
                    Some(bytes) => {
                        figures.frames += 1;
                        figures.page_bytes += page_bytes as u64;
                        figures.sent_bytes += bytes as u64;
                    }
                    None => figures.unshrunk += 1,
                }
            }
        }
        tried.frames = tried.frames.saturating_add(1);
        tried.page_bytes = tried.page_bytes * DECAY + page_bytes as f64;
        tried.sent_bytes = tried.sent_bytes * DECAY + sent_bytes as f64;
        tried.took_ns = tried.took_ns * DECAY + took.as_nanos() as f64;
    }

    /// A frame of so many bytes of pages was handed to the link, in whatever form.
    pub fn sent(&mut self, now: Duration, page_bytes: usize) {
        if self.mode != CompressMode::Auto {
            return;
        }
        let round = self.round.get_or_insert(Round {
            began: now,
            frames: 0,
            page_bytes: 0,
            pushing: Duration::ZERO,
            waited: Duration::ZERO,
        });
        round.frames += 1;
        round.page_bytes += page_bytes as u64;
    }

    /// A lane pushed for so long, always having something to push, and for `waited` of that
    /// stood still because the link took no more. To be told every few tens of milliseconds.
    /// `steady`: the window for push has found its size, and does not grow any more.
    pub fn stretch(&mut self, now: Duration, pushing: Duration, waited: Duration, steady: bool) {
        let Some(round) = &mut self.round else { return };
        round.pushing += pushing;
        round.waited += waited;
        let elapsed = now.saturating_sub(round.began);
        if elapsed < ROUND_MIN || round.frames < ROUND_FRAMES_MIN {
            return;
        }
        let speed = round.page_bytes as f64 / elapsed.as_secs_f64();
        let waits = round.waited.as_secs_f64() >= WAITING * round.pushing.as_secs_f64();
        self.round = None;
        if std::mem::take(&mut self.mixed) || !steady {
            return;
        }
        match self.on {
            true => self.reconsider(now, speed),
            false => self.consider(now, speed, waits),
        }
    }

    /// A lane has nothing to push: how much leaves says nothing then.
    pub fn idle(&mut self) {
        self.round = None;
    }

    /// The link is another one.
    pub fn new_link(&mut self, now: Duration) {
        if self.on {
            self.switch(now, false, Why::NewLink);
        }
        (self.round, self.mixed, self.probing) = (None, false, false);
        (self.speeds, self.agreeing) = ([0.0; SPEEDS], 0);
    }

    /// What it came to; `None` if nothing was tried or decided.
    pub fn figures(&self) -> Option<&Figures> {
        let tried = self.figures.frames + self.figures.unshrunk + self.figures.probes;
        (tried > 0 || self.why != Why::NotMeasured).then_some(&self.figures)
    }

    /// Why it is on or off, if that was decided by measurement.
    pub fn why(&self) -> Option<Why> {
        (self.mode == CompressMode::Auto).then_some(self.why)
    }

    /// A round without compression: whether it is worth it.
    fn consider(&mut self, now: Duration, speed: f64, waits: bool) {
        self.speeds.rotate_right(1);
        self.speeds[0] = speed;
        self.probing = waits;
        let why = if waits { self.judge(RATIO_ON, MARGIN_ON) } else { Why::LinkIsNotTheLimit };
        self.why = why;
        self.agreeing = if why == Why::Pays { self.agreeing + 1 } else { 0 };
        if self.agreeing >= AGREEING && now >= self.not_before {
            self.switch(now, true, why);
        }
    }

    /// A round with it: whether it still is.
    fn reconsider(&mut self, now: Duration, speed: f64) {
        let why = self.judge(RATIO_OFF, MARGIN_OFF);
        let slow = self.speed().is_some_and(|without| speed < without * FASTER);
        self.agreeing = if slow { self.agreeing + 1 } else { 0 };
        if why != Why::Pays {
            self.give_up(now, why);
        } else if self.agreeing >= SLOW {
            self.give_up(now, Why::NotFaster);
        } else if now.saturating_sub(self.since) >= LOOK_EVERY {
            self.hold_off = HOLD_OFF_MIN;
            self.switch(now, false, Why::Looks);
            self.speeds = [0.0; SPEEDS];
        }
    }

    fn give_up(&mut self, now: Duration, why: Why) {
        self.switch(now, false, why);
        self.not_before = now + self.hold_off;
        self.hold_off = (self.hold_off * 2).min(HOLD_OFF_MAX);
    }

    /// What the figures say, at this ratio and margin.
    fn judge(&self, ratio_max: f64, margin: f64) -> Why {
        let (Some(ratio), Some(cost_ns), Some(speed)) =
            (self.tried.ratio(), self.tried.cost_ns(), self.speed())
        else {
            return Why::NotMeasured;
        };
        if ratio > ratio_max {
            return Why::DoesNotShrink;
        }
        let saves_ns = (1.0 - ratio) / speed * 1e9;
        if saves_ns > margin * cost_ns { Why::Pays } else { Why::CostsMore }
    }

    /// Bytes of pages a second without compression, if that was measured.
    fn speed(&self) -> Option<f64> {
        Some(self.speeds.into_iter().fold(0.0, f64::max)).filter(|speed| *speed > 0.0)
    }

    fn switch(&mut self, now: Duration, on: bool, why: Why) {
        (self.on, self.since, self.why) = (on, now, why);
        (self.agreeing, self.mixed, self.round) = (0, true, None);
        self.figures.switched += 1;
        if self.figures.switches.len() < SWITCHES_MAX {
            let (ratio, cost_ns) = (self.tried.ratio(), self.tried.cost_ns());
            let speed = self.speed();
            self.figures.switches.push(Switch { at: now, on, why, ratio, cost_ns, speed });
        }
    }
}
