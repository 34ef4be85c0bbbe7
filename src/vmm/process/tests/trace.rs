//! The process guest as it replays a trace.

use super::*;
use crate::vmm::trace::Trace;
use crate::vmm::workload::WorkloadError;
use std::io::Write;

/// The pages of a trace, as the checker wants them.
pub(super) fn pages(workload: &Workload) -> Vec<Vec<u64>> {
    let Some(trace) = &workload.trace else { return vec![] };
    let pages = |vcpu| trace.touches(vcpu).iter().map(|touch| touch.page).collect();
    (0..trace.vcpus()).map(pages).collect()
}

/// Of this many touches a vCPU, which lie in its own slice and in those of others.
fn traced(touches: u64, vcpus: u32, apart_us: u64) -> Workload {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "# postcopy-trace v1\npages {PAGES}\npage_size 4096").unwrap();
    for i in 0..touches {
        for vcpu in 0..u64::from(vcpus) {
            let page = SYSTEM_PAGES + (i * u64::from(vcpus) + vcpu) * 7 % (PAGES - 612);
            writeln!(file, "touch {} {page} {vcpu}", i * apart_us).unwrap();
        }
    }
    let trace = Some(Arc::new(Trace::load(file.path()).unwrap()));
    Workload { trace, ..workload(Pattern::Trace, vcpus) }
}

fn error(workload: &Workload) -> String {
    let layout = MemoryLayout::flat(PAGES).unwrap();
    workload.check_without_machine(&layout).unwrap_err().to_string()
}

#[test]
fn each_vcpu_touches_the_pages_of_the_trace_in_its_order_and_no_earlier() {
    let _watchdog = Watchdog::start("each_vcpu_touches_the_pages_of_the_trace");
    let workload = traced(200, 2, 500);
    let mut guest = ProcessGuest::new(memory(Backing::Memfd), workload.clone()).unwrap();
    // Beyond its end: from its beginning.
    for vcpu in 0..2 {
        instruments(&guest, vcpu).set(control::STEP_LIMIT, 201);
    }
    let began = Instant::now();
    guest.resume().unwrap();
    wait_until("all vCPUs to end", || guest.ended());
    assert!(began.elapsed() >= Duration::from_micros(199 * 500), "{:?}", began.elapsed());
    // The fourth part of all visits writes; the first touch wrote twice.
    let bytes = content(&guest);
    // Below 256.
    let visits = |page: u64| bytes[page as usize * PAGE_SIZE + 8];
    for pages in pages(&workload) {
        let told: Vec<u8> = pages.iter().map(|&page| visits(page)).collect();
        let expected = |i: usize| if i == 0 { 2 } else { u8::from(i.is_multiple_of(4)) };
        assert_eq!(told, (0..200).map(expected).collect::<Vec<_>>());
    }
    let summary = finish_and_check(&mut guest).unwrap();
    assert_eq!((summary.steps, summary.visits), (vec![201; 2], 102));
}

#[test]
fn a_stall_is_not_caught_up_on() {
    let _watchdog = Watchdog::start("a_stall_is_not_caught_up_on");
    let workload = Workload { step_limit: 41, ..traced(40, 1, 2000) };
    let mut guest = ProcessGuest::new(memory(Backing::Memfd), workload).unwrap();
    guest.resume().unwrap();
    steps(&guest, 10);
    guest.pause().unwrap();
    let made = instruments(&guest, 0).get(control::STEPS);
    std::thread::sleep(Duration::from_millis(100));
    let again = Instant::now();
    guest.resume().unwrap();
    wait_until("the end", || guest.ended());
    // One step may have been due.
    let least = Duration::from_micros((40 - made - 1) * 2000);
    assert!(again.elapsed() >= least, "{:?} for {} steps", again.elapsed(), 40 - made);
    finish_and_check(&mut guest).unwrap();
}

#[test]
fn a_guest_that_has_moved_begins_its_trace_anew_once() {
    let _watchdog = Watchdog::start("a_guest_that_has_moved_begins_its_trace_anew_once");
    let workload = traced(300, 2, 20);
    let mut guest = ProcessGuest::new(memory(Backing::Memfd), workload).unwrap();
    let mut starts = vec![];
    for _ in 0..3 {
        guest
            .resume()
            .or_else(|error| match cause(&error) {
                ProcessError::Running => Ok(()),
                _ => Err(error),
            })
            .unwrap();
        steps(&guest, 431);
        guest = migrate(&mut guest);
        steps(&guest, 1);
        starts.push(instruments(&guest, 0).get(control::TRACE_START));
    }
    assert!(starts[0] >= 431 && starts.iter().all(|start| *start == starts[0]), "{starts:?}");
    let summary = finish_and_check(&mut guest).unwrap();
    assert!(summary.steps.iter().all(|&steps| steps > 3 * 431), "{summary:?}");
}

#[test]
fn the_checker_sees_a_trace_that_was_begun_elsewhere() {
    let _watchdog = Watchdog::start("the_checker_sees_a_trace_that_was_begun_elsewhere");
    let mut guest = ProcessGuest::new(memory(Backing::Memfd), traced(300, 1, 0)).unwrap();
    guest.resume().unwrap();
    steps(&guest, 1001);
    let mut moved = migrate(&mut guest);
    steps(&moved, 100);
    instruments(&moved, 0).set(control::TRACE_START, 4);
    finish_and_check(&mut moved).unwrap_err();
}

#[test]
fn a_trace_that_does_not_fit_the_guest_is_refused_with_what_it_needs() {
    let trace = traced(100, 1, 0);
    let highest = trace.trace.as_ref().unwrap().highest();
    let fits = Workload { zero_pages: PAGES - highest - 1, ..trace.clone() };
    let layout = MemoryLayout::flat(PAGES).unwrap();
    assert_eq!(fits.check_without_machine(&layout), Ok(()));
    let why = error(&Workload { zero_pages: PAGES - highest, ..trace.clone() });
    assert!(why.contains(&format!("at least {} pages of memory", highest + 1)), "{why}");
    let why = error(&Workload { vcpus: 2, ..trace.clone() });
    assert!(why.contains("is of 1 vCPUs; the guest has 2 (--vcpus 1)"), "{why}");
    for wrong in [
        Workload { trace: None, ..trace.clone() },
        Workload { pattern: Pattern::Random, ..trace.clone() },
    ] {
        assert!(error(&wrong).contains("Trace goes with a trace"));
    }
    assert_eq!(trace.check_under_kvm(&layout), Err(WorkloadError::TraceUnderKvm));
}
