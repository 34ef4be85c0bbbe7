//! The bytes of a set of placed pages, hostile ones, and the set against plain numbers.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn run(first: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex::new(first), count).unwrap()
}

fn of(pages: u64, model: &BTreeSet<u64>) -> PlacedPages {
    PlacedPages::of(pages, model.iter().map(|page| run(*page, 1)))
}

/// All messages of the set, made from the model and not from the set.
fn messages(pages: u64, model: &BTreeSet<u64>, parts_max: u64) -> Vec<Vec<u8>> {
    let mut messages = PlacedMessages::new(pages);
    let mut made = vec![];
    while let Some(message) = messages.next(parts_max, |first, words| {
        for (word, bits) in words.iter_mut().enumerate() {
            for bit in 0..64 {
                let page = first.get() + word as u64 * 64 + bit;
                *bits |= u64::from(model.contains(&page)) << bit;
            }
        }
    }) {
        made.push(message);
        assert_eq!(messages.is_done(), made.len() as u64 == parts_of(pages).div_ceil(parts_max));
    }
    made
}

fn taken(pages: u64, messages: &[Vec<u8>]) -> Result<PlacedPages, PlacedError> {
    let mut set = PlacedPages::new(pages);
    messages.iter().try_for_each(|message| set.take(message))?;
    set.complete()?;
    Ok(set)
}

fn one(pages: u64, runs: &[(u64, u64)]) -> Vec<u8> {
    let model = runs.iter().flat_map(|(first, count)| *first..first + count).collect();
    messages(pages, &model, MESSAGE_PARTS_MAX).concat()
}

#[test]
fn these_are_its_bytes() {
    assert_eq!(one(100, &[]), [0, NONE]);
    assert_eq!(one(100, &[(0, 100)]), [0, ALL]);
    assert_eq!(one(1, &[(0, 1)]), [0, ALL]);
    assert_eq!(one(100, &[(0, 1), (4, 64)]), [0, RUNS, 2, 0, 0, 2, 63]);
    // As long as the runs would be: a bitmap. The 20 pages take three bytes.
    assert_eq!(one(20, &[(0, 1)]), [0, BITS, 1, 0, 0]);
    assert_eq!(one(20, &[(1, 2), (17, 3)]), [0, BITS, 0b110, 0, 0b1110]);
    assert_eq!(
        one(3 * PART_PAGES, &[(100, 1), (PART_PAGES, PART_PAGES + 300)]),
        [0, RUNS, 1, 100, 0, ALL, RUNS, 1, 0, 0xab, 2]
    );
}

#[test]
fn hostile_bytes_are_refused_by_name() {
    use PlacedError::*;
    let full = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    let past = PastTheEnd { part: 0, pages: 100 };
    let bits = |bits: &[u8; 13]| [&[0, BITS][..], bits].concat();
    for (bytes, error) in [
        (vec![], Truncated),
        (vec![0], Truncated),
        (vec![0x80], Truncated),
        (vec![0, RUNS], Truncated),
        (vec![0, RUNS, 1, 0], Truncated),
        (vec![0, RUNS, 2, 0, 0], Truncated),
        (vec![0, BITS, 1, 2, 3], Truncated),
        (vec![1, NONE], OutOfOrder { part: 1, expected: 0 }),
        ([&full[..], &[NONE]].concat(), OutOfOrder { part: u64::MAX, expected: 0 }),
        (vec![0, NONE, NONE], TooManyParts),
        (vec![0, 4], UnknownForm { part: 0, form: 4 }),
        (vec![0x80, 0, NONE], BadNumber),
        (vec![0, RUNS, 1, 0x80, 0x00, 0], BadNumber),
        ([&[0, RUNS, 1][..], &full[..9], &[2, 0]].concat(), BadNumber),
        ([&[0, RUNS, 1][..], &full[..9], &[0x81, 0]].concat(), BadNumber),
        (vec![0, RUNS, 1, 100, 0], past.clone()),
        (vec![0, RUNS, 1, 0, 100], past.clone()),
        (vec![0, RUNS, 2, 0, 98, 0, 0], past.clone()),
        ([&[0, RUNS, 1, 0][..], &full].concat(), past.clone()),
        ([&[0, RUNS, 1][..], &full, &[0]].concat(), past.clone()),
        ([&[0, RUNS][..], &full, &[0]].concat(), Truncated),
        (bits(&[0xff, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0x10]), past),
        // Shorter forms say the same.
        (vec![0, RUNS, 0], NotShortest { part: 0 }),
        (vec![0, RUNS, 1, 0, 99], NotShortest { part: 0 }),
        (vec![0, RUNS, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], NotShortest { part: 0 }),
        (bits(&[0; 13]), NotShortest { part: 0 }),
        (bits(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), NotShortest { part: 0 }),
    ] {
        let mut set = PlacedPages::new(100);
        assert_eq!(set.take(&bytes), Err(error), "{bytes:?}");
    }
    // A number of runs allocates nothing, and takes no longer than its bytes.
    assert_eq!(PlacedPages::new(100).take(&[0, RUNS, 1, 99, 0]), Ok(()));
}

