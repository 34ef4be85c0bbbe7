//! [`Vcpu`]: a vCPU's thread and how it is told what to do.
//!
//! The thread owns the vCPU. It is *parked* (waiting for a command) or *running* (in a
//! loop around `KVM_RUN`); it leaves the loop when `stop` is set. To get it out of the
//! kernel, `immediate_exit` is set too and a signal sent: the flag covers the moment
//! before `KVM_RUN`, the signal the time inside it, so that no kick is lost.
//!
//! A program that has nothing more to do stores to the doorbell. Its thread then waits
//! in the loop, outside KVM, until it is stopped; after `resume` the guest rings again.

use super::dirty::Rings;
use super::error::{KvmError, call, of_vcpu};
use super::signals;
use super::state::{VcpuShape, VcpuState, tell_of_pause};
use super::tables::{DOORBELL_EXCEPTIONS, DOORBELL_PHYSICAL};
use crate::memory::ram::GuestRam;
use crate::proto::layout::GuestAddress;
use crate::proto::page::PAGE_SIZE;
use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread that is dropped is waited for.
const DROP_WAIT: Duration = Duration::from_secs(2);
/// How many exits an access in flight can need to be completed.
const COMPLETION_EXITS_MAX: u32 = 16;

/// When the first vCPU entered the guest after a `resume`, for all vCPUs of a guest.
#[derive(Debug)]
pub struct FirstEntry {
    base: Instant,
    /// Nanoseconds after `base`, plus 1; 0 for not yet.
    stamp: AtomicU64,
}

impl FirstEntry {
    /// Not yet.
    pub fn new() -> Self {
        Self { base: Instant::now(), stamp: AtomicU64::new(0) }
    }

    /// Forgets it.
    pub fn clear(&self) {
        self.stamp.store(0, Ordering::Release);
    }

    /// When it was, once it was.
    pub fn get(&self) -> Option<Instant> {
        let stamp = self.stamp.load(Ordering::Acquire).checked_sub(1)?;
        Some(self.base + Duration::from_nanos(stamp))
    }

    fn set_if_first(&self) {
        if self.stamp.load(Ordering::Relaxed) == 0 {
            let stamp = self.base.elapsed().as_nanos() as u64 + 1;
            let _ = self.stamp.compare_exchange(0, stamp, Ordering::Release, Ordering::Relaxed);
        }
    }
}

enum Command {
    Run,
    Capture(SyncSender<Result<VcpuState, KvmError>>),
    Restore(Box<VcpuState>, SyncSender<Result<(), KvmError>>),
}

/// An answer that a vCPU's thread will give.
pub struct Answer<T> {
    vcpu: u32,
    receiver: Receiver<Result<T, KvmError>>,
}

impl<T> Answer<T> {
    /// Waits for it.
    pub fn wait(self, limit: Duration) -> Result<T, KvmError> {
        let vcpu = self.vcpu;
        match self.receiver.recv_timeout(limit) {
            Ok(answer) => answer.map_err(of_vcpu(vcpu)),
            Err(_) => Err(KvmError::NoAnswer { vcpu, waited: limit }),
        }
    }
}

/// What the thread and its owner share.
struct Shared {
    vcpu: u32,
    /// Locked by the thread for as long as it lives; in here so that `kvm_run`, which
    /// `immediate_exit` is part of, stays mapped for as long as either side may touch it.
    fd: Mutex<VcpuFd>,
    immediate_exit: usize,
    stop: AtomicBool,
    running: Mutex<bool>,
    changed: Condvar,
    failure: Mutex<Option<String>>,
    first_entry: Arc<FirstEntry>,
    shape: VcpuShape,
    ram: Arc<GuestRam>,
    rings: Option<Arc<Rings>>,
}

/// A vCPU with its thread.
pub struct Vcpu {
    shared: Arc<Shared>,
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
    tid: Pid,
}

impl Vcpu {
    /// Starts the thread of vCPU number `vcpu`, parked.
    pub fn start(
        vcpu: u32,
        mut fd: VcpuFd,
        shape: VcpuShape,
        ram: Arc<GuestRam>,
        first_entry: Arc<FirstEntry>,
        rings: Option<Arc<Rings>>,
    ) -> Result<Self, KvmError> {
        signals::install()?;
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit as usize;
        let shared = Arc::new(Shared {
            vcpu,
            fd: Mutex::new(fd),
            immediate_exit,
            stop: AtomicBool::new(true),
            running: Mutex::new(false),
            changed: Condvar::new(),
            failure: Mutex::new(None),
            first_entry,
            shape,
            ram,
            rings,
        });
        let (commands, received) = channel();
        let (tid_sender, tid) = sync_channel(1);
        let thread_shared = Arc::clone(&shared);
        let body = move || {
            let _ = tid_sender.send(signals::unblock().map(|()| nix::unistd::gettid()));
            thread_shared.serve(&received);
        };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{vcpu}"))
            .spawn(body)
            .map_err(KvmError::Thread)?;
        let ended = || KvmError::Failed(format!("vCPU {vcpu}'s thread did not start"));
        let tid = tid.recv().map_err(|_| ended())??;
        Ok(Self { shared, commands: Some(commands), thread: Some(thread), tid })
    }

