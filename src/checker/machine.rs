//! The KVM guest's own pages: page tables, descriptors, clocks. Written from the text of
//! `vmm::workload`, not from its code.

use super::model::{Page, SYSTEM_PAGES, WORDS};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is known of a KVM guest's machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckMachine {
    /// Guest memory: the first address and the pages of each region, in order.
    pub regions: Vec<(u64, u64)>,
    /// Whether each page has a leaf table entry of its own (the 4k form).
    pub small_pages: bool,
}

impl CheckMachine {
    /// The machine with the memory of a PC: below 3 GiB, and from 4 GiB on.
    pub fn pc(pages: u64, small_pages: bool) -> Self {
        let below = pages.min((3 << 30) / 4096);
        let above = (1 << 32, pages - below);
        let regions = [(0, below), above].into_iter().filter(|(_, pages)| *pages > 0);
        Self { regions: regions.collect(), small_pages }
    }

    /// Leaf tables between system pages and arena.
    pub(super) fn leaf_tables(&self, pages: u64) -> u64 {
        if self.small_pages { pages.div_ceil(512) } else { 0 }
    }

    /// Where `page` is, and how many pages of its region there are from it on.
    fn place(&self, page: u64) -> Option<(u64, u64)> {
        let mut first = 0;
        for &(start, pages) in &self.regions {
            if page < first + pages {
                return Some((start + (page - first) * 4096, first + pages - page));
            }
            first += pages;
        }
        None
    }

    fn address(&self, page: u64) -> u64 {
        self.place(page).map_or(0, |(address, _)| address)
    }
}

pub(super) const ROOT: u64 = 64;
const POINTERS: u64 = 65;
const WINDOW: u64 = 66;
pub(super) const GATES: u64 = 67;
pub(super) const PROGRAM: std::ops::Range<u64> = 68..72;
pub(super) const PROCESSORS: u64 = 72;
pub(super) const CLOCKS: u64 = 76;
const TABLES: u64 = 80;

const TABLE: u64 = 0x27;
const LEAF: u64 = 0x67;
const LARGE: u64 = 0xE7;
const DEVICES: u64 = 0xFEE0_00F7;

/// The virtual address of a page.
const fn virtual_address(page: u64) -> u64 {
    (1 << 30) + page * 4096
}

/// The page tables of `machine` with `pages` pages, by page, without the leaf tables of
/// the 4k form. Or why it can have none.
pub(super) fn tables(machine: &CheckMachine, pages: u64) -> Result<BTreeMap<u64, Page>, String> {
    let ends = |(start, pages): &(u64, u64)| pages.checked_mul(4096)?.checked_add(*start);
    if let Some((start, pages)) = machine.regions.iter().find(|region| ends(region).is_none()) {
        return Err(format!("its region of {pages} pages at {start:#x} goes beyond all addresses"));
    }
    let told: u64 = machine.regions.iter().map(|region| region.1).fold(0, u64::saturating_add);
    if told != pages {
        return Err(format!("its regions have {told} pages, not {pages}"));
    }
    let mut tables = BTreeMap::from([(ROOT, [0; WORDS]), (WINDOW, [0; WORDS])]);
    let mut pointers = [0; WORDS];
    tables.entry(ROOT).and_modify(|root| root[0] = machine.address(POINTERS) | TABLE);
    tables.entry(WINDOW).and_modify(|window| window[1] = DEVICES);
    pointers[0] = machine.address(WINDOW) | TABLE;
    let mut next = TABLES;
    let mut take = || {
        let taken = next;
        next += 1;
        if taken < SYSTEM_PAGES { Ok(taken) } else { Err("it needs too many page tables") }
    };
    // Each GiB of virtual addresses, and each 2 MiB in it.
    for gib in 0..pages.div_ceil(512 * 512) {
        let directory = take()?;
        *pointers.get_mut(1 + gib as usize).ok_or("it has too much memory")? =
            machine.address(directory) | TABLE;
        let mut entries = [0; WORDS];
        for (slot, entry) in (gib * 512..).zip(&mut entries) {
            let first = slot * 512;
            let Some((address, left)) = machine.place(first) else { break };
            *entry = if machine.small_pages {
                machine.address(SYSTEM_PAGES + slot) | TABLE
            } else if left >= 512 && address % (2 << 20) == 0 {
                address | LARGE
            } else {
                let table = take()?;
                tables.insert(table, leaf_table(machine, slot));
                machine.address(table) | TABLE
            };
        }
        tables.insert(directory, entries);
    }
    tables.insert(POINTERS, pointers);
    Ok(tables)
}

/// The leaf table of the 512 pages from `512 * slot` on.
pub(super) fn leaf_table(machine: &CheckMachine, slot: u64) -> Page {
    let mut page = slot * 512;
    [0; WORDS].map(|none| {
        let entry = machine.place(page).map_or(none, |(address, _)| address | LEAF);
        page += 1;
        entry
    })
}

