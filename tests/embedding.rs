//! The library as a VMM uses it: builders, events, and memory of the VMM's own making on both
//! sides, moved over loopback and compared byte by byte.
#![cfg(feature = "io")]

use postcopy::memory::users::MemoryUserError;
use postcopy::uffd::UffdOptions;
use postcopy::uffd::open::open;
use postcopy::vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
};
use postcopy::{
    Captured, ConfigError, DestinationBuilder, DestinationVm, Event, GuestFigures, Hello,
    LinkOptions, MemoryUser, Mismatch, Outcome, Phase, Receiver, SessionLimits, SourceBuilder,
    SourceVm, Stamp, Ticket, VmError,
};
use std::fs::File;
use std::sync::mpsc::{Receiver as Events, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// First page in guest physical memory, and pages.
const REGIONS: [(u64, u64); 3] = [(0, 300), (512, 40), (1 << 20, 150)];
const STATE: &[u8] = b"registers";

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

/// Whether guests can be received here; if not, it says so.
fn can_receive() -> bool {
    let opened = open(UffdOptions::for_kvm(), postcopy::DestinationBacking::MemfdContinue);
    if let Err(error) = &opened {
        println!("SKIPPED: {error}");
    }
    opened.is_ok()
}

/// Memory as a VMM makes it: private, or a file for each region, from its second page on.
fn memory(files: bool) -> GuestMemoryMmap {
    let regions = REGIONS.map(|(first, pages)| {
        let file = files.then(|| {
            let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
            let file = File::from(nix::sys::memfd::memfd_create(c"test", flags).unwrap());
            file.set_len((pages + 1) * PAGE).unwrap();
            FileOffset::new(file, PAGE)
        });
        let start = GuestAddress(first * PAGE);
        GuestRegionMmap::from_range(start, (pages * PAGE) as usize, file).unwrap()
    });
    GuestMemoryMmap::from_regions(regions.into()).unwrap()
}

/// Every third page has content of its own, every third is zero, every third never touched.
fn fill(memory: &GuestMemoryMmap) {
    for page in REGIONS.into_iter().flat_map(|(first, pages)| first..first + pages) {
        let words =
            (0..PAGE / 8).map(|word| (page << 9 | word).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let content: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        match page % 3 {
            0 => memory.write_slice(&content, GuestAddress(page * PAGE)).unwrap(),
            1 => memory.write_slice(&[0; PAGE as usize], GuestAddress(page * PAGE)).unwrap(),
            _ => {}
        }
    }
}

fn content(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut all = Vec::new();
    for (first, pages) in REGIONS {
        let mut region = vec![0; (pages * PAGE) as usize];
        memory.read_slice(&mut region, GuestAddress(first * PAGE)).unwrap();
        all.extend(region);
    }
    all
}

/// A guest that does nothing at the source.
struct Still(Arc<Mutex<Vec<&'static str>>>);

impl SourceVm for Still {
    fn pause(&mut self) -> Result<Captured, VmError> {
        self.0.lock().unwrap().push("pause");
        Ok(Captured { state: STATE.to_vec(), ..Captured::default() })
    }
    fn resume(&mut self) -> Result<(), VmError> {
        self.0.lock().unwrap().push("resume");
        Ok(())
    }
    fn release(&mut self) -> Result<(), VmError> {
        self.0.lock().unwrap().push("release");
        Ok(())
    }
    fn drained(&mut self) -> Result<(), VmError> {
        self.0.lock().unwrap().push("drained");
        Ok(())
    }
}

/// At the destination a thread reads one page of each region when it is to run.
#[derive(Default)]
struct Reader {
    own: Option<GuestMemoryMmap>,
    memory: Option<GuestMemoryMmap>,
    state: Vec<u8>,
    /// What the kernel was advised about its memory when it was prepared.
    advice: String,
}

impl DestinationVm for Reader {
    fn memory(&mut self, _: &Hello) -> Result<Option<GuestMemoryMmap>, Mismatch> {
        Ok(self.own.clone())
    }
    fn prepare(&mut self, proposal: &Hello, memory: GuestMemoryMmap) -> Result<String, Mismatch> {
        assert_eq!(proposal.guest, b"still");
        self.advice = huge_advice(&memory);
        self.memory = Some(memory);
        Ok("machine".into())
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.state = state.to_vec();
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, VmError> {
        let memory = self.memory.clone().ok_or("not prepared")?;
        thread::spawn(move || {
            for (first, pages) in REGIONS {
                let _: u64 = memory.read_obj(GuestAddress((first + pages - 1) * PAGE)).unwrap();
            }
        });
        Ok(Instant::now())
    }
}

fn destination() -> (DestinationBuilder, Events<Event>) {
    let (tell, events) = channel();
    let builder = DestinationBuilder::new().on_event(move |event| drop(tell.send(event)));
    (builder, events)
}

fn new_source(memory: &GuestMemoryMmap, ticket: &Ticket) -> SourceBuilder {
    // SAFETY: these guests do nothing, and no test writes after `fill`.
    unsafe { SourceBuilder::new(memory.clone(), ticket.clone()) }
}

fn source(memory: &GuestMemoryMmap, ticket: &Ticket) -> (SourceBuilder, Events<Event>) {
    let (tell, events) = channel();
    let builder = new_source(memory, ticket)
        .machine("machine")
        .guest("still")
        .on_event(move |event| drop(tell.send(event)));
    (builder, events)
}

fn ticket() -> Ticket {
    DestinationBuilder::new().build().unwrap().ticket().clone()
}

/// Both sides to their ends; the source's outcome, its VMM's calls, and the destination.
fn migrate(
    source: SourceBuilder,
    receiver: Receiver,
    vm: Reader,
) -> (Outcome, Vec<&'static str>, postcopy::DestinationEnd) {
    let receiving = thread::spawn(move || receiver.run(Box::new(vm)).unwrap());
    let calls = Arc::default();
    let end = source.build().unwrap().run(Box::new(Still(Arc::clone(&calls)))).unwrap();
    assert_eq!(end.stranded, None);
    let destination = receiving.join().unwrap();
    let calls = calls.lock().unwrap().clone();
    (end.outcome, calls, destination)
}

/// What the kernel was advised about huge pages in the first region: `hg`, `nh` or nothing.
fn huge_advice(memory: &GuestMemoryMmap) -> String {
    let start = memory.iter().next().unwrap().as_ptr() as usize;
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    // The kernel may have joined it to its neighbours.
    let holds = |line: &str| {
        let (from, to) = line.split_whitespace().next()?.split_once('-')?;
        let address = |text| usize::from_str_radix(text, 16).ok();
        Some((address(from)?..address(to)?).contains(&start))
    };
    let mut lines = smaps.lines().skip_while(|line| holds(line) != Some(true));
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).unwrap_or_default();
    flags.split_whitespace().find(|flag| ["hg", "nh"].contains(flag)).unwrap_or("").to_owned()
}

#[test]
fn private_memory_has_no_huge_pages_while_it_is_filled_and_then_as_before() {
    use nix::sys::mman::{MmapAdvise, madvise};
    let _watchdog = watchdog();
    if !can_receive() {
        return;
    }
    for (advice, before) in [(MmapAdvise::MADV_HUGEPAGE, "hg"), (MmapAdvise::MADV_NOHUGEPAGE, "nh")]
    {
        let own = memory(false);
        for region in own.iter() {
            let start = std::ptr::NonNull::new(region.as_ptr().cast()).unwrap();
            // SAFETY: a whole mapping; no content changes.
            if let Err(error) = unsafe { madvise(start, region.size(), advice) } {
                return println!("SKIPPED: there are no huge pages here: {error}");
            }
        }
        assert_eq!(huge_advice(&own), before);
        let (builder, _) = destination();
        let receiver = builder.build().unwrap();
        let (source, _) = source(&memory(true), receiver.ticket());
        let vm = Reader { own: Some(own.clone()), ..Reader::default() };
        let (outcome, _, end) = migrate(source, receiver, vm);
        assert_eq!(outcome, Outcome::Completed);
        let vm = (end.vm as Box<dyn std::any::Any>).downcast::<Reader>().ok().unwrap();
        assert_eq!((vm.advice.as_str(), huge_advice(&own).as_str()), ("nh", before));
    }
}

/// A destination's VMM in which something goes wrong.
struct Faulty {
    sound: Reader,
    fault: &'static str,
    /// What a call that hangs waits for.
    go_on: Events<()>,
}

impl Faulty {
    fn at(&self, method: &str) {
        if self.fault == method {
            panic!("{method} fails");
        }
    }
}

impl DestinationVm for Faulty {
    fn memory(&mut self, proposal: &Hello) -> Result<Option<GuestMemoryMmap>, Mismatch> {
        self.at("memory");
        self.sound.memory(proposal)
    }
    fn prepare(&mut self, proposal: &Hello, memory: GuestMemoryMmap) -> Result<String, Mismatch> {
        self.at("prepare");
        self.sound.prepare(proposal, memory)
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.at("restore");
        self.sound.restore(state)
    }
    fn resume(&mut self) -> Result<Instant, VmError> {
        self.at("resume");
        if self.fault == "hang" {
            let _ = self.go_on.recv_timeout(Duration::from_secs(20));
        }
        self.sound.resume()
    }
    fn workload_ended(&mut self) -> bool {
        self.at("figures");
        false
    }
    fn steps(&mut self) -> Option<u64> {
        self.at("figures");
        None
    }
    fn figures(&mut self) -> GuestFigures {
        self.at("figures");
        GuestFigures::default()
    }
}

#[test]
fn a_vmm_that_panics_or_hangs_at_the_destination_ends_the_session_in_an_order() {
    let _watchdog = watchdog();
    if !can_receive() {
        return;
    }
    type Expected = fn(&Outcome) -> bool;
    let aborted: Expected = |end| matches!(end, Outcome::Aborted(why) if why.contains("panicked"));
    let lost: Expected = |end| matches!(end, Outcome::Lost(why) if why.contains("panicked"));
    let late: Expected = |end| matches!(end, Outcome::Lost(why) if why.contains("did not start"));
    let completed: Expected = |end| *end == Outcome::Completed;
    let cases: [(&str, Expected, &[&str]); 6] = [
        ("memory", aborted, &[]),
        ("prepare", aborted, &[]),
        ("restore", aborted, &["pause", "resume"]),
        ("resume", lost, &["pause"]),
        ("hang", late, &["pause"]),
        ("figures", completed, &["pause", "release", "drained"]),
    ];
    for (fault, expected, calls_expected) in cases {
        let from = memory(false);
        fill(&from);
        let (builder, _) = destination();
        let restore = Duration::from_millis(if fault == "hang" { 300 } else { 30_000 });
        let limits = SessionLimits { restore, ..SessionLimits::default() };
        let receiver = builder.limits(limits).build().unwrap();
        let (source, _) = source(&from, receiver.ticket());
        let (go_on_now, go_on) = channel();
        let vm = Faulty { sound: Reader::default(), fault, go_on };
        let receiving = thread::spawn(move || receiver.run(Box::new(vm)));
        let calls = Arc::default();
        let end = source.build().unwrap().run(Box::new(Still(Arc::clone(&calls)))).unwrap();
        drop(go_on_now);
        assert!(expected(&end.outcome), "{fault}: {:?}", end.outcome);
        assert_eq!(*calls.lock().unwrap(), calls_expected, "{fault}");
        // The VMM is handed back whatever it did.
        let end = receiving.join().unwrap().unwrap();
        assert!(expected(&end.outcome), "{fault}: {:?}", end.outcome);
        assert!((end.vm as Box<dyn std::any::Any>).downcast::<Faulty>().is_ok());
    }
}

#[test]
fn what_was_reserved_in_a_vmms_own_files_is_given_back_if_no_guest_comes_of_it() {
    let _watchdog = watchdog();
    if !can_receive() {
        return;
    }
    for fault in ["prepare", "restore"] {
        let (from, own) = (memory(false), memory(true));
        fill(&from);
        let (builder, _) = destination();
        let receiver = builder.build().unwrap();
        let (source, _) = source(&from, receiver.ticket());
        let (_, go_on) = channel();
        let sound = Reader { own: Some(own.clone()), ..Reader::default() };
        let vm = Faulty { sound, fault, go_on };
        let receiving = thread::spawn(move || receiver.run(Box::new(vm)));
        let end = source.build().unwrap().run(Box::new(Still(Arc::default()))).unwrap();
        assert!(matches!(end.outcome, Outcome::Aborted(_)), "{fault}: {:?}", end.outcome);
        let end = receiving.join().unwrap().unwrap();
        assert!(matches!(end.outcome, Outcome::Aborted(_)), "{fault}: {:?}", end.outcome);
        let files = own.iter().map(|region| region.file_offset().unwrap().file());
        let blocks: i64 = files.map(|file| nix::sys::stat::fstat(file).unwrap().st_blocks).sum();
        assert_eq!(blocks, 0, "{fault}");
    }
}

/// The phases and steps that were told, in order, and the rest.
fn told(events: Events<Event>) -> (Vec<Phase>, Vec<Stamp>, Vec<Event>) {
    let (mut phases, mut steps, mut others) = (Vec::new(), Vec::new(), Vec::new());
    for event in events.try_iter() {
        match event {
            Event::Phase(phase) => phases.push(phase),
            Event::Step { step, .. } => steps.push(step),
            Event::Progress(_) => {}
            other => others.push(other),
        }
    }
    (phases, steps, others)
}

#[test]
fn memory_of_a_vmms_own_making_moves_between_any_two_kinds() {
    let _watchdog = watchdog();
    if !can_receive() {
        return;
    }
    for (from_files, own) in [(false, None), (true, Some(false)), (false, Some(true))] {
        let from = memory(from_files);
        fill(&from);
        let own = own.map(memory);
        if let Some(own) = &own {
            // What is in it is lost, also where the source has zeros and holes.
            for (first, pages) in REGIONS {
                let garbage = vec![0xEE; (pages * PAGE) as usize];
                own.write_slice(&garbage, GuestAddress(first * PAGE)).unwrap();
            }
        }
        let (builder, at_destination) = destination();
        let receiver = builder.build().unwrap();
        let (source, at_source) = source(&from, receiver.ticket());
        let vm = Reader { own, ..Reader::default() };
        let (outcome, calls, end) = migrate(source, receiver, vm);
        assert_eq!((outcome, end.outcome), (Outcome::Completed, Outcome::Completed));
        assert_eq!(calls, ["pause", "release", "drained"]);
        let vm = (end.vm as Box<dyn std::any::Any>).downcast::<Reader>().ok().unwrap();
        assert_eq!(vm.state, STATE);
        assert!(content(&vm.memory.unwrap()) == content(&from), "files {from_files}");

        use Phase::*;
        let (phases, steps, others) = told(at_source);
        assert_eq!(phases, [Handshake, Blackout, TargetBrownout, Release]);
        for step in [Stamp::Captured, Stamp::Committed, Stamp::Running, Stamp::Drained] {
            assert!(steps.contains(&step), "{step:?} not in {steps:?}");
        }
        assert_eq!(others.first(), Some(&Event::LinkUp { epoch: 0 }));
        assert_eq!(others.last(), Some(&Event::Ended(Outcome::Completed)));
        let (phases, steps, others) = told(at_destination);
        assert_eq!(phases, [Waiting, Handshake, Blackout, TargetBrownout, Release]);
        for step in [Stamp::StateReceived, Stamp::Committed, Stamp::Running, Stamp::Drained] {
            assert!(steps.contains(&step), "{step:?} not in {steps:?}");
        }
        assert_eq!(others.first(), Some(&Event::LinkUp { epoch: 0 }));
        assert_eq!(others.last(), Some(&Event::Ended(Outcome::Completed)));
    }
}

#[test]
fn memory_that_cannot_be_received_is_refused_before_the_guest_is_paused() {
    let _watchdog = watchdog();
    if !can_receive() {
        return;
    }
    let locked = memory(false);
    let first = locked.iter().next().unwrap().as_ptr();
    let start = std::ptr::NonNull::new(first.cast()).unwrap();
    // SAFETY: a page of the mapping.
    let lock = unsafe { nix::sys::mman::mlock(start, PAGE as usize) };
    let other = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let vhost = MemoryUser::VhostUser { postcopy: false };
    let mut cases = vec![
        (Some(other), None, "the memory layout"),
        (None, Some(MemoryUser::Vfio), "VFIO"),
        (None, Some(vhost), "vhost-user"),
    ];
    match lock {
        Ok(()) => cases.push((Some(locked), None, "is locked (mlock")),
        Err(error) => println!("SKIPPED: memory cannot be locked here: {error}"),
    }
    for (own, user, expected) in cases {
        let from = memory(false);
        let (mut builder, _) = destination();
        if let Some(user) = user {
            builder = builder.memory_user(user);
        }
        let receiver = builder.build().unwrap();
        let (source, events) = source(&from, receiver.ticket());
        let declared = user.is_some();
        let vm = Reader { own, ..Reader::default() };
        let (outcome, calls, end) = migrate(source, receiver, vm);
        let vm = (end.vm as Box<dyn std::any::Any>).downcast::<Reader>().ok().unwrap();
        assert!(vm.memory.is_none() || !declared, "prepared in vain");
        let Outcome::Aborted(why) = outcome else { panic!("{outcome:?}") };
        assert!(why.contains(expected), "{why}");
        assert!(calls.is_empty(), "the guest was touched: {calls:?}");
        assert_eq!(told(events).2.last(), Some(&Event::Ended(Outcome::Aborted(why))));
    }
}

#[test]
fn a_source_is_not_built_with_wrong_values_and_names_the_field() {
    let ticket = ticket();
    let memory = memory(false);
    let new = || new_source(&memory, &ticket);
    assert!(new().build().is_ok());
    assert!(new().vcpus(62).build().is_ok());
    let (none, ever) = (Duration::ZERO, Duration::MAX);
    let limits = SessionLimits::default;
    let wrong = [
        ("vcpus", new().vcpus(0)),
        ("vcpus", new().vcpus(63)),
        ("drain_after", new().drain_after(ever)),
        ("pivots", new().pivots(0)),
        ("pivots", new().pivots(65)),
        ("machine", new().machine("x".repeat(4097))),
        ("guest", new().guest(vec![0; 32769])),
        ("limits.handshake", new().limits(SessionLimits { handshake: none, ..limits() })),
        ("limits.handshake", new().limits(SessionLimits { handshake: ever, ..limits() })),
        ("limits.restore", new().limits(SessionLimits { restore: ever, ..limits() })),
        ("limits.recovery", new().limits(SessionLimits { recovery: none, ..limits() })),
        ("limits.recovery", new().limits(SessionLimits { recovery: ever, ..limits() })),
        ("limits.backoff_max", new().limits(SessionLimits { backoff_max: none, ..limits() })),
        ("limits.backoff_max", new().limits(SessionLimits { backoff_max: ever, ..limits() })),
        ("link.idle_timeout", new().link(LinkOptions { idle_timeout: ever, ..Default::default() })),
        ("link.idle_timeout", new().link(LinkOptions { idle_timeout: none, ..Default::default() })),
        ("link.mtu_max", new().link(LinkOptions { mtu_max: Some(100), ..Default::default() })),
    ];
    for (expected, builder) in wrong {
        match builder.build() {
            Err(ConfigError::Field { field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    match new().memory_user(MemoryUser::Vfio).build() {
        Err(ConfigError::MemoryUser(MemoryUserError::Vfio { .. })) => {}
        other => panic!("{other:?}"),
    }
    let empty = new_source(&GuestMemoryMmap::default(), &ticket).build();
    assert!(matches!(empty, Err(ConfigError::Memory(_))), "{empty:?}");
}

#[test]
fn a_destination_is_not_built_with_wrong_values_and_names_the_field() {
    let new = DestinationBuilder::new;
    let (none, ever) = (Duration::ZERO, Duration::MAX);
    let wrong = [
        ("push_lanes", new().push_lanes(0)),
        ("push_lanes", new().push_lanes(9)),
        ("port", new().port(65535)),
        ("public_host", new().public_host("not a host")),
        ("public_host", new().listen("0.0.0.0".parse().unwrap())),
        ("ticket_life", new().ticket_life(none)),
        ("ticket_life", new().ticket_life(Duration::from_secs(1 << 30))),
        ("limits.restore", new().limits(SessionLimits { restore: none, ..Default::default() })),
        ("limits.restore", new().limits(SessionLimits { restore: ever, ..Default::default() })),
    ];
    for (expected, builder) in wrong {
        match builder.build() {
            Err(ConfigError::Field { field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}
