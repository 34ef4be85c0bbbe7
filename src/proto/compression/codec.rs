//! Pages to LZ4 blocks and back: [`Compressor`] and [`Decompressor`].
//!
//! A frame's pages are one block of the LZ4 block format, without a header of its own: how many
//! pages it holds, and how long it is, the frame says. Both ends work in memory that is made
//! once; nothing is allocated for a frame.
//!
//! The crate is built without `unsafe`. It refuses blocks that copy from before their beginning,
//! so nothing of an earlier frame can show in a later one.

use crate::proto::page::{PAGE_SIZE, RUN_PAGES_MAX};
use lz4_flex::block::{
    CompressTable, DecompressError, compress_into_with_table, decompress_into,
    get_maximum_output_size,
};

/// The most bytes of pages in a frame.
const BYTES_MAX: usize = RUN_PAGES_MAX as usize * PAGE_SIZE;
/// Pages that do not become smaller by such a part are sent as they are: the destination
/// would have the work, and the link hardly anything of it.
const LEAST_GAIN: usize = 8;

/// Makes blocks of pages.
pub struct Compressor {
    table: CompressTable,
    block: Box<[u8]>,
}

/// Makes pages of blocks.
pub struct Decompressor {
    /// A block that came in several pieces.
    block: Box<[u8]>,
    pages: Box<[u8]>,
}

/// A block that no honest peer sends.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// It does not follow the format, or holds more than its frame says.
    #[error("a compressed frame of {expected} bytes of pages cannot be decompressed")]
    Malformed {
        /// Bytes of the frame's pages.
        expected: usize,
        /// What is wrong.
        #[source]
        source: DecompressError,
    },
    /// It holds less than its frame says.
    #[error("a compressed frame holds {got} bytes of pages; its header says {expected}")]
    Short {
        /// Bytes that came out of it.
        got: usize,
        /// Bytes of the frame's pages.
        expected: usize,
    },
    /// More than any frame may have.
    #[error("a compressed frame of {block} bytes for {pages} bytes of pages is too long")]
    TooLong {
        /// Bytes of the block.
        block: usize,
        /// Bytes of the frame's pages.
        pages: usize,
    },
}

impl Compressor {
    /// One with its memory, about 300 KiB.
    pub fn new() -> Self {
        let block = vec![0; get_maximum_output_size(BYTES_MAX)].into();
        Self { table: CompressTable::large(), block }
    }

    /// The block of these pages; `None` if it is not smaller by an eighth, or if there are
    /// more pages than a frame may have.
    pub fn compress(&mut self, pages: &[u8]) -> Option<&[u8]> {
        if pages.len() > BYTES_MAX {
            return None;
        }
        // It fails only for want of room, and the most that it needs is there.
        let length = compress_into_with_table(pages, &mut self.block, &mut self.table).ok()?;
        (length <= pages.len() - pages.len().div_ceil(LEAST_GAIN)).then(|| &self.block[..length])
    }
}

impl Default for Compressor {
    fn default() -> Self {
        Self::new()
    }
}

impl Decompressor {
    /// One with its memory, 512 KiB.
    pub fn new() -> Self {
        Self { block: vec![0; BYTES_MAX].into(), pages: vec![0; BYTES_MAX].into() }
    }

    /// The pages of the block that `pieces` are, exactly so many bytes.
    ///
    /// # Errors
    /// It is no block, or one of more or fewer bytes, or of more than a frame may have.
    pub fn decompress<'a>(
        &'a mut self,
        pieces: impl IntoIterator<Item = &'a [u8]>,
        bytes: usize,
    ) -> Result<&'a [u8], BlockError> {
        let mut pieces = pieces.into_iter().peekable();
        let first = pieces.next().unwrap_or_default();
        let block = if pieces.peek().is_none() {
            first
        } else {
            let mut length = 0;
            for piece in std::iter::once(first).chain(pieces) {
                let end = length + piece.len();
                let room = self.block.get_mut(length..end);
                room.ok_or(BlockError::TooLong { block: end, pages: bytes })?
                    .copy_from_slice(piece);
                length = end;
            }
            &self.block[..length]
        };
        let room = self.pages.get_mut(..bytes);
        let pages = room.ok_or(BlockError::TooLong { block: block.len(), pages: bytes })?;
        match decompress_into(block, pages) {
            Ok(got) if got == bytes => Ok(pages),
            Ok(got) => Err(BlockError::Short { got, expected: bytes }),
            Err(source) => Err(BlockError::Malformed { expected: bytes, source }),
        }
    }
}

