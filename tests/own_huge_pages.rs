//! A VMM's own memory of hugetlbfs on both sides, with holes that take nothing from the pool and a
//! page that the source cannot read, which costs the huge page that it is in.
#![cfg(feature = "io")]

#[path = "migrate/huge_page_pool.rs"]
mod huge_page_pool;

use huge_page_pool::Pool;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use postcopy::memory::guarded::Guarded;
use postcopy::proto::page::PageRun;
use postcopy::uffd::UffdOptions;
use postcopy::uffd::open::open;
use postcopy::vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
    MmapRegion,
};
use postcopy::{
    Captured, DestinationBacking, DestinationBuilder, DestinationVm, Hello, Mismatch, Outcome,
    PageIndex, PolicyKind, SourceBuilder, SourceVm, VmError,
};
use std::fs::File;
use std::num::NonZero;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// Pages of a huge page.
const BLOCK: u64 = 512;
/// First page in guest physical memory, and huge pages.
const REGIONS: [(u64, u64); 2] = [(0, 5), (1 << 20, 3)];
const PAGES: u64 = 8 * BLOCK;
/// Huge pages without content: the source has nothing there.
const HOLES: [u64; 3] = [1, 4, 6];
/// The huge page of which the source loses its content.
const DAMAGED: u64 = 2;

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

/// Every third page of a huge page with content has some.
fn content_of(page: u64) -> Vec<u8> {
    let mut content = vec![0; PAGE as usize];
    if page.is_multiple_of(3) && !HOLES.contains(&(page / BLOCK)) {
        content.fill(page as u8 | 1);
        content[..8].copy_from_slice(&page.to_le_bytes());
        content[0] |= 1;
    }
    content
}

/// One file for all regions; nothing is taken from the pool.
fn memory() -> GuestMemoryMmap {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = File::from(memfd_create(c"own", flags).unwrap());
    file.set_len(PAGES * PAGE).unwrap();
    let file = Arc::new(file);
    let mut offset = 0;
    let regions = REGIONS.map(|(first, blocks)| {
        let bytes = blocks * BLOCK * PAGE;
        let at = FileOffset::from_arc(file.clone(), offset);
        offset += bytes;
        let protection = nix::libc::PROT_READ | nix::libc::PROT_WRITE;
        let flags = nix::libc::MAP_SHARED | nix::libc::MAP_NORESERVE;
        let region = MmapRegion::build(Some(at), bytes as usize, protection, flags).unwrap();
        GuestRegionMmap::new(region, GuestAddress(first * PAGE)).unwrap()
    });
    GuestMemoryMmap::from_regions(regions.into()).unwrap()
}

/// A guest that does nothing, and of whose memory a part is damaged once it is paused.
struct Source(GuestMemoryMmap);

