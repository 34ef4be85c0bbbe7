//! [`Content`]: what is put into pages, as it lies in received datagrams.

use crate::proto::page::PAGE_SIZE;
use bytes::Bytes;
use std::io::IoSlice;

/// Bytes in one or more pieces, which need not end where pages do.
#[derive(Clone, Copy, Debug)]
pub struct Content<'a> {
    first: &'a [u8],
    rest: &'a [Bytes],
    length: usize,
}

impl<'a, T: AsRef<[u8]> + ?Sized> From<&'a T> for Content<'a> {
    fn from(bytes: &'a T) -> Self {
        let first = bytes.as_ref();
        Self { first, rest: &[], length: first.len() }
    }
}

impl<'a> Content<'a> {
    /// All of `pieces`, one after the other.
    pub fn of_pieces(pieces: &'a [Bytes]) -> Self {
        let length = pieces.iter().map(Bytes::len).sum();
        match pieces.split_first() {
            Some((first, rest)) => Self { first, rest, length },
            None => Self { first: &[], rest: &[], length },
        }
    }

    /// Its bytes in all.
    pub fn len(self) -> usize {
        self.length
    }

    /// Whether it has none.
    pub fn is_empty(self) -> bool {
        self.length == 0
    }

    /// What is left behind its first `bytes`; nothing if it has no more.
    pub fn behind(mut self, bytes: usize) -> Self {
        let mut skip = bytes.min(self.length);
        self.length -= skip;
        while skip >= self.first.len() {
            let Some((next, rest)) = self.rest.split_first() else { break };
            skip -= self.first.len();
            (self.first, self.rest) = (next, rest);
        }
        self.first = &self.first[skip..];
        self
    }

    /// Its first `bytes`, or all of it.
    pub fn up_to(mut self, bytes: usize) -> Self {
        self.length = self.length.min(bytes);
        self
    }

    /// Its pieces in order; none is empty.
    pub fn pieces(self) -> impl Iterator<Item = &'a [u8]> {
        let mut left = self.length;
        let pieces = std::iter::once(self.first).chain(self.rest.iter().map(Bytes::as_ref));
        pieces
            .map_while(move |piece| {
                let part = &piece[..piece.len().min(left)];
                left -= part.len();
                (left > 0 || !part.is_empty()).then_some(part)
            })
            .filter(|piece| !piece.is_empty())
    }

    /// The first pieces, as the kernel takes several of them; as many as there is room for.
    pub(super) fn slices<'s>(self, room: &'s mut [IoSlice<'a>]) -> &'s [IoSlice<'a>] {
        let mut count = 0;
        for (slice, piece) in room.iter_mut().zip(self.pieces()) {
            *slice = IoSlice::new(piece);
            count += 1;
        }
        &room[..count]
    }

    /// The whole pages that it begins with, if they lie in one piece; else its first page, put
    /// together in `page`. It has a page at least.
    pub(super) fn first_pages<'s>(self, page: &'s mut [u8; PAGE_SIZE]) -> &'s [u8]
    where
        'a: 's,
    {
        let whole = self.first.len().min(self.length) / PAGE_SIZE * PAGE_SIZE;
        if whole > 0 {
            return &self.first[..whole];
        }
        let mut at = 0;
        for piece in self.up_to(PAGE_SIZE).pieces() {
            page[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
        }
        debug_assert_eq!(at, PAGE_SIZE, "less than a page");
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn joined(content: Content<'_>) -> Vec<u8> {
        content.pieces().flatten().copied().collect()
    }

    proptest! {
        #[test]
        fn any_part_of_any_pieces_is_the_same_part_of_all_bytes(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..6),
            (skip, most) in (0usize..60, 0usize..60),
        ) {
            let bytes: Vec<u8> = pieces.concat();
            let pieces: Vec<Bytes> = pieces.into_iter().map(Bytes::from).collect();
            let content = Content::of_pieces(&pieces);
            prop_assert_eq!(content.len(), bytes.len());
            let part = content.behind(skip).up_to(most);
            let from = skip.min(bytes.len());
            let expected = &bytes[from..][..most.min(bytes.len() - from)];
            prop_assert_eq!(part.len(), expected.len());
            prop_assert!(part.pieces().all(|piece| !piece.is_empty()));
            prop_assert_eq!(joined(part), expected);
            // Twice in parts, too.
            prop_assert_eq!(joined(part.behind(3)), expected.get(3..).unwrap_or_default());

            let mut room = [IoSlice::new(&[]); 3];
            let slices = part.slices(&mut room);
            let sliced: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
            prop_assert!(expected.starts_with(&sliced));
            prop_assert_eq!(slices.len(), part.pieces().count().min(3));
        }
    }

    #[test]
    fn pages_are_taken_from_where_they_lie_and_put_together_where_they_do_not() {
        let bytes: Vec<u8> = (0..4 * PAGE_SIZE).map(|at| (at % 251) as u8).collect();
        let cut = 2 * PAGE_SIZE + 100;
        let pieces = [&bytes[..cut], &bytes[cut..cut + 50], &bytes[cut + 50..]];
        let pieces = pieces.map(Bytes::copy_from_slice);
        let mut content = Content::of_pieces(&pieces);
        let mut lengths = Vec::new();
        let mut seen = Vec::new();
        while !content.is_empty() {
            let mut page = [0; PAGE_SIZE];
            let pages = content.first_pages(&mut page);
            lengths.push(pages.len() / PAGE_SIZE);
            seen.extend_from_slice(pages);
            content = content.behind(pages.len());
        }
        assert_eq!(lengths, [2, 1, 1]);
        assert_eq!(seen, bytes);
    }
}
