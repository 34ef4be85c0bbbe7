//! Peers that break the protocol, propose what cannot be taken, or go away. Whatever
//! they do before the commit, the guest runs on at its source, and whoever ends says
//! why in one line.

use super::fakes::{FakeDestination, FakeSource, frame, frame_header, proposal};
use super::harness::{Guest, Receiver, SOON};
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::message::{self, Hello, Mismatch, ToDestination, ToSource};

/// Pages of the guests proposed here: 16 MiB.
const PAGES: u64 = 4096;
const RUNS_ON: &str = "the guest runs on here";

/// What a receiver says to a proposal that differs from a good one in one field.
fn refused(edit: fn(&mut Hello), parts: &[&str]) {
    let receiver = Receiver::start();
    let mut source = FakeSource::connect(&receiver.ticket);
    let mut hello = proposal(PAGES);
    edit(&mut hello);
    source.say(&ToDestination::Hello(hello));
    match source.hear() {
        Ok(ToSource::Refuse(mismatch)) => {
            let said = mismatch.to_string();
            assert!(parts.iter().all(|part| said.contains(part)), "{parts:?} in {said}");
        }
        other => panic!("{parts:?}: answered with {other:?}"),
    }
    source.close("goodbye");
    receiver.fails_with(3, parts);
}

#[test]
fn a_peer_of_another_version_is_refused_by_that_field() {
    refused(|hello| hello.version = 3, &["the protocol version: source 3, destination 2"]);
    refused(|hello| hello.version = 0, &["the protocol version: source 0, destination 2"]);
}

#[test]
fn a_proposal_that_does_not_fit_is_refused_by_its_field() {
    refused(|hello| hello.page_size = 65536, &["the page size: source 65536, destination 4096"]);
    refused(|hello| hello.features = 4, &["features: source 0x4, destination 0x3"]);
    refused(|hello| hello.vcpus = 3, &["vCPUs: source 3, destination 1"]);
    refused(|hello| hello.vcpus = u16::MAX, &["vCPUs: source 65535"]);
    refused(
        |hello| hello.machine = "a toaster".into(),
        &["the machine configuration: source a toaster", "process guest 2"],
    );
    refused(|hello| hello.guest = b"{}".into(), &["the guest's description: source {}"]);
    refused(|hello| hello.layout = MemoryLayout::flat(1).expect("a layout"), &["too little"]);
}

#[test]
fn more_memory_than_there_is_is_refused_with_both_numbers() {
    refused(
        |hello| hello.layout = MemoryLayout::pc((8 << 40) / 4096).expect("a layout"),
        &["memory: source 8796093022208 bytes", "do not fit", "leaves", "bytes"],
    );
}

#[test]
fn what_a_peer_sends_cannot_write_to_the_terminal() {
    refused(
        |hello| hello.machine = "\x1b[2J\npostcopy: all is well\r\u{202e}".into(),
        &["the machine configuration: source ?[2J?postcopy: all is well??, destination"],
    );
    let guest = Guest::start();
    let mut destination = FakeDestination::listen();
    let migration = guest.migrate(&destination.ticket, &[]);
    destination.proposed();
    destination.say(&ToSource::Abort { reason: "\x1b]0;owned\x07\npostcopy: done".into() });
    let said = ["the destination aborted: ?]0;owned??postcopy: done", RUNS_ON];
    migration.wait(SOON).failed_with(3, &said);
    guest.runs_on();
}

