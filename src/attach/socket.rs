//! [`Connection`]: framed bytes and file descriptors over a Unix stream socket,
//! every call with a deadline.
//!
//! It knows lengths and descriptors, not what a message means. A descriptor is
//! owned from the moment the kernel made it, so that no error leaks one.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, UnixCredentials,
    getsockopt, sendmsg, socket,
};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The most descriptors that are kept of one message: 16 memory files and a commit word, and
/// one more, so that one too many is seen.
pub const DESCRIPTORS_MAX: usize = 18;
/// Bytes asked of the kernel at once; memory grows with what has come, not with
/// the length that a peer claims.
const CHUNK_BYTES: usize = 256 << 10;

/// Connects to whoever listens at `path`, and does not wait. None if somebody does whose
/// queue of clients is full: a process that hangs, say.
pub(crate) fn connect(path: &Path) -> io::Result<Option<UnixStream>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match nix::sys::socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => Ok(Some(UnixStream::from(socket))),
        Err(Errno::EAGAIN) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// One end of an attach conversation.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
}

/// A message as it came.
#[derive(Debug)]
pub struct Received {
    /// Its bytes, without the length.
    pub bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Received {
    /// The descriptors that came with it, close-on-exec, if they are as many as the
    /// message has; all are closed if not.
    pub fn descriptors<const COUNT: usize>(self) -> Result<[OwnedFd; COUNT], SocketError> {
        let descriptors = self.all_descriptors(COUNT)?;
        descriptors.try_into().map_err(|wrong: Vec<OwnedFd>| SocketError::Descriptors {
            got: wrong.len(),
            more: false,
            expected: COUNT,
        })
    }

    /// The same for a message that says how many it has.
    pub fn all_descriptors(self, expected: usize) -> Result<Vec<OwnedFd>, SocketError> {
        let got = self.descriptors.len();
        if got != expected {
            return Err(SocketError::Descriptors { got, more: false, expected });
        }
        Ok(self.descriptors)
    }
}

/// A failure to send or to receive. The connection is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The peer closed the connection between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed the connection inside a message.
    #[error("the peer closed the connection inside a message, after {got} of {expected} bytes")]
    Truncated {
        /// Bytes that came, the length's four included.
        got: usize,
        /// Bytes expected.
        expected: usize,
    },
    /// A message did not come or go in time.
    #[error("the peer was silent for too long")]
    Timeout,
    /// A length that no message of this direction has.
    #[error("the peer announced a message of {bytes} bytes, more than {max}")]
    TooLong {
        /// The length announced.
        bytes: usize,
        /// The most there may be.
        max: usize,
    },
    /// A length of 0.
    #[error("the peer announced an empty message")]
    Empty,
    /// Other than as many descriptors as the message has.
    #[error("the peer sent {got} file descriptors{} with a message that has {expected}",
            if *.more { " or more" } else { "" })]
    Descriptors {
        /// How many came.
        got: usize,
        /// Whether the kernel dropped some more, for want of room.
        more: bool,
        /// How many belong to it.
        expected: usize,
    },
    /// The kernel made fewer descriptors for this process than were sent.
    #[error(
        "this process could take only {got} of the file descriptors that came: is its limit of \
         open files too low?"
    )]
    NoRoom {
        /// How many it made.
        got: usize,
    },
    /// The peer runs as another user.
    #[error("the peer is process {pid} of user {uid}; only user {own} or root may attach")]
    Peer {
        /// Its process.
        pid: i32,
        /// Its user.
        uid: u32,
        /// Ours.
        own: u32,
    },
    /// A system call failed.
    #[error("cannot {action} the attach socket")]
    System {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: nix::Error,
    },
}

impl Connection {
    /// Takes a connected stream, and refuses a peer that is neither the same user
    /// nor root.
    pub fn new(stream: UnixStream) -> Result<Self, SocketError> {
        let peer = peer_credentials(&stream)?;
        let own = nix::unistd::geteuid().as_raw();
        if !may_attach(peer.uid(), own) {
            return Err(SocketError::Peer { pid: peer.pid(), uid: peer.uid(), own });
        }
        stream.set_nonblocking(true).map_err(|error| {
            system("set up")(Errno::from_raw(error.raw_os_error().unwrap_or(0)))
        })?;
        Ok(Self { stream })
    }

    /// The peer's process, as the kernel knew it when it connected.
    pub fn peer_pid(&self) -> Option<i32> {
        peer_credentials(&self.stream).ok().map(|peer| peer.pid())
    }

    /// Sends an encoded message, with `descriptors` on its first byte.
    pub fn send(
        &mut self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<(), SocketError> {
        let deadline = Instant::now() + within;
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let mut sent = 0;
        while sent < bytes.len() {
            let rights = [ControlMessage::ScmRights(&raw)];
            let control = if sent == 0 && !raw.is_empty() { &rights[..] } else { &[] };
            let rest = [IoSlice::new(&bytes[sent..])];
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match sendmsg::<()>(self.stream.as_raw_fd(), &rest, control, flags, None) {
                Ok(count) => sent += count,
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, deadline)?,
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(SocketError::Closed),
                Err(source) => return Err(system("write to")(source)),
            }
        }
        Ok(())
    }

