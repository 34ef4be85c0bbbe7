//! An operator looks at migrations, gives them a new address, gives them up, and takes back
//! guests whose commit is in doubt: on real processes, by the commands of the binary.

use super::commit_word::{CommitWord, Decision};
use super::fakes::FakeDestination;
use super::harness::{
    Ended, Guest, MIGRATION, POSTCOPY, Receiver, Running, SOON, poll, processes_with, read_report,
};
use nix::sys::signal::Signal;
use postcopy::engine::operator::{Answer, Refusal, Request, SessionStatus};
use postcopy::operator::client::ask;
use postcopy::operator::socket_path;
use postcopy::proto::message::{ToDestination, ToSource};
use postcopy::proto::operator::{Command, Risk, Whereabouts};
use postcopy::transport::Ticket;
use postcopy::transport::relay::{Relay, RelayConfig, targets};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Of the guests here.
const MEMORY: u64 = 32 << 20;
/// All of the memory takes 3.5 s.
const FAST: Option<u64> = Some(80_000_000);
/// 14 s.
const MIDDLING: Option<u64> = Some(20_000_000);
/// 28 s.
const SLOW: Option<u64> = Some(10_000_000);
/// One way of it is long enough to see the commit before the destination hears of it.
const LONG: Duration = Duration::from_millis(400);

fn relay(ticket: &str, bandwidth_bps: Option<u64>, rtt: Duration) -> (Relay, String) {
    let ticket: Ticket = ticket.parse().expect("a ticket");
    let config = RelayConfig { bandwidth_bps, rtt, ..RelayConfig::default() };
    let targets = targets(IpAddr::V4(Ipv4Addr::LOCALHOST), &ticket);
    let relay = Relay::spawn(config, &targets).expect("a relay");
    let ticket = relay.redirect(&ticket).expect("as many ports").to_string();
    (relay, ticket)
}

/// A guest, a destination with an operator socket, and a link between them.
struct Pair {
    guest: Guest,
    receiver: Receiver,
    relay: Relay,
    ticket: String,
    there: PathBuf,
}

impl Pair {
    fn prepare(bandwidth: Option<u64>, rtt: Duration) -> Self {
        let guest =
            Guest::start_with(&["--guest", "process", "--memory", "32M", "--think-ns", "20000"]);
        let there = PathBuf::from(guest.path("there.operator"));
        let receiver = Receiver::start_with(&["--operator", there.to_str().expect("plain")]);
        let (relay, ticket) = relay(&receiver.ticket, bandwidth, rtt);
        Self { guest, receiver, relay, ticket, there }
    }

    fn here(&self) -> PathBuf {
        socket_path(self.guest.control().as_ref())
    }

    /// Migrates until a quarter of the pages has come, then loses the link.
    fn cut_in_the_middle(&mut self) -> Running {
        let migration = self
            .guest
            .migrate(&self.ticket, &["--no-supervise", "--report", &self.guest.path("r")]);
        poll("pages on the link", SOON, || {
            let bytes = self.relay.stats().to_target.forwarded_bytes;
            (bytes > MEMORY / 4).then_some(())
        });
        self.relay.blackhole(true);
        until(&self.here(), |now| !now.linked);
        migration
    }

    /// Migrates until the commit is made, and loses the link before the destination hears it.
    fn cut_in_doubt(&mut self) -> Running {
        let word = CommitWord::of(self.guest.process.pid());
        let migration = self.guest.migrate(&self.ticket, &["--no-supervise"]);
        word.committed();
        self.relay.blackhole(true);
        let now = until(&self.here(), |now| !now.linked);
        assert_eq!((now.state.as_str(), now.guest), ("Committed", Whereabouts::InDoubt), "{now:?}");
        migration
    }
}

fn status(at: &Path) -> Option<SessionStatus> {
    match ask(at, &Request::Status) {
        Ok(Answer::Status(status)) => Some(*status),
        _ => None,
    }
}

/// The status, once it is as `wanted`.
fn until(at: &Path, wanted: impl Fn(&SessionStatus) -> bool) -> SessionStatus {
    poll("a session that is as it is to be", SOON, || status(at).filter(|now| wanted(now)))
}

