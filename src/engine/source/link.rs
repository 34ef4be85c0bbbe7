//! Making the source's links: the urgent connection with its streams, and the push
//! lanes' own connections, each on its own thread.

use super::SourceConfig;
use super::push::PushShared;
use super::shrink::Shrinker;
use crate::engine::lane::LaneError;
use crate::failpoint::failpoint;
use crate::proto::message::SessionId;
use crate::transport::{self, Lane, LinkOptions, Ticket, TransportError};
use quinn::{RecvStream, SendStream};
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::sync::oneshot;

/// Priority of the control stream below the demand streams (0).
const CONTROL_PRIORITY: i32 = -1;
/// QUIC error code of a close that the session machine asked for.
const CLOSE_DONE: u32 = 0;

/// The urgent connection and its streams.
///
/// The source opens all of them, in this order: control, seeds, then a demand stream
/// for each vCPU and one for faults that no vCPU raised. The first bytes of each
/// stream after control are its index, so that the destination sees them open.
#[derive(Debug)]
pub struct Link {
    /// The link epoch it was made for.
    pub epoch: u32,
    /// The urgent connection.
    pub transport: transport::Link,
    /// Control messages out.
    pub control: SendStream,
    /// Control messages in, until the listener takes it.
    pub control_in: Option<RecvStream>,
    /// Seeds out: pages that were not asked for.
    pub seeds: SendStream,
    /// Pages out, requests in.
    pub demand: Vec<(SendStream, RecvStream)>,
}

/// What a push lane is told.
#[derive(Debug)]
pub enum PushCommand {
    /// Connect for this link epoch.
    Connect {
        /// The epoch.
        epoch: u32,
        /// The session.
        session: SessionId,
        /// Where to, and with what right: it may have been redirected.
        ticket: Box<Ticket>,
        /// How.
        options: LinkOptions,
        /// Told when the connection stands, or why not.
        done: oneshot::Sender<Result<(), LaneError>>,
    },
    /// Push pages.
    Start {
        /// The epoch to push in; ignored if the connection is of another.
        epoch: u32,
    },
    /// Push no page any more: none is read again once this is done.
    Stop {
        /// Told when it is.
        done: oneshot::Sender<()>,
    },
}

/// Has all push lanes connect, and meanwhile connects the urgent lane and opens its streams.
pub async fn dial(
    config: &SourceConfig,
    options: &LinkOptions,
    session: SessionId,
    epoch: u32,
    push_lanes: &[Sender<PushCommand>],
) -> Result<Link, LaneError> {
    failpoint!("source::before_dial", return Err(broken()));
    let streams = u32::from(config.vcpus) + 2;
    if streams > config.link.streams_max {
        let max = config.link.streams_max.saturating_sub(2);
        let why = format!("the guest has {} vCPUs; a link has streams for {max}", config.vcpus);
        return Err(LaneError::Local(why));
    }
    let pushing: Vec<_> = push_lanes
        .iter()
        .map(|lane| {
            let (done, connected) = oneshot::channel();
            let (ticket, options) = (Box::new(config.ticket.clone()), options.clone());
            let connect = PushCommand::Connect { epoch, session, ticket, options, done };
            let told = lane.try_send(connect);
            told.map_err(|error| {
                LaneError::Local(format!("a push lane takes no commands: {error}"))
            })?;
            Ok(connected)
        })
        .collect::<Result<_, LaneError>>()?;
    let lost = LaneError::lost::<quinn::ConnectionError>;
    let transport = connect(&config.ticket, options, Lane::Urgent).await?;
    failpoint!("source::after_urgent_connected", return Err(broken()));
    let connection = &transport.connection;
    let (control, control_in) = connection.open_bi().await.map_err(lost)?;
    // Without a right to it there is no stream's priority; the order is only a wish.
    let _ = control.set_priority(CONTROL_PRIORITY);
    let mut seeds = connection.open_uni().await.map_err(lost)?;
    greet(&mut seeds, 0).await?;
    let mut demand = Vec::new();
    for index in 0..=config.vcpus {
        let (mut pages, requests) = connection.open_bi().await.map_err(lost)?;
        greet(&mut pages, index).await?;
        demand.push((pages, requests));
    }
    for connected in pushing {
        connected.await.map_err(|_| LaneError::Local("a push lane has ended".into()))??;
    }
    let control_in = Some(control_in);
    Ok(Link { epoch, transport, control, control_in, seeds, demand })
}

async fn greet(stream: &mut SendStream, index: u16) -> Result<(), LaneError> {
    stream.write_all(&index.to_le_bytes()).await.map_err(LaneError::lost)
}

