//! The failpoint matrix: each point with each kind of failure, on real processes, and each
//! cell compared with the table in `docs/failures.md`.
//!
//! ```sh
//! cargo test --features failpoints --test failpoints -- --nocapture            # all of it
//! POSTCOPY_FAILPOINT_SAMPLE=100 cargo test ...             # so many cells, drawn by a seed
//! POSTCOPY_FAILPOINT_SAMPLE=100 POSTCOPY_FAILPOINT_SEED=7 cargo test ...    # the same again
//! POSTCOPY_FAILPOINT_CELLS='before_commit_sent crash' cargo test ...   # those of this name
//! ```
//!
//! `POSTCOPY_FAILPOINT_JOBS` cells run at a time (4): they mostly wait.

// The table: what each cell must come to.
mod table;
// One cell: a guest, where it goes, what goes wrong, and what came of it.
mod cell;
// What must go wrong before, for some points to be reached at all.
mod arranged;
// Child processes: limits, captured output.
#[allow(dead_code)] // The other tests use the rest.
#[path = "../migrate/harness.rs"]
mod harness;

use cell::Cell;
use postcopy::failpoint::POINTS;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;
use table::{KINDS, Table};

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// All cells, or those that the environment asks for.
fn cells(table: &Table) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    for point in POINTS {
        for (kind, expected) in table.row(point) {
            cells.push(Cell { point: *point, kind, expected });
        }
    }
    if let Ok(named) = std::env::var("POSTCOPY_FAILPOINT_CELLS") {
        cells.retain(|cell| cell.to_string().contains(&named));
        assert!(!cells.is_empty(), "no cell is called {named:?}");
    }
    if let Some(sample) = number("POSTCOPY_FAILPOINT_SAMPLE") {
        let seed =
            number("POSTCOPY_FAILPOINT_SEED").unwrap_or_else(|| rand::random_range(0..1 << 30));
        println!("{sample} of {} cells, drawn by POSTCOPY_FAILPOINT_SEED={seed}", cells.len());
        cells.shuffle(&mut StdRng::seed_from_u64(seed));
        cells.truncate(sample as usize);
    }
    cells
}

/// Writes all that is known of a cell that went wrong into a file; returns its path.
fn tell(cell: &Cell, text: &str) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("failpoints");
    std::fs::create_dir_all(&folder).expect("a folder in the target directory");
    let path = folder.join(cell.to_string().replace([' ', ':'], "-"));
    std::fs::write(&path, text).expect("our folder");
    path.display().to_string()
}

/// Some points are reached by most migrations only: there must be a fault on a page at the
/// moment at which it is told to be zero, say. So often a cell is tried until it is.
const REACHED_BY: u32 = 8;

#[test]
fn every_point_and_kind_comes_to_what_the_table_says() {
    let table = Table::read();
    let cells = cells(&table);
    let jobs = number("POSTCOPY_FAILPOINT_JOBS").unwrap_or(4);
    let (began, of) = (Instant::now(), cells.len());
    let left = Mutex::new(cells.into_iter());
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let Some(cell) = left.lock().expect("no cell panics here").next() else {
                        break;
                    };
                    let cell_began = Instant::now();
                    let done = (1..=REACHED_BY).find_map(|attempt| {
                        let done = catch_unwind(AssertUnwindSafe(|| cell.run()));
                        let missed = done.as_ref().is_err_and(|panic| {
                            let text = panic.downcast_ref::<String>();
                            text.is_some_and(|text| text.starts_with(cell::NOT_REACHED))
                        });
                        if missed && attempt < REACHED_BY { None } else { Some(done) }
                    });
                    let done = done.expect("the last attempt counts");
                    let took = cell_began.elapsed().as_secs_f32();
                    match done {
                        Ok(found) => println!("{cell}: {found}, {took:.1} s"),
                        Err(panic) => {
                            let text = panic.downcast_ref::<String>().cloned();
                            let text = text.or(panic.downcast_ref::<&str>().map(|t| t.to_string()));
                            let text = text.unwrap_or_default();
                            let told = tell(&cell, &text);
                            println!("{cell}: WRONG after {took:.1} s, see {told}");
                            let first = text.lines().next().unwrap_or_default().to_owned();
                            wrong.lock().expect("as above").push(format!("{cell}: {first}"));
                        }
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().expect("all threads have ended");
    println!("{of} cells in {:.0} s, {} wrong", began.elapsed().as_secs_f32(), wrong.len());
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn the_table_has_each_point_once_and_an_entry_in_each_cell() {
    let table = Table::read();
    let listed: Vec<_> = POINTS.iter().map(|point| point.name).collect();
    let in_table: Vec<_> = table.names().collect();
    let unique: BTreeSet<_> = in_table.iter().collect();
    assert_eq!(unique.len(), in_table.len(), "a point stands in the table twice");
    assert_eq!(listed, in_table);
    let entries: usize = POINTS.iter().map(|point| table.row(point).count()).sum();
    println!("{} points, {entries} cells of {} kinds", POINTS.len(), KINDS.len());
}