#[test]
fn no_part_is_taken_twice_or_left_out() {
    use PlacedError::*;
    let pages = 3 * PART_PAGES;
    let mut set = PlacedPages::new(pages);
    assert_eq!(set.complete(), Err(Incomplete { taken: 0, parts: 3 }));
    assert_eq!(set.take(&[0, ALL]), Ok(()));
    let mut again = set.clone();
    assert_eq!(again.take(&[0, ALL]), Err(OutOfOrder { part: 0, expected: 1 }));
    assert_eq!(again.take(&[2, ALL]), Err(OutOfOrder { part: 2, expected: 1 }));
    assert_eq!(again.take(&[1, ALL, NONE, NONE]), Err(TooManyParts));
    assert_eq!(set.take(&[1, NONE, ALL]), Ok(()));
    assert_eq!(set.complete(), Ok(()));
    assert_eq!(set.take(&[3, NONE]), Err(TooManyParts));
    assert_eq!(set.count(), 2 * PART_PAGES);
    let runs: Vec<_> = set.runs().collect();
    assert_eq!(runs, [run(0, PART_PAGES), run(2 * PART_PAGES, PART_PAGES)]);
    let many = PlacedPages::new(1000 * PART_PAGES);
    let message = |parts| [&[0][..], &vec![ALL; parts]].concat();
    assert_eq!(many.clone().take(&message(128)), Ok(()));
    assert_eq!(many.clone().take(&message(129)), Err(TooManyParts));
}

/// What the documents say of sizes.
#[test]
fn a_set_takes_a_bit_a_page_at_most() {
    // 16 GiB at random: a bitmap and a byte for each part, and 8 messages' first parts.
    let pages = 1 << 22;
    let mut number = 1u64;
    let mut messages = PlacedMessages::new(pages);
    let (mut bytes, mut longest) = (0, 0);
    while let Some(message) = messages.next(MESSAGE_PARTS_MAX, |_, words| {
        words.iter_mut().for_each(|word| {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *word = number ^ number.rotate_left(32);
        });
    }) {
        bytes += message.len();
        longest = longest.max(message.len());
    }
    assert_eq!(bytes, (pages / 8 + pages / PART_PAGES) as usize + 15);
    assert!(longest <= 65_674, "{longest}");
    // Nothing, or everything, of 1 TiB.
    for filled in [0, u64::MAX] {
        let mut messages = PlacedMessages::new(1 << 28);
        let mut bytes = 0;
        while let Some(message) =
            messages.next(MESSAGE_PARTS_MAX, |_, words| words.iter_mut().for_each(|w| *w = filled))
        {
            bytes += message.len();
        }
        assert!((64 << 10..66 << 10).contains(&bytes), "{bytes}");
    }
}

fn sets() -> impl Strategy<Value = (u64, BTreeSet<u64>)> {
    let run = (0u64..12_000, prop_oneof![Just(1u64), 1u64..40, 1u64..9_000]);
    let dense = (0u64..12_000, 1u64..4, 1u64..2_000);
    let pages = prop_oneof![1u64..200, 4_000u64..4_200, 8_000u64..12_400];
    (pages, prop::collection::vec(run, 0..30), prop::collection::vec(dense, 0..3)).prop_map(
        |(pages, runs, dense)| {
            let runs = runs.into_iter().flat_map(|(first, count)| first..first + count);
            let dense = dense
                .into_iter()
                .flat_map(|(first, step, count)| (0..count).map(move |it| first + it * (step + 1)));
            (pages, runs.chain(dense).filter(|page| *page < pages).collect())
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn what_is_told_is_heard((pages, model) in sets(), parts_max in 1u64..4) {
        let told = messages(pages, &model, parts_max);
        let heard = taken(pages, &told).unwrap();
        prop_assert_eq!(&heard, &of(pages, &model));
        prop_assert_eq!(heard.count(), model.len() as u64);
        let listed: BTreeSet<u64> =
            heard.runs().flat_map(PageRun::pages).map(PageIndex::get).collect();
        prop_assert_eq!(&listed, &model);
        for page in (0..pages + 70).step_by(7) {
            prop_assert_eq!(heard.contains(PageIndex::new(page)), model.contains(&page));
        }
        // Nothing of it may be missing.
        let last = told.last().unwrap();
        for end in 0..last.len() {
            let mut short = told.clone();
            short.last_mut().unwrap().truncate(end);
            prop_assert!(taken(pages, &short).is_err());
        }
        prop_assert!(taken(pages, &told[..told.len() - 1]).is_err());
    }

    #[test]
    fn what_is_heard_has_no_other_encoding(
        pages in prop_oneof![1u64..40, 8_100u64..8_200],
        bytes in prop::collection::vec(prop_oneof![0u8..6, any::<u8>()], 1..24),
    ) {
        let bytes = [&[0][..], &bytes].concat();
        let mut set = PlacedPages::new(pages);
        if set.take(&bytes).is_ok() {
            let model: BTreeSet<u64> =
                set.runs().flat_map(PageRun::pages).map(PageIndex::get).collect();
            prop_assert!(model.last().is_none_or(|last| *last < pages));
            prop_assert_eq!(set.count(), model.len() as u64);
            let told = PlacedMessages::new(pages).next(set.parts_taken, |first, words| {
                let from = (first.get() / 64) as usize;
                words.copy_from_slice(&set.words()[from..from + words.len()]);
            });
            prop_assert_eq!(told, Some(bytes));
        }
    }
}
