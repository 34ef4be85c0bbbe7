//! A committed guest that an operator takes back runs in its VMM again, whoever dies
//! between the word and the deed; one that was heard to run elsewhere never does.

use super::*;

/// A client that has committed, and nobody has said that the guest runs elsewhere.
fn committed(served: &Served) -> Attached {
    let mut attached = served.attach();
    attached.pause().unwrap();
    served.expect(Event::Paused);
    let _proof = attached.word.commit().unwrap();
    attached
}

#[test]
fn a_guest_that_was_taken_back_is_resumed_when_its_client_says_so() {
    let served = Served::new();
    let attached = committed(&served);
    let _proof = attached.word.take_back().unwrap();
    attached.resume().unwrap();
    served.expect(Event::Resumed);
    // And can be moved again, under a word of its own.
    let mut next = served.attach();
    assert_eq!(next.word.decision(), Decision::Undecided);
    assert!(next.status().unwrap().running);
    drop(next);
    assert_eq!(served.stop().0, []);
}

#[test]
fn a_client_that_dies_after_it_took_the_guest_back_leaves_it_running() {
    let served = Served::new();
    let attached = committed(&served);
    let _proof = attached.word.take_back().unwrap();
    drop(attached);
    served.expect(Event::Resumed);
    assert_eq!(served.stop().0, []);
}

#[test]
fn a_successor_takes_back_what_its_predecessor_committed() {
    let served = Served::new();
    drop(committed(&served));
    let mut next = served.attach();
    assert!(!next.status().unwrap().running);
    assert_eq!(next.word.decision(), Decision::Committed);
    let _proof = next.word.take_back().unwrap();
    let lets_go = next.word.commit();
    assert!(lets_go.is_err(), "no Commit leaves any more");
    next.resume().unwrap();
    served.expect(Event::Resumed);
    assert_eq!(served.stop().0, []);
}

#[test]
fn a_client_that_took_the_guest_back_and_is_silent_does_not_keep_it_paused() {
    let patience = Patience { paused: Duration::from_millis(100), ..Patience::default() };
    let served = Served::with(patience, |_| {});
    let mut attached = committed(&served);
    let _proof = attached.word.take_back().unwrap();
    // The VMM waits without limit for a client that has committed, and looks at the word
    // when that says something.
    assert!(!attached.status().unwrap().running);
    served.expect(Event::Resumed);
    assert_eq!(served.stop().0, []);
}

#[test]
fn a_guest_that_runs_elsewhere_is_not_resumed_by_whoever_comes_later() {
    let served = Served::new();
    let attached = committed(&served);
    attached.word.running().unwrap();
    drop(attached);
    let next = served.attach();
    assert_eq!(next.word.decision(), Decision::Running);
    assert!(next.word.take_back().is_err());
    let failed = next.resume().unwrap_err();
    assert!(failed.to_string().contains("already been given"), "{failed}");
    let mut last = served.attach();
    assert!(!last.status().unwrap().running);
    let proof = last.word.commit().unwrap();
    last.committed(&proof).unwrap();
    served.expect(Event::Released);
    assert_eq!(served.thread.join().unwrap().0.unwrap(), ServeEnd::Released);
}
