//! Compares every constant, structure and ioctl number of this crate with the
//! kernel's headers, through the C compiler.
//!
//! The list of constants and structures is taken from the crate's source, so that
//! none can be added without being compared. What an older header does not know
//! is named in one line; a structure's layout must match wherever it is known.
//! (`CPATH=folder/include` has the compiler take the headers of another kernel.)

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::process::Command;
use userfaultfd_sys as sys;

/// Our values by the name that the C program gives theirs.
type Values = BTreeMap<String, u64>;

macro_rules! constants {
    ($($name:ident),* $(,)?) => {
        fn constants() -> Values {
            BTreeMap::from([$((stringify!($name).to_owned(), sys::$name as u64)),*])
        }
    };
}

constants! {
    USERFAULTFD_IOC, UFFD_API, UFFD_USER_MODE_ONLY,
    _UFFDIO_REGISTER, _UFFDIO_UNREGISTER, _UFFDIO_WAKE, _UFFDIO_COPY, _UFFDIO_ZEROPAGE,
    _UFFDIO_MOVE, _UFFDIO_WRITEPROTECT, _UFFDIO_CONTINUE, _UFFDIO_POISON, _UFFDIO_API, UFFDIO,
    UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_COPY_MODE_DONTWAKE, UFFDIO_COPY_MODE_WP, UFFDIO_ZEROPAGE_MODE_DONTWAKE,
    UFFDIO_MOVE_MODE_DONTWAKE, UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES,
    UFFDIO_WRITEPROTECT_MODE_WP, UFFDIO_WRITEPROTECT_MODE_DONTWAKE,
    UFFDIO_CONTINUE_MODE_DONTWAKE, UFFDIO_POISON_MODE_DONTWAKE,
    UFFD_EVENT_PAGEFAULT, UFFD_EVENT_FORK, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP,
    UFFD_PAGEFAULT_FLAG_WRITE, UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_MINOR,
    UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_EVENT_FORK, UFFD_FEATURE_EVENT_REMAP,
    UFFD_FEATURE_EVENT_REMOVE, UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_SHMEM,
    UFFD_FEATURE_EVENT_UNMAP, UFFD_FEATURE_SIGBUS, UFFD_FEATURE_THREAD_ID,
    UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_POISON,
    UFFD_FEATURE_MOVE,
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, UFFD_FEATURE_WP_ASYNC,
    PAGEMAP_SCAN_TYPE, PAGEMAP_SCAN_NUMBER,
    PAGE_IS_WRITTEN, PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC,
}

/// Of the constants, those that the header writes into an ioctl's number without a name.
const NAMELESS: [(&str, &str); 2] = [
    ("PAGEMAP_SCAN_TYPE", "_IOC_TYPE(PAGEMAP_SCAN)"),
    ("PAGEMAP_SCAN_NUMBER", "_IOC_NR(PAGEMAP_SCAN)"),
];
/// What a header older than Linux 6.7 has nothing of.
const SCAN: &str = "PAGEMAP_SCAN";

/// One value to compare: what we have, how C spells it, and the macro without
/// which the header does not know it.
struct Item {
    ours: u64,
    c: String,
    guard: Option<&'static str>,
}

macro_rules! structures {
    ($($name:ident { $($($field:ident).+),* $(,)? } $(if $guard:ident)?;)*) => {
        const STRUCTURES: &[&str] = &[$(stringify!($name)),*];

        fn structures() -> Vec<Item> {
            let mut items = Vec::new();
            $({
                let guard = [None $(, Some(stringify!($guard)))?].into_iter().next_back().flatten();
                let name = stringify!($name);
                let c = format!("sizeof(struct {name})");
                items.push(Item { ours: size_of::<sys::$name>() as u64, c, guard });
                $({
                    // What is a word of Rust's has an underline behind it.
                    let field = stringify!($($field).+).replace(' ', "");
                    let field = field.trim_end_matches('_');
                    let c = format!("offsetof(struct {name}, {field})");
                    let ours = offset_of!(sys::$name, $($field).+) as u64;
                    items.push(Item { ours, c, guard });
                })*
            })*
            items
        }
    };
}

structures! {
    uffdio_api { api, features, ioctls };
    uffdio_range { start, len };
    uffdio_register { range, mode, ioctls };
    uffdio_copy { dst, src, len, mode, copy };
    uffdio_zeropage { range, mode, zeropage };
    uffdio_move { dst, src, len, mode, move_ } if _UFFDIO_MOVE;
    uffdio_writeprotect { range, mode };
    uffdio_continue { range, mode, mapped };
    uffdio_poison { range, mode, updated } if _UFFDIO_POISON;
    page_region { start, end, categories } if PAGEMAP_SCAN;
    pm_scan_arg {
        size, flags, start, end, walk_end, vec, vec_len, max_pages,
        category_inverted, category_mask, category_anyof_mask, return_mask,
    } if PAGEMAP_SCAN;
    uffd_msg { event, reserved1, reserved2, reserved3, arg };
}

