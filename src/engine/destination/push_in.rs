//! The destination's push lanes: page frames in, pages placed.

use super::install::Installer;
use crate::engine::lane::LaneError;
use crate::failpoint::failpoint;
use crate::proto::compression::codec::Decompressor;
use crate::proto::frame::{FrameHeader, FrameLimits, HEADER_LEN, PageKind};
use crate::proto::message::SessionId;
use crate::proto::page::{PAGE_SIZE, RUN_PAGES_MAX};
use crate::transport::wire_io::FrameReader;
use crate::transport::{Identity, Lane, LaneServer, LaneSocket, Link, LinkOptions, TransportError};
use crate::uffd::Content;
use quinn::{Connection, RecvStream};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Connections that may be about to say whose they are.
const GREETING_MAX: usize = 16;
/// How long a connection may take to say whose it is.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// QUIC error code for a ticket that has been used.
pub const CLOSE_USED: u32 = 2;

/// What push lanes wait for before they take anything in, and what they count.
#[derive(Debug)]
pub struct PushGate {
    /// Which pages are welcome, and where they go; `None` until the proposal was accepted.
    pub open: watch::Sender<Option<Opened>>,
    /// The migration whose links are welcome, once it is known.
    pub session: watch::Sender<Option<SessionId>>,
    /// Tells the lanes to end.
    pub over: watch::Sender<bool>,
    /// Content bytes received, compressed as they came.
    pub pushed_bytes: AtomicU64,
    /// Each lane's link.
    links: Mutex<HashMap<u8, Connection>>,
    /// Bytes in UDP datagrams received and sent, of links that were replaced.
    replaced: [AtomicU64; 2],
}

/// Pages that are welcome.
#[derive(Clone, Debug)]
pub struct Opened {
    /// Where they go.
    pub installer: Arc<Installer>,
    /// The link epoch that they are of.
    pub epoch: u32,
    /// Whether they may be compressed.
    pub compressed: bool,
}

