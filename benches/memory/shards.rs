//! One userfaultfd for all of a guest's memory, or several for parts of it, each with threads of
//! its own: what is saved is the descriptor's lock and its queue of events.

use super::place::{CONTENT, registered, touch};
use super::{FRAME, PAGES, run};
use criterion::{BenchmarkId, Criterion, Throughput};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use postcopy::memory::ram::GuestRam;
use postcopy::proto::page::{PAGE_SIZE, PageRun};
use postcopy::uffd::{DestinationBacking, Placer, Trap, TrapEvent};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

/// Descriptors, and threads in all.
const SHARDS: [(u64, u64); 6] = [(1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (4, 4)];
/// How often an answering thread looks whether it is over.
const LOOK_EVERY_MS: u8 = 5;

fn name(descriptors: u64, threads: u64) -> String {
    format!("{descriptors} userfaultfds {threads} threads")
}

/// A part of a guest, with a descriptor of its own.
struct Shard {
    ram: Arc<GuestRam>,
    trap: Trap,
    placer: Placer,
}

fn shards(backing: DestinationBacking, descriptors: u64) -> Vec<Shard> {
    let of = |_| {
        let (ram, trap, placer) = registered(backing, true, PAGES / descriptors);
        Shard { ram, trap, placer }
    };
    (0..descriptors).map(of).collect()
}

/// How long it takes until all threads have placed their parts of a guest.
fn placing(backing: DestinationBacking, descriptors: u64, threads: u64, count: u64) -> Duration {
    let shards = shards(backing, descriptors);
    let each = PAGES / threads;
    let begin = Barrier::new(threads as usize + 1);
    let took = std::thread::scope(|scope| {
        for thread in 0..threads {
            // Pages of a shard lie together.
            let first = thread * each;
            let of_shard = PAGES / descriptors;
            let (placer, first) = (&shards[(first / of_shard) as usize].placer, first % of_shard);
            let begin = &begin;
            scope.spawn(move || {
                let content = vec![CONTENT; count as usize * PAGE_SIZE];
                begin.wait();
                for first in (first..first + each).step_by(count as usize) {
                    let placed = placer.place(run(first, count), &content).expect("a placement");
                    assert!(placed.is_complete());
                }
            });
        }
        begin.wait();
        Instant::now()
    })
    .elapsed();
    for shard in &shards {
        shard.placer.unregister().expect("unregister");
        assert_eq!(touch(&shard.ram, PAGES / descriptors - 1), CONTENT);
    }
    took
}

/// Threads that place pages for which nobody waits.
pub fn place(c: &mut Criterion) {
    for (backing, count) in [
        (DestinationBacking::Anonymous, 1),
        (DestinationBacking::Anonymous, FRAME),
        (DestinationBacking::MemfdContinue, 1),
        (DestinationBacking::MemfdContinue, FRAME),
    ] {
        let mut group = c.benchmark_group(format!("sharded_place/{backing} by {count}"));
        group.throughput(Throughput::Elements(PAGES));
        for (descriptors, threads) in SHARDS {
            group.bench_function(BenchmarkId::from_parameter(name(descriptors, threads)), |b| {
                b.iter_custom(|all| {
                    (0..all).map(|_| placing(backing, descriptors, threads, count)).sum()
                });
            });
        }
        group.finish();
    }
}

/// Answers faults until it is over.
fn answer(shard: &Shard, over: &AtomicBool) {
    let content = [CONTENT; PAGE_SIZE];
    let mut events = Vec::new();
    while !over.load(Ordering::Acquire) {
        let mut ready = [PollFd::new(shard.trap.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::from(LOOK_EVERY_MS)).expect("a descriptor can be polled");
        shard.trap.read(&mut events).expect("events");
        for event in events.drain(..) {
            if let TrapEvent::Fault { page, .. } = event {
                let placed = shard.placer.place(PageRun::single(page), &content);
                assert!(placed.expect("a placement").is_complete());
            }
        }
    }
}

/// How long it takes until `touchers` threads have touched each page of a guest, each page
/// once, while one thread for each descriptor answers.
fn touching(backing: DestinationBacking, descriptors: u64, touchers: u64) -> Duration {
    let shards = shards(backing, descriptors);
    let each = PAGES / touchers;
    let begin = Barrier::new(touchers as usize + 1);
    let over = AtomicBool::new(false);
    let took = std::thread::scope(|scope| {
        shards.iter().for_each(|shard| {
            let over = &over;
            scope.spawn(move || answer(shard, over));
        });
        let touching: Vec<_> = (0..touchers)
            .map(|toucher| {
                let first = toucher * each;
                let of_shard = PAGES / descriptors;
                let (ram, first) = (&shards[(first / of_shard) as usize].ram, first % of_shard);
                let begin = &begin;
                scope.spawn(move || {
                    begin.wait();
                    (first..first + each).for_each(|page| assert_eq!(touch(ram, page), CONTENT));
                })
            })
            .collect();
        begin.wait();
        let began = Instant::now();
        touching.into_iter().for_each(|thread| thread.join().expect("pages with content"));
        let took = began.elapsed();
        over.store(true, Ordering::Release);
        took
    });
    shards.iter().for_each(|shard| shard.placer.unregister().expect("unregister"));
    took
}

/// Faults of several threads, answered by one thread a descriptor.
pub fn faults(c: &mut Criterion) {
    for backing in [DestinationBacking::Anonymous, DestinationBacking::MemfdContinue] {
        for touchers in [1, 2, 4] {
            let mut group =
                c.benchmark_group(format!("sharded_faults/{backing} of {touchers} threads"));
            group.throughput(Throughput::Elements(PAGES));
            for descriptors in [1, 2, 4].into_iter().filter(|count| *count <= touchers) {
                group.bench_function(
                    BenchmarkId::from_parameter(format!("{descriptors} userfaultfds")),
                    |b| {
                        b.iter_custom(|all| {
                            (0..all).map(|_| touching(backing, descriptors, touchers)).sum()
                        });
                    },
                );
            }
            group.finish();
        }
    }
}
