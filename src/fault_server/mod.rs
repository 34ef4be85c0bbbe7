//! The fault server: attach to a VMM's guest and move it, holding the guest's memory
//! until the destination has it all: once committed, it does not need the VMM's process,
//! and once a [`keeper`] holds the memory, too, another fault server can take its place.
//!
//! [`FaultServer::attach`] or [`FaultServer::resume`], then [`FaultServer::run`]. The
//! `fault-server` program and `postcopy migrate` are this with a display; neither is
//! needed to use it.

pub mod arguments;
mod display;
mod guest_config;
mod holding;
pub mod keeper;
mod legacy;
pub mod record;
mod service;
pub mod take_back;
mod watch;

use crate::attach::client::{AttachError, Attached};
use crate::attach::commit_word::{CommitWord, Decision};
use crate::attach::handover::{HandoverError, MemoryFiles, take_over};
use crate::engine::ConfigError;
use crate::engine::attached::{AttachedVmm, GivenAway};
use crate::engine::event::Event;
use crate::engine::operator::Operator;
use crate::engine::source::{Canceller, Left, Migration, SourceEnd};
use crate::failpoint::failpoint;
use crate::memory::ram::GuestRam;
use crate::operator::desk::Desk;
use crate::operator::socket_path;
use crate::proto::compression::CompressMode;
use crate::proto::prepaging::PolicyKind;
use crate::proto::source::Outcome;
use crate::proto::switchover::SwitchoverConfig;
use crate::transport::ticket::TicketParseError;
use crate::transport::{Ticket, TransportError};
use guest_config::config;
use holding::Holding;
pub use holding::{HeldBy, Keeper};
use keeper::{KeeperCommand, KeeperError, Occupied};
use legacy::Legacy;
use record::{RecordError, RecordFile, SessionRecord};
use serde::{Deserialize, Serialize};
use service::{Inherited, StoreError, Stored, Teller};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use watch::{KeeperWatch, Making};

/// Which pages are pushed and when, and how long a lost link is waited for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushPlan {
    /// The pre-paging policy.
    pub policy: PolicyKind,
    /// Pivots of the bubbling policy.
    pub pivots: Option<usize>,
    /// When to push all that is left, counted from the guest's first instruction at the
    /// destination.
    pub drain_after: Option<Duration>,
    /// Whether pushed pages are compressed. The destination was told when the session began,
    /// so whoever goes on with it keeps to this.
    pub compress: CompressMode,
    /// How long a committed guest whose link is lost is waited for;
    /// [`SessionLimits::recovery`](crate::proto::source::SessionLimits::recovery)'s default if it is not said.
    pub patience: Option<Duration>,
    /// How much is copied before the guest moves.
    pub switchover: SwitchoverConfig,
}

/// The longest patience.
const PATIENCE_MAX: Duration = Duration::from_secs(24 * 3600);

impl PushPlan {
    /// How long a committed guest whose link is lost is waited for.
    pub fn patience(&self) -> Duration {
        self.patience.unwrap_or(crate::failpoint::limits().recovery)
    }
}

