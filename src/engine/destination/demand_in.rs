//! The demand streams on the destination: requests out, demanded pages and seeds in.

use super::driver::Input;
use super::install::Installer;
use super::push_in;
use super::trap_loop::{Requests, TrapLoop};
use crate::engine::lane::LaneError;
use crate::failpoint::failpoint;
use crate::proto::frame::{FrameLimits, HEADER_LEN, PageRequest};
use crate::proto::page::{PAGE_SIZE, RUN_PAGES_MAX};
use crate::transport::wire_io::FrameReader;
use crate::uffd::Content;
use quinn::{Connection, RecvStream, SendStream};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::task::JoinError;

/// The queues of the demand streams, one for each vCPU and one for the rest.
#[derive(Clone, Default)]
pub struct DemandQueues(pub Rc<std::cell::RefCell<Vec<UnboundedSender<PageRequest>>>>);

impl Requests for DemandQueues {
    fn ask(&self, request: PageRequest) {
        let queues = self.0.borrow();
        let own = request.vcpu.and_then(|vcpu| queues.get(usize::from(vcpu)));
        if let Some(queue) = own.or(queues.last()) {
            // A closed queue belongs to a lost link; what was asked is asked again then.
            let _ = queue.send(request);
        }
    }
}

/// The urgent connection's page streams on this side.
pub struct DemandLanes {
    pub connection: Connection,
    pub installer: Arc<Installer>,
    pub traps: Rc<TrapLoop<DemandQueues>>,
    pub epoch: u32,
    pub generation: u64,
    pub input: UnboundedSender<Input>,
}

impl DemandLanes {
    /// Accepts the streams that the source has opened, and serves them.
    pub async fn open(self, outgoing: Vec<UnboundedReceiver<PageRequest>>) {
        if let Err(error) = self.serve(outgoing).await {
            let _ = self.input.send(Input::LinkEnded { generation: self.generation, error });
        }
    }

    async fn serve(&self, outgoing: Vec<UnboundedReceiver<PageRequest>>) -> Result<(), LaneError> {
        let lost = LaneError::lost::<quinn::ConnectionError>;
        let mut serving = tokio::task::JoinSet::new();
        let mut seeds = self.connection.accept_uni().await.map_err(lost)?;
        greeted(&mut seeds).await?;
        serving.spawn_local(self.receive(seeds));
        let mut outgoing: Vec<_> = outgoing.into_iter().map(Some).collect();
        for _ in 0..outgoing.len() {
            let mut opened = std::pin::pin!(self.demand_stream());
            let (index, requests, pages) = loop {
                tokio::select! {
                    opened = &mut opened => break opened?,
                    // A stream that is served already may fail before the next one opens.
                    Some(ended) = serving.join_next() => ended_well(ended)?,
                }
            };
            let queue = outgoing.get_mut(index).and_then(Option::take);
            let queue = queue.ok_or_else(|| {
                LaneError::Violation(format!("demand stream {index} opened twice or too many"))
            })?;
            serving.spawn_local(self.receive(pages));
            serving.spawn_local(send_requests(queue, requests, self.installer.clone()));
        }
        while let Some(ended) = serving.join_next().await {
            ended_well(ended)?;
        }
        Ok(())
    }

    /// The next demand stream that the source opens, and its index.
    async fn demand_stream(&self) -> Result<(usize, SendStream, RecvStream), LaneError> {
        let (requests, mut pages) =
            self.connection.accept_bi().await.map_err(LaneError::lost::<quinn::ConnectionError>)?;
        let index = greeted(&mut pages).await?;
        Ok((usize::from(index), requests, pages))
    }

    /// Takes in the pages of one stream until the link is gone.
    fn receive(&self, stream: RecvStream) -> impl Future<Output = Result<(), LaneError>> + 'static {
        let (installer, traps, epoch) = (self.installer.clone(), self.traps.clone(), self.epoch);
        async move {
            // Somebody waits for these pages: they are never compressed.
            let pages = installer.ledger.pages();
            let limits = FrameLimits { pages, epoch, compressed: false };
            let content_max = RUN_PAGES_MAX as usize * PAGE_SIZE;
            let mut frames = FrameReader::new(stream, HEADER_LEN, content_max);
            loop {
                let next = frames.next(|header| push_in::parse(header, limits));
                let Some(frame) = next.await.map_err(push_in::wire)? else {
                    return Err(LaneError::Link("the source ended a page stream".into()));
                };
                let arrived = Instant::now();
                let content = Content::of_pieces(frame.payload.pieces());
                let mut again = || traps.again();
                installer.install(&frame.header, content, arrived, &mut again).await?;
            }
        }
    }
}

fn ended_well(task: Result<Result<(), LaneError>, JoinError>) -> Result<(), LaneError> {
    task.map_err(|error| LaneError::Local(error.to_string()))?
}

/// Sends the requests of one queue until its link is gone.
async fn send_requests(
    mut queue: UnboundedReceiver<PageRequest>,
    mut stream: SendStream,
    installer: Arc<Installer>,
) -> Result<(), LaneError> {
    while let Some(request) = queue.recv().await {
        failpoint!("destination::before_request_sent", return Err(broken()));
        stream.write_all(&request.encode()).await.map_err(LaneError::lost)?;
        let waited_for = installer.placer.unit_of(request.run.first()).first();
        installer.book.sent(waited_for, Instant::now());
        failpoint!("destination::after_request_sent", return Err(broken()));
    }
    Ok(())
}

#[cfg(feature = "failpoints")]
fn broken() -> LaneError {
    LaneError::Link("a failpoint".into())
}

/// Reads the index that a stream begins with.
async fn greeted(stream: &mut RecvStream) -> Result<u16, LaneError> {
    let mut index = [0; 2];
    stream.read_exact(&mut index).await.map_err(LaneError::lost)?;
    Ok(u16::from_le_bytes(index))
}
