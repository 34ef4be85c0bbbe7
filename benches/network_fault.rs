//! A network fault without the network: a thread touches a missing page, another reads
//! the trap and places the page, the first goes on. What is left of a fault's latency
//! when the wire costs nothing; one figure for each backing, and the native fault of
//! ordinary memory as the floor. `cargo bench --bench network_fault`; needs userfaultfd.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use postcopy::memory::ram::{Backing, GuestRam};
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use postcopy::uffd::{DestinationBacking, Placer, Trap, TrapEvent, UffdOptions, register};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Pages of one guest; when all have been touched, another is made.
const PAGES: u64 = 4096;

fn guest(backing: Backing) -> Arc<GuestRam> {
    let layout = MemoryLayout::flat(PAGES).expect("a layout");
    Arc::new(GuestRam::new(layout, backing).expect("guest memory"))
}

/// Reads the first byte of a page as a guest does.
fn touch(ram: &GuestRam, page: u64) -> u8 {
    // SAFETY: the page is in the layout, mapped, and read without a reference.
    unsafe { ram.page_ptr(PageIndex::new(page)).as_ptr().read_volatile() }
}

/// Serves faults until told to stop.
fn serve(trap: &Trap, placer: &Placer, stop: &AtomicBool) {
    let content = vec![7; PAGE_SIZE];
    let mut events = Vec::new();
    while !stop.load(Ordering::Acquire) {
        let mut ready = [PollFd::new(trap.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::from(10u8)).expect("poll");
        trap.read(&mut events).expect("events of userfaultfd");
        for event in events.drain(..) {
            if let TrapEvent::Fault { page, .. } = event {
                let placed = placer.place(PageRun::single(page), &content).expect("a placement");
                assert!(placed.is_complete());
            }
        }
    }
}

/// How long touching each of up to [`PAGES`] missing pages takes, one after the other.
fn faults(backing: DestinationBacking, pages: u64) -> Duration {
    let ram = guest(backing.ram());
    // SAFETY: the memory is new and nothing holds a reference into it; it is read by
    // `touch` only, and not by the thread that serves.
    let (trap, placer) = unsafe { register(ram.clone(), backing, UffdOptions::for_process()) }
        .expect("userfaultfd must be permitted");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&trap, &placer, &stop));
        let began = Instant::now();
        let sum: u64 = (0..pages).map(|page| u64::from(touch(&ram, page))).sum();
        let took = began.elapsed();
        stop.store(true, Ordering::Release);
        assert_eq!(sum, 7 * pages, "every page came with its content");
        placer.unregister().expect("unregister");
        took
    })
}

fn native(pages: u64) -> Duration {
    let ram = guest(Backing::Anonymous);
    let began = Instant::now();
    let sum: u64 = (0..pages).map(|page| u64::from(touch(&ram, page))).sum();
    assert_eq!(sum, 0);
    began.elapsed()
}

/// Runs `measure` in portions of at most [`PAGES`].
fn portions(iterations: u64, measure: impl Fn(u64) -> Duration) -> Duration {
    (0..iterations).step_by(PAGES as usize).map(|done| measure(PAGES.min(iterations - done))).sum()
}

fn network_fault(c: &mut Criterion) {
    let mut group = c.benchmark_group("network_fault");
    group.bench_function("native fault", |b| b.iter_custom(|n| portions(n, native)));
    for backing in [
        DestinationBacking::Anonymous,
        DestinationBacking::MemfdContinue,
        DestinationBacking::MemfdCopy,
    ] {
        group.bench_function(BenchmarkId::new("trap and place", backing), |b| {
            b.iter_custom(|n| portions(n, |pages| faults(backing, pages)));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = network_fault
}
criterion_main!(benches);
