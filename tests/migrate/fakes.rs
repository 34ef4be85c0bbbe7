//! A source and a destination that say what the test wants, over the real transport.
//!
//! Each has a runtime of its own, and a limit on every step.

use super::harness::SOON;
use postcopy::host::GuestDescription;
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::message::{self, Hello, SessionId, ToDestination, ToSource};
use postcopy::proto::page::PAGE_SIZE;
use postcopy::transport::ticket::{Host, Secret};
use postcopy::transport::{
    Identity, Lane, LaneServer, Link, LinkOptions, Ticket, TransportError, bind_ports, connect,
};
use postcopy::vmm::guest::GuestKind;
use postcopy::vmm::workload::{MachineForm, Pattern, Workload};
use quinn::{RecvStream, SendStream};
use std::net::{IpAddr, Ipv4Addr};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// A runtime on a thread of its own, which keeps connections going while the test looks
/// elsewhere.
struct Driver {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Driver {
    fn start() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let drive = move || drop(runtime.block_on(stopped));
        Self { handle, stop: Some(stop), thread: Some(std::thread::spawn(drive)) }
    }

    /// Runs one step under a limit.
    fn run<T>(&self, what: &str, step: impl Future<Output = T>) -> T {
        let limited = self.handle.block_on(async { timeout(SOON, step).await });
        limited.unwrap_or_else(|_| panic!("{what}: not within {SOON:?}"))
    }
}

impl Drop for Driver {
    /// Nothing is sent or heard any more after this.
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Reads one message; what ended the link if none comes.
async fn hear<M>(
    stream: &mut RecvStream,
    decode: impl FnOnce(&[u8]) -> Result<M, message::MessageError>,
) -> Result<M, String> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.map_err(|error| format!("{error:?}"))?;
    let length = message::body_len(prefix).expect("the binary sends no such length");
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.map_err(|error| format!("{error:?}"))?;
    Ok(decode(&body).expect("the binary sends proper messages"))
}

/// The name of every fake source's migration.
const SESSION: SessionId = SessionId(*b"fake migration 1");

/// The proposal that a real source would make for a process guest of `pages` pages.
/// It is taken by every destination of this build.
pub fn proposal(pages: u64) -> Hello {
    let workload = Workload {
        pattern: Pattern::Random,
        seed: 1,
        vcpus: 1,
        think_ns: 0,
        step_limit: 0,
        zero_pages: 0,
        form: MachineForm::default(),
        trace: None,
    };
    let guest =
        GuestDescription { kind: GuestKind::Process, workload, trace: None, processor: None };
    let layout = MemoryLayout::pc(pages).expect("a layout");
    let arch = std::env::consts::ARCH;
    let machine = format!(
        "process guest 2, {arch}, 1 vCPUs, {pages} pages, 0 zero pages, pattern Random, seed 0x1"
    );
    Hello { guest: guest.to_json().into_bytes(), ..Hello::new(SESSION, layout, machine) }
}

/// A source with the ticket, and nothing behind it.
pub struct FakeSource {
    driver: Driver,
    ticket: Ticket,
    link: Link,
    control: SendStream,
    control_in: RecvStream,
    /// Kept open: a stream that is dropped is reset.
    streams: Vec<SendStream>,
    push: Option<Link>,
}

impl FakeSource {
    /// Connects the urgent lane and opens the control stream.
    pub fn connect(ticket: &str) -> Self {
        let ticket: Ticket = ticket.parse().expect("the binary prints tickets");
        let driver = Driver::start();
        let options = LinkOptions::default();
        let (link, control, control_in) = driver.run("connecting", async {
            let link = connect(&ticket, Lane::Urgent, &options).await.expect("admitted");
            let (control, control_in) = link.connection.open_bi().await.expect("a stream");
            (link, control, control_in)
        });
        Self { driver, ticket, link, control, control_in, streams: Vec::new(), push: None }
    }

    /// Connects and has this proposal accepted.
    pub fn accepted(ticket: &str, hello: Hello) -> Self {
        let mut source = Self::connect(ticket);
        source.say(&ToDestination::Hello(hello));
        let answer = source.hear();
        assert!(matches!(answer, Ok(ToSource::Accept { .. })), "{answer:?}");
        source
    }

    /// Says something.
    pub fn say(&mut self, message: &ToDestination) {
        self.say_bytes(&message::encode(message));
    }

    /// Sends bytes on the control stream.
    pub fn say_bytes(&mut self, bytes: &[u8]) {
        let Self { driver, control, .. } = self;
        driver.run("saying", control.write_all(bytes)).expect("the link stands");
    }

