//! A report from what each side knows: [`SourcePart`], [`DestinationPart`], and the
//! [`check`](Report::check) that the whole makes sense.
//!
//! The destination sends its part over the control stream at the end; it is a
//! peer's word, so it is read with a limit, holds no text that could reach a
//! terminal, and its numbers are added without overflow.

use super::schema::{
    Blocktime, Compression, Distribution, DowntimeParts, FaultHops, Guest, GuestSteps, Link, Mode,
    Outage, Outcome, Pages, PerSide, Phases, Report, SCHEMA, Side, Switchover, WireBytes,
};
use serde::{Deserialize, Serialize};

/// The most bytes of a [`DestinationPart`] as JSON.
pub const PART_BYTES_MAX: usize = 64 << 10;

/// What both sides know about a migration.
#[derive(Clone, Debug)]
pub struct Heading {
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not complete.
    pub reason: Option<String>,
    /// How the memory was moved.
    pub mode: Mode,
    /// The pre-paging policy, if this side knows it.
    pub policy: Option<String>,
    /// What was moved.
    pub guest: Guest,
    /// Over what.
    pub link: Link,
    /// When the guest moved, and why then.
    pub switchover: Option<Switchover>,
}

/// What the source knows alone.
#[derive(Clone, Debug, Default)]
pub struct SourcePart {
    /// Until both sides agree on what is moved.
    pub handshake_us: Option<u64>,
    /// From then until the pause.
    pub source_brownout_us: Option<u64>,
    /// From the pause's beginning until the last vCPU had stopped.
    pub pause_us: Option<u64>,
    /// From then until the state was taken.
    pub capture_us: Option<u64>,
    /// From the pause's beginning until the destination's word that the first vCPU runs
    /// was heard: the downtime and the word's way back.
    pub until_running_heard_us: Option<u64>,
    /// Bytes sent between the pause and the commit.
    pub switchover_bytes: Option<u64>,
    /// From the request to migrate until both sides agree that it is done.
    pub total_us: Option<u64>,
    /// The pages as the source counted them.
    pub pages: Pages,
    /// What the guest got done in a second before the migration.
    pub steady_per_second: Option<u64>,
    /// Losses of the link after the commit.
    pub outages: Vec<Outage>,
    /// Bytes that the source's network end sent and received.
    pub wire_bytes: WireBytes,
    /// See [`FaultHops::serve`].
    pub serve_ns: Option<Distribution>,
    /// See [`Report::compression`].
    pub compression: Option<Compression>,
    /// Processor time.
    pub cpu_us: Option<u64>,
    /// The most memory resident.
    pub peak_rss_bytes: Option<u64>,
}

/// What the destination knows alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DestinationPart {
    /// From the state's arrival until it was in the new machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore_us: Option<u64>,
    /// From the order to run until the first vCPU ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume_us: Option<u64>,
    /// From then until the memory was complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_brownout_us: Option<u64>,
    /// The pages as the destination counted them.
    pub pages: Pages,
    /// See [`Report::network_faults`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_faults: Option<u64>,
    /// See [`Report::pages_a_fault`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pages_a_fault: Option<u64>,
    /// See [`Report::late_hits`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub late_hits: Option<u64>,
    /// See [`Report::unattributed_faults`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unattributed_faults: Option<u64>,
    /// See [`Report::local_faults`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_faults: Option<u64>,
    /// See [`Report::fault_latency_ns`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault_latency_ns: Option<Distribution>,
    /// See [`Report::fault_hops_ns`]; without `serve`.
    pub fault_hops_ns: FaultHops,
    /// See [`Report::blocktime_us`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocktime_us: Option<Blocktime>,
    /// See [`Report::guest_max_gap_us`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_max_gap_us: Option<u64>,
    /// See [`Report::guest_stall_ns`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_stall_ns: Option<Distribution>,
    /// What the guest got done, as far as the destination saw it.
    pub guest_steps: GuestSteps,
    /// Links that stood, one after the other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u32>,
    /// Losses of the link after the commit.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub outages: Vec<Outage>,
    /// Bytes that the destination's network end sent and received.
    pub wire_bytes: WireBytes,
    /// Processor time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_us: Option<u64>,
    /// The most memory resident.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
    /// Whether every page was the same as in an independent model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified: Option<bool>,
}

/// A destination's part that is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    /// More than [`PART_BYTES_MAX`].
    #[error("the destination's part of the report has {0} bytes, more than {PART_BYTES_MAX}")]
    TooLong(usize),
    /// No JSON object: serde would take an array for the fields in their order.
    #[error("the destination's part of the report is no JSON object")]
    NoObject,
    /// Not the JSON of one.
    #[error("the destination's part of the report cannot be read")]
    Json(#[from] serde_json::Error),
}

impl DestinationPart {
    /// The part as compact JSON, for the control stream.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a report is plain data")
    }

    /// A part that came over the control stream.
    pub fn from_json(bytes: &[u8]) -> Result<Self, PartError> {
        if bytes.len() > PART_BYTES_MAX {
            return Err(PartError::TooLong(bytes.len()));
        }
        if bytes.trim_ascii_start().first() != Some(&b'{') {
            return Err(PartError::NoObject);
        }
        Ok(serde_json::from_slice(bytes)?)
    }
}

