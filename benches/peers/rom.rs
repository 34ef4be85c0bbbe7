//! The firmware of QEMU's guest: the few instructions from a PC's reset to the first one of
//! the program. There is no other boot: the program lies in memory already.
//!
//! A processor that loads its page tables' root goes on at the next address *by the new
//! tables*. So the ROM has small tables of its own that map the page with the program's first
//! instruction to a page of the ROM, in which the load stands right before that address: the
//! next instruction is then the program's.

use postcopy::vmm::kvm::image::Entry;

const ROM_BYTES: usize = 64 << 10;
/// Where the PC shows the ROM below 1 MiB.
const ROM_ADDRESS: u64 = 0xF_0000;
const SEGMENT: u16 = (ROM_ADDRESS >> 4) as u16;
/// Where a processor begins.
const RESET: usize = 0xFFF0;

/// Parts of the ROM, by their offsets.
const START: usize = 0;
const GDT: usize = 0x100;
const GDT_POINTER: usize = 0x120;
const ROOT: usize = 0x1000;
const POINTERS: usize = 0x2000;
const LOW_DIRECTORY: usize = 0x3000;
const DIRECTORY: usize = 0x4000;
const LEAVES: usize = 0x5000;
const BRIDGE: usize = 0x6000;

const CODE_SELECTOR: u16 = 8;
/// 64-bit code, accessed, so that no processor writes to the ROM.
const CODE_DESCRIPTOR: u64 = 0x00AF_9B00_0000_FFFF;
/// Present, writable, accessed.
const TABLE: u64 = 0x23;
/// The same, dirty.
const LEAF: u64 = 0x63;
/// The same, of 2 MiB.
const LARGE: u64 = 0xE3;

/// The ROM that enters the program at `entry`. `None` if the addresses do not fit: they
/// must be below 4 GiB, and leave room before the first instruction in its page.
pub fn rom(entry: &Entry) -> Option<Vec<u8>> {
    let mut rom = vec![0; ROM_BYTES];
    let mut put = |at: usize, bytes: &[u8]| rom[at..][..bytes.len()].copy_from_slice(bytes);
    let bridge = bridge(entry)?;
    let begin = u32::try_from(entry.instruction).ok()?.checked_sub(bridge.len() as u32)?;
    let offset = (entry.instruction & 0xFFF) as usize;
    put(BRIDGE + offset.checked_sub(bridge.len())?, &bridge);
    put(START, &start(begin));
    // Far jump to the start.
    put(RESET, &[0xEA, START as u8, 0, SEGMENT as u8, (SEGMENT >> 8) as u8]);

    put(GDT + usize::from(CODE_SELECTOR), &CODE_DESCRIPTOR.to_le_bytes());
    put(GDT_POINTER, &(CODE_SELECTOR + 7).to_le_bytes());
    put(GDT_POINTER + 2, &(address(GDT) as u32).to_le_bytes());

    let mut map = |table: usize, index: u64, to: u64| {
        put(table + 8 * (index & 511) as usize, &to.to_le_bytes());
    };
    map(ROOT, 0, address(POINTERS) | TABLE);
    map(POINTERS, 0, address(LOW_DIRECTORY) | TABLE);
    // The first 2 MiB as they are, the ROM among them.
    map(LOW_DIRECTORY, 0, LARGE);
    // Its own GiB: below 4 GiB, and not the first.
    let gib = entry.instruction >> 30;
    if gib == 0 {
        return None;
    }
    map(POINTERS, gib, address(DIRECTORY) | TABLE);
    map(DIRECTORY, entry.instruction >> 21, address(LEAVES) | TABLE);
    map(LEAVES, entry.instruction >> 12, address(BRIDGE) | LEAF);
    Some(rom)
}

fn address(offset: usize) -> u64 {
    ROM_ADDRESS + offset as u64
}

/// From real mode to 64-bit code at `begin`.
fn start(begin: u32) -> Vec<u8> {
    let pointer = (GDT_POINTER as u16).to_le_bytes();
    let root = (address(ROOT) as u32).to_le_bytes();
    let selector = CODE_SELECTOR.to_le_bytes();
    [
        &[0xFA][..],                     // cli
        &[0x2E, 0x66, 0x0F, 0x01, 0x16], // lgdt cs:[GDT_POINTER]
        &pointer,
        &[0x66, 0xB8, 0x20, 0, 0, 0, 0x0F, 0x22, 0xE0], // cr4: physical address extension
        &[0x66, 0xB8],                                  // cr3: the ROM's own tables
        &root,
        &[0x0F, 0x22, 0xD8],
        &[0x66, 0xB9, 0x80, 0, 0, 0xC0], // EFER: long mode
        &[0x66, 0xB8, 0x00, 0x01, 0, 0],
        &[0x66, 0x31, 0xD2, 0x0F, 0x30],
        &[0x66, 0xB8, 0x11, 0, 0x01, 0x80], // cr0: paging, write protection,
        &[0x0F, 0x22, 0xC0],                // protected mode
        &[0x66, 0xEA],                      // jmp CODE_SELECTOR:begin
        &begin.to_le_bytes(),
        &selector,
    ]
    .concat()
}

/// 64-bit code that ends where the program begins.
fn bridge(entry: &Entry) -> Option<Vec<u8>> {
    let control = entry.control.to_le_bytes();
    let root = u32::try_from(entry.page_tables).ok()?.to_le_bytes();
    Some(
        [
            &[0x49, 0xBF][..], // mov r15, the control page
            &control,
            &[0xB8], // mov eax, the root
            &root,
            &[0x0F, 0x22, 0xD8], // mov cr3, rax
        ]
        .concat(),
    )
}
