//! Guest memory of any number of regions against a flat array of bytes.

use super::ram::{Backing, FrozenRun, GuestRam, RamError};
use super::scan::{Kind, ZeroScan};
use super::segment::SegmentError;
use crate::proto::layout::{LayoutError, MemoryLayout};
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const PAGE: u64 = PAGE_SIZE as u64;

/// What a region of a VMM's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Made {
    Anonymous,
    /// A part of the file that other regions have parts of too.
    Shared,
    /// A file of its own, from a page on.
    Own(u64),
}

/// A region: free pages before it, its pages, what it is made of.
type Plan = (u64, u64, Made);

fn plans() -> impl Strategy<Value = Vec<Plan>> {
    let made =
        prop_oneof![Just(Made::Anonymous), Just(Made::Shared), (0..3u64).prop_map(Made::Own)];
    proptest::collection::vec((0..3u64, 1..7u64, made), 1..9)
}

fn memfd(pages: u64) -> Arc<File> {
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(pages * PAGE).unwrap();
    Arc::new(file)
}

/// Memory as a VMM makes it. In the common file the last region comes first, a page apart.
fn vmm_memory(plans: &[Plan]) -> GuestMemoryMmap {
    let total: u64 = plans.iter().map(|(_, pages, _)| pages + 1).sum();
    let common = memfd(total);
    let (mut next, mut offset) = (0, total);
    let regions = plans.iter().map(|&(gap, pages, made)| {
        let start = next + gap;
        next = start + pages;
        offset -= pages + 1;
        let file = match made {
            Made::Anonymous => None,
            Made::Shared => Some(FileOffset::from_arc(common.clone(), offset * PAGE)),
            Made::Own(at) => Some(FileOffset::from_arc(memfd(at + pages), at * PAGE)),
        };
        let start = GuestAddress(start * PAGE);
        GuestRegionMmap::from_range(start, (pages * PAGE) as usize, file).unwrap()
    });
    GuestMemoryMmap::from_regions(regions.collect()).unwrap()
}

fn run(first: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex::new(first), count).unwrap()
}

/// A run within `pages`, from two numbers.
fn within(pages: u64, first: u64, count: u64) -> PageRun {
    let first = first % pages;
    run(first, 1 + count % (pages - first))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn memory_of_many_regions_is_one_array_of_pages(
        plans in plans(),
        writes in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u8>()), 0..8),
        reads in proptest::collection::vec((any::<u64>(), any::<u64>()), 1..8),
        budget in 1..20u64,
    ) {
        let memory = vmm_memory(&plans);
        let ram = Arc::new(GuestRam::from_guest_memory(memory.clone()).unwrap());
        let pages: u64 = plans.iter().map(|(_, pages, _)| pages).sum();
        prop_assert_eq!(ram.layout().pages(), pages);
        prop_assert_eq!(ram.segments().len(), plans.len());

        // None: never touched.
        let mut model: Vec<Option<u8>> = vec![None; pages as usize];
        for &(first, count, byte) in &writes {
            let run = within(pages, first, count);
            ram.write_run(run, &vec![byte % 4; run.bytes()]);
            model[run.first().as_usize()..run.end() as usize].fill(Some(byte % 4));
        }

        check_zero_scan(&ram, &model, budget)?;
        for (page, byte) in (0..).map(PageIndex::new).zip(&model) {
            let expected = vec![byte.unwrap_or(0); PAGE_SIZE];
            // As vm-memory sees it, by the guest's own addresses.
            let mut content = vec![0; PAGE_SIZE];
            let address = GuestAddress(ram.layout().address_of(page).unwrap().0);
            memory.read_slice(&mut content, address).unwrap();
            prop_assert_eq!(&content, &expected);
            // As the kernel sees it, by its place in a file.
            let segment = ram.segment_of(page);
            prop_assert!(segment.run().contains(page));
            if let Some((file, offset)) = segment.file_at(page) {
                file.read_exact_at(&mut content, offset).unwrap();
                prop_assert_eq!(&content, &expected);
            }
            let host = ram.page_ptr(page).as_ptr() as usize;
            prop_assert_eq!(ram.page_of_host(host), Some(page));
            prop_assert_eq!(ram.page_of_host(host + PAGE_SIZE - 1), Some(page));
            let runs: Vec<PageRun> = ram.runs_between(host, host + PAGE_SIZE).collect();
            prop_assert_eq!(runs, vec![PageRun::single(page)]);
        }
        let everywhere: u64 = ram.runs_between(0, usize::MAX).map(PageRun::count).sum();
        prop_assert_eq!(everywhere, pages);
        for &(first, count) in &reads {
            check_run(&ram, &plans, &model, within(pages, first, count))?;
        }
        check_attached(&ram, &plans, &model)?;
    }
}

fn flat(model: &[Option<u8>], run: PageRun) -> Vec<u8> {
    let pages = &model[run.first().as_usize()..run.end() as usize];
    pages.iter().flat_map(|byte| [byte.unwrap_or(0); PAGE_SIZE]).collect()
}

