//! What QEMU runs: the same program as the KVM guest's, in memory that is written before QEMU
//! starts, so that source memory and instruments can be read from here at any time.
//!
//! The process guest makes the same steps: `vmm::workload` lays down for both which pages
//! they visit, when a visit is a stall, and how stalls are counted.

use crate::rom::rom;
use anyhow::{Context, bail, ensure};
use postcopy::memory::ram::{Backing, GuestRam};
use postcopy::proto::layout::{GuestAddress, MemoryLayout, Region};
use postcopy::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use postcopy::vmm::clock::tsc_hz;
use postcopy::vmm::kvm::image::{self, Entry};
use postcopy::vmm::stalls::StallFigures;
use postcopy::vmm::workload::{
    MachineForm, Pattern, STALL_BUCKETS, STATUS_RUNNING, Workload, control, control_page,
    histogram_page,
};
use std::os::fd::AsRawFd;

/// Memory below the guest's own, for QEMU's PC: its holes are there.
pub const LOW_BYTES: u64 = 16 << 20;
/// Where a PC's memory has its gap.
const GAP: u64 = 3 << 30;
const ABOVE_GAP: u64 = 4 << 30;
const CONTROL_BYTES: usize = 2 * PAGE_SIZE;

/// What the guests of a comparison have in common.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Guest memory in bytes.
    pub memory: u64,
    /// Least time from one step to the next.
    pub think_ns: u64,
    /// Seed of contents and order.
    pub seed: u64,
}

/// The guest as QEMU's source has it.
pub struct Payload {
    ram: GuestRam,
    rom: Vec<u8>,
    between_steps: [std::ops::RangeInclusive<u64>; 2],
}

impl Payload {
    /// Fills the memory.
    pub fn new(load: &Load) -> anyhow::Result<Self> {
        let ram = GuestRam::new(layout(load.memory)?, Backing::Memfd)?;
        let workload = Workload {
            pattern: Pattern::Random,
            seed: load.seed,
            vcpus: 1,
            think_ns: load.think_ns,
            step_limit: 0,
            zero_pages: 0,
            form: MachineForm::default(),
            trace: None,
        };
        // Under TCG the time-stamp counter is the host's.
        image::write(&ram, &workload, tsc_hz())?;
        let entry = Entry::new(ram.layout(), 0);
        let rom = rom(&entry).context("the program does not lie where a ROM can enter it")?;
        let between_steps = between_steps(&ram, &entry)?;
        Ok(Self { ram, rom, between_steps })
    }

    /// The machine's firmware.
    pub fn rom(&self) -> &[u8] {
        &self.rom
    }

    /// A path at which another process can open the memory, while this one is there.
    pub fn memory_path(&self) -> anyhow::Result<String> {
        let memfd = self.ram.memfd().context("guest memory is no memfd")?;
        Ok(format!("/proc/{}/fd/{}", std::process::id(), memfd.as_raw_fd()))
    }

    /// The guest's regions as `postcopy check` takes them.
    pub fn regions(&self) -> String {
        let region = |region: &Region| format!("{:#x}:{}", region.start.0, region.pages);
        self.ram.layout().regions().iter().map(region).collect::<Vec<_>>().join(",")
    }

    /// Each region's first guest physical address and its bytes.
    pub fn regions_bytes(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let bytes = |region: &Region| (region.start.0, region.pages * PAGE_SIZE as u64);
        self.ram.layout().regions().iter().map(bytes)
    }

    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.ram.layout().pages()
    }

    /// Guest physical address and length of the pages that [`Instruments::parse`] reads.
    pub fn instruments_at(&self) -> (u64, usize) {
        // Both are below the gap.
        let address = self.ram.layout().address_of(control_page(0));
        (address.map_or(0, |address| address.0), CONTROL_BYTES)
    }

    /// The instruments as they stand in the source's memory.
    pub fn instruments(&self) -> anyhow::Result<Instruments> {
        let mut bytes = [0; CONTROL_BYTES];
        let run = PageRun::new(control_page(0), 2).context("no control page")?;
        self.ram.read_run(run, &mut bytes);
        Instruments::parse(&bytes)
    }

    /// Whether a processor at `instruction` is between two steps, with all of the last one
    /// in memory.
    pub fn is_between_steps(&self, instruction: u64) -> bool {
        self.between_steps.iter().any(|range| range.contains(&instruction))
    }
}