/// The members of `uffd_msg`'s union have no names of their own in C.
fn message_members() -> Vec<Item> {
    let arg = offset_of!(sys::uffd_msg, arg);
    let member = |offset: usize, c: &str| Item {
        ours: (arg + offset) as u64,
        c: format!("offsetof(struct uffd_msg, arg.{c})"),
        guard: None,
    };
    let size = |size: usize, c: &str| Item {
        ours: size as u64,
        c: format!("sizeof(((struct uffd_msg *)0)->arg{c})"),
        guard: None,
    };
    vec![
        size(size_of::<sys::uffd_msg_arg>(), ""),
        size(size_of::<sys::uffd_msg_pagefault>(), ".pagefault"),
        size(size_of::<sys::uffd_msg_pagefault_feat>(), ".pagefault.feat"),
        size(size_of::<sys::uffd_msg_fork>(), ".fork"),
        size(size_of::<sys::uffd_msg_remap>(), ".remap"),
        size(size_of::<sys::uffd_msg_remove>(), ".remove"),
        member(offset_of!(sys::uffd_msg_pagefault, flags), "pagefault.flags"),
        member(offset_of!(sys::uffd_msg_pagefault, address), "pagefault.address"),
        member(offset_of!(sys::uffd_msg_pagefault, feat), "pagefault.feat.ptid"),
        member(offset_of!(sys::uffd_msg_fork, ufd), "fork.ufd"),
        member(offset_of!(sys::uffd_msg_remap, from), "remap.from"),
        member(offset_of!(sys::uffd_msg_remap, to), "remap.to"),
        member(offset_of!(sys::uffd_msg_remap, len), "remap.len"),
        member(offset_of!(sys::uffd_msg_remove, start), "remove.start"),
        member(offset_of!(sys::uffd_msg_remove, end), "remove.end"),
        member(0, "reserved"),
    ]
}

/// The ioctl numbers as `nix` computes them from our constants.
fn ioctls() -> Vec<Item> {
    macro_rules! number {
        ($request:ident, $number:ident, $argument:ident) => {
            nix::$request!(sys::UFFDIO, sys::$number, size_of::<sys::$argument>()) as u32 as u64
        };
    }
    let item = |c: &str, ours| Item { ours, c: c.to_owned(), guard: None };
    let newer = |c: &str, ours, guard| Item { ours, c: c.to_owned(), guard: Some(guard) };
    vec![
        item("UFFDIO_API", number!(request_code_readwrite, _UFFDIO_API, uffdio_api)),
        item("UFFDIO_REGISTER", number!(request_code_readwrite, _UFFDIO_REGISTER, uffdio_register)),
        item("UFFDIO_UNREGISTER", number!(request_code_read, _UFFDIO_UNREGISTER, uffdio_range)),
        item("UFFDIO_WAKE", number!(request_code_read, _UFFDIO_WAKE, uffdio_range)),
        item("UFFDIO_COPY", number!(request_code_readwrite, _UFFDIO_COPY, uffdio_copy)),
        item("UFFDIO_ZEROPAGE", number!(request_code_readwrite, _UFFDIO_ZEROPAGE, uffdio_zeropage)),
        item(
            "UFFDIO_WRITEPROTECT",
            number!(request_code_readwrite, _UFFDIO_WRITEPROTECT, uffdio_writeprotect),
        ),
        item("UFFDIO_CONTINUE", number!(request_code_readwrite, _UFFDIO_CONTINUE, uffdio_continue)),
        newer(
            "UFFDIO_MOVE",
            number!(request_code_readwrite, _UFFDIO_MOVE, uffdio_move),
            "UFFDIO_MOVE",
        ),
        newer(
            "UFFDIO_POISON",
            number!(request_code_readwrite, _UFFDIO_POISON, uffdio_poison),
            "UFFDIO_POISON",
        ),
        newer(
            "USERFAULTFD_IOC_NEW",
            nix::request_code_none!(sys::USERFAULTFD_IOC, 0) as u32 as u64,
            "USERFAULTFD_IOC_NEW",
        ),
        newer(
            "PAGEMAP_SCAN",
            nix::request_code_readwrite!(
                sys::PAGEMAP_SCAN_TYPE,
                sys::PAGEMAP_SCAN_NUMBER,
                size_of::<sys::pm_scan_arg>()
            ) as u32 as u64,
            SCAN,
        ),
    ]
}

