//! The migration report, schema `postcopy-report/1`: what is in the JSON.
//!
//! Times are integers in microseconds (`_us`) or nanoseconds (`_ns`), sizes are in
//! bytes. What was not measured is `None` here and absent there, never 0; what was
//! measured and is 0 is there. Who fills which field in is in [`merge`](super::merge).

pub use super::compression::{Compression, CompressionSwitch};
use serde::{Deserialize, Serialize};

/// The value of `schema`.
pub const SCHEMA: &str = "postcopy-report/1";

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs on the destination, with all its memory.
    Completed,
    /// The guest runs on at the source.
    Aborted,
    /// Completed, after the link or a process was lost on the way.
    Recovered,
    /// The guest runs nowhere.
    Lost,
}

/// Who wrote the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The source, with the destination's part if that came.
    Source,
    /// The destination, alone.
    Destination,
}

/// How the memory was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// After the switchover only.
    PostCopy,
    /// Before the switchover only.
    PreCopy,
    /// Some before, the rest after.
    Hybrid,
    /// While the guest stood still.
    StopAndCopy,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Mode::PostCopy => "post-copy",
            Mode::PreCopy => "pre-copy",
            Mode::Hybrid => "hybrid",
            Mode::StopAndCopy => "stop-and-copy",
        })
    }
}

/// One migration, as one JSON object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not complete; null if it did.
    pub reason: Option<String>,
    /// Who wrote this.
    pub side: Side,
    /// How the memory was moved.
    pub mode: Mode,
    /// The pre-paging policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// What was moved.
    pub guest: Guest,
    /// Over what.
    pub link: Link,
    /// How it was decided when the guest moves; absent if nothing was to be copied before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switchover: Option<Switchover>,
    /// How long each phase took.
    pub phases_us: Phases,
    /// vCPUs paused on the source until the first one runs on the destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
    /// How far off that may be: half a round trip, as the hosts share no clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_error_us: Option<u64>,
    /// What it consists of.
    pub downtime_parts_us: DowntimeParts,
    /// The largest gap between two steps that the guest's own clock saw around the
    /// switchover, its first fault included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_max_gap_us: Option<u64>,
    /// Steps slower than a native fault, by the guest's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_stall_ns: Option<Distribution>,
    /// Bytes sent between the pause and the commit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub switchover_bytes: Option<u64>,
    /// From the request to migrate until both sides agree that it is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_us: Option<u64>,
    /// Where each page came from.
    pub pages: Pages,
    /// Faults that had to ask the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_faults: Option<u64>,
    /// How many pages one of them asked for, all of a huge page: at most; absent: one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages_a_fault: Option<u64>,
    /// Faults on a page that was already on its way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub late_hits: Option<u64>,
    /// Faults of all three kinds that no vCPU thread raised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unattributed_faults: Option<u64>,
    /// Zero pages and holes, answered without the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_faults: Option<u64>,
    /// Of network faults and late hits: from reading the fault until the page is placed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault_latency_ns: Option<Distribution>,
    /// Of network faults whose page came in answer: where that time went.
    #[serde(default)]
    pub fault_hops_ns: FaultHops,
    /// How long vCPUs stood still for a page, as the destination saw it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocktime_us: Option<Blocktime>,
    /// What the guest got done.
    pub guest_steps: GuestSteps,
    /// Bytes of UDP payload.
    pub wire_bytes: WireBytes,
    /// Processor time, user and system.
    pub cpu_us: PerSide,
    /// The most memory resident, guest memory included.
    pub peak_rss_bytes: PerSide,
    /// What compressing pushed pages came to, and when it was on; absent if it was not wanted,
    /// or nothing was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// The losses of the link after the commit, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outages: Vec<Outage>,
    /// Huge pages made of the guest's memory after the end of the session, so that only the
    /// destination's own report has it; absent if nobody asked for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
    /// Whether every page was the same as in an independent model; absent if that was
    /// not looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified: Option<bool>,
}

/// How much memory was copied before the guest moved, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switchover {
    /// The mode that was asked for.
    pub asked: String,
    /// The longest pause that was to be chosen.
    pub max_downtime_us: u64,
    /// The longest time of all that was to be chosen, if there was a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_total_us: Option<u64>,
    /// Each round of copying, in order.
    pub rounds: Vec<Round>,
    /// Pages that went over the link before the guest ran at the destination, each as often as
    /// it did.
    pub copied: u64,
}

/// A round of copying.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Pages sent.
    pub sent: u64,
    /// Pages that were not at the destination as they were at the source when it was over.
    pub stale: u64,
    /// From its beginning until its last page had landed.
    pub took_us: u64,
    /// What came next, and why.
    pub why: String,
}

/// Blocks of 2 MiB that were to become a huge page each, after the session's end. What is in no
/// count had not been tried when the guest ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePages {
    /// Those with content, aligned, and without a page that is lost or was given back.
    pub blocks: u64,
    /// Those that became one, or were one already.
    pub collapsed: u64,
    /// Those of which the kernel says that they cannot become one.
    pub refused: u64,
    /// Those for which there was no memory, or of which pages were in use, however often tried.
    pub failed: u64,
    /// From the session's end until nine tenths of the blocks had become one; absent if that
    /// was never so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub us_to_90_percent: Option<u64>,
    /// From the session's end until the last block was tried.
    pub total_us: u64,
    /// Each call into the kernel, for one block, in some part of which whoever touches the block
    /// waits.
    pub call_ns: Distribution,
    /// Stalls that the guest's own clock saw meanwhile, of whatever cause.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_stall_ns: Option<Distribution>,
    /// Processor time that it took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_us: Option<u64>,
}

