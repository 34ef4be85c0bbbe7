//! [`Model`]: the specification's arithmetic, and what a page must hold after so many
//! visits. Written from the text of `vmm::workload`, not from its code.

use super::failure::CheckFailure;
use super::{CheckParams, CheckPattern, machine};
use std::collections::BTreeMap;

/// Pages below the arena, leaf tables apart.
pub(super) const SYSTEM_PAGES: u64 = 512;
/// Words in a page.
pub(super) const WORDS: usize = 512;
/// Bytes in a page.
pub(super) const PAGE_BYTES: usize = 8 * WORDS;

/// A page's words.
pub(super) type Page = [u64; WORDS];

/// The golden ratio's fraction in 64 bits.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
const MIX_1: u64 = 0xBF58_476D_1CE4_E5B9;
const MIX_2: u64 = 0x94D0_49BB_1331_11EB;

pub(super) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(MIX_1);
    let x = (x ^ (x >> 27)).wrapping_mul(MIX_2);
    x ^ (x >> 31)
}

/// The only `x` with `mix(x) == y`.
fn unmix(y: u64) -> u64 {
    let x = (y ^ (y >> 31) ^ (y >> 62)).wrapping_mul(inverse(MIX_2));
    let x = (x ^ (x >> 27) ^ (x >> 54)).wrapping_mul(inverse(MIX_1));
    x ^ (x >> 30) ^ (x >> 60)
}

/// The inverse of an odd number modulo 2^64, by Newton's iteration: each round doubles
/// the right bits, of which `odd` itself has three.
fn inverse(odd: u64) -> u64 {
    (0..5).fold(odd, |x, _| x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x))))
}

/// The upper half of a product.
pub(super) fn mulhi(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 64) as u64
}

/// Where a page is in the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A vCPU's control page.
    Control(u32),
    /// A vCPU's stall histogram.
    Histogram(u32),
    /// One of the KVM guest's page tables.
    Table,
    /// Its interrupt gates.
    Gates,
    /// Its program.
    Program,
    /// A vCPU's descriptors and stack.
    Processor(u32),
    /// A vCPU's clock.
    Clock(u32),
    /// Filler that nobody visits.
    Filler,
    /// Page `k` of a vCPU's slice.
    Arena(u32, u64),
    /// One of the zero pages.
    Tail,
}

/// A guest as its parameters make it.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) params: CheckParams,
    /// Pages of a slice.
    pub(super) slice: u64,
    /// The first page of the arena.
    pub(super) arena: u64,
    /// The KVM guest's page tables below the arena, but for those that map one slot each.
    tables: BTreeMap<u64, Page>,
}

impl Model {
    pub(super) fn new(params: &CheckParams) -> Result<Self, CheckFailure> {
        let wrong = |text: String| Err(CheckFailure::Params(text));
        let &CheckParams { pages, vcpus, zero_pages, .. } = params;
        if !(1..=4).contains(&vcpus) {
            return wrong(format!("{vcpus} vCPUs; a reference guest has 1 to 4"));
        }
        let leaf_tables = params.kvm.as_ref().map_or(0, |machine| machine.leaf_tables(pages));
        let arena = SYSTEM_PAGES + leaf_tables;
        let least = zero_pages.saturating_add(arena + 16 * u64::from(vcpus));
        if pages < least || pages > 1 << 32 {
            return wrong(format!("{pages} pages; there must be {least} to {}", 1u64 << 32));
        }
        if let Some(steps) = params.expect_steps.as_ref().filter(|v| v.len() != vcpus as usize) {
            return wrong(format!("steps of {} vCPUs are given, not of {vcpus}", steps.len()));
        }
        let traced = params.pattern == CheckPattern::Trace;
        if params.touches.len() != if traced { vcpus as usize } else { 0 } {
            return wrong(format!("a trace of {} vCPUs is given", params.touches.len()));
        }
        let inside = |page: &u64| (arena..pages - zero_pages).contains(page);
        if !params.touches.iter().all(|of| !of.is_empty() && of.iter().all(inside)) {
            return wrong("the trace has pages outside the arena, or a vCPU without any".into());
        }
        let slice = (pages - zero_pages - arena) / u64::from(vcpus);
        let tables = params.kvm.as_ref().map(|machine| machine::tables(machine, pages));
        let tables = tables.transpose().map_err(CheckFailure::Params)?.unwrap_or_default();
        Ok(Self { params: params.clone(), slice, arena, tables })
    }

    pub(super) fn vcpus(&self) -> std::ops::Range<u32> {
        0..self.params.vcpus
    }

    pub(super) fn tail(&self) -> u64 {
        self.params.pages - self.params.zero_pages
    }

    pub(super) fn slice_first(&self, vcpu: u32) -> u64 {
        self.arena + u64::from(vcpu) * self.slice
    }

    pub(super) fn vseed(&self, vcpu: u32) -> u64 {
        mix(self.params.seed.wrapping_add((u64::from(vcpu) + 1).wrapping_mul(GOLDEN)))
    }

    /// The number from which a vCPU takes its choice in step (or rank) `i`.
    pub(super) fn draw(vseed: u64, i: u64) -> u64 {
        mix(vseed.wrapping_add(i.wrapping_mul(GOLDEN)))
    }

