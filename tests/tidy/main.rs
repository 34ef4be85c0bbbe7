//! The architecture as a test: which layer may import which, where `unsafe` is allowed,
//! how large a file may be, and what belongs where in the tree.
//!
//! Whoever changes the architecture changes a table here, and is seen doing so.

mod scanner;

use scanner::{Path, paths, strip, tokens};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path as FilePath, PathBuf};

/// What a module of the library may use: other modules of the library, and crates.
/// `None`: any crate.
struct Layer {
    name: &'static str,
    modules: &'static [&'static str],
    crates: Option<&'static [&'static str]>,
}

const LAYERS: &[Layer] = &[
    // Pure: it compiles without any crate that does IO.
    Layer {
        name: "proto",
        modules: &[],
        crates: Some(&["serde", "thiserror", "postcard", "loom", "lz4_flex", "std", "core"]),
    },
    // Judges the others, so it shares no code with them.
    Layer { name: "checker", modules: &[], crates: Some(&["std", "serde", "thiserror"]) },
    Layer {
        name: "report",
        modules: &[],
        crates: Some(&["std", "serde", "serde_json", "thiserror", "hdrhistogram", "indicatif"]),
    },
    // Nothing, unless a test asks for it.
    Layer { name: "failpoint", modules: &["proto"], crates: Some(&["std", "fail", "nix"]) },
    // Siblings, but for what is said of one: they meet in the engine.
    Layer { name: "memory", modules: &["proto"], crates: None },
    Layer { name: "transport", modules: &["failpoint", "proto"], crates: None },
    Layer { name: "uffd", modules: &["memory", "proto"], crates: None },
    // The kernel's log of what the process guest writes is userfaultfd's.
    Layer { name: "vmm", modules: &["memory", "proto", "uffd"], crates: None },
    Layer { name: "attach", modules: &["failpoint", "memory", "proto"], crates: None },
    Layer {
        name: "engine",
        modules: &["attach", "failpoint", "memory", "proto", "report", "transport", "uffd"],
        crates: None,
    },
    // The reference VMM's process.
    Layer {
        name: "host",
        modules: &["attach", "engine", "failpoint", "memory", "proto", "report", "vmm"],
        crates: None,
    },
    Layer { name: "operator", modules: &["attach", "engine"], crates: None },
    // Programs.
    Layer { name: "program", modules: &["proto", "report"], crates: None },
    Layer {
        name: "trial",
        modules: &["program", "proto", "report", "transport", "uffd"],
        crates: None,
    },
    Layer {
        name: "bench",
        modules: &[
            "engine",
            "memory",
            "program",
            "proto",
            "report",
            "transport",
            "trial",
            "uffd",
            "vmm",
        ],
        crates: None,
    },
    Layer {
        name: "fault_server",
        modules: &[
            "attach",
            "engine",
            "failpoint",
            "memory",
            "operator",
            "program",
            "proto",
            "report",
            "transport",
        ],
        crates: None,
    },
];

/// What tests inside the library may use beyond that.
const TESTS_MAY_USE: &[(&str, &str)] = &[
    // A guest that verifies itself is believed by nobody.
    ("vmm", "checker"),
];
const TEST_CRATES: &[&str] = &["proptest", "insta", "rand", "serde_json", "tempfile"];

/// What of the standard library `proto` must not touch: it has no sockets, threads,
/// clocks, files or processes.
const IMPURE: &[&[&str]] = &[
    &["net"],
    &["thread"],
    &["fs"],
    &["io"],
    &["os"],
    &["process"],
    &["env"],
    &["time", "Instant"],
    &["time", "SystemTime"],
    &["collections", "HashMap"],
];

