//! [`Store`]: the folder of a benchmark. Its plan, and a file for each finished run and for each
//! round's floors, so that nothing that was measured is lost and nothing is measured twice.
//!
//! ```text
//! plan.json                       what is measured; a benchmark with another one is refused
//! floors/001.json                 the floors of round 1
//! runs/001-CELL.json              the run of a cell in round 1, whole or failed
//! records/CELL.record             when what happened in its run of round 0
//! lock                            locked while a benchmark runs here
//! results.json, results.html      made of all of these, again and again
//! ```

use super::cell::Cell;
use super::floors::Floors;
use super::plan::Plan;
use crate::report::schema::Report;
use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The schema of a run's file.
pub const RUN_SCHEMA: &str = "postcopy-bench-run/1";
/// No file of a store is larger.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// A finished run of a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// [`RUN_SCHEMA`].
    pub schema: String,
    /// Which round it was a part of: from 1, or 0 for a run that was recorded.
    pub round: u32,
    /// The cell.
    pub cell: Cell,
    /// When it began, in milliseconds since 1970.
    pub at_unix_ms: u64,
    /// How long it took, with the start and end of its processes.
    pub took_ms: u64,
    /// The machine's load when it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_average: Option<f64>,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest was migrated.
    Completed(Box<Report>),
    /// It was not, or its memory is wrong.
    Failed(Failed),
}

/// A run that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Why.
    pub reason: String,
    /// The exit code that stands for it.
    pub code: u8,
}

/// A benchmark's folder.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    plan: Plan,
    /// Locked: two benchmarks at a time would measure each other.
    _lock: fs::File,
}

impl Store {
    /// Opens the folder for this plan: a new one, an empty one, or one of the same plan.
    pub fn open(folder: &Path, plan: Plan) -> anyhow::Result<Self> {
        let shown = folder.display();
        for part in ["runs", "floors", "records"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let lock = fs::File::create(folder.join("lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => bail!("another benchmark runs in {shown}"),
            Err(fs::TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {shown}"));
            }
        }
        let store = Self { folder: folder.to_owned(), plan, _lock: lock };
        let path = folder.join("plan.json");
        if !path.exists() {
            if store.any_run()? {
                bail!("{shown} has runs and no plan.json that says of what");
            }
            write(&path, &store.plan)?;
            return Ok(store);
        }
        let there: serde_json::Value = read(&path)?;
        let differences = store.plan.differences(&there);
        if !differences.is_empty() {
            let what = differences.join("; ");
            bail!("{shown} holds another benchmark, which this one cannot go on with: {what}");
        }
        Ok(store)
    }

    fn any_run(&self) -> anyhow::Result<bool> {
        Ok(fs::read_dir(self.folder.join("runs"))?.next().is_some())
    }

    /// What is measured.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The finished run of a cell in a round.
    pub fn run(&self, round: u32, cell: &Cell) -> anyhow::Result<Option<Run>> {
        let path = self.run_path(round, cell);
        if !path.exists() {
            return Ok(None);
        }
        let run: Run = read(&path)?;
        if run.schema != RUN_SCHEMA || run.round != round || run.cell != *cell {
            bail!("{} is not the run that its name says", path.display());
        }
        Ok(Some(run))
    }

    /// Keeps a finished run.
    pub fn keep_run(&self, run: &Run) -> anyhow::Result<()> {
        write(&self.run_path(run.round, &run.cell), run)
    }

    /// Forgets a run that failed, so that it is tried again.
    pub fn forget_run(&self, round: u32, cell: &Cell) -> anyhow::Result<()> {
        Ok(fs::remove_file(self.run_path(round, cell))?)
    }

    /// The floors of a round.
    pub fn floors(&self, round: u32) -> anyhow::Result<Option<Floors>> {
        let path = self.floors_path(round);
        if path.exists() { read(&path).map(Some) } else { Ok(None) }
    }

    /// Keeps the floors of a round.
    pub fn keep_floors(&self, round: u32, floors: &Floors) -> anyhow::Result<()> {
        write(&self.floors_path(round), floors)
    }

    /// Where the recording of a cell is, or is to be.
    pub fn record_path(&self, cell: &Cell) -> PathBuf {
        self.folder.join("records").join(format!("{}.record", cell.slug()))
    }

    fn run_path(&self, round: u32, cell: &Cell) -> PathBuf {
        self.folder.join("runs").join(format!("{round:03}-{}.json", cell.slug()))
    }

    fn floors_path(&self, round: u32) -> PathBuf {
        self.folder.join("floors").join(format!("{round:03}.json"))
    }
}

/// Writes JSON in one step: who looks finds all of it or nothing.
pub fn write(path: &Path, what: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(what)?;
    text.push('\n');
    write_text(path, &text)
}

/// Writes text in one step.
pub fn write_text(path: &Path, text: &str) -> anyhow::Result<()> {
    let beside = path.with_extension("new");
    let written = fs::write(&beside, text).and_then(|()| fs::rename(&beside, path));
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let read = || -> anyhow::Result<T> {
        let mut text = Vec::new();
        fs::File::open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan::tests::plan;

    fn failed(round: u32, cell: &Cell) -> Run {
        Run {
            schema: RUN_SCHEMA.to_owned(),
            round,
            cell: cell.clone(),
            at_unix_ms: 1,
            took_ms: 2,
            load_average: Some(0.5),
            outcome: Outcome::Failed(Failed { reason: "it rained".into(), code: 3 }),
        }
    }

    #[test]
    fn a_folder_goes_on_with_its_own_plan_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("new").join("bench");
        let store = Store::open(&at, plan()).unwrap();
        let run = failed(2, &plan().cells[1]);
        store.keep_run(&run).unwrap();
        let meanwhile = Store::open(&at, plan()).unwrap_err().to_string();
        assert!(meanwhile.contains("another benchmark runs"), "{meanwhile}");
        drop(store);

        let again = Store::open(&at, plan()).unwrap();
        assert_eq!(again.run(2, &run.cell).unwrap(), Some(run.clone()));
        assert_eq!(again.run(1, &run.cell).unwrap(), None);
        assert_eq!(again.run(2, &plan().cells[0]).unwrap(), None);
        assert_eq!(again.floors(2).unwrap().map(|_| ()), None);
        again.forget_run(2, &run.cell).unwrap();
        assert_eq!(again.run(2, &run.cell).unwrap(), None);

        drop(again);
        let other = Plan { rounds: 4, ..plan() };
        let refused = format!("{:#}", Store::open(&at, other).unwrap_err());
        assert!(refused.contains("holds another benchmark"), "{refused}");
        assert!(refused.contains("rounds: 3 there, 4 now"), "{refused}");
    }

    #[test]
    fn runs_of_an_unknown_plan_and_files_that_are_not_what_they_say_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), plan()).unwrap();
        let [cell, other] = [&plan().cells[0], &plan().cells[1]].map(Clone::clone);
        store.keep_run(&failed(1, &cell)).unwrap();
        fs::copy(store.run_path(1, &cell), store.run_path(1, &other)).unwrap();
        assert!(store.run(1, &other).is_err());
        fs::write(store.run_path(1, &cell), "{").unwrap();
        assert!(format!("{:#}", store.run(1, &cell).unwrap_err()).contains("cannot read"));
        fs::remove_file(folder.path().join("plan.json")).unwrap();
        drop(store);
        let refused = Store::open(folder.path(), plan()).unwrap_err().to_string();
        assert!(refused.contains("no plan.json"), "{refused}");
    }
}