fn may(now: &SessionStatus, command: Command) -> Option<Risk> {
    let of = now.commands.iter().find(|of| of.command == command).expect("each command");
    assert!(of.possible, "{command}: {now:?}");
    of.risk
}

/// `postcopy session`, with the session at `at`.
fn session(command: &str, at: &Path, more: &[&str]) -> Ended {
    let at = at.to_str().expect("a plain name");
    Running::start(&[&["session", command, "--operator", at], more].concat()).wait(MIGRATION)
}

/// Checks how it ended, and that it said all of `parts`, beside what was logged of a guest that
/// is left with pages missing.
fn ends(process: Running, code: i32, parts: &[&str]) {
    let ended = process.wait(SOON);
    assert_eq!(ended.code, Some(code), "{ended:?}");
    for part in parts {
        assert!(ended.stderr.contains(part), "nothing of {part:?} in {ended:?}");
    }
}

fn succeeds(ended: Ended) -> String {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.stdout
}

/// `postcopy session take-back` of a guest by its control socket.
fn take_back(guest: &Guest, more: &[&str]) -> Running {
    Running::start(&[&["session", "take-back", "--control", &guest.control()], more].concat())
}

const SURE: &str = "--yes-it-runs-nowhere-else";

#[test]
fn before_the_commit_a_session_is_seen_and_given_up_and_the_guest_runs_on() {
    for (state, guest_at) in
        [("Negotiating", Whereabouts::Source), ("Blackout", Whereabouts::Nowhere)]
    {
        let guest = Guest::start();
        let at = socket_path(guest.control().as_ref());
        let mut destination = FakeDestination::listen();
        let migration = guest.migrate(&destination.ticket, &[]);
        match state {
            "Negotiating" => drop(destination.proposed()),
            _ => destination.takes_state(),
        }
        let now = until(&at, |now| now.state == state);
        assert_eq!((now.side.as_str(), now.guest, now.linked), ("source", guest_at, true));
        assert_eq!(now.pages_total, 4096, "{now:?}");
        assert_eq!(may(&now, Command::GiveUp), None);
        let refused = session("take-back", &at, &[SURE]);
        refused.failed_with(1, &["not committed"]);
        session("redirect", &at, &["--to", "127.0.0.2"]).failed_with(1, &["before the commit"]);
        let text = succeeds(session("give-up", &at, &[]));
        assert!(text.contains("runs on at the source"), "{text}");
        if state == "Blackout" {
            // It may be in doubt, and is waited for until it has heard that it is not.
            let heard = destination.hear();
            assert!(matches!(heard, Ok(ToDestination::Abort { .. })), "{heard:?}");
            destination.say(&ToSource::Abort { reason: "so be it".into() });
        }
        migration.wait(SOON).failed_with(3, &["its operator gave it up", "runs on here"]);
        guest.runs_on();
    }
}

#[test]
fn a_destination_that_waits_is_seen_and_given_up() {
    let folder = super::harness::folder();
    let at = folder.path().join("operator");
    let receiver = Receiver::start_with(&["--operator", at.to_str().expect("plain")]);
    let mode = std::fs::metadata(&at).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let now = until(&at, |_| true);
    assert_eq!((now.side.as_str(), now.state.as_str()), ("destination", "Waiting"));
    assert!(now.patience_left_us.is_some_and(|left| left > 500_000_000), "{now:?}");
    session("redirect", &at, &["--to", "there"]).failed_with(1, &["nobody has come"]);
    succeeds(session("give-up", &at, &[]));
    receiver.fails_with(3, &["its operator gave it up"]);
    assert!(!at.exists(), "the socket is left");
}

