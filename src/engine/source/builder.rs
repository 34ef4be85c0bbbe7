//! [`SourceBuilder`]: a VMM's way to a [`Migration`].

use super::{Migration, SourceConfig};
use crate::engine::config::{
    ConfigError, check_drain_after, check_length, check_range, check_session,
};
use crate::engine::event::Event;
use crate::memory::ram::GuestRam;
use crate::memory::users::{self, MemoryUser};
use crate::proto::compression::CompressMode;
use crate::proto::message::{GUEST_INFO_MAX, TEXT_MAX};
use crate::proto::prepaging::{PIVOTS_MAX, PolicyKind};
use crate::proto::source::SessionLimits;
use crate::proto::switchover::SwitchoverConfig;
use crate::transport::{LinkOptions, Ticket};
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// Collects what a source must know and checks it: [`build`](Self::build) refuses wrong
/// values by their names, and memory that cannot be migrated, before anything is begun.
#[must_use = "nothing is migrated before it is built and run"]
pub struct SourceBuilder {
    memory: GuestMemoryMmap,
    users: Vec<MemoryUser>,
    config: SourceConfig,
    on_event: Option<Box<dyn FnMut(Event) + Send>>,
}

impl SourceBuilder {
    /// Moves the guest in `memory` to whoever made `ticket`. The memory stays the VMM's.
    ///
    /// # Safety
    /// Pages are sent from where they lie, as `&[u8]`. So from the return of
    /// [`SourceVm::pause`](crate::engine::vm::SourceVm::pause) until
    /// [`SourceVm::resume`](crate::engine::vm::SourceVm::resume) is called, or
    /// [`Migration::run`] has returned, nothing writes to this memory: no vCPU, no device or
    /// its thread, no other process or kernel back end that has it mapped, and nobody who holds
    /// a clone of `memory`.
    pub unsafe fn new(memory: GuestMemoryMmap, ticket: Ticket) -> Self {
        let config = SourceConfig {
            ticket,
            link: LinkOptions::default(),
            limits: SessionLimits::default(),
            policy: PolicyKind::default(),
            pivots: None,
            drain_after: None,
            switchover: SwitchoverConfig::default(),
            compress: CompressMode::default(),
            machine: String::new(),
            guest: Vec::new(),
            vcpus: 1,
            guest_kind: "guest".into(),
            workload: None,
        };
        Self { memory, users: Vec::new(), config, on_event: None }
    }

    /// The machine configuration, as text that must be equal on both sides: processor
    /// features, devices, whatever the state cannot be restored without.
    pub fn machine(mut self, machine: impl Into<String>) -> Self {
        self.config.machine = machine.into();
        self
    }

    /// What the destination's VMM must know to make the guest; opaque to the engine.
    pub fn guest(mut self, description: impl Into<Vec<u8>>) -> Self {
        self.config.guest = description.into();
        self
    }

    /// The guest's vCPUs. Each has a stream for its faults.
    pub fn vcpus(mut self, vcpus: u16) -> Self {
        self.config.vcpus = vcpus;
        self
    }

    /// The kind of guest, for the report.
    pub fn guest_kind(mut self, kind: impl Into<String>) -> Self {
        self.config.guest_kind = kind.into();
        self
    }

    /// What the guest does, for the report.
    pub fn workload(mut self, workload: impl Into<String>) -> Self {
        self.config.workload = Some(workload.into());
        self
    }

    /// Which pages are pushed before they are asked for.
    pub fn policy(mut self, policy: PolicyKind) -> Self {
        self.config.policy = policy;
        self
    }

    /// Pivots of the bubbling policy.
    pub fn pivots(mut self, pivots: usize) -> Self {
        self.config.pivots = Some(pivots);
        self
    }

    /// Push all that is left so long after the guest's first instruction at the
    /// destination, whatever the policy.
    pub fn drain_after(mut self, after: Duration) -> Self {
        self.config.drain_after = Some(after);
        self
    }

    /// How much memory is copied before the guest moves: none, unless this says otherwise. A VMM
    /// whose guest is to run meanwhile must be able to tell what it writes,
    /// [`SourceVm::start_dirty_log`](crate::engine::vm::SourceVm::start_dirty_log); and the
    /// destination's memory must be in files.
    pub fn switchover(mut self, switchover: SwitchoverConfig) -> Self {
        self.config.switchover = switchover;
        self
    }

    /// Whether pushed pages are compressed: while it saves time, all that become smaller, or
    /// none. Unless it is none, a destination that cannot decompress refuses the guest.
    pub fn compress(mut self, mode: CompressMode) -> Self {
        self.config.compress = mode;
        self
    }

    /// Time limits of the session.
    pub fn limits(mut self, limits: SessionLimits) -> Self {
        self.config.limits = limits;
        self
    }

    /// How long a link that is lost after the commit is tried to be made again:
    /// [`SessionLimits::recovery`].
    pub fn patience(mut self, patience: Duration) -> Self {
        self.config.limits.recovery = patience;
        self
    }

    /// Socket and QUIC settings.
    pub fn link(mut self, link: LinkOptions) -> Self {
        self.config.link = link;
        self
    }

    /// Who beside the vCPUs uses guest memory, as far as only the VMM knows.
    pub fn memory_user(mut self, user: MemoryUser) -> Self {
        self.users.push(user);
        self
    }

    /// Has `on_event` called with each event, on the thread that serves faults: it must
    /// return at once.
    pub fn on_event(mut self, on_event: impl FnMut(Event) + Send + 'static) -> Self {
        self.on_event = Some(Box::new(on_event));
        self
    }

    /// Checks everything. The guest runs on, and nothing is connected yet.
    ///
    /// # Errors
    /// The first field that is wrong, memory that cannot be migrated, or a user of it that
    /// does not go with a migration.
    pub fn build(self) -> Result<Migration, ConfigError> {
        let Self { memory, users, config, on_event } = self;
        check_length("machine", config.machine.len(), TEXT_MAX)?;
        check_length("guest", config.guest.len(), GUEST_INFO_MAX)?;
        // A stream for each, one for faults that are no vCPU's, and the control stream.
        let vcpus_max = config.link.streams_max.saturating_sub(2);
        check_range("vcpus", u32::from(config.vcpus), 1, vcpus_max)?;
        if let Some(pivots) = config.pivots {
            check_range("pivots", pivots, 1, PIVOTS_MAX)?;
        }
        check_range("rounds", config.switchover.rounds, 1, SwitchoverConfig::ROUNDS_MAX)?;
        check_drain_after(config.drain_after)?;
        check_session(&config.limits, &config.link)?;
        let ram = GuestRam::from_guest_memory(memory)?;
        users::check(&ram, &users)?;
        let migration = Migration::new(config, Arc::new(ram));
        Ok(match on_event {
            Some(on_event) => migration.on_event(on_event),
            None => migration,
        })
    }
}