/// Why a fault server cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum FaultServerError {
    /// There is no VMM, or it does not hand its guest over.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The guest, or how it is to be pushed, is beyond what the network protocol can say.
    #[error("this guest cannot be migrated")]
    Config(#[from] ConfigError),
    /// The guest left before.
    #[error(transparent)]
    GivenAway(#[from] GivenAway),
    /// There is no keeper to be had.
    #[error(
        "no keeper can be started for the guest's memory, and the guest was not paused; \
             --no-keeper goes without"
    )]
    Keeper(#[from] KeeperError),
    /// The guest has left, and a keeper holds its memory.
    #[error(
        "this guest was given to a destination, and a keeper at {} holds its memory: {}",
        path.display(),
        match state {
            Occupied::Busy => "a fault server is at work",
            Occupied::Committed => "its fault server is gone; --resume goes on with the session",
        }
    )]
    Kept {
        /// The keeper's socket.
        path: PathBuf,
        /// What it does.
        state: Occupied,
    },
    /// Nobody has left anything to go on with.
    #[error("there is nothing to resume: {why}")]
    NothingLeft {
        /// What there is instead.
        why: &'static str,
        /// Why there is no keeper.
        #[source]
        source: AttachError,
    },
    /// The service manager does not hold it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What it held is no guest's memory.
    #[error("cannot use the guest memory that was left")]
    Memory(#[from] HandoverError),
    /// The session cannot be gone on with.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Its ticket is none.
    #[error("the session record is damaged")]
    Ticket(#[from] TicketParseError),
    /// Neither side may do anything on the strength of this word.
    #[error("the commit word is damaged ({0}): nobody may run the guest, or move it")]
    Word(u64),
}

/// Who holds memory, commit word and record beside the fault server.
#[derive(Clone, Copy, Debug)]
pub enum Holder<'a> {
    /// Nobody: if it dies before the destination has all memory, the guest is lost.
    Nobody,
    /// A keeper that is started like this.
    Keeper(&'a KeeperCommand),
    /// The service manager's descriptor store (systemd): the unit starts the next one.
    DescriptorStore,
}

/// A fault server that is attached to its guest and has not begun to move it.
#[derive(Debug)]
pub struct FaultServer {
    vmm: AttachedVmm,
    migration: Migration,
    holding: Holding,
    keeper: Option<KeeperWatch>,
    word: Arc<CommitWord>,
    ticket: Ticket,
    report: Option<PathBuf>,
    /// Where its operator finds it.
    desk: PathBuf,
}

impl FaultServer {
    /// Attaches to the VMM whose control socket is at `control`, and has the memory held as
    /// `holder` says; without one the guest's memory is lost if this process dies
    /// before the destination has it all. `report` is where its report was promised, which
    /// whoever goes on with the session is told. The guest runs on.
    ///
    /// # Errors
    /// As [`Attached::connect`], if there is no keeper, and if the guest has left already.
    pub fn attach(
        control: &Path,
        ticket: Ticket,
        plan: PushPlan,
        report: Option<&Path>,
        holder: Holder<'_>,
    ) -> Result<Self, FaultServerError> {
        let kept = |error| match keeper::look(&keeper::socket_path(control)) {
            Some(state) => FaultServerError::Kept { path: keeper::socket_path(control), state },
            None => error,
        };
        let attached = match Attached::connect(control) {
            Err(error @ AttachError::Connect { .. }) => return Err(kept(error.into())),
            attached => attached?,
        };
        let mut attached = match attached.word.decision() {
            Decision::Undecided | Decision::Aborted => attached,
            // Whoever took it back did not come to having it resumed.
            Decision::TakenBack => {
                attached.resume()?;
                Attached::connect(control)?
            }
            Decision::Committed | Decision::Running | Decision::Damaged(_) => {
                return Err(kept(GivenAway.into()));
            }
        };
        let config =
            config(ticket.clone(), plan.clone(), attached.machine.clone(), attached.guest.clone())?;
        let migration = Migration::new(config, attached.ram.clone());
        failpoint!("source::after_attached", return Err(RecordError::TooLong(0).into()));
        let memory = MemoryFiles::of(&attached.ram).map_err(AttachError::from)?;
        let report = report.map(absolute);
        let record = RecordFile::create(SessionRecord {
            session: migration.session(),
            last_epoch: 0,
            state_left: false,
            runs_since_ns: None,
            drained: false,
            ticket: ticket.to_string(),
            layout: attached.layout().clone(),
            memory: memory.regions().to_vec(),
            machine: attached.machine.clone(),
            guest: attached.guest.clone(),
            plan,
            report: report.clone().map(Into::into),
        })?;
        let legacy = Legacy::of(&memory, &attached.word, &record)?;
        let (holding, keeper) = held(control, legacy, holder)?;
        attached.keep_record(record.memfd())?;
        let word = attached.word.clone();
        let vmm = AttachedVmm::new(attached)?.held_by(Box::new(holding.clone()));
        let migration = migration.with_journal(Box::new(record));
        let desk = socket_path(control);
        Ok(Self { vmm, migration, holding, keeper, word, ticket, report, desk })
    }

    /// Goes on with the session that a fault server which has died has left to the keeper
    /// of the guest behind `control`; or, if there is none, to its VMM, which holds a guest
    /// that was committed until it is told that it runs. If it was committed, the destination
    /// is served what it misses; if not, it is told that the guest stayed. `report` is where
    /// the report goes, if not where it was promised; `holder` says how a keeper is started in
    /// the place of one that has ended.
    ///
    /// # Errors
    /// If there is neither, or another fault server is at work.
    pub fn resume(
        control: &Path,
        report: Option<&Path>,
        holder: Holder<'_>,
    ) -> Result<Self, FaultServerError> {
        let path = keeper::socket_path(control);
        match keeper::connect(&path) {
            Err(source @ AttachError::Connect { .. }) => {
                let vmm = left_with_vmm(control)
                    .map_err(|why| FaultServerError::NothingLeft { why, source })?;
                Self::go_on(LeftBehind::with(vmm, Place::Vmm)?, control, report, holder)
            }
            Err(AttachError::Refused { .. }) => {
                Err(FaultServerError::Kept { path, state: Occupied::Busy })
            }
            kept => Self::go_on(LeftBehind::with(kept?, Place::Keeper)?, control, report, holder),
        }
    }

    /// The same in a process that a keeper has started, as its [`RestartCommand`](keeper::RestartCommand) says: the
    /// keeper is at the other end of standard input.
    ///
    /// # Errors
    /// If it is not.
    pub fn restarted(control: &Path, holder: Holder<'_>) -> Result<Self, FaultServerError> {
        let kept = keeper::at_standard_input()?;
        Self::go_on(LeftBehind::with(kept, Place::Keeper)?, control, None, holder)
    }

    /// The same in a process to which the service manager has passed on what was in the
    /// descriptor store. None if there is nothing of ours: then a session begins.
    ///
    /// # Errors
    /// If there is no such manager, or a part of what should be there is missing.
    pub fn from_store(
        control: &Path,
        report: Option<&Path>,
    ) -> Result<Option<Self>, FaultServerError> {
        Stored::check()?;
        let Some(Inherited { memory, word, record }) = Inherited::take()? else {
            return Ok(None);
        };
        let known = RecordFile::open(own(&record)?)?;
        let SessionRecord { layout, memory: places, .. } = known.record();
        let ram = Arc::new(take_over(layout.clone(), places, memory)?);
        let place = Place::DescriptorStore;
        let left = LeftBehind { ram, word: Arc::new(word), record, place };
        Self::go_on(left, control, report, Holder::DescriptorStore).map(Some)
    }

    fn go_on(
        left: LeftBehind,
        control: &Path,
        report: Option<&Path>,
        holder: Holder<'_>,
    ) -> Result<Self, FaultServerError> {
        let LeftBehind { ram, word, record, place } = left;
        failpoint!("source::after_keeper_attached", return Err(RecordError::Damaged.into()));
        // No fault server is left that could commit; this decides it if nothing else has.
        let committed = word.abort().is_err();
        let taken_back = match word.decision() {
            Decision::Damaged(found) => return Err(FaultServerError::Word(found)),
            decision => decision == Decision::TakenBack,
        };
        let mut record = RecordFile::open(record)?;
        if let Some(report) = report.map(absolute) {
            record.change(|record| record.report = Some(report.into()))?;
        }
        let known = record.record().clone();
        let SessionRecord { session, last_epoch, drained, plan, machine, guest, .. } = known;
        let since = |since| crate::attach::monotonic_ns().saturating_sub(since);
        let runs_for = known.runs_since_ns.map(since).map(Duration::from_nanos);
        let ticket: Ticket = known.ticket.parse()?;
        let pid = guest.pid;
        let left = Left { session, last_epoch, committed, taken_back, runs_for, drained };
        let config = config(ticket.clone(), plan, machine, guest)?;
        let memory = MemoryFiles::of(&ram).map_err(AttachError::from)?;
        let legacy = Legacy::of(&memory, &word, &record)?;
        let migration = Migration::resume(config, ram.clone(), left);
        let nobody = || AttachedVmm::left(word.clone(), pid, Some(control.to_owned()));
        let (vmm, (holding, keeper)) = match place {
            Place::Vmm(vmm) => (AttachedVmm::committed(vmm), held(control, legacy, holder)?),
            Place::DescriptorStore => (nobody(), held(control, legacy, holder)?),
            Place::Keeper(kept) => {
                let holding = Holding::of(Keeper::new(kept, keeper::socket_path(control), None));
                let watch = match holder {
                    Holder::Keeper(command) => {
                        let (command, control) = (command.clone(), control.to_owned());
                        let making = Making { command, control, legacy };
                        Some(KeeperWatch::new(holding.clone(), making))
                    }
                    Holder::Nobody | Holder::DescriptorStore => None,
                };
                (nobody(), (holding, watch))
            }
        };
        let vmm = vmm.held_by(Box::new(holding.clone()));
        let migration = migration.with_journal(Box::new(record));
        let (report, desk) = (known.report.map(PathBuf::from), socket_path(control));
        Ok(Self { vmm, migration, holding, keeper, word, ticket, report, desk })
    }

    /// Where it goes, and with what right.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// Where its report was promised.
    pub fn report(&self) -> Option<&Path> {
        self.report.as_deref()
    }

    /// A handle for its operator, whom it also answers at
    /// [`socket_path`] while it runs.
    pub fn operator(&self) -> Operator {
        self.migration.operator()
    }

    /// A handle that stops it, for as long as nothing is committed.
    pub fn canceller(&self) -> Canceller {
        self.migration.canceller()
    }

    /// To be called when this process ends in the middle of a session because somebody wants
    /// it to: nobody is started in its place then.
    pub fn deserter(&self) -> impl Fn() + Send + 'static {
        let holding = self.holding.clone();
        move || holding.desert()
    }

    /// Moves the guest. Blocks until the session is over; `watch` is called with each
    /// event, and must return at once. The keeper is there until the [`LastWord`] is said.
    ///
    /// # Errors
    /// As [`Migration::run`]: only if no thread could be made.
    pub fn run(
        self,
        mut watch: impl FnMut(Event) + Send + 'static,
    ) -> Result<(SourceEnd, LastWord), TransportError> {
        let mut keeper = self.keeper;
        let teller = Teller::start();
        let watch = move |event: Event| {
            if let Some(teller) = &teller {
                teller.hear(&event);
            }
            if let (Some(keeper), Event::Progress(now)) = (&mut keeper, &event) {
                keeper.look(now.phase);
            }
            watch(event);
        };
        // Nothing of the migration needs it.
        let desk = Desk::open_when_free(self.desk, self.migration.operator());
        let _desk = desk.inspect_err(|error| {
            let why = crate::engine::error_chain(error);
            tracing::warn!(why, "no operator can ask this session anything");
        });
        let mut end = self.migration.on_event(watch).run(Box::new(self.vmm))?;
        // Nobody asks the VMM for anything any more: the conversation ends here.
        end.vm = None;
        let outcome = end.outcome.clone();
        Ok((end, LastWord { holding: self.holding, word: self.word, outcome }))
    }
}

