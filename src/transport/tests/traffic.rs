//! What gets through, compared byte for byte, over links of several MTUs.

use super::{super::*, Watchdog, in_an_hour, loopback};
use crate::transport::{
    relay::{Relay, RelayConfig, targets},
    wire_io::{FrameReader, read_exact_into, read_message, write_bytes, write_message},
};
use bytes::{BufMut, Bytes, BytesMut};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use std::time::{Duration, Instant};

const HEADER: usize = 24;
const CHUNK: usize = 128 << 10;
const PAGE: usize = 4096;

/// What the n-th frame or page must contain.
fn content(index: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    SmallRng::seed_from_u64(index).fill_bytes(&mut bytes);
    bytes
}

fn frame(index: u64) -> Bytes {
    // Of several lengths, so that frames begin anywhere in a datagram; some are empty.
    let length = if index % 9 == 8 { 0 } else { CHUNK - (index as usize % 3) * 1000 };
    let mut frame = BytesMut::with_capacity(HEADER + length);
    frame.put_u64_le(index);
    frame.put_u64_le(length as u64);
    frame.put_u64_le(!index);
    frame.put_slice(&content(index, length));
    frame.freeze()
}

fn parse(header: &[u8]) -> Result<(u64, usize), String> {
    let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
    let (index, length) = (word(0), word(8));
    if word(16) != !index { Err(format!("frame {index}")) } else { Ok((index, length as usize)) }
}

/// What a transfer looked like from its sender.
#[derive(Debug)]
struct Outcome {
    /// The largest that the connection had: congestion can make quinn start over.
    mtu: u16,
    packets: u64,
    lost: u64,
}

/// Pushes `frames` frames over a push lane while pages are asked for on the urgent
/// lane, each lane on its own threads, and compares all that arrives.
fn transfer(options: &LinkOptions, link: Option<RelayConfig>, frames: u64) -> Outcome {
    let identity = Identity::generate(in_an_hour()).unwrap();
    let sockets = bind_ports(loopback().ip(), 0, 1, options).unwrap();
    let ports: Vec<u16> = sockets.iter().map(|socket| socket.local_addr().port()).collect();
    let direct = identity.ticket(loopback().ip(), ports[0], ports[1..].to_vec()).unwrap();
    let relay = link.map(|link| Relay::spawn(link, &targets(loopback().ip(), &direct)).unwrap());
    let ticket = relay.as_ref().map_or(direct.clone(), |relay| relay.redirect(&direct).unwrap());

    let [urgent, push] = <[LaneSocket; 2]>::try_from(sockets).unwrap();
    let (id, opts) = (identity.clone(), options.clone());
    let page_server = LaneThread::spawn("page-server", move || async move {
        let mut server = LaneServer::listen(urgent, &id, Lane::Urgent, opts).unwrap();
        serve_pages(server.accept().await.unwrap()).await
    });
    let (id, opts) = (identity.clone(), options.clone());
    let receiver = LaneThread::spawn("receiver", move || async move {
        let mut server = LaneServer::listen(push, &id, Lane::Push(0), opts).unwrap();
        receive_frames(server.accept().await.unwrap()).await
    });
    let (to, opts) = (ticket.clone(), options.clone());
    let sender = LaneThread::spawn("sender", move || async move {
        send_frames(connect(&to, Lane::Push(0), &opts).await.unwrap(), frames).await
    });
    let opts = options.clone();
    let asker = LaneThread::spawn("asker", move || async move {
        ask_for_pages(connect(&ticket, Lane::Urgent, &opts).await.unwrap(), 100).await
    });

    let round_trips = asker.unwrap().join().unwrap();
    let outcome = sender.unwrap().join().unwrap();
    assert_eq!(receiver.unwrap().join().unwrap(), frames);
    assert_eq!(page_server.unwrap().join().unwrap(), round_trips as u64);
    outcome
}

async fn serve_pages(link: Link) -> u64 {
    let (mut send, mut receive) = link.connection.accept_bi().await.unwrap();
    let mut served = 0;
    loop {
        let mut request = [0; 16];
        match read_exact_into(&mut receive, &mut request).await {
            Ok(()) => {}
            Err(TransportError::Truncated { got: 0, .. }) => break,
            Err(error) => panic!("{error}"),
        }
        let page = u64::from_le_bytes(request[..8].try_into().unwrap());
        write_bytes(&mut send, content(page, PAGE).into()).await.unwrap();
        served += 1;
    }
    link.connection.closed().await;
    served
}

async fn ask_for_pages(link: Link, count: usize) -> usize {
    let (mut send, mut receive) = link.connection.open_bi().await.unwrap();
    for page in 0..count as u64 {
        let request = request(page);
        send.write_all(&request).await.unwrap();
        let mut answer = vec![0; PAGE];
        read_exact_into(&mut receive, &mut answer).await.unwrap();
        assert!(answer == content(page, PAGE), "page {page} came changed");
    }
    send.finish().unwrap();
    send.stopped().await.unwrap();
    link.close(0, "asked enough").await;
    count
}

fn request(page: u64) -> [u8; 16] {
    let mut request = [0; 16];
    request[..8].copy_from_slice(&page.to_le_bytes());
    request
}

