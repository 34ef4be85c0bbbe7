//! [`LinkShape`]: an emulated link as people write it, `1Gbit:1ms:0.1%`.

use crate::program::units::{parse_rate, parse_share, parse_time};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The device without an emulated link.
const LOOPBACK: &str = "loopback";
/// In place of what is not limited.
const NONE: &str = "-";

/// An emulated link; nothing of it set is the loopback device itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LinkShape {
    /// Its rate each way, in bits a second.
    pub bandwidth_bps: Option<u64>,
    /// Its round trip.
    pub rtt: Option<Duration>,
    /// The share of packets that it loses.
    pub loss: Option<f64>,
}

impl LinkShape {
    /// Whether it is the loopback device itself.
    pub fn is_loopback(self) -> bool {
        self == Self::default()
    }
}

impl FromStr for LinkShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == LOOPBACK {
            return Ok(Self::default());
        }
        let parts: Vec<&str> = text.split(':').collect();
        let part = |index: usize| parts.get(index).copied().filter(|part| *part != NONE);
        let link = Self {
            bandwidth_bps: part(0).map(parse_rate).transpose()?,
            rtt: part(1).map(parse_time).transpose()?,
            loss: part(2).map(parse_share).transpose()?,
        };
        if parts.len() > 3 || link.is_loopback() {
            return Err(format!(
                "{text:?} is no link; write it as {LOOPBACK} or RATE:ROUND-TRIP:LOSS, for \
                 instance 1Gbit:1ms:0.1%, with {NONE} for what is not limited"
            ));
        }
        Ok(link)
    }
}

impl fmt::Display for LinkShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_loopback() {
            return f.pad(LOOPBACK);
        }
        let rate = self.bandwidth_bps.map(rate);
        let rtt = self.rtt.map(|rtt| humantime::format_duration(rtt).to_string().replace(' ', ""));
        let loss = self.loss.map(|loss| format!("{}%", (loss * 1e8).round() / 1e6));
        let mut parts = vec![rate, rtt, loss];
        while parts.last().is_some_and(Option::is_none) {
            parts.pop();
        }
        let parts: Vec<_> =
            parts.into_iter().map(|part| part.unwrap_or_else(|| NONE.to_owned())).collect();
        f.pad(&parts.join(":"))
    }
}

fn rate(bps: u64) -> String {
    [(1_000_000_000, "Gbit"), (1_000_000, "Mbit"), (1000, "kbit")]
        .into_iter()
        .find(|(unit, _)| bps.is_multiple_of(*unit))
        .map_or_else(|| format!("{bps}bit"), |(unit, name)| format!("{}{name}", bps / unit))
}

impl TryFrom<String> for LinkShape {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<LinkShape> for String {
    fn from(link: LinkShape) -> String {
        link.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_written_as_it_is_read() {
        for text in ["loopback", "1Gbit", "1Gbit:1ms", "2500Mbit:1m500us:0.1%", "-:10ms", "-:-:1%"]
        {
            let link: LinkShape = text.parse().unwrap();
            assert_eq!(link.to_string(), text);
            assert_eq!(link.is_loopback(), text == "loopback");
        }
        let link: LinkShape = "1Gbit:1ms:0.1%".parse().unwrap();
        assert_eq!(link.bandwidth_bps, Some(1_000_000_000));
        assert_eq!((link.rtt, link.loss), (Some(Duration::from_millis(1)), Some(0.001)));
        for wrong in ["", "-", "-:-", "1Gbit:1ms:1%:x", "fast", "1Gbit:x", "1Gbit:1ms:100%"] {
            assert!(wrong.parse::<LinkShape>().is_err(), "{wrong}");
        }
    }
}