/// What a fault server says to its keeper when it has done all that it promised, its report
/// included. One that is gone without has died: another one is started, and does it.
#[derive(Debug)]
#[must_use = "without it, the session is gone on with by another process"]
pub struct LastWord {
    holding: Holding,
    word: Arc<CommitWord>,
    outcome: Outcome,
}

impl LastWord {
    /// Says it. The memory goes, unless the guest was lost: then it waits for an operator,
    /// who is told where.
    pub fn say(self) -> Option<HeldBy> {
        self.holding.part(&self.outcome, &self.word)
    }
}

/// What is gone on with.
struct LeftBehind {
    ram: Arc<GuestRam>,
    word: Arc<CommitWord>,
    record: OwnedFd,
    /// Where it was left.
    place: Place,
}

/// Where it was left.
enum Place {
    Keeper(Attached),
    Vmm(Attached),
    DescriptorStore,
}

impl LeftBehind {
    /// What is behind `attached`.
    fn with(mut attached: Attached, place: fn(Attached) -> Place) -> Result<Self, AttachError> {
        let record = attached.record()?;
        let (ram, word) = (attached.ram.clone(), attached.word.clone());
        Ok(Self { ram, word, record, place: place(attached) })
    }
}

fn own(record: &OwnedFd) -> Result<OwnedFd, RecordError> {
    record.try_clone().map_err(|source| RecordError::System { action: "share", source })
}

