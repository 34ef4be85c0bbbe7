//! Clients and servers that do not keep to the protocol: the other end survives,
//! says so in one line, and leaks no descriptor.

use super::super::client::{AttachError, Attached};
use super::super::message::*;
use super::super::server::Patience;
use super::super::socket::{Connection, SocketError};
use super::*;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

const SHORT: Patience = Patience {
    hello: Duration::from_millis(300),
    message: Duration::from_millis(300),
    paused: Duration::from_secs(20),
};

fn hello() -> Vec<u8> {
    Request::hello().encode().unwrap()
}

/// A peer sends something to a server whose guest runs: the server must say one
/// line with `expected` in it, and go on.
#[track_caller]
fn refused(expected: &str, attack: impl FnOnce(&mut UnixStream)) {
    let served = Served::with(SHORT, |_| {});
    let mut stream = UnixStream::connect(&served.path).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    attack(&mut stream);
    // The server hangs up, after a refusal or without one.
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    let mut next = served.attach();
    assert!(next.status().unwrap().running);
    drop(next);
    let warnings = served.log.warnings();
    assert!(matches!(&warnings[..], [line] if line.contains(expected)), "{warnings:?}");
    assert_eq!(served.stop().0, [], "the guest was left alone");
}

#[test]
fn garbage_lengths_and_silence() {
    refused("more than 4096", |stream| stream.write_all(&[0xff; 64]).unwrap());
    refused("more than 4096", |stream| stream.write_all(&4097u32.to_le_bytes()).unwrap());
    refused("empty message", |stream| stream.write_all(&[0; 4]).unwrap());
    refused("silent for too long", |_| {});
    refused("silent for too long", |stream| stream.write_all(&hello()[..9]).unwrap());
    refused("after 9 of 14 bytes", |stream| {
        stream.write_all(&hello()[..9]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    });
    refused("cannot be decoded", |stream| stream.write_all(&[2, 0, 0, 0, 99, 0]).unwrap());
    refused("1 bytes follow", |stream| stream.write_all(&[2, 0, 0, 0, 1, 0]).unwrap());
}

#[test]
fn wrong_greetings() {
    let send = |request: Request| {
        move |stream: &mut UnixStream| stream.write_all(&request.encode().unwrap()).unwrap()
    };
    refused("before Hello", send(Request::Pause));
    refused("version 9", send(Request::Hello { magic: MAGIC, version: 9 }));
    refused("does not speak", send(Request::Hello { magic: *b"GET / HT", version: VERSION }));
    refused("Hello twice", |stream| {
        stream.write_all(&hello()).unwrap();
        stream.write_all(&hello()).unwrap();
    });
}

#[test]
fn another_version_is_named_to_the_client() {
    let served = Served::with(SHORT, |_| {});
    let mut connection = Connection::new(UnixStream::connect(&served.path).unwrap()).unwrap();
    let future = Request::Hello { magic: MAGIC, version: VERSION + 1 };
    connection.send(&future.encode().unwrap(), &[], LONG).unwrap();
    let reply = connection.receive(REPLY_BYTES_MAX, LONG).unwrap();
    let reply = Reply::decode(&reply.bytes).unwrap();
    assert!(matches!(reply, Reply::Refused { version: VERSION, why } if why.contains("only 2")));
    served.stop();
}

/// A pipe: its reader sees the end when the last copy of the writing end is closed.
struct Leak {
    reader: std::io::PipeReader,
    writer: OwnedFd,
}

impl Leak {
    fn new() -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        Self { reader, writer: writer.into() }
    }

    fn send(&self, stream: &UnixStream, bytes: &[u8], copies: usize) {
        let rights = vec![self.writer.as_raw_fd(); copies];
        let control = [ControlMessage::ScmRights(&rights)];
        let data = [IoSlice::new(bytes)];
        let sent = sendmsg::<()>(stream.as_raw_fd(), &data, &control, MsgFlags::empty(), None);
        assert_eq!(sent, Ok(bytes.len()));
    }

    fn all_copies_are_closed(mut self) {
        drop(self.writer);
        // With a copy left open this would wait for ever; the watchdog would end it.
        assert_eq!(self.reader.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn descriptors_from_a_client_are_refused_and_closed() {
    for (copies, expected) in [
        (1, "1 file descriptors with a message that has 0"),
        (4, "4 file descriptors with a message that has 0"),
        (5, "4 file descriptors or more"),
        (200, "4 file descriptors or more"),
    ] {
        let _watchdog = Watchdog::new();
        let leak = Leak::new();
        refused(expected, |stream| leak.send(stream, &hello(), copies));
        leak.all_copies_are_closed();
    }
}

#[test]
fn a_client_that_goes_mad_after_the_pause_loses_the_guest() {
    for attack in [&[0xffu8; 8][..], &[2, 0, 0, 0, 99, 0], &[8, 0, 0, 0, 1]] {
        let served = Served::with(SHORT, |_| {});
        let mut stream = UnixStream::connect(&served.path).unwrap();
        stream.write_all(&hello()).unwrap();
        stream.write_all(&Request::Pause.encode().unwrap()).unwrap();
        served.expect(Event::Paused);
        stream.write_all(attack).unwrap();
        served.expect(Event::Resumed);
        assert_eq!(served.stop().0, []);
    }
}

#[test]
fn a_client_that_does_not_read_the_state_loses_the_guest() {
    let served = Served::with(SHORT, |vm| vm.state = vec![1; STATE_BYTES_MAX]);
    let mut stream = UnixStream::connect(&served.path).unwrap();
    stream.write_all(&hello()).unwrap();
    stream.write_all(&Request::Pause.encode().unwrap()).unwrap();
    served.expect(Event::Paused);
    served.expect(Event::Resumed);
    assert_eq!(served.stop().0, []);
}

#[test]
fn another_user_is_refused_even_if_the_socket_lets_it_in() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: becoming another user needs root");
        return;
    }
    let served = Served::with(SHORT, |_| {});
    use std::os::unix::fs::PermissionsExt;
    for path in [&served.path, &served.path.parent().unwrap().to_owned()] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let path = served.path.clone();
    let said = std::thread::spawn(move || {
        const NOBODY: libc::uid_t = 65534;
        // The system call and not libc's function, which changes all threads of a process.
        // SAFETY: it changes the credentials of this thread, which ends here.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
        assert_eq!(changed, 0);
        let mut stream = UnixStream::connect(&path).unwrap();
        let _ = stream.write_all(&hello());
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        said
    });
    assert_eq!(said.join().unwrap(), b"", "another user hears nothing");
    // The stream is closed before the line is written; ended, the server has written it.
    let log = served.log.clone();
    served.stop();
    let warnings = log.warnings();
    assert!(matches!(&warnings[..], [line] if line.contains("user 65534")), "{warnings:?}");
}

const EMPTY_CAPTURE: Paused = Paused {
    state: Vec::new(),
    seeds: Vec::new(),
    paused_at_ns: 0,
    frozen_at_ns: 0,
    pause_us: 0,
    capture_us: 0,
    steps: 0,
};

/// A server that answers one Hello with `reply` and `descriptors`, then, if there were
/// any, a Pause with a seed outside of the guest, and hangs up.
fn fake_server(
    path: &Path,
    reply: Vec<u8>,
    descriptors: Vec<RawFd>,
) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut heard = vec![0; hello().len()];
        (&stream).read_exact(&mut heard).unwrap();
        let control = [ControlMessage::ScmRights(&descriptors)];
        let control = if descriptors.is_empty() { &[] } else { &control[..] };
        let data = [IoSlice::new(&reply)];
        let sent = sendmsg::<()>(stream.as_raw_fd(), &data, control, MsgFlags::MSG_NOSIGNAL, None);
        assert_eq!(sent, Ok(reply.len()));
        let mut request = [0; 5];
        if !descriptors.is_empty() && (&stream).read_exact(&mut request).is_ok() {
            assert_eq!(request[..], Request::Pause.encode().unwrap());
            let seeds = vec![PageIndex::new(PAGES)];
            let paused = Paused { seeds, ..EMPTY_CAPTURE };
            let reply = Reply::Paused(Box::new(paused)).encode().unwrap();
            (&stream).write_all(&reply).unwrap();
        }
    })
}

