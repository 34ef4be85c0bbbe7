//! Pages that travel compressed, over an emulated link of 200 Mbit/s: each is compared at the
//! destination, and what the report says with what came over the link.
#![cfg(feature = "io")]

use postcopy::report::schema::{Compression, Report};
use postcopy::transport::relay::{Relay, RelayConfig, targets};
use postcopy::uffd::UffdOptions;
use postcopy::uffd::open::open;
use postcopy::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use postcopy::{
    Captured, CompressMode, DestinationBuilder, DestinationVm, Hello, Mismatch, Outcome,
    SourceBuilder, SourceVm, VmError,
};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;

/// Ends the process if a test hangs.
fn watchdog() -> Sender<()> {
    let (alive, ended) = channel::<()>();
    thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(180)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("a migration does not end");
            std::process::abort();
        }
    });
    alive
}

fn can_receive() -> bool {
    let opened = open(UffdOptions::for_process(), postcopy::DestinationBacking::MemfdContinue);
    if let Err(error) = &opened {
        println!("SKIPPED: {error}");
    }
    opened.is_ok()
}

/// What a guest's pages hold, by their number.
type Content = fn(u64) -> Vec<u8>;

/// Lines of a log: no two pages are the same, and each becomes a third or so.
fn text(page: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PAGE + 100);
    for line in 0.. {
        if bytes.len() >= PAGE {
            break;
        }
        let number = (page << 8 | line).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let (user, micros) = (number % 977, number >> 50);
        let line = format!(
            "{:08x} INFO http: served user {user} in {micros} us from the cache of zone b\n",
            number >> 32
        );
        bytes.extend(line.bytes());
    }
    bytes.truncate(PAGE);
    bytes
}