/// Both sides say that they are paused, since when and why; the way over the first relay never
/// comes back, and the guest arrives over the second.
#[test]
fn a_session_whose_way_is_gone_for_good_goes_another_way() {
    let mut pair = Pair::prepare(FAST, Duration::from_millis(2));
    let migration = pair.cut_in_the_middle();
    let here = until(&pair.here(), |now| now.paused_us.is_some_and(|us| us > 500_000));
    assert_eq!((here.state.as_str(), here.guest), ("Brownout", Whereabouts::Destination));
    assert!(here.why_paused.is_some() && here.next_attempt_us.is_some(), "{here:?}");
    assert!(here.patience_left_us.is_some_and(|left| left > 30_000_000), "{here:?}");
    assert!(here.pages_settled > 0 && here.pages_settled < here.pages_total, "{here:?}");
    assert_eq!(may(&here, Command::GiveUp), Some(Risk::LoseTheGuest));
    let there = until(&pair.there, |now| !now.linked);
    assert_eq!((there.state.as_str(), there.guest), ("Running", Whereabouts::Destination));
    assert_eq!(there.session, here.session);
    assert!(there.why_paused.is_some() && there.patience_left_us.is_some(), "{there:?}");
    let text = succeeds(session("status", &pair.here(), &[]));
    for part in ["lost ", "runs at the destination", "with --yes-lose-the-guest", "not now"] {
        assert!(text.contains(part), "nothing of {part:?} in\n{text}");
    }
    let json = succeeds(session("status", &pair.here(), &["--json"]));
    let json: SessionStatus = serde_json::from_str(&json).expect("a status");
    assert_eq!(json.session, here.session);

    let (second, ticket) = relay(&pair.receiver.ticket, FAST, Duration::ZERO);
    session("redirect", &pair.here(), &["--to", "127.0.0.1:1"]).failed_with(1, &["ports"]);
    let other = FakeDestination::listen();
    session("redirect", &pair.here(), &["--to", &other.ticket]).failed_with(1, &["another"]);
    let ticket: Ticket = ticket.parse().expect("a ticket");
    let text = succeeds(session("redirect", &pair.here(), &["--to", &ticket.address()]));
    assert!(text.contains(&ticket.address()), "{text}");
    migration.succeed(MIGRATION);
    assert!(second.stats().to_target.forwarded_bytes > 0);
    let report = read_report(pair.guest.path("r"));
    assert_eq!(report["outcome"], "recovered", "{report:#}");
    assert_eq!(pair.receiver.report()["verified"], true);
}

/// The new address outlives the process that was told.
#[test]
fn a_fault_server_that_is_started_again_knows_the_new_address() {
    let mut pair = Pair::prepare(FAST, Duration::from_millis(2));
    let mut migration = pair.cut_in_the_middle();
    let (second, ticket) = relay(&pair.receiver.ticket, FAST, Duration::ZERO);
    second.blackhole(true);
    // The whole line, by standard input.
    let at = pair.here();
    let mut redirect =
        Running::start(&["session", "redirect", "--operator", at.to_str().unwrap(), "--to", "-"]);
    redirect.feed(ticket.as_bytes());
    redirect.succeed(SOON);
    migration.kill();
    second.blackhole(false);
    pair.guest.resume(&[]).succeed(MIGRATION);
    assert!(second.stats().to_target.forwarded_bytes > 0);
    assert_eq!(pair.receiver.report()["verified"], true);
}

#[test]
fn a_guest_that_runs_there_is_given_up_at_the_source_only_with_the_words() {
    let mut pair = Pair::prepare(SLOW, Duration::from_millis(2));
    let migration = pair.cut_in_the_middle();
    let at = pair.here();
    let refused = session("give-up", &at, &[]);
    refused.failed_with(1, &["stands still for ever", "--yes-lose-the-guest"]);
    assert!(status(&at).is_some(), "it was given up without the words");
    let refused = ask(&at, &Request::GiveUp { acknowledged: Some(Risk::TwoRunningGuests) });
    let other = matches!(refused, Ok(Answer::Refused(Refusal::Unacknowledged { .. })));
    assert!(other, "an acknowledgement of something else: {refused:?}");
    // After Running was heard the guest is nobody's to take back.
    session("take-back", &at, &[SURE]).failed_with(1, &["heard to run at the destination"]);
    succeeds(session("give-up", &at, &["--yes-lose-the-guest"]));
    migration.wait(SOON).failed_with(4, &["its operator gave it up", "freed"]);
    poll("the keeper's end", SOON, || {
        processes_with(&pair.guest.keeper()).is_empty().then_some(())
    });
    // And nobody goes on with it.
    pair.guest.resume(&[]).wait(SOON).failed_with(1, &["nothing to resume"]);
    // At the destination, too, the operator says so.
    session("give-up", &pair.there, &[]).failed_with(1, &["--yes-lose-the-guest"]);
    assert!(pair.receiver.process.runs());
    succeeds(session("give-up", &pair.there, &["--yes-lose-the-guest"]));
    ends(pair.receiver.process, 4, &["its operator gave it up", "while the guest ran here"]);
}

