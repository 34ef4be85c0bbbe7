//! Tests of the format: what a file says, and what is refused of files that say something else.

use super::*;
use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;
use std::io::Write;

const SMALL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/samples/small.trace");
const HEAD: &str = "# postcopy-trace v1\npages 4096\npage_size 4096\n";

fn loaded(bytes: &[u8]) -> Result<Trace, TraceError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    Trace::load(file.path())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn refused(text: &str) -> String {
    let error = loaded(text.as_bytes()).unwrap_err();
    let TraceError::Line { line, expected, found, file } = &error else { panic!("{error}") };
    assert!(error.to_string().contains(&file.display().to_string()), "{error}");
    format!("{line}: {expected}: {found}")
}

#[test]
fn the_touches_are_those_of_the_file() {
    let trace = Trace::load(Path::new(SMALL)).unwrap();
    // By other means than the parser's.
    let text = std::fs::read_to_string(SMALL).unwrap();
    for vcpu in 0..trace.vcpus() {
        let lines: Vec<Vec<u64>> = text
            .lines()
            .filter_map(|line| line.strip_prefix("touch "))
            .map(|line| line.split(' ').map(|word| word.parse().unwrap()).collect())
            .filter(|line: &Vec<u64>| line[1] >= SYSTEM_PAGES && line[2] == u64::from(vcpu))
            .collect();
        assert!(lines.len() > 200, "{}", lines.len());
        let mut time = 0;
        let touches = trace.touches(vcpu);
        let told: Vec<[u64; 2]> = touches
            .iter()
            .map(|touch| {
                time += touch.wait_us;
                [time, touch.page]
            })
            .collect();
        let recorded: Vec<[u64; 2]> = lines.iter().map(|line| [line[0], line[1]]).collect();
        assert_eq!(told, recorded, "vCPU {vcpu}");
    }
    assert_eq!((trace.vcpus(), trace.highest()), (2, 16015));
    assert_eq!((trace.id().name.as_str(), trace.id().touches), ("small", 444));
}

#[test]
fn a_compressed_file_is_the_same_trace_and_another_one_is_not() {
    let text = std::fs::read(SMALL).unwrap();
    let plain = Trace::load(Path::new(SMALL)).unwrap();
    let again = loaded(&gzip(&text)).unwrap();
    assert_eq!(again.id().digest(), plain.id().digest());
    let mut other = text.clone();
    other.extend(b"touch 99999 513 1\n");
    assert_ne!(loaded(&other).unwrap().id().digest(), plain.id().digest());
    assert_eq!(trace_name(Path::new("/a/redis-a.trace.gz")), "redis-a");
}

#[test]
fn time_passes_in_pages_that_the_guest_keeps_for_itself() {
    let text = format!("{HEAD}touch 5 192 0\ntouch 7 600 0\ntouch 8 193 0\ntouch 20 601 0\n");
    let touches = loaded(text.as_bytes()).unwrap().touches(0);
    let [first, second] = [(600, 7), (601, 13)].map(|(page, wait_us)| Touch { page, wait_us });
    assert_eq!(*touches, [first, second]);
}

#[test]
fn a_bad_line_is_refused_by_its_number_and_what_is_expected() {
    let with = |lines: &str| refused(&format!("{HEAD}{lines}"));
    assert_eq!(refused("pages 1\n"), "1: \"# postcopy-trace v1\": \"pages 1\"");
    assert_eq!(refused(""), "1: a touch of a page from 512 on: the end of the file");
    let numbers = "\"touch T_US PAGE VCPU\" with numbers of 0 to 86400000000, 0 to 4095, 0 to 3";
    for line in ["touch", "touch 0 1", "touch x 1 0", "touch -1 1 0", "touch 0 4096 0"] {
        assert_eq!(with(line), format!("4: {numbers}: {line:?}"));
    }
    assert!(with("touch 0 600 4").contains(numbers));
    assert!(with("touch 99999999999999999999 600 0").contains(numbers));
    assert!(with("touch 0 600 0 0").contains("nothing behind it"));
    assert!(with("tuch 0 600 0").starts_with("4: a comment, pages (once), page_size, touch"));
    assert!(with("pages 7").starts_with("4: a comment, pages (once)"));
    let twice = with("touch 0 600 0\ntouch 1 600 1");
    assert!(twice.starts_with("5: a page that was not touched before"), "{twice}");
    let back = with("touch 9 600 0\n\n# more\ntouch 8 601 0");
    assert!(back.starts_with("7: a time of vCPU 0 from 9 us on"), "{back}");
    assert_eq!(with(""), "4: a touch of a page from 512 on: the end of the file");
    assert!(with("touch 0 5 0").contains("from 512 on"));
    assert!(with("touch 0 600 1\n").starts_with("5: a touch of a page from 512 on by vCPU 0"));
    let early = refused("# postcopy-trace v1\npages 4096\ntouch 0 600 0\n");
    assert!(early.starts_with("3: pages and page_size before the first touch"), "{early}");
    assert!(refused("# postcopy-trace v1\npage_size 65536").contains("numbers of 4096 to 4096"));
    let long = with(&format!("x{}", "\u{7}".repeat(1000)));
    assert!(long.len() < 700 && !long.contains('\u{7}'), "{long}");
}

