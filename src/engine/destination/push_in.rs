//! The destination's push lanes: page frames in, pages placed.

use super::install::Installer;
use crate::engine::lane::LaneError;
use crate::proto::frame::{FrameHeader, FrameLimits, HEADER_LEN};
use crate::proto::page::{PAGE_SIZE, RUN_PAGES_MAX};
use crate::transport::wire_io::FrameReader;
use crate::transport::{Identity, Lane, LaneServer, LaneSocket, Link, LinkOptions, TransportError};
use quinn::Connection;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// What push lanes wait for before they take anything in, and what they count.
#[derive(Debug)]
pub struct PushGate {
    /// Where pages go, and the link epoch of those that are welcome; `None` until the
    /// proposal was accepted.
    pub open: watch::Sender<Option<(Arc<Installer>, u32)>>,
    /// Tells the lanes to end.
    pub over: watch::Sender<bool>,
    /// Content bytes received.
    pub pushed_bytes: AtomicU64,
    /// Each lane's link.
    links: Mutex<HashMap<u8, Connection>>,
    /// Bytes in UDP datagrams received and sent, of links that were replaced.
    replaced: [AtomicU64; 2],
}

impl Default for PushGate {
    fn default() -> Self {
        Self {
            open: watch::Sender::new(None),
            over: watch::Sender::new(false),
            pushed_bytes: AtomicU64::new(0),
            links: Mutex::default(),
            replaced: Default::default(),
        }
    }
}

impl PushGate {
    /// Bytes in UDP datagrams that all push lanes received and sent.
    pub fn wire_bytes(&self) -> [u64; 2] {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = [&self.replaced[0], &self.replaced[1]].map(|of| of.load(Ordering::Relaxed));
        for stats in links.values().map(Connection::stats) {
            bytes[0] += stats.udp_rx.bytes;
            bytes[1] += stats.udp_tx.bytes;
        }
        bytes
    }

    fn linked(&self, index: u8, connection: Connection) {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(replaced) = links.insert(index, connection) {
            let stats = replaced.stats();
            self.replaced[0].fetch_add(stats.udp_rx.bytes, Ordering::Relaxed);
            self.replaced[1].fetch_add(stats.udp_tx.bytes, Ordering::Relaxed);
        }
    }
}

/// A push lane's life on the destination: accept, take in, and again after a lost
/// link, until the gate says that it is over. `ended` hears how each link ended.
pub async fn receive_lane(
    socket: LaneSocket,
    identity: Identity,
    index: u8,
    options: LinkOptions,
    gate: Arc<PushGate>,
    ended: impl Fn(LaneError),
) -> Result<(), TransportError> {
    let mut server = LaneServer::listen(socket, &identity, Lane::Push(index), options)?;
    let mut over = gate.over.subscribe();
    let mut link: Option<Link> = None;
    loop {
        let receive = async {
            match &link {
                Some(link) => receive_link(link, &gate).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = over.wait_for(|over| *over) => break,
            // A new link replaces the old one, which is lost.
            accepted = server.accept() => {
                let accepted = accepted?;
                gate.linked(index, accepted.connection.clone());
                link = Some(accepted);
            }
            error = receive => {
                link = None;
                ended(error);
            }
        }
    }
    if let Some(link) = link {
        link.close(0, "done").await;
    }
    Ok(())
}

async fn receive_link(link: &Link, gate: &PushGate) -> LaneError {
    match receive_frames(link, gate).await {
        Ok(()) => LaneError::Link("the source ended its push stream".into()),
        Err(error) => error,
    }
}

async fn receive_frames(link: &Link, gate: &PushGate) -> Result<(), LaneError> {
    let mut stream = link.connection.accept_uni().await.map_err(LaneError::lost)?;
    let mut index = [0; 2];
    stream.read_exact(&mut index).await.map_err(LaneError::lost)?;
    let mut open = gate.open.subscribe();
    // Nothing of a peer is looked at before its proposal was accepted.
    let opened = open.wait_for(Option::is_some).await.map(|gate| gate.clone());
    let Ok(Some((installer, _))) = opened else { return Ok(()) };
    let content_max = RUN_PAGES_MAX as usize * PAGE_SIZE;
    let mut frames = FrameReader::new(stream, HEADER_LEN, content_max);
    loop {
        let limits = || {
            let epoch = gate.open.borrow().as_ref().map_or(0, |(_, epoch)| *epoch);
            FrameLimits { pages: installer.ledger.pages(), epoch }
        };
        let Some(frame) = frames.next(|header| parse(header, limits())).await.map_err(wire)? else {
            return Ok(());
        };
        let content = frame.payload.into_bytes();
        // The thread that reads events clears what is pending meanwhile.
        installer.install(&frame.header, &content, &mut || {})?;
        gate.pushed_bytes.fetch_add(content.len() as u64, Ordering::Relaxed);
    }
}

/// Parses a page frame's header for a [`FrameReader`].
pub fn parse(
    header: &[u8],
    limits: FrameLimits,
) -> Result<(FrameHeader, usize), crate::proto::frame::FrameError> {
    let mut bytes = [0; HEADER_LEN];
    bytes.copy_from_slice(header);
    let header = FrameHeader::parse(&bytes, limits)?;
    let length = header.content_len;
    Ok((header, length))
}

/// Tells a peer that breaks the protocol from a link that broke.
pub fn wire(error: TransportError) -> LaneError {
    match error {
        TransportError::Malformed { .. } | TransportError::TooLong { .. } => {
            LaneError::Violation(crate::engine::error_chain(&error))
        }
        error => LaneError::Link(crate::engine::error_chain(&error)),
    }
}
