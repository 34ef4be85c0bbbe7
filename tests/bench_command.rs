//! `postcopy bench`: a minimal benchmark, what it leaves behind, and how it goes on.
#![cfg(feature = "io")]

use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// For all that a minimal benchmark does, on a machine that does many other things.
const LIMIT: Duration = Duration::from_secs(120);
/// Two cells of the smallest guest, one run each.
const MATRIX: &str = "--memory 8M --link loopback,1Gbit:1ms";
const COMMON: &str = "--guest process --workload random --policy bubbling --runs 1 \
    --run-before 20ms --run-after 20ms --floor-time 60ms";

/// Runs `postcopy bench` with these arguments, and kills it after the limit.
fn bench(out: &Path, more: &str) -> Output {
    wait(start(out, more))
}

fn start(out: &Path, more: &str) -> Child {
    let common: Vec<&str> = COMMON.split_whitespace().collect();
    // What is said again counts.
    let more: Vec<&str> = more.split_whitespace().collect();
    let common = common.chunks(2).filter(|pair| !more.contains(&pair[0]));
    Command::new(env!("CARGO_BIN_EXE_postcopy"))
        // The parent is this thread: whatever is left ends with its test.
        .args(["--die-with-parent", "bench"])
        .args(common.flatten())
        .args(&more)
        .arg("--out")
        .arg(out)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts")
}