#[test]
fn files_that_are_missing_damaged_or_too_large_are_refused() {
    let missing = Trace::load(Path::new("/nowhere/x.trace")).unwrap_err();
    assert!(matches!(missing, TraceError::Read { .. }), "{missing}");
    let whole = gzip(HEAD.as_bytes());
    let damaged = loaded(&whole[..whole.len() / 2]).unwrap_err();
    assert!(matches!(damaged, TraceError::Read { .. }), "{damaged}");
    // A short file of a long text.
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    let comments = [b'#'; 1 << 20];
    (0..=TEXT_BYTES_MAX >> 20).for_each(|_| encoder.write_all(&comments).unwrap());
    let bomb = loaded(&encoder.finish().unwrap()).unwrap_err();
    assert!(matches!(bomb, TraceError::TooLarge { what: "text", .. }), "{bomb}");
}

/// Lines that are nearly right.
fn line() -> impl Strategy<Value = String> {
    let number = || prop_oneof![0..5u64, 500..700u64, any::<u64>()];
    prop_oneof![
        4 => (number(), number(), 0..5u64).prop_map(|(t, page, v)| format!("touch {t} {page} {v}")),
        1 => number().prop_map(|pages| format!("pages {pages}")),
        1 => Just("page_size 4096".to_owned()),
        1 => Just("dirty_1s 5-7 9".to_owned()),
        1 => ".*",
    ]
}

proptest! {
    /// Whatever is taken keeps what a trace promises; nothing makes it panic.
    #[test]
    fn any_text_is_a_trace_or_refused(
        lines in proptest::collection::vec(line(), 0..40),
        whole in any::<bool>(),
    ) {
        let head = if whole { HEAD } else { "" };
        let Ok(vcpus) = parse::touches(&format!("{head}{}", lines.join("\n"))) else {
            return Ok(());
        };
        let trace = Trace::of("x".into(), vcpus);
        prop_assert!((1..=4).contains(&trace.vcpus()));
        let mut pages = std::collections::HashSet::new();
        for vcpu in 0..trace.vcpus() {
            let touches = trace.touches(vcpu);
            prop_assert!(!touches.is_empty());
            prop_assert!(touches.iter().map(|touch| touch.wait_us).sum::<u64>() <= TIME_US_MAX);
            for touch in touches.iter() {
                prop_assert!((SYSTEM_PAGES..=trace.highest()).contains(&touch.page));
                prop_assert!(pages.insert(touch.page));
            }
        }
    }

    /// What is written down is what is read.
    #[test]
    fn touches_come_back(touches in proptest::collection::btree_map(512..4096u64, 0..9u64, 1..50)) {
        let mut time = 0;
        let mut text = HEAD.to_owned();
        for (page, wait) in &touches {
            time += wait;
            text += &format!("touch {time} {page} 0\n");
        }
        let told = parse::touches(&text).unwrap();
        let all: Vec<_> =
            touches.into_iter().map(|(page, wait_us)| Touch { page, wait_us }).collect();
        prop_assert_eq!(told, vec![all]);
    }

    /// Bytes from anywhere, compressed or not.
    #[test]
    fn no_file_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let packed = [&[0x1F, 0x8B][..], &bytes].concat();
        prop_assert!(loaded(&bytes).is_err() && loaded(&packed).is_err());
    }
}
