//! Exit codes, and the one line that says why.
//!
//! 0 done; 1 failed before anything moved; 2 wrong arguments (clap's); 3 aborted, the
//! guest runs on at the source; 4 lost after the commit, or aborted and the guest does not
//! run on; 5 the memory or the report is
//! not what it should be; 6 done, but the report could not be written.

use super::output;
use super::signals::complain;
use crate::proto::message::printable;
use crate::proto::source::Outcome;
use crate::report::schema::Report;
use std::path::Path;
use std::process::ExitCode;

/// A failure with an exit code of its own.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The guest runs on at the source.
    #[error("the migration was aborted: {why}{}", guest(*.side))]
    Aborted {
        /// Why.
        why: String,
        /// Which side says so.
        side: Side,
    },
    /// Before the commit, and yet the guest does not run.
    #[error("the migration was aborted: {why}; and the guest does not run on: {stranded}")]
    Stranded {
        /// Why it was aborted.
        why: String,
        /// Why the guest does not run on.
        stranded: String,
    },
    /// After the commit: the link did not come back, or the guest cannot go on there.
    #[error("the migration was lost after the commit: {0}")]
    Lost(String),
    /// A child process, of this name, said one of the two.
    #[error("the guest was lost: {0} said so above")]
    ChildLost(String),
    /// A page is not what it should be.
    #[error("verification failed: {0}")]
    Wrong(String),
    /// All is well but for the report.
    #[error("the migration completed, but there is no report of it: {0}")]
    Unreported(String),
}

/// Which side a failure is told on.
#[derive(Clone, Copy, Debug)]
pub enum Side {
    /// Where the guest is.
    Source,
    /// Where it was to go.
    Destination,
}

fn guest(side: Side) -> &'static str {
    match side {
        Side::Source => "; the guest runs on here",
        Side::Destination => "; no guest is here",
    }
}

impl Failure {
    /// The failure that an outcome is, unless it is none.
    pub fn of(outcome: &Outcome, side: Side) -> Result<(), Failure> {
        match outcome.clone() {
            Outcome::Completed => Ok(()),
            Outcome::Aborted(why) => Err(Failure::Aborted { why, side }),
            Outcome::Lost(why) => Err(Failure::Lost(why)),
        }
    }

    /// Its exit code.
    pub fn code(&self) -> u8 {
        match self {
            Failure::Aborted { .. } => 3,
            Failure::Lost(_) | Failure::Stranded { .. } | Failure::ChildLost(_) => 4,
            Failure::Wrong(_) => 5,
            Failure::Unreported(_) => 6,
        }
    }

    /// The failure that a child process reported by its exit code.
    pub fn of_child(code: Option<i32>, name: &str) -> anyhow::Error {
        let why = format!("{name} said so above");
        match code {
            Some(3) => Failure::Aborted { why, side: Side::Source }.into(),
            Some(4) => Failure::ChildLost(name.to_owned()).into(),
            Some(5) => Failure::Wrong(why).into(),
            Some(6) => Failure::Unreported(why).into(),
            Some(code) => anyhow::anyhow!("{name} ended with exit code {code}"),
            None => anyhow::anyhow!("{name} was killed"),
        }
    }
}

/// Writes the report as JSON, if that was asked for.
pub fn write_report(report: &Report, path: Option<&Path>) -> Result<(), Failure> {
    let Some(path) = path else { return Ok(()) };
    report.write(path).map_err(|error| {
        let why = format!("cannot write the report {}: {error}", path.display());
        Failure::Unreported(why)
    })
}

/// How `program` ends if the session and its report went like this. The session comes last
/// and decides the exit code: a report that cannot be written must not hide it.
pub fn both(
    program: &str,
    session: anyhow::Result<()>,
    reported: Result<(), Failure>,
) -> anyhow::Result<()> {
    match (session, reported) {
        (Ok(()), reported) => Ok(reported?),
        (Err(failure), Err(Failure::Unreported(why))) => {
            complain(program, &printable(why));
            Err(failure)
        }
        (Err(failure), _) => Err(failure),
    }
}

/// The end of `program`: prints its error in one line, if it is one, and returns its exit code.
/// Whoever reads what was said has a second for it.
pub fn ended(program: &str, done: &anyhow::Result<()>) -> ExitCode {
    if let Err(error) = done {
        complain(program, &one_line(error));
    }
    output::farewell();
    done.as_ref().err().map_or(ExitCode::SUCCESS, |error| ExitCode::from(code(error)))
}

/// An error and its causes, in one line.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        // Some errors already say what their cause says.
        if !line.ends_with(&cause) {
            line = if line.is_empty() { cause } else { format!("{line}: {cause}") };
        }
    }
    // Paths, arguments and peers may hold anything; this is one line all the same.
    printable(line)
}

/// The exit code of a program that ends with this error.
pub fn code(error: &anyhow::Error) -> u8 {
    let failure = error.chain().find_map(|cause| cause.downcast_ref::<Failure>());
    failure.map_or(1, Failure::code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_has_the_same_code_behind_a_process_boundary() {
        let outcomes = [(Outcome::Aborted("x".into()), 3), (Outcome::Lost("x".into()), 4)];
        for (outcome, code) in outcomes {
            let failure = Failure::of(&outcome, Side::Source).unwrap_err();
            assert_eq!(failure.code(), code);
            let child = Failure::of_child(Some(i32::from(code)), "the child");
            assert_eq!(child.downcast_ref::<Failure>().map(Failure::code), Some(code));
        }
        let unreported = Failure::of_child(Some(6), "the child");
        assert_eq!(unreported.downcast_ref::<Failure>().map(Failure::code), Some(6));
        assert!(Failure::of(&Outcome::Completed, Side::Source).is_ok());
        assert!(Failure::of_child(Some(1), "it").downcast_ref::<Failure>().is_none());
    }
}