/// A push lane's life: connect and push when told, until the commands end.
pub async fn push_lane(
    shared: Arc<PushShared>,
    index: u8,
    mut commands: Receiver<PushCommand>,
    ended: impl Fn(u32, LaneError),
) {
    let mut link: Option<Pushing> = None;
    let mut connecting: Option<Connecting> = None;
    let mut linked_epoch = 0;
    let mut pushing = false;
    let mut shrinker = Shrinker::new();
    loop {
        let connected = async {
            match &mut connecting {
                Some(connecting) => connecting.made.as_mut().await,
                None => std::future::pending().await,
            }
        };
        let push = async {
            match &mut link {
                Some((link, stream)) if pushing => {
                    shared.push(&link.connection, stream, linked_epoch, &mut shrinker).await
                }
                // One that ends before it is needed is told at once: the guest is here still.
                Some((link, _)) => Err(LaneError::lost(link.connection.closed().await)),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            command = commands.recv() => match command {
                Some(PushCommand::Connect { epoch, session, ticket, options, done }) => {
                    // An attempt that is still under way, and the link before, end here: what
                    // follows is not to wait for them.
                    (pushing, link, linked_epoch) = (false, None, epoch);
                    let made = Box::pin(connect_push(ticket, options, index, epoch, session));
                    connecting = Some(Connecting { made, done });
                }
                Some(PushCommand::Start { epoch }) => pushing |= epoch == linked_epoch,
                Some(PushCommand::Stop { done }) => {
                    (pushing, connecting) = (false, None);
                    if let Some((link, mut stream)) = link.take() {
                        let _ = stream.reset(CLOSE_DONE.into());
                        link.connection.close(CLOSE_DONE.into(), b"no page leaves any more");
                    }
                    let _ = done.send(());
                }
                None => break,
            },
            made = connected => {
                // Nobody waits for one whose urgent lane could not be made: it is dropped.
                if let Some(Connecting { done, .. }) = connecting.take()
                    && !done.is_closed()
                {
                    let _ = done.send(made.map(|made| link = Some(made)));
                }
            }
            result = push => {
                (pushing, link) = (false, None);
                if let Err(error) = result {
                    ended(linked_epoch, error);
                }
            }
        }
    }
    if let Some((link, _)) = link {
        link.close(0, "done").await;
    }
}

/// A push lane's connection and its stream.
type Pushing = (transport::Link, SendStream);

/// A push connection that is being made, and who waits for it.
struct Connecting {
    made: Pin<Box<dyn Future<Output = Result<Pushing, LaneError>>>>,
    done: oneshot::Sender<Result<(), LaneError>>,
}

async fn connect(
    ticket: &Ticket,
    options: &LinkOptions,
    lane: Lane,
) -> Result<transport::Link, LaneError> {
    use TransportError::{Bind, Io, PortInUse, Resolve, Setup};
    transport::connect(ticket, lane, options).await.map_err(|error| {
        let why = crate::engine::error_chain(&error);
        match error {
            Bind { .. } | Io { .. } | PortInUse { .. } | Resolve { .. } | Setup { .. } => {
                LaneError::Local(why)
            }
            _ => LaneError::Link(why),
        }
    })
}

async fn connect_push(
    ticket: Box<Ticket>,
    options: LinkOptions,
    index: u8,
    epoch: u32,
    session: SessionId,
) -> Result<Pushing, LaneError> {
    failpoint!("source::before_push_connected", return Err(broken()));
    let link = connect(&ticket, &options, Lane::Push(index)).await?;
    let opened = link.connection.open_uni().await;
    let mut stream = opened.map_err(LaneError::lost)?;
    greet(&mut stream, u16::from(index)).await?;
    // Whose the urgent connection is, its first message tells; a push connection says it
    // itself, so that an old one's or a stranger's is never taken for the new one's.
    stream.write_all(&epoch.to_le_bytes()).await.map_err(LaneError::lost)?;
    stream.write_all(&session.0).await.map_err(LaneError::lost)?;
    failpoint!("source::after_push_connected", return Err(broken()));
    Ok((link, stream))
}

#[cfg(feature = "failpoints")]
fn broken() -> LaneError {
    LaneError::Link("a failpoint".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Identity;
    use crate::transport::ticket::Host;
    use std::net::Ipv4Addr;
    use tokio::sync::mpsc::channel;

    #[tokio::test]
    async fn a_push_lane_that_takes_no_commands_costs_the_attempt_and_nothing_waits_for_it() {
        let identity = Identity::generate(u64::from(u32::MAX)).unwrap();
        let config = SourceConfig {
            ticket: identity.ticket(Host::Ip(Ipv4Addr::LOCALHOST.into()), 1, vec![2]).unwrap(),
            link: LinkOptions::default(),
            limits: Default::default(),
            policy: Default::default(),
            pivots: None,
            drain_after: None,
            switchover: Default::default(),
            compress: Default::default(),
            machine: String::new(),
            guest: Vec::new(),
            vcpus: 1,
            guest_kind: String::new(),
            workload: None,
        };
        let (lane, mut commands) = channel(2);
        for epoch in 0..1000 {
            let (options, lanes) = (LinkOptions::default(), [lane.clone()]);
            let attempt = dial(&config, &options, SessionId([0; _]), epoch, &lanes);
            // The first ones are left as they are, like those whose time is over.
            let within = tokio::time::timeout(std::time::Duration::from_millis(20), attempt).await;
            if epoch >= 2 {
                let error = within.expect("it waits for nobody").unwrap_err();
                assert!(error.to_string().contains("takes no commands"), "{error}");
            }
        }
        let waiting = std::iter::from_fn(|| commands.try_recv().ok()).count();
        assert_eq!(waiting, 2);
    }
}
