//! What the reference guests do, and where they keep it in guest memory.
//!
//! Both guests (the KVM payload in `kvm::payload`, the threads in `process`)
//! follow this one specification, and the checker (`postcopy check`, which
//! shares no code with this file) recomputes it from scratch. All arithmetic is
//! on `u64` and wraps; `G` is `0x9E3779B97F4A7C15`.
//!
//! ```text
//! mix(x):          x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27;
//!                  x *= 0x94D049BB133111EB; x ^= x >> 31
//! tag(page)      = mix(seed + page * G) | 1
//! fill(page, i)  = mix(tag(page) + i * G)
//! vseed(v)       = mix(seed + (v + 1) * G)
//! mulhi(a, b)    = the upper 64 bits of the 128-bit product
//! ```
//!
//! **Memory map**, in page numbers (not addresses: see `MemoryLayout`):
//!
//! ```text
//! 0 .. 512            system pages: page 16 + 2v is vCPU v's control page, 17 + 2v its
//!                     stall histogram; the KVM guest keeps its tables, stacks and code
//!                     in 64 .. 512 (see below); all others hold filler
//! 512 .. A            leaf page tables, in the KVM guest's 4k form; else A = 512
//! A .. P - Z          arena: cut into `vcpus` slices of n = (P - Z - A) / vcpus pages,
//!                     in vCPU order; what is left over after the last slice is filler
//! P - Z .. P          tail: zero, never written (its first half is holes, the second was
//!                     written with zeroes)
//! ```
//!
//! **A filler or arena page** has 512 words: word 0 = `tag`, word 1 = visits `c`
//! that wrote (0 at first), word 2 = in the arena the next slice-relative index of
//! the pointer chase (elsewhere 0), words 3.. = `fill(page, i)`.
//!
//! **Step `s`** (from 0) of vCPU `v`, with `h = mix(vseed(v) + s * G)`, picks a
//! slice-relative index `k` by the pattern:
//!
//! ```text
//! sequential        k = cursor; cursor += 1, at n back to 0
//! strided           k = cursor; cursor += 16; if cursor >= n: lane += 1, at 16 back
//!                   to 0; cursor = lane
//! random            k = mulhi(h, n)
//! zipf              u = h >> 32; u = u*u >> 32; u = u*u >> 32; rank = u*n >> 32;
//!                   k = mulhi(mix(vseed(v) + rank * G), n)      (theta = 0.75)
//! hot-set-with-scan if s % 8 == 7: k = cursor; cursor += 1, at n back to 0
//!                   else k = mulhi(h, max(n / 16, 1))
//! pointer-chase     k = cursor; cursor = word 2 of page k, which must be below n
//! read-modify-write k = mulhi(h, n)
//! ```
//!
//! The pattern `trace` has the guest touch the pages of a [`Trace`] instead, wherever in the
//! arena they are: with `m` touches of vCPU `v` in it, step `s` visits page `p` of touch
//! `(s - b) % m` (of touch `s % m` before step `b`) and leaves the tail alone. `b` is
//! `TRACE_START`: 0, until the guest has moved for the first time; then the steps it had made,
//! since a trace tells what follows a switchover. At its end it begins anew. A step comes no
//! earlier than its touch's `wait_us` after the end of the step before: what the guest stood
//! still in between it does not catch up on.
//!
//! and visits page `p = slice + k`: word 0 must be `tag(p)`; word `4 + s % 128` must
//! be `fill(p, 4 + s % 128)`; if `s & write_mask == 0` (mask 3, read-modify-write 0):
//! `word[256 + c % 256] += tag(p)`, then word 1 becomes `c + 1`. If there is a tail and
//! `s % 64 == 0`: word `(s / 64) % 512` of page `tail + mulhi(mix(h), Z)` must be 0.
//! Then `STEPS` becomes `s + 1`. A wrong word sets `STATUS` to [`STATUS_FAILED`], before
//! the step has written anything; a word 2 that is too large is "expected" to be `n - 1`.
//! `CURSOR` and `LANE` stay 0 in a pattern that does not name them.
//!
//! The pointer chase is one cycle over the slice: with `M` the least power of two not
//! below `n`, `f(x) = (0x5851F42D4C957F2D * x + (vseed(v) | 1)) mod M`, the index after
//! `k` is the first of `f(k), f(f(k)), ...` that is below `n`.
//!
//! **Instruments.** With `t0`, `t1` the time-stamp counter before a step's first access to
//! the arena (the pointer chase's word 2 included) and after its last (the tail's
//! included): if `t1 - t0` is above `STALL_THRESHOLD`, the histogram's bucket, `STALLS`
//! and `STALL_SUM` grow; `MAX_GAP` is the largest distance between the `t1` of two
//! successive steps (0 for a guest's first step, told by a `LAST_END` of 0). All of this is
//! stored before `STEPS`. When, between two steps, `INSTRUMENT_REQUEST` differs from
//! `INSTRUMENT_SEEN`, the guest clears its instruments (the histogram, `STALLS`,
//! `STALL_SUM` and `MAX_GAP`, but not `LAST_END`), sets `INSTRUMENT_STEP` to `STEPS` and
//! copies the request: so the VMM never writes what the guest counts. After the visit the
//! guest spins until `t0 + THINK`. When `STOP_REQUEST` is set, or `STEPS` reaches a
//! `STEP_LIMIT` that is not 0, it sets `STATUS` to [`STATUS_FINISHED`] between two steps
//! and makes no more. The words of the control page that [`control`] does not name are 0.
//!
//! **The KVM guest's own pages.** Page `p` lies at the guest virtual address
//! `2^30 + 4096 p`, and at the guest physical address `phys(p)` by the memory layout.
//!
//! ```text
//! 64                  root of the page tables: entry 0 names page 65
//! 65                  entry 0 names page 66, entry 1 + g the directory of the g-th GiB
//! 66                  entry 1 is the device window: 0xFEE00000 | 0xF7
//! 67                  interrupt gates: vectors 0 to 31 at the program's start + 16 * vector,
//!                     0x20 and 0xFF somewhere in the program; selector 0x10, type 0x8E
//! 68 .. 72            the program, as many pages as it needs
//! 72 + v              vCPU v's segment descriptors (0, 0, 0x00AF9B000000FFFF,
//!                     0x00CF93000000FFFF, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF, 0, and
//!                     two words for the busy task state segment of 0x68 bytes at 0x100, which
//!                     has the page's end at 4 and 0x68 at 102); a stack at its end
//! 76 + v              vCPU v's clock page: KVM's `pvclock_vcpu_time_info` at 0, its
//!                     `kvm_steal_time` at 64, each if the processor offers it; else 0
//! 80 ..               directories and, in the 2m form, leaf tables
//! ```
//!
//! An entry that names a table is `phys | 0x27`, one that names a page `phys | 0x67`, one for
//! 2 MiB `phys | 0xE7`; nothing sets a bit later. In the 2m form, 512 pages whose virtual
//! address is a multiple of 2 MiB share one entry if their physical address is one too and all
//! lie in one region; other pages have a leaf table for each 2 MiB of virtual addresses.
//! Directories and leaf tables take pages from 80 on as the pages from 0 upwards need them,
//! a directory before the leaf table in it. In the 4k form, page `512 + t` is the leaf table of
//! pages `512 t .. 512 (t + 1)`, for all there are: `A = 512 + ceil(P / 512)`. The kernel of
//! the host writes to the clock pages whenever a vCPU runs or is about to.