/// The modules that talk to the kernel, or to memory that others change. Tests apart,
/// `unsafe` is nowhere else.
const UNSAFE: &[&str] = &[
    "examples/tiny_vmm/vmm.rs",
    "src/attach/commit_word.rs",
    "src/attach/socket.rs",
    "src/bench/floors/trapped.rs",
    "src/engine/destination/guest.rs",
    "src/engine/destination/trap_loop.rs",
    // Where a VMM promises what `serve.rs` builds on.
    "src/engine/source/builder.rs",
    "src/engine/source/serve.rs",
    // Descriptors that the service manager has opened for this process.
    "src/fault_server/service.rs",
    "src/memory/dirty_bitmap.rs",
    "src/memory/guarded.rs",
    "src/memory/huge.rs",
    "src/memory/ram.rs",
    "src/memory/scan.rs",
    "src/memory/segment.rs",
    "src/transport/socket.rs",
    "src/transport/thread.rs",
    "src/transport/udp.rs",
    "src/uffd/open.rs",
    "src/uffd/place.rs",
    "src/uffd/register.rs",
    "src/uffd/write_log.rs",
    "src/vmm/clock.rs",
    "src/vmm/content.rs",
    "src/vmm/kvm/dirty/bitmap.rs",
    "src/vmm/kvm/dirty/ring.rs",
    "src/vmm/kvm/machine.rs",
    "src/vmm/kvm/payload.rs",
    "src/vmm/kvm/signals.rs",
    "src/vmm/kvm/state.rs",
    "src/vmm/kvm/vcpu.rs",
    "src/vmm/process/words.rs",
];

const LINES_MAX: usize = 500;
/// Files that are too large. To be split, not to be added to.
const TOO_LARGE: &[&str] = &[];

const TOP_LEVEL: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "README.md",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "rustfmt.toml",
    "src",
    "fault-server",
    "tests",
    "benches",
    "docs",
    "examples",
    "fuzz",
    "target",
];

fn root() -> &'static FilePath {
    FilePath::new(env!("CARGO_MANIFEST_DIR"))
}

/// A text file of the project, by its path from the root.
struct File {
    path: String,
    text: String,
}

impl File {
    /// Whether it is a test, or a part of one.
    fn is_test(&self) -> bool {
        const NAMES: &[&str] = &["tests.rs", "properties.rs", "loom_models.rs", "simulation.rs"];
        let name = self.path.rsplit('/').next().unwrap_or_default();
        NAMES.contains(&name)
            || self.path == "src/proto/prepaging/model.rs"
            || self.path.split('/').any(|folder| ["tests", "benches"].contains(&folder))
    }

    /// Its code without the tests at its end.
    fn code(&self) -> String {
        let text = strip(&self.text);
        let end = text.find("\nmod tests {").unwrap_or(text.len());
        text[..end].to_owned()
    }

    /// The modules from the crate's root to it: `src/proto/ledger/mod.rs` is
    /// `proto::ledger`.
    fn module(&self) -> Vec<&str> {
        let path = self.path.trim_start_matches("src/").trim_end_matches(".rs");
        let path = path.strip_suffix("/mod").unwrap_or(path);
        path.split('/').filter(|part| !["lib", "main"].contains(part)).collect()
    }
}

