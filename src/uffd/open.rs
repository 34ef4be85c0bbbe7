//! Getting a `userfaultfd` descriptor with the features that a migration needs,
//! or an error that says what to change on this host.
//!
//! The `userfaultfd` crate's builder turns to the system call only where
//! `/dev/userfaultfd` does not exist. Where it exists and this user may not open
//! it, the system call may still be allowed, so the descriptor is made here.

use super::ioctl;
use super::register::DestinationBacking;
use nix::errno::Errno;
use std::ffi::c_int;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use userfaultfd::Uffd;
use userfaultfd_sys as sys;

/// The device that hands out descriptors by its file permissions.
const DEVICE: &str = "/dev/userfaultfd";

/// What is asked of the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UffdOptions {
    /// Whether the memory belongs to a KVM guest. KVM reads and writes guest
    /// memory from the kernel, so [`kernel_faults`](Self::kernel_faults) must then
    /// be true; anything else is refused.
    pub kvm_guest: bool,
    /// Whether accesses by the kernel (system calls, KVM, vhost) are trapped as
    /// well. If not, those that meet a missing page fail; in return no privilege
    /// is needed.
    pub kernel_faults: bool,
    /// Whether to be told when guest memory is given back (`MADV_DONTNEED`,
    /// `MADV_REMOVE`), as a balloon does. The thread that reads events must then
    /// never do such a thing itself, and placing pauses until the event is read.
    pub remove_events: bool,
}

impl UffdOptions {
    /// For a guest run by KVM.
    pub const fn for_kvm() -> Self {
        Self { kvm_guest: true, kernel_faults: true, remove_events: true }
    }

    /// For a guest that is a thread of this process.
    pub const fn for_process() -> Self {
        Self { kvm_guest: false, kernel_faults: true, remove_events: false }
    }
}

/// Why there is no descriptor.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A KVM guest with user-mode faults only.
    #[error(
        "a KVM guest needs kernel faults: KVM itself reads and writes guest memory, \
         and with user-mode faults only these accesses fail on a missing page"
    )]
    UserModeOnlyForKvm,
    /// Neither the device nor the system call is allowed.
    #[error(
        "userfaultfd is not permitted: {DEVICE} cannot be opened ({device}), and the system call \
         is refused; {}",
        advice(*.kernel_faults)
    )]
    NotPermitted {
        /// Whether faults of the kernel were asked for.
        kernel_faults: bool,
        /// Why the device could not be opened.
        #[source]
        device: io::Error,
    },
    /// The kernel has no userfaultfd.
    #[error("this kernel has no userfaultfd (CONFIG_USERFAULTFD)")]
    NotInKernel,
    /// The device or the system call failed for another reason.
    #[error("cannot make a userfaultfd descriptor")]
    Create(#[source] Errno),
    /// The version handshake failed.
    #[error("the userfaultfd handshake (UFFDIO_API) failed")]
    Handshake(#[source] Errno),
    /// The kernel is too old for what is needed.
    #[error("this kernel's userfaultfd lacks {}", .0.join(", "))]
    MissingFeatures(Vec<&'static str>),
}

fn advice(kernel_faults: bool) -> &'static str {
    if kernel_faults {
        "give this user read and write access to /dev/userfaultfd, or set \
         vm.unprivileged_userfaultfd=1, or run with CAP_SYS_PTRACE"
    } else {
        "user-mode faults need no privilege, so a seccomp filter or a security module \
         forbids the system call; allow it, or give this user read and write access to \
         /dev/userfaultfd"
    }
}

/// An open descriptor after its handshake: non-blocking and close-on-exec.
#[derive(Debug)]
pub struct Descriptor {
    pub(super) uffd: Uffd,
    can_poison: bool,
}

impl Descriptor {
    /// Whether pages can be given up with `UFFDIO_POISON` (Linux 6.6).
    pub fn can_poison(&self) -> bool {
        self.can_poison
    }
}

/// What the kernel needs to log the writes to a mapping by itself: nobody waits for an answer
/// (ASYNC), memory with files (SHMEM), and pages that are not there yet (UNPOPULATED).
const WRITE_LOG: u64 = sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | sys::UFFD_FEATURE_WP_UNPOPULATED
    | sys::UFFD_FEATURE_WP_ASYNC;

/// Features of `UFFDIO_API`, with the names that an error shows.
const FEATURES: [(u64, &str); 11] = [
    (sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP, "PAGEFAULT_FLAG_WP (Linux 5.7)"),
    (sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "WP_HUGETLBFS_SHMEM (Linux 5.19)"),
    (sys::UFFD_FEATURE_WP_UNPOPULATED, "WP_UNPOPULATED (Linux 6.4)"),
    (sys::UFFD_FEATURE_WP_ASYNC, "WP_ASYNC (Linux 6.7)"),
    (sys::UFFD_FEATURE_THREAD_ID, "THREAD_ID (Linux 4.14)"),
    (sys::UFFD_FEATURE_EVENT_REMOVE, "EVENT_REMOVE (Linux 4.11)"),
    (sys::UFFD_FEATURE_MISSING_SHMEM, "MISSING_SHMEM (Linux 4.11)"),
    (sys::UFFD_FEATURE_MINOR_SHMEM, "MINOR_SHMEM (Linux 5.14)"),
    (sys::UFFD_FEATURE_MISSING_HUGETLBFS, "MISSING_HUGETLBFS (Linux 4.11)"),
    (sys::UFFD_FEATURE_MINOR_HUGETLBFS, "MINOR_HUGETLBFS (Linux 5.13)"),
    (sys::UFFD_FEATURE_POISON, "POISON (Linux 6.6)"),
];

/// Opens a descriptor for memory of this kind.
pub fn open(options: UffdOptions, backing: DestinationBacking) -> Result<Descriptor, OpenError> {
    if options.kvm_guest && !options.kernel_faults {
        return Err(OpenError::UserModeOnlyForKvm);
    }
    let mut needed = sys::UFFD_FEATURE_THREAD_ID | backing.needed_features();
    if options.remove_events {
        needed |= sys::UFFD_FEATURE_EVENT_REMOVE;
    }

    let (uffd, features) = open_with(options.kernel_faults, needed, sys::UFFD_FEATURE_POISON)?;
    Ok(Descriptor { uffd, can_poison: features & sys::UFFD_FEATURE_POISON != 0 })
}

/// Opens a descriptor for the log of what is written to a mapping. No fault waits for whoever
/// reads it, also none of the kernel's, so it needs no privilege.
pub(super) fn open_for_write_log() -> Result<Uffd, OpenError> {
    Ok(open_with(false, WRITE_LOG, 0)?.0)
}

/// A descriptor with the features `needed`, and those of `wanted` that there are; the
/// features that it has.
fn open_with(kernel_faults: bool, needed: u64, wanted: u64) -> Result<(Uffd, u64), OpenError> {
    // A handshake can be made once on a descriptor, and one that asks for an
    // unknown feature fails: what there is must be asked on another descriptor.
    let offered = handshake(&create(kernel_faults)?, 0)?;
    let missing = needed & !offered;
    if missing != 0 {
        let names = FEATURES.iter().filter(|(bit, _)| missing & bit != 0).map(|(_, name)| *name);
        return Err(OpenError::MissingFeatures(names.collect()));
    }
    let requested = needed | (offered & wanted);
    let fd = create(kernel_faults)?;
    handshake(&fd, requested)?;
    // SAFETY: the descriptor is a userfaultfd that nothing else owns.
    let uffd = unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) };
    Ok((uffd, requested))
}

