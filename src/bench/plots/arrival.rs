//! The map of arrivals: which pages came when, and which of them had been asked for.

use super::Plot;
use super::canvas::{DEMANDED, OTHER, PUSHED, SIZE, draw};
use super::history::History;
use crate::bench::table::nanos;
use crate::engine::destination::EventKind;
use plotters::prelude::*;

/// Fields of the map: moments by pages. What falls into one field is one dot.
const FIELDS: (usize, usize) = (220, 110);

/// What is in a field; the later one is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Dot {
    Nothing,
    Pushed,
    Demanded,
}

/// Page numbers over time, the demanded ones in another colour.
pub fn map(history: &History) -> Plot {
    if history.arrivals.is_empty() || history.pages == 0 {
        return Ok(None);
    }
    let dots = dots(history);
    let (span, pages) = (history.span_ns() as f64, history.pages as f64);
    draw("the map of arrivals", SIZE, |area| {
        let mut chart = ChartBuilder::on(area)
            .caption("Which page came when", ("sans-serif", 14))
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..span, 0.0..pages)?;
        chart
            .configure_mesh()
            .disable_mesh()
            .x_desc("time since the first vCPU ran at the destination")
            .y_desc("page")
            .x_labels(7)
            .x_label_formatter(&|x| nanos(*x))
            .y_label_formatter(&|y| format!("{y:.0}"))
            .draw()?;
        let field = |column: usize, row: usize| {
            let x = |column| column as f64 * span / FIELDS.0 as f64;
            let y = |row| row as f64 * pages / FIELDS.1 as f64;
            [(x(column), y(row)), (x(column + 1), y(row + 1))]
        };
        for (name, dot, color) in
            [("not asked for", Dot::Pushed, PUSHED), ("demanded", Dot::Demanded, DEMANDED)]
        {
            let fields = (0..FIELDS.0 * FIELDS.1).filter(|index| dots[*index] == dot);
            let drawn = fields.map(|index| {
                Rectangle::new(field(index / FIELDS.1, index % FIELDS.1), color.filled())
            });
            chart
                .draw_series(drawn)?
                .label(name)
                .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 8, y + 4)], color.filled()));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(OTHER).draw()
    })
}

/// The fields, column by column.
fn dots(history: &History) -> Vec<Dot> {
    let mut dots = vec![Dot::Nothing; FIELDS.0 * FIELDS.1];
    for arrival in &history.arrivals {
        let dot = match arrival.kind {
            EventKind::Demand => Dot::Demanded,
            _ => Dot::Pushed,
        };
        let part = |value: u64, of: u64, fields: usize| {
            ((u128::from(value) * fields as u128 / u128::from(of)) as usize).min(fields - 1)
        };
        let column = part(arrival.at_ns, history.span_ns(), FIELDS.0);
        let last = u64::from(arrival.page) + u64::from(arrival.count.max(1)) - 1;
        let first = part(u64::from(arrival.page), history.pages, FIELDS.1);
        for row in first..=part(last, history.pages, FIELDS.1) {
            let field = &mut dots[column * FIELDS.1 + row];
            *field = (*field).max(dot);
        }
    }
    dots
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plots::history::tests::recorded;

    #[test]
    fn a_page_is_where_it_came_and_a_demanded_one_is_seen() {
        let history = History::of(&recorded()).unwrap();
        let dots = dots(&history);
        let at = |micros: usize, page: usize| {
            let column = (micros * FIELDS.0 / 100).min(FIELDS.0 - 1);
            dots[column * FIELDS.1 + page * FIELDS.1 / 256]
        };
        assert_eq!(at(60, 7), Dot::Demanded);
        assert_eq!(at(80, 16), Dot::Pushed);
        assert_eq!(at(80, 79), Dot::Pushed);
        assert_eq!(at(80, 90), Dot::Nothing);
        assert_eq!(at(100, 110), Dot::Pushed, "the last moment is on the map");
        assert_eq!(at(90, 200), Dot::Nothing, "a hole is no arrival");
    }
}