impl Default for Decompressor {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decompressor").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes of so many pages: `words` different words in an order by `seed`, and one word in
    /// `noise` that is like no other.
    fn pages(count: usize, words: u64, noise: u64, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 11
        };
        let mut word = || {
            let drawn = next();
            if drawn % noise == 0 { next().wrapping_mul(0x9E37_79B9) } else { drawn % words }
        };
        (0..count * PAGE_SIZE / 8).flat_map(|_| word().to_le_bytes()).collect()
    }

    /// A block by hand: so many literal bytes, from `content`, and then a copy.
    fn block(literals: &[u8], offset: u16, copied: usize) -> Vec<u8> {
        let mut block = vec![((literals.len() as u8) << 4) | 15];
        block.extend(literals);
        block.extend(offset.to_le_bytes());
        block.extend(std::iter::repeat_n(255, (copied - 19) / 255));
        block.push(((copied - 19) % 255) as u8);
        block
    }

    #[test]
    fn pages_that_do_not_become_smaller_are_left_as_they_are() {
        let mut compressor = Compressor::new();
        assert!(compressor.compress(&pages(64, 1 << 40, 1, 3)).is_none());
        assert!(compressor.compress(&vec![0; BYTES_MAX + PAGE_SIZE]).is_none());
        assert!(compressor.compress(&[]).is_none_or(<[u8]>::is_empty));
        let zeros = compressor.compress(&[0; BYTES_MAX]).unwrap().len();
        assert!((1..BYTES_MAX / 100).contains(&zeros), "{zeros}");
    }

    /// The format is read by another hand: a block made by the format's text, not by the crate.
    #[test]
    fn a_block_written_by_hand_is_read() {
        let mut decompressor = Decompressor::new();
        // "abcd" once, then copied on to the page's end but for the last five bytes.
        let mut made = block(b"abcd", 4, PAGE_SIZE - 9);
        made.extend([0x50, b'v', b'w', b'x', b'y', b'z']);
        let mut expected = b"abcd".repeat(PAGE_SIZE / 4);
        expected.truncate(PAGE_SIZE - 5);
        expected.extend(b"vwxyz");
        assert_eq!(decompressor.decompress([&made[..]], PAGE_SIZE).unwrap(), expected);
    }

    #[test]
    fn hostile_blocks_are_refused_by_name() {
        let mut decompressor = Decompressor::new();
        let mut refused = |block: &[u8], bytes| {
            let error = decompressor.decompress([block], bytes).unwrap_err();
            chain(&error)
        };
        let short = block(b"abcd", 4, PAGE_SIZE / 2);
        for (block, bytes, expected) in [
            (vec![], PAGE_SIZE, "cannot be decompressed"),
            (vec![0], PAGE_SIZE, "holds 0 bytes of pages; its header says 4096"),
            (short, PAGE_SIZE, "cannot be decompressed"),
            (vec![0x40, 1, 2, 3, 4], PAGE_SIZE, "holds 4 bytes of pages; its header says 4096"),
            // Gigabytes by a few kilobytes.
            ([vec![0x1f, 7, 1, 0], vec![255; 9000]].concat(), PAGE_SIZE, "cannot be decompressed"),
            (block(b"abcd", 4, PAGE_SIZE), PAGE_SIZE, "too small"),
            // From before the beginning: what an earlier frame has left there.
            (block(b"abcd", 5, PAGE_SIZE - 4), PAGE_SIZE, "not contained"),
            (block(b"abcd", 0, PAGE_SIZE - 4), PAGE_SIZE, "0 is not a valid match offset"),
            (vec![0xf0, 255], PAGE_SIZE, "expected another byte"),
            (vec![0; 10], BYTES_MAX + PAGE_SIZE, "too long"),
        ] {
            let why = refused(&block, bytes);
            assert!(why.contains(expected), "{block:x?} for {bytes}: {why}");
        }
        let long = vec![0; BYTES_MAX / 2 + 1];
        let error = decompressor.decompress([&long[..], &long[..]], BYTES_MAX).unwrap_err();
        assert!(matches!(error, BlockError::TooLong { .. }), "{error}");
    }

    fn chain(error: &dyn std::error::Error) -> String {
        let cause = error.source().map(|cause| format!(": {cause}"));
        format!("{error}{}", cause.unwrap_or_default())
    }

    proptest! {
        #[test]
        fn what_is_compressed_comes_out_the_same_however_it_is_cut(
            count in 1usize..=64, words in 1u64..2000, noise in 2u64..500, seed: u64,
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let pages = pages(count, words, noise, seed);
            let mut compressor = Compressor::new();
            // What it did before must not matter.
            compressor.compress(&[7; 3 * PAGE_SIZE]);
            if let Some(block) = compressor.compress(&pages) {
                prop_assert!(!block.is_empty() && block.len() < pages.len());
                let mut at: Vec<_> = cuts.iter().map(|cut| cut.index(block.len())).collect();
                at.sort_unstable();
                let ends = at.iter().copied().chain([block.len()]);
                let starts = [0].into_iter().chain(at.iter().copied());
                let pieces = starts.zip(ends).map(|(start, end)| &block[start..end]);
                let mut decompressor = Decompressor::new();
                prop_assert_eq!(decompressor.decompress(pieces, pages.len()).unwrap(), &pages[..]);
            }
        }

        #[test]
        fn a_block_that_was_changed_is_refused_or_as_long_as_it_should_be(
            count in 1usize..=64, seed: u64,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            keep in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut compressor = Compressor::new();
            let mut block = compressor.compress(&pages(count, 9, 50, seed)).unwrap().to_vec();
            for (at, byte) in changes {
                let at = at.index(block.len());
                block[at] = byte;
            }
            if let Some(keep) = keep {
                block.truncate(keep.index(block.len()));
            }
            let mut decompressor = Decompressor::new();
            if let Ok(pages) = decompressor.decompress([&block[..]], count * PAGE_SIZE) {
                prop_assert_eq!(pages.len(), count * PAGE_SIZE);
            }
        }

        #[test]
        fn no_bytes_make_it_panic_or_show_what_came_before(
            block in prop::collection::vec(prop_oneof![Just(0u8), Just(255), any::<u8>()], 0..600),
            count in 1usize..=64,
        ) {
            // Two that have held different pages make the same of it, whatever it is.
            let mut compressor = Compressor::new();
            let outcomes = [1u8, 2].map(|before| {
                let mut decompressor = Decompressor::new();
                let held = compressor.compress(&[before; BYTES_MAX]).unwrap();
                decompressor.decompress([held], BYTES_MAX).unwrap();
                decompressor.decompress([&block[..]], count * PAGE_SIZE).ok().map(<[u8]>::to_vec)
            });
            prop_assert_eq!(&outcomes[0], &outcomes[1]);
        }
    }
}
