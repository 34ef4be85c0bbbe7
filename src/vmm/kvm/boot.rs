//! The first register content of a vCPU: long mode, at the program's entry and privilege,
//! with a ticking timer, and KVM's clock if it has one. There is no boot: what firmware and
//! kernel would do is written here.

use super::error::{KvmError, call};
use super::image::Entry;
use super::state::{MSR_STEAL_TIME, MSR_SYSTEM_TIME, write_msrs};
use super::tables::*;
use crate::proto::layout::MemoryLayout;
use crate::vmm::workload::Cpl;
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;

/// Protected mode, paging, write protection, numeric errors, alignment mask.
const CR0: u64 = 0x8005_0033;
/// PAE, SSE, and XSAVE.
const CR4: u64 = 0x0004_0620;
/// Long mode enabled and active, no-execute, syscall.
const EFER: u64 = 0xD01;
/// x87, SSE and AVX state.
const XCR0_WANTED: u64 = 7;
/// Interrupts enabled.
const RFLAGS: u64 = 0x202;
/// Timer interrupts are this far apart: 100 Hz.
const TICK_NS: u32 = 10_000_000;

mod lapic {
    pub const TASK_PRIORITY: usize = 0x80;
    pub const SPURIOUS: usize = 0xF0;
    pub const LVT_TIMER: usize = 0x320;
    pub const LVT_LINT0: usize = 0x350;
    pub const LVT_LINT1: usize = 0x360;
    pub const TIMER_INITIAL: usize = 0x380;
    pub const TIMER_CURRENT: usize = 0x390;
    pub const TIMER_DIVIDE: usize = 0x3E0;
    pub const ENABLED: u32 = 1 << 8;
    pub const PERIODIC: u32 = 1 << 17;
    pub const MASKED: u32 = 1 << 16;
    /// Divide by 1: KVM's APIC bus then counts nanoseconds.
    pub const DIVIDE_BY_1: u32 = 0xB;
}

/// The extended control register 0 to start with, by what the processor has.
pub fn xcr0(cpuid: &CpuId) -> u64 {
    let mut entries = cpuid.as_slice().iter();
    let supported = entries.find(|entry| entry.function == 0xD && entry.index == 0);
    supported.map_or(1, |entry| u64::from(entry.eax) & XCR0_WANTED | 1)
}

/// What all vCPUs of a guest begin with.
pub struct Beginning<'a> {
    /// Where memory is.
    pub layout: &'a MemoryLayout,
    /// The program's privilege.
    pub cpl: Cpl,
    /// Extended control register 0.
    pub xcr0: u64,
    /// Whether the processor has KVM's clock.
    pub clock: bool,
    /// Whether KVM tells it of stolen time.
    pub steal_time: bool,
}

/// Sets up `vcpu` to begin with the program.
pub fn set_up(fd: &VcpuFd, vcpu: u32, with: &Beginning) -> Result<(), KvmError> {
    let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
    fd.set_mp_state(runnable).map_err(call("KVM_SET_MP_STATE"))?;
    let entry = Entry::new(with.layout, vcpu);
    let regs = kvm_regs {
        rip: entry.instruction,
        r15: entry.control,
        // At CPL 3 the task state segment has the stack that interrupts use.
        rsp: if with.cpl == Cpl::Kernel { stack_address(vcpu) } else { 0 },
        rflags: RFLAGS,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    let sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    let sregs = first_sregs(sregs, vcpu, entry, with);
    fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = with.xcr0;
    fd.set_xcrs(&xcrs).map_err(call("KVM_SET_XCRS"))?;
    let mut state = fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
    start_timer(&mut state);
    fd.set_lapic(&state).map_err(call("KVM_SET_LAPIC"))?;
    write_msrs(fd, &clocks(vcpu, with))
}

/// The MSRs that name the areas in which KVM keeps its clock and the time stolen.
fn clocks(vcpu: u32, with: &Beginning) -> Vec<kvm_msr_entry> {
    const ENABLED: u64 = 1;
    let page = physical_address(with.layout, clock_page(vcpu));
    let msr = |index, area| kvm_msr_entry { index, data: area | ENABLED, ..Default::default() };
    let clock = with.clock.then(|| msr(MSR_SYSTEM_TIME, page));
    let steal_time = with.steal_time.then(|| msr(MSR_STEAL_TIME, page + STEAL_TIME_OFFSET));
    clock.into_iter().chain(steal_time).collect()
}

fn first_sregs(reset: kvm_sregs, vcpu: u32, entry: Entry, with: &Beginning) -> kvm_sregs {
    let (data, code, dpl) = match with.cpl {
        Cpl::User => (selector::USER_DATA, selector::USER_CODE, 3),
        Cpl::Kernel => (selector::KERNEL_DATA, selector::KERNEL_CODE, 0),
    };
    let data = kvm_segment { selector: data, type_: 3, dpl, s: 1, db: 1, ..segment(0xFFFF_FFFF) };
    let code = kvm_segment { selector: code, type_: 11, l: 1, db: 0, ..data };
    // The interrupt stubs find their vCPU's control page by GS.
    let gs = kvm_segment { base: entry.control, ..data };
    let task = kvm_segment {
        base: task_address(vcpu),
        selector: selector::TASK,
        type_: 11,
        g: 0,
        ..segment(TASK_LIMIT.into())
    };
    let table = |base, limit| kvm_dtable { base, limit, ..Default::default() };
    kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs,
        ss: data,
        tr: task,
        ldt: kvm_segment { unusable: 1, present: 0, ..segment(0) },
        gdt: table(gdt_address(vcpu), GDT_LIMIT),
        idt: table(virtual_address(IDT), 0xFFF),
        cr0: CR0,
        cr3: entry.page_tables,
        cr4: CR4,
        efer: EFER,
        ..reset
    }
}

fn segment(limit: u32) -> kvm_segment {
    kvm_segment { limit, present: 1, g: 1, ..Default::default() }
}

fn start_timer(state: &mut kvm_lapic_state) {
    let mut set = |register: usize, value: u32| {
        for (place, byte) in state.regs[register..].iter_mut().zip(value.to_le_bytes()) {
            *place = byte as _;
        }
    };
    set(lapic::TASK_PRIORITY, 0);
    set(lapic::SPURIOUS, lapic::ENABLED | u32::from(SPURIOUS_VECTOR));
    // Nothing comes by way of the PIC, which nobody has programmed.
    set(lapic::LVT_LINT0, lapic::MASKED);
    set(lapic::LVT_LINT1, lapic::MASKED);
    set(lapic::LVT_TIMER, lapic::PERIODIC | u32::from(TIMER_VECTOR));
    set(lapic::TIMER_DIVIDE, lapic::DIVIDE_BY_1);
    set(lapic::TIMER_INITIAL, TICK_NS);
    set(lapic::TIMER_CURRENT, TICK_NS);
}