    /// Receives one message of at most `max` bytes.
    pub fn receive(&mut self, max: usize, within: Duration) -> Result<Received, SocketError> {
        let deadline = Instant::now() + within;
        let mut descriptors = Vec::new();
        let mut prefix = Vec::with_capacity(4);
        self.fill(&mut prefix, 4, &mut descriptors, deadline).map_err(|error| match error {
            SocketError::Truncated { got: 0, .. } => SocketError::Closed,
            other => other,
        })?;
        let length = u32::from_le_bytes([prefix[0], prefix[1], prefix[2], prefix[3]]) as usize;
        if length > max {
            return Err(SocketError::TooLong { bytes: length, max });
        }
        if length == 0 {
            return Err(SocketError::Empty);
        }
        let mut bytes = Vec::new();
        self.fill(&mut bytes, length, &mut descriptors, deadline).map_err(|error| match error {
            SocketError::Truncated { got, expected } => {
                SocketError::Truncated { got: got + 4, expected: expected + 4 }
            }
            other => other,
        })?;
        Ok(Received { bytes, descriptors })
    }

    /// Appends to `into` until it has `length` bytes.
    fn fill(
        &mut self,
        into: &mut Vec<u8>,
        length: usize,
        descriptors: &mut Vec<OwnedFd>,
        deadline: Instant,
    ) -> Result<(), SocketError> {
        while into.len() < length {
            let got = into.len();
            into.resize(length.min(got + CHUNK_BYTES), 0);
            let result = self.receive_some(&mut into[got..], descriptors);
            into.truncate(got + *result.as_ref().unwrap_or(&0));
            match result {
                Ok(0) => return Err(SocketError::Truncated { got, expected: length }),
                Ok(_) | Err(ReceiveError::System(Errno::EINTR)) => {}
                Err(ReceiveError::System(Errno::EAGAIN)) => {
                    self.wait(PollFlags::POLLIN, deadline)?;
                }
                // What the kernel says when the peer died with our bytes unread.
                Err(ReceiveError::System(Errno::ECONNRESET)) => {
                    return Err(SocketError::Truncated { got, expected: length });
                }
                Err(ReceiveError::System(source)) => return Err(system("read from")(source)),
                Err(ReceiveError::TooManyDescriptors) => {
                    let (got, expected) = (descriptors.len(), DESCRIPTORS_MAX);
                    // The rest would have had room.
                    if got < expected {
                        return Err(SocketError::NoRoom { got });
                    }
                    return Err(SocketError::Descriptors { got, more: true, expected });
                }
            }
        }
        Ok(())
    }

    /// One recvmsg. Every descriptor that the kernel has made for us is in
    /// `descriptors` when it returns, also when it fails.
    ///
    /// By hand and not with nix, whose `cmsgs` hands out nothing when the control
    /// buffer was too small: the descriptors that fitted would stay open for ever.
    fn receive_some(
        &self,
        into: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> Result<usize, ReceiveError> {
        const CONTROL_WORDS: usize = 12;
        // A `u64` array for the alignment of `cmsghdr`: 16 bytes of header and 4 for
        // each descriptor, up to whole words.
        const { assert!(CONTROL_WORDS * 8 >= 16 + (DESCRIPTORS_MAX * 4).next_multiple_of(8)) };
        let mut control = [0u64; CONTROL_WORDS];
        let mut data = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        // SAFETY: a `msghdr` of zeroes is valid: no name, no data, no control.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &mut data;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        // Without the padding, in which one more descriptor would have room.
        // SAFETY: `CMSG_LEN` only computes.
        let room = unsafe { libc::CMSG_LEN((DESCRIPTORS_MAX * size_of::<RawFd>()) as u32) };
        header.msg_controllen = room as _;
        let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
        // SAFETY: the header points to an exclusive slice and to a control buffer that
        // is larger than `msg_controllen`; both live across the call.
        let count = unsafe { libc::recvmsg(self.stream.as_raw_fd(), &mut header, flags) };
        let count = Errno::result(count).map_err(ReceiveError::System)?;
        // SAFETY: the kernel filled the control buffer and set its length.
        let mut message = unsafe { libc::CMSG_FIRSTHDR(&header) };
        while !message.is_null() {
            // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a whole, aligned
            // header inside the control buffer.
            let (level, kind, len) = unsafe {
                ((*message).cmsg_level, (*message).cmsg_type, (*message).cmsg_len as usize)
            };
            if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
                // SAFETY: `CMSG_LEN` only computes.
                let header_len = unsafe { libc::CMSG_LEN(0) } as usize;
                for index in 0..len.saturating_sub(header_len) / size_of::<RawFd>() {
                    // SAFETY: the kernel wrote that many descriptors after the header;
                    // each is new, open and nobody else's.
                    let descriptor = unsafe {
                        let fd = libc::CMSG_DATA(message).cast::<RawFd>().add(index);
                        OwnedFd::from_raw_fd(fd.read_unaligned())
                    };
                    descriptors.push(descriptor);
                }
            }
            // SAFETY: as for CMSG_FIRSTHDR.
            message = unsafe { libc::CMSG_NXTHDR(&header, message) };
        }
        if header.msg_flags & libc::MSG_CTRUNC != 0 || descriptors.len() > DESCRIPTORS_MAX {
            return Err(ReceiveError::TooManyDescriptors);
        }
        Ok(count as usize)
    }

    fn wait(&self, events: PollFlags, deadline: Instant) -> Result<(), SocketError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(SocketError::Timeout);
            }
            let mut fds = [PollFd::new(self.stream.as_fd(), events)];
            match poll(&mut fds, poll_timeout(left)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(source) => return Err(system("wait for")(source)),
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

enum ReceiveError {
    System(Errno),
    TooManyDescriptors,
}

/// `left` in whole milliseconds, rounded up so that a wait does not spin at its end.
pub(super) fn poll_timeout(left: Duration) -> PollTimeout {
    PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
}

fn system(action: &'static str) -> impl Fn(Errno) -> SocketError {
    move |source| SocketError::System { action, source }
}

fn peer_credentials(stream: &UnixStream) -> Result<UnixCredentials, SocketError> {
    getsockopt(stream, PeerCredentials).map_err(system("ask for the peer of"))
}

fn may_attach(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}