/// Asks for `features`; returns those that the kernel has.
fn handshake(fd: &OwnedFd, features: u64) -> Result<u64, OpenError> {
    let mut api = sys::uffdio_api { api: sys::UFFD_API, features, ioctls: 0 };
    // SAFETY: the argument is the structure that UFFDIO_API reads and writes.
    unsafe { ioctl::handshake(fd.as_raw_fd(), &mut api) }.map_err(OpenError::Handshake)?;
    Ok(api.features)
}

/// A new descriptor: from the device if it can be opened, else by the system call.
fn create(kernel_faults: bool) -> Result<OwnedFd, OpenError> {
    let mut flags = nix::libc::O_CLOEXEC | nix::libc::O_NONBLOCK;
    if !kernel_faults {
        flags |= sys::UFFD_USER_MODE_ONLY as c_int;
    }
    let created = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(device) => {
            // SAFETY: the ioctl takes the flags by value.
            unsafe { ioctl::new_descriptor(device.as_raw_fd(), flags) }
                .map_err(OpenError::Create)?
        }
        Err(device) => {
            // SAFETY: the system call takes the flags by value.
            let fd = unsafe { nix::libc::syscall(nix::libc::SYS_userfaultfd, flags) };
            match Errno::result(fd) {
                Ok(fd) => fd as c_int,
                Err(Errno::EPERM | Errno::EACCES) => {
                    return Err(OpenError::NotPermitted { kernel_faults, device });
                }
                Err(Errno::ENOSYS) => return Err(OpenError::NotInKernel),
                Err(errno) => return Err(OpenError::Create(errno)),
            }
        }
    };
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(created) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_mode_only_is_refused_for_a_kvm_guest() {
        let options = UffdOptions { kernel_faults: false, ..UffdOptions::for_kvm() };
        let refused = open(options, DestinationBacking::Anonymous).unwrap_err();
        assert!(matches!(refused, OpenError::UserModeOnlyForKvm), "{refused}");
    }

    #[test]
    fn a_refusal_says_what_to_set() {
        let device = || io::Error::from_raw_os_error(nix::libc::EACCES);
        let text = OpenError::NotPermitted { kernel_faults: true, device: device() }.to_string();
        for word in ["/dev/userfaultfd", "vm.unprivileged_userfaultfd=1", "CAP_SYS_PTRACE"] {
            assert!(text.contains(word), "{text}");
        }
        let text = OpenError::NotPermitted { kernel_faults: false, device: device() }.to_string();
        assert!(text.contains("seccomp") && !text.contains("CAP_SYS_PTRACE"), "{text}");
    }
}