    /// The kernel's number of the thread.
    pub fn tid(&self) -> Pid {
        self.tid
    }

    /// The error that ended its loop, if one did.
    pub fn failure(&self) -> Option<String> {
        lock(&self.shared.failure).clone()
    }

    /// Lets it run.
    pub fn resume(&self) -> Result<(), KvmError> {
        let mut running = lock(&self.shared.running);
        if *running {
            return Ok(());
        }
        *running = true;
        // Before the command: a kick that comes after it must not be undone.
        self.shared.stop.store(false, Ordering::SeqCst);
        self.shared.immediate_exit().store(0, Ordering::SeqCst);
        drop(running);
        let sent = self.send(Command::Run);
        if sent.is_err() {
            *lock(&self.shared.running) = false;
        }
        sent
    }

    /// Tells it to stop; does not wait.
    pub fn kick(&self) -> Result<(), KvmError> {
        {
            let _running = lock(&self.shared.running);
            self.shared.stop.store(true, Ordering::SeqCst);
            self.shared.immediate_exit().store(1, Ordering::SeqCst);
            self.shared.changed.notify_all();
        }
        signals::kick(self.tid)
    }

    /// Has it leave the guest and go on at once, so that KVM logs what its processor has
    /// written down of its writes.
    pub fn nudge(&self) -> Result<(), KvmError> {
        signals::kick(self.tid)
    }

    /// Takes a kick back: it runs on, whether or not it has stopped by now.
    pub fn run_on(&self) -> Result<(), KvmError> {
        let running = lock(&self.shared.running);
        if *running {
            // Before it parks it looks at this, under the same lock.
            self.shared.stop.store(false, Ordering::SeqCst);
            self.shared.immediate_exit().store(0, Ordering::SeqCst);
            return Ok(());
        }
        drop(running);
        self.resume()
    }

    /// Waits until it is parked, after a kick.
    pub fn wait_parked(&self, limit: Duration) -> Result<(), KvmError> {
        let running = lock(&self.shared.running);
        let (running, _) = self
            .shared
            .changed
            .wait_timeout_while(running, limit, |running| *running)
            .unwrap_or_else(PoisonError::into_inner);
        if *running {
            return Err(KvmError::NotStopping { vcpu: self.shared.vcpu, waited: limit });
        }
        Ok(())
    }

    /// Has a parked vCPU take its state.
    pub fn capture(&self) -> Result<Answer<VcpuState>, KvmError> {
        let (sender, receiver) = sync_channel(1);
        self.send(Command::Capture(sender))?;
        Ok(Answer { vcpu: self.shared.vcpu, receiver })
    }

    /// Has a parked vCPU put a state in.
    pub fn restore(&self, state: VcpuState) -> Result<Answer<()>, KvmError> {
        let (sender, receiver) = sync_channel(1);
        self.send(Command::Restore(Box::new(state), sender))?;
        Ok(Answer { vcpu: self.shared.vcpu, receiver })
    }

    fn send(&self, command: Command) -> Result<(), KvmError> {
        let ended = || KvmError::Failed(format!("vCPU {}'s thread has ended", self.shared.vcpu));
        self.commands.as_ref().and_then(|sender| sender.send(command).ok()).ok_or_else(ended)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let _ = self.kick();
        self.commands = None;
        // A thread that waits in the kernel for a page that never comes cannot be ended.
        // It is left behind; it keeps alive what it uses, and runs no guest code again.
        if self.wait_parked(DROP_WAIT).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the mapping that `fd` owns, which lives as long as
        // `self`. Kernel and threads access it only as a byte, atomically.
        unsafe { AtomicU8::from_ptr(self.immediate_exit as *mut u8) }
    }

    fn serve(&self, commands: &Receiver<Command>) {
        let mut fd = lock(&self.fd);
        // Whether the guest has a clock, and whether it missed time since it last ran.
        let (mut clock, mut paused) = (self.shape.clock, false);
        for command in commands {
            match command {
                Command::Run => {
                    if clock && paused {
                        self.tell_of_pause(&fd);
                    }
                    paused = true;
                    while !self.parks(self.run(&mut fd)) {}
                    self.changed.notify_all();
                }
                Command::Capture(answer) => {
                    let _ = answer.send(VcpuState::capture(&fd, &self.shape));
                }
                Command::Restore(state, answer) => {
                    clock = state.has_clock();
                    let _ = answer.send(state.restore(&fd));
                }
            }
        }
    }

    /// Parks after a run that came to `outcome`, unless the kick that ended it was taken back.
    fn parks(&self, outcome: Result<bool, String>) -> bool {
        let stopped = match outcome {
            Ok(stopped) => stopped,
            Err(reason) => {
                lock(&self.failure).get_or_insert(reason);
                true
            }
        };
        let mut running = lock(&self.running);
        let failed = lock(&self.failure).is_some();
        *running = !(failed || stopped && self.stop.load(Ordering::SeqCst));
        !*running
    }

