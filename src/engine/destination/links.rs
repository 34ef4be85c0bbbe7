//! The urgent connections of a destination: accepted, listened to, and closed.

use super::driver::Input;
use crate::engine::control::{self, ControlError};
use crate::engine::lane::LaneError;
use crate::failpoint::failpoint;
use crate::proto::message::{Mismatch, ToDestination};
use crate::transport::LaneServer;
use quinn::{Connection, RecvStream, SendStream};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tracing::{info, warn};

/// How long a peer with a ticket may take to propose.
const FIRST_MESSAGE: Duration = Duration::from_secs(5);
/// The most connections that have not said their first message, or said it to a driver that
/// stands still for a while.
const WAITING_MAX: usize = 32;
/// How long the last message may take to be acknowledged.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A connection that has said its first message.
#[derive(Debug)]
pub struct NewLink {
    pub connection: Connection,
    pub control: SendStream,
    pub control_in: RecvStream,
    pub first: Result<ToDestination, Mismatch>,
    pub room: OwnedSemaphorePermit,
}

/// Accepts urgent connections for as long as the session lives; each is announced with
/// its first message.
pub async fn accept_links(mut server: LaneServer, input: UnboundedSender<Input>) {
    let rooms = Arc::new(Semaphore::new(WAITING_MAX));
    loop {
        let connection = match server.accept().await {
            Ok(link) => link.connection,
            Err(error) => return warn!(%error, "the urgent lane accepts no more"),
        };
        let Ok(room) = rooms.clone().try_acquire_owned() else {
            connection.close(1u32.into(), b"too many connections at once");
            continue;
        };
        let input = input.clone();
        tokio::task::spawn_local(async move {
            match tokio::time::timeout(FIRST_MESSAGE, first_message(&connection)).await {
                Ok(Ok((control, control_in, first))) => {
                    let link = NewLink { connection, control, control_in, first, room };
                    let _ = input.send(Input::Linked(Box::new(link)));
                }
                Ok(Err(error)) => {
                    info!(%error, "a connection without a proposal");
                    connection.close(1u32.into(), error.to_string().as_bytes());
                }
                Err(_) => connection.close(1u32.into(), b"no proposal came in time"),
            }
        });
    }
}

async fn first_message(
    connection: &Connection,
) -> Result<(SendStream, RecvStream, Result<ToDestination, Mismatch>), ControlError> {
    failpoint!("destination::after_urgent_accepted", return Err(broken()));
    let opened = connection.accept_bi().await;
    let (control, mut control_in) =
        opened.map_err(|error| ControlError::Link(crate::engine::link_words(error)))?;
    let body = control::hear(&mut control_in).await?;
    let first = ToDestination::decode_first(&body)?;
    failpoint!("destination::after_first_message", return Err(broken()));
    Ok((control, control_in, first))
}

#[cfg(feature = "failpoints")]
fn broken() -> ControlError {
    ControlError::Link("a failpoint".into())
}

/// Gives what was said last the time to arrive.
pub async fn last_words(control: &mut SendStream, connection: &Connection) {
    let _ = control.finish();
    let heard = async {
        let _ = control.stopped().await;
        // The source closes when it has read everything.
        let _ = connection.closed().await;
    };
    let _ = tokio::time::timeout(LAST_WORDS, heard).await;
}

pub fn spawn_listener(
    mut control: RecvStream,
    generation: u64,
    input: UnboundedSender<Input>,
) -> AbortHandle {
    tokio::task::spawn_local(async move {
        let ear = control::ear();
        let error = loop {
            let Ok(_room) = ear.clone().acquire_owned().await else { return };
            let heard = control::hear(&mut control).await;
            match heard.and_then(|body| Ok(ToDestination::decode(&body)?)) {
                Ok(message) => {
                    if input.send(Input::Heard { generation, message, _room }).is_err() {
                        return;
                    }
                }
                Err(error) => break error,
            }
        };
        let error = match error {
            ControlError::Link(why) => LaneError::Link(why),
            ControlError::Message(error) => LaneError::Violation(error.to_string()),
        };
        let _ = input.send(Input::LinkEnded { generation, error });
    })
    .abort_handle()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::ticket::Host;
    use crate::transport::{Identity, Lane, LinkOptions, bind_server, connect};
    use std::net::Ipv4Addr;
    use tokio::sync::mpsc::unbounded_channel;

    #[tokio::test(flavor = "local")]
    async fn connections_that_say_nothing_are_so_many_and_no_more() {
        let options = LinkOptions::default();
        let identity = Identity::generate(u64::from(u32::MAX)).unwrap();
        let loopback = Ipv4Addr::LOCALHOST.into();
        let (lane, any) = (Lane::Urgent, (Ipv4Addr::LOCALHOST, 0).into());
        let server = bind_server(any, &identity, lane, options.clone()).unwrap();
        let port = server.endpoint().local_addr().unwrap().port();
        let ticket = identity.ticket(Host::Ip(loopback), port, vec![port]).unwrap();
        let (input, mut inputs) = unbounded_channel();
        tokio::task::spawn_local(accept_links(server, input));
        let mut silent = Vec::new();
        for _ in 0..WAITING_MAX {
            silent.push(connect(&ticket, lane, &options).await.unwrap());
        }
        let within = Duration::from_secs(3);
        for _ in 0..4 {
            let more = connect(&ticket, lane, &options).await.unwrap();
            let closed = tokio::time::timeout(within, more.connection.closed()).await;
            let why = closed.expect("one too many").to_string();
            assert!(why.contains("too many connections at once"), "{why}");
        }
        assert!(silent.iter().all(|link| link.connection.close_reason().is_none()));
        assert!(inputs.try_recv().is_err());
        // One that goes makes room for another.
        silent.pop().unwrap().close(0, "done").await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let more = connect(&ticket, lane, &options).await.unwrap();
        let closed = tokio::time::timeout(Duration::from_millis(300), more.connection.closed());
        assert!(closed.await.is_err(), "there was room");
    }
}
