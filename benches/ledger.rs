//! What the ledgers cost a page: alone, and with another thread at the same one.
//!
//! `cargo bench --bench ledger`. A ledger is made anew outside the measured
//! time, so every claim and landing is one that succeeds.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use postcopy::proto::ledger::{Claim, DestinationLedger, Landing, SourceLedger};
use postcopy::proto::page::{PageIndex, PageRun};
use std::hint::black_box;

/// A 256 MiB guest.
const PAGES: u64 = 1 << 16;

fn runs(pages_a_run: u64) -> impl Iterator<Item = PageRun> {
    (0..PAGES)
        .step_by(pages_a_run as usize)
        .filter_map(move |first| PageRun::new(PageIndex::new(first), pages_a_run))
}

fn push(ledger: &SourceLedger, pages_a_run: u64) {
    runs(pages_a_run).filter_map(|run| ledger.claim_within(run)).for_each(Claim::sent);
}

fn source(c: &mut Criterion) {
    let mut group = c.benchmark_group("source");
    group.throughput(Throughput::Elements(PAGES));
    let new = || SourceLedger::new(PAGES);
    group.bench_function("claim and send page by page", |b| {
        let pages = || (0..PAGES).map(PageIndex::new);
        let run = |ledger: SourceLedger| {
            pages().filter_map(|page| ledger.claim(page)).for_each(Claim::sent);
        };
        b.iter_batched(new, run, BatchSize::LargeInput);
    });
    for pages_a_run in [16, 64] {
        group.bench_function(format!("claim and send runs of {pages_a_run}"), |b| {
            b.iter_batched(new, |ledger| push(&ledger, pages_a_run), BatchSize::LargeInput);
        });
    }
    group.bench_function("two threads, runs of 64 against single pages", |b| {
        let contend = |ledger: SourceLedger| {
            std::thread::scope(|scope| {
                scope.spawn(|| push(&ledger, 64));
                let pages = (0..PAGES).rev().map(PageIndex::new);
                pages.filter_map(|page| ledger.claim(page)).for_each(Claim::sent);
            });
            assert_eq!(ledger.counts().sent, PAGES);
        };
        b.iter_batched(new, contend, BatchSize::LargeInput);
    });
    group.bench_function("find the one unsent page at the other end", |b| {
        let ledger = new();
        let all_but_one = PageRun::new(PageIndex::new(0), PAGES - 1);
        all_but_one.and_then(|run| ledger.claim_within(run)).into_iter().for_each(Claim::sent);
        b.iter(|| ledger.next_unsent(black_box(PageIndex::new(0))));
    });
    group.finish();
}

fn destination(c: &mut Criterion) {
    let mut group = c.benchmark_group("destination");
    group.throughput(Throughput::Elements(PAGES));
    let new = || DestinationLedger::new(PAGES);
    for pages_a_run in [1, 16, 64] {
        group.bench_function(format!("land and place runs of {pages_a_run}"), |b| {
            let place = |ledger: DestinationLedger| {
                runs(pages_a_run)
                    .filter_map(|run| ledger.land(run).ok())
                    .for_each(|landings| landings.for_each(Landing::placed));
                assert_eq!(ledger.missing(), 0);
            };
            b.iter_batched(new, place, BatchSize::LargeInput);
        });
    }
    group.bench_function("fault on every page", |b| {
        let fault = |ledger: DestinationLedger| {
            for page in (0..PAGES).map(PageIndex::new) {
                black_box(ledger.fault(page).is_ok());
            }
        };
        b.iter_batched(new, fault, BatchSize::LargeInput);
    });
    group.bench_function("mark all as zero", |b| {
        let mark = |ledger: DestinationLedger| {
            let all = PageRun::new(PageIndex::new(0), PAGES);
            all.map(|run| ledger.mark_zero(run).is_ok_and(|waited_for| waited_for.is_empty()))
        };
        b.iter_batched(new, mark, BatchSize::LargeInput);
    });
    let full = new();
    runs(64).filter_map(|run| full.land(run).ok()).for_each(|it| it.for_each(Landing::placed));
    group.bench_function("prove that it is full", |b| b.iter(|| full.finish().is_ok()));
    group.finish();
}

criterion_group!(benches, source, destination);
criterion_main!(benches);
