//! A guest that can be attached to: the source's side of the reference VMM.

use super::GuestDescription;
use crate::attach::message::{GuestInfo, Paused, Status};
use crate::attach::server::{AttachedVm, Description};
use crate::engine::error_chain;
use crate::vmm::content::Instruments;
use crate::vmm::guest::{Guest, GuestError};
use crate::vmm::workload::{STATUS_RUNNING, control};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// How long a guest may take to notice a request in its control page.
const NOTICE_MAX: Duration = Duration::from_secs(2);

/// A running guest, served to whoever attaches.
pub struct Departure {
    guest: Box<dyn Guest>,
    memory: std::os::fd::OwnedFd,
    running: bool,
}

impl Departure {
    /// Serves `guest`, which runs; its memory must be a memfd.
    pub fn new(guest: Box<dyn Guest>) -> std::io::Result<Self> {
        let memory = guest.ram().memfd().ok_or_else(|| {
            std::io::Error::other("only a guest whose memory is a memfd can be handed over")
        })?;
        let memory = memory.try_clone_to_owned()?;
        Ok(Self { guest, memory, running: true })
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

    fn try_pause(&mut self) -> Result<Paused, GuestError> {
        let asked = Instant::now();
        self.guest.pause()?;
        let pause = asked.elapsed();
        let paused_at = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let paused_at_ns = paused_at.map_or(0, |at| {
            (at.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(at.tv_nsec() as u64)
        });
        let capturing = Instant::now();
        let state = self.guest.capture()?;
        Ok(Paused {
            state,
            seeds: self.guest.seeds(),
            paused_at_ns,
            pause_us: pause.as_micros() as u64,
            capture_us: capturing.elapsed().as_micros() as u64,
            steps: self.steps(),
        })
    }
}

impl AttachedVm for Departure {
    fn describe(&self) -> Description {
        let workload = self.guest.workload();
        let kind = self.guest.kind();
        let processor = self.guest.processor().cloned();
        let description = GuestDescription { kind, workload: workload.clone(), processor };
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

    fn memory(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.memory)
    }

    fn pause_and_capture(&mut self) -> Result<Paused, String> {
        let paused = self.try_pause();
        match paused {
            Ok(paused) => {
                self.running = false;
                Ok(paused)
            }
            Err(error) => {
                let why = error_chain(&error);
                // Whatever was stopped runs on; if it cannot, both failures are told.
                match self.guest.resume() {
                    Ok(()) => Err(why),
                    Err(also) => Err(format!("{why}; and then: {}", error_chain(&also))),
                }
            }
        }
    }

    fn resume(&mut self) -> Result<(), String> {
        self.guest.resume().map_err(|error| error_chain(&error))?;
        self.running = true;
        Ok(())
    }

    fn released(&mut self) {
        self.running = false;
    }

    fn status(&mut self) -> Status {
        Status { running: self.running, steps: self.steps(), failure: self.guest.failure() }
    }

    fn reset_instruments(&mut self) -> Result<(), String> {
        for of in self.instruments() {
            of.set(control::INSTRUMENT_REQUEST, of.get(control::INSTRUMENT_REQUEST) + 1);
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
}
