//! The command line of a fault server, and its run from arguments to exit.

use super::display::Display;
use super::keeper::{self, KeeperCommand, RestartCommand};
use super::{FaultServer, HeldBy, Holder, PushPlan};
use crate::engine::event::Event;
use crate::program::exit::{Failure, Side, both, write_report};
use crate::program::signals::{complain, on_interrupt};
use crate::program::units::{parse_rate, parse_time};
use crate::proto::compression::CompressMode;
use crate::proto::prepaging::PolicyKind;
use crate::proto::source::Outcome;
use crate::proto::switchover::{Mode, SwitchoverConfig};
use crate::report::schema::Report;
use crate::transport::Ticket;
use crate::transport::ticket::TICKET_BYTES_MAX;
use anyhow::Context;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use std::ffi::OsString;
use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// Which guest goes where, and how.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The guest's control socket.
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
    /// The line that `postcopy receive` printed; `-` reads it from standard input, so
    /// that other users of this host do not see it.
    #[arg(long, value_name = "TICKET", required_unless_present_any = ["resume", "discard"])]
    ticket: Option<String>,
    /// Go on with the session of a fault server that has died: all that it knew is in its
    /// keeper; or, if that died, too, in a VMM that still holds the guest. If the guest was
    /// committed, the destination gets the memory that it misses, and must hear of it before
    /// its own patience is over; if not, it is told that the guest stayed in its VMM. Needed
    /// only if the keeper does not do it: after --no-supervise, after a session that was lost,
    /// or if fault servers have died 10 times within a minute.
    #[arg(long, conflicts_with_all = ["ticket", "policy", "pivots", "drain_after", "compress",
                                      "no_keeper", "patience", "mode", "rounds", "max_downtime",
                                      "max_bandwidth", "max_postcopy_bandwidth"])]
    resume: bool,
    /// The keeper that has started this process is at the other end of standard input.
    #[arg(long, hide = true, requires = "resume", conflicts_with = "report")]
    restarted: bool,
    /// Have the keeper of a guest that is lost end, and free the memory that it holds:
    /// nobody can go on with the session then.
    #[arg(long, conflicts_with_all = ["ticket", "resume", "policy", "pivots", "drain_after",
                                      "compress", "no_keeper", "no_supervise", "report", "patience", "mode",
                                      "rounds", "max_downtime", "max_bandwidth",
                                      "max_postcopy_bandwidth"])]
    discard: bool,
    /// Start no keeper, the process that holds the guest's memory for `--resume`. If this
    /// process dies before the destination has all memory, the guest is lost, even though
    /// its VMM may have ended well.
    #[arg(long)]
    no_keeper: bool,
    /// Have the service manager that has started this program hold the memory, the commit word
    /// and the session's record in its descriptor store (systemd: FileDescriptorStoreMax=),
    /// instead of a keeper. Started again by the manager, with what is in the store, this same
    /// command line goes on with the session; else it begins one.
    #[arg(long, conflicts_with_all = ["no_keeper", "no_supervise", "resume", "discard"])]
    descriptor_store: bool,
    /// If this process dies in the middle of a session, have its keeper only hold the memory
    /// for --resume, and not start another fault server that goes on at once, with the same
    /// standard output and error.
    #[arg(long)]
    no_supervise: bool,
    /// How long to try to connect again if the link is lost after the guest was committed.
    /// Then it is given up for lost; until then nothing is. Give the destination the same.
    /// [default: 10m]
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    patience: Option<Duration>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    switchover: SwitchoverArgs,
    /// Write the report as JSON. A fault server that goes on with the session does it, too.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// How pages are pushed.
