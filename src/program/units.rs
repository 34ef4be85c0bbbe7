//! Sizes, rates and times as people write them.

use std::time::Duration;

/// A size in bytes: `512M`, `4GiB`, `65536`. K, M, G, T are powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let unit = unit.strip_suffix("iB").or(unit.strip_suffix('B')).unwrap_or(unit);
    let shift = match unit {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(format!("{text:?} is no size; write it like 512M or 4G")),
    };
    let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    bytes.ok_or_else(|| format!("{text:?} is no size; write it like 512M or 4G"))
}

/// A rate in bits a second: `1Gbit`, `800Mbit`, as for tc(8). Powers of 1000.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let unit = unit.strip_suffix("bit").or(unit.strip_suffix("bps")).unwrap_or(unit);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" => 1,
        "k" => 1_000,
        "m" => 1_000_000,
        "g" => 1_000_000_000,
        _ => return Err(format!("{text:?} is no rate; write it like 1Gbit or 500Mbit")),
    };
    let bits = number.parse::<f64>().ok().filter(|n| *n > 0.0 && *n < 1e9);
    let bits = bits.map(|n| (n * f64::from(factor)) as u64).filter(|n| *n >= 1000);
    bits.ok_or_else(|| format!("{text:?} is no rate; write it like 1Gbit or 500Mbit"))
}

/// The longest time taken: it can be added to any clock without an overflow.
const TIME_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A time of a year at most: `1ms`, `10s`, `2m`.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text);
    let time = time.map_err(|error| format!("{text:?} is no time: {error}"))?;
    if time > TIME_MAX {
        return Err(format!("{text:?} is no time to wait: it is longer than a year"));
    }
    Ok(time)
}

/// A guest's memory in bytes, as [`parse_size`] reads it.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes < 8 << 20 || !bytes.is_multiple_of(2 << 20) {
        return Err("it must be a multiple of 2 MiB and at least 8 MiB".into());
    }
    Ok(bytes)
}

/// A part of all packets: `0.01` or `1%`.
pub fn parse_share(text: &str) -> Result<f64, String> {
    let (number, percent) = match text.strip_suffix('%') {
        Some(number) => (number, 100.0),
        None => (text, 1.0),
    };
    let share = number.parse::<f64>().ok().map(|n| n / percent);
    share
        .filter(|share| (0.0..1.0).contains(share))
        .ok_or_else(|| format!("{text:?} is no part of all packets; write it like 1% or 0.01"))
}

fn split(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_rates_are_read_as_people_write_them() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4GiB"), Ok(4 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_rate("1Gbit"), Ok(1_000_000_000));
        assert_eq!(parse_rate("2.5gbit"), Ok(2_500_000_000));
        assert_eq!(parse_share("1%"), Ok(0.01));
        assert_eq!(parse_time("1m 500ms"), Ok(Duration::from_millis(60_500)));
        assert_eq!(parse_memory("8M"), Ok(8 << 20));
        for wrong in ["", "M", "-1", "1.5G", "12X", "99999999999999999G"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
        for wrong in ["7M", "9M", "4096", "8388609"] {
            assert!(parse_memory(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "1", "1x", "2y", "500000000000y"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "0", "1Xbit", "NaN", "-1Gbit", "0.1"] {
            assert!(parse_rate(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "1.0", "-1%", "100%", "x"] {
            assert!(parse_share(wrong).is_err(), "{wrong}");
        }
    }
}
