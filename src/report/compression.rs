//! [`Compression`]: what the report says of compressed pages. It is a part of the
//! [schema](super::schema).

use serde::{Deserialize, Serialize};

/// Compression of pushed pages, as the source knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compression {
    /// What was asked for: "auto", "always".
    pub mode: String,
    /// Pages that were sent compressed.
    pub pages: u64,
    /// Frames sent compressed.
    pub frames: u64,
    /// Bytes of those pages.
    pub bytes_before: u64,
    /// Bytes sent for them.
    pub bytes_after: u64,
    /// Frames that were to be compressed, did not become smaller and were sent as they are.
    pub unshrunk_frames: u64,
    /// Processor time for both.
    pub cpu_us: u64,
    /// Frames that were compressed to see what it does, and sent as they are.
    pub probes: u64,
    /// Processor time for those.
    pub probes_cpu_us: u64,
    /// Why it was on or off in the end, if that was decided by measurement.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// How often it was turned on or off.
    pub switched: u64,
    /// The first times, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub switches: Vec<CompressionSwitch>,
}

/// Compression was turned on or off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompressionSwitch {
    /// When, from the request to migrate.
    pub at_us: u64,
    /// Whether on.
    pub on: bool,
    /// Why.
    pub why: String,
    /// What the pages tried last had shrunk to, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shrunk_to_percent: Option<u64>,
    /// Processor time that it took for a page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_cpu_ns: Option<u64>,
    /// Bytes of pages that the link took in a second, uncompressed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_bytes_per_second: Option<u64>,
}
