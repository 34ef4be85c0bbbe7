//! Clients and servers that do not keep to the protocol: the other end survives,
//! says so in one line, and leaks no descriptor.

use super::super::client::{AttachError, Attached};
use super::super::commit_word::CommitWord;
use super::super::handover::RegionFile;
use super::super::message::*;
use super::super::server::Patience;
use super::super::socket::{Connection, SocketError};
use super::*;
use crate::proto::layout::{GuestAddress, Region};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
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
    let named = |why: &str| why.ends_with(&format!("only {VERSION}"));
    assert!(matches!(reply, Reply::Refused { version: VERSION, why } if named(&why)));
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
        (18, "18 file descriptors with a message that has 0"),
        (19, "18 file descriptors or more"),
        (200, "18 file descriptors or more"),
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
    was_paused: false,
};

/// A message and the descriptors with it.
type Said = (Vec<u8>, Vec<RawFd>);

/// A server that answers a Hello and, if the client goes on, the next requests, whatever
/// they are, then hangs up.
fn fake_server(path: &Path, answers: Vec<Said>) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        for (bytes, descriptors) in answers {
            let mut length = [0; 4];
            if (&stream).read_exact(&mut length).is_err() {
                return;
            }
            let mut request = vec![0; u32::from_le_bytes(length) as usize];
            (&stream).read_exact(&mut request).unwrap();
            let control = [ControlMessage::ScmRights(&descriptors)];
            let control = if descriptors.is_empty() { &[] } else { &control[..] };
            let data = [IoSlice::new(&bytes)];
            let flags = MsgFlags::MSG_NOSIGNAL;
            let sent = sendmsg::<()>(stream.as_raw_fd(), &data, control, flags, None);
            assert_eq!(sent, Ok(bytes.len()));
        }
    })
}

/// What a client of such a server gets.
fn attach_to(answers: Vec<Said>) -> Result<Attached, AttachError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("attach");
    let server = fake_server(&path, answers);
    let attached = Attached::connect(&path);
    if attached.is_err() {
        server.join().unwrap();
    }
    attached
}

