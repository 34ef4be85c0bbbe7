//! Placing pages, by each way in which the kernel takes them.

use super::{FRAME, PAGES, guest, run};
use criterion::{BenchmarkId, Criterion, Throughput};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use postcopy::memory::ram::GuestRam;
use postcopy::proto::page::{PAGE_SIZE, PageIndex};
use postcopy::uffd::{DestinationBacking, Placer, Trap, UffdOptions, register};
use std::ffi::c_void;
use std::num::NonZero;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};
use userfaultfd_sys as sys;

nix::ioctl_readwrite!(uffdio_move, sys::UFFDIO, sys::_UFFDIO_MOVE, sys::uffdio_move);

/// What every byte of a page is.
pub const CONTENT: u8 = 7;

/// How pages come into a destination's memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As the engine does with this backing.
    Engine(DestinationBacking),
    /// By a store through a second mapping of the file, and UFFDIO_CONTINUE.
    Alias,
}

/// Memory for a guest of `pages` pages under userfaultfd; if `reserved`, what is in a file has
/// all of its pages.
pub fn registered(
    backing: DestinationBacking,
    reserved: bool,
    pages: u64,
) -> (Arc<GuestRam>, Trap, Placer) {
    let ram = guest(backing.ram(), pages);
    if let Some(file) = ram.memfd().filter(|_| reserved) {
        let bytes = (pages * PAGE_SIZE as u64) as i64;
        fallocate(file, FallocateFlags::empty(), 0, bytes).expect("memory for a guest");
    }
    // SAFETY: the memory is new, nothing holds a reference into it, and what reads it does so
    // through raw pointers.
    let (trap, placer) = unsafe { register(ram.clone(), backing, UffdOptions::for_process()) }
        .expect("userfaultfd must be permitted");
    (ram, trap, placer)
}

/// The first byte of a page, as a guest reads it.
pub fn touch(ram: &GuestRam, page: u64) -> u8 {
    // SAFETY: the page is in the layout and mapped, and is read without a reference.
    unsafe { ram.page_ptr(PageIndex::new(page)).as_ptr().read_volatile() }
}

/// How long placing a guest's pages takes, `count` at a time, `pages` in all.
fn placing(way: Way, reserved: bool, count: u64, pages: u64) -> Duration {
    let backing = match way {
        Way::Engine(backing) => backing,
        Way::Alias => DestinationBacking::MemfdContinue,
    };
    let (ram, _trap, placer) = registered(backing, reserved, PAGES);
    let alias = ram.alias().filter(|_| way == Way::Alias).map(|alias| alias.expect("a mapping"));
    let content = vec![CONTENT; count as usize * PAGE_SIZE];
    let began = Instant::now();
    for first in (0..pages).step_by(count as usize) {
        let run = run(first, count);
        match &alias {
            None => {
                let placed = placer.place(run, &content).expect("a placement");
                assert!(placed.is_complete());
            }
            Some(alias) => {
                alias.write_run(run, &content);
                placer.map_present(run).expect("a placement");
            }
        }
    }
    let took = began.elapsed();
    placer.unregister().expect("unregister");
    assert_eq!(touch(&ram, pages - 1), CONTENT);
    took
}

/// Measures `all` pages with guests that are filled once each.
fn in_portions(all: u64, count: u64, fill: impl Fn(u64) -> Duration) -> Duration {
    let frames = PAGES / count;
    let portion = |done: u64| fill((all - done).min(frames) * count);
    (0..all).step_by(frames as usize).map(portion).sum()
}

pub fn place(c: &mut Criterion) {
    let mut group = c.benchmark_group("place");
    for (way, reserved) in [
        (Way::Engine(DestinationBacking::Anonymous), false),
        (Way::Engine(DestinationBacking::MemfdContinue), false),
        (Way::Engine(DestinationBacking::MemfdContinue), true),
        (Way::Alias, false),
        (Way::Alias, true),
        (Way::Engine(DestinationBacking::MemfdCopy), false),
    ] {
        let name = match way {
            Way::Engine(backing) => backing.to_string(),
            Way::Alias => "alias store and CONTINUE".to_owned(),
        };
        let name = format!("{name}{}", if reserved { ", reserved" } else { "" });
        for count in [1, 16, FRAME] {
            group.throughput(Throughput::Bytes(count * PAGE_SIZE as u64));
            group.bench_function(BenchmarkId::new(&name, count), |b| {
                b.iter_custom(|all| {
                    in_portions(all, count, |pages| placing(way, reserved, count, pages))
                });
            });
        }
    }
    group.finish();
}

