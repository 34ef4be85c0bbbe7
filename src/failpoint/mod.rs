//! Failpoints: named places between two steps of a migration, at which a test has
//! something go wrong. For tests only: without the cargo feature `failpoints` a point is no
//! code at all, and its name is not in the program.
//!
//! A point is `failpoint!("component::between_which_steps")`, or, where the step can really
//! fail, with what happens then behind the name: `failpoint!("...", return Err(...))`. All of
//! them stand in `POINTS`. What happens at which is said to one process by the
//! environment variable `FAILPOINTS`, in the language of the crate `fail`:
//!
//! ```sh
//! POSTCOPY_FAILPOINT_LOG=log FAILPOINTS='source::before_commit_sent=return(crash)' postcopy migrate ...
//! ```
//!
//! | action | what happens at the point |
//! |---|---|
//! | `error` | the step fails, as it could really fail |
//! | `delay MS` | the thread that is there stands still; the others go on |
//! | `crash` | the process ends by SIGKILL |
//! | `cut MS` | no datagram leaves this process or comes in, for so long |
//! | `half-out MS` | none leaves; what comes in comes in |
//! | `half-in MS` | none comes in; what leaves leaves |
//! | `stall` | the process stops (SIGSTOP), until whoever tests it lets it continue |
//!
//! Before it acts, a point appends a line to the file that `POSTCOPY_FAILPOINT_LOG` names:
//! the monotonic time in nanoseconds, the process's number, the point, the action. A point
//! that stands in that file acts no more: a crash is to happen once in a migration, and not
//! in each process that is started again with the same environment.
//!
//! The pure core has none: points around its decisions stand where they are carried out.

#[cfg(feature = "failpoints")]
mod act;
#[cfg(feature = "failpoints")]
mod points;

#[cfg(feature = "failpoints")]
pub use act::{Direction, ON_ITS_WAY, drops, hit, limits};
#[cfg(feature = "failpoints")]
pub use points::{POINTS, Point, Process};

/// A failpoint, see the module; or one of two, after a condition.
#[cfg(feature = "failpoints")]
macro_rules! failpoint {
    ($name:literal) => {{
        $crate::failpoint::hit($name, false);
    }};
    ($name:literal, $fails:expr) => {
        if $crate::failpoint::hit($name, true) {
            $fails
        }
    };
    ($first:expr => $name:literal, $other:literal) => {
        $crate::failpoint::hit(if $first { $name } else { $other }, false)
    };
    ($first:expr => $name:literal, $other:literal, $fails:expr) => {
        if $crate::failpoint::hit(if $first { $name } else { $other }, true) {
            $fails
        }
    };
}

/// Nothing.
#[cfg(not(feature = "failpoints"))]
macro_rules! failpoint {
    ($($point:tt)*) => {{}};
}

pub(crate) use failpoint;

/// The time limits of a session: its defaults. With failpoints a test may set others, since
/// nobody wants to wait for a minute in each of hundreds of cases.
#[cfg(not(feature = "failpoints"))]
pub(crate) fn limits() -> crate::proto::source::SessionLimits {
    crate::proto::source::SessionLimits::default()
}
