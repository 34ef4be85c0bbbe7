//! The kernel's arrival stamps. It begins to make them some time after the first socket asks
//! for them (`net_enable_timestamp` leaves that to a work queue); until then a datagram gets the
//! time at which it is *read*, and two ports of one link would overtake each other.

use super::open_socket;
use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// For how long a probe lies in its socket before it is read.
const LIES: Duration = Duration::from_millis(1);
/// Without stamps after this a relay works, and its ports may overtake each other.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// Waits until datagrams that arrive at sockets of this host are stamped as they arrive. The
/// relay's sockets, which keep the stamps on, must be open.
pub(super) fn wait_until_made(local: IpAddr) -> io::Result<()> {
    let probe = open_socket(SocketAddr::new(local, 0))?;
    let own = probe.local_addr()?;
    let deadline = Instant::now() + WAIT_MAX;
    while Instant::now() < deadline {
        probe.send_to(&[0], own)?;
        std::thread::sleep(LIES);
        let mut byte = [0];
        let mut slices = [IoSliceMut::new(&mut byte)];
        let mut space = cmsg_space!(TimeSpec);
        let flags = MsgFlags::MSG_DONTWAIT;
        let read =
            recvmsg::<SockaddrStorage>(probe.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
        let now = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME)?);
        let stamp = read.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::ScmTimestampns(stamp) => Some(Duration::from(stamp)),
            _ => None,
        });
        if stamp.is_some_and(|stamp| now.saturating_sub(stamp) >= LIES / 2) {
            return Ok(());
        }
    }
    tracing::warn!("the kernel does not stamp datagrams: a relay's ports may overtake each other");
    Ok(())
}