fn files() -> Vec<File> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let path = folder.join(&name);
            if entry.file_type().unwrap().is_dir() {
                if !["target", ".git"].contains(&name.as_str()) {
                    folders.push(path);
                }
            } else if name != ".git" {
                // What is not text is no business of this test.
                if let Ok(text) = fs::read_to_string(root().join(&path)) {
                    found.push(File { path: path.to_str().unwrap().to_owned(), text });
                }
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn rust_files() -> Vec<File> {
    let all: Vec<File> = files().into_iter().filter(|file| file.path.ends_with(".rs")).collect();
    assert!(all.len() > 50, "the tree is not where it should be");
    all
}

fn fail_on(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

/// The crates that the manifest names, as they are written in code.
fn dependencies() -> BTreeSet<String> {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let mut in_table = false;
    let mut names = BTreeSet::from(["postcopy".to_owned()]);
    for line in manifest.lines() {
        if line.starts_with('[') {
            in_table = line.ends_with("dependencies]");
        } else if let (true, Some((name, _))) = (in_table, line.split_once(" = ")) {
            names.insert(name.replace('-', "_"));
        }
    }
    assert!(names.contains("quinn") && names.contains("loom"));
    names
}

/// What is wrong with the imports of a module in `layer`.
fn wrong_imports(
    layer: &Layer,
    found: &[Path],
    test: bool,
    known: &BTreeSet<String>,
) -> Vec<String> {
    let allowed_module = |name: &str| {
        name == layer.name
            || layer.modules.contains(&name)
            || (test && TESTS_MAY_USE.contains(&(layer.name, name)))
    };
    let allowed_crate = |name: &str| {
        layer.crates.is_none_or(|crates| crates.contains(&name))
            || (test && TEST_CRATES.contains(&name))
    };
    let mut wrong = Vec::new();
    for path in found {
        let shown = path.join("::");
        let first = path[0].as_str();
        if first == "crate" {
            if let Some(module) = path.get(1).filter(|module| !allowed_module(module)) {
                wrong.push(format!("uses {shown}; {} may not use {module}", layer.name));
            }
        } else if known.contains(first) && !allowed_crate(first) {
            wrong.push(format!("uses {shown}; {} may not use the crate {first}", layer.name));
        } else if layer.name == "proto" && first == "std" && !test {
            let impure = IMPURE.iter().any(|banned| {
                path.len() > banned.len() && path[1..].iter().zip(*banned).all(|(a, b)| a == b)
            });
            if impure {
                wrong.push(format!("uses {shown}; proto is pure"));
            }
        }
    }
    wrong
}

#[test]
fn each_layer_imports_only_what_lies_below_it() {
    let known = dependencies();
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for file in rust_files() {
        let module = file.module();
        if !file.path.starts_with("src/") || file.path.contains("-sys/") || module.is_empty() {
            continue;
        }
        if module[0] == "cli" {
            continue;
        }
        let layer = LAYERS.iter().find(|layer| layer.name == module[0]);
        let layer = layer.unwrap_or_else(|| panic!("{} is in no layer", file.path));
        seen.insert(layer.name);
        let (whole, code) = (strip(&file.text), file.code());
        let mut report = |text: &str, test| {
            let found = paths(text, &module);
            for what in wrong_imports(layer, &found, test, &known) {
                wrong.push(format!("{} {what}", file.path));
            }
        };
        report(&whole, true);
        report(&code, file.is_test());
    }
    assert_eq!(seen.len(), LAYERS.len(), "a layer of the table has no file");
    wrong.sort();
    wrong.dedup();
    fail_on(wrong);
}

#[test]
fn programs_use_the_library_and_not_its_insides() {
    let mut wrong = Vec::new();
    for file in rust_files() {
        let program = file.path == "src/main.rs" || file.path.starts_with("src/cli/");
        if !program && !file.path.starts_with("fault-server/src/") {
            continue;
        }
        for path in paths(&strip(&file.text), &file.module()) {
            let inside =
                path[0] == "crate" && program && path.get(1).is_some_and(|module| module != "cli");
            if inside || ["quinn", "userfaultfd", "kvm_ioctls", "tokio"].contains(&path[0].as_str())
            {
                wrong.push(format!("{} uses {}", file.path, path.join("::")));
            }
        }
    }
    fail_on(wrong);
}

#[test]
fn a_forbidden_import_is_noticed() {
    let known = dependencies();
    let check = |layer: &str, code: &str, test| {
        let layer = LAYERS.iter().find(|one| one.name == layer).unwrap();
        wrong_imports(layer, &paths(&strip(code), &[layer.name, "x"]), test, &known).len()
    };
    assert_eq!(check("proto", "use crate::{memory::ram, proto::page};", false), 1);
    assert_eq!(check("proto", "fn f() { std::time::Instant::now(); tokio::spawn(g()) }", false), 2);
    assert_eq!(check("proto", "use std::time::Duration; use super::page;", false), 0);
    assert_eq!(check("uffd", "use super::super::transport::Ticket;", false), 1);
    assert_eq!(check("vmm", "use crate::checker::check;", false), 1);
    assert_eq!(check("vmm", "use crate::checker::check;", true), 0);
}

#[test]
fn unsafe_stays_where_the_kernel_is() {
    let mut wrong = Vec::new();
    let mut unused: BTreeSet<&str> = UNSAFE.iter().copied().collect();
    for file in rust_files() {
        if file.is_test() || !tokens(&file.code()).iter().any(|token| token == "unsafe") {
            continue;
        }
        if !unused.remove(file.path.as_str()) {
            wrong.push(format!("{} has unsafe code and is not on the list", file.path));
        }
    }
    wrong.extend(unused.iter().map(|path| format!("{path} is on the list and has no unsafe code")));
    fail_on(wrong);
}

#[test]
fn files_begin_with_what_they_are_and_stay_readable() {
    let mut wrong = Vec::new();
    let mut small: BTreeSet<&str> = TOO_LARGE.iter().copied().collect();
    for file in rust_files() {
        if !file.text.starts_with("//! ") {
            wrong.push(format!("{} does not begin with a //! line", file.path));
        }
        let lines = file.text.lines().count();
        let too_large = lines > LINES_MAX && !file.is_test();
        if too_large && !small.remove(file.path.as_str()) {
            wrong.push(format!("{} has {lines} lines, at most {LINES_MAX}", file.path));
        }
        for name in ["utils", "util", "common", "helpers", "misc"] {
            let as_file = file.path.ends_with(&format!("/{name}.rs"));
            if as_file || file.path.contains(&format!("/{name}/")) {
                wrong.push(format!("{} is called {name}, which says nothing", file.path));
            }
        }
        let words = tokens(&strip(&file.text));
        for marker in ["dbg", "todo", "unimplemented"] {
            let used = words.windows(2).any(|pair| pair[0] == marker && pair[1] == "!");
            if used {
                wrong.push(format!("{} has {marker}!", file.path));
            }
        }
    }
    wrong.extend(small.iter().map(|path| format!("{path} is no longer too large: strike it out")));
    fail_on(wrong);
}

#[test]
fn no_text_has_open_ends_or_paths_of_one_machine() {
    // Put together here so that this file is not found itself.
    let markers = [["TO", "DO"], ["FIX", "ME"], ["X", "XX"]].map(|parts| parts.concat());
    let homes = [["/ho", "me/"], ["/ro", "ot/"], ["/wo", "rk/"], ["/Use", "rs/"]];
    let homes = homes.map(|parts| parts.concat());
    let mut wrong = Vec::new();
    for file in files() {
        for (number, line) in (1..).zip(file.text.lines()) {
            let words = || line.split(|c: char| !c.is_alphanumeric());
            let open = markers.iter().any(|marker| words().any(|word| word == marker));
            let home = homes.iter().any(|home| line.contains(home.as_str()));
            if open || home {
                wrong.push(format!("{}:{number}: {}", file.path, line.trim()));
            }
        }
    }
    fail_on(wrong);
}

#[test]
fn the_top_level_holds_what_a_newcomer_expects() {
    let mut wrong = Vec::new();
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !name.starts_with('.') && !TOP_LEVEL.contains(&name.as_str()) {
            wrong.push(format!("{name} does not belong into the top level"));
        }
    }
    for needed in ["README.md", "src", "fault-server", "tests", "benches", ".ci/run"] {
        if !root().join(needed).exists() {
            wrong.push(format!("{needed} is missing"));
        }
    }
    fail_on(wrong);
}

#[test]
fn the_documents_agree_with_the_code() {
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let (readme, ci, manifest) = (read("README.md"), read(".ci/run"), read("Cargo.toml"));
    for command in ["cargo run --release -- demo", "cargo test --workspace"] {
        assert!(readme.contains(command), "the README lacks {command:?}");
        assert!(ci.contains(command), ".ci/run lacks {command:?}");
    }
    let value = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap();
        line.split('"').nth(1).unwrap().to_owned()
    };
    let rust = value(&manifest, "rust-version");
    assert!(readme.contains(&format!("Rust {rust}")), "the README does not ask for Rust {rust}");
    // A patch of another version is silently not used.
    let wanted = value(&manifest, "userfaultfd-sys");
    assert_eq!(value(&read("src/uffd/userfaultfd-sys/Cargo.toml"), "version"), wanted);
    // Documents name files that exist.
    let mut wrong = Vec::new();
    for file in files().iter().filter(|file| file.path.ends_with(".md")) {
        for name in file.text.split('`').skip(1).step_by(2) {
            let named = ["src/", "docs/", "tests/", "benches/", "examples/", "fault-server/"];
            // The test in a file is looked for below.
            let name = name.split("::").next().unwrap_or_default();
            let plain = !name.contains([' ', '{', '*', '<', '\n']);
            if plain
                && named.iter().any(|start| name.starts_with(start))
                && !root().join(name).exists()
            {
                wrong.push(format!("{} names {name}, which does not exist", file.path));
            }
        }
    }
    fail_on(wrong);
}

