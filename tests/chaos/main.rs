//! Migrations of real guests, in real processes, over links that fail: each is hit by one or
//! several failures, and each hit is proven to have struck in its phase.
//!
//! ```sh
//! cargo test --features failpoints --test chaos -- --nocapture
//! POSTCOPY_CHAOS_MIGRATIONS=300 cargo test --features failpoints --test chaos -- --nocapture
//! POSTCOPY_CHAOS_SEED=17.0 POSTCOPY_CHAOS_MIGRATIONS=1 cargo test --features failpoints ...
//! ```
//!
//! A seed decides guest, link, failures and moments; the phase that is aimed at goes round
//! with it. Each migration prints one line. At its end the guest is verified, page by page, by
//! the independent checker: at the destination, or, if it stayed (or an operator took it back,
//! for its destination died before it heard of the commit), at another one that it is
//! moved to afterwards. It never runs twice (`two_guests.rs`), nothing hangs, and nothing is
//! left running. A hit that is not proven is drawn again. With 300 migrations and more, each
//! phase must have been hit 20 times.
//!
//! Not among the failures is what a guest does not outlive by design: the death of its VMM
//! before the commit, of its destination after it, of keeper and fault server after it.

// Child processes: limits, captured output.
#[allow(dead_code)] // The other tests use the rest.
#[path = "../migrate/harness.rs"]
mod harness;
// The commit word of another process.
#[allow(dead_code)] // As above.
#[path = "../torture/commit_word.rs"]
mod commit_word;

// What is drawn.
mod moments;
mod plan;
// The processes, and what is done to them.
mod scene;
mod strike;
// What proves it, and what must be true at the end.
mod evidence;
mod standstill;
mod two_guests;
mod verdict;

mod tally;

use plan::{Failure, Phase, Plan, Who};
use postcopy::attach::monotonic_ns;
use postcopy::vmm::kvm::kvm_available;
use scene::{Scene, kill_all, mark_of};
use standstill::Watch;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use strike::{GoOn, Pending, prove, strike};
use tally::{HitSeen, Tally};
use verdict::Outcome;

/// Migrations, unless told otherwise.
const MIGRATIONS: u64 = 30;
/// Migrations at a time. Mostly they wait.
const AT_A_TIME: u64 = 3;
/// How often a migration is drawn again because its first hit was not proven.
const ATTEMPTS: u64 = 6;
/// With so many migrations, so many hits in each phase must be proven.
const MANY: u64 = 300;
const HITS_OF_MANY: u32 = 20;