async fn send_frames(link: Link, frames: u64) -> Outcome {
    let mut stream = link.connection.open_uni().await.unwrap();
    let mut mtu = 0;
    for index in 0..frames {
        write_bytes(&mut stream, frame(index)).await.unwrap();
        mtu = mtu.max(link.connection.stats().path.current_mtu);
    }
    stream.finish().unwrap();
    let mut done = link.connection.accept_uni().await.unwrap();
    let done = read_message(&mut done, 8).await.unwrap().unwrap();
    assert_eq!(done.as_ref(), frames.to_le_bytes());
    let stats = link.connection.stats();
    link.close(0, "done").await;
    let probes = stats.path.lost_plpmtud_probes;
    Outcome {
        mtu: mtu.max(stats.path.current_mtu),
        packets: stats.path.sent_packets,
        lost: stats.path.lost_packets.saturating_sub(probes),
    }
}

async fn receive_frames(link: Link) -> u64 {
    let stream = link.connection.accept_uni().await.unwrap();
    let mut reader = FrameReader::new(stream, HEADER, CHUNK);
    let mut count = 0;
    while let Some(received) = reader.next(parse).await.unwrap() {
        assert_eq!(received.header, count);
        let expected = &frame(count)[HEADER..];
        assert_eq!(received.payload.len(), expected.len());
        let same = received.payload.pieces().iter().flatten().eq(expected);
        assert!(same, "frame {count} came changed");
        count += 1;
    }
    let mut done = link.connection.open_uni().await.unwrap();
    write_message(&mut done, &count.to_le_bytes()).await.unwrap();
    done.finish().unwrap();
    link.connection.closed().await;
    count
}

#[test]
fn all_arrives_unchanged_over_loopback_at_each_datagram_size() {
    let _watchdog = Watchdog::seconds(60);
    for mtu_max in [Some(1472), Some(6600), Some(8972), None] {
        let options = LinkOptions { mtu_max, ..LinkOptions::default() };
        let outcome = transfer(&options, None, 200);
        let wanted = mtu_max.unwrap_or(lanes::UDP_PAYLOAD_MAX);
        // The search may still be narrowing when all has gone through.
        let found = wanted - wanted / 10..=wanted;
        assert!(found.contains(&outcome.mtu), "{wanted}: {outcome:?}");
        // A batch above one send's limit would vanish, again and again.
        assert!(outcome.lost * 10 <= outcome.packets, "{wanted}: {outcome:?}");
    }
}

#[test]
fn all_arrives_unchanged_through_relays_of_each_mtu() {
    let _watchdog = Watchdog::seconds(60);
    for mtu in [1500, 9000, 65_535] {
        let link = RelayConfig {
            bandwidth_bps: Some(400_000_000),
            rtt: Duration::from_millis(1),
            mtu,
            ..RelayConfig::default()
        };
        let payload_max = u16::try_from(mtu - 28).unwrap();
        let options = LinkOptions { mtu_max: Some(payload_max), ..LinkOptions::default() };
        let outcome = transfer(&options, Some(link.clone()), 60);
        let wanted = payload_max.min(lanes::UDP_PAYLOAD_MAX);
        assert!(outcome.mtu <= wanted && outcome.mtu >= wanted / 2, "{mtu}: {outcome:?}");

        // As when nobody tells the lanes the link's MTU, but loopback's is seen.
        let outcome = transfer(&LinkOptions::default(), Some(link), 30);
        assert!(outcome.mtu <= wanted, "{mtu}: {outcome:?}");
    }
}

