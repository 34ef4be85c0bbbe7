//! Several guests whose pages are pushed over one link.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// Jain's index of fairness: 1 if all have the same, 1/n if one has everything.
fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    sum * sum / (shares.len() as f64 * shares.iter().map(|share| share * share).sum::<f64>())
}

/// Guests that begin at these times, in milliseconds, until the last one begins.
fn guests(link: Link, begin_ms: &[u64]) -> Simulation {
    let mut simulation = Simulation::new(link);
    let begins: Vec<Duration> = begin_ms.iter().map(|ms| Duration::from_millis(*ms)).collect();
    begins.iter().for_each(|begins| simulation.add(*begins, link.base_rtt));
    simulation.run_until(begins.into_iter().max().unwrap());
    simulation
}

/// When several guests begin, in milliseconds.
const BEGIN: [&[u64]; 5] = [&[0, 0], &[0, 1000], &[0, 7000], &[0, 0, 0], &[0, 1000, 2000]];

#[test]
fn guests_share_a_link_whenever_they_begin() {
    for rate_bps in [200_000_000, 1_000_000_000, 10_000_000_000] {
        for base_rtt_us in [50, 1_000, 20_000] {
            let link = link(rate_bps, base_rtt_us);
            for begin_ms in BEGIN {
                let mut all = guests(link, begin_ms);
                // A second, or two hundred round trips.
                let time = SECOND.max(200 * link.base_rtt);
                let first = all.measure(time);
                let second = all.measure(time);
                all.measure(2 * time);
                let later = all.measure(2 * time);
                let [one, two, four] = [&first, &second, &later].map(|of| jain(&of.shares));
                println!(
                    "{rate_bps:11} bit/s {base_rtt_us:5} us, from {begin_ms:?} ms: \
                     {one:.3} {two:.3} {four:.3}, used {:.2}, queue {:.1?}, faults 99 % {:.1?}",
                    later.utilisation, later.queue_p95, later.faults_p99,
                );
                // Nobody starves, not even while the last one begins.
                let equal = 1.0 / begin_ms.len() as f64;
                let least = first.shares.iter().copied().fold(f64::MAX, f64::min);
                assert!(least > equal / 4.0, "{link:?} {begin_ms:?}: {first:?}");
                assert!(two > 0.85 && four > 0.97, "{link:?} {begin_ms:?}: {second:?} {later:?}");
                assert!(later.utilisation > 0.9, "{link:?} {begin_ms:?}: {later:?}");
                // A fault waits for a round trip and the queue, which hardly grows with guests.
                // What fills the way after a look goes out in a burst here, where QUIC would pace
                // it, and the least windows are a queue of their own on slow links.
                let target = all.guests.iter().map(|guest| guest.pacer.target()).max().unwrap();
                let least = begin_ms.len() as u64 * PacerConfig::default().window_min;
                let least = Duration::from_secs_f64(least as f64 * 8.0 / rate_bps as f64);
                let bound = 2 * (link.base_rtt + target) + least;
                for p99 in &later.faults_p99 {
                    assert!(*p99 < bound, "{link:?} {begin_ms:?}: {later:?}, not {bound:?}");
                }
            }
        }
    }
}

#[test]
fn guests_share_a_link_on_busy_hosts() {
    for (rate_bps, base_rtt_us, noise_us) in [
        (200_000_000, 200, 200),
        (1_000_000_000, 1_000, 100),
        (1_000_000_000, 50, 200),
        (10_000_000_000, 50, 200),
    ] {
        let noise = Duration::from_micros(noise_us);
        let ack_every = Duration::from_micros(500);
        for seed in 1..=3 {
            let link = Link { noise, seed, ack_every, ..link(rate_bps, base_rtt_us) };
            for begin_ms in BEGIN {
                let mut all = guests(link, begin_ms);
                all.measure(2 * SECOND);
                let later = all.measure(2 * SECOND);
                let found = jain(&later.shares);
                println!("{link:?} {begin_ms:?}: {found:.3} {later:.2?}");
                assert!(
                    found > 0.9 && later.utilisation > 0.85,
                    "{link:?} {begin_ms:?}: {later:?}"
                );
            }
        }
    }
}

#[test]
fn who_is_alone_again_takes_the_whole_link() {
    for base_rtt_us in [50, 1_000, 20_000] {
        let mut all = guests(link(1_000_000_000, base_rtt_us), &[0, 1000]);
        all.measure(2 * SECOND);
        let now = all.now;
        all.at(now, 1, Event::Ends);
        all.measure(SECOND);
        let alone = all.measure(SECOND);
        println!("{base_rtt_us} us: {alone:.2?}");
        assert!(alone.shares[0] > 0.9 && alone.shares[1] == 0.0, "{alone:?}");
    }
}

#[test]
fn guests_of_other_round_trips_are_not_starved() {
    let link = link(1_000_000_000, 0);
    for (far_ms, share_min) in [(2, 0.4), (20, 0.05)] {
        let mut both = Simulation::new(link);
        both.add(Duration::ZERO, Duration::from_micros(200));
        both.add(SECOND, Duration::from_millis(far_ms));
        both.run_until(3 * SECOND);
        let later = both.measure(4 * SECOND);
        println!("{far_ms} ms: {later:.2?}");
        // A longer way has a longer target, and with it more of the link; but not everything.
        assert!(later.shares[0] > share_min, "{far_ms} ms: {later:?}");
        assert!(later.faults_p99[0] < Duration::from_millis(15), "{far_ms} ms: {later:?}");
    }
}
