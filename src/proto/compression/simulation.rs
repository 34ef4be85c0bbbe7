//! The decision on simulated lanes and links: one lane, always with pages to push, on a link
//! behind a window.

use super::*;
use proptest::prelude::*;

const FRAME: usize = 64 * 4096;

/// What the guest's pages are like, at some time.
#[derive(Clone, Copy, Debug)]
struct Content {
    /// What they shrink to.
    ratio: f64,
    /// Nanoseconds to compress a byte.
    cost_ns: f64,
}

const TEXT: Content = Content { ratio: 0.4, cost_ns: 1.5 };
const NOISE: Content = Content { ratio: 1.0, cost_ns: 0.3 };
const ZEROS: Content = Content { ratio: 0.01, cost_ns: 0.1 };

struct Lane<L, C> {
    policy: Compression,
    /// Nanoseconds that the link needs for a byte, by the time.
    link_ns: L,
    content: C,
    /// Nanoseconds for the source to send a byte.
    send_ns: f64,
    now_ns: f64,
    link_free_ns: f64,
    page_bytes: f64,
    frames: u64,
    stretch_ns: f64,
    waited_ns: f64,
}

/// Processor time to encrypt a byte and hand it to the kernel.
const SEND_NS: f64 = 0.8;
/// What a link of 1 Gbit/s needs for a byte.
const GIGABIT: f64 = 8.0;
/// A loopback device, which is never the limit.
const LOOPBACK: f64 = 0.05;

fn lane<L: Fn(f64) -> f64, C: Fn(f64) -> Content>(
    mode: CompressMode,
    link_ns: L,
    content: C,
) -> Lane<L, C> {
    Lane {
        policy: Compression::new(mode),
        link_ns,
        content,
        send_ns: SEND_NS,
        now_ns: 0.0,
        link_free_ns: 0.0,
        page_bytes: 0.0,
        frames: 0,
        stretch_ns: 0.0,
        waited_ns: 0.0,
    }
}

impl<L: Fn(f64) -> f64, C: Fn(f64) -> Content> Lane<L, C> {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.now_ns as u64)
    }

    /// A frame: compressed or not, handed to the link, and waited for until the link has no more
    /// than two milliseconds of it before it.
    fn push(&mut self) {
        let seconds = self.now_ns / 1e9;
        let (content, link_ns) = ((self.content)(seconds), (self.link_ns)(seconds));
        let began_ns = self.now_ns;
        let (treatment, mut bytes) = (self.policy.next(self.now()), FRAME as f64);
        if treatment != Treatment::Raw {
            let took_ns = content.cost_ns * FRAME as f64;
            self.now_ns += took_ns;
            let block = (content.ratio <= 0.875).then_some(content.ratio * FRAME as f64);
            let sizes = (FRAME, block.map(|bytes| bytes as usize));
            let took = Duration::from_nanos(took_ns as u64);
            self.policy.tried(self.now(), treatment, sizes, took);
            if treatment == Treatment::Compress {
                bytes = block.unwrap_or(bytes);
            }
        }
        self.now_ns += self.send_ns * bytes;
        self.link_free_ns = self.link_free_ns.max(self.now_ns) + link_ns * bytes;
        let waits_ns = (self.link_free_ns - 2e6 - self.now_ns).max(0.0);
        self.now_ns += waits_ns;
        self.page_bytes += FRAME as f64;
        self.frames += 1;
        self.policy.sent(self.now(), FRAME);
        self.stretch_ns += self.now_ns - began_ns;
        self.waited_ns += waits_ns;
        if self.stretch_ns >= 20e6 {
            let [pushing, waited] =
                [self.stretch_ns, self.waited_ns].map(|ns| Duration::from_nanos(ns as u64));
            self.policy.stretch(self.now(), pushing, waited, true);
            (self.stretch_ns, self.waited_ns) = (0.0, 0.0);
        }
    }

    /// Pushes for so long; the megabytes of pages that left.
    fn run(&mut self, seconds: f64) -> f64 {
        let (end_ns, before) = (self.now_ns + seconds * 1e9, self.page_bytes);
        while self.now_ns < end_ns {
            self.push();
        }
        (self.page_bytes - before) / 1e6
    }

    fn figures(&self) -> &Figures {
        &self.policy.figures
    }

    /// The part of the time that probes took, beyond the first four.
    fn probe_share(&self) -> f64 {
        let later = self.figures().probes.saturating_sub(u64::from(TRIED_MIN)) as f64;
        let each = self.figures().probes_took.as_secs_f64() / self.figures().probes.max(1) as f64;
        later * each / (self.now_ns / 1e9)
    }
}

