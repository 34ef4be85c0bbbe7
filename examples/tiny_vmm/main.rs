//! A real KVM guest counts in its memory, moves from one VM to another over loopback while
//! it counts, and has not miscounted. The VMM, and how it is made migratable, is in `vmm.rs`.
//!
//! `cargo run --example tiny_vmm`; without /dev/kvm or userfaultfd it says so and ends.

mod vmm;

use kvm_ioctls::Kvm;
use postcopy::uffd::{UffdOptions, open::open};
use postcopy::{DestinationBuilder, Outcome};
use std::any::Any;
use std::thread;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::{Arrival, COUNTERS, MACHINE, REGIONS, Result, Vmm};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// What the guest has counted in each page.
fn counts(memory: &GuestMemoryMmap) -> Result<Vec<u64>> {
    let pages = COUNTERS.step_by(4096).map(GuestAddress);
    pages.map(|page| Ok(u64::from(memory.read_obj::<u32>(page)?))).collect()
}

/// Waits for the guest to get somewhere, but not for ever.
fn wait_until(mut there: impl FnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !there()? {
        assert!(began.elapsed() < Duration::from_secs(30), "the guest does not get on");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn main() -> Result<()> {
    if let Err(error) = Kvm::new() {
        println!("SKIPPED: no guest can run here: /dev/kvm: {error}");
        return Ok(());
    }
    if let Err(error) = open(UffdOptions::for_kvm(), postcopy::DestinationBacking::MemfdContinue) {
        println!("SKIPPED: no guest can be received here: {error}");
        return Ok(());
    }
    extern "C" fn interrupt(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), interrupt)?;
    let receiver = DestinationBuilder::new().on_event(|event| println!("{event:?}")).build()?;
    let ticket = receiver.ticket().clone();
    let destination = thread::spawn(move || receiver.run(Box::new(Arrival(None))));

    let memory = GuestMemoryMmap::from_ranges(&REGIONS)?;
    let mut vmm = Vmm::new(memory.clone())?;
    vmm.boot()?;
    vmm.start()?;
    wait_until(|| Ok(counts(&memory)?[0] > 2))?;
    let source = vmm::source(&memory, ticket).machine(MACHINE).build()?;
    assert_eq!(source.run(Box::new(vmm))?.outcome, Outcome::Completed);
    // Nothing counts here any more.
    let left: u64 = counts(&memory)?.iter().sum();

    let end = destination.join().map_err(|_| "the destination panicked")??;
    assert_eq!(end.outcome, Outcome::Completed);
    let arrival = (end.vm as Box<dyn Any>).downcast::<Arrival>();
    let mut vmm = arrival.ok().and_then(|arrival| arrival.0).ok_or("no guest came")?;
    wait_until(|| Ok(counts(&vmm.memory)?.iter().sum::<u64>() > left))?;
    vmm.halt()?;
    // Pages before the one that is next were counted once more than the others.
    let counts = counts(&vmm.memory)?;
    let regs = vmm.vcpu()?.get_regs()?;
    // Behind the first instruction, but not yet the second, it has counted where it stands.
    let done = (regs.rbx - COUNTERS.start) as usize / 4096 + usize::from(regs.rip == 2);
    let next = done % counts.len();
    let passes = counts[counts.len() - 1];
    let right = |(page, count): (usize, &u64)| *count == passes + u64::from(page < next);
    assert!(counts.iter().enumerate().all(right), "the guest miscounted: {counts:?}");
    println!("counted {left} there, {} here, and no page twice", counts.iter().sum::<u64>() - left);
    Ok(())
}