fn layout(bytes: u64) -> anyhow::Result<MemoryLayout> {
    let below = bytes.min(GAP - LOW_BYTES);
    let region =
        |start, bytes| Region { start: GuestAddress(start), pages: bytes / PAGE_SIZE as u64 };
    let mut regions = vec![region(LOW_BYTES, below)];
    if bytes > below {
        regions.push(region(ABOVE_GAP, bytes - below));
    }
    Ok(MemoryLayout::new(regions)?)
}

/// Where the program is between two steps: in the loop that waits for the next one, and from
/// where that loop is left for up to the step's first instruction, `rdtsc`.
///
/// The loop ends with `jae` out of it, the program's only `pause`, and a jump back.
fn between_steps(
    ram: &GuestRam,
    entry: &Entry,
) -> anyhow::Result<[std::ops::RangeInclusive<u64>; 2]> {
    const PROGRAM_PAGES: u64 = 4;
    let page_bytes = PAGE_SIZE as u64;
    // Pages lie in the guest's virtual memory in order; the control page tells from where on.
    let base = entry.control - control_page(0).get() * page_bytes;
    let first = (entry.instruction - base) / page_bytes;
    let run = PageRun::new(PageIndex::new(first), PROGRAM_PAGES).context("no program")?;
    let mut program = vec![0; run.bytes()];
    ram.read_run(run, &mut program);
    let address = |offset: usize| base + first * page_bytes + offset as u64;

    let changed = "the program's wait is not what it was";
    let from = (entry.instruction % page_bytes) as usize;
    let pause = program[from..].windows(3).position(|at| at == [0xF3, 0x90, 0xEB]);
    let pause = from + pause.context(changed)?;
    let (Some([0x0F, 0x83, out @ ..]), Some(back)) =
        (program[..pause].last_chunk::<6>(), program.get(pause + 3))
    else {
        bail!(changed);
    };
    let jump = |from: usize, by: i32| from.checked_add_signed(by as isize).context(changed);
    let begins = jump(pause + 4, back.cast_signed().into())?;
    let left_for = jump(pause, i32::from_le_bytes(*out))?;
    let step = program[left_for..].windows(2).position(|at| at == [0x0F, 0x31]);
    let step = left_for + step.context(changed)?;
    ensure!(from <= left_for && step < begins && begins < pause, changed);
    Ok([address(begins)..=address(pause + 2), address(left_for)..=address(step)])
}

/// The guest's own counts, from its control page and histogram.
#[derive(Clone)]
pub struct Instruments {
    /// Steps made.
    pub steps: u64,
    status: u64,
    stall_ticks: u64,
    histogram: Vec<u64>,
}

impl Instruments {
    /// From the bytes of both pages.
    pub fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        ensure!(bytes.len() == CONTROL_BYTES, "{} bytes of instruments", bytes.len());
        // The two pages lie one after the other.
        debug_assert_eq!(histogram_page(0).get(), control_page(0).get() + 1);
        let words = bytes.chunks_exact(8).map(|word| {
            // Chunks of 8 are 8 bytes long.
            u64::from_le_bytes(word.try_into().unwrap_or_default())
        });
        let words: Vec<u64> = words.collect();
        let (control, histogram) = words.split_at(PAGE_SIZE / 8);
        Ok(Self {
            steps: control[control::STEPS],
            status: control[control::STATUS],
            stall_ticks: control[control::STALL_SUM],
            histogram: histogram[..STALL_BUCKETS].to_vec(),
        })
    }

    /// Whether the guest makes steps, and has found no wrong word.
    pub fn is_running(&self) -> bool {
        self.status == STATUS_RUNNING
    }

    /// The stalls counted since `earlier`.
    pub fn stalls_since(&self, earlier: &Self) -> StallFigures {
        let mut buckets = [0; STALL_BUCKETS];
        for (bucket, (now, then)) in
            buckets.iter_mut().zip(self.histogram.iter().zip(&earlier.histogram))
        {
            *bucket = now.saturating_sub(*then);
        }
        let ticks = self.stall_ticks.saturating_sub(earlier.stall_ticks);
        StallFigures::of(&buckets, ticks, 0, tsc_hz())
    }
}