#[derive(Clone, Debug, Args)]
pub struct PolicyArgs {
    /// Which pages are pushed before they are asked for: none (demand-only), upward
    /// from the last fault (linear), or around the last faults (bubbling).
    #[arg(long, default_value_t, value_parser = policy_names(), value_name = "POLICY")]
    pub policy: PolicyKind,
    /// Pivots of the bubbling policy.
    #[arg(long, value_name = "K")]
    pub pivots: Option<usize>,
    /// Push all that is left after the guest ran for so long at the destination;
    /// without it the demand-only policy waits for the end of the workload.
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    pub drain_after: Option<Duration>,
    /// Compress pushed pages: while it saves time, as measured (auto), all that become smaller
    /// (always), or none (never). A destination that cannot decompress takes the guest only
    /// with never.
    #[arg(long, default_value_t, value_parser = compress_modes(), value_name = "MODE")]
    pub compress: CompressMode,
}

fn compress_modes() -> impl TypedValueParser<Value = CompressMode> {
    PossibleValuesParser::new(CompressMode::ALL.map(CompressMode::name))
        .try_map(|name| name.parse::<CompressMode>())
}

/// How much is copied before the guest moves.
#[derive(Clone, Debug, Args)]
pub struct SwitchoverArgs {
    /// When memory moves: all after the guest (post-copy), in rounds before it (pre-copy), some
    /// rounds before it and the rest after it (hybrid), all while it stands still
    /// (stop-and-copy), or as it costs the guest least by what is measured (auto). All but
    /// post-copy need a destination whose memory is memfd-continue.
    #[arg(long, default_value_t, value_parser = mode_names(), value_name = "MODE")]
    pub mode: Mode,
    /// Rounds of the hybrid mode.
    #[arg(long, default_value_t = SwitchoverConfig::default().rounds, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(SwitchoverConfig::ROUNDS_MAX)))]
    pub rounds: u32,
    /// How long the guest may stand still where that can be chosen, in pre-copy and auto.
    #[arg(long, default_value = "300ms", value_parser = parse_time, value_name = "TIME")]
    pub max_downtime: Duration,
    /// How long the migration may take from its first page to its last, as far as that can be chosen:
    /// no more rounds then, and the rest follows the guest; pre-copy is given up instead.
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    pub max_total: Option<Duration>,
    /// How fast pages that no vCPU waits for are sent at most, for instance 1Gbit.
    #[arg(long, value_parser = parse_rate, value_name = "RATE")]
    pub max_bandwidth: Option<u64>,
    /// The same once the guest has left, if it is another limit then.
    #[arg(long, value_parser = parse_rate, value_name = "RATE")]
    pub max_postcopy_bandwidth: Option<u64>,
}

fn mode_names() -> impl TypedValueParser<Value = Mode> {
    PossibleValuesParser::new(Mode::ALL.map(Mode::name)).try_map(|name| name.parse::<Mode>())
}

impl SwitchoverArgs {
    fn config(&self) -> SwitchoverConfig {
        SwitchoverConfig {
            mode: self.mode,
            rounds: self.rounds,
            max_downtime: self.max_downtime,
            max_total: self.max_total,
            max_bandwidth: self.max_bandwidth,
            max_postcopy_bandwidth: self.max_postcopy_bandwidth,
        }
    }

    /// The same arguments for a child process.
    pub fn to_arguments(&self) -> Vec<String> {
        let downtime = humantime::format_duration(self.max_downtime).to_string();
        let (mode, rounds) = (self.mode.to_string(), self.rounds.to_string());
        let mut arguments: Vec<String> =
            ["--mode", &mode, "--rounds", &rounds, "--max-downtime", &downtime]
                .map(str::to_owned)
                .into();
        if let Some(total) = self.max_total {
            let total = humantime::format_duration(total).to_string();
            arguments.extend(["--max-total".to_owned(), total]);
        }
        for (name, limit) in [
            ("--max-bandwidth", self.max_bandwidth),
            ("--max-postcopy-bandwidth", self.max_postcopy_bandwidth),
        ] {
            let written = |bps| format!("{}kbit", bps as f64 / 1e3);
            arguments.extend(limit.into_iter().flat_map(|bps: u64| [name.into(), written(bps)]));
        }
        arguments
    }
}

fn policy_names() -> impl TypedValueParser<Value = PolicyKind> {
    PossibleValuesParser::new(PolicyKind::ALL.map(PolicyKind::name))
        .try_map(|name| name.parse::<PolicyKind>())
}

