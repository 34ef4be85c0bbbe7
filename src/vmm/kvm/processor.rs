//! [`Processor`]: the processor that a guest has seen from its beginning. It travels with
//! the proposal, so that the destination can show the guest the same one, or say
//! before the guest is paused why it cannot.

use super::features;
use crate::proto::message::Mismatch;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, kvm_cpuid_entry2 as Entry};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use std::fmt::Write;

/// Rates of two time-stamp counters that differ by less than this, in parts of a million,
/// are taken for equal: KVM does so, and two calibrations of one clock differ by less.
const TSC_TOLERANCE_PPM: u64 = 250;

/// A guest's processor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Processor {
    /// The CPUID table of vCPU 0.
    #[serde(serialize_with = "write_table", deserialize_with = "read_table")]
    pub(super) cpuid: Vec<Entry>,
    /// The MSRs of its state, in the order in which they are restored.
    pub(super) msrs: Vec<u32>,
    /// The rate of its time-stamp counter.
    pub(super) tsc_khz: u32,
}

/// What a host's KVM offers to a guest.
pub(super) struct Offer<'a> {
    /// The CPUID table of what it supports.
    pub cpuid: &'a [Entry],
    /// The rate of the host's time-stamp counter.
    pub tsc_khz: u32,
    /// Whether a guest may be given another rate.
    pub scales_tsc: bool,
}

impl Processor {
    /// Says what of this processor `host` cannot show, if anything; MSRs apart, which can
    /// only be tried: see [`check_msrs`](Self::check_msrs).
    pub(super) fn check(&self, host: &Offer) -> Result<(), Mismatch> {
        let (theirs, ours) = (features::vendor(&self.cpuid), features::vendor(host.cpuid));
        if theirs != ours {
            return Err(Mismatch::new("the processor's vendor", theirs, ours));
        }
        let missing = features::missing(&self.cpuid, host.cpuid);
        if !missing.is_empty() {
            let none = "none of these from this host's KVM";
            return Err(Mismatch::new("CPU features", missing.join(", "), none));
        }
        if let Some((part, theirs, ours)) = features::moved_xsave_part(&self.cpuid, host.cpuid) {
            let field = format!("part {part} of the XSAVE area");
            let place = |[size, place]: [u32; 2]| format!("{size} bytes at {place}");
            return Err(Mismatch::new(&field, place(theirs), place(ours)));
        }
        if self.tsc_khz == 0 || !host.scales_tsc && differs(self.tsc_khz, host.tsc_khz) {
            let theirs = format!("{} kHz", self.tsc_khz);
            let ours = format!("{} kHz, and KVM here cannot scale it", host.tsc_khz);
            return Err(Mismatch::new("the time-stamp counter's rate", theirs, ours));
        }
        Ok(())
    }

    /// Names the MSRs of this processor that are not among those `usable` on a host.
    pub(super) fn check_msrs(&self, usable: &[u32]) -> Result<(), Mismatch> {
        let missing = self.msrs.iter().filter(|index| !usable.contains(index));
        let missing: Vec<_> = missing.map(|index| format!("{index:#x}")).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Mismatch::new("MSRs", missing.join(", "), "none of these from this host's KVM"))
    }

    /// The table as KVM wants it.
    pub(super) fn table(&self) -> Result<CpuId, Mismatch> {
        let most = KVM_MAX_CPUID_ENTRIES;
        CpuId::from_entries(&self.cpuid).map_err(|_| too_many("CPUID", self.cpuid.len(), most))
    }

    /// Refuses a list of MSRs that KVM would not take for its length.
    pub(super) fn check_lengths(&self) -> Result<(), Mismatch> {
        match self.msrs.len() {
            0..=KVM_MAX_MSR_ENTRIES => Ok(()),
            count => Err(too_many("MSRs", count, KVM_MAX_MSR_ENTRIES)),
        }
    }
}

fn too_many(what: &str, count: usize, most: usize) -> Mismatch {
    Mismatch::new(what, format!("{count} entries"), format!("at most {most}"))
}

/// Whether a guest would notice that one rate was replaced by the other.
pub(super) fn differs(guest_khz: u32, host_khz: u32) -> bool {
    let difference = u64::from(guest_khz.abs_diff(host_khz));
    difference * 1_000_000 > u64::from(host_khz) * TSC_TOLERANCE_PPM
}

fn words(entry: &Entry) -> [u32; 7] {
    [entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx]
}

/// A table in one text: entries of seven hexadecimal numbers each. As numbers in JSON it
/// could be larger than a proposal may be.
fn write_table<S: Serializer>(table: &[Entry], serializer: S) -> Result<S::Ok, S::Error> {
    let mut text = String::new();
    for entry in table {
        let [function, index, flags, eax, ebx, ecx, edx] = words(entry);
        let separator = if text.is_empty() { "" } else { "," };
        write!(text, "{separator}{function:x} {index:x} {flags:x} {eax:x} {ebx:x} {ecx:x} {edx:x}")
            .map_err(ser::Error::custom)?;
    }
    serializer.serialize_str(&text)
}

