//! What a departing guest says of itself, taken or refused by name where it arrives.

use super::arrival::Arrival;
use super::departure::Departure;
use super::*;
use crate::attach::server::AttachedVm;
use crate::engine::vm::DestinationVm;
use crate::memory::ram::Backing;
use crate::proto::layout::MemoryLayout;
use crate::proto::message::{GUEST_INFO_MAX, Hello, Mismatch, SessionId};
use crate::vmm::kvm::kvm_available;
use crate::vmm::trace::Trace;
use crate::vmm::workload::{Cpl, MachineForm, PageTables, Pattern};
use serde_json::Value;
use std::io::Write;

fn memory() -> Arc<GuestRam> {
    Arc::new(GuestRam::new(MemoryLayout::flat(1024).unwrap(), Backing::Memfd).unwrap())
}

fn workload(form: MachineForm) -> Workload {
    Workload {
        pattern: Pattern::Random,
        seed: 1,
        vcpus: 1,
        think_ns: 0,
        step_limit: 0,
        zero_pages: 0,
        form,
        trace: None,
    }
}

/// The proposal for a KVM guest of `form`, if there is a KVM; if not, says so.
fn proposal(form: MachineForm) -> Option<Hello> {
    if let Err(reason) = kvm_available() {
        println!("skipped: {reason}");
        return None;
    }
    let guest = new_guest(GuestKind::Kvm, memory(), workload(form), DirtyLogChoice::Auto).unwrap();
    let told = Departure::new(guest).unwrap().describe();
    let mut hello = Hello::new(SessionId([7; 16]), told.layout, told.machine);
    hello.guest = told.guest.workload_json.into_bytes();
    assert!(hello.guest.len() < GUEST_INFO_MAX / 2, "{} bytes", hello.guest.len());
    Some(hello)
}

fn prepare(hello: &Hello) -> Result<String, Mismatch> {
    Arrival::default().prepare(hello, memory().guest_memory())
}

/// The same proposal with a change in its description.
fn changed(hello: &Hello, change: impl FnOnce(&mut Value)) -> Hello {
    let mut description = serde_json::from_slice(&hello.guest).unwrap();
    change(&mut description);
    Hello { guest: serde_json::to_vec(&description).unwrap(), ..hello.clone() }
}

#[test]
fn a_guest_of_each_form_becomes_the_same_machine() {
    for page_tables in [PageTables::Large, PageTables::Small] {
        for cpl in [Cpl::User, Cpl::Kernel] {
            let Some(hello) = proposal(MachineForm { page_tables, cpl }) else { return };
            assert_eq!(prepare(&hello), Ok(hello.machine.clone()));
        }
    }
}

#[test]
fn a_proposal_from_before_there_were_forms_is_for_the_first_of_each() {
    let Some(hello) = proposal(MachineForm::default()) else { return };
    let old = changed(&hello, |description| {
        description["workload"].as_object_mut().unwrap().remove("form");
        description.as_object_mut().unwrap().remove("processor");
    });
    assert_eq!(prepare(&old), Ok(hello.machine));
}

#[test]
fn a_processor_that_cannot_be_shown_is_refused_by_what_is_missing() {
    let Some(hello) = proposal(MachineForm::default()) else { return };
    // Key Locker, which KVM offers to no guest.
    let better = changed(&hello, |description| {
        let table = description["processor"]["cpuid"].as_str().unwrap().to_owned();
        let entry = table.split(',').find(|entry| entry.starts_with("7 0 ")).unwrap();
        let mut words: Vec<_> =
            entry.split(' ').map(|word| u32::from_str_radix(word, 16).unwrap()).collect();
        words[5] |= 1 << 23;
        let words: Vec<_> = words.iter().map(|word| format!("{word:x}")).collect();
        description["processor"]["cpuid"] = table.replace(entry, &words.join(" ")).into();
    });
    let mismatch = prepare(&better).unwrap_err();
    assert_eq!(
        (mismatch.field.as_str(), mismatch.source_value.as_str()),
        ("CPU features", "key_locker")
    );
    let other = changed(&hello, |description| {
        description["processor"]["msrs"].as_array_mut().unwrap().push(0xDEAD_0000u32.into());
    });
    let mismatch = prepare(&other).unwrap_err();
    assert_eq!((mismatch.field.as_str(), mismatch.source_value.as_str()), ("MSRs", "0xdead0000"));
    let nonsense = changed(&hello, |description| description["processor"]["cpuid"] = "7 0".into());
    let mismatch = prepare(&nonsense).unwrap_err();
    assert_eq!(mismatch.field, "the guest's description");
}

#[test]
fn a_trace_is_taken_from_the_destinations_own_file() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/samples/small.trace");
    let trace = Arc::new(Trace::load(file.as_ref()).unwrap());
    let memory = || {
        let layout = MemoryLayout::flat(trace.highest() + 1).unwrap();
        Arc::new(GuestRam::new(layout, Backing::Memfd).unwrap())
    };
    let workload = Workload {
        pattern: Pattern::Trace,
        vcpus: trace.vcpus(),
        trace: Some(Arc::clone(&trace)),
        ..workload(MachineForm::default())
    };
    let guest = new_guest(GuestKind::Process, memory(), workload, DirtyLogChoice::Auto).unwrap();
    let told = Departure::new(guest).unwrap().describe();
    let hello = Hello {
        guest: told.guest.workload_json.into_bytes(),
        vcpus: 2,
        ..Hello::new(SessionId([7; 16]), told.layout, told.machine.clone())
    };
    let prepare = |trace| Arrival::with_trace(trace).prepare(&hello, memory().guest_memory());
    assert_eq!(prepare(Some(Arc::clone(&trace))), Ok(told.machine));

    let mut other = tempfile::NamedTempFile::new().unwrap();
    other.write_all(b"# postcopy-trace v1\npages 513\npage_size 4096\ntouch 0 512 0\n").unwrap();
    let other = Trace::load(other.path()).unwrap();
    for (here, named) in [(None, "--trace"), (Some(Arc::new(other)), " of 1 touches, CRC-32 ")] {
        let mismatch = prepare(here).unwrap_err();
        assert_eq!(mismatch.field, "the trace");
        assert!(mismatch.source_value.starts_with("small of 444 touches"), "{mismatch}");
        assert!(mismatch.destination_value.contains(named), "{mismatch}");
    }
}
