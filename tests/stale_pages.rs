//! Pages that are copied while the guest goes on writing to them: whoever reads at the
//! destination, from the restoring of the state on, sees the last content and never an older one.
//!
//! Threads race the thread that maps what was copied, the pages that follow, and each other.
#![cfg(feature = "io")]

use postcopy::memory::dirty_bitmap::DirtyBitmap;
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::page::PageIndex;
use postcopy::proto::switchover::{Mode, SwitchoverConfig};
use postcopy::report::schema::Report;
use postcopy::uffd::UffdOptions;
use postcopy::uffd::open::open;
use postcopy::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use postcopy::{
    Captured, DestinationBacking, DestinationBuilder, DestinationVm, Hello, Mismatch, Outcome,
    SourceBuilder, SourceVm, VmError,
};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
const PAGES: u64 = 16_384;
const WRITERS: u64 = 2;
const READERS: u64 = 4;

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

/// What is known of each page beside its content, which is its version in its first and its last
/// word.
#[derive(Debug)]
struct Record {
    versions: Vec<AtomicU64>,
    /// Written since the log was asked last.
    written: Vec<AtomicBool>,
    stop: AtomicBool,
}

impl Record {
    fn new() -> Self {
        Self {
            versions: (0..PAGES).map(AtomicU64::new).collect(),
            written: (0..PAGES).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        }
    }

    fn version(&self, page: u64) -> u64 {
        self.versions[page as usize].load(Ordering::SeqCst)
    }
}

fn write(memory: &GuestMemoryMmap, page: u64, version: u64) {
    for at in [0, PAGE - 8] {
        memory.store(version, GuestAddress(page * PAGE + at), Ordering::SeqCst).unwrap();
    }
}

fn read(memory: &GuestMemoryMmap, page: u64) -> [u64; 2] {
    [0, PAGE - 8].map(|at| {
        memory.load(GuestAddress(page * PAGE + at), Ordering::SeqCst).expect("a page of the guest")
    })
}

/// A guest of threads that write, each to pages of its own, everywhere or mostly in one place.
struct Writing {
    memory: GuestMemoryMmap,
    record: Arc<Record>,
    log: Option<Arc<DirtyBitmap>>,
    writers: Vec<JoinHandle<()>>,
}

impl Writing {
    fn start(memory: GuestMemoryMmap, record: Arc<Record>, seed: u64) -> Self {
        let writers = (0..WRITERS).map(|writer| {
            let (memory, record) = (memory.clone(), record.clone());
            let mut random = StdRng::seed_from_u64(seed ^ writer << 32);
            thread::spawn(move || {
                for version in PAGES.. {
                    if record.stop.load(Ordering::SeqCst) {
                        break;
                    }
                    let within = if random.random_bool(0.7) { PAGES / 16 } else { PAGES };
                    let page = random.random_range(0..within / WRITERS) * WRITERS + writer;
                    write(&memory, page, version);
                    record.versions[page as usize].store(version, Ordering::SeqCst);
                    // Last: a log that has not seen it yet has it in its next round.
                    record.written[page as usize].store(true, Ordering::SeqCst);
                    if version.is_multiple_of(64) {
                        thread::sleep(Duration::from_micros(200));
                    }
                }
            })
        });
        let writers = writers.collect();
        Self { memory, record, log: None, writers }
    }
}

