//! [`Guarded`]: reading guest memory that may turn out to be unreadable, and writing to huge
//! pages that may turn out not to be there.
//!
//! A page of the source can be lost: its file was shortened, its backing store fails, or the
//! memory itself is damaged (the kernel knows the page as poisoned, or finds out by the very
//! read). Reading it through the mapping gives `SIGBUS`. The reads here are done by a few
//! instructions of their own; a handler for that signal lets one that fails there end with
//! its place, and passes on every other `SIGBUS`.
//!
//! It is done this way, and not by asking the kernel (`MADV_POPULATE_READ`, `pread`):
//! * damage that nobody knows of shows only when the bytes are read, and read by a process:
//!   the kernel, where it copies from such a page for `pread`, stops the whole host;
//! * it costs no system call, and leaves the bytes in the cache for whoever reads them next.
//!
//! What it found readable can still be lost a moment later, under whoever reads the bytes
//! next; that process then ends by `SIGBUS`.

use super::ram::GuestRam;
use crate::proto::page::{PAGE_SIZE, PageRun};
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};

#[cfg(not(target_arch = "x86_64"))]
compile_error!("guarded reads are written for x86-64 only, as the reference VMM is");

/// The step in which memory is looked at, and the precision in which a bad place is told.
const LINE: usize = 64;

// The first two take an address and a length, a multiple of 64 and not 0, and return how many
// bytes they came through; with the lowest bit set if the next 64 could not be read. Everything
// between the first and the last label may fault, and goes on at `recover` if it does.
core::arch::global_asm!(
    ".pushsection .text.postcopy_guarded,\"ax\",@progbits",
    ".balign 16",
    ".globl postcopy_guarded_begin",
    ".hidden postcopy_guarded_begin",
    "postcopy_guarded_begin:",
    // A byte of each line.
    ".globl postcopy_guarded_touch",
    ".hidden postcopy_guarded_touch",
    "postcopy_guarded_touch:",
    "xor eax, eax",
    "2: mov cl, byte ptr [rdi + rax]",
    "add rax, 64",
    "cmp rax, rsi",
    "jb 2b",
    "ret",
    // Up to the first line that is not all zero.
    ".globl postcopy_guarded_zero",
    ".hidden postcopy_guarded_zero",
    "postcopy_guarded_zero:",
    "xor eax, eax",
    "2: movdqu xmm0, [rdi + rax]",
    "movdqu xmm1, [rdi + rax + 16]",
    "movdqu xmm2, [rdi + rax + 32]",
    "movdqu xmm3, [rdi + rax + 48]",
    "por xmm0, xmm1",
    "por xmm2, xmm3",
    "por xmm0, xmm2",
    "pxor xmm1, xmm1",
    "pcmpeqb xmm0, xmm1",
    "pmovmskb ecx, xmm0",
    "cmp ecx, 0xffff",
    "jne 3f",
    "add rax, 64",
    "cmp rax, rsi",
    "jb 2b",
    "3: ret",
    // A plain copy; returns 0.
    ".globl postcopy_guarded_copy",
    ".hidden postcopy_guarded_copy",
    "postcopy_guarded_copy:",
    "xor eax, eax",
    "mov rcx, rdx",
    "rep movsb",
    "ret",
    ".globl postcopy_guarded_end",
    ".hidden postcopy_guarded_end",
    "postcopy_guarded_end:",
    ".globl postcopy_guarded_recover",
    ".hidden postcopy_guarded_recover",
    "postcopy_guarded_recover:",
    "or rax, 1",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    fn postcopy_guarded_touch(start: *const u8, bytes: usize) -> usize;
    fn postcopy_guarded_zero(start: *const u8, bytes: usize) -> usize;
    fn postcopy_guarded_copy(to: *mut u8, from: *const u8, bytes: usize) -> usize;
    // Labels, not functions.
    fn postcopy_guarded_begin();
    fn postcopy_guarded_end();
    fn postcopy_guarded_recover();
}

/// The right to read and write guarded: the handler is installed.
#[derive(Clone, Copy, Debug)]
pub struct Guarded(());

/// What a page was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// All its bytes are zero.
    Zero,
    /// Some are not. Bytes behind those have not been looked at.
    Data,
    /// It cannot be read.
    Unreadable,
}

static OLD_ACTION: OnceLock<SigAction> = OnceLock::new();

impl Guarded {
    /// Installs the handler, once in a process. What was there before gets every `SIGBUS`
    /// that is not of a guarded read; whoever installs another later must do the same.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new() -> io::Result<Self> {
        static INSTALLED: Mutex<bool> = Mutex::new(false);
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if !*installed {
            let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
            let action = SigAction::new(SigHandler::SigAction(bus_error), flags, SigSet::empty());
            // SAFETY: the handler touches its arguments, a value that is set once, and
            // async-signal-safe functions only.
            let old = unsafe { sigaction(Signal::SIGBUS, &action) }?;
            let _ = OLD_ACTION.set(old);
            *installed = true;
        }
        Ok(Self(()))
    }

    /// How many pages of `run` can be read, from its first one on. All of their bytes were
    /// looked at, and are in the cache. It takes a run that lies in one segment.
    ///
    /// # Panics
    /// If it does not, or is not in the layout.
    pub fn readable(self, ram: &GuestRam, run: PageRun) -> u64 {
        let (segment, part) = ram.first_part(run);
        assert!(part == run, "{run:?} is not in one segment");
        let start = segment.address_of(run.first()) as *const u8;
        // SAFETY: the range is of a mapping that `ram` keeps; whether it can be read is what
        // is found out. Nothing is made of the bytes.
        let done = unsafe { postcopy_guarded_touch(start, run.bytes()) };
        (done / PAGE_SIZE) as u64
    }

    /// Looks whether a page is zero, no further than up to its first bytes that are not.
    ///
    /// # Panics
    /// If it is not in the layout.
    #[inline]
    pub fn look(self, ram: &GuestRam, page: crate::proto::page::PageIndex) -> Look {
        let start = ram.page_ptr(page).as_ptr();
        // SAFETY: as above.
        match unsafe { postcopy_guarded_zero(start, PAGE_SIZE) } {
            PAGE_SIZE => Look::Zero,
            done if done.is_multiple_of(LINE) => Look::Data,
            _ => Look::Unreadable,
        }
    }
}