impl Default for PushGate {
    fn default() -> Self {
        Self {
            open: watch::Sender::new(None),
            session: watch::Sender::new(None),
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

/// How a push lane's link in use ended last, until the driver takes it: a peer can make new
/// ones, and end them, faster than a driver that stands still for a while looks.
#[derive(Clone, Debug, Default)]
pub struct PushEnd(Arc<Mutex<Option<(u32, LaneError)>>>);

impl PushEnd {
    /// Puts it in the place of the one before, which was of an earlier link epoch; whether there
    /// was none.
    pub fn put(&self, epoch: u32, error: LaneError) -> bool {
        self.lock().replace((epoch, error)).is_none()
    }

    /// What was put in last, and its link epoch.
    pub fn take(&self) -> Option<(u32, LaneError)> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<(u32, LaneError)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A push connection that has said whose it is.
struct Greeted {
    link: Link,
    stream: RecvStream,
    epoch: u32,
}

/// A push lane's life on the destination: accept, take in, and again after a lost
/// link, until the gate says that it is over. `ended` hears how the link in use ended,
/// and of which epoch it was.
pub async fn receive_lane(
    socket: LaneSocket,
    identity: Identity,
    index: u8,
    options: LinkOptions,
    gate: Arc<PushGate>,
    ended: impl Fn(u32, LaneError),
) -> Result<(), TransportError> {
    let mut server = LaneServer::listen(socket, &identity, Lane::Push(index), options)?;
    let mut over = gate.over.subscribe();
    let mut greeting = JoinSet::new();
    let mut receiving: JoinSet<(u32, LaneError)> = JoinSet::new();
    let mut current: Option<(Link, u32)> = None;
    loop {
        tokio::select! {
            biased;
            _ = over.wait_for(|over| *over) => break,
            accepted = server.accept() => {
                let link = accepted?;
                if greeting.len() < GREETING_MAX {
                    greeting.spawn(greeted(link, gate.clone()));
                }
            }
            Some(greeted) = greeting.join_next() => {
                let Ok(Some(Greeted { link, stream, epoch })) = greeted else { continue };
                // Only a later link of this session takes the place of one that stands.
                if current.as_ref().is_none_or(|(_, of)| *of < epoch) {
                    gate.linked(index, link.connection.clone());
                    receiving.abort_all();
                    receiving.spawn(receive_frames(stream, epoch, gate.clone()));
                    current = Some((link, epoch));
                }
            }
            Some(received) = receiving.join_next() => {
                if let Ok((epoch, error)) = received {
                    ended(epoch, error);
                }
            }
        }
    }
    if let Some((link, _)) = current {
        link.close(0, "done").await;
    }
    Ok(())
}

/// Hears whose a connection is. One of another session is closed, and only it.
async fn greeted(link: Link, gate: Arc<PushGate>) -> Option<Greeted> {
    failpoint!("destination::after_push_accepted", return None);
    let hear = async {
        let mut stream = link.connection.accept_uni().await.ok()?;
        let mut greeting = [0; 22];
        stream.read_exact(&mut greeting).await.ok()?;
        let [_, _, epoch @ ..] = greeting.first_chunk::<6>()?;
        let session = SessionId(*greeting.last_chunk()?);
        Some((stream, u32::from_le_bytes(*epoch), session))
    };
    let (stream, epoch, session) = tokio::time::timeout(GREETING_TIME, hear).await.ok()??;
    let mut sessions = gate.session.subscribe();
    let ours = *sessions.wait_for(Option::is_some).await.ok()?;
    if ours != Some(session) {
        link.connection.close(CLOSE_USED.into(), b"this ticket has been used");
        return None;
    }
    Some(Greeted { link, stream, epoch })
}

/// Takes a link's pages in until it ends.
async fn receive_frames(stream: RecvStream, epoch: u32, gate: Arc<PushGate>) -> (u32, LaneError) {
    let received = async {
        let mut open = gate.open.subscribe();
        // Nothing of a peer is looked at before its proposal, or its return, was accepted.
        let is_open = |gate: &Option<Opened>| gate.as_ref().is_some_and(|of| of.epoch >= epoch);
        let opened = open.wait_for(is_open).await.map(|gate| gate.clone());
        let Ok(Some(Opened { installer, compressed, .. })) = opened else { return Ok(()) };
        let limits = FrameLimits { pages: installer.ledger.pages(), epoch, compressed };
        let content_max = RUN_PAGES_MAX as usize * PAGE_SIZE;
        let mut frames = FrameReader::new(stream, HEADER_LEN, content_max);
        let mut decompressor: Option<Box<Decompressor>> = None;
        while let Some(frame) = frames.next(|header| parse(header, limits)).await.map_err(wire)? {
            let (mut header, pieces) = (frame.header, frame.payload.pieces());
            let mut content = Content::of_pieces(pieces);
            if header.kind == PageKind::Compressed {
                header = header.decompressed();
                let decompressor = decompressor.get_or_insert_default();
                let pages = decompressor.decompress(content.pieces(), header.content_len);
                let hostile = |error| LaneError::Violation(crate::engine::error_chain(&error));
                content = Content::from(pages.map_err(hostile)?);
            }
            // The thread that reads events clears what is pending meanwhile.
            installer.install(&header, content, Instant::now(), &mut || {}).await?;
            gate.pushed_bytes.fetch_add(frame.payload.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    };
    let error = match received.await {
        Ok(()) => LaneError::Link("the source ended its push stream".into()),
        Err(error) => error,
    };
    (epoch, error)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_ends_of_a_push_lane_the_last_one_waits_for_the_driver() {
        let end = PushEnd::default();
        let told = (0..1000).filter(|&epoch| end.put(epoch, LaneError::Link("gone".into())));
        assert_eq!(told.count(), 1, "the driver is told once");
        assert!(matches!(end.take(), Some((999, _))));
        assert!(end.take().is_none());
        assert!(end.put(1000, LaneError::Link("gone".into())), "and once more");
    }
}
