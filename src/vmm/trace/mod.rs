//! [`Trace`]: the pages that a real guest touched first after its switchover, by which vCPU
//! and when. What a guest makes of it is in [`workload`](super::workload).
//!
//! A trace stays out of everything that crosses in a migration: it would not fit the proposal,
//! in the state it would cost downtime, and in guest memory it would be faulted in, among the
//! very faults that it is there to cause. What crosses is a [`TraceId`]; the destination has
//! the file as well.

mod parse;

use super::workload::SYSTEM_PAGES;
use flate2::read::MultiGzDecoder;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The largest file, in bytes.
pub const FILE_BYTES_MAX: u64 = 64 << 20;
/// The longest text in it, in bytes.
pub const TEXT_BYTES_MAX: u64 = 64 << 20;
/// The most touches.
pub const TOUCHES_MAX: usize = 2 << 20;
/// The latest time of a touch, in microseconds: a day.
pub const TIME_US_MAX: u64 = 24 * 60 * 60 * 1_000_000;

/// A first touch of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// The page, from [`SYSTEM_PAGES`] on.
    pub page: u64,
    /// The vCPU's own time since its touch before, or since the beginning, in microseconds.
    pub wait_us: u64,
}

/// A trace that was read: no page twice, and each vCPU touches some.
#[derive(Debug, PartialEq, Eq)]
pub struct Trace {
    id: TraceId,
    vcpus: Vec<Arc<[Touch]>>,
    highest: u64,
}

/// What tells a trace from others, for those who do not have it or have it elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceId {
    /// What its file is called, without its extensions.
    pub name: String,
    /// Touches of all vCPUs.
    pub touches: u64,
    /// The CRC-32 of vCPU, page and time of each, as eight digits. It tells of mix-ups, not of
    /// malice: whoever brings the guest might as well change what it does.
    pub crc32: String,
}

/// A trace that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Not there, or damaged.
    #[error("trace {}: cannot read it", .file.display())]
    Read {
        /// Which.
        file: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// More than anybody means to replay.
    #[error("trace {}: its {what} is larger than {bytes} bytes", .file.display())]
    TooLarge {
        /// Which.
        file: PathBuf,
        /// "file" or "text".
        what: &'static str,
        /// How large it may be.
        bytes: u64,
    },
    /// A line that is none of the format.
    #[error("trace {}, line {line}: expected {expected}, found {found}", .file.display())]
    Line {
        /// Which.
        file: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What may stand there.
        expected: String,
        /// What does, shortened.
        found: String,
    },
}

impl Trace {
    /// Reads the trace in `file`, compressed by gzip or plain.
    ///
    /// # Errors
    /// A file that cannot be read, is too large, or is not of the format.
    pub fn load(file: &Path) -> Result<Self, TraceError> {
        let text = text(file)?;
        let vcpus = parse::touches(&text).map_err(|wrong| TraceError::Line {
            file: file.to_owned(),
            line: wrong.line,
            expected: wrong.expected,
            found: wrong.found,
        })?;
        Ok(Self::of(trace_name(file), vcpus))
    }

    fn of(name: String, vcpus: Vec<Vec<Touch>>) -> Self {
        let mut hasher = crc32fast::Hasher::new();
        for (vcpu, touches) in (0u64..).zip(&vcpus) {
            for touch in touches {
                for word in [vcpu, touch.page, touch.wait_us] {
                    hasher.update(&word.to_le_bytes());
                }
            }
        }
        let all = vcpus.iter().flatten();
        let highest = all.clone().map(|touch| touch.page).max().unwrap_or(SYSTEM_PAGES);
        let touches = all.count() as u64;
        let crc32 = format!("{:08x}", hasher.finalize());
        let id = TraceId { name, touches, crc32 };
        Self { id, vcpus: vcpus.into_iter().map(Arc::from).collect(), highest }
    }

    /// What tells it from others.
    pub fn id(&self) -> &TraceId {
        &self.id
    }

    /// The vCPUs that it was recorded of.
    pub fn vcpus(&self) -> u32 {
        self.vcpus.len() as u32
    }

    /// The touches of `vcpu`, in order; at least one.
    ///
    /// # Panics
    /// If there is no such vCPU.
    pub fn touches(&self, vcpu: u32) -> Arc<[Touch]> {
        Arc::clone(&self.vcpus[vcpu as usize])
    }

    /// The highest page that it touches.
    pub fn highest(&self) -> u64 {
        self.highest
    }
}

impl TraceId {
    /// What is the same of the same trace, whatever its file is called.
    pub fn digest(&self) -> String {
        format!(" of {} touches, CRC-32 {}", self.touches, self.crc32)
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.name, self.digest())
    }
}

/// What a trace's file is called, without what tells of its format.
pub fn trace_name(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    name.strip_suffix(".trace").unwrap_or(name).to_owned()
}

/// The whole text of a trace's file.
fn text(file: &Path) -> Result<String, TraceError> {
    let read = |source| TraceError::Read { file: file.to_owned(), source };
    let limited = |from: &mut dyn Read, what, most: u64| {
        let mut bytes = Vec::new();
        // One byte more, to see that there is more.
        from.take(most + 1).read_to_end(&mut bytes).map_err(read)?;
        if bytes.len() as u64 > most {
            return Err(TraceError::TooLarge { file: file.to_owned(), what, bytes: most });
        }
        Ok(bytes)
    };
    let mut bytes = limited(&mut File::open(file).map_err(read)?, "file", FILE_BYTES_MAX)?;
    if bytes.starts_with(&[0x1F, 0x8B]) {
        bytes = limited(&mut MultiGzDecoder::new(bytes.as_slice()), "text", TEXT_BYTES_MAX)?;
    }
    // Wherever it is no text it is no line of the format either.
    Ok(String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

#[cfg(test)]
mod tests;
