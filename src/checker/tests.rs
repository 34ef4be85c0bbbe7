//! The checker against a guest that is simulated here step by step, naively.

use super::model::{Model, PAGE_BYTES, Page, WORDS};
use super::*;
use proptest::prelude::*;
use std::sync::OnceLock;

const PATTERNS: [CheckPattern; 8] = [
    CheckPattern::Sequential,
    CheckPattern::Strided,
    CheckPattern::Random,
    CheckPattern::Zipf,
    CheckPattern::HotSetWithScan,
    CheckPattern::PointerChase,
    CheckPattern::ReadModifyWrite,
    CheckPattern::Trace,
];

/// Memory in the making.
struct Simulated {
    params: CheckParams,
    model: Model,
    pages: Vec<Page>,
}

impl Simulated {
    fn new(params: CheckParams) -> Self {
        let model = Model::new(&params).unwrap();
        let mut pages = vec![[0; WORDS]; params.pages as usize];
        for (number, page) in (0..).zip(&mut pages) {
            model.expected(number, 0, page);
        }
        for vcpu in model.vcpus() {
            let mut control = [0; WORDS];
            control[..10].copy_from_slice(&[
                u64::from_le_bytes(*b"postcopy"),
                0,
                params.seed,
                model.vseed(vcpu),
                PATTERNS.iter().position(|&pattern| pattern == params.pattern).unwrap() as u64,
                model.arena + u64::from(vcpu) * model.slice,
                model.slice,
                params.pages - params.zero_pages,
                params.zero_pages,
                if params.pattern == CheckPattern::ReadModifyWrite { 0 } else { 3 },
            ]);
            pages[16 + 2 * vcpu as usize] = control;
            pages[17 + 2 * vcpu as usize] = [0; WORDS];
        }
        Self { params, model, pages }
    }

    /// Makes `steps` steps of `vcpu`, to the letter.
    fn run(&mut self, vcpu: u32, steps: u64) {
        let n = self.model.slice;
        let vseed = self.model.vseed(vcpu);
        let control = 16 + 2 * vcpu as usize;
        let (mut cursor, mut lane) = (self.pages[control][17], self.pages[control][18]);
        for s in self.pages[control][1]..self.pages[control][1] + steps {
            let h = Model::draw(vseed, s);
            let mulhi = |a: u64, b: u64| ((u128::from(a) * u128::from(b)) >> 64) as u64;
            let slice = self.model.arena + u64::from(vcpu) * n;
            let k = match self.params.pattern {
                CheckPattern::Trace => {
                    let start = self.pages[control][28];
                    let touches = &self.params.touches[vcpu as usize];
                    let since = if s < start { s } else { s - start };
                    touches[since as usize % touches.len()].wrapping_sub(slice)
                }
                CheckPattern::Random | CheckPattern::ReadModifyWrite => mulhi(h, n),
                CheckPattern::Zipf => {
                    let mut u = h >> 32;
                    u = (u * u) >> 32;
                    u = (u * u) >> 32;
                    mulhi(Model::draw(vseed, (u * n) >> 32), n)
                }
                CheckPattern::HotSetWithScan if s % 8 != 7 => mulhi(h, n / 16),
                CheckPattern::Sequential | CheckPattern::HotSetWithScan => {
                    let next = (cursor + 1) % n;
                    std::mem::replace(&mut cursor, next)
                }
                CheckPattern::Strided => {
                    let k = cursor;
                    cursor += 16;
                    if cursor >= n {
                        lane = (lane + 1) % 16;
                        cursor = lane;
                    }
                    k
                }
                CheckPattern::PointerChase => {
                    let next = self.pages[(slice + cursor) as usize][2];
                    std::mem::replace(&mut cursor, next)
                }
            };
            let page = &mut self.pages[slice.wrapping_add(k) as usize];
            if self.params.pattern == CheckPattern::ReadModifyWrite || s % 4 == 0 {
                let word = 256 + (page[1] % 256) as usize;
                page[word] = page[word].wrapping_add(page[0]);
                page[1] += 1;
            }
        }
        let control = &mut self.pages[control];
        control[1] += steps;
        (control[17], control[18]) = (cursor, lane);
    }

