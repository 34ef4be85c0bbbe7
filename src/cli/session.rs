//! `postcopy session`: look at a running migration, and decide what it cannot.

use anyhow::{Context, anyhow, bail};
use clap::{Args, Subcommand};
use postcopy::engine::operator::{self, Answer, Request, SessionStatus};
use postcopy::fault_server::keeper::Occupied;
use postcopy::fault_server::take_back::TakeBackError;
use postcopy::fault_server::{FaultServer, FaultServerError};
use postcopy::operator::client::{AskError, ask};
use postcopy::operator::socket_path;
use postcopy::program::exit::Failure;
use postcopy::program::output;
use postcopy::program::signals::on_interrupt;
use postcopy::program::units::{parse_rate, parse_time};
use postcopy::proto::operator::Risk;
use postcopy::proto::source::Outcome;
use postcopy::transport::ticket::TICKET_BYTES_MAX;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Inspects a running or paused migration, gives it a new address, gives it up, or takes its
/// guest back.
///
/// `--control` names the session at the source by the guest's control socket (its fault server
/// is asked, at the same path with `.operator` behind it), `--operator` one at either side by
/// its operator socket. `status` says which commands are possible, and what follows from each.
#[derive(Debug, Args)]
pub struct Session {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say how the session is, and what can be done.
    Status(Status),
    /// Pause the guest and have it move now, whatever of its memory has been copied.
    ///
    /// At the source, while memory is copied and the guest runs. What was not copied follows it.
    Switch(Plain),
    /// Send no page that no vCPU waits for, until go-on.
    Hold(Plain),
    /// Go on sending pages after a hold.
    GoOn(Plain),
    /// Change limits; those that are not named stay as they are.
    Limit(Limit),
    /// Look for the destination at another address, at once.
    ///
    /// At the source, after the commit. The destination is the same one, with the same key: only
    /// the way to it has changed.
    Redirect(Redirect),
    /// End the session.
    ///
    /// Before the commit the guest runs on at the source. After it the guest is lost, unless the
    /// commit is in doubt and the source's operator takes it back; what follows is said first,
    /// and done with --yes-lose-the-guest.
    GiveUp(GiveUp),
    /// Run the guest at the source although it was committed to the destination.
    ///
    /// Possible while the commit is in doubt: the source has committed and lost the link before
    /// it heard that the guest runs. The guest runs on from where it was paused, if its VMM is
    /// alive. IF IT RUNS AT THE DESTINATION AFTER ALL, THERE ARE TWO OF IT, with one address and
    /// one disk. Nothing here can find out: make sure that the destination's host is down or cut
    /// off for good, or that the session was given up there, and say so by
    /// --yes-it-runs-nowhere-else. A destination that comes back is told to drop the guest.
    ///
    /// With --control it also works when the fault server is dead.
    TakeBack(TakeBack),
}