    /// One step in so many writes.
    pub(super) fn write_every(&self) -> u64 {
        if self.params.pattern == CheckPattern::ReadModifyWrite { 1 } else { 4 }
    }

    pub(super) fn place(&self, page: u64) -> Place {
        if page >= self.tail() {
            return Place::Tail;
        }
        if let Some(offset) = page.checked_sub(self.arena) {
            let (vcpu, k) = (offset / self.slice, offset % self.slice);
            let owned = vcpu < u64::from(self.params.vcpus);
            return if owned { Place::Arena(vcpu as u32, k) } else { Place::Filler };
        }
        let instruments = 16..16 + 2 * u64::from(self.params.vcpus);
        match page {
            _ if instruments.contains(&page) && page.is_multiple_of(2) => {
                Place::Control(((page - 16) / 2) as u32)
            }
            _ if instruments.contains(&page) => Place::Histogram(((page - 16) / 2) as u32),
            machine::ROOT.. if self.params.kvm.is_some() => self.place_in_machine(page),
            _ => Place::Filler,
        }
    }

    fn place_in_machine(&self, page: u64) -> Place {
        let vcpus = u64::from(self.params.vcpus);
        let of = |first: u64| (first..first + vcpus).contains(&page).then(|| (page - first) as u32);
        if page >= SYSTEM_PAGES || self.tables.contains_key(&page) {
            Place::Table
        } else if page == machine::GATES {
            Place::Gates
        } else if machine::PROGRAM.contains(&page) {
            Place::Program
        } else if let Some(vcpu) = of(machine::PROCESSORS) {
            Place::Processor(vcpu)
        } else if let Some(vcpu) = of(machine::CLOCKS) {
            Place::Clock(vcpu)
        } else {
            Place::Filler
        }
    }

    /// What a page table of the KVM guest must be.
    pub(super) fn table(&self, page: u64) -> Page {
        match (self.tables.get(&page), &self.params.kvm) {
            (Some(table), _) => *table,
            (None, Some(machine)) => {
                machine::leaf_table(machine, page.saturating_sub(SYSTEM_PAGES))
            }
            (None, None) => [0; WORDS],
        }
    }

    /// The first word of a filler or arena page.
    pub(super) fn tag(&self, page: u64) -> u64 {
        mix(self.params.seed.wrapping_add(page.wrapping_mul(GOLDEN))) | 1
    }

    /// The page whose tag this is. `tag` drops one bit: both values are tried.
    pub(super) fn page_of_tag(&self, tag: u64) -> Option<u64> {
        if tag & 1 == 0 {
            return None;
        }
        [tag, tag ^ 1].into_iter().find_map(|mixed| {
            let product = unmix(mixed).wrapping_sub(self.params.seed);
            let page = product.wrapping_mul(inverse(GOLDEN));
            (page < self.params.pages).then_some(page)
        })
    }

    /// The index after `k` in a vCPU's pointer chase.
    pub(super) fn chase(&self, vcpu: u32, k: u64) -> u64 {
        let modulus = self.slice.next_power_of_two();
        let increment = self.vseed(vcpu) | 1;
        let step =
            |x: u64| 0x5851_F42D_4C95_7F2Du64.wrapping_mul(x).wrapping_add(increment) % modulus;
        let mut x = step(k);
        while x >= self.slice {
            x = step(x);
        }
        x
    }

    /// Writes to `into` what `page` holds after `visits` visits that wrote, if it is a
    /// filler, arena or tail page. (No vCPU visits filler or the tail so as to write.)
    pub(super) fn expected(&self, page: u64, visits: u64, into: &mut Page) {
        let successor = match self.place(page) {
            Place::Tail => return into.fill(0),
            Place::Arena(vcpu, k) => self.chase(vcpu, k),
            _ => 0,
        };
        let tag = self.tag(page);
        let mut state = tag;
        for word in into.iter_mut() {
            *word = mix(state);
            state = state.wrapping_add(GOLDEN);
        }
        (into[0], into[1], into[2]) = (tag, visits, successor);
        // Each visit adds the tag to the next word of the upper half, round and round.
        let (rounds, rest) = (visits / 256, (visits % 256) as usize);
        if visits > 0 {
            for (j, word) in into[256..].iter_mut().enumerate() {
                let times = rounds + u64::from(j < rest);
                *word = word.wrapping_add(tag.wrapping_mul(times));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mix_is_undone() {
        assert_eq!(mix(GOLDEN), 0xE220_A839_7B1D_CDAF, "the first number of splitmix64(0)");
        for x in [0, 1, 2, GOLDEN, u64::MAX, 0x1234_5678_9ABC_DEF0] {
            assert_eq!(unmix(mix(x)), x);
            assert_eq!((x | 1).wrapping_mul(inverse(x | 1)), 1);
        }
    }

    #[test]
    fn a_tag_leads_back_to_its_page() {
        let model = Model::new(&CheckParams {
            pages: 5000,
            vcpus: 1,
            seed: 77,
            pattern: CheckPattern::Random,
            touches: vec![],
            zero_pages: 0,
            kvm: None,
            expect_steps: None,
        })
        .unwrap();
        for page in 0..5000 {
            assert_eq!(model.page_of_tag(model.tag(page)), Some(page));
        }
        assert_eq!(model.page_of_tag(model.tag(5000)), None);
        assert_eq!(model.page_of_tag(12345), None);
    }
}