#[test]
fn a_guest_given_up_where_it_runs_ends_the_session_on_both_sides() {
    let pair = Pair::prepare(SLOW, Duration::from_millis(2));
    let migration = pair.guest.migrate(&pair.ticket, &[]);
    let now = until(&pair.there, |now| now.state == "Running" && now.linked);
    assert!(now.peer.is_some(), "{now:?}");
    until(&pair.here(), |now| now.state == "Brownout");
    session("take-back", &pair.there, &[SURE]).failed_with(1, &["only the source"]);
    succeeds(session("give-up", &pair.there, &["--yes-lose-the-guest"]));
    ends(pair.receiver.process, 4, &["its operator gave it up"]);
    let ended = migration.wait(SOON);
    ended.failed_with(4, &["its operator gave it up", "cannot go on at the destination"]);
}

/// The destination heard the commit and died with it.
#[test]
fn a_guest_whose_destination_is_dead_is_taken_back_and_moved_again() {
    let guest = Guest::start();
    let word = CommitWord::of(guest.process.pid());
    let mut destination = FakeDestination::listen();
    let migration = guest.migrate(&destination.ticket, &[]);
    destination.takes_state();
    destination.say(&ToSource::Ready);
    let at = socket_path(guest.control().as_ref());
    let heard = destination.hear();
    assert!(matches!(heard, Ok(ToDestination::Commit(_))), "{heard:?}");
    // While it is there, it is about to run the guest.
    session("take-back", &at, &[SURE]).failed_with(1, &["about to run the guest"]);
    destination.vanish();
    let now = until(&at, |now| !now.linked);
    assert_eq!(may(&now, Command::TakeBack), Some(Risk::TwoRunningGuests));
    let refused = take_back(&guest, &[]).wait(SOON);
    refused.failed_with(1, &["two running guests", SURE]);
    assert_eq!(word.decision(), Decision::Committed);
    let text = succeeds(take_back(&guest, &[SURE]).wait(SOON));
    assert!(text.contains("runs on"), "{text}");
    assert_eq!(word.decision(), Decision::TakenBack);
    guest.runs_on();
    // It still looks for the destination, to tell it, until somebody has that end.
    assert_eq!(until(&at, |_| true).state, "Retracting");
    succeeds(session("give-up", &at, &[]));
    migration.wait(SOON).failed_with(3, &["operator took the guest back", "runs on here"]);
    guest.migrates_to(Receiver::start());
}

/// The destination is in doubt: it has restored the guest, and never heard the commit.
#[test]
fn a_destination_that_comes_back_after_the_guest_was_taken_back_never_runs_it() {
    let mut pair = Pair::prepare(None, LONG);
    let migration = pair.cut_in_doubt();
    let there = until(&pair.there, |now| !now.linked);
    assert_eq!((there.state.as_str(), there.guest), ("InDoubt", Whereabouts::InDoubt));
    succeeds(take_back(&pair.guest, &[SURE]).wait(SOON));
    pair.guest.runs_on();
    pair.relay.blackhole(false);
    pair.receiver.fails_with(3, &["the source aborted", "operator took the guest back"]);
    migration.wait(SOON).failed_with(3, &["operator took the guest back", "runs on here"]);
    pair.guest.migrates_to(Receiver::start());
}

