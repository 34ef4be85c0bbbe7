//! What is done to guest memory for each of its pages: looking for zero pages and holes at the
//! source, placing pages at the destination. `cargo bench --bench memory`; placing needs
//! userfaultfd.

mod place;
mod shards;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use postcopy::memory::ram::{Backing, GuestRam};
use postcopy::memory::scan::{Holes, ZeroScan};
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

/// Pages of a guest: 64 MiB.
const PAGES: u64 = 16_384;
/// The most pages of a frame.
const FRAME: u64 = 64;

fn guest(backing: Backing, pages: u64) -> Arc<GuestRam> {
    let layout = MemoryLayout::flat(pages).expect("a layout");
    Arc::new(GuestRam::new(layout, backing).expect("guest memory"))
}

fn run(first: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex::new(first), count).expect("a run")
}

/// A guest whose pages all begin with this byte.
fn filled(with: u8) -> Arc<GuestRam> {
    let ram = guest(Backing::Memfd, PAGES);
    let mut content = [0; PAGE_SIZE];
    content[0] = with;
    (0..PAGES).for_each(|page| ram.write_run(run(page, 1), &content));
    ram
}

fn zero_scan(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero_scan");
    group.throughput(Throughput::Bytes(PAGES * PAGE_SIZE as u64));
    let guests =
        [("data", filled(1)), ("zero pages", filled(0)), ("a hole", guest(Backing::Memfd, PAGES))];
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

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = zero_scan, place::place, place::moved, shards::place, shards::faults
}
criterion_main!(benches);
