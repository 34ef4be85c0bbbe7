//! The forms of the machine: 2 MiB and 4 KiB page tables, CPL 3 and CPL 0, judged by the
//! independent checker, which compares every page of them.

use super::*;
use crate::checker::{CheckFailure, CheckMachine, CheckParams, CheckSummary, check};
use std::process::{Command, Stdio};

const SMALL: MachineForm = MachineForm { page_tables: PageTables::Small, cpl: Cpl::User };
const KERNEL: MachineForm = MachineForm { page_tables: PageTables::Large, cpl: Cpl::Kernel };
const SMALL_KERNEL: MachineForm = MachineForm { cpl: Cpl::Kernel, ..SMALL };

fn in_form(form: MachineForm, vcpus: u32, step_limit: u64) -> Workload {
    Workload { form, ..workload(Pattern::Random, vcpus, step_limit) }
}

fn verdict(guest: &KvmGuest, steps: &[u64]) -> Result<CheckSummary, CheckFailure> {
    let (ram, workload) = (guest.ram(), &guest.workload);
    let pages = ram.layout().pages();
    let mut bytes = vec![0; pages as usize * PAGE_SIZE];
    ram.read_run(PageRun::new(PageIndex::new(0), pages).unwrap(), &mut bytes);
    let regions = ram.layout().regions().iter();
    let params = CheckParams {
        pages,
        vcpus: workload.vcpus,
        seed: workload.seed,
        pattern: serde_json::from_value(serde_json::to_value(workload.pattern).unwrap()).unwrap(),
        touches: vec![],
        zero_pages: workload.zero_pages,
        kvm: Some(CheckMachine {
            regions: regions.map(|region| (region.start.0, region.pages)).collect(),
            small_pages: workload.form.page_tables == PageTables::Small,
        }),
        expect_steps: Some(steps.to_vec()),
    };
    check(&params, bytes.as_slice())
}

fn judge(guest: &KvmGuest, steps: &[u64]) -> CheckSummary {
    let form = guest.workload.form;
    verdict(guest, steps).unwrap_or_else(|failure| panic!("{form:?}: {failure}"))
}

fn odd() -> MemoryLayout {
    let region = |start, pages| Region { start: GuestAddress(start), pages };
    let regions =
        vec![region(0, 600), region(0x40_3000, 700), region(4 << 30, 512), region(8 << 30, 100)];
    MemoryLayout::new(regions).unwrap()
}

#[test]
fn every_form_runs_and_every_page_of_it_is_as_the_checker_has_it() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(100);
    for form in [MachineForm::default(), SMALL, KERNEL, SMALL_KERNEL] {
        for vcpus in [1, 2, 4] {
            for layout in [flat(), odd()] {
                let steps = if form.cpl == Cpl::Kernel { 200 } else { 5000 };
                let workload = in_form(form, vcpus, steps);
                let mut guest = KvmGuest::new(memory(layout), workload.clone()).unwrap();
                guest.resume().unwrap();
                let steps = wait_finished(&guest);
                guest.pause().unwrap();
                compare(guest.ram(), &workload, &steps);
                let summary = judge(&guest, &steps);
                assert_eq!(summary.pages_unmodelled, payload::code_pages());
            }
        }
    }
}

