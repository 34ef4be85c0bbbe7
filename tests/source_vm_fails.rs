//! A VMM at the source that fails, panics or hangs in a call: the migration ends all the
//! same, and says whether the guest runs on.
#![cfg(feature = "io")]

use postcopy::proto::message::{Hello, Mismatch};
use postcopy::proto::source::{Outcome, SessionLimits};
use postcopy::uffd::UffdOptions;
use postcopy::uffd::open::open;
use postcopy::{
    Captured, DestinationBacking, DestinationBuilder, DestinationVm, SourceBuilder, SourceEnd,
    SourceVm, VmError,
};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Ends the process if a test hangs.
fn watchdog() -> Sender<()> {
    let (alive, ended) = channel::<()>();
    thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(120)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("a migration does not end");
            std::process::abort();
        }
    });
    alive
}

type Calls = Arc<Mutex<Vec<&'static str>>>;

/// What a VMM does in a call.
#[derive(Clone, Copy, PartialEq)]
enum Does {
    Its,
    /// Its own, and far too much of it.
    Much,
    Fail,
    Panic,
    Hang,
}

impl Does {
    fn it(self) -> Result<(), VmError> {
        match self {
            Does::Its | Does::Much => Ok(()),
            Does::Fail => Err("there is no room for the word".into()),
            Does::Panic => panic!("a bug of the VMM"),
            Does::Hang => loop {
                thread::park();
            },
        }
    }
}

struct Broken {
    pause: Does,
    commit: Does,
    calls: Calls,
}

impl SourceVm for Broken {
    fn pause(&mut self) -> Result<Captured, VmError> {
        self.pause.it()?;
        self.calls.lock().unwrap().push("pause");
        let state = match self.pause {
            Does::Much => vec![7; (16 << 20) + 1],
            _ => b"registers".to_vec(),
        };
        Ok(Captured { state, ..Captured::default() })
    }
    fn commit(&mut self) -> Result<bool, VmError> {
        self.commit.it()?;
        self.calls.lock().unwrap().push("commit");
        Ok(true)
    }
    fn resume(&mut self) -> Result<(), VmError> {
        self.calls.lock().unwrap().push("resume");
        Ok(())
    }
    fn release(&mut self) -> Result<(), VmError> {
        self.calls.lock().unwrap().push("release");
        Ok(())
    }
}

struct Shell;

impl DestinationVm for Shell {
    fn prepare(&mut self, _: &Hello, _: GuestMemoryMmap) -> Result<String, Mismatch> {
        Ok("machine".into())
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), VmError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, VmError> {
        Ok(Instant::now())
    }
}

/// Moves a guest of this VMM; the source's end, the VMM's calls that returned, and the
/// destination's outcome. `None` where guests cannot be received.
fn migrate(pause: Does, commit: Does, restore: Duration) -> Option<(SourceEnd, Calls, Outcome)> {
    if let Err(error) = open(UffdOptions::for_kvm(), DestinationBacking::MemfdContinue) {
        println!("SKIPPED: {error}");
        return None;
    }
    let limits =
        SessionLimits { restore, recovery: Duration::from_secs(2), ..SessionLimits::default() };
    let receiver = DestinationBuilder::new().limits(limits).build().unwrap();
    let ticket = receiver.ticket().clone();
    let receiving = thread::spawn(move || receiver.run(Box::new(Shell)).unwrap());
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 12)]).unwrap();
    let calls = Calls::default();
    let vm = Broken { pause, commit, calls: Arc::clone(&calls) };
    // SAFETY: nothing writes to this memory at all.
    let source = unsafe { SourceBuilder::new(memory, ticket) };
    let source = source.machine("machine").limits(limits);
    let end = source.build().unwrap().run(Box::new(vm)).unwrap();
    let there = receiving.join().unwrap().outcome;
    Some((end, calls, there))
}

fn aborted(outcome: &Outcome, expected: &str) {
    match outcome {
        Outcome::Aborted(why) => assert!(why.contains(expected), "{why}"),
        other => panic!("{other:?}"),
    }
}

const LONG: Duration = Duration::from_secs(30);

#[test]
fn a_commit_that_fails_leaves_the_guest_running_here() {
    let _watchdog = watchdog();
    let Some((end, calls, there)) = migrate(Does::Its, Does::Fail, LONG) else { return };
    aborted(&end.outcome, "the commit could not be recorded: there is no room for the word");
    aborted(&there, "no room for the word");
    assert_eq!(*calls.lock().unwrap(), ["pause", "resume"]);
    assert_eq!(end.stranded, None);
    assert!(end.vm.is_some());
}

#[test]
fn a_state_that_no_destination_takes_leaves_the_guest_running_here() {
    let _watchdog = watchdog();
    let Some((end, calls, there)) = migrate(Does::Much, Does::Its, LONG) else { return };
    aborted(&end.outcome, "the machine state has 16777217 bytes, more than 16777216");
    aborted(&there, "16777217 bytes");
    assert_eq!(*calls.lock().unwrap(), ["pause", "resume"]);
    assert_eq!(end.stranded, None);
}

#[test]
fn a_vmm_that_panics_ends_the_migration_and_its_guest() {
    let _watchdog = watchdog();
    for (pause, commit) in [(Does::Panic, Does::Its), (Does::Its, Does::Panic)] {
        let Some((end, calls, there)) = migrate(pause, commit, LONG) else { return };
        aborted(&end.outcome, "panicked");
        aborted(&there, "panicked");
        assert!(end.stranded.is_some_and(|why| why.contains("panicked")));
        assert!(end.vm.is_none());
        assert!(!calls.lock().unwrap().contains(&"resume"));
    }
}

#[test]
fn a_vmm_that_hangs_in_the_commit_is_left_behind_and_its_guest_runs_nowhere() {
    let _watchdog = watchdog();
    let short = Duration::from_secs(2);
    let Some((end, calls, there)) = migrate(Does::Its, Does::Hang, short) else { return };
    assert!(
        matches!(&end.outcome, Outcome::Lost(why) if why.contains("in time")),
        "{:?}",
        end.outcome
    );
    assert!(!matches!(there, Outcome::Completed), "{there:?}");
    assert!(end.stranded.is_some());
    assert!(end.vm.is_none());
    assert_eq!(*calls.lock().unwrap(), ["pause"]);
}

#[test]
fn a_vmm_that_hangs_in_the_pause_is_left_behind() {
    let _watchdog = watchdog();
    let short = Duration::from_secs(2);
    let Some((end, calls, there)) = migrate(Does::Hang, Does::Its, short) else { return };
    aborted(&end.outcome, "");
    aborted(&there, "");
    assert!(end.stranded.is_some_and(|why| why.contains("does not come back")));
    assert!(calls.lock().unwrap().is_empty());
}
