//! What must have become of a guest, whatever happened to its migration: it runs, once, at
//! one of the two hosts, and every page of it is right.

use super::commit_word::Decision;
use super::evidence::{ENTERS, PREPARES};
use super::harness::{Ended, MIGRATION, Receiver, SOON, check_report, poll, read_report};
use super::plan::Who;
use super::scene::{Scene, left_nothing_behind};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fmt;

/// Where the guest is, verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// At the destination, over one link.
    Moved,
    /// At the destination, over more than one link, or by more than one fault server.
    Recovered,
    /// At the source. It was moved to another destination afterwards, to be verified there.
    Stayed,
    /// At the source, by an operator's word: its destination had died when the commit was made.
    /// It was moved afterwards, as above.
    TakenBack,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Moved => "moved",
            Self::Recovered => "recovered",
            Self::Stayed => "stayed, then moved",
            Self::TakenBack => "taken back, then moved",
        })
    }
}

/// Waits for the end of a migration, and checks all that must be true then.
pub fn verdict(mut scene: Scene) -> Outcome {
    let mark = scene.mark();
    let decision = poll("a decision, or the end of all fault servers", SOON + MIGRATION, || {
        let served = scene.is_served();
        match scene.word.decision() {
            Decision::Undecided if served => None,
            decision => Some(decision),
        }
    });
    let decision = match decision {
        Decision::Undecided => poll("the VMM's or the keeper's decision", SOON, || {
            Some(scene.word.decision()).filter(|decision| *decision != Decision::Undecided)
        }),
        decision => decision,
    };
    let outcome = match decision {
        Decision::Committed if died_in_doubt(&mut scene) => is_taken_back(scene),
        Decision::Committed | Decision::Running => is_there(scene),
        Decision::Aborted => is_here(scene),
        Decision::Undecided | Decision::TakenBack => panic!("nobody asked for {decision:?}"),
    };
    left_nothing_behind(&mark);
    outcome
}

/// After the commit: the guest is the destination's, and only its.
fn is_there(mut scene: Scene) -> Outcome {
    let plan = &scene.plan;
    let (killed_vmm, killed_server) = (plan.kills(Who::Vmm), plan.kills(Who::FaultServer));
    let (servers, supervised) = (scene.servers.len(), scene.plan.supervised);
    let report = scene.report();
    let server = scene.servers_end();
    match server.code {
        Some(0) => {}
        // Another one was at work at the end, which has no exit code for us.
        None if killed_server && supervised => {}
        // There was nothing left to be gone on with, or it was killed at the very end.
        _ if killed_server && !supervised && nothing_was_left(&server) => {}
        code => {
            let report = code.filter(|code| *code == 5).map(|_| read_report(&report));
            panic!("the guest was committed, and its fault server: {server:#?}\n{report:#?}")
        }
    }
    let vmm = scene.guest.process.wait_code();
    assert!(vmm == Some(0) || killed_vmm, "the VMM did not end well: {vmm:?}; {server:#?}");
    let code = scene.receiver.process.wait_code_within(MIGRATION);
    assert_eq!(code, Some(0), "the guest was lost; {server:#?}");
    let there = scene.receiver.report();
    assert_eq!(there["verified"], true, "{there:#}\n{server:#?}");
    assert_eq!(there["pages"]["placed_twice"], 0, "{there:#}");
    let committed = scene.source_guest.made_no_step_since_the_commit();
    assert!(committed, "the commit was not seen while it was watched for");
    if server.code != Some(0) && !supervised {
        return Outcome::Recovered;
    }
    let one = server.code == Some(0) && servers == 1;
    check_source(&read_report(report), &server, one)
}

fn nothing_was_left(server: &Ended) -> bool {
    server.code.is_none() || server.stderr.contains("there is nothing to resume")
}

/// Checks the report of a migration that was completed, perhaps by `one` fault server alone.
fn check_source(report: &Value, server: &Ended, one: bool) -> Outcome {
    let mut whole = report.clone();
    whole["verified"] = true.into();
    // A link that is lost when nothing is missing any more is not made again for that.
    let alone = server.stderr.contains("the destination's part of the report did not come");
    if report["outcome"] == "completed" && one && !alone {
        check_report(&whole);
        return Outcome::Moved;
    }
    let pages = |name: &str| report["pages"][name].as_u64();
    assert!(report["outcome"] == "recovered" || report["outcome"] == "completed", "{report:#}");
    assert_eq!(pages("placed_twice").unwrap_or(0), 0, "{report:#}");
    assert_eq!(pages("sent_twice").unwrap_or(0), 0, "{report:#}");
    let origins = ["seeded", "demanded", "pushed", "drained", "zero", "hole"];
    let counts: Vec<u64> = origins.iter().filter_map(|origin| pages(origin)).collect();
    let sum: u64 = counts.iter().sum();
    let known = counts.len() == origins.len();
    assert!(!known || Some(sum) >= pages("total"), "a page came from nowhere: {report:#}");
    let memory = report["guest"]["memory_bytes"].as_u64();
    assert_eq!(memory, pages("total").map(|pages| pages * 4096), "{report:#}");
    Outcome::Recovered
}