/// From a link's loss until the next one stood.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outage {
    /// The link epoch that ended it; absent if nothing did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u32>,
    /// Why the link was lost, in the source's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// How often the source tried to connect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// Pages that were on their way when the link was lost, and are sent again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resent_pages: Option<u64>,
    /// When, at the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<OutageTimes>,
    /// When, at the destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<OutageTimes>,
}

/// Moments of an outage on one side, in microseconds of its host's `CLOCK_MONOTONIC`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutageTimes {
    /// The loss was noticed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost_at_us: Option<u64>,
    /// The next link was in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub up_at_us: Option<u64>,
    /// The first page that came over it was placed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_placed_at_us: Option<u64>,
}

/// The guest that was moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// "kvm", "process".
    pub kind: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// Bytes in a page.
    pub page_size: u64,
    /// Its vCPUs.
    pub vcpus: u32,
    /// What its memory is on the destination: "memfd", "anonymous".
    pub backing: String,
    /// What it did: "random", "zipf".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    /// Whether its user had it paused, so that it arrived paused: then nobody waited for it in
    /// what is called the downtime.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub was_paused: Option<bool>,
}

/// The link between the hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Whether pages went encrypted.
    pub encrypted: bool,
    /// Lanes for all pages that were not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub push_lanes: Option<u32>,
    /// The round trip.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rtt_us: Option<u64>,
    /// Bytes of a datagram.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u64>,
    /// The limit set on the rate, in bits a second; absent if none was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit_bps: Option<u64>,
    /// 1 and the times that the link was lost and found again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u32>,
}

/// The phases of a migration, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phases {
    /// Until both sides agree on what is moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handshake: Option<u64>,
    /// Until the pause, the guest running on the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_brownout: Option<u64>,
    /// The guest running nowhere: the downtime.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blackout: Option<u64>,
    /// The guest running on the destination, its memory incomplete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_brownout: Option<u64>,
}

/// What the downtime consists of, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DowntimeParts {
    /// Until the last vCPU has stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause: Option<u64>,
    /// Until the state is taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capture: Option<u64>,
    /// The way to the destination, and everything that is no other part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transfer: Option<u64>,
    /// Until the state is in the new machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore: Option<u64>,
    /// Until the first vCPU runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume: Option<u64>,
}

/// Where each page of the guest came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// All of the guest's pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// Known to be all zeroes; not sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero: Option<u64>,
    /// Never touched by the guest; not sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hole: Option<u64>,
    /// Those that the source could not read: touching one at the destination is a memory
    /// error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poisoned: Option<u64>,
    /// Sent with the switchover.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seeded: Option<u64>,
    /// Sent because of a network fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub demanded: Option<u64>,
    /// Sent by the pre-paging policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pushed: Option<u64>,
    /// Sent by the policy's final drain (demand-only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drained: Option<u64>,
    /// Sent before the switchover.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precopied: Option<u64>,
    /// Sent again because the link was lost with them on the way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resent_after_link_loss: Option<u64>,
    /// Sent twice in one link epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_twice: Option<u64>,
    /// Found in place when they were to be placed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placed_twice: Option<u64>,
}

/// A distribution of times: its count, and, if that is not 0, what they were like.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// How many.
    pub count: u64,
    /// Their mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean: Option<u64>,
    /// The median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p50: Option<u64>,
    /// Nine in ten are not above it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p90: Option<u64>,
    /// 99 in 100 are not above it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99: Option<u64>,
    /// 999 in 1000 are not above it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p999: Option<u64>,
    /// The largest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<u64>,
}

/// The hops of a network fault. `ask`, `answer` and `place` follow one another; `serve` is a
/// part of `answer`, by another host's clock, and what is left of that is the link's. What is in
/// none of them is the kernel's: from the trap until the fault is read, and from the page's
/// placement until the vCPU runs again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FaultHops {
    /// From reading the fault until its request was handed to the link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ask: Option<Distribution>,
    /// From then until the page was there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<Distribution>,
    /// At the source: from reading the request until its page was handed to the link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serve: Option<Distribution>,
    /// From the page's arrival until it was placed, and its waiters woken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<Distribution>,
}

/// How long vCPUs stood still, waiting for a page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocktime {
    /// All vCPUs together.
    pub total: u64,
    /// Each vCPU.
    pub per_vcpu: Vec<u64>,
}

/// What the guest got done, in steps of its workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSteps {
    /// On the destination, until its memory was complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub during_target_brownout: Option<u64>,
    /// In a second, undisturbed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steady_per_second: Option<u64>,
    /// From the first instruction on the destination until the guest made nine tenths
    /// of that again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub us_to_90_percent: Option<u64>,
}

/// Bytes on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireBytes {
    /// From the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_destination: Option<u64>,
    /// From the destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_source: Option<u64>,
}

/// A figure that each side has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PerSide {
    /// The source's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<u64>,
    /// The destination's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<u64>,
}

impl Report {
    /// The report as indented JSON, with a line feed at its end.
    pub fn to_json(&self) -> String {
        // Serialising fails only for maps with keys that are no text, and there are none.
        let mut json = serde_json::to_string_pretty(self).expect("a report is plain data");
        json.push('\n');
        json
    }

    /// Writes the JSON to `path` in one step: a reader finds all of it or nothing. What
    /// is there and is no plain file (a device, a pipe, a link) stays, and is written to.
    pub fn write(&self, path: &std::path::Path) -> std::io::Result<()> {
        if std::fs::symlink_metadata(path).is_ok_and(|there| !there.is_file()) {
            return std::fs::write(path, self.to_json());
        }
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}.new", std::process::id()));
        std::fs::write(&beside, self.to_json())
            .and_then(|()| std::fs::rename(&beside, path))
            .inspect_err(|_| drop(std::fs::remove_file(&beside)))
    }
}
