//! Several guests over one link: who gets which part of it, and how long their faults wait.
//!
//! ```text
//! cargo bench --bench sharing -- --guests 1,2,3 --link 200Mbit:1ms,1Gbit:1ms --runs 5
//! ```
//!
//! All lanes of all guests go through one relay, so they share one bottleneck. Each guest is
//! moved within this process, by threads of its own; its only vCPU reads pages in no order, a
//! millisecond apart. What is compared are the pages that came while all guests were on their
//! way: from when the last one's began to run at the destination until the first one had all of
//! its memory. After each migration all memory is compared.

#[path = "../scale/guest.rs"]
mod guest;
#[path = "../scale/shape.rs"]
mod shape;

use anyhow::{Context, anyhow, ensure};
use clap::Parser;
use guest::{Still, Touching};
use postcopy::engine::destination::Receiver;
use postcopy::engine::event::{Event, Phase};
use postcopy::program::units::parse_time;
use postcopy::transport::relay::{self, Relay, RelayConfig};
use postcopy::trial::LinkShape;
use postcopy::uffd::open::{UffdOptions, open};
use postcopy::{DestinationBuilder, Outcome, SourceBuilder, Ticket};
use shape::Shape;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Between two touches of a guest's only vCPU.
const THINK: Duration = Duration::from_millis(1);
/// In which all guests are filled.
const PREPARED: Duration = Duration::from_secs(1);
/// Ports of a guest: an urgent lane and a push lane.
const LANES: usize = 2;
/// The most guests that one relay has ports for.
const GUESTS_MAX: u64 = (relay::PORTS_MAX / LANES) as u64;

/// Migrations of several guests at once.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many guests.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3",
          value_parser = clap::value_parser!(u64).range(1..=GUESTS_MAX))]
    guests: Vec<u64>,
    /// The memory of each.
    #[arg(long, default_value = "128MiB")]
    memory: Shape,
    /// The links.
    #[arg(long, value_delimiter = ',', default_value = "200Mbit:1ms,1Gbit:1ms")]
    link: Vec<LinkShape>,
    /// How long after one guest's migration the next one's begins.
    #[arg(long, value_delimiter = ',', default_value = "0s,300ms", value_parser = parse_time)]
    apart: Vec<Duration>,
    /// Runs of each.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only see that it works: one run of two small ones.
    #[arg(long)]
    test: bool,
    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
    /// Cargo passes on the names of the benches that are wanted.
    #[arg(hide = true)]
    filter: Option<String>,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.filter.as_ref().is_some_and(|filter| !"sharing".contains(filter.as_str())) {
        return ExitCode::SUCCESS;
    }
    if arguments.test {
        (arguments.runs, arguments.guests) = (1, vec![2]);
        arguments.memory = "8MiB".parse().expect("a shape");
        arguments.link = vec!["200Mbit:1ms".parse().expect("a link")];
        arguments.apart = vec![Duration::ZERO];
    }
    match measure(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sharing: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    if let Err(error) =
        open(UffdOptions::for_process(), postcopy::DestinationBacking::MemfdContinue)
    {
        println!("SKIPPED: no guest can be taken in here: {error}");
        return Ok(());
    }
    for link in &arguments.link {
        for &guests in &arguments.guests {
            // One guest is the same however far apart they are.
            let apart = if guests == 1 { &arguments.apart[..1] } else { &arguments.apart };
            for apart in apart {
                let name =
                    format!("{link}, {guests} guests of {}, {apart:?} apart", arguments.memory);
                let mut runs = Vec::new();
                for _ in 0..arguments.runs {
                    let run = together(arguments.memory, guests, *link, *apart)
                        .with_context(|| name.clone())?;
                    println!("  {name}: {run}");
                    runs.push(run);
                }
                println!("{name}: {}", Summary(&runs));
            }
        }
    }
    Ok(())
}

/// When how many pages were there.
type Arrivals = Arc<Mutex<Vec<(Instant, u64)>>>;

/// What is found out about a guest.
struct Moved {
    arrivals: Vec<(Instant, u64)>,
    faults: u64,
    fault_p50: Duration,
    fault_p99: Duration,
}

/// What is found out about guests that were moved at the same time.
struct Run {
    /// Pages of each guest in the time in which all were on their way.
    pages: Vec<f64>,
    /// That time.
    time: Duration,
    guests: Vec<Moved>,
}

impl Run {
    /// 1 if all got the same, 1/n if one got everything.
    fn jain(&self) -> f64 {
        let sum: f64 = self.pages.iter().sum();
        let squares: f64 = self.pages.iter().map(|pages| pages * pages).sum();
        sum * sum / (self.pages.len() as f64 * squares)
    }

    fn worst(&self, of: fn(&Moved) -> Duration) -> f64 {
        self.guests.iter().map(of).max().unwrap_or_default().as_secs_f64() * 1e3
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sum: f64 = self.pages.iter().sum();
        let shares: Vec<String> =
            self.pages.iter().map(|pages| format!("{:.2}", pages / sum)).collect();
        write!(f, "{} of {sum:.0} pages in {:.2?}, ", shares.join(" "), self.time)?;
        write!(f, "Jain's index {:.3}; ", self.jain())?;
        for guest in &self.guests {
            let (p50, p99) = (guest.fault_p50, guest.fault_p99);
            write!(f, "{} faults, {p50:.2?}, 99 % {p99:.2?}; ", guest.faults)?;
        }
        Ok(())
    }
}

/// Medians of runs, least and most.
struct Summary<'a>(&'a [Run]);