fn raw(descriptors: &[BorrowedFd<'_>]) -> Vec<RawFd> {
    descriptors.iter().map(AsRawFd::as_raw_fd).collect()
}

/// The bytes of a reply that keeps to no limit.
fn unchecked(reply: &Reply) -> Vec<u8> {
    let mut bytes = postcard::to_extend(reply, vec![0; 4]).unwrap();
    let length = (bytes.len() - 4) as u32;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// The mock's Welcome, changed.
fn welcome_with(change: impl FnOnce(&mut Welcome)) -> Vec<u8> {
    let (sender, _) = channel();
    let vm = MockVm::new(sender);
    let Description { layout, machine, guest } = vm.describe();
    let memory = vm.memory().regions().to_vec();
    let capabilities = vec![CAPABILITY_DIRTY_LOG.to_owned()];
    let mut welcome = Welcome { version: VERSION, layout, memory, machine, guest, capabilities };
    change(&mut welcome);
    unchecked(&Reply::Welcome(Box::new(welcome)))
}

fn welcome() -> Vec<u8> {
    welcome_with(|_| {})
}

/// A Welcome whose regions have so many pages and lie there.
fn welcome_to(pages: &[u64], places: &[(u32, u64)]) -> Vec<u8> {
    welcome_with(|welcome| {
        let region = |(at, &pages): (u64, &u64)| Region { start: GuestAddress(at << 32), pages };
        welcome.layout = MemoryLayout::new((0..).zip(pages).map(region).collect()).unwrap();
        let places = places.iter().map(|&(file, offset)| RegionFile { file, offset });
        welcome.memory = places.collect();
    })
}

fn with_causes(error: &AttachError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

fn memfd(bytes: i64, sealable: bool) -> OwnedFd {
    let sealing = if sealable { MFdFlags::MFD_ALLOW_SEALING } else { MFdFlags::empty() };
    let memfd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC | sealing).unwrap();
    nix::unistd::ftruncate(&memfd, bytes).unwrap();
    memfd
}

#[test]
fn a_client_survives_a_server_that_hands_over_the_wrong_things() {
    let _watchdog = Watchdog::new();
    let word = CommitWord::create().unwrap();
    let word = word.memfd();
    let file = memfd((PAGES * 4096) as i64, true);
    let (memory, other) = (file.as_fd(), memfd((PAGES * 4096) as i64, true));
    let short = memfd(4096, true);
    let unsealable = memfd((PAGES * 4096) as i64, false);
    let huge = memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_HUGETLB).unwrap();
    nix::unistd::ftruncate(&huge, 2 << 20).unwrap();
    let leak = Leak::new();
    let pipe = leak.writer.as_fd();
    let one = welcome();
    let two = welcome_to(&[4, 4], &[(0, 4 * 4096), (1, 0)]);
    let twice = welcome_to(&[4, 4], &[(0, 0), (1, 4096)]);
    let both_in_one = welcome_to(&[4, 4], &[(0, 4 * 4096), (0, 0)]);
    let many = welcome_to(&[1; 16], &std::array::from_fn::<_, 16, _>(|i| (i as u32, 0)));
    let cases: Vec<(&Vec<u8>, Vec<BorrowedFd>, &str)> = vec![
        (&one, vec![], "0 file descriptors with a message that has 2"),
        (&one, vec![memory], "1 file descriptors"),
        (&one, vec![memory, word, pipe], "3 file descriptors"),
        (&one, vec![pipe; 19], "18 file descriptors or more"),
        (&one, vec![pipe, word], "cannot be sealed"),
        (&one, vec![unsealable.as_fd(), word], "cannot be sealed"),
        (&one, vec![short.as_fd(), word], "has 4096 bytes; region 0 ends at 32768"),
        (&one, vec![huge.as_fd(), word], "region 0 does not begin and end where they do"),
        (&one, vec![memory, memory], "32768 bytes, not 4096"),
        (&one, vec![memory, pipe], "not a memfd"),
        (&two, vec![memory, word], "2 file descriptors with a message that has 3"),
        (&two, vec![memory, other.as_fd(), other.as_fd(), word], "4 file descriptors"),
        (&two, vec![memory, short.as_fd(), word], "file 1 has 4096 bytes; region 1 ends at 16384"),
        (&two, vec![short.as_fd(), memory, word], "file 0 has 4096 bytes; region 0 ends at 32768"),
        (&two, vec![memory, unsealable.as_fd(), word], "file 1 cannot be sealed"),
        // The same bytes once more under another number.
        (&twice, vec![memory, memory, word], "shares bytes"),
        (&both_in_one, vec![short.as_fd(), word], "has 4096 bytes; region 0 ends at 32768"),
        (&many, vec![pipe; 17], "file 0 cannot be sealed"),
    ];
    for (welcome, descriptors, expected) in cases {
        let error = attach_to(vec![(welcome.clone(), raw(&descriptors))]).unwrap_err();
        let text = with_causes(&error);
        assert!(text.contains(expected), "{expected}: {text}");
    }
    leak.all_copies_are_closed();
}

#[test]
fn memory_in_places_where_it_cannot_be_is_refused() {
    let _watchdog = Watchdog::new();
    for (pages, places, expected) in [
        (&[8][..], &[][..], "0 places are named for 1"),
        (&[8], &[(0, 0), (1, 0)], "2 places are named for 1"),
        (&[8], &[(16, 0)], "at most 16"),
        (&[8], &[(1, 0)], "no memory region lies in file 0"),
        (&[8], &[(0, 5)], "cannot begin at offset 0x5"),
        (&[8], &[(0, !0xfff)], "cannot begin at offset 0xfffffffffffff000"),
        (&[8], &[(0, 1 << 63)], "cannot begin at offset 0x8000000000000000"),
        (&[4, 4], &[(0, 0), (0, 3 * 4096)], "regions 0 and 1 share bytes"),
    ] {
        let error = attach_to(vec![(welcome_to(pages, places), vec![])]).unwrap_err();
        assert!(matches!(error, AttachError::Message { .. }), "{error:?}");
        let text = with_causes(&error);
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn a_client_survives_a_server_that_says_the_wrong_things() {
    let _watchdog = Watchdog::new();
    let answer = |reply: Vec<u8>| attach_to(vec![(reply, vec![])]).unwrap_err();
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
    let error = answer(welcome_with(|welcome| welcome.version = 77));
    assert!(matches!(error, AttachError::Version { theirs: 77 }), "{error:?}");
}

/// A client of a server that welcomes it rightly and then says this.
fn then<T>(said: Said, ask: impl FnOnce(&mut Attached) -> T) -> T {
    let _watchdog = Watchdog::new();
    let word = CommitWord::create().unwrap();
    let memory = memfd((PAGES * 4096) as i64, true);
    let hello = (welcome(), raw(&[memory.as_fd(), word.memfd()]));
    let mut attached = attach_to(vec![hello, said]).unwrap();
    // The memory cannot be made smaller under the client's mapping any more.
    assert!(nix::unistd::ftruncate(&memory, 4096).is_err());
    ask(&mut attached)
}

#[test]
fn a_seed_outside_of_the_guest_is_refused() {
    let paused = Paused { seeds: vec![PageIndex::new(PAGES)], ..EMPTY_CAPTURE };
    let reply = Reply::Paused(Box::new(paused)).encode().unwrap();
    let error = then((reply, vec![]), |attached| attached.pause().unwrap_err());
    assert!(matches!(error, AttachError::Seed { pages: PAGES, .. }));
}

#[test]
fn a_dirty_bitmap_that_is_none_is_refused() {
    let started = Reply::DirtyLogStarted { started_at_ns: 1 }.encode().unwrap();
    let bitmap = |pages| DirtyBitmap::create(&MemoryLayout::flat(pages).unwrap()).unwrap();
    let (right, larger) = (bitmap(PAGES), bitmap(PAGES + 32_768));
    let unsealed = memfd(4096, true);
    let leak = Leak::new();
    let pipe = leak.writer.as_fd();
    let failed = Reply::failed("no").encode().unwrap();
    let cases: Vec<(&Vec<u8>, Vec<BorrowedFd>, &str)> = vec![
        (&started, vec![], "0 file descriptors with a message that has 1"),
        (&started, vec![right.memfd(), pipe], "2 file descriptors with a message that has 1"),
        (&started, vec![larger.memfd()], "has 8192 bytes, not 4096"),
        (&started, vec![unsealed.as_fd()], "not a memfd sealed"),
        (&started, vec![pipe], "not a memfd sealed"),
        (&failed, vec![pipe], "1 file descriptors with a message that has 0"),
    ];
    for (reply, descriptors, expected) in cases {
        let said = (reply.clone(), raw(&descriptors));
        let error = then(said, |attached| attached.start_dirty_log().unwrap_err());
        let text = with_causes(&error);
        assert!(text.contains(expected), "{expected}: {text}");
    }
    leak.all_copies_are_closed();
    let said = (started, raw(&[right.memfd()]));
    then(said, |attached| assert_eq!(attached.start_dirty_log().unwrap().bitmap.pages(), PAGES));
}

#[test]
fn a_round_of_more_pages_than_there_are_is_refused() {
    let round = |pages| DirtyRound { pages, began_at_ns: 0, ended_at_ns: 0 };
    let said = |pages| (Reply::DirtyRound(round(pages)).encode().unwrap(), vec![]);
    then(said(PAGES), |attached| assert_eq!(attached.dirty_round().unwrap().pages, PAGES));
    let error = then(said(PAGES + 1), |attached| attached.dirty_round().unwrap_err());
    assert!(matches!(error, AttachError::DirtyPages { counted: 9, pages: PAGES }), "{error:?}");
    let pipe = Leak::new();
    let (bytes, _) = said(0);
    let with_pipe = (bytes, raw(&[pipe.writer.as_fd()]));
    let error = then(with_pipe, |attached| attached.dirty_round().unwrap_err());
    assert!(with_causes(&error).contains("a message that has 0"), "{error:?}");
    pipe.all_copies_are_closed();
}

#[test]
fn nobody_listening_is_an_error_that_names_the_path() {
    let error = Attached::connect("/nonexistent/attach").unwrap_err();
    assert!(error.to_string().contains("/nonexistent/attach"), "{error}");
}
