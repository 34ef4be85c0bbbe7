//! Plots as SVG text, for a page that loads nothing from anywhere.
//!
//! A recording becomes a [`History`](history::History): who waited for which page, and how long.
//! From it, and from a benchmark's results, each plot is drawn with a bounded number of
//! elements, however long the migration was.

pub mod arrival;
mod canvas;
pub mod history;
pub mod latency;
pub mod over_time;
pub mod overview;

/// A plot that could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw {plot}: {why}")]
pub struct PlotError {
    plot: String,
    why: String,
}

/// A plot as an SVG element; nothing where there is nothing to see.
pub type Plot = Result<Option<String>, PlotError>;
