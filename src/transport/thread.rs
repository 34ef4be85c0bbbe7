//! A lane's thread: an OS thread with a single-threaded runtime of its own.
//!
//! One runtime for all lanes would put the urgent lane's work behind the push
//! lanes'; a multi-threaded one costs a third of the throughput in hand-overs.

use super::error::TransportError;
use std::{future::Future, io, sync::mpsc, thread, time::Duration};
use tokio::runtime::{Builder, LocalOptions};

/// A running lane thread whose body ends with a `T`.
#[derive(Debug)]
#[must_use = "a lane thread whose result nobody looks at can fail unnoticed"]
pub struct LaneThread<T> {
    name: String,
    /// An error says that there was no runtime.
    handle: thread::JoinHandle<io::Result<T>>,
}

impl<T: Send + 'static> LaneThread<T> {
    /// Starts a thread called `name` (the kernel shows 15 bytes of it) that runs the
    /// future which `body` makes, to its end. The future need not be `Send`, nor need what it
    /// spawns with [`tokio::task::spawn_local`].
    ///
    /// When it has ended, tasks that it spawned and did not wait for are dropped.
    ///
    /// # Errors
    /// [`TransportError::Io`] if the thread or its runtime cannot be made.
    pub fn spawn<F, Fut>(name: impl Into<String>, body: F) -> Result<Self, TransportError>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T>,
    {
        let name = name.into();
        let (tell, told) = mpsc::channel();
        let live = move || {
            let mut builder = Builder::new_current_thread();
            let runtime = builder.enable_io().enable_time().build_local(LocalOptions::default())?;
            let _ = tell.send(());
            Ok(runtime.block_on(async move { body().await }))
        };
        let handle = thread::Builder::new().name(name.clone()).spawn(live);
        let handle = handle
            .map_err(|source| TransportError::Io { what: "start a lane's thread", source })?;
        let lane = Self { name, handle };
        match told.recv() {
            Ok(()) => Ok(lane),
            Err(_) => lane.join().map(|_| unreachable!("it had no runtime")),
        }
    }

    /// Whether its body has ended, so that [`join`](Self::join) will not block.
    pub fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for its end and takes its result.
    ///
    /// # Errors
    /// [`TransportError::ThreadPanicked`] if it panicked.
    pub fn join(self) -> Result<T, TransportError> {
        let ended = self.handle.join().map_err(|panic| {
            let message = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".to_owned());
            TransportError::ThreadPanicked { name: self.name, message }
        })?;
        ended.map_err(|source| TransportError::Io { what: "start a lane's runtime", source })
    }
}

/// Puts the calling thread into the real-time class SCHED_RR at its lowest
/// priority, ahead of all ordinary threads. For urgent lanes on busy hosts: bulk work on the
/// same cores then no longer delays the answer to a fault. The thread must not spin.
///
/// # Errors
/// The kernel's, commonly `EPERM` without CAP_SYS_NICE; going on without is fine.
pub fn prefer_this_thread() -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: 0 names the calling thread, and `param` lives across the call, which only reads it.
    match unsafe { libc::sched_setscheduler(0, policy, &param) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How long a thread of bulk work keeps a core to itself.
const TURN: Duration = Duration::from_micros(100);

/// Lets the calling thread keep its core for a tenth of a millisecond at a time, where others
/// want it. For bulk work: an ordinary thread that wakes up, such as a vCPU whose page has come,
/// otherwise waits on busy cores until the kernel's time slice is over (1.4 ms with two cores,
/// more with more). Its share of the core stays as it is.
///
/// Before Linux 6.12 it does nothing: see `sched_runtime` in sched_setattr(2).
///
/// # Errors
/// The kernel's; going on without is fine.
pub fn take_short_turns() -> io::Result<()> {
    const SIZE: u32 = size_of::<libc::sched_attr>() as u32;
    // SAFETY: a structure of integers; all zero is the ordinary policy.
    let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: 0 names the calling thread; the kernel writes at most `SIZE` bytes to `attr`.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, SIZE, 0) };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    attr.sched_runtime = TURN.as_nanos() as u64;
    // SAFETY: as above; the kernel only reads `attr`, which says its own size.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn a_body_runs_on_its_own_named_thread_and_gives_its_result() {
        let lane = LaneThread::spawn("lane-under-test", || async {
            let not_send = Rc::new(41);
            tokio::time::sleep(Duration::from_millis(1)).await;
            (thread::current().name().map(str::to_owned), *not_send + 1)
        });
        let result = lane.unwrap().join().unwrap();
        assert_eq!(result, (Some("lane-under-test".to_owned()), 42));
    }

    #[test]
    fn a_panic_becomes_an_error_that_names_the_thread() {
        let lane: LaneThread<()> = LaneThread::spawn("doomed", || async {
            let pages = 7;
            panic!("lost {pages} pages")
        })
        .unwrap();
        let error = lane.join().unwrap_err();
        assert_eq!(error.to_string(), "thread doomed panicked: lost 7 pages");
    }

    #[test]
    fn a_thread_of_short_turns_is_an_ordinary_one_all_the_same() {
        let attr = LaneThread::spawn("short-turns", || async {
            take_short_turns()?;
            // SAFETY: as in `take_short_turns`.
            let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
            let size = size_of::<libc::sched_attr>() as u32;
            // SAFETY: as in `take_short_turns`.
            match unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) } {
                0 => Ok(attr),
                _ => Err(io::Error::last_os_error()),
            }
        });
        let attr = attr.unwrap().join().unwrap().unwrap();
        assert_eq!((attr.sched_policy, attr.sched_priority), (libc::SCHED_OTHER as u32, 0));
        // Kernels before 6.12 have one time slice for all.
        let release = nix::sys::utsname::uname().unwrap();
        let release = release.release().to_str().unwrap();
        let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0u32));
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if version >= (6, 12) {
            assert_eq!(attr.sched_runtime, TURN.as_nanos() as u64, "{release}: {attr:?}");
        }
    }

    #[test]
    fn a_thread_is_preferred_where_that_is_allowed() {
        let policy = LaneThread::spawn("preferred", || async {
            // SAFETY: 0 names the calling thread; nothing else is passed.
            prefer_this_thread().map(|()| unsafe { libc::sched_getscheduler(0) })
        });
        match policy.unwrap().join().unwrap() {
            Ok(policy) => assert_eq!(policy & !libc::SCHED_RESET_ON_FORK, libc::SCHED_RR),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}"),
        }
    }
}
