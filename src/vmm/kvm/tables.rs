//! Where things are in the KVM guest's virtual address space, and the tables that
//! say so to its processors: page tables, descriptor tables, task state.
//!
//! Pure arithmetic on numbers: writing the tables into guest memory is the caller's.
//!
//! ```text
//! guest virtual          what                                     guest physical
//! WINDOW    2 MiB        device window: local APIC, doorbell      0xFEE00000
//! VBASE     1 GiB        all guest pages, in the order of their   by MemoryLayout
//!                        numbers and without the layout's gaps
//! ```
//!
//! Everything is user-accessible and writable; memory is mapped with 2 MiB pages
//! where the layout's alignment lets it, or with 4 KiB pages throughout: see
//! [`PageTables`]. Accessed and dirty bits are set beforehand, so that no processor writes to
//! the tables. Which page holds what is laid down in [`workload`](crate::vmm::workload).

use crate::proto::layout::{MemoryLayout, Region};
use crate::proto::page::{PAGE_SIZE, PageIndex};
use crate::vmm::workload::{
    LEAF_TABLE_PAGES, MACHINE_PAGES_FIRST, PageTables, SYSTEM_PAGES, VCPUS_MAX, control_page,
    histogram_page,
};
use std::collections::BTreeMap;

/// Guest virtual address of page 0.
pub const VBASE: u64 = 1 << 30;
/// Guest virtual address of the device window.
pub const WINDOW: u64 = 2 << 20;
/// Guest physical address of the device window.
pub const WINDOW_PHYSICAL: u64 = 0xFEE0_0000;
/// Guest virtual address of the local APIC's end-of-interrupt register.
pub const LAPIC_EOI: u64 = WINDOW + 0xB0;
/// The doorbell's place in the window. No memory slot covers it, so that a store to it
/// leaves the guest: at 0 "wait for the VMM", at 1024 + 4 * vector "exception".
const DOORBELL_OFFSET: u64 = 0x10_0000;
/// Guest virtual address of the doorbell.
pub const DOORBELL: u64 = WINDOW + DOORBELL_OFFSET;
/// Guest physical address of the doorbell.
pub const DOORBELL_PHYSICAL: u64 = WINDOW_PHYSICAL + DOORBELL_OFFSET;
/// Where in the doorbell's page the exceptions begin.
pub const DOORBELL_EXCEPTIONS: u64 = 1024;
/// Distance from one exception's stub to the next one's.
pub const EXCEPTION_STUB_BYTES: u64 = 16;
/// Vector of the local APIC's timer.
pub const TIMER_VECTOR: u8 = 0x20;
/// Vector of the local APIC's spurious interrupts.
pub const SPURIOUS_VECTOR: u8 = 0xFF;

/// Device addresses below 4 GiB: IOAPIC, local APIC, KVM's own pages.
const DEVICES: std::ops::Range<u64> = 0xFEC0_0000..0x1_0000_0000;

const ROOT: PageIndex = PageIndex::new(MACHINE_PAGES_FIRST);
const POINTERS: PageIndex = PageIndex::new(MACHINE_PAGES_FIRST + 1);
const WINDOW_DIRECTORY: PageIndex = PageIndex::new(MACHINE_PAGES_FIRST + 2);
/// The page of the interrupt descriptor table.
pub const IDT: PageIndex = PageIndex::new(MACHINE_PAGES_FIRST + 3);
/// The first page of the program.
pub const CODE: PageIndex = PageIndex::new(MACHINE_PAGES_FIRST + 4);
/// The most pages that the program may have.
pub const CODE_PAGES_MAX: u64 = 4;
const PROCESSORS: u64 = CODE.get() + CODE_PAGES_MAX;
const CLOCKS: u64 = PROCESSORS + VCPUS_MAX as u64;
/// Where in a clock page the host's kernel tells of stolen time.
pub const STEAL_TIME_OFFSET: u64 = 64;
const DIRECTORIES: u64 = MACHINE_PAGES_FIRST + 16;