fn wait(mut child: Child) -> Output {
    let deadline = Instant::now() + LIMIT;
    // What it says fits a pipe.
    while child.try_wait().expect("a child").is_none() {
        if Instant::now() > deadline {
            child.kill().expect("a child that runs can be killed");
            let output = child.wait_with_output().expect("a child that was killed ends");
            panic!("not over within {LIMIT:?}: {output:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().expect("a child that has ended")
}

/// Whether guests can be taken in here at all.
fn userfaultfd_works() -> bool {
    let permitted = std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
    let unprivileged = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let root = nix::unistd::geteuid().is_root();
    let works = root || permitted.is_ok() || unprivileged.is_ok_and(|text| text.trim() == "1");
    if !works {
        println!("SKIPPED: userfaultfd is not permitted here");
    }
    works
}

fn results(out: &Path) -> Value {
    let text = std::fs::read(out.join("results.json")).expect("results.json");
    serde_json::from_slice(&text).expect("results.json is JSON")
}

fn run_files(out: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(out.join("runs")).expect("a folder of runs");
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("an entry").path())
        .map(|path| (path.display().to_string(), std::fs::read(&path).expect("a run")))
        .collect();
    files.sort();
    files
}

#[test]
fn a_minimal_benchmark_leaves_its_results_and_goes_on_where_it_ended() {
    if !userfaultfd_works() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("bench");
    let ended = bench(&out, MATRIX);
    let (stdout, stderr) = (text_of(&ended.stdout), text_of(&ended.stderr));
    assert!(ended.status.success(), "{ended:?}");
    assert!(stdout.contains("x floor") && stdout.contains("1Gbit:1ms"), "{stdout}");
    assert!(stderr.contains("2 cells, 1 runs each, in an order by seed 1"), "{stderr}");

    let found = results(&out);
    assert_eq!(found["schema"], "postcopy-bench/1");
    assert_eq!(found["runs"], serde_json::json!({"planned": 4, "completed": 4, "failed": 0}));
    for cell in 0..2 {
        let figures = &found["cells"][cell]["runs"][1]["figures"];
        for figure in ["pages_per_second", "downtime_us", "total_us", "wire_bits_per_second"] {
            assert!(figures[figure].as_f64().is_some_and(|of| of > 0.0), "{figure}: {found:#}");
        }
    }
    // The floors were measured beside it, and what crossed the same device is put beside them.
    let floor = &found["floors"]["spread"]["tcp-fault"]["median"];
    assert!(floor.as_f64().is_some_and(|of| of > 0.0), "{found:#}");
    assert!(found["cells"][0]["figures"]["rate_to_udp"]["median"].is_f64(), "{found:#}");

    // The first run of each cell was recorded, and is drawn.
    let page = std::fs::read_to_string(out.join("results.html")).expect("results.html");
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let parsed = roxmltree::Document::parse_with_options(&page, options).expect("well-formed");
    let texts = parsed.descendants().filter(|node| node.is_text());
    let text: Vec<&str> = texts.filter_map(|node| node.text()).collect();
    let drawn = text.iter().filter(|text| text.contains("Which page came when")).count();
    assert_eq!(drawn, 2, "{text:?}");

    // One run is lost: only it is made again.
    let before = run_files(&out);
    assert_eq!(before.len(), 4);
    std::fs::remove_file(&before[0].0).expect("a run's file");
    let again = bench(&out, MATRIX);
    assert!(again.status.success(), "{again:?}");
    assert!(!text_of(&again.stderr).contains("round 1: "), "{again:?}");
    assert_eq!(text_of(&again.stderr).matches("round 0: ").count(), 1, "{again:?}");
    let after = run_files(&out);
    assert_eq!(after.len(), 4);
    assert_ne!(before[0].1, after[0].1, "it was not made again");
    assert_eq!(before[1..], after[1..], "they were made again, and were there");

    // Another matrix does not go with it.
    let refused = bench(&out, &MATRIX.replace("8M", "16M"));
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let why = text_of(&refused.stderr);
    assert!(
        why.contains("holds another benchmark")
            && why.contains("cells[0].memory: 8388608 there, 16777216 now"),
        "{why}"
    );
    assert_eq!(run_files(&out), after);
}

#[test]
fn a_trace_is_measured_by_its_name_and_must_stay_the_same() {
    if !userfaultfd_works() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (out, trace) = (folder.path().join("bench"), folder.path().join("real_one.trace"));
    let text = std::fs::read("tests/samples/small.trace").expect("the sample");
    std::fs::write(&trace, &text).expect("room for a copy");
    let workload = format!("trace:{}", trace.display());
    let arguments =
        format!("--memory 64M --vcpus 2 --link loopback --no-record --workload random,{workload}");
    let ended = bench(&out, &arguments);
    assert!(ended.status.success(), "{ended:?}");
    let name = "process trace:real_one post-copy bubbling 64M 2vcpu memfd-continue 1lane loopback";
    assert!(text_of(&ended.stderr).contains(name), "{ended:?}");
    let found = results(&out);
    assert_eq!(found["runs"], serde_json::json!({"planned": 2, "completed": 2, "failed": 0}));
    assert!(found.to_string().contains(&workload), "{found:#}");
    let page = std::fs::read_to_string(out.join("results.html")).expect("results.html");
    assert!(page.contains("trace:real_one"), "{page}");
    let before = run_files(&out);
    assert!(before[1].0.ends_with(
        "trace-real-one-post-copy-bubbling-64M-2vcpu-memfd-continue-1lane-loopback.json"
    ));

    // It goes on with the same trace, and with no other one by its name.
    let again = bench(&out, &arguments);
    assert!(again.status.success() && run_files(&out) == before, "{again:?}");
    std::fs::write(&trace, [&text[..], b"touch 99999 513 1\n"].concat()).expect("room");
    let refused = text_of(&bench(&out, &arguments).stderr);
    assert!(refused.contains("real_one.trace.touches: 444 there, 445 now"), "{refused}");
    assert_eq!(run_files(&out), before);
}

#[test]
fn push_lanes_are_an_axis_and_a_folder_in_which_they_were_none_is_refused_by_name() {
    if !userfaultfd_works() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let arguments = "--memory 8M --link loopback --no-record --push-lanes 1,3";
    let ended = bench(folder.path(), arguments);
    assert!(ended.status.success(), "{ended:?}");
    let (stdout, files) = (text_of(&ended.stdout), run_files(folder.path()));
    for (lanes, (name, run)) in [1, 3].iter().zip(&files) {
        assert!(name.ends_with(&format!("memfd-continue-{lanes}lane-loopback.json")), "{name}");
        assert!(stdout.contains(&format!("\n{lanes}lane ")), "{stdout}");
        let run: Value = serde_json::from_slice(run).expect("a run is JSON");
        // The cell says what was asked for, the report how many there were.
        assert_eq!(run["cell"]["push_lanes"], *lanes);
        assert_eq!(run["outcome"]["completed"]["link"]["push_lanes"], *lanes, "{run:#}");
    }
    assert_eq!(files.len(), 2);

    // Before they were an axis, all cells had one number of them.
    let path = folder.path().join("plan.json");
    let mut plan: Value =
        serde_json::from_slice(&std::fs::read(&path).expect("a plan")).expect("JSON");
    plan["conditions"]["push_lanes"] = 1.into();
    for cell in plan["cells"].as_array_mut().expect("cells") {
        cell.as_object_mut().expect("a cell").remove("push_lanes");
    }
    std::fs::write(&path, plan.to_string()).expect("room for a plan");
    let refused = bench(folder.path(), arguments);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let why = text_of(&refused.stderr);
    assert!(
        why.contains("holds another benchmark")
            && why.contains("cells[0].push_lanes: null there, 1 now")
            && why.contains("conditions.push_lanes: 1 there, null now"),
        "{why}"
    );
    assert_eq!(run_files(folder.path()), files);
}

#[test]
fn modes_are_an_axis_and_what_one_does_not_have_is_absent() {
    if !userfaultfd_works() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let arguments = "--memory 16M --link loopback --mode post-copy,hybrid --rounds 2 \
        --max-downtime 50ms --backing anonymous,memfd-continue";
    let ended = bench(folder.path(), arguments);
    assert!(ended.status.success(), "{ended:?}");
    let (stdout, stderr) = (text_of(&ended.stdout), text_of(&ended.stderr));
    assert!(stderr.contains("left out: hybrid with anonymous: "), "{stderr}");
    assert!(stderr.contains("3 cells, 1 runs each"), "{stderr}");
    assert!(
        stdout.contains("precopied") && stdout.contains("\nhybrid memfd-continue "),
        "{stdout}"
    );

    let found = results(folder.path());
    assert_eq!(found["runs"], serde_json::json!({"planned": 6, "completed": 6, "failed": 0}));
    for cell in found["cells"].as_array().expect("cells") {
        let (mode, figures) = (&cell["cell"]["mode"], &cell["figures"]);
        let copies = mode == "hybrid";
        for figure in ["copy_rounds", "precopied_share", "copied_to_memory"] {
            let median = figures[figure]["median"].as_f64();
            assert_eq!(median.is_some_and(|of| of > 0.0), copies, "{mode}: {figure}: {found:#}");
            assert_eq!(median.is_some(), copies, "{mode}: {figure}: {found:#}");
        }
        for figure in ["blocktime_us", "faults", "sent_to_memory", "downtime_us"] {
            assert!(figures[figure]["median"].is_f64(), "{mode}: {figure}: {found:#}");
        }
    }
    // What was asked for reached the fault server.
    let files = run_files(folder.path());
    let name = "001-process-random-hybrid-bubbling-16M-1vcpu-memfd-continue-1lane-loopback.json";
    let (_, run) = files.iter().find(|(path, _)| path.ends_with(name)).expect("a run of hybrid");
    let run: Value = serde_json::from_slice(run).expect("a run is JSON");
    let switchover = &run["outcome"]["completed"]["switchover"];
    assert_eq!(switchover["asked"], "hybrid", "{run:#}");
    assert_eq!(switchover["max_downtime_us"], 50_000, "{run:#}");
    let rounds = switchover["rounds"].as_array().map_or(0, Vec::len);
    assert!((1..=2).contains(&rounds), "{run:#}");
    let page = std::fs::read_to_string(folder.path().join("results.html")).expect("results.html");
    assert!(page.contains("hybrid: --rounds 2"), "{page}");
    assert!(page.contains("Rounds of copying"), "{page}");

    // It goes on with what it has, and with the same conditions only.
    let again = bench(folder.path(), arguments);
    assert!(again.status.success() && run_files(folder.path()) == files, "{again:?}");
    let refused = text_of(&bench(folder.path(), &arguments.replace("50ms", "60ms")).stderr);
    assert!(refused.contains("conditions.max_downtime_us: 50000 there, 60000 now"), "{refused}");
}

#[test]
fn a_mode_without_memory_that_it_needs_is_refused_before_anything_runs() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("bench");
    let refused =
        bench(&out, "--memory 8M --link loopback --mode post-copy,auto --backing memfd-copy");
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let why = text_of(&refused.stderr);
    assert!(why.contains("auto copies memory before the guest moves"), "{why}");
    assert!(why.contains("memfd-continue does"), "{why}");
    let unknown = bench(&out, "--mode best");
    assert_eq!(unknown.status.code(), Some(2), "{unknown:?}");
    assert!(!out.exists());
}

#[test]
fn a_cell_that_fails_is_shown_with_its_reason_and_the_others_go_on() {
    if !userfaultfd_works() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    // 8 MiB are too little for four vCPUs whose memory is zero for the most part.
    let arguments = "--memory 8M --vcpus 1,4 --zero 74 --link loopback --no-verify --no-record";
    let ended = bench(folder.path(), arguments);
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let (stdout, stderr) = (text_of(&ended.stdout), text_of(&ended.stderr));
    assert!(
        stdout.contains("failed, round 1: process random post-copy bubbling 8M 4vcpu"),
        "{stdout}"
    );
    assert!(stdout.contains("leave too little for 4 vCPUs"), "{stdout}");
    assert!(stderr.contains("1 of 2 runs failed"), "{stderr}");
    let found = results(folder.path());
    assert_eq!(found["runs"], serde_json::json!({"planned": 2, "completed": 1, "failed": 1}));
    let failed = &found["cells"][1]["runs"][0]["failed"];
    assert!(failed["reason"].as_str().is_some_and(|why| why.contains("too little")), "{found:#}");
    // It is tried again only if that is wanted.
    for (more, times) in [("", 0), (" --retry", 1)] {
        let again = bench(folder.path(), &format!("{arguments}{more}"));
        assert_eq!(again.status.code(), Some(1), "{again:?}");
        assert_eq!(text_of(&again.stderr).matches("failed: ").count(), times, "{again:?}");
    }
}

#[test]
fn a_migration_that_does_not_end_in_its_time_is_ended_and_fails() {
    if !userfaultfd_works() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    // The guest alone runs longer than that before it is migrated.
    let ended = bench(
        folder.path(),
        "--memory 8M --link loopback --no-record --limit 60ms --run-before 100ms --floor-time 20ms",
    );
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let found = results(folder.path());
    let reason = found["cells"][0]["runs"][0]["failed"]["reason"].as_str();
    assert!(reason.is_some_and(|why| why.contains("did not end within 60ms")), "{found:#}");
}

#[test]
fn an_interrupted_benchmark_leaves_what_it_has() {
    if !userfaultfd_works() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("bench");
    // Once a round's first cell has run, its second one runs.
    let more = "--memory 8M --vcpus 1,2 --link loopback --no-record --runs 900 --floor-time 20ms";
    let mut child = start(&out, more);
    let deadline = Instant::now() + LIMIT;
    while !out.join("runs").is_dir() || run_files(&out).len() < 3 {
        assert!(Instant::now() < deadline, "no run was kept: {:?}", child.kill());
        std::thread::sleep(Duration::from_millis(20));
    }
    let id = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGINT).expect("it runs");
    let ended = wait(child);
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(text_of(&ended.stderr).contains("interrupted, "), "{ended:?}");
    assert!(text_of(&ended.stdout).contains("not finished: "), "{ended:?}");
    let found = results(&out);
    let completed = found["runs"]["completed"].as_u64();
    assert!(completed.is_some_and(|count| (3..1800).contains(&count)), "{found:#}");
    assert_eq!(found["runs"]["failed"], 0, "what was cut short did not fail");
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