/// The safe way, without anybody's word but the destination's operator's.
#[test]
fn a_guest_in_doubt_is_given_up_there_and_taken_back_here() {
    let mut pair = Pair::prepare(None, LONG);
    let migration = pair.cut_in_doubt();
    until(&pair.there, |now| !now.linked);
    session("give-up", &pair.there, &[]).failed_with(1, &["did not run here and will not"]);
    succeeds(session("give-up", &pair.there, &["--yes-lose-the-guest"]));
    pair.receiver.fails_with(4, &["the guest did not run here and will not"]);
    succeeds(take_back(&pair.guest, &[SURE]).wait(SOON));
    succeeds(session("give-up", &socket_path(pair.guest.control().as_ref()), &[]));
    migration.wait(SOON).failed_with(3, &["runs on here"]);
    pair.guest.migrates_to(Receiver::start());
}

/// A wrong assertion: the guest runs there, and the source has not heard it.
#[test]
fn a_guest_that_ran_there_after_all_ends_when_it_hears_that_it_was_taken_back() {
    let pair = Pair::prepare(None, LONG);
    let word = CommitWord::of(pair.guest.process.pid());
    let migration = pair.guest.migrate(&pair.ticket, &[]);
    word.committed();
    // What comes from there is lost, so Running is.
    pair.relay.cut(postcopy::transport::relay::Way::ToClient, true);
    until(&pair.there, |now| now.state == "Running");
    pair.relay.blackhole(true);
    until(&pair.here(), |now| !now.linked);
    succeeds(take_back(&pair.guest, &[SURE]).wait(SOON));
    pair.guest.runs_on();
    pair.relay.blackhole(false);
    ends(pair.receiver.process, 4, &["operator took the guest back, and it ran here, too"]);
    let ended = migration.wait(SOON);
    ended.failed_with(3, &["the destination says", "it ran here, too"]);
    pair.guest.migrates_to(Receiver::start());
}

/// Nobody is left at the source but VMM and keeper; then not even the keeper.
#[test]
fn a_guest_without_a_fault_server_is_taken_back_from_its_vmm() {
    for keeper in [true, false] {
        let mut pair = Pair::prepare(None, LONG);
        let mut migration = pair.cut_in_doubt();
        migration.kill();
        if !keeper {
            for pid in processes_with(&pair.guest.keeper()) {
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
            }
            poll("the keeper's end", SOON, || {
                processes_with(&pair.guest.keeper()).is_empty().then_some(())
            });
        }
        let refused = take_back(&pair.guest, &[]).wait(SOON);
        refused.failed_with(1, &["two running guests", SURE]);
        assert!(!pair.guest.attach().status().expect("a status").running);
        let mut alone = take_back(&pair.guest, &[SURE]);
        assert!(alone.line().contains("the guest runs on in its VMM"));
        pair.guest.runs_on();
        pair.relay.blackhole(false);
        alone.succeed(SOON);
        match keeper {
            true => pair.receiver.fails_with(3, &["operator took the guest back"]),
            // Nobody knows any more where it is.
            false => {
                assert_eq!(until(&pair.there, |_| true).state, "InDoubt");
                succeeds(session("give-up", &pair.there, &["--yes-lose-the-guest"]));
                pair.receiver.fails_with(4, &["did not run here and will not"]);
            }
        }
        pair.guest.migrates_to(Receiver::start());
    }
}

#[test]
fn without_a_fault_server_only_a_commit_in_doubt_is_taken_back() {
    // A guest that was never committed.
    let guest = Guest::start();
    let ended = take_back(&guest, &[SURE]).wait(SOON);
    ended.failed_with(1, &["the guest was not committed"]);
    guest.runs_on();
    drop(guest);
    // One that was heard to run there, and whose VMM has not been let go.
    let pair = Pair::prepare(SLOW, LONG);
    let word = CommitWord::of(pair.guest.process.pid());
    let mut migration = pair.guest.migrate(&pair.ticket, &["--no-supervise"]);
    word.committed();
    pair.guest.process.signal(Signal::SIGSTOP);
    poll("Running", SOON, || (word.decision() == Decision::Running).then_some(()));
    migration.kill();
    pair.guest.process.signal(Signal::SIGCONT);
    // It may or may not have heard that it may go; either way the guest does not run here.
    let ended = take_back(&pair.guest, &[SURE]).wait(SOON);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let known = ["heard to run at the destination", "the VMM cannot be asked"];
    assert!(known.iter().any(|why| ended.stderr.contains(why)), "{ended:?}");
    pair.relay.blackhole(true);
}

