//! The fault server: attach to a VMM's guest and move it, holding the guest's memory
//! until the destination has it all: once committed, it does not need the VMM's process,
//! and once a [`keeper`] holds the memory, too, another fault server can take its place.
//!
//! [`FaultServer::attach`] or [`FaultServer::resume`], then [`FaultServer::run`]. The
//! `fault-server` program and `postcopy migrate` are this with a display; neither is
//! needed to use it.

pub mod arguments;
mod holding;
pub mod keeper;
mod legacy;
pub mod record;
pub mod take_back;
mod watch;

use crate::attach::client::{AttachError, Attached};
use crate::attach::commit_word::{CommitWord, Decision};
use crate::attach::handover::MemoryFiles;
use crate::attach::message::GuestInfo;
use crate::engine::ConfigError;
use crate::engine::attached::{AttachedVmm, GivenAway};
use crate::engine::event::Event;
use crate::engine::operator::Operator;
use crate::engine::source::{Canceller, Left, Migration, SourceConfig, SourceEnd};
use crate::failpoint::failpoint;
use crate::operator::desk::Desk;
use crate::operator::socket_path;
use crate::proto::message::{GUEST_INFO_MAX, TEXT_MAX};
use crate::proto::prepaging::{PIVOTS_MAX, PolicyKind};
use crate::proto::source::{Outcome, SessionLimits};
use crate::transport::ticket::TicketParseError;
use crate::transport::{LinkOptions, Ticket, TransportError};
use holding::Holding;
pub use holding::Keeper;
use keeper::{KeeperCommand, KeeperError, Occupied};
use legacy::Legacy;
use record::{RecordError, RecordFile, SessionRecord};
use serde::{Deserialize, Serialize};
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
    /// How long a committed guest whose link is lost is waited for;
    /// [`SessionLimits::recovery`]'s default if it is not said.
    pub patience: Option<Duration>,
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
    /// Attaches to the VMM whose control socket is at `control`, and has a keeper started
    /// as `keeper` says; without one the guest's memory is lost if this process dies
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
        keeper: Option<&KeeperCommand>,
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
        let (holding, keeper) = held(control, legacy, keeper)?;
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
    /// the report goes, if not where it was promised; `keeper` how one is started in the
    /// place of one that has ended.
    ///
    /// # Errors
    /// If there is neither, or another fault server is at work.
    pub fn resume(
        control: &Path,
        report: Option<&Path>,
        keeper: Option<&KeeperCommand>,
    ) -> Result<Self, FaultServerError> {
        let path = keeper::socket_path(control);
        match keeper::connect(&path) {
            Err(source @ AttachError::Connect { .. }) => {
                let vmm = left_with_vmm(control)
                    .map_err(|why| FaultServerError::NothingLeft { why, source })?;
                Self::go_on(vmm, control, report, keeper, Place::Vmm)
            }
            Err(AttachError::Refused { .. }) => {
                Err(FaultServerError::Kept { path, state: Occupied::Busy })
            }
            kept => Self::go_on(kept?, control, report, keeper, Place::Keeper),
        }
    }

    /// The same in a process that a keeper has started, as its [`RestartCommand`] says: the
    /// keeper is at the other end of standard input.
    ///
    /// # Errors
    /// If it is not.
    pub fn restarted(
        control: &Path,
        keeper: Option<&KeeperCommand>,
    ) -> Result<Self, FaultServerError> {
        let attached = keeper::at_standard_input()?;
        Self::go_on(attached, control, None, keeper, Place::Keeper)
    }

    fn go_on(
        mut attached: Attached,
        control: &Path,
        report: Option<&Path>,
        keeper: Option<&KeeperCommand>,
        place: Place,
    ) -> Result<Self, FaultServerError> {
        failpoint!("source::after_keeper_attached", return Err(RecordError::Damaged.into()));
        // No fault server is left that could commit; this decides it if nothing else has.
        let committed = attached.word.abort().is_err();
        let taken_back = match attached.word.decision() {
            Decision::Damaged(found) => return Err(FaultServerError::Word(found)),
            decision => decision == Decision::TakenBack,
        };
        let mut record = RecordFile::open(attached.record()?)?;
        if let Some(report) = report.map(absolute) {
            record.change(|record| record.report = Some(report.into()))?;
        }
        let SessionRecord { session, last_epoch, drained, ticket, plan, machine, guest, .. } =
            record.record().clone();
        let report = record.record().report.clone().map(PathBuf::from);
        let runs_for = record
            .record()
            .runs_since_ns
            .map(|since| Duration::from_nanos(crate::attach::monotonic_ns().saturating_sub(since)));
        let ticket: Ticket = ticket.parse()?;
        let left = Left { session, last_epoch, committed, taken_back, runs_for, drained };
        let config = config(ticket.clone(), plan, machine, guest)?;
        let migration = Migration::resume(config, attached.ram.clone(), left);
        let memory = MemoryFiles::of(&attached.ram).map_err(AttachError::from)?;
        let legacy = Legacy::of(&memory, &attached.word, &record)?;
        let (word, pid) = (attached.word.clone(), attached.guest.pid);
        let (vmm, holding, keeper) = match place {
            Place::Vmm => {
                let (holding, keeper) = held(control, legacy, keeper)?;
                (AttachedVmm::committed(attached), holding, keeper)
            }
            Place::Keeper => {
                let holding =
                    Holding::of(Keeper::new(attached, keeper::socket_path(control), None));
                let making = |command: &KeeperCommand| Making {
                    command: command.clone(),
                    control: control.to_owned(),
                    legacy,
                };
                let watch = keeper.map(making).map(|made| KeeperWatch::new(holding.clone(), made));
                (AttachedVmm::left(word.clone(), pid, Some(control.to_owned())), holding, watch)
            }
        };
        let vmm = vmm.held_by(Box::new(holding.clone()));
        let migration = migration.with_journal(Box::new(record));
        let desk = socket_path(control);
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
    /// [`socket_path`](crate::operator::socket_path) while it runs.
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
        let watch = move |event: Event| {
            if let (Some(keeper), Event::Progress(now)) = (&mut keeper, &event) {
                keeper.look(now.phase);
            }
            watch(event);
        };
        // Nothing of the migration needs it.
        let desk = Desk::open_when_free(self.desk, self.migration.operator());
        let _desk = desk.inspect_err(|error| {
            tracing::warn!(%error, "no operator can ask this session anything");
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
    /// Says it. The memory goes, unless the guest was lost: then it waits for an operator;
    /// true if it does.
    pub fn say(self) -> bool {
        self.holding.part(&self.outcome, &self.word)
    }
}

/// Where what is gone on with was left.
#[derive(Clone, Copy, Debug)]
enum Place {
    Keeper,
    Vmm,
}

/// Has `legacy` held by a keeper, if there is to be one.
fn held(
    control: &Path,
    legacy: Legacy,
    keeper: Option<&KeeperCommand>,
) -> Result<(Holding, Option<KeeperWatch>), KeeperError> {
    let Some(command) = keeper else { return Ok((Holding::default(), None)) };
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

/// What the engine must know, from what the VMM says of its guest.
///
/// # Errors
/// What cannot be said to a destination: a VMM may say more of its guest than fits there.
fn config(
    ticket: Ticket,
    plan: PushPlan,
    machine: String,
    guest: GuestInfo,
) -> Result<SourceConfig, ConfigError> {
    let wrong = |field, why| Err(ConfigError::Field { field, why });
    let link = LinkOptions::default();
    // Two streams are not a vCPU's.
    let vcpus_max = link.streams_max.saturating_sub(2);
    if !(1..=vcpus_max).contains(&guest.vcpus) {
        return wrong("vcpus", format!("{} is not in 1 to {vcpus_max}", guest.vcpus));
    }
    for (field, text, most) in
        [("machine", &machine, TEXT_MAX), ("guest", &guest.workload_json, GUEST_INFO_MAX)]
    {
        if text.len() > most {
            return wrong(field, format!("{} bytes are more than {most}", text.len()));
        }
    }
    if let Some(pivots) = plan.pivots
        && !(1..=PIVOTS_MAX).contains(&pivots)
    {
        return wrong("pivots", format!("{pivots} is not in 1 to {PIVOTS_MAX}"));
    }
    let patience = plan.patience();
    if patience.is_zero() || patience > PATIENCE_MAX {
        return wrong("patience", format!("{patience:?} is not in 1 ns to {PATIENCE_MAX:?}"));
    }
    Ok(SourceConfig {
        ticket,
        link,
        limits: SessionLimits { recovery: patience, ..crate::failpoint::limits() },
        policy: plan.policy,
        pivots: plan.pivots,
        drain_after: plan.drain_after,
        machine,
        workload: workload_name(&guest.workload_json),
        guest: guest.workload_json.into_bytes(),
        vcpus: guest.vcpus as u16,
        guest_kind: guest.kind,
    })
}

/// The name of the guest's workload, for the report, if its VMM gives it one.
fn workload_name(description: &str) -> Option<String> {
    let description: serde_json::Value = serde_json::from_str(description).ok()?;
    Some(description.pointer("/workload/pattern")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::ticket::Host;

    #[test]
    fn a_guest_that_does_not_fit_the_network_protocol_is_refused_by_field() {
        let identity = crate::transport::Identity::generate(u64::from(u32::MAX)).unwrap();
        let host = Host::from(std::net::IpAddr::from([127, 0, 0, 1]));
        let ticket = identity.ticket(host, 1, vec![2]).unwrap();
        let try_with = |vcpus, machine: usize, guest: usize, pivots| {
            let workload_json = "x".repeat(guest);
            let guest = GuestInfo { kind: "none".into(), vcpus, workload_json, pid: 1 };
            let plan = PushPlan { pivots, ..PushPlan::default() };
            match config(ticket.clone(), plan, "x".repeat(machine), guest) {
                Ok(config) => {
                    assert_eq!(u32::from(config.vcpus), vcpus);
                    None
                }
                Err(ConfigError::Field { field, .. }) => Some(field),
                Err(other) => panic!("{other:?}"),
            }
        };
        assert_eq!(try_with(62, TEXT_MAX, GUEST_INFO_MAX, Some(PIVOTS_MAX)), None);
        for vcpus in [0, 63, (1 << 16) + 1] {
            assert_eq!(try_with(vcpus, 0, 0, None), Some("vcpus"));
        }
        assert_eq!(try_with(1, TEXT_MAX + 1, 0, None), Some("machine"));
        assert_eq!(try_with(1, 0, GUEST_INFO_MAX + 1, None), Some("guest"));
        assert_eq!(try_with(1, 0, 0, Some(0)), Some("pivots"));
    }

    #[test]
    fn a_guest_of_any_vmm_may_have_a_workload_without_a_name() {
        let named = r#"{"kind":"kvm","workload":{"pattern":"random","seed":1}}"#;
        assert_eq!(workload_name(named).as_deref(), Some("random"));
        for other in ["", "not JSON", "{}", "[1]", r#"{"workload":{"pattern":7}}"#] {
            assert_eq!(workload_name(other), None, "{other}");
        }
    }
}