/// Which session.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct At {
    /// The guest's control socket, at the source.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// The session's operator socket, at either side.
    #[arg(long, value_name = "PATH")]
    operator: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Status {
    #[command(flatten)]
    at: At,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Plain {
    #[command(flatten)]
    at: At,
}

#[derive(Debug, Args)]
struct Limit {
    #[command(flatten)]
    at: At,
    #[command(flatten)]
    limits: Limits,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
struct Limits {
    /// Of pages that no vCPU waits for, for instance 1Gbit, or none.
    #[arg(long, value_parser = parse_limit, value_name = "RATE")]
    max_bandwidth: Option<u64>,
    /// The same once the guest has left; none: that of before.
    #[arg(long, value_parser = parse_limit, value_name = "RATE")]
    max_postcopy_bandwidth: Option<u64>,
    /// How long the guest may stand still where that is to be chosen.
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    max_downtime: Option<Duration>,
    /// How long all of it may take as far as that is to be chosen; 0s: as long as it takes.
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    max_total: Option<Duration>,
}

#[derive(Debug, Args)]
struct Redirect {
    #[command(flatten)]
    at: At,
    /// HOST, or HOST:PORT,PORT[,PORT...] (the first port is for faults, the others for the push
    /// lanes), or a whole ticket of the same destination. `-` reads it from standard input, so
    /// that other users of this host do not see a ticket.
    #[arg(long, value_name = "ADDRESS")]
    to: String,
}

#[derive(Debug, Args)]
struct GiveUp {
    #[command(flatten)]
    at: At,
    /// I know that the guest may be lost for good.
    #[arg(long)]
    yes_lose_the_guest: bool,
}

#[derive(Debug, Args)]
struct TakeBack {
    #[command(flatten)]
    at: At,
    /// I have made sure that the guest does not run at the destination and never will. If that is
    /// wrong, there will be two running guests.
    #[arg(long)]
    yes_it_runs_nowhere_else: bool,
}

impl At {
    fn path(&self) -> PathBuf {
        match (&self.control, &self.operator) {
            (Some(control), _) => socket_path(control),
            (None, Some(operator)) => operator.clone(),
            (None, None) => PathBuf::new(),
        }
    }

    fn done(&self, request: &Request) -> anyhow::Result<String> {
        match ask(&self.path(), request)? {
            Answer::Done { text } => Ok(text),
            Answer::Refused(refusal) => Err(refusal.into()),
            Answer::Status(_) => bail!("the session answered something else"),
        }
    }
}

impl Session {
    /// Asks.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Status(status) => status.run(),
            Command::Switch(plain) => plain.run(&Request::Switch),
            Command::Hold(plain) => plain.run(&Request::Hold),
            Command::GoOn(plain) => plain.run(&Request::GoOn),
            Command::Limit(limit) => limit.run(),
            Command::Redirect(redirect) => redirect.run(),
            Command::GiveUp(give_up) => {
                let acknowledged = give_up.yes_lose_the_guest.then_some(Risk::LoseTheGuest);
                let done = give_up.at.done(&Request::GiveUp { acknowledged });
                output::out(&format!("given up: {}", done.context("not given up")?));
                Ok(())
            }
            Command::TakeBack(take_back) => take_back.run(),
        }
    }
}

impl Status {
    fn run(self) -> anyhow::Result<()> {
        let status = match ask(&self.at.path(), &Request::Status)? {
            Answer::Status(status) => status,
            Answer::Refused(refusal) => return Err(refusal.into()),
            Answer::Done { .. } => bail!("the session answered something else"),
        };
        let text = match self.json {
            true => serde_json::to_string_pretty(&status)? + "\n",
            false => for_people(&status),
        };
        // Nothing waits for this process: it waits for its reader.
        std::io::stdout().write_all(text.as_bytes()).context("cannot print the status")
    }
}

/// A rate in bits a second; 0 is none.
fn parse_limit(text: &str) -> Result<u64, String> {
    if text == "none" { Ok(0) } else { parse_rate(text) }
}

impl Plain {
    fn run(&self, request: &Request) -> anyhow::Result<()> {
        output::out(&self.at.done(request).context("not done")?);
        Ok(())
    }
}

impl Limit {
    fn run(&self) -> anyhow::Result<()> {
        let Limits { max_bandwidth, max_postcopy_bandwidth, max_downtime, max_total } = self.limits;
        let micros = |time: Duration| time.as_micros() as u64;
        let request = Request::Limit(operator::Limits {
            max_bandwidth,
            max_postcopy_bandwidth,
            max_downtime_us: max_downtime.map(micros),
            max_total_us: max_total.map(micros),
        });
        output::out(&self.at.done(&request).context("not done")?);
        Ok(())
    }
}

impl Redirect {
    fn run(self) -> anyhow::Result<()> {
        let mut to = self.to;
        if to == "-" {
            to.clear();
            let limit = 2 * TICKET_BYTES_MAX as u64;
            let read = std::io::stdin().take(limit).read_to_string(&mut to);
            read.context("cannot read the address")?;
        }
        // Broken over lines by a terminal or a mail program, as tickets are.
        let to: String = to.split_whitespace().collect();
        output::out(&self.at.done(&Request::Redirect { to }).context("not redirected")?);
        Ok(())
    }
}

/// How often a fault server that is there, and not yet at its operator socket, is tried.
const TRIES: u32 = 25;
/// How long in between.
const AGAIN: Duration = Duration::from_millis(200);

/// Whether it is refused because a fault server goes on with the session.
fn at_work(error: &anyhow::Error) -> bool {
    let busy = |cause: &TakeBackError| {
        use FaultServerError::Kept;
        matches!(cause, TakeBackError::FaultServer(Kept { state: Occupied::Busy, .. }))
    };
    error.chain().any(|cause| cause.downcast_ref().is_some_and(busy))
}

impl TakeBack {
    fn run(self) -> anyhow::Result<()> {
        self.ask(TRIES)
    }