use super::trace::Trace;
use crate::proto::layout::MemoryLayout;
use crate::proto::page::PageIndex;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Pages below the arena, leaf tables apart: see [`Workload::arena`].
pub const SYSTEM_PAGES: u64 = 512;
/// Pages that one leaf table maps.
pub const LEAF_TABLE_PAGES: u64 = 512;
/// The first page of the KVM guest's own tables, stacks and code.
pub const MACHINE_PAGES_FIRST: u64 = 64;
/// The most vCPUs a reference guest has.
pub const VCPUS_MAX: u32 = 4;

/// Word offsets in a vCPU's control page.
pub mod control {
    /// [`super::CONTROL_MAGIC`].
    pub const MAGIC: usize = 0;
    /// Steps completed.
    pub const STEPS: usize = 1;
    /// The workload's seed.
    pub const SEED: usize = 2;
    /// `vseed(v)`.
    pub const VSEED: usize = 3;
    /// The pattern's number.
    pub const PATTERN: usize = 4;
    /// First page of the slice.
    pub const SLICE: usize = 5;
    /// Pages in the slice (`n`).
    pub const SLICE_PAGES: usize = 6;
    /// First page of the tail.
    pub const TAIL: usize = 7;
    /// Pages in the tail (`Z`).
    pub const TAIL_PAGES: usize = 8;
    /// A step writes if `s & WRITE_MASK == 0`.
    pub const WRITE_MASK: usize = 9;
    /// Least time-stamp ticks from one step's start to the next one's.
    pub const THINK: usize = 10;
    /// Steps to make in all; 0 for no end. Written by the VMM.
    pub const STEP_LIMIT: usize = 11;
    /// Not 0: make no more steps. Written by the VMM.
    pub const STOP_REQUEST: usize = 12;
    /// One of the `STATUS_` values.
    pub const STATUS: usize = 13;
    /// With `STATUS_FAILED`: the page, the word expected, the word found.
    pub const FAILED_PAGE: usize = 14;
    /// See [`FAILED_PAGE`].
    pub const FAILED_EXPECTED: usize = 15;
    /// See [`FAILED_PAGE`].
    pub const FAILED_FOUND: usize = 16;
    /// The pattern's cursor, stored after each step.
    pub const CURSOR: usize = 17;
    /// The strided pattern's lane, stored after each step.
    pub const LANE: usize = 18;
    /// Time-stamp ticks above which a visit is a stall.
    pub const STALL_THRESHOLD: usize = 19;
    /// Counter that asks the guest to clear its instruments. Written by the VMM.
    pub const INSTRUMENT_REQUEST: usize = 20;
    /// The last request that the guest followed.
    pub const INSTRUMENT_SEEN: usize = 21;
    /// `STEPS` when it followed it.
    pub const INSTRUMENT_STEP: usize = 22;
    /// Largest distance between the ends of two successive visits, in ticks.
    pub const MAX_GAP: usize = 23;
    /// The end of the last visit, as the time-stamp counter told it.
    pub const LAST_END: usize = 24;
    /// Stalls counted.
    pub const STALLS: usize = 25;
    /// Their sum in ticks.
    pub const STALL_SUM: usize = 26;
    /// Timer interrupts handled (KVM guest only).
    pub const TICKS: usize = 27;
    /// The step with which a trace was begun anew (process guest only).
    pub const TRACE_START: usize = 28;
}

