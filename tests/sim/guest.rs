//! The guest: a few vCPUs that read and write pages, each a number of times, on
//! whichever side lets them run.

use crate::random::Random;
use std::time::Duration;

/// One access to a page.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    pub page: u64,
    pub write: bool,
}

#[derive(Debug)]
pub struct Vcpu {
    /// The access that it does next, or stands still at.
    pub next: Option<Access>,
    pub blocked: bool,
    pub blocked_at: Duration,
    left: u64,
    at: u64,
}

/// The vCPUs and what they are about to do.
#[derive(Debug)]
pub struct Guest {
    pub vcpus: Vec<Vcpu>,
    /// Its user had it paused: it stays so, wherever it is.
    pub was_paused: bool,
    /// How long the workload takes if no access has to wait.
    pub workload_max: Duration,
    /// The longest time between two accesses, in microseconds.
    pace: u64,
    /// Counts the times the guest was started: steps of an earlier time are void.
    pub generation: u32,
    pages: u64,
    random: Random,
    version: u64,
}

impl Guest {
    pub fn new(pages: u64, mut random: Random) -> Self {
        let vcpus = random.between(1, 4);
        let accesses = random.pick(&[0, 20, 150, 400]);
        // A slow guest that is migrated on demand takes longer than any limit.
        let pace = random.pick(&[100, 1_000, 1_000, 5_000, 5_000, 1_000_000]);
        let vcpus = (0..vcpus)
            .map(|_| Vcpu {
                next: None,
                blocked: false,
                blocked_at: Duration::ZERO,
                left: accesses,
                at: random.below(pages),
            })
            .collect();
        let was_paused = accesses == 0 && random.percent(50);
        let workload_max = Duration::from_micros(accesses * pace);
        Self { vcpus, was_paused, pace, workload_max, generation: 0, pages, random, version: 0 }
    }

    /// What a vCPU wants to do now; `None` once its part of the workload is over.
    pub fn wants(&mut self, vcpu: usize) -> Option<Access> {
        let state = &mut self.vcpus[vcpu];
        if state.next.is_none() && state.left > 0 {
            state.left -= 1;
            // Mostly nearby, now and then somewhere else.
            state.at = match self.random.below(10) {
                0 => self.random.below(self.pages),
                step => (state.at + step % 4) % self.pages,
            };
            state.next = Some(Access { page: state.at, write: self.random.percent(40) });
        }
        state.next
    }

    /// The access of a vCPU has happened.
    pub fn done(&mut self, vcpu: usize) {
        self.vcpus[vcpu].next = None;
    }

    /// A content that no page ever had.
    pub fn new_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    pub fn workload_ended(&self) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.left == 0 && vcpu.next.is_none())
    }

    pub fn rest(&mut self) -> Duration {
        self.random.micros(1, self.pace)
    }
}
