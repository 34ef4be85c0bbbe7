//! The guest against a plain model of its specification.

use super::*;
use crate::memory::ram::Backing;
use crate::proto::layout::MemoryLayout;
use crate::vmm::content::Instruments;
use crate::vmm::workload::{Pattern, STATUS_FINISHED, control};

#[test]
fn first() {
    let ram =
        Arc::new(GuestRam::new(MemoryLayout::flat(2048).unwrap(), Backing::Anonymous).unwrap());
    let workload = Workload {
        pattern: Pattern::Random,
        seed: 1,
        vcpus: 1,
        think_ns: 0,
        step_limit: 100000,
        zero_pages: 64,
    };
    let mut guest = KvmGuest::new(ram.clone(), workload).unwrap();
    println!("{}", guest.machine());
    guest.resume().unwrap();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2)
        && Instruments::new(&ram, 0).get(control::STATUS) == 0
        && guest.failure().is_none()
    {
        std::thread::sleep(Duration::from_millis(1));
    }
    println!(
        "{:?} {:?} steps {} ticks {} status {}",
        start.elapsed(),
        guest.failure(),
        Instruments::new(&ram, 0).get(control::STEPS),
        Instruments::new(&ram, 0).get(control::TICKS),
        Instruments::new(&ram, 0).get(control::STATUS)
    );
    guest.pause().unwrap();
    println!("{:?}", guest.capture().unwrap().len());
    assert_eq!(Instruments::new(&ram, 0).get(control::STATUS), STATUS_FINISHED);
}
