//! What it costs to know which pages a guest writes: of each kind of guest and log, the time
//! to begin, the time of a round with few and with many pages, and what the guest loses of its
//! steps while a round is taken every 100 ms.
//!
//! All times are of the processor: a round's of the thread that takes it, the guest's of its
//! vCPU's thread, in which it also waits for its writes to be noticed. So what else the machine
//! does counts little, and steps are counted with the log and without it in turn, so that it
//! falls on both. It takes some minutes; what this host cannot do is named.

use nix::time::{ClockId, clock_gettime};
use postcopy::host::new_guest;
use postcopy::memory::dirty_bitmap::DirtyBitmap;
use postcopy::memory::ram::{Backing, GuestRam};
use postcopy::proto::layout::MemoryLayout;
use postcopy::vmm::content::Instruments;
use postcopy::vmm::guest::{DirtyLogChoice, Guest, GuestError, GuestKind};
use postcopy::vmm::workload::{MachineForm, Pattern, Workload, control};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const INTERVAL: Duration = Duration::from_millis(100);
/// Rounds between two times without a log.
const ROUNDS: u32 = 20;
const TURNS: usize = 3;

const LOGS: [(GuestKind, DirtyLogChoice); 4] = [
    (GuestKind::Kvm, DirtyLogChoice::Bitmap),
    (GuestKind::Kvm, DirtyLogChoice::Manual),
    (GuestKind::Kvm, DirtyLogChoice::Ring),
    (GuestKind::Process, DirtyLogChoice::Auto),
];

fn main() {
    println!(
        "| guest | log | MiB | start ms | round: us (pages) | steps left | us a first write |"
    );
    println!("|---|---|---|---|---|---|---|");
    for mib in [256, 1024] {
        for (kind, log) in LOGS {
            if let Err(error) = measure(kind, log, mib) {
                let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
                println!("skipped: {} {}: {error}{cause}", kind.name(), log.name());
            }
        }
    }
}

fn measure(kind: GuestKind, log: DirtyLogChoice, mib: u64) -> Result<(), Box<dyn Error>> {
    let layout = MemoryLayout::pc(mib * MIB / 4096)?;
    let bitmap = DirtyBitmap::create(&layout)?;
    let pages = layout.pages();
    let ram = Arc::new(GuestRam::new(layout, Backing::Memfd)?);
    let workload = Workload {
        pattern: Pattern::Random,
        seed: 1,
        vcpus: 1,
        think_ns: 0,
        step_limit: 0,
        zero_pages: 0,
        form: MachineForm::default(),
        trace: None,
    };
    let mut guest = new_guest(kind, ram, workload, log)?;
    guest.resume()?;
    // All but a few pages are mapped for writing after this.
    while steps(&*guest) < 12 * pages {
        std::thread::sleep(Duration::from_millis(10));
    }

    let (mut start, mut few, mut many, mut left, mut write) =
        (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..TURNS {
        let (without, _) = rate(&mut *guest, |_| Ok(0))?;
        start.push(timed(|| guest.start_dirty_log())?.1);
        let (with, named) = rate(&mut *guest, |guest| guest.dirty_round(&[], &bitmap))?;
        left.push(with / without);
        // What each step took longer, for each page that had to be noticed.
        write.push((1.0 / with - 1.0 / without) * with / named * 1e6);
        for _ in 0..5 {
            std::thread::sleep(Duration::from_secs(1));
            many.push(timed(|| guest.dirty_round(&[], &bitmap))?);
            std::thread::sleep(Duration::from_millis(1));
            few.push(timed(|| guest.dirty_round(&[], &bitmap))?);
        }
        guest.stop_dirty_log()?;
    }
    let micros = |of: Duration| of.as_secs_f64() * 1e6;
    let round = |of: &[(u64, Duration)]| {
        let pages = median(of.iter().map(|(pages, _)| *pages as f64));
        let time = median(of.iter().map(|(_, time)| micros(*time)));
        format!("{time:.0} ({pages:.0})")
    };
    println!(
        "| {} | {} | {mib} | {:.2} | {}, {} | {:.0} % | {:.2} |",
        kind.name(),
        log.name(),
        median(start.into_iter().map(micros)) / 1e3,
        round(&few),
        round(&many),
        median(left.into_iter()) * 100.0,
        median(write.into_iter()),
    );
    Ok(())
}

fn steps(guest: &dyn Guest) -> u64 {
    Instruments::new(guest.ram(), 0).get(control::STEPS)
}

/// The processor time of the guest's only vCPU.
fn vcpu_time(guest: &dyn Guest) -> Result<f64, Box<dyn Error>> {
    let thread = guest.vcpu_threads()[0];
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat"))?;
    let nanos = text.split(' ').next().ok_or("no times of the thread")?;
    Ok(nanos.parse::<f64>()? / 1e9)
}

/// The guest's steps a second of its own while `round` is called every 100 ms, and the pages that
/// it returned in such a second.
fn rate(
    guest: &mut dyn Guest,
    mut round: impl FnMut(&mut dyn Guest) -> Result<u64, GuestError>,
) -> Result<(f64, f64), Box<dyn Error>> {
    let (began, from, time) = (Instant::now(), steps(guest), vcpu_time(guest)?);
    let mut pages = 0;
    for turn in 1..=ROUNDS {
        std::thread::sleep((began + INTERVAL * turn).saturating_duration_since(Instant::now()));
        pages += round(guest)?;
    }
    let seconds = vcpu_time(guest)? - time;
    Ok(((steps(guest) - from) as f64 / seconds, pages as f64 / seconds))
}

fn timed<T, E>(run: impl FnOnce() -> Result<T, E>) -> Result<(T, Duration), E> {
    let now = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
    let began = now().unwrap_or_default();
    run().map(|value| (value, now().unwrap_or_default().saturating_sub(began)))
}

fn median(of: impl Iterator<Item = f64>) -> f64 {
    let mut of: Vec<f64> = of.collect();
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}