/// The interrupt gates. Of those to the program's timer code the address is taken as it
/// is, if it is one in the program.
pub(super) fn gates(found: &Page) -> Page {
    let gate = |address: u64| {
        let low = address & 0xFFFF | 0x10 << 16 | 0x8E << 40 | (address >> 16 & 0xFFFF) << 48;
        [low, address >> 32]
    };
    let program = virtual_address(PROGRAM.start)..virtual_address(PROGRAM.end);
    let mut words = [0; WORDS];
    for vector in 0..32 {
        let [low, high] = gate(program.start + 16 * vector as u64);
        (words[2 * vector], words[2 * vector + 1]) = (low, high);
    }
    for vector in [0x20, 0xFF] {
        let [low, high] = [found[2 * vector], found[2 * vector + 1]];
        let address = low & 0xFFFF | low >> 48 << 16 | high << 32;
        let inside = if program.contains(&address) { address } else { program.start };
        (words[2 * vector], words[2 * vector + 1]) = (gate(inside)[0], gate(inside)[1]);
    }
    words
}

/// A vCPU's descriptors. The upper half of the page, in which the stack is, is taken as it
/// is.
pub(super) fn descriptors(vcpu: u32, found: &Page) -> Page {
    let page = virtual_address(PROCESSORS + u64::from(vcpu));
    let task = page + 0x100;
    let mut bytes = [0; 4096];
    let segments: [u64; 10] = [
        0,
        0,
        0x00AF_9B00_0000_FFFF,
        0x00CF_9300_0000_FFFF,
        0,
        0x00CF_F300_0000_FFFF,
        0x00AF_FB00_0000_FFFF,
        0,
        // The limit; the base in two parts; a present, busy 64-bit task state segment.
        0x67 | (task & 0xFF_FFFF) << 16 | 0x8B << 40 | (task >> 24 & 0xFF) << 56,
        task >> 32,
    ];
    for (place, segment) in bytes.chunks_exact_mut(8).zip(segments) {
        place.copy_from_slice(&segment.to_le_bytes());
    }
    bytes[0x104..0x10C].copy_from_slice(&(page + 4096).to_le_bytes());
    bytes[0x100 + 102..0x100 + 104].copy_from_slice(&0x68u16.to_le_bytes());
    let mut words = super::stream::words(&bytes);
    words[WORDS / 2..].copy_from_slice(&found[WORDS / 2..]);
    words
}

/// A vCPU's clock page. The kernel writes it at times of its own choosing, so most of it
/// is taken as it is; but a version is even (an odd one means a write that was torn), flags
/// and reserved bytes have what is defined for them, and all around is zero.
pub(super) fn clock(found: &Page) -> Page {
    let mut words = [0; WORDS];
    // The clock: version and padding; counter; time; multiplier, shift, flags.
    let even = 0xFFFF_FFFE;
    words[0] = found[0] & even;
    if words[0] != 0 {
        (words[1], words[2]) = (found[1], found[2]);
        // The multiplier's highest bit is set, the shift is small, two flags are defined.
        let shift = (found[3] >> 32) as u8 as i8;
        let plausible = (-31..=31).contains(&shift);
        let kept = if plausible { 0x03FF_FFFF_FFFF } else { 0x0300_FFFF_FFFF };
        words[3] = found[3] & kept | 1 << 31;
    }
    // Stolen time: nanoseconds; version and flags; whether the vCPU is preempted (1), and
    // is to flush its translations (2).
    words[8] = found[8];
    words[9] = found[9] & even;
    words[10] = found[10] & 0b11;
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_taken_if_it_is_one() {
        let mut page = [0; WORDS];
        assert_eq!(clock(&page), page);
        page[..4].copy_from_slice(&[6, 1 << 40, 5_000_000, 0x01FF_8000_0001]);
        page[8..11].copy_from_slice(&[123, 4, 1]);
        assert_eq!(clock(&page), page);
        let wrong =
            [(0, 7), (0, 1 << 32), (3, 1), (3, 0x0040_8000_0000), (9, 3), (9, 1 << 32), (10, 4)];
        for (word, value) in wrong.into_iter().chain([(4, 1), (7, 1), (11, 1), (511, 1)]) {
            let mut wrong = page;
            wrong[word] = value;
            assert_ne!(clock(&wrong), wrong, "word {word} as {value:#x}");
        }
    }

    #[test]
    fn regions_that_are_not_the_memory_are_refused() {
        let mut machine = CheckMachine::pc(1000, false);
        assert!(tables(&machine, 1000).is_ok());
        assert!(tables(&machine, 1001).is_err());
        machine.regions = vec![(0, u64::MAX), (0, u64::MAX)];
        assert!(tables(&machine, 1000).is_err());
        machine.regions = vec![(0, 999), (u64::MAX - 4095, 1)];
        assert!(tables(&machine, 1000).unwrap_err().contains("beyond all addresses"));
        machine.regions = vec![(0, 999), (u64::MAX - 8191, 1)];
        assert!(tables(&machine, 1000).is_ok());
        let machine = CheckMachine::pc(1 << 30, true);
        assert!(tables(&machine, 1 << 30).unwrap_err().contains("too many"));
    }
}