/// What comes before a proposal, or instead of one, uses no ticket up.
#[test]
fn who_proposes_nothing_is_dropped_and_the_next_one_is_taken() {
    let guest = Guest::start();
    let receiver = Receiver::start();
    let good = message::encode(&ToDestination::Hello(proposal(PAGES)));
    let mut other_magic = good.clone();
    other_magic[5] ^= 0x20;
    let mut cut_off = good[..good.len() - 9].to_vec();
    let length = cut_off.len() as u32 - 4;
    cut_off[..4].copy_from_slice(&length.to_le_bytes());
    let nonsense: [(&[u8], &str); 6] = [
        (&[0xff; 4], "a control message says it has 4294967295 bytes"),
        (&[0x00, 0x00, 0x02, 0x01], "a control message says it has 16908288 bytes"),
        (&[0; 4], "a control message is malformed"),
        (b"\x10\0\0\0GET / HTTP/1.1\r\n", "a control message is malformed"),
        (&other_magic, "the peer does not speak this protocol"),
        (&cut_off, "a control message is malformed"),
    ];
    for (bytes, why) in nonsense {
        let mut source = FakeSource::connect(&receiver.ticket);
        source.say_bytes(bytes);
        let ended = source.ended();
        // QUIC says its reason once and may lose it; then a reset follows.
        let told = ended.contains(why) || ended.contains("reset by peer");
        assert!(told, "{bytes:?}: {ended}, not {why}");
    }
    // One that says nothing more and one that goes away, both in the middle of a message.
    let mut silent = FakeSource::connect(&receiver.ticket);
    silent.say_bytes(&good[..20]);
    let mut gone = FakeSource::connect(&receiver.ticket);
    gone.say_bytes(&good[..20]);
    gone.vanish();
    guest.migrates_to(receiver);
    drop(silent);
}

/// What a receiver says to a source whose proposal it has accepted, and which then
/// breaks the protocol.
fn ends_after_accepting(break_it: impl FnOnce(&mut FakeSource), parts: &[&str]) {
    let receiver = Receiver::start();
    let mut source = FakeSource::accepted(&receiver.ticket, proposal(PAGES));
    break_it(&mut source);
    receiver.fails_with(3, parts);
}

#[test]
fn a_bad_page_frame_ends_the_session_with_its_reason() {
    let cases: [(Vec<u8>, &str); 9] = [
        (frame_header(0, 0, 0, PAGES, 1, 4096), "pages 4096+1 are not in a guest of 4096 pages"),
        (frame_header(0, 0, 0, PAGES - 1, 2, 8192), "pages 4095+2 are not in a guest"),
        (frame_header(0, 0, 0, u64::MAX, 1, 4096), "are not in a guest of 4096 pages"),
        (frame_header(1, 0, 0, 0, 0, 0), "pages 0+0 are not in a guest of 4096 pages"),
        (frame_header(0, 0, 0, 0, 65, 65 * 4096), "a page frame carries 65 pages"),
        (frame_header(0, 0, 0, 0, 1, u32::MAX), "says its content has 4294967295 bytes"),
        (frame_header(3, 0, 0, 0, 1, 4096), "unknown or not negotiated kind 3"),
        (frame_header(0, 5, 0, 0, 1, 4096), "unknown origin 5"),
        (frame_header(0, 0, 1, 0, 1, 4096), "link epoch 1; this is epoch 0"),
    ];
    for (index, (bytes, why)) in cases.into_iter().enumerate() {
        // In turn on the urgent and on a push connection.
        if index % 2 == 0 {
            ends_after_accepting(|source| source.send_seeds(&bytes), &[why]);
        } else {
            ends_after_accepting(|source| source.push(&bytes), &[why]);
        }
    }
    // A page that comes before the machine state, of which the proposal said nothing; and lost.
    let copied = [&frame_header(0, 4, 0, 0, 1, 4096)[..], &[7; 4096]].concat();
    ends_after_accepting(|source| source.push(&copied), &["which was not agreed upon"]);
    let lost = frame_header(4, 4, 0, 0, 1, 0);
    ends_after_accepting(|source| source.push(&lost), &["unknown origin 4"]);
    // The same after good ones.
    let bytes = [frame(0), frame(1), frame(PAGES)].concat();
    ends_after_accepting(|source| source.push(&bytes), &["pages 4096+1 are not in a guest"]);
}