/// Whether the destination was killed before it had a guest to run, but after it had said that
/// it is ready: the commit was made to nobody.
fn died_in_doubt(scene: &mut Scene) -> bool {
    if !scene.plan.kills(Who::Destination) {
        return false;
    }
    // A killed one may be on its way out yet.
    poll("a destination that runs the guest, or has ended", SOON, || {
        let entered = scene.log.of(ENTERS).is_some();
        let code = scene.receiver.process.code_so_far();
        if entered { Some(false) } else { code.map(|code| code.is_none()) }
    })
}

/// Committed to a destination that is dead: nothing resumes the guest here but an operator,
/// who knows that.
fn is_taken_back(mut scene: Scene) -> Outcome {
    let committed = scene.source_guest.made_no_step_since_the_commit();
    assert!(committed, "the commit was not seen while it was watched for");
    scene.is_taken_back();
    scene.guest.runs_on();
    // Somebody may still look for the destination, to tell it.
    scene.interrupt_one_that_looks_in_vain();
    let ended = scene.servers_end();
    let killed_server = scene.plan.kills(Who::FaultServer);
    let told = ended.stderr.contains("operator took the guest back");
    assert!(ended.code == Some(3) && told || killed_server, "{ended:#?}");
    is_whole(&mut scene);
    assert_eq!(scene.log.of(ENTERS), None, "the guest was started at the destination, too");
    Outcome::TakenBack
}

/// Without a commit: the guest is the source's, and only its, and whole.
fn is_here(mut scene: Scene) -> Outcome {
    let plan = &scene.plan;
    let (killed_server, killed_destination) =
        (plan.kills(Who::FaultServer), plan.kills(Who::Destination));
    scene.guest.runs_on();
    assert_eq!(scene.log.of(ENTERS), None, "the guest was started at the destination, too");
    if killed_server && !scene.plan.supervised {
        // The one in its place holds the keeper, until the destination has heard of it.
        scene.server_ends();
    }
    is_whole(&mut scene);
    scene.interrupt_one_that_looks_in_vain();
    let ended = scene.servers_end();
    match ended.code {
        Some(3) => assert!(ended.stderr.contains("the guest runs on here"), "{ended:#?}"),
        None if killed_server && scene.plan.supervised => {}
        _ if killed_server && nothing_was_left(&ended) => {}
        _ => panic!("the guest is here, and the fault server ended otherwise: {ended:#?}"),
    }
    if scene.log.of(PREPARES).is_none() && scene.receiver.process.runs() {
        // It never heard a proposal, and waits for one as long as its ticket is good.
        scene.receiver.process.signal(Signal::SIGINT);
    }
    let code = scene.receiver.process.wait_code_within(MIGRATION);
    let by_kill = code.is_none() && killed_destination;
    assert!(by_kill || matches!(code, Some(1 | 3 | 4)), "the destination ended with {code:?}");
    assert_eq!(scene.log.of(ENTERS), None, "the guest was started at the destination, too");
    assert!(!scene.source_guest.made_no_step_since_the_commit(), "it was committed after all");
    Outcome::Stayed
}

/// Moves a guest that stayed to another destination, where every page of it is verified.
fn is_whole(scene: &mut Scene) {
    let log = ["--log", "postcopy=debug"];
    let receiver = Receiver::start_as(scene.plain(), &log);
    let report = scene.guest.path("last.json");
    let arguments = [&["--report", &report][..], &log].concat();
    let migration = scene.guest.migrate_as(scene.plain(), &receiver.ticket, &arguments);
    let ended = migration.succeed(MIGRATION);
    check_source(&read_report(&report), &ended, true);
    let vmm = scene.guest.process.wait_code();
    assert_eq!(vmm, Some(0), "the VMM did not end well");
    let there = receiver.report();
    assert_eq!(there["verified"], true, "{there:#}");
}