/// Has `legacy` held by a keeper, if there is to be one.
fn held(
    control: &Path,
    legacy: Legacy,
    holder: Holder<'_>,
) -> Result<(Holding, Option<KeeperWatch>), FaultServerError> {
    let command = match holder {
        Holder::Nobody => return Ok((Holding::default(), None)),
        Holder::DescriptorStore => return Ok((Holding::stored(Stored::put(&legacy)?), None)),
        Holder::Keeper(command) => command,
    };
    let making = Making { command: command.clone(), control: control.to_owned(), legacy };
    let holding = Holding::of(making.start()?);
    Ok((holding.clone(), Some(KeeperWatch::new(holding, making))))
}

/// A path that means the same to a process elsewhere.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The VMM at `control`, if it holds a guest that was given to a destination, and the
/// session's record; or what there is instead.
fn left_with_vmm(control: &Path) -> Result<Attached, &'static str> {
    let vmm = match Attached::connect(control) {
        Ok(vmm) => vmm,
        Err(AttachError::Refused { .. }) => {
            return Err("the guest is in its VMM, and somebody is attached");
        }
        Err(_) => return Err("there is neither a VMM nor a keeper"),
    };
    match vmm.word.decision() {
        Decision::Undecided | Decision::Aborted | Decision::TakenBack => {
            Err("the guest runs in its VMM")
        }
        _ if vmm.has_record() => Ok(vmm),
        _ => Err("the VMM holds the memory of a guest that was given to a destination, but has \
                  no record of the session"),
    }
}