    /// Hears something, or why nothing more comes.
    pub fn hear(&mut self) -> Result<ToSource, String> {
        let Self { driver, control_in, .. } = self;
        driver.run("hearing", hear(control_in, ToSource::decode))
    }

    /// Opens the streams for seeds and for the demands of one vCPU and of nobody, as a
    /// source does, and sends `bytes` as seeds.
    pub fn send_seeds(&mut self, bytes: &[u8]) {
        let Self { driver, link, streams, .. } = self;
        driver.run("sending seeds", async {
            let mut seeds = link.connection.open_uni().await.expect("a stream");
            seeds.write_all(&[0, 0]).await.expect("the link stands");
            for index in [0, 1] {
                let (mut demand, _) = link.connection.open_bi().await.expect("a stream");
                demand.write_all(&[index, 0]).await.expect("the link stands");
                streams.push(demand);
            }
            seeds.write_all(bytes).await.expect("the link stands");
            streams.push(seeds);
        });
    }

    /// Opens the stream for seeds and none of the others, and sends `bytes` on it.
    pub fn send_seeds_alone(&mut self, bytes: &[u8]) {
        let Self { driver, link, streams, .. } = self;
        driver.run("sending seeds", async {
            let mut seeds = link.connection.open_uni().await.expect("a stream");
            seeds.write_all(&[0, 0]).await.expect("the link stands");
            seeds.write_all(bytes).await.expect("the link stands");
            streams.push(seeds);
        });
    }

    /// Connects the first push lane and sends `bytes` on it.
    pub fn push(&mut self, bytes: &[u8]) {
        let Self { driver, ticket, .. } = self;
        let options = LinkOptions::default();
        let (link, stream) = driver.run("pushing", async {
            let link = connect(ticket, Lane::Push(0), &options).await.expect("admitted");
            let mut stream = link.connection.open_uni().await.expect("a stream");
            // Lane 0, link epoch 0, session.
            stream.write_all(&[0; 6]).await.expect("the link stands");
            stream.write_all(&SESSION.0).await.expect("the link stands");
            stream.write_all(bytes).await.expect("the link stands");
            (link, stream)
        });
        self.streams.push(stream);
        self.push = Some(link);
    }

    /// Waits until the link has ended and says why.
    pub fn ended(&mut self) -> String {
        let Self { driver, link, .. } = self;
        driver.run("the end of the link", link.connection.closed()).to_string()
    }

    /// Closes the link, with this reason.
    pub fn close(self, reason: &str) {
        self.driver.run("closing", self.link.close(1, reason));
    }

    /// Goes away without a word, as a process that is killed or a host that loses power.
    pub fn vanish(self) {
        // What drives the connections stops first, so that no close is sent.
        drop(self.driver);
    }
}

/// A destination with a ticket, and nothing behind it.
pub struct FakeDestination {
    driver: Driver,
    /// Lets a source in.
    pub ticket: String,
    urgent: LaneServer,
    push: LaneServer,
    links: Vec<Link>,
    control: Option<(SendStream, RecvStream)>,
    /// Kept open: a stream that is dropped is reset.
    demand: Vec<(SendStream, RecvStream)>,
}

impl FakeDestination {
    /// Listens; the ticket is good for ten minutes.
    pub fn listen() -> Self {
        Self::listen_until(now() + 600)
    }

    /// Listens with a ticket that has expired.
    pub fn listen_expired() -> Self {
        Self::listen_until(now() - 60)
    }

    fn listen_until(expires: u64) -> Self {
        let driver = Driver::start();
        let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let options = LinkOptions::default();
        let identity = Identity::generate(expires).expect("an identity");
        let sockets = bind_ports(host, 0, 1, &options).expect("two free ports");
        let ports: Vec<u16> = sockets.iter().map(|socket| socket.local_addr().port()).collect();
        let ticket = identity.ticket(Host::from(host), ports[0], vec![ports[1]]);
        let ticket = ticket.expect("a ticket").to_string();
        let entered = driver.handle.enter();
        let mut servers = [Lane::Urgent, Lane::Push(0)]
            .into_iter()
            .zip(sockets)
            .map(|(lane, socket)| LaneServer::listen(socket, &identity, lane, options.clone()));
        let mut server = || servers.next().expect("two lanes").expect("listens");
        let (urgent, push) = (server(), server());
        drop(entered);
        Self { driver, ticket, urgent, push, links: Vec::new(), control: None, demand: Vec::new() }
    }

    /// Runs for as long as `process` does, and lets nobody in.
    pub fn refuse_while(&mut self, mut runs: impl FnMut() -> bool) {
        let Self { driver, urgent, .. } = self;
        driver.run("a refused source's end", async {
            while runs() {
                let accepted: Result<Result<Link, TransportError>, _> =
                    timeout(std::time::Duration::from_millis(20), urgent.accept()).await;
                assert!(accepted.is_err(), "a source was admitted: {accepted:?}");
            }
        });
    }

