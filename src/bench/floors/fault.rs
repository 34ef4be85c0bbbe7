//! The floors of a fault: a thread touches a missing page, another one answers.

use super::trapped::Trapped;
use super::{Measured, PAGES};
use crate::proto::page::{PAGE_SIZE, PageRun};
use crate::report::latency::Latencies;
use crate::uffd::TrapEvent;
use anyhow::{Context, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What every byte of a page is.
const CONTENT: u8 = 7;
/// Nothing here waits longer for a peer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How often the answering thread looks whether it is over.
const LOOK_EVERY_MS: u8 = 5;

/// Faults whose page is at hand.
pub fn local(time: Duration) -> anyhow::Result<Measured> {
    faults(time, |_, _| Ok(()))
}

/// Faults whose page is asked for over TCP.
pub fn over_tcp(time: Duration) -> anyhow::Result<Measured> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut peer = TcpStream::connect(listener.local_addr()?)?;
    peer.set_nodelay(true)?;
    peer.set_read_timeout(Some(ANSWER_TIME))?;
    let (mut asked, _) = listener.accept()?;
    asked.set_nodelay(true)?;
    std::thread::scope(|scope| {
        // It ends when the connection does.
        let server = scope.spawn(move || serve(&mut asked));
        let measured = faults(time, |page, content| {
            peer.write_all(&page.to_le_bytes())?;
            peer.read_exact(content)
        });
        drop(peer);
        let served = server.join().map_err(|_| anyhow::anyhow!("the peer panicked"))?;
        let measured = measured?;
        served.context("the peer that has the pages")?;
        Ok(measured)
    })
}

/// Answers each 8 bytes with a page, until there are no more.
fn serve(stream: &mut TcpStream) -> std::io::Result<()> {
    let page = [CONTENT; PAGE_SIZE];
    let mut request = [0; 8];
    loop {
        match stream.read_exact(&mut request) {
            Ok(()) => stream.write_all(&page)?,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Touches missing pages one after another for `time`; `fetch` gets what is to be placed.
fn faults(
    time: Duration,
    mut fetch: impl FnMut(u64, &mut [u8]) -> std::io::Result<()> + Send,
) -> anyhow::Result<Measured> {
    let mut times = Latencies::new();
    let began = Instant::now();
    while began.elapsed() < time {
        let memory = Trapped::new(PAGES)?;
        let over = AtomicBool::new(false);
        let (fetch, memory, over) = (&mut fetch, &memory, &over);
        let (touched, answered) = std::thread::scope(|scope| {
            let answering = scope.spawn(move || {
                let answered = answer(memory, fetch, over);
                // Whoever still waits for a page gets zeros, and sees that it is none.
                memory.placer.unregister()?;
                answered
            });
            let mut touched = Ok(());
            for page in 0..PAGES {
                let before = Instant::now();
                let read = memory.touch(page);
                times.record(before.elapsed());
                if read != CONTENT {
                    touched = Err(anyhow::anyhow!("page {page} came without its content"));
                    break;
                }
                if began.elapsed() >= time {
                    break;
                }
            }
            over.store(true, Ordering::Release);
            (touched, answering.join())
        });
        // The answering thread knows better why a page has no content.
        answered.map_err(|_| anyhow::anyhow!("the answering thread panicked"))??;
        touched?;
    }
    Measured::of_times(&times)
}

/// Answers faults until it is over.
fn answer(
    memory: &Trapped,
    fetch: &mut impl FnMut(u64, &mut [u8]) -> std::io::Result<()>,
    over: &AtomicBool,
) -> anyhow::Result<()> {
    let mut content = [CONTENT; PAGE_SIZE];
    let mut events = Vec::new();
    while !over.load(Ordering::Acquire) {
        let mut ready = [PollFd::new(memory.trap.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::from(LOOK_EVERY_MS)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        memory.trap.read(&mut events)?;
        for event in events.drain(..) {
            if let TrapEvent::Fault { page, .. } = event {
                fetch(page.get(), &mut content).context("a page from the peer")?;
                let placed = memory.placer.place(PageRun::single(page), &content)?;
                ensure!(placed.is_complete(), "{page} was there already");
            }
        }
    }
    Ok(())
}