fn welcome() -> Vec<u8> {
    let (sender, _) = channel();
    let description = MockVm::new(sender).describe();
    let (layout, machine, guest) = (description.layout, description.machine, description.guest);
    let capabilities = vec![CAPABILITY_DIRTY_LOG.to_owned()];
    let welcome = Welcome { version: VERSION, layout, machine, guest, capabilities };
    Reply::Welcome(Box::new(welcome)).encode().unwrap()
}

fn memfd(bytes: i64, sealable: bool) -> OwnedFd {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let sealing = if sealable { MFdFlags::MFD_ALLOW_SEALING } else { MFdFlags::empty() };
    let memfd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC | sealing).unwrap();
    nix::unistd::ftruncate(&memfd, bytes).unwrap();
    memfd
}

#[test]
fn a_client_survives_a_server_that_hands_over_the_wrong_things() {
    let _watchdog = Watchdog::new();
    let word = super::super::commit_word::CommitWord::create().unwrap();
    let word = word.memfd();
    let memory = memfd((PAGES * 4096) as i64, true);
    let short = memfd(4096, true);
    let unsealable = memfd((PAGES * 4096) as i64, false);
    let leak = Leak::new();
    let pipe = leak.writer.as_fd();
    let cases: Vec<(Vec<BorrowedFd>, &str)> = vec![
        (vec![], "0 file descriptors"),
        (vec![memory.as_fd()], "1 file descriptors"),
        (vec![memory.as_fd(), word, pipe], "3 file descriptors"),
        (vec![memory.as_fd(), word, pipe, pipe, pipe, pipe], "4 file descriptors or more"),
        (vec![pipe, word], "cannot be sealed"),
        (vec![unsealable.as_fd(), word], "cannot be sealed"),
        (vec![short.as_fd(), word], "has 4096 bytes"),
        (vec![memory.as_fd(), memory.as_fd()], "32768 bytes, not 4096"),
        (vec![memory.as_fd(), pipe], "not a memfd"),
    ];
    for (descriptors, expected) in cases {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("attach");
        let raw = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let server = fake_server(&path, welcome(), raw);
        let error = Attached::connect(&path).unwrap_err();
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text += &format!(": {error}");
            cause = error.source();
        }
        assert!(text.contains(expected), "{expected}: {text}");
        server.join().unwrap();
    }
    leak.all_copies_are_closed();
}