/// Selectors in each processor's GDT.
pub mod selector {
    /// Code at CPL 0.
    pub const KERNEL_CODE: u16 = 0x10;
    /// Data and stack at CPL 0.
    pub const KERNEL_DATA: u16 = 0x18;
    /// Data and stack at CPL 3.
    pub const USER_DATA: u16 = 0x28 | 3;
    /// Code at CPL 3.
    pub const USER_CODE: u16 = 0x30 | 3;
    /// The task state segment.
    pub const TASK: u16 = 0x40;
}

/// Last byte of the GDT, counted from its start.
pub const GDT_LIMIT: u16 = 0x4F;
/// Last byte of the task state segment, counted from its start.
pub const TASK_LIMIT: u16 = 0x67;
const TASK_OFFSET: usize = 0x100;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const UNCACHED: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const TABLE: u64 = PRESENT | WRITABLE | USER | ACCESSED;
const LEAF: u64 = TABLE | DIRTY;
const ENTRIES: u64 = 512;

/// A page of 64-bit table entries.
pub type TablePage = [u64; ENTRIES as usize];

/// A memory layout that this guest cannot be given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutUnsupported {
    /// Memory where a PC has its interrupt controllers.
    #[error(
        "memory region {start:#x}..{end:#x} covers device addresses {:#x}..{:#x}",
        DEVICES.start,
        DEVICES.end
    )]
    CoversDevices {
        /// The region's start.
        start: u64,
        /// The region's end.
        end: u64,
    },
    /// More tables than there are pages for them.
    #[error(
        "the layout needs more than {} page tables: too large, or its regions are not \
         aligned to 2 MiB",
        SYSTEM_PAGES - DIRECTORIES
    )]
    TooManyTables,
}

/// Guest virtual address of a page.
pub const fn virtual_address(page: PageIndex) -> u64 {
    VBASE + page.get() * PAGE_SIZE as u64
}

/// Guest physical address of the root of the page tables.
pub fn root_address(layout: &MemoryLayout) -> u64 {
    physical_address(layout, ROOT)
}

/// Where a system page is: every layout that passed `Workload::check` has it.
pub fn physical_address(layout: &MemoryLayout, page: PageIndex) -> u64 {
    layout.address_of(page).map_or(u64::MAX, |address| address.0)
}

/// The page with `vcpu`'s GDT and task state segment at its start and the stack for
/// interrupts at its end.
pub const fn processor_page(vcpu: u32) -> PageIndex {
    PageIndex::new(PROCESSORS + vcpu as u64)
}

/// The page in which the host's kernel keeps `vcpu`'s clock and stolen time.
pub const fn clock_page(vcpu: u32) -> PageIndex {
    PageIndex::new(CLOCKS + vcpu as u64)
}

/// Guest virtual address of the end of `vcpu`'s stack.
pub const fn stack_address(vcpu: u32) -> u64 {
    gdt_address(vcpu) + PAGE_SIZE as u64
}

/// Guest virtual address of `vcpu`'s GDT.
pub const fn gdt_address(vcpu: u32) -> u64 {
    virtual_address(processor_page(vcpu))
}

/// Guest virtual address of `vcpu`'s task state segment.
pub const fn task_address(vcpu: u32) -> u64 {
    gdt_address(vcpu) + TASK_OFFSET as u64
}

/// The page tables of a layout, page by page, the root first.
pub fn page_tables(
    layout: &MemoryLayout,
    form: PageTables,
) -> Result<Vec<(PageIndex, TablePage)>, LayoutUnsupported> {
    if layout.bytes() >> 30 > SYSTEM_PAGES - DIRECTORIES {
        return Err(LayoutUnsupported::TooManyTables);
    }
    let mut tables = Tables::new(layout, form);
    for (region, run) in layout.region_runs() {
        check_region(&region)?;
        let mut page = run.first().get();
        while page < run.end() {
            let address = region.start.0 + (page - run.first().get()) * PAGE_SIZE as u64;
            page += tables.map(page, address, run.end() - page)?;
        }
    }
    Ok(tables.pages.into_iter().map(|(page, table)| (PageIndex::new(page), table)).collect())
}

