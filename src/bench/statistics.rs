//! The median of a few values, and how far apart they lie.

use serde::{Deserialize, Serialize};

/// Values of several runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// How many.
    pub count: u64,
    /// As many are below it as above.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// The median distance from the median: what is usual, whatever one odd run did.
    pub mad: f64,
}

impl Spread {
    /// Of these values; nothing of none, nor if one is no number.
    pub fn of(values: &[f64]) -> Option<Self> {
        let median = median(values)?;
        let distances: Vec<f64> = values.iter().map(|value| (value - median).abs()).collect();
        Some(Self {
            count: values.len() as u64,
            median,
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            mad: self::median(&distances)?,
        })
    }
}

/// The middle value, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> Option<f64> {
    if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    Some(if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads_are_those_of_the_books() {
        let cases: [(&[f64], [f64; 4]); 5] = [
            (&[7.0], [7.0, 7.0, 7.0, 0.0]),
            (&[3.0, 1.0], [2.0, 1.0, 3.0, 1.0]),
            (&[10.0, 2.0, 3.0], [3.0, 2.0, 10.0, 1.0]),
            (&[4.0, 1.0, 2.0, 100.0], [3.0, 1.0, 100.0, 1.5]),
            (&[1.0, 1.0, 2.0, 2.0, 4.0, 6.0, 9.0], [2.0, 1.0, 9.0, 1.0]),
        ];
        for (values, [median, min, max, mad]) in cases {
            let count = values.len() as u64;
            assert_eq!(Spread::of(values), Some(Spread { count, median, min, max, mad }));
        }
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[1.0, f64::NAN]), None);
        assert_eq!(Spread::of(&[1.0, f64::INFINITY]), None);
    }
}