/// First word of a control page.
pub const CONTROL_MAGIC: u64 = u64::from_le_bytes(*b"postcopy");
/// Value of `STATUS`: making steps.
pub const STATUS_RUNNING: u64 = 0;
/// Value of `STATUS`: stopped between two steps, as asked.
pub const STATUS_FINISHED: u64 = 1;
/// Value of `STATUS`: found a wrong word.
pub const STATUS_FAILED: u64 = 2;

/// Words in the stall histogram (one page). The bucket of `d` ticks is `d` below 8,
/// else `(e << 3) | ((d >> (e - 3)) & 7)` with `e` the number of `d`'s highest set bit:
/// eight buckets an octave.
pub const STALL_BUCKETS: usize = 512;

/// The histogram bucket of a stall of `ticks`.
pub fn stall_bucket(ticks: u64) -> usize {
    if ticks < 8 {
        return ticks as usize;
    }
    let exponent = 63 - ticks.leading_zeros() as usize;
    (exponent << 3) | ((ticks >> (exponent - 3)) & 7) as usize
}

/// The least number of ticks that falls into `bucket`.
pub fn stall_bucket_floor(bucket: usize) -> u64 {
    if bucket < 24 {
        return (bucket as u64).min(7);
    }
    let (exponent, eighth) = (bucket >> 3, (bucket & 7) as u64);
    (8 + eighth) << (exponent - 3)
}

/// An access pattern. The numbers are those in `control::PATTERN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[repr(u64)]
pub enum Pattern {
    /// One page after another.
    Sequential = 0,
    /// Every sixteenth page, in sixteen passes.
    Strided = 1,
    /// Any page, evenly.
    Random = 2,
    /// Few pages often, many seldom (theta 0.75), scattered.
    Zipf = 3,
    /// Seven steps in eight in the first sixteenth, the eighth scanning all.
    HotSetWithScan = 4,
    /// Each page names the next.
    PointerChase = 5,
    /// Any page, evenly, and each step writes.
    ReadModifyWrite = 6,
    /// The pages of [`Workload::trace`].
    #[value(skip)]
    Trace = 7,
}

