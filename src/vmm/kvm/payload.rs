//! Where the program's parts begin, and how it is put into guest memory.

use super::tables::*;
use crate::proto::page::PAGE_SIZE;

unsafe extern "C" {
    #[link_name = "postcopy_payload_start"]
    static START: u8;
    #[link_name = "postcopy_payload_timer"]
    static TIMER: u8;
    #[link_name = "postcopy_payload_spurious"]
    static SPURIOUS: u8;
    #[link_name = "postcopy_payload_entry"]
    static ENTRY: u8;
    #[link_name = "postcopy_payload_end"]
    static END: u8;
}

/// The program's bytes, to be put at page [`CODE`].
pub fn program() -> &'static [u8] {
    let length = offset(&raw const END) as usize;
    // SAFETY: the assembler put this many bytes between the two labels, in a section
    // that is never written.
    unsafe { std::slice::from_raw_parts(&raw const START, length) }
}

/// How many pages the program has.
pub fn code_pages() -> u64 {
    program().len().div_ceil(PAGE_SIZE) as u64
}

/// Guest virtual address of the first instruction.
pub fn entry_address() -> u64 {
    address(&raw const ENTRY)
}

/// What each vector enters: the exceptions' stubs, the timer's and the spurious one's.
pub fn handlers() -> impl Iterator<Item = (u8, u64)> {
    let exceptions = (0..32u8)
        .map(|vector| (vector, virtual_address(CODE) + u64::from(vector) * EXCEPTION_STUB_BYTES));
    exceptions.chain([
        (TIMER_VECTOR, address(&raw const TIMER)),
        (SPURIOUS_VECTOR, address(&raw const SPURIOUS)),
    ])
}

fn address(label: *const u8) -> u64 {
    virtual_address(CODE) + offset(label)
}

fn offset(label: *const u8) -> u64 {
    (label as usize - (&raw const START) as usize) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_fits_and_its_exception_stubs_lie_where_the_table_says() {
        assert!(code_pages() <= CODE_PAGES_MAX);
        for vector in 0..32usize {
            let stub = &program()[vector * EXCEPTION_STUB_BYTES as usize..];
            // mov [imm32], eax
            assert_eq!(stub[..3], [0x89, 0x04, 0x25]);
            let address = u32::from_le_bytes(stub[3..7].try_into().unwrap());
            assert_eq!(u64::from(address), DOORBELL + DOORBELL_EXCEPTIONS + 4 * vector as u64);
            // jmp back to the mov
            assert_eq!(stub[7..9], [0xEB, 0xF7]);
        }
        assert_eq!(
            program()[(address(&raw const SPURIOUS) - virtual_address(CODE)) as usize..][..2],
            [0x48, 0xCF]
        );
    }
}