    /// Finishes all vCPUs, with some stalls counted.
    fn finish(&mut self) {
        for vcpu in 0..self.params.vcpus as usize {
            let control = &mut self.pages[16 + 2 * vcpu];
            (control[12], control[13]) = (1, 1);
            (control[23], control[24]) = (9_000, 1 << 40);
            // Two stalls of 8,500 ticks: bucket 13 * 8 + 0.
            (control[25], control[26]) = (2, 17_000);
            self.pages[17 + 2 * vcpu][104] = 2;
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.pages.iter().flatten().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn steps(&self) -> Vec<u64> {
        (0..self.params.vcpus as usize).map(|vcpu| self.pages[16 + 2 * vcpu][1]).collect()
    }
}

/// Pages all over the arena, none twice, the last of it among them.
fn touches(pattern: CheckPattern, vcpus: u32) -> Vec<Vec<u64>> {
    if pattern != CheckPattern::Trace {
        return vec![];
    }
    let of = |vcpu| (0..60).map(|i| 803 - 4 * i - vcpu).collect();
    (0..u64::from(vcpus)).map(of).collect()
}

fn params(pattern: CheckPattern, vcpus: u32) -> CheckParams {
    CheckParams {
        pages: 512 + 301,
        vcpus,
        seed: 0xFEED_0000_0001,
        pattern,
        touches: touches(pattern, vcpus),
        zero_pages: 9,
        kvm: None,
        expect_steps: None,
    }
}

fn finished(pattern: CheckPattern, vcpus: u32) -> Simulated {
    let mut guest = Simulated::new(params(pattern, vcpus));
    for vcpu in 0..vcpus {
        guest.run(vcpu, 20_000 + 777 * u64::from(vcpu));
    }
    guest.finish();
    guest
}

/// The wrong pages of a guest that must be refused for them alone.
fn content_failure(guest: &Simulated) -> ContentFailure {
    match check(&guest.params, guest.bytes().as_slice()) {
        Err(CheckFailure::Content(content)) => *content,
        other => panic!("expected wrong pages, not {other:?}"),
    }
}

#[test]
fn every_pattern_is_recomputed_exactly() {
    for pattern in PATTERNS {
        for vcpus in 1..=4 {
            let mut guest = finished(pattern, vcpus);
            guest.params.expect_steps = Some(guest.steps());
            let summary = check(&guest.params, guest.bytes().as_slice()).unwrap();
            assert_eq!(summary.pages_compared, guest.params.pages);
            assert_eq!((summary.pages_unmodelled, summary.zero_pages), (0, 9));
            assert_eq!(summary.steps, guest.steps());
            let written: u64 = guest.pages[512..804].iter().map(|page| page[1]).sum();
            assert_eq!(summary.visits, written, "{pattern:?}, {vcpus} vCPUs");
        }
    }
}

#[test]
fn any_number_of_steps_leads_to_the_right_cursor() {
    for pattern in PATTERNS {
        let mut guest = Simulated::new(params(pattern, 2));
        guest.finish();
        for steps in [0, 1, 6, 1, 140, 146, 1, 1000] {
            guest.run(0, steps);
            guest.run(1, steps / 2);
            check(&guest.params, guest.bytes().as_slice())
                .unwrap_or_else(|failure| panic!("{pattern:?}, {steps} more steps: {failure}"));
        }
    }
}

#[test]
fn a_guest_without_a_tail_and_one_without_steps_are_right() {
    for zero_pages in [0, 1] {
        let params = CheckParams { zero_pages, ..params(CheckPattern::Zipf, 3) };
        let mut guest = Simulated::new(params);
        guest.finish();
        let summary = check(&guest.params, guest.bytes().as_slice()).unwrap();
        assert_eq!((summary.visits, summary.zero_pages), (0, zero_pages));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever byte is changed, wherever a word is laid down, the checker sees it and
    /// names the word.
    #[test]
    fn one_changed_byte_is_found(
        place in prop_oneof![
            0u64..512 * 4096,
            (16 * 4096u64..20 * 4096),
            (512 * 4096..804 * 4096u64),
            (804 * 4096..813 * 4096u64),
        ],
        flip in 1..=255u8,
    ) {
        static GUEST: OnceLock<(CheckParams, Vec<u8>)> = OnceLock::new();
        let (params, bytes) = GUEST.get_or_init(|| {
            let mut guest = finished(CheckPattern::Random, 2);
            guest.params.expect_steps = Some(guest.steps());
            (guest.params.clone(), guest.bytes())
        });
        let (page, word) = (place / 4096, (place % 4096 / 8) as usize);
        let control = page == 16 || page == 18;
        // What the VMM and the clock wrote, and a sum known only within limits.
        prop_assume!(!(control && [10, 11, 12, 19, 20, 21, 23, 24, 26].contains(&word)));
        let mut bytes = bytes.clone();
        bytes[place as usize] ^= flip;
        let failure = check(params, bytes.as_slice()).unwrap_err();
        if control && (word == 1 || word == 13) {
            prop_assert!(matches!(failure, CheckFailure::Vcpu { .. }), "{failure}");
        }
        let content = failure.content().unwrap();
        prop_assert_eq!(content.wrong_pages, 1);
        let histogram = (page == 17 || page == 19) && !(8..24).contains(&word);
        if histogram {
            // Found by the control page beside it, which has the count.
            prop_assert_eq!((content.first.page, content.first.word), (page - 1, 25));
        } else {
            prop_assert_eq!((content.first.page, content.first.word), (page, word));
            prop_assert_eq!(content.first.wrong_words, 1);
        }
    }
}

#[test]
fn a_trace_that_was_begun_anew_is_followed() {
    let mut guest = Simulated::new(params(CheckPattern::Trace, 2));
    guest.run(0, 137);
    guest.pages[16][28] = 137;
    guest.run(0, 500);
    guest.run(1, 77);
    guest.finish();
    assert_eq!(check(&guest.params, guest.bytes().as_slice()).unwrap().steps, [637, 77]);
    guest.pages[16][28] = 138;
    check(&guest.params, guest.bytes().as_slice()).unwrap_err();
}

#[test]
fn a_stale_page_is_named() {
    let mut guest = Simulated::new(params(CheckPattern::ReadModifyWrite, 1));
    guest.run(0, 5000);
    let earlier = guest.pages.clone();
    guest.run(0, 5000);
    guest.finish();
    for page in [600, 601] {
        guest.pages[page] = earlier[page];
    }
    let content = content_failure(&guest);
    assert_eq!((content.wrong_pages, content.guesses.stale), (2, 2));
    let (visits, expected) = (earlier[600][1], guest_visits(&guest, 600));
    assert_eq!(content.first.page, 600);
    assert_eq!(content.first.guess, Guess::Stale { visits, expected });
    assert!(content.to_string().contains("stale"), "{content}");
}

/// The visits that page `page` must have, from the simulation run again.
fn guest_visits(guest: &Simulated, page: usize) -> u64 {
    let mut again = Simulated::new(guest.params.clone());
    again.run(0, guest.steps()[0]);
    again.pages[page][1]
}

#[test]
fn swapped_pages_are_named_each() {
    for (a, b) in [(600usize, 700usize), (3, 650), (40, 41), (600, 805), (16, 700)] {
        let mut guest = finished(CheckPattern::Sequential, 1);
        guest.pages.swap(a, b);
        let failure = check(&guest.params, guest.bytes().as_slice()).unwrap_err();
        let content = failure.content().unwrap();
        if b == 805 {
            assert_eq!((content.first.guess, content.wrong_pages), (Guess::Lost, 2));
            assert_eq!(content.guesses.misplaced, 1);
        } else {
            assert_eq!(content.first.page, a as u64);
            assert_eq!(content.first.guess, Guess::Misplaced { belongs_to: b as u64 });
        }
    }
}

#[test]
fn a_lost_a_half_lost_and_a_garbled_page_are_told_apart() {
    let mut guest = finished(CheckPattern::Sequential, 1);
    guest.pages[513] = [0; WORDS];
    guest.pages[515][300..].fill(0);
    guest.pages[517][300..].fill(0xABCD);
    // One visit more than the steps tell.
    let tag = guest.pages[520][0];
    let count = guest.pages[520][1];
    let word = &mut guest.pages[520][256 + (count % 256) as usize];
    *word = word.wrapping_add(tag);
    guest.pages[520][1] += 1;
    let content = content_failure(&guest);
    assert_eq!((content.first.page, content.first.guess), (513, Guess::Lost));
    let expected =
        GuessCounts { lost: 1, partly_lost: 1, damaged: 1, ahead: 1, ..GuessCounts::default() };
    assert_eq!((content.wrong_pages, content.guesses), (4, expected));
}

#[test]
fn a_vcpu_that_did_not_end_well_is_named() {
    let problem = |guest: &Simulated| match check(&guest.params, guest.bytes().as_slice()) {
        Err(CheckFailure::Vcpu { vcpu: 1, problem, .. }) => problem,
        other => panic!("expected a problem of vCPU 1, not {other:?}"),
    };
    let mut guest = finished(CheckPattern::Random, 2);
    let steps = guest.steps();
    guest.pages[18][13] = 0;
    assert_eq!(problem(&guest), VcpuProblem::NotFinished { status: 0, steps: steps[1] });

    guest.pages[18][13..17].copy_from_slice(&[2, 700, 5, 6]);
    let (step, page, expected, found) = (steps[1], 700, 5, 6);
    assert_eq!(problem(&guest), VcpuProblem::SelfCheck { step, page, expected, found });

    let mut guest = finished(CheckPattern::Random, 2);
    guest.params.expect_steps = Some(vec![steps[0], steps[1] + 1]);
    let expected = VcpuProblem::Steps { expected: steps[1] + 1, found: steps[1] };
    assert_eq!(problem(&guest), expected);

    guest.params.expect_steps = None;
    guest.pages[18][1] = u64::MAX;
    assert_eq!(problem(&guest), VcpuProblem::TooManySteps { steps: u64::MAX });
}

/// A finished KVM guest. Its tables are written down here anew, for its 813 pages.
fn finished_kvm(small_pages: bool) -> Simulated {
    let mut params = params(CheckPattern::Strided, 1);
    params.kvm = Some(CheckMachine::pc(params.pages, small_pages));
    let mut guest = Simulated::new(params);
    for page in (64..69).chain([72, 76, 80]) {
        guest.pages[page] = [0; WORDS];
    }
    let table = |page: u64| (page * 4096) | 0x27;
    (guest.pages[64][0], guest.pages[65][0], guest.pages[65][1]) =
        (table(65), table(66), table(80));
    guest.pages[66][1] = 0xFEE0_00F7;
    let leaf = |first: u64| std::array::from_fn(|i| ((first + i as u64) * 4096) | 0x67);
    let mut last: Page = leaf(512);
    last[301..].fill(0);
    if small_pages {
        (guest.pages[80][0], guest.pages[80][1]) = (table(512), table(513));
        (guest.pages[512], guest.pages[513]) = (leaf(0), last);
    } else {
        (guest.pages[80][0], guest.pages[80][1]) = (0xE7, table(81));
        guest.pages[81] = last;
    }
    for vector in (0..32).chain([0x20, 0xFF]) {
        // From page 68 on, at 1 GiB.
        let address = 0x4004_4000 + 16 * vector as u64;
        guest.pages[67][2 * vector] = address & 0xFFFF | 0x8E00_0010_0000 | address >> 16 << 48;
    }
    guest.pages[68] = [0x1234; WORDS];
    let flat = 0x000F_0000_0000_FFFF;
    guest.pages[72][..10].copy_from_slice(&[
        0,
        0,
        0xA0_9B00_0000_0000 | flat,
        0xC0_9300_0000_0000 | flat,
        0,
        0xC0_F300_0000_0000 | flat,
        0xA0_FB00_0000_0000 | flat,
        0,
        0x4000_8B04_8100_0067,
        0,
    ]);
    // The stack's end, not aligned; past the limit, no map of ports.
    guest.pages[72][32] = 0x4004_9000 << 32;
    guest.pages[72][44] = 0x68 << 48;
    guest.pages[72][511] = 0x2B;
    guest.run(0, 5000);
    guest.finish();
    guest.pages[16][27] = 12_345;
    guest
}

#[test]
fn the_kvm_guests_own_pages_are_compared_but_for_the_program() {
    for small_pages in [false, true] {
        let mut guest = finished_kvm(small_pages);
        let summary = check(&guest.params, guest.bytes().as_slice()).unwrap();
        assert_eq!(summary.pages_unmodelled, 1);
        assert_eq!(summary.pages_compared, guest.params.pages - 1);

        let small = if small_pages { vec![512, 513] } else { vec![81] };
        for page in [64, 65, 66, 67, 72, 76, 80].into_iter().chain(small) {
            let right = guest.pages[page][5];
            guest.pages[page][5] ^= 0x40;
            let content = content_failure(&guest);
            assert_eq!((content.wrong_pages, content.first.page), (1, page as u64));
            guest.pages[page][5] = right;
        }

        let program = guest.pages[68];
        guest.pages[68] = guest.pages[5];
        let content = content_failure(&guest);
        assert_eq!((content.wrong_pages, content.first.page), (1, 68));
        assert_eq!(content.first.guess, Guess::Misplaced { belongs_to: 5 });
        guest.pages[68] = program;
        guest.pages[80] = [0; WORDS];
        assert_eq!(content_failure(&guest).first.guess, Guess::Lost);
    }
}

#[test]
fn memory_of_the_wrong_length_is_refused() {
    let guest = finished(CheckPattern::Random, 1);
    let mut bytes = guest.bytes();
    bytes.push(0);
    let failure = check(&guest.params, bytes.as_slice()).unwrap_err();
    assert!(matches!(failure, CheckFailure::TooLong { pages: 813 }), "{failure}");
    for length in [0, 100, 512 * PAGE_BYTES, bytes.len() - 2] {
        let failure = check(&guest.params, &bytes[..length]).unwrap_err();
        assert!(matches!(failure, CheckFailure::TooShort { pages: 813, .. }), "{failure}");
    }
}

#[test]
fn a_failing_read_keeps_its_cause() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("the disk is on fire"))
        }
    }
    let failure = check(&params(CheckPattern::Random, 1), Broken).unwrap_err();
    let cause = std::error::Error::source(&failure).unwrap();
    assert_eq!(cause.to_string(), "the disk is on fire");
}