impl std::fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut spread = |name: &str, of: &dyn Fn(&Run) -> f64| {
            let mut all: Vec<f64> = self.0.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            let (least, median, most) = (all[0], all[all.len() / 2], all[all.len() - 1]);
            write!(f, "{name} {median:.2} ({least:.2} to {most:.2}); ")
        };
        spread("Jain's index", &Run::jain)?;
        spread("pages a second", &|run| run.pages.iter().sum::<f64>() / run.time.as_secs_f64())?;
        spread("worst guest's fault, ms", &|run| run.worst(|guest| guest.fault_p50))?;
        spread("99 %, ms", &|run| run.worst(|guest| guest.fault_p99))
    }
}

/// Moves guests through one bottleneck.
fn together(shape: Shape, guests: u64, link: LinkShape, apart: Duration) -> anyhow::Result<Run> {
    let (mut receivers, mut tickets, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..guests {
        let arrivals = Arrivals::default();
        let into = arrivals.clone();
        let on_event = move |event| {
            if let Event::Progress(progress) = event
                && progress.phase == Phase::TargetBrownout
            {
                let mut into = into.lock().unwrap_or_else(PoisonError::into_inner);
                into.push((Instant::now(), progress.settled));
            }
        };
        let builder = DestinationBuilder::new().is_kvm(|_| false).on_event(on_event);
        let receiver = builder.build()?;
        targets.extend(relay::targets(Ipv4Addr::LOCALHOST.into(), receiver.ticket()));
        tickets.push(receiver.ticket().clone());
        receivers.push((receiver, arrivals));
    }
    let config = RelayConfig {
        bandwidth_bps: link.bandwidth_bps,
        rtt: link.rtt.unwrap_or_default(),
        loss: link.loss.unwrap_or_default(),
        ..RelayConfig::default()
    };
    let relay = Relay::spawn(config, &targets)?;
    let begin = Instant::now() + PREPARED;
    let moved = thread::scope(|scope| {
        let ports = relay.local().chunks(LANES);
        let moving: Vec<_> = (0u32..)
            .zip(receivers.into_iter().zip(tickets).zip(ports))
            .map(|(index, ((receiver, ticket), ports))| {
                let host = ports[0].ip().into();
                let push = ports[1..].iter().map(|port| port.port()).collect();
                let ticket = ticket.with_address(host, ports[0].port(), push);
                let taken = scope.spawn(move || take(shape, receiver));
                scope.spawn(move || {
                    send(shape, ticket?, begin + index * apart)?;
                    taken.join().map_err(|_| anyhow!("a destination panicked"))?
                })
            })
            .collect();
        moving
            .into_iter()
            .map(|moving| moving.join().map_err(|_| anyhow!("a source panicked"))?)
            .collect::<anyhow::Result<Vec<_>>>()
    })?;
    compare(moved)
}

/// Sends a guest at this time.
fn send(shape: Shape, ticket: Ticket, at: Instant) -> anyhow::Result<()> {
    let memory = shape.memory()?;
    shape.fill(&memory)?;
    // SAFETY: nothing writes to the memory any more.
    let builder = unsafe { SourceBuilder::new(memory, ticket) };
    let migration = builder.machine("sharing").guest(shape.to_string()).build()?;
    thread::sleep(at.saturating_duration_since(Instant::now()));
    let end = migration.run(Box::new(Still))?;
    ensure!(end.outcome == Outcome::Completed, "{:?}", end.outcome);
    Ok(())
}

/// Takes a guest in, lets it run until all of its memory is there, and compares that.
fn take(shape: Shape, (receiver, arrivals): (Receiver, Arrivals)) -> anyhow::Result<Moved> {
    let vm = Touching::new(shape, THINK);
    let (over, wrong) = (vm.over.clone(), vm.wrong.clone());
    let end = receiver.run(Box::new(vm));
    over.store(true, Ordering::Relaxed);
    let end = end?;
    ensure!(end.outcome == Outcome::Completed, "{:?}", end.outcome);
    ensure!(wrong.load(Ordering::Relaxed) == 0, "the guest read what it had not written");
    shape.check(&*end.ram.context("a guest without memory")?)?;
    let faults = end.report.fault_latency_ns.context("a report without faults")?;
    let nanos = |of: Option<u64>| Duration::from_nanos(of.unwrap_or_default());
    let arrivals = std::mem::take(&mut *arrivals.lock().unwrap_or_else(PoisonError::into_inner));
    ensure!(arrivals.len() > 1, "it was over before it could be watched: take more memory");
    let (fault_p50, fault_p99) = (nanos(faults.p50), nanos(faults.p99));
    Ok(Moved { arrivals, faults: faults.count, fault_p50, fault_p99 })
}

fn compare(guests: Vec<Moved>) -> anyhow::Result<Run> {
    let first = |guest: &Moved| guest.arrivals[0].0;
    let last = |guest: &Moved| guest.arrivals[guest.arrivals.len() - 1].0;
    let begin = guests.iter().map(first).max().context("no guests")?;
    let end = guests.iter().map(last).min().context("no guests")?;
    let time = end.saturating_duration_since(begin);
    ensure!(time > Duration::ZERO, "they were not moved at the same time: take more memory");
    let pages = guests.iter().map(|guest| at(guest, end) - at(guest, begin)).collect();
    Ok(Run { pages, time, guests })
}

/// How many pages a guest had at a time between two at which it was looked at.
fn at(guest: &Moved, time: Instant) -> f64 {
    let next = guest.arrivals.partition_point(|(at, _)| *at < time);
    let next = next.clamp(1, guest.arrivals.len() - 1);
    let [(before, had), (after, has)] = [guest.arrivals[next - 1], guest.arrivals[next]];
    let part = time.saturating_duration_since(before).as_secs_f64();
    let whole = after.saturating_duration_since(before).as_secs_f64().max(1e-9);
    had as f64 + (has - had) as f64 * (part / whole).min(1.0)
}