impl Guarded {
    /// Writes `bytes` from `offset` on, counted from where `page` begins. Whether it could be
    /// done: of hugetlbfs memory a page may be missing in the file, and in the host's pool. As for
    /// [`GuestRam::write_run`], not where writing is trapped.
    ///
    /// # Panics
    /// If they do not lie in the page's segment.
    pub fn write(
        self,
        ram: &GuestRam,
        page: crate::proto::page::PageIndex,
        offset: usize,
        bytes: &[u8],
    ) -> bool {
        let segment = ram.segment_of(page);
        let offset = segment.offset_of(page) + offset;
        let end = offset.checked_add(bytes.len());
        assert!(end.is_some_and(|end| end <= segment.bytes()), "{page} and {offset}");
        // SAFETY: both ranges are of this length and mapped; guest memory and a slice of ours do
        // not overlap. Whether the first can be written to is what is found out.
        let to = unsafe { segment.start().add(offset) };
        // SAFETY: as above.
        unsafe { postcopy_guarded_copy(to.as_ptr(), bytes.as_ptr(), bytes.len()) == 0 }
    }
}

extern "C" fn bus_error(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    const RIP: usize = libc::REG_RIP as usize;
    let guarded =
        postcopy_guarded_begin as *const () as usize..postcopy_guarded_end as *const () as usize;
    // SAFETY: the kernel hands the context of the thread that was interrupted, to be changed.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    if guarded.contains(&(registers[RIP] as usize)) {
        registers[RIP] = postcopy_guarded_recover as *const () as libc::greg_t;
        return;
    }
    match OLD_ACTION.get().map(SigAction::handler) {
        Some(SigHandler::SigAction(old)) => old(signal, info, context),
        Some(SigHandler::Handler(old)) => old(signal),
        Some(SigHandler::SigIgn) => {}
        Some(SigHandler::SigDfl) | None => {
            // SAFETY: both are async-signal-safe; the process ends by the signal, as it
            // would have without this handler.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::layout::{GuestAddress, MemoryLayout, Region};
    use crate::proto::page::PageIndex;
    use std::fs::File;
    use vm_memory::FileOffset;

    #[test]
    fn pages_behind_the_end_of_a_shortened_file_are_found_and_all_others_are_read() {
        let file: File = tempfile::tempfile().unwrap();
        file.set_len(8 * PAGE_SIZE as u64).unwrap();
        let layout = MemoryLayout::new(vec![Region { start: GuestAddress(0), pages: 8 }]).unwrap();
        let kept = file.try_clone().unwrap();
        let ram = GuestRam::attach_read_only(layout, vec![FileOffset::new(file, 0)]).unwrap();
        use std::os::unix::fs::FileExt;
        kept.write_all_at(&[9], 2 * PAGE_SIZE as u64 - 1).unwrap();
        let guarded = Guarded::new().unwrap();
        let page = |page| guarded.look(&ram, PageIndex::new(page));
        let readable = |first, count| {
            guarded.readable(&ram, PageRun::new(PageIndex::new(first), count).unwrap())
        };
        assert_eq!((page(0), page(1), page(7)), (Look::Zero, Look::Data, Look::Zero));
        assert_eq!(readable(0, 8), 8);
        kept.set_len(5 * PAGE_SIZE as u64 - 100).unwrap();
        assert_eq!((page(4), page(5), page(7)), (Look::Zero, Look::Unreadable, Look::Unreadable));
        assert_eq!([readable(0, 8), readable(3, 2), readable(5, 1), readable(6, 2)], [5, 2, 0, 0]);
        // The stack and the registers are as they were.
        for first in 0..8 {
            assert_eq!(readable(first, 8 - first), 5u64.saturating_sub(first));
        }
    }

    #[test]
    fn one_byte_anywhere_makes_a_page_nonzero() {
        use crate::memory::ram::Backing;
        let ram = GuestRam::new(MemoryLayout::flat(1).unwrap(), Backing::Memfd).unwrap();
        let (guarded, page) = (Guarded::new().unwrap(), PageIndex::new(0));
        let mut content = vec![0; PAGE_SIZE];
        for at in 0..PAGE_SIZE {
            content[at] = 0x80;
            ram.write_run(PageRun::single(page), &content);
            assert_eq!(guarded.look(&ram, page), Look::Data, "byte {at}");
            content[at] = 0;
        }
        ram.write_run(PageRun::single(page), &content);
        assert_eq!(guarded.look(&ram, page), Look::Zero);
    }
}
