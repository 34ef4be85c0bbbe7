//! A guest that can be attached to: the source's side of the reference VMM.

use super::GuestDescription;
use crate::attach::handover::{HandoverError, MemoryFiles};
use crate::attach::message::{GuestInfo, Paused, Status};
use crate::attach::monotonic_ns;
use crate::attach::server::{AttachedVm, Description};
use crate::engine::error_chain;
use crate::failpoint::failpoint;
use crate::memory::dirty_bitmap::DirtyBitmap;
use crate::proto::page::PageIndex;
use crate::vmm::content::Instruments;
use crate::vmm::guest::{Guest, GuestError};
use crate::vmm::workload::{STATUS_RUNNING, control, control_page};
use std::time::{Duration, Instant};

/// How long a guest may take to notice a request in its control page.
const NOTICE_MAX: Duration = Duration::from_secs(2);

/// A guest, served to whoever attaches.
pub struct Departure {
    guest: Box<dyn Guest>,
    running: bool,
    /// Whether its user has paused it.
    held: bool,
    /// Whether the guest's instruments were reset since the last dirty round: pages that
    /// this process wrote, and the guest may not know of.
    wrote: bool,
}

impl Departure {
    /// Serves `guest`, which runs.
    ///
    /// # Errors
    /// If its memory does not lie in memfds, which another process could map.
    pub fn new(guest: Box<dyn Guest>) -> Result<Self, HandoverError> {
        MemoryFiles::of(guest.ram())?;
        Ok(Self { guest, running: true, held: false, wrote: false })
    }

    /// Pauses the guest for its user, before it is served: it stays so wherever it goes.
    ///
    /// # Errors
    /// It runs on.
    pub fn hold(&mut self) -> Result<(), GuestError> {
        self.guest.pause()?;
        (self.held, self.running) = (true, false);
        Ok(())
    }

    /// The guest.
    pub fn guest(&mut self) -> &mut dyn Guest {
        self.guest.as_mut()
    }

    fn instruments(&self) -> impl Iterator<Item = Instruments<'_>> {
        let vcpus = self.guest.workload().vcpus;
        (0..vcpus).map(|vcpu| Instruments::new(self.guest.ram(), vcpu))
    }

    fn steps(&self) -> u64 {
        self.instruments().map(|of| of.get(control::STEPS)).sum()
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        failpoint!("vmm::before_pause", return Err(self.broken("pause it")));
        self.guest.pause()
    }

    /// What there is to know of a guest that is paused, and was asked to be at `asked`.
    fn capture(&mut self, asked: Instant) -> Result<Paused, GuestError> {
        failpoint!("vmm::after_pause", return Err(self.broken("pause it")));
        let pause = asked.elapsed();
        let paused_at_ns = monotonic_ns();
        let capturing = Instant::now();
        let state = self.guest.capture()?;
        failpoint!("vmm::after_capture", return Err(self.broken("take its state out")));
        Ok(Paused {
            state,
            seeds: self.guest.seeds(),
            paused_at_ns,
            // After the capture: some of what it asks of KVM may write guest memory.
            frozen_at_ns: monotonic_ns(),
            pause_us: pause.as_micros() as u64,
            capture_us: capturing.elapsed().as_micros() as u64,
            steps: self.steps(),
            was_paused: self.held,
        })
    }

    /// Lets it go on as its user wants it.
    fn go_on(&mut self) -> Result<(), GuestError> {
        if !self.held {
            self.guest.resume()?;
            self.running = true;
        }
        Ok(())
    }

    #[cfg(feature = "failpoints")]
    fn broken(&self, action: &str) -> GuestError {
        let kind = self.guest.kind();
        GuestError { kind, action: action.into(), source: "a failpoint".into() }
    }
}

impl AttachedVm for Departure {
    fn describe(&self) -> Description {
        let workload = self.guest.workload();
        let kind = self.guest.kind();
        let processor = self.guest.processor().cloned();
        let trace = workload.trace.as_ref().map(|trace| trace.id().clone());
        let description = GuestDescription { kind, workload: workload.clone(), trace, processor };
        Description {
            layout: self.guest.ram().layout().clone(),
            machine: self.guest.machine(),
            guest: GuestInfo {
                kind: kind.name().into(),
                vcpus: workload.vcpus,
                workload_json: description.to_json(),
                pid: std::process::id(),
            },
        }
    }

    fn memory(&self) -> MemoryFiles<'_> {
        MemoryFiles::of(self.guest.ram()).expect("it could be handed over when it was made")
    }

    fn pause_and_capture(&mut self) -> Result<Paused, String> {
        let asked = Instant::now();
        // One that cannot be paused runs on.
        self.pause().map_err(|error| error_chain(&error))?;
        match self.capture(asked) {
            Ok(paused) => {
                self.running = false;
                Ok(paused)
            }
            Err(error) => {
                let why = error_chain(&error);
                // Whatever was stopped runs on; if it cannot, both failures are told.
                match self.go_on() {
                    Ok(()) => Err(why),
                    Err(also) => {
                        self.running = false;
                        Err(format!("{why}; and then: {}", error_chain(&also)))
                    }
                }
            }
        }
    }

    fn resume(&mut self) -> Result<(), String> {
        failpoint!("vmm::before_resume", return Err("a failpoint".into()));
        self.go_on().map_err(|error| error_chain(&error))?;
        failpoint!("vmm::after_resume");
        Ok(())
    }

    fn released(&mut self) {
        self.running = false;
    }

    fn status(&mut self) -> Status {
        Status { running: self.running, steps: self.steps(), failure: self.guest.failure() }
    }

    fn reset_instruments(&mut self) -> Result<(), String> {
        self.wrote = true;
        for of in self.instruments() {
            of.set(control::INSTRUMENT_REQUEST, of.get(control::INSTRUMENT_REQUEST) + 1);
        }
        if self.held {
            // They will see it when they run again.
            return Ok(());
        }
        let asked = Instant::now();
        let waits = |of: &Instruments<'_>| {
            of.get(control::STATUS) == STATUS_RUNNING
                && of.get(control::INSTRUMENT_SEEN) != of.get(control::INSTRUMENT_REQUEST)
        };
        while self.instruments().any(|of| waits(&of)) {
            if asked.elapsed() > NOTICE_MAX {
                return Err("a vCPU makes no steps: its instruments were not cleared".into());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn stop(&mut self) {
        if let Err(error) = self.guest.pause() {
            tracing::warn!(error = error_chain(&error), "the guest did not stop in time");
        }
        self.running = false;
    }

    fn has_dirty_log(&self) -> bool {
        self.guest.has_dirty_log()
    }

    fn start_dirty_log(&mut self) -> Result<(), String> {
        self.guest.start_dirty_log().map_err(|error| error_chain(&error))?;
        self.wrote = false;
        Ok(())
    }

    fn dirty_round(&mut self, into: &DirtyBitmap) -> Result<u64, String> {
        let vcpus = if self.wrote { 0..self.guest.workload().vcpus } else { 0..0 };
        let wrote: Vec<PageIndex> = vcpus.map(control_page).collect();
        let pages = self.guest.dirty_round(&wrote, into).map_err(|error| error_chain(&error))?;
        self.wrote = false;
        Ok(pages)
    }

    fn stop_dirty_log(&mut self) -> Result<(), String> {
        self.guest.stop_dirty_log().map_err(|error| error_chain(&error))
    }
}
