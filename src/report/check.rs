//! [`Report::check`]: what must be true of a report, whoever wrote it.

use super::schema::{Distribution, HugePages, Outcome, Report, SCHEMA, Side};

impl Report {
    /// What is wrong with this report, one sentence each; empty if nothing is.
    ///
    /// Any report must be of this schema and have ordered quantiles. A source's report of
    /// a completed migration has the counters that must be 0, and they are; and each page came
    /// from exactly one place. A migration that was recovered
    /// has also sent again what a lost link, and no more than that, had swallowed. Where the destination's part
    /// never came (it has all the memory, and was lost before it could report), what only
    /// that part says is not missed.
    pub fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        self.check_shape(&mut wrong);
        let completed = matches!(self.outcome, Outcome::Completed | Outcome::Recovered);
        let whole = self.side == Side::Source && completed;
        let merged = whole && self.has_destination_part();
        if merged {
            self.check_counters(&mut wrong);
            self.check_downtime(&mut wrong);
        }
        if whole {
            self.check_origins(&mut wrong);
        }
        if merged {
            self.check_faults(&mut wrong);
        }
        wrong
    }

    /// Whether anything in this report is from the destination.
    pub fn has_destination_part(&self) -> bool {
        self.network_faults.is_some()
            || self.pages.placed_twice.is_some()
            || self.downtime_parts_us.restore.is_some()
    }

    fn check_shape(&self, wrong: &mut Vec<String>) {
        if self.schema != SCHEMA {
            wrong.push(format!("schema is {:?}, not {SCHEMA}", self.schema));
        }
        let completed = matches!(self.outcome, Outcome::Completed | Outcome::Recovered);
        if !completed && self.reason.is_none() {
            wrong.push("not completed, and no reason given".to_owned());
        }
        if let Some(total) = self.pages.total
            && u128::from(total) * u128::from(self.guest.page_size)
                != u128::from(self.guest.memory_bytes)
        {
            wrong.push(format!(
                "{total} pages of {} bytes are not {} bytes of memory",
                self.guest.page_size, self.guest.memory_bytes
            ));
        }
        if let Some(blocktime) = &self.blocktime_us
            && blocktime.per_vcpu.len() != self.guest.vcpus as usize
        {
            let listed = blocktime.per_vcpu.len();
            wrong.push(format!("blocktime of {listed} vCPUs; the guest has {}", self.guest.vcpus));
        }
        let huge = self.huge_pages.as_ref();
        if let Some(HugePages { blocks, collapsed, refused, failed, .. }) = huge
            && let Some(tried) = sum(&[*collapsed, *refused, *failed].map(Some))
            && tried > u128::from(*blocks)
        {
            wrong.push(format!("{tried} of {blocks} blocks became huge pages or did not"));
        }
        let hops = &self.fault_hops_ns;
        for (name, distribution) in [
            ("guest_stall_ns", self.guest_stall_ns.as_ref()),
            ("fault_latency_ns", self.fault_latency_ns.as_ref()),
            ("fault_hops_ns.ask", hops.ask.as_ref()),
            ("fault_hops_ns.answer", hops.answer.as_ref()),
            ("fault_hops_ns.serve", hops.serve.as_ref()),
            ("fault_hops_ns.place", hops.place.as_ref()),
            ("huge_pages.call_ns", huge.map(|huge| &huge.call_ns)),
            ("huge_pages.guest_stall_ns", huge.and_then(|huge| huge.guest_stall_ns.as_ref())),
        ] {
            if distribution.as_ref().is_some_and(|distribution| !distribution.is_ordered()) {
                wrong.push(format!("quantiles of {name} are out of order"));
            }
        }
        if self.verified == Some(false) {
            wrong.push("the guest's memory is not what it should be".to_owned());
        }
    }

    fn check_counters(&self, wrong: &mut Vec<String>) {
        let recovered = self.outcome == Outcome::Recovered;
        let one_epoch = self.link.epochs.is_none_or(|epochs| epochs == 1);
        if !one_epoch && !recovered {
            wrong.push("the link was lost, and the outcome is not \"recovered\"".to_owned());
        }
        for (name, count) in [
            ("sent_twice", self.pages.sent_twice),
            ("placed_twice", self.pages.placed_twice),
            // Recovered, this is compared with the rest of the pages below.
            ("resent_after_link_loss", self.pages.resent_after_link_loss.filter(|_| !recovered)),
        ] {
            match count {
                Some(0) => {}
                Some(count) => wrong.push(format!("{name} is {count}, not 0")),
                // A process that went on with another's session does not know them.
                None if recovered => {}
                None => wrong.push(format!("{name} is absent")),
            }
        }
    }

    fn check_downtime(&self, wrong: &mut Vec<String>) {
        if self.outcome == Outcome::Recovered && self.downtime_us.is_none() {
            return;
        }
        let Some(downtime) = self.downtime_us else {
            wrong.push("downtime_us is absent".to_owned());
            return;
        };
        if self.phases_us.blackout != Some(downtime) {
            wrong.push("the blackout is not the downtime".to_owned());
        }
        let parts = &self.downtime_parts_us;
        let parts = [parts.pause, parts.capture, parts.transfer, parts.restore, parts.resume];
        if let Some(sum) = sum(&parts)
            && sum != u128::from(downtime)
        {
            wrong.push(format!("the parts of the downtime make {sum} us, not {downtime}"));
        }
        if self.total_us.is_some_and(|total| total < downtime) {
            wrong.push("the downtime is longer than the migration".to_owned());
        }
    }

    fn check_origins(&self, wrong: &mut Vec<String>) {
        let pages = &self.pages;
        let origins = [
            pages.seeded,
            pages.demanded,
            pages.pushed,
            pages.drained,
            pages.zero,
            pages.hole,
            // Not in reports that are older than it.
            Some(pages.poisoned.unwrap_or(0)),
            // Nothing is copied before a pure post-copy.
            Some(pages.precopied.unwrap_or(0)),
        ];
        // Without a lost link it is wrong by itself.
        let recovered = self.outcome == Outcome::Recovered;
        let again = pages.resent_after_link_loss.filter(|_| recovered).map_or(0, u128::from);
        match (sum(&origins), pages.total) {
            (Some(sum), Some(total)) if sum == u128::from(total) + again => {}
            (Some(sum), Some(total)) => {
                let but =
                    if again == 0 { String::new() } else { format!(" and {again} sent again") };
                wrong.push(format!(
                    "seeded + demanded + pushed + drained + zero + hole + poisoned + precopied is \
                     {sum}, not {total}{but}"
                ));
            }
            // Where a process went on with another's session only the destination's part has
            // these counts, and it may not have come. Some of them would be a mistake.
            (None, Some(_)) if recovered && origins[..6].iter().all(Option::is_none) => {}
            _ => wrong.push("a count of pages is absent".to_owned()),
        }
    }

    fn check_faults(&self, wrong: &mut Vec<String>) {
        let (Some(network), Some(late)) = (self.network_faults, self.late_hits) else {
            wrong.push("a count of faults is absent".to_owned());
            return;
        };
        let again = self.pages.resent_after_link_loss.unwrap_or(0);
        let asked = network.saturating_mul(self.pages_a_fault.unwrap_or(1));
        if self.pages.demanded.is_some_and(|demanded| demanded > asked.saturating_add(again)) {
            wrong.push("more pages were demanded than there were network faults".to_owned());
        }
        let waited = u128::from(network) + u128::from(late);
        if let Some(latency) = &self.fault_latency_ns
            && u128::from(latency.count) != waited
        {
            let count = latency.count;
            wrong
                .push(format!("{count} fault latencies for {waited} network faults and late hits"));
        }
        let hops = [&self.fault_hops_ns.ask, &self.fault_hops_ns.answer, &self.fault_hops_ns.place];
        let counts = hops.map(|hop| hop.as_ref().map_or(0, |hop| hop.count));
        if counts.iter().any(|count| *count != counts[0] || u128::from(*count) > waited) {
            wrong.push(format!("{counts:?} hops of {waited} network faults and late hits"));
        }
        let all = waited + u128::from(self.local_faults.unwrap_or(u64::MAX));
        if self.unattributed_faults.is_some_and(|count| u128::from(count) > all) {
            wrong.push("more unattributed faults than faults".to_owned());
        }
    }
}

impl Distribution {
    fn is_ordered(&self) -> bool {
        let present: Vec<u64> =
            [self.p50, self.p90, self.p99, self.p999, self.max].into_iter().flatten().collect();
        present.is_sorted() && self.mean.unwrap_or(0) <= self.max.unwrap_or(u64::MAX)
    }
}

/// The sum of counts that come from a peer: none if one is absent, and no overflow.
fn sum(counts: &[Option<u64>]) -> Option<u128> {
    counts.iter().map(|count| count.map(u128::from)).sum()
}
