//! The ioctls around userfaultfd that the `userfaultfd` crate lacks, or offers only with
//! a part of the answer.

use userfaultfd_sys as sys;

// The version handshake.
nix::ioctl_readwrite!(handshake, sys::UFFDIO, sys::_UFFDIO_API, sys::uffdio_api);
// A descriptor from /dev/userfaultfd; takes the system call's flags by value.
nix::ioctl_write_int_bad!(new_descriptor, nix::request_code_none!(sys::USERFAULTFD_IOC, 0x00));
// The crate drops the count of zero pages that were placed before EAGAIN.
nix::ioctl_readwrite!(zeropage, sys::UFFDIO, sys::_UFFDIO_ZEROPAGE, sys::uffdio_zeropage);
nix::ioctl_readwrite!(poison, sys::UFFDIO, sys::_UFFDIO_POISON, sys::uffdio_poison);
// Of /proc/self/pagemap, not of a userfaultfd: the pages written since they were protected.
nix::ioctl_readwrite!(
    pagemap_scan,
    sys::PAGEMAP_SCAN_TYPE,
    sys::PAGEMAP_SCAN_NUMBER,
    sys::pm_scan_arg
);
