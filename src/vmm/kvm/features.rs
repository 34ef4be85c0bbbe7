//! CPU features in a CPUID table: their names, and which of one table's another lacks.
//!
//! Only what a program may rely on is looked at: feature bits, levels, the layout of the
//! XSAVE area, whose processor it is. Names, caches, topology and the like may differ: a
//! guest goes on seeing those that it has seen.

use kvm_bindings::kvm_cpuid_entry2 as Entry;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::*;

impl Register {
    fn of(self, entry: &Entry) -> u32 {
        match self {
            Eax => entry.eax,
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Eax => "eax",
            Ebx => "ebx",
            Ecx => "ecx",
            Edx => "edx",
        }
    }
}

/// A register whose bits are features: function, index, register, bits that are no
/// features but tell a state, and the names from bit 0 up ("-": none).
struct FeatureWord(u32, u32, Register, u32, &'static str);

/// OSXSAVE and OSPKE repeat a bit of CR4.
const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;

/// The names are those of Linux's /proc/cpuinfo as far as it has one.
const WORDS: &[FeatureWord] = &[
    FeatureWord(
        1,
        0,
        Ecx,
        OSXSAVE,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - \
         pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c \
         rdrand hypervisor",
    ),
    FeatureWord(
        1,
        0,
        Edx,
        0,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - \
         dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    FeatureWord(6, 0, Eax, 0, "dtherm ida arat - pln - pts hwp"),
    FeatureWord(
        7,
        0,
        Ebx,
        0,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm \
         zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt \
         clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    FeatureWord(
        7,
        0,
        Ecx,
        OSPKE,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq \
         avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid key_locker \
         bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    FeatureWord(
        7,
        0,
        Edx,
        0,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl \
         md_clear rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig \
         arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d \
         arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    FeatureWord(
        7,
        1,
        Eax,
        0,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs \
         fsrc - - - - fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist",
    ),
    FeatureWord(
        7,
        1,
        Edx,
        0,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchi - \
         - - - avx10 - apx_f",
    ),
    FeatureWord(7, 2, Edx, 0, "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    FeatureWord(
        0xD,
        0,
        Eax,
        0,
        "xcr0_x87 xcr0_sse xcr0_avx xcr0_bndregs xcr0_bndcsr xcr0_opmask xcr0_zmm_hi256 \
         xcr0_hi16_zmm - xcr0_pkru - - - - - - - xcr0_xtilecfg xcr0_xtiledata",
    ),
    FeatureWord(0xD, 0, Edx, 0, ""),
    FeatureWord(0xD, 1, Eax, 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    FeatureWord(0xD, 1, Ecx, 0, ""),
    FeatureWord(0xD, 1, Edx, 0, ""),
    FeatureWord(0x14, 0, Ebx, 0, ""),
    FeatureWord(0x14, 0, Ecx, 0, ""),
    FeatureWord(
        0x4000_0001,
        0,
        Eax,
        0,
        "kvmclock_old kvm_nop_io_delay kvm_mmu_op kvmclock kvm_asyncpf kvm_steal_time kvm_pv_eoi \
         kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control \
         kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range \
         kvm_migration_control - - - - - - kvmclock_stable",
    ),
    FeatureWord(
        0x8000_0001,
        0,
        Ecx,
        0,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs \
         xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext \
         ptsc perfctr_llc mwaitx",
    ),
    FeatureWord(
        0x8000_0001,
        0,
        Edx,
        0,
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - \
         lm 3dnowext 3dnow",
    ),
    FeatureWord(0x8000_0007, 0, Edx, 0, "- - - - - - - - constant_tsc"),
    FeatureWord(
        0x8000_0008,
        0,
        Ebx,
        0,
        "clzero irperf xsaveerptr invlpgb rdpru - - - mcommit wbnoinvd - - amd_ibpb - amd_ibrs \
         amd_stibp - amd_stibp_always_on - - - - - - amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd \
         btc_no ibpb_ret",
    ),
    FeatureWord(
        0x8000_000A,
        0,
        Edx,
        0,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists",
    ),
    FeatureWord(
        0x8000_0021,
        0,
        Eax,
        0,
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr",
    ),
];

/// A number of which more is better: function, index, register, shift of its byte, name.
struct Level(u32, u32, Register, u32, &'static str);

const LEVELS: &[Level] = &[
    Level(0xA, 0, Eax, 0, "version of the performance counters"),
    Level(0xA, 0, Eax, 8, "performance counters"),
    Level(0x24, 0, Ebx, 0, "version of AVX10"),
    Level(0x8000_0008, 0, Eax, 0, "physical address bits"),
    Level(0x8000_0008, 0, Eax, 8, "virtual address bits"),
];

fn find(table: &[Entry], function: u32, index: u32) -> Option<&Entry> {
    table.iter().find(|entry| entry.function == function && entry.index == index)
}

fn read(table: &[Entry], function: u32, index: u32, register: Register) -> u32 {
    find(table, function, index).map_or(0, |entry| register.of(entry))
}

/// The features of `guest`'s table that `host`'s lacks, by name.
pub fn missing(guest: &[Entry], host: &[Entry]) -> Vec<String> {
    let mut missing = Vec::new();
    for &FeatureWord(function, index, register, ignored, names) in WORDS {
        let wanted = read(guest, function, index, register);
        let lacking = wanted & !read(host, function, index, register) & !ignored;
        for bit in (0..32).filter(|bit| lacking & 1 << bit != 0) {
            missing.push(name(function, index, register, bit, names));
        }
    }
    for &Level(function, index, register, shift, what) in LEVELS {
        let level = |table| read(table, function, index, register) >> shift & 0xFF;
        let (wanted, had) = (level(guest), level(host));
        if wanted > had {
            missing.push(format!("{what}: {wanted}, not {had}"));
        }
    }
    missing
}

fn name(function: u32, index: u32, register: Register, bit: u32, names: &str) -> String {
    match names.split_whitespace().nth(bit as usize) {
        Some(name) if name != "-" => name.to_owned(),
        _ => format!("cpuid {function:x}.{index:x} {} bit {bit}", register.name()),
    }
}

/// Who made the processor, as it tells of itself.
pub fn vendor(table: &[Entry]) -> String {
    find(table, 0, 0).map_or_else(
        || "unknown".to_owned(),
        |entry| {
            let bytes = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes).concat();
            String::from_utf8_lossy(&bytes).into_owned()
        },
    )
}

/// The first part of `guest`'s XSAVE area that lies elsewhere in `host`'s: number, and
/// size and place in both. Parts that `host` lacks are told by [`missing`].
pub fn moved_xsave_part(guest: &[Entry], host: &[Entry]) -> Option<(u32, [u32; 2], [u32; 2])> {
    let parts = read(guest, 0xD, 0, Eax) & read(host, 0xD, 0, Eax);
    (2..32).filter(|part| parts & 1 << part != 0).find_map(|part| {
        let place = |table| [Eax, Ebx].map(|register| read(table, 0xD, part, register));
        let (theirs, ours) = (place(guest), place(host));
        (theirs != ours).then_some((part, theirs, ours))
    })
}

/// Whether the table offers KVM's clock in its present form, and the time stolen.
pub fn offers_clock_and_steal_time(table: &[Entry]) -> (bool, bool) {
    let features = read(table, 0x4000_0001, 0, Eax);
    (features & 1 << 3 != 0, features & 1 << 5 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Entry {
        Entry { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn every_word_has_at_most_32_names_and_some_are_where_the_manuals_have_them() {
        for FeatureWord(function, index, _, _, names) in WORDS {
            assert!(names.split_whitespace().count() <= 32, "{function:x}.{index}");
        }
        let bits = [
            (1, 0, Ecx, 25, "aes"),
            (1, 0, Ecx, 31, "hypervisor"),
            (1, 0, Edx, 26, "sse2"),
            (7, 0, Ebx, 5, "avx2"),
            (7, 0, Ebx, 16, "avx512f"),
            (7, 0, Ebx, 31, "avx512vl"),
            (7, 0, Ecx, 22, "rdpid"),
            (7, 0, Ecx, 28, "movdir64b"),
            (7, 0, Edx, 26, "spec_ctrl"),
            (7, 0, Edx, 31, "spec_ctrl_ssbd"),
            (7, 1, Eax, 5, "avx512_bf16"),
            (7, 1, Eax, 26, "lam"),
            (7, 1, Edx, 19, "avx10"),
            (0xD, 0, Eax, 9, "xcr0_pkru"),
            (0xD, 0, Eax, 18, "xcr0_xtiledata"),
            (0x4000_0001, 0, Eax, 24, "kvmclock_stable"),
            (0x8000_0001, 0, Ecx, 22, "topoext"),
            (0x8000_0001, 0, Edx, 27, "rdtscp"),
            (0x8000_0001, 0, Edx, 29, "lm"),
            (0x8000_0008, 0, Ebx, 24, "amd_ssbd"),
            (0x8000_0008, 0, Ebx, 9, "wbnoinvd"),
            (0x8000_0021, 0, Eax, 8, "autoibrs"),
        ];
        for (function, index, register, bit, expected) in bits {
            let mut with = entry(function, index, [0; 4]);
            match register {
                Eax => with.eax = 1 << bit,
                Ebx => with.ebx = 1 << bit,
                Ecx => with.ecx = 1 << bit,
                Edx => with.edx = 1 << bit,
            }
            assert_eq!(missing(&[with], &[]), [expected]);
            assert!(missing(&[with], &[with]).is_empty());
            assert!(missing(&[], &[with]).is_empty());
        }
    }

    #[test]
    fn bits_without_a_name_are_told_by_number_and_states_not_at_all() {
        let guest = [entry(7, 1, [1 << 31, 0, 0, 0]), entry(1, 0, [0, 0, 1 << 27, 0])];
        assert_eq!(missing(&guest, &[]), ["cpuid 7.1 eax bit 31"]);
    }

    #[test]
    fn levels_and_the_places_of_xsave_parts_are_compared() {
        let wide = entry(0x8000_0008, 0, [0x3034, 0, 0, 0]);
        let narrow = entry(0x8000_0008, 0, [0x302E, 0, 0, 0]);
        assert_eq!(missing(&[wide], &[narrow]), ["physical address bits: 52, not 46"]);
        assert!(missing(&[narrow], &[wide]).is_empty());
        let parts = entry(0xD, 0, [0b111, 0, 0, 0]);
        let [here, there] = [576, 832].map(|place| entry(0xD, 2, [256, place, 0, 0]));
        let moved = moved_xsave_part(&[parts, here], &[parts, there]);
        assert_eq!(moved, Some((2, [256, 576], [256, 832])));
        assert_eq!(moved_xsave_part(&[parts, here], &[parts, here]), None);
    }

    #[test]
    fn the_vendor_is_spelt_in_its_registers_order() {
        let intel = entry(0, 0, [0x16, 0x756E_6547, 0x6C65_746E, 0x4965_6E69]);
        assert_eq!(vendor(&[intel]), "GenuineIntel");
    }
}
