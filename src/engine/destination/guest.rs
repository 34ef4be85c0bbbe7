//! The destination's guest thread: everything of the VMM that may block, and the
//! watch over the guest's steps once it runs.

use crate::engine::error_chain;
use crate::engine::vm::{DestinationVm, GuestFigures, VmError};
use crate::failpoint::failpoint;
use crate::memory::hugetlb;
use crate::memory::ram::GuestRam;
use crate::memory::reserve::{Counterweight, ReserveError, Reserved, reserve_files};
use crate::memory::users::{self, MemoryUser};
use crate::proto::layout::MemoryLayout;
use crate::proto::message::{FEATURE_COPY, FEATURES, Hello, Mismatch};
use crate::uffd::{DestinationBacking, Placer, Trap, UffdOptions, register};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use nix::unistd::Pid;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// How long the VMM may take to come back from its last call.
const END_MAX: Duration = Duration::from_secs(30);
/// How often the guest's steps are looked at.
const SAMPLE_EVERY: Duration = Duration::from_millis(5);
/// The most samples kept; then every second one goes and they are taken half as often.
const SAMPLES_MAX: usize = 4096;
/// For how long the steady rate is measured after the last page.
const STEADY: Duration = Duration::from_millis(300);

/// What the guest thread is told.
pub enum GuestCommand {
    /// Make memory, traps, VM and vCPUs for this proposal.
    Prepare {
        /// The proposal.
        hello: Box<Hello>,
        /// What memory is made of here.
        backing: DestinationBacking,
        /// It need not be there.
        overcommit: bool,
        /// Whether the guest runs under KVM.
        kvm: bool,
        /// Users of guest memory that only the VMM knows of.
        users: Vec<MemoryUser>,
    },
    /// Put this machine state in.
    Restore(Vec<u8>),
    /// Let the vCPUs run.
    Run,
    /// The guest stays paused, and is this side's.
    KeepPaused,
    /// Collect the guest's own figures.
    Figures,
}

/// A guest without state: memory that is trapped, and vCPUs that do not run.
pub struct Shell {
    /// Its memory.
    pub ram: Arc<GuestRam>,
    /// Faults come out here.
    pub trap: Trap,
    /// Pages go in here.
    pub placer: Placer,
    /// The memory for them.
    pub reserved: Reserved,
    /// The kernel thread of each vCPU.
    pub threads: Vec<Pid>,
}

/// How a shell is made.
struct How {
    backing: DestinationBacking,
    overcommit: bool,
    kvm: bool,
}

/// What the guest thread says.
pub enum GuestEvent {
    /// The shell stands.
    Prepared(Box<Shell>),
    /// The proposal cannot be taken.
    Refused(Mismatch),
    /// The state is in.
    Restored,
    /// The state was not taken.
    RestoreFailed(String),
    /// The first vCPU entered the guest at this time.
    Entered(Instant),
    /// The vCPUs could not be started.
    RunFailed(String),
    /// The guest has done what it was to do.
    WorkloadEnded,
    /// The guest's figures.
    Figures(Box<RunFigures>),
}

/// The guest's own figures, and those of its steps over time.
#[derive(Debug, Default)]
pub struct RunFigures {
    /// The guest's own.
    pub guest: GuestFigures,
    /// Steps from the first entry until the figures were asked for.
    pub steps_in_brownout: Option<u64>,
    /// Steps a second after that.
    pub steady_per_second: Option<u64>,
    /// From the first entry until the rate reached 90 % of the steady one.
    pub until_90_percent: Option<Duration>,
    /// Steps by the time since the first entry.
    pub history: Vec<(Duration, u64)>,
}

/// The guest thread.
pub struct GuestThread {
    commands: Sender<GuestCommand>,
    over: Arc<AtomicBool>,
    thread: JoinHandle<Box<dyn DestinationVm>>,
}

impl GuestThread {
    /// Tells it something; done in order.
    pub fn tell(&self, command: GuestCommand) {
        // It ends only after this side of the channel.
        let _ = self.commands.send(command);
    }