fn check_region(region: &Region) -> Result<(), LayoutUnsupported> {
    let (start, end) = (region.start.0, region.start.0 + region.pages * PAGE_SIZE as u64);
    if start < DEVICES.end && end > DEVICES.start {
        return Err(LayoutUnsupported::CoversDevices { start, end });
    }
    Ok(())
}

struct Tables<'a> {
    layout: &'a MemoryLayout,
    form: PageTables,
    pages: BTreeMap<u64, TablePage>,
    /// The table behind each directory pointer and each directory entry, by the
    /// virtual address over 1 GiB and over 2 MiB.
    directories: BTreeMap<u64, u64>,
    leaves: BTreeMap<u64, u64>,
    next: u64,
}

impl<'a> Tables<'a> {
    fn new(layout: &'a MemoryLayout, form: PageTables) -> Self {
        let mut tables = Self {
            layout,
            form,
            pages: BTreeMap::new(),
            directories: BTreeMap::new(),
            leaves: BTreeMap::new(),
            next: DIRECTORIES,
        };
        let [mut root, mut pointers, mut window] = [[0; ENTRIES as usize]; 3];
        root[0] = physical_address(layout, POINTERS) | TABLE;
        pointers[0] = physical_address(layout, WINDOW_DIRECTORY) | TABLE;
        window[(WINDOW >> 21) as usize] = WINDOW_PHYSICAL | LEAF | LARGE | UNCACHED;
        tables.pages.insert(ROOT.get(), root);
        tables.pages.insert(POINTERS.get(), pointers);
        tables.pages.insert(WINDOW_DIRECTORY.get(), window);
        tables
    }

    /// Maps `page` at `physical`, or the 512 pages from it on if all of them (of the
    /// `left` ones) fit a large page; returns how many it mapped.
    fn map(&mut self, page: u64, physical: u64, left: u64) -> Result<u64, LayoutUnsupported> {
        const LARGE_BYTES: u64 = ENTRIES * PAGE_SIZE as u64;
        let address = virtual_address(PageIndex::new(page));
        if address >> 39 != 0 {
            return Err(LayoutUnsupported::TooManyTables);
        }
        let directory = self.below(POINTERS.get(), address >> 30, address >> 30)?;
        let aligned = (address | physical).is_multiple_of(LARGE_BYTES);
        if self.form == PageTables::Large && aligned && left >= ENTRIES {
            self.set(directory, address >> 21, physical | LEAF | LARGE);
            return Ok(ENTRIES);
        }
        let table = match self.form {
            PageTables::Large => self.below(directory, address >> 21, address >> 21)?,
            PageTables::Small => self.own_leaf_table(directory, page / LEAF_TABLE_PAGES),
        };
        self.set(table, address >> 12, physical | LEAF);
        Ok(1)
    }

    /// The leaf table that has its place by the number of the pages that it maps.
    fn own_leaf_table(&mut self, directory: u64, number: u64) -> u64 {
        let page = SYSTEM_PAGES + number;
        if let std::collections::btree_map::Entry::Vacant(place) = self.pages.entry(page) {
            place.insert([0; ENTRIES as usize]);
            let physical = physical_address(self.layout, PageIndex::new(page));
            self.set(directory, number + (VBASE >> 21), physical | TABLE);
        }
        page
    }

    fn set(&mut self, table: u64, index: u64, entry: u64) {
        if let Some(entries) = self.pages.get_mut(&table) {
            entries[(index % ENTRIES) as usize] = entry;
        }
    }

    /// The table that entry `index` of `table` points to, made if there is none. `key`
    /// is the virtual address over 1 GiB or 2 MiB; the two cannot be confused, as
    /// addresses from `VBASE` on are at least 512 times 2 MiB.
    fn below(&mut self, table: u64, index: u64, key: u64) -> Result<u64, LayoutUnsupported> {
        let known = if table == POINTERS.get() { &mut self.directories } else { &mut self.leaves };
        if let Some(&page) = known.get(&key) {
            return Ok(page);
        }
        if self.next == SYSTEM_PAGES {
            return Err(LayoutUnsupported::TooManyTables);
        }
        let page = self.next;
        self.next += 1;
        known.insert(key, page);
        self.pages.insert(page, [0; ENTRIES as usize]);
        let physical = physical_address(self.layout, PageIndex::new(page));
        self.set(table, index, physical | TABLE);
        Ok(page)
    }
}

