//! The complete state of a KVM guest, memory apart: taken from a paused one, put into
//! one that has not run. Every refusal of the kernel is reported by the ioctl's name.
//!
//! The order of restoring matters: the VM's clock and interrupt controllers before the
//! vCPUs; in a vCPU the registers before the local APIC (which wants the APIC's base
//! address from SREGS), the local APIC before the MSRs (one of which is its deadline
//! timer), and pending events last (setting registers clears them).

use super::error::{KvmError, call};
use super::processor::differs;
use kvm_bindings::*;
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

/// Names the area of KVM's clock.
pub(super) const MSR_SYSTEM_TIME: u32 = 0x4B56_4D01;
/// Names the area in which KVM tells of stolen time.
pub(super) const MSR_STEAL_TIME: u32 = 0x4B56_4D03;

/// What is not a vCPU's own.
#[derive(Default, Serialize, Deserialize)]
pub struct VmState {
    clock: kvm_clock_data,
    /// The two PICs and the IOAPIC, by their number in KVM.
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

/// A vCPU's state.
#[derive(Default, Serialize, Deserialize)]
pub struct VcpuState {
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) msrs: Vec<kvm_msr_entry>,
    pub(super) tsc_khz: u32,
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) debug_regs: kvm_debugregs,
    pub(super) xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    lapic: kvm_lapic_state,
    pub(super) events: kvm_vcpu_events,
}

/// A guest's state.
#[derive(Default, Serialize, Deserialize)]
pub struct GuestState {
    /// What is not a vCPU's own.
    pub vm: VmState,
    /// The vCPUs in order.
    pub vcpus: Vec<VcpuState>,
}

impl std::fmt::Debug for GuestState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GuestState of {} vCPUs", self.vcpus.len())
    }
}

/// What a vCPU's thread must know to take its state.
#[derive(Clone)]
pub struct VcpuShape {
    /// The CPUID entries it was given.
    pub cpuid: CpuId,
    /// The MSRs that this host lets a VMM read and write.
    pub msrs: Vec<u32>,
    /// Whether it has KVM's clock from the beginning.
    pub clock: bool,
}

impl VmState {
    /// Takes the state of a VM whose vCPUs are paused.
    pub fn capture(vm: &VmFd) -> Result<Self, KvmError> {
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (chip_id, chip) in (0..).zip(&mut irqchips) {
            chip.chip_id = chip_id;
            vm.get_irqchip(chip).map_err(call("KVM_GET_IRQCHIP"))?;
        }
        Ok(Self {
            clock: vm.get_clock().map_err(call("KVM_GET_CLOCK"))?,
            irqchips,
            pit: vm.get_pit2().map_err(call("KVM_GET_PIT2"))?,
        })
    }

    /// Puts it into a VM whose vCPUs have not run.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        // Without flags the clock goes on from the moment it was captured.
        let clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(call("KVM_SET_CLOCK"))?;
        vm.set_pit2(&self.pit).map_err(call("KVM_SET_PIT2"))?;
        for (chip_id, chip) in (0..).zip(&self.irqchips) {
            let chip = kvm_irqchip { chip_id, ..*chip };
            vm.set_irqchip(&chip).map_err(call("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }
}

impl VcpuState {
    /// Takes the state of a paused vCPU with nothing in flight.
    pub fn capture(vcpu: &VcpuFd, shape: &VcpuShape) -> Result<Self, KvmError> {
        // KVM settles pending INIT and SIPI when asked for MP_STATE: first of all.
        let mp_state = vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().map_err(call("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?,
            debug_regs: vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            xcrs: vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
            xsave: vcpu.get_xsave().map_err(call("KVM_GET_XSAVE"))?,
            lapic: vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?,
            tsc_khz: vcpu.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?,
            msrs: read_msrs(vcpu, &shape.msrs)?,
            events: vcpu.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?,
            cpuid: shape.cpuid.as_slice().to_vec(),
        })
    }

    /// Puts it into a vCPU that has not run. May touch guest memory: an MSR can name a
    /// page that KVM then writes.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        vcpu.set_mp_state(self.mp_state).map_err(call("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(call("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(call("KVM_SET_SREGS"))?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(call("KVM_SET_DEBUGREGS"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(call("KVM_SET_XCRS"))?;
        // SAFETY: no feature with a larger area than this structure is enabled in this
        // process; `Machine::create` has checked the size that KVM would read.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(call("KVM_SET_XSAVE"))?;
        vcpu.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        self.restore_tsc_rate(vcpu)?;
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(call("KVM_SET_VCPU_EVENTS"))?;
        if self.has_clock() { tell_of_pause(vcpu) } else { Ok(()) }
    }

    /// Whether KVM keeps a clock in the guest's memory for it.
    pub fn has_clock(&self) -> bool {
        self.msrs.iter().any(|msr| msr.index == MSR_SYSTEM_TIME && msr.data & 1 != 0)
    }

    /// Has the time-stamp counter scaled if its rate here is another one than the guest
    /// knows.
    fn restore_tsc_rate(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let here = vcpu.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?;
        if differs(self.tsc_khz, here) {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(call("KVM_SET_TSC_KHZ"))?;
        }
        Ok(())
    }
}

/// Has KVM note in a guest's clock that the guest did not run for a while, so that its
/// watchdogs do not bark. Only for a vCPU with a clock.
pub fn tell_of_pause(vcpu: &VcpuFd) -> Result<(), KvmError> {
    vcpu.kvmclock_ctrl().map_err(call("KVM_KVMCLOCK_CTRL"))
}

fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let entries: Vec<_> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = fam(&entries)?;
    let read = vcpu.get_msrs(&mut msrs).map_err(call("KVM_GET_MSRS"))?;
    match indices.get(read) {
        Some(&index) => Err(KvmError::ReadMsr(index)),
        None => Ok(msrs.as_slice().to_vec()),
    }
}

pub(super) fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let written = vcpu.set_msrs(&fam(entries)?).map_err(call("KVM_SET_MSRS"))?;
    match entries.get(written) {
        Some(entry) => Err(KvmError::WriteMsr(entry.index)),
        None => Ok(()),
    }
}

fn fam(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError::TooManyMsrs(entries.len()))
}

/// Those of `indices` that can be read, and written back, on a vCPU that has not run:
/// what the kernel refuses is found out here and not in the blackout.
pub fn usable_msrs(vcpu: &VcpuFd, indices: impl IntoIterator<Item = u32>) -> Vec<u32> {
    let usable = |&index: &u32| {
        let entries = read_msrs(vcpu, &[index]);
        entries.and_then(|entries| write_msrs(vcpu, &entries)).is_ok()
    };
    indices.into_iter().filter(usable).collect()
}
