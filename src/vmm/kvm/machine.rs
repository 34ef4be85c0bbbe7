//! [`Machine`]: the virtual machine as KVM sees it, without its threads: memory slots,
//! interrupt controllers and the processors' features.

use super::dirty::Method;
use super::error::{KvmError, call, of_vcpu};
use super::processor::{Offer, Processor};
use super::state::{VcpuShape, usable_msrs};
use super::{boot, features, payload, tables};
use crate::memory::ram::GuestRam;
use crate::proto::page::PageIndex;
use crate::vmm::guest::DirtyLogChoice;
use crate::vmm::workload::{MachineForm, Workload};
use kvm_bindings::*;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::sync::Arc;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Where KVM may put three pages of its own on Intel processors.
const TSS_ADDRESS: usize = 0xFFFB_D000;
const MSR_TSC_DEADLINE: u32 = 0x6E0;
/// MSRs that are state, but missing in some kernels' list: SPEC_CTRL and TSC_AUX.
const UNLISTED_MSRS: [u32; 2] = [0x48, 0xC000_0103];
/// Hyper-V's MSRs: the guest is not offered them.
const HYPERV_MSRS: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_0FFF;

/// What a KVM guest needs, and what for.
const NEEDED: [(Cap, &str); 14] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// A virtual machine with its memory and interrupt controllers.
pub struct Machine {
    vm: Arc<VmFd>,
    dirty_method: Method,
    memory: GuestMemoryMmap,
    ram: Arc<GuestRam>,
    vcpus: u32,
    form: MachineForm,
    processor: Processor,
    cpuid: CpuId,
    xcr0: u64,
    clock: bool,
    steal_time: bool,
    seeds: Vec<PageIndex>,
}

/// Opens KVM, or says in one line why it is of no use.
pub fn open() -> Result<Kvm, KvmError> {
    let unavailable = |reason: String| KvmError::Unavailable(reason);
    let kvm = Kvm::new().map_err(|error| unavailable(format!("cannot open /dev/kvm: {error}")))?;
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => {}
        version if version < 0 => {
            let why = std::io::Error::last_os_error();
            return Err(unavailable(format!("/dev/kvm does not answer as KVM does: {why}")));
        }
        version => return Err(unavailable(format!("its API has version {version}"))),
    }
    match NEEDED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, name)) => Err(unavailable(format!("it lacks {name}"))),
        None => Ok(kvm),
    }
}

/// Has a vCPU wait for a missing page itself. By default KVM hands such a fault to a
/// kernel worker (asynchronous page faults) and halts the vCPU, so that userfaultfd
/// names a thread that is no vCPU's, and each fault pays for two changes of thread. KVM
/// does not do that in a machine whose HLT does not exit (`kvm_can_do_async_pf`).
fn keep_faults_on_vcpus(vm: &VmFd) -> Result<(), KvmError> {
    let offered = vm.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into());
    if offered as u32 & KVM_X86_DISABLE_EXITS_HLT == 0 {
        return Ok(());
    }
    let mut capability =
        kvm_enable_cap { cap: KVM_CAP_X86_DISABLE_EXITS, ..kvm_enable_cap::default() };
    capability.args[0] = u64::from(KVM_X86_DISABLE_EXITS_HLT);
    vm.enable_cap(&capability).map_err(call("KVM_CAP_X86_DISABLE_EXITS"))
}

