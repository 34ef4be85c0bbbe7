//! Failpoints are for tests: a program built without them has none.

use super::harness::POSTCOPY;

#[test]
fn a_program_built_without_failpoints_has_no_trace_of_them() {
    let program = std::fs::read(POSTCOPY).expect("the binary under test");
    let has = |text: &str| program.windows(text.len()).any(|bytes| bytes == text.as_bytes());
    let points = include_str!("../../src/failpoint/points.rs");
    let names: Vec<_> =
        points.split('"').skip(1).step_by(2).filter(|name| name.contains("::")).collect();
    // All of them are found by these, in one pass.
    let marks = ["::before_", "::after_"];
    let marked = |name: &str| marks.iter().any(|mark| name.contains(mark));
    assert!(names.len() > 100 && names.iter().all(|name| marked(name)), "{names:?}");
    let mut seen: Vec<&str> = Vec::new();
    for (at, bytes) in program.windows(9).enumerate() {
        if !marks.iter().any(|mark| bytes.starts_with(mark.as_bytes())) {
            continue;
        }
        let around = &program[at.saturating_sub(16)..program.len().min(at + 64)];
        let around = String::from_utf8_lossy(around);
        seen.extend(names.iter().filter(|name| around.contains(**name)).copied());
    }
    assert!(seen.is_empty(), "in the program: {seen:?}");
    // It is the program, and this is how a text in it is found.
    assert!(has("postcopy-keeper"));
    for variable in ["FAILPOINTS", "POSTCOPY_FAILPOINT_LOG", "POSTCOPY_TEST_LIMITS"] {
        assert!(!has(variable), "{variable} is in the program");
    }
}