#[test]
fn a_bad_compressed_frame_ends_the_session_with_its_reason() {
    // An offset of 5 after 4 bytes: it copies from before the block.
    let before_it: &[u8] = &[0x44, 1, 2, 3, 4, 5, 0];
    let cases: [(u32, u32, &[u8], &str); 5] = [
        (1, 0, &[], "says its content has 0 bytes"),
        (1, 4096, &[0; 4096], "says its content has 4096 bytes"),
        (65, 100, &[0; 100], "a page frame carries 65 pages"),
        (2, 5, &[0x40, 1, 2, 3, 4], "holds 4 bytes of pages; its header says 8192"),
        (2, 7, before_it, "the offset to copy is not contained"),
    ];
    let accepted = || {
        let receiver = Receiver::start();
        let hello = Hello { features: message::FEATURE_COMPRESSION, ..proposal(PAGES) };
        let source = FakeSource::accepted(&receiver.ticket, hello);
        (receiver, source)
    };
    for (count, length, content, why) in cases {
        let (receiver, mut source) = accepted();
        source.push(&[&frame_header(3, 2, 0, 0, count, length)[..], content].concat());
        receiver.fails_with(3, &[why]);
    }
    // What somebody waits for is not compressed, whatever was agreed upon.
    let (receiver, mut source) = accepted();
    source.send_seeds(&frame_header(3, 0, 0, 0, 1, 100));
    receiver.fails_with(3, &["unknown or not negotiated kind 3"]);
}

/// Nothing more may come on the other streams: the source waits for an answer, say.
#[test]
fn a_bad_page_frame_is_seen_before_all_streams_are_open() {
    let bytes = frame_header(3, 0, 0, 0, 1, 4096);
    let why = "unknown or not negotiated kind 3";
    ends_after_accepting(|source| source.send_seeds_alone(&bytes), &[why]);
}

#[test]
fn a_bad_message_ends_the_session_with_its_reason() {
    let released = ToDestination::Released;
    let state =
        ToDestination::State { was_paused: false, state: b"not a machine's state".to_vec() };
    let hello = ToDestination::Hello(proposal(PAGES));
    let huge = (message::MESSAGE_MAX as u32 + 1).to_le_bytes();
    ends_after_accepting(|source| source.say_bytes(&huge), &["a control message says it has"]);
    ends_after_accepting(
        |source| source.say_bytes(&[1, 0, 0, 0, 0x7f]),
        &["a control message is malformed"],
    );
    ends_after_accepting(
        |source| source.say(&released),
        &["the source broke the protocol", "Released does not belong"],
    );
    ends_after_accepting(
        |source| source.say(&hello),
        &["the source broke the protocol", "Hello does not belong"],
    );
    ends_after_accepting(|source| source.say(&state), &["no guest is here"]);
    let reason = "changed my mind".to_owned();
    let abort = ToDestination::Abort { reason };
    ends_after_accepting(|source| source.say(&abort), &["the source aborted: changed my mind"]);
}

#[test]
fn a_source_that_goes_away_before_the_blackout_leaves_no_guest_behind() {
    let receiver = Receiver::start();
    let source = FakeSource::accepted(&receiver.ticket, proposal(PAGES));
    source.vanish();
    receiver.fails_with(3, &["the link was lost", "no guest is here"]);

    let receiver = Receiver::start();
    let source = FakeSource::accepted(&receiver.ticket, proposal(PAGES));
    source.close("changed its mind");
    receiver.fails_with(3, &["the link was lost", "changed its mind", "no guest is here"]);
}

/// A migration to a destination that does something wrong aborts with this reason, and
/// the guest runs on.
fn aborts(guest: &Guest, wrong: impl FnOnce(FakeDestination), parts: &[&str]) {
    let destination = FakeDestination::listen();
    let migration = guest.migrate(&destination.ticket, &[]);
    wrong(destination);
    migration.wait(SOON).failed_with(3, &[parts, &[RUNS_ON]].concat());
    guest.runs_on();
}