/// Every `pub const` and `pub struct` of the source is in the lists above.
#[test]
fn nothing_is_left_out() {
    let source = include_str!("../src/lib.rs");
    let names = |keyword: &str| -> Vec<String> {
        let lines = source.lines().filter_map(|line| line.strip_prefix(keyword));
        let end = |c: char| !c.is_alphanumeric() && c != '_';
        lines.map(|rest| rest.split(end).next().unwrap_or_default().to_owned()).collect()
    };
    let constants = constants();
    let all = names("pub const ");
    assert_eq!(all.len(), constants.len());
    for name in &all {
        assert!(constants.contains_key(name), "{name} is not compared");
    }
    for name in names("pub struct ").iter().filter(|name| !name.starts_with("uffd_msg_")) {
        assert!(STRUCTURES.contains(&name.as_str()), "{name} is not compared");
    }
}

#[test]
fn all_values_are_those_of_the_kernels_header() {
    let mut items = structures();
    items.extend(message_members());
    items.extend(ioctls());
    items.extend(constants().into_iter().map(|(name, ours)| {
        if let Some((_, c)) = NAMELESS.iter().find(|(nameless, _)| *nameless == name) {
            return Item { ours, c: (*c).to_owned(), guard: Some(SCAN) };
        }
        let scan = name.starts_with("PAGE_IS") || name.starts_with("PM_SCAN");
        let guard = Some(if scan { SCAN } else { &*name.clone().leak() });
        Item { ours, c: name, guard }
    }));

    let Some(theirs) = values_of_the_header(&items) else { return };
    let mut unknown = Vec::new();
    for (index, item) in items.iter().enumerate() {
        match theirs.get(&index) {
            Some(theirs) => assert_eq!(item.ours, *theirs, "{}", item.c),
            None => unknown.push((item.c.as_str(), item.guard)),
        }
    }
    // Of the one header a part may be newer; the other has all of what is used, or nothing.
    let (scan, unknown): (Vec<_>, Vec<_>) =
        unknown.into_iter().partition(|(_, guard)| *guard == Some(SCAN));
    let unknown: Vec<&str> = unknown.into_iter().map(|(c, _)| c).collect();
    let of_scan = items.iter().filter(|item| item.guard == Some(SCAN)).count();
    assert!(unknown.len() * 4 < items.len() - of_scan, "the header knows too little: {unknown:?}");
    assert!([0, of_scan].contains(&scan.len()), "not in the header: {scan:?}");
    if !scan.is_empty() {
        println!("SKIPPED: this host's <linux/fs.h> is older than PAGEMAP_SCAN (Linux 6.7)");
    }
    if !unknown.is_empty() {
        println!("not compared, since this host's header is older: {}", unknown.join(", "));
    }
}

/// What a C program prints for each item, by its place in the list; `None`, and
/// a line that says so, where there is no compiler or no header.
fn values_of_the_header(items: &[Item]) -> Option<BTreeMap<usize, u64>> {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    if Command::new(&compiler).arg("--version").output().is_err() {
        println!("SKIPPED: no C compiler ({compiler}) to compare with the kernel's header");
        return None;
    }
    // The header uses _IOWR without including what defines it.
    let mut program = String::from("#include <linux/ioctl.h>\n#include <linux/userfaultfd.h>\n");
    program.push_str("#include <linux/fs.h>\n");
    program.push_str("#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n");
    for (index, item) in items.iter().enumerate() {
        if let Some(guard) = item.guard {
            writeln!(program, "#ifdef {guard}").unwrap();
        }
        let c = &item.c;
        writeln!(program, "printf(\"{index} %llu\\n\", (unsigned long long)({c}));").unwrap();
        if item.guard.is_some() {
            program.push_str("#endif\n");
        }
    }
    program.push_str("return 0; }\n");

    let directory = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let source = directory.join(format!("userfaultfd-{}.c", std::process::id()));
    let binary = source.with_extension("bin");
    let header = directory.join(format!("header-{}.c", std::process::id()));
    std::fs::write(&header, "#include <linux/userfaultfd.h>\n").unwrap();
    std::fs::write(&source, program).unwrap();
    let compile = |arguments: &[&std::ffi::OsStr]| {
        Command::new(&compiler).args(arguments).output().expect("the compiler runs")
    };
    let there = compile(&["-fsyntax-only".as_ref(), header.as_ref()]).status.success();
    let compiled = compile(&["-o".as_ref(), binary.as_ref(), source.as_ref()]);
    let output = Command::new(&binary).output();
    for file in [&source, &binary, &header] {
        let _ = std::fs::remove_file(file);
    }
    if !there {
        println!("SKIPPED: no <linux/userfaultfd.h> to compare with");
        return None;
    }
    let errors = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "the C program does not compile:\n{errors}");
    let printed = String::from_utf8(output.expect("the C program runs").stdout).unwrap();
    let parse = |line: &str| {
        let (index, value) = line.split_once(' ').expect("an index and a value");
        (index.parse().unwrap(), value.parse().unwrap())
    };
    Some(printed.lines().map(parse).collect())
}
