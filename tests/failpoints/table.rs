//! The failpoint matrix of `docs/failures.md`, read.

use postcopy::failpoint::{Point, Process};
use std::fmt;

/// The kinds of failure, in the order of the table's columns, and what a point is told.
pub const KINDS: [(&str, &str); 7] = [
    ("error", "error"),
    ("delay", "delay 300"),
    ("crash", "crash"),
    ("cut", "cut 2500"),
    ("half-open out", "half-out 2500"),
    ("half-open in", "half-in 2500"),
    ("stall", "stall"),
];

/// Where the guest is at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At the destination, every page verified.
    There,
    /// At the source, running, and verified after it was migrated once more.
    Here,
    /// Lost: the destination died with it.
    LostDestination,
    /// Lost: it cannot go on at the destination.
    LostGuest,
    /// Lost: its VMM died with it, or cannot let it run on.
    LostVmm,
}

impl Place {
    const ALL: [(&str, Place, i32); 5] = [
        ("there", Place::There, 0),
        ("here", Place::Here, 3),
        ("lost destination", Place::LostDestination, 4),
        ("lost guest", Place::LostGuest, 4),
        ("lost vmm", Place::LostVmm, 4),
    ];
}

/// What a cell may come to: the place, and the fault server's exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected(Vec<(Place, Vec<i32>)>);

impl Expected {
    /// `here`, `there 0/1`, `here or there`.
    fn parse(text: &str) -> Option<Self> {
        let parts = text.split(" or ").map(|part| {
            let found = Place::ALL.iter().find(|(name, ..)| part.starts_with(name));
            let (name, place, code) = found?;
            let codes = part.strip_prefix(name)?.trim();
            let codes = match codes {
                "" => vec![*code],
                codes => codes.split('/').map(|code| code.parse().ok()).collect::<Option<_>>()?,
            };
            Some((*place, codes))
        });
        parts.collect::<Option<_>>().map(Self)
    }

    /// Whether that is one of them.
    pub fn allows(&self, place: Place, code: Option<i32>) -> bool {
        let fits = |codes: &[i32]| code.is_some_and(|code| codes.contains(&code));
        self.0.iter().any(|(one, codes)| *one == place && fits(codes))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(_, place, _)| place == self).map_or("?", |one| one.0);
        f.write_str(name)
    }
}

/// The table.
pub struct Table(Vec<(String, Vec<String>)>);

impl Table {
    /// Reads it from the document.
    pub fn read() -> Self {
        let page = include_str!("../../docs/failures.md");
        let start = page.find("| point | component | phase |").expect("a table of points");
        let rows = page[start..].lines().skip(2).take_while(|line| line.starts_with('|'));
        let rows = rows.map(|row| {
            let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
            assert_eq!(cells.len(), 3 + KINDS.len(), "{row}");
            let entries = cells[3..].iter().map(|cell| (*cell).to_owned()).collect();
            (cells[0].trim_matches('`').to_owned(), entries)
        });
        Self(rows.collect())
    }

    /// The points in it.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// The kinds of failure at `point`, each with what must come of it. Without are only
    /// those that cannot be there.
    pub fn row(&self, point: &Point) -> impl Iterator<Item = (&'static str, Expected)> {
        let row = self.0.iter().find(|(name, _)| name == point.name);
        let (_, entries) = row.unwrap_or_else(|| panic!("{} is not in the table", point.name));
        let (fails, name) = (point.fails, point.name);
        let has_link = matches!(point.process, Process::Source | Process::Destination);
        let cells = KINDS.iter().zip(entries.clone()).filter_map(move |((kind, _), entry)| {
            let can_be = match *kind {
                "error" => fails,
                "delay" | "crash" | "stall" => true,
                _ => has_link,
            };
            if !can_be {
                assert_eq!(entry, "-", "{name} {kind}: it cannot be there");
                return None;
            }
            let expected = Expected::parse(&entry);
            Some((
                *kind,
                expected.unwrap_or_else(|| panic!("{name} {kind}: {entry:?} is no entry")),
            ))
        });
        cells.collect::<Vec<_>>().into_iter()
    }
}