fn every_failure_before_the_commit(guest: &[&str]) {
    let guest = Guest::start_with(guest);
    let accept = ToSource::Accept { version: message::PROTOCOL_VERSION };

    // Before the pause.
    aborts(
        &guest,
        |mut destination| {
            destination.proposed();
            destination.say(&ToSource::Refuse(Mismatch::new("the weather", "fine", "rain")));
            let _ = destination.hear();
        },
        &["the two sides differ in the weather: source fine, destination rain"],
    );
    aborts(
        &guest,
        |mut destination| {
            destination.proposed();
            destination.say(&ToSource::Ready);
            let _ = destination.hear();
        },
        &["the destination broke the protocol", "Ready does not belong"],
    );
    aborts(
        &guest,
        |mut destination| {
            destination.proposed();
            destination.close("not today");
        },
        &["not today"],
    );
    aborts(
        &guest,
        |mut destination| {
            destination.proposed();
            destination.vanish();
        },
        &["nothing was heard within the idle timeout"],
    );

    // While it pauses, and in the blackout.
    aborts(
        &guest,
        |mut destination| {
            destination.proposed();
            destination.say(&accept);
            destination.close("not today");
        },
        &["not today"],
    );
    aborts(
        &guest,
        |mut destination| {
            destination.takes_state();
            destination.close("power failure");
        },
        &["the link was lost", "power failure"],
    );
    aborts(
        &guest,
        |mut destination| {
            destination.takes_state();
            destination.vanish();
        },
        &["the link was lost", "nothing was heard within the idle timeout"],
    );
    aborts(
        &guest,
        |mut destination| {
            destination.takes_state();
            destination.say(&ToSource::Abort { reason: "no room".into() });
            let _ = destination.hear();
        },
        &["the destination aborted: no room"],
    );
    aborts(
        &guest,
        |mut destination| {
            destination.takes_state();
            destination.say(&ToSource::Drained { settled: PAGES });
            let _ = destination.hear();
        },
        &["the destination broke the protocol", "Drained does not belong"],
    );
    aborts(
        &guest,
        |mut destination| {
            destination.takes_state();
            destination.say_bytes(&[0xff; 4]);
            let _ = destination.hear();
        },
        &["the destination broke the protocol", "a control message says it has"],
    );
    aborts(
        &guest,
        |mut destination| {
            destination.takes_state();
            destination.ask(PAGES, 1);
            let _ = destination.hear();
        },
        &["the destination broke the protocol", "pages 4096+1 are not in a guest"],
    );
    guest.migrates_to(Receiver::start());
}

#[test]
fn every_failure_before_the_commit_leaves_a_process_running() {
    let guest = ["--guest", "process", "--memory", "16M", "--think-ns", "2000"];
    every_failure_before_the_commit(&guest);
}

#[test]
fn every_failure_before_the_commit_leaves_a_virtual_machine_running() {
    let guest = ["--guest", "kvm", "--memory", "16M", "--think-ns", "2000", "--vcpus", "2"];
    every_failure_before_the_commit(&guest);
}

#[test]
fn a_receiver_that_was_killed_or_hangs_is_noticed() {
    let guest = Guest::start();
    let mut receiver = Receiver::start();
    receiver.process.freeze();
    let ended = guest.migrate(&receiver.ticket, &[]).wait(SOON);
    ended.failed_with(3, &["no answer from 127.0.0.1", RUNS_ON]);
    guest.runs_on();
    receiver.process.kill();
    let ended = guest.migrate(&receiver.ticket, &[]).wait(SOON);
    ended.failed_with(3, &["no answer from 127.0.0.1", RUNS_ON]);
    guest.runs_on();
    guest.migrates_to(Receiver::start());
}

#[test]
fn an_attached_client_that_is_killed_gives_the_guest_back() {
    let guest = Guest::start();
    let mut destination = FakeDestination::listen();
    let mut migration = guest.migrate(&destination.ticket, &[]);
    destination.takes_state();
    // The guest runs nowhere now; nothing was committed.
    migration.kill();
    guest.runs_on();
    guest.migrates_to(Receiver::start());
}