impl PolicyArgs {
    /// The same arguments for a child process.
    pub fn to_arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--policy".to_owned(), self.policy.to_string()];
        if let Some(pivots) = self.pivots {
            arguments.extend(["--pivots".to_owned(), pivots.to_string()]);
        }
        if let Some(after) = self.drain_after {
            let after = humantime::format_duration(after).to_string();
            arguments.extend(["--drain-after".to_owned(), after]);
        }
        arguments.extend(["--compress".to_owned(), self.compress.to_string()]);
        arguments
    }
}

impl ServeArgs {
    /// Attaches, migrates, and writes the report if one was asked for; an interrupt
    /// stops it before the commit. `watch` shows how it goes on, `show` the report, both on a
    /// thread of their own, for whose writing nobody waits. `again`
    /// are the arguments, beside these, with which this program does the same once more: it
    /// is started with them if it dies in the middle.
    ///
    /// # Errors
    /// A [`Failure`] if the migration did not complete or its report does not add up;
    /// others if it could not begin.
    pub fn run(
        &self,
        program: &'static str,
        again: Vec<OsString>,
        watch: impl FnMut(Event) + Send + 'static,
        show: impl FnOnce(&Report) + Send + 'static,
    ) -> anyhow::Result<()> {
        if self.discard {
            let path = keeper::socket_path(&self.control);
            return keeper::discard(&path).context("cannot discard a guest's memory");
        }
        let server = self.server(again)?;
        let ticket = server.ticket().clone();
        let canceller = server.canceller();
        let stop = move || canceller.cancel("interrupted by the user");
        on_interrupt(program, stop, server.deserter());
        let report = server.report().map(ToOwned::to_owned);
        let display = Display::start(watch, show).context("cannot show how it goes on")?;
        let (end, last_word) = server.run(display.watch())?;
        display.end(&end.report);
        let mut session = Failure::of(&end.outcome, Side::Source);
        if let (Outcome::Aborted(why), Some(stranded)) = (&end.outcome, end.stranded) {
            session = Err(Failure::Stranded { why: why.clone(), stranded });
        }
        if let Err(Failure::Aborted { why, .. }) = &mut session
            && ticket.looks_expired(SystemTime::now())
        {
            // The other host's clock decided; this one's helps to explain.
            why.push_str(" (by this host's clock the ticket has expired)");
        }
        if session.is_ok() && !end.report.has_destination_part() {
            complain(program, "the destination's part of the report did not come");
        }
        let wrong = end.report.check();
        if session.is_ok() && !wrong.is_empty() {
            session = Err(Failure::Wrong(wrong.join("; ")));
        }
        let reported = write_report(&end.report, report.as_deref());
        // All that was promised is done.
        let held = last_word.say();
        if let (Err(Failure::Lost(why)), Some(by)) = (&mut session, held) {
            why.push_str(&self.still_held(by));
        }
        display.finish();
        both(program, session.map_err(Into::into), reported)
    }
}

impl ServeArgs {
    /// What an operator can do about a guest that was lost.
    fn still_held(&self, by: HeldBy) -> String {
        match by {
            HeldBy::Keeper => format!(
                "; a keeper at {} still holds the memory here: --resume tries again, --discard \
                 frees it",
                keeper::socket_path(&self.control).display(),
            ),
            HeldBy::DescriptorStore => "; the service manager's descriptor store still holds the \
                                        memory here, if the unit has it preserved: starting \
                                        the unit tries again, systemctl clean --what=fdstore \
                                        frees it"
                .into(),
        }
    }