    /// Takes a source's links and its proposal.
    pub fn proposed(&mut self) -> Hello {
        match self.comes() {
            ToDestination::Hello(hello) => hello,
            other => panic!("the source began with {other:?}"),
        }
    }

    /// Takes a source's links and what it says first.
    pub fn comes(&mut self) -> ToDestination {
        let Self { driver, urgent, push, .. } = self;
        let (links, control, first) = driver.run("a proposal", async {
            let urgent = urgent.accept().await.expect("the source's urgent link");
            let (control, mut control_in) =
                urgent.connection.accept_bi().await.expect("the control stream");
            let push = push.accept().await.expect("the source's push link");
            let first = hear(&mut control_in, ToDestination::decode).await;
            (vec![urgent, push], (control, control_in), first)
        });
        self.links = links;
        self.control = Some(control);
        first.expect("a first message")
    }

    /// Says something.
    pub fn say(&mut self, message: &ToSource) {
        self.say_bytes(&message::encode(message));
    }

    /// Sends bytes on the control stream.
    pub fn say_bytes(&mut self, bytes: &[u8]) {
        let Self { driver, control, .. } = self;
        let (control, _) = control.as_mut().expect("a link");
        driver.run("saying", control.write_all(bytes)).expect("the link stands");
    }

    /// Hears something.
    pub fn hear(&mut self) -> Result<ToDestination, String> {
        let Self { driver, control, .. } = self;
        let (_, control) = control.as_mut().expect("a link");
        driver.run("hearing", hear(control, ToDestination::decode))
    }

    /// Accepts the proposal and takes the machine state: the guest runs nowhere now.
    pub fn takes_state(&mut self) {
        self.proposed();
        self.say(&ToSource::Accept { version: message::PROTOCOL_VERSION });
        let state = self.hear();
        assert!(matches!(state, Ok(ToDestination::State { .. })), "{state:?}");
    }

    /// Asks for pages, as a vCPU's network fault does.
    pub fn ask(&mut self, first: u64, count: u32) {
        let request = [
            &first.to_le_bytes()[..],
            &count.to_le_bytes(),
            // vCPU 0, a reserved field, link epoch 0, a reserved field.
            &[0; 12],
        ]
        .concat();
        let Self { driver, links, .. } = self;
        let stream = driver.run("asking", async {
            let (mut requests, pages) = links[0].connection.accept_bi().await.expect("a stream");
            requests.write_all(&request).await.expect("the link stands");
            (requests, pages)
        });
        self.demand.push(stream);
    }

    /// Closes the links, with this reason.
    pub fn close(self, reason: &str) {
        let Self { driver, links, .. } = self;
        driver.run("closing", async {
            for link in links {
                link.close(1, reason).await;
            }
        });
    }

    /// Goes away without a word, as a process that is killed or a host that loses power.
    pub fn vanish(self) {
        drop(self.driver);
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// The same ticket but for its secret or its fingerprint, in which a bit is flipped.
pub fn forged(ticket: &str, secret_flip: u8, fingerprint_flip: u8) -> String {
    let ticket: Ticket = ticket.parse().expect("the binary prints tickets");
    let mut secret = *ticket.secret().expose();
    secret[7] ^= secret_flip;
    let mut fingerprint = *ticket.server_fingerprint();
    fingerprint[7] ^= fingerprint_flip;
    let port = |lane| ticket.port(lane).expect("a port");
    let push = (0..ticket.push_lanes() as u8).map(|lane| port(Lane::Push(lane))).collect();
    let host = ticket.host().clone();
    let secret = Secret::new(secret);
    let forged = Ticket::new(host, port(Lane::Urgent), push, fingerprint, secret, ticket.expires());
    forged.expect("a ticket").to_string()
}

/// A page frame's header as it goes over the wire.
pub fn frame_header(
    kind: u8,
    origin: u8,
    epoch: u32,
    first: u64,
    count: u32,
    length: u32,
) -> Vec<u8> {
    [
        &[kind, origin, 0, 0][..],
        &epoch.to_le_bytes(),
        &first.to_le_bytes(),
        &count.to_le_bytes(),
        &length.to_le_bytes(),
    ]
    .concat()
}

/// One proper page frame of the first page of a run.
pub fn frame(first: u64) -> Vec<u8> {
    let mut bytes = frame_header(0, 0, 0, first, 1, PAGE_SIZE as u32);
    bytes.resize(bytes.len() + PAGE_SIZE, 0x5a);
    bytes
}
