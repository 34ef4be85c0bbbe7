//! The floor of a push: a push lane by itself, encrypted as every lane is. What arrives is
//! dropped.

use super::Measured;
use super::throughput::Slices;
use crate::transport::{
    Identity, Lane, LaneServer, LaneThread, LinkOptions, bind_ports, connect, thread,
};
use anyhow::Context;
use bytes::Bytes;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// What is written at a time: 64 pages.
const WRITTEN_BYTES: usize = 64 << 12;

/// Over loopback, in datagrams as large as a link with this MTU takes; `None`: as loopback does.
pub fn push(time: Duration, mtu: Option<u16>) -> anyhow::Result<Measured> {
    const HEADERS: u16 = 28;
    let options = LinkOptions { mtu_max: mtu.map(|mtu| mtu - HEADERS), ..LinkOptions::default() };
    let loopback = Ipv4Addr::LOCALHOST.into();
    let identity = Identity::generate(u64::MAX >> 1)?;
    let sockets = bind_ports(loopback, 0, 1, &options)?;
    let ports: Vec<u16> = sockets.iter().map(|socket| socket.local_addr().port()).collect();
    let ticket = identity.ticket(loopback, ports[0], ports[1..].to_vec())?;
    let socket = sockets.into_iter().nth(1).context("no port for a push lane")?;

    let of_server = options.clone();
    let receiver = LaneThread::spawn("floor-in", move || async move {
        let _ = thread::take_short_turns();
        let mut server = LaneServer::listen(socket, &identity, Lane::Push(0), of_server)?;
        let mut stream = server.accept().await?.connection.accept_uni().await?;
        let mut slices = Slices::begin();
        while let Some(chunk) = stream.read_chunk(usize::MAX, true).await? {
            slices.received(chunk.bytes.len());
        }
        anyhow::Ok(slices.rates)
    })?;
    let sender = LaneThread::spawn("floor-out", move || async move {
        let _ = thread::take_short_turns();
        let link = connect(&ticket, Lane::Push(0), &options).await?;
        let mut stream = link.connection.open_uni().await?;
        let pages = Bytes::from(vec![1u8; WRITTEN_BYTES]);
        let began = Instant::now();
        while began.elapsed() < time {
            stream.write_chunk(pages.clone()).await?;
        }
        stream.finish()?;
        let _ = stream.stopped().await;
        link.close(0, "measured").await;
        anyhow::Ok(())
    })?;
    sender.join()??;
    Measured::of_rates(&receiver.join()??)
}