    /// Lets it end and takes the VMM back; `None` if it does not come back from a call, say
    /// because it waits for a page that does not come.
    pub fn end(self) -> Option<Box<dyn DestinationVm>> {
        drop(self.commands);
        self.over.store(true, Ordering::Relaxed);
        let asked = Instant::now();
        while !self.thread.is_finished() {
            if asked.elapsed() > END_MAX {
                tracing::error!("the VMM does not answer; it is left behind");
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.thread.join().ok()
    }
}

/// Starts the guest thread; `tell` returns `false` once nobody listens.
pub fn spawn(
    vm: Box<dyn DestinationVm>,
    tell: impl Fn(GuestEvent) -> bool + Send + 'static,
) -> std::io::Result<GuestThread> {
    let (commands, receiver) = crossbeam_channel::unbounded();
    let over = Arc::new(AtomicBool::new(false));
    let stop = over.clone();
    let run = move || {
        crate::engine::hurry();
        Worker { vm, tell, steps: None, ended: false, over: stop }.run(&receiver)
    };
    let thread = std::thread::Builder::new().name("guest".into()).spawn(run)?;
    Ok(GuestThread { commands, over, thread })
}

struct Worker<T> {
    vm: Box<dyn DestinationVm>,
    tell: T,
    steps: Option<Steps>,
    ended: bool,
    /// The session is over: nothing that takes long is worth it.
    over: Arc<AtomicBool>,
}

/// Calls the VMM. A panic of its fails the call and not the session's threads: whoever waits
/// for an answer gets one, and the VMM is handed back whatever it did.
fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    // What the panic left half done is the VMM's own; the engine looks at none of it.
    std::panic::catch_unwind(AssertUnwindSafe(call)).map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
        format!("the VMM panicked: {}", text.unwrap_or("without a word"))
    })
}

/// The same for a call that only measures: nothing depends on it.
fn measured<T: Default>(call: impl FnOnce() -> T) -> T {
    guarded(call).unwrap_or_else(|why| {
        tracing::error!(why, "a figure of the guest is missing");
        T::default()
    })
}

/// The same for a call that can fail in its own way.
fn answered<T>(call: impl FnOnce() -> Result<T, VmError>) -> Result<T, String> {
    guarded(call)?.map_err(|error| error_chain(error.as_ref()))
}

impl<T: Fn(GuestEvent) -> bool> Worker<T> {
    fn run(mut self, commands: &Receiver<GuestCommand>) -> Box<dyn DestinationVm> {
        loop {
            let command = match &self.steps {
                None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(steps) => commands.recv_timeout(steps.every),
            };
            let event = match command {
                Ok(command) => Some(self.obey(command)),
                Err(RecvTimeoutError::Timeout) => self.watch(),
                Err(RecvTimeoutError::Disconnected) => return self.vm,
            };
            if event.is_some_and(|event| !(self.tell)(event)) {
                return self.vm;
            }
        }
    }

    fn obey(&mut self, command: GuestCommand) -> GuestEvent {
        match command {
            GuestCommand::Prepare { hello, backing, overcommit, kvm, users } => {
                match self.prepare(&hello, (backing, overcommit), kvm, &users) {
                    Ok(shell) => GuestEvent::Prepared(Box::new(shell)),
                    Err(mismatch) => GuestEvent::Refused(mismatch),
                }
            }
            GuestCommand::Restore(state) => match answered(|| self.vm.restore(&state)) {
                Ok(()) => GuestEvent::Restored,
                Err(why) => GuestEvent::RestoreFailed(why),
            },
            GuestCommand::Run => match answered(|| self.vm.resume()) {
                Ok(entered) => {
                    self.steps = Some(Steps::new(entered));
                    GuestEvent::Entered(entered)
                }
                Err(why) => GuestEvent::RunFailed(why),
            },
            GuestCommand::KeepPaused => match answered(|| self.vm.keep_paused()) {
                Ok(()) => GuestEvent::Entered(Instant::now()),
                Err(why) => GuestEvent::RunFailed(why),
            },
            GuestCommand::Figures => GuestEvent::Figures(Box::new(self.figures())),
        }
    }

