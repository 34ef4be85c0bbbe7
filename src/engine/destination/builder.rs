//! [`DestinationBuilder`]: a VMM's way to a [`Receiver`].

use super::{DestinationConfig, Receiver};
use crate::engine::config::{ConfigError, check_range, check_session, check_time};
use crate::engine::event::Event;
use crate::memory::users::MemoryUser;
use crate::proto::message::Hello;
use crate::proto::source::SessionLimits;
use crate::transport::LinkOptions;
use crate::transport::lanes::PUSH_LANES_MAX;
use crate::transport::ticket::Host;
use crate::uffd::DestinationBacking;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// The longest life of a ticket: it is a bearer's right to bring a guest.
const TICKET_LIFE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// Collects what a destination must know and checks it: [`build`](Self::build) refuses
/// wrong values by their names, binds the ports and makes the ticket.
#[must_use = "nothing listens before it is built"]
pub struct DestinationBuilder {
    config: DestinationConfig,
    public_host: Option<String>,
    on_event: Option<Box<dyn FnMut(Event) + Send>>,
}

impl Default for DestinationBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl DestinationBuilder {
    /// A destination on this machine's loopback, for one KVM guest.
    pub fn new() -> Self {
        let config = DestinationConfig {
            listen: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 0,
            public_host: None,
            push_lanes: 1,
            link: LinkOptions::default(),
            limits: crate::failpoint::limits(),
            ticket_life: Duration::from_secs(600),
            backing: DestinationBacking::MemfdContinue,
            overcommit: false,
            huge_pages: false,
            is_kvm: |_| true,
            users: Vec::new(),
            record: false,
        };
        Self { config, public_host: None, on_event: None }
    }

    /// The address to listen on.
    pub fn listen(mut self, address: IpAddr) -> Self {
        self.config.listen = address;
        self
    }

    /// The urgent lane's UDP port; push lanes take those after it. 0: any that are free.
    pub fn port(mut self, port: u16) -> Self {
        self.config.port = port;
        self
    }

    /// The name or address that goes into the ticket, if it is not the one listened on.
    pub fn public_host(mut self, host: impl Into<String>) -> Self {
        self.public_host = Some(host.into());
        self
    }

    /// Push connections, each with a thread of its own on both sides.
    pub fn push_lanes(mut self, lanes: usize) -> Self {
        self.config.push_lanes = lanes;
        self
    }

    /// What the engine makes guest memory of. A VMM may also bring its own:
    /// [`DestinationVm::memory`](crate::engine::vm::DestinationVm::memory).
    pub fn backing(mut self, backing: DestinationBacking) -> Self {
        self.config.backing = backing;
        self
    }

    /// Keeps when each fault was read and each run of pages placed, in 16 bytes an event and
    /// 64 MiB at most, for [`DestinationEnd::recorded`](super::DestinationEnd::recorded).
    pub fn record(mut self, record: bool) -> Self {
        self.config.record = record;
        self
    }

    /// Takes guests that the host's memory does not hold, and reserves nothing for them. Else
    /// memory for every page is reserved before the guest is paused, and what turns out to be
    /// zero is given back. With it, pages may find no memory after the commit: the guest then
    /// stands still until there is some, if the kernel does not kill this process. Huge pages of
    /// hugetlbfs are reserved all the same.
    pub fn overcommit(mut self, overcommit: bool) -> Self {
        self.config.overcommit = overcommit;
        self
    }

    /// Makes transparent huge pages of the guest's memory when all of it is here: in the
    /// background, block by block (2 MiB, some milliseconds each, in which whoever touches the
    /// block waits), with `MADV_COLLAPSE`, whatever the system's settings for huge pages are.
    /// Blocks without content are left out, and so are those with pages that are lost or that a
    /// balloon gave back; one that is partly zero has all its memory afterwards. It needs Linux
    /// 6.1; without it, and where the kernel will not, the guest keeps small pages.
    /// See [`DestinationEnd::collapsing`](super::DestinationEnd::collapsing).
    pub fn huge_pages(mut self, huge_pages: bool) -> Self {
        self.config.huge_pages = huge_pages;
        self
    }

    /// How long the ticket is good.
    pub fn ticket_life(mut self, life: Duration) -> Self {
        self.config.ticket_life = life;
        self
    }

    /// Time limits of the session.
    pub fn limits(mut self, limits: SessionLimits) -> Self {
        self.config.limits = limits;
        self
    }

    /// How long a guest whose link is lost after the commit, or that is in doubt, is waited
    /// for: [`SessionLimits::recovery`].
    pub fn patience(mut self, patience: Duration) -> Self {
        self.config.limits.recovery = patience;
        self
    }

    /// Socket and QUIC settings.
    pub fn link(mut self, link: LinkOptions) -> Self {
        self.config.link = link;
        self
    }

    /// Whether a proposed guest runs under KVM, which decides what userfaultfd must be able
    /// to do. Unless told otherwise, all do.
    pub fn is_kvm(mut self, is_kvm: fn(&Hello) -> bool) -> Self {
        self.config.is_kvm = is_kvm;
        self
    }

    /// Who beside the vCPUs uses guest memory, as far as only the VMM knows. A proposal is
    /// refused if that does not go with a migration.
    pub fn memory_user(mut self, user: MemoryUser) -> Self {
        self.config.users.push(user);
        self
    }

    /// Has `on_event` called with each event, on the thread that serves faults: it must
    /// return at once.
    pub fn on_event(mut self, on_event: impl FnMut(Event) + Send + 'static) -> Self {
        self.on_event = Some(Box::new(on_event));
        self
    }

    /// Checks everything, binds the ports and makes the ticket.
    ///
    /// # Errors
    /// The first field that is wrong, or ports that cannot be had.
    pub fn build(self) -> Result<Receiver, ConfigError> {
        let Self { mut config, public_host, on_event } = self;
        check_range("push_lanes", config.push_lanes, 1, PUSH_LANES_MAX)?;
        if config.port != 0 {
            let most = u16::MAX - config.push_lanes as u16;
            check_range("port", config.port, 1, most)?;
        }
        if let Some(host) = public_host {
            let parsed: Result<Host, _> = host.parse();
            let parsed = parsed.map_err(|error| ConfigError::field("public_host", error))?;
            config.public_host = Some(parsed);
        } else if config.listen.is_unspecified() {
            let why = "it is needed where all addresses are listened on: the source must know one";
            return Err(ConfigError::field("public_host", why));
        }
        check_time("ticket_life", config.ticket_life, TICKET_LIFE_MAX)?;
        check_session(&config.limits, &config.link)?;
        let receiver = Receiver::bind(config).map_err(ConfigError::Listen)?;
        Ok(match on_event {
            Some(on_event) => receiver.on_event(on_event),
            None => receiver,
        })
    }
}