impl Report {
    /// The source's report, whole if the destination's part came.
    ///
    /// The downtime is read from one clock, the source's, less half a round trip for
    /// the last word's way; what is no other part of it is its `transfer`.
    pub fn merge(
        heading: Heading,
        source: SourcePart,
        destination: Option<DestinationPart>,
    ) -> Self {
        let destination = destination.unwrap_or_default();
        let half_rtt = heading.link.rtt_us.map(|rtt| rtt / 2);
        let downtime = (|| Some(source.until_running_heard_us?.saturating_sub(half_rtt?)))();
        let other_parts =
            [source.pause_us, source.capture_us, destination.restore_us, destination.resume_us];
        let transfer = (|| {
            other_parts
                .into_iter()
                .try_fold(downtime?, |left, part| Some(left.saturating_sub(part?)))
        })();
        let mut report = Self::of_destination(heading, destination);
        report.side = Side::Source;
        report.phases_us.handshake = source.handshake_us;
        report.phases_us.source_brownout = source.source_brownout_us;
        report.phases_us.blackout = downtime;
        report.downtime_us = downtime;
        report.downtime_error_us = downtime.and(half_rtt);
        report.downtime_parts_us.pause = source.pause_us;
        report.downtime_parts_us.capture = source.capture_us;
        report.downtime_parts_us.transfer = transfer;
        report.switchover_bytes = source.switchover_bytes;
        report.total_us = source.total_us;
        report.pages = source.pages.or(report.pages);
        report.outages = merged(source.outages, report.outages);
        let steps = &mut report.guest_steps;
        steps.steady_per_second = source.steady_per_second.or(steps.steady_per_second);
        let wire = &mut report.wire_bytes;
        wire.to_destination = source.wire_bytes.to_destination.or(wire.to_destination);
        wire.to_source = source.wire_bytes.to_source.or(wire.to_source);
        // Only the source knows it, whatever the peer says.
        report.fault_hops_ns.serve = source.serve_ns;
        report.compression = source.compression;
        report.cpu_us.source = source.cpu_us;
        report.peak_rss_bytes.source = source.peak_rss_bytes;
        report
    }

    /// The destination's own report.
    pub fn of_destination(heading: Heading, part: DestinationPart) -> Self {
        let link = Link { epochs: part.epochs.or(heading.link.epochs), ..heading.link };
        Self {
            schema: SCHEMA.to_owned(),
            outcome: heading.outcome,
            reason: heading.reason,
            side: Side::Destination,
            mode: heading.mode,
            policy: heading.policy,
            guest: heading.guest,
            link,
            switchover: heading.switchover,
            phases_us: Phases { target_brownout: part.target_brownout_us, ..Phases::default() },
            downtime_us: None,
            downtime_error_us: None,
            downtime_parts_us: DowntimeParts {
                restore: part.restore_us,
                resume: part.resume_us,
                ..DowntimeParts::default()
            },
            guest_max_gap_us: part.guest_max_gap_us,
            guest_stall_ns: part.guest_stall_ns,
            switchover_bytes: None,
            total_us: None,
            pages: part.pages,
            network_faults: part.network_faults,
            pages_a_fault: part.pages_a_fault,
            late_hits: part.late_hits,
            unattributed_faults: part.unattributed_faults,
            local_faults: part.local_faults,
            fault_latency_ns: part.fault_latency_ns,
            fault_hops_ns: part.fault_hops_ns,
            blocktime_us: part.blocktime_us,
            guest_steps: part.guest_steps,
            wire_bytes: part.wire_bytes,
            cpu_us: PerSide { source: None, destination: part.cpu_us },
            peak_rss_bytes: PerSide { source: None, destination: part.peak_rss_bytes },
            compression: None,
            outages: part.outages,
            huge_pages: None,
            verified: part.verified,
        }
    }
}

/// The source's outages with the destination's moments; those that only the destination saw
/// (a link that was lost again before the source knew that it stood) in their places.
fn merged(mut source: Vec<Outage>, destination: Vec<Outage>) -> Vec<Outage> {
    for there in destination {
        match source.iter_mut().find(|here| here.epoch == there.epoch) {
            Some(here) => here.destination = there.destination,
            // A peer's word: only what it alone can know is taken, and it has no text.
            None => source.push(Outage { why: None, source: None, ..there }),
        }
    }
    source.sort_by_key(|outage| outage.epoch.unwrap_or(u32::MAX));
    source
}

impl Pages {
    /// Each figure from here, or from `other` where there is none.
    fn or(self, other: Pages) -> Pages {
        Pages {
            total: self.total.or(other.total),
            zero: self.zero.or(other.zero),
            hole: self.hole.or(other.hole),
            poisoned: self.poisoned.or(other.poisoned),
            seeded: self.seeded.or(other.seeded),
            demanded: self.demanded.or(other.demanded),
            pushed: self.pushed.or(other.pushed),
            drained: self.drained.or(other.drained),
            precopied: self.precopied.or(other.precopied),
            resent_after_link_loss: self.resent_after_link_loss.or(other.resent_after_link_loss),
            sent_twice: self.sent_twice.or(other.sent_twice),
            placed_twice: self.placed_twice.or(other.placed_twice),
        }
    }
}
