//! Who uses guest memory beside the vCPUs, and who of them does not go with a migration:
//! refused by name, before anything is paused.
//!
//! Memory that is of the wrong kind by itself (read-only, a private mapping of a file, huge
//! pages that say so) is refused where it becomes [`GuestRam`]; here is what only the VMM or
//! the kernel knows. KSM (`MADV_MERGEABLE`) is no obstacle: a merged page is there and has its
//! content, and a missing one is not merged.

use super::huge::BLOCK_BYTES;
use super::ram::GuestRam;
use crate::proto::page::PAGE_SIZE;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;

/// A user of guest memory that only the VMM knows of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryUser {
    /// A device that is passed through. It is also found by itself, by this process's
    /// descriptors.
    Vfio,
    /// A device in another process that has guest memory mapped.
    VhostUser {
        /// Whether it registers its mapping with userfaultfd and hands the descriptor over
        /// (`VHOST_USER_PROTOCOL_F_PAGEFAULT`), and the VMM places its pages.
        postcopy: bool,
    },
}

/// Something that does not go with a migration.
#[derive(Debug, thiserror::Error)]
pub enum MemoryUserError {
    /// Passed-through devices reach memory past userfaultfd.
    #[error(
        "a VFIO device uses guest memory ({found}): it writes by DMA what no page fault shows, and \
         its memory is pinned; unplug it before the migration"
    )]
    Vfio {
        /// The descriptor, or that the VMM says so.
        found: String,
    },
    /// A device that is reached through vDPA does the same.
    #[error(
        "a vDPA device uses guest memory ({found}): it writes by DMA what no page fault shows, and \
         its memory is pinned; unplug it before the migration"
    )]
    Vdpa {
        /// The descriptor.
        found: String,
    },
    /// A back end that would read missing pages as zero.
    #[error(
        "a vhost-user back end without post-copy support uses guest memory: its accesses to \
         missing pages are not trapped and would read zeros"
    )]
    VhostUser,
    /// Locked memory is filled before it can be trapped.
    #[error(
        "the memory at host address {start:#x} is locked (mlock, mlockall): the kernel fills it with \
         zero pages, which are then never asked for; lock it after the migration"
    )]
    Locked {
        /// Where the segment is mapped.
        start: usize,
    },
    /// Pages of another size.
    #[error(
        "the memory at host address {start:#x} is made of pages of {actual} bytes; only pages of \
         {PAGE_SIZE} bytes are supported, and of 2 MiB in a shared file of hugetlbfs"
    )]
    PageSize {
        /// Where the segment is mapped.
        start: usize,
        /// The size.
        actual: u64,
    },
    /// What the VMM says of its memory is not so.
    #[error(
        "the memory at host address {start:#x} is not mapped for reading and writing, private \
         without a file and shared with one, as the VMM says that it is"
    )]
    NotMapped {
        /// Where the segment is said to be mapped.
        start: usize,
    },
    /// The kernel does not say.
    #[error("cannot tell who uses guest memory ({path})")]
    Unknown {
        /// What cannot be read.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Refuses users of `ram` that do not go with a migration from here or to here, and memory
/// that is not what it is said to be.
pub fn check(ram: &GuestRam, declared: &[MemoryUser]) -> Result<(), MemoryUserError> {
    check_users(declared)?;
    let maps = parse_maps(&read("/proc/self/maps")?);
    for (segment, shared) in segments(ram).zip(ram.segments().iter().map(|of| of.file().is_some()))
    {
        check_mapped(&maps, &segment, shared)?;
    }
    Ok(())
}

/// Refuses devices that do not go with a migration: those that the VMM names, and those that
/// this process has open.
pub fn check_users(declared: &[MemoryUser]) -> Result<(), MemoryUserError> {
    for user in declared {
        match user {
            MemoryUser::Vfio => {
                return Err(MemoryUserError::Vfio { found: "as the VMM says".into() });
            }
            MemoryUser::VhostUser { postcopy: false } => return Err(MemoryUserError::VhostUser),
            MemoryUser::VhostUser { postcopy: true } => {}
        }
    }
    check_descriptors(Path::new("/proc/self/fd"))
}

/// Refuses memory that is locked or whose pages are of another size. For memory that is to
/// be filled: it is empty, so that asking is quick however much it is.
pub fn check_can_be_trapped(ram: &GuestRam) -> Result<(), MemoryUserError> {
    let maps = parse_smaps(&read("/proc/self/smaps")?);
    for (segment, of) in segments(ram).zip(ram.segments()) {
        let page_bytes = if of.is_huge() { BLOCK_BYTES } else { PAGE_SIZE };
        for map in maps.iter().filter(|map| overlap(&map.range, &segment)) {
            let start = segment.start;
            if map.locked {
                return Err(MemoryUserError::Locked { start });
            }
            if map.page_bytes != page_bytes as u64 {
                return Err(MemoryUserError::PageSize { start, actual: map.page_bytes });
            }
        }
    }
    Ok(())
}

/// Whether the kernel may put transparent huge pages into each segment: as the VMM advised, or
/// else as the system is set. Not where it does not say.
pub fn may_have_huge_pages(ram: &GuestRam) -> Vec<bool> {
    let maps = read("/proc/self/smaps").map_or(Vec::new(), |smaps| parse_smaps(&smaps));
    let system = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    let always = system.is_ok_and(|modes| modes.contains("[always]"));
    let may = |segment: Range<usize>| {
        let mut maps = maps.iter().filter(|map| overlap(&map.range, &segment)).peekable();
        maps.peek().is_some() && maps.all(|map| map.huge_advice.unwrap_or(always))
    };
    segments(ram).map(may).collect()
}

fn segments(ram: &GuestRam) -> impl Iterator<Item = Range<usize>> {
    ram.segments().iter().map(|segment| {
        let start = segment.start().as_ptr() as usize;
        start..start + segment.bytes()
    })
}

fn overlap(one: &Range<usize>, other: &Range<usize>) -> bool {
    one.start < other.end && other.start < one.end
}

fn read(path: &str) -> Result<String, MemoryUserError> {
    fs::read_to_string(path)
        .map_err(|source| MemoryUserError::Unknown { path: path.to_owned(), source })
}

/// Looks for descriptors of VFIO groups, devices and containers, and of vDPA devices.
fn check_descriptors(folder: &Path) -> Result<(), MemoryUserError> {
    let unknown = |source| MemoryUserError::Unknown { path: folder.display().to_string(), source };
    for entry in fs::read_dir(folder).map_err(unknown)? {
        // A descriptor may be closed while we look.
        let Ok(target) = entry.map_err(unknown)?.path().read_link() else { continue };
        let target = target.to_string_lossy();
        let names = ["/dev/vfio/", "/dev/iommu", "anon_inode:[vfio", "anon_inode:vfio"];
        if names.iter().any(|name| target.starts_with(name)) {
            return Err(MemoryUserError::Vfio { found: target.into_owned() });
        }
        if target.starts_with("/dev/vhost-vdpa-") {
            return Err(MemoryUserError::Vdpa { found: target.into_owned() });
        }
    }
    Ok(())
}

/// A mapping of this process.
#[derive(Debug, PartialEq, Eq)]
struct Map {
    range: Range<usize>,
    read_write: bool,
    shared: bool,
    /// Anonymous huge pages of hugetlbfs, which have a name.
    huge: bool,
    page_bytes: u64,
    locked: bool,
    /// Whether transparent huge pages were asked for, or asked to keep out.
    huge_advice: Option<bool>,
}

/// A line of `/proc/self/maps`.
fn parse_map(line: &str) -> Option<Map> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let range = address(start)?..address(end)?;
    let permissions = fields.next()?;
    let (read_write, shared) = (permissions.starts_with("rw"), permissions.ends_with('s'));
    let huge = fields.nth(3).is_some_and(|name| name.starts_with("/anon_hugepage"));
    let page_bytes = PAGE_SIZE as u64;
    Some(Map { range, read_write, shared, huge, page_bytes, locked: false, huge_advice: None })
}

