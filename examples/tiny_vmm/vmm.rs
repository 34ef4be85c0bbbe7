//! A whole VMM, of one vCPU, that can migrate: [`Vmm`] is what it would be anyhow, the two
//! traits are what makes it migratable.

use kvm_bindings::{kvm_regs, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use postcopy::{Captured, DestinationVm, Hello, Mismatch};
use postcopy::{SourceBuilder, SourceVm, Ticket, VmError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

/// `next: inc [ebx]; add ebx, 4096; cmp ebx, edi; jb next; mov ebx, esi; jmp next`
const PROGRAM: [u8; 16] =
    [0xFF, 3, 0x81, 0xC3, 0, 0x10, 0, 0, 0x39, 0xFB, 0x72, 0xF4, 0x89, 0xF3, 0xEB, 0xF0];
/// The program is in the first region; in each page of the second the guest counts.
pub const REGIONS: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 1 << 20), (GuestAddress(16 << 20), 8 << 20)];
/// Where it counts.
pub const COUNTERS: std::ops::Range<u64> = 16 << 20..24 << 20;
/// What must be equal on both sides.
pub const MACHINE: &str = "tiny 1";

/// What a VMM's methods return.
pub type Result<T, E = VmError> = std::result::Result<T, E>;

/// A VM, its vCPU and its memory.
pub struct Vmm {
    vcpu: Option<VcpuFd>,
    running: Option<JoinHandle<VcpuFd>>,
    stop: Arc<AtomicBool>,
    pub memory: GuestMemoryMmap,
    _vm: VmFd,
}

impl Vmm {
    /// Makes VM and vCPU. This reads and writes no guest memory.
    pub fn new(memory: GuestMemoryMmap) -> Result<Self> {
        let vm = Kvm::new()?.create_vm()?;
        vm.set_tss_address(0xFFFB_D000)?;
        for (slot, region) in (0..).zip(memory.iter()) {
            let (guest_phys_addr, memory_size) = (region.start_addr().0, region.len());
            let (flags, userspace_addr) = (0, region.as_ptr() as u64);
            #[rustfmt::skip]
            let region = kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr };
            // SAFETY: regions do not overlap, and whoever runs the vCPU keeps `memory` mapped.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        let vcpu = Some(vm.create_vcpu(0)?);
        Ok(Self { vcpu, running: None, stop: Arc::default(), memory, _vm: vm })
    }

    /// Puts the program in and the vCPU at its beginning, in flat 32-bit mode.
    pub fn boot(&mut self) -> Result<()> {
        self.memory.write_slice(&PROGRAM, GuestAddress(0))?;
        let mut sregs = self.vcpu()?.get_sregs()?;
        sregs.cr0 |= 1;
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.base, segment.limit, segment.selector) = (0, u32::MAX, 16);
            (segment.db, segment.g, segment.type_) = (1, 1, 3);
        }
        (sregs.cs.selector, sregs.cs.type_) = (8, 11);
        let (rbx, rsi, rdi) = (COUNTERS.start, COUNTERS.start, COUNTERS.end);
        self.set_state(kvm_regs { rbx, rsi, rdi, rflags: 2, ..kvm_regs::default() }, sregs)
    }

    fn set_state(&mut self, regs: kvm_regs, sregs: kvm_sregs) -> Result<()> {
        self.vcpu()?.set_sregs(&sregs)?;
        Ok(self.vcpu()?.set_regs(&regs)?)
    }

    pub fn vcpu(&mut self) -> Result<&mut VcpuFd> {
        self.vcpu.as_mut().ok_or_else(|| "the vCPU runs".into())
    }

    pub fn start(&mut self) -> Result<Instant> {
        let mut vcpu = self.vcpu.take().ok_or("the vCPU runs")?;
        let (stop, (tell, entered)) = (self.stop.clone(), mpsc::channel());
        let mapped = self.memory.clone();
        stop.store(false, Ordering::SeqCst);
        self.running = Some(thread::spawn(move || {
            let _ = tell.send(Instant::now());
            while !stop.load(Ordering::SeqCst) {
                match vcpu.run() {
                    Ok(VcpuExit::Intr) => {}
                    Err(error) if error.errno() == libc::EINTR => {}
                    other => panic!("the guest does nothing else: {other:?}"),
                }
            }
            drop(mapped); // Not before: the vCPU must not outlive its memory.
            vcpu
        }));
        Ok(entered.recv()?)
    }

    /// Stops the vCPU. A signal that comes before it is in the guest is lost: send more.
    pub fn halt(&mut self) -> Result<()> {
        let thread = self.running.take().ok_or("the vCPU is stopped")?;
        self.stop.store(true, Ordering::SeqCst);
        while !thread.is_finished() {
            thread.kill(SIGRTMIN())?;
            thread::sleep(Duration::from_micros(50));
        }
        self.vcpu = Some(thread.join().map_err(|_| "the vCPU's thread panicked")?);
        Ok(())
    }
}

/// The way for the guest in `memory` to whoever made `ticket`.
pub fn source(memory: &GuestMemoryMmap, ticket: Ticket) -> SourceBuilder {
    // SAFETY: only the vCPU writes to it, and `pause` returns when that stands still.
    unsafe { SourceBuilder::new(memory.clone(), ticket) }
}

impl SourceVm for Vmm {
    fn pause(&mut self) -> Result<Captured> {
        let asked = Instant::now();
        self.halt()?;
        let (pause, vcpu) = (asked.elapsed(), self.vcpu()?);
        let state = serde_json::to_vec(&(vcpu.get_regs()?, vcpu.get_sregs()?))?;
        Ok(Captured { state, pause, capture: asked.elapsed() - pause, ..Captured::default() })
    }
    fn resume(&mut self) -> Result<()> {
        self.start().map(drop) // The migration was aborted.
    }
    fn release(&mut self) -> Result<()> {
        Ok(()) // It runs there. Its memory is still read here: exit only after `run`.
    }
}

/// The destination's VMM makes its guest when it knows what comes.
pub struct Arrival(pub Option<Vmm>);

impl DestinationVm for Arrival {
    fn prepare(&mut self, _: &Hello, memory: GuestMemoryMmap) -> Result<String, Mismatch> {
        self.0 = Some(Vmm::new(memory).map_err(|why| Mismatch::new("the VM", MACHINE, why))?);
        Ok(MACHINE.into())
    }
    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let (regs, sregs) = serde_json::from_slice(state)?;
        self.0.as_mut().ok_or("not prepared")?.set_state(regs, sregs)
    }
    fn resume(&mut self) -> Result<Instant> {
        self.0.as_mut().ok_or("not prepared")?.start()
    }
}