#[test]
fn every_layer_and_every_document_is_found_from_the_readme() {
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let (readme, architecture) = (read("README.md"), read("docs/architecture.md"));
    let mut missing = BTreeMap::new();
    for layer in LAYERS {
        if !architecture.contains(&format!("`{}`", layer.name)) {
            missing.insert(layer.name, "docs/architecture.md");
        }
    }
    for document in ["architecture", "protocol", "attach", "embedding", "failures"] {
        let document = format!("docs/{document}.md");
        if !readme.contains(&document) {
            missing.insert(document.leak(), "README.md");
        }
    }
    assert!(missing.is_empty(), "not mentioned: {missing:?}");
}

/// The variants of an enum in this source, in order.
fn variants<'a>(source: &'a str, name: &str) -> Vec<&'a str> {
    let start = source.find(&format!("pub enum {name} {{")).unwrap();
    let body = &source[start..];
    let body = &body[..body.find("\n}").unwrap()];
    let lines = body.lines().filter(|line| {
        line.strip_prefix("    ").is_some_and(|rest| rest.starts_with(|c: char| c.is_uppercase()))
    });
    lines.map(|line| line.trim().split(|c: char| !c.is_alphanumeric()).next().unwrap()).collect()
}

#[test]
fn the_attach_protocols_page_has_every_message_under_its_number_and_every_limit() {
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let (messages, page) = (read("src/attach/message.rs"), read("docs/attach.md"));
    let mut wrong = Vec::new();
    for (of, least) in [("Request", 10), ("Reply", 12)] {
        let variants = variants(&messages, of);
        assert!(variants.len() >= least, "{variants:?}");
        let table = page.find(&format!("| no. | {} |", of.to_lowercase())).unwrap();
        let rows = page[table..].lines().skip(2).take_while(|line| line.starts_with('|'));
        let rows: Vec<_> = rows.map(|row| row.split('|').map(str::trim).collect()).collect();
        let expected: Vec<_> =
            variants.iter().enumerate().map(|(number, name)| (number.to_string(), *name)).collect();
        let found: Vec<_> =
            rows.iter().map(|row: &Vec<&str>| (row[1].to_owned(), row[2])).collect();
        if expected != found {
            wrong.push(format!("{of}: the code has {expected:?}, the page {found:?}"));
        }
    }
    let sources = [messages, read("src/attach/handover.rs"), read("src/attach/socket.rs")].concat();
    for (constant, row) in [
        ("VERSION: u16 = 4;", "This is version 4."),
        ("REQUEST_BYTES_MAX: usize = 4096;", "| a request | 4 KiB |"),
        ("REPLY_BYTES_MAX: usize = 17 << 20;", "| a reply | 17 MiB |"),
        ("STATE_BYTES_MAX: usize = 16 << 20;", "| machine state | 16 MiB |"),
        ("SEEDS_MAX: usize = 4096;", "| seed pages | 4096 |"),
        ("MEMORY_FILES_MAX: usize = 16;", "| memory files | 16 |"),
        ("CAPABILITIES_MAX: usize = 16;", "| capabilities | 16, of 64 bytes |"),
        ("CAPABILITY_BYTES_MAX: usize = 64;", "| capabilities | 16, of 64 bytes |"),
        ("CAPABILITY_DIRTY_LOG: &str = \"dirty-log\";", "| `dirty-log` |"),
        ("DESCRIPTORS_MAX: usize = 18;", "until it refuses them | 18 |"),
    ] {
        if !sources.contains(&format!("const {constant}")) || !page.contains(row) {
            wrong.push(format!("{constant:?} and {row:?} do not stand together"));
        }
    }
    fail_on(wrong);
}