fn parse_maps(text: &str) -> Vec<Map> {
    text.lines().filter_map(parse_map).collect()
}

fn parse_smaps(text: &str) -> Vec<Map> {
    let mut maps: Vec<Map> = Vec::new();
    for line in text.lines() {
        if let Some(map) = parse_map(line) {
            maps.push(map);
            continue;
        }
        let Some(map) = maps.last_mut() else { continue };
        if let Some(size) = line.strip_prefix("KernelPageSize:") {
            let kib = size.trim().trim_end_matches("kB").trim().parse::<u64>();
            map.page_bytes = kib.map_or(0, |kib| kib * 1024);
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |wanted| flags.split_ascii_whitespace().any(|flag| flag == wanted);
            map.locked = has("lo");
            map.huge_advice = (has("hg") || has("nh")).then(|| !has("nh"));
        }
    }
    maps
}

/// All of `segment` must be mapped, in any number of pieces, by ordinary pages, and be as
/// `shared` as it is said to be.
fn check_mapped(maps: &[Map], segment: &Range<usize>, shared: bool) -> Result<(), MemoryUserError> {
    let start = segment.start;
    let mut end = start;
    // They are in the order of their addresses.
    for map in maps.iter().filter(|map| overlap(&map.range, segment)) {
        if map.huge {
            return Err(MemoryUserError::PageSize { start, actual: huge_page_bytes() });
        }
        if map.range.start > end || !map.read_write || map.shared != shared {
            break;
        }
        end = map.range.end;
    }
    if end < segment.end { Err(MemoryUserError::NotMapped { start }) } else { Ok(()) }
}

