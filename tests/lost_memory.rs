//! Guest memory that the source cannot read: the migration goes on, every other page arrives
//! as it was, and touching a lost one at the destination is a memory error.
#![cfg(feature = "io")]

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use postcopy::memory::guarded::Guarded;
use postcopy::proto::page::PageRun;
use postcopy::uffd::UffdOptions;
use postcopy::uffd::open::open;
use postcopy::vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
};
use postcopy::{
    Captured, DestinationBacking, DestinationBuilder, DestinationEnd, DestinationVm, Event, Hello,
    Mismatch, Outcome, PageIndex, PolicyKind, SourceBuilder, SourceEnd, SourceVm, VmError,
};
use std::fs::File;
use std::num::NonZero;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver as Events, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// First page in guest physical memory, and pages.
const REGIONS: [(u64, u64); 2] = [(0, 300), (1 << 20, 200)];
const PAGES: u64 = 500;
/// Pages of the first region that become unreadable one by one: one with content, one that
/// is zero, two neighbours.
const DAMAGED: [u64; 4] = [33, 76, 150, 151];
/// Pages that are left of the second region's file, the last of them in part.
const LEFT: u64 = 161;

/// Ends the process if a test hangs.
fn watchdog() -> Sender<()> {
    let (alive, ended) = channel::<()>();
    thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(120)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("a migration does not end");
            std::process::abort();
        }
    });
    alive
}

fn is_lost(page: u64) -> bool {
    DAMAGED.contains(&page) || page >= REGIONS[0].1 + LEFT
}

/// Every third page is zero, and every third never touched.
fn content_of(page: u64) -> Vec<u8> {
    let mut content = vec![0; PAGE as usize];
    if page.is_multiple_of(3) {
        content.fill(page as u8 | 1);
        content[..8].copy_from_slice(&page.to_le_bytes());
        content[0] |= 1;
    }
    content
}

/// Memory with a file for each region, as a VMM may have it: nothing keeps the files long.
fn memory() -> (GuestMemoryMmap, File) {
    let mut last = None;
    let regions = REGIONS.map(|(first, pages)| {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = File::from(nix::sys::memfd::memfd_create(c"test", flags).unwrap());
        file.set_len(pages * PAGE).unwrap();
        last = Some(file.try_clone().unwrap());
        let file = Some(FileOffset::new(file, 0));
        let start = GuestAddress(first * PAGE);
        GuestRegionMmap::from_range(start, (pages * PAGE) as usize, file).unwrap()
    });
    let memory = GuestMemoryMmap::from_regions(regions.into()).unwrap();
    let mut page = 0;
    for (first, pages) in REGIONS {
        for at in first..first + pages {
            if page % 3 != 2 {
                memory.write_slice(&content_of(page), GuestAddress(at * PAGE)).unwrap();
            }
            page += 1;
        }
    }
    (memory, last.unwrap())
}

/// A guest that does nothing, and whose memory is damaged once it is paused.
struct Damaged {
    memory: GuestMemoryMmap,
    second: File,
}

