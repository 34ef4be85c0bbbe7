//! `postcopy bench`: many migrations, measured alike.
//!
//! A [`matrix`] of workloads, modes, policies, sizes, vCPUs, backings, push lanes and links makes
//! *cells*. Each cell is one [`trial`](crate::trial), run several times; a *round* runs every cell once, in an
//! order of its own, so that what changes on the machine meanwhile meets all cells alike. Each
//! round begins with the [`floors`]: what the same machine, at that time, needs for the least
//! that a fault consists of. A [`store`] keeps every finished run as a file, so that a benchmark
//! that was interrupted goes on; [`results`] makes medians and spreads of them, for the [`table`]
//! and the JSON; a [`page`] has them with plots, those of recorded runs included.
//!
//! It measures by what users can run: each migration is made by processes of this program, and
//! verified. It knows nothing of how one works.

pub mod cell;
mod drive;
pub mod figures;
pub mod floors;
pub mod machine;
pub mod matrix;
pub mod page;
pub mod plan;
mod plots;
pub mod results;
pub mod statistics;
pub mod store;
pub mod table;

pub use drive::{Display, bench, verdict};