fn check_run(
    ram: &Arc<GuestRam>,
    plans: &[Plan],
    model: &[Option<u8>],
    run: PageRun,
) -> Result<(), TestCaseError> {
    let mut content = vec![0; run.bytes()];
    ram.read_run(run, &mut content);
    prop_assert!(content == flat(model, run));

    let mut next = run.first().get();
    for (segment, part) in ram.parts(run) {
        prop_assert_eq!(part.first().get(), next);
        prop_assert!(part.end() <= segment.run().end() && segment.run().contains(part.first()));
        next = part.end();
    }
    prop_assert_eq!(next, run.end());

    let mut ends = plans.iter().scan(0, |end, (_, pages, _)| {
        *end += pages;
        Some(*end)
    });
    let crosses = ends.any(|end| run.first().get() < end && end < run.end());
    // SAFETY: nothing writes to this memory any more.
    let frozen = unsafe { FrozenRun::new(ram.clone(), run) };
    prop_assert_eq!(frozen.is_none(), crosses);
    prop_assert!(frozen.is_none_or(|frozen| frozen.as_ref() == flat(model, run)));
    Ok(())
}

/// The scan finds every page of zeros, calls those holes that were never touched, and
/// touches none.
fn check_zero_scan(
    ram: &Arc<GuestRam>,
    model: &[Option<u8>],
    budget: u64,
) -> Result<(), TestCaseError> {
    let expected: Vec<Option<Kind>> = model
        .iter()
        .map(|byte| match byte {
            None => Some(Kind::Hole),
            Some(0) => Some(Kind::Zero),
            Some(_) => None,
        })
        .collect();
    for _ in 0..2 {
        let mut found = vec![None; model.len()];
        let mut scan = ZeroScan::new(ram.clone()).unwrap();
        while let Some(runs) = scan.next(budget).unwrap() {
            for (run, kind) in runs {
                for page in run.pages() {
                    prop_assert_eq!(found[page.as_usize()].replace(kind), None);
                }
            }
        }
        prop_assert_eq!(&found, &expected);
    }
    Ok(())
}

/// Another process maps the same files and sees the same.
fn check_attached(
    ram: &GuestRam,
    plans: &[Plan],
    model: &[Option<u8>],
) -> Result<(), TestCaseError> {
    let files: Option<Vec<_>> = ram.segments().iter().map(|of| of.file().cloned()).collect();
    prop_assert_eq!(files.is_none(), plans.iter().any(|plan| plan.2 == Made::Anonymous));
    let Some(files) = files else { return Ok(()) };
    let attached = GuestRam::attach_read_only(ram.layout().clone(), files).unwrap();
    let all = run(0, model.len() as u64);
    let mut content = vec![0; all.bytes()];
    attached.read_run(all, &mut content);
    prop_assert!(content == flat(model, all));
    Ok(())
}

/// What is said of a region of two pages with this protection, flags and file.
fn refusal(bytes: usize, protection: i32, flags: i32, file: Option<FileOffset>) -> SegmentError {
    let region = MmapRegion::build(file, bytes, protection, flags).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(PAGE)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    match GuestRam::from_guest_memory(memory) {
        Err(RamError::Region { start: PAGE, source }) => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_that_cannot_be_migrated_is_refused_by_what_is_wrong_with_it() {
    use libc::{MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE};
    let both = PROT_READ | PROT_WRITE;
    let file = |offset| Some(FileOffset::from_arc(memfd(2), offset));
    let (two, anonymous) = (2 * PAGE_SIZE, MAP_PRIVATE | MAP_ANONYMOUS);
    use SegmentError::*;
    assert!(matches!(refusal(two + 1, both, anonymous, None), Unaligned));
    assert!(matches!(refusal(two, PROT_READ, anonymous, None), ReadOnly));
    assert!(matches!(refusal(two, both, MAP_PRIVATE, file(0)), PrivateFile));
    assert!(matches!(refusal(two, both, MAP_SHARED | MAP_ANONYMOUS, None), SharedAnonymous));
    let short = refusal(two, both, MAP_SHARED, file(PAGE));
    assert!(matches!(short, FileTooShort { actual: 8192, expected: 12288 }), "{short:?}");

    let none = GuestRam::from_guest_memory(GuestMemoryMmap::default()).unwrap_err();
    assert!(matches!(none, RamError::Layout(LayoutError::Empty)), "{none:?}");
}

#[test]
fn two_regions_over_the_same_bytes_of_a_file_are_refused() {
    let file = memfd(3);
    // The same file by another descriptor is still the same file.
    let again = Arc::new(file.try_clone().unwrap());
    let region = |start, file: &Arc<File>, offset| {
        let file = FileOffset::from_arc(file.clone(), offset);
        GuestRegionMmap::from_range(GuestAddress(start), 2 * PAGE_SIZE, Some(file)).unwrap()
    };
    let regions = vec![region(0, &file, 0), region(8 * PAGE, &again, PAGE)];
    let memory = GuestMemoryMmap::from_regions(regions).unwrap();
    match GuestRam::from_guest_memory(memory) {
        Err(RamError::Region { start, source: SegmentError::FilesOverlap { other: 0 } }) => {
            assert_eq!(start, 8 * PAGE);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn files_are_counted_and_the_engines_memory_is_one_file() {
    let layout = MemoryLayout::pc((3 << 30) / PAGE + 2).unwrap();
    let ram = GuestRam::new(layout.clone(), Backing::Memfd).unwrap();
    assert_eq!((ram.segments().len(), ram.memfd().is_some()), (2, true));
    let one = vec![ram.segments()[0].file().unwrap().clone()];
    let refused = GuestRam::attach_read_only(layout, one).unwrap_err();
    assert!(matches!(refused, RamError::Files { files: 1, regions: 2 }), "{refused:?}");
    let other = GuestRam::from_guest_memory(vmm_memory(&[(0, 2, Made::Own(1))])).unwrap();
    assert!(other.memfd().is_none());
}