    fn prepare(
        &mut self,
        hello: &Hello,
        (backing, overcommit): (DestinationBacking, bool),
        kvm: bool,
        users: &[MemoryUser],
    ) -> Result<Shell, Mismatch> {
        let page_size = crate::proto::page::PAGE_SIZE as u32;
        if hello.page_size != page_size {
            return Err(Mismatch::new("the page size", hello.page_size, page_size));
        }
        if hello.features & !FEATURES != 0 {
            let [theirs, ours] = [hello.features, FEATURES].map(|bits| format!("{bits:#x}"));
            return Err(Mismatch::new("features", theirs, ours));
        }
        let bytes = hello.layout.bytes();
        let cannot = |field: &str, why: String| Mismatch::new(field, format!("{bytes} bytes"), why);
        let unfit =
            |error: &(dyn std::error::Error + 'static)| cannot("memory", error_chain(error));
        // What is known already, before the VMM makes anything.
        users::check_users(users).map_err(|error| unfit(&error))?;
        let panicked = |why: String| Mismatch::new("the VM", &hello.machine, why);
        let own = guarded(|| self.vm.memory(hello)).map_err(panicked)??;
        let (ram, backing) = match own {
            Some(memory) => {
                let ram = vmm_memory(hello, memory)?;
                let backing = DestinationBacking::of(&ram);
                (ram, backing)
            }
            None => {
                let ram = GuestRam::new(hello.layout.clone(), backing.ram());
                let ram = ram.map_err(|error| unfit(&error))?;
                // A VMM may have had all that it will ever map locked.
                users::check_can_be_trapped(&ram).map_err(|error| unfit(&error))?;
                (ram, backing)
            }
        };
        if hello.features & FEATURE_COPY != 0 && !backing.takes_copies() {
            let ours = format!("no such page, as its memory is {backing} and not memfd-continue");
            return Err(Mismatch::new("pages that come before the pause", "some", ours));
        }
        let ram = Arc::new(ram);
        let how = How { backing, overcommit, kvm };
        let shell = self.shell(hello, &ram, how, users);
        if shell.is_err() {
            // A VMM's own memory stays when this is over; what was reserved of it must not.
            // SAFETY: it is not registered any more, if it ever was; no vCPU of the guest ever
            // ran, and `DestinationVm::memory` says that what is in it is lost.
            let _ = unsafe { ram.discard() };
        }
        shell
    }

    /// Makes traps, VM and vCPUs over this memory, which is empty.
    fn shell(
        &mut self,
        hello: &Hello,
        ram: &Arc<GuestRam>,
        how: How,
        users: &[MemoryUser],
    ) -> Result<Shell, Mismatch> {
        let How { backing, overcommit, kvm } = how;
        let bytes = hello.layout.bytes();
        let cannot = |field: &str, why: String| Mismatch::new(field, format!("{bytes} bytes"), why);
        let unfit =
            |error: &(dyn std::error::Error + 'static)| cannot("memory", error_chain(error));
        failpoint!(
            "destination::before_reserved",
            return Err(cannot("memory", "a failpoint".into()))
        );
        // Who touches a huge page that is not there is killed.
        let reserved = match overcommit && backing != DestinationBacking::Hugetlb {
            true => Reserved::Nothing,
            false => reserve(ram, backing, &self.over).map_err(|error| unfit(&error))?,
        };
        failpoint!("destination::after_reserved");
        failpoint!(
            "destination::before_registered",
            return Err(cannot("memory traps", "a failpoint".into()))
        );
        let options = if kvm { UffdOptions::for_kvm() } else { UffdOptions::for_process() };
        // SAFETY: nothing has a reference into this new memory; the VMM reaches it through
        // raw pointers only, as `DestinationVm::prepare` demands, and no engine thread
        // touches the mapping.
        let (trap, placer) = unsafe { register(ram.clone(), backing, options) }
            .map_err(|error| cannot("memory traps", error_chain(&error)))?;
        failpoint!("destination::after_registered");
        let prepared = guarded(|| {
            let machine = self.vm.prepare(hello, ram.guest_memory())?;
            Ok((machine, self.vm.vcpu_threads()))
        });
        let panicked = |why: String| Mismatch::new("the VM", &hello.machine, why);
        let prepared = prepared.map_err(panicked).flatten().and_then(|(machine, threads)| {
            // Now the VMM has opened its devices.
            users::check_users(users).map_err(|error| unfit(&error))?;
            if machine != hello.machine {
                let field = "the machine configuration";
                return Err(Mismatch::new(field, &hello.machine, &machine));
            }
            Ok(threads)
        });
        let threads = prepared.inspect_err(|_| {
            // No vCPU of it ever ran: its memory can go as it is.
            let _ = placer.unregister();
        })?;
        Ok(Shell { ram: ram.clone(), trap, placer, reserved, threads })
    }

    /// Looks at the running guest.
    fn watch(&mut self) -> Option<GuestEvent> {
        let looked = guarded(|| (self.vm.steps(), !self.ended && self.vm.workload_ended()));
        let (steps, ends) = looked.unwrap_or_else(|why| {
            tracing::error!(why, "the guest's steps are not looked at any more");
            self.steps = None;
            (None, false)
        });
        if let (Some(history), Some(steps)) = (&mut self.steps, steps) {
            history.push(steps);
        }
        if ends {
            self.ended = true;
            return Some(GuestEvent::WorkloadEnded);
        }
        None
    }

    fn figures(&mut self) -> RunFigures {
        let guest = measured(|| self.vm.figures());
        let mut figures = RunFigures { guest, ..RunFigures::default() };
        let before = measured(|| self.vm.steps());
        let (Some(history), Some(before)) = (&mut self.steps, before) else {
            return figures;
        };
        history.push(before);
        let first = history.samples.first().map_or(before, |(_, steps)| *steps);
        figures.steps_in_brownout = Some(before.saturating_sub(first));
        let began = Instant::now();
        std::thread::sleep(STEADY);
        let made = measured(|| self.vm.steps()).unwrap_or(before).saturating_sub(before);
        let steady = made as f64 / began.elapsed().as_secs_f64();
        // A guest that has ended its work has no steady rate.
        if !measured(|| self.vm.workload_ended()) {
            figures.steady_per_second = Some(steady as u64);
            figures.until_90_percent = history.until_rate(0.9 * steady);
        }
        figures.history.clone_from(&history.samples);
        figures
    }
}

/// Takes the memory that the guest's pages will need, so that it is this guest's before it is
/// committed.
fn reserve(
    ram: &GuestRam,
    backing: DestinationBacking,
    stop: &AtomicBool,
) -> Result<Reserved, ReserveError> {
    Ok(match backing {
        DestinationBacking::MemfdContinue => {
            reserve_files(ram, stop)?;
            Reserved::InPlace
        }
        DestinationBacking::Hugetlb => {
            hugetlb::reserve(ram, stop)?;
            Reserved::InPool
        }
        DestinationBacking::Anonymous | DestinationBacking::MemfdCopy => {
            Reserved::Elsewhere(Counterweight::new(ram.layout().pages(), stop)?)
        }
    })
}

/// Memory that the VMM made for the proposed guest, emptied.
fn vmm_memory(hello: &Hello, memory: GuestMemoryMmap) -> Result<GuestRam, Mismatch> {
    let refuse = |error: &(dyn std::error::Error + 'static)| {
        let bytes = format!("{} bytes", hello.layout.bytes());
        Mismatch::new("memory", bytes, error_chain(error))
    };
    let ram = GuestRam::from_guest_memory(memory).map_err(|error| refuse(&error))?;
    if *ram.layout() != hello.layout {
        let regions = |layout: &MemoryLayout| format!("{:?}", layout.regions());
        let (theirs, ours) = (regions(&hello.layout), regions(ram.layout()));
        return Err(Mismatch::new("the memory layout", theirs, ours));
    }
    users::check(&ram, &[]).map_err(|error| refuse(&error))?;
    users::check_can_be_trapped(&ram).map_err(|error| refuse(&error))?;
    // SAFETY: it is not registered yet, and `DestinationVm::memory` says that what is in it
    // is lost.
    unsafe { ram.discard() }.map_err(|error| refuse(&error))?;
    Ok(ram)
}

/// The guest's steps over time.
#[derive(Debug)]
struct Steps {
    entered: Instant,
    every: Duration,
    samples: Vec<(Duration, u64)>,
}

impl Steps {
    fn new(entered: Instant) -> Self {
        Self { entered, every: SAMPLE_EVERY, samples: Vec::new() }
    }

    fn push(&mut self, steps: u64) {
        if self.samples.len() == SAMPLES_MAX {
            let mut index = 0;
            self.samples.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.every *= 2;
        }
        self.samples.push((self.entered.elapsed(), steps));
    }

    /// When the rate over some ten samples first reached `rate` steps a second.
    fn until_rate(&self, rate: f64) -> Option<Duration> {
        const SPAN: usize = 10;
        self.samples.windows(SPAN + 1).find_map(|window| {
            let ((from, before), (to, after)) = (window[0], window[SPAN]);
            let made = after.saturating_sub(before) as f64;
            (made >= rate * (to - from).as_secs_f64()).then_some(to)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_of_steps_stays_bounded_and_finds_the_rate() {
        let mut steps = Steps::new(Instant::now());
        steps.samples = (0..40u64)
            .map(|i| (Duration::from_millis(5 * i), if i < 20 { 0 } else { (i - 20) * 100 }))
            .collect();
        // 100 steps in 5 ms are 20,000 a second, reached over a whole span at sample 30.
        assert_eq!(steps.until_rate(20_000.0), Some(Duration::from_millis(150)));
        assert_eq!(steps.until_rate(21_000.0), None);
        for made in 0..3 * SAMPLES_MAX as u64 {
            steps.push(made);
        }
        assert!(steps.samples.len() <= SAMPLES_MAX);
        assert!(steps.every > SAMPLE_EVERY);
    }
}