/// `vcpu`'s GDT and task state segment.
pub fn processor_tables(vcpu: u32) -> [u8; TASK_OFFSET + TASK_LIMIT as usize + 1] {
    let task = task_address(vcpu);
    let stack = stack_address(vcpu);
    let descriptors: [u64; 10] = [
        0,
        0,
        0x00AF_9B00_0000_FFFF,
        0x00CF_9300_0000_FFFF,
        0,
        0x00CF_F300_0000_FFFF,
        0x00AF_FB00_0000_FFFF,
        0,
        // A busy 64-bit task state segment.
        u64::from(TASK_LIMIT) | (task & 0xFF_FFFF) << 16 | 0x8B << 40 | (task >> 24 & 0xFF) << 56,
        task >> 32,
    ];
    let mut bytes = [0; TASK_OFFSET + TASK_LIMIT as usize + 1];
    for (place, descriptor) in bytes.chunks_exact_mut(8).zip(descriptors) {
        place.copy_from_slice(&descriptor.to_le_bytes());
    }
    bytes[TASK_OFFSET + 4..][..8].copy_from_slice(&stack.to_le_bytes());
    // The I/O permission map lies past the limit: no port is open to CPL 3.
    bytes[TASK_OFFSET + 102..][..2].copy_from_slice(&(TASK_LIMIT + 1).to_le_bytes());
    bytes
}

/// The interrupt descriptor table that sends each `(vector, address)` to ring 0.
pub fn interrupt_table(handlers: impl IntoIterator<Item = (u8, u64)>) -> TablePage {
    let mut table = [0; ENTRIES as usize];
    for (vector, address) in handlers {
        let gate = 2 * usize::from(vector);
        table[gate] = address & 0xFFFF
            | u64::from(selector::KERNEL_CODE) << 16
            | 0x8E << 40
            | (address >> 16 & 0xFFFF) << 48;
        table[gate + 1] = address >> 32;
    }
    table
}