/// Nothing that any compressor could make smaller.
fn noise(page: u64) -> Vec<u8> {
    let word = |index: u64| {
        let mut x = (page << 9 | index).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    (0..PAGE as u64 / 8).flat_map(|index| word(index).to_le_bytes()).collect()
}

/// Stretches of either, of odd lengths: frames of one kind, of the other, and of both.
fn mixed(page: u64) -> Vec<u8> {
    if (page / 37).is_multiple_of(2) { text(page) } else { noise(page) }
}

struct Still;

impl SourceVm for Still {
    fn pause(&mut self) -> Result<Captured, VmError> {
        Ok(Captured { state: vec![1], ..Captured::default() })
    }
    fn resume(&mut self) -> Result<(), VmError> {
        Err("it was to be migrated".into())
    }
    fn release(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// At the destination a thread reads a page here and there as soon as it runs, and compares.
struct Reader {
    content: Content,
    pages: u64,
    memory: Option<GuestMemoryMmap>,
    reading: Option<thread::JoinHandle<()>>,
}

impl DestinationVm for Reader {
    fn prepare(&mut self, _: &Hello, memory: GuestMemoryMmap) -> Result<String, Mismatch> {
        self.memory = Some(memory);
        Ok("machine".into())
    }
    fn vcpu_threads(&self) -> Vec<nix::unistd::Pid> {
        vec![nix::unistd::gettid()]
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), VmError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, VmError> {
        let memory = self.memory.clone().ok_or("not prepared")?;
        let (pages, content) = (self.pages, self.content);
        self.reading = Some(thread::spawn(move || {
            for index in 0..200 {
                let page = index * 7919 % pages;
                assert!(read(&memory, page) == content(page), "the guest saw another page {page}");
            }
        }));
        Ok(Instant::now())
    }
}

fn read(memory: &GuestMemoryMmap, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    memory.read_slice(&mut bytes, GuestAddress(page * PAGE as u64)).unwrap();
    bytes
}

/// Migrates a guest of so many pages, and compares each; the source's report.
fn migrate(mode: CompressMode, content: Content, pages: u64, lanes: usize) -> Report {
    let bytes = pages as usize * PAGE;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
    for page in 0..pages {
        memory.write_slice(&content(page), GuestAddress(page * PAGE as u64)).unwrap();
    }
    let receiver = DestinationBuilder::new().is_kvm(|_| false).push_lanes(lanes).build().unwrap();
    let config = RelayConfig {
        bandwidth_bps: Some(200_000_000),
        rtt: Duration::from_millis(1),
        ..RelayConfig::default()
    };
    let ports = targets(IpAddr::V4(Ipv4Addr::LOCALHOST), receiver.ticket());
    let relay = Relay::spawn(config, &ports).unwrap();
    let ticket = relay.redirect(receiver.ticket()).unwrap();
    // SAFETY: nobody writes to it any more.
    let source = unsafe { SourceBuilder::new(memory, ticket) }.machine("machine").compress(mode);
    let vm = Reader { content, pages, memory: None, reading: None };
    let receiving = thread::spawn(move || receiver.run(Box::new(vm)).unwrap());
    let end = source.build().unwrap().run(Box::new(Still)).unwrap();
    assert_eq!(end.outcome, Outcome::Completed);
    let destination = receiving.join().unwrap();
    assert_eq!(destination.outcome, Outcome::Completed);
    let vm = (destination.vm as Box<dyn std::any::Any>).downcast::<Reader>().ok().unwrap();
    vm.reading.unwrap().join().unwrap();
    let memory = vm.memory.unwrap();
    for page in 0..pages {
        assert!(read(&memory, page) == content(page), "{mode}: page {page} is another");
    }
    assert_eq!(end.report.check(), [""; 0]);
    let forwarded = relay.stats().to_target.forwarded_bytes;
    let least = sent_bytes(&end.report, pages);
    assert!(forwarded > least, "{forwarded} bytes came over the link, {least} are told of");
    end.report
}

/// Bytes of pages that crossed the link, by the report.
fn sent_bytes(report: &Report, pages: u64) -> u64 {
    let whole = pages * PAGE as u64;
    report.compression.as_ref().map_or(whole, |of| whole - of.bytes_before + of.bytes_after)
}

/// Whether all of it is in order.
fn told(report: &Report, mode: &str) -> Compression {
    let of = report.compression.clone().expect("it was measured");
    assert_eq!(of.mode, mode);
    assert_eq!(of.bytes_before, of.pages * PAGE as u64);
    let pushed = report.pages.pushed.unwrap() + report.pages.drained.unwrap();
    assert!(of.pages <= pushed, "{of:?} of {pushed} pages pushed");
    assert!(of.bytes_after <= of.bytes_before - of.bytes_before / 8, "{of:?}");
    of
}

#[test]
fn all_that_shrink_are_sent_so_if_asked_for_and_all_pages_are_the_same() {
    let _watchdog = watchdog();
    if !can_receive() {
        return;
    }
    for (content, lanes) in [(text as Content, 1), (mixed, 3)] {
        let report = migrate(CompressMode::Always, content, 4000, lanes);
        let of = told(&report, "always");
        assert_eq!((of.why, of.switched, of.probes), (None, 0, 0));
        assert!(of.frames > 10 && of.cpu_us > 0);
        if lanes == 1 {
            assert!(of.bytes_after < of.bytes_before / 2 && of.unshrunk_frames == 0);
            assert_eq!(of.pages, report.pages.pushed.unwrap());
        } else {
            assert!(of.unshrunk_frames > 0, "{report:?}");
        }
    }
}

#[test]
fn a_slow_link_has_pages_compressed_by_itself() {
    let _watchdog = watchdog();
    if !can_receive() {
        return;
    }
    // A machine on which the lanes hardly run does not wait for the link; three times in a row
    // it is not that busy.
    for attempt in 1.. {
        let report = migrate(CompressMode::Auto, text, 16_000, 1);
        let of = told(&report, "auto");
        if let Some(first) = of.switches.first() {
            assert!(first.on && of.frames > 0 && of.probes >= 4, "{of:?}");
            assert!(first.shrunk_to_percent.is_some_and(|percent| percent < 70), "{of:?}");
            return;
        }
        assert_eq!((of.frames, of.switched), (0, 0), "{of:?}");
        assert!(attempt < 3, "{of:?}");
    }
}

#[test]
fn pages_that_do_not_shrink_are_left_as_they_are() {
    let _watchdog = watchdog();
    if !can_receive() {
        return;
    }
    let report = migrate(CompressMode::Auto, noise, 8000, 1);
    let of = told(&report, "auto");
    assert_eq!((of.frames, of.switched), (0, 0), "{of:?}");
    assert_eq!(migrate(CompressMode::Never, text, 1000, 2).compression, None);
}