#[test]
fn a_wrong_bit_in_any_of_the_machines_pages_is_found() {
    if !kvm() {
        return;
    }
    let mut guest = KvmGuest::new(memory(odd()), in_form(SMALL, 2, 1)).unwrap();
    guest.resume().unwrap();
    let steps = wait_finished(&guest);
    guest.pause().unwrap();
    judge(&guest, &steps);
    let pages = guest.ram().layout().pages();
    let arena = arena(&guest.workload, pages);
    let tables = (64..arena).filter(|page| !(68..72).contains(page));
    for page in tables.map(PageIndex::new).map(PageRun::single) {
        let mut bytes = [0; PAGE_SIZE];
        guest.ram().read_run(page, &mut bytes);
        // Dirty, in an entry of a table; a limit, a gate's address, a reserved byte.
        let mut wrong = bytes;
        wrong[64] ^= 0x40;
        wrong[64 + 2 * 8] ^= 0x40;
        if (76..78).contains(&page.first().get()) {
            wrong = bytes;
            wrong[40] ^= 1;
        }
        guest.ram().write_run(page, &wrong);
        let failure = verdict(&guest, &steps).unwrap_err();
        let content = failure.content().unwrap_or_else(|| panic!("{failure}"));
        assert_eq!((content.wrong_pages, content.first.page), (1, page.first().get()));
        guest.ram().write_run(page, &bytes);
    }
    judge(&guest, &steps);
}

#[test]
fn a_guest_of_each_form_moves_and_ticks_on() {
    if !kvm() {
        return;
    }
    let _watchdog = watchdog(100);
    for form in [SMALL, KERNEL, SMALL_KERNEL] {
        let workload = in_form(form, 2, 0);
        let mut guest = KvmGuest::new(memory(flat()), workload.clone()).unwrap();
        guest.resume().unwrap();
        wait_until(&guest, |vcpu| word(&guest, vcpu, control::STEPS) > 50);
        for _ in 0..3 {
            guest.pause().unwrap();
            let state = guest.capture().unwrap();
            let other = memory(flat());
            copy(guest.ram(), &other);
            let processor = guest.machine.processor().clone();
            let mut next = KvmGuest::prepare_with(other, workload.clone(), &processor).unwrap();
            assert_eq!(next.machine(), guest.machine());
            let before = [0, 1].map(|vcpu| word(&guest, vcpu, control::TICKS));
            next.restore(&state).unwrap();
            next.resume().unwrap();
            wait_until(&next, |vcpu| {
                word(&next, vcpu, control::TICKS) >= before[vcpu as usize] + 2
            });
            guest = next;
        }
        let steps = stop(&guest);
        guest.pause().unwrap();
        compare(guest.ram(), &workload, &steps);
        judge(&guest, &steps);
    }
}

#[test]
fn the_form_is_part_of_the_machine_and_the_process_guest_has_none() {
    for form in [SMALL, KERNEL] {
        let workload = in_form(form, 1, 1);
        let made = crate::vmm::process::ProcessGuest::new(memory(flat()), workload);
        let error = made.map(drop).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("forms of the KVM guest"), "{cause}");
    }
    if !kvm() {
        return;
    }
    let forms = [MachineForm::default(), SMALL, KERNEL, SMALL_KERNEL];
    let texts =
        forms.map(|form| KvmGuest::prepare(memory(flat()), in_form(form, 1, 1)).unwrap().machine());
    assert_eq!(texts.iter().collect::<HashSet<_>>().len(), 4, "{texts:?}");
}

/// Runs the test of this name, which is ignored by itself, as a process that is killed
/// after `limit`: its vCPU may wait in the kernel in a way that nothing else ends.
fn as_child(test: &str, limit: Duration) {
    let name = format!("vmm::kvm::tests::{test}");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([&name, "--exact", "--ignored", "--nocapture"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if begun.elapsed() > limit {
            child.kill().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut output = String::new();
    if status.is_some() {
        use std::io::Read;
        child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    }
    let status = status.unwrap_or_else(|| panic!("{name} hung and was killed"));
    assert!(status.success() && output.contains("1 passed"), "{status}: {output}");
}

#[test]
fn a_vcpu_stuck_at_cpl_0_is_freed_by_giving_its_page_up() {
    as_child("on_demand::stuck_at_cpl_0_until_its_page_is_given_up", Duration::from_secs(60));
}

#[test]
fn a_vcpu_stuck_at_cpl_0_is_freed_by_unregistering() {
    as_child("on_demand::stuck_at_cpl_0_until_unregistered", Duration::from_secs(60));
}
