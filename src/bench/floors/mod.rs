//! Floors: what this machine needs, at this time, for the least that a fault or a transfer
//! consists of. A benchmark's figures are read as multiples of them.
//!
//! | floor | what is measured | how |
//! |---|---|---|
//! | `memcpy` | ns to copy a page | 64 MiB to another 64 MiB, page by page, both written before; a value for each 256 pages |
//! | `place` | ns a page to place pages | `UFFDIO_COPY` of runs of 64 pages into anonymous memory nobody waits for; a value a run |
//! | `local-fault` | ns from a touch to its page | one thread touches page after page of anonymous memory; another polls, reads the fault and answers it by `UFFDIO_COPY` |
//! | `tcp-fault` | the same, with the page from a peer | as above, but before it answers, the other thread asks a third for the page by 8 bytes over a loopback TCP connection, without delay, and waits for its 4096 |
//! | `tcp` | bits a second over loopback TCP | one thread writes 128 KiB at a time, another reads; a value each 20 ms |
//! | `udp` | bits a second over loopback UDP | one thread sends datagrams of 65,400 bytes, as large as the lanes' become there, another receives; what is lost does not count; a value each 20 ms |
//! | `lane`, `lane-9000`, `lane-1500` | bits a second over a push lane alone | this program's transport, a thread on each side, over loopback: 64 pages are written at a time, and dropped where they arrive; with datagrams as loopback takes them, and such as fit into an MTU of 9,000 or 1,500 bytes; a value each 20 ms |
//!
//! All threads are in one process and pinned to nothing. Nothing but what crosses a lane is
//! encrypted, nothing is kept count of: that is what makes them floors.

mod fault;
mod lane;
mod memory;
mod throughput;
mod trapped;

use crate::report::latency::Latencies;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Pages that the memory of a floor has.
const PAGES: u64 = 4096;

/// A floor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Floor {
    /// Copying a page.
    Memcpy,
    /// Placing a page, one of 64.
    Place,
    /// A fault that is answered in the same process.
    LocalFault,
    /// A fault whose page comes over TCP.
    TcpFault,
    /// TCP's throughput.
    Tcp,
    /// UDP's throughput.
    Udp,
    /// A push lane's throughput.
    Lane,
    /// The same, with an MTU of 9,000 bytes.
    #[serde(rename = "lane-9000")]
    Lane9000,
    /// The same, with an MTU of 1,500 bytes.
    #[serde(rename = "lane-1500")]
    Lane1500,
}

impl Floor {
    /// All of them.
    pub const ALL: [Floor; 9] = [
        Self::Memcpy,
        Self::Place,
        Self::LocalFault,
        Self::TcpFault,
        Self::Tcp,
        Self::Udp,
        Self::Lane,
        Self::Lane9000,
        Self::Lane1500,
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memcpy => "memcpy",
            Self::Place => "place",
            Self::LocalFault => "local-fault",
            Self::TcpFault => "tcp-fault",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Lane => "lane",
            Self::Lane9000 => "lane-9000",
            Self::Lane1500 => "lane-1500",
        }
    }

    /// What its values count: nanoseconds, or bits a second.
    pub const fn is_rate(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp | Self::Lane | Self::Lane9000 | Self::Lane1500)
    }

    /// What it is, in few words.
    pub const fn what(self) -> &'static str {
        match self {
            Self::Memcpy => "copying a page",
            Self::Place => "UFFDIO_COPY, a page in runs of 64",
            Self::LocalFault => "a fault answered in the same process",
            Self::TcpFault => "a fault whose page comes over loopback TCP",
            Self::Tcp => "loopback TCP",
            Self::Udp => "loopback UDP, 65,400 bytes a datagram",
            Self::Lane => "a push lane alone, encrypted, over loopback",
            Self::Lane9000 => "the same with an MTU of 9,000 bytes",
            Self::Lane1500 => "the same with an MTU of 1,500 bytes",
        }
    }

    fn measure(self, time: Duration) -> anyhow::Result<Measured> {
        match self {
            Self::Memcpy => memory::memcpy(time),
            Self::Place => memory::place(time),
            Self::LocalFault => fault::local(time),
            Self::TcpFault => fault::over_tcp(time),
            Self::Tcp => throughput::tcp(time),
            Self::Udp => throughput::udp(time),
            Self::Lane => lane::push(time, None),
            Self::Lane9000 => lane::push(time, Some(9000)),
            Self::Lane1500 => lane::push(time, Some(1500)),
        }
    }
}

impl fmt::Display for Floor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a floor's values are like.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// How many.
    pub count: u64,
    /// The median.
    pub p50: f64,
    /// 99 in 100 are not above it; absent for rates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99: Option<f64>,
    /// The least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// The largest.
    pub max: f64,
}

impl Measured {
    fn of_times(times: &Latencies) -> anyhow::Result<Self> {
        let summary = times.summary();
        let number = |value: Option<u64>| value.map(|value| value as f64);
        match (number(summary.p50), number(summary.max)) {
            (Some(p50), Some(max)) => {
                let (p99, min) = (number(summary.p99), number(times.quantile_ns(0.0)));
                Ok(Self { count: summary.count, p50, p99, min, max })
            }
            _ => anyhow::bail!("nothing was measured in that time"),
        }
    }

    fn of_rates(rates: &[f64]) -> anyhow::Result<Self> {
        let Some(spread) = super::statistics::Spread::of(rates) else {
            anyhow::bail!("nothing was measured in that time");
        };
        let (min, max) = (Some(spread.min), spread.max);
        Ok(Self { count: spread.count, p50: spread.median, p99: None, min, max })
    }
}

/// What came of a floor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Found {
    /// Its values.
    Measured(Measured),
    /// Why there are none.
    Failed(String),
}

/// The floors of a round.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Floors(pub BTreeMap<Floor, Found>);

impl Floors {
    /// Measures each for so long. One that cannot be measured does not cost the others.
    pub fn measure(time: Duration, mut before: impl FnMut(Floor)) -> Self {
        let measure = |floor: Floor| {
            before(floor);
            let found = match floor.measure(time) {
                Ok(measured) => Found::Measured(measured),
                Err(error) => Found::Failed(format!("{error:#}")),
            };
            (floor, found)
        };
        Self(Floor::ALL.into_iter().map(measure).collect())
    }

    /// A floor that was measured.
    pub fn get(&self, floor: Floor) -> Option<&Measured> {
        match self.0.get(&floor)? {
            Found::Measured(measured) => Some(measured),
            Found::Failed(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_floor_is_measured_or_says_why_not() {
        let floors = Floors::measure(Duration::from_millis(60), |_| {});
        assert_eq!(floors.0.len(), Floor::ALL.len());
        for (floor, found) in &floors.0 {
            match found {
                Found::Measured(measured) => {
                    assert!(measured.count > 0 && measured.p50 > 0.0, "{floor}: {measured:?}");
                    assert!(measured.min.unwrap() <= measured.p50, "{floor}: {measured:?}");
                    assert!(measured.p50 <= measured.max, "{floor}: {measured:?}");
                    assert_eq!(measured.p99.is_none(), floor.is_rate());
                }
                Found::Failed(why) if why.contains("not permitted") => {
                    eprintln!("SKIPPED: {floor}: {why}");
                }
                Found::Failed(why) => panic!("{floor}: {why}"),
            }
        }
        let text = serde_json::to_string(&floors).unwrap();
        let read: Floors = serde_json::from_str(&text).unwrap();
        assert!(read.0.keys().eq(floors.0.keys()), "{text}");
    }
}