impl SourceVm for Source {
    fn pause(&mut self) -> Result<Captured, VmError> {
        let empty = memfd_create(c"empty", MFdFlags::MFD_CLOEXEC)?;
        let region = self.0.iter().next().ok_or("no region")?;
        let at = NonZero::new(region.as_ptr() as usize + (DAMAGED * BLOCK * PAGE) as usize);
        let bytes = NonZero::new((BLOCK * PAGE) as usize).ok_or("no page")?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: a huge page of a mapping to which there are no references.
        unsafe { mmap(at, bytes, ProtFlags::PROT_READ, flags, &empty, 0) }?;
        Ok(Captured { state: vec![1], ..Captured::default() })
    }
    fn resume(&mut self) -> Result<(), VmError> {
        Err("it was to be migrated".into())
    }
    fn release(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// At the destination the kernel is made to read a page of a hole, a lost one and a sound one.
struct Destination {
    memory: GuestMemoryMmap,
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

impl DestinationVm for Destination {
    fn memory(&mut self, _: &Hello) -> Result<Option<GuestMemoryMmap>, Mismatch> {
        Ok(Some(self.memory.clone()))
    }
    fn prepare(&mut self, _: &Hello, _: GuestMemoryMmap) -> Result<String, Mismatch> {
        Ok("machine".into())
    }
    fn vcpu_threads(&self) -> Vec<nix::unistd::Pid> {
        vec![nix::unistd::gettid()]
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), VmError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, VmError> {
        for page in [BLOCK + 17, DAMAGED * BLOCK + 3, REGIONS[1].0 + 9] {
            let memory = self.memory.clone();
            self.touching.push(thread::spawn(move || touch(&memory, page)));
        }
        Ok(Instant::now())
    }
}

fn migrates(policy: PolicyKind) {
    let _watchdog = watchdog();
    if let Err(error) = open(UffdOptions::for_kvm(), DestinationBacking::Hugetlb) {
        return println!("SKIPPED: {error}");
    }
    let with_content = 8 - HOLES.len() as u64;
    let Some(pool) = Pool::of(with_content + 8) else { return };
    let (from, to) = (memory(), memory());
    let addresses = REGIONS.iter().flat_map(|(first, blocks)| *first..first + blocks * BLOCK);
    for (page, at) in (0..).zip(addresses).filter(|(page, _)| page % 3 == 0) {
        if !HOLES.contains(&(page / BLOCK)) {
            from.write_slice(&content_of(page), GuestAddress(at * PAGE)).unwrap();
        }
    }
    pool.has_free(8);

    let receiver = DestinationBuilder::new().overcommit(true).build().unwrap();
    // SAFETY: nobody writes to it any more.
    let source = unsafe { SourceBuilder::new(from.clone(), receiver.ticket().clone()) }
        .machine("machine")
        .policy(policy)
        .drain_after(Duration::from_millis(200));
    let vm = Destination { memory: to.clone(), touching: Vec::new() };
    let receiving = thread::spawn(move || receiver.run(Box::new(vm)).unwrap());
    let source = source.build().unwrap().run(Box::new(Source(from.clone()))).unwrap();
    let destination = receiving.join().unwrap();
    let outcomes = (source.outcome, destination.outcome);
    assert_eq!(outcomes, (Outcome::Completed, Outcome::Completed), "{policy:?}");
    assert_eq!(source.report.check(), [""; 0]);
    // What the source never had it has not now, and all of the destination's is there.
    pool.has_free(0);

    let vm = (destination.vm as Box<dyn std::any::Any>).downcast::<Destination>().ok().unwrap();
    let touched: Vec<_> = vm.touching.into_iter().map(|it| it.join().unwrap()).collect();
    assert_eq!(touched, [Ok(()), Err(nix::libc::EFAULT), Ok(())], "{policy:?}");
    let ram = destination.ram.unwrap();
    let guarded = Guarded::new().unwrap();
    let mut content = vec![0; PAGE as usize];
    for page in 0..PAGES {
        let run = PageRun::single(PageIndex::new(page));
        let readable = guarded.readable(&ram, run) == 1;
        assert_eq!(readable, page / BLOCK != DAMAGED, "{policy:?}: page {page}");
        if readable {
            ram.read_run(run, &mut content);
            assert!(content == content_of(page), "{policy:?}: page {page} is another");
        }
    }
    let lost: Vec<PageRun> = destination.poisoned.runs().collect();
    assert_eq!(lost, [PageRun::new(PageIndex::new(DAMAGED * BLOCK), BLOCK).unwrap()]);
    let poisoned = destination.report.pages.poisoned;
    assert!(poisoned > Some(0) && poisoned <= Some(BLOCK), "{poisoned:?}");
}

#[test]
fn huge_pages_of_a_vmm_are_filled_by_demand() {
    migrates(PolicyKind::DemandOnly);
}

#[test]
fn huge_pages_of_a_vmm_are_filled_ahead() {
    migrates(PolicyKind::Bubbling);
}