/// Private memory from which pages are moved: each can be once.
struct Staging {
    start: NonNull<c_void>,
    bytes: usize,
}

impl Staging {
    fn new(pages: u64) -> Self {
        let bytes = pages as usize * PAGE_SIZE;
        let length = NonZero::new(bytes).expect("there are pages");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping takes nobody's memory away.
        let start = unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE) };
        Self { start: start.expect("memory"), bytes }
    }

    fn address(&self, page: u64) -> u64 {
        self.start.as_ptr() as u64 + page * PAGE_SIZE as u64
    }

    fn fill(&self, page: u64, content: &[u8]) {
        let at = page as usize * PAGE_SIZE;
        assert!(at + content.len() <= self.bytes);
        // SAFETY: it is within the mapping, of which nobody has a reference, and content is not
        // a part of it.
        unsafe {
            self.start
                .cast::<u8>()
                .add(at)
                .copy_from_nonoverlapping(NonNull::from(content).cast(), content.len());
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's, and nothing uses it any more.
        unsafe { munmap(self.start, self.bytes) }.expect("a mapping can be unmapped");
    }
}

/// Moves pages into a guest's memory, to the same place as in `from`.
fn move_run(
    trap: &Trap,
    ram: &GuestRam,
    from: &Staging,
    first: u64,
    count: u64,
) -> nix::Result<()> {
    let mut request = sys::uffdio_move {
        dst: ram.page_ptr(PageIndex::new(first)).as_ptr() as u64,
        src: from.address(first),
        len: count * PAGE_SIZE as u64,
        ..sys::uffdio_move::default()
    };
    // SAFETY: the argument is the structure that the ioctl reads and writes; both ranges are
    // mappings of which nobody has a reference.
    unsafe { uffdio_move(trap.as_raw_fd(), &mut request) }?;
    assert_eq!(request.move_, request.len as i64);
    Ok(())
}

/// How long moving takes, with filling what is moved if `fills`.
fn moving(fills: bool, count: u64, pages: u64) -> nix::Result<Duration> {
    let (ram, trap, placer) = registered(DestinationBacking::Anonymous, false, PAGES);
    let from = Staging::new(PAGES);
    let content = vec![CONTENT; count as usize * PAGE_SIZE];
    let frames = || (0..pages).step_by(count as usize);
    if !fills {
        frames().for_each(|first| from.fill(first, &content));
    }
    let began = Instant::now();
    for first in frames() {
        if fills {
            from.fill(first, &content);
        }
        move_run(&trap, &ram, &from, first, count)?;
    }
    let took = began.elapsed();
    placer.unregister()?;
    assert_eq!(touch(&ram, pages - 1), CONTENT);
    Ok(took)
}

/// UFFDIO_MOVE, which needs the content in whole pages of private memory: they are not copied,
/// and whoever receives into such memory gets a new page from the kernel each time.
pub fn moved(c: &mut Criterion) {
    match moving(true, 1, 1) {
        Ok(_) => {}
        Err(Errno::EINVAL) => return println!("SKIPPED: no UFFDIO_MOVE before Linux 6.8"),
        Err(errno) => panic!("UFFDIO_MOVE fails: {errno}"),
    }
    let mut group = c.benchmark_group("move");
    for (name, fills) in [("filled before", false), ("filled and moved", true)] {
        for count in [1, FRAME] {
            group.throughput(Throughput::Bytes(count * PAGE_SIZE as u64));
            group.bench_function(BenchmarkId::new(name, count), |b| {
                b.iter_custom(|all| {
                    in_portions(all, count, |pages| moving(fills, count, pages).expect("a move"))
                });
            });
        }
    }
    group.finish();
}