impl SourceVm for Damaged {
    fn pause(&mut self) -> Result<Captured, VmError> {
        self.second.set_len(LEFT * PAGE - 100)?;
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let empty = nix::sys::memfd::memfd_create(c"empty", flags)?;
        let region = self.memory.iter().next().ok_or("no region")?;
        for page in DAMAGED {
            let at = NonZero::new(region.as_ptr() as usize + (page * PAGE) as usize);
            let one = NonZero::new(PAGE as usize).ok_or("no page")?;
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            // SAFETY: a page of a mapping to which there are no references.
            unsafe { mmap(at, one, ProtFlags::PROT_READ, flags, &empty, 0) }?;
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

/// At the destination the kernel is made to read a lost page and a sound one.
#[derive(Default)]
struct Toucher {
    memory: Option<GuestMemoryMmap>,
    touching: Vec<thread::JoinHandle<Result<(), i32>>>,
}

/// The kernel's read of a page: it fails where a vCPU would get a signal.
fn touch(memory: &GuestMemoryMmap, page: u64) -> Result<(), i32> {
    let (reading, writing) = nix::unistd::pipe().unwrap();
    let at = memory.get_host_address(GuestAddress(page * PAGE)).unwrap();
    // SAFETY: a page of the mapping, which the kernel reads.
    let done = unsafe { nix::libc::write(writing.as_raw_fd(), at.cast(), PAGE as usize) };
    drop(reading);
    nix::errno::Errno::result(done).map(drop).map_err(|error| error as i32)
}

impl DestinationVm for Toucher {
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
        for page in [DAMAGED[0], REGIONS[1].0 + REGIONS[1].1 - 1, 30] {
            let memory = memory.clone();
            self.touching.push(thread::spawn(move || touch(&memory, page)));
        }
        Ok(Instant::now())
    }
}

fn migrate(
    backing: DestinationBacking,
    policy: PolicyKind,
) -> (SourceEnd, DestinationEnd, [Events<Event>; 2]) {
    let ((tell_source, at_source), (tell, at_destination)) = (channel(), channel());
    let receiver = DestinationBuilder::new()
        .backing(backing)
        .on_event(move |event| drop(tell.send(event)))
        .build()
        .unwrap();
    let (memory, second) = memory();
    // SAFETY: nobody writes to it any more.
    let source = unsafe { SourceBuilder::new(memory.clone(), receiver.ticket().clone()) }
        .machine("machine")
        .policy(policy)
        .drain_after(Duration::from_millis(200))
        .on_event(move |event| drop(tell_source.send(event)));
    let receiving = thread::spawn(move || receiver.run(Box::new(Toucher::default())).unwrap());
    let end = source.build().unwrap().run(Box::new(Damaged { memory, second })).unwrap();
    (end, receiving.join().unwrap(), [at_source, at_destination])
}

#[test]
fn pages_that_cannot_be_read_are_lost_alone() {
    let _watchdog = watchdog();
    if let Err(error) = open(UffdOptions::for_kvm(), DestinationBacking::MemfdContinue) {
        return println!("SKIPPED: {error}");
    }
    use DestinationBacking::{Anonymous, MemfdContinue, MemfdCopy};
    for (backing, policy) in [
        (MemfdContinue, PolicyKind::DemandOnly),
        (Anonymous, PolicyKind::Bubbling),
        (MemfdCopy, PolicyKind::Linear),
    ] {
        let (source, destination, events) = migrate(backing, policy);
        let (outcome, outcome_there) = (source.outcome, destination.outcome);
        assert_eq!((outcome, outcome_there), (Outcome::Completed, Outcome::Completed), "{backing}");

        // Who waited for a lost page was told, and everybody else has his page.
        let ram = destination.ram.unwrap();
        let vm = (destination.vm as Box<dyn std::any::Any>).downcast::<Toucher>().ok().unwrap();
        let touched: Vec<_> = vm.touching.into_iter().map(|it| it.join().unwrap()).collect();
        let fault = Err(nix::libc::EFAULT);
        assert_eq!(touched, [fault, fault, Ok(())], "{backing}");

        // A thread's own access gets its signal at these pages and at no other.
        let guarded = Guarded::new().unwrap();
        let mut content = vec![0; PAGE as usize];
        for page in 0..PAGES {
            let run = PageRun::single(PageIndex::new(page));
            let readable = guarded.readable(&ram, run) == 1;
            assert_eq!(readable, !is_lost(page), "{backing}: page {page}");
            if readable {
                ram.read_run(run, &mut content);
                assert!(content == content_of(page), "{backing}: page {page} is another");
            }
        }

        let lost = (0..PAGES).filter(|page| is_lost(*page)).count() as u64;
        assert_eq!(source.report.pages.poisoned, Some(lost), "{backing}");
        assert_eq!(destination.report.pages.poisoned, Some(lost), "{backing}");
        assert_eq!(source.report.check(), [""; 0], "{backing}");
        let pages: u64 = destination.poisoned.runs().map(|run| run.count()).sum();
        assert_eq!(pages, lost);
        assert!(destination.poisoned.runs().flat_map(PageRun::pages).all(|at| is_lost(at.get())));
        for events in events {
            let named: Vec<_> = events
                .try_iter()
                .filter_map(|event| match event {
                    Event::MemoryLost { address, pages } => Some((address / PAGE, pages)),
                    _ => None,
                })
                .collect();
            assert_eq!(named.iter().map(|(_, pages)| pages).sum::<u64>(), lost, "{named:?}");
            assert!(named.contains(&(DAMAGED[1], 1)), "{named:?}");
        }
    }
}