    fn server(&self, again: Vec<OsString>) -> anyhow::Result<FaultServer> {
        let keeper = self.keeper(again);
        let holder = match (self.descriptor_store, self.no_keeper) {
            (true, _) => Holder::DescriptorStore,
            (false, true) => Holder::Nobody,
            (false, false) => Holder::Keeper(&keeper),
        };
        let report = self.report.as_deref();
        let resuming = || {
            let at = self.control.display();
            format!("cannot resume a session of the guest at {at}")
        };
        if self.descriptor_store
            && let Some(server) =
                FaultServer::from_store(&self.control, report).with_context(resuming)?
        {
            return Ok(server);
        }
        let Some(ticket) = &self.ticket else {
            let server = if self.restarted {
                FaultServer::restarted(&self.control, holder)
            } else {
                FaultServer::resume(&self.control, report, holder)
            };
            return server.with_context(resuming);
        };
        let ticket = read_ticket(ticket)?;
        let plan = PushPlan {
            policy: self.policy.policy,
            pivots: self.policy.pivots,
            drain_after: self.policy.drain_after,
            compress: self.policy.compress,
            patience: self.patience,
            switchover: self.switchover.config(),
        };
        FaultServer::attach(&self.control, ticket, plan, report, holder)
            .with_context(|| format!("cannot attach to the guest at {}", self.control.display()))
    }

    /// A keeper, and what it starts.
    fn keeper(&self, mut again: Vec<OsString>) -> KeeperCommand {
        let control = keeper::at_any_directory(self.control.clone()).into_os_string();
        again.extend(["--control".into(), control, "--resume".into(), "--restarted".into()]);
        let restart = RestartCommand { program: "/proc/self/exe".into(), arguments: again };
        let restart = (!self.no_supervise).then_some(restart);
        KeeperCommand { restart, ..KeeperCommand::default() }
    }
}

fn read_ticket(text: &str) -> anyhow::Result<Ticket> {
    if text != "-" {
        return Ok(text.trim().parse()?);
    }
    // A ticket is a line; whatever pours in here has a limit.
    let limit = 4 * TICKET_BYTES_MAX as u64;
    let mut line = String::new();
    std::io::stdin().take(limit).read_to_string(&mut line).context("cannot read the ticket")?;
    Ok(line.trim().parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        policy: PolicyArgs,
        #[command(flatten)]
        switchover: SwitchoverArgs,
    }

    #[test]
    fn every_mode_can_be_named_and_passed_on() {
        for mode in Mode::ALL {
            let text = [
                "x",
                "--mode",
                mode.name(),
                "--rounds",
                "3",
                "--max-downtime",
                "50ms",
                "--max-total",
                "7s",
                "--max-bandwidth",
                "2Gbit",
            ];
            let line = Line::try_parse_from(text).unwrap();
            let max_downtime = Duration::from_millis(50);
            let wanted = SwitchoverConfig {
                mode,
                rounds: 3,
                max_downtime,
                max_total: Some(Duration::from_secs(7)),
                max_bandwidth: Some(2_000_000_000),
                max_postcopy_bandwidth: None,
            };
            assert_eq!(line.switchover.config(), wanted);
            let passed_on = [vec!["x".to_owned()], line.switchover.to_arguments()].concat();
            let again = Line::try_parse_from(passed_on).unwrap();
            assert_eq!(again.switchover.config(), line.switchover.config());
        }
        assert!(Line::try_parse_from(["x", "--mode", "best"]).is_err());
        assert!(Line::try_parse_from(["x", "--rounds", "31"]).is_err());
    }

    #[test]
    fn every_policy_can_be_named_and_passed_on() {
        for (kind, mode) in PolicyKind::ALL.into_iter().zip(CompressMode::ALL) {
            let text = ["x", "--policy", kind.name(), "--pivots", "3", "--drain-after", "2s"];
            let text = text.into_iter().chain(["--compress", mode.name()]);
            let line = Line::try_parse_from(text).unwrap();
            assert_eq!((line.policy.policy, line.policy.compress), (kind, mode));
            let passed_on = [vec!["x".to_owned()], line.policy.to_arguments()].concat();
            let again = Line::try_parse_from(passed_on).unwrap();
            assert_eq!(format!("{again:?}"), format!("{line:?}"));
        }
        let error = Line::try_parse_from(["x", "--policy", "best"]).unwrap_err().to_string();
        assert!(error.contains("bubbling"), "{error}");
        let error = Line::try_parse_from(["x", "--compress", "yes"]).unwrap_err().to_string();
        assert!(error.contains("never"), "{error}");
    }
}
