//! [`WorkloadChoice`]: a workload as it is named on the command line.

use super::trace::trace_name;
use super::workload::Pattern;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What stands before the file of a trace.
const TRACE: &str = "trace:";

/// A pattern, or a trace by its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum WorkloadChoice {
    /// By the name of the pattern.
    Pattern(Pattern),
    /// `trace:FILE`.
    Trace(PathBuf),
}

impl WorkloadChoice {
    /// The trace's file, if it is one.
    pub fn trace(&self) -> Option<&Path> {
        match self {
            Self::Pattern(_) => None,
            Self::Trace(file) => Some(file),
        }
    }

    /// A name without folders: as it is shown beside others.
    pub fn short(&self) -> String {
        match self {
            Self::Pattern(_) => self.to_string(),
            Self::Trace(file) => format!("{TRACE}{}", trace_name(file)),
        }
    }

    /// What `postcopy receive` must be told of it.
    pub fn destination_arguments(&self) -> Vec<std::ffi::OsString> {
        self.trace().map(|file| ["--trace".into(), file.into()].into()).unwrap_or_default()
    }
}

impl fmt::Display for WorkloadChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Those that cannot be chosen have no name, and are in no choice.
            Self::Pattern(pattern) => {
                f.write_str(pattern.to_possible_value().as_ref().map_or("", |it| it.get_name()))
            }
            Self::Trace(file) => write!(f, "{TRACE}{}", file.display()),
        }
    }
}

impl FromStr for WorkloadChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix(TRACE) {
            Some("") => return Err("trace: is followed by the name of a file".into()),
            Some(file) => return Ok(Self::Trace(file.into())),
            None => {}
        }
        Pattern::from_str(text, false).map(Self::Pattern).map_err(|_| {
            let named = |pattern: &Pattern| pattern.to_possible_value();
            let names = Pattern::value_variants().iter().filter_map(named);
            let names: Vec<String> = names.map(|value| value.get_name().to_owned()).collect();
            format!("possible values: {}, trace:FILE", names.join(", "))
        })
    }
}

impl From<WorkloadChoice> for String {
    fn from(choice: WorkloadChoice) -> Self {
        choice.to_string()
    }
}

impl TryFrom<String> for WorkloadChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_read_as_it_is_written() {
        let patterns = Pattern::ALL.map(WorkloadChoice::Pattern);
        for choice in patterns.into_iter().chain([WorkloadChoice::Trace("/a/b.trace.gz".into())]) {
            assert_eq!(choice.to_string().parse(), Ok(choice.clone()));
            let json = serde_json::to_string(&choice).unwrap();
            assert_eq!(serde_json::from_str::<WorkloadChoice>(&json).unwrap(), choice);
        }
        let trace: WorkloadChoice = "trace:/a/redis-a.trace.gz".parse().unwrap();
        assert_eq!(trace.short(), "trace:redis-a");
        assert_eq!("zipf".parse::<WorkloadChoice>().unwrap().short(), "zipf");
    }

    #[test]
    fn what_names_no_workload_is_refused_with_those_there_are() {
        for wrong in ["", "trace", "trace:", "Zipf", "random "] {
            let why = wrong.parse::<WorkloadChoice>().unwrap_err();
            assert!(why.contains("trace:"), "{wrong}: {why}");
        }
        let why = "nothing".parse::<WorkloadChoice>().unwrap_err();
        assert!(why.contains("sequential, strided") && why.ends_with("trace:FILE"), "{why}");
    }
}