/// A VMM that hangs is not asked, so it cannot do late what was called off.
#[test]
fn a_vmm_that_hangs_keeps_nobody_and_is_taken_from_when_it_is_back() {
    let mut pair = Pair::prepare(None, LONG);
    let migration = pair.cut_in_doubt();
    let word = CommitWord::of(pair.guest.process.pid());
    pair.guest.process.signal(Signal::SIGSTOP);
    let began = Instant::now();
    let ended = take_back(&pair.guest, &[SURE]).wait(SOON);
    ended.failed_with(1, &["the session goes on as before"]);
    assert!(began.elapsed() < Duration::from_secs(10), "it took {:?}", began.elapsed());
    assert_eq!(word.decision(), Decision::Committed);
    let now = until(&pair.here(), |_| true);
    assert_eq!(now.state, "Committed", "{now:?}");
    pair.guest.process.signal(Signal::SIGCONT);
    succeeds(take_back(&pair.guest, &[SURE]).wait(SOON));
    pair.guest.runs_on();
    pair.relay.blackhole(false);
    pair.receiver.fails_with(3, &["operator took the guest back"]);
    migration.wait(SOON).failed_with(3, &["runs on here"]);
}

/// Silence, garbage, lengths out of range, and too many at once: the session goes on, and an
/// honest operator is still heard.
#[test]
fn clients_of_the_operator_socket_cost_a_session_nothing() {
    let pair = Pair::prepare(MIDDLING, Duration::from_millis(2));
    let migration = pair.guest.migrate(&pair.ticket, &[]);
    let at = pair.here();
    until(&at, |now| now.state == "Brownout");
    let framed = |body: &[u8]| [&(body.len() as u32).to_le_bytes()[..], body].concat();
    let garbage = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        u32::MAX.to_le_bytes().to_vec(),
        4097u32.to_le_bytes().to_vec(),
        0u32.to_le_bytes().to_vec(),
        framed(b"nonsense"),
        framed(br#"{"request":"stop-everything"}"#),
        framed(br#"{"request":"take-back","acknowledged":"whatever"}"#),
        framed(&[b'['; 4096]),
        vec![7],
    ];
    for bytes in &garbage {
        let mut stream = UnixStream::connect(&at).expect("it listens");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        // It ends, with or without an answer.
        let _ = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || text.contains("no such request"), "{text}");
    }
    let silent: Vec<_> = (0..40).filter_map(|_| UnixStream::connect(&at).ok()).collect();
    assert!(silent.len() > 8);
    // They are let go by their limit.
    until(&at, |_| true);
    migration.succeed(MIGRATION);
    drop(silent);
    assert!(!at.exists(), "the socket is left");
    assert_eq!(pair.receiver.report()["verified"], true);
}

/// Whoever may not attach to the guest may not ask, either.
#[test]
fn another_user_is_not_heard() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can become another user");
        return;
    }
    let folder = super::harness::folder();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).expect("ours");
    let at = folder.path().join("operator");
    let at = at.to_str().expect("plain");
    let receiver = Receiver::start_with(&["--operator", at]);
    // Not even where the file's mode would let it in.
    std::fs::set_permissions(at, PermissionsExt::from_mode(0o666)).expect("ours");
    let mut command = std::process::Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", POSTCOPY]);
    let ended = Running::start_as(command, &["session", "give-up", "--operator", at]).wait(SOON);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(status(Path::new(at)).is_some(), "it was given up by a stranger");
    succeeds(session("give-up", Path::new(at), &[]));
    ends(receiver.process, 3, &["of user 65534", "its operator gave it up"]);
}
