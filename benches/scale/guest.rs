//! The guest's two VMMs: nothing but memory, and a vCPU that reads it.

use crate::shape::{Shape, first_word};
use postcopy::proto::page::PAGE_SIZE;
use postcopy::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use postcopy::{Captured, DestinationVm, Hello, Mismatch, SourceVm, VmError};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A guest that has nothing to do.
pub struct Still;

impl SourceVm for Still {
    fn pause(&mut self) -> Result<Captured, VmError> {
        Ok(Captured { state: b"still".to_vec(), ..Captured::default() })
    }
    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn release(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn drained(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// One that reads its data pages in no order.
pub struct Touching {
    shape: Shape,
    /// Between two touches of its only vCPU.
    think: Duration,
    memory: Option<GuestMemoryMmap>,
    /// Set it to end the guest.
    pub over: Arc<AtomicBool>,
    /// Pages that were not what had been written.
    pub wrong: Arc<AtomicU64>,
}

impl Touching {
    pub fn new(shape: Shape, think: Duration) -> Self {
        Self { shape, think, memory: None, over: Arc::default(), wrong: Arc::default() }
    }
}

impl DestinationVm for Touching {
    fn prepare(&mut self, proposal: &Hello, memory: GuestMemoryMmap) -> Result<String, Mismatch> {
        assert_eq!(proposal.guest, self.shape.to_string().as_bytes());
        self.memory = Some(memory);
        Ok(proposal.machine.clone())
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), VmError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, VmError> {
        let memory = self.memory.clone().ok_or("not prepared")?;
        let (shape, think) = (self.shape, self.think);
        let (over, wrong) = (self.over.clone(), self.wrong.clone());
        thread::spawn(move || {
            let mut random = 1u64;
            while !over.load(Ordering::Relaxed) {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let page = shape.data_page((random >> 16) % shape.data_pages());
                let read = memory.read_obj::<u64>(GuestAddress(page * PAGE_SIZE as u64));
                if read.ok() != Some(first_word(page)) {
                    wrong.fetch_add(1, Ordering::Relaxed);
                }
                wait(think);
            }
        });
        Ok(Instant::now())
    }
}

/// Waits on the processor if a sleep would take longer.
fn wait(time: Duration) {
    const SLEEP_MIN: Duration = Duration::from_millis(1);
    if time >= SLEEP_MIN {
        return thread::sleep(time);
    }
    let until = Instant::now() + time;
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}