impl Machine {
    /// Makes a machine over `ram` and its vCPUs, which are not set up yet. Its processor
    /// is the one given, or else the best that this host has. Neither reads nor writes
    /// guest memory.
    pub fn create(
        ram: Arc<GuestRam>,
        workload: &Workload,
        processor: Option<&Processor>,
        dirty_log: DirtyLogChoice,
    ) -> Result<(Self, Vec<VcpuFd>), KvmError> {
        workload.check_under_kvm(ram.layout())?;
        let form = workload.form;
        let tables = tables::page_tables(ram.layout(), form.page_tables)?;
        let seeds = tables::seed_pages(&tables, workload.vcpus, payload::code_pages());
        let kvm = open()?;
        let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        // A guest's state has room for the area that is saved without opting in to more.
        let area = vm.check_extension_int(Cap::Xsave2);
        if area > size_of::<kvm_xsave>() as i32 {
            return Err(KvmError::Unavailable(format!("its XSAVE area has {area} bytes")));
        }
        vm.set_tss_address(TSS_ADDRESS).map_err(call("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        vm.create_pit2(kvm_pit_config::default()).map_err(call("KVM_CREATE_PIT2"))?;
        keep_faults_on_vcpus(&vm)?;
        let dirty_method = Method::settle(&vm, dirty_log, ram.layout().pages())?;
        let memory = ram.guest_memory();
        set_slots(&vm, &memory, 0)?;

        let mut fds = Vec::new();
        for vcpu in 0..workload.vcpus {
            let fd = vm.create_vcpu(vcpu.into()).map_err(call("KVM_CREATE_VCPU"));
            fds.push(fd.map_err(of_vcpu(vcpu))?);
        }
        let Some(first) = fds.first() else {
            return Err(KvmError::Unavailable("a guest has at least one vCPU".into()));
        };
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let tsc_khz = first.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?;
        let cpuid = match processor {
            None => supported,
            Some(processor) => {
                let scales_tsc = vm.check_extension(Cap::TscControl);
                processor.check_lengths()?;
                processor.check(&Offer { cpuid: supported.as_slice(), tsc_khz, scales_tsc })?;
                processor.table()?
            }
        };
        for (vcpu, fd) in (0..).zip(&fds) {
            let set = fd.set_cpuid2(&cpuid_of(&cpuid, vcpu)).map_err(call("KVM_SET_CPUID2"));
            set.map_err(of_vcpu(vcpu))?;
        }
        let processor = match processor {
            None => {
                let listed = kvm.get_msr_index_list().map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
                let msrs = usable_msrs(first, msrs_wanted(listed.as_slice()));
                Processor { cpuid: cpuid_of(&cpuid, 0).as_slice().to_vec(), msrs, tsc_khz }
            }
            Some(processor) => {
                processor.check_msrs(&usable_msrs(first, processor.msrs.iter().copied()))?;
                processor.clone()
            }
        };
        let (clock, steal_time) = features::offers_clock_and_steal_time(cpuid.as_slice());
        let xcr0 = boot::xcr0(&cpuid);
        let machine = Self {
            vm: Arc::new(vm),
            dirty_method,
            memory,
            ram,
            vcpus: workload.vcpus,
            form,
            processor,
            cpuid,
            xcr0,
            clock,
            steal_time,
            seeds,
        };
        Ok((machine, fds))
    }

    /// Sets up its vCPUs to begin with the program.
    pub fn set_up(&self, fds: &[VcpuFd]) -> Result<(), KvmError> {
        let beginning = boot::Beginning {
            layout: self.ram.layout(),
            cpl: self.form.cpl,
            xcr0: self.xcr0,
            clock: self.clock,
            steal_time: self.steal_time,
        };
        let set_up = |(vcpu, fd)| boot::set_up(fd, vcpu, &beginning).map_err(of_vcpu(vcpu));
        (0..).zip(fds).try_for_each(set_up)
    }

    /// KVM's handle of the machine.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// The same for whoever needs it as long as a vCPU's thread lives.
    pub fn shared_vm(&self) -> Arc<VmFd> {
        Arc::clone(&self.vm)
    }

    /// How its writes are logged.
    pub fn dirty_method(&self) -> Method {
        self.dirty_method
    }

    /// Gives every memory slot these flags. The slots are the layout's regions in order.
    pub fn set_slots(&self, flags: u32) -> Result<(), KvmError> {
        set_slots(&self.vm, &self.memory, flags)
    }

    /// The memory it runs in.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The time-stamp counter's rate in Hz.
    pub fn tsc_hz(&self) -> u64 {
        u64::from(self.processor.tsc_khz) * 1000
    }

    /// The processor that its guest sees.
    pub fn processor(&self) -> &Processor {
        &self.processor
    }

    /// The pages that the first instructions need.
    pub fn seeds(&self) -> &[PageIndex] {
        &self.seeds
    }

    /// What `vcpu`'s thread must know to take its state.
    pub fn shape(&self, vcpu: u32) -> VcpuShape {
        let msrs = self.processor.msrs.clone();
        VcpuShape { cpuid: cpuid_of(&self.cpuid, vcpu), msrs, clock: self.clock }
    }

    /// The configuration that both sides of a migration must agree on.
    pub fn describe(&self) -> String {
        let cpuid = cpuid_of(&self.cpuid, 0);
        let cpuid = cpuid.as_slice().iter().flat_map(cpuid_bytes).collect::<Vec<u8>>();
        let msrs = &self.processor.msrs;
        let indices = msrs.iter().flat_map(|index| index.to_le_bytes()).collect::<Vec<u8>>();
        format!(
            "x86_64 kvm vcpus={} page-tables={} cpl={} irqchip pit2 xcr0={:#x} cpuid-crc={:08x} \
             msrs={} msrs-crc={:08x}",
            self.vcpus,
            self.form.page_tables.name(),
            self.form.cpl.name(),
            self.xcr0,
            crc32fast::hash(&cpuid),
            msrs.len(),
            crc32fast::hash(&indices),
        )
    }
}

/// Makes the memory slots, or changes their flags.
fn set_slots(vm: &VmFd, memory: &GuestMemoryMmap, flags: u32) -> Result<(), KvmError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the regions do not overlap (MemoryLayout's invariant), and the mapping
        // lives as long as the machine and its vCPUs' threads.
        unsafe { vm.set_user_memory_region(slot) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// The MSRs to save, the deadline timer last: it counts on the time-stamp counter.
fn msrs_wanted(listed: &[u32]) -> Vec<u32> {
    let mut wanted: Vec<u32> = listed.iter().chain(&UNLISTED_MSRS).copied().collect();
    wanted.retain(|index| !HYPERV_MSRS.contains(index));
    wanted.sort_by_key(|&index| (index == MSR_TSC_DEADLINE, index));
    wanted.dedup();
    wanted
}

/// The CPUID values of `vcpu`: the host's, apart from the number of the processor.
/// KVM reports the number of whichever processor it was asked on.
fn cpuid_of(supported: &CpuId, vcpu: u32) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00FF_FFFF | vcpu << 24,
            0xB | 0x1F => entry.edx = vcpu,
            0x8000_001E => entry.eax = vcpu,
            _ => {}
        }
    }
    cpuid
}

fn cpuid_bytes(entry: &kvm_cpuid_entry2) -> impl Iterator<Item = u8> {
    let words =
        [entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx];
    words.into_iter().flat_map(u32::to_le_bytes)
}
