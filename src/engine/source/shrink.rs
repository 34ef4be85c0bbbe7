//! [`Shrinker`]: a push lane's compressor, and what it measures so that
//! [`Compression`] can decide. It decides nothing.

use super::push::lock;
use crate::proto::compression::codec::Compressor;
use crate::proto::compression::{Compression, Treatment};
use bytes::Bytes;
use nix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How often the time that a lane waits is added up: reading it costs a few microseconds.
const STRETCH: Duration = Duration::from_millis(20);

/// What one push lane needs; made on the lane's thread, and used there.
#[derive(Debug)]
pub struct Shrinker {
    /// Made when it is first needed.
    compressor: Option<Box<Compressor>>,
    /// The thread's own figures, if the kernel has them.
    schedstat: Option<File>,
    /// When the lane began to push without a pause, and what it had used by then.
    stretch: Option<(Instant, Duration)>,
}

impl Shrinker {
    /// One for the calling thread.
    pub fn new() -> Self {
        let schedstat = File::open("/proc/thread-self/schedstat").ok();
        Self { compressor: None, schedstat, stretch: None }
    }

    /// Compresses pages that are about to be sent, if `policy` wants it; `None` if they are to
    /// be sent as they are. `began` is the beginning of the policy's time.
    pub fn shrink(
        &mut self,
        policy: &Mutex<Compression>,
        began: Instant,
        pages: &[u8],
    ) -> Option<Bytes> {
        let treatment = lock(policy).next(began.elapsed());
        if treatment == Treatment::Raw {
            return None;
        }
        let before = processor_time();
        let block = self.compressor.get_or_insert_default().compress(pages);
        let took = processor_time().saturating_sub(before);
        let sizes = (pages.len(), block.map(<[u8]>::len));
        lock(policy).tried(began.elapsed(), treatment, sizes, took);
        match treatment {
            // The link keeps it until it is acknowledged: in a piece of memory of just its size.
            Treatment::Compress => block.map(Bytes::copy_from_slice),
            Treatment::Probe | Treatment::Raw => None,
        }
    }

    /// The lane has handed so many bytes of pages to the link.
    pub fn sent(
        &mut self,
        policy: &Mutex<Compression>,
        began: Instant,
        bytes: usize,
        steady: impl FnOnce() -> bool,
    ) {
        let now = Instant::now();
        lock(policy).sent(now.saturating_duration_since(began), bytes);
        let Some((since, used)) = self.stretch else {
            self.stretch = Some((now, self.used()));
            return;
        };
        let pushing = now.saturating_duration_since(since);
        if pushing < STRETCH {
            return;
        }
        let used_now = self.used();
        let waited = pushing.saturating_sub(used_now.saturating_sub(used));
        lock(policy).stretch(now.saturating_duration_since(began), pushing, waited, steady());
        self.stretch = Some((now, used_now));
    }

    /// The lane has nothing to push.
    pub fn idle(&mut self, policy: &Mutex<Compression>) {
        if self.stretch.take().is_some() {
            lock(policy).idle();
        }
    }

    /// What the thread has used so far: a processor, or time in the queue for one. Whatever
    /// else passed it waited for the link.
    fn used(&self) -> Duration {
        processor_time() + self.queued().unwrap_or_default()
    }

    /// How long the thread has waited for a processor: the second number there, in nanoseconds.
    fn queued(&self) -> Option<Duration> {
        let mut text = [0; 64];
        let length = self.schedstat.as_ref()?.read_at(&mut text, 0).ok()?;
        let text = str::from_utf8(&text[..length]).ok()?;
        let queued_ns = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
        Some(Duration::from_nanos(queued_ns))
    }
}

/// The processor time of the calling thread.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::compression::CompressMode;
    use crate::proto::compression::codec::Decompressor;

    #[test]
    fn pages_are_compressed_as_the_policy_says_and_what_it_took_is_told() {
        let began = Instant::now();
        let pages: Vec<u8> = (0..16 * 4096u32).map(|at| (at / 64) as u8).collect();
        let mut shrinker = Shrinker::new();
        let never = Mutex::new(Compression::new(CompressMode::Never));
        assert_eq!(shrinker.shrink(&never, began, &pages), None);
        assert!(shrinker.compressor.is_none(), "no memory is taken for it");
        let always = Mutex::new(Compression::new(CompressMode::Always));
        let block = shrinker.shrink(&always, began, &pages).expect("it becomes smaller");
        let mut decompressor = Decompressor::new();
        assert_eq!(decompressor.decompress([&block[..]], pages.len()).unwrap(), pages);
        let always = always.into_inner().unwrap();
        let figures = always.figures().unwrap();
        assert_eq!((figures.frames, figures.page_bytes), (1, pages.len() as u64));
        assert_eq!(figures.sent_bytes, block.len() as u64);
        assert!(!figures.took.is_zero());
    }

    #[test]
    fn a_thread_that_works_uses_its_time_and_one_that_sleeps_does_not() {
        let shrinker = Shrinker::new();
        if shrinker.queued().is_none() {
            return println!("SKIPPED: this kernel does not tell how long a thread is queued");
        }
        let (began, used) = (Instant::now(), shrinker.used());
        std::thread::sleep(Duration::from_millis(100));
        let asleep = shrinker.used().saturating_sub(used);
        // However busy the machine is: what it was queued for is counted, what it slept is not.
        assert!(asleep + Duration::from_millis(90) < began.elapsed(), "{asleep:?}");
        let (began, used) = (Instant::now(), shrinker.used());
        let mut at = 0u64;
        while processor_time() < used + Duration::from_millis(100) && began.elapsed().as_secs() < 20
        {
            at = std::hint::black_box(at + 1);
        }
        assert!(shrinker.used().saturating_sub(used) > Duration::from_millis(50), "{at}");
    }
}