#[test]
fn a_slow_link_has_text_compressed_soon_and_carries_more() {
    let mut auto = lane(CompressMode::Auto, |_| GIGABIT, |_| TEXT);
    let mut never = lane(CompressMode::Never, |_| GIGABIT, |_| TEXT);
    let mut always = lane(CompressMode::Always, |_| GIGABIT, |_| TEXT);
    let [auto_mb, never_mb, always_mb] = [auto.run(5.0), never.run(5.0), always.run(5.0)];
    let first = auto.figures().switches[0];
    assert!(first.on && first.why == Why::Pays, "{first:?}");
    assert!(first.at < Duration::from_millis(400), "{first:?}");
    assert!(auto_mb > 2.2 * never_mb && auto_mb > 0.93 * always_mb, "{auto_mb} {never_mb}");
    assert_eq!(auto.figures().switched, 1);
    assert_eq!((never.figures(), never.policy.figures()), (&Figures::default(), None));
    assert_eq!((always.figures().switched, always.figures().probes), (0, 0));
    assert_eq!(always.figures().frames, always.frames);
}

#[test]
fn loopback_has_nothing_compressed_and_not_one_probe() {
    for content in [TEXT, NOISE, ZEROS] {
        let mut auto = lane(CompressMode::Auto, |_| LOOPBACK, |_| content);
        auto.run(20.0);
        assert_eq!(auto.figures(), &Figures::default());
        assert_eq!(auto.policy.why(), Some(Why::LinkIsNotTheLimit));
        assert!(auto.policy.figures().is_some(), "it was decided");
    }
}

#[test]
fn pages_that_do_not_shrink_are_probed_now_and_then_and_left_as_they_are() {
    let mut auto = lane(CompressMode::Auto, |_| GIGABIT, |_| NOISE);
    auto.run(20.0);
    assert_eq!((auto.figures().frames, auto.figures().switched), (0, 0));
    assert_eq!(auto.policy.why(), Some(Why::DoesNotShrink));
    assert!(auto.figures().probes > 100);
    assert!(auto.probe_share() < 0.0101, "{}", auto.probe_share());
}

/// Text shrinks, but the link needs less than two nanoseconds for what it would save.
#[test]
fn a_fast_link_is_not_waited_for_with_a_slow_processor() {
    let mut auto = lane(CompressMode::Auto, |_| 2.0, |_| TEXT);
    auto.run(10.0);
    assert_eq!((auto.figures().switched, auto.policy.why()), (0, Some(Why::CostsMore)));
    // What costs nothing pays there, too.
    let mut auto = lane(CompressMode::Auto, |_| 2.0, |_| ZEROS);
    let mut never = lane(CompressMode::Never, |_| 2.0, |_| ZEROS);
    assert!(auto.run(5.0) > 1.5 * never.run(5.0));
}

#[test]
fn it_ends_when_pages_shrink_no_more_and_begins_again_when_they_do() {
    let content = |seconds| if (2.0..6.0).contains(&seconds) { NOISE } else { TEXT };
    let mut auto = lane(CompressMode::Auto, |_| GIGABIT, content);
    auto.run(6.0);
    let [on, off] = auto.figures().switches[..] else { panic!("{:?}", auto.figures()) };
    assert!((on.on, off.on, off.why) == (true, false, Why::DoesNotShrink), "{off:?}");
    assert!(off.at < Duration::from_millis(2300), "{off:?}");
    auto.run(3.0);
    let again = auto.figures().switches[2];
    assert!(again.on && again.at < Duration::from_millis(7500), "{again:?}");
}

#[test]
fn a_link_that_became_fast_is_noticed_by_the_next_look() {
    let link = |seconds| if seconds < 3.0 { GIGABIT } else { LOOPBACK };
    let mut auto = lane(CompressMode::Auto, link, |_| TEXT);
    auto.run(25.0);
    let last = auto.figures().switches.last().unwrap();
    assert_eq!((last.on, auto.policy.why()), (false, Some(Why::LinkIsNotTheLimit)));
    assert!(last.at < Duration::from_secs(11), "{last:?}");
}