#[test]
fn parameters_of_no_guest_are_refused() {
    let good = params(CheckPattern::Random, 1);
    let traced = params(CheckPattern::Trace, 1);
    for bad in [
        CheckParams { vcpus: 0, ..good.clone() },
        CheckParams { vcpus: 5, ..good.clone() },
        CheckParams { pages: 512 + 9 + 15, ..good.clone() },
        CheckParams { pages: u64::MAX, ..good.clone() },
        CheckParams { zero_pages: u64::MAX, ..good.clone() },
        CheckParams { expect_steps: Some(vec![1, 2]), ..good.clone() },
        CheckParams { touches: vec![vec![600]], ..good.clone() },
        CheckParams { touches: vec![], ..traced.clone() },
        CheckParams { touches: vec![vec![]], ..traced.clone() },
        CheckParams { touches: vec![vec![511]], ..traced.clone() },
        CheckParams { touches: vec![vec![600, 804]], ..traced.clone() },
    ] {
        let failure = check(&bad, std::io::empty()).unwrap_err();
        assert!(matches!(failure, CheckFailure::Params(_)), "{failure}");
    }
}

#[cfg(feature = "io")]
#[test]
fn each_pattern_has_the_name_that_it_is_serialised_by() {
    for pattern in PATTERNS {
        let name = serde_json::to_value(pattern).unwrap();
        assert_eq!(name.as_str().unwrap().parse(), Ok(pattern));
    }
    assert!("brownian".parse::<CheckPattern>().is_err());
}