/// The size of a huge page unless one asks for another.
fn huge_page_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
    let kib = line.and_then(|size| size.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(2048) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::{Backing, RamError};
    use crate::memory::segment::SegmentError;
    use crate::proto::layout::MemoryLayout;
    use nix::fcntl::{Flock, FlockArg};
    use std::os::unix::fs::symlink;
    use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

    fn ram() -> GuestRam {
        GuestRam::new(MemoryLayout::flat(16).unwrap(), Backing::Anonymous).unwrap()
    }

    #[test]
    fn what_the_vmm_declares_is_refused_by_name() {
        let ram = ram();
        check(&ram, &[MemoryUser::VhostUser { postcopy: true }]).unwrap();
        let vfio = check(&ram, &[MemoryUser::Vfio]).unwrap_err();
        assert!(matches!(vfio, MemoryUserError::Vfio { .. }), "{vfio}");
        let vhost = check(&ram, &[MemoryUser::VhostUser { postcopy: false }]).unwrap_err();
        assert!(matches!(vhost, MemoryUserError::VhostUser), "{vhost}");
    }

    #[test]
    fn an_open_vfio_descriptor_is_found() {
        // Descriptors as /proc shows them: there may be no device to open here.
        let folder = tempfile::tempdir().unwrap();
        let descriptor = |name: &str, target: &str| symlink(target, folder.path().join(name));
        descriptor("0", "/dev/null").unwrap();
        descriptor("1", "anon_inode:[userfaultfd]").unwrap();
        check_descriptors(folder.path()).unwrap();
        descriptor("2", "/dev/vfio/17").unwrap();
        match check_descriptors(folder.path()) {
            Err(MemoryUserError::Vfio { found }) => assert_eq!(found, "/dev/vfio/17"),
            other => panic!("{other:?}"),
        }
        std::fs::remove_file(folder.path().join("2")).unwrap();
        descriptor("3", "/dev/vhost-net").unwrap();
        check_descriptors(folder.path()).unwrap();
        descriptor("4", "/dev/vhost-vdpa-0").unwrap();
        match check_descriptors(folder.path()) {
            Err(MemoryUserError::Vdpa { found }) => assert_eq!(found, "/dev/vhost-vdpa-0"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn locked_memory_is_refused_until_it_is_unlocked() {
        let ram = ram();
        check_can_be_trapped(&ram).unwrap();
        let last = ram.page_ptr(crate::proto::page::PageIndex::new(15)).cast();
        // SAFETY: a page of the mapping.
        if let Err(error) = unsafe { nix::sys::mman::mlock(last, PAGE_SIZE) } {
            return println!("skipped: memory cannot be locked here: {error}");
        }
        match check_can_be_trapped(&ram) {
            Err(MemoryUserError::Locked { start }) => {
                assert_eq!(start, ram.segments()[0].start().as_ptr() as usize);
            }
            other => panic!("{other:?}"),
        }
        // SAFETY: as above.
        unsafe { nix::sys::mman::munlock(last, PAGE_SIZE) }.unwrap();
        check_can_be_trapped(&ram).unwrap();
    }

    /// One more huge page in the host's pool, where this user may ask for it.
    struct HugePage {
        before: u64,
        /// As for the tests that have the pool to themselves.
        _alone: Flock<fs::File>,
    }

    impl HugePage {
        const POOL: &str = "/proc/sys/vm/nr_hugepages";

        fn reserve() -> Option<Self> {
            let lock = std::env::temp_dir().join("postcopy-test-huge-pages");
            let lock = fs::File::create(lock).ok()?;
            let _alone = Flock::lock(lock, FlockArg::LockExclusive).ok()?;
            let before = fs::read_to_string(Self::POOL).ok()?.trim().parse().ok()?;
            fs::write(Self::POOL, format!("{}", before + 1)).ok()?;
            Some(Self { before, _alone })
        }
    }

    impl Drop for HugePage {
        fn drop(&mut self) {
            let _ = fs::write(Self::POOL, self.before.to_string());
        }
    }

    #[test]
    fn huge_pages_are_refused_whether_they_are_declared_or_found() {
        const HUGE: usize = 2 << 20;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let memory = |region: MmapRegion| {
            let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
            GuestRam::from_guest_memory(GuestMemoryMmap::from_regions(vec![region]).unwrap())
        };
        let _reserved = HugePage::reserve();
        // Without MAP_NORESERVE it fails here and not at the first access.
        let huge = MmapRegion::build(None, HUGE, protection, flags | libc::MAP_HUGETLB);
        let huge: MmapRegion = match huge {
            Ok(huge) => huge,
            Err(error) => return println!("skipped: no huge page can be had here: {error}"),
        };
        // A VMM that says nothing of it.
        // SAFETY: the mapping lives to the end of the test.
        let raw = unsafe { MmapRegion::build_raw(huge.as_ptr(), HUGE, protection, flags) };
        let silent = memory(raw.unwrap()).unwrap();
        for refused in [check(&silent, &[]), check_can_be_trapped(&silent)] {
            let refused = refused.unwrap_err();
            assert!(matches!(refused, MemoryUserError::PageSize { actual: 0x20_0000, .. }));
        }
        let declared = memory(huge).unwrap_err();
        let RamError::Region { source, .. } = declared else { panic!("{declared}") };
        assert!(matches!(source, SegmentError::Huge), "{source}");
    }

    #[test]
    fn memory_that_is_not_what_it_is_said_to_be_is_refused() {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        for (real, sound) in [
            ((protection, flags), true),
            ((libc::PROT_READ, flags), false),
            ((protection, shared), false),
        ] {
            let real: MmapRegion = MmapRegion::build(None, 4096, real.0, real.1).unwrap();
            // SAFETY: the mapping lives to the end of the check; nothing is written to it.
            let said = unsafe { MmapRegion::build_raw(real.as_ptr(), 4096, protection, flags) };
            let region = GuestRegionMmap::new(said.unwrap(), GuestAddress(0)).unwrap();
            let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
            let ram = GuestRam::from_guest_memory(memory).unwrap();
            match check(&ram, &[]) {
                Ok(()) => assert!(sound),
                Err(MemoryUserError::NotMapped { .. }) => assert!(!sound),
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[test]
    fn the_kernels_list_of_mappings_is_read() {
        const SMAPS: &str = "\
7f0000000000-7f0000200000 rw-p 00000000 00:0f 12 /anon_hugepage (deleted)
Size:               2048 kB
KernelPageSize:     2048 kB
Locked:                0 kB
VmFlags: rd wr mr mw me de ht nh
7f0000200000-7f0000300000 r--s 00001000 00:01 3 /memfd:guest-memory (deleted)
KernelPageSize:        4 kB
VmFlags: rd mr lo sd hg";
        let maps = parse_smaps(SMAPS);
        let expected = [
            Map {
                range: 0x7f00_0000_0000..0x7f00_0020_0000,
                read_write: true,
                shared: false,
                huge: true,
                page_bytes: 2 << 20,
                locked: false,
                huge_advice: Some(false),
            },
            Map {
                range: 0x7f00_0020_0000..0x7f00_0030_0000,
                read_write: false,
                shared: true,
                huge: false,
                page_bytes: 4096,
                locked: true,
                huge_advice: Some(true),
            },
        ];
        assert_eq!(maps, expected);
    }
}
