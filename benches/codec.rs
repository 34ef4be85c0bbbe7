//! What it costs to write and to check a frame's header, a page request, control
//! messages and a set of placed pages. `cargo bench --bench codec`.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use postcopy::proto::frame::{FrameHeader, FrameLimits, Origin, PageKind, PageRequest};
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::message::{Hello, SessionId, ToDestination, ToSource, encode};
use postcopy::proto::page::{PageIndex, PageRun};
use postcopy::proto::page_set::PageSet;
use std::hint::black_box;
use std::time::Duration;

/// Pages of a 4 GiB guest.
const PAGES: u64 = 1 << 20;
const LIMITS: FrameLimits = FrameLimits { pages: PAGES, epoch: 1 };

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
    ToDestination::State((0..64 << 10).map(|byte| byte as u8).collect())
}

/// What is exchanged after a lost link: every other run of 16 pages is there.
fn placed_pages(c: &mut Criterion) {
    let mut group = c.benchmark_group("set of placed pages");
    let runs = (0..PAGES).step_by(32).filter_map(|first| PageRun::new(PageIndex::new(first), 16));
    let mut set = PageSet::new();
    for run in runs {
        set.insert(run);
    }
    let mut bytes = Vec::new();
    set.encode(&mut bytes);
    group.throughput(Throughput::Elements(set.runs().len() as u64));
    group.bench_function("write", |b| {
        b.iter(|| {
            let mut bytes = Vec::with_capacity(bytes.len());
            black_box(&set).encode(&mut bytes);
            bytes
        });
    });
    group.bench_function("check", |b| {
        b.iter(|| PageSet::decode(black_box(&bytes), PAGES, usize::MAX).expect("a set"));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = headers, messages, placed_pages
}
criterion_main!(benches);
