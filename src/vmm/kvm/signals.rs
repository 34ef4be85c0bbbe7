//! The two signals that concern a vCPU's thread.
//!
//! *SIGRTMIN* takes it out of `KVM_RUN`; what that means, other flags say. *SIGBUS* is
//! what the kernel sends when guest memory is lost (a page that was poisoned, because its
//! content can no longer be had): inside `KVM_RUN` it ends that vCPU and not the process.
//! Any other SIGBUS goes where it went before.

use super::error::KvmError;
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::cell::Cell;
use std::sync::{Mutex, OnceLock, PoisonError};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

thread_local! {
    static IN_GUEST: Cell<bool> = const { Cell::new(false) };
    static LOST: Cell<Option<usize>> = const { Cell::new(None) };
}

static OLD_BUS_ACTION: OnceLock<SigAction> = OnceLock::new();

/// Installs the handlers; further calls change nothing.
pub fn install() -> Result<(), KvmError> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    register_signal_handler(SIGRTMIN(), kicked).map_err(|error| failed("handle")(error.into()))?;
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
    let action = SigAction::new(SigHandler::SigAction(memory_lost), flags, SigSet::empty());
    // SAFETY: the handler only touches thread-local cells that need no initialising, a
    // value that is set once, and async-signal-safe functions.
    let old = unsafe { sigaction(Signal::SIGBUS, &action) };
    let old = old.map_err(|error| failed("handle")(error.into()))?;
    let _ = OLD_BUS_ACTION.set(old);
    *installed = true;
    Ok(())
}

/// Lets the calling thread be kicked, whatever mask it was born with.
pub fn unblock() -> Result<(), KvmError> {
    unblock_signal(SIGRTMIN())
        .map_err(|error| failed("unblock")(std::io::Error::other(format!("{error:?}"))))
}

/// Sends the kick to a thread of this process.
pub fn kick(thread: nix::unistd::Pid) -> Result<(), KvmError> {
    // SAFETY: a plain system call without pointers; to a thread that has ended it is
    // an error.
    let sent =
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread.as_raw(), SIGRTMIN()) };
    if sent == 0 { Ok(()) } else { Err(failed("send")(std::io::Error::last_os_error())) }
}

/// Runs `enter` (a `KVM_RUN`) and tells, besides its result, the host address of guest
/// memory that was found lost meanwhile.
pub fn in_guest<T>(enter: impl FnOnce() -> T) -> (T, Option<usize>) {
    IN_GUEST.set(true);
    let result = enter();
    IN_GUEST.set(false);
    (result, LOST.take())
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

extern "C" fn memory_lost(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    if IN_GUEST.get() {
        // SAFETY: the kernel hands a valid structure, which for SIGBUS has an address.
        LOST.set(Some(unsafe { (*info).si_addr() } as usize));
        return;
    }
    match OLD_BUS_ACTION.get().map(SigAction::handler) {
        Some(SigHandler::SigAction(old)) => old(signal, info, context),
        Some(SigHandler::Handler(old)) => old(signal),
        Some(SigHandler::SigIgn) => {}
        Some(SigHandler::SigDfl) | None => {
            // SAFETY: both are async-signal-safe; the process ends by the signal, as it
            // would have without this handler.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        }
    }
}

fn failed(action: &'static str) -> impl Fn(std::io::Error) -> KvmError {
    move |source| KvmError::Signal { action, source }
}