impl Pattern {
    /// All that need nothing else to be known.
    pub const ALL: [Pattern; 7] = [
        Pattern::Sequential,
        Pattern::Strided,
        Pattern::Random,
        Pattern::Zipf,
        Pattern::HotSetWithScan,
        Pattern::PointerChase,
        Pattern::ReadModifyWrite,
    ];

    /// A step writes if `s & write_mask() == 0`.
    pub fn write_mask(self) -> u64 {
        if self == Pattern::ReadModifyWrite { 0 } else { 3 }
    }
}

/// How the KVM guest's page tables map its memory.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
pub enum PageTables {
    /// By 2 MiB where the layout allows it: hardly any tables.
    #[default]
    #[serde(rename = "2m")]
    #[value(name = "2m")]
    Large,
    /// Each page by a leaf entry of its own, so that page walks meet tables that are
    /// themselves missing.
    #[serde(rename = "4k")]
    #[value(name = "4k")]
    Small,
}

impl PageTables {
    /// Its name on the command line, in proposals and in the machine text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Large => "2m",
            Self::Small => "4k",
        }
    }
}

/// The privilege at which the KVM guest's program runs.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
pub enum Cpl {
    /// That of programs under an operating system.
    #[default]
    #[serde(rename = "3")]
    #[value(name = "3")]
    User,
    /// That of an operating system. A KVM without VT-x or SVM emulates it, slowly, and
    /// then makes the guest's accesses itself.
    #[serde(rename = "0")]
    #[value(name = "0")]
    Kernel,
}

impl Cpl {
    /// Its number, as on the command line, in proposals and in the machine text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::User => "3",
            Self::Kernel => "0",
        }
    }
}

/// How the KVM guest's machine is set up. The process guest has the first of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MachineForm {
    /// How its page tables map its memory.
    pub page_tables: PageTables,
    /// The privilege of its program.
    pub cpl: Cpl,
}

/// What a reference guest is told to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// How pages are picked.
    pub pattern: Pattern,
    /// Seed of the contents and of the random patterns.
    pub seed: u64,
    /// vCPUs, 1 to [`VCPUS_MAX`].
    pub vcpus: u32,
    /// Least time from one step's start to the next one's, in nanoseconds.
    pub think_ns: u64,
    /// Steps of each vCPU; 0 for no end.
    pub step_limit: u64,
    /// Pages of the zero tail.
    pub zero_pages: u64,
    /// The machine that it runs on.
    #[serde(default)]
    pub form: MachineForm,
    /// What is touched, if the pattern is [`Pattern::Trace`]. It does not travel: see
    /// [`trace`](super::trace).
    #[serde(skip)]
    pub trace: Option<Arc<Trace>>,
}

/// A vCPU's part of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Its first page.
    pub first: PageIndex,
    /// Its pages.
    pub pages: u64,
}

/// A workload that does not fit the memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadError {
    /// No vCPU, or too many.
    #[error("{0} vCPUs asked for; a reference guest has 1 to {VCPUS_MAX}")]
    Vcpus(u32),
    /// Fewer than 16 arena pages a vCPU.
    #[error("{pages} pages of memory with {zero} zero pages leave too little for {vcpus} vCPUs")]
    TooSmall {
        /// Pages of guest memory.
        pages: u64,
        /// Pages of the zero tail.
        zero: u64,
        /// vCPUs.
        vcpus: u32,
    },
    /// A form that only the KVM guest has.
    #[error(
        "page tables of {} and CPL {} are forms of the KVM guest; the process guest has no \
         page tables and no CPL of its own",
        .0.page_tables.name(),
        .0.cpl.name()
    )]
    Form(MachineForm),
    /// A trace that is not there, or not to be replayed.
    #[error("the pattern is {0:?}: Trace goes with a trace, and no other pattern does")]
    NoTrace(Pattern),
    /// A trace for the KVM guest.
    #[error("the KVM guest cannot replay a trace; the process guest can (--guest process)")]
    TraceUnderKvm,
    /// A trace of another number of vCPUs.
    #[error("trace {name} is of {recorded} vCPUs; the guest has {vcpus} (--vcpus {recorded})")]
    TraceVcpus {
        /// Its name.
        name: String,
        /// vCPUs that it was recorded of.
        recorded: u32,
        /// vCPUs of the guest.
        vcpus: u32,
    },
    /// A trace that touches pages beyond the memory, or zero ones.
    #[error(
        "trace {name} needs at least {needed} pages of memory ({}M); the guest has {pages}, its \
         zero pages apart",
        .needed.div_ceil(256)
    )]
    TraceTooLarge {
        /// Its name.
        name: String,
        /// Pages up to the highest one that it touches.
        needed: u64,
        /// Pages before the zero tail.
        pages: u64,
    },
}

