//! What it costs to write and to check a frame's header, a page request, control
//! messages and a set of placed pages. `cargo bench --bench codec`.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use postcopy::proto::frame::{FrameHeader, FrameLimits, Origin, PageKind, PageRequest};
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::message::{Hello, SessionId, ToDestination, ToSource, encode};
use postcopy::proto::page::{PageIndex, PageRun};
use postcopy::proto::placed::{MESSAGE_PARTS_MAX, PlacedMessages, PlacedPages};
use std::hint::black_box;
use std::time::Duration;

/// Pages of a 4 GiB guest.
const PAGES: u64 = 1 << 20;
const LIMITS: FrameLimits = FrameLimits { pages: PAGES, epoch: 1, compressed: true };

fn headers(c: &mut Criterion) {
    let mut group = c.benchmark_group("header");
    let run = PageRun::new(PageIndex::new(0x1234), 16).expect("16 pages");
    let (kind, origin, epoch) = (PageKind::Raw, Origin::Push, LIMITS.epoch);
    let frame = FrameHeader { kind, origin, epoch, run, content_len: run.bytes() };
    let request = PageRequest { run: PageRun::single(run.first()), vcpu: Some(1), epoch };
    let (frame_bytes, request_bytes) = (frame.encode(), request.encode());
    assert_eq!(FrameHeader::parse(&frame_bytes, LIMITS), Ok(frame));
    assert_eq!(PageRequest::parse(&request_bytes, LIMITS), Ok(request));
    group.bench_function("write a page frame's", |b| b.iter(|| black_box(&frame).encode()));
    group.bench_function("check a page frame's", |b| {
        b.iter(|| FrameHeader::parse(black_box(&frame_bytes), LIMITS));
    });
    group.bench_function("write a page request", |b| b.iter(|| black_box(&request).encode()));
    group.bench_function("check a page request", |b| {
        b.iter(|| PageRequest::parse(black_box(&request_bytes), LIMITS));
    });
    group.finish();
}

fn messages(c: &mut Criterion) {
    let mut group = c.benchmark_group("message");
    let layout = MemoryLayout::pc(PAGES).expect("a layout");
    let hello = Hello::new(SessionId([7; 16]), layout, "machine ".repeat(100));
    let to_destination = [
        ("Hello", ToDestination::Hello(hello)),
        ("64 KiB of State", state()),
        ("Ping", ToDestination::Ping(1 << 40)),
    ];
    for (name, message) in to_destination {
        let bytes = encode(&message);
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(format!("write {name}"), |b| b.iter(|| encode(black_box(&message))));
        group.bench_function(format!("check {name}"), |b| {
            b.iter(|| ToDestination::decode(black_box(&bytes[4..])).expect("a message"));
        });
    }
    let progress =
        ToSource::Progress { settled: PAGES, network_faults: 999, pushed_bytes: 1 << 32 };
    let bytes = encode(&progress);
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("check Progress", |b| {
        b.iter(|| ToSource::decode(black_box(&bytes[4..])).expect("a message"));
    });
    group.finish();
}

fn state() -> ToDestination {
    ToDestination::State {
        was_paused: false,
        state: (0..64 << 10).map(|byte| byte as u8).collect(),
    }
}

/// What is exchanged after a lost link, by how the pages lie.
fn placed_pages(c: &mut Criterion) {
    let mut group = c.benchmark_group("set of placed pages");
    group.throughput(Throughput::Elements(PAGES));
    let every_other_16 =
        (0..PAGES).step_by(32).filter_map(|first| PageRun::new(PageIndex::new(first), 16));
    let mut number = 1u64;
    let mut random = || {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        number ^ number.rotate_left(32)
    };
    let random: Vec<u64> = (0..PAGES / 64).map(|_| random()).collect();
    let sparse = (0..PAGES).step_by(200).map(|page| PageRun::single(PageIndex::new(page)));
    for (name, words) in [
        ("all", vec![u64::MAX; PAGES as usize / 64]),
        ("every other 16", bits(every_other_16)),
        ("one in 200", bits(sparse)),
        ("half, at random", random),
    ] {
        let told = || {
            let mut messages = PlacedMessages::new(PAGES);
            let fill = |first: PageIndex, bits: &mut [u64]| {
                let from = first.as_usize() / 64;
                bits.copy_from_slice(&words[from..from + bits.len()]);
            };
            std::iter::from_fn(move || messages.next(MESSAGE_PARTS_MAX, fill))
        };
        let messages: Vec<_> = told().collect();
        let bytes: usize = messages.iter().map(Vec::len).sum();
        group.bench_function(format!("write {name}, {bytes} bytes"), |b| {
            b.iter(|| told().map(|message| black_box(message).len()).sum::<usize>());
        });
        group.bench_function(format!("check {name}, {bytes} bytes"), |b| {
            b.iter(|| {
                let mut set = PlacedPages::new(PAGES);
                for message in &messages {
                    set.take(black_box(message)).expect("the next parts");
                }
                set.complete().map(|()| set.count()).expect("a whole set")
            });
        });
    }
    group.finish();
}

fn bits(runs: impl Iterator<Item = PageRun>) -> Vec<u64> {
    let mut words = vec![0; PAGES as usize / 64];
    for page in runs.flat_map(PageRun::pages) {
        words[page.as_usize() / 64] |= 1 << (page.get() % 64);
    }
    words
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = headers, messages, placed_pages
}
criterion_main!(benches);