/// The pages that every vCPU's first instructions need, and the host's kernel when it
/// restores or enters one, the most needed first. `tables` are the guest's page tables.
pub fn seed_pages(
    tables: &[(PageIndex, TablePage)],
    vcpus: u32,
    code_pages: u64,
) -> Vec<PageIndex> {
    let shared = [ROOT, POINTERS, WINDOW_DIRECTORY, IDT];
    let code = (0..code_pages).map(|page| PageIndex::new(CODE.get() + page));
    let own = (0..vcpus).flat_map(|vcpu| {
        [processor_page(vcpu), control_page(vcpu), histogram_page(vcpu), clock_page(vcpu)]
    });
    // The first leaf table of its own maps all system pages; the others map the arena.
    let first = PageIndex::new(SYSTEM_PAGES);
    let first = tables.iter().map(|(page, _)| *page).filter(move |page| *page == first);
    let system = DIRECTORIES..SYSTEM_PAGES;
    let directories =
        tables.iter().map(|(page, _)| *page).filter(|page| system.contains(&page.get()));
    shared.into_iter().chain(first).chain(code).chain(own).chain(directories).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::layout::GuestAddress;
    use crate::vmm::workload::{MachineForm, Pattern, Workload};

    /// Walks the tables as a processor does.
    fn translate(tables: &BTreeMap<u64, TablePage>, root: u64, address: u64) -> Option<u64> {
        let mut table = root;
        for shift in [39, 30, 21, 12] {
            let entry = tables.get(&table)?[(address >> shift & 511) as usize];
            if entry & PRESENT == 0 {
                return None;
            }
            let mask = (1u64 << shift) - 1;
            let base = entry & 0x000F_FFFF_FFFF_F000;
            if shift == 12 || entry & LARGE != 0 {
                return Some(base | address & mask);
            }
            table = base;
        }
        None
    }

    fn check_translation(
        layout: &MemoryLayout,
        form: PageTables,
        pages: impl Iterator<Item = u64>,
    ) {
        let tables: BTreeMap<u64, TablePage> = page_tables(layout, form)
            .unwrap()
            .into_iter()
            .map(|(page, table)| (layout.address_of(page).unwrap().0, table))
            .collect();
        let root = root_address(layout);
        for page in pages.map(PageIndex::new) {
            let expected = layout.address_of(page).unwrap().0 + 123;
            assert_eq!(translate(&tables, root, virtual_address(page) + 123), Some(expected));
        }
        let end = VBASE + layout.bytes();
        assert_eq!(translate(&tables, root, end), None);
        assert_eq!(translate(&tables, root, VBASE - 1), None);
        assert_eq!(translate(&tables, root, DOORBELL), Some(DOORBELL_PHYSICAL));
    }

    #[test]
    fn every_page_is_mapped_in_order_across_gaps_and_odd_edges() {
        let region = |start, pages| Region { start: GuestAddress(start), pages };
        let odd = MemoryLayout::new(vec![
            region(0, 1000),
            region(0x80_3000, 700),
            region(0x1_0000_0000, 513),
        ])
        .unwrap();
        let sixteen = MemoryLayout::pc((16 << 30) / 4096).unwrap();
        for form in [PageTables::Large, PageTables::Small] {
            check_translation(&odd, form, 0..odd.pages());
            check_translation(&sixteen, form, (0..sixteen.pages()).step_by(511));
        }
    }

    #[test]
    fn in_the_small_form_every_leaf_table_lies_between_system_pages_and_arena() {
        let workload = Workload {
            pattern: Pattern::Random,
            seed: 1,
            vcpus: 1,
            think_ns: 0,
            step_limit: 0,
            zero_pages: 0,
            form: MachineForm { page_tables: PageTables::Small, ..MachineForm::default() },
            trace: None,
        };
        for pages in [1000, (4 << 30) / 4096, (8 << 30) / 4096 + 1] {
            let layout = MemoryLayout::pc(pages).unwrap();
            let tables = page_tables(&layout, PageTables::Small).unwrap();
            let leaves = tables.iter().filter(|(page, _)| page.get() >= SYSTEM_PAGES);
            let leaves: Vec<u64> = leaves.map(|(page, _)| page.get()).collect();
            let expected: Vec<u64> = (SYSTEM_PAGES..workload.arena(&layout)).collect();
            assert_eq!(leaves, expected, "{pages} pages");
            let large = tables.iter().filter(|(page, _)| *page != WINDOW_DIRECTORY);
            assert!(!large.flat_map(|(_, table)| table).any(|entry| entry & LARGE != 0));
        }
    }

    #[test]
    fn unsuitable_layouts_are_refused() {
        let region = |start, pages| Region { start: GuestAddress(start), pages };
        let apic = MemoryLayout::new(vec![region(0, 1024), region(0xFEDF_F000, 2)]).unwrap();
        assert!(matches!(
            page_tables(&apic, PageTables::Large),
            Err(LayoutUnsupported::CoversDevices { .. })
        ));
        let unaligned =
            MemoryLayout::new(vec![region(0, 1023), region(4 << 30, (2 << 30) / 4096)]).unwrap();
        assert_eq!(
            page_tables(&unaligned, PageTables::Large),
            Err(LayoutUnsupported::TooManyTables)
        );
        let vast = MemoryLayout::pc((1 << 40) / 4096).unwrap();
        for form in [PageTables::Large, PageTables::Small] {
            assert_eq!(page_tables(&vast, form), Err(LayoutUnsupported::TooManyTables));
        }
    }

    #[test]
    fn the_seeds_of_a_large_guest_are_few() {
        let layout = MemoryLayout::pc((8 << 30) / 4096).unwrap();
        for form in [PageTables::Large, PageTables::Small] {
            let tables = page_tables(&layout, form).unwrap();
            let seeds = seed_pages(&tables, VCPUS_MAX, 1);
            assert!(seeds.len() <= 32, "{form:?}: {}", seeds.len());
        }
    }
}