/// A row of the table of failures without a test, or with one that is not there, is a claim.
#[test]
fn every_failure_of_the_table_is_proven_by_a_test_that_exists() {
    let page = fs::read_to_string(root().join("docs/failures.md")).unwrap();
    let table = page.find("| phase | failure | outcome |").unwrap();
    let rows = page[table..].lines().skip(2).take_while(|line| line.starts_with('|'));
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for row in rows {
        seen += 1;
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let tests: Vec<_> =
            cells.last().unwrap().split('`').filter(|cell| cell.contains("::")).collect();
        if cells.len() != 5 || tests.is_empty() {
            wrong.push(format!("five cells and a test are wanted: {row}"));
        }
        for test in tests {
            let (file, name) = test.split_once("::").unwrap();
            let source = fs::read_to_string(root().join(file)).unwrap_or_default();
            // Or the name that a macro of the tests is given.
            if ![format!("fn {name}("), format!("{name},"), format!("{name}:")]
                .iter()
                .any(|form| source.contains(form.as_str()))
            {
                wrong.push(format!("{test} is not there"));
            }
        }
    }
    assert!(seen >= 15, "the table of failures was not found: {seen} rows");
    fail_on(wrong);
}

/// The failpoints in the library's code, by name, and whether each one's step can fail.
fn failpoints_in_code() -> Vec<(String, bool)> {
    let mut found = Vec::new();
    for file in rust_files() {
        if !file.path.starts_with("src/") || file.path.starts_with("src/failpoint/") {
            continue;
        }
        for call in file.text.split("failpoint!(").skip(1) {
            let mut literals = call.split('"').skip(1).step_by(2);
            let two = call.find("=>").is_some_and(|arrow| arrow < call.find('"').unwrap());
            let names: Vec<_> = literals.by_ref().take(1 + usize::from(two)).collect();
            let last = call.find(names[names.len() - 1]).unwrap() + names[names.len() - 1].len();
            let fails = call[last + 1..].starts_with(',');
            found.extend(names.into_iter().map(|name| (name.to_owned(), fails)));
        }
    }
    found
}

#[test]
fn every_failpoint_stands_once_in_the_code_and_once_in_the_list() {
    let list = fs::read_to_string(root().join("src/failpoint/points.rs")).unwrap();
    let table = &list[list.find("POINTS: &[Point]").unwrap()..];
    let rows = table.lines().map(str::trim).filter(|row| row.contains("(Process::"));
    let mut listed: Vec<_> = rows
        .map(|row| (row.split('"').nth(1).unwrap().to_owned(), row.starts_with("fails")))
        .collect();
    let mut in_code = failpoints_in_code();
    assert!(listed.len() > 100, "{} points in the list", listed.len());
    listed.sort();
    in_code.sort();
    let wrong = |these: &[(String, bool)], those: &[(String, bool)], where_: &str| {
        let odd = these.iter().filter(|point| {
            let count = |of: &[(String, bool)]| of.iter().filter(|one| one == point).count();
            count(those) != 1 || count(these) != 1
        });
        odd.map(|point| format!("{point:?} {where_}")).collect::<Vec<_>>()
    };
    let mut all = wrong(&in_code, &listed, "is in the code, and not once in the list");
    all.extend(wrong(&listed, &in_code, "is in the list, and not once in the code"));
    fail_on(all);
}
