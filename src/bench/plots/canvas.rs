//! What all plots have in common: their size, colours and axes.

use super::{Plot, PlotError};
use crate::bench::table::Written;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::fmt::Display;

/// A plot's size in pixels.
pub const SIZE: (u32, u32) = (560, 300);
/// Network faults, and pages that were asked for.
pub const DEMANDED: RGBColor = RGBColor(0xc4, 0x3c, 0x2c);
/// Pushed pages.
pub const PUSHED: RGBColor = RGBColor(0x2c, 0x6f, 0xbb);
/// Late hits.
pub const LATE: RGBColor = RGBColor(0xe0, 0x9a, 0x2a);
/// All else.
pub const OTHER: RGBColor = RGBColor(0x8a, 0x8a, 0x8a);

/// Draws on an empty area of this size, and returns the SVG.
pub fn draw<E: Display>(
    plot: &str,
    size: (u32, u32),
    paint: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), E>,
) -> Plot {
    let failed = |why: &dyn Display| PlotError { plot: plot.to_owned(), why: why.to_string() };
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        paint(&area).map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))?;
    }
    Ok(Some(text))
}

/// A named line.
pub struct Line {
    /// What it is.
    pub name: &'static str,
    /// Its colour.
    pub color: RGBColor,
    /// Its points, in order of x.
    pub points: Vec<(f64, f64)>,
}

/// What a plot of lines is called, and its axes.
pub struct Axes {
    /// The plot's title.
    pub title: &'static str,
    /// What runs to the right.
    pub x: &'static str,
    /// What runs upwards.
    pub y: &'static str,
    /// Whether x is drawn by its logarithm.
    pub x_log: bool,
    /// How x is written.
    pub x_written: Written,
    /// How y is written.
    pub y_written: Written,
}

/// Lines over one another.
pub fn lines(axes: &Axes, lines: &[Line]) -> Plot {
    let points = || lines.iter().flat_map(|line| line.points.iter().copied());
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        values.fold(None, |found: Option<(f64, f64)>, value| {
            let (least, most) = found.unwrap_or((value, value));
            Some((least.min(value), most.max(value)))
        })
    };
    let (Some((left, right)), Some((_, top))) =
        (bounds(&mut points().map(|(x, _)| x)), bounds(&mut points().map(|(_, y)| y)))
    else {
        return Ok(None);
    };
    let top = if top > 0.0 { 1.05 * top } else { 1.0 };
    draw(axes.title, SIZE, |area| {
        let mut chart = ChartBuilder::on(area);
        chart
            .caption(axes.title, ("sans-serif", 14))
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(64);
        // The two kinds of axis are two types.
        macro_rules! on {
            ($range:expr) => {{
                let mut chart = chart.build_cartesian_2d($range, 0.0..top)?;
                chart
                    .configure_mesh()
                    .light_line_style(WHITE.mix(0.0))
                    .x_desc(axes.x)
                    .y_desc(axes.y)
                    .x_labels(7)
                    .y_labels(6)
                    .x_label_formatter(&|x| (axes.x_written)(*x))
                    .y_label_formatter(&|y| (axes.y_written)(*y))
                    .draw()?;
                for line in lines.iter().filter(|line| !line.points.is_empty()) {
                    let color = line.color;
                    chart
                        .draw_series(LineSeries::new(
                            line.points.iter().copied(),
                            color.stroke_width(2),
                        ))?
                        .label(line.name)
                        .legend(move |(x, y)| {
                            PathElement::new([(x, y), (x + 14, y)], color.stroke_width(2))
                        });
                }
                chart
                    .configure_series_labels()
                    .background_style(WHITE.mix(0.8))
                    .border_style(OTHER)
                    .draw()
            }};
        }
        match axes.x_log {
            true => on!((left.max(1.0)..right.max(left + 1.0).max(2.0)).log_scale()),
            false => on!(left..if right > left { right } else { left + 1.0 }),
        }
    })
}
