//! The pure core: pages, ledgers, frames, pre-paging and the two session
//! machines. No sockets, threads, clocks, file descriptors or `unsafe` in here;
//! time and randomness are passed in.

pub mod bitmap;
pub mod compression;
pub mod destination;
pub mod frame;
pub mod layout;
pub mod ledger;
pub mod message;
pub mod operator;
pub mod pacing;
pub mod page;
pub mod page_set;
pub mod placed;
pub mod prepaging;
pub mod rate;
pub mod source;
pub mod switchover;
mod sync;
pub mod timeline;
