//! [`CompressMode`]: what a user wants of compression.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Whether pushed pages are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompressMode {
    /// While it saves time, by measurement.
    #[default]
    Auto,
    /// All that become smaller.
    Always,
    /// None; a destination that knows nothing of compression is good enough.
    Never,
}

impl CompressMode {
    /// All of them.
    pub const ALL: [CompressMode; 3] = [Self::Auto, Self::Always, Self::Never];

    /// Its name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

impl fmt::Display for CompressMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no mode has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("compression is not {0:?}; it is auto, always or never")]
pub struct UnknownMode(pub String);

impl FromStr for CompressMode {
    type Err = UnknownMode;

    fn from_str(name: &str) -> Result<Self, UnknownMode> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.name() == name)
            .ok_or_else(|| UnknownMode(name.chars().take(64).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for mode in CompressMode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert_eq!("Auto".parse::<CompressMode>(), Err(UnknownMode("Auto".into())));
    }
}