impl SourceVm for Writing {
    fn start_dirty_log(&mut self) -> Result<Arc<DirtyBitmap>, VmError> {
        let log = Arc::new(DirtyBitmap::create(&MemoryLayout::flat(PAGES)?)?);
        self.log = Some(log.clone());
        Ok(log)
    }
    fn dirty_round(&mut self) -> Result<(), VmError> {
        let log = self.log.as_ref().ok_or("no log")?;
        for (page, written) in (0..).zip(&self.record.written) {
            if written.swap(false, Ordering::SeqCst) {
                log.set(PageIndex::new(page));
            }
        }
        Ok(())
    }
    fn pause(&mut self) -> Result<Captured, VmError> {
        self.record.stop.store(true, Ordering::SeqCst);
        for writer in self.writers.drain(..) {
            writer.join().map_err(|_| "a writer panicked")?;
        }
        for page in 0..PAGES {
            let version = self.record.version(page);
            assert_eq!(read(&self.memory, page), [version; 2], "the test's own record is wrong");
        }
        Ok(Captured { state: vec![1], ..Captured::default() })
    }
    fn resume(&mut self) -> Result<(), VmError> {
        Err("it was to be migrated".into())
    }
    fn release(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// Pages that were seen as they are not in the end, and what was seen there.
type Stale = Vec<(u64, [u64; 2])>;

/// Readers that begin when the state is restored, and read each page as many times as there are
/// of them, each in an order of its own.
struct Reading {
    record: Arc<Record>,
    seed: u64,
    memory: Option<GuestMemoryMmap>,
    readers: Vec<JoinHandle<Stale>>,
}

impl DestinationVm for Reading {
    fn prepare(&mut self, _: &Hello, memory: GuestMemoryMmap) -> Result<String, Mismatch> {
        self.memory = Some(memory);
        Ok("machine".into())
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), VmError> {
        let memory = self.memory.clone().ok_or("not prepared")?;
        self.readers.extend((0..READERS).map(|reader| {
            let (memory, record) = (memory.clone(), self.record.clone());
            let mut random = StdRng::seed_from_u64(self.seed ^ reader << 40);
            thread::spawn(move || {
                let mut order: Vec<u64> = (0..PAGES).collect();
                order.shuffle(&mut random);
                let seen = order.into_iter().map(|page| (page, read(&memory, page)));
                seen.filter(|(page, seen)| *seen != [record.version(*page); 2]).collect()
            })
        }));
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, VmError> {
        Ok(Instant::now())
    }
}

/// Migrates such a guest; the source's report.
fn migrates(switchover: SwitchoverConfig, lanes: usize, seed: u64) -> Report {
    println!("{switchover:?}, {lanes} lanes, seed {seed}");
    let memory =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (PAGES * PAGE) as usize)]).unwrap();
    let record = Arc::new(Record::new());
    (0..PAGES).for_each(|page| write(&memory, page, page));
    let receiver = DestinationBuilder::new().is_kvm(|_| false).push_lanes(lanes).build().unwrap();
    // SAFETY: its writers stop when it is paused, and end before this function does.
    let source = unsafe { SourceBuilder::new(memory.clone(), receiver.ticket().clone()) };
    let source = source.machine("machine").switchover(switchover);
    let vm = Reading { record: record.clone(), seed, memory: None, readers: Vec::new() };
    let receiving = thread::spawn(move || receiver.run(Box::new(vm)).unwrap());
    let vm = Writing::start(memory, record, seed);
    let end = source.build().unwrap().run(Box::new(vm)).unwrap();
    assert_eq!(end.outcome, Outcome::Completed);
    let destination = receiving.join().unwrap();
    assert_eq!(destination.outcome, Outcome::Completed);
    let vm = (destination.vm as Box<dyn std::any::Any>).downcast::<Reading>().ok().unwrap();
    for reader in vm.readers {
        let stale = reader.join().expect("a reader");
        let shown = &stale[..stale.len().min(5)];
        assert!(stale.is_empty(), "{} stale pages were seen, among them {shown:?}", stale.len());
    }
    end.report
}

#[test]
fn no_reader_sees_a_page_as_it_was_before() {
    let _watchdog = watchdog();
    if let Err(error) = open(UffdOptions::for_process(), DestinationBacking::MemfdContinue) {
        println!("SKIPPED: {error}");
        return;
    }
    let of = |mode, rounds| SwitchoverConfig { mode, rounds, ..SwitchoverConfig::default() };
    for (config, lanes) in [
        (of(Mode::Hybrid, 1), 1),
        (of(Mode::Hybrid, 3), 3),
        (of(Mode::Auto, 1), 2),
        (of(Mode::PreCopy, 1), 3),
        (of(Mode::StopAndCopy, 1), 3),
    ] {
        let report = migrates(config, lanes, rand::random());
        let copied = report.pages.precopied.expect("a mode that copies");
        assert!(copied > PAGES / 10, "{copied} of {PAGES} pages were copied in time");
        if config.mode == Mode::Hybrid {
            assert!(copied < PAGES, "nothing was written meanwhile");
        }
        let sent = report.switchover.expect("as above").copied;
        assert!(sent >= copied, "{sent} pages sent, {copied} right in the end");
    }
}