/// The first seed, and the attempt at which each begins: `17`, or `17.2` for what was drawn
/// for the seed 17 when it had been drawn twice in vain.
fn first() -> (u64, u64) {
    let Ok(text) = std::env::var("POSTCOPY_CHAOS_SEED") else {
        return (rand::random_range(0..1 << 40), 0);
    };
    let (seed, attempt) = text.split_once('.').unwrap_or((&text, "0"));
    let number = |part: &str| part.parse().unwrap_or_else(|_| panic!("{text} is no seed"));
    (number(seed), number(attempt))
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// Runs one migration.
fn migration(plan: &Plan, attempt: u64) -> (Vec<HitSeen>, Outcome) {
    let mut scene = Scene::prepare(plan.clone(), attempt);
    let (log, mark) = (scene.log.clone(), scene.mark());
    scene.migrate();
    let mut pending = Pending::default();
    let mut struck = Vec::new();
    for hit in &plan.hits {
        let how = strike(&mut scene, hit, &mut pending);
        if hit.failure == Failure::Kill(Who::FaultServer) && how.did() {
            scene.resume();
        }
        struck.push(how);
    }
    let planned = plan.hits.iter().filter_map(|hit| Some(hit.moment.failpoint()?.0)).collect();
    let _go_on = GoOn::everybody(&log, planned);
    pending.over();
    let (expired, _folder) = (scene.expired(), scene.folder());
    let outcome = verdict::verdict(scene);
    assert!(!expired.load(Ordering::SeqCst), "{mark} hung");
    // The log is whole only now: what comes after a strike is a part of the proof.
    let hits = plan.hits.iter().zip(&struck).map(|(hit, struck)| HitSeen {
        failure: hit.failure,
        aimed: hit.phase,
        proof: prove(struck, &log),
    });
    (hits.collect(), outcome)
}

/// Migrations for one seed, until its first hit is proven.
fn until_proven(seed: u64, attempt: u64, kvm: bool, tally: &Mutex<Tally>, watch: &Watch) {
    let phase = Phase::ALL[(seed % Phase::ALL.len() as u64) as usize];
    for attempt in attempt..attempt + ATTEMPTS {
        let plan = Plan::draw(seed, attempt, phase, kvm);
        let (began, began_ns) = (Instant::now(), monotonic_ns());
        let run = std::panic::catch_unwind(AssertUnwindSafe(|| migration(&plan, attempt)));
        let mut tally = tally.lock().expect("nobody panics with it");
        let took = began.elapsed().as_secs_f64();
        match run {
            Ok((hits, outcome)) => {
                println!("{}", line(&plan, attempt, &hits, &outcome.to_string(), took));
                tally.verified(&hits, outcome);
                if hits.iter().any(|hit| hit.aimed == phase && hit.proof.is_ok()) {
                    return;
                }
                tally.redrawn += 1;
            }
            Err(panic) => {
                kill_all(&mark_of(seed, attempt));
                let why = panic.downcast_ref::<String>().cloned();
                let why = why.or_else(|| panic.downcast_ref().map(|text: &&str| text.to_string()));
                let why = why.unwrap_or_default();
                let short = why.lines().next().unwrap_or_default().to_owned();
                println!("{}", line(&plan, attempt, &[], &format!("FAILED: {short}"), took));
                tally.migrations += 1;
                let still = watch.since(began_ns);
                println!("chaos: meanwhile the machine stood still: {still}");
                tally.failed.push(format!(
                    "seed {seed} attempt {attempt}: {why}\nmeanwhile the machine stood still: {still}"
                ));
                return;
            }
        }
    }
}

fn line(plan: &Plan, attempt: u64, hits: &[HitSeen], outcome: &str, took: f64) -> String {
    let planned = plan.hits.iter().enumerate().map(|(index, hit)| {
        let proof = match hits.get(index).map(|hit| &hit.proof) {
            Some(Ok((phase, how))) => format!("in {}, {how}", phase.name()),
            Some(Err(why)) => format!("unproven: {why}"),
            None => "no proof".to_owned(),
        };
        format!("{} {} ({proof})", hit.failure, hit.moment)
    });
    let hits: Vec<String> = planned.collect();
    format!(
        "chaos: seed {}.{attempt}: {} {} MiB, {} Mbit/s, {} us, loss {}: {}: {outcome} [{took:.1} s]",
        plan.seed,
        if plan.kvm { "kvm" } else { "process" },
        plan.mebibytes,
        plan.megabits,
        plan.rtt.as_micros(),
        plan.loss,
        hits.join("; "),
    )
}

#[test]
fn no_failure_loses_a_guest() {
    let kvm = kvm_available().inspect_err(|why| println!("chaos: without KVM ({why})")).is_ok();
    let count = number("POSTCOPY_CHAOS_MIGRATIONS").unwrap_or(MIGRATIONS);
    let at_a_time = number("POSTCOPY_CHAOS_AT_A_TIME").unwrap_or(AT_A_TIME);
    let (first, attempt) = first();
    println!("chaos: {count} migrations from seed {first}");
    let (next, tally, began) =
        (AtomicU64::new(first), Mutex::new(Tally::default()), Instant::now());
    let watch = Watch::begin();
    std::thread::scope(|scope| {
        for _ in 0..at_a_time {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    until_proven(seed, attempt, kvm, &tally, &watch);
                }
            });
        }
    });
    let tally = tally.into_inner().expect("nobody panicked with it");
    println!("{tally}\nchaos: {:.0} s in all", began.elapsed().as_secs_f64());
    println!("chaos: the machine stood still: {}", watch.since(0));
    assert!(tally.failed.is_empty(), "\n{}", tally.failed.join("\n\n"));
    for phase in Phase::ALL {
        let proven = tally.proven(phase);
        let enough = proven >= HITS_OF_MANY || count < MANY;
        assert!(enough, "only {proven} proven hits in {}", phase.name());
    }
}