    fn ask(&self, again: u32) -> anyhow::Result<()> {
        let acknowledged = self.yes_it_runs_nowhere_else.then_some(Risk::TwoRunningGuests);
        let asked = ask(&self.at.path(), &Request::TakeBack { acknowledged });
        match (asked, &self.at.control) {
            (Ok(Answer::Done { text }), _) => output::out(&format!("taken back: {text}")),
            (Ok(Answer::Refused(refusal)), _) => {
                return Err(anyhow::Error::from(refusal).context("not taken back"));
            }
            (Err(AskError::Connect { .. }), Some(control)) => {
                return match alone(control, acknowledged) {
                    // Its keeper has just started another fault server in the dead one's place.
                    Err(error) if at_work(&error) && again > 0 => {
                        std::thread::sleep(AGAIN);
                        self.ask(again - 1)
                    }
                    done => done,
                };
            }
            (Ok(Answer::Status(_)), _) => bail!("the session answered something else"),
            (Err(error), _) => return Err(error.into()),
        }
        Ok(())
    }
}

/// Takes a guest back whose fault server is gone.
fn alone(control: &Path, acknowledged: Option<Risk>) -> anyhow::Result<()> {
    let session = FaultServer::take_back(control, acknowledged).context("not taken back")?;
    output::out("taken back: the guest runs on in its VMM");
    let Some(session) = session else {
        output::out(
            "nobody tells the destination: it has no keeper any more that knows where it is",
        );
        return Ok(());
    };
    output::out("looking for the destination, to tell it; an interrupt ends that");
    let canceller = session.canceller();
    let stop = move || canceller.cancel("interrupted by the user");
    on_interrupt("postcopy", stop, session.deserter());
    let (end, last) = session.run(|_| {})?;
    let _holds_on = last.say();
    match (end.outcome, end.stranded) {
        (Outcome::Aborted(why), Some(stranded)) => Err(Failure::Stranded { why, stranded }.into()),
        (Outcome::Aborted(why), None) => {
            output::out(&format!("over: {why}"));
            Ok(())
        }
        (other, _) => Err(anyhow!("the session ended otherwise: {other:?}")),
    }
}

/// The status as a few lines.
fn for_people(status: &SessionStatus) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<10} {value}");
    };
    let session = status.session.as_deref().unwrap_or("not begun");
    line("Side", format!("{}, session {session}", status.side));
    line("Phase", format!("{} ({})", status.phase, status.state));
    line("Guest", status.guest_words.clone());
    line("Link", link(status));
    if let Some(peer) = &status.peer {
        line("Peer", peer.clone());
    }
    let (settled, total) = (status.pages_settled, status.pages_total);
    if let Some(bps) = status.max_bandwidth_bps {
        line(
            "Limit",
            format!("{:.3} Gbit/s, but for pages that a vCPU waits for", bps as f64 / 1e9),
        );
    }
    if status.held {
        line("Held", "no page is sent that no vCPU waits for".into());
    }
    line("Pages", format!("{settled} of {total}, {} network faults", status.network_faults));
    for of in &status.commands {
        let can = match (of.possible, of.risk) {
            (false, _) => "not now".to_owned(),
            (true, None) => "possible".to_owned(),
            (true, Some(risk)) => format!("with {}", risk.flag()),
        };
        line(of.command.name(), format!("{can}: {}", of.text));
    }
    text
}

fn link(status: &SessionStatus) -> String {
    let seconds = |micros: u64| format!("{:.1} s", Duration::from_micros(micros).as_secs_f64());
    if status.linked {
        return format!("up, epoch {}", status.epoch);
    }
    let mut text = match status.paused_us {
        Some(paused) => format!("lost {} ago, epoch {}", seconds(paused), status.epoch),
        None => "none yet".to_owned(),
    };
    if let Some(why) = &status.why_paused {
        let _ = write!(text, ": {why}");
    }
    if let Some(why) =
        status.last_attempt.as_ref().filter(|last| Some(*last) != status.why_paused.as_ref())
    {
        let _ = write!(text, "; last attempt: {why}");
    }
    match status.next_attempt_us {
        Some(0) => text.push_str("; an attempt is under way"),
        Some(next) => drop(write!(text, "; next attempt in {}", seconds(next))),
        None => {}
    }
    if let Some(left) = status.patience_left_us {
        let _ = write!(text, "; gives up in {}", seconds(left));
    }
    text
}
