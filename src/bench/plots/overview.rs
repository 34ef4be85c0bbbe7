//! A figure of all cells beside each other: medians, and how far the runs lie apart.

use super::Plot;
use super::canvas::{PUSHED, draw};
use crate::bench::results::Results;
use crate::bench::statistics::Spread;
use crate::bench::table::{Names, Written};
use plotters::prelude::*;

/// The most cells of a plot.
const CELLS_MAX: usize = 48;
/// Pixels of a cell, and of what is above and below all of them.
const ROW: u32 = 22;
const FRAME: u32 = 70;
/// Pixels of a letter.
const LETTER: u32 = 7;

/// A figure of all cells, or of the first of many; nothing if none has it.
pub fn bars(results: &Results, figure: &str, title: &str, written: Written) -> Plot {
    let names = Names::of(results);
    let rows: Vec<(&String, &Spread)> = names
        .own
        .iter()
        .zip(&results.cells)
        .filter_map(|(name, cell)| Some((name, cell.figures.get(figure)?)))
        .take(CELLS_MAX)
        .collect();
    let most = rows.iter().map(|(_, spread)| spread.max).fold(0.0, f64::max);
    if rows.is_empty() || most <= 0.0 {
        return Ok(None);
    }
    let letters = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) as u32;
    let (label, count) = (12 + LETTER * letters, rows.len());
    let size = (label + 460, FRAME + ROW * count as u32);
    draw(title, size, |area| {
        let mut chart = ChartBuilder::on(area)
            .caption(title, ("sans-serif", 14))
            .margin(8)
            .margin_right(24)
            .x_label_area_size(28)
            .y_label_area_size(label)
            // From above downwards, as in the table.
            .build_cartesian_2d(0.0..1.05 * most, (count as f64)..0.0)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .light_line_style(WHITE.mix(0.0))
            .y_labels(0)
            .x_labels(6)
            .x_label_formatter(&|x| written(*x))
            .draw()?;
        let places = || rows.iter().enumerate().map(|(row, of)| (row as f64, of));
        chart.draw_series(places().map(|(row, (_, spread))| {
            Rectangle::new([(0.0, row + 0.2), (spread.median, row + 0.8)], PUSHED.mix(0.7).filled())
        }))?;
        chart.draw_series(places().map(|(row, (_, spread))| {
            PathElement::new([(spread.min, row + 0.5), (spread.max, row + 0.5)], BLACK)
        }))?;
        let plane = chart.plotting_area();
        for (row, (name, _)) in places() {
            let (_, y) = plane.map_coordinate(&(0.0, row + 0.5));
            let style = ("sans-serif", 12).into_text_style(area);
            area.draw_text(name, &style, (8, y - 6))?;
        }
        Ok::<(), DrawingAreaErrorKind<_>>(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::tests::results;
    use crate::bench::table::nanos;

    #[test]
    fn a_figure_has_a_bar_for_each_cell_that_has_it() {
        let results = results();
        let svg = bars(&results, "stall_p50_ns", "Stalls", nanos).unwrap().unwrap();
        roxmltree::Document::parse(&svg).unwrap_or_else(|error| panic!("{error}: {svg}"));
        assert!(svg.contains("loopback") && svg.contains("1Gbit:1ms:0.1%"), "{svg}");
        let svg = bars(&results, "rate_to_link", "Rate", nanos).unwrap().unwrap();
        assert!(!svg.contains("loopback") && svg.contains("1Gbit:1ms:0.1%"), "{svg}");
        assert_eq!(bars(&results, "us_to_90_percent", "Recovery", nanos).unwrap(), None);
    }
}