#[test]
fn a_links_mtu_is_found_from_far_above_it() {
    let _watchdog = Watchdog::seconds(30);
    let options = LinkOptions::default();
    let identity = Identity::generate(in_an_hour()).unwrap();
    let lane = LaneThread::spawn("both-sides", move || async move {
        let (mut server, direct) = super::urgent_server(&identity, &options);
        let relay =
            Relay::spawn(RelayConfig::default(), &targets(loopback().ip(), &direct)).unwrap();
        let ticket = relay.redirect(&direct).unwrap();
        let (there, here) = tokio::join!(server.accept(), connect(&ticket, Lane::Urgent, &options));
        let (_there, here) = (there.unwrap(), here.unwrap());
        let since = Instant::now();
        while here.connection.stats().path.current_mtu < 8972 - 20 {
            assert!(since.elapsed() < Duration::from_secs(10), "{:?}", here.connection.stats());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        println!("found after {:?}", since.elapsed());
    });
    lane.unwrap().join().unwrap();
}

#[test]
fn all_arrives_unchanged_where_datagrams_are_lost() {
    let _watchdog = Watchdog::seconds(60);
    let link = RelayConfig { rtt: Duration::from_millis(1), loss: 0.01, ..RelayConfig::default() };
    let options = LinkOptions { mtu_max: Some(8972), ..LinkOptions::default() };
    let outcome = transfer(&options, Some(link), 60);
    assert!(outcome.lost > 0, "the relay lost nothing: {outcome:?}");
}

#[test]
fn a_lost_link_is_noticed_and_a_new_connection_gets_through() {
    let _watchdog = Watchdog::seconds(30);
    let options = LinkOptions::default();
    let identity = Identity::generate(in_an_hour()).unwrap();
    let sockets = bind_ports(loopback().ip(), 0, 1, &options).unwrap();
    let ports: Vec<u16> = sockets.iter().map(|socket| socket.local_addr().port()).collect();
    let direct = identity.ticket(loopback().ip(), ports[0], ports[1..].to_vec()).unwrap();
    let relay = Relay::spawn(RelayConfig::default(), &targets(loopback().ip(), &direct)).unwrap();
    let ticket = relay.redirect(&direct).unwrap();

    let urgent = sockets.into_iter().next().unwrap();
    let client_options = options.clone();
    let lane = LaneThread::spawn("both-sides", move || async move {
        let mut server = LaneServer::listen(urgent, &identity, Lane::Urgent, options).unwrap();
        let (there, here) =
            tokio::join!(server.accept(), connect(&ticket, Lane::Urgent, &client_options));
        let (there, here) = (there.unwrap(), here.unwrap());
        // Silence alone is no loss: signs of life keep the connection.
        tokio::time::sleep(client_options.idle_timeout + Duration::from_millis(300)).await;
        assert!(here.connection.close_reason().is_none());

        relay.blackhole(true);
        let since = Instant::now();
        let (one, other) = tokio::join!(here.connection.closed(), there.connection.closed());
        let noticed = since.elapsed();
        for error in [one, other] {
            let error = TransportError::from(error);
            assert!(error.is_link_loss(), "{error}");
        }
        assert!(noticed < Duration::from_secs(4), "noticed after {noticed:?}");

        relay.blackhole(false);
        let (there, here) =
            tokio::join!(server.accept(), connect(&ticket, Lane::Urgent, &client_options));
        here.unwrap().close(3, "well again").await;
        there.unwrap().connection.closed().await;
        assert!(relay.stats().to_target.dropped_down > 0);
    });
    lane.unwrap().join().unwrap();
}

#[tokio::test]
async fn bad_frames_are_refused_each_by_its_name() {
    let _watchdog = Watchdog::seconds(20);
    let identity = Identity::generate(in_an_hour()).unwrap();
    let options = LinkOptions::default();
    let (mut server, ticket) = super::urgent_server(&identity, &options);
    let (there, here) = tokio::join!(server.accept(), connect(&ticket, Lane::Urgent, &options));
    let (there, here) = (there.unwrap(), here.unwrap());

    let (good, long) = (frame(3), frame(1));
    let mut malformed = good.to_vec();
    malformed[20] ^= 1;
    let read = async |bytes: &[u8], max: usize| {
        let mut send = here.connection.open_uni().await.unwrap();
        send.write_all(bytes).await.unwrap();
        send.finish().unwrap();
        let stream = there.connection.accept_uni().await.unwrap();
        let mut reader = FrameReader::new(stream, HEADER, max);
        let first = reader.next(parse).await?;
        Ok::<_, TransportError>((first.map(|frame| frame.header), reader.next(parse).await?))
    };
    let (first, rest) = read(&good, CHUNK).await.unwrap();
    assert_eq!((first, rest.is_none()), (Some(3), true));
    let error = read(&long, 1000).await.unwrap_err();
    assert!(matches!(error, TransportError::TooLong { max: 1000, .. }), "{error}");
    let error = read(&malformed, CHUNK).await.unwrap_err();
    assert!(matches!(error, TransportError::Malformed { .. }), "{error}");
    let error = read(&good[..10], CHUNK).await.unwrap_err();
    assert!(matches!(error, TransportError::Truncated { got: 10, wanted: HEADER }), "{error}");
    let error = read(&good[..1000], CHUNK).await.unwrap_err();
    assert!(matches!(error, TransportError::Truncated { got: 1000, .. }), "{error}");

    // Messages: one too long is refused by its length alone, before its bytes come.
    let mut send = here.connection.open_uni().await.unwrap();
    write_message(&mut send, b"hello").await.unwrap();
    send.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    let mut stream = there.connection.accept_uni().await.unwrap();
    assert_eq!(read_message(&mut stream, 5).await.unwrap().unwrap().as_ref(), b"hello");
    let error = read_message(&mut stream, 1 << 20).await.unwrap_err();
    assert!(matches!(error, TransportError::TooLong { .. }), "{error}");

    // A stream that its sender gave up, and one whose reader went.
    send.reset(9u32.into()).unwrap();
    let mut rest = [0; 100];
    let error = read_exact_into(&mut stream, &mut rest).await.unwrap_err();
    assert!(matches!(error, TransportError::StreamReset { code: 9 }), "{error}");
    let mut send = here.connection.open_uni().await.unwrap();
    send.write_all(b"x").await.unwrap();
    there.connection.accept_uni().await.unwrap().stop(8u32.into()).unwrap();
    send.stopped().await.unwrap();
    let error = write_bytes(&mut send, Bytes::from_static(b"y")).await.unwrap_err();
    assert!(matches!(error, TransportError::StreamStopped { code: 8 }), "{error}");
}