/// The link takes more than the sender of compressed pages has: it saves nothing, whatever the
/// estimate says.
#[test]
fn what_is_not_faster_is_given_up_and_tried_less_and_less() {
    let mut policy = Compression::new(CompressMode::Auto);
    let (mut now, mut tried_for) = (Duration::ZERO, Duration::ZERO);
    let step = Duration::from_millis(20);
    while now < Duration::from_secs(120) {
        now += step;
        let treatment = policy.next(now);
        policy.tried(now, treatment, (FRAME, Some(FRAME / 2)), Duration::from_micros(100));
        // At the same speed in any case: another host is the limit.
        for _ in 0..8 {
            policy.sent(now, FRAME);
        }
        policy.stretch(now, step, step / 2, true);
        tried_for += if treatment == Treatment::Compress { step } else { Duration::ZERO };
    }
    let offs = policy.figures.switches.iter().filter(|switch| !switch.on);
    assert!(offs.clone().count() >= 4 && offs.clone().all(|off| off.why == Why::NotFaster));
    assert!(policy.figures.switched < 20, "{:?}", policy.figures.switches);
    assert!(tried_for < Duration::from_secs(4), "{tried_for:?}");
}

#[test]
fn each_new_link_is_measured_anew() {
    let mut auto = lane(CompressMode::Auto, |_| GIGABIT, |_| TEXT);
    auto.run(1.0);
    assert_eq!(auto.policy.next(auto.now()), Treatment::Compress);
    auto.policy.new_link(auto.now());
    assert_eq!(auto.policy.next(auto.now()), Treatment::Raw);
    assert_eq!(auto.figures().switches[1].why, Why::NewLink);
    auto.run(1.0);
    assert!(auto.figures().switches[2].on);
}

#[test]
fn a_window_that_still_grows_and_lanes_with_gaps_say_nothing() {
    for (steady, gaps) in [(false, false), (true, true)] {
        let mut policy = Compression::new(CompressMode::Auto);
        let step = Duration::from_millis(20);
        for now in (1..500).map(|count| step * count) {
            for _ in 0..4 {
                policy.sent(now, FRAME);
            }
            if gaps {
                policy.idle();
            }
            policy.stretch(now, step, step, steady);
            assert_eq!(policy.next(now), Treatment::Raw);
        }
        assert_eq!(policy.figures(), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever content and link do: time is not wasted on probes, no more switches come than
    /// the waiting between them allows, and the list of them has an end.
    #[test]
    fn nothing_makes_it_flap_or_probe_without_end(
        ratios in prop::collection::vec((0.01f64..1.0, 0.05f64..4.0), 1..12),
        links in prop::collection::vec(0.05f64..80.0, 1..6),
    ) {
        let content = |seconds: f64| {
            let (ratio, cost_ns) = ratios[(seconds * 1.7) as usize % ratios.len()];
            Content { ratio, cost_ns }
        };
        let link = |seconds: f64| links[(seconds * 0.6) as usize % links.len()];
        let mut auto = lane(CompressMode::Auto, link, content);
        auto.run(60.0);
        prop_assert!(auto.probe_share() < 0.011, "{}", auto.probe_share());
        prop_assert!(auto.figures().switched <= 2 * (60 + 1), "{:?}", auto.figures());
        prop_assert!(auto.figures().switches.len() <= SWITCHES_MAX);
        for pair in auto.figures().switches.windows(2) {
            prop_assert!(pair[0].on != pair[1].on && pair[0].at < pair[1].at);
        }
    }

    /// With content and link as they are, it is never much worse than not compressing at all.
    #[test]
    fn it_costs_little_where_it_does_not_pay(
        ratio in 0.01f64..1.0, cost_ns in 0.05f64..4.0, link_ns in 0.05f64..80.0,
    ) {
        let content = Content { ratio, cost_ns };
        let mut auto = lane(CompressMode::Auto, |_| link_ns, |_| content);
        let mut never = lane(CompressMode::Never, |_| link_ns, |_| content);
        let (auto_mb, never_mb) = (auto.run(30.0), never.run(30.0));
        prop_assert!(auto_mb > 0.97 * never_mb, "{auto_mb} MB, {never_mb} MB without");
    }
}