#[test]
fn a_client_survives_a_server_that_says_the_wrong_things() {
    let _watchdog = Watchdog::new();
    let answer = |reply: Vec<u8>| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("attach");
        let server = fake_server(&path, reply, vec![]);
        let error = Attached::connect(&path).unwrap_err();
        server.join().unwrap();
        error
    };
    let too_long = ((REPLY_BYTES_MAX + 1) as u32).to_le_bytes().to_vec();
    let error = answer(too_long);
    assert!(
        matches!(error, AttachError::Socket { source: SocketError::TooLong { .. }, .. }),
        "{error:?}"
    );
    let error = answer(welcome()[..20].to_vec());
    assert!(
        matches!(error, AttachError::Socket { source: SocketError::Truncated { got: 20, .. }, .. }),
        "{error:?}"
    );
    let error = answer(vec![1, 0, 0, 0, 200]);
    assert!(matches!(error, AttachError::Message { .. }), "{error:?}");
    let error = answer(Reply::Resumed.encode().unwrap());
    assert!(matches!(error, AttachError::Unexpected { reply: "Resumed", .. }), "{error:?}");
    let refusal = Reply::Refused { version: 1, why: "too new".to_owned() };
    let error = answer(refusal.encode().unwrap());
    assert!(matches!(error, AttachError::Version { theirs: 1 }), "{error:?}");
}

#[test]
fn a_seed_outside_of_the_guest_is_refused() {
    let _watchdog = Watchdog::new();
    let word = super::super::commit_word::CommitWord::create().unwrap();
    let memory = memfd((PAGES * 4096) as i64, true);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("attach");
    let raw = vec![memory.as_raw_fd(), word.memfd().as_raw_fd()];
    let server = fake_server(&path, welcome(), raw);
    let mut attached = Attached::connect(&path).unwrap();
    // The memory cannot be made smaller under the client's mapping any more.
    assert!(nix::unistd::ftruncate(&memory, 4096).is_err());
    assert!(matches!(attached.pause(), Err(AttachError::Seed { pages: PAGES, .. })));
    server.join().unwrap();
}

#[test]
fn nobody_listening_is_an_error_that_names_the_path() {
    let error = Attached::connect("/nonexistent/attach").unwrap_err();
    assert!(error.to_string().contains("/nonexistent/attach"), "{error}");
}
