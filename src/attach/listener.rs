//! [`PrivateListener`]: a Unix socket at a path, for this user only, that replaces
//! what a dead process left there and nothing else.

use super::socket::{Connection, SocketError};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a start waits for another one in the same directory.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// How long a listener rests that cannot take its clients in.
const REST: Duration = Duration::from_millis(100);

/// A listening socket; its file goes when it is dropped.
#[derive(Debug)]
pub struct PrivateListener {
    listener: UnixListener,
    /// It has said that it cannot take its clients in.
    said: AtomicBool,
    path: PathBuf,
    /// Device and inode of the socket's file, so that only ours is removed.
    file: (u64, u64),
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("another process listens at {}", .0.display())]
    InUse(PathBuf),
    /// Something that is not a socket is there.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The socket cannot be made.
    #[error("cannot listen at {}", path.display())]
    System {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl PrivateListener {
    /// Listens at `path`, with a file of mode 0600. A socket at which nobody listens
    /// any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |source: io::Error| ListenError::System { path: path.to_owned(), source };
        // Two processes that start at once must not remove each other's new socket.
        let _lock = lock_directory(path).map_err(failed)?;
        remove_stale(path)?;
        let listener = listen_privately(path).map_err(|errno| failed(errno.into()))?;
        listener.set_nonblocking(true).map_err(failed)?;
        let file = identity(path).map_err(failed)?;
        Ok(Self { listener, said: AtomicBool::new(false), path: path.to_owned(), file })
    }

    /// The next client, if one waits. A client of another user is an error.
    ///
    /// Where there is no descriptor for it, clients stay in the queue, and this rests for a
    /// moment: whoever waits for them must not spin until there are some.
    pub fn accept(&self) -> Option<Result<Connection, SocketError>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                self.said.store(false, Ordering::Relaxed);
                Some(Connection::new(stream))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                // Once, however long it takes.
                if !self.said.swap(true, Ordering::Relaxed) {
                    let at = self.path.display();
                    tracing::warn!(%error, "the clients at {at} wait: they cannot be taken in");
                }
                std::thread::sleep(REST);
                None
            }
        }
    }
}

impl AsFd for PrivateListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl PrivateListener {
    /// Removes the socket's file: nobody finds it any more, and another one may take the
    /// place.
    pub fn hide(&self) {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for PrivateListener {
    fn drop(&mut self) {
        self.hide();
    }
}

/// Removes the socket of a process that is gone; nothing else.
pub(crate) fn sweep(path: &Path) {
    if let Ok(_lock) = lock_directory(path) {
        let _ = remove_stale(path);
    }
}

/// A lock on the directory of `path`, which leaves no file behind.
fn lock_directory(path: &Path) -> io::Result<Flock<File>> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let mut directory = File::open(parent.unwrap_or(Path::new(".")))?;
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((unlocked, Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                directory = unlocked;
                std::thread::sleep(Duration::from_millis(10));
            }
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source: io::Error| ListenError::System { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match super::socket::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        Ok(_) => Err(ListenError::InUse(path.to_owned())),
        Err(error) => Err(failed(error)),
    }
}

fn listen_privately(path: &Path) -> nix::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // Linux gives the file the mode of the socket: at no moment is it open to others,
    // and the process's umask is left alone.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(16)?)?;
    Ok(UnixListener::from(socket))
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_socket_is_for_its_user_only_and_goes_with_the_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("attach");
        let listener = PrivateListener::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert!(listener.accept().is_none());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn only_a_socket_that_nobody_listens_at_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("attach");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file, as a killed process does");
        let listener = PrivateListener::bind(&path).unwrap();
        assert!(matches!(PrivateListener::bind(&path), Err(ListenError::InUse(_))));
        UnixStream::connect(&path).expect("the first one still listens");
        drop(listener);
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(PrivateListener::bind(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn one_whose_queue_is_full_is_still_there_and_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("attach");
        let _hangs = PrivateListener::bind(&path).unwrap();
        let connect = || crate::attach::socket::connect(&path);
        let waiting: Vec<_> = std::iter::from_fn(|| connect().unwrap()).take(1000).collect();
        assert!(waiting.len() < 1000, "the queue has no end");
        assert!(matches!(PrivateListener::bind(&path), Err(ListenError::InUse(_))));
        let began = Instant::now();
        let within = Duration::from_millis(50);
        let error = crate::attach::client::Attached::connect_within(&path, within).unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(5));
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(cause, "the peer was silent for too long");
    }

    #[test]
    fn a_sweep_takes_what_is_dead_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("attach");
        drop(UnixListener::bind(&path).unwrap());
        sweep(&path);
        assert!(!path.exists());
        let _listener = PrivateListener::bind(&path).unwrap();
        sweep(&path);
        assert!(path.exists());
    }

    #[test]
    fn a_listener_does_not_remove_the_socket_of_its_successor() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("attach");
        let first = PrivateListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = PrivateListener::bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).expect("the second one's file is still there");
    }

    #[test]
    fn of_many_that_start_at_once_over_a_stale_socket_one_listens() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("attach");
        drop(UnixListener::bind(&path).unwrap());
        let listeners: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> =
                (0..8).map(|_| scope.spawn(|| PrivateListener::bind(&path))).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        assert_eq!(listeners.iter().filter(|listener| listener.is_ok()).count(), 1);
        let refused = listeners.iter().filter(|l| matches!(l, Err(ListenError::InUse(_)))).count();
        assert_eq!(refused, 7);
        UnixStream::connect(&path).expect("and its file is there");
    }
}