impl Workload {
    /// Checks that the workload fits a guest of `layout`.
    pub fn check(&self, layout: &MemoryLayout) -> Result<(), WorkloadError> {
        if self.vcpus == 0 || self.vcpus > VCPUS_MAX {
            return Err(WorkloadError::Vcpus(self.vcpus));
        }
        let least = self.arena(layout) + 16 * u64::from(self.vcpus);
        let needed = self.zero_pages.saturating_add(least);
        if needed > layout.pages() {
            return Err(WorkloadError::TooSmall {
                pages: layout.pages(),
                zero: self.zero_pages,
                vcpus: self.vcpus,
            });
        }
        match (self.pattern, &self.trace) {
            (Pattern::Trace, Some(trace)) => self.check_trace(trace, layout),
            (Pattern::Trace, None) | (_, Some(_)) => Err(WorkloadError::NoTrace(self.pattern)),
            (_, None) => Ok(()),
        }
    }

    fn check_trace(&self, trace: &Trace, layout: &MemoryLayout) -> Result<(), WorkloadError> {
        let name = || trace.id().name.clone();
        let (recorded, vcpus) = (trace.vcpus(), self.vcpus);
        if recorded != vcpus {
            return Err(WorkloadError::TraceVcpus { name: name(), recorded, vcpus });
        }
        let (needed, pages) = (trace.highest() + 1, self.tail(layout).get());
        if needed > pages {
            return Err(WorkloadError::TraceTooLarge { name: name(), needed, pages });
        }
        Ok(())
    }

    /// The same for a guest under KVM.
    pub fn check_under_kvm(&self, layout: &MemoryLayout) -> Result<(), WorkloadError> {
        if self.pattern == Pattern::Trace {
            return Err(WorkloadError::TraceUnderKvm);
        }
        self.check(layout)
    }

    /// The same for a guest without a machine.
    pub fn check_without_machine(&self, layout: &MemoryLayout) -> Result<(), WorkloadError> {
        if self.form != MachineForm::default() {
            return Err(WorkloadError::Form(self.form));
        }
        self.check(layout)
    }

    /// The first page of the arena.
    pub fn arena(&self, layout: &MemoryLayout) -> u64 {
        let leaf_tables = match self.form.page_tables {
            PageTables::Large => 0,
            PageTables::Small => layout.pages().div_ceil(LEAF_TABLE_PAGES),
        };
        SYSTEM_PAGES + leaf_tables
    }

    /// The part of the arena that belongs to `vcpu`.
    pub fn slice(&self, layout: &MemoryLayout, vcpu: u32) -> Slice {
        let arena = self.arena(layout);
        let pages = (layout.pages() - self.zero_pages - arena) / u64::from(self.vcpus);
        Slice { first: PageIndex::new(arena + u64::from(vcpu) * pages), pages }
    }

    /// The first page of the zero tail.
    pub fn tail(&self, layout: &MemoryLayout) -> PageIndex {
        PageIndex::new(layout.pages() - self.zero_pages)
    }
}

/// The control page of `vcpu`.
pub const fn control_page(vcpu: u32) -> PageIndex {
    PageIndex::new(16 + 2 * vcpu as u64)
}

/// The stall histogram's page of `vcpu`.
pub const fn histogram_page(vcpu: u32) -> PageIndex {
    PageIndex::new(17 + 2 * vcpu as u64)
}
