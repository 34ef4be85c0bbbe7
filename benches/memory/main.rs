//! What is done to guest memory for each of its pages: looking for zero pages and holes at the
//! source, placing pages at the destination. `cargo bench --bench memory`; placing needs
//! userfaultfd.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nix::fcntl::{FallocateFlags, fallocate};
use postcopy::memory::ram::{Backing, GuestRam};
use postcopy::memory::scan::{Holes, ZeroScan};
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use postcopy::uffd::{DestinationBacking, UffdOptions, register};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pages of a guest: 64 MiB.
const PAGES: u64 = 16_384;
/// The most pages of a frame.
const FRAME: u64 = 64;

fn guest(backing: Backing) -> Arc<GuestRam> {
    let layout = MemoryLayout::flat(PAGES).expect("a layout");
    Arc::new(GuestRam::new(layout, backing).expect("guest memory"))
}

fn run(first: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex::new(first), count).expect("a run")
}

/// A guest whose pages all begin with this byte.
fn filled(with: u8) -> Arc<GuestRam> {
    let ram = guest(Backing::Memfd);
    let mut content = [0; PAGE_SIZE];
    content[0] = with;
    (0..PAGES).for_each(|page| ram.write_run(run(page, 1), &content));
    ram
}

fn zero_scan(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero_scan");
    group.throughput(Throughput::Bytes(PAGES * PAGE_SIZE as u64));
    let guests =
        [("data", filled(1)), ("zero pages", filled(0)), ("a hole", guest(Backing::Memfd))];
    for (name, ram) in &guests {
        group.bench_function(*name, |b| {
            b.iter(|| {
                let mut scan = ZeroScan::new(ram.clone()).expect("a scan");
                while let Some(found) = scan.next(4096).expect("guest memory is told of") {
                    black_box(found);
                }
            });
        });
    }
    group.finish();

    // What is asked of pages that are sent before the scan has come to them.
    let mut group = c.benchmark_group("is_it_a_hole");
    for (name, ram) in [&guests[0], &guests[2]] {
        let holes = Holes::new(ram.clone()).expect("guest memory is told of");
        for count in [1, FRAME] {
            group.bench_function(BenchmarkId::new(*name, count), |b| {
                b.iter(|| holes.first_part(black_box(run(PAGES / 2, count))));
            });
        }
    }
    group.finish();
}

/// How long placing a guest's pages takes, `count` at a time, `pages` in all.
fn placing(backing: DestinationBacking, reserved: bool, count: u64, pages: u64) -> Duration {
    let ram = guest(backing.ram());
    if let Some(file) = ram.memfd().filter(|_| reserved) {
        let bytes = (PAGES * PAGE_SIZE as u64) as i64;
        fallocate(file, FallocateFlags::empty(), 0, bytes).expect("memory for a guest");
    }
    // SAFETY: the memory is new, nothing holds a reference into it, and nothing reads it.
    let (_trap, placer) = unsafe { register(ram, backing, UffdOptions::for_process()) }
        .expect("userfaultfd must be permitted");
    let content = vec![7; count as usize * PAGE_SIZE];
    let began = Instant::now();
    for first in (0..pages).step_by(count as usize) {
        let placed = placer.place(run(first, count), &content).expect("a placement");
        assert!(placed.is_complete());
    }
    let took = began.elapsed();
    placer.unregister().expect("unregister");
    took
}

fn place(c: &mut Criterion) {
    let mut group = c.benchmark_group("place");
    for (backing, reserved) in [
        (DestinationBacking::Anonymous, false),
        (DestinationBacking::MemfdContinue, false),
        (DestinationBacking::MemfdContinue, true),
        (DestinationBacking::MemfdCopy, false),
    ] {
        let name = format!("{backing}{}", if reserved { ", reserved" } else { "" });
        for count in [1, 16, FRAME] {
            group.throughput(Throughput::Bytes(count * PAGE_SIZE as u64));
            group.bench_function(BenchmarkId::new(&name, count), |b| {
                // A guest is filled once; then there is another.
                let portion = |done: u64, all: u64| (all - done).min(PAGES / count) * count;
                b.iter_custom(|all| {
                    let guests = (0..all).step_by((PAGES / count) as usize);
                    guests.map(|done| placing(backing, reserved, count, portion(done, all))).sum()
                });
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = zero_scan, place
}
criterion_main!(benches);