fn read_table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Entry>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let mut table = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        if table.len() == KVM_MAX_CPUID_ENTRIES {
            let most = KVM_MAX_CPUID_ENTRIES;
            return Err(de::Error::custom(format!("more than {most} CPUID entries")));
        }
        let numbers: Result<Vec<_>, _> =
            part.split(' ').map(|number| u32::from_str_radix(number, 16)).collect();
        let numbers = numbers.map_err(de::Error::custom)?;
        let [function, index, flags, eax, ebx, ecx, edx] = numbers[..] else {
            return Err(de::Error::custom("a CPUID entry without its seven numbers"));
        };
        table.push(Entry { function, index, flags, eax, ebx, ecx, edx, ..Entry::default() });
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::message::GUEST_INFO_MAX;

    fn table() -> Vec<Entry> {
        let of = |function, index, eax, ebx| Entry {
            function,
            index,
            flags: 1,
            eax,
            ebx,
            ..Default::default()
        };
        vec![of(0, 0, 13, 1), of(7, 0, 1, 1 << 5), of(0xD, 0, 7, 0), of(0xD, 2, 256, 576)]
    }

    fn processor() -> Processor {
        Processor { cpuid: table(), msrs: vec![0x10, 0x48], tsc_khz: 2_000_000 }
    }

    fn check(of: &Processor, cpuid: &[Entry], tsc_khz: u32, scales_tsc: bool) -> Option<Mismatch> {
        of.check(&Offer { cpuid, tsc_khz, scales_tsc }).err()
    }

    #[test]
    fn the_same_and_a_better_host_are_taken() {
        let guest = processor();
        assert_eq!(check(&guest, &table(), 2_000_100, false), None);
        let mut better = table();
        better[1].ebx |= 1 << 16;
        better.push(Entry { function: 0x19, eax: 1, ..Default::default() });
        assert_eq!(check(&guest, &better, 3_000_000, true), None);
        assert_eq!(guest.check_msrs(&[0x10, 0x48, 0x3A]), Ok(()));
    }

    #[test]
    fn whatever_a_host_lacks_is_named() {
        let named = |mismatch: Option<Mismatch>| {
            let mismatch = mismatch.expect("a mismatch");
            (mismatch.field, mismatch.source_value)
        };
        let mut guest = processor();
        guest.cpuid[1].ebx |= 1 << 16 | 1 << 28;
        let (field, value) = named(check(&guest, &table(), 2_000_000, false));
        assert_eq!((field.as_str(), value.as_str()), ("CPU features", "avx512f, avx512cd"));

        let guest = processor();
        let mut other = table();
        other[0].ebx = 2;
        let (field, _) = named(check(&guest, &other, 2_000_000, false));
        assert_eq!(field, "the processor's vendor");
        let mut other = table();
        other[3].ebx = 832;
        let (field, value) = named(check(&guest, &other, 2_000_000, false));
        assert_eq!(
            (field.as_str(), value.as_str()),
            ("part 2 of the XSAVE area", "256 bytes at 576")
        );
        let (field, _) = named(check(&guest, &table(), 2_001_000, false));
        assert_eq!(field, "the time-stamp counter's rate");
        let (field, value) = named(guest.check_msrs(&[0x10]).err());
        assert_eq!((field.as_str(), value.as_str()), ("MSRs", "0x48"));
    }

    #[test]
    fn the_largest_table_fits_a_proposal_and_comes_back() {
        let ones = u32::MAX;
        let entry = Entry {
            function: ones,
            index: ones,
            flags: ones,
            eax: ones,
            ebx: ones,
            ecx: ones,
            edx: ones,
            ..Default::default()
        };
        let largest = Processor {
            cpuid: vec![entry; KVM_MAX_CPUID_ENTRIES],
            msrs: vec![ones; KVM_MAX_MSR_ENTRIES],
            tsc_khz: ones,
        };
        let json = serde_json::to_string(&largest).unwrap();
        assert!(json.len() < GUEST_INFO_MAX * 3 / 4, "{}", json.len());
        let back: Processor = serde_json::from_str(&json).unwrap();
        assert_eq!(back.cpuid, largest.cpuid);
        assert_eq!(back.msrs, largest.msrs);
        let longer = json.replacen("\"cpuid\":\"", "\"cpuid\":\"1 2 3 4 5 6 7,", 1);
        let error = serde_json::from_str::<Processor>(&longer).unwrap_err().to_string();
        assert!(error.contains("more than 256"), "{error}");
        for bad in ["1 2 3", "1 2 3 4 5 6 7 8", "1 2 3 4 5 6 x", "1 2 3 4 5 6 123456789"] {
            let json = format!(r#"{{"cpuid":"{bad}","msrs":[],"tsc_khz":1}}"#);
            assert!(serde_json::from_str::<Processor>(&json).is_err(), "{bad}");
        }
    }
}
