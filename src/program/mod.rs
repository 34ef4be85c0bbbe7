//! How a program of this crate behaves: [exit codes](exit), [arguments as people write
//! them](units), its [log, and what an interrupt does](signals), [how it writes](output) without
//! [waiting for whoever reads](voice). `postcopy` and `fault-server` share it, so that scripts
//! can treat both alike.

pub mod exit;
pub mod output;
pub mod signals;
pub mod units;
pub mod voice;
