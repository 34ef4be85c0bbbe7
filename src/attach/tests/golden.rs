//! The bytes of each message, so that a change of the protocol is seen.

use super::super::handover::RegionFile;
use super::super::message::*;
use crate::proto::layout::{GuestAddress, MemoryLayout, Region};
use crate::proto::page::PageIndex;
use proptest::prelude::*;

fn requests() -> Vec<Request> {
    vec![
        Request::hello(),
        Request::Pause,
        Request::Resume,
        Request::Committed,
        Request::ResetInstruments,
        Request::Status,
        Request::Stop { why: "why".to_owned() },
        Request::StartDirtyLog,
        Request::DirtyRound,
        Request::StopDirtyLog,
        Request::Record,
        Request::Leave,
        Request::KeepRecord,
    ]
}

fn replies() -> Vec<Reply> {
    let regions = vec![
        Region { start: GuestAddress(0), pages: 786_432 },
        Region { start: GuestAddress(4 << 30), pages: 5 },
    ];
    vec![
        Reply::refused("no"),
        Reply::Welcome(Box::new(Welcome {
            version: VERSION,
            layout: MemoryLayout::new(regions).unwrap(),
            memory: vec![
                RegionFile { file: 0, offset: 1 << 14 },
                RegionFile { file: 1, offset: 0 },
            ],
            machine: "m".to_owned(),
            guest: GuestInfo {
                kind: "kvm".to_owned(),
                vcpus: 2,
                workload_json: "{}".to_owned(),
                pid: 300,
            },
            capabilities: vec![CAPABILITY_DIRTY_LOG.to_owned()],
        })),
        Reply::Paused(Box::new(Paused {
            state: vec![1, 2, 255],
            seeds: vec![PageIndex::new(16), PageIndex::new(300)],
            paused_at_ns: 1 << 40,
            frozen_at_ns: (1 << 40) + 9,
            pause_us: 5,
            capture_us: 6,
            steps: 7,
            was_paused: true,
        })),
        Reply::failed("not now"),
        Reply::Resumed,
        Reply::Released,
        Reply::InstrumentsReset,
        Reply::Status(Status { running: true, steps: 128, failure: Some("f".to_owned()) }),
        Reply::Stopping,
        Reply::DirtyLogStarted { started_at_ns: 300 },
        Reply::DirtyRound(DirtyRound { pages: 5, began_at_ns: 301, ended_at_ns: 1 << 14 }),
        Reply::DirtyLogStopped,
        Reply::Record,
        Reply::Left,
        Reply::RecordKept,
    ]
}

fn line(name: &str, bytes: &[u8]) -> String {
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{name:<17}{}\n", hex.join(" "))
}

#[test]
fn the_bytes_of_each_message() {
    let mut text = String::new();
    for request in requests() {
        let bytes = request.encode().unwrap();
        assert_eq!(Request::decode(&bytes[4..]).unwrap(), request);
        text += &line(request.name(), &bytes);
    }
    for reply in replies() {
        let bytes = reply.encode().unwrap();
        assert_eq!(Reply::decode(&bytes[4..]).unwrap(), reply);
        text += &line(reply.name(), &bytes);
    }
    insta::assert_snapshot!(text);
}

#[test]
fn each_message_cut_short_or_made_longer_is_refused() {
    for reply in replies() {
        let bytes = reply.encode().unwrap();
        for end in 4..bytes.len() {
            assert!(Reply::decode(&bytes[4..end]).is_err(), "{} cut to {end}", reply.name());
        }
        let longer = [&bytes[4..], &[0]].concat();
        assert!(matches!(Reply::decode(&longer), Err(MessageError::Trailing(1))));
    }
}

#[test]
fn limits_hold_in_both_directions() {
    let long = "x".repeat(TEXT_BYTES_MAX + 1);
    let mut replies = replies();
    let Reply::Welcome(welcome) = &mut replies[1] else { panic!() };
    welcome.machine = long;
    assert!(matches!(replies[1].encode(), Err(MessageError::TooLong { .. })));
    let unchecked = postcard::to_extend(&replies[1], Vec::new()).unwrap();
    assert!(matches!(Reply::decode(&unchecked), Err(MessageError::TooLong { .. })));
    let Reply::Welcome(welcome) = &mut replies[1] else { panic!() };
    welcome.machine = String::new();
    welcome.capabilities = vec!["x".repeat(CAPABILITY_BYTES_MAX + 1)];
    assert!(matches!(replies[1].encode(), Err(MessageError::TooLong { .. })));
    let Reply::Welcome(welcome) = &mut replies[1] else { panic!() };
    welcome.capabilities = vec![String::new(); CAPABILITIES_MAX + 1];
    assert!(matches!(replies[1].encode(), Err(MessageError::TooLong { .. })));
    let Reply::Failed { why } = Reply::failed("ä".repeat(REASON_BYTES_MAX)) else { panic!() };
    assert_eq!(why.len(), REASON_BYTES_MAX);
    let request = vec![0; REQUEST_BYTES_MAX + 1];
    assert!(matches!(Request::decode(&request), Err(MessageError::TooLong { .. })));
}

proptest! {
    #[test]
    fn no_bytes_make_decoding_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Request::decode(&bytes);
        let _ = Reply::decode(&bytes);
    }
}