    /// Tells the guest's watchdogs of a pause. A guest is not stopped for want of that.
    fn tell_of_pause(&self, fd: &VcpuFd) {
        if let Err(error) = tell_of_pause(fd).map_err(of_vcpu(self.vcpu)) {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, cause, "the guest cannot be told that it was paused");
        }
    }

    /// Runs guest code until told to stop, and leaves nothing in flight; or not, and returns
    /// `false`, if it is to run on after all.
    fn run(&self, fd: &mut VcpuFd) -> Result<bool, String> {
        if lock(&self.failure).is_some() {
            return Ok(true);
        }
        self.first_entry.set_if_first();
        while !self.stop.load(Ordering::SeqCst) {
            match self.enter(fd)? {
                Ok(VcpuExit::MmioWrite(DOORBELL_PHYSICAL, _)) => self.wait_for_stop(),
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => self.empty_rings()?,
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                other => {
                    let exit = self.name(other);
                    return Err(format!("vCPU {}: {exit}{}", self.vcpu, whereabouts(fd)));
                }
            }
        }
        self.complete_access(fd)
    }

    /// KVM does not let a vCPU into the guest whose dirty ring has no room for its writes.
    fn empty_rings(&self) -> Result<(), String> {
        let emptied = self.rings.as_ref().map_or(Ok(()), |rings| rings.empty());
        emptied.map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            format!("vCPU {}: {error}{}", self.vcpu, cause.unwrap_or_default())
        })
    }

    fn wait_for_stop(&self) {
        let running = lock(&self.running);
        let stopped = |_: &mut bool| !self.stop.load(Ordering::SeqCst);
        drop(self.changed.wait_while(running, stopped).unwrap_or_else(PoisonError::into_inner));
    }

    /// An access to a device that made the last exit is complete, and the vCPU's state
    /// consistent, only when KVM has been entered again.
    fn complete_access(&self, fd: &mut VcpuFd) -> Result<bool, String> {
        for _ in 0..COMPLETION_EXITS_MAX {
            if !self.stop.load(Ordering::SeqCst) {
                // It enters KVM anyway.
                return Ok(false);
            }
            match self.enter(fd)? {
                Err(error) if error.errno() == libc::EINTR => return Ok(true),
                Err(error) if error.errno() == libc::EAGAIN => {}
                Ok(VcpuExit::MmioWrite(DOORBELL_PHYSICAL, _) | VcpuExit::Intr) => {}
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => self.empty_rings()?,
                other => {
                    let exit = self.name(other);
                    return Err(format!("vCPU {}: {exit}{}", self.vcpu, whereabouts(fd)));
                }
            }
        }
        Err(format!("vCPU {}: an access to a device does not end", self.vcpu))
    }

    fn enter<'a>(
        &self,
        fd: &'a mut VcpuFd,
    ) -> Result<Result<VcpuExit<'a>, kvm_ioctls::Error>, String> {
        let (exit, lost) = signals::in_guest(move || fd.run());
        let Some(address) = lost else {
            return Ok(exit);
        };
        Err(match self.ram.page_of_host(address) {
            Some(page) => format!("vCPU {}: memory error at {page}", self.vcpu),
            None => format!("vCPU {}: memory error at host address {address:#x}", self.vcpu),
        })
    }

    fn name(&self, exit: Result<VcpuExit<'_>, kvm_ioctls::Error>) -> String {
        const EXCEPTIONS: u64 = DOORBELL_PHYSICAL + DOORBELL_EXCEPTIONS;
        const EXCEPTIONS_END: u64 = EXCEPTIONS + 4 * 32;
        const PAGE: u64 = PAGE_SIZE as u64;
        match exit {
            Ok(VcpuExit::MmioWrite(address @ EXCEPTIONS..EXCEPTIONS_END, _)) => {
                format!("the guest took exception {}", (address - EXCEPTIONS) / 4)
            }
            // KVM emulates an access to a page that it could not get: one that was
            // poisoned because its content is lost.
            Ok(VcpuExit::MmioRead(address, _) | VcpuExit::MmioWrite(address, _))
                if self.ram.layout().page_at(GuestAddress(address - address % PAGE)).is_some() =>
            {
                format!("memory error at guest address {address:#x}")
            }
            Ok(VcpuExit::Shutdown) => {
                "the guest shut down: an exception could not be delivered".to_owned()
            }
            Ok(exit) => format!("unexpected exit {exit:?}"),
            Err(source) => call("KVM_RUN")(source).to_string() + &format!(" ({source})"),
        }
    }
}

/// Where the guest was, for an error message.
fn whereabouts(fd: &VcpuFd) -> String {
    match (fd.get_regs(), fd.get_sregs()) {
        (Ok(regs), Ok(sregs)) => {
            let (rip, rsp, cr2) = (regs.rip, regs.rsp, sregs.cr2);
            format!(" (rip {rip:#x}, rsp {rsp:#x}, cr2 {cr2:#x}, cs {:#x})", sregs.cs.selector)
        }
        _ => String::new(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
